"""The uses of each kernel that are checked, compiled and timed: inputs, ideal traffic, and what stands beside it.

`examples(kernel)` are small and odd, for the check against float64; `cases(kernel)` are the shapes of real models, for
the compiler's figures and the timings on a GPU.

B sequences, T tokens, D model width, H heads, K key-value heads, d head size, F MLP width, E experts, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.adamw import Table, adamw_, init_state
from kernels.attention import attention, sdpa
from kernels.cross_entropy import IGNORE, linear_cross_entropy
from kernels.grouped_mm import grouped_mm
from kernels.linear_kl import linear_kl
from kernels.lora import lora_linear
from kernels.nf4 import BLOCK, BLOCK2, LEVELS, NF4, dequantise, dynamic_levels, quantise
from kernels.rmsnorm import add_rmsnorm, rmsnorm
from kernels.rope import qk_norm_rope, rope
from kernels.swiglu import swiglu


def nothing(tokens: int) -> tuple[int, int]:
    return 0, 0


@dataclass
class Case:
    """One use of an op."""
    name: str
    op: Callable
    inputs: Callable
    """(device, dtype, tokens) -> the arguments of `op`; those that require gradients get them"""
    traffic: Callable = nothing
    """tokens -> bytes (in bf16) that an ideal device moves in the forward and in the backward pass"""
    work: Callable = nothing
    """tokens -> floating-point operations of the forward and of the backward pass"""
    torch: Callable | None = None
    """PyTorch's own op for the same, with the same arguments"""
    beside: tuple = ("reference", "compiled")
    """What else is timed on a GPU: `reference`, `compiled` (torch.compile of the reference), `compiled torch`.
    References that work in pieces of a CPU's cache need tens of thousands of launches there, and are left out."""
    one_shot: bool = False
    """Gradients are kept for one backward pass, so that only forward and backward together can be timed."""


# ---- attention

def attention_cases():
    """Llama-3-8B and Llama-3.2-1B, one document and packed ones of 1024 tokens; Mistral-7B's window."""
    def visible_pairs(tokens, causal, window, length) -> int:
        """Pairs of a query and a key that it sees, in a sequence of documents of `length` tokens.

        4 tokens, causal, window 2: the queries see 1, 2, 2, 2 keys: 7 pairs.
        """
        def inside(n):
            w = min(n, window or n)
            before = w * (w + 1) // 2 + (n - w) * w
            return before if causal else 2 * before - n
        documents, rest = divmod(tokens, length)
        return documents * inside(length) + inside(rest)

    def case(name, H, K, d, causal=True, window=None, length=None, past=0):
        """`tokens` queries in documents of `length` tokens (None: one document), after `past` keys of a cache."""
        def inputs(device, dtype, tokens):
            q, k, v = (torch.randn(1, n, heads, d, device=device, dtype=dtype, requires_grad=True)
                       for n, heads in ((tokens, H), (tokens + past, K), (tokens + past, K)))
            at = torch.arange(tokens, dtype=torch.int32, device=device)[None]
            return q, k, v, causal, window, None if length is None else at - at % length

        def traffic(tokens):
            return 4 * tokens * d * (H + K), 8 * tokens * d * (H + K)

        def work(tokens):
            matmul = 2 * H * d * visible_pairs(tokens, causal, window, length or tokens)
            return 2 * matmul, 5 * matmul
        own = sdpa if window is None and length is None else None
        return Case(f"attention {name}", attention, inputs, traffic, work, torch=own, beside=())

    return [
        case("causal 4/2 heads of 16", 4, 2, 16), case("both ways 3/1 heads of 40", 3, 1, 40, causal=False),
        case("documents of 9", 2, 1, 20, length=9), case("documents of 9 both ways", 2, 2, 16, False, None, 9),
        case("window of 5 after 30 keys", 2, 1, 16, window=5, past=30),
    ], [
        case("Llama-3-8B", 32, 8, 128), case("Llama-3-8B, documents of 1024", 32, 8, 128, length=1024),
        case("Llama-3.2-1B", 32, 8, 64), case("Llama-3.2-1B, documents of 1024", 32, 8, 64, length=1024),
        case("Mistral-7B, window of 4096", 32, 8, 128, window=4096),
    ]


