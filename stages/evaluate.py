"""What a run says: what is about to run, a line per step, evaluations, and at its end the model and its worth."""

import contextlib
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import forget
import hf
import lora
from core import cli, devices, hashing, pipeline, sharding
from core.cli import run_command
from core.config import setting, to_toml
from core.errors import UserError
from core.files import write_json, write_text
from generate import Settings, first_ids, generate
from learn import adapters, adaptive, peft_files, schedules
from learn import merge as merging
from learn.choose_objective import describe_both_ways
from learn.distance import measure_distance
from measure import scoring, verdict
from measure.probes import ProbeSettings
from measure.tasks import TaskSettings
from model import matmul_flops_per_token
from stages.build import Run
from stages.questions import compare_answers, without_items
from stages.stopping import judge_evaluations
from text import mixture, vocabulary


@dataclass
class EvalSection:
    every: int = setting(500, above=0)
    """steps between evaluations; there is always one before the first step and one after the last"""
    tokens: int = setting(200_000, above=0, at_most=10**10)
    """held-out tokens scored of each source"""
    prompts: list[str] = field(default_factory=list)
    """texts that the model continues before and after; default: the beginnings of held-out documents"""
    sample_tokens: int = setting(64, at_least=0, at_most=10**5)
    """tokens of each continuation; 0: none"""
    tasks: dict[str, TaskSettings] = field(default_factory=dict)
    """benchmarks, or multiple-choice and cloze files of your own, scored at each evaluation"""
    probes: ProbeSettings = field(default_factory=ProbeSettings)
    stop_gain: float = setting(0.0, at_least=0, below=1)
    """end the run where the domain's bits per byte fall by less than this share of them for a million further tokens of
    the run (0.001: 0.1 %); 0: off"""
    stop_forgetting: float = setting(0.0, at_least=0, at_most=1e3)
    """end the run where the bits per byte of general text have risen by more than this share of them; 0: off"""
    stop_patience: int = setting(2, at_least=1, at_most=10**6)
    """evaluations one after another by which that is judged"""
    stop_after: int | None = setting(None, at_least=0)
    """steps of which no evaluation ends the run, because a first rise often passes; default: a fifth of the run"""


@dataclass
class ExportSection:
    dtype: cli.Dtype | None = None
    """type of the weights in final/; default: the base's"""


# Dense bf16 per second, from the vendors' data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


# ---- before the run

