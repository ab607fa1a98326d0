"""Law: every document that goes in is accounted for."""

import json

from documents import STATUTE, read, records, some_documents

from clean import Settings, clean_corpus
from text.drops import SAMPLES


def test_the_report_adds_up(tmp_path):
    rows = [{**r, "metadata": {"source": f"s{i % 3}", "domain": "law" if i % 2 else ""}} for i, r in enumerate(
        records([*some_documents(), "\n\n".join([STATUTE] * 10)]))]
    report = clean_corpus(rows, Settings("legal", max_chars=2000), tmp_path)
    kept, dropped, on_disk = read(tmp_path)
    assert on_disk == json.loads(json.dumps(report))
    assert report["documents"] == len(rows)
    assert report["parts"] == len(kept) + len(dropped) > len(rows)
    assert (report["kept"], report["dropped"]) == (len(kept), len(dropped))
    for table in report["statistics"].values():
        for key, total in (("parts", report["parts"]), ("kept", len(kept)), ("documents", len(rows)),
                           ("bytes_kept", sum(len(r["text"].encode()) for r in kept))):
            assert sum(row[key] for row in table.values()) == total, key
    assert set(report["statistics"]["source"]) == {"s0", "s1", "s2"}
    assert set(report["statistics"]["domain"]) == {"law", "legal"}
    for name, row in report["reasons"].items():
        assert row["dropped"] == sum(name in r["metadata"]["dropped"] for r in dropped)
        assert row["only_reason"] == sum(r["metadata"]["dropped"] == [name] for r in dropped)
        assert len(report["samples"].get(name, [])) == min(SAMPLES, row["dropped"])
    assert len(report["samples"]["kept"]) == SAMPLES
    assert report["pii"]["email"] == sum(r["text"].count("<EMAIL>") for r in kept + dropped) > 0
    assert all("dropped" not in r["metadata"] for r in kept)


def test_half_a_surrogate_pair_in_id_source_or_domain_stops_no_report(tmp_path):
    row = {"text": STATUTE, "id": "\ud800", "metadata": {"source": "a\udfff", "domain": "\ud800"}}
    clean_corpus([row], Settings("legal"), tmp_path)
    kept, _, report = read(tmp_path)
    assert kept[0]["id"] == "\ud800"
    assert list(report["statistics"]["source"]) == ["a\ufffd"]
