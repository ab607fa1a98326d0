"""What one of several ranks does in a test, and one rank alone for the truth."""

import dataclasses
from pathlib import Path

from runs import digest

import train
from core import parallel
from stages.build import build
from stages.resume import resume


def steps_of(c, world, steps: int) -> dict:
    """Losses, norms, rows of tokens and the weights' checksum of a short run without files."""
    run = build(c, world)
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
    weights = parallel.model_state(run.inner)
    moments = parallel.optimizer_state(run.inner, run.optimizer)
    return out | {"rows": rows, "weights": {k: v.double().norm().item() for k, v in weights.items()},
                  "moments": {k: v.double().norm().item() for k, v in moments.items()}}


def pass_on(c, world):
    """Read the checkpoint to branch from, and save the state that it gave as it is."""
    Path(c.out).mkdir(exist_ok=True)
    with build(c, world, Path(c.out)) as run:
        step = resume(run)
        run.saver.save(step)
        run.saver.finish()