def describe(run: Run):
    """What is about to be run, in a few lines, with the warnings that a user wants before the run and not after it."""
    c, loader, say = run.c, run.loader, run.log.say
    parameters, epochs = adapters.count_elements(run.inner.whole)[1], loader.epochs(run.steps)
    say(f"model: {parameters / 1e6:.1f}M parameters, {run.config.family}, vocabulary {run.config.vocab_size:,}")
    if c.model.init == "pretrained":
        say(f"base: {run.base}, licence: {run.base.facts['license']}")
        rehearsed = any(shards.format != "text" for shards in loader.shards.values())
        if run.base.facts["chat_template"] and not rehearsed:
            say("warning: the base carries a chat template; continuing the pretraining of a chat model costs it its "
                "chat ability: mix in conversations (data.sources.NAME.format chat), or begin with its base model")
        if c.lora.rank:
            say(f"lora: {lora.trainable_share(run.inner.whole)}")
            if c.lora.embeddings == "frozen" and run.objective.token_ids:
                say(f"warning: objective {c.objective.name} puts tokens into the text whose embeddings do not train "
                    f"with lora.embeddings frozen; unless the base knows them, set lora.embeddings full, or rows with "
                    f"their ids in lora.embedding_rows")
        say(schedules.hint(parameters, "lora" if c.lora.rank else "full", c.optim))
    methods = [note for method in run.methods for note in method.notes]
    for note in [*run.objective.notes, *methods, *run.questions.notes]:
        say(note)
    longest = run.config.max_position_embeddings
    if c.data.context > longest:
        say(f"warning: data.context {c.data.context} is beyond the {longest} positions of the model, and its export "
            f"would still say {longest}; set --model.max-positions {c.data.context}, and for a base "
            f"--model.rope-scaling yarn or a larger --model.rope-theta")
    if c.lora.rank and (c.model.max_positions or c.model.rope_scaling or c.model.rope_theta):
        say("warning: adapter/ does not hold the positions that are set here; use final/, which does")
    moving = run.steps - c.optim.moment_warmup
    if schedules.warmup_length(moving, c.optim) >= moving:
        say("warning: the learning rate rises over the whole run; shorten optim.warmup_steps or optim.warmup_ratio")
    for name, shards in loader.shards.items():
        scored = sum(int(learned[0].sum()) if learned else len(ids)
                     for ids, _, *learned in run.heldout.get(name, []))
        pairs = len(run.held[name].table) // 2 if shards.format == "preference" and name in run.held else 0
        say(f"  {name} ({run.sources[name].role}): {shards.tokens:,} tokens, read {epochs[name]:.2f} times; "
            + (f"{pairs:,} held-out pairs" if pairs else f"{scored:,} held-out tokens scored"))
        if not scored and not pairs:
            fit, more = (f" that fit into data.context {c.data.context}", "raise that, or ") \
                if shards.format == "preference" else ("", "")
            say(f"warning: source {name} has no held-out documents{fit}, so it is not evaluated; {more}to hold some "
                f"out, pack it with data.py pack --format {shards.format} --heldout 0.1")
    for line in mixture.describe_mix(c.data, run.sources) + mixture.judge_epochs(epochs, run.sources)[1] + run.leaks:
        say(line)
    say(f"run: {run.steps:,} steps of {c.train.batch_size} x {c.data.context} = {run.tokens_per_step:,} tokens, "
        f"seed {c.seed}, {c.train.precision}, {run.world.size} x {run.world.device.type}")
    for name, packing in loader.packings.items():
        for line in packing.describe_loss(name):
            say(f"warning: {line}")
    lost = [f"{name} {abs(packing.padded):,} {'padded' if packing.padded > 0 else 'dropped'}"
            for name, packing in loader.packings.items() if packing.padded]
    kinds = {name: packing.kind for name, packing in loader.packings.items()}
    kind = ", ".join(map(" ".join, kinds.items()) if len({*kinds.values()}) > 1 else {*kinds.values()})
    say(f"packing: {kind}; positions an epoch without a token: {', '.join(lost) or 'none'}")


def with_full_paths(c):
    """The settings with what the run reads by absolute paths, so that they rerun it from any folder."""
    def full(section, *names):
        paths = {name: getattr(section, name) for name in names}
        # @ stands before a list of files.
        return dataclasses.replace(section, **{
            name: path if not path or path.startswith("hf://") else path[:path.startswith("@")] + str(
                Path(path.removeprefix("@")).absolute()) for name, path in paths.items()})
    sources = {name: full(source, "path") for name, source in c.data.sources.items()}
    return dataclasses.replace(c, model=full(c.model, "path", "tokenizer"),
                               objective=full(c.objective, "reference"), train=full(c.train, "branch_from"),
                               data=dataclasses.replace(c.data, sources=sources))


def begin(run: Run, start: int):
    """Write the first files of the run folder, unless the run goes on from a checkpoint of its own beyond step 0."""
    # The bar of a resumed run begins at the steps it has already done.
    run.log.bar.update(start)
    if run.saved:
        return
    if run.world.main:
        write_first_files(run, *adapters.count_elements(run.inner.whole))
    if run.guard.may_rewind:
        # There must always be a checkpoint to go back to.
        run.saver.save(start)


def write_first_files(run: Run, trained: int, parameters: int):
    c, device = run.c, run.world.device
    write_text(run.folder / "config.toml", to_toml(with_full_paths(c)))
    write_plan(run)
    run.log.record("start", 0, time=time.time(), run=run.folder.name, parameters=parameters,
                   trainable_parameters=trained,
                   tokens_per_step=run.tokens_per_step, total_steps=run.steps, device=str(device),
                   world_size=run.world.size, precision=c.train.precision, **describe_origin(run),
                   sources={name: describe_source(run.sources[name].role, shards.manifest)
                            for name, shards in run.loader.shards.items()},
                   code=hashing.find_commit(), versions={"torch": torch.__version__, "python": sys.version.split()[0]})


def describe_source(role: str, manifest: dict) -> dict:
    """What a source trains on, and the steps of its cleaning that data.py pack knew of."""
    train = manifest["splits"]["train"]
    return {"role": role, **{key: train[key] for key in ("tokens", "documents", "bytes")},
            "fingerprint": hashing.short_digest(repr(train["shards"]).encode()),
            "cleaning": [step for file in manifest["inputs"] for step in file.get("cleaning", [])]}


