"""Truths: one optimizer for each parameter. Laws: what is frozen keeps its bits and holds no state."""

import pytest
import torch
from retention import ONE, bits, cross_entropy, methods, some_batch, step_of, toy

from core import parallel
from learn.freeze import FreezeConfig


def trains(model) -> set:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def block(name) -> int:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else -1


def top(model, blocks, *more) -> set:
    n = len(model.layers)
    return {name for name, _ in model.named_parameters()
            if name.split(".")[0] in ("norm", "head", *more)
            or block(name) >= n - blocks}


def test_blocks_thaw_from_the_top_by_exact_number():
    model = toy(dtype=torch.float32)
    # 22 steps, thawed over the first half: one more of the 11 lower blocks each step
    freeze, = methods(steps=22, built=model, freeze=FreezeConfig("progressive"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(22):
        before = bits(model)
        step_of(model, optimizer, [freeze], step, some_batch(step))
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == top(model, min(12, 1 + step)), step
        assert trains(model) == top(model, min(12, 2 + step)), "thawed for the next step"
    freeze, = methods(steps=22, built=(model := toy()), freeze=FreezeConfig("top", blocks=2, embeddings=True))
    assert trains(model) == top(model, 2, "embed_tokens")
    assert "layers.1.weight" not in trains(model)
    assert "layers.10.weight" in trains(model)


STAGES = ["0 layers.1 layers.3 head", "0.3 layers.*.bias norm", "0.6 layers.1 layers.10.weight embed_tokens"]


def test_any_schedule_is_as_if_each_parameter_had_an_optimizer_of_its_own():
    model, truth = toy(dtype=torch.float32), toy(dtype=torch.float32)
    freeze, = methods(steps=10, built=model, freeze=FreezeConfig("stages", stages=STAGES))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.3)
    own, was, biases = {}, set(), {f"layers.{i}.bias" for i in range(12)}
    for step in range(10):
        before, frozen = bits(model), {n for n, _ in model.named_parameters()}
        step_of(model, optimizer, [freeze], step, some_batch(step))
        now = {name for name in frozen
               if (step < 3 and name.split(".")[:2] in (["layers", "1"], ["layers", "3"], ["head", "weight"]))
               or (3 <= step < 6 and (name.startswith("norm") or name in biases))
               or (step >= 6 and (name.startswith(("layers.1.", "embed_tokens")) or name == "layers.10.weight"))}
        batch = some_batch(step)
        (cross_entropy(truth, batch) / (batch.labels != -100).sum()).backward()
        parameters = dict(truth.named_parameters())
        for name in now:
            if name not in was:                              # thawed again: it begins anew
                own[name] = torch.optim.AdamW([parameters[name]], lr=0.01, weight_decay=0.3)
            own[name].step()
        truth.zero_grad()
        was = now
        for name, p in model.named_parameters():
            assert torch.equal(p, parameters[name]), (step, name)
            assert torch.equal(p, before[name]) == (name not in now), (step, name)
        following = freeze.sets[freeze.stage_at(min(9, step + 1))]
        held = {name for name, p in model.named_parameters() if p in optimizer.state}
        assert held == now & following, "what froze has no optimizer state left"


def test_a_stage_may_be_the_last_step_alone():
    model = toy(blocks=2, dtype=torch.float32)
    freeze, = methods(steps=10, built=model, freeze=FreezeConfig("stages", stages=["0 norm", "0.9 head"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(10):
        before = bits(model)
        step_of(model, optimizer, [freeze], step, some_batch(step))
        moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == ({"head"} if step == 9 else {"norm"}), step
    assert trains(model) == {"head.weight"}


def test_the_first_step_after_a_resume_freezes_what_it_should():
    model = toy(dtype=torch.float32)
    freeze, = methods(steps=10, built=model, freeze=FreezeConfig("stages", stages=STAGES))
    cross_entropy(model, some_batch()).backward()
    freeze.before_step(7, model)
    graded = {name for name, p in model.named_parameters() if p.grad is not None}
    assert graded == {"layers.1.weight", "layers.1.bias", "layers.10.weight", "embed_tokens.weight"} == trains(model)


def test_under_ddp_gradients_are_dropped_and_every_rank_still_has_them_to_send():
    model = toy(dtype=torch.float32)
    freeze, = methods(steps=10, built=model, freeze=FreezeConfig("progressive"), world=parallel.World(0, 2, ONE.device))
    assert trains(model) == {name for name, _ in model.named_parameters()} - {"embed_tokens.weight"}
    assert any("DDP" in note for note in freeze.notes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = bits(model)
    step_of(model, optimizer, [freeze], 0, some_batch())
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == top(model, 1)
    assert len(trains(model)) == 2 * 12 + 3


def test_a_tied_head_is_reported():
    freeze, = methods(built=toy(tied=True), freeze=FreezeConfig("progressive"))
    assert any("tied" in note and "does not train" in note for note in freeze.notes)
    freeze, = methods(built=toy(tied=True), freeze=FreezeConfig("progressive", embeddings=True))
    assert any("tied" in note and "does not train" not in note for note in freeze.notes)
    freeze, = methods(built=toy(), freeze=FreezeConfig("progressive"))
    assert not any("tied" in note for note in freeze.notes)


@pytest.mark.parametrize(("freeze", "says"), [
    (FreezeConfig("top", blocks=13), "12 blocks"),
    (FreezeConfig("stages", stages=["0 head", "0.5 layer.3"]), r"'layer.3', which fits no .*; did you mean layers"),
    (FreezeConfig("stages", stages=["0 head", "0.5"]), "nothing to train"),
])
def test_freezing_what_is_not_there(freeze, says):
    with pytest.raises(ValueError, match=says):
        methods(built=toy(), freeze=freeze)
