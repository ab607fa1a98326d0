"""SIGTERM, SIGINT, SIGUSR1, SIGHUP and a closed standard output, at each stage of a run: no step is lost, the exit
status says which signal it was, and the same command ends as if nothing had happened. A second one leaves at once."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time

from runs import ENV, ROOT

from .harness import Lab, Outcome, Row, Team, Worker, command, timed
from .kills import FEW, LAYOUTS, ONE, Case, uninterrupted, words_of
from .results import checkpoints, differences, records

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# The functions of train.py that a stage is made of, and which call of it gets the signal.
STAGES = {"build": ("build", 1), "evaluation": ("evaluate", 2), "step": ("train_step", 5), "save": ("save", 2),
          "end": ("finish", 1)}


def at_stage(stage: str, act):
    """In a worker: call act() when a run comes to a stage."""
    import train
    from stages import resume
    name, wanted = STAGES[stage]
    owner = getattr(resume, "Saver", train) if name == "save" else train
    real, calls = getattr(owner, name), []

    def reach(*arguments, **options):
        calls.append(name)
        if len(calls) == wanted:
            act()
        return real(*arguments, **options)
    setattr(owner, name, reach)


def send_to_self(number: int, delay: float):
    """Now, or from another thread after a while, when the main thread is in the middle of the stage."""
    if not delay:
        os.kill(os.getpid(), number)
        return
    later = threading.Timer(delay, os.kill, (os.getpid(), number))
    later.daemon = True
    later.start()


def loses_nothing(lab: Lab, case: Case, out, ended: list[Outcome], status: int, row: Row, where: str):
    """Check the exit status of each rank, run the same command again, and compare with the reference."""
    reference, seconds = uninterrupted(lab, case)
    statuses = {outcome.status for outcome in ended}
    # A signal that comes when all is done changes nothing.
    over = statuses == {0} and (out / "eval.json").exists()
    row.check(statuses == {status} or over, f"{where}: {[str(outcome) for outcome in ended]} instead of {status}")
    if not over:
        again = Team(words_of(lab, case, out), case.ranks).wait(30 + 20 * seconds)
        wrong = [str(outcome) for outcome in again if outcome.status != 0] or differences(reference, out)
        row.check(not wrong, f"{where}: the same command again: {'; '.join(wrong)}")
    done = [record["step"] for record in records(out, "train")]
    row.check(len(done) == len(set(done)), f"{where}: {len(done) - len(set(done))} steps were done twice")
    lab.clear(out)


def one_process(lab: Lab, row: Row):
    case, (_, seconds) = ONE[0], uninterrupted(lab, ONE[0])
    for i, stage in enumerate(STAGES):
        # In short, each signal in one stage and each stage once.
        for number in (SIGNALS[i % len(SIGNALS)],) if lab.short else SIGNALS:
            for delay in (0.0,) if lab.short else (0.0, lab.random.uniform(0, seconds / 5)):
                out = lab.room("run")
                where = f"{number.name} in {stage} after {delay * 1000:.0f} ms"

                def setup(stage=stage, number=number, delay=delay):
                    at_stage(stage, lambda: send_to_self(number, delay))
                ended = Team(words_of(lab, case, out), setup=setup).wait(60 + 20 * seconds)
                loses_nothing(lab, case, out, ended, 128 + number, row, where)


def several_ranks(case: Case):
    """One rank gets the signal, or all do at different times: all leave after the same step."""
    def check(lab: Lab, row: Row):
        if lab.short and case not in FEW:
            row.notes = "not tried: it takes too long for this"
            return
        stages = ("step", "save", "evaluation")
        # DDP and FSDP2 get each signal at each stage; the others each stage once, with a signal of its own.
        both = [(number, stage) for number in SIGNALS for stage in stages]
        for number, stage in both[:1] if lab.short else both if case in LAYOUTS[:2] else zip(SIGNALS, stages):
            out = lab.room("run")

            def setup(stage=stage, number=number):
                # The last rank alone, or each a little later than the one before.
                rank, last = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
                if rank == last or number != signal.SIGTERM:
                    at_stage(stage, lambda: send_to_self(number, 0.01 * rank))
            ended = Team(words_of(lab, case, out), case.ranks, setup).wait(120)
            loses_nothing(lab, case, out, ended, 128 + number, row, f"{case.name}, {number.name} in {stage}")
    return checked(case.name, check)


def second_signal(lab: Lab, row: Row):
    """The first one is noted in a step; the second comes in the save that the first one asked for, which hangs."""
    case = ONE[0]
    reference, seconds = uninterrupted(lab, case)
    for number in SIGNALS[:1] if lab.short else SIGNALS:
        out, told = lab.room("run"), os.memfd_create("told")

        def setup(number=number, told=told):
            def hang():
                send_to_self(number, 1.5)
                os.write(told, f"{time.monotonic() + 1.5}\n".encode())
                time.sleep(100)
            at_stage("step", lambda: os.kill(os.getpid(), number))
            at_stage("save", hang)
        ended = Team(words_of(lab, case, out), setup=setup).wait(60 + 20 * seconds)[0]
        sent = os.pread(told, 100, 0).decode().split()
        os.close(told)
        late = time.monotonic() - float(sent[0]) if sent else 99
        row.check(ended.status in (128 + number, 130) and late < 30, f"second {number.name}: {ended}, {late:.1f} s")
        again = Team(words_of(lab, case, out)).wait(60 + 20 * seconds)[0]
        wrong = [str(again)] if again.status else differences(reference, out)
        row.check(not wrong, f"second {number.name}: the same command again: {'; '.join(wrong)}")
        lab.clear(out)


def closed_stdout(lab: Lab, row: Row):
    """The reader of a pipe goes away after some lines: the work is done, or saved and left with SIGPIPE's status."""
    case, (_, seconds) = ONE[0], uninterrupted(lab, ONE[0])
    for count in (3,) if lab.short else (0, 1, 3, 6, 10, 15, 20, 25):
        out = lab.room("run")
        reader, writer = os.pipe()
        worker = Worker(lambda out=out: command("train", words_of(lab, case, out)), stdout=writer)
        os.close(writer)
        with open(reader, "rb") as lines:
            for _ in range(count):
                lines.readline()
        loses_nothing(lab, case, out, [worker.wait(60 + 20 * seconds)], 128 + signal.SIGPIPE, row,
                      f"stdout closed after {count} lines")


