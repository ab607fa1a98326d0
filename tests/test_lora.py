"""lora.py against PEFT (forward, gradients and files, both ways) and against laws.

Laws: an adapter changes nothing at first and nothing outside what it trains, bit for bit; merged and apart agree;
recomputed blocks and shards change nothing; a quantised layer is the plain layer of its dequantised weights.
Tolerance: fp32 sums in another order, 1e-5 of the largest number.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import hf
import kernels
import lora
from core import parallel
from core.config import main_guard, parse
from learn import objectives
from learn.optim import OptimConfig, make_optimizer
from lora import LoraConfig
from model import Model

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*gradient_checkpointing"),
              pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")]
ROOT = Path(__file__).resolve().parent.parent
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


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="the truth is PEFT")


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


def train_some(model, x, steps=3, lr=1e-2):
    """A few steps as train.py makes them: the loss without logits, AdamW with decay."""
    optimizer = make_optimizer(model, OptimConfig(lr=lr, weight_decay=0.5))
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


def peft_gradients(model) -> dict:
    """{key of PEFT's file: gradient}"""
    out = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            key = name.replace(".default", "").replace(".modules_to_save", "").replace("_vector.weight", "_vector")
            out[key] = p.grad
    return out


# ---- PEFT

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_trained_here_is_the_same_in_peft(hf_model, peft, tmp_path, name, kind):
    """Step 0 is the base; then PEFT's logits, and its gradient of every adapter, from our file."""
    family, options = MODELS[name]
    transformers_model, base = hf_model(family, **options)
    x, config = tokens(), LoraConfig(rank=4, b_lr_ratio=4.0, **KINDS[kind][0])
    model = adapted(lambda: hf.load(base).eval(), config)
    with torch.no_grad():
        start = logits(model, x)
        if not (name == "biases" and config.dora):         # W x + b in one call rounds once less
            assert torch.equal(start, logits(hf.load(base), x))
        assert close(start, transformers_model(x).logits)
    train_some(model, x)
    lora.save(model, tmp_path / "adapter", str(base))
    theirs = peft.PeftModel.from_pretrained(transformers_model, tmp_path / "adapter", is_trainable=True)
    scores, truth = logits(model, x), theirs(x).logits
    assert not close(scores, start, 0.01)
    assert close(scores, truth)
    loss_of(scores, x).backward()
    loss_of(truth, x).backward()
    wanted, names = peft_gradients(theirs), lora.peft_names(model)
    assert set(names.values()) == wanted.keys()
    for ours, key in names.items():
        assert close(model.get_parameter(ours).grad, wanted[key], 3 * EXACT), key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_what_peft_saves_is_the_same_here(hf_model, peft, tmp_path, name, kind):
    """Its logits from its files, and its own keys, tensors and settings again when we save them."""
    family, options = MODELS[name]
    transformers_model, base = hf_model(family, **options)
    x, theirs = tokens(), theirs_of(peft, transformers_model, kind, lora_dropout=0.1).eval()
    stir(theirs.parameters())
    theirs.save_pretrained(tmp_path / "theirs")
    model = hf.load(base).eval()
    settings = lora.load(model, tmp_path / "theirs")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".adapters." not in n)
    with torch.no_grad():
        assert close(logits(model, x), theirs(x).logits)
    lora.save(model, tmp_path / "ours", "org/base")
    a, b = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "ours"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    said = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "org/base"
    for key in ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "bias"):
        assert said[key] == settings[key], key


def test_a_real_model(data_dir, peft, tmp_path):
    transformers = pytest.importorskip("transformers")
    base = data_dir / "models/stories260K"
    x = tokens(size=512)
    config = LoraConfig(rank=8, dora=True, embeddings="rows", embedding_rows="500:")
    model = adapted(lambda: hf.load(base), config)
    train_some(model, x)
    lora.save(model, tmp_path / "adapter", str(base))
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base).eval(),
                                            tmp_path / "adapter")
    with torch.no_grad():
        scores = logits(model, x)
        assert close(scores, theirs(x).logits)
        assert close(scores, theirs.merge_and_unload()(x).logits)
        lora.merge(model)
        assert close(logits(model, x), scores)


