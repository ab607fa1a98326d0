"""measure/laws.py. Truths: the tables of the papers, whose held-out points must be predicted; laws planted with known
parameters and noise; scipy's nnls and its distribution of F."""

import numpy as np
import pytest

from measure import laws

# arXiv 2407.17467, table 2: a domain's loss at its shares of the mix; the last share is to be predicted.
CMR_SHARES = np.array([1, 0.75, 0.5, 1 / 3, 0.25])
CMR_LOSSES = {"460M": [1.4628, 1.4844, 1.5122, 1.5387, 1.5561], "940M": [1.3723, 1.3910, 1.4155, 1.4385, 1.4538],
              "1.6B": [1.3242, 1.3416, 1.3643, 1.3854, 1.3994], "3.1B": [1.2585, 1.2750, 1.2965, 1.3170, 1.3305]}
# arXiv 2406.01375, table 5: Qwen1.5-1.8B on chemistry, general loss at the domain's shares; the base has 2.8602.
DCPT_SHARES = np.array([0.90, 0.91, 0.92, 0.924, 0.93, 0.94, 1.0])
DCPT_FORGETTING = np.array([2.9052, 2.9193, 2.9376, 2.9445, 2.9644, 2.9848, 3.4667]) / 2.8602 - 1
DCPT_BEST = 0.924               # as published, for a general loss at most 3 % above the base's


@pytest.mark.parametrize("size", CMR_LOSSES)
def test_the_cmr_law_predicts_a_quarter_from_four_larger_shares(size):
    x, y = CMR_SHARES[:4], np.array(CMR_LOSSES[size][:4])
    found = laws.fit(laws.CMR, x, y, y)
    drawn, _ = laws.draw(found, x, y)
    low, high = laws.interval(drawn.predict(0.25)[:, 0])
    assert found.predict(0.25)[0, 0] == pytest.approx(CMR_LOSSES[size][4], rel=1e-3)
    assert low < CMR_LOSSES[size][4] < high
    assert high - low < 0.05
    a, b, s = (found.parameters()[name][0] for name in "abs")
    assert b + a * 0.6**s == pytest.approx(found.predict(0.6)[0, 0])


@pytest.mark.parametrize("law", [laws.REPLAY, laws.DCPT_SHORT, laws.DCPT])
@pytest.mark.parametrize("known", ["all", "not the best one"])
def test_the_published_best_share_is_found_and_what_seven_shares_leave_open_is_said(law, known):
    kept = (DCPT_SHARES != DCPT_BEST) | (known == "all")
    p, forgetting = 1 - DCPT_SHARES[kept], DCPT_FORGETTING[kept]
    found = laws.fit(law, p, forgetting, forgetting)
    assert 1 - laws.find_share(found, 0.03, 0.1)[0] == pytest.approx(DCPT_BEST, abs=0.01)
    drawn = laws.draw(found, p, forgetting, draws=100)[0]
    low, high = laws.interval(1 - laws.find_share(drawn, 0.03, 0.1))
    assert low < DCPT_BEST < high
    # Between 90 and 94 % the fall is exponential, so that no law's exponents are determined.
    assert laws.find_undetermined(drawn)


# arXiv 2403.08763, table 2: loss on what was learned before, of a base of 2.17, over the share of replay.
STRONG = {0.0: 3.56, 0.01: 2.83, 0.05: 2.57, 0.10: 2.46, 0.25: 2.33, 0.50: 2.24}


def test_replay_of_a_strong_shift_is_predicted_from_other_shares():
    """Of what is forgotten at an inner share, within 20 % but for the steepest."""
    p, forgetting = np.array([*STRONG]), np.array([*STRONG.values()]) / 2.17 - 1
    for row in laws.predict_left_out(laws.REPLAY, p, forgetting, forgetting)[1:]:
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.25), row


def test_the_critical_share_of_a_larger_model_is_larger():
    """As in arXiv 2407.17467, table 5 (29.8, 34.9, 41.4 and 47.8 %), where forgetting has Bethune's dependence on the
    size, ((1 + B p) N)^-alpha: each size's ladder is fitted anew, and its share found."""
    p, critical = np.array([0, 0.05, 0.15, 0.3, 0.5]), []
    for N in (460e6, 940e6, 1.6e9, 3.1e9):
        forgetting = 1.0 * ((1 + 40 * p) * N / 460e6) ** -0.8
        found = laws.fit(laws.REPLAY, p, forgetting, forgetting)
        critical.append(1 - laws.find_share(found, 0.05, 1.0)[0])
    assert critical == sorted(critical)
    assert critical[-1] > critical[0] + 0.2


