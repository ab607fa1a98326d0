"""Training state on disk: sharded safetensors, one small JSON, and a manifest with hashes. Nothing is pickled.

    checkpoints/step_00000100/{shard-00001-model-00001-of-00001.safetensors, ..., state.json, manifest.json}

Each rank writes the shards that it holds, in the format of PyTorch's Hugging Face storage, whose planner gives them to
any number of ranks. A checkpoint is written under another name, synced, and renamed: the rename is the commit. Because
disks still lose bytes, every file is hashed and no file may be missing or extra: PyTorch's reader checks neither, and
without the first shard it leaves wrong weights in silence. The newest checkpoint that verifies is used.
"""

import contextlib
import hashlib
import json
import os
import re
import reprlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType

from core.errors import UserError
from core.files import new_folder, read_json, remove, write_json, write_text
from core.foreign_files import find_odd, first_line, read_own, read_own_json, without_collector
from core.hashing import hash_file
from core.parallel import World, is_first_copy

FORMAT = 2
STATE, MANIFEST = "state.json", "manifest.json"
# PyTorch's writer holds a file in memory while it writes it.
FILE_BYTES = 2 * 10**9
# Free space that a save asks for, as a multiple of its tensors.
SPARE = 1.2
# The largest manifest, of 100,000 files, and state.json; one of 2,000 evaluations of 400 documents each has 16 MB.
MANIFEST_BYTES, STATE_BYTES = 16 << 20, 256 << 20


def within(kind: type, low: float, high: float):
    """A shape for `find_odd`: numbers between two others."""
    return lambda value: find_odd(value, kind) is None and low <= value <= high


# A plan holds ten million steps. What is squared and summed must stay a number.
STEP, COUNT, SHARE = within(int, 0, 10**7), within(int, 0, 2**62), within(float, 0, 1)
FINITE = within(float, -1e99, 1e99)
PLAIN = (str, float, bool, None)
# What an evaluation says of a task or a probe, whose interval may be unknown.
ANSWERS = {"value": float, "metric": str, "direction": str, "chance": float, "capability": str, "n": COUNT,
           "interval": lambda value: not value or (find_odd(value, [float]) is None and len(value) == 2),
           str: lambda _: True}
# What a run's state.json holds, as a shape for `find_odd`.
FIELDS = {
    "step": STEP, "base": str, "tokenizer": str, "dtype": str, "methods": {str: dict},
    "optim": {str: (*PLAIN, [PLAIN])},
    "identity": {"base": (str, None), "lora": dict, "forget": dict, "model": dict, str: lambda value: True},
    "loss_scale": {"scale": within(float, 1e-300, 1e300), "good_steps": COUNT, str: PLAIN},
    "guard": {"window": [lambda pair: find_odd(pair, [FINITE]) is None and len(pair) == 2],
              "left_out": COUNT, "in_a_row": COUNT},
    "decisions": [{"step": STEP, "replay_share": (SHARE, None), str: PLAIN}],
    "evaluations": {str: {"step": STEP, "protocol": {str: PLAIN}, "texts": {str: {"perplexity": float, str: (
        *PLAIN, [float])}}, str: (*PLAIN, {str: {str: float}}, {str: ANSWERS})}}, str: PLAIN}
ALONE = World(0, 1, torch.device("cpu"))


class OlderFormat(UserError):
    """An earlier version wrote the checkpoint, and so all others of its run: no damage, and none before it will do."""


# ---- writing

