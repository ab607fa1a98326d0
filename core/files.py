"""Files and folders that appear complete or not at all: written under another name, synced to disk, then renamed. One
process at a time writes a place, and replaces only what a command of ours has made there.

Beside a file or folder NAME stand, while it is written,

    .NAME.partial    the new one; after the exchange, for a moment, the old one
    .NAME.old        the old folder, on a file system that cannot exchange two names in one step
    .NAME.lock       who is writing the folder: pid, host, since when, with which command

and a folder whose files change one by one (of a run, of clean.py) has its `.lock` within. What a killed process leaves
of these is told from a living one's by the lock, which ends with its process, and is removed by the next write there.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from safetensors import SafetensorError

from core.errors import UserError

# Of Linux's renameat2: names are relative to the working folder, and the two exchange their places.
AT_FDCWD, RENAME_EXCHANGE = -100, 2
# The errors of a file system that has no locks, and those of a disk that takes no more.
NO_LOCKS = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.ENOLCK)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of "." and ".." nothing is left: they are the folder itself and the one above it.
LEFTOVER = re.compile(r"\.(?!\.?\.\w+\Z)(.+)\.(partial|old|lock)")
# Descriptors of the locks that this process holds, and the lock files that a whole command of it holds.
_held, _claimed = set(), set()


@dataclass(frozen=True)
class FolderKind:
    """What a folder of a command's may hold, so that the command replaces no other folder.

    files: patterns of the files in it, such as bucket_*/*.bin. marks: {file: bytes that ours holds}; one must be there.
    """

    name: str
    files: tuple[str, ...]
    marks: dict[str, bytes] = field(default_factory=dict)

    def refuse_others(self, path: Path) -> None:
        """UserError with what was found if `path` is neither missing, nor an empty folder, nor one of this kind."""
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, and no {self.name}; choose another --out, or move it away")
        first = None
        for name in walk_names(path):
            if not self.holds(name):
                raise UserError(f"{path} holds {str(name)!r}, which is no part of a {self.name}, so it is not "
                                f"replaced; choose another --out, or move it away")
            first = first or name
        if first and not self.marks_it(path):
            raise UserError(f"{path} holds {str(first)!r}, but no command of ours has made a {self.name} of that, so "
                            f"it is not replaced; choose another --out, or move it away")

    def marks_it(self, path: Path) -> bool:
        return any(file_holds(path / name, mark) for name, mark in self.marks.items())

    def holds(self, name: PurePath) -> bool:
        """Whether a folder of this kind may hold the file `name`, relative to it, or a killed process has left it."""
        return any(LEFTOVER.fullmatch(part) for part in name.parts) or any(
            name.match(pattern) and len(name.parts) == pattern.count("/") + 1 for pattern in self.files)


def walk_names(folder: Path) -> Iterator[PurePath]:
    """Each file and link in a folder, relative to it, those of one folder in order; and each folder that cannot be
    read. The folder may be somebody's home: who looks for one file ends the walk there."""
    # os.walk calls itself for each folder in a folder, and so has a limit.
    waiting = [""]
    while waiting:
        place = waiting.pop()
        try:
            entries = sorted(os.scandir(os.path.join(folder, place)), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            yield PurePath(place)
            continue
        inner = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
        for entry in entries:
            if entry not in inner:
                yield PurePath(place, entry.name)
        waiting += [os.path.join(place, entry.name) for entry in reversed(inner)]


def file_holds(path: Path, mark: bytes) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return mark in file.read(1 << 16)


def read_json(path, kind: type = object):
    """The JSON value in a file; UserError where the file is missing or no JSON, or the value no dict as `kind` asks."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}; make or fetch it again") from None
    if not isinstance(value, kind):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object of named values")
    return value


def write_json(path, value) -> None:
    """Write `value` as JSON, indented by one space; the folder is made where it is missing."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path, text: str) -> None:
    """Write `text` as UTF-8; the folder is made where it is missing."""
    with new_file(path) as handle:
        handle.write(text)


@contextlib.contextmanager
def new_file(path, mode: str = "w"):
    """An open file ("w": UTF-8 text, "wb": bytes) that takes its name when the block ends without an error.

    Where another process writes the same file, it is waited for: the last one's file stays.
    """
    path, encoding = Path(path), None if "b" in mode else "utf-8"
    # A name that is no UTF-8 stands in a text as an escape, which is JSON's too.
    errors = None if "b" in mode else "backslashreplace"
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    if path.exists() and (not path.is_file() or str(path).startswith(("/dev/", "/proc/"))):
        # A device or a pipe (/dev/null, /dev/stdout, a fifo) is written to and never replaced.
        with open(path, mode, encoding=encoding, errors=errors) as handle:
            yield handle
        return
    # Where a link names a file, that file is replaced, and the link stays.
    path = path.resolve()
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.partial")
    with naming_full_disks(path), lock_file(partial, wait=True) as descriptor:
        try:
            os.ftruncate(descriptor, 0)
            with open(descriptor, mode, encoding=encoding, errors=errors, closefd=False) as handle:
                yield handle
                handle.flush()
                os.fsync(descriptor)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    sync(path.parent)


@contextlib.contextmanager
def new_folder(path, overwrite: bool = False, kind: FolderKind | None = None):
    """A new folder to fill, which takes the name `path` when the block ends without an error.

    An existing `path` is a UserError unless `overwrite` and, where a `kind` is given, it is of that kind; then the old
    folder keeps its name until the new one is complete, and at no moment is there none. The files' modes follow the
    umask, whoever wrote them. UserError where another process writes the same folder.
    """
    path = resolve_name(path)
    make_folder(path.parent)
    partial, old = (path.with_name(f".{path.name}.{end}") for end in ("partial", "old"))
    with lock_folder(path.with_name(f".{path.name}.lock"), path):
        clear_name(path)
        refuse_existing(path, overwrite, kind)
        partial.mkdir()
        try:
            yield partial
            finish_folder(partial)
            refuse_existing(path, overwrite, kind)
            if not (path.is_dir() and any(path.iterdir())):
                # Of an empty folder the renaming itself makes a full one.
                partial.rename(path)
            elif not exchange(partial, path):
                path.rename(old)
                partial.rename(path)
            sync(path.parent)
        finally:
            clear_name(path)


@contextlib.contextmanager
def claim_folder(path, overwrite: bool, kind: FolderKind):
    """For a whole command what `new_folder` does at its end: refuse what is there, and lock the place."""
    path = resolve_name(path)
    make_folder(path.parent)
    lock = path.with_name(f".{path.name}.lock")
    with lock_folder(lock, path):
        clear_name(path)
        refuse_existing(path, overwrite, kind)
        _claimed.add(lock)
        try:
            yield
        finally:
            _claimed.discard(lock)


def resolve_name(path) -> Path:
    """The place of a folder that is to be written, however it was spelled: the folder that a link names is replaced,
    and the link stays. UserError where it can be no new folder's."""
    path = Path(path)
    if path.name in ("", ".."):
        raise UserError(f"{path} is no name for a new folder; choose another")
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, and a folder is to be made there; choose another name")
    if os.path.ismount(path):
        raise UserError(f"a disk is mounted at {path}, so it cannot be renamed; name a folder in it")
    return path


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, and sync the names of the new ones."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def finish_folder(folder: Path) -> None:
    """Give all in a folder the modes of the umask, where libraries leave 0600, and sync files and folders to disk."""
    mode = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)
        sync(path)
    sync(folder)


@contextlib.contextmanager
def naming_full_disks(path):
    """In the block, an error that says that a disk is full, and not where, gets the name of `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors says it in words: "Error while serializing: I/O error: No space left on device (os error 28)".
        told = re.search(r"^Error while serializing.*\(os error (\d+)\)", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number not in FULL or getattr(error, "filename", None):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


@functools.cache
def find_renameat2():
    """The C library's function, or None where there is none."""
    return getattr(ctypes.CDLL(None), "renameat2", None)


def exchange(new: Path, old: Path) -> bool:
    """Exchange two names in one step; False where it did not happen: systems, file systems and containers that cannot
    say so by many error numbers, and two renames find out what else may be wrong."""
    renameat2 = find_renameat2()
    return renameat2 is not None and renameat2(
        AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0


def find_folder(path) -> Path:
    """The folder `path`; where a process was killed in exchanging it, between two renames, the old one."""
    path = Path(path)
    old = path.with_name(f".{path.name}.old") if path.name else path
    return old if old.is_dir() and not os.path.lexists(path) else path


def clear_name(path: Path) -> None:
    """Remove what a writer of the folder `path` has left beside it; an old folder without its name gets that back.
    The caller holds the folder's lock."""
    partial, old = (path.with_name(f".{path.name}.{end}") for end in ("partial", "old"))
    if old.is_symlink():
        # None of ours: the folder that it names would be taken for the old one.
        old.unlink()
    if old.exists() and not os.path.lexists(path):
        old.rename(path)
    remove(partial)
    if old.exists():
        # A folder that is being removed has another name than one that may be needed.
        old.rename(partial)
        remove(partial)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes have left in a folder of ours; what living ones write stays."""
    for path in sorted(folder.glob(".*.*")):
        name = LEFTOVER.fullmatch(path.name)
        with contextlib.suppress(UserError):
            if name and (path.is_symlink() or not (path.is_file() or path.is_dir())):
                # No process of ours makes a link or a pipe. It would be in the way of the next that writes there.
                path.unlink(missing_ok=True)
            elif name and name[2] == "partial" and path.is_file():
                with lock_file(path):
                    path.unlink()
            elif name:
                with lock_folder(folder / f".{name[1]}.lock", folder / name[1]):
                    clear_name(folder / name[1])


# ---- who is writing

@contextlib.contextmanager
def lock_folder(lock: Path, folder: Path):
    """The lock on `folder`, with who holds it written into the file `lock`, until the block or the process ends."""
    if lock in _claimed:
        yield
        return
    with naming_full_disks(folder), lock_file(lock, f"{folder} is being written by another process") as descriptor:
        words = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        who = f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}: {words}"
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, who.encode(errors="replace"))
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_file(path: Path, refusal: str = "", wait: bool = False):
    """The descriptor of the file `path`, made where it is missing and locked until the block or the process ends.
    Where another process has it locked: a UserError that begins with `refusal`, or `wait`."""
    descriptor = take_lock(path, refusal, wait)
    _held.add(descriptor)
    let_children_go()
    try:
        yield descriptor
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def take_lock(path: Path, refusal: str, wait: bool) -> int:
    while True:
        descriptor = open_lock(path)
        try:
            # A file that is waited for is small in nearly every case, and its writer soon done.
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            who = os.pread(descriptor, 300, 0).decode(errors="replace")
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                # Anybody may have written that file, so only what can be printed is shown.
                who = "".join(c if c.isprintable() else " " for c in who)
                raise UserError(f"{refusal} ({who}); wait for it or choose another --out") from None
            if error.errno not in NO_LOCKS:
                raise
            # Some clusters' file systems are mounted so, and are all that there is.
            warn_of_no_locks()
            return open_lock(path)
        # Its last holder may have renamed or removed the file meanwhile: then it is not the one to lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def open_lock(path: Path) -> int:
    """A descriptor of the file, made where it is missing. The file is to be emptied and written, so a link is refused:
    in a folder of a stranger's it may name any file of the user's."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise UserError(f"{path} is no regular file, as it is where a command of ours makes it; remove it")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


@functools.cache
def warn_of_no_locks() -> None:
    print("warning: the file system of --out has no locks, so nothing keeps a second process from writing there at the "
          "same time; start one at a time", file=sys.stderr)


def let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()
    _claimed.clear()


@functools.cache
def let_children_go() -> None:
    """Let processes forked from this one leave its locks, so that none outlives it in a worker."""
    os.register_at_fork(after_in_child=let_go)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        try:
            shutil.rmtree(path, ignore_errors=True)
        except RecursionError:
            # It calls itself for each folder in a folder; the system's own command has no limit.
            subprocess.run(["rm", "-rf", "--", path], check=False)
    else:
        path.unlink(missing_ok=True)


def refuse_existing(path, overwrite: bool = False, kind: FolderKind | None = None) -> None:
    """UserError if `path` exists and is no empty folder, unless `overwrite` and it is of the `kind`, if one is given.
    Commands ask this before a long job."""
    path = Path(path)
    if kind:
        kind.refuse_others(path)
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists already; choose another folder, or pass --overwrite to replace it")


def settle(*files) -> None:
    """Write what open files still hold to the disk: one that is full should be known while the old files are whole."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def sync(path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
