"""core/pipeline.py: ranks that hold the layers one after the other train, score, save and export as one.

The truth is one process with the whole batch. Eight forked ranks (gloo) go through the case that has all dimensions,
and four or two of them through the others; this file is also what each of them runs.
"""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import fisher_of, fork_ranks, found_by, go_through, lay_out, meet, pass_on, run_once
from runs import lines, make_lab, one, settings

import hf
import train
from core import checkpoint, parallel, sharding
from core.parallel import ParallelConfig
from core.pipeline import cut_layers
from model import Model, ModelConfig
from stages.build import build

# Of what the ranks must do alike for long, and of what else is tried in their layouts.
STEPS, FEW = 20, 6
TWO = ["--parallel.pipeline", 2]
FOUR = ["--parallel.pipeline", 4]
FSDP = ["--parallel.strategy", "fsdp", "--parallel.pipeline", 2]
REPLICAS = [*FSDP, "--parallel.replicas", 2]
# Four parts of the layers, for which there must be as many micro-batches.
INTERLEAVED = [*FSDP, "--parallel.schedule", "interleaved", "--train.micro-batch-size", 1]
ALL = [*FSDP, "--parallel.tensor", 2]
# {base: its folder}
BASES = {"base": "base/final", "experts": "experts", "wide": "wide"}
BASE, EXPERTS = (["--model.init", "pretrained", "--model.path", base] for base in ("base", "experts"))
UNTIED = ["--model.tie-word-embeddings", "False"]
# F from labels that are drawn, and a pull that weighs as much as the loss.
EWC = ["--forget.ewc.strength", 100, "--forget.ewc.samples", 8, "--forget.ewc.fisher", "true", *BASE]
# {case: (words of its layout, its other words)}
CASES = {
    "gpipe": ([*FOUR, "--parallel.schedule", "gpipe"], []),
    "1f1b": (FOUR, ["--optim.clip", 0.1, "--train.micro-batch-size", 1, "--data.mask-documents", "False"]),
    "frozen": (FOUR, ["--forget.freeze.schedule", "top", "--forget.freeze.blocks", 2, *UNTIED, *BASE]),
    "thawing": (FSDP, ["--forget.freeze.schedule", "progressive", "--forget.freeze.embeddings", "--forget.ema.decay",
                       0.9, *BASE]),
    "lwf": (FOUR, ["--forget.lwf.alpha", 0.5, "--train.micro-batch-size", 2, *BASE]),
    "qlora": (FOUR, ["--lora.rank", 4, "--lora.base", "nf4", "--lora.ranks", "layers.0.*=2", *BASE]),
    "fsdp": (FSDP, ["--optim.clip", 0.1, "--train.micro-batch-size", 1]),
    "fsdp_sparse": ([*FSDP, "--parallel.schedule", "gpipe"],
                    ["--objective.name", "masked", "--objective.mask-token-id", 0, "--objective.mask-ratio", 0.02,
                     "--train.micro-batch-size", 1]),
    "fsdp_lora": (FSDP, ["--lora.rank", 4, *BASE]),
    "fsdp_qlora": (FSDP, ["--lora.rank", 4, "--lora.base", "nf4", *BASE]),
    "fsdp_experts": (FSDP, EXPERTS),
    "fsdp_balance": (FSDP, [*EXPERTS, "--router.balance", 0.05, "--router.z", 0.01]),
    "fsdp_8bit": (FSDP, ["--optim.name", "adamw_8bit", "--model.activation-checkpointing"]),
    "replicas": (REPLICAS, ["--optim.clip", 0.1]),
    "interleaved": (INTERLEAVED, []),
    "interleaved_muon": (INTERLEAVED, ["--optim.name", "muon", *UNTIED]),
    "context": ([*FSDP, "--parallel.context", 2], []),
    "tensor": (ALL, ["--optim.clip", 0.1]),
    "tensor_ewc": (ALL, EWC),
    "tensor_balance": (ALL, [*EXPERTS, "--router.balance", 0.05, "--router.z", 0.01]),
    "tensor_lora": (ALL, ["--lora.rank", 4, "--forget.lwf.alpha", 0.5, *BASE]),
    "bf16": (FOUR, ["--train.precision", "bf16"]),
    "fsdp_bf16": (FSDP, ["--train.precision", "bf16"]),
}
# What is not named here takes fewer steps.
LONG = ["1f1b", "frozen", "thawing", "qlora", "fsdp", "fsdp_lora", "fsdp_qlora", "fsdp_experts", "interleaved"]
CASES = {name: (4, STEPS if name in LONG else FEW, layout, words) for name, (layout, words) in CASES.items()}
CASES |= {"two": (2, STEPS, TWO, []), "two_lora": (2, STEPS, TWO, ["--lora.rank", 4, *BASE]),
          "two_experts": (2, STEPS, TWO, EXPERTS), "all": (8, STEPS, ALL, []),
          "all_lora": (8, STEPS, ALL, ["--lora.rank", 4, *BASE]), "all_experts": (8, STEPS, ALL, EXPERTS),
          "all_qlora": (8, STEPS, ALL, ["--lora.rank", 4, "--lora.base", "nf4", *BASE, "--model.path", "wide"])}
