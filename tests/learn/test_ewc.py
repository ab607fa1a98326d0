"""Truths: a Fisher worked out by hand and one by torch.func; a penalty that autograd differentiates in float64."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from retention import Batch, UnreadText, bits, cross_entropy, learning, methods, some_batch, toy
from torch import nn

from core import checkpoint
from learn import ewc as ewc_module
from learn.ewc import EWCConfig, draw_labels, draw_uniform, estimate_fisher
from learn.method import take_sequences


class Bigram(nn.Module):
    """Two tokens, one hidden number: x of token 0 is 2, of token 1 is 3; logits w x."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding.from_pretrained(torch.tensor([[2.0], [3.0]]), freeze=True)
        self.head = nn.Linear(1, 2, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens):
        return self.embed_tokens(tokens)


def test_ewc_by_hand():
    """With w = 0 both tokens have probability 1/2, so a target y at x gives d loss / d w = x (1/2 - [v = y]).

    Sequence A: x 2, 2 with targets 0, 0: d/dw0 = -1 - 1 = -2, d/dw1 = 2, squares 4, 4.
    Sequence B: x 3, 2, 2 with targets 0, 1 and none: d/dw0 = -1.5 + 1 = -0.5, d/dw1 = 0.5, squares 0.25, 0.25.
    Four targets: F = (4 + 0.25) / 4 = 1.0625 for both. Moved by 0.1 and -0.2 with lambda 0.4 the penalty is
    0.4 * 1.0625 * (0.01 + 0.04) = 0.02125 and its gradient 2 * 0.4 * 1.0625 * (0.1, -0.2) = (0.085, -0.17).
    """
    batches = [Batch(torch.tensor([[0, 0, 1], [1, 0, 0]]), torch.tensor([[0, 0, -100], [0, 1, -100]]), np.zeros(2))]
    model = Bigram()
    ewc, = methods(built=model, ewc=EWCConfig(0.4), general_text=batches)
    torch.testing.assert_close(ewc.fisher["head.weight"], torch.tensor([[1.0625], [1.0625]]))
    with torch.no_grad():
        model.head.weight += torch.tensor([[0.1], [-0.2]])
    model.head.weight.grad = torch.tensor([[1.0], [1.0]])
    assert ewc.before_step(0, model) == {"ewc_penalty": pytest.approx(0.02125)}
    torch.testing.assert_close(model.head.weight.grad, torch.tensor([[1.085], [0.83]]))


def fisher_by_func(model, batch) -> dict:
    """Per-sample gradients by torch.func, squared, summed and divided by the number of targets."""
    def loss(parameters, tokens, labels):
        logits = torch.func.functional_call(model, parameters, (tokens[None],))[0] @ parameters["head.weight"].T
        each = -torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        return (each * (labels != -100)).sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(dict(model.named_parameters()), batch.tokens,
                                                                batch.labels)
    return {name: g.square().sum(0) / (batch.labels != -100).sum() for name, g in each.items()}


@pytest.mark.parametrize("true", [False, True])
def test_fisher_is_that_of_per_sample_gradients(monkeypatch, true):
    model, batch, drawn = toy(blocks=3), some_batch(rows=7), []
    real = draw_labels
    monkeypatch.setattr(ewc_module, "draw_labels", lambda *a: drawn.append(real(*a)) or drawn[-1])
    ours, known = estimate_fisher(model, learning(general_text=[batch], seed=3), 100, true)
    if true:
        labels = torch.cat(drawn)
        assert torch.equal(labels == -100, batch.labels == -100)
        assert (labels != batch.labels).any()
        batch = dataclasses.replace(batch, labels=labels)
        again, _ = estimate_fisher(model, learning(general_text=[some_batch(rows=7)], seed=3), 100, true)
        assert all(torch.equal(ours[name], again[name]) for name in ours)
    theirs = fisher_by_func(model, batch)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-15)
    assert known == {"sequences": 7, "tokens": int((batch.labels != -100).sum())}
    assert all(p.grad is None for p in model.parameters())


def test_fisher_does_not_depend_on_how_text_is_batched_and_takes_what_it_was_asked_for():
    model, batch = toy(blocks=3), some_batch(rows=6)
    cut = [take_sequences(batch, slice(0, 1)), take_sequences(batch, slice(1, 6))]
    whole, _ = estimate_fisher(model, learning(general_text=[batch]), 6)
    parts, _ = estimate_fisher(model, learning(general_text=cut), 6)
    twice, known = estimate_fisher(model, learning(general_text=[batch, batch]), 12)
    first, count = estimate_fisher(model, learning(general_text=itertools.repeat(batch)), 2)
    assert (known["sequences"], count["sequences"]) == (12, 2)
    theirs = fisher_by_func(model, take_sequences(batch, slice(0, 2)))
    for name in whole:
        assert torch.equal(whole[name], parts[name])
        torch.testing.assert_close(whole[name], twice[name], rtol=1e-12, atol=0)
        torch.testing.assert_close(first[name], theirs[name], rtol=1e-9, atol=1e-15)
    nothing = dataclasses.replace(batch, labels=torch.full_like(batch.labels, -100))
    with pytest.raises(ValueError, match="l2sp"):
        estimate_fisher(model, learning(general_text=[nothing]), 6)


