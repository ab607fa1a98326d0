"""Adapters, retention methods and optimizers in the loop of train.py.

Laws: with every method on, a run that dies and is resumed equals one that never stopped, in every bit; an adapter's
folder, put on the base, is the exported model; a plan that was changed is what was drawn.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_train import crash_at, lines, make_lab, one, quick, same_checkpoint, settings, trace

import hf
import lora
import tokenizer
import train
from core import checkpoint, cli
from learn import schedules
from learn.peft_files import load_adapter
from stages.build import build
from text import corpus, shards

RECIPES = Path(__file__).parents[2] / "recipes"
__all__ = ["quick"]         # an autouse fixture, here too
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


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(lab, a base in Hugging Face's format that knows the general source)."""
    folder = tmp_path_factory.mktemp("methods")
    lab = make_lab(folder / "lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.finish.subprocess", type("none", (), {"run": lambda *a, **k: type("r", (), {
            "returncode": 0, "stderr": ""})}))
        c = settings(lab, folder / "base", "--data.domain-share", 0, "--data.schedule", "static", steps=20)
        train.train(c, one())
    return lab, folder / "base/final"


def run_of(base, out, *words):
    lab, folder = base
    return settings(lab, out, "--model.init", "pretrained", "--model.path", folder, *words)


def merged_with(base, out) -> dict:
    """The adapter that a run left, on its base, as one state."""
    model = hf.load(base)
    load_adapter(model, out / "adapter")
    lora.merge(model)
    return dict(model.named_parameters())


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


@pytest.mark.parametrize("name", ["lora", "dora", "lora_rows", "lora_full", "qlora", "int8"])
def test_the_adapter_on_its_base_is_the_exported_model(base, tmp_path, name):
    out = tmp_path / "run"
    train.train(run_of(base, out, *METHODS[name]), one())
    exported, merged, plain = hf.load(out / "final"), merged_with(base[1], out), hf.load(base[1])
    moved = 0
    for key, weight in exported.named_parameters():
        assert torch.allclose(weight, merged[key].float(), rtol=0, atol=1e-2 if name == "int8" else 1e-6), key
        moved += not torch.equal(weight, plain.get_parameter(key))
    assert moved >= 14                                     # seven matrices in each of two blocks
    tensors = checkpoint.load(checkpoint.path_of(out / "checkpoints", 8))[0]
    assert tensors
    assert all(".adapters." in key for key in tensors)     # the base is where it was


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
    batches = list(run.methods[0].learning.general_text)
    padded = [bool((batch.labels == -100).any()) for batch in batches]
    assert sum(len(batch.tokens) for batch in batches) >= 60
    assert any(padded) != drop_last


@pytest.mark.parametrize("words", [["--forget.lwf.alpha", 0.5], ["--forget.lwf.alpha", 0.5, "--lora.rank", 4]])
def test_the_teacher_is_the_base(base, tmp_path, words):
    train.train(run_of(base, tmp_path / "run", *words), one())
    divergence = [line["lwf_kl"] for line in lines(tmp_path / "run", "train")]
    assert divergence[0] == 0.0                            # exactly: the student is the teacher
    assert min(divergence[1:]) > 0


def test_a_plan_that_adaptive_replay_changed_is_what_was_drawn(base, tmp_path):
    """Every evaluation here finds general text much worse, so that replay rises from 0.3 by 0.1 to 0.6."""
    out = tmp_path / "run"
    words = ("--forget.adaptive.policy", "degradation", "--forget.adaptive.start", 0.3, "--eval.every", 2,
             "--data.schedule", "static", "--data.domain-share", 0.9, "--optim.lr", 0.1, "--train.batch-size", 10)
    c = run_of(base, out, *words, "--train.steps", 12)
    train.train(c, one())
    plan = [json.loads(line) for line in (out / "plan.jsonl").read_text().splitlines()]
    assert [(d["step"], d["replay_share"]) for d in plan[1:]] == [(2, 0.4), (4, 0.5), (6, 0.6), (8, 0.6), (10, 0.6)]
    drawn = [line["sources"].get("story", {"tokens": 0})["tokens"] for line in lines(out, "train")]
    steps = [0.1] * 3 + [0.4] * 2 + [0.5] * 2 + [0.6] * 5          # a decision holds from the step after the next batch
    assert drawn[-1] == round(10 * sum(steps)) * 32
    assert {round(line["domain_share"], 9) for line in lines(out, "train")} == {0.9, 0.6, 0.5, 0.4}
    assert [json.loads(line)["replay_share"] for line in (out / "metrics.jsonl").read_text().splitlines()
            if json.loads(line)["kind"] == "replay"] == [0.4, 0.5, 0.6, 0.6, 0.6]