# Where roundings, of 8 bits or of bf16, turn on the last bit of a sum.
ROUGH = {"fsdp_8bit": 1e-3, "interleaved_muon": 1e-3, "bf16": 2e-2, "fsdp_bf16": 2e-2}
MOVED = {"four": (FOUR, "alone"), "interleaved": (INTERLEAVED, "moved_four"),
         "sharded": (["--parallel.strategy", "fsdp"], "moved_interleaved"), "back": (ALL, "moved_sharded"),
         "replicas": (REPLICAS, "moved_back")}
# The first writes a Fisher, which the second reads.
FISHER = [ALL, INTERLEAVED]
WHOLE = {"whole_four": (FOUR, []), "whole_interleaved": (INTERLEAVED, []),
         "whole_lora": (ALL, ["--lora.rank", 4, *BASE])}
# An odd number of items, which the groups of ranks share out.
ITEMS = [{"query": query, "choices": ["red", "a green one"], "gold": n % 2} for n, query in enumerate("ABCDE")]


def case(folder: Path, layout: list, words: list, out="unused", *, steps=STEPS):
    words = [folder / BASES[word] if word in BASES else word for word in words]
    return settings(folder / "lab", folder / out, "--model.num-hidden-layers", 4, "--train.batch-size", 8,
                    "--train.micro-batch-size", 2, "--optim.clip", 0, "--optim.lr", 1e-3, "--optim.min-lr", 1e-4,
                    *words, *layout, steps=steps)


def truth_of(steps: int, words: list) -> str:
    return f"{steps} steps of {words}"


def whole_case(folder: Path, layout: list, words: list, out: str):
    c = case(folder, layout, [*words, "--eval.tasks.mine.file", folder / "mine.jsonl", "--eval.probes.in-context", 2],
             out, steps=3)
    c.train.save_every, c.eval.sample_tokens = 3, 4
    return c


def steps_of(c, world) -> dict:
    """{"loss", "norm": of each step, "moved": {parameter: how far}, "kept": {parameter: its norm}}"""
    run = build(c, world)
    before = sharding.model_state(run.inner, form=lambda p: sharding.full_tensor(p).clone())
    done = [train.train_step(run, step, train.micro_batches(run, step)) for step in range(run.steps)]
    after = sharding.model_state(run.inner)
    return {"loss": [step["loss"] for step in done], "norm": [step["grad_norm"] for step in done],
            "logged": [step["methods"] for step in done],
            "moved": {key: (after[key].double() - before[key].double()).norm().item() for key in after},
            "kept": {key: value.double().norm().item() for key, value in after.items()}}


def alone(rank: int, folder: Path):
    out, words = (("alone", []), ("alone_lora", WHOLE["whole_lora"][1]))[rank]
    train.train(whole_case(folder, [], words, out), one())


def whole_runs(rank: int, folder: Path):
    with meet(folder, "runs", rank, 4) as world:
        for name, (layout, source) in MOVED.items():
            c = case(folder, layout, [], f"moved_{name}", steps=3)
            c.train.branch_from = str(folder / source / "checkpoints/step_00000003")
            lay_out(world, c)
            pass_on(c, world)
        for number, layout in enumerate(FISHER):
            (folder / "ewc").mkdir(exist_ok=True)
            c = case(folder, layout, EWC)
            lay_out(world, c)
            with build(c, world, folder / "ewc") as run:
                torch.save(fisher_of(run), folder / f"fisher_{number}_{rank}.pt")
        for out, (layout, words) in WHOLE.items():
            c = whole_case(folder, layout, words, out)
            lay_out(world, c)
            train.train(c, world)


