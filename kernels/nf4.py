"""NF4: weights in four bits (QLoRA; Dettmers et al., 2023, arXiv 2305.14314), byte for byte as bitsandbytes keeps them.

The flattened weight is cut into blocks of 64 elements. A block keeps a = max |w| and, for every element, the index of
the level nearest to w / a among 16 quantiles of the normal distribution between -1 and 1. Double quantisation keeps `a`
itself in 8 bits: a - mean(a) in blocks of 256, as the nearest of 256 dynamic levels (Dettmers, 2015, arXiv 1511.04561)
times the block's largest. That makes 4 + 8/64 + 32/(64 * 256) = 4.127 bits per element; without it 4.5.

    a = code2[absmax[block]] * absmax2[block / 256] + offset          w = code[index] * a

    Example: in a block with a = 2, w = 0.3 is kept as index 9, because level 9, 0.1609, is the nearest to 0.15. It is
    read back as 0.3219.

Dequantising N elements to bf16 moves 0.516 N + 2 N bytes, of which the output is four fifths, and should take that time
and no more, because a QLoRA step does it twice per weight. So it is one kernel, double quantisation included. A level
is a load from 64 bytes that stay in L1, 32 of them per cycle and multiprocessor, four times what the memory asks for; a
tree of 15 selects per element would take longer than the memory does. Multiplications and additions are rounded one by
one, without fused multiply-adds: the values are bitwise those of bitsandbytes. Quantising happens once in a weight's
life; its kernel only has to stream.

There is no matmul of activations with packed weights: at training sizes the library's matmul takes ten times as long as
dequantising before it (kernels/lora.py does that), and no fused kernel reaches the library's.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.backend import jit, launch, op, tl, use_triton

# Elements that share an absmax, and absmaxes that share an absmax2.
BLOCK, BLOCK2 = 64, 256
LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
          -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
          0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
# The smallest normal fp32 value; an absmax below counts as this, so that a block of zeros is not 0 / 0.
SMALLEST = 2.0**-126
# Blocks that the CPU works on at once: a megabyte of fp32, which its caches hold.
CHUNK = 4096
# Blocks per program. Dequantising, it divides BLOCK2, so that a program needs one absmax2.
DEQUANTISE = {"ROWS": 64, "BLOCK": BLOCK, "BLOCK2": BLOCK2, "num_warps": 4, "enable_fp_fusion": False}
QUANTISE = {"ROWS": 32, "BLOCK": BLOCK, "SMALLEST": SMALLEST, "num_warps": 4}


@dataclass(frozen=True, eq=False)
class NF4:
    """A quantised weight of N elements. Without double quantisation absmax is fp32 and the last three tensors are None.

    Each field says where bitsandbytes and transformers keep it beside a parameter `NAME`; divisions are rounded up. A
    byte of `packed` holds two indices, the first in its high half. The JSON is NAME.quant_state.bitsandbytes__nf4, its
    UTF-8 bytes as a uint8 tensor, with quant_type "nf4", blocksize 64 and, with double quantisation, nested_blocksize
    256 and nested_dtype "float32" as well. These kernels know no other block sizes.
    """
    packed: torch.Tensor                # uint8 [N / 2]: NAME, as [N / 2, 1]
    absmax: torch.Tensor                # uint8 [N / 64]: NAME.absmax
    code: torch.Tensor                  # fp32 [16], the levels: NAME.quant_map
    absmax2: torch.Tensor | None        # fp32 [N / 64 / 256]: NAME.nested_absmax
    code2: torch.Tensor | None          # fp32 [256]: NAME.nested_quant_map
    offset: torch.Tensor | None         # fp32 []: nested_offset in the JSON
    shape: torch.Size                   # shape in the JSON
    dtype: torch.dtype                  # dtype in the JSON, as "bfloat16"


def dynamic_levels() -> torch.Tensor:
    """-> fp32 [256], sorted: what 8 bits mean as a sign, 0 to 6 zeros (the exponent of ten), a one, a linear fraction.

    The smaller the value, the more bits its exponent takes: for 10^(i - 6) there are 2^i fractions between 0.1 and 1,
    each in the middle of its interval, so 0.55e-6; 3.25e-6, 7.75e-6; and so on. 0 and 1 are added.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        fractions = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += fractions + [-x for x in fractions]
    return torch.tensor(sorted(levels), dtype=torch.float32, device="cpu")


