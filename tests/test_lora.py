"""lora.py against laws: an adapter changes nothing at first and nothing outside what it trains, bit for bit; merged and
apart agree. The layers and PEFT's files are in tests/learn.

Tolerance: fp32 sums in another order, 1e-5 of the largest number.
"""

import json
import sys

import pytest
import torch
from adapter_models import (
    EXACT,
    KINDS,
    adapted,
    close,
    logits,
    stir,
    theirs_of,
    tokens,
    train_some,
    trained,
    write_adapter,
)
from safetensors.torch import load_file, save_file

import hf
import lora
from core.cli import parse
from core.config import check_limits
from learn import adapters
from lora import LoraConfig, advise_serving

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*gradient_checkpointing"),
              pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")]


@pytest.mark.parametrize(("width", "times"), [(64, 0.408), (256, 0.204)])
def test_how_far_a_first_step_moves_the_weights(tiny_model, width, times):
    """Beside full training at the same rate: 2 sqrt(r / (3 D)), as learn/schedules.py says of its recommended rates."""
    def build():
        return tiny_model(hidden_size=width, num_key_value_heads=4, num_hidden_layers=1).train()
    before, lengths = dict(build().named_parameters()), []
    for model in (build(), adapted(build, LoraConfig(rank=8, alpha=16))):
        train_some(model, tokens(), steps=1, lr=1e-5, weight_decay=0.0)
        lora.merge(model)
        lengths.append({name: (p - before[name]).norm().item() for name, p in model.named_parameters()
                        if "attn." in name})
    assert len(lengths[0]) == 4
    assert [lengths[1][name] / lengths[0][name] for name in lengths[0]] == pytest.approx([times] * 4, rel=0.08)


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
                            (model.embed_tokens.merged_weight(), base.embed_tokens.weight)):
        moved = (current != frozen).any(1)
        assert moved.nonzero().flatten().tolist() == [5, 95, 96]
    assert ("head.adapters.default.rows" in before) != tied
    x = torch.tensor([[95, 3, 5, 96]])
    assert torch.equal(model.embed_tokens(x), model.embed_tokens.merged_weight()[x])


def test_disabled_is_the_base_and_comes_back(tiny_model):
    config = LoraConfig(rank=3, dora=True, embeddings="full")
    model, x = adapted(tiny_model, config), tokens()
    train_some(model, x)
    with torch.no_grad():
        after, base = logits(model, x), logits(tiny_model(), x)
        with adapters.disabled(model):
            assert torch.equal(logits(model, x), base)
            assert torch.equal(model.head.weight, tiny_model().head.weight)
        assert torch.equal(logits(model, x), after)
        with pytest.raises(RuntimeError), adapters.disabled(model):
            raise RuntimeError
        assert torch.equal(logits(model, x), after)
    assert all(p.requires_grad for name, p in model.named_parameters() if ".adapters." in name)


def test_the_share_that_is_trained():
    """The figures of LoRA's paper for one square matrix of 4096, r = 8; no memory is needed to count."""
    model = torch.nn.Sequential(torch.nn.Linear(4096, 4096, bias=False, device="meta"))
    lora.attach(model, LoraConfig(rank=8), 0)
    assert lora.trainable_share(model) == "65,536 of 16,777,216 parameters trained (0.39 %)"


def test_of_several_ranks_for_a_layer_the_last_counts(tiny_model):
    config = LoraConfig(rank=4, targets=["up_proj", "down_proj"], ranks=["down_proj=5", "layers.1.*=2", "q_proj=9"])
    assert lora.choose_ranks(tiny_model(), config) == {
        f"layers.{i}.mlp.{name}": 2 if i == 1 else 5 if name == "down_proj" else 4
        for i in range(3) for name in ("up_proj", "down_proj")}


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


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """(base folder, adapter folder), the base in bf16."""
    return write_adapter(tmp_path, tiny_model)


# ---- merging

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_merged_is_the_same_model(tiny_model, tmp_path, tied, kind):
    config = LoraConfig(rank=4, **KINDS[kind][0])
    model, x = adapted(lambda: tiny_model(tie_word_embeddings=tied), config), tokens()
    stir(model.parameters())
    with torch.no_grad():
        apart = logits(model, x)
        lora.merge(model)
        assert close(logits(model, x), apart)
        hf.save(model, tmp_path / "merged", state=dict(model.named_parameters()))
        assert close(logits(hf.load(tmp_path / "merged"), x), apart)
        assert close(logits(hf.load(tmp_path / "merged", torch.float64), x), apart.double())
        lora.merge(model)                                            # it was taken off: merging again adds nothing
        assert close(logits(model, x), apart)


