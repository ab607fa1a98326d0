"""A mixture of objectives: each sequence is learned in one of several ways (as in UL2, arXiv 2205.05131, or FIM,
2207.14255), and losses and counts add up.

    weights causal 3, masked 1      sequence 0: causal    1: causal    2: masked    3: causal    ...

Which way is a function of the sequence's place in the data, drawn by the weights: the same on any number of ranks and
in any micro-batch, and another in another epoch. A batch is parted by it, and each part is corrupted and scored by its
own objective. The loss is the mean over the targets of all of them, so that a way with few targets a sequence, such as
masking, counts for little; `NAME/loss` says how each fares.

Members are those that learn from the text of one sequence with the model's own head. ELECTRA is none, because it trains
a second model, nor are selective loss and preferences, whose losses are of a choice of tokens or of pairs.

Shapes: B sequences, T tokens, D model width.
"""

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch

from core.config import setting
from core.errors import UserError
from data import RowRandom
from kernels.cross_entropy import IGNORE
from learn.infilling import Rewritten
from learn.method import take_sequences
from learn.objectives import Objective

# Of the random values of a sequence, the one that chooses its objective; the objectives themselves use those below.
CHOICE = 1000


@dataclass
class Weights:
    causal: float = setting(0.0, at_least=0, at_most=1e6)
    """mixture: share of the sequences that are learned so, beside the other weights"""
    masked: float = setting(0.0, at_least=0, at_most=1e6)
    """mixture: the same of masked"""
    span: float = setting(0.0, at_least=0, at_most=1e6)
    """mixture: the same of span"""
    ul2: float = setting(0.0, at_least=0, at_most=1e6)
    """mixture: the same of ul2"""
    fim: float = setting(0.0, at_least=0, at_most=1e6)
    """mixture: the same of fim"""


class Mixture(Objective):
    def __init__(self, members: dict[str, Objective], weights: dict[str, float]):
        """members, weights: {name: objective}, {name: its share, not necessarily of 1}."""
        if len(members) < 2:
            raise UserError("objective mixture needs two objectives or more; set e.g. --objective.weights.causal 3 "
                            "--objective.weights.masked 1")
        self.members, self.sharded = members, False
        shares = np.array([weights[name] for name in members])
        self.bounds = np.cumsum(shares / shares.sum())[:-1]
        self.causal = any(member.causal for member in members.values())
        self.mask_documents = all(member.mask_documents for member in members.values())
        self.measures = tuple(f"{name}/{measure}" for name, member in members.items()
                              for measure in ("share", "loss", *member.measures))

    @property
    def shift(self) -> int:
        return max(member.shift for member in self.members.values())

    @property
    def token_ids(self):
        return [[name, *member.token_ids] for name, member in self.members.items()]

    @property
    def text_objective(self):
        """Text is scored as causal where one of them is."""
        found = [member.text_objective for member in self.members.values()]
        return next((objective for objective in found if objective.causal), found[0])

    def text_length(self, context):
        # Of a member whose targets stand less far behind their inputs, a sequence here has so many tokens more.
        found = [(member.text_length(context), self.shift - member.shift) for member in self.members.values()]
        return min(n - more if n < context else n for n, more in found)

    def part_documents(self):
        parted = copy.copy(self)
        parted.members = {name: member.part_documents() for name, member in self.members.items()}
        return parted

    def model_built(self, model, learning):
        self.sharded = learning.sharded
        for member in self.members.values():
            member.model_built(model, learning)

    def parts(self, batch) -> list:
        """(name, member, int64 [b] the numbers of its sequences in the batch, in their order) of each member."""
        return [(*item, np.flatnonzero(batch.task == i)) for i, item in enumerate(self.members.items())]

    def corrupt(self, batch, rng):
        drawn = rng.uniform(CHOICE, 1)[:, 0].double().numpy()
        batch = replace(batch, task=np.searchsorted(self.bounds, drawn, "right"))
        made = [(rows, member.corrupt(take_sequences(batch, rows), RowRandom(rng.keys[rows])))
                for _, member, rows in self.parts(batch) if len(rows)]
        back, parts = put_back([rows for rows, _ in made]), [as_rewritten(part) for _, part in made]
        tensors = {name: torch.cat([getattr(part, name) for part in parts])[back]
                   for name, value in vars(parts[0]).items() if isinstance(value, torch.Tensor)}
        return Rewritten(**vars(batch) | tensors)

    def count(self, batch) -> int:
        return sum(member.count(take_sequences(batch, rows)) for _, member, rows in self.parts(batch) if len(rows))

    def hidden_states(self, model, batch):
        parts = [(member, rows) for _, member, rows in self.parts(batch) if len(rows)]
        found = [member.hidden_states(model, take_sequences(batch, rows)) for member, rows in parts]
        return torch.cat(found)[put_back([rows for _, rows in parts])]

    def loss(self, model, batch, want_hits=False):
        device, total, count, scored, measures = batch.tokens.device, 0.0, 0, [], {}
        nothing = torch.zeros((), device=device)
        for name, member, rows in self.parts(batch):
            if len(rows):
                loss, n, metrics = member.loss(model, take_sequences(batch, rows), want_hits)
                scored.append((rows, metrics))
            elif self.sharded:
                # All ranks must gather the weights equally often, so one without such sequences scores one for nothing.
                idle = take_sequences(batch, [0])
                loss, n, _ = member.loss(model, replace(idle, labels=torch.full_like(idle.labels, IGNORE)))
            else:
                loss, n = nothing, nothing
            total, count = total + loss, count + n
            share = torch.tensor([float(len(rows)), float(len(batch.tokens))], device=device)
            found = {"share": tuple(share), "loss": (torch.as_tensor(loss).detach(), n)} | {
                measure: metrics["measures"][measure] if len(rows) else (nothing, nothing)
                for measure in member.measures}
            measures |= {f"{name}/{measure}": pair for measure, pair in found.items()}
        back = put_back([rows for rows, _ in scored])
        metrics = {key: torch.cat([part[key] for _, part in scored])[back]
                   for key in ("token_loss", "sequence_loss", "sequence_targets", "hidden")}
        if want_hits:
            metrics["hits"] = sum(part["hits"] for _, part in scored)
        return total, count, metrics | {"measures": measures}


def put_back(rows: list[np.ndarray]) -> torch.Tensor:
    """int64 [B]: where, of the parts one behind the other, each sequence of the batch is."""
    return torch.from_numpy(np.argsort(np.concatenate(rows)))


def as_rewritten(batch) -> Rewritten:
    """A corrupted batch with what infilling says of one; of other batches there is nothing to say."""
    if isinstance(batch, Rewritten):
        return batch
    none = torch.zeros(len(batch.tokens), dtype=torch.int64)
    return Rewritten(**vars(batch), part=torch.zeros_like(batch.tokens), read=none, cut=none)
