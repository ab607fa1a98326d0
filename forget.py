"""Learn the domain and keep the rest: freezing, EWC and L2-SP, LwF, adaptive replay, weight averages.

    python train.py RECIPE.toml --forget.ewc.strength 0.1 --forget.lwf.alpha 0.5 --forget.adaptive.policy budget
    python forget.py merge --help           a model between base and result: see merge.py
    python forget.py replay --help          general text where you have none: see replay.py

| method   | holds back forgetting by                             | costs                                      |
|----------|------------------------------------------------------|--------------------------------------------|
| freeze   | leaving weights as they are                          | less than nothing: no gradients, no state  |
| ewc      | pulling the weights that general text needs to base  | 2 copies of what trains (L2-SP: 1)         |
| lwf      | keeping the outputs near the base's                  | the base's forward pass; without adapters  |
|          |                                                      | its weights                                |
| adaptive | more general text when it is being forgotten         | evaluations                                |
| ema      | averaging the weights over the run                   | 1 copy of what trains                      |
| merge    | going back part of the way to base, after the run    | a sweep of evaluations                     |

A method is an object with hooks at the loop's five points and nothing more; it acts on any module whose output layer is
`head` and, to freeze by blocks, whose blocks are `layers`. B sequences, T tokens, D hidden size, V vocabulary.
"""

import core.threads

import bisect
import contextlib
import copy
import dataclasses
import fnmatch
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from core.config import ArgumentParser, main_guard, nearest, write_json
from core.parallel import World, like, whole
from kernels import linear_cross_entropy, linear_kl

IGNORE = -100
RAISE, LOWER = 0.1, 0.05                # one decision's change of the replay share
WORST, MILD = 0.05, 0.025               # relative degradation above which replay is raised, below which lowered
SPARE = 0.75                            # part of the budget under which replay is lowered
AHEAD = 3                               # evaluations that the budget policy looks ahead: replay takes time to help
ALONE = World(0, 1, torch.device("cpu"))
METRICS = {"bits_per_byte": "down", "perplexity": "down", "accuracy": "up"}     # the better direction; first one counts


# ---- settings

@dataclass
class FreezeConfig:
    schedule: Literal["none", "top", "progressive", "stages"] = "none"
    """top: the top blocks, the final norm and the head train; progressive: it begins so, and blocks thaw from the top
    down; stages: what freeze.stages says"""
    blocks: int = 1
    """top, progressive: how many blocks train from the first step on"""
    thaw_ratio: float = 0.5
    """progressive: share of the run after which every block trains"""
    embeddings: bool = False
    """top, progressive: the embeddings train too, and with them a head that is tied to them"""
    stages: list[str] = field(default_factory=list)
    """stages: each "PROGRESS NAME NAME ...": from this share of the run on these parameters train and no others. A name
    is the path of a module or parameter, * any one part of it: "0 layers.3 norm head" "0.5 layers.*.mlp norm head" """

    def __post_init__(self):
        if self.blocks < 0:
            raise ValueError(f"forget.freeze.blocks is {self.blocks}, but must be 0 or more")
        if not 0 < self.thaw_ratio <= 1:
            raise ValueError(f"forget.freeze.thaw_ratio is {self.thaw_ratio}, but must be above 0 and at most 1")
        if bool(self.stages) != (self.schedule == "stages"):
            raise ValueError("forget.freeze.stages goes with forget.freeze.schedule stages, which needs at least one, "
                             'e.g. "0 layers.3 norm head"')
        starts = [start for start, _ in self.parsed()]
        if starts and (starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= 1):
            raise ValueError(f"forget.freeze.stages begin at {', '.join(f'{s:g}' for s in starts)}, but must begin at "
                             f"0, rise and stay below 1, the end of the run")

    def parsed(self) -> list[tuple[float, list[str]]]:
        """[(progress, patterns)] of the stages."""
        out = []
        for stage in self.stages:
            start, *patterns = stage.split()
            try:
                out.append((float(start), patterns))
            except ValueError:
                raise ValueError(f"forget.freeze.stages has {stage!r}, which does not begin with the share of the run "
                                 f"it starts at, e.g. 0.5") from None
        return out