class Shards:
    """A copy on the CPU of what this rank writes of `tensors` {name: tensor, sharded or not}, so that they may change
    meanwhile. A tensor that several ranks hold is copied and written by one of them; `bytes`: of this rank's copies."""

    def __init__(self, tensors: dict[str, torch.Tensor], world: World = ALONE):
        if world.pipe:
            tensors = {name: tensor for name, tensor in tensors.items() if not world.pipe.is_copy(name)}
        k, n = world.peers
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(tensors, is_coordinator=world.main)
        items = planner.create_local_plan().items
        # A rank beyond the rows of a small tensor holds none of them.
        own = [item for item in items if item.type == WriteItemType.SHARD and item.tensor_data.chunk.sizes.numel()
               and is_first_copy(tensors[item.index.fqn], world)]
        shared = sorted((item for item in items if item.type == WriteItemType.TENSOR),
                        key=lambda item: item.tensor_data.size.numel(), reverse=True)
        self.items = own + shared[k::n]
        self.copies = {item.index.fqn: planner.resolve_data(item).detach().to(
            "cpu", copy=True, memory_format=torch.contiguous_format) for item in self.items}
        self.bytes = sum(copy.nbytes for copy in self.copies.values())

    def write(self, folder: Path, rank: int) -> dict[str, dict]:
        """Write and sync this rank's files; {name: what the manifest says of it}."""
        numbers, filled = {}, 0
        for item in self.items:
            numbers[item.index.fqn] = 1 + filled // FILE_BYTES
            filled += self.copies[item.index.fqn].nbytes
        if self.items:
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            # Who writes what is known already, so that no rank waits for another here.
            plan = SavePlan(self.items, storage_data={"fqn_to_index_mapping": numbers, "shard_index": rank + 1})
            writer.write_data(plan, SimpleNamespace(resolve_data=lambda item: self.copies[item.index.fqn])).wait()
        return {file.name: record_of(file) for file in folder.glob(f"shard-{rank + 1:05d}-*.safetensors")}


def record_of(file: Path) -> dict:
    return {"bytes": file.stat().st_size, "sha256": hash_file(file)}


def write(path: Path, shards: Shards, state: dict, world: World = ALONE) -> None:
    """Write tensors and `state` (JSON values) as the folder `path`, whole or not at all; one that is there is replaced
    when the new one is complete. A collective: UserError on every rank where any of them fails."""
    path = Path(path)
    try:
        write_together(path, shards, state, world)
    except (OSError, SafetensorError, UserError) as error:
        raise UserError(f"{path} could not be written ({error}); make room") from None


def write_together(path: Path, shards: Shards, state: dict, world: World):
    needed = int(SPARE * sum(world.gather(shards.bytes)))
    with contextlib.ExitStack() as stack:
        def begin():
            if world.main:
                path.parent.mkdir(parents=True, exist_ok=True)
                if (free := shutil.disk_usage(path.parent).free) < needed:
                    raise UserError(f"{free:,} bytes are free and {needed:,} are needed")
                if path.is_symlink():
                    # What it names is not replaced: in a folder of a stranger's that may be anything of the user's.
                    path.unlink()
                return stack.enter_context(new_folder(path, overwrite=True))
            return None

        def seal():
            if world.main:
                write_json(partial / STATE, state)
                if (size := (partial / STATE).stat().st_size) > STATE_BYTES:
                    raise UserError(f"its {STATE} has {size:,} bytes and {STATE_BYTES:,} are read; lower --eval.tokens")
                write_text(partial / MANIFEST, render(files | {STATE: record_of(partial / STATE)}))
        partial = run_on_all(world, begin)[0]
        files = {name: record for part in run_on_all(world, lambda: shards.write(partial, world.rank))
                 for name, record in part.items()}
        run_on_all(world, seal)
        run_on_all(world, stack.close)


def run_on_all(world: World, function) -> list:
    """What function() returned on each rank; where it failed on another one, UserError. A collective."""
    try:
        mine = (None, function())
    except Exception as error:
        world.gather((f"rank {world.rank}: {error}", None))
        raise
    found = world.gather(mine)
    if failed := next((error for error, _ in found if error is not None), None):
        raise UserError(failed)
    return [result for _, result in found]


