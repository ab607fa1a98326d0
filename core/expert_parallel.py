"""Expert parallel: the N ranks of a group hold E / N of the experts each, and tokens travel to them (GShard, arXiv
2006.16668).

    each rank: [n, D], its tokens by expert  -- send -->  [m, D], all ranks' tokens of its experts
                                             MLPs, [m, D]  -- send back -->  [n, D]

n and m are what the routers say: they differ between ranks and may be 0. A rank with no token still takes part in each
exchange and gathers what FSDP shards, so that none waits for it in vain. The W / N ranks that hold the same experts
shard them between them; everything else is sharded over all W ranks.

A rank's experts see the tokens of N ranks, so the sum over the W / N ranks that hold them is the sum over all W.

D model width, E experts, N ranks that share the experts, W ranks.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from core.groups import all_to_all
from core.tensor_parallel import LocalWeights, split_layer

# The dimension of the experts in each parameter of theirs, counted from its last one: weights, and adapters' A, B and
# magnitude.
EXPERTS = {"weight": -3, "A": -3, "B": -3, "magnitude": -2}


class Send(torch.autograd.Function):
    """x [n, D], of which the next sent[r] rows go to rank r -> [m, D], received[r] rows of rank r after each other. Its
    gradient goes the other way."""

    @staticmethod
    def forward(ctx, x, sent: list[int], received: list[int], group):
        ctx.way = sent, received, group
        return send(x, sent, received, group)

    @staticmethod
    def backward(ctx, dy):
        sent, received, group = ctx.way
        return send(dy, received, sent, group), None, None, None


def send(x, sent, received, group):
    found = x.new_empty(sum(received), *x.shape[1:])
    all_to_all(found, x.contiguous(), received, sent, group=group)
    return found


class Exchange:
    """The hooks of a block's experts: before them tokens go to the ranks that hold their experts, and after them they
    come back."""

    def __init__(self, group):
        self.group, self.ranks, self.way = group, dist.get_world_size(group), None

    def enter(self, module, args):
        """x [n, D], sorted by expert, and ends [E] -> the same of all ranks' tokens and this rank's E / N experts."""
        x, ends = args
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        # [N, E / N]: how many tokens each rank has for each expert of this one.
        incoming = torch.empty_like(counts)
        all_to_all(incoming, counts, group=self.group)
        counts, incoming = counts.view(self.ranks, -1), incoming.view(self.ranks, -1)
        # The host must know them: here it waits for the device.
        sent, received = torch.stack([counts.sum(1), incoming.sum(1)]).tolist()
        # They come sorted by rank and, of a rank, by expert.
        expert = torch.arange(incoming.shape[1], device=x.device).repeat(self.ranks)
        order = expert.repeat_interleave(incoming.flatten()).argsort(stable=True)
        self.way = sent, received, order
        return Send.apply(x, sent, received, self.group)[order], incoming.sum(0).cumsum(0, dtype=torch.int32)

    def leave(self, module, args, y):
        """y [m, D] of this rank's experts -> [n, D] of this rank's tokens"""
        (sent, received, order), self.way = self.way, None
        return Send.apply(y[order.argsort()], received, sent, self.group)


def shard_experts(model: nn.Module, mesh, **options):
    """Part the experts of model.expert_plan() over the dimension `experts` of the mesh, and shard what a rank then has
    over the dimension `shard`, with the options of fully_shard. To be called on the meta device, before the rest is
    sharded."""
    for experts in model.expert_plan():
        for layer in experts.children():
            split_layer(layer, EXPERTS, mesh["experts"])
        exchange = Exchange(mesh["experts"].get_group())
        experts.register_forward_pre_hook(exchange.enter)
        experts.register_forward_hook(exchange.leave)
        # FSDP averages over the ranks that hold the same experts, and over all ranks elsewhere.
        LocalWeights(experts, averaged_by=exchange.ranks)
        fully_shard(experts, mesh=mesh["shard"], shard_placement_fn=lambda p: choose_dim(p, mesh["shard"].size()),
                    **options)


def choose_dim(p: torch.Tensor, ranks: int) -> Shard:
    """Which dimension FSDP cuts: experts are few, so the one behind, unless it leaves a rest."""
    return Shard(1 if p.ndim > 1 and p.shape[1] % ranks == 0 else 0)


def is_of_parted(p: torch.Tensor) -> bool:
    """Whether each rank of a group has some of the experts of a parameter."""
    return isinstance(p, DTensor) and "experts" in (p.device_mesh.mesh_dim_names or ())
