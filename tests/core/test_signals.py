"""Signals. Truth: the exit status 128 + number that shells give, and real processes that are sent real signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core import cli
from core.errors import UserError
from core.signals import STOPS, agree_on_stop, note_signals

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", STOPS)
def test_signals_are_noted_and_a_second_ctrl_c_stops_at_once(number):
    before = [signal.getsignal(s) for s in STOPS]
    with note_signals() as received:
        os.kill(os.getpid(), number)
        assert received == [number]
        os.kill(os.getpid(), signal.SIGTERM)          # a second polite request changes nothing
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == [signal.getsignal(s) for s in STOPS]


def test_nohup_holds():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with note_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ranks_agree_on_one_signal():
    class World:
        def sum(self, counts):
            return [a + b for a, b in zip(counts, [0, 1, 0, 2])]          # what the other ranks have received
    assert agree_on_stop([], World()) == agree_on_stop([signal.SIGUSR1], World()) == signal.SIGINT
    assert agree_on_stop([signal.SIGTERM], World()) == signal.SIGTERM


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
    while "at work" not in parent.stdout.readline():
        pass
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
