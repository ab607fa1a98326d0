"""Adapters: a frozen base, plain or quantised, and a few trained numbers beside it; in PEFT's files.

    python lora.py merge --base DIR --adapter DIR --out DIR        one Hugging Face folder of both

    h = W x + s B A x                      LoRA (arXiv 2106.09685): A [r, in], B [out, r] trained, s = alpha / r;
                                           rsLoRA (2312.03732): s = alpha / sqrt(r)
    h = m (W x + s B A x) / |W + s B A|    DoRA (2402.09353): m [out] trained, the norm of each row a constant
    LoRA+ (2402.12354) gives B a learning rate of its own; QLoRA (2305.14314) keeps W in 4 bits.

`attach` freezes a model and replaces its linear layers by `Linear`, which hold the same parameters under the same names
and, in `adapters.NAME`, what is trained: A, B and, for DoRA, the magnitude. Embedding and head can be trained in full
or by rows (new tokens); then they get a copy of what is trained, so that the base stays whole under every adapter.
Products are kernels.lora_linear's; q/k/v and gate/up read their input once. Adapters are fp32 (fp64 beside fp64).

What serves the files (read in vLLM's config/lora.py and lora/{peft_helper,lora_weights,utils}.py and in llama.cpp's
convert_lora_to_gguf.py and llama-adapter.h, 2026; `handoff` says which of it concerns an adapter):
vLLM      takes LoRA and rsLoRA with r <= --max-lora-rank (16; one of 1, 8, 16, 32, 64, 128, 256, 320, 512); refuses
          DoRA, modules_to_save and token rows; scales every layer by alpha / r of the config and knows no patterns.
llama.cpp takes lora_A and lora_B alone, so neither DoRA nor embeddings; takes each layer's rank from its tensor, but
          one alpha for all, and knows no rsLoRA: it would scale by alpha / r without a word.
Whatever they do not take, `merge` turns into a plain model.
"""

import core.threads

import hashlib
import math
import re
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import hf
from core.config import ArgumentParser, main_guard, nearest, write_json
from kernels import NF4, dequantise, lora_linear, quantise

PREFIX = "base_model.model."                 # of every key in PEFT's files
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# PEFT's settings that change what the tensors mean, and the values under which they do not
HARMLESS = {"fan_in_fan_out": (False, None), "lora_bias": (False, None), "use_qalora": (False, None),
            "layer_replication": (None, []), "alora_invocation_tokens": (None,), "use_bdlora": (None, False),
            "arrow_config": (None,), "kasa_config": (None,), "target_parameters": (None, []), "bias": ("none", None),
            # the others start from changed base weights, which the file does not hold
            "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal")}
TINY = torch.finfo(torch.float32).tiny


@dataclass
class LoraConfig:
    rank: int = 0
    """0: no adapter, all weights are trained; 8 is usual, 128 to 256 for much new text"""
    alpha: float = 16.0
    """the adapter's product counts alpha / rank times"""
    targets: list[str] = field(default_factory=list)
    """linear layers that get one, by name ("q_proj", "layers.0.mlp.up_proj") or pattern ("layers.1?.*"); default: all
    of the blocks"""
    ranks: list[str] = field(default_factory=list)
    """other ranks, the last that matches counts: "down_proj=16" "layers.0.*=4" """
    dropout: float = 0.0
    """on the adapters' input; costs the fused products"""
    rslora: bool = False
    """alpha / sqrt(rank) instead of alpha / rank: for large ranks"""
    dora: bool = False
    """train each row's length apart from its direction: a little better at small ranks, and slower"""
    b_lr_ratio: float = 1.0
    """LoRA+: learning rate of B over that of A; the paper has 16"""
    embeddings: Literal["frozen", "rows", "full"] = "frozen"
    """embedding and head; rows: those of embedding_rows alone"""
    embedding_rows: str = ""
    """token ids, e.g. "32000:" for all from 32000 on, "32000:32512,7" """
    embedding_lr_ratio: float | None = None
    """their learning rate over optim.lr; default: 0.1 in full, 1 for rows"""
    base: Literal["plain", "nf4", "int4", "int8"] = "plain"
    """how the blocks' frozen weights are kept: as loaded, in 4 bits by normal quantiles or evenly spaced, in 8 bits"""
    double_quant: bool = True
    """nf4, int4: 4.13 bits a number instead of 4.5"""

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora.rank is {self.rank}, but must be 0 or more")
        if not (0 < self.alpha < math.inf and 0 < self.b_lr_ratio < math.inf):
            raise ValueError(f"lora.alpha {self.alpha} and lora.b_lr_ratio {self.b_lr_ratio} must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}, but must be from 0 to below 1")
        if (self.embeddings == "rows") != bool(self.embedding_rows):
            raise ValueError(f"lora.embeddings is {self.embeddings!r} and lora.embedding_rows {self.embedding_rows!r}; "
                             f"give both for training some rows, e.g. rows and \"32000:\"")
        if self.embedding_lr_ratio is not None and self.embedding_lr_ratio <= 0:
            raise ValueError(f"lora.embedding_lr_ratio is {self.embedding_lr_ratio}, but must be above 0")
        for entry in self.ranks:
            if not re.fullmatch(r"[^=]+=[1-9]\d*", entry):
                raise ValueError(f"lora.ranks has {entry!r}, but needs NAME=RANK, e.g. down_proj=16")


