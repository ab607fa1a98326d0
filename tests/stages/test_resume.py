"""stages/resume.py: a run that was stopped, killed or damaged and resumed equals one that never was, in every loss,
weight and moment; a branch equals the run that began at step 0."""

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from runs import (
    ENV,
    ROOT,
    arguments,
    command,
    crash_at,
    lines,
    one,
    run_of,
    same_checkpoint,
    settings,
    spy,
    trace,
)
from synthetic import texts

import hf
import tokenizer
import train
from core import checkpoint
from core.guard import Guard
from core.run_folder import run_folder
from stages import resume
from stages.build import build
from text import objective_tokens
from text.shards import pack

pytestmark = pytest.mark.usefixtures("quick")
SHARD = "shard-00001-model-00001-of-00001.safetensors"


def flip(file, byte: int):
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(lab, tmp_path, monkeypatch, whole, stop):
    out, c = tmp_path / "run", settings(lab, tmp_path / "run")
    steps = sorted(random.Random(stop).sample(range(7), 3))       # stopped three times in a row
    tokens = {}
    for at in steps:
        with monkeypatch.context() as patch:
            spy(patch, at, lambda: os.kill(os.getpid(), stop), tokens)
            assert train.train(c, one()) == 128 + stop
        assert checkpoint.steps(out / "checkpoints")[-1] == at + 1
        assert not (out / "final").exists()
    with monkeypatch.context() as patch:
        spy(patch, seen=tokens)
        assert train.train(c, one()) == 0
    assert tokens == whole[1]
    assert [r["step"] for r in lines(out, "train")] == list(range(1, 9)), "a step was done twice or left out"
    assert [r["step"] for r in lines(out, "resume")] == [at + 1 for at in steps]
    assert trace(out) == trace(whole[0])
    same_checkpoint(out, whole[0], 8)
    assert (out / "eval.json").read_text() == (whole[0] / "eval.json").read_text()


def test_moments_are_filled_before_a_weight_moves_also_where_the_run_is_resumed(lab, tmp_path, monkeypatch, whole):
    """Truth: the base itself, the run without such steps, and the run that nothing interrupted."""
    words = ("--optim.moment-warmup", 3, "--train.save-every", 3)
    ends = []
    for name, at in (("through", None), ("stopped", 1)):
        out = tmp_path / name
        c = settings(lab, out, *words)
        if at is not None:
            with monkeypatch.context() as patch:
                spy(patch, at, lambda: os.kill(os.getpid(), signal.SIGTERM))
                assert train.train(c, one()) == 128 + signal.SIGTERM
        with monkeypatch.context() as patch:
            seen = spy(patch)
            assert train.train(c, one()) == 0
        ends.append((out, seen))
    (out, seen), (other, _) = ends
    assert seen == whole[1], "such steps read the run's own batches in their order"
    assert [r["lr"] for r in lines(out, "train")[:3]] == [0, 0, 0]
    assert lines(out, "train")[3]["lr"] == lines(whole[0], "train")[0]["lr"]
    weights, moments, _ = checkpoint.load(checkpoint.path_of(out / "checkpoints", 3))
    with run_folder(tmp_path / "fresh", one()) as folder, build(settings(lab, folder), one(), folder) as fresh:
        begun = {name: p.detach().clone() for name, p in fresh.inner.named_parameters()}
    assert all(torch.equal(weights[name], p) for name, p in begun.items())
    assert all(moments[f"{name}/exp_avg_sq"].any() for name in begun)
    assert trace(out) == trace(other)
    same_checkpoint(out, other, 8)


def test_killed_run_goes_on_from_its_last_checkpoint(lab, tmp_path, monkeypatch, whole, capsys):
    out, c = tmp_path / "run", settings(lab, tmp_path / "run", "--train.save-every", 3)
    crash_at(monkeypatch, c, 7)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')                          # what a killed process may leave
    assert train.train(c, one()) == 0
    assert f"resumed from {out}/checkpoints/step_00000006 at step 6" in capsys.readouterr().out
    broken = [line for line in (out / "metrics.jsonl").read_text().splitlines() if not line.endswith("}")]
    assert broken == ['{"kind": "train", "st']
    (out / "metrics.jsonl").write_text((out / "metrics.jsonl").read_text().replace(broken[0] + "\n", ""))
    assert trace(out) == trace(whole[0])
    same_checkpoint(out, whole[0], 8)


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(lab, tmp_path, monkeypatch, whole, capsys, damage):
    out, c = tmp_path / "run", settings(lab, tmp_path / "run", "--train.save-every", 2)
    crash_at(monkeypatch, c, 7)
    newest = out / "checkpoints/step_00000006"
    file = newest / SHARD
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        (newest / "manifest.json").unlink()
    assert train.train(c, one()) == 0
    said = capsys.readouterr().out
    assert re.search(r"warning: checkpoint \S+step_00000006 ", said)
    assert "step_00000004 at step 4" in said
    assert trace(out) == trace(whole[0])
    same_checkpoint(out, whole[0], 8)


