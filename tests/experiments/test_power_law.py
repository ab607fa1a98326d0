"""experiments/power_law.py. Truths: laws planted with known parameters and noise; losses that follow no such law."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "experiments"))    # at the end: tokenizers.py has a package's name

import power_law

SIZES = np.array([3e4, 1e5, 3e5, 1e6, 3e6])


def plant(alpha, L_inf, N_c, noise, seed, seeds=3):
    """(N, losses) of `seeds` runs of each size."""
    N = np.repeat(SIZES, seeds)
    return N, (N_c / N) ** alpha + L_inf + noise * np.random.default_rng(seed).standard_normal(len(N))


@pytest.mark.parametrize(("alpha", "L_inf", "N_c"), [(0.38, 1.7, 5e4), (0.076, 0.0, 8.8e13), (1.2, 3.0, 2e4)])
def test_an_exact_law_is_found(alpha, L_inf, N_c):
    """The second is Kaplan's law of parameters, without a floor."""
    found = power_law.judge(*plant(alpha, L_inf, N_c, 0.0, 0))
    assert found["alpha"] == pytest.approx(alpha, rel=1e-6)
    assert found["L_inf"] == pytest.approx(L_inf, abs=1e-6)
    assert np.log(found["N_c"]) == pytest.approx(np.log(N_c), rel=1e-6)
    assert found["r2"] > 0.99999


def test_intervals_hold_what_was_planted_about_as_often_as_they_say(monkeypatch):
    """95 %: of 40 planted laws, between 33 and 40 lie inside; the intervals are neither endless nor points."""
    monkeypatch.setattr(power_law, "DRAWS", 100)
    inside, widths = {"alpha": 0, "L_inf": 0}, []
    for seed in range(40):
        drawn = power_law.find_parameters(power_law.draw_fits(*plant(0.4, 2.0, 3e5, 0.01, seed), seed))
        for name, truth in (("alpha", 0.4), ("L_inf", 2.0)):
            low, high = power_law.interval(drawn[name])
            inside[name] += low <= truth <= high
        low, high = power_law.interval(drawn["alpha"])
        widths.append(high - low)
    assert min(inside.values()) >= 33, inside
    assert 0.01 < np.mean(widths) < 0.15


def test_a_law_with_noise_fits_and_predicts_a_size_that_it_has_not_seen():
    N, losses = plant(0.4, 2.0, 3e5, 0.01, 1)
    got, unseen = power_law.judge(N, losses), power_law.predict_largest(N, losses)
    assert got["verdict"] == "fits"
    assert got["r2"] > 0.99
    truth = (3e5 / 3e6) ** 0.4 + 2.0
    assert unseen["interval"][0] < truth < unseen["interval"][1]
    assert unseen["predicted"] == pytest.approx(truth, abs=0.05)
    assert unseen["measured"] == pytest.approx(losses[N == 3e6].mean())


def repeat(means, noise=0.002, seeds=3, seed=0):
    N = np.repeat(SIZES, seeds)
    return N, np.repeat(means, seeds) + noise * np.random.default_rng(seed).standard_normal(len(N))


def test_where_no_law_holds_it_says_so():
    # larger models are worse again, as where they overfit
    assert power_law.judge(*repeat([4.0, 3.6, 3.5, 3.7, 4.1]))["verdict"] in ("misfit", "no trend")
    # a step: nothing, then everything
    assert power_law.judge(*repeat([4.0, 4.0, 4.0, 3.0, 2.9]))["verdict"] == "misfit"
    # the size does not matter; the larger, the worse
    assert power_law.judge(*repeat([4.0] * 5, noise=0.05))["verdict"] == "no trend"
    assert power_law.judge(*repeat([3.0, 3.1, 3.2, 3.3, 3.4]))["verdict"] == "no trend"
    # one noisy run of each size leaves the exponent open
    assert power_law.judge(*plant(0.4, 2.0, 3e5, 0.3, 0, seeds=1))["verdict"] in ("undetermined", "no trend")


def test_four_sizes_are_too_few_to_leave_one_out():
    N, losses = plant(0.4, 2.0, 3e5, 0.01, 1)
    assert power_law.predict_largest(N[:12], losses[:12]) is None
