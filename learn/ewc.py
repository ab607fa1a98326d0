"""EWC: parameters that general text depends on are pulled back to the base (Kirkpatrick 2017, arXiv 1612.00796).

    loss   += strength * sum_i F_i (w_i - base_i)^2           nats per token
    grad_i += 2 strength F_i (w_i - base_i)                   what is done here, exactly and without a graph

F is the diagonal of the Fisher information per token: how much the loss on general text reacts to each parameter. With
F = 1 everywhere it is L2-SP (Li 2018, arXiv 1802.01483).

One parameter, two sequences of general text with 2 targets each, whose summed nats have the gradients -2 and 0.5:
F = (4 + 0.25) / 4 targets = 1.0625. Moved by 0.1 with strength 0.4 the penalty is 0.4 * 1.0625 * 0.01 = 0.00425 and its
gradient 2 * 0.4 * 1.0625 * 0.1 = 0.085.

B sequences, T tokens, D model width, V vocabulary.
"""

import json
import math
import os
from dataclasses import dataclass
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from core.config import setting
from core.errors import UserError
from core.parallel import distribute_like, full_tensor
from kernels import linear_cross_entropy
from kernels.cross_entropy import IGNORE
from learn.method import Learning, Method, take_sequences, trainable_parameters, upcast_dtype


@dataclass
class EWCConfig:
    strength: float = setting(0.0, at_least=0, below=math.inf)
    """weight of the penalty strength * sum_i F_i (w_i - base_i)^2, in nats per token. 0: off. Start with 1 and compare
    0.1 and 10. With fisher = true, 0.5 approximates KL(base, model) on general text to the second order"""
    fisher: Literal["empirical", "true", "l2sp"] = "empirical"
    """empirical: F from the gradients of general text as it stands. true: from labels drawn from the model. l2sp: F is
    1 everywhere and needs no text"""
    samples: int = setting(1000, above=0)
    """sequences of general text that F is estimated on"""


class EWC(Method):
    """Holds the base's values of what trains (`anchor`) and their F (`fisher`, None for l2sp). A parameter without a
    gradient in a step does not move, so it is not pulled either.

    F is estimated once and kept as fisher.safetensors in the run folder, for a resumed run to read again.
    """

    name = "ewc"

    def __init__(self, config: EWCConfig, learning: Learning):
        learning.require_base("forget.ewc")
        if learning.adapters:
            raise UserError("forget.ewc ties the base's weights down, and with adapters these do not move, so it "
                             "protects nothing; use --forget.lwf.alpha 0.5, whose base is the same network with its "
                             "adapters off")
        if config.fisher != "l2sp" and learning.general_text is None:
            raise UserError("forget.ewc estimates its Fisher on general text, and there is none; add a source with "
                             "the role general (forget.py replay makes one from the base), or use --forget.ewc.fisher "
                             "l2sp")
        self.config, self.learning = config, learning
        self.file = learning.folder / "fisher.safetensors" if learning.folder else None
        self.fingerprint = json.dumps([learning.fingerprint, config.fisher, config.samples, learning.seed])
        self.fisher = None

    def model_built(self, model):
        parameters = trainable_parameters(model)
        if not parameters:
            raise UserError("forget.ewc ties down weights that train, and none does; leave it out, or freeze less")
        self.anchor = {name: p.detach().clone() for name, p in parameters.items()}
        gigabytes = sum(p.numel() * p.element_size() for p in parameters.values()) / 1e9
        text = "no text"
        if self.config.fisher != "l2sp":
            found = self.load_or_estimate(model, parameters)
            gigabytes += sum(4 * p.numel() for p in parameters.values()) / 1e9
            text = f"{found['sequences']:,} sequences, {found['tokens']:,} tokens of general text"
            if found["sequences"] < self.config.samples:
                text += f" (of {self.config.samples:,} wanted)"
        self.notes = [f"ewc: {self.config.fisher} from {text}; its copies take {gigabytes:.2f} GB over all ranks"]

    def load_or_estimate(self, model, parameters: dict) -> dict:
        """Sets self.fisher, and returns {"sequences", "tokens"} of the text that it was estimated on."""
        learning = self.learning
        found = learning.world.broadcast(self.read_header(parameters) if learning.world.main else None)
        if found:
            with safe_open(self.file, framework="pt") as stored:
                self.fisher = {name: distribute_like(stored.get_tensor(name), p, upcast_dtype(p))
                               for name, p in parameters.items()}
            return found
        self.fisher, found = estimate_fisher(model, learning, self.config.samples, self.config.fisher == "true")
        self.save(found)
        return found

    def read_header(self, parameters: dict) -> dict | None:
        """{"sequences", "tokens"} of the stored F, or None where there is none, or where it was made from another base,
        text or setting."""
        if self.file is None or not self.file.exists():
            return None
        with safe_open(self.file, framework="pt") as stored:
            same = stored.metadata()["fingerprint"] == self.fingerprint and set(stored.keys()) == parameters.keys()
            return json.loads(stored.metadata()["known"]) if same else None

    def save(self, found: dict):
        if self.file is None:
            return
        tensors = {name: full_tensor(value) for name, value in self.fisher.items()}
        if self.learning.world.main:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_suffix(".tmp")
            save_file(tensors, temporary, metadata={"fingerprint": self.fingerprint, "known": json.dumps(found)})
            os.replace(temporary, self.file)
        self.learning.world.barrier()

    @torch.no_grad()
    def before_step(self, step, model):
        total = 0.0
        for name, p in model.named_parameters():
            if name in self.anchor:
                moved = p.to(upcast_dtype(p)) - self.anchor[name].to(upcast_dtype(p))
                pull = moved * self.fisher[name] if self.fisher else moved
                total = total + (pull * moved).sum()
                if p.grad is not None:
                    p.grad.add_(pull, alpha=2 * self.config.strength)
        return {"ewc_penalty": self.config.strength * full_tensor(total).item()}

    def state(self):
        """Base and F do not change during a run, so a checkpoint only holds what they were made from."""
        return {}, {"fingerprint": self.fingerprint}

    def load_state(self, tensors, values):
        if values["fingerprint"] != self.fingerprint:
            raise UserError(f"forget.ewc was made of {values['fingerprint']} and is made of {self.fingerprint}; use "
                             f"the same base, general text and settings to resume")