def render(files: dict[str, dict]) -> str:
    """The manifest of `files`, which hashes itself."""
    body = {"format": FORMAT, "files": dict(sorted(files.items()))}
    own = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps(body | {"sha256": own}, indent=1) + "\n"


# ---- which there are

def steps(folder) -> list[int]:
    """The steps of the checkpoints under `folder`, ascending. What is named in another way than `path_of` does, as by a
    user who puts one aside, is none."""
    numbers = (path.name.removeprefix("step_") for path in Path(folder).glob("step_*"))
    return sorted(int(number) for number in numbers if re.fullmatch("[0-9]{8}|[1-9][0-9]{8,}", number))


def path_of(folder, step: int) -> Path:
    return Path(folder) / f"step_{step:08d}"


def prune(folder: Path, newest: int, keep: int, also=(), verified: set | None = None) -> None:
    """Remove old checkpoints. Those kept are `newest`, which has just been written, the last `keep` (at least 2) that
    verify, and of each list of steps in `also` the first that does. A damaged one counts for nothing, and goes when it
    is older than all that are kept.
    verified: the steps whose files have been hashed before; those found good now are added."""
    verified = set() if verified is None else verified
    known = steps(folder)
    good = [step for step in known if not find_damage(path_of(folder, step), hashed=step in verified)]
    verified.update(good)
    kept = {newest, *good[-max(2, keep):], *(next(filter(good.__contains__, wanted), newest) for wanted in also)}
    for step in known:
        if step not in kept and (step in good or step < min(kept)):
            # Never half a checkpoint under its name, should the process die in the middle: the next one clears this.
            remove(path_of(folder, step).rename(folder / f".{path_of(folder, step).name}.partial"))


# ---- verifying

def find_damage(path: Path, world: World = ALONE, hashed: bool = False) -> str | None:
    """What is missing, extra or damaged in a checkpoint; None: nothing. A collective: the ranks hash the files between
    them. hashed: the files have been hashed before, and only their names and sizes are looked at."""
    path = Path(path)
    try:
        files = read_manifest(path)
        if files[STATE]["bytes"] > STATE_BYTES:
            raise UserError(f"checkpoint {path} is damaged: {STATE} has more than {STATE_BYTES >> 20} MB")
        for name in sorted(files)[world.rank::world.size]:
            if (path / name).stat().st_size != files[name]["bytes"] or (
                    not hashed and hash_file(path / name) != files[name]["sha256"]):
                raise UserError(f"checkpoint {path} is damaged: {name} is not what was written")
        damage = None
    except OlderFormat:
        raise
    except UserError as error:
        damage = str(error)
    except OSError as error:
        damage = f"checkpoint {path} cannot be read: {error}"
    return next(filter(None, world.gather(damage)), None)


