"""What each retention method buys: one domain shift, the same tokens for all.

    python experiments/forgetting.py --model models/stories260K \\
        --domain law_title16.txt law_title28.txt --general tinystories.txt \\
        --separator '<|endoftext|>' --out out/forgetting

Every run is train.py with recipes/forgetting.toml and the words of METHODS, on one thread.
experiments/results/forgetting.json has a row per method with the mean over the seeds and the values of each, time and
memory as in metrics.jsonl; forgetting.png beside it shows domain gain against forgetting. Both stay in --out where only
some --methods are run.
"""

import json
import os
import re
import shlex
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure

# The checkout, from whatever folder this file is run; and this folder last, as `import tokenizers` means the library.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.sort(key=lambda path: Path(path).resolve() == Path(__file__).resolve().parent)

from core import cli
from core.config import setting
from core.errors import UserError
from core.files import read_json, refuse_existing, write_json
from measure import verdict

RESULTS = cli.ROOT / "experiments/results"


def replay(share: float) -> list:
    """Words of train.py for a mix with this share of general text throughout."""
    return ["--data.schedule", "static", "--data.domain-share", 1 - share]


# {method: (name in the chart, words of train.py)}; the word "own" takes text sampled from the base as general source.
METHODS = {
    "domain_only": ("domain only", replay(0.0)),
    "replay_5": ("replay 5 %", replay(0.05)),
    "replay_15": ("replay 15 %", replay(0.15)),
    "replay": ("replay 30 %", replay(0.3)),
    "self_replay": ("replay 30 %, sampled from the base", [*replay(0.3), "own"]),
    "adaptive": ("adaptive", ["--forget.adaptive.policy", "degradation", "--eval.every", 25]),
    "ewc": ("ewc", [*replay(0.0), "--forget.ewc.strength", 10.0]),
    "lwf": ("lwf", [*replay(0.0), "--forget.lwf.alpha", 0.5, "--forget.lwf.tokens", "all"]),
    "lora": ("lora", [*replay(0.0), "--lora.rank", 8, "--optim.lr", 1e-2, "--optim.min-lr", 1e-3]),
    "freeze": ("freeze", [*replay(0.0), "--forget.freeze.schedule", "progressive"]),
    "merge": ("merge", [*replay(0.0), "--forget.merge.method", "linear"]),
    "replay_lwf": ("replay 15 % + LwF on it", [*replay(0.15), "--forget.lwf.alpha", 0.5]),
}


@dataclass(kw_only=True)
class Study:
    """The options of both studies of forgetting."""
    model: str
    """The base: a Hugging Face folder."""
    domain: list[str]
    """Text files of the domain."""
    general: list[str]
    """Text files of what the base was trained on."""
    separator: str | None = None
    """The string that stands between the documents of the general files."""
    seeds: list[int] = setting([0, 1], at_least=0)
    """Every method is trained once for each."""
    steps: int = setting(150, above=0)
    """Length of each run."""
    jobs: int = setting(2, above=0)
    """Runs at a time."""
    out: str
    """The folder to make."""


@dataclass(kw_only=True)
class Forgetting(Study):
    methods: list[Literal[*METHODS]] = setting(list(METHODS))
    """The methods to compare."""
    documents: int = setting(600, above=0)
    """Documents to sample from the base for self_replay."""
    out: str = "out/forgetting"


def prepare(c: Study, sampled: int = 0, domain_heldout: float = 0.05) -> Path:
    """Pack the domain and the general text, and `sampled` documents of the base's own; returns the new folder.
    domain_heldout: share of the domain's documents that is scored and not trained on."""
    refuse_existing(c.out)
    out, sides = Path(c.out).resolve(), {"domain": c.domain, "general": c.general}
    if sampled:
        cli.run_command("forget.py", "replay", "--model", c.model, "--out", out / "own.jsonl", "--documents", sampled,
                        "--max-new-tokens", 256, threads=2)
        sides["own"] = [out / "own.jsonl"]
    for side, files in sides.items():
        separator = ["--separator", c.separator] if side == "general" and c.separator else []
        cli.run_command("data.py", "pack", "--tokenizer", c.model, "--out", out / "shards" / side, *files, *separator,
                        "--heldout", domain_heldout if side == "domain" else 0.05,
                        threads=1)
    return out


def measure_run(method: str, words: list, seed: int, c: Study, out: Path) -> tuple[dict, list[dict]]:
    """Run train.py once: (the values that both studies compare, the lines of metrics.jsonl)."""
    began, folder, shards = time.perf_counter(), out / f"runs/{method}_{seed}", out / "shards"
    sources = ["--data.sources.domain.path", shards / "domain", "--data.sources.general.path", shards / "general",
               "--data.sources.general.role", "general"]
    if "own" in words:
        # The real general text then has no share in the mix, and is scored all the same.
        sources += ["--data.sources.own.path", shards / "own", "--data.sources.own.role", "general",
                    "--data.sources.general.weight", 0]
    cli.run_command("train.py", cli.ROOT / "recipes/forgetting.toml", "--model.path", c.model, *sources, "--seed", seed,
                    "--train.steps", c.steps, "--out", folder, *(word for word in words if word != "own"), threads=1)
    found = read_json(folder / "eval.json")
    if lacking := {"domain", "general"} - found["after"].keys():
        raise UserError(f"of the --{min(lacking)} text no document was held out to be scored; give more of it")
    lines = list(map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()))
    trained = [line for line in lines if line["kind"] == "train"]
    comparison = verdict.compare(found["before"], found["after"], general=["general"], domain=["domain"])
    row = {"method": method, "seed": seed, "replay_share": trained[-1]["replay_share"],
           **{f"{side}_bits_per_byte": found["after"][side]["bits_per_byte"] for side in ("domain", "general")},
           "domain_gain": comparison["domain_gain"], "forgetting": comparison["forgetting"],
           "seconds": time.perf_counter() - began, "step_ms": statistics.median(line["step_ms"] for line in trained),
           "peak_gb": max(line["peak_gb"] for line in trained)}
    print(f"{method:14} seed {seed}: domain {row['domain_bits_per_byte']:.4f} ({-row['domain_gain']:+.1%}), general "
          f"{row['general_bits_per_byte']:.4f} ({row['forgetting']:+.1%}) bits per byte, {row['seconds']:.0f} s",
          flush=True)
    return row, lines


