"""What a training keeps in memory, in bytes on each rank, from arithmetic alone: no weight is read, no tensor made.

    always there    weights + optimizer state + copies that methods against forgetting keep + what FSDP has gathered +
                    what a pipeline receives in
    forward         + gradients of earlier micro-batches + activations + the head's chunk of logits and its gradients
    backward        + activations, which go, and gradients, which come, block by block + one block's workspace
    update          + gradients

The peak is the largest of the last three on top of the first, and the plan is that of the rank with the highest peak.
A process takes more: Python, the libraries and a GPU's context (OVERHEAD), and what its allocator cannot use.
tests/measure/test_memory.py holds the arithmetic to the tensors that autograd keeps and to the peaks of real processes,
and test_memory_layouts.py to those of ranks.

A pipeline's rank keeps the activations of several micro-batches: gpipe those of all N, 1f1b on rank r those of P - r.
FSDP shards gradients after a step's last micro-batch: until then, if there are several, each rank keeps those of all
weights that it computes, in fp32, unless parallel.reduce_each. With parallel.offload it does so in a pipeline alone.

Shapes: B sequences and T tokens of a micro-batch, D model width, H heads, K key-value heads, d head size, F MLP width,
V vocabulary, L blocks, E experts, of which a token goes to k; t ranks share matmuls, C a sequence, P the blocks.
"""

from dataclasses import dataclass

import torch

from core.architecture import ModelConfig
from core.context_parallel import exchanges_keys
from kernels.cross_entropy import chunk_rows
from measure.elements import Elements, Place, count_elements, count_sparse, find_places

# Bytes of a weight of the base, by lora.base: its code, and its share of the scales of blocks of 64 and 256 (arXiv
# 2305.14314); int8 has one fp32 scale per output, which is next to nothing.
FOUR_BITS = {True: 0.5 + 1 / 64 + 4 / (64 * 256), False: 0.5 + 4 / 64}
# Bytes of AdamW's 8-bit moments and their scales, per parameter (kernels/adamw.py).
EIGHT_BIT = 2 + 6 / 32
# The parts of a plan. Those of KEPT are there from step to step.
PARTS = {"weights": "of the base and of adapters", "gradients": "those that are there at once",
         "optimizer": "moments", "methods": "copies against forgetting: EMA, EWC, LwF",
         "gathered": "weights that FSDP has gathered", "activations": "of all micro-batches under way",
         "head": "a chunk of logits, gradients of the head and of the hidden states",
         "workspace": "one block's gradients, and what is recomputed",
         "exchange": "buffers of a pipeline, gradients on their way between ranks",
         "host": "in the host's memory, with what a save copies, and no part of the peak (core/offload.py)",
         "holes": "what a CPU's heap cannot reuse"}
KEPT = ("weights", "optimizer", "methods", "exchange")
# What a process takes beside its tensors: the CUDA context with the libraries' workspaces; on a CPU, Python and torch.
OVERHEAD = {"cuda": 1.0e9, "cpu": 0.43e9}


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


@dataclass(frozen=True)
class Rank:
    """One of the ranks, and what it has of the model and of a step."""
    c: object                   # train.Config
    config: ModelConfig
    kind: str                   # of its device, cuda or cpu
    types: Types
    place: Place
    count: Elements
    number: int                 # in its pipeline
    # Whether FSDP shards what it has, and over how many ranks.
    is_sharded: bool
    shards: int
    # Whether DDP averages its gradients, which it then keeps in buffers of its own.
    has_buckets: bool
    # M: the tokens of a micro-batch that its attention and MLPs compute, and `own` those of its norms and its loss.
    M: int
    own: int
    N: int                      # micro-batches of a step

    @property
    def is_pipelined(self) -> bool:
        return self.c.parallel.pipeline > 1

    @property
    def is_offloaded(self) -> bool:
        return self.c.parallel.offload and self.kind == "cuda"

    @property
    def is_last(self) -> bool:
        return self.place.has_head


