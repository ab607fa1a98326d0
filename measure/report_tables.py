"""What report.py's page says in words and tables. Each number stands in an element that says from which file of the run
folder it is, which line and which name there, and what was done with it:

    <data value="0.339" title="after / before - 1
    eval.json:17 /before/law/bits_per_byte
    eval.json:61 /after/law/bits_per_byte">33.9 %</data>

What a file calls something is a <bdi>: text, and of no influence on the direction of what stands around it.
"""

import json
from datetime import UTC, datetime

import numpy as np
from markupsafe import Markup

from measure import charts, verdict
from measure.charts import decimal, percent, short, span
from measure.read_run import Place, Run, dict_or_empty, place_of
from measure.verdict import finite, grade_forgetting, grade_gain

# What was done with the values that a number of the page is made from; without it, nothing but rounding.
CHANGE, FALL, RISE = "after / before - 1", "mean of 1 - after / before", "mean of after / before - 1"
SCORE = "domain gain - max(0, forgetting - 0.05), of"
DRAWN = f"the middle 95 % of {verdict.DRAWS:,} draws of the documents of"
MEAN, SHARE, SUM = "mean of", "first / second, of", "sum of"


def cite(text: str, value, places, how: str = "") -> Markup:
    """`text` with its value and where that stands (a Place, or several); the text alone where there is no value."""
    if value is None:
        return Markup("{}").format(text)
    places = [places] if isinstance(places, Place) else places
    shown = value if isinstance(value, str) else json.dumps(value, default=float)
    return Markup('<data value="{}" title="{}">{}</data>').format(
        shown, "\n".join(filter(None, (how, *dict.fromkeys(map(str, places))))), text)


def name(text) -> Markup:
    """What a file calls something."""
    return Markup("<bdi>{}</bdi>").format(text)


def places_of(rows: list) -> list[Place]:
    return [place_of(row) for row in rows]


def join(parts, between: str) -> Markup:
    return Markup(between).join(part if isinstance(part, Markup) else Markup("{}").format(part) for part in parts)


def utc(seconds) -> str:
    """Seconds since 1970 as a date and a time; a dash where they are unknown."""
    seconds = finite(seconds)
    # A date has a year from 1 to 9999.
    is_date = seconds is not None and -6e10 < seconds < 2.5e11
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC" if is_date else "–"


# ---- the verdict

def cite_gain(run: Run, text: str) -> Markup:
    return cite(text, run.domain_gain, run.pairs_at(run.names_of("domain")), FALL)


def cite_forgetting(run: Run, text: str) -> Markup:
    return cite(text, run.forgetting, run.pairs_at(run.names_of("general")), RISE)


def cite_score(run: Run, text: str) -> Markup:
    return cite(text, run.overall, run.pairs_at([*run.names_of("domain"), *run.names_of("general")]), SCORE)


def cite_interval(run: Run, interval, names) -> Markup:
    """'95 %: +1.0 to +2.0 %' of a change, or nothing; `names` are the texts whose documents were drawn."""
    return Markup("95 %: {}").format(cite(span(interval, True), interval, run.pairs_at(names, "nats_by_document"),
                                          DRAWN)) if interval else Markup("")


def cite_change(run: Run, source: str, text: str) -> Markup:
    return cite(text, run.comparison["change"].get(source), run.pairs_at([source]), CHANGE)


def cite_mean(run: Run, role: str, side: str, column: str | None = None, show=decimal) -> Markup:
    """The mean of a column of the evaluation before or after over the sources of a role."""
    column, scores = column or run.metric, run.sides["texts"][side]
    value = run.mean_over(role, scores, column)
    return cite(show(value), value, [run.at(side, source, column) for source in run.names_of(role)
                                     if finite(scores.get(source, {}).get(column)) is not None], MEAN)


def compare_accuracy(run: Run, role: str) -> Markup:
    """A sentence where the role's texts have an accuracy before and after, else nothing."""
    sides = [cite_mean(run, role, side, "accuracy", percent) for side in ("before", "after")]
    return Markup("") if "–" in sides else Markup(" Accuracy on {} text went from {} to {}.").format(role, *sides)


def cite_tokens(run: Run) -> Markup:
    rows = [row for row in run.train if finite(row.get("tokens")) is not None] or [{}]
    return cite(short(rows[-1].get("tokens")), rows[-1].get("tokens"), place_of(rows[-1]).at("tokens"))


def cite_speed(run: Run) -> Markup:
    speeds = charts.logged(run, "tokens_per_second")[1]
    value = float(np.median(speeds)) if len(speeds) else None
    return cite(short(value), value, run.range_at("tokens_per_second"), "median of")


def cite_last_evaluation(run: Run) -> Markup:
    row = run.evals[-1] if run.evals else run.last_row
    return Markup("at step {}").format(cite(f"{row['step']:,}", row["step"], place_of(row).at("step")))


