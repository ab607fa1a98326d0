"""What the ranks hold of a model's tensors: full tensors and sharded ones, the one made of the other.

A tensor is sharded where it is a DTensor, of which each rank holds a part. With parallel.offload that part lies in the
host's memory, and FSDP brings it to the GPU that computes: there the device of a parameter says where it is kept, and
`device_of` where it is used.
"""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import empty as empty_distributed


def outermost(model: nn.Module) -> list[nn.Module]:
    """The modules that FSDP treats as a model each: the stages of a pipeline, or the model itself."""
    return getattr(model, "stages", None) or [model]


def is_sharded(model: nn.Module) -> bool:
    """Whether no rank holds the whole model."""
    return any(isinstance(module, FSDPModule) for module in outermost(model)) or outermost(model) != [model]


def device_of(held: nn.Module | torch.Tensor) -> torch.device:
    """Where a module, or what a tensor belongs to, computes."""
    tensor = next(held.parameters()) if isinstance(held, nn.Module) else held
    kind = tensor.device_mesh.device_type if isinstance(tensor, DTensor) else tensor.device.type
    if kind == tensor.device.type:
        return tensor.device
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor on the CPU, without a graph. A collective for a sharded one."""
    return gather(tensor.detach()).cpu()


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, where its model computes. A collective for a sharded one."""
    return tensor.to(device_of(tensor)).full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(full: torch.Tensor, pattern: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`full`, which every rank has, with the device and sharding of `pattern`, and its dtype unless one is given."""
    full = full.to(device_of(pattern), dtype or pattern.dtype)
    if isinstance(pattern, DTensor):
        # What is made of a mesh lies on the mesh's devices; the shard alone goes to where it is kept.
        return distribute_tensor(full, pattern.device_mesh, pattern.placements, src_data_rank=None).to(pattern.device)
    return full


def make_empty_like(shape, dtype: torch.dtype, pattern: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor with the device of `pattern` and, unless it is a scalar, its sharding."""
    if isinstance(pattern, DTensor) and shape:
        return empty_distributed(shape, dtype=dtype, device_mesh=pattern.device_mesh,
                                 placements=pattern.placements).to(pattern.device)
    return torch.empty(shape, dtype=dtype, device=pattern.device)


def find_not_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    """The name of the first tensor with a NaN or an infinity in what this rank holds of it."""
    own = {name: local(tensor).detach() for name, tensor in tensors.items()}
    own = {name: tensor for name, tensor in own.items() if tensor.is_floating_point() and tensor.numel()}
    # A sum is finite only where all elements are, and takes half of the time that extremes take: a save holds up the
    # training for as long. Where a sum overflows, or is not finite, the extremes decide. No mask is made.
    sums = [torch.stack([tensor.sum().double() for tensor in own.values() if tensor.device == device])
            for device in {tensor.device for tensor in own.values()}]
    if all(each.isfinite().all() for each in sums):
        return None
    return next((name for name, tensor in own.items() if not torch.stack(torch.aminmax(tensor)).isfinite().all()), None)


def model_state(model: nn.Module, part: str = "", form=full_tensor) -> dict[str, torch.Tensor]:
    """{name: full CPU tensor} of the parameters with `part` in their name, a tied one once. A collective.

    form: what is made of a parameter, e.g. torch.Tensor.detach: itself, sharded as it is, and no collective."""
    for module in outermost(model):
        if isinstance(module, FSDPModule):
            # An evaluation leaves FSDP's root module gathered, in the dtype of the matmuls.
            module.reshard()
    return {name: form(p) for name, p in model.named_parameters() if part in name}


def optimizer_state(model: nn.Module, optimizer, form=full_tensor) -> dict[str, torch.Tensor]:
    """{"parameter name/state name": full CPU tensor}. A collective; form: as in `model_state`."""
    return {f"{name}/{key}": form(value) for name, p in model.named_parameters() if p in optimizer.state
            for key, value in optimizer.state[p].items()}


@torch.no_grad()
def load_model_state(model: nn.Module, state: dict[str, torch.Tensor], part: str = ""):
    """Copy what `model_state` returned into the parameters, however they are sharded now."""
    for name, p in model.named_parameters():
        if part in name:
            p.copy_(distribute_like(state[name], p))


@torch.no_grad()
def load_optimizer_state(model: nn.Module, optimizer, state: dict[str, torch.Tensor]):
    """Give the optimizer what `optimizer_state` returned, however the parameters are sharded now."""
    parameters = dict(model.named_parameters())
    for key, value in state.items():
        name, _, kind = key.rpartition("/")
        p = parameters[name]
        optimizer.state[p][kind] = distribute_like(value, p, value.dtype) if value.ndim else value.to(p.device)
