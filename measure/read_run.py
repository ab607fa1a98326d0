"""What a run folder says, as plain values, and where each of them stands. Files are read and nothing else: not what
wrote them, and no network. A folder may be half written, of another version, or anybody's.

A run that is still going, was killed or was resumed is read as far as it got. Gain, forgetting, overall score, how sure
they are and the advice are those of measure/verdict.py.
"""

import contextlib
import json
import math
import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle
from pathlib import Path

import numpy as np

from core.errors import UserError
from measure import charts, verdict
from measure.charts import DOMAIN, GENERAL, RUNS, percent
from measure.places import Place, find_lines, find_toml_lines, place_of
from measure.verdict import UNITS, finite, mean

# What is measured in items with a right answer: benchmarks, and the questions of measure/probes.py.
RESULTS = ("tasks", "probes")
# Lines of metrics.jsonl that say what happened.
EVENTS = ("event", "resume", "left_out", "rewind", "stop", "ended")


# ---- a run

@dataclass
class Run:
    """What a run folder says. The lines of metrics.jsonl stay the dicts they are, one per step, by rising step, each
    with the number of its "line"."""
    folder: Path
    start: dict = field(default_factory=lambda: {"sources": {}})
    # Lines of kind "train".
    train: list = field(default_factory=list)
    # Lines of kind "eval".
    evals: list = field(default_factory=list)
    # The first and the last line of kind "samples".
    samples: list = field(default_factory=list)
    # Lines of the kinds in EVENTS, in the order of the file.
    events: list = field(default_factory=list)
    # What adaptive replay decided: the lines of kind "replay".
    decisions: list = field(default_factory=list)
    # {"texts", "objective", "tasks" or "probes": {"before" or "after": {name: values}}}.
    sides: dict = field(default_factory=dict)
    # {source: scores} at step 0; empty: no baseline.
    before: dict = field(default_factory=dict)
    # {source: scores} of the last evaluation.
    after: dict = field(default_factory=dict)
    # {task: {"lost", "won", "p", ...}}, the answers that changed, and {capability: {"baseline", "current", ...}}.
    changes: dict = field(default_factory=dict)
    capabilities: dict = field(default_factory=dict)
    # Where start and config stand, and each (kind, side) of `sides`.
    places: dict = field(default_factory=lambda: {"start": Place("metrics.jsonl"), "config": Place("config.toml")})
    # {name: (object, where)} of the JSON files that were read.
    files: dict = field(default_factory=dict)
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
    # Its place on the page; the power [W] and the price [dollars per hour] of a device, where the user said them.
    number: int = 1
    watts: float | None = None
    price: float | None = None

    name = property(lambda run: str(run.start.get("run") or run.folder.resolve().name))
    step = property(lambda run: run.last_row.get("step", 0))
    # The line of the last step that is known of.
    last_row = property(lambda run: max(run.train[-1:] + run.evals[-1:], key=lambda row: row["step"], default={}))
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
    def trained_at(self) -> dict:
        """{source: where those fields stand}."""
        return {name: place_of(row).at("sources", name) for row in self.train for name in row["sources"]}

    def at(self, side: str, *names, kind: str = "texts") -> Place:
        """Where a value of the evaluation before or after stands."""
        return self.places[kind, side].at(*names)

    def pairs_at(self, names, column: str | None = None) -> list[Place]:
        """Where a column of the evaluations before and after stands, of each of these texts that is in the change."""
        return [self.at(side, name, column or self.metric) for name in names if name in self.comparison["change"]
                for side in ("before", "after")]

    def range_at(self, column: str) -> Place:
        """Where a column of the training log stands, from its first to its last line."""
        lines = [row["line"] for row in self.train if column in row]
        return Place("metrics.jsonl", f"{lines[0]}-{lines[-1]}" if lines else None, (column,))

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
    def course(self) -> list[dict]:
        """What each evaluation after step 0 compares to the one before: [{"step", "at", "domain_gain", "forgetting",
        "score", "is_best"}] of those where both are known, by step. is_best: no other gains more at the same or less
        forgetting (Pareto). eval_checkpoints.json, which eval.py --run may have left, counts where it scored the same
        documents."""
        held, place = read_json(self, "eval_checkpoints.json")
        listed = held["checkpoints"] if isinstance(held.get("checkpoints"), list) else []
        rows = [{"step": int(finite(row["step"])), "at": place.at("checkpoints", number, "texts"),
                 "sources": sources_in(row.get("texts"))}
                for number, row in enumerate(map(dict_or_empty, listed)) if finite(row.get("step")) is not None]
        known, general, domain = {}, self.names_of("general"), self.names_of("domain")
        for row in [*rows, *self.evals]:
            scores = {name: fields for name, fields in row["sources"].items()
                      if fields.get("bytes") == self.before.get(name, {}).get("bytes")}
            pairs = {name: (finite(scores[name].get(self.metric)), finite(self.before[name].get(self.metric)))
                     for name in scores if name in self.before}
            found = verdict.summarise({name: now / was - 1 for name, (now, was) in pairs.items()
                                       if was and now is not None}, general, domain)
            if row["step"] > 0 and found["score"] is not None:
                known[row["step"]] = {"step": row["step"], "at": row.get("at") or place_of(row).at("sources"), **found}
        course = [known[step] for step in sorted(known)]
        return [point | {"is_best": not any(
            other["domain_gain"] >= point["domain_gain"] and other["forgetting"] <= point["forgetting"] and
            (other["domain_gain"], other["forgetting"]) != (point["domain_gain"], point["forgetting"])
            for other in course)} for point in course]

    @cached_property
    def gaps(self) -> list[dict]:
        """The stability gap (Guo 2024, arXiv 2406.14833): {"source", "step", "worst", "now", "at"} of each source whose
        held-out score rose by more than verdict.FLAT above the start's and has since come back by as much."""
        found = []
        for name in self.sources:
            steps, values = charts.series_by_source(self, self.evals, self.metric).get(name, ([], []))
            if len(values) < 3 or steps[0] or not values[0]:
                continue
            changes, place = values / values[0] - 1, int(np.argmax(values))
            if changes[place] > verdict.FLAT and changes[place] - changes[-1] > verdict.FLAT:
                rows = {row["step"]: place_of(row).at("sources", name, self.metric) for row in self.evals}
                found.append({"source": name, "step": int(steps[place]), "worst": float(changes[place]),
                              "now": float(changes[-1]), "at": [rows[steps[each]] for each in (0, place, -1)]})
        return found

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
    def accidents(self) -> dict:
        """{what the steps went through, a sentence: where that stands}."""
        said, n = {}, len(self.left_out)
        if n:
            said[f"{n:,} update{' was' if n == 1 else 's were'} left out, the last one because "
                 f"{list(self.left_out.values())[-1]}"] = self.events_at("left_out")
        if back := [row for row in self.events if row["kind"] == "rewind"]:
            said[f"the run was rewound {'once' if len(back) == 1 else f'{len(back):,} times'}, the last time from "
                 f"step {back[-1].get('step')} to {back[-1].get('to')}"] = self.events_at("rewind")
        if self.stopped:
            said[f"the run stopped: {self.stopped}"] = self.events_at("stop")
        warned = Place("eval.json", self.files["eval.json"][1].lines.get(("objective", "warnings")))
        return said | {warning: [warned] for warning in self.objective["warnings"]}

    @property
    def ended(self) -> dict:
        """The line that says why a rule ended the run before its last step, where it was not resumed since."""
        last = next((row for row in reversed(self.events) if row["kind"] in ("resume", "ended")), {"kind": "resume"})
        return last if last["kind"] == "ended" else {}

    def events_at(self, kind: str) -> list[Place]:
        return [place_of(row) for row in self.events if row["kind"] == kind]

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

    @property
    def evidence_at(self) -> list[Place]:
        """Where that stands, as far as advice speaks of it."""
        trained = [place.at(column) for place in self.trained_at.values() for column in ("tokens", "epochs")]
        evaluated = [place_of(row).at("sources") for row in self.evals]
        return [self.places["config"].at("optim", "lr"), self.places["start"].at("recommended_lr"), *trained,
                *evaluated]

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
        run.places["config"] = Place("config.toml", lines=find_toml_lines(run.config))
        with contextlib.suppress(ValueError, RecursionError):
            run.settings = tomllib.loads(run.config)
    read_evaluation(run)
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
            kind, row["line"] = str(row["kind"]), number
            row["kind"] = kind
            if kind in kinds:
                row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            unreadable += [number] if line.strip() else []
            continue
        row["sources"] = sources_in(row.get("sources"))
        row["objective"] = (sources_in if kind == "eval" else dict_or_empty)(row.get("objective"))
        row |= {key: results_in(row.get(key)) for key in RESULTS} | {"distance": dict_or_empty(row.get("distance"))}
        if kind in kinds:
            kinds[kind][row["step"]] = row
        elif kind == "start":
            run.start, run.places["start"] = row, place_of(row)
        elif kind in EVENTS:
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