def summarise(runs: list[dict]) -> list[dict]:
    """A row per method: means over the seeds, their standard deviations, and both sides relative to domain-only
    training. "pareto": no other method is at least as good in both domain gain and forgetting, and better in one."""
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        seeds = [run for run in runs if run["method"] == method]
        mean = {key: statistics.mean(s[key] for s in seeds) for key in seeds[0] if key not in ("method", "seed")}
        spread = {f"{key}_sd": statistics.stdev(s[key] for s in seeds) if len(seeds) > 1 else 0.0
                  for key in ("domain_bits_per_byte", "general_bits_per_byte")}
        words = " ".join(map(str, METHODS[method][1]))
        rows.append({"method": method, **mean, **spread, "words": words, "runs": seeds})
    alone = next((row for row in rows if row["method"] == "domain_only"), None)
    for row in rows:
        row["pareto"] = not any(
            o["domain_gain"] >= row["domain_gain"] and o["forgetting"] <= row["forgetting"]
            and (o["domain_gain"], o["forgetting"]) != (row["domain_gain"], row["forgetting"]) for o in rows)
        if alone:
            row["forgetting_removed"] = 1 - row["forgetting"] / alone["forgetting"]
            row["domain_cost"] = row["domain_bits_per_byte"] / alone["domain_bits_per_byte"] - 1
            row["time"] = row["step_ms"] / alone["step_ms"]
    return rows


def draw_table(rows: list[dict]) -> str:
    lines = ["| method | domain bits per byte | general | forgetting | of it removed | domain cost | time per step "
             "| peak GB |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for r in sorted(rows, key=lambda r: r["forgetting"]):
        lines.append(f"| {METHODS[r['method']][0]}{' *' if r['pareto'] else ''} "
                     f"| {r['domain_bits_per_byte']:.4f} ± {r['domain_bits_per_byte_sd']:.4f} "
                     f"| {r['general_bits_per_byte']:.4f} ± {r['general_bits_per_byte_sd']:.4f} "
                     f"| {r['forgetting']:+.1%} | {r.get('forgetting_removed', 0):.0%} "
                     f"| {r.get('domain_cost', 0):+.1%} | {r.get('time', 1):.2f} | {r['peak_gb']:.2f} |")
    return "\n".join(lines)


def draw_chart(rows: list[dict]) -> Figure:
    """Each seed a dot, each method's mean a labelled one, the Pareto front a line; in percent."""
    def place(row):
        return 100 * row["domain_gain"], 100 * row["forgetting"]

    figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
    axes = figure.subplots()
    for i, row in enumerate(rows):
        colour = f"C{i % 10}"
        axes.scatter(*zip(*map(place, row["runs"])), s=12, color=colour, alpha=0.4)
        axes.scatter(*place(row), s=40, color=colour, marker="o" if row["pareto"] else "x")
        axes.annotate(METHODS[row["method"]][0], place(row), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.plot(*zip(*sorted(place(row) for row in rows if row["pareto"])), color="grey", linewidth=0.8, zorder=0)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(xlabel="domain gain: bits per byte, % below the base",
             ylabel="forgetting: general bits per byte, % above it",
             title="same tokens, every method; down and right is better")
    return figure


def save_study(name: str, seeds, folder: Path, rows: list[dict], figure: Figure, began: float, file: str = "",
               **more) -> None:
    """NAME.json and NAME.png in the folder; of paths in the command, the names alone. file: the study, if not NAME.
    cpu_seconds: of this process and of the commands that it ran, whatever else the machine did."""
    words = [re.sub("[^=]*/", "", word, count=1) for word in sys.argv[1:]]
    found = {"command": shlex.join(["python", f"experiments/{file or name}.py", *words]), "seeds": list(seeds), **more,
             "seconds": time.perf_counter() - began, "cpu_seconds": sum(os.times()[:4]), "rows": rows}
    write_json(folder / f"{name}.json", found)
    figure.savefig(folder / f"{name}.png")
    print(f"{found['seconds']:.0f} s, {found['cpu_seconds']:.0f} s of CPU; {folder}/{name}.*")


def run_study(c: Forgetting) -> None:
    began = time.perf_counter()
    out = prepare(c, c.documents if "self_replay" in c.methods else 0)
    asked = [(method, METHODS[method][1], seed) for method in c.methods for seed in c.seeds]
    # After a mistake the executor drops the runs that have not begun.
    with ThreadPoolExecutor(c.jobs) as pool:
        rows = summarise(list(pool.map(lambda run: measure_run(*run, c, out)[0], asked)))
    print(f"\n{draw_table(rows)}\n\n* nothing beats it in both")
    save_study("forgetting", c.seeds, RESULTS if c.methods == list(METHODS) else out, rows, draw_chart(rows), began)


if __name__ == "__main__":
    sys.exit(cli.run("forgetting.py", __doc__, (Forgetting, run_study)))
