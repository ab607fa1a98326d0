"""SwiGLU (Shazeer, 2020, arXiv 2002.05202): y = silu(gate) * up, silu(g) = g sigmoid(g).

    d_up = dy silu(gate)         d_gate = dy up sigmoid(gate) (1 + gate (1 - sigmoid(gate)))

Only the two inputs are kept; the backward pass computes sigmoid(gate) anew, which costs no traffic. With n bytes a
number, an ideal device moves 3 n a number forward and 5 n backward; the arithmetic hides behind that.

The rows mean nothing here, so the kernels see one flat row and cut it into equal tiles, whatever F is: a tile of a
whole row of 14336 would be padded to 16384 and leave half of the multiprocessor empty. A thread holds one 16-byte
vector of each tensor, and 2048 threads a multiprocessor keep 64 KB of loads in flight, 96 KB backward.
"""

import torch
import torch.nn.functional as F

from kernels.backend import jit, launch, op, tl, use_triton
from kernels.rmsnorm import upcast

CHUNK_ROWS = 256      # on a CPU: the piece between silu and product stays in the cache
TILE = {"BLOCK": 1024, "num_warps": 4}                 # 8 numbers a thread: 16 bytes of bf16


# ---- reference

class Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        if gate.device.type != "cpu" or torch.compiler.is_compiling():
            return F.silu(upcast(gate)).mul_(up).to(gate.dtype)
        y = torch.empty(gate.shape, dtype=gate.dtype)
        rows = (x.reshape(-1, x.shape[-1]).split(CHUNK_ROWS) for x in (gate, up, y))
        for g, u, out in zip(*rows):
            out.copy_(F.silu(upcast(g)).mul_(u)) if gate.dtype != torch.float32 else torch.mul(F.silu(g), u, out=out)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        wide, dy = upcast(gate), upcast(dy)
        d_gate = torch.ops.aten.silu_backward(dy * up, wide).to(gate.dtype)
        return d_gate, F.silu(wide).mul_(dy).to(up.dtype)


# ---- Triton

@jit
def forward_kernel(GATE, UP, Y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)          # 150,000 tokens of 14336 pass 2^31
    gate = tl.load(GATE + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(UP + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(Y + at, gate * tl.sigmoid(gate) * up, mask=at < n)


@jit
def backward_kernel(DY, GATE, UP, DGATE, DUP, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(DY + at, mask=at < n, other=0.0).to(tl.float32)
    gate = tl.load(GATE + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(UP + at, mask=at < n, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    tl.store(DGATE + at, dy * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=at < n)
    tl.store(DUP + at, dy * gate * sigmoid, mask=at < n)


@op
def swiglu_forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Contiguous inputs of one shape."""
    y, n = torch.empty_like(gate), gate.numel()
    launch(forward_kernel, (-(-n // TILE["BLOCK"]),), gate, up, y, n, **TILE)
    return y


@op
def swiglu_backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> d_gate, d_up."""
    d_gate, d_up, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    launch(backward_kernel, (-(-n // TILE["BLOCK"]),), dy, gate, up, d_gate, d_up, n, **TILE)
    return d_gate, d_up


class Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return swiglu_backward(dy.contiguous(), *ctx.saved_tensors)


# ---- public op

def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up [..., F] -> [..., F] in gate's dtype; ValueError where their shapes differ."""
    if gate.shape != up.shape:
        raise ValueError(f"gate is {tuple(gate.shape)} and up {tuple(up.shape)}; expand one to the other's shape")
    return (Kernel if use_triton(gate) else Reference).apply(gate, up)
