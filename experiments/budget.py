"""Does adaptive replay hold a forgetting budget that fixed replay of the same cost breaks?

    python experiments/budget.py --model models/stories260K --domain law_title16.txt law_title28.txt \\
        --general tinystories.txt --separator '<|endoftext|>' --out out/budget

Each seed is trained twice on the same number of tokens, evaluated every 10 steps: with the budget policy of forget.py,
and with a fixed share of replay equal to the mean share that the first run came to. experiments/results/budget.json
has what every evaluation saw, budget.png beside it draws it.
"""

import json
import statistics
import sys
import time
from pathlib import Path

from forgetting import ROOT, arguments, new_folder, prepare, run, together

from core.config import main_guard, write_json

EVERY = 10
# the rate rises over a tenth of the run and falls to a fiftieth: what must be replayed falls with it
RATES = ["--data.schedule", "static", "--eval.every", EVERY, "--eval.tokens", 20_000, "--log.every", EVERY,
         "--optim.warmup-ratio", 0.1, "--optim.min-lr", 2e-5]


def adaptive(epsilon: float) -> list:
    """Replay starts at its highest share, and falls where the budget allows it."""
    return ["--data.domain-share", 0.4, "--forget.adaptive.policy", "budget", "--forget.adaptive.start", 0.6,
            "--forget.adaptive.epsilon", epsilon]


def measured(method: str, words: list, seed: int, args, folder: Path, shards: dict) -> dict:
    """One run: what general text lost at each evaluation, and what it cost."""
    found, trained = run([*RATES, *words], seed, args, folder, shards)
    files = {int(file.stem.rsplit("_", 1)[1]): file for file in folder.glob("eval_step_*.json")}
    general = [json.loads(files[step].read_text(encoding="utf-8"))["texts"]["general"]["bits_per_byte"]
               for step in sorted(files)]
    rises = [value - general[0] for value in general]
    shares, sequences = {line["step"]: line["replay_share"] for line in trained}, 0.0
    spent = []                                             # of each interval; the log has the mean up to a step
    for begin, end in zip(sorted(files), sorted(files)[1:]):
        sequences, before = shares[end] * end, sequences
        spent.append((sequences - before) / (end - begin))
    return {"method": method, "seed": seed, "replay_share": trained[-1]["replay_share"],
            "worst_rise": max(rises), "last_rise": rises[-1],
            "evaluations_over": sum(rise > args.epsilon for rise in rises), "evaluations": len(rises) - 1,
            "domain_bits_per_byte": found["after"]["domain"]["bits_per_byte"],
            "general_bits_per_byte": found["after"]["general"]["bits_per_byte"],
            "steps": sorted(files), "rises": rises, "replay_shares": spent, "words": " ".join(map(str, words))}


def pair(seed: int, args, out: Path, shards: dict) -> list[dict]:
    """With the budget, then with the fixed share that it came to in the mean."""
    first = measured("adaptive", adaptive(args.epsilon), seed, args, out / f"adaptive_{seed}", shards)
    fixed = ["--data.domain-share", 1 - first["replay_share"]]
    rows = [first, measured("fixed", fixed, seed, args, out / f"fixed_{seed}", shards)]
    for row in rows:
        print(f"{row['method']:9} seed {seed}: replay {row['replay_share']:.1%}, general bits per byte at worst "
              f"{row['worst_rise']:+.4f}, over the budget in {row['evaluations_over']} of {row['evaluations']}, at the "
              f"end {row['last_rise']:+.4f}; domain {row['domain_bits_per_byte']:.4f}", flush=True)
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| replay | mean share | worst rise | evaluations over the budget | last rise | domain bits per byte |",
             "|---|---:|---:|---:|---:|---:|"]
    for method in ("adaptive", "fixed"):
        of = [row for row in rows if row["method"] == method]
        mean = {key: statistics.mean(row[key] for row in of) for key in of[0] if isinstance(of[0][key], float)}
        lines.append(f"| {method} | {mean['replay_share']:.1%} | {max(row['worst_rise'] for row in of):.4f} "
                     f"| {', '.join(str(row['evaluations_over']) for row in of)} of {of[0]['evaluations']} "
                     f"| {mean['last_rise']:.4f} | {mean['domain_bits_per_byte']:.4f} |")
    return "\n".join(lines)


def draw(path: Path, rows: list[dict], epsilon: float):
    """PNG: what general text lost, and the share of replay, over the steps; a line a run."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for row in rows:
        look = {"color": {"adaptive": "C0", "fixed": "C1"}[row["method"]], "alpha": 0.8,
                "label": f"{row['method']} replay" if row["seed"] == rows[0]["seed"] else None}
        above.plot(row["steps"], row["rises"], **look)
        below.step(row["steps"][1:], row["replay_shares"], where="pre", **look)
    above.axhline(epsilon, color="black", linewidth=0.8, linestyle="--")
    above.set(ylabel="general bits per byte\nabove the base's", title="the same replay in the mean; dashed: the budget")
    above.legend(frameon=False)
    below.set(xlabel="steps", ylabel="replay share", ylim=(0, 0.7))
    figure.savefig(path)


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(steps=200, methods=[])
    parser.add_argument("--epsilon", type=float, default=0.1, help="the budget in bits per byte (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/budget"), help="folder to write (%(default)s)")
    args = parser.parse_args()
    began, out = time.perf_counter(), new_folder(args.out)
    shards = prepare(args, out)
    pairs = together(args.jobs, pair, [(seed, args, out, shards) for seed in args.seeds])
    rows = [row for both in pairs for row in both]
    results = ROOT / "experiments/results"
    draw(results / "budget.png", rows, args.epsilon)
    write_json(results / "budget.json", {
        "command": "python experiments/budget.py --model stories260K --domain ... --general ... "
                   f"--steps {args.steps} --epsilon {args.epsilon:g} --seeds {' '.join(map(str, args.seeds))}",
        "seeds": args.seeds, "epsilon": args.epsilon, "seconds": time.perf_counter() - began, "rows": rows})
    print(f"\n{table(rows)}\n\nbudget {args.epsilon:g} bits per byte; {time.perf_counter() - began:.0f} s; "
          f"{results}/budget.*")


if __name__ == "__main__":
    sys.exit(main_guard(main))