@pytest.mark.parametrize(("law", "x", "truth"), [
    (laws.REPLAY, [0, 0.05, 0.3], {"F0": 1.0, "B": 105.0, "alpha": 0.7}),
    (laws.REPLAY, [0, 0.05, 0.3], {"F0": 0.5, "B": 4400.0, "alpha": 0.3}),
    (laws.REPLAY, [0, 0.05, 0.3], {"F0": 1.0, "B": 0.5, "alpha": 3.0}),
    (laws.CMR, [1, 0.7, 0.5, 0.3], {"a": -0.3, "b": 1.7, "s": 0.2}),
    (laws.CMR, [1, 0.7, 0.5, 0.3], {"a": 0.4, "b": 1.0, "s": -0.5}),
    (laws.DCPT_SHORT, [0, 0.05, 0.1, 0.3, 0.6], {"E": -0.1, "C": 0.02, "eps": 0.03, "gamma": 0.9}),
    (laws.FLOOR, [1e6, 1e7, 1e8, 1e9], {"L_inf": 1.7, "A": 200.0, "alpha": 0.3})])
def test_exact_laws_are_found_from_as_many_points_as_they_have_parameters(law, x, truth):
    formula = law.formula.partition("=")[2].replace("^", "**").replace(" (", "*(")
    formula = formula.replace("F0*", "F0 *").replace("B p", "B*p").replace("a R", "a*R").replace("A N", "A*N")
    y = eval(formula, {}, {**truth, **dict.fromkeys("pRrN", np.array(x, float))}) if law is not laws.DCPT_SHORT else \
        truth["E"] + truth["C"] * (np.array(x) + truth["eps"]) ** -truth["gamma"]
    found = laws.fit(law, x, y)
    assert {name: value[0] for name, value in found.parameters().items()} == pytest.approx(truth, rel=1e-4)
    assert found.freedom == len(x) - law.parameters


def test_intervals_hold_a_planted_law_about_as_often_as_they_say():
    """95 %: with noise as it is usual, at least 20 of 24 at a share that was not measured, and at the share chosen."""
    p, inside = np.array([0, 0.05, 0.15, 0.4]), [0, 0]
    truth = 0.8 * (1 + 30 * p) ** -0.8
    share = (((0.8 / 0.1) ** (1 / 0.8)) - 1) / 30
    for seed in range(24):
        y = truth * (1 + 0.1 * np.random.default_rng(seed).standard_normal(len(p)))
        drawn = laws.draw(laws.fit(laws.REPLAY, p, y, y), p, y, seed, draws=80)[0]
        low, high = laws.interval(drawn.predict(0.25)[:, 0])
        inside[0] += low < 0.8 * (1 + 30 * 0.25) ** -0.8 < high
        low, high = laws.interval(laws.find_share(drawn, 0.1, 1.0))
        inside[1] += low < share < high
    assert min(inside) >= 20, inside


def test_a_share_that_is_never_reached_has_no_end_and_one_that_needs_no_replay_is_none():
    found = laws.fit(laws.REPLAY, [0, 0.1, 0.3], [0.5, 0.25, 0.5 / 4])
    assert laws.find_share(found, 0.01, 0.6)[0] == np.inf
    assert laws.find_share(found, 0.6, 0.6)[0] == 0
    assert laws.find_share(found, 0.25, 0.6)[0] == pytest.approx(0.1, abs=1e-3)


def test_factors_that_may_not_be_negative_are_those_of_nnls():
    """Truth: scipy."""
    optimize = pytest.importorskip("scipy.optimize", reason="the truth is scipy")
    rng, x = np.random.default_rng(0), np.array([0.0, 0.1, 0.2, 0.4, 0.7])
    grid = np.array([[2.0, 10.0, 1.0]])
    law = laws.Law("as DCPT, E bounded too", "", laws.DCPT.factors, (), laws.DCPT.grids, laws.DCPT.columns, dict)
    y = rng.standard_normal((40, 5)) + rng.choice([-2, 0, 2], (40, 1))
    found = laws.solve(law, x, y, np.ones(5), grid)
    A = np.stack(np.broadcast_arrays(*law.columns(x, *grid.T[..., None])), -1)[0]
    for i, row in enumerate(y):
        factors, norm = optimize.nnls(A, row)
        np.testing.assert_allclose(found.factors[i], factors, atol=1e-8)
        assert (found.error[i] if factors.any() else norm**2) == pytest.approx(norm**2, rel=1e-8)
    assert (found.factors == 0).any()


def test_nothing_is_said_of_noise_that_nothing_tells():
    x = [1e6, 1e7, 1e8]
    with pytest.raises(AssertionError, match="nothing says how large the noise is"):
        laws.draw(laws.fit(laws.FLOOR, x, [3.0, 2.5, 2.2]), x)


def test_the_chance_of_a_ratio_is_that_of_f():
    stats = pytest.importorskip("scipy.stats", reason="the truth is scipy")
    for ratio, above, below in ((3.0, 2, 7), (1.0, 2, 5), (9.5, 3, 12)):
        truth = stats.f.sf(ratio, above, below)
        assert laws.chance_of_ratio(ratio, above, below) == pytest.approx(truth, abs=4e-3)
