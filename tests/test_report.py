"""report.py against numbers worked out by hand from a run folder written by hand, and against laws: the last line of a
step wins, nothing from a file becomes markup, the page loads nothing, an unknown forgetting is never shown as a number.
The page is read back with the standard library's HTML parser, so what is checked is what a browser would see."""

import json
import math
import re
import shutil
import subprocess
import sys
import tomllib
import zlib
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from matplotlib.figure import Figure

import report
from core.errors import UserError
from measure import charts, report_tables

ROOT = Path(report.__file__).parent
VOID = {"meta", "br", "link", "img", "input"}
# Elements within a sentence: nothing stands between their text and the text beside them.
INLINE = {"data", "bdi", "b", "abbr"}


class Page(HTMLParser):
    """The tags, attributes and visible text of a page, and the rows of its tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.rows, self._open = [], [], [], [], []
        self.feed(text)
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.words += [" "] * (tag not in INLINE)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag not in INLINE and self.rows and self.rows[-1]:
            self.rows[-1][-1] += " "

    def handle_endtag(self, tag):
        self.words += [" "] * (tag not in INLINE)
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.words.append(data)
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data

    def row(self, start):
        return next(row for row in self.rows if row[0].startswith(start))


def side(legal=1.25, statutes=1.0, stories=0.8, web=1.0, **more):
    """An evaluation of two domain and two general sources; bits per byte as given, perplexity twice that."""
    roles = {"legal": "domain", "statutes": "domain", "stories": "general", "web": "general"}
    values = {"legal": legal, "statutes": statutes, "stories": stories, "web": web}
    return {name: {"role": roles[name], "bits_per_byte": bits, "nats_per_token": bits * 3, "perplexity": bits * 2,
                   "tokens": 100, "bytes": 400} | more for name, bits in values.items() if bits is not None}


AFTER = {"legal": 1.0, "statutes": 0.9, "stories": 0.84, "web": 1.03}  # gains 20 and 10 %, losses 5 and 3 %
START = {"kind": "start", "step": 0, "time": 1.7e9, "run": "tiny", "parameters": 4000000,
         "trainable_parameters": 1000000, "tokens_per_step": 100, "total_steps": 30, "device": "cpu",
         "precision": "fp32", "versions": {"torch": "2.13.0"},
         "sources": {"legal": {"role": "domain"}, "statutes": {"role": "domain"}, "stories": {"role": "general"},
                     "web": {"role": "general"}}}


def train(step, loss=2.0, **more):
    return {"kind": "train", "step": step, "loss": loss, "lr": 1e-5, "grad_norm": 0.5, "tokens": step * 100,
            "tokens_per_second": 1000.0, "step_ms": 100.0, "peak_gb": 1.5, "domain_share": 0.7,
            "sources": {"legal": {"loss": loss, "tokens": step * 70, "epochs": step / 40},
                        "stories": {"loss": loss + 1, "tokens": step * 30, "epochs": 0.25}}} | more


def write(folder, lines=None, before=None, after=None, stated=True, tail="", **extra):
    """A run folder: START, an evaluation at 0 and at 30, three training steps; eval.json when `stated`."""
    before, after = side() if before is None else before, side(**AFTER) if after is None else after
    folder.mkdir(parents=True, exist_ok=True)
    if lines is None:
        lines = [START, {"kind": "eval", "step": 0, "sources": before, "protocol": {"windows": 64}},
                 {"kind": "samples", "step": 0, "samples": [{"prompt": "The court", "text": "The court was red."}]},
                 train(10), train(20), train(30), {"kind": "eval", "step": 30, "sources": after},
                 {"kind": "samples", "step": 30, "samples": [{"prompt": "The court", "text": " affirmed."}]}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    (folder / "config.toml").write_text('[run]\nname = "tiny"\n')
    if stated:
        stated = {"protocol": {"windows": 64}, "before": before, "after": after} | extra
        (folder / "eval.json").write_text(json.dumps(stated))
    return folder


def page(*folders, draw=False):
    """The page over these folders; without `draw` the charts have captions but no picture, which saves time."""
    runs = [report.read_run(folder) for folder in folders]
    if draw:
        return Page(str(report.render(runs)))
    with mock.patch.object(charts, "to_svg", return_value=""):
        return Page(str(report.render(runs)))


# --- numbers ---

def test_numbers_equal_hand_computed_ones(tmp_path):
    run = report.read_run(write(tmp_path / "run", domain_gain=0.15, forgetting=0.04))
    assert run.domain_gain == pytest.approx((0.20 + 0.10) / 2)
    assert run.forgetting == pytest.approx((0.05 + 0.03) / 2)
    assert run.overall == pytest.approx(0.15)  # forgetting below 5 % costs nothing
    assert run.notes == []
    shown = page(tmp_path / "run")
    assert "The domain gained 15.0 % and general text lost 4.0 %, in bits per byte." in shown.text
    assert "Forgetting is below 5 %: good. The source that lost most is stories, 5.0 %." in shown.text
    assert "What helps" not in shown.text
    # before, after, change, (bar), perplexity = 2 x bits, tokens = 70 and 30 a step, epochs
    assert shown.row("legal") == ["legal domain", "1.250", "1.000", "−20.0 %", "", "2.50 → 2.00", "2,100", "70.0 %",
                                  "0.75"]
    assert shown.row("statutes") == ["statutes domain", "1.000", "0.900", "−10.0 %", "", "2.00 → 1.80", "–", "–", "–"]
    assert shown.row("stories") == ["stories general", "0.800", "0.840", "+5.0 %", "", "1.60 → 1.68", "900", "30.0 %",
                                    "0.25"]
    assert "1.00M (25 %)" in shown.text  # trainable parameters
    assert "windows: 64" in shown.text
    assert "torch 2.13.0" in shown.text
    assert "Tokens per second, median 1,000; peak memory 1.50 GB." in shown.text
    before, after = shown.text.index("was red."), shown.text.index("affirmed.")
    assert before < after
    assert "The court was red." not in shown.text  # the prompt stands once, above both


@pytest.mark.parametrize(("rise", "grade"), [(-0.02, "good"), (0.049, "good"), (0.051, "warning"), (0.099, "warning"),
                                             (0.101, "bad")])
def test_forgetting_grades_and_advice(tmp_path, rise, grade):
    write(tmp_path / "run", after=side(1.0, 0.9, 0.8 * (1 + rise), 1.0 * (1 + rise)))
    run = report.read_run(tmp_path / "run")
    shown = page(tmp_path / "run")
    said = str(report_tables.headline(run))
    assert re.search(f'<b class="{grade}"><data [^>]*>{charts.percent(abs(rise))}</data></b>', said)
    assert ("general text gained" in shown.text) == (rise < 0)
    assert ("Forgetting. What helps: raise replay" in shown.text) == (grade == "bad")
    assert run.overall == pytest.approx(0.15 - max(0, rise - 0.05))


def test_worse_and_flat_domains_are_said(tmp_path):
    worse = page(write(tmp_path / "worse", after=side(1.5, 1.2, 0.8, 1.0)))
    assert "The domain got worse by 20.0 % and general text gained 0.0 %" in worse.text
    flat = page(write(tmp_path / "flat", after=side(1.25, 1.0, 0.8, 1.0)))
    assert "Flat. What helps: use a learning rate 2-3x higher" in flat.text
    assert "Divergence. What helps: lower the learning rate" in worse.text


def test_a_statement_in_eval_json_that_its_own_values_contradict_is_noted(tmp_path):
    shown = page(write(tmp_path / "run", forgetting=0.01))
    assert "eval.json states a forgetting of 1.0 %; its values before and after give 4.0 %" in shown.text


def test_masked_lm_without_bits_per_byte(tmp_path):
    def masked(accuracy, **values):
        fields = side(**values, accuracy=accuracy)
        return {name: {k: v for k, v in field.items() if k != "bits_per_byte"} for name, field in fields.items()}

    shown = page(write(tmp_path / "run", before=masked(0.5), after=masked(0.625, **AFTER)))
    assert "gained 15.0 % and general text lost 4.0 %, in nats per predicted token." in shown.text
    assert "Accuracy on domain text went from 50.0 % to 62.5 %." in shown.text
    assert "50.0 % → 62.5 %" in shown.row("legal")
    assert shown.row("legal")[1:3] == ["3.750", "3.000"]


# --- where each number stands ---

# What stands on the page as it stands in report.html.j2, and in the files as text: no number of a run.
CONSTANTS = re.compile(r"95 %|(below|above|between) 5 (%|and 10 %)|(below|above) 10 %|"
                       r"max\(0, (mean )?forgetting − 5 %\)|at step 0\b")
VERBATIM = {"bdi", "pre", "title", "style", "svg", "figure"}


class Traces(HTMLParser):
    """[(text, value, what was done, places)] of the <data> elements of a page, and the texts with a digit that stand in
    none and are no name and no file's text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.untraced, self._open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "data":
            *how, = attrs["title"].split("\n")
            first = next(i for i, line in enumerate(how) if re.match(r"[\w.]+\.(jsonl|json|toml)\b", line))
            self.found.append(["", attrs["value"], " ".join(how[:first]), how[first:]])
        if tag not in VOID:
            # Other people's texts, and the page's own words.
            self._open.append("pre" if attrs.get("class") in ("sample", "words") else tag)

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        if "data" in self._open:
            self.found[-1][0] += data
        elif not VERBATIM & set(self._open) and re.search(r"\d", CONSTANTS.sub("", data)):
            self.untraced.append(data.strip())


