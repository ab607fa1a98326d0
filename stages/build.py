"""Everything a run needs, built from its settings in the order that `build` shows.

Mistakes are found as early as that order allows: settings that exclude each other before a file is opened, sources that
the model cannot read before the model is made, a plan that reads a source too often before a weight is loaded.
"""

import contextlib
import dataclasses
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import data
import forget
import hf
import lora
import tokenizer as tokenizers
from core import checkpoint, cli, devices, hashing, offload, parallel, pipeline, sharding
from core.architecture import set_positions
from core.config import is_on, setting
from core.errors import Diverged, UserError
from core.guard import Guard
from core.log import Logger
from learn import adapters, optim, peft_files, schedules
from learn.choose_objective import ObjectiveConfig, make_objective
from learn.lwf import LwF
from learn.method import Learning
from learn.objectives import Objective
from learn.router import Router
from measure import scoring
from model import Model, ModelConfig, flops_by_block
from stages.questions import Questions, open_questions
from stages.refuse import refuse_combinations, refuse_memory, refuse_pipeline, refuse_sharing, refuse_stops
from stages.sources import pack_sources
from text import mixture, packing
from text.heldout import find_leaks, judge_leaks
from text.shards import Shards, check_tokenizer, verify

# ---- settings

@dataclass
class ModelSection:
    path: str = ""
    """Hugging Face folder or hf://org/name@revision"""
    init: Literal["pretrained", "scratch"] = "pretrained"
    """scratch: fresh weights, with the sizes of path's config.json or, without a path, the sizes below"""
    tokenizer: str = ""
    """tokenizer folder or file; default: the one in path"""
    hidden_size: int = setting(512, above=0, at_most=2**18)
    """D"""
    intermediate_size: int = setting(1376, above=0, at_most=2**20)
    """F, width of the MLP"""
    num_hidden_layers: int = setting(8, above=0, at_most=1024)
    """blocks"""
    num_attention_heads: int = setting(8, above=0, at_most=4096)
    """H"""
    num_key_value_heads: int = setting(8, above=0, at_most=4096)
    """K; fewer than the attention heads: grouped-query attention"""
    tie_word_embeddings: bool = True
    """the head is the embedding"""
    max_positions: int | None = setting(None, above=0, at_most=2**27)
    """max_position_embeddings of the exported model; default: the base's (scratch: data.context)"""
    rope_scaling: Literal["", "linear", "yarn", "llama3", "none"] = ""
    """stretch the base's positions to max_positions; none: take the base's scaling away; default: as the base has it"""
    rope_theta: float | None = setting(None, above=1, at_most=1e15)
    """base of the rotary frequencies; default: the base's (scratch: 10000)"""
    activation_checkpointing: bool = False
    """recompute each block in the backward pass: less memory, a third more work"""
    recompute_every: int = setting(1, at_least=1, at_most=1024)
    """activation_checkpointing: recompute the first of every so many blocks and keep what the others made (selective);
    2 saves half as much, for half of the work"""

    @property
    def checkpoint_blocks(self) -> int:
        """Of every so many blocks one is recomputed; 0: none."""
        return self.recompute_every if self.activation_checkpointing else 0


@dataclass
class TrainSection(mixture.LengthConfig):
    micro_batch_size: int = setting(2, above=0, at_most=10**6)
    """sequences a device holds at once; the rest of its share is accumulated"""
    precision: cli.Dtype = "bf16"
    """type in which matmuls are computed"""
    save_every: int = setting(1000, above=0)
    """steps between checkpoints"""
    keep: int = setting(3, at_least=2)
    """checkpoints kept, of those that verify"""
    keep_best: bool = False
    """keep also the one whose held-out text of the domain scored best, of those at evaluated steps"""
    branch_from: str = ""
    """checkpoint of another run to go on from, out/RUN/checkpoints/step_N; what it has done must be what this run would
    have done up to there, as with a learning rate that was constant so far and now anneals"""

    def __post_init__(self):
        # One spelling in what a run writes, however the user spelt it: bfloat16 is bf16.
        self.precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(devices.DTYPES[self.precision], "fp16")


# ---- the run

# The folders of a run that its end replaces as a whole.
PARTS = {"final": hf.FOLDER, "trained": hf.FOLDER, "adapter": peft_files.FOLDER}


