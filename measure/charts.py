"""The charts of report.py: the curves of one run, and several runs beside each other, as inline SVG.

A colour in a picture is a variable of the page's style sheet, so that one picture serves light and dark pages. Text in
the pictures stays text, and nothing is loaded from anywhere.

A run is report.py's Run. Values that a file does not have, or that are no finite numbers, are left out of a curve. A
chart_ function draws on the axes it is given and returns (title, caption, legend), the legend as [(colour's name,
text)]; or None where the run has nothing to draw.
"""

import io
import re
from functools import partial
from itertools import cycle

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, MaxNLocator

from measure.verdict import finite

# The style sheet of report.html.j2 says what each of these colours is on a light and on a dark page.
DOMAIN, GENERAL = ["d0", "d1", "d2", "d3"], ["g0", "g1", "g2", "g3", "g4", "g5", "g6"]     # warm; cool
COLOURS = ["page", "card", "ink", "muted", "line", "good", "warning", "bad", *DOMAIN, *GENERAL]
RUNS = ["g0", "d0", "g1", "g2", "d1", "d2", "g3", "g5"]
# What matplotlib draws instead: values that nothing else has, so that to_svg finds them again.
HEX = {name: f"#0000{i:02x}" for i, name in enumerate(COLOURS, 1)}

STYLE = {
    "svg.fonttype": "none", "font.size": 8, "axes.edgecolor": HEX["line"], "axes.labelcolor": HEX["muted"],
    "xtick.color": HEX["muted"], "ytick.color": HEX["muted"], "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "axes.axisbelow": True, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": HEX["line"], "grid.linewidth": 0.7, "xtick.major.size": 0, "ytick.major.size": 0,
    "lines.solid_capstyle": "round", "lines.markersize": 3.2, "savefig.transparent": True,
    # Points that are nearer than this many pixels to the line through their neighbours are left out.
    "path.simplify_threshold": 0.3,
}
DASHED, DOTTED = (0, (4, 3)), (0, (1, 1.7))
# Inches: so that on a phone, where a picture is as wide as the page, its text has ten pixels. The style sheet has it
# smaller where there is more room.
SIZE = (3.6, 2.2)
# A curve with fewer points than this is drawn as it is and not as a moving mean.
NOISY = 40
SIZES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


# ---- values as text

def decimal(value, digits: int = 3) -> str:
    """1234.5 -> '1,234.500'; a dash where the value is unknown."""
    value = finite(value)
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−") if abs(value) < 1e7 else f"{value:.1e}"


def short(value) -> str:
    """4194304 -> '4.19M'; below ten thousand a value keeps its digits; a dash where it is unknown."""
    value = finite(value)
    if value is None:
        return "–"
    if abs(value) >= 1e4:
        size, letter = next(pair for pair in SIZES if abs(value) >= pair[0])
        return f"{value / size:#.3g}".rstrip(".") + letter
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.3g}"


def percent(value, signed: bool = False) -> str:
    """0.3104 -> '31.0 %'; a dash where the value is unknown."""
    value = finite(value)
    if value is None:
        return "–"
    text = f"{value * 100:{'+' if signed else ''}.{'1f' if abs(value) < 1e5 else '1e'}}"
    return ("0.0" if float(text) == 0 else text.replace("-", "−")) + " %"


def span(interval, signed: bool = False) -> str:
    """[0.121, 0.139] -> '12.1 to 13.9 %'; nothing where it is unknown."""
    if interval is None:
        return ""
    low, high = (percent(end, signed) for end in interval)
    return f"{low.removesuffix(' %')} to {high}"


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


def logged(run, column: str) -> tuple:
    """(steps, values) of one column of the training log."""
    return series(run.train, lambda row: row.get(column))


def series_by_source(run, rows: list, column: str) -> dict:
    """{source: (steps, values)} of the sources that have any value of this column."""
    found = {name: series(rows, lambda row, name=name: row["sources"].get(name, {}).get(column))
             for name in run.sources}
    return {name: curve for name, curve in found.items() if len(curve[0])}


