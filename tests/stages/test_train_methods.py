"""Adapters, retention methods and optimizers in the loop of train.py.

Law: with every method on, a run that dies and is resumed equals one that never stopped, in every bit.
"""

import json

import pytest
import torch
from runs import crash_at, lines, one, run_of, same_checkpoint, trace

import hf
import tokenizer
import train
from core import checkpoint, cli
from stages.build import build, draw_general_text
from text import corpus, shards

pytestmark = pytest.mark.usefixtures("quick")


METHODS = {
    "freeze": ["--forget.freeze.schedule", "progressive", "--forget.freeze.blocks", 1],
    "ewc": ["--forget.ewc.strength", 0.1, "--forget.ewc.samples", 12],
    "ewc_true": ["--forget.ewc.strength", 0.1, "--forget.ewc.samples", 12, "--forget.ewc.fisher", "true"],
    "l2sp": ["--forget.ewc.strength", 0.01, "--forget.ewc.fisher", "l2sp"],
    "lwf": ["--forget.lwf.alpha", 0.5, "--forget.lwf.tokens", "all"],
    "lwf_replay": ["--forget.lwf.alpha", 0.5],
    "adaptive": ["--forget.adaptive.policy", "budget", "--forget.adaptive.epsilon", 1e-6, "--eval.every", 2],
    "degradation": ["--forget.adaptive.policy", "degradation", "--eval.every", 2],
    "ema": ["--forget.ema.decay", 0.9],
    "merge": ["--forget.merge.method", "linear", "--forget.merge.alphas", 0.0, 0.5, 1.0],
    "muon": ["--optim.name", "muon"],
    "infinite": ["--optim.schedule", "infinite", "--optim.warmup-steps", 2, "--optim.cooldown-steps", 3],
    "lora": ["--lora.rank", 4, "--lora.dropout", 0.1],
    "dora": ["--lora.rank", 4, "--lora.dora", "--lora.rslora", "--lora.b-lr-ratio", 4],
    "lora_rows": ["--lora.rank", 4, "--lora.embeddings", "rows", "--lora.embedding-rows", "290:"],
    "lora_full": ["--lora.rank", 4, "--lora.embeddings", "full", "--model.activation-checkpointing"],
    "lora_lwf": ["--lora.rank", 4, "--forget.lwf.alpha", 0.5, "--forget.ema.decay", 0.9],
    "qlora": ["--lora.rank", 4, "--lora.base", "nf4", "--optim.name", "adamw_8bit"],
    "int8": ["--lora.rank", 4, "--lora.base", "int8", "--train.precision", "bf16"],
    "everything": ["--forget.freeze.schedule", "progressive", "--forget.ewc.strength", 0.1, "--forget.ewc.samples", 12,
                   "--forget.lwf.alpha", 0.3, "--forget.adaptive.policy", "budget", "--forget.ema.decay", 0.8,
                   "--forget.merge.method", "slerp", "--eval.every", 3],
}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_resumes_bit_for_bit(base, tmp_path, monkeypatch, name):
    words = [*METHODS[name], "--train.save-every", 3]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train.train(run_of(base, whole, *words), one()) == 0
    crash_at(monkeypatch, run_of(base, out, *words), 4)
    assert checkpoint.steps(out / "checkpoints") == [3]
    assert train.train(run_of(base, out, *words), one()) == 0
    assert trace(out) == trace(whole)
    same_checkpoint(out, whole, 8)
    assert (out / "plan.jsonl").read_text() == (whole / "plan.jsonl").read_text()
    for file in ("eval.json", "final/model.safetensors"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()
    plain = json.loads((whole / "eval_step_0.json").read_text())["texts"]
    after = json.loads((whole / "eval.json").read_text())["after"]
    assert after["legal"]["bits_per_byte"] < plain["legal"]["bits_per_byte"]       # it learns, whatever holds it back


def test_frozen_weights_stay_as_they_were_and_hold_no_state(base, tmp_path):
    out = tmp_path / "run"
    words = ("--forget.freeze.thaw-ratio", 0.75, "--train.save-every", 4)
    train.train(run_of(base, out, *METHODS["freeze"], *words), one())
    before = dict(hf.load(base[1]).named_parameters())
    weights, moments, _ = checkpoint.load(checkpoint.path_of(out / "checkpoints", 4))
    held = {key.rpartition("/")[0] for key in moments}
    for key, weight in weights.items():
        trains = key.startswith(("layers.1.", "norm."))
        assert torch.equal(weight, before[key]) != trains, key
        assert (key in held) == trains, key
    thawed = checkpoint.load(checkpoint.path_of(out / "checkpoints", 8))[0]
    assert not torch.equal(thawed["layers.0.mlp.up_proj.weight"], before["layers.0.mlp.up_proj.weight"])
    assert torch.equal(thawed["embed_tokens.weight"], before["embed_tokens.weight"])


@pytest.mark.parametrize("drop_last", [True, False])
def test_the_fisher_reads_general_text_as_the_run_does(base, tmp_path, drop_last):
    """With data.drop_last no sequence is padded, in the mix and in the Fisher's text."""
    words = ("--data.drop-last", drop_last, "--data.mask-documents", False, *METHODS["ewc"], "--forget.ewc.samples", 60)
    run = build(run_of(base, tmp_path / "run", *words), one())
    batches = list(draw_general_text(run))
    padded = [bool((batch.labels == -100).any()) for batch in batches]
    assert sum(len(batch.tokens) for batch in batches) >= 60
    assert any(padded) != drop_last


def test_the_fishers_text_is_mixed_as_replay_is(base, tmp_path):
    """Two general sources, of which one has three quarters by its stratum."""
    words = ("--data.sources.legal.role", "general", "--data.sources.legal.stratum", "math",
             "--data.sources.story.stratum", "coding", "--data.strata.math", 3)
    run = build(run_of(base, tmp_path / "run", *words, *METHODS["ewc"], "--forget.ewc.samples", 80), one())
    read = [int(i) for batch in draw_general_text(run) for i in batch.source]
    assert {run.loader.names[i]: read.count(i) for i in set(read)} == {"legal": 60, "story": 20}


@pytest.mark.parametrize("words", [["--forget.lwf.alpha", 0.5], ["--forget.lwf.alpha", 0.5, "--lora.rank", 4]])
def test_the_teacher_is_the_base(base, tmp_path, words):
    train.train(run_of(base, tmp_path / "run", *words), one())
    divergence = [line["lwf_kl"] for line in lines(tmp_path / "run", "train")]
    assert divergence[0] == 0.0                            # exactly: the student is the teacher
    assert min(divergence[1:]) > 0


@pytest.mark.parametrize(("words", "match"), [
    (["--optim.name", "muon", "--lora.rank", 4], "use --optim.name adamw"),
    (["--forget.ewc.strength", 0.1, "--lora.rank", 4], "use --forget.lwf.alpha 0.5"),
    (["--forget.lwf.alpha", 0.5, "--model.init", "scratch"], "--model.init pretrained"),
    (["--lora.rank", 4, "--model.init", "scratch"], "leave one of them out"),
    (["--lora.rank", 4, "--optim.embedding-lr-scale", 0.1], "set lora.embedding_lr_ratio"),
    (["--lora.dropout", 0.1], "lora is off.*set lora.rank"), (["--lora.base", "nf4"], "set lora.rank"),
    (["--forget.lwf.tokens", "all"], "set forget.lwf.alpha"), (["--forget.freeze.blocks", 2], "freeze.schedule"),
    (["--forget.adaptive.policy", "budget", "--eval.every", 8], "--eval.every 1"),
    (["--forget.lwf.alpha", 0.5, "--data.sources.story.weight", 0], "the run draws none"),
    (["--forget.adaptive.policy", "budget", "--eval.every", 2, "--data.sources.story.weight", 0], "the run draws none"),
    (["--forget.merge.method", "linear", "--data.sources.legal.role", "general"], "forget.py merge --alpha 0.5")])
def test_combinations_that_make_no_sense_name_the_alternative(base, tmp_path, words, match):
    with pytest.raises(ValueError, match=match):
        train.train(run_of(base, tmp_path / "run", *words), one())


@pytest.mark.slow
def test_qlora_stays_within_two_percent_of_lora(data_dir, tmp_path):
    """stories260K on a title of law, the same batches; the last quarter's losses."""
    model, law = data_dir / "models/stories260K", data_dir / "corpora/legal_en_dc/dc_code_title16.txt"
    tok = tokenizer.load(model)
    shards.pack(list(corpus.read_documents([str(law)]))[:300], tok, tmp_path / "law")
    losses = {}
    for kept in ("plain", "nf4"):
        c = cli.parse(train.Config, list(map(str, [
            "--out", tmp_path / kept, "--device", "cpu", "--model.path", model, "--data.context", 128,
            "--data.sources.law.path", tmp_path / "law", "--train.steps", 40, "--train.batch-size", 8,
            "--train.micro-batch-size", 8, "--train.precision", "fp32", "--optim.lr", 5e-3, "--optim.min-lr", 5e-4,
            "--lora.rank", 8, "--lora.base", kept, "--eval.tokens", 2000, "--eval.sample-tokens", 0,
            "--log.every", 1])), recipe=True)
        train.train(c, one())
        losses[kept] = [line["loss"] for line in lines(tmp_path / kept, "train")]
    plain, quantised = (sum(losses[kept][30:]) for kept in ("plain", "nf4"))
    assert plain < 0.8 * sum(losses["plain"][:10])
    assert quantised < 1.02 * plain
    assert losses["nf4"][0] != losses["plain"][0]
