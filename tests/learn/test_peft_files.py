"""learn/peft_files.py against PEFT, both ways: forward, gradients, keys and settings; and folders that fit nothing.

Tolerance: fp32 sums in another order, 1e-5 of the largest number.
"""

import json

import pytest
import torch
from adapter_models import (
    EXACT,
    KINDS,
    LINEARS,
    MODELS,
    adapted,
    close,
    edit_json,
    logits,
    loss_of,
    stir,
    theirs_of,
    tokens,
    train_some,
    write_adapter,
)
from safetensors.torch import load_file, save_file

import hf
import lora
from learn.peft_files import (
    EMBEDDING_KEY,
    HEAD_KEY,
    load_adapter,
    peft_config,
    peft_names,
    save_adapter,
)
from lora import LoraConfig

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*gradient_checkpointing"),
              pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")]


def peft_gradients(model) -> dict:
    """{key of PEFT's file: gradient}"""
    out = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            key = name.replace(".default", "").replace(".modules_to_save", "").replace("_vector.weight", "_vector")
            out[key] = p.grad
    return out


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
    save_adapter(model, tmp_path / "adapter", str(base))
    theirs = peft.PeftModel.from_pretrained(transformers_model, tmp_path / "adapter", is_trainable=True)
    scores, truth = logits(model, x), theirs(x).logits
    assert not close(scores, start, 0.01)
    assert close(scores, truth)
    loss_of(scores, x).backward()
    loss_of(truth, x).backward()
    wanted, names = peft_gradients(theirs), peft_names(model)
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
    settings = load_adapter(model, tmp_path / "theirs")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".adapters." not in n)
    with torch.no_grad():
        assert close(logits(model, x), theirs(x).logits)
    save_adapter(model, tmp_path / "ours", "org/base")
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
    save_adapter(model, tmp_path / "adapter", str(base))
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
    load_adapter(model, tmp_path / "theirs")
    x = tokens()
    with torch.no_grad():
        assert close(logits(model, x), theirs(x).logits)
    said = peft_config(model, "base")
    assert (said["lora_alpha"], said["alpha_pattern"]) == (8, {"q_proj": 32.0, "k_proj": 5.0})
    assert said["trainable_token_indices"] == {"embed_tokens": [5, 3]}


# ---- adapters that do not fit

@pytest.fixture
def adapter(tiny_model, tmp_path):
    """(base folder, adapter folder), the base in bf16."""
    return write_adapter(tmp_path, tiny_model)


@pytest.mark.parametrize(("changes", "says"), [
    ({"peft_type": "IA3"}, "only LORA is supported"), ({"bias": "all"}, "has bias 'all'"),
    ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa'"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"), ({"r": None}, "does not say r")])
def test_adapters_that_mean_something_else(tiny_model, adapter, changes, says):
    edit_json(adapter[1] / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=says):
        load_adapter(tiny_model(), adapter[1])


def test_adapters_that_do_not_fit(tiny_model, adapter):
    file = adapter[1] / "adapter_model.safetensors"
    good = load_file(file)
    with pytest.raises(ValueError, match="trained on another base"):
        load_adapter(tiny_model(hidden_size=16, head_dim=8), adapter[1])
    with pytest.raises(ValueError, match=r"left over is .*layers\.2"):
        load_adapter(tiny_model(num_hidden_layers=2), adapter[1])
    lost = next(key for key in good if key.endswith("lora_B.weight"))
    save_file({key: tensor for key, tensor in good.items() if key != lost}, file)
    with pytest.raises(ValueError, match=f"missing is {lost}"):
        load_adapter(tiny_model(), adapter[1])
    save_file({**good, HEAD_KEY: torch.zeros(97, 32), EMBEDDING_KEY: torch.ones(97, 32)}, file)
    with pytest.raises(ValueError, match="untie the base first"):
        load_adapter(tiny_model(tie_word_embeddings=True), adapter[1])
    # PEFT's modules_to_save=["embed_tokens"] trains the embedding and leaves the head as it was
    save_file({**good, EMBEDDING_KEY: torch.ones(97, 32)}, file)
    with pytest.raises(ValueError, match=r"leaves the head as it was.*untie the base first"):
        load_adapter(tiny_model(tie_word_embeddings=True), adapter[1])
    edit_json(adapter[1] / "adapter_config.json", ensure_weight_tying=True)
    load_adapter(tied := tiny_model(tie_word_embeddings=True), adapter[1])
    assert (tied.head.weight == 1).all()
    file.write_bytes(b"cut short")
    with pytest.raises(ValueError, match="is damaged or cut short"):
        load_adapter(tiny_model(), adapter[1])
    (adapter[1] / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="does not exist"):
        load_adapter(tiny_model(), adapter[1])
