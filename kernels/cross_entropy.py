"""Cross-entropy of a linear head without its logits: only those of a chunk of tokens exist at a time.

    z = x W^T        lse = logsumexp(z)        p = softmax(z)
    loss = sum over labelled tokens of  w (lse - z[label] + c lse^2)
    dz = (1 + 2 c lse) p - onehot(label)        dx = w dz W      dW = dz^T (w x)

c is the z-loss, which keeps lse near 0 (PaLM, arXiv 2204.02311), and w [M] a weight per token, 1 where none is given.
M tokens, x [M, D], W [V, D], z [M, V].

Since the loss is a plain sum, its gradients are known while the chunk's logits are at hand: the forward pass computes
them in place of the logits, and the backward pass only scales them (the three matmuls a head needs, nothing twice).
Tokens whose label is -100 are left out before the matmul. The matmuls cost 6 M V D operations (4 with a frozen head):
25.8 Tflop at M 8192, D 4096, V 128256, 33 ms where a device does 790 Tflop/s. The logits are 2 M V bytes in bf16, which
the Triton kernel reads twice and writes once: 1.5 ms more at 4.3 TB/s.

So nearly all of the time is in the vendor library's matmuls. They want many rows, and every chunk reads and writes all
of dW once more: on an H200 chunks of 256 rows were measured at 53 ms for the above, of 4,096 at 35
(github.com/linkedin/Liger-Kernel/pull/1472). Chunks are therefore counted in bytes of logits, 1 GiB on a GPU: those
4,096 rows. dW is summed in fp32: in a bf16 sum over chunks the gradients of rare tokens are lost to rounding.
"""

import torch

from kernels import backend
from kernels.backend import autocast_dtype, jit, launch, op, power_of_two, tl, use_triton, without_autocast
from kernels.rmsnorm import upcast

# Bytes of logits held at a time. On a CPU matmuls slow down below about 1,000 rows.
CHUNK_BYTES = 128 * 2**20
GPU_CHUNK_BYTES = 2**30
ROWS = 128                        # a chunk is a multiple of this, the tile height of a GPU's matmuls
BLOCK = 8192                      # logits a program holds
# The label of a token that is not to be learned, as in PyTorch and transformers; the rest of the project imports it.
IGNORE = -100


# ---- what the fused losses share

