"""What a training keeps in memory, in bytes on each rank, from arithmetic alone: no weight is read, no tensor made.

    always there    weights + optimizer state + copies that methods against forgetting keep + what FSDP has gathered
    forward         + gradients of earlier micro-batches + activations + the head's chunk of logits and its gradients
    backward        + activations, which go, and gradients, which come, block by block + one block's workspace
    update          + gradients

The peak is the largest of the last three on top of the first. A process takes more: Python, the libraries and a GPU's
context (OVERHEAD), and what its allocator cannot use. tests/measure/test_memory.py holds the arithmetic to the tensors
that autograd keeps and to the peaks of real processes.

Shapes: B sequences and T tokens of a micro-batch, D model width, H heads, K key-value heads, d head size, F MLP width,
V vocabulary, L blocks, E experts, of which a token goes to k.
"""

from dataclasses import dataclass, replace

import torch

import lora
from core.architecture import ModelConfig
from core.errors import UserError
from core.parameter_names import is_of_experts
from kernels.cross_entropy import chunk_rows
from learn.adapters import linear_layers
from model import Model

# Bytes of a weight of the base, by lora.base: its code, and its share of the scales of blocks of 64 and 256 (arXiv
# 2305.14314); int8 has one fp32 scale per output, which is next to nothing.
FOUR_BITS = {True: 0.5 + 1 / 64 + 4 / (64 * 256), False: 0.5 + 4 / 64}
# Bytes of AdamW's 8-bit moments and their scales, per parameter (kernels/adamw.py).
EIGHT_BIT = 2 + 6 / 32
# What a process takes beside its tensors: the CUDA context with the libraries' workspaces; on a CPU, Python and torch.
OVERHEAD = {"cuda": 1.0e9, "cpu": 0.43e9}


@dataclass(frozen=True)
class Elements:
    """How many elements a model has, and which of them train."""
    base: int                   # all weights of the base
    # Those of its blocks' linear layers, which may be kept in few bits.
    linear: int
    block: int                  # those of one block, the largest
    outside: int                # those in no block
    experts: int                # those of one block's experts
    trained: int                # what has gradients and moments
    # Those of `trained` that are matrices in the blocks, which Muon updates.
    matrices: int
    # The sum of the ranks of one block's adapters, but for those on experts, and of those on experts.
    low: int
    low_experts: int
    # The elements of one block's adapters on experts.
    adapters_on_experts: int


# What was counted before: a plan asks for the same sizes again and again.
COUNTED: dict[str, Elements] = {}


def count_elements(config: ModelConfig, adapters: lora.LoraConfig) -> Elements:
    """UserError where the adapters name layers that the model does not have."""
    key = repr((config, adapters))
    if key not in COUNTED:
        COUNTED[key] = count_anew(config, adapters)
    return COUNTED[key]


