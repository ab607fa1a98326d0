"""Truth: sums over the plan. The command is tried in test_data.py."""

import pytest
from test_mixture import bucketed

from text.mix_preview import draw_shares, measure_shares
from text.mixture import DataConfig, LengthConfig, make_plan


def test_measured_shares_are_the_counts(tmp_path):
    config, sources = DataConfig(schedule="staged"), bucketed(4)
    counts = make_plan(config, LengthConfig(steps=100, batch_size=10), sources, {})
    rows = measure_shares(config, sources, counts, 10)
    assert [(r["first_step"], r["last_step"]) for r in rows] == [(10 * i, 10 * i + 9) for i in range(10)]
    for row in rows:
        taken = counts[row["last_step"] + 1] - counts[row["first_step"]]
        assert [row["sources"][name] for name in sources] == (taken / 100).tolist()
        assert row["domain"] == pytest.approx(1 - taken[-1] / 100)
        assert abs(row["wanted"] - row["domain"]) < 0.02
    assert [round(rows[i]["wanted"], 3) for i in (0, 1, 2, 3, 9)] == [0.21, 0.42, 0.42, 0.7, 0.7]
    assert [len(measure_shares(config, sources, counts[:n + 1], 10)) for n in (1, 3, 10)] == [1, 3, 10]
    draw_shares(tmp_path / "mix.png", "title", sources, rows)
    assert (tmp_path / "mix.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
