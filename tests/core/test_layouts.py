"""core/parallel.py's layouts of two and four ranks: they change nothing but the order of sums, and checkpoints move.

The truth is one process with the whole batch, once per method. Four forked ranks (gloo) go through every case, or the
first two of them; this file is also what they run. Stages are in test_pipeline.py, parted experts in
test_expert_parallel.py, methods that keep the base's knowledge in test_parallel.py, objectives in
test_parallel_objectives.py.
"""

import contextlib
import copy
import functools
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import fork_ranks, found_by, go_through, lay_out, pass_on, run_once, steps_of
from runs import lines, make_lab, one, settings

import hf
import train
from core import checkpoint
from core.parallel import ParallelConfig
from model import Block, Model, ModelConfig

# Of what the ranks must do alike for long, and of what else is tried in their layouts.
STEPS, FEW = 20, 6
FSDP = ["--parallel.strategy", "fsdp"]
HSDP = [*FSDP, "--parallel.replicas", 2]
TENSOR = [*FSDP, "--parallel.tensor", 2]
CONTEXT = ["--parallel.context", 2]
# {base: what its sizes are besides those of all}; `few` has fewer key-value heads than four ranks. For four ranks that
# share matmuls each row of `wide` has blocks of 64 on each.
BASES = {"base": {}, "untied": {"tie_word_embeddings": False}, "few": {"num_key_value_heads": 2},
         "wide": {"hidden_size": 64, "head_dim": 32, "intermediate_size": 256},
         "windows": {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "windows": [6, 6],
                     "family": "mistral"},
         "experts": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 24,
                     "qk_norm": True, "dense_layers": [1], "family": "qwen3_moe"}}
BASE = ["--model.init", "pretrained", "--model.path"]
LORA = [*BASE, "base", "--lora.rank", 4]
QLORA = [*LORA, "--lora.base", "nf4", "--model.path", "wide"]
INT8 = [*LORA, "--lora.base", "int8", "--lora.dora"]
# F from labels that are drawn, and a pull that weighs as much as the loss.
EWC = [*BASE, "base", "--forget.ewc.strength", 100, "--forget.ewc.samples", 8, "--forget.ewc.fisher", "true"]
MASKED = ["--objective.name", "masked", "--objective.mask-token-id", 0]
# {method: its words}
METHODS = {"full": [], "frozen": [*BASE, "untied", "--forget.freeze.schedule", "top"], "lora": LORA, "qlora": QLORA,
           "experts": [*BASE, "experts"]}
ALL = " ".join(METHODS)
# {layout: (its ranks, its words, the methods that go through it)}
LAYOUTS = {"ddp_2": (2, [], ALL), "fsdp_2": (2, FSDP, ALL), "tensor_2": (2, TENSOR, ALL),
           "context_2": (2, CONTEXT, ALL), "ddp_4": (4, [], "full experts"), "fsdp_4": (4, FSDP, "full qlora experts"),
           "hsdp": (4, HSDP, ALL), "tensor_fsdp": (4, TENSOR, ALL),
           "tensor_4": (4, [*FSDP, "--parallel.tensor", 4], "full qlora"),
           "context_groups": (4, CONTEXT, "full lora"), "context_4": (4, ["--parallel.context", 4], "frozen experts"),
           "context_fsdp": (4, [*FSDP, *CONTEXT], "full qlora"),
           "tensor_context": (4, [*TENSOR, *CONTEXT], "full")}
# {case of four ranks: (words of its layout, its other words)}
CASES = {"hsdp_int8": (HSDP, [*INT8, "--train.batch-size", 8, "--train.micro-batch-size", 1]),
         "hsdp_8bit": (HSDP, ["--optim.name", "adamw_8bit"]),
         "context_lwf": (CONTEXT, [*LORA, "--forget.lwf.alpha", 0.5]),
         "context_masked": (CONTEXT, MASKED),
         "context_heads": ([*CONTEXT, "--parallel.exchange", "heads"], MASKED),
         "context_windows": (["--parallel.context", 4], [*BASE, "windows"]),
         # Twice as many ranks as key-value heads.
         "context_few": ([*FSDP, "--parallel.context", 4, "--parallel.exchange", "heads"],
                         [*BASE, "few", "--model.activation-checkpointing", "--forget.ewc.strength", 1,
                          "--forget.ewc.samples", 8]),
         "tensor_clip": ([*TENSOR, "--parallel.reduce-each"],
                         ["--optim.clip", 0.1, "--model.tie-word-embeddings", "False", "--train.batch-size", 8]),
         "tensor_checkpointing": ([*TENSOR, "--parallel.offload"], ["--model.activation-checkpointing", *MASKED]),
         "tensor_balance": (TENSOR, [*BASE, "experts", "--router.balance", 0.01, "--router.z", 1e-3,
                                      "--train.micro-batch-size", 1]),
         "tensor_experts_lora": (TENSOR, [*LORA, "--model.path", "experts"]),
         "tensor_ewc": (TENSOR, EWC),
         "tensor_muon": (TENSOR, ["--optim.name", "muon"]),
         "tensor_8bit": (TENSOR, ["--optim.name", "adamw_8bit", "--model.hidden-size", 64]),
         "tensor_int8": (TENSOR, INT8),
         "tensor_dora": (TENSOR, [*QLORA, "--lora.dora"]),
         # Each group that holds the model is a group that shares its matmuls.
         "hsdp_tensor": ([*TENSOR, "--parallel.replicas", 2], ["--optim.clip", 0.1]),
         "tensor_lwf": (TENSOR, [*LORA, "--forget.lwf.alpha", 0.5]),
         "tensor_ema": (TENSOR, [*BASE, "base", "--forget.ema.decay", 0.9, "--forget.lwf.alpha", 0.5]),
         "gathered": ([*FSDP, "--parallel.reshard", "False"], ["--train.batch-size", 8, "--train.micro-batch-size", 1])}
