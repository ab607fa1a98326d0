"""Before a run: is continued pretraining the right thing, what would it take, and with which settings.

    python plan.py gap --model BASE --domain law=legal.jsonl --general wiki=wiki.txt --json out/gap.json
    python plan.py budget --model BASE --domain shards/law --general shards/wiki --gpu H100 --gpus 8 --recipe run.toml
    python plan.py memory recipes/llama2_7b_cpt.toml --gpu H100 --gpus 8 --model.path DIR
    python plan.py ratio RECIPE.toml --model.path DIR --shares 0 0.05 0.15 0.3 0.5 --recipe out/chosen.toml
    python plan.py rate RECIPE.toml --model.path DIR --recipe out/chosen.toml

How each is found stands in measure/: memory.py, gap.py, budget.py, ladder.py with ratio.py and rate.py.
"""

import core.threads

import functools
import re
import shlex
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

import hf
import tokenizer as tokenizers
from core import cli, devices
from core.cli import Positional
from core.config import setting
from core.errors import UserError
from core.files import read_json, write_text
from core.parallel import ParallelConfig
from lora import LoraConfig
from measure import budget, gap
from measure.budget import find_gpu
from measure.calibrate import time_step
from measure.choose_layout import advise, describe_layouts, try_layouts
from measure.ladder import changed_settings, climb, leave, read_settings, write_recipe
from measure.memory import OVERHEAD, PARTS, count_elements, find_fullest
from measure.rate import FACTORS, describe_rate, draw_rate, judge_rate, rate_rungs, rate_settings, recommend_rate
from measure.ratio import describe_ratio, draw_ratio, judge_ratio, share_rungs
from measure.verdict import finite
from text.mixture import SourceConfig
from text.sample import draw_sample
from text.shards import Shards
from train import Config

# Tokens of each side that gap scores by default: so many on a GPU, and on a CPU so many operations' worth.
SCORE_TOKENS, SCORE_OPERATIONS = 100_000, 1.5e12


# ---- gap

@dataclass(kw_only=True)
class Gap:
    """Say how far a domain is from what a base knows, and whether to continue its pretraining on it."""

    model: str
    """The base: a model folder or an hf:// id."""
    domain: list[str]
    """FILE or NAME=FILE ...: domain text; also a folder, a pattern or @LIST. Files without a name are one source."""
    general: list[str]
    """The same of general text, of the kind that the base was trained on."""
    domain_tokens: float | None = setting(None, above=0)
    """Tokens that the domain has in all, where the files are a part of it, such as 5e9."""
    fresh_hours: float | None = setting(None, at_least=0)
    """How old the knowledge may be at most, in hours."""
    gpu_hours: float | None = setting(None, at_least=0)
    """GPU-hours that can be spent."""
    accuracy_gap: float | None = setting(None, at_least=-1, at_most=1)
    """By how much tasks of the domain score lower than general ones, where it was measured."""
    sample_mb: float = setting(4.0, above=0, at_most=1e4)
    """MB of each source that are read; a larger source is sampled, and its volume estimated."""
    score_tokens: int | None = setting(None, at_least=1)
    """Tokens of each side that the base scores (default: 100,000, on a CPU as many as take about a minute)."""
    seed: int = setting(0, at_least=0)
    """Which documents are drawn."""
    reading: cli.Reading = field(default_factory=cli.Reading)
    device: cli.Device = field(default_factory=cli.Device)


def gap_command(options: Gap) -> dict:
    base = hf.open_base(options.model)
    tokenizer, device = tokenizers.load(base.folder), devices.pick_device(options.device.device)
    sides = [{name: draw_sample(files, options.reading, int(options.sample_mb * 1e6), options.seed)
              for name, files in name_sources(words, side).items()}
             for side, words in (("domain", options.domain), ("general", options.general))]
    if both := sides[0].keys() & sides[1].keys():
        raise UserError(f"--domain and --general both have a source called {min(both)}; name them NAME=FILE")
    model = hf.load(base, devices.DTYPES[options.device.dtype], device).eval()
    parameters = model.count_parameters()
    tokens = options.score_tokens or (min(SCORE_TOKENS, max(2000, round(SCORE_OPERATIONS / parameters)))
                                      if device.type == "cpu" else SCORE_TOKENS)
    figures = gap.measure(model, tokenizer, *sides, tokens, options.seed, options.domain_tokens)
    found = gap.recommend(figures, options.fresh_hours, options.gpu_hours, options.accuracy_gap)
    domain, general = ([text for sample in side.values() for text in sample.texts] for side in sides)
    result = {"model": options.model, "parameters": parameters, **figures, **found,
              "settings": gap.choose_settings(figures, found, parameters),
              "extension": gap.judge_extension(base.folder, domain, general, figures["domain"]["tokens"] or 0),
              "warnings": gap.list_warnings(figures, base.facts["chat_template"])}
    print(gap.describe(result))
    return result


