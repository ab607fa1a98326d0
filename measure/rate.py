"""Which learning rate: a quarter of the recommended one, itself and four times it, in short runs, and a parabola.

The parabola goes through the runs' results over the logarithm of the rate. Where its lowest point lies within the rates
that were tried, that is the rate to take; else the best is at an edge, and that is said.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import hf
from core.errors import UserError
from core.files import new_file
from learn.schedules import SCRATCH, recommended
from measure.ladder import Rung, describe_row, name_troubles
from model import Model
from train import Config

FACTORS = (0.25, 1, 4)


def recommend_rate(c: Config) -> float:
    """The recommended peak rate for the size of the recipe's model and the part of it that trains."""
    if c.model.init == "scratch" or not c.model.path:
        return SCRATCH
    with torch.device("meta"):
        parameters = Model(hf.open_base(c.model.path).config).count_parameters()
    return recommended(parameters, "lora" if c.lora.rank else "full")[0]


def rate_settings(c: Config, rate: float) -> dict[str, float]:
    """{setting of optim: value} for a peak rate: the other rates keep their parts of it."""
    part = rate / c.optim.lr if c.optim.lr else 1.0
    values = {"lr": rate, "min_lr": c.optim.min_lr * part}
    return values | ({"constant_lr": c.optim.constant_lr * part} if c.optim.constant_lr else {})


def rate_rungs(c: Config, rates: list[float]) -> list[Rung]:
    rates = sorted({float(f"{rate:.4g}") for rate in rates})
    if len(rates) < 3:
        raise UserError(f"--rates names {len(rates)} rate{'s' * (len(rates) != 1)}, and a parabola needs three")
    return [Rung(f"rate_{rate:g}", {"rate": rate}, [
        word for key, value in rate_settings(c, rate).items() for word in (f"--optim.{key.replace('_', '-')}", value)])
        for rate in rates]


def judge_rate(rows: list[dict]) -> dict:
    """What the ladder says: {"by": the value that is compared, "chosen": the rate to take, "edge": "low", "high" or
    None, "vertex", "parabola": its coefficients over log2 of the rate, "notes", "rows"}.

    Compared is the overall score, domain gain less forgetting beyond 5 %, where general text was scored, else the
    domain's bits per byte.
    """
    # Where one seed diverges, a long run may.
    spoiled = {row["rate"] for row in rows if row["domain"] is None}
    known = [row for row in rows if row["rate"] not in spoiled]
    if not known:
        rows = [row for row in rows if row["domain"] is None]
        raise UserError(f"all runs diverged, {describe_row(rows[0]).partition(':')[0]} first: {rows[0]['trouble'][0]}; "
                        f"name lower --rates")
    by = "score" if all(row["score"] is not None for row in known) else "domain"
    # Less is better.
    points = {rate: float(np.mean([-row[by] if by == "score" else row[by] for row in known if row["rate"] == rate]))
              for rate in sorted({row["rate"] for row in known})}
    found = {"by": by, "edge": None, "vertex": None, "parabola": None, "notes": [], "rows": rows, "values": points}
    best = min(points, key=points.get)
    if len(points) >= 3:
        place(found, points, best)
    else:
        found |= {"chosen": best}
        found["notes"].append(f"only {len(points)} of the rates trained, so there is no parabola: the better one is "
                              f"taken; try rates around it")
    found["notes"] += name_troubles(rows)
    return found


def place(found: dict, points: dict[float, float], best: float) -> None:
    """Put the lowest point of the parabola through the best rate and its two neighbours into `found`, or its edge."""
    rates = list(points)
    middle = min(max(rates.index(best), 1), len(rates) - 2)
    three = rates[middle - 1:middle + 2]
    bend, slope, level = np.polyfit(np.log2(three), [points[rate] for rate in three], 2)
    found["parabola"] = [float(bend), float(slope), float(level)]
    inside = bend > 0 and np.log2(rates[0]) < -slope / (2 * bend) < np.log2(rates[-1])
    if bend > 0:
        found["vertex"] = float(2 ** np.clip(-slope / (2 * bend), -60, 20))
    if inside and best not in (rates[0], rates[-1]):
        found["chosen"] = float(f"{found['vertex']:.2g}")
        return
    found["chosen"], found["edge"] = best, "low" if best == rates[0] else "high" if best == rates[-1] else None
    if found["edge"]:
        beyond = best / 4 if found["edge"] == "low" else best * 4
        found["notes"].append(f"warning: the best rate tried, {best:g}, is the {found['edge']}est: the best one may "
                              f"lie beyond it; try --rates {beyond:g} {' '.join(f'{rate:g}' for rate in rates)}")


def describe_rate(found: dict) -> str:
    lines = ["", f"{'rate':>10} {'seed':>5} {'domain':>8} {'gain':>7} {'forgetting':>11} {'score':>7}  trouble"]
    for row in found["rows"]:
        cells = ["-" if row[key] is None else form.format(row[key]) for key, form in (
            ("domain", "{:.4f}"), ("gain", "{:.1%}"), ("forgetting", "{:+.1%}"), ("score", "{:.3f}"))]
        trouble = row["trouble"][0][:60] if row["trouble"] else ""
        trouble += f" and {len(row['trouble']) - 1} more" if row["trouble"][1:] else ""
        lines.append(f"{row['rate']:>10.3g} {row['seed']:>5} {cells[0]:>8} {cells[1]:>7} {cells[2]:>11} {cells[3]:>7}  "
                     f"{trouble}".rstrip())
    by = "overall score, domain gain less forgetting beyond 5 %" if found["by"] == "score" else "domain's bits per byte"
    how = "the parabola's lowest point" if found["chosen"] not in found["values"] else "the best rate tried"
    return "\n".join([*lines, "", *found["notes"], f"take a rate of {found['chosen']:g}: {how}, by the {by}"])


def draw_rate(found: dict, path: Path) -> None:
    """What each rate gave, and the parabola."""
    figure = Figure(figsize=(7, 4), layout="constrained", dpi=120)
    axes, sign = figure.subplots(), -1 if found["by"] == "score" else 1
    rates = list(found["values"])
    known = [row for row in found["rows"] if row["domain"] is not None]
    axes.plot([row["rate"] for row in known], [row[found["by"]] for row in known], "ko", markersize=4, label="runs")
    if found["parabola"]:
        x = np.linspace(np.log2(rates[0]), np.log2(rates[-1]), 100)
        axes.plot(2**x, sign * np.polyval(found["parabola"], x), label="parabola over log rate")
    for rate in sorted({row["rate"] for row in found["rows"] if row["domain"] is None}):
        axes.axvline(rate, color="C1", linestyle=":", label=f"{rate:g} diverged")
    axes.axvline(found["chosen"], color="C3", linewidth=0.8, label=f"chosen: {found['chosen']:g}")
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="overall score, more is better" if sign < 0 else
             "domain, bits per byte")
    axes.legend(frameon=False, fontsize=8)
    with new_file(path, "wb") as file:
        figure.savefig(file, format="png")