CASES = {name: (4, FEW, layout, words) for name, (layout, words) in CASES.items()}
CASES |= {f"{layout}_{method}": (ranks, STEPS, words, METHODS[method])
          for layout, (ranks, words, methods) in LAYOUTS.items() for method in methods.split()}
# The most of the model's bytes that a rank may hold: a share of four or two, and what of small tensors is uneven.
# Ranks that share matmuls hold the embedding alike.
HELD = {"ddp_2_full": 1, "fsdp_2_full": 0.52, "fsdp_2_lora": 0.52, "fsdp_2_qlora": 0.52, "fsdp_4_qlora": 0.3,
        "hsdp_full": 0.55, "hsdp_int8": 0.55, "tensor_dora": 0.45}
# What 8 bits make of a moment, and bf16 of Muon's matmuls, turns on the last bit; else only the order of sums differs.
ROUGH = {"hsdp_8bit": 1e-3, "tensor_8bit": 1e-3, "tensor_muon": 1e-3}

# Runs that one rank makes too, and the layouts that go on from its checkpoint, and that make all of it.
ALONE = {"alone": [], "alone_qlora": QLORA}
MOVED = {"hsdp": (HSDP, "alone"), "tensor": (TENSOR, "alone"), "fsdp_qlora": (FSDP, "alone_qlora")}
WHOLE = {"context": (CONTEXT, "alone"), "tensor": (TENSOR, "alone"), "fsdp_qlora": (FSDP, "alone_qlora")}
# A rank that is slow in one of these runs.
SLOW = 2, "fsdp_qlora"


@functools.cache
def parse(folder: Path, *words):
    """Of a command line, which takes as long to read as ten steps of these models."""
    words = [folder / word if word in BASES else word for word in words]
    return settings(folder / "lab", "unused", "--model.num-attention-heads", 8, "--model.num-key-value-heads", 4,
                    "--train.micro-batch-size", 2, "--optim.clip", 0, "--optim.lr", 1e-3, "--optim.min-lr", 1e-4,
                    *words)


def case(folder: Path, steps: int, layout: list, words: list):
    c = copy.deepcopy(parse(folder, *words))
    c.parallel, c.train.steps = parse(folder, *layout).parallel, steps
    return c


def truth_of(steps: int, words: list) -> str:
    return f"{steps} steps of {words}"


def short(folder: Path, layout: list, source: str, out: str):
    """A run of three steps, with all that comes before and after."""
    c = case(folder, 3, layout, ALONE[source])
    c.out, c.train.batch_size, c.train.micro_batch_size = str(folder / out), 8, 1
    c.train.save_every, c.eval.sample_tokens = 3, 4
    return c


@contextlib.contextmanager
def slow_blocks():
    """Each block takes so much longer that other processes on the machine do not matter."""
    real = Block.forward

    def forward(block, *args):
        time.sleep(0.2)
        return real(block, *args)
    Block.forward = forward
    try:
        yield
    finally:
        Block.forward = real


def measure(c, world) -> dict:
    found = steps_of(c, world, c.train.steps)
    return {name: found[name] for name in ("loss", "norm", "weights", "unmoved", "moved", "held", "digest", "fisher")}


def alone(rank: int, folder: Path):
    out = list(ALONE)[rank]
    train.train(short(folder, [], out, out), one())


def whole_runs(folder: Path, world):
    for name, (layout, source) in MOVED.items():
        c = short(folder, layout, source, f"moved_{name}")
        c.train.branch_from = str(folder / source / "checkpoints/step_00000003")
        lay_out(world, c)
        pass_on(c, world)
    for name, (layout, source) in WHOLE.items():
        c = short(folder, layout, source, f"whole_{name}")
        lay_out(world, c)
        with slow_blocks() if (world.rank, name) == SLOW else contextlib.nullcontext():
            train.train(c, world)


def make_bases(rank: int, folder: Path):
    make_lab(folder / "lab")
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 8, "num_key_value_heads": 4}
    for name, more in BASES.items():
        model = Model(ModelConfig(**sizes | more))
        model.initialise(0)
        hf.save(model, folder / name, tokenizer=folder / "lab/tok")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_once(tmp_path_factory, __file__)


