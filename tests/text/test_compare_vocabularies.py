"""Truth: counts made by hand; eval.py's own result for the small model.
"""

import collections

import numpy as np
import pytest
import tokenizers
from vocabularies import LATIN

from core import cli
from text import compare_vocabularies as C
from text import extend_vocabulary as X
from text import vocabulary as T
from text.vocabulary_files import BaseTokenizer


def test_report_counts_by_hand(small_bases, tmp_path):
    base = BaseTokenizer(small_bases["small bytes"])
    X.extend(small_bases["small bytes"], [LATIN] * 20, 30, tmp_path / "new")
    new, texts = T.load(tmp_path / "new"), [LATIN, "Ж 漢"]
    row = C.measure_lengths(base, new, texts)
    before, after = [[len(t.encode(x)) for x in texts] for t in (base.tokenizer, new)]
    size = sum(len(x.encode()) for x in texts)
    assert (row["tokens_before"], row["tokens_after"]) == (sum(before), sum(after))
    assert row["tokens_per_byte_after"] == sum(after) / size
    assert row["tokens_per_word_before"] == sum(before) / sum(len(x.split()) for x in texts)
    assert row["documents_touched"] == 0.5
    pattern = tokenizers.pre_tokenizers.Split(tokenizers.Regex(T.LLAMA3_SPLIT), "isolated")
    words = sum(len(pattern.pre_tokenize_str(x)) for x in texts)
    assert row["largest_possible_change"] == pytest.approx(words / sum(before) - 1)
    first = base.tokenizer.vocab_size
    counts = collections.Counter(i for x in texts for i in new.encode(x) if i >= first)
    assert row["new_tokens_used"] == len(counts) / 30
    result = C.report(base, new, {"domain": texts}, 10**9)
    median = np.median([counts[i] for i in range(first, new.vocab_size)])
    assert result["break_even_tokens"] == (round(C.TIMES_SEEN * sum(before) / median) if median else None)


@pytest.mark.parametrize(("change", "bound", "count", "have", "advice", "why"), [
    (-0.20, -0.5, 10, 10_000, "extend", "20.0% shorter (attention's cost 36% lower), and 10,000 tokens are enough"),
    (-0.20, -0.5, 10, 9_999, "keep", "half of the new rows would be seen less than 100 times in 9,999 tokens"),
    (-0.20, -0.5, 0, 10**9, "keep", "there is nothing to train their rows on"),
    (-0.10, -0.5, 10, 10**9, "keep", "10.0% shorter, and below 15% a new vocabulary is not worth its cost"),
    (-0.03, -0.05, 10, 10**9, "keep", "no extension could reach it: with every word one token it would be 5.0%")])
def test_advice(small_bases, monkeypatch, change, bound, count, have, advice, why):
    base = BaseTokenizer(small_bases["small bytes"])
    row = {"change": change, "largest_possible_change": bound, "tokens_before": 1000, "counts": np.array([count] * 3)}
    monkeypatch.setattr(C, "measure_lengths", lambda *_: row)
    result = C.report(base, base.tokenizer, {"domain": []}, have)
    assert result["recommendation"] == advice
    assert why in result["reason"]


def test_no_model_is_trained_before_every_tokenizer(monkeypatch):
    """300 ids are enough for BPE; Unigram, which comes second, needs more for its bytes and these letters."""
    texts = ["".join(map(chr, range(0x4E00, 0x4E80)))] * 20
    monkeypatch.setattr(C, "measure_small_model", lambda *args: pytest.fail("minutes went into a model first"))
    with pytest.raises(ValueError, match="no unigram vocabulary of 300"):
        C.compare_kinds(texts[2:], texts[:2], 300, megabytes=0.001)


@pytest.mark.slow
def test_a_small_model_is_trained_and_scored(small_bases):
    """By the commands themselves, for three steps: fewer bits than the 8 of a byte, and not none."""
    texts = [f"{n}. {LATIN}" for n in range(100)]
    assert 0.5 < C.measure_small_model(small_bases["small bytes"], texts[:90], texts[90:], 0.02, 0) < 8
    with pytest.raises(ValueError, match=r"train\.py failed: error: unknown key"):
        cli.run_command("train.py", "--no-such-key", 1)