def middles(levels: torch.Tensor) -> torch.Tensor:
    """Where the nearest level changes; a value in the very middle belongs to the lower one."""
    return (levels[:-1] + levels[1:]) / 2


def reciprocal(absmax: torch.Tensor) -> torch.Tensor:
    return 1 / absmax.clamp(min=SMALLEST)


# ---- reference

def nearest_level(x, levels):
    """x fp32 in [-1, 1] -> uint8: how many of the 15 middles between the levels lie below each element.

    torch.bucketize finds the same; this is six times as fast. [-1, 1] is cut into 33 cells, narrower than the distances
    between middles, so that a cell has one of them at most. Tables hold, for each cell, the count of middles in lower
    cells and the next middle. Example: 0.1 is in cell 17 (0.0625 to 0.125), below which lie 8 middles (-0.85 to 0.04);
    the next one, 0.1203, is not below 0.1, so the index is 8, that of the level 0.0796.
    """
    bounds = middles(levels)
    cells, cells_of_bounds = ((values * 16).add_(16).int() for values in (x, bounds))
    below = torch.searchsorted(cells_of_bounds, torch.arange(33, dtype=torch.int32, device=x.device))
    following = F.pad(bounds, (0, 1), value=torch.inf)[below]
    return below.to(torch.uint8).index_select(0, cells).add_(x > following.index_select(0, cells))


def reference_quantise(weight, code, packed, absmax):
    """weight [N] into packed [ceil(N / 2)] and absmax [ceil(N / 64)]."""
    for w, largest, into in zip(*split(weight, absmax, packed)):
        w = F.pad(w.float(), (0, -len(w) % BLOCK)).view(-1, BLOCK)
        torch.amax(w.abs(), 1, out=largest)
        x = w * reciprocal(largest)[:, None]
        # NaN would have no cell. quantise refuses the weight for its absmax, which is not finite.
        index = nearest_level(x.flatten().nan_to_num_(), code).view(-1, 2)
        into.copy_(((index[:, 0] << 4) | index[:, 1])[:len(into)])


