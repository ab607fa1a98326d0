"""Truth: learning rates worked out by hand and those of transformers and torch, AdamW written out in float64 (arXiv
1711.05101, algorithm 2), torch.optim.Muon, the singular value decomposition, and one process where there are two."""

import copy
import dataclasses
import itertools
import math
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core import config as settings
from core import parallel
from learn import optim
from learn.optim import (
    DECAYS,
    SCHEDULES,
    LossScale,
    OptimConfig,
    learning_rate,
    make_optimizer,
    orthogonalise,
    recommended,
)

FALLING = ("cosine", "cosine_restarts", "linear", "wsd", "infinite")       # those that end at min_lr
IN_STEPS = {"warmup_steps": 4, "cooldown_steps": 9}


def of(schedule, **changes) -> OptimConfig:
    """Settings of a schedule from 1 down to 0.1."""
    more = IN_STEPS if schedule == "infinite" else {}
    return OptimConfig(**{"lr": 1.0, "min_lr": 0.1, "schedule": schedule, **more, **changes})


# ---- schedules

def test_the_schedule_step_by_step():
    config = OptimConfig(lr=1.0, min_lr=0.2, warmup_ratio=0.2)
    # 10 steps: 2 of warm-up, then 8 down the cosine 0.2 + 0.4 (1 + cos(pi k / 8)), k = 1 to 8
    root = math.sqrt(0.5)
    by_hand = {0: 0.5, 1: 1.0, 3: 0.6 + 0.4 * root, 5: 0.6, 7: 0.6 - 0.4 * root, 9: 0.2, 10: 0.2, 500: 0.2}
    for step, rate in by_hand.items():
        assert learning_rate(step, 10, config) == pytest.approx(rate, rel=1e-12), step


BY_HAND = {        # 20 steps, 4 of warm-up, from 1 down to 0.1
    "linear": {0: 0.25, 3: 1, 4: 1 - 0.9 / 16, 11: 0.55, 19: 0.1, 20: 0.1, 99: 0.1},
    "inverse_sqrt": {0: 0.25, 3: 1, 8: 2 / 3, 15: 0.5, 19: math.sqrt(0.2), 20: math.sqrt(0.2), 999: math.sqrt(0.2)},
    "constant": {0: 0.25, 3: 1, 4: 1, 19: 1, 20: 1, 99: 1},
    # restarts at 5, 10, 15: what is left of the first cycle is one step
    "cosine_restarts": {3: 1, 4: 0.1, 5: 0.55 + 0.45 * math.cos(math.pi / 5), 9: 0.1, 14: 0.1,
                        15: 0.55 + 0.45 * math.cos(math.pi / 5), 19: 0.1, 20: 0.1, 99: 0.1},
    # the last 4 steps go down: 1 - sqrt(k / 4) of the way is left
    "wsd": {0: 0.25, 3: 1, 4: 1, 15: 1, 16: 0.55, 17: 0.1 + 0.9 * (1 - math.sqrt(0.5)), 19: 0.1, 20: 0.1, 99: 0.1},
    # half a cosine of 9 steps from 1 to 0.55, there until 15, then as wsd
    "infinite": {0: 0.25, 3: 1, 6: 0.775 + 0.225 * 0.5, 9: 0.775 - 0.225 * 0.5, 12: 0.55, 15: 0.55, 16: 0.325,
                 19: 0.1, 20: 0.1, 99: 0.1},
}


@pytest.mark.parametrize("schedule", BY_HAND)
def test_schedules_by_hand(schedule):
    config = of(schedule, warmup_steps=4, decay_ratio=0.2)
    for step, rate in BY_HAND[schedule].items():
        assert learning_rate(step, 20, config) == pytest.approx(rate, rel=1e-12), step


def test_restarts_of_a_length_that_four_does_not_divide():
    """10 steps: one of warm-up, two of the first cycle, and 2, 3 and 2; each ends at the floor."""
    config = of("cosine_restarts", warmup_ratio=0.0)
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert rates == pytest.approx([1, 0.55, 0.1, 0.55, 0.1, 0.775, 0.325, 0.1, 0.55, 0.1], rel=1e-12)