def look_up(folder, place):
    """What stands at a place: the lines that it names must hold the value by the names that it gives."""
    where, _, pointer = place.partition(" /")
    file, _, lines = where.partition(":")
    text = (folder / file).read_text()
    names = [name.replace("~1", "/").replace("~0", "~") for name in pointer.split("/")] if pointer else []
    if file == "metrics.jsonl":
        first, _, last = lines.partition("-")
        rows = [json.loads(line) for line in text.split("\n")[int(first) - 1:int(last or first)]]
        rows = [row for row in rows if not last or names[0] in row]
    else:
        rows = [tomllib.loads(text) if file.endswith("toml") else json.loads(text)]
    for name in names:
        rows = [row[int(name) if isinstance(row, list) else name] for row in rows]
    value = rows if "-" in lines else rows[0]
    # What stands in a list has the list's line.
    if names and not any(name.isdigit() for name in names[:-1]) and isinstance(value, int | float | str):
        assert json.dumps(value) in text.split("\n")[int(lines) - 1], place
        assert names[-1] in text.split("\n")[int(lines) - 1], place
    return value


def pairs(values):
    return list(zip(values[::2], values[1::2]))


HOW = {
    "": lambda x: x, "after / before - 1": lambda was, now: now / was - 1, "after - before": lambda was, now: now - was,
    "mean of 1 - after / before": lambda *v: sum(1 - now / was for was, now in pairs(v)) / len(v) * 2,
    "mean of after / before - 1": lambda *v: sum(now / was - 1 for was, now in pairs(v)) / len(v) * 2,
    "mean of": lambda *v: sum(v) / len(v), "median of": lambda v: float(np.median(v)),
    "first / second, of": lambda first, second: first / second,
    "first / sum of all, of": lambda *v: v[0] / sum(v),
    "number of lines, of": lambda *v: len(v), "number of lines whose value is not finite, of":
        lambda v: sum(value is None or not math.isfinite(value) for value in v),
    "1 - ends of": lambda ends: [1 - end for end in reversed(ends)],
    "1 / (1 + ends) of": lambda ends: [1 / (1 + end) for end in reversed(ends)],
    "seconds since 1970": lambda x: x, "by measure/verdict.py, from": lambda *_: None}
DRAWN = "the middle 95 % of 1,000 draws of the documents, of each "


def work_out(folder, how, places, values):
    """What a number of a page has to be, by what it says was done with the values at its places."""
    if how.startswith(DRAWN):
        # [draws, places]: the documents of a text are the same ones before and after.
        sums = []
        for place, nats in zip(places, values):
            generator = np.random.default_rng(zlib.crc32(place.split("/")[-2].encode()))
            sums.append([sum(nats[i] for i in generator.integers(len(nats), size=len(nats))) for _ in range(1000)])
        drawn = [work_out(folder, how.removeprefix(DRAWN), places, each) for each in zip(*sums)]
        return np.quantile(drawn, (0.025, 0.975)).tolist()
    if how == "domain gain - max(0, forgetting - 0.05), of":
        if isinstance(values[0], dict):
            # Of all sources of two evaluations.
            places = [f"{places[0]}/{source}/" for source in values[0] for _ in range(2)]
            values = [side[source]["bits_per_byte"] for source in values[0] for side in values]
        found = {"domain": [], "general": []}
        for place, (was, now) in zip(places[::2], pairs(values)):
            found[look_up(folder, place.rpartition("/")[0])["role"]].append(now / was - 1)
        gain, lost = (sum(found[role]) / len(found[role]) for role in found)
        return -gain - max(0, lost - 0.05)
    if "steps" in how:
        first, _, last = places[0].partition(":")[2].partition(" ")[0].partition("-")
        lines = (folder / "metrics.jsonl").read_text().split("\n")[int(first) - 1:int(last) or None]
        rows = [row for row in map(json.loads, lines) if "step_ms" in row]
        # A line has the mean since the line before it, the first one that of its own step.
        before = [rows[0]["step"] - 1, *(row["step"] for row in rows)]
        seconds = sum((row["step"] - since) * row["step_ms"] for row, since in zip(rows, before)) / 1000
        if how == "seconds: the sum over all steps of the mean time of":
            return seconds
        rate = re.fullmatch(r"(--watts|--price)? ?([\d.]*)( times )?hours of the steps times devices, of", how)
        device_hours = seconds / 3600 * (values[1] if len(values) > 1 else 1)
        return device_hours * float(rate[2] or 1) / (1000 if rate[1] == "--watts" else 1)
    return HOW[how](*values)


