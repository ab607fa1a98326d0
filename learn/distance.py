"""How far the weights have moved from the base, per block: ||theta - theta_0||, the L2 norm of the difference.

Without replay the weights move several times as far in the first hundred steps, before perplexity tells of what is lost
(arXiv 2506.00288). A block whose two weights moved by 3 and 4 is at a distance of 5.

theta_0 is read from the base's folder, one tensor at a time and in the type of the weights in training: no second copy
stays in memory, and a model that nothing has moved is at exactly 0. With adapters nothing else moves, so it is the norm
of what they add to the base: of s B A, of DoRA's merged weight less W, of trained rows less the base's. What a base in
few bits lost when it was rounded is no part of it, because the export has the full weights.
"""

import copy
import math
from collections import defaultdict

import torch

import hf
from core import sharding
from learn import adapters
from learn.method import counts_here, upcast_dtype


def block_of(name: str) -> str:
    """embed, layers.3, norm or head: the block of a parameter or layer."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if first == "layers" else "embed" if first == "embed_tokens" else first


@torch.no_grad()
def measure_distance(model, base: hf.Base, world) -> dict[str, float]:
    """{block: its distance from the base, "all": that of the model}, of the blocks that can move. A collective where
    the model is sharded."""
    squares = defaultdict(float)
    adapted = adapters.active_layers(model)
    for name, square in (square_adapters(adapted) if adapted else square_weights(model, base, world)):
        squares[block_of(name)] += square
    if world.pipe:
        # What the peers of a stage each have of an adapter, or their shares of weights.
        parts, squares = world.gather(dict(squares)), defaultdict(float)
        for part in parts[::world.peers[1]] if adapted else parts:
            for block, square in part.items():
                squares[block] += square
    totals = list(squares.values())
    if sharding.is_sharded(model) and not adapted and not world.pipe:
        totals = world.sum(totals)
    return {block: math.sqrt(total) for block, total in zip((*squares, "all"), (*totals, sum(totals)))}


def square_norm(x: torch.Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).square().item()


def square_weights(model, base: hf.Base, world):
    """Yield (name, squared distance) of this rank's share of each parameter that the base has, 0 where another rank
    counts the same share; a tied one once."""
    # Also puts back into shards what an evaluation has left gathered.
    weights = sharding.model_state(model, form=torch.Tensor.detach)
    for name, _, full in hf.read_weights(model, base.folder):
        # A tied head may be in the folder beside the embedding that it is.
        if name in weights:
            now, was = weights[name], sharding.distribute_like(full, weights[name])
            counts, now, was = counts_here(name, now, world), sharding.local(now), sharding.local(was)
            yield name, square_norm(now.to(upcast_dtype(now)) - was) if counts else 0.0


def square_adapters(layers):
    """Yield (path, squared norm) of what the active adapter of each layer adds to the base's weight."""
    for path, layer in layers:
        # The same adapter with its full tensors: each rank computes all of it.
        adapter = copy.copy(layer.adapter)
        adapter._parameters = {name: p if p is None else sharding.gather(p.detach())
                               for name, p in layer.adapter._parameters.items()}
        if isinstance(adapter, adapters.LowRank) and adapter.magnitude is None:
            # |B A|^2 = sum (B^T B) * (A A^T): no matrix of the weight's size is made.
            a, b = adapter.A.double(), adapter.B.double()
            yield path, adapter.scale**2 * ((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0).item()
        else:
            weight = layer.gather_base()
            weight = weight.to(upcast_dtype(weight))
            yield path, square_norm(adapter.merge_into(weight) - weight)
