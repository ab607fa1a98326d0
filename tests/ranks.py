"""What one of several ranks does in a test, and one rank alone for the truth.

A test file of ranks is also the program that they run: it forks them once, and they go through all of its cases.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from runs import ENV, digest, make_lab, one

import train
from core import parallel, sharding
from stages import evaluate
from stages.build import build
from stages.resume import resume


def steps_of(c, world, steps: int) -> dict:
    """Losses, norms, rows of tokens and the weights' checksum of a short run without files; the trainable tensors that
    did not move, and the bytes of parameters that this rank holds."""
    run = build(c, world)
    # Copies, as one rank's full tensors are the parameters themselves.
    before = {name: tensor.clone() for name, tensor in sharding.model_state(run.inner).items()}
    held = sum(sharding.model_state(run.inner, form=lambda p: getattr(p, "_local_tensor", p).nbytes).values())
    rows = {}
    out = {"loss": [], "norm": [], "sources": []}
    for step in range(steps):
        batches = train.micro_batches(run, step)
        share = c.train.batch_size // world.size
        parts = [dataclasses.replace(b, **{k: getattr(b, k)[i:i + 1] for k in
                                           ("tokens", "labels", "position_ids", "doc_start")})
                 for b in batches for i in range(len(b.tokens))]
        rows |= {f"{step}/{world.rank * share + i}": digest([part]) for i, part in enumerate(parts)}
        done = train.train_step(run, step, batches)
        for key, value in (("loss", done["loss"]), ("norm", done["grad_norm"]), ("sources", done["sources"])):
            out[key].append(value)
    weights = sharding.model_state(run.inner)
    moments = sharding.optimizer_state(run.inner, run.optimizer)
    trained = [name for name, p in run.inner.named_parameters() if p.requires_grad]
    return out | {"unmoved": [name for name in trained if torch.equal(before[name], weights[name])],
                  "moved": [name for name in before if not torch.equal(before[name], weights[name])], "held": held,
                  "digest": digest_of(weights), "rows": rows,
                  "fisher": {name: value.double().norm().item() for name, value in fisher_of(run).items()},
                  "weights": {k: v.double().norm().item() for k, v in weights.items()},
                  "moments": {k: v.double().norm().item() for k, v in moments.items()}}


def fisher_of(run) -> dict:
    """{name: full tensor} of what EWC has estimated of this rank's parameters."""
    return {name: sharding.full_tensor(value) for method in run.methods if method.name == "ewc"
            for name, value in method.fisher.items()}


def digest_of(weights: dict) -> str:
    """Of every bit of {name: full tensor}."""
    return hashlib.sha256(b"".join(weights[name].contiguous().view(torch.uint8).numpy().tobytes()
                                   for name in sorted(weights))).hexdigest()


def pass_on(c, world):
    """Read the checkpoint to branch from, and save the state that it gave as it is."""
    Path(c.out).mkdir(exist_ok=True)
    with build(c, world, Path(c.out)) as run:
        step = resume(run)
        run.saver.save(step)
        run.saver.finish()


# ---- a program of ranks, which part and meet again in other numbers

def run_once(tmp_path_factory, file: str, seconds: int = 900) -> Path:
    """The folder that the program `file` has filled, and what it said in folder/"said". It runs once, whichever of
    pytest-xdist's workers asks first; the others wait for it."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / Path(file).stem
    with open(shared / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "said").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            done = subprocess.run([sys.executable, file, folder], env=ENV, capture_output=True, text=True,
                                  timeout=seconds)
            assert done.returncode == 0, done.stderr[-3000:]
            (folder / "said").write_text(done.stdout + done.stderr)
    return folder


def fork_ranks(function, ranks: int, *arguments):
    """Call function(rank, *arguments) in so many forked processes; where one fails, all end and its traceback shows.
    To be called by a process that imported what they need and has computed nothing: autograd does not survive a fork.
    """
    # A report of each run would cost more than the run.
    evaluate.run_command = lambda *words: ""
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(function, arguments, nprocs=ranks, start_method="fork")


def make_lab_in(rank: int, folder: Path):
    make_lab(folder / "lab")


@contextlib.contextmanager
def meet(folder: Path, name: str, rank: int, ranks: int):
    """The world of the first `ranks` processes that give this name, over gloo; None in the others."""
    if rank >= ranks:
        yield None
        return
    os.environ |= {"WORLD_SIZE": str(ranks), "RANK": str(rank)}
    if ranks > 1:
        dist.init_process_group("gloo", f"file://{folder}/{name}.meet", rank=rank, world_size=ranks)
    world = parallel.start("cpu")
    yield world
    # None leaves while another still waits for it.
    world.barrier()
    parallel.stop()


def lay_out(world, c):
    """As at the start of a command."""
    c.parallel.refuse_layout(world.size)
    world.share_sequences(c.parallel)


def go_through(folder: Path, cases: dict, measure, after=None):
    """Of cases, {name: (how many ranks take part, its settings)}, what measure(settings, world) finds is written to
    `folder`, for `found_by`. Those of one rank are dealt out to two processes. The largest world then does
    after(folder, world). Each world is forked anew, as PyTorch takes a group of ranks for one that bore its name."""
    sizes = sorted({size for size, _ in cases.values()})
    for size in sizes:
        own = {name: c for name, (ranks, c) in cases.items() if ranks == size}
        fork_ranks(as_one_of, max(size, 2), size, folder, own, measure, after if size == sizes[-1] else None)


def as_one_of(rank: int, ranks: int, folder: Path, cases: dict, measure, after):
    found = {}
    with meet(folder, f"of_{ranks}", rank, ranks) if ranks > 1 else contextlib.nullcontext(one()) as world:
        for name in cases if ranks > 1 else list(cases)[rank::2]:
            lay_out(world, cases[name])
            found[name] = measure(cases[name], world)
        (folder / f"found_{ranks}_{rank}.json").write_text(json.dumps(found))
        if after:
            after(folder, world)


def found_by(folder: Path) -> dict[str, list]:
    """{case: what each of its ranks found}"""
    found = {}
    for file in sorted(folder.glob("found_*.json")):
        for name, value in json.loads(file.read_text()).items():
            found.setdefault(name, []).append(value)
    return found
