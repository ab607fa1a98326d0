"""After a run: a run folder in, one self-contained HTML page out. It reads files only and needs no network.

    python report.py out/legal                                  writes out/legal/report.html
    python report.py out/replay out/lora --out compare.html     several runs on one page

Read from each folder: metrics.jsonl (required), eval.json, config.toml. A run that is still going, was killed or was
resumed is shown as far as it got. Gain, forgetting and overall score are those of measure/verdict.py.
"""

import json
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path

import jinja2
import numpy as np

from core import cli
from core.errors import UserError
from core.files import write_text
from measure import charts, verdict
from measure.charts import DOMAIN, GENERAL, RUNS, decimal, short
from measure.verdict import ADVICE, UNITS, finite, mean

# ---- reading a run folder

@dataclass
class Run:
    """What a run folder says. The lines of metrics.jsonl stay the dicts they are, one per step, by rising step."""
    folder: Path
    start: dict = field(default_factory=lambda: {"sources": {}})
    train: list = field(default_factory=list)      # lines of kind "train"
    evals: list = field(default_factory=list)      # lines of kind "eval"
    samples: list = field(default_factory=list)    # the first and the last line of kind "samples"
    events: list = field(default_factory=list)     # kinds "event" and "resume", in the order of the file
    before: dict = field(default_factory=dict)     # {source: scores} at step 0; empty: no baseline
    after: dict = field(default_factory=dict)      # {source: scores} of the last evaluation
    protocol: dict = field(default_factory=dict)
    config: str = ""
    finished: bool = False
    notes: list = field(default_factory=list)      # what is wrong with the files, in sentences
    number: int = 1                                # its place on the page

    name = property(lambda run: str(run.start.get("run") or run.folder.resolve().name))
    step = property(lambda run: max([row["step"] for row in run.train[-1:] + run.evals[-1:]], default=0))
    colour = property(lambda run: RUNS[(run.number - 1) % len(RUNS)])
    # The metric in words, and three fractions; None where they cannot be known.
    unit = property(lambda run: UNITS[run.metric])
    domain_gain = property(lambda run: run.comparison["domain_gain"])
    forgetting = property(lambda run: run.comparison["forgetting"])
    overall = property(lambda run: run.comparison["score"])

    @cached_property
    def metric(self) -> str:
        """The score that is compared: bits per byte; nats per predicted token where a source (masked LM) has none."""
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
        warm, cool = cycle(DOMAIN), cycle(GENERAL)
        return {name: next(warm if role == "domain" else cool) for name, role in self.sources.items()}

    def mean_over(self, role: str, scores: dict, column: str) -> float | None:
        """Mean of one column of an evaluation {source: scores} over the sources of a role that have it."""
        return mean(finite(scores.get(name, {}).get(column)) for name in self.names_of(role))

    @cached_property
    def comparison(self) -> dict:
        """measure/verdict.py's comparison of the last evaluation with the one at step 0."""
        return verdict.compare(self.before, self.after, self.names_of("general"), self.names_of("domain"), self.metric)


def read_run(folder) -> Run:
    """Read a run folder; a UserError with a remedy where there is nothing to show.

    A step that stands twice (a resumed run) counts once, as written last. What was logged past the step that a run was
    resumed from is dropped, because that work was undone. Lines that are not JSON (a killed run may cut its last one)
    are left out, with a note.
    """
    folder = Path(folder)
    path = folder / "metrics.jsonl"
    if not path.is_file():
        what = "holds no metrics.jsonl" if folder.is_dir() else "is no folder" if folder.exists() else "does not exist"
        raise UserError(f"run folder '{folder}' {what}: give the folder that train.py wrote, such as out/demo")
    run = Run(folder)
    read_metrics(run, path)
    if (folder / "config.toml").is_file():
        run.config = (folder / "config.toml").read_text(encoding="utf-8", errors="replace")
    read_evaluation(run, folder / "eval.json")
    if not (run.train or run.evals or run.after):
        raise UserError(f"nothing to show: '{path}' holds no training step and no evaluation yet; "
                        "try again after the run's first log line")
    return run


