"""The learning rate as a function of the step; parameter groups; AdamW in full, AdamW with 8-bit moments, and Muon.

train.py asks `learning_rate` at every step and `make_optimizer` once. Each schedule is a function in SCHEDULES; to add
one, write it there and name it in OptimConfig.schedule.
"""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from kernels.adamw import State, Table, adamw_, init_state


@dataclass
class OptimConfig:
    name: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """adamw: fp32 weights and moments, 16 bytes a parameter with its gradient; adamw_8bit: 8-bit moments, and with
    precision bf16 weights in bf16 + 8 bits of correction, 7 bytes; muon: orthogonalised momentum for the blocks'
    matrices, 12 bytes, and AdamW for the rest, at the same rates"""
    lr: float = 1e-5
    """peak learning rate (7B: 1e-5, 13B: 8e-6, 70B: 5e-6; LoRA: ten times that; from scratch about 3e-4)"""
    min_lr: float = 1e-6
    """the floor: where a schedule that falls ends"""
    schedule: Literal["cosine", "cosine_restarts", "linear", "inverse_sqrt", "constant", "wsd", "infinite"] = "cosine"
    """what follows the warm-up. cosine, linear: fall over the whole run; cosine_restarts: again in each part of it;
    inverse_sqrt: lr sqrt(warm-up / step); wsd: lr, then the decay; infinite: cools down to constant_lr in a set number
    of steps and stays there for a run of any length, until the decay"""
    warmup_ratio: float = 0.01
    """share of the run over which the rate rises, from its first step on; 0: no re-warming, the first step has all of
    lr (then let lr be the rate at which the base ended)"""
    warmup_steps: int | None = None
    """the same in steps, instead of the share"""
    cycles: int = 4
    """cosine_restarts: equal parts of the run, each with a cosine of its own"""
    decay: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"
    """wsd and infinite: shape of the last fall to min_lr"""
    decay_ratio: float = 0.15
    """wsd and infinite: share of the run, at its end, that the last fall takes; 0: none, so that the run can go on"""
    cooldown_steps: int | None = None
    """infinite: steps from lr down to constant_lr"""
    constant_lr: float | None = None
    """infinite: the rate that lasts; default: halfway between lr and min_lr"""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """on matrices and embeddings; norms and biases have none"""
    embedding_lr_scale: float = 1.0
    """the rate of embeddings and head as a multiple of that of the blocks"""
    clip: float = 1.0
    """largest global gradient norm; 0 for none"""

    def __post_init__(self):
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"optim.min_lr {self.min_lr} is not between 0 and optim.lr {self.lr}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)}, but must be from 0 to below 1")
        for name in ("eps", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name} is {getattr(self, name)}, but must be 0 or more")
        for name in ("warmup_ratio", "decay_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)}, but must be a share between 0 and 1")
        for name in ("cycles", "embedding_lr_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optim.{name} is {getattr(self, name)}, but must be above 0")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps is {self.warmup_steps}, but must be 0 or more")
        if self.schedule == "infinite":
            if self.warmup_steps is None or self.cooldown_steps is None:
                raise ValueError("optim.schedule infinite must not depend on the run's length: set optim.warmup_steps "
                                 "and optim.cooldown_steps (such as 1 % and 50 % of the run planned first)")
            if self.cooldown_steps < 1:
                raise ValueError(f"optim.cooldown_steps is {self.cooldown_steps}, but must be 1 or more")
            if self.constant_lr is not None and not self.min_lr <= self.constant_lr <= self.lr:
                raise ValueError(f"optim.constant_lr {self.constant_lr} is not between optim.min_lr {self.min_lr} and "
                                 f"optim.lr {self.lr}")
        elif self.cooldown_steps is not None or self.constant_lr is not None:
            raise ValueError(f"optim.cooldown_steps and optim.constant_lr belong to optim.schedule infinite, but it is "
                             f"{self.schedule}; leave them out, or take infinite")


# ---- schedules

