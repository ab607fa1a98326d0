"""How does the loss fall with the size of a model, and which size is best for a given compute?

    python experiments/scaling.py --text tinystories.txt --separator '<|endoftext|>' --out out/scaling

Models of --sizes are trained from scratch on the same tokens, --seeds times each, by recipes/scratch.toml. The law
L(N) = (N_c / N)^alpha + L_inf is fitted to their last held-out losses, N without the embedding (power_law.py says how,
and judges the fit). L_inf is the loss of an endless model after these tokens, not of one that has also read endlessly.

Compute is counted in floating-point operations of the matmuls, head and attention included. The rate is constant after
the warm-up, so that the losses along a run, up to its last fall, are those of shorter runs: where the line of a larger
model passes below that of a smaller one, the best size changes. Full size: recipes/scratch_full.toml says how.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parent))

import scratch
from forgetting import save_study
from power_law import judge, predict_largest
from scratch import RESULTS, SIZES, Scratch, choose_results  # noqa: F401

import hf
import tokenizer as tokenizers
from core import cli
from core.config import read_toml, setting
from core.errors import UserError
from model import matmul_flops_per_token

# What guides give as held-out perplexity after 10,000 steps, and the range of alpha that is expected: to check against.
EXPECTED_PERPLEXITY = {"25M": 42.3, "50M": 35.7, "100M": 28.1}
EXPECTED_ALPHA = (0.35, 0.40)
# The rate is constant from the end of the warm-up to the last fall; evaluations within are points of the curves.
WARMUP, DECAY, POINTS = 0.05, 0.25, 12


@dataclass(kw_only=True)
class Scaling(Scratch):
    sizes: list[Literal[*SIZES]] = setting(["25K", "83K", "0.2M", "0.55M", "1.5M"])
    """Parameters without the embedding."""
    batch_size: int | None = setting(2, above=0)
    """Sequences of a step. At 8 models of these sizes are 0.2 to 0.55 nats worse after the same tokens."""
    out: str = "out/scaling"


def measure(size: str, seed: int, c: Scaling, steps: int, out: Path) -> dict:
    """One run: its last losses, and the curve [(floating-point operations, nats per token)] at the constant rate."""
    began, folder = time.perf_counter(), out / f"runs/{size}_{seed}"
    scores, lines = scratch.train_model(c, folder, out / "tokenizer", [
        *scratch.size_words(size), "--data.sources.text.path", out / "shards", "--train.steps", steps,
        "--optim.warmup-ratio", WARMUP, "--optim.decay-ratio", DECAY, "--eval.every", max(1, steps // POINTS),
        *scratch.batch_words(c)], seed)
    last, start = scores["text"], next(line for line in lines if line["kind"] == "start")
    context = read_toml(folder / "config.toml")["data"]["context"]
    per_step = matmul_flops_per_token(hf.open_base(folder / "final").config, context) * start["tokens_per_step"]
    curve = [(line["step"] * per_step, line["sources"]["text"]["nats_per_token"]) for line in lines
             if line["kind"] == "eval" and WARMUP * steps <= line["step"] <= (1 - DECAY) * steps]
    row = {"size": size, "seed": seed, "parameters": scratch.count_block_parameters(size), "steps": steps,
           "tokens": steps * start["tokens_per_step"], "flops": steps * per_step, "loss": last["nats_per_token"],
           "perplexity": last["perplexity"], "bits_per_byte": last["bits_per_byte"], "curve": curve,
           "seconds": time.perf_counter() - began}
    print(f"{size:>6} seed {seed}: loss {row['loss']:.4f} nats per token, {row['bits_per_byte']:.4f} bits per byte, "
          f"{row['flops']:.2e} operations, {row['seconds']:.0f} s", flush=True)
    return row


# ---- the compute-optimal line

def find_changes(curves: dict[float, list]) -> list[dict]:
    """Where the best size changes: {"flops", "parameters" (the geometric mean of both sizes), "loss"} of each point at
    which the curve of a larger model passes below the best so far, while both go on.

    curves: {N: [(C, loss)]}, C rising. Losses are interpolated on a line in log C.
    """
    grid = np.geomspace(min(curve[0][0] for curve in curves.values()),
                        max(curve[-1][0] for curve in curves.values()), 4000)
    sizes = sorted(curves)
    losses = np.stack([np.interp(np.log(grid), *zip(*((np.log(C), loss) for C, loss in curves[N])), left=np.inf,
                                 right=np.inf) for N in sizes])
    covered = np.isfinite(losses).any(0)
    best, changes = losses.argmin(0), []
    for k in np.flatnonzero(np.diff(best)):
        old, new = best[k], best[k + 1]
        # Where a curve ends, the next one is the best that is left: no crossing was seen.
        if covered[k] and covered[k + 1] and new > old and np.isfinite(losses[old, k + 1]) and \
                np.isfinite(losses[new, k]):
            changes.append({"flops": float(grid[k]), "parameters": float(np.sqrt(sizes[old] * sizes[new])),
                            "loss": float(losses[new, k + 1])})
    return changes


def fit_line(changes: list[dict]) -> tuple[float, float] | None:
    """(a, k) of N_opt = k C^a by least squares in logarithms; None for fewer than three points."""
    if len(changes) < 3:
        return None
    a, log_k = np.polyfit(np.log([c["flops"] for c in changes]), np.log([c["parameters"] for c in changes]), 1)
    return float(a), float(np.exp(log_k))


def curves_of(rows: list[dict]) -> dict[float, list]:
    """{N: [(C, mean loss)]} over the seeds, which have their points at the same compute."""
    curves = {}
    for N in sorted({row["parameters"] for row in rows}):
        same = [row["curve"] for row in rows if row["parameters"] == N]
        curves[N] = [(points[0][0], mean(loss for _, loss in points)) for points in zip(*same)]
    return curves


def find_optimum(rows: list[dict]) -> dict:
    """The changes of the mean curves, the exponent of N_opt(C), and that of each seed alone."""
    changes = find_changes(curves_of(rows))
    line = fit_line(changes)
    alone = [fit_line(find_changes(curves_of([row for row in rows if row["seed"] == seed])))
             for seed in sorted({row["seed"] for row in rows})]
    return {"changes": changes, "exponent": line and line[0], "factor": line and line[1],
            "exponent_by_seed": [one and one[0] for one in alone]}


# ---- what it shows

def describe(rows: list[dict], law: dict, unseen: dict | None, optimum: dict) -> str:
    """A paragraph that is true of any result."""
    low, high = law["alpha_interval"]
    sizes = sorted({row["parameters"] for row in rows})
    words = [f"{len(sizes)} sizes, {sizes[0]:,} to {sizes[-1]:,} parameters, read {rows[0]['tokens']:,} tokens each."]
    fitted = (f"alpha {law['alpha']:.3f} (95 %: {low:.3f} to {high:.3f}), L_inf {law['L_inf']:.3f} nats per token "
              f"({law['L_inf_interval'][0]:.3f} to {law['L_inf_interval'][1]:.3f}), R^2 {law['r2']:.4f}, residuals "
              f"{law['residual_sd']:.4f} nats")
    if law["noise_sd"] is not None:
        fitted += f" where runs of one size differ by {law['noise_sd']:.4f}"
    words.append({
        "fits": f"A power law with a floor fits: {fitted}.",
        "undetermined": f"The losses fall with the size, but these points leave the law open: {fitted}.",
        "misfit": f"No power law with a floor fits: its best misses the mean loss of a size by up to "
                  f"{law['worst_miss']:.4f} nats ({fitted}).",
        "no trend": "The losses do not fall with the size beyond the noise, so no law was found."}[law["verdict"]])
    if law["verdict"] in ("fits", "undetermined"):
        meets = low <= EXPECTED_ALPHA[1] and high >= EXPECTED_ALPHA[0]
        words.append(f"The interval of alpha {'meets' if meets else 'lies outside'} the expected {EXPECTED_ALPHA[0]:g} "
                     f"to {EXPECTED_ALPHA[1]:g}, which is for larger models and more tokens.")
        if unseen:
            inside = unseen["interval"][0] <= unseen["measured"] <= unseen["interval"][1]
            words.append(f"Fitted without the largest size, it says {unseen['predicted']:.3f} for it "
                         f"({unseen['interval'][0]:.3f} to {unseen['interval'][1]:.3f}), and {unseen['measured']:.3f} "
                         f"was measured, {'inside' if inside else 'outside'} that interval.")
    changes = optimum["changes"]
    if optimum["exponent"] is not None:
        seeds = [one for one in optimum["exponent_by_seed"] if one is not None]
        spread = f" (seeds alone: {min(seeds):.2f} to {max(seeds):.2f})" if seeds else ""
        words.append(f"The best size changed {len(changes)} times between {changes[0]['flops']:.1e} and "
                     f"{changes[-1]['flops']:.1e} operations, as N_opt ~ C^{optimum['exponent']:.2f}{spread}; "
                     f"Chinchilla has about 0.5.")
    elif changes:
        words.append(f"The best size changed {len(changes)} times within these runs, too few for a compute-optimal "
                     f"line.")
    else:
        words.append("No larger model passed a smaller one at equal compute while both went on: these runs are too "
                     "short for a compute-optimal line.")
    return " ".join(words)


def draw_chart(rows: list[dict], law: dict, optimum: dict) -> Figure:
    """Left: last losses and the law. Right: loss against compute, and where the best size changes."""
    figure = Figure(figsize=(11, 4.4), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    N = np.array([row["parameters"] for row in rows])
    left.scatter(N, [row["loss"] for row in rows], s=18, zorder=3, label="runs")
    if law["verdict"] != "no trend":
        line = np.geomspace(N.min(), N.max(), 100)
        # In the form that does not overflow where alpha is small.
        left.plot(line, np.exp(law["alpha"] * (np.log(law["N_c"]) - np.log(line))) + law["L_inf"], color="grey",
                  label=f"alpha {law['alpha']:.3f}: {law['verdict']}")
    left.set(xscale="log", xlabel="parameters without the embedding", ylabel="held-out nats per token",
             title="after the same tokens")
    left.legend(frameon=False)
    for i, (size, curve) in enumerate(curves_of(rows).items()):
        right.plot(*zip(*curve), color=f"C{i}", marker=".", label=f"{size:,.0f}")
    right.plot([c["flops"] for c in optimum["changes"]], [c["loss"] for c in optimum["changes"]], "k*", markersize=9,
               linestyle="none", label="the best size changes")
    right.set(xscale="log", xlabel="floating-point operations", title="along the runs, at the constant rate")
    right.legend(frameon=False, fontsize=8)
    return figure


def summarise(rows: list[dict]) -> list[dict]:
    """A row per size: means over the seeds, the spread of the losses, and what the guides give."""
    table = []
    for size in dict.fromkeys(row["size"] for row in rows):
        same = [row for row in rows if row["size"] == size]
        losses = [row["loss"] for row in same]
        table.append({key: mean(row[key] for row in same) for key in
                      ("parameters", "loss", "perplexity", "bits_per_byte", "flops", "seconds")}
                     | {"size": size, "spread": max(losses) - min(losses), "expected": EXPECTED_PERPLEXITY.get(size)})
    return table


COLUMNS = {"size": ("size", ""), "parameters": ("parameters", ",.0f"), "nats per token": ("loss", ".4f"),
           "between seeds": ("spread", ".4f"), "bits per byte": ("bits_per_byte", ".4f"),
           "perplexity": ("perplexity", ".2f"), "expected": ("expected", ".1f"), "operations": ("flops", ".2e"),
           "seconds": ("seconds", ".0f")}


def run_study(c: Scaling) -> dict:
    if len(set(c.sizes)) < 4:
        raise UserError(f"--sizes has {len(set(c.sizes))} sizes, and a law of three parameters needs four or more")
    began, out = time.perf_counter(), scratch.make_folder(c)
    texts = scratch.read_text(c.text, c.separator)
    tokenizers.train(texts, "bpe", c.vocab_size, out / "tokenizer")
    steps = scratch.count_steps(c, scratch.pack_text(texts, out / "shards", out / "tokenizer"))
    # The largest first, so that the last runs to end are short ones.
    sizes = sorted(set(c.sizes), key=scratch.count_block_parameters, reverse=True)
    asked = [(size, seed, c, steps, out) for size in sizes for seed in c.seeds]
    rows = sorted(scratch.run_all(c.jobs, measure, asked), key=lambda row: (row["parameters"], row["seed"]))
    N, losses = [row["parameters"] for row in rows], [row["loss"] for row in rows]
    law, unseen, optimum = judge(N, losses), predict_largest(N, losses), find_optimum(rows)
    shows = describe(rows, law, unseen, optimum)
    print(f"\n{scratch.format_table(summarise(rows), COLUMNS)}\n\n{shows}")
    folder = choose_results(c, out, "out", "jobs", "separator")
    save_study("scaling", c.seeds, folder, rows, draw_chart(rows, law, optimum), began, law=law, unseen=unseen,
               optimum=optimum, shows=shows)
    return {"law": law, "unseen": unseen, "optimum": optimum, "rows": rows}


if __name__ == "__main__":
    sys.exit(cli.run("experiments/scaling.py", __doc__, (Scaling, run_study)))
