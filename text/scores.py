"""What is measured on each document: counts, shares, repetition, language, quality, closeness to a domain.

    scores = score_text(text)        # {"words": 120, "dup_lines": 0.0, "language": "en", ..., "content": 0.91}

A score that has no meaning for a text is left out (word lengths where no spaces stand between words), and the rules on
it do not apply. The limits of the scores stand in text/gate.py.
"""

import functools
import locale
import math
import re
import zlib
from collections import Counter

import numpy as np

from core.errors import UserError
from text.repair import SENTENCE_END, SENTENCE_MARKS, drop_markup, is_spaceless, split_words

# Raise it when a score changes its meaning: records that were scored before are then scored anew.
SCORES_VERSION = 5
GOPHER_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
# Frequent words by language, for the light guess, the stop words and the plain words of a text.
STOP_WORDS = {code: frozenset(words.split()) for code, _, words in (line.partition(" ") for line in """
en the be to of and that have with is in for by was are it
es el los las y es una que por con del se la para su de en
de der die das und ist nicht von mit den ein zu des im oder auf
fr le la les et est des une dans que pour du par au de en
it il di che e la per un non sono della con le del da dei
pt o os as e um uma que não para com do da em dos de
nl de het een en van is niet dat op te zijn in voor met door
ca el la els les i és que una per amb del dels no de en
ro și în cu nu că pe este din se să sau pentru sunt de la
sv och att det i på är som en för av med till den inte om
da og at det i på er som en for af med til den ikke de
nb og å det i på er som en for av med til den ikke at
fi ja on ei että se tai jos kun myös ovat sekä joka ole jotka sen
hu a az és hogy nem is egy van ha vagy mint meg csak ez nincs
pl w i na z się nie do jest że lub dla oraz przez od są
cs a v na se je že s z do nebo pro jako k které není
sk a v na sa je že s z do alebo pre ako k ktoré nie
hr i je u se na da za s ili od su ne kao što koji
sl in je na v za se da z s ali ki ne pri od po
tr ve bir bu için ile da de olarak daha olan gibi veya her ise en
vi và của là có không được các cho trong một với những này khi hoặc
id yang dan di untuk dari dengan ini tidak pada dalam adalah atau akan oleh itu
ru и в не на что с по для от или как это к из при
uk і в у на не що до та з для або як це від за
bg и на от за се да не са по или което със като в при
sr и је се да у на за не су које или од као са
ar في من على أن إلى أو ما لا هذا التي عن مع هو كل الذي
fa و در به از که این را با است برای یا آن می شود های
ur کے کی میں ہے اور کو سے کا پر نے یہ کہ جو یا ہیں
hi के में है की और से को का पर या यह कि नहीं हैं जो
mr आणि या आहे किंवा व हे ते नाही असे आहेत केली तर
""".strip().split("\n"))}
# Blocks of Unicode -> the languages written in them; stop words tell several apart.
SCRIPTS = [(int(low, 16), int(high, 16), codes) for low, high, codes in re.findall(r"(\w{4}) (\w{4}) ([a-z ]+)", """
    0370 03ff el, 0400 04ff ru uk bg sr, 0530 058f hy, 0590 05ff he, 0600 06ff ar fa ur, 0900 097f hi mr, 0980 09ff bn,
    0a00 0a7f pa, 0a80 0aff gu, 0b80 0bff ta, 0c00 0c7f te, 0c80 0cff kn, 0d00 0d7f ml, 0d80 0dff si, 0e00 0e7f th,
    0e80 0eff lo, 1000 109f my, 10a0 10ff ka, 1200 137f am, 1780 17ff km, 3040 30ff ja, 3400 9fff zh, ac00 d7a3 ko""")]