# ---- how a frozen weight is kept

class FourBit(nn.Module):
    """kernels/nf4.py's record as buffers: 4 bits a number, and 8 (double quantisation) or 32 for each 64 of them."""

    def __init__(self, record: NF4):
        super().__init__()
        self.shape, self.dtype = record.shape, record.dtype
        for name in ("packed", "absmax", "code", "absmax2", "code2", "offset"):
            self.register_buffer(name, getattr(record, name))

    def record(self) -> NF4:
        return NF4(self.packed, self.absmax, self.code, self.absmax2, self.code2, self.offset, self.shape, self.dtype)

    def dequantise(self) -> torch.Tensor:
        return dequantise(self.record(), torch.float32)


class EightBit(nn.Module):
    """Each row of a weight [out, in] as int8 times its largest absolute number / 127, as in LLM.int8() (2208.07339)
    without its columns of outliers: 8 bits a number and 32 a row."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.shape = weight.shape
        scale = weight.abs().amax(1).float() / 127
        if not scale.isfinite().all():
            raise ValueError(f"a weight of shape {tuple(weight.shape)} has NaN or infinite numbers; int8 has none")
        codes = (weight.float() / scale.clamp(min=TINY)[:, None]).round()
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("scale", scale)

    def dequantise(self) -> torch.Tensor:
        return self.codes.float() * self.scale[:, None]


class EightBitProduct(torch.autograd.Function):
    """x W^T; bf16 and fp16 hold every code exactly, and the scales come after the sum."""

    @staticmethod
    def forward(ctx, x, codes, scale):
        ctx.save_for_backward(codes, scale)
        return F.linear(x, codes.to(x.dtype)) * scale.to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        codes, scale = ctx.saved_tensors
        return (dy * scale.to(dy.dtype)) @ codes.to(dy.dtype), None, None


def int4(weight: torch.Tensor, double_quant: bool) -> NF4:
    """NF4's record with 15 evenly spaced levels from -1 to 1 instead of the normal distribution's 16."""
    record = quantise(weight, double_quant)
    flat = F.pad(weight.detach().float().flatten(), (0, -weight.numel() % NF4.block)).view(-1, NF4.block)
    largest = flat.abs().amax(1, keepdim=True).clamp(min=TINY)
    codes = ((flat / largest * 7).round() + 8).to(torch.uint8).view(-1, 2)
    packed = ((codes[:, 0] << 4) | codes[:, 1])[:len(record.packed)].clone()
    return replace(record, packed=packed, code=torch.arange(-8, 8, device=weight.device) / 7)


# ---- what is trained

def parameter(layer: "Adapted", *shape) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.promote_types(layer.dtype, torch.float32), device=layer.device))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class LowRank(nn.Module):
    """s B A, and DoRA's magnitude."""

    def __init__(self, layer: "Linear", rank: int, alpha: float, rslora: bool, dora: bool, dropout: float):
        super().__init__()
        out, width = layer.shape
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.A, self.B = parameter(layer, rank, width), parameter(layer, out, rank)
        self.magnitude = parameter(layer, out) if dora else None

    def ends(self) -> dict[str, str]:
        """{parameter: the end of its key in PEFT's file}"""
        return {"A": ".lora_A.weight", "B": ".lora_B.weight",
                **({} if self.magnitude is None else {"magnitude": ".lora_magnitude_vector"})}

    def start(self, layer, random, layout):
        bound = 1 / math.sqrt(self.A.shape[1])             # Kaiming-uniform with a = sqrt(5), as nn.Linear
        self.A.copy_(layout(torch.empty(self.A.shape, device="cpu").uniform_(-bound, bound, generator=random), self.A))
        self.B.zero_()
        if self.magnitude is not None:
            norms = torch.linalg.vector_norm(whole(layer.base()), dim=1, dtype=self.B.dtype)
            self.magnitude.copy_(layout(norms, self.magnitude))

    @torch.no_grad()
    def norms(self, weight) -> torch.Tensor:
        """|W + s B A| of each row: |W|^2 + 2 s (W A^T) B + s^2 B (A A^T) B, without a matrix of W's size."""
        with torch.autocast(weight.device.type, enabled=False):
            a, b = self.A, self.B
            own = torch.linalg.vector_norm(weight, dim=1, dtype=b.dtype)
            across = ((weight @ a.to(weight.dtype).T).to(b.dtype) * b).sum(1)
            square = own * own + 2 * self.scale * across + self.scale**2 * ((b @ (a @ a.T)) * b).sum(1)
            return square.clamp(min=TINY).sqrt()

    def merged(self, weight, tensors: dict) -> torch.Tensor:
        """weight with this adapter, whose parameters are `tensors` (its own may be shards), in it."""
        a, b = tensors["A"], tensors["B"]
        out = weight.to(b.dtype) + self.scale * (b @ a)
        if self.magnitude is not None:
            out *= (tensors["magnitude"] / out.norm(dim=1).clamp(min=TINY))[:, None]
        return out.to(weight.dtype)


