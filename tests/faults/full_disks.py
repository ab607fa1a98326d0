"""A disk that is full at each stage of each command: one line that names the file, exit status 2, nothing half-written;
with room again the same command finishes the work. A run goes on over a failed periodic save.

The disk is a small tmpfs where this process may mount one, and else a limit on the size of a file.
"""

import contextlib
import os
import resource
import shutil
import subprocess
from pathlib import Path

from runs import arguments

from .commands import Command, content, each_command, is_whole, made, put_old
from .harness import Lab, Outcome, Row, command, start, timed
from .points import leftovers
from .results import checkpoints, differences, snapshot

PAGE = os.sysconf("SC_PAGE_SIZE")


def can_mount(lab: Lab) -> bool:
    if "mount" not in lab.notes:
        try:
            with Disk(lab.room("disk"), 1 << 20):
                lab.notes["mount"] = True
        except (OSError, subprocess.CalledProcessError):
            lab.notes["mount"] = False
    return lab.notes["mount"]


class Disk(contextlib.AbstractContextManager):
    """A tmpfs of `size` bytes at a new folder."""

    def __init__(self, folder: Path, size: int):
        self.folder = folder
        folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={max(size, PAGE)}", "faults", folder], check=True,
                       capture_output=True)

    def grow(self, size: int):
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], check=True, capture_output=True)

    def used(self) -> int:
        found = os.statvfs(self.folder)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def __exit__(self, *_):
        subprocess.run(["umount", "-l", self.folder], check=True, capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def with_limit(module: str, words, most: int) -> Outcome:
    """Where nothing can be mounted: no file may be larger than `most` bytes."""
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        return command(module, words)
    return start(work).wait()


def names_a_file(outcome: Outcome, folder: Path) -> bool:
    return outcome.is_one_line and str(folder) in outcome.err


# ---- commands

def fill(lab: Lab, each: Command, row: Row, count: int):
    """A command on disks of `count` sizes, from almost nothing to what it leaves."""
    new, old = content(made(lab, each, 1)), content(made(lab, each, 0)) if each.overwrites else {}
    files = [file for file in made(lab, each, 1).parent.rglob("*") if file.is_file()]
    need = sum(-(-file.stat().st_size // PAGE) * PAGE + PAGE for file in files)
    largest = max(file.stat().st_size for file in files)
    for k in range(count):
        room, share = lab.room("disk"), (k + 0.5) / count
        out = room / f"out{each.suffix}"
        words = each.line(lab, out)
        if not can_mount(lab):
            room.mkdir()
            put_old(lab, each, out)
            outcome = with_limit(each.module, words, int(share * largest))
            judge(lab, each, row, f"{each.name}, files of at most {int(share * largest)} bytes", out, outcome, old, new)
            lab.clear(room)
            continue
        with Disk(room, 1 << 28) as disk:
            put_old(lab, each, out)
            before = disk.used()
            size = before + int(share * need) // PAGE * PAGE + PAGE
            disk.grow(size)
            where = f"{each.name}, {size - before:,} of {need:,} bytes free"
            outcome = start(each.module, words).wait()
            if outcome.status == 0 and content(out) == new:
                continue
            judge(lab, each, row, where, out, outcome, old, new)
            disk.grow(1 << 28)
            again = start(each.module, words).wait()
            row.check(again.status == 0 and content(out) == new, f"{where}: with room again: {again}")


def judge(lab: Lab, each: Command, row: Row, where: str, out: Path, outcome: Outcome, old: dict, new: dict):
    found = content(out)
    row.check(names_a_file(outcome, out.parent), f"{where}: {outcome}")
    row.check(is_whole(each, found, old, new), f"{where}: leaves {sorted(found)[:4]}")
    row.check(not leftovers(out.parent), f"{where}: leaves {leftovers(out.parent)}")


# ---- a run

def run_words(lab: Lab, out: Path) -> list[str]:
    return arguments(lab.sources, out, "--train.save-every", 2, "--train.keep", 2, "--eval.every", 4, "--eval.tokens",
                     120, steps=6)


def fill_run(lab: Lab, row: Row, count: int):
    """A run on disks of `count` sizes."""
    reference = lab.room("reference")
    assert start("train", run_words(lab, reference)).wait().status == 0
    expected = snapshot(reference)
    if not can_mount(lab):
        row.notes = "not tried: nothing can be mounted"
        return
    with Disk(lab.room("disk"), 1 << 28) as disk:
        assert start("train", run_words(lab, disk.folder / "run")).wait().status == 0
        need = disk.used()
    warned = 0
    for k in range(count):
        with Disk(lab.room("disk"), int((k + 0.5) / count * need)) as disk:
            out = disk.folder / "run"
            where = f"run on a disk of {int((k + 0.5) / count * need):,} of {need:,} bytes"
            outcome = start("train", run_words(lab, out)).wait()
            warned += "warning" in outcome.out + outcome.err
            if outcome.status != 0:
                row.check(names_a_file(outcome, out), f"{where}: {outcome}")
                broken = [path.name for path in checkpoints(out) if not (path / "manifest.json").is_file()]
                row.check(not broken, f"{where}: leaves {broken} half-written")
                row.check(not leftovers(out), f"{where}: leaves {leftovers(out)}")
                disk.grow(1 << 28)
                outcome = start("train", run_words(lab, out)).wait()
            wrong = [str(outcome)] if outcome.status else differences(expected, out)
            row.check(not wrong, f"{where}: with room again: {'; '.join(wrong)}")
    row.notes = f"{warned} went on over a save that failed"


def fill_between_saves(lab: Lab, row: Row):
    """The disk is full when a periodic save is due, and has room again for the next one."""
    for when in (1,) if lab.short else (1, 2, 3):
        if not can_mount(lab):
            return
        with Disk(lab.room("disk"), 1 << 26) as disk:
            out = disk.folder / "run"

            def work(when=when, out=out, disk=disk):
                from stages.resume import Saver
                real, calls, ballast = Saver.save, [], disk.folder / "ballast"

                def save(saver, step):
                    # The one before is written in the background.
                    saver.wait()
                    calls.append(step)
                    if len(calls) == when:
                        free = os.statvfs(disk.folder)
                        ballast.write_bytes(bytes((free.f_bavail - 4) * free.f_frsize))
                    else:
                        ballast.unlink(missing_ok=True)
                    return real(saver, step)
                Saver.save = save
                return command("train", run_words(lab, out))
            outcome = start(work).wait()
            last = when == 3
            said = outcome.out + outcome.err
            expected = outcome.status == (2 if last else 0) and "Traceback" not in said
            row.check(expected, f"full at save {when}: {outcome}")
            row.check(last or "warning" in said, f"full at save {when}: nothing was said")
            (disk.folder / "ballast").unlink(missing_ok=True)
            if outcome.status:
                outcome = start("train", run_words(lab, out)).wait()
            row.check(outcome.status == 0 and (out / "eval.json").exists(), f"full at save {when}, again: {outcome}")


def full_for_commands(lab: Lab) -> Row:
    """F5: each stage of each command."""
    row = Row("disks", "a full disk at each stage: commands")
    with timed(row):
        for each in each_command(lab, row):
            fill(lab, each, row, lab.count(6, 1))
    return row


def full_for_a_run(lab: Lab) -> Row:
    row = Row("disks", "a full disk at each stage: a run")
    with timed(row):
        fill_run(lab, row, lab.count(12, 2))
    return row


def full_for_a_while(lab: Lab) -> Row:
    row = Row("disks", "full at one periodic save: the run goes on")
    with timed(row):
        fill_between_saves(lab, row)
    return row


DISKS = [full_for_commands, full_for_a_run, full_for_a_while]
