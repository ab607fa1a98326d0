"""After a run: a run folder in, one self-contained HTML page out. It reads files only and needs no network.

    python report.py out/legal                                  writes out/legal/report.html
    python report.py out/replay out/lora --out compare.html     several runs on one page

Read from each folder: metrics.jsonl (required), eval.json, eval_step_N.json, config.toml. A run that is still going,
was killed or was resumed is shown as far as it got. Gain, forgetting, overall score, how sure they are and the advice
are those of measure/verdict.py.
"""

import contextlib
import json
import math
import sys
import tomllib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path

import jinja2
import numpy as np

from core import cli
from core.errors import UserError
from core.files import file_holds, write_text
from core.output import escape
from measure import charts, verdict
from measure.charts import DOMAIN, GENERAL, RUNS, decimal, short
from measure.verdict import UNITS, finite, mean

# ---- reading a run folder

@dataclass
class Run:
    """What a run folder says. The lines of metrics.jsonl stay the dicts they are, one per step, by rising step."""
    folder: Path
    start: dict = field(default_factory=lambda: {"sources": {}})
    # Lines of kind "train".
    train: list = field(default_factory=list)
    # Lines of kind "eval".
    evals: list = field(default_factory=list)
    # The first and the last line of kind "samples".
    samples: list = field(default_factory=list)
    # Lines of the kinds "event", "resume", "left_out", "rewind" and "stop", in the order of the file.
    events: list = field(default_factory=list)
    # What adaptive replay decided: the lines of kind "replay".
    decisions: list = field(default_factory=list)
    # {source: scores} at step 0; empty: no baseline.
    before: dict = field(default_factory=dict)
    # {source: scores} of the last evaluation.
    after: dict = field(default_factory=dict)
    protocol: dict = field(default_factory=dict)
    # What the objective measured of held-out sequences: {"name", "before": {source: {measure: value}}, "after",
    # "warnings"}.
    objective: dict = field(default_factory=lambda: {"name": "", "before": {}, "after": {}, "warnings": []})
    # Which model was scored: {"before", "after"}.
    scored: dict = field(default_factory=dict)
    config: str = ""
    # The text of config.toml, parsed.
    settings: dict = field(default_factory=dict)
    finished: bool = False
    # What is wrong with the files, in sentences.
    notes: list = field(default_factory=list)
    # Its place on the page.
    number: int = 1

    name = property(lambda run: str(run.start.get("run") or run.folder.resolve().name))
    step = property(lambda run: max([row["step"] for row in run.train[-1:] + run.evals[-1:]], default=0))
    colour = property(lambda run: RUNS[(run.number - 1) % len(RUNS)])
    # The metric in words, and three fractions; None where they cannot be known.
    unit = property(lambda run: UNITS[run.metric])
    domain_gain = property(lambda run: run.comparison["domain_gain"])
    forgetting = property(lambda run: run.comparison["forgetting"])
    overall = property(lambda run: run.comparison["score"])
    interval = property(lambda run: run.comparison["interval"])
    # Runs are ranked where they began from the same base and were evaluated on the same texts.
    base = property(lambda run: dict_or_empty(run.start.get("base")))
    origin = property(lambda run: run.base.get("fingerprint") or dict_or_empty(run.settings.get("model")).get("path"))
    texts = property(lambda run: sorted((role, str((run.after or run.before).get(name, {}).get("bytes")))
                                        for name, role in run.sources.items()))

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
        values = [finite(scores.get(name, {}).get(column)) for name in self.names_of(role)]
        return mean([value for value in values if value is not None])

    @cached_property
    def trained(self) -> dict:
        """{source: fields} of the last line of the training log that each source stands in."""
        return {name: fields for row in self.train for name, fields in row["sources"].items()}

    @cached_property
    def seconds(self) -> float:
        """Time that the steps took. A line holds the mean since the line before it, the first that of one step."""
        steps, means = charts.logged(self, "step_ms")
        return float(np.sum(np.diff(steps, prepend=steps[0] - 1) * means)) / 1000 if len(steps) else 0.0

    @cached_property
    def comparison(self) -> dict:
        """measure/verdict.py's comparison of the last evaluation with the one at step 0."""
        return verdict.compare(self.before, self.after, self.names_of("general"), self.names_of("domain"), self.metric)

    @cached_property
    def score_draws(self):
        """The draws of the overall score; None where they are unknown."""
        drawn = {name: verdict.draw_changes(name, self.before[name], self.after[name])
                 for name in self.comparison["change"]}
        return verdict.summarise(drawn, self.names_of("general"), self.names_of("domain"))["score"]

    @cached_property
    def left_out(self) -> dict:
        """{step: why} of the steps whose updates were not made."""
        return {row.get("step"): row.get("message") for row in self.events if row["kind"] == "left_out"}

    @property
    def stopped(self) -> str | None:
        """Why the run stopped, where its own steps are the reason and it was not resumed."""
        last = next((row for row in reversed(self.events) if row["kind"] in ("resume", "stop")), {"kind": "resume"})
        return str(last.get("message")) if last["kind"] == "stop" else None

    @property
    def accidents(self) -> list:
        """What the steps went through, in sentences."""
        said, n = [], len(self.left_out)
        if n:
            said += [f"{n:,} update{' was' if n == 1 else 's were'} left out, the last one because "
                     f"{list(self.left_out.values())[-1]}"]
        if back := [row for row in self.events if row["kind"] == "rewind"]:
            said += [f"the run was rewound {'once' if len(back) == 1 else f'{len(back):,} times'}, the last time from "
                     f"step {back[-1].get('step')} to {back[-1].get('to')}"]
        return said + ([f"the run stopped: {self.stopped}"] if self.stopped else []) + self.objective["warnings"]

    @cached_property
    def evidence(self) -> verdict.Evidence:
        """What the advice is made from."""
        domain, tokens = self.names_of("domain"), {name: finite(self.trained.get(name, {}).get("tokens")) or 0
                                                   for name in self.sources}
        epochs = [finite(self.trained.get(name, {}).get("epochs")) for name in domain]
        losses = [math.nan if finite(row["loss"]) is None else self.mean_over("domain", row["sources"], "loss")
                  for row in self.train if "loss" in row and row["step"] not in self.left_out]
        scores = {row["step"]: self.mean_over("domain", row["sources"], self.metric) for row in self.evals}
        return verdict.Evidence(
            settings=self.settings, recommended_lr=finite(self.start.get("recommended_lr")),
            replay_share=sum(tokens[name] for name in self.names_of("general")) / sum(tokens.values())
            if sum(tokens.values()) else None,
            epochs=max((read for read in epochs if read is not None), default=None),
            history={step: score for step, score in scores.items() if score is not None},
            losses=[loss for loss in losses if loss is not None], stopped=self.stopped is not None)

    @cached_property
    def failure(self) -> str | None:
        """What went wrong, by measure/verdict.py; a run that is still going is not called flat."""
        found = verdict.find_failure(self.comparison, self.after, self.evidence)
        return None if found == "flat" and not self.finished else found

    @property
    def advice(self) -> list:
        return verdict.advise(self.failure, self.evidence)


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
        with contextlib.suppress(ValueError, RecursionError):
            run.settings = tomllib.loads(run.config)
    read_evaluation(run, folder / "eval.json")
    if not (run.train or run.evals or run.after):
        raise UserError(f"nothing to show: '{path}' holds no training step and no evaluation yet; "
                        "try again after the run's first log line")
    return run


