"""What report.py's page says in words and tables. Each number stands in an element that says from which file of the run
folder it is, which line and which name there, and what was done with it:

    <data value="0.339" title="after / before - 1
    eval.json:17 /before/law/bits_per_byte
    eval.json:61 /after/law/bits_per_byte">33.9 %</data>

What a file calls something is a <bdi>: text, and of no influence on the direction of what stands around it.
"""

import json
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
from markupsafe import Markup

from measure import charts, verdict
from measure.charts import decimal, percent, short, span
from measure.places import Place, place_of
from measure.read_run import RESULTS, Run, dict_or_empty
from measure.verdict import finite, grade_forgetting, grade_gain

# What was done with the values that a number of the page is made from; without it, nothing but rounding.
CHANGE, FALL, RISE = "after / before - 1", "mean of 1 - after / before", "mean of after / before - 1"
SCORE = "domain gain - max(0, forgetting - 0.05), of"
DRAWN = f"the middle 95 % of {verdict.DRAWS:,} draws of the documents, of each"
DEVICE_HOURS = "hours of the steps times devices, of"
MEAN, SHARE = "mean of", "first / second, of"


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


def cite_interval(run: Run, interval, names, how: str) -> Markup:
    """'95 %: +1.0 to +2.0 %', or nothing; `names` are the texts whose documents were drawn; how: what they make."""
    return Markup("95 %: {}").format(cite(span(interval, True), interval, run.pairs_at(names, "nats_by_document"),
                                          f"{DRAWN} {how}")) if interval else Markup("")


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
    versions = dict_or_empty(start.get("versions"))
    for fact, value, place in (
            ("code (git commit)", start.get("code"), at("code")),
            ("fingerprint of the base", run.base.get("fingerprint"), at("base", "fingerprint")),
            ("fingerprint of the tokenizer", tokenizer.get("fingerprint"), at("tokenizer", "fingerprint")),
            ("versions", ", ".join(f"{key} {value}" for key, value in versions.items()), at("versions"))):
        facts += [(fact, cite(str(value)[:16] if "fingerprint" in fact else str(value)[:80], str(value),
                               place))] if value else []
    facts += [("time and cost", cite_cost(run))]
    return facts


def cite_cost(run: Run) -> Markup:
    """'0.56 hours; 1.1 device-hours': the time of the steps and what they cost, with energy and money where the power
    and the price of a device were given."""
    hours, world = run.seconds / 3600, finite(run.start.get("world_size")) or 1
    steps = run.range_at("step_ms")
    counted = [steps, *([run.places["start"].at("world_size")] if "world_size" in run.start else [])]
    said = [cite(f"{hours:.2f} hours" if hours >= 0.1 else f"{run.seconds:.0f} s", run.seconds, steps,
                 "seconds: the sum over all steps of the mean time of"),
            cite(f"{hours * world:.2g} device-hours", hours * world, counted, DEVICE_HOURS)]
    for given, rate, show, unit in ((run.watts, "watts", "{:,.3g} kWh", 1000),
                                    (run.price, "price", "{:,.2f} dollars", 1)):
        if given is not None:
            value = hours * world * given / unit
            said.append(cite(show.format(value), value, counted, f"--{rate} {given:g} times {DEVICE_HOURS}"))
    return join(said, "; ")


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
        if start.get("fingerprint"):
            said.append(Markup("fingerprint {}").format(cite(
                str(start["fingerprint"])[:80], str(start["fingerprint"]), at.at("fingerprint"))))
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
        total = sum(finite(each.get("tokens")) or 0 for each in run.trained.values())
        row["share"] = "" if tokens is None or not total else cite(
            percent(tokens / total), tokens / total, [each.at("tokens") for each in (at, *run.trained_at.values())],
            "first / sum of all, of")
        row["tokens"] = "" if tokens is None else cite(short(tokens), tokens, at.at("tokens"))
        row["epochs"] = "" if epochs is None else cite(
            "< 0.01" if 0 < epochs < 0.01 else decimal(epochs, 2), epochs, at.at("epochs"))
        rows.append(row)
    return rows, {key for row in rows for key, value in row.items() if value not in (None, "")}


def describe_score(result: dict | None, place: Place) -> Markup:
    """'61.0 %' or '12.310', what a task or a probe scored, with its interval below; a dash where it is unknown."""
    if not result:
        return Markup("–")
    show = percent if result["is_up"] and abs(result["value"]) <= 1 else decimal
    ends = result["interval"] and [show(end).removesuffix(" %") for end in result["interval"]]
    return cite(show(result["value"]), result["value"], place.at("value")) + (Markup(
        "<small>{}</small>").format(cite(" to ".join(ends), result["interval"], place.at("interval"))) if ends else "")


