"""EWC: parameters that general text depends on are pulled back to the base (Kirkpatrick 2017, arXiv 1612.00796).

    loss   += strength * sum_i F_i (w_i - base_i)^2           nats per token
    grad_i += 2 strength F_i (w_i - base_i)                   what is done here, exactly and without a graph

F is the diagonal of the Fisher information per token: how much the loss on general text reacts to each parameter. With
F = 1 everywhere it is L2-SP (Li 2018, arXiv 1802.01483). B sequences, T tokens, D model width, V vocabulary.

Example: two sequences of general text, 2 targets each, whose summed nats have the gradients -2 and 0.5 in a parameter:
F = (4 + 0.25) / 4 = 1.0625. Moved by 0.1 with strength 0.4, the penalty is 0.4 * 1.0625 * 0.01 = 0.00425 and its
gradient 2 * 0.4 * 1.0625 * 0.1 = 0.085.
"""

import functools
import itertools
import json
import typing
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

from core import checkpoint
from core.config import setting
from core.errors import UserError
from core.files import read_json
from core.hashing import short_digest
from core.passes import both_passes
from core.sharding import local
from kernels.cross_entropy import IGNORE, linear_cross_entropy
from learn.method import Learning, Method, counts_here, take_sequences, trainable_parameters, upcast_dtype


@dataclass
class EWCConfig:
    strength: float = setting(0.0, at_least=0, at_most=1e15)
    """weight of the penalty strength * sum_i F_i (w_i - base_i)^2, in nats per token. 0: off. Start with 1 and compare
    0.1 and 10. With fisher = true, 0.5 approximates KL(base, model) on general text to the second order"""
    fisher: Literal["empirical", "true", "l2sp"] = "empirical"
    """empirical: F from the gradients of general text as it stands. true: from labels drawn from the model. l2sp: F is
    1 everywhere and needs no text"""
    samples: int = setting(1000, above=0, at_most=10**7)
    """sequences of general text that F is estimated on"""


class EWC(Method):
    """Holds the base's values of the trainable parameters (`anchor`) and their F (`fisher`, empty for l2sp). F is
    estimated once and kept in the run folder, under a digest of what it was made from, for a resumed run to read."""

    shape: typing.ClassVar = {"fingerprint": str}

    def model_built(self, model):
        config, learning, parameters = self.config, self.learning, trainable_parameters(model)
        if learning.adapters:
            raise UserError("forget.ewc ties the base's weights down, and with adapters these do not move, so it "
                            "protects nothing; use --forget.lwf.alpha 0.5, whose base is the same network with its "
                            "adapters off")
        # Of a model in stages, what all of them train.
        trained = trainable_parameters(getattr(model, "whole", model))
        if not trained:
            raise UserError("forget.ewc ties down weights that train, and none does; leave it out, or freeze less")
        self.fisher = {}
        # Base and F do not change during a run, so a checkpoint only says what they were made from.
        self.values["fingerprint"] = json.dumps([learning.fingerprint, config.fisher, config.samples, learning.seed])
        self.anchor = {name: p.detach().clone() for name, p in parameters.items()}
        text = "no text"
        if config.fisher != "l2sp":
            found = self.load_or_estimate(model, parameters, list(trained))
            text = f"{found['sequences']:,} of {config.samples:,} sequences, {found['tokens']:,} tokens of general text"
        sizes = [p.nbytes + (config.fisher != "l2sp") * p.numel() * upcast_dtype(p).itemsize for p in trained.values()]
        gigabytes = sum(sizes) / 1e9
        self.notes = [f"ewc: {config.fisher} from {text}; its copies take {gigabytes:.2f} GB over all ranks"]

    def load_or_estimate(self, model, parameters: dict, names: list[str]) -> dict:
        """Sets self.fisher of this rank's `parameters`, and returns {"sequences", "tokens"} of the text that it was
        estimated on. names: of all that trains."""
        world, folder = self.learning.world, self.learning.folder
        digest = short_digest(json.dumps([self.values["fingerprint"], *sorted(names)]).encode())
        folder = folder and folder / f"fisher_{digest}"
        if folder and world.broadcast(folder.exists()) and not checkpoint.find_damage(folder, world):
            self.fisher = {name: torch.empty_like(p, dtype=upcast_dtype(p)) for name, p in parameters.items()}
            checkpoint.Stored(folder).read_into(self.fisher)
            return read_json(folder / checkpoint.STATE)
        self.fisher, found = estimate_fisher(model, self.learning, self.config.samples, self.config.fisher == "true")
        if folder:
            checkpoint.write(folder, checkpoint.Shards(self.fisher, world), found, world)
        return found

    @torch.no_grad()
    def before_step(self, step, model):
        total, world = 0.0, self.learning.world
        for name, p in model.named_parameters():
            if name in self.anchor:
                moved = p.to(upcast_dtype(p)) - self.anchor[name].to(upcast_dtype(p))
                pull = moved * self.fisher[name] if self.fisher else moved
                if counts_here(name, p, world):
                    total = total + (local(pull) * local(moved)).sum()
                # A parameter without a gradient does not move in this step.
                if p.grad is not None:
                    p.grad.add_(pull, alpha=2 * self.config.strength)
        total = world.sum([total])[0] if self.learning.sharded else total.item()
        return {"ewc_penalty": self.config.strength * total}


