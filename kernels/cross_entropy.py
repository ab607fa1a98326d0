"""Cross-entropy of a linear head without its logits: only those of a chunk of tokens exist at a time.

    z = x W^T        lse = logsumexp(z)        p = softmax(z)
    loss = sum over labelled tokens of  lse - z[label] + c lse^2
    dz = (1 + 2 c lse) p - onehot(label)        dx = dz W        dW = dz^T x

c is the z-loss, which keeps lse near 0 (PaLM, arXiv 2204.02311). M tokens, x [M, D], W [V, D], z [M, V].

Since the loss is a plain sum, its gradients are known while the chunk's logits are at hand: the forward pass computes
them in place of the logits and the backward pass only scales them (the three matmuls a head needs, nothing twice).
Tokens whose label is -100 are left out before the matmul. The matmuls cost 6 M V D operations (4 with a frozen head):
25.8 Tflop at M 8192, D 4096, V 128256, 33 ms where a device does 790 Tflop/s. The logits of those are 2 M V bytes in
bf16, read twice and written once by the Triton kernel: 1.5 ms more at 4.3 TB/s.

So the matmuls are nearly everything, and they are the vendor library's. They want many rows, and every chunk reads and
writes all of dW once more: on an H200 chunks of 256 rows were measured at 53 ms for the above, of 4,096 at 35
(github.com/linkedin/Liger-Kernel/pull/1472). Chunks are therefore counted in bytes of logits, 1 GiB on a GPU: those
4,096 rows. dW is summed in fp32: in a bf16 sum over chunks the gradients of rare tokens are lost to rounding.
"""

import torch

from kernels import backend
from kernels.backend import jit, launch, op, power_of_two, tl, use_triton
from kernels.rmsnorm import upcast

# Bytes of logits held at a time. On a CPU matmuls slow down below about 1,000 rows.
CHUNK_BYTES = 128 * 2**20
GPU_CHUNK_BYTES = 2**30
ROWS = 128                        # a chunk is a multiple of this, the tile height of a GPU's matmuls
BLOCK = 8192                      # logits a program holds
# The label of a token that is not to be learned, as in PyTorch and transformers; the rest of the project imports it.
IGNORE = -100
# A probability below this has lost its precision to underflow.
TINY = 1e-30


# ---- what the fused losses share

def labelled_rows(labels):
    """Indices of the tokens with a label, None where all have one: on a GPU the one wait for the device.

    Meta tensors have no values; all of their tokens count as labelled.
    """
    if labels.is_meta:
        return None
    rows = (labels != IGNORE).nonzero().flatten()
    return None if len(rows) == len(labels) else rows