def follow(folder, shown) -> list:
    """Find each number of a page in the files, work out again what was made of it, and compare what is shown. Returns
    what was done with the values, of each."""
    done = []
    for text, value, how, places in Traces(shown).found:
        want = work_out(folder, how, places, [look_up(folder, place) for place in places])
        done.append(how)
        if isinstance(want, list) and want and isinstance(want[0], int | float):
            assert json.loads(value) == pytest.approx(want, rel=1e-9, abs=1e-12), (text, how, places)
        elif isinstance(want, int | float):
            assert json.loads(value) == pytest.approx(want, rel=1e-9), (text, how, places)
        else:
            continue
        # What is shown is the value, rounded. The interval of a share has no sign of per cent where that stands above.
        numbers = re.findall(r"[+−-]?[\d,]*\d(?:\.\d+)?", text)
        scale = 1e-2 if "%" in text else {"k": 1e3, "M": 1e6, "B": 1e9}.get(text[-1], 1)
        scale = 3600 if how.startswith("seconds: ") and "hours" in text else scale
        if "UTC" in text or "<" in text:
            continue
        assert numbers, text
        wants = want if isinstance(want, list) else [want]
        scale = 1e-2 if isinstance(want, list) and max(map(abs, wants)) <= 1 else scale
        for number, one in zip(numbers, wants, strict=isinstance(want, list)):
            digits = len(number.partition(".")[2])
            shown_value = float(number.replace(",", "").replace("−", "-")) * scale
            assert abs(shown_value) == pytest.approx(abs(one), abs=0.5001 * scale * 10**-digits), (text, one)
    return done


def test_every_number_of_the_page_stands_where_it_says(tmp_path):
    start = START | {"base": {"name": "tiny 3", "license": "mit"}, "family": "llama", "vocab_size": 512,
                     "world_size": 2, "tokenizer": {"name": "tiny", "vocab_size": 512}, "recommended_lr": 1e-4,
                     "sources": START["sources"] | {"legal": {
                         "role": "domain", "documents": 178, "bytes": 280_000, "tokens": 155_000, "cleaning": [
                             {"by": "clean.py", "documents": 180, "kept": 179}]}}}
    lines = [start, {"kind": "eval", "step": 0, "sources": side()}, train(10), {"kind": "left_out", "step": 11,
             "message": "7 odd"}, train(20, math.nan), train(30),
             {"kind": "samples", "step": 30, "samples": [{"prompt": "1 The", "text": "court 2"}]},
             {"kind": "eval", "step": 30, "sources": side(**AFTER)}, {"kind": "replay", "step": 30, "policy": "budget"}]
    run = write(tmp_path / "run", lines, spread(side(lost_share=0.1), 0), spread(side(**AFTER, accuracy=0.5), 0.3))
    (run / "config.toml").write_text("[model]\nhidden_size = 64\nintermediate_size = 172\nnum_hidden_layers = 5\n"
                                     "num_attention_heads = 8\nnum_key_value_heads = 4\n[optim]\nlr = 0.3\n"
                                     '[forget.adaptive]\npolicy = "budget"\nepsilon = 0.02\n')
    for stated in (True, False):
        found = report.read_run(run)
        found.watts, found.price = 700, 2.5
        text = report.render([found])
        assert Traces(text).untraced == []
        done = follow(run, text)
        assert len(done) > 60
        assert done.count("") > 40
        assert {"after / before - 1", "mean of 1 - after / before", "median of", "after - before",
                "domain gain - max(0, forgetting - 0.05), of", "hours of the steps times devices, of",
                "seconds: the sum over all steps of the mean time of",
                "--watts 700 times hours of the steps times devices, of"} <= set(done)
        if stated:
            assert sum("draws" in how for how in done) >= 7
            assert {"64", "torch 2.13.0"} <= {text for text, *_ in Traces(text).found}
            # Without what a run writes at its end.
            (run / "eval.json").unlink()
    write(tmp_path / "other")
    both = Traces(report.render([report.read_run(run), report.read_run(tmp_path / "other")]))
    # What is no value of a run's: how many runs there are, and their numbers on this page.
    assert {text for text in both.untraced if not re.search(r"[12] run|^[12]$", text)} == set(), both.untraced


# --- what an objective measures ---

def measured(step, margin, **more):
    return {"kind": "eval", "step": step, "sources": {}, "objective": {
        "prefs": {"loss": 0.7 - margin, "margin": margin, "sequences": 12} | more, "web": {"margin": 2 * margin}}}


