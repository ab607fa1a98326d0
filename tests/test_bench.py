"""The benchmark compares like with like. Truth: one first loss on both sides, hand-made numbers, the promised names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bench

ROOT = Path(__file__).parent.parent


def test_a_row_holds_the_ratio_of_ours_to_the_peer(capsys):
    made = bench.row("x", "tokens/s", 30.0, 20.0, "them", spread=0.1)
    assert made["ratio"] == 1.5
    assert "1.50" in capsys.readouterr().out
    assert bench.row("y", "share", 0.9)["ratio"] is None
    assert bench.spread([1.0, 1.0, 1.0, 1.0]) == 0


def test_packed_cases_hold_documents_and_the_others_do_not():
    packed, plain = bench.case_batches("packed_2k", 1)[0], bench.case_batches("vocab_8k", 1)[0]
    lengths = packed.doc_start[0].unique().diff()
    assert 32 <= lengths.min() <= lengths.max() <= 640
    assert not plain.doc_start.any()
    assert (packed.position_ids[packed.doc_start == packed.position_ids + packed.doc_start] == 0).all()


def test_data_rows_carry_the_names_that_others_read(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    text = tmp_path / "in.txt"
    text.write_text("\n\n".join(f"Paragraph {i} says that {i * 7} is not {i + 1}." for i in range(400)))
    out = tmp_path / "deep" / "out.json"
    monkeypatch.setattr(sys, "argv", ["bench.py", "data", "--text", str(text), "--mbytes", "0.02", "--rounds", "1",
                                      "--json", str(out)])
    assert bench.main() == 0
    found = json.loads(out.read_text())
    assert [r["name"] for r in found["rows"]] == ["pack_vs_encoder", "pack_vs_datasets", "read_mtokens_per_second"]
    assert all(r["ours"] > 0 and r["peer"] > 0 for r in found["rows"])
    assert not any("/" in word for word in found["command"])


def test_both_sides_start_from_the_same_weights_and_batches(monkeypatch):
    pytest.importorskip("transformers")
    losses = []
    for side in ("ours", "transformers"):
        done = subprocess.run([sys.executable, ROOT / "bench.py", "worker", "--case", "vocab_8k", "--side", side],
                              input="step\n", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        losses.append(json.loads(done.stdout.splitlines()[-1])["first_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)      # theirs leaves out the last target of a row
