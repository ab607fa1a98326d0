"""core/parallel.py's layouts of four ranks: they change nothing but the order of sums, and checkpoints move.

The truth is one process with the whole batch. One torchrun of four real ranks (gloo) goes through every case; this file
is also what each of them runs. What two ranks do is in test_parallel.py.
"""

import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import pass_on, steps_of
from runs import ENV, lines, make_lab, one, settings

import hf
import train
from core import checkpoint, parallel
from core.parallel import ParallelConfig
from model import Block, Model, ModelConfig
from stages import evaluate

STEPS = 20
FSDP = ["--parallel.strategy", "fsdp"]
HSDP = [*FSDP, "--parallel.replicas", 2]
QLORA = ["--lora.rank", 4, "--model.init", "pretrained", "--lora.base", "nf4"]
# Runs that one rank makes too, and the layouts that go on from its checkpoint, and that make all of it.
ALONE = {"alone": "hsdp", "alone_qlora": "fsdp_qlora"}
MOVED = {"hsdp": "alone", "tensor": "alone", "fsdp_qlora": "alone_qlora"}
WHOLE = {"context": "alone", "tensor": "alone", "fsdp_qlora": "alone_qlora"}
# A rank that is slow in one of these runs.
SLOW = 2, "fsdp_qlora"
# F from labels that are drawn, and a pull that weighs as much as the loss.
EWC = ["--forget.ewc.strength", 100, "--forget.ewc.samples", 8, "--forget.ewc.fisher", "true",
       "--model.init", "pretrained"]
TENSOR = ["--parallel.strategy", "fsdp", "--parallel.tensor", 2]
# {case: (words of its layout, its other words)}
CASES = {"hsdp": (HSDP, []), "hsdp_untied": (HSDP, ["--model.tie-word-embeddings", "False"]),
         "hsdp_lora": (HSDP, ["--lora.rank", 4, "--model.init", "pretrained"]),
         "fsdp_qlora": (FSDP, QLORA), "hsdp_int8": (HSDP, [*QLORA, "--lora.base", "int8", "--lora.dora"]),
         "hsdp_8bit": (HSDP, ["--optim.name", "adamw_8bit"]),
         "context": (["--parallel.context", 2], []),
         "context_lora": (["--parallel.context", 2], ["--lora.rank", 4, "--model.init", "pretrained",
                                                      "--forget.lwf.alpha", 0.5]),
         "context_masked": (["--parallel.context", 2], ["--objective.name", "masked", "--objective.mask-token-id", 0]),
         # Twice as many ranks as key-value heads.
         "context_fsdp": (["--parallel.context", 4, "--parallel.strategy", "fsdp"],
                          ["--model.activation-checkpointing", "--forget.ewc.strength", 1, "--forget.ewc.samples", 8,
                           "--model.init", "pretrained"]),
         "tensor": (TENSOR, []), "tensor_clip": (TENSOR, ["--optim.clip", 0.1, "--model.tie-word-embeddings", "False"]),
         "tensor_checkpointing": (TENSOR, ["--model.activation-checkpointing", "--objective.name", "masked",
                                           "--objective.mask-token-id", 0]),
         "tensor_lora": (TENSOR, ["--lora.rank", 4, "--model.init", "pretrained", "--forget.lwf.alpha", 0.5]),
         "tensor_experts": (TENSOR, ["--router.balance", 0.01, "--router.z", 1e-3, "--model.init", "experts"]),
         "tensor_experts_lora": (TENSOR, ["--model.init", "experts", "--lora.rank", 4]),
         "tensor_ewc": (TENSOR, EWC),
         "tensor_muon": (TENSOR, ["--optim.name", "muon"]),
         "tensor_8bit": (TENSOR, ["--optim.name", "adamw_8bit", "--model.hidden-size", 64]),
         "tensor_dora": (TENSOR, [*QLORA, "--lora.base", "int8", "--lora.dora"]),
         # Each rank has blocks of 64 of each row.
         "tensor_qlora": (TENSOR, [*QLORA, "--lora.dora", "--model.init", "wide"]),
         # Each group that holds the model is a group that shares its matmuls.
         "hsdp_tensor": ([*TENSOR, "--parallel.replicas", 2], ["--optim.clip", 0.1]),
         "tensor_ema": (TENSOR, ["--forget.ema.decay", 0.9, "--model.init", "pretrained", "--forget.lwf.alpha", 0.5]),
         "tensor_context": ([*TENSOR, "--parallel.context", 2], []),
         "gathered": (["--parallel.strategy", "fsdp", "--parallel.reshard", "False"], [])}


