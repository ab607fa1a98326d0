"""Root-mean-square layer normalisation (Zhang and Sennrich, 2019, arXiv 1910.07467), alone and after a residual add.

    s = x + residual                 (add_rmsnorm only; s is the residual stream from here on)
    r = 1 / sqrt(mean(s^2) + eps)    y = w * s * r
    ds = r * (w dy - s r^2 mean(w dy s)) + the gradient that reaches s by the residual stream
    dw = sum over rows of dy s r

    Example: s = (3, 4) has rms sqrt((9 + 16) / 2) = 3.54; with w = 1, y = (0.85, 1.13).

M rows of D elements, tokens or the heads of tokens: x, residual, s, y [M, D], w [D], r [M]. Kept for the backward pass
are s, and r in fp32. With n bytes per element an ideal device moves 2 M D n forward (4 with the add) and 3 M D n
backward (4 with the add); there is hardly any arithmetic.

Forward, a program takes a tile of full rows. Backward, a fixed number of programs stride over the tiles, so that each
keeps its share of dw in registers; the shares are summed in a second step, in a fixed order: two runs agree bitwise.
"""

import torch

from kernels.backend import jit, launch, multiprocessors, op, power_of_two, tl, use_triton

# Elements that a program holds; short rows share it.
TILE = 4096


def upcast(x: torch.Tensor) -> torch.Tensor:
    """x in fp32 or wider: float64 stays float64, so that gradcheck can judge the references."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


# ---- reference

def reference_forward(x, residual, weight, eps):
    """-> y, s, 1 / rms [..., 1] in fp32 or wider."""
    s = x if residual is None else x + residual
    upcast_s = upcast(s)
    rstd = torch.linalg.vector_norm(upcast_s, dim=-1, keepdim=True)
    rstd = rstd.square_().mul_(1 / s.shape[-1]).add_(eps).rsqrt_()
    return (upcast_s * rstd).mul_(weight).to(s.dtype), s, rstd


def reference_backward(dy, dstream, s, weight, rstd, want_dw):
    """-> ds, dw (empty if not wanted)."""
    dy, upcast_weight = upcast(dy), upcast(weight)
    xhat = upcast(s) * rstd
    dy_xhat = dy * xhat
    dw = dy_xhat.flatten(0, -2).sum(0).to(weight.dtype) if want_dw else weight.new_empty(0)
    # Over the row, of w dy xhat.
    mean = (dy_xhat @ upcast_weight).unsqueeze(-1).mul_(1 / s.shape[-1])
    ds = (dy * upcast_weight).addcmul_(xhat, mean, value=-1).mul_(rstd)
    return (ds if dstream is None else ds.add_(dstream)).to(s.dtype), dw


# ---- Triton

@jit
def forward_kernel(X, R, W, S, Y, RSTD, M, D, eps, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """X, R (the residual), S, Y [M, D], W [D], RSTD [M]; a program takes ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < M)[:, None] & (col < D)
    at = row.to(tl.int64)[:, None] * D + col
    s = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        s += tl.load(R + at, mask=mask, other=0.0).to(tl.float32)
        # Rounded first, because the norm is of what the residual stream keeps.
        s = s.to(S.dtype.element_ty)
        tl.store(S + at, s, mask=mask)
        s = s.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(s * s, 1) / D + eps)
    tl.store(RSTD + row, rstd, mask=row < M)
    w = tl.load(W + col, mask=col < D, other=0.0).to(tl.float32)
    tl.store(Y + at, s * rstd[:, None] * w, mask=mask)


