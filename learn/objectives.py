"""What is learned from a sequence: `corrupt` makes inputs and targets of it, `loss` scores a model on them.

The loader's batches have T + 1 tokens, and labels equal to the tokens. `corrupt` shifts (once, here) or masks them and
leaves T. A loss is a sum over the targets that count; the caller divides by the count of the whole step.

Shapes: B sequences, T tokens, D model width, V vocabulary, S sources.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from core.config import setting
from core.errors import UserError
from kernels.cross_entropy import IGNORE, linear_cross_entropy


@dataclass
class ObjectiveConfig:
    name: Literal["causal", "masked"] = "causal"
    """causal: predict the next token; masked: predict masked tokens from both sides"""
    mask_ratio: float = setting(0.15, above=0, at_most=1)
    """masked: share of the positions that are predicted"""
    mask_token_id: int | None = setting(None, at_least=0, below=2**31)
    """masked: id that stands for a masked token; default: the tokenizer's mask token"""
    z_loss: float = setting(0.0, at_least=0, at_most=1e3)
    """weight of logsumexp(logits)^2 per target, which keeps logits from growing (PaLM, arXiv 2204.02311: 1e-4); it
    counts in training losses and not in evaluations"""


class Objective:
    """The loss, which all objectives share. Each has its own corrupt(batch [B, T + 1], rng) -> the batch as inputs and
    targets [B, T], where rng holds the batch's random values (data.RowRandom)."""

    causal: bool
    """whether attention sees only the tokens before"""

    @property
    def shift(self) -> int:
        """How far a target stands behind the input that predicts it."""
        return int(self.causal)

    def __init__(self, mask_documents: bool, z_loss: float = 0.0):
        self.mask_documents, self.z_loss = mask_documents, z_loss

    def hidden_states(self, model, batch) -> torch.Tensor:
        """[B, T, D] of a corrupted batch, seen as the objective sees it: both ways or not, across documents or not."""
        doc_start = batch.doc_start if self.mask_documents else None
        return model(batch.tokens, batch.position_ids, doc_start, self.causal)

    def loss(self, model, batch, want_hits: bool = False):
        """(nats summed over the targets, their number, metrics) of a corrupted batch.

        metrics: "token_loss" [B, T], 0 where there is no target; "sequence_loss" [B] and "sequence_targets" [B], the
        sums per sequence; "hidden" [B, T, D], part of the graph; with want_hits "hits", the number of targets that have
        the largest logit.
        """
        hidden = self.hidden_states(model, batch)
        # Under DDP the model stands inside its wrapper.
        head = getattr(model, "module", model).head
        loss, token_loss, hits = linear_cross_entropy(hidden, head.weight, batch.labels, want_hits,
                                                      z_loss=self.z_loss if model.training else 0.0)
        valid = batch.labels != IGNORE
        metrics = {"token_loss": token_loss, "sequence_loss": token_loss.sum(1), "sequence_targets": valid.sum(1),
                   "hidden": hidden}
        if want_hits:
            metrics["hits"] = hits.sum()
        return loss, valid.sum(), metrics


class Causal(Objective):
    """Mean of -log p(token t + 1 | tokens up to t).

    Where attention stays inside documents, the first token of a document has nothing to be predicted from and is no
    target: of the documents [a b c] [d e] in one sequence, the targets of a b c d are b c - e.
    """

    causal = True

    def corrupt(self, batch, rng):
        targets = batch.labels[:, 1:]
        if self.mask_documents:
            position = torch.arange(1, batch.tokens.shape[1], dtype=torch.int32)
            targets = torch.where(batch.doc_start[:, 1:] == position, IGNORE, targets)
        return replace(batch, tokens=batch.tokens[:, :-1], labels=targets, position_ids=batch.position_ids[:, :-1],
                       doc_start=batch.doc_start[:, :-1])


