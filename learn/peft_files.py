"""Adapters as PEFT's files, adapter_config.json and adapter_model.safetensors: ours for PEFT, and PEFT's for us.

Adapters on experts are written with the names of the linear layers that each expert has in files of models, as PEFT
writes them with transformers 4: PEFT reads them with 4 and, which has all experts in two tensors, with 5.
"""

import math
import re
import reprlib
import time
from collections import Counter

import torch
from safetensors.torch import save_file
from torch import nn

import hf
from core.errors import UserError
from core.files import FolderKind, new_folder, write_json
from core.foreign_files import list_tensors, own_file, read_tensor
from core.parameter_names import from_hf_name, list_parts, of_all_experts, split_experts, to_hf_name
from core.settings_files import read_settings
from learn import adapters
from learn.fused_experts import split_fused

PREFIX = "base_model.model."                 # of every key in PEFT's files
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FOLDER = FolderKind("adapter folder", (CONFIG, TENSORS), {CONFIG: b'"peft_type"'})
HEAD_KEY, EMBEDDING_KEY = PREFIX + "lm_head.weight", PREFIX + "model.embed_tokens.weight"
# What makes a pattern exponential, in matching or in compiling: repeated groups, counts, references, look-arounds.
SLOW = re.compile(r"\)[*+]|\{|\\\d|\(\?")
PATTERN_SECONDS, MOST_PATTERNS = 2.0, 5000
UNTIE = "untie the base first (tie_word_embeddings false and an lm_head.weight)"
# PEFT's settings that can change what the tensors mean: {setting: the values with which it does not}.
HARMLESS = {
    "fan_in_fan_out": (False, None), "lora_bias": (False, None), "use_qalora": (False, None), "bias": ("none", None),
    "layer_replication": (None, []), "alora_invocation_tokens": (None,), "use_bdlora": (None, False),
    "arrow_config": (None,), "kasa_config": (None,),
    # PEFT's other initialisations of A and B change the base's weights too, and the file does not hold those.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def weight_shape(layer: nn.Module) -> torch.Size:
    return (layer.kept if isinstance(layer, adapters.Adapted) else layer.weight).shape


def list_modules(model: nn.Module, path: str, layer: nn.Module) -> dict[str, str]:
    """{part: what PEFT calls it} of the layer at `path`: itself, or the layers of its experts."""
    return {part: to_hf_name(part, model.config.family) for part in list_parts(path, weight_shape(layer)[0])}


def peft_names(model: nn.Module) -> dict[str, str]:
    """{parameter of the active adapter, or part of one for each expert: its key in PEFT's file}"""
    return {f"{part}.adapters.{layer.active_name}.{leaf}": PREFIX + module + suffix
            for path, layer in adapters.active_layers(model)
            for part, module in list_modules(model, path, layer).items()
            for leaf, suffix in layer.adapter.peft_suffixes.items() if getattr(layer.adapter, leaf) is not None}


def peft_state(model: nn.Module, weights: dict | None = None) -> dict[str, torch.Tensor]:
    """{PEFT's key: tensor on the CPU} of the active adapter. weights: {our name: full tensor} of a sharded model."""
    weights = split_experts(dict(model.named_parameters()) if weights is None else weights)
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
    parameters = split_experts(dict(model.named_parameters()))
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
    ends = {path: path.rpartition(".")[2] for path in values}
    values_of = {}
    for path, value in values.items():
        values_of.setdefault(ends[path], set()).add(value)
    return {ends[path] if len(values_of[ends[path]]) == 1 else path: value for path, value in values.items()}


def peft_config(model: nn.Module, base) -> dict:
    """adapter_config.json of the active adapter. base: a Base or a name."""
    name, revision = hf.split_name(base)
    active = {module: layer.adapter for path, layer in adapters.active_layers(model)
              for module in list_modules(model, path, layer).values()}
    low_rank = {path: adapter for path, adapter in active.items() if isinstance(adapter, adapters.LowRank)}
    rows = {path.rpartition(".")[2]: adapter.token_ids for path, adapter in active.items() if path not in low_rank}
    full = [path for path, token_ids in rows.items() if token_ids is None]
    some = {path: token_ids for path, token_ids in rows.items() if token_ids is not None}

    def find_common(values: dict) -> tuple[float, dict]:
        """(the commonest value, which becomes the default, {path: value} of the others, PEFT's pattern)"""
        common = Counter(values.values()).most_common(1)[0][0]
        return common, {path: value for path, value in shorten_paths(values).items() if value != common}
    one = next(iter(low_rank.values()))
    # Where PEFT puts the adapters of two matrices of an expert into one, it doubles rank and alpha, which is right for
    # alpha / r alone: rsLoRA's scale is written as an alpha that gives it.
    is_rescaled = one.rslora and any(adapter.A.ndim == 3 for adapter in low_rank.values())
    rank, rank_pattern = find_common({path: adapter.rank for path, adapter in low_rank.items()})
    alpha, alpha_pattern = find_common({path: adapter.alpha * (math.sqrt(adapter.rank) if is_rescaled else 1)
                                        for path, adapter in low_rank.items()})
    targets = shorten_paths({module: module in low_rank for path, layer in adapters.linear_layers(model).items()
                             for module in list_modules(model, path, layer).values()})
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": name, "revision": revision or None,
        "r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": one.dropout,
        "target_modules": sorted(path for path, is_target in targets.items() if is_target),
        "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, "use_rslora": one.rslora and not is_rescaled,
        "use_dora": one.magnitude is not None, "bias": "none", "fan_in_fan_out": False, "modules_to_save": full or None,
        "trainable_token_indices": some or None, "ensure_weight_tying": bool(full) and adapters.is_tied(model),
        "init_lora_weights": True, "inference_mode": True}