@dataclass
class EWCConfig:
    strength: float = 0.0
    """lambda of lambda * sum F (theta - base)^2 in nats per token, 0: off; try 0.1, 1, 10; with the true F 0.5 makes it
    the second order of the KL from the base on general text"""
    fisher: Literal["empirical", "true", "l2sp"] = "empirical"
    """F from the gradients of general text as it stands, or with labels drawn from the model; l2sp: F is 1 throughout
    and needs no text (arXiv 1802.01483)"""
    samples: int = 1000
    """sequences of general text that F is estimated on"""

    def __post_init__(self):
        _positive("forget.ewc", self, "samples")
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"forget.ewc.strength is {self.strength}, but must be 0 (off) or more")


@dataclass
class LwFConfig:
    alpha: float = 0.0
    """(1 - alpha) cross-entropy + alpha T^2 KL(base || model), 0: off; 0.5 is usual"""
    temperature: float = 2.0
    """T; above 1 the unlikely tokens count for more"""
    tokens: Literal["replay", "all"] = "replay"
    """what the KL is taken on; replay: general text alone, and the domain's loss stays as it is"""

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"forget.lwf.alpha is {self.alpha}, but must be between 0 (off) and 1 (the KL alone)")
        _positive("forget.lwf", self, "temperature")


@dataclass
class AdaptiveConfig:
    policy: Literal["none", "budget", "degradation"] = "none"
    """budget: as little replay as holds general bits per byte under the base's + epsilon; degradation: replay rises by
    0.1 where the worst metric has lost over 5 %, and falls by 0.05 where it has lost under 2.5 %"""
    epsilon: float = 0.02
    """budget: bits per byte that general text may lose"""
    smoothing: float = 0.5
    """budget: weight of the newest evaluation against what the ones before foretold; 1: no memory"""
    start: float = 0.3
    """replay share that the first decision starts from"""
    least: float = 0.2
    """lowest replay share"""
    most: float = 0.6
    """highest replay share"""

    def __post_init__(self):
        _positive("forget.adaptive", self, "epsilon")
        if not 0 < self.smoothing <= 1:
            raise ValueError(f"forget.adaptive.smoothing is {self.smoothing}, but must be above 0 and at most 1")
        if not 0 <= self.least <= self.start <= self.most <= 1:
            raise ValueError(f"forget.adaptive: least {self.least}, start {self.start} and most {self.most} must rise "
                             f"between 0 and 1")


@dataclass
class EMAConfig:
    decay: float = 0.0
    """mean = decay * mean + (1 - decay) * weights after each step, from the base on; 0: off; 0.999 looks back about
    1,000 steps"""

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"forget.ema.decay is {self.decay}, but must be 0 (off) or more and below 1")


def check_coefficients(alpha: float, density: float):
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, but must be between 0 (the base) and 1 (the result)")
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}, but must be above 0 and at most 1 (every change is kept)")


@dataclass
class MergeConfig:
    method: Literal["none", "linear", "ties", "slerp"] = "none"
    """after the run, merge it with the base; the best coefficient on the held-out text is exported"""
    alphas: list[float] = field(default_factory=lambda: [i / 10 for i in range(11)])
    """coefficients tried: 0 is the base, 1 the run's own result"""
    density: float = 0.2
    """ties: share of each tensor's changes that is kept, the largest"""

    def __post_init__(self):
        if not self.alphas:
            raise ValueError("forget.merge.alphas is empty; name at least one coefficient between 0 and 1")
        for alpha in self.alphas:
            check_coefficients(alpha, self.density)


@dataclass
class ForgetConfig:
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    ewc: EWCConfig = field(default_factory=EWCConfig)
    lwf: LwFConfig = field(default_factory=LwFConfig)
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)


def _positive(section, config, *names):
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{section}.{name} is {getattr(config, name)}, but must be above 0")


# ---- what the loop calls

