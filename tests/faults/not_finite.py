"""A NaN or an infinity in a gradient, in a weight, in the optimizer's state, on one rank of several, in a step after
which the run saves: nothing that is not finite reaches the disk, and what is there resumes."""

import json
import math
import os
import signal
from pathlib import Path

import torch

from core import parallel

from .harness import Lab, Row, Team, timed
from .kills import LAYOUTS, ONE, SAVE_EVERY, Case, uninterrupted, words_of
from .results import checkpoints, differences, records, snapshot, tensors

# Counted from 0: after one of them the run saves, after the other it does not.
STEPS = (5, 7)


def spoil_gradient(value: float):
    """Once, when the ranks have shared their gradients: those of one rank then differ from the others'."""
    clip = parallel.clip_gradients

    def clip_spoilt(model, limit):
        parts = (p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in model.parameters()
                 if p.grad is not None)
        next(part for part in parts if part.numel()).view(-1)[0] = value
        parallel.clip_gradients = clip
        return clip(model, limit)
    parallel.clip_gradients = clip_spoilt


def plant(where: str, value: float, at: int, rank: int = 0):
    """In a worker: spoil one element before step `at`, on one rank."""
    import train
    real = train.train_step

    def step(run, number, batches):
        if number == at and run.world.rank == rank:
            # Of some a rank holds no rows.
            parameter, local = next((p, part) for p in run.inner.parameters() if p.requires_grad
                                    and (part := p.to_local() if hasattr(p, "to_local") else p).numel())
            with torch.no_grad():
                if where == "gradient":
                    spoil_gradient(value)
                elif where == "weight":
                    local.view(-1)[0] = value
                else:
                    state = next(x for x in run.optimizer.state[parameter].values() if x.is_floating_point() and x.ndim)
                    state = state.to_local() if hasattr(state, "to_local") else state
                    state.view(-1)[0] = value
        return real(run, number, batches)
    train.train_step = step


def not_finite_on_disk(out: Path) -> list[str]:
    """The tensors under a folder that hold a NaN or an infinity."""
    found = []
    for file in [file for folder in (*checkpoints(out), out / "final", out / "adapter")
                 for file in folder.rglob("*.safetensors")]:
        raw = file.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:8 + size]).items():
            kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
            if name != "__metadata__" and entry["dtype"] in kinds:
                begin, end = (8 + size + offset for offset in entry["data_offsets"])
                values = torch.frombuffer(bytearray(raw[begin:end]), dtype=kinds[entry["dtype"]])
                found += [f"{file.name}/{name}"] * (not torch.isfinite(values).all().item())
    return found


def judge(lab: Lab, case: Case, row: Row, where: str, value: float, at: int, rank: int, *more):
    out = lab.room("run")
    named = f"{' '.join(map(str, (case.name, *more)))}: {value} in a {where}, step {at + 1}, rank {rank}"
    reference, seconds = uninterrupted(lab, case, *more)
    ended = Team(words_of(lab, case, out, *more), case.ranks, lambda: plant(where, value, at, rank)).wait(
        60 + 20 * seconds)
    statuses = {outcome.status for outcome in ended}
    row.check(statuses in ({0}, {2}) and not any("Traceback" in o.err for o in ended),
              f"{named}: {' and '.join(map(str, ended))}")
    row.check(not not_finite_on_disk(out), f"{named}: not finite on the disk: {not_finite_on_disk(out)[:3]}")
    if statuses == {0}:
        said = "".join(outcome.out + outcome.err for outcome in ended)
        row.check(where == "gradient" and "warning" in said, f"{named}: ended as if nothing had been, {ended[0]}")
    else:
        again = Team(words_of(lab, case, out, *more), case.ranks).wait(60 + 20 * seconds)
        wrong = [str(outcome) for outcome in again if outcome.status != 0]
        # A step that was left out stays so; where none was, the run is what it would have been.
        wrong = wrong or (differences(reference, out) if where != "gradient" else not_finite_on_disk(out))
        row.check(not wrong, f"{named}: the same command without it: {'; '.join(wrong)}")
    lab.clear(out)


