"""stages/build.py: what a run is made of, and what it opens to be made.

Laws: a base is opened once in a run, and is one commit of the Hub on every rank.
"""

import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import lines, one, run_of
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh

import eval as evaluation
import forget
import hf
import lora
import train
from core import checkpoint, cli, hashing, mesh, parallel
from learn.choose_objective import ObjectiveConfig
from stages import build as stage

pytestmark = pytest.mark.usefixtures("quick")


def test_both_spellings_of_a_type_are_one_in_what_a_run_writes(tmp_path):
    (tmp_path / "recipe.toml").write_text('[train]\nprecision = "float16"\n')
    for words, precision in ((["--train.precision", "bfloat16"], "bf16"), (["--train.precision", "float32"], "fp32"),
                             ([str(tmp_path / "recipe.toml")], "fp16")):
        assert cli.parse(train.Config, words, recipe=True).train.precision == precision


@pytest.mark.parametrize("adapters", [[], ["--lora.rank", 2]])
def test_positions_are_set_on_purpose_and_exported(base, tmp_path, capsys, adapters):
    """The truth is transformers' reading of the exported folder: its length, and its logits beyond the base's."""
    transformers = pytest.importorskip("transformers", minversion="5", reason="the truth is transformers 5")
    words = ["--model.max-positions", 128, "--model.rope-scaling", "yarn", "--model.rope-theta", 5e4, *adapters]
    train.train(run_of(base, tmp_path / "run", *words, "--data.context", 64, "--train.steps", 2), one())
    assert "is beyond the" not in capsys.readouterr().out
    model, x = hf.load(tmp_path / "run/final"), torch.arange(100).view(1, 100) % 97
    assert model.config.rope_scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert (model.config.max_position_embeddings, model.config.rope_theta) == (128, 5e4)
    # What eval.py --run scores has them too.
    saved = checkpoint.path_of(tmp_path / "run/checkpoints", 2)
    scored = evaluation.load_checkpoint(saved)[0].config
    assert (scored.rope_scaling, scored.rope_theta) == (model.config.rope_scaling, 5e4)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/final").eval()
    assert theirs.config.max_position_embeddings == 128
    with torch.no_grad():
        assert (theirs(x).logits - model.head(model(x))).abs().max() < 1e-4


def test_a_context_beyond_the_positions_warns(base, tmp_path, capsys):
    train.train(run_of(base, tmp_path / "run", "--data.context", 64, "--train.steps", 2), one())
    assert "warning: data.context 64 is beyond the 32 positions of the model" in capsys.readouterr().out
    for context, warns in ((32, False), (33, True)):
        words = ["--data.context", context, "--train.steps", 1, "--eval.sample-tokens", 0]
        train.train(run_of(base, tmp_path / str(context), *words), one())
        assert (f"data.context {context} is beyond the 32 positions" in capsys.readouterr().out) == warns


@pytest.mark.parametrize("words", [["--lora.rank", 2], ["--forget.merge.method", "linear"],
                                   ["--forget.ewc.strength", 1, "--forget.ewc.samples", 4, "--forget.lwf.alpha", 0.5]])
def test_the_base_is_opened_once_in_a_run(base, tmp_path, monkeypatch, words):
    _, folder = base
    opened, real = [], hf.open_base

    def count(path):
        if not isinstance(path, hf.Base):
            opened.append(str(path))
        return real(path)
    monkeypatch.setattr(hf, "open_base", count)
    train.train(run_of(base, tmp_path / "run", *words), one())
    assert opened.count(str(folder)) == 1
    assert len(lines(tmp_path / "run", "train")) == 8


