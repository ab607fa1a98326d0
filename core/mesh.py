"""How the ranks are laid out: one table of them with named dimensions, of which all that ranks share takes its groups.

    pipe         P parts of the layers, one after the other
    replicate    groups that hold such a part once each (HSDP)
    shard        ranks that shard its weights (FSDP). They are
        data         ranks with sequences of their own, times
        context      C ranks that share each sequence
    tensor       t ranks that share each matmul
    experts      N ranks that share the experts

Neighbours, which torchrun puts on one node, stand beside each other in the last dimension.

    Example: 8 ranks with C = 2 and t = 2. Rank 5 is 1 of data, 0 of context and 1 of tensor: it shares matmuls with
    rank 4, sequences with 4, 6 and 7, of which 7 has the same heads, and 1, 3, 5 and 7 shard the weights of these.
"""

import functools

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def lay_ranks(device: str, ranks: int, config) -> DeviceMesh:
    """The table of so many ranks by a ParallelConfig, without the dimensions of size 1 but for `shard`."""
    return make_mesh(device, ranks, config.pipeline, config.replicas, config.tensor, config.experts)


@functools.cache
def make_mesh(device: str, ranks: int, pipeline=1, replicas=1, tensor=1, experts=1) -> DeviceMesh:
    """Made once: each mesh starts groups of ranks of its own."""
    sizes = {"pipe": pipeline, "replicate": replicas, "shard": ranks // pipeline // replicas // tensor // experts,
             "tensor": tensor, "experts": experts}
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


@functools.cache
def find_sharers(mesh: DeviceMesh, C: int) -> DeviceMesh:
    """[C]: those of the ranks that shard weights which share sequences with this one."""
    return mesh._unflatten("shard", (mesh["shard"].size() // C, C), ("data", "context"))["context"]


def forget_ranks():
    """The groups are no more."""
    make_mesh.cache_clear()
    find_sharers.cache_clear()
