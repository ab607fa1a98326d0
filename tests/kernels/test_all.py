"""Each kernel's reference against a naive formula in float64, its gradients against finite differences (gradcheck).

The naive formulas below are written from the papers, differentiated by autograd and never share code with kernels/.
A bf16 result may differ from them by what its own rounding costs and no more.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import kernels
from kernels import cross_entropy
from kernels.attention import interval_mask

SHAPES = [(3, 5, 37), (1, 1), (1, 8), (7, 1), (0, 6), (2, 0, 6), (130, 257)]        # odd, one row, one column, none
BF16 = 2.0**-8                    # spacing of bf16 relative to the number: a rounding costs at most half of it


def normal(*shape, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed + 17)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def strided(x):
    """The same numbers with gaps between them in memory."""
    if x.ndim == 1:
        return torch.stack([x, x + 1], dim=1)[:, 0]
    wide = torch.cat([x, x + 1], dim=-1).transpose(0, -1).contiguous().transpose(0, -1)
    return wide[..., :x.shape[-1]]


def close(got, truth, spacing, terms, scale=None):
    """|got - truth| within a rounding of each number, and fp32's error in a sum of `terms` numbers of size `scale`."""
    assert got.shape == truth.shape
    if got.numel():
        error = (got.double() - truth).abs()
        bound = spacing * truth.abs() + 2.0**-22 * math.sqrt(terms) * (scale or truth.abs().max())
        assert (error <= bound).all(), f"{(error / bound).max().item():.2f} times the bound"


def results(function, inputs, seed=99):
    """[outputs..., gradients...] of inputs that need them, from a fixed random upstream gradient; inputs untouched."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    fed = [strided(x) if x.ndim and x.is_floating_point() else x for x in leaves]
    for given in (leaves, fed):
        before = [x.detach().clone() for x in given]
        outputs = function(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [normal(*y.shape, seed=seed + i).to(y.dtype) for i, y in enumerate(outputs)]
        kept = [u.clone() for u in upstream]
        wanted = [x for x in leaves if x.requires_grad]
        gradients = torch.autograd.grad(outputs, wanted, upstream)
        assert all(torch.equal(a, b.detach()) for a, b in zip(before, given)), "an input was written to"
        assert all(torch.equal(a, b) for a, b in zip(kept, upstream)), "an upstream gradient was written to"
        assert all(g.dtype == x.dtype for g, x in zip(gradients, wanted))
        found = [y.detach() for y in outputs] + list(gradients)
        if given is leaves:
            first = found
        else:
            for a, b in zip(first, found):
                eps = 4 * max(torch.finfo(a.dtype).eps, 1e-6)
                assert a.numel() == 0 or (a - b).abs().max() <= eps * a.abs().max().clamp(min=1), "strides matter"
    return first


def against(function, naive, inputs, spacing, terms=1, scale=0.0):
    """The outputs and gradients of `function` against those of `naive` in float64 on the same numbers.

    scale: the size of what cancels inside, where that is larger than every result.
    """
    truth = results(naive, [x.double() if x.is_floating_point() else x for x in inputs])
    found = results(function, inputs)
    assert len(found) == len(truth)
    scale = max([scale] + [y.abs().max().item() for y in truth if y.numel()])
    for got, expected in zip(found, truth):
        close(got, expected, spacing, terms, scale)


# ---- naive formulas, in the dtype they are given

def naive_rmsnorm(x, w, eps=1e-5):
    return w * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def naive_swiglu(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def naive_rope(x, angle):
    """x [B, T, H, d]; each pair (x[i], x[i + d/2]) times exp(i angle), as complex numbers."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[..., None, :]
    return torch.cat([turned.real, turned.imag], dim=-1)


