"""Groups of some of the ranks, such as those that share matmuls or hold a copy of the model.

Ranks of a gloo group connect when it is made, and wait for one that has died meanwhile as long as for a message later:
gloo has one limit for both. It is long, because what a rank waits for, as in the first step of a pipeline, may take
long. Groups are therefore made where all ranks have just met, and core/watch.py looks after CONNECT seconds and some
more for each rank.
"""

import contextlib
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from core.pace import waiting

# torchrun gives ranks that are to end 30 seconds. Many ranks make many groups, each by some calls of one store.
CONNECT, CONNECT_A_RANK = 20, 0.25
# What torch calls its limits for groups; NCCL's is 10 minutes, and None where torch was built without it.
LIMITS = "default_pg_timeout", "default_pg_nccl_timeout"

# What blocks exchange. torch 2.13 has new names for the first two, and warns of the old ones.
all_gather = waiting(getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)
reduce_scatter = waiting(getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)
all_to_all = waiting(dist.all_to_all_single)


@contextlib.contextmanager
def connecting(watch=None):
    """A context in which groups are made. Where a rank does not connect in time, its `watch` ends this process."""
    kept = {name: getattr(distributed_c10d, name) for name in LIMITS}
    # Longer than the watch waits, which can say what happened.
    limit = timedelta(seconds=(watch.long if watch else 7200) + 60)
    vars(distributed_c10d).update({name: limit for name, known in kept.items() if known})
    try:
        with watch.within(CONNECT + CONNECT_A_RANK * watch.size) if watch else contextlib.nullcontext():
            yield
    finally:
        vars(distributed_c10d).update(kept)
