"""A whole run of train.py beside a loop that shares nothing with it but the sequences that the loader reads.

Truth: transformers' LlamaForCausalLM with a mask written out, adapters of PEFT, torch's AdamW, clipping and a schedule
written by hand.
"""

import math

import pytest
import torch
from runs import lines, one, run_of
from safetensors.torch import load_file

import train
from core import checkpoint
from core.parameter_names import from_hf_name
from learn.peft_files import save_adapter
from stages.build import build

pytestmark = pytest.mark.usefixtures("quick")
STEPS, WARMUP, LR, MIN_LR, CLIP, DECAY, EMBEDDINGS, RATIO = 30, 6, 1e-2, 1e-3, 1.0, 0.3, 0.25, 2.0
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


def follow(model, groups: list[dict], scales: tuple, loader, logged: list[dict]):
    """Train `model` on the loader's sequences, and compare every step with what the run logged. groups: AdamW's; of
    each the learning rate is a multiple in `scales` of the schedule's."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    trained, clipped = [p for group in groups for p in group["params"]], 0
    for step, line in enumerate(logged):
        nats, targets = sum_of_losses(model, loader.batch(step))
        (nats / targets).backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in trained))
        for p in trained:
            p.grad *= min(1.0, CLIP / norm)
        clipped += norm > CLIP
        for group, scale in zip(optimizer.param_groups, scales):
            group["lr"] = rate_of(step) * scale
        optimizer.step()
        optimizer.zero_grad()
        assert line["step"] == step + 1
        assert line["lr"] == pytest.approx(rate_of(step), rel=1e-12)
        assert line["loss"] == pytest.approx((nats / targets).item(), rel=1e-4), step
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3), step
    assert step == STEPS - 1
    assert 0 < clipped < STEPS


def test_a_run_is_the_loop_written_out(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    c = run_of(base, tmp_path / "run", *WORDS)
    loader = build(c, one()).loader
    train.train(c, one())
    model = transformers.AutoModelForCausalLM.from_pretrained(base[1], attn_implementation="eager")
    tables, blocks, vectors = [], [], []
    for name, p in model.named_parameters():
        (vectors if p.ndim == 1 else tables if "embed" in name or "lm_head" in name else blocks).append(p)
    groups = [{"params": tables, "weight_decay": DECAY}, {"params": blocks, "weight_decay": DECAY},
              {"params": vectors, "weight_decay": 0.0}]
    follow(model, groups, (EMBEDDINGS, 1.0, 1.0), loader, lines(tmp_path / "run", "train"))
    weights = checkpoint.load(checkpoint.path_of(tmp_path / "run/checkpoints", STEPS))[0]
    for name, p in model.named_parameters():
        torch.testing.assert_close(weights[from_hf_name(name)], p.detach(), rtol=1e-2, atol=1e-3, msg=name)


def test_a_run_with_adapters_is_the_loop_written_out_with_peft(base, peft, tmp_path):
    """From the same start, adapters of PEFT in transformers' model have the run's losses, gradients and last values."""
    transformers = pytest.importorskip("transformers")
    c = run_of(base, tmp_path / "run", *WORDS, "--optim.embedding-lr-scale", 1, "--lora.rank", 4, "--lora.alpha", 12,
               "--lora.b-lr-ratio", RATIO)
    run = build(c, one())
    save_adapter(run.inner, tmp_path / "start", base[1])
    train.train(c, one())
    model = transformers.AutoModelForCausalLM.from_pretrained(base[1], attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "start", is_trainable=True)
    a, b = ([p for name, p in theirs.named_parameters() if p.requires_grad and f"lora_{kind}" in name] for kind in "AB")
    groups = [{"params": params, "weight_decay": DECAY} for params in (a, b)]
    follow(theirs, groups, (1.0, RATIO), run.loader, lines(tmp_path / "run", "train"))
    weights = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert len(weights) == len(a) + len(b)
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            ours = weights[name.replace(".default", "")]
            torch.testing.assert_close(ours, p.detach(), rtol=1e-2, atol=1e-3, msg=name)
