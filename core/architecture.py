"""What a model is: ModelConfig, and config.json read into one and written from one.

`parse_config` and `make_config` are the two directions, over one table of families. Configs are written in both
dialects (`rope_theta`, `rope_scaling`, `torch_dtype` of transformers 4; `rope_parameters`, `dtype` of 5): of a config
with the new keys alone, transformers 4 takes a rope_theta of 10000 without a warning.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from core.config import check_limits, setting
from core.errors import UserError

# What transformers assumes where a config.json is silent. SmolLM2, TinyLlama and Falcon3 are plain Llama.
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "initializer_range": 0.02, "rope_theta": 10000.0,
            "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu",
            "no_rope_layer_interval": 4, "decoder_sparse_step": 1, "num_experts_per_tok": 2, "norm_topk_prob": False,
            "moe_intermediate_size": 768}
FAMILIES = {
    "llama": {"architecture": "LlamaForCausalLM"},
    "mistral": {"architecture": "MistralForCausalLM", "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "num_key_value_heads": 32, "max_position_embeddings": 32768,
              "max_window_layers": 28},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "num_key_value_heads": 32, "max_position_embeddings": 32768,
              "head_dim": 128, "max_window_layers": 28},
    "mixtral": {"architecture": "MixtralForCausalLM", "num_key_value_heads": 8, "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5, "rope_theta": 1e6, "norm_topk_prob": True},
    "qwen3_moe": {"architecture": "Qwen3MoeForCausalLM", "num_key_value_heads": 4, "max_position_embeddings": 32768,
                  "num_experts_per_tok": 8},
    "smollm3": {"architecture": "SmolLM3ForCausalLM", "num_key_value_heads": 4, "max_position_embeddings": 32768,
                "rope_theta": 2e6, "tie_word_embeddings": True},
}
# Families whose blocks have experts (moe.py), and how many where a config.json is silent. Their number has two names,
# of which transformers 4 and 5 write one or the other.
EXPERTS = {"mixtral": 8, "qwen3_moe": 128}
NUMBER_OF_EXPERTS = ("num_experts", "num_local_experts")
# In all layers together; the largest that is known has 23,000. The names of all are made before a file is read.
MOST_EXPERTS = 2**17
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Settings that a config.json and a ModelConfig call the same.
SHARED = (*SIZES, "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range", "tie_word_embeddings",
          "attention_bias", "mlp_bias")

# Names of one function; transformers knows both.
SILU = ("silu", "swish")
# {kind of scaling: the keys it needs}
ROPE_TYPES = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
              "longrope": ("short_factor", "long_factor", "attention_factor", "original_max_position_embeddings")}
# Keys of a base's config.json that are not true of an exported model: its weights are plain, remote code is not copied,
# and the original length of a scaled rotation stands with the scaling. Nor is any that begins with "_": with
# _attn_implementation_internal and its like a reader may fetch code from the Hub.
LEFT_OVERS = ("quantization_config", "compression_config", "auto_map", "custom_pipelines", "attn_implementation",
              "experts_implementation", "original_max_position_embeddings")


@dataclass
class ModelConfig:
    vocab_size: int = setting(32000, at_least=1)
    hidden_size: int = setting(512, at_least=1)
    intermediate_size: int = setting(1376, at_least=1)
    num_hidden_layers: int = setting(8, at_least=1)
    num_attention_heads: int = setting(8, at_least=1)
    num_key_value_heads: int | None = setting(None, at_least=1)      # None: as many as attention heads
    head_dim: int | None = setting(None, at_least=2)               # None: hidden_size / num_attention_heads
    max_position_embeddings: int = setting(2048, at_least=1)
    rms_norm_eps: float = setting(1e-5, at_least=0)
    rope_theta: float = setting(10000.0, above=1, below=math.inf)
    rope_scaling: dict = field(default_factory=dict)           # {"rope_type": a key of ROPE_TYPES, ...}
    tie_word_embeddings: bool = False
    qkv_bias: bool = False                       # Qwen2
    attention_bias: bool = False                 # Llama: q, k, v and o
    mlp_bias: bool = False
    qk_norm: bool = False                        # Qwen3: RMSNorm over each head's d
    # Per layer: how many tokens a query sees, itself included; None: all.
    windows: list[int | None] | None = None
    no_rope_layers: list[int] = field(default_factory=list)    # indices of layers without rotation (SmolLM3)
    num_experts: int = setting(0, at_least=0)                  # E; 0: every MLP is dense
    num_experts_per_tok: int = setting(0, at_least=0)          # k
    moe_intermediate_size: int = setting(0, at_least=0)        # F of an expert
    norm_topk_prob: bool = False                               # whether the k weights of a token add up to 1
    dense_layers: list[int] = field(default_factory=list)      # indices of layers that have no experts
    initializer_range: float = 0.02
    family: str = "llama"                        # Hugging Face's model_type, see hf.py

    def __post_init__(self):
        # The command line checks limits, but does not read a config.json.
        check_limits(self)
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                                f"{self.num_attention_heads}; change one of them or give head_dim")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}, but rotary positions turn pairs: it must be even")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                            f"num_key_value_heads {self.num_key_value_heads}")
        if self.num_experts and not (0 < self.num_experts_per_tok <= self.num_experts and self.moe_intermediate_size):
            raise UserError(f"num_experts_per_tok {self.num_experts_per_tok} of {self.num_experts} experts of width "
                            f"{self.moe_intermediate_size} cannot be; give 1 to {self.num_experts}, and a width")
        if self.windows is not None and len(self.windows) != self.num_hidden_layers:
            raise UserError(f"windows names {len(self.windows)} layers of {self.num_hidden_layers}")
        if any(window is not None and window < 1 for window in self.windows or ()):
            raise UserError(f"a sliding window is {min(filter(None, self.windows))}, but must be at least 1")
        if (kind := self.rope_scaling.get("rope_type", "default")) not in ROPE_TYPES:
            raise UserError(f"rope_type {kind!r} is not known; known are {', '.join(ROPE_TYPES)}")
        if missing := [key for key in ROPE_TYPES[kind] if self.rope_scaling.get(key) is None]:
            raise UserError(f"rope_type {kind!r} needs {', '.join(missing)} in rope_scaling")
        for key in ("short_factor", "long_factor") if kind == "longrope" else ():
            if len(factors := self.rope_scaling[key]) != self.head_dim // 2:
                raise UserError(f"rope_scaling has {len(factors)} values of {key}, but a head of {self.head_dim} has "
                                f"{self.head_dim // 2} pairs")
        for key in ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast",
                    "beta_slow"):
            if not (self.rope_scaling.get(key) or 1) > 0:
                raise UserError(f"rope_scaling has {key} {self.rope_scaling[key]}, but it must be above 0")
        if kind == "llama3" and not self.rope_scaling["low_freq_factor"] < self.rope_scaling["high_freq_factor"]:
            raise UserError(f"rope_scaling has low_freq_factor {self.rope_scaling['low_freq_factor']}, but it must be "
                            f"below high_freq_factor {self.rope_scaling['high_freq_factor']}")
        if kind == "dynamic" and self.head_dim == 2:
            raise UserError("rope_type 'dynamic' needs a head_dim above 2")


def set_positions(config: ModelConfig, longest: int | None, scaling: str, theta: float | None) -> ModelConfig:
    """The config with other positions, as a run wants them; None and "": as they are. A scaling stretches the length
    that the model was trained for to `longest`; "none" takes one away."""
    rope, trained = config.rope_scaling, config.max_position_embeddings
    if scaling and scaling != "none":
        if rope and "original_max_position_embeddings" not in rope:
            raise UserError(f"the base's rotation is scaled ({rope['rope_type']}), its config.json does not say from "
                            f"which length, and so model.rope_scaling {scaling} cannot take its place")
        original = rope.get("original_max_position_embeddings", trained)
        if (longest or 0) <= original:
            raise UserError(f"model.rope_scaling {scaling} stretches the {original} positions of the base; set "
                            f"--model.max-positions above them, not {longest}")
        rope = {"rope_type": scaling, "factor": longest / original}
        if scaling != "linear":
            rope["original_max_position_embeddings"] = original
        if scaling == "llama3":
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return replace(config, max_position_embeddings=longest or trained, rope_theta=theta or config.rope_theta,
                   rope_scaling={} if scaling == "none" else rope)


# ---- config.json

def parse_config(values: dict, folder: Path) -> ModelConfig:
    """The typed values of `folder`/config.json as a ModelConfig; an architecture that we lack is refused by name."""
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{folder}/config.json has model_type {family!r}, which is not supported; known are "
                        f"{', '.join(FAMILIES)} (Llama 1 to 3.2, TinyLlama, SmolLM2 and Falcon3 are llama)")
    known = {**DEFAULTS, **FAMILIES[family], **{key: value for key, value in values.items() if value is not None}}
    if missing := [name for name in (*SIZES, "no_rope_layer_interval") if (known.get(name) or 0) < 1]:
        raise UserError(f"{folder}/config.json has no usable {', '.join(missing)}; a model needs at least 1")
    if known["hidden_act"] not in SILU:
        raise UserError(f"{folder}/config.json has hidden_act {known['hidden_act']!r}; only silu (SwiGLU) is known")
    layers, no_rope, interval = known["num_hidden_layers"], [], known["no_rope_layer_interval"]
    if family == "smollm3":
        # A config without the list means that every fourth layer has no rotation.
        uses_rope = values.get("no_rope_layers") or [(i + 1) % interval for i in range(layers)]
        no_rope = [i for i, uses in enumerate(uses_rope) if not uses]
    for name in ("no_rope_layers", "layer_types"):
        if len(values.get(name) or range(layers)) != layers:
            raise UserError(f"{folder}/config.json names {len(values[name])} {name} of {layers} layers")
    if odd := set(values.get("layer_types") or ()) - {"full_attention", "sliding_attention"}:
        raise UserError(f"{folder}/config.json has layer_types {min(odd)}, which is not supported")
    config = {name: known.get(name) for name in SHARED}
    if family == "qwen2":
        # Its q, k and v always have a bias (qkv_bias), its o never.
        config["attention_bias"] = False
    # A null means as many key-value heads as heads; a config without the key means the family's default.
    config["num_key_value_heads"] = values.get("num_key_value_heads", known.get("num_key_value_heads"))
    theta, scaling = parse_rope(values, known, folder)
    return ModelConfig(**config, rope_theta=theta, rope_scaling=scaling, qkv_bias=family == "qwen2",
                       qk_norm=family in ("qwen3", "qwen3_moe"), no_rope_layers=no_rope, family=family,
                       windows=find_windows(family, values, known, no_rope), **parse_experts(family, known, folder))


def parse_experts(family: str, known: dict, folder: Path) -> dict:
    """The fields of a ModelConfig that say which layers have how many experts; {} for a family without them."""
    if family not in EXPERTS:
        return {}
    if len(numbers := {known[name] for name in NUMBER_OF_EXPERTS if name in known}) > 1:
        raise UserError(f"{folder}/config.json says num_experts {known['num_experts']} and num_local_experts "
                        f"{known['num_local_experts']}; keep the one that is true")
    layers, dense = range(known["num_hidden_layers"]), set(known.get("mlp_only_layers") or ())
    if family == "qwen3_moe":
        dense |= {i for i in layers if (i + 1) % known["decoder_sparse_step"]}
    if (E := min(numbers, default=EXPERTS[family])) * len(layers) > MOST_EXPERTS:
        raise UserError(f"{folder}/config.json says {E:,} experts in each of {len(layers):,} layers; at most "
                        f"{MOST_EXPERTS:,} in all are read")
    width = known["intermediate_size" if family == "mixtral" else "moe_intermediate_size"]
    return {"num_experts": E, "num_experts_per_tok": known["num_experts_per_tok"],
            "moe_intermediate_size": width, "norm_topk_prob": known["norm_topk_prob"], "dense_layers": sorted(dense)}


def parse_rope(values: dict, known: dict, folder: Path) -> tuple[float, dict]:
    """(rope_theta, rope_scaling) as transformers 5 takes them: rope_scaling before rope_parameters, in either of them
    rope_theta before the one at the top, but original_max_position_embeddings at the top before the one in them.
    What would follow from max_position_embeddings is filled in, so that it stays when a run sets that to something
    else. UserError where two keys contradict each other, and so transformers 4 and 5, and for heads that are rotated
    in part."""
    file, scaling, parameters = f"{folder}/config.json", values.get("rope_scaling"), values.get("rope_parameters") or {}
    rope = dict(scaling or parameters)
    if any(isinstance(value, dict) for value in (*rope.values(), *parameters.values())):
        raise UserError(f"{file} gives rope parameters by layer type; that is not supported")
    theta, longest = rope.pop("rope_theta", None) or known["rope_theta"], known["max_position_embeddings"]
    # Old configs call the key `type`.
    kind, named = rope.get("rope_type") or rope.get("type") or "default", {"rope_type", "type"} & rope.keys()
    if rope.get("factor") is not None and not named:
        raise UserError(f"{file} has a rope factor and no rope_type; name it, e.g. linear")
    used = {**rope, "rope_theta": theta, "rope_type": kind, "type": kind}
    for part in (rope, parameters, {"rope_theta": values.get("rope_theta")}):
        if wrong := [key for key, value in part.items() if value not in (None, used.get(key))]:
            raise UserError(f"{file} says {wrong[0]} {part[wrong[0]]} and {used.get(wrong[0])}, and versions of "
                            f"transformers differ in which they take; keep what the model was trained with")
    for part in (values, rope):
        if part.get("partial_rotary_factor") not in (None, 1):
            raise UserError(f"{file} has partial_rotary_factor {part['partial_rotary_factor']}; only heads that are "
                            f"rotated as a whole are supported")
    rope = {"rope_type": kind} | {key: rope[key] for key in rope if key not in ("type", "partial_rotary_factor")}
    if kind in ("llama3", "yarn", "longrope"):
        original = known.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = original = original or longest
        if original < 2:
            raise UserError(f"{file} has original_max_position_embeddings {original}, but it must be at least 2")
        if (kind == "longrope" or (kind == "yarn" and "factor" in rope)) and rope.get("factor") is None:
            rope["factor"] = longest / original
    if kind == "longrope" and rope.get("attention_factor") is None:
        rope["attention_factor"] = math.sqrt(1 + math.log(max(rope["factor"], 1)) / math.log(original))
    return theta, {} if kind == "default" else rope


def find_windows(family: str, values: dict, known: dict, no_rope: list[int]) -> list[int | None] | None:
    """Each layer's sliding window in tokens, which the families give in three ways; None: no layer has one."""
    layers = range(known["num_hidden_layers"])
    if family == "llama" or (family not in ("mistral", "mixtral") and not values.get("use_sliding_window")):
        return None
    if family in ("mistral", "mixtral", "qwen3_moe"):
        slides = [True for _ in layers]
    elif kinds := values.get("layer_types"):
        slides = [kind == "sliding_attention" for kind in kinds]
    elif family == "smollm3":
        slides = [i in no_rope for i in layers]
    else:
        slides = [i >= known["max_window_layers"] for i in layers]
    # Without the key the families' default holds; a null means no window.
    default = None if family == "mixtral" else 4096
    windows = [values.get("sliding_window", default) if slide else None for slide in slides]
    return windows if any(windows) else None


