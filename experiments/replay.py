"""How much replay keeps, and what it gives where domain text is scarce.

    python experiments/replay.py --model models/stories260K \\
        --domain law_title16.txt law_title28.txt --general tinystories.txt \\
        --separator '<|endoftext|>' --out out/replay

The law F(p) = F(0) (1 + B p)^-alpha of forgetting over the share p of replay (arXiv 2502.06042) is fitted on two shares
and says what a third would forget: this reads experiments/results/forgetting.json, and trains nothing.

Then 0.1 MB of the domain are read 16 times, alone and beside replay, and held-out text of the domain is scored along
the way. arXiv 2603.04964 finds that the domain gains by the replay there. experiments/results/replay.json has both, and
replay.png beside it draws them.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from forgetting import RESULTS, Study, measure_run, prepare, replay, save_study
from matplotlib.figure import Figure

from core import cli
from core.config import setting
from core.errors import UserError
from core.files import read_json
from measure import laws

# The shares are those of forgetting.json's rows; tokens of a step and of a sequence those of recipes/forgetting.toml.
SHARES = {"replay_5": 0.05, "replay_15": 0.15, "replay": 0.3}
TOKENS_PER_STEP, EVALUATIONS = 8 * 512, 6


@dataclass(kw_only=True)
class Replay(Study):
    domain_bytes: int = setting(100_000, above=0)
    """Text of the domain to train on; the rest is held out."""
    epochs: int = setting(16, above=0, at_most=16)
    """How often it is read."""
    share: float = setting(0.25, above=0, below=1)
    """Share of replay in the mix of the second run, which has as many more steps."""
    out: str = "out/replay"


# ---- the law

def fit_law(shares: tuple[float, float], left: tuple[float, float]) -> tuple[float, float]:
    """(B, alpha) of the law through two points, of shares p < q above 0. left: F(p) / F(0) and F(q) / F(0). UserError
    where none goes through them."""
    found = laws.fit(laws.REPLAY, [0, *shares], [1, *left])
    if found.error[0] > 1e-12:
        raise UserError(f"no law (1 + B p)^-alpha leaves {left[0]:.1%} at a share of {shares[0]:g} and {left[1]:.1%} "
                        f"at {shares[1]:g}")
    return tuple(float(found.parameters()[name][0]) for name in ("B", "alpha"))


def predict(share: float, law: tuple[float, float]) -> float:
    """F(share) / F(0)."""
    return (1 + law[0] * share) ** -law[1]


def judge_law(forgetting: dict[float, float]) -> list[dict]:
    """Each share above 0 predicted from two others. forgetting: {share: what was forgotten}, with the share 0."""
    rows, shares = [], sorted(forgetting.keys() - {0})
    for pair in combinations(shares, 2):
        law = fit_law(pair, tuple(forgetting[share] / forgetting[0] for share in pair))
        for share in (share for share in shares if share not in pair):
            predicted = forgetting[0] * predict(share, law)
            rows.append({"fitted_on": pair, "B": law[0], "alpha": law[1], "share": share, "predicted": predicted,
                         "measured": forgetting[share], "error": predicted / forgetting[share] - 1})
    return rows


def read_forgetting(file: Path) -> dict[float, float]:
    """{share of replay: forgetting} of a file that experiments/forgetting.py wrote."""
    found = {row["method"]: row["forgetting"] for row in read_json(file)["rows"]}
    return {share: found[method] for method, share in ({"domain_only": 0.0} | SHARES).items()}


# ---- scarce text

def measure_scarce(share: float, seed: int, c: Replay, out: Path, tokens: int) -> dict:
    """A run that reads the domain's `tokens` c.epochs times, beside a share of replay."""
    steps = int(tokens * c.epochs / (1 - share) / TOKENS_PER_STEP)
    words = [*replay(share), "--train.steps", steps, "--eval.every", -(-steps // EVALUATIONS), "--eval.tokens", 20_000]
    row, lines = measure_run(f"replay_{share:g}", words, seed, c, out)
    way = [[line["step"] / steps * c.epochs, line["sources"]["domain"]["bits_per_byte"],
            line["sources"]["general"]["bits_per_byte"]] for line in lines if line["kind"] == "eval"]
    return row | {"share": share, "steps": steps, "way": way, "best": min(domain for _, domain, _ in way),
                  "words": " ".join(map(str, words))}


def draw_chart(forgetting: dict[float, float], laws: list[dict], rows: list[dict]) -> Figure:
    """Left the law through each two of the shares; right the domain's bits per byte along the runs on scarce text."""
    figure = Figure(figsize=(10, 4.5), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2)
    shares = np.linspace(0, max(forgetting), 100)
    for i, law in enumerate(laws):
        curve = [100 * forgetting[0] * predict(share, (law["B"], law["alpha"])) for share in shares]
        left.plot(100 * shares, curve, color=f"C{i}", linewidth=1,
                  label=f"through {' and '.join(f'{100 * share:g}' for share in law['fitted_on'])} %: "
                        f"{law['error']:+.0%} at {100 * law['share']:g} %")
    left.plot(*zip(*((100 * share, 100 * forgot) for share, forgot in forgetting.items())), "ko")
    left.set(xlabel="share of replay, %", ylabel="forgetting, %", title="forgotten = F(0) (1 + B p)^-alpha")
    left.legend(frameon=False)
    names = {share: f"{share:.0%} replay" if share else "domain alone" for share in sorted({r["share"] for r in rows})}
    for i, (share, name) in enumerate(names.items()):
        for row in (row for row in rows if row["share"] == share):
            right.plot(*zip(*((epoch, domain) for epoch, domain, _ in row["way"][1:])), color=f"C{i}",
                       label=name if row["seed"] == rows[0]["seed"] else None)
    right.set(xlabel="epochs of the domain's text", ylabel="bits per byte of its held-out text", title="scarce text")
    right.legend(frameon=False)
    return figure


def run_study(c: Replay) -> None:
    began, forgetting = time.perf_counter(), read_forgetting(RESULTS / "forgetting.json")
    laws = judge_law(forgetting)
    for law in laws:
        print(f"fitted on {law['fitted_on']}: B {law['B']:.1f}, alpha {law['alpha']:.2f}; forgetting at "
              f"{law['share']:g} predicted {law['predicted']:.1%}, measured {law['measured']:.1%}, "
              f"{law['error']:+.1%}")
    size = sum(Path(file).stat().st_size for file in c.domain)
    if size <= c.domain_bytes:
        raise UserError(f"--domain has {size:,} bytes, and --domain-bytes {c.domain_bytes:,} leave nothing to hold out")
    out = prepare(c, domain_heldout=round(1 - c.domain_bytes / size, 4))
    train = read_json(out / "shards/domain/manifest.json")["splits"]["train"]
    asked = [(share, seed) for share in (0.0, c.share) for seed in c.seeds]
    with ThreadPoolExecutor(c.jobs) as pool:
        rows = list(pool.map(lambda run: measure_scarce(*run, c, out, train["tokens"]), asked))
    save_study("replay", c.seeds, RESULTS, rows, draw_chart(forgetting, laws, rows), began, law=laws,
               domain={key: train[key] for key in ("documents", "bytes", "tokens")})


if __name__ == "__main__":
    sys.exit(cli.run("replay.py", __doc__, (Replay, run_study)))