def naive_attention(q, k, v, causal=True, window=None, doc_start=None, past=None):
    """One query at a time: the keys it may see are listed in plain Python."""
    B, T, H, d = q.shape
    S, K = k.shape[1:3]
    rows = []
    for b in range(B):
        for i in range(T):
            at = (S - T if past is None else past) + i
            seen = [j for j in range(S) if (j <= at if causal else True)
                    and (window is None or abs(at - j) < window)
                    and (doc_start is None or doc_start[b, j] == doc_start[b, at])]
            for h in range(H):
                keys, values = k[b, seen, h * K // H], v[b, seen, h * K // H]
                rows.append(torch.softmax(keys @ q[b, i, h] / math.sqrt(d), 0) @ values)
    return torch.stack(rows).view(B, T, H, d) if rows else q * 0


def naive_loss(x, w, labels):
    total = x.sum() * 0 + w.sum() * 0
    for row, label in zip(x.reshape(-1, x.shape[-1]), labels.reshape(-1).tolist()):
        if label != -100:
            z = w @ row
            total = total + torch.logsumexp(z, 0) - z[label]
    return total


# ---- rmsnorm

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rmsnorm(shape, dtype):
    spacing = {torch.float32: 2.0**-21, torch.bfloat16: BF16, torch.float16: 2.0**-10}[dtype]
    inputs = [normal(*shape, dtype=dtype, scale=3), normal(shape[-1], seed=1, dtype=dtype)]
    rms = inputs[0].double().square().mean(-1).sqrt()
    cancels = 4 * inputs[1].abs().max().item() / rms.min().item() if rms.numel() else 1.0        # dx = r (w dy - ...)
    against(lambda x, w: kernels.rmsnorm(x, w, 1e-5), exact_upstream(naive_rmsnorm, dtype), inputs, spacing, 64,
            cancels)


def exact_upstream(naive, dtype):
    """`naive` whose upstream gradient is rounded to `dtype` first, as ours is; its values stay float64."""
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy.to(dtype).double()

    def rounded(*inputs):
        outputs = naive(*inputs)
        return tuple(map(Round.apply, outputs)) if isinstance(outputs, tuple) else Round.apply(outputs)
    return rounded


def test_rmsnorm_gradcheck():
    x, w = normal(2, 3, 5, dtype=torch.float64), normal(5, seed=1, dtype=torch.float64)
    assert gradcheck(lambda a, b: kernels.rmsnorm(a, b, 1e-5), (x.requires_grad_(), w.requires_grad_()))


def test_rmsnorm_of_zeros_is_finite():
    x = torch.zeros(2, 4, requires_grad=True)
    y = kernels.rmsnorm(x, torch.ones(4), 1e-6)
    y.sum().backward()
    assert (y == 0).all()
    assert x.grad.isfinite().all()


def test_rmsnorm_squares_in_fp32():
    """300^2 overflows fp16; the sum of 4096 bf16 squares would stop growing at 256."""
    assert kernels.rmsnorm(torch.full((1, 8), 300.0, dtype=torch.float16), torch.ones(8), 1e-6).tolist() == [[1.0] * 8]
    assert kernels.rmsnorm(torch.ones(1, 4096).bfloat16(), torch.ones(4096), 0.0).unique().tolist() == [1.0]


# ---- swiglu

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_swiglu(shape, dtype):
    spacing = {torch.float32: 2.0**-20, torch.bfloat16: BF16, torch.float16: 2.0**-10}[dtype]
    inputs = [normal(*shape, dtype=dtype, scale=3), normal(*shape, seed=1, dtype=dtype)]
    against(kernels.swiglu, exact_upstream(naive_swiglu, dtype), inputs, spacing, 4)


def test_swiglu_gradcheck_and_extremes():
    gate, up = (normal(3, 7, seed=s, dtype=torch.float64).requires_grad_() for s in (0, 1))
    assert gradcheck(kernels.swiglu, (gate, up))
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    y = kernels.swiglu(gate, torch.ones(5))
    y.sum().backward()
    assert y.tolist() == [0, 0, 0, 100, 1e4]
    assert gate.grad.tolist() == [0, 0, 0.5, 1, 1]


# ---- rope

ROPE_SHAPES = [(2, 5, 4, 6, 2), (1, 1, 1, 2, 1), (0, 3, 2, 4, 1), (2, 0, 2, 4, 1), (3, 7, 3, 34, 1)]


def angles(B, T, half):
    return torch.rand(B, T, half, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 50


@pytest.mark.parametrize("shape", ROPE_SHAPES, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["one_row_of_angles", "each_row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rope(shape, shared, dtype):
    B, T, H, d, K = shape
    angle = angles(1 if shared else B, T, d // 2)
    cos, sin = angle.cos().float(), angle.sin().float()
    inputs = [normal(B, T, H, d, dtype=dtype), normal(B, T, K, d, seed=1, dtype=dtype)]
    against(lambda q, k: kernels.rope(q, k, cos, sin),
            exact_upstream(lambda q, k: (naive_rope(q, angle), naive_rope(k, angle)), dtype),
            inputs, BF16 if dtype == torch.bfloat16 else 2.0**-21, 4)


def test_rope_gradcheck_and_laws():
    angle = angles(1, 4, 3)
    q, k = (normal(2, 4, heads, 6, dtype=torch.float64).requires_grad_() for heads in (2, 1))
    assert gradcheck(lambda a, b: kernels.rope(a, b, angle.cos(), angle.sin()), (q, k))
    turned, _ = kernels.rope(q, k, angle.cos(), angle.sin())
    assert torch.allclose(turned.norm(dim=-1), q.norm(dim=-1))                # a rotation keeps lengths
    back, _ = kernels.rope(turned, k, angle.cos(), -angle.sin())
    assert torch.allclose(back, q)
    quarter = torch.full((1, 1, 1), math.pi / 2)
    y, _ = kernels.rope(torch.tensor([[[[1.0, 0.0]]]]), torch.zeros(1, 1, 1, 2), quarter.cos(), quarter.sin())
    assert y.flatten().tolist() == pytest.approx([0.0, 1.0], abs=1e-6)        # (1, 0) turns towards the second half


def test_rope_has_one_formula_compiled_or_not(monkeypatch):
    angle = angles(2, 5, 3)
    x = [normal(2, 5, 4, 6), normal(2, 5, 2, 6, seed=1), angle.cos().float(), angle.sin().float()]
    plain = kernels.rope(*x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(plain, kernels.rope(*x)))


# ---- attention

def documents(rows):
    """doc_start [B, T] int32 of rows that hold documents of these lengths."""
    return torch.tensor([[sum(row[:i]) for i, n in enumerate(row) for _ in range(n)] for row in rows],
                        dtype=torch.int32)


PACKED = documents([[4, 1, 6], [11], [1, 9, 1]])
ATTENTION = {
    "causal": {}, "both_ways": {"causal": False}, "window": {"window": 3}, "window_of_one": {"window": 1},
    "window_both_ways": {"causal": False, "window": 2}, "documents": {"doc_start": PACKED},
    "documents_both_ways": {"doc_start": PACKED, "causal": False},
    "documents_window": {"doc_start": PACKED, "window": 3},
    "documents_window_both_ways": {"doc_start": PACKED, "window": 3, "causal": False},
    "wide_window": {"window": 100, "doc_start": PACKED},
}


def qkv(B=3, T=11, S=11, H=4, K=2, d=6, dtype=torch.float32):
    return [normal(B, T, H, d, dtype=dtype), normal(B, S, K, d, seed=1, dtype=dtype),
            normal(B, S, K, d, seed=2, dtype=dtype)]


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    options = ATTENTION[name]
    against(lambda *x: kernels.attention(*x, **options), lambda *x: naive_attention(*x, **options), qkv(),
            2.0**-19, 64)


@pytest.mark.parametrize("heads", [(1, 1), (6, 1), (6, 3), (5, 5)], ids=str)
def test_attention_heads(heads):
    against(kernels.attention, naive_attention, qkv(2, 5, 5, *heads, d=4), 2.0**-19, 64)


@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize("queries", [1, 3, 11])
def test_attention_with_a_cache_aligns_at_the_end(queries, window):
    against(lambda *x: kernels.attention(*x, window=window), lambda *x: naive_attention(*x, window=window),
            qkv(2, queries, 11), 2.0**-19, 64)


@pytest.mark.parametrize("past", [0, 3, 7])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_of_queries_among_the_keys(name, past):
    """As of a rank that has all keys of a sequence and some of its queries."""
    options = ATTENTION[name] | {"past": past}
    against(lambda *x: kernels.attention(*x, **options), lambda *x: naive_attention(*x, **options), qkv(T=4),
            2.0**-19, 64)


@pytest.mark.parametrize("name", ["causal", "window", "documents", "documents_window"])
def test_attention_gradcheck(name):
    options = ATTENTION[name]
    inputs = [x.requires_grad_() for x in qkv(B=3, H=2, K=1, d=2, dtype=torch.float64)]
    assert gradcheck(lambda *x: kernels.attention(*x, **options), inputs, fast_mode=True)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_on_documents_equals_the_dense_mask(name):
    """The CPU splits rows at document boundaries; a dense mask through torch's own operation is the other way."""
    options = {"causal": True, "window": None, **ATTENTION[name]}
    q, k, v = qkv()
    mask = interval_mask(11, 11, options["causal"], options["window"], options.get("doc_start"))
    truth = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True)
    assert (kernels.attention(q, k, v, **options) - truth.transpose(1, 2)).abs().max() < 1e-6


def test_interval_mask_by_hand():
    mask = interval_mask(5, 5, True, 2, documents([[3, 2]]))[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0],
                    [1, 1, 0, 0, 0],
                    [0, 1, 1, 0, 0],
                    [0, 0, 0, 1, 0],
                    [0, 0, 0, 1, 1]]
    assert interval_mask(2, 4, True, None).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("doc_start", [None, PACKED], ids=["rows", "documents"])
def test_attention_bf16(doc_start):
    """Probabilities are rounded to bf16 before the second product, the sum once more: two roundings of the largest."""
    q, k, v = qkv(dtype=torch.bfloat16)
    truth = naive_attention(q.double(), k.double(), v.double(), doc_start=doc_start)
    error = (kernels.attention(q, k, v, doc_start=doc_start).double() - truth).abs()
    assert error.max() < 2 * BF16 * v.abs().max()


# ---- linear_cross_entropy

LABELS = [5, -100, 0, 12, -100, 12, 3]


def head(rows=7, V=13, D=6, dtype=torch.float32):
    return normal(rows, D, dtype=dtype), normal(V, D, seed=1, dtype=dtype), torch.tensor(LABELS[:rows])


@pytest.mark.parametrize("chunk", [1, 4 * 13 * 3, 4 * 13 * 5, 2**26], ids=["a_row", "3_rows", "all_kept", "all"])
@pytest.mark.parametrize("ignored", [True, False])
def test_cross_entropy_chunks(monkeypatch, chunk, ignored):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk)
    x, w, labels = head()
    labels = labels if ignored else labels.abs() % 13
    against(lambda a, b: kernels.linear_cross_entropy(a, b, labels)[0],
            lambda a, b: F.cross_entropy(a @ b.T, labels, reduction="sum"), [x, w], 2.0**-19, 64)
    against(lambda a, b: kernels.linear_cross_entropy(a, b, labels)[0],
            lambda a, b: naive_loss(a, b, labels), [x, w], 2.0**-19, 64)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 300, 37), (3, 5, 257, 9), (2, 0, 7, 3), (0, 4, 7, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_cross_entropy_shapes(shape, dtype):
    B, T, V, D = shape
    labels = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(5)).to(dtype)
    against(lambda a, b: kernels.linear_cross_entropy(a, b, labels)[0], lambda a, b: naive_loss(a, b, labels),
            [normal(B, T, D), normal(V, D, seed=1)], 2.0**-19, 256)


def test_cross_entropy_of_nothing():
    x, w, _ = head()
    loss, token_loss, hits = kernels.linear_cross_entropy(x.requires_grad_(), w.requires_grad_(),
                                                          torch.full((7,), -100), want_hits=True)
    loss.backward()
    assert loss == 0
    assert token_loss.tolist() == [0.0] * 7
    assert not hits.any()
    assert (x.grad == 0).all()
    assert (w.grad == 0).all()


def test_cross_entropy_finite_differences():
    """gradcheck cannot judge it (it asks for a second backward pass), so each number is moved by hand."""
    x, w, labels = head(dtype=torch.float64)
    x.requires_grad_()
    w.requires_grad_()
    (3 * kernels.linear_cross_entropy(x, w, labels)[0]).backward()
    step = 1e-6
    for tensor in (x, w):
        flat = tensor.detach().view(-1)
        for i in range(len(flat)):
            middle, sides = flat[i].item(), []
            for sign in (1, -1):
                flat[i] = middle + sign * step
                sides.append(3 * kernels.linear_cross_entropy(x, w, labels)[0].item())
            flat[i] = middle
            assert tensor.grad.view(-1)[i].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=1e-7)