def torchrun(lab: Lab, row: Row):
    """One real launcher, which passes SIGTERM on. Its own exit status is 1 whatever the ranks' are."""
    if lab.short:
        row.notes = "not tried: it takes ten seconds to start"
        return
    case, out = LAYOUTS[0], lab.room("run")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
             str(ROOT / "train.py"), *words_of(lab, case, out, "--train.steps", 400, "--eval.every", 1000)]
    log = out.with_suffix(".log")
    with open(log, "w") as said, subprocess.Popen(words, env=ENV, stdout=said, stderr=said, cwd=ROOT) as running:
        end = time.monotonic() + 90
        while time.monotonic() < end and running.poll() is None and len(records(out, "train")) < 5:
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(60)
        if not row.check(running.poll() is not None, "torchrun: not gone 60 s after SIGTERM"):
            running.kill()
    done, found = max((r["step"] for r in records(out, "train")), default=0), checkpoints(out)
    said = log.read_text(errors="replace")
    told = re.search(r"SIGTERM: saved at step \d+ of 400", said)
    row.check(told, f"torchrun: nobody said that it saved: {said[-400:]}")
    newest = int(found[-1].name[5:]) if found else 0
    row.check(0 < done <= newest, f"torchrun: step {done} was done and {newest} is saved")


def checked(what: str, check):
    def section(lab: Lab) -> Row:
        row = Row("signals", what)
        with timed(row):
            check(lab, row)
        return row
    return section


SIGNALS_AND_MORE = [
    checked("SIGTERM, SIGINT, SIGUSR1, SIGHUP in each stage", one_process),
    *map(several_ranks, LAYOUTS),
    checked("a second signal during a save that hangs", second_signal),
    checked("standard output closed", closed_stdout), checked("SIGTERM to torchrun", torchrun)]
