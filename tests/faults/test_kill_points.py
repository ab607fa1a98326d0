"""The tracer finds what it is for. Truth: two ways to write a file that are known to lose it, and one that does not."""

import os

import kill_points

from core.files import write_text


def write_in_place(path):
    """The negative control: a kill after the opening leaves nothing of the old file."""
    with open(path, "w") as file:
        file.write("new" * 1000)


def write_without_sync(path):
    """The other: whole after any kill, and half lost with the power."""
    with open(f"{path}.partial", "w") as file:
        file.write("new" * 1000)
    os.replace(f"{path}.partial", path)


def write_ours(path):
    write_text(path, "new" * 1000)


def find_losses(write, folder, power):
    """The kill points of write(path) that leave neither the old file nor the new one."""
    path, lost = folder / "file.txt", []
    path.write_text("old")
    operations = kill_points.trace(lambda: write(path), folder)
    assert path.read_text() == "new" * 1000
    for k in range(len(operations) + 1):
        path.write_text("old")
        assert kill_points.run_and_kill(lambda: write(path), k, folder, power).status == (
            -9 if k < len(operations) else 0)
        lost += [k] * (path.read_text() not in ("old", "new" * 1000))
    return lost


def and_more(write):
    """`write`, and behind it another operation at which a kill finds what the first left."""
    return lambda path: (write(path), path.with_name("next").write_text("more"))


def test_a_write_that_loses_the_old_file_is_found(tmp_path):
    assert not find_losses(write_ours, tmp_path, power=False)
    assert not find_losses(write_without_sync, tmp_path, power=False)
    assert find_losses(write_in_place, tmp_path, power=True) == []           # one operation, and before it all is well
    assert find_losses(and_more(write_in_place), tmp_path, power=True) == [1]


def test_power_takes_what_was_not_synced(tmp_path):
    assert not find_losses(write_ours, tmp_path, power=True)
    assert find_losses(and_more(write_without_sync), tmp_path, power=True) == [2]


def test_of_a_file_that_grows_only_what_was_not_synced_is_lost(tmp_path):
    def append():
        with open(tmp_path / "log", "a") as file:
            for line in ("one", "two", "three"):
                file.write(f"{line}\n")
                file.flush()
                if line == "two":
                    os.fsync(file.fileno())
        write_text(tmp_path / "next", "more")
    operations = kill_points.trace(append, tmp_path)
    assert operations[1] == f"fsync {tmp_path}/log"
    (tmp_path / "log").unlink()
    assert kill_points.run_and_kill(append, 2, tmp_path, power=True).status == -9
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


def test_a_failing_child_shows_its_traceback(tmp_path):
    ended = kill_points.run_child(lambda: 1 // 0, tmp_path)
    assert ended.status == 1
    assert "ZeroDivisionError" in ended.output
