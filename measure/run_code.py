"""Programs that a model wrote, run to see whether they pass their tests: HumanEval, MBPP, pass@k.

A model may write anything, also what deletes files or calls a server. So nothing runs unless the user says so
(`--run-code`), and each program runs in a process of its own that core/confine.py has closed: it can compute, write a
few files in a folder that is gone afterwards, and nothing else. A machine that cannot do this refuses.

    run_programs([humaneval_program(item, "    return a + b")]) -> [Outcome(passed=True, why="")]

A program passes if it comes to its end. It shares its interpreter with its tests, as it does in HumanEval's own runner:
who writes programs to deceive the tests can do so; who leaves early by os._exit(0) has not passed.
"""

import contextlib
import functools
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from core import confine
from core.errors import UserError

ROOT = Path(__file__).parent.parent
# Seconds of computing and of waiting, and bytes of memory, of a program. HumanEval's own runner waits for 3 s.
SECONDS, WAIT, MEMORY = 3, 30, 1 << 29
# Bytes of a file, files that are open, and files and bytes in the folder, where they are looked at every POLL seconds.
FILE_BYTES, OPEN_FILES, FOLDER_FILES, FOLDER_BYTES, POLL = 1 << 23, 32, 64, 1 << 26, 0.05
# The folders of installed libraries; PYTHONPATH, or a script's own place, may name one that is the user's.
LIBRARIES = {"site-packages", "dist-packages"}
# Bytes that are read of what a process says, and characters of a reason.
REPLY, REASON = 4096, 200
START = "import sys; sys.path.append(sys.argv[1]); from measure.run_code import serve; serve()"
# What a program needs to find Python's files, and nothing that is the user's. Sets of strings have one order, so that
# the same program has the same outcome.
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
               "OPENBLAS_NUM_THREADS": "1"}
# Tries what a program must not do, and fails where it can. A child that is made ends at once.
PROBE = """
import os, socket
def leave():
    if os.fork() == 0:
        os._exit(0)
for forbidden in (socket.socket, leave, lambda: os.kill(os.getppid(), 0), lambda: os.chmod(OUTSIDE, 0o600),
                  lambda: open(OUTSIDE, "a")):
    try:
        forbidden()
    except PermissionError:
        continue
    raise SystemError("it could be left")
"""


class Outcome(NamedTuple):
    passed: bool
    # Why it did not, in a few words.
    why: str


# ---- programs and their score

def humaneval_program(item: dict, completion: str) -> str:
    """item: {"prompt", "test", "entry_point"}, as in HumanEval.jsonl."""
    return f"{item['prompt']}{completion}\n{item['test']}\ncheck({item['entry_point']})"


def mbpp_program(item: dict, code: str) -> str:
    """item: {"test_list": [assertions], "test_setup_code" or "test_imports"}, as in MBPP's two versions."""
    before = [item.get("test_setup_code") or "", *(item.get("test_imports") or [])]
    return "\n".join([code, *before, *item["test_list"]])


def pass_at_k(n: int, passed: int, k: int) -> float:
    """The chance that one of k samples passes, estimated without bias from n of which some passed (Chen et al. 2021,
    arXiv 2107.03374, equation 1): 1 - C(n - passed, k) / C(n, k). With k = 1, passed / n."""
    if not 0 <= passed <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {passed} passed of {n}")
    return 1 - math.comb(n - passed, k) / math.comb(n, k)


def check_permission(tasks: list[str], run_code: bool) -> str:
    """How programs are confined, "" where no task runs any. UserError where tasks would and the user has not allowed
    it, or this machine cannot confine them: before anything was generated."""
    if not tasks:
        return ""
    if not run_code:
        raise UserError(f"{', '.join(tasks)}: scored by running what the model writes, on this machine, confined; that "
                        f"holds as far as the kernel has no faults. Pass --run-code to allow it, or leave the task out")
    return find_confinement()


# ---- running them

def judge_programs(records: list[dict], completions: list[str]) -> list[bool]:
    """Whether what a model wrote behind the prompt of each record passes its tests."""
    programs = [(humaneval_program if "entry_point" in record else mbpp_program)(record, completion)
                for record, completion in zip(records, completions)]
    return [outcome.passed for outcome in run_programs(programs)]


def run_programs(programs: list[str], workers: int | None = None) -> list[Outcome]:
    """The outcome of each program, some at a time. UserError where this machine cannot confine them."""
    find_confinement()
    with ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(run_program, programs))


