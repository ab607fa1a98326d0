"""Is what an objective measures on held-out text better than before beyond noise? The paired standard error.

    python experiments/paired.py --before BASE --model out/span/final --shards shards/tales --context 256 \
        --objective.name span

Both models are scored on the same held-out sequences, corrupted in the same way. The measures are ratios of sums over
sequences, such as nats over targets, and so is the change; its standard error is over sequences, which are independent
where tokens of one are not: sqrt(n / (n - 1) sum_i (d_i - D m_i)^2) / sum_i m_i for the changes d_i of the sums, the
targets m_i and the change D. Several models, such as those of several seeds, are each compared with the one before.
"""

import contextlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent))

import scratch

import data
import hf
import tokenizer as tokenizers
from core import cli
from core.config import setting
from core.errors import UserError
from learn.choose_objective import ObjectiveConfig, make_objective, read_settings
from text.mixture import DataConfig
from text.packing import pack_sources
from text.shards import Shards, check_tokenizer


@dataclass(kw_only=True)
class Paired:
    """What an objective measures on held-out sequences of a packed folder, before and after, with its paired error."""
    before: str
    """Model folder: the base."""
    model: list[str]
    """Model folders: the base after training, one a seed."""
    shards: str
    """Folder made by data.py pack."""
    context: int = setting(256, at_least=2)
    """Tokens of a sequence."""
    sequences: int = setting(200, at_least=2)
    """Held-out sequences at most."""
    packing: Literal["window", "best_fit", "document"] = "window"
    """How documents make sequences."""


@torch.no_grad()
def sum_measures(model, objective, held, n: int) -> dict[str, np.ndarray]:
    """{measure: [n, 2] sums and counts of each sequence}, the loss among them."""
    model.eval()
    rows = {name: [] for name in ("loss", *objective.measures)}
    for i in range(n):
        batch = data.read_batch(held, np.arange(i, i + 1), 0)
        loss, count, metrics = objective.loss(model, objective.corrupt(batch, batch.rng))
        for name, pair in {"loss": (loss, count), **metrics["measures"]}.items():
            rows[name].append([float(value) for value in pair])
    return {name: np.array(row) for name, row in rows.items()}


def compare(before: np.ndarray, after: np.ndarray) -> dict:
    """{"before", "after", "change", "error"} of a measure's sums and counts [n, 2], the same counts in both."""
    (was, count), (now, counted) = before.T, after.T
    if not np.array_equal(count, counted):
        raise UserError("the two models were measured on other targets, so that nothing is paired")
    total, n = count.sum(), len(count)
    change = (now - was).sum() / total
    error = math.sqrt(n / (n - 1) * np.square(now - was - change * count).sum()) / total
    return {"before": was.sum() / total, "after": now.sum() / total, "change": change, "error": error}


def run_paired(options: Paired, config: ObjectiveConfig) -> dict:
    bases = [hf.open_base(path) for path in (options.before, *options.model)]
    tokenizer, models = tokenizers.load(bases[0].folder), map(hf.load, bases)
    before = next(models)
    objective = make_objective(config, True, tokenizer, before.config.vocab_size)
    shards = Shards(options.shards, "heldout")
    objective.reference = lambda _: contextlib.nullcontext(before)
    check_tokenizer(options.shards, shards, tokenizer, before.config.vocab_size)
    held = pack_sources({"text": shards}, DataConfig(context=options.context, packing=options.packing),
                        objective.shift, objective.text_length(options.context))["text"]
    n = min(held.sequences, options.sequences)
    was, rows = sum_measures(before, objective, held, n), []
    for path, model in zip(options.model, models):
        now = sum_measures(model, objective, held, n)
        rows += [{"model": path, "measure": name, **compare(was[name], now[name])} for name in was
                 if was[name][:, 1].any()]
    print(f"{n} held-out sequences\n\n" + scratch.format_table(rows, {
        "model": ("model", ""), "measure": ("measure", ""), "before": ("before", ".4f"), "after": ("after", ".4f"),
        "change": ("change", "+.4f"), "paired standard error": ("error", ".4f")}))
    return {"sequences": n, "rows": rows}


def main() -> int:
    words, settings = cli.take_settings(sys.argv[1:], "objective")
    return cli.run("experiments/paired.py", __doc__, (Paired, lambda options: run_paired(
        options, read_settings(settings))), argv=words)


if __name__ == "__main__":
    sys.exit(main())
