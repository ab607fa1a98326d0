"""Devices and floating-point types by the names people use for them."""

import re
import resource
from pathlib import Path

import torch

from core.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """The torch device of a name such as cpu, cuda or cuda:1; auto is cuda where torch sees one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {name!r}; known are auto, cpu, cuda and cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {name}, but torch sees no CUDA device; use --device cpu")
    return device


def peak_bytes(device: torch.device) -> int:
    """The peak memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux getrusage starts from the peak of the parent process; VmHWM, in KiB, does not.
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
