"""Continue the pretraining of a model on a domain corpus, with replay of general text, and say what it was worth.

    python train.py recipes/cpt.toml --model.path DIR --data.sources.domain.path shards/legal --out out/legal
    python train.py recipes/cpt.toml ... --dry-run               one step, one evaluation, one save, and nothing left
    torchrun --nproc-per-node 8 train.py recipes/llama2_7b_cpt.toml

Everything the run leaves is in its folder: config.toml (reruns it), metrics.jsonl, plan.jsonl, eval_step_N.json,
checkpoints/, eval.json, final/ (a Hugging Face folder), report.html. The same command again resumes it, bit for bit.
A feature enters the loop as one call at one of five points: model built, loss computed, before the step, after the
step, once in a while.
"""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import data
import eval as evaluation
import forget
import hf
import lora
import tokenizer as tokenizers
from core import checkpoint, guard, log, parallel
from core.config import main_guard, parse, refuse_unused, to_toml
from core.hashing import mix_keys, short_digest
from core.log import LogConfig
from core.parallel import ParallelConfig
from forget import ForgetConfig
from learn import merge, objectives, optim
from learn.objectives import ObjectiveConfig
from learn.optim import OptimConfig
from lora import LoraConfig
from measure import verdict
from model import Model, ModelConfig, matmul_flops_per_token
from text import mixture
from text.mixture import DataConfig, LengthConfig
from text.shards import SPLITS, Shards, check_tokenizer, open_buckets, verify

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}     # dense bf16, vendors' data sheets


@dataclass
class ModelSection:
    path: str = ""
    """Hugging Face folder or hf://org/name@revision"""
    init: Literal["pretrained", "scratch"] = "pretrained"
    """scratch: fresh weights, with the sizes of path's config.json or, without a path, the sizes below"""
    tokenizer: str = ""
    """tokenizer folder or file; default: the one in path"""
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    tie_word_embeddings: bool = True
    activation_checkpointing: bool = False
    """recompute each block in the backward pass: less memory, a third more work"""


