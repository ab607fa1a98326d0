"""Where LoRA and full training have learned as much, which has forgotten less? LoRA's rate and rank, at equal tokens.

    python experiments/lora_rates.py --model models/stories260K \\
        --domain law_title16.txt law_title28.txt --general tinystories.txt \\
        --separator '<|endoftext|>' --out out/lora_rates

LoRA learns less and forgets less than full training, says arXiv 2405.09673. To see it at equal learning, each method is
run at several learning rates. The last models of a method make a curve, forgetting over the domain's bits per byte, and
each other model is set beside the curve of full training where that has the same bits per byte. Two more curves part
what else differs: full training with frozen embeddings, and LoRA with trained ones.

A second curve needs no run: the last model is taken back to the base step by step, by a share of its change or by the
rank of it. So one sees whether what full training learns has a low rank, which LoRA takes for granted.
experiments/results/lora_rates.json has a row per method, with every evaluation along its runs and, of the first seed,
on the way back; lora_rates.png beside it draws both. They stay in --out where only some --methods are run.
"""

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from forgetting import RESULTS, Study, measure_run, prepare, save_study
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import hf
import tokenizer
from core import cli
from core.config import setting
from learn.objectives import Causal
from measure import scoring
from text.shards import Shards
from text.vocabulary import token_before_document

# The rate of full training in recipes/forgetting.toml, of which the rates here are multiples.
RATE = 1e-3
TOKENS = 20_000
WORDS = ["--data.schedule", "static", "--data.domain-share", 1, "--eval.every", 25, "--eval.tokens", TOKENS]

FROZEN = ["--forget.freeze.schedule", "top", "--forget.freeze.blocks", 5]
TRAINED = ["--lora.embeddings", "full"]


def adapt(rank: int, *more) -> list:
    """Words of train.py for adapters of this rank; B A x is multiplied by 2 at any rank."""
    return ["--lora.rank", rank, "--lora.alpha", 2 * rank, *more]


# {curve: (words of train.py, multiples of RATE)}
CURVES = {
    "full": ([], (0.1, 0.3, 1, 3)),
    "full, embeddings frozen": (FROZEN, (0.3, 1)),
    "LoRA 4": (adapt(4), (1, 3, 10)),
    "LoRA 8": (adapt(8), (1, 3, 10)),
    "LoRA 32": (adapt(32), (1, 3, 10)),
    # All matrices but those of keys and values have 64 rows or columns, or more: the update can be of any rank.
    "LoRA 64": (adapt(64), (1, 3, 10)),
    "LoRA 8, embeddings trained": (adapt(8, *TRAINED), (3, 10)),
}
METHODS = {f"{curve} at {rate:g}": (curve, [*words, "--optim.lr", rate * RATE, "--optim.min-lr", rate * RATE / 10])
           for curve, (words, rates) in CURVES.items() for rate in rates}


@dataclass(kw_only=True)
class Rates(Study):
    methods: list[Literal[*METHODS]] = setting(list(METHODS))
    """The methods to compare."""
    steps: int = setting(75, above=0)
    out: str = "out/lora_rates"


def folder_of(method: str) -> str:
    return method.replace(" ", "_").replace(",", "")


def measure(method: str, seed: int, c: Rates, out: Path) -> dict:
    """One run; "way" is every evaluation along it: [step, domain bits per byte, forgetting]."""
    row, lines = measure_run(folder_of(method), [*WORDS, *METHODS[method][1]], seed, c, out)
    scores = [[line["step"], *(line["sources"][side]["bits_per_byte"] for side in ("domain", "general"))]
              for line in lines if line["kind"] == "eval"]
    way = [[step, domain, general / scores[0][2] - 1] for step, domain, general in scores]
    return row | {"method": method, "way": way}


# ---- the way back to the base

def take_share(change: torch.Tensor, share: float) -> torch.Tensor:
    return share * change


def take_rank(change: torch.Tensor, rank: int) -> torch.Tensor:
    """The matrix of this rank that is nearest to the change [out, in]; a vector is kept."""
    if change.ndim < 2:
        return change
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


SHARES = [(take_share, share) for share in (0.25, 0.5, 0.75)]
RANKS = [(take_rank, rank) for rank in (4, 8, 16, 32)]


