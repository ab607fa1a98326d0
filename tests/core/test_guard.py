"""guard.py against the operating system: real signals, a lock held by another process, arithmetic on infinities."""

import os
import pathlib
import signal
import subprocess
import sys
import types

import pytest

from core import guard

ONE = types.SimpleNamespace(main=True)
HOLD = """
import sys; sys.path.insert(0, sys.argv[2])
import types; from core import guard
with guard.run_folder(sys.argv[1], types.SimpleNamespace(main=True)): print("held", flush=True); sys.stdin.read()
"""


def test_lock_is_one_processes_and_dies_with_it(tmp_path):
    folder = tmp_path / "new/run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder, pathlib.Path(guard.__file__).parents[1]], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"another process is writing the run folder {folder}"), \
            guard.run_folder(folder, ONE):
        pass
    holder.kill()                                     # no clean-up of its own
    holder.communicate()
    for _ in range(2):
        with guard.run_folder(folder, ONE):
            (folder / "metrics.jsonl").touch()


def test_a_run_folder_is_locked_and_goes_again_where_nothing_was_written(tmp_path):
    folder = tmp_path / "run"

    def fail(*written):
        with guard.run_folder(folder, ONE):
            with pytest.raises(ValueError, match="another process"), guard.run_folder(folder, ONE):
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
    with pytest.raises(ValueError, match="holds a finished run"), guard.run_folder(folder, ONE):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_noted_and_a_second_interrupt_stops_at_once(number):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with guard.StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number.name
        os.kill(os.getpid(), signal.SIGTERM)          # a second polite request changes nothing
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(value):
    with pytest.raises(ValueError, match=rf"the loss of step 8 is {value} \(sources in the step: a, b\); the upd"):
        guard.require_finite("loss", value, 7, {"a": 1, "b": 2})
    guard.require_finite("loss", 1e308, 7, ())
