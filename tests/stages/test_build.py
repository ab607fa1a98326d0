"""stages/build.py: what a run is made of, and what it opens to be made.

Laws: a base is opened once in a run, and is one commit of the Hub on every rank.
"""

import types
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import lines, one, run_of

import hf
import train
from core import cli
from stages import build as stage

pytestmark = pytest.mark.usefixtures("quick")


def test_both_spellings_of_a_type_are_one_in_what_a_run_writes(tmp_path):
    (tmp_path / "recipe.toml").write_text('[train]\nprecision = "float16"\n')
    for words, precision in ((["--train.precision", "bfloat16"], "bf16"), (["--train.precision", "float32"], "fp32"),
                             ([str(tmp_path / "recipe.toml")], "fp16")):
        assert cli.parse(train.Config, words, recipe=True).train.precision == precision


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


def test_every_rank_opens_the_commit_that_rank_0_found(monkeypatch):
    """A branch of the Hub that moves at every question; the ranks exchange values through a box."""
    commits, box = iter(["first", "second"]), []

    def open_base(path):
        return hf.Base(path, Path("cache"), path.partition("@")[2] or next(commits))

    def world(rank):
        return types.SimpleNamespace(size=2, main=rank == 0,
                                     broadcast=lambda value: box.append(value) or box[0])
    monkeypatch.setattr(hf, "open_base", open_base)
    c = types.SimpleNamespace(model=stage.ModelSection(path="hf://org/name"))
    assert [stage.open_base(c, world(rank)).revision for rank in (0, 1)] == ["first", "first"]
    assert stage.open_base(c, world(0)).pinned == "hf://org/name@second"


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
