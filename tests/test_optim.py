"""Truth: learning rates worked out by hand, AdamW written out in float64 (arXiv 1711.05101, algorithm 2)."""

import copy
import dataclasses
import math

import pytest
import torch

from optim import LossScale, OptimConfig, learning_rate, make_optimizer


def test_the_schedule_step_by_step():
    config = OptimConfig(lr=1.0, min_lr=0.2, warmup_ratio=0.2)
    # 10 steps: 2 of warm-up, then 8 down the cosine 0.2 + 0.4 (1 + cos(pi k / 8)), k = 1 to 8
    root = math.sqrt(0.5)
    by_hand = {0: 0.5, 1: 1.0, 3: 0.6 + 0.4 * root, 5: 0.6, 7: 0.6 - 0.4 * root, 9: 0.2, 10: 0.2, 500: 0.2}
    for step, rate in by_hand.items():
        assert learning_rate(step, 10, config) == pytest.approx(rate, rel=1e-12), step


@pytest.mark.parametrize("total", [1, 2, 3, 10, 99, 100, 1000])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.01, 0.5, 1.0])
def test_the_schedule_rises_falls_and_stays(total, warmup_ratio):
    config = OptimConfig(lr=3e-4, min_lr=3e-5, warmup_ratio=warmup_ratio)
    rates = [learning_rate(step, total, config) for step in range(2 * total + 5)]
    assert min(rates[:total]) > 0
    assert max(rates) == pytest.approx(3e-4)
    top = rates.index(max(rates))
    assert rates[:top + 1] == sorted(rates[:top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert set(rates[total:]) == {3e-5}                              # held after the end
    if total > 2 and warmup_ratio < 1:
        assert rates[total - 1] == pytest.approx(3e-5)               # and reached at it
    assert rates[0] == pytest.approx(3e-4 / max(1, round(warmup_ratio * total)))


def test_a_floor_of_zero_and_a_flat_rate():
    assert learning_rate(99, 100, OptimConfig(lr=1e-3, min_lr=0.0)) == pytest.approx(0, abs=1e-18)
    flat = OptimConfig(lr=1e-3, min_lr=1e-3, warmup_ratio=0.0)
    assert {learning_rate(step, 50, flat) for step in range(60)} == {1e-3}


@pytest.mark.parametrize("wrong", [{"min_lr": 2e-5}, {"min_lr": -1e-9}, {"lr": -1.0, "min_lr": -2.0},
                                   {"lr": float("nan")}, {"warmup_ratio": 1.1}, {"warmup_ratio": -0.1}])
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match=r"optim\."):
        OptimConfig(**wrong)


def test_norms_and_biases_have_no_decay(tiny_model):
    model = tiny_model()
    model.extra = torch.nn.Linear(3, 3, bias=True)
    frozen = model.extra.weight.requires_grad_(False)
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.3, beta1=0.8, beta2=0.7, eps=1e-5, lr=2e-3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter is frozen:
            assert id(parameter) not in decay
        else:
            plain = "norm" in name or name.endswith("bias")
            assert decay.pop(id(parameter)) == (0.0 if plain else 0.3), name
    assert not decay
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.8, 0.7), 1e-5)


def test_a_model_of_vectors_alone_has_one_group():
    norm = torch.nn.LayerNorm(4)
    assert [g["weight_decay"] for g in make_optimizer(norm, OptimConfig()).param_groups] == [0.0]


