"""Perplexity, bits per byte and forgetting, by one protocol that stands in every result.

    python eval.py --model out/legal/final --baseline DIR --text law=shards/domain tales=tales.txt --general tales
    python eval.py --run out/legal --checkpoints --baseline DIR --tasks arc_easy=arc_easy.jsonl mine=questions.jsonl
    python eval.py --model out/spans/final --text law=shards/domain --objective.name span
    python eval.py --model out/masked/final --text law=shards/domain --objective.name masked --pll
    python eval.py --model out/legal/final --baseline DIR --probes facts in_context --trained law.txt --heldout new.txt

How a document is scored stands in measure/scoring.py, how an item of a benchmark in measure/tasks.py, what the probes
ask in measure/probes.py, what was gained and lost in measure/verdict.py and measure/retention.py.
"""

import core.threads

import contextlib
import functools
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import hf
import lora
import tokenizer as tokenizers
from core import checkpoint, cli, devices, sharding
from core.config import setting
from core.errors import UserError
from core.files import read_json, write_json
from learn import objectives
from learn.choose_objective import CAUSAL, ObjectiveConfig, check_scoring, make_objective, read_settings
from measure import probes, retention, run_code, verdict
from measure import tasks as benchmarks
from measure.scoring import format_table, heldout_documents, protocol, score, score_objective
from model import Model, ModelConfig
from text import corpus, packing, vocabulary
from text.mixture import DataConfig
from text.shards import Shards, check_tokenizer

# ---- files

def score_files(model, tokenizer, texts: dict[str, str], reading: cli.Reading, context: int | None = None,
                config: ObjectiveConfig = CAUSAL, pll: bool = False, reference=None) -> tuple:
    """({name: scores}, protocol) of {name: text file or packed folder}; of a packed folder, the held-out documents, and
    under "objective" what an objective measures on sequences of them.

    context: tokens per window; default: the model's, at most 2,048. pll: by pseudo-log-likelihood. reference: a model.
    """
    longest = model.config.max_position_embeddings
    context = context or min(longest, 2048)
    if context > longest:
        print(f"warning: --context {context} is beyond the {longest} positions of the model", file=sys.stderr)
    prefix = vocabulary.token_before_document(tokenizer)
    learned, results = make_objective(config, True, tokenizer, model.config.vocab_size), {}
    objective = objectives.PseudoLikelihood(learned) if pll else learned.text_objective
    if learned.uses_reference and reference is None:
        raise UserError(f"objective {config.name} compares two models; name --model and --baseline, not --run")
    learned.reference = lambda _: contextlib.nullcontext(reference)
    for name, file in texts.items():
        if is_packed := (Path(file) / "manifest.json").is_file():
            shards = Shards(file, "heldout")
            check_tokenizer(name, shards, tokenizer, model.config.vocab_size)
            documents, counted = heldout_documents(shards, max_tokens=2**62), shards.lost
        else:
            texts_of_file = corpus.read_documents([file], reading)
            raw = [text for text in texts_of_file if text]
            counted = {"empty_documents": texts_of_file.empty} if texts_of_file.empty else {}
            if lost := vocabulary.measure_loss(tokenizer, raw[:64]):
                counted["lost_share"] = lost
            encoded = zip(raw, tokenizer.encode_batch(raw))
            documents = [(ids, len(corpus.utf8(text))) for text, ids in encoded if len(ids)]
        if not documents:
            raise UserError(f"text {name} ({file}) is empty")
        results[name] = score(model, objective, documents, prefix, context) | counted
        if is_packed and learned.measures and shards.format in learned.forms:
            held = packing.pack_sources({name: shards}, DataConfig(context=context), learned.shift,
                                        learned.text_length(context))[name]
            results[name]["objective"] = score_objective(model, learned, held, 2**62)
    return results, protocol(objective, prefix, context, next(model.parameters()).dtype)


# ---- command

