"""The charts of report.py: the curves of one run, and several runs beside each other, as inline SVG.

A colour in a picture is a variable of the page's style sheet, so that one picture serves light and dark pages. Text in
the pictures stays text, and nothing is loaded from anywhere.

A run is report.py's Run. Values that a file does not have, or that are no finite numbers, are left out of a curve.
"""

import io
import re
from itertools import pairwise

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from measure.verdict import UNITS, finite, mean

# The style sheet of report.html.j2 says what each of these colours is on a light and on a dark page.
DOMAIN, GENERAL = ["d0", "d1", "d2", "d3"], ["g0", "g1", "g2", "g3", "g4", "g5", "g6"]     # warm; cool
COLOURS = ["page", "card", "ink", "muted", "line", "good", "warning", "bad", *DOMAIN, *GENERAL]
RUNS = ["g0", "d0", "g1", "g2", "d1", "d2", "g3", "g5"]
# What matplotlib draws instead: values that nothing else has, so that clean_svg finds them again.
HEX = {name: f"#0000{i:02x}" for i, name in enumerate(COLOURS, 1)}

STYLE = {
    "svg.fonttype": "none", "font.size": 8, "axes.edgecolor": HEX["line"], "axes.labelcolor": HEX["muted"],
    "xtick.color": HEX["muted"], "ytick.color": HEX["muted"], "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "axes.axisbelow": True, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": HEX["line"], "grid.linewidth": 0.7, "xtick.major.size": 0, "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}
DASHED, DOTTED = (0, (4, 3)), (0, (1, 1.7))
# (class in the page's style sheet, width and height in inches)
HALF, THIRD, FULL = ("half", (5.2, 2.9)), ("third", (3.45, 2.1)), ("full", (10.7, 2.5))

SIZES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


# ---- values as text

def decimal(value, digits: int = 3) -> str:
    """1234.5 -> '1,234.500'; a dash where the value is unknown."""
    value = finite(value)
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def short(value) -> str:
    """4194304 -> '4.19M'; below ten thousand a value keeps its digits; a dash where it is unknown."""
    value = finite(value)
    if value is None:
        return "–"
    if abs(value) >= 1e4:
        size, letter = next(pair for pair in SIZES if abs(value) >= pair[0])
        return f"{value / size:#.3g}".rstrip(".") + letter
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.3g}"


def tick_text(value, _position=None) -> str:
    """A label of an axis: 20000 -> '20k', 0.00002 -> '2e-5'."""
    size, letter = next(((size, letter) for size, letter in SIZES if abs(value) >= max(size, 1e4)), (1, ""))
    return f"{value / size:.4g}{letter}".replace("e-0", "e-").replace("-", "−")


# ---- a run's files as arrays

def series(rows: list, value) -> tuple:
    """(steps, values) as arrays: `value(row)` of those rows where it is a finite number."""
    values = np.array([finite(value(row)) for row in rows], float)
    known = np.isfinite(values)
    return np.array([row["step"] for row in rows], float)[known], values[known]


def series_by_source(run, rows: list, column: str) -> dict:
    """{source: (steps, values)} of the sources that have any value of this column."""
    found = {name: series(rows, lambda row, name=name: row["sources"].get(name, {}).get(column))
             for name in run.sources}
    return {name: curve for name, curve in found.items() if len(curve[0])}