def smooth(y):
    """Centred moving mean over a twentieth of the curve; near its ends, the mean of the part that exists.

    Example: 40 values give windows of three: [v0 + v1, v0 + v1 + v2, ...] divided by [2, 3, ...].
    """
    window = np.ones(2 * (len(y) // 40) + 1)
    return np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same")


# ---- what all charts share

def draw_charts(charts: list, salt: str, x_name: str = "step", end: float | None = None) -> list:
    """What the page shows of each chart [chart_ function of the axes alone] that has anything to draw.

    x runs from 0 to `end` where that is given. `salt` makes the ids inside a picture differ from those of all other
    pictures on the page.
    """
    shown = []
    for i, chart in enumerate(charts):
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"{salt}-{i}"}):
            figure = Figure(figsize=SIZE, layout="constrained")
            axes = figure.add_subplot(xlabel=x_name)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10]))
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            axes.xaxis.set_major_formatter(tick_text)
            axes.ticklabel_format(axis="y", style="plain", useOffset=False)
            axes.margins(x=0.015)
            if end:
                axes.set_xlim(-0.015 * end, 1.015 * end)
            if drawn := chart(axes):
                shown.append(dict(zip(("title", "caption", "legend"), drawn), svg=to_svg(figure)))
    return shown


def to_svg(figure) -> Markup:
    """A figure as an element of a page: no header, style or unused ids; two decimals; our colours."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg"):].replace("xlink:href", "href")
    text = re.sub(r"<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text, count=1)
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)

    def shorten(match):
        return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), match[0])
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', shorten, text)
    for name, value in HEX.items():
        text = text.replace(value, f"var(--{name})")
    return Markup(re.sub(r"\s*\n\s*", "\n", text))


def draw_curve(axes, x, y, colour: str, smoothed: bool = False, raw: bool = True) -> None:
    """Few points get markers; many noisy ones a moving mean, over the faint curve as it was logged if `raw`.

    Of a long faint curve only the lowest and the highest of each stretch are drawn, so that a spike survives.
    """
    if smoothed and len(x) >= NOISY:
        if raw:
            begins = np.arange(0, len(x), max(1, len(x) // 200))
            extremes = np.stack([np.minimum.reduceat(y, begins), np.maximum.reduceat(y, begins)], axis=1)
            axes.plot(np.repeat(x[begins], 2), extremes.ravel(), color=HEX[colour], linewidth=0.6,
                      alpha=0.28 if len(x) <= 400 else 0.14)
        y = smooth(y)
    axes.plot(x, y, color=HEX[colour], linewidth=1.6, marker="o" if len(x) <= 30 else "")


def use_log_if_spiky(axes, y) -> str:
    """Make y logarithmic where one spike would flatten all else; returns what the caption then has to add."""
    if y.min() <= 0 or y.max() <= 12 * np.median(y):
        return ""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(tick_text)
    axes.yaxis.set_minor_formatter("")
    return ", logarithmic"


# ---- charts of one run

def draw_run(run) -> list:
    """The charts of one run, as `draw_charts` returns them."""
    groups = {}
    for row in run.evals:
        for kind in ("tasks", "probes"):
            for name, result in row[kind].items():
                title = result["capability"] if kind == "tasks" else name.partition(".")[0].partition("_")[0]
                groups.setdefault((kind, title), {}).setdefault(name)
    charts = [(chart_evaluations,), (chart_front,), *((chart_results, *group, list(names))
                                                       for group, names in groups.items()),
              (chart_loss,), (chart_mix,), (chart_distance,), (chart_blocks,),
              (chart_column, "lr", "Learning rate", "Learning rate by step, no unit"),
              (chart_column, "grad_norm", "Gradient norm", "Norm of the gradient before clipping, no unit"),
              (chart_column, "tokens_per_second", "Throughput", "Tokens per second")]
    return draw_charts([partial(chart, run, *column) for chart, *column in charts], f"run{run.number}", end=run.step)


def chart_evaluations(run, axes) -> tuple | None:
    """The held-out score of each source, and the base model's as a dashed line."""
    curves = series_by_source(run, run.evals, run.metric)
    for name, (x, y) in curves.items():
        if (base := finite(run.before.get(name, {}).get(run.metric))) is not None:
            axes.axhline(base, color=HEX[run.colours[name]], linewidth=0.9, linestyle=DASHED, alpha=0.6)
        draw_curve(axes, x, y, run.colours[name])
    for gap in run.gaps:
        axes.axvspan(0, gap["step"], color=HEX[run.colours[gap["source"]]], alpha=0.07, linewidth=0)
        axes.axvline(gap["step"], color=HEX[run.colours[gap["source"]]], linewidth=0.9, linestyle=DOTTED)
    caption = f"{run.unit.capitalize()} by step, lower is better"
    caption += "; dashed: the base model" if run.before else ""
    caption += "; shaded up to the dotted line: the stability gap, worse first and better again." if run.gaps else "."
    return (f"Held-out {run.unit}", caption, [(run.colours[name], name) for name in curves]) if curves else None


