"""Devices and floating-point types by the names people use for them."""

import ctypes
import os
import re
import resource
import sys
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
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device is {name!r}, on which no run computes; known are auto, cpu, cuda and cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {name}, but torch sees no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {name}, but torch sees {torch.cuda.device_count()} CUDA devices, from cuda:0 on")
    return device


def memory_bytes(device: torch.device) -> int:
    """All the memory of a device: of the GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_bytes(device: torch.device) -> int:
    """The peak memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux getrusage starts from the peak of the parent process; VmHWM, in KiB, does not.
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])


def keep_freed_memory():
    """Let glibc keep freed memory instead of returning it to the system. On a CPU each operation allocates a large
    tensor, and faulting its pages in anew would cost more than the arithmetic."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        # M_MMAP_MAX: large blocks get no separate mapping, which would be unmapped when they are freed.
        libc.mallopt(-4, 0)
        # M_TRIM_THRESHOLD: the top of the heap is kept.
        libc.mallopt(-1, 2**31 - 1)
