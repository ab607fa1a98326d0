"""Flash attention in Triton over one contiguous interval of keys per query (attention.py says why that is enough).

    s_ij = q_i k_j / sqrt(d)            p_ij = exp(s_ij - logsumexp_j s_ij)              o_i = sum_j p_ij v_j
    dv_j = sum_i p_ij do_i              ds_ij = p_ij (do_i v_j - delta_i)                delta_i = sum(o_i do_i)
    dq_i = sum_j ds_ij k_j / sqrt(d)    dk_j = sum_i ds_ij q_i / sqrt(d)                 (Dao, 2023, arXiv 2307.08691)

Both ends of a query's interval only grow with its position, so a tile of queries needs nothing but the intervals of its
first and its last query: keys before `lo` and after `hi` are never read, and key tiles within `full_lo` and `full_hi`,
which every query of the tile sees, skip the mask. The same holds the other way round, for the queries of some keys:

    below(x) = max(start of x's document, x - window + 1)     above(x) = min(end of x's document - 1, x + window - 1)
    query i sees the keys from below(i) to i if causal, else to above(i)
    key j is seen by the queries from j if causal, else from below(j), to above(j)

    Example: documents of 3 and 5 tokens, causal, tiles of 4 queries and 2 keys. Queries 0 to 3 see keys 0..0, 0..1,
    0..2, 3..3, so lo = 0 and hi = 3: key tiles 0-1 and 2-3 are read, both with the mask. Queries 4 to 7 see 3..4 to
    3..7: lo = 3, so the first tile read is 2-3; tile 4-5 is masked too, as query 4 does not see key 5.

Forward, a program keeps a tile of queries of one head. Backward, one kernel keeps a tile of keys of one key-value head
and walks over the queries of all its query heads, another keeps a tile of queries: each result has one program that
sums it in a fixed order, so two runs agree bitwise and no atomics are needed. That takes seven matmuls, where a
backward pass with atomics takes five. Kept for it are q, k, v, o and, in fp32 for each query and head, the logarithm of
the softmax's denominator. Logarithms and exponentials are to the base 2, which the hardware has.

B sequences, T queries, S keys, H query heads, K key-value heads, GROUP = H / K, d head size. Arguments of the kernels:

    Q, DO, O, DQ        [B, T, H, d]            q_b, q_h, q_t: elements between sequences, heads and positions of Q
    K, V, DK, DV        [B, S, K, d]            k_b, k_h, k_t and v_b, v_h, v_t: the same of K and V; do_... of DO
    START, END          [B, S] int32            where each position's document starts and ends; unused without DOCS
    past                                        query i is at position past + i
    LSE, DELTA          [B, H, T] fp32
    SCALE               log2(e) / sqrt(d)
    WINDOW              in tokens, 0 for none
    BLOCK_M, BLOCK_N    queries and keys of a tile; BLOCK_D is d, rounded up to a power of two
"""

import math

import torch

from kernels.backend import contiguous_heads, jit, launch, op, power_of_two, table, tl

# (queries, keys, warps, stages) of a program, by architecture and padded head size; "fp32" for inputs of 4 bytes.
FORWARD = {
    80: {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2), "fp32": (32, 32, 8, 1)},
    90: {64: (128, 128, 8, 3), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2), "fp32": (32, 32, 8, 1)},
    100: {64: (128, 128, 8, 3), 128: (128, 128, 8, 2), 256: (128, 32, 8, 2), "fp32": (32, 32, 8, 1)},
}
DQ = {
    80: {64: (128, 64, 8, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2), "fp32": (16, 16, 8, 1)},
    90: {64: (128, 128, 8, 3), 128: (128, 128, 8, 2), 256: (128, 32, 8, 2), "fp32": (16, 16, 8, 1)},
    100: {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2), "fp32": (16, 16, 8, 1)},
}
DKDV = {
    80: {64: (64, 128, 8, 2), 128: (64, 64, 8, 2), 256: (32, 64, 8, 1), "fp32": (32, 32, 8, 1)},
    90: {64: (64, 128, 8, 3), 128: (64, 128, 8, 2), 256: (32, 64, 8, 2), "fp32": (32, 32, 8, 1)},
    100: {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (64, 64, 8, 1), "fp32": (32, 32, 8, 1)},
}


@jit
def interval(x, START, END, S, CAUSAL: tl.constexpr, DOCS: tl.constexpr, WINDOW: tl.constexpr, KEYS: tl.constexpr):
    """KEYS: the first and last key of the query at position x; else the first and last position that sees key x."""
    if DOCS:
        below = tl.load(START + x)
        above = tl.load(END + x) - 1
    else:
        below = x * 0
        above = x * 0 + S - 1
    if WINDOW > 0:
        below = tl.maximum(below, x - WINDOW + 1)
        above = tl.minimum(above, x + WINDOW - 1)
    if CAUSAL and KEYS:
        above = x
    if CAUSAL and not KEYS:
        below = x
    return below, above


