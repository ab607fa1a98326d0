"""Truth: what minhash gives of each text alone. Law: files are read as one, whatever the batches."""

import numpy as np
from similar_texts import random_texts, records_of, write_jsonl
from tqdm import tqdm

from core.cli import Reading
from core.pool import WorkerPool
from text.minhash import compute_band_keys, fold_words, hash_ngrams
from text.units import CANDIDATE, SHORT, Store, find_exact, read_signed, sign_file, split_paragraphs


def test_units_of_several_files_come_back_as_one(tmp_path):
    texts = [*random_texts(700, seed=9), "", "one\n\ntwo words"]
    stems = [tmp_path / name for name in "ab"]
    with WorkerPool(1, (None, "text", False)) as pool, tqdm(disable=True) as bar:
        for k, stem in enumerate(stems):
            path = write_jsonl(tmp_path / f"{k}.jsonl", records_of(texts)[k::2])
            assert sign_file(path, stem, Reading(), pool, bar) == len(texts[k::2]) == read_signed(stem)
    store, texts = Store(stems), texts[::2] + texts[1::2]
    hashes = hash_ngrams([fold_words(text) for text in texts], 5)
    for unit in (0, 1, 350, 351, 352, len(texts) - 1):
        assert np.array_equal(store.read_shingles(unit), np.unique(hashes[unit]))
    assert {store.read_id(unit) for unit in range(len(texts))} == {f"d{i}" for i in range(len(texts))}
    keys = compute_band_keys(hashes)
    assert all(np.array_equal(store.read_band(band), keys[:, band]) for band in (0, 13))
    first, best = find_exact(store.units)
    folded = [fold_words(text) for text in texts]
    assert [folded[unit] for unit in first] == folded
    assert len(best) == len(set(folded)) < len(texts)
    lengths = [len(folded[unit]) for unit in best]
    assert lengths == sorted(lengths, reverse=True)
    store.close()
    (tmp_path / "a.bands").write_bytes(b"cut short")
    assert read_signed(tmp_path / "a") is None


def test_paragraphs_are_units_and_short_ones_are_no_candidates(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", records_of(["Intro\n \n\na paragraph of six whole words\n"]))
    with WorkerPool(1, (None, "text", True)) as pool, tqdm(disable=True) as bar:
        sign_file(path, tmp_path / "a", Reading(), pool, bar)
    store = Store([tmp_path / "a"])
    assert store.units["state"].tolist() == [SHORT, CANDIDATE]
    assert [store.read_id(unit) for unit in (0, 1)] == ["d0#0", "d0#1"]
    store.close()


def test_paragraphs_and_their_breaks_join_to_the_text():
    for text in ("a\n\nb\n \n\t\nc", "\n\na\n", "", "a\nb"):
        assert "".join(split_paragraphs(text)) == text
    assert split_paragraphs("a\n\nb\n \nc\nd") == ["a", "\n\n", "b", "\n \n", "c\nd"]
