"""SwiGLU's kernels against the float64 reference and against the formula written out; what a launch may not do.

Without a GPU they run in Triton's interpreter, which truncates where a card rounds to bf16: a spacing, not half of one.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from float64_check import compare
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from kernels import backend
from kernels.swiglu import swiglu

pytestmark = pytest.mark.kernel
pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed + 5)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype).requires_grad_()


def good(inputs, op=swiglu):
    for i, error, bound in compare(op, inputs, terms=4):
        assert error <= bound, f"result {i}: {error:.2e}, {error / bound:.2f} times the bound"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 37), (1, 1), (0, 6), (2, 0, 6), (2, 1024), (1, 1025), (9, 344)], ids=str)
def test_sizes(shape, dtype):
    good([normal(*shape, dtype=dtype, scale=3), normal(*shape, seed=1, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_formula(dtype):
    """gate / (1 + exp(-gate)) up and its derivatives by autograd, in float64."""
    gate, up, dy = normal(7, 130, dtype=dtype, scale=4), normal(7, 130, seed=1, dtype=dtype), normal(7, 130, seed=2)
    dy = dy.detach().to(dtype)
    with backend.using("triton"):
        y = swiglu(gate, up)
        found = [y, *torch.autograd.grad(y, (gate, up), dy)]
    g, u = (x.detach().double().requires_grad_() for x in (gate, up))
    true = g / (1 + torch.exp(-g)) * u
    for a, b in zip(found, [true, *torch.autograd.grad(true, (g, u), dy.double())]):
        assert a.dtype == dtype
        assert ((a.double() - b).abs() <= torch.finfo(dtype).eps * b.abs() + 1e-6 * b.abs().max()).all()


def test_reference():
    """Its gradients against finite differences; torch's own silu has the same formula."""
    gate, up = (normal(3, 7, seed=s).detach().cpu().double().requires_grad_() for s in (0, 1))
    assert gradcheck(swiglu, (gate, up))
    assert torch.allclose(swiglu(gate, up), torch.nn.functional.silu(gate) * up)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("backend_name", ["triton", "reference"])
def test_extremes(backend_name):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=DEVICE, requires_grad=True)
    with backend.using(backend_name):
        y = swiglu(gate, torch.ones_like(gate))
        y.sum().backward()
    assert y.tolist() == [0, 0, 0, 100, 1e4]
    assert gate.grad.tolist() == [0, 0, 0.5, 1, 1]


def test_strides_do_not_matter_and_nothing_is_written_to():
    packed = normal(6, 10, 74)
    gate, up = packed.transpose(0, 1).chunk(2, dim=-1)            # views with gaps
    expanded = normal(1, 1, 37, seed=3).expand(10, 6, 37)
    for inputs in ([gate, up], [expanded, up], [gate, expanded]):
        plain = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in inputs]
        dy = normal(6, 10, 37, seed=4).detach().transpose(0, 1)
        before = [x.detach().clone() for x in (*inputs, dy)]
        with backend.using("triton"):
            y, same = swiglu(*inputs), swiglu(*plain)
            found = torch.autograd.grad(y, inputs, dy)
            expected = torch.autograd.grad(same, plain, dy)
        assert torch.equal(y, same)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        assert all(torch.equal(a, b.detach()) for a, b in zip(before, (*inputs, dy)))


def test_a_sum_of_expanded_ones_comes_back():
    gate, up = normal(3, 5), normal(3, 5, seed=1)
    with backend.using("triton"):
        swiglu(gate, up).sum().backward()                         # its upstream gradient has strides of 0
    assert torch.allclose(up.grad, torch.nn.functional.silu(gate))


def test_two_runs_agree_bitwise():
    inputs = [normal(40, 130, dtype=torch.bfloat16), normal(40, 130, seed=1, dtype=torch.bfloat16)]
    with backend.using("triton"):
        runs = []
        for _ in range(2):
            y = swiglu(*inputs)
            runs.append([y, *torch.autograd.grad(y, inputs, torch.ones_like(y))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_compiled_checkpointed_and_under_autocast():
    gate, up = normal(4, 24), normal(4, 24, seed=1)
    layer = normal(24, 24, seed=2)

    def plain(gate, up):
        return swiglu(gate @ layer, up).sum()

    def gradients(function):
        value = function(gate, up)
        return [value.detach(), *torch.autograd.grad(value, (gate, up, layer))]
    with backend.using("triton"):
        expected = gradients(plain)
        compiled = gradients(torch.compile(plain, fullgraph=True, backend="aot_eager"))
        recomputed = gradients(lambda *x: checkpoint(plain, *x, use_reentrant=False))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, compiled))
        assert all(torch.equal(a, b) for a, b in zip(expected, recomputed))
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            mixed = swiglu(gate @ layer, up)                      # bf16 and fp32
        assert mixed.dtype == torch.bfloat16
        assert [g.dtype for g in torch.autograd.grad(mixed, (gate, up), torch.ones_like(mixed))] == [torch.float32] * 2


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"gate is \(2, 3\) and up \(2, 1\)"):
        swiglu(torch.zeros(2, 3), torch.zeros(2, 1))


def test_offsets_do_not_overflow(far_programs, tmp_path):
    """Program 3,000,000 begins behind 2^31; the same file with 32-bit offsets fails here."""
    from triton.runtime.errors import InterpreterError
    path = Path(__file__).parents[2] / "kernels/swiglu.py"
    narrow = tmp_path / "narrow.py"
    narrow.write_text(path.read_text().replace(".to(tl.int64)", ""))
    x = torch.full((64,), 7.0)

    def launch(file, forward):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        y, other = torch.zeros(64), torch.zeros(64)
        if forward:
            module.forward_kernel[(1,)](x, x, y, 64, BLOCK=1024)      # all of the tile lies behind the end
        else:
            module.backward_kernel[(1,)](x, x, x, y, other, 64, BLOCK=1024)
        assert not torch.cat([y, other]).any()
    for forward in (True, False):
        launch(path, forward)
        with pytest.raises(InterpreterError, match="int32 overflow"):
            launch(narrow, forward)
