"""Many ranks fail as one: the first that fails says why, in one line, and all of them end with its exit status.

A rank that raises, dies or hangs leaves the others waiting in a collective, which says nothing of the reason. So each
rank has a thread that looks at the store of the process group once a second, which needs no collective:

* `fail`, for a rank that raises: the first is told so and speaks. The others end quietly.
* `enter` names what a rank is doing, and how long that may take. Once it takes longer, the rank that the others wait
  for is named: one that shows no sign of life, or else one whose main thread is not in a collective itself. Of several
  it is the one that has begun the fewest collectives of all ranks; some ranks' are not compared, as those at the ends
  of a pipeline have fewer.
* a rank whose connection breaks looks for one that shows no more sign of life, and names it.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from core.errors import UserError
from core.signals import STOPS

ROOT = f"{Path(__file__).resolve().parent.parent}/"
# In which of PyTorch's code a main thread is, from the least to the most likely to wait for other ranks there: in other
# code; in a backward pass, which may wait in C++; in collectives.
AUTOGRAD, DISTRIBUTED = f"{Path(torch.__file__).parent}/autograd/", f"{Path(dist.__file__).parent}/"
# Seconds between two looks at the store, and those that a main thread has to end by itself.
LOOK, GRACE = 1.0, 2.0
GO_ON = "the same command goes on from the newest checkpoint"


def tag_warnings(rank: int):
    """From now on Python's warnings say on which rank they were raised, where that is not 0."""
    plain = warnings.formatwarning
    if rank:
        warnings.formatwarning = lambda *words, **more: f"rank {rank}: {plain(*words, **more)}"


def own_node() -> str:
    """Which of several nodes this rank is on, by torchrun's count and the host's name; "" where there is one."""
    if os.environ.get("LOCAL_WORLD_SIZE") in (None, os.environ.get("WORLD_SIZE")):
        return ""
    return f"node {os.environ.get('GROUP_RANK', '?')}, {socket.gethostname()}"


