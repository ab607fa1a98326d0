"""Names of devices and types. Truth: torch's own objects."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from core.cli import Dtype
from core.devices import DTYPES, pick_device
from core.errors import UserError


def test_both_spellings_of_a_type():
    assert DTYPES["bf16"] is DTYPES["bfloat16"] is torch.bfloat16
    assert DTYPES["fp32"] is DTYPES["float32"] is torch.float32
    assert DTYPES["fp16"] is DTYPES["float16"] is torch.float16
    assert DTYPES.keys() == set(get_args(Dtype))


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="device is 'gpu'"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no CUDA device"):
            pick_device("cuda")


def test_peak_memory_is_this_process_s_and_not_its_starters():
    """getrusage's maximum is inherited: a small process that a large one starts would report the large one's."""
    if not Path("/proc/self/status").exists():
        pytest.skip("VmHWM is Linux's")
    script = ("import sys; sys.path.insert(0, sys.argv[1])\n"
              "import torch; from core.devices import peak_bytes\n"
              "before = peak_bytes(torch.device('cpu'))\n"
              "more = torch.ones(50_000_000); print(before, peak_bytes(torch.device('cpu')))")
    large = bytearray(800_000_000)
    large[::4096] = b"1" * len(large[::4096])
    done = subprocess.run([sys.executable, "-c", script, Path(__file__).parents[2]], capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert before < 700_000_000
    assert 200_000_000 <= after - before < 300_000_000
    del large
