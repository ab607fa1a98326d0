"""Signals. Truth: the exit status 128 + number that shells give, and real processes that are sent real signals."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import one

from core import cli
from core.errors import UserError
from core.signals import STOPS, Stopped, closed_output, note_stops, raise_stops

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", STOPS)
def test_signals_are_noted_or_raised_and_handlers_come_back(number):
    before = [signal.getsignal(s) for s in STOPS]
    with raise_stops():
        with note_stops() as received:
            os.kill(os.getpid(), number)
            assert received == [number]
            os.kill(os.getpid(), signal.SIGTERM)          # within a second: the same request
        with pytest.raises(Stopped) as stop:
            os.kill(os.getpid(), number)
        assert (stop.value.why, stop.value.status) == (number.name, 128 + number)
    assert before == [signal.getsignal(s) for s in STOPS]


@pytest.mark.parametrize("number", STOPS)
def test_a_second_request_ends_the_process_at_once(number):
    code = ("import os, signal, time; from core.signals import note_stops\n"
            f"with note_stops():\n  os.kill(os.getpid(), {int(number)}); time.sleep(1.1)\n"
            f"  os.kill(os.getpid(), {int(number)}); time.sleep(600)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=100).returncode == 128 + number


def test_nohup_holds():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with note_stops() as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_outputs_that_count_as_signals(monkeypatch):
    assert closed_output() == 0
    for number, means in ((errno.EPIPE, signal.SIGPIPE), (errno.EIO, signal.SIGHUP), (errno.ENOSPC, 0)):
        for stream in ("stdout", "stderr"):
            with monkeypatch.context() as patch:
                patch.setattr(sys, stream, SimpleNamespace(error=OSError(number, "gone")))
                assert closed_output() == means


def test_a_world_agrees_on_one_signal_with_every_sum():
    world = one()
    with world.note_stops():
        world.barrier()
        world.check()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert world.sum([2.5]) == [2.5]
        assert world.asked == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)
        world.barrier()
        with pytest.raises(Stopped, match="SIGTERM"):     # the first of STOPS
            world.check()
    assert world.asked == 0
    world.sum([])
    world.check()


def test_a_signal_after_the_last_agreement_is_not_lost():
    with pytest.raises(Stopped), one().note_stops():
        os.kill(os.getpid(), signal.SIGHUP)


# ---- a command that runs another one

# Notes a signal, saves for half a second, and leaves as train.py does.
CHILD = """
import os, signal, sys, time
received = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: received.append(number))
print("at work", flush=True)
while not received:
    time.sleep(0.01)
time.sleep(0.5)
open(sys.argv[1], "w").write(f"{received}")
sys.exit(128 + received[0])
"""
PARENT = """
import sys
from dataclasses import dataclass
from core import cli
def both(options):
    for i in (1, 2):
        cli.run_command(sys.argv[1], f"{sys.argv[2]}.{i}", show=True)
@dataclass
class Options:
    pass
sys.exit(cli.run("parent.py", "", (Options, both), argv=[]))
"""


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("to", ["parent", "group", "child"])
def test_a_signal_is_passed_on_once_and_the_command_is_waited_for(tmp_path, number, to):
    (tmp_path / "child.py").write_text(CHILD)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, tmp_path / "child.py", tmp_path / "saved"], cwd=ROOT,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while "at work" not in (line := parent.stdout.readline()):
        assert line, parent.communicate()[1]
    if to == "child":
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        os.kill(int(children[0]), number)
    else:
        (os.killpg if to == "group" else os.kill)(parent.pid, number)
    _, errors = parent.communicate(timeout=30)
    assert (tmp_path / "saved.1").read_text() == f"[{int(number)}]"
    assert not (tmp_path / "saved.2").exists()
    assert parent.returncode == 128 + number
    assert errors == f"error: child.py was stopped by {number.name}\n".replace("child.py", f"{tmp_path}/child.py")


@pytest.mark.parametrize(("code", "status", "said"), [
    ("import sys; print('it broke', file=sys.stderr); sys.exit(1)", 1, "failed: it broke"),
    ("import sys; sys.exit(2)", 2, "failed: its error stands above"),
    ("import os; os.kill(os.getpid(), 9)", 137, "was stopped by SIGKILL"),
])
def test_a_command_that_fails_gives_its_status(tmp_path, code, status, said):
    (tmp_path / "child.py").write_text(code)
    with pytest.raises(UserError) as caught:
        cli.run_command(str(tmp_path / "child.py"))
    assert (caught.value.status, str(caught.value)) == (status, f"{tmp_path}/child.py {said}")


def test_commands_of_threads_are_waited_for(tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    (tmp_path / "child.py").write_text("import time; time.sleep(0.2)")
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(cli.run_command, [str(tmp_path / "child.py")] * 2)) == ["", ""]
    assert time.monotonic() - start > 0.2