def cite_step(run: Run) -> Markup:
    """'20 of 30': where the run stands."""
    total = finite(run.start.get("total_steps"))
    step = cite(f"{run.step:,}", run.step, place_of(run.last_row).at("step"))
    return step if total is None else Markup("{} of {}").format(step, cite(
        f"{total:,.0f}", total, run.places["start"].at("total_steps")))


def why_unknown(run: Run) -> str:
    return "unknown: " + ("no text was evaluated" if not run.before and run.objective["before"] else
                          "no baseline" if not run.before else
                          "no general text was evaluated" if run.after else "not evaluated yet")


def grade_words(verb: str, cited: Markup, grade: str) -> Markup:
    return Markup('{} <b class="{}">{}</b>{}').format(
        verb, grade, cited, " (not distinguishable from no change)" if grade == "unclear" else "")


def headline(run: Run) -> Markup:
    """The one sentence about a run."""
    gain, lost = run.domain_gain, run.forgetting
    so_far = Markup("") if run.finished else Markup("so far, at step {}, ").format(cite_step(run))
    losses = [row for row in measure_table(run) if row[1] == "loss"]
    if not run.before and losses:
        parts = [Markup("{} {} on {}").format("was" if now is None else Markup("went from {} to").format(was), Markup(
            "<b>{}</b>").format(was if now is None else now), source) for source, _, was, now in losses]
        said = Markup("the held-out loss of {} {}; no text was evaluated.").format(
            name(run.objective["name"]), join(parts, " and "))
    elif not run.before:
        said = "gain and forgetting are unknown: no baseline, because nothing was evaluated at step 0."
    elif not run.after:
        return Markup("No verdict yet: only the baseline at step 0 has been evaluated.")
    else:
        gained = grade_words("gained" if gain >= 0 else "got worse by", cite_gain(run, percent(abs(gain))), grade_gain(
            gain, run.interval["domain_gain"])) if gain is not None else "was not evaluated"
        kept = Markup(", in {}; forgetting is {}.").format(run.unit, why_unknown(run)) if lost is None else Markup(
            " and general text {}, in {}.").format(grade_words(
                "lost" if lost > 0 else "gained", cite_forgetting(run, percent(abs(lost))),
                grade_forgetting(lost, run.interval["forgetting"])), run.unit)
        said = Markup("the domain {}{}").format(gained, kept)
    said = so_far + said
    return said[:1].upper() + said[1:]


# ---- facts

def describe_run(run: Run) -> list[tuple]:
    """[(name, value)] of what a colleague asks first: the base, the sizes, the machine, the time, the cost."""
    start, at, config = run.start, run.places["start"].at, run.places["config"].at
    tokenizer, model = dict_or_empty(start.get("tokenizer")), dict_or_empty(run.settings.get("model"))

    def stated(value, *names):
        return cite(short(value), finite(value), at(*names))
    size, trainable = finite(start.get("parameters")), finite(start.get("trainable_parameters"))
    hours = run.seconds / 3600
    facts = [("base", name(run.base.get("name") or ("none: random weights" if "base" in start else "–"))),
             ("licence of the base", name(run.base.get("license") or "–")),
             ("tokenizer", name(tokenizer.get("name") or "–") + (Markup(" ({} ids)").format(stated(
                 tokenizer["vocab_size"], "tokenizer", "vocab_size")) if finite(tokenizer.get("vocab_size")) else ""))]
    if start.get("family") and model:
        sizes = [cite(short(model.get(key)), finite(model.get(key)), config("model", key)) for key in (
            "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")]
        facts.append(("model", Markup("{}, {} blocks, {} wide, MLP {}, heads {}/{}, vocabulary {}").format(
            name(start["family"]), *sizes, stated(start.get("vocab_size"), "vocab_size"))))
    share = trainable / size if size and trainable is not None else None
    facts += [("parameters", stated(size, "parameters")),
              ("trainable", stated(trainable, "trainable_parameters") + ("" if share is None else " (" + cite(
                  f"{100 * share:.3g} %", share, [at("trainable_parameters"), at("parameters")], SHARE) + ")")),
              ("steps", cite_step(run)), ("tokens per step", stated(start.get("tokens_per_step"), "tokens_per_step")),
              ("device", name(" ".join(str(start[key]) for key in ("device", "precision") if key in start) or "–")),
              ("started", cite(utc(start.get("time")), finite(start.get("time")), at("time"), "seconds since 1970"))]
    steps, world = run.range_at("step_ms"), finite(start.get("world_size")) or 1
    facts.append(("time of the steps", cite(
        f"{hours:.2f} hours" if hours >= 0.1 else f"{run.seconds:.0f} s", run.seconds, steps,
        "seconds: the sum over all steps of the mean time of")))
    facts.append(("cost", cite(f"{hours * world:.2g} device-hours", hours * world, [steps, at("world_size")],
                               "hours of the steps times devices, of")))
    return facts


