"""core/guard.py. Truth: the rule by hand, and torch's mean and standard deviation."""

import json
import math

import pytest
import torch

from core.guard import Guard, GuardConfig
from core.signals import Stopped

BAD = [math.nan, math.inf, -math.inf]


def judged(guard, values, norm=1.0) -> list[bool]:
    """Which of the losses were left out."""
    return [guard.judge(step, loss, norm, ["law"]) is not None for step, loss in enumerate(values)]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_what_is_not_finite_is_named_and_left_out(value, what):
    guard = Guard()
    loss, norm = (value, 1.0) if what == "loss" else (1.0, value)
    why = guard.judge(7, loss, norm, {"law": 1, "tales": 2})
    assert why == f"in step 8 the {what} is {value} (sources in the step: law, tales)"
    assert (guard.left_out, guard.in_a_row, guard.window) == (1, 1, [])
    guard.check()
    assert guard.judge(8, 1e308, 1.0, ()) is None
    assert (guard.left_out, guard.in_a_row, guard.window) == (1, 0, [[1e308, 1.0]])
    both = guard.judge(9, math.nan, math.inf, ["law"])
    assert both == "in step 10 the loss is nan and the gradient norm is inf (sources in the step: law)"


def test_updates_left_out_one_after_another_end_the_run():
    guard = Guard(GuardConfig(limit=3))
    assert judged(guard, [1, math.nan, math.nan, 1, math.nan, math.nan]) == [False, True, True, False, True, True]
    guard.check()
    guard.judge(6, math.nan, 1.0, ["law"])
    with pytest.raises(Stopped, match=r"in step 7 the loss is nan .*law\), and 3 updates one after another") as stop:
        guard.check()
    assert stop.value.status == 2
    assert guard.left_out == 5


def test_a_policy_may_stop_at_once():
    guard = Guard(GuardConfig(nonfinite="stop"))
    assert guard.judge(0, math.nan, 1.0, ["law"])
    with pytest.raises(Stopped, match=r"pass --guard\.nonfinite skip"):
        guard.check()


def test_what_was_left_out_since_a_checkpoint_was_left_out_in_a_row_once_the_run_is_rewound():
    guard = Guard(GuardConfig(nonfinite="rewind", limit=3))
    assert (guard.may_rewind, Guard().may_rewind) == (True, False)
    judged(guard, [1, 2, math.nan])
    saved = guard.state() | {"window": [[1, 1.0]], "left_out": 0, "in_a_row": 0}
    for expected in (1, 2):
        assert guard.goes_back
        guard.rewind(saved, "a fault")
        assert (guard.window, guard.in_a_row, guard.goes_back) == ([[1, 1.0]], expected, False)
        guard.check()
        assert judged(guard, [5, math.nan]) == [False, True]
    guard.rewind(saved, "a fault")
    with pytest.raises(Stopped, match="a fault, and 3 updates one after another were left out"):
        guard.check()


def test_each_kind_of_fault_has_its_own_policy():
    guard = Guard(GuardConfig(spike="rewind", window=8))
    assert not any(judged(guard, [2.0, 2.2] * 4))
    found = []
    for loss in (math.nan, 9.0, 2.1):
        guard.judge(8, loss, 1.0, ["law"])
        found.append(guard.goes_back)
    assert found == [False, True, False]


def test_spikes_are_off_unless_asked_for():
    assert not any(judged(Guard(), [2.0] * 200 + [1e30]))


def test_a_spike_is_far_above_the_steps_before():
    torch.manual_seed(0)
    past = (2 + 0.1 * torch.randn(200)).tolist()
    for sigma in (3.0, 6.0):
        guard = Guard(GuardConfig(spike="skip", window=128, sigma=sigma))
        # Nothing is one before half of the window is known.
        assert not any(judged(guard, [*past[:63], 1e4, *past[64:]]))
        guard.window = [[loss, 1.0] for loss in past[-128:]]
        known = torch.tensor(past[-128:], dtype=torch.float64)
        limit = (known.mean() + sigma * known.std(correction=0)).item()
        assert not guard.find_spikes({"loss": limit - 1e-9})
        assert guard.find_spikes({"loss": limit + 1e-9})
        assert guard.find_spikes({"loss": 1.9, "gradient norm": 1.1})


def test_one_nan_or_spike_does_not_make_the_next_steps_spikes():
    """With the NaN in its window, the rule would leave out the 128 steps after it."""
    torch.manual_seed(0)
    losses = (2 + 0.1 * torch.randn(400)).tolist()
    losses[150], losses[170] = math.nan, 2e4
    guard = Guard(GuardConfig(spike="skip"))
    assert [step for step, out in enumerate(judged(guard, losses)) if out] == [150, 170]
    assert len(guard.window) == 128
    assert all(math.isfinite(value) for pair in guard.window for value in pair)


def test_a_guard_goes_on_from_its_state_with_the_same_decisions():
    torch.manual_seed(1)
    losses = (2 + 0.1 * torch.randn(300)).tolist()
    for step in (100, 140, 141, 220, 299):
        losses[step] *= 1.5
    config = GuardConfig(spike="skip", window=64, sigma=4.0)
    whole = Guard(config)
    expected = judged(whole, losses)
    assert sum(expected) == 5
    for cut in (10, 100, 101, 141, 250):
        first, second = Guard(config), Guard(config)
        decisions = judged(first, losses[:cut])
        second.load_state(json.loads(json.dumps(first.state())))
        assert decisions + judged(second, losses[cut:]) == expected
        assert second.state() == whole.state()