def make_bases(rank: int, folder: Path):
    make_lab(folder / "lab")
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    train.train(case(folder, [], [], "base", steps=2), one())
    experts = Model(ModelConfig(300, 32, 64, 4, 4, 2, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
                                moe_intermediate_size=24, qk_norm=True, dense_layers=[1], family="qwen3_moe"))
    experts.initialise(0)
    hf.save(experts, folder / "experts", tokenizer=folder / "lab/tok")
    # Ranks that share matmuls have blocks of 64 of each row.
    wide = Model(ModelConfig(300, 64, 128, 4, 4, 2, head_dim=32))
    wide.initialise(0)
    hf.save(wide, folder / "wide", tokenizer=folder / "lab/tok")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_once(tmp_path_factory, __file__)


@pytest.fixture(scope="module")
def found(folder):
    return found_by(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_stages_are_one_model(found, name):
    ranks, steps, _, words = CASES[name]
    (truth,), found, rough = found[truth_of(steps, words)], found[name], ROUGH.get(name, 0)
    assert len(found) == ranks
    assert truth["norm"][0] > 0.01
    # The same values in 4 bits stand in other tensors where each rank has blocks of its own.
    for each in [truth, *found] if name == "all_qlora" else ():
        each["moved"] = {key: far for key, far in each["moved"].items() if ".quantised." not in key}
    for each in found:
        assert each["loss"] == pytest.approx(truth["loss"], rel=rough or 5e-6)
        assert each["norm"] == pytest.approx(truth["norm"], rel=5 * rough or 5e-6)
        # A KL near 0 is the difference of larger values.
        assert all(mine == pytest.approx(true, rel=1e-5, abs=1e-6)
                   for mine, true in zip(each["logged"], truth["logged"], strict=True))
        # A copy of the embedding is the embedding.
        for key in each["moved"]:
            assert each["moved"][key] == pytest.approx(truth["moved"][key], rel=rough or 1e-3, abs=rough * 10), key
            assert each["kept"][key] == pytest.approx(truth["kept"][key], rel=rough or 1e-4), key
    # No rank holds all, and all hold all; nothing stands still but what is frozen.
    assert all(len(each["moved"]) < len(truth["moved"]) for each in found)
    assert {key for each in found for key in each["moved"]} == truth["moved"].keys()
    still = {key for key, far in truth["moved"].items() if not far}
    frozen = {key for key in truth["moved"] if not key.startswith(("layers.2", "layers.3", "norm", "head"))}
    adapted = {key for key in truth["moved"] if ".adapters." not in key}
    assert still == (adapted if "lora" in name else frozen if name == "frozen" else set())


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVED)
def test_a_state_moves_between_layouts(folder, name):
    """The state of one rank, read and written again by stages, by interleaved ones with shards, by shards alone, and by
    all together: in every bit the same tensors, each written once."""
    before, after = (checkpoint.path_of(folder / out / "checkpoints", 3) for out in ("alone", f"moved_{name}"))
    for mine, theirs in zip(checkpoint.load(after)[:2], checkpoint.load(before)[:2]):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    # Without the length of its header, and the header, which have 8 and so many bytes.
    sizes = [sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
                 for file in path.glob("*.safetensors")) for path in (before, after)]
    assert sizes[1] == sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("out", WHOLE)