# ---- the fused losses

def cross_entropy_cases():
    """The heads of Llama-3.2-1B and Llama-3-8B, the latter also frozen, and of Mistral-7B."""
    def case(name, D, V, frozen=False, ignored=False, **options):
        def inputs(device, dtype, tokens):
            x = torch.randn(tokens, D, device=device, dtype=dtype, requires_grad=True)
            weight = (torch.randn(V, D, device=device, dtype=dtype) * D**-0.5).requires_grad_(not frozen)
            labels = torch.randint(0, V, (tokens,), device=device)
            if ignored:
                labels[::5] = IGNORE
            return x, weight, labels

        def own(x, weight, labels):
            z = (x @ weight.T).float()
            loss = F.cross_entropy(z, labels, reduction="sum")
            if "z_loss" in options:
                loss = loss + options["z_loss"] * torch.logsumexp(z, -1).square()[labels != IGNORE].sum()
            return loss
        matrix = 2 * V * D
        return Case(name, lambda *given: linear_cross_entropy(*given, **options)[0], inputs,
                    lambda tokens: (4 * tokens * D + matrix * (1 if frozen else 2), 0),
                    lambda tokens: (tokens * matrix * (2 if frozen else 3), 0), own,
                    beside=("compiled torch",), one_shot=True)

    return [
        case("cross_entropy 16x37", 16, 37, ignored=True),
        case("cross_entropy 33x300, frozen", 33, 300, frozen=True, ignored=True),
        case("cross_entropy, z-loss", 16, 130, ignored=True, z_loss=1e-2),
    ], [
        case("cross_entropy 2048x128256", 2048, 128256), case("cross_entropy 4096x128256", 4096, 128256),
        case("cross_entropy 4096x128256, frozen", 4096, 128256, frozen=True),
        case("cross_entropy 4096x32000", 4096, 32000),
    ]


def linear_kl_cases():
    """Llama-3-8B from itself before training, and from it the 1B model of Llama-3.2."""
    def case(name, D, teacher_D, V, frozen=False, ignored=False, **options):
        def inputs(device, dtype, tokens):
            x, teacher_x = (torch.randn(tokens, d, device=device, dtype=dtype) for d in (D, teacher_D))
            weight, teacher_weight = (torch.randn(V, d, device=device, dtype=dtype) * d**-0.5 for d in (D, teacher_D))
            labels = torch.zeros(tokens, dtype=torch.int64, device=device)
            if ignored:
                labels[::5] = IGNORE
            return x.requires_grad_(), weight.requires_grad_(not frozen), teacher_x, teacher_weight, labels

        def own(x, weight, teacher_x, teacher_weight, labels):
            temperature = options.get("temperature", 1.0)
            log_q = F.log_softmax((x @ weight.T).float() / temperature, -1)
            log_p = F.log_softmax((teacher_x @ teacher_weight.T).float() / temperature, -1)
            kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            return temperature**2 * kl[labels != IGNORE].sum()
        heads = 2 * V * ((1 if frozen else 2) * D + teacher_D)
        return Case(name, lambda *given: linear_kl(*given, **options)[0], inputs,
                    lambda tokens: (tokens * (4 * D + 2 * teacher_D) + heads, 0),
                    lambda tokens: (2 * tokens * V * ((2 if frozen else 3) * D + teacher_D), 0), own,
                    beside=("compiled torch",), one_shot=True)

    return [
        case("linear_kl 16x37", 16, 16, 37, ignored=True),
        case("linear_kl 16 from 33, temperature 2", 16, 33, 300, temperature=2.0),
        case("linear_kl, frozen, temperature 0.5", 16, 9, 130, frozen=True, ignored=True, temperature=0.5),
    ], [
        case("linear_kl 4096 from 4096", 4096, 4096, 128256), case("linear_kl 2048 from 4096", 2048, 4096, 128256),
    ]


