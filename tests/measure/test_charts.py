"""measure/charts.py against plain numpy and hand-made curves; tests/test_report.py has its pictures on the page."""

import numpy as np
import pytest

from measure import charts


def test_smoothing_is_the_plain_mean_of_its_window():
    y = np.random.default_rng(0).normal(size=203)
    half = 203 // 40
    want = [y[max(0, i - half): i + half + 1].mean() for i in range(len(y))]
    np.testing.assert_allclose(charts.smooth(y), want, rtol=1e-10)


def test_thinning_keeps_ends_and_spikes():
    y = np.random.default_rng(0).normal(size=100_000)
    y[77_777], y[12_345] = 50, -50
    x, thin = charts.thin(np.arange(100_000), y, 400)
    assert len(x) <= 402
    assert (thin.max(), thin.min(), x[0], x[-1]) == (50, -50, 0, 99_999)
    assert (np.diff(x) > 0).all()


@pytest.mark.parametrize(("value", "text"), [(4194304, "4.19M"), (12_345, "12.3k"), (9999, "9,999"), (0.25, "0.25"),
                                             (0, "0"), (-2.5e9, "-2.50B"), (None, "–"), (float("nan"), "–")])
def test_counts_as_text(value, text):
    assert charts.short(value) == text


@pytest.mark.parametrize(("value", "text"), [(20_000, "20k"), (0.00002, "2e−5"), (0, "0"), (-1.5, "−1.5")])
def test_ticks_as_text(value, text):
    assert charts.tick_text(value) == text


def test_only_finite_values_make_a_curve():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": "x"}, {"step": 4, "loss": 1}]
    steps, values = charts.series(rows, lambda row: row.get("loss"))
    assert (steps.tolist(), values.tolist()) == ([1, 4], [2.0, 1.0])
