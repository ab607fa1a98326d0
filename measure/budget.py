"""What a continued pretraining costs: tokens, steps, memory, hours, energy and price, in full, by LoRA and by QLoRA.

    replay tokens = domain tokens r / (1 - r)           r: the replay share
    hours on a GPU = operations / (GPUs * its rate * the share of the rate that trainings reach, MFU)
    hours here     = steps * a step's seconds, from a few real steps (measure/calibrate.py), and the evaluations

`choose_settings` looks, from fast to slow, for the first settings whose memory (measure/memory.py) fits: fewer
sequences at a time, then shards, then recomputed activations, then 8-bit moments. What fits in no way is refused with
what would.

Prices are dollars for a GPU-hour on demand as Lambda, RunPod and AWS listed them in autumn 2025, rounded, from memory:
they differ by a factor of two between vendors and move by the month, so give your own (--price). Memory, dense bf16
rate and power are NVIDIA's data sheets' (SXM where there are two; without sparsity).
"""

import itertools
import math
from dataclasses import dataclass, replace

import train
from core import devices
from core.architecture import ModelConfig
from core.config import to_toml
from core.errors import UserError, nearest
from core.output import escape
from learn.schedules import recommended
from lora import LoraConfig
from measure.choose_layout import USABLE, name_layout
from measure.gap import describe_tokens
from measure.ladder import changed_settings
from measure.memory import OVERHEAD, count_elements, estimate, recomputed_blocks
from model import matmul_flops_per_token
from text.mixture import SourceConfig

METHODS = ("full", "lora", "qlora")
# Tokens of a micro-batch beyond which a device gets no faster.
MICRO_TOKENS = {"cuda": 16384, "cpu": 4096}
# Tokens of a step: at most these, so many steps at least where the corpus allows it, and no fewer than a few thousand.
BATCH_TOKENS, FEWEST_STEPS, LEAST_BATCH = 4_000_000, 500, 8192
# 4-bit weights are dequantised in each pass.
QLORA_SLOWER = 1.3


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: float               # bytes
    flops: float                # dense, in bf16 (T4: fp16), per second
    watts: float | None         # at most, of the board
    price: float | None         # dollars per hour
    kind: str = "cuda"


GPUS = {gpu.name: gpu for gpu in (
    Gpu("B200", 180e9, 2250e12, 1000, 5.0), Gpu("H200", 141e9, 989e12, 700, 3.5), Gpu("H100", 80e9, 989e12, 700, 2.5),
    Gpu("A100", 80e9, 312e12, 400, 1.6), Gpu("A100-40", 40e9, 312e12, 400, 1.3), Gpu("L40S", 48e9, 362e12, 350, 1.0),
    Gpu("RTX4090", 24e9, 165e12, 450, 0.4), Gpu("RTX3090", 24e9, 71e12, 350, 0.25),
    Gpu("A10", 24e9, 125e12, 150, 0.75), Gpu("T4", 16e9, 65e12, 70, 0.35))}
# Bases that can be planned for without a folder: vocabulary, width, MLP width, blocks, heads, key-value heads,
# positions, whether the head is tied.
SIZES = {"llama-2-7b": (32000, 4096, 11008, 32, 32, 32, 4096, False),
         "llama-2-13b": (32000, 5120, 13824, 40, 40, 40, 4096, False),
         "llama-2-70b": (32000, 8192, 28672, 80, 64, 8, 4096, False),
         "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, 8192, False),
         "llama-3-70b": (128256, 8192, 28672, 80, 64, 8, 8192, False),
         "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, 131072, True),
         "llama-3.2-3b": (128256, 3072, 8192, 28, 24, 8, 131072, True),
         "mistral-7b": (32768, 4096, 14336, 32, 32, 8, 32768, False)}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name, or this machine's CPU; UserError for an unknown one."""
    if name == "cpu":
        return Gpu("cpu", devices.memory_bytes(devices.pick_device("cpu")), 0.0, None, None, "cpu")
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    if name.lower() not in known:
        raise UserError(f"--gpu is {name!r}{nearest(name, list(GPUS))}; known are {', '.join(GPUS)} and cpu")
    return known[name.lower()]


