"""Tensor parallel with sequence parallel: the ranks of a group share each matmul of a block (Megatron, arXiv 1909.08053
and 2205.05198).

    x [B, T / t, D] -- gather --> [B, T, D]   layers of columns, H / t heads or F / t of the width, layers of rows
                                  -> [B, T, D], a partial sum   -- sum and scatter -->   [B, T / t, D]

A layer of `columns` holds its share of the outputs, a layer of `rows` its share of the inputs. Norms, residual stream,
embedding, head and loss are computed per token, and so each rank has T / t tokens of the sequence there; their weights
are the same on all ranks, and their gradients are summed over them. FSDP shards both kinds over the other ranks.

B sequences, T tokens, D model width, H heads, F MLP width, t ranks that share each matmul.
"""

import functools
import logging
import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from core.context_parallel import SharedSequences
from core.errors import UserError
from core.groups import all_gather, reduce_scatter


class Gather(torch.autograd.Function):
    """x [B, T / t, D] -> [B, T, D], the tokens of all ranks; with `back`, y [B, T, D], a partial sum on each rank ->
    [B, T / t, D] of the sum. Each is the gradient of the other."""

    @staticmethod
    def forward(ctx, x, group, back):
        ctx.group, ctx.back = group, back
        return scatter_sum(x, group) if back else gather_tokens(x, group)

    @staticmethod
    def backward(ctx, dy):
        return gather_tokens(dy, ctx.group) if ctx.back else scatter_sum(dy, ctx.group), None, None


def gather_tokens(x, group):
    t = dist.get_world_size(group)
    parts = x.new_empty(t * len(x), *x.shape[1:])
    all_gather(parts, x.contiguous(), group=group)
    return parts.unflatten(0, (t, -1)).movedim(0, 1).flatten(1, 2)


def scatter_sum(y, group):
    t = dist.get_world_size(group)
    # [t, B, T / t, D]: part r goes to rank r.
    parts = y.unflatten(1, (t, -1)).movedim(1, 0).contiguous()
    found = torch.empty_like(parts[0])
    reduce_scatter(found, parts.flatten(0, 1), group=group)
    return found


class SharedMatmuls(SharedSequences):
    """The ranks that share matmuls share the sequences too: between the matmuls each has T / t of the tokens. Positions
    and the starts of documents are those of all tokens, because attention sees them all."""

    parted = ("tokens", "labels")

    def cut_tokens(self, x):
        """[B, T, ...] -> [B, T / t, ...], neighbouring tokens"""
        return x.chunk(self.ranks, dim=1)[self.rank]

    def join_tokens(self, x):
        """x [B, T / t] -> [B, T], the tokens that a block's modules see"""
        return gather_tokens(x, self.group)

    def enter(self, module, args):
        """Before attention or MLP. While nothing is shared, as when text is generated, x holds all tokens already."""
        return (Gather.apply(args[0], self.group, False), *args[1:]) if self.is_on else None

    def leave(self, module, args, y):
        if self.is_on:
            return Gather.apply(y, self.group, True)
        assert not torch.is_grad_enabled(), "outside `shared` no gradients are summed"
        dist.all_reduce(y := y.contiguous(), group=self.group)
        return y


def split_layers(model: nn.Module, mesh, matmuls: SharedMatmuls):
    """Let the ranks of `mesh` share the matmuls that model.tensor_plan() names. To be called on the meta device, before
    FSDP: parameters become DTensors of which this rank holds a share."""
    # Each rank would say that what is sharded twice is gathered by two operations.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    for module, columns, rows in model.tensor_plan():
        for names, dims in ((columns, COLUMNS), (rows, ROWS)):
            for layer in map(module.get_submodule, names):
                split_layer(layer, dims, mesh)
        module.register_forward_pre_hook(matmuls.enter)
        module.register_forward_hook(matmuls.leave)
        LocalWeights(module)


# Which dimension of a parameter is shared, counted from its last one (experts have one more in front), by the end of
# its name. What is not named, such as the adapters' A of a layer whose outputs are shared, is the same on all ranks.
COLUMNS = {"weight": -2, "B": -2, "bias": -1, "magnitude": -1, "packed": -2, "absmax": -2, "codes": -2, "scale": -1}
ROWS = {"weight": -1, "A": -1, "packed": -1, "absmax": -1, "codes": -1}


