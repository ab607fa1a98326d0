"""learn/distance.py. Truth: weights moved by hand; the merged weights of an adapter (tests/test_lora.py judges
the merge); the folder that a run exports. Law: what nothing has moved is at 0."""

import math

import pytest
import torch
from adapter_models import adapted, stir
from runs import lines, one, run_of
from safetensors.torch import load_file

import hf
import lora
import train
from learn.distance import block_of, measure_distance
from lora import LoraConfig
from model import Model, ModelConfig

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def saved(request, tmp_path):
    """(a base in fp32, its model in fp32 or bf16)"""
    model = Model(ModelConfig(**SIZES))
    model.initialise(0)
    hf.save(model, tmp_path / "base")
    return hf.open_base(tmp_path / "base"), hf.load(tmp_path / "base", request.param)


def test_blocks_by_name():
    assert [block_of(name) for name in ("embed_tokens.weight", "layers.12.mlp.up_proj.weight", "norm.weight",
                                        "head.weight", "layers.0.self_attn.q_proj")] == [
        "embed", "layers.12", "norm", "head", "layers.0"]


def test_what_nothing_has_moved_is_at_zero_and_what_was_moved_by_hand_is_where_it_was_moved(saved):
    base, model = saved
    assert measure_distance(model, base, one()) == dict.fromkeys(
        ("embed", "layers.0", "layers.1", "norm", "head", "all"), 0.0)
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 4] = model.layers[1].mlp.up_proj.weight[3, 4] + 3
        moved = (model.layers[1].mlp.up_proj.weight[3, 4].double()
                 - hf.load(base, model.norm.weight.dtype).layers[1].mlp.up_proj.weight[3, 4].double()).item()
        model.norm.weight[0] += 4
    found = measure_distance(model, base, one())
    assert found == pytest.approx({"embed": 0, "layers.0": 0, "layers.1": abs(moved), "norm": 4, "head": 0,
                                   "all": math.sqrt(moved**2 + 16)}, rel=1e-6, abs=0)
    assert moved == pytest.approx(3, rel=0.01)


def test_a_tied_table_counts_once(tmp_path):
    model = Model(ModelConfig(**SIZES, tie_word_embeddings=True))
    model.initialise(0)
    hf.save(model, tmp_path / "base")
    with torch.no_grad():
        model.embed_tokens.weight[5, 5] += 2
    found = measure_distance(model, hf.open_base(tmp_path / "base"), one())
    assert "head" not in found
    assert found["embed"] == found["all"] == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"rslora": True, "base": "nf4"}, {"targets": ["q_proj"]},
                                      {"embeddings": "full"}, {"embeddings": "rows", "embedding_rows": "7,90:"}],
                         ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_is_as_far_away_as_its_merge_is(tmp_path, settings, tied):
    base = Model(ModelConfig(**SIZES, tie_word_embeddings=tied))
    base.initialise(0)
    hf.save(base, tmp_path / "base")
    fresh, model = (adapted(lambda: hf.load(tmp_path / "base"), LoraConfig(rank=4, **settings)) for _ in range(2))
    opened = hf.open_base(tmp_path / "base")
    # DoRA's magnitudes are the rows' norms, rounded.
    assert measure_distance(fresh, opened, one())["all"] < (1e-5 if "dora" in settings else 1e-12)
    stir(model.parameters())
    merged = adapted(lambda: hf.load(tmp_path / "base"), LoraConfig(rank=4, **settings | {"base": "plain"}))
    merged.load_state_dict({name: p for name, p in model.state_dict().items() if ".adapters." in name}, strict=False)
    lora.merge(merged)
    expected = {}
    for name, p in merged.named_parameters():
        was = dict(base.named_parameters())[name].double()
        expected[block_of(name)] = expected.get(block_of(name), 0) + (p.double() - was).square().sum().item()
    found = measure_distance(model, opened, one())
    for block, square in expected.items():
        assert found.get(block, 0) == pytest.approx(math.sqrt(square), rel=1e-5, abs=1e-9)
    assert found["all"] == pytest.approx(math.sqrt(sum(expected.values())), rel=1e-5)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("words", [(), ("--lora.rank", 4)], ids=["full", "lora"])
def test_the_lines_of_a_run_have_the_distance_of_what_it_exports(base, tmp_path, words):
    out = tmp_path / "run"
    train.train(run_of(base, out, "--log.distance", 4, "--log.every", 3, "--train.steps", 9, *words), one())
    found = {line["step"]: line.get("distance") for line in lines(out, "train")}
    # At or behind 4 and 8, and at the end.
    assert [step for step, distance in found.items() if distance] == [1, 6, 9]
    assert 0 < found[1]["all"] < found[6]["all"]
    now, was = (load_file(folder / "model.safetensors") for folder in (out / "final", base[1]))
    square = sum((now[name].double() - was[name].double()).square().sum().item() for name in was)
    assert found[9]["all"] == pytest.approx(math.sqrt(square), rel=1e-5)


@pytest.mark.usefixtures("quick")
def test_a_run_without_a_base_or_with_it_switched_off_has_none(base, lab, tmp_path):
    for out, words in (("off", ("--log.distance", 0)), ("scratch", ("--model.init", "scratch"))):
        train.train(run_of(base, tmp_path / out, *words, "--train.steps", 1), one())
        assert not [line for line in lines(tmp_path / out, "train") if "distance" in line]
