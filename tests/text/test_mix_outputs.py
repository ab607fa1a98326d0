"""Truth: sums over the plan. The command is tried in test_data.py. Laws of a mixed file: none twice before all are
once; the same seed gives the same bytes; what fails leaves what was there."""

import json

import numpy as np
import pytest
from test_mixture import bucketed

from text.mix_outputs import _draw, draw_shares, measure_shares, mix_files
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


def test_mixed_files(tmp_path):
    law = [{"text": f"law {i}", "id": i, "metadata": {"x": [i]}} for i in range(10)]
    web = [{"text": f"web {i} \ud800\u2028", "source_type": "old"} for i in range(7)]
    out, seen = tmp_path / "new/mixed.jsonl", set()
    for seed in (0, 0, 1):
        done = mix_files(iter(law), iter(web), out, overwrite=True, ratio=0.6, total=45, seed=seed)
        seen.add(out.read_bytes())
        got = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
        for side, records, n in (("domain", law, 27), ("general", web, 18)):
            mine = [r for r in got if r["source_type"] == side]
            texts = [r["text"].replace("\ufffd", "\ud800") for r in mine]
            assert len(mine) == n == done[side]["written"]
            counts = [texts.count(r["text"]) for r in records]             # none twice before all are once
            assert max(counts) - min(counts) <= 1
            assert done[side]["epochs"] == n / len(records)
        assert all(r == {**law[r["id"]], "source_type": "domain"} for r in got if r["source_type"] == "domain")
    assert len(seen) == 2
    assert [r["source_type"] for r in got] != sorted(r["source_type"] for r in got)
    assert mix_files(law, web, out, overwrite=True)["total"] == 14  # each of the domain once
    assert sorted(p.name for p in out.parent.iterdir()) == ["mixed.jsonl"]


def test_an_epoch_of_a_mix_has_each_record_once_in_a_new_order(tmp_path):
    law = [{"text": str(i)} for i in range(50)]
    places = _draw("domain", 200, np.arange(50), seed=3).reshape(4, 50)
    assert all(sorted(row) == list(range(50)) for row in places.tolist())
    assert len({tuple(row) for row in places.tolist()}) == 4
    done = mix_files(law, [], tmp_path / "m.jsonl", overwrite=True, ratio=1.0, total=250)
    assert ["read 5.0 times" in line for line in done["warnings"]] == [True]
    before = (tmp_path / "m.jsonl").read_bytes()
    for wrong, match in (({"total": 801}, "16.0 times, above its max_epochs of 16: .* --max-epochs 17"),
                         ({"ratio": 0.0}, "gives the length"),
                         ({"ratio": 0.5, "total": 9}, "the general files hold no records, but 5")):
        with pytest.raises(ValueError, match=match):
            mix_files(law, [], tmp_path / "m.jsonl", overwrite=True, **{"ratio": 1.0, **wrong})
    with pytest.raises(ValueError, match="the domain files hold no records"):
        mix_files([], law, tmp_path / "m.jsonl", overwrite=True)
    mix_files(law, [], tmp_path / "n.jsonl", overwrite=True, ratio=1.0, total=801, max_epochs=20)
    assert (tmp_path / "m.jsonl").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.jsonl", "n.jsonl"]
