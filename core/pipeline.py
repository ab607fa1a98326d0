"""Pipeline parallel: each of P ranks holds some of the layers, and micro-batches go from one to the next (GPipe, arXiv
1811.06965; 1F1B and interleaved, 2104.04473), by the schedules of torch.distributed.pipelining.

    tokens -> [embedding, blocks] -- x [B, T, D] --> [blocks] -- x --> [blocks, norm, head] -> loss
                 stage 0, rank 0  <-- dx -----------  stage 1  <-- dx --  stage 2, rank 2

gpipe runs the forward passes of all micro-batches, then the backward passes. 1f1b begins each backward pass as soon as
it can, so that a rank keeps the activations of at most P micro-batches. interleaved gives each rank two stages, rank r
the stages r and P + r, which halves the time in which ranks wait for each other and doubles what they send.

Every rank reads the batches; the last one alone has their targets. Parameters have the names of the whole model. Where
the head is the embedding, both ends hold it: the gradients are summed, so that the copies stay equal, and the last
one's counts neither in the norm nor in a checkpoint.

B sequences of a micro-batch, T tokens that a rank has of each, D model width, P ranks.
"""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)
from torch.distributed.tensor import DTensor

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}
# The label of a token without a target, as in kernels/cross_entropy.py, which stands on a later floor.
IGNORE = -100


def cut_layers(costs: list[float], head: float, stages: int) -> list[range]:
    """The blocks of each of so many stages, so that the dearest stage is as cheap as can be, and the others about
    equal. costs: the operations of each block. head: those of the last stage beside its blocks; the embedding has none,
    it reads rows. Four blocks of 1 and a head of 2 make the stages 3 and 1 + head."""
    L, sums = len(costs), [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[n]: (dearest stage, sum of squares, ends) of the first n blocks in the stages so far.
    best = {0: (0.0, 0.0, [0])}
    for s in range(stages):
        extra, found = head if s == stages - 1 else 0.0, {}
        for end in range(s + 1, L - (stages - 1 - s) + 1):
            found[end] = min((max(most, own := sums[end] - sums[begin] + extra), squares + own**2, [*ends, end])
                             for begin, (most, squares, ends) in best.items() if begin < end)
        best = found
    ends = best[L][2]
    return [range(*pair) for pair in itertools.pairwise(ends)]


@dataclass
class Pipe:
    """This rank's place among the P ranks that hold a model one after the other."""

    group: dist.ProcessGroup
    rank: int
    ranks: int
    # How many stages each of them has.
    turns: int
    # The ranks at both ends of this rank's pipeline: the one with the first stage and the one with the last.
    ends: dist.ProcessGroup
    # Whether the last rank holds the embedding too, as its head.
    is_tied: bool = False
    # The type of the hidden states that the stages send.
    dtype: torch.dtype = torch.float32

    @property
    def stages(self) -> int:
        """How many stages all ranks have."""
        return self.ranks * self.turns

    @property
    def own(self) -> range:
        """The numbers of this rank's stages."""
        return range(self.rank, self.stages, self.ranks)

    @property
    def is_last(self) -> bool:
        return self.rank == self.ranks - 1

    def cut(self, batch):
        """The batch with its targets where they are scored, at the last stage, and elsewhere without."""
        counted = batch.labels != IGNORE
        labels = batch.labels if self.is_last else torch.full_like(batch.labels, IGNORE)
        return replace(batch, labels=labels, counted=counted)

    def is_copy(self, name: str) -> bool:
        """Whether a tensor of this rank, by its parameter's name, is the first rank's too, which counts and writes."""
        return self.is_last and "embed_tokens." in name

    def sum_copies(self, model: nn.Module):
        """The gradient of an embedding that is the head too is the sum of both ends'."""
        if not self.is_tied or 0 < self.rank < self.ranks - 1:
            return
        p = model.embed_tokens.weight
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad, group=self.ends)


def open_pipe(mesh, schedule: str) -> Pipe:
    """The place of this rank in a mesh [P]. A collective."""
    P = mesh.size()
    peers = dist.get_world_size() // P
    ends = [dist.new_group([first, first + (P - 1) * peers]) for first in range(peers)]
    turns = 2 if schedule == "interleaved" else 1
    return Pipe(mesh.get_group(), mesh.get_local_rank(), P, turns, ends[dist.get_rank() % peers])