def test_alpha_patterns_and_a_bare_list_of_tokens(hf_model, peft, tmp_path):
    transformers_model, base = hf_model("llama", tie_word_embeddings=True)
    theirs = peft.get_peft_model(transformers_model, peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=LINEARS, task_type="CAUSAL_LM", alpha_pattern={"q_proj": 32, "k_proj": 5},
        trainable_token_indices=[5, 3])).eval()
    stir(theirs.parameters())
    theirs.save_pretrained(tmp_path / "theirs")
    model = hf.load(base).eval()
    lora.load(model, tmp_path / "theirs")
    x = tokens()
    with torch.no_grad():
        assert close(logits(model, x), theirs(x).logits)
    said = lora.peft_config(model, "base")
    assert (said["lora_alpha"], said["alpha_pattern"]) == (8, {"q_proj": 32.0, "k_proj": 5.0})
    assert said["trainable_token_indices"] == {"embed_tokens": [5, 3]}


# ---- what moves and what does not

@pytest.mark.parametrize("tied", [False, True])
def test_only_what_is_trained_moves(tiny_model, tied):
    """Three steps with strong decay: every number of the base stays bit for bit, and of new tokens' rows all move."""
    base = tiny_model(tie_word_embeddings=tied)
    config = LoraConfig(rank=2, embeddings="rows", embedding_rows="5,95:")
    model = adapted(lambda: tiny_model(tie_word_embeddings=tied), config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    x = tokens()
    x[0, :3] = torch.tensor([5, 95, 96])
    train_some(model, x)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (".adapters." not in name), name
    for name, p in base.named_parameters(remove_duplicate=False):
        raw = dict(model.named_parameters(remove_duplicate=False))[name]
        assert torch.equal(raw, p), name
    for current, frozen in ((model.head.weight, base.head.weight),
                            (lora.merged_state(model)["embed_tokens.weight"], base.embed_tokens.weight)):
        moved = (current != frozen).any(1)
        assert moved.nonzero().flatten().tolist() == [5, 95, 96]
    assert ("head.adapters.default.rows" in before) != tied
    x = torch.tensor([[95, 3, 5, 96]])
    assert torch.equal(model.embed_tokens(x), lora.merged_state(model)["embed_tokens.weight"][x])


def test_disabled_is_the_base_and_comes_back(tiny_model):
    config = LoraConfig(rank=3, dora=True, embeddings="full")
    model, x = adapted(tiny_model, config), tokens()
    train_some(model, x)
    with torch.no_grad():
        after, base = logits(model, x), logits(tiny_model(), x)
        with lora.disabled(model):
            assert torch.equal(logits(model, x), base)
            assert torch.equal(model.head.weight, tiny_model().head.weight)
        assert torch.equal(logits(model, x), after)
        with pytest.raises(RuntimeError), lora.disabled(model):
            raise RuntimeError
        assert torch.equal(logits(model, x), after)
    assert all(p.requires_grad for name, p in model.named_parameters() if ".adapters." in name)


def test_several_adapters_on_one_base(tiny_model, tmp_path):
    x, alone = tokens(), {}
    settings = {"one": LoraConfig(rank=2), "two": LoraConfig(rank=5, rslora=True, targets=["up_proj", "down_proj"]),
                "three": LoraConfig(rank=1, dora=True, embeddings="rows", embedding_rows="3")}
    for seed, (name, config) in enumerate(settings.items()):
        model = adapted(tiny_model, config, seed)
        stir(model.parameters(), seed)
        alone[name] = logits(model, x).detach()
        lora.save(model, tmp_path / name, "base")
    model = tiny_model()
    for name in settings:
        lora.load(model, tmp_path / name, name)
    for name in ("two", "three", "one", "three"):
        lora.switch(model, name)
        assert torch.equal(logits(model, x), alone[name])
        assert all(f".adapters.{name}." in n for n in trained(model))
        assert lora.state(model).keys() == load_file(tmp_path / name / "adapter_model.safetensors").keys()
    lora.switch(model, None)
    assert torch.equal(logits(model, x), logits(tiny_model(), x))
    with pytest.raises(ValueError, match=r"no adapter 'four'; it has one, three, two"):
        lora.switch(model, "four")
    with pytest.raises(ValueError, match=r"has an adapter 'two' already"):
        lora.load(model, tmp_path / "one", "two")
    with pytest.raises(ValueError, match=r"cannot be called 'a\.b'"):
        lora.load(model, tmp_path / "one", "a.b")


def test_a_is_drawn_as_nn_linear_draws_and_from_the_seed_and_its_name_alone(tiny_model):
    whole, other = (adapted(tiny_model, LoraConfig(rank=64), seed) for seed in (7, 8))
    one = adapted(tiny_model, LoraConfig(rank=64, targets=["v_proj"]), 7)
    name = "layers.1.self_attn.v_proj.adapters.default.A"
    a = whole.get_parameter(name)
    assert torch.equal(a, one.get_parameter(name))
    assert not torch.equal(a, other.get_parameter(name))
    assert not torch.equal(a, whole.get_parameter(name.replace("1", "2")))
    for p in (a, whole.get_parameter(name.replace("self_attn.v_proj", "mlp.down_proj"))):
        bound, n = 1 / math.sqrt(p.shape[1]), p.numel()          # kaiming_uniform_ with a = sqrt(5)
        assert p.abs().max() <= bound
        assert p.abs().max() > bound * (1 - 20 / n)
        assert abs(p.mean()) < 5 * bound / math.sqrt(3 * n)
        assert abs(p.var() * 3 / bound**2 - 1) < 5 / math.sqrt(n)
    assert not any(p.any() for n, p in whole.named_parameters() if n.endswith(".B"))


def test_the_share_that_is_trained():
    """The figures of LoRA's paper for one square matrix of 4096, r = 8; no memory is needed to count."""
    model = torch.nn.Sequential(torch.nn.Linear(4096, 4096, bias=False, device="meta"))
    lora.attach(model, LoraConfig(rank=8), 0)
    assert lora.trainable_share(model) == "65,536 of 16,777,216 parameters trained (0.39 %)"


def test_rates_of_their_own(tiny_model):
    config = LoraConfig(rank=2, b_lr_ratio=16, embeddings="full", targets=["q_proj"])
    model = adapted(tiny_model, config)
    scales = lora.lr_scales(model, config)
    assert scales.keys() <= trained(model).keys()
    assert scales == {name: 16 if name.endswith("B") else 0.1 for name in trained(model) if not name.endswith("A")}
    rows = LoraConfig(rank=2, embeddings="rows", embedding_rows="3")
    assert set(lora.lr_scales(adapted(tiny_model, rows), rows).values()) == {1.0}
    rows.embedding_lr_ratio = 0.5
    scales = lora.lr_scales(adapted(tiny_model, rows), rows)
    assert all(scale == (0.5 if name.endswith("rows") else 1) for name, scale in scales.items())
    assert [name for name in scales if name.endswith("rows")] == ["embed_tokens.adapters.default.rows",
                                                                  "head.adapters.default.rows"]


# ---- merging

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_merged_is_the_same_model(tiny_model, tmp_path, tied, kind):
    config = LoraConfig(rank=4, **KINDS[kind][0])
    model, x = adapted(lambda: tiny_model(tie_word_embeddings=tied), config), tokens()
    stir(model.parameters())
    with torch.no_grad():
        apart = logits(model, x)
        hf.save(model, tmp_path / "merged", state=lora.merged_state(model))
        assert close(logits(hf.load(tmp_path / "merged"), x), apart)
        assert close(logits(hf.load(tmp_path / "merged", torch.float64), x), apart.double())
        assert torch.equal(logits(model, x), apart)                  # merged_state changed nothing
        lora.merge(model)
        assert close(logits(model, x), apart)
        for what in (lora.merge, lora.state, lambda m: lora.switch(m, None), lambda m: lora.disabled(m).__enter__()):
            with pytest.raises(ValueError, match="unmerge it first"):
                what(model)
        lora.unmerge(model)
        assert torch.equal(logits(model, x), apart)
        lora.merge(model, keep=False)
        with pytest.raises(ValueError, match="nothing to unmerge; merge with keep=True"):
            lora.unmerge(model)


def test_a_half_precision_base_is_merged_in_fp32(tiny_model):
    """One rounding of the exact sum, not of the product and of the sum."""
    model = adapted(lambda: tiny_model().bfloat16(), LoraConfig(rank=4))
    stir(model.parameters())
    layer = model.layers[0].mlp.up_proj
    a, b, w = (p.detach().double() for p in (layer.adapter.A, layer.adapter.B, layer.weight))
    assert (layer.adapter.A.dtype, layer.weight.dtype) == (torch.float32, torch.bfloat16)
    merged = lora.merged_state(model)["layers.0.mlp.up_proj.weight"]
    assert merged.dtype == torch.bfloat16
    exact = w + 4 * b @ a
    assert ((merged.double() - exact).abs() <= 1.001 * 2.0**-8 * exact.abs()).all()


# ---- quantised bases

@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", ["nf4", "int4", "int8"])
def test_a_quantised_layer_is_the_layer_of_its_dequantised_weights(tiny_model, base, dora):
    """Logits and the gradients of adapters and embeddings; with and without an adapter."""
    config = LoraConfig(rank=4, base=base, dora=dora, embeddings="full", targets=["q_proj", "up_proj", "o_proj"])
    biases = {"attention_bias": True, "mlp_bias": True}
    model, x = adapted(lambda: tiny_model(**biases), config), tokens()
    plain = tiny_model(**biases)
    with torch.no_grad():
        for path, layer in lora.adapted(model):
            if layer.kept is not None:
                plain.get_parameter(f"{path}.weight").copy_(layer.base())
    assert sum(layer.kept is not None for _, layer in lora.adapted(model)) == 21
    base_logits = logits(plain, x).detach()
    config.base = "plain"
    lora.attach(plain, config, 0)
    with lora.disabled(model):
        assert close(logits(model, x), base_logits)
    for each in (model, plain):
        stir(each.parameters())
        loss_of(logits(each, x), x).backward()
    assert close(logits(model, x), logits(plain, x))
    assert trained(model).keys() == trained(plain).keys()
    for name, p in trained(model).items():
        assert close(p.grad, plain.get_parameter(name).grad, 3 * EXACT), name
    for refused in (lora.merge, lora.merged_state):
        with pytest.raises(ValueError, match=r"python lora\.py merge --base"):
            refused(model)


@pytest.mark.parametrize(("base", "double", "bits"), [
    ("nf4", True, 4 + 8 / 64 + 32 / (64 * 256)), ("int4", True, 4 + 8 / 64 + 32 / (64 * 256)),
    ("nf4", False, 4 + 32 / 64), ("int4", False, 4 + 32 / 64), ("int8", True, 8 + 32 / 512)])
def test_the_memory_of_a_quantised_base_is_what_arithmetic_says(base, double, bits):
    model = torch.nn.ModuleList(torch.nn.Linear(512, 1024, bias=False) for _ in range(2))
    lora.attach(model, LoraConfig(rank=1, base=base, double_quant=double), 0)
    size = sum(buffer.nbytes for buffer in model.buffers())
    tables = 0 if base == "int8" else 2 * (64 + double * (1024 + 4))
    assert size == 2 * 512 * 1024 * bits / 8 + tables
    assert sum(p.numel() for p in model.parameters()) == 2 * (512 + 1024)
    assert "3,072 of 1,048,576 parameters trained (0.29 %)" in lora.trainable_share(model)


def test_rounding_is_to_the_nearest_of_the_levels():
    """Half a step of the grid at most, by brute force over the levels, and zeros stay zero."""
    weight = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    layer = torch.nn.Linear(100, 7)
    layer.weight.data = weight
    kept = {}
    for how in ("int8", "int4"):
        new = lora.Linear(layer)
        new.compress(how, False)
        kept[how] = new.base()
    rows = weight.abs().amax(1, keepdim=True)
    grid = torch.arange(-127, 128) / 127
    nearest = (weight[..., None] - rows[..., None] * grid).abs().amin(-1)
    assert ((kept["int8"] - weight).abs() - nearest).abs().max() < 1e-6
    flat = F.pad(weight.flatten(), (0, -700 % 64)).view(-1, 64)
    grid = flat.abs().amax(1)[:, None] * torch.arange(-7, 8) / 7
    nearest = (flat[..., None] - grid[:, None]).abs().amin(-1).flatten()[:700].view(7, 100)
    assert ((kept["int4"] - weight).abs() - nearest).abs().max() < 1e-6
    assert not kept["int8"][2].any()
    assert not any(kept[how].isnan().any() for how in kept)


# ---- how it runs

@pytest.mark.parametrize("changes", [
    {}, {"dora": True}, {"dropout": 0.3}, {"dropout": 0.3, "dora": True, "base": "nf4"}, {"base": "int8"},
    {"embeddings": "rows", "embedding_rows": "3:9"}], ids=str)
def test_recomputed_blocks_give_the_same_gradients(tiny_model, changes):
    """Dropout's masks too: they are drawn again from the same state."""
    found = []
    for recompute in (False, True):
        model, x = adapted(tiny_model, LoraConfig(rank=4, **changes)), tokens()
        stir(model.parameters())
        model.train().checkpoint_blocks = recompute
        torch.manual_seed(5)
        loss_of(logits(model, x), x).backward()
        found.append({name: p.grad for name, p in trained(model).items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("base", ["plain", "nf4", "int8"])
def test_dropout_is_on_the_adapters_input_alone(base):
    """The mask of a seed, by hand; none of it in eval mode."""
    layer = torch.nn.Sequential(torch.nn.Linear(40, 6))
    lora.attach(layer, LoraConfig(rank=4, alpha=8, dropout=0.4, base=base), 0)
    stir(layer.parameters())
    x, a, b = torch.randn(50, 40), layer[0].adapter.A, layer[0].adapter.B
    weight, bias = layer[0].base(), layer[0].bias
    torch.manual_seed(9)
    found = layer.train()(x)
    torch.manual_seed(9)
    kept = (torch.empty_like(x).bernoulli_(0.6)) / 0.6
    assert close(found, x @ weight.T + bias + 2 * (x * kept) @ a.T @ b.T)
    assert close(layer.eval()(x), x @ weight.T + bias + 2 * x @ a.T @ b.T)


@pytest.mark.parametrize("base", ["plain", "nf4", "int8"])
@pytest.mark.parametrize("dora", [False, True])
def test_bf16_computes_what_fp32_does(tiny_model, base, dora):
    """Autocast over a bf16 base, and a model that is bf16 throughout; adapters and their gradients stay fp32."""
    config = LoraConfig(rank=4, base=base, dora=dora)
    x, found = tokens(), []
    for mode in ("fp32", "autocast", "bf16"):
        def build(mode=mode):
            rounded = tiny_model().bfloat16()
            return rounded if mode == "bf16" else rounded.float()
        model = adapted(build, config)
        if mode == "autocast" and base == "plain":
            for layer in model.layers:
                layer.bfloat16()
            for p in trained(model).values():
                p.data = p.data.float()
        stir(model.parameters())
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            scores = logits(model, x)
        loss_of(scores.float(), x).backward()
        found.append((scores.float(), {name: p.grad for name, p in trained(model).items()}))
    for scores, gradients in found[1:]:
        assert (scores - found[0][0]).norm() < 10 * 2.0**-8 * found[0][0].norm()       # ten roundings deep
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            assert F.cosine_similarity(gradient.flatten(), found[0][1][name].flatten(), 0) > 0.98, name


def test_a_row_of_zeros_has_a_magnitude_of_zero():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False))
    layer[0].weight.data[1] = 0
    lora.attach(layer, LoraConfig(rank=2, dora=True), 0)
    y = layer(torch.randn(3, 8))
    y.sum().backward()
    assert not y[:, 1].any()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


def test_projections_of_one_input_are_one_call(tiny_model, monkeypatch):
    calls = []

    def counted(x, weights, *rest):
        calls.append(len(weights))
        return kernels.lora_linear(x, weights, *rest)
    monkeypatch.setattr(lora, "lora_linear", counted)
    with torch.no_grad():
        logits(adapted(tiny_model, LoraConfig(rank=2)), tokens())
        assert calls == [3, 1, 2, 1] * 3                     # q/k/v, o, gate/up, down
        calls.clear()
        logits(adapted(tiny_model, LoraConfig(rank=2, targets=["q_proj", "v_proj"])), tokens())
        assert calls == [2] * 3


def test_the_causal_objective_trains_all_of_it(tiny_model):
    """Through objectives.py, which reads head.weight: the same gradients as from logits."""
    import numpy as np

    from data import Batch
    x = tokens(length=21)
    found = []
    for through in (True, False):
        model = adapted(tiny_model, LoraConfig(rank=2, embeddings="rows", embedding_rows="3:40"))
        stir(model.parameters())
        if through:
            batch = Batch(tokens=x[:, :-1], labels=x[:, 1:], position_ids=torch.arange(20).expand(2, 20),
                          doc_start=torch.zeros(2, 20, dtype=torch.int32), source=np.zeros(2, np.int64), rng=None)
            loss, n, _ = objectives.Causal(False).loss(model, batch)
            (loss / n).backward()
        else:
            loss_of(logits(model, x[:, :]), x).backward()
        found.append({name: p.grad for name, p in trained(model).items()})
    assert all(close(found[0][name], found[1][name]) for name in found[0])


FSDP = {"dora": {"dora": True}, "rows": {"embeddings": "rows", "embedding_rows": "3:9,90:"},
        "full": {"embeddings": "full"}}


def as_rank(folder: Path):
    """One of two FSDP2 ranks: built on the meta device, sharded, then filled and drawn; two steps, and its files."""
    world = parallel.start("cpu")
    for base in ("tied", "untied"):
        full = {name: p.detach() for name, p in hf.load(folder / base).named_parameters()}
        for kind, changes in FSDP.items():
            config = LoraConfig(rank=3, **changes)
            with torch.device("meta"):
                model = Model(hf.open_base(folder / base).config)
                lora.attach(model, config, 4)
            parallel.shard(model, world)
            model.to_empty(device="cpu")
            model.tie()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name in full:
                        p.copy_(parallel.like(full[name], p))
            lora.initialise(model, 4, parallel.like)
            train_some(model, tokens(), 2)
            gathered = parallel.model_state(model)
            if world.main:
                lora.save(model, folder / f"{base}_{kind}", "base", gathered)
                hf.save(model, folder / f"{base}_{kind}_merged", state=lora.merged_state(model, gathered))
            world.barrier()
    parallel.stop()


@pytest.mark.slow
def test_two_shards_are_one_model(tiny_model, tmp_path):
    for base in ("tied", "untied"):
        hf.save(tiny_model(tie_word_embeddings=base == "tied"), tmp_path / base)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           __file__, tmp_path], capture_output=True, text=True, timeout=200,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
                               "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for base in ("tied", "untied"):
        for kind, changes in FSDP.items():
            config = LoraConfig(rank=3, **changes)
            model = adapted(lambda base=base: hf.load(tmp_path / base), config, 4)
            train_some(model, tokens(), 2)
            theirs, ours = load_file(tmp_path / f"{base}_{kind}/adapter_model.safetensors"), lora.state(model)
            assert theirs.keys() == ours.keys()
            for key in ours:
                assert close(theirs[key], ours[key], 1e-4), key
            with torch.no_grad():
                merged = hf.load(tmp_path / f"{base}_{kind}_merged")
                assert close(logits(merged, tokens()), logits(model, tokens()), 1e-4)


