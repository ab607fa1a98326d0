"""forked.py. Truth: what Python itself does with the same words."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORDS = {
    "code": ["-c", "import os, sys; print(sys.argv, os.environ['A'], os.getcwd()); sys.exit(3)", "x"],
    "a bug": ["-c", "print(1, flush=True); 1 / 0"],
    "a message": ["-c", "import sys; sys.exit('gone')"],
    "input": ["-u", "-c", "print(input().upper())"],
    "a module": ["-m", "stages.export"],
    "a mistake": ["train.py", "--optim.lr", "-1"],
    "another option": ["-S", "-c", "import sys; print(sys.flags.no_site)"],
}


def outcome(program, words):
    done = subprocess.run([program, *words], capture_output=True, text=True, cwd=ROOT, input="word\n",
                          env={"A": "b", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    # Where a traceback begins is where it was called from.
    return done.returncode, done.stdout, done.stderr.splitlines()[-1:]


@pytest.mark.slow
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_it_does_as_python_does(forked_python, words):
    assert outcome(forked_python, words) == outcome(sys.executable, words)


def wait_and(then: str) -> list[str]:
    return ["-c", f"import os, signal, time\nprint(os.getpid(), flush=True)\n{then}\ntime.sleep(60)"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "then", "status"), [
    (signal.SIGTERM, "", -signal.SIGTERM), (signal.SIGKILL, "", -signal.SIGKILL),
    (signal.SIGUSR1, "signal.signal(signal.SIGUSR1, lambda *_: os._exit(7))", 7)])
def test_a_signal_reaches_the_command(forked_python, number, then, status):
    code = f"import os, signal, time\n{then}\nprint('ready', flush=True)\ntime.sleep(60)"
    start = time.monotonic()
    with subprocess.Popen([forked_python, "-c", code], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout.readline() == "ready\n"
        command.send_signal(number)
        assert command.wait(30) == status
        # Nobody holds the stream any more: the command has ended with its caller.
        assert command.stdout.read() == ""
    assert time.monotonic() - start < 55


@pytest.mark.slow
def test_it_has_its_own_death(forked_python):
    assert subprocess.run([forked_python, "-c", "import os; os.kill(os.getpid(), 9)"]).returncode == -9
