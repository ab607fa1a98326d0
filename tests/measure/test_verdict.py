"""measure/verdict.py against values worked out by hand, and against what no file may turn into a number."""

import math

import pytest

from measure import verdict


def scores(**bits) -> dict:
    return {name: {"bits_per_byte": value} for name, value in bits.items()}


def test_comparison_by_hand():
    before, after = scores(law=2.0, tales=1.0, wiki=4.0), scores(law=1.5, tales=1.2, wiki=4.0, new=9.0)
    assert verdict.compare(before, after, ["tales", "wiki"]) == {
        "change": pytest.approx({"law": -0.25, "tales": 0.2, "wiki": 0.0}),
        "domain_gain": pytest.approx(0.25), "forgetting": pytest.approx(0.1), "score": pytest.approx(0.25 - 0.05)}
    assert verdict.compare(before, scores(law=1.5), ["tales"]) == {
        "change": {"law": -0.25}, "domain_gain": 0.25, "forgetting": None, "score": None}


@pytest.mark.parametrize("before", [None, {}])
def test_without_a_baseline_all_is_unknown_and_nothing_zero(before):
    unknown = verdict.compare(before, scores(law=1.5, tales=1.0), ["tales"])
    assert unknown == {"change": {}, "domain_gain": None, "forgetting": None, "score": None}
    assert verdict.describe(unknown).startswith("forgetting: unknown")


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
    text = verdict.describe({"domain_gain": 0.125, "forgetting": loss})
    assert text.startswith("domain: bits per byte -12.5 %; forgetting: ")
    assert grade in text
    assert (verdict.ADVICE["forgetting"] in text) == (grade == "bad")
    if loss is not None:
        assert f"general bits per byte {100 * loss:+.1f} % ({grade}" in text


@pytest.mark.parametrize(("gain", "grade"), [(0.3, "good"), (0.01, "good"), (0.0, "warning"), (-0.001, "bad"),
                                             (None, "unknown")])
def test_grades_of_gain(gain, grade):
    assert verdict.grade_gain(gain) == grade
