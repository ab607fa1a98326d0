"""A whole run of train.py beside a loop that shares nothing with it but the sequences that the loader reads.

Truth: transformers' LlamaForCausalLM with a mask written out, torch's AdamW, clipping and a schedule written by hand.
"""

import math

import pytest
import torch
from runs import lines, one, run_of

import hf
import train
from core import checkpoint
from stages.build import build

pytestmark = pytest.mark.usefixtures("quick")
STEPS, WARMUP, LR, MIN_LR, CLIP, DECAY, EMBEDDINGS = 30, 6, 1e-2, 1e-3, 1.0, 0.3, 0.25
WORDS = ["--train.steps", STEPS, "--optim.warmup-steps", WARMUP, "--optim.lr", LR, "--optim.min-lr", MIN_LR,
         "--optim.clip", CLIP, "--optim.weight-decay", DECAY, "--optim.embedding-lr-scale", EMBEDDINGS,
         "--train.batch-size", 5, "--train.micro-batch-size", 2]


def sum_of_losses(model, batch) -> tuple[torch.Tensor, int]:
    """Nats and number of the targets: each token that has one of its own document before it."""
    tokens, start = batch.tokens.long(), batch.doc_start
    T = tokens.shape[1]
    place = torch.arange(T)
    sees = (start[:, :, None] == start[:, None, :]) & (place[:, None] >= place)          # [B, T, T]
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]
    log_p = model(tokens, attention_mask=mask, position_ids=place - start).logits[:, :-1].log_softmax(-1)
    nats = -log_p.gather(2, tokens[:, 1:, None])[..., 0]
    is_target = (start[:, 1:] == start[:, :-1]) & (batch.labels[:, 1:] != -100)
    return nats[is_target].sum(), int(is_target.sum())


def rate_of(step: int) -> float:
    if step < WARMUP:
        return LR * (step + 1) / WARMUP
    return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * (step + 1 - WARMUP) / (STEPS - WARMUP))) / 2


def test_a_run_is_the_loop_written_out(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    c = run_of(base, tmp_path / "run", *WORDS)
    loader = build(c, one()).loader
    train.train(c, one())
    model = transformers.AutoModelForCausalLM.from_pretrained(base[1], attn_implementation="eager")
    tables, blocks, vectors = [], [], []
    for name, p in model.named_parameters():
        (vectors if p.ndim == 1 else tables if "embed" in name or "lm_head" in name else blocks).append(p)
    optimizer = torch.optim.AdamW([{"params": tables, "weight_decay": DECAY}, {"params": blocks, "weight_decay": DECAY},
                                   {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8)
    clipped = 0
    for step, logged in enumerate(lines(tmp_path / "run", "train")):
        nats, targets = sum_of_losses(model, loader.batch(step))
        (nats / targets).backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, CLIP / norm)
        clipped += norm > CLIP
        for group, scale in zip(optimizer.param_groups, (EMBEDDINGS, 1.0, 1.0)):
            group["lr"] = rate_of(step) * scale
        optimizer.step()
        optimizer.zero_grad()
        assert logged["step"] == step + 1
        assert logged["lr"] == pytest.approx(rate_of(step), rel=1e-12)
        assert logged["loss"] == pytest.approx((nats / targets).item(), rel=1e-4), step
        assert logged["grad_norm"] == pytest.approx(norm, rel=1e-3), step
    assert step == STEPS - 1
    assert 0 < clipped < STEPS
    weights = checkpoint.load(checkpoint.path_of(tmp_path / "run/checkpoints", STEPS))[0]
    for name, p in model.named_parameters():
        torch.testing.assert_close(weights[hf.from_hf_name(name)], p.detach(), rtol=1e-2, atol=1e-3, msg=name)
