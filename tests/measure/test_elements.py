"""How many elements each rank has. Truth: the parameters that core/pipeline.py leaves a rank, and matrices by hand."""

import pytest
import torch
from conftest import SIZES

import lora
from core.parallel import ParallelConfig
from core.pipeline import Pipe, split
from measure.elements import Place, count_elements, count_sparse, find_places
from model import Model, ModelConfig, flops_by_block

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "dense_layers": [1]}
PLAIN, ADAPTED = lora.LoraConfig(), lora.LoraConfig(rank=4)


@pytest.mark.parametrize("adapters", [PLAIN, ADAPTED], ids=["full", "lora"])
@pytest.mark.parametrize(("schedule", "P", "more"), [
    ("1f1b", 1, {}), ("1f1b", 3, {}), ("gpipe", 2, {"tie_word_embeddings": True}), ("interleaved", 2, EXPERTS)])
def test_a_rank_of_a_pipeline_has_what_the_pipeline_leaves_it(schedule, P, more, adapters):
    config = ModelConfig(**SIZES | {"num_hidden_layers": 7}, **more)
    places = find_places(config, ParallelConfig(pipeline=P, schedule=schedule), 64)
    assert len(places) == P
    for rank, place in enumerate(places):
        with torch.device("meta"):
            model = Model(config)
        if adapters.rank:
            lora.attach(model, adapters, 0)
        if P > 1:
            pipe = Pipe(None, rank, P, 2 if schedule == "interleaved" else 1, None)
            split(model, pipe, flops_by_block(config, 64), 6.0 * config.vocab_size * config.hidden_size)
        own = dict(model.named_parameters())
        count = count_elements(config, adapters, place)
        assert count.base == sum(p.numel() for name, p in own.items() if ".adapters." not in name)
        assert count.trained == sum(p.numel() for p in own.values() if p.requires_grad)
        assert count.outside == sum(p.numel() for name, p in own.items() if not name.startswith("layers."))
        assert place.blocks == sorted({int(name.split(".")[1]) for name in own if name.startswith("layers.")})


def test_ranks_that_share_matmuls_have_a_part_of_each():
    config = ModelConfig(**SIZES)
    D, F, L, d = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    linear = L * (2 * D * H * d + 2 * D * K * d + 3 * D * F)
    one, two = (count_elements(config, PLAIN, Place((range(L),), t=t)) for t in (1, 2))
    assert (one.linear, two.linear) == (linear, linear // 2)
    assert one.base - two.base == one.trained - two.trained == linear // 2
    # Of adapters one matrix of each pair is in parts: A of o and down, B of the others.
    one, two = (count_elements(config, ADAPTED, Place((range(L),), t=t)) for t in (1, 2))
    shared = 4 * L * (H * d + 2 * K * d + 2 * F + H * d + F)
    assert one.trained - two.trained == shared // 2
    # Seven layers have a rank of 4 each, whose S is of all tokens.
    assert one.low == two.low == 7 * 4


def test_sparse_blocks_are_those_with_experts():
    config = ModelConfig(**SIZES, **EXPERTS)
    assert count_sparse(config) == 2
    assert count_sparse(config, [1]) == 0
    assert count_sparse(ModelConfig(**SIZES)) == 0
    count = count_elements(config, PLAIN)
    assert count.experts == 4 * 3 * 32 * 40
