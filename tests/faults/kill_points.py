"""Kill a function before each of its file operations, as they are traced and not as anybody guesses them.

    trace(function, folder)            -> the operations of an undisturbed run, in order, a line each
    run_and_kill(function, k, folder)  -> what became of a run that was killed with SIGKILL before its k-th operation

The function runs in a forked child, so that what it does to this process's memory is gone, and PyTorch's import is paid
once. Counted are the operations under `folder`: what Python itself reports to an audit hook (a file opened for writing,
a rename, a removal, a new folder, a link, a lock), and what no hook sees: fsync, safetensors' writing, the exchange of
two folders. A safetensors file has a second point, at which half of it is on the disk.

With `power=True` the kill takes the machine's power along: what was added to a synced file is lost,
and half of every other one that was written and not synced.
"""

import dataclasses
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import safetensors.torch

from core import files

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# The audit events that change a disk, and where among their arguments stand the paths, each with the descriptor of the
# folder that it is relative to (None: it has none).
EVENTS = {"os.rename": ((0, 2), (1, 3)), "os.link": ((0, 2), (1, 3)), "os.symlink": ((1, 2),), "os.remove": ((0, 1),),
          "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),), "os.chmod": ((0, 2),), "os.truncate": ((0, None),)}


@dataclasses.dataclass
class Ended:
    """How a child ended. status: its exit status, or minus the number of the signal that killed it. output: what it
    printed, with the traceback of what it raised."""

    status: int
    operations: list[str]
    output: str


def trace(function, folder) -> list[str]:
    """The file operations under `folder` of a run of `function`; an AssertionError where it fails."""
    ended = run_child(function, folder)
    assert ended.status == 0, ended.output
    return ended.operations


def run_and_kill(function, k: int, folder, power: bool = False) -> Ended:
    """Run `function` and kill it before its k-th operation (from 0) under `folder`; status 0 where it has fewer."""
    return run_child(function, folder, k, power)


def run_child(function, folder, kill_at: int | None = None, power: bool = False) -> Ended:
    """Run function() in a forked child, killed before operation `kill_at` if that is given."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            status = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                Watch(Path(folder).resolve(), told.fileno(), kill_at, power)
                result = function()
                status = result if isinstance(result, int) else 0
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told.seek(0)
        output.seek(0)
        return Ended(status, told.read().decode(errors="replace").splitlines(), output.read().decode(errors="replace"))


class Watch:
    """In the child: notes each operation under `folder` on the descriptor `told` before it happens, and kills."""

    def __init__(self, folder: Path, told: int, kill_at: int | None, power: bool):
        self.folder, self.told, self.kill_at, self.power = str(folder), told, kill_at, power
        self.count, self.busy = 0, False
        # Files that were here before are on the disk; of the others those that were synced since.
        self.safe = dict(stamp(os.stat(file)) for file in list_files(self.folder))
        sync, write, swap = os.fsync, safetensors.torch.serialize_file, getattr(files, "exchange", None)

        def fsync(descriptor):
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            self.meet("fsync", os.readlink(f"/proc/self/fd/{number}"))
            sync(descriptor)
            self.safe.update([stamp(os.fstat(number))])

        def serialize_file(tensors, name, **options):
            self.meet("write", os.fspath(name))
            write(tensors, name, **options)
            self.meet("write the second half of", os.fspath(name), half=True)

        def exchange(new, old):
            self.meet("exchange", os.fspath(new), os.fspath(old))
            return swap(new, old)

        os.fsync, files.exchange = fsync, exchange
        safetensors.torch.serialize_file = serialize_file
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple):
        if self.busy:
            return
        if event == "open" and arguments[2] is not None and arguments[2] & WRITES:
            self.meet("open", arguments[0])
        elif event in EVENTS:
            self.meet(event.removeprefix("os."), *(
                join(-1 if at is None else arguments[at], arguments[place]) for place, at in EVENTS[event]))
        elif event == "fcntl.flock":
            self.meet("lock", os.readlink(f"/proc/self/fd/{arguments[0]}"))

    def meet(self, what: str, *paths, half: bool = False):
        """Note an operation; where its number is up, this process is no more."""
        self.busy = True
        try:
            paths = [os.path.abspath(os.fsdecode(path)) for path in paths if not isinstance(path, int)]
            if not any(f"{path}/".startswith(f"{self.folder}/") for path in paths):
                return
            os.write(self.told, f"{what} {' '.join(paths)}\n".encode())
            if self.count == self.kill_at:
                if half:
                    os.truncate(paths[0], os.path.getsize(paths[0]) // 2)
                if self.power:
                    self.lose_power()
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
        finally:
            self.busy = False

    def lose_power(self):
        """What the disk had not been told to keep is gone."""
        for file in list_files(self.folder):
            which, (size, when) = stamp(os.stat(file))
            synced, synced_when = self.safe.get(which, (None, None))
            if (size, when) != (synced, synced_when):
                os.truncate(file, synced if synced is not None and synced < size else size // 2)


def stamp(status: os.stat_result) -> tuple:
    """(which file it is, what changes when it is written again)"""
    return (status.st_dev, status.st_ino), (status.st_size, status.st_mtime_ns)


def list_files(folder: str) -> list[str]:
    found = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    return [file for file in found if os.path.isfile(file) and not os.path.islink(file)]


def join(descriptor: int, path) -> str | int:
    """The path of an operation that was given relative to an open folder; -1 stands for none."""
    if descriptor < 0 or isinstance(path, int):
        return path
    return os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), os.fsdecode(path))
