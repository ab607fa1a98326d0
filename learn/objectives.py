"""What is learned from a sequence: `corrupt` makes inputs and targets of it, `loss` scores a model on them.

The loader's batches have T + 1 tokens, and labels equal to the tokens. `corrupt` shifts (once, here) or masks them and
leaves T. A loss is a sum over the targets that count; the caller divides by the count of the whole step.

Shapes: B sequences, T tokens, D model width, V vocabulary, S sources.
"""

import copy
import math
from dataclasses import replace

import numpy as np
import torch

from core.errors import UserError
from core.hashing import short_digest
from kernels.cross_entropy import IGNORE, linear_cross_entropy


class Objective:
    """The loss, which all objectives share. Each has its own corrupt(batch [B, T + 1], rng) -> the batch as inputs and
    targets [B, T], where rng holds the batch's random values (data.RowRandom)."""

    causal: bool
    """whether attention sees only the tokens before"""
    measures: tuple[str, ...] = ()
    """names of what it measures beside its loss, the same on every rank"""
    unit = "bits_per_byte"
    """what it says of text that it scores"""
    is_likelihood: bool = True
    """whether its loss is the nats of a token, so that exp(loss) is a perplexity"""
    uses_reference: bool = False
    """whether it compares the model with a frozen one: that of objective.reference, or else the base"""
    forms: tuple[str, ...] = ("text", "chat")
    """what a source's documents may be (text.shards.Shards.format)"""
    notes: tuple | list = ()
    """lines for the user to read before the run"""

    @property
    def shift(self) -> int:
        """How far a target stands behind the input that predicts it."""
        return int(self.causal)

    @property
    def text_objective(self) -> "Objective":
        """What text is scored with, in bits per byte (causal) or accuracy (masked)."""
        return self

    @property
    def token_ids(self) -> list:
        """The token ids, as JSON can hold them, by which `corrupt` rewrites text: a run resumed with others would be
        another. Empty where text is learned as it stands."""
        return []

    def __init__(self, mask_documents: bool, z_loss: float = 0.0):
        self.mask_documents, self.z_loss = mask_documents, z_loss

    def text_length(self, context: int) -> int:
        """How many tokens of text a sequence reads, so that what `corrupt` makes of them fits into `context`."""
        return context

    def passes(self, batch) -> int:
        """How many forward passes score a corrupted batch of text."""
        return 1

    def view(self, batch, k: int):
        """The batch as pass number k scores it."""
        return batch

    def part_documents(self) -> "Objective":
        """The same objective, under which documents of one sequence do not see each other."""
        parted = copy.copy(self)
        parted.mask_documents = True
        return parted

    def model_built(self, model, learning):
        """Before DDP and the optimizer are made: the place to open a reference model, or to give the model more
        modules that train. learning: what an objective may know of a run (learn/method.py)."""

    def check_source(self, name: str, shards):
        """UserError where the objective cannot learn from a source's documents."""
        if shards.format not in self.forms:
            raise UserError(f"source {name} holds documents of the form {shards.format}, and the objective learns from "
                            f"{' and '.join(self.forms)}; preferences are for --objective.name dpo, ipo and orpo, and "
                            f"for these alone")

    def judge(self, before: dict, after: dict) -> list[str]:
        """What is to be said of a source's measures before and after a run, in sentences; nothing where all is well."""
        return []

    def count(self, batch) -> int:
        """What the loss of a corrupted batch is a mean over: its targets."""
        return (batch.labels != IGNORE).sum().item()

    def hidden_states(self, model, batch) -> torch.Tensor:
        """[B, T, D] of a corrupted batch, seen as the objective sees it: both ways or not, across documents or not."""
        doc_start = batch.doc_start if self.mask_documents else None
        return model(batch.tokens, batch.position_ids, doc_start, self.causal)

    def loss(self, model, batch, want_hits: bool = False):
        """(nats summed over the targets, their number, metrics) of a corrupted batch.

        metrics: "token_loss" [B, T], 0 where there is no target; "sequence_loss" [B] and "sequence_targets" [B], the
        sums per sequence; "hidden" [B, T, D], part of the graph; "measures", {name: (sum, number)} of which the mean is
        told; with want_hits "hits", the number of targets that have the largest logit.
        """
        # Under DDP the model stands inside its wrapper.
        return self.loss_of(self.hidden_states(model, batch), getattr(model, "module", model), batch, want_hits)

    def loss_of(self, hidden, model, batch, want_hits: bool = False):
        """`loss` of hidden states [B, T, D] of the batch that are known already."""
        want_hits = want_hits or "accuracy" in self.measures
        loss, token_loss, hits = linear_cross_entropy(hidden, model.head.weight, batch.labels, want_hits,
                                                      z_loss=self.z_loss if model.training else 0.0)
        valid = batch.labels != IGNORE
        metrics = {"token_loss": token_loss, "sequence_loss": token_loss.sum(1), "sequence_targets": valid.sum(1),
                   "hidden": hidden, "measures": {}}
        if want_hits:
            metrics["hits"] = hits.sum()
        if "accuracy" in self.measures:
            metrics["measures"]["accuracy"] = metrics["hits"], metrics["sequence_targets"].sum()
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
    10 % stay; only they are targets. Special tokens are never chosen and never put in at random.

    Where `words` are known (text/words.py), whole words are chosen instead of tokens, each with the probability
    mask_ratio, so that the share of the tokens is the same; what becomes of a token is still its own affair. A word
    ends with its document and at special tokens.
    """

    causal = False
    measures = ("accuracy",)
    unit = "accuracy"

    def __init__(self, mask_documents: bool, mask_id: int, special_ids, vocab_size: int, mask_ratio: float = 0.15,
                 z_loss: float = 0.0, words: tuple[np.ndarray, np.ndarray] | None = None):
        super().__init__(mask_documents, z_loss)
        self.mask_id, self.mask_ratio = mask_id, mask_ratio
        self.words = words and tuple(map(torch.from_numpy, words))
        special = {*special_ids, mask_id}
        self.special = torch.tensor(sorted(special), dtype=torch.int32)
        self.ordinary = torch.tensor([i for i in range(vocab_size) if i not in special], dtype=torch.int32)

    @property
    def token_ids(self):
        return [self.mask_id, self.special.tolist(),
                *(short_digest(of_token.numpy().tobytes()) for of_token in self.words or ())]

    def corrupt(self, batch, rng):
        T = batch.tokens.shape[1] - 1
        tokens, labels = batch.tokens[:, :T], batch.labels[:, :T]
        # Three independent streams of random values: which positions, what becomes of each, and which random token.
        draws = rng.uniform(0, T)
        if self.words:
            draws = draws.gather(1, self.find_words(tokens, batch.doc_start[:, :T]))
        chosen = (draws < self.mask_ratio) & (labels != IGNORE) & ~torch.isin(tokens, self.special)
        kind = rng.uniform(1, T)
        random_token = self.ordinary[(rng.uniform(2, T).double() * len(self.ordinary)).long()]
        inputs = torch.where(chosen & (kind < 0.8), self.mask_id, tokens)
        inputs = torch.where(chosen & (kind >= 0.8) & (kind < 0.9), random_token, inputs)
        return replace(batch, tokens=inputs, labels=torch.where(chosen, labels, IGNORE),
                       position_ids=batch.position_ids[:, :T], doc_start=batch.doc_start[:, :T])

    def find_words(self, tokens, doc_start) -> torch.Tensor:
        """int64 [B, T]: where the word that each token belongs to begins."""
        # Of each token, whether it begins a word, and what it says of the token behind it: above 0, that one begins a
        # word; below 0, it does not; 0, that is the other token's own to say.
        begins, after = (of_token[tokens.long()] for of_token in self.words)
        after = torch.where(torch.isin(tokens, self.special), 1, after).roll(1, 1)
        positions = torch.arange(tokens.shape[1])
        # Nothing stands before the first position, which is where a document begins.
        begins = (begins & (after >= 0)) | (after > 0) | (doc_start == positions)
        return torch.where(begins, positions, 0).cummax(1).values


class PseudoLikelihood(Masked):
    """Text under a masked model: each token is predicted with itself alone masked, and the sum of these
    log-probabilities is the pseudo-log-likelihood (Salazar et al., arXiv 1910.14659). No likelihood, as every token has
    seen the others: its bits per byte compare with those of masked models alone.

    Documents of a sequence do not see each other, so in each pass one token of every document is masked. A batch takes
    as many passes as its longest document has tokens.
    """

    unit = "bits_per_byte"

    def __init__(self, masked: Masked):
        vars(self).update(vars(masked))

    def corrupt(self, batch, rng):
        return replace(batch, **{name: getattr(batch, name)[:, :-1]
                                 for name in ("tokens", "labels", "position_ids", "doc_start")})

    def passes(self, batch):
        places = torch.arange(batch.tokens.shape[1]) - batch.doc_start
        # None where no token is scored, as in a window of a conversation that no answer reaches.
        return max((places[batch.labels != IGNORE] + 1).tolist(), default=0)

    def view(self, batch, k):
        here = (torch.arange(batch.tokens.shape[1]) - batch.doc_start == k) & (batch.labels != IGNORE)
        return replace(batch, tokens=torch.where(here, self.mask_id, batch.tokens),
                       labels=torch.where(here, batch.labels, IGNORE))


def sum_step(objective: Objective, names: list[str], scored: list[tuple], norm: torch.Tensor, world) -> tuple:
    """({source: (nats, targets)} of a step, over its micro-batches and all ranks, {measure: mean}, the gradient norm as
    a float).

    scored: (batch.source, metrics of its loss) of each micro-batch. This waits for the device: everything that the loop
    must know of a step comes in one copy. fp32 holds the counts exactly, as they are at most T. What has no target is
    left out. A norm that is not finite on one rank is finite on none.
    """
    sources, metrics = zip(*scored)
    losses, targets = ([m[key] for m in metrics] for key in ("sequence_loss", "sequence_targets"))
    measured = [value for m in metrics for name in objective.measures for value in m["measures"][name]]
    # The norm of gradients in the host's memory is there too.
    norm = norm.reshape(1).to(losses[0].device)
    values = torch.cat([*losses, *targets, *(value.reshape(1) for value in measured), norm]).float().cpu().double()
    n = sum(map(len, losses))
    *parts, measured, norm = values.split([n, n, len(measured), 1])
    sums = torch.zeros(2, len(names), dtype=torch.float64)
    for total, part in zip(sums, parts):
        total.index_add_(0, torch.from_numpy(np.concatenate(sources)), part)
    measured = measured.view(len(metrics), -1).sum(0)
    norm = norm.item()
    sums = world.sum([*sums.flatten().tolist(), *measured.tolist(), not math.isfinite(norm)])
    if sums.pop() and math.isfinite(norm):
        norm = math.nan
    nats, targets = torch.tensor(sums[:2 * len(names)], dtype=torch.float64).view(2, -1)
    # Losses are computed in fp32: more digits of their sum would say nothing.
    nats, targets = nats.float().tolist(), targets.long().tolist()
    pairs = zip(objective.measures, sums[2 * len(names)::2], sums[2 * len(names) + 1::2])
    return ({name: (nats[i], targets[i]) for i, name in enumerate(names) if targets[i]},
            {name: total / number for name, total, number in pairs if number}, norm)
