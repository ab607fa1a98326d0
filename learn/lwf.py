"""LwF, learning without forgetting: predictions stay close to the base's (Li & Hoiem 2016, arXiv 1606.09282).

    loss = (1 - alpha) cross-entropy + alpha temperature^2 KL(base || model)         per target

The predictions of both are softmax(logits / temperature). Two tokens, where the base says (0.5, 0.5) and the model
(0.8, 0.2) at temperature 1: KL = 0.5 log(0.5 / 0.8) + 0.5 log(0.5 / 0.2) = 0.223 nats. At step 0 the KL is exactly 0.
"""

from dataclasses import dataclass
from typing import Literal

from core.config import setting
from core.errors import UserError
from kernels import linear_kl
from kernels.cross_entropy import IGNORE, linear_cross_entropy
from learn.method import Method, evaluating, take_sequences


@dataclass
class LwFConfig:
    alpha: float = setting(0.0, at_least=0, at_most=1)
    """weight of the KL in (1 - alpha) cross-entropy + alpha temperature^2 KL(base || model). 0: off; 0.5 is usual"""
    temperature: float = setting(2.0, above=0, at_most=1e6)
    """divides the logits of both; above 1 the unlikely tokens count for more"""
    tokens: Literal["replay", "all"] = "replay"
    """replay: the KL is taken on general text alone, and the domain's loss stays as it is. all: on every target"""


class LwF(Method):
    """Runs the teacher over each micro-batch and mixes the KL into the loss. The teacher is what the run hands in (the
    model with its adapters off, or a sharded base), or else a frozen copy of the base."""

    def model_built(self, model):
        if self.config.tokens == "replay" and not self.learning.general_sources:
            raise UserError("forget.lwf.tokens replay takes the KL on general text, and the run draws none; add a "
                            "source with the role general, take it everywhere with --forget.lwf.tokens all, or leave "
                            "LwF out with --forget.lwf.alpha 0")
        self.divergence, self.targets, self.taught = 0.0, 0, {}
        self.notes = [f"lwf: {note}" for note in self.learning.keep_base(model)]

    def teach(self, model, batch):
        """(the sequences that the KL is taken on, the teacher's hidden states of them, the weight of its head)"""
        sequences, general = range(len(batch.tokens)), self.learning.general_sources
        chosen = [i for i in sequences if self.config.tokens == "all" or int(batch.source[i]) in general]
        if not chosen and not self.learning.sharded:
            return chosen, None, None
        # All ranks must gather a sharded teacher together, so a rank without such sequences runs one for nothing.
        part = batch if len(chosen) == len(sequences) else take_sequences(batch, chosen or [0])
        with self.learning.base(model) as teacher, evaluating(teacher):
            return chosen, self.learning.forward(teacher, part), teacher.head.weight.detach()

    def teach_ahead(self, model, batches):
        """For a pipeline, whose stages run the teacher together: before the first pass, as the last stage alone has
        losses in between."""
        self.taught = {id(batch): self.teach(model, batch) for batch in batches}

    def loss_computed(self, model, batch, loss, metrics):
        chosen, base_hidden, base_weight = self.taught.pop(id(batch), None) or self.teach(model, batch)
        if not chosen:
            return loss
        is_whole = len(chosen) == len(batch.tokens)
        x, labels = (each if is_whole else each[chosen] for each in (metrics["hidden"], batch.labels))
        weight, alpha, labels = model.head.weight, self.config.alpha, labels.to(x.device)
        divergence, _ = linear_kl(x, weight, base_hidden, base_weight, labels, self.config.temperature)
        self.divergence = self.divergence + divergence.detach()
        self.targets = self.targets + (labels != IGNORE).sum()
        if is_whole:
            return (1 - alpha) * loss + alpha * divergence
        # The chosen sequences keep (1 - alpha) of their cross-entropy, the others all of theirs.
        return loss + alpha * (divergence - linear_cross_entropy(x, weight, labels)[0])

    def before_step(self, step, model):
        divergence, targets = self.learning.world.sum([self.divergence, self.targets])
        self.divergence, self.targets = 0.0, 0
        return {"lwf_kl": divergence / max(1.0, targets)}
