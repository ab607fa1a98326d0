"""Frozen weights in few bits, turned back into floating point whenever a layer computes (QLoRA, arXiv 2305.14314).

    nf4    4 bits: 16 levels at quantiles of the normal distribution, kernels/nf4.py
    int4   4 bits: 15 evenly spaced levels in the same record, so that the same kernels read it
    int8   8 bits: integers times one scale per output: LLM.int8() (arXiv 2208.07339) without its fp16 part for outliers

A weight in this form cannot be trained. Shapes: x [..., in], weight [out, in].
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from core.errors import UserError
from kernels import NF4, dequantise, quantise
from kernels.nf4 import BLOCK

# The divisor where all weights of a block are 0.
TINY = torch.finfo(torch.float32).tiny


class FourBit(nn.Module):
    """The tensors of an NF4 record (kernels/nf4.py) as buffers, so that they move between devices with the model."""

    def __init__(self, record: NF4):
        super().__init__()
        self.shape, self.dtype = record.shape, record.dtype
        for name in ("packed", "absmax", "code", "absmax2", "code2", "offset"):
            self.register_buffer(name, getattr(record, name))

    def record(self) -> NF4:
        return NF4(self.packed, self.absmax, self.code, self.absmax2, self.code2, self.offset, self.shape, self.dtype)

    def dequantise(self) -> torch.Tensor:
        """-> the weight [out, in] in fp32."""
        return dequantise(self.record(), torch.float32)


class EightBit(nn.Module):
    """codes int8 [out, in] and scale fp32 [out], the largest absolute weight of each output divided by 127."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.shape, self.dtype = weight.shape, torch.float32
        scale = weight.abs().amax(1).float() / 127
        if not scale.isfinite().all():
            raise UserError(f"a weight of shape {tuple(weight.shape)} has NaN or infinite values; int8 has none")
        codes = (weight.float() / scale.clamp(min=TINY)[:, None]).round()
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("scale", scale)

    def dequantise(self) -> torch.Tensor:
        """-> the weight [out, in] in fp32."""
        return self.codes.float() * self.scale[:, None]


class EightBitMatmul(torch.autograd.Function):
    """x W^T with a gradient for x alone. bf16 and fp16 hold every int8 code exactly, and the scale of an output is
    applied after the sum, so that no dequantised weight is needed."""

    @staticmethod
    def forward(ctx, x, codes, scale):
        ctx.save_for_backward(codes, scale)
        return F.linear(x, codes.to(x.dtype)) * scale.to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        codes, scale = ctx.saved_tensors
        return (dy * scale.to(dy.dtype)) @ codes.to(dy.dtype), None, None


def quantise_int4(weight: torch.Tensor, double_quant: bool) -> NF4:
    """NF4's record with the levels -8/7, -1, -6/7, ..., 1 (the first is unused) instead of normal quantiles.

    In a block whose largest absolute weight is 0.7, the weight 0.7 has code 15, 0 has code 8, and 0.23 has code
    round(0.23 / 0.7 * 7) + 8 = 10, which is read back as (10 - 8) / 7 * 0.7 = 0.2.
    """
    # For the largest absolute weight of each block.
    record = quantise(weight, double_quant)
    flat = F.pad(weight.detach().float().flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    largest = flat.abs().amax(1, keepdim=True).clamp(min=TINY)
    codes = ((flat / largest * 7).round() + 8).to(torch.uint8).view(-1, 2)
    packed = ((codes[:, 0] << 4) | codes[:, 1])[:len(record.packed)].clone()
    return replace(record, packed=packed, code=torch.arange(-8, 8, device=weight.device) / 7)


def compress(weight: torch.Tensor, kind: str, double_quant: bool) -> FourBit | EightBit:
    """weight [out, in] in fp32, bf16 or fp16, as `kind` (nf4, int4 or int8) on its device; UserError on NaN."""
    if kind == "int8":
        return EightBit(weight)
    return FourBit(quantise_int4(weight, double_quant) if kind == "int4" else quantise(weight, double_quant))
