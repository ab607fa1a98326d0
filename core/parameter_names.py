"""What a parameter is called in model.py and in Hugging Face files: ours have no `model.` in front, the head is `head`,
and the matrices of a layer's experts are one parameter.
"""

import re

import torch

# How the names of the modules begin that an objective gives a model in training; a model folder holds none of them.
OF_OBJECTIVE = "objective."
# What Mixtral calls the layers of an expert, and what we and Qwen3-MoE do.
MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
FROM_MIXTRAL = re.compile(r"\.block_sparse_moe(\.experts\.\d+)?\.(\w+)(?=\.|$)")
TO_MIXTRAL = re.compile(r"\.mlp(\.experts\.\d+)?\.(\w+)(?=\.|$)")


def to_hf_name(name: str, family: str = "llama") -> str:
    if family == "mixtral":
        ours = {ours: theirs for theirs, ours in MIXTRAL.items()}
        name = TO_MIXTRAL.sub(lambda m: f".block_sparse_moe{m[1] or ''}.{ours.get(m[2], m[2])}", name)
    return "lm_" + name if name.partition(".")[0] == "head" else "model." + name


def from_hf_name(name: str) -> str | None:
    """Our name; None for the rotary frequencies and angles that old checkpoints hold, which are computed here."""
    if re.search(r"\brotary_emb\.\w+$", name):
        return None
    name = FROM_MIXTRAL.sub(lambda m: f".mlp{m[1] or ''}.{MIXTRAL.get(m[2], m[2])}", name)
    return name.removeprefix("lm_") if name.partition(".")[0] == "lm_head" else name.removeprefix("model.")


def is_of_experts(name: str) -> bool:
    """Whether a parameter of ours is [E, out, in]: a matrix per expert, which files hold apart."""
    return ".experts." in name


def list_parts(name: str, E: int) -> list[str]:
    """The names in files of what a parameter is made of: its own, or those of its E experts' matrices.

    Example: layers.0.mlp.experts.up_proj.weight [E, F, D] is layers.0.mlp.experts.0.up_proj.weight [F, D],
    layers.0.mlp.experts.1.up_proj.weight [F, D] and so on."""
    return [name.replace(".experts.", f".experts.{e}.") for e in range(E)] if is_of_experts(name) else [name]


def of_all_experts(part: str) -> str:
    """The name of the parameter, or layer, that a part belongs to: layers.0.mlp.experts.3.up_proj is in
    layers.0.mlp.experts.up_proj."""
    return re.sub(r"\.experts\.\d+\.", ".experts.", part)


def split_experts(tensors: dict[str, torch.Tensor], copy: bool = False) -> dict[str, torch.Tensor]:
    """The same tensors by the names of their parts in files; an expert's matrix is a view, or a copy."""
    parts = {}
    for name, tensor in tensors.items():
        if is_of_experts(name):
            views = [view.clone() if copy else view for view in tensor.detach().unbind()]
            parts |= zip(list_parts(name, len(views)), views)
        else:
            parts[name] = tensor
    return parts


def base_parameters(model: torch.nn.Module) -> dict:
    """{name: parameter} of what a folder of the base holds: neither adapters nor modules of an objective. A weight that
    is kept in few bits (learn/quantised.py) is a module with the shape and dtype of the weight, and fills itself."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if ".adapters." not in name and ".quantised." not in name
            and not name.startswith(OF_OBJECTIVE)} | {
        name.replace("quantised", "weight"): module for name, module in model.named_modules()
        if name.endswith(".quantised")}
