"""checkpoint.py against laws: a step folder is whole or absent, what was saved comes back bit for bit, any change to a
file or to the set of files is noticed, and checkpoints are ordered by number. The bits that are flipped here are
flipped by hand."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ENV
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from core import checkpoint, parallel, run_folder, sharding
from core.checkpoint import Shards

MODEL = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.tensor([1.5], dtype=torch.bfloat16)}
MOMENTS = {"a.weight/exp_avg": torch.full((3, 4), 1e-38), "a.weight/step": torch.tensor(7.0),
           "b/codes": torch.arange(-3, 4, dtype=torch.int8), "ema:a.weight": torch.eye(3, 4)}
TENSORS = {f"model/{k}": v for k, v in MODEL.items()} | {f"state/{k}": v for k, v in MOMENTS.items()}
SHARD = "shard-00001-model-00001-of-00001.safetensors"
STATE = {"seed": 3, "loss_scale": {"scale": 1.0}}


def put(folder, step, keep=10, tensors=TENSORS, **more):
    path = checkpoint.path_of(folder, step)
    checkpoint.write(path, Shards(tensors), {"step": step, **STATE})
    checkpoint.prune(folder, step, keep, **more)
    return path


def test_what_was_saved_comes_back(tmp_path):
    path = put(tmp_path / "deep/er", 42)
    assert path.name == "step_00000042"
    checkpoint.verify(path)
    model, moments, state = checkpoint.load(path)
    for mine, theirs in ((MODEL, model), (MOMENTS, moments)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine)
    assert state == {"step": 42, **STATE}
    assert checkpoint.load(path, parts=["model/"])[1] == {}
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 2
    assert set(manifest["files"]) == {SHARD, "state.json"}
    for name, record in manifest["files"].items():
        content = (path / name).read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_what_is_written_is_a_copy_of_the_moment(tmp_path):
    tensor = torch.arange(6.0).view(2, 3)
    shards = Shards({"model/a": tensor, "model/b": tensor.T})            # the same storage is no matter either
    tensor.zero_()
    checkpoint.write(tmp_path / "c", shards, {})
    assert checkpoint.load(tmp_path / "c")[0]["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert checkpoint.load(tmp_path / "c")[0]["b"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_files_are_of_bounded_size_and_hold_safetensors_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 50)
    path = put(tmp_path, 1)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(files) > 2
    names = [name for file in files for name in load_file(path / file)]
    assert sorted(names) == sorted(TENSORS)
    assert checkpoint.load(path)[1].keys() == MOMENTS.keys()
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("at", ["hash_file", "fsync", "rename", "writer"])
def test_failure_in_the_middle_leaves_the_older_ones_and_nothing_else(tmp_path, monkeypatch, at):
    put(tmp_path, 1)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        owner, name = {"fsync": (os, "fsync"), "rename": (checkpoint.Path, "rename"), "hash_file": (
            checkpoint, "hash_file"), "writer": (checkpoint.HuggingFaceStorageWriter, "write_data")}[at]
        patch.setattr(owner, name, fail)
        with pytest.raises(ValueError, match=r"step_00000002 could not be written .*No space left"):
            put(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    checkpoint.verify(tmp_path / "step_00000001")


def test_free_space_is_asked_for_ahead(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=100))
    needed = int(1.2 * sum(tensor.nbytes for tensor in TENSORS.values()))
    with pytest.raises(ValueError, match=rf"step_00000002 could not be written \(100 bytes are free and {needed} are"):
        put(tmp_path, 2)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_process_are_no_checkpoint_and_are_removed(tmp_path):
    put(tmp_path / "checkpoints", 1)
    for name in (".step_00000002.partial", ".step_00000000.partial"):           # of a save, and of a removal
        shutil.copytree(tmp_path / "checkpoints/step_00000001", tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints/step_x").mkdir()
    assert checkpoint.steps(tmp_path / "checkpoints") == [1]
    (tmp_path / "config.toml").write_bytes(run_folder.RUN_MARK)
    with run_folder.run_folder(tmp_path, checkpoint.ALONE):
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_x"]


def test_the_newest_by_number_are_kept(tmp_path):
    for step in (9, 99_999_999, 100_000_000, 10):           # as strings the third is the smallest
        put(tmp_path, step)
    assert checkpoint.steps(tmp_path) == [9, 10, 99_999_999, 100_000_000]
    assert checkpoint.newest(tmp_path).name == "step_100000000"
    put(tmp_path, 11, keep=2)                               # the one just written, and two more
    assert checkpoint.steps(tmp_path) == [11, 99_999_999, 100_000_000]
    put(tmp_path, 100_000_001, keep=1, also=[[12, 11, 2]])
    assert checkpoint.steps(tmp_path) == [11, 100_000_000, 100_000_001]


def test_a_damaged_one_counts_for_nothing(tmp_path):
    for step in (1, 2, 3, 4):
        put(tmp_path, step)
    for step in (3, 4):
        flip(tmp_path / f"step_0000000{step}" / SHARD, 200, 1)
    verified = set()
    put(tmp_path, 5, keep=2, verified=verified)
    assert (checkpoint.steps(tmp_path), verified) == ([2, 3, 4, 5], {1, 2, 5})
    put(tmp_path, 6, keep=2, verified=verified)             # now the damaged ones are older than two that verify
    assert checkpoint.steps(tmp_path) == [5, 6]
    (tmp_path / "step_00000005" / SHARD).unlink()
    put(tmp_path, 7, keep=2, verified=verified)             # hashed before or not: a file that is gone is noticed
    put(tmp_path, 8, keep=3, verified=verified)
    assert checkpoint.steps(tmp_path) == [6, 7, 8]


def test_what_is_kept_for_a_reason_is_the_first_that_verifies(tmp_path):
    """Steps by how well they scored: the best one has lost a byte, so the next one must stay."""
    for step in (1, 2, 3, 4):
        put(tmp_path, step)
    flip(tmp_path / "step_00000002" / SHARD, 200, 1)
    put(tmp_path, 5, keep=2, also=[[2, 3, 1], []])
    assert checkpoint.steps(tmp_path) == [3, 4, 5]


def test_the_newest_comes_first_but_for_those_between(tmp_path):
    for step in (0, 3, 4, 6, 7, 8):
        put(tmp_path, step)
    assert checkpoint.in_order(tmp_path) == [8, 7, 6, 4, 3, 0]
    assert checkpoint.in_order(tmp_path, 3) == [6, 3, 0, 8, 7, 4]
    assert checkpoint.newest(tmp_path, every=3).name == "step_00000006"
    (tmp_path / "step_00000006" / SHARD).unlink()
    said = []
    assert checkpoint.newest(tmp_path, said.append, every=3).name == "step_00000003"
    assert len(said) == 1


def test_pruning_never_leaves_half_of_one_under_its_name(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        put(tmp_path, step)
    removed = []
    monkeypatch.setattr(checkpoint, "remove", lambda path: removed.append(path.name))
    checkpoint.prune(tmp_path, 3, 2)
    assert removed == [".step_00000001.partial"]
    assert checkpoint.steps(tmp_path) == [2, 3]


@pytest.mark.parametrize("fails", [None, "hash"])
def test_the_same_step_again_replaces_it_once_it_is_complete(tmp_path, monkeypatch, fails):
    old = put(tmp_path, 5)
    seen, hash_file = [], checkpoint.hash_file

    def look(file):
        if file.parent != old:
            seen.append(checkpoint.read_manifest(old))        # the old one is there, and in order
            if fails == "hash":
                raise OSError(5, "Input/output error")
        return hash_file(file)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "hash_file", look)
        with pytest.raises(ValueError, match="could not be written") if fails else contextlib.nullcontext():
            put(tmp_path, 5, tensors={"model/a": torch.zeros(2)})
    assert seen
    checkpoint.verify(old)
    assert set(checkpoint.load(checkpoint.newest(tmp_path))[0]) == ({"a.weight", "b"} if fails else {"a"})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


def test_files_and_their_folder_reach_the_disk_before_the_name_is_given(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def note(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2], checkpoint.steps(tmp_path)))
        real(descriptor)
    monkeypatch.setattr(os, "fsync", note)
    put(tmp_path, 7)
    before = {name.removeprefix(".").removesuffix(".partial") for name, steps in synced if not steps}
    assert {SHARD, "state.json", "manifest.json"} <= before
    assert any("step_00000007" in name for name in before), "the folder itself"
    assert synced[-1] == (tmp_path.name, [7])


# ---- damage

def flip(file, byte: int, bits: int):
    content = bytearray(file.read_bytes())
    content[byte] ^= bits
    file.write_bytes(content)


@pytest.mark.parametrize("name", [SHARD, "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "missing", "link"])
def test_damage_is_named_and_the_one_before_is_newest(tmp_path, name, damage):
    put(tmp_path, 1)
    path = put(tmp_path, 2)
    content = bytearray((path / name).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    content = {"cut": content[:-1], "longer": content + b"\0"}.get(damage, content)
    (path / name).write_bytes(content)
    if damage == "missing":
        (path / name).unlink()
    if damage == "link":
        (path / name).rename(tmp_path / "elsewhere")
        (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"step_00000002 (is damaged: |lacks ){name}"):
        checkpoint.verify(path)
    said = []
    assert checkpoint.newest(tmp_path, said.append) == tmp_path / "step_00000001"
    assert len(said) == 1
    assert said[0].startswith("warning: checkpoint ")
    assert "step_00000002" in said[0]
    (tmp_path / "step_00000001/manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used: .*step_00000002 .*; .*step_00000001 has no "
                                         r"readable manifest.json; put a good copy"):
        checkpoint.newest(tmp_path, said.append)


def test_a_checkpoint_that_is_a_link_is_not_used_and_not_written_through(tmp_path):
    put(tmp_path / "checkpoints", 1)
    mine = put(tmp_path / "mine", 2)
    link = tmp_path / "checkpoints" / mine.name
    link.symlink_to(mine)
    said = []
    assert checkpoint.newest(tmp_path / "checkpoints", said.append) == tmp_path / "checkpoints/step_00000001"
    assert "step_00000002 is a link" in said[0]
    before = (mine / "state.json").stat()
    put(tmp_path / "checkpoints", 2)
    assert not link.is_symlink()
    assert (mine / "state.json").stat() == before


def test_a_manifest_that_is_a_pipe_or_has_no_end_is_not_waited_for(tmp_path):
    path = put(tmp_path, 1)
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")
    assert "no readable manifest.json" in checkpoint.find_damage(path)
    (path / "manifest.json").unlink()
    with open(path / "manifest.json", "wb") as file:
        file.truncate(10**12)
    assert "no readable manifest.json" in checkpoint.find_damage(path)


def test_a_file_too_many_is_refused(tmp_path):
    path = put(tmp_path, 1)
    shutil.copy(path / SHARD, path / "shard-00002-model-00001-of-00001.safetensors")    # would be read as well
    with pytest.raises(ValueError, match=r"holds shard-00002.*which does not belong to it"):
        checkpoint.verify(path)


def test_every_bit_of_a_manifest_is_minded(tmp_path):
    path = put(tmp_path, 1)
    whole = (path / "manifest.json").read_bytes()
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        (path / "manifest.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint .* (is damaged|has no readable|is of an older)"):
            checkpoint.read_manifest(path)
    (path / "manifest.json").write_bytes(whole)
    checkpoint.verify(path)


def damage_at_random(path, draw: random.Random) -> str:
    """What tests/faults does by the hundreds: flip, cut, zero, lengthen, lose, exchange or add a file."""
    file = draw.choice(sorted(path.iterdir()))
    content, at = bytearray(file.read_bytes()), draw.randrange(file.stat().st_size)
    kind = draw.choice(["flip", "flip", "cut", "zero", "longer", "lose", "swap", "extra", "empty"])
    if kind == "flip":
        content[at] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        content = content[:at]
    elif kind == "zero":
        content[at:at + 64] = bytes(b ^ 255 if not any(content[at:at + 64]) else 0 for b in content[at:at + 64])
    elif kind == "longer":
        content += bytes([draw.randrange(256)])
    elif kind == "empty":
        content = b""
    if kind == "lose":
        file.unlink()
    elif kind == "swap":
        other = draw.choice([each for each in sorted(path.iterdir()) if each != file])
        content = other.read_bytes()
        file.write_bytes(content)
    elif kind == "extra":
        (path / draw.choice(["x.safetensors", ".metadata", "shard-00009-model-00001-of-00001.safetensors"])).touch()
    else:
        file.write_bytes(content)
    return f"{kind} at {at} of {file.name}"


def test_random_damage_is_found(tmp_path):
    good = put(tmp_path / "good", 1)
    for seed in range(100):
        bad = tmp_path / "bad/step_00000001"
        shutil.copytree(good, bad)
        what = damage_at_random(bad, random.Random(seed))
        assert checkpoint.find_damage(bad), what
        shutil.rmtree(bad)
    checkpoint.verify(good)


SHA = hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize("files", [
    {}, {"../secret": {"bytes": 0, "sha256": SHA}}, {"/etc/passwd": {"bytes": 0, "sha256": SHA}},
    {"state.json": {"bytes": 0}}, {"state.json": {"bytes": True, "sha256": SHA}}, {"state.json": None},
    {"state.json": {"bytes": "0", "sha256": SHA}}, {"state.json": {"bytes": 0, "sha256": 5}}, {"a\0b": {}}])
def test_a_manifest_of_nonsense_with_the_right_hash_is_refused(tmp_path, files):
    path = put(tmp_path, 1)
    (tmp_path / "secret").touch()
    (path / "manifest.json").write_text(checkpoint.render(files))
    with pytest.raises(ValueError, match=r"^checkpoint .*step_00000001 (lacks|is damaged|has no readable|holds)"):
        checkpoint.verify(path)


@pytest.mark.parametrize("text", ['{"files": {}}', "[]", "null", "1", '"x"', '{"files": 3}', "{", "[" * 100_000, "",
                                  '{"format": 2, "files": {}, "sha256": 0}', "9" * 5000])
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    path = put(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"^checkpoint .*step_00000001 (has no|is of an older|is damaged|lacks)"):
        checkpoint.verify(path)


@pytest.mark.parametrize("change", [{"step": "1"}, {"identity": []}, {"decisions": None}, {"base": 3}])
def test_a_state_of_wrong_types_is_refused(tmp_path, change):
    good = {"step": 1, "base": "", "tokenizer": "", "dtype": "float32", "methods": {}, "optim": {"lr": 0.1},
            "identity": {"base": None, "lora": {}, "forget": {}, "model": {}, "seed": 0}, "decisions": [],
            "guard": {"window": [[2.0, 1]], "left_out": 0, "in_a_row": 0}, "loss_scale": {"scale": 1, "good_steps": 0},
            "evaluations": {"eval_step_0.json": {"step": 0, "protocol": {"context": 32}, "model": "m", "texts": {
                "law": {"role": "domain", "perplexity": 9.0, "nats_by_document": [1.0, 2]}}}}}
    for state, wrong in ((good, False), (good | change, True)):
        checkpoint.write(tmp_path / "c", Shards({}), state)
        with pytest.raises(ValueError, match=f"state.json has {next(iter(change))} ") if wrong else \
                contextlib.nullcontext():
            assert checkpoint.read_state(tmp_path / "c") == state


def test_an_older_format_is_refused_with_what_to_do(tmp_path):
    for path in [put(tmp_path, 1), put(tmp_path, 2)]:
        files = {"state.json": checkpoint.record_of(path / "state.json")}
        (path / "manifest.json").write_text(json.dumps({"files": files}))
    said = []
    with pytest.raises(ValueError, match="is of an older format; finish its run with the version") as refused:
        checkpoint.newest(tmp_path, said.append)
    assert (said, str(refused.value).count("older format")) == ([], 1), "said once, whatever their number"


@pytest.mark.parametrize("name", ["step_1", "step_000000002", f"step_{chr(0x663) * 8}", "step_x"])
def test_a_folder_with_another_name_is_no_checkpoint_and_in_nobodys_way(tmp_path, name):
    (tmp_path / name).mkdir()
    for step in (3, 4, 5):
        put(tmp_path, step, keep=2)
    assert checkpoint.steps(tmp_path) == [4, 5]
    assert checkpoint.newest(tmp_path).name == "step_00000005"
    assert (tmp_path / name).is_dir()


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "none") is None
    assert checkpoint.steps(tmp_path / "none") == []


# ---- two ranks; this file is also what each of them runs

SIZES = {"even": (4, 3), "odd": (5, 2), "one_row": (1, 3), "vector": (7,), "scalar": ()}


def full_values() -> dict[str, torch.Tensor]:
    tensors = {f"model/{name}": torch.randn(size, generator=torch.Generator().manual_seed(len(size) * 9 + sum(size)))
               for name, size in SIZES.items()}
    return tensors | {"state/codes": torch.arange(10, dtype=torch.uint8).view(5, 2)}


def as_rank(folder):
    world = parallel.start("cpu")
    mesh, apart = init_device_mesh("cpu", (2,)), world.apart()

    def sharded(tensors):
        return {name: distribute_tensor(value, mesh, [Shard(0)]) if value.ndim else value
                for name, value in tensors.items()}

    def same(tensors):
        for name, value in full_values().items():
            assert torch.equal(sharding.full_tensor(tensors[name]), value), name
    checkpoint.write(folder / "sharded", Shards(sharded(full_values()), world), {"step": 1}, apart)
    checkpoint.write(folder / "copies", Shards(full_values(), world), {"step": 1}, apart)
    for name in ("sharded", "copies", "alone"):
        checkpoint.verify(folder / name, world)
        for empty in (sharded({name: torch.zeros_like(value) for name, value in full_values().items()}),
                      {name: torch.zeros_like(value) for name, value in full_values().items()}):
            checkpoint.Stored(folder / name).read_into(empty)
            same(empty)

    def fail(*_):
        raise OSError(28, "No space left on device")
    if world.rank == 1:
        checkpoint.HuggingFaceStorageWriter.write_data = fail
    with pytest.raises(ValueError, match=r"broken could not be written \(.*No space left on device"):
        checkpoint.write(folder / "broken", Shards(sharded(full_values()), world), {}, apart)
    if world.main:
        assert not [path for path in folder.iterdir() if "broken" in path.name]
        flip(folder / "sharded" / SHARD, -1, 1)
        flip(folder / "copies" / SHARD.replace("00001", "00002", 1), -1, 1)
    world.barrier()
    damages = [checkpoint.find_damage(folder / name, world) for name in ("sharded", "copies")]
    assert "shard-00001" in damages[0], damages
    assert "shard-00002" in damages[1], damages
    world.barrier()
    parallel.stop()


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_two_ranks_write_a_share_each_and_read_what_any_number_wrote(tmp_path):
    checkpoint.write(tmp_path / "alone", Shards(full_values()), {"step": 1})
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           __file__, tmp_path], env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("sharded", "copies"):
        files = sorted(file.name for file in (tmp_path / name).glob("*.safetensors"))
        assert files == [SHARD, SHARD.replace("00001", "00002", 1)]
        flip(tmp_path / name / files[name == "copies"], -1, 1)                  # as it was
        checkpoint.verify(tmp_path / name)
        model, moments, _ = checkpoint.load(tmp_path / name)
        for key, value in full_values().items():
            assert torch.equal((model | moments)[key.partition("/")[2]], value), (name, key)
        sizes = [sum(value.numel() for value in load_file(tmp_path / name / file).values()) for file in files]
        assert max(sizes) < 0.75 * sum(sizes), "one rank wrote nearly all"


if __name__ == "__main__":
    as_rank(Path(sys.argv[1]))