def factors(name, *args, **kwargs):
    """The schedule of transformers as a function of the step: the rate's multiple."""
    transformers = pytest.importorskip("transformers", reason="the truth is transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return getattr(transformers.optimization, name)(optimizer, *args, **kwargs).lr_lambdas[0]


def theirs(schedule, warmup, total, decay, shape):
    """transformers' own, where a step's rate is the one they reach before it: theirs is one step later than ours."""
    if schedule == "cosine":
        return factors("get_cosine_with_min_lr_schedule_with_warmup", warmup, total, min_lr_rate=0.1)
    if schedule == "linear":
        return factors("get_polynomial_decay_schedule_with_warmup", warmup, total, lr_end=0.1, power=1.0)
    if schedule == "inverse_sqrt":
        rate = factors("get_inverse_sqrt_schedule", warmup)
        return lambda step: max(0.1, rate(step))
    if schedule == "constant":
        return factors("get_constant_schedule_with_warmup", warmup)
    return factors("get_wsd_schedule", warmup, decay, total, decay_type=shape, min_lr_ratio=0.1)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "inverse_sqrt", "constant", *(f"wsd {d}" for d in DECAYS)])
def test_transformers_has_the_same_rates(schedule):
    schedule, _, shape = schedule.partition(" ")
    for total, warmup in itertools.product((5, 40, 300), (1, 2, 5, 17)):
        decay = round(0.4 * total)
        if warmup > total - decay:
            continue
        config = of(schedule, warmup_steps=warmup, decay_ratio=0.4, **({"decay": shape} if shape else {}))
        rate = theirs(schedule, warmup, total, decay, shape)
        # their wsd warms up from 0.1 of lr, and their inverse square root knows no floor
        for step in range(warmup - 1 if schedule in ("wsd", "inverse_sqrt") else 0, total):
            assert learning_rate(step, total, config) == pytest.approx(rate(step + 1), rel=1e-9), (total, warmup, step)


@pytest.mark.parametrize("total", range(1, 51))
def test_the_default_is_the_cosine_of_transformers_with_a_warm_up_not_from_zero(total):
    for ratio in (0.0, 0.01, 0.1, 0.3, 0.99):
        config = OptimConfig(warmup_ratio=ratio)
        assert config.schedule == "cosine"
        warmup = max(1, round(ratio * total))
        rate = factors("get_cosine_with_min_lr_schedule_with_warmup_lr_rate", warmup, total, min_lr_rate=0.1)
        for step in range(total):
            assert learning_rate(step, total, config) == pytest.approx(1e-5 * rate(step), rel=1e-12)


