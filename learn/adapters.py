"""Layers that carry adapters: a frozen base weight W and, beside it, the small tensors that are trained.

    h = W x + s B A x                      LoRA (arXiv 2106.09685): s = alpha / r; rsLoRA (2312.03732): alpha / sqrt(r)
    h = m (W x + s B A x) / |W + s B A|    DoRA (2402.09353): the norm, one per output, has no gradient

A layer of ours holds the parameters of the one it replaces, under the same names, so that loading, sharding and saving
a base need not know of adapters. A layer may have several, `adapters.NAME`, in fp32 or wider; at most one is active.

W may be kept in few bits (learn/quantised.py), and is turned back into floating point whenever the layer computes.

Shapes: x [..., in], W [out, in], A [r, in], B [out, r], m [out]; a table (embedding or head) [V, D], n trained rows.
A layer of E experts has an adapter in each: W [E, out, in], A [E, r, in], B [E, out, r], m [E, out].
"""

import math
import re
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

import moe
from core.errors import UserError
from core.sharding import gather
from kernels import grouped_mm, lora_linear
from learn.quantised import TINY, CompressedMatmul, EightBit, EightBitMatmul, FourBit

# ---- what is trained. Each kind of adapter has three things:
# peft_suffixes                          {parameter: end of its key in PEFT's file}
# initialise(layer, generator, layout)   layout(full, parameter) gives the part of a full tensor that a shard holds
# merge_into(weight)                     the base weight with the adapter in it, in the dtype of the weight

def new_parameter(layer: "Adapted", *shape: int) -> nn.Parameter:
    dtype = torch.promote_types(layer.kept.dtype, torch.float32)
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=layer.device))


