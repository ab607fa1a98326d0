"""After a run: a run folder in, one self-contained HTML page out. It reads files only and needs no network.

    python report.py out/legal                                  writes out/legal/report.html
    python report.py out/replay out/lora --out compare.html     several runs on one page

Read from each folder: metrics.jsonl (required), eval.json, config.toml. A run that is still going, was killed or was
resumed is shown as far as it got. Gain, forgetting and overall score are those of measure/verdict.py.

A masked-LM run may carry no bits per byte; then the same arithmetic is done on nats per predicted token, and said so.
"""

import json
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

import jinja2
import numpy as np

from core import cli
from core.cli import Positional
from core.errors import UserError
from core.files import write_text
from measure import charts, verdict
from measure.charts import DOMAIN, GENERAL, decimal, short
from measure.verdict import ADVICE, UNITS, finite, mean

TEMPLATE = Path(__file__).with_name("report.html.j2")


# ---- reading a run folder

@dataclass
class Run:
    """What a run folder says. The lines of metrics.jsonl stay the dicts they are, one per step, by rising step."""
    folder: Path
    name: str
    start: dict = field(default_factory=dict)
    train: list = field(default_factory=list)      # lines of kind "train"
    evals: list = field(default_factory=list)      # lines of kind "eval"
    samples: list = field(default_factory=list)    # lines of kind "samples"
    events: list = field(default_factory=list)     # kinds "event" and "resume", in the order of the file
    before: dict = field(default_factory=dict)     # {source: scores} at step 0; empty: no baseline
    after: dict = field(default_factory=dict)      # {source: scores} of the last evaluation
    protocol: dict = field(default_factory=dict)
    config: str = ""
    finished: bool = False
    notes: list = field(default_factory=list)      # what is wrong with the files or the run, a sentence each

    @property
    def step(self) -> int:
        return max([row["step"] for row in self.train[-1:] + self.evals[-1:]], default=0)

    @cached_property
    def metric(self) -> str:
        """The score that is compared: bits per byte wherever every evaluated source has it."""
        rows = [*self.before.values(), *self.after.values()]
        has_bits = all(finite(row.get("bits_per_byte")) is not None for row in rows)
        return "bits_per_byte" if has_bits else "nats_per_token"

    @cached_property
    def sources(self) -> dict:
        """{source: role}, domain first, then general, then what has no role."""
        roles = {}
        for sources in (self.start["sources"], *(row["sources"] for row in self.train), self.before, self.after):
            for name, fields in sources.items():
                roles[name] = fields.get("role") or roles.get(name, "")
        return dict(sorted(roles.items(), key=lambda item: {"domain": 0, "general": 1}.get(str(item[1]), 2)))

    def names_of(self, role: str) -> list:
        return [name for name, its_role in self.sources.items() if its_role == role]

    @cached_property
    def colours(self) -> dict:
        """{source: colour's name}: warm for the domain, cool for everything else."""
        warm = self.names_of("domain")
        cool = [name for name in self.sources if name not in warm]
        return {name: palette[i % len(palette)]
                for names, palette in ((warm, DOMAIN), (cool, GENERAL)) for i, name in enumerate(names)}

    def values(self, role: str, side: dict, column: str) -> list:
        """One column of an evaluation over the sources of a role; None where a source has no such value."""
        return [finite(side.get(name, {}).get(column)) for name in self.names_of(role)]

    @cached_property
    def comparison(self) -> dict:
        """measure/verdict.py's comparison of the last evaluation with the one at step 0."""
        return verdict.compare(self.before, self.after, self.names_of("general"), self.names_of("domain"), self.metric)

    # Fractions; None where they cannot be known.
    domain_gain = property(lambda run: run.comparison["domain_gain"])
    forgetting = property(lambda run: run.comparison["forgetting"])
    overall = property(lambda run: run.comparison["score"])


