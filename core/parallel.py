"""Many devices: ranks from torchrun, DDP or FSDP2 by the model's own plan, and whole tensors out of sharded ones.

    torchrun --nproc-per-node 8 train.py recipes/llama2_7b_cpt.toml --parallel.strategy fsdp

CPU ranks talk over gloo, GPU ranks over NCCL. One process needs nothing of this and pays nothing for it.
"""

import contextlib
import ctypes
import os
import sys
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass
class ParallelConfig:
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every rank holds the whole model; fsdp: every rank holds a share (FSDP2, full shard)"""


@dataclass
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values) -> list[float]:
        """Sums of numbers over all ranks, in float64."""
        total = torch.tensor([float(v) for v in values], dtype=torch.float64,
                             device=self.device if self.device.type != "mps" else "cpu")
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def broadcast(self, value):
        """Rank 0's Python value on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def start(device: str = "auto") -> World:
    """This process's place among torchrun's, or a world of one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()
    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; known are auto, cpu, cuda and cuda:N") from None
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {device}, but torch sees no CUDA device; use --device cpu")
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return World(rank, size, torch.device(device))


def keep_freed_memory():
    """Let glibc keep what is freed instead of giving it back to the system and faulting it in anew: on a CPU, where
    each operation makes a large tensor, the page faults would cost more than the arithmetic."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)               # M_MMAP_MAX: no separate mapping for large blocks
            libc.mallopt(-1, 2**31 - 1)       # M_TRIM_THRESHOLD: keep the top of the heap


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: nn.Module, world: World, dtype: torch.dtype | None = None) -> nn.Module:
    """FSDP2 over the blocks of model.shard_plan() and the rest; to be done before the weights come.

    dtype: what the products are computed in (weights, gradients and their reduction stay fp32).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in [*model.shard_plan(), model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def replicate(model: nn.Module, world: World) -> nn.Module:
    """DDP; the model itself is `.module`."""
    ids = [world.device.index] if world.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True,
                                               broadcast_buffers=False)      # a quantised base is in buffers


@contextlib.contextmanager
def accumulate(model: nn.Module, last: bool):
    """Backward passes inside keep their gradients to themselves unless this is the step's last micro-batch."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    yield


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor on the CPU; every rank must call it for a sharded one."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def like(full: torch.Tensor, pattern: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`full`, which every rank holds, laid out over devices as `pattern` is; in its dtype unless another is given."""
    full = full.to(pattern.device, dtype or pattern.dtype)
    if isinstance(pattern, DTensor):
        return distribute_tensor(full, pattern.device_mesh, pattern.placements, src_data_rank=None)
    return full


def model_state(model: nn.Module, part: str = "") -> dict[str, torch.Tensor]:
    """{name: whole CPU tensor} of the parameters with `part` in their name (a tied one once); a collective call."""
    model = getattr(model, "module", model)
    if hasattr(model, "reshard"):             # an evaluation leaves FSDP's root gathered, in the products' dtype
        model.reshard()
    return {name: whole(p) for name, p in model.named_parameters() if part in name}


def optimizer_state(model: nn.Module, optimizer) -> dict[str, torch.Tensor]:
    """{"parameter name/state name": whole CPU tensor}; a collective call."""
    model = getattr(model, "module", model)
    return {f"{name}/{key}": whole(value) for name, p in model.named_parameters() if p in optimizer.state
            for key, value in optimizer.state[p].items()}


@torch.no_grad()
def load_model_state(model: nn.Module, state: dict[str, torch.Tensor], part: str = ""):
    for name, p in getattr(model, "module", model).named_parameters():
        if part in name:
            p.copy_(like(state[name], p))


@torch.no_grad()
def load_optimizer_state(model: nn.Module, optimizer, state: dict[str, torch.Tensor]):
    for name, p in getattr(model, "module", model).named_parameters():
        mine = {key.rpartition("/")[2]: value for key, value in state.items() if key.rpartition("/")[0] == name}
        if mine:
            optimizer.state[p] = {key: like(value, p, value.dtype) if value.ndim else value.to(p.device)
                                  for key, value in mine.items()}