@pytest.mark.slow
def test_signals_to_a_real_process(lab, tmp_path):
    out, reference = tmp_path / "run", tmp_path / "reference"
    words = arguments(lab, out, steps=150)
    reached = 0
    for stop, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        running = subprocess.Popen([sys.executable, ROOT / "train.py", *words], env=ENV, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        end = time.monotonic() + 240
        while time.monotonic() < end and running.poll() is None:
            if out.joinpath("metrics.jsonl").exists() and len(lines(out, "train")) >= reached + 3:
                break
            time.sleep(0.01)
        running.send_signal(stop)
        said, errors = running.communicate(timeout=240)
        assert (running.returncode, errors) == (status, ""), errors
        assert re.search(rf"{stop.name}: saved at step \d+ of 150; the same command resumes it", said)
        before, reached = reached, checkpoint.steps(out / "checkpoints")[-1]
        assert before < reached < 150
    train.train(settings(lab, out, steps=150), one())
    train.train(settings(lab, reference, steps=150), one())
    assert trace(out) == trace(reference)
    same_checkpoint(out, reference, 150)


def test_resume_under_other_settings_is_refused_with_what_differs(lab, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    crash_at(monkeypatch, settings(lab, out, "--train.save-every", 2), 3)
    pack(texts("legal")[:200], tokenizer.load(lab / "tok"), tmp_path / "other", heldout=0.1)
    before = {f: f.read_bytes() for f in (out / "checkpoints").rglob("*") if f.is_file()}
    for words, differs in (("--seed 1", "seed was 0 and is 1"), ("--train.batch-size 8", "batch_size was 4 and is 8"),
                           (f"--data.sources.legal.path {tmp_path / 'other'}", "tokens was"),
                           ("--optim.lr 0.02", "optim.lr was 0.01 and is 0.02"),
                           ("--train.steps 9", "first 2 steps are others (the run's length)"),
                           ("--optim.beta1 0.8", "'beta1': 0.8")):
        status, _, errors = command(monkeypatch, capsys, arguments(lab, out, *words.split()))
        assert status == 2
        assert errors.startswith(f"error: {out} holds another run: ")
        assert differs in errors
        assert errors.count("\n") == 1
    assert before == {f: f.read_bytes() for f in (out / "checkpoints").rglob("*") if f.is_file()}
    capsys.readouterr()
    c = settings(lab, out, "--train.micro-batch-size", 4, "--log.every", 5)      # these may change
    assert train.train(c, one()) == 0
    assert "at step 2" in capsys.readouterr().out


OTHER_RUNS = [
    ["--data.packing", "document"], ["--data.mask-documents", False], ["--data.reset-positions", False],
    ["--data.drop-last", True], ["--data.context", 16], ["--train.precision", "bf16"], ["--eval.tokens", 500],
    ["--forget.ema.decay", 0.9], ["--forget.ewc.strength", 0.5, "--forget.ewc.samples", 4], ["--lora.rank", 2],
    ["--objective.z-loss", 0.1], ["--objective.name", "masked", "--objective.mask-token-id", 7], ["--seed", 3],
    ["--optim.weight-decay", 0.2], ["--data.domain-share", 0.5], ["--optim.warmup-steps", 5]]


def test_whatever_changes_the_steps_makes_it_another_run(base, tmp_path):
    """And what only changes how they are computed, written or looked at does not."""
    def known(*words):
        return resume.identity(build(run_of(base, tmp_path / "run", *words), one()), 4)
    plain = known()
    for words in OTHER_RUNS:
        assert known(*words) != plain, words
    assert known("--train.micro-batch-size", 1, "--log.every", 3, "--eval.every", 2, "--train.save-every", 2,
                 "--train.keep", 2, "--eval.sample-tokens", 5, "--model.activation-checkpointing") == plain
    # Where evaluations decide the data, and where blocks thaw by the run's share, these count.
    for words, more in ((["--forget.adaptive.policy", "budget", "--eval.every", 2], ["--eval.every", 3]),
                        (["--forget.freeze.schedule", "progressive", "--data.schedule", "static",
                          "--optim.schedule", "constant"], ["--train.steps", 9])):
        assert known(*words) != known(*words, *more), words


def test_the_tokens_that_an_objective_found_make_it_another_run(base, tmp_path, monkeypatch):
    """Of a tokenizer that came to have another mask token. Text that is learned as it stands knows of none."""
    def known(mask_id, *words):
        monkeypatch.setattr(objective_tokens, "find_mask", lambda tokenizer: mask_id)
        return resume.identity(build(run_of(base, tmp_path / "run", *words), one()), 4)["objective"]
    mixed = ["--objective.name", "mixture", "--objective.weights.causal", 1, "--objective.weights.masked", 1]
    for words in (["--objective.name", "masked"], mixed):
        assert known(5, *words) == known(5, *words) != known(7, *words)
    # As before there were such tokens: older checkpoints go on.
    assert known(5) == known(7) == {"name": "causal", "mask_ratio": 0.15, "mask_token_id": None}


def test_a_checkpoint_from_before_there_were_experts_goes_on(lab, tmp_path):
    """Truth: the names that its identity has. Those of a model with experts tell runs apart."""
    run = build(settings(lab, tmp_path / "run"), one())
    names = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
             "tie_word_embeddings", "qkv_bias", "attention_bias", "mlp_bias", "qk_norm", "windows", "no_rope_layers",
             "initializer_range", "family"}
    assert resume.identity(run, 4)["model"].keys() == names
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    run.config = dataclasses.replace(run.config, **sizes)
    assert sizes.items() <= resume.identity(run, 4)["model"].items()


def test_finished_and_locked_folders_are_refused(lab, tmp_path, monkeypatch, capsys, whole):
    status, _, errors = command(monkeypatch, capsys, arguments(lab, whole[0]))
    assert (status, errors.count("\n")) == (2, 1)
    assert "holds a finished run" in errors
    with run_folder(tmp_path / "run", one()):
        status, _, errors = command(monkeypatch, capsys, arguments(lab, tmp_path / "run"))
    assert (status, errors.count("\n")) == (2, 1)
    assert "is being written by another process" in errors
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("found", ["thesis.txt", "metrics.jsonl", "final/thesis.txt", "final/config.json"])
def test_a_run_deletes_nothing_of_others(lab, tmp_path, monkeypatch, capsys, whole, found):
    out = tmp_path / "run"
    if "/" in found:
        # The folder is a run's that was killed before its eval.json, but this file in it is not.
        shutil.copytree(whole[0], out)
        (out / "eval.json").unlink()
        if found == "final/config.json":
            (out / "final/README.md").unlink()
    out.joinpath(found).parent.mkdir(exist_ok=True)
    (out / found).write_text("years of work")
    before = sorted(out.rglob("*"))
    status, _, errors = command(monkeypatch, capsys, arguments(lab, out))
    assert (status, errors.count("\n")) == (2, 1)
    assert "choose another --out" in errors
    assert sorted(out.rglob("*")) == before
    assert (out / found).read_text() == "years of work"


def test_where_no_checkpoint_verifies_the_run_refuses(lab, tmp_path, monkeypatch, capsys):
    out, words = tmp_path / "run", ("--train.save-every", 2, "--train.keep", 2)
    crash_at(monkeypatch, settings(lab, out, *words), 5)
    flip(out / "checkpoints/step_00000004" / SHARD, -1)
    (out / "checkpoints/step_00000002/state.json").unlink()
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    capsys.readouterr()
    for more in ((), ("--train.branch-from", out / "checkpoints/step_00000004")):
        status, _, errors = command(monkeypatch, capsys, arguments(lab, out, *words, *more))
        assert (status, errors.count("\n")) == (2, 1)
        assert re.search(rf"no checkpoint in .* can be used: .*step_00000004 is damaged: {SHARD} .*; .*step_00000002 "
                         rf"lacks state.json; put a good copy of one there, or remove .* to begin again", errors)
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


def test_a_renamed_checkpoint_is_not_resumed_from(lab, tmp_path, monkeypatch, capsys):
    out, words = tmp_path / "run", ("--train.save-every", 2)
    crash_at(monkeypatch, settings(lab, out, *words), 5)
    (out / "checkpoints/step_00000004").rename(out / "checkpoints/step_00000007")
    status, _, errors = command(monkeypatch, capsys, arguments(lab, out, *words))
    assert (status, errors.count("\n")) == (2, 1)
    assert "step_00000007 holds step 4" in errors


def test_what_a_disk_changed_beside_the_checkpoints_is_made_again(base, tmp_path, monkeypatch):
    words = ["--forget.adaptive.policy", "degradation", "--data.domain-share", 0.9, "--optim.lr", 0.1, "--eval.every",
             2, "--train.save-every", 3, "--forget.ewc.strength", 0.5, "--forget.ewc.samples", 4]
    whole, out = tmp_path / "whole", tmp_path / "run"
    train.train(run_of(base, whole, *words), one())
    crash_at(monkeypatch, run_of(base, out, *words), 6)
    names = ["eval_step_0.json", "eval_step_2.json", "plan.jsonl"]
    (fisher,) = out.glob("fisher_*")
    for file in (*(out / name for name in names), fisher / SHARD):
        flip(file, -30)
    (out / "eval_step_4.json").unlink()
    assert train.train(run_of(base, out, *words), one()) == 0
    for name in (*names, "eval_step_4.json", "eval.json", f"{fisher.name}/state.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    checkpoint.verify(fisher)
    same_checkpoint(out, whole, 8)


@pytest.mark.parametrize("part", ["model", "state"])
def test_a_checkpoint_that_is_not_finite_is_not_resumed_from(lab, tmp_path, monkeypatch, capsys, whole, part):
    model, moments, state = checkpoint.load(whole[0] / "checkpoints/step_00000008")
    tensors = {f"model/{name}": value for name, value in model.items()}
    tensors |= {f"state/{name}": value for name, value in moments.items()}
    last = [name for name in tensors if name.startswith(part)][-1]
    tensors[last] = torch.full_like(tensors[last], float("nan"))
    out = tmp_path / "run"
    checkpoint.write(out / "checkpoints/step_00000008", checkpoint.Shards(tensors), state)
    shutil.copy(whole[0] / "config.toml", out)
    status, _, errors = command(monkeypatch, capsys, arguments(lab, out))
    assert (status, errors.count("\n")) == (2, 1)
    assert f"step_00000008 holds NaN or infinity (first in {last}); remove it" in errors
    assert not (out / "final").exists()


def test_training_goes_on_while_a_checkpoint_is_written(lab, tmp_path, monkeypatch, whole):
    """The writer waits for the step after the next one: what it then writes is the state of the moment of the save."""
    out, went_on, real, write = tmp_path / "run", threading.Event(), train.train_step, checkpoint.write

    def step(run, number, batches):
        done = real(run, number, batches)
        if number == 3:
            went_on.set()
        return done

    def late(path, *arguments):
        assert went_on.wait(60)
        write(path, *arguments)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", step)
        patch.setattr(checkpoint, "write", late)
        patch.setattr(checkpoint, "prune", lambda *arguments: None)
        assert train.train(settings(lab, out, "--train.save-every", 3), one()) == 0
    assert checkpoint.steps(out / "checkpoints") == [3, 6, 8]
    for path in ("step_00000003", "step_00000006"):
        checkpoint.verify(out / "checkpoints" / path)
    for later in (6, 8):
        shutil.rmtree(out / f"checkpoints/step_0000000{later}")
    (out / "eval.json").unlink()
    assert train.train(settings(lab, out, "--train.save-every", 3), one()) == 0         # from what was written late
    same_checkpoint(out, whole[0], 8)


def test_a_bug_in_the_background_is_no_warning(lab, tmp_path, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError
    monkeypatch.setattr(checkpoint, "write", broken)
    with pytest.raises(ZeroDivisionError):
        train.train(settings(lab, tmp_path / "run", "--train.save-every", 2), one())


def test_the_best_of_the_evaluated_checkpoints_is_kept(tmp_path):
    bits = {0: 1.0, 2: 3.0, 4: 2.0, 6: 2.5, 8: None}
    run = SimpleNamespace(
        c=SimpleNamespace(train=SimpleNamespace(keep_best=True, save_every=2)), world=one(), folder=tmp_path,
        guard=Guard(),
        names_of=lambda role: [role, "without held-out text"],
        evaluations={f"eval_step_{step}.json": {"texts": {
            "domain": {"bits_per_byte": value} if value else {"accuracy": 0.5}, "general": {"bits_per_byte": 0.1}}}
            for step, value in bits.items()})
    assert resume.kept_beside(run) == [[], []]
    for step in (2, 4, 5, 6, 8):
        checkpoint.path_of(tmp_path / "checkpoints", step).mkdir(parents=True)
    assert resume.kept_beside(run) == [[4, 6, 2], []]
    run.c.train.keep_best, run.guard.config.spike = False, "rewind"
    assert resume.kept_beside(run) == [[], [8, 6, 4, 2, 5]]


def test_a_changed_default_of_what_is_off_is_no_other_run(base, tmp_path):
    def known(change=lambda c: None):
        run = build(run_of(base, tmp_path / "run", "--forget.ema.decay", 0.5), one())
        change(run.c)
        return resume.identity(run, 4)
    plain = known()
    assert set(plain["forget"]) == {"ema"}
    assert known(lambda c: vars(c.forget.adaptive).update(epsilon=0.5)) == plain
    assert known(lambda c: vars(c.forget.freeze).update(thaw_ratio=0.1)) == plain
    assert known(lambda c: vars(c.lora).update(alpha=1.0)) == plain
    assert known(lambda c: vars(c.forget.ema).update(decay=0.6)) != plain


def limit_files(size: int):
    """The system's limit on a file's size stands for a full disk: both fail in the middle of a write. Returns what sets
    the old one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_training_goes_on_over_a_failed_save_and_stops_at_the_end(lab, tmp_path, monkeypatch, capsys, whole):
    out, words = tmp_path / "run", ("--train.save-every", 2)
    crash_at(monkeypatch, settings(lab, out, *words), 2)
    capsys.readouterr()
    undo = limit_files(30_000)
    try:
        status, said, errors = command(monkeypatch, capsys, arguments(lab, out, *words))
    finally:
        undo()
    assert status == 2
    assert re.fullmatch(r"error: checkpoint .*step_00000008 could not be written .*; make room, and .*\n", errors)
    assert [f"step_0000000{step} could not be written" in said for step in (4, 6, 8)] == [True] * 3
    assert [f.name for f in (out / "checkpoints").iterdir()] == ["step_00000002"]
    checkpoint.verify(out / "checkpoints/step_00000002")
    assert not (out / "final").exists()
    assert train.train(settings(lab, out, *words), one()) == 0
    same_checkpoint(out, whole[0], 8)


def test_a_disk_that_is_full_for_a_while_costs_nothing(lab, tmp_path, monkeypatch, capsys, whole):
    out, undo = tmp_path / "run", []
    spy(monkeypatch, 1, lambda: undo.append(limit_files(30_000)))
    real = resume.Saver.wait

    def wait(saver):
        real(saver)
        if saver.error and undo:
            assert saver.error.startswith(f"checkpoint {out}/checkpoints/step_00000002 could not be written")
            undo.pop()()
    monkeypatch.setattr(resume.Saver, "wait", wait)
    assert train.train(settings(lab, out, "--train.save-every", 2), one()) == 0
    assert checkpoint.steps(out / "checkpoints") == [4, 6, 8]
    assert "warning: checkpoint " in capsys.readouterr().out
    same_checkpoint(out, whole[0], 8)


def test_a_disk_that_is_full_between_saves_costs_no_step_and_no_line(lab, small_disk, monkeypatch, capsys, whole):
    """The log of steps 4 and 5 and the evaluation before step 5 find no room; nothing is done again."""
    out, ballast, real = small_disk / "run", small_disk / "ballast", train.train_step

    def step(run, number, batches):
        done = real(run, number, batches)
        if number == 3:
            found = os.statvfs(small_disk)
            ballast.write_bytes(bytes(found.f_bavail * found.f_frsize))
            # The page that the log has begun may hold more lines.
            run.log.record("filler", 4, text="x" * 8192)
        elif number == 5:
            ballast.unlink()
        return done
    monkeypatch.setattr(train, "train_step", step)
    assert train.train(settings(lab, out, "--eval.every", 4), one()) == 0
    assert "No space left on device: '" in capsys.readouterr().out
    assert [row["step"] for row in lines(out, "train")] == list(range(1, 9))
    assert trace(out) == trace(whole[0])
    assert (out / "eval_step_4.json").exists()
    same_checkpoint(out, whole[0], 8, but=["evaluations"])


LORA = ["--lora.rank", 4, "--lora.dropout", 0.1]
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
    alone = tmp_path / "w"                                 # a checkpoint knows what was known before its run
    train.train(run_of(base, alone, *annealed, "--train.branch-from", tmp_path / "alone/checkpoints/step_00000005"),
                one())
    assert (alone / "eval.json").read_bytes() == (whole / "eval.json").read_bytes()
    with pytest.raises(ValueError, match="nowhere does not exist"):
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


def test_an_adapter_does_not_go_on_over_another_base(base, tmp_path):
    lab, folder = base
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    model = hf.load(other)
    model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    hf.save(model, other, base=folder)
    out, words = tmp_path / "run", (*LORA, "--train.save-every", 4)
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, run_of(base, out, *words), 5)
    with pytest.raises(ValueError, match="holds another run: base was"):
        train.train(run_of((lab, other), out, *words), one())
    moved = tmp_path / "moved"                             # the same weights elsewhere are the same base
    shutil.copytree(folder, moved)
    assert train.train(run_of((lab, moved), out, *words), one()) == 0