def thin(x, y, points: int) -> tuple:
    """At most about `points` of a curve: the lowest and the highest of each stretch, so that a spike survives."""
    if len(x) <= points:
        return x, y
    edges = np.linspace(0, len(x), points // 2 + 1).astype(int)
    keep = {0, len(x) - 1}
    for start, end in pairwise(edges):
        keep |= {start + int(np.argmin(y[start:end])), start + int(np.argmax(y[start:end]))}
    keep = sorted(keep)
    return x[keep], y[keep]


def spread(n: int, points: int):
    """At most `points` of the indices 0 to n - 1, evenly spread, with both ends."""
    return np.unique(np.linspace(0, n - 1, min(points, n)).astype(int))


def smooth(y):
    """Centred moving mean over a twentieth of the curve; near its ends, the mean of the part that exists.

    Example: 40 values give windows of three: [v0 + v1, v0 + v1 + v2, ...] divided by [2, 3, ...].
    """
    position, half = np.arange(len(y)), len(y) // 40
    total = np.concatenate([[0], np.cumsum(y)])
    low, high = np.maximum(position - half, 0), np.minimum(position + half + 1, len(y))
    return (total[high] - total[low]) / (high - low)


# ---- pieces of a chart

def colour_of_run(index: int) -> str:
    """The colour's name of the run at this place of a comparison."""
    return RUNS[index % len(RUNS)]


def make_axes(size, x_name: str = "step", end: float | None = None):
    """(figure, its one pair of axes) of `size`; x runs from 0 to `end` where that is given."""
    figure = Figure(figsize=size[1], layout="constrained")
    axes = figure.add_subplot()
    for patch in (figure.patch, axes.patch):
        patch.set_alpha(0)
    axes.xaxis.set_major_locator(MaxNLocator(4 if size is THIRD else 6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(tick_text))
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes.set_xlabel(x_name)
    axes.margins(x=0.015)
    if end:
        axes.set_xlim(-0.015 * end, 1.015 * end)
    return figure, axes


def make_chart(figure, size, title: str, caption: str, key: list) -> dict:
    """What the page needs to show a figure; `key` is its legend, [(colour's name, text)]."""
    return {"figure": figure, "size": size[0], "title": title, "caption": caption, "key": key}


def to_svg(charts: list, salt: str) -> list:
    """Replace each chart's figure by a small inline <svg>; charts that are None are left out.

    `salt` makes the ids inside a picture differ from those of all other pictures on the page.
    """
    charts = [chart for chart in charts if chart]
    for i, chart in enumerate(charts):
        out = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": f"{salt}-{i}"}):
            chart.pop("figure").savefig(out, format="svg", metadata={"Date": None})
        chart["svg"] = Markup(clean_svg(out.getvalue()))
    return charts


def clean_svg(text: str) -> str:
    """matplotlib's SVG file as an element of a page: no header, style or unused ids; two decimals; our colours."""
    text = text[text.index("<svg"):].replace("xlink:href", "href")
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text, count=1)
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)

    def shorten(match):
        return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), match[0])

    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', shorten, text)
    for name, value in HEX.items():
        text = text.replace(value, f"var(--{name})")
    return re.sub(r"\s*\n\s*", "\n", text)


