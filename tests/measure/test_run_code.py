"""measure/run_code.py: what a program of a model's cannot do, tried. Truth: what stands on this machine afterwards
(files, processes, a server that waits), HumanEval's own solutions, and pass@k counted by hand."""

import gzip
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core import confine
from core.errors import UserError
from measure import run_code
from measure.run_code import Outcome, pass_at_k, run_program

ROOT = Path(__file__).parents[2]
PERMISSION = "PermissionError: [Errno 1"


@pytest.fixture(autouse=True)
def can_confine():
    if not confine.has_filters():
        pytest.skip("programs are confined on Linux alone, on x86-64 and ARM64")
    try:
        run_code.find_confinement()
    except UserError as refused:
        # Where programs run and are not kept from something, the tests fail.
        if "the kernel says" not in str(refused):
            raise
        pytest.skip(str(refused))


@pytest.fixture(params=["landlock", "no landlock"])
def landlock(request, monkeypatch):
    """Whether programs are confined with Landlock; without it, as on an older kernel."""
    if request.param == "no landlock":
        monkeypatch.setattr(confine, "has_landlock", lambda: False)
    elif not confine.has_landlock():
        pytest.skip("this kernel has no Landlock of Linux 6.2 or later")
    return request.param == "landlock"


# ---- programs that would do harm

def test_no_process_is_made(landlock):
    for program in ("import os\nos.fork()", "import os\nos.posix_spawn('/bin/sh', ['sh'], {})",
                    "import subprocess\nsubprocess.run('true', shell=True)", "import os\nos.execv('/bin/sh', ['sh'])",
                    "import threading\nthreading.Thread(target=print).start()",
                    "import ctypes\nassert ctypes.CDLL(None).syscall(56, 0, 0, 0, 0, 0) >= 0"):
        assert not run_program(program).passed, program
    assert run_program(program.partition(".syscall")[0]).passed


def test_loops_sleeps_and_fork_bombs_are_ended(monkeypatch):
    monkeypatch.setattr(run_code, "SECONDS", 1)
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    before = len(os.listdir("/proc"))
    # The last one is a single step of C.
    for program in ("while True: pass", bomb, "x = 9 ** 9 ** 9"):
        assert run_program(program) == Outcome(False, "it computed more than 1 s")
    assert abs(len(os.listdir("/proc")) - before) < 50
    monkeypatch.setattr(run_code, "WAIT", 0.5)
    began = time.monotonic()
    assert run_program("import time\ntime.sleep(600)") == Outcome(False, "it took more than 0.5 s")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("how", ["open({}, 'w')", "open({}, 'a').write('x')", "os.remove({})", "os.truncate({}, 0)",
                                 "os.chmod({}, 0)", "os.rename({0}, {0} + 'x')", "os.utime({}, (1, 1))",
                                 "os.link({}, 'own')", "os.symlink({}, 'own')\nopen('own', 'w')",
                                 "os.mkdir({} + 'd')", "os.open(os.path.dirname({}), os.O_TMPFILE | os.O_RDWR)",
                                 "os.setxattr({}, 'user.x', b'x')", "os.mknod({} + 'n')"])