# The most of the model's bytes that a rank may hold: a share of four or two, and what of small tensors is uneven.
# Ranks that share matmuls hold the embedding alike.
HELD = {"fsdp_qlora": 0.3, "tensor_qlora": 0.45, "hsdp": 0.55, "hsdp_int8": 0.55}


def case(folder: Path, name: str, is_laid_out: bool, out="unused"):
    layout, words = CASES[name]
    if kind := next((word for word in ("experts", "wide") if word in words), None):
        words = ["pretrained" if word == kind else word for word in words] + ["--model.path", folder / kind]
    elif "pretrained" in words:
        words = [*words, "--model.path", folder / "base/final"]
    return settings(folder / "lab", folder / out, "--train.batch-size", 8, "--train.micro-batch-size", 1,
                    "--optim.clip", 0, "--optim.lr", 1e-3, "--optim.min-lr", 1e-4, *words,
                    *(layout if is_laid_out else []), steps=STEPS)


def lay_out(world, c):
    """As at the start of a command."""
    world.sequences = None
    world.share_sequences(c.parallel)


@contextlib.contextmanager
def slow_blocks():
    """Each block takes 30 ms longer."""
    real = Block.forward

    def forward(block, *args):
        time.sleep(0.03)
        return real(block, *args)
    Block.forward = forward
    try:
        yield
    finally:
        Block.forward = real


