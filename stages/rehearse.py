"""The dry run: one evaluation, one step and one save, and what the whole run would take."""

import time

from core.devices import peak_bytes
from stages.build import Run
from stages.describe import describe
from stages.evaluate import score_heldout
from stages.resume import save


def rehearse(run: Run, micro_batches, train_step):
    """Measure the run's first step, an evaluation and a save in `run.folder`, and say what the whole run would take.

    micro_batches(run, step) and train_step(run, step, batches) are the loop's own.
    """
    describe(run)
    batches = micro_batches(run, 0)
    eval_seconds = measure_seconds(score_heldout, run, 0)
    step_seconds = measure_seconds(train_step, run, 0, batches)
    save_seconds = measure_seconds(save, run, 0)
    if not run.world.main:
        return
    hours = (step_seconds * run.steps + eval_seconds * (2 + run.steps // run.c.eval.every)) / 3600
    size = sum(file.stat().st_size for file in (run.folder / "checkpoints").rglob("*") if file.is_file())
    run.log.say(f"dry run: step {step_seconds:.2f} s, evaluation {eval_seconds:.1f} s, save {save_seconds:.1f} s; "
                f"peak memory {peak_bytes(run.world.device) / 1e9:.2f} GB, a checkpoint {size / 1e6:,.0f} MB")
    run.log.say(f"dry run: the whole run takes about {hours:.2f} hours; nothing was kept")
    if run.tokenizer:
        for row in range(min(2, len(batches[0].tokens))):
            show_sequence(run, batches[0], row)


def measure_seconds(function, *arguments) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def show_sequence(run: Run, batch, row: int):
    """A packed sequence as text, a line per document."""
    tokens, begins = batch.tokens[row], batch.doc_start[row].unique().tolist()
    run.log.say(f"--- a packed sequence of source {run.loader.names[batch.source[row]]}, {len(begins)} documents")
    for begin, end in zip(begins, [*begins[1:], len(tokens)]):
        run.log.say(f"[{begin}:{end}] {run.tokenizer.decode(tokens[begin:end].tolist())!r}")
