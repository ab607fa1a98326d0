"""A run as curves: loss, held-out text, gradient norm and learning rate; and the stability gap after re-warming.

    python experiments/curves.py draw out/legal out/other --out curves.png
    python experiments/curves.py study --model models/stories260K --domain law_title16.txt law_title28.txt \\
        --general tinystories.txt --separator '<|endoftext|>' --out out/curves

`draw` makes one figure of any runs, from their metrics.jsonl. `study` continues a base on a domain with --replay of
general text: with the rate warmed up again and let fall, at the low rate throughout, and warmed up without replay.
Held-out text is scored every few steps, so that a gap shows: general text that first gets worse and then recovers
(arXiv 2406.14833). Full size: train with recipes/llama2_7b_cpt.toml and --eval.every 20, once as it is and once with
--optim.warmup-ratio 0 --optim.schedule constant --optim.lr 1e-6, and draw both.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parent))

import scratch
from forgetting import Study, measure_run, prepare, save_study
from scratch import choose_results

from core import cli
from core.cli import Positional
from core.config import setting
from core.errors import UserError

HIGH, LOW = 1e-3, 1e-4


# ---- any runs

@dataclass(kw_only=True)
class Draw:
    """Draw the curves of runs into one figure."""

    runs: Positional[list[str]]
    """Run folders."""
    out: str = "curves.png"
    """The picture to write."""


def read_curves(lines: list[dict]) -> dict[str, list[tuple]]:
    """{"loss", "grad_norm", "lr": [(step, value)], "held-out SOURCE": [(step, bits per byte, or accuracy)]}."""
    curves = {key: [(line["step"], line[key]) for line in lines if line["kind"] == "train"]
              for key in ("loss", "grad_norm", "lr")}
    for line in lines:
        for source, scores in line["sources"].items() if line["kind"] == "eval" else ():
            value = scores.get("bits_per_byte", scores.get("accuracy"))
            curves.setdefault(f"held-out {source}", []).append((line["step"], value))
    return curves


def draw_runs(runs: dict[str, list[dict]]) -> Figure:
    """Four panels over the steps; runs are told apart by colour, held-out sources by the style of their lines."""
    figure = Figure(figsize=(11, 7), layout="constrained", dpi=120)
    panels = figure.subplots(2, 2, sharex=True).flatten()
    for i, (name, lines) in enumerate(runs.items()):
        curves = read_curves(lines)
        for axes, key in zip(panels, ("loss", None, "grad_norm", "lr")):
            if key:
                axes.plot(*zip(*curves[key]), color=f"C{i % 10}", linewidth=1, label=name)
        heldout = [key for key in curves if key.startswith("held-out ")]
        for key, style in zip(heldout, ("-", "--", ":", "-.") * len(heldout)):
            panels[1].plot(*zip(*curves[key]), color=f"C{i % 10}", linestyle=style, linewidth=1,
                           label=key.removeprefix("held-out ") if i == 0 else None)
    for axes, title in zip(panels, ("training loss, nats per target", "held-out text, bits per byte", "gradient norm",
                                    "learning rate")):
        axes.set(title=title)
    panels[2].set(xlabel="step", yscale="log")
    panels[3].set(xlabel="step")
    panels[0].legend(frameon=False, fontsize=8)
    panels[1].legend(frameon=False, fontsize=8)
    return figure


def run_draw(c: Draw) -> dict:
    runs = {}
    for run in c.runs:
        file = Path(run) / "metrics.jsonl"
        if not file.is_file():
            raise UserError(f"{run} has no metrics.jsonl; name the folder of a run of train.py")
        runs[str(Path(run))] = lines = scratch.read_lines(file)
        if not any(line["kind"] == "train" for line in lines):
            raise UserError(f"{file} has no step yet")
    draw_runs(runs).savefig(c.out)
    print(c.out)
    return {run: read_curves(lines) for run, lines in runs.items()}


# ---- the stability gap

@dataclass(kw_only=True)
class Curves(Study):
    """Continue a base with and without re-warming, and look for a stability gap."""

    steps: int = setting(60, above=0)
    """Length of each run."""
    replay: float = setting(0.25, above=0, below=1)
    """Share of general text where it is replayed."""
    every: int = setting(4, above=0)
    """Steps between evaluations."""
    out: str = "out/curves"


def words_of(c: Curves) -> dict[str, list]:
    """{what is tried: words of train.py}"""
    def mix(share):
        return ["--data.schedule", "static", "--data.domain-share", 1 - share, "--eval.every", c.every, "--eval.tokens",
                4000, "--log.every", 2]
    warm = ["--optim.lr", HIGH, "--optim.min-lr", LOW, "--optim.warmup-ratio", 0.1]
    low = ["--optim.lr", LOW, "--optim.min-lr", LOW, "--optim.warmup-ratio", 0, "--optim.schedule", "constant"]
    return {"re-warmed": [*mix(c.replay), *warm], "not re-warmed": [*mix(c.replay), *low],
            "re-warmed, no replay": [*mix(0.0), *warm]}


def find_gap(points: list[tuple]) -> dict:
    """What the loss on general text does: where it is worst, how far it rose there, and which share of that rise is won
    back by the end (None where it never rose). points: [(step, bits per byte)]."""
    (_, start), (_, end) = points[0], points[-1]
    step, worst = max(points, key=lambda point: point[1])
    rise = worst - start
    return {"start": start, "worst": worst, "worst_step": step, "end": end, "rise": rise,
            "recovered": (worst - end) / rise if rise > 0 else None}


def measure(method: str, words: list, seed: int, c: Curves, out: Path) -> dict:
    row, lines = measure_run(method, words, seed, c, out)
    curves = read_curves(lines)
    return row | find_gap(curves["held-out general"]) | {"words": " ".join(map(str, words)), "curves": curves}


KEYS = ("start", "worst", "worst_step", "end", "rise", "recovered", "domain_bits_per_byte", "domain_gain", "forgetting")


def summarise(rows: list[dict]) -> list[dict]:
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        same = [row for row in rows if row["method"] == method]
        found = {key: [row[key] for row in same if row[key] is not None] for key in KEYS}
        table.append({key: mean(values) if values else None for key, values in found.items()} | {
            "method": method, "recovers": [row["recovered"] is not None and row["recovered"] > 0.1 for row in same]})
    return table


def describe(table: list[dict], steps: int) -> str:
    """A paragraph that is true of any result; what counts as recovery is a tenth of the rise, in every seed."""
    words = []
    for row in table:
        name = row["method"][0].upper() + row["method"][1:]
        if row["rise"] <= 0:
            words.append(f"{name}: general text never rises above the base's {row['start']:.3f} bits per byte.")
            continue
        said = (f"{name}: general text rises from {row['start']:.3f} bits per byte by {row['rise']:.3f}, at its worst "
                f"around step {row['worst_step']:.0f} of {steps}, ")
        if all(row["recovers"]):
            said += f"and wins back {row['recovered']:.0%} of that by the end: a stability gap."
        elif any(row["recovers"]):
            said += f"and wins back {row['recovered']:.0%} of that in the mean, but not with every seed."
        else:
            said += "and does not recover: that is forgetting, no gap."
        words.append(said)
    best = min(table, key=lambda row: row["domain_bits_per_byte"])
    kept = min(table, key=lambda row: row["end"])
    words.append(f"The domain ends lowest {best['method']} ({best['domain_bits_per_byte']:.3f} bits per byte), general "
                 f"text {kept['method']} ({kept['end']:.3f}).")
    return " ".join(words)


COLUMNS = {"run": ("method", ""), "general before": ("start", ".4f"), "at worst": ("worst", ".4f"),
           "step": ("worst_step", ".0f"), "at the end": ("end", ".4f"), "won back": ("recovered", ".0%"),
           "domain at the end": ("domain_bits_per_byte", ".4f"), "domain gain": ("domain_gain", ".1%")}


def run_study(c: Curves) -> dict:
    began, out = time.perf_counter(), prepare(c)
    asked = [(method, words, seed, c, out) for method, words in words_of(c).items() for seed in c.seeds]
    rows = scratch.run_all(c.jobs, measure, asked)
    table = summarise(rows)
    shows = describe(table, c.steps)
    print(f"\n{scratch.format_table(table, COLUMNS)}\n\n{shows}")
    first = {method: scratch.read_lines(out / f"runs/{method}_{c.seeds[0]}/metrics.jsonl") for method in words_of(c)}
    folder = choose_results(c, out, "out", "jobs", "separator")
    save_study("curves", c.seeds, folder, rows, draw_runs(first), began, table=table, shows=shows)
    return {"table": table, "rows": rows}


if __name__ == "__main__":
    sys.exit(cli.run("experiments/curves.py", __doc__, {"draw": (Draw, run_draw), "study": (Curves, run_study)}))