class Masked(Objective):
    """BERT's masking (arXiv 1810.04805): of the chosen positions 80 % become the mask token, 10 % a random token and
    10 % stay; only they are targets. Special tokens are never chosen and never put in at random."""

    causal = False

    def __init__(self, mask_documents: bool, mask_id: int, special_ids, vocab_size: int, mask_ratio: float = 0.15,
                 z_loss: float = 0.0):
        super().__init__(mask_documents, z_loss)
        self.mask_id, self.mask_ratio = mask_id, mask_ratio
        special = {*special_ids, mask_id}
        self.special = torch.tensor(sorted(special), dtype=torch.int32)
        self.ordinary = torch.tensor([i for i in range(vocab_size) if i not in special], dtype=torch.int32)

    def corrupt(self, batch, rng):
        T = batch.tokens.shape[1] - 1
        tokens, labels = batch.tokens[:, :T], batch.labels[:, :T]
        # Three independent streams of random values: which positions, what becomes of each, and which random token.
        chosen = (rng.uniform(0, T) < self.mask_ratio) & (labels != IGNORE) & ~torch.isin(tokens, self.special)
        kind = rng.uniform(1, T)
        random_token = self.ordinary[(rng.uniform(2, T).double() * len(self.ordinary)).long()]
        inputs = torch.where(chosen & (kind < 0.8), self.mask_id, tokens)
        inputs = torch.where(chosen & (kind >= 0.8) & (kind < 0.9), random_token, inputs)
        return replace(batch, tokens=inputs, labels=torch.where(chosen, labels, IGNORE),
                       position_ids=batch.position_ids[:, :T], doc_start=batch.doc_start[:, :T])


def make_objective(config: ObjectiveConfig, mask_documents: bool, tokenizer, vocab_size: int) -> Objective:
    """The objective of the settings. UserError where masking lacks a mask token inside the vocabulary."""
    if config.name == "causal":
        return Causal(mask_documents, config.z_loss)
    mask_id = config.mask_token_id if config.mask_token_id is not None else getattr(tokenizer, "mask_id", None)
    if mask_id is None:
        raise UserError("objective masked needs a mask token and the tokenizer has none; name an id that the text does "
                        "not use, e.g. --objective.mask-token-id 0")
    if not 0 <= mask_id < vocab_size:
        raise UserError(f"objective.mask_token_id is {mask_id}, outside the vocabulary of {vocab_size}")
    # Rows that only pad the embedding are no more drawn at random than special tokens are.
    special = {*tokenizer.special_ids, *tokenizer.missing_ids(vocab_size)} if tokenizer is not None else ()
    special = [i for i in special if i < vocab_size]
    return Masked(mask_documents, mask_id, special, vocab_size, config.mask_ratio, config.z_loss)


def sum_by_source(names: list[str], parts: list[tuple], norm: torch.Tensor, world) -> tuple[dict, float]:
    """({source: (nats, targets)} of a step, over its micro-batches and all ranks, the gradient norm as a float).

    parts: (batch.source, metrics["sequence_loss"], metrics["sequence_targets"]) of each micro-batch. This waits for the
    device: everything that the loop must know of a step comes in one copy. fp32 holds the counts exactly, as they are
    at most T. Sources without targets are left out. A norm that is not finite on one rank is finite on none.
    """
    sources, losses, counts = zip(*parts)
    values = torch.cat([*losses, *counts, norm.flatten()]).float().cpu().double()
    *parts, norm = values.split([values.numel() // 2, values.numel() // 2, 1])
    sums = torch.zeros(2, len(names), dtype=torch.float64)
    for total, part in zip(sums, parts):
        total.index_add_(0, torch.from_numpy(np.concatenate(sources)), part)
    norm = norm.item()
    *sums, spoiled = world.sum([*sums.flatten().tolist(), not math.isfinite(norm)])
    if spoiled and math.isfinite(norm):
        norm = math.nan
    nats, targets = torch.tensor(sums, dtype=torch.float64).view(2, -1)
    # Losses are computed in fp32: more digits of their sum would say nothing.
    nats, targets = nats.float().tolist(), targets.long().tolist()
    return {name: (nats[i], targets[i]) for i, name in enumerate(names) if targets[i]}, norm