def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Rate of step 0..total_steps-1: linear warm-up that never starts at zero, then the schedule, never below min_lr.

    The last step of the warm-up has all of lr, the last step of a falling schedule has min_lr, and steps after the
    end keep the end's rate. `infinite` up to its decay is a function of the step alone (`wsd` too with warmup_steps),
    so a run without decay can be prolonged, and any of its checkpoints continued by a run whose last decay_ratio
    begins there or later: up to the decay's first step, decay_start, the two have exactly the same rates.
    """
    warmup = warmup_length(total_steps, config)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return max(config.min_lr, SCHEDULES[config.schedule](step, total_steps, warmup, config))


def warmup_length(total_steps: int, config: OptimConfig) -> int:
    """Steps of the warm-up, at least 1: a warm-up of one step is none, that step has all of lr."""
    return max(1, round(config.warmup_ratio * total_steps) if config.warmup_steps is None else config.warmup_steps)


def progress(step: int, start: int, stop: int) -> float:
    """Share of the steps start..stop-1 that is done after `step`: 1 at the last of them and ever after."""
    return min(1.0, (step - start + 1) / max(1, stop - start))


def fall(high: float, low: float, done: float) -> float:
    """From high to low along half a cosine."""
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * done))


def cosine(step, total, warmup, config):
    return fall(config.lr, config.min_lr, progress(step, warmup, total))


def cosine_restarts(step, total, warmup, config):
    """Restarts at equal shares of the run (SGDR, arXiv 1608.03983); the warm-up takes the beginning of the first."""
    cycle = min(step, total - 1) * config.cycles // total
    start, stop = (-(-k * total // config.cycles) for k in (cycle, cycle + 1))               # rounded up
    return fall(config.lr, config.min_lr, progress(step, max(start, warmup), stop))


def linear(step, total, warmup, config):
    return config.min_lr + (config.lr - config.min_lr) * (1 - progress(step, warmup, total))


def inverse_sqrt(step, total, warmup, config):
    return config.lr * math.sqrt(warmup / max(warmup, min(step + 1, total)))


def constant(step, total, warmup, config):
    return config.lr


def wsd(step, total, warmup, config):
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395; 1-sqrt did better than linear in arXiv 2405.18392)."""
    return decayed(step, total, warmup, config, lambda step: config.lr)


def infinite(step, total, warmup, config):
    """Cooldown to a constant rate (arXiv 2403.08763 and 2503.02844, where the last fall is exponential; here it is
    config.decay)."""
    low = (config.lr + config.min_lr) / 2 if config.constant_lr is None else config.constant_lr
    return decayed(step, total, warmup, config,
                   lambda step: fall(config.lr, low, progress(step, warmup, warmup + config.cooldown_steps)))


def decayed(step, total, warmup, config, endless):
    """endless(step), and over the run's last share from there to min_lr."""
    start = decay_start(total, config)
    if start is None or step < start:
        return endless(step)
    left = 1 - DECAYS[config.decay](progress(step, start, total))
    return config.min_lr + (endless(start - 1) - config.min_lr) * left


def decay_start(total_steps: int, config: OptimConfig) -> int | None:
    """First step of the last decay of wsd and infinite, or None without one; checkpoints up to it can be continued."""
    if not config.decay_ratio:
        return None
    return max(warmup_length(total_steps, config), total_steps - max(1, round(config.decay_ratio * total_steps)))


SCHEDULES = {"cosine": cosine, "cosine_restarts": cosine_restarts, "linear": linear, "inverse_sqrt": inverse_sqrt,
             "constant": constant, "wsd": wsd, "infinite": infinite}
DECAYS = {"linear": lambda done: done, "cosine": lambda done: 0.5 - 0.5 * math.cos(math.pi * done),
          "1-sqrt": math.sqrt}                                       # share of the way down


SCHEDULE_FIELDS = {"schedule", "lr", "min_lr", "warmup_ratio", "warmup_steps", "cycles", "decay", "decay_ratio",
                   "cooldown_steps", "constant_lr"}                  # what decides the rates, and nothing else

# ---- recommended rates

SIZES = ((7e9, 1e-5), (13e9, 8e-6), (70e9, 5e-6))                    # parameters, peak rate to continue a pretraining
SCRATCH = 3e-4
METHODS = {"full": 1, "lora": 10, "scratch": 1}                      # multiples of the rate; LoRA: all its variants


