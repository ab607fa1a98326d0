"""Whole or not at all. Truth: what a killed, failing or full-disk write leaves on the disk."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import pytest
from kill_points import run_and_kill, trace
from safetensors.numpy import save_file

from core import files
from core.errors import UserError
from core.files import (
    FolderKind,
    find_folder,
    new_file,
    new_folder,
    read_json,
    remove,
    write_json,
    write_text,
)
from core.run_folder import run_folder

ROOT = Path(__file__).parents[2]


def test_a_file_is_written_whole_with_its_folder(tmp_path):
    write_json(tmp_path / "a/b.json", {"name": "Maß", "values": [1, 2]})
    assert (tmp_path / "a/b.json").read_bytes() == '{\n "name": "Maß",\n "values": [\n  1,\n  2\n ]\n}\n'.encode()
    assert read_json(tmp_path / "a/b.json") == {"name": "Maß", "values": [1, 2]}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]


def test_a_failing_write_keeps_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "a.txt") as handle:
        handle.write("half of the n" + str(1 // 0))
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_reading_names_the_file_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(UserError, match=r"no\.json does not exist"):
        read_json(tmp_path / "no.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"half\.json is not valid JSON"):
        read_json(tmp_path / "half.json")


def fill(folder: Path, text: str) -> None:
    (folder / "deep").mkdir()
    (folder / "deep/file").write_text(text)


def test_a_folder_is_replaced_only_on_purpose_and_only_when_complete(tmp_path):
    place = tmp_path / "shards"
    with new_folder(place) as partial:
        assert not place.exists()
        fill(partial, "first")
    with pytest.raises(UserError, match="exists already"), new_folder(place):
        pytest.fail("the block must not run")
    with pytest.raises(ZeroDivisionError), new_folder(place, overwrite=True) as partial:
        fill(partial, str(1 // 0))
    assert (place / "deep/file").read_text() == "first"
    with new_folder(place, overwrite=True) as partial:
        fill(partial, "second")
        assert (place / "deep/file").read_text() == "first"
    assert (place / "deep/file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "made").mkdir()
    with new_folder(tmp_path / "made") as partial:
        fill(partial, "text")
    assert (tmp_path / "made/deep/file").read_text() == "text"


def no_exchange(new, old):
    """As on a file system that cannot exchange two names."""
    return False


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power cut"])
@pytest.mark.parametrize("exchange", [files.exchange, no_exchange], ids=["exchange", "two renames"])
@pytest.mark.parametrize("old", [None, "old"])
def test_at_every_kill_point_there_is_a_whole_folder_and_the_same_command_goes_on(
        tmp_path, monkeypatch, old, exchange, power):
    monkeypatch.setattr(files, "exchange", exchange)
    place, wanted = tmp_path / "model", {"one": "new" * 1000, "deep/file": "new" * 1000}

    def write(text="new" * 1000):
        with new_folder(place, overwrite=True) as partial:
            (partial / "deep").mkdir()
            for name in wanted:
                (partial / name).write_text(text)

    def prepare():
        remove(place)
        if old:
            write(old)

    def content():
        found = find_folder(place)
        return {str(file.relative_to(found)): file.read_text() for file in found.rglob("*") if file.is_file()}
    prepare()
    operations = trace(write, tmp_path)
    assert any(line.startswith("exchange") for line in operations) == bool(old)
    for k in range(len(operations)):
        prepare()
        assert run_and_kill(write, k, tmp_path, power).status == -9
        assert content() in ([dict.fromkeys(wanted, old)] if old else [{}]) + [wanted], (k, operations[k])
        write()
        assert content() == wanted
        assert [path.name for path in tmp_path.iterdir()] == ["model"], (k, operations[k])


def test_an_exchange_that_fails_keeps_the_old_folder(tmp_path, monkeypatch):
    place = tmp_path / "model"
    with new_folder(place) as partial:
        (partial / "old").write_text("old")
    rename = Path.rename

    def failing(self, target):
        if self.name == ".model.partial":
            raise OSError("no")
        return rename(self, target)
    monkeypatch.setattr(files, "exchange", no_exchange)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"), new_folder(place, overwrite=True):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


def test_a_half_removed_folder_is_never_taken_for_the_old_one(tmp_path, monkeypatch):
    """Without an exchange .model.old holds the only whole folder for a moment, and is then removed file by file."""
    monkeypatch.setattr(files, "exchange", no_exchange)
    place = tmp_path / "model"
    for text in ("old", "new"):
        with new_folder(place, overwrite=True) as partial:
            fill(partial, text)
        for line in trace(lambda: clear(place), tmp_path) if text == "new" else ():
            assert not line.startswith(f"remove {tmp_path}/.model.old"), line


def clear(place):
    with new_folder(place, overwrite=True) as partial:
        fill(partial, "newer")


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_modes_follow_the_umask_whoever_wrote_the_files(tmp_path, mask):
    previous = os.umask(mask)
    try:
        with new_folder(tmp_path / "made/model") as partial:
            fill(partial, "text")
            with tempfile.NamedTemporaryFile(dir=partial, delete=False) as private:
                assert os.stat(private.name).st_mode & 0o777 == 0o600
            os.mkdir(partial / "narrow", 0o700)
        with new_file(tmp_path / "made/file.txt") as file:
            file.write("text")
    finally:
        os.umask(previous)
    for path in (tmp_path / "made", *(tmp_path / "made").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_bytes_names_and_folder_entries_reach_the_disk(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    with new_folder(tmp_path / "model") as partial:
        fill(partial, "text")
    names = [Path(path).name for path in synced]
    assert {"file", "deep", ".model.partial", tmp_path.name} <= set(names)
    assert names[-1] == tmp_path.name
    synced.clear()
    write_json(tmp_path / "a.json", 1)
    assert [Path(path).name for path in synced] == [".a.json.partial", tmp_path.name]
    assert json.loads((tmp_path / "a.json").read_text()) == 1


def test_a_pipe_is_written_to_and_a_link_is_kept(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    write_json(tmp_path / "pipe", 1)
    assert reader.communicate(timeout=20)[0] == "1\n"
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to("real/file.json")
    (tmp_path / "link").symlink_to("real/folder")
    for text in ("first", "second"):
        write_text(tmp_path / "link.json", text)
        with new_folder(tmp_path / "link", overwrite=True) as partial:
            fill(partial, text)
        assert (tmp_path / "real/file.json").read_text() == (tmp_path / "real/folder/deep/file").read_text() == text
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "link.json").is_symlink()
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == ["file.json", "folder"]


def test_what_is_no_name_for_a_file_or_folder_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        write_text(".", "text")
    with pytest.raises(UserError, match="is no name for a new folder"), new_folder("."):
        pytest.fail("the block must not run")


def test_a_file_in_the_place_of_a_folder_stays(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(UserError, match="model is a file"), new_folder(tmp_path / "model", overwrite=True):
        pytest.fail("the block must not run")
    assert (tmp_path / "model").read_text() == "a file"


# ---- a command only replaces what it made

KIND = FolderKind("box", ("box.json", "part_*/*.bin"), {"box.json": b"ours"})


@pytest.mark.parametrize(("found", "word"), [
    ({"thesis.txt": "years"}, "holds 'thesis.txt', which is no part of a box"),
    ({"box.json": "ours", "part_1/a.bin": "", "part_1/thesis.txt": "years"}, "holds 'part_1/thesis.txt'"),
    ({"box.json": "ours", "a.bin": ""}, "holds 'a.bin'"), ({"box.json": "theirs"}, "no command of ours has made a box"),
    ({"part_1/a.bin": ""}, "no command of ours has made a box"), (None, "is a file")])
def test_a_folder_of_another_kind_is_refused_and_kept(tmp_path, found, word):
    place = tmp_path / "box"
    for name, text in (found or {"": "a file"}).items():
        write_text(place / name, text)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=word), new_folder(place, overwrite, KIND):
            pytest.fail("the block must not run")
    left = {str(file.relative_to(place)): file.read_text() for file in place.rglob("*") if file.is_file()}
    assert left == (found or {})


def test_what_comes_into_the_old_folder_meanwhile_is_kept(tmp_path):
    write_text(tmp_path / "box/box.json", "ours")
    with pytest.raises(UserError, match="thesis"), new_folder(tmp_path / "box", True, KIND):
        write_text(tmp_path / "box/thesis.txt", "years")
    assert sorted(path.name for path in (tmp_path / "box").iterdir()) == ["box.json", "thesis.txt"]
    (tmp_path / "box/thesis.txt").unlink()
    # What a kill leaves within one of ours is no hindrance.
    write_text(tmp_path / "box/.box.json.partial", "ou")
    with new_folder(tmp_path / "box", True, KIND) as partial:
        write_text(partial / "box.json", "ours, and new")
    assert [path.name for path in tmp_path.rglob("*")] == ["box", "box.json"]


def test_a_link_in_a_folder_is_no_part_of_it(tmp_path):
    write_text(tmp_path / "box/box.json", "ours")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "box/part_1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="holds 'part_1'"), new_folder(tmp_path / "box", True, KIND):
        pytest.fail("the block must not run")


def nest(folder: Path, depth: int):
    """So many folders, one in another, with a file in the last; no path to it is short enough for the system."""
    folder.mkdir(parents=True)
    place = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=place)
        outer, place = place, os.open("d", os.O_RDONLY, dir_fd=place)
        os.close(outer)
    os.close(os.open("file", os.O_CREAT, dir_fd=place))
    os.close(place)


def test_folders_in_folders_have_no_limit(tmp_path):
    nest(tmp_path / "box/part_1", 2_500)
    with pytest.raises(UserError, match="holds 'part_1/d/d/"), new_folder(tmp_path / "box", True, KIND):
        pytest.fail("the block must not run")
    nest(tmp_path / ".box.partial", 2_500)
    with pytest.raises(UserError, match="holds 'part_1/d/d/"), new_folder(tmp_path / "box", True, KIND):
        pytest.fail("the block must not run")
    files.remove(tmp_path / "box")
    assert not list(tmp_path.iterdir())


# ---- one process at a time

HOLD = """
import sys; sys.path.insert(0, sys.argv[2])
import types; from core.files import new_folder; from core.run_folder import run_folder
with (run_folder(sys.argv[1], types.SimpleNamespace(main=True), {}) if sys.argv[3] == "run" else
      new_folder(sys.argv[1], True)):
    print("held", flush=True); sys.stdin.read()
