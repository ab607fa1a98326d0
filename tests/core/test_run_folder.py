"""What a stranger's run folder may hold; the rest of core/run_folder.py is tested in test_files.py, beside locks, and
through train.py in tests/faults."""

import types

import pytest

from core.errors import UserError
from core.files import FolderKind, lock_folder, write_text
from core.run_folder import run_folder

ONE = types.SimpleNamespace(main=True)
PARTS = {"final": FolderKind("model folder", ("config.json",), {"config.json": b"{"})}


def begin(folder):
    write_text(folder / "config.toml", "[forget.ewc]")
    return folder


def test_what_a_run_replaces_is_no_link(tmp_path):
    write_text(tmp_path / "mine/config.json", "{}")
    (begin(tmp_path / "run") / "final").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="final is a link"), run_folder(tmp_path / "run", ONE, PARTS):
        pytest.fail("the block must not run")


def test_checkpoints_may_stand_on_another_disk_where_nothing_else_is(tmp_path):
    for name in ("step_00000008/state.json", ".step_00000012.partial/state.json"):
        write_text(tmp_path / "disk" / name, "{}")
    (begin(tmp_path / "run") / "checkpoints").symlink_to(tmp_path / "disk")
    with run_folder(tmp_path / "run", ONE, PARTS):
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["step_00000008"]
    for name in ("thesis.txt", ".notes.partial"):
        write_text(tmp_path / "disk" / name, "words")
        with pytest.raises(UserError, match=f"is a link to a folder that holds '{name}'"), \
                run_folder(tmp_path / "run", ONE, PARTS):
            pytest.fail("the block must not run")
        (tmp_path / "disk" / name).unlink()


@pytest.mark.parametrize("name", ["...partial", "...old", "...lock", "....partial"])
def test_a_leftover_of_the_folder_itself_is_none(tmp_path, name):
    for place in (".run.partial", ".run.old", "....partial"):
        write_text(tmp_path / place / "words", "mine")
    write_text(begin(tmp_path / "run") / name, "")
    with run_folder(tmp_path / "run", ONE, PARTS):
        pass
    assert len(list(tmp_path.glob("*/words"))) == 3


def test_an_old_folder_that_is_a_link_is_not_taken_for_one(tmp_path):
    write_text(tmp_path / "mine/config.json", "{}")
    (begin(tmp_path / "run") / ".final.old").symlink_to(tmp_path / "mine")
    with run_folder(tmp_path / "run", ONE, PARTS):
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "config.toml"]


def test_a_run_that_ended_while_its_lock_was_waited_for_is_finished(tmp_path, monkeypatch):
    folder = begin(tmp_path / "run")

    def lock_late(*words):
        write_text(folder / "eval.json", "{}")
        return lock_folder(*words)
    monkeypatch.setattr("core.run_folder.lock_folder", lock_late)
    with pytest.raises(UserError, match="holds a finished run"), run_folder(folder, ONE, PARTS):
        pytest.fail("the block must not run")
