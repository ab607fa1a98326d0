"""experiments/objectives.py. Truths: sums by hand, entropies that are known, and a run's own eval.json and model."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "experiments"))       # at the end: experiments/tokenizers.py has a package's name

import objectives  # noqa: E402
import probe  # noqa: E402
import scratch  # noqa: E402

from core import cli  # noqa: E402
from core.files import read_json  # noqa: E402
from learn import electra, infilling  # noqa: E402
from learn import objectives as learned  # noqa: E402
from learn.choose_objective import ObjectiveConfig  # noqa: E402


def test_a_loss_has_converged_where_nine_tenths_of_its_fall_are_done():
    # 7 to 5: the goal is 5.2, three quarters of the way from 5.8 to 5.0
    assert objectives.find_converged([(0, 7.0), (10, 5.8), (30, 5.0)]) == pytest.approx(25)
    assert objectives.find_converged([(0, 7.0), (10, 5.8), (30, 5.0)], 0.3) == pytest.approx(5)
    # the first time counts, though the loss comes back above it
    assert objectives.find_converged([(0, 3.0), (4, 1.0), (8, 2.0), (12, 1.0)]) == pytest.approx(3.6)
    assert objectives.find_converged([(0, 3.0), (4, 2.0), (8, 3.1)]) is None


def test_what_the_frequencies_of_tokens_cost():
    assert objectives.entropy_of(np.arange(8, dtype=np.uint16)) == pytest.approx(np.log(8))
    # a half and two quarters: 1.5 bits
    assert objectives.entropy_of(np.array([5, 5, 0, 9])) == pytest.approx(1.5 * np.log(2))


def test_curves_are_of_the_objective_s_measures_or_of_documents():
    lines = [{"kind": "train", "step": 1, "objective": {"loss": 9.0}},
             {"kind": "eval", "step": 0, "sources": {"text": {"nats_per_token": 7.0}}},
             {"kind": "eval", "step": 2, "sources": {"text": {"nats_per_token": 6.0}}}]
    assert objectives.read_curves(lines) == {"loss": [(0, 7.0), (2, 6.0)]}
    for line, loss in zip(lines, (1.0, 2.0, 3.0)):
        line["objective"] = {"text": {"loss": loss, "accuracy": loss / 10}}
    assert objectives.read_curves(lines) == {"loss": [(0, 2.0), (2, 3.0)], "accuracy": [(0, 0.2), (2, 0.3)]}


def test_in_how_many_directions_states_vary():
    rng = np.random.default_rng(0)
    states = rng.standard_normal((400, 3))
    basis = np.linalg.qr(states - states.mean(0))[0]
    # Three features, each on its own, whatever their scale; then all the same; then two that say the same and one
    # alone: variances 2 and 1, so (2 + 1)^2 / (4 + 1).
    assert probe.count_directions(basis * [1.0, 50.0, 0.1] + 7) == pytest.approx(3)
    assert probe.count_directions(np.repeat(basis[:, :1], 8, 1)) == pytest.approx(1)
    assert probe.count_directions(basis[:, [0, 0, 1]]) == pytest.approx(9 / 5)
    assert probe.count_directions(np.concatenate([basis, np.ones((400, 1))], 1)) == pytest.approx(3), "a constant"


def rows(**changes):
    """Two seeds of three objectives, 0.01 apart."""
    found = {"causal": {"loss": 3.0, "bits_per_byte": 2.0, "perplexity": 20.0, "probe": 0.7, "converged": 100.0},
             "masked": {"loss": 5.0, "accuracy": 0.5, "probe": 0.5, "converged": 50.0},
             "span": {"loss": 4.0, "accuracy": 0.2, "bits_per_byte": 2.5, "perplexity": 30.0, "probe": 0.6,
                      "converged": 150.0},
             "electra": {"loss": 0.4, "accuracy": 0.86, "constant_accuracy": 0.85, "probe": 0.45}}
    empty = dict.fromkeys(("accuracy", "constant_accuracy", "bits_per_byte", "perplexity", "converged"))
    return [empty | {"directions": 5.0, "objective": name, "seed": seed, "steps": 200, "loss_before": 7.0}
            | {"step_ms": 9.0, "seconds": 1.0} | values
            | {"loss": values["loss"] + 0.01 * seed, "probe": values["probe"] + 0.01 * seed,
               "curve": [(0, 7.0), (200, values["loss"] + 0.01 * seed)]} | changes
            for name, values in found.items() for seed in (0, 1)]


UNTRAINED = {"one way": {"probe": 0.65, "directions": 24.0}, "both ways": {"probe": 0.45, "directions": 23.0}}


def test_the_paragraph_says_what_was_found():
    c = objectives.Objectives(text=[], probe=["a=b"] * 4)
    table = objectives.summarise(rows())
    assert [round(row["loss"], 6) for row in table] == [3.005, 5.005, 4.005, 0.405]
    assert [round(row["probe_spread"], 6) for row in table] == [0.01] * 4
    words = objectives.describe(c, table, rows(), 4.5, UNTRAINED)
    assert "Of 200 steps, 90% of the fall of the held-out loss took 50 (masked), 100 (causal), 150 (span)." in words
    assert "The loss of electra did not fall with every seed." in words
    assert "causal ends at 3.005 nats per target, 1.495 below" in words
    assert "masked ends at 5.005 nats per target, 0.505 above" in words
    assert "electra judges 86.0% of the tokens rightly, 1.0 points more" in words
    assert "causal 2.000 bits per byte, relative to that span +25.0%." in words
    assert "45.5% (electra) to 70.5% (causal)" in words
    assert "chance is 25.0%" in words
    # span's 0.605 is compared with 0.65, masked's 0.505 and electra's 0.455 with 0.45: electra's 0.005 is in its spread
    assert "(up to 1.0%): causal, masked." in words
    assert words.endswith("5.0 (electra); an untrained model's in 24.")
    assert "probe" not in objectives.describe(c, table, rows(), 4.5, None)


def test_what_an_objective_reached_in_one_seed_alone_has_no_mean():
    found = rows()
    found[0]["converged"] = None
    assert [row["converged"] for row in objectives.summarise(found)] == [None, 50.0, 150.0, None]


def test_the_guides_figures_stand_beside_the_measured_ones():
    c = objectives.Objectives(text=[], size="19M")
    words = objectives.describe(c, objectives.summarise(rows()), rows(), 4.5, None)
    assert words.endswith("The guides expect of 25M after 10,000 steps: causal perplexity 42.3 (here 20.0), masked "
                          "loss 3.21 (here 5.00), masked accuracy 62.3% (here 50.0%).")


def test_who_sees_both_ways_is_what_the_objectives_say():
    """The probe's attention is that of the objective itself."""
    assert set(objectives.OBJECTIVES) <= set(ObjectiveConfig.__dataclass_fields__["name"].type.__args__)
    ways = {"causal": learned.Causal, "masked": learned.Masked, "span": infilling.Span, "ul2": infilling.UL2,
            "fim": infilling.FillInTheMiddle, "electra": electra.Electra}
    for name, kind in ways.items():
        assert (name not in objectives.BOTH_WAYS) == kind.causal