def chart_front(run, axes) -> tuple | None:
    """Domain gain against forgetting at each evaluation of the run: the checkpoints one may choose from."""
    if len(run.course) < 2:
        return None
    xs, ys = ([100 * point[key] for point in run.course] for key in ("forgetting", "domain_gain"))
    draw_grades(axes, xs, ys)
    axes.plot(xs, ys, color=HEX["muted"], linewidth=0.9, alpha=0.6)
    for x, y, point in zip(xs, ys, run.course):
        axes.plot(x, y, "o", markersize=5, color=HEX["g0" if point["is_best"] else "card"],
                  markeredgecolor=HEX["g0" if point["is_best"] else "muted"])
    best = max(run.course, key=lambda point: point["score"])
    for place in {0, len(xs) - 1, run.course.index(best)}:
        axes.annotate(f"{run.course[place]['step']}", (xs[place], ys[place]), xytext=(5, 4), textcoords="offset points",
                      color=HEX["ink"], fontsize=7)
    return ("Which checkpoint", "Domain gain against forgetting at each evaluation, in per cent, with the step of the "
            "first, the last and the best overall score; up and to the left is better. Bands: good, warning, bad.",
            [("g0", "no other gains more at the same or less forgetting (Pareto)"), ("muted", "another does")])


def chart_results(run, kind: str, group: str, names: list, axes) -> tuple | None:
    """The headline of each task of a capability, or of each probe of a kind, by step, with its 95 % interval."""
    legend = []
    for name, colour in zip(names, cycle(GENERAL)):
        rows = [row for row in run.evals if name in row[kind]]
        steps = [row["step"] for row in rows]
        results = [row[kind][name] for row in rows]
        draw_curve(axes, steps, np.array([result["value"] for result in results]), colour)
        # More bands than these would hide each other.
        if len(names) <= 3 and all(result["interval"] for result in results):
            axes.fill_between(steps, *zip(*(result["interval"] for result in results)), color=HEX[colour], alpha=0.09,
                              linewidth=0)
        if results[-1]["chance"]:
            axes.axhline(results[-1]["chance"], color=HEX[colour], linewidth=0.8, linestyle=DOTTED)
        legend.append((colour, name))
    titles = {"facts": "Did the facts go in", "in": "Is in-context learning alive"}
    return (titles.get(group, group.capitalize()) if kind == "probes" else f"Tasks: {group}",
            "By step" + "; band: 95 % interval" * (len(names) <= 3) + "; dotted: chance.", legend)


def chart_distance(run, axes) -> tuple | None:
    """How far all weights have moved from the base's, by step."""
    x, y = series(run.train, lambda row: row["distance"].get("all"))
    if not len(x):
        return None
    draw_curve(axes, x, y, "g0")
    axes.set_ylim(0, y.max() * 1.08 or 1)
    return ("Distance from the base", "L2 norm of all weights' difference from the base's, by step. Far and fast is "
            "where forgetting begins.", [])