def draw_curve(axes, x, y, colour: str, points: int, smoothed: bool = False, raw: bool = True) -> None:
    """Few points get markers; many noisy ones a moving mean, over the faint curve as it was logged if `raw`."""
    if not smoothed or len(x) < 40:
        marks = {"marker": "o", "markersize": 3.2} if len(x) <= 30 else {}
        axes.plot(*thin(x, y, points), color=HEX[colour], linewidth=1.6, **marks)
        return
    if raw:
        faint = 0.28 if len(x) <= points else 0.14
        axes.plot(*thin(x, y, points), color=HEX[colour], linewidth=0.6, alpha=faint)
    keep = spread(len(x), points // 2)
    axes.plot(x[keep], smooth(y)[keep], color=HEX[colour], linewidth=1.6)


def use_log_if_spiky(axes, y) -> str:
    """Make y logarithmic where one spike would flatten all else; returns what the caption then has to add."""
    if y.min() <= 0 or y.max() <= 12 * np.median(y):
        return ""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    return ", logarithmic"


# ---- charts of one run

@matplotlib.rc_context(STYLE)
def draw_run(run, points: int, salt: str) -> list:
    """Charts of one run, with at most about `points` points per curve: dicts of svg, title, caption, size and key."""
    return to_svg([
        chart_evaluations(run, points), chart_loss(run, points), chart_mix(run, points),
        chart_column(run, points, "lr", "Learning rate", "Learning rate by step, no unit"),
        chart_column(run, points, "grad_norm", "Gradient norm", "Norm of the gradient before clipping, no unit"),
        chart_column(run, points, "tokens_per_second", "Throughput", "Tokens per second"),
    ], salt)


def chart_evaluations(run, points: int) -> dict | None:
    """The held-out score of each source, and the base model's as a dashed line."""
    curves = series_by_source(run, run.evals, run.metric)
    if not curves:
        return None
    figure, axes = make_axes(HALF, end=run.step)
    for name, (x, y) in curves.items():
        base = finite(run.before.get(name, {}).get(run.metric))
        if base is not None:
            axes.axhline(base, color=HEX[run.colours[name]], linewidth=0.9, linestyle=DASHED, alpha=0.6)
        draw_curve(axes, x, y, run.colours[name], points)
    unit = UNITS[run.metric]
    caption = f"{unit.capitalize()} by step, lower is better" + ("; dashed: the base model." if run.before else ".")
    return make_chart(figure, HALF, f"Held-out {unit}", caption, [(run.colours[name], name) for name in curves])


def chart_loss(run, points: int) -> dict | None:
    """The training loss of each source; the loss of all together where the log has none by source."""
    curves = series_by_source(run, run.train, "loss")
    key = [(run.colours[name], name) for name in curves]
    if not curves:
        curves, key = {"": series(run.train, lambda row: row.get("loss"))}, [("muted", "all sources")]
    if not any(len(x) for x, _ in curves.values()):
        return None
    figure, axes = make_axes(HALF, end=run.step)
    for name, (x, y) in curves.items():
        draw_curve(axes, x, y, run.colours.get(name, "muted"), points, smoothed=True)
    resumed = [row["step"] for row in run.events if row["kind"] == "resume" and finite(row.get("step")) is not None]
    for step in resumed:
        axes.axvline(step, color=HEX["muted"], linewidth=0.8, linestyle=DOTTED)
    unit = "Nats per token" if run.metric == "bits_per_byte" else UNITS[run.metric].capitalize()
    caption = f"{unit} by step" + use_log_if_spiky(axes, np.concatenate([y for _, y in curves.values()]))
    caption += "; faint: as logged, solid: moving mean" if max(len(x) for x, _ in curves.values()) >= 40 else ""
    caption += "; dotted vertical line: resumed from there" if resumed else ""
    return make_chart(figure, HALF, "Training loss", caption + ".", key)


def chart_mix(run, points: int) -> dict | None:
    """Each source's share of the tokens so far, domain at the bottom, and the share that the schedule asked for.

    A log line without a source means that the source was not read since: it keeps its last count.
    """
    curves = series_by_source(run, run.train, "tokens")
    steps = np.array([row["step"] for row in run.train], float)[spread(len(run.train), points // 3)]
    counts = np.array([np.concatenate([[0], y])[np.searchsorted(x, steps, side="right")] for x, y in curves.values()])
    if not counts.sum():
        return None
    begun = counts.sum(axis=0) > 0
    steps, counts = steps[begun], counts[:, begun]
    if len(steps) == 1:
        # One line was logged so far: draw its shares as constant since step 0.
        steps, counts = np.array([0, steps[0]]), np.repeat(counts, 2, axis=1)
    figure, axes = make_axes(FULL, end=run.step)
    axes.stackplot(steps, counts / counts.sum(axis=0) * 100, colors=[HEX[run.colours[name]] for name in curves],
                   alpha=0.62, linewidth=0)
    caption = "Share of all tokens trained so far, in per cent, by step"
    x, wanted = series(run.train, lambda row: row.get("domain_share"))
    if len(x):
        mean_so_far, keep = np.cumsum(wanted) / np.arange(1, len(x) + 1), spread(len(x), points // 2)
        axes.plot(x[keep], wanted[keep] * 100, color=HEX["ink"], linewidth=1.2, linestyle=DASHED)
        axes.plot(x[keep], mean_so_far[keep] * 100, color=HEX["ink"], linewidth=1, linestyle=DOTTED)
        caption += "; dashed: the domain share wanted at that step; dotted: its mean so far, which the domain follows"
    axes.set_ylim(0, 100)
    return make_chart(figure, FULL, "Realised mix", caption + ".", [(run.colours[name], name) for name in curves])


def chart_column(run, points: int, column: str, title: str, caption: str) -> dict | None:
    """One value of the training log by step; the learning rate as it is, the others smoothed."""
    x, y = series(run.train, lambda row: row.get(column))
    if not len(x):
        return None
    figure, axes = make_axes(THIRD, end=run.step)
    draw_curve(axes, x, y, "ink" if column == "lr" else "g5", points, smoothed=column != "lr")
    if column == "grad_norm":
        caption += use_log_if_spiky(axes, y)
    else:
        axes.set_ylim(0, y.max() * 1.08 or 1)
        axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
    if column == "tokens_per_second":
        peak = series(run.train, lambda row: row.get("peak_gb"))[1]
        caption += f", median {short(np.median(y))}"
        caption += f"; peak memory {decimal(peak.max(), 2)} GB" if len(peak) else ""
    return make_chart(figure, THIRD, title, caption + ".", [])


# ---- charts of several runs

@matplotlib.rc_context(STYLE)
def draw_comparison(runs: list, points: int) -> list:
    """Gain against forgetting, then held-out scores and losses over each other by tokens trained (else by step)."""
    per_step = [finite(run.start.get("tokens_per_step")) for run in runs]
    by_tokens = None not in per_step
    units = " or ".join(sorted({UNITS[run.metric] for run in runs})).capitalize()

    def overlay(title, caption, curve_of, smoothed=False):
        figure, axes = make_axes(HALF, "tokens trained" if by_tokens else "step")
        key = []
        for i, run in enumerate(runs):
            x, y = curve_of(run)
            if len(x):
                key.append((colour_of_run(i), f"{i + 1} {run.name}"))
                x = x * per_step[i] if by_tokens else x
                draw_curve(axes, x, y, colour_of_run(i), points, smoothed, raw=False)
        return make_chart(figure, HALF, title, caption, key) if key else None

    def held_out(role):
        return lambda run: series(run.evals, lambda row: mean(run.values(role, row["sources"], run.metric)))

    return to_svg([
        chart_gain_against_forgetting(runs),
        overlay("Domain, held out", f"{units}, mean over domain sources; lower is better.", held_out("domain")),
        overlay("General, held out", f"{units}, mean over general sources; its rise is forgetting.",
                held_out("general")),
        overlay("Training loss", "Nats per token over all sources, moving mean; mixes may differ, so this shows the "
                "course of a run and not its merit.", lambda run: series(run.train, lambda row: row.get("loss")),
                smoothed=True),
    ], "across")


def chart_gain_against_forgetting(runs: list) -> dict | None:
    """A dot per run whose gain and forgetting are known, over bands of the grades of forgetting."""
    known = [(i, run.forgetting * 100, run.domain_gain * 100) for i, run in enumerate(runs)
             if run.overall is not None]
    if not known:
        return None
    figure, axes = make_axes(HALF, "forgetting, %")
    xs, ys = [x for _, x, _ in known], [y for _, _, y in known]
    left, right = min(-1, min(xs) - 1.5), max(12, max(xs) + 1.5)
    room = max(max(ys) - min(ys), 4) * 0.35
    axes.set_xlim(left, right)
    axes.set_ylim(min(ys) - room, max(ys) + room)
    axes.set_ylabel("domain gain, %")
    for start, end, grade in ((left, 5, "good"), (5, 10, "warning"), (10, right, "bad")):
        axes.axvspan(start, end, color=HEX[grade], alpha=0.08, linewidth=0)
    # Runs with the overall score of the best one: a constant gain up to 5 % of forgetting, then one more % a %.
    best = max(run.overall for run in runs if run.overall is not None) * 100
    axes.plot([left, 5, right], [best, best, best + right - 5], color=HEX["muted"], linewidth=0.9, linestyle=DASHED)
    for i, x, y in known:
        axes.plot(x, y, "o", markersize=11, color=HEX[colour_of_run(i)], markeredgecolor="none")
        axes.annotate(str(i + 1), (x, y), color=HEX["card"], ha="center", va="center_baseline", fontsize=7,
                      weight="bold")
    return make_chart(figure, HALF, "Domain gain against forgetting", "Per cent; up and to the left is better. Bands: "
                      "good, warning, bad. Dashed: as good an overall score as the best run's.",
                      [(colour_of_run(i), f"{i + 1} {runs[i].name}") for i, _, _ in known])
