"""A step's seconds. Truth: a clock around training steps that take as long as we make them."""

import time

import pytest
from conftest import SIZES

import train
from core import cli
from measure import calibrate
from model import ModelConfig


def test_fixed_and_each_are_told_apart(monkeypatch):
    """A step that sleeps 10 ms, and 20 more for each micro-batch."""
    c = cli.parse(train.Config, ["--data.sources.a.path", "x", "--data.context", "16", "--train.precision", "fp32"],
                  recipe=True)
    monkeypatch.setattr(train, "train_step", lambda run, step, batches: time.sleep(0.05 + 0.1 * len(batches)))
    found = calibrate.time_step(c, ModelConfig(**SIZES))
    assert found["fixed"] == pytest.approx(0.05, abs=0.02)
    assert found["each"] == pytest.approx(0.1, abs=0.02)
    assert 0 < found["forward"] <= found["each"]


@pytest.mark.parametrize("words", [[], ["--lora.rank", "4"], ["--lora.rank", "4", "--lora.base", "nf4"],
                                   ["--model.activation-checkpointing", "true", "--optim.name", "adamw_8bit"]])
def test_every_method_makes_real_steps(words):
    c = cli.parse(train.Config, ["--data.sources.a.path", "x", "--data.context", "16", *words], recipe=True)
    found = calibrate.time_step(c, ModelConfig(**SIZES))
    assert found["each"] > 0