def test_what_an_objective_measures_is_drawn_and_stands_in_a_table(tmp_path):
    lines = [START, measured(0, 0.0), train(10, objective={"margin": 0.1, "kept": 0.6}), measured(10, 0.2),
             train(20, objective={"margin": 0.2, "kept": None}), measured(20, 0.4)]
    folder = write(tmp_path / "run", lines, stated=False)
    shown = page(folder, draw=True)
    said = "So far, at step 20 of 30, the held-out loss of the objective went from 0.700 to 0.300 on prefs"
    assert said in shown.text
    assert "no text was evaluated" in shown.text
    assert [row for row in shown.rows if len(row) == 4 and row[0] in ("prefs", "web")] == [
        ["prefs", "loss", "0.700", "0.300"], ["prefs", "margin", "0.000", "0.400"], ["web", "margin", "0.000", "0.800"]]
    titles = [chart["title"] for chart in charts.draw_objective(report.read_run(folder))]
    assert titles == ["Loss", "Margin", "Kept"]
    figure = Figure()
    _, _, legend = charts.chart_measure(report.read_run(folder), "margin", figure.add_subplot())
    assert [text for _, text in legend] == ["training", "prefs, held out", "web, held out"]
    drawn = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert drawn == [[[10, 0.1], [20, 0.2]], [[0, 0.0], [10, 0.2], [20, 0.4]], [[0, 0.0], [10, 0.4], [20, 0.8]]]
    # At its end a run says itself what it measured, of which model, and what is wrong.
    (folder / "eval.json").write_text(json.dumps({"before": {}, "after": {}, "objective": {
        "name": "dpo", "before": {"prefs": {"margin": 0.0}}, "after": {"prefs": {"margin": 0.5}},
        "warnings": ["the <b>chosen</b> fell"]}}))
    shown = page(folder)
    assert [row for row in shown.rows if row[:1] == ["prefs"]] == [["prefs", "margin", "0.000", "0.500"]]
    assert "What dpo measures" in shown.text
    assert "the <b>chosen</b> fell" in shown.text


@pytest.mark.parametrize("odd", [3, "x", [1], {"prefs": 3}, {"prefs": {"margin": "x"}}, {"prefs": {"margin": [1]}}])
def test_what_is_no_measure_is_left_out(tmp_path, odd):
    lines = [START, {"kind": "eval", "step": 0, "sources": side(), "objective": odd}, train(10, objective=odd),
             {"kind": "eval", "step": 10, "sources": side(), "objective": odd}]
    folder = write(tmp_path / "run", lines, objective=odd)
    page(folder, draw=True)
    (folder / "eval.json").write_text(json.dumps({"objective": {"before": odd, "after": odd, "warnings": odd}}))
    page(folder, draw=True)


# --- what is unknown ---

def test_without_a_baseline_forgetting_is_unknown_and_never_zero(tmp_path):
    lines = [START, train(10), train(30), {"kind": "eval", "step": 30, "sources": side(**AFTER)}]
    run = report.read_run(write(tmp_path / "run", lines, before={}, forgetting=None))
    assert run.forgetting is None
    assert run.overall is None
    shown = page(tmp_path / "run")
    assert "Gain and forgetting are unknown: no baseline" in shown.text
    assert "Forgetting unknown: no baseline" in shown.text
    assert not re.search(r"(?<!\d)0\.0 %", shown.text)
    assert shown.row("legal") == ["legal domain", "1.000", "2.00", "2,100", "70.0 %", "0.75"]


def test_without_general_text_forgetting_is_unknown(tmp_path):
    domain = {"stories": None, "web": None}
    shown = page(write(tmp_path / "run", before=side(**domain), after=side(**(AFTER | domain))))
    assert "The domain gained 15.0 %, in bits per byte; forgetting is unknown: no general text was evaluated." \
        in shown.text


def test_a_run_still_going_uses_its_first_and_last_evaluation(tmp_path):
    lines = [START, {"kind": "eval", "step": 0, "sources": side()}, train(10),
             {"kind": "eval", "step": 10, "sources": side(1.1)}, {"kind": "eval", "step": 20, "sources": side(1.0)},
             train(20)]
    shown = page(write(tmp_path / "run", lines, stated=False))
    assert "So far, at step 20 of 30, the domain gained 10.0 % and general text gained 0.0 %" in shown.text
    assert "still going" in shown.text
    assert "at step 20" in shown.row("source")
    only_baseline = page(write(tmp_path / "early", lines[:3], stated=False), draw=True)
    assert "No verdict yet: only the baseline at step 0 has been evaluated." in only_baseline.text
    assert only_baseline.tags.count("svg") == 6  # one point is enough for every chart


# --- the lines of metrics.jsonl ---

def test_after_a_resume_the_last_line_of_a_step_wins_and_undone_steps_are_dropped(tmp_path):
    lines = [START, {"kind": "eval", "step": 0, "sources": side()}, train(10, 3.0), train(20, 2.9), train(30, 2.8),
             {"kind": "eval", "step": 30, "sources": side(9, 9, 9, 9)}, {"kind": "resume", "step": 10},
             train(20, 2.5), {"kind": "eval", "step": 20, "sources": side(**AFTER)}, train(20, 2.4)]
    run = report.read_run(write(tmp_path / "run", lines, stated=False))
    assert [(row["step"], row["loss"]) for row in run.train] == [(10, 3.0), (20, 2.4)]
    assert run.domain_gain == pytest.approx(0.15)
    shown = page(tmp_path / "run")
    assert "step 10: resumed" in shown.text
    assert "dotted vertical line: resumed from there" in shown.text


def test_a_cut_last_line_is_ignored_with_a_note(tmp_path):
    write(tmp_path / "run", tail='{"kind": "train", "step": 40, "lo')
    run = report.read_run(tmp_path / "run")
    assert [row["step"] for row in run.train] == [10, 20, 30]
    assert "The last line of metrics.jsonl is cut" in page(tmp_path / "run").text


def test_unreadable_lines_in_the_middle_are_counted(tmp_path):
    write(tmp_path / "run", tail='{"kind": "tr{"kind": "resume"}\n[1]\n{"kind": "train", "step": "x"}\n'
          + json.dumps(train(31)) + "\n")
    run = report.read_run(tmp_path / "run")
    assert run.train[-1]["step"] == 31
    assert run.notes == ["3 lines of metrics.jsonl could not be read: left out (first: line 9)."]


def test_a_loss_that_was_not_finite_is_reported(tmp_path):
    lines = [START, {"kind": "eval", "step": 0, "sources": side()}, train(10), train(20, math.nan),
             train(30) | {"loss": None}]
    shown = page(write(tmp_path / "run", lines, stated=False))
    assert "The loss was not finite at 2 logged steps (first: step 20)." in shown.text
    assert "What helps: lower the learning rate; look at the documents of the batch named in the log." in shown.text


def test_broken_eval_json_falls_back_to_the_metrics(tmp_path):
    write(tmp_path / "run")
    (tmp_path / "run" / "eval.json").write_text('{"before": ')
    shown = page(tmp_path / "run")
    assert "eval.json is not valid JSON" in shown.text
    assert "gained 15.0 %" in shown.text


# --- curves ---