@jit
def backward_kernel(DY, DSTREAM, S, W, RSTD, DS, DW, M, D, ADD: tl.constexpr, WANT_DW: tl.constexpr,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """DY, DSTREAM, S, DS [M, D], W [D], RSTD [M], DW [programs, D]: each program's share."""
    col = tl.arange(0, BLOCK)[None, :]
    w = tl.load(W + col, mask=col < D, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < M)[:, None] & (col < D)
        at = row.to(tl.int64)[:, None] * D + col
        rstd = tl.load(RSTD + row, mask=row < M, other=0.0)[:, None]
        xhat = tl.load(S + at, mask=mask, other=0.0).to(tl.float32) * rstd
        dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
        if WANT_DW:
            dw += dy * xhat
        dy *= w
        ds = (dy - xhat * (tl.sum(dy * xhat, 1)[:, None] / D)) * rstd
        if ADD:
            ds += tl.load(DSTREAM + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(DS + at, ds, mask=mask)
    if WANT_DW:
        tl.store(DW + tl.program_id(0) * D + col, tl.sum(dw, 0)[None, :], mask=col < D)


def tiling(D: int) -> dict:
    block = power_of_two(D)
    return {"ROWS": max(1, TILE // block), "BLOCK": block, "num_warps": min(32, max(TILE, block) // 512)}


@op
def rmsnorm_forward(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor,
                    eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y, the stream s (empty without a residual), r [M] fp32; x and residual contiguous."""
    D, add = x.shape[-1], residual is not None
    M = x.numel() // D if D else 0
    s = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype)) if add else x.new_empty(0)
    y = torch.empty_like(s if add else x)
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    tiles = tiling(D)
    launch(forward_kernel, (-(-M // tiles["ROWS"]),), x, residual, weight, s, y, rstd, M, D, eps, ADD=add, **tiles)
    return y, s, rstd


@op
def rmsnorm_backward(dy: torch.Tensor, dstream: torch.Tensor | None, s: torch.Tensor, weight: torch.Tensor,
                     rstd: torch.Tensor, want_dw: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """-> ds, dw (empty if not wanted)."""
    M, D = rstd.numel(), s.shape[-1]
    tiles = tiling(D)
    programs = min(2 * multiprocessors(s.device), -(-M // tiles["ROWS"]))
    ds = torch.empty_like(s)
    dw = torch.empty(programs if want_dw else 0, D, dtype=torch.float32, device=s.device)
    launch(backward_kernel, (programs,), dy, dstream, s, weight, rstd, ds, dw, M, D, ADD=dstream is not None,
           WANT_DW=want_dw, **tiles)
    return ds, dw.sum(0).to(weight.dtype) if want_dw else dw


class RMSNorm(torch.autograd.Function):
    """(x, residual or None, weight, eps) -> y, or (y, s) with a residual."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        ctx.triton, add = use_triton(x), residual is not None
        x, weight, residual = x.contiguous(), weight.contiguous(), residual.contiguous() if add else None
        y, s, rstd = (rmsnorm_forward if ctx.triton else reference_forward)(x, residual, weight, eps)
        ctx.save_for_backward(s if add else x, weight, rstd)
        return (y, s) if add else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dstream=None):
        want_dw, add = ctx.needs_input_grad[2], dstream is not None
        dy, dstream = dy.contiguous(), dstream.contiguous() if add else None
        ds, dw = (rmsnorm_backward if ctx.triton else reference_backward)(dy, dstream, *ctx.saved_tensors, want_dw)
        return ds, ds if add else None, dw if want_dw else None, None


# ---- public ops

def check_shapes(x, residual, weight):
    if weight.shape != x.shape[-1:] or not x.shape[-1] or residual.shape != x.shape:
        raise ValueError(f"rmsnorm of x {tuple(x.shape)} and residual {tuple(residual.shape)} with weight "
                         f"{tuple(weight.shape)}: x and residual must agree, the weight be as long as their rows")


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D], weight [D] -> [..., D] in x's dtype."""
    check_shapes(x, x, weight)
    return RMSNorm.apply(x, None, weight, eps)


def add_rmsnorm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float):
    """x, residual [..., D], weight [D] -> rmsnorm(x + residual), x + residual, both in the wider dtype of the two."""
    check_shapes(x, residual, weight)
    return RMSNorm.apply(x, residual, weight, eps)
