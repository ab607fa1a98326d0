"""Files and folders that appear complete or not at all, written under another name, synced to disk, then renamed; and
the folder of a run, which one process at a time may write.

A killed process leaves at most a `.NAME.partial` (or `.NAME.old`) beside the file or folder it wrote; the next write of
the same name removes it. It is beside its target because renaming is atomic within one file system alone.
"""

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

from core.errors import UserError


def read_json(path, kind: type = object):
    """The JSON value in a file; UserError where the file is missing or no JSON, or the value no dict as `kind` asks."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as error:
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
    """An open file ("w": UTF-8 text, "wb": bytes) that takes its name when the block ends without an error."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    if path.exists() and (not path.is_file() or str(path).startswith(("/dev/", "/proc/"))):
        # A device or a pipe (/dev/null, /dev/stdout, a fifo) is written to and never replaced.
        with open(path, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
        return
    # Where a link names a file, that file is replaced, and the link stays.
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def new_folder(path, overwrite: bool = False):
    """A new folder to fill, which takes the name `path` when the block ends without an error.

    An existing `path` is a UserError unless `overwrite`; then the old folder keeps its name until the new one is
    complete, is moved aside for the moment of the exchange, and comes back if the exchange fails.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise UserError(f"{path} is no name for a new folder; choose another")
    if path.is_symlink():
        # The folder that the link names is replaced, and the link stays.
        path = path.resolve()
    partial = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        # A process was killed between the two renames below: the old folder is the only complete one.
        old.rename(path)
    refuse_existing(path, overwrite)
    remove(partial)
    remove(old)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            sync(file)
        sync(partial)
        if path.exists():
            path.rename(old)
        partial.rename(path)
    finally:
        remove(partial)
        if old.exists() and not path.exists():
            # The second of the two renames failed.
            old.rename(path)
    sync(path.parent)
    remove(old)


@contextlib.contextmanager
def run_folder(path, world):
    """The folder of a run, locked for this process by rank 0 until the context or the process ends.

    UserError where it holds a finished run, or another process writes it. A run that wrote nothing leaves no folder.
    """
    folder = Path(path)
    # eval.json is the last file that a run writes.
    if (folder / "eval.json").exists():
        raise UserError(f"{folder} holds a finished run; choose another --out, or remove it to run again")
    if not world.main:
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is writing the run folder {folder}; wait for it or choose another "
                            f"--out") from None
        try:
            yield folder
        except BaseException:
            if [file.name for file in folder.iterdir()] == [".lock"]:
                remove(folder)
            raise


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def refuse_existing(path, overwrite: bool = False) -> None:
    """UserError if `path` exists and is no empty folder, unless `overwrite`. Commands ask this before a long job."""
    path = Path(path)
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists already; choose another folder, or pass --overwrite to replace it")


def sync(path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