def as_rank(folder: Path):
    torch.set_num_threads(1)
    evaluate.run_command = lambda *words: ""
    world = parallel.start("cpu")
    results = {}
    for name in CASES:
        c = case(folder, name, True)
        lay_out(world, c)
        found = steps_of(c, world, STEPS)
        results[name] = {key: found[key] for key in ("loss", "norm", "weights", "unmoved", "held", "fisher")}
    (folder / f"rank{world.rank}.json").write_text(json.dumps(results))
    for name in MOVED:
        c = case(folder, name, True, f"moved_{name}")
        c.train.branch_from, c.train.steps = str(folder / MOVED[name] / "checkpoints/step_00000003"), 3
        lay_out(world, c)
        pass_on(c, world)
    for name in WHOLE:
        c = case(folder, name, True, f"whole_{name}")
        c.train.save_every, c.train.steps, c.eval.sample_tokens = 3, 3, 4
        lay_out(world, c)
        with slow_blocks() if (world.rank, name) == SLOW else contextlib.nullcontext():
            train.train(c, world)
    world.barrier()
    parallel.stop()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    make_lab(folder / "lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.evaluate.run_command", lambda *words: "")
        train.train(settings(folder / "lab", folder / "base", steps=2), one())
        experts = Model(ModelConfig(300, 32, 64, 2, 4, 2, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
                                    moe_intermediate_size=24, qk_norm=True, dense_layers=[1], family="qwen3_moe"))
        experts.initialise(0)
        hf.save(experts, folder / "experts", tokenizer=folder / "lab/tok")
        wide = Model(ModelConfig(300, 128, 128, 2, 4, 2))
        wide.initialise(0)
        hf.save(wide, folder / "wide", tokenizer=folder / "lab/tok")
        for out, name in ALONE.items():
            c = case(folder, name, False, out)
            c.train.save_every, c.train.steps, c.eval.sample_tokens = 3, 3, 4
            train.train(c, one())
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4",
                           __file__, folder], env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    # Nothing of torch's that each rank would say to the user.
    assert not re.search("deprecated|suboptimal", done.stderr), done.stderr[-3000:]
    (folder / "said").write_text(done.stdout)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_four_ranks_are_one(ranks, name):
    found = [json.loads((ranks / f"rank{rank}.json").read_text())[name] for rank in range(4)]
    truth = steps_of(case(ranks, name, False), one(), STEPS)
    held = [each.pop("held") for each in found]
    assert all(found[0] == other for other in found[1:])
    assert found[0]["unmoved"] == []
    if name in HELD:
        assert max(held) < HELD[name] * truth["held"]
    for key in ("loss", "norm"):
        # What 8 bits make of a moment, and bf16 of Muon's matmuls, turns on the last bit; else only the order of sums
        # differs.
        rel = next((rel for part, rel in (("8bit", 1e-3), ("muon", 1e-3)) if part in name), 5e-6)
        assert found[0][key] == pytest.approx(truth[key], rel=rel), key
    assert truth["norm"][0] > 0.01
    assert found[0]["fisher"] == pytest.approx(truth["fisher"], rel=1e-5)
    # The same values in 4 bits stand in other tensors where each rank has blocks of its own.
    mine, theirs = ({key: value for key, value in each["weights"].items()
                     if name != "tensor_qlora" or ".quantised." not in key} for each in (found[0], truth))
    assert mine == pytest.approx(theirs, rel=max(rel, 1e-4))


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVED)
def test_each_value_is_written_once(ranks, name):
    """The state of one rank, read by four and written again: the same tensors and no more bytes."""
    before, after = (checkpoint.path_of(ranks / out / "checkpoints", 3) for out in (MOVED[name], f"moved_{name}"))
    for mine, theirs in zip(checkpoint.load(after)[:2], checkpoint.load(before)[:2]):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    # Without the length of its header, and the header, which have 8 and so many bytes.
    sizes = [sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
                 for file in path.glob("*.safetensors")) for path in (before, after)]
    assert sizes[1] == sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_run_scores_samples_and_exports_what_one_rank_does(ranks, name):
    # One rank scores what it exports, on a plain base; a sharded model is scored as it is, on the one in few bits.
    for step in (0,) if "qlora" in name else (0, 3):
        mine, theirs = (json.loads((ranks / out / f"eval_step_{step}.json").read_text())["texts"]
                        for out in (f"whole_{name}", WHOLE[name]))
        for source, true in theirs.items():
            for key in ("bits_per_byte", "tokens", "bytes", "nats_by_document"):
                assert mine[source][key] == pytest.approx(true[key], rel=1e-4), key
    texts = [[sample["text"] for line in lines(ranks / out, "samples") for sample in line["samples"]]
             for out in (f"whole_{name}", WHOLE[name])]
    # The second half are those of what was scored after the run.
    compared = len(texts[0]) // 2 if "qlora" in name else len(texts[0])
    assert texts[0][:compared] == texts[1][:compared]
    assert compared >= 4
    weights = [dict(hf.load(ranks / out / "final").named_parameters()) for out in (f"whole_{name}", WHOLE[name])]
    for key, value in weights[1].items():
        torch.testing.assert_close(weights[0][key], value, rtol=1e-3, atol=1e-5, msg=key)
    assert (ranks / f"whole_{name}/eval.json").exists()


@pytest.mark.slow
def test_a_slow_rank_is_named(ranks):
    rank, name = SLOW
    found = [line["ranks"] for line in lines(ranks / f"whole_{name}", "train")]
    assert [each["slowest"] for each in found] == [rank] * 3
    assert min(each["ratio"] for each in found) > 1.5
    # Two blocks of two sequences, one after the other.
    assert min(each["slowest_ms"] for each in found) >= 4 * 30
    assert f"warning: rank {rank} takes" in (ranks / "said").read_text()


def test_layouts_that_cannot_be_are_refused():
    for config, said in ((ParallelConfig("ddp", replicas=2), "set --parallel.strategy fsdp"),
                         (ParallelConfig("ddp", reshard=False), "parallel.reshard is about sharded weights"),
                         (ParallelConfig("fsdp", replicas=3), "does not part 4 ranks"),
                         (ParallelConfig("fsdp", replicas=4), "a divisor of 4 below it"),
                         (ParallelConfig(context=3), "parallel.context 3 does not divide the 4 ranks"),
                         (ParallelConfig(tensor=2), "parallel.tensor is about sharded weights"),
                         (ParallelConfig("fsdp", tensor=2, replicas=4), "take a divisor of 2$")):
        with pytest.raises(ValueError, match=said):
            config.refuse_layout(4)
    ParallelConfig("fsdp", replicas=2, reshard=False).refuse_layout(4)
    ParallelConfig("fsdp", replicas=2, tensor=2).refuse_layout(4)


if __name__ == "__main__":
    as_rank(Path(sys.argv[1]))