class LowRank(nn.Module):
    """s B A of a linear layer, or of that of every expert, and DoRA's magnitude m."""

    peft_suffixes = {"A": ".lora_A.weight", "B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}  # noqa: RUF012

    def __init__(self, layer: "Linear | ExpertLinear", rank: int, alpha: float, rslora: bool, dora: bool,
                 dropout: float):
        super().__init__()
        *experts, out, width = layer.kept.shape
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.A, self.B = new_parameter(layer, *experts, rank, width), new_parameter(layer, *experts, out, rank)
        self.magnitude = new_parameter(layer, *experts, out) if dora else None
        # Sums over the ranks that have parts of the inputs; core/tensor_parallel.py sets it.
        self.sum_inputs = lambda x: x

    def initialise(self, layer: "Linear | ExpertLinear", generator: torch.Generator, layout):
        """Draw A as nn.Linear draws its weight (Kaiming-uniform with a = sqrt(5)). B is 0 and m the norms of W's rows,
        so that the layer computes what it did without an adapter."""
        bound = 1 / math.sqrt(self.A.shape[-1])
        drawn = torch.empty(self.A.shape, device="cpu").uniform_(-bound, bound, generator=generator)
        self.A.copy_(layout(drawn, self.A))
        self.B.zero_()
        if self.magnitude is not None:
            norms = torch.linalg.vector_norm(layer.gather_base(), dim=-1, dtype=self.B.dtype)
            self.magnitude.copy_(layout(norms, self.magnitude))

    @torch.no_grad()
    def merged_norms(self, weight: torch.Tensor) -> torch.Tensor:
        """The norm of each row of W + s B A, [out], without making a matrix of W's size. For a row w of W and the row b
        of B it is |w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b."""
        with torch.autocast(weight.device.type, enabled=False):
            a, b = self.A, self.B
            norms = torch.linalg.vector_norm(weight, dim=-1, dtype=b.dtype)
            cross = ((weight @ a.to(weight.dtype).mT).to(b.dtype) * b).sum(-1)
            square = norms * norms + 2 * self.scale * cross + self.scale**2 * ((b @ (a @ a.mT)) * b).sum(-1)
            return self.sum_inputs(square).clamp(min=TINY).sqrt()

    def merge_into(self, weight: torch.Tensor) -> torch.Tensor:
        merged = weight.to(self.B.dtype) + self.scale * (self.B @ self.A)
        if self.magnitude is not None:
            merged *= (self.magnitude / merged.norm(dim=-1).clamp(min=TINY)).unsqueeze(-1)
        return merged.to(weight.dtype)


class TableRows(nn.Module):
    """Trained rows [n, D] that replace the base's rows of some tokens in an embedding or head; without `token_ids`,
    those of all tokens. Gradients, weight decay and the optimizer's moments exist for these n rows alone.

    slots[token] is the place of the token's trained row, or -1: for the token ids 7 and 9, slots[7] = 0, slots[9] = 1.
    """

    def __init__(self, layer: "Embedding | Head", token_ids: list[int] | None):
        super().__init__()
        self.token_ids, (vocab_size, width) = token_ids, layer.kept.shape
        self.rows = new_parameter(layer, vocab_size if token_ids is None else len(token_ids), width)
        self.peft_suffixes = {"rows": ".weight" if token_ids is None else ".token_adapter.trainable_tokens_delta"}
        if token_ids is not None:
            for name, length in (("ids", len(token_ids)), ("slots", vocab_size)):
                self.register_buffer(name, torch.empty(length, dtype=torch.int64, device=layer.device))
            self.fill_buffers()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.token_ids is not None:
            # After to_empty(), through which a model from the meta device goes, buffers hold anything.
            self.fill_buffers()
        return self

    def fill_buffers(self):
        self.ids.copy_(torch.tensor(self.token_ids))
        self.slots.fill_(-1)[self.ids] = torch.arange(len(self.token_ids), device=self.ids.device)

    def initialise(self, layer: "Embedding | Head", generator: torch.Generator, layout):
        base = layer.gather_base()
        if self.token_ids is not None:
            base = base[self.ids]
        self.rows.copy_(layout(base, self.rows))

    def merge_into(self, weight: torch.Tensor) -> torch.Tensor:
        rows = self.rows.to(weight.dtype)
        return rows if self.token_ids is None else weight.index_copy(0, self.ids, rows)

    def look_up(self, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [...] -> their rows [..., D], each trained or the base's."""
        if self.token_ids is None:
            return F.embedding(tokens, self.rows).to(weight.dtype)
        slot = self.slots[tokens]
        trained = F.embedding(slot.clamp(min=0), self.rows).to(weight.dtype)
        return torch.where((slot >= 0).unsqueeze(-1), trained, F.embedding(tokens, weight))


# ---- the layers

class Adapted(nn.Module):
    """A frozen layer with adapters by name."""

    def __init__(self, old: nn.Module):
        super().__init__()
        self.train(old.training)
        # register_parameter would read the attribute first, which in Head is a property that needs this parameter.
        self._parameters["weight"] = old.weight
        # A FourBit or EightBit that takes the place of the parameter.
        self.quantised = None
        self.adapters = nn.ModuleDict()
        self.active_name = None

    @property
    def kept(self) -> nn.Parameter | FourBit | EightBit:
        """W as it is stored: the parameter, or its quantised form, which has `shape` and `dtype` too."""
        return self._parameters["weight"] if self.quantised is None else self.quantised

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def compress(self, kind: str, double_quant: bool, device=None):
        """Quantise the weight as `kind` (nf4, int4 or int8), on `device` if one is given; UserError on NaN."""
        weight = self.weight.detach().to(device or self.device)
        self.quantised = EightBit(weight) if kind == "int8" else FourBit(weight, kind, double_quant)
        self.weight = None

    def base_weight(self) -> torch.Tensor:
        """W; a quantised one is dequantised to fp32."""
        return self.kept.detach() if self.quantised is None else self.kept.dequantise()

    def gather_base(self) -> torch.Tensor:
        """The full W. A collective where it is sharded."""
        return gather(self.kept.detach()) if self.quantised is None else self.kept.dequantise(form=gather)

    @property
    def adapter(self) -> nn.Module | None:
        """The active adapter, or None where this layer has none of that name."""
        return self.adapters[self.active_name] if self.active_name in self.adapters else None  # noqa: SIM401 (no dict)

    def merged_weight(self) -> torch.Tensor:
        """W with the active adapter in it; gradients reach the adapter."""
        return self.kept if self.adapter is None else self.adapter.merge_into(self.kept)


class Linear(Adapted):
    """x [..., in] -> [..., out]. One call of kernels.lora_linear computes all layers of one input with their adapters.
    With dropout or int8 weights it cannot: then the base's matmul is followed by the adapter's two."""

    def __init__(self, old: nn.Linear):
        super().__init__(old)
        self.register_parameter("bias", old.bias)

    def forward(self, x):
        return self.apply_together(x, [self])[0]

    @staticmethod
    def apply_together(x: torch.Tensor, layers) -> list[torch.Tensor]:
        """layer(x) of each of `layers`, some of which may be plain nn.Linear. One call for all that can be fused."""
        fused = [layer for layer in layers if isinstance(layer, Linear)
                 and (isinstance(layer.quantised, FourBit) or layer.fused_adapter is not None)]
        done = dict(zip(fused, lora_linear(x, *zip(*(layer.fused_operands(x) for layer in fused))) if fused else ()))
        return [layer.finish(x, done.get(layer)) if isinstance(layer, Linear) else layer(x) for layer in layers]

    @property
    def fused_adapter(self) -> LowRank | None:
        """The active adapter where a fused call can compute it; not with dropout, nor on an int8 base."""
        drops = self.training and getattr(self.adapter, "dropout", 0) > 0
        return None if drops or isinstance(self.quantised, EightBit) else self.adapter

    def bias_of_base(self) -> torch.Tensor | None:
        """The bias that the base's matmul adds. With DoRA it comes later, because the factor does not apply to it."""
        return self.bias if self.adapter is None or self.adapter.magnitude is None else None

    def fused_operands(self, x) -> tuple:
        """(weight, bias, A, B, scale) for kernels.lora_linear; A and B of rank 0 where no adapter is fused."""
        weight, adapter = self.weight if self.quantised is None else self.quantised.record(), self.fused_adapter
        if adapter is None:
            return weight, self.bias_of_base(), x.new_empty(0, x.shape[-1]), x.new_empty(self.kept.shape[0], 0), 1.0
        return weight, self.bias_of_base(), adapter.A, adapter.B, adapter.scale

    def apply_base(self, x):
        """W x + bias of a plain or int8 weight."""
        if self.quantised is None:
            return F.linear(x, self.weight, self.bias_of_base())
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        y = EightBitMatmul.apply(x, self.quantised.codes, self.quantised.scale)
        return y if self.bias_of_base() is None else y + self.bias_of_base().to(y.dtype)

    def finish(self, x, y=None):
        """The layer's output. y: the output of a fused call; None: the matmuls are done here."""
        adapter, y = self.adapter, self.apply_base(x) if y is None else y
        if adapter is None:
            return y
        if self.fused_adapter is None:
            x = F.dropout(x, adapter.dropout, self.training)
            y = y + adapter.scale * F.linear(F.linear(x, adapter.A.to(x.dtype)), adapter.B.to(x.dtype))
        if adapter.magnitude is not None:
            # The factor stays fp32, because it is near 1 and bf16 would round its small changes away.
            y = (y * (adapter.magnitude / adapter.merged_norms(self.base_weight()))).to(y.dtype)
            y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y


class ExpertLinear(Adapted):
    """The linear layer of every expert (moe.py): x [n, in], sorted by expert, and offsets [E], where the rows of each
    expert end -> [n, out]. Experts without a row have an adapter all the same, whose gradient is 0."""

    def forward(self, x, offsets):
        adapter, y = self.adapter, self.apply_base(x, offsets)
        if adapter is None:
            return y
        low = grouped_mm(F.dropout(x, adapter.dropout, self.training), adapter.A.to(x.dtype), offsets)
        y = y + adapter.scale * grouped_mm(low, adapter.B.to(low.dtype), offsets)
        if adapter.magnitude is not None:
            factor = adapter.magnitude / adapter.merged_norms(self.base_weight())               # [E, out]
            expert = torch.searchsorted(offsets, torch.arange(len(x), device=x.device), right=True)
            y = (y * factor[expert]).to(y.dtype)
        return y

    def apply_base(self, x, offsets):
        if self.quantised is None:
            return grouped_mm(x, self.weight, offsets)
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        return CompressedMatmul.apply(x, self.quantised, offsets)


class Embedding(Adapted):
    """tokens [...] -> their rows [..., D]."""

    def forward(self, tokens):
        return F.embedding(tokens, self.weight) if self.adapter is None else self.adapter.look_up(self.weight, tokens)


class Head(Adapted):
    """hidden [..., D] -> logits [..., V]. The training loss makes no logits: it reads `head.weight`, which therefore
    has the active adapter in it. Where the base is sharded it is the parameter, which FSDP looks for by this name."""

    def __init__(self, old: nn.Linear, embedding: Embedding | None):
        super().__init__(old)
        # In a list, because an attribute would make the embedding a submodule of the head.
        self.tied_to = [embedding] if embedding else []

    @property
    def weight(self):
        if hasattr(self.kept, "full_tensor"):
            return self.kept
        return self.tied_to[0].merged_weight() if self.tied_to else self.merged_weight()

    def forward(self, hidden):
        return F.linear(hidden, self.weight)


# ---- the layers of a model

def adapted_layers(model: nn.Module) -> list[tuple[str, Adapted]]:
    """(path, layer) of every layer of ours."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, Adapted)]


def active_layers(model: nn.Module) -> list[tuple[str, Adapted]]:
    """(path, layer) of every layer on which the active adapter is."""
    return [(path, layer) for path, layer in adapted_layers(model) if layer.adapter is not None]


def count_elements(model: nn.Module) -> tuple[int, int]:
    """(elements that train, elements of the base). A weight in few bits counts as the elements that it stands for."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(p.numel() for name, p in model.named_parameters()
               if ".adapters." not in name and ".quantised." not in name)
    return trained, base + sum(layer.kept.shape.numel() for _, layer in adapted_layers(model) if layer.quantised)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of what can have a low-rank adapter: not the head, whose forward is not called in training."""
    return {path: module for path, module in model.named_modules()
            if isinstance(module, (nn.Linear, Linear, moe.ExpertLinear, ExpertLinear)) and path != "head"}


def is_tied(model: nn.Module) -> bool:
    return model.head._parameters["weight"] is model.embed_tokens._parameters["weight"]


def replace_layer(model: nn.Module, path: str) -> Adapted:
    """Our layer at `path`, put in the place of PyTorch's if it is not there yet."""
    old = model.get_submodule(path)
    if isinstance(old, Adapted):
        return old
    if path == "head":
        new = Head(old, replace_layer(model, "embed_tokens") if is_tied(model) else None)
    else:
        kinds = {nn.Embedding: Embedding, moe.ExpertLinear: ExpertLinear}
        new = kinds.get(type(old), Linear)(old)
    model.set_submodule(path, new)
    return new


def add_adapter(model: nn.Module, name: str, settings: dict[str, dict]):
    """Freeze the model and give it the adapter `name`, whose tensors are still to be filled; it becomes active.

    settings: {path of a layer: those of its LowRank or, of "embed_tokens" and "head", of its TableRows}. UserError
    where the name is no word or is taken.
    """
    if not re.fullmatch(r"\w+", name) or hasattr(nn.ModuleDict, name):
        raise UserError(f"an adapter cannot be called {name!r}; use letters, digits and _")
    if any(name in layer.adapters for _, layer in adapted_layers(model)):
        raise UserError(f"the model has an adapter {name!r} already; give this one another name")
    model.requires_grad_(False)
    for path, own in settings.items():
        layer = replace_layer(model, path)
        layer.adapters[name] = (LowRank if isinstance(layer, (Linear, ExpertLinear)) else TableRows)(layer, **own)
    if "embed_tokens" in settings and is_tied(model):
        replace_layer(model, "head")
    activate(model, name)


def activate(model: nn.Module, name: str | None):
    """Make the adapter `name` the one that computes and is trained, and no other; None: the base alone."""
    known = sorted({name for _, layer in adapted_layers(model) for name in layer.adapters})
    if name is not None and name not in known:
        raise UserError(f"the model has no adapter {name!r}; it has {', '.join(known) or 'none'}")
    for _, layer in adapted_layers(model):
        layer.active_name = name
        for key, adapter in layer.adapters.items():
            adapter.requires_grad_(key == name)


@contextmanager
def disabled(model: nn.Module):
    """In this context the model is its base: a teacher that costs no memory. For passes without gradients alone: the
    backward pass comes after the context, and recomputed blocks would have the adapter again."""
    active_names = {layer: layer.active_name for _, layer in adapted_layers(model)}
    try:
        for layer in active_names:
            layer.active_name = None
        yield model
    finally:
        for layer, name in active_names.items():
            layer.active_name = name
