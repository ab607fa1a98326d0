"""Laws: rows of old ids keep their bits; new ones are what their name says.
"""

import pytest
import torch

from text import vocabulary as T
from text.new_rows import NewRows, resize


@pytest.mark.parametrize("tied", [True, False])
def test_rows(tiny_model, small_bases, tied):
    old = T.load(small_bases["small bytes"])
    known = [i for i, token in enumerate(old.tokens) if token is not None]
    parts = {old.vocab_size: [5, 7, 7], old.vocab_size + 1: [9], old.vocab_size + 2: [1, 2]}

    def grow(init, rows=old.vocab_size, seed=0, zero_id=None):
        model = tiny_model(vocab_size=rows, tie_word_embeddings=tied)
        before = [model.embed_tokens.weight.clone(), model.head.weight.clone()]
        resize(model, old, old.vocab_size + 3, parts, NewRows(init, seed), zero_id)
        after = [model.embed_tokens.weight, model.head.weight]
        assert (after[0] is after[1]) == tied
        assert model.config.vocab_size == len(after[0]) == max(rows, old.vocab_size + 3)
        for a, b in zip(before, after):
            assert torch.equal(a[:old.vocab_size], b[:old.vocab_size])
        return [(a[known], b.detach()[old.vocab_size:]) for a, b in zip(before, after)]

    for rows in (old.vocab_size, old.vocab_size + 10):              # the second: a base with rows to spare
        for a, b in grow("subtoken", rows):
            assert torch.allclose(b[0], (a[5] + a[7] + a[7]) / 3)
            assert torch.equal(b[1], a[9])
    for a, b in grow("subtoken_norm", zero_id=old.vocab_size + 2):
        assert torch.allclose(b[:2].norm(dim=1), a.norm(dim=1).median())
        assert torch.cosine_similarity(b[0], a[5] + 2 * a[7], dim=0) > 0.9999
        assert not b[2].any()
    for a, b in grow("mean"):
        assert torch.allclose(b, a.mean(0).expand(3, -1), atol=1e-6)
    for a, b in grow("covariance"):
        assert torch.allclose(b, a.mean(0).expand(3, -1), atol=0.01)
        assert not torch.equal(b[0], b[1])
    assert not any(b.any() for _, b in grow("zero"))
    for (_, b), (_, again), (_, other) in zip(grow("random"), grow("random"), grow("random", seed=1)):
        assert torch.equal(b, again)
        assert not torch.equal(b, other)
        assert 0.01 < b.std() < 0.03
    with pytest.raises(ValueError, match="the model has 97 rows, but its tokenizer 300 ids"):
        resize(tiny_model(), old, 303, parts, NewRows())


def test_covariance_rows_have_the_covariance(tiny_model, small_bases):
    old = T.load(small_bases["small bytes"])
    model = tiny_model(vocab_size=old.vocab_size)
    rows = model.embed_tokens.weight.detach().clone()
    n = 4000
    parts = {i: [1] for i in range(old.vocab_size, old.vocab_size + n)}
    resize(model, old, old.vocab_size + n, parts, NewRows("covariance"))
    drawn = model.embed_tokens.weight.detach()[old.vocab_size:].double()
    expected = torch.cov(rows.double().T, correction=0) * 1e-5
    assert (torch.cov(drawn.T) - expected).norm() < 0.2 * expected.norm()          # sqrt(32 / 4000) = 0.09
