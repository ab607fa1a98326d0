"""config.json against transformers: what each family's silence means, what its older keys say, and each way of scaling
rotary positions: transformers' logits from the file as it is, and from what we make of it in both versions."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import hf
from core.architecture import FAMILIES, set_positions

SMOL3 = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture
def transformers():
    module = pytest.importorskip("transformers", minversion="5", reason="the truth is transformers 5")
    module.utils.logging.disable_progress_bar()
    return module


@pytest.mark.parametrize("family", FAMILIES)
def test_silent_configs_mean_what_transformers_assumes(transformers, tmp_path, family):
    sizes = {"vocab_size": 97, "hidden_size": 256, "intermediate_size": 72, "num_hidden_layers": 3,
             "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **sizes}))
    ours, theirs = hf.open_base(tmp_path).config, transformers.AutoConfig.from_pretrained(tmp_path)
    head_dim = getattr(theirs, "head_dim", None) or 8
    for name in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                 "initializer_range"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == head_dim
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.windows == ([4096] * 3 if family == "mistral" else None)
    assert ours.no_rope_layers == []                           # SmolLM3's every fourth: none among three


@pytest.mark.parametrize("family", FAMILIES)
def test_a_null_means_as_many_key_value_heads_as_heads(transformers, tmp_path, family):
    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3,
             "num_attention_heads": 6, "num_key_value_heads": None}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **sizes}))
    assert hf.open_base(tmp_path).config.num_key_value_heads == 6
    if family == "llama":                                       # of the others transformers 5 refuses the null
        assert transformers.AutoConfig.from_pretrained(tmp_path).num_key_value_heads == 6


@pytest.mark.parametrize(("family", "options"), [
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("qwen3", {"head_dim": 24, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    ("smollm3", {**SMOL3, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5}),
])
def test_layers_are_counted_where_they_are_not_named(hf_model, family, options):
    """Configs older than `layer_types` say the same with a number; the truth is transformers' own list of layers."""
    _, original = hf_model(family, **options)
    named = hf.open_base(original).config
    values = json.loads((original / "config.json").read_text())
    assert len(set(values["layer_types"])) == 2
    (original / "config.json").write_text(json.dumps(
        {key: value for key, value in values.items() if key not in ("layer_types", "no_rope_layers")}))
    assert hf.open_base(original).config == named


# ---- rotary positions

FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
AT_TOP = {"original_max_position_embeddings": 16}
ROPES = {
    "linear as text": {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 5000},
    "both the same": {"rope_scaling": {"type": "linear", "factor": 2.0},
                      "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3}, "rope_theta": 5e3},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0, **AT_TOP}, "max_position_embeddings": 16},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn at the top": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, **AT_TOP},
    "yarn at the top of 5": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e3}, **AT_TOP},
    "yarn twice": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
                   **AT_TOP},
    "yarn without a factor": {"rope_scaling": {"rope_type": "yarn", "factor": None, **AT_TOP}},
    "yarn in full": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 20, "beta_slow": 2,
                                      "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False, **AT_TOP}},
    "yarn, truncate null": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": None, **AT_TOP}},
    "llama3 at the top": {"rope_scaling": LLAMA3, **AT_TOP},
    "llama3 without a length": {"rope_scaling": LLAMA3},
    "longrope": {"rope_scaling": {"type": "longrope", **FACTORS}, **AT_TOP},
    "longrope, long": {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 60},
    "longrope, its factor": {"rope_parameters": {"rope_type": "longrope", "factor": 2.5, "rope_theta": 1e4, **FACTORS},
                             **AT_TOP},
    "longrope, attention": {"rope_scaling": {"type": "longrope", "attention_factor": 0.8, **FACTORS}, **AT_TOP},
}
TOKENS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))


def write_variant(folder, changes: dict):
    """`folder` with its rope keys replaced by `changes`."""
    values = json.loads((folder / "config.json").read_text())
    values = {key: value for key, value in values.items() if not key.startswith("rope_")}
    (folder / "config.json").write_text(json.dumps(values | changes))


@torch.no_grad()
def our_logits(folder):
    model = hf.load(folder)
    return model.head(model(TOKENS))


def export_all(hf_model, transformers, folder) -> dict:
    """{name: transformers' logits} of every variant of ROPES; our export of each is in `folder`/number."""
    expected = {}
    for number, (name, changes) in enumerate(ROPES.items()):
        _, original = hf_model("llama")
        write_variant(original, changes)
        with torch.no_grad():
            expected[name] = transformers.AutoModelForCausalLM.from_pretrained(original).eval()(TOKENS).logits
        assert (our_logits(original) - expected[name]).abs().max() < 1e-4, name
        hf.save(hf.load(original), folder / str(number), base=original)
        assert hf.open_base(folder / str(number)).config == hf.open_base(original).config, name
    return expected