def test_realised_mix_keeps_the_count_of_a_source_that_is_absent_from_a_line(tmp_path):
    lines = [START, train(10, domain_share=0.4, sources={"legal": {"tokens": 300}, "stories": {"tokens": 700}}),
             train(20, domain_share=0.2, sources={"stories": {"tokens": 900}})]
    run = report.read_run(write(tmp_path / "run", lines, stated=False))
    axes = Figure().add_subplot()
    charts.chart_mix(run, axes)
    domain = axes.collections[0].get_paths()[0].vertices
    top = {x: max(y for x_, y in domain if x_ == x) for x in (10, 20)}
    assert top == {10: pytest.approx(30.0), 20: pytest.approx(300 / 1200 * 100)}
    wanted, mean_so_far = (line.get_ydata() for line in axes.lines)
    assert list(wanted) == pytest.approx([40, 20])
    assert list(mean_so_far) == pytest.approx([40, 30])


def test_a_long_run_stays_a_small_page(tmp_path):
    lines = [START, {"kind": "eval", "step": 0, "sources": side()},
             *(train(step, 2 + math.sin(step)) for step in range(1, 20_001))]
    run = report.read_run(write(tmp_path / "run", lines, stated=False))
    assert len(str(report.render([run]))) < 300_000


# --- the page itself ---

NASTY = '"><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7777*3 }} $x^2$ &amp; </style></svg>'


def test_nothing_from_a_file_becomes_markup(tmp_path):
    source = {NASTY: {"role": "domain", "bits_per_byte": 1.0, "nats_per_token": 2.0, "perplexity": NASTY}}
    lines = [START | {"run": NASTY, "device": NASTY, "versions": {NASTY: NASTY}, "sources": {NASTY: {"role": NASTY}}},
             {"kind": "eval", "step": 0, "sources": source, "protocol": {NASTY: [NASTY]}},
             {"kind": "samples", "step": 0, "samples": [{"prompt": NASTY, "text": NASTY}]},
             {"kind": "event", "step": 5, "message": NASTY},
             train(10, sources={NASTY: {"loss": 1.0, "tokens": 5, "epochs": NASTY}})]
    for name in ("a", "b"):
        write(tmp_path / name, lines, stated=False)
        (tmp_path / name / "config.toml").write_text(NASTY)
    for shown in (page(tmp_path / "a", draw=True), page(tmp_path / "a", tmp_path / "b", draw=True)):
        assert not {"script", "img"} & set(shown.tags)
        assert not [name for _, name, _ in shown.attributes if name.startswith("on")]
        assert shown.text.count(NASTY) >= 7  # title, name, device, source, prompt, event, configuration: as text
        assert "23331" not in shown.text  # nor a template


def test_the_page_is_self_contained(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / name)
    text = str(report.render([report.read_run(tmp_path / name) for name in ("a", "b", "c")]))
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    shown = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(shown.tags)
    links = [value for _, name, value in shown.attributes if name in ("src", "href", "xlink:href")]
    ids = [value for _, name, value in shown.attributes if name == "id"]
    assert links
    assert all(value.startswith("#") and value[1:] in ids for value in links)
    assert len(ids) == len(set(ids))  # inline drawings share one name space
    assert shown.tags.count("svg") == 4 + 3 * 6


def test_the_same_folder_gives_the_same_page(tmp_path):
    run = write(tmp_path / "run")
    assert str(report.render([report.read_run(run)])) == str(report.render([report.read_run(run)]))


# 21 steps of 100 ms: the first line is of one step.
COST = "2 s; 0.00058 device-hours"


def test_several_runs(tmp_path):
    lines = {name: [START | {"run": name}, train(10), train(30)] for name in ("careful", "greedy", "blind")}
    write(tmp_path / "careful", lines["careful"])
    write(tmp_path / "greedy", lines["greedy"], after=side(0.75, 0.6, 1.0, 1.25))  # 40 % gained, 25 % lost
    write(tmp_path / "blind", lines["blind"], before={}, protocol={"windows": 8})
    shown = page(*(tmp_path / name for name in lines))
    rows = [row for row in shown.rows if row[0][:1] in "123"]
    assert rows == [
        # 0.15, and 0.40 - (0.25 - 0.05) = 0.20; means of bits per byte over two sources each
        ["1 careful", "1.125 → 0.950", "0.900 → 0.935", "15.0 %", "4.0 %", "+15.0 %", "3,000", COST],
        ["2 greedy", "1.125 → 0.675", "0.900 → 1.125", "40.0 %", "25.0 %", "+20.0 %", "3,000", COST],
        ["3 blind", "– → 0.950", "– → 0.935", "–", "unknown: no baseline", "–", "3,000", COST],
    ]
    assert "greedy scores best of 3 runs. The domain gained 40.0 % and general text lost 25.0 %" in shown.text
    assert "not evaluated under the same protocol" in shown.text
    runs = [report.read_run(tmp_path / name) for name in lines]
    axes = Figure().add_subplot()
    charts.chart_gain_against_forgetting(runs, True, axes)
    dots = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() == "o"]
    assert dots == [pytest.approx([4, 15]), pytest.approx([25, 40])]  # (forgetting, gain) in per cent; blind has none


# --- the command line ---

def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
    return report.main()


def test_a_page_replaces_no_file_but_a_report(tmp_path, monkeypatch, capsys):
    run, thesis = write(tmp_path / "run"), tmp_path / "thesis.html"
    thesis.write_text("<html>my thesis</html>")
    assert command(monkeypatch, run, "--out", thesis) == 2
    assert "thesis.html is no report of ours" in capsys.readouterr().err
    assert thesis.read_text() == "<html>my thesis</html>"
    assert [command(monkeypatch, run) for _ in range(2)] == [0, 0]


def test_the_command_writes_beside_the_first_run_or_where_told(tmp_path, monkeypatch, capsys):
    run = write(tmp_path / "run")
    assert command(monkeypatch, run) == 0
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    out = tmp_path / "new" / "both.html"
    assert command(monkeypatch, run, run, "--out", out, "--json", tmp_path / "said.json") == 0
    assert "Comparison" in out.read_text(encoding="utf-8")
    assert "tiny: The domain gained 15.0 % and general text lost 4.0 %, in bits per byte." in capsys.readouterr().out
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["out"] == str(out)
    assert said["runs"][1]["forgetting"] == pytest.approx(0.04)