def save_adapter(model: nn.Module, folder, base, weights: dict | None = None):
    """Write the active adapter as PEFT does over an old `folder`; weights: as in `peft_state`. base: a Base or name."""
    # One key only: safetensors writes several in a random order, and equal runs are to leave equal files.
    known = {"base_fingerprint": base.fingerprint} if isinstance(base, hf.Base) else {"format": "pt"}
    with new_folder(folder, overwrite=True, kind=FOLDER) as out:
        save_file(peft_state(model, weights), out / TENSORS, metadata=known)
        write_json(out / CONFIG, peft_config(model, base))


def load_adapter(model: nn.Module, folder, name: str = "default") -> dict:
    """Add the adapter in `folder` or of an hf:// id (ours or PEFT's own) under `name`, active; -> its settings.

    UserError where it is not LoRA alone, not for this model, or trains an embedding that is also the model's head."""
    folder, tied = hf.open_base(folder).folder, adapters.is_tied(model)
    settings, file = read_adapter_settings(folder / CONFIG), folder / TENSORS
    if own_file(file) is None:
        raise UserError(f"{file} does not exist; an adapter_model.bin is not read, save it anew with PEFT")
    tensors, fused = split_fused({key: read_tensor(key, file, None) for key in list_tensors(file)}, model, settings)
    if tied and EMBEDDING_KEY in tensors and HEAD_KEY not in tensors and not settings.get("ensure_weight_tying"):
        raise UserError(f"{folder} trains the embedding and leaves the head as it was (no ensure_weight_tying), but "
                        f"the base's head is its embedding; {UNTIE}")

    same = {"rslora": bool(settings.get("use_rslora")), "dora": bool(settings.get("use_dora")),
            "dropout": settings.get("lora_dropout") or 0.0}
    known, chosen, modules = adapters.linear_layers(model), {}, {}
    for key, tensor in sorted(tensors.items()):
        # The end is that of a layer's A, with which B and m come, of a full table, or of some rows of one.
        module, end = re.fullmatch(r"(.*?)(\.lora_A\.weight|\.weight|\.token_adapter\.\w+|)", key.removeprefix(PREFIX),
                                   re.DOTALL).groups()
        part = from_hf_name(module) or module
        path = of_all_experts(part)
        if end == ".lora_A.weight" and path in known:
            check_pair(key, tensors, known[path], settings, folder)
            if chosen.setdefault(path, {"rank": len(tensor), **same})["rank"] != len(tensor):
                raise UserError(f"{key} has rank {len(tensor)}, and other experts of its layer have "
                                f"{chosen[path]['rank']}; here they all have the same")
            modules[part] = fused.get(module, module)
        elif key == EMBEDDING_KEY or (key == HEAD_KEY and not tied):
            chosen[path] = {"token_ids": None}
        elif end.startswith(".token_adapter"):
            chosen[path] = {"token_ids": find_token_ids(key, module, path, tensor, model, settings, folder)}
    for part, alpha in find_alphas(modules, settings, folder).items():
        if chosen[of_all_experts(part)].setdefault("alpha", alpha) != alpha:
            raise UserError(f"{folder / CONFIG} gives experts of one layer different alphas; here they all have the "
                            f"same")
    adapters.add_adapter(model, name, chosen)
    load_peft_state(model, tensors)
    return settings


