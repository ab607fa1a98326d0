"""RMSNorm's Triton kernels and the fused residual add. Truth: the float64 reference, itself checked against
torch.nn.functional.rms_norm and finite differences. In the interpreter without a GPU, on the device with one."""

import importlib.util
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from float64_check import compare
from quick import slow_except
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import backend

pytestmark = pytest.mark.kernel
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(3, 5, 37), (1, 1), (1, 8), (7, 1), (0, 6), (2, 0, 6), (70, 130), (2, 3, 16), (9, 4100)]
module = sys.modules["kernels.rmsnorm"]           # the package shows the op under this name


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def norm(x, w):
    return kernels.rmsnorm(x, w, 1e-5)


def added(x, r, w):
    return kernels.add_rmsnorm(x, r, w, 1e-5)


def cancelled(x, w):
    """The size of r w dy, of which dx subtracts its part along x: all of it where a row has one number."""
    rms = x.detach().double().square().mean(-1).sqrt()
    return 4 * w.abs().max().item() / rms.min().item() if x.numel() else 0.0


@pytest.mark.parametrize(("shape", "dtype"), slow_except(
    [*((shape, torch.float32) for shape in SHAPES), (SHAPES[0], torch.bfloat16), (SHAPES[6], torch.float16)],
    product(SHAPES, DTYPES)))
