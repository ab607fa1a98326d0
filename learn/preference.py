"""Preferences: of two answers to one prompt, the chosen becomes likelier than the rejected one. The loss of a pair:

    DPO    -log sigmoid(beta h)              h = (c - c') - (r - r')                            arXiv 2305.18290
    IPO    (h - 1 / (2 beta))^2              h = (c - c') - (r - r')                            arXiv 2310.12036
    ORPO   -c - beta log sigmoid(h)          h = o(c) - o(r),  o(c) = c - log(1 - exp(c))       arXiv 2403.07691

c and r are the log-probabilities of the chosen and the rejected answer under the model, c' and r' under the reference.
DPO sums them over an answer's tokens. IPO and ORPO take means over the tokens, as ORPO's paper and TRL do; IPO's paper
writes sums, by which long answers would have to part by as little as short ones do. ORPO has no reference, and its -c
is the usual loss of the chosen answer, each pair counting alike. All are means over the pairs of a step.

Example, DPO with beta 0.1: the chosen answer went from -40 to -41 nats and the rejected one from -42 to -50. h = 7, the
reward margin beta h is 0.7, the loss 0.403; and the chosen answer has become less likely, which no loss shows. So both
log-probabilities are measured, and their change.

A sequence holds its documents in pairs: chosen, rejected, chosen, rejected, and then padding. B sequences, T tokens, D
model width, V vocabulary, P pairs a sequence may hold (more than it does).
"""

import contextlib
import json
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from core import checkpoint
from core.errors import UserError
from core.hashing import short_digest
from data import read_batch
from kernels.cross_entropy import IGNORE, linear_cross_entropy
from learn.method import Learning, evaluating
from learn.objectives import Causal


class Preference(Causal):
    """What DPO, IPO and ORPO share: `pair_loss` is all that each has of its own.

    The loss is a function of sums of log-probabilities, so that its gradient is that of the tokens' cross-entropy with
    one weight per answer. A first pass over the head finds the sums, without gradients; autograd takes the derivative
    of the loss by each sum; a second pass has it as the tokens' weight. No logits [B, T, V] exist.
    """

    forms = ("preference",)
    uses_reference = True
    is_mean = False
    """log-probabilities are means over an answer's tokens, not sums"""
    measures = ("margin", "accuracy", "chosen_logp", "rejected_logp", "chosen_change", "rejected_change")
    is_likelihood = False

    def __init__(self, beta: float, precompute: bool = False):
        # Documents that saw each other would tell a rejected answer what was chosen.
        super().__init__(mask_documents=True)
        self.beta, self.precompute = beta, precompute
        # reference(model) -> context manager that yields the reference model, as Learning.reference.
        self.reference: Callable | None = None
        self.stored: StoredReference | None = None

    @property
    def text_objective(self):
        return Causal(mask_documents=True)

    def model_built(self, model, learning: Learning):
        if not self.uses_reference:
            return
        if self.precompute:
            # Before its first step the model is the base, so that nothing needs a copy of it.
            reference = learning.reference or learning.base or contextlib.nullcontext
            self.stored = StoredReference(self, model, reference, learning)
            learning.reference = None
            return
        self.notes = [] if learning.reference else [f"objective: {note}" for note in learning.keep_base(model)]
        self.reference = learning.reference or learning.base

    # ---- answers

    def count(self, batch) -> int:
        """The pairs of a corrupted batch."""
        return int((count_targets(batch) > 0).all(-1).sum())

    @torch.no_grad()
    def log_probabilities(self, model, batch) -> torch.Tensor:
        """float64 [B, P, 2] of the chosen and the rejected answers, summed over their targets, under a model."""
        return sum_answers(batch, -score_tokens(model, batch, self.hidden_states(model, batch)))

    def reference_log_probabilities(self, model, batch) -> torch.Tensor | None:
        if not self.uses_reference:
            return None
        if self.stored:
            return self.stored.find(batch)
        with self.reference(model) as teacher, evaluating(teacher):
            return self.log_probabilities(teacher, batch)

    def loss(self, model, batch, want_hits: bool = False):
        """As Objective.loss; sums and counts are those of pairs, and hits are not known."""
        inner = getattr(model, "module", model)
        reference = self.reference_log_probabilities(inner, batch)
        hidden = self.hidden_states(model, batch)
        token_loss, targets = score_tokens(inner, batch, hidden), count_targets(batch)
        summed = sum_answers(batch, -token_loss).requires_grad_()
        is_pair = (targets > 0).all(-1)
        per = targets.clamp(min=1) if self.is_mean else 1
        with torch.enable_grad():
            losses, measured = self.pair_loss(summed / per, None if reference is None else reference / per)
            losses = torch.where(is_pair, losses, 0)
            loss = losses.sum()
        # [B, T]: the derivative of the loss by the log-probability of each token
        slope = torch.autograd.grad(loss, summed)[0].flatten(1).gather(1, number_documents(batch))
        loss = loss.detach().to(token_loss.dtype)
        if torch.is_grad_enabled():
            weighted = linear_cross_entropy(hidden, inner.head.weight, batch.labels, token_weight=-slope)[0]
            # Its value is the loss's, its gradient that of the weighted sum.
            loss = loss + (weighted - weighted.detach())
        pairs = is_pair.sum()
        metrics = {"token_loss": token_loss, "sequence_loss": losses.detach().sum(1),
                   "sequence_targets": is_pair.sum(1), "hidden": hidden,
                   "measures": {name: (torch.where(is_pair, value.detach(), 0).sum(), pairs)
                                for name, value in measured.items()}}
        return loss, pairs, metrics

    def pair_loss(self, policy, reference) -> tuple[torch.Tensor, dict]:
        """(losses [B, P], {measure: values [B, P]}) of the log-probabilities [B, P, 2], the reference's None where the
        objective has none."""
        raise NotImplementedError

    def check_source(self, name: str, shards):
        super().check_source(name, shards)
        check_pairs(name, shards)

    def judge(self, before: dict, after: dict) -> list[str]:
        fall, fall_of_rejected = (before[name] - after[name] for name in ("chosen_logp", "rejected_logp"))
        rise = fall_of_rejected - fall
        # A change of less than a hundredth is no collapse, whatever the margin did.
        if fall <= max(rise, 0.01 * abs(before["chosen_logp"])):
            return []
        unit = "nats a token" if self.is_mean else "nats"
        return [f"the chosen answers lost {fall:.3g} {unit} of log-probability while the margin over the rejected ones "
                f"rose by {rise:.3g}: the model turns away from both; lower optim.lr or train for fewer steps, raise "
                f"objective.beta, or use orpo, which holds the chosen ones up"]


