"""A matmul per expert, of the tokens that the router sent to it (Mixtral: Jiang et al., 2024, arXiv 2401.04088).

    rows of expert e: offsets[e - 1] <= n < offsets[e]
    y[n] = W[e] x[n]          dx[n] = W[e]^T dy[n]          dW[e] = sum over the expert's rows of dy[n] x[n]^T

    Example: offsets 2, 2, 5 give rows 0 and 1 to expert 0, none to expert 1, rows 2 to 4 to expert 2.

N rows (a token has one for each expert that it goes to), D model width, F MLP width, E experts: x [N, D], y [N, F],
W [E, F, D], offsets [E]. Each of the three matmuls takes 2 N D F operations, and an ideal device moves N D + E F D +
N F elements for it: the time is the tensor cores' arithmetic. The offsets stay on the device; no host waits for them.

y and dx: rows are cut into tiles that belong to one expert. There are at most N / tile + E of them, so that many are
launched; each finds its expert from the offsets, and those beyond the end do nothing. Tiles of the same columns and of
neighbouring rows run at the same time and share W in the cache. dW: a program owns a tile of one expert's dW and walks
through the expert's rows, so no sum is split over programs and two runs agree bitwise. Rows behind the last offset
belong to no expert: their y and dx are zero, and they reach no dW.
"""

import torch

from kernels.backend import autocast_dtype, jit, launch, op, power_of_two, table, tl, use_triton

# Tiles of rows that run beside each other, for the same columns.
GROUP = 8


# ---- reference

def reference(x, weight, offsets):
    """A matmul after the other; waits for the device, to know the offsets."""
    sizes = torch.diff(offsets, prepend=offsets.new_zeros(1)).tolist()
    *parts, behind = x.split([*sizes, len(x) - sum(sizes)])
    y = [part @ expert.T for part, expert in zip(parts, weight.unbind())]
    return torch.cat([*y, behind.new_zeros(len(behind), weight.shape[1])])


# ---- Triton
# A tile of the result is TILE_M x TILE_N elements, each a sum that takes TILE_K terms at a time.

@jit
def rows_kernel(X, W, OFFSETS, Y, N, OUT, IN, E, stride_e, stride_out, stride_in, TILE_M: tl.constexpr,
                TILE_N: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr, EXPERTS: tl.constexpr):
    """Y[n, :] = W[e] X[n, :] for the rows n of expert e; X [N, IN], W [E, OUT, IN] by its strides, Y [N, OUT]."""
    tiles_n = tl.cdiv(OUT, TILE_N)
    # The tiles of rows, if no expert fills its last one.
    most = tl.num_programs(0) // tiles_n
    group = tl.program_id(0) // (GROUP * tiles_n)
    height = tl.minimum(most - group * GROUP, GROUP)
    inside = tl.program_id(0) - group * GROUP * tiles_n
    tile_m = group * GROUP + inside % height
    tile_n = inside // height

    # The entry behind the last expert stands for the rows that belong to none.
    expert = tl.arange(0, EXPERTS)
    stop = tl.load(OFFSETS + expert, mask=expert < E, other=N)
    start = tl.load(OFFSETS + expert - 1, mask=(expert > 0) & (expert <= E), other=0)
    start = tl.where(expert > E, N, start)
    tiles = tl.cdiv(stop - start, TILE_M)
    behind = tl.cumsum(tiles, 0)
    mine = (behind - tiles <= tile_m) & (tile_m < behind)
    if tl.max(mine.to(tl.int32), 0) == 1:
        e = tl.sum(tl.where(mine, expert, 0), 0)
        first = tl.sum(tl.where(mine, start + (tile_m - behind + tiles) * TILE_M, 0), 0)
        last = tl.sum(tl.where(mine, stop, 0), 0)
        row = first + tl.arange(0, TILE_M)
        column = tile_n * TILE_N + tl.arange(0, TILE_N)
        k = tl.arange(0, TILE_K)
        # Rows behind the expert's last one repeat it, which saves a mask; they are not stored.
        x = X + tl.minimum(row, last - 1).to(tl.int64)[:, None] * IN + k[None, :]
        w = W + e.to(tl.int64) * stride_e
        w += column.to(tl.int64)[None, :] * stride_out + k.to(tl.int64)[:, None] * stride_in
        total = tl.zeros([TILE_M, TILE_N], tl.float32)
        for begin in range(0, tl.where(e < E, IN, 0), TILE_K):
            left = tl.load(x, mask=(k < IN - begin)[None, :], other=0.0)
            right = tl.load(w, mask=(k < IN - begin)[:, None] & (column < OUT)[None, :], other=0.0)
            total = tl.dot(left, right, total, input_precision="ieee")
            x += TILE_K
            w += TILE_K * stride_in
        y = Y + row.to(tl.int64)[:, None] * OUT + column[None, :]
        tl.store(y, total.to(Y.dtype.element_ty), mask=(row < last)[:, None] & (column < OUT)[None, :])