def read_run(folder) -> Run:
    """Read a run folder; a UserError with a remedy where there is nothing to show.

    A step that stands twice (a resumed run) counts once, as written last. What was logged past the step that a run was
    resumed from is dropped, because that work was undone. Lines that are not JSON (a killed run may cut its last one)
    are left out, with a note.
    """
    folder = Path(folder)
    path, remedy = folder / "metrics.jsonl", "give the folder that train.py wrote, such as out/demo"
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"run folder '{folder}' {what}: {remedy}")
    if not path.is_file():
        raise UserError(f"no metrics.jsonl in '{folder}': {remedy}")
    run = Run(folder, name=folder.resolve().name)
    read_metrics(run, path)
    run.name = str(run.start.get("run") or run.name)
    if (folder / "config.toml").is_file():
        run.config = (folder / "config.toml").read_text(encoding="utf-8", errors="replace")
    read_evaluation(run, folder / "eval.json")
    if not (run.train or run.evals or run.after):
        raise UserError(f"nothing to show: '{path}' holds no training step and no evaluation yet; "
                        "try again after the run's first log line")
    broken = [row["step"] for row in run.train if "loss" in row and finite(row["loss"]) is None]
    if broken:
        run.notes.append(f"The loss was not finite at {count(len(broken), 'logged step')} "
                         f"(first: step {broken[0]:,}). What helps: {ADVICE['nonfinite']}.")
    if run.finished and run.domain_gain is not None and abs(run.domain_gain) < verdict.FLAT:
        run.notes.append(f"The domain hardly moved. What helps: {ADVICE['flat']}.")
    return run


def read_metrics(run: Run, path: Path) -> None:
    """Fill start, train, evals, samples and events from metrics.jsonl."""
    kinds, unreadable, number = {"train": {}, "eval": {}, "samples": {}}, [], 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            row = parse_line(line)
            if row is None:
                unreadable += [number] if line.strip() else []
                continue
            row["sources"] = sources_in(row.get("sources"))
            if row["kind"] in kinds:
                kinds[row["kind"]][row["step"]] = row
            elif row["kind"] == "start":
                run.start = row
            elif row["kind"] in ("event", "resume"):
                run.events.append(row)
            resumed_at = finite(row.get("step")) if row["kind"] == "resume" else None
            if resumed_at is not None:
                kinds = {kind: {step: row for step, row in rows.items() if step <= resumed_at}
                         for kind, rows in kinds.items()}
    run.start.setdefault("sources", {})
    run.train, run.evals, run.samples = ([rows[step] for step in sorted(rows)] for rows in kinds.values())
    if unreadable == [number]:
        run.notes.append("The last line of metrics.jsonl is cut (a run stopped while writing it) and was ignored.")
    elif unreadable:
        run.notes.append(f"{count(len(unreadable), 'line')} of metrics.jsonl cannot be read and left out "
                         f"(first: line {unreadable[0]}).")


