"""Truth: Python sets of word tuples; datasketch's MinHash; the banding's formula; the verdict's example by hand."""

import itertools
import random

import numpy as np
import pytest
from similar_texts import all_similar, edited, found_share, random_texts, shingle_set

from text.minhash import (
    BANDS,
    ROWS,
    compute_band_keys,
    compute_signatures,
    fold_words,
    hash_ngrams,
    jaccard,
    keep_best,
    link_band,
)


def test_band_keys_meet_as_often_as_the_formula_says():
    rng, n, size = np.random.default_rng(0), 3000, 360
    for s in (0.6, 0.8, 0.9):
        common = round(2 * size * s / (1 + s))
        pool = rng.integers(2**64, size=(n, 2 * size - common), dtype=np.uint64)
        a, b = pool[:, :size], pool[:, size - common:]
        exact = common / (2 * size - common)
        ka, kb = (compute_band_keys(list(np.sort(x, axis=1))) for x in (a, b))
        for share, p in (((ka == kb).any(1).mean(), found_share(exact)), ((ka == kb).mean(), exact**8)):
            assert abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5 + 1e-3, (s, share, p)


def test_estimates_agree_with_datasketch_within_sampling_error():
    datasketch = pytest.importorskip("datasketch")
    rng, ours, theirs, exact = random.Random(0), [], [], []
    for _ in range(120):
        listed = [f"w{rng.randrange(5000)}" for _ in range(150)]
        texts = [" ".join(listed), edited(" ".join(listed), rng.choice((0.01, 0.03, 0.06, 0.1)), rng)]
        a, b = compute_signatures(hash_ngrams([fold_words(t) for t in texts], 5))
        sketches = [datasketch.MinHash(num_perm=BANDS * ROWS) for _ in texts]
        for sketch, text in zip(sketches, texts):
            sketch.update_batch([" ".join(shingle).encode() for shingle in shingle_set(text)])
        ours.append(float((a == b).mean()))
        theirs.append(sketches[0].jaccard(sketches[1]))
        exact.append(all_similar(texts, 0)[0, 1])
    ours, theirs, exact = map(np.array, (ours, theirs, exact))
    sigma = (exact * (1 - exact) / (BANDS * ROWS)) ** 0.5
    assert (abs(ours - exact) < 4.5 * sigma).all()
    assert (abs(ours - theirs) < 4.5 * 2**0.5 * sigma).all()
    assert abs((ours - exact).mean()) < 4 * (sigma**2).sum() ** 0.5 / len(sigma)
    assert 0.8 < ((ours - exact) / sigma).std() < 1.2                    # as widely spread as independent rows are


def test_shingle_sets_and_similarity_against_python_sets():
    texts = [*random_texts(60, seed=4), "", "one", "one two", "a a a a a a a a a", "one two three four",
             "one two three four five"]
    sets = hash_ngrams([fold_words(t) for t in texts], 5)
    truths = [shingle_set(t) if t else set() for t in texts]
    unique = [np.unique(s) for s in sets]
    assert [len(s) for s in unique] == [len(t) for t in truths]
    for i, j in itertools.combinations([i for i, t in enumerate(texts) if t], 2):
        assert jaccard(unique[i], unique[j]) == len(truths[i] & truths[j]) / len(truths[i] | truths[j])
    alone = [hash_ngrams([fold_words(t)], 5)[0] for t in texts]              # a batch changes nothing
    assert all(np.array_equal(a, b) for a, b in zip(sets, alone))
    assert np.array_equal(compute_band_keys(sets), np.concatenate([compute_band_keys([s]) for s in alone]))


def test_normalise():
    assert fold_words("The  LAW,\r\n§ 5\t(a)") == "the law, § 5 (a)"
    assert fold_words("Straße Cafe\u0301") == fold_words("STRASSE CAFÉ")
    assert fold_words("漢字とkana is") == "漢 字 と kana is"
    assert fold_words("漢\n字") == fold_words("漢字")
    assert fold_words("กขค") == "ก ข ค"
    assert fold_words("a\ud800b") == "a\ufffdb"


def test_the_verdict_removes_no_chain():
    """The example of keep_best: 0 and 1, 1 and 2 are similar, 0 and 2 are not, and all share bands."""
    sets = [np.arange(100, dtype=np.uint64), np.arange(5, 105, dtype=np.uint64), np.arange(16, 116, dtype=np.uint64)]
    assert jaccard(sets[0], sets[1]) > jaccard(sets[1], sets[2]) >= 0.8 > jaccard(sets[0], sets[2])
    bands = [link_band(np.array(keys, np.uint64)) for keys in ([7, 7, 9], [1, 2, 2], [5, 4, 5], [1, 2, 3])]
    assert [members.tolist() for members, _ in bands] == [[0, 1], [1, 2], [0, 2], []]
    assert [begins.tolist() for _, begins in bands] == [[True, False]] * 3 + [[]]
    assert link_band(np.array([7, 5, 7, 9, 5, 7], np.uint64))[1].tolist() == [True, False, True, False, False]
    stays, similarity, compared = keep_best(bands, 3, sets.__getitem__, 0.8)
    assert stays.tolist() == [0, 0, 2]
    assert similarity.tolist() == [1, jaccard(sets[0], sets[1]), 1]
    assert compared == 2, "2 is not compared with 1, which is gone"