def count_micro_batches(c, ranks: int) -> tuple[int, int]:
    """(B, N): the sequences of a micro-batch, and how many micro-batches each rank has in a step."""
    share = max(1, c.train.batch_size * c.parallel.pipeline * c.parallel.context * c.parallel.tensor // ranks)
    B = min(share, c.train.micro_batch_size)
    return B, -(-share // B)


def list_ranks(c, config: ModelConfig, ranks: int, kind: str) -> list[Rank]:
    """One rank of each part of the model: the others hold as much."""
    parallel, (B, N) = c.parallel, count_micro_batches(c, ranks)
    is_sharded, peers = parallel.shards(ranks), ranks // parallel.pipeline
    shards = peers // parallel.replicas // parallel.tensor if is_sharded else 1
    M = B * c.data.context // parallel.context
    return [Rank(c, config, kind, find_types(c, kind, is_sharded), place, count_elements(config, c.lora, place), number,
                 is_sharded, shards, not is_sharded and peers > 1, M, M // parallel.tensor, N)
            for number, place in enumerate(find_places(config, parallel, c.data.context))]


# ---- activations

def block_bytes(rank: Rank, sparse: bool = False) -> float:
    """Bytes per token of M that autograd keeps of one block for its backward pass.

    The inputs of its norms; their outputs, of which autocast makes a copy for each layer that reads them; q, k, v and
    o, and what o_proj reads, which is another tensor where documents attend apart, types differ or ranks share
    sequences; gate, up and their product; S of the adapters; in fp32 a value per norm and per head. Of ranks that share
    matmuls each has the gathered outputs of the norms and all of S, and of the rest its tokens, its heads or its part
    of the MLP's width.
    """
    config, types, count, t, C = rank.config, rank.types, rank.count, rank.place.t, rank.c.parallel.context
    D, F, d = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    # Each of C ranks has the keys and values of all tokens, or whole heads.
    K *= C if C > 1 and exchanges_keys(rank.c.parallel.exchange, C, H // t, K // t) else -(-C // (K // t))
    copies = (3, 2) if types.casts and not is_adapted(count) else (1, 1)
    is_apart = rank.kind == "cpu" and rank.c.data.mask_documents
    apart = 0 if not is_apart and types.attention == types.matmul and C == 1 else H * d
    mlp = experts_bytes(rank) if sparse else (copies[1] * D + 3 * F / t) * types.matmul
    return (copies[0] * D + count.low) * types.matmul + mlp + (
        2 * D * types.stream + apart * types.matmul + (2 * H + 2 * K) * d * types.attention + 4 * (H + 2)) / t


def is_adapted(count: Elements) -> bool:
    return count.low + count.low_experts > 0


def experts_bytes(rank: Rank) -> float:
    """The same of a block's experts and their router.

    What the router reads; k times: the token, of which autocast makes a copy for each layer that reads it, gate, up and
    their product, what the expert says, and S of the adapters; the scores of all experts, and k times the expert's
    number, where the token stands among the others and was before, and its weight before and after it is normalised. A
    frozen layer keeps no input.
    """
    config, types, count = rank.config, rank.types, rank.count
    k, E, D, F = (config.num_experts_per_tok, config.num_experts, config.hidden_size, config.moe_intermediate_size)
    frozen = is_adapted(count)
    copies = (1 if count.low_experts else 0) if frozen else 2 if types.casts else 1
    of_row = (copies + 1) * D + (3 if copies else 2) * F / rank.place.t + count.low_experts
    weights = 4 * (2 * k + 1 if config.norm_topk_prob else k)
    return (k * of_row + (0 if frozen else D)) * types.matmul + 4 * E + 24 * k + weights


def recomputed_blocks(c, blocks):
    """Those of the blocks of a stage that are recomputed in the backward pass (model.run_blocks)."""
    return blocks[::c.model.recompute_every] if c.model.activation_checkpointing else blocks[:0]


def stage_bytes(rank: Rank, s: int) -> float:
    """What autograd keeps of one micro-batch in the s-th stage of a rank."""
    c, types, count, blocks = rank.c, rank.types, rank.count, rank.place.stages[s]
    again = recomputed_blocks(c, blocks)
    plain = [block for block in blocks if block not in again]
    sparse = count_sparse(rank.config, plain)
    is_first = rank.number == s == 0
    is_last = rank.is_last and s == len(rank.place.stages) - 1
    # The inputs of recomputed blocks; the output of the last one, which the last norm reads; the hidden states; the
    # angles.
    stream = rank.own * rank.config.hidden_size * types.stream
    of_blocks = len(again) * stream + rank.M * (
        (sparse and sparse * block_bytes(rank, True)) + (len(plain) - sparse) * block_bytes(rank))
    if sparse and types.matmul < 4:
        # Adapters are cast to the matmuls' type for the experts' grouped ones.
        of_blocks += sparse * types.matmul * count.adapters_on_experts
    kept = of_blocks + (2 if is_last else 1) * stream + 4 * rank.M * rank.config.head_dim
    if not is_first or (c.lora.rank and c.lora.embeddings == "frozen" and not again):
        # The input of the first block is what the rank has received, or nothing that trains stands before its norm.
        kept -= stream
    if types.casts and not c.lora.rank:
        # Autocast keeps its copies of the weights from the forward pass to the backward pass; experts, whose matmul
        # makes its own, have none while their block waits to be recomputed.
        share = len(blocks) / len(rank.place.blocks)
        kept += types.matmul * (count.linear * share - count.experts * count_sparse(rank.config, again))
    return kept


def find_workspace(rank: Rank) -> float:
    """What the backward pass of one block takes: recomputed activations, and at once the gradients of gate, up and
    their product, two tensors on the way to these, and the streams'."""
    config, types, count, M = rank.config, rank.types, rank.count, rank.M
    sparse, blocks, t = count_sparse(config, rank.place.blocks), len(rank.place.blocks), rank.place.t
    D, checkpoints = config.hidden_size, rank.c.model.activation_checkpointing
    widths, of_block = [], []
    if sparse < blocks:
        widths.append(5 * config.intermediate_size / t + 4 * D)
        of_block.append(M * block_bytes(rank))
    if sparse:
        widths.append(config.num_experts_per_tok * (5 * config.moe_intermediate_size / t + 4 * D))
        casts = types.matmul * count.adapters_on_experts if types.matmul < 4 else 0
        casts += types.matmul * count.experts if types.casts and not rank.c.lora.rank else 0
        of_block.append(M * block_bytes(rank, True) + casts)
    workspace = (max(of_block) if checkpoints else 0) + M * max(types.matmul, types.attention) * max(widths)
    if sparse and not rank.c.lora.rank and rank.kind == "cpu":
        # There an expert's matmul is one of its own, and the gradients of all of them are put together.
        workspace += types.matmul * count.experts / 3
    return workspace


# ---- which micro-batches are under way

def count_passes(rank: Rank) -> int:
    """How many forward passes of its stages a rank has made before its first backward pass."""
    parallel, N, r = rank.c.parallel, rank.N, rank.number
    P, turns = parallel.pipeline, len(rank.place.stages)
    if P == 1:
        return 1
    if parallel.schedule == "gpipe":
        return N
    if turns == 1:
        return min(N, P - r)
    return min((turns - 1) * round_size(rank) + 2 * (P - 1 - r) + 1, turns * N)


def round_size(rank: Rank) -> int:
    """How many micro-batches pass a stage of `interleaved` before the rank's next stage has its turn."""
    return rank.N // max(1, rank.N // rank.c.parallel.pipeline)


def split_passes(rank: Rank, passes: int) -> list[int]:
    """Of which stage each of the first forward passes is."""
    turns, counts = len(rank.place.stages), [0] * len(rank.place.stages)
    for i in range(passes):
        counts[i // round_size(rank) % turns if turns > 1 else 0] += 1
    return counts


# ---- what a rank keeps, and the moments of a step

def estimate(c, config: ModelConfig, ranks: int = 1, kind: str = "cuda") -> dict[str, float]:
    """{part: bytes on each rank}, and the "peak" of them, of a training with the settings `c` (train.Config) of a model
    `config` on `ranks` devices of a kind, cuda or cpu: of the rank with the highest peak. Parts that are not needed at
    the same time do not add up."""
    return max(estimate_stages(c, config, ranks, kind), key=lambda parts: parts["peak"])


def estimate_stages(c, config: ModelConfig, ranks: int = 1, kind: str = "cuda") -> list[dict[str, float]]:
    """The same of a rank of each part of the model, from the first blocks to the last."""
    return [estimate_rank(rank) for rank in list_ranks(c, config, ranks, kind)]


def find_fullest(c, config: ModelConfig, ranks: int = 1, kind: str = "cuda") -> tuple[int, int]:
    """(n, P): the n-th of P parts of the model is the one whose ranks have the highest peak."""
    peaks = [parts["peak"] for parts in estimate_stages(c, config, ranks, kind)]
    return peaks.index(max(peaks)), len(peaks)


def estimate_rank(rank: Rank) -> dict[str, float]:
    parts, head, fsdp = keep_state(rank), size_head(rank), size_fsdp(rank)
    of_stages = [stage_bytes(rank, s) for s in range(len(rank.place.stages))]
    passes, workspace = count_passes(rank), find_workspace(rank)

    def under_way(passes: int) -> float:
        """Of so many forward passes the activations and what the losses keep for the backward pass."""
        counts = split_passes(rank, passes)
        return sum(n * size for n, size in zip(counts, of_stages)) + counts[-1] * (head["hidden"] + head["gradient"])

    def find_peak(before: float, passes: int, is_forward: bool) -> float:
        """before: bytes of gradients that are there. is_forward: whether the last of the forward passes runs too."""
        # FSDP has the head's gradient until the end; else it is, or is added to, the parameter's.
        of_head = fsdp["head"] if rank.is_sharded else 0 if before else head["gradient"]
        # A pipeline frees no block after a backward pass, until the step ends.
        blocks = fsdp["stages" if before and rank.is_pipelined else "blocks"]
        moments = [under_way(passes) - head["hidden"] - head["gradient"] + of_head + workspace + blocks]
        if is_forward:
            moments.append(under_way(passes) + head["chunk"] + (0 if rank.c.parallel.reshard else blocks))
        if rank.is_sharded:
            moments += [under_way(passes) - of_stages[-1] / len(rank.place.stages[-1]) + blocks + fsdp["block"],
                        under_way(passes - 1) + of_head + fsdp["outside"] + (0 if before else parts["gradients"])]
        else:
            moments.append(under_way(passes - 1) + (head["embedding"] if before else parts["gradients"] + workspace))
        return before + max(moments)
    waiting = fsdp["waiting"] if rank.is_sharded else parts["gradients"]
    total = rank.N * len(of_stages)
    peaks = [parts["gradients"], find_peak(waiting if rank.has_buckets else 0, passes, True)]
    if total > 1:
        peaks.append(find_peak(waiting, min(passes, total - 1), total > passes))
    activations = sum(n * size for n, size in zip(split_passes(rank, passes), of_stages))
    # On a CPU what is freed stays in the heap (core/devices.py), and some of it is too small, or in the wrong place,
    # for the tensors of the next step: about so much was measured (docs/RESULTS.md, memory by arithmetic).
    # How many rows an expert has changes with each step, and with it the sizes of what is freed.
    sparse = count_sparse(rank.config, rank.place.blocks) > 0
    holes = max(head["chunk"], parts["gradients"] / 2, activations * (0.6 if sparse else 0.2))
    holes = holes if rank.kind == "cpu" else 0
    peak = sum(parts[name] for name in KEPT) + fsdp["gathered"] + max(peaks) + holes
    found = parts | {
        "gradients": max(waiting if rank.has_buckets or total > 1 else 0, parts["gradients"]),
        "gathered": fsdp["gathered"] + fsdp["stages" if rank.is_pipelined else "blocks"], "activations": activations,
        "head": head["chunk"] + head["hidden"] + head["gradient"], "workspace": workspace,
        "exchange": parts["exchange"] + max(fsdp["block"], fsdp["outside"]), "holes": holes}
    return {name: found[name] for name in PARTS} | {"peak": peak}


def keep_state(rank: Rank) -> dict[str, float]:
    """The bytes of what is there from step to step, and of the gradients that the optimizer reads; "host": in the
    host's memory, where it is offloaded, with the copy that a save writes while the training goes on. A save may copy
    less of the methods' tensors than is counted here."""
    c, types, count = rank.c, rank.types, rank.count
    adapters = 4 * count.trained if c.lora.rank else 0
    weights = linear_bytes(rank) * count.linear + types.weight * (count.base - count.linear) + adapters
    keeps_rest = types.weight == 2 and not c.lora.rank
    state = {"adamw": 8 * count.trained, "adamw_8bit": (EIGHT_BIT + keeps_rest) * count.trained,
             "muon": 8 * count.trained - 4 * count.matrices}[c.optim.name]
    # A pipeline has a place for each micro-batch of a step, for what comes from the rank before and the one behind.
    sides = 2 * len(rank.place.stages) - (rank.number == 0) - rank.is_last
    received = rank.N * rank.own * rank.config.hidden_size * types.stream * sides
    sharded = {"weights": weights, "optimizer": state, "methods": copies_of_methods(c, count, types),
               "gradients": types.gradient * count.trained}
    sharded = {name: size / rank.shards for name, size in sharded.items()}
    if rank.is_offloaded:
        copy = sharded["optimizer"] + sharded["methods"] + (adapters or weights) / rank.shards
        return dict.fromkeys(sharded, 0.0) | {"host": sum(sharded.values()) + copy, "exchange": received}
    return sharded | {"host": 0.0, "exchange": received}


def linear_bytes(rank: Rank) -> float:
    """Bytes of an element of a linear layer's weight."""
    lora = rank.c.lora
    quantised = {"nf4": FOUR_BITS[lora.double_quant], "int4": FOUR_BITS[lora.double_quant], "int8": 1.0}
    return quantised.get(lora.base if lora.rank else "plain", rank.types.weight)


def size_head(rank: Rank) -> dict[str, float]:
    """The bytes of the loss: "chunk", of logits, and the head's copy in another type; what it keeps of a micro-batch,
    "hidden" and "gradient", those of the hidden states and of the head; "embedding": the embedding's gradient, before
    it is added to that of other micro-batches."""
    types, c = rank.types, rank.c
    V, D = rank.config.vocab_size, rank.config.hidden_size
    trained = 4 * V * D if not c.lora.rank or c.lora.embeddings == "full" else 0
    found = {"chunk": 0, "hidden": 0, "gradient": 0, "embedding": trained if rank.number == 0 else 0}
    if rank.is_last:
        logits = V * (types.matmul if rank.kind == "cuda" else 4 + (types.matmul if types.matmul < 4 else 0))
        copy = types.matmul * V * D if types.matmul != types.weight and not rank.is_sharded else 0
        found |= {"chunk": chunk_rows(rank.own, logits, torch.device(rank.kind)) * logits + copy,
                  "hidden": rank.own * D * types.matmul, "gradient": trained}
    return found


def size_fsdp(rank: Rank) -> dict[str, float]:
    """What FSDP adds to a rank's shards, in bytes: "gathered", what is in no block; "blocks", this one and the next
    (all, where they stay gathered), and "stages", all, in the type of the matmuls; "head", the head's gradient in that
    type; gradients on their way to the other ranks, there and once more in fp32, of a "block" and of what is "outside"
    of them; "waiting", all of a rank's gradients, which are not reduced before the step's last micro-batch."""
    c, types, count = rank.c, rank.types, rank.count
    waits = rank.is_pipelined or not (c.parallel.reduce_each or c.parallel.offload)
    if not rank.is_sharded:
        return dict.fromkeys(("gathered", "blocks", "stages", "head", "block", "outside", "waiting"), 0)
    blocks, adapted = len(rank.place.blocks), c.lora.rank > 0
    of_params = types.weight if adapted else types.matmul
    # Of experts that ranks share, a rank gathers its own.
    others = 1 - 1 / c.parallel.experts
    block = of_params * (count.block - count.experts * others)
    trained = 0 if adapted else count.block - count.experts * others
    if adapted:
        trained = count.trained / blocks - count.adapters_on_experts * others
        block += (linear_bytes(rank) - of_params) * count.linear / blocks + 4 * trained
    keeps = min(2, blocks) if c.parallel.reshard else blocks
    outside = 0 if adapted else count.outside
    return {"gathered": of_params * count.outside, "blocks": keeps * block, "stages": blocks * block,
            "head": of_params * rank.config.vocab_size * rank.config.hidden_size if outside and rank.is_last else 0,
            "block": (of_params + 4) * trained, "outside": (of_params + 4) * outside,
            "waiting": 4 * (trained * blocks + outside) if waits else
                       0 if rank.is_offloaded else types.gradient * count.trained / rank.shards}


def copies_of_methods(c, count: Elements, types: Types) -> float:
    """Bytes of what the methods against forgetting keep, over all shards: EMA's means, EWC's anchor and Fisher
    information, LwF's teacher, unless that is the model with its adapters off."""
    of_method = 4 * count.trained if c.forget.ema.decay else 0
    if c.forget.ewc.strength:
        of_method += count.trained * (types.weight + (0 if c.forget.ewc.fisher == "l2sp" else 4))
    if c.forget.lwf.alpha and not c.lora.rank:
        of_method += types.matmul * count.linear + types.weight * (count.base - count.linear)
    return of_method
