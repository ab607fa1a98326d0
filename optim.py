"""AdamW with parameter groups, and the learning rate as a pure function of the step."""

import math
from dataclasses import dataclass

import torch


@dataclass
class OptimConfig:
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


def make_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over what is trainable; weight decay on tensors of two or more dimensions only."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2),
                             eps=config.eps, fused=True)


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
