"""core/groups.py. Truth: the clock of a rank whose peer has left, and the timeouts that PyTorch says a group has."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import fork_ranks, meet
from runs import ENV

from core import groups
from core.groups import connecting


def as_rank(rank: int, folder: Path):
    with meet(folder, "two", rank, 2):
        with connecting():
            group = dist.new_group([0, 1])
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(hours=2)
        assert dist.distributed_c10d.default_pg_timeout == timedelta(minutes=30)
        if rank:
            os._exit(0)
        groups.CONNECT, begun = 1, time.monotonic()
        try:
            with connecting():
                dist.new_group([0, 1])
        except RuntimeError:
            print(f"noticed after {time.monotonic() - begun:.0f} s", flush=True)
        assert dist.distributed_c10d.default_pg_timeout == timedelta(minutes=30)
        os._exit(0)


def test_a_rank_that_does_not_connect_is_noticed(tmp_path):
    done = subprocess.run([sys.executable, __file__, tmp_path], env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    seconds = int(done.stdout.split()[2])
    assert 1 <= seconds < 10, done.stdout


if __name__ == "__main__":
    fork_ranks(as_rank, 2, Path(sys.argv[1]))