@dataclass
class Run(contextlib.AbstractContextManager):
    """Everything that a step, an evaluation or a save needs; made by `build`."""

    # The Config of train.py
    c: object
    world: parallel.World
    # None: the run leaves nothing and says nothing.
    folder: Path | None
    # What model.path names; None: no path.
    base: hf.Base | None
    tokenizer: object
    config: ModelConfig
    # {name: SourceConfig}; a score bucket counts as a source.
    sources: dict
    loader: data.Loader
    # loader.plan as it was before adaptive replay
    planned: np.ndarray
    objective: Objective
    # {source: [(token ids, text bytes)]}
    heldout: dict = field(default_factory=dict)
    # {source: its held-out sequences}, where the objective has measures of its own
    held: dict = field(default_factory=dict)
    # A sentence for each source that trains on what another source holds out.
    leaks: list = field(default_factory=list)
    # The model itself, and what the loop calls: the same, or DDP around it.
    inner: Model = None
    model: torch.nn.Module = None
    # What objective.reference names; None: no path.
    reference: hf.Base | None = None
    # The retention methods that are on, and what adaptive replay decided so far
    methods: list = field(default_factory=list)
    decisions: list = field(default_factory=list)
    # {eval_step_N.json: what it holds}, on rank 0.
    evaluations: dict = field(default_factory=dict)
    # The tasks and probes of its evaluations
    questions: Questions = field(default_factory=Questions)
    # Why it ended before its last step, as stages/stopping.py says it; None: it did not.
    ended: dict | None = None
    optimizer: torch.optim.Optimizer = None
    scale: optim.LossScale = None
    guard: Guard = field(default_factory=Guard)
    # The steps that are done, and the step of the newest checkpoint of its own; 0 also where there is none.
    done: int = 0
    saved: int = 0
    log: Logger = None
    # Writes the checkpoints; stages/resume.py makes it.
    saver: object = None

    @property
    def steps(self) -> int:
        return len(self.loader.plan) - 1

    @property
    def tokens_per_step(self) -> int:
        return self.c.train.batch_size * self.c.data.context

    @property
    def objective_settings(self) -> dict:
        """What of the objective is not as it is by default, by what it is: the reference, the tokens found."""
        usual = dataclasses.asdict(ObjectiveConfig())
        found = {key: value for key, value in dataclasses.asdict(self.c.objective).items() if value != usual[key]}
        if self.reference:
            found["reference"] = self.reference.fingerprint
        if ids := self.objective.token_ids:
            found["token_ids"] = hashing.short_digest(json.dumps(ids).encode())
        return found

    @property
    def trained(self) -> str:
        """The part that all names of weights to be saved have in common: with adapters, only these are saved."""
        return ".adapters." if self.c.lora.rank else ""

    @property
    def base_fingerprint(self) -> str | None:
        """Of the weights that the run began from; None: random ones."""
        return self.base.fingerprint if self.c.model.init == "pretrained" else None

    def names_of(self, role: str) -> list[str]:
        """The sources of a role, domain or general."""
        return [name for name, source in self.sources.items() if source.role == role]

    def domain_share_at(self, step: int) -> float:
        """The share of domain sequences that the data schedule has at a step."""
        return mixture.schedule_at(self.c.data, step / max(1, self.steps - 1), self.steps)[0]

    def autocast(self):
        """The context of a forward pass in the run's precision."""
        dtype = devices.DTYPES[self.c.train.precision]
        return torch.autocast(self.world.device.type, dtype, enabled=dtype != torch.float32)

    def forward(self, model, batch):
        """Hidden states [B, T, D] of a corrupted batch under any model, computed as the run computes."""
        with self.autocast():
            return self.objective.hidden_states(model, batch.to(self.world.device))

    def check(self):
        """Say that a save has failed, and raise Stopped where the run is to be saved and left: on all ranks at the same
        point, which the sum of the step has told them of."""
        if self.world.failed:
            self.saver.wait()
        self.world.check()
        self.guard.check()

    def __exit__(self, kind, error, trace):
        if isinstance(error, Diverged) and self.done:
            self.log.record("stop", self.done, message=str(error))
        if self.saver:
            self.saver.close()
        self.log.close()