def test_a_whole_run_scores_samples_and_exports_what_one_rank_does(folder, out):
    alone = "alone_lora" if "lora" in out else "alone"
    mine, theirs = (json.loads((folder / each / "eval.json").read_text()) for each in (out, alone))
    for side in ("before", "after"):
        for source, true in theirs[side].items():
            for key in ("bits_per_byte", "tokens", "bytes", "nats_by_document"):
                assert mine[side][source][key] == pytest.approx(true[key], rel=1e-4), key
        # How many are right, and which.
        assert all(mine[kind][side] == theirs[kind][side] for kind in ("tasks", "probes"))
    texts = [[sample["text"] for line in lines(folder / each, "samples") for sample in line["samples"]]
             for each in (out, alone)]
    assert texts[0] == texts[1]
    assert len(texts[0]) >= 4
    starts = [lines(folder / each, "start")[0] for each in (out, alone)]
    assert all(starts[0][key] == starts[1][key] for key in ("parameters", "trainable_parameters", "recommended_lr"))
    distances = [line["distance"] for each in (out, alone) for line in lines(folder / each, "train")[-1:]
                 if "distance" in line]
    assert not distances or distances[0] == pytest.approx(distances[1], rel=1e-4)
    assert bool(distances) == ("lora" in out)
    weights = [dict(hf.load(folder / each / "final").named_parameters()) for each in (out, alone)]
    for key, value in weights[1].items():
        torch.testing.assert_close(weights[0][key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.slow
def test_a_fisher_of_stages_is_that_of_one_rank_and_is_read_in_another_layout(folder):
    truth, read = (fisher_of(build(case(folder, [], EWC), one(), out)) for out in (None, folder / "ewc"))
    for number, rank in itertools.product(range(2), range(4)):
        found = torch.load(folder / f"fisher_{number}_{rank}.pt", weights_only=True)
        assert found
        # An estimate of its own would differ in its last bits.
        assert all(torch.equal(value, read[name]) for name, value in found.items())
    assert read.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(read[name], value, rtol=1e-5, atol=1e-6 * value.max().item(), msg=name)
    assert any(not torch.equal(read[name], value) for name, value in truth.items())


def test_stages_are_cut_by_cost():
    assert cut_layers([1, 1, 1, 1], 2, 2) == [range(0, 3), range(3, 4)]
    assert cut_layers([1] * 8, 0, 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    # The truth: all ways to cut.
    for costs, head, stages in (([3, 1, 1, 5, 2, 2, 1], 4, 3), ([1, 9, 1, 1, 1, 1], 0.5, 4), ([2] * 7, 7, 5)):
        def dearest(ends, costs=costs, head=head):
            return max(sum(costs[a:b]) + head * (b == len(costs)) for a, b in itertools.pairwise(ends))
        cuts = cut_layers(costs, head, stages)
        ways = [(0, *middle, len(costs)) for middle in itertools.combinations(range(1, len(costs)), stages - 1)]
        assert [i for cut in cuts for i in cut] == list(range(len(costs)))
        assert all(cuts)
        assert dearest([0, *(cut.stop for cut in cuts)]) == min(map(dearest, ways))


def test_the_copy_of_an_embedding_counts_in_the_norm_only_where_it_is_broken(monkeypatch):
    """By hand: gradients of 3 and 4 have the norm 5, with whatever the copy has."""
    monkeypatch.setattr(parallel, "measure_norm", lambda counted, *_: torch.stack([p.grad for p in counted]).norm())
    model = torch.nn.Module()
    model.pipe = SimpleNamespace(is_copy=lambda name: name == "copy")
    for copied, norm in ((12.0, 5.0), (float("nan"), None), (float("inf"), None)):
        for name, gradient in (("a", 3.0), ("b", 4.0), ("copy", copied)):
            setattr(model, name, torch.nn.Parameter(torch.zeros(())))
            getattr(model, name).grad = torch.tensor(gradient)
        found = parallel.clip_gradients(model, 1.0)
        assert found == norm if norm else not torch.isfinite(found)


def test_what_cannot_be_in_stages_is_refused(lab, tmp_path):
    for config, said in ((ParallelConfig(pipeline=3), "parallel.pipeline 3 does not divide the 4 ranks"),
                         (ParallelConfig(pipeline=2), "leaves 2 ranks for each part"),
                         (ParallelConfig("fsdp", pipeline=2, replicas=4), "take a divisor of 2$")):
        with pytest.raises(ValueError, match=said):
            config.refuse_layout(4)
    halves = INTERLEAVED
    for words, said in ((["--model.num-hidden-layers", 3], "makes 4 parts of the model's 3 layers"),
                        (["--train.micro-batch-size", 3], "3 does not divide the 8 sequences"),
                        (["--train.micro-batch-size", 4], "needs 4 micro-batches"),
                        ([*halves, "--train.batch-size", 10], "cannot part 5"),
                        (["--compile"], "compile needs the model as a whole"),
                        (["--objective.name", "electra"], "objective electra")):
        sources = ["--model.tokenizer", lab / "tok", "--data.sources.legal.path", lab / "legal",
                   "--data.sources.story.path", lab / "story"]
        c = case(tmp_path, [*sources, *words], FOUR if halves[0] not in words else [])
        with pytest.raises(ValueError, match=said):
            build(c, parallel.World(0, 4, torch.device("cpu")))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    # Read once, for all ranks.
    parsed = {name: (n, case(folder, layout, words, steps=steps)) for name, (n, steps, layout, words) in CASES.items()}
    parsed |= {truth_of(steps, words): (1, case(folder, [], words, steps=steps))
               for _, steps, _, words in CASES.values()}
    fork_ranks(make_bases, 1, folder)
    fork_ranks(alone, 2, folder)
    go_through(folder, parsed, steps_of)
    fork_ranks(whole_runs, 4, folder)