def chunk_rows(count: int, row_bytes: int, device: torch.device) -> int:
    """Tokens per chunk, of `count` tokens whose logits take row_bytes each.

    Chunks are equal, so that none is a thin rest: 8448 tokens where 4185 fit become three chunks of 2816, not two of
    4096 and one of 256.
    """
    most = max(1, (CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES) // row_bytes)
    unit = ROWS if most >= ROWS else 1
    chunks = max(1, -(-count // (most // unit * unit)))
    return max(1, min(count, -(-count // (chunks * unit)) * unit))


def compute_dtype(x, weight) -> torch.dtype:
    """Of the matmul x W^T: autocast's where that is on, else the wider of the two."""
    kind = autocast_device(x)
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(x.dtype, weight.dtype)


def autocast_device(x) -> str:
    return "cuda" if x.is_meta else x.device.type            # autocast does not know meta tensors


def make_logits(x, weight, out):
    """x W^T into the first rows of `out`, rounded to x's dtype whatever out's."""
    out = out[:len(x)]
    return torch.mm(x, weight.T, out=out) if out.dtype == x.dtype else out.copy_(x @ weight.T)


def add_matmul(total, a, b, first: bool):
    """total += a b, or total = a b if it is the first; total is fp32 or in a's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif a.is_cuda:
        # The matmul's own fp32 sums go into the total, with no rounding and no copy between. An fp32 total beside half
        # factors is possible since PyTorch 2.10 (github.com/pytorch/pytorch/pull/167931).
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def loss_by_chunks(x, weight, labels, buffers, want_dx: bool, want_dw: bool, chunk_loss):
    """-> token_loss [M], dx [M, D] and dw [V, D] in fp32 or wider, both empty where not wanted.

    x [M, D], weight [V, D] in x's dtype, labels [M]. chunk_loss(where, part, *buffers) -> loss [m], dz [m, V] in x's
    dtype, of the tokens x[where]; it gets a buffer [m or more, V] for each dtype in `buffers` and may return one of
    them.
    """
    V = weight.shape[0]
    token_loss = torch.zeros(labels.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    dx = torch.zeros_like(x) if want_dx else x.new_empty(0)
    dw = torch.empty(weight.shape if want_dw else 0, dtype=token_loss.dtype, device=x.device)
    if backend.receiver is not None and x.device.type != "meta":
        # torch.compile asks what the outputs look like; its tensors have no values and perhaps no sizes.
        return token_loss, dx, dw
    rows = labelled_rows(labels)
    count = len(labels) if rows is None else len(rows)
    if count == 0:
        dw.zero_()
    step = chunk_rows(count, sum(V * dtype.itemsize for dtype in buffers) or 1, x.device)
    # Rows are padded to a multiple of 128 bytes: an odd vocabulary would cost kernels and matmuls their wide loads.
    stride = -(-V // 64) * 64 if use_triton(x) else V
    buffers = [torch.empty(step, stride, dtype=dtype, device=x.device)[:, :V] for dtype in buffers]
    for i in range(0, count, step):
        where = slice(i, min(i + step, count)) if rows is None else rows[i:i + step]
        part = x[where]
        token_loss[where], dz = chunk_loss(where, part, *buffers)
        if want_dx and rows is None:
            torch.mm(dz, weight, out=dx[where])
        elif want_dx:
            dx[where] = dz @ weight
        if want_dw:
            add_matmul(dw, dz.T, part, first=i == 0)
    return token_loss, dx, dw


def keep_gradients(ctx, dx, dw, weight):
    """Keep what the forward pass found for `scaled_gradients`."""
    ctx.weight_dtype = weight.dtype
    if torch.compiler.is_compiling():
        # A compiled graph has its own rules about a second backward pass.
        ctx.save_for_backward(dx, dw)
    else:
        # Kept on ctx they can be scaled in place.
        ctx.grads = dx, dw


def scaled_gradients(ctx, scale, name):
    """-> the kept dx, dw times scale in the inputs' dtypes, None for those that were not wanted."""
    want_dx, want_dw = ctx.needs_input_grad[:2]
    if torch.compiler.is_compiling():
        dx, dw = ctx.saved_tensors
        return dx * scale if want_dx else None, (dw * scale).to(ctx.weight_dtype) if want_dw else None
    if ctx.grads is None:
        raise RuntimeError(f"{name} keeps its gradients for one backward pass only; call it again for another")
    (dx, dw), ctx.grads = ctx.grads, None
    dx = dx.mul_(scale) if want_dx else None
    if not want_dw:
        return dx, None
    if dw.is_cuda and dw.dtype != ctx.weight_dtype:
        # Scaled and rounded in one pass over a large matrix.
        return dx, torch.mul(dw, scale, out=torch.empty_like(dw, dtype=ctx.weight_dtype))
    return dx, dw.mul_(scale).to(ctx.weight_dtype)


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
    loss, rare = -p.log(), p < TINY
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
    """Columns of a row in fp32, 0 from V on. The row's padding may be read: only so does an odd V have wide loads."""
    z = tl.load(Z + col, mask=col < stride, other=0.0).to(tl.float32)
    return tl.where(col < V, z, 0.0)


@jit
def row_kernel(Z, LABELS, LOSS, HITS, V, stride, z_loss, DZ: tl.constexpr, WANT_HITS: tl.constexpr,
               BLOCK: tl.constexpr):
    """A program takes a row of Z [M, V], whose rows are `stride` elements apart, in two passes of BLOCK columns.

    LABELS, LOSS, HITS [M]. The second pass puts the gradient in place of the logits; it runs backwards, over what the
    cache still holds.
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
        x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, want_dx: bool, want_dw: bool, want_hits: bool,
        z_loss: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, D], weight [V, D] in x's dtype, labels [M] -> token_loss, hits, dx, dw; empty where not wanted."""
    hits = torch.zeros(len(labels) if want_hits else 0, dtype=torch.bool, device=x.device)
    triton, want_dz = use_triton(x), want_dx or want_dw
    buffers = [x.dtype if triton else torch.promote_types(x.dtype, torch.float32)]

    def chunk_loss(where, part, buffer):
        label, z = labels[where], make_logits(part, weight, buffer)
        if triton:
            loss, found = kernel_rows(z, label, want_hits, want_dz, z_loss)
        else:
            loss, found = reference_rows(z, label, lambda some: part[some] @ weight.T, want_hits, want_dz, z_loss)
        if want_hits:
            hits[where] = found
        return loss, z.to(x.dtype) if want_dz else z
    token_loss, dx, dw = loss_by_chunks(x, weight, labels, buffers, want_dx, want_dw, chunk_loss)
    return token_loss, hits, dx, dw


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, want_dx, want_dw, want_hits, z_loss):
        token_loss, hits, dx, dw = linear_cross_entropy_forward(x, weight.to(x.dtype), labels, want_dx, want_dw,
                                                                want_hits, z_loss)
        keep_gradients(ctx, dx, dw, weight)
        ctx.mark_non_differentiable(token_loss, hits)
        return token_loss.sum(), token_loss, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, *_):
        return *scaled_gradients(ctx, scale, "linear_cross_entropy"), *[None] * 5


# ---- public op

def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, want_hits: bool = False,
                         z_loss: float = 0.0):
    """Summed cross-entropy in nats of the head `weight` [V, D] on hidden states x [..., D] against labels [...].

    Returns (loss, token_loss [...], hits [...] or None): the sum, which alone carries gradients, for one backward pass;
    each token's own loss with all its terms, 0 where the label is -100; with `want_hits`, whether the largest logit is
    the label's. Under autocast the matmuls are in autocast's dtype; the softmax, the sums and the head's gradient stay
    in fp32.

    z_loss: adds z_loss * logsumexp(logits)^2 to each labelled token.
    A label outside [0, V) other than -100 is an error: the CPU raises one; a GPU would have to wait for its device to
    do so, therefore it reads nothing out of bounds and makes the token's loss and gradient NaN.
    """
    grad, dtype = torch.is_grad_enabled(), compute_dtype(x, weight)
    with torch.autocast(autocast_device(x), enabled=False):
        loss, token_loss, hits = LinearCrossEntropy.apply(
            x.flatten(0, -2).to(dtype), weight, labels.flatten(), grad and x.requires_grad,
            grad and weight.requires_grad, want_hits, float(z_loss))
    return loss, token_loss.view(labels.shape), hits.view(labels.shape) if want_hits else None