@functools.cache
def find_confinement() -> str:
    """What a program is kept from on this machine, as a sentence; it was tried. UserError where it cannot be kept."""
    refused = "programs of a model are not run on this machine, which cannot confine them"
    if not confine.has_filters():
        raise UserError(f"{refused}: that needs Linux on x86-64 or ARM64; leave the task out, or use such a machine")
    with tempfile.NamedTemporaryFile() as outside:
        outcome = run_program(f"OUTSIDE = {outside.name!r}\n{PROBE}")
    if not outcome.passed:
        raise UserError(f"{refused} ({outcome.why}); leave the task out, or use a machine whose kernel and container "
                        f"allow seccomp filters")
    files = ("no file but its own folder and Python's (Landlock)" if confine.has_landlock() else
             "no file to write, and those that you may read to read (there is no Landlock of Linux 6.2 or later here)")
    return f"programs run with no network, no other process (seccomp), {files}, {SECONDS} s and {MEMORY >> 20} MB"


def run_program(program: str) -> Outcome:
    """Run a program in a process that cannot harm; the folder that it may write in is removed."""
    mark = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="nanocpt_code_", ignore_cleanup_errors=True) as folder:
        folder = os.path.realpath(folder)
        question = {"program": program, "folder": folder if confine.has_landlock() else None, "mark": mark,
                    "memory": MEMORY, "seconds": SECONDS,
                    "path": [path for path in sys.path if LIBRARIES & set(Path(path).parts)]}
        environment = ENVIRONMENT | {"TMPDIR": folder, "HOME": folder}
        if libraries := os.environ.get("LD_LIBRARY_PATH"):
            environment["LD_LIBRARY_PATH"] = libraries
        # -S: without what site-packages run at the start, which takes time; -B: nothing is written beside them.
        with subprocess.Popen([sys.executable, "-S", "-s", "-P", "-B", "-c", START, ROOT], cwd=folder, env=environment,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              start_new_session=True) as process:
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(question).encode())
                    process.stdin.close()
                if stopped := wait(process, folder):
                    return Outcome(False, stopped)
                # All that was said lies in the pipe, as no other process can hold it.
                return read_outcome(process.stdout.read(REPLY), mark, process.returncode)
            finally:
                process.kill()


def wait(process: subprocess.Popen, folder: str) -> str:
    """Wait until a program ends; if it must be ended, why. The files in its folder are counted here, by no kernel."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL)
            return ""
        files = total = 0
        with os.scandir(folder) as entries:
            for files, entry in enumerate(entries, 1):
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
                if files > FOLDER_FILES or total > FOLDER_BYTES:
                    return f"it wrote more than {FOLDER_FILES} files or {FOLDER_BYTES >> 20} MB"
    return f"it took more than {WAIT} s"


def read_outcome(reply: bytes, mark: str, status: int) -> Outcome:
    try:
        found = json.loads(reply)
        if found["mark"] == mark:
            return Outcome(found["passed"] is True, str(found["why"]))
    except (ValueError, TypeError, KeyError):
        # What it wrote instead is its own.
        pass
    by_time = status in (-signal.SIGKILL, -signal.SIGXCPU)
    return Outcome(False, f"it computed more than {SECONDS} s" if by_time else
                   f"signal {-status} ended it" if status < 0 else "it ended before its tests did")


# ---- in the process of a program

def serve() -> None:
    """Close this process, run the program that standard input holds, and say how it went; all else it says is lost."""
    question = json.loads(sys.stdin.buffer.read())
    output, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    reply = {"mark": question["mark"], "passed": False, "why": ""}
    # The program finds no module of ours, but the libraries that are installed beside us.
    sys.path[:] = [*(path for path in sys.path if path != sys.argv[1]), *question["path"]]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("core", "measure")]:
        del sys.modules[name]
    try:
        confine.limit_resources(question["memory"], question["seconds"], FILE_BYTES, OPEN_FILES)
        confine.confine(question["folder"], [*sys.path, sys.base_prefix, "/lib", "/lib64", "/usr/lib", "/usr/lib64",
                                             "/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/null", "/dev/urandom"])
    except (OSError, ValueError) as error:
        reply["why"] = f"the kernel says: {error}"
    else:
        reply |= judge(question["program"])
    os.write(output, json.dumps(reply).encode())
    os._exit(0)


def judge(program: str) -> dict:
    try:
        exec(compile(program, "program", "exec"), {})
    except MemoryError:
        return {"why": f"it took more than {MEMORY >> 20} MB of memory"}
    except BaseException as error:
        # Whatever a program raises, SystemExit too.
        return {"why": " ".join(f"{type(error).__name__}: {error}".split())[:REASON]}
    return {"passed": True}
