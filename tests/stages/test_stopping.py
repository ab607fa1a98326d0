"""stages/stopping.py: evaluations worked by hand, and whole runs. Laws: a run that a rule ended is finished and goes no
further; one that died on the way ends at the same step with the same result."""

import json
import re
from types import SimpleNamespace

import pytest
from runs import Crash, arguments, command, crash, crash_at, lines, one, run_of, same_checkpoint, spy
from synthetic import texts

import tokenizer
import train
from stages.stopping import judge_evaluations
from text.shards import pack

ROLES = {"law": "domain", "tales": "general"}


def rules(**settings):
    off = {"stop_gain": 0.0, "stop_forgetting": 0.0, "stop_after": 0, "stop_patience": 2}
    return SimpleNamespace(**off | settings)


def evaluations(law, tales, every=10):
    return [{"step": i * every, "texts": {"law": {"bits_per_byte": a}, "tales": {"bits_per_byte": b}}}
            for i, (a, b) in enumerate(zip(law, tales))]


def first_stop(c, known, steps=1000, tokens=100_000):
    """(index of the first evaluation after which the run ends, why)"""
    for n in range(1, len(known) + 1):
        if found := judge_evaluations(c, known[:n], ROLES, steps, tokens):
            return n - 1, found
    return None


def test_a_gain_that_has_become_small_ends_a_run():
    """2.0 -> 1.6 -> 1.4 -> 1.39 -> 1.388: gains 0, 0.2, 0.3, 0.305, 0.306; ten steps are a million tokens. Over two
    evaluations: 0.15, 0.0525, 0.003 per million."""
    known = evaluations([2.0, 1.6, 1.4, 1.39, 1.388], [1.0] * 5)
    assert first_stop(rules(stop_gain=0.01), known)[0] == 4
    n, found = first_stop(rules(stop_gain=0.06), known)
    assert (n, found["setting"], found["limit"]) == (3, "eval.stop_gain", 0.06)
    assert found["value"] == pytest.approx((0.305 - 0.2) / 2)
    assert found["reason"] == ("from step 10 to 30 the domain gained 5.25 % of bits per byte per million tokens, less "
                               "than eval.stop_gain 6 %")
    # Twice the tokens in a step are half the gain for each.
    assert first_stop(rules(stop_gain=0.06), known, tokens=200_000)[1]["value"] == pytest.approx(0.02625)
    assert first_stop(rules(stop_gain=0.06), known, tokens=200_000)[0] == 3
    assert first_stop(rules(stop_gain=0.08), known, tokens=200_000)[0] == 2
    assert first_stop(rules(stop_gain=0.001), known) is None


def test_a_first_rise_ends_no_run():
    """The stability gap: general text is at its worst at the second evaluation and recovers; so may the domain be."""
    gap = [1.0, 1.3, 1.2, 1.08, 1.04, 1.03]
    known = evaluations([2.0, 2.2, 1.9, 1.8, 1.7, 1.6], gap)
    assert first_stop(rules(stop_forgetting=0.1, stop_after=30), known) is None
    assert first_stop(rules(stop_forgetting=0.1, stop_after=0), known)[0] == 2
    assert first_stop(rules(stop_forgetting=0.1, stop_after=0, stop_patience=3), known) is None
    # A fifth of the run by default.
    assert first_stop(rules(stop_forgetting=0.1, stop_after=None), known, steps=150) is None
    assert first_stop(rules(stop_gain=0.01, stop_after=0, stop_patience=1), known)[0] == 1
    assert first_stop(rules(stop_gain=0.01, stop_after=10, stop_patience=1), known) is None


def test_a_limit_on_forgetting_wants_it_at_evaluations_one_after_another():
    known = evaluations([2.0] * 6, [1.0, 1.2, 1.05, 1.2, 1.21, 1.3])
    n, found = first_stop(rules(stop_forgetting=0.1), known)
    assert (n, found["setting"]) == (4, "eval.stop_forgetting")
    assert found["value"] == pytest.approx(0.21)
    assert found["reason"].startswith("general text has lost 21 % of bits per byte, at 2 evaluations one after another")
    assert first_stop(rules(stop_forgetting=0.1, stop_patience=1), known)[0] == 1