def count_anew(config: ModelConfig, adapters: lora.LoraConfig) -> Elements:
    with torch.device("meta"):
        model = Model(config)
    own = dict(model.named_parameters())
    base, blocks = sum(p.numel() for p in own.values()), [sum(p.numel() for p in layer.parameters())
                                                          for layer in model.layers]
    experts = max((sum(p.numel() for p in each.parameters()) for each in model.expert_plan()), default=0)
    linear = sum(layer.weight.numel() for layer in linear_layers(model).values())
    if not adapters.rank:
        matrices = sum(p.numel() for layer in model.layers for p in layer.parameters() if p.ndim == 2)
        return Elements(base, linear, max(blocks), base - sum(blocks), experts, base, matrices, 0, 0, 0)
    ranks = lora.choose_ranks(model, adapters)
    of_experts = sum(rank for path, rank in ranks.items() if is_of_experts(path))
    lora.attach(model, replace(adapters, base="plain"), seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    on_experts = max((sum(p.numel() for p in each.parameters()) for each in model.expert_plan()), default=0) - experts
    return Elements(base, linear, max(blocks), base - sum(blocks), experts, trained, 0,
                    (sum(ranks.values()) - of_experts) // config.num_hidden_layers,
                    of_experts // max(1, count_sparse(config)), on_experts)


def count_sparse(config: ModelConfig) -> int:
    """How many blocks have experts."""
    return config.num_hidden_layers - len(config.dense_layers or ()) if config.num_experts else 0


@dataclass(frozen=True)
class Types:
    """Bytes of an element of each kind of tensor."""
    weight: int                 # a plain weight as it is kept
    gradient: int
    matmul: int                 # an operand of a matmul
    stream: int                 # the residual stream between the blocks
    attention: int              # q, k, v and o as attention keeps them

    @property
    def casts(self) -> bool:
        """Whether autocast makes copies of weights and of norms' outputs for the matmuls."""
        return self.matmul != self.stream


def find_types(c, kind: str, sharded: bool = False) -> Types:
    half = c.train.precision != "fp32"
    # As in stages/build.py: bf16 weights where they do not train, or their optimizer keeps what bf16 rounds away.
    plain = 2 if c.train.precision == "bf16" and (c.lora.rank or c.optim.name == "adamw_8bit") else 4
    # FSDP gathers weights in the matmuls' type, so that nothing is left for autocast to cast.
    stream = 2 if half and sharded else plain
    return Types(plain, 4 if c.lora.rank else plain, 2 if half else 4, stream, 2 if half and kind == "cuda" else 4)


def block_bytes(config: ModelConfig, types: Types, count: Elements, whole_documents: bool = True,
                sparse: bool = False) -> int:
    """Bytes per token that autograd keeps of one block for its backward pass.

    The inputs of its norms; their outputs, of which autocast makes a copy for each layer that reads them; q, k, v and
    o, and what o_proj reads, which is another tensor where documents attend apart or types differ; gate, up and their
    product; S of the adapters; in fp32 a value per norm and per head.
    """
    D, F, d = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    copies = (3, 2) if types.casts and not is_adapted(count) else (1, 1)
    apart = 0 if whole_documents and types.attention == types.matmul else H * d
    mlp = experts_bytes(config, types, count) if sparse else (copies[1] * D + 3 * F) * types.matmul
    return (2 * D * types.stream + (copies[0] * D + count.low + apart) * types.matmul
            + (2 * H + 2 * K) * d * types.attention + 4 * (H + 2) + mlp)


def is_adapted(count: Elements) -> bool:
    return count.low + count.low_experts > 0


def experts_bytes(config: ModelConfig, types: Types, count: Elements) -> int:
    """The same of a block's experts and their router.

    What the router reads; k times: the token, of which autocast makes a copy for each layer that reads it, gate, up and
    their product, what the expert says, and S of the adapters; the scores of all experts, and k times the expert's
    number, where the token stands among the others and was before, and its weight before and after it is normalised. A
    frozen layer keeps no input.
    """
    k, E, D, F = (config.num_experts_per_tok, config.num_experts, config.hidden_size, config.moe_intermediate_size)
    frozen = is_adapted(count)
    copies = (1 if count.low_experts else 0) if frozen else 2 if types.casts else 1
    of_row = (copies + 1) * D + (3 if copies else 2) * F + count.low_experts
    weights = 4 * (2 * k + 1 if config.norm_topk_prob else k)
    return (k * of_row + (0 if frozen else D)) * types.matmul + 4 * E + 24 * k + weights


def estimate(c, config: ModelConfig, ranks: int = 1, kind: str = "cuda") -> dict[str, float]:
    """{part: bytes on each rank}, and the "peak" of them, of a training with the settings `c` (train.Config) of a model
    `config` on `ranks` devices of a kind, cuda or cpu. Parts that are not needed at the same time do not add up."""
    for name in ("tensor", "pipeline"):
        if getattr(c.parallel, name) > 1:
            raise UserError(f"the memory of layers that ranks share (parallel.{name}) is not estimated; train.py "
                            f"RECIPE.toml --dry-run measures it")
    L, V, D = config.num_hidden_layers, config.vocab_size, config.hidden_size
    shards = ranks // c.parallel.replicas if c.parallel.strategy == "fsdp" else 1
    sharded = c.parallel.shards(ranks)
    count, types = count_elements(config, c.lora), find_types(c, kind, sharded)
    M = c.train.micro_batch_size * c.data.context // c.parallel.context
    accumulates = c.train.batch_size // (ranks // c.parallel.context) > c.train.micro_batch_size
    quantised = {"nf4": FOUR_BITS[c.lora.double_quant], "int4": FOUR_BITS[c.lora.double_quant], "int8": 1.0}
    linear = quantised.get(c.lora.base if c.lora.rank else "plain", types.weight)
    adapters = 4 * count.trained if c.lora.rank else 0
    weights = (linear * count.linear + types.weight * (count.base - count.linear) + adapters) / shards
    gradients = types.gradient * count.trained / shards
    ecc = types.weight == 2 and not c.lora.rank
    state = {"adamw": 8 * count.trained, "adamw_8bit": (EIGHT_BIT + ecc) * count.trained,
             "muon": 8 * count.trained - 4 * count.matrices}[c.optim.name] / shards

    activations, workspace = size_activations(c, config, types, count, M, kind)
    trains_head = not c.lora.rank or c.lora.embeddings == "full"
    logits = V * (types.matmul if kind == "cuda" else 4 + (types.matmul if types.matmul < 4 else 0))
    chunk = chunk_rows(M, logits, torch.device(kind)) * logits
    head = chunk + M * D * types.matmul + (4 * V * D if trains_head else 0)
    head_copy = types.matmul * V * D if types.matmul != types.weight and not sharded else 0
    # FSDP has gathered, in the matmuls' type, two blocks, this one and the next (all, where they stay gathered), and
    # what is in no block; of gradients one such part, and once more in fp32 on its way to the other ranks.
    of_params = types.weight if c.lora.rank else types.matmul
    # Of experts that ranks share, a rank gathers its own.
    block = count.block - count.experts * (1 - 1 / c.parallel.experts)
    gathered = 0
    if sharded:
        of_gradients = 0 if c.lora.rank else (of_params + 4) * max(block, count.outside)
        blocks = 2 if c.parallel.reshard else L
        gathered = of_params * (blocks * block + count.outside) + of_gradients

    methods = copies_of_methods(c, count, types) / shards
    host = 0.0
    if c.parallel.offload and kind == "cuda":
        # core/offload.py keeps them there.
        host, weights, state, methods, gradients = weights + state + methods + gradients, 0.0, 0.0, 0.0, 0.0
    kept = weights + state + methods + gathered
    before = gradients if accumulates else 0
    of_head = 4 * V * D / shards if trains_head else 0
    forward = before + activations + head + head_copy
    backward = max(before + activations + of_head, gradients) + workspace
    if accumulates:
        backward = before + activations + workspace
    # On a CPU what is freed stays in the heap (core/parallel.py), and some of it is too small, or in the wrong place,
    # for the tensors of the next step: about so much was measured (docs/RESULTS.md, memory by arithmetic).
    holes = max(chunk, gradients / 2, activations / 5) if kind == "cpu" else 0
    return {"weights": weights, "optimizer": state, "methods": methods, "gathered": gathered, "gradients": gradients,
            "activations": activations, "head": head + head_copy, "workspace": workspace,
            "host": host, "holes": holes, "peak": kept + max(forward, backward, gradients) + holes}


def size_activations(c, config: ModelConfig, types: Types, count: Elements, M: int, kind: str) -> tuple[float, float]:
    """(bytes that are kept for the backward pass of M tokens, one block's workspace in it)."""
    L, D, F, sparse = config.num_hidden_layers, config.hidden_size, config.intermediate_size, count_sparse(config)
    apart = kind == "cpu" and c.data.mask_documents
    dense, of_block = M * block_bytes(config, types, count, not apart), 0
    if sparse:
        of_block = M * block_bytes(config, types, count, not apart, sparse=True)
        # Adapters are cast to the matmuls' type for the experts' grouped ones.
        of_block += types.matmul * count.adapters_on_experts if types.matmul < 4 else 0
    blocks, of_block = sparse * of_block + (L - sparse) * dense, max(of_block, dense if sparse < L else 0)
    checkpoints = c.model.activation_checkpointing
    # The inputs of the blocks and of the last norm, the hidden states, and the angles.
    stream = M * D * types.stream
    activations = (L * stream if checkpoints else blocks) + 2 * stream + 4 * M * config.head_dim
    if c.lora.rank and c.lora.embeddings == "frozen" and not checkpoints:
        # Nothing that trains stands before the first norm, so that it keeps no input.
        activations -= stream
    if types.casts and not c.lora.rank:
        # Autocast keeps its copies of the weights from the forward pass to the backward pass; experts, whose matmul
        # makes its own, have none while their block waits to be recomputed.
        activations += types.matmul * (count.linear - (count.experts * sparse if checkpoints else 0))
        of_block += types.matmul * count.experts
    # One block's workspace: recomputed activations, and at once the gradients of gate, up and their product, two
    # tensors on the way to these, and the streams'.
    widths = 5 * F + 4 * D
    if sparse:
        of_rows = config.num_experts_per_tok * (5 * config.moe_intermediate_size + 4 * D)
        widths = max(of_rows, widths if sparse < L else 0)
    workspace = (of_block if checkpoints else 0) + M * max(types.matmul, types.attention) * widths
    if sparse and not c.lora.rank and kind == "cpu":
        # There an expert's matmul is one of its own, and the gradients of all of them are put together.
        workspace += types.matmul * count.experts / 3
    return activations, workspace


def copies_of_methods(c, count: Elements, types: Types) -> float:
    """Bytes of what the methods against forgetting keep, over all shards: EMA's means, EWC's anchor and Fisher
    information, LwF's teacher, unless that is the model with its adapters off."""
    of_method = 4 * count.trained if c.forget.ema.decay else 0
    if c.forget.ewc.strength:
        of_method += count.trained * (types.weight + (0 if c.forget.ewc.fisher == "l2sp" else 4))
    if c.forget.lwf.alpha and not c.lora.rank:
        of_method += types.matmul * count.linear + types.weight * (count.base - count.linear)
    return of_method
