"""kernels/grouped_mm.py: the reference against torch's own grouped_mm and a loop, the kernels against the reference."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from float64_check import compare, in_dtype
from quick import slow_except
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from kernels import backend
from kernels.grouped_mm import grouped_mm
from measure import kernel_cases

module = sys.modules["kernels.grouped_mm"]           # the package shows the op under this name
pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("one_thread")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]
ENDS = {"uneven": [3, 3, 50, 51], "all on one": [0, 0, 51, 51], "last": [0, 0, 0, 51], "one expert": [51],
        "one row": [0, 1], "rows of none": [7, 20], "none at all": [0, 0, 0], "tiles of 64": [64, 128, 128, 200]}


SEVERAL = [([130, 131, 300, 301, 301], 72, 260), ([5] * 40 + [90], 16, 16)]


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def inputs(ends, width=37, out=21, rows=None, dtype=torch.float32):
    """Leaves that need gradients; `rows of none` has rows behind the last offset."""
    rows = max(ends[-1], 1) + 6 * (len(ends) == 2) if rows is None else rows
    return [normal(rows, width, dtype=dtype).requires_grad_(),
            normal(len(ends), out, width, seed=1, dtype=dtype).requires_grad_(),
            torch.tensor(ends, dtype=torch.int32, device=DEVICE)]


def naive(x, weight, offsets):
    """A row at a time."""
    owner = [int((offsets <= n).sum()) for n in range(len(x))]
    return torch.stack([weight[e] @ x[n] if e < len(weight) else 0 * x[n, 0] * weight[0, :, 0]
                        for n, e in enumerate(owner)])


def torch_grouped_mm(x, weight, offsets):
    return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=offsets)


def close(found, truth, terms):
    for got, expected in zip(found, truth, strict=True):
        size = expected.abs().max().item() if expected.numel() else 0
        bound = (2 * torch.finfo(got.dtype).eps + 4 * terms**0.5 * 2.0**-24) * size
        assert got.shape == expected.shape
        assert not got.numel() or (got.double() - expected).abs().max() <= bound


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_a_row_at_a_time(ends, name, dtype):
    given = inputs(ends, dtype=dtype)
    truth, upstream = kernel_cases.run(naive, in_dtype(given, torch.float64))
    with backend.using(name):
        found, _ = kernel_cases.run(grouped_mm, given, [u.to(dtype) for u in upstream])
    rounded = [u.to(dtype).double() for u in upstream]
    truth, _ = kernel_cases.run(naive, in_dtype(given, torch.float64), rounded)
    close(found, truth, 51)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_against_torch(name):
    given = inputs([16, 16, 40, 48], 32, 16)
    expected, upstream = kernel_cases.run(torch_grouped_mm, given)
    with backend.using(name):
        found, _ = kernel_cases.run(grouped_mm, given, upstream)
    close(found, [x.double() for x in expected], 48)


@pytest.mark.parametrize(("ends", "width", "out", "dtype"), slow_except(
    [(*SEVERAL[0], DTYPES[1])], [(*sizes, dtype) for sizes in SEVERAL for dtype in DTYPES]))
def test_several_tiles(ends, width, out, dtype):
    """Rows, columns and sums over more than a tile; more experts than a warp has lanes."""
    for index, error, bound in compare(grouped_mm, inputs(ends, width, out, dtype=dtype), terms=300):
        assert error <= bound, f"result {index}"


def test_gradcheck():
    for ends in ([2, 2, 5], [0, 4]):
        x, weight, offsets = in_dtype(inputs(ends, 3, 2), torch.float64)
        assert gradcheck(lambda x, weight, o=offsets: grouped_mm(x, weight, o), (x, weight))


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_strides_and_what_is_not_written_to(name):
    """Transposed weights, rows with gaps, an expanded upstream gradient; nothing given is changed."""
    x, weight, offsets = inputs([3, 9, 20], 24, 16)
    plain = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_(), offsets
    with backend.using(name):
        expected, _ = kernel_cases.run(grouped_mm, plain, [torch.ones(len(x), 16, device=DEVICE)])
        wide = torch.cat([x, x], 1).detach()[:, :24].requires_grad_()
        turned = weight.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        upstream = torch.ones(1, 1, device=DEVICE).expand(len(x), 16)
        found, _ = kernel_cases.run(grouped_mm, (wide, turned, offsets), [upstream])
    close(found, [x.double() for x in expected], 24)
    assert torch.equal(wide, x)
    assert torch.equal(turned, weight)
    assert (upstream == 1).all()


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_no_rows_and_part_of_the_gradients(name):
    with backend.using(name):
        for result in kernel_cases.run(grouped_mm, inputs([0, 0], 5, 4, rows=0))[0][1:]:
            assert not result.any()
        x, weight, offsets = inputs([3, 7])
        with torch.no_grad():
            assert not grouped_mm(x, weight, offsets).requires_grad
        both = torch.autograd.grad(grouped_mm(x, weight, offsets).sum(), [x, weight])
        assert torch.equal(torch.autograd.grad(grouped_mm(x, weight.detach(), offsets).sum(), x)[0], both[0])
        assert torch.equal(torch.autograd.grad(grouped_mm(x.detach(), weight, offsets).sum(), weight)[0], both[1])


def test_two_runs_agree():
    with backend.using("triton"):
        given = inputs([70, 70, 200], 40, 24)
        first, upstream = kernel_cases.run(grouped_mm, given)
        second, _ = kernel_cases.run(grouped_mm, given, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_nothing_outside_is_read(monkeypatch):
    """Inputs inside larger buffers of NaN, so that a read beyond an edge that reaches a result is seen."""
    x, weight, offsets = inputs([3, 3, 17], 37, 21)
    upstream = [normal(len(x), 21, seed=3)]

    def guarded(given):
        around = torch.full((given.numel() + 40000,), float("nan"), device=DEVICE)
        around[20000:-20000] = given.detach().flatten()
        return around[20000:-20000].view(given.shape)
    with backend.using("triton"):
        expected, _ = kernel_cases.run(grouped_mm, (x, weight, offsets), upstream)
        inside = guarded(x).requires_grad_(), guarded(weight).requires_grad_(), offsets
        found, _ = kernel_cases.run(grouped_mm, inside, [guarded(upstream[0])])
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.filterwarnings("ignore")
def test_under_compile():
    given = inputs([3, 3, 17])
    with backend.using("triton"):
        expected, upstream = kernel_cases.run(grouped_mm, given)
        compiled = torch.compile(grouped_mm, fullgraph=True, backend="aot_eager")
        found, _ = kernel_cases.run(compiled, given, upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_under_checkpointing_and_autocast(name):
    x, weight, offsets = inputs([3, 3, 17])
    half = DTYPES[1]
    with backend.using(name):
        direct = torch.autograd.grad(grouped_mm(x, weight, offsets).square().sum(), [x, weight])
        y = checkpoint(grouped_mm, x, weight, offsets, use_reentrant=False)
        assert all(torch.equal(a, b) for a, b in zip(direct, torch.autograd.grad(y.square().sum(), [x, weight])))
        with torch.autocast(DEVICE, half):
            y = grouped_mm(x, weight, offsets)
        expected = grouped_mm(x.to(half), weight.to(half), offsets)
        assert y.dtype == half
        assert torch.equal(y, expected)
        gradients = torch.autograd.grad(y.float().sum(), [x, weight])
        assert [g.dtype for g in gradients] == [torch.float32] * 2


@pytest.fixture
def overflow_is_an_error(monkeypatch):
    """The interpreter checks every int32 operation, as it does not by default."""
    if DEVICE == "cuda":
        pytest.skip("only Triton's interpreter checks for overflow, and it runs where there is no GPU")
    from triton.runtime import interpreter
    options = dataclasses.replace(interpreter.interpreter_builder.options, debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


def far_products(kernels):
    """Row 40003 of 65536 columns is element 2.6 10^9. Nothing is loaded from there: in the first launch these are no
    expert's rows, in the second an expert of no rows begins as far before row 0."""
    rows, width = 40003, 2**16
    few, y = torch.ones(4), torch.full((rows, 1), 7.0)
    kernels.rows_kernel[(11,)](few, few, torch.zeros(1, dtype=torch.int32), y, rows, 1, width, 1, width, width, 1,
                               TILE_M=4096, TILE_N=1, TILE_K=16, GROUP=8, EXPERTS=2)
    assert not y.any()
    dw = torch.full((2, 16, width), 7.0)
    kernels.weight_kernel[(2,)](few, few, torch.full((2,), -rows, dtype=torch.int32), dw, 16, width, TILE_M=16,
                                TILE_N=width, TILE_K=16, GROUP=8)
    assert not dw.any()


def test_offsets_beyond_int32(overflow_is_an_error, monkeypatch, tmp_path):
    """The kernels pass, and the same file without its int64 does not."""
    far_products(module)
    text = Path(module.__file__).read_text().replace(".to(tl.int64)", "").replace("@op\n", "")
    (tmp_path / "narrow_grouped_mm.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import narrow_grouped_mm
    with pytest.raises(Exception, match="int32 overflow"):
        far_products(narrow_grouped_mm)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_offsets_beyond_the_rows_count_as_all_rows(name):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 8, device=DEVICE), torch.randn(2, 6, 8, device=DEVICE)
    ends = [torch.tensor([2, end], dtype=torch.int32, device=DEVICE) for end in (5, 1000)]
    with backend.using(name):
        assert torch.equal(grouped_mm(x, weight, ends[0]), grouped_mm(x, weight, ends[1]))
        with pytest.raises(ValueError, match="E at least 1"):
            grouped_mm(x, weight[:0], ends[0][:0])
