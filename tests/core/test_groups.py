"""core/groups.py. Truth: the clock of a rank whose peer is late. (One that dies meanwhile: test_watch.py.)"""

import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import fork_ranks, meet
from runs import ENV
from torch.distributed import distributed_c10d

from core import groups
from core.groups import connecting
from core.watch import Watch


def as_rank(rank: int, folder: Path):
    groups.CONNECT, known = 1, distributed_c10d.default_pg_timeout
    with meet(folder, "two", rank, 2):
        with connecting():
            group = dist.new_group([0, 1])
        assert distributed_c10d.default_pg_timeout == known
        dist.barrier()
        x, begun = torch.zeros(1), time.monotonic()
        if rank:
            time.sleep(3)
            dist.send(torch.ones(1), 0, group=group)
        else:
            dist.recv(x, 1, group=group)
            print(f"got {x.item():.0f} after {time.monotonic() - begun:.0f} s", flush=True)
        dist.barrier()


def test_a_message_may_take_longer_than_to_connect(tmp_path):
    done = subprocess.run([sys.executable, __file__, tmp_path], env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("got 1 after "), done.stdout


def test_ranks_that_connect_are_watched(monkeypatch):
    """By the clock: 60 s after something began that may take 120 s, eight ranks have three seconds more. What torch
    would give a group, on a CPU or a GPU, is longer than what the watch waits."""
    watch = Watch.__new__(Watch)
    watch.since, watch.limit, watch.long, watch.size = time.monotonic() - 60, 120.0, 9000.0, 8
    monkeypatch.setattr(groups, "CONNECT", 1)
    monkeypatch.setattr(distributed_c10d, "default_pg_nccl_timeout", timedelta(minutes=10))
    known = [distributed_c10d._get_default_timeout(backend) for backend in ("gloo", "nccl")]
    with connecting(watch):
        assert 63 <= watch.limit < 72
        for backend in ("gloo", "nccl"):
            assert distributed_c10d._get_default_timeout(backend).total_seconds() == 9060
    assert watch.limit == 120
    assert [distributed_c10d._get_default_timeout(backend) for backend in ("gloo", "nccl")] == known


if __name__ == "__main__":
    fork_ranks(as_rank, 2, Path(sys.argv[1]))