class DPO(Preference):
    """Rewards are beta times the change of a log-probability against the reference."""

    def pair_loss(self, policy, reference):
        reward = self.beta * (policy - reference)
        margin = reward[..., 0] - reward[..., 1]
        return self.loss_of_margin(margin), compare_answers(policy) | {
            "margin": margin, "accuracy": share_above(margin), "chosen_change": (policy - reference)[..., 0],
            "rejected_change": (policy - reference)[..., 1]}

    def loss_of_margin(self, margin):
        return -F.logsigmoid(margin)


class IPO(DPO):
    is_mean = True

    def loss_of_margin(self, margin):
        return (margin / self.beta - 1 / (2 * self.beta)).square()


class ORPO(Preference):
    uses_reference, is_mean = False, True
    measures = ("margin", "accuracy", "chosen_logp", "rejected_logp", "chosen_loss")

    def pair_loss(self, policy, reference):
        # An answer that is certain has no finite odds.
        odds = policy - torch.log(-torch.expm1(policy.clamp(max=-1e-9)))
        margin = odds[..., 0] - odds[..., 1]
        return -policy[..., 0] - self.beta * F.logsigmoid(margin), compare_answers(policy) | {
            "margin": margin, "accuracy": share_above(margin), "chosen_loss": -policy[..., 0]}


def compare_answers(policy) -> dict:
    return {"chosen_logp": policy[..., 0], "rejected_logp": policy[..., 1]}


def share_above(margin):
    """1 where the chosen answer is above the rejected one, and where they are equal, as before the first step, 0.5."""
    return ((margin > 0).double() + (margin >= 0).double()) / 2


# ---- answers in packed sequences

@torch.no_grad()
def score_tokens(model, batch, hidden) -> torch.Tensor:
    """-log p of each target [B, T], 0 where there is none, from hidden states [B, T, D]."""
    return linear_cross_entropy(hidden.detach(), model.head.weight.detach(), batch.labels)[1]


def number_documents(batch) -> torch.Tensor:
    """int64 [B, T]: which document of its sequence each position belongs to, from 0; padding is the last."""
    position = torch.arange(batch.doc_start.shape[1], device=batch.doc_start.device)
    return (batch.doc_start == position).cumsum(1) - 1


