"""Rewinds of stages/resume.py: after one the run has the state of a checkpoint and goes on with the data behind the
fault; killed or stopped anywhere and resumed it equals, bit for bit, the run that nothing interrupted."""

import os
import re
import signal
import time

import pytest
import torch
from runs import arguments, command, crash_at, lines, one, run_of, same_checkpoint, settings, spy

import report
import train
from core import checkpoint, parallel

pytestmark = pytest.mark.usefixtures("quick")


def fault_in(monkeypatch, *steps):
    """In each of the steps, counted from 0, the gradients are not finite once they are complete."""
    real, clip = train.train_step, parallel.clip_gradients

    def step(run, number, batches):
        spoilt = (lambda model, limit: clip(model, limit) * float("nan")) if number in steps else clip
        with monkeypatch.context() as patch:
            patch.setattr(parallel, "clip_gradients", spoilt)
            return real(run, number, batches)
    monkeypatch.setattr(train, "train_step", step)


REWIND = ["--guard.nonfinite", "rewind", "--train.save-every", 3]


def test_a_rewound_run_has_the_state_of_the_checkpoint_and_reads_on_behind_the_fault(
        lab, tmp_path, monkeypatch, whole, capsys):
    """The fault is in the step that would be saved next: what is saved instead is the state of the save before."""
    out = tmp_path / "run"
    fault_in(monkeypatch, 5)
    seen = spy(monkeypatch)
    assert train.train(settings(lab, out, *REWIND, "--guard.spike", "rewind", "--guard.window", 8), one()) == 0
    assert seen == whole[1], "each step read its own batch, once"
    said = capsys.readouterr().out
    assert len(re.findall("was rewound", said)) == 1
    assert re.search(r"warning: in step 6 the gradient norm is nan \(sources .*\), and the run was rewound to step 3: "
                     r"the update was left out, 1 by now", said)
    assert [(row["step"], row["to"]) for row in lines(out, "rewind")] == [(6, 3)]
    states = {step: checkpoint.load(checkpoint.path_of(out / "checkpoints", step)) for step in (3, 6)}
    for old, new in zip(states[3][:2], states[6][:2]):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert [*report.read_run(out).accidents][1] == "the run was rewound once, the last time from step 6 to 3"
    assert states[6][2]["guard"] == states[3][2]["guard"] | {"left_out": 1, "in_a_row": 1}


CASES = {"lora": ["--lora.rank", 4, "--lora.dropout", 0.1],
         "methods": ["--forget.ema.decay", 0.9, "--forget.freeze.schedule", "progressive", "--forget.adaptive.policy",
                     "degradation", "--forget.adaptive.start", 0.4, "--data.domain-share", 0.7, "--eval.every", 1],
         "8 bit": ["--optim.name", "adamw_8bit", "--train.precision", "bf16"]}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_rewinds_and_is_interrupted_equals_one_that_is_not(base, tmp_path, monkeypatch, case):
    """Faults in steps 5 and 8 of 10, counted from 0, saves every 3. A stop before the faults saves a checkpoint that
    the uninterrupted run does not have; kills after them come before and after the next save."""
    fault_in(monkeypatch, 4, 7)
    words = [*REWIND, "--data.schedule", "static", "--train.keep", 2, "--train.steps", 10, *CASES[case]]
    outs = tmp_path / "a", tmp_path / "b"
    assert train.train(run_of(base, outs[0], *words), one()) == 0
    assert [(row["step"], row["to"]) for row in lines(outs[0], "rewind")] == [(5, 3), (8, 6)]
    c = run_of(base, outs[1], *words)
    for at in (3, 8):
        with monkeypatch.context() as patch:
            spy(patch, at, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert train.train(c, one()) == 143
        if at == 3:
            for kill_at in (5, 6, 8):
                crash_at(monkeypatch, c, kill_at)
    assert train.train(c, one()) == 0
    same_checkpoint(*outs, 10)
    assert {(row["step"], row["to"]) for row in lines(outs[1], "rewind")} == {(5, 3), (8, 6)}
    if case == "methods":
        decisions = checkpoint.load(outs[0] / "checkpoints/step_00000010")[2]["decisions"]
        assert [decision["step"] for decision in decisions] == [*range(1, 10)], "a rewind undoes none"


def test_a_fault_before_the_first_save_goes_back_to_step_0(lab, tmp_path, monkeypatch):
    fault_in(monkeypatch, 1)
    out, c = tmp_path / "run", settings(lab, tmp_path / "run", *REWIND)
    crash_at(monkeypatch, c, 0)
    assert checkpoint.steps(out / "checkpoints") == [0]
    assert train.train(c, one()) == 0
    assert [(row["step"], row["to"]) for row in lines(out, "rewind")] == [(2, 0)]
    assert [len(lines(out, kind)) for kind in ("start", "eval")] == [1, 2], "the run that died has left no lines"


def test_a_branch_can_go_back_to_where_it_began(lab, tmp_path, monkeypatch):
    trunk, out = tmp_path / "trunk", tmp_path / "run"
    words = ["--optim.schedule", "constant", "--data.schedule", "static", *REWIND]
    assert train.train(settings(lab, trunk, *words), one()) == 0
    fault_in(monkeypatch, 6)
    branch = settings(lab, out, *words, "--train.branch-from", checkpoint.path_of(trunk / "checkpoints", 6))
    assert train.train(branch, one()) == 0
    assert [(row["step"], row["to"]) for row in lines(out, "rewind")] == [(7, 6)]
    assert len(lines(out, "start")) == 1


def test_a_run_that_never_gets_beyond_its_checkpoint_is_stopped(lab, tmp_path, monkeypatch, capsys):
    """Each second step is good, and undone by the one behind it; a save of what was rewound to is no progress."""
    out = tmp_path / "run"
    fault_in(monkeypatch, 3, 5, 7, 9, 11)
    status, _, errors = command(monkeypatch, capsys, arguments(
        lab, out, *REWIND, "--train.save-every", 2, "--guard.limit", 3, steps=12))
    assert (status, errors.count("\n")) == (2, 1)
    assert re.search(r"in step 8 .*, and 3 updates one after another were left out; .* saved at step 8 of 12", errors)
    assert [(row["step"], row["to"]) for row in lines(out, "rewind")] == [(4, 2), (6, 4), (8, 6)]


def test_a_run_with_nothing_to_go_back_to_is_saved_and_stopped(lab, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    fault_in(monkeypatch, 2)

    def damage():
        first = checkpoint.path_of(out / "checkpoints", 0)
        while not first.exists():
            time.sleep(0.01)
        (first / "manifest.json").write_text("{}")
    with monkeypatch.context() as patch:
        spy(patch, 1, damage)
        status, _, errors = command(monkeypatch, capsys, arguments(lab, out, *REWIND, "--train.save-every", 4))
    assert (status, errors.count("\n")) == (2, 1)
    assert re.search(r"in step 3 .*, and no checkpoint verifies .* saved at step 3 of 8", errors)
    status, said, _ = command(monkeypatch, capsys, arguments(lab, out))
    assert (status, "at step 3" in said) == (0, True)
