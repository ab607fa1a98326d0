"""A step's seconds. Truth: a clock around training steps that take as long as we make them."""

import time

import pytest
from conftest import SIZES

import train
from core import cli
from measure import calibrate
from model import ModelConfig, matmul_flops_per_token


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


def test_a_large_micro_batch_is_timed_on_fewer_tokens(monkeypatch):
    """A step takes 1 ms for each token, and 1,024 of them are not waited for."""
    config, tokens = ModelConfig(**SIZES), []

    def step(run, step, batches):
        tokens.append(sum(batch.tokens.numel() for batch in batches))
        time.sleep(0.001 * tokens[-1])
    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(calibrate, "OPERATIONS", 130 * matmul_flops_per_token(config, 64))
    words = ["--data.sources.a.path", "x", "--data.context", "64", "--train.micro-batch-size", "16"]
    c = cli.parse(train.Config, words, recipe=True)
    assert calibrate.time_step(c, config)["each"] == pytest.approx(1.024, rel=0.2)
    assert max(tokens) == 256
