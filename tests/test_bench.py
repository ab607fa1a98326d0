"""The benchmark compares like with like. Truth: one first loss on both sides, hand-made numbers, the promised names."""

import json
import os
import random
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

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


DATA_ROWS = ["pack_vs_encoder", "pack_vs_datasets", "pack_vs_datatrove", "read_mtokens_per_second", "read_vs_datasets",
             "read_vs_datatrove", "encode_tokenizer_vs_tiktoken", "encode_tokenizer_vs_tokenizers",
             "clean_vs_datatrove", "clean_vs_datasets", "dedup_vs_datatrove", "dedup_vs_datasketch",
             "dedup_in_memory_vs_datasketch"]


def some_blocks(n) -> list[str]:
    """Paragraphs of words drawn at random, so that only planted copies resemble each other."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(400)]
    return [". ".join(" ".join(["the", "of", *rng.choices(words, k=9)]) for _ in range(6)) + "." for _ in range(n)]


def test_data_rows_carry_the_names_that_others_read_and_both_sides_do_the_same(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    text, out, cores = tmp_path / "in.txt", tmp_path / "deep" / "out.json", os.sched_getaffinity(0)
    text.write_text("\n\n".join(some_blocks(150)))
    monkeypatch.delenv("NANOCPT_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["bench.py", "data", "--text", str(text), "--mbytes", "0.2", "--rounds", "1",
                                      "--json", str(out)])
    assert bench.main() == 0
    found = json.loads(out.read_text())
    rows = {r["name"]: r for r in found["rows"]}
    assert list(rows) == DATA_ROWS
    assert all(r["ours"] > 0 and (r["peer"] or r["left_out"]) for r in found["rows"])
    assert rows["pack_vs_encoder"]["peer"] > 0
    assert rows["read_mtokens_per_second"]["peer"] > 0
    assert not any("/" in word for word in found["command"])
    counts = {name: tuple(r["counts"].values()) for name, r in rows.items() if r.get("counts")}
    assert counts["pack_vs_encoder"][0] - counts["pack_vs_encoder"][1] == 3 * 150          # an EOS for each document
    same = {"pack_vs_datatrove", "encode_tokenizer_vs_tiktoken", "encode_tokenizer_vs_tokenizers", "clean_vs_datasets"}
    for name in counts.keys() & same:
        assert counts[name][0] == counts[name][1], name
    assert counts.get("clean_vs_datatrove", (1, 1))[1] > 0
    kept = rows["dedup_vs_datasketch"]["documents"] * 3 // 4                # a quarter are copies, some below 0.8
    for name in counts.keys() & {"dedup_vs_datatrove", "dedup_vs_datasketch", "dedup_in_memory_vs_datasketch"}:
        assert kept <= counts[name][0] == counts["dedup_vs_datasketch"][0] <= kept + 4, name
        assert kept - 1 <= counts[name][1] <= kept + 4, name
    assert os.sched_getaffinity(0) == cores


def test_copies_are_what_dedup_has_to_find():
    documents = ["\n\n".join(some_blocks(180)[i:i + 3]) for i in range(0, 180, 3)]
    mixed = bench.with_copies(documents)
    assert len(mixed) == 80
    sets = {text: {tuple(words[i:i + 5]) for i in range(len(words) - 4)}
            for text in mixed for words in [text.lower().split()]}
    best = {text: max(len(sets[text] & sets[d]) / len(sets[text] | sets[d]) for d in documents)
            for text in set(mixed) - set(documents)}
    assert len(best) == 20 - 4                                              # every fifth copy is exact
    assert sorted(best.values())[8:] == [1.0] * 8                           # other lines, capitals
    assert 0.6 < min(best.values()) < sorted(best.values())[7] < 1


def test_sides_take_turns_and_the_first_round_is_not_counted(monkeypatch, capsys):
    now, order = [0.0], []

    def side(name, *seconds):
        left = iter(seconds)

        def call():
            order.append(name)
            now[0] += next(left)
            return name
        return call

    def absent():
        raise ImportError("Please install them.\nand more")
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(bench, "version", lambda package: "1.2")
    rows = bench.versus("docs/s", 12, side("a", 99, 2, 4, 3), {
        "x": ("them", side("b", 99, 6, 8, 12)), "y": ("no one", absent)}, 3, documents=12)
    assert order == ["b", "a", "a", "b"] * 2
    assert (rows[0]["ours"], rows[0]["peer"], rows[0]["ratio"], rows[0]["peer_name"]) == (4.0, 1.5, 8 / 3, "them 1.2")
    assert rows[0]["counts"] == {"ours": "a", "peer": "b"}
    assert rows[0]["spread"] == pytest.approx(2 / 3)                # of the ratios 3, 2, 4: quartiles 2 and 4
    assert (rows[1]["ours"], rows[1]["peer"], rows[1]["left_out"]) == (4.0, None, "Please install them.")
    with pytest.raises(ImportError):
        bench.versus("docs/s", 12, absent, {}, 1)


def test_both_sides_start_from_the_same_weights_and_batches(monkeypatch):
    pytest.importorskip("transformers")
    _, results, _ = bench.in_turn("tiny", ("ours", "transformers"), 1, "cpu")
    ours, theirs = (results[side]["losses"] for side in ("ours", "transformers"))
    assert ours == pytest.approx(theirs, rel=1e-5)


LORA_ROWS = ["lora", "lora_their_allocator_too", "lora_peak_memory", "lora_peak_memory_their_allocator_too", "qlora",
             "qlora_memory", "qlora_matrix_memory", "qlora_peak_memory"]


def test_lora_trains_what_peft_trains_and_its_rows_carry_the_names_that_others_read(tmp_path, monkeypatch, capfd):
    """At 512 ids, to be fast, and with PEFT's worker in the place of both of its sides."""
    pytest.importorskip("peft")
    real, out = bench.in_turn, tmp_path / "lora.json"

    def small(case, sides, steps, device):
        assert (case, sides) == ("vocab_32k", ("lora", "peft", "peft_allocator", "qlora"))
        seconds, results, more = real("tiny", ("lora", "peft", "qlora"), steps, device)
        return ({**seconds, "peft_allocator": seconds["peft"]}, {**results, "peft_allocator": results["peft"]}, more)
    monkeypatch.setattr(bench, "in_turn", small)
    monkeypatch.setattr(sys, "argv", ["bench.py", "lora", "--steps", "1", "--json", str(out)])
    assert bench.main() == 0
    rows = {r["name"]: r for r in json.loads(out.read_text())["rows"]}
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
        monkeypatch.setattr(bench, "in_turn", sides(first, last))
        with pytest.raises(ValueError, match=f"of step {step} are"):
            bench.bench_lora(types.SimpleNamespace(steps=1))


