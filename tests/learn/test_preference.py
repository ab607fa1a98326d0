"""Truth: DPO's, IPO's and ORPO's formulas as their papers write them, on full logits of each answer alone, in float64.
Laws: a reference is the same with the adapters off, as a copy and from the file; packing, micro-batches and ranks do
not change a step; a resumed run is the same in every bit."""

import contextlib
import math

import numpy as np
import pytest
import torch

from data import Batch
from learn.preference import DPO, IPO, ORPO, Preference
from text.packing import Sequences

IGNORE = -100
KINDS = {"dpo": DPO, "ipo": IPO, "orpo": ORPO}


# ---- batches and pairs by hand

def draw_pairs(n: int, seed: int = 0, prompt: int = 3) -> list[list]:
    """n pairs [(tokens, labels) of the chosen, of the rejected]: a prompt that both share, and answers."""
    rng, pairs = np.random.default_rng(seed), []
    for _ in range(n):
        asked = rng.integers(0, 97, prompt)
        pairs.append([(np.concatenate([asked, answer]), np.concatenate([np.full(prompt, IGNORE), answer]))
                      for answer in (rng.integers(0, 97, rng.integers(1, 9)) for _ in range(2))])
    return pairs


def batch_of(rows: list[list], T: int = 40) -> Batch:
    """A batch [B, T + 1] whose sequences hold these pairs."""
    sequences = Sequences(len(rows), T + 1)
    for row, pairs in enumerate(rows):
        for document in (document for pair in pairs for document in pair):
            sequences.append(row, *document)
    return Batch(**sequences.finish(), source=np.zeros(len(rows), np.int64), place=np.arange(len(rows)))


def corrupted(objective, rows, T: int = 40) -> Batch:
    return objective.corrupt(batch_of(rows, T), None)


def answer_of(model, tokens, labels) -> tuple[torch.Tensor, int]:
    """(log-probability of an answer, its tokens), from all logits of its document alone."""
    tokens, labels = torch.as_tensor(tokens)[None], torch.as_tensor(labels)
    log_p = torch.log_softmax(model.head(model(tokens[:, :-1].int())), -1)[0]
    kept = labels[1:] != IGNORE
    return log_p[kept].gather(1, labels[1:][kept][:, None]).sum(), int(kept.sum())


def truth(name: str, beta: float, model, reference, pairs) -> torch.Tensor:
    """The sum of the papers' losses: DPO eq. 7, IPO eq. 17 with mean log-probabilities, ORPO eq. 6 and 7."""
    total = 0
    for pair in pairs:
        (c, n), (r, m) = (answer_of(model, *document) for document in pair)
        with torch.no_grad():
            c0, r0 = (answer_of(reference, *document)[0] for document in pair)
        if name == "dpo":
            ratio = (c - c0) - (r - r0)
            total = total - torch.log(1 / (1 + torch.exp(-beta * ratio)))
        elif name == "ipo":
            total = total + ((c - c0) / n - (r - r0) / m - 1 / (2 * beta)) ** 2
        else:
            p, q = torch.exp(c / n), torch.exp(r / m)
            ratio = torch.log((p / (1 - p)) / (q / (1 - q)))
            total = total - torch.log(p) - beta * torch.log(1 / (1 + torch.exp(-ratio)))
    return total


def with_reference(objective: Preference, reference) -> Preference:
    objective.reference = lambda model: contextlib.nullcontext(reference)
    return objective


def gradients(model) -> dict:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


# ---- losses

