"""Speed and memory, side by side with the peer in one run; ratios are ours / peer, medians over rounds in turn.

    python bench.py data --json out/bench_data.json        packing, reading, encoding, cleaning, dedup, each stage
                                                           beside datatrove's, datasets', datasketch's and others'
    python bench.py train --json out/bench_train.json      a training step beside transformers', on a busy machine too
    python bench.py lora --json out/bench_lora.json        LoRA beside PEFT, and in 4 bits (QLoRA)
    python bench.py kernels --json out/bench_kernels.json  with a GPU: times beside torch.compile's and PyTorch's;
                                                           without: what the compiler says of each kernel, CPU times
    python bench.py kernels --only rmsnorm                 one of them
    python bench.py gpu --json out/bench_gpu.json          all that needs a GPU in 8 minutes: tests, steps, kernels
"""

import core.threads

import sys
from functools import partial
from pathlib import Path

from core import cli
from measure.bench_data import DataOptions, bench_data
from measure.bench_kernels import GpuOptions, KernelOptions, bench_gpu, bench_kernels
from measure.bench_rows import describe_machine
from measure.bench_steps import LoraOptions, TrainOptions, bench_lora, bench_train

COMMANDS = {"data": (DataOptions, bench_data), "train": (TrainOptions, bench_train), "lora": (LoraOptions, bench_lora),
            "kernels": (KernelOptions, bench_kernels), "gpu": (GpuOptions, bench_gpu)}


def measure_rows(measure, options) -> dict:
    """The rows, with the machine and the command that they come from."""
    rows = measure(options)
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return {"machine": describe_machine(), "command": words, "rows": rows}


def main() -> int:
    return cli.run("bench.py", __doc__, {name: (options, partial(measure_rows, measure))
                                         for name, (options, measure) in COMMANDS.items()})


if __name__ == "__main__":
    sys.exit(main())
