"""SIGKILL before each file operation, as traced, of every command that writes: what was valid stays valid, and the same
command then finishes the work. Again with the machine's power, which takes what was not synced; and as a control with
a manifest that is not synced, which must fail."""

import os
import shutil
from pathlib import Path

from runs import arguments

from . import kill_points
from .commands import Command, content, each_command, is_whole, made, put_old
from .damages import wait_for_checkpoints
from .harness import Lab, Row, command, start, timed
from .results import differences, records, snapshot

STEPS, SAVE_EVERY, KEEP = 6, 2, 2


def watched(module: str, words, folder: Path, kill_at: int | None, power: bool = False, patch=None) -> tuple:
    """(outcome, the operations under `folder`) of a command that is killed before its operation `kill_at`."""
    told = os.memfd_create("told")

    def work():
        # A log loses its last lines with the power, and not its first half.
        listed = kill_points.list_files
        kill_points.list_files = lambda folder: [file for file in listed(folder) if not file.endswith(".jsonl")]
        kill_points.Watch(folder.resolve(), told, kill_at, power)
        if patch:
            patch()
        return command(module, words)
    try:
        outcome = start(work).wait()
        return outcome, os.pread(told, os.fstat(told).st_size, 0).decode(errors="replace").splitlines()
    finally:
        os.close(told)


