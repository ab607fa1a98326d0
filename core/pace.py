"""Which rank the others wait for: seconds of a step that each rank takes by itself.

All ranks make a step in the same time, because those that are done wait for the slowest. What a rank takes by itself is
measured where nobody is waited for: from the last exchange before a step until its first one (reading batches, work of
the host), and within the forward passes of the blocks, behind FSDP's gathering of their weights. A rank whose disk,
processor or neighbours are slow has more of it than the median rank.

Example: of four ranks one takes 90 ms and the others 30 ms: it is named, with a ratio of 3.

It is the host's time: a GPU computes behind its host, and a slow one shows in the common time of a step alone. So do
blocks that are compiled.
"""

import statistics
import time

from torch import nn

# From which ratio on a rank is worth a warning, if it also takes this share of the step longer than the median rank.
RATIO, SHARE = 1.5, 0.2


class Pace:
    """This rank's own seconds. clock: another one in tests."""

    def __init__(self, clock=time.perf_counter):
        self.clock = clock
        # When the last exchange with other ranks ended, and when the block that is computing began.
        self.left, self.began = None, 0.0
        self.seconds, self.steps, self.named = 0.0, 0, set()

    def time_blocks(self, blocks: list[nn.Module]):
        """Count the blocks' forward passes in training too. To be called once they are sharded: FSDP's hooks, which
        wait for the weights, then stand around these."""
        for block in blocks:
            block.register_forward_pre_hook(self.enter_block)
            block.register_forward_hook(self.leave_block, prepend=True)

    def enter_block(self, block, args):
        self.began = self.clock()

    def leave_block(self, block, args, output):
        if block.training:
            self.seconds += self.clock() - self.began

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