def read_metrics(run: Run, path: Path) -> None:
    """Fill start, train, evals, samples and events from metrics.jsonl."""
    kinds, unreadable = {"train": {}, "eval": {}, "samples": {}}, []
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            kind = row["kind"] = str(row["kind"])
            if kind in kinds:
                row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError, OverflowError):
            unreadable += [number] if line.strip() else []
            continue
        row["sources"] = sources_in(row.get("sources"))
        if kind in kinds:
            kinds[kind][row["step"]] = row
        elif kind == "start":
            run.start = row
        elif kind in ("event", "resume"):
            run.events.append(row)
        if kind == "resume" and (resumed_at := finite(row.get("step"))) is not None:
            kinds = {name: {step: row for step, row in rows.items() if step <= resumed_at}
                     for name, rows in kinds.items()}
    run.train, run.evals, samples = ([rows[step] for step in sorted(rows)] for rows in kinds.values())
    run.samples = samples[:1] + samples[1:][-1:]
    if unreadable == [len(lines)]:
        run.notes.append("The last line of metrics.jsonl is cut (a run stopped while writing it) and was ignored.")
    elif unreadable:
        count = f"{len(unreadable):,} line" + ("s" if len(unreadable) > 1 else "")
        run.notes.append(f"{count} of metrics.jsonl could not be read: left out (first: line {unreadable[0]}).")


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


def utc(seconds) -> str:
    """Seconds since 1970 as a date and a time; a dash where they are unknown."""
    seconds = finite(seconds)
    return "–" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


# ---- the page

def render(runs: list):
    """The filled template: str() of it is the page for one or several runs, which loads nothing from anywhere, and
    `headline(run)` the sentence about a run as markup."""
    # Autoescape: whatever stands in a run's files reaches the page as text, never as markup.
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True)
    filters = (finite, percent, decimal, short, utc, verdict.grade_gain, verdict.grade_forgetting, np.median,
               charts.logged, charts.draw_run, source_table, sample_pairs)
    environment.filters |= {function.__name__: function for function in filters}
    environment.filters["json"] = partial(json.dumps, ensure_ascii=False)
    for number, run in enumerate(runs, 1):
        run.number = number
    return environment.get_template("report.html.j2").make_module({
        "runs": runs, "advice": ADVICE, "flat": verdict.FLAT,
        "across": charts.draw_comparison(runs) if len(runs) > 1 else []})


def source_table(run: Run) -> tuple[list, set]:
    """([{column: value} of each source], columns with a value); None or [] where the files do not say."""
    trained = {}
    for row in run.train:
        trained |= row["sources"]
    rows = []
    for name, role in run.sources.items():
        sides = [side.get(name, {}) for side in (run.before, run.after)]
        rows.append({
            "name": name, "role": role, "change": run.comparison["change"].get(name),
            **{side: finite(scores.get(run.metric)) for side, scores in zip(("before", "after"), sides)},
            **{column: [side[column] for side in sides if finite(side.get(column)) is not None]
               for column in ("perplexity", "accuracy")},
            **{column: finite(trained.get(name, {}).get(column)) for column in ("tokens", "epochs")},
        })
    return rows, {key for row in rows for key, value in row.items() if value not in (None, [])}


def sample_pairs(run: Run) -> list:
    """[(prompt, [first continuation, last continuation])]; one text each when only one step was sampled."""
    sides = []
    for row in run.samples:
        samples = map(dict_or_empty, row["samples"] if isinstance(row.get("samples"), list) else [])
        sides.append({str(sample.get("prompt", "")): str(sample.get("text", "")) for sample in samples})
    pairs = []
    for prompt in dict.fromkeys(prompt for side in sides for prompt in side):
        # The prompt stands once above both continuations.
        texts = [side.get(prompt, "–").removeprefix(prompt).rstrip() for side in sides]
        pairs.append((prompt, [text if len(text) <= 3000 else f"{text[:3000]} … ({len(text) - 3000:,} more characters)"
                               for text in texts]))
    return pairs


@dataclass(kw_only=True)
class Report:
    """Make one HTML page of one or several run folders."""
    runs: cli.Positional[list[str]]
    """Run folders, such as out/demo."""
    out: str | None = None
    """The file to write (default: report.html in the first run folder)."""


def write_report(options: Report) -> dict:
    """Write the page and print each run's headline; returns the file and the comparison of each run."""
    out = Path(options.out or Path(options.runs[0]) / "report.html")
    runs = [read_run(folder) for folder in options.runs]
    page = render(runs)
    write_text(out, str(page))
    for run in runs:
        print(f"{run.name}: {page.headline(run).striptags()}")
    print(f"wrote {out} ({len(str(page)) / 1e6:.2f} MB)")
    return {"out": str(out), "runs": [{"run": run.name, **run.comparison} for run in runs]}


def main() -> int:
    return cli.run("report.py", __doc__, (Report, write_report))


if __name__ == "__main__":
    sys.exit(main())