def study(*words):
    return cli.run("objectives.py", "", (objectives.Objectives, objectives.run_study), argv=list(map(str, words)))


def test_what_a_study_leaves(tmp_path, monkeypatch):
    found = {(row["objective"], row["seed"]): row for row in rows()}
    monkeypatch.setattr(objectives, "measure", lambda objective, seed, *rest: found[objective, seed])
    monkeypatch.setattr(objectives, "look", lambda model, passages, causal: {"probe": 0.4 if causal else 0.3,
                                                                             "directions": 8.0})
    monkeypatch.setattr(objectives.hf, "open_base", lambda folder: type("Base", (), {"config": None}))
    monkeypatch.setattr(objectives, "Model", lambda config: type("Model", (), {"initialise": lambda *seed: None})())
    out = tmp_path / "out"
    for name in ("text", "a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"Story {i} of {name}. It ends, as all {name} do."
                                                          for i in range(700)))
    assert study("--text", tmp_path / "text.txt", "--vocab-size", 300, "--objectives", "causal", "masked", "span",
                 "electra", "--probe", f"a={tmp_path}/a.txt", f"b={tmp_path}/b.txt", "--passage", 8,
                 "--out", out) == 0
    result = json.loads((out / "objectives.json").read_text())
    assert [row["objective"] for row in result["rows"]] == ["causal", "causal", "masked", "masked", "span", "span",
                                                            "electra", "electra"]
    assert result["untrained"] == {"one way": {"probe": 0.4, "directions": 8.0},
                                   "both ways": {"probe": 0.3, "directions": 8.0}}
    assert 0 < result["frequencies"] < np.log(300)
    assert "tells 2 texts apart" in result["shows"]
    assert (out / "objectives.png").stat().st_size > 20_000


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_run_of_the_study_is_a_run_of_the_project(data_dir, tmp_path):
    stories = (data_dir / "corpora/tinystories/tinystories_sample_2MiB.txt").read_text()[:150_000]
    (tmp_path / "text.txt").write_text(stories)
    law, plays = (data_dir / "corpora" / file for file in ("legal_en_dc/dc_code_title16.txt",
                                                           "tinyshakespeare/input.txt"))
    out = tmp_path / "out"
    assert study("--text", tmp_path / "text.txt", "--separator", "<|endoftext|>", "--vocab-size", 300, "--size", "25K",
                 "--objectives", "ul2", "electra", "--steps", 2, "--batch-size", 3, "--seeds", 3, "--jobs", 1,
                 "--probe", f"law={law}", f"plays={plays}", "--out", out) == 0
    result = json.loads((out / "objectives.json").read_text())
    for row in result["rows"]:
        ended = read_json(out / f"runs/{row['objective']}_3/eval.json")
        assert row["bits_per_byte"] == ended["after"]["text"].get("bits_per_byte")
        assert [step for step, _ in row["curve"]] == [0, 1, 2]
        assert row["probe"] > 0.6
        start, *_ = scratch.read_lines(out / f"runs/{row['objective']}_3/metrics.jsonl")
        assert start["tokens_per_step"] == 3 * 256
    # small first weights give each of 300 ids and 106 marks nearly the same chance, and ELECTRA's judge a half
    assert [row["loss_before"] for row in result["rows"]] == pytest.approx(
        [np.log(406), np.log(2)], rel=0.03)
