"""Commands in processes that are forked from one which has imported what they need and never computed: most of what a
process of some steps costs is its imports (4 of 5 CPU seconds of a short run).

    with forked.python() as program:                    # the fixture `forked` makes it sys.executable
        subprocess.run([program, "train.py", ...])      # or -m MODULE, or -c CODE

`program` is a script that hands its words, environment, folder and streams to the server, passes signals on, and ends
as the command ends. With other options than -c, -m and -u, as of what confines itself, it is Python. What an
environment sets before an import (threads, Triton's interpreter, the seed of hashes) is that of the server: a test of
such a setting, or of what an import does, starts Python itself.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What commands import, at once or late.
MODULES = ("train", "eval", "report", "data", "clean", "dedup", "tokenizer", "lora", "forget", "generate", "plan",
           "stages.export", "stages.import_gguf", "measure.probes", "runs", "datasets", "pyarrow.parquet",
           "matplotlib.pyplot", "torch._dynamo", "torch.optim._muon", "torch.distributed.run",
           "torch.distributed.launcher.api",
           "torch.distributed.elastic.rendezvous.dynamic_rendezvous", "torch.distributed.fsdp",
           "torch.distributed.elastic.agent.server.local_elastic_agent", "torch.distributed.checkpoint")
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
if sys.argv[1][0] == "-" and sys.argv[1] not in ("-c", "-m", "-u"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
ignored = [n for n in {numbers} if signal.getsignal(n) == signal.SIG_IGN]
for n in {numbers}:
    n in ignored or signal.signal(n, lambda n, frame: server.send(bytes([n])))
request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd(), ignored]).encode("utf-8", "surrogateescape")
socket.send_fds(server, [len(request).to_bytes(8, "little")], [0, 1, 2])
server.sendall(request)
status = int.from_bytes(server.recv(4), "little", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@contextlib.contextmanager
def python():
    """The script, and while this context lasts the server that it asks."""
    with tempfile.TemporaryDirectory(prefix="forked") as folder:
        address, script = f"{folder}/server", Path(folder, "python")
        script.write_text(CLIENT.format(python=sys.executable, address=address, numbers=[int(n) for n in PASSED_ON]))
        script.chmod(0o755)
        # PYTHON_EXEC: with what torchrun starts its ranks.
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1",
                       "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHON_EXEC": str(script)}
        with subprocess.Popen([sys.executable, __file__, address], env=environment, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as server:
            assert server.stdout.read(1), "the server did not start"
            yield str(script)
            server.stdin.close()


# ---- the server

def serve(address: str):
    """Fork a command for each that calls, until the standard input ends."""
    for name in MODULES:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    os.write(1, b"!")
    # {descriptor that tells of a process's end: (process, connection)}
    running = {}
    while True:
        ready = select.select([0, listener, *running, *(caller for _, caller in running.values())], [], [])[0]
        if 0 in ready:
            os._exit(0)
        if listener in ready:
            caller = listener.accept()[0]
            pid = fork(caller, [listener, *running, *(other for _, other in running.values())])
            running[os.pidfd_open(pid)] = pid, caller
        for ended, (pid, caller) in list(running.items()):
            if ended in ready:
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):
                    caller.send(status.to_bytes(4, "little", signed=True))
                caller.close()
                os.close(ended)
                del running[ended]
            elif caller in ready:
                # A signal; nothing where the caller itself was killed.
                for number in caller.recv(64) or [signal.SIGKILL]:
                    os.kill(pid, number)


def fork(caller, others: list) -> int:
    """The process of a command. It reads the request itself, so that the server waits for nobody."""
    size, streams, *_ = socket.recv_fds(caller, 8, 3)
    request = b""
    while len(request) < int.from_bytes(size, "little"):
        request += caller.recv(1 << 20)
    pid = os.fork()
    if pid:
        for stream in streams:
            os.close(stream)
        return pid
    status = 1
    try:
        for other in [caller, *others]:
            os.close(other if isinstance(other, int) else other.detach())
        status = become(*json.loads(request.decode("utf-8", "surrogateescape")), streams)
    finally:
        os._exit(status)


def become(words: list[str], environment: dict, folder: str, ignored: list[int], streams: list[int]) -> int:
    """The life of a command; its exit status."""
    os.setpgid(0, 0)
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    if signal.SIGINT not in ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    # As the interpreter opens them, with lines at once where that is a terminal.
    sys.stdin, sys.stdout, sys.stderr = (
        open(n, "r" if n == 0 else "w", encoding="utf-8", closefd=False,      # noqa: SIM115
             errors="backslashreplace" if n == 2 else "strict", buffering=1 if n == 2 or os.isatty(n) else -1)
        for n in range(3))
    os.chdir(folder)
    # What it starts itself is forked too.
    sys.executable = os.environ["PYTHON_EXEC"]
    os.environ.clear()
    os.environ.update(environment | {"PYTHON_EXEC": sys.executable})
    if environment.get("PYTHONWARNINGS"):
        warnings.simplefilter(environment["PYTHONWARNINGS"])
    sys.modules["kernels.backend"].choice = environment.get("NANOCPT_KERNELS", "")
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    try:
        status = run(*words)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    # As the interpreter does at its end.
    threading._shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return status


def run(kind: str, *words: str) -> int:
    """What the interpreter does with its words."""
    main = sys.modules["__main__"] = type(sys)("__main__")
    main.__builtins__ = __builtins__
    if kind == "-u":
        sys.stdout.reconfigure(write_through=True)
        run(*words)
    elif kind == "-c":
        sys.argv, sys.path[:0] = ["-c", *words[1:]], [""]
        exec(compile(words[0], "<string>", "exec"), vars(main))
    elif kind == "-m":
        sys.argv, sys.path[:0] = list(words), [os.getcwd()]
        # Imported a moment ago, it would be warned of.
        sys.modules.pop(words[0], None)
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = [kind, *words], [str(Path(kind).resolve().parent)]
        runpy.run_path(kind, run_name="__main__")
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