def test_adamw_written_out():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 4)
    config = OptimConfig(lr=0.01, min_lr=0.001, warmup_ratio=0.4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    optimizer = make_optimizer(model, config)
    truth = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    mean, square = ({n: torch.zeros_like(p) for n, p in truth.items()} for _ in range(2))
    for step in range(5):
        rate = learning_rate(step, 5, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            g = p.grad.double()
            truth[name] *= 1 - rate * (0.1 if name == "weight" else 0.0)
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.95 * square[name] + 0.05 * g * g
            unbiased = mean[name] / (1 - 0.9 ** (step + 1)), square[name] / (1 - 0.95 ** (step + 1))
            truth[name] -= rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach().double(), truth[name], rtol=1e-5, atol=1e-6)


def test_8_bit_adamw_stays_near_the_exact_one():
    """Truth: torch's AdamW in float64 on a least-squares problem; matrices in 8 bits, the bias and odd widths not."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Tanh(), torch.nn.Linear(48, 7))
    exact = copy.deepcopy(model).double()
    config = OptimConfig(name="adamw_8bit", lr=3e-3, min_lr=0.0, weight_decay=0.01)
    optimizers = make_optimizer(model, config), make_optimizer(exact, dataclasses.replace(config, name="adamw"))
    x, y = torch.randn(256, 64), torch.randn(256, 7)
    for _ in range(60):
        for net, optimizer in zip((model, exact), optimizers):
            dtype = next(net.parameters()).dtype
            loss = (net(x.to(dtype)) - y.to(dtype)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert (net(x.double()) - y).square().mean() < 0.7 * y.square().mean()
    # the loss falls by some 2 % a step here: as far along, within two or three steps
    assert (model(x) - y).square().mean().item() == pytest.approx(loss.item(), rel=0.06)
    kinds = {p.shape: optimizers[0].kind(p) for p in model.parameters()}
    assert kinds == {(48, 64): "int8", (48,): "fp32", (7, 48): "fp32", (7,): "fp32"}
    state = optimizers[0].state[model[0].weight]
    assert (state["step"].item(), state["m"].dtype, state["v"].dtype) == (60, torch.int8, torch.uint8)


def eight_bit(*shapes, dtype=torch.bfloat16, **settings):
    """Random parameters and their optimizer."""
    torch.manual_seed(0)
    net = torch.nn.ParameterList(torch.randn(shape).to(dtype) for shape in shapes)
    return list(net), make_optimizer(net, OptimConfig(name="adamw_8bit", lr=1e-2, **settings))


def test_8_bit_adamw_scales_gradients_on_the_way():
    """AdamW's first step is blind to the gradient's size; its moments are not."""
    results = []
    for factor, scale in ((1.0, 0.25), (0.25, 1.0)):
        (p,), optimizer = eight_bit((8, 32))
        p.grad = torch.ones_like(p) * factor
        optimizer.step(grad_scale=scale)
        results.append([p.detach().clone(), *(optimizer.state[p][name] for name in ("ecc", "m_scale", "v_scale"))])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert results[0][2].unique().tolist() == pytest.approx([0.25 * 0.1], rel=2**-7)     # (1 - beta1) g
    assert results[0][1].any()


def test_8_bit_adamw_decays_matrices_only():
    (matrix, vector), optimizer = eight_bit((8, 32), (32,), dtype=torch.float32, weight_decay=0.5)
    before = [p.detach().clone() for p in (matrix, vector)]
    for p in (matrix, vector):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), before[0] * (1 - 1e-2 * 0.5))
    assert torch.equal(vector, before[1])


def test_8_bit_adamw_counts_the_steps_of_each_parameter():
    """One that gets gradients late begins at its first step, and the others go on."""
    (late, early), optimizer = eight_bit((4, 32), (4, 32), dtype=torch.float32, weight_decay=0.0)
    for _ in range(5):
        early.grad = torch.ones_like(early)
        optimizer.step()
    late.grad, before = torch.ones_like(late), [p.detach().clone() for p in (late, early)]
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (late, early)] == [1, 6]
    for p, old in zip((late, early), before):                     # a constant gradient moves each by the rate
        torch.testing.assert_close(old - p.detach(), torch.full_like(old, 1e-2), rtol=0.02, atol=0)


def test_8_bit_adamw_goes_on_from_its_own_state_dict():
    (p,), optimizer = eight_bit((8, 32))
    (q,), other = eight_bit((8, 32))
    for t in range(4):
        p.grad = torch.randn(8, 32, generator=torch.Generator().manual_seed(t)).bfloat16()
        if t == 2:
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            q.data.copy_(p)
        optimizer.step()
        if t >= 2:
            q.grad = p.grad.clone()
            other.step()
    assert torch.equal(p, q)
    assert all(torch.equal(optimizer.state[p][name], other.state[q][name]) for name in optimizer.state[p])


def test_loss_scale():
    scale = LossScale(enabled=True)
    assert scale.scale == 65536
    for wrong in (float("inf"), float("nan")):
        assert scale.update(wrong) is False
    assert scale.scale == 16384
    assert all(scale.update(1.0) for _ in range(1999))
    assert scale.scale == 16384
    other = LossScale(enabled=True)
    other.load_state_dict(scale.state_dict())
    for both in (scale, other):
        assert both.update(1.0)
        assert both.scale == 32768
        assert all(both.update(1.0) for _ in range(1999))
        assert both.update(float("inf")) is False                    # so near, and from the beginning
        assert both.scale == 16384
        assert all(both.update(1.0) for _ in range(1999))
        assert both.scale == 16384
    assert scale.state_dict() == other.state_dict() == {"scale": 16384, "good_steps": 1999}


def test_no_loss_scale():
    scale = LossScale(enabled=False)
    assert [scale.update(norm) for norm in (1.0, float("nan"), float("inf"))] == [True, False, False]
    assert all(scale.update(1.0) for _ in range(2001))
    assert scale.scale == 1.0
