"""checkpoint.py against laws: a step folder is whole or absent, what was saved comes back bit for bit, any change to a
file is noticed, and checkpoints are ordered by number. The bits that are flipped here are flipped by hand."""

import contextlib
import hashlib
import json
import os
import shutil

import pytest
import torch

from core import checkpoint, files

MODEL = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.tensor([1.5], dtype=torch.bfloat16)}
MOMENTS = {"a.weight/exp_avg": torch.full((3, 4), 1e-38), "a.weight/step": torch.tensor(7.0)}


def put(folder, step, keep=10):
    return checkpoint.save(folder, step, MODEL, MOMENTS, {"seed": 3, "loss_scale": {"scale": 1.0}}, keep)


def test_what_was_saved_comes_back(tmp_path):
    path = put(tmp_path / "deep/er", 42)
    assert path.name == "step_00000042"
    checkpoint.verify(path)
    model, moments, state = checkpoint.load(path)
    for mine, theirs in ((MODEL, model), (MOMENTS, moments)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine)
    assert state == {"step": 42, "seed": 3, "loss_scale": {"scale": 1.0}}
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {"model.safetensors", "optimizer.safetensors", "state.json"}
    for name, record in files.items():
        content = (path / name).read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_optimizer_without_state_yet(tmp_path):
    path = checkpoint.save(tmp_path, 0, MODEL, {}, {}, 1)
    assert checkpoint.load(path)[1] == {}


@pytest.mark.parametrize("at", ["save_file", "hash_file", "fsync", "rename"])
def test_failure_in_the_middle_leaves_the_older_ones_and_nothing_else(tmp_path, monkeypatch, at):
    put(tmp_path, 1)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        owner = {"fsync": os, "rename": checkpoint.Path}.get(at, checkpoint)
        patch.setattr(owner, at, fail)
        with pytest.raises(ValueError, match=r"step_00000002 could not be written .*No space left"):
            put(tmp_path, 2, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    checkpoint.verify(tmp_path / "step_00000001")


def test_leftovers_of_a_killed_save_are_no_checkpoint_and_are_replaced(tmp_path):
    put(tmp_path, 1)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / ".step_00000002.partial")
    (tmp_path / "step_x").mkdir()
    assert checkpoint.steps(tmp_path) == [1]
    put(tmp_path, 2)
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert not (tmp_path / ".step_00000002.partial").exists()


def test_the_newest_by_number_are_kept(tmp_path):
    for step in (9, 99_999_999, 100_000_000, 10):           # as strings the third is the smallest
        put(tmp_path, step)
    assert checkpoint.steps(tmp_path) == [9, 10, 99_999_999, 100_000_000]
    assert checkpoint.newest(tmp_path).name == "step_100000000"
    put(tmp_path, 11, keep=3)
    assert checkpoint.steps(tmp_path) == [11, 99_999_999, 100_000_000]


@pytest.mark.parametrize("fails", [None, "hash", "exchange"])
def test_the_same_step_again_replaces_it_once_it_is_complete(tmp_path, monkeypatch, fails):
    old = put(tmp_path, 5)
    seen = []

    def look(file):
        seen.append(checkpoint.verify(old))                   # the old one is there, and in order
        if fails == "hash":
            raise OSError(5, "Input/output error")
        return hash_file(file)

    def exchange(new, old):
        if fails == "exchange":
            raise OSError(5, "Input/output error")
        return really_exchange(new, old)
    hash_file, really_exchange = checkpoint.hash_file, files.exchange
    monkeypatch.setattr(files, "exchange", exchange)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "verify", lambda path: path.stat())
        patch.setattr(checkpoint, "hash_file", look)
        with pytest.raises(ValueError, match="could not be written") if fails else contextlib.nullcontext():
            checkpoint.save(tmp_path, 5, {"a": torch.zeros(2)}, {}, {}, 3)
    assert seen
    checkpoint.verify(old)
    assert set(checkpoint.load(checkpoint.newest(tmp_path))[0]) == ({"a.weight", "b"} if fails else {"a"})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


def test_files_and_their_folder_reach_the_disk_before_the_name_is_given(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("core.files.sync", lambda path: synced.append((str(path), checkpoint.steps(tmp_path))))
    put(tmp_path, 7)
    partial = tmp_path / ".step_00000007.partial"
    files = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
    assert {(str(partial / name), ()) for name in files} | {(str(partial), ())} <= {(p, tuple(s)) for p, s in synced}
    assert synced[-1] == (str(tmp_path), [7])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "missing"])
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
    with pytest.raises(ValueError, match=rf"step_00000002 (is damaged: |lacks ){name}"):
        checkpoint.verify(path)
    said = []
    assert checkpoint.newest(tmp_path, said.append) == tmp_path / "step_00000001"
    assert len(said) == 1
    assert said[0].startswith("warning: checkpoint ")
    assert "step_00000002" in said[0]
    (tmp_path / "step_00000001/manifest.json").write_text("{")
    assert checkpoint.newest(tmp_path, said.append) is None
    assert "no readable manifest.json" in said[-1]


def test_a_manifest_that_points_outside_is_refused(tmp_path):
    path = put(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    (tmp_path / "secret").touch()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"lacks \.\./secret"):
        checkpoint.verify(path)


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "none") is None
    assert checkpoint.steps(tmp_path / "none") == []