class Full(nn.Module):
    """A trained copy of an embedding or head [V, D]."""

    def __init__(self, table):
        super().__init__()
        self.table = parameter(table, *table.shape)

    def ends(self):
        return {"table": ".weight"}

    def start(self, table, random, layout):
        self.table.copy_(layout(whole(table.base()), self.table))

    def merged(self, weight, tensors: dict):
        return tensors["table"].to(weight.dtype)

    def look_up(self, weight, tokens):
        return F.embedding(tokens, self.table).to(weight.dtype)


class Rows(nn.Module):
    """Rows [n, D] of some tokens in place of the base's; gradients, decay and moments exist for these alone."""

    def __init__(self, table, ids: list[int]):
        super().__init__()
        self.token_ids = ids
        self.rows = parameter(table, len(ids), table.shape[1])
        self.register_buffer("ids", torch.empty(len(ids), dtype=torch.int64, device=table.device))
        self.register_buffer("slots", torch.empty(table.shape[0], dtype=torch.int64, device=table.device))
        self.number()

    def number(self):
        """ids [n], and slots [V] with each token's row here or -1."""
        self.ids.copy_(torch.tensor(self.token_ids))
        self.slots.fill_(-1)[self.ids] = torch.arange(len(self.token_ids), device=self.ids.device)

    def ends(self):
        return {"rows": ".token_adapter.trainable_tokens_delta"}

    def start(self, table, random, layout):
        self.number()                                      # again: to_empty() forgets what buffers hold
        self.rows.copy_(layout(whole(table.base())[self.ids], self.rows))

    def merged(self, weight, tensors: dict):
        return weight.index_copy(0, self.ids.to(weight.device), tensors["rows"].to(weight.dtype))

    def look_up(self, weight, tokens):
        slot = self.slots[tokens]
        new = F.embedding(slot.clamp(min=0), self.rows).to(weight.dtype)
        return torch.where((slot >= 0).unsqueeze(-1), new, F.embedding(tokens, weight))


# ---- the layers

class Adapted(nn.Module):
    """A frozen layer with any number of adapters by name, one or none of them active."""

    def __init__(self, old: nn.Module):
        super().__init__()
        self.train(old.training)
        self._parameters["weight"] = old.weight            # register_parameter would ask Head's property
        self.kept = None                                   # a quantised weight in place of the parameter
        self.adapters = nn.ModuleDict()
        self.active = None
        self.unmerged = None                               # after a merge: (name, the base's weight or None)

    def base(self) -> torch.Tensor:
        return self._parameters["weight"].detach() if self.kept is None else self.kept.dequantise()

    @property
    def shape(self):
        return self._parameters["weight"].shape if self.kept is None else self.kept.shape

    @property
    def dtype(self):
        return self._parameters["weight"].dtype if self.kept is None else torch.float32

    @property
    def device(self):
        return self._parameters["weight"].device if self.kept is None else next(self.kept.buffers()).device

    @property
    def adapter(self):
        return self.adapters[self.active] if self.active in self.adapters else None  # noqa: SIM401 (no dict)