def name_sources(words: list[str], side: str) -> dict[str, list[str]]:
    """{name: files} of the words NAME=FILE and FILE; a file without a name belongs to the source `side`."""
    sources = {}
    for word in words:
        named = re.fullmatch(r"([\w.-]+)=(.+)", word, re.S)
        name, file = named.groups() if named and not Path(word).exists() else (side, word)
        sources.setdefault(name, []).append(file)
    return sources


# ---- budget

@dataclass(kw_only=True)
class Budget:
    """Say what a continued pretraining takes, in full, by LoRA and by QLoRA, and write its recipe."""

    model: str
    """The base: a model folder, an hf:// id, or the name of a known size, such as llama-3-8b."""
    domain: list[str] = field(default_factory=list)
    """FILE or NAME=FILE ...: domain text, or folders made by data.py pack."""
    general: list[str] = field(default_factory=list)
    """The same of general text, for replay."""
    gap: str | None = None
    """What plan.py gap --json wrote: its volume, replay share and method."""
    domain_tokens: float | None = setting(None, above=0)
    """Tokens of the domain, instead of counting them, such as 5e9."""
    replay: float | None = setting(None, at_least=0, below=1)
    """Share of general text in the mix (default: that of --gap, or else 0.3)."""
    epochs: float = setting(1.0, above=0, at_most=1e3)
    """How often the domain is read."""
    context: int | None = setting(None, at_least=1)
    """Tokens per sequence (default: the model's positions, at most 4096, on a CPU 2048)."""
    batch_tokens: float = setting(4e6, at_least=1, at_most=2**30)
    """Tokens per step at most; a small corpus gets fewer, so that it has some hundred steps."""
    gpu: str = "cpu"
    """The device: cpu (this machine) or one of B200, H200, H100, A100, A100-40, L40S, RTX4090, RTX3090, A10, T4."""
    gpus: int = setting(1, at_least=1, at_most=10**5)
    """How many devices."""
    memory_gb: float | None = setting(None, above=0, at_most=1e6)
    """Memory of a device, instead of the table's."""
    tflops: float | None = setting(None, above=0, at_most=1e6)
    """Its dense rate in half precision, in 1e12 operations per second, instead of the table's."""
    watts: float | None = setting(None, above=0, at_most=1e5)
    """Its power, instead of the table's."""
    price: float | None = setting(None, at_least=0, at_most=1e5)
    """Dollars per GPU-hour, instead of the table's."""
    mfu: float = setting(0.4, above=0, at_most=1)
    """The share of that rate that a training reaches."""
    method: Literal["full", "lora", "qlora"] | None = None
    """The recipe's method (default: that of --gap if it fits, or else the first that fits)."""
    rank: int | None = setting(None, above=0, at_most=2**14)
    """Rank of the adapters (default: up to 128, by the model's width)."""
    calibrate: bool = True
    """On a CPU, time a few real steps of each method."""
    recipe: str | None = None
    """Write the recipe to this file."""
    reading: cli.Reading = field(default_factory=cli.Reading)


