"""Two nodes, as far as one machine has them: two agents of torchrun with two ranks each, started by the guide's lines.

A node that loses its agent and its ranks (SIGKILL) ends the other one in bounded time, with a line that names ranks and
node; the same command, started on both again with another layout, goes on and ends with the weights of one process.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch
from runs import ENV, ROOT, arguments

import hf
import train

from .harness import Lab, Row, command, run, timed

STEPS, AT = 6, 4
# Seconds in which two nodes have started and, after one died, the other has ended, and those of a run; most of them is
# what four processes take to start on two busy cores.
MOST, RUN = 120, 400
FSDP = ["--parallel.strategy", "fsdp"]


def as_rank():
    """train.py, on a node that dies in the step before AT if NODE_DIES says so."""
    if os.environ.get("NODE_DIES") == os.environ["GROUP_RANK"]:
        real = train.train_step

        def step(run, number, batches):
            if number == AT:
                os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(run, number, batches)
        train.train_step = step
    return train.main()


def words_of(lab: Path, out: Path, *more) -> list[str]:
    return arguments(lab, out, "--train.save-every", 3, "--train.micro-batch-size", 1, *more, steps=STEPS)


def start(words: list[str], **env) -> list[subprocess.Popen]:
    """Both nodes. They meet at a port that is free now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend",
            "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "nodes", "-m", "tests.faults.nodes", *words]
    return [subprocess.Popen(line, cwd=ROOT, env=ENV | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for _ in range(2)]


def end(nodes: list[subprocess.Popen], seconds: float) -> list[tuple[int | None, str]]:
    """(status, what it said) of each; None: it did not end in time, and was killed."""
    found = []
    for node in nodes:
        try:
            found.append((node.wait(seconds), node.stdout.read()))
        except subprocess.TimeoutExpired:
            node.kill()
            found.append((None, ""))
    return found


def node_dies(lab: Lab) -> Row:
    row = Row("nodes", "two nodes of two ranks")
    if lab.short:
        row.notes = "not tried: it takes too long for this"
        return row
    with timed(row):
        out = lab.room("run")
        # Both die after the save of step 3, from which what comes next goes on.
        for dies in ("0", "1"):
            nodes = start(words_of(lab.sources, out, *FSDP), NODE_DIES=dies)
            statuses = end(nodes, MOST)
            survivor = [said for status, said in statuses if status not in (None, -signal.SIGKILL)]
            row.check(len(survivor) == 1, f"node {dies} died: {[status for status, _ in statuses]}")
            names = f"rank {2 * int(dies)}.* died in step" if dies == "0" else \
                rf"rank 2 \(node 1, .*\) and rank 3 \(node 1, .*\) died in step {AT + 1}"
            row.check(any(re.search(f"error: {names}", said) for said in survivor), f"node {dies} died: {survivor}")
        again = end(start(words_of(lab.sources, out, *FSDP, "--parallel.replicas", 2)), RUN)
        row.check([status for status, _ in again] == [0, 0], f"the same command again: {again}")
        row.check(any("at step 3" in said for _, said in again), "it did not go on from step 3")
        alone = lab.room("alone")
        plain = run(lambda: command("train", words_of(lab.sources, alone)))
        row.check(plain.status == 0, f"one process: {plain}")
        mine, theirs = (dict(hf.load(path / "final").named_parameters()) for path in (out, alone))
        odd = [name for name in theirs if not torch.allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-5)]
        row.check(not odd, f"other weights than one process has: {odd}")
        lab.clear(out)
        lab.clear(alone)
    row.notes = "an agent and its ranks are killed, on either node; FSDP2, then HSDP"
    return row


NODES = [node_dies]

if __name__ == "__main__":
    sys.exit(as_rank())
