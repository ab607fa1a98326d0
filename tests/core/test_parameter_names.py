"""core/parameter_names.py: names there and back, experts apart and together; test_hf.py reads folders."""

import pytest
import torch

from core.parameter_names import from_hf_name, list_parts, split_experts, to_hf_name

NAMES = [
    ("llama", "model.layers.0.self_attn.q_proj.weight", "layers.0.self_attn.q_proj.weight"),
    ("llama", "lm_head.weight", "head.weight"),
    ("llama", "model.norm.weight", "norm.weight"),
    ("qwen3_moe", "model.layers.2.mlp.experts.11.gate_proj.weight", "layers.2.mlp.experts.11.gate_proj.weight"),
    ("qwen3_moe", "model.layers.2.mlp.gate.weight", "layers.2.mlp.gate.weight"),
    ("mixtral", "model.layers.1.block_sparse_moe.gate.weight", "layers.1.mlp.gate.weight"),
    ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w1.weight", "layers.1.mlp.experts.3.gate_proj.weight"),
    ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight", "layers.1.mlp.experts.3.down_proj.weight"),
    ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w3.weight", "layers.1.mlp.experts.3.up_proj.weight"),
]


@pytest.mark.parametrize(("family", "theirs", "ours"), NAMES)
def test_there_and_back(family, theirs, ours):
    assert from_hf_name(theirs) == ours
    assert to_hf_name(ours, family) == theirs


def test_what_is_computed_has_no_name():
    assert from_hf_name("model.layers.0.self_attn.rotary_emb.inv_freq") is None


def test_experts_are_apart_in_files():
    together = torch.arange(24.0).view(2, 3, 4)
    name = "layers.0.mlp.experts.up_proj.weight"
    parts = split_experts({name: together, "norm.weight": torch.ones(3)})
    assert list(parts) == [*list_parts(name, 2), "norm.weight"]
    assert list_parts(name, 2)[1] == "layers.0.mlp.experts.1.up_proj.weight"
    assert torch.equal(parts["layers.0.mlp.experts.1.up_proj.weight"], together[1])
    parts["layers.0.mlp.experts.1.up_proj.weight"].zero_()
    assert together[1].abs().max() == 0
    split_experts({name: together}, copy=True)["layers.0.mlp.experts.0.up_proj.weight"].zero_()
    assert together[0].abs().max() > 0
