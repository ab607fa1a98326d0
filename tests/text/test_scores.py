"""Truth: naive loops in this file for the repetition scores; sentences in several languages; the formulas by hand."""

import random
from collections import Counter

import numpy as np
import pytest
from documents import CODE, NOTE, STATUTE, scores_of

from text import scores
from text.scores import estimate_log_odds, hash_features, score_ngrams


def naive_repetition(text: str) -> dict:
    """Gopher's n-gram shares as datatrove counts them, on strings."""
    words, out = text.split(), {}
    for n in (2, 3, 4):
        counts = Counter(" ".join(words[i:i + n]) for i in range(len(words) - n + 1))
        gram, most = max(counts.items(), key=lambda item: item[1], default=("", 0))
        out[f"top_{n}gram"] = min(1.0, len(gram) * most / len(text)) if most > 1 else 0.0
    for n in range(5, 11):
        seen, chars, i = set(), 0, 0
        while i <= len(words) - n:
            gram = " ".join(words[i:i + n])
            if gram in seen:
                chars, i = chars + len(gram), i + n
            else:
                seen.add(gram)
                i += 1
        out[f"dup_{n}gram"] = chars / len(text)
    return out


def test_repetition_scores_match_the_naive_count():
    rng = random.Random(3)
    texts = [" ".join(rng.choice("abcdefgh"[:k]) * rng.randint(1, 3) for _ in range(n)) for k in (2, 3, 8)
             for n in (1, 4, 9, 60, 300)] + [STATUTE, NOTE, f"{NOTE} {NOTE}", " ".join([STATUTE[:200]] * 6)]
    for text in texts:
        words = text.split()
        found = score_ngrams(words, len(text))
        for name, value in naive_repetition(text).items():
            assert found[name] == pytest.approx(value), (name, text[:60])


def test_repeated_lines_and_paragraphs_by_hand():
    """Gopher's: every occurrence after the first, of all lines (of all characters). Five lines, of which "aa" stands
    three times: 2 of 5 lines, 4 of 17 characters."""
    found = scores.score_text("aa\nbb\n\naa\nbbb\n\naa")
    assert (found["lines"], found["chars"]) == (5, 17)
    assert (found["dup_lines"], found["dup_line_chars"]) == (0.4, round(4 / 17, 4))
    assert (found["dup_paragraphs"], found["dup_paragraph_chars"]) == (0, 0)
    found = scores.score_text("a b\n\na b\n\nc\n\na b")
    assert (found["dup_paragraphs"], found["dup_paragraph_chars"]) == (0.5, round(6 / 16, 4))


def test_unique_words_are_counted_in_windows_of_100():
    """A last window of 50 words or fewer does not count: it would be more unique than the others. Case is no matter."""
    once = [f"word{i}" for i in range(51)]
    for more, wanted in (([], 0.01), (once[:50], 0.01), (once, (0.01 + 1) / 2)):
        assert scores.score_text(" ".join(["law", "Law"] * 50 + more))["unique_words"] == round(wanted, 4), len(more)
    assert scores.score_text("THE END OF ALL")["stop_words"] == 2


@pytest.mark.parametrize(("text", "language"), [
    (NOTE, "en"), ("Das Gericht hat den Antrag mit der Begründung abgelehnt, dass er nicht von der Partei ist.", "de"),
    ("Le tribunal est saisi par une des parties et la demande est jugée dans les deux mois.", "fr"),
    ("Суд рассматривает дело в течение двух месяцев.", "ru"), ("法院应当在两个月内作出判决。", "zh"),
    ("裁判所は二か月以内に判決を下す。", "ja"), ("12 34 56", "unknown"), ("", "unknown"),
])
def test_language_by_script_and_stop_words_and_by_lingua(text, language):
    assert scores_of(text)["language"] == language
    if len(text) > 20:
        pytest.importorskip("lingua")
        assert scores_of(text, lingua=True)["language"] == language


def test_scripts_without_spaces_count_signs_and_skip_rules_on_words():
    found = scores_of("法院应当在两个月内作出判决。" * 5)
    assert found["words"] == 5 * 13
    assert "mean_word_length" not in found
    assert "stop_words" not in found
    assert found["sentences"] == 5


def test_code_ratio_tells_text_from_code():
    assert scores_of(CODE, "code")["code_ratio"] > 0.6
    assert scores_of(STATUTE)["code_ratio"] == 0
    assert scores_of(NOTE)["code_ratio"] == 0
    assert 0.2 < scores_of(f"{NOTE}\n```\n{CODE}```", "medical")["code_ratio"] < 0.8


def test_relevance_by_keywords_and_by_log_odds():
    words = ("petition", "court", "adoption", "consent")
    assert scores_of(STATUTE, keywords=words)["relevance"] == 1
    found = scores_of(NOTE + " court", keywords=words)
    assert found["keyword_density"] == pytest.approx(1 / (len(NOTE.split()) + 1), abs=1e-4)
    assert scores_of(NOTE, keywords=("cou",))["keyword_density"] == 0, "whole words only"
    odds = estimate_log_odds([STATUTE], [NOTE])
    law, medicine = (scores_of(text, log_odds=odds) for text in (STATUTE[60:300], NOTE[60:300]))
    assert law["log_odds"] > 1 > -1 > medicine["log_odds"]
    assert law["relevance"] > 0.7 > 0.3 > medicine["relevance"]
    assert len(hash_features(["half", "\ud800"])) == 3
    one = estimate_log_odds(["a"], ["b"])                          # by hand: one word, no pair
    total = 1 + scores.BUCKETS / 2
    assert one[hash_features(["a"])[0]] == pytest.approx(np.log(1.5 / total) - np.log(0.5 / total), rel=1e-5)
