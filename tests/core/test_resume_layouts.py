"""A run that goes on in another layout at each stop: one folder, one command, other ranks. Every layout is written by
one and read by others.

Truth: the same run on one rank that nothing stopped, and the checkpoint that was read. Four forked processes part and
meet again as one, two or four ranks; this file is also what each of them runs.
"""

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch
from ranks import fork_ranks, meet, run_once
from runs import lines, make_lab, same_checkpoint, settings, trace

import train
from core import checkpoint
from stages.resume import Saver

FSDP = ["--parallel.strategy", "fsdp"]
# {layout: (ranks, its words)}
LAYOUTS = {"one": (1, []), "ddp_2": (2, []), "ddp_4": (4, []), "fsdp_2": (2, FSDP), "fsdp_4": (4, FSDP),
           "hsdp": (4, [*FSDP, "--parallel.replicas", 2]), "tensor_2": (2, [*FSDP, "--parallel.tensor", 2]),
           "tensor_fsdp": (4, [*FSDP, "--parallel.tensor", 2]), "context_2": (2, ["--parallel.context", 2]),
           "context_fsdp": (4, [*FSDP, "--parallel.context", 2])}
# {case: (its words, its layouts in their order)}. Each is read by the next one: 1 <-> 2 <-> 4 ranks, DDP <-> FSDP <->
# HSDP <-> tensor parallel <-> context parallel, both ways.
CASES = {"full": (["--forget.ema.decay", 0.9],
                  ["one", "ddp_2", "fsdp_4", "hsdp", "tensor_fsdp", "context_2", "tensor_2", "hsdp", "fsdp_2", "ddp_4",
                   "ddp_2", "context_fsdp", "one", "tensor_fsdp", "one"]),
         "adapters": (["--lora.rank", 4, "--model.init", "pretrained"],
                      ["one", "tensor_fsdp", "fsdp_2", "hsdp", "context_2", "tensor_2", "one"])}
# Each layout takes so many steps of a run.
EACH = 2


def case(folder: Path, name: str, out: str, layout: str = "one"):
    words, order = CASES[name]
    words = [*words, *(["--model.path", folder / "base/final"] if name == "adapters" else [])]
    return settings(folder / "lab", folder / f"{name}_{out}", "--train.batch-size", 4, "--train.micro-batch-size", 1,
                    "--train.keep", 99, "--optim.lr", 1e-3, "--optim.min-lr", 1e-4, "--eval.tokens", 120, *words,
                    *LAYOUTS[layout][1], steps=EACH * len(order))


@contextlib.contextmanager
def watched(folder: Path, number: int):
    """What the run was given and what it read: the state after a resumption is written again as it is, the batches of
    each step are kept, and each layout leaves as by a signal in the last of its steps."""
    resume, step, seen = train.resume, train.train_step, {}

    def resume_and_write(run):
        start = resume(run)
        if start:
            saver = Saver(run)
            saver.folder = folder / "read" / run.folder.name
            saver.save(start)
            saver.finish()
            saver.close()
        return start

    def keep_batches(run, at, batches):
        seen[at] = {"share": run.world.share, "part": run.world.rank % (run.world.size // run.world.share[1]),
                    **{key: torch.cat([getattr(batch, key) for batch in batches]) for key in ("tokens", "labels")}}
        if at + 1 == (number + 1) * EACH < run.steps:
            os.kill(os.getpid(), 15)
        return step(run, at, batches)
    train.resume, train.train_step = resume_and_write, keep_batches
    try:
        yield seen
    finally:
        train.resume, train.train_step = resume, step


def as_rank(rank: int, folder: Path):
    for name, (_, order) in CASES.items():
        for number, layout in enumerate(order):
            with meet(folder, f"{name}_{number}", rank, LAYOUTS[layout][0]) as world:
                if world:
                    c = case(folder, name, "moved", layout)
                    world.share_sequences(c.parallel)
                    with watched(folder, number) as seen:
                        train.train(c, world)
                    torch.save(seen, folder / f"{name}_{number}_{rank}.pt")
        with meet(folder, f"{name}_alone", rank, 1) as world:
            if world:
                with watched(folder, len(order)) as seen:
                    train.train(case(folder, name, "alone"), world)
                torch.save(seen, folder / f"{name}_alone.pt")


def make_base(rank: int, folder: Path):
    make_lab(folder / "lab")
    with meet(folder, "base", rank, 1) as world:
        train.train(settings(folder / "lab", folder / "base", steps=2), world)


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    return run_once(tmp_path_factory, __file__)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_read_is_what_was_written(moved, name):
    """Weights, moments, the average of the weights and the rest of the state, in every bit, whoever wrote them."""
    order = CASES[name][1]
    stops = [EACH * number for number in range(1, len(order))]
    assert checkpoint.steps(moved / "read" / f"{name}_moved") == stops
    assert [record["step"] for record in lines(moved / f"{name}_moved", "resume")] == stops
    for number, step in enumerate(stops, 1):
        read = checkpoint.path_of(moved / "read" / f"{name}_moved", step)
        again = moved / f"again_{name}_{step}/checkpoints"
        again.mkdir(parents=True)
        read.rename(checkpoint.path_of(again, step))
        same_checkpoint(moved / f"{name}_moved", again.parent, step)
        shards = list(checkpoint.path_of(moved / f"{name}_moved/checkpoints", step).glob("*.safetensors"))
        assert len(shards) == LAYOUTS[order[number - 1]][0], f"{order[number - 1]} wrote {shards}"


def join_parts(parts: list, in_pairs: bool) -> torch.Tensor:
    """What the ranks of a group hold of the same sequences, in their order: a part each, or, in pairs, rank r the r-th
    from the beginning and the r-th from the end."""
    if not in_pairs:
        return torch.cat(parts, 1)
    pairs = [part.chunk(2, 1) for part in parts]
    return torch.cat([pair[0] for pair in pairs] + [pair[1] for pair in pairs[::-1]], 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_step_reads_its_sequences_once(moved, name):
    truth = torch.load(moved / f"{name}_alone.pt", weights_only=True)
    assert sorted(truth) == [*range(EACH * len(CASES[name][1]))]
    for number, layout in enumerate(CASES[name][1]):
        ranks = [torch.load(moved / f"{name}_{number}_{rank}.pt", weights_only=True)
                 for rank in range(LAYOUTS[layout][0])]
        for step in range(number * EACH, (number + 1) * EACH):
            found = [own[step] for own in ranks]
            for key in ("tokens", "labels"):
                groups = [[own[key] for own in found if own["share"][0] == k] for k in range(found[0]["share"][1])]
                joined = torch.cat([join_parts(parts, "context" in layout) for parts in groups])
                assert torch.equal(joined, truth[step][key]), (layout, step, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_run_is_the_one_that_nothing_stopped(moved, name):
    order = CASES[name][1]
    mine, truth = trace(moved / f"{name}_moved"), trace(moved / f"{name}_alone")
    assert mine.keys() == truth.keys()
    for step, values in truth.items():
        # The learning rate and the share of the domain are functions of the step.
        assert mine[step][:2] == pytest.approx(values[:2], rel=1e-5), (step, order[(step - 1) // EACH])
        assert mine[step][2:4] == values[2:4]
    last = EACH * len(order)
    ends = [checkpoint.load(checkpoint.path_of(moved / f"{name}_{out}/checkpoints", last))[:2]
            for out in ("moved", "alone")]
    for found, expected in zip(*ends):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=key)


if __name__ == "__main__":
    for function, ranks in ((make_base, 1), (as_rank, 4)):
        fork_ranks(function, ranks, Path(sys.argv[1]))
