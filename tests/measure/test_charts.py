"""measure/charts.py against plain numpy and hand-made curves; tests/test_report.py has its pictures on the page."""

import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from measure import charts


def test_smoothing_is_the_plain_mean_of_its_window():
    y = np.random.default_rng(0).normal(size=203)
    half = 203 // 40
    want = [y[max(0, i - half): i + half + 1].mean() for i in range(len(y))]
    np.testing.assert_allclose(charts.smooth(y), want, rtol=1e-10)


def test_a_long_noisy_curve_is_drawn_with_few_points_and_all_its_spikes():
    y = np.random.default_rng(0).normal(size=20_000)
    y[7_777], y[12_345] = 50, -50
    axes = Figure().add_subplot()
    charts.draw_curve(axes, np.arange(20_000), y, "g0", smoothed=True)
    raw, mean = (line.get_xydata() for line in axes.lines)
    assert len(raw) <= 800
    assert (raw[:, 1].min(), raw[:, 1].max()) == (-50, 50)
    assert raw[raw[:, 1].argmax(), 0] == pytest.approx(7_777, abs=100)
    assert (raw[0, 0], raw[-1, 0]) == (0, pytest.approx(20_000, abs=200))
    assert (mean[:, 1] == charts.smooth(y)).all()
    # A curve of moderate length is drawn as it is.
    charts.draw_curve(axes, np.arange(300), y[:300], "g0", smoothed=True)
    assert (axes.lines[2].get_ydata()[::2] == y[:300]).all()


def test_a_smooth_curve_of_many_points_is_drawn_with_few():
    def draw(axes):
        charts.draw_curve(axes, np.arange(20_000), np.cos(np.arange(20_000) / 2_000), "g0")
        return "", "", []
    svg = charts.draw_charts([draw], "salt")[0]["svg"]
    assert 20 < max(re.findall(r' d="([^"]*)"', svg), key=len).count("L") < 400


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