def reference_dequantise(packed, absmax, code, absmax2, code2, offset, out):
    """Into out [N]; computed in float64 where out is, else in fp32."""
    compute = torch.promote_types(out.dtype, torch.float32)
    code = code.to(compute)
    if absmax2 is not None:
        absmax = read_absmax(absmax, absmax2, code2, offset, compute)
    # The two levels of each of the 256 bytes, as one element of twice the size, so that a byte costs one load.
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)
    pairs = pairs.view(torch.complex128 if compute == torch.float64 else torch.int64).flatten()
    for part, largest, bytes_ in zip(*split(out, absmax, packed)):
        bytes_ = F.pad(bytes_, (0, -len(bytes_) % (BLOCK // 2))).int()
        w = pairs.index_select(0, bytes_).view(compute).view(-1, BLOCK)
        w *= largest[:, None].to(compute)
        part.copy_(w.flatten()[:len(part)])


def read_absmax(absmax, absmax2, code2, offset, dtype=torch.float32):
    """Double quantisation undone: absmax [ceil(N / 64)] in `dtype`."""
    scale = absmax2.to(dtype).repeat_interleave(BLOCK2)[:len(absmax)]
    return code2.to(dtype).index_select(0, absmax.int()).mul_(scale).add_(offset)


def split(weight, absmax, packed):
    """Cut each into pieces of CHUNK blocks."""
    return weight.split(CHUNK * BLOCK), absmax.split(CHUNK), packed.split(CHUNK * BLOCK // 2)


# ---- Triton

@jit
def quantise_kernel(W, BOUNDS, PACKED, ABSMAX, N, BYTES, SMALLEST: tl.constexpr, ROWS: tl.constexpr,
                    BLOCK: tl.constexpr):
    """W [N], BOUNDS (middles of the levels) [15], PACKED [BYTES], ABSMAX [N / BLOCK]; a program takes ROWS blocks."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    w = tl.load(W + at, mask=at < N, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(w), 1)
    # tl.max passes over NaN, and quantise must see it to refuse it.
    absmax = tl.where(tl.sum((w != w).to(tl.int32), 1) > 0, float("nan"), absmax)
    tl.store(ABSMAX + row, absmax, mask=row * BLOCK < N)
    x = w * tl.div_rn(tl.full([ROWS], 1.0, tl.float32), tl.maximum(absmax, SMALLEST))[:, None]
    index = tl.zeros([ROWS, BLOCK], tl.int32)
    for i in tl.static_range(15):
        index += (x > tl.load(BOUNDS + i)).to(tl.int32)
    high, low = tl.split(tl.reshape(index, [ROWS, BLOCK // 2, 2]))
    at = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(PACKED + at, ((high << 4) | low).to(tl.uint8), mask=at < BYTES)


@jit
def dequantise_kernel(PACKED, ABSMAX, CODE, ABSMAX2, CODE2, OFFSET, OUT, N, BYTES, NESTED: tl.constexpr,
                      ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK2: tl.constexpr):
    """PACKED [BYTES], ABSMAX [N / BLOCK], CODE [16], OUT [N]; ABSMAX2 [N / BLOCK / BLOCK2], CODE2 [256], OFFSET [] if
    NESTED; a program takes ROWS blocks."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    at = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    byte = tl.load(PACKED + at, mask=at < BYTES, other=0, eviction_policy="evict_first").to(tl.int32)
    absmax = tl.load(ABSMAX + row, mask=row * BLOCK < N, other=0)
    if NESTED:
        scale = tl.load(ABSMAX2 + first // BLOCK2, mask=first * BLOCK < N, other=0.0)
        absmax = tl.load(CODE2 + absmax.to(tl.int32)) * scale + tl.load(OFFSET)
    high = tl.load(CODE + (byte >> 4)) * absmax[:, None]
    low = tl.load(CODE + (byte & 15)) * absmax[:, None]
    w = tl.reshape(tl.join(high, low), [ROWS, BLOCK])
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(OUT + at, w, mask=at < N)


@op
def nf4_dequantise(packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, absmax2: torch.Tensor | None,
                   code2: torch.Tensor | None, offset: torch.Tensor | None, N: int,
                   dtype: torch.dtype) -> torch.Tensor:
    """-> the weight [N] in `dtype`."""
    out = torch.empty(N, dtype=dtype, device=packed.device)
    if dtype == torch.float64 or not use_triton(packed):
        reference_dequantise(packed, absmax, code, absmax2, code2, offset, out)
    else:
        launch(dequantise_kernel, (-(-len(absmax) // DEQUANTISE["ROWS"]),), packed, absmax, code, absmax2, code2,
               offset, out, N, len(packed), NESTED=absmax2 is not None, **DEQUANTISE)
    return out


# ---- public ops

def quantise(weight: torch.Tensor, double_quant: bool = True) -> NF4:
    """weight of any shape, fp32, bf16 or fp16 -> NF4 on its device. Blocks of zeros stay exactly zero.

    ValueError on another dtype and on a weight with NaN or infinite values.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"NF4 quantises fp32, bf16 and fp16 weights, not {weight.dtype}; convert it first")
    flat = weight.detach().contiguous().view(-1)
    code = torch.tensor(LEVELS, dtype=torch.float32, device=weight.device)
    packed = code.new_empty(-(-len(flat) // 2), dtype=torch.uint8)
    absmax = code.new_empty(-(-len(flat) // BLOCK))
    if use_triton(flat):
        launch(quantise_kernel, (-(-len(absmax) // QUANTISE["ROWS"]),), flat, middles(code), packed, absmax, len(flat),
               len(packed), **QUANTISE)
    elif not flat.is_meta:
        reference_quantise(flat, code, packed, absmax)
    if not absmax.is_meta and not absmax.isfinite().all():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has NaN or infinite values; NF4 cannot keep it")
    if not double_quant:
        return NF4(packed, absmax, code, None, None, None, weight.shape, weight.dtype)
    code2 = dynamic_levels().to(weight.device)
    offset = absmax.mean() if len(absmax) else absmax.new_zeros(())
    blocks = F.pad(absmax - offset, (0, -len(absmax) % BLOCK2)).view(-1, BLOCK2)
    absmax2 = blocks.abs().amax(1)
    nearest = torch.bucketize(blocks * reciprocal(absmax2)[:, None], middles(code2), out_int32=True)
    return NF4(packed, nearest.to(torch.uint8).view(-1)[:len(absmax)].clone(), code, absmax2, code2, offset,
               weight.shape, weight.dtype)


def dequantise(nf4: NF4, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """-> the weight in `dtype` (fp32, bf16, fp16; fp64 through the reference), of nf4.shape, with no gradient."""
    parts = nf4.packed, nf4.absmax, nf4.code, nf4.absmax2, nf4.code2, nf4.offset
    return nf4_dequantise(*parts, nf4.shape.numel(), dtype).view(nf4.shape)
