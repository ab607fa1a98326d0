"""Does adaptive replay hold a budget that fixed replay of the same cost breaks?

    python experiments/budget.py --model models/stories260K \\
        --domain law_title16.txt law_title28.txt --general tinystories.txt \\
        --separator '<|endoftext|>' --out out/budget

Each seed is trained twice on the same number of tokens and evaluated every 10 steps: with the budget policy of
learn/adaptive.py, and with a fixed share of replay equal to the mean share of the first run.
experiments/results/budget.json has what every evaluation saw, and budget.png beside it draws it.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from forgetting import RESULTS, Study, measure_run, prepare, save_study
from matplotlib.figure import Figure

from core import cli
from core.config import setting

# The rate rises over a tenth of the run and falls to a fiftieth: what must be replayed falls with it.
RATES = ["--data.schedule", "static", "--eval.every", 10, "--eval.tokens", 20_000, "--log.every", 10,
         "--optim.warmup-ratio", 0.1, "--optim.min-lr", 2e-5]


@dataclass(kw_only=True)
class Budget(Study):
    steps: int = setting(200, above=0)
    epsilon: float = setting(0.1, above=0)
    """The budget: bits per byte that general text may lose."""
    out: str = "out/budget"


def measure_loss(method: str, words: list, seed: int, c: Budget, out: Path) -> dict:
    """One run: what general text lost at each evaluation, and what it cost."""
    row, lines = measure_run(method, [*RATES, *words], seed, c, out)
    general = {line["step"]: line["sources"]["general"]["bits_per_byte"] for line in lines if line["kind"] == "eval"}
    steps, rises = list(general), [bits - general[0] for bits in general.values()]
    # The log has the mean share up to a step; what was spent in each interval is the difference of two sums.
    shares = {0: 0.0} | {line["step"]: line["replay_share"] for line in lines if line["kind"] == "train"}
    spent = (np.diff([shares[step] * step for step in steps]) / np.diff(steps)).tolist()
    row |= {"worst_rise": max(rises), "last_rise": rises[-1],
            "evaluations_over": sum(rise > c.epsilon for rise in rises), "evaluations": len(rises) - 1,
            "steps": steps, "rises": rises, "replay_shares": spent, "words": " ".join(map(str, words))}
    print(f"{method:14} seed {seed}: replay {row['replay_share']:.1%}, general bits per byte at worst "
          f"{row['worst_rise']:+.4f}, over the budget in {row['evaluations_over']} of {row['evaluations']}, at the end "
          f"{row['last_rise']:+.4f}", flush=True)
    return row


def measure_pair(seed: int, c: Budget, out: Path) -> list[dict]:
    """Two runs: with the budget policy, which starts at the highest share of replay, and with its mean share, fixed."""
    words = ["--data.domain-share", 0.4, "--forget.adaptive.policy", "budget", "--forget.adaptive.start", 0.6,
             "--forget.adaptive.epsilon", c.epsilon]
    first = measure_loss("adaptive", words, seed, c, out)
    fixed = ["--data.domain-share", 1 - first["replay_share"]]
    return [first, measure_loss("fixed", fixed, seed, c, out)]


def draw_chart(rows: list[dict], epsilon: float) -> Figure:
    """What general text lost, and below it the share of replay, over the steps; a line per run."""
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
    return figure


def run_study(c: Budget) -> None:
    began, out = time.perf_counter(), prepare(c)
    with ThreadPoolExecutor(c.jobs) as pool:
        rows = list(chain(*pool.map(lambda seed: measure_pair(seed, c, out), c.seeds)))
    print(f"the budget was {c.epsilon:g} bits per byte")
    save_study("budget", c.seeds, RESULTS, rows, draw_chart(rows, c.epsilon), began, epsilon=c.epsilon)


if __name__ == "__main__":
    sys.exit(cli.run("budget.py", __doc__, (Budget, run_study)))
