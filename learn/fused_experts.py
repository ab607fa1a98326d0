"""Adapters on experts as PEFT writes them with transformers 5, where two tensors hold all experts of a block:

    mlp.experts.gate_up_proj [E, 2 F, D]        mlp.experts.down_proj [E, D, F]
    lora_A [E r, D]   lora_B [2 F, r E]         lora_A [E r, F]   lora_B [D, r E]

Here gate and up projection have an adapter each: both take the A, and each its half of the B's rows. As modules PEFT
nests the two, so that the keys say `experts.base_layer` for one and `experts` for the other; shapes tell which.

r rank, D model width, F width of an expert's MLP, E experts.
"""

import re

import torch

from core.errors import UserError
from core.parameter_names import from_hf_name, to_hf_name

FUSED = re.compile(r"(base_model\.model\.(.+\.experts))(?:\.base_layer)?\.lora_([AB])\.weight")
PARAMETERS = ("gate_up_proj", "down_proj")


def split_fused(tensors: dict, model, settings: dict) -> tuple[dict, dict[str, str]]:
    """(the tensors by the keys of each expert's layers, {module of an expert: the parameter that PEFT adapts}).

    UserError for adapters on other parameters than experts, and for shapes that are none of theirs."""
    for name in settings.get("target_parameters") or ():
        if not model.config.num_experts or name.rpartition(".")[2] not in PARAMETERS:
            raise UserError(f"the adapter has target_parameters {name!r}; of parameters only experts are read, "
                            f"{' and '.join(PARAMETERS)}; merge it with PEFT's merge_and_unload")
    found, modules = {}, {}
    for key, tensor in tensors.items():
        match = FUSED.fullmatch(key)
        if not match or not model.config.num_experts:
            found[key] = tensor
            continue
        beside = key.replace(*(".lora_A.", ".lora_B.") if match[3] == "A" else (".lora_B.", ".lora_A."))
        parameter, parts = cut(key, tensor, tensors.get(beside), match[3] == "A", model.config)
        for name, of_experts in parts.items():
            for e, part in enumerate(of_experts):
                module = to_hf_name(f"{from_hf_name(match[2])}.{e}.{name}", model.config.family)
                found[f"base_model.model.{module}.lora_{match[3]}.weight"] = part.contiguous()
                modules[module] = f"{match[2]}.{parameter}"
    return found, modules


def cut(key: str, tensor, beside, is_a: bool, config) -> tuple[str, dict[str, torch.Tensor]]:
    """(the parameter that a fused A or B belongs to, {layer of an expert: [E, r, in] or [E, out, r]})"""
    a, b = (tensor, beside) if is_a else (beside, tensor)
    E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
    sizes = None
    if a is not None and b is not None and a.ndim == b.ndim == 2 and len(a) and len(a) == b.shape[1] and not len(a) % E:
        sizes = a.shape[1], len(b)
    if sizes not in ((D, 2 * F), (F, D)):
        raise UserError(f"{key} has shape {list(tensor.shape)}, which is no adapter on {E} experts of width {F}; it "
                        f"was trained on another base")
    parts = tensor.view(E, -1, tensor.shape[1]) if is_a else tensor.view(len(tensor), -1, E).permute(2, 0, 1)
    if sizes == (F, D):
        return "down_proj", {"down_proj": parts}
    gate, up = (parts, parts) if is_a else parts.chunk(2, 1)
    return "gate_up_proj", {"gate_proj": gate, "up_proj": up}