class Method:
    """Hooks at the loop's five points; each does nothing unless a method overrides it. `model` is the model itself,
    not DDP's wrapper. `notes` are lines that a user should read before the run; model_built may fill them."""

    name = ""
    notes: tuple | list = ()

    def model_built(self, model):
        """Before DDP and the optimizer exist: freeze, take copies."""

    def loss_computed(self, model, batch, loss, metrics):
        """One micro-batch; loss: nats summed over its targets; metrics["hidden"] [B, T, D] in the graph. The loss to
        go backward from."""
        return loss

    def before_step(self, step, model) -> dict:
        """Gradients are complete, mean per token over the step and all ranks, not yet clipped. Numbers for the log."""
        return {}

    def after_step(self, step, model, optimizer):
        """The weights have moved."""

    def evaluated(self, step, texts) -> dict | None:
        """After an evaluation {source: {"role", "bits_per_byte", ...}}; a decision to log and act on, or None."""

    def exported(self, model):
        """What the run is to leave: a context in which the model is evaluated last and exported."""
        return contextlib.nullcontext()

    def state(self) -> tuple[dict, dict]:
        """({name: whole CPU tensor}, {name: JSON value}) that resume exactly; a collective call."""
        return {}, {}

    def load_state(self, tensors, numbers):
        """What `state` returned, after model_built."""


def make_methods(config: ForgetConfig, total_steps: int, forward, world: World = ALONE, general=(),
                 general_batches=None, base=None, adapters: bool = False, pretrained: bool = True,
                 folder: Path | None = None, fingerprint: str = "", seed: int = 0,
                 precision: torch.dtype | None = None) -> list[Method]:
    """The methods that are on, in the order in which the loop calls them. ValueError where a combination is senseless.

    forward(model, batch) -> hidden [B, T, D], in the run's precision, the batch moved to its device.
    general: numbers, in batch.source, of the general sources that the plan draws from.
    general_batches(): iterable of corrupted batches of general text, the same on every rank.
    base(model): context in which the module it yields computes as the base does, e.g. the model with its adapters off;
    None: LwF copies the model. adapters: only adapters train. pretrained: there is a base.
    folder: where EWC keeps its Fisher, for a resumed run; fingerprint: of the base and of the general text.
    precision: what `forward` computes products in by autocast, if it does.
    """
    freeze, ewc, lwf, adaptive = config.freeze, config.ewc, config.lwf, config.adaptive
    on = {"freeze": freeze.schedule != "none", "ewc": ewc.strength > 0, "lwf": lwf.alpha > 0,
          "adaptive": adaptive.policy != "none", "merge": config.merge.method != "none"}
    keeps = [name for name in ("ewc", "lwf", "adaptive", "merge") if on[name]]
    if keeps and not pretrained:
        raise ValueError(f"forget.{keeps[0]} keeps what a base knows, and model.init scratch has none; leave it out, "
                         f"or start from a model with --model.init pretrained")
    if adapters and on["ewc"]:
        raise ValueError("forget.ewc ties the base's weights down, and with adapters these do not move, so it protects "
                         "nothing; use --forget.lwf.alpha 0.5, whose base is the same network with its adapters off")
    if adapters and on["freeze"]:
        raise ValueError("forget.freeze chooses which of the base's weights train, and with adapters none does; put "
                         "adapters on fewer modules instead")
    if not general:
        if on["adaptive"]:
            raise ValueError("forget.adaptive moves the share of general text, and the run draws none; add a source "
                             "with the role general (forget.py replay makes one from the base), or use "
                             "--forget.lwf.alpha 0.5 --forget.lwf.tokens all, which needs none")
        if on["lwf"] and lwf.tokens == "replay":
            raise ValueError("forget.lwf.tokens replay takes the KL on general text, and the run draws none; add a "
                             "source with the role general, take it everywhere with --forget.lwf.tokens all, or leave "
                             "LwF out with --forget.lwf.alpha 0")
    if on["ewc"] and ewc.fisher != "l2sp" and general_batches is None:
        raise ValueError("forget.ewc estimates its Fisher on general text, and there is none; add a source with the "
                         "role general (forget.py replay makes one from the base), or use --forget.ewc.fisher l2sp")
    methods = {"freeze": lambda: Freeze(freeze, total_steps, world),
               "ewc": lambda: EWC(ewc, forward, general_batches, world, folder, fingerprint, seed),
               "lwf": lambda: LwF(lwf, forward, general, world, base, precision),
               "adaptive": lambda: AdaptiveReplay(adaptive)}
    made = [make() for name, make in methods.items() if on[name]]
    return made + ([EMA(config.ema)] if config.ema.decay else [])


