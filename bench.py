"""Speed and memory, side by side with the peer in one run; ratios are ours / peer, medians over rounds in turn.

    python bench.py data  --json out/bench_data.json       packing, reading, encoding, cleaning, dedup, each stage
                                                           beside datatrove's, datasets', datasketch's and others'
    python bench.py train --json out/bench_train.json      a training step against transformers on the same batches
    python bench.py lora  --json out/bench_lora.json       LoRA against PEFT on the same batches, and in 4 bits (QLoRA)
    python bench.py kernels --json out/bench_kernels.json  with a GPU: times beside torch.compile's, PyTorch's, Liger's;
                                                           without: what the compiler says of each kernel, CPU times
    python bench.py gpu --json out/bench_gpu.json          all that needs a GPU in 8 minutes: tests, kernels, steps
"""

import core.threads

import dataclasses
import json
import sys
from pathlib import Path

import tyro

from core.config import main_guard
from measure.bench_data import DataOptions, bench_data
from measure.bench_gpu import GpuOptions, StepOptions, bench_gpu, bench_step
from measure.bench_kernels import KernelOptions, bench_kernels
from measure.bench_rows import describe_machine
from measure.bench_steps import LoraOptions, TrainOptions, bench_lora, bench_train

COMMANDS = {"data": (DataOptions, bench_data), "train": (TrainOptions, bench_train), "lora": (LoraOptions, bench_lora),
            "kernels": (KernelOptions, bench_kernels), "gpu": (GpuOptions, bench_gpu),
            "step": (StepOptions, bench_step)}


def report(rows: list) -> dict:
    """The rows and where they come from."""
    return {"machine": describe_machine(), "command": [Path(w).name if "/" in w else w for w in sys.argv[1:]],
            "rows": rows}


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        raise ValueError(f"bench.py needs a command: {', '.join(COMMANDS)}")
    options, function = COMMANDS[name]
    options = dataclasses.make_dataclass(name, [("json", str, "")], bases=(options,), kw_only=True)
    options = tyro.cli(options, prog=f"bench.py {name}", description=__doc__, args=sys.argv[2:])
    result = report(function(options))
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
