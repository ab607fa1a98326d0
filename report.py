"""After a run: a run folder in, one self-contained HTML page out. It reads files only and needs no network.

    python report.py out/legal                                  writes out/legal/report.html
    python report.py out/replay out/lora --out compare.html     several runs on one page

Read from each folder: metrics.jsonl (required), eval.json, config.toml. A run that is still going, was killed or was
resumed is shown as far as it got.

domain gain   = mean over domain sources of the relative fall of bits per byte
forgetting    = mean over general sources of its relative rise; unknown without an evaluation at step 0
overall score = domain gain - max(0, forgetting - 5 %)

A masked-LM run may carry no bits per byte; then the same arithmetic is done on nats per predicted token, and said so.
"""

import argparse
import io
import json
import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise, zip_longest
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

GOOD, WARNING = 0.05, 0.10  # relative rise on general text: below 5 % good, below 10 % warning, above bad
SIZES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
FLAT = 0.01                 # a domain gain within +-1 % is called flat
ADVICE = {
    "forgetting": "raise replay to 40-50 %, or LoRA, EWC, LwF, merge with the base",
    "flat": "learning rate 2-3x higher, shorter warm-up; more or cleaner domain data",
    "nonfinite": "lower rate; look at the named batch's documents",
}
UNITS = {"bits_per_byte": "bits per byte", "nats_per_token": "nats per predicted token"}

# name: (on a light page, on a dark page). Charts are drawn in the light one; _with_svg makes it var(--name).
PALETTE = {
    "page": ("#f7f8fa", "#12161d"), "card": ("#ffffff", "#1a202a"),
    "ink": ("#1b2330", "#e8ebf0"), "muted": ("#5f6b7c", "#9aa5b5"), "line": ("#e2e6ec", "#303846"),
    "good": ("#15803e", "#4ade80"), "warning": ("#b45308", "#fbbf25"), "bad": ("#b91c1d", "#f87172"),
    "d0": ("#c2410d", "#fb923d"), "d1": ("#be185e", "#f472b7"), "d2": ("#a16208", "#facc16"),
    "d3": ("#7f1d1e", "#fca5a6"), "g0": ("#2563ec", "#60a5fb"), "g1": ("#0d9489", "#2dd4c0"),
    "g2": ("#7c3aee", "#a78bfb"), "g3": ("#4d7c10", "#a3e636"), "g4": ("#0284c8", "#38bdf9"),
    "g5": ("#64748c", "#94a3b9"), "g6": ("#a21cb0", "#e879fa"),
}
DOMAIN = [name for name in PALETTE if re.fullmatch(r"d\d", name)]    # warm: domain sources
GENERAL = [name for name in PALETTE if re.fullmatch(r"g\d", name)]   # cool: general sources
RUNS = ["g0", "d0", "g1", "g2", "d1", "d2", "g3", "g5"]


# --- reading a run folder -------------------------------------------------------------------------------------------

@dataclass
class Run:
    """What a run folder says. Lines of metrics.jsonl stay the dicts they are, a line a step, in the order of steps."""
    folder: Path
    name: str
    start: dict = field(default_factory=dict)
    train: list = field(default_factory=list)      # kind "train"
    evals: list = field(default_factory=list)      # kind "eval"
    samples: list = field(default_factory=list)    # kind "samples"
    events: list = field(default_factory=list)     # kinds "event" and "resume", as they were written
    before: dict = field(default_factory=dict)     # source -> fields of the evaluation at step 0; empty: no baseline
    after: dict = field(default_factory=dict)      # source -> fields of the last evaluation
    protocol: dict = field(default_factory=dict)
    config: str = ""
    finished: bool = False
    notes: list = field(default_factory=list)      # what is wrong with the files or the run, a sentence each

    @property
    def step(self) -> int:
        return max([row["step"] for row in self.train[-1:] + self.evals[-1:]], default=0)

    @cached_property
    def metric(self) -> str:
        """The field that is compared: bits per byte wherever every evaluated source has it."""
        rows = [*self.before.values(), *self.after.values()]
        has_bits = all(math.isfinite(_number(row.get("bits_per_byte"))) for row in rows)
        return "bits_per_byte" if has_bits else "nats_per_token"

    @cached_property
    def sources(self) -> dict:
        """{source: role}, domain first, then general, then what has no role."""
        roles = {}
        for group in (self.start, *self.train, {"sources": self.before}, {"sources": self.after}):
            for name, fields in _dict(group.get("sources")).items():
                roles[name] = _dict(fields).get("role") or roles.get(name, "")
        return dict(sorted(roles.items(), key=lambda item: {"domain": 0, "general": 1}.get(str(item[1]), 2)))

    @cached_property
    def colours(self) -> dict:
        """{source: name in PALETTE}: warm for the domain, cool for everything else."""
        warm = [name for name, role in self.sources.items() if role == "domain"]
        cool = [name for name in self.sources if name not in warm]
        return {name: colours[i % len(colours)]
                for names, colours in ((warm, DOMAIN), (cool, GENERAL)) for i, name in enumerate(names)}

    def values(self, role: str, side: dict, column: str) -> list:
        """The numbers of a column over the sources of a role; nan where a source has none."""
        return [_number(_dict(side.get(name)).get(column)) for name, r in self.sources.items() if r == role]

    def change(self, source: str) -> float:
        """Relative change of the metric from before to after; nan where either is missing."""
        base, now = (_number(_dict(side.get(source)).get(self.metric)) for side in (self.before, self.after))
        return now / base - 1 if base else math.nan

    @property
    def domain_gain(self) -> float:
        """Fraction; nan when it cannot be known."""
        return -_mean(self.change(name) for name, role in self.sources.items() if role == "domain")

    @property
    def forgetting(self) -> float:
        """Fraction, negative where general text got better; nan (unknown, never zero) without a baseline."""
        return _mean(self.change(name) for name, role in self.sources.items() if role == "general")

    @property
    def overall(self) -> float:
        return self.domain_gain - max(0.0, self.forgetting - GOOD) if math.isfinite(self.forgetting) else math.nan


