"""measure/verdict.py against values worked out by hand, and against what no file may turn into a number."""

import itertools
import math

import numpy as np
import pytest

from measure import verdict
from measure.verdict import Evidence

UNSURE = {"change": {}, "domain_gain": None, "forgetting": None, "score": None}


def scores(**bits) -> dict:
    return {name: {"bits_per_byte": value} for name, value in bits.items()}


def test_comparison_by_hand():
    before, after = scores(law=2.0, tales=1.0, wiki=4.0), scores(law=1.5, tales=1.2, wiki=4.0, new=9.0)
    assert verdict.compare(before, after, ["tales", "wiki"]) == {
        "change": pytest.approx({"law": -0.25, "tales": 0.2, "wiki": 0.0}),
        "domain_gain": pytest.approx(0.25), "forgetting": pytest.approx(0.1), "score": pytest.approx(0.25 - 0.05),
        "interval": UNSURE | {"change": dict.fromkeys(("law", "tales", "wiki"))}}
    assert verdict.compare(before, scores(law=1.5), ["tales"]) == {
        "change": {"law": -0.25}, "domain_gain": 0.25, "forgetting": None, "score": None,
        "interval": UNSURE | {"change": {"law": None}}}


@pytest.mark.parametrize("before", [None, {}])
def test_without_a_baseline_all_is_unknown_and_nothing_zero(before):
    unknown = verdict.compare(before, scores(law=1.5, tales=1.0), ["tales"])
    assert unknown == UNSURE | {"interval": UNSURE}
    assert verdict.describe(unknown, {}) == "forgetting: unknown (no general text was scored before and after)"


def test_general_text_that_got_better_is_no_credit():
    better = verdict.compare(scores(law=2.0, tales=1.0), scores(law=1.0, tales=0.5), ["tales"])
    assert (better["forgetting"], better["score"]) == (-0.5, 0.5)


def test_named_domain_leaves_out_texts_without_a_role():
    before, after = scores(law=2.0, tales=1.0, other=1.0), scores(law=1.0, tales=1.0, other=3.0)
    assert verdict.compare(before, after, ["tales"], ["law"])["domain_gain"] == 0.5
    assert verdict.compare(before, after, ["tales"])["domain_gain"] == pytest.approx((0.5 - 2) / 2)


@pytest.mark.parametrize("value", [None, True, "1.0", math.nan, math.inf, 10**400, [1.0], {}])
def test_what_is_no_finite_number_is_unknown(value):
    assert verdict.finite(value) is None
    assert verdict.compare(scores(law=value), scores(law=1.0), [])["change"] == {}
    assert verdict.compare(scores(law=1.0), scores(law=value), [])["change"] == {}
    assert verdict.compare(scores(law=2.0), scores(law=value), [])["domain_gain"] is None


def test_nothing_is_divided_by_zero():
    assert verdict.compare(scores(law=0.0), scores(law=1.0), [])["change"] == {}
    assert verdict.compare(scores(law=1.0), scores(law=0.0), [])["change"] == {"law": -1.0}


@pytest.mark.parametrize(("loss", "grade"), [(-0.1, "good"), (0.0499, "good"), (0.05, "warning"), (0.0999, "warning"),
                                             (0.1, "bad"), (0.5, "bad"), (None, "unknown")])
def test_grades_of_forgetting_and_the_line_that_says_them(loss, grade):
    assert verdict.grade_forgetting(loss) == grade
    text = verdict.describe({"domain_gain": 0.125, "forgetting": loss, "interval": UNSURE}, {})
    assert text.startswith("domain: bits per byte -12.5 %; forgetting: ")
    assert grade in text
    assert ("\nforgetting: raise replay" in text) == (grade == "bad")
    if loss is not None:
        assert f"general bits per byte {100 * loss:+.1f} % ({grade}" in text


@pytest.mark.parametrize(("gain", "grade"), [(0.3, "good"), (0.01, "good"), (0.0, "warning"), (-0.001, "bad"),
                                             (None, "unknown")])
def test_grades_of_gain(gain, grade):
    assert verdict.grade_gain(gain) == grade


# ---- how sure a change is

def documents(nats) -> dict:
    nats = [float(value) for value in nats]
    return {"bits_per_byte": sum(nats), "bytes": 1000, "nats_by_document": nats}


