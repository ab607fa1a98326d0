"""How much replay: laws of forgetting and of the domain's loss over the share of replay, from a ladder of short runs.

Forgetting follows Bethune's law or the D-CPT law over the share of replay, the domain's loss the CMR law over its own
share (measure/laws.py). A law is believed where it predicts each inner share from the others, and no share is
recommended without one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from core.errors import UserError
from core.files import new_file
from measure import laws
from measure.ladder import Rung, name_troubles

# Below this, forgetting is within the noise between seeds, so that misses are not counted in parts of it.
LEAST = 0.01
# A law holds where it predicts each inner share from the others this well: the error of the forgetting itself, or of
# the loss (arXiv 2502.06042 and 2407.17467, read in their tables).
ERROR_OF_FORGETTING, ERROR_OF_LOSS = 0.2, 0.003
# Tolerances that are shown beside the one asked for.
TOLERANCES = (0.03, 0.05, 0.1)


def share_rungs(shares: list[float]) -> list[Rung]:
    """UserError where too few shares of replay are named for a law to be fitted and judged."""
    shares = sorted(set(shares))
    if len(shares) < 4:
        raise UserError(f"--shares names {len(shares)} share{'s' * (len(shares) != 1)} of replay, and a law of three "
                        f"parameters needs four to be fitted and judged, such as 0 0.05 0.15 0.3")
    if shares[0] > 0.02:
        raise UserError(f"--shares begins at {shares[0]:g}; begin at 0, because without replay the most is forgotten")
    return [Rung(f"share_{share:g}", {"share": share}, ["--data.schedule", "static", "--data.domain-share",
                                                        round(1 - share, 9)]) for share in shares]


@dataclass
class Fitted:
    """A law through the points of a ladder, its draws, and how well it predicts each inner share from the others."""
    x: np.ndarray
    found: laws.Fits
    drawn: laws.Fits
    left_out: list[dict]

    @property
    def law(self) -> laws.Law:
        return self.found.law

    @property
    def holds(self) -> bool:
        return worst_miss(self.left_out) <= 1


def fit_points(known: list[laws.Law], x, y, scale, allowed: Callable) -> Fitted:
    """Of the laws the one that predicts the inner shares best from the others, fitted to all. scale [n]: how far off a
    point may be; allowed: value -> the largest error of a law that holds."""
    left_out = {law.name: laws.predict_left_out(law, x, y, scale) for law in known}
    for row in (row for rows in left_out.values() for row in rows):
        row["allowed"] = allowed(row["measured"])
    law = min(known, key=lambda law: worst_miss(left_out[law.name]))
    for row in left_out[law.name]:
        others = x != row["x"]
        one = laws.fit(law, x[others], y[others], scale[others])
        row["interval"] = laws.predict_runs(one, x[others], scale[others], row["x"], float(scale[~others].mean()))
    found = laws.fit(law, x, y, scale)
    return Fitted(x, found, laws.draw(found, x, scale)[0], left_out[law.name])


def worst_miss(left_out: list[dict]) -> float:
    """The worst error at an inner share, in units of what is allowed; above 1 the law does not hold."""
    return max(abs(row["predicted"] - row["measured"]) / row["allowed"] for row in left_out)


def fit_ladder(rows: list[dict]) -> tuple[Fitted, Fitted]:
    """(the law of the forgetting over the share of replay, that of the domain's loss over the domain's share)."""
    if wrong := next((row for row in rows if row["domain"] is None), None):
        raise UserError(f"the run with {wrong['share']:.1%} of replay {wrong['trouble'][0]}")
    if any(row["forgetting"] is None for row in rows):
        raise UserError("no held-out text of a general source was scored, so forgetting is unknown; pack the general "
                        "source with --heldout 0.05")
    p, forgetting, domain = (np.array([row[key] for row in rows], float) for key in ("share", "forgetting", "domain"))
    scale, n = np.maximum(abs(forgetting), LEAST), len(np.unique(p))
    # Bethune's law is of what is forgotten, and never below zero; a law needs a point more than it has parameters, and
    # another to be left out.
    known = [law for law in (laws.REPLAY, laws.DCPT_SHORT, laws.DCPT)
             if n > law.parameters + (law is laws.DCPT) and not (law is laws.REPLAY and forgetting.min() <= 0)]
    if not known:
        raise UserError("at some shares general text got better than it was, and the law for that has four parameters; "
                        "name at least five --shares")
    general = fit_points(known, p, forgetting, scale,
                         lambda y: max(ERROR_OF_FORGETTING * abs(y), ERROR_OF_LOSS * (1 + y)))
    return general, fit_points([laws.CMR], 1 - p, domain, domain, lambda y: ERROR_OF_LOSS * y)


def choose_share(general: Fitted, domain: Fitted, tolerance: float) -> dict:
    """The smallest share of replay whose forgetting is at most the tolerance: {"tolerance", "share": None where no
    share up to the largest one tried is, "interval" at 95 %, "domain_cost": relative, against no replay}."""
    limit = float(general.x.max())
    share = float(laws.find_share(general.found, tolerance, limit)[0])
    low, high = laws.interval(laws.find_share(general.drawn, tolerance, limit))
    chosen = {"tolerance": tolerance, "share": share if np.isfinite(share) else None,
              "interval": [end if np.isfinite(end) else None for end in (low, high)], "domain_cost": None}
    if np.isfinite(share):
        at, alone = domain.found.predict([1 - share, 1.0])[0]
        chosen["domain_cost"] = float(at / alone - 1)
    return chosen


def judge_ratio(rows: list[dict], tolerance: float) -> dict:
    """What the ladder says: the laws, the shares for some tolerances, the chosen one (None: no law holds, or no share
    that was tried keeps within the tolerance), and notes."""
    general, domain = fit_ladder(rows)
    holds = {"general": general.holds, "domain": domain.holds}
    choices = [choose_share(general, domain, each) for each in sorted({*TOLERANCES, tolerance})]
    own = next(choice for choice in choices if choice["tolerance"] == tolerance)
    notes = []
    if not holds["general"]:
        notes.append(f"no share is recommended: no law fits the forgetting; the best, {general.law.formula}, misses a "
                     f"share that it has not seen by more than {ERROR_OF_FORGETTING:.0%}; longer runs, more seeds or "
                     f"other shares may tell")
    elif own["share"] is None:
        notes.append(f"no share is recommended: at the largest one tried, {general.x.max():.0%}, forgetting is still "
                     f"above {tolerance:.0%}; add larger --shares, or see what else keeps (--forget.*, a lower rate)")
    if not holds["domain"]:
        notes.append(f"the cost to the domain is not sure: {domain.law.formula} misses a share that it has not seen by "
                     f"more than {ERROR_OF_LOSS:.1%}")
    open_ones = laws.find_undetermined(general.drawn)
    if open_ones:
        notes.append("these shares do not determine the law's exponents; between them it predicts all the same, beyond "
                     "them it does not")
    notes += name_troubles(rows)
    chosen = own["share"] if holds["general"] else None
    laws_found = {side: {
        "law": each.law.formula, "holds": holds[side], "parameters": {
            name: float(value[0]) for name, value in each.found.parameters().items()},
        "interval": {name: list(laws.interval(value)) for name, value in each.drawn.parameters().items()},
        "left_out": each.left_out} for side, each in (("general", general), ("domain", domain))}
    return {"tolerance": tolerance, "chosen": None if chosen is None else min(1.0, np.ceil(100 * chosen - 1e-9) / 100),
            "interval": own["interval"], "choices": choices, "laws": laws_found, "notes": notes, "rows": rows,
            "curve": draw_curves(general, domain)}


def draw_curves(general: Fitted, domain: Fitted) -> dict:
    """{"share", and of each side the law and its interval} at 61 shares from none to the largest one tried."""
    share = np.linspace(0, general.x.max(), 61)
    curves = {"share": share.tolist()}
    for side, each, x in (("general", general, share), ("domain", domain, 1 - share)):
        low, high = zip(*map(laws.interval, each.drawn.predict(x).T))
        curves[side] = {"law": each.found.predict(x)[0].tolist(), "low": list(low), "high": list(high)}
    return curves


def describe_ratio(found: dict) -> str:
    def ends(interval, form):
        return " to ".join("beyond" if end is None else form.format(end) for end in interval)
    heads = "replay", "forgetting", "by the others, 95 %", "domain", "by the others, 95 %"
    lines = ["", "{:>8} {:>11} {:>27} {:>8} {:>25}".format(*heads)]
    guess = {side: {round(row["x"] if side == "general" else 1 - row["x"], 9): row
                    for row in found["laws"][side]["left_out"]} for side in ("general", "domain")}
    for row in found["rows"]:
        cells = []
        for side, form in (("general", "{:+.1%}"), ("domain", "{:.4f}")):
            other = guess[side].get(round(row["share"], 9))
            cells.append(f"{form.format(other['predicted'])} ({ends(other['interval'], form)})" if other else "")
        lines.append(f"{row['share']:>8.1%} {row['forgetting']:>+11.1%} {cells[0]:>27} {row['domain']:>8.4f} "
                     f"{cells[1]:>25}")
    lines.append("")
    for side, words in (("general", "forgetting over the share p of replay"), ("domain", "domain over its share R")):
        law = found["laws"][side]
        values = ", ".join(f"{name} {value:.3g}" for name, value in law["parameters"].items())
        lines.append(f"{words}: {law['law']}, {values}; {'holds' if law['holds'] else 'does NOT hold'}")
    lines += ["", f"{'forgetting at most':>19} {'replay':>8} {'95 %':>18} {'cost to the domain':>19}"]
    for choice in found["choices"]:
        known = choice["share"] is not None
        lines.append(f"{choice['tolerance']:>19.0%} {choice['share'] if known else float('nan'):>8.1%} "
                     f"{ends(choice['interval'], '{:.1%}'):>18} "
                     f"{choice['domain_cost'] if known else float('nan'):>+19.1%}".replace("+nan%", "   -").replace(
                         "nan%", "   -"))
    lines += ["", *found["notes"]]
    if found["chosen"] is not None:
        lines.append(f"take {found['chosen']:.0%} of replay for {found['tolerance']:.0%} of forgetting (95 %: "
                     f"{ends(found['interval'], '{:.1%}')}); a longer run forgets more: repeat the ladder with more "
                     f"--steps where that matters")
    return "\n".join(lines)


def draw_ratio(found: dict, path: Path) -> None:
    """The measured points, the laws and their intervals; left forgetting, right the domain."""
    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=120)
    share = 100 * np.array(found["curve"]["share"])
    names = {"general": "forgetting: rise of general bits per byte, %", "domain": "domain, bits per byte"}
    for axes, (side, name), factor in zip(figure.subplots(1, 2), names.items(), (100, 1)):
        key = "forgetting" if side == "general" else "domain"
        curve = {name: factor * np.array(values) for name, values in found["curve"][side].items()}
        axes.fill_between(share, curve["low"], curve["high"], alpha=0.2, linewidth=0, label="95 % of the law")
        axes.plot(share, curve["law"], label=found["laws"][side]["law"])
        axes.plot([100 * row["share"] for row in found["rows"]], [factor * row[key] for row in found["rows"]], "ko",
                  markersize=4, label="runs")
        measured = [factor * row[key] for row in found["rows"]]
        room = 0.15 * (max(measured) - min(measured))
        axes.set_ylim(min(measured) - room, max(measured) + room)
        axes.set(xlabel="share of replay, %", ylabel=name)
        if side == "general":
            axes.axhline(100 * found["tolerance"], color="grey", linestyle="--", linewidth=0.8, label="tolerance")
        if found["chosen"] is not None:
            axes.axvline(100 * found["chosen"], color="C3", linewidth=0.8, label=f"chosen: {found['chosen']:.0%}")
        axes.legend(frameon=False, fontsize=8)
    with new_file(path, "wb") as file:
        figure.savefig(file, format="png")