def test_nothing_ends_a_run_without_a_rule_a_start_or_a_finite_score():
    known = evaluations([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert first_stop(rules(), known) is None
    assert first_stop(rules(stop_gain=0.5, stop_forgetting=0.1), known[1:]) is None
    nan = evaluations([float("nan")] * 4, [float("nan")] * 4)
    assert first_stop(rules(stop_gain=0.5, stop_forgetting=0.1), nan) is None


def test_a_masked_model_is_judged_by_its_loss():
    known = [{"step": step, "texts": {name: {"nats_per_token": loss, "accuracy": 0.1} for name, loss in (
        ("law", 2.0), ("tales", 1.0 + step / 10))}} for step in (0, 2, 4)]
    assert first_stop(rules(stop_forgetting=0.1), known)[1]["value"] == pytest.approx(0.4)


# ---- whole runs. The rate is so high that general text is lost at once.

WORDS = ("--eval.every", 2, "--eval.stop-forgetting", 0.05, "--eval.stop-after", 2, "--data.schedule", "static",
         "--data.domain-share", 1, "--train.steps", 20, "--train.save-every", 3)


@pytest.mark.usefixtures("quick")
def test_a_run_that_a_rule_ended_is_finished_and_goes_on_no_more(base, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    seen = spy(monkeypatch)
    assert train.train(run_of(base, out, *WORDS), one()) == 0
    said, result = capsys.readouterr().out, json.loads((out / "eval.json").read_text())
    assert list(seen) == [0, 1, 2, 3]
    assert (result["ended"]["step"], result["ended"]["steps"]) == (4, 20)
    assert result["ended"]["setting"] == "eval.stop_forgetting"
    assert f"the run ends at step 4 of 20: {result['ended']['reason']}" in said
    assert [{key: line[key] for key in result["ended"]} for line in lines(out, "ended")] == [result["ended"]]
    # The last evaluation is that of what was exported.
    assert json.loads((out / "eval_step_4.json").read_text())["model"] == result["model"]["after"] == "final/"
    assert (out / "final" / "model.safetensors").exists()
    assert (out / "checkpoints" / "step_00000004").exists()
    with pytest.raises(ValueError, match="holds a finished run"):
        train.train(run_of(base, out, *WORDS), one())


@pytest.mark.usefixtures("quick")
def test_a_run_that_died_on_the_way_ends_at_the_same_step(base, tmp_path, monkeypatch):
    whole, died, late = (run_of(base, tmp_path / name, *WORDS) for name in ("whole", "died", "late"))
    train.train(whole, one())
    crash_at(monkeypatch, died, 3)
    assert not (tmp_path / "died" / "eval.json").exists()
    train.train(died, one())
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", lambda run: crash())
        with pytest.raises(Crash):
            train.train(late, one())
    with monkeypatch.context() as patch:
        seen = spy(patch)
        train.train(late, one())
        assert not seen
    truth = json.loads((tmp_path / "whole" / "eval.json").read_text())
    for name in ("died", "late"):
        assert json.loads((tmp_path / name / "eval.json").read_text()) == truth
        same_checkpoint(tmp_path / "whole", tmp_path / name, 4)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("words", "told"), [
    (("--eval.stop-gain", 0.01, "--eval.every", 4),
     r"eval\.stop_gain judges 3 evaluations from step 1 on .* --eval\.every 1,"),
    (("--eval.stop-forgetting", 0.01, "--data.sources.story.path", "PACKED", "--eval.every", 1),
     r"eval\.stop_forgetting ends the run by held-out general text, and no general source has any")])
def test_a_rule_that_could_never_end_a_run_is_refused(base, tmp_path, monkeypatch, capsys, words, told):
    pack(texts("story")[:20], tokenizer.load(base[0] / "tok"), tmp_path / "packed", heldout=0)
    words = [tmp_path / "packed" if word == "PACKED" else word for word in words]
    status, _, errors = command(monkeypatch, capsys, arguments(base[0], tmp_path / "run", *words))
    assert status == 2
    assert errors.count("\n") == 1
    assert re.search(told, errors)