def read_metrics(run: Run, path: Path) -> None:
    """Fill start, train, evals, samples, decisions and events from metrics.jsonl."""
    kinds, unreadable = {"train": {}, "eval": {}, "samples": {}, "replay": {}}, []
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            kind = row["kind"] = str(row["kind"])
            if kind in kinds:
                row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            unreadable += [number] if line.strip() else []
            continue
        row["sources"] = sources_in(row.get("sources"))
        row["objective"] = (sources_in if kind == "eval" else dict_or_empty)(row.get("objective"))
        if kind in kinds:
            kinds[kind][row["step"]] = row
        elif kind == "start":
            run.start = row
        elif kind in ("event", "resume", "left_out", "rewind", "stop"):
            run.events.append(row)
        if kind == "resume" and (resumed_at := finite(row.get("step"))) is not None:
            kinds = {name: {step: row for step, row in rows.items() if step <= resumed_at}
                     for name, rows in kinds.items()}
    run.train, run.evals, samples, run.decisions = ([rows[step] for step in sorted(rows)] for rows in kinds.values())
    run.samples = samples[:1] + samples[1:][-1:]
    if unreadable == [len(lines)]:
        run.notes.append("The last line of metrics.jsonl is cut (a run stopped while writing it) and was ignored.")
    elif unreadable:
        count = f"{len(unreadable):,} line" + ("s" if len(unreadable) > 1 else "")
        run.notes.append(f"{count} of metrics.jsonl could not be read: left out (first: line {unreadable[0]}).")


