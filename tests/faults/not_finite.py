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
        gradient = next(p.grad for p in model.parameters() if p.grad is not None)
        (gradient.to_local() if hasattr(gradient, "to_local") else gradient).view(-1)[0] = value
        parallel.clip_gradients = clip
        return clip(model, limit)
    parallel.clip_gradients = clip_spoilt


def plant(where: str, value: float, at: int, rank: int = 0):
    """In a worker: spoil one element before step `at`, on one rank."""
    import train
    real = train.train_step

    def step(run, number, batches):
        if number == at and run.world.rank == rank:
            parameter = next(p for p in run.inner.parameters() if p.requires_grad)
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
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


def judge_rewind(lab: Lab, case: Case, row: Row, at: int, rank: int):
    """The state after the fault is that of the save before it, on all ranks; and the run that is killed behind it, and
    started again, is the one that was not."""
    outs, named = [lab.room("run"), lab.room("run")], f"{case.name}: a gradient rewinds, step {at + 1}, rank {rank}"
    more, last = ("--guard.nonfinite", "rewind", "--train.keep", 99), SAVE_EVERY * (at // SAVE_EVERY)

    def again(out, setup=lambda: None):
        def prepare():
            plant("gradient", float("nan"), at, rank)
            setup()
        return Team(words_of(lab, case, out, *more), case.ranks, prepare).wait(300)
    ended = again(outs[0])
    row.check(all(outcome.status == 0 for outcome in ended), f"{named}: {' and '.join(map(str, ended))}")
    found = [(record["step"], record["to"]) for record in records(outs[0], "rewind")]
    row.check(found == [(at + 1, last)], f"{named}: rewinds {found}")
    row.check(not not_finite_on_disk(outs[0]), f"{named}: not finite on the disk")
    if (at + 1) % SAVE_EVERY == 0:
        before, after = (tensors(outs[0] / f"checkpoints/step_{step:08d}") for step in (last, at + 1))
        row.check(bool(before) and before == after, f"{named}: what was saved is not the state of step {last}")
    again(outs[1], lambda: die_before(at + 3))
    resumed = again(outs[1])
    wrong = [str(outcome) for outcome in resumed if outcome.status != 0] or differences(snapshot(outs[0]), outs[1])
    row.check(not wrong, f"{named}: killed and started again: {'; '.join(wrong)}")
    for out in outs:
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
                for value in (float("nan"),) if lab.short else (float("nan"), float("inf")):
                    judge(lab, ONE[0], row, where, value, at, 0)
                    if not lab.short and math.isnan(value):
                        for case in LAYOUTS:
                            judge(lab, case, row, where, value, at, case.ranks - 1)
        if not lab.short:
            judge(lab, ONE[0], row, "gradient", float("nan"), 5, 0, "--guard.nonfinite", "stop")
        for case in ONE[:1] if lab.short else (ONE[2], *LAYOUTS):
            for at in STEPS[:1] if lab.short else STEPS:
                judge_rewind(lab, case, row, at, case.ranks - 1)
    return row

