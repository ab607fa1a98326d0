"""Training steps beside transformers' and PEFT's. Truth: one loss on both sides, hand-made sizes, promised names."""

import pytest

from measure import bench_steps
from measure.bench_steps import LoraOptions


def test_packed_cases_hold_documents_and_the_others_do_not():
    packed, plain = bench_steps.case_batches("packed_2k", 1)[0], bench_steps.case_batches("vocab_8k", 1)[0]
    lengths = packed.doc_start[0].unique().diff()
    assert 32 <= lengths.min() <= lengths.max() <= 640
    assert not plain.doc_start.any()
    assert (packed.position_ids[packed.doc_start == packed.position_ids + packed.doc_start] == 0).all()


def test_both_sides_start_from_the_same_weights_and_batches(monkeypatch):
    pytest.importorskip("transformers")
    _, results, _ = bench_steps.in_turn("tiny", ("ours", "transformers"), 1, "cpu")
    ours, theirs = (results[side]["losses"] for side in ("ours", "transformers"))
    assert ours == pytest.approx(theirs, rel=1e-5)


LORA_ROWS = ["lora", "lora_their_allocator_too", "lora_peak_memory", "lora_peak_memory_their_allocator_too", "qlora",
             "qlora_memory", "qlora_matrix_memory", "qlora_peak_memory"]


def test_lora_trains_what_peft_trains_and_its_rows_carry_the_names_that_others_read(monkeypatch, capfd):
    """At 512 ids, to be fast, and with PEFT's worker in the place of both of its sides."""
    pytest.importorskip("peft")
    real = bench_steps.in_turn

    def small(case, sides, steps, device):
        assert (case, sides) == ("vocab_32k", ("lora", "peft", "peft_allocator", "qlora"))
        seconds, results, more = real("tiny", ("lora", "peft", "qlora"), steps, device)
        return ({**seconds, "peft_allocator": seconds["peft"]}, {**results, "peft_allocator": results["peft"]}, more)
    monkeypatch.setattr(bench_steps, "in_turn", small)
    rows = {r["name"]: r for r in bench_steps.bench_lora(LoraOptions(steps=1))}
    assert list(rows) == LORA_ROWS
    assert all(r["ours"] > 0 and r["peer"] > 0 for r in rows.values())
    losses = rows["lora"]["losses"]
    assert losses["lora"] == pytest.approx(losses["peft"], rel=1e-5)
    assert losses["lora"][0] != losses["lora"][1]
    assert 1e-6 < abs(losses["qlora"][0] / losses["lora"][0] - 1) < 0.01
    # four blocks of 256 and 704 columns, and a vocabulary beside them
    matrices = [256 * 256, 128 * 256, 128 * 256, 256 * 256, 704 * 256, 704 * 256, 256 * 704] * 4
    four, tables = rows["qlora_memory"], 2 * 512 * 256 + 9 * 256
    assert four["peer"] == 4 * (sum(matrices) + tables)
    assert four["ours"] - 4 * tables == four["quantised_bytes"] == four["arithmetic_bytes"]
    assert four["quantised_bytes"] == sum(n // 2 + n // 64 + 4 * -(-n // 16384) + 4 * (16 + 256 + 1) for n in matrices)
    assert rows["qlora_matrix_memory"]["peer"] == 4 * sum(matrices)


def test_sides_that_train_differently_are_not_compared(monkeypatch):
    def sides(first, last):
        losses = {"lora": [9.0, 8.0], "peft": [first, last], "peft_allocator": [9.0, 8.0], "qlora": [9.1, 8.1]}
        return lambda *args: ({}, {side: {"losses": both} for side, both in losses.items()}, [])
    for first, last, step in ((9.0002, 8.0, 0), (9.0, 8.002, -1)):
        monkeypatch.setattr(bench_steps, "in_turn", sides(first, last))
        with pytest.raises(RuntimeError, match=f"of step {step} are"):
            bench_steps.bench_lora(LoraOptions(steps=1))
