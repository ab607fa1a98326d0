"""What one of several ranks does in a test, and one rank alone for the truth."""

import contextlib
import dataclasses
import hashlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
from runs import digest

import train
from core import parallel, sharding
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
    return out | {"unmoved": [name for name in trained if torch.equal(before[name], weights[name])], "held": held,
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


# ---- ranks that part and meet again in other numbers

def fork_ranks(function, ranks: int, *arguments):
    """Call function(rank, *arguments) in so many forked processes; where one fails, all end and its traceback shows.
    To be called by a process that imported what they need and has computed nothing: autograd does not survive a fork.
    """
    torch.multiprocessing.start_processes(function, arguments, nprocs=ranks, start_method="fork")


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