def test_outputs_and_gradients(shape, dtype):
    x, r, w = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1), normal(shape[-1], dtype=dtype, seed=2)
    terms = max(shape[-1], x.numel() // shape[-1])            # a row's sum forward, a column's sum for dw
    for op, inputs in ((norm, (x, w)), (added, (x, r, w))):
        for index, error, bound in compare(op, inputs, terms, cancelled(sum(inputs[:-1]), w)):
            assert error <= bound, f"result {index} of {op.__name__}"


def test_wider_residual_stream():
    """Under autocast the stream is fp32 and what is added to it bf16: nothing of the stream may be rounded away."""
    x, r, w = normal(5, 40, dtype=torch.bfloat16), normal(5, 40, seed=1), normal(40, seed=2)
    with backend.using("triton"):
        y, s = added(x, r, w)
        (y.sum() + s.sum()).backward()
    assert y.dtype == s.dtype == torch.float32
    assert (s - (x.float() + r)).abs().max() < 1e-6
    assert (x.grad.dtype, r.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_of_what_the_stream_keeps(dtype):
    """Not of the sum before it was rounded: the norm of the stream alone gives the same bits."""
    x, r, w = normal(5, 130, dtype=dtype), normal(5, 130, dtype=dtype, seed=1), normal(130, dtype=dtype, seed=2)
    with backend.using("triton"):
        y, s = added(x, r, w)
        assert torch.equal(y, norm(s, w))


def test_shapes_that_do_not_fit():
    x, w = normal(4, 8), normal(8)
    for wrong in (lambda: norm(x, normal(16)), lambda: norm(x, normal(1)), lambda: added(x, normal(1, 8), w),
                  lambda: norm(normal(4, 0), normal(0))):
        with pytest.raises(ValueError, match="must agree"):
            wrong()


def test_strides_and_expanded_gradients_and_untouched_inputs():
    x = normal(40, 6).T[1:4].detach().requires_grad_()              # rows with gaps, columns 6 apart
    w = normal(80, seed=1)[::2].detach().requires_grad_()
    before = x.detach().clone()
    with backend.using("triton"):
        y = norm(x, w)
        y.sum().backward()                                          # an upstream gradient with strides of zero
    plain = [t.detach().clone().requires_grad_() for t in (x, w)]
    F.rms_norm(plain[0], (40,), plain[1], 1e-5).sum().backward()
    assert torch.equal(x.detach(), before)
    assert (x.grad - plain[0].grad).abs().max() < 1e-6
    assert (w.grad - plain[1].grad).abs().max() < 1e-5
    upstream = normal(3, 40).detach()
    kept = upstream.clone()
    with backend.using("triton"):
        torch.autograd.grad(norm(x, w), x, upstream)
    assert torch.equal(upstream, kept)


def test_frozen_weight_gets_no_gradient_and_no_work(monkeypatch):
    launched = []
    monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **options: launched.append(options))
    with backend.using("triton"):
        norm(normal(4, 8), normal(8).detach()).sum().backward()
        norm(normal(4, 8), normal(8)).sum().backward()
    assert [o["WANT_DW"] for o in launched if "WANT_DW" in o] == [False, True]


def test_reference_against_torch_and_finite_differences():
    x, r, w = (normal(*s, seed=i).detach().double().requires_grad_() for i, s in enumerate([(3, 5), (3, 5), (5,)]))
    y, s = added(x, r, w)
    assert torch.allclose(y, F.rms_norm(x + r, (5,), w, 1e-5))
    assert torch.equal(s, x + r)
    assert gradcheck(added, (x, r, w))
    assert gradcheck(lambda x, r, w: added(x, r, w)[0], (x, r, w))
    assert gradcheck(lambda x, r, w: added(x, r, w)[1], (x, r, w))


@pytest.mark.parametrize("choice", ["reference", "triton"])
def test_eps_is_added_to_the_mean(choice):
    """Truth: torch, on elements of the size of sqrt(eps); of ordinary size, eps / D would look the same."""
    x, w = normal(7, 40).detach() * 3e-3, normal(40, seed=1).detach()
    with backend.using(choice):
        assert torch.allclose(norm(x, w), F.rms_norm(x, (40,), w, 1e-5), rtol=1e-5, atol=0)


def test_two_runs_agree_bitwise():
    x, w = normal(300, 130), normal(130, seed=1)
    with backend.using("triton"):
        first, second = (torch.autograd.grad(norm(x, w).square().sum(), [x, w]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_under_compile():
    x, r, w = normal(6, 40), normal(6, 40, seed=1), normal(40, seed=2)

    def step(x, r, w):
        y, s = added(norm(x, w), r, w)
        return (y * s).sum()

    with backend.using("triton"):
        eager = torch.autograd.grad(step(x, r, w), [x, r, w])
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(x, r, w), [x, r, w])
    assert all(torch.equal(a, b) for a, b in zip(eager, found))


def test_registered_ops_keep_their_word():
    x, w = normal(6, 40).detach(), normal(40, seed=1).detach()
    with backend.using("triton"):
        torch.library.opcheck(torch.ops.nanocpt.rmsnorm_forward, (x, None, w, 1e-5))
        torch.library.opcheck(torch.ops.nanocpt.rmsnorm_forward, (x, x, w, 1e-5))
        rstd = torch.rand(6, device=DEVICE)
        torch.library.opcheck(torch.ops.nanocpt.rmsnorm_backward, (x, None, x, w, rstd, True))


def test_under_checkpointing_and_autocast():
    x, w = normal(6, 40), normal(40, seed=1)
    with backend.using("triton"), torch.autocast(DEVICE, torch.bfloat16):
        plain = torch.autograd.grad(norm(x, w).square().sum(), [x, w])
        kept = torch.autograd.grad(checkpoint(norm, x, w, use_reentrant=False).square().sum(), [x, w])
    assert all(torch.equal(a, b) for a, b in zip(plain, kept))
    assert plain[0].dtype == torch.float32


def test_rows_of_many_programs_and_a_last_tile(monkeypatch):
    """With tiles of 8 numbers, 21 rows of 4 take 11 tiles over 4 programs; the last tile is half empty."""
    monkeypatch.setattr(module, "TILE", 8)
    for index, error, bound in compare(norm, (normal(21, 4), normal(4, seed=1)), 21):
        assert error <= bound, index


def test_rows_behind_2_to_the_31(far_programs, tmp_path):
    """Row 3,000,000 of 1,024 numbers; the same file with 32-bit offsets fails here."""
    from triton.runtime.errors import InterpreterError
    text, x, y = Path(module.__file__).read_text(encoding="utf-8").replace("@op\n", ""), torch.ones(8), torch.zeros(8)

    def launch(name, text):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        loaded.forward_kernel[(1,)](x, x, x, y, y, y, 8, 1024, 1e-5, ADD=True, ROWS=1, BLOCK=8)    # behind its 8 rows
    launch("wide", text)
    assert not y.any()
    with pytest.raises(InterpreterError, match="int32 overflow"):
        launch("narrow", text.replace(".to(tl.int64)", ""))
