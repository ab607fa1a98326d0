"""The decoder of the LLaMA family: Llama 1 to 3.2, Mistral, Mixtral, Qwen2, Qwen3, SmolLM, TinyLlama, Falcon3.

Pre-norm blocks of grouped-query attention with rotary positions (arXiv 2104.09864) and a SwiGLU MLP (2002.05202), with
RMSNorm (1910.07467), as in the LLaMA papers (2302.13971, 2307.09288). Parameter names and the half-split rotation are
Hugging Face's, so that loading a checkpoint is renaming. The model knows no optimiser, no file and no process group.
The MLP of Mixtral and Qwen3-MoE stands in moe.py. Left out: dropout (nobody continues a pretraining with it), and
soft-capped logits.

Shapes: B sequences, T tokens, D model width, H heads, K key-value heads, d head size, F MLP width, V vocabulary.
"""

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kernels
import moe
from core.architecture import ModelConfig

# Scalings whose frequencies depend on the length of the sequence.
BY_LENGTH = ("dynamic", "longrope")


def rope_frequencies(config: ModelConfig, length: int) -> tuple[torch.Tensor, float]:
    """(fp32 [d/2]: by how much the angle of each pair grows per position, factor on cosine and sine).

    length: of the sequence, which the scalings depend on that are in BY_LENGTH.
    """
    d, base, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    kind, factor = scaling.get("rope_type", "default"), scaling.get("factor", 1.0)
    exponent = torch.arange(0, d, 2, dtype=torch.float32) / d
    if kind == "dynamic":
        # The base grows once a sequence is longer than the model was trained for.
        trained = config.max_position_embeddings
        base *= (factor * max(length, trained) / trained - (factor - 1)) ** (d / (d - 2))
    frequency = 1.0 / base**exponent
    if kind == "linear":           # arXiv 2306.15595
        return frequency / factor, 1.0
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "llama3":
        # Frequencies of slow pairs are divided by `factor`, fast ones kept, with a ramp between (arXiv 2407.21783).
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (keep + (1 - keep) / factor), 1.0
    if kind == "longrope":         # arXiv 2402.13753
        factors = scaling["long_factor" if length > original else "short_factor"]
        return frequency / torch.tensor(factors), scaling["attention_factor"]
    if kind == "yarn":
        return yarn_frequencies(config, frequency, factor or config.max_position_embeddings / original, original)
    return frequency, 1.0