# ---- the user's mistakes, and the command

@pytest.mark.parametrize(("changes", "says"), [
    ({"rank": -1}, "lora.rank is -1"),
    ({"rank": 8, "alpha": 0}, "lora.alpha 0"),
    ({"rank": 8, "dropout": 1.0}, "lora.dropout is 1.0"),
    ({"rank": 8, "embeddings": "rows"}, "give both"),
    ({"rank": 8, "embedding_rows": "3"}, "give both"),
    ({"rank": 8, "embeddings": "full", "embedding_lr_ratio": 0.0}, "lora.embedding_lr_ratio is 0.0"),
    ({"rank": 8, "ranks": ["q_proj"]}, "needs NAME=RANK"), ({"rank": 8, "ranks": ["q_proj=0"]}, "needs NAME=RANK")])
def test_settings_that_make_no_sense(changes, says):
    with pytest.raises(ValueError, match=says):
        LoraConfig(**changes)


@pytest.mark.parametrize(("changes", "says"), [
    ({"targets": ["k_porj"]}, r"no linear layer is called 'k_porj'; did you mean k_proj\?; there are q_proj, k_proj"),
    ({"targets": ["head"]}, "embedding and head: lora.embeddings"),
    ({"ranks": ["layers.7.*=3"]}, "no linear layer is called 'layers.7"),
    ({"embeddings": "rows", "embedding_rows": "97"}, "token ids below 97"),
    ({"embeddings": "rows", "embedding_rows": "90:98"}, "has '90:98'"),
    ({"embeddings": "rows", "embedding_rows": "5:5"}, "has '5:5'"),
    ({"embeddings": "rows", "embedding_rows": "new"}, "has 'new'")])
