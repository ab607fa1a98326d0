"""SIGKILL at random times: a run that is killed and started again, until it is done, equals one that nothing happened
to, in every logged loss, every weight and every moment. And the control: rules that other trainers have must fail."""

import itertools
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

from runs import arguments

from core.groups import CONNECT

from .harness import Lab, Row, Team, timed
from .results import differences, records, snapshot, steps_done

STEPS, SAVE_EVERY = 24, 3
# Seconds in which a rank notices that another one died (gloo: one), and those after torchrun's signal: while the ranks
# connect for their saves it takes CONNECT seconds, and on a busy machine some more until the process has ended.
ALONE, GRACE = 5.0, 2.0 * CONNECT


@dataclass
class Case:
    name: str
    words: tuple
    ranks: int = 1


BASE = ("--model.init", "pretrained", "--model.path", "{base}")
ONE = [
    Case("full weights", ()),
    Case("adapters, LoRA", (*BASE, "--lora.rank", 4, "--lora.dropout", 0.1)),
    Case("EMA and EWC", (*BASE, "--forget.ema.decay", 0.9, "--forget.ewc.strength", 1, "--forget.ewc.samples", 8)),
    Case("adaptive replay", (*BASE, "--forget.adaptive.policy", "degradation", "--data.domain-share", 0.7,
                             "--data.schedule", "static")),
    Case("8-bit states", ("--optim.name", "adamw_8bit")),
]
FSDP = ("--parallel.strategy", "fsdp")
# One layout of each kind.
LAYOUTS = [Case("two ranks, DDP", (), 2), Case("two ranks, FSDP2", FSDP, 2),
           Case("four ranks, HSDP", (*FSDP, "--parallel.replicas", 2), 4),
           Case("four ranks, tensor parallel x FSDP2", (*FSDP, "--parallel.tensor", 2), 4),
           Case("two ranks, context parallel", ("--parallel.context", 2), 2),
           Case("two ranks, pipeline", ("--parallel.pipeline", 2), 2),
           Case("four ranks, expert parallel", (*FSDP, *BASE[:3], "{experts}", "--parallel.experts", 2), 4),
           Case("four ranks, pipeline x FSDP2", (*FSDP, "--parallel.pipeline", 2, "--train.micro-batch-size", 1), 4)]
# Those of continuous integration: with a part of the state on each rank, and with all of it.
FEW = (LAYOUTS[1], LAYOUTS[4])


def words_of(lab: Lab, case: Case, out: Path, *more) -> list[str]:
    own = [str(word).format(base=lab.base, experts=lab.experts) for word in case.words]
    return arguments(lab.sources, out, "--train.save-every", SAVE_EVERY, "--eval.every", 8, "--eval.tokens", 120,
                     *own, *more, steps=STEPS)


def uninterrupted(lab: Lab, case: Case, *more) -> tuple[dict, float]:
    """(what it left, seconds) of the same run without a fault; made once."""
    key = f"{case.name} {more}"
    if key not in lab.notes:
        out = lab.room("reference")
        outcomes = Team(words_of(lab, case, out, *more), case.ranks).wait(300)
        assert all(outcome.status == 0 for outcome in outcomes), "\n".join(map(str, outcomes)) + outcomes[0].err
        lab.notes[key] = snapshot(out), max(outcome.seconds for outcome in outcomes)
        lab.clear(out)
    return lab.notes[key]


