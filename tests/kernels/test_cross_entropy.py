"""Truth: PyTorch's own cross_entropy on whole logits, the z-loss written out, differentiated by autograd in
float64; for the Triton kernel also the reference. On a CPU the kernel runs in Triton's interpreter."""

import dataclasses
import importlib.util
import inspect
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from float64_check import compare
from quick import slow_except
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels import backend, cross_entropy
from kernels.cross_entropy import chunk_rows, linear_cross_entropy

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "triton"]
OPTIONS = {"plain": {}, "z_loss": {"z_loss": 0.05}}
SHAPES = [((1,), 7, 1), ((5,), 6, 37), ((2, 3), 33, 300), ((3, 2), 5, 128), ((0,), 4, 9), ((2, 0), 4, 9)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that a row takes several, as it does where it ships."""
    monkeypatch.setattr(cross_entropy, "BLOCK", 256)


def head(shape=(11,), D=6, V=37, dtype=torch.float32, seed=0, scale=1.0):
    """x [..., D], weight [V, D], labels [...], a third of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(*s, D, generator=generator, dtype=torch.float64) for s in (shape, (V,)))
    labels = torch.randint(0, V, shape, generator=generator)
    labels.view(-1)[1::3] = -100
    return (scale * x).to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE)


def naive(x, weight, labels, z_loss=0.0):
    """-> each row's loss; a half's product is rounded to it, then all is fp32."""
    z = (x @ weight.T).flatten(0, -2)
    z = z if z.dtype == torch.float64 else z.float()
    kept = labels.flatten() != -100
    loss = F.cross_entropy(z, labels.flatten().long(), reduction="none")
    loss = loss + torch.where(kept, z_loss * torch.logsumexp(z, -1) ** 2, 0.0)
    return torch.where(kept, loss, 0.0).view(labels.shape)


def results(function, x, weight, scale=1.7):
    """-> loss, token_loss, dx, dw of fresh leaves; inputs and upstream gradient must come out as they went in."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    loss, token_loss = function(*leaves)[:2]
    upstream = torch.full_like(loss, scale)
    loss.backward(upstream)
    assert upstream.item() == torch.full_like(loss, scale).item(), "the upstream gradient was written to"
    assert all(torch.equal(a.detach(), b) for a, b in zip(leaves, (x, weight))), "an input was written to"
    return loss.detach(), token_loss.detach(), *[t.grad for t in leaves]


def whole(function):
    """A naive function of rows as the op gives its results."""
    def both(x, weight):
        token_loss = function(x, weight)
        return token_loss.sum(), token_loss
    return both


def agree(ours, plain, truth, terms, size=0.0):
    """Twice the naive formula's error in the same dtype, a rounding, and the random walk of sums of `terms`.

    size: of the largest number on the way, where the result is smaller.
    """
    for got, same, true in zip(ours, plain, truth):
        assert got.shape == true.shape
        if true.numel():
            bound = 2 * (same.double() - true).abs().max().item() + max(size, true.abs().max().item()) * (
                2 * torch.finfo(got.dtype).eps + 4 * math.sqrt(terms) * 2.0**-24)
            assert (got.double() - true).abs().max().item() <= bound


def against_naive(op, rows_loss, x, weight, terms, size=0.0):
    """op and rows_loss(x, weight) in x's dtype, against rows_loss in float64."""
    truth = results(whole(rows_loss), x.double(), weight.double())
    agree(results(op, x, weight), results(whole(rows_loss), x, weight), truth, terms, size)


