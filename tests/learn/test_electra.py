"""learn/electra.py. Truth: the paper's two losses written out over torch's logits (arXiv 2003.10555, section 2), and
where its gradients may go; the shares of a categorical distribution. Laws: what is masked and sampled is a function of
a sequence's place; micro-batches add up.
"""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import batch_of, random_tokens
from runs import arguments, command, crash_at, lines, one, same_checkpoint, settings, trace

import eval as evaluation
import hf
import train
from core import checkpoint
from core.errors import UserError
from data import RowRandom
from learn.electra import Electra, sample
from learn.method import take_sequences
from learn.objectives import IGNORE, Causal
from stages.refuse import refuse_combinations

SPECIAL, MASK = (0, 1, 2), 3
WORDS = ("--objective.name", "electra", "--objective.mask-token-id", 0)


def electra(model, documents=True, ratio=0.3, **options) -> Electra:
    made = Electra(documents, MASK, SPECIAL, 97, ratio, **{"generator_ratio": 0.5, "weight": 50.0, **options})
    made.model_built(model, SimpleNamespace(adapters=False, sharded=False, seed=1))
    with torch.no_grad():
        # So that what the generator writes depends on what it reads.
        for p in model.objective.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return made


def a_batch(objective, rows=4):
    batch = batch_of(random_tokens(rows, 33), [(0, 7), (2, 20)], [(1, 11)])
    return batch, objective.corrupt(batch, batch.rng)


def grads(model) -> dict:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_what_is_masked_and_what_is_judged(tiny_model):
    objective = electra(tiny_model())
    batch, made = a_batch(objective)
    before = batch.tokens[:, :32]
    judged = (before > MASK) & (batch.labels[:, :32] != IGNORE)
    assert torch.equal(made.labels, torch.where(judged, before, IGNORE))
    masked = made.tokens == MASK
    assert torch.equal(made.tokens[~masked], before[~masked])
    chosen = masked & judged
    assert not (masked & ~chosen & (before != MASK)).any()
    assert 0.2 < chosen.sum() / judged.sum() < 0.4
    assert objective.count(made) == judged.sum()


def test_the_loss_of_the_paper_and_where_its_gradients_go(tiny_model):
    model = tiny_model()
    objective = electra(model)
    _, batch = a_batch(objective)
    loss, count, metrics = objective.loss(model, batch)
    loss.backward()
    got = grads(model)
    model.zero_grad()

    # The generator, written out: its projected embeddings, its trunk, the model's embeddings as its head.
    generator, head = model.objective.generator, model.objective.head
    judged = batch.labels != IGNORE
    masked = judged & (batch.tokens == MASK)
    states = generator.trunk(batch.tokens, batch.position_ids, batch.doc_start, False)
    logits = states @ generator.trunk.head.weight.T @ model.embed_tokens.weight.T
    of_generator = F.cross_entropy(logits[masked], batch.labels[masked].long(), reduction="sum")
    # What it writes: the first token whose cumulative probability is above the position's random value.
    uniform = batch.rng.uniform(3, 32)
    written = batch.tokens.clone()
    for row, t in masked.nonzero().tolist():
        below = logits[row, t].detach().double().softmax(-1).cumsum(-1)
        written[row, t] = int((below <= float(uniform[row, t])).sum())
    target = (written != batch.labels)[judged].float()
    said = head(model(written, batch.position_ids, batch.doc_start, False))[..., 0][judged]
    of_model = F.binary_cross_entropy_with_logits(said, target, reduction="sum")
    torch.testing.assert_close(loss, of_generator / 0.3 + 50 * of_model, rtol=1e-5, atol=1e-3)
    assert count == judged.sum()
    assert 0 < target.sum() < masked.sum()                  # some of what is written is the original, and counts as it
    share = ((said > 0) == (target > 0)).float()
    hits = (logits.argmax(-1) == batch.labels)[masked].sum()
    both, positive = ((said > 0) & (target > 0)).sum(), (said > 0).sum()
    expected = {"generator_loss": (of_generator, masked.sum()), "generator_accuracy": (hits, masked.sum()),
                "discriminator_loss": (of_model, count), "discriminator_accuracy": (share.sum(), count),
                "replaced_share": (target.sum(), count), "precision": (both, positive), "recall": (both, target.sum())}
    assert tuple(expected) == objective.measures
    for name, pair in expected.items():
        assert [float(x) for x in metrics["measures"][name]] == pytest.approx([x.item() for x in pair], rel=1e-4), name
    assert metrics["sequence_loss"].sum().item() == pytest.approx(loss.item(), rel=1e-5)

    # The generator's parameters hear of its own loss alone, the model's of the discriminator's, the embeddings of both.
    (of_generator / 0.3).backward()
    own = grads(model)
    model.zero_grad()
    (50 * of_model).backward()
    others = grads(model)
    assert all(name.startswith("objective.generator.") or name == "embed_tokens.weight" for name in own)
    assert not any(name.startswith("objective.generator.") for name in others)
    assert own.keys() & others.keys() == {"embed_tokens.weight"}
    assert got.keys() == own.keys() | others.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in got.items():
        both = sum(part[name] for part in (own, others) if name in part)
        torch.testing.assert_close(gradient, both, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
        assert gradient.abs().max() > 0, name


def test_an_untied_head_does_not_train(tiny_model):
    model = tiny_model(tie_word_embeddings=False)
    objective = electra(model)
    objective.loss(model, a_batch(objective)[1])[0].backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"head.weight"}
    assert not model.head.weight.requires_grad


