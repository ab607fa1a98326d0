"""Many devices: ranks from torchrun, and DDP or FSDP2 by the model's own plan.

    torchrun --nproc-per-node 8 train.py recipes/llama2_7b_cpt.toml --parallel.strategy fsdp

CPU ranks exchange values over gloo, GPU ranks over NCCL. A single process joins no group of ranks.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from core.config import setting
from core.context_parallel import SharedAttention, SharedSequences, exchanges_keys
from core.devices import keep_freed_memory, pick_device
from core.errors import UserError
from core.expert_parallel import is_of_parted, shard_experts
from core.groups import connecting
from core.mesh import find_sharers, forget_ranks, lay_ranks, make_mesh
from core.offload import choose_backend, choose_policy
from core.pace import Pace
from core.pipeline import Pipe, open_pipe
from core.sharding import is_sharded, local, outermost
from core.signals import REASONS, closed_output, note_stops, stopped_by
from core.tensor_parallel import SharedMatmuls, is_shared, measure_norm, split_layers
from core.watch import Watch


@dataclass
class ParallelConfig:
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every rank holds the full model; fsdp: every rank holds a share of each tensor (FSDP2, full shard)"""
    replicas: int = setting(1, at_least=1)
    """fsdp: how many groups of ranks hold the model, each group once (HSDP): with as many as there are nodes, weights
    are gathered within a node, and gradients alone cross the network"""
    reshard: bool = True
    """fsdp: free a block's gathered weights after its forward pass; False: keep them until its backward pass (as
    ZeRO-2), which saves gathering them again and takes the memory of the gathered model"""
    offload: bool = False
    """fsdp, also of one GPU: keep weights, gradients and optimizer state in the host's memory, whose processor then
    does the optimizer's step: a GPU holds activations and two blocks, and each pass waits for the weights"""
    reduce_each: bool = False
    """fsdp: sum gradients over the ranks after each micro-batch, so that a rank keeps its share of them, in the type of
    the weights; False: after the last one, which sends less, and until then a rank keeps those of all weights that it
    computes, in fp32"""
    context: int = setting(1, at_least=1)
    """C: how many ranks share each sequence (context parallel), data.context / C tokens each: activations of long
    sequences take 1 / C of the memory. Best within one node"""
    exchange: Literal["auto", "heads", "keys"] = "auto"
    """context: what the ranks exchange for attention: tokens for heads, which C must divide; or all keys and values,
    which is less where key-value heads are few; auto: what is less to send and fits"""
    tensor: int = setting(1, at_least=1)
    """t: fsdp: how many ranks share each matmul of a block (tensor parallel, with sequence parallel norms and loss);
    the rest of the ranks shard the weights. Within one node, and only where FSDP alone needs too many ranks"""
    pipeline: int = setting(1, at_least=1)
    """P: how many ranks hold the layers one after the other, a part each (pipeline parallel); the rest of the ranks
    shard each part (fsdp). For models that outgrow a node"""
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    """pipeline: in which order micro-batches pass; gpipe keeps the activations of all, 1f1b those of P at most;
    interleaved has two parts on each rank, which wait half as long for each other and send twice as much"""
    experts: int = setting(1, at_least=1)
    """N: fsdp: how many ranks share the experts of a mixture of experts, E / N each, to which tokens are sent (expert
    parallel); the rest is sharded over all ranks. N divides the experts, and is best within one node"""
    step_timeout: float = setting(120.0, at_least=1, below=math.inf)
    """seconds (or five times the slowest step so far, if longer) that a step may take: then the rank that hangs is
    named, and all end"""
    timeout: float = setting(7200.0, at_least=1, at_most=10**6)
    """the same for the build, the first step, evaluations, saves and the export"""

    def shards(self, ranks: int) -> bool:
        """Whether FSDP lays the model out over so many ranks."""
        return self.strategy == "fsdp" and (ranks > 1 or self.offload)

    def refuse_layout(self, ranks: int):
        """UserError where the ranks cannot be laid out as the settings say."""
        for name in ("context", "tensor", "pipeline", "experts"):
            if ranks % getattr(self, name):
                raise UserError(f"parallel.{name} {getattr(self, name)} does not divide the {ranks} ranks")
        if ranks % (sharing := self.context * self.tensor * self.pipeline):
            factors = [f"parallel.{name} {size}" for name in ("context", "tensor", "pipeline")
                       if (size := getattr(self, name)) > 1]
            raise UserError(f"{' times '.join(factors)} does not divide the {ranks} ranks")
        if self.pipeline > 1 and self.reduce_each:
            raise UserError("parallel.pipeline sums gradients after its last micro-batch; leave parallel.reduce_each "
                            "out")
        if self.pipeline > 1 and self.strategy != "fsdp" and self.pipeline < ranks:
            raise UserError(f"parallel.pipeline {self.pipeline} leaves {ranks // self.pipeline} ranks for each part of "
                            f"the layers; set --parallel.strategy fsdp, which shards the part over them")
        changed = [name for name in ("replicas", "reshard", "offload", "reduce_each", "tensor", "experts")
                   if getattr(self, name) != getattr(ALONE, name)]
        if self.strategy != "fsdp" and changed:
            raise UserError(f"parallel.{changed[0]} is about sharded weights; set --parallel.strategy fsdp, or leave "
                            f"it out")
        for name, other in (("exchange", "context"), ("schedule", "pipeline")):
            if getattr(self, name) != getattr(ALONE, name) and getattr(self, other) == 1:
                raise UserError(f"parallel.{name} does nothing without parallel.{other}; leave it out")
        others = [name for name in ("context", "tensor", "replicas", "pipeline") if getattr(self, name) > 1]
        if self.experts > 1 and others:
            raise UserError(f"parallel.experts does not go with parallel.{others[0]} yet; leave one of them out")
        # Those that share matmuls or sequences are within one group, and a group's stages are one model.
        most = ranks // sharing
        if most % self.replicas or (self.replicas > 1 and ranks == self.replicas):
            remedy = f"take a divisor of {most}{' below it' if most == ranks else ''}" if most > 1 else \
                "leave it out, or lower what the ranks of a group share"
            raise UserError(f"parallel.replicas {self.replicas} does not part {ranks} ranks into groups of "
                            f"{f'{sharing} ranks each' if sharing > 1 else 'two or more'}; {remedy}")