def read_evaluation(run: Run) -> None:
    """Fill what was measured before and after, and how: from eval.json, else from the first and the last evaluation."""
    stated, place = read_json(run, "eval.json")
    run.scored = dict_or_empty(stated.get("model"))
    clean = {"texts": sources_in, "objective": sources_in} | dict.fromkeys(RESULTS, results_in)
    for kind, choose in clean.items():
        run.sides[kind] = {}
        for side, row in (("before", run.evals[0] if run.evals and run.evals[0]["step"] == 0 else None),
                          ("after", run.evals[-1] if run.evals and run.evals[-1]["step"] else None)):
            above = () if kind == "texts" else (kind,)
            held = dict_or_empty(stated.get(kind)) if above else stated
            choices = [(held.get(side), place.at(*above, side))]
            if row:
                # The file of an evaluation has what its line in metrics.jsonl has, and the nats of each document.
                beside, where = read_json(run, f"eval_step_{row['step']}.json")
                key = "sources" if kind == "texts" else kind
                choices += [(beside.get(kind), where.at(kind)), (row[key], place_of(row).at(key))]
            run.sides[kind][side], run.places[kind, side] = next(
                ((choose(value), where) for value, where in choices if choose(value)), ({}, choices[0][1]))
    run.before, run.after = run.sides["texts"]["before"], run.sides["texts"]["after"]
    protocols = [(stated, place), *((row, place_of(row)) for row in reversed(run.evals))]
    run.protocol, run.places["protocol"] = next(((dict_or_empty(held.get("protocol")), at.at("protocol"))
                                                 for held, at in protocols if dict_or_empty(held.get("protocol"))),
                                                ({}, place))
    objective, named = dict_or_empty(stated.get("objective")), dict_or_empty(run.settings.get("objective"))
    warnings = objective.get("warnings")
    run.objective = {"name": str(objective.get("name") or named.get("name", "the objective")), **run.sides["objective"],
                     "warnings": [str(line) for line in warnings] if isinstance(warnings, list) else []}
    run.changes = sources_in(dict_or_empty(stated.get("tasks")).get("change"))
    run.capabilities = sources_in(stated.get("capabilities"))
    total = finite(run.start.get("total_steps"))
    reached_end = total is not None and run.step >= total
    run.finished = bool(stated.get("after")) or (run.folder / "final").is_dir() or reached_end
    for key, ours in (("domain_gain", run.domain_gain), ("forgetting", run.forgetting)):
        theirs = finite(stated.get(key))
        if None not in (theirs, ours) and abs(theirs - ours) > 5e-4:
            run.notes.append(f"eval.json states a {key.replace('_', ' ')} of {percent(theirs)}; its values before and "
                             f"after give {percent(ours)}, which is what this page shows.")


