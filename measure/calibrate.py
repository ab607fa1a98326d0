"""Seconds of a training step on this machine, from a few real ones: train.train_step on the base's weights and text.

A step of n micro-batches takes fixed + n each: what is done once (clipping, the optimizer), and a forward and backward
pass. Both are known from steps of one and of two micro-batches, which take turns. Values matter: stories260K takes a
third more time than random weights do, perhaps because a CPU is slow with its many denormal numbers.
Documents are as long as those of the corpus, because on a CPU each attends alone.

B sequences, T tokens.
"""

import statistics
import time
from types import SimpleNamespace

import numpy as np
import torch

import data
import hf
import lora
import train
from core import devices, parallel
from core.architecture import ModelConfig
from learn.objectives import Causal
from learn.optim import LossScale, make_optimizer
from measure.memory import find_types
from model import Model, matmul_flops_per_token
from stages.build import Run

# Steps of each kind that count, after one that does not; of steps slower than SLOW seconds, one counts. Operations of a
# micro-batch: a larger one is timed on fewer tokens.
ROUNDS, SLOW, OPERATIONS = 3, 1.0, 2e11


def draw_batch(config: ModelConfig, B: int, T: int, document: int, rng: np.random.Generator, text=None) -> data.Batch:
    """B sequences of tokens [B, T + 1], parts of `text` [n] or random ones, in documents of about `document` tokens."""
    if text is None or len(text) <= T + 1:
        tokens = rng.integers(0, config.vocab_size, (B, T + 1))
    else:
        tokens = np.stack([text[start:start + T + 1] for start in rng.integers(0, len(text) - T - 1, B)])
    lengths = rng.geometric(1 / max(1, min(document, T)), (B, T + 1))
    starts = np.array([np.repeat(np.cumsum(own) - own, own)[:T + 1] for own in lengths], np.int32)
    tokens, doc_start = torch.from_numpy(tokens.astype(np.int32)), torch.from_numpy(starts)
    positions = torch.arange(T + 1, dtype=torch.int32) - doc_start
    return data.Batch(tokens, tokens, positions, doc_start, np.zeros(B, np.int64), None)


def make_run(c, config: ModelConfig, device: torch.device, base: hf.Base | None = None) -> Run:
    """A run that has a model, the base's or a random one, adapters and an optimizer, and no files."""
    dtype = torch.bfloat16 if find_types(c, device.type).weight == 2 else torch.float32
    if base:
        model = hf.load(base, dtype, device)
    else:
        torch.manual_seed(0)
        with torch.device(device), torch.no_grad():
            model = Model(config).to(dtype)
            for p in model.parameters():
                p.fill_(1.0) if p.ndim == 1 else p.normal_(0, 0.02)
    if c.lora.rank:
        lora.attach(model, c.lora, seed=0)
    model.checkpoint_blocks = c.model.checkpoint_blocks
    plan = np.zeros((1000, 1), np.int64)
    rates = lora.lr_scales(model, c.lora) if c.lora.rank else None
    return Run(c, parallel.World(0, 1, device), folder=None, base=None, tokenizer=None, config=config, sources={},
               loader=SimpleNamespace(names=["random"], plan=plan), planned=plan,
               objective=Causal(c.data.mask_documents), inner=model, model=model.train(),
               optimizer=make_optimizer(model, c.optim, rates),
               scale=LossScale(c.train.precision == "fp16"))


def time_step(c, config: ModelConfig, base: hf.Base | None = None, document: int = 300, text=None,
              device: str = "cpu") -> dict[str, float]:
    """{"fixed", "each": seconds of a step, and of each of its micro-batches, "forward": of a forward pass alone} of a
    training with the settings `c` (train.Config) of a `base` (None: random weights of the sizes `config`) on the tokens
    `text` [n] (None: random ones), whose documents have about `document` tokens."""
    where = devices.pick_device(device)
    parallel.start(device)
    run, rng = make_run(c, config, where, base), np.random.default_rng(0)
    B, T = c.train.micro_batch_size, c.data.context
    whole = B * T * matmul_flops_per_token(config, T)
    while B * T > 64 and B * T * matmul_flops_per_token(config, T) > OPERATIONS:
        B, T = (B // 2, T) if B > 1 else (B, T // 2)
    scale = whole / (B * T * matmul_flops_per_token(config, T))
    batches = [run.objective.corrupt(draw_batch(config, B, T, document, rng, text), None) for _ in range(2)]

    def step(n):
        train.train_step(run, run.done, batches[:n])

    @torch.no_grad()
    def forward():
        with run.autocast():
            run.objective.loss(run.model, batches[0].to(where))[0].item()
    seconds = {name: [] for name in (1, 2, "forward")}
    for round in range(ROUNDS + 1):
        if round > 1 and seconds[1][0] > SLOW:
            break
        for name, own in seconds.items():
            start = time.perf_counter()
            forward() if name == "forward" else step(name)
            if round:
                own.append(time.perf_counter() - start)
    one, two, forward_only = (statistics.median(own) for own in seconds.values())
    each = min(max(two - one, 0.5 * one), one)
    return {"fixed": one - each, "each": scale * each, "forward": scale * min(forward_only, each)}