def test_the_true_fisher_per_token_is_the_same_for_long_and_short_sequences():
    """E[(sum of scores)^2] = sum of E[score^2]: for the head of one hidden number, x^2 p (1 - p) a token."""
    model = Bigram()
    with torch.no_grad():
        model.head.weight[0] = 0.4
    p = torch.sigmoid(0.4 * torch.tensor([2.0, 3.0]))
    exact = (torch.tensor([4.0, 9.0]) * p * (1 - p)).mean().item()
    for rows, length in ((200, 2), (80, 12)):
        tokens = torch.arange(rows * length).view(rows, length) % 2
        batch = Batch(tokens, torch.zeros_like(tokens), np.zeros(rows))
        found, _ = estimate_fisher(model, learning(general_text=[batch]), rows, true=True)
        # a squared sum of scores has a deviation of 1.4 of its mean, so 80 of them leave an error of 16 %
        assert found["head.weight"].flatten().tolist() == pytest.approx([exact] * 2, rel=0.4), length


def test_labels_are_drawn_from_the_model():
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 1, 3).expand(1, 20000, 3), torch.randn(7, 3)
    labels = torch.zeros(1, 20000, dtype=torch.int64)
    drawn = draw_labels(hidden, weight, labels, draw_uniform(labels, 1, 0))
    wanted = torch.softmax(hidden[0, 0] @ weight.T, -1) * 20000
    chi2 = ((torch.bincount(drawn[0], minlength=7) - wanted).square() / wanted).sum().item()
    assert chi2 < 22.5, "6 degrees of freedom: 0.1 % of fair draws are above"


@pytest.mark.parametrize("kind", ["empirical", "true", "l2sp"])
def test_penalty_and_gradient_are_autograds(kind):
    model, batch = toy(blocks=3), some_batch(5)
    ewc, = methods(built=model, ewc=EWCConfig(0.3, kind))
    base = bits(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    model.norm.bias.requires_grad_(False)                    # frozen since: it stays where it is
    truth = copy.deepcopy(model)
    known = ewc.fisher or {name: torch.ones_like(p) for name, p in base.items()}
    penalty = 0.3 * sum((known[n] * (p - base[n]).square()).sum() for n, p in truth.named_parameters())
    (cross_entropy(truth, batch) + penalty).backward()
    cross_entropy(model, batch).backward()
    assert ewc.before_step(0, model)["ewc_penalty"] == pytest.approx(penalty.item(), rel=1e-12)
    for (name, p), q in zip(model.named_parameters(), truth.parameters()):
        if name == "norm.bias":
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)


def test_bf16_weights_are_pulled_in_fp32():
    model = toy(blocks=1, dtype=torch.bfloat16)
    ewc, = methods(built=model, ewc=EWCConfig(0.5, "l2sp"))
    with torch.no_grad():
        model.head.weight += 1
    moved = model.head.weight.detach().float() - ewc.anchor["head.weight"].float()
    model.head.weight.grad = torch.zeros_like(model.head.weight)
    assert ewc.before_step(0, model)["ewc_penalty"] == pytest.approx(0.5 * moved.square().sum().item(), rel=1e-6)
    assert torch.equal(model.head.weight.grad, moved.bfloat16())


def test_the_fisher_is_kept_with_the_run_and_only_for_what_it_was_made_of(tmp_path):
    def build(fingerprint="base a, text b", settings=None, **more):
        model = toy(dtype=torch.float32)
        model.embed_tokens.requires_grad_(more.pop("embeddings", True))
        made, = methods(built=model, ewc=EWCConfig(0.1, **(settings or {})), folder=tmp_path,
                        fingerprint=fingerprint, **more)
        return made

    first, again = build(), build(general_text=UnreadText())
    assert all(torch.equal(again.fisher[name], value) for name, value in first.fisher.items())
    (stored,) = tmp_path.iterdir()
    shapes = {name: shape for name, (shape, _) in checkpoint.Stored(stored).known.items()}
    assert shapes == {name: value.shape for name, value in first.fisher.items()}
    assert "4 of 1,000 sequences" in again.notes[0]
    for other in ({"fingerprint": "base a, text c"}, {"settings": {"samples": 2}}, {"settings": {"fisher": "true"}},
                  {"seed": 1}, {"embeddings": False}):
        with pytest.raises(AssertionError, match="stored"):
            build(general_text=UnreadText(), **other)
    build("base a, text c")
    assert [folder.name.rpartition("_")[0] for folder in tmp_path.iterdir()] == ["fisher"] * 2, "one for each text"


@pytest.mark.parametrize("damage", ["flip", "lose", "cut", "add"])
def test_a_damaged_fisher_is_not_used_but_estimated_again(tmp_path, damage):
    def build(**more):
        made, = methods(built=toy(dtype=torch.float32), ewc=EWCConfig(0.1), folder=tmp_path, fingerprint="a", **more)
        return made

    first = build()
    folder, = tmp_path.iterdir()
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes({"flip": content, "cut": content[:-1]}.get(damage, file.read_bytes()))
    if damage == "lose":
        file.unlink()
    elif damage == "add":
        (folder / "more.safetensors").write_bytes(content)
    with pytest.raises(AssertionError, match="stored"):
        build(general_text=UnreadText())
    again = build()
    assert all(torch.equal(again.fisher[name], value) for name, value in first.fisher.items())
    checkpoint.verify(folder)


def test_ewc_with_nothing_to_hold_down():
    with pytest.raises(ValueError, match="none does"):
        methods(built=toy().requires_grad_(False), ewc=EWCConfig(0.1))