def make_config(config: ModelConfig, dtype: torch.dtype, base: dict) -> dict:
    """config.json of a model with this `config`. The keys of the base's own that we do not know are kept."""
    name = str(dtype).removeprefix("torch.")
    windows, layers = config.windows, range(config.num_hidden_layers)
    # transformers 4 finds longrope's original length at the top of a config alone.
    rope, is_longrope = config.rope_scaling, config.rope_scaling.get("rope_type") == "longrope"
    made = {
        **{key: value for key, value in base.items() if key not in LEFT_OVERS and not key.startswith("_")},
        **({"original_max_position_embeddings": rope["original_max_position_embeddings"]} if is_longrope else {}),
        **{key: getattr(config, key) for key in (*SHARED, "num_key_value_heads", "rope_theta")},
        "architectures": [FAMILIES[config.family]["architecture"]], "model_type": config.family,
        "hidden_act": "silu", "use_cache": True, "torch_dtype": name, "dtype": name,
        "rope_scaling": rope or None,
        "rope_parameters": {"rope_type": "default", **rope, "rope_theta": config.rope_theta},
    }
    if config.family in ("mistral", "mixtral"):
        made["sliding_window"] = windows[0] if windows else None
    elif config.family == "qwen3_moe":
        made |= {"use_sliding_window": windows is not None, "sliding_window": windows[0] if windows else None}
    elif config.family != "llama":
        made["use_sliding_window"] = windows is not None
        made["sliding_window"] = next((window for window in windows or [] if window), None)
        made["layer_types"] = ["sliding_attention" if windows and windows[i] else "full_attention" for i in layers]
        if windows and config.family != "smollm3":
            made["max_window_layers"] = next(i for i in layers if windows[i])
    if config.num_experts:
        made |= {**dict.fromkeys(NUMBER_OF_EXPERTS, config.num_experts),
                 "num_experts_per_tok": config.num_experts_per_tok}
    if config.family == "mixtral":
        made["intermediate_size"] = config.moe_intermediate_size
    if config.family == "qwen3_moe":
        made |= {"moe_intermediate_size": config.moe_intermediate_size, "norm_topk_prob": config.norm_topk_prob,
                 "decoder_sparse_step": 1, "mlp_only_layers": config.dense_layers}
    if config.family == "smollm3":
        made["no_rope_layers"] = [int(i not in config.no_rope_layers) for i in layers]
    return made
