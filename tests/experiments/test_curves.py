"""experiments/curves.py. Truths: metrics written by hand, and gaps that are seen in them."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "experiments"))       # at the end: experiments/tokenizers.py has a package's name

import curves  # noqa: E402
import scratch  # noqa: E402

from core import cli  # noqa: E402

GENERAL = [1.0, 1.4, 1.2, 1.1]


def lines_of(general=GENERAL, domain=(3.0, 2.5, 2.2, 2.0)):
    """Metrics of three steps with an evaluation before the first and after each."""
    lines = [{"kind": "start", "step": 0}]
    for step, (g, d) in enumerate(zip(general, domain)):
        if step:
            values = {"loss": 4.0 - step, "grad_norm": 0.5 * step, "lr": 1e-3 / step}
            lines.append({"kind": "train", "step": step, **values})
        lines.append({"kind": "eval", "step": step, "sources": {"general": {"bits_per_byte": g},
                                                                "domain": {"bits_per_byte": d}}})
    return lines


def test_curves_are_what_the_metrics_say():
    assert curves.read_curves(lines_of()) == {
        "loss": [(1, 3.0), (2, 2.0), (3, 1.0)], "grad_norm": [(1, 0.5), (2, 1.0), (3, 1.5)],
        "lr": [(1, 1e-3), (2, 5e-4), (3, 1e-3 / 3)],
        "held-out general": list(enumerate(GENERAL)), "held-out domain": list(enumerate([3.0, 2.5, 2.2, 2.0]))}
    masked = [{"kind": "eval", "step": 0, "sources": {"text": {"accuracy": 0.3}}}]
    assert curves.read_curves(masked)["held-out text"] == [(0, 0.3)]


def test_a_gap_is_a_rise_that_is_won_back():
    gap = curves.find_gap(list(enumerate(GENERAL)))
    assert (gap["start"], gap["worst"], gap["worst_step"], gap["end"]) == (1.0, 1.4, 1, 1.1)
    assert gap["rise"] == pytest.approx(0.4)
    assert gap["recovered"] == pytest.approx(0.75)
    forgets = curves.find_gap([(0, 1.0), (5, 1.2), (10, 1.3)])
    assert (forgets["worst_step"], forgets["recovered"]) == (10, 0)
    assert curves.find_gap([(0, 1.0), (5, 0.9)])["recovered"] is None


def row(method, seed, **gap):
    return {"method": method, "seed": seed, "domain_bits_per_byte": 2.0, "domain_gain": 0.4, "forgetting": 0.1,
            "start": 1.0, "worst": 1.4, "worst_step": 20, "end": 1.1, "rise": 0.4, "recovered": 0.75} | gap


def test_the_paragraph_says_what_was_found():
    rows = [row("warm", 0), row("warm", 1, recovered=0.65), row("low", 0, end=1.4, recovered=0.0),
            row("low", 1, end=1.4, recovered=0.0), row("mixed", 0), row("mixed", 1, recovered=0.0),
            row("none", 0, rise=0.0, recovered=None), row("none", 1, rise=0.0, recovered=None, end=0.9)]
    words = curves.describe(curves.summarise(rows), 100)
    assert "Warm: general text rises from 1.000 bits per byte by 0.400, at its worst around step 20 of 100, and wins " \
        "back 70% of that by the end: a stability gap." in words
    assert "Low: general text rises from 1.000 bits per byte by 0.400, at its worst around step 20 of 100, and does " \
        "not recover" in words
    assert "wins back 38% of that in the mean, but not with every seed" in words
    assert "None: general text never rises above the base's" in words
    assert "general text none (1.000)" in words


def test_any_runs_become_one_figure(tmp_path, capsys):
    for name, general in (("a", GENERAL), ("b", [1.0, 1.0, 1.0, 1.0])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines_of(general))))

    def draw(*words):
        return cli.run("curves.py", "", {"draw": (curves.Draw, curves.run_draw)}, argv=["draw", *map(str, words)])
    assert draw(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both.png", "--json", tmp_path / "both.json") == 0
    assert (tmp_path / "both.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "both.json").read_text())
    assert [value for _, value in found[str(tmp_path / "b")]["held-out general"]] == [1.0] * 4
    figure = curves.draw_runs({"a": lines_of(), "b": lines_of([1.0] * 4)})
    drawn = [[line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes]
    assert drawn[0] == [[3.0, 2.0, 1.0]] * 2
    assert drawn[1] == [GENERAL, [3.0, 2.5, 2.2, 2.0], [1.0] * 4, [3.0, 2.5, 2.2, 2.0]]
    capsys.readouterr()
    assert draw(tmp_path, "--out", tmp_path / "c.png") == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err


def test_what_a_study_leaves(tmp_path, monkeypatch):
    asked = {}

    def measured(method, words, seed, c, out):
        asked[method] = dict(zip(words[::2], words[1::2]))
        (out / f"runs/{method}_{seed}").mkdir(parents=True)
        (out / f"runs/{method}_{seed}/metrics.jsonl").write_text("\n".join(map(json.dumps, lines_of())))
        return {"method": method, "seed": seed, "domain_bits_per_byte": 2.0, "domain_gain": 0.4,
                "forgetting": 0.1}, lines_of()
    monkeypatch.setattr(curves, "measure_run", measured)
    monkeypatch.setattr(curves, "prepare", lambda c: tmp_path)
    words = ["--model", "m", "--domain", "d", "--general", "g", "--seeds", "4", "--replay", "0.3"]
    assert cli.run("curves.py", "", (curves.Curves, curves.run_study), argv=words) == 0
    found = json.loads((tmp_path / "curves.json").read_text())
    assert [r["method"] for r in found["rows"]] == ["re-warmed", "not re-warmed", "re-warmed, no replay"]
    assert {method: 1 - words["--data.domain-share"] for method, words in asked.items()} == pytest.approx(
        {"re-warmed": 0.3, "not re-warmed": 0.3, "re-warmed, no replay": 0.0})
    assert asked["not re-warmed"]["--optim.warmup-ratio"] == 0
    assert all(r["recovered"] == pytest.approx(0.75) for r in found["rows"])
    assert found["shows"].count("a stability gap") == 3
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert tmp_path != scratch.RESULTS
