"""Truth: learning rates worked out by hand and those of transformers and torch."""

import dataclasses
import itertools
import math
import typing
from types import SimpleNamespace

import pytest
import torch

from core import cli
from core import config as settings
from core.errors import UserError
from learn.optim import OptimConfig
from learn.schedules import (
    DECAYS,
    SCHEDULES,
    decay_start,
    hint,
    learning_rate,
    recommended,
    refuse_length,
    set_learning_rate,
    warmup_length,
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
        assert warmup_length(total, config) == first
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
    assert decay_start(100, endless) is None
    for total, ratio in itertools.product([*range(1, 51), 1000], (0.01, 0.1, 0.37, 1.0)):
        branch = dataclasses.replace(config, decay_ratio=ratio)
        start = decay_start(total, branch)
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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_behind_the_moments_steps_the_schedule_is_that_of_a_shorter_run(schedule):
    config = of(schedule)
    later = dataclasses.replace(config, moment_warmup=7)
    assert [learning_rate(step, 47, later) for step in range(60)] == \
        [0.0] * 7 + [learning_rate(step, 40, config) for step in range(53)]
    assert "learning rate: 0 for 7 steps, then" in hint(7e9, "full", later)


def test_a_run_that_would_never_move_is_refused():
    refuse_length(8, OptimConfig(moment_warmup=7))
    with pytest.raises(UserError, match=r"optim\.moment_warmup 8 leaves none of the run's 8 steps a learning rate"):
        refuse_length(8, OptimConfig(moment_warmup=8))


def test_the_names_in_the_settings_are_the_functions():
    hints = typing.get_type_hints(OptimConfig)
    assert typing.get_args(hints["schedule"]) == tuple(SCHEDULES)
    assert typing.get_args(hints["decay"]) == tuple(DECAYS)


@dataclasses.dataclass
class Whole:
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)


def test_settings_from_the_command_line_and_back(tmp_path):
    with pytest.raises(ValueError, match=r"cosinus.*cosine_restarts.*linear.*inverse_sqrt.*constant.*wsd.*infinite"):
        cli.parse(Whole, ["--optim.schedule", "cosinus"], recipe=True)
    c = cli.parse(Whole, ["--optim.schedule", "infinite", "--optim.warmup-steps", "3", "--optim.cooldown-steps", "9"],
                  recipe=True)
    assert c.optim == OptimConfig(schedule="infinite", warmup_steps=3, cooldown_steps=9)
    for config in (c, Whole()):
        (tmp_path / "config.toml").write_text(settings.to_toml(config))
        assert cli.parse(Whole, [str(tmp_path / "config.toml")], recipe=True) == config


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
    with pytest.raises(UserError, match=words):
        settings.check_limits(OptimConfig(**wrong), "optim.")


def test_each_group_gets_its_multiple_of_the_rate():
    """20 steps, 4 of warm-up from 0: step 1 has half of lr."""
    optimizer = SimpleNamespace(param_groups=[{"lr": 9.0, "lr_scale": scale} for scale in (1.0, 16.0, 0.1)])
    assert set_learning_rate(optimizer, 1, 20, of("cosine", warmup_steps=4)) == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 8.0, 0.05]


def test_the_last_fall_begins_where_the_cooldown_stands():
    """20 steps: 4 of warm-up, a cooldown of 16 that would last to the end, and the fall over the last 4. After step 15
    three quarters of the cooldown are done; the fall goes on from there, a quarter of the way with each step."""
    config = of("infinite", warmup_steps=4, cooldown_steps=16, decay="linear", decay_ratio=0.2)
    last = 0.55 + 0.225 * (1 - math.sqrt(0.5))
    wanted = [last, *(0.1 + (last - 0.1) * left for left in (0.75, 0.5, 0.25, 0))]
    assert [learning_rate(step, 20, config) for step in range(15, 20)] == pytest.approx(wanted, rel=1e-12)


# ---- recommended rates

def test_recommended_rates():
    # the guides' table; the models of these names have 6.74, 13.0 and 69.0 thousand million parameters
    for size, real, lr in ((7e9, 6.74e9, 1e-5), (13e9, 13.02e9, 8e-6), (70e9, 68.98e9, 5e-6)):
        for parameters in (size, real):
            assert recommended(parameters) == (lr, pytest.approx(lr / 10, rel=1e-12))
            assert recommended(parameters, "lora") == (pytest.approx(10 * lr), pytest.approx(lr))
    rates = [recommended(10**(k / 4))[0] for k in range(16, 50)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 3e-4                                          # never above the rate from scratch
    assert (OptimConfig().lr, OptimConfig().min_lr) == recommended(7e9)


def test_the_hint_is_one_line_with_both_rates():
    line = hint(6.74e9, "lora", OptimConfig(lr=3e-5, min_lr=2e-6, schedule="wsd"))
    assert "\n" not in line
    assert all(word in line for word in ("wsd", "3e-05", "2e-06", "6.74B", "lora", "0.0001", "1e-05"))


@pytest.mark.parametrize("wrong", [{"min_lr": 2e-5}, {"min_lr": -1e-9}, {"lr": -1.0, "min_lr": -2.0},
                                   {"lr": float("nan")}, {"warmup_ratio": 1.1}, {"warmup_ratio": -0.1}])
def test_wrong_settings(wrong):
    with pytest.raises(UserError, match=r"optim\."):
        settings.check_limits(OptimConfig(**wrong), "optim.")
