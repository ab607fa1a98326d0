"""Flash attention (kernels/flash.py) and the other backends of kernels/attention.py, against a naive formula.

On a CPU the kernels run in Triton's interpreter. The truth is written out with an explicit mask in float64; how far a
result may be from it is measure.compare's rule, with PyTorch's own attention in the same dtype as the yardstick.
"""

import dataclasses
import importlib

import pytest
import torch
from float64_check import compare
from quick import slow_except

from kernels import backend, flash
from kernels.attention import attention, runs_flash
from measure.kernel_cases import run

pytestmark = pytest.mark.kernel
module = importlib.import_module("kernels.attention")        # the package's own `attention` is the op
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]      # no bf16 dots in the interpreter


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So small that 37 tokens meet several tiles, some of them whole and some cut."""
    for name, (m, n) in {"FORWARD": (16, 16), "DQ": (32, 16), "DKDV": (16, 16)}.items():
        size = (m, n, 4, 1)
        monkeypatch.setattr(flash, name, {80: {64: size, 128: size, 256: size, "fp32": size}})


def documents(rows):
    """doc_start [B, T] int32 of rows that hold documents of these lengths."""
    return torch.tensor([[sum(row[:i]) for i, n in enumerate(row) for _ in range(n)] for row in rows],
                        dtype=torch.int32, device=DEVICE)


PACKED = [[1, 16, 3, 17]]                 # a document of one token, one of a tile's length, one that ends the row
MASKS = {
    "causal": {}, "both_ways": {"causal": False},
    "window": {"window": 20}, "window_of_one": {"window": 1}, "window_of_31": {"window": 31},      # edges beside tiles'
    "window_larger_than_T": {"window": 100}, "window_both_ways": {"causal": False, "window": 5},
    "documents": {"doc_start": PACKED}, "documents_both_ways": {"doc_start": PACKED, "causal": False},
    "documents_of_one_token": {"doc_start": [[1] * 37]}, "document_of_the_row": {"doc_start": [[37]]},
    "documents_window": {"doc_start": PACKED, "window": 4},
    "documents_window_both_ways": {"doc_start": PACKED, "window": 4, "causal": False},
}


def options(name):
    given = {"causal": True, "window": None, "doc_start": None, **MASKS[name]}
    if given["doc_start"] is not None:
        given["doc_start"] = documents(given["doc_start"])
    return tuple(given.values())


def qkv(B=1, T=37, S=None, H=2, K=1, d=20, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, n, heads, d, generator=generator).to(DEVICE, dtype).requires_grad_()
            for n, heads in ((T, H), (S or T, K), (S or T, K))]


def sees(T, S, causal, window, doc_start, b, past=None):
    """The mask of one row, from the definition, query by query."""
    past = S - T if past is None else past
    starts = None if doc_start is None else doc_start[b].tolist()
    return torch.tensor([[(j <= i if causal else True) and (window is None or abs(i - j) < window)
                          and (starts is None or starts[i] == starts[j]) for j in range(S)]
                         for i in range(past, past + T)], dtype=torch.bool).view(T, S)


def naive(q, k, v, causal=True, window=None, doc_start=None, past=None):
    B, T, H, d = q.shape
    S, K = k.shape[1:3]
    if not q.numel():
        return q * 0 + 0 * (k.sum() + v.sum())
    k, v = (x.repeat_interleave(H // K, dim=2) for x in (k, v))
    mask = torch.stack([sees(T, S, causal, window, doc_start, b, past) for b in range(B)])[:, None].to(q.device)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / d**0.5
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def op(q, k, v, *rest):
    """The naive formula where compare() wants the truth."""
    return (naive if q.dtype == torch.float64 else attention)(q, k, v, *rest)


def check(inputs, kernel="triton", terms=64):
    """compare()'s rule; where a query sees one key, do_i v_j - delta_i cancels: roundings of 16 in fp32."""
    for i, error, bound in compare(op, inputs, terms, kernel=kernel):
        assert error <= bound + 2 * 16 * 2.0**-24, f"result {i}: {error:.2e}, allowed {bound:.2e}"


# ---- the kernels against the formula

@pytest.mark.parametrize("name", slow_except(
    ["causal", "both_ways", "window", "documents", "documents_window_both_ways"], MASKS, 1))
def test_masks(name):
    check([*qkv(), *options(name)])