def estimate_fisher(model, learning: Learning, samples: int, true: bool = False) -> tuple[dict, dict]:
    """The diagonal Fisher information of `samples` sequences of general text: ({name: F in fp32 or wider, laid out over
    the ranks like the parameter}, {"sequences", "tokens"}).

    F = sum over sequences of (gradient of the sequence's summed nats)^2 / all their targets; one backward pass each.
    With labels drawn from the model (`true`) the gradients of different tokens are uncorrelated given the text, so F
    does not depend on where sequences are cut; with the text's own labels that is only nearly so (Kunstner 2019, arXiv
    1905.12558). Ranks that each hold the model (DDP) share the sequences out and add up. Ranks that share one model
    (FSDP) all take every sequence: a gradient is averaged over the ranks, and equal ones average to themselves. Of a
    sequence that ranks share, a gradient is the sum over them before it is squared.
    """
    world, tokens, number = learning.world, 0, -1
    parameters = trainable_parameters(model)
    total = {name: torch.zeros_like(p, dtype=upcast_dtype(p)) for name, p in parameters.items()}
    share_out = world.size > 1 and not learning.sharded
    k, groups = world.share if share_out else (0, 1)
    # Of n ranks over which FSDP averages, those that share a sequence have a part of its gradient each.
    factor = world.averaged / world.share[1] if learning.sharded else 1.0
    runner = learning.pipeline() if learning.pipeline else model
    one_by_one = (take_sequences(batch, [i]) for batch in learning.general_text or () for i in range(len(batch.tokens)))
    chosen = itertools.islice((sequence for sequence in one_by_one if (sequence.labels != IGNORE).any()), samples)
    model.zero_grad(set_to_none=True)
    for number, sequence in enumerate(tqdm(chosen, "Fisher", samples, disable=None if world.main else True)):
        tokens += int((sequence.labels != IGNORE).sum())
        if number % groups != k:
            continue
        draws = world.cut_tokens(draw_uniform(sequence.labels, learning.seed, number)) if true else None
        both_passes(runner, world, [world.cut(sequence)], functools.partial(score, model, learning, draws), factor)
        for name, p in parameters.items():
            if p.grad is not None:
                if share_out and world.sequences:
                    torch.distributed.all_reduce(p.grad, group=world.sequences.group)
                total[name] += p.grad.to(total[name].dtype).square()
        model.zero_grad(set_to_none=True)
    if not tokens:
        raise UserError("forget.ewc estimates its Fisher on general text, and there is none; add a source with the "
                        "role general (forget.py replay makes one from the base), or use --forget.ewc.fisher l2sp")
    if share_out:
        for value in total.values():
            torch.distributed.all_reduce(value)
            # Each rank of a group has added the same squares.
            value.div_(world.size // groups)
    return {name: value / tokens for name, value in total.items()}, {"sequences": number + 1, "tokens": tokens}


def score(model, learning: Learning, draws, batch, hidden=None):
    """(summed nats of a batch, None), as core/passes.py asks for it; draws: None, or as in `draw_labels`."""
    hidden = learning.forward(model, batch) if hidden is None else hidden
    labels = batch.labels if draws is None else draw_labels(hidden, model.head.weight, batch.labels, draws)
    return linear_cross_entropy(hidden, model.head.weight, labels)[0], None


def draw_uniform(labels, seed: int, number: int) -> torch.Tensor:
    """A random value of [0, 1) for each target of labels [B, T], in float64, the same on every rank and device."""
    generator, draws = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63), labels != IGNORE
    values = torch.rand(int(draws.sum()), generator=generator, dtype=torch.float64)
    return torch.zeros(labels.shape, dtype=torch.float64).masked_scatter_(draws, values)


@torch.no_grad()
def draw_labels(hidden, weight, labels, draws):
    """labels [B, T] with each target replaced by a token drawn from softmax(hidden weight^T), by its value of
    draws [B, T] in [0, 1). hidden [B, T, D], weight [V, D]."""
    drawn_labels, targets = labels.clone(), (labels != IGNORE).nonzero(as_tuple=True)
    x, values, drawn = hidden[targets], draws.to(hidden.device)[targets], []
    # 256 targets at a time: all logits [T, V] of a long sequence would be gigabytes.
    for part, value in zip(x.split(256), values.split(256)):
        cumulative = (part @ weight.to(x.dtype).T).double().softmax(-1).cumsum(-1)
        drawn.append(torch.searchsorted(cumulative, value[:, None] * cumulative[:, -1:], right=True)[:, 0])
    drawn_labels[targets] = torch.cat(drawn).to(drawn_labels.dtype)
    return drawn_labels
