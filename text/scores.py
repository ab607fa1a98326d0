"""What is measured on each document: counts, shares, repetition, language, quality, closeness to a domain.

    scores = score_text(text)        # {"words": 120, "dup_lines": 0.0, "language": "en", ..., "content": 0.91}

A score that has no meaning for a text is left out (word lengths where no spaces stand between words), and the rules on
it do not apply. The limits of the scores stand in text/gate.py.
"""

import math
import re
import zlib
from collections import Counter

import numpy as np

from core.errors import UserError
from text.repair import SENTENCE_END, SPACELESS_SIGN

# Raise it when a score changes its meaning: records that were scored before are then scored anew.
SCORES_VERSION = 2
GOPHER_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
STOP_WORDS = {
    language: frozenset(words.split()) for language, words in {
        "en": "the be to of and that have with is in for by was are it", "es": "el los las y es una que por con del se",
        "de": "der die das und ist nicht von mit den ein zu", "fr": "le la les et est des une dans que pour du",
        "it": "il di che e la per un non sono della con", "pt": "o os as e um uma que não para com do da",
        "nl": "de het een en van is niet dat op te zijn"}.items()}
SCRIPTS = {code: re.compile(f"[{low}-{high}]") for code, low, high in (
    ("zh", "\u4e00", "\u9fff"), ("ja", "\u3040", "\u30ff"), ("ko", "\uac00", "\ud7a3"), ("ru", "\u0400", "\u04ff"),
    ("ar", "\u0600", "\u06ff"), ("el", "\u0370", "\u03ff"), ("he", "\u0590", "\u05ff"), ("hi", "\u0900", "\u097f"),
    ("th", "\u0e00", "\u0e7f"))}
BULLETS, TERMINALS = "•●○■□▪▫‣-–*", ".?!\"'”’。！？"
WORD_OR_SIGN = re.compile(rf"{SPACELESS_SIGN.pattern}|[^\W{SPACELESS_SIGN.pattern[1:]}+")
# A line of source code in Python, JavaScript, C, Java, Rust, Go or HTML, by how it begins or ends.
CODE_LINE = re.compile(r"""(?x)\s*(?: (?:async\ )?def\ \w+\( | class\ \w+\s*[(:{] | import\ [\w.]+(?:\ as\ \w+)?;?\Z
  | from\ [\w.]+\ import | \#\ ?(?:include|define|ifdef|endif)\b | @\w[\w.]*(?:\(|\Z) | [\w.\[\]"']+\ ?[-+*/|&]?=\ ?\S
  | (?:public|private|protected|static|const|var|let|function|func|fn)\ [\w<>\[\]]+\s?[\w(={:] | (?:else|try|finally):\Z
  | (?:(?:yield|from|await|raise)\ )*[\w.]+\(.*\)[;:]?\Z | return\b.*[;)\]]\Z
  | (?:if|elif|for|while|except|with|switch|catch)\b[^(\[=<>_]*[(\[=<>_].*[:{]\Z
  | </?[a-z][^<>]*>\s*\Z | .*(?:[{}]|\)\;|\}[;,)])\Z )""")
COMMENT_LINE = re.compile(r"\s*(?:#|//|/\*|\*|--|<!--|\"\"\"|''')")
# Hashed words and word pairs of the log-odds fall into so many buckets, counted over so many characters of each side.
BUCKETS, SAMPLE_CHARS = 1 << 20, 20 << 20


