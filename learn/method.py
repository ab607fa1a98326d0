"""A retention method keeps what the base knows while a domain is learned: its hooks, and what it may know of a run.

To add one, write learn/NAME.py with a dataclass of settings, of which the first turns it on, and a subclass of Method,
and add both to ForgetConfig and METHODS in forget.py. To remove one, delete those. B sequences, T tokens, D width.
"""

import contextlib
import copy
import dataclasses
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from core.parallel import World, is_first_copy
from core.sharding import distribute_like


@dataclass
class Learning:
    """What a retention method may know of a run. stages/build.py makes it."""

    steps: int
    seed: int
    world: World
    forward: Callable
    """forward(model, batch) -> hidden states [B, T, D], computed in the run's precision on the model's device"""
    general_text: Iterable | None = None
    """batches of general text, corrupted by the objective, the same on every rank, to be read once; None: the run has
    no general source"""
    general_sources: frozenset[int] = frozenset()
    """the general sources that the plan draws from, as numbers in batch.source"""
    replay_share: Callable = lambda step: 0.3
    """replay_share(step) -> the share of general sequences that the data schedule has at that step"""
    base: Callable | None = None
    """base(model) -> context manager that yields a module which computes as the base does, e.g. the model with its
    adapters switched off. None: whoever needs the base calls `keep_base` before the first step"""
    reference: Callable | None = None
    """the same for the model of objective.reference; None: the reference is the base"""
    reference_fingerprint: str = ""
    """of the reference, and of all that its log-probabilities depend on but the text"""
    packings: Sequence = ()
    """the sequences of each source, by batch.source, and then those of the held-out parts"""
    micro_batch_size: int = 1
    autocast: Callable = contextlib.nullcontext
    """() -> the context of a forward pass in the run's precision"""
    pipeline: Callable | None = None
    """pipeline() -> what takes both passes of one sequence at a time through the stages (core/passes.py); None: this
    rank has all layers"""
    pretrained: bool = True
    """False: there is no base, the weights begin at random"""
    adapters: bool = False
    """only adapters train, and the base's own weights do not move"""
    sharded: bool = False
    """FSDP: each rank holds a share of every tensor"""
    precision: torch.dtype | None = None
    """the dtype in which autocast computes the matmuls of `forward`; None: no autocast"""
    folder: Path | None = None
    """the run folder, for estimates that a resumed run reads again; None: keep nothing"""
    fingerprint: str = ""
    """of the base and of the general text: an estimate made from others is not used again"""

    def keep_base(self, model) -> list[str]:
        """Make `base` if it is lacking: a frozen copy of the model (teacher) as it is before the first step. Returns
        lines for the user."""
        if self.base is not None:
            return []
        assert not self.sharded, "FSDP cannot copy a model: the run must hand in a base"
        teacher = copy.deepcopy(model).requires_grad_(False)
        for module in teacher.modules() if self.precision else ():
            # Autocast would round these weights in every matmul anyway: kept rounded they take half the memory.
            if isinstance(module, nn.Linear) and module is not teacher.head:
                module.weight.data = module.weight.to(self.precision)
        self.base = lambda _: contextlib.nullcontext(teacher)
        gigabytes = sum(p.nbytes for p in teacher.parameters()) / 1e9
        return [f"a frozen copy of the base stays in memory, {gigabytes:.2f} GB"]


@contextlib.contextmanager
def evaluating(teacher):
    """A teacher in the mode for evaluation and without gradients; afterwards it is in the mode that it was in."""
    training = teacher.training
    with torch.no_grad():
        yield teacher.eval()
    teacher.train(training)


class Method:
    """The hooks of a retention method, one for each named point of the loop; each does nothing unless overridden.

    `model` is always the model itself, never DDP's wrapper. `notes` are lines for the user to read before the run. What
    a resumed run needs to go on bit for bit stands in `tensors`, sharded or not, and in `values`, which JSON can hold.
    A rewind sets the tensors back, and not the values: they come from evaluations, as decisions do.
    """

    notes: tuple | list = ()
    # What `values` are, for core/foreign_files.py's find_odd: a checkpoint may be a stranger's.
    shape: typing.ClassVar[dict] = {}

    def __init_subclass__(cls):
        # That of the method's section in forget.*: EWC has ewc.
        cls.name = cls.__name__.lower()

    def __init__(self, config, learning: Learning):
        self.config, self.learning, self.tensors, self.values = config, learning, {}, {}

    def model_built(self, model):
        """Before DDP and the optimizer are made: the place to freeze parameters and to copy weights."""

    def loss_computed(self, model, batch, loss, metrics):
        """After the forward pass of a micro-batch. loss: nats summed over its targets; metrics["hidden"]: [B, T, D],
        part of the graph. Returns the loss that backward starts from."""
        return loss

    def before_step(self, step: int, model) -> dict:
        """When the gradients are complete: averaged over all targets of the step on all ranks, not yet clipped.
        Returns {name: value} for the log."""
        return {}

    def after_step(self, step: int, model, optimizer, moved: bool = True):
        """When the optimizer has moved the weights; `moved` is False where the step's update was left out."""

    def evaluated(self, step: int, texts: dict) -> dict | None:
        """After an evaluation {source: {"role", "bits_per_byte", ...}}. Returns a decision to apply, or None."""

    def exported(self, model):
        """A context manager inside which the model holds the weights to evaluate last and to export."""
        return contextlib.nullcontext()

    def state(self) -> tuple[dict, dict]:
        """({name: tensor, sharded as it is}, values) for a checkpoint."""
        return self.tensors, self.values

    def load_state(self, tensors: dict, values: dict):
        """Restores what `state` returned, its tensors in any sharding; called after model_built."""
        for name, tensor in self.tensors.items():
            tensor.copy_(distribute_like(tensors[name], tensor))
        self.values = values


def trainable_parameters(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def counts_here(name: str, tensor: torch.Tensor, world: World) -> bool:
    """Whether, where ranks share a model, this one counts what it holds of a tensor: none before it holds the same."""
    first = not isinstance(tensor, DTensor) or is_first_copy(tensor, world)
    return first and not (world.pipe and world.pipe.is_copy(name))


def upcast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype for arithmetic on x: fp32, or float64 where x is float64."""
    return torch.promote_types(x.dtype, torch.float32)


def take_sequences(batch, which):
    """The batch of some of its sequences; `which` is a slice or a list of their numbers."""
    return dataclasses.replace(batch, **{name: value[which] for name, value in vars(batch).items()
                                         if isinstance(value, (torch.Tensor, np.ndarray))})
