"""Before a run: is continued pretraining the right thing, what would it take, and with which settings.

    python plan.py memory recipes/llama2_7b_cpt.toml --gpu H100 --gpus 8 --model.path DIR

How each is found stands in measure/: memory.py, gap.py, budget.py.
"""

import core.threads

import functools
import sys
from dataclasses import dataclass

import hf
from core import cli
from core.cli import Positional
from core.config import setting
from core.errors import UserError
from measure.budget import find_gpu
from measure.memory import OVERHEAD, estimate
from train import Config


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
        "memory": (Memory, functools.partial(memory_command, settings=settings))}, argv=words)


if __name__ == "__main__":
    sys.exit(main())