def chunk_rows(count: int, row_bytes: int, device: torch.device) -> int:
    """Tokens per chunk, of `count` tokens whose logits take row_bytes each.

    Chunks are equal, so that none is a thin rest: 8448 tokens where 4185 fit become three chunks of 2816, not two of
    4096 and one of 256.
    """
    most = max(1, (CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES) // row_bytes)
    unit = ROWS if most >= ROWS else 1
    chunks = max(1, -(-count // (most // unit * unit)))
    return max(1, min(count, -(-count // (chunks * unit)) * unit))


def pad_rows(x):
    """x, in half precision on a CPU with rows of zeros up to a multiple of ROWS.

    There oneDNN makes and keeps code for each shape, so that memory would grow with each new number of labelled tokens.
    """
    spare = -len(x) % ROWS if x.device.type == "cpu" and x.dtype.itemsize == 2 else 0
    return torch.cat([x, x.new_zeros(spare, x.shape[1])]) if spare else x


def make_logits(x, weight, out):
    """x W^T in the first rows of `out`, rounded to x's dtype, whatever dtype `out` has."""
    out = out[:len(x)]
    return torch.mm(x, weight.T, out=out) if out.dtype == x.dtype else out.copy_((pad_rows(x) @ weight.T)[:len(x)])


def add_matmul(total, a, b, first: bool):
    """total += a b, or total = a b if it is the first; total is fp32 or in a's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif a.is_cuda:
        # The matmul's own fp32 sums go into the total, with no rounding and no copy between. PyTorch can do that since
        # 2.10 (github.com/pytorch/pytorch/pull/167931).
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def loss_by_chunks(heads, labels, want_dx: bool, want_dw: bool, chunk_loss, token_weight=None):
    """-> token_loss [M], dx [M, D] and dw [V, D] in fp32 or wider, both empty where not wanted.

    heads: x [M, D] with weight [V, D] in x's dtype, then a teacher's if there is one. labels [M]. chunk_loss(rows, *z)
    gets the indices [m] of some tokens and each head's logits [m, V] of them, in fp32 or wider unless the Triton kernel
    runs; it returns their losses [m] and leaves dz in place of the first logits. token_weight [M] multiplies losses and
    gradients: of a token's logits it would scale V values, of its x and dx it scales D.
    """
    x, weight = heads[0]
    V = len(weight)
    token_loss = torch.zeros(labels.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    dx = torch.zeros_like(x) if want_dx else x.new_empty(0)
    dw = torch.empty(weight.shape if want_dw else 0, dtype=token_loss.dtype, device=x.device)
    if backend.receiver is not None and x.device.type != "meta":
        # torch.compile asks what the outputs look like; its tensors have no values and perhaps no sizes.
        return token_loss, dx, dw
    # On a GPU nonzero is the one wait for the device. Meta tensors have no values: all of their tokens count.
    labelled = torch.arange(len(labels), device="meta") if x.is_meta else (labels != IGNORE).nonzero().flatten()
    if not len(labelled):
        dw.zero_()
    triton = use_triton(x)
    dtypes = [hidden.dtype if triton else torch.promote_types(hidden.dtype, torch.float32) for hidden, _ in heads]
    step = chunk_rows(len(labelled), sum(V * dtype.itemsize for dtype in dtypes) or 1, x.device)
    # Rows are padded to a multiple of 128 bytes: an odd vocabulary would cost kernels and matmuls their wide loads.
    stride = -(-V // 64) * 64 if triton else V
    buffers = [torch.empty(step, stride, dtype=dtype, device=x.device)[:, :V] for dtype in dtypes]
    for i in range(0, len(labelled), step):
        rows = labelled[i:i + step]
        z = [make_logits(hidden[rows], head, buffer) for (hidden, head), buffer in zip(heads, buffers)]
        loss, scale = chunk_loss(rows, *z), token_weight[rows] if token_weight is not None else None
        token_loss[rows] = loss if scale is None else loss * scale
        if want_dx or want_dw:
            dz = pad_rows(z[0].to(x.dtype))
        if want_dx:
            dx_rows = (dz @ weight)[:len(rows)]
            dx[rows] = dx_rows if scale is None else (dx_rows * scale[:, None]).to(x.dtype)
        if want_dw:
            x_rows = x[rows] if scale is None else (x[rows] * scale[:, None]).to(x.dtype)
            add_matmul(dw, dz.T, pad_rows(x_rows), first=i == 0)
    return token_loss, dx, dw


class HeadLoss(torch.autograd.Function):
    """(op, x, weight, want_dx, want_dw, *more) -> loss, token_loss, *others; op returns token_loss, dx, dw, *others."""

    @staticmethod
    def forward(ctx, op, x, weight, *more):
        token_loss, dx, dw, *others = op(x, weight.to(x.dtype), *more)
        ctx.save_for_backward(dx, dw)
        ctx.name, ctx.spent = op.__name__.removesuffix("_forward"), False
        ctx.weight_dtype, ctx.more = weight.dtype, len(more)
        ctx.mark_non_differentiable(token_loss, *others)
        return token_loss.sum(), token_loss, *others

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, *_):
        # A compiled graph has its own rules about a second backward pass.
        if ctx.spent and not torch.compiler.is_compiling():
            raise RuntimeError(f"{ctx.name} keeps its gradients for one backward pass only; call it again for another")
        ctx.spent = True
        grads = [scale_(gradient, scale, dtype) if wanted else None for gradient, dtype, wanted in zip(
            ctx.saved_tensors, (None, ctx.weight_dtype), ctx.needs_input_grad[1:3])]
        return None, *grads, *[None] * ctx.more


def scale_(gradient, scale, dtype):
    """gradient * scale in dtype (None: its own), in place where it has that, else scaled and rounded in one pass."""
    dtype = dtype or gradient.dtype
    if torch.compiler.is_compiling():
        return (gradient * scale).to(dtype)
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, scale, out=out)


def apply_to_head(op, x, weight, *more):
    """HeadLoss of x [..., D] and weight [V, D], whose matmuls are in autocast's dtype, else in the wider of the two."""
    grad, dtype = torch.is_grad_enabled(), autocast_dtype(x) or torch.promote_types(x.dtype, weight.dtype)
    with without_autocast(x):
        return HeadLoss.apply(op, x.flatten(0, -2).to(dtype), weight, grad and x.requires_grad,
                              grad and weight.requires_grad, *more)


# ---- reference

def reference_rows(z, label, exact, want_hits, want_dz, z_loss):
    """z [m, V] in fp32 or wider, label [m] -> loss [m], hits [m] or None; z becomes dz.

    exact(rows) -> the logits of some of the rows once more.
    """
    label = label[:, None].long()
    hits = z.argmax(-1) == label[:, 0] if want_hits else None
    label_logit = z.gather(1, label)[:, 0] if z_loss else None
    # The softmax in place: a log-softmax would have to be exponentiated once more.
    torch.softmax(z, -1, out=z)
    p = z.gather(1, label)[:, 0]
    loss, rare = -p.log(), p < 1e-30
    if rare.any():
        # The probability of a hopeless label underflows, but its loss must not.
        again = upcast(exact(rare))
        loss[rare] = -torch.log_softmax(again, -1).gather(1, label[rare])[:, 0]
    if z_loss:
        lse = loss + label_logit
        loss = loss + z_loss * lse.square()
    if want_dz:
        if z_loss:
            z.mul_(1 + 2 * z_loss * lse[:, None])
        z.scatter_add_(1, label, z.new_full(label.shape, -1.0))
    return loss, hits


# ---- Triton

@jit
def load_row(Z, col, V, stride):
    """Columns of a row in fp32, 0 from V on. The padding is read too: only then are the loads wide for an odd V."""
    z = tl.load(Z + col, mask=col < stride, other=0.0).to(tl.float32)
    return tl.where(col < V, z, 0.0)


@jit
def row_kernel(Z, LABELS, LOSS, HITS, V, stride, z_loss, DZ: tl.constexpr, WANT_HITS: tl.constexpr,
               BLOCK: tl.constexpr):
    """A program takes a row of Z [M, V], whose rows are `stride` elements apart, in two passes over its columns.

    LABELS, LOSS, HITS [M]. The second pass puts the gradient in place of the logits. It begins with the last columns,
    which the cache still holds.
    """
    row = tl.program_id(0)
    Z += row.to(tl.int64) * stride
    label = tl.load(LABELS + row)
    inside = (label >= 0) & (label < V)
    label_logit = tl.load(Z + label, mask=inside, other=0.0).to(tl.float32)
    label_logit = tl.where(inside, label_logit, float("nan"))
    label = tl.where(inside, label, -1).to(tl.int32)

    # The maximum so far is finite, because exp(-inf - -inf) in a tile of -inf would be NaN.
    top = -3e38
    best = -2                                # no label
    # Sums stay apart by lane until the end, so that only the maximum waits for all lanes.
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = load_row(Z, col, V, stride)
        z = tl.where(col < V, z, float("-inf"))
        here = tl.max(z, 0)
        if WANT_HITS:
            best = tl.where(here > top, start + tl.argmax(z, 0), best)
        new = tl.maximum(top, here)
        total = total * tl.exp(top - new) + tl.exp(z - new)
        top = new
    total_sum = tl.sum(total, 0)
    lse = top + tl.log(total_sum)
    loss = (top - label_logit) + tl.log(total_sum) + z_loss * lse * lse
    tl.store(LOSS + row, loss)
    if WANT_HITS:
        tl.store(HITS + row, best == label)

    if DZ:
        # Every thread must have its label_logit before the first one is overwritten.
        tl.debug_barrier()
        scale = (1 + 2 * z_loss * lse) / total_sum
        scale = tl.where(inside, scale, float("nan"))
        for back in range(0, tl.cdiv(V, BLOCK)):
            col = (tl.cdiv(V, BLOCK) - 1 - back) * BLOCK + tl.arange(0, BLOCK)
            z = load_row(Z, col, V, stride)
            dz = tl.exp(z - top) * scale - tl.where(col == label, 1.0, 0.0)
            tl.store(Z + col, dz, mask=col < stride)


def kernel_rows(z, label, want_hits, want_dz, z_loss):
    """As reference_rows, z in any dtype."""
    loss = torch.empty(len(z), dtype=torch.float32, device=z.device)
    hits = torch.empty(len(z) if want_hits else 0, dtype=torch.bool, device=z.device)
    block = min(BLOCK, max(128, power_of_two(z.shape[1])))
    launch(row_kernel, (len(z),), z, label, loss, hits, z.shape[1], z.stride(0), z_loss, DZ=want_dz,
           WANT_HITS=want_hits, BLOCK=block, num_warps=max(1, min(16, block // 512)))
    return loss, hits


@op
def linear_cross_entropy_forward(
        x: torch.Tensor, weight: torch.Tensor, want_dx: bool, want_dw: bool, labels: torch.Tensor, want_hits: bool,
        z_loss: float, token_weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, D], weight [V, D] in x's dtype, labels and token_weight [M] -> token_loss, dx, dw, hits; empty where not
    wanted."""
    hits = torch.zeros(len(labels) if want_hits else 0, dtype=torch.bool, device=x.device)
    triton, want_dz = use_triton(x), want_dx or want_dw

    def chunk_loss(rows, z):
        if triton:
            loss, found = kernel_rows(z, labels[rows], want_hits, want_dz, z_loss)
        else:
            loss, found = reference_rows(z, labels[rows], lambda some: x[rows[some]] @ weight.T, want_hits, want_dz,
                                         z_loss)
        if want_hits:
            hits[rows] = found
        return loss
    return *loss_by_chunks([(x, weight)], labels, want_dx, want_dw, chunk_loss, token_weight), hits


# ---- public op

def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, want_hits: bool = False,
                         z_loss: float = 0.0, token_weight: torch.Tensor | None = None):
    """Summed cross-entropy in nats of the head `weight` [V, D] on hidden states x [..., D] against labels [...].

    Returns (loss, token_loss [...], hits [...] or None): the sum, which alone carries gradients, for one backward pass;
    each token's own loss with all its terms, 0 where the label is -100; with `want_hits`, whether the largest logit is
    the label's. Under autocast the matmuls are in autocast's dtype; the softmax, the sums and the head's gradient stay
    in fp32.

    z_loss: adds z_loss * logsumexp(logits)^2 to each labelled token. token_weight [...]: a constant by which
    each token's loss is multiplied.
    A label outside [0, V) other than -100 is an error: the CPU raises one; a GPU would have to wait for its device to
    do so, therefore it reads nothing out of bounds and makes the token's loss and gradient NaN.
    """
    scale = None
    if token_weight is not None:
        scale = token_weight.detach().flatten().to(torch.promote_types(x.dtype, torch.float32))
    loss, token_loss, hits = apply_to_head(linear_cross_entropy_forward, x, weight, labels.flatten(), want_hits,
                                           float(z_loss), scale)
    return loss, token_loss.view(labels.shape), hits.view(labels.shape) if want_hits else None