@jit
def weight_kernel(DY, X, OFFSETS, DW, OUT, IN, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
                  GROUP: tl.constexpr):
    """DW[e] = the sum over the expert's rows of dy x^T; DY [N, OUT], X [N, IN], DW [E, OUT, IN]."""
    tiles_m = tl.cdiv(OUT, TILE_M)
    tiles_n = tl.cdiv(IN, TILE_N)
    e = tl.program_id(0) // (tiles_m * tiles_n)
    tile = tl.program_id(0) - e * tiles_m * tiles_n
    group = tile // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = tile - group * GROUP * tiles_n
    m = (group * GROUP + inside % height) * TILE_M + tl.arange(0, TILE_M)
    n = inside // height * TILE_N + tl.arange(0, TILE_N)
    start = tl.load(OFFSETS + e - 1, mask=e > 0, other=0)
    stop = tl.load(OFFSETS + e)
    row = tl.arange(0, TILE_K)
    dy = DY + (start + row).to(tl.int64)[:, None] * OUT + m[None, :]
    x = X + (start + row).to(tl.int64)[:, None] * IN + n[None, :]
    total = tl.zeros([TILE_M, TILE_N], tl.float32)
    for begin in range(start, stop, TILE_K):
        mine = (begin + row < stop)[:, None]
        left = tl.load(dy, mask=mine & (m < OUT)[None, :], other=0.0)
        right = tl.load(x, mask=mine & (n < IN)[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
        dy += TILE_K * OUT
        x += TILE_K * IN
    dw = DW + e.to(tl.int64) * OUT * IN + m.to(tl.int64)[:, None] * IN + n[None, :]
    tl.store(dw, total.to(DW.dtype.element_ty), mask=(m < OUT)[:, None] & (n < IN)[None, :])


def tiling(x) -> dict:
    if x.dtype == torch.float32:
        # fp32 has no tensor cores: correct, not fast.
        return {"TILE_M": 64, "TILE_N": 64, "TILE_K": 32, "num_warps": 4, "num_stages": 2}
    return table({80: {"TILE_M": 128, "TILE_N": 128, "TILE_K": 32, "num_warps": 8, "num_stages": 4},
                  90: {"TILE_M": 128, "TILE_N": 256, "TILE_K": 64, "num_warps": 8, "num_stages": 3}}, x.device)


@op
def grouped_mm_rows(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """x [N, in] contiguous, weight [E, out, in] with any strides -> [N, out]."""
    tiles, (N, IN), (E, OUT, _) = tiling(x), x.shape, weight.shape
    y = x.new_empty(N, OUT)
    grid = (-(-N // tiles["TILE_M"]) + E) * -(-OUT // tiles["TILE_N"])
    launch(rows_kernel, (grid,), x, weight, offsets, y, N, OUT, IN, E, *weight.stride(), GROUP=GROUP,
           EXPERTS=power_of_two(E + 1), **tiles)
    return y


@op
def grouped_mm_dweight(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """dy, x contiguous -> dW [E, out, in]."""
    tiles, E, OUT, IN = tiling(x), len(offsets), dy.shape[1], x.shape[1]
    dw = x.new_empty(E, OUT, IN)
    launch(weight_kernel, (E * -(-OUT // tiles["TILE_M"]) * -(-IN // tiles["TILE_N"]),), dy, x, offsets, dw, OUT, IN,
           GROUP=GROUP, **tiles)
    return dw


class GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, offsets):
        x, weight, offsets = x.contiguous(), weight.contiguous(), offsets.contiguous()
        ctx.save_for_backward(x, weight, offsets)
        return grouped_mm_rows(x, weight, offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, offsets = ctx.saved_tensors
        dy = dy.contiguous()
        return (grouped_mm_rows(dy, weight.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None,
                grouped_mm_dweight(dy, x, offsets) if ctx.needs_input_grad[1] else None, None)


# ---- public op

def grouped_mm(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """x [N, D] sorted by expert, weight [E, F, D], offsets [E] int32: where each expert's rows end -> [N, F].

    The same as torch's F.grouped_mm(x, weight.transpose(1, 2), offs=offsets), for any sizes and in every dtype; sums
    are fp32. Under autocast x and weight are taken in its dtype. Offsets must rise and be on x's device; their values
    are not checked, and those beyond N count as N. ValueError where shapes or dtypes do not fit.
    """
    if dtype := autocast_dtype(x):
        x, weight = x.to(dtype), weight.to(dtype)
    fits = x.ndim == 2 and weight.ndim == 3 and x.shape[1] == weight.shape[2] and offsets.shape == weight.shape[:1]
    if not fits or not len(weight) or x.dtype != weight.dtype or offsets.dtype != torch.int32:
        got = ", ".join(f"{tuple(given.shape)} {given.dtype}" for given in (x, weight, offsets))
        raise ValueError(f"grouped_mm got x, weight and offsets of {got}; they must be [N, D], [E, F, D] in x's dtype "
                         "and [E] torch.int32, E at least 1")
    return (GroupedMM.apply if use_triton(x) else reference)(x, weight, offsets.clamp(max=len(x)))
