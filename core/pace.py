"""Which rank the others wait for: seconds of a step that each rank takes by itself.

All ranks make a step in the same time, because those that are done wait for the slowest. What a rank takes by itself is
measured where nobody is waited for: from the last exchange before a step until its first one (reading batches, work of
the host), and within the forward passes of the blocks, behind FSDP's gathering of their weights. A rank whose disk,
processor or neighbours are slow has more of it than the median rank.

Ranks that share a block's matmuls, sequences or experts exchange tensors within it, and what they wait for each other
there is nobody's own (`waiting`): else all ranks of a group would be as slow as its slowest. The ranks of a pipeline
may have different numbers of blocks, so that a rank's are counted as if it had as many as the mean rank.

Example: of four ranks one takes 90 ms and the others 30 ms: it is named, with a ratio of 3.

It is the host's time: a GPU computes behind its host, and a slow one shows in the common time of a step alone. So do
blocks that are compiled.
"""

import functools
import statistics
import time

import torch
from torch import nn

# From which ratio on a rank is worth a warning, if it also takes this share of the step longer than the median rank.
RATIO, SHARE = 1.5, 0.2


# The seconds that this process has waited in exchanges within blocks.
WAITED = [0.0]


def waiting(function):
    """A collective that blocks call among ranks that share them. A graph that is compiled has it as it is."""
    @functools.wraps(function)
    def call(*args, **options):
        if torch.compiler.is_compiling():
            return function(*args, **options)
        began = time.perf_counter()
        result = function(*args, **options)
        WAITED[0] += time.perf_counter() - began
        return result
    return call


class Pace:
    """This rank's own seconds. clock: another one in tests."""

    def __init__(self, clock=time.perf_counter):
        self.clock = clock
        # When the last exchange with other ranks ended, and when the block that is computing began.
        self.left, self.began, self.waited, self.scale = None, 0.0, 0.0, 1.0
        self.seconds, self.steps, self.named = 0.0, 0, set()

    def time_blocks(self, blocks: list[nn.Module], usual: float):
        """Count the blocks' forward passes in training too. To be called once they are sharded: FSDP's hooks, which
        wait for the weights, then stand around these. usual: how many blocks the mean rank has."""
        self.scale = usual / max(1, len(blocks))
        for block in blocks:
            block.register_forward_pre_hook(self.enter_block)
            block.register_forward_hook(self.leave_block, prepend=True)

    def enter_block(self, block, args):
        self.began, self.waited = self.clock(), WAITED[0]

    def leave_block(self, block, args, output):
        if block.training:
            self.seconds += self.scale * (self.clock() - self.began - (WAITED[0] - self.waited))

    def leave_exchange(self):
        self.left = self.clock()

    def begin_step(self):
        """Before the first exchange of a step."""
        if not self.steps:
            # What came before, as the build, is no part of a step.
            self.seconds = 0.0
        self.seconds += self.clock() - (self.left or self.clock())
        self.steps += 1

    def compare(self, gather, step_seconds: float, say) -> dict:
        """{"slowest": rank, "slowest_ms", "median_ms", "ratio"} of the steps since the last call; the first time that a
        rank holds the others up, `say` gets a warning. gather: gives each rank's value, on every rank. A collective."""
        own = gather(self.seconds / max(1, self.steps))
        self.seconds, self.steps = 0.0, 0
        slowest, median = max(range(len(own)), key=own.__getitem__), statistics.median(own)
        values = {"slowest": slowest, "slowest_ms": 1000 * own[slowest], "median_ms": 1000 * median,
                  "ratio": own[slowest] / max(median, 1e-9)}
        if values["ratio"] >= RATIO and own[slowest] - median >= SHARE * step_seconds and slowest not in self.named:
            self.named.add(slowest)
            say(f"warning: rank {slowest} takes {values['slowest_ms']:.0f} ms of a step by itself and the median rank "
                f"{values['median_ms']:.0f} ms, and the others wait for it")
        return values