class Linear(Adapted):
    """x [..., in] -> [..., out]."""

    def __init__(self, old: nn.Linear):
        super().__init__(old)
        self.register_parameter("bias", old.bias)

    def compress(self, how: str, double_quant: bool, device=None):
        """Keep the weight in few bits, on `device` if that is another."""
        weight = self.weight.detach().to(device or self.weight.device)
        four = int4 if how == "int4" else quantise
        self.kept = EightBit(weight) if how == "int8" else FourBit(four(weight, double_quant))
        self.weight = None

    def extra_repr(self):
        return f"{self.shape[1]}, {self.shape[0]}, bias={self.bias is not None}, active={self.active!r}"

    def forward(self, x):
        return self.together(x, [self])[0]

    @staticmethod
    def together(x, linears) -> list[torch.Tensor]:
        """linear(x) of each; the products that kernels.lora_linear can do are one call."""
        fused = [linear for linear in linears if isinstance(linear, Linear) and linear.fuses()]
        done = iter(lora_linear(x, *zip(*(linear.operands(x) for linear in fused))) if fused else ())
        return [linear(x) if not isinstance(linear, Linear) else
                linear.finish(x, next(done) if linear in fused else linear.product(x)) for linear in linears]

    def drops(self) -> bool:
        return self.training and self.adapter is not None and self.adapter.dropout > 0

    def apart(self) -> bool:
        """Whether the adapter's product is its own: a kernel that knows neither dropout nor int8 cannot take it."""
        return self.adapter is not None and (self.drops() or isinstance(self.kept, EightBit))

    def fuses(self) -> bool:
        return isinstance(self.kept, FourBit) or (self.adapter is not None and not self.apart())

    def own_bias(self):
        """The bias as the product adds it: DoRA's factor is not for it."""
        return self.bias if self.adapter is None or self.adapter.magnitude is None else None

    def operands(self, x):
        weight = self.weight if self.kept is None else self.kept.record()
        if self.adapter is None or self.apart():           # rank 0
            return weight, self.own_bias(), x.new_empty(0, self.shape[1]), x.new_empty(self.shape[0], 0), 1.0
        return weight, self.own_bias(), self.adapter.A, self.adapter.B, self.adapter.scale

    def product(self, x):
        if self.kept is None:
            return F.linear(x, self.weight, self.own_bias())
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        y = EightBitProduct.apply(x, self.kept.codes, self.kept.scale)
        return y if self.own_bias() is None else y + self.own_bias().to(y.dtype)

    def finish(self, x, y):
        adapter = self.adapter
        if adapter is None:
            return y
        if self.apart():
            x = F.dropout(x, adapter.dropout, self.training)
            y = y + adapter.scale * F.linear(F.linear(x, adapter.A.to(x.dtype)), adapter.B.to(x.dtype))
        if adapter.magnitude is not None:
            weight = self.weight if self.kept is None else self.kept.dequantise()
            y = (y * (adapter.magnitude / adapter.norms(weight))).to(y.dtype)       # bf16 would round small changes off
            y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y


class Table(Adapted):
    """An embedding or head [V, D]."""

    def current(self) -> torch.Tensor:
        weight, adapter = self._parameters["weight"], self.adapter
        return weight if adapter is None else adapter.merged(weight, dict(adapter.named_parameters()))


class Embedding(Table):
    """tokens -> their rows [..., D]."""

    def forward(self, tokens):
        return F.embedding(tokens, self.weight) if self.adapter is None else self.adapter.look_up(self.weight, tokens)


class Head(Table):
    """hidden [..., D] -> logits [..., V]. `weight` is the matrix in force, base and adapter, for a loss that makes no
    logits; sharded, it is the parameter of that name, the base's, for FSDP asks for it."""

    def __init__(self, old: nn.Linear, embedding: Embedding | None):
        super().__init__(old)
        self.tied = [embedding] if embedding else []       # in a list: it is no submodule

    @property
    def weight(self):
        own = self._parameters["weight"]
        return own if hasattr(own, "full_tensor") else (self.tied[0] if self.tied else self).current()

    def forward(self, hidden):
        return F.linear(hidden, self.weight)


# ---- on a model

