"""Truth: PyTorch's kl_div of log_softmax on whole logits in float64, differentiated by autograd; for the Triton kernel
also the reference. On a CPU the kernel runs in Triton's interpreter."""

import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from float64_check import compare
from quick import slow_except
from test_cross_entropy import (
    BACKENDS,
    DEVICE,
    Watch,
    against_naive,
    chunks_of,
    head,
    int32_version,
    make_overflow_raise,
    results,
    whole,
)
from torch.utils.checkpoint import checkpoint

from kernels import backend
from kernels.linear_kl import linear_kl

pytestmark = pytest.mark.kernel

MODULE = sys.modules["kernels.linear_kl"]          # the package may give the function the same name

OPTIONS = {"plain": {}, "hot": {"temperature": 2.5}, "cold": {"temperature": 0.5}}
SHAPES = [((1,), 7, 3, 1), ((5,), 6, 6, 37), ((2, 3), 33, 5, 300), ((3, 2), 5, 9, 128), ((0,), 4, 3, 9),
          ((2, 0), 4, 3, 9)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that a row takes several, as it does where it ships, and the reference several blocks."""
    monkeypatch.setattr(MODULE, "BLOCK", 256)
    monkeypatch.setattr(MODULE, "CACHED", 600)


def heads(shape=(11,), D=6, teacher_D=9, V=37, dtype=torch.float32, scale=1.0):
    """x, weight, teacher's x, teacher's weight, labels."""
    x, weight, labels = head(shape, D, V, dtype, scale=scale)
    teacher_x, teacher_weight, _ = head(shape, teacher_D, V, dtype, seed=1, scale=scale)
    return x, weight, teacher_x, teacher_weight, labels


def naive(x, weight, teacher_x, teacher_weight, labels, temperature=1.0):
    """-> each row's loss in x's dtype, a half's product rounded to it and then fp32."""
    def log_softmax(x, weight):
        z = (x @ weight.T).flatten(0, -2)
        return F.log_softmax((z if z.dtype == torch.float64 else z.float()) / temperature, -1)
    log_q = log_softmax(x, weight)
    log_p = log_softmax(teacher_x.to(x.dtype), teacher_weight.to(x.dtype))
    rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * temperature**2
    return torch.where(labels.flatten() != -100, rows, 0.0).view(labels.shape)


# ---- against PyTorch's own

@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", BACKENDS)
def test_matches_torch(name, options, monkeypatch):
    chunks_of(monkeypatch, 6, 300)                   # of two logits: 3 rows
    x, weight, *rest = heads((2, 4), 16, 9, 300)
    with backend.using(name):
        against_naive(lambda a, b: linear_kl(a, b, *rest, **options), lambda a, b: naive(a, b, *rest, **options),
                      x, weight, 300)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reference_is_exact_in_float64(options, monkeypatch):
    chunks_of(monkeypatch, 8, 37)
    x, weight, *rest = heads(dtype=torch.float64)
    ours = results(lambda a, b: linear_kl(a, b, *rest, **options), x, weight)
    for got, true in zip(ours, results(whole(lambda a, b: naive(a, b, *rest, **options)), x, weight)):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "shape"), slow_except(
    [("reference", SHAPES[0]), ("triton", SHAPES[2]), ("triton", SHAPES[4])], product(BACKENDS, SHAPES)))
def test_shapes(name, shape):
    x, weight, teacher_x, teacher_weight, labels = heads(*shape)
    with backend.using(name):
        for given in (labels, labels.int().abs(), torch.full_like(labels, -100)):
            rest = teacher_x, teacher_weight, given
            against_naive(lambda a, b, rest=rest: linear_kl(a, b, *rest), lambda a, b, rest=rest: naive(a, b, *rest),
                          x, weight, 300)


@pytest.mark.parametrize(("dtype", "name"), slow_except(
    [(torch.float32, "plain"), (torch.float16, "hot"), (torch.bfloat16, "cold")],
    product([torch.float32, torch.float16, torch.bfloat16], OPTIONS)))
def test_kernel_matches_the_reference(dtype, name, monkeypatch):
    options = OPTIONS[name]
    chunks_of(monkeypatch, 8, 333, dtype.itemsize)
    x, weight, teacher_x, teacher_weight, labels = heads((9,), 24, 16, 333, dtype)
    given = x.requires_grad_(), (weight * 0.3).requires_grad_(), teacher_x, teacher_weight * 0.3, labels
    for _, error, bound in compare(lambda *a: linear_kl(*a, **options)[0], given, terms=333):
        assert error <= bound


