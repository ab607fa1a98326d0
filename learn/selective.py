"""Selective loss: only the tokens count that the model has yet to learn (Rho-1, arXiv 2404.07965).

    excess = the model's loss - the reference's        per target
    kept   = in each document the ceil(keep * n) of its n targets with the greatest excess
    loss   = sum of the model's loss over the kept targets / their number

A reference that was trained on good text of the domain has a low loss where there is something to learn, and a high one
where the text is noise. A document with the excesses 0.1 2.0 -0.3 0.9 1.2 and keep 0.6 keeps three: 2.0, 0.9 and 1.2.

Tokens compete within their document, or the part of it that stands in the sequence. Rho-1 ranks a whole batch, but then
what is kept would depend on which sequences share a forward pass. So accumulation, ranks and packing change nothing,
and the number of kept targets is known before the model has computed anything.

Shapes: B sequences, T tokens, D model width.
"""

from dataclasses import replace

import torch

from kernels.cross_entropy import IGNORE, linear_cross_entropy
from learn.method import evaluating
from learn.objectives import Causal


class Selective(Causal):
    measures = ("kept_share", "loss_of_kept", "loss_of_others", "reference_loss")
    uses_reference = True

    def __init__(self, mask_documents: bool, keep: float, z_loss: float = 0.0):
        super().__init__(mask_documents, z_loss)
        self.keep = keep

    @property
    def text_objective(self):
        return Causal(self.mask_documents, self.z_loss)

    def model_built(self, model, learning):
        if learning.reference is None:
            self.notes = [*learning.keep_base(model), "selective: without objective.reference the base is the "
                          "reference, so those tokens count whose loss has risen most above the base's"]
        self.learning = learning

    def count(self, batch) -> int:
        targets = count_targets(batch.labels, number_documents(batch))
        return int(share_of(self.keep, targets).sum())

    def loss(self, model, batch, want_hits=False):
        inner = getattr(model, "module", model)
        hidden = self.hidden_states(model, batch)
        with torch.no_grad():
            _, losses, _ = linear_cross_entropy(hidden.detach(), inner.head.weight, batch.labels)
            with (self.learning.reference or self.learning.base)(inner) as reference, evaluating(reference):
                _, expected, _ = linear_cross_entropy(self.hidden_states(reference, batch), reference.head.weight,
                                                      batch.labels)
        targets, kept = batch.labels != IGNORE, select(losses - expected, batch, self.keep)
        loss, _, metrics = self.loss_of(hidden, inner, replace(batch, labels=torch.where(kept, batch.labels, IGNORE)))
        n_targets, n_kept, loss_of_kept = targets.sum(), kept.sum(), torch.where(kept, losses, 0.0).sum()
        metrics["measures"] = {
            "kept_share": (n_kept, n_targets), "loss_of_kept": (loss_of_kept, n_kept),
            "loss_of_others": (losses.sum() - loss_of_kept, n_targets - n_kept),
            "reference_loss": (expected.sum(), n_targets)}
        return loss, n_kept, metrics


def number_documents(batch) -> torch.Tensor:
    """int64 [B, T]: which document of the batch each position belongs to, a number below B * T."""
    B, T = batch.tokens.shape
    return torch.arange(B, device=batch.tokens.device)[:, None] * T + batch.doc_start


def count_targets(labels, document) -> torch.Tensor:
    """int64 [B * T]: how many targets each document has that `number_documents` numbers."""
    return torch.zeros(labels.numel(), dtype=torch.int64, device=labels.device).index_add_(
        0, document.flatten(), (labels != IGNORE).flatten().long())


def share_of(keep: float, targets: torch.Tensor) -> torch.Tensor:
    """ceil(keep * targets), int64; without the 1e-9 a product of 7.000000000000001 would be 8."""
    return (targets.double() * keep - 1e-9).ceil().long()


def select(excess, batch, keep: float) -> torch.Tensor:
    """bool [B, T]: the targets of each document with the greatest `excess` [B, T]; of equal ones those that come first.
    """
    document = number_documents(batch).flatten()
    targets = count_targets(batch.labels, document)
    value = torch.where(batch.labels != IGNORE, excess, -torch.inf).flatten()
    # Document after document, and in each the targets by falling excess; what is no target stands last.
    order = value.argsort(descending=True, stable=True)
    order = order[document[order].argsort(stable=True)]
    positions = torch.zeros_like(targets).index_add_(0, document, torch.ones_like(document))
    begins = positions.cumsum(0) - positions
    rank = torch.arange(len(order), device=order.device) - begins[document[order]]
    kept = torch.empty_like(order, dtype=torch.bool)
    kept[order] = rank < share_of(keep, targets)[document[order]]
    return kept.view(excess.shape)