def spread(count: int, most: int | None, power: bool) -> list[int]:
    """All numbers below `count`, or about `most` of them, evenly; with power a third, as each is a kill as well."""
    stride = (3 if power else 1) if most is None else max(1, -(-count // most))
    return list(range(0 if most is None else stride // 2, count, stride))


# ---- commands

def disturb(lab: Lab, each: Command, row: Row, most: int | None, power: bool = False) -> int:
    """Kill one command at each of its points; returns how many there are."""
    new, old = content(made(lab, each, 1)), content(made(lab, each, 0)) if each.overwrites else {}
    room = lab.room(each.module)
    prepare(lab, each, room)
    out = room / f"out{each.suffix}"
    words = each.line(lab, out)
    outcome, operations = watched(each.module, words, room, None)
    if not row.check(outcome.status == 0 and content(out) == new, f"{each.name}: undisturbed, {outcome}"):
        return 0
    clean = {path.name for path in room.iterdir()}
    for k in spread(len(operations), most, power):
        prepare(lab, each, room)
        outcome, done = watched(each.module, words, room, k, power)
        where = f"{each.name}{', power lost' if power else ''}, before {k} of {len(operations)} " \
                f"({done[-1].replace(str(room), '') if done else ''})"
        found = content(out)
        kept = outcome.status == 137 and is_whole(each, found, old, new)
        row.check(kept, f"{where}: {outcome} and {describe(found, old, new)}")
        again = start(each.module, words).wait()
        finished = again.status == 0 or (found == new and again.is_one_line)
        row.check(finished and content(out) == new, f"{where}: the same command again: {again}")
        left = {path.name for path in room.iterdir()} - clean
        row.check(not left, f"{where}: leaves {sorted(left)}")
    lab.clear(room)
    return len(operations)


def prepare(lab: Lab, each: Command, room: Path):
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    put_old(lab, each, room / f"out{each.suffix}")


def describe(found: dict, old: dict, new: dict) -> str:
    if found and found not in (old, new):
        return f"something half-written: {sorted(found)[:4]}"
    return "what was there is gone" if not found else "all is whole"


# ---- a run

def run_words(lab: Lab, out: Path, *more) -> list[str]:
    base = ["--model.init", "pretrained", "--model.path", lab.base]
    return arguments(lab.sources, out, "--train.save-every", SAVE_EVERY, "--train.keep", KEEP, "--eval.every", 4,
                     "--eval.tokens", 120, *base, *more, steps=STEPS)


def committed(out: Path) -> int:
    """The newest step of which the run said that it was saved."""
    return max((r["step"] for r in records(out, "event") if "checkpoint saved" in r.get("message", "")), default=0)


def disturb_run(lab: Lab, row: Row, most: int | None, *more, power: bool = False, patch=None, damage: int = 0) -> int:
    """Kill a whole run (save, prune, evaluation, export) at each of its points; returns how many there are.

    damage: first break the checkpoint of this step of a run that was killed later, so that the step is saved again.
    """
    out = lab.room("reference")
    outcome = start("train", run_words(lab, out, *more)).wait()
    assert outcome.status == 0, outcome.err
    reference = snapshot(out)
    begun = lab.room("begun")
    begun.mkdir()
    if damage:
        break_at(lab, out, begun, damage, more)
    out = lab.room("run")
    shutil.copytree(begun, out)
    outcome, operations = watched("train", run_words(lab, out, *more), out, None, patch=patch)
    if row.check(outcome.status == 0, f"undisturbed, {outcome}"):
        for k in spread(len(operations), most, power):
            shutil.rmtree(out)
            shutil.copytree(begun, out)
            outcome, done = watched("train", run_words(lab, out, *more), out, k, power, patch)
            where = f"run{', power lost' if power else ''}, before {k} of {len(operations)} " \
                    f"({done[-1].replace(str(out), '') if done else ''})"
            before, already = committed(out), len(records(out, "resume"))
            if (out / "eval.json").exists():
                # What follows it is a report, which any later command makes again.
                row.check(not differences(reference, out), f"{where}: {'; '.join(differences(reference, out))}")
                continue
            again = start("train", run_words(lab, out, *more)).wait()
            step = max((record["step"] for record in records(out, "resume")[already:]), default=0)
            row.check(step >= before, f"{where}: step {before} had been saved, and {step} was resumed")
            wrong = differences(reference, out) if again.status == 0 else [str(again)]
            row.check(not wrong, f"{where}: the same command again: {'; '.join(wrong)}")
            left = leftovers(out)
            row.check(not left, f"{where}: leaves {left}")
    for path in (out, begun):
        lab.clear(path)
    return len(operations)


def break_at(lab: Lab, finished: Path, begun: Path, step: int, more):
    """Fill `begun` with what a run leaves that was ended after `step`, whose checkpoint is then broken."""
    shutil.rmtree(begun)

    def stop_early():
        import train
        real = train.train_step

        def count(run, number, batches):
            if number == step + 1:
                wait_for_checkpoints(run.folder, 2)
                os._exit(9)
            return real(run, number, batches)
        train.train_step = count
        return command("train", run_words(lab, begun, *more))
    assert start(stop_early).wait().status == 9
    folder = begun / "checkpoints" / f"step_{step:08d}"
    victim = max(folder.rglob("*.safetensors"), key=lambda file: file.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(data)


def leftovers(out: Path) -> list[str]:
    marks = (".partial", ".old", ".trash", ".tmp")
    return sorted(path.name for path in out.rglob("*") if any(mark in path.name for mark in marks))


# ---- the sections

def kill_commands(lab: Lab, power: bool) -> Row:
    """F3: each command that writes; where the power goes too, at every third point."""
    row = Row("points", f"{'power lost' if power else 'SIGKILL'} before a file operation: commands")
    with timed(row):
        chosen = list(each_command(lab, row))[::2 if lab.short and power else 1]
        counts = [disturb(lab, each, row, 1 if lab.short else None, power) for each in chosen]
    row.notes = f"{sum(counts)} operations of {len(counts)} commands"
    return row


def kill_runs(lab: Lab, power: bool) -> Row:
    """F3 and F17: a whole run, one with adapters, and one that saves a step again whose checkpoint is damaged."""
    row, few = Row("points", f"{'power lost' if power else 'SIGKILL'} before a file operation: runs"), lab.short
    with timed(row):
        count = disturb_run(lab, row, 3 if few else None, power=power)
        if not few and not power:
            count += disturb_run(lab, row, 30, "--lora.rank", 4)
            count += disturb_run(lab, row, 60, damage=4)
    row.notes = f"{count} operations of build, save, prune, saving again and export"
    return row


POINTS = [lambda lab: kill_commands(lab, False), lambda lab: kill_runs(lab, False),
          lambda lab: kill_commands(lab, True), lambda lab: kill_runs(lab, True)]


def forget_to_sync_the_manifest():
    """In a worker: fsync of a manifest does nothing, as in trainers that write their last file by a plain open()."""
    sync = os.fsync

    def fsync(descriptor):
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        # Also under the name that it has while it is written.
        if "manifest.json" not in os.path.basename(os.readlink(f"/proc/self/fd/{number}")):
            sync(descriptor)
    os.fsync = fsync


def manifest_not_synced(lab: Lab) -> Row:
    """Must fail: SIGKILL alone cannot show it, because what a process wrote outlives it; the loss of power does."""
    row, inner = Row("control", "manifest not synced, power lost: must fail"), Row("", "")
    with timed(row):
        disturb_run(lab, inner, 5 if lab.short else None, power=True, patch=forget_to_sync_the_manifest)
    row.check(bool(inner.failures), "no kill point did harm without the fsync of the manifest")
    row.notes = f"failed in {len(inner.failures)} of {inner.tried} checks" if inner.failures else ""
    return row