def row_of(batch, rows):
    """The rows `rows` (a slice or a list) of a batch, as a batch."""
    parts = {f.name: getattr(batch, f.name)[rows] for f in dataclasses.fields(batch)
             if f.name == "source" or isinstance(getattr(batch, f.name), torch.Tensor)}
    return dataclasses.replace(batch, **parts)


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def wide(x: torch.Tensor) -> torch.dtype:
    """The dtype to compute in: at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


# ---- freezing

class Freeze(Method):
    """What trains is a function of the step; what does not has no gradient, does not move by one bit and holds no
    optimizer state. Blocks are known by their exact number: layers.1 is not layers.10.

    Every parameter that trains at some time keeps requires_grad until the first step, so that the optimizer and DDP
    know it. DDP waits for the gradients it knew at its beginning: under it the frozen ones' are computed and dropped.
    """

    name = "freeze"

    def __init__(self, config: FreezeConfig, total_steps: int, world: World):
        self.config, self.total_steps, self.world = config, total_steps, world
        self.starts = [start for start, _ in config.parsed()]
        self.blocks = 0

    def model_built(self, model):
        config, names = self.config, list(trainable(model))
        self.blocks = 1 + max((block_of(name) for name, _ in model.named_parameters()), default=-1)
        if config.schedule != "stages" and config.blocks > self.blocks:
            raise ValueError(f"forget.freeze.blocks is {config.blocks}, but the model has {self.blocks} blocks named "
                             f"layers.N; lower it, or name what trains with --forget.freeze.schedule stages")
        for pattern in (p for _, patterns in config.parsed() for p in patterns):
            if not any(fits(name, pattern) for name in names):
                modules = {name.rsplit(".", i)[0] for name in names for i in range(1, name.count(".") + 1)}
                raise ValueError(f"forget.freeze.stages names {pattern!r}, which fits no parameter"
                                 f"{nearest(pattern, modules)}")
        stages = range(self.stage(0), self.stage(self.total_steps - 1) + 1)
        self.sets = {stage: {name for name in names if self.trains(name, stage)} for stage in stages}
        if empty := [stage for stage, held in self.sets.items() if not held]:
            raise ValueError(f"forget.freeze leaves nothing to train (stage {empty[0]}); name at least one part, or "
                             f"leave out freezing")
        self.ever = set().union(*self.sets.values())
        for name, p in model.named_parameters():
            p.requires_grad_(name in self.ever)
        self.replicated = self.world.size > 1 and not any(isinstance(p, DTensor) for p in model.parameters())
        self.notes = self.describe(model)

    def describe(self, model) -> list[str]:
        parameters = dict(model.named_parameters())
        count = [sum(parameters[name].numel() for name in names) for names in self.sets.values()]
        total = sum(p.numel() for p in parameters.values())
        notes = [f"freeze ({self.config.schedule}): {count[0]:,} of {total:,} parameters train at first, "
                 f"{count[-1]:,} at the end, in {len(count)} stages"]
        head, embedding = getattr(model, "head", None), getattr(model, "embed_tokens", None)
        if head is not None and embedding is not None and head.weight is embedding.weight:
            held = "" if "embed_tokens.weight" in self.ever else \
                ", which are frozen, so it does not train: --forget.freeze.embeddings True lets both"
            notes.append(f"freeze: the head is tied to the embeddings{held}")
        if self.replicated:
            notes.append("freeze: under DDP frozen weights save their optimizer state but not their gradients' work; "
                         "--parallel.strategy fsdp saves both")
        return notes

    def stage(self, step: int) -> int:
        """Number of the stage: of freeze.stages, or of the blocks that train."""
        config, progress = self.config, step / self.total_steps
        if config.schedule == "stages":
            return bisect.bisect_right(self.starts, progress) - 1
        if config.schedule == "top":
            return config.blocks
        done = min(1.0, progress / config.thaw_ratio)
        return config.blocks + int((self.blocks - config.blocks) * done + 1e-9)

    def trains(self, name: str, stage: int) -> bool:
        if self.config.schedule == "stages":
            return any(fits(name, pattern) for pattern in self.config.parsed()[stage][1])
        block = block_of(name)
        if block >= 0:
            return block >= self.blocks - stage
        return self.config.embeddings or not fits(name, "embed_tokens")

    def apply(self, step, model, optimizer=None):
        now = self.sets[self.stage(min(step, self.total_steps - 1))]
        for name, p in model.named_parameters():
            if name in self.ever:
                if name not in now:
                    p.grad = None
                    if optimizer is not None:
                        optimizer.state.pop(p, None)
                if not self.replicated:
                    p.requires_grad_(name in now)

    def before_step(self, step, model):
        self.apply(step, model)                       # at the first step, or after a resume, gradients are there
        return {"trainable_parameters": sum(p.numel() for p in trainable(model).values() if p.grad is not None)}

    def after_step(self, step, model, optimizer):
        self.apply(step + 1, model, optimizer)


def block_of(name: str) -> int:
    """3 of layers.3.mlp.up_proj.weight, -1 of what is in no block."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def fits(name: str, pattern: str) -> bool:
    """Whether the path `name` begins with `pattern`, part by part: layers.1 fits layers.1.mlp and not layers.10."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(wanted) <= len(parts) and all(map(fnmatch.fnmatchcase, parts, wanted))


# ---- elastic weight consolidation

def fisher(model, forward, batches, samples: int, true: bool = False, seed: int = 0, world: World = ALONE):
    """Diagonal Fisher information per token, of `samples` sequences: ({name: F in at least fp32, laid out as the
    parameter is}, {"sequences", "tokens"}).

    F = sum over sequences of (d summed nats / d theta)^2 / all their tokens. With labels drawn from the model (`true`)
    the tokens' gradients are uncorrelated given the text, so that F does not depend on where sequences are cut; the
    text's own labels (empirical) make it so only nearly (Kunstner 2019, arXiv 1905.12558). One backward pass a
    sequence. `batches` are the same on every rank: ranks with models of their own share the sequences out, and ranks
    that share a model each take all of them, as a gradient is then a mean over the ranks.
    """
    total = {name: torch.zeros_like(p, dtype=wide(p)) for name, p in trainable(model).items()}
    apart = world.size > 1 and not any(isinstance(p, DTensor) for p in total.values())
    sequences = tokens = 0
    model.zero_grad(set_to_none=True)
    with tqdm(total=samples, unit="sequence", desc="Fisher", disable=None if world.main else True) as bar:
        for row in (row_of(batch, slice(i, i + 1)) for batch in batches for i in range(len(batch.tokens))):
            if sequences == samples:
                break
            if not (valid := int((row.labels != IGNORE).sum())):
                continue
            number, sequences, tokens = sequences, sequences + 1, tokens + valid
            bar.update()
            if apart and number % world.size != world.rank:
                continue
            hidden = forward(model, row)
            labels = row.labels.to(hidden.device)
            if true:
                generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
                labels = draw_labels(hidden, model.head.weight, labels, generator)
            linear_cross_entropy(hidden, model.head.weight, labels)[0].backward()
            for name, p in trainable(model).items():
                if p.grad is not None:
                    total[name] += p.grad.to(total[name].dtype).square()
            model.zero_grad(set_to_none=True)
    if not sequences:
        raise ValueError("the Fisher of forget.ewc has no general text to be estimated on; add a source with the role "
                         "general, or use --forget.ewc.fisher l2sp")
    if apart:
        for value in total.values():
            torch.distributed.all_reduce(value)
    return {name: value / tokens for name, value in total.items()}, {"sequences": sequences, "tokens": tokens}


@torch.no_grad()
def draw_labels(hidden, weight, labels, generator):
    """Labels drawn from softmax(hidden W^T) where `labels` [B, T] are targets, the same for a seed on every device."""
    out, where = labels.clone(), (labels != IGNORE).nonzero(as_tuple=True)
    draw = torch.rand(len(where[0]), generator=generator, dtype=torch.float64).to(hidden.device)
    x, drawn = hidden[where], []
    for i in range(0, len(x), 256):                  # whole logits of a long sequence would be gigabytes
        share = (x[i:i + 256] @ weight.to(x.dtype).T).double().softmax(-1).cumsum(-1)
        drawn.append(torch.searchsorted(share, draw[i:i + 256, None] * share[:, -1:], right=True)[:, 0])
    out[where] = torch.cat(drawn).to(out.dtype)
    return out


class EWC(Method):
    """Elastic weight consolidation (Kirkpatrick 2017, arXiv 1612.00796): lambda sum F (theta - base)^2 in nats per
    token is added to the loss, its gradient 2 lambda F (theta - base) to the gradients, exactly and without a graph.
    With F = 1 it is L2-SP (Li 2018, arXiv 1802.01483). A parameter without a gradient does not move and gets none."""

    name = "ewc"

    def __init__(self, config: EWCConfig, forward, batches, world: World, folder, fingerprint: str, seed: int):
        self.config, self.forward, self.batches, self.world, self.seed = config, forward, batches, world, seed
        self.file = Path(folder) / "fisher.safetensors" if folder else None
        self.fingerprint = json.dumps([fingerprint, config.fisher, config.samples, seed])
        self.fisher = None

    def model_built(self, model):
        parameters = trainable(model)
        if not parameters:
            raise ValueError("forget.ewc ties down weights that train, and none does; leave it out, or freeze less")
        self.anchor = {name: p.detach().clone() for name, p in parameters.items()}
        gigabytes = sum(p.numel() * (p.element_size() + (4 if self.config.fisher != "l2sp" else 0))
                        for p in parameters.values()) / 1e9
        text = "no text"
        if self.config.fisher != "l2sp":
            known = self.world.broadcast(self.stored(parameters) if self.world.main else None)
            if known:
                self.load(parameters)
            else:
                self.fisher, known = fisher(model, self.forward, self.batches(), self.config.samples,
                                            self.config.fisher == "true", self.seed, self.world)
                self.save(known)
            text = f"{known['sequences']:,} sequences, {known['tokens']:,} tokens of general text"
            if known["sequences"] < self.config.samples:
                text += f" (of {self.config.samples:,} wanted)"
        self.notes = [f"ewc: {self.config.fisher} from {text}; its copies take {gigabytes:.2f} GB over all ranks"]

    def save(self, known: dict):
        if self.file is None:
            return
        tensors = {name: whole(value) for name, value in self.fisher.items()}
        if self.world.main:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_suffix(".tmp")
            save_file(tensors, temporary, metadata={"fingerprint": self.fingerprint, "known": json.dumps(known)})
            os.replace(temporary, self.file)
        self.world.barrier()

    def stored(self, parameters: dict) -> dict | None:
        """What is known of the Fisher that the run's folder already holds, if it was estimated on the same."""
        if self.file is None or not self.file.exists():
            return None
        with safe_open(self.file, framework="pt") as stored:
            same = stored.metadata()["fingerprint"] == self.fingerprint and set(stored.keys()) == parameters.keys()
            return json.loads(stored.metadata()["known"]) if same else None

    def load(self, parameters: dict):
        with safe_open(self.file, framework="pt") as stored:
            self.fisher = {name: like(stored.get_tensor(name), p, wide(p)) for name, p in parameters.items()}

    @torch.no_grad()
    def before_step(self, step, model):
        total = 0.0
        for name, p in model.named_parameters():
            if name in self.anchor:
                moved = p.to(wide(p)) - self.anchor[name].to(wide(p))
                pull = moved * self.fisher[name] if self.fisher else moved
                total = total + (pull * moved).sum()
                if p.grad is not None:
                    p.grad.add_(pull, alpha=2 * self.config.strength)
        return {"ewc_penalty": self.config.strength * whole(total).item()}

    def state(self):
        """The base and the Fisher stay where they are; what must not have changed is what they were made of."""
        return {}, {"fingerprint": self.fingerprint}

    def load_state(self, tensors, numbers):
        if numbers["fingerprint"] != self.fingerprint:
            raise ValueError(f"forget.ewc was made of {numbers['fingerprint']} and is made of {self.fingerprint}; use "
                             f"the same base, general text and settings to resume")


