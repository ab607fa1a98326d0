"""How many elements of a model each rank holds, from shapes alone: no weight is read, no tensor made.

Ranks part a model in three ways. A pipeline gives each some of the blocks, tensor parallel a part of each block's
matmuls, and both are counted here; FSDP shards what a rank then has, which is a division (measure/memory.py).

Example: 2 parts of 4 blocks and t = 2. The first rank has the embedding, and half of each matmul of the blocks 0 and 1.

E experts, t ranks that share each matmul.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

import lora
from core.architecture import ModelConfig
from core.parameter_names import is_of_experts
from core.pipeline import cut_layers
from core.tensor_parallel import COLUMNS, ROWS
from learn.adapters import linear_layers
from model import Model, flops_by_block


@dataclass(frozen=True)
class Place:
    """What of a model a rank has: the blocks of its stages, and of their matmuls one part of t."""
    stages: tuple[range, ...]
    has_embedding: bool = True
    has_head: bool = True
    t: int = 1

    @property
    def blocks(self) -> list[int]:
        return [block for stage in self.stages for block in stage]


@dataclass(frozen=True)
class Elements:
    """How many elements a rank has, and which of them train."""
    # All weights of the base.
    base: int
    # Those of its blocks' linear layers, which may be kept in few bits.
    linear: int
    # Those of the largest block; those in no block; those of one block's experts.
    block: int
    outside: int
    experts: int
    # Those that have gradients and moments.
    trained: int
    # Those of `trained` that are matrices in the blocks, which Muon updates.
    matrices: int
    # The sum of the ranks of one block's adapters, but for those on experts, and of those on experts.
    low: int
    low_experts: int
    # The elements of one block's adapters on experts.
    adapters_on_experts: int


@dataclass(frozen=True)
class Parameter:
    name: str
    shape: torch.Size
    # The number of the block that it is in.
    block: int | None
    trains: bool
    is_adapter: bool
    # Whether it is the weight of a linear layer in a block.
    is_linear: bool
    # Whether each of the ranks that share matmuls has a part of it.
    is_shared: bool


# What was counted before: a plan asks for the same sizes again and again.
COUNTED: dict[str, object] = {}


def remember(function, *arguments):
    key = repr((function.__name__, arguments))
    if key not in COUNTED:
        COUNTED[key] = function(*arguments)
    return COUNTED[key]


def find_places(config: ModelConfig, parallel, context: int) -> list[Place]:
    """That of each rank of a pipeline, one after the other, of sequences of `context` tokens."""
    P, turns = parallel.pipeline, 2 if parallel.pipeline > 1 and parallel.schedule == "interleaved" else 1
    cuts = cut_layers(flops_by_block(config, context), 6.0 * config.vocab_size * config.hidden_size, P * turns)
    return [Place(tuple(cuts[rank::P]), rank == 0 or (rank == P - 1 and config.tie_word_embeddings), rank == P - 1,
                  parallel.tensor) for rank in range(P)]


def count_elements(config: ModelConfig, adapters: lora.LoraConfig, place: Place | None = None) -> Elements:
    """Those of a place; None: of the full model. UserError where the adapters name layers that the model does not
    have."""
    return remember(count_anew, config, adapters, place or Place((range(config.num_hidden_layers),)))


def count_anew(config: ModelConfig, adapters: lora.LoraConfig, place: Place) -> Elements:
    blocks, sparse = set(place.blocks), count_sparse(config, place.blocks)
    own = [p for p in remember(list_parameters, config, adapters)
           if (p.block in blocks if p.block is not None else
               place.has_embedding if p.name.startswith("embed_tokens") else place.has_head)]

    def size(wanted) -> int:
        return sum(p.shape.numel() // (place.t if p.is_shared else 1) for p in own if wanted(p))

    def of_block(wanted) -> int:
        """The most of any block."""
        return max(size(lambda p, block=block: p.block == block and wanted(p)) for block in blocks)

    def of_base(p):
        return not p.is_adapter

    def low(on_experts: bool) -> int:
        """S of the adapters A [r, in], or [E, r, in]: the sum of r."""
        return sum(p.shape[-2] for p in own if p.name.endswith(".A") and is_of_experts(p.name) == on_experts)
    return Elements(
        base=size(of_base), linear=size(lambda p: p.is_linear), block=of_block(of_base),
        outside=size(lambda p: of_base(p) and p.block is None),
        experts=of_block(lambda p: of_base(p) and is_of_experts(p.name)), trained=size(lambda p: p.trains),
        matrices=size(lambda p: p.trains and of_base(p) and p.block is not None and len(p.shape) == 2),
        low=low(False) // len(blocks), low_experts=low(True) // max(1, sparse),
        adapters_on_experts=of_block(lambda p: p.is_adapter and is_of_experts(p.name)))


def list_parameters(config: ModelConfig, adapters: lora.LoraConfig) -> list[Parameter]:
    with torch.device("meta"):
        model = Model(config)
    linear = {f"{path}.weight" for path in linear_layers(model)}
    if adapters.rank:
        lora.attach(model, replace(adapters, base="plain"), seed=0)
    shared = {id(p) for module, *sides in model.tensor_plan() for names, dims in zip(sides, (COLUMNS, ROWS))
              for layer in map(module.get_submodule, names) for path, p in layer.named_parameters()
              if path.rpartition(".")[2] in dims}
    return [Parameter(name, p.shape, int(name.split(".")[1]) if name.startswith("layers.") else None, p.requires_grad,
                      ".adapters." in name, name in linear, id(p) in shared) for name, p in model.named_parameters()]


def count_sparse(config: ModelConfig, blocks: Iterable[int] | None = None) -> int:
    """How many of the blocks, or of all, have experts."""
    blocks = range(config.num_hidden_layers) if blocks is None else blocks
    return sum(block not in (config.dense_layers or ()) for block in blocks) if config.num_experts else 0
