"""Groups of some of the ranks, such as those that share matmuls or hold a copy of the model.

Ranks of a gloo group connect when it is made, and wait for one that has died meanwhile as long as for a collective:
half an hour. Groups are therefore made where all ranks have just met, and within CONNECT seconds.
"""

import contextlib
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# torchrun gives ranks that are to end 30 seconds.
CONNECT = 20

# torch 2.13 has new names for these two, and warns of the old ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@contextlib.contextmanager
def connecting():
    """A context in which groups are made: RuntimeError where a rank does not connect in time. What their ranks wait for
    later, as in the first step, may take longer than PyTorch's own default, and core/watch.py looks after that."""
    kept, known = distributed_c10d.default_pg_timeout, set(distributed_c10d._world.pg_map)
    distributed_c10d.default_pg_timeout = timedelta(seconds=CONNECT)
    try:
        yield
    finally:
        distributed_c10d.default_pg_timeout = kept
    for group in distributed_c10d._world.pg_map.keys() - known:
        if "gloo" in distributed_c10d.get_backend(group):
            group._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(hours=2))
