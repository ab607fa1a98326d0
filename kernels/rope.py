"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864), half-split as in Hugging Face's checkpoints, alone and
behind the norm of each head that Qwen3 has (arXiv 2505.09388).

x = [a, b] is a head, a and b the halves of its d elements; each of the d / 2 pairs (a_i, b_i) has an angle:
    y = [a cos - b sin,  b cos + a sin]             backward: the same rotation by the negative angle

    Example: d = 2 and an angle of 90 degrees turn (1, 0) into (0, 1).

Positions, scaled frequencies and YaRN's amplitude are all in cos and sin.

    qk_norm_rope: y = rotate(w x / rms), rms = sqrt(mean(x^2) + eps), the mean over the d elements of the head
    g = rotate back(dy)     xhat = x / rms     dx = (w g - xhat mean(w g xhat)) / rms     dw = sum of g xhat

B sequences, T tokens, H query heads, K key-value heads, d head size. Only the inputs are kept: rms is computed anew.
With n bytes per element, an ideal device moves per token 2 (H + K) d n forward, as many backward for rope and
3 (H + K) d n for qk_norm_rope, and each time 4 d for cos and sin (fp32).

One launch takes q and k. A row is a head of a token, and a program takes a tile of rows of q or of k, however many
heads a token has: no lanes are idle, and q and k load the same vectors of 16 bytes. The program of k stands right
behind those of q for the same tokens, so that cos and sin are read from memory once. A program loads everything before
it stores: no load waits behind a store that might change it. Backward through the norm, dw is summed as in rmsnorm.py.
"""

import torch

from kernels.backend import contiguous_heads, jit, launch, multiprocessors, op, power_of_two, tl, use_triton
from kernels.rmsnorm import rmsnorm, upcast

# Pairs and warps of a tile: 8 pairs per thread, so that each half is a load of 16 bytes in bf16.
PAIRS, WARPS = 2048, 8
# Backward through the norm: programs per multiprocessor, and the registers per thread that allow so many.
RESIDENT, REGISTERS = 3, 80


# ---- reference

def rotate(x, cos, sin):
    """Turn x [B, T, H, d] by the angles whose cosine and sine are [B or 1, T, d / 2]."""
    cos, sin, upcast_x = cos.unsqueeze(2), sin.unsqueeze(2), upcast(x)
    a, b = upcast_x.chunk(2, dim=-1)
    if torch.compiler.is_compiling():
        # The compiler fuses this by itself; views that are written to only hinder it.
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    y = upcast_x * torch.cat([cos, cos], -1)
    ya, yb = y.chunk(2, dim=-1)
    ya.addcmul_(b, sin, value=-1)
    yb.addcmul_(a, sin)
    return y.to(x.dtype)


# ---- Triton
# A tile is ROWS rows, all of q or all of k. Each row loads its angles and weights itself, nearly always from the cache:
# handing them on between threads would take barriers.
#
#   Q, YQ, DYQ, DQ [B, T, H, SIZE]     qb, qt, qh: elements between sequences, tokens and heads of Q; dqb, ...: of DYQ
#   K, YK, DYK, DK [B, T, KH, SIZE]    kb, kt, kh: the same of K; dkb, ...: of DYK
#   WQ, WK [SIZE], DW [programs, SIZE]    COS, SIN [B or 1, T, HALF], cb: elements between their sequences, or 0
#   N = B T tokens, H heads, KH key-value heads, SIZE = d, HALF = d / 2, BLOCK the power of two from HALF on

@jit
def share(N, H: tl.constexpr, KH: tl.constexpr, RATIO: tl.constexpr, ROWS: tl.constexpr):
    """RATIO programs take q, the next one k -> whether this one takes k, its first row, the step to its next tile, and
    the end of the rows."""
    team, part = tl.program_id(0) // (RATIO + 1), tl.program_id(0) % (RATIO + 1)
    is_k, step = part == RATIO, tl.num_programs(0) // (RATIO + 1) * ROWS
    return (is_k, tl.where(is_k, team, team * RATIO + part) * ROWS, tl.where(is_k, step, step * RATIO),
            N * tl.where(is_k, KH, H))


@jit
def rows_of(first, is_k, T, H: tl.constexpr, KH: tl.constexpr, ROWS: tl.constexpr):
    """-> number, sequence, position and head of each row, [ROWS, 1] int64. Divisions by the constants are cheap."""
    row = first + tl.arange(0, ROWS)[:, None]
    token = tl.where(is_k, row // KH, row // H)
    head = row - token * tl.where(is_k, KH, H)
    sequence = token // T
    return row.to(tl.int64), sequence.to(tl.int64), (token - sequence * T).to(tl.int64), head.to(tl.int64)


@jit
def forward_kernel(Q, K, WQ, WK, YQ, YK, COS, SIN, N, T, cb, qb, qt, qh, kb, kt, kh, eps, NORM: tl.constexpr,
                   INVERSE: tl.constexpr, H: tl.constexpr, KH: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
                   RATIO: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    is_k, first, _, end = share(N, H, KH, RATIO, ROWS)
    X, Y = tl.where(is_k, K, Q), tl.where(is_k, YK, YQ)
    row, b, t, h = rows_of(first, is_k, T, H, KH, ROWS)
    real, y_at = row < end, row * SIZE
    x_at = b * tl.where(is_k, kb, qb) + t * tl.where(is_k, kt, qt) + h * tl.where(is_k, kh, qh)
    col = tl.arange(0, BLOCK)[None, :]
    mask = real & (col < HALF)
    cos = tl.load(COS + (b * cb + t * HALF + col), mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(SIN + (b * cb + t * HALF + col), mask=mask, other=0.0).to(tl.float32)
    x1 = tl.load(X + x_at + col, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(X + x_at + HALF + col, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        W = tl.where(is_k, WK, WQ)
        rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / SIZE + eps)[:, None]
        w_at = tl.broadcast_to(col, [ROWS, BLOCK])
        x1 *= rstd * tl.load(W + w_at, mask=w_at < HALF, other=0.0).to(tl.float32)
        x2 *= rstd * tl.load(W + HALF + w_at, mask=w_at < HALF, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    tl.store(Y + y_at + col, x1 * cos - x2 * sin, mask=mask)
    tl.store(Y + y_at + HALF + col, x2 * cos + x1 * sin, mask=mask)


@jit
def backward_kernel(DYQ, DYK, Q, K, WQ, WK, DQ, DK, DW, COS, SIN, N, T, cb, dqb, dqt, dqh, dkb, dkt, dkh,
                    qb, qt, qh, kb, kt, kh, eps, WANT_DW: tl.constexpr, H: tl.constexpr, KH: tl.constexpr,
                    SIZE: tl.constexpr, HALF: tl.constexpr, RATIO: tl.constexpr, ROWS: tl.constexpr,
                    BLOCK: tl.constexpr):
    """Each of a fixed number of programs strides over the tiles and keeps its share of dw in registers."""
    is_k, first, step, end = share(N, H, KH, RATIO, ROWS)
    DY, X, W, DX = tl.where(is_k, DYK, DYQ), tl.where(is_k, K, Q), tl.where(is_k, WK, WQ), tl.where(is_k, DK, DQ)
    sb, st, sh = tl.where(is_k, dkb, dqb), tl.where(is_k, dkt, dqt), tl.where(is_k, dkh, dqh)
    xb, xt, xh = tl.where(is_k, kb, qb), tl.where(is_k, kt, qt), tl.where(is_k, kh, qh)
    col = tl.arange(0, BLOCK)[None, :]
    w_at = tl.broadcast_to(col, [ROWS, BLOCK])
    w1 = tl.load(W + w_at, mask=w_at < HALF, other=0.0).to(tl.float32)
    w2 = tl.load(W + HALF + w_at, mask=w_at < HALF, other=0.0).to(tl.float32)
    dw1 = tl.zeros([ROWS, BLOCK], tl.float32)
    dw2 = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(first, end, step):
        row, b, t, h = rows_of(tile, is_k, T, H, KH, ROWS)
        real, dx_at = row < end, row * SIZE
        dy_at, x_at = b * sb + t * st + h * sh, b * xb + t * xt + h * xh
        mask = real & (col < HALF)
        cos = tl.load(COS + (b * cb + t * HALF + col), mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(SIN + (b * cb + t * HALF + col), mask=mask, other=0.0).to(tl.float32)
        x1 = tl.load(X + x_at + col, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(X + x_at + HALF + col, mask=mask, other=0.0).to(tl.float32)
        dy1 = tl.load(DY + dy_at + col, mask=mask, other=0.0).to(tl.float32)
        dy2 = tl.load(DY + dy_at + HALF + col, mask=mask, other=0.0).to(tl.float32)
        g1 = dy1 * cos + dy2 * sin
        g2 = dy2 * cos - dy1 * sin
        square = tl.sum(x1 * x1 + x2 * x2, 1)
        along = tl.sum(g1 * x1 * w1 + g2 * x2 * w2, 1)
        rstd = tl.rsqrt(square / SIZE + eps)
        # The mean of w g xhat.
        mean = (along * rstd / SIZE)[:, None]
        rstd = rstd[:, None]
        x1 *= rstd
        x2 *= rstd
        if WANT_DW:
            dw1 += g1 * x1
            dw2 += g2 * x2
        tl.store(DX + dx_at + col, rstd * (w1 * g1 - x1 * mean), mask=mask)
        tl.store(DX + dx_at + HALF + col, rstd * (w2 * g2 - x2 * mean), mask=mask)
    if WANT_DW:
        DW += tl.program_id(0) * SIZE
        tl.store(DW + col, tl.sum(dw1, 0)[None, :], mask=col < HALF)
        tl.store(DW + HALF + col, tl.sum(dw2, 0)[None, :], mask=col < HALF)


def tiling(q, k) -> dict:
    H, KH, d = q.shape[2], k.shape[2], q.shape[-1]
    block = power_of_two(d // 2)
    return {"H": H, "KH": KH, "SIZE": d, "HALF": d // 2, "RATIO": max(1, H // max(1, KH)),
            "ROWS": max(1, PAIRS // block), "BLOCK": block, "num_warps": WARPS}


def count_teams(q, tiles) -> int:
    """How many teams (RATIO programs of q and one of k) cover all rows with one tile per program."""
    rows_per_token = max(-(-tiles["H"] // tiles["RATIO"]), tiles["KH"])
    return -(-q.shape[0] * q.shape[1] * rows_per_token // tiles["ROWS"]) if q.shape[-1] else 0


def places(cos, *inputs):
    """The kernels' arguments that say where elements lie: N, T, cb, and the three strides of each input."""
    B, T = inputs[0].shape[:2]
    return B * T, T, cos.stride(0) if cos.shape[0] > 1 else 0, *[s for x in inputs for s in x.stride()[:3]]