def score_text(text: str, lingua: bool = False, keywords: re.Pattern | None = None,
               log_odds: np.ndarray | None = None) -> dict:
    """Every score of a text, by name: counts, shares from 0 to 1, the language's code; floats have 4 decimals.

    lingua: identify the language with lingua. keywords: see `compile_keywords`. log_odds: float32 [BUCKETS], see
    `estimate_log_odds`. The last two give "relevance".
    """
    spaceless = not text.isascii() and len(SPACELESS_SIGN.findall(text)) > 0.3 * len(text)
    words = WORD_OR_SIGN.findall(text) if spaceless else text.split()
    lower = words if spaceless else text.lower().split()
    lines = [line for line in map(str.rstrip, text.split("\n")) if line]
    n_chars, n_words = max(1, len(text)), max(1, len(words))
    vocabulary = Counter()
    for word, n in Counter(lower).items():
        vocabulary[word.strip(".,;:!?()[]\"'“”‘’")] += n
    alphabetic = {word: n for word, n in vocabulary.items() if any(map(str.isalpha, word))}
    language, certainty = identify_language(text, vocabulary, lingua)
    scores = {"chars": len(text), "words": len(words), "lines": len(lines), "language": language,
              "language_score": certainty, **_score_form(text, lines, n_words)}
    if not spaceless:
        scores["mean_word_length"] = sum(map(len, words)) / n_words
        scores["alpha_words"] = sum(alphabetic.values()) / n_words
    if language in ("en", "unknown"):
        scores["stop_words"] = sum(word in GOPHER_STOP_WORDS for word in vocabulary)
    paragraphs = [paragraph for paragraph in map(str.strip, text.split("\n\n")) if paragraph]
    for kind, items in (("line", lines), ("paragraph", paragraphs)):
        repeats = Counter(items) - Counter(set(items))
        scores[f"dup_{kind}s"] = repeats.total() / max(1, len(items))
        scores[f"dup_{kind}_chars"] = sum(n * len(item) for item, n in repeats.items()) / n_chars
    scores |= score_ngrams(words, n_chars)
    # Unique words are counted in windows of 100 words, because in any long text most words occur again.
    windows = [lower[i:i + 100] for i in range(0, max(1, len(lower) - 50), 100)]
    unique = sum(len(set(window)) / max(1, len(window)) for window in windows) / len(windows)
    plain = sum(n for word, n in alphabetic.items() if word not in STOP_WORDS["en"]) / n_words
    scores["unique_words"] = unique
    scores["format"] = (min(1, scores["alpha"] / 0.7) + min(1, unique / 0.7) + min(1, scores["sentences"] / 2)) / 3
    scores["content"] = (min(1, scores["compression"] / 0.25)
                         + 1 - max(scores["dup_5gram"], scores["dup_line_chars"]) + min(1, plain / 0.4)) / 3
    if keywords:
        scores["keyword_density"] = sum(1 for _ in keywords.finditer(text.lower())) / n_words
        scores["relevance"] = min(1, scores["keyword_density"] / 0.01)
    if log_odds is not None:
        features = hash_features(lower)
        scores["log_odds"] = float(log_odds[features].mean()) if len(features) else 0.0
        scores.setdefault("relevance", 1 / (1 + math.exp(-max(-50.0, min(50.0, scores["log_odds"])))))
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in scores.items()}


def _score_form(text, lines, n_words) -> dict:
    """Scores on the marks, the characters and the lines of a text; `lines` are those that are not empty."""
    raw, counts = text.encode(), Counter(text)
    letters, digits = (sum(n for sign, n in counts.items() if is_one(sign)) for is_one in (str.isalpha, str.isdigit))
    lengths = list(map(len, lines))
    n_chars, n_lines, in_lines = max(1, len(text)), max(1, len(lines)), max(1, sum(lengths))
    return {
        "sentences": sum(1 for _ in SENTENCE_END.finditer(text)),
        "hash_ratio": text.count("#") / n_words, "ellipsis_ratio": (text.count("...") + text.count("…")) / n_words,
        "bullet_lines": sum(line.lstrip()[0] in BULLETS for line in lines) / n_lines,
        "ellipsis_lines": sum(line.endswith(("...", "…")) for line in lines) / n_lines,
        "terminal_lines": sum(line[-1] in TERMINALS for line in lines) / n_lines,
        "short_lines": sum(n <= 30 for n in lengths) / n_lines, "newlines_per_word": text.count("\n") / n_words,
        "lorem_ipsum": int("lorem ipsum" in text.lower()), "curly_brackets": text.count("{"),
        "max_line": max(lengths, default=0), "mean_line": sum(lengths) / n_lines,
        "alpha": letters / n_chars, "alnum": (letters + digits) / n_chars,
        "code_ratio": sum(len(line) for line in lines if CODE_LINE.match(line[:500])) / in_lines,
        "comment_ratio": sum(len(line) for line in lines if COMMENT_LINE.match(line)) / in_lines,
        "compression": len(zlib.compress(raw, 1)) / max(1, len(raw))}


