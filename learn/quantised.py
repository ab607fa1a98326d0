"""Weights in few bits, which are turned back into floating point whenever a layer computes (QLoRA, arXiv 2305.14314):

    nf4    4 bits: 16 levels at quantiles of the normal distribution, kernels/nf4.py
    int4   4 bits: 15 evenly spaced levels in the same record, so that the same kernels read it
    int8   8 bits: integers times one scale per output: LLM.int8() (2208.07339) without its fp16 part for outliers

Shapes: W [out, in], or [E, out, in] of E experts; x [..., in].
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from core.errors import UserError
from core.sharding import device_of
from kernels import NF4, dequantise, grouped_mm, quantise
from kernels.nf4 import BLOCK, read_absmax

# The divisor where all weights of a block, or of a row, are 0.
TINY = torch.finfo(torch.float32).tiny


class FewBits(nn.Module):
    """A weight in few bits. What grows with it is in parameters without a gradient, and FSDP shards them as it does any
    weight, each in its own dtype. (bitsandbytes keeps its bytes in the dtype of the matmuls, because FSDP1 wanted one
    dtype.) Levels and an offset, which every rank needs in full, are buffers."""

    # The names of the tensors that grow with the weight.
    sharded = ()

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.full_shape, self.dtype = weight.shape, weight.dtype
        self.register(weight)

    def register(self, weight: torch.Tensor):
        for name, tensor in self.quantise(weight).items():
            if name in self.sharded:
                self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)

    @property
    def shape(self) -> torch.Size:
        """Of the weight; while ranks share its matmul and compute, of this rank's part."""
        return self.full_shape

    def keep_rows(self):
        """To be called on the meta device: from now on the tensors have the weight's rows and columns, so that ranks
        can each have some of them."""

    def quantise(self, weight: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """The tensors of a weight; UserError where it has a NaN or an infinity."""
        raise NotImplementedError

    @torch.no_grad()
    def fill(self, weight: torch.Tensor, layout):
        """Take the place of another weight of this shape. Each rank quantises all of it and keeps its share, so that
        blocks and scales are those of one rank. layout: as in `initialise`."""
        device = device_of(self)
        for name, full in self.quantise(weight.to(device, self.dtype)).items():
            if full is not None:
                own = getattr(self, name)
                own.copy_(layout(full, own))


class FourBit(FewBits):
    """The tensors of an NF4 record (kernels/nf4.py); kind: nf4 or int4."""

    sharded = "packed", "absmax", "absmax2"

    def __init__(self, weight: torch.Tensor, kind: str, double_quant: bool):
        self.how, self.double_quant, self.has_rows = quantise_int4 if kind == "int4" else quantise, double_quant, False
        super().__init__(weight)

    @property
    def shape(self):
        return shape_of(self.packed) if self.has_rows else self.full_shape

    def keep_rows(self):
        """packed [..., out, in / 2] and absmax [..., out, in / 64] in fp32. Blocks of a part have the same scales, but
        not the same neighbours to be quantised with once more: the same values in 4.5 bits per weight."""
        self.has_rows = True
        for name in ("packed", "absmax", "code", "absmax2", "code2", "offset"):
            delattr(self, name)
        self.register(torch.empty(self.full_shape, dtype=self.dtype, device="meta"))

    def quantise(self, weight):
        record = self.how(weight, self.double_quant)
        if self.has_rows:
            absmax = record.absmax if record.absmax2 is None else read_absmax(
                record.absmax, record.absmax2, record.code2, record.offset)
            rows = self.full_shape[:-1]
            record = replace(record, packed=record.packed.view(*rows, -1), absmax=absmax.view(*rows, -1), absmax2=None,
                             code2=None, offset=None)
        return {name: value for name, value in vars(record).items() if name not in ("shape", "dtype")}

    def record(self, form=lambda tensor: tensor) -> NF4:
        """form: what is made of a tensor."""
        packed, absmax, *others = (None if tensor is None else form(tensor) for tensor in (
            self.packed, self.absmax, self.code, self.absmax2, self.code2, self.offset))
        shape = shape_of(packed) if self.has_rows else self.full_shape
        return NF4(packed.flatten(), absmax.flatten(), *others, shape, self.dtype)

    def dequantise(self, dtype: torch.dtype = torch.float32, form=lambda tensor: tensor) -> torch.Tensor:
        """form: as in `record`."""
        return dequantise(self.record(form), dtype)


class EightBit(FewBits):
    """codes int8 [..., out, in] and scale fp32 [..., out], the largest absolute weight of an output divided by 127."""

    sharded = "codes", "scale"

    @property
    def shape(self):
        return self.codes.shape

    def quantise(self, weight):
        scale = weight.abs().amax(-1).float() / 127
        if not scale.is_meta and not scale.isfinite().all():
            raise UserError(f"a weight of shape {tuple(weight.shape)} has NaN or infinite values; int8 has none")
        codes = (weight.float() / scale.clamp(min=TINY).unsqueeze(-1)).round()
        return {"codes": codes.to(torch.int8), "scale": scale}

    def dequantise(self, dtype: torch.dtype = torch.float32, form=lambda tensor: tensor) -> torch.Tensor:
        return (form(self.codes).float() * form(self.scale).unsqueeze(-1)).to(dtype)


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


class CompressedMatmul(torch.autograd.Function):
    """The experts' matmuls with weights in few bits, with a gradient for x alone. The weights are dequantised in each
    pass anew, so that none is kept between the passes."""

    @staticmethod
    def forward(ctx, x, quantised: FourBit | EightBit, offsets):
        ctx.quantised = quantised
        ctx.save_for_backward(offsets)
        return grouped_mm(x, quantised.dequantise(x.dtype), offsets)

    @staticmethod
    def backward(ctx, dy):
        weight, (offsets,) = ctx.quantised.dequantise(dy.dtype), ctx.saved_tensors
        return grouped_mm(dy.contiguous(), weight.mT, offsets), None, None


def shape_of(packed: torch.Tensor) -> torch.Size:
    """Of the weight whose rows are packed [..., out, in / 2]."""
    return torch.Size((*packed.shape[:-1], 2 * packed.shape[-1]))


def quantise_int4(weight: torch.Tensor, double_quant: bool) -> NF4:
    """NF4's record with the levels -8/7, -1, -6/7, ..., 1 (the first is unused) instead of normal quantiles.

    In a block whose largest absolute weight is 0.7, the weight 0.7 has code 15, 0 has code 8, and 0.23 has code
    round(0.23 / 0.7 * 7) + 8 = 10, which is read back as (10 - 8) / 7 * 0.7 = 0.2.
    """
    # NF4's record keeps the largest absolute weight of each block; only codes and levels are others.
    record = quantise(weight, double_quant)
    flat = F.pad(weight.detach().float().flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    largest = flat.abs().amax(1, keepdim=True).clamp(min=TINY)
    codes = ((flat / largest * 7).round() + 8).to(torch.uint8).view(-1, 2)
    packed = ((codes[:, 0] << 4) | codes[:, 1])[:len(record.packed)].clone()
    return replace(record, packed=packed, code=torch.arange(-8, 8, device=weight.device) / 7)
