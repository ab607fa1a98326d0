"""core/parallel.py's layouts of four ranks: they change nothing but the order of sums, and checkpoints move.

The truth is one process with the whole batch. One torchrun of four real ranks (gloo) goes through every case; this file
is also what each of them runs. What two ranks do is in test_parallel.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import pass_on, steps_of
from runs import ENV, make_lab, one, settings

import train
from core import checkpoint, parallel
from core.parallel import ParallelConfig

STEPS = 20
HSDP = ["--parallel.strategy", "fsdp", "--parallel.replicas", 2]
# {case: (words of its layout, its other words)}
CASES = {"hsdp": (HSDP, []), "hsdp_untied": (HSDP, ["--model.tie-word-embeddings", "False"]),
         "hsdp_lora": (HSDP, ["--lora.rank", 4, "--model.init", "pretrained"]),
         "hsdp_8bit": (HSDP, ["--optim.name", "adamw_8bit"]),
         "context": (["--parallel.context", 2], []),
         "context_lora": (["--parallel.context", 2], ["--lora.rank", 4, "--model.init", "pretrained",
                                                      "--forget.lwf.alpha", 0.5]),
         "context_masked": (["--parallel.context", 2], ["--objective.name", "masked", "--objective.mask-token-id", 0]),
         # Twice as many ranks as key-value heads.
         "context_fsdp": (["--parallel.context", 4, "--parallel.strategy", "fsdp"],
                          ["--model.activation-checkpointing", "--forget.ewc.strength", 1, "--forget.ewc.samples", 8,
                           "--model.init", "pretrained"]),
         "gathered": (["--parallel.strategy", "fsdp", "--parallel.reshard", "False"], [])}


def case(folder: Path, name: str, is_laid_out: bool, out="unused"):
    layout, words = CASES[name]
    if "pretrained" in words:
        words = [*words, "--model.path", folder / "base/final"]
    return settings(folder / "lab", folder / out, "--train.batch-size", 8, "--train.micro-batch-size", 1,
                    "--optim.clip", 0, "--optim.lr", 1e-3, "--optim.min-lr", 1e-4, *words,
                    *(layout if is_laid_out else []), steps=STEPS)


def as_rank(folder: Path):
    torch.set_num_threads(1)
    world = parallel.start("cpu")
    results = {}
    for name in CASES:
        c = case(folder, name, True)
        world.sequences = None
        world.share_sequences(c.parallel.context)
        found = steps_of(c, world, STEPS)
        results[name] = {key: found[key] for key in ("loss", "norm", "weights")}
    (folder / f"rank{world.rank}.json").write_text(json.dumps(results))
    world.sequences = None
    c = case(folder, "hsdp", True, "moved")
    c.train.branch_from, c.train.steps = str(folder / "alone/checkpoints/step_00000003"), 3
    pass_on(c, world)
    world.barrier()
    parallel.stop()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    make_lab(folder / "lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.evaluate.run_command", lambda *words: "")
        train.train(settings(folder / "lab", folder / "base", steps=2), one())
        c = case(folder, "hsdp", False, "alone")
        c.train.save_every, c.train.steps = 3, 3
        train.train(c, one())
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4",
                           __file__, folder], env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_four_ranks_are_one(ranks, name):
    found = [json.loads((ranks / f"rank{rank}.json").read_text())[name] for rank in range(4)]
    truth = steps_of(case(ranks, name, False), one(), STEPS)
    assert all(found[0] == other for other in found[1:])
    for key in ("loss", "norm"):
        # What 8 bits make of a moment turns on its last bit; else only the order of sums differs.
        assert found[0][key] == pytest.approx(truth[key], rel=1e-3 if name == "hsdp_8bit" else 5e-6), key
    assert truth["norm"][0] > 0.01
    assert found[0]["weights"] == pytest.approx(truth["weights"], rel=1e-4)


@pytest.mark.slow
def test_each_value_is_written_once(ranks):
    """The state of one rank, read by two groups of two and written again: the same tensors and no more bytes."""
    before, after = (checkpoint.path_of(ranks / name / "checkpoints", 3) for name in ("alone", "moved"))
    for mine, theirs in zip(checkpoint.load(after)[:2], checkpoint.load(before)[:2]):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (before, after)]
    assert sizes[1] < 1.3 * sizes[0]                      # headers of more files; a second copy would be 2


def test_layouts_that_cannot_be_are_refused():
    for config, said in ((ParallelConfig("ddp", replicas=2), "set --parallel.strategy fsdp"),
                         (ParallelConfig("ddp", reshard=False), "parallel.reshard is about sharded weights"),
                         (ParallelConfig("fsdp", replicas=3), "does not part 4 ranks"),
                         (ParallelConfig("fsdp", replicas=4), "a divisor of 4 below it")):
        with pytest.raises(ValueError, match=said):
            config.refuse_layout(4)
    ParallelConfig("fsdp", replicas=2, reshard=False).refuse_layout(4)


if __name__ == "__main__":
    as_rank(Path(sys.argv[1]))