@pytest.mark.parametrize(("words", "told"), [(("--parallel.strategy", "fsdp"), r"--parallel\.strategy ddp"),
                                             (("--lora.rank", 2), r"leave out lora\.rank")])
def test_what_cannot_train_two_models_is_refused_before_anything_is_read(tmp_path, words, told):
    c = settings(tmp_path, tmp_path / "run", *WORDS, "--model.init", "pretrained", "--model.path", tmp_path, *words)
    with pytest.raises(UserError, match=told):
        refuse_combinations(c, ranks=2)


def test_a_plain_model_is_refused_in_one_line(tiny_model):
    objective = electra(tiny_model())
    _, batch = a_batch(objective)
    for each in (objective, objective.text_objective):
        with pytest.raises(UserError, match="and no model folder"):
            each.loss(tiny_model(), batch)


def test_samples_are_those_of_the_softmax():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -30.0])
    n = 200_000
    uniform = RowRandom(np.array([7], np.uint64)).uniform(3, n)[0]
    drawn = sample(logits.expand(n, 5), torch.eye(5), uniform)
    share, wanted = torch.bincount(drawn, minlength=5) / n, logits.softmax(-1)
    assert ((share - wanted).abs() < 5 * (wanted * (1 - wanted) / n).sqrt() + 1e-9).all()
    assert torch.equal(sample(logits.expand(7, 5), torch.eye(5), uniform[:7]), drawn[:7])
    assert sample(logits.expand(1, 5), torch.eye(5), torch.tensor([1 - 2**-24])).tolist() == [3]
    # What has no probability is not drawn, even by the value 0.
    assert sample(torch.tensor([[-300.0, 0.0]]), torch.eye(2), torch.tensor([0.0])).tolist() == [1]
    assert sample(logits.new_empty(0, 5), torch.eye(5), uniform[:0]).tolist() == []


def test_micro_batches_add_up_and_places_decide(tiny_model):
    model = tiny_model()
    objective = electra(model)
    batch, made = a_batch(objective)
    loss, count, _ = objective.loss(model, made)
    parts = []
    for i in range(4):
        part = take_sequences(batch, slice(i, i + 1))
        parts.append(objective.loss(model, objective.corrupt(part, RowRandom(batch.rng.keys[i:i + 1])))[:2])
    assert sum(n for _, n in parts) == count
    torch.testing.assert_close(sum(nats for nats, _ in parts), loss, rtol=1e-5, atol=1e-3)
    other = objective.corrupt(batch, RowRandom(batch.rng.keys + np.uint64(1)))
    assert not torch.equal(other.tokens, made.tokens)


