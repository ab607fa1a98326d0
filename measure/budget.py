"""What a run costs: GPUs with their memory, speed and price.

Prices are those of a GPU-hour on demand, rounded, as several clouds listed them in 2025 (Lambda, RunPod, AWS, Google):
they move by a factor of two between vendors and by the month, so give your own. Memory, dense bf16 rate and power are
from NVIDIA's data sheets (the rate without sparsity; SXM where there are two).
"""

from dataclasses import dataclass

from core import devices
from core.errors import UserError, nearest


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: float               # bytes
    flops: float                # dense, in bf16 (T4: fp16), per second
    watts: float                # at most, of the board
    price: float                # dollars per hour
    kind: str = "cuda"


GPUS = {gpu.name: gpu for gpu in (
    Gpu("B200", 180e9, 2250e12, 1000, 5.0), Gpu("H200", 141e9, 989e12, 700, 3.5), Gpu("H100", 80e9, 989e12, 700, 2.5),
    Gpu("A100", 80e9, 312e12, 400, 1.6), Gpu("A100-40", 40e9, 312e12, 400, 1.3), Gpu("L40S", 48e9, 362e12, 350, 1.0),
    Gpu("RTX4090", 24e9, 165e12, 450, 0.4), Gpu("RTX3090", 24e9, 71e12, 350, 0.25), Gpu("A10", 24e9, 125e12, 150, 0.75),
    Gpu("T4", 16e9, 65e12, 70, 0.35))}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name, or this machine's CPU; UserError for an unknown one."""
    if name == "cpu":
        return Gpu("cpu", devices.memory_bytes(devices.pick_device("cpu")), 0.0, 0.0, 0.0, "cpu")
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    if name.lower() not in known:
        raise UserError(f"--gpu is {name!r}{nearest(name, list(GPUS))}; known are {', '.join(GPUS)} and cpu")
    return known[name.lower()]
