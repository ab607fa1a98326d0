"""learn/selective.py. Truth: the definition written out token by token over torch's log_softmax, and the causal
objective where all is kept. Laws: what is kept of a document depends on neither its neighbours nor the micro-batch.
"""

import contextlib
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from batches import batch_of, logits_of, random_tokens
from runs import arguments, command, crash_at, lines, one, settings, trace
from synthetic import texts

import hf
import tokenizer as tokenizers
import train
from core import checkpoint
from core.errors import UserError
from learn.choose_objective import refuse_objective
from learn.method import take_sequences
from learn.objectives import IGNORE, Causal
from learn.selective import Selective, select
from stages.build import build
from stages.refuse import refuse_combinations
from stages.resume import identity

TOKENS = random_tokens(3, 22)


def selective(model, reference, keep=0.6, documents=True) -> Selective:
    made = Selective(documents, keep)
    made.model_built(model, SimpleNamespace(reference=lambda _: contextlib.nullcontext(reference)))
    return made


def a_batch(objective):
    batch = batch_of(TOKENS, [(0, 7), (0, 9), (2, 20)], [(1, 11)])
    return objective.corrupt(batch, batch.rng)


def test_the_example_by_hand():
    batch = batch_of([[1] * 8])
    batch.labels[0, 2] = IGNORE
    batch.doc_start[0, 6:] = 6
    excess = torch.tensor([[0.1, 2.0, 9.0, -0.3, 0.9, 1.2, -5.0, -5.0]])
    # Of five targets three; of two that are equal ceil(1.2), so both; at 0.5 the first.
    assert select(excess, batch, 0.6).tolist() == [[False, True, False, False, True, True, True, True]]
    assert select(excess, batch, 0.5).tolist() == [[False, True, False, False, True, True, True, False]]
    assert select(excess, batch, 1.0).tolist() == [[True, True, False, True, True, True, True, True]]


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("keep", [0.28, 0.6])
def test_against_the_definition(tiny_model, documents, keep):
    model, reference = tiny_model(0), tiny_model(1)
    objective = selective(model, reference, keep, documents)
    batch = a_batch(objective)
    loss, count, metrics = objective.loss(model, batch)
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = logits_of(model, batch, True, documents)
    own = -logits.log_softmax(-1).gather(-1, batch.labels.clamp(min=0).long()[..., None])[..., 0]
    theirs = -logits_of(reference, batch, True, documents).log_softmax(-1).gather(
        -1, batch.labels.clamp(min=0).long()[..., None])[..., 0]
    kept, others = [], []
    for row in range(3):
        for start in batch.doc_start[row].unique().tolist():
            targets = [t for t in range(21) if batch.doc_start[row, t] == start and batch.labels[row, t] != IGNORE]
            targets.sort(key=lambda t: (theirs[row, t] - own[row, t]).item())
            n = math.ceil(round(keep * len(targets), 6))
            kept += [own[row, t] for t in targets[:n]]
            others += [own[row, t] for t in targets[n:]]
    total = torch.stack(kept).sum()
    total.backward()
    own = own.detach()
    assert count == len(kept) == objective.count(batch)
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-4)
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert all(p.grad is None for p in reference.parameters())
    measured = {name: [float(x) for x in pair] for name, pair in metrics["measures"].items()}
    n = len(kept) + len(others)
    targets = batch.labels != IGNORE
    assert measured == {
        "kept_share": [len(kept), n], "loss_of_kept": pytest.approx([total.item(), len(kept)], rel=1e-4),
        "loss_of_others": pytest.approx([torch.stack(others).sum().item(), len(others)], rel=1e-4),
        "reference_loss": pytest.approx([theirs[targets].sum().item(), n], rel=1e-4)}
    assert tuple(measured) == objective.measures
    assert float(metrics["sequence_loss"].sum()) == pytest.approx(total.item(), rel=1e-4)
    assert int(metrics["sequence_targets"].sum()) == len(kept)


