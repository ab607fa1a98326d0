"""bench.py's command line. Truth: what it prints and writes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def test_the_gpu_suite_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, ROOT / "bench.py", "gpu"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "error: bench.py gpu needs a CUDA device; bench.py kernels says what can be known without one"]
