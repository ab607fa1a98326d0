"""Training state on disk: safetensors, one small JSON, and a manifest with hashes; its rename is the commit.

    checkpoints/step_00000100/{model.safetensors, optimizer.safetensors, state.json, manifest.json}

A folder under that name is complete or it would not have it; still, its hashes are checked before it is resumed from,
and the newest that verifies is the one. Nothing is pickled.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from core.hashing import hash_file


def save(folder: Path, step: int, model: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor], state: dict,
         keep: int) -> Path:
    """Write the state of `step` under `folder`, then remove all but the newest `keep` checkpoints."""
    final = Path(folder) / f"step_{step:08d}"
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(model, temporary / "model.safetensors", metadata={"format": "pt"})
        save_file(optimizer, temporary / "optimizer.safetensors", metadata={"format": "pt"})
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1) + "\n", encoding="utf-8")
        files = {file.name: {"bytes": file.stat().st_size, "sha256": hash_file(file)} for file in temporary.iterdir()}
        (temporary / "manifest.json").write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"checkpoint {final} could not be written ({error}); make room, and the same command goes "
                         f"on from the newest there is") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in steps(folder)[:-keep] if keep else []:
        shutil.rmtree(path_of(folder, old))
    return final


def steps(folder) -> list[int]:
    """Steps of the checkpoints under `folder`, by number."""
    found = (re.fullmatch(r"step_(\d+)", path.name) for path in Path(folder).glob("step_*"))
    return sorted(int(match[1]) for match in found if match)


def path_of(folder, step: int) -> Path:
    return Path(folder) / f"step_{step:08d}"


def verify(path: Path) -> None:
    """ValueError that says what is wrong with a checkpoint, if anything is."""
    try:
        files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        raise ValueError(f"checkpoint {path} has no readable manifest.json") from None
    for name, record in files.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise ValueError(f"checkpoint {path} lacks {name}")
        if file.stat().st_size != record["bytes"] or hash_file(file) != record["sha256"]:
            raise ValueError(f"checkpoint {path} is damaged: {name} is not what was written")


def newest(folder, say=print) -> Path | None:
    """The newest checkpoint that verifies; those that do not are named through `say` and passed over."""
    for step in reversed(steps(folder)):
        try:
            verify(path_of(folder, step))
        except ValueError as error:
            say(f"warning: {error}; trying the one before")
            continue
        return path_of(folder, step)
    return None


def load(path: Path) -> tuple[dict, dict, dict]:
    """(model tensors, optimizer tensors, state) of a verified checkpoint."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors"), state