def describe_origin(run: Run) -> dict:
    """What the run began from, for a reader who has the run folder alone."""
    c, pretrained, tokenizer = run.c, run.c.model.init == "pretrained", run.tokenizer
    rate = schedules.recommended(run.inner.whole.count_parameters(), "lora" if c.lora.rank else "full")[0]
    return {"family": run.config.family, "vocab_size": run.config.vocab_size,
            "base": {"name": run.base.name, "license": run.base.facts["license"],
                     "fingerprint": run.base_fingerprint} if pretrained else None,
            "tokenizer": {"name": c.model.tokenizer or c.model.path, "vocab_size": tokenizer.vocab_size,
                          "fingerprint": tokenizer.fingerprint} if tokenizer else None,
            "recommended_lr": rate if pretrained else schedules.SCRATCH}


# ---- a step

def log_step(run: Run, step: int, result: dict, seconds: float):
    """The metrics and console line after `step` steps. result: what train_step returned for the last of them; seconds:
    the mean time of a step since the line before. Tokens are the positions that the model computes, under every
    objective: also padding, what is context alone, and what an objective puts in."""
    c, device, tokens = run.c, run.world.device, run.tokens_per_step
    values = {"loss": result["loss"], "lr": result["lr"], "grad_norm": result["grad_norm"], "tokens": step * tokens,
              "tokens_per_second": tokens / seconds, "step_ms": 1000 * seconds,
              "peak_gb": devices.peak_bytes(device) / 1e9}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)
    if peak:
        values["mfu"] = matmul_flops_per_token(run.config, c.data.context) * tokens / run.world.size / seconds / peak

    epochs, drawn = run.loader.epochs(step), dict(zip(run.loader.names, run.loader.plan[step].tolist()))
    values["replay_share"] = sum(drawn[name] for name in run.names_of("general")) / sum(drawn.values())
    # The share of domain sequences that this step, the run's number `step` - 1 from 0, was meant to have.
    replay = adaptive.share_in_force(run.decisions, step - 1)
    values["domain_share"] = run.domain_share_at(step - 1) if replay is None else 1 - replay
    values |= result["methods"]
    every = c.eval.every if c.log.distance is None else c.log.distance
    # In the first line at or behind a multiple, where log.every is none.
    if every and c.model.init == "pretrained" and (step % every < c.log.every or step == run.steps):
        values["distance"] = measure_distance(run.inner, run.base, run.world)
    values |= {"objective": result["measured"]} if result["measured"] else {}
    values["sources"] = {name: {"loss": nats / n, "tokens": drawn[name] * c.data.context, "epochs": epochs[name]}
                         for name, (nats, n) in result["sources"].items()}
    if run.world.size > 1:
        values["ranks"] = run.world.pace.compare(run.world.gather, seconds, run.log.say)
    if result["fault"]:
        run.log.record("left_out", step, message=result["fault"])
        run.log.say(f"warning: {result['fault']}: the update was left out, {run.guard.left_out} by now")
    run.log.record("train", step, **values)
    run.log.show_step(step, values, run.objective.is_likelihood)


# ---- an evaluation

def evaluate(run: Run, step: int) -> bool:
    """The evaluation before `step`: scores, the methods' decisions about the plan, before the first step samples.
    Returns whether the run is to end here, the same on every rank."""
    run.world.enter(f"the evaluation before step {step + 1}")
    scores = score_heldout(run, step)
    for method in run.methods:
        decision = method.evaluated(step, scores)                                           # evaluated
        if not decision:
            continue
        apply_decision(run, decision)
        share = "as scheduled" if decision["replay_share"] is None else decision["replay_share"]
        run.log.record("replay", **decision)
        run.log.say(f"replay at step {step}: {decision['reason']}; share {share}")
        # A plan that reads a source too often is refused before a run. Within a run it is better to go on.
        for refusal in mixture.judge_epochs(run.loader.epochs(run.steps), run.sources)[0][:1]:
            run.log.say(f"warning: {refusal}")
        if run.world.main:
            with run.log.going_on():
                write_plan(run)
    if step == 0:
        draw_samples(run, step)
    return may_end(run, step)