LATIN = [code for code in STOP_WORDS if not any(code in codes.split() for *_, codes in SCRIPTS)]
# Of English paragraphs 99 in 100 have so large a share of stop words, of Lithuanian ones fewer than 1 in 100.
LEAST_STOP_WORDS = 0.04
# Words whose full stop ends no sentence; one letter with a stop is such a word too ("z. B.", "U. S.").
ABBREVIATIONS = {code: re.compile(rf"(?<!\w)(?:[^\W\d_]|{words})\.(?=\s)") for code, words in {
    "de": "Abs|Nrn?|Art|bzw|vgl|Vgl|Ziff|Buchst|ggf|sog|zzgl|inkl|Bd|Dr|Prof|St|Str|Anm|Aufl|Hrsg|Rn|gem|lit|ca",
    "en": "Mrs?|Ms|Dr|Prof|Secs?|Nos|Inc|Corp|Ltd|vs|cf|al|Fig|Vol|Jr|Sr"}.items()}
BULLETS, TERMINALS = "•●○■□▪▫‣-–*", ".?!\"'”’“»」』" + SENTENCE_MARKS
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
    plain, spaceless = drop_markup(text), is_spaceless(text)
    words = split_words(plain, spaceless)
    lower = [word.lower() for word in words]
    lines = [line for line in map(str.rstrip, text.split("\n")) if line]
    n_chars, n_words = max(1, len(text)), max(1, len(words))
    vocabulary = Counter()
    for word, n in Counter(lower).items():
        vocabulary[word.strip(".,;:!?()[]\"'“”‘’„«»؟،।")] += n
    alphabetic = {word: n for word, n in vocabulary.items() if any(map(str.isalpha, word))}
    language, certainty = identify_language(text, vocabulary, lingua)
    # A sign without spaces around it counts as three letters; see also short_lines.
    scores = {"chars": len(text) * (3 if spaceless else 1), "words": len(words), "lines": len(lines),
              "language": language, "language_score": certainty,
              **_score_form(text, lines, n_words, spaceless, language),
              "hash_ratio": plain.count("#") / n_words, "mean_word_length": sum(map(len, words)) / n_words,
              "alpha_words": sum(alphabetic.values()) / n_words}
    stop_words = STOP_WORDS.get(language, frozenset())
    scores["stop_words"] = len((GOPHER_STOP_WORDS if language == "en" else stop_words) & vocabulary.keys())
    paragraphs = [paragraph for paragraph in map(str.strip, text.split("\n\n")) if paragraph]
    for kind, items in (("line", lines), ("paragraph", paragraphs)):
        repeats = Counter(items) - Counter(set(items))
        scores[f"dup_{kind}s"] = repeats.total() / max(1, len(items))
        scores[f"dup_{kind}_chars"] = sum(n * len(item) for item, n in repeats.items()) / n_chars
    scores |= score_ngrams(words, n_chars, spaceless)
    # Unique words are counted in windows of 100 words, because in any long text most words occur again.
    windows = [lower[i:i + 100] for i in range(0, max(1, len(lower) - 50), 100)]
    unique = sum(len(set(window)) / max(1, len(window)) for window in windows) / len(windows)
    meaty = sum(n for word, n in alphabetic.items() if word not in stop_words) / n_words
    scores["unique_words"] = unique
    meaningless = find_meaningless(language, spaceless)
    sentences = 1 if "sentences" in meaningless else min(1, scores["sentences"] / 2)
    scores["format"] = (min(1, scores["alpha"] / 0.7) + min(1, unique / 0.7) + sentences) / 3
    repeated = max(scores["dup_10gram" if spaceless else "dup_5gram"], scores["dup_line_chars"])
    scores["content"] = (min(1, scores["compression"] / 0.25) + 1 - repeated + min(1, meaty / 0.4)) / 3
    if keywords:
        scores["keyword_density"] = sum(1 for _ in keywords.finditer(text.lower())) / n_words
        scores["relevance"] = min(1, scores["keyword_density"] / 0.01)
    if log_odds is not None:
        features = hash_features(lower)
        scores["log_odds"] = float(log_odds[features].mean()) if len(features) else 0.0
        scores.setdefault("relevance", 1 / (1 + math.exp(-max(-50.0, min(50.0, scores["log_odds"])))))
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in scores.items()
            if name not in meaningless}


