"""The learning rate as a function of the step: a linear warm-up, then one of seven schedules.

The rates of 10 steps from lr 1 to min_lr 0, with 2 steps of warm-up (decay_ratio 0.3 and decay linear where there is a
last decay, 2 cycles, 4 cooldown_steps to constant_lr 0.4):

    step              0    1    2    3    4    5    6    7    8    9
    cosine            .50 1.00  .96  .85  .69  .50  .31  .15  .04  .00    falls over the whole run
    cosine_restarts   .50 1.00  .75  .25  .00  .90  .65  .35  .10  .00    falls again in every cycle
    linear            .50 1.00  .88  .75  .62  .50  .38  .25  .12  .00
    inverse_sqrt      .50 1.00  .82  .71  .63  .58  .53  .50  .47  .45    sqrt(warm-up / step), never reaches 0
    constant          .50 1.00 1.00 1.00 1.00 1.00 1.00 1.00 1.00 1.00
    wsd               .50 1.00 1.00 1.00 1.00 1.00 1.00  .67  .33  .00    warm-up, stable, decay
    infinite          .50 1.00  .91  .70  .49  .40  .40  .27  .13  .00    cools down, stays, decays

Up to its last decay `infinite` is a function of the step alone, and so is `wsd` with warmup_steps: a run without a
decay can be prolonged, and any of its checkpoints continued by a run that decays from there on.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from core.config import setting
from core.errors import UserError


@dataclass
class ScheduleConfig:
    """The part of optim.* that decides the learning rates, and nothing else."""

    lr: float = setting(1e-5, at_least=0, at_most=100)
    """peak learning rate (7B: 1e-5, 13B: 8e-6, 70B: 5e-6; LoRA: ten times that; from scratch about 3e-4)"""
    min_lr: float = setting(1e-6, at_least=0, at_most=100)
    """the floor, where a schedule that falls ends"""
    schedule: Literal["cosine", "cosine_restarts", "linear", "inverse_sqrt", "constant", "wsd", "infinite"] = "cosine"
    """what follows the warm-up. cosine, linear: fall over the whole run. cosine_restarts: in every cycle. inverse_sqrt:
    lr sqrt(warm-up / step). wsd: lr, then the decay. infinite: down to constant_lr for any length, then the decay"""
    warmup_ratio: float = setting(0.01, at_least=0, at_most=1)
    """share of the run over which the rate rises. 0: no re-warming, the first step has all of lr (then set lr to the
    rate at which the base's training ended)"""
    warmup_steps: int | None = setting(None, at_least=0)
    """the same in steps, instead of the share"""
    moment_warmup: int = setting(0, at_least=0, at_most=10**6)
    """first steps of the run, at rate 0: an optimizer that begins without its moments fills them, no weight changes,
    and the schedule begins behind them. They count as steps, and read the run's first batches without learning them"""
    cycles: int = setting(4, above=0, at_most=10**6)
    """cosine_restarts: number of equal parts of the run, each with a cosine of its own"""
    decay: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"
    """wsd, infinite: shape of the last fall to min_lr"""
    decay_ratio: float = setting(0.15, at_least=0, at_most=1)
    """wsd, infinite: share of the run, at its end, that the last fall takes. 0: none, so that the run can go on"""
    cooldown_steps: int | None = setting(None, above=0)
    """infinite: steps from lr down to constant_lr"""
    constant_lr: float | None = setting(None, at_least=0, at_most=100)
    """infinite: the rate that lasts; default: halfway between lr and min_lr"""

    def __post_init__(self):
        # Each comparison is written so that a NaN fails it.
        if not self.min_lr <= self.lr:
            raise UserError(f"optim.min_lr {self.min_lr} is above optim.lr {self.lr}; lower it")
        if self.schedule != "infinite":
            if self.cooldown_steps is not None or self.constant_lr is not None:
                raise UserError(f"optim.cooldown_steps and optim.constant_lr belong to optim.schedule infinite, but it "
                                f"is {self.schedule}; leave them out, or take infinite")
            return
        if self.warmup_steps is None or self.cooldown_steps is None:
            raise UserError("optim.schedule infinite must not depend on the run's length: set optim.warmup_steps and "
                            "optim.cooldown_steps (such as 1 % and 50 % of the run planned first)")
        if self.constant_lr is not None and not self.min_lr <= self.constant_lr <= self.lr:
            raise UserError(f"optim.constant_lr {self.constant_lr} is not between optim.min_lr {self.min_lr} and "
                            f"optim.lr {self.lr}")


SCHEDULE_FIELDS = {field.name for field in fields(ScheduleConfig)}


def learning_rate(step: int, total: int, config: ScheduleConfig) -> float:
    """The rate of step 0..total-1: 0 in config.moment_warmup, and behind it that of a run which begins there: never 0
    in the warm-up and never below min_lr after it.

    The last step of the warm-up has all of lr, and the last step of a falling schedule has min_lr. Steps after the end
    keep the end's rate.
    """
    if step < config.moment_warmup:
        return 0.0
    step, total = step - config.moment_warmup, total - config.moment_warmup
    warmup, start = warmup_length(total, config), decay_start(total, config)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    schedule = SCHEDULES[config.schedule]
    if start is None or step < start:
        return max(config.min_lr, schedule(step, total, warmup, config))
    left = 1 - DECAYS[config.decay](progress(step, start, total))
    return max(config.min_lr, config.min_lr + (schedule(start - 1, total, warmup, config) - config.min_lr) * left)


def refuse_length(total: int, config: ScheduleConfig) -> None:
    """UserError for a run of `total` steps that would all be at rate 0."""
    if config.moment_warmup >= total:
        raise UserError(f"optim.moment_warmup {config.moment_warmup} leaves none of the run's {total} steps a learning "
                        f"rate; lower it, or lengthen the run")


def set_learning_rate(optimizer, step: int, total: int, config: ScheduleConfig) -> float:
    """Give every parameter group the rate of the step, times the group's own scale. Returns the rate."""
    lr = learning_rate(step, total, config)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr


def warmup_length(total: int, config: ScheduleConfig) -> int:
    """Steps of the warm-up, at least 1: a warm-up of one step is none, because that step has all of lr."""
    return max(1, round(config.warmup_ratio * total) if config.warmup_steps is None else config.warmup_steps)


def decay_start(total: int, config: ScheduleConfig) -> int | None:
    """First step of the last decay of wsd and infinite, or None without one."""
    if config.schedule not in ("wsd", "infinite") or not config.decay_ratio:
        return None
    return max(warmup_length(total, config), total - max(1, round(config.decay_ratio * total)))


def progress(step: int, start: int, stop: int) -> float:
    """Share of the steps start..stop-1 that is done after `step`: 1 at the last of them and ever after."""
    return min(1.0, (step - start + 1) / max(1, stop - start))


def fall(high: float, low: float, done: float) -> float:
    """From high to low along half a cosine, `done` being the share of the way."""
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * done))