def adapted(model: nn.Module) -> list[tuple[str, Adapted]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, Adapted)]


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of what can have a low-rank adapter: every linear layer but the head, which is no module to a
    loss that makes no logits."""
    return {path: module for path, module in model.named_modules()
            if isinstance(module, (nn.Linear, Linear)) and path != "head"}


def matches(pattern: str, path: str) -> bool:
    return path == pattern or path.endswith("." + pattern) or fnmatchcase(path, pattern)


def ranks_of(model: nn.Module, config: LoraConfig) -> dict[str, int]:
    """{path: rank} of the linear layers that get an adapter."""
    paths = list(linears(model))
    other = [entry.rpartition("=") for entry in config.ranks]
    for pattern in [*config.targets, *(pattern for pattern, _, _ in other)]:
        if not any(matches(pattern, path) for path in paths):
            short = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
            raise ValueError(f"lora: no linear layer is called {pattern!r}{nearest(pattern, short)}; there are "
                             f"{', '.join(short)}, e.g. {paths[0]} (embedding and head: lora.embeddings)")
    ranks = {path: config.rank for path in paths
             if not config.targets or any(matches(pattern, path) for pattern in config.targets)}
    for pattern, _, rank in other:
        ranks |= {path: int(rank) for path in ranks if matches(pattern, path)}
    return ranks


def row_ids(text: str, size: int) -> list[int]:
    """ "5,8:10,30:" of a vocabulary of 32 -> [5, 8, 9, 30, 31]"""
    ids = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(:(\d*))?\s*", part)
        first, end = (int(match[1]), int(match[3] or size) if match[2] else int(match[1]) + 1) if match else (0, 0)
        if not first < end <= size:
            raise ValueError(f"lora.embedding_rows has {part!r}, but needs token ids below {size:,}, e.g. 7 or "
                             f"\"{max(0, size - 512)}:\" for all from there on")
        ids |= set(range(first, end))
    return sorted(ids)


def attach(model: nn.Module, config: LoraConfig, seed: int, name: str = "default", device=None):
    """Freeze `model` and give it the adapter `name`, drawn from `seed` and active: at first nothing changes, bit for
    bit where nothing is quantised. On the meta device `initialise` does the drawing, once the base's weights are there.

    device: where quantised weights go, one at a time, so that the plain ones never have to fit there.
    ValueError where a pattern matches no layer, naming those there are.
    """
    if not config.rank:
        raise ValueError("lora.rank is 0: no adapter; set it, e.g. to 8")
    ranks = ranks_of(model, config)
    tables = {}
    if config.embeddings != "frozen":
        ids = row_ids(config.embedding_rows, model.embed_tokens.weight.shape[0]) if config.embedding_rows else None
        tables = dict.fromkeys(["embed_tokens"] if is_tied(model) else ["embed_tokens", "head"], ids)
    if config.base != "plain":
        if any(p.is_meta for p in model.parameters()):
            raise ValueError(f"lora.base {config.base}: quantised weights are kept whole by every rank, not sharded; "
                             f"use --parallel.strategy ddp")
        for path in linears(model):
            layer = replaced(model, path)
            if layer.kept is None:
                layer.compress(config.base, config.double_quant, device)
    settings = {"rslora": config.rslora, "dora": config.dora, "dropout": config.dropout}
    add(model, name, {path: {"rank": rank, "alpha": config.alpha, **settings} for path, rank in ranks.items()}, tables)
    if not any(p.is_meta for p in model.parameters()):
        initialise(model, seed)


def is_tied(model: nn.Module) -> bool:
    return model.head._parameters["weight"] is model.embed_tokens._parameters["weight"]


def replaced(model: nn.Module, path: str) -> Adapted:
    """The layer at `path`, put in the place of torch's if it was one."""
    old = model.get_submodule(path)
    if isinstance(old, Adapted):
        return old
    if path == "head":
        new = Head(old, replaced(model, "embed_tokens") if is_tied(model) else None)
    else:
        new = (Embedding if isinstance(old, nn.Embedding) else Linear)(old)
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, new)
    return new


def add(model: nn.Module, name: str, low_rank: dict[str, dict], tables: dict[str, list[int] | None]):
    """Adapters still to be filled, {path: LowRank's settings} and {path: token ids, None for all}; active."""
    if not re.fullmatch(r"\w+", name) or hasattr(nn.ModuleDict, name):
        raise ValueError(f"an adapter cannot be called {name!r}; use letters, digits and _")
    if any(name in layer.adapters for _, layer in adapted(model)):
        raise ValueError(f"the model has an adapter {name!r} already; give this one another name")
    model.requires_grad_(False)
    for path, settings in low_rank.items():
        layer = replaced(model, path)
        layer.adapters[name] = LowRank(layer, **settings)
    for path, ids in tables.items():
        layer = replaced(model, path)
        layer.adapters[name] = Full(layer) if ids is None else Rows(layer, ids)
    if "embed_tokens" in tables and is_tied(model):
        replaced(model, "head")
    switch(model, name)


@torch.no_grad()
def initialise(model: nn.Module, seed: int, layout=lambda full, parameter: full):
    """Draw the active adapter, each tensor from (seed, its name) alone; `layout` shards a tensor as in hf.fill."""
    for path, layer in adapted(model):
        if layer.adapter is not None:
            key = hashlib.blake2b(f"{seed}/{path}/{layer.active}".encode(), digest_size=7).digest()
            layer.adapter.start(layer, torch.Generator().manual_seed(int.from_bytes(key, "little")), layout)


def switch(model: nn.Module, name: str | None):
    """Make the adapter `name` the one in force, and the one that is trained; None: the base alone."""
    layers = adapted(model)
    known = sorted({name for _, layer in layers for name in layer.adapters})
    if name is not None and name not in known:
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(known) or 'none'}")
    refuse_merged(model)
    for _, layer in layers:
        layer.active = name
        for key, adapter in layer.adapters.items():
            adapter.requires_grad_(key == name)


@contextmanager
def disabled(model: nn.Module):
    """The base alone: a teacher that costs no memory. For passes without gradients; a recomputed block would not be
    inside any more."""
    refuse_merged(model)
    layers = [layer for _, layer in adapted(model)]
    active = [layer.active for layer in layers]
    try:
        for layer in layers:
            layer.active = None
        yield model
    finally:
        for layer, name in zip(layers, active):
            layer.active = name


def lr_scales(model: nn.Module, config: LoraConfig) -> dict[str, float]:
    """{parameter: its learning rate over optim.lr} of every B, embedding and head that is trained."""
    ratio = config.embedding_lr_ratio or (0.1 if config.embeddings == "full" else 1.0)
    return {f"{path}.adapters.{layer.active}.{leaf}": ratio if isinstance(layer, Table) else config.b_lr_ratio
            for path, layer in adapted(model) if layer.adapter is not None
            for leaf in layer.adapter.ends() if isinstance(layer, Table) or leaf == "B"}


