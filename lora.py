"""Adapters (LoRA, rsLoRA, DoRA, LoRA+, QLoRA): a frozen base and a few trained tensors beside it, in PEFT's files.

    python lora.py merge --base DIR --adapter DIR --out DIR        base and adapter as one Hugging Face folder

`attach` freezes a model and replaces its linear layers by those of learn/adapters.py, where the formulas are. LoRA+
(arXiv 2402.12354) gives B a learning rate of its own; QLoRA (2305.14314) keeps W in 4 bits. Embedding and head are
trained as a copy, in full or of some tokens' rows, so that the base stays as it was.
"""

import core.threads

import hashlib
import re
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

import hf
import moe
from core import cli
from core.config import setting
from core.devices import DTYPES
from core.errors import UserError, nearest
from core.files import claim_folder
from learn import adapters
from learn.peft_files import TENSORS, load_adapter


@dataclass
class LoraConfig:
    rank: int = setting(0, at_least=0, at_most=2**14)
    """Rank r of the adapters; 0: no adapter, all weights are trained. 8 is usual, 128 to 256 for much new text."""
    alpha: float = setting(16.0, above=0, at_most=1e6)
    """B A x is multiplied by alpha / rank."""
    targets: list[str] = field(default_factory=list)
    """Linear layers to adapt, by name ("q_proj", "layers.0.mlp.up_proj") or pattern ("layers.1?.*"); empty: all."""
    ranks: list[str] = field(default_factory=list)
    """Other ranks by name or pattern, "down_proj=16" "layers.0.*=4"; the last that matches a layer counts."""
    dropout: float = setting(0.0, at_least=0, below=1)
    """Dropout on the adapters' input. It costs the fused matmuls."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead of alpha / rank, which suits large ranks."""
    dora: bool = False
    """Train length and direction of each weight row apart: a little better at small ranks, and slower."""
    b_lr_ratio: float = setting(1.0, above=0, at_most=1e6)
    """LoRA+: learning rate of B divided by that of A. The paper has 16."""
    embeddings: Literal["frozen", "rows", "full"] = "frozen"
    """How embedding and head are trained; rows: only those of embedding_rows."""
    embedding_rows: str = ""
    """Token ids, e.g. "32000:" for all from 32000 on, or "32000:32512,7"."""
    embedding_lr_ratio: float | None = setting(None, above=0, at_most=1e6)
    """Learning rate of embedding and head divided by optim.lr. Default: 0.1 with full, 1 with rows."""
    base: Literal["plain", "nf4", "int4", "int8"] = "plain"
    """How the blocks' frozen weights are kept: as loaded, in 4 bits (normal quantiles, or even steps), or in 8."""
    double_quant: bool = True
    """With nf4 and int4: 4.13 bits per weight instead of 4.5."""

    def __post_init__(self):
        if (self.embeddings == "rows") != bool(self.embedding_rows):
            raise UserError(f"lora.embeddings is {self.embeddings!r} and lora.embedding_rows {self.embedding_rows!r}; "
                            f"to train some rows give both, e.g. rows and \"32000:\"")
        for entry in self.ranks:
            if not re.fullmatch(r"[^=]+=[1-9]\d*", entry):
                raise UserError(f"lora.ranks has {entry!r}, but needs NAME=RANK, e.g. down_proj=16")


# ---- attaching

def choose_ranks(model: nn.Module, config: LoraConfig) -> dict[str, int]:
    """{path: rank} of the linear layers that get an adapter; UserError where a pattern matches none."""
    paths = list(adapters.linear_layers(model))

    def find(pattern):
        found = {path for path in paths if f".{path}".endswith(f".{pattern}") or fnmatchcase(path, pattern)}
        if not found:
            short = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
            raise UserError(f"lora: no linear layer is called {pattern!r}{nearest(pattern, short)}; there are "
                            f"{', '.join(short)}, e.g. {paths[0]} (embedding and head: lora.embeddings)")
        return found

    targets = set().union(*map(find, config.targets)) if config.targets else paths
    ranks = {path: config.rank for path in paths if path in targets}
    for pattern, _, rank in (entry.rpartition("=") for entry in config.ranks):
        ranks |= {path: int(rank) for path in find(pattern) if path in ranks}
    return ranks