def budget_command(options: Budget) -> dict:
    known, base = budget.known_size(options.model), None
    if known is None:
        base = hf.open_base(options.model)
    found = read_gap(options.gap, options.model) if options.gap else None
    sources = {side: name_sources(words, side) for side, words in (("domain", options.domain),
                                                                    ("general", options.general))}
    volumes = {side: count_volume(files, base, options.reading) for side, files in sources.items() if files}
    domain = options.domain_tokens or volumes.get("domain", (None,))[0] or (found or {}).get("domain", {}).get("tokens")
    if not domain:
        raise UserError("how much domain text there is nobody says: give --domain, --domain-tokens or --gap")
    replay = options.replay if options.replay is not None else found["settings"]["replay"] if found else 0.3
    given = {"memory": options.memory_gb and options.memory_gb * 1e9, "flops": options.tflops and options.tflops * 1e12,
             "watts": options.watts, "price": options.price}
    gpu = replace(budget.find_gpu(options.gpu), **{key: value for key, value in given.items() if value is not None})
    if gpu.kind == "cpu" and options.gpus > 1:
        raise UserError(f"--gpus is {options.gpus}, but the device is this machine's CPU; name a --gpu")
    if gpu.kind == "cpu" and options.tflops:
        raise UserError("--tflops is a GPU's; the hours of this machine's CPU are from real steps; name a --gpu")
    config = known or base.config
    longest = min(config.max_position_embeddings, 2048 if gpu.kind == "cpu" else 4096)
    job = budget.Job(options.model, config, domain, volumes.get("general", (None,))[0], replay, options.epochs,
                     options.context or longest, gpu, options.gpus, options.batch_tokens, options.mfu)
    times = None
    if gpu.kind == "cpu" and options.calibrate:
        _, document, text = volumes.get("domain", (0, 300, None))
        times = functools.partial(time_step, base=base, document=round(document), text=text)
    methods = budget.plan_methods(job, options.rank, times)
    fitting = [method for method, plan in methods.items() if plan["fits"]]
    wanted = options.method or (found["settings"]["method"] if found else None)
    chosen = wanted if wanted in fitting else next(iter(fitting), None)
    print(budget.describe(job, methods))
    warnings = budget.list_warnings(job)
    if options.method and options.method not in fitting:
        warnings.append(f"{options.method} does not fit on {options.gpus} x {gpu.name}; the recipe has {chosen}")
    if options.recipe and chosen is None:
        raise UserError(f"no method fits on {options.gpus} x {gpu.name}, so that there is no recipe to write; the "
                        f"table says what would fit")
    if options.recipe:
        write_text(options.recipe, make_recipe(job, methods[chosen], sources, chosen))
        print(f"recipe: {options.recipe} ({chosen}); python train.py {options.recipe} --dry-run tries it")
    print(*(f"warning: {warning}" for warning in warnings), sep="\n", end="\n" if warnings else "")
    for plan in methods.values():
        plan["settings"] = changed_settings(plan.pop("config"), Config())
    return {"model": options.model, "parameters": count_elements(config, LoraConfig()).base, "gpu": asdict(gpu),
            "gpus": options.gpus, "tokens": {"domain": job.domain_tokens, "replay": job.replay_tokens,
                                             "total": job.tokens}, "replay": replay, "epochs": options.epochs,
            "context": job.context, "methods": methods, "chosen": chosen, "recipe": options.recipe,
            "warnings": warnings}


def read_gap(path: str, model: str) -> dict:
    """What plan.py gap --json wrote, of this model."""
    found = read_json(path, dict)
    domain, settings = ({} if not isinstance(found.get(key), dict) else found[key] for key in ("domain", "settings"))
    replay, tokens = finite(settings.get("replay")), domain.get("tokens")
    if (replay is None or not 0 <= replay < 1 or settings.get("method") not in budget.METHODS
            or (tokens is not None and not (finite(tokens) or -1) > 0)):
        raise UserError(f"--gap {path} is not what plan.py gap --json wrote")
    if found.get("model", model) != model:
        print(f"warning: --gap {path} is of {found['model']}: its tokens are that one's, and its method and replay too",
              file=sys.stderr)
    return found


def is_packed(path: str) -> bool:
    return Path(path, "manifest.json").is_file()