# ---- learning without forgetting

class LwF(Method):
    """Learning without forgetting (Li & Hoiem 2016, arXiv 1606.09282): (1 - alpha) CE + alpha T^2 KL(base || model)
    per target. On replay alone the other rows' cross-entropy stays whole. The KL is exactly 0 at step 0."""

    name = "lwf"

    def __init__(self, config: LwFConfig, forward, general, world: World, base=None, precision=None):
        self.config, self.forward, self.general, self.world, self.base = config, forward, set(general), world, base
        self.precision = precision
        self.divergence, self.targets = 0.0, 0

    def model_built(self, model):
        self.sharded = any(isinstance(p, DTensor) for p in model.parameters())
        if self.base is None:
            assert not self.sharded, "FSDP cannot copy a model: give LwF a base of its own"
            # what autocast would round in every product is kept rounded: half the memory, the same numbers
            rounded = {} if self.precision is None else {
                id(m.weight): torch.nn.Parameter(m.weight.detach().to(self.precision, copy=True))
                for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.head}
            teacher = copy.deepcopy(model, rounded).requires_grad_(False)
            self.base = lambda _: contextlib.nullcontext(teacher)
            gigabytes = sum(p.numel() * p.element_size() for p in teacher.parameters()) / 1e9
            self.notes = [f"lwf: the base stays in memory, {gigabytes:.2f} GB"]

    def loss_computed(self, model, batch, loss, metrics):
        hidden, everything = metrics["hidden"], range(len(batch.tokens))
        rows = [i for i in everything if self.config.tokens == "all" or int(batch.source[i]) in self.general]
        idle = not rows
        if idle and not self.sharded:
            return loss
        rows = rows or [0]                           # all ranks gather a sharded base, also for one without rows
        part = batch if len(rows) == len(everything) else row_of(batch, rows)
        labels = part.labels.to(hidden.device)
        with torch.no_grad(), self.base(model) as teacher:
            training = teacher.training
            base_hidden = self.forward(teacher.eval(), part)
            base_weight = teacher.head.weight.detach()
            teacher.train(training)
        if idle:
            return loss
        x, weight, alpha = hidden[rows] if part is not batch else hidden, model.head.weight, self.config.alpha
        divergence, _ = linear_kl(x, weight, base_hidden, base_weight, labels, self.config.temperature)
        self.divergence = self.divergence + divergence.detach()
        self.targets = self.targets + (labels != IGNORE).sum()
        if part is batch:
            return (1 - alpha) * loss + alpha * divergence
        return loss + alpha * (divergence - linear_cross_entropy(x, weight, labels)[0])

    def before_step(self, step, model):
        divergence, targets = self.world.sum([self.divergence, self.targets])
        self.divergence, self.targets = 0.0, 0
        return {"lwf_kl": divergence / max(1.0, targets)}