@op
def rope_turn(q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
              cos: torch.Tensor, sin: torch.Tensor, eps: float,
              inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """-> q, k normalised if there are weights, then rotated; contiguous. cos and sin are contiguous."""
    yq, yk = q.new_empty(q.shape), k.new_empty(k.shape)
    tiles = tiling(q, k)
    launch(forward_kernel, (count_teams(q, tiles) * (tiles["RATIO"] + 1),), q, k, q_weight, k_weight, yq, yk, cos, sin,
           *places(cos, q, k), eps, NORM=q_weight is not None, INVERSE=inverse, **tiles)
    return yq, yk


@op
def qk_norm_rope_backward(dyq: torch.Tensor, dyk: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
                          q_weight: torch.Tensor, k_weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                          eps: float, want_dw: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> dq, dk and the two weights' gradients (empty if not wanted)."""
    dq, dk, d = q.new_empty(q.shape), k.new_empty(k.shape), q.shape[-1]
    tiles = tiling(q, k)
    ratio = tiles["RATIO"]
    used = min(count_teams(q, tiles), max(1, RESIDENT * multiprocessors(q.device) // (ratio + 1)))
    dw = torch.empty(used if want_dw else 0, ratio + 1, d, dtype=torch.float32, device=q.device)
    launch(backward_kernel, (used * (ratio + 1),), dyq, dyk, q, k, q_weight, k_weight, dq, dk, dw, cos, sin,
           *places(cos, dyq, dyk, q, k), eps, WANT_DW=want_dw, **tiles, maxnreg=REGISTERS)
    if not want_dw:
        return dq, dk, q.new_empty(0), q.new_empty(0)
    return dq, dk, dw[:, :ratio].sum((0, 1)).to(q_weight.dtype), dw[:, ratio].sum(0).to(k_weight.dtype)


class RoPE(torch.autograd.Function):
    """(q, k, both weights or None, cos, sin, eps) -> q, k. Without a norm, only the angles are kept for backward.
    The reference knows no norm: qk_norm_rope applies rmsnorm before it."""

    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, eps):
        ctx.triton, ctx.norm, ctx.eps = use_triton(q), q_weight is not None, eps
        q, k, cos, sin = contiguous_heads(q), contiguous_heads(k), cos.contiguous(), sin.contiguous()
        if ctx.norm:
            q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
        ctx.save_for_backward(*((q, k, q_weight, k_weight) if ctx.norm else ()), cos, sin)
        if ctx.triton:
            return rope_turn(q, k, q_weight, k_weight, cos, sin, eps, False)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):
        dq, dk, saved = contiguous_heads(dq), contiguous_heads(dk), ctx.saved_tensors
        cos, sin = saved[-2:]
        if not ctx.triton:
            return rotate(dq, cos, -sin), rotate(dk, cos, -sin), *[None] * 5
        if not ctx.norm:
            return *rope_turn(dq, dk, None, None, cos, sin, 0.0, True), *[None] * 5
        want = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        dq, dk, dwq, dwk = qk_norm_rope_backward(dq, dk, *saved, ctx.eps, want)
        return dq, dk, dwq if want else None, dwk if want else None, None, None, None


# ---- public ops

def check_shapes(q, k, cos, sin):
    """ValueError where the kernels would read past the end of the angles or of k."""
    B, T, _, d = q.shape
    if (*k.shape[:2], k.shape[3], k.dtype) != (B, T, d, q.dtype):
        raise ValueError(f"q is {tuple(q.shape)} {q.dtype} and k {tuple(k.shape)} {k.dtype}; only how many heads "
                         "they have may differ")
    if cos.shape != sin.shape or cos.shape[0] not in (1, B) or cos.shape[1:] != (T, d / 2):
        raise ValueError(f"cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}; for q {tuple(q.shape)} both must be "
                         f"[1 or {B}, {T}, {d / 2:g}]")


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
    """Rotate queries q [B, T, H, d] and keys k [B, T, K, d] by the angles whose cosine and sine are given.

    cos, sin [B or 1, T, d / 2], fp32 constants -> q, k rotated, contiguous. ValueError where shapes or the dtypes of q
    and k do not fit.
    """
    check_shapes(q, k, cos, sin)
    return RoPE.apply(q, k, None, None, cos, sin, 0.0)


def qk_norm_rope(q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor,
                 cos: torch.Tensor, sin: torch.Tensor, eps: float):
    """rope(rmsnorm(q, q_weight, eps), rmsnorm(k, k_weight, eps), cos, sin); weights [d], the rest as for rope."""
    check_shapes(q, k, cos, sin)
    if q_weight.shape != q.shape[-1:] or k_weight.shape != q.shape[-1:] or q_weight.dtype != k_weight.dtype:
        raise ValueError(f"the weights are {tuple(q_weight.shape)} {q_weight.dtype} and {tuple(k_weight.shape)} "
                         f"{k_weight.dtype}; both must be [{q.shape[-1]}] of one dtype")
    if use_triton(q):
        return RoPE.apply(q, k, q_weight, k_weight, cos, sin, eps)
    return rope(rmsnorm(q, q_weight, eps), rmsnorm(k, k_weight, eps), cos, sin)