# ---- kernels and gpu

def test_the_gpu_suite_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, ROOT / "bench.py", "gpu"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "error: bench.py gpu needs a CUDA device; bench.py kernels says what can be known without one"]


def test_a_step_of_a_whole_model_learns_on_both_sides(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "step.json"
    monkeypatch.setattr(sys, "argv", ["bench.py", "step", "--size", "tiny", "--steps", "3", "--json", str(out)])
    assert bench.main() == 0
    first = json.loads(out.read_text())["rows"][0]
    assert first["name"] == "step_tiny_full_tokens_per_second"
    sides = first["sides"]
    assert sides["ours"]["parameters"] == sides["transformers"]["parameters"]
    for side in sides.values():
        assert side["losses"][0] == pytest.approx(6.24, abs=0.05)           # log(512)
        assert side["losses"] == sorted(side["losses"], reverse=True)


def test_stages_keep_what_others_found(tmp_path, monkeypatch, capsys):
    """The suite goes on when a stage fails, runs out of time or leaves failing tests behind."""
    def run(words, timeout):
        if "1b" in words:
            Path(words[-1]).write_text(json.dumps({"rows": [{"name": "half"}]}))         # what it had found by then
            raise subprocess.TimeoutExpired(words, timeout)
        if "kernels" in words:
            assert 300 < float(words[words.index("--seconds") + 1]) < 480
            Path(words[-1]).write_text(json.dumps({"rows": [{"name": "found"}]}))
            return types.SimpleNamespace(returncode=0)
        return types.SimpleNamespace(returncode=3)

    tests = types.SimpleNamespace(returncode=1, communicate=lambda timeout: ("a PASSED\nb FAILED\nc PASSED\n", None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "machine", dict)
    monkeypatch.setattr(bench, "subprocess", types.SimpleNamespace(
        run=run, Popen=lambda *a, **k: tests, TimeoutExpired=subprocess.TimeoutExpired, PIPE=-1, STDOUT=-2))
    rows = bench.bench_gpu(types.SimpleNamespace(minutes=8, json=str(tmp_path / "gpu.json")))
    assert [(r["name"], r.get("failed", "")[:12]) for r in rows] == [
        ("step --size 8b", "exit status "), ("half", ""), ("step --size 1b", "90 seconds w"),
        ("gpu_tests", "a PASSED\nb F"), ("found", "")]
    assert rows[3]["counts"] == {"passed": 2, "failed": 1, "skipped": 0, "error": 0}


def test_the_kernel_table_and_its_picture(tmp_path, monkeypatch, capsys):
    from kernels import measure
    cases = iter(range(100))

    def timed(case, tokens, limits, peers):
        time.sleep(0.05 * (next(cases) > 1))
        return [{"case": case.name, "tokens": tokens, "pass": "forward", "ms": {"triton": 2.0, "torch": 4.0},
                 "floor_ms": 1.0, "share": 0.5, "failed": {}, "spread": {}, "peak_bytes": {}}]
    monkeypatch.setattr(measure, "device_limits", lambda: {"copy_gb_per_second": 3000.0, "bf16_tflops": 700.0})
    monkeypatch.setattr(measure, "time_case", timed)
    args = types.SimpleNamespace(tokens=[64], seconds=0.01, json=str(tmp_path / "deep" / "table.json"))
    rows = bench.kernel_times(args)
    assert [r["name"] for r in rows[:2]] == ["copy_gb_per_second", "bf16_tflops"]
    assert (rows[2]["ours"], rows[2]["peer"], rows[2]["peer_name"], rows[2]["ratio"]) == (2.0, 4.0, "torch", 0.5)
    assert "seconds were up" in rows[-1]["left_out"]
    assert (tmp_path / "deep" / "table.png").stat().st_size > 1000
    assert 2 < len(json.loads((tmp_path / "deep" / "table.json").read_text())["rows"]) <= len(rows)


def test_cpu_paths_compute_what_the_plain_way_computes():
    for name, (ours, plain, inputs) in bench.cpu_cases().items():
        with torch.no_grad():
            a, b = (f(*inputs) for f in (ours, plain))
        for x, y in zip(*((r if isinstance(r, tuple) else (r,)) for r in (a, b))):
            x, y = (x.transpose(1, 2), y) if name == "cpu_attention_documents" else (x, y)
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-4), name


def test_a_peer_that_does_not_fit_leaves_our_figures(tmp_path, monkeypatch, capsys):
    real = bench.time_steps

    def steps(side, *more):
        if side != "ours":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nand more")
        return real(side, *more)
    monkeypatch.setattr(bench, "time_steps", steps)
    rows = bench.bench_step(types.SimpleNamespace(size="tiny", steps=2))
    assert rows[0]["ours"] > 0
    assert rows[0]["peer"] is None
    assert rows[0]["sides"]["transformers"] == {"failed": "OutOfMemoryError: CUDA out of memory."}


def test_tests_that_take_too_long_are_counted_as_far_as_they_came(capsys):
    class Slow:
        returncode, calls = -9, 0

        def communicate(self, timeout=None):
            self.calls += 1
            if self.calls == 1:
                raise subprocess.TimeoutExpired("pytest", timeout)
            return "", None

        def kill(self):
            pass
    made = bench.test_row(Slow(), 5)
    assert made["counts"]["passed"] == 0
    assert "5 seconds were up" in made["failed"]