def chart_blocks(run, axes) -> tuple | None:
    """The same of each block at the last step that has it."""
    rows = [row for row in run.train if any(name != "all" for name in row["distance"])]
    held = {name: finite(value) for name, value in rows[-1]["distance"].items()} if rows else {}
    layers = sorted(int(name[7:]) for name in held if re.fullmatch(r"layers\.\d{1,4}", name))
    ends = [name for name in ("embed", "norm", "head") if name in held]
    bars = [(name, held[name]) for name in ends[:1] if name == "embed"] + [
        (str(i), held[f"layers.{i}"]) for i in layers] + [(name, held[name]) for name in ends if name != "embed"]
    bars = [(name, value) for name, value in bars if value is not None]
    if not bars:
        return None
    axes.bar(range(len(bars)), [value for _, value in bars], color=HEX["g0"], width=0.7)
    shown = range(0, len(bars), -(-len(bars) // 10))
    axes.set_xlim(-0.7, len(bars) - 0.3)
    axes.set_xticks([*shown], [bars[place][0] for place in shown])
    axes.xaxis.set_major_formatter(FixedFormatter([bars[place][0] for place in shown]))
    axes.set_xlabel("block")
    return ("Distance by block", f"The same of each block (embed: the token embeddings; 0, 1, ...: the layers) at step "
            f"{rows[-1]['step']:,}.", [])


def draw_grades(axes, xs: list, ys: list) -> tuple[float, float]:
    """Axes of gain over forgetting in per cent, with bands of the grades of forgetting; returns the ends of x."""
    left, right = min(-1, min(xs) - 1.5), max(12, max(xs) + 1.5)
    room = max(max(ys) - min(ys), 4) * 0.35
    axes.set(xlim=(left, right), ylim=(min(ys) - room, max(ys) + room), xlabel="forgetting, %", ylabel="domain gain, %")
    for start, end, grade in ((left, 5, "good"), (5, 10, "warning"), (10, right, "bad")):
        axes.axvspan(start, end, color=HEX[grade], alpha=0.08, linewidth=0)
    return left, right


def chart_loss(run, axes) -> tuple | None:
    """The training loss of each source; the loss of all together where the log has none by source."""
    curves = series_by_source(run, run.train, "loss") or {"all sources": logged(run, "loss")}
    losses = np.concatenate([y for _, y in curves.values()])
    if not len(losses):
        return None
    for name, (x, y) in curves.items():
        draw_curve(axes, x, y, run.colours.get(name, "muted"), smoothed=True)
    resumed = [row["step"] for row in run.events if row["kind"] == "resume" and finite(row.get("step")) is not None]
    for step in resumed:
        axes.axvline(step, color=HEX["muted"], linewidth=0.8, linestyle=DOTTED)
    unit = "Nats per token" if run.metric == "bits_per_byte" else run.unit.capitalize()
    caption = f"{unit} by step" + use_log_if_spiky(axes, losses)
    if any(len(x) >= NOISY for x, _ in curves.values()):
        caption += "; faint: as logged, solid: moving mean"
    caption += "; dotted vertical line: resumed from there" if resumed else ""
    return "Training loss", caption + ".", [(run.colours.get(name, "muted"), name) for name in curves]


def chart_mix(run, axes) -> tuple | None:
    """Each source's share of the tokens so far, domain at the bottom, and the share that the schedule asked for.

    A log line without a source means that the source was not read since: it keeps its last count.
    """
    curves = series_by_source(run, run.train, "tokens")
    # At most 130 of the logged steps, evenly spread, because matplotlib does not simplify areas.
    places = np.unique(np.linspace(0, len(run.train) - 1, min(130, len(run.train))).astype(int))
    steps = np.array([run.train[place]["step"] for place in places], float)
    counts = np.array([np.concatenate([[0], y])[np.searchsorted(x, steps, side="right")] for x, y in curves.values()])
    if not counts.sum():
        return None
    begun = counts.sum(axis=0) > 0
    steps, counts = steps[begun], counts[:, begun]
    if len(steps) == 1:
        # One line was logged so far: draw its shares as constant since step 0.
        steps, counts = np.array([0, steps[0]]), np.repeat(counts, 2, axis=1)
    axes.stackplot(steps, counts / counts.sum(axis=0) * 100, colors=[HEX[run.colours[name]] for name in curves],
                   alpha=0.62, linewidth=0)
    caption = "Share of all tokens trained so far, in per cent, by step"
    x, wanted = logged(run, "domain_share")
    if len(x):
        mean_so_far = np.cumsum(wanted) / np.arange(1, len(x) + 1)
        axes.plot(x, wanted * 100, color=HEX["ink"], linewidth=1.2, linestyle=DASHED)
        axes.plot(x, mean_so_far * 100, color=HEX["ink"], linewidth=1, linestyle=DOTTED)
        caption += "; dashed: the domain share wanted at that step; dotted: its mean so far, which the domain follows"
    axes.set_ylim(0, 100)
    return "Realised mix", caption + ".", [(run.colours[name], name) for name in curves]


def chart_column(run, name: str, title: str, caption: str, axes) -> tuple | None:
    """One column of the training log by step; the learning rate as it is, the others smoothed."""
    x, y = logged(run, name)
    if not len(x):
        return None
    draw_curve(axes, x, y, "ink" if name == "lr" else "g5", smoothed=name != "lr")
    if name == "grad_norm":
        caption += use_log_if_spiky(axes, y)
    else:
        axes.set_ylim(0, y.max() * 1.08 or 1)
        axes.yaxis.set_major_formatter(tick_text)
    if name == "tokens_per_second":
        peak = logged(run, "peak_gb")[1]
        caption += f", median {short(np.median(y))}"
        caption += f"; peak memory {decimal(peak.max(), 2)} GB" if len(peak) else ""
    return title, caption + ".", []


def draw_objective(run) -> list:
    """A chart of each of the objective's measures, as `draw_charts` returns them."""
    held = [measures for row in run.evals for measures in row["objective"].values()]
    names = dict.fromkeys(name for measures in [*held, *(row["objective"] for row in run.train)] for name in measures)
    return draw_charts([partial(chart_measure, run, name) for name in names if name != "sequences"],
                       f"objective{run.number}", end=run.step)


def chart_measure(run, name: str, axes) -> tuple | None:
    """A measure of the objective: of the training steps, and of the held-out sequences of each source."""
    trained = series(run.train, lambda row: row["objective"].get(name))
    held = {source: series(run.evals, lambda row, source=source: row["objective"].get(source, {}).get(name))
            for source in dict.fromkeys(source for row in run.evals for source in row["objective"])}
    held = {source: curve for source, curve in held.items() if len(curve[0])}
    if len(trained[0]):
        draw_curve(axes, *trained, "muted", smoothed=True)
    for source, curve in held.items():
        draw_curve(axes, *curve, run.colours.get(source, "g5"))
    legend = [("muted", "training")] if len(trained[0]) else []
    legend += [(run.colours.get(source, "g5"), f"{source}, held out") for source in held]
    return (name.replace("_", " ").capitalize(), "Measured by the objective, by step.", legend) if legend else None


# ---- charts of several runs

def draw_comparison(runs: list, ranked: bool = True) -> list:
    """Gain against forgetting, then held-out scores and losses over each other by tokens trained (else by step)."""
    by_tokens = all(finite(run.start.get("tokens_per_step")) is not None for run in runs)
    units = " or ".join(sorted({run.unit for run in runs})).capitalize()

    def overlay(title, caption, curve_of, axes, smoothed=False):
        legend = []
        for run in runs:
            x, y = curve_of(run)
            if len(x):
                legend.append((run.colour, f"{run.number} {run.name}"))
                x = x * run.start["tokens_per_step"] if by_tokens else x
                draw_curve(axes, x, y, run.colour, smoothed, raw=False)
        return (title, caption, legend) if legend else None

    def held_out(role):
        return lambda run: series(run.evals, lambda row: run.mean_over(role, row["sources"], run.metric))

    charts = [
        partial(chart_gain_against_forgetting, runs, ranked),
        partial(overlay, "Domain, held out", f"{units}, mean over domain sources; lower is better.",
                held_out("domain")),
        partial(overlay, "General, held out", f"{units}, mean over general sources; its rise is forgetting.",
                held_out("general")),
        partial(overlay, "Training loss", "Nats per token over all sources, moving mean; mixes may differ, so this "
                "shows the course of a run and not its merit.", partial(logged, column="loss"), smoothed=True)]
    return draw_charts(charts, "across", "tokens trained" if by_tokens else "step")


def chart_gain_against_forgetting(runs: list, ranked: bool, axes) -> tuple | None:
    """A dot per run whose gain and forgetting are known, over bands of the grades of forgetting; a cross as long as the
    95 % intervals where these are known."""
    known = [run for run in runs if run.overall is not None]
    if not known:
        return None
    xs, ys = [run.forgetting * 100 for run in known], [run.domain_gain * 100 for run in known]
    left, right = draw_grades(axes, xs, ys)
    # Runs with the overall score of the best one: a constant gain up to 5 % of forgetting, then one more % a %.
    best = max(run.overall for run in known) * 100
    if ranked:
        axes.plot([left, 5, right], [best, best, best + right - 5], color=HEX["muted"], linewidth=0.9, linestyle=DASHED)
    for run, *place in zip(known, xs, ys):
        for name, ends in (("forgetting", lambda low, high, at: ([low, high], [at[1]] * 2)),
                           ("domain_gain", lambda low, high, at: ([at[0]] * 2, [low, high]))):
            if interval := run.interval[name]:
                axes.plot(*ends(*(100 * end for end in interval), place), color=HEX[run.colour], linewidth=1.2)
        axes.plot(*place, "o", markersize=11, color=HEX[run.colour], markeredgecolor="none")
        axes.annotate(str(run.number), place, color=HEX["card"], ha="center", va="center_baseline", fontsize=7,
                      weight="bold")
    return ("Domain gain against forgetting", "Per cent; up and to the left is better. Bands: good, warning, bad. "
            "Crosses: 95 % intervals."
            + " Dashed: as good an overall score as the best run's." * ranked,
            [(run.colour, f"{run.number} {run.name}") for run in known])
