"""core/guard.py where two ranks share matmuls or sequences: what is not finite on one of them is left out, or rewinds,
on both, and that costs no collective. (DDP and FSDP: test_watch.py. Kills around it: make faults.)

Truth: the checkpoints before a fault. Two forked ranks go through every case; this file is also what they run.
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import fork_ranks, lay_out, make_lab_in, meet, run_once
from runs import lines, settings

import train
from core import checkpoint, parallel
from core.errors import Diverged

pytestmark = pytest.mark.slow
LAYOUTS = {"tensor": ["--parallel.strategy", "fsdp", "--parallel.tensor", 2], "context": ["--parallel.context", 2]}
# {case: (in what the second rank has a NaN, in which steps, counted from 0; its words)}
CASES = {"limit": ("gradient", range(5, 99), ["--guard.limit", 2, "--train.save-every", 5]),
         "loss": ("loss", [5], ["--train.save-every", 5]),
         "rewind": ("loss", [5], ["--guard.nonfinite", "rewind", "--guard.spike", "rewind", "--guard.window", 8,
                                  "--train.save-every", 3, "--train.keep", 9])}


def case(folder: Path, layout: str, name: str):
    return settings(folder / "lab", folder / f"{layout}_{name}", *LAYOUTS[layout], *CASES[name][2], steps=10)


def watch_steps(name: str, rank: int) -> list:
    """Let the case's steps be spoilt on the second rank; returns (step, collectives, those that sum values) of each."""
    step, clip, reduce, counts, calls = train.train_step, parallel.clip_gradients, dist.all_reduce, [], []
    what, steps, _ = CASES[name]

    def counted(tensor, *arguments, **options):
        calls.append(tensor.dtype == torch.float64)
        return reduce(tensor, *arguments, **options)

    def spoilt(run, number, batches):
        is_spoilt = rank == 1 and number in steps
        # What only this rank's tokens go through: the others' losses stay finite.
        weight = run.inner.norm.weight.data
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        kept = local.clone()
        if is_spoilt and what == "loss":
            local.fill_(math.nan)
        elif is_spoilt:
            # After the ranks have shared it, so that their norms differ.
            parallel.clip_gradients = lambda model, limit: clip(model, limit) * math.nan
        calls.clear()
        done = step(run, number, batches)
        counts.append((number, len(calls), sum(calls)))
        parallel.clip_gradients = clip
        if is_spoilt and what == "loss":
            # A rewind has read it anew already.
            local.copy_(torch.where(local.isnan(), kept, local))
        return done
    train.train_step, dist.all_reduce = spoilt, counted
    return counts


def as_rank(rank: int, folder: Path):
    real = train.train_step, dist.all_reduce
    found = {}
    for layout in LAYOUTS:
        with meet(folder, layout, rank, 2) as world:
            for name in CASES:
                c = case(folder, layout, name)
                lay_out(world, c)
                counts, said = watch_steps(name, rank), ""
                try:
                    train.train(c, world)
                except Diverged as error:
                    said = str(error)
                train.train_step, dist.all_reduce = real
                found[f"{layout}_{name}"] = {"counts": counts, "said": said}
            # The same command without the fault.
            train.train(case(folder, layout, "limit"), world)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = run_once(tmp_path_factory, __file__)
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def state(out: Path, step: int) -> dict:
    weights, moments, _ = checkpoint.load(checkpoint.path_of(out / "checkpoints", step))
    return weights | moments


def is_same(mine: dict, theirs: dict) -> bool:
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_are_left_out_on_both_and_end_the_run(ranks, layout):
    folder, found = ranks
    said = {each[f"{layout}_limit"]["said"] for each in found}
    assert len(said) == 1
    assert "in step 7 the gradient norm is nan" in said.pop()
    out = folder / f"{layout}_limit"
    assert [row["step"] for row in lines(out, "left_out")] == [6, 7]
    assert is_same(state(out, 7), state(out, 5))
    assert not is_same(state(out, 10), state(out, 7)), "the run without the fault went on"
    assert (out / "eval.json").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loss_that_is_not_finite_on_one_rank_is_left_out_on_both(ranks, layout):
    folder, found = ranks
    out = folder / f"{layout}_loss"
    assert {each[f"{layout}_loss"]["said"] for each in found} == {""}
    assert [(row["step"], row["message"].partition(" (")[0]) for row in lines(out, "left_out")] == [
        (6, "in step 6 the loss is nan and the gradient norm is nan")]
    assert all(value.isfinite().all() for value in state(out, 10).values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loss_that_is_not_finite_on_one_rank_rewinds_both(ranks, layout):
    """At a save step, so that what is saved is what was read."""
    out = ranks[0] / f"{layout}_rewind"
    assert [(row["step"], row["to"]) for row in lines(out, "rewind")] == [(6, 3)]
    assert is_same(state(out, 6), state(out, 3))
    assert not is_same(state(out, 9), state(out, 6))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_guard_takes_no_collective_of_its_own(ranks, layout):
    """Each step sums values twice: the targets, and with losses and norms all that ranks have to agree on. Shared
    matmuls take one more for the norm and one per tensor that is the same on both ranks."""
    for each in ranks[1]:
        for name in CASES:
            counts = [(calls, sums) for number, calls, sums in each[f"{layout}_{name}"]["counts"]
                      if name != "rewind" or number != 5]
            assert {sums for _, sums in counts} == {2}
            assert {calls for calls, _ in counts} == ({2} if layout == "context" else {2 + 1 + 6})


if __name__ == "__main__":
    fork_ranks(make_lab_in, 1, Path(sys.argv[1]))
    fork_ranks(as_rank, 2, Path(sys.argv[1]))