@jit
def load_tile(P, stride, start, limit, SIZE: tl.constexpr, d: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of P, `stride` elements apart, from `start` on: [SIZE, BLOCK_D], zeros from row `limit` and column d on."""
    row, col = tl.arange(0, SIZE), tl.arange(0, BLOCK_D)
    at = P + tl.cast(start, tl.int64) * stride + row[:, None] * stride + col[None, :]
    mask = (start + row < limit)[:, None]
    if d < BLOCK_D:
        mask = mask & (col < d)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@jit
def forward_kernel(Q, K, V, START, END, O, LSE, T, S, past, q_b, q_h, k_b, k_h, v_b, v_h, q_t: tl.constexpr,
                   k_t: tl.constexpr, v_t: tl.constexpr, GROUP: tl.constexpr, d: tl.constexpr, SCALE: tl.constexpr,
                   CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCS: tl.constexpr, PRECISION: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid: query heads, tiles of queries (the last first: when causal it takes longest), sequences."""
    head, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(0)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    Q += b * q_b + head.to(tl.int64) * q_h
    K += b * k_b + (head // GROUP).to(tl.int64) * k_h
    V += b * v_b + (head // GROUP).to(tl.int64) * v_h
    START += b * S
    END += b * S

    i = start + tl.arange(0, BLOCK_M)
    first, last = interval(tl.minimum(i, T - 1) + past, START, END, S, CAUSAL, DOCS, WINDOW, KEYS=True)
    lo, full_hi = interval(start + past, START, END, S, CAUSAL, DOCS, WINDOW, KEYS=True)
    full_lo, hi = interval(tl.minimum(start + BLOCK_M, T) - 1 + past, START, END, S, CAUSAL, DOCS, WINDOW, KEYS=True)

    q = load_tile(Q, q_t, start, T, BLOCK_M, d, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # Not -inf: in a tile where a query sees no key, -inf - -inf would be NaN.
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    for j in range(lo // BLOCK_N * BLOCK_N, hi + 1, BLOCK_N):
        k = load_tile(K, k_t, j, S, BLOCK_N, d, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if (j < full_lo) | (j + BLOCK_N - 1 > full_hi):
            key = (j + tl.arange(0, BLOCK_N))[None, :]
            s = tl.where((key >= first[:, None]) & (key <= last[:, None]), s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1) * SCALE)
        p = tl.exp2(s * SCALE - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        v = load_tile(V, v_t, j, S, BLOCK_N, d, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new

    col = tl.arange(0, BLOCK_D)
    at = ((b * T + start) * H + head) * d + tl.arange(0, BLOCK_M)[:, None] * (H * d) + col[None, :]
    tl.store(O + at, acc / total[:, None], mask=(i < T)[:, None] & (col < d)[None, :])
    tl.store(LSE + (b * H + head) * T + i, top + tl.log2(total), mask=i < T)


@jit
def delta_kernel(O, DO, DELTA, T, do_b, do_h, do_t: tl.constexpr, d: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_D: tl.constexpr):
    """DELTA = sum over the head's elements of O * DO. Grid: query heads, tiles of queries, sequences."""
    head, b, start = tl.program_id(0), tl.program_id(2).to(tl.int64), tl.program_id(1) * BLOCK_M
    H = tl.num_programs(0)
    o = load_tile(O + (b * T * H + head) * d, H * d, start, T, BLOCK_M, d, BLOCK_D).to(tl.float32)
    do = load_tile(DO + b * do_b + head.to(tl.int64) * do_h, do_t, start, T, BLOCK_M, d, BLOCK_D).to(tl.float32)
    i = start + tl.arange(0, BLOCK_M)
    tl.store(DELTA + (b * H + head) * T + i, tl.sum(o * do, 1), mask=i < T)


@jit
def dkdv_kernel(Q, K, V, START, END, DO, LSE, DELTA, DK, DV, T, S, past, q_b, q_h, k_b, k_h, v_b, v_h, do_b, do_h,
                q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr, do_t: tl.constexpr, GROUP: tl.constexpr,
                d: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCS: tl.constexpr,
                PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid: key-value heads, tiles of keys (the first first: when causal it takes longest), sequences."""
    kv, b, start = tl.program_id(0), tl.program_id(2).to(tl.int64), tl.program_id(1) * BLOCK_N
    heads = tl.num_programs(0)
    K += b * k_b + kv.to(tl.int64) * k_h
    V += b * v_b + kv.to(tl.int64) * v_h
    START += b * S
    END += b * S

    j = start + tl.arange(0, BLOCK_N)
    first, last = interval(tl.minimum(j, S - 1), START, END, S, CAUSAL, DOCS, WINDOW, KEYS=False)
    first -= past
    last -= past
    lo, full_hi = interval(start, START, END, S, CAUSAL, DOCS, WINDOW, KEYS=False)
    full_lo, hi = interval(tl.minimum(start + BLOCK_N, S) - 1, START, END, S, CAUSAL, DOCS, WINDOW, KEYS=False)
    lo = tl.maximum(lo - past, 0) // BLOCK_M * BLOCK_M

    k = load_tile(K, k_t, start, S, BLOCK_N, d, BLOCK_D)
    v = load_tile(V, v_t, start, S, BLOCK_N, d, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    hi = tl.minimum(hi - past + 1, T)
    m = lo
    head = kv * GROUP
    # The query heads of the group one after the other, each from lo to hi.
    for _ in range(0, GROUP * tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_M)):
        i = m + tl.arange(0, BLOCK_M)
        row = (b * heads * GROUP + head) * T
        q = load_tile(Q + b * q_b + tl.cast(head, tl.int64) * q_h, q_t, m, T, BLOCK_M, d, BLOCK_D)
        lse = tl.load(LSE + row + i, mask=i < T, other=0.0)[None, :]
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * SCALE - lse)           # [keys, queries]
        if (m < full_lo - past) | (m + BLOCK_M - 1 > full_hi - past):
            p = tl.where((i[None, :] >= first[:, None]) & (i[None, :] <= last[:, None]), p, 0.0)
        do = load_tile(DO + b * do_b + tl.cast(head, tl.int64) * do_h, do_t, m, T, BLOCK_M, d, BLOCK_D)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        delta = tl.load(DELTA + row + i, mask=i < T, other=0.0)[None, :]
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        m += BLOCK_M
        head += (m >= hi).to(tl.int32)
        m = tl.where(m >= hi, lo, m)

    col = tl.arange(0, BLOCK_D)
    mask = (j < S)[:, None] & (col < d)[None, :]
    at = ((b * S + start) * heads + kv) * d + tl.arange(0, BLOCK_N)[:, None] * (heads * d) + col[None, :]
    tl.store(DK + at, dk * (SCALE * 0.6931471805599453), mask=mask)           # SCALE holds log2(e)
    tl.store(DV + at, dv, mask=mask)


@jit
def dq_kernel(Q, K, V, START, END, DO, LSE, DELTA, DQ, T, S, past, q_b, q_h, k_b, k_h, v_b, v_h, do_b, do_h,
              q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr, do_t: tl.constexpr, GROUP: tl.constexpr,
              d: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCS: tl.constexpr,
              PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The grid of forward_kernel and its walk over the keys."""
    head, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(0)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    K += b * k_b + (head // GROUP).to(tl.int64) * k_h
    V += b * v_b + (head // GROUP).to(tl.int64) * v_h
    START += b * S
    END += b * S

    i = start + tl.arange(0, BLOCK_M)
    first, last = interval(tl.minimum(i, T - 1) + past, START, END, S, CAUSAL, DOCS, WINDOW, KEYS=True)
    lo, full_hi = interval(start + past, START, END, S, CAUSAL, DOCS, WINDOW, KEYS=True)
    full_lo, hi = interval(tl.minimum(start + BLOCK_M, T) - 1 + past, START, END, S, CAUSAL, DOCS, WINDOW, KEYS=True)

    q = load_tile(Q + b * q_b + head.to(tl.int64) * q_h, q_t, start, T, BLOCK_M, d, BLOCK_D)
    do = load_tile(DO + b * do_b + head.to(tl.int64) * do_h, do_t, start, T, BLOCK_M, d, BLOCK_D)
    lse = tl.load(LSE + (b * H + head) * T + i, mask=i < T, other=0.0)
    delta = tl.load(DELTA + (b * H + head) * T + i, mask=i < T, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in range(lo // BLOCK_N * BLOCK_N, hi + 1, BLOCK_N):
        k = load_tile(K, k_t, j, S, BLOCK_N, d, BLOCK_D)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE - lse[:, None])
        if (j < full_lo) | (j + BLOCK_N - 1 > full_hi):
            key = (j + tl.arange(0, BLOCK_N))[None, :]
            p = tl.where((key >= first[:, None]) & (key <= last[:, None]), p, 0.0)
        v = load_tile(V, v_t, j, S, BLOCK_N, d, BLOCK_D)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    col = tl.arange(0, BLOCK_D)
    at = ((b * T + start) * H + head) * d + tl.arange(0, BLOCK_M)[:, None] * (H * d) + col[None, :]
    tl.store(DQ + at, dq * (SCALE * 0.6931471805599453), mask=(i < T)[:, None] & (col < d)[None, :])


def tile_options(by_architecture, q) -> dict:
    """The launch options of a program's tile for q's device, dtype and head size."""
    block = max(16, power_of_two(q.shape[-1]))
    m, n, warps, stages = table(by_architecture, q.device)["fp32" if q.dtype == torch.float32 else max(64, block)]
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": block, "num_warps": warps, "num_stages": stages}


def strides_and_constants(causal, window, docs, **tensors) -> tuple[list, dict]:
    """[q_b, q_h, k_b, k_h, ...] of tensors q, k, ..., and {"q_t": q_t, "k_t": k_t, ...} with all else that a kernel is
    compiled for."""
    q, k = tensors["q"], tensors["k"]
    d, tf32 = q.shape[-1], q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return [x.stride(dim) for x in tensors.values() for dim in (0, 2)], {
        **{f"{name}_t": x.stride(1) for name, x in tensors.items()}, "GROUP": q.shape[2] // max(1, k.shape[2]), "d": d,
        "SCALE": math.log2(math.e) / math.sqrt(d), "CAUSAL": causal, "WINDOW": window or 0, "DOCS": docs,
        "PRECISION": "tf32" if tf32 else "ieee"}


@op
def flash_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc_start: torch.Tensor | None, causal: bool,
                  window: int | None, past: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> o [B, T, H, d], log2-sum-exp2 [B, H, T] fp32, doc_end [B, S] int32 (empty without documents).

    q, k, v with their last dimension contiguous; doc_start [B, S] int32, contiguous.
    """
    (B, T, H, _), S = q.shape, k.shape[1]
    docs = doc_start is not None
    # doc_start is sorted along S, so the entries that are not above a position's own value end where its document does:
    # 0 0 0 3 3 -> 3 3 3 5 5.
    end = torch.searchsorted(doc_start, doc_start, right=True, out_int32=True) if docs else q.new_empty(0)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    size, (strides, constants) = tile_options(FORWARD, q), strides_and_constants(causal, window, docs, q=q, k=k, v=v)
    launch(forward_kernel, (H, -(-T // size["BLOCK_M"]), B), q, k, v, doc_start if docs else q, end, o, lse, T, S, past,
           *strides, **constants, **size)
    return o, lse, end


@op
def flash_backward(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor,
                   lse: torch.Tensor, doc_start: torch.Tensor | None, doc_end: torch.Tensor, causal: bool,
                   window: int | None, past: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """do as q; o, lse and doc_end of flash_forward -> dq, dk, dv, contiguous."""
    (B, T, H, d), (S, K) = q.shape, k.shape[1:3]
    docs = doc_start is not None
    delta = torch.empty_like(lse)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    launch(delta_kernel, (H, -(-T // 64), B), o, do, delta, T, do.stride(0), do.stride(2), do_t=do.stride(1), d=d,
           BLOCK_M=64, BLOCK_D=max(16, power_of_two(d)), num_warps=8 if d > 64 else 4)
    given = (q, k, v, doc_start if docs else q, doc_end, do, lse, delta)
    strides, constants = strides_and_constants(causal, window, docs, q=q, k=k, v=v, do=do)
    size = tile_options(DKDV, q)
    launch(dkdv_kernel, (K, -(-S // size["BLOCK_N"]), B), *given, dk, dv, T, S, past, *strides, **constants, **size)
    size = tile_options(DQ, q)
    launch(dq_kernel, (H, -(-T // size["BLOCK_M"]), B), *given, dq, T, S, past, *strides, **constants, **size)
    return dq, dk, dv


class Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, window, doc_start, past):
        q, k, v = contiguous_heads(q), contiguous_heads(k), contiguous_heads(v)
        if doc_start is not None:
            doc_start = doc_start.to(torch.int32).contiguous()
        o, lse, doc_end = flash_forward(q, k, v, doc_start, causal, window, past)
        ctx.save_for_backward(q, k, v, o, lse, doc_start, doc_end)
        ctx.options = causal, window, past
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse, doc_start, doc_end = ctx.saved_tensors
        gradients = flash_backward(contiguous_heads(do), q, k, v, o, lse, doc_start, doc_end, *ctx.options)
        return *gradients, None, None, None, None
