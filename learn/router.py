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
        # Of a model in stages the last one has the sums of all.
        self.layers = find_sparse(getattr(model, "whole", model))
        if not self.layers:
            raise UserError("router.balance and router.z are for models with experts (Mixtral, Qwen3-MoE), and this "
                            "one has none; leave them out")
        if not any(layer.gate.weight.requires_grad for layer in self.layers):
            raise UserError("router.balance and router.z train the router, which is frozen in this run; leave them out")
        self.seen = []

    def loss_computed(self, model, batch, loss, metrics):
        matmuls = self.learning.world.matmuls
        # The router sees the tokens of all ranks that share its matmul.
        labels, ranks = (matmuls.join_tokens(batch.labels), matmuls.ranks) if matmuls else (batch.labels, 1)
        counted = labels != IGNORE
        sums = model.carried if self.learning.world.pipe else self.sum_layers(model, counted)
        balance, z = moe.router_losses(sums)
        self.seen.append(torch.stack([balance.detach(), z.detach()]))
        return loss + counted.sum() / ranks * (self.config.balance * balance + self.config.z * z)

    def before_step(self, step, model):
        values, world = torch.stack(self.seen).mean(0).tolist(), self.learning.world
        self.seen.clear()
        # All but the last stages have seen 0.
        values = [value / world.peers[1] for value in world.sum(values)] if world.pipe else values
        return dict(zip(("router_balance", "router_z"), values))

    def measure_stage(self, stage, counted):
        """`sum_layers` of a stage of a pipeline; counted: of this rank's tokens."""
        matmuls = self.learning.world.matmuls
        return self.sum_layers(stage, matmuls.join_tokens(counted.int()).bool() if matmuls else counted)

    def sum_layers(self, part, counted):
        """[2 E + 1] of the layers that a part of the model has; they add up over its parts. counted: bool [B, T]."""
        logits = [layer.logits for layer in find_sparse(part)]
        first = self.layers[0]
        if not logits:
            return torch.zeros(2 * len(first.gate.weight) + 1, device=counted.device)
        return moe.sum_layers(logits, first.per_token, counted.flatten(), len(self.layers))


def find_sparse(model) -> list[moe.SparseMLP]:
    return [module for module in model.modules() if isinstance(module, moe.SparseMLP)]