ENDLESS = ["--data.schedule", "static", "--optim.schedule", "infinite", "--optim.warmup-steps", 2,
           "--optim.cooldown-steps", 2]


def test_an_endless_run_is_prolonged_and_annealed_from_a_checkpoint(base, tmp_path, monkeypatch, capsys):
    """The branch of 10 steps whose last half anneals equals a run of those 10 steps that began at 0, bit for bit."""
    trunk, branch, whole = (tmp_path / name for name in ("trunk", "branch", "whole"))
    train.train(run_of(base, trunk, *ENDLESS, "--optim.decay-ratio", 0, "--train.save-every", 5), one())
    annealed = [*ENDLESS, "--optim.decay-ratio", 0.5, "--train.steps", 10]
    train.train(run_of(base, whole, *annealed), one())
    step5 = trunk / "checkpoints/step_00000005"
    train.train(run_of(base, branch, *annealed, "--train.branch-from", step5), one())
    assert {k: v for k, v in trace(whole).items() if k > 5} == trace(branch)
    same_checkpoint(branch, whole, 10)
    assert (branch / "eval.json").read_bytes() == (whole / "eval.json").read_bytes()
    rates = [line["lr"] for line in lines(whole, "train")]
    assert rates[:5] == [line["lr"] for line in lines(trunk, "train")][:5]
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[9] == 1e-3 < rates[5] < rates[4]
    with pytest.raises(ValueError, match="holds another run: the learning rates of the first 5 steps are others"):
        train.train(run_of(base, tmp_path / "x", "--data.schedule", "static", "--train.branch-from", step5), one())
    with pytest.raises(ValueError, match="is at step 5, and the run is to end at 3"):
        train.train(run_of(base, tmp_path / "y", *ENDLESS, "--train.steps", 3, "--train.branch-from", step5), one())
    dies = tmp_path / "dies"                               # before its first save, and is begun again
    crash_at(monkeypatch, run_of(base, dies, *annealed, "--train.branch-from", step5), 6)
    train.train(run_of(base, dies, *annealed, "--train.branch-from", step5), one())
    assert (dies / "eval.json").read_bytes() == (whole / "eval.json").read_bytes()
    same_checkpoint(dies, whole, 10)
    again = tmp_path / "again"                             # a branch of a branch; what was known before comes along
    longer = [*ENDLESS, "--optim.decay-ratio", 0, "--train.steps"]
    train.train(run_of(base, again, *longer, 12, "--train.branch-from", trunk / "checkpoints/step_00000008"), one())
    train.train(run_of(base, tmp_path / "third", *longer, 13, "--train.branch-from",
                       again / "checkpoints/step_00000012"), one())
    first = [json.loads((folder / "eval.json").read_text())["before"] for folder in (trunk, tmp_path / "third")]
    assert first[0] == first[1]
    shutil.copytree(step5, tmp_path / "alone/checkpoints/step_00000005")
    with pytest.raises(ValueError, match=r"is in no run folder with an eval_step_0\.json"):
        train.train(run_of(base, tmp_path / "w", *annealed, "--train.branch-from",
                           tmp_path / "alone/checkpoints/step_00000005"), one())
    with pytest.raises(ValueError, match="has no readable manifest"):
        train.train(run_of(base, tmp_path / "z", "--train.branch-from", tmp_path / "nowhere"), one())