def count_volume(sources: dict[str, list[str]], base, reading: cli.Reading) -> tuple:
    """(tokens, tokens of a document, some tokens) of the sources of a side: counted in packed folders, else from a
    sample."""
    tokens, documents, some = 0.0, 0.0, [np.zeros(0, np.int64)]
    for name, paths in sources.items():
        packed = [Shards(path) for path in paths if is_packed(path)]
        tokens += sum(shards.tokens for shards in packed)
        documents += sum(shards.documents for shards in packed)
        some += [shards.text_document(i)[0] for shards in packed for i in range(min(shards.documents, 100))]
        if files := [path for path in paths if not is_packed(path)]:
            if base is None:
                raise UserError("--domain and --general are counted with the base's tokenizer, and the name of a size "
                                "has none; give its folder, or --domain-tokens")
            sample, tokenizer = draw_sample(files, reading, 1 << 21, 0), tokenizers.load(base.folder)
            if not sample.texts:
                raise UserError(f"{name} ({' '.join(files)}) has no text")
            if sample.corpus_bytes is None:
                raise UserError(f"{name} is a Hub dataset, whose size nothing says; give --domain-tokens")
            ids = tokenizer.encode_batch(sample.texts)
            some += ids[:100]
            tokens += sample.corpus_bytes * sum(map(len, ids)) / sample.bytes
            documents += len(sample.texts) * sample.corpus_bytes / sample.bytes
    return tokens, tokens / max(1, documents), np.concatenate(some)


def make_recipe(job, plan: dict, sources: dict, method: str) -> str:
    """The recipe of a method; text that is not packed yet is to be, into shards/NAME, which its first lines say."""
    notes, paths = [f"Continued pretraining of {job.model} by plan.py budget: {method}, {job.gpus} x {job.gpu.name}, "
                    f"{plan['peak_gb']:.1f} GB each" + (f", {plan['hours']:.3g} hours" if plan["hours"] else "")], {}
    for side in ("domain", "general") if job.replay else ("domain",):
        for name, files in (sources[side] or {side: ["TEXT"]}).items():
            packed = len(files) == 1 and is_packed(files[0])
            if not packed:
                notes.append("first: python data.py pack " + shlex.join(
                    ["--tokenizer", job.model, "--out", f"shards/{name}", *files]))
            paths[name] = SourceConfig(path=str(Path(files[0]).absolute()) if packed else f"shards/{name}", role=side)
    if job.gpus > 1:
        notes.append(f"torchrun --nproc-per-node {job.gpus} train.py THIS_FILE   (more than one machine: the guide)")
    return budget.write_recipe(job, plan["config"], paths, notes)


# ---- memory


@dataclass(kw_only=True)
class Memory:
    """Say what a recipe's training keeps in memory on each device; settings as in train.py: --section.key value."""

    recipe: Positional[str]
    """RECIPE.toml."""
    gpu: str = "H100"
    """The device: cpu, or one of A100-40, A100, H100, H200, B200, L40S, RTX4090, RTX3090, A10, T4."""
    gpus: int = setting(1, at_least=1, at_most=10**5)
    """How many devices."""


def memory_command(options: Memory, settings: list[str] = ()) -> dict:
    c, gpu = cli.parse(Config, [options.recipe, *settings], "plan.py memory", recipe=True), find_gpu(options.gpu)
    if not c.model.path:
        raise UserError("model.path is not set; name a Hugging Face folder, whose config.json is read, or a known "
                        "size, such as llama-3-70b")
    config, overhead = budget.known_size(c.model.path) or hf.open_base(c.model.path).config, OVERHEAD[gpu.kind]
    layouts = try_layouts(c, config, options.gpus, gpu.memory, overhead, gpu.kind)
    parts, best, peak = layouts[0].parts, advise(layouts), layouts[0].parts["peak"] + overhead
    for name, what in PARTS.items():
        if parts[name]:
            print(f"{name:12} {parts[name] / 1e9:9.2f} GB  {what}")
    fullest, places = find_fullest(c, config, options.gpus, gpu.kind)
    where = f" that holds the {fullest + 1}. of {places} parts of the layers, the fullest" if places > 1 else ""
    print(f"{peak / 1e9:.1f} GB of {gpu.memory / 1e9:.0f} on each {gpu.name}{where}, the process itself included\n")
    print(describe_layouts(layouts, overhead))
    return {"parts": parts, "process": overhead, "peak": peak, "memory": gpu.memory, "fits": layouts[0].fits,
            "fullest": fullest, "advised": best and best.name, "layouts": [
                {"name": each.name, "parallel": changed_settings(each.parallel, ParallelConfig()), "fits": each.fits,
                 "peak": each.parts["peak"] + overhead, "parts": each.parts} for each in layouts]}