@dataclass(kw_only=True)
class Eval:
    """Score texts under a model, beside the model it was before, or under each checkpoint of a run."""
    model: str | None = None
    """Model folder or hf:// id."""
    baseline: str | None = None
    """The model before, or what --json wrote of it: adds changes, domain gain, forgetting and what was kept."""
    run: str | None = None
    """A run folder: score each of its checkpoints instead, also into its eval_checkpoints.json."""
    checkpoints: list[int] = field(default_factory=list)
    """Steps of the checkpoints of --run to score (default: all)."""
    text: list[str] = field(default_factory=list)
    """NAME=FILE ...: texts to score, also a folder, a pattern or @LIST; of a packed folder, its held-out documents."""
    tasks: list[str] = field(default_factory=list)
    """NAME or NAME=FILE ...: benchmarks to score, their items from the Hub or a file; also multiple-choice or cloze
    files of your own (.jsonl), and task files of lm-evaluation-harness (.yaml)."""
    limit: int | None = setting(None, at_least=1)
    """Items of each task at most, spread evenly over its file."""
    shots: int | None = setting(None, at_least=0, at_most=100)
    """Examples before each item (default: the task's own number)."""
    run_code: bool = False
    """Run what a model writes for humaneval and mbpp on this machine: confined, as far as its kernel has no faults."""
    sampling: benchmarks.Sampling = field(default_factory=benchmarks.Sampling)
    batch_size: int = setting(32, at_least=1)
    """Sequences of a task that go through the model at a time."""
    probe: probes.ProbeOptions = field(default_factory=probes.ProbeOptions)
    general: list[str] = field(default_factory=list)
    """Names of the texts that are general: their rise is forgetting, the fall of the others the domain gain."""
    context: int | None = setting(None, at_least=1)
    """Tokens per window (default: the model's, at most 2048)."""
    pll: bool = False
    """Of a masked model: mask one token at a time, and tell the pseudo-log-likelihood in bits per byte."""
    reading: cli.Reading = field(default_factory=cli.Reading)
    device: cli.Device = field(default_factory=cli.Device)


def run_eval(options: Eval, settings: list[str] = ()) -> dict:
    config = read_settings(settings)
    if options.pll and config.name != "masked":
        raise UserError("--pll is for a masked model: set --objective.name masked, or leave it out")
    if bool(options.model) == bool(options.run):
        raise UserError("name one of --model and --run")
    if options.run and devices.DTYPES[options.device.dtype] != torch.float32:
        raise UserError(f"--dtype {options.device.dtype} is for --model: the checkpoints of a --run are scored as they "
                        f"would be exported, and computed in float32; leave it out")
    if options.checkpoints and not options.run:
        raise UserError("--checkpoints are those of a run: name its folder with --run")
    if not (options.text or options.tasks or options.probe.probes):
        raise UserError("name what to score: --text NAME=FILE, --tasks NAME=FILE or --probes facts in_context")
    if wrong := [text for text in options.text if text.find("=") < 1]:
        raise UserError(f"--text is {wrong[0]!r}, but must be NAME=FILE")
    texts = dict(text.split("=", 1) for text in options.text)
    if len(texts) < len(options.text):
        raise UserError("--text gives one name to two texts; name each once (a folder, a pattern or @LIST joins files)")
    if unknown := [name for name in options.general if name not in texts]:
        raise UserError(f"--general names {unknown[0]!r}, which no --text has; there are {', '.join(texts)}")
    if (options.tasks or options.probe.probes) and config.name != "causal":
        raise UserError(f"--tasks and --probes are for models that continue a text, not for objective {config.name}")
    tasks = options.sampling.apply(benchmarks.open_tasks(read_tasks(options)))
    if confined := run_code.check_permission([name for name, (task, _) in tasks.items() if task.rule == "program"],
                                             options.run_code):
        print(confined)
    how = options.reading, options.context, config, options.pll
    probing = probes.Probing(options.probe, options.reading)
    return (score_run if options.run else score_model)(options, texts, tasks, probing, how)


