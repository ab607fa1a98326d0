"""Linear layers with low-rank adapters (LoRA; Hu et al., 2021, arXiv 2106.09685), several on one input at once.

    S = x [A_1; A_2; ...]^T          y_i = x W_i^T + bias_i + scale_i S_i B_i^T         (W_i, bias_i frozen)
    dS_i = scale_i dy_i B_i          dx = sum_i dy_i W_i + dS [A_1; A_2; ...]
    d[A_1; A_2; ...] = dS^T x        dB_i = scale_i dy_i^T S_i

M tokens, x [M, in], W_i [out_i, in], A_i [r_i, in], B_i [out_i, r_i], S [M, sum of r_i], n bytes per element. A plain
linear layer takes 2 M in out_i operations each way, with no gradient of the weight. The adapters add 2 M r (in + out_i)
forward and twice that backward, which is nothing for r << in. Their memory traffic is not: S reads x again, and
S_i B_i^T is added into y_i, n M (in + 2 sum out_i) bytes forward; at 8192 tokens a tenth of the matmuls' time in a
layer of Llama-3-8B. So q/k/v and gate/up read x once for all of their A's, and the matmul itself (addmm) does the
addition and applies scale_i. Kept for the backward pass are x, which the layer before kept anyway, and S.

There is no Triton here. The time goes to the matmuls with W, where the library reaches the card's rate and a Triton
matmul on Hopper does not. A kernel that adds S B^T in the epilogue of the matmul with W would save 2 n M out bytes, 6 %
of the time, and lose more than that to the library (LoRAFusion, arXiv 2510.00206, measures such kernels).

4-bit weights (kernels/nf4.py) are dequantised just before their matmul, one at a time and in each pass anew; torch's
allocator gives the memory of one to the next.
"""

import torch
import torch.nn.functional as F

from kernels.backend import autocast_dtype, without_autocast
from kernels.nf4 import NF4, dequantise


def weight_for_matmul(weight, dtype: torch.dtype) -> torch.Tensor:
    return dequantise(weight, dtype) if isinstance(weight, NF4) else weight.to(dtype)


def scaled_matmul(factor: float, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """factor * left @ right; the matmul itself applies the factor, to its sums before they are rounded."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=factor)


class LoraLinear(torch.autograd.Function):
    """tensors: the biases, then the A's, then the B's. Autograd casts each gradient to the dtype of its tensor."""

    @staticmethod
    def forward(ctx, dtype, weights, scales, x, *tensors):
        count = len(weights)
        biases, a, b = (tensors[i * count:(i + 1) * count] for i in range(3))
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        low = rows @ torch.cat(a).to(dtype).T                                       # S [M, sum of r_i]
        outputs = []
        for weight, bias, part, each, scale in zip(weights, biases, low.split([len(each) for each in a], 1), b, scales):
            y = F.linear(rows, weight_for_matmul(weight, dtype), None if bias is None else bias.to(dtype))
            y.addmm_(part, each.to(dtype).T, alpha=scale)
            outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
        ctx.save_for_backward(rows, low, *a, *b)
        ctx.dtype, ctx.weights, ctx.scales, ctx.shape = dtype, weights, scales, x.shape
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        dtype, scales, count = ctx.dtype, ctx.scales, len(ctx.scales)
        rows, low, *saved = ctx.saved_tensors
        a, b = saved[:count], saved[count:]
        need_x, *needs = ctx.needs_input_grad[3:]
        need_bias, need_a, need_b = (needs[i * count:(i + 1) * count] for i in range(3))
        with without_autocast(rows):
            dy = [y.reshape(-1, y.shape[-1]) for y in upstream]
            ranks = [len(each) for each in a]
            dbias = [y.sum(0) if need else None for y, need in zip(dy, need_bias)]
            db = [scaled_matmul(scale, y.T, part) if need else None
                  for scale, y, part, need in zip(scales, dy, low.split(ranks, 1), need_b)]
            da, dx = [None] * count, None
            if need_x or any(need_a):
                dlow = torch.cat([scaled_matmul(scale, y, each.to(dtype)) for scale, y, each in zip(scales, dy, b)], 1)
            if any(need_a):
                da = (dlow.T @ rows).split(ranks)
            if need_x:
                dx = dlow @ torch.cat(a).to(dtype)
                for y, weight in zip(dy, ctx.weights):
                    dx.addmm_(y, weight_for_matmul(weight, dtype))
                dx = dx.view(ctx.shape)
        return None, None, None, dx, *dbias, *da, *db


# ---- public op

def lora_linear(x: torch.Tensor, weights, biases, a, b, scales) -> tuple[torch.Tensor, ...]:
    """One or several frozen linear layers of the same input, each with its adapter.

    x         [..., in]
    weights   of each layer [out_i, in], or an NF4 record of that shape; none may require a gradient
    biases    of each layer [out_i] or None; gets a gradient if it requires one
    a, b      of each layer [r_i, in] and [out_i, r_i]; fp32 parameters beside a bf16 x are fine
    scales    of each layer alpha / r, or alpha / sqrt(r) (rsLoRA; Kalajdzievski, 2023, arXiv 2312.03732)
    ->        a tuple of y_i [..., out_i], of one element for one layer

    All matmuls are in autocast's dtype, without autocast in x's; gradients come in the dtype of what they belong to.
    ValueError where a weight requires a gradient, has another dtype than x outside of autocast, or the lists differ
    in length. There is no dropout on the adapter's input: it would be another x for each layer, to be kept for each.
    """
    count = len(weights)
    if not count or {len(biases), len(a), len(b), len(scales)} != {count}:
        raise ValueError(f"lora_linear needs one weight, bias (or None), A, B and scale per layer, not {count}, "
                         f"{len(biases)}, {len(a)}, {len(b)} and {len(scales)}")
    autocast = autocast_dtype(x)
    dtype = autocast or x.dtype
    for weight in weights:
        if isinstance(weight, NF4):
            continue
        if weight.requires_grad:
            raise ValueError(f"a weight of shape {tuple(weight.shape)} requires a gradient, but LoRA's weights are "
                             "frozen; call requires_grad_(False) on it, or train it without an adapter")
        if weight.dtype != dtype and not autocast:
            raise ValueError(f"x is {dtype} and a weight {weight.dtype}; convert one of them or use torch.autocast")
    return LoraLinear.apply(dtype, tuple(weights), tuple(map(float, scales)), x, *biases, *a, *b)