def split_layer(layer: nn.Module, dims: dict, mesh):
    for adapter in layer.adapters.values() if dims is ROWS and hasattr(layer, "adapters") else ():
        # Each rank has a part of the inputs that DoRA's norms sum over.
        adapter.sum_inputs = functools.partial(sum_values, group=mesh.get_group())
    if getattr(layer, "quantised", None) is not None:
        layer.quantised.keep_rows()
    for path, p in list(layer.named_parameters()):
        owner, _, leaf = path.rpartition(".")
        if leaf == "bias" and dims is ROWS:
            raise UserError(f"parallel.tensor: the model adds a bias after {type(layer).__name__} layers whose inputs "
                            f"are shared, which is not supported; use --parallel.strategy fsdp alone")
        if leaf not in dims:
            continue
        shape, dim = list(p.shape), p.ndim + dims[leaf]
        shape[dim] //= mesh.size()
        own = DTensor.from_local(p.new_empty(shape), mesh, [Shard(dim)], run_check=False, shape=p.shape,
                                 stride=p.stride())
        layer.get_submodule(owner).register_parameter(leaf, nn.Parameter(own, requires_grad=p.requires_grad))


def sum_values(x: torch.Tensor, group) -> torch.Tensor:
    dist.all_reduce(x, group=group)
    return x


class LocalWeights:
    """While a module computes, its shared parameters are this rank's plain tensors: kernels know no DTensor. Their
    gradients are divided by `averaged_by`."""

    def __init__(self, module: nn.Module, averaged_by: int = 1):
        self.kept, self.averaged_by = [], averaged_by
        # FSDP puts its hook, which gathers, before all others.
        module.register_forward_pre_hook(self.show)
        module.register_forward_hook(self.hide, prepend=True)

    def show(self, module, args):
        for part in module.modules():
            for name, p in part._parameters.items():
                if isinstance(p, DTensor):
                    self.kept.append((part, name, p))
        for part, name, p in self.kept:
            own = part._parameters[name] = p.to_local()
            if self.averaged_by > 1 and own.requires_grad:
                own.register_hook(lambda gradient: gradient / self.averaged_by)

    def hide(self, module, args, y):
        for part, name, p in self.kept:
            part._parameters[name] = p
        self.kept.clear()


def is_shared(p: torch.Tensor) -> bool:
    """Whether each rank of a group that shares matmuls has its own part of a parameter."""
    return isinstance(p, DTensor) and "tensor" in (p.device_mesh.mesh_dim_names or ())


def count_copies(p: torch.Tensor, t: int) -> int:
    """How many ranks hold the same share of a parameter: HSDP's groups do, and the t ranks that share a matmul."""
    dims = zip(p.device_mesh.shape, p.placements) if isinstance(p, DTensor) else ()
    return math.prod(size for size, placement in dims if placement.is_replicate()) * (1 if is_shared(p) else t)


def sum_over_tokens(model: nn.Module, matmuls: SharedMatmuls):
    """Sum the gradients of parameters that are the same on all ranks: each has seen T / t of the tokens."""
    for p in model.parameters():
        if p.grad is not None and not is_shared(p):
            dist.all_reduce(p.grad.to_local(), group=matmuls.group)


def measure_norm(parameters: list, t: int, is_parted: bool, device: torch.device) -> torch.Tensor:
    """The global norm of the gradients of parameters, 0-d, in fp32 whatever the gradients are. is_parted: over all
    ranks, in stages, in shards, and in t parts; what several ranks hold alike counts once. A rank may have none.
    device: where the parameters are kept."""
    squares = [torch.linalg.vector_norm(p.grad.to_local() if isinstance(p, DTensor) else p.grad,
                                        dtype=torch.float32).square() / count_copies(p, t) for p in parameters]
    total = torch.stack(squares or [torch.zeros((), device=device)]).sum()
    if is_parted:
        dist.all_reduce(total)
    return total.sqrt()