def parse_line(line: str) -> dict | None:
    """A line of metrics.jsonl with its kind as text and, in lines that belong to a step, the step as an integer."""
    try:
        row = json.loads(line)
        row["kind"] = str(row["kind"])
        if row["kind"] in ("train", "eval", "samples"):
            row["step"] = int(row["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    return row


def read_evaluation(run: Run, path: Path) -> None:
    """Fill before, after and protocol from eval.json, else from the first and the last evaluation in the metrics."""
    stated = {}
    if path.is_file():
        try:
            stated = dict_or_empty(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            run.notes.append("eval.json is not valid JSON and was ignored; the evaluations in metrics.jsonl are shown.")
    measured = {row["step"]: row["sources"] for row in run.evals}
    run.before = sources_in(stated.get("before")) or measured.get(0, {})
    run.after = sources_in(stated.get("after")) or next((measured[step] for step in reversed(measured) if step), {})
    protocols = [dict_or_empty(where.get("protocol")) for where in (stated, *reversed(run.evals))]
    run.protocol = next((protocol for protocol in protocols if protocol), {})
    total = finite(run.start.get("total_steps"))
    reached_end = total is not None and run.step >= total
    run.finished = bool(stated.get("after")) or (run.folder / "final").is_dir() or reached_end
    for key, ours in (("domain_gain", run.domain_gain), ("forgetting", run.forgetting)):
        theirs = finite(stated.get(key))
        if None not in (theirs, ours) and abs(theirs - ours) > 5e-4:
            run.notes.append(f"eval.json states a {key.replace('_', ' ')} of {percent(theirs)}; its values before and "
                             f"after give {percent(ours)}, which is what this page shows.")


def dict_or_empty(value) -> dict:
    """A file may hold anything where a dict should stand."""
    return value if isinstance(value, dict) else {}


def sources_in(value) -> dict:
    """{source: fields}, without entries that are no dicts."""
    return {name: fields for name, fields in dict_or_empty(value).items() if isinstance(fields, dict)}


# ---- words

def percent(value, signed: bool = False) -> str:
    """0.3104 -> '31.0 %'; a dash where the value is unknown."""
    value = finite(value)
    if value is None:
        return "–"
    text = f"{value * 100:{'+' if signed else ''}.1f}"
    return ("0.0" if float(text) == 0 else text.replace("-", "−")) + " %"


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def join_fields(fields: dict, between: str) -> str:
    """{"context": 512, ...} -> 'context: 512 · ...'."""
    texts = {key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
             for key, value in fields.items()}
    return " · ".join(f"{key.replace('_', ' ')}{between}{text}" for key, text in texts.items())


def utc(seconds) -> str:
    """Seconds since 1970 as a date and a time; a dash where they are unknown."""
    seconds = finite(seconds)
    return "–" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def why_unknown(run: Run) -> str:
    """Why forgetting is unknown."""
    if not run.before:
        return "unknown: no baseline"
    return "unknown: no general text was evaluated" if run.after else "unknown: not evaluated yet"


def headline(run: Run) -> list:
    """The one sentence about a run as (text, css class) pieces; the texts joined are the plain sentence."""
    total = finite(run.start.get("total_steps"))
    of_total = "" if total is None else f" of {total:,.0f}"
    so_far = "" if run.finished else f"So far, at step {run.step:,}{of_total}, "
    if not run.before:
        text = f"{so_far}gain and forgetting are unknown: no baseline, because nothing was evaluated at step 0."
        return [(text[0].upper() + text[1:], "")]
    if not run.after:
        return [("No verdict yet: only the baseline at step 0 has been evaluated.", "")]
    gain, lost, unit = run.domain_gain, run.forgetting, UNITS[run.metric]
    pieces = [(f"{so_far}the domain " if so_far else "The domain ", "")]
    if gain is None:
        pieces += [("was not evaluated", "")]
    else:
        pieces += [("gained " if gain >= 0 else "got worse by ", ""), (percent(abs(gain)), verdict.grade_gain(gain))]
    if lost is None:
        return [*pieces, (f", in {unit}; forgetting is {why_unknown(run)}.", "")]
    verb = "lost" if lost > 0 else "gained"
    return [*pieces, (f" and general text {verb} ", ""), (percent(abs(lost)), verdict.grade_forgetting(lost)),
            (f", in {unit}.", "")]


def plain(pieces: list) -> str:
    return "".join(text for text, _ in pieces)


# ---- the page

def render(runs: list) -> str:
    """The whole page for one or several runs, as HTML text that loads nothing from anywhere."""
    points = 400 if len(runs) == 1 else max(60, 900 // len(runs))
    # Autoescape: whatever stands in a run's files reaches the page as text, never as markup.
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"finite": finite, "percent": percent, "decimal": decimal, "short": short, "utc": utc,
                            "fields": join_fields, "plain": plain}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        views=[view_of(run, i, points) for i, run in enumerate(runs)], advice=ADVICE,
        across=charts.draw_comparison(runs, 300) if len(runs) > 1 else [])


def view_of(run: Run, index: int, points: int) -> dict:
    """What the template shows of one run and does not find in the run itself; None where a value is unknown."""
    def means(column):
        return {role: [mean(run.values(role, side, column)) for side in (run.before, run.after)]
                for role in ("domain", "general")}

    rows = source_rows(run)
    speed = charts.series(run.train, lambda row: row.get("tokens_per_second"))[1]
    tokens = charts.series(run.train, lambda row: row.get("tokens"))[1]
    return {
        "run": run, "number": index + 1, "colour": charts.colour_of_run(index), "headline": headline(run),
        "unit": UNITS[run.metric], "means": means(run.metric), "accuracy": means("accuracy"),
        "why_unknown": why_unknown(run), "grade": verdict.grade_forgetting(run.forgetting),
        "gain_grade": verdict.grade_gain(run.domain_gain),
        "rows": rows, "has": {key: any(row[key] not in (None, []) for row in rows) for key in rows[0]} if rows else {},
        "tokens": tokens[-1] if len(tokens) else None, "speed": np.median(speed) if len(speed) else None,
        "evaluated": max((row["step"] for row in run.evals), default=run.step),
        "charts": charts.draw_run(run, points, f"run{index}"), "samples": sample_pairs(run),
        "sampled": [row["step"] for row in first_and_last(run.samples)],
    }


def source_rows(run: Run) -> list:
    """The table of sources, a dict for each; None, or an empty list, where the files do not say."""
    trained = {}
    for row in run.train:
        trained.update(row["sources"])
    changes = run.comparison["change"]
    widest = max(map(abs, changes.values()), default=0)
    rows = []
    for name, role in run.sources.items():
        sides = [side.get(name, {}) for side in (run.before, run.after)]
        change = changes.get(name)
        # The bar starts in the middle of its field and goes left where the score fell.
        width = abs(change or 0) / widest * 50 if widest else 0
        gain = None if change is None else -change
        rows.append({
            "name": name, "role": role, "colour": run.colours[name],
            "grade": verdict.grade_gain(gain) if role == "domain" else verdict.grade_forgetting(change),
            "before": finite(sides[0].get(run.metric)), "after": finite(sides[1].get(run.metric)), "change": change,
            "left": 50 - width if (change or 0) < 0 else 50, "width": width,
            **{column: [side[column] for side in sides if finite(side.get(column)) is not None]
               for column in ("perplexity", "accuracy")},
            **{column: finite(trained.get(name, {}).get(column)) for column in ("tokens", "epochs")},
        })
    return rows


def first_and_last(rows: list) -> list:
    return rows[:1] + rows[1:][-1:]


def sample_pairs(run: Run) -> list:
    """[(prompt, [first continuation, last continuation])]; one text each when only one step was sampled."""
    sides = []
    for row in first_and_last(run.samples):
        side = {}
        for sample in row["samples"] if isinstance(row.get("samples"), list) else []:
            prompt, text = (str(dict_or_empty(sample).get(key, "")) for key in ("prompt", "text"))
            # The prompt stands once above both continuations.
            text = text.removeprefix(prompt).rstrip()
            text = text if len(text) <= 3000 else f"{text[:3000]} … ({len(text) - 3000:,} more characters)"
            side.setdefault(prompt, []).append(text)
        sides.append(side)
    prompts = dict.fromkeys(prompt for side in sides for prompt in side)
    return [(prompt, texts) for prompt in prompts
            for texts in zip_longest(*(side.get(prompt, []) for side in sides), fillvalue="–")]


# ---- command

@dataclass(kw_only=True)
class Report:
    """Make one HTML page of one or several run folders."""
    runs: Positional[list[str]]
    """Run folders, such as out/demo."""
    out: str | None = None
    """The file to write (default: report.html in the first run folder)."""


def write_report(options: Report) -> dict:
    """Write the page and print each run's headline; returns the file and the comparison of each run."""
    out = Path(options.out or Path(options.runs[0]) / "report.html")
    if out.is_dir():
        raise UserError(f"--out '{out}' is a folder: name a file, such as {out / 'report.html'}")
    runs = [read_run(folder) for folder in options.runs]
    page = render(runs)
    write_text(out, page)
    for run in runs:
        print(f"{run.name}: {plain(headline(run))}")
    print(f"wrote {out} ({len(page) / 1e6:.2f} MB)")
    return {"out": str(out), "runs": [{"run": run.name, **run.comparison} for run in runs]}


def main() -> int:
    return cli.run("report.py", __doc__, (Report, write_report))


if __name__ == "__main__":
    sys.exit(main())