class Stage(nn.Module):
    """Some blocks of a model, behind the embedding or before norm and head where they are the first or the last."""

    def __init__(self, model: nn.Module, blocks: list, is_first: bool, is_last: bool):
        super().__init__()
        self.blocks, self.is_first, self.is_last = nn.ModuleList(blocks), is_first, is_last
        # FSDP shards what is below a stage: the head counts to the last, and so does an embedding that is the head.
        self.embedding = model.embed_tokens if is_first or is_last else None
        self.norm, self.head = (model.norm, model.head) if is_last else (None, None)
        self.run_blocks = model.run_blocks

    def forward(self, x, carried=None, position_ids=None, doc_start=None, causal=True, cache=None,
                precision=contextlib.nullcontext, measure=None, counted=None):
        """x: tokens [B, T] in the first stage, else [B, T, D] -> [B, T, D]; the rest as in Model.forward.
        measure(stage, counted) -> what the stage adds to `carried`, which then goes along."""
        with precision():
            x = self.embedding(x) if self.is_first else x
            x = self.run_blocks(x, self.blocks, position_ids, doc_start, causal, cache)
            x = self.norm(x) if self.is_last else x
        if measure is None:
            return taking_gradients(x)
        own = measure(self, counted)
        return taking_gradients(x), taking_gradients(own if carried is None else carried + own)


def taking_gradients(x):
    """A stage sends a gradient to the one before, which must take it even if nothing trains there."""
    return x if x.requires_grad or not torch.is_grad_enabled() else x.requires_grad_()


def split(model: nn.Module, pipe: Pipe, costs: list[float], head: float):
    """Leave of a model on the meta device what this rank holds, as model.stages. Costs as in `cut_layers`."""
    model._whole, model.pipe = (copy.deepcopy(model),), pipe
    blocks, cuts = list(model.layers), cut_layers(costs, head, pipe.stages)
    pipe.is_tied = model.config.tie_word_embeddings
    # Removed and not renumbered, so that the others keep their names.
    own = {i for s in pipe.own for i in cuts[s]}
    for i in set(range(len(blocks))) - own:
        del model.layers._modules[str(i)]
    if pipe.rank and not (pipe.is_last and pipe.is_tied):
        model.embed_tokens = None
    if not pipe.is_last:
        model.norm = model.head = None
    model.stages = [Stage(model, [blocks[i] for i in cuts[s]], s == 0, s == pipe.stages - 1) for s in pipe.own]


class RemoteHead(nn.Module):
    """In the place of the head where another rank has it. `weight` scores a batch without targets, as nothing."""

    def __init__(self, pipe: Pipe, width: int, vocabulary: int, dtype: torch.dtype, device):
        super().__init__()
        self.pipe, self.vocabulary = pipe, vocabulary
        self.register_buffer("weight", torch.zeros(1, width, dtype=dtype, device=device), persistent=False)

    def forward(self, hidden):
        logits = hidden.new_empty(*hidden.shape[:-1], self.vocabulary, dtype=torch.float32)
        dist.broadcast(logits, group_src=self.pipe.ranks - 1, group=self.pipe.group)
        return logits


def share_logits(pipe: Pipe, module, args, logits):
    """The last stage's head, called by itself as in a generation, tells the other ranks."""
    dist.broadcast(logits.float().contiguous(), group_src=pipe.rank, group=pipe.group)


def connect(model: nn.Module, pipe: Pipe, dtype: torch.dtype, device):
    """Let all ranks of the pipeline together compute `model(tokens)` without gradients. dtype: of the residual
    stream."""
    pipe.dtype = dtype
    if pipe.is_last:
        model.head.register_forward_hook(functools.partial(share_logits, pipe))
    else:
        model.head = RemoteHead(pipe, model.config.hidden_size, model.config.vocab_size, dtype, device)
    model.forward = functools.partial(run_stages, model, pipe)


def run_stages(model, pipe: Pipe, tokens, position_ids=None, doc_start=None, causal=True, cache=None):
    """Model.forward by all ranks of the pipeline, one after the other: hidden states at the last one, elsewhere 0."""
    assert not torch.is_grad_enabled(), "gradients go through a schedule"
    B, T = tokens.shape
    for s, stage in zip(pipe.own, model.stages):
        x = tokens
        if s:
            x = torch.empty(B, T, model.config.hidden_size, dtype=pipe.dtype, device=tokens.device)
            dist.recv(x, group_src=(s - 1) % pipe.ranks, group=pipe.group)
        x = stage(x, None, position_ids, doc_start, causal, cache)
        if s < pipe.stages - 1:
            assert x.dtype == pipe.dtype, f"stage {s} computes in {x.dtype}, and {pipe.dtype} was expected"
            dist.send(x.contiguous(), group_dst=(s + 1) % pipe.ranks, group=pipe.group)
    if cache is not None:
        cache.length += T
    return x if pipe.is_last else torch.zeros_like(x)