def read_json(run: Run, name: str) -> tuple[dict, Place]:
    """(the object in a JSON file of the run folder, where it stands); an empty one where there is no file or no object,
    with a note where it is no JSON."""
    if name not in run.files:
        value, lines, path = {}, {}, run.folder / name
        try:
            if path.is_file():
                text = path.read_text(encoding="utf-8")
                value = dict_or_empty(json.loads(text))
                lines = find_lines(text) if value else {}
        except (ValueError, RecursionError):
            run.notes.append(f"{name} is not valid JSON and was ignored; the evaluations in metrics.jsonl are shown.")
        run.files[name] = value, Place(name, lines=lines)
    return run.files[name]


def dict_or_empty(value) -> dict:
    """A file may hold anything where a dict should stand."""
    return value if isinstance(value, dict) else {}


def sources_in(value) -> dict:
    """{source: fields}, without entries that are no dicts."""
    return {name: fields for name, fields in dict_or_empty(value).items() if isinstance(fields, dict)}


def results_in(value) -> dict:
    """{task: result} of those whose headline is a number; a field that is not what it should be is left out."""
    found = {}
    for name, result in sources_in(value).items():
        if (headline := finite(result.get("value"))) is None:
            continue
        ends = result["interval"] if isinstance(result.get("interval"), list) else []
        ends = [finite(end) for end in ends]
        texts = {key: str(result.get(key) or other) for key, other in (("metric", ""), ("capability", "other"))}
        found[name] = {"value": headline, "interval": ends if len(ends) == 2 and None not in ends else None,
                       "is_up": result.get("direction") != "down", **texts,
                       **{key: finite(result.get(key)) for key in ("chance", "n", "shots")}}
    return found