def test_a_branch_has_the_decisions_of_its_trunk(base, tmp_path):
    words = [*ENDLESS, "--optim.decay-ratio", 0, "--forget.adaptive.policy", "degradation", "--data.domain-share", 0.9,
             "--optim.lr", 0.1, "--train.steps"]
    trunk, branch, whole = (tmp_path / name for name in ("trunk", "branch", "whole"))
    train.train(run_of(base, trunk, *words, 6, "--eval.every", 2), one())
    train.train(run_of(base, whole, *words, 7, "--eval.every", 2), one())
    step6 = ["--train.branch-from", trunk / "checkpoints/step_00000006"]
    train.train(run_of(base, branch, *words, 7, "--eval.every", 2, *step6), one())
    plan = (whole / "plan.jsonl").read_text().splitlines()
    assert len(plan) > 2
    assert (branch / "plan.jsonl").read_text().splitlines() == plan
    same_checkpoint(branch, whole, 7)
    with pytest.raises(ValueError, match="eval_every was 2 and is 3"):
        train.train(run_of(base, tmp_path / "other", *words, 7, "--eval.every", 3, *step6), one())


@pytest.mark.parametrize(("words", "match"), [
    (["--optim.name", "muon", "--lora.rank", 4], "use --optim.name adamw"),
    (["--forget.ewc.strength", 0.1, "--lora.rank", 4], "use --forget.lwf.alpha 0.5"),
    (["--forget.lwf.alpha", 0.5, "--model.init", "scratch"], "--model.init pretrained"),
    (["--lora.rank", 4, "--model.init", "scratch"], "leave one of them out"),
    (["--lora.rank", 4, "--optim.embedding-lr-scale", 0.1], "set lora.embedding_lr_ratio"),
    (["--lora.dropout", 0.1], "lora is off.*set lora.rank"), (["--lora.base", "nf4"], "set lora.rank"),
    (["--forget.lwf.tokens", "all"], "set forget.lwf.alpha"), (["--forget.freeze.blocks", 2], "freeze.schedule"),
    (["--forget.adaptive.policy", "budget", "--eval.every", 8], "--eval.every 1"),
    (["--forget.merge.method", "linear", "--data.sources.legal.role", "general"], "forget.py merge --alpha 0.5")])
def test_combinations_that_make_no_sense_name_the_alternative(base, tmp_path, words, match):
    with pytest.raises(ValueError, match=match):
        train.train(run_of(base, tmp_path / "run", *words), one())


def test_an_adapter_does_not_go_on_over_another_base(base, tmp_path):
    lab, folder = base
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    model = hf.load(other)
    model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    hf.save(model, other, base=folder)
    out, words = tmp_path / "run", (*METHODS["lora"], "--train.save-every", 4)
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, run_of(base, out, *words), 5)
    with pytest.raises(ValueError, match="holds another run: base was"):
        train.train(run_of((lab, other), out, *words), one())
    moved = tmp_path / "moved"                             # the same weights elsewhere are the same base
    shutil.copytree(folder, moved)
    assert train.train(run_of((lab, moved), out, *words), one()) == 0


def test_a_run_that_died_between_its_export_and_its_last_file_is_finished(base, tmp_path):
    out, words = tmp_path / "run", METHODS["merge"]
    train.train(run_of(base, out, *words), one())
    whole = (out / "eval.json").read_bytes(), (out / "final/model.safetensors").read_bytes()
    (out / "eval.json").unlink()
    assert train.train(run_of(base, out, *words), one()) == 0
    assert whole == ((out / "eval.json").read_bytes(), (out / "final/model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds a finished run"):
        train.train(run_of(base, out, *words), one())


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


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_settings_that_there_are(recipe):
    c = cli.parse(train.Config, [str(recipe)], recipe=True)
    assert c.out.startswith("out/")
    if "lora" in recipe.stem:
        assert c.lora.rank
        lr, least = schedules.recommended(7e9, "lora")
        assert (c.optim.lr, c.optim.min_lr) == (pytest.approx(lr), pytest.approx(least))