class Pipeline:
    """Both passes of all micro-batches of a step, by a schedule."""

    def __init__(self, model: nn.Module, pipe: Pipe, schedule: str, shape: tuple, micro_batches: int, device,
                 hidden_states: Callable, precision: Callable, measure: Callable | None = None, width: int = 0,
                 begin: Callable | None = None):
        """shape: (B, T). hidden_states(model, batch), precision(): of the run. measure(stage, counted [B, T]) -> what
        adds up over the stages, [width]; the last one has the sum of each micro-batch as model.carried. begin(model,
        batches): what all stages compute together before the passes."""
        self.model, self.pipe, self.shape, self.width, self.begin = model, pipe, shape, width, begin
        self.hidden_states, self.precision, self.measure = hidden_states, precision, measure
        tokens = torch.empty(shape, dtype=torch.int32, device="meta")
        x = torch.empty(*shape, model.config.hidden_size, dtype=pipe.dtype, device="meta", requires_grad=True)
        between = (x, torch.empty(width, device="meta", requires_grad=True)) if measure else (x,)
        stages = [PipelineStage(stage, s, pipe.stages, device, (tokens,) if stage.is_first else between, between,
                                group=pipe.group) for s, stage in zip(pipe.own, model.stages)]
        # Fewer micro-batches than stages leave no order to choose.
        in_order = ScheduleLoopedBFS if pipe.turns > 1 else ScheduleGPipe
        kind = SCHEDULES[schedule] if micro_batches >= pipe.stages else in_order
        # The loss is divided by the targets of the step, so that gradients are not to be scaled.
        self.schedule = kind(stages if pipe.turns > 1 else stages[0], micro_batches, self.find_loss, scale_grads=False)

    def find_loss(self, hidden, number):
        batch = self.batches[int(number)]
        if self.measure:
            hidden, self.model.carried = hidden
        loss, metrics = self.score(batch, hidden)
        self.scored.append((batch.source, metrics))
        return loss * self.factor

    def run(self, batches: list, score: Callable, factor: float) -> list[tuple]:
        """[(batch.source, metrics)] of the batches on this rank; those without targets where the last stage is not.
        score(batch, hidden) -> (loss, metrics); gradients are of the losses times `factor`."""
        self.batches, self.score, self.factor, self.scored = batches, score, factor, []
        if self.begin:
            self.begin(self.model, batches)
        # What the objective calls the model with, of all micro-batches one after the other.
        tokens, *places, causal = zip(*(self.hidden_states(lambda *call: call, batch) for batch in batches))
        position_ids, doc_start = (None if parts[0] is None else torch.cat(parts) for parts in places)
        measured = {"counted": torch.cat([batch.counted for batch in batches]), "measure": self.measure} \
            if self.measure else {}
        self.schedule.step(*([] if self.pipe.rank else [torch.cat(tokens)]), target=torch.arange(len(batches)),
                           return_outputs=False, position_ids=position_ids, doc_start=doc_start, causal=causal[0],
                           precision=self.precision, **measured)
        self.pipe.sum_copies(self.model)
        if not self.pipe.is_last:
            with torch.no_grad():
                self.model.carried = torch.zeros(self.width, device=tokens[0].device)
                nothing = torch.zeros(*self.shape, self.model.config.hidden_size, device=tokens[0].device)
                self.scored = [(batch.source, score(batch, nothing)[1]) for batch in batches]
        # It holds the step's graph, which is not needed any more.
        self.model.carried = None
        return self.scored


def collect(state: dict[str, torch.Tensor], names: list[str], world) -> dict[str, torch.Tensor]:
    """On rank 0 the full CPU tensors of all stages, in the order of `names`; elsewhere those of this one. A
    collective."""
    ranks_of_stage = world.size // world.pipe.ranks
    own = {name: tensor for name, tensor in state.items() if not world.pipe.is_copy(name)}
    shapes = world.gather({name: (tensor.shape, tensor.dtype) for name, tensor in own.items()})
    for sender in range(ranks_of_stage, world.size, ranks_of_stage):
        for name, (shape, dtype) in shapes[sender].items():
            if world.rank == sender:
                dist.send(own[name].to(world.device), 0)
            elif world.main:
                tensor = torch.empty(shape, dtype=dtype, device=world.device)
                dist.recv(tensor, sender)
                state[name] = tensor.cpu()
    return {name: state[name] for name in names if name in state} if world.main else state