def yarn_frequencies(config: ModelConfig, frequency, factor: float, original: int) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): a ramp over the frequencies from kept to divided by `factor`, and sharper attention."""
    d, scaling = config.head_dim, config.rope_scaling

    # The index of the pair that makes `turns` full turns over the original length.
    def find_pair(turns):
        return d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    def scale_for(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = find_pair(scaling.get("beta_fast") or 32), find_pair(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = ((torch.arange(d // 2) - low) / (max(high - low, 0.001))).clamp(0, 1)
    amplitude = scaling.get("attention_factor")
    if amplitude is None and scaling.get("mscale") and scaling.get("mscale_all_dim"):
        amplitude = scale_for(scaling["mscale"]) / scale_for(scaling["mscale_all_dim"])
    elif amplitude is None:
        amplitude = scale_for(1.0)
    return frequency * (1 - ramp) + frequency / factor * ramp, amplitude


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return kernels.rmsnorm(x, self.weight, self.eps)


def project(x, *layers):
    """layer(x) of each. A layer with adapters (learn/adapters.py) brings a function that computes them all together."""
    apply_together = next((layer.apply_together for layer in layers if hasattr(layer, "apply_together")), None)
    return apply_together(x, layers) if apply_together else [layer(x) for layer in layers]


class Attention(nn.Module):
    """Grouped-query attention: each of K key-value heads serves H / K query heads."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        D, d, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        bias = config.qkv_bias or config.attention_bias
        self.layer, self.head_dim, self.qk_norm = layer, d, config.qk_norm
        self.window = config.windows[layer] if config.windows else None
        self.use_rope = layer not in config.no_rope_layers
        # Another function with its arguments where ranks share sequences (core/context_parallel.py).
        self.attend = kernels.attention
        self.q_proj = nn.Linear(D, H * d, bias=bias)
        self.k_proj = nn.Linear(D, K * d, bias=bias)
        self.v_proj = nn.Linear(D, K * d, bias=bias)
        self.o_proj = nn.Linear(H * d, D, bias=config.attention_bias)
        if self.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(d, config.rms_norm_eps), RMSNorm(d, config.rms_norm_eps)

    def forward(self, x, cos, sin, causal, doc_start, cache):
        per_head = (*x.shape[:2], -1, self.head_dim)
        # q [B, T, H, d], k and v [B, T, K, d]
        q, k, v = (y.view(per_head) for y in project(x, self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm and self.use_rope:
            q, k = kernels.qk_norm_rope(q, k, self.q_norm.weight, self.k_norm.weight, cos, sin, self.q_norm.eps)
        elif self.use_rope:
            q, k = kernels.rope(q, k, cos, sin)
        elif self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)           # [B, past + T, K, d]
        y = self.attend(q, k, v, causal, self.window, doc_start)
        return self.o_proj(y.flatten(2))                    # [B, T, D]


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, F, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, F, bias=bias)
        self.up_proj = nn.Linear(D, F, bias=bias)
        self.down_proj = nn.Linear(F, D, bias=bias)

    def forward(self, x):
        return self.down_proj(kernels.swiglu(*project(x, self.gate_proj, self.up_proj)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        is_sparse = config.num_experts and layer not in config.dense_layers
        self.mlp = moe.SparseMLP(config) if is_sparse else MLP(config)

    def forward(self, x, cos, sin, causal, doc_start, cache):
        """x [B, T, D] -> [B, T, D]; cos and sin [B or 1, T, d/2]; the rest as in Model.forward."""
        attended = self.self_attn(self.input_layernorm(x), cos, sin, causal, doc_start, cache)
        norm = self.post_attention_layernorm
        normed, x = kernels.add_rmsnorm(attended, x, norm.weight, norm.eps)
        return x + self.mlp(normed)


class KVCache:
    """Keys and values of the tokens seen so far, one pair of [B, capacity, K, d] tensors per layer."""

    def __init__(self, capacity: int):
        self.capacity, self.length, self.layers = capacity, 0, {}

    def append(self, layer, k, v):
        """Store k and v [B, T, K, d] of new tokens; -> those of all tokens of the layer, [B, length + T, K, d]."""
        end = self.length + k.shape[1]
        assert end <= self.capacity, f"the cache holds {self.capacity} tokens, but {end} are needed"
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
        # Every n-th block is recomputed in the backward pass; 0: none.
        self.checkpoint_blocks = 0
        # Of a model of which this process has a part: its stages, and (the whole model, on the meta device), which is
        # no module of this one.
        self.stages, self._whole = [], ()
        # (length, cos, sin) of the longest sequence so far.
        self._angles = (0, None, None)
        self.tie()

    @property
    def whole(self) -> "Model":
        """The model itself or, on the meta device, the one that it is a part of."""
        return self._whole[0] if self._whole else self

    def tie(self):
        """One parameter for head and embedding where the config says so; call again after replacing parameters."""
        if self.config.tie_word_embeddings and self.head is not None:
            self.head.weight = self.embed_tokens.weight

    def forward(self, tokens, position_ids=None, doc_start=None, causal: bool = True, cache: KVCache | None = None):
        """tokens [B, T] -> hidden [B, T, D] after the final norm.

        position_ids [B, T]: None counts from 0, with a cache from its length. doc_start [B, T]: the place at which each
        token's document begins; attention then stays inside documents. causal=False: tokens see later ones too.
        """
        x = self.run_blocks(self.embed_tokens(tokens), self.layers, position_ids, doc_start, causal, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def run_blocks(self, x, blocks, position_ids=None, doc_start=None, causal: bool = True, cache=None):
        """x [B, T, D] -> [B, T, D] through some of the blocks; the rest as in `forward`."""
        T = x.shape[1]
        past = cache.length if cache is not None else 0
        if position_ids is None:
            cos, sin = (a[past:past + T].unsqueeze(0) for a in self.angles(past + T, x.device))
        else:
            # Of ranks that share sequences each has some of the tokens, and may have the positions of all.
            length = self.table_length(position_ids, past + position_ids.shape[1])
            cos, sin = (a[position_ids] for a in self.angles(length, x.device))
        for place, block in enumerate(blocks):
            if self.checkpoint_blocks and self.training and place % self.checkpoint_blocks == 0:
                x = checkpoint(block, x, cos, sin, causal, doc_start, cache, use_reentrant=False)
            else:
                x = block(x, cos, sin, causal, doc_start, cache)
        return x

    def table_length(self, position_ids, sequence_length: int) -> int:
        """How many positions the table of angles must cover. Only the maximum of position_ids says it exactly, but to
        read it would wait for a GPU and break a compiled graph. There it is enough that positions are below
        sequence_length or, from a caller who passes larger ones, within the trained length."""
        is_free = position_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if is_free or self.config.rope_scaling.get("rope_type") in BY_LENGTH:
            return int(position_ids.max()) + 1
        return max(sequence_length, self.config.max_position_embeddings)

    def angles(self, length: int, device):
        """Cosine and sine [length, d/2] in fp32, kept until a longer sequence comes (BY_LENGTH: another length)."""
        scaling, longest = self.config.rope_scaling, self.config.max_position_embeddings
        by_length = scaling.get("rope_type") in BY_LENGTH
        # The longest sequence that has the same frequencies as one of this length.
        wanted = max(length, longest) if by_length else length
        if scaling.get("rope_type") == "longrope" and length <= scaling["original_max_position_embeddings"]:
            wanted = scaling["original_max_position_embeddings"]
        have, cos, sin = self._angles
        if (have != wanted if by_length else have < wanted) or cos.device != device:
            # A tensor made in inference mode could not be used in a later backward pass.
            with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
                frequency, amplitude = rope_frequencies(self.config, wanted)
                angle = torch.outer(torch.arange(wanted, dtype=torch.float32), frequency)
                cos, sin = (angle.cos() * amplitude).to(device), (angle.sin() * amplitude).to(device)
            self._angles = (wanted, cos, sin)
        return cos[:length], sin[:length]

    @torch.no_grad()
    def initialise(self, seed: int, layout=lambda full, parameter: full):
        """Fresh weights, as in GPT-2: normal with standard deviation initializer_range, divided by sqrt(2 * layers) in
        the matrices that write into the residual stream; norms 1, biases 0. They are drawn on the CPU, the same on
        every rank; layout(full, parameter) gives the part of a full tensor that a shard holds."""
        generator = torch.Generator().manual_seed(seed)
        std, own = self.config.initializer_range, dict(self.named_parameters())
        # A part of a model draws what the whole one does, and keeps its own.
        for name, shape in [(name, p.shape) for name, p in self.whole.named_parameters()]:
            kind, parameter = name.split(".")[-2], own.get(name)
            if name.endswith(".bias") or kind.endswith("norm"):
                if parameter is not None:
                    parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            assert kind.endswith("_proj") or kind in ("embed_tokens", "head", "gate"), f"no rule initialises {name}"
            into_residual = kind in ("o_proj", "down_proj")
            scale = std / math.sqrt(2 * self.config.num_hidden_layers) if into_residual else std
            full = torch.empty(shape, device="cpu").normal_(0.0, scale, generator=generator)
            if parameter is not None:
                parameter.copy_(layout(full, parameter))

    def count_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def shard_plan(self) -> list[nn.Module]:
        """The modules that FSDP gathers and frees one after the other."""
        return list(self.layers)

    def attention_plan(self) -> list[nn.Module]:
        """The modules whose `attend` needs all tokens of a sequence; everything else is computed per token."""
        return [block.self_attn for block in self.layers]

    def expert_plan(self) -> list[nn.Module]:
        """The modules that hold experts, of which ranks may have some each."""
        return [block.mlp.experts for block in self.layers if isinstance(block.mlp, moe.SparseMLP)]

    def tensor_plan(self) -> list[tuple[nn.Module, list[str], list[str]]]:
        """(module, its layers whose outputs ranks may share, those whose inputs they then share) of each module that
        reads and writes all of the residual stream."""
        plan = []
        for block in self.layers:
            part = "experts." if isinstance(block.mlp, moe.SparseMLP) else ""
            plan.append((block.self_attn, ["q_proj", "k_proj", "v_proj"], ["o_proj"]))
            plan.append((block.mlp, [f"{part}gate_proj", f"{part}up_proj"], [f"{part}down_proj"]))
        return plan


def matmul_flops_per_token(config: ModelConfig, context: int) -> float:
    """Floating-point operations of a training step's matmuls, per token: three matmuls per weight (output, gradient of
    the input, gradient of the weight), and attention's two, of which a causal mask needs half."""
    return sum(flops_by_block(config, context)) + 6.0 * config.vocab_size * config.hidden_size


def flops_by_block(config: ModelConfig, context: int) -> list[float]:
    """Those of each block; the others are the head's."""
    D, d, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    dense = 3 * D * config.intermediate_size
    # Of the experts, those that a token goes to.
    sparse = config.num_experts * D + config.num_experts_per_tok * 3 * D * config.moe_intermediate_size
    attention = D * d * 2 * (H + K) + 2 * H * d * context / 2
    return [6.0 * (attention + (sparse if config.num_experts and layer not in config.dense_layers else dense))
            for layer in range(config.num_hidden_layers)]