def read_adapter_settings(path) -> dict:
    """adapter_config.json, typed; UserError where it is not LoRA alone."""
    settings = read_settings(path, needed=True)
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{path} has peft_type {settings.get('peft_type')!r}; only LORA is supported")
    if missing := [name for name in ("r", "lora_alpha") if settings.get(name) is None]:
        raise UserError(f"{path} does not say {' and '.join(missing)}")
    for key, allowed in HARMLESS.items():
        if settings.get(key) not in allowed:
            raise UserError(f"{path} has {key} {reprlib.repr(settings[key])}; merge it with PEFT's merge_and_unload")
    return settings


def check_pair(key: str, tensors: dict, layer: nn.Module, settings: dict, folder) -> None:
    """UserError where the A at `key` and its B are not of this layer, or of no rank that the settings name: before
    parameters are made for them."""
    ranks = {settings["r"], *(settings.get("rank_pattern") or {}).values()}
    out, width = weight_shape(layer)[-2:]
    names = key, key.replace(".lora_A.", ".lora_B.")
    shapes = {name: list(tensors[name].shape) for name in names if name in tensors}
    rank = sum(shapes[key][:1])
    for name, shape in zip(names, ([rank, width], [out, rank])):
        if shapes.get(name, shape) != shape:
            raise UserError(f"{name} has shape {shapes[name]}, but the base makes it {shape}; it was trained on "
                            f"another base")
    if rank not in ranks:
        raise UserError(f"{key} has rank {rank}, but {folder / CONFIG} says {', '.join(map(str, sorted(ranks)))}")


def find_token_ids(key: str, module: str, path: str, tensor, model: nn.Module, settings: dict, folder) -> list[int]:
    """The ids of the trained rows at `key`; UserError where the settings name none, or others than there are."""
    indices = settings.get("trainable_token_indices") or {}
    # A bare list means the embedding.
    indices = indices if isinstance(indices, dict) else {"embed_tokens": indices}
    token_ids = next((ids for place, ids in indices.items() if f".{module}".endswith(f".{place}")), None)
    if token_ids is None or path not in ("embed_tokens", "head"):
        raise UserError(f"{folder}: {CONFIG} has no trainable_token_indices for {key}")
    if len(set(token_ids)) < len(token_ids) or list(tensor.shape[:1]) != [len(token_ids)] or (
            max(token_ids, default=0) >= model.config.vocab_size):
        raise UserError(f"{folder / CONFIG} has {len(token_ids)} trainable_token_indices for {key} of "
                        f"{list(tensor.shape)}; they must be as many, each once, and below {model.config.vocab_size}")
    return token_ids


def find_alphas(modules: dict[str, str], settings: dict, folder) -> dict[str, float]:
    """{path: alpha}, where PEFT calls the path's module modules[path]: that of the first pattern which matches an end
    of the module, or else lora_alpha. UserError for a pattern that is no regular expression or could take for ever."""
    alphas, patterns, found = settings.get("alpha_pattern") or {}, {}, {}
    last = time.monotonic() + PATTERN_SECONDS
    if len(alphas) > MOST_PATTERNS:
        raise UserError(f"{folder / CONFIG} has {len(alphas):,} patterns in alpha_pattern; no model has so many layers")
    for pattern, alpha in alphas.items():
        if len(pattern) > 500 or SLOW.search(pattern) or len(re.findall("[*+?]", pattern)) > 4:
            raise UserError(f"{folder / CONFIG} has the alpha_pattern {reprlib.repr(pattern)}, which could take for "
                            f"ever; write names of layers, with a few of * + ? at most")
        try:
            patterns[re.compile(rf"(.*\.)?({pattern})$")] = alpha
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"{folder / CONFIG} has the alpha_pattern {reprlib.repr(pattern)}, which is no regular "
                            f"expression: {error}") from None
    for path, module in modules.items():
        if time.monotonic() > last:
            raise UserError(f"{folder / CONFIG} has patterns in alpha_pattern that take longer than "
                            f"{PATTERN_SECONDS:g} s; write names of layers")
        found[path] = next((alpha for compiled, alpha in patterns.items() if compiled.match(module)),
                           settings["lora_alpha"])
    return found