def build(c, world, folder: Path | None = None) -> Run:
    """The run that the settings `c` describe, ready for its first step.

    base -> tokenizer -> data plan -> model -> adapters -> methods -> shards (FSDP: in `build_model`) -> optimizer.
    """
    refuse_combinations(c, world.size)
    # TF32 on GPUs for what stays in fp32; a CPU computes as before.
    torch.set_float32_matmul_precision("high")
    base = open_base(c.model.path, world)
    tokenizer = open_tokenizer(c, base)
    # A model without a base has the sizes of the settings.
    sizes = {f.name: getattr(c.model, f.name) for f in dataclasses.fields(ModelConfig)
             if hasattr(c.model, f.name) and not f.name.startswith("rope_")}
    config = base.config if base else ModelConfig(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=c.data.context, **sizes)
    config = set_positions(config, c.model.max_positions, c.model.rope_scaling, c.model.rope_theta)
    # Whoever opens the base in this run, to merge adapters into it or to export, sees the same positions.
    base = base and dataclasses.replace(base, changed=config)
    # What the run writes of its settings has the model's own sizes, also where they are the base's.
    c = dataclasses.replace(c, model=dataclasses.replace(c.model, **{name: getattr(config, name) for name in sizes}))
    refuse_sharing(c, config)
    refuse_pipeline(c, config, world.size)
    run = plan_data(c, world, folder, base, tokenizer, config)
    run.reference = open_reference(c, world, config, tokenizer)
    run.inner = build_model(c, config, base, world)
    learning = describe_learning(run)
    run.methods = forget.build(c.forget, learning) + ([Router(c.router, learning)] if is_on(c.router) else [])
    run.objective.model_built(run.inner, learning)
    for method in run.methods:
        method.model_built(run.inner)                                                       # model built
    if world.size > 1 and not c.compile:
        world.pace.time_blocks(run.inner.shard_plan(), config.num_hidden_layers / c.parallel.pipeline)
    run.model = lay_out(run)
    run.optimizer = optim.make_optimizer(run.inner, c.optim, lora.lr_scales(run.inner, c.lora) if c.lora.rank else None)
    run.scale = optim.LossScale(c.train.precision == "fp16")
    run.guard = Guard(c.guard)
    main = world.main and folder is not None
    if main and not any(checkpoint.steps(folder / "checkpoints")):
        # What a run left that died before its first save, but that of step 0, is not this one's.
        for stale in [folder / "metrics.jsonl", *folder.glob("eval_step_*.json")]:
            stale.unlink(missing_ok=True)
    run.log = Logger(folder, c.log, run.steps, main, settings=dataclasses.asdict(c))
    return run