def read_run(folder) -> Run:
    """Read a run folder. FileNotFoundError or ValueError, with a remedy, when there is nothing to show.

    A step that stands twice (a resumed run) counts once, as written last; what was logged past the step that a run was
    resumed from is dropped, because that work was undone. Lines that are not JSON (a killed run cuts its last one) are
    left out and noted.
    """
    folder = Path(folder)
    path, remedy = folder / "metrics.jsonl", "give the folder that train.py wrote, such as out/demo"
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"run folder '{folder}' {what}: {remedy}")
    if not path.is_file():
        raise FileNotFoundError(f"no metrics.jsonl in '{folder}': {remedy}")
    run = Run(folder, name=folder.resolve().name)
    _read_metrics(run, path)
    run.name = str(run.start.get("run") or run.name)
    if (folder / "config.toml").is_file():
        run.config = (folder / "config.toml").read_text(encoding="utf-8", errors="replace")
    _read_evaluation(run, folder / "eval.json")
    if not (run.train or run.evals or run.after):
        raise ValueError(f"nothing to show: '{path}' holds no training step and no evaluation yet; "
                         "try again after the run's first log line")
    broken = [row["step"] for row in run.train if "loss" in row and not math.isfinite(_number(row["loss"]))]
    if broken:
        run.notes.append(f"The loss was not finite at {_count(len(broken), 'logged step')} "
                         f"(first: step {broken[0]:,}). What helps: {ADVICE['nonfinite']}.")
    if run.finished and abs(run.domain_gain) < FLAT:
        run.notes.append(f"The domain hardly moved. What helps: {ADVICE['flat']}.")
    return run


def _read_metrics(run: Run, path: Path) -> None:
    kinds, unreadable, number = {"train": {}, "eval": {}, "samples": {}}, [], 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                kind = str(row["kind"])
                if kind in kinds:
                    row["step"] = int(row["step"])
            except (ValueError, KeyError, TypeError, OverflowError):
                unreadable += [number] if line.strip() else []
                continue
            if kind in kinds:
                kinds[kind][row["step"]] = row
            elif kind == "start":
                run.start = row
            elif kind in ("event", "resume"):
                run.events.append(row)
                if kind == "resume":
                    at = _number(row.get("step"))
                    kinds = {k: {s: r for s, r in rows.items() if not s > at} for k, rows in kinds.items()}
    run.train, run.evals, run.samples = ([rows[s] for s in sorted(rows)] for rows in kinds.values())
    if unreadable == [number]:
        run.notes.append("The last line of metrics.jsonl is cut (a run stopped while writing it) and was ignored.")
    elif unreadable:
        run.notes.append(f"{_count(len(unreadable), 'line')} of metrics.jsonl cannot be read and left out "
                         f"(first: line {unreadable[0]}).")


def _read_evaluation(run: Run, path: Path) -> None:
    """Fill before, after and protocol from eval.json, else from the first and the last evaluation in the metrics."""
    stated = {}
    if path.is_file():
        try:
            stated = _dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            run.notes.append("eval.json is not valid JSON and was ignored; the evaluations in metrics.jsonl are shown.")
    measured = {row["step"]: _sources(row.get("sources")) for row in run.evals}
    run.before = _sources(stated.get("before")) or measured.get(0, {})
    run.after = _sources(stated.get("after")) or next((measured[step] for step in reversed(measured) if step), {})
    protocols = [_dict(where.get("protocol")) for where in (stated, *reversed(run.evals))]
    run.protocol = next((protocol for protocol in protocols if protocol), {})
    total = _number(run.start.get("total_steps"))
    run.finished = bool(stated.get("after")) or (run.folder / "final").is_dir() or run.step >= total
    for key, ours in (("domain_gain", run.domain_gain), ("forgetting", run.forgetting)):
        theirs = _number(stated.get(key))
        if abs(theirs - ours) > 5e-4:
            run.notes.append(f"eval.json states a {key.replace('_', ' ')} of {_percent(theirs)}; its values before and "
                             f"after give {_percent(ours)}, which is what this page shows.")