def sum_answers(batch, values) -> torch.Tensor:
    """float64 [B, P, 2]: values [B, T] summed over each document, the chosen and the rejected one of each pair."""
    B, T = values.shape
    sums = torch.zeros(B, T + T % 2, dtype=torch.float64, device=values.device)
    return sums.scatter_add_(1, number_documents(batch), values.double()).view(B, -1, 2)


def count_targets(batch) -> torch.Tensor:
    return sum_answers(batch, batch.labels != IGNORE)


def check_pairs(name: str, shards):
    """UserError for a preference source with documents that are no pairs, or answers of which nothing is learned."""
    ends = shards.document_ends()
    if len(ends) % 2:
        raise UserError(f"source {name} holds {len(ends)} documents, and those of preferences come in pairs, chosen "
                        f"and rejected; pack it again")
    begins = ends - np.diff(ends, prepend=0)
    learned = shards.read_mask(0, shards.tokens).copy()
    # Nothing stands before a document's first token that it could be predicted from.
    learned[begins] = False
    empty = np.flatnonzero(np.add.reduceat(learned, begins, dtype=np.int64) == 0)
    if len(empty):
        raise UserError(f"source {name}: in {len(empty):,} answers nothing is learned, first the "
                        f"{('chosen', 'rejected')[empty[0] % 2]} one of pair {empty[0] // 2}; leave such records out "
                        f"and pack it again")


# ---- the reference's log-probabilities, found once

class StoredReference:
    """The reference's log-probability of each answer of a run, [pairs, 2] of each source by its sequences.

    Found in one pass before the first step, after which the reference need not stay in memory. They are kept in the run
    folder under a digest of all that they were made from, so that a resumed run takes them and no other run does; where
    they are damaged they are made again.
    """

    def __init__(self, objective: Preference, model, reference, learning: Learning):
        world, folder, packings = learning.world, learning.folder, learning.packings
        # How many pairs come before each sequence of a source. Text that is only scored has none.
        self.first = {i: packing.first // 2 for i, packing in enumerate(packings)
                      if packing.shards.format == "preference"}
        self.values = {f"source_{i}": torch.zeros(int(first[-1]), 2, dtype=torch.float64)
                       for i, first in self.first.items()}
        made_of = [learning.reference_fingerprint, *([packings[i].shards.records, short_digest(
            packings[i].table.tobytes())] for i in self.first)]
        folder = folder and folder / f"reference_{short_digest(json.dumps(made_of).encode())}"
        if folder and world.broadcast(folder.exists()) and not checkpoint.find_damage(folder, world):
            checkpoint.Stored(folder).read_into(self.values)
            return
        with reference(model) as teacher, evaluating(teacher):
            for i in self.first:
                self.fill(objective, teacher, learning, i)
        if folder:
            checkpoint.write(folder, checkpoint.Shards(self.values, world), {}, world)

    def fill(self, objective: Preference, teacher, learning: Learning, source: int):
        """Score all sequences of a source; the ranks share the batches, which are the same on any number of them."""
        world, packing, B = learning.world, learning.packings[source], learning.micro_batch_size
        values, starts = self.values[f"source_{source}"], range(0, packing.sequences, B)
        turns = range(world.rank, world.rank + len(starts), world.size)
        # FSDP gathers in each forward pass, so a rank that has no batch left runs the last one again.
        for turn in tqdm(turns, f"reference of {packing.shards.folder.name}", disable=None if world.main else True):
            begin = starts[min(turn, len(starts) - 1)]
            numbers = np.arange(begin, min(begin + B, packing.sequences))
            batch = read_batch(packing, numbers, source)
            batch = objective.corrupt(batch, batch.rng).to(world.device)
            with learning.autocast():
                found = objective.log_probabilities(teacher, batch).cpu()
            for row, number in zip(found, numbers.tolist()) if turn < len(starts) else ():
                low, high = self.first[source][number:number + 2].tolist()
                values[low:high] = row[:high - low]
        values.copy_(torch.tensor(world.sum(values.flatten().tolist()), dtype=torch.float64).view(-1, 2))

    def find(self, batch) -> torch.Tensor:
        """float64 [B, P, 2] on the batch's device, by batch.source and batch.place."""
        B, T = batch.labels.shape
        found = torch.zeros(B, (T + T % 2) // 2, 2, dtype=torch.float64)
        for row, source, place in zip(found, batch.source.tolist(), batch.place.tolist()):
            low, high = self.first[source][place:place + 2].tolist()
            row[:high - low] = self.values[f"source_{source}"][low:high]
        return found.to(batch.labels.device, non_blocking=True)