def find_meaningless(language: str, spaceless: bool) -> set[str]:
    """The scores that have no meaning for a text in this language: the rules on them are not applied.

    Published limits on lengths and repetition count words, which cannot be told where no spaces stand between them. A
    Korean word has about three signs. Thai and Lao have no mark at the end of a sentence. Stop words need a list.
    """
    names = set() if language in STOP_WORDS else {"stop_words"}
    if spaceless or language == "ko":
        names.add("mean_word_length")
    if spaceless:
        names |= {"alpha_words", *(f"top_{n}gram" for n in (2, 3, 4)), *(f"dup_{n}gram" for n in range(5, 10))}
    return names | {"sentences", "terminal_lines"} if language in ("th", "lo") else names


def _score_form(text, lines, n_words, spaceless, language) -> dict:
    """Scores on the marks, the characters and the lines of a text; `lines` are those that are not empty."""
    # Ten Han characters say about as much as thirty letters.
    short = 10 if spaceless else 30
    raw, counts = text.encode(), Counter(text)
    letters, digits = (sum(n for sign, n in counts.items() if is_one(sign)) for is_one in (str.isalpha, str.isdigit))
    lengths = list(map(len, lines))
    n_chars, n_lines, in_lines = max(1, len(text)), max(1, len(lines)), max(1, sum(lengths))
    abbreviations = len(ABBREVIATIONS[language].findall(text)) if language in ABBREVIATIONS else 0
    return {
        "sentences": sum(1 for _ in SENTENCE_END.finditer(text)) - abbreviations,
        "ellipsis_ratio": (text.count("...") + text.count("…")) / n_words,
        "bullet_lines": sum(line.lstrip()[0] in BULLETS for line in lines) / n_lines,
        "ellipsis_lines": sum(line.endswith(("...", "…")) for line in lines) / n_lines,
        "terminal_lines": sum(line[-1] in TERMINALS for line in lines) / n_lines,
        "short_lines": sum(n <= short for n in lengths) / n_lines, "newlines_per_word": text.count("\n") / n_words,
        "lorem_ipsum": int("lorem ipsum" in text.lower()), "curly_brackets": text.count("{"),
        "max_line": max(lengths, default=0), "mean_line": sum(lengths) / n_lines,
        "alpha": letters / n_chars, "alnum": (letters + digits) / n_chars,
        "code_ratio": sum(len(line) for line in lines if CODE_LINE.match(line[:500])) / in_lines,
        "comment_ratio": sum(len(line) for line in lines if COMMENT_LINE.match(line)) / in_lines,
        "compression": len(zlib.compress(raw, 1)) / max(1, len(raw))}


