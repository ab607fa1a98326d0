"""learn/multitask.py. Truth: each member alone on the sequences that are its; the binomial's shares. Laws: which way a
sequence is learned is a function of its place; micro-batches add up.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batches import batch_of, random_tokens
from runs import arguments, command, crash_at, lines, one, same_checkpoint, settings, trace

import train
from core.errors import UserError
from core.hashing import mix_keys
from data import RowRandom
from learn.choose_objective import ObjectiveConfig, make_objective
from learn.infilling import Span
from learn.method import take_sequences
from learn.multitask import Mixture, Weights
from learn.objectives import Causal, Masked

MEMBERS = {"causal": Causal(True), "masked": Masked(True, 3, (0, 1, 2), 97, 0.4),
           "span": Span(True, (0, 1, 2, 3), list(range(80, 97)), 0.3)}
WORDS = ("--objective.name", "mixture", "--objective.weights.causal", 3, "--objective.weights.masked", 1,
         "--objective.mask-token-id", 0)


def mixture(sharded=False, **weights) -> Mixture:
    weights = weights or dict.fromkeys(MEMBERS, 1)
    made = Mixture({name: MEMBERS[name] for name in weights}, weights)
    made.model_built(None, SimpleNamespace(sharded=sharded))
    return made


def a_batch():
    """Texts of fewer tokens than a sequence has room for, as `text_length` asks for them."""
    return batch_of(random_tokens(9, 33, 80), [(0, 7), (2, 20)], [(row, 11 if row == 1 else 25) for row in range(9)])


def test_the_shares_are_the_weights_and_a_place_has_one_way():
    objective, n = mixture(causal=3, masked=1), 40_000
    keys = mix_keys(0, "story", "corrupt", 0, np.arange(n))
    batch = batch_of(np.full((n, 3), 50))
    task = objective.corrupt(batch, RowRandom(keys)).task
    assert abs((task == 1).mean() - 0.25) < 5 * (0.25 * 0.75 / n) ** 0.5
    some = [7, 3, 39_999]
    again = objective.corrupt(take_sequences(batch, some), RowRandom(keys[some]))
    assert again.task.tolist() == task[some].tolist()
    other = objective.corrupt(batch, RowRandom(mix_keys(0, "story", "corrupt", 1, np.arange(n)))).task
    assert abs((task == other).mean() - (0.75**2 + 0.25**2)) < 0.02               # another epoch, independent


@pytest.mark.parametrize("sharded", [False, True])
def test_each_sequence_is_learned_by_its_own_objective(tiny_model, sharded):
    model, objective, batch = tiny_model(), mixture(sharded), a_batch()
    made = objective.corrupt(batch, batch.rng)
    loss, count, metrics = objective.loss(model, made, want_hits=True)
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total, targets, hits, seen = 0.0, 0, 0, set()
    for i in range(9):
        name, member = list(MEMBERS.items())[made.task[i]]
        alone = member.corrupt(take_sequences(batch, [i]), RowRandom(batch.rng.keys[[i]]))
        for part in ("tokens", "labels", "position_ids", "doc_start"):
            assert torch.equal(getattr(made, part)[i], getattr(alone, part)[0]), (i, part)
        nats, n, of_one = member.loss(model, alone, want_hits=True)
        torch.testing.assert_close(metrics["token_loss"][i], of_one["token_loss"][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(metrics["hidden"][i], of_one["hidden"][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(objective.hidden_states(model, made)[i], of_one["hidden"][0], rtol=1e-4, atol=1e-4)
        total, targets, hits, seen = total + nats, targets + n, hits + of_one["hits"], {*seen, name}
    total.backward()
    assert seen == {*MEMBERS}
    assert count == targets == objective.count(made)
    assert metrics["hits"] == hits
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-3)
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    measures = {name: [float(x) for x in pair] for name, pair in metrics["measures"].items()}
    assert measures.keys() == set(objective.measures)
    assert measures["causal/share"] == [(made.task == 0).sum(), 9]
    assert measures["span/cut"][1] > 0
    assert sum(measures[f"{name}/loss"][0] for name in seen) == pytest.approx(loss.item(), rel=1e-5)
    assert sum(measures[f"{name}/loss"][1] for name in seen) == count


@pytest.mark.parametrize("sharded", [False, True])
def test_micro_batches_without_one_of_the_ways_add_up(tiny_model, sharded):
    model, objective, batch = tiny_model(), mixture(sharded), a_batch()
    made = objective.corrupt(batch, batch.rng)
    loss, count, metrics = objective.loss(model, made)
    parts = [objective.loss(model, take_sequences(made, [i])) for i in range(9)]
    torch.testing.assert_close(sum(nats for nats, _, _ in parts), loss, rtol=1e-5, atol=1e-3)
    assert sum(n for _, n, _ in parts) == count
    for name in objective.measures:
        for i in (0, 1):
            one_by_one = sum(float(more["measures"][name][i]) for _, _, more in parts)
            assert one_by_one == pytest.approx(float(metrics["measures"][name][i]), rel=1e-4), name


def test_the_members_come_from_the_settings():
    config = ObjectiveConfig(name="mixture", mask_token_id=5, mask_ratio=0.3, weights=Weights(causal=1, masked=2))
    made = make_objective(config, False, None, 10)
    assert {name: type(member) for name, member in made.members.items()} == {"causal": Causal, "masked": Masked}
    assert made.members["masked"].mask_ratio == 0.3
    assert (made.causal, made.shift, made.mask_documents) == (True, 1, False)
    assert made.bounds.tolist() == pytest.approx([1 / 3])
    assert isinstance(made.text_objective, Causal)
    # Beside causal, whose sequences share a token, a sequence of text has one more than with span alone.
    assert mixture().text_length(32) == MEMBERS["span"].text_length(32) - 1
    assert mixture(causal=1, masked=1).text_length(32) == 32
    assert made.part_documents().members["masked"].mask_documents
    assert not made.members["masked"].mask_documents
    with pytest.raises(UserError, match="two objectives or more"):
        make_objective(ObjectiveConfig(name="mixture", weights=Weights(causal=1)), True, None, 10)


@pytest.mark.usefixtures("quick")
def test_a_run_is_resumed_bit_for_bit_and_measures_each_way(lab, tmp_path, monkeypatch):
    train.train(settings(lab, tmp_path / "whole", *WORDS, "--train.save-every", 3, steps=6), one())
    crash_at(monkeypatch, settings(lab, tmp_path / "run", *WORDS, "--train.save-every", 3, steps=6), 4)
    train.train(settings(lab, tmp_path / "run", *WORDS, "--train.save-every", 3, steps=6), one())
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")
    same_checkpoint(tmp_path / "run", tmp_path / "whole", 6)
    logged = [line["objective"] for line in lines(tmp_path / "whole", "train")]
    assert all(step["causal/share"] + step["masked/share"] == pytest.approx(1) for step in logged)
    result = json.loads((tmp_path / "whole/eval.json").read_text())
    assert result["objective"]["after"]["legal"].keys() >= {"loss", "causal/loss", "masked/loss", "masked/share"}
    assert "bits_per_byte" in result["after"]["legal"]


@pytest.mark.usefixtures("quick")
def test_what_is_no_member_is_refused_by_name(lab, tmp_path, monkeypatch, capsys):
    words = arguments(lab, tmp_path / "run", *WORDS, "--objective.weights.electra", 1)
    status, _, said = command(monkeypatch, capsys, words)
    assert status == 2
    assert "objective.weights.electra" in said.splitlines()[-1]


@pytest.mark.usefixtures("quick")
def test_lwf_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    """Under FSDP its base would gather its weights on the ranks unequally often, and hang."""
    words = arguments(tmp_path / "none", tmp_path / "run", *WORDS, "--forget.lwf.alpha", 0.5)
    status, _, said = command(monkeypatch, capsys, words)
    assert (status, len(said.splitlines())) == (2, 1)
    assert "forget.lwf compares" in said
    assert "mixture has several" in said
