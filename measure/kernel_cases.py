"""The uses of each kernel that are compiled and timed: inputs, what an ideal device needs, PyTorch's way beside it.

`CASES` has the shapes of real models, for the compiler's figures and the timings on a GPU; `CPU_CASES` those of a small
model, for the references, which are the product on a CPU.

D model width, H heads, K key-value heads, d head size, E experts, V vocabulary; `width` and `out` are the last
dimensions of what goes into a layer and of what comes out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from kernels.adamw import adamw_, init_state
from kernels.attention import attention, interval_mask
from kernels.cross_entropy import linear_cross_entropy
from kernels.grouped_mm import grouped_mm
from kernels.linear_kl import linear_kl
from kernels.lora import lora_linear
from kernels.nf4 import BLOCK, BLOCK2, dequantise, quantise
from kernels.rmsnorm import add_rmsnorm, rmsnorm
from kernels.rope import qk_norm_rope, rope
from kernels.swiglu import swiglu


@dataclass
class Case:
    """One use of an op."""
    name: str
    op: Callable
    inputs: Callable
    """(device, dtype, tokens) -> the arguments of `op`; the tensors that require a gradient are trained."""
    cost: Callable
    """tokens -> the bytes (in bf16) that an ideal device moves in the forward and in the backward pass, and the
    floating-point operations of the two."""
    torch: Callable | None = None
    """PyTorch's own op for the same result, with the same arguments."""
    beside: tuple = ()
    """What else is timed on a GPU: `reference`, `compiled` (torch.compile of the reference), `compiled torch`.
    References that work in pieces of a CPU's cache need tens of thousands of launches there, and are left out."""
    one_shot: bool = False
    """The gradients last for one backward pass, so that only forward and backward together can be timed."""


def differentiable(values) -> list:
    """The tensors that require a gradient, among the inputs of an op or its outputs, in lists and tuples as well."""
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor) and x.requires_grad]


def run(op, inputs, upstream=None):
    """Forward and backward of an op.

    -> [differentiable outputs..., gradients of the inputs that require them], upstream gradients. Without `upstream`
    they are random, the same in every run.
    """
    outputs, wanted = differentiable(op(*inputs)), differentiable(inputs)
    if upstream is None:
        upstream = [torch.empty_like(y) if y.is_meta else torch.randn(
            y.shape, generator=torch.Generator(y.device).manual_seed(i), device=y.device, dtype=y.dtype)
            for i, y in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, wanted, upstream) if wanted else ()
    return [y.detach() for y in outputs] + list(gradients), upstream


def random(device, dtype, *shape, scale=1.0, train=True) -> torch.Tensor:
    """Normally distributed values that want a gradient, unless `train` is off."""
    return torch.randn(shape, device=device, dtype=dtype).mul_(scale).requires_grad_(train)


# ---- attention

def attention_case(name, H, K, d, window=None, length=None) -> Case:
    """Causal; a sequence of documents of `length` tokens (None: one document)."""
    def inputs(device, dtype, tokens):
        q, k, v = (random(device, dtype, 1, tokens, heads, d) for heads in (H, K, K))
        at = torch.arange(tokens, dtype=torch.int32, device=device)[None]
        return q, k, v, True, window, None if length is None else at - at % length

    def cost(tokens):
        # Of its document, a token sees itself and what came before, at most `window` tokens.
        matmul = 2 * H * d * sum(min(at % (length or tokens) + 1, window or tokens) for at in range(tokens))
        return 4 * tokens * d * (H + K), 8 * tokens * d * (H + K), 2 * matmul, 5 * matmul

    def dense(q, k, v, causal, window, doc_start):
        mask = None if window is None and doc_start is None else interval_mask(
            q.shape[1], k.shape[1], causal, window, doc_start, q.device)
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask,
                                              is_causal=mask is None, enable_gqa=True).transpose(1, 2)
    return Case(f"attention {name}", attention, inputs, cost, dense)


# ---- the fused losses

def cross_entropy_case(D, V, frozen=False) -> Case:
    def inputs(device, dtype, tokens):
        weight = random(device, dtype, V, D, scale=D**-0.5, train=not frozen)
        return random(device, dtype, tokens, D), weight, torch.randint(0, V, (tokens,), device=device)

    def cost(tokens):
        return 4 * tokens * D + 2 * V * D * (1 if frozen else 2), 0, 2 * tokens * V * D * (2 if frozen else 3), 0

    def own(x, weight, labels):
        return F.cross_entropy((x @ weight.T).float(), labels, reduction="sum")
    name = f"cross_entropy {D}x{V}{', frozen' * frozen}"
    return Case(name, linear_cross_entropy, inputs, cost, own, ("compiled torch",), one_shot=True)