class Watch(TorchDispatchMode):
    """The products asked of torch and the largest tensor it made, in bytes."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel() * out.itemsize)
            if "mm" in function.__name__:
                self.products.append(tuple(out.shape))
        return out


def chunks_of(monkeypatch, rows, V, itemsize=4):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", rows * V * itemsize)
    monkeypatch.setattr(cross_entropy, "GPU_CHUNK_BYTES", rows * V * itemsize)


# ---- against PyTorch's own

@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", BACKENDS)
def test_matches_torch(name, options, monkeypatch):
    chunks_of(monkeypatch, 4, 300)
    x, weight, labels = head((3, 5), 16, 300)
    with backend.using(name):
        against_naive(lambda a, b: linear_cross_entropy(a, b, labels, **options),
                      lambda a, b: naive(a, b, labels, **options), x, weight, 300)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reference_is_exact_in_float64(options, monkeypatch):
    chunks_of(monkeypatch, 4, 37)
    x, weight, labels = head(dtype=torch.float64)
    ours = results(lambda a, b: linear_cross_entropy(a, b, labels, **options), x, weight)
    for got, true in zip(ours, results(whole(lambda a, b: naive(a, b, labels, **options)), x, weight)):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_weight_per_token_scales_its_loss_and_its_gradients(name, dtype, monkeypatch):
    chunks_of(monkeypatch, 4, 300)
    x, weight, labels = head((3, 5), 16, 300, dtype)
    scale = torch.linspace(-2.0, 1.5, 15, dtype=torch.float64, device=DEVICE).view(3, 5)
    scale[0, 0] = 0.0
    given = scale.to(torch.promote_types(dtype, torch.float32))
    with backend.using(name):
        against_naive(lambda a, b: linear_cross_entropy(a, b, labels, z_loss=0.05, token_weight=given),
                      lambda a, b: naive(a, b, labels, 0.05) * scale, x, weight, 300)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: linear_cross_entropy(a, b, labels, token_weight=given), fullgraph=True,
                             backend="aot_eager")
    assert torch.equal(compiled(x, weight)[0], linear_cross_entropy(x, weight, labels, token_weight=given)[0])


@pytest.mark.parametrize(("name", "shape"), slow_except(
    [("reference", SHAPES[0]), ("triton", SHAPES[2]), ("triton", SHAPES[4])], product(BACKENDS, SHAPES)))
def test_shapes(name, shape):
    x, weight, labels = head(*shape)
    with backend.using(name):
        for given in (labels, labels.int(), labels.abs() % shape[2], torch.full_like(labels, -100)):
            against_naive(lambda a, b, given=given: linear_cross_entropy(a, b, given),
                          lambda a, b, given=given: naive(a, b, given), x, weight, 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_kernel_matches_the_reference(dtype, options, monkeypatch):
    chunks_of(monkeypatch, 4, 333, dtype.itemsize)
    x, weight, labels = head((9,), 24, 333, dtype)
    x, weight = x.requires_grad_(), (weight * 0.3).requires_grad_()
    for _, error, bound in compare(lambda a, b: linear_cross_entropy(a, b, labels, **options)[0], (x, weight),
                                   terms=333):
        assert error <= bound


def test_fp16_logits_are_those_of_the_products_dtype():
    """Loss by loss against the naive formula on logits rounded to fp16: the kernel must not round once more."""
    x, weight, labels = head((9,), 16, 200, torch.float16)
    with backend.using("triton"):
        token_loss = linear_cross_entropy(x, weight, labels)[1]
    z = (x @ weight.T).double()
    torch.testing.assert_close(token_loss.double(), F.cross_entropy(z, labels, reduction="none"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_hits_and_rows_without_labels(name):
    x, weight, labels = head((24,), 6, 300)
    z = x.double() @ weight.double().T
    labels = torch.where(torch.arange(24, device=DEVICE) % 4 == 0, z.argmax(-1), labels)
    with backend.using(name):
        loss, token_loss, hits = linear_cross_entropy(x.view(8, 3, 6), weight, labels.view(8, 3), want_hits=True)
        assert linear_cross_entropy(x, weight, labels)[2] is None
    assert hits.shape == token_loss.shape == (8, 3)
    assert hits.dtype == torch.bool
    assert torch.equal(hits.flatten(), z.argmax(-1) == labels)
    assert (token_loss.flatten()[labels == -100] == 0).all()
    assert not token_loss.requires_grad
    torch.testing.assert_close(loss, token_loss.sum())


@pytest.mark.parametrize("name", BACKENDS)
def test_the_first_of_equal_logits_is_the_largest(name):
    x, weight = torch.ones(2, 1, device=DEVICE), torch.zeros(300, 1, device=DEVICE)
    weight[[40, 41, 290]] = 2.0
    with backend.using(name):
        hits = linear_cross_entropy(x, weight, torch.tensor([40, 290], device=DEVICE), want_hits=True)[2]
    assert hits.tolist() == [True, False]


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_and_expanded_inputs(name):
    x, weight, labels = head((4, 3), 8, 50)
    wide = torch.stack([x, x + 1], -1)[..., 0]
    tall = weight.T.contiguous().T
    assert not wide.is_contiguous()
    assert not tall.is_contiguous()
    with backend.using(name):
        expected = results(lambda a, b: linear_cross_entropy(a, b, labels), x, weight)
        leaf = x.clone().requires_grad_()
        loss = linear_cross_entropy(torch.stack([leaf, leaf + 1], -1)[..., 0], tall, labels)[0]
        (1.7 * loss).backward()
        torch.testing.assert_close(leaf.grad, expected[2])
        one = x[:1, :1].clone().requires_grad_()
        row = one.expand(4, 3, 8)
        linear_cross_entropy(row, weight, labels.T.contiguous().T)[0].backward()
    exact = one.detach().double().requires_grad_()
    naive(exact.expand(4, 3, 8), weight.double(), labels).sum().backward()
    torch.testing.assert_close(one.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_extreme_logits(name):
    """A label without a chance, a certain one, and whole tiles whose exponentials underflow."""
    x, weight, labels = head((9,), 6, 300, scale=60.0)
    expected = naive(x.double(), weight.double(), labels)
    assert expected.max() > 104                      # exp(-104) is 0 in fp32
    with backend.using(name):
        against_naive(lambda a, b: linear_cross_entropy(a, b, labels), lambda a, b: naive(a, b, labels), x, weight, 300)
        x, weight = torch.ones(1, 1, device=DEVICE), torch.full((300, 1), -2e4, device=DEVICE)
        weight[200] = 1e4
        leaf = x.requires_grad_()
        loss = linear_cross_entropy(leaf, weight, torch.tensor([0], device=DEVICE))[0]
    loss.backward()
    assert loss.item() == 3e4
    assert leaf.grad.item() == 3e4


# ---- labels out of range

@pytest.mark.parametrize("label", [-1, -101, 37, 38, 10**6, 2**33 + 5])
def test_labels_out_of_range(label):
    x, weight, labels = head()
    labels[0] = label
    with backend.using("reference"):
        if DEVICE == "cpu":
            with pytest.raises((RuntimeError, IndexError), match="index"):
                linear_cross_entropy(x, weight, labels)
    with backend.using("triton"):
        _, _, dx, _ = results(lambda a, b: linear_cross_entropy(a, b, labels), x, weight)
        loss, token_loss, hits = linear_cross_entropy(x, weight, labels, want_hits=True)
        labels[0] = -100
        fine = linear_cross_entropy(x, weight, labels, want_hits=True)
    assert token_loss[0].isnan()
    assert loss.isnan()
    assert dx[0].isnan().all()
    assert dx[1:].isfinite().all()
    torch.testing.assert_close(token_loss[1:], fine[1][1:])
    assert torch.equal(hits, fine[2])


# ---- what is kept, made and left out

@pytest.mark.parametrize("name", BACKENDS)
def test_second_backward_raises(name):
    x, weight, labels = head()
    with backend.using(name):
        loss = linear_cross_entropy(x.requires_grad_(), weight, labels)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()


@pytest.mark.parametrize("name", BACKENDS)
def test_frozen_parts_cost_no_product(name):
    x, weight, labels = head((7,), 6, 37)
    kept = int((labels != -100).sum())
    with backend.using(name):
        _, _, dx, dw = results(lambda a, b: linear_cross_entropy(a, b, labels), x, weight, scale=1.0)
        for want_dx, want_dw in ((True, False), (False, True), (False, False)):
            a, b = x.clone().requires_grad_(want_dx), weight.clone().requires_grad_(want_dw)
            with Watch() as watch:
                loss = linear_cross_entropy(a, b, labels)[0]
                if want_dx or want_dw:
                    loss.backward()
            assert sorted(watch.products) == sorted([(kept, 37)] + [(kept, 6)] * want_dx + [(37, 6)] * want_dw)
            assert a.grad is None if not want_dx else torch.equal(a.grad, dx)
            assert b.grad is None if not want_dw else torch.equal(b.grad, dw)
        with torch.no_grad(), Watch() as watch:
            assert not linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), labels)[0].requires_grad
    assert watch.products == [(kept, 37)]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_more_than_a_chunk_of_logits(name, options, monkeypatch):
    rows, V, D = 12, 500, 2
    chunks_of(monkeypatch, 4, V)
    x, weight, _ = head((rows,), D, V)
    with backend.using(name), Watch() as watch:
        linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), torch.arange(rows, device=DEVICE),
                             **options)[0].backward()
    assert watch.largest <= 4 * 4 * (V + 63) < 4 * rows * V


def test_chunks_are_equal_and_within_their_bytes():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert chunk_rows(8192, 2 * 128256, gpu) == 4096            # 1 GiB holds 4,185 rows
    assert chunk_rows(8448, 2 * 128256, gpu) == 2816            # three of 2,816, not two and a rest of 256
    assert chunk_rows(8192, 2 * 32000, gpu) == 8192
    assert chunk_rows(10**6, 4 * 32768, cpu) == 1024
    assert chunk_rows(100, 4 * 32768, cpu) == 100
    assert chunk_rows(0, 4, cpu) == 1
    assert chunk_rows(50, 2**40, cpu) == 1
    for count in (1, 127, 129, 1000, 5000, 70001):
        for row_bytes in (1, 1000, 2**17, 2**19, 2**21, 2**25):
            step = chunk_rows(count, row_bytes, cpu)
            assert 1 <= step <= count
            assert step * row_bytes <= cross_entropy.CHUNK_BYTES
            assert step == count or step % 128 == 0 or 128 * row_bytes > cross_entropy.CHUNK_BYTES


def test_meta_tensors_go_through_every_launch():
    """The static check compiles what it sees there; nothing of that size may be made."""
    launched = []
    x, weight = (torch.empty(s, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True) for s in (8192, 128256))
    labels = torch.empty(8192, dtype=torch.int64, device="meta")
    with backend.using("triton", lambda kernel, grid, *_: launched.append(grid)):
        loss = linear_cross_entropy(x, weight, labels)[0]
        dx, dw = torch.autograd.grad(loss, [x, weight])
    assert launched == [(4096,), (4096,)]
    assert (dx.shape, dw.shape, dw.dtype) == (x.shape, weight.shape, torch.bfloat16)


def test_two_runs_agree_bitwise(monkeypatch):
    chunks_of(monkeypatch, 3, 300)
    x, weight, labels = head((3, 5), 16, 300)
    with backend.using("triton"):
        first, second = (results(lambda a, b: linear_cross_entropy(a, b, labels), x, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# ---- inside other machinery

@pytest.mark.parametrize("name", BACKENDS)
def test_under_compile(name):
    x, weight, labels = head((9,), 8, 150)

    def function(a, b):
        loss, token_loss, hits = linear_cross_entropy(2 * a, b, labels, want_hits=True, z_loss=0.01)
        return loss / 3, token_loss, hits
    with backend.using(name):
        expected = results(function, x, weight)
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert all(torch.equal(a, b) for a, b in zip(results(compiled, x, weight), expected))
        frozen = x.clone().requires_grad_()
        compiled(frozen, weight)[0].backward()
        torch.testing.assert_close(1.7 * frozen.grad, expected[2])
        with torch.no_grad():
            assert torch.equal(compiled(x, weight)[2], function(x, weight)[2])


def test_compile_with_sizes_that_change():
    _, weight, _ = head(V=40)
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 8, 13):
        x, _, labels = head((rows,), seed=rows)
        assert torch.equal(compiled(x, weight, labels)[0], linear_cross_entropy(x, weight, labels)[0])


@pytest.mark.parametrize("name", BACKENDS)
def test_under_checkpointing_and_autocast(name):
    x, weight, labels = head((9,), 8, 150)
    half = torch.bfloat16 if DEVICE == "cuda" else torch.float16

    def function(a, b):
        with torch.autocast(DEVICE, half):
            return linear_cross_entropy(a, b, labels)
    with backend.using(name):
        plain = results(function, x, weight)
        for reentrant in (True, False):
            again = results(lambda a, b, r=reentrant: checkpoint(function, a, b, use_reentrant=r), x, weight)
            assert all(torch.equal(a, b) for a, b in zip(plain, again))
    truth = results(whole(lambda a, b: naive(a, b, labels)), x.double(), weight.double())
    for got, true in zip(plain, truth):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), true, rtol=0.03, atol=0.03 * true.abs().max().item())
    assert not torch.equal(plain[3], plain[3].to(half).float())      # summed and handed over in fp32


@pytest.mark.parametrize("name", BACKENDS)
def test_mixed_dtypes(name):
    """A head in another dtype than the hidden states: the wider one is used, each gradient comes in its own dtype."""
    x, weight, labels = head((9,), 8, 150)
    x = x.half()
    with backend.using(name):
        loss, _, dx, dw = results(lambda a, b: linear_cross_entropy(a, b, labels), x, weight)
    assert loss.item() == pytest.approx(naive(x.double(), weight.double(), labels).sum().item(), rel=1e-6)
    assert (dx.dtype, dw.dtype) == (torch.float16, torch.float32)


# ---- int32

def int32_version(kernel, module, folder):
    """The kernel without its 64-bit row offsets, from its own source."""
    source = inspect.getsource(kernel.fn)
    assert ".to(tl.int64)" in source
    used = [name for name in vars(module) if f"{name}(" in source and name != kernel.fn.__name__]
    file = folder / "int32_version.py"
    file.write_text(f"from {module.__name__} import {', '.join(['tl', 'jit', *used])}\n\n\n"
                    + source.replace(".to(tl.int64)", ""))
    spec = importlib.util.spec_from_file_location("int32_version", file)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, kernel.fn.__name__)


def make_overflow_raise(monkeypatch):
    """Turn on the interpreter's overflow check, which is off by default."""
    if DEVICE == "cuda":
        pytest.skip("only Triton's interpreter checks for overflow")
    from triton.runtime import interpreter
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")        # the logarithm of a sum of nothing
def test_rows_beyond_two_to_the_31(monkeypatch, tmp_path):
    """Four rows of 2^30 numbers each and no columns: nothing is read, but the rows' places are computed."""
    make_overflow_raise(monkeypatch)

    def start(kernel):
        loss = torch.empty(4)
        kernel[(4,)](torch.empty(1), torch.zeros(4, dtype=torch.int64), loss, torch.empty(4, dtype=torch.bool), 0,
                     2**30, 0.0, DZ=True, WANT_HITS=True, BLOCK=128)
        return loss
    assert start(cross_entropy.row_kernel).isnan().all()             # the label is outside a vocabulary of nothing
    with pytest.raises(Exception, match="overflow"):
        start(int32_version(cross_entropy.row_kernel, cross_entropy, tmp_path))
