"""What a run refuses before anything is read or started: settings that exclude each other, and what cannot fit."""

import math
from pathlib import Path

import torch

from core import devices
from core.context_parallel import fits_heads
from core.errors import UserError
from learn.choose_objective import refuse_objective
from model import BY_LENGTH
from stages.sources import refuse_sources

# Tokens of all sequences of a step, of which a rank holds its share.
MOST_TOKENS = 2**30

# The objectives that sum over tokens, so that ranks may share a sequence.
SHARING = ("causal", "masked", "span", "ul2", "fim")


def refuse_combinations(c, ranks: int):
    """UserError for settings that exclude each other or name nothing, before anything is read or started."""
    if c.optim.name == "muon" and c.lora.rank:
        raise UserError("optim.name muon makes whole weights' updates orthogonal, and an adapter's A and B are none; "
                        "use --optim.name adamw with adapters")
    if c.lora.rank and c.model.init == "scratch":
        raise UserError("lora.rank puts adapters on a base, and model.init scratch has none that is kept; leave one of "
                        "them out")
    if c.lora.rank and c.optim.embedding_lr_scale != 1:
        raise UserError("optim.embedding_lr_scale does nothing with adapters; set lora.embedding_lr_ratio")
    c.parallel.refuse_layout(ranks)
    refuse_objective(c, ranks)
    refuse_batch(c, ranks)
    if c.train.branch_from and not Path(c.train.branch_from).is_dir():
        raise UserError(f"train.branch_from {c.train.branch_from} does not exist; name a checkpoint, "
                        f"out/RUN/checkpoints/step_N")
    if c.model.recompute_every > 1 and not c.model.activation_checkpointing:
        raise UserError(f"model.recompute_every is {c.model.recompute_every}, but nothing is recomputed, so it would "
                        f"do nothing; set model.activation_checkpointing, or leave it out")
    c.log.refuse_missing()
    if not c.model.path and not (c.model.init == "scratch" and c.model.tokenizer):
        raise UserError("model.path is not set; name a Hugging Face folder, or --model.init scratch with "
                        "--model.tokenizer")
    if not c.model.path:
        refuse_sizes(c)
    if not c.data.sources:
        raise UserError("no data: name at least one source, e.g. --data.sources.domain.path shards/legal")
    refuse_sources(c.data.sources)


