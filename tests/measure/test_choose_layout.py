"""Which layouts are tried, and which is advised. Truth: by hand."""

from dataclasses import replace

import pytest
from conftest import SIZES

import train
from core import cli
from core.errors import UserError
from core.parallel import ParallelConfig
from measure.budget import known_size
from measure.choose_layout import advise, describe_layouts, list_layouts, name_layout, try_layouts
from model import ModelConfig

LLAMA = known_size("llama-2-7b")


def settings(*words):
    return cli.parse(train.Config, ["--data.sources.a.path", "x", "--data.context", "4096", *map(str, words)],
                     recipe=True)


def names(c, config, gpus, memory=80e9):
    return {each.name: each.fits for each in try_layouts(c, config, gpus, memory, 1e9, "cuda")}


def test_a_layout_is_named_by_what_is_set():
    assert name_layout(ParallelConfig()) == "ddp"
    assert name_layout(ParallelConfig("fsdp", tensor=8, pipeline=2, reshard=False)) == (
        "fsdp, tensor 8, pipeline 2, 1f1b, reshard False")


def test_layouts_are_those_that_the_settings_allow():
    c = settings("--train.batch-size", 32, "--train.micro-batch-size", 1)
    assert list(names(c, LLAMA, 1)) == ["ddp", "fsdp, offload"]
    # Four micro-batches on each of 8 ranks; a pipeline of 8 has 32.
    assert list(names(c, LLAMA, 8)) == [
        "ddp", "fsdp", "fsdp, reduce_each", *(f"fsdp, tensor {t}, reduce_each" for t in (2, 4, 8)),
        *(f"fsdp, pipeline {P}, 1f1b" for P in (2, 4, 8)), "fsdp, offload"]
    # One micro-batch on each of 32, where it makes no difference when gradients are summed; ranks that share their
    # matmuls have one together, 8 of each pipeline too.
    found = names(c, LLAMA, 32)
    assert {"fsdp, replicas 4", "fsdp, tensor 8, reduce_each", "fsdp, tensor 8, pipeline 4, 1f1b"} < found.keys()
    assert not [name for name in found if "reduce_each" in name and "tensor" not in name]
    # Three heads cannot be shared.
    odd = ModelConfig(**SIZES | {"num_attention_heads": 3, "hidden_size": 48, "num_key_value_heads": 3})
    assert not [name for name in names(c, odd, 8) if "tensor" in name]
    with pytest.raises(UserError, match=r"train.batch_size 32 is not a multiple of the 5 ranks"):
        names(c, LLAMA, 5)
    with pytest.raises(UserError, match=r"parallel.tensor 3 does not divide"):
        names(replace(c, parallel=ParallelConfig("fsdp", tensor=3)), LLAMA, 8)


def test_the_first_that_fits_is_advised_the_own_first():
    # 7B in full: 16 bytes a parameter are 108 GB on each rank of DDP, 13.5 on each of eight with shards, and the
    # gradients of all weights 27 between the micro-batches.
    c = settings("--train.batch-size", 32, "--train.micro-batch-size", 1, "--model.activation-checkpointing")
    found = try_layouts(c, LLAMA, 8, 80e9, 1e9, "cuda")
    assert not found[0].fits
    assert advise(found).name == "fsdp"
    assert advise(try_layouts(c, LLAMA, 8, 40e9, 1e9, "cuda")).name == "fsdp, reduce_each"
    own = replace(c, parallel=ParallelConfig("fsdp", tensor=4))
    assert advise(try_layouts(own, LLAMA, 8, 80e9, 1e9, "cuda")).name == "fsdp, tensor 4"
    assert advise(try_layouts(c, LLAMA, 8, 2e9, 1e9, "cuda")) is None
    table = describe_layouts(found, 1e9).splitlines()
    assert table[-1] == "advised: fsdp"
    assert len(table) == 2 + len(found)
    assert describe_layouts(found[:1], 1e9).splitlines()[-1] == "none of them fits"


def test_what_the_hosts_must_hold_is_said_and_a_layout_that_needs_it_is_advised_last():
    # 16 bytes a parameter of weights, gradients and moments, and 12 more while a save writes, on each of 8.
    c = settings("--train.batch-size", 32, "--train.micro-batch-size", 1, "--model.activation-checkpointing")
    found = try_layouts(c, LLAMA, 8, 14e9, 1e9, "cuda")
    host = (16 + 12) * 6_738_415_616 / 8
    assert [each.parts["host"] for each in found] == [0.0] * (len(found) - 1) + [pytest.approx(host)]
    *_, row, advice = describe_layouts(found, 1e9).splitlines()
    assert row.endswith("  yes, with 23.6 GB of the host's memory for each GPU, 188.7 GB for the 8 of a node")
    assert advice == ("advised: fsdp, offload, if there are 23.6 GB of the host's memory for each GPU, 188.7 GB for "
                      "the 8 of a node")
    assert describe_layouts(try_layouts(c, LLAMA, 1, 40e9, 1e9, "cuda"), 1e9).endswith(
        "advised: fsdp, offload, if there are 188.7 GB of the host's memory for each GPU")
    own = replace(c, parallel=ParallelConfig("fsdp", offload=True))
    assert advise(try_layouts(own, LLAMA, 8, 80e9, 1e9, "cuda")).name == "fsdp"
    # A save writes adapters and their moments; the base is kept in bf16 beside them.
    adapters = replace(settings("--train.batch-size", 32, "--lora.rank", 8, "--train.precision", "bf16",
                                "--lora.targets", "q_proj"), parallel=own.parallel)
    trained = 32 * 8 * (4096 + 4096)
    assert try_layouts(adapters, LLAMA, 8, 80e9, 1e9, "cuda")[0].parts["host"] == pytest.approx(
        (2 * 6_738_415_616 + (16 + 12) * trained) / 8)


def test_a_pipeline_that_offloads_keeps_gradients_on_the_gpu_between_micro_batches():
    """Its schedule sums them after the last one."""
    c = settings("--train.batch-size", 32, "--train.micro-batch-size", 1)
    gradients = [try_layouts(replace(c, parallel=ParallelConfig("fsdp", pipeline=2, offload=offload)), LLAMA, 8, 80e9,
                             1e9, "cuda")[0].parts["gradients"] for offload in (False, True)]
    # 4 bytes each of half of the model, the embedding or the head among them.
    assert gradients == pytest.approx([4 * 6_738_415_616 / 2] * 2, rel=0.05)


def test_experts_are_shared_where_there_are_some():
    config = ModelConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40)
    shared = [each.experts for each in list_layouts(ParallelConfig(), config, 8) if each.experts > 1]
    assert shared == [2, 4, 8]
    c = settings("--train.batch-size", 8, "--train.micro-batch-size", 1)
    # Four experts cannot be parted among eight.
    assert [name for name in names(c, config, 8) if "experts" in name] == ["fsdp, experts 2", "fsdp, experts 4"]
