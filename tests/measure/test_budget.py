"""What a run costs. Truth: hand-worked examples, published sizes and memory figures."""

import tomllib
from dataclasses import replace

import pytest

import train
from core.config import check_limits, merge
from core.errors import UserError
from measure import budget
from measure.memory import count_elements
from text.mixture import SourceConfig

H100 = budget.GPUS["H100"]


def make_job(size="llama-2-7b", **changes):
    values = {"domain": 7e8, "general": None, "replay": 0.3, "epochs": 1.0, "context": 4096, "gpu": H100, "gpus": 8}
    return budget.Job(model=size, config=budget.known_size(size), **values | changes)


def test_a_gpu_is_found_by_its_name():
    assert budget.find_gpu("h100") is H100
    assert budget.find_gpu("cpu").kind == "cpu"
    with pytest.raises(UserError, match="known are B200"):
        budget.find_gpu("H1000x")


def test_known_sizes_have_the_published_numbers_of_parameters():
    published = {"llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
                 "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "llama-3.2-1b": 1_235_814_400,
                 "llama-3.2-3b": 3_212_749_824, "mistral-7b": 7_248_023_552}
    assert published.keys() == budget.SIZES.keys()
    for name, parameters in published.items():
        assert count_elements(budget.known_size(name), train.Config().lora).base == parameters


def test_tokens_steps_and_batch_by_hand():
    job = make_job()
    # Of 1,000M tokens 30 % are replay.
    assert job.replay_tokens == pytest.approx(3e8)
    assert job.tokens == pytest.approx(1e9)
    # 1e9 / 500 = 2M tokens = 488 sequences of 4,096 = 61 on each of 8 devices, in powers of two 32: 256 sequences.
    assert budget.choose_batch(job) == 256
    assert budget.make_settings(job, "full").train.steps == 954                     # 1e9 / (256 * 4096) = 953.7
    # A large corpus: 4M tokens = 976 sequences, 122 on each device, 64.
    assert budget.choose_batch(make_job(domain=7e10)) == 512
    # A small one keeps 8,192 tokens a step.
    assert budget.choose_batch(make_job(domain=1e6, context=512, gpus=1)) == 16
    assert budget.choose_batch(make_job(domain=7e10, batch_tokens=1e6)) == 128


def test_settings_are_those_of_the_size():
    c = budget.make_settings(make_job(), "full")
    assert (c.optim.lr, c.optim.min_lr, c.data.domain_share, c.train.precision) == (1e-5, 1e-6, 0.7, "bf16")
    assert budget.make_settings(make_job("llama-2-70b"), "full").optim.lr == 5e-6
    lora = budget.make_settings(make_job(), "qlora")
    assert (lora.optim.lr, lora.lora.rank, lora.lora.base) == (1e-4, 128, "nf4")
    assert budget.make_settings(make_job(), "lora", rank=32).lora.rank == 32
    assert budget.make_settings(make_job(gpu=budget.GPUS["T4"]), "lora").train.precision == "fp16"


def test_hours_energy_and_price_by_hand():
    job = make_job(domain=7e10, gpus=8)
    c = budget.make_settings(job, "full")
    c.eval = replace(c.eval, every=10**9, tokens=0)
    # 6 operations per weight that multiplies (all but the embedding and the norms), and in each block attention's
    # 6 * 2 * D * T / 2.
    weights = 6_738_415_616 - 32000 * 4096 - 65 * 4096
    operations = 6 * (weights + 32 * 4096 * 4096) * 1e11
    cost = budget.price_run(job, c, None)
    assert cost["hours"] == pytest.approx(operations / (8 * 989e12 * 0.4) / 3600, rel=1e-6)
    assert cost["gpu_hours"] == pytest.approx(8 * cost["hours"])
    assert cost["kwh"] == pytest.approx(cost["gpu_hours"] * 0.7)
    assert cost["dollars"] == pytest.approx(cost["gpu_hours"] * 2.5)
    c.model = replace(c.model, activation_checkpointing=True)
    assert budget.price_run(job, c, None)["hours"] == pytest.approx(cost["hours"] * 8 / 6)
    # 2 micro-batches of 3 s and 1 s of the optimizer, 10 steps.
    c.train = replace(c.train, steps=10, batch_size=2, micro_batch_size=1)
    here = budget.price_run(replace(job, gpu=budget.find_gpu("cpu"), gpus=1, replay=0.0), c,
                            {"fixed": 1.0, "each": 3.0, "forward": 1.0})
    assert here["hours"] == pytest.approx(70 / 3600)
    assert here["dollars"] is here["kwh"] is None
    own = replace(budget.find_gpu("cpu"), watts=360.0, price=1.8)
    here = budget.price_run(replace(job, gpu=own, gpus=1, replay=0.0), c, {"fixed": 1.0, "each": 3.0, "forward": 1.0})
    assert (here["kwh"], here["dollars"]) == pytest.approx((0.007, 0.035))


def test_what_does_not_fit_is_refused_with_what_would():
    job = make_job("llama-2-70b", gpus=1)
    _, parts, fits = budget.choose_settings(job, "full")
    # Even with 8-bit moments and recomputation: 7.2 bytes per parameter, 500 GB, fill 8 cards without activations.
    assert not fits
    assert parts["peak"] > 7 * 69e9
    assert budget.find_remedies(job, "full") == ["16 x H100"]
    assert budget.choose_settings(job, "qlora")[2]
    # 7B in full: 16 bytes a parameter do not fit on one card of 80 GB; 8-bit moments do. On 8 cards shards do.
    alone, eight = (budget.choose_settings(make_job(gpus=n), "full") for n in (1, 8))
    assert (alone[0].optim.name, alone[0].parallel.strategy, alone[2]) == ("adamw_8bit", "ddp", True)
    assert (eight[0].optim.name, eight[0].parallel.strategy, eight[2]) == ("adamw", "fsdp", True)
    # QLoRA of 7B fits on a card of 24 GB (arXiv 2305.14314), LoRA in bf16 needs its 14 GB of weights.
    small = make_job(gpu=budget.GPUS["RTX4090"], gpus=1, context=2048)
    assert budget.choose_settings(small, "qlora", 16)[2]
    assert budget.choose_settings(small, "lora", 16)[1]["weights"] == pytest.approx(13.6e9, rel=0.02)
    assert not budget.choose_settings(small, "full")[2]


def test_the_recipe_is_the_settings():
    job = make_job(gpus=8)
    plan = budget.plan_methods(job, None)
    for method, found in plan.items():
        sources = {"law": SourceConfig(path="shards/law"), "wiki": SourceConfig(path="shards/wiki", role="general")}
        text = budget.write_recipe(job, found["config"], sources, ["a note", "of a\n[train]\nsteps = 1"])
        read = merge(train.Config(), tomllib.loads(text))
        check_limits(read)
        assert text.startswith("# a note\n")
        assert (read.data.sources, read.model.path) == (sources, "llama-2-7b")
        assert (read.train, read.optim, read.lora, read.parallel) == tuple(
            getattr(found["config"], name) for name in ("train", "optim", "lora", "parallel"))
        assert read.lora.rank == (0 if method == "full" else 128)


def test_repetition_is_warned_about():
    assert budget.list_warnings(make_job(general=1e9)) == []
    assert "5 epochs" in budget.list_warnings(make_job(epochs=5.0))[0]
    assert "3.0 times" not in str(budget.list_warnings(make_job(general=1e8)))
    assert "10.0 times" in budget.list_warnings(make_job(general=3e7))[0]
    assert "no replay" in budget.list_warnings(make_job(replay=0.0))[0]