def may_end(run: Run, step: int) -> bool:
    """Whether a rule of eval.stop_* ends the run before `step`; then it is saved there, and finished as at its end."""
    known = [run.evaluations[name] for name in sorted(run.evaluations, key=lambda name: run.evaluations[name]["step"])]
    roles = {name: source.role for name, source in run.sources.items()}
    found = judge_evaluations(run.c.eval, known, roles, run.steps, run.tokens_per_step) if run.world.main else None
    run.ended = run.world.broadcast(found and found | {"step": step, "steps": run.steps})
    if run.ended:
        run.log.record("ended", **run.ended)
        run.log.say(f"the run ends at step {step} of {run.steps}: {run.ended['reason']}")
        if run.saved != step:
            run.saver.save(step)
    return run.ended is not None


def score(run: Run, model, world) -> tuple[dict, dict]:
    """({source: {"role", "bits_per_byte", ...}}, protocol) of the held-out documents under any model, computed as the
    run computes; the ranks of `world` share the batches. None: this rank alone scores them."""
    c, prefix = run.c, vocabulary.token_before_document(run.tokenizer) if run.tokenizer else 0
    objective = run.objective.text_objective
    scores = {name: {"role": run.sources[name].role, **run.loader.shards[name].lost,
                     **scoring.score(model, objective, documents, prefix, c.data.context, world,
                                        c.train.micro_batch_size, run.autocast)}
              for name, documents in run.heldout.items()}
    return scores, scoring.protocol(objective, prefix, c.data.context, devices.DTYPES[c.train.precision])


def score_heldout(run: Run, step: int, model=None, name: str = "", alone: bool = False) -> dict:
    """{source: {"role", "bits_per_byte", ...}} of the held-out documents; also in eval_step_N.json and,
    without the nats of each document, in metrics.jsonl.

    model, name: another model than the one in training, and what it is. alone: rank 0 scores it without the others."""
    c = run.c
    adapted = f"{c.lora.base.replace('plain', '')} base with the adapter".strip()
    name = name or (adapted if c.lora.rank else "weights in training")
    scores, protocol = score(run, model or run.inner, None if alone else run.world)
    # Of the weights in training, because a reference model or further modules may belong to the objective.
    measured = {} if alone and sharding.is_sharded(run.inner) else {
        source: scoring.score_objective(run.inner, run.objective, held, c.eval.tokens, None if alone else run.world,
                                           c.train.micro_batch_size, run.autocast, number)
        # In batch.source they stand behind the sources that are trained on.
        for number, (source, held) in enumerate(run.held.items(), len(run.loader.names))}
    asked = run.questions.ask(model or run.inner, run.tokenizer, None if alone else run.world, run.autocast)
    more = ({"objective": measured} if measured else {}) | asked
    run.log.record("eval", step, protocol=protocol, model=name, sources=without_items(scores),
                   **more | {kind: without_items(found) for kind, found in asked.items()})
    unit = "bits_per_byte" if run.objective.text_objective.causal else "accuracy"
    shown = ", ".join(f"{name} {score[unit]:.4f}" for name, score in scores.items())
    shown = [f"{shown} ({unit.replace('_', ' ')})"] if scores else []
    shown += [f"{source}: " + ", ".join(f"{measure} {value:.4g}" for measure, value in found.items()
                                        if measure != "sequences") for source, found in measured.items()]
    shown += [", ".join(f"{name} {result['value']:.4g}" for name, result in found.items()) for found in asked.values()]
    run.log.say(f"eval at step {step}: {'; '.join(shown)}")
    if run.world.main:
        file = f"eval_step_{step}.json"
        run.evaluations[file] = {"step": step, "texts": scores, "protocol": protocol, "model": name, **more}
        with run.log.going_on():
            # Those too that a full disk has not taken.
            for each in run.evaluations:
                if each == file or not (run.folder / each).exists():
                    write_json(run.folder / each, run.evaluations[each])
    return scores