"""


def enter(folder, what):
    return run_folder(folder, ONE, {}) if what == "run" else new_folder(folder, overwrite=True)


@pytest.fixture
def hold():
    """hold(folder, "run" | "new") -> a process that writes the folder until it is killed."""
    started = []

    def start(folder, what):
        started.append(subprocess.Popen([sys.executable, "-c", HOLD, folder, ROOT, what, "--flag", "a\x1b[2Jb"],
                                        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]
    yield start
    for process in started:
        process.kill()                                    # no clean-up of its own
        process.communicate()


@pytest.mark.parametrize("what", ["run", "new"])
def test_a_folder_has_one_writer_whose_lock_dies_with_it(tmp_path, monkeypatch, hold, what):
    folder = tmp_path / "new/made"
    holder = hold(folder, what)
    left = sorted(path.name for path in tmp_path.rglob("*"))
    (tmp_path / "link").symlink_to("new/made" if what == "run" else "new")
    monkeypatch.chdir(tmp_path)
    for spelling in (folder, "new/../new/made", "link" if what == "run" else "link/made"):
        with pytest.raises(UserError) as refused, enter(spelling, what):
            pytest.fail("the block must not run")
        assert re.search(r"made is being written by another process|link is being written", str(refused.value))
        assert f"(pid {holder.pid} on {socket.gethostname()} since 2" in str(refused.value)
        assert "new/made" in str(refused.value)
        assert "--flag a [2Jb); wait for it" in str(refused.value), "and no control character reaches the terminal"
    (tmp_path / "link").unlink()
    assert sorted(path.name for path in tmp_path.rglob("*")) == left, "what a living process writes stays"
    holder.kill()
    holder.communicate()
    for _ in range(2):
        with enter(folder, what) as place:
            (place / "fisher_1").mkdir(exist_ok=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["fisher_1", "made", "new"]


def test_where_there_are_no_locks_one_warning_is_said(tmp_path, monkeypatch, capsys):
    def flock(descriptor, how):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(files.fcntl, "flock", flock)
    files.warn_of_no_locks.cache_clear()
    for _ in range(2):
        with new_folder(tmp_path / "made", overwrite=True) as partial:
            write_text(partial / "file", "text")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "made"]
    assert capsys.readouterr().err.count("has no locks") == 1


def test_a_lock_does_not_live_on_in_a_forked_worker(tmp_path):
    with new_folder(tmp_path / "made"):
        worker = os.fork()
        if not worker:
            time.sleep(60)
            os._exit(0)
    with new_folder(tmp_path / "made", overwrite=True):
        pass
    os.kill(worker, 9)
    os.waitpid(worker, 0)


def test_two_writers_of_one_file_take_turns(tmp_path):
    path = tmp_path / "report.html"

    def write(text):
        with new_file(path) as file:
            for letter in text:
                file.write(letter)
                file.flush()
                time.sleep(0.02)
    children = []
    for text in ("a" * 20, "b" * 20):
        children.append(os.fork())
        if not children[-1]:
            write(text)
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert path.read_text() in ("a" * 20, "b" * 20)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path, hold):
    hold(tmp_path / "living", "new")
    for name in (".dead.partial/file", ".dead.lock", ".file.json.partial", ".saved.old/file", "kept.json"):
        write_text(tmp_path / name, "text")
    files.clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".living.lock", ".living.partial", "kept.json", "saved"]


# ---- full and read-only disks

def test_a_full_disk_is_one_error_that_names_the_file(small_disk):
    disk = small_disk
    write_text(disk / "model/old", "old")
    write_text(disk / "old.txt", "old")
    for target, write in (("model", lambda partial: (partial / "big").write_bytes(bytes(2 << 20))),
                          ("model", lambda partial: save_file({"a": np.zeros(2 << 20)}, partial / "big"))):
        with pytest.raises(OSError, match="No space left on device") as full, \
                new_folder(disk / target, overwrite=True) as partial:
            write(partial)
        assert full.value.filename == str(disk / target)
    with pytest.raises(OSError, match="No space left on device") as full, new_file(disk / "old.txt") as file:
        file.write("new" * (1 << 20))
    assert full.value.filename == str(disk / "old.txt")
    assert sorted(path.name for path in disk.rglob("*")) == ["model", "old", "old.txt"]
    assert (disk / "old.txt").read_text() == (disk / "model/old").read_text() == "old"
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for writer in (new_file(disk / "more"), new_folder(disk / "more"), run_folder(disk / "more", ONE, {})):
        with pytest.raises(OSError, match="Read-only file system") as full, writer:
            pytest.fail("the block must not run")
        assert "more" in full.value.filename


# ---- the folder of a run

ONE = types.SimpleNamespace(main=True)


def test_a_run_folder_is_locked_and_goes_again_where_nothing_was_written(tmp_path):
    folder = tmp_path / "run"

    def fail(*written):
        with run_folder(folder, ONE, {}):
            with pytest.raises(ValueError, match="another process"), run_folder(folder, ONE, {}):
                pass
            assert folder.exists()                    # the one that holds the lock still needs it
            for name in written:
                (folder / name).touch()
            raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        fail()
    assert not folder.exists()
    with pytest.raises(ValueError, match="a mistake"):
        fail("metrics.jsonl")
    assert [file.name for file in folder.iterdir()] == ["metrics.jsonl"]
    (folder / "eval.json").touch()
    with pytest.raises(ValueError, match="holds a finished run"), run_folder(folder, ONE, {}):
        pass


@pytest.mark.parametrize(("found", "word"), [
    ({"thesis.txt": "years"}, "holds 'thesis.txt' and is no run folder"),
    ({"metrics.jsonl": "of another program"}, "holds 'metrics.jsonl' and is no run folder"),
    ({"config.toml": "[other]", "metrics.jsonl": ""}, "holds 'config.toml' and is no run folder"),
    ({"config.toml": "[forget.ewc]", "final/thesis.txt": "years"}, "final holds 'thesis.txt'"),
    ({"config.toml": "[forget.ewc]", "final/box.json": "theirs"}, "no command of ours has made a box of that")])
def test_a_run_begins_in_no_folder_with_files_that_it_would_delete(tmp_path, found, word):
    for name, text in found.items():
        write_text(tmp_path / name, text)
    with pytest.raises(UserError, match=word), run_folder(tmp_path, ONE, {"final": KIND}):
        pytest.fail("the block must not run")
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()} == set(found)


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "checkpoints"])
def test_what_a_run_writes_is_no_pipe_before_it_begins(tmp_path, name):
    write_text(tmp_path / "config.toml", "[forget.ewc]")
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} is no (regular file|folder)"), run_folder(tmp_path, ONE, {}):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "plan.jsonl", "eval_step_0.json", "config.toml"])
def test_a_link_in_a_run_folder_leads_to_no_file_elsewhere(tmp_path, name):
    write_text(tmp_path / "mine", "[forget.ewc]")
    write_text(tmp_path / "run/config.toml", "[forget.ewc]")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    (tmp_path / "disk").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    with pytest.raises(UserError, match=rf"{name} is no regular file"), run_folder(tmp_path / "run", ONE, {}):
        pytest.fail("the block must not run")
    assert (tmp_path / "mine").read_text() == "[forget.ewc]"
    (tmp_path / "run" / name).unlink()
    write_text(tmp_path / "run/config.toml", "[forget.ewc]")
    with run_folder(tmp_path / "run", ONE, {}):
        pass


def test_a_run_goes_on_where_it_was_killed(tmp_path):
    for name, text in (("metrics.jsonl", ""), ("wandb/run/files/config.yaml", "text"), ("slurm-1.out", "begun"),
                       ("fisher_1/fisher.safetensors", "F"), (".config.toml.partial", "[for"),
                       (".fisher_2.partial/text.json", "{}"), (".lock", "pid 1"),
                       ("checkpoints/.step_1.partial/a", "")):
        write_text(tmp_path / name, text)
    with run_folder(tmp_path, ONE, {"final": KIND}):
        assert sorted(path.name for path in tmp_path.rglob("*")) == [
            ".lock", "checkpoints", "config.yaml", "files", "fisher.safetensors", "fisher_1", "metrics.jsonl", "run",
            "slurm-1.out", "wandb"]
    write_text(tmp_path / "config.toml", "[forget.ewc]")
    write_text(tmp_path / "final/box.json", "ours")
    # What the user puts beside a run's own files is not in the run's way.
    write_text(tmp_path / "notes.md", "mine")
    with run_folder(tmp_path, ONE, {"final": KIND}):
        pass


def test_a_command_claims_its_folder_before_the_long_job(tmp_path):
    def work(text):
        with files.claim_folder(tmp_path / "box", True, KIND):
            with new_folder(tmp_path / "box", True, KIND) as partial:
                write_text(partial / "box.json", text)
            with new_folder(tmp_path / "other") as partial:
                write_text(partial / "file", text)
            if not os.fork():
                # Another process is refused, and a claim is none of a forked one's.
                with pytest.raises(UserError, match="is being written by another process"), enter(tmp_path / "box", ""):
                    os._exit(1)
                os._exit(0)
            assert os.wait()[1] == 0
    work("ours")
    remove(tmp_path / "other")
    work("ours again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["box", "other"]
    write_text(tmp_path / "box/thesis.txt", "years")
    with pytest.raises(UserError, match="thesis"), files.claim_folder(tmp_path / "box", True, KIND):
        pytest.fail("the block must not run")
