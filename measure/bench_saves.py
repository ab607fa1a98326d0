"""How long a save holds up the training: `Saver.save` copies the state and returns, and files are hashed, written and
synced behind it. Beside it what the same save takes until it is on the disk, as if the training waited for it.

The run is one of train.py, of a model from scratch on text that is made here: 6.5M parameters, whose weights and
moments are 78 MB.
"""

import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import tokenizer
import train
from core import checkpoint, cli, parallel, sharding
from measure.bench_rows import row, spread
from stages.build import build
from stages.resume import Saver, describe_state, state_tensors
from text.shards import pack

SIZES = ["--model.hidden-size", "256", "--model.intermediate-size", "704", "--model.num-hidden-layers", "8",
         "--model.num-attention-heads", "4", "--model.num-key-value-heads", "4"]
# Saves that are not counted: the first makes the files' folders, and faults in the pages of the copies.
WARM = 2


def make_settings(folder: Path, words: list[str]) -> train.Config:
    """Of a run on 2,000 short documents, packed under `folder`."""
    texts = [f"Section {i}. A claim of {i * i} days lapses after {i % 7} years." for i in range(2000)]
    pack(texts, tokenizer.train(texts, "bpe", 300, folder / "tok"), folder / "text", heldout=0)
    return cli.parse(train.Config, [
        "--out", str(folder / "run"), "--device", "cpu", "--data.sources.text.path", str(folder / "text"),
        "--model.init", "scratch", "--model.tokenizer", str(folder / "tok"), "--data.context", "128",
        "--train.precision", "fp32", "--train.batch-size", "2", "--train.micro-batch-size", "2", "--train.steps",
        "1000", *words], recipe=True)


def save_row(saves: int = 8, words=SIZES) -> dict:
    """Seconds for which a save holds up the training beside seconds until the same save is on the disk, medians."""
    with tempfile.TemporaryDirectory() as room, contextlib.redirect_stdout(io.StringIO()):
        c = make_settings(Path(room), words)
        Path(c.out).mkdir()
        with build(c, parallel.start("cpu"), Path(c.out)) as run:
            run.saver = Saver(run)
            held, whole = zip(*(time_save(run, step) for step in range(WARM + saves)))
            parts = time_parts(run)
    held, whole = held[WARM:], whole[WARM:]
    return row("save_stall", "s", statistics.median(held), statistics.median(whole), "the save, waited for",
               spread=spread([stall / total for stall, total in zip(held, whole)]), saves=saves, **parts)


def time_save(run, step: int) -> tuple[float, float]:
    """(seconds until the training may go on, seconds until all is on the disk) of a save after a step."""
    train.train_step(run, step, train.micro_batches(run, step))
    start = time.perf_counter()
    run.saver.save(step + 1)
    held = time.perf_counter() - start
    run.saver.finish()
    return held, time.perf_counter() - start


def time_parts(run, rounds: int = 5) -> dict[str, float]:
    """What the stall consists of, each part alone: {"state_bytes", "seconds_of_...": median}."""
    tensors = state_tensors(run) | {f"state/{name}": tensor.detach() for name, tensor in
                                    sharding.optimizer_state(run.inner, run.optimizer, lambda x: x.detach()).items()}
    calls = {"check": lambda: sharding.find_not_finite(tensors), "copy": lambda: checkpoint.Shards(tensors, run.world),
             "state_json": lambda: describe_state(run, run.done)}
    seconds = {f"seconds_of_{name}": [] for name in calls}
    for _ in range(rounds):
        for own, call in zip(seconds.values(), calls.values()):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return {"state_bytes": sum(tensor.nbytes for tensor in tensors.values())} | {
        name: statistics.median(own) for name, own in seconds.items()}