def test_names_and_rows_there_are_not(tiny_model, changes, says):
    with pytest.raises(ValueError, match=says):
        lora.attach(tiny_model(), LoraConfig(rank=2, **changes), 0)


def test_quantised_weights_are_not_sharded(tiny_config):
    with torch.device("meta"):
        model = Model(tiny_config())
    with pytest.raises(ValueError, match=r"use --parallel\.strategy ddp"):
        lora.attach(model, LoraConfig(rank=2, base="nf4"), 0)


def test_rows_are_written_as_slices():
    assert lora.row_ids("5, 8:10,30:", 32) == [5, 8, 9, 30, 31]
    assert lora.row_ids("0:", 3) == [0, 1, 2]


def test_it_is_a_section_of_a_recipe(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('rank = 8\nranks = ["down_proj=16"]\nembedding_lr_ratio = 1\n')
    config = parse(LoraConfig, [str(recipe), "--targets", "q_proj", "down_proj", "--base", "nf4", "--dora"])
    assert config == LoraConfig(rank=8, ranks=["down_proj=16"], targets=["q_proj", "down_proj"], base="nf4", dora=True,
                                embedding_lr_ratio=1.0)


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """(base folder, adapter folder), the base in bf16."""
    hf.save(tiny_model().bfloat16(), tmp_path / "base")
    model = adapted(lambda: hf.load(tmp_path / "base"), LoraConfig(rank=4))
    stir(model.parameters())
    lora.save(model, tmp_path / "adapter", str(tmp_path / "base"))
    return tmp_path / "base", tmp_path / "adapter"


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(("changes", "says"), [
    ({"peft_type": "IA3"}, "only LORA is supported"), ({"bias": "all"}, "has bias 'all'"),
    ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa'"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"), ({"r": None}, "does not say r")])
def test_adapters_that_mean_something_else(tiny_model, adapter, changes, says):
    edit(adapter[1] / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=says):
        lora.load(tiny_model(), adapter[1])


def test_adapters_that_do_not_fit(tiny_model, adapter):
    file = adapter[1] / "adapter_model.safetensors"
    good = load_file(file)
    with pytest.raises(ValueError, match="trained on another base"):
        lora.load(tiny_model(hidden_size=16, head_dim=8), adapter[1])
    with pytest.raises(ValueError, match=r"left over is .*layers\.2"):
        lora.load(tiny_model(num_hidden_layers=2), adapter[1])
    lost = next(key for key in good if key.endswith("lora_B.weight"))
    save_file({key: tensor for key, tensor in good.items() if key != lost}, file)
    with pytest.raises(ValueError, match=f"missing is {lost}"):
        lora.load(tiny_model(), adapter[1])
    save_file({**good, lora.HEAD_KEY: torch.zeros(97, 32), lora.EMBEDDING_KEY: torch.ones(97, 32)}, file)
    with pytest.raises(ValueError, match="untie the base first"):
        lora.load(tiny_model(tie_word_embeddings=True), adapter[1])
    # PEFT's modules_to_save=["embed_tokens"] trains the embedding and leaves the head as it was
    save_file({**good, lora.EMBEDDING_KEY: torch.ones(97, 32)}, file)
    with pytest.raises(ValueError, match=r"leaves the head as it was.*untie the base first"):
        lora.load(tiny_model(tie_word_embeddings=True), adapter[1])
    edit(adapter[1] / "adapter_config.json", ensure_weight_tying=True)
    lora.load(tied := tiny_model(tie_word_embeddings=True), adapter[1])
    assert (tied.head.weight == 1).all()
    file.write_bytes(b"cut short")
    with pytest.raises(ValueError, match="cannot be read"):
        lora.load(tiny_model(), adapter[1])
    (adapter[1] / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="does not exist"):
        lora.load(tiny_model(), adapter[1])


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lora.py", *map(str, arguments)])
    return main_guard(lora.main)


def test_the_merge_command(hf_model, peft, tmp_path, monkeypatch, capsys):
    """PEFT's own adapter with DoRA and a full embedding; transformers reads what comes out."""
    transformers = pytest.importorskip("transformers")
    transformers_model, base = hf_model("llama")
    theirs = theirs_of(peft, transformers_model, "full", use_dora=True).eval()
    stir(theirs.parameters())
    theirs.save_pretrained(tmp_path / "adapter")
    assert not run_main(monkeypatch, "merge", "--base", base, "--adapter", tmp_path / "adapter", "--out",
                        tmp_path / "out", "--json", tmp_path / "r.json")
    said, result = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    x = tokens()
    with torch.no_grad():
        truth = theirs(x).logits
        assert close(merged(x).logits, truth)
        assert close(merged(x).logits, theirs.merge_and_unload()(x).logits)
    assert 0 < result["largest_logit_difference"] < EXACT * result["largest_logit"]
    assert f"{result['largest_logit_difference']:.2g}" in said
    assert "parameters trained" in said
    assert "vLLM: does not serve modules_to_save, use_dora; merge first" in said


def test_the_merge_command_keeps_the_bases_dtype_and_refuses_a_quantised_one(adapter, tmp_path, monkeypatch, capsys):
    base, folder = adapter
    assert not run_main(monkeypatch, "merge", "--base", base, "--adapter", folder, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    assert "written in bfloat16" in said
    assert f"--max-lora-rank 8 --lora-modules NAME={folder}" in said
    edit(base / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert run_main(monkeypatch, "merge", "--base", base, "--adapter", folder, "--out", tmp_path / "no") == 2
    error = capsys.readouterr().err
    assert "merge into the full-precision base" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_handoff():
    """What vLLM's peft_helper.py refuses and what llama.cpp's converter stops at or passes over."""
    plain = {"r": 8}
    assert lora.handoff({"r": 24}, "A", "B") == ["vLLM: vllm serve B --enable-lora --max-lora-rank 32 --lora-modules "
                                                 "NAME=A", "llama.cpp: convert_lora_to_gguf.py --base B A"]
    for changes, vllm, llama in (({"r": 513}, True, False), ({"use_dora": True}, True, True),
                                 ({"modules_to_save": ["lm_head"]}, True, True),
                                 ({"trainable_token_indices": [3]}, True, True), ({"use_rslora": True}, False, True),
                                 ({"rank_pattern": {"q_proj": 4}}, True, False),
                                 ({"alpha_pattern": {"q_proj": 4}}, True, True)):
        assert ["merge first" in line for line in lora.handoff(plain | changes, "A")] == [vllm, llama], changes


if __name__ == "__main__":
    torch.set_num_threads(1)
    as_rank(Path(sys.argv[1]))
