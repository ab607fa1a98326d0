"""AdamW with parameter groups, in full or with 8-bit moments, and the learning rate as a function of the step."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.tensor import DTensor

from kernels.adamw import State, Table, adamw_, init_state


@dataclass
class OptimConfig:
    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw: fp32 weights and moments, 16 bytes a parameter with its gradient; adamw_8bit: 8-bit moments, and with
    precision bf16 weights in bf16 + 8 bits of correction, 7 bytes"""
    lr: float = 1e-5
    """peak learning rate (7B: 1e-5, 13B: 8e-6, 70B: 5e-6; from scratch about 3e-4)"""
    min_lr: float = 1e-6
    """where the cosine ends"""
    warmup_ratio: float = 0.01
    """share of the run over which the rate rises"""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """on matrices and embeddings; norms and biases have none"""
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
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"optim.warmup_ratio is {self.warmup_ratio}, but must be a share between 0 and 1")


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Rate of step 0..total_steps-1: linear warm-up that never starts at zero, then a cosine to min_lr, held after."""
    warmup = max(1, round(config.warmup_ratio * total_steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup + 1) / max(1, total_steps - warmup))
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress))


def make_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over what is trainable; weight decay on tensors of two or more dimensions only."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    settings = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.name == "adamw_8bit":
        return AdamW8bit(groups, **settings)
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
    def step(self, grad_scale=1.0):
        """grad_scale: what gradients are multiplied by on the way, a number or a device tensor of one element."""
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
                       group["betas"], group["eps"], group["weight_decay"], step, grad_scale, self.table)

    def load_state_dict(self, state_dict):
        """As torch's, which would turn the codes into numbers of the parameters' dtype."""
        super().load_state_dict(state_dict)
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(numbers, [p for group in self.param_groups for p in group["params"]]):
            if i in state_dict["state"]:
                self.state[p] = {name: x.clone() if name == "step" else x.to(p.device, copy=True)
                                 for name, x in state_dict["state"][i].items()}


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
