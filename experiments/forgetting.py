"""What each method buys: one domain shift, the same tokens for every method, domain gain against forgetting.

    python experiments/forgetting.py --model models/stories260K --domain law_title16.txt law_title28.txt \\
        --general tinystories.txt --separator '<|endoftext|>' --out out/forgetting

Every run is a command of the project (train.py with recipes/forgetting.toml and the words of METHODS below), on one
thread, two at a time. experiments/results/forgetting.json has a row a method with the mean over the seeds and each
seed's numbers, forgetting.png beside it is the plane of domain gain against forgetting (both stay in --out where only
some --methods are run). Time and memory are what metrics.jsonl says.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout, wherever this file is run from

from core.config import ArgumentParser, main_guard, write_json  # noqa: E402
from measure import verdict  # noqa: E402

ALONE = ["--data.schedule", "static", "--data.domain-share", 1.0]


def replay(share: float) -> list:
    return ["--data.schedule", "static", "--data.domain-share", 1 - share]


METHODS = {      # words of train.py; "own" as the general source: text drawn from the base
    "domain_only": ALONE,
    "replay_5": replay(0.05),
    "replay_15": replay(0.15),
    "replay": replay(0.3),
    "self_replay": [*replay(0.3), "own"],
    "adaptive": ["--forget.adaptive.policy", "degradation", "--eval.every", 25],
    "ewc": [*ALONE, "--forget.ewc.strength", 10.0],
    "lwf": [*ALONE, "--forget.lwf.alpha", 0.5, "--forget.lwf.tokens", "all"],
    "lora": [*ALONE, "--lora.rank", 8, "--optim.lr", 1e-2, "--optim.min-lr", 1e-3],
    "freeze": [*ALONE, "--forget.freeze.schedule", "progressive"],
    "merge": [*ALONE, "--forget.merge.method", "linear"],
    "replay_lwf": [*replay(0.15), "--forget.lwf.alpha", 0.5, "--forget.lwf.tokens", "replay"],
}
LABEL = {"replay": "replay 30 %", "replay_5": "replay 5 %", "replay_15": "replay 15 %",
         "self_replay": "replay 30 %, drawn from the base", "replay_lwf": "replay 15 % + LwF on it",
         "domain_only": "domain only"}


def command(*words, threads: int = 1) -> None:
    """A project command; its failure ends the study with the last line it printed."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise ValueError(f"{''.join(last)} (python {' '.join(map(str, words))})")


def prepare(args, out: Path) -> dict[str, Path]:
    """Packed folders of both sides, and of text drawn from the base where a method wants it."""
    sides = {"domain": args.domain, "general": args.general}
    if any("own" in METHODS[name] for name in args.methods):
        command("forget.py", "replay", "--model", args.model, "--out", out / "own.jsonl", "--documents", args.documents,
                "--max-new-tokens", 256, threads=2)
        sides["own"] = [out / "own.jsonl"]
    for side, files in sides.items():
        separator = ["--separator", args.separator] if side == "general" and args.separator else []
        command("data.py", "pack", "--tokenizer", args.model, "--out", out / "shards" / side, *files, *separator,
                "--heldout", 0.05)
    return {side: out / "shards" / side for side in sides}


def run(words: list, seed: int, args, folder: Path, shards: dict) -> tuple[dict, list[dict]]:
    """(eval.json, the lines of metrics.jsonl about training) of one run with these words of train.py."""
    words, own = [w for w in words if w != "own"], "own" in words
    sources = ["--data.sources.domain.path", shards["domain"], "--data.sources.general.path", shards["general"],
               "--data.sources.general.role", "general"]
    if own:                            # the real general text is then read by nobody, and scored all the same
        sources += ["--data.sources.own.path", shards["own"], "--data.sources.own.role", "general",
                    "--data.sources.general.weight", 0]
    command("train.py", "recipes/forgetting.toml", "--model.path", args.model, *sources, "--seed", seed,
            "--train.steps", args.steps, "--out", folder, *words)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    if lacking := {"domain", "general"} - found["after"].keys():
        raise ValueError(f"of the --{min(lacking)} text no document was held out to be scored; give more of it")
    return found, [line for line in lines if line["kind"] == "train"]


def one(method: str, seed: int, args, out: Path, shards: dict) -> dict:
    """One run; its numbers."""
    began = time.perf_counter()
    found, trained = run(METHODS[method], seed, args, out / "runs" / f"{method}_{seed}", shards)
    after = {side: found["after"][side]["bits_per_byte"] for side in ("domain", "general")}
    comparison = verdict.compare(found["before"], found["after"], general=["general"], domain=["domain"])
    row = {"seed": seed, "domain_bits_per_byte": after["domain"], "general_bits_per_byte": after["general"],
           "domain_gain": comparison["domain_gain"], "forgetting": comparison["forgetting"],
           "seconds": time.perf_counter() - began, "step_ms": statistics.median(line["step_ms"] for line in trained),
           "peak_gb": max(line["peak_gb"] for line in trained),
           "replay_share": trained[-1]["replay_share"]}
    print(f"{method:14} seed {seed}: domain {row['domain_bits_per_byte']:.4f} ({-row['domain_gain']:+.1%}), general "
          f"{row['general_bits_per_byte']:.4f} ({row['forgetting']:+.1%}) bits per byte, {row['seconds']:.0f} s",
          flush=True)
    return row


