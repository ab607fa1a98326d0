"""Cross-entropy of a linear head without its logits: only a chunk of rows' logits exists at a time.

    z = x W^T      loss = sum over labelled rows of  logsumexp(z) - z[label]
    dz = softmax(z) - onehot(label)      dx = dz W      dW = dz^T x

As the loss is a plain sum, its gradients are known while the chunk's logits are at hand: the forward pass computes
them in place of the logits and the backward pass only scales them (the three products a head needs, nothing twice).
Rows whose label is -100 are left out before the product.
"""

import torch

from kernels.rmsnorm import upcast

CHUNK_BYTES = 128 * 2**20         # fp32 logits held at a time; below about 1,000 rows the products slow down
IGNORE = -100
TINY = 1e-30


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, want_dx, want_dw, want_hits):
        token_loss = torch.zeros(labels.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        hits = torch.zeros(labels.shape, dtype=torch.bool, device=x.device) if want_hits else None
        rows = (labels != IGNORE).nonzero().flatten()          # on a GPU this waits for the device
        every = len(rows) == len(labels)
        kept, target = (x, labels) if every else (x[rows], labels[rows])
        dx = torch.zeros_like(x) if want_dx else None
        dw = torch.zeros(weight.shape, dtype=token_loss.dtype, device=x.device) if want_dw else None
        ctx.weight_dtype, weight = weight.dtype, weight.to(x.dtype)
        step = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        for i in range(0, len(rows), step):
            part, label = kept[i:i + step], target[i:i + step, None].long()
            z = upcast(part @ weight.T)
            where = slice(i, i + step) if every else rows[i:i + step]
            if want_hits:
                hits[where] = z.argmax(-1) == label[:, 0]
            torch.softmax(z, -1, out=z)          # in place: a log-softmax would need its exponential once more
            p = z.gather(1, label)[:, 0]
            loss, rare = -p.log(), p < TINY
            if rare.any():                       # the probability of a hopeless label underflows, its loss must not
                exact = torch.log_softmax(upcast(part[rare] @ weight.T), -1)
                loss[rare] = -exact.gather(1, label[rare])[:, 0]
            token_loss[where] = loss
            if want_dx or want_dw:
                dz = z.scatter_add_(1, label, z.new_full(label.shape, -1.0)).to(x.dtype)
                if want_dx:
                    dx[where] = dz @ weight
                if want_dw:
                    dw.addmm_(dz.T, part) if dw.dtype == dz.dtype else dw.add_(dz.T @ part)
        ctx.grads = dx, dw
        ctx.mark_non_differentiable(token_loss)
        if want_hits:
            ctx.mark_non_differentiable(hits)
        return token_loss.sum(), token_loss, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, *_):
        if ctx.grads is None:
            raise RuntimeError("linear_cross_entropy keeps its gradients for one backward pass only")
        dx, dw = ctx.grads
        ctx.grads = None
        dx = dx.mul_(scale) if dx is not None else None
        dw = dw.mul_(scale).to(ctx.weight_dtype) if dw is not None else None
        return dx, dw, None, None, None, None


def linear_cross_entropy(x, weight, labels, want_hits: bool = False):
    """Summed cross-entropy in nats of the head `weight` [V, D] on hidden states x [..., D] against labels [...].

    Returns (loss, token_loss [...], hits [...] or None): the sum, which alone carries gradients; each row's own loss,
    0 where the label is -100; with `want_hits`, whether the largest logit is the label's. Under autocast the products
    are taken in autocast's dtype; the softmax, the sums and the head's gradient stay in fp32.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.promote_types(
        x.dtype, weight.dtype)
    grad = torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        loss, token_loss, hits = LinearCrossEntropy.apply(
            x.flatten(0, -2).to(dtype), weight, labels.flatten(),
            grad and x.requires_grad, grad and weight.requires_grad, want_hits)
    return loss, token_loss.view(labels.shape), hits.view(labels.shape) if want_hits else None