def score_ngrams(words: list[str], n_chars: int, spaceless: bool = False) -> dict:
    """Gopher's repetition of n-grams, as shares of the text's `n_chars` characters, counted as datatrove counts them.

    top_2gram to top_4gram: all occurrences of the most frequent one. dup_5gram to dup_10gram: those that occurred
    before, taken from the left without overlap; of "a b c d e f a b c d e" dup_5gram counts the second "a b c d e".
    With `spaceless` two signs are taken for a word, as in Chinese, and nothing stands between them.
    N-grams are compared by 64-bit hashes.
    """
    out = {f"top_{n}gram": 0.0 for n in (2, 3, 4)} | {f"dup_{n}gram": 0.0 for n in range(5, 11)}
    table = {}
    ids = np.array([table.setdefault(word, len(table)) for word in words], np.uint64) + np.uint64(1)
    space, signs = (0, 2) if spaceless else (1, 1)
    starts = np.cumsum([0, *(len(word) + space for word in words)])
    units = ids[:-1] * np.uint64(0xD6E8FEB86659FD93) + ids[1:] if spaceless else ids
    grams = units
    for n in range(2, min(10, len(ids) // signs) + 1):
        grams = grams[:-signs] * np.uint64(0x9E3779B97F4A7C15) + units[(n - 1) * signs:]
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
            out[f"top_{n}gram"] = min(1.0, float(most * (starts[at + n * signs] - starts[at] - space) / n_chars))
            continue
        repeated = np.flatnonzero(np.isin(grams, ordered[1:][same]))
        seen, chars, free = set(), 0, 0
        for i, gram in zip(repeated.tolist(), grams[repeated].tolist()):
            if i < free:
                continue
            if gram in seen:
                chars += int(starts[i + n * signs] - starts[i]) - space
                free = i + n * signs
            seen.add(gram)
        out[f"dup_{n}gram"] = chars / n_chars
    return out


# ---- language and domain

# lingua's detector takes seconds to build: a worker does so when its first document asks for it.
_detectors = []


def identify_language(text: str, word_counts: Counter, lingua: bool) -> tuple[str, float]:
    """(ISO 639-1 code or "unknown", certainty from 0 to 1), by lingua or by a light guess.

    lingua reads the first 600 characters. The guess is by the script of the first 4,000, and by the stop words where
    several languages share it.
    """
    if lingua:
        if not _detectors:
            from lingua import LanguageDetectorBuilder
            _detectors.append(LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build())
        best = _detectors[0].compute_language_confidence_values(text[:600])[0]
        return (best.language.iso_code_639_1.name.lower(), best.value) if best.value else ("unknown", 0.0)
    sample = text[:4000]
    candidates, share = LATIN, 0.0
    if not sample.isascii():
        signs, scripts = Counter(sample), Counter()
        for sign, n in signs.items():
            scripts[find_script(ord(sign))] += n
        letters = max(1, sum(n for sign, n in signs.items() if sign.isalpha()))
        # Japanese mixes kana with Han characters, which alone would make it Chinese.
        if scripts["ja"] > 0.1 * letters:
            scripts["ja"] += scripts.pop("zh", 0)
        codes, n = max(((codes, n) for codes, n in scripts.items() if codes), key=lambda item: item[1], default=("", 0))
        if n > 0.4 * letters:
            candidates, share = codes.split(), min(1.0, n / letters)
    hits = {code: sum(word_counts[word] for word in STOP_WORDS.get(code, ())) for code in candidates}
    language = max(hits, key=hits.get)
    if share:
        return language, share
    known = hits[language] >= max(2, LEAST_STOP_WORDS * word_counts.total())
    return (language, hits[language] / sum(hits.values())) if known else ("unknown", 0.0)


@functools.lru_cache(maxsize=1 << 16)
def find_script(sign: int) -> str:
    """The codes of SCRIPTS for a character, "" for those of none, such as the Latin letters."""
    return next((codes for low, high, codes in SCRIPTS if low <= sign <= high), "")


def parse_languages(text: str, lingua: bool) -> tuple[str, ...]:
    """The codes of "en,de"; UserError where one is none that `identify_language` can find."""
    codes = tuple(code.strip().lower() for code in text.split(",") if code.strip())
    known = {"unknown", *STOP_WORDS, *(code for *_, some in SCRIPTS for code in some.split())}
    if lingua:
        from lingua import Language
        known = {"unknown", *(language.iso_code_639_1.name.lower() for language in Language.all())}
    for code in codes or ("",):
        if code not in known:
            # "german" and "de_at" are names of locales.
            near = locale.locale_alias.get(code.replace("-", "_"), code)[:2]
            raise UserError(f"--language {text}: {code or 'nothing'} is no code that can be found"
                            f"{f'; did you mean {near}?' if near in known else ''}; "
                            + ("lingua" if lingua else "without --lingua the light guess")
                            + f" finds {', '.join(sorted(known))}")
    return codes


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
