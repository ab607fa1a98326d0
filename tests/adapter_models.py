"""What the tests of adapters share: kinds of adapters, small models with one, and three steps of training."""

import json

import torch
import torch.nn.functional as F

import hf
import kernels
import lora
from learn.optim import OptimConfig, make_optimizer
from learn.peft_files import save_adapter
from lora import LoraConfig

EXACT = 1e-5
KINDS = {                                     # LoraConfig's fields, and the same in PEFT's
    "lora": ({}, {}),
    "rslora": ({"rslora": True}, {"use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "dora_rslora": ({"dora": True, "rslora": True}, {"use_dora": True, "use_rslora": True}),
    "some": ({"targets": ["q_proj", "layers.1.mlp.up_proj"]}, {"target_modules": ["q_proj", "layers.1.mlp.up_proj"]}),
    "ranks": ({"ranks": ["down_proj=5", "layers.1.*=2"]},
              {"rank_pattern": {r"model.layers.1\..*": 2, "down_proj": 5}}),
    "full": ({"embeddings": "full"}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "rows": ({"embeddings": "rows", "embedding_rows": "7,90:", "dora": True},
             {"trainable_token_indices": {name: [7, *range(90, 97)] for name in ("embed_tokens", "lm_head")},
              "use_dora": True}),
}
MODELS = {"llama": ("llama", {}), "biases": ("qwen2", {}), "qk_norm": ("qwen3", {"head_dim": 16}),
          "tied": ("llama", {"tie_word_embeddings": True})}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tokens(rows=2, length=30, size=97, seed=1):
    return torch.randint(0, size, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model, x):
    return model.head(model(x))


def close(a, b, tolerance=EXACT):
    return (a - b).abs().max() <= tolerance * b.abs().max()


def stir(parameters, seed=3):
    """Other numbers of the same size in everything trained; B, which is zero, gets some."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            if p.requires_grad:
                p += 0.3 * (p.abs().mean() + 0.1) * torch.randn(p.shape, generator=generator)


def loss_of(scores, x):
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def adapted(build, config, seed=0, **attach):
    model = build()
    lora.attach(model, config, seed, **attach)
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train_some(model, x, steps=3, lr=1e-2, weight_decay=0.5):
    """A few steps as train.py makes them: the loss without logits, AdamW with decay."""
    optimizer = make_optimizer(model, OptimConfig(lr=lr, weight_decay=weight_decay))
    model.train()
    for _ in range(steps):
        loss, _, _ = kernels.linear_cross_entropy(model(x[:, :-1]), model.head.weight, x[:, 1:])
        (loss / x[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def theirs_of(peft, transformers_model, kind, **changes):
    settings = {"r": 4, "lora_alpha": 16, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **KINDS[kind][1]}
    if "modules_to_save" in settings and transformers_model.config.tie_word_embeddings:
        settings |= {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    return peft.get_peft_model(transformers_model, peft.LoraConfig(**settings | changes))


def write_adapter(folder, tiny_model):
    """(base folder, adapter folder), the base in bf16."""
    hf.save(tiny_model().bfloat16(), folder / "base")
    model = adapted(lambda: hf.load(folder / "base"), LoraConfig(rank=4))
    stir(model.parameters())
    save_adapter(model, folder / "adapter", str(folder / "base"))
    return folder / "base", folder / "adapter"


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