def lay_out(run: Run):
    """What the loop calls: the model itself, DDP around it, or a pipeline of which it is a part."""
    c, world = run.c, run.world
    if world.pipe:
        share = c.train.batch_size // world.share[1]
        B = min(share, c.train.micro_batch_size)
        router, lwf = (next((m for m in run.methods if isinstance(m, kind)), None) for kind in (Router, LwF))
        return make_pipeline(run, B, share // B, router and router.measure_stage, lwf and lwf.teach_ahead)
    return parallel.replicate(run.inner, world) if world.size > 1 and c.parallel.strategy == "ddp" else run.inner


def make_pipeline(run: Run, B: int, micro_batches: int, measure=None, begin=None) -> pipeline.Pipeline:
    """Of so many micro-batches of B sequences; measure and begin: as in Pipeline."""
    c, world, T = run.c, run.world, run.c.data.context // run.world.sharing_ranks
    return pipeline.Pipeline(run.inner, world.pipe, c.parallel.schedule, (B, T), micro_batches, world.device,
                             run.objective.hidden_states, run.autocast, measure, 2 * run.config.num_experts + 1, begin)


# ---- base, tokenizer and data

def open_base(path: str, world) -> hf.Base | None:
    """A model, opened once in a run; every rank takes the commit that rank 0 found, as branches of the Hub move."""
    if not path:
        return None
    if not path.startswith("hf://"):
        return hf.open_base(path)
    found = hf.open_base(path) if world.main else None
    pinned = world.broadcast(found.pinned if found else "")
    return found or hf.open_base(pinned)


def open_reference(c, world, config: ModelConfig, tokenizer) -> hf.Base | None:
    """What objective.reference names. UserError where it reads other ids than the model."""
    reference = open_base(c.objective.reference, world)
    if reference and reference.config.vocab_size != config.vocab_size:
        raise UserError(f"objective.reference {reference} has a vocabulary of {reference.config.vocab_size:,} and the "
                        f"model one of {config.vocab_size:,}; name a model with the same tokenizer")
    theirs = reference and tokenizer_of(reference)
    if theirs and tokenizer and not theirs.reads(tokenizer.fingerprint, tokenizer.vocab_size):
        raise UserError(f"objective.reference {reference} has another tokenizer than the model, so that ids mean other "
                        f"text to it; name a model with the same tokenizer")
    return reference


def open_tokenizer(c, base: hf.Base | None):
    """The model's tokenizer; None where the base has none, and then only the vocabulary's size is checked."""
    if c.model.tokenizer:
        return tokenizers.load(c.model.tokenizer)
    return tokenizer_of(base)


def tokenizer_of(base: hf.Base):
    """The tokenizer in a model's folder, or None."""
    has = any((base.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return tokenizers.load(base.folder) if has else None


def plan_data(c, world, folder, base, tokenizer, config) -> Run:
    """The run with its sources, its plan, its objective and what it scores, and still without a model.

    Shards are verified on rank 0. UserError where the model cannot read a source, where the plan reads one too often,
    and for settings that the sources or the run's length make senseless.
    """
    sources, shards, heldout = mixture.open_buckets(pack_sources(c, world, folder, base, tokenizer)), {}, {}
    for name, source in sources.items():
        shards[name] = Shards(source.path)
        check_tokenizer(name, shards[name], tokenizer, config.vocab_size)
        if world.main:
            verify(source.path, budget_bytes=4e9, seed=c.seed)
        # The buckets of a source share its tokens.
        tokens = -(-c.eval.tokens // round(1 / (source.high - source.low)))
        if found := scoring.heldout_documents(Shards(source.path, "heldout"), tokens):
            heldout[name] = found

    objective = make_objective(c.objective, c.data.mask_documents, tokenizer, config.vocab_size)
    text_length = objective.text_length(c.data.context)
    packings = packing.pack_sources(shards, c.data, objective.shift, text_length)
    plan = mixture.make_plan(c.data, c.train, sources, {name: each.sequences for name, each in packings.items()})
    loader = data.Loader(packings, plan, c.data, seed=c.seed)
    drawn = {name: shards[name] for name, n in zip(sources, plan[-1]) if n}
    held = {name: Shards(sources[name].path, "heldout") for name in heldout if shards[name].format in objective.forms
            } if objective.measures else {}
    for name, each in [*drawn.items(), *held.items()]:
        objective.check_source(name, each)
    # Whose held-out pairs are all longer than a sequence is not evaluated, and can be trained on still.
    held = {name: packed for name, each in held.items()
            if (packed := packing.Packing(each, c.data, objective.shift, text_length)).sequences}
    run = Run(c, world, folder, base, tokenizer, config, sources, loader, plan, objective, heldout, held)
    schedules.refuse_length(run.steps, c.optim)

    for refusal in mixture.judge_epochs(loader.epochs(run.steps), sources)[0]:
        raise UserError(refusal)
    if world.main:
        decode = tokenizer.decode if tokenizer else lambda ids: " ".join(map(str, ids))
        run.leaks = judge_leaks(find_leaks(heldout, drawn, decode), heldout)
    # Answers that are preferred to others are no text to be learned as it stands: their measures are the objective's.
    heldout = run.heldout = {name: found for name, found in heldout.items() if shards[name].format != "preference"}
    both = len({sources[name].role for name in heldout}) == 2
    if c.forget.merge.method != "none" and not (objective.text_objective.causal and both):
        raise UserError("forget.merge finds its coefficient by bits per byte on held-out text of the domain and of a "
                        "general source, and one is lacking; pack both with --heldout above 0, or merge after the "
                        "run: python forget.py merge --alpha 0.5")
    if c.forget.adaptive.policy != "none" and c.eval.every >= run.steps:
        raise UserError(f"forget.adaptive decides at evaluations, and with eval.every {c.eval.every} there is none "
                        f"within {run.steps} steps; set --eval.every {max(1, run.steps // 10)}")
    refuse_stops(c, {sources[name].role for name in heldout}, run.steps)
    run.questions = open_questions(run)
    return run


# ---- model

def build_model(c, config: ModelConfig, base: hf.Base | None, world) -> Model:
    """The model on its device, with its weights and its adapters, and with FSDP sharded.

    Shapes without memory -> what a block computes, from the inside out: adapters, shared attention and matmuls, one
    graph where it is compiled, shards -> weights, tensor by tensor. No rank ever holds the full weights of a sharded
    model, nor the plain ones of a base in few bits. Recomputation (model.checkpoint_blocks) stands around all of it.
    """
    sharded = c.parallel.shards(world.size)
    # bf16 halves the memory of weights that do not train (under adapters) and of those whose optimizer keeps what bf16
    # rounds away (adamw_8bit). With any other optimizer bf16 weights would lose small updates.
    bf16 = c.train.precision == "bf16" and (c.optim.name == "adamw_8bit" or c.lora.rank > 0)
    computes = torch.bfloat16 if bf16 else torch.float32
    with torch.device("meta"):
        model = Model(config).to(computes)
        if c.lora.rank:
            lora.attach(model, c.lora, c.seed)
    if world.pipe:
        pipeline.split(model, world.pipe, flops_by_block(config, c.data.context),
                       6.0 * config.vocab_size * config.hidden_size)
    if c.model.init == "pretrained":
        hf.find_weights(model, base.folder)
    parallel.share_blocks(model, world, c.parallel)
    if c.compile:
        # Block by block: FSDP's gathering stays between the graphs, and blocks of one kind have one.
        for block in model.shard_plan():
            block.compile()
    if sharded:
        # FSDP gathers weights in the dtype of the matmuls; adapters stay in fp32, because their updates are small.
        gathered = None if c.lora.rank or c.train.precision == "fp32" else devices.DTYPES[c.train.precision]
        parallel.shard(model, world, c.parallel, gathered)
        computes = gathered or computes
    refuse_memory(adapters.count_elements(model)[1], c, world.device,
                  "its sizes, or use --parallel.strategy fsdp on more devices")
    offload.make_empty(model, world.device, c.parallel.offload).tie()
    if c.model.init == "scratch":
        model.initialise(c.seed, sharding.distribute_like)
    else:
        hf.fill(model, base.folder, sharding.distribute_like)
    if c.lora.rank:
        lora.initialise(model, c.seed, sharding.distribute_like)
    model.checkpoint_blocks = c.model.checkpoint_blocks
    if world.pipe:
        pipeline.connect(model, world.pipe, computes, world.device)
    return model.train()


# ---- methods

def draw_general_text(run: Run):
    """Yield corrupted batches of the general sources alone, enough for EWC's samples, the same on every rank."""
    c, names = run.c, run.names_of("general")
    weights = mixture.source_weights({name: run.sources[name] for name in names}, 0.0, strata=c.data.strata)
    # Batches of 8 sequences.
    plan = mixture.plan_counts(np.tile(weights, (-(-c.forget.ewc.samples // 8), 1)), 8)
    loader = data.Loader({name: run.loader.packings[name] for name in names}, plan, c.data, seed=c.seed)
    for batch in map(loader.batch, range(len(plan) - 1)):
        yield run.objective.corrupt(batch, batch.rng)


def describe_learning(run: Run) -> Learning:
    c, world, loader, general = run.c, run.world, run.loader, run.names_of("general")
    base, sharded = None, sharding.is_sharded(run.inner)
    if c.lora.rank:
        base = adapters.disabled
    elif sharded and (c.forget.lwf.alpha or (run.objective.uses_reference and not c.objective.reference
                                             and not c.objective.precompute)):
        # Sharded weights cannot be copied: the frozen copy of the base (teacher) is loaded and sharded a second time.
        teacher = build_model(c, run.config, run.base, world).requires_grad_(False)
        base = lambda model: contextlib.nullcontext(teacher)        # noqa: E731
    reference = None
    if other := run.reference:
        plain = dataclasses.replace(c, compile=False, lora=lora.LoraConfig(),
                                    model=dataclasses.replace(c.model, init="pretrained"))
        judge = functools.cache(lambda: build_model(plain, other.config, other, world).requires_grad_(False))
        reference = lambda model: contextlib.nullcontext(judge())        # noqa: E731
    # What an estimate from general text, such as EWC's, depends on.
    tokens = [record["sha256"] for name in loader.names if name in general for record in loader.shards[name].records]
    made_of = [run.base_fingerprint, c.data.context, c.data.packing, c.data.mask_documents, *tokens,
               *(["drop_last"] if c.data.drop_last else []), *filter(None, [run.objective_settings])]
    judged_by = [run.reference.fingerprint if run.reference else run.base_fingerprint, dataclasses.asdict(
        (run.reference or run).config), c.data.context, c.train.precision, c.lora.rank and c.lora.base]
    return Learning(
        steps=run.steps, seed=c.seed, world=world, sharded=sharded, forward=run.forward,
        general_text=draw_general_text(run) if general else None,
        general_sources=frozenset(i for i, name in enumerate(loader.names) if name in general and loader.plan[-1][i]),
        replay_share=lambda step: round(1 - run.domain_share_at(step), 9), base=base, reference=reference,
        pipeline=functools.partial(make_pipeline, run, 1, 1) if world.pipe else None,
        pretrained=c.model.init == "pretrained", adapters=c.lora.rank > 0,
        precision=None if c.train.precision == "fp32" else devices.DTYPES[c.train.precision],
        folder=run.folder, fingerprint=hashing.short_digest(json.dumps(made_of).encode()),
        reference_fingerprint=hashing.short_digest(json.dumps(judged_by).encode()),
        packings=[*loader.packings.values(), *run.held.values()], micro_batch_size=c.train.micro_batch_size,
        autocast=run.autocast)