def test_cross_entropy_of_each_token_and_hits():
    x, w, labels = head()
    loss, token_loss, hits = kernels.linear_cross_entropy(x.view(7, 1, 6), w, labels.view(7, 1), want_hits=True)
    z = x.double() @ w.double().T
    assert token_loss.shape == hits.shape == (7, 1)
    assert not token_loss.requires_grad
    close(token_loss.flatten(), F.cross_entropy(z, labels, reduction="none"), 2.0**-19, 4)
    assert loss.item() == pytest.approx(token_loss.sum().item())
    best = z.argmax(-1)
    _, _, hits = kernels.linear_cross_entropy(x, w, torch.where(labels == 12, best, labels), want_hits=True)
    assert hits.tolist() == ((labels == 12) | (labels == best)).tolist()
    assert hits.any()
    assert not hits.all()
    assert kernels.linear_cross_entropy(x, w, labels)[2] is None


def test_cross_entropy_frozen_parts(monkeypatch):
    """A frozen head costs no product of V x D: neither a gradient nor the matmul that would make one."""
    x, w, labels = head()
    made = []
    real = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda self, *a, **k: made.append(self.shape) or real(self, *a, **k))
    whole = kernels.linear_cross_entropy(x.requires_grad_(), w.requires_grad_(), labels)[0]
    dx, dw = torch.autograd.grad(whole, [x, w])
    assert made == [w.shape]
    kernels.linear_cross_entropy(x, w.detach(), labels)[0].backward()
    assert made == [w.shape]
    assert torch.equal(x.grad, dx)
    kernels.linear_cross_entropy(x.detach(), w, labels)[0].backward()
    assert torch.equal(w.grad, dw)
    with torch.no_grad():
        kernels.linear_cross_entropy(x, w, labels)
    assert len(made) == 2


