"""Groups of some of the ranks, such as those that share matmuls or hold a copy of the model.

Ranks of a gloo group connect when it is made, and wait for one that has died meanwhile as long as for a message later:
gloo has one limit for both. It is long, because what a rank waits for, as in the first step of a pipeline, may take
long. Groups are therefore made where all ranks have just met, and core/watch.py looks after CONNECT seconds.
"""

import contextlib
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from core.pace import waiting

# torchrun gives ranks that are to end 30 seconds.
CONNECT = 20

# What blocks exchange. torch 2.13 has new names for the first two, and warns of the old ones.
all_gather = waiting(getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)
reduce_scatter = waiting(getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)
all_to_all = waiting(dist.all_to_all_single)


@contextlib.contextmanager
def connecting(watch=None):
    """A context in which groups are made. Where a rank does not connect in time, its `watch` ends this process."""
    kept = distributed_c10d.default_pg_timeout
    distributed_c10d.default_pg_timeout = timedelta(hours=2)
    try:
        with watch.within(CONNECT) if watch else contextlib.nullcontext():
            yield
    finally:
        distributed_c10d.default_pg_timeout = kept