def storm(lab: Lab, case: Case, kills: int, row: Row, setup=None, after_kill=None, give_up: bool = False) -> dict:
    """Kill runs of a case until so many kills are done, each until it is finished, and compare what they leave.

    setup: called in each process before the command. after_kill: called with the run folder after each kill. give_up:
    stop at the first failure. Returns {"runs", "kills", "lost": the most steps that one kill cost, "late": kills after
    the first step of a run, however often it was started}.
    """
    reference, seconds = uninterrupted(lab, case)
    done, runs, lost, late = 0, 0, 0, 0
    while done < kills and not (give_up and row.failures):
        out, runs = lab.room("run"), runs + 1
        for attempt in itertools.count():
            before, already = steps_done(out), len(records(out, "resume"))
            team = Team(words_of(lab, case, out), case.ranks, setup)
            if done < kills and team.is_alive(lab.random.uniform(0.05, 0.9 * seconds)):
                done += 1
                team.kill(lab.random.sample(team.workers, lab.random.choice(range(1, case.ranks + 1))))
                if team.is_alive(ALONE):
                    # Ranks that had not met yet know nothing of each other; torchrun ends the others by SIGTERM.
                    team.send(signal.SIGTERM)
                row.check(not team.is_alive(GRACE), f"{case.name}: a rank waits for a dead one for {GRACE:.0f} s")
                team.kill()
                team.wait(1)
                late += steps_done(out) > 0
                if after_kill:
                    after_kill(out)
            else:
                outcomes = team.wait(30 + 20 * seconds)
                if any(outcome.status != 0 for outcome in outcomes) and not (out / "eval.json").exists():
                    row.failures.append(f"{case.name}: stuck after {done} kills, {outcomes[0]}")
                    break
            resumed = records(out, "resume")[already:]
            lost = max([lost, *(before - record["step"] for record in resumed)])
            if (out / "eval.json").exists():
                if different := differences(reference, out):
                    row.failures.append(f"{case.name}: {'; '.join(different)}")
                break
            if attempt > 200:
                row.failures.append(f"{case.name}: not done after 200 starts")
                break
        lab.clear(out)
    return {"runs": runs, "lost": lost, "kills": done, "late": late}


def kill_at_random(lab: Lab, what: str, cases: list[Case], total: int) -> Row:
    """F1 and F2: so many kills in all, at random times."""
    row = Row("kills", f"random SIGKILL, {what}")
    shares = [total // len(cases) + (i < total % len(cases)) for i in range(len(cases))]
    with timed(row):
        found = [storm(lab, case, share, row) for case, share in zip(cases, shares)]
    several = ", ".join(f"{case.name} {share}" for case, share in zip(cases, shares)) + "; "
    row.notes = (f"{several if len(cases) > 1 else ''}"
                 f"{sum(each['runs'] for each in found)} runs{' all equal' if not row.failures else ''}; "
                 f"{sum(each['late'] for each in found)} kills after a run's first step; at most "
                 f"{max(each['lost'] for each in found)} steps lost, saved every {SAVE_EVERY}")
    return row


def kill_layout(case: Case):
    def section(lab: Lab) -> Row:
        if lab.short and case not in FEW:
            return Row("kills", f"random SIGKILL, {case.name}", notes="not tried: it takes too long for this")
        return kill_at_random(lab, case.name, [case], lab.count(25 if case in LAYOUTS[:2] else 20, 1))
    return section


KILLS = [lambda lab: kill_at_random(lab, "one process", ONE[::3] if lab.short else ONE, lab.count(200, 6)),
         *map(kill_layout, LAYOUTS)]


# ---- the control: the same harness over a rule that is wrong

def trust_the_highest_number():
    """In a worker: a checkpoint is what has the name of one, as transformers' get_last_checkpoint has it."""
    from core import checkpoint
    checkpoint.verify = checkpoint.find_damage = lambda *_, **__: None


def give_partial_folders_their_name(out: Path):
    """After a kill: as a trainer that writes straight into checkpoints/step_N leaves it."""
    for partial in (out / "checkpoints").glob(".*step_*"):
        step = partial.name[partial.name.index("step_"):][:13]
        target = partial.with_name(step)
        if partial.is_dir() and step[5:].isdecimal():
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)


def highest_number_wins(lab: Lab) -> Row:
    """F2b: must fail, or the comparison above proves nothing."""
    row, inner = Row("control", "written in place, highest step wins: must fail"), Row("", "")
    with timed(row):
        found = storm(lab, ONE[0], 200, inner, trust_the_highest_number, give_partial_folders_their_name, give_up=True)
    row.check(bool(inner.failures), "200 kills did no harm to a rule that is known to be wrong")
    row.notes = f"failed after {found['kills']} kills" if inner.failures else ""
    return row

