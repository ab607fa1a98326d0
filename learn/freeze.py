"""Freezing: some parameters keep the base's values for a while, or throughout.

A model of 4 blocks, schedule progressive, blocks = 1, thaw_ratio = 0.5, 8 steps: in step s, 1 + floor(3 s / 4) blocks
train, at most 4. The blocks that train are 1 1 2 3 4 4 4 4; 2 are layers.2 and layers.3.
"""

import fnmatch
import re
from dataclasses import dataclass, field
from typing import Literal

from core.config import setting
from core.errors import UserError, nearest
from learn.method import Method, trainable_parameters


@dataclass
class FreezeConfig:
    schedule: Literal["none", "top", "progressive", "stages"] = "none"
    """top: only the top blocks, the final norm and the head train. progressive: so at first, then the blocks thaw from
    the top down. stages: as freeze.stages says"""
    blocks: int = setting(1, at_least=0, at_most=10**4)
    """top, progressive: number of blocks that train from the first step on"""
    thaw_ratio: float = setting(0.5, above=0, at_most=1)
    """progressive: share of the run after which every block trains"""
    embeddings: bool = False
    """top, progressive: the embeddings train too, and with them a head that is tied to them"""
    stages: list[str] = field(default_factory=list)
    """stages: each is "PROGRESS NAME NAME ...": from this share of the run on, these parameters train and no others. A
    NAME is the path of a module or parameter; * stands for one part of it. Two stages: "0 layers.3 norm head" and
    "0.5 layers.*.mlp norm head" """

    def __post_init__(self):
        if bool(self.stages) != (self.schedule == "stages"):
            raise UserError("forget.freeze.stages goes with forget.freeze.schedule stages, which needs at least one, "
                             'e.g. "0 layers.3 norm head"')
        starts = [start for start, _ in self.parse_stages()]
        if starts and (starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= 1):
            raise UserError(f"forget.freeze.stages begin at {', '.join(f'{s:g}' for s in starts)}, but must begin at "
                            f"0, rise and stay below 1, the end of the run")

    def parse_stages(self) -> list[tuple[float, list[str]]]:
        """The stages as [(progress, patterns)]: "0.5 norm head" is (0.5, ["norm", "head"])."""
        try:
            return [(float(start), patterns) for start, *patterns in map(str.split, self.stages)]
        except ValueError:
            raise UserError(f"forget.freeze.stages are {self.stages}, but each must begin with the share of the run it "
                            f"starts at, e.g. 0.5") from None


class Freeze(Method):
    """Which parameters train is a function of the step. A frozen one keeps every bit and holds no optimizer state.

    A parameter that trains at any time keeps requires_grad until the first step, because the optimizer and DDP take
    only those that have it when they are made. Under DDP it keeps it throughout: DDP waits for every gradient it knew
    at the start, so the gradients of frozen parameters are computed and then dropped.
    """

    def model_built(self, model):
        learning = self.learning
        if learning.adapters:
            raise UserError("forget.freeze chooses which of the base's weights train, and with adapters none does; "
                            "put adapters on fewer modules instead")
        self.steps, self.stages = learning.steps, self.config.parse_stages()
        self.replicated = learning.world.size > 1 and not learning.sharded
        # Of a model in parts the whole is looked at: blocks are counted from its top.
        whole = getattr(model, "whole", model)
        names, parameters = list(trainable_parameters(whole)), dict(whole.named_parameters())
        self.blocks = 1 + max(map(block_number, parameters), default=-1)
        if self.config.schedule != "stages" and self.config.blocks > self.blocks:
            raise UserError(f"forget.freeze.blocks is {self.config.blocks}, but the model has {self.blocks} blocks "
                            f"named layers.N; lower it, or name what trains with --forget.freeze.schedule stages")
        for pattern in (pattern for _, patterns in self.stages for pattern in patterns):
            if not any(matches(name, pattern) for name in names):
                modules = {name.rsplit(".", i)[0] for name in names for i in range(1, name.count(".") + 1)}
                raise UserError(f"forget.freeze.stages names {pattern!r}, which fits no parameter"
                                f"{nearest(pattern, modules)}")
        stages = range(self.stage_at(0), self.stage_at(self.steps - 1) + 1)
        self.sets = {stage: {name for name in names if self.trains(name, stage)} for stage in stages}
        if not all(self.sets.values()):
            raise UserError("forget.freeze leaves nothing to train at some time; name at least one part in each stage, "
                            "or leave out freezing")
        self.ever = set().union(*self.sets.values())
        for name, p in [*parameters.items(), *model.named_parameters()]:
            p.requires_grad_(name in self.ever)

        self.counts = {stage: sum(parameters[name].numel() for name in names) for stage, names in self.sets.items()}
        counts = list(self.counts.values())
        total = sum(p.numel() for p in parameters.values())
        self.notes = [f"freeze ({self.config.schedule}): {counts[0]:,} of {total:,} parameters train at first, "
                      f"{counts[-1]:,} at the end, in {len(counts)} stages"]
        # PyTorch names a shared parameter once, by its first place.
        if "embed_tokens.weight" in parameters and "head.weight" not in parameters:
            self.notes.append("freeze: the head is tied to the embeddings")
            if "embed_tokens.weight" not in self.ever:
                self.notes[-1] += ", which are frozen, so it does not train: --forget.freeze.embeddings True lets both"
        if self.replicated:
            self.notes.append("freeze: under DDP frozen weights save their optimizer state, but their gradients are "
                              "still computed; --parallel.strategy fsdp saves both")

    def stage_at(self, step: int) -> int:
        """Of a step: an index into freeze.stages, or with the other schedules the number of blocks that train."""
        config, progress = self.config, step / self.steps
        if config.schedule == "stages":
            return sum(start <= progress for start, _ in self.stages) - 1
        thawed = min(1.0, progress / config.thaw_ratio) if config.schedule == "progressive" else 0.0
        # Without the 1e-9 a product that is 2.9999... by rounding would count as 2.
        return config.blocks + int((self.blocks - config.blocks) * thawed + 1e-9)

    def trains(self, name: str, stage: int) -> bool:
        if self.config.schedule == "stages":
            return any(matches(name, pattern) for pattern in self.stages[stage][1])
        if (block := block_number(name)) >= 0:
            return block >= self.blocks - stage
        return self.config.embeddings or not matches(name, "embed_tokens")

    def apply(self, step: int, model, optimizer=None):
        """Sets what the step `step` trains; frozen parameters lose their gradient and their optimizer state."""
        now = self.sets[self.stage_at(min(step, self.steps - 1))]
        for name, p in model.named_parameters():
            if name not in self.ever:
                continue
            if name not in now:
                p.grad = None
                if optimizer is not None:
                    optimizer.state.pop(p, None)
            if not self.replicated:
                p.requires_grad_(name in now)

    def before_step(self, step, model):
        # At the first step, also the first after a resume, parameters of all stages have gradients.
        self.apply(step, model)
        return {"trainable_parameters": self.counts[self.stage_at(step)]}

    def after_step(self, step, model, optimizer, moved=True):
        self.apply(step + 1, model, optimizer)


def block_number(name: str) -> int:
    """3 for layers.3.mlp.up_proj.weight, -1 for a parameter outside all blocks."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def matches(name: str, pattern: str) -> bool:
    """Whether the path `name` begins with `pattern`, part by part: layers.1 matches layers.1.mlp, not layers.10."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(wanted) <= len(parts) and all(map(fnmatch.fnmatchcase, parts, wanted))