@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_are_the_papers(tiny_model, name, beta):
    model, reference, pairs = tiny_model(1).double(), tiny_model(2).double(), draw_pairs(5)
    objective = with_reference(KINDS[name](beta), reference)
    batch = corrupted(objective, [pairs[:2], pairs[2:4], pairs[4:]])
    loss, count, metrics = objective.loss(model, batch)
    loss.backward()
    ours, wanted = gradients(model), truth(name, beta, model, reference, pairs)
    wanted.backward()
    assert count == objective.count(batch) == 5
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)
    assert metrics["sequence_loss"].sum().item() == pytest.approx(loss.item(), rel=1e-9)
    assert metrics["sequence_targets"].tolist() == [2, 2, 1]
    theirs = gradients(model)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-7, atol=1e-10, msg=key)
    with torch.no_grad():
        assert objective.loss(model, batch)[0].item() == loss.item()
    assert not any(p.grad is not None for p in reference.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_measures_by_hand(tiny_model, name):
    """Over two pairs: rewards, which answer is above, log-probabilities and how they changed."""
    model, reference, pairs = tiny_model(1).double(), tiny_model(2).double(), draw_pairs(2, seed=3)
    objective = with_reference(KINDS[name](0.2), reference)
    measures = objective.loss(model, corrupted(objective, [pairs]))[2]["measures"]
    assert measures.keys() == set(objective.measures)
    got = {key: (total / number).item() for key, (total, number) in measures.items()}
    rows = []
    for pair in pairs:
        (c, n), (r, m) = (answer_of(model, *document) for document in pair)
        (c0, _), (r0, _) = (answer_of(reference, *document) for document in pair)
        if name != "dpo":
            c, r, c0, r0 = c / n, r / m, c0 / n, r0 / m
        c, r, c0, r0 = (value.item() for value in (c, r, c0, r0))
        if name == "orpo":
            margin = math.log(math.exp(c) / (1 - math.exp(c))) - math.log(math.exp(r) / (1 - math.exp(r)))
            more = {"chosen_loss": -c}
        else:
            margin = 0.2 * ((c - c0) - (r - r0))
            more = {"chosen_change": c - c0, "rejected_change": r - r0}
        rows.append({"margin": margin, "accuracy": float(margin > 0), "chosen_logp": c, "rejected_logp": r, **more})
    assert got == pytest.approx({key: sum(row[key] for row in rows) / 2 for key in rows[0]}, rel=1e-9)


def test_before_the_first_step_nothing_is_preferred(tiny_model):
    model, objective = tiny_model(1), DPO(0.1)
    with_reference(objective, model)
    loss, _count, metrics = objective.loss(model, corrupted(objective, [draw_pairs(3)]))
    assert loss.item() == pytest.approx(3 * math.log(2), rel=1e-6)
    assert {name: (total / number).item() for name, (total, number) in metrics["measures"].items()} | {
        "chosen_logp": 0, "rejected_logp": 0} == {"margin": 0, "accuracy": 0.5, "chosen_logp": 0, "rejected_logp": 0,
                                                  "chosen_change": 0, "rejected_change": 0}


@pytest.mark.parametrize("name", KINDS)
def test_packing_and_micro_batches_do_not_change_a_loss(tiny_model, name):
    """The law of accumulation: the pairs of a step in other sequences, in other batches, between other neighbours."""
    model, pairs = tiny_model(1).double(), draw_pairs(6)
    objective, found = with_reference(KINDS[name](0.3), tiny_model(2).double()), []
    for batches in ([[pairs]], [[pairs[:3]], [pairs[3:]]], [[pairs[4:5], pairs[:1]], [pairs[1:4], pairs[5:]]]):
        made = [corrupted(objective, rows, T) for rows, T in zip(batches, (150, 97))]
        for batch in made:
            (objective.loss(model, batch)[0] / sum(map(objective.count, made))).backward()
        found.append(gradients(model))
    for other in found[1:]:
        for key, gradient in found[0].items():
            torch.testing.assert_close(other[key], gradient, rtol=1e-8, atol=1e-11, msg=key)


def test_an_answer_that_is_certain_has_a_finite_loss():
    policy = torch.zeros(1, 1, 2, dtype=torch.float64, requires_grad=True)
    losses, _ = ORPO(0.5).pair_loss(policy, None)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert policy.grad.isfinite().all()


def test_no_logits_of_the_sequence_exist(tiny_model, monkeypatch):
    monkeypatch.setattr("kernels.cross_entropy.CHUNK_BYTES", 97 * 4 * 8)
    model, objective = tiny_model(1), DPO(0.1)
    with_reference(objective, tiny_model(2))
    batch, largest = corrupted(objective, [draw_pairs(8)] * 4, 200), 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (97,):
                largest = max(largest, out.numel() // 97)
            return out
    with Watch():
        objective.loss(model, batch)[0].backward()
    assert largest <= 97
