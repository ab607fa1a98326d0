"""The same command started twice at once, on one folder: one does the work, the other refuses in one line."""

import os
import shutil

from .commands import Command, content, each_command, made, put_old
from .harness import Lab, Outcome, Row, Worker, command, timed
from .kills import ONE, uninterrupted, words_of
from .points import leftovers
from .results import differences


def start_together(module: str, words, count: int = 2) -> list[Outcome]:
    """Processes that wait for one pipe to be closed, and then all begin."""
    reader, writer = os.pipe()

    def work():
        os.close(writer)
        os.read(reader, 1)
        return command(module, words)
    workers = [Worker(work) for _ in range(count)]
    os.close(writer)
    os.close(reader)
    return [worker.wait() for worker in workers]


def race(lab: Lab, each: Command, row: Row, times: int):
    new = content(made(lab, each, 1))
    room = lab.room("race")
    for i in range(times):
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir()
        out = room / f"out{each.suffix}"
        put_old(lab, each, out)
        ended = start_together(each.module, each.line(lab, out))
        done = [outcome for outcome in ended if outcome.status == 0]
        refused = [outcome for outcome in ended if outcome.is_one_line]
        # Where one had finished before the other began, both have done what they were asked to.
        row.check(done and len(done) + len(refused) == 2 and (each.overwrites or len(done) == 1 or each.suffix),
                  f"{each.name}, start {i}: {' and '.join(map(str, ended))}")
        alone = content(out) == new and not leftovers(room)
        row.check(alone, f"{each.name}, start {i}: not what one of them makes alone, {leftovers(room)}")
    lab.clear(room)


def race_of_runs(lab: Lab, row: Row, times: int):
    reference, _ = uninterrupted(lab, ONE[0])
    for i in range(times):
        out = lab.room("run")
        ended = start_together("train", words_of(lab, ONE[0], out))
        row.check(sorted(outcome.status or 0 for outcome in ended) == [0, 2] and any(o.is_one_line for o in ended),
                  f"runs, start {i}: {' and '.join(map(str, ended))}")
        wrong = differences(reference, out)
        row.check(not wrong, f"runs, start {i}: {'; '.join(wrong)}")
        lab.clear(out)


def races_of_commands(lab: Lab) -> Row:
    row = Row("races", "two commands on one folder at once")
    with timed(row):
        for each in each_command(lab, row):
            race(lab, each, row, lab.count(10, 1))
    return row


def races_of_runs(lab: Lab) -> Row:
    row = Row("races", "two runs on one folder at once")
    with timed(row):
        race_of_runs(lab, row, lab.count(10, 1))
    return row


RACES = [races_of_commands, races_of_runs]