def test_a_half_precision_base_is_merged_in_fp32(tiny_model):
    """One rounding of the exact sum, not of the product and of the sum."""
    model = adapted(lambda: tiny_model().bfloat16(), LoraConfig(rank=4))
    stir(model.parameters())
    layer = model.layers[0].mlp.up_proj
    a, b, w = (p.detach().double() for p in (layer.adapter.A, layer.adapter.B, layer.weight))
    assert (layer.adapter.A.dtype, layer.weight.dtype) == (torch.float32, torch.bfloat16)
    lora.merge(model)
    merged = layer.weight
    assert merged.dtype == torch.bfloat16
    exact = w + 4 * b @ a
    assert ((merged.double() - exact).abs() <= 1.001 * 2.0**-8 * exact.abs()).all()


# ---- who serves which

def test_advice_for_serving():
    """What vLLM's peft_helper.py refuses and what llama.cpp's converter stops at or passes over."""
    plain = {"r": 8}
    assert advise_serving({"r": 24}, "A", "B") == ["vLLM: vllm serve B --enable-lora --max-lora-rank 32 --lora-modules "
                                                 "NAME=A", "llama.cpp: convert_lora_to_gguf.py --base B A"]
    for changes, vllm, llama in (({"r": 513}, True, False), ({"use_dora": True}, True, True),
                                 ({"modules_to_save": ["lm_head"]}, True, True),
                                 ({"trainable_token_indices": [3]}, True, True), ({"use_rslora": True}, False, True),
                                 ({"rank_pattern": {"q_proj": 4}}, True, False),
                                 ({"alpha_pattern": {"q_proj": 4}}, True, True)):
        assert ["merge first" in line for line in advise_serving(plain | changes, "A")] == [vllm, llama], changes


# ---- the user's mistakes, and the command

@pytest.mark.parametrize(("changes", "says"), [
    ({"rank": -1}, "lora.rank is -1"),
    ({"rank": 8, "alpha": 0}, "lora.alpha is 0"),
    ({"rank": 8, "dropout": 1.0}, "lora.dropout is 1.0"),
    ({"rank": 8, "embeddings": "rows"}, "give both"),
    ({"rank": 8, "embedding_rows": "3"}, "give both"),
    ({"rank": 8, "embeddings": "full", "embedding_lr_ratio": 0.0}, "lora.embedding_lr_ratio is 0.0"),
    ({"rank": 8, "ranks": ["q_proj"]}, "needs NAME=RANK"), ({"rank": 8, "ranks": ["q_proj=0"]}, "needs NAME=RANK")])
def test_settings_that_make_no_sense(changes, says):
    with pytest.raises(ValueError, match=says):
        check_limits(LoraConfig(**changes), "lora.")


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


def test_rows_are_written_as_slices():
    assert lora.parse_token_ids("5, 8:10,30:", 32) == [5, 8, 9, 30, 31]
    assert lora.parse_token_ids("0:", 3) == [0, 1, 2]


def test_it_is_a_section_of_a_recipe(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('rank = 8\nranks = ["down_proj=16"]\nembedding_lr_ratio = 1\n')
    words = [str(recipe), "--targets", "q_proj", "down_proj", "--base", "nf4", "--dora"]
    config = parse(LoraConfig, words, recipe=True)
    assert config == LoraConfig(rank=8, ranks=["down_proj=16"], targets=["q_proj", "down_proj"], base="nf4", dora=True,
                                embedding_lr_ratio=1.0)


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lora.py", *map(str, arguments)])
    return lora.main()


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
    again = ["merge", "--base", base, "--adapter", folder, "--out", tmp_path / "out", "--dtype", "fp32"]
    assert run_main(monkeypatch, *again) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert not run_main(monkeypatch, *again, "--overwrite")
    assert "written in float32" in capsys.readouterr().out
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {torch.float32}
    tensors = load_file(base / "model.safetensors")
    quantised = {name: t.to(torch.int8) if name.endswith("q_proj.weight") else t for name, t in tensors.items()}
    save_file(quantised, base / "model.safetensors")
    assert run_main(monkeypatch, "merge", "--base", base, "--adapter", folder, "--out", tmp_path / "no") == 2
    error = capsys.readouterr().err
    assert "take the full-precision model" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "no").exists()