def result_table(run: Run, kind: str) -> list[dict]:
    """A row of each task or probe: what it measures, before, after, chance, items lost and won, and where a bar of the
    change begins and ends, in per cent of its width."""
    sides, rows = run.sides[kind], []
    for task in dict.fromkeys([*sides["after"], *sides["before"]]):
        known = {side: held.get(task) for side, held in sides.items()}
        result, side = next((known[side], side) for side in ("after", "before") if known[side])
        at, change = run.at(side, task, kind=kind), run.files["eval.json"][1].at(kind, "change", task)
        compared = dict_or_empty(run.changes.get(task)) if kind == "tasks" else {}
        flips = {key: finite(value) for key, value in dict_or_empty(compared.get("flips")).items()}
        row = {"name": task, **{key: result[key] for key in ("capability", "metric")},
               "sign": str(compared.get("sign") or ""),
               **{side: describe_score(held, run.at(side, task, kind=kind)) for side, held in known.items()},
               "chance": cite(percent(result["chance"]), result["chance"], at.at("chance")) if result["chance"] else "",
               "n": "" if result["n"] is None else cite(short(result["n"]), result["n"], at.at("n"))}
        for key, show in (("lost", short), ("won", short), ("p", lambda value: f"{value:.2g}"),
                          ("lost_above_chance", percent), ("won_above_chance", percent)):
            value = flips.get(key)
            row[key] = "" if value is None else cite(show(value), value, change.at("flips", key))
        values = [result["value"] for result in known.values() if result]
        if len(values) == 2 and result["is_up"] and all(0 <= value <= 1 for value in values):
            row["bar"] = [100 * min(values), 100 * max(values), 100 * (result["chance"] or 0), values[1] < values[0]]
        rows.append(row)
    return rows


def compare_results(runs: list) -> list[tuple]:
    """[(task or probe, score of the first run that has one before, [score after, of each run])]."""
    rows = []
    for kind in RESULTS:
        for task in dict.fromkeys(task for run in runs for task in run.sides[kind]["after"]):
            base = next((run for run in runs if task in run.sides[kind]["before"]), runs[0])
            scores = [describe_score(run.sides[kind][side].get(task), run.at(side, task, kind=kind))
                      for run, side in ((base, "before"), *((run, "after") for run in runs))]
            rows.append((task, scores[0], scores[1:]))
    return rows


def capability_table(run: Run) -> list[dict]:
    """A row of each capability: its mean score before and after, what was kept, how sure, and the sign of that."""
    rows = []
    for capability, held in run.capabilities.items():
        at, values = run.files["eval.json"][1].at("capabilities", capability), {
            key: finite(held.get(key)) for key in ("baseline", "current", "retention", "retention_above_chance")}
        show = percent if held.get("direction") != "down" else decimal
        ends = held["interval"] if isinstance(held.get("interval"), list) and len(held["interval"]) == 2 else [None]
        # The interval is the degradation's: of what was kept it is the other way around.
        lost, is_up = [finite(end) for end in reversed(ends)], show is percent
        ends = [None if end is None or (not is_up and end <= -1) else 1 - end if is_up else 1 / (1 + end)
                for end in lost]
        row = {key: "–" if value is None else cite((show if key in ("baseline", "current") else percent)(value), value,
                                                   at.at(key)) for key, value in values.items()}
        sign = str(held.get("sign") or ("unknown" if values["retention"] is None else "good"))
        how = "1 - ends of" if is_up else "1 / (1 + ends) of"
        rows.append(row | {"name": capability, "metric": str(held.get("metric") or ""), "sign": sign, "interval": cite(
            span(ends), ends, at.at("interval"), how) if None not in ends else ""})
    return rows


def describe_probes(run: Run) -> list[Markup]:
    """What the probes say, in sentences."""
    shown, sides = {}, run.sides["probes"]
    for probe in ("facts_trained", "facts_heldout", "in_context"):
        both = [cite(percent(held[probe]["value"]), held[probe]["value"], run.at(side, probe, "value", kind="probes"))
                for side, held in sides.items() if probe in held]
        if len(both) == 2:
            shown[probe] = join(both, " → ")
    facts = [Markup("{} {}").format(shown[probe], words) for probe, words in (
        ("facts_trained", "about documents that were trained on"), ("facts_heldout", "about held-out ones"))
             if probe in shown]
    return [Markup("{} answered rightly, before → after: {}.").format(words, said) for words, said in (
        ("Questions on facts", join(facts, ", ")),
        ("Items whose rule stands in the prompt (in-context learning)", shown.get("in_context"))) if said]


def describe_gaps(run: Run) -> list[Markup]:
    """A sentence of each stability gap."""
    return [Markup("Stability gap: {} was worst at step {}, {}, and has come back to {}.").format(
        name(gap["source"]), cite(f"{gap['step']:,}", gap["step"], replace(gap["at"][1], names=("step",))),
        cite(percent(gap["worst"], True), gap["worst"], [gap["at"][0], gap["at"][1]], CHANGE),
        cite(percent(gap["now"], True), gap["now"], [gap["at"][0], gap["at"][2]], CHANGE)) for gap in run.gaps]


def describe_checkpoints(run: Run) -> Markup:
    """Which evaluation of the run had the best overall score, where that was not the last one."""
    best = max(run.course, key=lambda point: point["score"], default=None)
    if best is None or best["step"] == run.course[-1]["step"]:
        return Markup("")
    at, last = best["at"], run.course[-1]
    scores = [cite(percent(point["score"], True), point["score"], [run.places["texts", "before"], point["at"]], SCORE)
              for point in (best, last)]
    step = cite(f"{best['step']:,}", best["step"], replace(at, names=(*at.names[:-1], "step")))
    return Markup("The best overall score along the run, {}, was at step {}; the last one is {}.").format(
        scores[0], step, scores[1])


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