def test_documents_do_not_see_each_other_in_either_model(tiny_model):
    model = tiny_model()
    objective = electra(model, documents=False).part_documents()
    tokens = random_tokens(1, 33)
    other = tokens.clone()
    other[0, :9] = (other[0, :9] + 1) % 97
    losses = []
    for row in (tokens, other):
        batch = batch_of(row, [(0, 9)])
        made = objective.corrupt(batch, batch.rng)
        losses.append(objective.loss(model, made)[2]["token_loss"][0, 9:])
    assert torch.equal(*losses)
    assert losses[0].max() > 0


@pytest.mark.usefixtures("quick")
def test_a_run_is_resumed_bit_for_bit_and_leaves_a_plain_model(base, tmp_path, monkeypatch, capsys):
    lab, final = base
    words = (*WORDS, "--model.init", "pretrained", "--model.path", final, "--train.save-every", 3,
             "--forget.ema.decay", 0.5)
    train.train(settings(lab, tmp_path / "whole", *words, steps=5), one())
    crash_at(monkeypatch, settings(lab, tmp_path / "run", *words, steps=5), 4)
    train.train(settings(lab, tmp_path / "run", *words, steps=5), one())
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")
    same_checkpoint(tmp_path / "run", tmp_path / "whole", 5)
    measured = [line["objective"] for line in lines(tmp_path / "whole", "train")]
    # A head of small weights knows nothing: ln 2.
    assert measured[0]["discriminator_loss"] == pytest.approx(math.log(2), abs=0.05)
    assert measured[-1]["discriminator_loss"] < 0.6
    result = json.loads((tmp_path / "whole/eval.json").read_text())
    assert result["objective"]["after"]["legal"].keys() - {"precision", "recall"} == {
        "loss", "sequences", *Electra.measures} - {"precision", "recall"}
    assert result["model"]["after"] == "weights in training"
    assert "accuracy" in result["after"]["legal"]
    trained = checkpoint.load(checkpoint.path_of(tmp_path / "whole/checkpoints", 5))[0]
    assert any(name.startswith(hf.OF_OBJECTIVE) for name in trained)
    card = (tmp_path / "whole/final/README.md").read_text()
    assert "pipeline_tag" not in card
    assert "objective electra: each token sees those before and after it, and token id 0 stands" in card
    monkeypatch.setattr(sys, "argv", ["eval.py", "--run", str(tmp_path / "whole"), "--text", f"law={lab}/legal"])
    assert evaluation.main() == 2
    assert "objective electra, whose model predicts no tokens" in capsys.readouterr().err
    plain = hf.load(tmp_path / "whole/final")
    assert plain.state_dict().keys() == hf.load(final).state_dict().keys()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("words", "told"), [
    (("--lora.rank", 2), "leave out lora.rank"), (("--forget.ewc.strength", 1), "forget.ewc"),
    (("--forget.lwf.alpha", 0.5), "forget.lwf"), (("--objective.mask-token-id", 999), "outside the vocabulary")])
def test_what_does_not_go_with_it_is_one_line(base, tmp_path, monkeypatch, capsys, words, told):
    lab, final = base
    status, _, said = command(monkeypatch, capsys, arguments(
        lab, tmp_path / "run", *WORDS, "--model.init", "pretrained", "--model.path", final, *words))
    assert status == 2
    assert told in said.splitlines()[-1]


def test_its_loss_is_no_likelihood_of_which_there_is_a_perplexity():
    """It adds the nats of a masked token to those of a guess whether a token was replaced."""
    assert Causal.is_likelihood
    assert not Electra.is_likelihood