@pytest.mark.parametrize("name", ["causal", "documents_window_both_ways"])
def test_half_precision(name):
    check([*qkv(dtype=DTYPES[1]), *options(name)])


@pytest.mark.parametrize("heads", slow_except(
    [(4, 2), (5, 1)], [(1, 1), (3, 3), (4, 2), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1), (8, 1)], 1))
def test_groups_of_heads(heads):
    check([*qkv(1, 19, None, *heads, d=8), True, None, documents([[10, 9]])])


@pytest.mark.parametrize("d", slow_except([1, 37, 80], [1, 16, 37, 64, 80, 96, 128, 256], 1))
def test_head_sizes(d):
    check([*qkv(1, 19, H=1, d=d, dtype=DTYPES[1]), True, None, documents([[7, 12]])])


@pytest.mark.parametrize(("name", "T", "past"), slow_except(
    [("causal", 14, 10), ("documents_window_both_ways", 14, 10), ("documents", 14, 10)],
    [("causal", 14, 10), ("documents", 14, 10), ("documents_both_ways", 14, 10), ("documents_window", 1, 20),
     ("documents_window_both_ways", 14, 10), ("window_both_ways", 19, 18), ("window", 19, 2), ("both_ways", 5, 0),
     ("documents", 14, 0), ("documents_both_ways", 9, 28)], 3))
def test_queries_among_the_keys(name, T, past):
    """The queries of one rank and all keys of a sequence that ranks share: keys stand before them and behind them."""
    check([*qkv(1, T, 37), *options(name), past])


def test_rows_of_a_batch():
    check([*qkv(2), True, None, documents([[37], [17, 20]])])


@pytest.mark.parametrize(("T", "window", "causal"), slow_except(
    [(1, None, True), (18, 6, False), (3, 6, True)],
    [(1, None, True), (1, None, False), (1, 6, False), (23, None, True), (18, 1, True), (18, 6, False),
     (18, 50, True), (3, 6, True)], 3))
def test_cache(T, window, causal):
    """The last query is aligned with the last key; keys that a window has left behind get a gradient of zero."""
    check([*qkv(1, T, 37), causal, window, None])


@pytest.mark.parametrize("name", slow_except(["documents"], ["causal", "documents"], 1))
def test_shipped_tiles(monkeypatch, name):
    monkeypatch.undo()
    starts = documents([[130, 3, 67]]) if name == "documents" else None
    check([*qkv(1, 200, H=1, d=64, dtype=DTYPES[1]), True, None, starts])


@pytest.mark.parametrize("shape", [(2, 0, 0), (0, 5, 5), (2, 0, 7)], ids=str)
def test_nothing(shape):
    B, T, S = shape
    q, k, v = qkv(B, T)[0], *qkv(B, S)[1:]
    with backend.using("triton"):
        (y, dq, dk, dv), _ = run(attention, [q, k, v, True, None, None])
    assert (y.shape, dq.shape, dk.shape, dv.shape) == (q.shape, q.shape, k.shape, v.shape)
    assert not dk.any()
    assert not dv.any()
    if T == S:
        check([q, k, v, True, None, torch.zeros(B, T, dtype=torch.int32, device=DEVICE)])


# ---- laws

@pytest.mark.parametrize("name", slow_except(
    ["documents_window_both_ways"], ["causal", "window_both_ways", "documents", "documents_window_both_ways"], 1))
def test_a_key_outside_the_interval_does_nothing(name):
    """Not to the output of the queries that do not see it, bit by bit, and it gets no gradient from them."""
    q, k, v = qkv()
    rest = options(name)
    j = 19       # in PACKED's rows: the last of a document of 3; in the middle of one
    with backend.using("triton"):
        y = attention(q, k, v, *rest)
        k2, v2 = (x.detach().clone() for x in (k, v))
        k2[:, j] += 3
        v2[:, j] -= 2
        other = attention(q, k2, v2, *rest)
    same = (y == other).flatten(2).all(-1)[0]                                            # [T]
    blind = ~sees(37, 37, *rest, 0)[:, j].to(DEVICE)
    assert torch.equal(same, blind)
    dk, dv = torch.autograd.grad(y, [k, v], blind[None, :, None, None].to(y.dtype).expand_as(y))
    assert not dk[:, j].any()
    assert not dv[:, j].any()


