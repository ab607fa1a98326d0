"""core/pace.py: a rank's own seconds against a clock of the test's; and the rank in warnings (core/watch.py). That a
slow rank of four is named is in test_layouts.py."""

import time
import warnings

import pytest
import torch

from core.pace import WAITED, Pace, waiting
from core.watch import tag_warnings


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_warnings_of_other_ranks_say_so(monkeypatch):
    for rank in (0, 3):
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
        tag_warnings(rank)
        said = warnings.formatwarning("the disk is slow", UserWarning, "a.py", 7)
        assert said.startswith("a.py:7" if rank == 0 else "rank 3: a.py:7")


def test_own_seconds_by_hand():
    """Two steps of a rank that reads for 3 s and 1 s, computes for 2 s in each, and waits for 5 s in between."""
    clock, block, said = Clock(), torch.nn.Linear(2, 2), []
    pace = Pace(clock)
    pace.time_blocks([block], 1)
    block.register_forward_pre_hook(lambda *_: setattr(clock, "now", clock.now + 2.0))
    block(torch.ones(1, 2))                                     # before the first step, as an estimate of methods
    for reads in (3.0, 1.0):
        pace.leave_exchange()
        clock.now += reads
        pace.begin_step()
        block(torch.ones(1, 2))
        block.eval()(torch.ones(1, 2))                          # an evaluation
        block.train()
        clock.now += 5.0
    found = []
    values = pace.compare(lambda own: found.append(own) or [1.0, own, 2.0], 10.0, said.append)
    assert found == [(3 + 2 + 1 + 2) / 2]
    assert values == {"slowest": 1, "slowest_ms": 4000.0, "median_ms": 2000.0, "ratio": 2.0}
    assert said == ["warning: rank 1 takes 4000 ms of a step by itself and the median rank 2000 ms, and the others "
                    "wait for it"]
    pace.begin_step()
    assert pace.compare(lambda own: [1.0, 4.0, 2.0], 10.0, said.append)["slowest"] == 1
    assert len(said) == 1                                       # once a rank


def test_what_ranks_wait_for_each_other_within_a_block_is_not_their_own():
    """A block of 2 s, in which another rank is waited for, on a rank that has two where the mean rank has one."""
    clock, block = Clock(), torch.nn.Linear(2, 2)
    pace = Pace(clock)
    exchange = waiting(lambda seconds: time.sleep(seconds))

    def compute(*_):
        before = WAITED[0]
        exchange(0.02)
        clock.now += 2.0 + WAITED[0] - before
    pace.time_blocks([block, torch.nn.Linear(2, 2)], 1)
    block.register_forward_pre_hook(compute)
    pace.begin_step()
    block(torch.ones(1, 2))
    assert WAITED[0] >= 0.02
    assert pace.seconds == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(("own", "step"), [([1.0, 1.4, 1.0], 1.0), ([0.01, 0.05, 0.01], 1.0)])
def test_what_holds_nobody_up_is_no_warning(own, step):
    """A ratio below 1.5, and a tenth of the step or less."""
    said = []
    assert Pace().compare(lambda _: own, step, said.append)["slowest"] == 1
    assert said == []
