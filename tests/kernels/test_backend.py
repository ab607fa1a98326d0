"""Which backend an op runs, what torch.compile sees, and a machine without Triton."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import backend

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton", reason="Triton comes for Linux only")


def test_which_backend_runs(monkeypatch):
    x = torch.ones(2)
    monkeypatch.setattr(backend, "choice", "")
    assert not backend.use_triton(x)
    with backend.using("triton"):
        assert backend.use_triton(x)
        assert not backend.use_triton(x.double())
        monkeypatch.setattr(backend, "interpreting", False)
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            backend.use_triton(x)
        monkeypatch.setattr(backend, "triton", None)
        with pytest.raises(ValueError, match="not installed"):
            backend.use_triton(x)
    with backend.using("reference"):
        assert not backend.use_triton(x)
    with backend.using("cuda"), pytest.raises(ValueError, match="'cuda'; it may be reference, triton or empty"):
        backend.use_triton(x)


def test_a_second_copy_of_a_file_leaves_the_registered_op_alone():
    """Registering a name again frees the op behind those who hold it: a segmentation fault, some time later."""
    before = torch.ops.nanocpt.swiglu_forward.default
    spec = importlib.util.spec_from_file_location("copy_of_swiglu", ROOT / "kernels/swiglu.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert torch.ops.nanocpt.swiglu_forward.default is before


def test_tables_and_powers():
    table = {80: "a", 90: "b"}
    receiver = SimpleNamespace()
    for architecture, entry in ((75, "a"), (80, "a"), (86, "a"), (90, "b"), (120, "b")):
        receiver.architecture = architecture
        with backend.using(send_to=receiver):
            assert backend.table(table, torch.device("meta")) == entry
    assert [backend.power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 4096, 4097)] == [1, 1, 2, 4, 4, 8, 4096, 8192]


def test_the_ops_run_where_triton_has_no_wheel():
    """macOS and Windows: the package imports and the references compute."""
    script = """if True:
        import sys
        sys.modules["triton"] = None
        import torch, kernels
        y = kernels.rmsnorm(torch.ones(2, 4), torch.ones(4), 1e-6)
        y = kernels.swiglu(y, kernels.add_rmsnorm(y, y, torch.ones(4), 1e-6)[0])
        print(float(kernels.linear_cross_entropy(y, torch.ones(3, 4), torch.tensor([0, 1]))[0]))"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert float(done.stdout) == pytest.approx(2 * 1.0986, abs=1e-3), done.stderr[-2000:]