def front(rows: list[dict]) -> set[str]:
    """Methods that no other beats in both domain gain and forgetting."""
    return {r["method"] for r in rows if not any(
        o["domain_gain"] >= r["domain_gain"] and o["forgetting"] <= r["forgetting"]
        and (o["domain_gain"], o["forgetting"]) != (r["domain_gain"], r["forgetting"]) for o in rows)}


def summarise(runs: dict[str, list[dict]]) -> list[dict]:
    """A row a method: means over the seeds, the spread, and both sides against domain-only training."""
    rows = []
    for method, seeds in runs.items():
        mean = {key: statistics.mean(s[key] for s in seeds) for key in seeds[0] if key != "seed"}
        spread = {f"{key}_sd": statistics.stdev(s[key] for s in seeds) if len(seeds) > 1 else 0.0
                  for key in ("domain_bits_per_byte", "general_bits_per_byte")}
        rows.append({"method": method, **mean, **spread, "words": " ".join(map(str, METHODS[method])), "runs": seeds})
    alone = next((row for row in rows if row["method"] == "domain_only"), None)
    best = front(rows)
    for row in rows:
        row["pareto"] = row["method"] in best
        if alone:
            row["forgetting_removed"] = 1 - row["forgetting"] / alone["forgetting"]
            row["domain_cost"] = row["domain_bits_per_byte"] / alone["domain_bits_per_byte"] - 1
            row["time"] = row["step_ms"] / alone["step_ms"]
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| method | domain bits per byte | general | forgetting | of it removed | domain cost | time a step "
             "| peak GB |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for r in sorted(rows, key=lambda r: r["forgetting"]):
        lines.append(f"| {LABEL.get(r['method'], r['method'])}{' *' if r['pareto'] else ''} "
                     f"| {r['domain_bits_per_byte']:.4f} ± {r['domain_bits_per_byte_sd']:.4f} "
                     f"| {r['general_bits_per_byte']:.4f} ± {r['general_bits_per_byte_sd']:.4f} "
                     f"| {r['forgetting']:+.1%} | {r.get('forgetting_removed', 0):.0%} "
                     f"| {r.get('domain_cost', 0):+.1%} | {r.get('time', 1):.2f} | {r['peak_gb']:.2f} |")
    return "\n".join(lines)


def draw(path: Path, rows: list[dict]):
    """PNG: each seed a dot, each method's mean a labelled one, the Pareto front a line."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
    axes = figure.subplots()
    for i, row in enumerate(rows):
        colour = f"C{i % 10}"
        axes.scatter([100 * r["domain_gain"] for r in row["runs"]], [100 * r["forgetting"] for r in row["runs"]],
                     s=12, color=colour, alpha=0.4)
        axes.scatter(100 * row["domain_gain"], 100 * row["forgetting"], s=40, color=colour,
                     marker="o" if row["pareto"] else "x")
        axes.annotate(LABEL.get(row["method"], row["method"]), (100 * row["domain_gain"], 100 * row["forgetting"]),
                      xytext=(5, 4), textcoords="offset points", fontsize=8)
    best = sorted((r["domain_gain"], r["forgetting"]) for r in rows if r["pareto"])
    axes.plot([100 * x for x, _ in best], [100 * y for _, y in best], color="grey", linewidth=0.8, zorder=0)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(xlabel="domain gain: bits per byte, % below the base",
             ylabel="forgetting: general bits per byte, % above it",
             title="same tokens, every method; down and right is better")
    figure.savefig(path)


def arguments(description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description)
    parser.add_argument("--model", required=True, type=os.path.abspath, help="the base: a Hugging Face folder")
    parser.add_argument("--domain", required=True, nargs="+", metavar="FILE", type=os.path.abspath)
    parser.add_argument("--general", required=True, nargs="+", metavar="FILE", type=os.path.abspath)
    parser.add_argument("--separator", help="documents of the general files stand between this string")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (%(default)s)")
    return parser


def new_folder(path: Path) -> Path:
    if path.exists():
        raise ValueError(f"{path} exists; remove it, or name another folder with --out")
    path.mkdir(parents=True)
    return path.resolve()


def together(jobs: int, function, calls: list[tuple]) -> list:
    """function(*call) of each, `jobs` at a time; the first mistake ends those that have not begun."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(function, *call) for call in calls]
        try:
            return [done.result() for done in waiting]
        except ValueError:
            pool.shutdown(cancel_futures=True)
            raise


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
                        help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--documents", type=int, default=600, help="drawn from the base for self_replay (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/forgetting"), help="folder to write (%(default)s)")
    args = parser.parse_args()
    began, out = time.perf_counter(), new_folder(args.out)
    shards, runs = prepare(args, out), {method: [] for method in args.methods}
    asked = [(method, seed) for method in args.methods for seed in args.seeds]
    for (method, _), row in zip(asked, together(args.jobs, one, [(*pair, args, out, shards) for pair in asked])):
        runs[method].append(row)
    rows = summarise(runs)
    results = ROOT / "experiments/results" if args.methods == list(METHODS) else out
    draw(results / "forgetting.png", rows)
    write_json(results / "forgetting.json", {
        "command": "python experiments/forgetting.py --model stories260K --domain ... --general ... "
                   f"--steps {args.steps} --seeds {' '.join(map(str, args.seeds))}",
        "seeds": args.seeds, "seconds": time.perf_counter() - began, "rows": rows})
    print(f"\n{table(rows)}\n\n* nothing beats it in both; {time.perf_counter() - began:.0f} s; {results}/forgetting.*")


if __name__ == "__main__":
    sys.exit(main_guard(main))