def recommended(parameters: float, method: str = "full") -> tuple[float, float]:
    """(lr, min_lr) to start from, with 1 % of warm-up: 7B 1e-5, 13B 8e-6, 70B 5e-6, from scratch 3e-4, LoRA ten times
    that of the base, the floor a tenth. Other sizes lie on the straight lines through these in log-log, in one digit
    and never above the rate from scratch: outside 7B to 70B that is an extrapolation, to be tried at half and double.
    """
    if method not in METHODS or not parameters > 0:
        raise ValueError(f"no rate is known for {parameters} parameters with method {method!r}; the method is one of "
                         f"{', '.join(METHODS)}")
    (n0, lr0), (n1, lr1) = SIZES[:2] if parameters < SIZES[1][0] else SIZES[1:]
    lr = lr0 * (lr1 / lr0) ** (math.log(parameters / n0) / math.log(n1 / n0))
    lr = SCRATCH if method == "scratch" else min(SCRATCH, lr)
    return tuple(float(f"{lr * METHODS[method] / part:.0e}") for part in (1, 10))


def hint(parameters: float, method: str, config: OptimConfig) -> str:
    """One line that sets the configured rates beside the recommended ones."""
    lr, min_lr = recommended(parameters, method)
    return (f"learning rate: {config.schedule}, {config.lr:g} down to {config.min_lr:g}; recommended for "
            f"{parameters / 1e9:.3g}B parameters ({method}): {lr:g} down to {min_lr:g}")


# ---- optimizers

