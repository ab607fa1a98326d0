"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864), half-split as in Hugging Face's checkpoints.

With x = [a, b], the two halves of a head, and the angle of each pair:
    y = [a cos - b sin,  b cos + a sin]          backward: the same rotation by the negative angle
"""

import torch

from kernels.rmsnorm import upcast


def rotate(x, cos, sin):
    """x [B, T, H, d] by the angles whose cosine and sine are [B or 1, T, 1, d/2]."""
    wide = upcast(x)
    a, b = wide.chunk(2, dim=-1)
    if torch.compiler.is_compiling():            # fuses this itself; views that are written to only hinder it
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    y = wide * torch.cat([cos, cos], -1)
    ya, yb = y.chunk(2, dim=-1)
    ya.addcmul_(b, sin, value=-1)
    yb.addcmul_(a, sin)
    return y.to(x.dtype)


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return rotate(dq, cos, -sin), rotate(dk, cos, -sin), None, None


def rope(q, k, cos, sin):
    """Rotate queries q [B, T, H, d] and keys k [B, T, K, d]; cos, sin [B or 1, T, d/2] are constants."""
    return Rope.apply(q, k, cos.unsqueeze(2), sin.unsqueeze(2))
