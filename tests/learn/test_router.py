"""learn/router.py: what it adds to the loss, by hand, and what it refuses. moe.py's losses have tests of their own."""

import types

import pytest
import torch
from runs import settings

import moe
import train
from core.errors import UserError
from core.parallel import World
from learn.router import Router, RouterConfig
from model import Model, ModelConfig


def make(**changes):
    model = Model(ModelConfig(50, 16, 32, 2, 2, 2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8))
    model.initialise(0)
    method = Router(RouterConfig(**changes), types.SimpleNamespace(world=World(0, 1, torch.device("cpu"))))
    method.model_built(model)
    return model, method


def test_it_adds_the_weighted_losses_times_the_targets():
    model, method = make(balance=0.5, z=0.25)
    tokens = torch.arange(14).view(2, 7)
    labels = tokens.clone()
    labels[1, 3:] = -100
    model(tokens)
    loss = method.loss_computed(model, types.SimpleNamespace(labels=labels), torch.tensor(3.0), {})
    logits = [layer.mlp.logits for layer in model.layers]
    counted = (labels != -100).flatten()
    balance, z = moe.balance_loss(logits, 2, counted), moe.z_loss(logits, counted)
    assert loss.item() == pytest.approx(3 + 10 * (0.5 * balance.item() + 0.25 * z.item()), rel=1e-6)
    loss.backward()
    assert all(layer.mlp.gate.weight.grad.abs().max() > 0 for layer in model.layers)
    logged = method.before_step(0, model)
    assert logged == {"router_balance": pytest.approx(balance.item()), "router_z": pytest.approx(z.item())}


def test_parts_of_a_model_add_up():
    model, method = make(balance=0.5)
    model(torch.arange(14).view(2, 7))
    counted = torch.arange(14).view(2, 7) % 3 > 0
    one_by_one = sum(method.sum_layers(layer, counted) for layer in [*model.layers, model.norm])
    torch.testing.assert_close(one_by_one, method.sum_layers(model, counted))
    logits = [layer.mlp.logits for layer in model.layers]
    found = moe.router_losses(one_by_one)
    torch.testing.assert_close(found[0], moe.balance_loss(logits, 2, counted.flatten()))
    torch.testing.assert_close(found[1], moe.z_loss(logits, counted.flatten()))


def test_what_it_refuses(lab, tmp_path):
    world = World(0, 1, torch.device("cpu"))
    with pytest.raises(UserError, match="this one has none"):
        train.train(settings(lab, tmp_path / "run", "--router.balance", 0.1), world)
    with pytest.raises(UserError, match=r"router\.z"):
        settings(lab, tmp_path / "run", "--router.z", 0.1)
    model, _ = make(balance=1)
    for layer in model.layers:
        layer.mlp.gate.weight.requires_grad_(False)
    with pytest.raises(UserError, match="frozen"):
        Router(RouterConfig(balance=1), None).model_built(model)