@pytest.mark.parametrize(("total", "cycles"), [(400, 4), (60, 3), (20, 4), (30, 1)])
def test_restarts_are_those_of_torch(total, cycles):
    """torch counts from the restart, ours are one step further; it has no warm-up, so from the second cycle on."""
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    truth = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(sgd, T_0=total // cycles, eta_min=0.1)
    rates = []
    for _ in range(total + 1):
        rates.append(truth.get_last_lr()[0])
        sgd.step()
        truth.step()
    config = of("cosine_restarts", cycles=cycles, warmup_ratio=0.0)
    for step in range(total // cycles if cycles > 1 else 1, total):
        ends = (step + 1) % (total // cycles) == 0                    # there torch is back at the top already
        expected = 0.1 if ends else rates[step + 1] if cycles > 1 else None
        if expected is not None:
            assert learning_rate(step, total, config) == pytest.approx(expected, rel=1e-9), step


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


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_at_every_length_and_warm_up(schedule, decay):
    for total, warmup in ((t, w) for t in range(1, 51) for w in range(t + 1)):
        config = of(schedule, warmup_steps=warmup, decay=decay)
        rates = [learning_rate(step, total, config) for step in range(total + 20)]
        first = max(1, warmup)
        assert optim.warmup_length(total, config) == first
        assert rates[:first] == pytest.approx([(k + 1) / first for k in range(first)], rel=1e-12)      # never zero
        after = rates[first - 1:]
        assert all(0.1 <= rate <= 1 for rate in after)                                             # floor and peak
        if schedule != "cosine_restarts":
            assert after == sorted(after, reverse=True)
        if schedule in FALLING and first < total:
            assert rates[total - 1] == pytest.approx(0.1, rel=1e-12)
        assert len(set(rates[max(total, first):])) == 1, (total, warmup)                     # held after the end


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_jumps_but_where_it_restarts(schedule, decay):
    """Ten times as many steps make the largest jump smaller, by sqrt(10) at the least (the beginning of 1-sqrt)."""
    jumps = {}
    for total in (1000, 10_000):
        steps = {"cooldown_steps": total // 2} if schedule == "infinite" else {}
        config = of(schedule, decay=decay, warmup_steps=total // 100, **steps)
        rates = [learning_rate(step, total, config) for step in range(total + 5)]
        change = [b - a for a, b in zip(rates[total // 100:], rates[total // 100 + 1:])]
        restarts = [i for i, x in enumerate(change) if x > 0]
        starts = [total // 100 + i + 1 for i in restarts]
        assert starts == ([total // 4, total // 2, total * 3 // 4] if schedule == "cosine_restarts" else [])
        assert all(change[i] > 0.89 for i in restarts)
        jumps[total] = max(-x for x in change)
    assert jumps[10_000] <= jumps[1000] / 3


def test_no_rewarming_begins_at_the_full_rate():
    for schedule in SCHEDULES:
        none = {"warmup_steps": 0} if schedule == "infinite" else {"warmup_ratio": 0.0}
        assert learning_rate(0, 100, of(schedule, **none)) == 1.0


BRANCHING = [of("infinite"), of("infinite", decay="linear", constant_lr=0.3), of("wsd", warmup_steps=7)]


@pytest.mark.parametrize("config", BRANCHING, ids=lambda c: c.schedule)
def test_an_anneal_branches_off_a_run_without_end(config):
    """Up to its first step the rates are exactly those of the run without it, whatever the two lengths."""
    endless = dataclasses.replace(config, decay_ratio=0.0)
    assert optim.decay_start(100, endless) is None
    for total, ratio in itertools.product([*range(1, 51), 1000], (0.01, 0.1, 0.37, 1.0)):
        branch = dataclasses.replace(config, decay_ratio=ratio)
        start = optim.decay_start(total, branch)
        for length in (1, total, 7 * total + 3):                     # of the run without decay
            before = [learning_rate(step, length, endless) for step in range(start + 40)]
            assert before[:start] == [learning_rate(step, total, branch) for step in range(start)]
        if start < total:
            assert total - start <= max(1, round(ratio * total))
            assert learning_rate(start, total, branch) < before[start - 1]
            assert learning_rate(total - 1, total, branch) == pytest.approx(0.1)
    assert set(before[20:]) == {learning_rate(10**9, 20, endless)}   # it never ends
    assert before[20] == pytest.approx(0.3 if config.constant_lr else 0.55 if config.schedule == "infinite" else 1.0)


def test_a_floor_of_zero_and_a_flat_rate():
    assert learning_rate(99, 100, OptimConfig(lr=1e-3, min_lr=0.0)) == pytest.approx(0, abs=1e-18)
    for schedule in FALLING:
        end = learning_rate(99, 100, of(schedule, lr=1e-3, min_lr=0.0))
        assert end >= 0
        assert end == pytest.approx(0, abs=1e-18)
    flat = OptimConfig(lr=1e-3, min_lr=1e-3, warmup_ratio=0.0)
    assert {learning_rate(step, 50, flat) for step in range(60)} == {1e-3}


def test_the_names_in_the_settings_are_the_functions():
    hints = typing.get_type_hints(OptimConfig)
    assert typing.get_args(hints["schedule"]) == tuple(SCHEDULES)
    assert typing.get_args(hints["decay"]) == tuple(DECAYS)


@dataclasses.dataclass
class Whole:
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)


def test_settings_from_the_command_line_and_back(tmp_path):
    with pytest.raises(ValueError, match=r"cosinus.*cosine_restarts.*linear.*inverse_sqrt.*constant.*wsd.*infinite"):
        settings.parse(Whole, ["--optim.schedule", "cosinus"])
    c = settings.parse(Whole, ["--optim.schedule", "infinite", "--optim.warmup-steps", "3",
                               "--optim.cooldown-steps", "9"])
    assert c.optim == OptimConfig(schedule="infinite", warmup_steps=3, cooldown_steps=9)
    for config in (c, Whole()):
        (tmp_path / "config.toml").write_text(settings.to_toml(config))
        assert settings.parse(Whole, [str(tmp_path / "config.toml")]) == config


@pytest.mark.parametrize(("wrong", "words"), [
    ({"schedule": "infinite"}, r"set optim\.warmup_steps and optim\.cooldown_steps"),
    ({"schedule": "infinite", "warmup_steps": 3}, r"set optim\.warmup_steps and optim\.cooldown_steps"),
    ({"schedule": "infinite", "warmup_steps": 3, "cooldown_steps": 0}, r"optim\.cooldown_steps is 0"),
    ({"schedule": "infinite", **IN_STEPS, "constant_lr": 1.0}, r"optim\.constant_lr 1\.0 is not between"),
    ({"schedule": "wsd", "cooldown_steps": 5}, "belong to optim.schedule infinite, but it is wsd"),
    ({"constant_lr": 5e-6}, "belong to optim.schedule infinite, but it is cosine"),
    ({"warmup_steps": -1}, r"optim\.warmup_steps is -1"), ({"decay_ratio": 1.5}, r"optim\.decay_ratio is 1\.5"),
    ({"cycles": 0}, r"optim\.cycles is 0"), ({"embedding_lr_scale": 0.0}, r"optim\.embedding_lr_scale is 0"),
])
def test_wrong_schedules(wrong, words):
    with pytest.raises(ValueError, match=words):
        OptimConfig(**wrong)


# ---- recommended rates

def test_recommended_rates():
    # the guides' table; the models of these names have 6.74, 13.0 and 69.0 thousand million parameters
    for size, real, lr in ((7e9, 6.74e9, 1e-5), (13e9, 13.02e9, 8e-6), (70e9, 68.98e9, 5e-6)):
        for parameters in (size, real):
            assert recommended(parameters) == (lr, pytest.approx(lr / 10, rel=1e-12))
            assert recommended(parameters, "lora") == (pytest.approx(10 * lr), pytest.approx(lr))
            assert recommended(parameters, "scratch") == (3e-4, 3e-5)
    rates = [recommended(10**(k / 4))[0] for k in range(16, 50)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 3e-4                                          # never above the rate from scratch
    assert (OptimConfig().lr, OptimConfig().min_lr) == recommended(7e9)


@pytest.mark.parametrize("wrong", [(7e9, "dora"), (0, "full"), (float("nan"), "full")])
def test_no_rate_is_known(wrong):
    with pytest.raises(ValueError, match="full, lora, scratch"):
        recommended(*wrong)


def test_the_hint_is_one_line_with_both_rates():
    line = optim.hint(6.74e9, "lora", OptimConfig(lr=3e-5, min_lr=2e-6, schedule="wsd"))
    assert "\n" not in line
    assert all(word in line for word in ("wsd", "3e-05", "2e-06", "6.74B", "lora", "0.0001", "1e-05"))


# ---- optimizers

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


def set_rates(optimizer, lr):
    """The loop's line."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def test_groups_of_every_kind(tiny_model):
    model = tiny_model(tie_word_embeddings=False)
    config = OptimConfig(name="muon", lr=1e-3, weight_decay=0.3, embedding_lr_scale=0.5)
    optimizer = make_optimizer(model, config, {"layers.1.*norm.weight": 4.0, "layers.2.mlp.up_proj.weight": 2.0})
    special = {"embed_tokens.weight": 0.5, "head.weight": 0.5, "layers.2.mlp.up_proj.weight": 2.0}
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    for name, p in model.named_parameters():
        group, matrix = found.pop(id(p)), p.ndim == 2
        if name in special:
            scale = special[name]
        else:
            scale = 4.0 if name.startswith("layers.1.") and not matrix else 1.0
        wanted = (name.startswith("layers.") and matrix, 0.3 if matrix else 0.0, scale, 1e-3 * scale)
        assert (group["muon"], group["weight_decay"], group["lr_scale"], group["lr"]) == wanted, name
    assert not found


def test_a_rate_for_no_parameter_is_refused():
    with pytest.raises(ValueError, match=r"'\*\.lora_B\*', but no parameter.*weight and bias"):
        make_optimizer(torch.nn.Linear(2, 2), OptimConfig(), {"weight": 1.0, "*.lora_B*": 16.0})


def test_the_first_pattern_that_matches_counts():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = make_optimizer(net, OptimConfig(), {"0.weight": 3.0, "*.weight": 2.0})
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert [scales[id(p)] for p in net.parameters()] == [3.0, 1.0, 2.0, 1.0]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_a_scaled_group_is_an_optimizer_of_its_own(name):
    """Truth: two optimizers at two rates."""
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(32, 32), "b": torch.nn.Linear(32, 32)})
    other = copy.deepcopy(net)
    config = OptimConfig(name=name)
    both = make_optimizer(net, config, {"b.*": 0.25})
    apart = [make_optimizer(other[key], config) for key in "ab"]
    for lr in (1e-2, 3e-2, 1e-3):
        set_rates(both, lr)
        for optimizer, scale in zip(apart, (1, 0.25)):
            set_rates(optimizer, lr * scale)
        for p, q in zip(net.parameters(), other.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in (both, *apart):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters()))


class Net(torch.nn.Module):
    """Embedding, blocks, norm and head; rows that two ranks cannot share evenly."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(),
                                                              torch.nn.Linear(9, 6)) for _ in range(2))
        self.norm, self.head = torch.nn.LayerNorm(6), torch.nn.Linear(6, 11, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))

    def shard_plan(self):
        return list(self.blocks)


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def train(net, optimizer, steps):
    """Steps first..last-1 on tokens of their own."""
    for step in steps:
        tokens = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        set_rates(optimizer, 1e-2 / (step + 1))
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_a_frozen_parameter_does_not_move_and_holds_nothing(name):
    """Frozen after the optimizer was made; thawed, it learns as if it had been new; frozen again, it can forget."""
    net = make_net().float()
    optimizer = make_optimizer(net, OptimConfig(name=name, weight_decay=0.9))
    frozen = [net.embed.weight, *net.blocks[0].parameters()]
    before = [p.detach().clone() for p in frozen]
    for p in frozen:
        p.requires_grad_(False)
    train(net, optimizer, range(3))
    assert all(torch.equal(p, old) for p, old in zip(frozen, before))
    assert not any(p in optimizer.state for p in frozen)
    assert not any(name.startswith(("embed", "blocks.0")) for name in parallel.optimizer_state(net, optimizer))
    assert all(optimizer.state[p] for p in net.parameters() if p.requires_grad)

    for p in frozen:
        p.requires_grad_(True)
    truth = copy.deepcopy(net)
    fresh = make_optimizer(truth, OptimConfig(name=name, weight_decay=0.9))
    train(net, optimizer, [3])
    train(truth, fresh, [3])
    moved = dict(truth.named_parameters())
    for key, p in net.named_parameters():
        if any(p is q for q in frozen):
            assert torch.equal(p, moved[key]), key                   # the first step of an optimizer's life
            assert not torch.equal(p, before[[p is q for q in frozen].index(True)])

    for p in frozen:                                                 # again, and its state is given back
        p.requires_grad_(False)
        p.grad = None
        optimizer.state.pop(p, None)
    before = [p.detach().clone() for p in frozen]
    train(net, optimizer, range(4, 6))
    assert all(torch.equal(p, old) for p, old in zip(frozen, before))
    assert not any(p in optimizer.state for p in frozen)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_muon_is_torchs(decay):
    """The same bits as torch.optim.Muon for the blocks' matrices and torch's fused AdamW for the rest."""
    net, other = make_net().float(), make_net().float()
    config = OptimConfig(name="muon", weight_decay=decay)
    mine = make_optimizer(net, config)
    matrices = [p for p in other.blocks.parameters() if p.ndim == 2]
    rest = [p for p in other.parameters() if not any(p is q for q in matrices)]
    groups = [{"params": [p for p in rest if p.ndim == 2], "weight_decay": decay},
              {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0}]
    truth = [torch.optim.Muon(matrices, lr=1.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
             torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)]
    both = type("Both", (), {"param_groups": [g | {"lr_scale": 1.0} for o in truth for g in o.param_groups]})
    for step in range(5):
        train(net, mine, [step])
        for p, q in zip(net.parameters(), other.parameters()):
            q.grad = p.grad.clone()
        set_rates(both, 1e-2 / (step + 1))
        for optimizer in truth:
            for group in optimizer.param_groups:
                group["lr"] = both.param_groups[0]["lr"]
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters()))
    assert {tuple(mine.state[p]) for p in net.blocks.parameters() if p.ndim == 2} == {("momentum",)}


def test_a_model_of_matrices_alone_and_one_of_vectors():
    for net in (torch.nn.Linear(4, 3, bias=False), torch.nn.LayerNorm(4)):
        optimizer = make_optimizer(net, OptimConfig(name="muon", lr=1e-2))
        before = [p.detach().clone() for p in net.parameters()]
        net(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        assert not any(torch.equal(p, old) for p, old in zip(net.parameters(), before))


@pytest.mark.parametrize("shape", [(40, 40), (64, 24), (24, 64), (1, 7), (7, 1), (1, 1)])
def test_orthogonalised_singular_values(shape):
    """Truth: the SVD. Directions stay, values of 0.002 of the norm and more come between 0.68 and 1.21."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(-2, 0, len(vh), dtype=torch.float64) * 7
    s[0] = max(s[0], 0.002 * s.norm())
    for dtype, atol in ((torch.float64, 1e-9), (torch.float32, 0.05)):
        matrix = ((u * s) @ vh).to(dtype)
        before = matrix.clone()
        out = orthogonalise(matrix)
        assert torch.equal(matrix, before)
        assert out.dtype == dtype
        inner = u.T @ out.double() @ vh.T
        torch.testing.assert_close(inner, inner.diag().diag(), rtol=0, atol=atol)
        torch.testing.assert_close(u @ inner @ vh, out.double(), rtol=0, atol=atol)      # and nothing beside them
        assert 0.68 - atol <= inner.diag().min() <= inner.diag().max() <= 1.21 + atol


def test_nothing_to_orthogonalise_is_nothing():
    assert torch.equal(orthogonalise(torch.zeros(5, 3)), torch.zeros(5, 3))


def test_muons_updates_are_as_large_as_adamws():
    """Moonlight's point: 0.2 to 0.4 of the rate, root mean square, at any shape of matrix."""
    torch.manual_seed(0)
    for shape in ((32, 32), (96, 32), (32, 256)):
        net = torch.nn.ParameterList([torch.randn(shape)])
        optimizer = make_optimizer(net, OptimConfig(name="muon", lr=1e-2, weight_decay=0.0))
        before, net[0].grad = net[0].detach().clone(), torch.randn(shape) * 1e-3
        optimizer.step()
        assert (net[0] - before).square().mean().sqrt().item() == pytest.approx(0.2 * 1e-2, rel=0.2)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
@pytest.mark.parametrize("through", ["state_dict", "checkpoint"])
def test_an_optimizer_goes_on_from_its_state_bit_for_bit(name, through):
    nets = [make_net().float() for _ in range(2)]
    first, second = (make_optimizer(net, OptimConfig(name=name)) for net in nets)
    train(nets[0], first, range(3))
    parallel.load_model_state(nets[1], copy.deepcopy(parallel.model_state(nets[0])))
    if through == "state_dict":
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    else:
        parallel.load_optimizer_state(nets[1], second, copy.deepcopy(parallel.optimizer_state(nets[0], first)))
    for net, optimizer in zip(nets, (first, second)):
        train(net, optimizer, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters()))
    states = [parallel.optimizer_state(net, optimizer) for net, optimizer in zip(nets, (first, second))]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def as_rank(folder: Path):
    """What each of two ranks does: three steps of Muon on shares of a net, its state to files, two steps more."""
    torch.set_num_threads(1)
    world = parallel.start("cpu")
    net = parallel.shard(make_net(), world)
    optimizer = make_optimizer(net, OptimConfig(name="muon"))
    for part, steps in (("three", range(3)), ("five", range(3, 5))):
        train(net, optimizer, steps)
        weights, moments = parallel.model_state(net), parallel.optimizer_state(net, optimizer)
        if world.main:
            save_file({**weights, **{f"state/{key}": x for key, x in moments.items()}}, folder / f"{part}.safetensors")
    world.barrier()
    parallel.stop()


def test_muon_on_two_ranks_is_muon_on_one(tmp_path):
    """FSDP2 over uneven rows, in float64 but for the reduction of gradients (fp32); and one rank continues two."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           __file__, tmp_path], capture_output=True, text=True, timeout=100,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    net = make_net()
    optimizer = make_optimizer(net, OptimConfig(name="muon"))
    for part, steps in (("three", range(3)), ("five", range(3, 5))):
        train(net, optimizer, steps)
        found = load_file(tmp_path / f"{part}.safetensors")
        state = parallel.optimizer_state(net, optimizer)
        truth = {**parallel.model_state(net), **{f"state/{key}": x for key, x in state.items()}}
        assert found.keys() == truth.keys()
        for key in truth:
            torch.testing.assert_close(found[key], truth[key], rtol=1e-5, atol=1e-6, msg=f"{part}: {key} differs")
        if part == "three":                                          # from here on from the two ranks' files
            parallel.load_model_state(net, {key: x for key, x in found.items() if not key.startswith("state/")})
            parallel.load_optimizer_state(net, optimizer, {key.removeprefix("state/"): x for key, x in found.items()
                                                           if key.startswith("state/")})


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


if __name__ == "__main__":
    as_rank(Path(sys.argv[1]))
