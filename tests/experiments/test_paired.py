"""experiments/paired.py. Truths: the classical error of a mean, the delete-one jackknife, the evaluation of a run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import one, settings

sys.path.append(str(Path(__file__).parents[2] / "experiments"))    # at the end: tokenizers.py has a package's name

import paired

import train
from core.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_error_of_a_mean_and_of_a_ratio():
    """With the same count everywhere it is that of a mean of differences; else nearly the jackknife's, which draws a
    sequence with its targets."""
    rng = np.random.default_rng(0)
    for counts in (np.full(400, 7.0), rng.integers(1, 30, 400).astype(float)):
        was = rng.gamma(3, 1, 400) * counts
        now = was - 0.2 * counts + rng.standard_normal(400) * np.sqrt(counts)
        found = paired.compare(*(np.stack([values, counts], 1) for values in (was, now)))
        assert found["change"] == pytest.approx(now.sum() / counts.sum() - was.sum() / counts.sum())
        assert found["after"] - found["before"] == pytest.approx(found["change"])
        left = [np.delete(now - was, i).sum() / np.delete(counts, i).sum() for i in range(400)]
        assert found["error"] == pytest.approx(np.sqrt(399 / 400 * np.square(left - np.mean(left)).sum()), rel=0.02)
        if len(set(counts)) == 1:
            assert found["error"] == pytest.approx(np.std((now - was) / 7, ddof=1) / 20)
    with pytest.raises(UserError, match="measured on other targets"):
        paired.compare(np.ones((3, 2)), np.full((3, 2), 2.0))


def test_before_and_after_are_what_a_run_measured(base, tmp_path, monkeypatch):
    """Held-out sequences, one by one, give the means that the run found of them in its batches."""
    lab, folder = base
    monkeypatch.setattr("stages.evaluate.run_command", lambda *words: "")
    words = ["--objective.name", "masked", "--objective.mask-token-id", "5"]
    train.train(settings(lab, tmp_path / "run", "--model.init", "pretrained", "--model.path", folder, *words,
                         "--eval.tokens", 10**6, steps=3), one())
    wanted = json.loads((tmp_path / "run/eval.json").read_text())["objective"]
    monkeypatch.setattr(sys, "argv", ["paired.py", "--before", str(folder), "--model", str(tmp_path / "run/final"),
                                      "--shards", f"{lab}/legal", "--context", "32", "--sequences", "9999", *words,
                                      "--json", str(tmp_path / "found.json")])
    assert paired.main() == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["sequences"] == wanted["before"]["legal"]["sequences"] > 5
    for row in found["rows"]:
        for side in ("before", "after"):
            assert row[side] == pytest.approx(wanted[side]["legal"][row["measure"]], rel=1e-5)
    assert {row["measure"] for row in found["rows"]} == {"loss", "accuracy"}