def test_errors_are_one_line_with_a_remedy(tmp_path, monkeypatch, capsys):
    empty, nothing, a_file = tmp_path / "empty", tmp_path / "nothing", tmp_path / "file"
    empty.mkdir()
    write(nothing, [START], stated=False)
    a_file.write_text("")
    run = write(tmp_path / "run")
    cases = [
        ([tmp_path / "absent"], r"run folder '.*absent' does not exist: give the folder that train.py wrote.*"),
        ([a_file], r"run folder '.*file' is no folder: give the folder.*"),
        ([empty], r"run folder '.*empty' holds no metrics.jsonl: give the folder.*"),
        ([nothing], r"nothing to show: '.*metrics.jsonl' holds no training step and no evaluation yet; try again.*"),
        ([run, "--out", tmp_path], r".* is a folder; name a file in it"),
        ([run, "--oot", "x"], r"unknown option --oot; did you mean --out\?"),
        ([], r"name at least one RUN \(report.py --help .*"),
    ]
    for words, message in cases:
        assert command(monkeypatch, *words) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert re.fullmatch(f"error: {message}\n", said.err), said.err
    with pytest.raises(UserError):
        report.read_run(empty)


def test_report_imports_nothing_that_writes_a_run():
    """It must read folders of older and newer versions, and of runs that are half broken."""
    code = "import sys, report; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    folders = {"core", "kernels", "text", "learn", "stages", "measure", "experiments"}
    ours = {path.stem for path in ROOT.glob("*.py")}
    imported = {name for name in done.stdout.split() if name.split(".")[0] in ours | folders}
    core = {name for name in imported if name.split(".")[0] == "core"}
    assert imported - core == {"report", "measure", "measure.charts", "measure.places", "measure.read_run",
                               "measure.report_tables",
                               "measure.verdict"}
    assert "torch" not in done.stdout.split()


# --- how sure it is, and what to do ---

def spread(scores: dict, noise: float, n: int = 40) -> dict:
    """The scores with nats of n documents, as many bits as the score says, `noise` of them up and down in turns."""
    return {name: fields | {"documents": n, "nats_by_document": [
        fields["bits_per_byte"] * (1 + noise * (-1) ** i * (i % 7) / 7) for i in range(n)]}
        for name, fields in scores.items()}


def test_intervals_and_what_cannot_be_told_from_no_change(tmp_path):
    """Truth: all documents of a text changed alike, so that its interval is a point; in the other run they did not."""
    sure = write(tmp_path / "sure", before=spread(side(), 0), after=spread(side(**AFTER), 0))
    shown = page(sure)
    assert shown.row("legal")[3] == "−20.0 % 95 %: −20.0 to −20.0 %"
    assert "15.0 % fall of bits per byte 95 %: +15.0 to +15.0 %" in shown.text
    assert "held out and scored: 40 documents, 100 tokens" in shown.text
    assert "not distinguishable" not in shown.text
    after = side(1.24, 0.99, 0.801, 1.001)
    unsure = page(write(tmp_path / "unsure", before=spread(side(), 0), after=spread(after, 0.9)))
    assert "The domain gained 0.9 % (not distinguishable from no change) and general text lost 0.1 % " \
        "(not distinguishable from no change), in bits per byte." in unsure.text
    assert "More held-out documents would say more" in unsure.text
    few = page(write(tmp_path / "few", before=spread(side(), 0, 5), after=spread(side(**AFTER), 0, 5)))
    assert "no interval: it needs 6 documents" in few.text
    assert "95 %:" not in few.text


def test_a_run_still_going_finds_its_documents_beside_its_evaluations(tmp_path):
    lines = [START, {"kind": "eval", "step": 0, "sources": side()}, train(10),
             {"kind": "eval", "step": 10, "sources": side(**AFTER)}]
    run = write(tmp_path / "run", lines, stated=False)
    for step, scores in ((0, side()), (10, side(**AFTER))):
        (run / f"eval_step_{step}.json").write_text(json.dumps({"texts": spread(scores, 0)}))
    assert report.read_run(run).interval["domain_gain"] == pytest.approx([0.15, 0.15])


LORA = "[lora]\nrank = 8\n[forget.lwf]\nalpha = 0.5\n[optim]\nlr = 0.001\n"


def test_advice_knows_the_run(tmp_path, monkeypatch, capsys):
    lines = [START | {"recommended_lr": 1e-4}, train(10), train(30)]
    run = write(tmp_path / "run", lines, after=side(1.0, 0.9, 1.0, 1.2))
    (run / "config.toml").write_text(LORA)
    shown = page(run).text
    advice = shown[shown.index("What helps"):shown.index("Domain gain")]
    assert "first lower the learning rate (optim.lr is 0.001; for this model start from 0.0001)" in advice
    assert "raise replay to 40-50 % of the tokens (it had 30 %); use EWC" in advice
    assert not {word for word in ("LoRA", "LwF") if word in advice}
    exploded = write(tmp_path / "exploded", after=side(89.0, 89.0, 89.0, 89.0, perplexity=1.5e47))
    shown = page(exploded)
    advice = shown.text[shown.text.index("What helps"):shown.text.index("Domain gain")]
    assert "lower the learning rate" in advice
    assert not {word for word in ("replay", "LoRA", "EWC", "LwF") if word in advice}
    assert "The run diverged." in shown.text
    assert shown.row("legal")[5] == "2.50 → 1.5e+47"
    assert not re.search(r"\d{12}", shown.text)
    assert command(monkeypatch, exploded) == 0
    assert "divergence; what helps: lower the learning rate" in capsys.readouterr().out


def test_what_a_colleague_asks_first(tmp_path):
    """Base, licence, tokenizer, sizes, data and what was cleaned away, time and cost."""
    start = START | {
        "base": {"name": "models/tiny", "license": "mit", "fingerprint": "abc"}, "family": "llama", "vocab_size": 512,
        "tokenizer": {"name": "models/tiny", "vocab_size": 512}, "world_size": 2,
        "sources": START["sources"] | {"legal": {
            "role": "domain", "documents": 178, "bytes": 280_000, "tokens": 155_000,
            "cleaning": [{"by": "clean.py", "documents": 180, "kept": 179}]}}}
    lines = [start, train(1, step_ms=1000.0), train(10, step_ms=2000.0), train(30, step_ms=100_000.0)]
    after = side(**AFTER)
    after["legal"]["lost_share"] = 0.0043
    run = write(tmp_path / "run", lines, after=after)
    (run / "config.toml").write_text("[model]\nhidden_size = 64\nintermediate_size = 172\nnum_hidden_layers = 5\n"
                                     "num_attention_heads = 8\nnum_key_value_heads = 4\n")
    shown = page(run).text
    for fact in ("base models/tiny", "licence of the base mit", "tokenizer models/tiny (512 ids)",
                 "llama, 5 blocks, 64 wide, MLP 172, heads 8/4, vocabulary 512",
                 "legal (domain) 178 documents; 280,000 bytes; 155,000 tokens; clean.py kept 179 of 180; held out and "
                 "scored: 100 tokens; 0.43 % of its bytes are in no token, so bits per byte are too low",
                 # 1 s, 9 steps of 2 s, 20 of 100 s; on two devices
                 "time and cost 0.56 hours; 1.1 device-hours"):
        assert fact in shown, fact