@pytest.mark.parametrize("what", ["base", "reference"])
def test_every_rank_opens_the_commit_that_rank_0_found(what, monkeypatch):
    """A branch of the Hub that moves at every question; the ranks exchange values through a box."""
    commits, box = iter(["first", "second"]), []

    def open_base(path):
        return hf.Base(path, Path("cache"), path.partition("@")[2] or next(commits))

    def world(rank):
        return types.SimpleNamespace(size=2, main=rank == 0,
                                     broadcast=lambda value: box.append(value) or box[0])
    monkeypatch.setattr(hf, "open_base", open_base)
    if what == "base":
        def find(rank):
            return stage.open_base("hf://org/name", world(rank))
    else:
        monkeypatch.setattr(stage, "tokenizer_of", lambda base: None)
        monkeypatch.setattr(hf.Base, "config", property(lambda self: types.SimpleNamespace(vocab_size=8)))
        c = types.SimpleNamespace(objective=ObjectiveConfig(reference="hf://org/name"))

        def find(rank):
            return stage.open_reference(c, world(rank), types.SimpleNamespace(vocab_size=8), None)
    assert [find(rank).revision for rank in (0, 1)] == ["first", "first"]
    assert find(0).pinned == "hf://org/name@second"


@pytest.mark.parametrize("packing", ["window", "best_fit", "document"])
def test_a_masked_run_asks_for_every_token_of_an_epoch(base, tmp_path, packing):
    run = stage.build(run_of(base, tmp_path / "run", "--objective.name", "masked", "--objective.mask-token-id", 5,
                             "--objective.mask-ratio", 1, "--data.packing", packing, "--data.sources.story.weight", 0,
                             "--data.domain-share", 1, "--data.schedule", "static", "--train.batch-size", 1,
                             "--train.micro-batch-size", 1, "--train.steps", 1), one())
    shards, kept = run.loader.shards["legal"], run.objective.special
    tokens = torch.from_numpy(shards.read(0, shards.tokens)[0].astype("int32"))
    run.loader.plan = run.loader.plan[:1] + np.arange(2)[:, None] * [[run.loader.packings["legal"].sequences, 0]]
    batch = run.loader.batch(0)
    targets = run.objective.corrupt(batch, batch.rng).labels
    asked = torch.bincount(targets[targets != -100].long(), minlength=300)
    there = torch.bincount(tokens[~torch.isin(tokens, kept)].long(), minlength=300)
    assert torch.equal(asked, there)


def test_an_estimate_from_text_is_that_of_its_objective(base, tmp_path):
    """EWC's stored Fisher is used again under the same fingerprint alone; that of causal runs is as it was."""
    def known(*words):
        run = stage.build(run_of(base, tmp_path / "run", *words), one())
        return stage.describe_learning(run).fingerprint, run
    masked = ("--objective.name", "masked", "--objective.mask-token-id")
    others = (*masked, 5), (*masked, 6), (*masked, 5, "--objective.mask-ratio", 0.3)
    found = [known(*words)[0] for words in ((), *others)]
    assert len({*found}) == 4
    plain, run = known()
    general = run.loader.shards["story"].records
    made_of = [run.base_fingerprint, 32, run.c.data.packing, True, *(record["sha256"] for record in general)]
    assert plain == found[0] == hashing.short_digest(json.dumps(made_of).encode())


@pytest.mark.parametrize("layout", ["whole", "sharded", "adapters", "sharded adapters", "merged"])
def test_a_tied_model_with_another_head_is_refused_in_every_layout(tiny_model, tmp_path, monkeypatch, layout):
    for name in ("base", "out"):
        hf.save(tiny_model(tie_word_embeddings=True), tmp_path / name)
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "out/model.safetensors")
    base = hf.open_base(tmp_path / "out")
    world = parallel.World(0, 2 if "sharded" in layout else 1, torch.device("cpu"))
    c = train.Config(lora=lora.LoraConfig(rank=2 * ("adapters" in layout)), parallel=parallel.ParallelConfig("fsdp"))

    def read():
        if layout == "merged":
            forget.merge(tmp_path / "base", base, tmp_path / "merged", 0.5, forget.MergeConfig("linear"))
        else:
            stage.build_model(c, base.config, base, world)
    # A group of one rank, which takes all shards.
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(mesh, "init_device_mesh", lambda kind, _, mesh_dim_names: init_device_mesh(
        kind, (1,), mesh_dim_names=mesh_dim_names))
    try:
        with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
            read()
    finally:
        parallel.stop()