def read_tasks(options: Eval) -> dict[str, benchmarks.TaskSettings]:
    """{name: settings} of the words NAME or NAME=FILE."""
    named = [word.partition("=")[::2] for word in options.tasks]
    if len(dict(named)) < len(named):
        raise UserError("--tasks names one task twice; name each once")
    return {name: benchmarks.TaskSettings(file or None, options.limit, options.shots) for name, file in named}


def score_all(options: Eval, model: Model, tokenizer, texts: dict, tasks: dict, probing: probes.Probing, how: tuple,
              reference=None) -> dict:
    """{"texts", "protocol"} and, where they are asked for, "tasks", "probes" and the "tokenizer" that read them."""
    found = dict(zip(("texts", "protocol"), score_files(model, tokenizer, texts, *how, reference=reference)))
    if tasks:
        found["tasks"] = benchmarks.score_tasks(model, tokenizer, tasks, options.context,
                                                batch_size=options.batch_size, bars=True,
                                                judge=run_code.judge_programs if options.run_code else None)
    if answers := probing.score(model, tokenizer, context=options.context, batch_size=options.batch_size, bars=True):
        found["probes"] = answers
    if tasks or answers:
        found["tokenizer"] = tokenizer.fingerprint
    return found


def compare_sides(options: Eval, before: dict, after: dict, readers=()) -> dict:
    """What changed, was gained and was lost between two results of `score_all`: of the texts as `verdict.compare` says
    it; of the tasks "tasks_change" and "capabilities" as `retention.compare` does; of the probes "probes_change", the
    differences of their values. readers: the tokenizers of both."""
    found = verdict.compare(before["texts"], after["texts"], options.general)
    if "tokenizer" in after:
        check_tokenizers(before, after, readers)
    if "probes" in after:
        retention.check_baseline(before["probes"], after["probes"])
        found["probes_change"] = {name: row["value"] - before["probes"][name]["value"]
                                  for name, row in after["probes"].items() if name in before["probes"]}
    if "tasks" in after:
        kept = retention.compare(before["tasks"], after["tasks"])
        found |= {"tasks_change": kept["change"], "capabilities": kept["capabilities"]} | retention.judge(found, kept)
    return found


def check_tokenizers(before: dict, after: dict, readers) -> None:
    """UserError where scores of tasks are of two tokenizers, unless one extends the other: the items are then cut into
    other tokens, and choices that one reads as a piece the other may spell."""
    tokens = sorted((reader.tokens for reader in readers), key=len)
    extends = len(tokens) == 2 and tokens[0] == tokens[1][:len(tokens[0])]
    if not extends and before.get("tokenizer") != after["tokenizer"]:
        raise UserError(f"--baseline {before['model']} has another tokenizer than the model, so that scores of tasks "
                        f"do not compare; name the model that this one was made of, or compare --text alone")


def read_baseline(options: Eval, texts: dict, tasks: dict) -> dict | None:
    """What --json wrote of a model, where --baseline is such a file."""
    file = options.baseline
    if not file or not Path(file).is_file():
        return None
    found = read_json(file, dict)
    for kind, names, keys in (("texts", texts, ("perplexity", ("bits_per_byte", "accuracy"))),
                              ("tasks", tasks, ("value",))):
        held = found.get(kind) if isinstance(found.get(kind), dict) else {}
        if lacking := [name for name in names if not has_scores(held.get(name), keys)]:
            raise UserError(f"--baseline {file} has no scores of {kind.removesuffix('s')} {lacking[0]}; write it by "
                            f"eval.py --model DIR --json {file} with the same --text and --tasks")
        found[kind] = {name: held[name] for name in names}
    if options.probe.probes and not isinstance(found.get("probes"), dict):
        raise UserError(f"--baseline {file} has no scores of probes; write it by eval.py --model DIR --json {file} "
                        f"with the same --probes and documents")
    # What cannot compare is refused before anything is scored.
    retention.check_baseline(found["tasks"], {name: benchmarks.identify(*opened) for name, opened in tasks.items()})
    return found | {"model": file}