def test_documents_are_rows_of_their_own():
    lengths = [9, 1, 20, 7]
    q, k, v = (x.detach() for x in qkv())
    with backend.using("triton"):
        packed = attention(q, k, v, doc_start=documents([lengths]))
        parts = [attention(*part) for part in zip(*(x.split(lengths, dim=1) for x in (q, k, v)))]
        assert (packed - torch.cat(parts, dim=1)).abs().max() < 1e-6
        whole = attention(q, k, v, doc_start=documents([[37]]))
        assert torch.equal(whole, attention(q, k, v))
        ones = attention(q, k, v, doc_start=documents([[1] * 37]))
    assert torch.equal(ones, v.expand(-1, -1, 2, -1))


def test_two_runs_agree_bitwise_and_nothing_is_written_to():
    inputs = [*qkv(dtype=DTYPES[1]), *options("documents")]
    kept = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    with backend.using("triton"):
        first, upstream = run(attention, inputs)
        before = upstream[0].clone()
        second, _ = run(attention, inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert torch.equal(before, upstream[0])
    assert all(torch.equal(a, b) for a, b in zip(kept, inputs) if isinstance(a, torch.Tensor))


def test_strides():
    """q, k, v cut out of one product, transposed, with gaps in the last dimension; an expanded upstream gradient."""
    starts = documents(PACKED)
    fused = torch.randn(1, 37, 4 * 20, device=DEVICE)
    q, k, v = (x.unflatten(2, (-1, 20)).detach().requires_grad_() for x in fused.split([40, 20, 20], dim=2))
    assert not q.is_contiguous()
    check([q, k, v, True, None, starts])
    q = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    k = torch.stack([k, k], -1).detach().unbind(-1)[0].requires_grad_()
    inputs = [q, k, v, True, None, torch.stack([starts, starts], -1)[..., 0]]
    for shape in ((1,), (1, 1, 1, 20)):
        upstream = torch.randn(shape, device=DEVICE).expand(1, 37, 2, 20)
        with backend.using("triton"):
            ours, _ = run(attention, inputs, [upstream])
        plain, _ = run(naive, [x.detach().double().requires_grad_() for x in inputs[:3]] + inputs[3:],
                       [upstream.double()])
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(ours, plain))


def test_int64_doc_start():
    inputs = [*qkv(), *options("documents")[:2], documents(PACKED).long()]
    check(inputs)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's overflow check")
def test_offsets_do_not_overflow(monkeypatch):
    """Rows that lie 2^26 numbers apart: the 32nd begins past 2^31. All but the first are past T, and not read."""
    from triton.runtime import interpreter
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))

    def forward():
        q, k, v = (x.detach() for x in qkv(1, 1, H=1, K=1, d=16))
        o, lse = torch.empty_like(q), torch.empty(1, 1, 1)
        _, constants = flash.strides_and_constants(True, None, False, q=q, k=k, v=v)
        flash.forward_kernel[(1, 4, 1)](q, k, v, q, q, o, lse, 1, 1, 0, 0, 0, 0, 0, 0, 0, BLOCK_M=16, BLOCK_N=16,
                                        BLOCK_D=16, **constants | {"q_t": 2**26, "k_t": 16, "v_t": 16})
        return torch.equal(o, v)
    assert forward()

    @backend.jit
    def load_tile(P, stride, start, limit, SIZE, d, BLOCK_D):
        row, col = tl.arange(0, SIZE), tl.arange(0, BLOCK_D)
        mask = (start + row < limit)[:, None] & (col < d)[None, :]
        return tl.load(P + start * stride + row[:, None] * stride + col[None, :], mask=mask, other=0.0)

    import triton.language as tl
    globals()["tl"] = tl
    monkeypatch.setattr(flash, "load_tile", load_tile)
    with pytest.raises(Exception, match="overflow"):
        forward()


# ---- inside torch

def test_compile():
    inputs = [*qkv(), *options("documents")]
    with backend.using("triton"):
        plain, upstream = run(attention, inputs)
        torch._dynamo.reset()
        compiled, _ = run(torch.compile(attention, fullgraph=True, backend="aot_eager"), inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled))