@pytest.mark.parametrize(("epsilon", "verdict"), [(0.02, "broken"), (0.05, "kept")])
def test_adaptive_replay_shows_its_budget_and_its_decisions(tmp_path, epsilon, verdict):
    decision = {"kind": "replay", "step": 20, "policy": "budget", "source": "stories", "lost": 0.031, "before": 0.3,
                "replay_share": 0.4, "reason": "0.0310 is above 0.02"}
    run = write(tmp_path / "run", [START, train(10), train(20), decision, train(30)])
    (run / "config.toml").write_text(f'[forget.adaptive]\npolicy = "budget"\nepsilon = {epsilon}\n')
    shown = page(run).text
    # Stories went from 0.80 to 0.84 bits per byte.
    assert (f"general text may lose {epsilon:.3f} bits per byte. stories lost most, 0.040 bits per byte: the budget "
            f"was {verdict}. Decisions: 1.") in shown
    assert "step 20: stories lost 0.0310; 0.0310 is above 0.02; share 0.30 → 0.40" in shown


def test_runs_on_other_texts_or_bases_are_not_ranked(tmp_path):
    first = write(tmp_path / "a")
    same, texts = write(tmp_path / "b"), write(tmp_path / "c", after=side(**AFTER, bytes=401))
    base = write(tmp_path / "d", [START | {"base": {"fingerprint": "other"}}, train(10)])
    assert "tiny, tiny: the best of 2 runs" not in page(first, same).text
    assert "tiny scores best of 2 runs." in page(first, same).text
    for other in (texts, base):
        shown = page(first, other)
        assert "2 runs that are not ranked: they began from other bases or were evaluated on other texts." in shown.text
        assert "scores best" not in shown.text
        assert "Dashed: as good an overall score" not in shown.text


def test_the_best_run_is_named_alone_only_where_it_can_be_told_from_the_others(tmp_path):
    runs = {"a": spread(side(**AFTER), 0), "b": spread(side(**(AFTER | {"legal": 1.001})), 0.5), "c": spread(side(), 0)}
    for name, after in runs.items():
        write(tmp_path / name, [START | {"run": name}, train(30)], before=spread(side(), 0), after=after)
    shown = page(*(tmp_path / name for name in runs))
    assert "a, b: the best of 3 runs are not distinguishable by overall score." in shown.text
    assert "a scores best of 2 runs." in page(tmp_path / "a", tmp_path / "c").text


def test_on_a_phone_no_column_hides_and_every_value_has_its_label(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name)
    for folders in (("a",), ("a", "b")):
        runs = [report.read_run(tmp_path / name) for name in folders]
        text = str(report.render(runs))
        assert "overflow-x" not in text
        assert "overflow:auto" not in text
        assert "nowrap" not in re.sub(r"(h1 b|td small|\.chip)\{[^}]*\}", "", text)      # a number, an interval, a word
        cells = re.findall(r"<td([^>]*)>", text)
        assert cells
        assert all("data-label" in cell or "name" in cell or "graph" in cell for cell in cells)
        # A picture 328 pixels wide, which is what 390 leave, has text of ten pixels.
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1])
        assert 8 * 328 / width >= 10


# --- capabilities, probes, checkpoints ---

def result(value, chance=0.25, capability="reasoning", **more):
    return {"acc": value, "metric": "acc", "value": value, "direction": "up", "chance": chance, "n": 200, "version": 1,
            "interval": [value - 0.05, value + 0.05], "capability": capability, "shots": 0, "items_hash": "ab"} | more


def judged(folder, name="arc_easy", reason="general text has lost 11 %", **more):
    """A run of three evaluations with tasks, probes, distances and a rule that ended it; what measure/retention.py says
    of a loss from 60 to 45 %."""
    results = [{"tasks": {name: result(value, **more)}, "probes": {
        "facts_trained": result(fact, **more), "facts_heldout": result(0.3), "in_context": result(alive, 0.5)}}
        for value, fact, alive in ((0.6, 0.3, 0.9), (0.5, 0.5, 0.8), (0.45, 0.8, 0.6))]
    scores = [side(), side(1.1, 0.95, 1.0, 1.2), side(**AFTER)]
    lines = [START | {"code": "0a1b2c-dirty"}, *(
        {"kind": "eval", "step": step, "sources": texts} | found
        for step, texts, found in zip((0, 10, 30), scores, results)),
             *(train(step, distance={"embed": 0.1, "layers.0": 0.2, "layers.1": 0.4, "all": step / 20})
               for step in (10, 20, 30)),
             {"kind": "ended", "step": 30, "reason": reason}]
    row = {"metric": "acc", "baseline": 0.6, "current": 0.45, "direction": "up", "degradation": 0.25, "sign": "bad",
           "interval": [0.15, 0.35], "retention": 0.75, "retention_above_chance": 0.2 / 0.35}
    flips = {"lost": 50, "won": 20, "lost_above_chance": 0.17, "won_above_chance": 0.02, "p": 0.0004}
    sides = {kind: {"before": results[0][kind], "after": results[2][kind]} for kind in ("tasks", "probes")}
    sides["tasks"]["change"] = {name: row | {"flips": flips}}
    return write(folder, lines, **sides, capabilities={more.get("capability", "reasoning"): row | {"tasks": [name]}})


def test_what_was_kept_and_which_answers_changed(tmp_path):
    run = judged(tmp_path / "run")
    text = report.render([report.read_run(run)])
    shown = Page(text)
    assert ["reasoning acc", "60.0 %", "45.0 %", "75.0 %", "65.0 to 85.0 %", "57.1 %"] in shown.rows
    assert shown.row("arc_easy") == ["arc_easy acc", "60.0 % 55.0 to 65.0", "45.0 % 40.0 to 50.0", "25.0 %", "", "200",
                                     "50 17.0 % above chance", "20 2.0 % above chance", "0.0004"]
    for said in ("Bad: of reasoning 75.0 % is kept.",
                 "Ended early, by a rule of the recipe: general text has lost 11 %",
                 "Questions on facts answered rightly, before → after: 30.0 % → 80.0 % about documents that were "
                 "trained on, 30.0 % → 30.0 % about held-out ones.", "code (git commit) 0a1b2c-dirty",
                 # stories rose from 0.8 to 1.0 and ended at 0.84
                 "Stability gap: stories was worst at step 10, +25.0 %, and has come back to +5.0 %."):
        assert said in shown.text, said
    assert Traces(text).untraced == []
    done = follow(run, text)
    assert done.count("") > 60
    titles = re.findall("<h3>(.*?)</h3>", text)
    assert {"Which checkpoint", "Tasks: reasoning", "Did the facts go in", "Is in-context learning alive",
            "Distance from the base", "Distance by block"} <= set(titles)