def trainable_share(model: nn.Module) -> str:
    """ "65,536 of 16,777,216 parameters trained (0.39 %), ..." of an adapted model; the base's are the 100 %."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(p.numel() for name, p in model.named_parameters() if ".adapters." not in name)
    kept = [layer.kept for _, layer in adapted(model) if layer.kept is not None]
    base += sum(weight.shape.numel() for weight in kept)
    text = f"{trained:,} of {base:,} parameters trained ({100 * trained / base:.2f} %)"
    if kept:
        size = sum(buffer.nbytes for weight in kept for buffer in weight.buffers())
        text += f"; {size / 1e6:,.1f} MB of quantised weights, {8 * size / sum(w.shape.numel() for w in kept):.2f} " \
                f"bits each"
    return text


# ---- merging

def refuse_merged(model: nn.Module):
    if any(layer.unmerged for _, layer in adapted(model)):
        raise ValueError("the adapter is merged into the base; unmerge it first")


def refuse_quantised(model: nn.Module):
    if any(layer.kept is not None for _, layer in adapted(model)):
        raise ValueError("merging into a quantised base would lose the adapter in its rounding; save the adapter and "
                         "merge it into the full weights: python lora.py merge --base DIR --adapter DIR --out DIR")


@torch.no_grad()
def merged_state(model: nn.Module, weights: dict | None = None) -> dict[str, torch.Tensor]:
    """{name in the plain model: base and active adapter as one} for hf.save, computed in fp32 or more and kept in the
    base's dtype. weights: the model's parameters, gathered, where they are shards (parallel.model_state)."""
    refuse_quantised(model)
    weights = dict(model.named_parameters()) if weights is None else weights
    out = {name: tensor.detach() for name, tensor in weights.items() if ".adapters." not in name}
    for path, layer in adapted(model):
        if layer.adapter is not None:
            tensors = {leaf: weights[f"{path}.adapters.{layer.active}.{leaf}"] for leaf in layer.adapter.ends()}
            out[f"{path}.weight"] = layer.adapter.merged(out[f"{path}.weight"], tensors)
    return out


@torch.no_grad()
def merge(model: nn.Module, keep: bool = True):
    """Put the active adapter into the base's weights, in fp32 or more. keep: hold a copy of what changes, for
    `unmerge`. ValueError on a quantised base."""
    refuse_quantised(model)
    refuse_merged(model)
    for _, layer in adapted(model):
        if layer.adapter is not None:
            weight = layer._parameters["weight"]
            layer.unmerged = layer.active, weight.clone() if keep else None
            weight.copy_(layer.adapter.merged(weight, dict(layer.adapter.named_parameters())))
            layer.active = None


@torch.no_grad()
def unmerge(model: nn.Module):
    """Undo `merge`, bit for bit."""
    layers = [layer for _, layer in adapted(model) if layer.unmerged]
    if not layers or any(layer.unmerged[1] is None for layer in layers):
        raise ValueError("there is nothing to unmerge" + ("; merge with keep=True" if layers else ""))
    for layer in layers:
        layer.active, before = layer.unmerged
        layer._parameters["weight"].copy_(before)
        layer.unmerged = None


# ---- PEFT's files

def hf_path(path: str) -> str:
    return hf.to_hf_name(path + ".")[:-1]


def peft_names(model: nn.Module) -> dict[str, str]:
    """{parameter of the active adapter: its key in PEFT's file}"""
    return {f"{path}.adapters.{layer.active}.{leaf}": PREFIX + hf_path(path) + end
            for path, layer in adapted(model) if layer.adapter is not None
            for leaf, end in layer.adapter.ends().items()}


HEAD_KEY, EMBEDDING_KEY = PREFIX + "lm_head.weight", PREFIX + "model.embed_tokens.weight"


def state(model: nn.Module, weights: dict | None = None) -> dict[str, torch.Tensor]:
    """{PEFT's key: tensor on the CPU} of the active adapter. weights: as in `merged_state`."""
    refuse_merged(model)
    weights = dict(model.named_parameters()) if weights is None else weights
    out = {key: weights[name].detach().cpu().clone() for name, key in peft_names(model).items()}
    if EMBEDDING_KEY in out and HEAD_KEY not in out:
        out[HEAD_KEY] = out[EMBEDDING_KEY].clone()         # tied: PEFT writes and wants both
    return out


@torch.no_grad()
def load_state(model: nn.Module, tensors: dict[str, torch.Tensor], layout=lambda full, parameter: full):
    """The active adapter's numbers, by PEFT's keys; ValueError where a key or shape does not fit."""
    names, tensors = peft_names(model), dict(tensors)
    copy = tensors.pop(HEAD_KEY) if EMBEDDING_KEY in names.values() and HEAD_KEY not in names.values() and \
        {HEAD_KEY, EMBEDDING_KEY} <= tensors.keys() else None
    if copy is not None and not torch.equal(copy, tensors[EMBEDDING_KEY]):
        raise ValueError("the adapter has a head of its own, but the model's is tied to its embedding; untie the "
                         "base first (tie_word_embeddings false and an lm_head.weight)")
    if odd := sorted(tensors.keys() ^ set(names.values())):
        raise ValueError(f"the adapter's tensors are not those the model expects: "
                         f"{'left over' if odd[0] in tensors else 'missing'} is {odd[0]}, and {len(odd) - 1} more")
    parameters = dict(model.named_parameters())
    for name, key in names.items():
        if tensors[key].shape != parameters[name].shape:
            raise ValueError(f"{key} has shape {list(tensors[key].shape)}, but the base makes it "
                             f"{list(parameters[name].shape)}; it was trained on another base")
        parameters[name].copy_(layout(tensors[key], parameters[name]))


def compact(values: dict[str, object]) -> dict[str, object]:
    """{path: value} by the last part of the path where all of that part agree, as PEFT matches patterns."""
    parts = {}
    for path, value in values.items():
        parts.setdefault(path.rpartition(".")[2], set()).add(value)
    return {part if len(parts[part]) == 1 else path: value
            for path, value in values.items() for part in [path.rpartition(".")[2]]}


def peft_config(model: nn.Module, base_name: str) -> dict:
    """adapter_config.json of the active adapter."""
    low = {hf_path(path): layer.adapter for path, layer in adapted(model) if isinstance(layer.adapter, LowRank)}
    rows = {hf_path(path).rpartition(".")[2]: layer.adapter.token_ids for path, layer in adapted(model)
            if isinstance(layer.adapter, Rows)}
    full = [hf_path(path).rpartition(".")[2] for path, layer in adapted(model) if isinstance(layer.adapter, Full)]
    (rank, _), = Counter(adapter.rank for adapter in low.values()).most_common(1)
    (alpha, _), = Counter(adapter.alpha for adapter in low.values()).most_common(1)
    one = next(iter(low.values()))
    targets = compact({hf_path(path): hf_path(path) in low for path in linears(model)})
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_name), "revision": None,
        "r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": one.dropout,
        "target_modules": sorted(path for path, has in targets.items() if has),
        "rank_pattern": {path: n for path, n in compact({p: a.rank for p, a in low.items()}).items() if n != rank},
        "alpha_pattern": {path: n for path, n in compact({p: a.alpha for p, a in low.items()}).items() if n != alpha},
        "use_rslora": one.rslora, "use_dora": one.magnitude is not None, "bias": "none", "fan_in_fan_out": False,
        "modules_to_save": full or None, "trainable_token_indices": rows or None,
        "ensure_weight_tying": bool(full) and is_tied(model), "init_lora_weights": True, "inference_mode": True,
    }