def parse_token_ids(text: str, vocab_size: int) -> list[int]:
    """ "5,8:10,30:" with a vocabulary of 32 -> [5, 8, 9, 30, 31]"""
    ids = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(:(\d*))?\s*", part)
        first, has_end, end = (int(match[1]), match[2], match[3]) if match else (0, True, "0")
        end = int(end or vocab_size) if has_end else first + 1
        if not first < end <= vocab_size:
            raise UserError(f"lora.embedding_rows has {part!r}, but needs token ids below {vocab_size:,}, e.g. 7 or "
                            f"\"{max(0, vocab_size - 512)}:\" for all from there on")
        ids |= set(range(first, end))
    return sorted(ids)


def attach(model: nn.Module, config: LoraConfig, seed: int, device=None):
    """Freeze `model` and give it the adapter `default`, drawn from `seed`, which becomes active.

    At first the model computes what it did, bit for bit unless its weights are quantised. On the meta device nothing is
    drawn: call `initialise` once the base's weights are there. Weights are quantised on `device`, one layer at a time,
    so that the plain ones need not fit there together.
    """
    on_meta = any(p.is_meta for p in model.parameters())
    settings = {"alpha": config.alpha, "rslora": config.rslora, "dora": config.dora, "dropout": config.dropout}
    chosen = {path: {"rank": rank, **settings} for path, rank in choose_ranks(model, config).items()}
    if config.embeddings != "frozen":
        rows = config.embedding_rows
        token_ids = parse_token_ids(rows, model.embed_tokens.weight.shape[0]) if rows else None
        for table in ["embed_tokens"] if adapters.is_tied(model) else ["embed_tokens", "head"]:
            chosen[table] = {"token_ids": token_ids}
    if config.base != "plain":
        for path in adapters.linear_layers(model):
            adapters.replace_layer(model, path).compress(config.base, config.double_quant, device)
    adapters.add_adapter(model, "default", chosen)
    if not on_meta:
        initialise(model, seed)


