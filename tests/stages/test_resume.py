"""stages/resume.py: a run that was stopped, killed or damaged and resumed equals one that never was, in every loss,
weight and moment; a branch equals the run that began at step 0."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
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
from core.files import run_folder
from stages import resume
from stages.build import build
from text.shards import pack

pytestmark = pytest.mark.usefixtures("quick")


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
    file = newest / "shard-00001-model-00001-of-00001.safetensors"
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
        end = time.monotonic() + 60
        while time.monotonic() < end and running.poll() is None:
            if out.joinpath("metrics.jsonl").exists() and len(lines(out, "train")) >= reached + 3:
                break
            time.sleep(0.01)
        running.send_signal(stop)
        said, errors = running.communicate(timeout=60)
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


def test_finished_and_locked_folders_are_refused(lab, tmp_path, monkeypatch, capsys, whole):
    status, _, errors = command(monkeypatch, capsys, arguments(lab, whole[0]))
    assert (status, errors.count("\n")) == (2, 1)
    assert "holds a finished run" in errors
    with run_folder(tmp_path / "run", one()):
        status, _, errors = command(monkeypatch, capsys, arguments(lab, tmp_path / "run"))
    assert (status, errors.count("\n")) == (2, 1)
    assert "is being written by another process" in errors
    assert not list((tmp_path / "run").iterdir())


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
