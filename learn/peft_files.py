"""Adapters in PEFT's files, adapter_config.json and adapter_model.safetensors: ours for PEFT, and PEFT's for us.

    save_adapter(model, "out/legal/adapter", "hf://org/base")
    settings = load_adapter(model, "out/legal/adapter")

Read in 2026 in vLLM's lora/peft_helper.py and llama.cpp's convert_lora_to_gguf.py: vLLM takes LoRA and rsLoRA up to a
rank that it is told, but no DoRA, no trained embeddings and no patterns; llama.cpp takes lora_A and lora_B alone, one
alpha for all, and scales by alpha / r even where rsLoRA is meant. `advise_serving` says which of it an adapter meets.
"""

import re
from collections import Counter

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import hf
from core.errors import UserError
from core.files import new_folder, read_json, write_json
from learn import adapters

PREFIX = "base_model.model."                 # of every key in PEFT's files
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
HEAD_KEY, EMBEDDING_KEY = PREFIX + "lm_head.weight", PREFIX + "model.embed_tokens.weight"
UNTIE = "untie the base first (tie_word_embeddings false and an lm_head.weight)"
# PEFT's settings that can change what the tensors mean: {setting: the values with which it does not}.
HARMLESS = {
    "fan_in_fan_out": (False, None), "lora_bias": (False, None), "use_qalora": (False, None), "bias": ("none", None),
    "layer_replication": (None, []), "alora_invocation_tokens": (None,), "use_bdlora": (None, False),
    "arrow_config": (None,), "kasa_config": (None,), "target_parameters": (None, []),
    # PEFT's other initialisations of A and B change the base's weights too, and the file does not hold those.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def last_part(path: str) -> str:
    return path.rpartition(".")[2]


def peft_names(model: nn.Module) -> dict[str, str]:
    """{parameter of the active adapter: its key in PEFT's file}"""
    return {f"{path}.adapters.{layer.active_name}.{leaf}": PREFIX + hf.to_hf_name(path) + suffix
            for path, layer in adapters.active_layers(model)
            for leaf, suffix in layer.adapter.peft_suffixes.items() if getattr(layer.adapter, leaf) is not None}


def peft_state(model: nn.Module, weights: dict | None = None) -> dict[str, torch.Tensor]:
    """{PEFT's key: tensor on the CPU} of the active adapter. weights: {our name: full tensor} of a sharded model."""
    weights = dict(model.named_parameters()) if weights is None else weights
    state = {key: weights[name].detach().cpu().clone() for name, key in peft_names(model).items()}
    if EMBEDDING_KEY in state and HEAD_KEY not in state:
        # The head is tied to the embedding. PEFT writes both tensors and expects both.
        state[HEAD_KEY] = state[EMBEDDING_KEY].clone()
    return state


@torch.no_grad()
def load_peft_state(model: nn.Module, tensors: dict[str, torch.Tensor]):
    """Fill the active adapter by PEFT's keys; UserError where a key or shape does not fit."""
    names, tensors = peft_names(model), dict(tensors)
    keys = set(names.values())
    tied = EMBEDDING_KEY in keys and HEAD_KEY not in keys and {HEAD_KEY, EMBEDDING_KEY} <= tensors.keys()
    if tied and not torch.equal(tensors.pop(HEAD_KEY), tensors[EMBEDDING_KEY]):
        raise UserError(f"the adapter has a head of its own, but the model's is tied to its embedding; {UNTIE}")
    if odd := sorted(tensors.keys() ^ keys):
        raise UserError(f"the adapter's tensors are not those the model expects: "
                         f"{'left over' if odd[0] in tensors else 'missing'} is {odd[0]}, and {len(odd) - 1} more")
    parameters = dict(model.named_parameters())
    for name, key in names.items():
        if tensors[key].shape != parameters[name].shape:
            raise UserError(f"{key} has shape {list(tensors[key].shape)}, but the base makes it "
                             f"{list(parameters[name].shape)}; it was trained on another base")
        parameters[name].copy_(tensors[key])


def shorten_paths(values: dict[str, object]) -> dict[str, object]:
    """{path: value}, in which all paths with one last part become that part where their values are equal.

    {"layers.0.q_proj": 8, "layers.1.q_proj": 8, "layers.0.up_proj": 4, "layers.1.up_proj": 8} becomes
    {"q_proj": 8, "layers.0.up_proj": 4, "layers.1.up_proj": 8}: PEFT matches the ends of paths.
    """
    values_of = {}
    for path, value in values.items():
        values_of.setdefault(last_part(path), set()).add(value)
    return {last_part(path) if len(values_of[last_part(path)]) == 1 else path: value for path, value in values.items()}


def peft_config(model: nn.Module, base_name: str) -> dict:
    """adapter_config.json of the active adapter."""
    active = {hf.to_hf_name(path): layer.adapter for path, layer in adapters.active_layers(model)}
    low_rank = {path: adapter for path, adapter in active.items() if isinstance(adapter, adapters.LowRank)}
    rows = {last_part(path): adapter.token_ids for path, adapter in active.items() if path not in low_rank}
    full = [path for path, token_ids in rows.items() if token_ids is None]
    some = {path: token_ids for path, token_ids in rows.items() if token_ids is not None}

    def find_common(values: dict) -> tuple[float, dict]:
        """(the commonest value, which becomes the default, {path: value} of the others, PEFT's pattern)"""
        common = Counter(values.values()).most_common(1)[0][0]
        return common, {path: value for path, value in shorten_paths(values).items() if value != common}
    rank, rank_pattern = find_common({path: adapter.rank for path, adapter in low_rank.items()})
    alpha, alpha_pattern = find_common({path: adapter.alpha for path, adapter in low_rank.items()})
    targets = shorten_paths({path: path in low_rank for path in map(hf.to_hf_name, adapters.linear_layers(model))})
    one = next(iter(low_rank.values()))
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_name), "revision": None,
        "r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": one.dropout,
        "target_modules": sorted(path for path, is_target in targets.items() if is_target),
        "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
        "use_rslora": one.rslora, "use_dora": one.magnitude is not None, "bias": "none", "fan_in_fan_out": False,
        "modules_to_save": full or None, "trainable_token_indices": some or None,
        "ensure_weight_tying": bool(full) and adapters.is_tied(model),
        "init_lora_weights": True, "inference_mode": True,
    }


