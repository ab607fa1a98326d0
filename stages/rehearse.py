"""The dry run: one step, one evaluation and one save, and what the whole run would take."""

import time

from stages.build import Run
from stages.describe import describe, peak_gb
from stages.evaluate import evaluate
from stages.resume import save


def rehearse(run: Run, micro_batches, train_step):
    """Say what the whole run would take, measured on its first step, one evaluation and one save in `run.folder`.

    micro_batches(run, step) and train_step(run, step, batches) are the loop's own.
    """
    describe(run)
    clock = time.perf_counter()
    evaluate(run, 0)
    eval_seconds, clock = time.perf_counter() - clock, time.perf_counter()
    batches = micro_batches(run, 0)
    train_step(run, 0, batches)
    step_seconds, clock = time.perf_counter() - clock, time.perf_counter()
    save(run, 0)
    if run.world.main:
        size = sum(file.stat().st_size for file in (run.folder / "checkpoints").rglob("*") if file.is_file())
        hours = (step_seconds * run.steps + eval_seconds * (2 + run.steps // run.c.eval.every)) / 3600
        run.log.say(f"dry run: step {step_seconds:.2f} s, evaluation {eval_seconds:.1f} s, save "
                    f"{time.perf_counter() - clock:.1f} s; peak memory {peak_gb(run.world):.2f} GB, a checkpoint "
                    f"{size / 1e6:,.0f} MB")
        run.log.say(f"dry run: the whole run takes about {hours:.2f} hours; nothing was kept")
        for row in range(min(2, len(batches[0].tokens))) if run.tokenizer else ():
            show_row(run, batches[0], row, run.log.say)


def show_row(run: Run, batch, row: int, say):
    """A packed sequence as text, its documents apart."""
    tokens, begins = batch.tokens[row], batch.doc_start[row].unique().tolist()
    say(f"--- a packed sequence of source {run.loader.names[batch.source[row]]}, {len(begins)} documents")
    for begin, end in zip(begins, [*begins[1:], len(tokens)]):
        say(f"[{begin}:{end}] {run.tokenizer.decode(tokens[begin:end].tolist())!r}")