def describe_data(run: Run) -> list[tuple]:
    """[(source, what it trained on, what was cleaned away before, what was held out)] of a run."""
    rows = []
    for source, role in run.sources.items():
        side = "after" if run.after else "before"
        start, scored = (dict_or_empty(values.get(source))
                         for values in (run.start["sources"], run.sides["texts"][side]))
        at = run.places["start"].at("sources", source)
        said = [cite(f"{start[key]:,} {key}", start[key], at.at(key))
                for key in ("documents", "bytes", "tokens") if finite(start.get(key))]
        steps = start["cleaning"] if isinstance(start.get("cleaning"), list) else []
        for step in map(dict_or_empty, steps):
            kept, of = (cite(short(step.get(key)), finite(step.get(key)), at.at("cleaning"))
                        for key in ("kept", "documents"))
            said.append(Markup("{} kept {} of {}").format(name(step.get("by")), kept, of))
        if "cleaning" in start and not steps:
            said.append("what was cleaned away before is not known")
        held = [cite(f"{scored[key]:,} {key}", scored[key], run.at(side, source, key))
                for key in ("documents", "tokens") if finite(scored.get(key)) is not None]
        said.append("held out and scored: " + join(held, ", ") if held else "nothing held out was scored")
        if (lost := finite(scored.get("lost_share"))) is not None:
            said.append(cite(f"{100 * lost:.2f} %", lost, run.at(side, source, "lost_share"))
                        + " of its bytes are in no token, so bits per byte are too low")
        if "documents" in scored and run.interval["change"].get(source) is None and run.before and run.after:
            said.append(f"no interval: it needs {verdict.FEWEST} documents, the same before and after")
        rows.append((name(source) + (Markup(" ({})").format(name(role)) if role and role != source else ""),
                     join(said, "; ")))
    return rows


def judge_budget(run: Run) -> Markup | str:
    """A sentence about a run whose replay was adaptive: what general text might lose, what it lost; else nothing."""
    config = dict_or_empty(dict_or_empty(run.settings.get("forget")).get("adaptive"))
    policy, changes = config.get("policy", run.decisions[-1].get("policy") if run.decisions else None), []
    if policy in (None, "none"):
        return ""
    budget = finite(config.get("epsilon")) if policy == "budget" else verdict.GOOD
    for source in run.names_of("general"):
        was, now = (finite(side.get(source, {}).get(run.metric)) for side in (run.before, run.after))
        if was and now is not None:
            changes.append((now - was if policy == "budget" else now / was - 1, source))
    shown = percent if policy == "degradation" else lambda value: f"{decimal(value)} {run.unit}"
    if budget is None or not changes:
        return Markup("Policy {}; what general text lost is unknown.").format(name(policy))
    lost, source = max(changes)
    allowed = cite(shown(budget), budget, run.places["config"].at("forget", "adaptive", "epsilon")) \
        if policy == "budget" else shown(budget)
    return Markup("Policy {}: general text may lose {}. {} lost most, {}: the budget was {}.").format(
        name(policy), allowed, name(source), cite(
            shown(lost), lost, run.pairs_at([source]), CHANGE if policy != "budget" else "after - before"),
        "broken" if lost > budget else "kept")


# ---- tables

def source_table(run: Run) -> tuple[list, set]:
    """([{column: value} of each source], columns with a value); None or "" where the files do not say."""
    rows = []
    for source, role in run.sources.items():
        sides = {side: values.get(source, {}) for side, values in (("before", run.before), ("after", run.after))}
        row = {"name": source, "role": role, "change": run.comparison["change"].get(source),
               "interval": run.interval["change"].get(source), "at": run.pairs_at([source]),
               **{side: finite(scores.get(run.metric)) for side, scores in sides.items()}}
        for column, show in (("perplexity", lambda value: decimal(value, 2)), ("accuracy", percent)):
            row[column] = join([cite(show(scores[column]), scores[column], run.at(side, source, column))
                                for side, scores in sides.items() if finite(scores.get(column)) is not None], " → ")
        trained, at = run.trained.get(source, {}), run.trained_at.get(source)
        tokens, epochs = (finite(trained.get(column)) for column in ("tokens", "epochs"))
        row["tokens"] = "" if tokens is None else cite(short(tokens), tokens, at.at("tokens"))
        row["epochs"] = "" if epochs is None else cite(
            "< 0.01" if 0 < epochs < 0.01 else decimal(epochs, 2), epochs, at.at("epochs"))
        rows.append(row)
    return rows, {key for row in rows for key, value in row.items() if value not in (None, "")}


def measure_table(run: Run) -> list[tuple]:
    """[(source, measure, value before, value after)] of what the objective measured of held-out sequences; None where a
    value is unknown."""
    sides, rows = run.sides["objective"], []
    for source in dict.fromkeys([*sides["before"], *sides["after"]]):
        for measure in dict.fromkeys(key for side in sides.values() for key in side.get(source, {})):
            values = {side: finite(held.get(source, {}).get(measure)) for side, held in sides.items()}
            if measure != "sequences":
                rows.append((source, measure, *(None if value is None else cite(
                    decimal(value), value, run.at(side, source, measure, kind="objective"))
                    for side, value in values.items())))
    return rows


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