def draw_samples(run: Run, step: int, model=None):
    """Continue the run's prompts, so that a reader of the report sees what changed: the beginnings of texts, and what
    stands before the first answer of conversations, which ends where theirs does."""
    c, tok = run.c, run.tokenizer
    if not run.objective.text_objective.causal or tok is None or not c.eval.sample_tokens:
        return
    ends, prompts = {tok.eos_id} - {None}, [(text, first_ids(tok, text)) for text in c.eval.prompts]
    for ids, _, *learned in (document for documents in run.heldout.values() for document in documents[:2]):
        # A conversation that is learned from its first token on begins as a text does.
        asked = ids[:learned[0].argmax()].tolist() if learned else []
        ends |= {int(ids[learned[0]][-1])} if learned else set()
        if not c.eval.prompts:
            text = tok.decode(asked or ids[:12].tolist())
            prompts.append((text, asked or first_ids(tok, text)))
    settings, samples = Settings(max_new_tokens=c.eval.sample_tokens, temperature=0.7, top_p=0.95, seed=c.seed), []
    for text, prompt in prompts:
        new = generate(model or run.inner, prompt, settings, ends, tok=tok)
        samples.append({"prompt": text, "text": tok.decode([i for i in new if i not in ends])})
    run.log.record("samples", step, samples=samples)


def apply_decision(run: Run, decision: dict):
    """Let a decision of adaptive replay hold from the step after the next one: the next one's batch has been read."""
    before = adaptive.share_in_force(run.decisions)
    run.decisions.append(decision)
    if decision["replay_share"] not in (None, before):
        run.loader.plan = mixture.replan(run.loader.plan, decision["step"] + 1, run.c.data, run.sources,
                                         1 - decision["replay_share"])


def write_plan(run: Run):
    """plan.jsonl: the plan before the run, and each decision since. With the settings it is the order of the data."""
    plan = {"step": 0, "steps": run.steps, "schedule": run.c.data.schedule, "domain_share": run.c.data.domain_share,
            "sequences": dict(zip(run.loader.names, run.planned[-1].tolist()))}
    write_text(run.folder / "plan.jsonl", "".join(json.dumps(line) + "\n" for line in [plan, *run.decisions]))


# ---- the end of a run

def finish(run: Run):
    """Export, merge with the base where that is set, evaluate what was exported, and report; eval.json says that the
    run is finished."""
    run.saver.finish()
    c, out, say, merges = run.c, run.folder, run.log.say, run.c.forget.merge.method != "none"
    run.world.enter("the export")
    # A merge is found by rank 0, which must hold the whole model for it, and so scores the merged one too.
    sharded = sharding.is_sharded(run.inner) and not merges
    with contextlib.ExitStack() as stack:
        for method in run.methods:
            stack.enter_context(method.exported(run.inner))                                 # exported
        export(run, out / ("trained" if merges else "final"))
        if not (run.world.main or sharded):
            return
        merged = merge_with_base(run) if merges and run.world.main else ""
        # No rank holds a sharded model, and final/ no modules of an objective: what is scored there is the one in
        # memory, before it is rounded.
        model = None if sharded or hasattr(run.inner, "objective") else load_beside(run, out / "final")
        after = score_heldout(run, run.done, model, "final/" if model else "", alone=not sharded)
        draw_samples(run, run.done, model)
    if not run.world.main:
        return
    first, last = (run.evaluations[f"eval_step_{step}.json"] for step in (0, run.done))
    losses = {name: score["nats_per_token"] for name, score in after.items()} | {
        name: found["loss"] for name, found in last.get("objective", {}).items() if "loss" in found}
    if lost := [name for name, loss in losses.items() if not math.isfinite(loss)]:
        # Weights can be finite and so large that nothing which is computed with them is.
        raise UserError(f"the trained model has no finite loss on the held-out text of {lost[0]}, so this run is not "
                        f"finished; lower --optim.lr and begin again, or export an earlier checkpoint: python hf.py "
                        f"export {out}/checkpoints/step_N --out DIR")
    before, protocol, asked = first["texts"], first["protocol"], first
    names = {"before": first.get("model", ""), "after": last["model"]}
    if c.lora.base != "plain" and model and (base := load_beside(run, run.base)):
        # In training the base was in few bits; what it was before is the base itself.
        before, names["before"] = score(run, base, None)[0], "base"
        asked = run.questions.ask(base, run.tokenizer, None, run.autocast)
    questions, table = compare_answers(asked, last)
    table = "\n\n".join([scoring.format_table(before, after), *table])
    held = f"Held-out documents, {names['before']} against {names['after']}; protocol: {json.dumps(protocol)}"
    write_card(run, out / "final", f"{table}\n\n{held}{merged}")
    comparison = verdict.compare(before, after, run.names_of("general")) if run.objective.text_objective.causal else {}
    objective = judge_objective(run, first, last) if last.get("objective") else {}
    write_json(out / "eval.json",
               {"protocol": protocol, "model": names, "before": before, "after": after, **comparison, **objective,
                **questions, **({"ended": run.ended} if run.ended else {})})
    say(table)
    run.log.close()
    try:
        # The report reads all that the folder holds of the run, so its verdict is the one that is shown.
        words = run_command("report.py", out).splitlines()[:-1]
        report = f"report: {out}/report.html"
    except UserError as error:
        if error.status > 128:
            # A signal, not a mistake.
            raise
        words, report = [], f"no report: {error}"
    print(*words, f"model: {out}/final   {report}", sep="\n", flush=True)


