"""The folder of a run: one writer at a time, and nothing in it leads the run to files that are not its own, because it
may come from a stranger."""

import contextlib
import os
import re
from pathlib import Path

from core.errors import UserError
from core.files import FolderKind, clear_leftovers, file_holds, lock_folder, make_folder, remove, walk_names

# What every config.toml of a run holds.
RUN_MARK = b"[forget."
# What a run makes before its config.toml, and what shells and batch systems log beside it.
BEGUN = FolderKind("run folder", (".lock", "fisher_*/*", "packed/*/*", "events.out.tfevents.*", "*.log", "*.out",
                                  "*.err"))


@contextlib.contextmanager
def run_folder(path, world, parts: dict[str, FolderKind] | None = None):
    """The folder of a run, locked for this process by rank 0 until the context or the process ends.

    UserError where it holds a finished run, or files that are no run's, or another process writes it; parts: the kinds
    of its folders that are replaced as a whole. A run that wrote nothing leaves no folder.
    """
    folder = Path(path)
    refuse_finished(folder)
    if not world.main:
        yield folder
        return
    refuse_odd_files(folder, parts or {})
    refuse_no_run(folder)
    for name, kind in (parts or {}).items():
        kind.refuse_others(folder / name)
    make_folder(folder)
    with lock_folder(folder / ".lock", folder):
        # The process that had the lock may have ended meanwhile.
        refuse_finished(folder)
        for place in (folder, folder / "checkpoints"):
            clear_leftovers(place)
        try:
            yield folder
        except BaseException:
            if [file.name for file in folder.iterdir()] == [".lock"]:
                remove(folder)
            raise


def refuse_finished(folder: Path) -> None:
    # eval.json is the last file that a run writes.
    if (folder / "eval.json").exists():
        raise UserError(f"{folder} holds a finished run; choose another --out, or remove it to run again")


def refuse_no_run(folder: Path) -> None:
    """UserError if a folder holds files and no run's config.toml; what BEGUN names, a run makes before that."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and the run wants a folder; choose another --out")
    if file_holds(folder / "config.toml", RUN_MARK):
        return
    for name in walk_names(folder):
        is_empty = str(name) == "metrics.jsonl" and not (folder / name).stat().st_size
        if not (BEGUN.holds(name) or name.parts[0] == "wandb" or is_empty):
            raise UserError(f"{folder} holds {str(name)!r} and is no run folder, so files could be lost there; choose "
                            f"another --out")


def refuse_odd_files(folder: Path, parts) -> None:
    """UserError if what a run writes is a link, which leads to files elsewhere, or a pipe or a folder, which is found
    late. checkpoints/ may be a link, as to a larger disk, if nothing but checkpoints is there."""
    for path in sorted(folder.glob("*")):
        if (path.suffix in (".json", ".jsonl", ".toml", ".html") and (path.is_symlink() or not path.is_file())) or (
                path.suffix == ".lock" and path.is_dir() and not path.is_symlink()):
            raise UserError(f"{path} is no regular file, and a run writes one there; move it away")
    for path in (folder / name for name in parts if (folder / name).is_symlink()):
        raise UserError(f"{path} is a link, and a run replaces what is there; move it away")
    place = folder / "checkpoints"
    if os.path.lexists(place) and not place.is_dir():
        raise UserError(f"{place} is no folder, and a run makes one there; move it away")
    other = next((path.name for path in sorted(place.glob("*")) if not re.fullmatch(r"\.?step_\d+(\.\w+)?", path.name)
                  ), None) if place.is_symlink() else None
    if other:
        raise UserError(f"{place} is a link to a folder that holds {other!r}, and there may be checkpoints alone; move "
                        f"it away")