def has_scores(result, keys) -> bool:
    """Whether a value out of a file is the scores of a text or a task, with these numbers, or one of each group."""
    groups = ([key] if isinstance(key, str) else key for key in keys)
    return isinstance(result, dict) and all(
        any(verdict.finite(result.get(key)) is not None for key in group) for group in groups)


def check_saved(before: dict, after: dict) -> None:
    """UserError where the scores of texts that a file holds are of other texts, or were measured in another way."""
    for name, scores in after["texts"].items():
        for key in ("documents", "bytes"):
            if (was := before["texts"][name].get(key)) != scores[key]:
                raise UserError(f"text {name} has {scores[key]} {key}, but {was} in --baseline {before['model']}; "
                                f"score the baseline anew on the same text")
    was = before.get("protocol") if isinstance(before.get("protocol"), dict) else {}
    for key in {**after["protocol"], **was} if after["texts"] else ():
        if was.get(key) != (value := after["protocol"].get(key)):
            raise UserError(f"--baseline {before['model']} was scored with {key} {was.get(key)}, and this model with "
                            f"{value}; score the baseline anew with the same options")


def print_tables(before: dict, after: dict):
    """What `score_all` found of two models, or of one; of two, also what `compare_sides` says of them."""
    if after["texts"]:
        print(format_table(before.get("texts"), after["texts"]))
    if "tasks" in after:
        print(benchmarks.format_tasks(before.get("tasks"), after["tasks"]))
    if "probes" in after:
        print("\n" + benchmarks.format_tasks(before.get("probes"), after["probes"]).replace("| task", "| probe", 1))
    if "capabilities" in after:
        print("\n" + retention.format_capabilities(after["capabilities"], after["tasks_change"]))


def print_verdict(found: dict):
    """What `compare_sides` says, in a few lines."""
    of_tasks = found.get("forgetting_of") == "tasks"
    if found["texts"]:
        print(verdict.describe(found | ({"forgetting": None} if of_tasks else {}), found["texts"]))
    if of_tasks:
        print(f"forgetting: capabilities {100 * found['forgetting']:+z.1f} % "
              f"({verdict.grade_forgetting(found['forgetting'])})")
    if found["score"] is not None:
        print(f"overall score: {100 * found['score']:+z.1f} % (domain gain less forgetting beyond 5 %)")


def score_run(options: Eval, texts: dict, tasks: dict, probing: probes.Probing, how: tuple) -> dict:
    folder, device = Path(options.run, "checkpoints"), devices.pick_device(options.device.device)
    if not (steps := checkpoint.steps(folder)):
        raise UserError(f"{options.run} holds no checkpoints")
    if missing := [step for step in options.checkpoints if step not in steps]:
        raise UserError(f"{options.run} has no checkpoint of step {missing[0]}, but of {', '.join(map(str, steps))}")
    result, before, reader = {"run": options.run, "checkpoints": []}, read_baseline(options, texts, tasks), []
    if options.baseline and not before:
        base = hf.open_base(options.baseline)
        reader = [tokenizers.load(base.folder)]
        model = hf.load(base, device=device)
        before = {"model": options.baseline} | score_all(options, model, *reader, texts, tasks, probing, how)

    def score_one(model: Model, tokenizer, /, **about) -> dict:
        row = about | score_all(options, model, tokenizer, texts, tasks, probing, how)
        if before:
            if not reader:
                check_saved(before, row)
            row |= compare_sides(options, before, row, [*reader, tokenizer])
        result["protocol"] = row.pop("protocol")
        print(f"step {row['step']}: {row['model']}" if "step" in row else row["model"])
        print_tables(before or {}, row)
        return row
    for step in steps:
        if options.checkpoints and step not in options.checkpoints:
            continue
        checkpoint.verify(path := checkpoint.path_of(folder, step))
        model, state, name = load_checkpoint(path)
        if not result["checkpoints"]:
            check_scoring(options.run, state["identity"], how[2])
        place = state["tokenizer"]
        tokenizer = tokenizers.load(hf.open_base(place).folder if place.startswith("hf://") else place)
        result["checkpoints"].append(score_one(model.to(device), tokenizer, step=step, model=name))
    if (final := Path(options.run, "final")).is_dir():
        result["final"] = score_one(hf.load(final, device=device), tokenizers.load(final), model="final/")
    if before:
        result["baseline"] = before
        print("\n" + retention.format_course(result["checkpoints"]))
    elif tasks:
        print("forgetting: unknown (name the model before with --baseline)")
    write_json(Path(options.run, "eval_checkpoints.json"), result)
    return result