def known_size(name: str) -> ModelConfig | None:
    """The sizes of a base in SIZES, None for another name."""
    if name.lower() not in SIZES:
        return None
    vocab, D, F, blocks, heads, kv_heads, positions, tied = SIZES[name.lower()]
    return ModelConfig(vocab, D, F, blocks, heads, kv_heads, max_position_embeddings=positions,
                       tie_word_embeddings=tied)


# ---- tokens and steps

@dataclass(frozen=True)
class Job:
    """What is to be trained on what."""
    model: str
    config: ModelConfig
    domain: float               # tokens that are there
    general: float | None       # None: not known
    replay: float
    epochs: float
    context: int
    gpu: Gpu
    gpus: int
    batch_tokens: float = BATCH_TOKENS
    mfu: float = 0.4

    @property
    def domain_tokens(self) -> float:
        """Domain tokens that are read."""
        return self.domain * self.epochs

    @property
    def replay_tokens(self) -> float:
        return self.domain_tokens * self.replay / (1 - self.replay)

    @property
    def tokens(self) -> float:
        return self.domain_tokens + self.replay_tokens


def choose_batch(job: Job) -> int:
    """Sequences per step, a multiple of the devices: job.batch_tokens of them, fewer where there would be less than
    FEWEST_STEPS steps, in powers of two."""
    wanted = min(job.batch_tokens, max(LEAST_BATCH, job.tokens / FEWEST_STEPS))
    sequences = max(1, round(wanted / job.context / job.gpus))
    return job.gpus * (1 << (sequences.bit_length() - 1))


# ---- settings that fit

