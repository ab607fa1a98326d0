"""Kullback-Leibler divergence of a linear head from a teacher's: distillation without either one's logits.

    s = x W^T / tau   q = softmax(s)        t = x' W'^T / tau   p = softmax(t)        x', W' the teacher's
    loss = tau^2 sum over labelled tokens of  sum_v p (log p - log q)                 dz = tau (q - p)
    dx = dz W      dW = dz^T x

tau^2 keeps the gradients' size at any temperature tau (Hinton et al., 2015, arXiv 1503.02531). M tokens, x [M, D],
W [V, D], x' [M, D'], W' [V, D'].

It is built like cross_entropy.py: chunks of tokens, gradients found in the forward pass in place of the student's
logits, a backward pass that only scales them. The logits of both heads count in a chunk's bytes. The matmuls cost
6 M V D operations (4 with a frozen head) and 2 M V D' for the teacher; the Triton kernel reads both logits twice and
writes one, 10 M V bytes in bf16. No log-probability is ever stored: one pass finds the maxima and sums of both
softmaxes and the mean of t - s, and
    KL(p || q) = E_p[t - s] + logsumexp(s) - logsumexp(t)
The last two nearly cancel when the student is close, so maximum is subtracted from maximum and sum divided by sum.
"""

import torch

from kernels import cross_entropy as shared
from kernels.backend import autocast_dtype, jit, launch, op, power_of_two, tl, use_triton
from kernels.cross_entropy import load_row

BLOCK = 4096                      # logits of each row that a program holds
# Elements the reference works on at a time, so that its intermediates stay in the CPU's cache.
CACHED = 2**18


# ---- reference

def reference_rows(z, teacher_z, temperature, want_dz):
    """z, teacher_z [m, V] in fp32 or wider -> loss [m]; z becomes dz."""
    loss = z.new_empty(len(z))
    block = max(1, CACHED // max(1, z.shape[1]))
    for i in range(0, len(z), block):
        part = z[i:i + block]
        log_q = torch.log_softmax(part / temperature, -1)
        log_p = torch.log_softmax(teacher_z[i:i + block] / temperature, -1)
        p = log_p.exp()
        loss[i:i + block] = (p * (log_p - log_q)).sum(-1) * temperature**2
        if want_dz:
            torch.mul(log_q.exp_().sub_(p), temperature, out=part)
    return loss


# ---- Triton

@jit
def row_kernel(S, T, LOSS, V, stride, temperature, DZ: tl.constexpr, BLOCK: tl.constexpr):
    """A program takes a row of the student's logits S [M, V] and the teacher's T [M, V], in two passes.

    Rows are `stride` elements apart; LOSS [M]. The second pass puts the gradient in place of S. It begins with the last
    columns, which the cache still holds.
    """
    row = tl.program_id(0)
    S += row.to(tl.int64) * stride
    T += row.to(tl.int64) * stride
    inverse = 1 / temperature
    top_s = -3e38
    top_t = -3e38
    total_s = tl.zeros([BLOCK], tl.float32)
    total_t = tl.zeros([BLOCK], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        s = load_row(S, col, V, stride) * inverse
        t = load_row(T, col, V, stride) * inverse
        difference = t - s
        s = tl.where(col < V, s, float("-inf"))
        t = tl.where(col < V, t, float("-inf"))
        new_s = tl.maximum(top_s, tl.max(s, 0))
        new_t = tl.maximum(top_t, tl.max(t, 0))
        old_s = tl.exp(top_s - new_s)
        s = tl.exp(s - new_s)
        total_s = total_s * old_s + s
        old_t = tl.exp(top_t - new_t)
        t = tl.exp(t - new_t)
        total_t = total_t * old_t + t
        dot = dot * old_t + t * difference
        top_s = new_s
        top_t = new_t
    sum_s = tl.sum(total_s, 0)
    sum_t = tl.sum(total_t, 0)
    shift = (top_s - top_t) + tl.log(sum_s / sum_t)          # logsumexp(s) - logsumexp(t)
    loss = tl.sum(dot, 0) / sum_t + shift
    tl.store(LOSS + row, loss * temperature * temperature)

    if DZ:
        scale_s = temperature / sum_s
        scale_t = temperature / sum_t
        for back in range(0, tl.cdiv(V, BLOCK)):
            col = (tl.cdiv(V, BLOCK) - 1 - back) * BLOCK + tl.arange(0, BLOCK)
            s = load_row(S, col, V, stride) * inverse
            t = load_row(T, col, V, stride) * inverse
            dz = tl.exp(s - top_s) * scale_s - tl.exp(t - top_t) * scale_t
            tl.store(S + col, dz, mask=col < stride)


def kernel_rows(z, teacher_z, temperature, want_dz):
    """As reference_rows; z and teacher_z in any dtypes, their rows equally far apart."""
    loss = torch.empty(len(z), dtype=torch.float32, device=z.device)
    block = min(BLOCK, max(128, power_of_two(z.shape[1])))
    launch(row_kernel, (len(z),), z, teacher_z, loss, z.shape[1], z.stride(0), temperature, DZ=want_dz, BLOCK=block,
           num_warps=max(1, min(16, block // 256)))
    return loss


@op
def linear_kl_forward(
        x: torch.Tensor, weight: torch.Tensor, want_dx: bool, want_dw: bool, teacher_x: torch.Tensor,
        teacher_weight: torch.Tensor, labels: torch.Tensor,
        temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, D], weight [V, D] in x's dtype, the teacher's likewise, labels [M] -> token_loss, dx, dw (or empty)."""
    function = kernel_rows if use_triton(x) else reference_rows
    return shared.loss_by_chunks([(x, weight), (teacher_x, teacher_weight)], labels, want_dx, want_dw,
                                 lambda _, z, teacher_z: function(z, teacher_z, temperature, want_dx or want_dw))


# ---- public op

def linear_kl(x: torch.Tensor, weight: torch.Tensor, teacher_x: torch.Tensor, teacher_weight: torch.Tensor,
              labels: torch.Tensor, temperature: float = 1.0):
    """Summed divergence in nats between the head `weight` [V, D] on x [..., D] and the teacher's [V, D'] on [..., D'].

    Returns (loss, token_loss [...]): temperature^2 * KL(teacher || student) of softmax(logits / temperature), summed
    over the tokens whose label in labels [...] is not -100 (no other value of it matters), and each token's own, 0
    where it is. The sum alone carries gradients, for x and weight and for one backward pass; the teacher is a constant.
    Under autocast the matmuls are in autocast's dtype. ValueError where the heads or the tokens do not fit.
    """
    if weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(f"the student's head has {weight.shape[0]} rows, the teacher's {teacher_weight.shape[0]}; "
                         "both must score the same tokens: take a teacher with the same tokenizer, and if one head "
                         "is only padded, cut it to the shorter, e.g. teacher_weight[:V]")
    if teacher_x.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"the student's hidden states are {tuple(x.shape)}, the teacher's {tuple(teacher_x.shape)}; "
                         "all but the last size must agree: run both on the same tokens")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it divides the logits, say 1.0")
    teacher_dtype = autocast_dtype(teacher_x) or torch.promote_types(teacher_x.dtype, teacher_weight.dtype)
    loss, token_loss = shared.apply_to_head(
        linear_kl_forward, x, weight, teacher_x.detach().flatten(0, -2).to(teacher_dtype),
        teacher_weight.detach().to(teacher_dtype), labels.flatten(), float(temperature))
    return loss, token_loss.view(labels.shape)