@torch.no_grad()
def go_back(c: Rates, out: Path, run: dict) -> list[list]:
    """["share" or "rank", how much of the run's change is kept, domain bits per byte, forgetting]; ranks where LoRA has
    not chosen one."""
    base, last = hf.load(c.model), hf.load(out / f"runs/{folder_of(run['method'])}_{run['seed']}/final")
    changed = dict(last.named_parameters())
    changes = {name: (p, changed[name] - p) for name, p in base.named_parameters()}
    prefix, objective = token_before_document(tokenizer.load(c.model)), Causal(mask_documents=True)
    held = [scoring.heldout_documents(Shards(out / "shards" / side, "heldout"), TOKENS)
            for side in ("domain", "general")]

    def bits(model):
        return [scoring.score(model, objective, documents, prefix, model.config.max_position_embeddings)
                ["bits_per_byte"] for documents in held]

    before, found = bits(base)[1], []
    for take, kept in SHARES + (RANKS if METHODS[run["method"]][0].startswith("full") else []):
        for name, (p, change) in changes.items():
            changed[name].copy_(p + take(change, kept))
        domain, general = bits(last)
        found.append([take.__name__.removeprefix("take_"), kept, domain, general / before - 1])
    return found


# ---- what came of it

def summarise(runs: list[dict]) -> list[dict]:
    """A row per method, the means over its seeds. "full": what full training forgets where the domain has as many bits
    per byte, or None where it has not been; "excess": forgetting above that."""
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        seeds, (curve, words) = [run for run in runs if run["method"] == method], METHODS[method]
        mean = {key: statistics.mean(run[key] for run in seeds)
                for key in ("domain_bits_per_byte", "general_bits_per_byte", "domain_gain", "forgetting", "step_ms")}
        rows.append({"method": method, "curve": curve, **mean, "words": " ".join(map(str, words)), "runs": seeds})
    base = (runs[0]["way"][0][1], 0.0)
    full = front([base, *(place(row) for row in rows if row["curve"] == "full")])
    for row in rows:
        bits, forgetting = place(row)
        row["full"] = float(np.interp(bits, *zip(*full))) if full[0][0] <= bits <= base[0] else None
        row["excess"] = None if row["full"] is None else forgetting - row["full"]
    return rows


def place(row: dict) -> tuple[float, float]:
    return row["domain_bits_per_byte"], row["forgetting"]


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in both values, from the fewest bits per byte up."""
    kept = []
    for bits, forgetting in sorted(points):
        if not kept or forgetting < kept[-1][1]:
            kept.append((bits, forgetting))
    return kept


def draw_table(rows: list[dict]) -> str:
    lines = ["| method | rate | domain bits per byte | forgetting | full training's at equal learning | above it |",
             "|---|---:|---:|---:|---:|---:|"]
    for r in rows:
        there = "| | |" if r["full"] is None else f"| {r['full']:+.1%} | {100 * r['excess']:+.1f} points |"
        lines.append(f"| {r['curve']} | {r['method'].rpartition(' ')[2]}x | {r['domain_bits_per_byte']:.4f} "
                     f"| {r['forgetting']:+.1%} {there}")
    return "\n".join(lines)


def draw_chart(rows: list[dict]) -> Figure:
    """Left a line per curve through its last models, each marked with its rate. Right the ways back to the base of the
    first seed: by shares a line, by ranks dashed."""
    figure = Figure(figsize=(11, 5), layout="constrained", dpi=100)
    left, right = figure.subplots(1, 2, sharey=True)
    for i, curve in enumerate(dict.fromkeys(row["curve"] for row in rows)):
        own, colour = [row for row in rows if row["curve"] == curve], f"C{i}"
        left.plot(*zip(*map(place, own)), marker="o", color=colour, label=curve)
        for row in own:
            left.annotate(f"{row['method'].rpartition(' ')[2]}x", place(row), xytext=(4, 4), fontsize=7,
                          textcoords="offset points")
            for kind, style in (("share", "-"), ("rank", "--")):
                way = [(domain, forgetting) for by, _, domain, forgetting in row["runs"][0]["back"] if by == kind]
                if way:
                    right.plot(*zip(*way, place(row)), linestyle=style, linewidth=1, marker=".", color=colour)
    for axes, title in ((left, "last models, several rates"), (right, "parts of their changes: shares, ranks (--)")):
        axes.invert_xaxis()
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set(xlabel="domain bits per byte, better to the right", title=title)
    left.set(ylabel="forgetting: general bits per byte above the base's")
    left.legend(frameon=False, fontsize=8)
    return figure


def run_study(c: Rates) -> None:
    began, out = time.perf_counter(), prepare(c)
    asked = [(method, seed) for seed in c.seeds for method in c.methods]
    with ThreadPoolExecutor(c.jobs) as pool:
        runs = list(pool.map(lambda run: measure(*run, c, out), asked))
    for run in runs[:len(c.methods)]:
        run["back"] = go_back(c, out, run)
    rows = summarise(runs)
    print(f"\n{draw_table(rows)}\n")
    save_study("lora_rates", c.seeds, RESULTS if c.methods == list(METHODS) else out, rows, draw_chart(rows), began)


if __name__ == "__main__":
    sys.exit(cli.run("lora_rates.py", __doc__, (Rates, run_study)))
