"""What is learned from a row: `corrupt` makes inputs and targets of it, `loss` scores a model on them.

Rows come from the loader with T + 1 tokens and labels equal to the tokens; `corrupt` shifts (once, here) or masks, and
leaves T. A loss is a sum over the targets that count; whoever calls divides by the count of the whole step.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from kernels.cross_entropy import IGNORE, linear_cross_entropy


@dataclass
class ObjectiveConfig:
    name: Literal["causal", "masked"] = "causal"
    """causal: predict the next token; masked: predict masked tokens, seeing both ways"""
    mask_ratio: float = 0.15
    """masked: share of positions that are predicted"""
    mask_token_id: int | None = None
    """masked: id that stands for a masked token; default: the tokenizer's mask token"""

    def __post_init__(self):
        if not 0 < self.mask_ratio <= 1:
            raise ValueError(f"objective.mask_ratio is {self.mask_ratio}, but must be above 0 and at most 1")


class Causal:
    """mean of -log p(token t+1 | tokens up to t). Where attention stays inside documents, a document's first token
    has nothing to be predicted from and is not a target."""

    causal = True

    def __init__(self, mask_documents: bool):
        self.mask_documents = mask_documents

    def corrupt(self, batch, rng):
        targets = batch.labels[:, 1:]
        if self.mask_documents:
            first = batch.doc_start[:, 1:] == torch.arange(1, batch.tokens.shape[1], dtype=torch.int32)
            targets = torch.where(first, IGNORE, targets)
        return _inputs(batch, batch.tokens[:, :-1], targets)

    def loss(self, model, batch, want_hits: bool = False):
        return _loss(self, model, batch, want_hits)


class Masked:
    """BERT's masking (arXiv 1810.04805): of the chosen positions 80 % become the mask, 10 % a random token and 10 %
    stay; the loss is on them alone. Special tokens are never chosen and never put in at random."""

    causal = False

    def __init__(self, mask_documents: bool, mask_id: int, special_ids, vocab_size: int, mask_ratio: float = 0.15):
        self.mask_documents, self.mask_id, self.mask_ratio = mask_documents, mask_id, mask_ratio
        self.special = torch.tensor(sorted({*special_ids, mask_id}), dtype=torch.int32)
        ordinary = torch.ones(vocab_size, dtype=torch.bool)
        ordinary[self.special.long()] = False
        self.ordinary = ordinary.nonzero().flatten().to(torch.int32)

    def corrupt(self, batch, rng):
        T = batch.tokens.shape[1] - 1
        tokens, labels = batch.tokens[:, :T], batch.labels[:, :T]
        chosen = (rng.uniform(0, T) < self.mask_ratio) & (labels != IGNORE) & ~torch.isin(tokens, self.special)
        kind = rng.uniform(1, T)
        random = self.ordinary[(rng.uniform(2, T).double() * len(self.ordinary)).long()]
        inputs = torch.where(chosen & (kind < 0.8), self.mask_id, tokens)
        inputs = torch.where(chosen & (kind >= 0.8) & (kind < 0.9), random, inputs)
        return _inputs(batch, inputs, torch.where(chosen, labels, IGNORE))

    def loss(self, model, batch, want_hits: bool = False):
        return _loss(self, model, batch, want_hits)


def _inputs(batch, tokens, targets):
    T = tokens.shape[1]
    return replace(batch, tokens=tokens, labels=targets, position_ids=batch.position_ids[:, :T],
                   doc_start=batch.doc_start[:, :T])


def hidden_states(objective, model, batch) -> torch.Tensor:
    """[B, T, D] of a corrupted batch, seen as the objective sees it."""
    return model(batch.tokens, batch.position_ids, batch.doc_start if objective.mask_documents else None,
                 objective.causal)


def _loss(objective, model, batch, want_hits):
    """(loss_sum, n_valid, metrics): nats summed over the targets, their number, and both by row [B]; and the hidden
    states [B, T, D] they come from."""
    hidden = hidden_states(objective, model, batch)
    head = getattr(model, "module", model).head          # under DDP the model is inside
    loss, token_loss, hits = linear_cross_entropy(hidden, head.weight, batch.labels, want_hits)
    valid = batch.labels != IGNORE
    metrics = {"row_loss": token_loss.sum(1), "row_tokens": valid.sum(1), "hidden": hidden}
    if want_hits:
        metrics["hits"] = hits.sum()
    return loss, valid.sum(), metrics


def make_objective(config: ObjectiveConfig, mask_documents: bool, tokenizer, vocab_size: int):
    if config.name == "causal":
        return Causal(mask_documents)
    mask_id = config.mask_token_id if config.mask_token_id is not None else getattr(tokenizer, "mask_id", None)
    if mask_id is None:
        raise ValueError("objective masked needs a mask token and the tokenizer has none; name an id that the text "
                         "does not use, e.g. --objective.mask-token-id 0")
    if not 0 <= mask_id < vocab_size:
        raise ValueError(f"objective.mask_token_id is {mask_id}, outside the vocabulary of {vocab_size}")
    special = [i for i in tokenizer.special_ids if i < vocab_size] if tokenizer is not None else ()
    return Masked(mask_documents, mask_id, special, vocab_size, config.mask_ratio)
