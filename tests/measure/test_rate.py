"""measure/rate.py. Truths: parabolas whose lowest point is known, rates worked out by hand."""

import pytest

import train
from core.errors import UserError
from measure.rate import FACTORS, describe_rate, draw_rate, judge_rate, rate_rungs, rate_settings


def make_rows(scores: dict, **more) -> list[dict]:
    return [{"rate": rate, "seed": 0, "domain": 1.5 - score, "gain": score, "general": 1.0, "forgetting": 0.01,
             "score": score, "seconds": 1.0, "trouble": [], **more} for rate, score in scores.items()]


def test_the_lowest_point_between_three_rates_is_taken(tmp_path):
    """Over log2 of the rate, 0.3 - 0.01 (x - x0)^2 with x0 a factor of 2 above the middle."""
    scores = {rate: 0.3 - 0.01 * (shift - 1) ** 2 for rate, shift in ((2.5e-4, -2), (1e-3, 0), (4e-3, 2))}
    found = judge_rate(make_rows(scores))
    assert found["chosen"] == 2e-3
    assert found["vertex"] == pytest.approx(2e-3)
    assert found["edge"] is None
    assert "take a rate of 0.002: the parabola's lowest point, by the overall score" in describe_rate(found)
    draw_rate(found, tmp_path / "rate.png")
    assert (tmp_path / "rate.png").read_bytes().startswith(b"\x89PNG")


def test_without_general_text_the_domain_alone_decides():
    rows = make_rows({1e-4: 0.1, 4e-4: 0.3, 1.6e-3: 0.1}, score=None, forgetting=None, general=None)
    found = judge_rate(rows)
    assert (found["by"], found["chosen"]) == ("domain", 4e-4)
    assert "by the domain's bits per byte" in describe_rate(found)


@pytest.mark.parametrize(("scores", "chosen", "edge", "more"), [
    ({1e-4: 0.1, 4e-4: 0.2, 1.6e-3: 0.4}, 1.6e-3, "high", r"try --rates 0\.0064 0\.0001"),
    ({1e-4: 0.4, 4e-4: 0.2, 1.6e-3: -0.1}, 1e-4, "low", r"try --rates 2\.5e-05 0\.0001")])
def test_the_best_at_an_edge_is_taken_with_a_warning(scores, chosen, edge, more):
    found = judge_rate(make_rows(scores))
    assert (found["chosen"], found["edge"]) == (chosen, edge)
    with pytest.raises(AssertionError, match=more):
        raise AssertionError(describe_rate(found))


def test_a_run_that_diverged_is_named_and_left_out():
    rows = make_rows({1e-4: 0.1, 4e-4: 0.2, 1.6e-3: 0.0})
    rows[2] |= {"domain": None, "gain": None, "forgetting": None, "score": None, "general": None,
                "trouble": ["diverged: the loss is nan"]}
    found = judge_rate(rows)
    assert found["chosen"] == 4e-4
    assert found["parabola"] is None
    text = describe_rate(found)
    assert "only 2 of the rates trained" in text
    assert "rate 0.0016, seed 0: diverged: the loss is nan" in text
    # Of two seeds one came through, and well: the rate is left out all the same.
    lucky = {**rows[1], "rate": 1.6e-3, "seed": 1, "score": 0.9}
    assert judge_rate([*rows, lucky])["chosen"] == 4e-4
    for row in rows:
        row |= {"domain": None, "trouble": ["diverged: the loss is inf"]}
    with pytest.raises(UserError, match=r"all runs diverged, rate 0\.0001, seed 0 first: diverged: the loss is inf"):
        judge_rate(rows)


def test_the_other_rates_keep_their_parts():
    c = train.Config()
    c.optim.lr, c.optim.min_lr = 1e-3, 1e-4
    assert rate_settings(c, 4e-3) == pytest.approx({"lr": 4e-3, "min_lr": 4e-4})
    rungs = rate_rungs(c, [1e-3 * factor for factor in FACTORS])
    assert [rung.values["rate"] for rung in rungs] == [2.5e-4, 1e-3, 4e-3]
    assert rungs[0].words[::2] == ["--optim.lr", "--optim.min-lr"]
    assert [float(word) for word in rungs[0].words[1::2]] == pytest.approx([2.5e-4, 2.5e-5])
    with pytest.raises(UserError, match="--rates names 1 rate, and a parabola needs three"):
        rate_rungs(c, [1e-3, 1e-3])