def test_neither_neighbours_nor_micro_batches_change_what_is_kept(tiny_model):
    model, reference = tiny_model(0), tiny_model(1)
    objective = selective(model, reference)
    batch = a_batch(objective)
    whole = objective.loss(model, batch)[2]["token_loss"]
    parts = [objective.loss(model, take_sequences(batch, slice(i, i + 1)))[2]["token_loss"] for i in range(3)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert sum(objective.count(take_sequences(batch, slice(i, i + 1))) for i in range(3)) == objective.count(batch)
    # The second document of the first sequence, alone.
    alone = batch_of(TOKENS[:1, 9:])
    alone = objective.corrupt(alone, alone.rng)
    torch.testing.assert_close(objective.loss(model, alone)[2]["token_loss"], whole[:1, 9:])


def test_all_kept_is_causal_bit_for_bit(tiny_model):
    made = []
    for objective in (selective(tiny_model(0), tiny_model(1), keep=1.0), Causal(True)):
        model = tiny_model(0)
        batch = a_batch(objective)
        loss, count, metrics = objective.loss(model, batch)
        loss.backward()
        made.append((loss, count, metrics["token_loss"], *(p.grad for p in model.parameters())))
    assert all(map(torch.equal, *made))


@pytest.mark.usefixtures("quick")
def test_a_run_that_keeps_all_is_the_causal_run_bit_for_bit(base, whole, tmp_path):
    (lab, final), plain, out = base, whole[0], tmp_path / "run"
    train.train(settings(lab, out, "--objective.name", "selective", "--objective.keep", 1, "--objective.reference",
                         final), one())
    assert trace(out) == trace(plain)
    theirs, mine = (checkpoint.load(checkpoint.path_of(folder / "checkpoints", 8)) for folder in (plain, out))
    for a, b in zip(mine[:2], theirs[:2]):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    before, after = (json.loads((folder / "eval.json").read_text())["after"] for folder in (plain, out))
    assert after == before


@pytest.mark.usefixtures("quick")
def test_a_run_with_a_reference_is_resumed_bit_for_bit(base, tmp_path, monkeypatch):
    lab, final = base
    words = ("--objective.name", "selective", "--objective.reference", final, "--train.save-every", 3)
    train.train(settings(lab, tmp_path / "whole", *words, steps=5), one())
    crash_at(monkeypatch, settings(lab, tmp_path / "run", *words, steps=5), 4)
    train.train(settings(lab, tmp_path / "run", *words, steps=5), one())
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")
    # The reference counts by what it is, and not by where it stands.
    copy = shutil.copytree(final, tmp_path / "copy")
    known = [identity(build(settings(lab, tmp_path / "whole", *words[:2], "--objective.reference", path, steps=5),
                            one()), 3)["objective"] for path in (final, copy)]
    assert known[0] == known[1]
    assert known[0]["reference"] == hf.open_base(final).fingerprint
    measured = [line["objective"] for line in lines(tmp_path / "whole", "train")]
    # Documents of a few targets keep more than their share.
    assert all(0.6 <= m["kept_share"] < 0.7 for m in measured)
    # A fresh model has most to learn where the reference knows most.
    assert measured[0]["loss_of_kept"] > measured[0]["reference_loss"]
    scored = json.loads((tmp_path / "whole/eval.json").read_text())
    assert scored["objective"]["name"] == "selective"
    assert scored["objective"]["after"]["legal"].keys() == {"loss", "sequences", *Selective.measures}
    assert "bits_per_byte" in scored["after"]["legal"]
    # The reference is no part of what the run keeps.
    assert hf.load(tmp_path / "whole/final").count_parameters() == hf.load(final).count_parameters()


@pytest.mark.usefixtures("quick")
def test_a_reference_with_another_tokenizer_of_the_same_size_is_refused(base, tmp_path):
    lab, final = base
    other = shutil.copytree(final, tmp_path / "other")
    made = tokenizers.train([text[::-1] for text in texts("story")], "bpe", 300, tmp_path / "tok")
    for file in other.glob("tokenizer*"):
        file.unlink()
    shutil.copytree(tmp_path / "tok", other, dirs_exist_ok=True)
    assert made.vocab_size == tokenizers.load(final).vocab_size
    words = ("--objective.name", "selective", "--objective.reference")
    with pytest.raises(UserError, match="has another tokenizer than the model"):
        build(settings(lab, tmp_path / "run", *words, other), one())
    # Without one, as with the same, there is nothing to refuse.
    for file in other.glob("tokenizer*"):
        file.unlink()
    build(settings(lab, tmp_path / "run", *words, other), one())


@pytest.mark.parametrize("name", ["selective", "dpo", "ipo"])
def test_a_random_model_is_no_reference(tmp_path, name):
    """Found before anything is read, as no folder here exists."""
    words = ("--objective.name", name)
    with pytest.raises(UserError, match=r"model\.init scratch has none"):
        refuse_combinations(settings(tmp_path, tmp_path / "run", *words), 1)
    pretrained = ("--model.init", "pretrained", "--model.path", "base")
    for more in (("--objective.reference", "judge"), pretrained):
        refuse_objective(settings(tmp_path, tmp_path / "run", *words, *more), 1)


@pytest.mark.usefixtures("quick")
def test_two_teachers_are_refused_in_one_line(lab, tmp_path, monkeypatch, capsys):
    words = arguments(lab, tmp_path / "run", "--objective.name", "selective", "--forget.lwf.alpha", 0.5)
    status, _, said = command(monkeypatch, capsys, words)
    assert status == 2
    assert "forget.lwf" in said
    assert "objective selective" in said
