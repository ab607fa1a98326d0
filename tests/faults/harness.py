"""Commands in forked processes: torch is imported once, here, and each process begins where its `main()` would.

    worker = start("train", words)                  # or start(function)
    worker.kill()                                   # SIGKILL
    worker.wait(seconds=60).status                  # 0, 1, 2, or 128 + the number of the signal that ended it

This process itself never computes: threads of OpenMP and of autograd do not survive a fork.
"""

import contextlib
import ctypes
import importlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
from runs import arguments, make_lab

import hf
from model import Model, ModelConfig

PR_SET_PDEATHSIG = 1
COMMANDS = ("data", "clean", "dedup", "tokenizer", "lora", "forget", "hf", "eval", "generate", "report")
MARK = "MODULES"
LIBC = ctypes.CDLL(None)


# ---- one process

@dataclass
class Outcome:
    status: int | None                      # None: it did not end in time, and was killed
    out: str
    err: str
    seconds: float
    peak_bytes: int = 0

    @property
    def is_one_line(self) -> bool:
        """What a mistake of the user's looks like."""
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        return self.status == 2 and len(lines) == 1 and "Traceback" not in self.err + self.out

    def __str__(self) -> str:
        said = (self.err.strip() or self.out.strip()).splitlines()
        return f"status {self.status}: {said[-1][:200] if said else 'nothing said'}"


class Worker:
    """A forked process that calls `function()`, whose integer is its exit status, with its output in memory."""

    def __init__(self, function, environment: dict | None = None, stdout: int | None = None):
        self.begun, self.peak, self.outcome = time.monotonic(), 0, None
        self.streams = [os.memfd_create(name) for name in ("stdout", "stderr")]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(function, environment or {}, [self.streams[0] if stdout is None else stdout, self.streams[1]])
        self.watch = os.pidfd_open(self.pid)

    def send(self, number: int):
        os.kill(self.pid, number)

    def kill(self):
        """SIGKILL to the process and to all that it started."""
        for send in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                send(self.pid, signal.SIGKILL)

    def is_alive(self, seconds: float = 0.0) -> bool:
        """Whether it still runs after at most so many seconds."""
        return self.outcome is None and not select.select([self.watch], [], [], max(0.0, seconds))[0]

    def wait(self, seconds: float = 120.0, most_bytes: int | None = None) -> Outcome:
        """How it ended; it is killed where that takes too long, or more resident memory than `most_bytes`."""
        if self.outcome:
            return self.outcome
        end, in_time = time.monotonic() + seconds, True
        while self.is_alive(min(0.02, end - time.monotonic()) if most_bytes else end - time.monotonic()):
            self.peak = max(self.peak, resident_bytes(self.pid) if most_bytes else 0)
            if time.monotonic() >= end or self.peak > (most_bytes or self.peak):
                in_time = False
                self.kill()
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        said = [_read(stream) for stream in self.streams]
        for descriptor in (self.watch, *self.streams):
            os.close(descriptor)
        status = (128 - status if status < 0 else status) if in_time else None
        self.outcome = Outcome(status, *said, time.monotonic() - self.begun, self.peak)
        return self.outcome


def start(what, words=(), **options) -> Worker:
    """A worker that runs a command of this checkout ("train") with these words, or calls a function."""
    return Worker((lambda: command(what, words)) if isinstance(what, str) else what, **options)


def run(what, words=(), seconds: float = 120.0, **options) -> Outcome:
    return start(what, words, **options).wait(seconds)


def command(module: str, words) -> int:
    """A command line in this process. The report of a run, another process, is left out: it imports torch again."""
    sys.argv = [f"{module}.py", *map(str, words)]
    for name, loaded in list(sys.modules.items()):
        if name.startswith("stages.") and hasattr(loaded, "run_command"):
            loaded.run_command = lambda *_, **__: ""
    return importlib.import_module(module).main()


def _become(function, environment: dict, streams: list[int]):
    """The life of a worker after the fork; does not return."""
    status = 1
    try:
        os.setsid()
        # Nothing that the suite starts outlives it.
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.environ |= environment
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, stream in enumerate(streams, 1):
            os.dup2(stream, descriptor)
        sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
                                  for n in (1, 2))
        status = function() or 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 2
    except BaseException:
        traceback.print_exc()
    # As the interpreter does at its end: threads that are no daemons are waited for.
    with contextlib.suppress(BaseException):
        threading._shutdown()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _read(stream: int) -> str:
    return os.pread(stream, os.fstat(stream).st_size, 0).decode(errors="replace")


def resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


# ---- the ranks of a run

class Team:
    """The processes of one run: one, or several ranks over gloo, as torchrun would start them. agent: their store is in
    a process of its own, which torchrun's agent is; otherwise rank 0 holds it, and takes it along where it ends."""

    def __init__(self, words, ranks: int = 1, setup=None, agent: bool = False):
        port = free_port()
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks),
                  "LOCAL_WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        self.agent = Worker(lambda: keep_store(port)) if agent else None
        common |= {"TORCHELASTIC_USE_AGENT_STORE": "True"} if agent else {}

        def work():
            if setup:
                setup()
            return command("train", words)
        self.workers = [Worker(work, common | ({"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {}))
                        for r in range(ranks)]

    def is_alive(self, seconds: float = 0.0) -> bool:
        """Whether any rank still runs after at most so many seconds."""
        end = time.monotonic() + seconds
        return any(worker.is_alive(end - time.monotonic()) for worker in self.workers)

    def kill(self, victims=None):
        for worker in victims or self.workers:
            worker.kill()

    def send(self, number: int):
        for worker in self.workers:
            if worker.is_alive():
                worker.send(number)

    def wait(self, seconds: float = 120.0) -> list[Outcome]:
        end = time.monotonic() + seconds
        outcomes = [worker.wait(max(0.1, end - time.monotonic())) for worker in self.workers]
        if self.agent:
            self.agent.kill()
            self.agent.wait(5)
        return outcomes


def keep_store(port: int):
    """In a worker: what the ranks look up and count in."""
    store = torch.distributed.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    time.sleep(3600)
    del store


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# ---- what the suite's commands work on

@dataclass
class Lab:
    """A scratch folder with a tokenizer, two packed sources and small bases, and what the sections ask for."""

    folder: Path
    short: bool = False                     # the small numbers of continuous integration
    seed: int = 0
    made: int = 0
    notes: dict = field(default_factory=dict)

    def __post_init__(self):
        torch.set_num_threads(1)
        self.random = random.Random(self.seed)
        self.sources = self.folder / "lab"
        outcome = run(lambda: make_lab(self.sources) and 0)
        assert outcome.status == 0, outcome.err
        base = ["--data.domain-share", "0", "--data.schedule", "static"]

        def work() -> int:
            status = command("train", arguments(self.sources, self.folder / "base", *base, steps=6))
            for name in COMMANDS:
                importlib.import_module(name)
            print(MARK, *sys.modules)
            return status
        outcome = run(work)
        assert outcome.status == 0, outcome.err
        self.base, self.experts = self.folder / "base" / "final", self.folder / "experts"
        made = run(lambda: make_experts(self.experts, self.sources / "tok"))
        assert made.status == 0, made.err
        # What a run imports late, torch._dynamo above all, costs each worker more than the run itself.
        for name in outcome.out.rpartition(MARK)[2].split():
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    def count(self, full: int, short: int) -> int:
        return short if self.short else full

    def room(self, name: str = "room") -> Path:
        """A new name under the scratch folder."""
        self.made += 1
        return self.folder / f"{name}_{self.made:05d}"

    def clear(self, path: Path):
        # shutil.rmtree has its own limit for folders in folders.
        subprocess.run(["rm", "-rf", path], check=False)


def make_experts(folder: Path, tok: Path):
    """Two blocks of four experts, of which two see each token."""
    model = Model(ModelConfig(300, 32, 64, 2, 4, 2, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
                              moe_intermediate_size=24, qk_norm=True, family="qwen3_moe"))
    model.initialise(0)
    hf.save(model, folder, tokenizer=tok)


@dataclass
class Row:
    """A line of the table: what was done, how often, and where it did not hold."""

    section: str
    what: str
    tried: int = 0
    failures: list = field(default_factory=list)
    notes: str = ""
    seconds: float = 0.0

    def check(self, holds: bool, complaint) -> bool:
        """Count a trial; where it does not hold, keep the complaint."""
        self.tried += 1
        if not holds:
            self.failures.append(str(complaint)[:600])
        return holds

    @property
    def held(self) -> int:
        return max(0, self.tried - len(self.failures))


@contextlib.contextmanager
def timed(row: Row):
    begun = time.monotonic()
    yield row
    row.seconds += time.monotonic() - begun
