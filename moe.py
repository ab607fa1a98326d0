"""The MLP of Mixtral (arXiv 2401.04088) and Qwen3-MoE (2505.09388): a router sends each token to a few of E experts.

    scores  = softmax(router(x)), fp32                        each token goes to the k experts with the greatest scores
    y       = sum over its k experts of weight * expert(x)    weight: the score, divided by the sum of the k scores
                                                              where `norm_topk_prob` says so (Mixtral: always)

The experts' MLPs are SwiGLU, as in model.py. The tokens are sorted by expert, so that all experts are three grouped
matmuls (kernels/grouped_mm.py), and no token is dropped: there is no capacity.

Example: k = 2, scores 0.5, 0.3, 0.2. The token goes to experts 0 and 1 with the weights 0.5 / 0.8 and 0.3 / 0.8.

Shapes: B sequences, T tokens, N = B T tokens of a batch, k experts of a token, D model width, F width of an expert's
MLP, E experts.
"""

import torch
from torch import nn

import kernels


class ExpertLinear(nn.Module):
    """A linear layer of every expert: weight [E, out, in]."""

    def __init__(self, experts: int, width_in: int, width_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width_out, width_in))

    def forward(self, x, offsets):
        """x [n, in], sorted by expert; offsets [E] int32: where each expert's tokens end -> [n, out]"""
        return kernels.grouped_mm(x, self.weight, offsets)


class Experts(nn.Module):
    def __init__(self, experts: int, D: int, F: int):
        super().__init__()
        self.gate_proj = ExpertLinear(experts, D, F)
        self.up_proj = ExpertLinear(experts, D, F)
        self.down_proj = ExpertLinear(experts, F, D)

    def forward(self, x, offsets):
        """x [n, D], sorted by expert -> [n, D]"""
        return self.down_proj(kernels.swiglu(self.gate_proj(x, offsets), self.up_proj(x, offsets)), offsets)


class Router(nn.Module):
    """No nn.Linear, because adapters are attached to those, and low-rank changes of a router are seldom meant."""

    def __init__(self, D: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, D))

    def forward(self, x):
        """x [N, D] -> logits [N, E]"""
        return nn.functional.linear(x, self.weight)


class SparseMLP(nn.Module):
    """Stands in a block in the place of its MLP. In training `logits` [N, E] keeps what the router said last, for the
    losses below."""

    def __init__(self, config):
        super().__init__()
        self.per_token, self.normalised = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Router(config.hidden_size, config.num_experts)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
        self.logits = None

    def forward(self, x):
        """x [B, T, D] -> [B, T, D]"""
        tokens = x.flatten(0, 1)
        logits = self.gate(tokens)
        self.logits = logits if self.training else None
        weights, chosen = choose_experts(logits, self.per_token, self.normalised)           # [N, k]
        order = chosen.flatten().argsort(stable=True)                                       # [N k], by expert
        y = self.experts(tokens[order // self.per_token], find_ends(chosen, logits.shape[1]))
        # Back in the order of the tokens, and summed over k in a fixed order: two runs on a GPU agree bitwise, which
        # they would not if each row were added to its token.
        y = y[order.argsort()].unflatten(0, (-1, self.per_token))                           # [N, k, D]
        return (y * weights.unsqueeze(-1)).sum(1).to(x.dtype).view_as(x)


def choose_experts(logits, k: int, normalised: bool):
    """(weights [N, k] fp32, indices of the experts [N, k]) by the router's logits [N, E]; the greatest first."""
    weights, chosen = logits.float().softmax(-1).topk(k)
    return weights / weights.sum(-1, keepdim=True) if normalised else weights, chosen


def find_ends(chosen, experts: int):
    """[E] int32: where the tokens of each expert end, once they are sorted. No host waits for it."""
    counts = torch.zeros(experts, dtype=torch.int32, device=chosen.device)
    ones = torch.ones((), dtype=torch.int32, device=chosen.device).expand(chosen.numel())
    return counts.scatter_add_(0, chosen.flatten(), ones).cumsum(0, dtype=torch.int32)


# ---- what keeps a router in order

def balance_loss(logits: list, k: int, counted=None):
    """E * sum over experts of (assignments per token) * (mean score): k where the experts are used evenly, and E where
    one has it all (Switch Transformer, arXiv 2101.03961, eq. 4 to 6, over all layers together, as in transformers).

    logits: of each layer [N, E]. counted: which tokens count, bool [N]; None: all, and 0 where none does.
    """
    return router_losses(sum_layers(logits, k, counted))[0]


def z_loss(logits: list, counted=None):
    """The mean of (log of the sum of exp(logits))^2, which keeps logits small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return router_losses(sum_layers(logits, 1, counted))[1]


def sum_layers(logits: list, k: int, counted=None, layers: int | None = None):
    """[2 E + 1]: of each expert its assignments per token and its mean score, and the mean that z_loss is. Those of
    some of the `layers` that a model has add up to those of all. Other arguments as in `balance_loss`."""
    logits = torch.stack(logits).float()                                                    # [layers, N, E]
    scores = logits.softmax(-1)
    used = torch.zeros_like(scores).scatter_(-1, scores.topk(k).indices, 1.0)
    counted = torch.ones(logits.shape[1:2], device=logits.device) if counted is None else counted.float()
    # With it, a sum over layers and tokens is the mean over those that count. Weights, because to pick tokens a GPU's
    # host would have to know how many there are.
    weight = (counted / ((layers or len(logits)) * counted.sum().clamp(min=1))).unsqueeze(-1)
    z = (logits.logsumexp(-1, keepdim=True).square() * weight).sum()
    return torch.cat([(used * weight).sum((0, 1)), (scores * weight).sum((0, 1)), z.unsqueeze(0)])


def router_losses(sums):
    """(balance loss, z-loss) of what `sum_layers` gave for all layers, [2 E + 1]."""
    used, scores = sums[:-1].chunk(2)
    return len(used) * (used * scores).sum(), sums[-1]