def test_the_interval_of_what_was_kept_of_a_perplexity(tmp_path):
    """From 10 to 11, or to 10.5 to 12.5: 10 / 11 are kept, or 10 / 12.5 to 10 / 10.5."""
    row = {"metric": "perplexity", "baseline": 10.0, "current": 11.0, "direction": "down", "degradation": 0.1,
           "interval": [0.05, 0.25], "sign": "bad", "retention": 10 / 11, "retention_above_chance": None}
    run = write(tmp_path / "run", capabilities={"language": row, "odd": row | {"interval": [-1, 0.25]}})
    text = report.render([report.read_run(run)])
    assert [row[-2] for row in Page(text).rows if row[0] in ("language perplexity", "odd perplexity")] == [
        "80.0 to 95.2 %", "–"]
    assert "1 / (1 + ends) of" in follow(run, text)


def test_tasks_of_several_runs_stand_beside_each_other(tmp_path):
    other = judged(tmp_path / "b", name="piqa", chance=0.5)
    shown = page(judged(tmp_path / "a"), other)
    assert shown.row("arc_easy")[:4] == ["arc_easy", "60.0 % 55.0 to 65.0", "45.0 % 40.0 to 50.0", "–"]
    assert shown.row("piqa")[:4] == ["piqa", "60.0 % 55.0 to 65.0", "–", "45.0 % 40.0 to 50.0"]


def test_checkpoints_that_none_beats(tmp_path):
    """By hand, of means over two sources each: step 10 gains (0.12 + 0.05) / 2 and loses (0.25 + 0.2) / 2, step 30
    gains 0.15 and loses 0.04; a checkpoint that eval.py scored at step 20 loses less and gains less."""
    run = judged(tmp_path / "run")
    (run / "eval_checkpoints.json").write_text(json.dumps({"checkpoints": [
        {"step": 20, "texts": side(1.2, 0.98, 0.8, 1.0)}, {"step": 25, "texts": side(bytes=7)}, {"step": "x"}, 3]}))
    course = report.read_run(run).course
    assert [(point["step"], point["is_best"]) for point in course] == [(10, False), (20, True), (30, True)]
    assert course[0]["domain_gain"] == pytest.approx(0.085)
    assert course[0]["forgetting"] == pytest.approx(0.225)
    # Where another than the last is best, the page says which one, and where that stands.
    best = tmp_path / "best"
    shutil.copytree(run, best)
    listed = [{"step": "x"}, {"step": 20, "texts": side(0.9, 0.8, 0.8, 1.0)}]
    (best / "eval_checkpoints.json").write_text(json.dumps({"checkpoints": listed}, indent=1))
    text = report.render([report.read_run(best)])
    # 0.28 and 0.2 on the domain, nothing lost; at the end 0.15.
    assert "The best overall score along the run, +24.0 %, was at step 20; the last one is +15.0 %." in Page(text).text
    assert any(place.endswith("/checkpoints/1/step") for *_, places in Traces(text).found for place in places)
    follow(best, text)
    axes = Figure().add_subplot()
    charts.chart_front(report.read_run(run), axes)
    dots = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() == "o"]
    assert dots == [pytest.approx([22.5, 8.5]), pytest.approx([0, 3]), pytest.approx([4, 15])]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium is installed: what a browser makes of the page is not looked at")
def test_a_browser_makes_no_element_of_a_strangers_text(tmp_path):
    """In every name, text, key and value of the files stands markup that would leave a mark on the page."""
    evil = NASTY.replace("alert(1)", "document.title='owned'").replace("alert(2)", "document.title='owned'")
    plain, names = judged(tmp_path / "plain"), judged(
        tmp_path / "evil", evil, evil, capability=evil, metric=evil)
    rows = [json.loads(line) for line in (names / "metrics.jsonl").read_text().splitlines()]
    held = {"role": "domain", "documents": 3, "fingerprint": evil,
            "cleaning": [{"by": evil, "kept": 1, "documents": 2}]}
    rows[0] |= {"run": evil, "device": evil, "code": evil, "versions": {evil: evil}, "base": {
        "name": evil, "license": evil, "fingerprint": evil}, "family": evil, "sources": {evil: held}}
    rows += [{"kind": "samples", "step": step, "samples": [{"prompt": evil, "text": f"{evil}{step}"}]}
             for step in (0, 30)]
    rows += [{"kind": kind, "step": 30, "message": evil, "reason": evil, "source": evil} for kind in (
        "event", "stop", "left_out", "replay")]
    rows.append(train(31, sources={evil: {"loss": 2.0, "tokens": 5, "epochs": 1.0}}, distance={evil: 1.0, "all": 1.0}))
    (names / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (names / "config.toml").write_text(f"[model]\nhidden_size = 64\n# {evil}\n[objective]\nname = {json.dumps(evil)}\n")
    stated = json.loads((names / "eval.json").read_text()) | {"model": {"before": evil, "after": evil}, "protocol": {
        evil: {evil: evil}}, "objective": {"name": evil, "before": {evil: {evil: 1.0}}, "warnings": [evil]}}
    stated["before"][evil], stated["after"][evil] = (side()["legal"] | {"role": evil} for _ in range(2))
    (names / "eval.json").write_text(json.dumps(stated))
    for folders in ([names], [names, plain]):
        (tmp_path / "page.html").write_text(report.render([report.read_run(folder) for folder in folders]))
        done = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom",
             f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'page.html'}"],
            capture_output=True, text=True, timeout=120, check=True)
        seen = Page(done.stdout)
        assert not {"script", "img", "link", "iframe", "object", "form"} & set(seen.tags)
        assert not [name for _, name, _ in seen.attributes if name.startswith("on")]
        assert seen.tags.count("style") == seen.tags.count("title") == seen.tags.count("main") == 1
        # The browser has read it as text, and no part of it has run.
        assert "<title>owned" not in done.stdout
        assert seen.text.count(" ".join(evil.split())) > 30
