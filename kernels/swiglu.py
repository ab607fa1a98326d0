"""SwiGLU (Shazeer, 2020, arXiv 2002.05202): y = silu(gate) * up, silu(g) = g sigmoid(g).

The backward pass recomputes silu(gate), so that only the two inputs are kept:
    d_up = dy silu(gate)         d_gate = dy up sigmoid(gate) (1 + gate (1 - sigmoid(gate)))
"""

import torch
import torch.nn.functional as F

from kernels.rmsnorm import upcast


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(upcast(gate)).mul_(up).to(gate.dtype)

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
