"""Cross-entropy of a linear head without its logits: only a chunk of rows' logits exists at a time.

    z = x W^T, with a soft cap (Gemma 2, arXiv 2408.00118) z = cap tanh(x W^T / cap);  l = logsumexp(z), p = softmax(z)
    loss = sum over labelled rows of  l - (1 - s) z[label] - s mean(z) + c l^2
    dz = (1 + 2 c l) p - (1 - s) onehot(label) - s / V,  with a soft cap times 1 - (z / cap)^2
    dx = dz W      dW = dz^T x

s is the label smoothing (Szegedy et al., 2016, arXiv 1512.00567), c the z-loss (PaLM, arXiv 2204.02311).

As the loss is a plain sum, its gradients are known while the chunk's logits are at hand: the forward pass computes
them in place of the logits and the backward pass only scales them (the three products a head needs, nothing twice).
Rows whose label is -100 are left out before the product. For M rows the products cost 6 M V D operations (4 with a
frozen head): 25.8 Tflop at M 8192, D 4096, V 128256, 33 ms where a device does 790 Tflop/s. The logits of those are
2 M V bytes in bf16, read twice and written once by the row kernel: 1.5 ms more at 4.3 TB/s.

So the products are the whole game, and they are the vendor library's. They want many rows, and every chunk reads and
writes all of dW once more: on an H200 chunks of 256 rows were measured at 53 ms for the above, of 4,096 at 35
(github.com/linkedin/Liger-Kernel/pull/1472). Chunks are counted in bytes of logits, 1 GiB on a GPU: those 4,096 rows.
dW is summed in fp32: with a bf16 sum over chunks the rare tokens' gradients are lost to rounding.
The row kernel takes a row in two passes of 16 KB tiles; the second runs backwards, over what the cache still holds.
"""

import torch

from kernels import backend
from kernels.backend import jit, launch, op, power_of_two, tl, use_triton
from kernels.rmsnorm import upcast

CHUNK_BYTES = 128 * 2**20         # of logits held at a time on a CPU; below about 1,000 rows the products slow down
GPU_CHUNK_BYTES = 2**30
ROWS = 128                        # a chunk is a multiple of this, the tile height of a GPU's products
BLOCK = 8192                      # logits a program holds
IGNORE = -100
TINY = 1e-30


# ---- what the fused losses share

def labelled_rows(labels):
    """Indices of the rows with a label, None where all have one: on a GPU the one wait for the device.

    Meta tensors have no values; their rows count as labelled.
    """
    if labels.is_meta:
        return None
    rows = (labels != IGNORE).nonzero().flatten()
    return None if len(rows) == len(labels) else rows