def _number(value) -> float:
    """A finite float, or nan for anything else that a file may hold."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan


def _dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def _sources(value) -> dict:
    return {name: fields for name, fields in _dict(value).items() if isinstance(fields, dict)}


def _mean(values) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


# --- words and numbers ----------------------------------------------------------------------------------------------

def _percent(value, signed: bool = False) -> str:
    """0.3104 -> '31.0 %'; a dash where the value is unknown."""
    if not math.isfinite(_number(value)):
        return "–"
    text = f"{value * 100:{'+' if signed else ''}.1f}"
    return ("0.0" if float(text) == 0 else text.replace("-", "−")) + " %"


def _decimal(value, digits: int = 3) -> str:
    return f"{value:,.{digits}f}".replace("-", "−") if math.isfinite(_number(value)) else "–"


def _short(value) -> str:
    """4194304 -> '4.19M'; numbers below ten thousand stay as they are."""
    value = _number(value)
    if abs(value) >= 1e4:
        size, letter = next(pair for pair in SIZES if abs(value) >= pair[0])
        return f"{value / size:#.3g}".rstrip(".") + letter
    return "–" if math.isnan(value) else f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.3g}"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _flat(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _grade(forgetting: float) -> str:
    if not math.isfinite(forgetting):
        return "unknown"
    return "good" if forgetting < GOOD else "warning" if forgetting < WARNING else "bad"


def _gain_grade(gain: float) -> str:
    if not math.isfinite(gain):
        return "unknown"
    return "good" if gain >= FLAT else "warning" if gain >= 0 else "bad"


def _unknown(run: Run) -> str:
    """Why forgetting is unknown."""
    if not run.before:
        return "unknown: no baseline"
    return "unknown: no general text was evaluated" if run.after else "unknown: not evaluated yet"


def verdict(run: Run) -> list:
    """The one sentence of a run as (text, css class) pieces; the texts joined are the plain sentence."""
    total = _number(run.start.get("total_steps"))
    of_total = f" of {total:,.0f}" if math.isfinite(total) else ""
    so_far = "" if run.finished else f"So far, at step {run.step:,}{of_total}, "
    if not run.before:
        text = f"{so_far}gain and forgetting are unknown: no baseline, because nothing was evaluated at step 0."
        return [(text[0].upper() + text[1:], "")]
    if not run.after:
        return [("No verdict yet: only the baseline at step 0 has been evaluated.", "")]
    gain, lost = run.domain_gain, run.forgetting
    pieces = [(f"{so_far}the domain " if so_far else "The domain ", "")]
    if math.isfinite(gain):
        pieces += [("gained " if gain >= 0 else "got worse by ", ""), (_percent(abs(gain)), _gain_grade(gain))]
    else:
        pieces += [("was not evaluated", "")]
    if not math.isfinite(lost):
        return [*pieces, (f", in {UNITS[run.metric]}; forgetting is {_unknown(run)}.", "")]
    verb = "lost" if lost > 0 else "gained"
    return [*pieces, (f" and general text {verb} ", ""), (_percent(abs(lost)), _grade(lost)),
            (f", in {UNITS[run.metric]}.", "")]


def _plain(pieces: list) -> str:
    return "".join(text for text, _ in pieces)


def _meaning(run: Run) -> str:
    """What the verdict means, the worst source, and the accuracy of a masked-LM run."""
    parts = [{"good": "Forgetting is below 5 %: good.", "warning": "Forgetting is between 5 and 10 %: a warning.",
              "bad": "Forgetting is above 10 %: bad.", "unknown": ""}[_grade(run.forgetting)]]
    rises = [(run.change(name), name) for name, role in run.sources.items() if role == "general"]
    rises = sorted(rise for rise in rises if math.isfinite(rise[0]))
    if len(rises) > 1 and rises[-1][0] > 0:
        parts.append(f"The source that lost most is {rises[-1][1]}, {_percent(rises[-1][0])}.")
    for role in ("domain", "general"):
        base, now = (_mean(run.values(role, side, "accuracy")) for side in (run.before, run.after))
        if math.isfinite(base + now):
            parts.append(f"Accuracy on {role} text went from {_percent(base)} to {_percent(now)}.")
    return " ".join(parts)


# --- charts ---------------------------------------------------------------------------------------------------------

STYLE = {
    "svg.fonttype": "none", "font.size": 8, "axes.edgecolor": PALETTE["line"][0],
    "axes.labelcolor": PALETTE["muted"][0], "xtick.color": PALETTE["muted"][0], "ytick.color": PALETTE["muted"][0],
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.axisbelow": True,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": PALETTE["line"][0], "grid.linewidth": 0.7,
    "xtick.major.size": 0, "ytick.major.size": 0, "lines.solid_capstyle": "round",
}
DASHED, DOTTED = (0, (4, 3)), (0, (1, 1.7))
HALF, THIRD, FULL = ("half", (5.2, 2.9)), ("third", (3.45, 2.1)), ("full", (10.7, 2.5))  # css class, inches


def _tick(value, _position=None) -> str:
    size, letter = next(((s, x) for s, x in SIZES if abs(value) >= max(s, 1e4)), (1, ""))
    mantissa, exponent = f"{value:.3e}".split("e")
    tiny = 0 < abs(value) < 1e-3
    return (f"{float(mantissa):g}e{int(exponent)}" if tiny else f"{value / size:.4g}{letter}").replace("-", "−")


def _axes(size, x_name: str = "step", end: float | None = None):
    """A figure of `size` and its one axes; x runs from 0 to `end` where that is given."""
    figure = Figure(figsize=size[1], layout="constrained")
    axes = figure.add_subplot()
    for patch in (figure.patch, axes.patch):
        patch.set_alpha(0)
    axes.xaxis.set_major_locator(MaxNLocator(4 if size is THIRD else 6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes.set_xlabel(x_name)
    axes.margins(x=0.015)
    if end:
        axes.set_xlim(-0.015 * end, 1.015 * end)
    return figure, axes


def _chart(figure, size, title: str, caption: str, key: list) -> dict:
    return {"figure": figure, "size": size[0], "title": title, "caption": caption, "key": key}


def _with_svg(charts: list, salt: str) -> list:
    """Draw each chart as a small inline <svg>: text stays text, colours become the page's variables, ids are unique."""
    charts = [chart for chart in charts if chart]
    for i, chart in enumerate(charts):
        out = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": f"{salt}-{i}"}):
            chart.pop("figure").savefig(out, format="svg", metadata={"Date": None})
        text = out.getvalue()
        text = text[text.index("<svg"):].replace("xlink:href", "href")
        text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
        text = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text, count=1)
        used = set(re.findall(r"#([\w-]+)", text))
        text = re.sub(r' id="([^"]*)"', lambda m, used=used: m[0] if m[1] in used else "", text)
        text = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda m: re.sub(
            r"-?\d+\.\d+", lambda n: f"{float(n[0]):.2f}".rstrip("0").rstrip("."), m[0]), text)
        for name, (light, _) in PALETTE.items():
            text = text.replace(light, f"var(--{name})")
        chart["svg"] = Markup(re.sub(r"\s*\n\s*", "\n", text))
    return charts


def _series(rows: list, value) -> tuple:
    """(steps, values) as arrays, of the finite values of `value(row)`."""
    y = np.array([v if type(v) is float else _number(v) for v in map(value, rows)], float)
    known = np.isfinite(y)
    return np.array([row["step"] for row in rows], float)[known], y[known]


def _by_source(run: Run, rows: list, column: str) -> dict:
    """{source: (steps, values)} of the sources that have any."""
    found = {name: _series(rows, lambda row, n=name: _dict(_dict(row.get("sources")).get(n)).get(column))
             for name in run.sources}
    return {name: xy for name, xy in found.items() if len(xy[0])}


def _thin(x, y, points: int) -> tuple:
    """At most about `points` of a curve, keeping the lowest and highest of each stretch: a spike survives."""
    if len(x) <= points:
        return x, y
    edges, keep = np.linspace(0, len(x), points // 2 + 1).astype(int), {0, len(x) - 1}
    for a, b in pairwise(edges):
        keep |= {a + int(np.argmin(y[a:b])), a + int(np.argmax(y[a:b]))}
    keep = sorted(keep)
    return x[keep], y[keep]


def _spread(n: int, points: int):
    """At most `points` indices out of `n`, evenly spread, ends included."""
    return np.unique(np.linspace(0, n - 1, min(points, n)).astype(int))


def _smooth(y):
    """Centred moving mean over a twentieth of the run; at the ends over what there is of it."""
    at, half, total = np.arange(len(y)), len(y) // 40, np.concatenate([[0], np.cumsum(y)])
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(y))
    return (total[high] - total[low]) / (high - low)