def test_cross_entropy_scaled_and_accumulated():
    x, w, labels = head()
    exact = [t.double().requires_grad_() for t in (x, w)]
    truth = torch.autograd.grad(naive_loss(*exact, labels), exact)
    x.requires_grad_()
    w.requires_grad_()
    for _ in range(2):
        (kernels.linear_cross_entropy(x, w, labels)[0] / 5).backward()
    close(x.grad, truth[0] * 0.4, 2.0**-19, 64)
    close(w.grad, truth[1] * 0.4, 2.0**-19, 64)


def test_cross_entropy_second_backward_raises():
    x, w, labels = head()
    loss, _, _ = kernels.linear_cross_entropy(x.requires_grad_(), w.requires_grad_(), labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()


def test_cross_entropy_of_huge_logits():
    x, w = torch.tensor([[1e4, 0.0]], requires_grad=True), torch.eye(2)
    loss, _, _ = kernels.linear_cross_entropy(x, w, torch.tensor([1]))
    loss.backward()
    assert loss == 1e4
    assert x.grad.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("chunk", [4 * 13 * 2, 2**26], ids=["2_rows", "all"])
def test_cross_entropy_of_hopeless_labels(monkeypatch, chunk):
    """Where a label's probability underflows, its loss is still logsumexp - logit, beside likelier labels."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk)
    x, w, labels = head()
    x = x * 60
    expected = F.cross_entropy(x.double() @ w.double().T, labels, reduction="none")
    assert (expected > 104).any()                       # exp(-104) is 0 in fp32
    assert ((expected > 0) & (expected < 60)).any()
    close(kernels.linear_cross_entropy(x, w, labels)[1], expected, 2.0**-19, 4)
    against(lambda a, b: kernels.linear_cross_entropy(a, b, labels)[0], lambda a, b: naive_loss(a, b, labels), [x, w],
            2.0**-19, 64)


def test_cross_entropy_bf16():
    """The logits are bf16 products: a row's loss may be off by a rounding of its largest logit and of its label's."""
    x, w, labels = head(dtype=torch.bfloat16)
    x64, w64 = (t.double().requires_grad_() for t in (x, w))
    truth = naive_loss(x64, w64, labels)
    truth.backward()
    largest = (x64 @ w64.T).abs().max().item()
    loss, token_loss, _ = kernels.linear_cross_entropy(x.requires_grad_(), w.requires_grad_(), labels)
    loss.backward()
    assert token_loss.dtype == torch.float32
    assert x.grad.dtype == w.grad.dtype == torch.bfloat16
    assert abs(loss.item() - truth.item()) < 5 * BF16 * largest
    for got, expected, other in ((x.grad, x64.grad, w64), (w.grad, w64.grad, x64)):
        assert (got.double() - expected).abs().max() < 4 * BF16 * largest * other.abs().max()


def test_cross_entropy_under_autocast(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 13 * 2)                # two rows at a time
    x, w, labels = head(dtype=torch.float32)
    truth = [t.double().requires_grad_() for t in (x, w)]
    expected = naive_loss(*truth, labels)
    expected.backward()
    x.requires_grad_()
    w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = kernels.linear_cross_entropy(x, w, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert loss.item() != pytest.approx(expected.item(), rel=1e-6)              # it did run in bf16
    for got, exact in ((x.grad, truth[0].grad), (w.grad, truth[1].grad)):
        assert got.dtype == torch.float32
        assert (got - exact).abs().max() < 0.02 * exact.abs().max()
    assert not torch.equal(w.grad, w.grad.bfloat16().float())                   # summed and handed over in fp32


def test_cross_entropy_mixed_dtypes():
    """A head in another dtype than the hidden states: the wider one is used, each gradient comes in its own dtype."""
    x, w, labels = head()
    x = x.bfloat16().requires_grad_()
    w.requires_grad_()
    loss, _, _ = kernels.linear_cross_entropy(x, w, labels)
    loss.backward()
    assert loss.item() == pytest.approx(naive_loss(x.double(), w.double(), labels).item(), rel=1e-6)
    assert (x.grad.dtype, w.grad.dtype) == (torch.bfloat16, torch.float32)


def test_cross_entropy_keeps_no_logits(monkeypatch):
    """With a chunk of a few rows no tensor as large as [rows, V] is ever made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    rows, V, D = 64, 5000, 4
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * V * 4)
    x, w = normal(rows, D).requires_grad_(), normal(V, D, seed=1).requires_grad_()
    with Watch():
        loss, _, _ = kernels.linear_cross_entropy(x, w, torch.arange(rows))
        loss.backward()
    assert largest == V * D                                                     # the head; a chunk is as large