def test_the_interval_is_that_of_the_ratio_of_two_sums():
    """Truth: the delta method, in float64: of the ratio of two sums, the variance is that of the residuals."""
    draw = np.random.default_rng(3)
    was = draw.gamma(2, 50, 400)
    now = was * draw.normal(0.9, 0.2, 400)
    found = verdict.compare({"law": documents(was)}, {"law": documents(now)}, [])
    ratio = now.sum() / was.sum()
    error = np.sqrt(((now - ratio * was) ** 2).sum()) / was.sum()
    low, high = found["interval"]["change"]["law"]
    assert (low, high) == pytest.approx((ratio - 1 - 1.96 * error, ratio - 1 + 1.96 * error), abs=0.15 * error)
    assert found["interval"]["domain_gain"] == pytest.approx([-high, -low])
    assert found["change"]["law"] == pytest.approx(ratio - 1)
    # Every document fell by a tenth: there is nothing to be unsure of.
    sure = verdict.compare({"law": documents(was)}, {"law": documents(0.9 * was)}, [])
    assert sure["interval"]["change"]["law"] == pytest.approx([-0.1, -0.1])


def test_of_no_change_the_interval_holds_zero_in_about_95_of_100_cases():
    held = 0
    for seed in range(100):
        was, now = np.random.default_rng(seed).gamma(2, 50, (2, 60))
        found = verdict.compare({"law": documents(was)}, {"law": documents(now)}, [])
        held += verdict.is_unclear(found["interval"]["change"]["law"])
    assert 88 <= held <= 99


def test_means_over_texts_and_the_score_are_drawn_together():
    """Truth: the law's change is certain, so that the score is as unsure as the tales are, above 5 % of forgetting."""
    was, noise = np.full(50, 10.0), np.random.default_rng(0).normal(0.1, 0.3, 50)
    before = {"law": documents(was), "tales": documents(was), "wiki": documents(was)}
    after = {"law": documents(0.5 * was), "tales": documents(was * (1 + noise)), "wiki": documents(1.5 * was)}
    found = verdict.compare(before, after, ["tales", "wiki"])
    low, high = found["interval"]["change"]["tales"]
    assert found["interval"]["forgetting"] == pytest.approx([(low + 0.5) / 2, (high + 0.5) / 2])
    assert found["interval"]["score"] == pytest.approx([0.55 - (high + 0.5) / 2, 0.55 - (low + 0.5) / 2])
    # The same documents give the same interval, whatever else is scored.
    assert verdict.compare(before, {"tales": after["tales"]}, [])["interval"]["change"]["tales"] == [low, high]


@pytest.mark.parametrize("broken", [
    lambda side: side | {"nats_by_document": side["nats_by_document"][:5]}, lambda side: side | {"bytes": 999},
    lambda side: side | {"nats_by_document": [*side["nats_by_document"][:-1], math.nan]},
    lambda side: side | {"nats_by_document": "x"}, lambda side: side | {"nats_by_document": [0.0] * 7},
    lambda side: {"bits_per_byte": 1.0}])
def test_other_documents_or_too_few_leave_it_unknown(broken):
    good = documents(range(1, 8))
    assert verdict.compare({"law": good}, {"law": good}, [])["interval"]["change"]["law"] == [0, 0]
    assert verdict.compare({"law": broken(good)}, {"law": good}, [])["interval"]["change"]["law"] is None
    few = documents(range(1, 6))
    assert verdict.compare({"law": few}, {"law": few}, [])["interval"]["change"]["law"] is None


def test_what_is_not_distinguishable_is_graded_and_said_so():
    assert verdict.grade_gain(0.2, [-0.01, 0.4]) == verdict.grade_forgetting(0.2, [-0.1, 0.4]) == "unclear"
    assert verdict.grade_gain(0.2, [0.01, 0.4]) == "good"
    found = {"change": {}, "domain_gain": 0.2, "forgetting": 0.2,
             "interval": {"domain_gain": [-0.1, 0.4], "forgetting": [-0.05, 0.3]}}
    assert verdict.describe(found, {}) == (
        "domain: bits per byte -20.0 % (95 %: -40.0 to +10.0 %), not distinguishable from no change; forgetting: "
        "general bits per byte +20.0 % (95 %: -5.0 to +30.0 %), not distinguishable from no change (unclear)")


# ---- advice

def failure_of(before: dict, after: dict, known: Evidence) -> str | None:
    return verdict.find_failure(verdict.compare(before, after, ["tales"]), after, known)