def read_manifest(path: Path) -> dict[str, dict]:
    """{file name: {"bytes", "sha256"}} of exactly the files in a checkpoint; UserError where the manifest is missing,
    of another format, not what was written to the last bit, or not about the files that are there."""
    try:
        text = read_own(path / MANIFEST, MANIFEST_BYTES)
        with without_collector():
            manifest = json.loads(text)
        files = manifest["files"]
        version = manifest.get("format", 1)
        is_own = version != FORMAT or text == render(files).encode()
        for record in files.values():
            is_own &= type(record["bytes"]) is int and bool(re.fullmatch("[0-9a-f]{64}", record.get("sha256", "")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"checkpoint {path} has no readable {MANIFEST}") from None
    if version == 1 and "sha256" not in manifest:
        raise OlderFormat(f"checkpoint {path} is of an older format; finish its run with the version that wrote it, or "
                          f"train on from its exported model with another --out")
    if not is_own or version != FORMAT:
        raise UserError(f"checkpoint {path} is damaged: {MANIFEST} is not what was written")
    there = {entry.name: entry.is_file(follow_symlinks=False) for entry in os.scandir(path)}
    if lost := sorted((files.keys() | {STATE}) - there.keys()):
        raise UserError(f"checkpoint {path} lacks {lost[0]}")
    if odd := sorted(there.keys() - files.keys() - {MANIFEST}):
        raise UserError(f"checkpoint {path} holds {odd[0]}, which does not belong to it")
    if odd := sorted(name for name, is_file in there.items() if not is_file):
        raise UserError(f"checkpoint {path} is damaged: {odd[0]} is no plain file")
    return files


def verify(path: Path, world: World = ALONE) -> None:
    """UserError with what is missing, extra or damaged in a checkpoint, if anything is. A collective."""
    if damage := find_damage(path, world):
        raise UserError(damage)


def in_order(folder, every: int = 1) -> list[int]:
    """The steps of the checkpoints, the newest first; those that are no multiple of `every` come last."""
    return sorted(steps(folder), key=lambda step: (step % every == 0, step), reverse=True)


def newest(folder, say=print, world: World = ALONE, every: int = 1) -> Path | None:
    """The first checkpoint `in_order` that verifies; `say` gets a warning for each before it. None: there is no
    checkpoint. UserError where there are some and none verifies, or an earlier version wrote them. A collective."""
    damages = []
    for step in world.broadcast(in_order(folder, every)):
        path = path_of(folder, step)
        # It may lead to anything of the user's, in a folder of a stranger's.
        damage = f"checkpoint {path} is a link" if path.is_symlink() else find_damage(path, world)
        if not damage:
            return path
        damages.append(" ".join(damage.split()))
        say(f"warning: {damages[-1]}; trying the one before")
    if damages:
        raise UserError(f"no checkpoint in {folder} can be used: {'; '.join(damages)}; put a good copy of one there, "
                        f"or remove {folder} to begin again at step 0")
    return None


# ---- reading; what is read here has been verified

class Stored:
    """The tensors of a checkpoint: `known` {name: (shape, dtype)}, and their values into tensors of any sharding."""

    def __init__(self, path: Path):
        self.reader = HuggingFaceStorageReader(str(path))
        try:
            self.metadata = self.reader.read_metadata()
        except Exception as error:
            # PyTorch's reader believes what the files say, and raises what comes of it.
            raise UserError(f"the shards in {path} cannot be read ({first_line(error)}); put a good copy there, or "
                            f"move it away") from None
        self.known = {name: (tensor.size, tensor.properties.dtype)
                      for name, tensor in self.metadata.state_dict_metadata.items()}

    def read_into(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fill the tensors by their names; each rank reads what it holds of them."""
        for name, tensor in tensors.items():
            assert (tensor.shape, tensor.dtype) == self.known[name], f"{name} is stored as {self.known[name]}"
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(tensors), self.metadata, is_coordinator=True)
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        self.reader.read_data(planner.create_local_plan(), planner).wait()


def read_state(path: Path) -> dict:
    """What a run's checkpoint holds beside tensors; UserError where a value is missing or of a wrong type."""
    state = read_own_json(Path(path) / STATE, STATE_BYTES)
    if odd := find_odd(state, FIELDS):
        raise UserError(f"{path}/{STATE} has {odd}; it was made by another version")
    for name, found in state["evaluations"].items():
        if name != f"eval_step_{found['step']}.json" or found["step"] > state["step"]:
            raise UserError(f"{path}/{STATE} has an evaluation {reprlib.repr(name)}; it was made by another version")
    return state


def load(path: Path, parts=("model/", "state/")) -> tuple[dict, dict, dict]:
    """(full model tensors, full optimizer and method tensors, state) of a checkpoint that has been verified; only those
    whose names in the files, which begin with model/ or state/, begin with one of `parts`."""
    stored = Stored(path)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored.known.items()
               if name.startswith(tuple(parts))}
    stored.read_into(tensors)
    model, moments = ({name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
                      for part in ("model/", "state/"))
    return model, moments, read_json(Path(path) / STATE, dict)