def test_nothing_is_written_outside_its_folder(landlock, tmp_path, how):
    file = tmp_path / "precious"
    file.write_text("kept")
    before = file.stat()
    outcome = run_program("import os\n" + how.format(repr(str(file))))
    assert not outcome.passed
    assert "PermissionError" in outcome.why
    assert (file.read_text(), os.listdir(tmp_path)) == ("kept", ["precious"])
    assert (file.stat().st_mode, file.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_its_own_folder_may_be_written_where_landlock_guards_the_rest(landlock):
    program = ("import os, tempfile\nopen('a', 'w').write('x')\nassert open('a').read() == 'x'\nos.rename('a', 'b')\n"
               "os.remove('b')\nwith tempfile.NamedTemporaryFile() as file:\n    file.write(b'x')\n")
    assert run_program(program).passed == landlock
    found = set(Path(run_code.tempfile.gettempdir()).glob("nanocpt_code_*"))
    assert not found


def test_files_of_the_user_are_closed_where_there_is_landlock(landlock, tmp_path):
    (tmp_path / "secret").write_text("key")
    for path in (tmp_path / "secret", "/proc/self/environ", "/etc/passwd"):
        assert run_program(f"open({str(path)!r}).read()").passed != landlock


def test_a_folder_of_pythonpath_is_the_users_and_libraries_are_found(monkeypatch, tmp_path):
    if not confine.has_landlock():
        pytest.skip("this kernel has no Landlock of Linux 6.2 or later")
    (tmp_path / "secret").write_text("key")
    monkeypatch.syspath_prepend(tmp_path)
    outcome = run_program(f"open({str(tmp_path / 'secret')!r}).read()")
    assert outcome.why.startswith(PERMISSION)
    assert run_program("import jinja2").passed


def test_no_socket_reaches_a_server_that_waits(landlock, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "local"))
        local.listen()
        server.settimeout(0.2)
        for program in (f"socket.create_connection({server.getsockname()!r})",
                        f"socket.socket(socket.AF_UNIX).connect({str(tmp_path / 'local')!r})",
                        f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', {server.getsockname()!r})"):
            outcome = run_program(f"import socket\n{program}")
            assert not outcome.passed
            assert outcome.why.startswith(PERMISSION)
        with pytest.raises(TimeoutError):
            server.accept()


def test_memory_is_bounded(landlock):
    for program in ("x = []\nwhile True:\n    x.append('a' * 10**7)", "x = 'a' * 10**10"):
        assert run_program(program) == Outcome(False, "it took more than 512 MB of memory")


def test_the_disk_is_not_filled(monkeypatch):
    if not confine.has_landlock():
        pytest.skip("without Landlock no file is written at all")
    many = "import itertools\nfor i in itertools.count():\n    open(str(i), 'w').write('a' * 10**{})"
    assert "more than 64 files or 64 MB" in run_program(many.format(0)).why
    assert "more than 64 files or 64 MB" in run_program(many.format(6)).why
    assert not run_program("open('x', 'w').write('a' * 10**8)").passed
    assert not list(Path(run_code.tempfile.gettempdir()).glob("nanocpt_code_*"))


def test_no_other_process_gets_a_signal(landlock):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        for program in ("os.kill({}, 9)", "os.killpg(os.getpgid({}), 9)",
                        "signal.pidfd_send_signal(os.pidfd_open({}), 9)",
                        # By a pipe whose other end is read: F_SETSIG 9, F_SETOWN, O_ASYNC
                        "fcntl.fcntl(1, 10, 9)\nfcntl.fcntl(1, 8, {})", "os.kill(-1, 0)"):
            assert not run_program(f"import os, signal, fcntl\n{program.format(bystander.pid)}").passed, program
        assert bystander.poll() is None
        bystander.stdin.close()


def test_limits_rights_and_settings_of_the_machine_stay():
    for program in ("resource.prlimit(os.getpid(), resource.RLIMIT_CPU)", "os.nice(-5)", "os.setuid(0)",
                    "os.sched_setaffinity(0, {0})", "os.chroot('/')", "os.memfd_create('x')",
                    "assert ctypes.CDLL(None).unshare(0x10000000) == 0",
                    "assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
                    "assert ctypes.CDLL(None).syscall(425, 1, 0) >= 0",         # io_uring
                    "assert ctypes.CDLL(None).mount(b'x', b'/', b'tmpfs', 0, 0) == 0"):
        assert not run_program(f"import ctypes, os, resource\n{program}").passed, program


def test_what_it_prints_and_says_is_bounded():
    assert run_program("print('x' * 10**7)").passed
    assert len(run_program("raise ValueError('a\\nb' * 10**6)").why) == run_code.REASON
    # It leaves a verdict of its own.
    forged = b'{"mark": "0123456789abcdef", "passed": true, "why": ""}'
    write = "import os\nfor fd in range(3, 9):\n    try:\n        os.write(fd, FORGED)\n    except OSError: pass\n"
    assert not run_program(f"FORGED = {forged}\n{write}os._exit(0)").passed


def test_the_environment_is_not_the_users(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    program = "import os, sys\nassert 'HF_TOKEN' not in os.environ\nassert os.environ['TMPDIR'] == os.getcwd()\n"
    assert run_program(f"{program}assert not [path for path in sys.path if path in ('', {str(ROOT)!r})]").passed
    for ours in ("model", "core.files", "text.words"):
        assert run_program(f"import {ours}").why.startswith("ModuleNotFoundError")


def test_a_plain_user_runs_programs_too():
    """Root is not needed, and does not help."""
    if os.geteuid():
        pytest.skip("this is a plain user, so that all the other tests say it")
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    nobody = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": ROOT, "env": {"PATH": os.defpath}}
    if not python or subprocess.run([python, "-c", "import core.errors"], capture_output=True, **nobody).returncode:
        pytest.skip("no Python here that another user may run, or it may not read this checkout")
    programs = ("x = 1", "import socket; socket.socket()", "import os; os.fork()",
                "import os; os.kill(os.getppid(), 0)", "open('/tmp/x', 'w')")
    words = f"from measure import run_code as r; print([outcome.passed for outcome in r.run_programs({programs!r})])"
    done = subprocess.run([python, "-B", "-c", words], text=True, stdout=subprocess.PIPE, check=True, **nobody)
    assert done.stdout.splitlines()[-1] == "[True, False, False, False, False]"


# ---- machines that cannot

def refuse(monkeypatch, match):
    run_code.find_confinement.cache_clear()
    with pytest.raises(UserError, match=match) as refused:
        run_code.run_programs(["x = 1"])
    assert "\n" not in str(refused.value)
    monkeypatch.undo()
    run_code.find_confinement.cache_clear()


def test_a_machine_that_cannot_confine_refuses(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    refuse(monkeypatch, "needs Linux on x86-64 or ARM64")
    start = "import sys; sys.path.append(sys.argv[1]); import measure.run_code as r\ndef no(*_):\n    {}\n" \
            "r.confine.confine = no\nr.serve()"
    monkeypatch.setattr(run_code, "START", start.format("raise OSError(22, 'Invalid argument')"))
    refuse(monkeypatch, r"the kernel says: \[Errno 22\] Invalid argument.*allow seccomp filters")
    # A kernel that takes the filter and does not follow it.
    monkeypatch.setattr(run_code, "START", start.format("pass"))
    refuse(monkeypatch, "it could be left")


def test_nothing_runs_that_was_not_allowed():
    assert run_code.check_permission([], run_code=False) == ""
    assert "no network" in run_code.check_permission(["humaneval"], run_code=True)
    with pytest.raises(UserError, match=r"^humaneval, mbpp: scored by running what the model writes.*--run-code"):
        run_code.check_permission(["humaneval", "mbpp"], run_code=False)


# ---- scores

ADD = {"prompt": 'def add(a, b):\n    """Add."""\n', "entry_point": "add",
       "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n"}


def test_a_program_passes_if_its_tests_do():
    completions = {"    return a + b": True, "    return a - b": False, "    return a +": False, "    exit()": False,
                   "    import os; os._exit(0)": False, "    raise SystemExit(0)": False,
                   "    import math\n    return int(math.fsum([a, b]))": True,
                   "    import numpy\n    return numpy.add(a, b)": True}
    programs = [run_code.humaneval_program(ADD, completion) for completion in completions]
    outcomes = run_code.run_programs(programs)
    assert [outcome.passed for outcome in outcomes] == list(completions.values())
    assert outcomes[1].why == "AssertionError:"
    assert outcomes[2].why.startswith("SyntaxError: ")
    assert all(outcome.passed != bool(outcome.why) for outcome in outcomes)


def test_mbpp_is_code_and_assertions():
    item = {"test_list": ["assert double(2) == 4", "assert double(math.pi) > 6"], "test_imports": ["import math"]}
    programs = [run_code.mbpp_program(item, f"def double(x):\n    return {code}") for code in ("2 * x", "x")]
    assert [outcome.passed for outcome in run_code.run_programs(programs)] == [True, False]
    old = {"test_list": ["assert f() == 3"], "test_setup_code": "x = 3"}
    assert run_code.judge_programs([old, item, ADD, ADD], ["def f():\n    return x", "double = 2", "    return a + b",
                                                           "    return b"]) == [True, False, True, False]


@pytest.mark.slow
def test_humanevals_own_solutions_pass_and_empty_ones_do_not(data_dir):
    with gzip.open(data_dir / "bench/humaneval/HumanEval.jsonl.gz", "rt") as file:
        items = [json.loads(line) for line in file]
    programs = [run_code.humaneval_program(item, item["canonical_solution"]) for item in items]
    outcomes = run_code.run_programs(programs)
    assert [item["task_id"] for item, outcome in zip(items, outcomes) if not outcome.passed] == []
    nothing = [run_code.humaneval_program(item, "    pass") for item in items[::10]]
    assert not any(outcome.passed for outcome in run_code.run_programs(nothing))


def test_pass_at_k_counted_by_hand():
    """Of 5 samples 2 pass: of the 10 pairs 3 hold none of them, of the 10 triples 1."""
    assert [pass_at_k(5, 2, k) for k in (1, 2, 3, 4, 5)] == pytest.approx([0.4, 0.7, 0.9, 1, 1])
    assert (pass_at_k(1, 1, 1), pass_at_k(1, 0, 1), pass_at_k(200, 0, 100), pass_at_k(200, 200, 1)) == (1, 0, 0, 1)
    for n, passed, k in ((7, 3, 2), (6, 1, 4), (8, 5, 3)):
        draws = list(itertools.combinations([True] * passed + [False] * (n - passed), k))
        assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    for wrong in ((5, 6, 1), (5, 2, 6), (5, 2, 0), (5, -1, 1)):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(*wrong)
