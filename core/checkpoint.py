"""Training state on disk: tensors in safetensors, one small JSON, and a manifest with hashes. Nothing is pickled.

    checkpoints/step_00000100/{model.safetensors, optimizer.safetensors, state.json, manifest.json}

A checkpoint is written under another name, synced, and renamed: the rename is the commit. Because disks still lose
bytes, hashes are checked before a run resumes, and the newest checkpoint that passes is used.
"""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from core.errors import UserError
from core.files import new_folder, read_json, write_json
from core.hashing import hash_file


def save(folder: Path, step: int, model: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor], state: dict,
         keep: int) -> Path:
    """Write the state after `step` steps under `folder`, then remove all but the newest `keep` checkpoints.

    model, optimizer: {name: full CPU tensor}. state: what else the run needs to resume, as JSON values. A checkpoint of
    the same step stays until the new one is complete.
    """
    path = path_of(folder, step)
    try:
        with new_folder(path, overwrite=True) as partial:
            for part, tensors in (("model", model), ("optimizer", optimizer)):
                save_file(tensors, partial / f"{part}.safetensors", metadata={"format": "pt"})
            write_json(partial / "state.json", {"step": step, **state})
            files = {file.name: {"bytes": file.stat().st_size, "sha256": hash_file(file)} for file in partial.iterdir()}
            write_json(partial / "manifest.json", {"files": files})
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path} could not be written ({error}); make room, and the same command goes on "
                        f"from the newest there is") from None
    for old in steps(folder)[:-keep]:
        shutil.rmtree(path_of(folder, old))
    return path


def steps(folder) -> list[int]:
    """The steps of the checkpoints under `folder`, ascending."""
    numbers = (path.name.removeprefix("step_") for path in Path(folder).glob("step_*"))
    return sorted(int(number) for number in numbers if number.isdecimal())


def path_of(folder, step: int) -> Path:
    return Path(folder) / f"step_{step:08d}"


def verify(path: Path) -> None:
    """UserError with what is missing or damaged in a checkpoint, if anything is."""
    try:
        files = read_json(path / "manifest.json")["files"]
    except (OSError, UserError, KeyError):
        raise UserError(f"checkpoint {path} has no readable manifest.json") from None
    for name, record in files.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise UserError(f"checkpoint {path} lacks {name}")
        if file.stat().st_size != record["bytes"] or hash_file(file) != record["sha256"]:
            raise UserError(f"checkpoint {path} is damaged: {name} is not what was written")


def newest(folder, say=print) -> Path | None:
    """The newest checkpoint that verifies, or None; `say` gets a warning for each newer one, which is damaged."""
    for step in reversed(steps(folder)):
        try:
            verify(path_of(folder, step))
        except UserError as error:
            say(f"warning: {error}; trying the one before")
            continue
        return path_of(folder, step)
    return None


def load(path: Path) -> tuple[dict, dict, dict]:
    """(model tensors, optimizer tensors, state) of a checkpoint that has been verified."""
    model, optimizer = (load_file(path / f"{part}.safetensors") for part in ("model", "optimizer"))
    return model, optimizer, read_json(path / "state.json")
