"""Packing, reading, cleaning and dedup beside their peers. Truth: both sides do the same; the promised names."""

import os
import random

import pytest

from measure import bench_data
from measure.bench_data import DataOptions

DATA_ROWS = ["pack_vs_encoder", "pack_vs_datasets", "pack_vs_datatrove", "read_mtokens_per_second",
             "read_vs_datatrove", "encode_tokenizer_vs_tiktoken", "encode_tokenizer_vs_tokenizers",
             "clean_vs_datatrove", "dedup_vs_datatrove", "dedup_vs_datasketch"]


def some_blocks(n) -> list[str]:
    """Paragraphs of words drawn at random, so that only planted copies resemble each other."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(400)]
    return [". ".join(" ".join(["the", "of", *rng.choices(words, k=9)]) for _ in range(6)) + "." for _ in range(n)]


def test_data_rows_carry_the_names_that_others_read_and_both_sides_do_the_same(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    text, cores = tmp_path / "in.txt", os.sched_getaffinity(0)
    text.write_text("\n\n".join(some_blocks(150)))
    monkeypatch.delenv("NANOCPT_DATA", raising=False)
    found = bench_data.bench_data(DataOptions([str(text)], mbytes=0.2, rounds=1))
    rows = {r["name"]: r for r in found}
    assert list(rows) == DATA_ROWS
    assert all(r["ours"] > 0 and (r["peer"] or r["left_out"]) for r in found)
    assert rows["pack_vs_encoder"]["peer"] > 0
    assert rows["read_mtokens_per_second"]["peer"] > 0
    counts = {name: tuple(r["counts"].values()) for name, r in rows.items() if r.get("counts")}
    assert counts["pack_vs_encoder"][0] - counts["pack_vs_encoder"][1] == 3 * 150          # an EOS for each document
    same = {"pack_vs_datatrove", "encode_tokenizer_vs_tiktoken", "encode_tokenizer_vs_tokenizers"}
    for name in counts.keys() & same:
        assert counts[name][0] == counts[name][1], name
    assert counts.get("clean_vs_datatrove", (1, 1))[1] > 0
    kept = rows["dedup_vs_datasketch"]["documents"] * 3 // 4                # a quarter are copies, some below 0.8
    for name in counts.keys() & {"dedup_vs_datatrove", "dedup_vs_datasketch"}:
        assert kept <= counts[name][0] == counts["dedup_vs_datasketch"][0] <= kept + 4, name
        assert kept - 1 <= counts[name][1] <= kept + 4, name
    assert os.sched_getaffinity(0) == cores


def test_copies_are_what_dedup_has_to_find():
    documents = ["\n\n".join(some_blocks(180)[i:i + 3]) for i in range(0, 180, 3)]
    mixed = bench_data.with_copies(documents)
    assert len(mixed) == 80
    sets = {text: {tuple(words[i:i + 5]) for i in range(len(words) - 4)}
            for text in mixed for words in [text.lower().split()]}
    best = {text: max(len(sets[text] & sets[d]) / len(sets[text] | sets[d]) for d in documents)
            for text in set(mixed) - set(documents)}
    assert len(best) == 20 - 4                                              # every fifth copy is exact
    assert sorted(best.values())[8:] == [1.0] * 8                           # other lines, capitals
    assert 0.6 < min(best.values()) < sorted(best.values())[7] < 1
