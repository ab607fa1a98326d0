"""Truth: a shift written by hand, torch's cross_entropy on the logits, BERT's 15 % and 80/10/10 (arXiv 1810.04805,
appendix A.1) within five standard deviations of the binomial. Laws: the loss and its gradient see no target that is
-100; the masks of a row depend on (seed, step, row) alone.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import batch_of, logits_of, random_tokens

from learn.choose_objective import ObjectiveConfig, make_objective
from learn.objectives import IGNORE, Causal, Masked, sum_step

SPECIAL = (0, 1, 2)
MASK = 3


# ---- causal

def test_the_shift_by_hand():
    batch = batch_of([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 0, 0]], [(0, 2), (0, 5), (1, 1)], [(1, 4)])
    inputs = [[10, 11, 12, 13, 14], [20, 21, 22, 23, 0]]
    inside = Causal(mask_documents=True).corrupt(batch, batch.rng)
    assert inside.tokens.tolist() == inputs
    assert inside.labels.tolist() == [[11, -100, 13, 14, -100], [-100, 22, 23, -100, -100]]
    across = Causal(mask_documents=False).corrupt(batch, batch.rng)
    assert across.tokens.tolist() == inputs
    assert across.labels.tolist() == [[11, 12, 13, 14, 15], [21, 22, 23, -100, -100]]
    for made in (inside, across):
        assert made.position_ids.tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 0]]
        assert made.doc_start.tolist() == [[0, 0, 2, 2, 2], [0, 1, 1, 1, 4]]
        assert made.labels.dtype == made.tokens.dtype == torch.int32
    assert batch.labels[0].tolist() == [10, 11, 12, 13, 14, 15]      # what came in is left alone


@pytest.mark.parametrize("documents", [True, False])
def test_causal_loss_against_torch(tiny_model, documents):
    model, objective = tiny_model(), Causal(documents)
    batch = batch_of(random_tokens(3, 20), [(0, 7), (2, 19)], [(1, 11)])
    batch = objective.corrupt(batch, batch.rng)
    loss, valid, metrics = objective.loss(model, batch, want_hits=True)
    loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logits = logits_of(model, batch, True, documents)
    each = F.cross_entropy(logits.transpose(1, 2), batch.labels.long(), reduction="none", ignore_index=IGNORE)
    each.sum().backward()
    torch.testing.assert_close(loss, each.sum(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(metrics["sequence_loss"].detach(), each.sum(1).detach(), rtol=1e-5, atol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    kept = batch.labels != IGNORE
    assert valid == kept.sum() == (57 - 9 - 2 * documents)           # 9 of padding, and the first of two documents
    assert metrics["sequence_targets"].tolist() == kept.sum(1).tolist()
    assert metrics["hits"] == ((logits.argmax(-1) == batch.labels) & kept).sum()
    assert "hits" not in objective.loss(model, batch)[2]


def test_a_document_does_not_see_its_neighbour(tiny_model):
    model = tiny_model()
    tokens = random_tokens(1, 21)
    other = tokens.clone()
    other[0, :9] = (other[0, :9] + 1) % 97
    for documents in (True, False):
        objective = Causal(documents)
        losses = []
        for row in (tokens, other):
            batch = batch_of(row, [(0, 9)])
            batch = objective.corrupt(batch, batch.rng)
            batch.labels[:, :9] = IGNORE                             # score the second document alone
            losses.append(objective.loss(model, batch)[0].item())
        assert (losses[0] == losses[1]) == documents


# ---- masked

def masked(mask_documents=True, vocab_size=97, **options) -> Masked:
    return Masked(mask_documents, MASK, SPECIAL, vocab_size, **options)


def test_bert_s_shares_over_a_million_tokens():
    T, vocab_size = 1000, 500
    batch = batch_of(random_tokens(1000, T + 1, vocab_size))
    made = masked(vocab_size=vocab_size).corrupt(batch, batch.rng)
    before, chosen = batch.tokens[:, :T], made.labels != IGNORE
    ordinary = before > MASK

    def share(part, whole, wanted):
        n = int(whole.sum())
        assert abs(int(part.sum()) / n - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / n), (wanted, n)
    assert made.tokens.shape == (1000, T)
    assert not (chosen & ~ordinary).any()                            # no special token is chosen ...
    share(chosen, ordinary, 0.15)
    to_mask, same = chosen & (made.tokens == MASK), chosen & (made.tokens == before)
    changed = chosen & ~to_mask & ~same
    share(to_mask, chosen, 0.8)
    share(same, chosen, 0.1 + 0.1 / 496)                             # a random token may be the same by chance
    share(changed, chosen, 0.1 * 495 / 496)
    assert made.tokens[changed].min() > MASK                         # ... and none is put in
    assert torch.equal(made.tokens[~chosen], before[~chosen])
    assert torch.equal(made.labels[chosen], before[chosen])
    drawn = torch.bincount(made.tokens[changed].long(), minlength=vocab_size)[MASK + 1:].double()
    assert abs(drawn / drawn.mean() - 1).max() < 6 / math.sqrt(drawn.mean())         # uniform over 496 ids
    columns = chosen.double().mean(0)                                # every position alike
    assert abs(columns - 0.15 * 496 / 500).max() < 5 * math.sqrt(0.15 * 0.85 / 1000)


def test_whole_words_over_a_million_tokens():
    """Ids 4 to 249 begin a word and 250 to 499 go on with one: words of two tokens in the mean, none in two parts."""
    T, V = 1000, 500
    borders = np.arange(V) < 250, np.zeros(V, np.int8)
    batch = batch_of(random_tokens(1000, T + 1, V), [(row, 100 + row % 800) for row in range(1000)])
    made = masked(vocab_size=V, words=borders).corrupt(batch, batch.rng)
    before, chosen = batch.tokens[:, :T], made.labels != IGNORE
    ordinary = before > MASK
    assert not (chosen & ~ordinary).any()
    # Words are chosen, so the share varies more: by the mean of their squared lengths over that of their lengths, 3.
    n = int(ordinary.sum())
    assert abs(int(chosen.sum()) / n - 0.15) < 5 * math.sqrt(0.15 * 0.85 * 3 / n)
    to_mask, same = chosen & (made.tokens == MASK), chosen & (made.tokens == before)
    for part, share in ((to_mask, 0.8), (same, 0.1 + 0.1 / 496)):
        assert abs(int(part.sum()) / int(chosen.sum()) - share) < 5 * math.sqrt(share * (1 - share) / int(chosen.sum()))
    inside = (before[:, 1:] >= 250) & ordinary[:, :-1] & (batch.doc_start[:, 1:T] != torch.arange(1, T))
    assert inside.sum() > 400_000
    assert torch.equal(chosen[:, 1:][inside], chosen[:, :-1][inside])
    # A new document's first token may begin no word by itself, and is chosen apart.
    parted = (batch.doc_start[:, 1:T] == torch.arange(1, T)) & (before[:, 1:] >= 250) & ordinary[:, :-1]
    assert (chosen[:, 1:][parted] != chosen[:, :-1][parted]).any()


def test_the_ratio_can_be_set():
    batch = batch_of(random_tokens(100, 1001, 500))
    for ratio in (0.02, 0.5, 1.0):
        made = masked(vocab_size=500, mask_ratio=ratio).corrupt(batch, batch.rng)
        ordinary = int((batch.tokens[:, :-1] > MASK).sum())
        assert abs(int((made.labels != IGNORE).sum()) / ordinary - ratio) < 0.01


def test_padding_is_never_a_target():
    batch = batch_of(random_tokens(50, 101) + 4, padding=[(row, 60) for row in range(50)])
    made = masked(vocab_size=101, mask_ratio=1.0).corrupt(batch, batch.rng)
    assert (made.labels[:, 60:] == IGNORE).all()
    assert torch.equal(made.tokens[:, 60:], batch.tokens[:, 60:100])
    assert (made.labels[:, :60] != IGNORE).all()


def test_masks_are_a_function_of_seed_step_and_row():
    tokens, objective = random_tokens(12, 65), masked()

    def corrupt(lo=0, hi=12, **where):
        batch = batch_of(tokens[lo:hi], lo=lo, **where)
        return objective.corrupt(batch, batch.rng)
    whole = corrupt()
    for world in (2, 3, 4, 12):
        share = 12 // world
        parts = [corrupt(r * share, (r + 1) * share) for r in range(world)]
        assert torch.equal(torch.cat([p.tokens for p in parts]), whole.tokens)
        assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels)
    for other in (corrupt(seed=1), corrupt(step=1)):
        assert not torch.equal(other.labels, whole.labels)
    same = batch_of(tokens[:1].expand(12, -1))                       # rows with the same text have other masks
    made = objective.corrupt(same, same.rng)
    assert len({tuple(row) for row in made.labels.tolist()}) == 12


@pytest.mark.parametrize("documents", [True, False])
def test_masked_loss_against_torch(tiny_model, documents):
    model, objective = tiny_model(), masked(documents)
    batch = batch_of(random_tokens(4, 41), [(0, 7), (2, 39)])
    batch = objective.corrupt(batch, batch.rng)
    loss, valid, metrics = objective.loss(model, batch, want_hits=True)
    logits = logits_of(model, batch, False, documents)
    kept = batch.labels != IGNORE
    torch.testing.assert_close(loss, F.cross_entropy(logits[kept], batch.labels[kept].long(), reduction="sum"),
                               rtol=1e-5, atol=1e-4)
    assert 0 < valid == kept.sum() < 60
    assert metrics["hits"] == (logits.argmax(-1)[kept] == batch.labels[kept]).sum()


@pytest.mark.parametrize("name", ["causal", "masked"])
def test_the_z_loss_of_the_settings_is_in_training_losses_alone(tiny_model, name):
    model = tiny_model()
    objective = make_objective(ObjectiveConfig(name, mask_token_id=MASK, z_loss=0.3), True, None, 97)
    batch = batch_of(random_tokens(2, 21))
    batch = objective.corrupt(batch, batch.rng)
    kept = batch.labels != IGNORE
    logits = logits_of(model, batch, name == "causal", True)[kept]
    plain = F.cross_entropy(logits, batch.labels[kept].long(), reduction="sum").item()
    penalty = 0.3 * logits.logsumexp(-1).square().sum().item()
    assert objective.loss(model.eval(), batch)[0].item() == pytest.approx(plain, rel=1e-5)
    assert objective.loss(model.train(), batch)[0].item() == pytest.approx(plain + penalty, rel=1e-5)


def test_the_loss_is_on_masked_positions_alone(tiny_model):
    model, objective = tiny_model(), masked()
    batch = batch_of(random_tokens(2, 41))
    made = objective.corrupt(batch, batch.rng)
    loss = objective.loss(model, made)[0].item()
    row, column = (made.labels == IGNORE).nonzero()[5].tolist()
    batch.labels[row, column] = (batch.labels[row, column] + 1) % 97         # another label where nothing is masked
    assert objective.loss(model, objective.corrupt(batch, batch.rng))[0].item() == loss
    row, column = (made.labels != IGNORE).nonzero()[0].tolist()
    batch.labels[row, column] = (batch.labels[row, column] + 1) % 97         # and where something is
    assert objective.loss(model, objective.corrupt(batch, batch.rng))[0].item() != loss


@pytest.mark.parametrize(("objective", "sees"), [(masked(), True), (Causal(True), False)])
def test_who_sees_the_future(tiny_model, objective, sees):
    model = tiny_model()
    losses = []
    for last in (50, 60):
        tokens = random_tokens(1, 31) % 90 + 5
        tokens[0, 29] = last
        batch = batch_of(tokens)
        made = objective.corrupt(batch, batch.rng)
        made.tokens[:] = batch.tokens[:, :30]                        # inputs differ in the last position alone
        made.labels[:] = IGNORE
        made.labels[0, 3] = 17
        losses.append(objective.loss(model, made)[0].item())
    assert (losses[0] != losses[1]) == sees


# ---- the sums of a step

def metrics_of(sources, losses, targets, **measures) -> tuple:
    measures = {name: tuple(map(torch.tensor, pair)) for name, pair in measures.items()}
    return np.array(sources), {"sequence_loss": torch.tensor(losses), "sequence_targets": torch.tensor(targets),
                               "measures": measures}


def test_loss_by_source_adds_micro_batches_and_ranks():
    """Truth: sums by hand; the second rank here has the first one's values again."""
    two_ranks = SimpleNamespace(sum=lambda values: [2 * value for value in values])
    objective = Causal(True)
    objective.measures = ("margin", "unseen")
    parts = [metrics_of([0, 1], [1.5, 2.0], [3, 4], margin=(2.0, 1), unseen=(0.0, 0)),
             metrics_of([1, 1], [0.25, 4.0], [1, 2], margin=(1.0, 3), unseen=(0.0, 0))]
    norm = torch.tensor(0.75, dtype=torch.bfloat16)
    sums, measured, norm = sum_step(objective, ["law", "tales", "unread"], parts, norm, two_ranks)
    assert (sums, norm) == ({"law": (3.0, 6), "tales": (12.5, 14)}, 0.75)
    assert measured == {"margin": 0.75}


def test_counts_of_targets_are_exact_above_24_bits():
    many = SimpleNamespace(sum=lambda values: [value * (2**24 + 1) for value in values])
    parts = [metrics_of([0], [1.0], [1])]
    assert sum_step(Causal(True), ["law"], parts, torch.tensor(1.0), many)[0]["law"][1] == 2**24 + 1