def make_settings(job: Job, method: str, rank: int | None = None) -> train.Config:
    """The recommended settings of a method, before what memory asks for."""
    c = train.Config()
    count = count_elements(job.config, LoraConfig()).base
    lr, min_lr = recommended(count, "full" if method == "full" else "lora")
    c.data = replace(c.data, context=job.context, schedule="static", domain_share=round(1 - job.replay, 4))
    c.optim = replace(c.optim, lr=lr, min_lr=min_lr)
    precision = "fp32" if job.gpu.kind == "cpu" else "fp16" if job.gpu.name == "T4" else "bf16"
    batch = choose_batch(job)
    steps = max(1, math.ceil(job.tokens / (batch * job.context)))
    c.train = replace(c.train, steps=steps, batch_size=batch, micro_batch_size=1, precision=precision,
                      save_every=max(1, min(1000, steps // 5)))
    c.eval = replace(c.eval, every=max(1, min(1000, steps // 10)))
    if method != "full":
        # The paper's rank 8 holds too little of much new text; a rank is at most an eighth of the width.
        rank = rank or max(8, 1 << (min(128, job.config.hidden_size // 8).bit_length() - 1))
        c.lora = replace(c.lora, rank=rank, alpha=float(rank), rslora=True,
                         base="nf4" if method == "qlora" else "plain")
    return c


def choose_settings(job: Job, method: str, rank: int | None = None) -> tuple[train.Config, dict, bool]:
    """(settings, their memory by measure.memory.estimate, whether it fits): the first that fit, else the smallest."""
    start = make_settings(job, method, rank)
    fsdp = replace(start.parallel, strategy="fsdp")
    layouts = [start.parallel, *([fsdp, replace(fsdp, reduce_each=True)] if job.gpus > 1 else [])]
    optimizers = ["adamw", "adamw_8bit"] if method == "full" and start.train.precision != "fp16" else ["adamw"]
    share = start.train.batch_size // job.gpus
    most = max(1, min(share, MICRO_TOKENS[job.gpu.kind] // job.context))
    room, smallest = USABLE * job.gpu.memory - OVERHEAD[job.gpu.kind], None
    for optimizer, checkpointing, parallel in itertools.product(optimizers, (False, True), layouts):
        micro = 1 << (most.bit_length() - 1)
        while micro:
            c = replace(start, optim=replace(start.optim, name=optimizer),
                        model=replace(start.model, activation_checkpointing=checkpointing),
                        parallel=parallel,
                        train=replace(start.train, micro_batch_size=micro))
            parts = estimate(c, job.config, job.gpus, job.gpu.kind)
            if parts["peak"] <= room:
                return c, parts, True
            if smallest is None or parts["peak"] < smallest[1]["peak"]:
                smallest = c, parts
            micro //= 2
    return *smallest, False


def find_remedies(job: Job, method: str, rank: int | None = None) -> list[str]:
    """What would fit where a method does not: more devices of the kind, or one of another kind."""
    found = []
    for gpus in (1 << k for k in range(11)):
        more = gpus > job.gpus and job.gpu.kind == "cuda"
        if more and choose_settings(replace(job, gpus=gpus), method, rank)[2]:
            found.append(f"{gpus} x {job.gpu.name}")
            break
    larger = sorted((gpu for gpu in GPUS.values() if gpu.memory > job.gpu.memory), key=lambda gpu: gpu.memory)
    for gpu in larger if job.gpu.kind == "cuda" else ():
        if choose_settings(replace(job, gpu=gpu), method, rank)[2]:
            found.append(f"{job.gpus} x {gpu.name}")
            break
    return found


# ---- time, energy, price

def count_operations(job: Job, c: train.Config) -> float:
    """Operations of all matmuls of the run: six per weight and token; four where the weights are frozen, and two more
    for a forward pass that is computed again."""
    per_token = matmul_flops_per_token(job.config, job.context)
    factor = 4 / 6 if c.lora.rank else 1.0
    if c.model.activation_checkpointing:
        layers = job.config.num_hidden_layers
        factor += 2 / 6 * len(recomputed_blocks(c, range(layers))) / layers
    if c.lora.base != "plain":
        factor *= QLORA_SLOWER
    return per_token * factor * job.tokens


def evaluated_tokens(job: Job, c: train.Config) -> float:
    """Tokens of all evaluations: before the first step, on schedule and after the last one."""
    held_out = min(c.eval.tokens, 0.02 * job.domain)
    if job.replay:
        held_out += c.eval.tokens if job.general is None else min(c.eval.tokens, 0.02 * job.general)
    return held_out * (2 + (c.train.steps - 1) // c.eval.every)


def price_run(job: Job, c: train.Config, speed: dict | None) -> dict:
    """hours, gpu_hours, kwh and dollars of a run. speed: a step's seconds on this machine, by measure.calibrate."""
    if speed:
        accumulation = c.train.batch_size // c.train.micro_batch_size
        rest = evaluated_tokens(job, c) / (c.train.micro_batch_size * c.data.context) * speed["forward"]
        hours = (c.train.steps * (speed["fixed"] + accumulation * speed["each"]) + rest) / 3600
    elif job.gpu.kind == "cuda":
        operations = count_operations(job, c) + matmul_flops_per_token(job.config, job.context) / 3 * evaluated_tokens(
            job, c)
        hours = operations / (job.gpus * job.gpu.flops * job.mfu) / 3600
    else:
        return {"hours": None, "gpu_hours": None, "kwh": None, "dollars": None}
    gpu_hours, watts, price = hours * job.gpus, job.gpu.watts, job.gpu.price
    return {"hours": hours, "gpu_hours": gpu_hours, "kwh": None if watts is None else gpu_hours * watts / 1000,
            "dollars": None if price is None else gpu_hours * price}


def plan_methods(job: Job, rank: int | None, calibrate=None) -> dict[str, dict]:
    """{method: {"fits", "settings", "memory", "peak_gb", "hours", ..., "would_fit"}}, all three side by side.

    calibrate(c, config) -> a step's seconds on this machine; None: hours are from operations and MFU alone."""
    found = {}
    for method in METHODS:
        c, parts, fits = choose_settings(job, method, rank)
        speed = calibrate(c, job.config) if calibrate and fits else None
        accumulation = c.train.batch_size // job.gpus // c.train.micro_batch_size
        count = count_elements(job.config, c.lora)
        found[method] = {
            "fits": fits, "peak_gb": (parts["peak"] + OVERHEAD[job.gpu.kind]) / 1e9,
            "memory_gb": {name: size / 1e9 for name, size in parts.items()}, "trained_parameters": count.trained,
            "optimizer": c.optim.name, "strategy": c.parallel.strategy,
            "layout": name_layout(c.parallel), "lr": c.optim.lr, "rank": c.lora.rank or None,
            "activation_checkpointing": c.model.activation_checkpointing, "steps": c.train.steps,
            "batch_size": c.train.batch_size, "micro_batch_size": c.train.micro_batch_size,
            "accumulation": accumulation, "batch_tokens": c.train.batch_size * job.context,
            "checkpoint_gb": (parts["optimizer"] * (job.gpus if c.parallel.strategy == "fsdp" else 1)
                              + 4 * count.trained) / 1e9,
            "step_seconds": speed and speed["fixed"] + accumulation * speed["each"], **price_run(job, c, speed),
            "would_fit": [] if fits else find_remedies(job, method, rank), "config": c}
    return found


# ---- the recipe

def write_recipe(job: Job, c: train.Config, sources: dict[str, SourceConfig], notes: list[str]) -> str:
    """A recipe for train.py with the settings that are not its defaults; notes: lines above it, as comments."""
    c = replace(c, out="out/run", model=replace(c.model, path=job.model), data=replace(c.data, sources=sources))
    # A name in a note may hold a line break, and what is behind it would be settings.
    return "".join(f"# {escape(note, line=True)}\n" for note in notes) + "\n" + to_toml(
        changed_settings(c, train.Config()))


# ---- words for a terminal

def describe(job: Job, methods: dict[str, dict]) -> str:
    """The three methods side by side."""
    def cell(value, form="{:,}"):
        return "-" if value is None else form.format(value)
    devices_of = f"{job.gpus} x {job.gpu.name}, {job.gpu.memory / 1e9:.0f} GB each"
    lines = [f"{describe_tokens(job.domain_tokens)} domain tokens ({job.epochs:g} epochs) + "
             f"{describe_tokens(job.replay_tokens)} of replay ({job.replay:.0%}) = {describe_tokens(job.tokens)}, in "
             f"sequences of {job.context:,}, on {devices_of}", "",
             f"{'':26} " + " ".join(f"{method:>17}" for method in methods)]
    rows = [("fits", lambda m: "yes" if m["fits"] else "no"),
            ("memory per device, GB", lambda m: f"{m['peak_gb']:.1f}"),
            ("  weights", lambda m: f"{m['memory_gb']['weights']:.1f}"),
            ("  gradients", lambda m: f"{m['memory_gb']['gradients']:.1f}"),
            ("  optimizer", lambda m: f"{m['memory_gb']['optimizer']:.1f}"),
            ("  activations", lambda m: f"{m['memory_gb']['activations']:.1f}"),
            ("parameters that train", lambda m: describe_tokens(m["trained_parameters"])),
            ("adapter rank", lambda m: cell(m["rank"])), ("optimizer", lambda m: m["optimizer"]),
            ("over devices", lambda m: m["layout"]),
            ("activation checkpointing", lambda m: "yes" if m["activation_checkpointing"] else "no"),
            ("micro-batch x accumulation", lambda m: f"{m['micro_batch_size']} x {m['accumulation']}"),
            ("tokens per step", lambda m: cell(m["batch_tokens"])), ("steps", lambda m: cell(m["steps"])),
            ("learning rate", lambda m: f"{m['lr']:g}"), ("hours", lambda m: cell(m["hours"], "{:,.3g}")),
            ("GPU-hours", lambda m: cell(m["gpu_hours"] if job.gpu.kind == "cuda" else None, "{:,.3g}")),
            ("energy, kWh", lambda m: cell(m["kwh"], "{:,.3g}")), ("price, $", lambda m: cell(m["dollars"], "{:,.3g}")),
            ("a checkpoint, GB", lambda m: f"{m['checkpoint_gb']:.2g}")]
    lines += [f"{name:26} " + " ".join(f"{form(found):>17}" for found in methods.values()) for name, form in rows]
    for method, found in methods.items():
        if not found["fits"]:
            would = ", ".join(found["would_fit"]) or "nothing known here; try lora or qlora, or a shorter --context"
            lines.append(f"{method} needs {found['peak_gb']:.1f} GB on each device, at the least; what would do: "
                         f"{would}")
    return "\n".join(lines)


def list_warnings(job: Job) -> list[str]:
    """What a user should know of the volume and of repetitions."""
    warnings, general = [], job.general
    if job.epochs > 4:
        warnings.append(f"{job.epochs:g} epochs: beyond 4 repeats teach less, and by 16 hardly anything (arXiv "
                        f"2305.16264)")
    if job.replay and general is not None and job.replay_tokens > 4 * general:
        warnings.append(f"replay would read the general text {job.replay_tokens / max(1, general):.1f} times; above 4 "
                        f"times collect more of it, above 16 train.py refuses")
    if not job.replay:
        warnings.append("no replay: the base will forget (1 % of general text already keeps most, arXiv 2502.06042)")
    return warnings
