"""CPU offload: shards of weights, gradients and the optimizer's state are kept in the host's memory (FSDP2's policy).

    host    shard of a block's weights -- copy --> GPU    gathered from all ranks, forward or backward pass
    host    shard of its gradient     <-- copy --  GPU    summed over all ranks
    host    the optimizer's step, by the CPU

The GPU holds activations and the blocks that are gathered, so that a model trains whose weights and moments outgrow it.
Each pass then waits for 4 bytes per weight over PCIe, and the step for the host's processor. With one rank it is the
same: FSDP of one. On a CPU there is one memory, and it changes nothing.
"""

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy


def choose_policy(offload: bool, device: torch.device) -> OffloadPolicy:
    """What fully_shard is to do. Pinned memory is copied while the GPU computes."""
    return CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()


def choose_backend(offload: bool, device: torch.device) -> str:
    """By which libraries ranks exchange tensors. Of shards in the host's memory they exchange norms and sums, which
    NCCL cannot."""
    if device.type == "cuda":
        return "cpu:gloo,cuda:nccl" if offload else "nccl"
    return "gloo"


def make_empty(model: nn.Module, device: torch.device, offload: bool) -> nn.Module:
    """The model with its memory, which holds anything; it was on the meta device. FSDP brings parameters to the device
    when they are needed, and nobody brings buffers."""
    model.to_empty(device="cpu" if offload else device)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    return model