ALONE = ParallelConfig()


@dataclass
class World:
    """This process's place among the ranks."""

    rank: int
    size: int
    device: torch.device
    # The signals that this rank has noted; None outside `note_stops`.
    received: list[int] | None = None
    # The signal that ends the run on all ranks, by the last sum, or 0.
    asked: int = 0
    # Whether this rank knows of a save that failed in the background, and whether any rank does, by the last sum.
    has_failed: Callable[[], bool] = lambda: False
    failed: bool = False
    # Over which the ranks exchange Python values; None: the group that all of torchrun's ranks are in.
    group: dist.ProcessGroup | None = None
    # None where there is one rank.
    watch: Watch | None = None
    # Whether gradients are kept in the host's memory.
    offload: bool = False
    # None where each rank has its own sequences.
    sequences: SharedSequences | None = None
    # None where each rank computes whole matmuls.
    matmuls: SharedMatmuls | None = None
    # None where each rank has all layers.
    pipe: Pipe | None = None
    # Whether FSDP sums gradients over the ranks after each micro-batch of a step.
    reduces_each: bool = False
    # What this rank takes by itself.
    pace: Pace = field(default_factory=Pace)

    @property
    def main(self) -> bool:
        """Rank 0, which writes the files and speaks to the user."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """(k, n): of a global batch this rank computes, alone or with others, the k-th of n parts."""
        rank, ranks = self.peers
        return rank // self.sharing_ranks, ranks // self.sharing_ranks

    @property
    def sharers(self) -> list[SharedSequences]:
        """The groups in which ranks have parts of the same sequences, the outer one first."""
        return [group for group in (self.sequences, self.matmuls) if group]

    @property
    def sharing_ranks(self) -> int:
        """How many ranks have a part of each sequence."""
        return math.prod(group.ranks for group in self.sharers)

    @property
    def peers(self) -> tuple[int, int]:
        """(k, n): the k-th of the n ranks that hold the same layers."""
        ranks = self.size // self.pipe.ranks if self.pipe else self.size
        return self.rank % ranks, ranks

    def sum(self, values) -> list[float]:
        """Each of the values summed over all ranks, in float64. A collective: all ranks call it together.

        Requests to stop and failures of saves travel with every sum, so that all ranks know of them at the same point
        and for nothing more.
        """
        closed = 0 if self.received is None else closed_output()
        requests = [(self.received or []).count(number) + (number == closed) for number in REASONS]
        total = [float(value) for value in (*values, self.has_failed(), *requests)]
        if self.size > 1:
            total = torch.tensor(total, dtype=torch.float64, device=self.device)
            dist.all_reduce(total)
            total = total.tolist()
            self.pace.leave_exchange()
        *values, failed = total[:-len(REASONS)]
        requests, self.failed = total[-len(REASONS):], failed > 0
        self.asked = next((number for number, count in zip(REASONS, requests) if count), 0)
        return values

    def share_sequences(self, config: ParallelConfig):
        """From now on ranks share sequences, matmuls and layers as the settings say. A collective: all groups of ranks
        are made here, where they have just met."""
        self.offload = config.offload
        self.reduces_each = config.reduce_each
        with connecting(self.watch):
            sizes = config.replicas, config.context, config.tensor, config.pipeline, config.experts
            mesh = lay_ranks(self.device.type, self.size, config) if max(sizes) > 1 else None
            self.pipe = open_pipe(mesh["pipe"], config.schedule) if config.pipeline > 1 else None
            C, t = config.context, config.tensor
            self.sequences = SharedSequences.of(find_sharers(mesh, C)) if C > 1 else None
            self.matmuls = SharedMatmuls.of(mesh["tensor"]) if t > 1 else None

    @property
    def averaged(self) -> int:
        """Over how many ranks DDP or FSDP averages a gradient."""
        return self.team[1]

    @property
    def team(self) -> tuple[int, int]:
        """(k, n): this rank computes a pass of full sequences in the k-th of n groups, with those ranks that have the
        other stages and the other parts of its matmuls."""
        (rank, ranks), t = self.peers, self.matmuls.ranks if self.matmuls else 1
        return rank // t, ranks // t

    @property
    def dropout_key(self) -> int:
        """Ranks that share matmuls drop alike, as their inputs are alike; all others by themselves. Of a layer whose
        inputs are parted, such as o_proj, each of them drops in its own part what the others drop in theirs."""
        return self.rank // (self.matmuls.ranks if self.matmuls else 1)

    @contextlib.contextmanager
    def sharing(self):
        """A context in which the ranks that share sequences have their tokens of them."""
        with contextlib.ExitStack() as stack:
            for group in self.sharers:
                stack.enter_context(group.shared())
            yield

    def cut(self, batch):
        """This rank's tokens of a corrupted batch, with those targets that it scores."""
        for group in self.sharers:
            batch = group.cut(batch)
        return self.pipe.cut(batch) if self.pipe else batch

    def cut_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of x [B, T]."""
        for group in self.sharers:
            x = group.cut_tokens(x)
        return x

    @contextlib.contextmanager
    def note_stops(self):
        """A context in which a signal, or an output that is closed, is noted; `check` and `poll` raise Stopped."""
        try:
            with note_stops() as self.received:
                yield
            if self.received and not self.asked:
                # It came after the last point at which the ranks agreed.
                raise stopped_by(self.received[0])
        finally:
            self.received, self.asked = None, 0

    def check(self):
        """Raise Stopped where any rank was asked to stop before the last sum: on all ranks at the same point."""
        if self.size == 1:
            # Nobody has to agree, so that it need not wait for the next sum.
            self.sum([])
        if self.asked:
            raise stopped_by(self.asked)

    def enter(self, what: str, is_step: bool = False):
        """What this rank is busy with from now on, for the line that names a rank which hangs."""
        if is_step:
            self.pace.begin_step()
        if self.watch:
            self.watch.enter(what, is_step)

    def barrier(self):
        """Return when every rank has come here; `check` then knows of what happened meanwhile. A collective."""
        self.sum([])

    def broadcast(self, value):
        """Rank 0's Python value, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device, group=self.group)
            self.pace.leave_exchange()
        return box[0]

    def gather(self, value) -> list:
        """Each rank's Python value, on every rank."""
        box = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(box, value, group=self.group)
            self.pace.leave_exchange()
        return box

    def apart(self) -> "World":
        """The same ranks with a group of their own on the CPU, over which a background thread may exchange values while
        the training uses the other. A collective."""
        if self.size == 1:
            return self
        # All ranks are here, so that one which does not connect has died. What a save waits for is other ranks' disks.
        self.barrier()
        with connecting(self.watch):
            group = dist.new_group(backend="gloo")
        return World(self.rank, self.size, torch.device("cpu"), group=group)