def save(model: nn.Module, folder, base_name: str, weights: dict | None = None):
    """Write the active adapter as PEFT does, replacing `folder` whole or not at all. base_name: the base's folder or
    Hub id. weights: as in `merged_state`."""
    folder = Path(folder)
    tensors, config = state(model, weights), peft_config(model, base_name)
    with hf.replacing(folder) as out:
        save_file(tensors, out / TENSORS, metadata={"format": "pt"})
        write_json(out / CONFIG, config)


def read(folder) -> tuple[dict, dict[str, torch.Tensor]]:
    """(settings, tensors) of an adapter's folder; ValueError where it is none or more than LoRA."""
    folder = hf.resolve(folder)
    settings = hf.read_json(folder / CONFIG)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG} has peft_type {settings.get('peft_type')!r}; only LORA is supported")
    if missing := [name for name in ("r", "lora_alpha") if type(settings.get(name)) not in (int, float)]:
        raise ValueError(f"{folder / CONFIG} does not say {' and '.join(missing)}")
    for name, allowed in HARMLESS.items():
        if settings.get(name) not in allowed:
            raise ValueError(f"{folder / CONFIG} has {name} {settings[name]!r}, which is not supported; merge it with "
                             f"PEFT's own merge_and_unload")
    try:
        return settings, load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / TENSORS} cannot be read: {error}") from None


