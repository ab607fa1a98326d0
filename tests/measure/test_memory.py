"""The memory planner. Truth: the tensors that autograd keeps, counted by its own hooks; the peaks of real processes."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SIZES
from torch.autograd.graph import saved_tensors_hooks

import lora
import train
from core import cli
from learn.adapters import linear_layers
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


# The second of its blocks is dense.
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "dense_layers": [1]}
KINDS = {"dense": {}, "experts and dense": EXPERTS,
         "experts": {**EXPERTS, "dense_layers": [], "norm_topk_prob": True}}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("kind", "every"), [*itertools.product(KINDS, (0, 1)), ("dense", 2), ("experts", 2)])
def test_activations_are_the_tensors_that_autograd_keeps(case, kind, every):
    sizes, checkpointing = KINDS[kind], ["--model.activation-checkpointing", "--model.recompute-every", every]
    c = settings(*CASES[case], "--data.context", 64, "--train.micro-batch-size", 4, *(checkpointing if every else []))
    config = ModelConfig(**SIZES, **sizes)
    types = memory.find_types(c, "cpu")
    model = Model(config).to(torch.bfloat16 if types.weight == 2 else torch.float32)
    model.initialise(0)
    if c.lora.rank:
        lora.attach(model, c.lora, 0)
    model.checkpoint_blocks = every
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
    if types.casts and not c.lora.rank:
        again = tuple(f"layers.{place}." for place in range(0, 3 if every else 0, every or 1))
        expected -= 2 * sum(layer.weight.numel() for path, layer in linear_layers(model).items()
                            if path.startswith(again) and layer.weight.ndim == 2)
    # Also kept, and not counted: a token's id, its document's start and a norm's root, 16 bytes per token.
    assert sum(kept.values()) == pytest.approx(expected - hidden, rel=0.01, abs=16 * 256)


# ---- the peaks of processes

ROOT = Path(__file__).parent.parent.parent
PEAK = """
import core.threads
import json, sys
import numpy as np
import torch
import train
from core import cli, devices, parallel
from measure import calibrate
from model import ModelConfig

def make_steps(sizes, words):
    V, D, F, L, H, K, T, B, experts = sizes
    c = cli.parse(train.Config, ["--data.sources.a.path", "x", "--data.context", str(T), "--train.micro-batch-size",
                                 str(B), "--train.batch-size", str(B), *words], recipe=True)
    config = ModelConfig(V, D, F, L, H, K, max_position_embeddings=T, **experts)
    run, rng = calibrate.make_run(c, config, torch.device("cpu")), np.random.default_rng(0)
    batch = run.objective.corrupt(calibrate.draw_batch(config, B, T, 100, rng), None)
    for _ in range(3):
        train.train_step(run, run.done, [batch])

parallel.start("cpu")
# What a process takes beside its tensors is loaded by a tiny run, and measured apart.
make_steps((512, 64, 96, 1, 2, 2, 64, 2, {}), json.loads(sys.argv[2]))
before = devices.peak_bytes(torch.device("cpu"))
make_steps(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
print(json.dumps([before, devices.peak_bytes(torch.device("cpu"))]))
"""
# Vocabulary, width, MLP width, blocks, heads, key-value heads, tokens, sequences: activations count for most, then
# activations and weights, then weights. With experts: a small one and one of many small experts.
MODELS = {"4M": (2048, 192, 512, 6, 6, 2, 256, 16, {}), "26M": (8192, 512, 1408, 6, 8, 4, 256, 4, {}),
          "44M": (4096, 768, 2048, 6, 12, 4, 128, 2, {}),
          "8 experts": (4096, 256, 512, 4, 4, 2, 256, 8, {"num_experts": 8, "num_experts_per_tok": 2,
                                                          "moe_intermediate_size": 512, "norm_topk_prob": True}),
          "32 experts": (2048, 256, 512, 4, 4, 2, 256, 4, {"num_experts": 32, "num_experts_per_tok": 4,
                                                           "moe_intermediate_size": 192})}


@pytest.mark.slow
@pytest.mark.parametrize("size", MODELS)
@pytest.mark.parametrize("method", [[], ["--lora.rank", "16"]], ids=["full", "lora"])
def test_the_peak_of_a_process_is_as_planned(size, method):
    words = ["--train.precision", "fp32", "--device", "cpu", *method]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PEAK, json.dumps(MODELS[size]), json.dumps(words)], cwd=ROOT, env=env,
                          capture_output=True, text=True, check=True)
    before, peak = json.loads(done.stdout)
    V, D, F, L, H, K, T, B, experts = MODELS[size]
    c = settings(*words, "--data.context", T, "--train.micro-batch-size", B, "--train.batch-size", B)
    config = ModelConfig(V, D, F, L, H, K, max_position_embeddings=T, **experts)
    planned = memory.estimate(c, config, kind="cpu")["peak"]
    print(f"{size} {method[:1]}: planned {planned / 1e6:.0f} MB, measured {(peak - before) / 1e6:.0f}, "
          f"process {before / 1e6:.0f}")
    # How many tokens an expert has changes with each step, and so do the sizes of what is freed and taken again.
    assert planned == pytest.approx(peak - before, rel=0.2 if experts else 0.1)
    assert before == pytest.approx(memory.OVERHEAD["cpu"], rel=0.15)


def test_layouts_change_what_a_rank_holds():
    config = ModelConfig(**SIZES)
    def parts(*words):
        return memory.estimate(settings("--parallel.strategy", "fsdp", "--train.batch-size", 16, *words), config, 8)
    plain, groups = parts(), parts("--parallel.replicas", 2)
    assert groups["weights"] == 2 * plain["weights"]
    assert groups["optimizer"] == 2 * plain["optimizer"]
    # Half of the tokens; what attention gives, in bf16, is kept by heads too, as it was before the exchange.
    c, context = settings(), ["--parallel.context", 2, "--parallel.exchange"]
    tokens, width = c.train.micro_batch_size * c.data.context / 2, config.num_attention_heads * config.head_dim
    half = plain["activations"] / 2 + 2 * tokens * width * config.num_hidden_layers
    assert parts(*context, "heads")["activations"] == half
    # Of the other half the keys and values.
    width = 2 * config.num_key_value_heads * config.head_dim
    assert parts(*context, "keys")["activations"] == half + 2 * tokens * width * config.num_hidden_layers
    # Of experts that ranks share, a rank gathers its own: of a block and the next one, in bf16, and of gradients one
    # block's, in bf16 and fp32.
    config, found = ModelConfig(**SIZES, **{**EXPERTS, "num_experts": 4, "dense_layers": []}), []
    for words in ([], ["--parallel.experts", 4]):
        found.append(parts(*words))
        assert found[-1]["weights"] * 8 == 4 * memory.count_elements(config, lora.LoraConfig()).base
    experts = memory.count_elements(config, lora.LoraConfig()).experts
    assert experts == 4 * 3 * 32 * 40
    gathered, exchange = (found[0][name] - found[1][name] for name in ("gathered", "exchange"))
    assert (gathered, exchange) == (experts * 3 / 4 * 2 * 2, experts * 3 / 4 * (2 + 4))
    config = ModelConfig(**SIZES)
    kept = parts("--parallel.reshard", "False")["gathered"] - plain["gathered"]
    # bf16 of the blocks but for the two that are gathered at any time.
    block = memory.count_elements(config, lora.LoraConfig()).block
    assert kept == 2 * (config.num_hidden_layers - 2) * block
