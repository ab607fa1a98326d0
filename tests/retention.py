"""A toy model of twelve blocks, its batches, and the loop's hooks in their order: for tests of retention methods."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import forget
from core import parallel
from forget import ForgetConfig
from learn.method import Learning

ONE = parallel.World(0, 1, torch.device("cpu"))


@dataclass
class Batch:
    tokens: torch.Tensor
    labels: torch.Tensor
    source: np.ndarray

    def to(self, device):
        return self


class Toy(nn.Module):
    """Twelve blocks, so that layers.1 has a layers.10 beside it."""

    def __init__(self, blocks=12, vocabulary=11, size=6, tied=False, dtype=torch.float64):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, size)
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(blocks))
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed_tokens.weight
        self.to(dtype)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.norm(x)


def forward(model, batch):
    return model(batch.tokens)


def toy(seed=0, **options) -> Toy:
    torch.manual_seed(seed)
    return Toy(**options)


def some_batch(seed=0, rows=4, length=5, vocabulary=11, general=1, ignored=True) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(0, vocabulary, (rows, length), generator=generator) for _ in range(2))
    if ignored:
        for row in range(rows):
            labels[row, :row % length] = -100                # sequences of different lengths
    return Batch(tokens, labels, np.array([general if row % 2 else 0 for row in range(rows)]))


def cross_entropy(model, batch) -> torch.Tensor:
    logits = model(batch.tokens) @ model.head.weight.T
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum")


class UnreadText:
    """General text for a run that already has its Fisher, and must not estimate it again."""

    def __iter__(self):
        raise AssertionError("the Fisher is stored")


def learning(**known) -> Learning:
    """What the methods know of a run of 10 steps on one rank, whose general source is number 1."""
    return Learning(**{"steps": 10, "seed": 0, "world": ONE, "forward": forward, "general_text": [some_batch()],
                       "general_sources": frozenset([1])} | known)


def methods(built=None, **settings):
    """The methods of these settings; the rest is what they know of the run."""
    keys = {f.name for f in dataclasses.fields(ForgetConfig)}
    chosen = ForgetConfig(**{key: settings.pop(key) for key in keys & settings.keys()})
    made = forget.build(chosen, learning(**settings))
    for method in made if built is not None else ():
        method.model_built(built)
    return made


def step_of(model, optimizer, made, step, batch):
    """What the loop does with the hooks."""
    hidden = forward(model, batch)
    logits = hidden @ model.head.weight.T
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum")
    for method in made:
        loss = method.loss_computed(model, batch, loss, {"hidden": hidden})
    (loss / (batch.labels != -100).sum()).backward()
    numbers = {}
    for method in made:
        numbers |= method.before_step(step, model)
    optimizer.step()
    for method in made:
        method.after_step(step, model, optimizer)
    optimizer.zero_grad(set_to_none=True)
    return numbers


def bits(model) -> dict:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
