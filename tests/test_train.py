"""train.py against laws and independent truths.

Laws: the same settings give the same bits; a user's mistake is one line and leaves nothing behind. Truths: the gradient
of the mean over all targets by transformers, document by document, without packing or accumulation. What a stopped run
does when it is resumed stands in tests/stages/test_resume.py.
"""

import errno
import io
import json
import math
import os
import re
import shutil
import signal
import sys

import pytest
import torch
from runs import ROOT, arguments, command, crash_at, lines, one, process, run_of, same_checkpoint, settings, spy, trace
from synthetic import KINDS, texts

import data
import hf
import report
import tokenizer
import train
from core import checkpoint, cli, parallel, sharding
from core.errors import UserError
from core.parameter_names import from_hf_name
from core.signals import STOPS
from learn import optim, schedules
from measure import scoring
from stages import evaluate, resume
from stages.build import build
from text.shards import Shards, pack, pack_buckets

pytestmark = pytest.mark.usefixtures("quick")


# ---- the whole way

def test_from_text_to_report_and_again_from_the_run_folder(lab, tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    assert command(monkeypatch, capsys, arguments(lab, tmp_path / "base"))[0] == 0
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[data]\ncontext = 32\n[data.sources.legal]\nrole = "domain"\n[train]\nprecision = "fp32"\n')
    words = arguments(lab, tmp_path / "run", "--eval.every", 5, "--eval.sample-tokens", 4, steps=7)
    words = [w for i, w in enumerate(words) if not {"--model.init", "--model.tokenizer"} & {w, words[i - 1]}]
    words += ["--model.path", str(tmp_path / "base/final")]
    done = process(recipe, *words)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "run"
    names = {f.name for f in out.iterdir()}
    assert names >= {"config.toml", "metrics.jsonl", "plan.jsonl", "eval_step_0.json", "eval_step_5.json",
                     "eval_step_7.json", "eval.json", "checkpoints", "final", "report.html"}
    assert not [f for f in out.rglob("*") if "tmp" in f.name or "partial" in f.name]
    assert (out / "report.html").read_text().lstrip().lower().startswith("<!doctype html")
    assert [len(lines(out, k)) for k in ("start", "train", "eval", "samples")] == [1, 7, 3, 2]
    result = json.loads((out / "eval.json").read_text())
    assert result["before"] == json.loads((out / "eval_step_0.json").read_text())["texts"]
    assert result["after"] == json.loads((out / "eval_step_7.json").read_text())["texts"]
    change = result["after"]["story"]["bits_per_byte"] / result["before"]["story"]["bits_per_byte"] - 1
    assert result["forgetting"] == pytest.approx(change)

    ours, theirs = hf.load(out / "final").eval(), transformers.AutoModelForCausalLM.from_pretrained(out / "final")
    tokens = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.head(ours(tokens)), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    last = checkpoint.load(checkpoint.path_of(out / "checkpoints", 7))[0]
    assert all(torch.equal(p, last[name]) for name, p in ours.named_parameters())

    again = tmp_path / "again"
    status, _, _ = command(monkeypatch, capsys, [out / "config.toml", "--out", again])
    assert status == 0
    assert trace(again) == trace(out)
    same_checkpoint(again, out, 7)
    written = [(x / "config.toml").read_text().replace(str(x), "") for x in (out, again)]
    assert written[0] == written[1]


def test_a_run_learns_and_its_plan_is_what_it_drew(lab, tmp_path):
    out = tmp_path / "run"
    train.train(settings(lab, out, "--data.schedule", "static", "--data.domain-share", 0.75, steps=30), one())
    losses = [r["loss"] for r in lines(out, "train")]
    assert losses[0] == pytest.approx(5.7, abs=0.2)              # ln 300: a fresh model knows nothing
    assert losses[-1] < losses[0] - 1.5
    plan = json.loads((out / "plan.jsonl").read_text())
    assert plan["sequences"] == {"legal": 90, "story": 30}
    last = lines(out, "train")[-1]
    assert {n: s["tokens"] for n, s in last["sources"].items()}.items() <= {"legal": 90 * 32, "story": 30 * 32}.items()


def test_score_buckets_are_read_in_their_order_and_resumed(lab, tmp_path, monkeypatch):
    records = [{"text": t, "metadata": {"scores": {"words": len(t.split())}}} for t in texts("legal")]
    pack_buckets(lambda: (("", r) for r in records), tokenizer.load(lab / "tok"), tmp_path / "law", 4, "words",
                      heldout=0.1)
    words = ("--data.sources.legal.path", tmp_path / "law", "--data.schedule", "staged", "--eval.tokens", 800)
    whole, out = tmp_path / "whole", tmp_path / "run"
    train.train(settings(lab, whole, *words, steps=20), one())
    crash_at(monkeypatch, settings(lab, out, *words, "--train.save-every", 5, steps=20), 12)
    assert train.train(settings(lab, out, *words, "--train.save-every", 5, steps=20), one()) == 0
    assert trace(out) == trace(whole)
    drawn = json.loads((out / "plan.jsonl").read_text())["sequences"]
    assert list(drawn) == ["legal/0", "legal/1", "legal/2", "legal/3", "story"]
    first = [r["sources"] for r in lines(out, "train") if r["step"] <= 2]
    assert not any("legal/2" in s or "legal/3" in s for s in first)
    assert drawn["legal/3"] > 0
    scored = json.loads((out / "eval.json").read_text())["after"]
    assert scored.keys() == drawn.keys()
    assert sum(scored[f"legal/{k}"]["tokens"] for k in range(4)) < 1000               # of a source, not of a bucket
    assert (out / "config.toml").read_text().count("[data.sources.") == 2


@pytest.mark.parametrize("packing", ["best_fit", "document"])
def test_packing_by_documents_learns_and_resumes_bit_for_bit(lab, tmp_path, monkeypatch, packing, capsys):
    words = ("--data.packing", packing)
    whole, out = tmp_path / "whole", tmp_path / "run"
    train.train(settings(lab, whole, *words, steps=20), one())
    said = capsys.readouterr().out
    assert re.search(rf"packing: {packing}; positions an epoch without a token: legal [\d,]+ padded, story", said)
    losses = [r["loss"] for r in lines(whole, "train")]
    assert losses[-1] < losses[0] - 1
    crash_at(monkeypatch, settings(lab, out, *words, "--train.save-every", 5, steps=20), 12)
    assert train.train(settings(lab, out, *words, "--train.save-every", 5, steps=20), one()) == 0
    assert trace(out) == trace(whole)
    with pytest.raises(ValueError, match="data.packing is " + packing):
        settings(lab, tmp_path / "x", *words, "--data.drop-last")


# ---- one step

def gradients(run, step: int = 0) -> tuple[dict, dict]:
    """(what train_step returns, gradients as the optimizer meets them)."""
    kept = {}

    def keep(*_, **__):
        kept.update({n: sharding.full_tensor(p.grad).clone() for n, p in run.inner.named_parameters()})
    hook = run.optimizer.register_step_pre_hook(keep)
    done = train.train_step(run, step, train.micro_batches(run, step))
    hook.remove()
    return done, kept


@pytest.mark.parametrize("micro", [1, 3, 6])
def test_gradient_is_that_of_the_mean_over_all_targets(lab, whole, tmp_path, micro):
    """Truth: transformers on each document piece alone, all targets of the step weighing the same."""
    transformers = pytest.importorskip("transformers")
    truth = transformers.AutoModelForCausalLM.from_pretrained(whole[0] / "final").train()
    c = settings(lab, tmp_path / "run", "--model.init", "pretrained", "--model.path", whole[0] / "final",
                 "--train.batch-size", 6, "--train.micro-batch-size", micro, "--optim.clip", 0)
    run = build(c, one())
    rows = run.loader.batch(0)
    rows.labels = rows.labels.clone()
    rows.labels[1, 12:], rows.labels[4, 3:] = -100, -100        # two rows with few targets
    run.loader.batch = lambda s, lo=0, hi=None: data.Batch(
        *(getattr(rows, k)[lo:hi] for k in ("tokens", "labels", "position_ids", "doc_start", "source")),
        rng=data.RowRandom(rows.rng.keys[lo:hi]), place=rows.place[lo:hi])

    total, count = 0.0, 0
    for tokens, labels, start in zip(rows.tokens.long(), rows.labels.long(), rows.doc_start):
        for begin in start.unique():
            piece = start == begin
            ids, targets = tokens[piece], labels[piece]
            if len(ids) > 1:
                logits = truth(ids[None, :-1]).logits[0]
                total = total + torch.nn.functional.cross_entropy(logits, targets[1:], reduction="sum")
                count += (targets[1:] != -100).sum().item()
    (total / count).backward()

    done, ours = gradients(run)
    assert done["loss"] == pytest.approx((total / count).item(), rel=1e-5)
    theirs = {from_hf_name(n): p.grad for n, p in truth.named_parameters()}
    assert sum(n for _, n in done["sources"].values()) == count
    for name, grad in ours.items():                             # fp32, another order of sums
        torch.testing.assert_close(grad, theirs[name], rtol=2e-4, atol=2e-6, msg=name)
    norm = torch.stack([g.norm() for g in theirs.values()]).norm().item()
    assert done["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (2, 2), (2, 6), (3, 3), (6, 5)])
def test_the_ranks_share_a_step_and_no_sequence_is_read_twice(lab, tmp_path, ranks, micro):
    """Also where a micro-batch is larger than what is left of a rank's share."""
    run = build(settings(lab, tmp_path / "run", "--train.batch-size", 6, "--train.micro-batch-size", micro), one())
    whole = run.loader.batch(3)
    whole, parts = run.objective.corrupt(whole, whole.rng), []
    for rank in range(ranks):
        run.world = parallel.World(rank, ranks, torch.device("cpu"))
        own = train.micro_batches(run, 3)
        assert sum(len(batch.tokens) for batch in own) == 6 // ranks
        assert max(len(batch.tokens) for batch in own) <= micro
        parts += own
    for name in ("tokens", "labels", "position_ids", "doc_start"):
        assert torch.equal(torch.cat([getattr(batch, name) for batch in parts]), getattr(whole, name)), name


def test_gradients_that_ddp_averages_over_ranks_are_of_the_mean_over_all_targets(lab, tmp_path):
    """Two ranks that hold the same sequences: the mean over their targets is that over one's, and so is the gradient,
    if what DDP averages has been multiplied by the number of ranks."""
    found = []
    for size in (1, 2):
        run = build(settings(lab, tmp_path / "run", "--optim.clip", 0), one())
        run.world = parallel.World(0, size, torch.device("cpu"))
        run.world.sum = lambda values, size=size: [size * value for value in values]
        batch = run.loader.batch(0)
        kept, real = {}, parallel.clip_gradients
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parallel, "clip_gradients", lambda model, limit, kept=kept, real=real: (
                kept.update({n: p.grad.clone() for n, p in model.named_parameters()}), real(model, limit))[1])
            done = train.train_step(run, 0, [run.objective.corrupt(batch, batch.rng)])
        found.append((done["loss"], kept))
    (loss, one_rank), (same, two_ranks) = found
    assert loss == pytest.approx(same)
    for name, gradient in one_rank.items():
        torch.testing.assert_close(gradient, two_ranks[name], rtol=1e-5, atol=1e-8, msg=name)


def test_dropout_is_a_function_of_seed_step_and_rank(base, tmp_path):
    """At a learning rate of 0 nothing else differs between two steps on the same text."""
    def loss(step, rank=0, seed=0):
        run = build(run_of(base, tmp_path / "run", "--lora.rank", 4, "--lora.dropout", 0.5, "--seed", seed,
                           "--optim.lr", 0, "--optim.min-lr", 0), one())
        for name, p in run.inner.named_parameters():
            if name.endswith(".B"):
                p.data.fill_(0.3)                                      # at first 0, which hides what was dropped
            elif name.endswith(".A"):
                p.data.fill_(0.1)
        # One process that takes itself for one of two.
        run.world = type("Place", (parallel.World,), {"dropout_key": rank})(0, 1, torch.device("cpu"))
        return train.train_step(run, step, batches)["loss"]
    plain = build(run_of(base, tmp_path / "run"), one())
    batches = train.micro_batches(plain, 0)
    assert loss(0) == loss(0)
    assert len({loss(0), loss(1), loss(2), loss(0, rank=1), loss(0, seed=1)}) == 5


def test_padding_of_the_last_window_is_no_target(lab, tmp_path):
    """Over a whole epoch each token of a source is a target once, but for the first of each document piece."""
    c = settings(lab, tmp_path / "run", "--data.sources.story.weight", 0, "--data.domain-share", 1,
                 "--data.schedule", "static", "--data.mask-documents", "false")
    shards = Shards(lab / "legal")
    windows = -(-shards.tokens // 32)
    c.train.batch_size, c.train.steps = windows, 1
    run = build(c, one())
    done = train.train_step(run, 0, train.micro_batches(run, 0))
    assert done["sources"] == {"legal": (pytest.approx(done["loss"] * shards.tokens), shards.tokens)}


def test_gradient_clipping_reports_the_norm_before_and_bounds_the_one_after(lab, tmp_path):
    run = build(settings(lab, tmp_path / "run", "--optim.clip", 0.05), one())
    done, ours = gradients(run)
    assert done["grad_norm"] > 0.1
    assert torch.stack([g.norm() for g in ours.values()]).norm().item() == pytest.approx(0.05, rel=1e-3)


def test_z_loss_is_in_the_gradient_and_not_in_evaluations(lab, tmp_path):
    """Truth: cross-entropy + z logsumexp^2 on the logits, by torch. A run of 8 steps resumes under its z-loss alone."""
    words = ("--objective.z-loss", 0.5, "--optim.clip", 0)
    run = build(settings(lab, tmp_path / "run", *words), one())
    batches = train.micro_batches(run, 0)
    done, ours = gradients(run)
    run = build(settings(lab, tmp_path / "run", *words), one())
    total, count = 0.0, sum(int((batch.labels != -100).sum()) for batch in batches)
    for batch in batches:
        logits = run.inner.head(run.inner(batch.tokens, batch.position_ids, batch.doc_start))[batch.labels != -100]
        targets = batch.labels[batch.labels != -100].long()
        each = torch.nn.functional.cross_entropy(logits, targets, reduction="none") + 0.5 * logits.logsumexp(-1) ** 2
        total = total + each.sum() / count
    total.backward()
    assert done["loss"] == pytest.approx(total.item(), rel=1e-5)
    for name, parameter in run.inner.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=2e-4, atol=2e-6, msg=name)
    plain = build(settings(lab, tmp_path / "run"), one())
    assert evaluate.score(run, run.inner, one()) == evaluate.score(plain, plain.inner, one())
    assert "z_loss" not in resume.identity(plain, 0)["objective"]        # what an older checkpoint says
    assert resume.identity(run, 0)["objective"]["z_loss"] == 0.5


def test_a_step_waits_for_the_device_once(lab, tmp_path, monkeypatch):
    """On a GPU each copy of a device's values to the CPU waits for it. What the device computes here is fp32."""
    run = build(settings(lab, tmp_path / "run"), one())
    batches, copies = train.micro_batches(run, 0), []
    for name in ("cpu", "item", "tolist", "numpy", "__float__", "__bool__"):
        real = getattr(torch.Tensor, name)

        def copy(tensor, *args, name=name, real=real):
            if tensor.dtype == torch.float32:
                copies.append(name)
            return real(tensor, *args)
        monkeypatch.setattr(torch.Tensor, name, copy)
    train.train_step(run, 0, batches)
    assert copies == ["cpu", "tolist"]            # the second is of sums that are on the CPU already


def test_activation_checkpointing_changes_nothing(lab, tmp_path, whole):
    out = tmp_path / "run"
    train.train(settings(lab, out, "--model.activation-checkpointing"), one())
    assert trace(out) == trace(whole[0])
    same_checkpoint(out, whole[0], 8)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_model_has_the_same_losses(lab, tmp_path):
    runs = [build(settings(lab, tmp_path / "run", "--model.num-hidden-layers", 1, "--compile", c), one())
            for c in ("false", "true")]
    for step in range(2):                                            # fused kernels round otherwise
        plain, fused = (train.train_step(run, step, train.micro_batches(run, step)) for run in runs)
        assert fused["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        assert fused["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)


# ---- precision

@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_and_resumes_bit_for_bit(lab, tmp_path, monkeypatch, precision):
    outs = tmp_path / "a", tmp_path / "b"
    for out in outs:
        c = settings(lab, out, "--train.precision", precision, steps=20)
        if out == outs[1]:
            with monkeypatch.context() as patch:
                spy(patch, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
                train.train(c, one())
        train.train(c, one())
    losses = [r["loss"] for r in lines(outs[0], "train")]
    assert losses[-1] < losses[0] - 1
    assert trace(outs[0]) == trace(outs[1])
    same_checkpoint(*outs, 20)
    model, _, state = checkpoint.load(outs[0] / "checkpoints/step_00000020")
    assert {t.dtype for t in model.values()} == {torch.float32}
    assert (state["loss_scale"]["scale"] > 1) == (precision == "fp16")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_8_bit_adamw_learns_and_resumes_bit_for_bit(lab, tmp_path, monkeypatch, whole, precision):
    outs = tmp_path / "a", tmp_path / "b"
    for out in outs:
        c = settings(lab, out, "--train.precision", precision, "--optim.name", "adamw_8bit", steps=20)
        if out == outs[1]:
            with monkeypatch.context() as patch:
                spy(patch, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
                train.train(c, one())
        train.train(c, one())
    full = tmp_path / "full"
    train.train(settings(lab, full, "--train.precision", precision, steps=20), one())
    losses, exact = ([r["loss"] for r in lines(out, "train")] for out in (outs[0], full))
    assert losses[-1] == pytest.approx(exact[-1], rel=0.02)               # where fp32 moments lead
    assert losses[-1] < losses[0] - 1
    assert trace(outs[0]) == trace(outs[1])
    same_checkpoint(*outs, 20)
    weights, moments, _ = checkpoint.load(outs[0] / "checkpoints/step_00000020")
    half = precision == "bf16"
    assert {t.dtype for t in weights.values()} == {torch.bfloat16 if half else torch.float32}
    matrix = {k.rpartition("/")[2]: v.dtype for k, v in moments.items() if "q_proj" in k}
    assert matrix == {"step": torch.float32, "m": torch.int8, "v": torch.uint8, "m_scale": torch.bfloat16,
                      "v_scale": torch.float32, **({"ecc": torch.int8} if half else {})}
    exported = hf.load(outs[0] / "final")
    assert all(torch.equal(p, weights[name].float()) for name, p in exported.named_parameters())


def test_fp16_gradients_are_those_of_fp32(lab, tmp_path):
    norms = []
    for precision in ("fp32", "fp16"):
        run = build(settings(lab, tmp_path / "run", "--train.precision", precision), one())
        norms.append(gradients(run)[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.01)       # 11 bits of mantissa


def test_overflow_in_fp16_leaves_the_step_out_and_the_scale_is_kept(lab, tmp_path):
    c = settings(lab, tmp_path / "run", "--train.precision", "fp16", "--train.save-every", 2)
    run = build(c, one())
    run.scale.scale = 2.0**60
    before = sharding.model_state(run.inner)
    before = {k: v.clone() for k, v in before.items()}
    done = train.train_step(run, 0, train.micro_batches(run, 0))
    assert not done["grad_norm"] < float("inf")
    assert all(torch.equal(v, before[k]) for k, v in sharding.model_state(run.inner).items())
    assert not run.optimizer.state
    assert (run.scale.scale, run.scale.good_steps) == (2.0**59, 0)
    run.scale.scale = 1024.0
    assert train.train_step(run, 1, train.micro_batches(run, 1))["grad_norm"] < 1e4
    assert not all(torch.equal(v, before[k]) for k, v in sharding.model_state(run.inner).items())
    run.folder = tmp_path / "run"
    run.folder.mkdir()
    # A run scores the held-out text before its first step, and a state without that score is refused.
    evaluate.score_heldout(run, 0)
    run.saver = resume.Saver(run)
    run.saver.save(2)
    run.saver.finish()
    with build(c, one(), tmp_path / "run") as fresh:
        assert resume.resume(fresh) == 2
    assert vars(fresh.scale) == vars(run.scale) == {"enabled": True, "scale": 1024.0, "good_steps": 1}


def test_loss_scale_grows_after_2000_good_steps():
    scale = optim.LossScale(True)
    assert all(scale.update(1.0) for _ in range(1999))
    assert scale.scale == 2**16
    assert scale.update(1.0)
    assert scale.scale == 2**17
    assert not scale.update(float("nan"))
    assert (scale.scale, scale.good_steps) == (2**16, 0)


# ---- mistakes and accidents

def spoil_gradient(monkeypatch, *steps):
    """Make one element of a gradient NaN in each of the steps, counted from 0."""
    real = train.train_step

    def step(run, number, batches):
        hook = run.inner.layers[1].mlp.down_proj.weight.register_hook(
            lambda gradient: gradient.index_fill(0, torch.tensor([3]), math.nan)) if number in steps else None
        done = real(run, number, batches)
        if hook:
            hook.remove()
        return done
    monkeypatch.setattr(train, "train_step", step)


def everything(run) -> dict:
    """Copies of all that a step may move."""
    tensors = {**sharding.model_state(run.inner), **sharding.optimizer_state(run.inner, run.optimizer)}
    for method in run.methods:
        tensors |= method.state()[0]
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_a_step_with_a_gradient_that_is_not_finite_moves_nothing(base, tmp_path, monkeypatch):
    """The loss is in order, and what went wrong in the backward pass would spoil the weights all the same."""
    spoil_gradient(monkeypatch, 2)
    run = build(run_of(base, tmp_path / "r", "--forget.ema.decay", 0.9, "--forget.ewc.strength", 1,
                       "--forget.ewc.samples", 4), one())
    steps = [train.train_step(run, step, train.micro_batches(run, step)) for step in range(2)]
    before = everything(run)
    steps += [train.train_step(run, 2, train.micro_batches(run, 2))]
    after = everything(run)
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert [bool(step["fault"]) for step in steps] == [False, False, True]
    assert re.match(r"in step 3 the gradient norm is nan \(sources in the step: .*legal", steps[2]["fault"])
    assert (run.guard.left_out, run.guard.in_a_row, len(run.guard.window)) == (1, 1, 2)
    steps += [train.train_step(run, 3, train.micro_batches(run, 3))]
    assert not steps[3]["fault"]
    assert run.guard.in_a_row == 0
    assert not all(torch.equal(tensor, before[name]) for name, tensor in everything(run).items())


def test_a_run_with_a_step_left_out_is_logged_and_resumes_bit_for_bit(base, tmp_path, monkeypatch, capsys):
    spoil_gradient(monkeypatch, 2, 5)
    words = ["--forget.ema.decay", 0.9, "--forget.freeze.schedule", "progressive", "--data.schedule", "static",
             "--log.every", 3, "--guard.spike", "skip", "--guard.window", 8]
    outs = tmp_path / "a", tmp_path / "b"
    assert train.train(run_of(base, outs[0], *words), one()) == 0
    assert "warning: in step 3 the gradient norm is nan" in capsys.readouterr().out
    for at in (2, 4):
        with monkeypatch.context() as patch:
            spy(patch, at, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert train.train(run_of(base, outs[1], *words), one()) == 143
    assert train.train(run_of(base, outs[1], *words), one()) == 0
    same_checkpoint(*outs, 8)
    assert [r["step"] for r in lines(outs[0], "left_out")] == [r["step"] for r in lines(outs[1], "left_out")] == [3, 6]
    assert "NaN" not in (outs[0] / "metrics.jsonl").read_text()
    assert checkpoint.load(outs[0] / "checkpoints/step_00000008")[2]["guard"]["left_out"] == 2


def test_steps_that_stay_wrong_stop_the_run_after_a_save(lab, tmp_path, monkeypatch, capsys):
    out, words = tmp_path / "run", ["--guard.limit", 2]
    with monkeypatch.context() as patch:
        spoil_gradient(patch, 2, 4, 5)
        status, _, errors = command(monkeypatch, capsys, arguments(lab, out, *words))
    assert (status, errors.count("\n")) == (2, 1)
    assert re.search(r"in step 6 the gradient norm is nan \(sources in the step: .*legal.*\), and 2 updates one after "
                     r"another were left out; .* saved at step 6 of 8, and the same command goes on", errors)
    assert checkpoint.steps(out / "checkpoints") == [6]
    assert not (out / "final").exists()
    stopped = report.read_run(out)
    assert stopped.failure == "divergence"
    assert stopped.advice[0].startswith("lower the learning rate")
    assert "replay" not in " ".join(stopped.advice)
    left_out, why = stopped.accidents
    assert left_out.startswith("3 updates were left out, the last one because in step 6 the gradient norm")
    assert why.startswith("the run stopped: in step 6 the gradient norm is nan")
    assert why in report.render([stopped]).replace("&#34;", '"')
    status, said, _ = command(monkeypatch, capsys, arguments(lab, out, *words))
    assert (status, "at step 6" in said) == (0, True)
    # Three steps left out do not make the whole run one that diverged.
    assert [report.read_run(out).stopped, len(report.read_run(out).accidents)] == [None, 1]
    assert report.read_run(out).failure is None


def test_a_policy_may_stop_at_the_first(lab, tmp_path, monkeypatch, capsys):
    spoil_gradient(monkeypatch, 1)
    status, _, errors = command(monkeypatch, capsys, arguments(lab, tmp_path / "run", "--guard.nonfinite", "stop"))
    assert (status, errors.count("\n")) == (2, 1)
    assert "in step 2 the gradient norm is nan" in errors
    assert "--guard.nonfinite skip" in errors
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [2]


def spoil(kind):
    """A function that makes one element of a run's state NaN."""
    @torch.no_grad()
    def act(run):
        p = run.inner.layers[1].mlp.up_proj.weight
        tensor = {"weight": p, "moment": run.optimizer.state[p].get("exp_avg"),
                  "mean": run.methods[0].tensors["layers.1.mlp.up_proj.weight"] if run.methods else None}[kind]
        tensor[3, 5] = math.nan
    return act


@pytest.mark.parametrize("kind", ["weight", "moment", "mean"])
@pytest.mark.parametrize("at", [3, 4])
def test_a_state_that_is_not_finite_is_not_kept(lab, tmp_path, monkeypatch, capsys, whole, kind, at):
    """Spoiled after the third or the fourth step, of which the fourth is saved: the checkpoint of the second is what
    the same command resumes from."""
    out, real = tmp_path / "run", train.train_step
    words = ["--train.save-every", 2, *(["--forget.ema.decay", 0.9] if kind == "mean" else [])]

    def step(run, number, batches):
        done = real(run, number, batches)
        if number + 1 == at:
            spoil(kind)(run)
        return done
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", step)
        status, _, errors = command(monkeypatch, capsys, arguments(lab, out, *words))
    assert (status, errors.count("\n")) == (2, 1)
    assert re.search(r"after step 4 were not saved, they hold NaN or infinity \(first in .*layers\.1\.mlp", errors)
    assert checkpoint.steps(out / "checkpoints") == [2]
    assert not (out / "final").exists()
    assert command(monkeypatch, capsys, arguments(lab, out, *words))[0] == 0
    if kind != "mean":
        assert trace(out) == trace(whole[0])
        same_checkpoint(out, whole[0], 8)


@pytest.mark.parametrize("steps", [1, 8])
def test_weights_that_a_step_made_infinite_are_not_exported(lab, tmp_path, steps):
    c = settings(lab, tmp_path / "run", "--optim.warmup-steps", 0, steps=steps)
    # Beyond what an option may say.
    c.optim.lr = 1e38
    with pytest.raises(ValueError, match=r"lower --optim\.lr"):
        train.train(c, one())
    assert not (tmp_path / "run/final").exists()
    assert checkpoint.steps(tmp_path / "run/checkpoints") == []


def test_a_run_whose_model_has_no_finite_loss_is_not_finished(lab, tmp_path, monkeypatch):
    score = evaluate.score_heldout

    def lose(run, step, *more, **options):
        scores = score(run, step, *more, **options)
        return scores | {"legal": scores["legal"] | {"nats_per_token": float("nan")}} if step else scores
    monkeypatch.setattr(evaluate, "score_heldout", lose)
    with pytest.raises(ValueError, match="no finite loss on the held-out text of legal"):
        train.train(settings(lab, tmp_path / "run", steps=1), one())
    assert not (tmp_path / "run/eval.json").exists()


def test_weights_too_large_for_the_type_of_the_export_are_refused(tiny_model, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.norm.weight[2] = 1e5
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"norm\.weight holds NaN or infinity in float16; export in float32"):
        hf.save(model, tmp_path / "final", state=state)
    assert not list(tmp_path.iterdir())


def mistakes(lab, tmp_path):
    """(words after a good command line, what the error says)."""
    good = lab / "tok"
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text('{"model_type": "bert"}')
    other = tokenizer.train(texts("legal"), "bpe", 280, tmp_path / "othertok")
    pack(texts("legal"), other, tmp_path / "othershards")
    shutil.copytree(lab / "legal", tmp_path / "flipped")
    file = tmp_path / "flipped/train_000000.bin"
    content = bytearray(file.read_bytes())
    content[1024 + 300] ^= 4
    file.write_bytes(content)
    shutil.copytree(lab / "legal", tmp_path / "short")
    os.truncate(tmp_path / "short/train_000000.bin", 2000)
    source = "--data.sources.legal.path"
    yield f"--train.btch-size 4 --model.tokenizer {good}", "unknown key train.btch_size; did you mean train.batch_size?"
    yield f"{source} {tmp_path}/nowhere", "data.sources.legal.path"
    yield "--data.sources.new.role general", "data.sources.new.path is not set"
    yield "--model.tokenizer /nowhere/tok", "/nowhere/tok"
    yield "--model.path /nowhere/model --model.init pretrained", "/nowhere/model"
    yield f"--model.path {bert}", "model_type 'bert'"
    yield f"{source} {tmp_path / 'othershards'}", "another tokenizer"
    yield f"{source} {tmp_path / 'flipped'}", "its hash differs"
    yield f"{source} {tmp_path / 'short'}", "cut short"
    yield f"{source} {lab}", "manifest.json"
    yield "--train.steps 0", "train.steps"
    yield "--train.steps many", "many"
    yield "--train.precision int8", "int8"
    yield "--eval.every 0", "eval.every"
    yield "--log.every 0", "log.every"
    yield "--optim.lr -1", "optim.lr"
    yield "--objective.name masked --objective.mask-token-id 4000", "4000"
    yield "--model.num-attention-heads 5", "num_attention_heads"
    yield "--device cuda", "CUDA"


def test_mistakes_are_one_line_and_leave_nothing(lab, tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for number, (words, says) in enumerate(mistakes(lab, tmp_path)):
        out = tmp_path / f"run{number}"
        status, said, errors = command(monkeypatch, capsys, arguments(lab, out, *words.split()))
        assert (status, said) == (2, ""), words
        assert re.fullmatch(r"error: .+\n", errors), (words, errors)
        assert says in errors, words
        assert not out.exists(), words
    status, _, errors = command(monkeypatch, capsys, ["--out", tmp_path / "none", "--model.init", "scratch",
                                                      "--model.tokenizer", lab / "tok"])
    assert (status, errors.startswith("error: no data: name at least one source")) == (2, True)
    status, _, errors = command(monkeypatch, capsys, [tmp_path / "recipe.toml"])
    assert (status, "recipe.toml does not exist" in errors) == (2, True)
    with pytest.raises(ValueError, match=r"train\.batch_size 4 is not a multiple of the 3 ranks"):
        train.train(settings(lab, tmp_path / "three"), parallel.World(0, 3, torch.device("cpu")))
    assert not (tmp_path / "three").exists()


def test_a_mistake_in_a_real_process(lab, tmp_path):
    done = process(*arguments(lab, tmp_path / "run", "--optim.learningrate", "1"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: unknown key optim.learningrate")
    assert not (tmp_path / "run").exists()


def test_words_that_all_ranks_have_are_refused_by_one(lab, tmp_path, monkeypatch, capsys):
    words = arguments(lab, tmp_path / "run", "--optim.learningrate", "1")
    for rank, said in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        status, _, errors = command(monkeypatch, capsys, words)
        assert (status, errors.count("\n")) == (2, said)


# ---- the other objective

@pytest.mark.slow
def test_masked_language_model_improves_on_held_out_text(lab, tmp_path):
    """Text that goes round in a circle can be guessed from either side."""
    circle, out = " ".join(KINDS["legal"].split() * 3), tmp_path / "run"
    pack([circle[i:i + 90] for i in range(len(circle) // 2)], tokenizer.load(lab / "tok"), tmp_path / "circle",
              heldout=0.2)
    train.train(settings(lab, out, "--objective.name", "masked", "--eval.tokens", 2000, "--data.sources.legal.path",
                         tmp_path / "circle", "--data.schedule", "static", "--data.domain-share", 1,
                         "--data.sources.legal.max-epochs", 100,
                         "--train.batch-size", 32, "--train.micro-batch-size", 32, "--optim.lr", 5e-3,
                         steps=300), one())
    before, after = (json.loads((out / f"eval_step_{n}.json").read_text())["texts"]["legal"] for n in (0, 300))
    assert after["accuracy"] > before["accuracy"] + 0.1
    assert after["nats_per_token"] < before["nats_per_token"] - 1.5
    assert before["tokens"] == after["tokens"] > 50
    assert "bits_per_byte" not in after


# ---- recipes

@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_settings_that_there_are(recipe):
    c = cli.parse(train.Config, [str(recipe)], recipe=True)
    assert c.out.startswith("out/")
    if "lora" in recipe.stem:
        assert c.lora.rank
        lr, least = schedules.recommended(7e9, "lora")
        assert (c.optim.lr, c.optim.min_lr) == (pytest.approx(lr), pytest.approx(least))


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("where", ["build", "resume", "finish"])
def test_a_signal_ends_a_run_at_once_where_it_has_nothing_to_save(lab, tmp_path, monkeypatch, capsys, number, where):
    with monkeypatch.context() as patch:
        patch.setattr(train, where, lambda *arguments: os.kill(os.getpid(), number))
        status, _, errors = command(patch, capsys, arguments(lab, tmp_path / "run", steps=2))
    assert (status, errors) == (128 + number, f"stopped by {number.name}\n".replace("SIGINT", "Ctrl-C"))
    assert (tmp_path / "run").exists() == (where != "build")
    assert not (tmp_path / "run/eval.json").exists()
    assert command(monkeypatch, capsys, arguments(lab, tmp_path / "run", steps=2))[0] == 0
    assert (tmp_path / "run/eval.json").exists()


# (module, function, the call of it in which a signal comes, the step at which the run is left)
PLACES = {"first evaluation": (scoring, "score", 2, 0), "evaluation": (scoring, "score", 3, 4),
          "save": (resume.Saver, "save", 1, 4), "last save": (resume.Saver, "save", 2, 8)}


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_costs_no_step_wherever_it_comes(lab, tmp_path, monkeypatch, capsys, whole, place):
    out, words, calls = tmp_path / "run", ["--train.save-every", 4, "--eval.every", 4], []
    module, function, at, step = PLACES[place]
    real = getattr(module, function)

    def signalled(*given, **named):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given, **named)
    with monkeypatch.context() as patch:
        patch.setattr(module, function, signalled)
        status, said, errors = command(patch, capsys, arguments(lab, out, *words))
    assert (status, errors, len(calls)) == (143, "", at)
    assert f"SIGTERM: saved at step {step} of 8; the same command resumes it" in said
    assert checkpoint.steps(out / "checkpoints")[-1:] == [step][:step]
    assert command(monkeypatch, capsys, arguments(lab, out, *words))[0] == 0
    assert [r["step"] for r in lines(out, "train")] == list(range(1, 9)), "a step was done twice or left out"
    assert trace(out) == trace(whole[0])
    # The whole run was evaluated less often.
    same_checkpoint(out, whole[0], 8, but=["evaluations"])


def test_a_signal_during_the_report_is_no_success(lab, tmp_path, monkeypatch, capsys):
    def stopped(*words):
        raise UserError("report.py was stopped by SIGTERM", 143)
    monkeypatch.setattr(evaluate, "run_command", stopped)
    assert command(monkeypatch, capsys, arguments(lab, tmp_path / "run", steps=1))[0] == 143


@pytest.mark.parametrize(("number", "means"), [(errno.EPIPE, signal.SIGPIPE), (errno.EIO, signal.SIGHUP)])
def test_a_run_whose_output_is_closed_saves_and_leaves(lab, tmp_path, monkeypatch, number, means):
    """Its reader has gone, or its terminal. After the loop that ends nothing, as with any command."""
    class Closed(io.StringIO):
        def write(self, text):
            if "step 3/8" in text:
                raise OSError(number, "gone")
            return len(text)
        fileno = os.dup(1).__index__
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        patch.setattr(sys, "argv", ["train.py", *arguments(lab, tmp_path / "run")])
        assert train.main() == 128 + means
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [3]


def test_json_is_the_final_evaluation(lab, tmp_path, monkeypatch, quick):
    words = [*arguments(lab, tmp_path / "run", steps=1), "--json", str(tmp_path / "result.json")]
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    assert train.main() == 0
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads((tmp_path / "run/eval.json").read_text())