def chunk_rows(count: int, row_bytes: int, device: torch.device) -> int:
    """Rows a chunk of `count` rows whose logits take row_bytes each: equal chunks, so that none is a thin rest."""
    most = max(1, (CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES) // row_bytes)
    unit = ROWS if most >= ROWS else 1
    chunks = max(1, -(-count // (most // unit * unit)))
    return max(1, min(count, -(-count // (chunks * unit)) * unit))


def shapes_only(x: torch.Tensor) -> bool:
    """Whether torch.compile asks what the outputs look like; its tensors have neither values nor, perhaps, sizes."""
    return backend.receiver is not None and x.device.type != "meta"


def compute_dtype(x, weight) -> torch.dtype:
    """Of the product x W^T: autocast's where that is on, else the wider of the two."""
    kind = autocast_device(x)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.promote_types(
        x.dtype, weight.dtype)


def autocast_device(x) -> str:
    return "cuda" if x.is_meta else x.device.type            # autocast does not know meta tensors


def logits(x, weight, out):
    """x W^T in the first rows of `out`, rounded to x's dtype whatever out's."""
    out = out[:len(x)]
    return torch.mm(x, weight.T, out=out) if out.dtype == x.dtype else out.copy_(x @ weight.T)


def add_product(total, a, b, first: bool):
    """total += a b, or = where it is the first, total being fp32 or a's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif a.is_cuda:               # the product's own fp32 sums go into the total: no rounding, no copy between
        # (an fp32 total beside half factors: since PyTorch 2.10, github.com/pytorch/pytorch/pull/167931)
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def over_chunks(x, weight, labels, buffers, want_dx: bool, want_dw: bool, chunk_loss):
    """-> token_loss [M], dx [M, D] and dw [V, D] in at least fp32, both empty where not wanted.

    x [M, D], weight [V, D] in x's dtype, labels [M]. chunk_loss(where, part, *buffers) -> loss [m], dz [m, V] in x's
    dtype, of the rows x[where]; it gets a buffer [m or more, V] for each dtype in `buffers` and may return one of them.
    """
    V = weight.shape[0]
    token_loss = torch.zeros(labels.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    dx = torch.zeros_like(x) if want_dx else x.new_empty(0)
    dw = torch.empty(weight.shape if want_dw else 0, dtype=token_loss.dtype, device=x.device)
    if shapes_only(x):
        return token_loss, dx, dw
    rows = labelled_rows(labels)
    count = len(labels) if rows is None else len(rows)
    if count == 0:
        dw.zero_()
    step = chunk_rows(count, sum(V * dtype.itemsize for dtype in buffers) or 1, x.device)
    # Rows of a multiple of 128 bytes: an odd vocabulary would cost the kernels and the products their wide loads.
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
            add_product(dw, dz.T, part, first=i == 0)
    return token_loss, dx, dw


def keep_gradients(ctx, dx, dw, weight):
    ctx.weight_dtype = weight.dtype
    if torch.compiler.is_compiling():            # a compiled graph has its own rules about a second backward pass
        ctx.save_for_backward(dx, dw)
    else:                                        # on ctx they can be scaled in place
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
    if dw.is_cuda and dw.dtype != ctx.weight_dtype:          # scaled and rounded in one pass over a large matrix
        return dx, torch.mul(dw, scale, out=torch.empty_like(dw, dtype=ctx.weight_dtype))
    return dx, dw.mul_(scale).to(ctx.weight_dtype)


# ---- reference

def capped(z, soft_cap):
    return z if soft_cap is None else z.mul_(1 / soft_cap).tanh_().mul_(soft_cap)


def reference_rows(z, label, exact, want_hits, want_dz, z_loss, label_smoothing, soft_cap, spare):
    """z [m, V] in at least fp32 -> loss [m], hits [m] or None; z becomes dz.

    exact(rows) -> those rows' logits once more; spare: where the cap's slope is kept, as large as z.
    """
    label, extra = label[:, None].long(), bool(z_loss or label_smoothing)
    z = capped(z, soft_cap)
    if soft_cap is not None and want_dz:
        slope = torch.square(z, out=spare[:len(z)]).mul_(-1 / soft_cap**2).add_(1)
    hits = z.argmax(-1) == label[:, 0] if want_hits else None
    if extra:
        label_logit, mean = z.gather(1, label)[:, 0], z.mean(-1) if label_smoothing else 0.0
    torch.softmax(z, -1, out=z)              # in place: a log-softmax would need its exponential once more
    p = z.gather(1, label)[:, 0]
    loss, rare = -p.log(), p < TINY
    if rare.any():                           # the probability of a hopeless label underflows, its loss must not
        again = capped(upcast(exact(rare)), soft_cap)
        loss[rare] = -torch.log_softmax(again, -1).gather(1, label[rare])[:, 0]
    if extra:
        lse = loss + label_logit
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - mean) + z_loss * lse.square()
    if want_dz:
        if z_loss:
            z.mul_(1 + 2 * z_loss * lse[:, None])
        if label_smoothing:
            z.sub_(label_smoothing / z.shape[1])
        z.scatter_add_(1, label, z.new_full(label.shape, label_smoothing - 1.0))
        if soft_cap is not None:
            z.mul_(slope)
    return loss, hits


# ---- Triton

@jit
def load_row(Z, col, V, stride):
    """Columns of a row in fp32, 0 from V on. The row's padding is ours to read: only so are an odd V's loads wide."""
    z = tl.load(Z + col, mask=col < stride, other=0.0).to(tl.float32)
    return tl.where(col < V, z, 0.0)


@jit
def soften(z, cap):
    return cap * (2 * tl.sigmoid(2 * z / cap) - 1)           # tanh; Triton's own lives in a device library


@jit
def row_kernel(Z, LABELS, LOSS, HITS, V, stride, z_loss, smoothing, cap, DZ: tl.constexpr, WANT_HITS: tl.constexpr,
               SMOOTH: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Z [M, V] in rows of `stride` numbers: the loss and the hit of each row, the gradient in place of the logits."""
    row = tl.program_id(0)
    Z += row.to(tl.int64) * stride
    label = tl.load(LABELS + row)
    inside = (label >= 0) & (label < V)
    label_logit = tl.load(Z + label, mask=inside, other=0.0).to(tl.float32)
    if CAP:
        label_logit = soften(label_logit, cap)
    label_logit = tl.where(inside, label_logit, float("nan"))
    label = tl.where(inside, label, -1).to(tl.int32)

    top = -3e38                              # finite: a tile of -inf must not make NaN
    best = -2                                # no label
    total = tl.zeros([BLOCK], tl.float32)    # summed over the lanes at the end; the maximum alone waits for all
    plain = 0.0
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = load_row(Z, col, V, stride)
        if CAP:
            z = soften(z, cap)
        if SMOOTH:
            plain += tl.sum(tl.where(col < V, z, 0.0), 0)
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
    if SMOOTH:
        loss += smoothing * (label_logit - plain / V)
    tl.store(LOSS + row, loss)
    if WANT_HITS:
        tl.store(HITS + row, best == label)

    if DZ:
        tl.debug_barrier()                   # every thread has its label_logit before the first one is overwritten
        scale = (1 + 2 * z_loss * lse) / total_sum
        scale = tl.where(inside, scale, float("nan"))
        for back in range(0, tl.cdiv(V, BLOCK)):
            col = (tl.cdiv(V, BLOCK) - 1 - back) * BLOCK + tl.arange(0, BLOCK)
            z = load_row(Z, col, V, stride)
            if CAP:
                z = soften(z, cap)
            dz = tl.exp(z - top) * scale - tl.where(col == label, 1 - smoothing, 0.0)
            if SMOOTH:
                dz -= smoothing / V
            if CAP:
                dz *= 1 - (z / cap) * (z / cap)
            tl.store(Z + col, dz, mask=col < stride)


def kernel_rows(z, label, want_hits, want_dz, z_loss, label_smoothing, soft_cap):
    """As reference_rows, z in any dtype."""
    loss = torch.empty(len(z), dtype=torch.float32, device=z.device)
    hits = torch.empty(len(z) if want_hits else 0, dtype=torch.bool, device=z.device)
    block = min(BLOCK, max(128, power_of_two(z.shape[1])))
    launch(row_kernel, (len(z),), z, label, loss, hits, z.shape[1], z.stride(0), z_loss, label_smoothing,
           soft_cap or 1.0, DZ=want_dz, WANT_HITS=want_hits, SMOOTH=label_smoothing != 0, CAP=soft_cap is not None,
           BLOCK=block, num_warps=max(1, min(16, block // 512)))
    return loss, hits


@op
def linear_cross_entropy_forward(
        x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, want_dx: bool, want_dw: bool, want_hits: bool,
        z_loss: float, label_smoothing: float,
        soft_cap: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, D], weight [V, D] in x's dtype, labels [M] -> token_loss, hits, dx, dw; empty where not wanted."""
    hits = torch.zeros(len(labels) if want_hits else 0, dtype=torch.bool, device=x.device)
    triton, want_dz = use_triton(x), want_dx or want_dw
    wide = torch.promote_types(x.dtype, torch.float32)
    buffers = [x.dtype] if triton else [wide] * (2 if soft_cap is not None and want_dz else 1)

    def chunk_loss(where, part, buffer, spare=None):
        label, z = labels[where], logits(part, weight, buffer)
        if triton:
            loss, found = kernel_rows(z, label, want_hits, want_dz, z_loss, label_smoothing, soft_cap)
        else:
            loss, found = reference_rows(z, label, lambda some: part[some] @ weight.T, want_hits, want_dz, z_loss,
                                         label_smoothing, soft_cap, spare)
        if want_hits:
            hits[where] = found
        return loss, z.to(x.dtype) if want_dz else z
    token_loss, dx, dw = over_chunks(x, weight, labels, buffers, want_dx, want_dw, chunk_loss)
    return token_loss, hits, dx, dw


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, want_dx, want_dw, want_hits, z_loss, label_smoothing, soft_cap):
        token_loss, hits, dx, dw = linear_cross_entropy_forward(
            x, weight.to(x.dtype), labels, want_dx, want_dw, want_hits, z_loss, label_smoothing, soft_cap)
        keep_gradients(ctx, dx, dw, weight)
        ctx.mark_non_differentiable(token_loss, hits)
        return token_loss.sum(), token_loss, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, *_):
        return *scaled_gradients(ctx, scale, "linear_cross_entropy"), *[None] * 7


# ---- public op

def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, want_hits: bool = False,
                         z_loss: float = 0.0, label_smoothing: float = 0.0, soft_cap: float | None = None):
    """Summed cross-entropy in nats of the head `weight` [V, D] on hidden states x [..., D] against labels [...].

    Returns (loss, token_loss [...], hits [...] or None): the sum, which alone carries gradients, for one backward pass;
    each row's own loss with all its terms, 0 where the label is -100; with `want_hits`, whether the largest logit is
    the label's. Under autocast the products are taken in autocast's dtype; the softmax, the sums and the head's
    gradient stay in fp32.

    z_loss: adds z_loss * logsumexp(logits)^2 to each labelled row. label_smoothing: in [0, 1], as torch's, shared
    among all V. soft_cap: the logits become soft_cap * tanh(logits / soft_cap).
    A label outside [0, V) other than -100 is an error: the CPU raises one, a GPU, which would have to wait for its
    device to do so, reads nothing out of bounds and makes the row's loss and gradient NaN.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it is a probability, say 0.1")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap is {soft_cap}; it bounds the logits, say 30.0; None leaves them as they are")
    grad, dtype = torch.is_grad_enabled(), compute_dtype(x, weight)
    with torch.autocast(autocast_device(x), enabled=False):
        loss, token_loss, hits = LinearCrossEntropy.apply(
            x.flatten(0, -2).to(dtype), weight, labels.flatten(), grad and x.requires_grad,
            grad and weight.requires_grad, want_hits, float(z_loss), float(label_smoothing), soft_cap)
    return loss, token_loss.view(labels.shape), hits.view(labels.shape) if want_hits else None