def test_checkpoint_and_autocast():
    from torch.utils.checkpoint import checkpoint
    q, k, v = qkv()
    k = k.detach().to(DTYPES[1]).requires_grad_()           # as after a norm in fp32 and one in half precision
    rest = options("documents")

    def step(q, k, v):
        with torch.autocast(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float16):
            y = attention(q * 2, k, v, *rest)
        assert y.dtype == DTYPES[1]
        return y
    with backend.using("triton"):
        plain, upstream = run(step, [q, k, v])
        kept, _ = run(lambda *x: checkpoint(step, *x, use_reentrant=False), [q, k, v], upstream)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept))
    assert [x.dtype for x in plain[1:]] == [torch.float32, DTYPES[1], torch.float32]
    halves = [(q * 2).detach().to(DTYPES[1]).requires_grad_(), k, v.detach().to(DTYPES[1]).requires_grad_()]
    with backend.using("triton"):
        assert torch.equal(plain[0], attention(*halves, *rest))


def test_frozen_parts():
    """Gradients only for q, as with an adapter on q_proj alone."""
    q, k, v = qkv()
    with backend.using("triton"):
        (_, dq), upstream = run(attention, [q, k.detach(), v.detach(), True, None, None])
        (_, same, _, _), _ = run(attention, [q, k, v, True, None, None], upstream)
    assert torch.equal(dq, same)


# ---- the choice of a backend

def test_static_choice(monkeypatch):
    q, k, _ = (x.detach().half() for x in qkv(T=3, S=3))
    assert not runs_flash(q, k, True, None, None)
    monkeypatch.setattr(module, "use_triton", lambda x: x.dtype != torch.float64)
    long = torch.empty(1, 9, 1, 20, dtype=torch.half)
    starts = documents([[3]])
    assert not any(runs_flash(*given) for given in [
        (q, k, True, None, None), (q, k, False, None, None), (q[:, :1], long, True, None, None),
        (q, long, False, None, None), (q.double(), k, True, None, starts),
        (q.new_empty(1, 3, 2, 264), k, True, None, starts)])
    assert all(runs_flash(*given) for given in [
        (q, k, True, None, starts), (q, k, True, 2, None), (q, long, True, None, None)])
    with backend.using("triton"):
        assert runs_flash(q, k, True, None, None)
    with backend.using("reference"):
        monkeypatch.setattr(module, "use_triton", backend.use_triton)
        assert not runs_flash(q, k, True, None, starts)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.skipif(DEVICE == "cpu", reason="PyTorch's own kernels on CUDA")
def test_sdpa_on_cuda(mask):
    check([*qkv(d=64, dtype=torch.bfloat16), *options(mask)], kernel="reference")


def test_hopper_asks_cudnn_first(monkeypatch):
    """Only for whole rows of a multiple of 128 tokens; the order is restored afterwards."""
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
    order, seen = _cur_sdpa_kernel_backends(with_priority=True), []
    monkeypatch.setattr(module, "_sdpa", lambda *x: seen.append(_cur_sdpa_kernel_backends(with_priority=True)))
    monkeypatch.setattr(backend, "architecture", lambda device: 90)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for T, S in ((128, 128), (127, 127), (128, 256)):
        module.sdpa(*(x.detach() for x in qkv(1, T, S, d=16)), False, None, None, 0)
    assert seen[0][0] == SDPBackend.CUDNN_ATTENTION
    assert seen[1] == seen[2] == _cur_sdpa_kernel_backends(with_priority=True) == order


def test_users_mistakes():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="multiple of key-value heads"):
        attention(q, *(x.expand(-1, -1, 3, -1) for x in (k, v)))
    with pytest.raises(ValueError, match="as many as queries"):
        attention(q, k[:, :30], v[:, :30])
    with pytest.raises(ValueError, match="of each key's position"):
        attention(q[:, :30], k, v, doc_start=documents([[30]]))
    with pytest.raises(ValueError, match="8 keys before the queries"):
        attention(q[:, :30], k, v, past=8)
    with pytest.raises(ValueError, match="one dtype"):
        attention(q, k.half(), v)


def test_arguments_that_do_not_fit():
    q, k, v = qkv(B=2, T=7)
    start = torch.zeros(2, 7, dtype=torch.int32, device=DEVICE)
    for change, word in (({"v": v[:, :5]}, "v"), ({"v": v[..., :4]}, "v"), ({"k": k[:1]}, "k"),
                         ({"window": 0}, "window"), ({"window": -3}, "window"), ({"doc_start": start[:1]}, "doc_start"),
                         ({"doc_start": start[:, :3]}, "doc_start")):
        with pytest.raises(ValueError, match=word):
            attention(**{"q": q, "k": k, "v": v, **change})