def test_every_way_to_say_rope_is_read_and_written_as_transformers_5_does(hf_model, transformers, tmp_path):
    expected = export_all(hf_model, transformers, tmp_path / "out")
    assert len({round(logits.std().item(), 6) for logits in expected.values()}) > 9
    for number, logits in enumerate(expected.values()):
        exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / str(number)).eval()
        with torch.no_grad():
            assert (exported(TOKENS).logits - logits).abs().max() < 1e-4, list(ROPES)[number]


@pytest.mark.slow
def test_transformers_4_reads_every_exported_rope(hf_model, transformers, tmp_path):
    older = os.environ.get("NANOCPT_TRANSFORMERS4")
    if not older:
        pytest.skip("NANOCPT_TRANSFORMERS4 is not set; it names a folder with transformers 4 (make test sets it)")
    save_file(export_all(hf_model, transformers, tmp_path / "out"), tmp_path / "expected.safetensors")
    code = """if True:
        import sys, torch, transformers
        from safetensors.torch import load_file
        assert transformers.__version__.startswith("4."), transformers.__version__
        x, names = torch.load(sys.argv[1] + "/tokens.pt")
        for number, name in enumerate(names):
            model = transformers.AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/out/{number}").eval()
            with torch.no_grad():
                error = (model(x).logits - load_file(sys.argv[1] + "/expected.safetensors")[name]).abs().max()
            assert error < 1e-4, (name, error)
    """
    torch.save((TOKENS, list(ROPES)), tmp_path / "tokens.pt")
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": older}, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize(("changes", "message"), [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
     "says rope_type default and linear"),
    ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}, "says type linear and dynamic"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 123.0},
     "says rope_theta 123.0 and 500000.0"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e5}},
     "says rope_theta 500000.0 and 10000.0"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"factor": 3.0}},
     "says factor 3.0 and 2.0"),
    ({"rope_scaling": {"factor": 2.0}}, "a rope factor and no rope_type"),
    ({"partial_rotary_factor": 0.5}, "has partial_rotary_factor 0.5"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor 0.5"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "rope_type 'mrope' is not known"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 1}, "must be at least 2"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": -1}}, "in rope_scaling beta_fast -1, but"),
    ({"layer_types": ["full_attention"]}, "names 1 layer_types of 3 layers"),
    ({"layer_types": ["chunked_attention"] * 3}, "layer_types chunked_attention, which is not supported"),
])
def test_what_would_be_read_in_two_ways_is_refused(hf_model, changes, message):
    _, original = hf_model("llama")
    write_variant(original, changes)
    with pytest.raises(ValueError, match=message):
        _ = hf.open_base(original).config


@pytest.mark.parametrize(("of_base", "asked", "made"), [
    ({}, (256, "", None), (256, 1e4, {})),
    ({}, (None, "", 5e5), (64, 5e5, {})),
    ({}, (256, "linear", None), (256, 1e4, {"rope_type": "linear", "factor": 4.0})),
    ({}, (256, "llama3", None), (256, 1e4, {**LLAMA3, "factor": 4.0, "original_max_position_embeddings": 64})),
    ({**LLAMA3, **AT_TOP}, (128, "yarn", None), (128, 1e4, {"rope_type": "yarn", "factor": 8.0, **AT_TOP})),
    ({**LLAMA3, **AT_TOP}, (128, "", None), (128, 1e4, {**LLAMA3, **AT_TOP})),
    ({**LLAMA3, **AT_TOP}, (None, "none", None), (64, 1e4, {})),
])
def test_positions_that_a_run_sets(tiny_config, of_base, asked, made):
    config = set_positions(tiny_config(rope_scaling=of_base), *asked)
    assert (config.max_position_embeddings, config.rope_theta, config.rope_scaling) == made


@pytest.mark.parametrize(("of_base", "asked", "message"), [
    ({}, (None, "yarn", None), "stretches the 64 positions of the base; set --model.max-positions above them"),
    ({}, (64, "yarn", None), "above them, not 64"),
    ({"rope_type": "linear", "factor": 2.0}, (256, "yarn", None), "scaled .linear., its config.json does not say"),
])
def test_positions_that_say_nothing_are_refused(tiny_config, of_base, asked, message):
    with pytest.raises(ValueError, match=message):
        set_positions(tiny_config(rope_scaling=of_base), *asked)


def test_swish_is_silu_and_left_overs_are_not_exported(hf_model, transformers, tmp_path):
    _, original = hf_model("llama")
    write_variant(original, {"hidden_act": "swish", "quantization_config": {"quant_method": "bitsandbytes"},
                             "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "of_theirs": 1})
    hf.save(hf.load(original), tmp_path / "out", base=original)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["of_theirs"] == 1
    assert not {"quantization_config", "auto_map"} & written.keys()
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert (exported(TOKENS).logits - our_logits(original)).abs().max() < 1e-4