# ---- processes

@contextlib.contextmanager
def said_once():
    """A context of checks that all ranks make before they meet: rank 0 alone says what is wrong."""
    try:
        yield
    except UserError:
        if int(os.environ.get("RANK", 0)):
            raise SystemExit(2) from None
        raise


def count_ranks() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def together(device: str, config: ParallelConfig):
    """This process's place among torchrun's ranks. Where one rank fails, that one says why, and all end."""
    world = start(device, config.timeout, config.offload)
    if world.size > 1:
        world.watch = Watch(world.rank, world.size, config.step_timeout, config.timeout)
    try:
        world.share_sequences(config)
        yield world
        # No rank leaves while another still waits for it.
        world.barrier()
    except BaseException as error:
        if world.watch:
            world.watch.fail(error)
        raise
    if world.watch:
        world.watch.close()
    stop()


def start(device: str = "auto", timeout: float = 1800, offload: bool = False) -> World:
    """This process's place among torchrun's ranks, or a world of one. timeout: seconds that a collective may take.
    offload: as in the settings; then one rank has a group too."""
    device = pick_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    rank, size = int(os.environ.get("RANK", 0)), count_ranks()
    if (size > 1 or offload) and not dist.is_initialized():
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}
        # Longer than the watch waits, which can say what happened.
        dist.init_process_group(choose_backend(offload, device), timeout=timedelta(seconds=timeout + 60), **alone)
    return World(rank, size, device)