def linear_kl_case(D, teacher_D, V) -> Case:
    def inputs(device, dtype, tokens):
        student, teacher = ((random(device, dtype, tokens, width, train=train),
                             random(device, dtype, V, width, scale=width**-0.5, train=train))
                            for width, train in ((D, True), (teacher_D, False)))
        return *student, *teacher, torch.zeros(tokens, dtype=torch.int64, device=device)

    def cost(tokens):
        moved = tokens * (4 * D + 2 * teacher_D) + 2 * V * (2 * D + teacher_D)
        return moved, 0, 2 * tokens * V * (3 * D + teacher_D), 0

    def own(x, weight, teacher_x, teacher_weight, labels):
        log_q, log_p = (F.log_softmax((a @ b.T).float(), -1) for a, b in ((x, weight), (teacher_x, teacher_weight)))
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return Case(f"linear_kl {D} from {teacher_D}", linear_kl, inputs, cost, own, ("compiled torch",), one_shot=True)


# ---- layers

def rmsnorm_case(width, heads=1, add=False) -> Case:
    def inputs(device, dtype, tokens):
        streams = [random(device, dtype, tokens, heads, width) for _ in range(1 + add)]
        return *streams, random(device, dtype, width), 1e-5

    def cost(tokens):
        one_pass = tokens * heads * width * 2
        return (4 if add else 2) * one_pass, (4 if add else 3) * one_pass, 0, 0

    def own(x, *more):
        *residual, weight, eps = more
        s = x + residual[0] if add else x
        y = F.rms_norm(s, weight.shape, weight, eps)
        return (y, s) if add else y
    name = f"{'add_' * add}rmsnorm {f'{heads} heads of ' if heads > 1 else ''}{width}"
    return Case(name, add_rmsnorm if add else rmsnorm, inputs, cost, own, beside=("reference", "compiled"))


