"""Where LoRA and full training have learned as much, which has forgotten less? LoRA's rate and rank, at equal tokens.

    python experiments/lora_rates.py --model models/stories260K \\
        --domain law_title16.txt law_title28.txt --general tinystories.txt \\
        --separator '<|endoftext|>' --out out/lora_rates

LoRA learns less and forgets less than full training, says arXiv 2405.09673. To see it at equal learning, each method is
run at several learning rates. The last models of a method make a curve, forgetting over the domain's bits per byte, and
each other model is set beside the curve of full training where that has the same bits per byte. Two more curves part
what else differs: full training with frozen embeddings, and LoRA with trained ones.
experiments/results/lora_rates.json has a row per method, with every evaluation along its runs; lora_rates.png beside it
draws the curves. Both stay in --out where only some --methods are run.
"""

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from forgetting import RESULTS, Study, measure_run, prepare, save_study
from matplotlib.figure import Figure

from core import cli
from core.config import setting

# The rate of full training in recipes/forgetting.toml, of which the rates here are multiples.
RATE = 1e-3
WORDS = ["--data.schedule", "static", "--data.domain-share", 1, "--eval.every", 25, "--eval.tokens", 20_000]

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


def measure(method: str, seed: int, c: Rates, out: Path) -> dict:
    """One run; "way" is every evaluation along it: [step, domain bits per byte, forgetting]."""
    words = METHODS[method][1]
    folder = method.replace(" ", "_").replace(",", "")
    row, lines = measure_run(folder, [*WORDS, *words], seed, c, out)
    scores = [[line["step"], *(line["sources"][side]["bits_per_byte"] for side in ("domain", "general"))]
              for line in lines if line["kind"] == "eval"]
    way = [[step, domain, general / scores[0][2] - 1] for step, domain, general in scores]
    return row | {"method": method, "way": way}


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
    """A line per curve through its last models, each marked with its rate, and dotted the way of each run there."""
    figure = Figure(figsize=(8, 5.5), layout="constrained", dpi=110)
    axes = figure.subplots()
    for i, curve in enumerate(dict.fromkeys(row["curve"] for row in rows)):
        own = [row for row in rows if row["curve"] == curve]
        places = [(bits, 100 * forgetting) for bits, forgetting in map(place, own)]
        axes.plot(*zip(*places), marker="o", color=f"C{i}", label=curve)
        for row, at in zip(own, places):
            axes.annotate(row["method"].rpartition(" ")[2], at, xytext=(4, 4), textcoords="offset points", fontsize=7)
            for run in row["runs"]:
                axes.plot(*zip(*((bits, 100 * forgetting) for _, bits, forgetting in run["way"])), linestyle=":",
                          linewidth=0.7, color=f"C{i}")
    axes.invert_xaxis()
    axes.set(xlabel="domain bits per byte, better to the right", ylabel="forgetting: general bits per byte, % above it",
             title="same tokens, several rates; lower is better where as much was learned")
    axes.legend(frameon=False, fontsize=8)
    return figure


def run_study(c: Rates) -> None:
    began, out = time.perf_counter(), prepare(c)
    asked = [(method, seed) for method in c.methods for seed in c.seeds]
    with ThreadPoolExecutor(c.jobs) as pool:
        rows = summarise(list(pool.map(lambda run: measure(*run, c, out), asked)))
    print(f"\n{draw_table(rows)}\n")
    save_study("lora_rates", c.seeds, RESULTS if c.methods == list(METHODS) else out, rows, draw_chart(rows), began)


if __name__ == "__main__":
    sys.exit(cli.run("lora_rates.py", __doc__, (Rates, run_study)))
