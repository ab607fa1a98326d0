"""Optimizers by their parameter groups: torch's AdamW in full, AdamW with 8-bit moments, and Muon; fp16's loss scale.

learn/schedules.py has the learning rate, which train.py sets in every step. State is made per parameter when its first
gradient comes, holds tensors only and is sharded like the parameter, so that a checkpoint fits any number of ranks.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch.distributed.tensor import DTensor

from core.config import setting
from core.sharding import distribute_like, gather
from kernels.adamw import adamw_, init_state
from learn.schedules import ScheduleConfig


@dataclass
class OptimConfig(ScheduleConfig):
    name: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """adamw: fp32 weights and moments, 16 bytes per parameter with its gradient. adamw_8bit: 8-bit moments, and with
    precision bf16 weights in bf16 + 8 bits of correction, 7 bytes. muon: orthogonalised momentum for the blocks'
    matrices, 12 bytes, and AdamW for the rest, at the same rates"""
    beta1: float = setting(0.9, at_least=0, below=1)
    beta2: float = setting(0.95, at_least=0, below=1)
    eps: float = setting(1e-8, at_least=0, at_most=1)
    weight_decay: float = setting(0.1, at_least=0, at_most=1e3)
    """on matrices and embeddings; norms and biases have none"""
    embedding_lr_scale: float = setting(1.0, above=0, at_most=1e6)
    """learning rate of embeddings and head as a multiple of that of the blocks"""
    clip: float = setting(1.0, at_least=0, at_most=1e9)
    """largest global gradient norm; 0: no clipping"""


def make_optimizer(model: torch.nn.Module, config: OptimConfig, lr_scales: dict | None = None) -> torch.optim.Optimizer:
    """The optimizer of everything that has requires_grad now.

    A parameter that is frozen later and has no gradient is passed over: it does not decay and keeps every bit. Weight
    decay is on tensors of two or more dimensions only. Each group carries "lr_scale", its multiple of the schedule's
    rate: that in `lr_scales` {parameter name: multiple}, else config.embedding_lr_scale for matrices outside
    model.shard_plan()'s blocks (embeddings and head), else 1. Without a shard_plan all of the model is block.
    """
    lr_scales, groups = lr_scales or {}, {}
    unknown = lr_scales.keys() - dict(model.named_parameters()).keys()
    assert not unknown, f"a learning rate is set for {unknown}, and no parameter has such a name"
    blocks = model.shard_plan() if hasattr(model, "shard_plan") else [model]
    in_blocks = {p for block in blocks for p in block.parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays, outside = p.ndim >= 2, p not in in_blocks
            scale = lr_scales.get(name, config.embedding_lr_scale if decays and outside else 1.0)
            muon = config.name == "muon" and p.ndim == 2 and not outside
            group = {"params": [], "lr": config.lr * scale, "lr_scale": scale, "muon": muon,
                     "weight_decay": config.weight_decay if decays else 0.0}
            groups.setdefault((muon, decays, scale), group)["params"].append(p)
    kind = {"adamw": partial(torch.optim.AdamW, fused=True), "adamw_8bit": AdamW8bit, "muon": Muon}[config.name]
    # A stage of a pipeline may have nothing that trains.
    nothing = {"params": [], "lr": config.lr, "lr_scale": 1.0, "muon": False, "weight_decay": 0.0}
    return kind(list(groups.values()) or [nothing], lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments are 8-bit codes; bf16 weights keep the next 8 bits of their value beside them
    (kernels/adamw.py). Only matrices of 32 n columns have codes; norms, biases and the like have moments in fp32.
    core/sharding.py saves and loads its state: torch's load_state_dict would cast codes to the parameter's dtype."""

    def __init__(self, groups, lr: float, betas: tuple, eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.table = {}

    @staticmethod
    def kind(p) -> str:
        """The kind of state that kernels/adamw.py keeps of a parameter."""
        moments = "int8" if p.ndim >= 2 and p.shape[-1] % 32 == 0 else "fp32"
        return moments + ("+ecc" if p.dtype == torch.bfloat16 else "")

    def make_state(self, p) -> dict:
        state = {"step": torch.tensor(0.0)}
        for name, x in init_state(local(p), self.kind(p)).items():
            if isinstance(p, DTensor):
                # A scale stands for 32 columns, so scales have fewer columns, and are sharded like the parameter.
                shape = p.shape if p.ndim == 1 else torch.Size(
                    (*p.shape[:-1], x.shape[-1] * p.shape[-1] // local(p).shape[-1]))
                stride = torch.empty(shape, device="meta").stride()
                x = DTensor.from_local(x, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)
            state[name] = x.to(p.device)
        return state

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # Parameters that were frozen at first have made fewer steps than the others of their group.
            params_by_step = {}
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p] = self.state[p] or self.make_state(p)
                    params_by_step.setdefault(int(self.state[p]["step"]) + 1, []).append(p)
            for step, params in params_by_step.items():
                states = []
                for p in params:
                    self.state[p]["step"] = torch.tensor(float(step))
                    states.append({name: local(x) for name, x in self.state[p].items() if name != "step"})
                adamw_([local(p) for p in params], [local(p.grad) for p in params], states, group["lr"],
                       group["betas"], group["eps"], group["weight_decay"], step, self.table)


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan, 2024, kellerjordan.github.io/posts/muon) for the groups marked "muon", matrices [rows, columns]:

        m += 0.05 (g - m)    o = orthogonalise(g + 0.95 (m - g))    w -= lr decay w + lr 0.2 sqrt(max(rows, columns)) o

    and torch's fused AdamW for the others. The factor 0.2 sqrt(max) gives an update the root mean square of AdamW's,
    so that rates and decay found for AdamW hold (Moonlight, arXiv 2502.16982). torch.optim.Muon computes the same, but
    it takes nothing but matrices and communicates in every matmul of a sharded one. Here a sharded matrix is gathered
    once, every rank orthogonalises all of it and keeps its rows. state[p] is {"momentum"}, fp32.
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
        momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - self.MOMENTUM)
        # Nesterov's look ahead.
        step = p.grad.lerp(momentum, self.MOMENTUM)
        # Every rank has the full matrix, so taking this rank's rows of it sends nothing.
        step = distribute_like(orthogonalise(gather(step)), p, step.dtype)
        p.mul_(1 - lr * decay).add_(step, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Approximately U V^T for the matrix U S V^T [rows, columns]: five steps of the Newton-Schulz iteration with
    Jordan's quintic, which take singular values of 0.002 to 1 times the Frobenius norm to between 0.68 and 1.21. In
    bf16, as published (float64 stays float64)."""
    x = matrix if matrix.dtype == torch.float64 else matrix.bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    # A tall matrix is transposed, because then its Gram matrix is the smaller of the two.
    tall = len(matrix) > matrix.shape[1]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrix.dtype)


def local(x: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor, or all of one that is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x.detach()


class LossScale:
    """Dynamic loss scaling for fp16: halved after a step whose gradients overflow, doubled after 2,000 that do not."""

    def __init__(self, enabled: bool):
        self.enabled, self.scale, self.good_steps = enabled, 2.0**16 if enabled else 1.0, 0

    def unscale_(self, model):
        """Divide the model's gradients by the scale that their loss was multiplied with."""
        if self.enabled:
            torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 1.0 / self.scale)

    def overflowed(self, loss: float, norm: float) -> bool:
        """Whether a gradient norm is not finite because of the scale, which a lower scale mends."""
        return self.enabled and self.scale > 1 and math.isfinite(loss) and not math.isfinite(norm)

    def update(self, norm: float) -> bool:
        """Adjusts the scale to a step's gradient norm; False where it is not finite and the update must be skipped."""
        finite = math.isfinite(norm)
        if self.enabled:
            self.good_steps = self.good_steps + 1 if finite else 0
            if not finite:
                self.scale /= 2
            elif self.good_steps % 2000 == 0:
                self.scale *= 2
        return finite
