"""Long sequences: the ranks of a group share each sequence, T / C tokens each.

All but attention is computed per token, so that a rank needs its own tokens alone. For attention, of which each query
needs all keys of its sequence, the ranks exchange one of two:

    heads   q, k, v [B, T / C, H, d] -- exchange --> [B, T, H / C, d]   attention   -- exchange --> [B, T / C, H, d]
            each rank attends for some of the heads (DeepSpeed-Ulysses, arXiv 2309.14509)
    keys    k, v [B, T / C, K, d] -- gather --> [B, T, K, d]            attention of its own queries over them
            (Llama 3, arXiv 2407.21783); their gradients are summed over the ranks and scattered

What attention computes, and by which kernel, is as without it: masks, windows and documents are those of the sequence.
Activations take 1 / C of the memory, but for the gathered keys and values, which are kept for the backward pass.

A sequence is cut into 2 C pieces, and rank r has the pieces r and 2 C - 1 - r. With a causal mask the queries of piece
p see p + 1 pieces of keys, and so the ranks have equal work, (r + 1) + (2 C - r) = 2 C + 1 pieces; with one piece each
the last rank would have (2 C - 1) / C of the mean.

A rank sends, forward and once more backward, so many elements of T d (C - 1) / C^2:

    heads   2 (H + max(K, C))       C divides H; where key-value heads are fewer than ranks, each goes to C / K of them
    keys    2 K C                   any H and K

    Example: H = 32 and K = 8. With 2 ranks keys send 32 and heads 80, with 4 ranks 64 and 80, with 8 ranks 128 and 80.

B sequences, T tokens of a sequence, C ranks that share it, H heads, K key-value heads, d head size.
"""

import contextlib
from dataclasses import replace

import torch
import torch.distributed as dist

from core.groups import all_gather, all_to_all, reduce_scatter


def fits_heads(C: int, H: int, K: int) -> bool:
    """Whether C ranks can have the same number of heads each, with their key-value heads."""
    return H % C == 0 and (K % C == 0 or C % K == 0)


def exchanges_keys(exchange: str, C: int, H: int, K: int) -> bool:
    """Whether the ranks gather keys and values, as `exchange` says; auto: where heads do not fit, or are more to send.
    """
    return exchange == "keys" or (exchange == "auto" and (not fits_heads(C, H, K) or H + max(K, C) > K * C))


def part_pieces(x, C: int):
    """[B, T, ...] -> [2 C, B, n, ...], n = T / (2 C) tokens: the first piece of rank 0, its second, those of rank 1."""
    pieces = x.chunk(2 * C, dim=1)
    return torch.stack([piece for r in range(C) for piece in (pieces[r], pieces[-1 - r])])


def join_pieces(parts):
    """The other way: [2 C, B, n, ...] -> [B, T, ...]"""
    pieces = list(parts)
    return torch.cat(pieces[::2] + pieces[:0:-2], dim=1)


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
    # [2 C, B, n, heads of a rank, d]: the next two go to the next rank.
    parts = part_pieces(x, C) if back else \
        x.unflatten(2, (C, -1)).unflatten(1, (2, -1)).permute(3, 1, 0, 2, 4, 5).flatten(0, 1)
    found = torch.empty_like(parts := parts.contiguous())
    all_to_all(found, parts, group=group)
    # [C, 2, B, n, h, d] -> [B, 2, n, C, h, d]
    return found.unflatten(0, (C, 2)).permute(2, 1, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2) if back else \
        join_pieces(found)


class Gather(torch.autograd.Function):
    """x [B, T / C, ...] -> [B, T, ...], the tokens of all ranks. The gradient of each token is the sum of the ranks',
    which compute other things from it."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        own = x.unflatten(1, (2, -1)).movedim(1, 0).contiguous()
        parts = own.new_empty(2 * dist.get_world_size(group), *own.shape[1:])
        all_gather(parts, own, group=group)
        return join_pieces(parts)

    @staticmethod
    def backward(ctx, dy):
        parts = part_pieces(dy, dist.get_world_size(ctx.group))
        own = parts.new_empty(2, *parts.shape[1:])
        reduce_scatter(own, parts, group=ctx.group)
        return own.movedim(0, 1).flatten(1, 2), None


class SharedSequences:
    """The group of ranks that this one shares sequences with, as their `rank`-th."""

    # The parts of a batch of which each rank has its tokens alone. Attention needs all starts of documents.
    parted = ("tokens", "labels", "position_ids")

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
        """This rank's tokens of a corrupted batch: their positions stay those of the sequence."""
        return replace(batch, **{name: self.cut_tokens(getattr(batch, name)) for name in self.parted})

    def cut_tokens(self, x):
        """[B, T, ...] -> [B, T / C, ...]"""
        pieces = x.chunk(2 * self.ranks, dim=1)
        return torch.cat([pieces[self.rank], pieces[-1 - self.rank]], dim=1)

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
    """kernels.attention, given as `attend`, of sequences that ranks may share. doc_start [B, T]: of all tokens."""

    def __init__(self, attend, sequences: SharedSequences, gathers_keys: bool):
        self.attend, self.sequences, self.gathers_keys = attend, sequences, gathers_keys

    def __call__(self, q, k, v, causal=True, window=None, doc_start=None):
        if not self.sequences.is_on:
            return self.attend(q, k, v, causal, window, doc_start)
        return (self.over_keys if self.gathers_keys else self.over_heads)(q, k, v, causal, window, doc_start)

    def over_keys(self, q, k, v, causal, window, doc_start):
        sequences, n = self.sequences, q.shape[1] // 2
        k, v = Gather.apply(torch.cat([k, v], dim=2), sequences.group).chunk(2, dim=2)
        pieces = sequences.rank, 2 * sequences.ranks - 1 - sequences.rank
        return torch.cat([self.attend(own, k, v, causal, window, doc_start, piece * n)
                          for piece, own in zip(pieces, q.chunk(2, dim=1))], dim=1)

    def over_heads(self, q, k, v, causal, window, doc_start):
        sequences = self.sequences
        if (times := -(-sequences.ranks // k.shape[2])) > 1:
            k, v = (x.repeat_interleave(times, dim=2) for x in (k, v))
        q, k, v = (Exchange.apply(x, sequences.group, False) for x in (q, k, v))
        return Exchange.apply(self.attend(q, k, v, causal, window, doc_start), sequences.group, True)