def load(model: nn.Module, folder, name: str = "default") -> dict:
    """Add PEFT's adapter in `folder` (ours or its own) under `name`, active; -> its settings."""
    settings, tensors = read(folder)
    known, low, tables = linears(model), {}, {}
    listed = settings.get("trainable_token_indices") or {}
    rows = listed if isinstance(listed, dict) else {"embed_tokens": listed}
    for key in sorted(tensors):
        module, _, end = key.removeprefix(PREFIX).partition(".lora_A")
        path = hf.from_hf_name(module + ".")[:-1]
        if end == ".weight" and path in known:
            alpha = next((n for pattern, n in (settings.get("alpha_pattern") or {}).items()
                          if re.match(rf"(.*\.)?({pattern})$", module)), settings["lora_alpha"])
            low[path] = {"rank": len(tensors[key]), "alpha": float(alpha), "rslora": bool(settings.get("use_rslora")),
                         "dora": bool(settings.get("use_dora")), "dropout": settings.get("lora_dropout") or 0.0}
        elif key == EMBEDDING_KEY or (key == HEAD_KEY and not is_tied(model)):
            tables["embed_tokens" if key == EMBEDDING_KEY else "head"] = None
        elif key.endswith(".token_adapter.trainable_tokens_delta"):
            short = key.split(".")[-3]
            ids = next((ids for name, ids in rows.items() if name.split(".")[-1] == short), None)
            if ids is None or short not in ("embed_tokens", "lm_head"):
                raise ValueError(f"{folder}: {CONFIG} has no trainable_token_indices for {key}")
            tables["head" if short == "lm_head" else "embed_tokens"] = ids
    if is_tied(model) and EMBEDDING_KEY in tensors and HEAD_KEY not in tensors \
            and not settings.get("ensure_weight_tying"):
        raise ValueError(f"{folder} trains the embedding and leaves the head as it was (ensure_weight_tying is not "
                         f"set), but the base's head is its embedding; untie the base first (tie_word_embeddings false "
                         f"and an lm_head.weight)")
    add(model, name, low, tables)
    load_state(model, tensors)
    return settings


def handoff(settings: dict, folder, base: str = "BASE") -> list[str]:
    """Whether vLLM and llama.cpp take an adapter with these settings, and how, a line each."""
    embeddings = [name for name in ("modules_to_save", "trainable_token_indices") if settings.get(name)]
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if settings.get(name)]
    dora = ["use_dora"] if settings.get("use_dora") else []
    rank = next((n for n in (8, 16, 32, 64, 128, 256, 320, 512) if n >= settings["r"]), None)
    vllm = embeddings + patterns + dora + ([] if rank else ["r"])
    llama = embeddings + dora + [name for name in ("alpha_pattern", "use_rslora") if settings.get(name)]
    merging = f"; merge first: python lora.py merge --base {base} --adapter {folder} --out DIR"
    return [f"vLLM: does not serve {', '.join(vllm)}{merging}" if vllm else
            f"vLLM: vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules NAME={folder}",
            f"llama.cpp: does not know {', '.join(llama)}{merging}" if llama else
            f"llama.cpp: convert_lora_to_gguf.py --base {base} {folder}"]


# ---- the command line

@torch.no_grad()
def merge_folders(base, adapter, out, dtype: torch.dtype | None = None, **options) -> dict:
    """Write base and adapter, each a folder or an hf:// id, as one Hugging Face folder; -> what to say about it.

    dtype: of the weights written; None: the base's. The sum is fp32's. options: hf.save's, such as card and tokenizer.
    """
    base = hf.open_base(base)
    named = base.settings
    if "quantization_config" in named:
        raise ValueError(f"{base.folder} is quantised; merge into the full-precision base it was made from")
    dtype = dtype or hf.DTYPES.get(named.get("dtype") or named.get("torch_dtype"), torch.float32)
    model = hf.load(base).eval()
    settings = load(model, adapter)
    result = {"out": str(out), "trained": trainable_share(model), "dtype": str(dtype).removeprefix("torch.")}
    tokens = torch.randint(model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    apart = model.head(model(tokens))
    merge(model, keep=False)
    for weight in model.parameters():
        weight.copy_(weight.to(dtype))
    difference = (model.head(model(tokens)) - apart).abs().max()
    hf.save(model, out, base=base, state={name: weight.to(dtype) for name, weight in merged_state(model).items()},
            **options)
    return {**result, "largest_logit_difference": difference.item(), "largest_logit": apart.abs().max().item(),
            "handoff": handoff(settings, adapter, base.name)}


def main():
    parser = ArgumentParser(prog="lora.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    p = commands.add_parser("merge", help="base and adapter as one Hugging Face folder")
    p.add_argument("--base", required=True, metavar="DIR", help="the full-precision base: a folder or hf:// id")
    p.add_argument("--adapter", required=True, metavar="DIR", help="a folder in PEFT's format, ours or PEFT's own")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--dtype", choices=hf.DTYPES, help="of the weights written (default: the base's)")
    p.add_argument("--json", metavar="FILE", help="write what is printed as data")
    args = parser.parse_args()
    if Path(args.out).exists():
        raise ValueError(f"{args.out} exists; name another folder with --out")
    result = merge_folders(args.base, args.adapter, args.out, hf.DTYPES.get(args.dtype))
    print(f"{result['trained']}\n{args.out}: merged in fp32, written in {result['dtype']}; largest logit difference "
          f"{result['largest_logit_difference']:.2g} of logits up to {result['largest_logit']:.3g}, 64 random tokens")
    print("the adapter by itself:", *result["handoff"], sep="\n  ")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    sys.exit(main_guard(main))
