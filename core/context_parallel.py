"""Long sequences: the ranks of a group share each sequence, T / C tokens each (DeepSpeed-Ulysses, arXiv 2309.14509).

All but attention is computed per token, so that a rank needs its own tokens alone. Attention needs all tokens of a
head: before it the ranks exchange tokens for heads, and after it heads for tokens.

    each rank: [B, T / C, H, d]  -- exchange -->  [B, T, H / C, d]  attention  -- exchange -->  [B, T / C, H, d]

What attention computes, and by which kernel, is as without it: masks, windows and documents are those of the sequence.
Activations take 1 / C of the memory. C divides the heads H; where there are fewer key-value heads K than ranks, each is
sent to C / K of them.

B sequences, T tokens of a sequence, C ranks that share it, H heads, K key-value heads, d head size.
"""

import contextlib
from dataclasses import replace

import torch
import torch.distributed as dist


class Exchange(torch.autograd.Function):
    """x [B, T / C, H, d] -> [B, T, H / C, d]; with `back`, the other way. Each is the gradient of the other."""

    @staticmethod
    def forward(ctx, x, group, back):
        ctx.group, ctx.back = group, back
        return exchange(x, group, back)

    @staticmethod
    def backward(ctx, dy):
        return exchange(dy, ctx.group, not ctx.back), None, None


def exchange(x, group, back: bool):
    C = dist.get_world_size(group)
    # [C, B, tokens of a rank, heads of a rank, d]: part c goes to rank c.
    parts = x.unflatten(1, (C, -1)).movedim(1, 0) if back else x.unflatten(2, (C, -1)).movedim(2, 0)
    parts = parts.contiguous()
    found = torch.empty_like(parts)
    dist.all_to_all_single(found, parts, group=group)
    return found.movedim(0, 2).flatten(2, 3) if back else found.movedim(0, 1).flatten(1, 2)


class SharedSequences:
    """The group of ranks that this one shares sequences with, as their `rank`-th."""

    # The parts of a batch of which each rank has its tokens alone.
    parted = ("tokens", "labels", "position_ids", "doc_start")

    def __init__(self, group, rank: int, ranks: int):
        self.group, self.rank, self.ranks, self.is_on = group, rank, ranks, False

    @classmethod
    def of(cls, mesh):
        """The group of a mesh of one dimension."""
        return cls(mesh.get_group(), mesh.get_local_rank(), mesh.size())

    def __deepcopy__(self, memo):
        # A frozen copy of the model (teacher) shares sequences with the same ranks.
        return self

    def cut(self, batch):
        """This rank's tokens of a corrupted batch: positions and the starts of documents stay those of the sequence."""
        return replace(batch, **{name: self.cut_tokens(getattr(batch, name)) for name in self.parted})

    def cut_tokens(self, x):
        """[B, T, ...] -> [B, T / C, ...]"""
        T = x.shape[1] // self.ranks
        return x[:, self.rank * T:(self.rank + 1) * T]

    @contextlib.contextmanager
    def shared(self):
        """Inside, each rank has its tokens of the same sequences; elsewhere, as when text is generated, it has whole
        ones."""
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False


class SharedAttention:
    """kernels.attention, given as `attend`, of sequences that ranks may share."""

    def __init__(self, attend, sequences: SharedSequences):
        self.attend, self.sequences = attend, sequences

    def __call__(self, q, k, v, causal=True, window=None, doc_start=None):
        sequences = self.sequences
        if not sequences.is_on:
            return self.attend(q, k, v, causal, window, doc_start)
        if (times := -(-sequences.ranks // k.shape[2])) > 1:
            k, v = (x.repeat_interleave(times, dim=2) for x in (k, v))
        q, k, v = (Exchange.apply(x, sequences.group, False) for x in (q, k, v))
        if doc_start is not None:
            parts = [torch.empty_like(doc_start, memory_format=torch.contiguous_format) for _ in range(sequences.ranks)]
            dist.all_gather(parts, doc_start.contiguous(), group=sequences.group)
            doc_start = torch.cat(parts, dim=1)
        return Exchange.apply(self.attend(q, k, v, causal, window, doc_start), sequences.group, True)
