"""Training steps beside transformers' and PEFT's. Truth: one loss on both sides, hand-made sizes, promised names."""

import io
import json
import os

import numpy as np
import pytest
import torch

from core import cli
from core.errors import UserError
from learn.objectives import Causal
from learn.optim import OptimConfig
from measure import bench_steps
from measure.bench_steps import CASES, LoraOptions, TrainOptions, environment_of, in_turn, make_batch


def test_packed_cases_hold_documents_and_the_others_do_not():
    packed, plain = (make_batch(CASES[name], np.random.default_rng(0)) for name in ("packed_2k", "vocab_8k"))
    lengths = packed.doc_start[0].unique().diff()
    assert 32 <= lengths.min() <= lengths.max() <= 640
    assert not plain.doc_start.any()
    assert (packed.position_ids[packed.doc_start == packed.position_ids + packed.doc_start] == 0).all()


def test_our_side_is_a_step_of_train_py():
    """The loss by PyTorch on all logits, and a second step on the same batch that is better."""
    case, objective = CASES["tiny"], Causal(mask_documents=False)
    model = bench_steps.random_model(case, "cpu")
    batch = objective.corrupt(make_batch(case, np.random.default_rng(0)), None)
    logits = model.head(model(batch.tokens, batch.position_ids))
    truth = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten().long()).item()
    optim = OptimConfig(lr=1e-3, min_lr=0.0, schedule="constant", warmup_steps=0)
    step = bench_steps.our_step(model, objective, optim, None, case, "cpu")
    first, second = step(batch), step(batch)
    assert first == pytest.approx(truth, rel=1e-5)
    assert second < first


@pytest.mark.slow
@pytest.mark.parametrize(("case", "sides", "limit"), [
    ("tiny", ("ours", "transformers"), 1e-5), ("tiny_bf16", ("ours", "transformers"), 1e-3)])
def test_all_sides_train_the_same(case, sides, limit):
    """The loss of each of four steps, so that weights, batches, clipping and AdamW are the same on all sides."""
    pytest.importorskip("transformers")
    seconds, results, matmuls = in_turn(case, sides, 3, "cpu", "ours")
    assert all(len(taken) == 3 for taken in seconds.values())
    ours = results["ours"]["losses"]
    assert len(ours) == 4 + 3
    assert ours[0] == pytest.approx(6.27, abs=0.05)                      # log(512), and some for the random head
    for side in sides[1:]:
        assert results[side]["losses"] == pytest.approx(ours[:4], rel=limit)
        assert results[side]["peak_bytes"] > 1e8
    assert all(0 < alone < step for alone, step in matmuls)


class FakeProcess:
    """A busy loop, or a side that answers these seconds, one a step, and then its result."""

    def __init__(self, side, seconds):
        result = {"losses": [1.0], "peak_bytes": 10 * len(side), "peer": "transformers 5", "matmul_flops_per_token": 1,
                  "peaks": [*range(1, 501)]}
        self.stdin, self.stdout, self.seconds = io.StringIO(), self, list(seconds)
        self.communicate = lambda: (json.dumps(result), None)

    def readline(self):
        return f"{self.seconds.pop(0)}\n" if self.seconds else ""

    def wait(self):
        pass

    kill = wait


def fake_sides(monkeypatch, **sides):
    monkeypatch.setattr(bench_steps.subprocess, "Popen", lambda command, **options: FakeProcess(
        command[4], sides[command[4]]) if "measure.bench_steps" in command else FakeProcess("", []))


def test_train_rows_carry_the_names_that_others_read(monkeypatch, capsys):
    fake_sides(monkeypatch, ours=[9, 1, 1, 0.5, 1, 0.5, 1, 0.5, 1], transformers=[9, 2, 2],
               transformers_allocator=[9, 4, 4], ours_spinning=[9, 8, 8])
    monkeypatch.setattr(bench_steps, "save_row", lambda: {"name": "save_stall"})
    rows = {r["name"]: r for r in bench_steps.bench_train(TrainOptions(steps=2))}
    assert list(rows) == ["vocab_8k", "vocab_8k_their_allocator_too", "vocab_32k", "vocab_32k_their_allocator_too",
                          "peak_memory_32k", "matmul_share", "packed_2k", "packed_2k_their_allocator_too",
                          "busy_machine_quiet", "busy_machine", "busy_machine_crowded", "memory_growth", "save_stall"]
    assert rows["vocab_8k"]["ours"] == 8 * 512
    assert (rows["vocab_8k"]["ratio"], rows["vocab_8k_their_allocator_too"]["ratio"]) == (2, 4)
    assert (rows["peak_memory_32k"]["ours"], rows["peak_memory_32k"]["peer"]) == (40, 120)
    assert rows["matmul_share"]["ours"] == 0.5
    assert (rows["busy_machine"]["ratio"], rows["busy_machine"]["busy_loops"]) == (8, os.cpu_count())
    assert (rows["memory_growth"]["ours"], rows["memory_growth"]["peer"]) == (500, 20)
    with pytest.raises(UserError, match="tall"):
        cli.parse(TrainOptions, ["--cases", "tall"])


def test_a_peer_that_does_not_fit_leaves_our_figures(monkeypatch, capsys):
    fake_sides(monkeypatch, ours=[9, 1, 1], transformers=[])
    rows = bench_steps.bench_train(TrainOptions(cases=["1b"], steps=2))
    assert (rows[0]["ours"], rows[0]["peer"], rows[0]["left_out"]) == (2 * 8192, None, ("transformers",))
    fake_sides(monkeypatch, ours=[])
    with pytest.raises(RuntimeError, match="the ours side of 8b failed"):
        bench_steps.bench_train(TrainOptions(cases=["8b"]))


def test_our_setting_of_openmp_counts_as_ours():
    spins = {side: environment_of(side, 1000)["GOMP_SPINCOUNT"] for side in ("ours", "lora", "transformers",
                                                                        "transformers_allocator", "ours_spinning")}
    assert list(spins.values()) == ["1000", "1000", "300000", "1000", "300000"]


LORA_ROWS = ["lora", "lora_their_allocator_too", "lora_peak_memory", "lora_peak_memory_their_allocator_too", "qlora",
             "qlora_memory", "qlora_matrix_memory", "qlora_peak_memory"]


@pytest.mark.slow
def test_lora_trains_what_peft_trains_and_its_rows_carry_the_names_that_others_read(monkeypatch, capfd):
    """At 512 ids, to be fast, and with PEFT's process in the place of both of its sides."""
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
    assert four["ours"] - 4 * tables == four["quantised_bytes"]
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