@pytest.fixture(scope="module")
def found(ranks):
    return found_by(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ranks_are_one(found, name):
    ranks, steps, _, words = CASES[name]
    mine, (truth,), rough = found[name], found[truth_of(steps, words)], ROUGH.get(name, 5e-6)
    assert len(mine) == ranks
    held = [each.pop("held") for each in mine]
    assert all(mine[0] == other for other in mine[1:])
    for key in ("loss", "norm"):
        assert mine[0][key] == pytest.approx(truth[key], rel=rough), key
    assert len({*truth["loss"]}) == steps
    assert truth["norm"][0] > 0.01
    assert mine[0]["fisher"] == pytest.approx(truth["fisher"], rel=1e-5)
    # All that trains moves, and nothing else.
    assert mine[0]["unmoved"] == truth["unmoved"] == []
    assert mine[0]["moved"] == truth["moved"]
    assert (len(truth["moved"]) < len(truth["weights"])) == ("frozen" in name or "--lora.rank" in words)
    # The same values in 4 bits stand in other tensors where each rank has blocks of its own.
    weights, true = ({key: value for key, value in each["weights"].items()
                      if not (name.startswith("tensor") and ".quantised." in key)} for each in (mine[0], truth))
    assert weights == pytest.approx(true, rel=max(rough, 1e-4))
    assert max(held) <= HELD.get(name, 1) * truth["held"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_of_fsdp_and_ddp_are_the_same_bits(found, method):
    """Every loss and every weight after 20 steps. Norms are summed in another order, and clip nothing here."""
    for ddp, fsdp in zip(found[f"ddp_2_{method}"], found[f"fsdp_2_{method}"], strict=True):
        assert (fsdp["loss"], fsdp["digest"]) == (ddp["loss"], ddp["digest"])


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVED)
def test_each_value_is_written_once(ranks, name):
    """The state of one rank, read by four and written again: the same tensors and no more bytes."""
    before, after = (checkpoint.path_of(ranks / out / "checkpoints", 3) for out in (MOVED[name][1], f"moved_{name}"))
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
                        for out in (f"whole_{name}", WHOLE[name][1]))
        for source, true in theirs.items():
            for key in ("bits_per_byte", "tokens", "bytes", "nats_by_document"):
                assert mine[source][key] == pytest.approx(true[key], rel=1e-4), key
    texts = [[sample["text"] for line in lines(ranks / out, "samples") for sample in line["samples"]]
             for out in (f"whole_{name}", WHOLE[name][1])]
    # The second half are those of what was scored after the run.
    compared = len(texts[0]) // 2 if "qlora" in name else len(texts[0])
    assert texts[0][:compared] == texts[1][:compared]
    assert compared >= 4
    weights = [dict(hf.load(ranks / out / "final").named_parameters()) for out in (f"whole_{name}", WHOLE[name][1])]
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
    assert min(each["slowest_ms"] for each in found) >= 4 * 200
    said = (ranks / "said").read_text()
    assert f"warning: rank {rank} takes" in said
    # Nothing of torch's that each rank would say to the user.
    assert not re.search("deprecated|suboptimal", said)


def test_layouts_that_cannot_be_are_refused():
    for config, said in ((ParallelConfig("ddp", replicas=2), "set --parallel.strategy fsdp"),
                         (ParallelConfig("ddp", reshard=False), "parallel.reshard is about sharded weights"),
                         (ParallelConfig("fsdp", replicas=3), "does not part 4 ranks"),
                         (ParallelConfig("fsdp", replicas=4), "a divisor of 4 below it"),
                         (ParallelConfig(context=3), "parallel.context 3 does not divide the 4 ranks"),
                         (ParallelConfig(tensor=2), "parallel.tensor is about sharded weights"),
                         (ParallelConfig("fsdp", tensor=2, pipeline=4), "times parallel.pipeline 4 does not divide"),
                         (ParallelConfig("fsdp", reduce_each=True, pipeline=2), "leave parallel.reduce_each out"),
                         (ParallelConfig("fsdp", tensor=2, context=4), "^parallel.context 4 times parallel.tensor 2 d"),
                         (ParallelConfig("fsdp", context=4, replicas=2), "groups of 4 ranks each; leave it out, or"),
                         (ParallelConfig(exchange="keys"), "parallel.exchange does nothing without parallel.context"),
                         (ParallelConfig(schedule="gpipe"), "parallel.schedule does nothing without parallel.pipel"),
                         (ParallelConfig("fsdp", tensor=2, replicas=4), "take a divisor of 2$")):
        with pytest.raises(ValueError, match=said):
            config.refuse_layout(4)
    ParallelConfig("fsdp", replicas=2, reshard=False).refuse_layout(4)
    ParallelConfig("fsdp", replicas=2, tensor=2).refuse_layout(4)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    # Read once, for all ranks.
    parsed = {name: (n, case(folder, steps, layout, words)) for name, (n, steps, layout, words) in CASES.items()}
    parsed |= {truth_of(steps, words): (1, case(folder, steps, [], words)) for _, steps, _, words in CASES.values()}
    fork_ranks(make_bases, 1, folder)
    fork_ranks(alone, len(ALONE), folder)
    go_through(folder, parsed, measure, whole_runs)