# ---- adaptive replay

class AdaptiveReplay(Method):
    """The replay share as a controlled quantity. The first evaluation is the baseline, the later ones each make a
    decision, a function of the evaluations so far: fed the same ones again, a new controller decides the same.

    budget: the worst rise of a general source's bits per byte, smoothed with its trend (Holt's double exponential
    smoothing, which does not lag behind a steady rise) and carried on for AHEAD evaluations; where that would pass
    epsilon the share rises, where it would stay under three quarters of it the share falls, and between it rests.
    degradation: the worst relative loss of a general source, each metric in its own direction.
    The schedule holds until a decision first wants a change; from then on the decisions do.
    """

    name = "adaptive"

    def __init__(self, config: AdaptiveConfig):
        self.config = config
        self.memory = {"baseline": None, "share": config.start, "acted": False, "level": 0.0, "trend": 0.0}

    def evaluated(self, step, texts):
        config, memory = self.config, self.memory
        now = {name: measure(numbers, config.policy) for name, numbers in texts.items() if numbers["role"] == "general"}
        if not now:
            raise ValueError("forget.adaptive decides by held-out general text, and no general source has any; pack "
                             "one with --heldout above 0")
        if memory["baseline"] is None:
            memory["baseline"] = {name: value for name, (_, value) in now.items()}
            return None
        lost = {name: degradation(metric, memory["baseline"][name], value, config.policy == "degradation")
                for name, (metric, value) in now.items()}
        source = max(lost, key=lost.get)
        decision = {"step": step, "policy": config.policy, "source": source, "metric": now[source][0],
                    "lost": lost[source], "before": memory["share"]}
        judged, high, low = lost[source], WORST, MILD
        if config.policy == "budget":
            new, before, trend = config.smoothing, memory["level"], memory["trend"]
            memory["level"] = new * judged + (1 - new) * (before + trend)
            memory["trend"] = new * (memory["level"] - before) + (1 - new) * trend
            judged = memory["level"] + AHEAD * memory["trend"]
            high, low = config.epsilon, SPARE * config.epsilon
            decision |= {"smoothed": memory["level"], "ahead": judged}
        change = RAISE if judged > high else -LOWER if judged < low else 0.0
        share = round(min(config.most, max(config.least, memory["share"] + change)), 9)
        where = {RAISE: f"above {high:g}", -LOWER: f"below {low:g}", 0.0: f"between {low:g} and {high:g}"}[change]
        what = f"{judged:.4f} is {where}"
        if change and share == memory["share"]:
            what += f", but replay is at its bound of {share:g}"
            what += "; add ewc, lwf or LoRA, or lower the learning rate" if change > 0 else ""
        memory["acted"] |= change != 0             # also where it stands at its bound: the schedule may stand elsewhere
        memory["share"] = share
        return decision | {"replay_share": share if memory["acted"] else None, "reason": what}

    def state(self):
        return {}, copy.deepcopy(self.memory)

    def load_state(self, tensors, numbers):
        self.memory = copy.deepcopy(numbers)