def load_checkpoint(path) -> tuple[Model, dict, str]:
    """(what a run that ended at a checkpoint would export, before a merge; the checkpoint's state; what it is)."""
    state = checkpoint.read_state(path)
    tensors, moments, _ = checkpoint.load(path, ("model/", "state/ema:"))
    identity, name = state["identity"], "weights in training"
    if averaged := {key.removeprefix("ema:"): mean for key, mean in moments.items() if key.startswith("ema:")}:
        tensors, name = tensors | averaged, "moving average of the weights"
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(hf.OF_OBJECTIVE)}
    try:
        adapters, config = lora.LoraConfig(**identity["lora"]), ModelConfig(**identity["model"])
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}/{checkpoint.STATE} describes no model ({error}); it was made by another "
                        f"version") from None
    # A run with adapters saves these alone; all else is the base's, and never in few bits.
    if adapters.rank:
        base, name = hf.open_base(state["base"]), f"base with the adapter ({name})"
        if base.fingerprint != identity["base"]:
            raise UserError(f"{base} is not the base that {path} was trained on; put that one back")
        model = hf.load(replace(base, changed=config))
        lora.attach(model, replace(adapters, base="plain"), seed=0)
    else:
        model = Model(config)
    part = ".adapters." if adapters.rank else ""
    shapes = [{name: tensor.shape for name, tensor in each.items()}
              for each in (sharding.model_state(model, part, torch.Tensor.detach), tensors)]
    if odd := sorted(name for name, _ in shapes[0].items() ^ shapes[1].items()):
        raise UserError(f"{path} does not hold the tensors of its model, among them {odd[0]}; it was made by another "
                        f"version")
    sharding.load_model_state(model, tensors, part)
    if adapters.rank:
        lora.merge(model)
    for weight in model.parameters():
        weight.data = weight.data.to(devices.DTYPES.get(state["dtype"], torch.float32)).float()
    merges = "merge" in identity["forget"]
    return model, state, name + (", before the merge with the base" if merges else "")


def score_model(options: Eval, texts: dict, tasks: dict, probing: probes.Probing, how: tuple) -> dict:
    device, dtype = devices.pick_device(options.device.device), devices.DTYPES[options.device.dtype]
    saved = read_baseline(options, texts, tasks)
    paths = [path for path in (options.model, None if saved else options.baseline) if path]
    bases = {path: hf.open_base(path) for path in paths}
    models = {path: hf.load(base, dtype, device) for path, base in bases.items()}
    readers = {path: tokenizers.load(base.folder) for path, base in bases.items()}
    result, *other = [{"model": path} | score_all(options, models[path], readers[path], texts, tasks, probing,
                                                  how, models.get(options.baseline)) for path in paths]
    if options.baseline:
        if saved:
            check_saved(saved, result)
        result["baseline"] = saved or other[0]
        result |= compare_sides(options, result["baseline"], result, readers.values())
    print_tables(result.get("baseline", {}), result)
    for name, scores in result["texts"].items():
        if measured := scores.get("objective"):
            print(f"{name}, objective: {', '.join(f'{key} {value:.4g}' for key, value in measured.items())}")
    print("windows of {context} tokens, prefix token {prefix_token_id}, {dtype}".format(**result["protocol"]))
    if options.baseline:
        print_verdict(result)
    elif tasks:
        print("forgetting: unknown (name the model before with --baseline)")
    return result


def main() -> int:
    words, settings = cli.take_settings(sys.argv[1:], "objective")
    return cli.run("eval.py", __doc__, (Eval, functools.partial(run_eval, settings=settings)), argv=words)


if __name__ == "__main__":
    sys.exit(main())
