"""What a router of experts (moe.py) is trained with beside the objective: balance over the experts, and small logits.

    loss = objective + targets * (balance * balance_loss + z * z_loss)

in nats summed over targets, so that both weigh the same at any batch size. They are computed per micro-batch and rank,
as elsewhere in the field: the balance of a whole step's tokens is another one.
"""

from dataclasses import dataclass

import torch

import moe
from core.config import setting
from core.errors import UserError
from kernels.cross_entropy import IGNORE
from learn.method import Method


@dataclass
class RouterConfig:
    balance: float = setting(0.0, at_least=0)
    """weight of the balance loss; 0: off. Mixtral and Qwen3-MoE were pretrained with 0.02 and 0.001 or so"""
    z: float = setting(0.0, at_least=0)
    """weight of the z-loss; 0: off. ST-MoE took 0.001"""


class Router(Method):
    def model_built(self, model):
        self.layers = [module for module in model.modules() if isinstance(module, moe.SparseMLP)]
        if not self.layers:
            raise UserError("router.balance and router.z are for models with experts (Mixtral, Qwen3-MoE), and this "
                            "one has none; leave them out")
        if not any(layer.gate.weight.requires_grad for layer in self.layers):
            raise UserError("router.balance and router.z train the router, which is frozen in this run; leave them out")
        self.seen = []

    def loss_computed(self, model, batch, loss, metrics):
        logits, k = [layer.logits for layer in self.layers], self.layers[0].per_token
        counted = (batch.labels != IGNORE).flatten()
        balance, z = moe.balance_loss(logits, k, counted), moe.z_loss(logits, counted)
        self.seen.append(torch.stack([balance.detach(), z.detach()]))
        return loss + counted.sum() * (self.config.balance * balance + self.config.z * z)

    def before_step(self, step, model):
        balance, z = torch.stack(self.seen).mean(0).tolist()
        self.seen.clear()
        return {"router_balance": balance, "router_z": z}