def cosine_restarts(step, total, warmup, config):
    """Restarts at equal shares of the run (SGDR, arXiv 1608.03983); the warm-up is the beginning of the first cycle."""
    cycle = min(step, total - 1) * config.cycles // total
    # Rounded up: the first step that lies in the cycle, and the first that lies in the next.
    start, stop = (-(-k * total // config.cycles) for k in (cycle, cycle + 1))
    return fall(config.lr, config.min_lr, progress(step, max(start, warmup), stop))


def infinite(step, total, warmup, config):
    """Cooldown to a constant rate (arXiv 2403.08763 and 2503.02844, whose last decay is exponential)."""
    low = (config.lr + config.min_lr) / 2 if config.constant_lr is None else config.constant_lr
    return fall(config.lr, low, progress(step, warmup, warmup + config.cooldown_steps))


# What follows the warm-up, and comes before a last decay: (step, total, warmup, config) -> rate.
# wsd is MiniCPM's (arXiv 2404.06395); its decay 1-sqrt did better than linear in arXiv 2405.18392.
SCHEDULES = {
    "cosine": lambda step, total, warmup, c: fall(c.lr, c.min_lr, progress(step, warmup, total)),
    "cosine_restarts": cosine_restarts,
    "linear": lambda step, total, warmup, c: c.min_lr + (c.lr - c.min_lr) * (1 - progress(step, warmup, total)),
    "inverse_sqrt": lambda step, total, warmup, c: c.lr * math.sqrt(warmup / max(warmup, min(step + 1, total))),
    "constant": lambda step, total, warmup, c: c.lr,
    "wsd": lambda step, total, warmup, c: c.lr,
    "infinite": infinite,
}
# Share of the last decay's steps that is done -> share of its fall that is done.
DECAYS = {"linear": lambda done: done, "cosine": lambda done: 0.5 - 0.5 * math.cos(math.pi * done), "1-sqrt": math.sqrt}


# ---- recommended rates

# (parameters, peak rate to continue a pretraining) and the rate from scratch.
SIZES, SCRATCH = ((7e9, 1e-5), (13e9, 8e-6), (70e9, 5e-6)), 3e-4


def recommended(parameters: float, method: Literal["full", "lora"] = "full") -> tuple[float, float]:
    """(lr, min_lr) to start from: min_lr is a tenth of lr, and LoRA's rates are ten times those of full training.

    Sizes between and beyond those of SIZES lie on the straight lines through these in log-log, in one digit and never
    above the rate from scratch. Outside 7B to 70B that is an extrapolation: try half and double.

    LoRA's factor is one of widths of thousands. At equal rates the first steps of rank r, with alpha 2r, move a weight
    [D, D] 2 sqrt(r / (3 D)) times as far as those of full training, because a new A has entries of size 1 / sqrt(3 D):
    with r 8 that is 0.05 times at D 4096, and 0.4 times at D 64.
    """
    (n0, lr0), (n1, lr1) = SIZES[:2] if parameters < SIZES[1][0] else SIZES[1:]
    lr = min(SCRATCH, lr0 * (lr1 / lr0) ** (math.log(parameters / n0) / math.log(n1 / n0)))
    return tuple(float(f"{lr * {'full': 1, 'lora': 10}[method] / part:.0e}") for part in (1, 10))


def hint(parameters: float, method: str, config: ScheduleConfig) -> str:
    """One line that sets the configured rates beside the recommended ones."""
    lr, min_lr = recommended(parameters, method)
    moments = f"0 for {config.moment_warmup} steps, then " if config.moment_warmup else ""
    return (f"learning rate: {moments}{config.schedule}, {config.lr:g} down to {config.min_lr:g}; recommended for "
            f"{parameters / 1e9:.3g}B parameters ({method}): {lr:g} down to {min_lr:g}")
