"""The memory planner. Truth: the tensors that autograd keeps, counted by its own hooks; the peaks of real processes."""

import pytest
import torch
from conftest import SIZES
from torch.autograd.graph import saved_tensors_hooks

import lora
import train
from core import cli
from measure import memory
from model import Model, ModelConfig


def settings(*words):
    return cli.parse(train.Config, ["--data.sources.a.path", "x", *map(str, words)], recipe=True)


CASES = {
    "fp32": ["--train.precision", "fp32"],
    "autocast": ["--train.precision", "bf16"],
    "8-bit": ["--train.precision", "bf16", "--optim.name", "adamw_8bit"],
    "lora": ["--train.precision", "bf16", "--lora.rank", 4],
    "lora in fp32": ["--train.precision", "fp32", "--lora.rank", 4],
    "qlora": ["--train.precision", "bf16", "--lora.rank", 4, "--lora.base", "nf4"],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_the_tensors_that_autograd_keeps(case, checkpointing):
    c = settings(*CASES[case], "--data.context", 64, "--train.micro-batch-size", 4, "--model.activation-checkpointing",
                 str(checkpointing))
    config = ModelConfig(**SIZES)
    types = memory.find_types(c, "cpu")
    model = Model(config).to(torch.bfloat16 if types.weight == 2 else torch.float32)
    model.initialise(0)
    if c.lora.rank:
        lora.attach(model, c.lora, 0)
    model.checkpoint_blocks = checkpointing
    held = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return x
    tokens, starts = torch.zeros(4, 64, dtype=torch.int64), torch.zeros(4, 64, dtype=torch.int32)
    with saved_tensors_hooks(pack, lambda x: x), \
            torch.autocast("cpu", torch.bfloat16, enabled=c.train.precision == "bf16"):
        model(tokens, torch.arange(64).expand(4, -1), starts)
    expected = memory.estimate(c, config, kind="cpu")["activations"]
    # The estimate counts the hidden states, which the head keeps; under checkpointing autograd's hooks do not see the
    # copies that autocast's cache holds.
    hidden = 4 * 64 * config.hidden_size * types.stream
    if checkpointing and types.casts and not c.lora.rank:
        expected -= 2 * memory.count_elements(config, c.lora).linear
    # Also kept, and not counted: a token's id, its document's start and a norm's root, 16 bytes per token.
    assert sum(kept.values()) == pytest.approx(expected - hidden, rel=0.01, abs=16 * 256)
