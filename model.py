"""The decoder of the LLaMA family: Llama 1 to 3.2, Mistral, Qwen2, Qwen3, SmolLM, TinyLlama, Falcon3.

Pre-norm blocks of grouped-query attention with rotary positions (arXiv 2104.09864) and a SwiGLU MLP (2002.05202),
RMSNorm (1910.07467), as in the LLaMA papers (2302.13971, 2307.09288). Parameter names and the half-split rotation are
Hugging Face's, so that loading a checkpoint is renaming. The model knows no optimiser, no file and no process group.
Left out: mixtures of experts, dropout (nobody continues a pretraining with it), soft-capped logits.

B sequences, T tokens, D hidden_size, H num_attention_heads, K num_key_value_heads, d head_dim, F intermediate_size,
V vocab_size.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kernels


@dataclass
class ModelConfig:
    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None       # None: as many as attention heads
    head_dim: int | None = None                  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)     # {"rope_type": "linear" | "dynamic" | "llama3" | "yarn", ...}
    tie_word_embeddings: bool = False
    qkv_bias: bool = False                       # Qwen2
    attention_bias: bool = False                 # Llama: q, k, v and o
    mlp_bias: bool = False
    qk_norm: bool = False                        # Qwen3: RMSNorm over each head's d
    windows: list[int | None] | None = None      # per layer: tokens a query sees back, itself included; None: all
    no_rope_layers: list[int] = field(default_factory=list)    # indices of layers without rotation (SmolLM3)
    initializer_range: float = 0.02
    family: str = "llama"                        # Hugging Face's model_type, see hf.py

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but a model needs at least 1")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                                 f"{self.num_attention_heads}; change one of them or give head_dim")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, but rotary positions turn pairs: it must be even")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.windows is not None and len(self.windows) != self.num_hidden_layers:
            raise ValueError(f"windows names {len(self.windows)} layers of {self.num_hidden_layers}")
        if (kind := self.rope_scaling.get("rope_type", "default")) not in ROPE_TYPES:
            raise ValueError(f"rope_type {kind!r} is not known; known are {', '.join(ROPE_TYPES)}")
        if missing := [key for key in ROPE_TYPES[kind] if key not in self.rope_scaling]:
            raise ValueError(f"rope_type {kind!r} needs {', '.join(missing)} in rope_scaling")


ROPE_TYPES = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor")}           # and what each must be told


def rope_frequencies(config: ModelConfig, length: int) -> tuple[torch.Tensor, float]:
    """Angle per position of each of the d/2 pairs, and the factor on cosine and sine, for rows of `length` tokens."""
    d, base, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    kind, factor = scaling.get("rope_type", "default"), scaling.get("factor", 1.0)
    exponent = torch.arange(0, d, 2, dtype=torch.float32) / d
    if kind == "dynamic":                        # the base grows once a row is longer than the model was trained for
        trained = config.max_position_embeddings
        base *= (factor * max(length, trained) / trained - (factor - 1)) ** (d / (d - 2))
    frequency = 1.0 / base**exponent
    if kind == "linear":                         # arXiv 2306.15595
        return frequency / factor, 1.0
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "llama3":                         # slow pairs are stretched, fast ones kept, a ramp between
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (keep + (1 - keep) / factor), 1.0
    if kind == "yarn":                           # arXiv 2309.00071
        factor = factor or config.max_position_embeddings / original

        def pair_of(rotations):                  # index of the pair that turns so often over the original length
            return d * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

        def mscale(weight):
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

        low = pair_of(scaling.get("beta_fast") or 32)
        high = pair_of(scaling.get("beta_slow") or 1)
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d - 1)
        ramp = ((torch.arange(d // 2) - low) / (max(high - low, 0.001))).clamp(0, 1)
        amplitude = scaling.get("attention_factor")
        if amplitude is None:
            both = scaling.get("mscale") and scaling.get("mscale_all_dim")
            amplitude = mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"]) if both else mscale(1.0)
        return frequency * (1 - ramp) + frequency / factor * ramp, amplitude
    return frequency, 1.0


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x, residual=None):
        """The norm of x; with a residual, the norm of x + residual and x + residual itself."""
        if residual is None:
            return kernels.rmsnorm(x, self.weight, self.eps)
        return kernels.add_rmsnorm(x, residual, self.weight, self.eps)


def project(x, *layers):
    """layer(x) of each. Layers that carry adapters (learn/adapters.py) bring a function that reads x once for all."""
    apply_together = next((layer.apply_together for layer in layers if hasattr(layer, "apply_together")), None)
    return apply_together(x, layers) if apply_together else [layer(x) for layer in layers]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        D, d, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        bias = config.qkv_bias or config.attention_bias
        self.q_proj = nn.Linear(D, H * d, bias=bias)
        self.k_proj = nn.Linear(D, K * d, bias=bias)
        self.v_proj = nn.Linear(D, K * d, bias=bias)
        self.o_proj = nn.Linear(H * d, D, bias=config.attention_bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(d, config.rms_norm_eps), RMSNorm(d, config.rms_norm_eps)
        self.layer, self.head_dim = layer, d
        self.window = config.windows[layer] if config.windows else None
        self.use_rope = layer not in config.no_rope_layers

    def forward(self, x, cos, sin, causal, doc_start, cache):
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (y.view(heads) for y in project(x, self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm and self.use_rope:
            q, k = kernels.qk_norm_rope(q, k, self.q_norm.weight, self.k_norm.weight, cos, sin, self.q_norm.eps)
        elif self.use_rope:
            q, k = kernels.rope(q, k, cos, sin)                  # [B, T, H, d], [B, T, K, d]
        elif self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                # [B, S, K, d]
        y = kernels.attention(q, k, v, causal, self.window, doc_start)
        return self.o_proj(y.flatten(2))                         # [B, T, D]


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, inner, bias=bias)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)

    def forward(self, x):
        return self.down_proj(kernels.swiglu(*project(x, self.gate_proj, self.up_proj)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, *context):
        y, x = self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), *context), x)
        return x + self.mlp(y)


class KVCache:
    """Keys and values of the tokens seen so far, one pair of [B, capacity, K, d] tensors a layer."""

    def __init__(self, capacity: int):
        self.capacity, self.length, self.layers = capacity, 0, {}

    def append(self, layer, k, v):
        """Store this step's k and v [B, T, K, d]; return all of the layer's, [B, length + T, K, d]."""
        end = self.length + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, but {end} are needed")
        if layer not in self.layers:
            self.layers[layer] = [x.new_empty(x.shape[0], self.capacity, *x.shape[2:]) for x in (k, v)]
        for store, new in zip(self.layers[layer], (k, v)):
            store[:, self.length:end] = new
        return [store[:, :end] for store in self.layers[layer]]


class Model(nn.Module):
    """model(tokens) -> hidden [B, T, D]; model.head(hidden) -> logits [B, T, V].

    Training never makes the logits: kernels.linear_cross_entropy(hidden, model.head.weight, labels) does without.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.checkpoint_blocks = False           # recompute each block in the backward pass instead of keeping it
        self._angles = (0, None, None)           # (length, cos, sin) of the longest row so far
        self.tie()

    def tie(self):
        """One parameter for head and embedding where the config says so; call again after replacing parameters."""
        if self.config.tie_word_embeddings:
            self.head.weight = self.embed_tokens.weight

    def forward(self, tokens, position_ids=None, doc_start=None, causal: bool = True, cache: KVCache | None = None):
        """tokens [B, T] -> hidden [B, T, D] after the final norm.

        position_ids [B, T]: None counts from 0 (from the cache's length with a cache). doc_start [B, T]: in packed rows
        where each position's document begins; attention then stays inside documents. causal=False sees both ways.
        """
        past = cache.length if cache is not None else 0
        T = tokens.shape[1]
        x = self.embed_tokens(tokens)
        if position_ids is None:
            cos, sin = (a[past:past + T].unsqueeze(0) for a in self.angles(past + T, x.device))
        else:
            cos, sin = (a[position_ids] for a in self.angles(self._length(position_ids, past + T), x.device))
        for block in self.layers:
            if self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, cos, sin, causal, doc_start, cache, use_reentrant=False)
            else:
                x = block(x, cos, sin, causal, doc_start, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def _length(self, position_ids, row: int) -> int:
        """Rows never hold positions past their own length, but for a caller who places them by hand."""
        ask = position_ids.device.type == "cpu" and not torch.compiler.is_compiling()      # it breaks a graph
        if ask or self.config.rope_scaling.get("rope_type") == "dynamic":
            return int(position_ids.max()) + 1
        return max(row, self.config.max_position_embeddings)

    def angles(self, length: int, device):
        """Cosine and sine [length, d/2] in fp32, kept until a longer row (`dynamic`: one of another length) comes."""
        dynamic = self.config.rope_scaling.get("rope_type") == "dynamic"
        wanted = max(length, self.config.max_position_embeddings) if dynamic else length
        have, cos, sin = self._angles
        if (have != wanted if dynamic else have < wanted) or cos.device != device:
            # Kept across modes: a tensor made in inference mode could not serve a later backward pass.
            with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
                frequency, amplitude = rope_frequencies(self.config, wanted)
                angle = torch.outer(torch.arange(wanted, dtype=torch.float32), frequency)
                cos, sin = (angle.cos() * amplitude).to(device), (angle.sin() * amplitude).to(device)
            self._angles = (wanted, cos, sin)
        return cos[:length], sin[:length]

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fresh weights: normal with initializer_range, residual outputs smaller by sqrt(2 layers) as in GPT-2."""
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            kind = name.split(".")[-2]
            if name.endswith(".bias"):
                parameter.zero_()
            elif kind.endswith("norm"):
                parameter.fill_(1.0)
            elif kind.endswith("_proj") or kind in ("embed_tokens", "head"):
                residual = kind in ("o_proj", "down_proj")
                scale = std / math.sqrt(2 * self.config.num_hidden_layers) if residual else std
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, scale, generator=generator))
            else:
                raise AssertionError(f"no rule initialises the parameter {name}")

    def count_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def shard_plan(self) -> list[nn.Module]:
        """The modules that FSDP gathers and frees one after the other."""
        return list(self.layers)


def matmul_flops_per_token(config: ModelConfig, context: int) -> float:
    """Floating-point operations of the matrix products of one training step, per token (forward and backward).

    Three products a weight (output, input gradient, weight gradient), and attention's two over a causal half.
    """
    per_layer = config.hidden_size * config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
    per_layer += 3 * config.hidden_size * config.intermediate_size
    weights = per_layer * config.num_hidden_layers + config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * 2 * config.num_attention_heads * config.head_dim * context / 2
    return 6.0 * (weights + attention)