class Watch(threading.Thread):
    """The thread of one rank. `short`: seconds that a step may take, or five times the slowest step so far where that
    is longer; `long`: seconds for anything else, and for the first step."""

    def __init__(self, rank: int, size: int, short: float, long: float):
        super().__init__(daemon=True, name="watch")
        tag_warnings(rank)
        self.rank, self.size, self.short, self.long = rank, size, short, long
        # A connection of its own: what the main thread waits for in the store must not block this one.
        self.store = dist.PrefixStore("watch", dist.distributed_c10d._get_default_store().clone())
        self.main = threading.main_thread().ident
        self.what, self.since, self.limit = "the start", time.monotonic(), long
        # Seconds of the slowest step, and whether this is a step.
        self.slowest, self.is_step = 0.0, False
        # Whether this rank is the first that failed; whether its watch ends it, having said what there is to say.
        self.speaks = self.is_ending = False
        # {rank: its node}, of the last look at all.
        self.node, self.nodes = own_node(), {}
        # Set: the main thread ends by itself; the thread ends.
        self.looks, self.ends, self.closed = 0, threading.Event(), threading.Event()
        self.show_life()
        self.start()

    # ---- what the main thread says

    def enter(self, what: str, is_step: bool = False):
        """From now on this rank is busy with `what`."""
        now = time.monotonic()
        if self.is_step:
            self.slowest = max(self.slowest, now - self.since)
        self.limit = max(self.short, 5 * self.slowest) if is_step and self.slowest else self.long
        self.what, self.since, self.is_step = what, now, is_step

    @contextlib.contextmanager
    def within(self, seconds: float):
        """A context that may take so long and no longer."""
        kept, self.limit = self.limit, time.monotonic() - self.since + seconds
        try:
            yield
        finally:
            self.limit = kept

    def close(self):
        """Every rank has done its work."""
        self.ends.set()
        self.closed.set()
        self.join()

    def fail(self, error: BaseException):
        """Returns where this rank is to say why it ends; on every other rank the process ends here, quietly.

        A connection that breaks because another rank died is an error of that rank: a UserError names it.
        """
        self.ends.set()
        for number in STOPS:
            # What started the ranks ends the others now, and this one may have something to say.
            signal.signal(number, signal.SIG_IGN)
        is_mistake, dead = isinstance(error, (UserError, OSError)), []
        status = getattr(error, "status", 130 if isinstance(error, KeyboardInterrupt) else 1)
        try:
            if not is_mistake and not self.count("failed"):
                dead = self.find_dead()
            if not self.claim(1 if dead else status):
                self.end()
            self.wait_for("ends", self.size - 1 - len(dead))
        except RuntimeError:
            # The store is gone, and with it the rank that held it.
            dead = [] if is_mistake else [0]
        self.closed.set()
        if self.is_ending:
            # The watch has said why all ranks end, or has left that to another rank. So rank 0 may have ended rightly.
            time.sleep(5 * GRACE)
        if dead:
            raise UserError(self.died(dead), 1) from None

    # ---- the store

    def count(self, name: str, more: int = 0) -> int:
        """A counter that all ranks share."""
        return self.store.add(name, more)

    def show_life(self):
        self.looks += 1
        where, waits, frame = "", 0, sys._current_frames().get(self.main)
        while frame and not where:
            file = frame.f_code.co_filename
            if file.startswith(ROOT) and "site-packages" not in file:
                where = f" (at {file.removeprefix(ROOT)}:{frame.f_lineno})"
            waits = max(waits, file.startswith(AUTOGRAD), 2 * file.startswith(DISTRIBUTED))
            frame = frame.f_back
        self.store.set(f"rank {self.rank}", json.dumps({
            "looks": self.looks, "begun": self.count_begun(), "waits": waits, "where": where,
            "node": self.node}))

    def count_begun(self) -> list[int]:
        """Of each group with all ranks, in the order in which they were made, how many collectives this rank began."""
        groups = sorted((int(name), group) for group, name in [*dist.distributed_c10d._world.pg_names.items()]
                        if name.isdecimal() and group.size() == self.size)
        return [group._get_sequence_number_for_group() for _, group in groups]

    def read_all(self) -> list[dict]:
        known = [json.loads(self.store.get(f"rank {rank}")) for rank in range(self.size)]
        self.nodes = {rank: row["node"] for rank, row in enumerate(known)}
        return known

    def name(self, rank: int) -> str:
        node = self.nodes.get(rank)
        return f"rank {rank} ({node})" if node else f"rank {rank}"

    def died(self, ranks: list[int]) -> str:
        """What to say of ranks that died. The ranks are busy with the same at the same time."""
        return f"{' and '.join(map(self.name, ranks))} died in {self.what}; {GO_ON}"

    def find_dead(self, looks: int = 3) -> list[int]:
        """The other ranks that show no sign of life for so many looks and did not say that they end."""
        before = self.read_all()
        for _ in range(looks):
            # The thread that does this elsewhere may be the one that is here.
            self.show_life()
            time.sleep(LOOK)
        return [rank for rank, now in enumerate(self.read_all())
                if rank != self.rank and now["looks"] == before[rank]["looks"] and not self.count(f"end {rank}")]

    def claim(self, status: int) -> bool:
        """Whether this rank is the first that fails; the others end with its status."""
        if self.count("claims", 1) > 1:
            return False
        self.speaks = True
        self.store.set("status", str(status or 1))
        self.count("failed", 1)
        return True

    def wait_for(self, name: str, number: int):
        """Until a counter is at `number`, and for 2 GRACE at most, or more where this rank may hold the store: one that
        finds it gone says that rank 0 died."""
        end = time.monotonic() + (2 if self.rank else 5) * GRACE
        # Where the rank that holds the store has ended, nothing more can be waited for.
        with contextlib.suppress(RuntimeError):
            while self.count(name) < number and time.monotonic() < end:
                time.sleep(LOOK / 10)

    def end(self):
        """End this process with the status of the first that failed, which waits for that: it may hold the store."""
        self.is_ending |= not self.speaks
        if self.speaks:
            # It is this process's other thread, which has not yet said why.
            time.sleep(5 * GRACE)
        self.wait_for("failed", 1)
        status = int(self.store.get("status"))
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        self.count(f"end {self.rank}", 1)
        self.count("ends", 1)
        if not self.rank:
            # It may hold the store. A rank that finds it gone knows of no other that has said why, and says it too.
            self.wait_for("ends", self.size - 1)
        os._exit(status)

    # ---- the thread

    def run(self):
        try:
            while not self.closed.wait(LOOK):
                self.show_life()
                if self.ends.is_set():
                    continue
                if self.count("failed"):
                    # The main thread may be ending by itself, and cleans up then.
                    if not self.ends.wait(GRACE):
                        self.end()
                elif time.monotonic() - self.since > self.limit:
                    self.name_the_last()
        except RuntimeError:
            # The store is gone. A main thread that is not waiting for the rank that held it goes on to its own end.
            if not self.ends.wait(2 * GRACE):
                print(f"error: {self.died([0])}", file=sys.stderr, flush=True)
                os._exit(1)

    def name_the_last(self):
        """What takes too long: say which ranks the others wait for, and end."""
        seconds = time.monotonic() - self.since
        # On a busy machine a thread may show life late, and so what looks halted is looked at for longer.
        halted = self.find_dead(2) and self.find_dead(4)
        if time.monotonic() - self.since <= self.limit:
            # It has ended meanwhile.
            return
        known = self.read_all()
        least = min(row["waits"] for row in known)
        last = halted or [rank for rank, row in enumerate(known) if row["waits"] == least]
        for begun in zip(*(row["begun"] for row in known if not halted)):
            last = [rank for rank in last if begun[rank] == min(begun[each] for each in last)]
        if not self.claim(1):
            self.end()
        self.is_ending = True
        # Where a process that was halted or has died was then is not known.
        names = [self.name(rank) + ("" if halted else known[rank]["where"]) for rank in last]
        does = "shows no sign of life" if halted else "hangs"
        who = f"{' and '.join(names)} {does}" if len(last) < self.size else "all ranks wait"
        print(f"error: {who} in {self.what}: no rank went on for {seconds:.0f} seconds (--parallel.step-timeout, "
              f"--parallel.timeout); {GO_ON}", file=sys.stderr, flush=True)
        self.wait_for("ends", self.size - 1 - len(halted))
        os._exit(1)