@pytest.mark.parametrize(("after", "known", "failure"), [
    ({"law": 1.5, "tales": 1.0}, {}, None),
    ({"law": 1.5, "tales": 1.2}, {}, "forgetting"),
    ({"law": 89.0, "tales": 89.0}, {}, "divergence"),                           # not forgetting, though the tales rose
    ({"law": 2.1, "tales": 1.0}, {}, "divergence"),
    ({"law": math.nan, "tales": 1.0}, {}, "divergence"),
    ({"law": 1.5, "tales": math.inf}, {}, "divergence"),
    ({"tales": 20.0}, {}, "divergence"),                                        # worse than a guess of bytes
    ({"tales": 1.5}, {}, "forgetting"),
    ({"law": 1.5, "tales": 1.0}, {"losses": [3.0, math.nan, 2.0]}, "divergence"),
    ({"law": 1.99, "tales": 1.0}, {}, "flat"),
    ({"law": 2.1, "tales": 1.0}, {"epochs": 9.0, "losses": [3.0, 0.1]}, "overfitting"),
    ({"law": 2.1, "tales": 1.0}, {"epochs": 9.0, "losses": [3.0, 9.0]}, "divergence"),
    ({"law": 2.1, "tales": 1.0}, {"epochs": 1.0, "losses": [3.0, 0.1]}, "divergence"),
    ({"law": 1.5, "tales": 1.0}, {"epochs": 9.0, "history": {0: 2.0, 5: 1.2, 9: 1.5}}, "overfitting"),
    ({"law": 1.5, "tales": 1.0}, {"epochs": 1.0, "history": {0: 2.0, 5: 1.2, 9: 1.5}}, None),
    ({"law": 1.5, "tales": 1.0}, {"epochs": 9.0, "history": {0: 2.0, 5: 1.8, 9: 1.5}}, None)])
def test_kinds_of_failure(after, known, failure):
    assert failure_of(scores(law=2.0, tales=1.0), scores(**after), Evidence(**known)) == failure


METHODS = {"LoRA": {"lora": {"rank": 8}}, "EWC": {"forget": {"ewc": {"strength": 1.0}}},
           "LwF": {"forget": {"lwf": {"alpha": 0.5}}}, "merge": {"forget": {"merge": {"method": "linear"}}},
           "replay": {"forget": {"adaptive": {"policy": "budget"}}}}


@pytest.mark.parametrize("on", itertools.chain.from_iterable(itertools.combinations(METHODS, k) for k in range(6)))
def test_advice_against_forgetting_names_what_is_not_in_force_and_nothing_else(on):
    settings = {"optim": {"lr": 1e-5}, "lora": {"rank": 0}, "forget": {}}
    for name in on:
        for section, values in METHODS[name].items():
            settings[section] = settings[section] | values
    said = "; ".join(verdict.advise("forgetting", Evidence(settings, 1e-5, 0.16)))
    assert {name for name in METHODS if name in said} == METHODS.keys() - set(on)
    # Where all is in force the learning rate is left.
    assert ("learning rate" in said) == (len(on) == 5)
    too_high = verdict.advise("forgetting", Evidence(settings | {"optim": {"lr": 1e-3}}, 1e-5, 0.16))
    assert too_high[0] == "first lower the learning rate (optim.lr is 0.001; for this model start from 1e-05)"


@pytest.mark.parametrize("share", [0.0, 0.16, 0.45, None])
def test_replay_is_raised_only_to_more_than_there_is(share):
    said = "; ".join(verdict.advise("forgetting", Evidence(replay_share=share)))
    assert ("replay" in said) == (share != 0.45)
    assert ("it had 16 %" in said) == (share == 0.16)


@pytest.mark.parametrize("failure", ["divergence", "overfitting", "flat"])
def test_other_failures_have_no_word_of_replay_or_methods(failure):
    known = Evidence({"optim": {"lr": 0.3, "warmup_ratio": 0.1}}, 3e-4, 0.0, 9.0, {0: 2.0, 5: 1.0, 9: 2.0}, [2.0, 9.0])
    said = "; ".join(verdict.advise(failure, known))
    assert not {word for word in METHODS if word in said}
    assert {"divergence": "lower the learning rate (optim.lr is 0.3; for this model start from 0.0003)",
            "overfitting": "best at step 5; add domain text: it was read 9 times; lower the learning rate",
            "flat": "shorten the warm-up; add more or cleaner domain data"}[failure] in said
    assert "2-3x higher" not in said                       # it was a thousand times too high already
    assert "2-3x higher (optim.lr is 1e-05)" in verdict.advise("flat", Evidence({"optim": {"lr": 1e-5}}, 1e-5))[0]
    assert "documents of the batch" in verdict.advise("divergence", Evidence(losses=[1.0, math.nan]))[1]