def estimate_fisher(model, learning: Learning, samples: int, true: bool = False) -> tuple[dict, dict]:
    """The diagonal Fisher information per token of `samples` sequences of general text: ({name: F in fp32 or wider,
    laid out over the ranks like the parameter}, {"sequences", "tokens"}).

    F = sum over sequences of (gradient of the sequence's summed nats)^2 / all their targets; one backward pass per
    sequence. With labels drawn from the model (`true`) the gradients of different tokens are uncorrelated given the
    text, so F does not depend on where the text is cut into sequences. With the text's own labels this holds only
    approximately (Kunstner 2019, arXiv 1905.12558).

    Every rank iterates over the same text. Ranks that each hold the full model (DDP) share the sequences out and sum
    F at the end. Ranks that share one model (FSDP) all take every sequence: a gradient is then averaged over the
    ranks, and equal ones average to themselves.
    """
    world = learning.world
    total = {name: torch.zeros_like(p, dtype=upcast_dtype(p)) for name, p in trainable_parameters(model).items()}
    share_out = world.size > 1 and not any(isinstance(p, DTensor) for p in total.values())
    sequences = tokens = 0
    model.zero_grad(set_to_none=True)
    with tqdm(total=samples, unit="sequence", desc="Fisher", disable=None if world.main else True) as bar:
        for sequence in split_sequences(learning.general_text):
            if sequences == samples:
                break
            targets = int((sequence.labels != IGNORE).sum())
            if not targets:
                continue
            number = sequences
            sequences += 1
            tokens += targets
            bar.update()
            if share_out and number % world.size != world.rank:
                continue
            hidden = learning.forward(model, sequence)
            labels = sequence.labels.to(hidden.device)
            if true:
                generator = torch.Generator().manual_seed((learning.seed * 1_000_003 + number) % 2**63)
                labels = draw_labels(hidden, model.head.weight, labels, generator)
            linear_cross_entropy(hidden, model.head.weight, labels)[0].backward()
            for name, p in trainable_parameters(model).items():
                if p.grad is not None:
                    total[name] += p.grad.to(total[name].dtype).square()
            model.zero_grad(set_to_none=True)
    if not sequences:
        raise UserError("the Fisher of forget.ewc has no general text to be estimated on; add a source with the role "
                         "general, or use --forget.ewc.fisher l2sp")
    if share_out:
        for value in total.values():
            torch.distributed.all_reduce(value)
    return {name: value / tokens for name, value in total.items()}, {"sequences": sequences, "tokens": tokens}


def split_sequences(batches):
    """Yields every sequence of the batches as a batch of one."""
    for batch in batches:
        for i in range(len(batch.tokens)):
            yield take_sequences(batch, slice(i, i + 1))


@torch.no_grad()
def draw_labels(hidden, weight, labels, generator):
    """labels [B, T] with each target replaced by a token drawn from softmax(hidden weight^T); a seed draws the same on
    every device. hidden [B, T, D], weight [V, D]."""
    drawn_labels, targets = labels.clone(), (labels != IGNORE).nonzero(as_tuple=True)
    draw = torch.rand(len(targets[0]), generator=generator, dtype=torch.float64).to(hidden.device)
    x, drawn = hidden[targets], []
    # 256 targets at a time: all logits [T, V] of a long sequence would be gigabytes.
    for i in range(0, len(x), 256):
        cumulative = (x[i:i + 256] @ weight.to(x.dtype).T).double().softmax(-1).cumsum(-1)
        drawn.append(torch.searchsorted(cumulative, draw[i:i + 256, None] * cumulative[:, -1:], right=True)[:, 0])
    drawn_labels[targets] = torch.cat(drawn).to(drawn_labels.dtype)
    return drawn_labels