def score_ngrams(words: list[str], n_chars: int) -> dict:
    """Gopher's repetition of n-grams, as shares of the text's `n_chars` characters, counted as datatrove counts them.

    top_2gram to top_4gram: all occurrences of the most frequent one. dup_5gram to dup_10gram: those that occurred
    before, taken from the left without overlap; of "a b c d e f a b c d e" dup_5gram counts the second "a b c d e".
    N-grams are compared by 64-bit hashes.
    """
    out = {f"top_{n}gram": 0.0 for n in (2, 3, 4)} | {f"dup_{n}gram": 0.0 for n in range(5, 11)}
    table = {}
    ids = np.array([table.setdefault(word, len(table)) for word in words], np.uint64) + np.uint64(1)
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    grams = ids
    for n in range(2, min(10, len(ids)) + 1):
        grams = grams[:-1] * np.uint64(0x9E3779B97F4A7C15) + ids[n - 1:]
        ordered = np.sort(grams)
        same = ordered[1:] == ordered[:-1]
        # Where no n-gram occurs twice, no longer one does either.
        if not same.any():
            break
        if n < 5:
            edges = np.flatnonzero(np.concatenate([[True], ~same, [True]]))
            counts = np.diff(edges)
            most = counts.max()
            # Of several equally frequent ones, the first in the text gives the length in characters.
            at = np.isin(grams, ordered[edges[:-1][counts == most]]).argmax()
            out[f"top_{n}gram"] = min(1.0, float(most * (starts[at + n] - starts[at] - 1) / n_chars))
            continue
        repeated = np.flatnonzero(np.isin(grams, ordered[1:][same]))
        seen, chars, free = set(), 0, 0
        for i, gram in zip(repeated.tolist(), grams[repeated].tolist()):
            if i < free:
                continue
            if gram in seen:
                chars += int(starts[i + n] - starts[i]) - 1
                free = i + n
            seen.add(gram)
        out[f"dup_{n}gram"] = chars / n_chars
    return out


# ---- language and domain

# lingua's detector takes seconds to build: a worker does so when its first document asks for it.
_detectors = []


def identify_language(text: str, word_counts: Counter, lingua: bool) -> tuple[str, float]:
    """(ISO 639-1 code or "unknown", certainty from 0 to 1), by lingua or by a light guess.

    lingua reads the first 600 characters; the guess is the script of the first 4,000, else the most stop words.
    """
    if lingua:
        if not _detectors:
            from lingua import LanguageDetectorBuilder
            _detectors.append(LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build())
        best = _detectors[0].compute_language_confidence_values(text[:600])[0]
        return (best.language.iso_code_639_1.name.lower(), best.value) if best.value else ("unknown", 0.0)
    sample = text[:4000]
    if not sample.isascii():
        letters = max(1, sum(map(str.isalpha, sample)))
        shares = {code: len(script.findall(sample)) / letters for code, script in SCRIPTS.items()}
        code = "ja" if shares["ja"] > 0.1 else max(shares, key=shares.get)
        # Japanese mixes kana with Han characters, which alone would make it Chinese.
        if code == "ja":
            return code, min(1.0, shares["ja"] + shares["zh"])
        if shares[code] > 0.4:
            return code, min(1.0, shares[code])
    hits = {language: sum(word_counts[word] for word in words) for language, words in STOP_WORDS.items()}
    language = max(hits, key=hits.get)
    return (language, hits[language] / sum(hits.values())) if hits[language] >= 2 else ("unknown", 0.0)


def compile_keywords(words) -> re.Pattern | None:
    """A pattern that finds each of `words` as a whole word in lower-case text, the longest first; None for no words."""
    words = sorted({word.strip().lower() for word in words} - {""}, key=lambda word: (-len(word), word))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)") if words else None


def hash_features(words: list[str]) -> np.ndarray:
    """int64 [2n - 1]: the buckets of n words and of their pairs (DSIR's features, arXiv:2302.03169)."""
    hashes = np.array([zlib.crc32(word.encode(errors="replace")) for word in words], np.uint64)
    pairs = hashes[:-1] * np.uint64(0x9E3779B97F4A7C15) + hashes[1:]
    return (np.concatenate([hashes, pairs >> np.uint64(20)]) % np.uint64(BUCKETS)).astype(np.int64)


def estimate_log_odds(domain, general) -> np.ndarray:
    """float32 [BUCKETS], in nats: ln p(feature | domain) - ln p(feature | general), each count raised by one half.

    `domain` and `general` are iterables of texts; about 20 MB of each are read. UserError where one is empty.
    """
    logs = []
    for texts in (domain, general):
        counts, left = np.full(BUCKETS, 0.5), SAMPLE_CHARS
        for text in texts:
            counts += np.bincount(hash_features(text[:left].lower().split()), minlength=BUCKETS)
            left -= len(text)
            if left <= 0:
                break
        if left == SAMPLE_CHARS:
            raise UserError("one side of the log-odds (--general, --domain-seed) holds no text")
        logs.append(np.log(counts / counts.sum()))
    return (logs[0] - logs[1]).astype(np.float32)