def make_optimizer(model: torch.nn.Module, config: OptimConfig,
                   lr_scales: dict[str, float] | None = None) -> torch.optim.Optimizer:
    """The optimizer of everything that may train: whatever has requires_grad now.

    To freeze for a while, freeze after this call: a parameter without gradient is passed over, it does not decay, it
    does not move by one bit, and state is made when its first gradient comes. To free the state of one that is frozen
    again: p.grad = None, optimizer.state.pop(p, None).

    Weight decay on tensors of two or more dimensions only. Each group carries "lr_scale", the multiple of the
    schedule's rate that it is to have: config.embedding_lr_scale for matrices outside model.shard_plan()'s blocks
    (embeddings and head), and the first of `lr_scales`, {name or pattern with *: multiple}, that a name matches, such
    as {"*.lora_B.*": 16.0}. Without a shard_plan all of the model is block.
    """
    lr_scales = lr_scales or {}
    names = [name for name, _ in model.named_parameters()]
    for pattern in lr_scales:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"a learning rate is set for {pattern!r}, but no parameter has such a name; names are "
                             f"like {names[0]} and {names[-1]}")
    blocks = model.shard_plan() if hasattr(model, "shard_plan") else [model]
    inside, members = {p for block in blocks for p in block.parameters()}, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            usual = config.embedding_lr_scale if p.ndim >= 2 and p not in inside else 1.0
            scale = next((x for pattern, x in lr_scales.items() if fnmatchcase(name, pattern)), usual)
            muon = config.name == "muon" and p.ndim == 2 and p in inside
            members.setdefault((muon, p.ndim >= 2, scale), []).append(p)
    groups = [{"params": params, "lr": config.lr * scale, "lr_scale": scale, "muon": muon,
               "weight_decay": config.weight_decay if decays else 0.0}
              for (muon, decays, scale), params in members.items()]
    settings = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.name != "adamw":
        return (Muon if config.name == "muon" else AdamW8bit)(groups, **settings)
    return torch.optim.AdamW(groups, **settings, fused=True)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments are 8-bit codes; bf16 weights keep the next 8 bits of their value beside them
    (kernels/adamw.py). Matrices of 32 n columns; the rest, norms and biases above all, has moments in fp32.

    state[p] holds tensors only, sharded like p where p is, so that a checkpoint fits any number of ranks.
    """

    def __init__(self, groups, lr: float, betas: tuple, eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.table = Table()

    @staticmethod
    def kind(p) -> str:
        moments = "int8" if p.ndim >= 2 and p.shape[-1] % 32 == 0 else "fp32"
        return moments + ("+ecc" if p.dtype == torch.bfloat16 else "")

    def begin(self, p) -> dict:
        state = {"step": torch.tensor(0.0)}
        for name, x in init_state(local(p), self.kind(p)).tensors().items():
            if isinstance(p, DTensor):           # scales have a 32nd of the columns and are sharded by rows as p is
                shape = p.shape if p.ndim == 1 else torch.Size((*p.shape[:-1], x.shape[-1]))
                stride = torch.empty(shape, device="meta").stride()
                x = DTensor.from_local(x, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)
            state[name] = x
        return state

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same = {}                                    # a parameter that thaws late is at a step of its own
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p] = self.state[p] or self.begin(p)
                    same.setdefault(int(self.state[p]["step"]) + 1, []).append(p)
            for step, params in same.items():
                states = []
                for p in params:
                    self.state[p]["step"] = torch.tensor(float(step))
                    tensors = {name: local(x) for name, x in self.state[p].items() if name != "step"}
                    states.append(State(self.kind(p), **tensors))
                adamw_([local(p) for p in params], [local(p.grad) for p in params], states, group["lr"],
                       group["betas"], group["eps"], group["weight_decay"], step, self.table)

    def load_state_dict(self, state_dict):
        """As torch's, which would turn the codes into numbers of the parameters' dtype."""
        super().load_state_dict(state_dict)
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(numbers, [p for group in self.param_groups for p in group["params"]]):
            if i in state_dict["state"]:
                self.state[p] = {name: x.clone() if name == "step" else x.to(p.device, copy=True)
                                 for name, x in state_dict["state"][i].items()}


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan, 2024, kellerjordan.github.io/posts/muon) for the groups marked "muon", matrices [rows, columns]:

        m += 0.05 (g - m)    o = orthogonalise(g + 0.95 (m - g))    w -= lr decay w + lr 0.2 sqrt(max(rows, columns)) o

    and torch's fused AdamW for the others. The factor 0.2 sqrt(max) gives an update the root mean square of AdamW's,
    so that rates and decay found for AdamW hold (Moonlight, arXiv 2502.16982). torch.optim.Muon computes the same, but
    takes nothing but matrices, and sharded ones apart in every product; here a sharded matrix is gathered once, every
    rank orthogonalises all of it, and keeps its rows. state[p] is {"momentum"}, fp32, sharded like p.
    """

    MOMENTUM = 0.95

    def __init__(self, groups, **settings):
        self.adamw = torch.optim.AdamW(groups, **settings, fused=True)
        super().__init__(self.adamw.param_groups, self.adamw.defaults)

    @torch.no_grad()
    def step(self):
        self.adamw.state = self.state
        self.adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self.adamw.step()
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else []:
                if p.grad is not None:
                    self.update(p, group["lr"], group["weight_decay"])

    def update(self, p, lr: float, decay: float):
        if not self.state[p]:
            self.state[p]["momentum"] = torch.zeros_like(p)
        grad, momentum = local(p.grad), local(self.state[p]["momentum"])
        momentum.lerp_(grad, 1 - self.MOMENTUM)
        step = grad.lerp(momentum, self.MOMENTUM)                    # Nesterov's
        if isinstance(p, DTensor):
            step = DTensor.from_local(step, p.device_mesh, p.placements, run_check=False, shape=p.shape,
                                      stride=p.stride()).full_tensor()
        step = orthogonalise(step)
        if isinstance(p, DTensor):                                   # every rank has the whole: nothing is sent
            step = distribute_tensor(step, p.device_mesh, p.placements, src_data_rank=None).to_local()
        local(p).mul_(1 - lr * decay).add_(step, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Near U V^T of the matrix U S V^T [rows, columns]: five steps of Newton and Schulz's iteration with Jordan's
    quintic, which take singular values of 0.002 to 1 times the Frobenius norm to between 0.68 and 1.21. In bf16, as
    published (float64 stays float64).
    """
    x = matrix if matrix.dtype == torch.float64 else matrix.bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    tall = len(matrix) > matrix.shape[1]
    x = x.mT if tall else x                                          # the smaller of the two Gram matrices
    for _ in range(5):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrix.dtype)


def local(x: torch.Tensor) -> torch.Tensor:
    """This rank's share of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x.detach()


class LossScale:
    """Dynamic loss scaling for fp16: halved after a step whose gradients overflow, doubled after 2,000 that do not."""

    def __init__(self, enabled: bool):
        self.enabled, self.scale, self.good_steps = enabled, 2.0**16 if enabled else 1.0, 0

    def update(self, norm: float) -> bool:
        """Take note of a step's gradient norm; False where the step must be left out."""
        finite = math.isfinite(norm)
        if not self.enabled:
            return finite
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps % 2000 == 0:
            self.scale *= 2
        return finite

    def state_dict(self) -> dict:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict):
        self.scale, self.good_steps = state["scale"], state["good_steps"]