@dataclass
class TrainSection(LengthConfig):
    micro_batch_size: int = 2
    """sequences a device holds at once; the rest of its share is accumulated"""
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    save_every: int = 1000
    keep: int = 3
    """checkpoints kept"""
    branch_from: str = ""
    """checkpoint of another run to go on from, out/RUN/checkpoints/step_N; what it has done must be what this run would
    have done up to there, as with a learning rate that was constant so far and now anneals"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("micro_batch_size", "save_every", "keep"):
            if getattr(self, name) <= 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}, but must be above 0")


@dataclass
class EvalSection:
    every: int = 500
    """steps between evaluations; there is always one before the first step and one after the last"""
    tokens: int = 200_000
    """held-out tokens scored of each source"""
    prompts: list[str] = field(default_factory=list)
    """texts the model continues before and after; default: the beginnings of held-out documents"""
    sample_tokens: int = 64

    def __post_init__(self):
        for name in ("every", "tokens"):
            if getattr(self, name) <= 0:
                raise ValueError(f"eval.{name} is {getattr(self, name)}, but must be above 0")


@dataclass
class Config:
    out: str = "out/run"
    """run folder"""
    seed: int = 0
    device: str = "auto"
    compile: bool = False
    """torch.compile the model"""
    dry_run: bool = False
    """one step, one evaluation and one save; print what the run would cost, leave nothing"""
    model: ModelSection = field(default_factory=ModelSection)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    forget: ForgetConfig = field(default_factory=ForgetConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, but must be 0 or more")
        refuse_unused(self.lora, "lora", "rank")
        for name, switch in (("freeze", "schedule"), ("ewc", "strength"), ("lwf", "alpha"), ("adaptive", "policy"),
                             ("merge", "method")):
            refuse_unused(getattr(self.forget, name), f"forget.{name}", switch)


# ---- building

def open_tokenizer(c: Config):
    """The model's tokenizer, or None where a folder has none (then only the vocabulary's size is checked)."""
    if c.model.tokenizer:
        return tokenizers.load(c.model.tokenizer)
    if not c.model.path:
        raise ValueError("model.path is not set; name a Hugging Face folder, or --model.init scratch with "
                         "--model.tokenizer")
    folder = hf.resolve(c.model.path)
    has = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return tokenizers.load(folder) if has else None


def model_config(c: Config, tokenizer) -> ModelConfig:
    if c.model.path:
        return hf.open_base(c.model.path).config
    sizes = {f.name: getattr(c.model, f.name) for f in dataclasses.fields(ModelConfig) if hasattr(c.model, f.name)}
    return ModelConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=c.data.context, **sizes)


def open_sources(c: Config, tokenizer, vocab_size: int, world) -> tuple[dict, dict, dict]:
    """({name: source}, {name: train shards}, {name: held-out shards}), a score bucket being a source; verified, and
    refused where the model cannot read them."""
    if not c.data.sources:
        raise ValueError("no data: name at least one source, e.g. --data.sources.domain.path shards/legal")
    for name, source in c.data.sources.items():
        if not source.path:
            raise ValueError(f"data.sources.{name}.path is not set; name a folder made by data.py pack")
        if not Path(source.path).is_dir():
            raise ValueError(f"data.sources.{name}.path {source.path} does not exist; make it with data.py pack")
    sources, train, heldout = open_buckets(c.data.sources), {}, {}
    for name, source in sources.items():
        train[name], heldout[name] = Shards(source.path), Shards(source.path, "heldout")
        check_tokenizer(name, train[name], tokenizer, vocab_size)
        if world.main:
            verify(source.path, budget_bytes=4e9, seed=c.seed)
    return sources, train, heldout


def build_model(c: Config, config: ModelConfig, world) -> Model:
    """The model on its device, filled, with its adapters, and sharded where it is to be."""
    fsdp, adapters = world.size > 1 and c.parallel.strategy == "fsdp", c.lora.rank > 0
    # bf16 weights alone would lose small updates; adamw_8bit keeps what bf16 cannot hold, a frozen base has none
    half = c.train.precision == "bf16" and (c.optim.name == "adamw_8bit" or adapters)
    weights = torch.bfloat16 if half else torch.float32
    if c.model.init == "scratch":
        model = Model(config).to(weights)
        model.initialise(c.seed)
        fresh = parallel.model_state(model) if fsdp else None
    if fsdp:
        with torch.device("meta"):
            model = Model(config).to(weights)
            if adapters:
                lora.attach(model, c.lora, c.seed)
        dtype = PRECISIONS[c.train.precision]              # adapters are gathered in fp32: their steps are small
        parallel.shard(model, world, None if adapters or dtype == torch.float32 else dtype)
        model.to_empty(device=world.device)
        model.tie()
        if c.model.init == "scratch":
            parallel.load_model_state(model, fresh)
        else:
            hf.fill(model, hf.resolve(c.model.path), layout=parallel.like)
        if adapters:
            lora.initialise(model, c.seed, parallel.like)
    elif c.model.init != "scratch":
        # what is quantised goes to the device a tensor at a time, so that the plain weights never have to fit there
        model = hf.load(c.model.path, weights, "cpu" if adapters and c.lora.base != "plain" else world.device)
    if adapters and not fsdp:
        lora.attach(model, c.lora, c.seed, device=world.device)
    model.to(world.device)
    model.checkpoint_blocks = c.model.activation_checkpointing
    model.train()
    if c.compile:
        model.compile()
    return model


@dataclass
class Run:
    """Everything a step, an evaluation or a save needs; built once by `setup`."""

    c: Config
    world: parallel.World
    tokenizer: object
    config: ModelConfig
    sources: dict                # {name: SourceConfig}, a score bucket being a source
    loader: data.Loader
    planned: np.ndarray          # loader.counts before any decision of the run's own
    objective: object
    documents: dict              # {source: [(token ids, bytes)]} held out, to be scored
    inner: Model                 # the model itself
    model: torch.nn.Module = None            # what the loop calls: the same, or DDP around it
    base: str | None = None                  # fingerprint of the weights it began from
    methods: list = field(default_factory=list)       # what keeps the base's knowledge (forget.py)
    decisions: list = field(default_factory=list)     # what adaptive replay made of the evaluations so far
    optimizer: torch.optim.Optimizer = None
    scale: optim.LossScale = None

    @property
    def total(self) -> int:
        return len(self.loader.counts) - 1

    @property
    def trained(self) -> str:
        """What the names of the weights that a checkpoint must hold have in common."""
        return ".adapters." if self.c.lora.rank else ""


def setup(c: Config, world, folder: Path | None = None) -> Run:
    """folder: the run's, for what is estimated once and kept there."""
    if c.optim.name == "muon" and c.lora.rank:
        raise ValueError("optim.name muon makes whole weights' updates orthogonal, and an adapter's A and B are none; "
                         "use --optim.name adamw with adapters")
    if c.lora.rank and c.model.init == "scratch":
        raise ValueError("lora.rank puts adapters on a base, and model.init scratch has none that is kept; leave one "
                         "of them out")
    if c.lora.rank and c.optim.embedding_lr_scale != 1:
        raise ValueError("optim.embedding_lr_scale does nothing with adapters; set lora.embedding_lr_ratio")
    if c.train.batch_size % world.size:
        raise ValueError(f"train.batch_size {c.train.batch_size} is not a multiple of the {world.size} ranks")
    torch.set_float32_matmul_precision("high")             # TF32 for what stays fp32 on a GPU; no effect on a CPU
    tokenizer = open_tokenizer(c)
    config = model_config(c, tokenizer)
    sources, shards, heldout = open_sources(c, tokenizer, config.vocab_size, world)
    loader = data.Loader(shards, None, c.data.context, c.seed, c.data.drop_last, c.data.reset_positions, c.data.packing)
    loader.counts = mixture.make_plan(c.data, c.train, sources, loader.sequences())
    mixture.check_epochs(loader.epochs(len(loader.counts) - 1), sources)
    objective = objectives.make_objective(c.objective, c.data.mask_documents, tokenizer, config.vocab_size)
    documents = {name: docs for name, s in heldout.items()
                 if (docs := evaluation.heldout_documents(s, mixture.part_of(sources, name, c.eval.tokens)))}
    roles = {sources[name].role for name in documents}
    if c.forget.merge.method != "none" and not (objective.causal and len(roles) == 2):
        raise ValueError("forget.merge finds its coefficient by bits per byte on held-out text of the domain and of a "
                         "general source, and one is lacking; pack both with --heldout above 0, or merge after the "
                         "run: python forget.py merge --alpha 0.5")
    steps = len(loader.counts) - 1
    if c.forget.adaptive.policy != "none" and c.eval.every >= steps:
        raise ValueError(f"forget.adaptive decides at evaluations, and with eval.every {c.eval.every} there is none "
                         f"within {steps} steps; set --eval.every {max(1, steps // 10)}")
    inner = build_model(c, config, world)
    run = Run(c, world, tokenizer, config, sources, loader, loader.counts, objective, documents, inner)
    if c.model.init == "pretrained":
        run.base = hf.open_base(c.model.path).fingerprint
    run.methods = retention(run, shards, folder)
    for method in run.methods:
        method.model_built(inner)                                          # model built
    ddp = world.size > 1 and c.parallel.strategy == "ddp"
    run.model = parallel.replicate(inner, world) if ddp else inner
    run.optimizer = optim.make_optimizer(inner, c.optim, lora.lr_scales(inner, c.lora) if c.lora.rank else None)
    run.scale = optim.LossScale(c.train.precision == "fp16")
    return run