def rope_case(H, K, d, norm=False) -> Case:
    def inputs(device, dtype, tokens):
        angle = torch.rand(1, tokens, d // 2, device=device) * 6.28
        q, k = (random(device, dtype, 1, tokens, heads, d) for heads in (H, K))
        weights = [random(device, dtype, d) for _ in range(2 * norm)]
        return q, k, *weights, angle.cos(), angle.sin(), *[1e-6] * norm

    def cost(tokens):
        one_pass, angles = tokens * (H + K) * d * 2, tokens * d * 4
        return 2 * one_pass + angles, (3 if norm else 2) * one_pass + angles, 0, 0

    def own(q, k, cos, sin):
        cos, sin = (torch.cat([a, a], -1).unsqueeze(2) for a in (cos, sin))
        return tuple(x * cos + torch.cat([-x[..., d // 2:], x[..., :d // 2]], -1) * sin for x in (q, k))
    return Case(f"{'qk_norm_' * norm}rope {H}/{K} of {d}", qk_norm_rope if norm else rope, inputs, cost,
                None if norm else own, beside=("reference", "compiled"))


def swiglu_case(width) -> Case:
    return Case(f"swiglu {width}", swiglu,
                lambda device, dtype, tokens: [random(device, dtype, tokens, width) for _ in range(2)],
                lambda tokens: (6 * tokens * width, 10 * tokens * width, 0, 0),
                lambda gate, up: F.silu(gate) * up, beside=("reference", "compiled"))


def lora_case(name, width, *outs, rank=16) -> Case:
    """Layers of one input, from `width` to each of `outs`."""
    def inputs(device, dtype, tokens):
        weights = [random(device, dtype, out, width, scale=width**-0.5, train=False) for out in outs]
        a = [random(device, dtype, rank, width, scale=width**-0.5) for _ in outs]
        b = [random(device, dtype, out, rank, scale=rank**-0.5) for out in outs]
        return random(device, dtype, tokens, width), weights, [None] * len(outs), a, b, [2.0] * len(outs)

    def own(x, weights, biases, *adapters):
        return [F.linear(x, w) + scale * F.linear(F.linear(x, a), b) for w, a, b, scale in zip(weights, *adapters)]

    def cost(tokens):
        weights, adapters = width * sum(outs), rank * (width * len(outs) + sum(outs))
        moved = tokens * (width + sum(outs) + rank * len(outs)) + weights + adapters
        return (2 * moved, 2 * (moved + tokens * width + adapters),
                2 * tokens * (weights + adapters), 2 * tokens * (weights + 2 * adapters))
    return Case(f"lora {name}", lora_linear, inputs, cost, own, beside=("compiled torch",))


def grouped_mm_case(E, width, out, per_token=2) -> Case:
    """All experts get the same number of tokens."""
    def inputs(device, dtype, tokens):
        x = random(device, dtype, per_token * tokens, width)
        offsets = torch.arange(1, E + 1, dtype=torch.int32, device=device) * len(x) // E
        return x, random(device, dtype, E, out, width, scale=width**-0.5), offsets

    def cost(tokens):
        moved, matmul = 2 * (per_token * tokens * (width + out) + E * width * out), 2 * per_token * tokens * width * out
        return moved, 2 * moved, matmul, 2 * matmul
    return Case(f"grouped_mm {width} to {out}", grouped_mm, inputs, cost,
                lambda x, weight, offsets: F.grouped_mm(x, weight.transpose(1, 2), offs=offsets))


# ---- weights and their optimizer

def quantise_case(out, width) -> Case:
    return Case(f"nf4 quantise {out} x {width}", quantise,
                lambda device, dtype, tokens: (random(device, dtype, out, width, train=False),),
                lambda tokens: (out * width * 2 + out * width // 2 + out * width // BLOCK * 4, 0, 0, 0))


def dequantise_case(out, width) -> Case:
    N = out * width
    return Case(f"nf4 dequantise {out} x {width}", dequantise,
                lambda device, dtype, tokens: (quantise(random(device, dtype, out, width, train=False)), dtype),
                lambda tokens: (N // 2 + N // BLOCK + N // BLOCK // BLOCK2 * 4 + 2 * N, 0, 0, 0))


def adamw_case(name, dtype, kinds, bytes_per_parameter) -> Case:
    """The tensors of one layer of Llama-3-8B; `kinds` are those of the matrices' and of the norms' optimizer states."""
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336),
              (4096,), (4096,)]
    table = {}

    def op(params, grads, states):
        adamw_(params, grads, states, 1e-4, (0.9, 0.95), 1e-8, 0.1, step=10, table=table)

    def inputs(device, _, tokens):
        params, grads = ([torch.randn(shape, device=device, dtype=dtype) for shape in shapes] for _ in range(2))
        return params, grads, [init_state(p, kinds[p.ndim == 1]) for p in params]
    return Case(name, op, inputs, lambda tokens: (int(bytes_per_parameter * sum(map(math.prod, shapes))), 0, 0, 0))


# ---- by kernel file

CASES = {
    # Llama-3-8B and Llama-3.2-1B, one document and packed ones; Mistral-7B's window.
    "attention": [attention_case("Llama-3-8B", 32, 8, 128),
                  attention_case("Llama-3-8B, documents of 1024", 32, 8, 128, length=1024),
                  attention_case("Llama-3.2-1B", 32, 8, 64),
                  attention_case("Llama-3.2-1B, documents of 1024", 32, 8, 64, length=1024),
                  attention_case("Mistral-7B, window of 4096", 32, 8, 128, window=4096)],
    # The heads of Llama-3.2-1B, of Llama-3-8B, trained and frozen, and of Mistral-7B.
    "cross_entropy": [cross_entropy_case(2048, 128256), cross_entropy_case(4096, 128256),
                      cross_entropy_case(4096, 128256, frozen=True), cross_entropy_case(4096, 32000)],
    # Llama-3.2-1B, Llama-3-8B, Qwen3's norm over the 128 elements of a head.
    "rmsnorm": [rmsnorm_case(2048), rmsnorm_case(4096), rmsnorm_case(128, heads=32), rmsnorm_case(2048, add=True),
                rmsnorm_case(4096, add=True)],
    # Llama-3.2-1B, Llama-3-8B, Qwen3-8B.
    "rope": [rope_case(32, 8, 64), rope_case(32, 8, 128), rope_case(32, 8, 128, norm=True)],
    "swiglu": [swiglu_case(8192), swiglu_case(14336), swiglu_case(12288)],
    # Llama-3-8B from itself before training, and from it the 1B model of Llama-3.2.
    "linear_kl": [linear_kl_case(4096, 4096, 128256), linear_kl_case(2048, 4096, 128256)],
    "adamw": [adamw_case("adamw fp32", torch.float32, ("fp32", "fp32"), 28),
              adamw_case("adamw int8", torch.float32, ("int8", "fp32"), 16.375),
              adamw_case("adamw int8+ecc", torch.bfloat16, ("int8+ecc", "fp32+ecc"), 12.375)],
    # The largest and the square weight of Llama-3-8B.
    "nf4": [quantise_case(4096, 14336), dequantise_case(4096, 14336), dequantise_case(4096, 4096)],
    # Mixtral-8x7B: into and out of the MLP of 14336, 8 experts, 2 of them for each token.
    "grouped_mm": [grouped_mm_case(8, 4096, 14336), grouped_mm_case(8, 14336, 4096)],
    # Llama-3-8B.
    "lora": [lora_case("q/k/v 8B", 4096, 4096, 1024, 1024), lora_case("o 8B", 4096, 4096),
             lora_case("gate/up 8B", 4096, 14336, 14336), lora_case("down 8B", 14336, 4096)],
}
CPU_CASES = {"cpu_rmsnorm": rmsnorm_case(1024), "cpu_add_rmsnorm": rmsnorm_case(1024, add=True),
             "cpu_swiglu": swiglu_case(2752), "cpu_rope": rope_case(8, 4, 64),
             "cpu_attention_documents": attention_case("documents of 256", 8, 4, 64, length=256),
             "cpu_linear_cross_entropy_32k": cross_entropy_case(256, 32768)}
