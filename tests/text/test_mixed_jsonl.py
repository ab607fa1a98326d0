"""Laws: none twice before all are once; the same seed gives the same bytes; what fails leaves what was there."""

import json

import numpy as np
import pytest

from text.mixed_jsonl import _draw, mix_files


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
