"""Truth: the divergence of full logits, differentiated in float64. Law: at step 0 it is exactly 0."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES, large_weights
from retention import forward, learning, methods, some_batch, toy
from torch import nn

from learn.lwf import LwF, LwFConfig
from model import Model, ModelConfig


def lwf_loss(model, made, batch):
    hidden = forward(model, batch)
    logits = hidden @ model.head.weight.T
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum")
    return made.loss_computed(model, batch, loss, {"hidden": hidden}), loss


@pytest.mark.parametrize("precision", ["fp32", "bf16", "checkpointing"])
@pytest.mark.parametrize("tokens", ["all", "replay"])
def test_lwf_is_exactly_zero_at_step_0(tiny_model, tokens, precision):
    model, batch = tiny_model().train(), some_batch(rows=4, length=16, vocabulary=97)
    model.checkpoint_blocks = precision == "checkpointing"
    lwf, = methods(built=model, lwf=LwFConfig(0.25, tokens=tokens))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss, plain = lwf_loss(model, lwf, batch)
    assert lwf.divergence.item() == 0.0
    if tokens == "all" and precision == "fp32":
        assert torch.equal(loss, 0.75 * plain)
        loss.backward()
        ours = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        (0.75 * lwf_loss(model, methods(built=model, lwf=LwFConfig(1e-300, tokens="all"))[0], batch)[1]).backward()
        for name, p in model.named_parameters():             # the KL's gradient is zero too, up to rounding of q - p
            torch.testing.assert_close(ours[name], p.grad, rtol=1e-6, atol=1e-6 * p.grad.abs().max().item())
    assert lwf.before_step(0, model) == {"lwf_kl": 0.0}
    assert model.training


@pytest.mark.parametrize("tokens", ["all", "replay"])
def test_lwf_is_the_divergence_of_whole_logits(tokens):
    model, batch = toy(blocks=2), some_batch(3)
    lwf, = methods(built=model, lwf=LwFConfig(0.3, 2.0, tokens))
    base = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    truth = copy.deepcopy(model)
    loss, _ = lwf_loss(model, lwf, batch)
    loss.backward()

    logits, base_logits = (m(batch.tokens) @ m.head.weight.T for m in (truth, base))
    targets = batch.labels != -100
    ce = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100,
                         reduction="none").view(batch.labels.shape)
    log_q, log_p = (torch.log_softmax(x / 2.0, -1) for x in (logits, base_logits.detach()))
    kl = 4.0 * (log_p.exp() * (log_p - log_q)).sum(-1) * targets
    replayed = torch.from_numpy(batch.source == 1)[:, None] if tokens == "replay" else torch.ones(4, 1, dtype=bool)
    wanted = torch.where(replayed, 0.7 * ce + 0.3 * kl, ce).sum()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    for p, q in zip(model.parameters(), truth.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-13)
    chosen = targets & replayed
    lwf.divergence, lwf.targets = 2 * lwf.divergence, 2 * lwf.targets      # as of two micro-batches
    assert lwf.before_step(0, model)["lwf_kl"] == pytest.approx((kl[chosen].sum() / chosen.sum()).item(), rel=1e-12)
    assert lwf.divergence == lwf.targets == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_base_kept_in_half_precision_computes_what_the_whole_one_does_under_autocast(dtype, tied):
    model = large_weights(Model(ModelConfig(**SIZES, tie_word_embeddings=tied)))
    batch, sizes = some_batch(3, length=16, vocabulary=97), []

    def cast(model, batch):
        with torch.autocast("cpu", dtype):
            return model(batch.tokens)
    for precision in (None, dtype):
        lwf = LwF(LwFConfig(0.3, tokens="all"), learning(forward=cast, precision=precision))
        lwf.model_built(model)
        with lwf.learning.base(model) as teacher:
            assert torch.equal(cast(teacher, batch), cast(model, batch))
            sizes.append(sum(p.numel() * p.element_size() for p in teacher.parameters()))
            assert not {id(p) for p in teacher.parameters()} & {id(p) for p in model.parameters()}
        hidden = cast(model, batch)
        loss = torch.zeros(())
        assert lwf.loss_computed(model, batch, loss, {"hidden": hidden}).item() == 0, "alpha T^2 0"
    blocks = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    assert sizes[0] - sizes[1] == 2 * blocks


def test_the_teacher_drops_nothing():
    """A student that computes as the base does is at no distance from it, whatever the model drops in training."""
    model, batch = toy(blocks=2), some_batch(3)
    model.layers.append(nn.Dropout(0.5))
    lwf, = methods(built=model, lwf=LwFConfig(0.3, tokens="all"))
    hidden = forward(model.eval(), batch)
    model.train()
    assert lwf.loss_computed(model, batch, torch.zeros(()), {"hidden": hidden}).item() == 0
    with lwf.learning.base(model) as teacher:
        assert teacher.training


def test_lwf_leaves_a_batch_without_replay_alone():
    model, batch = toy(blocks=2), some_batch(3)
    lwf, = methods(built=model, lwf=LwFConfig(0.3, tokens="replay"))
    batch.source[:] = 0
    loss, plain = lwf_loss(model, lwf, batch)
    assert loss is plain
    assert lwf.before_step(0, model) == {"lwf_kl": 0.0}


def test_the_base_may_be_the_same_network_with_its_adapters_off():
    """An adapter on the head and a dropout: the base knows neither."""
    model, batch = toy(blocks=2), some_batch(3)
    model.layers.append(nn.Dropout(0.5))
    with_copy, = methods(built=model, lwf=LwFConfig(0.3, tokens="all"))
    plain, seen = model.head.weight, []
    model.head.weight = nn.Parameter(plain.detach() + torch.randn_like(plain))

    @contextlib.contextmanager
    def adapters_off(net):
        adapted, net.head.weight = net.head.weight, plain
        seen.append(net is model)
        yield net
        net.head.weight = adapted

    off, = methods(built=model, lwf=LwFConfig(0.3, tokens="all"), base=adapters_off)
    assert not off.notes
    losses = []
    for made in (with_copy, off):
        torch.manual_seed(0)
        losses.append(lwf_loss(model, made, batch)[0].item())
        assert model.training
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert seen == [True]
    assert off.divergence == pytest.approx(with_copy.divergence) != 0
