"""Whole or not at all. Truth: what a killed, failing or full-disk write leaves on the disk."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from core.errors import UserError
from core.files import new_file, new_folder, read_json, run_folder, write_json, write_text

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


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from core import files
calls, rename = 0, Path.rename
def dying(self, target):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os._exit(9)
    return rename(self, target)
Path.rename = dying
with files.new_folder(sys.argv[2], overwrite=True) as partial:
    (partial / "new").write_text("new")
    if sys.argv[3] == "0":
        os._exit(9)
"""


@pytest.mark.parametrize("rename", [0, 1, 2], ids=["while it fills", "before the exchange", "within the exchange"])
def test_what_a_kill_leaves_is_put_right_by_the_next_write(tmp_path, rename):
    place = tmp_path / "model"
    with new_folder(place) as partial:
        (partial / "old").write_text("old")
    run = subprocess.run([sys.executable, "-c", KILLED, ROOT, place, str(rename)])
    assert run.returncode == 9
    with pytest.raises(UserError, match="exists already"), new_folder(place):
        pytest.fail("the old folder is there and is not to be replaced")
    assert (place / "old").read_text() == "old"
    with new_folder(place, overwrite=True) as partial:
        (partial / "new").write_text("new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model", "new"]


def test_an_exchange_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    place = tmp_path / "model"
    with new_folder(place) as partial:
        (partial / "old").write_text("old")
    rename = Path.rename

    def failing(self, target):
        if self.name == ".model.partial":
            raise OSError("no")
        return rename(self, target)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"), new_folder(place, overwrite=True):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


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


def test_a_file_in_the_place_of_a_folder_is_replaced_on_purpose(tmp_path):
    (tmp_path / "model").write_text("a file")
    with new_folder(tmp_path / "model", overwrite=True) as partial:
        fill(partial, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- the folder of a run

ONE = types.SimpleNamespace(main=True)
HOLD = """
import sys; sys.path.insert(0, sys.argv[2])
import types; from core.files import run_folder
with run_folder(sys.argv[1], types.SimpleNamespace(main=True)): print("held", flush=True); sys.stdin.read()
"""


def test_lock_is_one_processes_and_dies_with_it(tmp_path):
    folder = tmp_path / "new/run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder, ROOT], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"another process is writing the run folder {folder}"), \
            run_folder(folder, ONE):
        pass
    holder.kill()                                     # no clean-up of its own
    holder.communicate()
    for _ in range(2):
        with run_folder(folder, ONE):
            (folder / "metrics.jsonl").touch()


def test_a_run_folder_is_locked_and_goes_again_where_nothing_was_written(tmp_path):
    folder = tmp_path / "run"

    def fail(*written):
        with run_folder(folder, ONE):
            with pytest.raises(ValueError, match="another process"), run_folder(folder, ONE):
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
    assert (folder / "metrics.jsonl").exists()
    (folder / "eval.json").touch()
    with pytest.raises(ValueError, match="holds a finished run"), run_folder(folder, ONE):
        pass