@torch.no_grad()
def initialise(model: nn.Module, seed: int, layout=lambda full, parameter: full):
    """Draw the active adapter. A tensor depends on the seed, the path of its layer and the adapter's name alone: it is
    the same in any sharding, whichever other layers have adapters. layout(full, parameter): as in hf.fill."""
    for path, layer in adapters.active_layers(model):
        key = hashlib.blake2b(f"{seed}/{path}/{layer.active_name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        layer.adapter.initialise(layer, generator, layout)


def lr_scales(model: nn.Module, config: LoraConfig) -> dict[str, float]:
    """{parameter: its learning rate divided by optim.lr}, of every B, embedding and head that is trained."""
    default = 0.1 if config.embeddings == "full" else 1.0
    ratios = {"B": config.b_lr_ratio, "rows": config.embedding_lr_ratio or default}
    return {f"{path}.adapters.{layer.active_name}.{leaf}": ratios[leaf] for path, layer in adapters.active_layers(model)
            for leaf, _ in layer.adapter.named_parameters() if leaf in ratios}


def trainable_share(model: nn.Module) -> str:
    """ "65,536 of 16,777,216 parameters trained (0.39 %)" of an adapted model: the base's are the 100 %."""
    trained, total = adapters.count_elements(model)
    quantised = [layer.quantised for _, layer in adapters.adapted_layers(model) if layer.quantised]
    text = f"{trained:,} of {total:,} parameters trained ({100 * trained / total:.2f} %)"
    if any(isinstance(module, moe.Router) for module in model.modules()):
        text += "; the router of the experts is frozen"
    if quantised:
        size = sum(tensor.nbytes for weight in quantised for tensor in weight.state_dict().values())
        elements = sum(weight.shape.numel() for weight in quantised)
        text += f"; {size / 1e6:,.1f} MB of quantised weights, {8 * size / elements:.2f} bits each"
    return text


# ---- merging, and its command

def advise_serving(settings: dict, folder, base: str = "BASE") -> list[str]:
    """Two lines, for vLLM and llama.cpp: the command that serves an adapter with these settings, or why none does.

    Read in 2026 in vLLM's lora/peft_helper.py and llama.cpp's convert_lora_to_gguf.py: vLLM takes LoRA and rsLoRA up to
    a rank that it is told, but no DoRA, no trained embeddings and no patterns; llama.cpp takes lora_A and lora_B alone,
    one alpha for all, and scales by alpha / r even where rsLoRA is meant.
    """
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


@torch.no_grad()
def merge(model: nn.Module):
    """Put the active adapter into the base's weights, rounded once from fp32 or wider, and take it off the model."""
    if any(layer.quantised is not None for _, layer in adapters.adapted_layers(model)):
        raise UserError("a quantised base would round the adapter away; merge it into the full weights: "
                        "python lora.py merge --base DIR --adapter DIR --out DIR")
    for _, layer in adapters.active_layers(model):
        layer.kept.copy_(layer.merged_weight())
        del layer.adapters[layer.active_name]


@torch.no_grad()
def merge_folders(base, adapter, out, dtype: torch.dtype | None = None, any_base: bool = False, **options) -> dict:
    """Write a base (a Base, folder or hf:// id) and an adapter (folder or hf:// id) as one Hugging Face folder, summed
    in fp32 and rounded to `dtype`, the base's by default. options: of hf.save, such as card and tokenizer. The result
    says how far the rounding moved the logits of 64 random tokens, and which servers take the adapter by itself."""
    base = hf.open_base(base)
    dtype = dtype or base.dtype
    model = hf.load(base).eval()
    settings = load_adapter(model, adapter)
    with hf.open_tensors(hf.open_base(adapter).folder / TENSORS) as file:
        own = (file.metadata() or {}).get("base_fingerprint")
    if own not in (None, base.fingerprint) and not any_base:
        raise UserError(f"{adapter} was trained on another base than {base} (fingerprints differ): "
                        f"{settings.get('base_model_name_or_path')}; merge it there, or add --any-base")
    trained = trainable_share(model)
    tokens = torch.randint(model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    logits = model.head(model(tokens))
    merge(model)
    for weight in model.parameters():
        weight.copy_(weight.to(dtype))
    difference = (model.head(model(tokens)) - logits).abs().max().item()
    hf.save(model, out, base=base, state={name: p.to(dtype) for name, p in model.named_parameters()}, **options)
    return {"out": str(out), "trained": trained, "dtype": str(dtype).removeprefix("torch."), "largest_logit_difference":
            difference, "largest_logit": logits.abs().max().item(),
            "handoff": advise_serving(settings, adapter, base.name)}


@dataclass(kw_only=True)
class Merge:
    """Write base and adapter as one Hugging Face folder."""
    base: str
    """The full-precision base: a folder or an hf:// id."""
    adapter: str
    """A folder in PEFT's format, ours or PEFT's own."""
    dtype: cli.Dtype | None = None
    """The type of the weights written. Default: the base's."""
    any_base: bool = False
    """Merge also onto another base than the adapter's own."""
    output: cli.Output


def merge_command(options: Merge) -> dict:
    out = options.output.out
    with claim_folder(out, options.output.overwrite, hf.FOLDER):
        result = merge_folders(options.base, options.adapter, out, DTYPES.get(options.dtype), options.any_base)
    print(f"{result['trained']}\n{out}: merged in fp32, written in {result['dtype']}; largest logit difference "
          f"{result['largest_logit_difference']:.2g} of logits up to {result['largest_logit']:.3g}, 64 random tokens")
    print("the adapter by itself:", *result["handoff"], sep="\n  ")
    return result


def main() -> int:
    return cli.run("lora.py", __doc__, {"merge": (Merge, merge_command)})


if __name__ == "__main__":
    sys.exit(main())