def measure(numbers: dict, policy: str) -> tuple[str, float]:
    """(metric, value) by which a source is judged."""
    metric = next((m for m in METRICS if numbers.get(m) is not None), None)
    if metric is None or (policy == "budget" and metric != "bits_per_byte"):
        raise ValueError(f"forget.adaptive.policy {policy} needs bits_per_byte of each general source, and an "
                         f"evaluation has {', '.join(numbers)}; use --forget.adaptive.policy degradation")
    return metric, numbers[metric]


def degradation(metric: str, before: float, after: float, relative: bool) -> float:
    """How much worse `after` is, whichever direction is better; relative to `before` or not."""
    worse = after - before if METRICS[metric] == "down" else before - after
    return worse / before if relative and before else worse


# ---- an average of the weights

class EMA(Method):
    """Exponential moving average of the weights in at least fp32, from the base on (against forgetting: arXiv
    2506.00288); `exported(model)` puts it in their place to evaluate or export."""

    name = "ema"

    def __init__(self, config: EMAConfig):
        self.decay = config.decay

    def model_built(self, model):
        self.mean = {name: p.detach().to(wide(p), copy=True) for name, p in trainable(model).items()}

    @torch.no_grad()
    def after_step(self, step, model, optimizer):
        for name, p in model.named_parameters():
            if name in self.mean:
                self.mean[name].lerp_(p.detach().to(self.mean[name].dtype), 1 - self.decay)

    @contextlib.contextmanager
    def exported(self, model):
        """The averages in the place of the weights; afterwards the weights are back, bit for bit."""
        parameters = {name: p for name, p in model.named_parameters() if name in self.mean}
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(self.mean[name])
            try:
                yield model
            finally:
                for name, p in parameters.items():
                    p.copy_(kept[name])

    def state(self):
        return {name: whole(value) for name, value in self.mean.items()}, {}

    def load_state(self, tensors, numbers):
        for name, value in self.mean.items():
            value.copy_(like(tensors[name], value))


COMMANDS = {"merge": "a model between base and result (merge.py)",
            "replay": "general text drawn from the base (replay.py)"}


def main() -> int:
    if sys.argv[1:2] == ["merge"]:
        from learn import merge as module
    elif sys.argv[1:2] == ["replay"]:
        from learn import self_replay as module
    else:
        parser = ArgumentParser(prog="forget.py", description=__doc__)
        commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
        for name, what in COMMANDS.items():          # those files have their options
            commands.add_parser(name, help=what)
        parser.parse_args()
        return 0
    p = ArgumentParser(prog=f"forget.py {sys.argv[1]}", description=module.__doc__)
    module.arguments(p)
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                   help="in which the model computes (default %(default)s)")
    p.add_argument("--device", default="auto", help="default: cuda where there is one, else cpu")
    p.add_argument("--json", metavar="FILE", help="write what is printed as data")
    args = p.parse_args(sys.argv[2:])
    result = module.command(args)
    if args.json:
        write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
