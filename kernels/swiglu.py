"""SwiGLU (Shazeer, 2020, arXiv 2002.05202): y = silu(gate) * up, silu(g) = g sigmoid(g).

The backward pass recomputes silu(gate), so that only the two inputs are kept:
    d_up = dy silu(gate)         d_gate = dy up sigmoid(gate) (1 + gate (1 - sigmoid(gate)))
"""

import torch
import torch.nn.functional as F

from kernels.rmsnorm import upcast

CHUNK_ROWS = 256      # on a CPU: the piece between silu and product stays in the cache


class SwiGLU(torch.autograd.Function):
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


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up [..., F] -> [..., F]."""
    return SwiGLU.apply(gate, up)