def stop():
    """Leave the group of ranks, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    forget_ranks()


# ---- strategies

def shard(model: nn.Module, world: World, config: ParallelConfig = ALONE, dtype: torch.dtype | None = None):
    """FSDP2 over each block of model.shard_plan() and over the rest. To be called before the weights are loaded.

    dtype: of the weights gathered for the matmuls; None: fp32. Stored weights, gradients and reduction stay fp32.
    """
    mesh = lay_ranks(world.device.type, world.size, config)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    offload = choose_policy(config.offload, world.device)
    if config.experts > 1:
        shard_experts(model, mesh, mp_policy=policy, reshard_after_forward=config.reshard, offload_policy=offload)
        mesh = make_mesh(world.device.type, world.size)
    mesh = mesh[tuple(name for name in mesh.mesh_dim_names if name in ("replicate", "shard"))]
    for module in [*model.shard_plan(), *outermost(model)]:
        # The outermost module's own weights, embeddings and head, are needed until the backward pass begins.
        reshard = config.reshard and module not in outermost(model)
        # What a stage takes is in the right types already.
        own = policy if module is model or module not in outermost(model) else \
            replace(policy, cast_forward_inputs=False)
        fully_shard(module, mesh=mesh, mp_policy=own, reshard_after_forward=reshard, offload_policy=offload)
    return model


def is_first_copy(tensor: torch.Tensor, world: World) -> bool:
    """Whether what this rank holds of a sharded tensor is held by none of the ranks before it: HSDP has copies, and
    ranks that share matmuls hold alike what is not part of one."""
    if world.matmuls and world.matmuls.rank and not is_shared(tensor):
        return False
    return all(place == 0 for place, placement in zip(tensor.device_mesh.get_coordinate(), tensor.placements)
               if placement.is_replicate())


def replicate(model: nn.Module, world: World) -> nn.Module:
    """DDP around the model, which is then its `.module`."""
    ids = [world.device.index] if world.device.type == "cuda" else None
    # Buffers, such as the levels of a base in few bits, never change: they need not be broadcast at each step.
    with warnings.catch_warnings():
        # What torch 2.13 has in the place of this argument would broadcast them once.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False)


def share_blocks(model: nn.Module, world: World, config: ParallelConfig):
    """Let the model's blocks share matmuls, or attend over sequences that ranks share, where they do. To be called on
    the meta device, before `shard`."""
    if config.tensor > 1:
        split_layers(model, lay_ranks(world.device.type, world.size, config)["tensor"], world.matmuls)
    H, K = (heads // config.tensor for heads in (model.config.num_attention_heads, model.config.num_key_value_heads))
    for attention in model.attention_plan() if config.context > 1 else ():
        attention.attend = SharedAttention(attention.attend, world.sequences,
                                           exchanges_keys(config.exchange, config.context, H, K))


def clip_gradients(model: nn.Module, limit: float) -> torch.Tensor:
    """Scale the gradients so that their global norm is at most `limit`; 0 leaves them. Returns the norm they had, a
    scalar that stays on the device. A collective for sharded parameters."""
    named = {name: p for name, p in model.named_parameters() if p.grad is not None}
    parameters, pipe = list(named.values()), getattr(model, "pipe", None)
    shared = next(filter(is_shared, parameters), None)
    # torch.nn.utils.clip_grad_norm_ would sum the squares of these in their own type.
    is_rough = any(p.grad.dtype in (torch.bfloat16, torch.float16) for p in parameters)
    if shared is not None or pipe or is_rough or any(map(is_of_parted, parameters)):
        counted = [p for name, p in named.items() if not pipe or not pipe.is_copy(name)]
        t = 1 if shared is None else shared.device_mesh["tensor"].size()
        norm = measure_norm(counted, t, is_sharded(model), next(local(p).device for p in model.parameters()))
        for name, p in named.items():
            if pipe and pipe.is_copy(name):
                # The copy adds nothing to the norm, but a NaN or an infinity in it must show.
                norm = norm + 0 * local(p.grad).sum()
        for p in parameters if limit else ():
            # As torch.nn.utils.clip_grad_norm_ does.
            local(p.grad).mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        return norm
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
