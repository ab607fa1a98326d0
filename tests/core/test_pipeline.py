"""core/pipeline.py: ranks that hold the layers one after the other train, score, save and export as one.

The truth is one process with the whole batch. One torchrun of four real ranks (gloo) goes through every case, one of
eight through the one that has all dimensions; this file is also what each of them runs.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import fisher_of, pass_on
from runs import ENV, lines, make_lab, one, settings

import hf
import train
from core import checkpoint, parallel, sharding
from core.parallel import ParallelConfig
from core.pipeline import cut_layers
from model import Model, ModelConfig
from stages import evaluate
from stages.build import build

STEPS = 20
FOUR = ["--parallel.pipeline", 4]
FSDP = ["--parallel.strategy", "fsdp", "--parallel.pipeline", 2]
REPLICAS = [*FSDP, "--parallel.replicas", 2]
ALL = [*FSDP, "--parallel.tensor", 2]
BASE = ["--model.init", "pretrained"]
UNTIED = ["--model.tie-word-embeddings", "False"]
# F from labels that are drawn, and a pull that weighs as much as the loss.
EWC = ["--forget.ewc.strength", 100, "--forget.ewc.samples", 8, "--forget.ewc.fisher", "true", *BASE]
# {case: (words of its layout, its other words)}
CASES = {
    "gpipe": ([*FOUR, "--parallel.schedule", "gpipe"], []),
    "1f1b": (FOUR, ["--optim.clip", 0.1, "--train.micro-batch-size", 2, "--data.mask-documents", "False"]),
    "frozen": (FOUR, ["--forget.freeze.schedule", "top", "--forget.freeze.blocks", 2, *UNTIED, *BASE]),
    "thawing": (FSDP, ["--forget.freeze.schedule", "progressive", "--forget.freeze.embeddings", "--forget.ema.decay",
                       0.9, *BASE]),
    "lwf": (FOUR, ["--forget.lwf.alpha", 0.5, "--train.micro-batch-size", 2, *BASE]),
    "qlora": (FOUR, ["--lora.rank", 4, "--lora.base", "nf4", "--lora.ranks", "layers.0.*=2", *BASE]),
    "fsdp": (FSDP, ["--optim.clip", 0.1]),
    "fsdp_sparse": ([*FSDP, "--parallel.schedule", "gpipe"],
                    ["--objective.name", "masked", "--objective.mask-token-id", 0, "--objective.mask-ratio", 0.02]),
    "fsdp_lora": (FSDP, ["--lora.rank", 4, *BASE]),
    "fsdp_qlora": (FSDP, ["--lora.rank", 4, "--lora.base", "nf4", *BASE]),
    "fsdp_experts": (FSDP, ["--model.init", "experts"]),
    "fsdp_balance": (FSDP, ["--model.init", "experts", "--router.balance", 0.05, "--router.z", 0.01,
                            "--train.micro-batch-size", 2]),
    "fsdp_8bit": (FSDP, ["--optim.name", "adamw_8bit", "--model.activation-checkpointing"]),
    "replicas": (REPLICAS, ["--optim.clip", 0.1]),
    "interleaved": ([*FSDP, "--parallel.schedule", "interleaved"], []),
    "interleaved_muon": ([*FSDP, "--parallel.schedule", "interleaved"], ["--optim.name", "muon", *UNTIED]),
    "tensor": (ALL, ["--optim.clip", 0.1]),
    "tensor_ewc": (ALL, EWC),
    "tensor_lora": (ALL, ["--lora.rank", 4, "--forget.lwf.alpha", 0.5, *BASE]),
    "bf16": (FOUR, ["--train.precision", "bf16"]),
    "fsdp_bf16": (FSDP, ["--train.precision", "bf16"]),
}
# Where roundings, of 8 bits or of bf16, turn on the last bit of a sum.
ROUGH = {"fsdp_8bit": 1e-3, "interleaved_muon": 1e-3, "bf16": 2e-2, "fsdp_bf16": 2e-2}
MOVED = {"four": (FOUR, "alone"), "interleaved": ([*FSDP, "--parallel.schedule", "interleaved"], "moved_four"),
         "sharded": (["--parallel.strategy", "fsdp"], "moved_interleaved"), "back": (ALL, "moved_sharded"),
         "replicas": (REPLICAS, "moved_back")}
# The first writes a Fisher, which the second reads.
FISHER = [ALL, [*FSDP, "--parallel.schedule", "interleaved"]]
WHOLE = {"whole_four": (FOUR, []), "whole_interleaved": ([*FSDP, "--parallel.schedule", "interleaved"], []),
         "whole_lora": (FSDP, ["--lora.rank", 4, *BASE])}


def case(folder: Path, layout: list, words: list, out="unused", steps=STEPS):
    if "experts" in words:
        words = [*words[2:], *BASE, "--model.path", folder / "experts"]
    elif "pretrained" in words:
        words = [*words, "--model.path", folder / "base/final"]
    return settings(folder / "lab", folder / out, "--model.num-hidden-layers", 4, "--train.batch-size", 8,
                    "--train.micro-batch-size", 1, "--optim.clip", 0, "--optim.lr", 1e-3, "--optim.min-lr", 1e-4,
                    *words, *layout, steps=steps)


def whole_case(folder: Path, layout: list, words: list, out: str):
    c = case(folder, layout, words, out, steps=3)
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


def start(world, c):
    c.parallel.refuse_layout(world.size)
    world.sequences = None
    world.share_sequences(c.parallel)
    return c


def as_rank(folder: Path):
    torch.set_num_threads(1)
    evaluate.run_command = lambda *words: ""
    world = parallel.start("cpu")
    results = {}
    for name, (layout, words) in (CASES if world.size == 4 else {"all": (ALL, [])}).items():
        results[name] = steps_of(start(world, case(folder, layout, words)), world)
        (folder / f"rank{world.rank}_of_{world.size}.json").write_text(json.dumps(results))
    for name, (layout, source) in MOVED.items() if world.size == 4 else ():
        c = start(world, case(folder, layout, [], f"moved_{name}", steps=3))
        c.train.branch_from = str(folder / source / "checkpoints/step_00000003")
        pass_on(c, world)
    for number, layout in enumerate(FISHER if world.size == 4 else ()):
        (folder / "ewc").mkdir(exist_ok=True)
        with build(start(world, case(folder, layout, EWC)), world, folder / "ewc") as run:
            torch.save(fisher_of(run), folder / f"fisher_{number}_{world.rank}.pt")
    for out, (layout, words) in WHOLE.items() if world.size == 4 else ():
        train.train(start(world, whole_case(folder, layout, words, out)), world)
    world.barrier()
    parallel.stop()


def launch(folder: Path, ranks: int):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                           str(ranks), __file__, folder], env=ENV, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_lab(folder / "lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.evaluate.run_command", lambda *words: "")
        train.train(case(folder, [], [], "base", steps=2), one())
        experts = Model(ModelConfig(300, 32, 64, 4, 4, 2, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
                                    moe_intermediate_size=24, qk_norm=True, dense_layers=[1], family="qwen3_moe"))
        experts.initialise(0)
        hf.save(experts, folder / "experts", tokenizer=folder / "lab/tok")
        for out, words in (("alone", []), ("alone_lora", WHOLE["whole_lora"][1])):
            train.train(whole_case(folder, [], words, out), one())
    return folder


@pytest.fixture(scope="module")
def four(folder):
    launch(folder, 4)
    return folder


def compare(folder: Path, ranks: int, name: str, words: list):
    found = [json.loads((folder / f"rank{rank}_of_{ranks}.json").read_text())[name] for rank in range(ranks)]
    truth, rough = steps_of(case(folder, [], words), one()), ROUGH.get(name, 0)
    assert truth["norm"][0] > 0.01
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
@pytest.mark.parametrize("name", CASES)
def test_stages_are_one_model(four, name):
    compare(four, 4, name, CASES[name][1])


@pytest.mark.slow
def test_eight_ranks_in_all_dimensions(folder):
    launch(folder, 8)
    compare(folder, 8, "all", [])


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVED)
def test_a_state_moves_between_layouts(four, name):
    """The state of one rank, read and written again by stages, by interleaved ones with shards, by shards alone, and by
    all together: in every bit the same tensors, each written once."""
    before, after = (checkpoint.path_of(four / out / "checkpoints", 3) for out in ("alone", f"moved_{name}"))
    for mine, theirs in zip(checkpoint.load(after)[:2], checkpoint.load(before)[:2]):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    # Without the length of its header, and the header, which have 8 and so many bytes.
    sizes = [sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
                 for file in path.glob("*.safetensors")) for path in (before, after)]
    assert sizes[1] == sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("out", WHOLE)
def test_a_whole_run_scores_samples_and_exports_what_one_rank_does(four, out):
    alone = "alone_lora" if "lora" in out else "alone"
    mine, theirs = (json.loads((four / each / "eval.json").read_text()) for each in (out, alone))
    for side in ("before", "after"):
        for source, true in theirs[side].items():
            for key in ("bits_per_byte", "tokens", "bytes", "nats_by_document"):
                assert mine[side][source][key] == pytest.approx(true[key], rel=1e-4), key
    texts = [[sample["text"] for line in lines(four / each, "samples") for sample in line["samples"]]
             for each in (out, alone)]
    assert texts[0] == texts[1]
    assert len(texts[0]) >= 4
    starts = [lines(four / each, "start")[0] for each in (out, alone)]
    assert all(starts[0][key] == starts[1][key] for key in ("parameters", "trainable_parameters", "recommended_lr"))
    distances = [line["distance"] for each in (out, alone) for line in lines(four / each, "train")[-1:]
                 if "distance" in line]
    assert not distances or distances[0] == pytest.approx(distances[1], rel=1e-4)
    assert bool(distances) == ("lora" in out)
    weights = [dict(hf.load(four / each / "final").named_parameters()) for each in (out, alone)]
    for key, value in weights[1].items():
        torch.testing.assert_close(weights[0][key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.slow
def test_a_fisher_of_stages_is_that_of_one_rank_and_is_read_in_another_layout(four):
    truth, read = (fisher_of(build(case(four, [], EWC), one(), folder)) for folder in (None, four / "ewc"))
    for number, rank in itertools.product(range(2), range(4)):
        found = torch.load(four / f"fisher_{number}_{rank}.pt", weights_only=True)
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
    monkeypatch.setattr(parallel, "measure_norm", lambda counted, t: torch.stack([p.grad for p in counted]).norm())
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
                         (ParallelConfig("fsdp", pipeline=2, context=2), "does not go with parallel.context"),
                         (ParallelConfig("fsdp", pipeline=2, replicas=4), "take a divisor of 2$")):
        with pytest.raises(ValueError, match=said):
            config.refuse_layout(4)
    halves = [*FSDP, "--parallel.schedule", "interleaved"]
    for words, said in ((["--model.num-hidden-layers", 3], "makes 4 parts of the model's 3 layers"),
                        (["--train.micro-batch-size", 3], "3 does not divide the 8 sequences"),
                        (["--train.micro-batch-size", 4], "needs 4 micro-batches"),
                        ([*halves, "--train.batch-size", 10], "cannot part 5"),
                        (["--compile"], "compile needs the model as a whole"),
                        (["--eval.probes.facts", 5], "with parallel.pipeline ranks compute together"),
                        (["--objective.name", "electra"], "objective electra")):
        sources = ["--model.tokenizer", lab / "tok", "--data.sources.legal.path", lab / "legal",
                   "--data.sources.story.path", lab / "story"]
        c = case(tmp_path, [*sources, *words], FOUR if halves[0] not in words else [])
        with pytest.raises(ValueError, match=said):
            build(c, parallel.World(0, 4, torch.device("cpu")))


if __name__ == "__main__":
    as_rank(Path(sys.argv[1]))