def judge_objective(run: Run, first: dict, last: dict) -> dict:
    """What eval.json says of the objective's measures before and after; each warning is said here too."""
    before, after = first["objective"], last["objective"]
    warnings = [f"source {name}: {line}" for name in after for line in run.objective.judge(before[name], after[name])]
    for line in warnings:
        run.log.say(f"warning: {line}")
    return {"objective": {"name": run.c.objective.name, "before": before, "after": after, "warnings": warnings}}


def load_beside(run: Run, folder):
    """The model of a folder, its weights in the type of the run's own; None where the device has no room for it."""
    dtype = run.inner.embed_tokens.weight.dtype
    try:
        return hf.load(folder, dtype, run.world.device)
    except torch.OutOfMemoryError:
        if sharding.is_sharded(run.inner):
            # Rank 0 alone cannot compute with its share of the model in training.
            run.log.say(f"warning: {folder} does not fit beside the model in training, and is scored on the CPU")
            return hf.load(folder, dtype)
        run.log.say(f"warning: {folder} does not fit beside the model in training, which is scored instead")
        return None


def write_card(run: Run, folder: Path, text: str):
    base = run.base if run.c.model.init == "pretrained" else None
    both_ways = describe_both_ways(run.c.objective.name, getattr(run.objective, "mask_id", None))
    write_text(folder / "README.md", hf.make_card(base, folder.name, both_ways + text, not both_ways))


def export_dtype(run: Run) -> torch.dtype:
    """The type of the weights in final/: that of the settings, or the base's."""
    own = run.base.dtype if run.c.model.init == "pretrained" else torch.float32
    return devices.DTYPES.get(run.c.export.dtype, own)


def export(run: Run, folder: Path):
    """Write the trained model as a Hugging Face folder; with adapters, these as a PEFT folder beside it.

    A collective, because ranks may hold shares of the weights.
    """
    c, weights = run.c, sharding.model_state(run.inner, run.trained)
    if run.world.pipe:
        weights = pipeline.collect(weights, [name for name, _ in run.inner.whole.named_parameters()], run.world)
    if not run.world.main:
        return
    own_tokenizer, scratch, dtype = c.model.tokenizer or None, c.model.init == "scratch", export_dtype(run)
    if c.lora.rank:
        # Adapters are added to the base as it is on disk, not as it was rounded or quantised for this run.
        adapter = folder.with_name("adapter")
        peft_files.save_adapter(run.inner.whole, adapter, run.base, weights)
        lora.merge_folders(run.base, adapter, folder, dtype, tokenizer=own_tokenizer)
    else:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        hf.save(run.inner, folder, base=run.base, state=weights, tokenizer=own_tokenizer, scratch=scratch)


def merge_with_base(run: Run) -> str:
    """Write the best mean of the base and trained/, the run's own result, to final/; returns a table of all that were
    tried. Rank 0 alone does the work."""
    c, out = run.c, run.folder
    write_card(run, out / "trained", "The result of a run before it was merged with its base.")
    found = forget.merge_best(run.base, out / "trained", out / "final", lambda model, _: score(run, model, None)[0],
                              run.names_of("general"), c.forget.merge, run.inner.embed_tokens.weight.dtype,
                              run.world.device, run.log.say, overwrite=True)
    write_json(out / "merge.json", found)
    best = next(row for row in found["rows"] if row["alpha"] == found["alpha"])
    table = merging.draw_table(found["rows"], run.names_of("general"), best)
    return f"\n\n{merging.describe(found['method'], found['alpha'])}\n\n{table}"