# ---- ratio, rate

@dataclass(kw_only=True)
class Ladder:
    """What a ladder of short runs takes."""

    run: Positional[str]
    """RECIPE.toml of the run that is planned; settings as in train.py: --section.key value."""
    steps: int = setting(150, above=0, at_most=10**7)
    """Steps of each short run."""
    seeds: list[int] = setting([0], at_least=0)
    """Each is made once for each seed."""
    jobs: int = setting(1, above=0, at_most=64)
    """Runs at a time."""
    recipe: str | None = None
    """Write the recipe with what was chosen to this file."""
    dry_run: bool = False
    """Say which runs would be made."""


@dataclass(kw_only=True)
class Ratio(Ladder):
    """Find the share of replay: short runs over shares, laws through them, the least share for a tolerance."""

    shares: list[float] = setting([0.0, 0.05, 0.15, 0.3, 0.5], at_least=0, below=1)
    """Shares of replay to try, at least four."""
    tolerance: float = setting(0.05, above=0, at_most=10)
    """How far general text may rise above the base's bits per byte: 0.05 is 5 %."""
    out: str = "out/ratio"
    """The folder of the runs; those that are done already are not made again."""


def ratio_command(options: Ratio, settings: list[str] = ()) -> dict:
    c, rungs = read_settings("plan.py ratio", options.run, settings, general=True), share_rungs(options.shares)
    rows = climb("plan.py ratio", options.run, settings, rungs, options)
    if options.dry_run:
        return {"rows": []}
    found = judge_ratio(rows, options.tolerance)
    print(describe_ratio(found))
    if options.recipe and found["chosen"] is not None:
        c.data.schedule, c.data.domain_share = "static", round(1 - found["chosen"], 9)
        low, high = ("beyond" if end is None else f"{end:.1%}" for end in found["interval"])
        write_recipe(options.recipe, c, [f"{found['chosen']:.0%} of replay: at most {options.tolerance:.0%} of "
                                         f"forgetting in runs of {options.steps} steps (95 %: {low} to {high})"])
    return leave(found, Path(options.out), "ratio", draw_ratio)


@dataclass(kw_only=True)
class Rate(Ladder):
    """Find the learning rate: three short runs around the recommended one, and a parabola through them."""

    rates: list[float] = setting([], above=0, at_most=100)
    """Peak rates to try (default: a quarter of the recommended one, itself and four times it)."""
    out: str = "out/rate"
    """The folder of the runs; those that are done already are not made again."""


def rate_command(options: Rate, settings: list[str] = ()) -> dict:
    c = read_settings("plan.py rate", options.run, settings, general=False)
    best = recommend_rate(c)
    rungs = rate_rungs(c, options.rates or [best * factor for factor in FACTORS])
    print(f"recommended rate: {best:g}")
    rows = climb("plan.py rate", options.run, settings, rungs, options)
    if options.dry_run:
        return {"recommended": best, "rows": []}
    found = {"recommended": best} | judge_rate(rows)
    print(describe_rate(found))
    if options.recipe:
        for key, value in rate_settings(c, found["chosen"]).items():
            setattr(c.optim, key, value)
        write_recipe(options.recipe, c, [f"a peak rate of {found['chosen']:g}, from runs of {options.steps} steps at "
                                         f"{', '.join(rung.name.partition('_')[2] for rung in rungs)}"])
    return leave(found, Path(options.out), "rate", draw_rate)


def main() -> int:
    words, settings = cli.take_settings(sys.argv[1:])
    return cli.run("plan.py", __doc__, {
        "gap": (Gap, gap_command), "budget": (Budget, budget_command),
        "memory": (Memory, functools.partial(memory_command, settings=settings)),
        "ratio": (Ratio, functools.partial(ratio_command, settings=settings)),
        "rate": (Rate, functools.partial(rate_command, settings=settings))}, argv=words)


if __name__ == "__main__":
    sys.exit(main())
