"""What a save costs the training. Truth: a save that is made slow on purpose, in front and behind."""

import time

import pytest

from core import checkpoint
from measure import bench_saves
from stages import resume

TINY = ["--model.hidden-size", "32", "--model.intermediate-size", "64", "--model.num-hidden-layers", "1",
        "--model.num-attention-heads", "2", "--model.num-key-value-heads", "2"]


@pytest.mark.parametrize(("where", "held"), [("behind", 0.0), ("in front", 0.2)])
def test_what_holds_up_the_training_is_told_from_what_is_done_behind_it(monkeypatch, quick, where, held):
    owner, name = {"behind": (checkpoint, "write"), "in front": (resume, "describe_state")}[where]
    real = getattr(owner, name)

    def slow(*arguments):
        time.sleep(0.2)
        return real(*arguments)
    monkeypatch.setattr(owner, name, slow)
    row = bench_saves.save_row(saves=2, words=TINY)
    assert held <= row["ours"] < held + 0.15
    assert row["peer"] >= 0.2
    assert row["ratio"] == row["ours"] / row["peer"]
    # Weights and two moments in fp32: embedding, four matrices of attention, three of the MLP, norms; a step each.
    weights = 300 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32
    assert 12 * weights <= row["state_bytes"] <= 12 * weights + 4 * 20
