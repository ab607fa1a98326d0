"""core/expert_parallel.py: it changes nothing but the order of sums, and checkpoints move.

The truth is one process with the whole batch. Four forked ranks (gloo) go through every case; this file is also what
each of them runs.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from ranks import fork_ranks, found_by, go_through, lay_out, pass_on, run_once, steps_of
from runs import make_lab, one, settings

import hf
import moe
import train
from core import checkpoint
from core.expert_parallel import choose_dim
from core.parallel import ParallelConfig
from model import Model, ModelConfig
from stages.refuse import refuse_sharing

STEPS = 20
FSDP = ["--parallel.strategy", "fsdp"]
# Two groups of two ranks, E / 2 experts each; and one expert on each of four.
TWO, FOUR = [*FSDP, "--parallel.experts", 2], [*FSDP, "--parallel.experts", 4]
LORA = ["--lora.rank", 4]
# {case: (words of its layout, its base, its other words)}
CASES = {"two": ([*TWO, "--parallel.reshard", "False"], "even", ["--router.balance", 0.01, "--forget.ema.decay", 0.9]),
         "four": (FOUR, "even", ["--optim.clip", 0.1, "--model.activation-checkpointing"]),
         "two_ewc": (TWO, "even", ["--forget.ewc.strength", 100, "--forget.ewc.samples", 8]),
         "two_lora": (TWO, "even", [*LORA, "--lora.dora", "--forget.lwf.alpha", 0.5]),
         "four_frozen": (FOUR, "even", ["--forget.freeze.schedule", "stages", "--forget.freeze.stages",
                                         "0 layers.0.mlp norm"]),
         # The router sends every token to the same two experts: two of the ranks never get one.
         "four_uneven": (FOUR, "uneven", LORA)}
# A checkpoint's way: from one rank, by the layouts, and to one rank again, which reads it here.
WAY = {"fsdp": FSDP, "two": TWO, "four": FOUR, "again": FSDP}


def case(folder: Path, name: str, is_laid_out: bool):
    layout, base, words = CASES[name]
    return settings(folder / "lab", "unused", "--train.batch-size", 4, "--train.micro-batch-size", 1, "--optim.clip", 0,
                    "--optim.lr", 1e-3, "--optim.min-lr", 1e-4, "--model.init", "pretrained", "--model.path",
                    folder / base, *words, *(layout if is_laid_out else []), steps=STEPS)


def whole(folder: Path, layout: list, out: str):
    return settings(folder / "lab", folder / out, "--train.batch-size", 8, "--train.micro-batch-size", 2,
                    "--model.init", "pretrained", "--model.path", folder / "even", "--train.save-every", 3,
                    "--optim.lr", 1e-3, "--eval.sample-tokens", 4, *layout, steps=3)


def measure(c, world) -> dict:
    found = steps_of(c, world, c.train.steps)
    return {key: found[key] for key in ("loss", "norm", "weights", "unmoved", "moved", "fisher")}


def whole_runs(folder: Path, world):
    before = "alone"
    for name, layout in WAY.items():
        c = whole(folder, layout, f"moved_{name}")
        c.train.branch_from = str(folder / before / "checkpoints/step_00000003")
        lay_out(world, c)
        pass_on(c, world)
        before = f"moved_{name}"
    c = whole(folder, TWO, "whole")
    lay_out(world, c)
    train.train(c, world)


def alone(rank: int, folder: Path):
    train.train(whole(folder, [], "alone"), one())


def make_bases(rank: int, folder: Path):
    make_lab(folder / "lab")
    # The second of its blocks is dense.
    model = Model(ModelConfig(300, 32, 64, 2, 4, 2, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
                              moe_intermediate_size=24, qk_norm=True, dense_layers=[1], family="qwen3_moe"))
    model.initialise(0)
    hf.save(model, folder / "even", tokenizer=folder / "lab/tok")
    torch.nn.init.zeros_(model.layers[0].mlp.gate.weight)
    hf.save(model, folder / "uneven", tokenizer=folder / "lab/tok")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_once(tmp_path_factory, __file__)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_four_ranks_are_one(ranks, name):
    found = found_by(ranks)
    mine, (truth,) = found[name], found[f"truth of {name}"]
    assert len(mine) == 4
    assert all(mine[0] == other for other in mine[1:])
    for key in ("loss", "norm"):
        assert mine[0][key] == pytest.approx(truth[key], rel=5e-6), key
    assert truth["norm"][0] > 0.01
    assert mine[0]["fisher"] == pytest.approx(truth["fisher"], rel=1e-5)
    assert mine[0]["weights"] == pytest.approx(truth["weights"], rel=1e-4)
    # All that trains moves, and nothing else.
    assert mine[0]["unmoved"] == truth["unmoved"] == []
    assert mine[0]["moved"] == truth["moved"]
    assert (len(truth["moved"]) < len(truth["weights"])) == ("frozen" in name or "--lora.rank" in CASES[name][2])


@pytest.mark.slow
def test_a_checkpoint_goes_from_one_rank_to_fsdp_to_experts_and_back(ranks):
    """The same tensors in every bit, by the same names, each value written once."""
    states = {out: checkpoint.load(checkpoint.path_of(ranks / out / "checkpoints", 3))[:2]
              for out in ("alone", *(f"moved_{name}" for name in WAY))}
    names = {f"layers.0.mlp.experts.{layer}_proj.weight" for layer in ("gate", "up", "down")}
    for out, parts in states.items():
        for mine, true in zip(parts, states["alone"]):
            assert mine.keys() == true.keys()
            assert all(torch.equal(mine[key], true[key]) for key in true), out
        assert names < parts[0].keys()
        size = sum(file.stat().st_size for file in (ranks / out / "checkpoints/step_00000003").glob("*.safetensors"))
        assert size < 1.4 * sum(x.nbytes for part in parts for x in part.values())


@pytest.mark.slow
def test_a_whole_run_evaluates_and_exports_what_one_rank_does(ranks):
    mine, theirs = (json.loads((ranks / out / "eval.json").read_text()) for out in ("whole", "alone"))
    for side in ("before", "after"):
        for source, true in theirs[side].items():
            assert mine[side][source]["nats_by_document"] == pytest.approx(true["nats_by_document"], rel=1e-4)
    weights = [dict(hf.load(ranks / out / "final").named_parameters()) for out in ("whole", "alone")]
    for key, value in weights[1].items():
        torch.testing.assert_close(weights[0][key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_a_router_of_zeros_sends_all_tokens_to_two_experts():
    assert len(moe.choose_experts(torch.zeros(256, 4), 2, True)[1].unique()) == 2


def test_what_is_cut():
    assert [choose_dim(torch.empty(shape), 2).dim for shape in ((2, 24, 32), (2, 3, 32), (2, 4))] == [1, 0, 1]


def test_layouts_that_cannot_be_are_refused(lab, tmp_path):
    for config, said in ((ParallelConfig(experts=2), "set --parallel.strategy fsdp"),
                         (ParallelConfig("fsdp", experts=3), "parallel.experts 3 does not divide the 4 ranks"),
                         (ParallelConfig("fsdp", experts=2, tensor=2), "does not go with parallel.tensor"),
                         (ParallelConfig("fsdp", experts=2, replicas=2), "does not go with parallel.replicas")):
        with pytest.raises(ValueError, match=said):
            config.refuse_layout(4)
    ParallelConfig("fsdp", experts=4).refuse_layout(4)
    six = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    eight = {**six, "num_experts": 8}
    for words, experts, said in (([], {}, "this model has none"), ([], six, "does not divide the 6 experts"),
                                 (["--lora.rank", 4, "--lora.base", "nf4"], eight, "in one record")):
        c = settings(lab, tmp_path / "run", *FOUR, *words)
        with pytest.raises(ValueError, match=said):
            refuse_sharing(c, ModelConfig(97, 32, 64, 2, 4, 2, **experts))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    # Read once, for all ranks.
    parsed = {name: (4, case(folder, name, True)) for name in CASES}
    parsed |= {f"truth of {name}": (1, case(folder, name, False)) for name in CASES}
    fork_ranks(make_bases, 1, folder)
    fork_ranks(alone, 1, folder)
    go_through(folder, parsed, measure, whole_runs)