# ---- layers

def rmsnorm_cases():
    """The widths of Llama-3.2-1B and Llama-3-8B, and Qwen3's norm over the 128 elements of a head."""
    def case(name, width, heads=1, add=False):
        def inputs(device, dtype, tokens):
            shape = (tokens, heads, width) if heads > 1 else (tokens, width)
            x = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(1 + add)]
            return *x, torch.randn(width, device=device, dtype=dtype, requires_grad=True), 1e-5

        def traffic(tokens):
            one_pass = tokens * heads * width * 2
            return (4 * one_pass, 4 * one_pass) if add else (2 * one_pass, 3 * one_pass)
        own = None if add else lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps)
        return Case(name, add_rmsnorm if add else rmsnorm, inputs, traffic, torch=own)

    return [
        case("rmsnorm 37", 37), case("rmsnorm 3 heads of 16", 16, heads=3), case("add_rmsnorm 130", 130, add=True),
    ], [
        case("rmsnorm 2048", 2048), case("rmsnorm 4096", 4096), case("rmsnorm 32 heads of 128", 128, heads=32),
        case("add_rmsnorm 2048", 2048, add=True), case("add_rmsnorm 4096", 4096, add=True),
    ]


def rope_cases():
    """Llama-3.2-1B, Llama-3-8B, Qwen3-8B."""
    def case(name, H, K, d, norm=False):
        def inputs(device, dtype, tokens):
            angle = torch.rand(1, tokens, d // 2, device=device) * 6.28
            x = [torch.randn(1, tokens, h, d, device=device, dtype=dtype, requires_grad=True) for h in (H, K)]
            weights = [torch.randn(d, device=device, dtype=dtype, requires_grad=True) for _ in range(2 * norm)]
            return *x, *weights, angle.cos(), angle.sin(), *[1e-6] * norm

        def traffic(tokens):
            one_pass, angles = tokens * (H + K) * d * 2, tokens * d * 4
            return 2 * one_pass + angles, (3 if norm else 2) * one_pass + angles
        return Case(f"{'qk_norm_rope' if norm else 'rope'} {name}", qk_norm_rope if norm else rope, inputs, traffic)

    return [
        case("3/1 of 6", 3, 1, 6), case("4/2 of 10", 4, 2, 10), case("6/2 of 16", 6, 2, 16, norm=True),
    ], [
        case("32/8 of 64", 32, 8, 64), case("32/8 of 128", 32, 8, 128), case("32/8 of 128", 32, 8, 128, norm=True),
    ]


def swiglu_cases():
    """Llama-3.2-1B, Qwen3-8B, Llama-3-8B."""
    def case(width):
        def inputs(device, dtype, tokens):
            return [torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
        return Case(f"swiglu {width}", swiglu, inputs, lambda tokens: (6 * tokens * width, 10 * tokens * width),
                    torch=lambda gate, up: F.silu(gate) * up)

    return [case(37), case(128)], [case(8192), case(12288), case(14336)]


def lora_cases():
    """The linear layers of Llama-3-8B."""
    def ours(x, *tensors):
        """tensors: the weights, the A's, the B's."""
        count = len(tensors) // 3
        weights, a, b = (tensors[i * count:(i + 1) * count] for i in range(3))
        return lora_linear(x, weights, [None] * count, a, b, [2.0] * count)

    def own(x, *tensors):
        count = len(tensors) // 3
        weights, a, b = (tensors[i * count:(i + 1) * count] for i in range(3))
        return tuple(F.linear(x, w) + 2.0 * F.linear(F.linear(x, p), q) for w, p, q in zip(weights, a, b))

    def case(name, width, *outs, rank=16):
        def inputs(device, dtype, tokens):
            def random(*shape, scale=1.0, train=True):
                return torch.randn(shape, device=device, dtype=dtype).mul_(scale).requires_grad_(train)
            return (random(tokens, width), *(random(out, width, scale=width**-0.5, train=False) for out in outs),
                    *(random(rank, width, scale=width**-0.5) for _ in outs),
                    *(random(out, rank, scale=rank**-0.5) for out in outs))
        weights, adapters = width * sum(outs), rank * (width * len(outs) + sum(outs))

        def traffic(tokens):
            activations, low = tokens * (width + sum(outs)), tokens * rank * len(outs)
            return (2 * (activations + low + weights + adapters),
                    2 * (activations + tokens * width + low + weights + 2 * adapters))

        def work(tokens):
            return 2 * tokens * (weights + adapters), 2 * tokens * (weights + 2 * adapters)
        return Case(f"lora {name}", ours, inputs, traffic, work, own, beside=("compiled torch",))

    return [case("37 to 19", 37, 19, rank=3), case("64 to 64, 16, 16", 64, 64, 16, 16, rank=4)], [
        case("q/k/v 8B", 4096, 4096, 1024, 1024), case("o 8B", 4096, 4096),
        case("gate/up 8B", 4096, 14336, 14336), case("down 8B", 14336, 4096),
    ]


def grouped_mm_cases():
    """Mixtral-8x7B: into and out of the MLP of 14336, 8 experts, 2 of them for each token."""
    def even(rows, experts, device):
        return torch.arange(1, experts + 1, dtype=torch.int32, device=device) * rows // experts

    def uneven(rows, experts, device):
        """The first expert gets nothing, the second one row, the last the most."""
        ends = [0, *(1 + 2 * e for e in range(experts - 2)), rows]
        return torch.tensor(ends, dtype=torch.int32, device=device)

    def own(x, weight, offsets):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)

    def case(name, E, width, out, per_token=2, offsets=even):
        def inputs(device, dtype, tokens):
            x = torch.randn(per_token * tokens, width, device=device, dtype=dtype)
            weight = torch.randn(E, out, width, device=device, dtype=dtype).mul_(width**-0.5)
            return x.requires_grad_(), weight.requires_grad_(), offsets(len(x), E, device).to(torch.int32)

        def traffic(tokens):
            one_matmul = 2 * (per_token * tokens * (width + out) + E * width * out)
            return one_matmul, 2 * one_matmul

        def work(tokens):
            one_matmul = 2 * per_token * tokens * width * out
            return one_matmul, 2 * one_matmul
        return Case(name, grouped_mm, inputs, traffic, work, torch=own, beside=())

    return [
        case("grouped_mm 3 of 37 x 21", 3, 37, 21), case("grouped_mm uneven", 5, 64, 48, offsets=uneven),
    ], [
        case("grouped_mm 4096 to 14336", 8, 4096, 14336), case("grouped_mm 14336 to 4096", 8, 14336, 4096),
    ]


# ---- weights and their optimizer

def random_nf4(shape: torch.Size, device) -> NF4:
    """A record of these sizes; also on the meta device, where the reference cannot quantise."""
    blocks = -(-shape.numel() // BLOCK)
    packed = torch.randint(0, 256, (-(-shape.numel() // 2),), dtype=torch.uint8, device=device)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
    return NF4(packed, absmax, torch.tensor(LEVELS, device=device), torch.rand(-(-blocks // BLOCK2), device=device),
               dynamic_levels().to(device), torch.rand((), device=device), shape, torch.bfloat16)


def nf4_cases():
    """The largest and the square weight of Llama-3-8B."""
    def case(*shape):
        N = math.prod(shape)
        return Case(f"nf4 dequantise {' x '.join(map(str, shape))}", dequantise,
                    lambda device, dtype, tokens: (random_nf4(torch.Size(shape), device), dtype),
                    lambda tokens: (N // 2 + N // BLOCK + N // BLOCK // BLOCK2 * 4 + 2 * N, 0), beside=())

    def quantise_case(*shape):
        N = math.prod(shape)
        return Case(f"nf4 quantise {' x '.join(map(str, shape))}", quantise,
                    lambda device, dtype, tokens: (torch.randn(shape, device=device, dtype=dtype),),
                    lambda tokens: (2 * N + N // 2 + N // BLOCK * 4, 0), beside=())

    def example(*shape):
        """There and back, times x: the check compares what has gradients, and one wrong code would show."""
        def inputs(device, dtype, tokens):
            x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
            return x, [torch.randn(shape, device=device)]
        return Case(f"nf4 {' x '.join(map(str, shape))}",
                    lambda x, weight: x * dequantise(quantise(weight[0]), x.dtype), inputs)

    return [example(64, 300), example(7, 37), example(1)], [case(4096, 14336), case(4096, 4096),
                                                            quantise_case(4096, 14336)]


def adamw_cases():
    """The tensors of one layer of Llama-3-8B."""
    settings = (1e-4, (0.9, 0.95), 1e-8, 0.1)              # learning rate, betas, eps, weight decay
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336),
              (4096,), (4096,)]

    def layer(device, dtype):
        return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]

    def torch_fused(params, grads, states):
        lr, (beta1, beta2), eps, decay = settings
        steps = [torch.full((), 10.0, device=params[0].device)] * len(params)
        torch._fused_adamw_(params, grads, [s.m for s in states], [s.v for s in states], [], steps, lr=lr, beta1=beta1,
                            beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False, maximize=False)

    def case(name, dtype, kinds, bytes_a_parameter, own=None):
        """kinds: of the matrices' states and of the norms'."""
        table = Table()

        def op(params, grads, states):
            adamw_(params, grads, states, *settings, step=10, table=table)

        def inputs(device, _, tokens):
            params = layer(device, dtype)
            return params, layer(device, dtype), [init_state(p, kinds[p.ndim == 1]) for p in params]
        count = sum(math.prod(shape) for shape in shapes)
        return Case(name, op, inputs, lambda tokens: (int(bytes_a_parameter * count), 0), torch=own, beside=())

    def example(kind):
        """Three steps from zero; in float64, for the truth, with exact weights and moments, whatever the kind."""
        def op(weights, grad):
            exact = weights.dtype == torch.float64
            dtype = weights.dtype if exact else torch.bfloat16 if "+" in kind else torch.float32
            param = weights.detach().to(dtype).clone(memory_format=torch.contiguous_format)
            state = init_state(param, "fp32" if exact else kind)
            for step in (1, 2, 3):
                adamw_([param], [grad * step], [state], *settings, step)
            return weights + (param.to(weights.dtype) - weights).detach()

        def inputs(device, dtype, tokens):
            return (torch.randn(3, 41, tokens, device=device, dtype=dtype).requires_grad_(),
                    torch.randn(3, 41, tokens, device=device, dtype=dtype))
        return Case(f"adamw {kind}", op, inputs)

    return [example(kind) for kind in ("fp32", "fp32+ecc", "int8", "int8+ecc")], [
        case("adamw fp32", torch.float32, ("fp32", "fp32"), 28, torch_fused),
        case("adamw int8", torch.float32, ("int8", "fp32"), 16.375),
        case("adamw int8+ecc", torch.bfloat16, ("int8+ecc", "fp32+ecc"), 12.375),
    ]


# ---- by kernel file

KERNELS = {"attention": attention_cases, "cross_entropy": cross_entropy_cases, "rmsnorm": rmsnorm_cases,
           "rope": rope_cases, "swiglu": swiglu_cases, "linear_kl": linear_kl_cases, "adamw": adamw_cases,
           "nf4": nf4_cases, "grouped_mm": grouped_mm_cases, "lora": lora_cases}


def examples(kernel: str) -> list[Case]:
    """Small and odd uses of kernels/<kernel>.py, for the check."""
    return KERNELS[kernel]()[0]


def cases(kernel: str) -> list[Case]:
    """Uses of kernels/<kernel>.py in the shapes of real models."""
    return KERNELS[kernel]()[1]