def refuse_batch(c, ranks: int):
    """UserError where the sequences of a step cannot be shared out to the ranks, or are too many."""
    sharing = c.parallel.context * c.parallel.tensor * c.parallel.pipeline
    if c.train.batch_size % (groups := ranks // sharing):
        sharers = f"groups of {sharing} ranks" if sharing > 1 else "ranks"
        raise UserError(f"train.batch_size {c.train.batch_size} is not a multiple of the {groups} {sharers}")
    if c.train.batch_size * c.data.context > MOST_TOKENS:
        raise UserError(f"train.batch_size {c.train.batch_size} times data.context {c.data.context} are more than "
                        f"{MOST_TOKENS:,} tokens a step; lower one of them")


def refuse_sizes(c):
    """UserError for sizes of a model from scratch that do not go together, or whose blocks alone outgrow the memory."""
    D, F, H, K = (getattr(c.model, name) for name in ("hidden_size", "intermediate_size", "num_attention_heads",
                                                      "num_key_value_heads"))
    if D % (2 * H):
        raise UserError(f"model.hidden_size {D} is not a multiple of twice the model.num_attention_heads {H}")
    if H % K:
        raise UserError(f"model.num_attention_heads {H} is not a multiple of the model.num_key_value_heads {K}")
    refuse_memory(c.model.num_hidden_layers * (2 * D * D + 2 * D * (D // H) * K + 3 * D * F), c,
                  devices.pick_device(c.device), "model.hidden_size, model.intermediate_size, model.num_hidden_layers")


def refuse_sharing(c, config):
    """UserError where ranks cannot share the sequences, or the matmuls, of a model with this ModelConfig."""
    C, t, H, K = c.parallel.context, c.parallel.tensor, config.num_attention_heads, config.num_key_value_heads
    rope = config.rope_scaling
    longest = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if C > 1 and rope.get("rope_type") in BY_LENGTH and c.data.context > longest:
        raise UserError(f"parallel.context: the model turns positions beyond {longest} by the length of the sequence "
                        f"({rope['rope_type']}), of which each rank has a part; leave parallel.context out, or take "
                        f"another --model.rope-scaling")
    widths = {"heads": H, "key-value heads": K, "MLP width": config.intermediate_size, "data.context": c.data.context,
              "width of experts": config.moe_intermediate_size}
    if t > 1 and (odd := [name for name, size in widths.items() if size % t]):
        raise UserError(f"parallel.tensor {t} does not divide {widths[odd[0]]}, the {odd[0]}")
    if C > 1 and (c.data.context % (2 * C) or c.data.context % (C * t)):
        raise UserError(f"data.context {c.data.context} is not a multiple of {math.lcm(2 * C, C * t)}: "
                        f"parallel.context {C} cuts a sequence into two pieces for each rank; change one of them")
    if C > 1 and c.parallel.exchange == "heads" and not fits_heads(C, H // t, K // t):
        shown = f" that parallel.tensor {t} leaves" if t > 1 else ""
        raise UserError(f"parallel.exchange heads needs a parallel.context that divides the {H // t} heads{shown}, and "
                        f"divides the {K // t} key-value heads or is a multiple of them, and {C} does not; use keys")
    if max(C, t) > 1 and c.objective.name not in SHARING:
        raise UserError(f"objective {c.objective.name} needs sequences as a whole, which parallel."
                        f"{'context' if C > 1 else 'tensor'} parts; leave one of them out")
    N, E = c.parallel.experts, config.num_experts
    if N > 1 and (not E or E % N):
        raise UserError(f"parallel.experts {N} does not divide the {E} experts of the model; take a divisor of them"
                        if E else "parallel.experts is about a mixture of experts, and this model has none; leave it "
                                  "out")
    if N > 1 and c.lora.base != "plain":
        raise UserError(f"lora.base {c.lora.base} keeps the experts of a layer in one record, which parallel.experts "
                        f"cannot part; leave one of them out")
    if t > 1:
        refuse_parting(c, config)


def refuse_parting(c, config):
    """UserError where a setting needs of a layer's weights what ranks that share its matmul do not have."""
    t = c.parallel.tensor
    # The inputs of o_proj and down_proj, of which each rank has a part; those of the others, which all have.
    parted = [config.num_attention_heads * config.head_dim, config.intermediate_size, config.moe_intermediate_size]
    shown = f"parallel.tensor {t} parts layers of {' and '.join(map(str, filter(None, parted)))} inputs within them"
    if c.optim.name == "adamw_8bit" and any(width % 32 == 0 and width // t % 32 for width in parted):
        raise UserError(f"optim.name adamw_8bit has a scale for every 32 columns, and {shown}; leave one of them out")
    if c.lora.base in ("nf4", "int4") and (config.hidden_size % 64 or any(width // t % 64 for width in parted)):
        raise UserError(f"lora.base {c.lora.base} has blocks of 64, and {shown}, or a row of {config.hidden_size} is "
                        f"none of them; take --lora.base int8, or leave one of them out")


def refuse_pipeline(c, config, ranks: int):
    """UserError where a model with this ModelConfig cannot be trained in the stages of a pipeline."""
    P, schedule = c.parallel.pipeline, c.parallel.schedule
    if P == 1:
        return
    stages = 2 * P if schedule == "interleaved" else P
    if config.num_hidden_layers < stages:
        raise UserError(f"parallel.pipeline {P} with schedule {schedule} makes {stages} parts of the model's "
                        f"{config.num_hidden_layers} layers; lower it")
    if c.objective.name not in SHARING:
        raise UserError(f"objective {c.objective.name} runs the model more than once or on parts of a batch, which the "
                        f"stages of parallel.pipeline do not; leave one of them out")
    unfit = {"compile": c.compile, "lora.embeddings": c.lora.rank and c.lora.embeddings != "frozen"}
    if odd := [name for name, is_set in unfit.items() if is_set]:
        raise UserError(f"{odd[0]} needs the model as a whole, which parallel.pipeline parts; leave one of them out")
    sharing, size = c.parallel.context * c.parallel.tensor, c.train.micro_batch_size
    share = c.train.batch_size * P * sharing // ranks
    if share % min(share, size):
        raise UserError(f"train.micro_batch_size {size} does not divide the {share} sequences of a step that each "
                        f"pipeline has; its micro-batches must have one size")
    count = max(1, share // size)
    if schedule != "gpipe" and count < stages:
        raise UserError(f"parallel.schedule {schedule} needs {stages} micro-batches a step, and train.batch_size and "
                        f"train.micro_batch_size make {count}; raise the first, lower the second, or use gpipe")
    if schedule == "interleaved" and count % (count // P):
        raise UserError(f"parallel.schedule interleaved cannot part {count} micro-batches into rounds of about {P}; "
                        f"make them a multiple of {P}")


def refuse_memory(parameters: int, c, device: torch.device, remedy: str):
    """UserError where so many parameters, in the least that a run keeps of each, are more than a device's memory."""
    # bf16, and where all of them train as much for the gradient.
    least, memory = parameters * (2 if c.lora.rank else 4), devices.memory_bytes(device)
    if c.parallel.strategy == "ddp" and c.lora.base == "plain" and least > memory:
        raise UserError(f"a model of {parameters:,} parameters takes at least {least / 1e9:,.0f} GB, and {device} has "
                        f"{memory / 1e9:,.0f}; lower {remedy}")


def refuse_stops(c, roles: set[str], steps: int):
    """UserError for rules that are to end the run early and cannot; roles: of the sources with held-out text."""
    n, every = c.eval.stop_patience, c.eval.every
    after = steps // 5 if c.eval.stop_after is None else c.eval.stop_after
    # Of those in the run, the evaluations that count; nothing is forgotten at step 0.
    counted = len(range(0, steps, every)) - len(range(0, after, every))
    needed = {"stop_gain": n + 1, "stop_forgetting": n + (after == 0)}
    for name, role in (("stop_gain", "domain"), ("stop_forgetting", "general")):
        if getattr(c.eval, name) and role not in roles:
            raise UserError(f"eval.{name} ends the run by held-out {role} text, and no {role} source has any; pack one "
                            f"with --heldout above 0, or leave it out")
        if getattr(c.eval, name) and counted < needed[name]:
            raise UserError(f"eval.{name} judges {needed[name]} evaluations from step {after} on (eval.stop_after), "
                            f"and with eval.every {every} the run of {steps} steps has {max(0, counted)}; set "
                            f"--eval.every {max(1, (steps - after) // 10)}, or lower eval.stop_after")