def read_evaluation(run: Run, path: Path) -> None:
    """Fill before, after and protocol from eval.json, else from the first and the last evaluation in the metrics, with
    the scores of the documents from eval_step_N.json."""
    stated = read_dict(run, path)
    run.scored = dict_or_empty(stated.get("model"))
    measured = {row["step"]: row["sources"] for row in run.evals}
    last = max(measured, default=0)
    run.before = sources_in(stated.get("before")) or detailed(run, 0, measured.get(0, {}))
    run.after = sources_in(stated.get("after")) or (detailed(run, last, measured[last]) if last else {})
    protocols = [dict_or_empty(where.get("protocol")) for where in (stated, *reversed(run.evals))]
    run.protocol = next((protocol for protocol in protocols if protocol), {})
    read_objective(run, dict_or_empty(stated.get("objective")), last)
    total = finite(run.start.get("total_steps"))
    reached_end = total is not None and run.step >= total
    run.finished = bool(stated.get("after")) or (run.folder / "final").is_dir() or reached_end
    for key, ours in (("domain_gain", run.domain_gain), ("forgetting", run.forgetting)):
        theirs = finite(stated.get(key))
        if None not in (theirs, ours) and abs(theirs - ours) > 5e-4:
            run.notes.append(f"eval.json states a {key.replace('_', ' ')} of {percent(theirs)}; its values before and "
                             f"after give {percent(ours)}, which is what this page shows.")


def read_objective(run: Run, stated: dict, last: int) -> None:
    """Fill objective from eval.json, else from the evaluations in the metrics, of which the last was at step `last`."""
    measured = {row["step"]: row["objective"] for row in run.evals}
    warnings = stated.get("warnings")
    run.objective = {
        "name": str(stated.get("name") or dict_or_empty(run.settings.get("objective")).get("name", "the objective")),
        "before": sources_in(stated.get("before")) or measured.get(0, {}),
        "after": sources_in(stated.get("after")) or (measured[last] if last else {}),
        "warnings": [str(line) for line in warnings] if isinstance(warnings, list) else []}


def read_dict(run: Run, path: Path) -> dict:
    """The object in a JSON file; an empty one where there is no file or no object, with a note where it is no JSON."""
    try:
        return dict_or_empty(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, RecursionError):
        run.notes.append(f"{path.name} is not valid JSON and was ignored; the evaluations in metrics.jsonl are shown.")
        return {}


def detailed(run: Run, step: int, measured: dict) -> dict:
    """An evaluation as metrics.jsonl has it, {source: scores}, with what eval_step_N.json has beside it."""
    texts = sources_in(read_dict(run, run.folder / f"eval_step_{step}.json").get("texts"))
    return {name: {**texts.get(name, {}), **scores} for name, scores in measured.items()}


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
    text = f"{value * 100:{'+' if signed else ''}.{'1f' if abs(value) < 1e5 else '1e'}}"
    return ("0.0" if float(text) == 0 else text.replace("-", "−")) + " %"


def span(interval, signed: bool = False) -> str:
    """[0.121, 0.139] -> '12.1 to 13.9 %'; nothing where it is unknown."""
    if interval is None:
        return ""
    low, high = (percent(end, signed) for end in interval)
    return f"{low.removesuffix(' %')} to {high}"


def utc(seconds) -> str:
    """Seconds since 1970 as a date and a time; a dash where they are unknown."""
    seconds = finite(seconds)
    # A date has a year from 1 to 9999.
    is_date = seconds is not None and -6e10 < seconds < 2.5e11
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC" if is_date else "–"


# ---- the page

def render(runs: list):
    """The filled template: str() of it is the page for one or several runs, which loads nothing from anywhere, and
    `headline(run)` the sentence about a run as markup."""
    # Autoescape: whatever stands in a run's files reaches the page as text, never as markup.
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True)
    filters = (finite, percent, span, decimal, short, utc, verdict.grade_gain, verdict.grade_forgetting, np.median,
               charts.logged, charts.draw_run, charts.draw_objective, measure_table, source_table, sample_pairs,
               describe_data, judge_budget, dict_or_empty)
    environment.filters |= {function.__name__: function for function in filters}
    environment.filters["json"] = partial(json.dumps, ensure_ascii=False)
    for number, run in enumerate(runs, 1):
        run.number = number
    ranked = len({run.origin for run in runs}) == len({str(run.texts) for run in runs}) == 1
    return environment.get_template("report.html.j2").make_module({
        "runs": runs, "ranked": ranked, "best": find_best(runs) if ranked else [],
        "across": charts.draw_comparison(runs, ranked) if len(runs) > 1 else []})


def find_best(runs: list) -> list:
    """The run with the best overall score, and those whose score cannot be told from it: the documents are drawn in the
    same way for all, and the middle 95 % of the differences hold 0. Empty where no score is known."""
    best = max((run for run in runs if run.overall is not None), key=lambda run: run.overall, default=None)
    if best is None:
        return []
    others = [run for run in runs if run is not best and run.score_draws is not None and best.score_draws is not None]
    return [best, *(run for run in others
                    if verdict.is_unclear(verdict.middle(best.score_draws - run.score_draws)))]


