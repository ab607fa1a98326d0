"""config.json against transformers: what each family's silence means, and what its older keys say."""

import json

import pytest

import hf
from core.architecture import FAMILIES

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
