"""Before a run: is continued pretraining the right thing, what would it take, and with which settings.

    python plan.py gap --model BASE --domain law=legal.jsonl --general wiki=wiki.txt --json out/gap.json
    python plan.py memory recipes/llama2_7b_cpt.toml --gpu H100 --gpus 8 --model.path DIR

How each is found stands in measure/: memory.py, gap.py, budget.py.
"""

import core.threads

import functools
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import hf
import tokenizer as tokenizers
from core import cli, devices
from core.cli import Positional
from core.config import setting
from core.errors import UserError
from measure import gap
from measure.budget import find_gpu
from measure.memory import OVERHEAD, estimate
from text.sample import draw_sample
from train import Config

# Tokens of each side that gap scores by default: so many on a GPU, and on a CPU so many operations' worth.
SCORE_TOKENS, SCORE_OPERATIONS = 100_000, 4e12


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
    if c.train.batch_size % options.gpus:
        raise UserError(f"train.batch_size {c.train.batch_size} is not a multiple of the {options.gpus} --gpus")
    if not c.model.path:
        raise UserError("model.path is not set; name a Hugging Face folder, whose config.json is read")
    parts = estimate(c, hf.open_base(c.model.path).config, options.gpus, gpu.kind)
    peak = parts["peak"] + OVERHEAD[gpu.kind]
    for name, size in parts.items():
        print(f"{name:12} {size / 1e9:9.2f} GB")
    print(f"{peak / 1e9:.1f} GB of {gpu.memory / 1e9:.0f} on each {gpu.name}, the process itself included")
    return {"parts": parts, "process": OVERHEAD[gpu.kind], "peak": peak, "memory": gpu.memory,
            "fits": peak <= gpu.memory}


def main() -> int:
    words, settings = cli.take_settings(sys.argv[1:])
    return cli.run("plan.py", __doc__, {
        "gap": (Gap, gap_command),
        "memory": (Memory, functools.partial(memory_command, settings=settings))}, argv=words)


if __name__ == "__main__":
    sys.exit(main())