@pytest.mark.parametrize("name", BACKENDS)
def test_a_close_student_and_shifted_logits(name):
    """A divergence of 1e-4 to 1 % of it, and nothing at all for the teacher itself; a shift of 200 changes nothing."""
    x, weight, _, _, labels = heads((9,), 8, 8, 300)
    near = weight + 5e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    truth = naive(x.double(), near.double(), x.double(), weight.double(), labels)
    assert 1e-5 < truth.max() < 1e-3
    shifted = torch.cat([x, torch.ones(9, 1, device=DEVICE)], -1)
    shifted_weight = torch.cat([weight, torch.full((300, 1), 200.0, device=DEVICE)], -1)
    with backend.using(name):
        for teacher, tolerance in (((x, weight), 1e-2 * truth.max()), ((shifted, shifted_weight), 1e-4)):
            token_loss = linear_kl(x, near, *teacher, labels)[1]
            assert (token_loss.double() - truth).abs().max() < tolerance
        assert linear_kl(x, weight, x, weight, labels)[1].abs().max() < 1e-6


@pytest.mark.parametrize("name", BACKENDS)
def test_far_apart(name):
    """Probabilities that underflow, in the one or the other."""
    x, weight, *rest = heads((7,), 6, 6, 300, scale=40.0)
    with backend.using(name):
        against_naive(lambda a, b: linear_kl(a, b, *rest),
                      lambda a, b: naive(a, b, *rest), x, weight, 300, size=200.0)


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_and_expanded_inputs(name):
    x, weight, teacher_x, teacher_weight, labels = heads((4, 3), 8, 5, 50)
    wide, tall = torch.stack([x, x + 1], -1)[..., 0], weight.T.contiguous().T
    teacher_wide = torch.stack([teacher_x, teacher_x], -1)[..., 0]
    with backend.using(name):
        expected = linear_kl(x, weight, teacher_x, teacher_weight, labels)[1]
        found = linear_kl(wide, tall, teacher_wide, teacher_weight.T.contiguous().T, labels.T.contiguous().T)[1]
        torch.testing.assert_close(found, expected)
        one = x[:1, :1].clone().requires_grad_()
        linear_kl(one.expand(4, 3, 8), weight, teacher_x[:1, :1].expand(4, 3, 5), teacher_weight, labels)[0].backward()
    exact = one.detach().double().requires_grad_()
    naive(exact.expand(4, 3, 8), weight.double(), teacher_x[:1, :1].expand(4, 3, 5), teacher_weight,
          labels).sum().backward()
    torch.testing.assert_close(one.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_compared():
    x, weight, teacher_x, teacher_weight, labels = heads()
    with pytest.raises(ValueError, match="head has 37 rows, the teacher's 36"):
        linear_kl(x, weight, teacher_x, teacher_weight[:36], labels)
    with pytest.raises(ValueError, match="the same tokens"):
        linear_kl(x, weight, teacher_x[:10], teacher_weight, labels)
    with pytest.raises(ValueError, match="temperature is 0"):
        linear_kl(x, weight, teacher_x, teacher_weight, labels, temperature=0)


# ---- what is kept, made and left out

@pytest.mark.parametrize("name", BACKENDS)
def test_second_backward_raises(name):
    x, weight, *rest = heads()
    with backend.using(name):
        loss = linear_kl(x.requires_grad_(), weight, *rest)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()


@pytest.mark.parametrize("name", BACKENDS)
def test_what_needs_no_gradient_costs_no_product(name):
    """The teacher never gets one, whatever its tensors ask for."""
    x, weight, teacher_x, teacher_weight, labels = heads((7,), 6, 9, 37)
    teacher = teacher_x.requires_grad_(), teacher_weight.requires_grad_()
    kept = int((labels != -100).sum())
    with backend.using(name):
        _, _, dx, dw = results(lambda a, b: linear_kl(a, b, *teacher, labels), x, weight, scale=1.0)
        for want_dx, want_dw in ((True, False), (False, True), (False, False)):
            a, b = x.clone().requires_grad_(want_dx), weight.clone().requires_grad_(want_dw)
            with Watch() as watch:
                loss = linear_kl(a, b, *teacher, labels)[0]
                if want_dx or want_dw:
                    loss.backward()
            assert sorted(watch.products) == sorted([(kept, 37)] * 2 + [(kept, 6)] * want_dx + [(37, 6)] * want_dw)
            assert a.grad is None if not want_dx else torch.equal(a.grad, dx)
            assert b.grad is None if not want_dw else torch.equal(b.grad, dw)
    assert teacher_x.grad is None
    assert teacher_weight.grad is None


@pytest.mark.parametrize("name", BACKENDS)
def test_no_more_than_a_chunk_of_logits(name, monkeypatch):
    rows, V, D = 12, 500, 2
    chunks_of(monkeypatch, 8, V)                     # both logits of 4 rows
    x, weight, teacher_x, teacher_weight, _ = heads((rows,), D, D, V)
    labels = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    with backend.using(name), Watch() as watch:
        linear_kl(x.requires_grad_(), weight.requires_grad_(), teacher_x, teacher_weight, labels)[0].backward()
    assert watch.largest <= 4 * 4 * (V + 63) < 4 * rows * V


def test_meta_tensors_go_through_every_launch():
    """The static check compiles what it sees there; nothing of that size may be made."""
    launched = []

    def meta(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    x, weight = meta(8192, 2048), meta(128256, 2048)
    labels = torch.empty(8192, dtype=torch.int64, device="meta")
    with backend.using("triton", lambda kernel, grid, *_: launched.append(grid)):
        loss = linear_kl(x, weight, meta(8192, 4096), meta(128256, 4096), labels)[0]
        dx, dw = torch.autograd.grad(loss, [x, weight])
    assert launched == [(2048,)] * 4                 # 1 GiB for both logits together
    assert (dx.shape, dw.shape, dw.dtype) == (x.shape, weight.shape, torch.bfloat16)


def test_two_runs_agree_bitwise(monkeypatch):
    chunks_of(monkeypatch, 6, 300)
    x, weight, *rest = heads((2, 4), 16, 9, 300)
    with backend.using("triton"):
        first, second = (results(lambda a, b: linear_kl(a, b, *rest), x, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# ---- inside other machinery

@pytest.mark.parametrize("name", BACKENDS)
def test_under_compile(name):
    x, weight, *rest = heads((7,), 8, 5, 150)

    def function(a, b):
        loss, token_loss = linear_kl(2 * a, b, *rest, temperature=2.0)
        return loss / 3, token_loss
    with backend.using(name):
        expected = results(function, x, weight)
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert all(torch.equal(a, b) for a, b in zip(results(compiled, x, weight), expected))


@pytest.mark.parametrize("name", BACKENDS)
def test_under_checkpointing_and_autocast(name):
    x, weight, teacher_x, teacher_weight, labels = heads((7,), 8, 5, 150)
    rest = teacher_x.half(), teacher_weight, labels
    half = torch.bfloat16 if DEVICE == "cuda" else torch.float16

    def function(a, b):
        with torch.autocast(DEVICE, half):
            return linear_kl(a, b, *rest)
    with backend.using(name):
        plain = results(function, x, weight)
        for reentrant in (True, False):
            again = results(lambda a, b, r=reentrant: checkpoint(function, a, b, use_reentrant=r), x, weight)
            assert all(torch.equal(a, b) for a, b in zip(plain, again))
    truth = results(whole(lambda a, b: naive(a, b, teacher_x, teacher_weight, labels)), x.double(), weight.double())
    for got, true in zip(plain, truth):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), true, rtol=0.03, atol=0.03 * true.abs().max().item())
    assert not torch.equal(plain[3], plain[3].to(half).float())      # summed and handed over in fp32


@pytest.mark.parametrize("name", BACKENDS)
def test_teacher_in_another_dtype(name):
    """Each keeps its own: neither is rounded to the other's."""
    x, weight, teacher_x, teacher_weight, labels = heads((7,), 8, 5, 150)
    rest = teacher_x.half(), teacher_weight.half(), labels
    rounded = teacher_x.half() @ teacher_weight.half().T
    with backend.using(name):
        token_loss = linear_kl(x, weight, *rest)[1]
    log_q, log_p = F.log_softmax(x.double() @ weight.double().T, -1), F.log_softmax(rounded.double(), -1)
    truth = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(token_loss.double(), torch.where(labels != -100, truth, 0.0), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")        # a sum of nothing divided by one
def test_rows_beyond_two_to_the_31(monkeypatch, tmp_path):
    """Four rows of 2^30 numbers each and no columns: nothing is read, but the rows' places are computed."""
    make_overflow_raise(monkeypatch)

    def start(kernel):
        loss = torch.zeros(4)
        kernel[(4,)](torch.empty(1), torch.empty(1), loss, 0, 2**30, 1.0, DZ=True, BLOCK=128)
        return loss
    assert start(MODULE.row_kernel).isnan().all()                    # 0 / 0
    with pytest.raises(Exception, match="overflow"):
        start(int32_version(MODULE.row_kernel, MODULE, tmp_path))