def save_adapter(model: nn.Module, folder, base_name: str, weights: dict | None = None):
    """Write the active adapter as PEFT does, in place of an old `folder`; weights: as in `peft_state`."""
    tensors, config = peft_state(model, weights), peft_config(model, base_name)
    with new_folder(folder, overwrite=True) as out:
        save_file(tensors, out / TENSORS, metadata={"format": "pt"})
        write_json(out / CONFIG, config)


def read_adapter(folder) -> tuple[dict, dict[str, torch.Tensor]]:
    """(settings, tensors) of an adapter's folder or hf:// id; UserError where it is not LoRA alone."""
    folder = hf.open_base(folder).folder
    settings = read_json(folder / CONFIG, dict)
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG} has peft_type {settings.get('peft_type')!r}; only LORA is supported")
    if missing := [name for name in ("r", "lora_alpha") if type(settings.get(name)) not in (int, float)]:
        raise UserError(f"{folder / CONFIG} does not say {' and '.join(missing)}")
    for name, allowed in HARMLESS.items():
        if settings.get(name) not in allowed:
            raise UserError(f"{folder / CONFIG} has {name} {settings[name]!r}; merge it with PEFT's merge_and_unload")
    try:
        return settings, load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / TENSORS} cannot be read: {error}") from None


def load_adapter(model: nn.Module, folder, name: str = "default") -> dict:
    """Add the adapter in `folder` (ours or PEFT's own) under `name`, active; -> its settings. UserError where it is not
    for this model, or trains an embedding that this model shares with its head."""
    settings, tensors = read_adapter(folder)
    tied = adapters.is_tied(model)
    if tied and EMBEDDING_KEY in tensors and HEAD_KEY not in tensors and not settings.get("ensure_weight_tying"):
        raise UserError(f"{folder} trains the embedding and leaves the head as it was (no ensure_weight_tying), but "
                        f"the base's head is its embedding; {UNTIE}")
    alphas, indices = settings.get("alpha_pattern") or {}, settings.get("trainable_token_indices") or {}
    # A bare list means the embedding.
    indices = indices if isinstance(indices, dict) else {"embed_tokens": indices}
    rslora, dora = bool(settings.get("use_rslora")), bool(settings.get("use_dora"))
    known, chosen = adapters.linear_layers(model), {}
    for key in sorted(tensors):
        module, _, end = key.removeprefix(PREFIX).partition(".lora_A")
        path = hf.from_hf_name(module)
        if end == ".weight" and path in known:
            alpha = next((value for pattern, value in alphas.items() if re.match(rf"(.*\.)?({pattern})$", module)),
                         settings["lora_alpha"])
            chosen[path] = {"rank": len(tensors[key]), "alpha": float(alpha), "rslora": rslora, "dora": dora,
                            "dropout": settings.get("lora_dropout") or 0.0}
        elif key == EMBEDDING_KEY or (key == HEAD_KEY and not tied):
            chosen["embed_tokens" if key == EMBEDDING_KEY else "head"] = {"token_ids": None}
        elif key.endswith(".token_adapter.trainable_tokens_delta"):
            table = key.split(".")[-3]
            token_ids = next((ids for path, ids in indices.items() if last_part(path) == table), None)
            if token_ids is None or table not in ("embed_tokens", "lm_head"):
                raise UserError(f"{folder}: {CONFIG} has no trainable_token_indices for {key}")
            chosen["head" if table == "lm_head" else "embed_tokens"] = {"token_ids": token_ids}
    adapters.add_adapter(model, name, chosen)
    load_peft_state(model, tensors)
    return settings


def advise_serving(settings: dict, folder, base: str = "BASE") -> list[str]:
    """Two lines, for vLLM and llama.cpp: the command that serves an adapter with these settings, or why none does."""
    unserved = [name for name in ("modules_to_save", "trainable_token_indices", "use_dora", "alpha_pattern")
                if settings.get(name)]
    rank = next((n for n in (8, 16, 32, 64, 128, 256, 320, 512) if n >= settings["r"]), None)
    vllm = unserved + (["rank_pattern"] if settings.get("rank_pattern") else []) + ([] if rank else ["r"])
    llama = unserved + (["use_rslora"] if settings.get("use_rslora") else [])
    merging = f"; merge first: python lora.py merge --base {base} --adapter {folder} --out DIR"
    return [f"vLLM: does not serve {', '.join(vllm)}{merging}" if vllm else
            f"vLLM: vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules NAME={folder}",
            f"llama.cpp: does not know {', '.join(llama)}{merging}" if llama else
            f"llama.cpp: convert_lora_to_gguf.py --base {base} {folder}"]