def _hex(name: str) -> str:
    return PALETTE[name][0]


def _line(axes, x, y, colour: str, points: int, smooth: bool = False, raw: bool = True) -> None:
    """A curve; few points get markers, and many noisy ones a smoothed line over a faint raw one."""
    if not smooth or len(x) < 40:
        marks = {"marker": "o", "markersize": 3.2} if len(x) <= 30 else {}
        axes.plot(*_thin(x, y, points), color=_hex(colour), linewidth=1.6, **marks)
        return
    if raw:
        axes.plot(*_thin(x, y, points), color=_hex(colour), linewidth=0.6, alpha=0.28 if len(x) <= points else 0.14)
    keep = _spread(len(x), points // 2)
    axes.plot(x[keep], _smooth(y)[keep], color=_hex(colour), linewidth=1.6)


def _log_if_spiky(axes, y) -> str:
    """Logarithmic y where a spike would flatten the rest; returns what the caption has to add."""
    if y.min() <= 0 or y.max() <= 12 * np.median(y):
        return ""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    return ", logarithmic"


def _chart_eval(run: Run, points: int) -> dict | None:
    series = _by_source(run, run.evals, run.metric)
    if not series:
        return None
    figure, axes = _axes(HALF, end=run.step)
    for name, (x, y) in series.items():
        base = _number(_dict(run.before.get(name)).get(run.metric))
        if math.isfinite(base):
            axes.axhline(base, color=_hex(run.colours[name]), linewidth=0.9, linestyle=DASHED, alpha=0.6)
        _line(axes, x, y, run.colours[name], points)
    dashed = "; dashed: the base model" if run.before else ""
    return _chart(figure, HALF, f"Held-out {UNITS[run.metric]}", f"{UNITS[run.metric].capitalize()} by step, lower is "
                  f"better{dashed}.", [(run.colours[name], name) for name in series])


def _chart_loss(run: Run, points: int) -> dict | None:
    series = _by_source(run, run.train, "loss")
    key = [(run.colours[name], name) for name in series]
    if not series:  # no losses by source: the total is better than nothing
        series, key = {"": _series(run.train, lambda row: row.get("loss"))}, [("muted", "all sources")]
    if not any(len(x) for x, _ in series.values()):
        return None
    figure, axes = _axes(HALF, end=run.step)
    for name, (x, y) in series.items():
        _line(axes, x, y, run.colours.get(name, "muted"), points, smooth=True)
    resumed = [row["step"] for row in run.events
               if row["kind"] == "resume" and math.isfinite(_number(row.get("step")))]
    for step in resumed:
        axes.axvline(step, color=_hex("muted"), linewidth=0.8, linestyle=DOTTED)
    unit = "Nats per token" if run.metric == "bits_per_byte" else UNITS[run.metric].capitalize()
    caption = f"{unit} by step" + _log_if_spiky(axes, np.concatenate([y for _, y in series.values()]))
    caption += "; faint: as logged, solid: moving mean" if max(len(x) for x, _ in series.values()) >= 40 else ""
    caption += "; dotted upright: resumed from there" if resumed else ""
    return _chart(figure, HALF, "Training loss", caption + ".", key)


def _chart_mix(run: Run, points: int) -> dict | None:
    """Cumulative token share by source, domain at the bottom; a source missing from a line keeps its last count."""
    series = _by_source(run, run.train, "tokens")
    steps = np.array([row["step"] for row in run.train], float)[_spread(len(run.train), points // 3)]
    counts = np.array([np.concatenate([[0], y])[np.searchsorted(x, steps, side="right")] for x, y in series.values()])
    if not counts.sum():
        return None
    steps, counts = steps[counts.sum(axis=0) > 0], counts[:, counts.sum(axis=0) > 0]
    if len(steps) == 1:  # one line logged so far: draw it as constant
        steps, counts = np.array([0, steps[0]]), np.repeat(counts, 2, axis=1)
    figure, axes = _axes(FULL, end=run.step)
    axes.stackplot(steps, counts / counts.sum(axis=0) * 100, colors=[_hex(run.colours[name]) for name in series],
                   alpha=0.62, linewidth=0)
    caption = "Share of all tokens trained so far, in per cent, by step"
    x, wanted = _series(run.train, lambda row: row.get("domain_share"))
    if len(x):
        follow, keep = np.cumsum(wanted) / np.arange(1, len(x) + 1), _spread(len(x), points // 2)
        axes.plot(x[keep], wanted[keep] * 100, color=_hex("ink"), linewidth=1.2, linestyle=DASHED)
        axes.plot(x[keep], follow[keep] * 100, color=_hex("ink"), linewidth=1, linestyle=DOTTED)
        caption += "; dashed: the domain share wanted at that step; dotted: its mean so far, which the domain follows"
    axes.set_ylim(0, 100)
    return _chart(figure, FULL, "Realised mix", caption + ".", [(run.colours[name], name) for name in series])


def _chart_column(run: Run, points: int, column: str, title: str, caption: str) -> dict | None:
    x, y = _series(run.train, lambda row: row.get(column))
    if not len(x):
        return None
    figure, axes = _axes(THIRD, end=run.step)
    _line(axes, x, y, "ink" if column == "lr" else "g5", points, smooth=column != "lr")
    if column == "grad_norm":
        caption += _log_if_spiky(axes, y)
    else:
        axes.set_ylim(0, y.max() * 1.08 or 1)
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    if column == "tokens_per_second":
        peak = _series(run.train, lambda row: row.get("peak_gb"))[1]
        caption += f", median {_short(np.median(y))}"
        caption += f"; peak memory {_decimal(peak.max(), 2)} GB" if len(peak) else ""
    return _chart(figure, THIRD, title, caption + ".", [])


def charts(run: Run, points: int, salt: str) -> list:
    """Charts of one run: dicts with svg, title, caption, size (css class) and key ([(colour, text)])."""
    return _with_svg([
        _chart_eval(run, points), _chart_loss(run, points), _chart_mix(run, points),
        _chart_column(run, points, "lr", "Learning rate", "Learning rate by step, no unit"),
        _chart_column(run, points, "grad_norm", "Gradient norm", "Norm of the gradient before clipping, no unit"),
        _chart_column(run, points, "tokens_per_second", "Throughput", "Tokens per second"),
    ], salt)


def charts_across(runs: list, points: int) -> list:
    """Charts over several runs: gain against forgetting, then overlaid curves by tokens trained (or by step)."""
    per_step = [_number(run.start.get("tokens_per_step")) for run in runs]
    by_tokens = all(map(math.isfinite, per_step))
    units = " or ".join(sorted({UNITS[run.metric] for run in runs})).capitalize()

    def overlay(title, caption, get, smooth=False):
        figure, axes = _axes(HALF, "tokens trained" if by_tokens else "step")
        key = []
        for i, run in enumerate(runs):
            x, y = get(run)
            if len(x):
                key.append((_run_colour(i), f"{i + 1} {run.name}"))
                _line(axes, x * (per_step[i] if by_tokens else 1), y, _run_colour(i), points, smooth, raw=False)
        return _chart(figure, HALF, title, caption, key) if key else None

    def held_out(role):
        return lambda run: _series(run.evals, lambda row: _mean(run.values(role, _sources(row.get("sources")),
                                                                          run.metric)))

    return _with_svg([
        _chart_scatter(runs),
        overlay("Domain, held out", f"{units}, mean over domain sources; lower is better.", held_out("domain")),
        overlay("General, held out", f"{units}, mean over general sources; its rise is forgetting.",
                held_out("general")),
        overlay("Training loss", "Nats per token over all sources, moving mean; mixes may differ, so this shows the "
                "course of a run and not its merit.",
                lambda run: _series(run.train, lambda row: row.get("loss")), smooth=True),
    ], "across")


def _run_colour(i: int) -> str:
    return RUNS[i % len(RUNS)]


def _chart_scatter(runs: list) -> dict | None:
    known = [(i, run.forgetting * 100, run.domain_gain * 100) for i, run in enumerate(runs)
             if math.isfinite(run.overall)]
    if not known:
        return None
    figure, axes = _axes(HALF, "forgetting, %")
    xs, ys = [x for _, x, _ in known], [y for _, _, y in known]
    left, right, room = min(-1, min(xs) - 1.5), max(12, max(xs) + 1.5), max(max(ys) - min(ys), 4) * 0.35
    axes.set_xlim(left, right)
    axes.set_ylim(min(ys) - room, max(ys) + room)
    axes.set_ylabel("domain gain, %")
    for a, b, grade in ((left, 5, "good"), (5, 10, "warning"), (10, right, "bad")):
        axes.axvspan(a, b, color=_hex(grade), alpha=0.08, linewidth=0)
    best = max(run.overall for run in runs if math.isfinite(run.overall)) * 100
    axes.plot([left, 5, right], [best, best, best + right - 5], color=_hex("muted"), linewidth=0.9, linestyle=DASHED)
    for i, x, y in known:
        axes.plot(x, y, "o", markersize=11, color=_hex(_run_colour(i)), markeredgecolor="none")
        axes.annotate(str(i + 1), (x, y), color=_hex("card"), ha="center", va="center_baseline", fontsize=7,
                      weight="bold")
    return _chart(figure, HALF, "Domain gain against forgetting", "Per cent; up and to the left is better. Bands: "
                  "good, warning, bad. Dashed: as good an overall score as the best run's.",
                  [(_run_colour(i), f"{i + 1} {runs[i].name}") for i, _, _ in known])


# --- the page -------------------------------------------------------------------------------------------------------

def render(runs: list) -> str:
    """The whole page for one or several runs, as HTML text that loads nothing from anywhere."""
    best = max((run for run in runs if math.isfinite(run.overall)), key=lambda run: run.overall, default=None)
    lead = [(f"{best.name} scores best of {_count(len(runs), 'run')}. ", ""), *verdict(best)] if best else [
        (f"None of the {len(runs)} runs can be ranked yet: gain or forgetting is unknown.", "")]
    with matplotlib.rc_context(STYLE):
        points = 400 if len(runs) == 1 else max(60, 900 // len(runs))
        views = [_view(run, i, points) for i, run in enumerate(runs)]
        across = charts_across(runs, 300) if len(runs) > 1 else []
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(views=views, across=across, palette=PALETTE, style=Markup(CSS),
                                                    plain=_plain, best=best, lead=lead, notes=_comparability(runs))


def _comparability(runs: list) -> list:
    """What a reader should know before comparing these runs."""
    notes = []
    if len({json.dumps(run.protocol, sort_keys=True) for run in runs}) > 1:
        notes.append("These runs were not evaluated under the same protocol: compare their values with care.")
    if len({run.metric for run in runs}) > 1:
        notes.append("Some runs carry no bits per byte and are shown in nats per predicted token: "
                     "only the relative changes compare.")
    if len({str(run.sources) for run in runs}) > 1:
        notes.append("These runs do not have the same sources.")
    return notes


def _view(run: Run, index: int, points: int) -> dict:
    """Everything the template shows of one run, already in words."""
    start, rows, grade, pairs = run.start, _table(run), _grade(run.forgetting), _pairs(run)
    total, trainable, size, began = (_number(start.get(key)) for key in (
        "total_steps", "trainable_parameters", "parameters", "time"))
    share = f" ({trainable / size * 100:.3g} %)" if math.isfinite(trainable / (size or math.nan)) else ""
    speed = _series(run.train, lambda row: row.get("tokens_per_second"))[1]
    tokens = _series(run.train, lambda row: row.get("tokens"))[1]
    steps = [row["step"] for row in run.samples[:1] + run.samples[1:][-1:]]
    evaluated = max((row["step"] for row in run.evals), default=run.step)
    return {
        "run": run, "number": index + 1, "colour": _run_colour(index), "verdict": verdict(run),
        "unit": UNITS[run.metric], "grade": grade, "meaning": _meaning(run),
        "advice": ADVICE["forgetting"] if grade == "bad" else "",
        "status": "finished" if run.finished else "still going", "gain_grade": _gain_grade(run.domain_gain),
        "gain": _percent(run.domain_gain), "overall": _percent(run.overall, signed=True),
        "forgetting": _unknown(run) if grade == "unknown" else _percent(run.forgetting),
        "gauge": f"{min(max(run.forgetting, 0), 0.15) / 0.15 * 100:.1f}",
        "tokens": _short(tokens[-1]) if len(tokens) else "–",
        "speed": _short(float(np.median(speed))) if len(speed) else "–",
        "facts": [
            ("parameters", _short(size)), ("trainable", _short(trainable) + share),
            ("steps", f"{run.step:,}" + (f" of {total:,.0f}" if math.isfinite(total) else "")),
            ("tokens a step", _short(start.get("tokens_per_step"))),
            ("device", " ".join(str(start[key]) for key in ("device", "precision") if key in start) or "–"),
            ("started", f"{datetime.fromtimestamp(began, UTC):%Y-%m-%d %H:%M} UTC" if math.isfinite(began) else "–"),
        ],
        "rows": rows, "has": {key: any(row[key] for row in rows) for key in rows[0]} if rows else {},
        "now": "after" if run.finished else f"at step {evaluated:,}",
        "means": [" → ".join(_decimal(_mean(run.values(role, side, run.metric))) for side in (run.before, run.after))
                  for role in ("domain", "general")],
        "charts": charts(run, points, f"run{index}"), "samples": pairs[:12], "n_samples": len(pairs),
        "sampled_at": " and ".join(f"step {step:,}" for step in steps),
        "sample_names": ["before" if not step else "after" if run.finished else f"step {step:,}" for step in steps],
        "events": [(row.get("step", "–"), row.get("message") or "resumed") for row in run.events][-200:],
        "protocol": " · ".join(f"{k.replace('_', ' ')}: {_flat(v)}" for k, v in run.protocol.items()),
        "versions": " · ".join(f"{k} {_flat(v)}" for k, v in _dict(start.get("versions")).items()),
    }


def _table(run: Run) -> list:
    """The before/after table, a dict of texts a source; an empty text where the files do not say."""
    last = {}
    for row in run.train:
        last.update(_sources(row.get("sources")))
    widest = max([abs(run.change(name)) for name in run.sources if math.isfinite(run.change(name))], default=0)

    def known(words, *values):
        return " → ".join(words(value) for value in values if math.isfinite(_number(value)))

    rows = []
    for name, role in run.sources.items():
        base, now, trained = (_dict(side.get(name)) for side in (run.before, run.after, last))
        change = run.change(name)
        width = abs(change) / widest * 50 if widest and math.isfinite(change) else 0
        rows.append({
            "name": name, "role": role, "colour": run.colours[name],
            "grade": _gain_grade(-change) if role == "domain" else _grade(change),
            "before": known(_decimal, base.get(run.metric)), "after": known(_decimal, now.get(run.metric)),
            "change": known(lambda value: _percent(value, signed=True), change),
            "left": f"{50 - width if change < 0 else 50:.1f}", "width": f"{width:.1f}",
            "perplexity": known(lambda value: _decimal(value, 2), base.get("perplexity"), now.get("perplexity")),
            "accuracy": known(_percent, base.get("accuracy"), now.get("accuracy")),
            "tokens": known(_short, trained.get("tokens")),
            "epochs": known(lambda value: "< 0.01" if 0 < value < 0.01 else _decimal(value, 2), trained.get("epochs")),
        })
    return rows


def _pairs(run: Run) -> list:
    """[(prompt, [first continuation, last continuation])]; one text a row when only one step was sampled."""
    sides = []
    for row in run.samples[:1] + run.samples[1:][-1:]:
        sides.append({})
        for sample in row["samples"] if isinstance(row.get("samples"), list) else []:
            prompt, text = (str(_dict(sample).get(key, "")) for key in ("prompt", "text"))
            text = text.removeprefix(prompt).rstrip()
            text = text if len(text) <= 3000 else f"{text[:3000]} … ({len(text) - 3000:,} more characters)"
            sides[-1].setdefault(prompt, []).append(text)
    prompts = dict.fromkeys(prompt for side in sides for prompt in side)
    return [(prompt, texts) for prompt in prompts
            for texts in zip_longest(*(side.get(prompt, []) for side in sides), fillvalue="–")]


CSS = """
*{box-sizing:border-box} html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 "Inter","Segoe UI",Roboto,"Helvetica Neue",Arial,
"Liberation Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:44px 28px 72px}
h1{font-size:clamp(1.6rem,3.4vw,2.35rem);line-height:1.22;letter-spacing:-.018em;font-weight:680;margin:.35em 0 .4em;
max-width:26em;text-wrap:balance}
h1 b{font-weight:inherit;white-space:nowrap} h1 .unknown{color:inherit}
h2{font-size:1.16rem;letter-spacing:-.008em;margin:2.6em 0 .7em;font-weight:660}
h2 small{font-weight:400;color:var(--muted);font-size:.86rem;margin-left:.5em;letter-spacing:0}
p{margin:.4em 0;max-width:46em} .lead{font-size:1.06rem;color:var(--muted)}
.over{display:flex;flex-wrap:wrap;gap:.3em .9em;align-items:baseline;color:var(--muted);font-size:.9rem}
.over b{color:var(--ink);font-weight:640}
.chip{border-radius:99px;padding:.05em .7em;font-size:.8rem;border:1px solid currentColor;white-space:nowrap}
.good{color:var(--good)}.warning{color:var(--warning)}.bad{color:var(--bad)}.unknown{color:var(--muted)}
.advice{border-left:3px solid var(--bad);background:var(--card);padding:.7em 1.1em;margin:1.1em 0;
border-radius:0 8px 8px 0;max-width:none}
.note{color:var(--muted);font-size:.92rem;border-left:3px solid var(--line);padding-left:.9em}
.plain{border:0;padding:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px;margin:1.8em 0 0}
.tile,figure,.sample,.scroll{background:var(--card);border:1px solid var(--line);border-radius:12px}
.tile{padding:15px 18px 16px} .tile span{display:block;color:var(--muted);font-size:.84rem}
.tile .fine{white-space:nowrap;font-size:.8rem}
.tile strong{display:block;font-size:1.72rem;font-weight:660;letter-spacing:-.02em;line-height:1.3}
.tile strong.small{font-size:1.02rem;line-height:1.35;letter-spacing:0;padding:.42rem 0}
.gauge{position:relative;height:6px;border-radius:3px;margin:7px 0 8px;opacity:.95;background:linear-gradient(90deg,
var(--good) 0 33%,var(--card) 33% 34%,var(--warning) 34% 66%,var(--card) 66% 67%,var(--bad) 67%)}
.gauge i{position:absolute;top:-4px;width:4px;height:14px;margin-left:-2px;border-radius:2px;background:var(--ink);
box-shadow:0 0 0 2px var(--card)}
.scroll{overflow-x:auto} table{border-collapse:collapse;width:100%;font-size:.93rem}
th,td{padding:.58em 1em;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
thead th{border-top:0;font-weight:500;color:var(--muted);font-size:.82rem;vertical-align:bottom;line-height:1.3}
th:first-child,td:first-child{text-align:left} td.name{font-weight:600} td small{color:var(--muted);font-weight:400}
tr.best td{background:color-mix(in srgb,var(--good) 7%,transparent)}
.swatch{display:inline-block;width:.72em;height:.72em;border-radius:3px;margin-right:.5em;background:var(--c)}
.graph{text-align:left;padding-left:0}
.disc{display:inline-grid;place-items:center;width:1.55em;height:1.55em;border-radius:50%;background:var(--c);color:var(--card);
font-size:.76rem;font-weight:700;margin-right:.6em}
.bar{position:relative;display:inline-block;width:120px;height:9px;vertical-align:middle;background:linear-gradient(
var(--muted),var(--muted)) center/1px 17px no-repeat}
.bar i{position:absolute;top:0;bottom:0;background:currentColor;border-radius:2px;opacity:.8}
.charts{display:grid;grid-template-columns:repeat(6,minmax(0,1fr));gap:16px}
figure{margin:0;padding:15px 16px 12px;grid-column:span 6;display:flex;flex-direction:column}
@media(min-width:760px){figure.half{grid-column:span 3}figure.third{grid-column:span 2}
.pair{grid-template-columns:1fr 1fr}}
figure h3{margin:0;font-size:.97rem;font-weight:640} figure svg{width:100%;height:auto;display:block;margin:6px 0 4px}
figcaption{color:var(--muted);font-size:.81rem;line-height:1.45;margin-top:auto}
.key{color:var(--muted);font-size:.81rem;display:flex;flex-wrap:wrap;gap:.1em 1.1em;margin-top:.15em}
.key span,td.name{overflow-wrap:anywhere}
svg text{font-family:inherit!important;font-variant-numeric:tabular-nums} svg *{stroke-linejoin:round}
.sample{margin:0 0 14px;padding:15px 18px}
.sample .prompt{font-weight:600;white-space:pre-wrap;overflow-wrap:anywhere;margin:0 0 .7em;max-width:none}
.pair{display:grid;gap:20px} .pair h4{margin:0 0 .25em;font-size:.8rem;font-weight:500;color:var(--muted)}
.pair div div{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.94rem;max-height:22em;overflow:auto}
details{margin:0 0 10px} summary{cursor:pointer;padding:.35em 0;font-weight:560}
summary small{color:var(--muted);font-weight:400}
details.run{border-top:1px solid var(--line);padding:.5em 0} details.run>summary{padding:.5em 0}
pre{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:15px 18px;overflow:auto;
font:.84rem/1.55 ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;margin:.4em 0}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,max-content));gap:.7em 2em;margin:1.5em 0 0}
dt{color:var(--muted);font-size:.8rem} dd{margin:0;font-size:.95rem}
footer{color:var(--muted);font-size:.84rem;margin-top:2.6em} footer p{max-width:none}
@media print{main{max-width:none;padding:0}figure,.tile,.sample{break-inside:avoid}}
"""

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ views | map(attribute="run.name") | join(", ") }} · nanoCPT report</title>
<style>
:root{ {% for name, (light, dark) in palette.items() %}--{{ name }}:{{ light }};{% endfor %}}
@media(prefers-color-scheme:dark){:root{
{%- for name, (light, dark) in palette.items() %}--{{ name }}:{{ dark }};{% endfor %}}}
{{ style }}</style></head><body><main>
{% macro say(pieces) %}{% for text, class in pieces %}{% if class %}<b class="{{ class }}">{{ text }}</b>
{%- else %}{{ text }}{% endif %}{% endfor %}{% endmacro %}

{% macro figures(charts) %}<div class="charts">
{% for chart in charts %}<figure class="{{ chart.size }}"><h3>{{ chart.title }}</h3>
{% if chart.key %}<div class="key">{% for colour, text in chart.key %}
<span><i class="swatch" style="--c:var(--{{ colour }})"></i>{{ text }}</span>{% endfor %}</div>{% endif %}
{{ chart.svg }}<figcaption>{{ chart.caption }}</figcaption></figure>
{% endfor %}</div>{% endmacro %}

{% macro body(v) %}
{% if v.meaning %}<p class="lead">{{ v.meaning }}</p>{% endif %}
{% if v.advice %}<p class="advice"><b class="bad">What helps:</b> {{ v.advice }}.</p>{% endif %}
{% for note in v.run.notes %}<p class="note">{{ note }}</p>{% endfor %}
<div class="tiles">
<div class="tile"><span>Domain gain</span><strong class="{{ v.gain_grade }}">{{ v.gain }}</strong>
<span>fall of {{ v.unit }}</span></div>
<div class="tile"><span>Forgetting</span>
{% if v.grade != "unknown" %}<strong class="{{ v.grade }}">{{ v.forgetting }}</strong>
<div class="gauge"><i style="left:{{ v.gauge }}%"></i></div><span class="fine">good below 5 %, bad above 10 %</span>
{% else %}<strong class="small unknown">{{ v.forgetting }}</strong>
<span class="fine">good below 5 %, bad above 10 %</span>{% endif %}</div>
<div class="tile"><span>Overall score</span><strong>{{ v.overall }}</strong>
<span>gain − max(0, forgetting − 5 %)</span></div>
<div class="tile"><span>Trained on</span><strong>{{ v.tokens }}</strong>
<span>tokens, at {{ v.speed }} a second</span></div>
</div>
<dl>{% for name, value in v.facts %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>

<h2>{{ "Before and after" if v.has.change else "By source" }} <small>{{ v.unit }}, lower is better</small></h2>
<div class="scroll"><table><thead><tr><th>source</th>
{% if v.has.before %}<th>before</th>{% endif %}{% if v.has.after %}<th>{{ v.now }}</th>{% endif %}
{% if v.has.change %}<th>change</th><th></th>{% endif %}
{% if v.has.perplexity %}<th>perplexity</th>{% endif %}{% if v.has.accuracy %}<th>accuracy</th>{% endif %}
{% if v.has.tokens %}<th>tokens trained</th>{% endif %}
{% if v.has.epochs %}<th>epochs</th>{% endif %}</tr></thead><tbody>
{% for row in v.rows %}<tr><td class="name"><i class="swatch" style="--c:var(--{{ row.colour }})"></i>{{ row.name }}
{% if row.role != row.name %}<small>{{ row.role }}</small>{% endif %}</td>
{% if v.has.before %}<td>{{ row.before or "–" }}</td>{% endif %}
{% if v.has.after %}<td>{{ row.after or "–" }}</td>{% endif %}
{% if v.has.change %}<td class="{{ row.grade }}">{{ row.change or "–" }}</td>
<td class="graph {{ row.grade }}">{% if row.change %}<span class="bar">
<i style="left:{{ row.left }}%;width:{{ row.width }}%"></i></span>{% endif %}</td>{% endif %}
{% if v.has.perplexity %}<td>{{ row.perplexity or "–" }}</td>{% endif %}
{% if v.has.accuracy %}<td>{{ row.accuracy or "–" }}</td>{% endif %}
{% if v.has.tokens %}<td>{{ row.tokens or "–" }}</td>{% endif %}
{% if v.has.epochs %}<td>{{ row.epochs or "–" }}</td>{% endif %}
</tr>{% endfor %}</tbody></table></div>

{% if v.charts %}<h2>Curves</h2>{{ figures(v.charts) }}{% endif %}

{% if v.samples %}<h2>Samples <small>at {{ v.sampled_at }}
{%- if v.n_samples > v.samples | length %}; the first {{ v.samples | length }} of {{ v.n_samples }}{% endif -%}
</small></h2>
{% for prompt, texts in v.samples %}<div class="sample"><p class="prompt">{{ prompt }}</p><div class="pair">
{% for text in texts %}<div><h4>{{ v.sample_names[loop.index0] }}</h4><div>{{ text }}</div></div>
{% endfor %}</div></div>
{% endfor %}{% endif %}

<h2>The run</h2>
{% if v.events %}<details><summary>Events <small>{{ v.events | length }}</small></summary>
<pre>{% for step, message in v.events %}step {{ step }}: {{ message }}
{% endfor %}</pre></details>{% endif %}
{% if v.run.config %}<details><summary>Configuration <small>config.toml</small></summary>
<pre>{{ v.run.config }}</pre></details>{% endif %}
<footer>{% if v.protocol %}<p>Evaluation protocol: {{ v.protocol }}</p>{% endif %}
{% if v.versions %}<p>Versions: {{ v.versions }}</p>{% endif %}</footer>
{% endmacro %}

{% if views | length > 1 %}
<div class="over"><span>nanoCPT report</span><b>{{ views | length }} runs</b></div>
<h1>{{ say(lead) }}</h1>
{% for note in notes %}<p class="note">{{ note }}</p>{% endfor %}
<h2>Comparison <small>overall score = domain gain − max(0, mean forgetting − 5 %)</small></h2>
<div class="scroll"><table><thead><tr><th>run</th><th>domain<br>before → after</th><th>general<br>before → after</th>
<th>domain gain</th><th>forgetting</th><th>overall score</th><th>tokens</th></tr></thead><tbody>
{% for v in views %}<tr{% if v.run is sameas best %} class="best"{% endif %}><td class="name">
<span class="disc" style="--c:var(--{{ v.colour }})">{{ v.number }}</span>
{{- v.run.name }} {% if v.status != "finished" %}<small>{{ v.status }}</small>{% endif %}</td>
{% for mean in v.means %}<td>{{ mean }}</td>{% endfor %}
<td class="{{ v.gain_grade }}">{{ v.gain }}</td>
<td class="{{ v.grade }}">{{ v.forgetting }}</td><td>{{ v.overall }}</td>
<td>{{ v.tokens }}</td></tr>
{% endfor %}</tbody></table></div>
<p class="note plain">Domain and general: {{ views | map(attribute="unit") | unique | join(" or ") }},
mean over the sources. Gain and forgetting are means of each source's relative change;
forgetting below 5 % good, below 10 % a warning, above bad.</p>
<h2>Across the runs</h2>{{ figures(across) }}
<h2>Run by run</h2>
{% for v in views %}<details class="run"><summary>
<span class="disc" style="--c:var(--{{ v.colour }})">{{ v.number }}</span>
{{- v.run.name }} <small>{{ plain(v.verdict) }}</small></summary>{{ body(v) }}</details>{% endfor %}
{% else %}{% set v = views[0] %}
<div class="over"><span>nanoCPT report</span><b>{{ v.run.name }}</b>
<span class="chip {{ "good" if v.status == "finished" else "warning" }}">{{ v.status }}</span></div>
<h1>{{ say(v.verdict) }}</h1>
{{ body(v) }}
{% endif %}
</main></body></html>
"""


def main(argv: list | None = None) -> int:
    """Command line. Errors are ValueError or OSError, each with a remedy."""
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = _refuse
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run folder, such as out/demo")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="where to write (default: RUN[0]/report.html)")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "report.html"
    if out.is_dir():
        raise ValueError(f"--out '{out}' is a folder: name a file, such as {out / 'report.html'}")
    runs = [read_run(folder) for folder in args.runs]
    page = render(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    for run in runs:
        print(f"{run.name}: {_plain(verdict(run))}")
    print(f"wrote {out} ({len(page) / 1e6:.2f} MB)")
    return 0


def _refuse(message: str):
    raise ValueError(f"{message} (report.py --help shows how it is called)")


if __name__ == "__main__":
    import sys

    from core.config import main_guard
    sys.exit(main_guard(main))