def describe_data(run: Run) -> list[tuple[str, str]]:
    """[(source, what it trained on, what was cleaned away before, what was held out)] of a run."""
    rows = []
    for name, role in run.sources.items():
        start, scored = (dict_or_empty(side.get(name)) for side in (run.start["sources"], run.after or run.before))
        said = [f"{start[key]:,} {key}" for key in ("documents", "bytes", "tokens") if finite(start.get(key))]
        steps = start["cleaning"] if isinstance(start.get("cleaning"), list) else []
        said += [f"{step.get('by')} kept {short(step.get('kept'))} of {short(step.get('documents'))}"
                 for step in map(dict_or_empty, steps)]
        if "cleaning" in start and not steps:
            said.append("what was cleaned away before is not known")
        held = [f"{scored[key]:,} {key}" for key in ("documents", "tokens") if finite(scored.get(key)) is not None]
        said.append(f"held out and scored: {', '.join(held)}" if held else "nothing held out was scored")
        if (lost := finite(scored.get("lost_share"))) is not None:
            said.append(f"{100 * lost:.2f} % of its bytes are in no token, so bits per byte are too low")
        if "documents" in scored and run.interval["change"].get(name) is None and run.before and run.after:
            said.append(f"no interval: it needs {verdict.FEWEST} documents, the same before and after")
        rows.append((f"{name} ({role})" if role and role != name else name, "; ".join(said)))
    return rows


def judge_budget(run: Run) -> str:
    """A sentence about a run whose replay was adaptive: what general text might lose, what it lost; else nothing."""
    config = dict_or_empty(dict_or_empty(run.settings.get("forget")).get("adaptive"))
    policy, changes = config.get("policy", run.decisions[-1].get("policy") if run.decisions else None), []
    if policy in (None, "none"):
        return ""
    budget = finite(config.get("epsilon")) if policy == "budget" else verdict.GOOD
    for name in run.names_of("general"):
        was, now = (finite(side.get(name, {}).get(run.metric)) for side in (run.before, run.after))
        if was and now is not None:
            changes.append((now - was if policy == "budget" else now / was - 1, name))
    shown = percent if policy == "degradation" else lambda value: f"{decimal(value)} {run.unit}"
    if budget is None or not changes:
        return f"Policy {policy}; what general text lost is unknown."
    lost, name = max(changes)
    return (f"Policy {policy}: general text may lose {shown(budget)}. {name} lost most, {shown(lost)}: the budget was "
            + ("broken." if lost > budget else "kept."))


def source_table(run: Run) -> tuple[list, set]:
    """([{column: value} of each source], columns with a value); None or [] where the files do not say."""
    rows = []
    for name, role in run.sources.items():
        sides = [side.get(name, {}) for side in (run.before, run.after)]
        rows.append({
            "name": name, "role": role, "change": run.comparison["change"].get(name),
            "interval": run.interval["change"].get(name),
            **{side: finite(scores.get(run.metric)) for side, scores in zip(("before", "after"), sides)},
            **{column: [side[column] for side in sides if finite(side.get(column)) is not None]
               for column in ("perplexity", "accuracy")},
            **{column: finite(run.trained.get(name, {}).get(column)) for column in ("tokens", "epochs")},
        })
    return rows, {key for row in rows for key, value in row.items() if value not in (None, [])}


def measure_table(run: Run) -> list[tuple]:
    """[(source, measure, value before, value after)] of what the objective measured of held-out sequences."""
    before, after = run.objective["before"], run.objective["after"]
    names = {source: dict.fromkeys([*before.get(source, {}), *after.get(source, {})]) for source in before | after}
    return [(source, name, *(finite(side.get(source, {}).get(name)) for side in (before, after)))
            for source, measures in names.items() for name in measures if name != "sequences"]


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
    if out.is_file() and out.stat().st_size and not file_holds(out, b"nanoCPT report</title>"):
        raise UserError(f"{out} is no report of ours, so it is not replaced; choose another --out, or move it away")
    runs = [read_run(folder) for folder in options.runs]
    page = render(runs)
    write_text(out, str(page))
    for run in runs:
        print(f"{escape(run.name, line=True)}: {page.headline(run).striptags()}")
        for line in run.accidents:
            print(line)
        if run.failure:
            print(f"{run.failure}; what helps: {'; '.join(run.advice)}")
    print(f"wrote {out} ({len(str(page)) / 1e6:.2f} MB)")
    return {"out": str(out), "runs": [{"run": run.name, **run.comparison, "failure": run.failure,
                                         "advice": run.advice} for run in runs]}


def main() -> int:
    return cli.run("report.py", __doc__, (Report, write_report))


if __name__ == "__main__":
    sys.exit(main())