def retention(run: Run, shards: dict, folder: Path | None) -> list:
    """The methods of forget.py that are on, each given what it needs of this run."""
    c, world, loader = run.c, run.world, run.loader
    general = {name: source for name, source in run.sources.items() if source.role == "general"}

    def forward(model, batch):
        with autocast(run):
            return objectives.hidden_states(run.objective, model, batch.to(world.device))

    def general_batches():
        """The same on every rank, as each needs the whole of an estimate."""
        texts = data.Loader({name: shards[name] for name in general}, None, c.data.context, c.seed,
                            reset_positions=c.data.reset_positions, packing=c.data.packing)
        weights = mixture.source_weights(general, 0.0, strata=c.data.strata)
        texts.counts = mixture.plan_counts(lambda p: weights, -(-c.forget.ewc.samples // 8), 8)
        for batch in map(texts.rows, range(len(texts.counts) - 1)):
            yield run.objective.corrupt(batch, batch.rng)

    base = None
    if c.lora.rank:
        base = lora.disabled
    elif c.forget.lwf.alpha and world.size > 1 and c.parallel.strategy == "fsdp":
        teacher = build_model(c, run.config, world).requires_grad_(False)

        def base(model):
            return contextlib.nullcontext(teacher)

    tokens = [record["sha256"] for name in general for record in shards[name].manifest["splits"]["train"]["shards"]]
    made_of = [run.base, c.data.context, c.data.packing, c.data.mask_documents, *tokens]
    return forget.make_methods(
        c.forget, run.total, forward, world, [i for i, name in enumerate(loader.names)
                                              if name in general and loader.counts[-1][i]],
        general_batches if general else None, base, c.lora.rank > 0, c.model.init == "pretrained", folder,
        short_digest(json.dumps(made_of).encode()), c.seed,
        None if c.train.precision == "fp32" else PRECISIONS[c.train.precision])


# ---- one step

def autocast(run: Run):
    """The context of a forward pass in the run's precision."""
    if run.c.train.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(run.world.device.type, PRECISIONS[run.c.train.precision])


def micro_batches(run: Run, step: int) -> list:
    """This rank's rows of the step's global batch, corrupted, in micro-batches."""
    share = run.c.train.batch_size // run.world.size
    first, size = run.world.rank * share, run.c.train.micro_batch_size
    rows = (run.loader.rows(step, lo, min(lo + size, first + share)) for lo in range(first, first + share, size))
    return [run.objective.corrupt(batch, batch.rng) for batch in rows]


def train_step(run: Run, step: int, batches: list) -> dict:
    """One update; returns {"loss", "grad_norm", "lr", "sources": {name: (nats, targets)}, "methods": their numbers}.

    The loss is the sum over all targets of the step divided by their count over all ranks, so that accumulation,
    packing and the number of ranks change nothing.
    """
    c, world, scale, names = run.c, run.world, run.scale, run.loader.names
    valid = max(1.0, world.sum([sum((b.labels != objectives.IGNORE).sum().item() for b in batches)])[0])
    torch.manual_seed(int(mix_keys(c.seed, "dropout", step, world.rank)[0] >> 1))     # of adapters; resumes alike
    row_loss, row_tokens = [], []
    for i, batch in enumerate(batches):
        with parallel.accumulate(run.model, last=i == len(batches) - 1):
            batch = batch.to(world.device)
            with autocast(run):
                loss, _, metrics = run.objective.loss(run.model, batch)
                for method in run.methods:
                    loss = method.loss_computed(run.inner, batch, loss, metrics)           # loss computed
                del metrics["hidden"]              # or it would live through the next forward pass
            # ranks average their gradients; times their number, the average is the sum
            (loss * (scale.scale * world.size / valid)).backward()
        row_loss.append(metrics["row_loss"])
        row_tokens.append(metrics["row_tokens"])
    sums = torch.zeros(2, len(names), dtype=torch.float64)
    source = torch.cat([torch.from_numpy(b.source) for b in batches])
    sums[0].index_add_(0, source, torch.cat(row_loss).double().cpu())          # waits for the device
    sums[1].index_add_(0, source, torch.cat(row_tokens).double().cpu())
    sums = torch.tensor(world.sum(sums.flatten().tolist())).view(2, -1).tolist()
    sources = {name: (nats, int(n)) for name, nats, n in zip(names, *sums) if n}
    loss = sum(sums[0]) / valid
    guard.require_finite("loss", loss, step, sources)

    if scale.enabled:
        torch._foreach_mul_([p.grad for p in run.inner.parameters() if p.grad is not None], 1.0 / scale.scale)
    numbers = {}
    for method in run.methods:
        numbers |= method.before_step(step, run.inner)                         # before the step
    parameters = [p for p in run.inner.parameters() if p.grad is not None]
    norm = parallel.whole(torch.nn.utils.clip_grad_norm_(parameters, c.optim.clip or float("inf"))).item()
    if not scale.enabled:
        guard.require_finite("gradient norm", norm, step, sources)
    lr = optim.learning_rate(step, run.total, c.optim)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    if scale.update(norm):
        run.optimizer.step()
    for method in run.methods:
        method.after_step(step, run.inner, run.optimizer)                      # after the step
    run.optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "grad_norm": norm, "lr": lr, "sources": sources, "methods": numbers}


# ---- once in a while

def prefix_of(run: Run) -> int:
    return evaluation.prefix_of(run.tokenizer) if run.tokenizer else 0


def scores(run: Run, model, world) -> dict:
    """{source: {"role", "bits_per_byte", ...}} of the held-out documents."""
    return {name: {"role": run.sources[name].role,
                   **evaluation.score(model, run.objective, documents, prefix_of(run), run.c.data.context, world,
                                      run.c.train.micro_batch_size, lambda: autocast(run))}
            for name, documents in run.documents.items()}


def evaluate(run: Run, step: int, out: Path, logger) -> dict:
    """Score every source's held-out documents; eval_step_N.json and a line in metrics.jsonl."""
    c = run.c
    result = scores(run, run.inner, run.world)
    protocol = evaluation.protocol(prefix_of(run), c.data.context, PRECISIONS[c.train.precision])
    logger.record("eval", step, sources=result, protocol=protocol)
    unit = "bits_per_byte" if run.objective.causal else "accuracy"
    logger.say(f"eval at step {step}: " + ", ".join(f"{name} {numbers[unit]:.4f}" for name, numbers in result.items())
               + f" ({unit.replace('_', ' ')})")
    if run.world.main:
        _write_json(out / f"eval_step_{step}.json", {"step": step, "texts": result, "protocol": protocol})
    return result


def draw_samples(run: Run, step: int, logger):
    """Continuations of the run's prompts, before and after."""
    c = run.c
    if not run.objective.causal or run.tokenizer is None or not c.eval.sample_tokens:
        return
    prompts = c.eval.prompts or [run.tokenizer.decode(ids[:12].tolist()) for documents in run.documents.values()
                                 for ids, _ in documents[:2]]
    logger.record("samples", step, samples=evaluation.samples(run.inner, run.tokenizer, prompts,
                                                              c.eval.sample_tokens, c.seed))


def identity(run: Run, step: int) -> dict:
    """What must be the same for a run resumed at `step` to be the same run; the rest (ranks, micro-batch, logging) may
    change. Of the plan and the learning rates only the past counts, so that a schedule whose past does not depend on
    the run's length (static mix; infinite, constant or wsd) can be prolonged, or annealed from any of its checkpoints.
    """
    c, loader = run.c, run.loader

    tokens = {name: [record["sha256"] for split in SPLITS for record in s.manifest["splits"][split]["shards"]]
              for name, s in zip(loader.names, loader.shards)}
    return json.loads(json.dumps({
        "seed": c.seed, "order_version": data.ORDER_VERSION, "context": c.data.context,
        "batch_size": c.train.batch_size, "precision": c.train.precision, "mask_documents": c.data.mask_documents,
        "reset_positions": c.data.reset_positions, "drop_last": c.data.drop_last, "packing": c.data.packing,
        "eval_tokens": c.eval.tokens,
        "eval_every": c.eval.every if c.forget.adaptive.policy != "none" else None,       # then it decides the order
        "mix": short_digest(run.planned[:step + 1].tobytes()),
        "stages_of": run.total if c.forget.freeze.schedule != "none" else None,
        "rates": short_digest(repr([optim.learning_rate(s, run.total, c.optim) for s in range(step)]).encode()),
        "base": run.base, "lora": dataclasses.asdict(c.lora), "forget": dataclasses.asdict(c.forget),
        "tokens": short_digest(json.dumps(tokens).encode()),
        "optim": {k: v for k, v in dataclasses.asdict(c.optim).items() if k not in optim.SCHEDULE_FIELDS},
        "objective": dataclasses.asdict(c.objective),
        "model": dataclasses.asdict(run.config),
    }))


def save(run: Run, step: int, folder: Path, logger):
    weights, moments = parallel.model_state(run.inner, run.trained), parallel.optimizer_state(run.inner, run.optimizer)
    numbers = {}
    for method in run.methods:
        tensors, numbers[method.name] = method.state()
        moments |= {f"{method.name}:{name}": tensor for name, tensor in tensors.items()}
    if run.world.main:
        checkpoint.save(folder, step, weights, moments,
                        {"identity": identity(run, step), "loss_scale": run.scale.state_dict(), "methods": numbers,
                         "decisions": run.decisions, "base": run.c.model.path, "optim": dataclasses.asdict(run.c.optim),
                         "tokenizer": run.c.model.tokenizer or run.c.model.path}, run.c.train.keep)
    logger.record("event", step, message="checkpoint saved")
    run.world.barrier()


def resume(run: Run, out: Path, logger) -> int:
    """Load the newest checkpoint that verifies, if there is one; returns the step to go on from. A run without any
    begins at train.branch_from, if that is set."""
    found = run.world.broadcast(checkpoint.newest(out / "checkpoints", logger.say) if run.world.main else None)
    if found is None and run.c.train.branch_from:
        found = Path(run.c.train.branch_from)
        checkpoint.verify(found)
        if not (found.parent.parent / "eval_step_0.json").is_file():
            raise ValueError(f"{found} is in no run folder with an eval_step_0.json, which says what was known before; "
                             f"leave the checkpoint where its run wrote it")
    if found is None:
        return 0
    weights, moments, state = checkpoint.load(found)
    step, now = state["step"], identity(run, state["step"])
    if step > run.total:
        raise ValueError(f"{found} is at step {step}, and the run is to end at {run.total}; lengthen it")
    optim_now = dataclasses.asdict(run.c.optim)
    why = {"mix": f"the sequences of the first {step} steps are others (data.*, or the run's length)",
           "rates": f"the learning rates of the first {step} steps are others (" + (", ".join(
               f"optim.{k} was {was} and is {optim_now[k]}" for k, was in state["optim"].items() if optim_now[k] != was)
               or "the run's length") + ")"}
    differ = [why.get(key, f"{key} was {state['identity'].get(key)} and is {value}") for key, value in now.items()
              if state["identity"].get(key) != value]
    if differ:
        what, other = (out, "another --out to start anew") if found.parent.parent == out else (found, "no branch")
        raise ValueError(f"{what} holds another run: {'; '.join(differ)}; use the same settings to resume it, or "
                         f"{other}")
    parallel.load_model_state(run.inner, weights, run.trained)
    parallel.load_optimizer_state(run.inner, run.optimizer, moments)
    run.scale.load_state_dict(state["loss_scale"])
    for method in run.methods:
        mine = {name.removeprefix(f"{method.name}:"): tensor for name, tensor in moments.items()
                if name.startswith(f"{method.name}:")}
        method.load_state(mine, state["methods"][method.name])
    for decision in state["decisions"]:
        act(run, decision)
    logger.say(f"resumed from {found} at step {step}")
    logger.record("resume", step)
    return step


def act(run: Run, decision: dict):
    """Let a decision of adaptive replay hold from the next step on; the batch of this one has been read."""
    before = next((d["replay_share"] for d in reversed(run.decisions) if d["replay_share"] is not None), None)
    run.decisions.append(decision)
    if decision["replay_share"] not in (None, before):
        run.loader.counts = mixture.replan(run.loader.counts, decision["step"] + 1, run.c.data, run.sources,
                                           1 - decision["replay_share"])


def listen(run: Run, step: int, result: dict, out: Path, logger):
    """Show an evaluation to the methods, and do what they decide."""
    for method in run.methods:
        decision = method.evaluated(step, result)                              # once in a while
        if decision:
            act(run, decision)
            logger.record("replay", step, **{k: v for k, v in decision.items() if k != "step"})
            logger.say(f"replay at step {step}: {decision['reason']}; share "
                       f"{'as scheduled' if decision['replay_share'] is None else decision['replay_share']}")
            try:
                mixture.check_epochs(run.loader.epochs(run.total), run.sources)
            except ValueError as error:                                        # known before the run, not in it
                logger.say(f"warning: {error}")
            if run.world.main:
                write_plan(run, out)


def write_plan(run: Run, out: Path):
    """plan.jsonl: what was planned before the run, and each decision; with the settings it is the order of the data."""
    plan = {"step": 0, "steps": run.total, "schedule": run.c.data.schedule, "domain_share": run.c.data.domain_share,
            "sequences": dict(zip(run.loader.names, run.planned[-1].tolist()))}
    _write_text(out / "plan.jsonl", "".join(json.dumps(line) + "\n" for line in [plan, *run.decisions]))


def export(run: Run, folder: Path, card: str):
    """A Hugging Face folder; beside it the adapter in PEFT's format, where one was trained."""
    c, weights = run.c, parallel.model_state(run.inner)
    if not run.world.main:
        return
    if c.lora.rank:                                # onto the base as it is on disk, whatever it was rounded to here
        adapter = folder.with_name("adapter")
        lora.save(run.inner, adapter, c.model.path, weights)
        lora.merge_folders(c.model.path, adapter, folder, card=card, tokenizer=c.model.tokenizer or None)
        return
    hf.save(run.inner, folder, base=c.model.path or None, state=weights, tokenizer=c.model.tokenizer or None,
            scratch=c.model.init == "scratch", card=card)


def merge_with_base(run: Run, out: Path, logger) -> dict:
    """final/ between the base and the run's own result, which goes to trained/; the evaluation of what was chosen."""
    c = run.c
    export(run, out / "trained", "The result of a run before it was merged with its base.")
    if not run.world.main:
        return {}

    def score(model, folder):
        return scores(run, model.eval(), parallel.World(0, 1, run.world.device))

    general = [name for name, source in run.sources.items() if source.role == "general"]
    shutil.rmtree(out / "final", ignore_errors=True)       # of a run that died before its eval.json
    found = merge.merge_best(c.model.path, out / "trained", out / "final", score, general, c.forget.merge,
                              device=run.world.device, say=logger.say)
    _write_json(out / "merge.json", found)
    return next(row["texts"] for row in found["rows"] if row["alpha"] == found["alpha"])


def finish(run: Run, after: dict, out: Path, logger):
    """eval.json, the Hugging Face folder with its card, and the report."""
    first = json.loads((out / "eval_step_0.json").read_text(encoding="utf-8"))
    before, protocol = first["texts"], first["protocol"]
    general = [name for name, source in run.sources.items() if source.role == "general"]
    comparison = verdict.compare(before, after, general) if run.objective.causal else {}
    table = evaluation.table(before, after)
    if run.c.forget.merge.method == "none":        # a merge has written it, and only rank 0 would see the folder
        export(run, out / "final", f"{table}\n\nHeld-out documents; protocol: {json.dumps(protocol)}")
    if not run.world.main:
        return
    _write_json(out / "eval.json", {"protocol": protocol, "before": before, "after": after, **comparison})
    logger.say(table)
    if comparison:
        logger.say(verdict.describe(comparison))
    logger.close()
    made = subprocess.run([sys.executable, Path(__file__).with_name("report.py"), out], capture_output=True, text=True)
    print(f"model: {out}/final   " + (f"report: {out}/report.html" if made.returncode == 0
                                      else f"no report: {made.stderr.strip()}"), flush=True)


def _write_json(path: Path, value):
    _write_text(path, json.dumps(value, indent=1) + "\n")


def _write_text(path: Path, text: str):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def peak_gb(world) -> float:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6            # kilobytes on Linux


def describe(run: Run, say):
    """What is about to be run, in a few lines, with the warnings a user would want before and not after."""
    c, loader = run.c, run.loader
    say(f"model: {run.inner.count_parameters() / 1e6:.1f}M parameters, {run.config.family}, "
        f"vocabulary {run.config.vocab_size:,}")
    if c.model.path and c.model.init == "pretrained":
        known = hf.open_base(c.model.path).facts
        say(f"base: {c.model.path}, licence: {known['license']}")
        if known["chat_template"]:
            say("warning: the base carries a chat template; continuing the pretraining of a chat model costs it its "
                "chat ability, its base model is the better start")
    if c.lora.rank:
        say(f"lora: {lora.trainable_share(run.inner)}")
    if c.model.init == "pretrained":
        say(optim.hint(run.inner.count_parameters(), "lora" if c.lora.rank else "full", c.optim))
    for line in (note for method in run.methods for note in method.notes):
        say(line)
    if optim.warmup_length(run.total, c.optim) >= run.total:
        say("warning: the learning rate rises over the whole run; shorten optim.warmup_steps or optim.warmup_ratio")
    for name, shards, epochs in zip(loader.names, loader.shards, loader.epochs(run.total).values()):
        scored = sum(len(ids) for ids, _ in run.documents.get(name, []))
        say(f"  {name} ({run.sources[name].role}): {shards.tokens:,} tokens, read {epochs:.2f} times; "
            f"{scored:,} held-out tokens scored")
        if not scored:
            say(f"warning: source {name} has no held-out documents, so it is not evaluated")
    for line in mixture.notes(c.data, run.sources) + mixture.check_epochs(loader.epochs(run.total), run.sources):
        say(line)
    lost = ", ".join(f"{name} {packing.padded or packing.dropped:,} {'dropped' if packing.dropped else 'padded'}"
                     for name, packing in zip(loader.names, loader.packings) if packing.padded or packing.dropped)
    say(f"run: {run.total:,} steps of {c.train.batch_size} x {c.data.context} = "
        f"{c.train.batch_size * c.data.context:,} tokens, seed {c.seed}, {c.train.precision}, "
        f"{run.world.size} x {run.world.device.type}")
    say(f"packing: {c.data.packing}; positions an epoch without a token: {lost or 'none'}")


def line_of(run: Run, step: int, done: dict, seconds: float) -> dict:
    """The numbers of a console and metrics line after `step` steps, `seconds` each."""
    c, loader = run.c, run.loader
    tokens = c.train.batch_size * c.data.context
    peak = next((flops for name, flops in PEAK_FLOPS.items() if run.world.device.type == "cuda"
                 and name in torch.cuda.get_device_name(run.world.device)), None)
    flops = matmul_flops_per_token(run.config, c.data.context) * tokens / run.world.size / seconds
    epochs, taken = loader.epochs(step), dict(zip(loader.names, loader.counts[step].tolist()))
    general = sum(n for name, n in taken.items() if run.sources[name].role == "general")
    return {"loss": done["loss"], "lr": done["lr"], "grad_norm": done["grad_norm"], "tokens": step * tokens,
            "tokens_per_second": tokens / seconds, "step_ms": 1000 * seconds, "peak_gb": peak_gb(run.world),
            **({"mfu": flops / peak} if peak else {}), "replay_share": general / sum(taken.values()),
            "domain_share": wanted_share(run, step), **done["methods"],
            "sources": {name: {"loss": nats / n, "tokens": taken[name] * c.data.context, "epochs": epochs[name]}
                        for name, (nats, n) in done["sources"].items()}}


def wanted_share(run: Run, step: int) -> float:
    """Share of domain sequences that step `step` (from 1) was to have."""
    replay = [d["replay_share"] for d in run.decisions if d["step"] + 1 < step and d["replay_share"] is not None]
    if replay:
        return 1 - replay[-1]
    return mixture.share_at(run.c.data, (step - 1) / max(1, run.total - 1), run.total)


# ---- the run

def train(c: Config, world) -> int:
    out = Path(c.out)
    if (out / "eval.json").exists():                       # the last that a run writes
        raise ValueError(f"{out} holds a finished run; choose another --out, or remove it to run again")
    run = setup(c, world, out)
    with contextlib.ExitStack() as stack:
        if world.main:
            stack.callback(guard.RunLock(out).release)
            new = not checkpoint.steps(out / "checkpoints")
            if new:                                            # what a run left that died before its first save
                for stale in [out / "metrics.jsonl", *out.glob("eval_step_*.json")]:
                    stale.unlink(missing_ok=True)
        logger = log.Logger(out, c.log, run.total, world.main, settings=dataclasses.asdict(c))
        stack.callback(logger.close)
        stop = guard.StopSignal()
        stack.callback(stop.restore)
        describe(run, logger.say)
        start = resume(run, out, logger)
        logger.at(start)
        if world.main and (new or start == 0):
            begin(run, start, out, logger)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        ahead = pool.submit(micro_batches, run, start) if start < run.total else None
        seconds, measured = 0.0, 0
        for step in range(start, run.total):
            # once in a while: evaluate
            if step % c.eval.every == 0:
                listen(run, step, evaluate(run, step, out, logger), out, logger)
                if step == 0:
                    draw_samples(run, 0, logger)
            # the step
            clock = time.perf_counter()
            batches = ahead.result()
            ahead = pool.submit(micro_batches, run, step + 1) if step + 1 < run.total else None
            done = train_step(run, step, batches)
            seconds, measured = seconds + time.perf_counter() - clock, measured + 1
            # once in a while: log
            line = None
            if (step + 1) % c.log.every == 0 or step in (start, run.total - 1):
                line = line_of(run, step + 1, done, seconds / measured)
                logger.record("train", step + 1, **line)
                seconds, measured = 0.0, 0
            logger.step(step + 1, line)
            # once in a while: save, and leave when asked to
            asked = world.sum([stop.received is not None])[0] > 0
            if (step + 1) % c.train.save_every == 0 or step + 1 == run.total or asked:
                save(run, step + 1, out / "checkpoints", logger)
            if asked and step + 1 < run.total:
                logger.say(f"{stop.received or 'a signal'}: saved at step {step + 1} of {run.total}; "
                           f"the same command resumes it")
                return 0
        for method in run.methods:
            stack.enter_context(method.exported(run.inner))
        after = evaluate(run, run.total, out, logger)
        draw_samples(run, run.total, logger)
        if c.forget.merge.method != "none":
            after = merge_with_base(run, out, logger)
        finish(run, after, out, logger)
    return 0


def begin(run: Run, start: int, out: Path, logger):
    """The first files of a run folder."""
    c, loader = run.c, run.loader
    (out / "config.toml").write_text(to_toml(c), encoding="utf-8")
    if start:                                  # a branch: what was known before is what its trunk found
        first = Path(c.train.branch_from).parent.parent / "eval_step_0.json"
        _write_text(out / first.name, first.read_text(encoding="utf-8"))
    write_plan(run, out)
    logger.record("start", 0, time=time.time(), run=out.name, parameters=run.inner.count_parameters(),
                  trainable_parameters=sum(p.numel() for p in run.inner.parameters() if p.requires_grad),
                  tokens_per_step=c.train.batch_size * c.data.context, total_steps=run.total,
                  device=str(run.world.device), world_size=run.world.size, precision=c.train.precision,
                  sources={name: {"role": run.sources[name].role, "tokens": s.tokens, "documents": s.documents}
                           for name, s in zip(loader.names, loader.shards)},
                  versions={"torch": torch.__version__, "python": sys.version.split()[0]})


def dry_run(c: Config, world) -> int:
    """One step, one evaluation and one save in a folder that is thrown away; prints what the whole run would take."""
    run = setup(c, world)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        logger = log.Logger(out, LogConfig(), run.total, world.main)
        describe(run, logger.say)
        clock = time.perf_counter()
        evaluate(run, 0, out, logger)
        eval_seconds, clock = time.perf_counter() - clock, time.perf_counter()
        batches = micro_batches(run, 0)
        train_step(run, 0, batches)
        step_seconds, clock = time.perf_counter() - clock, time.perf_counter()
        save(run, 0, out / "checkpoints", logger)
        if world.main:
            size = sum(file.stat().st_size for file in (out / "checkpoints").rglob("*") if file.is_file())
            hours = (step_seconds * run.total + eval_seconds * (2 + run.total // c.eval.every)) / 3600
            logger.say(f"dry run: step {step_seconds:.2f} s, evaluation {eval_seconds:.1f} s, save "
                       f"{time.perf_counter() - clock:.1f} s; peak memory {peak_gb(world):.2f} GB, a checkpoint "
                       f"{size / 1e6:,.0f} MB")
            logger.say(f"dry run: the whole run takes about {hours:.2f} hours; nothing was kept")
            for row in range(min(2, len(batches[0].tokens))) if run.tokenizer else ():
                show_row(run, batches[0], row, logger.say)
        logger.close()
    return 0


def show_row(run: Run, batch, row: int, say):
    """A packed sequence as text, its documents apart."""
    tokens, begins = batch.tokens[row], batch.doc_start[row].unique().tolist()
    say(f"--- a packed sequence of source {run.loader.names[batch.source[row]]}, {len(begins)} documents")
    for begin, end in zip(begins, [*begins[1:], len(tokens)]):
        say(f"[{begin}:{end}] {run.tokenizer.decode(tokens[begin:end].tolist())!r}")


def main() -> int:
    c = parse(Config, sys.argv[1:], description=__doc__)
    world = parallel.start(c.device)
    try:
        status = (dry_run if c.dry_run else train)(c, world)
        world.barrier()                    # none leaves while another still waits for it
        return status
    finally:
        parallel.stop()


if __name__ == "__main__":
    sys.exit(main_guard(main))