def judge_rewind(lab: Lab, case: Case, row: Row, faults: list[tuple]):
    """faults: [(step counted from 0, rank)]. The state after each is that of the save before it, on all ranks; and the
    run that is killed behind the last, and started again, is the one that was not."""
    outs, named = [lab.room("run"), lab.room("run")], f"{case.name}: gradients rewind, {faults}"
    more, wanted = ("--guard.nonfinite", "rewind", "--train.keep", 99), []

    def again(out, setup=lambda: None):
        def prepare():
            for at, rank in faults:
                plant("gradient", float("nan"), at, rank)
            setup()
        return Team(words_of(lab, case, out, *more), case.ranks, prepare).wait(300)
    ended = again(outs[0])
    row.check(all(outcome.status == 0 for outcome in ended), f"{named}: {' and '.join(map(str, ended))}")
    for at, _ in faults:
        wanted.append((at + 1, last := SAVE_EVERY * (at // SAVE_EVERY)))
        if (at + 1) % SAVE_EVERY == 0:
            before, after = (tensors(outs[0] / f"checkpoints/step_{step:08d}") for step in (last, at + 1))
            row.check(bool(before) and before == after, f"{named}: what was saved is not the state of step {last}")
    found = [(record["step"], record["to"]) for record in records(outs[0], "rewind")]
    row.check(found == wanted, f"{named}: rewinds {found}")
    row.check(not not_finite_on_disk(outs[0]), f"{named}: not finite on the disk")
    again(outs[1], lambda: die_before(faults[-1][0] + 3))
    resumed = again(outs[1])
    wrong = [str(outcome) for outcome in (*ended, *resumed) if outcome.status != 0] or \
        differences(snapshot(outs[0]), outs[1])
    row.check(not wrong, f"{named}: killed and started again: {'; '.join(wrong)}")
    for out in outs:
        lab.clear(out)


def judge_skip(lab: Lab, case: Case, row: Row):
    """Two updates are left out because of one rank's gradient: the run ends as one whose fault is on another rank."""
    outs = lab.room("run"), lab.room("run")
    for rank, out in zip((case.ranks - 1, 0), outs):
        def prepare(rank=rank):
            for at, value in zip(STEPS, (math.nan, math.inf)):
                plant("gradient", value, at, rank)
        ended, named = Team(words_of(lab, case, out), case.ranks, prepare).wait(300), f"{case.name}: skip, rank {rank}"
        row.check(all(outcome.status == 0 for outcome in ended), f"{named}: {' and '.join(map(str, ended))}")
        said = "".join(outcome.out + outcome.err for outcome in ended)
        for at in STEPS:
            row.check(f"in step {at + 1} the " in said, f"{named}: ended as if nothing had been in step {at + 1}")
        row.check(not not_finite_on_disk(out), f"{named}: not finite on the disk: {not_finite_on_disk(out)[:3]}")
    wrong = differences(snapshot(outs[0]), outs[1]) if (outs[0] / "eval.json").exists() else ["it is not done"]
    row.check(not wrong, f"{case.name}: skip on the last rank and on the first: {'; '.join(wrong)}")
    for out in outs:
        lab.clear(out)


def judge_chain(lab: Lab, case: Case, row: Row):
    """One run that is broken off by a weight or a state of one rank four times, each time behind the last save, and
    then goes on to the end that it would have had."""
    reference, seconds = uninterrupted(lab, case)
    out, last = lab.room("run"), case.ranks - 1
    for where, at, rank in (("weight", 5, last), ("state", 7, last), ("weight", 10, 0), ("state", 14, 0)):
        named = f"{case.name}: NaN in a {where}, step {at + 1}, rank {rank}"
        ended = Team(words_of(lab, case, out), case.ranks,
                     lambda where=where, at=at, rank=rank: plant(where, math.nan, at, rank)).wait(60 + 20 * seconds)
        row.check({outcome.status for outcome in ended} == {2} and sum(o.is_one_line for o in ended) == 1,
                  f"{named}: {' and '.join(map(str, ended))}")
        row.check(not not_finite_on_disk(out), f"{named}: not finite on the disk: {not_finite_on_disk(out)[:3]}")
    ended = Team(words_of(lab, case, out), case.ranks).wait(60 + 20 * seconds)
    wrong = [str(outcome) for outcome in ended if outcome.status != 0] or differences(reference, out)
    row.check(not wrong, f"{case.name}: the same command without it: {'; '.join(wrong)}")
    lab.clear(out)


def die_before(at: int):
    """In a worker: it ends as by a kill before step `at`."""
    import train
    real = train.train_step

    def step(run, number, batches):
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(run, number, batches)
    train.train_step = step


def not_finite(lab: Lab) -> Row:
    """F8 and, by the same gate, what an exploding rate does."""
    row = Row("not finite", "in a gradient, a weight, the optimizer's state")
    with timed(row):
        for where in ("gradient", "weight", "state"):
            for at in STEPS[:1] if lab.short else STEPS:
                for value in (math.nan,) if lab.short else (math.nan, math.inf):
                    judge(lab, ONE[0], row, where, value, at, 0)
        if not lab.short:
            judge(lab, ONE[0], row, "gradient", math.nan, 5, 0, "--guard.nonfinite", "stop")
        for case in ONE[:1] if lab.short else (ONE[0], ONE[2]):
            judge_rewind(lab, case, row, [(5, 0)] if lab.short else [(5, 0), (13, 0)])
    return row


def on_layout(case: Case):
    """The same on one rank of several."""
    def section(lab: Lab) -> Row:
        row = Row("not finite", case.name)
        if lab.short:
            row.notes = "not tried: it takes too long for this"
            return row
        with timed(row):
            judge_skip(lab, case, row)
            judge_chain(lab, case, row)
            judge_rewind(lab, case, row, [(5, case.ranks - 1), (13, 0)])
        row.notes = "a NaN or an infinity on the last rank alone, and on the first"
        return row
    return section


NOT_FINITE = [not_finite, *map(on_layout, LAYOUTS)]
