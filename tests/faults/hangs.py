"""A rank that sleeps, and one that is halted (SIGSTOP): it is named in one line, all the others end in bounded time, it
ends too once it may, and the same command finishes the run, which is then the one in which nothing hung."""

import os
import re
import signal
import time
from pathlib import Path

from core import checkpoint

from .harness import Lab, Row, Team, timed
from .kills import FEW, LAYOUTS, SAVE_EVERY, Case, uninterrupted, words_of
from .results import differences

# Seconds that a step may take here, and anything else.
STEP, OTHER = 3, 8
# Those in which all must have ended: a step may take five times what the slowest one has taken.
MOST = 60
AT = 5
# (what the rank does, where): at the beginning of a step, in the passes through its last block, in the save after the
# step, and while the next steps are done and its part of the save is written.
HANGS = (("sleeps", "before"), ("sleeps", "forward"), ("sleeps", "backward"), ("halts", "before"),
         ("halts", "forward"), ("sleeps", "save"), ("sleeps", "write"))


def stay():
    time.sleep(600)


def halt():
    os.kill(os.getpid(), signal.SIGSTOP)


def hang_at(rank: int, act, where: str):
    """In a worker: call act() on one rank."""
    import train
    real = train.train_step

    def acting(function):
        def call(*arguments):
            act()
            return function(*arguments)
        return call

    def step(run, number, batches):
        if number == AT and run.world.rank == rank:
            block = [*run.inner.layers.children()][-1]
            if where == "before":
                act()
            elif where == "forward":
                block.register_forward_pre_hook(lambda *_: act())
            elif where == "backward":
                block.mlp.register_full_backward_hook(lambda *_: act())
            elif where == "save":
                run.saver.save = acting(run.saver.save)
            else:
                checkpoint.Shards.write = acting(checkpoint.Shards.write)
        return real(run, number, batches)
    train.train_step = step


def judge(lab: Lab, case: Case, row: Row, out: Path, does: str, where: str, rank: int):
    """Start the run in `out`, which goes on from its save before the step, with a rank that hangs."""
    seconds, named = uninterrupted(lab, case)[1], f"{case.name}: rank {rank} {does} ({where})"
    words = words_of(lab, case, out, "--parallel.step-timeout", STEP, "--parallel.timeout", OTHER)
    team = Team(words, case.ranks, lambda: hang_at(rank, stay if does == "sleeps" else halt, where), agent=True)
    others = [worker for worker in team.workers if worker is not team.workers[rank]]
    end = time.monotonic() + MOST + 10 * seconds
    row.check(not any(worker.is_alive(end - time.monotonic()) for worker in others), f"{named}: others did not end")
    # What halted it lets it go on; torchrun ends it anyhow.
    team.workers[rank].send(signal.SIGCONT)
    row.check(not team.workers[rank].is_alive(15), f"{named}: it did not end itself")
    team.kill()
    ended = team.wait(1)
    errors = [line for outcome in ended for line in outcome.err.splitlines() if line.startswith("error:")]
    # A save begins after step 6 and is waited for after step 9.
    doing = {"save": f"(step {AT + 1}|the save at step {AT + 1})", "write": f"the save at step {AT + 1 + SAVE_EVERY}"}
    sign = r"( \(at \S+\))? hangs" if does == "sleeps" else " shows no sign of life"
    says = rf"error: rank {rank}{sign} in {doing.get(where, f'step {AT + 1}')}: "
    is_named = len(errors) == 1 and re.match(says, errors[0])
    row.check(is_named, f"{named}: {errors or [str(outcome) for outcome in ended]}")
    row.check({outcome.status for outcome in ended} == {1}, f"{named}: {[str(outcome) for outcome in ended]}")


def on_layout(case: Case):
    def section(lab: Lab) -> Row:
        row = Row("hangs", case.name)
        if lab.short and case not in FEW[:1]:
            row.notes = "not tried: it takes too long for this"
            return row
        with timed(row):
            out, (reference, seconds) = lab.room("run"), uninterrupted(lab, case)
            for i, (does, where) in enumerate(HANGS[1:2] if lab.short else HANGS):
                judge(lab, case, row, out, does, where, i % case.ranks)
            again = Team(words_of(lab, case, out), case.ranks).wait(60 + 20 * seconds)
            wrong = [str(outcome) for outcome in again if outcome.status != 0] or differences(reference, out)
            row.check(not wrong, f"{case.name}: the same command again: {'; '.join(wrong)}")
            lab.clear(out)
        row.notes = "a rank sleeps or is halted before a step, in its passes, before a save, in the writing of it"
        return row
    return section


HANGS_OF_ALL = [*map(on_layout, LAYOUTS)]
