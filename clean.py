"""One document in; one out, or its parts, or none. Scores first and a gate after, so that limits can be cut again.

    python clean.py FILE... --preset legal --out out/clean/legal
    python clean.py out/clean/legal --preset legal --rule words=20: --rule perplexity=p5:p95 --out out/clean/again

FILE is .jsonl[.gz|.zst], .parquet, text, a folder of such files, or hf://org/dataset. The folder --out gets

    kept.jsonl         {"text", "id", "metadata"}; every score under metadata.scores
    dropped.jsonl.gz   the same for what the gate stopped, with metadata.dropped = the rules it broke
    drops.json         written last: reasons, samples of both sides to look at, statistics by source and domain

The second command reads both: a scored record keeps its text and scores and only meets the new gate.
Personal data are scrubbed by pattern (pii.py); that is no de-identification: names stay.
"""

import core.threads

import dataclasses
import gzip
import hashlib
import json
import math
import os
import re
import sys
import time
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.cli import Reading
from core.config import ArgumentParser, main_guard, nearest, write_json
from core.pool import WorkerPool, batches_by_size
from text import corpus
from text.pii import scrub
from text.vocabulary import token_before_document

SCORES_VERSION = 2          # raise it when a score changes its meaning: older records are then scored anew

# ---- rules: score -> (lowest, highest) that is kept; None is no limit

GOPHER_QUALITY = {          # Rae et al. 2021 (arXiv:2112.11446), table A1
    "words": (50, 100_000), "mean_word_length": (3, 10), "hash_ratio": (None, 0.1), "ellipsis_ratio": (None, 0.1),
    "bullet_lines": (None, 0.9), "ellipsis_lines": (None, 0.3), "alpha_words": (0.8, None), "stop_words": (2, None)}
GOPHER_REPETITION = {       # the same, table A1; n-grams counted as in datatrove, every occurrence after the first
    "dup_lines": (None, 0.30), "dup_paragraphs": (None, 0.30), "dup_line_chars": (None, 0.20),
    "dup_paragraph_chars": (None, 0.20), "top_2gram": (None, 0.20), "top_3gram": (None, 0.18),
    "top_4gram": (None, 0.16), "dup_5gram": (None, 0.15), "dup_6gram": (None, 0.14), "dup_7gram": (None, 0.13),
    "dup_8gram": (None, 0.12), "dup_9gram": (None, 0.11), "dup_10gram": (None, 0.10)}
C4 = {                      # Raffel et al. 2020 (arXiv:1910.10683), section 2.2; its line rules are `c4_lines`
    "sentences": (5, None), "lorem_ipsum": (None, 0), "curly_brackets": (None, 0)}
FINEWEB = {                 # Penedo et al. 2024 (arXiv:2406.17557); 0.01 is their code's value, the paper prints 0.1
    "terminal_lines": (0.12, None), "short_lines": (None, 0.67), "dup_line_chars": (None, 0.01),
    "newlines_per_word": (None, 0.3)}
CODE = {                    # StarCoder (arXiv:2305.06161): line lengths, alphanumeric share; NeMo Curator: lines
    "max_line": (None, 1000), "mean_line": (None, 100), "alnum": (0.25, None), "lines": (None, 20_000)}
COMMON = {                  # SPEC: length, quality. Dolma 1.6: personal data. Ours: density of nothing but repetition
    "chars": (100, None), "quality": (0.5, None), "pii": (None, 5), "compression": (0.05, None)}
DOMAIN = {                  # ours: Gopher's shape rules, as wide as statutes, tables, drug lists and templates need
    "words": (15, None), "mean_word_length": (2.5, 14), "hash_ratio": (None, 0.1), "ellipsis_lines": (None, 0.5),
    "alpha_words": (0.5, None), "dup_lines": (None, 0.6), "dup_paragraphs": (None, 0.6), "top_2gram": (None, 0.4),
    "dup_10gram": (None, 0.6), "lorem_ipsum": (None, 0), "code_ratio": (None, 0.5)}
PRESETS = {
    "web": {**COMMON, **GOPHER_REPETITION, **GOPHER_QUALITY, **C4, **FINEWEB,
            "boilerplate": (None, 0.05)},               # RefinedWeb (arXiv:2306.01116): words lost to line rules
    "legal": {**COMMON, **DOMAIN}, "medical": {**COMMON, **DOMAIN},
    "code": {**COMMON, **CODE},
    "books": {**COMMON, **GOPHER_REPETITION, **GOPHER_QUALITY, "words": (50, None), "lorem_ipsum": (None, 0),
              "bullet_lines": (None, 0.95), "code_ratio": (None, 0.5)}}
NAMES = {"perplexity", "perplexity_score", "log_odds", "keyword_density", "relevance", "comment_ratio",
         "language_score", "alpha", "unique_words", "format", "content"}.union(*PRESETS.values())   # of our numbers
WEIGHTS = {"perplexity_score": 0.3, "format": 0.2, "content": 0.3, "relevance": 0.2}        # SPEC, Corpus
STOP_WORDS = {              # which of them a text has most of is the light guess at its language
    language: frozenset(words.split()) for language, words in {
        "en": "the be to of and that have with is in for by was are it", "es": "el los las y es una que por con del se",
        "de": "der die das und ist nicht von mit den ein zu", "fr": "le la les et est des une dans que pour du",
        "it": "il di che e la per un non sono della con", "pt": "o os as e um uma que não para com do da",
        "nl": "de het een en van is niet dat op te zijn"}.items()}
GOPHER_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
SCRIPTS = {code: re.compile(f"[{low}-{high}]") for code, low, high in (
    ("zh", "\u4e00", "\u9fff"), ("ja", "\u3040", "\u30ff"), ("ko", "\uac00", "\ud7a3"), ("ru", "\u0400", "\u04ff"),
    ("ar", "\u0600", "\u06ff"), ("el", "\u0370", "\u03ff"), ("he", "\u0590", "\u05ff"), ("hi", "\u0900", "\u097f"),
    ("th", "\u0e00", "\u0e7f"))}
BUCKETS = 1 << 20           # of hashed words and word pairs in the log-odds of --general
SAMPLE_BYTES = 20 << 20     # read of each side for it


@dataclasses.dataclass
class Settings:
    """What one document meets before the gate; sent to every worker."""

    preset: str = "web"
    domain: str = ""                    # metadata.domain where the record has none; the preset's name by default
    max_chars: int = 100_000            # longer documents are split
    repair: bool = True                 # ftfy on lines that need it (never for code)
    pii: bool = True
    expand_abbreviations: bool = False  # pt, hx, dx, rx, tx
    lingua: bool = False
    keywords: tuple = ()
    log_odds: np.ndarray | None = None  # float32 [BUCKETS], nats

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset}{nearest(self.preset, PRESETS)}; there are "
                             f"{', '.join(PRESETS)}")
        if self.max_chars < 1:
            raise ValueError(f"max_chars is {self.max_chars}, but a part needs at least 1 character")
        if self.repair and self.preset != "code":
            need("ftfy", "or add --no-repair")
        if self.lingua:
            need("lingua", "or leave --lingua out: a light guess by script and stop words remains")
        words = sorted({word.lower() for word in self.keywords}, key=lambda w: (-len(w), w))
        self.keyword_pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)") if words else None


def need(module: str, otherwise: str, extra: str = "clean"):
    """The module, or a ValueError that says how to get it."""
    try:
        return __import__(module)
    except ImportError:
        raise ValueError(f"{module} is not installed; pip install -e '.[{extra}]', {otherwise}") from None


# ---- text: repair, normalise, boilerplate, domain forms

CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u2060\ufeff\ufffe\uffff\u00ad]")
CODE_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f\ufeff]")
BREAKS = re.compile("[\x0b\x0c\x85\u2028\u2029]")
SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
INNER_RUN = re.compile(r"(?<=[^ \t\n])[ \t]{2,}")


def repair(text: str) -> str:
    """ftfy on the lines that need it: mojibake, HTML entities, ligatures. Quotes and full-width forms stay."""
    if text.isascii() and "&" not in text:
        return text
    import ftfy
    config = ftfy.TextFixerConfig(uncurl_quotes=False, fix_character_width=False, fix_line_breaks=False, explain=False)
    lines = text.split("\n")
    return "\n".join(line if line.isascii() and "&" not in line else ftfy.fix_text(line, config) for line in lines)


def normalise(text: str, code: bool = False) -> str:
    """One kind of line end and space, no control characters, NFC. Lines, indentation and fenced code stay as they are.

    Code loses only NUL and its like, carriage returns and white space at line ends.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if code:
        return "\n".join(line.rstrip(" \t") for line in CODE_CONTROL.sub("", text).split("\n")).strip("\n")
    text = SPACES.sub(" ", BREAKS.sub("\n", CONTROL.sub("", text)))
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if "```" not in text:
        return _prose(text).strip("\n")
    parts, fenced = [[]], False
    for line in text.split("\n"):
        fence = line.lstrip().startswith("```")
        if fence and not fenced:
            parts.append([])
        parts[-1].append(line.rstrip())
        if fence and fenced:
            parts.append([])
        fenced ^= fence
    return "\n".join("\n".join(p) if i % 2 else _prose("\n".join(p)) for i, p in enumerate(parts) if p).strip("\n")


def _prose(text):
    text = INNER_RUN.sub(" ", "\n".join(line.rstrip() for line in text.split("\n")))
    return re.sub(r"\n{3,}", "\n\n", text)


NAVIGATION = frozenset({"home", "about", "about us", "contact", "contact us", "login", "log in", "sign in", "sign up",
                        "register", "search", "help", "faq", "sitemap", "site map", "privacy", "terms", "menu", "news",
                        "blog", "products", "services", "careers", "shop", "cart", "my account", "subscribe"})
BOILERPLATE = re.compile(r"""(?ix)
    skip\ (?:to|navigation)\b | jump\ to\ (?:navigation|content|search) | (?:back|go)\ to\ top | click\ here\b
  | (?:share|tweet|pin)\ (?:this|on|it|via)\b | (?:follow|like)\ us\b | print\ this\ (?:page|article) | e?-?mail\ this\b
  | (?:read|learn|show|view|see)\ (?:more|less|all)\W*\Z | continue\ reading\b | loading\W*\Z | advertisement\W*\Z
  | (?:next|previous)\ (?:page|post|article)\W*\Z | leave\ a\ (?:reply|comment)
  | posted\ (?:in|under|on|by)\ [\w\ ,]{1,30}\Z
  | (?:sign\ up|subscribe)\ (?:for|to|now|today)\b | (?:log|sign)\ in\ (?:to|with)\b | enter\ your\ e-?mail
  | (?:we|(?:this|our)\ (?:web)?site)\ uses?\ cookies | (?:accept|reject|manage)\ (?:all\ )?cookies | powered\ by\b
  | by\ (?:continuing|using)\ (?:to\ )?(?:browse|use|this\ site) | all\ rights\ reserved\W*\Z
  | forgot\ (?:your\ )?password
  | (?:copyright\ )?(?:©|\(c\)|copyright)\s*(?:19|20)\d\d | \d+\ (?:comments?|shares?|likes?|views?)\W*\Z
  | page\ \d{1,4}(?:\ of\ \d{1,4})?\W*\Z | [-–—]\ ?\d{1,4}\ ?[-–—]\Z""")
POLICY = ("javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
          "use cookies")


def is_boilerplate(line: str) -> bool:
    """A short line of navigation, sharing, cookies, copyright or page numbers; never one that begins in lower case, as
    the next line of a wrapped sentence does."""
    line = line.strip(" \t•*»>-–|") if line[:1] not in "-–—" else line.strip()
    if not 0 < len(line) <= 120 or line[0].islower():
        return False
    if BOILERPLATE.match(line):
        return True
    items = [item.strip().lower() for item in re.split(r"[|»›·>]", line)]
    return len(items) > 2 and sum(item in NAVIGATION for item in items) * 2 >= len(items)


def c4_lines(line: str) -> bool:
    """C4's line rules as FineWeb uses them, without the one on the last character: is the line kept?"""
    lower, words = line.lower(), line.split()
    if not words:
        return True
    return (len(words) + len(WORDLESS.findall(line)) >= 3 and max(map(len, words)) <= 1000
            and not any(phrase in lower for phrase in POLICY))


def drop_lines(text: str, preset: str) -> tuple[str, float]:
    """Text without boilerplate lines (web: and without the lines that C4 drops), and the share of words lost."""
    if preset == "code":
        return text, 0.0
    lines = text.split("\n")
    kept = [line for line in lines if not is_boilerplate(line) and (preset != "web" or c4_lines(line))]
    if len(kept) == len(lines):
        return text, 0.0
    after = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")
    return after, 1 - len(after.split()) / max(1, len(text.split()))


REPORTERS = {re.sub(r"[ .]", "", form).lower(): form for form in (
    "U.S.", "F.2d", "F.3d", "F.4th", "F. Supp.", "F. Supp. 2d", "F. Supp. 3d", "S. Ct.", "L. Ed.", "L. Ed. 2d",
    "A.2d", "A.3d", "P.2d", "P.3d", "N.E.2d", "N.E.3d", "N.W.2d", "S.E.2d", "S.W.2d", "S.W.3d", "So. 2d", "So. 3d")}
CITATION = re.compile(r"(?<![\w.])(\d{1,4}) {0,2}((?:U|F|S|L|A|P|N|So)\b\.? ?(?:S\.|(?:Supp|Ct|Ed)\.|[EW]\.)? ?"
                      r"(?:2d|3d|4th)?) {0,2}(?=\d{1,5}\b)")
ABBREVIATIONS = {           # only in lower case or as a sentence's first word, never beside a digit or a sign
    "pt": "patient", "hx": "history", "dx": "diagnosis", "rx": "prescription", "tx": "treatment"}
ABBREVIATION = re.compile(r"(?<![^\s(\"'])([hdrtHDRT]x|pt|Pt(?= (?:is|was|has|had|denies|reports|states|presents|"
                          r"presented|complains|needs)\b))(?=[\s,;:.)]|$)")
NOT_CLINICAL = re.compile(r"""(?ix)∫ | \b(?:d/dx|tx/rx|rx/tx)\b | \b(?:kidney|renal|liver|heart|lung|marrow)\ tx\b
  | \b(?:transmit\w*|receiver|antenna|packet|ethernet|serial\ port|pixels?|font|integral)\b""")


def domain_form(text: str, settings: Settings) -> str:
    """Legal citations in one form; clinical abbreviations written out on request, and only in a clinical document."""
    if settings.preset == "legal":
        text = CITATION.sub(_citation, text)
        text = re.sub(r"(?<=§) *(?=\d)", " ", text)
    if settings.expand_abbreviations and not NOT_CLINICAL.search(text):
        found = {match[1].lower() for match in ABBREVIATION.finditer(text)}
        if len(found) > 1 or re.search(r"\b(?:patients?|clinic\w*|hospital\w*|symptoms?)\b", text, re.I):
            text = ABBREVIATION.sub(_expand, text)
    return text


def _citation(match):
    written = match[2].strip()
    form = REPORTERS.get(re.sub(r"[ .]", "", written).lower())
    return f"{match[1]} {form} " if form and ("." in written or written[-1] in "dh") else match[0]


def _expand(match):
    start = max(0, match.start() - 2)
    if re.search(r"[\d)\]] ?$", match.string[start:match.start()]):          # 12 pt is a size, f(x) dx an integral
        return match[0]
    word = ABBREVIATIONS[match[1].lower()]
    return word.capitalize() if match[1][0].isupper() else word


# ---- splitting

SENTENCE_END = re.compile(r"(?<![.!?…])(?:[.!?…]++[\"')\]”’»]*+(?=\s|\Z)|[。！？]++)")


def split(text: str, limit: int) -> list[str]:
    """Parts of at most `limit` characters that join to the text, cut where a section, paragraph, line, sentence or word
    ends, whichever of these first has an end in the second half of the part."""
    parts, start = [], 0
    while (rest := len(text) - start) > limit:
        room = min(limit, rest // -(-rest // limit) + limit // 8)         # so that the last part is no scrap
        window, half = text[start:start + room], room // 2
        ends = [m.end() for m in re.finditer(r"\n\n+(?=\S)", window[half:])]
        cut = half + ends[-1] if ends else window.rfind("\n", half) + 1
        if cut <= 0:
            ends = [m.end() for m in SENTENCE_END.finditer(window, half)]
            cut = ends[-1] if ends else window.rfind(" ", half) + 1
        cut = cut if cut > 0 else room
        parts.append(text[start:start + cut])
        start += cut
    return [*parts, text[start:]]


# ---- scores

BULLETS, TERMINALS = "•●○■□▪▫‣-–*", ".?!\"'”’。！？"
WORDLESS = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f\uf900-\ufaff]")     # kana, han, thai
WORD_OR_SIGN = re.compile(rf"{WORDLESS.pattern}|[^\W{WORDLESS.pattern[1:]}+")
CODE_LINE = re.compile(r"""(?x)\s*(?: (?:async\ )?def\ \w+\( | class\ \w+\s*[(:{] | import\ [\w.]+(?:\ as\ \w+)?;?\Z
  | from\ [\w.]+\ import | \#\ ?(?:include|define|ifdef|endif)\b | @\w[\w.]*(?:\(|\Z) | [\w.\[\]"']+\ ?[-+*/|&]?=\ ?\S
  | (?:public|private|protected|static|const|var|let|function|func|fn)\ [\w<>\[\]]+\s?[\w(={:] | (?:else|try|finally):\Z
  | (?:(?:yield|from|await|raise)\ )*[\w.]+\(.*\)[;:]?\Z | return\b.*[;)\]]\Z
  | (?:if|elif|for|while|except|with|switch|catch)\b[^(\[=<>_]*[(\[=<>_].*[:{]\Z
  | </?[a-z][^<>]*>\s*\Z | .*(?:[{}]|\)\;|\}[;,)])\Z )""")
COMMENT_LINE = re.compile(r"\s*(?:#|//|/\*|\*|--|<!--|\"\"\"|''')")
ASCII_LETTERS, ASCII_DIGITS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", b"0123456789"


def score(text: str, settings: Settings) -> dict:
    """Every score of a text; counts and shares (0 to 1) unless the name says otherwise. A score that has no meaning
    here, such as word lengths where no spaces stand between words, is left out, and its rule does not apply."""
    raw = text.encode()
    spaceless = not text.isascii() and len(WORDLESS.findall(text)) > 0.3 * len(text)
    words = WORD_OR_SIGN.findall(text) if spaceless else text.split()
    lines = [line for line in map(str.rstrip, text.split("\n")) if line]
    lengths = list(map(len, lines))
    n_chars, n_words, n_lines = max(1, len(text)), max(1, len(words)), max(1, len(lines))
    lower = text.lower().split() if not spaceless else words
    vocabulary = Counter()
    for word, n in Counter(lower).items():
        vocabulary[word.strip(".,;:!?()[]\"'“”‘’")] += n
    alphabetic = {word: n for word, n in vocabulary.items() if any(map(str.isalpha, word))}
    language, certainty = identify(text, vocabulary, settings.lingua)
    letters, digits = _letters_and_digits(text, raw)
    out = {
        "chars": len(text), "words": len(words), "lines": len(lines), "language": language, "language_score": certainty,
        "sentences": sum(1 for _ in SENTENCE_END.finditer(text)),
        "hash_ratio": text.count("#") / n_words, "ellipsis_ratio": (text.count("...") + text.count("…")) / n_words,
        "bullet_lines": sum(line.lstrip()[0] in BULLETS for line in lines) / n_lines,
        "ellipsis_lines": sum(line.endswith(("...", "…")) for line in lines) / n_lines,
        "terminal_lines": sum(line[-1] in TERMINALS for line in lines) / n_lines,
        "short_lines": sum(n <= 30 for n in lengths) / n_lines, "newlines_per_word": text.count("\n") / n_words,
        "lorem_ipsum": int("lorem ipsum" in text.lower()), "curly_brackets": text.count("{"),
        "max_line": max(lengths, default=0), "mean_line": sum(lengths) / n_lines,
        "alpha": letters / n_chars, "alnum": (letters + digits) / n_chars,
        "code_ratio": sum(len(x) for x in lines if CODE_LINE.match(x[:500])) / max(1, sum(lengths)),
        "comment_ratio": sum(len(x) for x in lines if COMMENT_LINE.match(x)) / max(1, sum(lengths)),
        "compression": len(zlib.compress(raw, 1)) / max(1, len(raw))}
    if not spaceless:
        out["mean_word_length"] = sum(map(len, words)) / n_words
        out["alpha_words"] = sum(alphabetic.values()) / n_words
    if language in ("en", "unknown"):
        out["stop_words"] = sum(word in GOPHER_STOP_WORDS for word in vocabulary)
    out["dup_lines"], out["dup_line_chars"] = _duplicates(lines, n_chars)
    out["dup_paragraphs"], out["dup_paragraph_chars"] = _duplicates(
        [p for p in map(str.strip, text.split("\n\n")) if p], n_chars)
    out |= _ngrams(words, n_chars)
    windows = [lower[i:i + 100] for i in range(0, max(1, len(lower) - 50), 100)]
    unique = sum(len(set(w)) / max(1, len(w)) for w in windows) / len(windows)
    plain = sum(n for word, n in alphabetic.items() if word not in STOP_WORDS["en"]) / n_words
    out["unique_words"] = unique                # within 100 words, or every long text would look repetitive
    out["format"] = (min(1, out["alpha"] / 0.7) + min(1, unique / 0.7) + min(1, out["sentences"] / 2)) / 3
    out["content"] = (min(1, out["compression"] / 0.25) + 1 - max(out["dup_5gram"], out["dup_line_chars"])
                      + min(1, plain / 0.4)) / 3
    if settings.keyword_pattern:
        found = sum(1 for _ in settings.keyword_pattern.finditer(text.lower()))
        out["keyword_density"] = found / n_words
        out["relevance"] = min(1, out["keyword_density"] / 0.01)
    if settings.log_odds is not None:
        features = _features(lower)
        out["log_odds"] = float(settings.log_odds[features].mean()) if len(features) else 0.0
        out.setdefault("relevance", 1 / (1 + math.exp(-max(-50.0, min(50.0, out["log_odds"])))))
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in out.items()}


def _letters_and_digits(text, raw):
    """Letters and digits of a text; the ASCII ones are counted in its UTF-8 bytes, which is fast."""
    letters, digits = (len(raw) - len(raw.translate(None, chars)) for chars in (ASCII_LETTERS, ASCII_DIGITS))
    if not text.isascii():
        other = "".join(re.findall(r"[^\x00-\x7f]+", text))
        letters, digits = letters + sum(map(str.isalpha, other)), digits + sum(map(str.isdigit, other))
    return letters, digits


def _duplicates(items, n_chars):
    """(share of items seen before, their characters as a share of the text's)."""
    seen, repeated, chars = set(), 0, 0
    for item in items:
        if item in seen:
            repeated, chars = repeated + 1, chars + len(item)
        seen.add(item)
    return repeated / max(1, len(items)), chars / n_chars


def _ngrams(words, n_chars):
    """Share of characters in the most frequent 2- to 4-gram, and in 5- to 10-grams that occurred before (greedily, from
    the left, without overlap). N-grams are compared by 64-bit hashes."""
    out = {f"top_{n}gram": 0.0 for n in (2, 3, 4)} | {f"dup_{n}gram": 0.0 for n in range(5, 11)}
    table = {}
    ids = np.array([table.setdefault(word, len(table)) for word in words], np.uint64) + np.uint64(1)
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    grams = ids
    for n in range(2, min(10, len(ids)) + 1):
        grams = grams[:-1] * np.uint64(0x9E3779B97F4A7C15) + ids[n - 1:]
        ordered = np.sort(grams)
        same = ordered[1:] == ordered[:-1]
        if not same.any():
            break                                       # nor does any longer one repeat
        if n < 5:
            edges = np.flatnonzero(np.concatenate([[True], ~same, [True]]))
            counts = np.diff(edges)
            most = counts.max()
            at = np.isin(grams, ordered[edges[:-1][counts == most]]).argmax()        # the first of the most frequent
            out[f"top_{n}gram"] = min(1.0, float(most * (starts[at + n] - starts[at] - 1) / n_chars))
            continue
        repeated = np.flatnonzero(np.isin(grams, ordered[1:][same]))
        seen, chars, free = set(), 0, 0
        for i, gram in zip(repeated.tolist(), grams[repeated].tolist()):
            if i < free:
                continue
            if gram in seen:
                chars, free = chars + int(starts[i + n] - starts[i]) - 1, i + n
            seen.add(gram)
        out[f"dup_{n}gram"] = chars / n_chars
    return out


_DETECTOR = []              # lingua's, built in a worker when the first document asks for it


def identify(text: str, words, lingua: bool) -> tuple[str, float]:
    """(ISO 639-1 code or "unknown", certainty). Lingua on the first 600 characters; else by script and stop words."""
    if lingua:
        if not _DETECTOR:
            from lingua import LanguageDetectorBuilder
            _DETECTOR.append(LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build())
        best = _DETECTOR[0].compute_language_confidence_values(text[:600])[0]
        return (best.language.iso_code_639_1.name.lower(), best.value) if best.value else ("unknown", 0.0)
    sample = text[:4000]
    if not sample.isascii():
        total = max(1, sum(map(str.isalpha, sample)))
        shares = {code: len(script.findall(sample)) / total for code, script in SCRIPTS.items()}
        code = "ja" if shares["ja"] > 0.1 else max(shares, key=shares.get)
        if shares[code] > 0.4 or code == "ja":
            return code, min(1.0, shares[code] + (shares["zh"] if code == "ja" else 0))
    hits = {language: sum(words[w] for w in stop) for language, stop in STOP_WORDS.items()}
    language = max(hits, key=hits.get)
    total = sum(hits.values())
    return (language, hits[language] / total) if hits[language] >= 2 else ("unknown", 0.0)


def _features(words):
    """Buckets of the words and word pairs of a text, int64."""
    hashes = np.array([zlib.crc32(word.encode()) for word in words], np.uint64)
    pairs = hashes[:-1] * np.uint64(0x9E3779B97F4A7C15) + hashes[1:]
    return (np.concatenate([hashes, pairs >> np.uint64(20)]) % np.uint64(BUCKETS)).astype(np.int64)


def log_odds(domain, general) -> np.ndarray:
    """float32 [BUCKETS]: ln p(n-gram | domain) - ln p(n-gram | general), smoothed by one half, from two iterables of
    texts of which about 20 MB are read. DSIR's features (arXiv:2302.03169): hashed words and word pairs."""
    logs = []
    for texts in (domain, general):
        counts, left = np.full(BUCKETS, 0.5), SAMPLE_BYTES
        for text in texts:
            counts += np.bincount(_features(text[:left].lower().split()), minlength=BUCKETS)
            left -= len(text)
            if left <= 0:
                break
        if left == SAMPLE_BYTES:
            raise ValueError("one side of the log-odds (--general, --domain-seed) holds no text")
        logs.append(np.log(counts / counts.sum()))
    return (logs[0] - logs[1]).astype(np.float32)


def quality(scores: dict, weights: dict = WEIGHTS) -> float:
    """Weighted mean of the parts that were computed (SPEC, Corpus)."""
    parts = {name: scores[name] for name in weights if name in scores}
    total = sum(weights[name] for name in parts)
    return round(sum(weights[name] * value for name, value in parts.items()) / total, 4) if total else 0.0


# ---- one document

def clean_document(record: dict, settings: Settings) -> list[dict]:
    """The record's parts, scored and not yet gated; one part unless it is longer than settings.max_chars.

    A record that carries the scores of this very text is returned as it is; scores of an older version, or of a text
    that was edited since (dedup.py --paragraphs), are replaced. All other keys of the record are kept.
    """
    metadata = record.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {} if metadata is None else {"metadata": metadata}
    foreign = metadata["scores"] if isinstance(metadata.get("scores"), dict) else {}
    if metadata.get("cleaned"):
        if _is_scored(record["text"], metadata):
            return [record]
        foreign = {name: value for name, value in foreign.items() if name not in NAMES}
    code = settings.preset == "code"
    text = corpus.utf8(record["text"] or "").decode()
    if settings.repair and not code:
        text = repair(text)
    text, lost = drop_lines(normalise(text, code), settings.preset)
    parts = split(domain_form(text, settings), settings.max_chars)
    out = []
    for number, part in enumerate(parts, 1):
        part, counts = scrub(part.strip("\n")) if settings.pii else (part.strip("\n"), {})
        scores = score(part, settings) | {"boilerplate": round(lost, 4), "pii": sum(counts.values())}
        scores |= {f"pii_{name}": n for name, n in counts.items()}
        place = {"part": number, "parts": len(parts)} if len(parts) > 1 else {}
        out.append({**record, "text": part, "id": f"{record['id']}/{number}" if place else record["id"], "metadata": {
            **metadata, **place, "domain": metadata.get("domain") or settings.domain or settings.preset,
            "content_hash": _hash(part),
            "cleaned": {"version": SCORES_VERSION, "preset": settings.preset},
            "scores": {**foreign, **scores}}})
    return out


def _hash(text):
    return hashlib.blake2b(corpus.utf8(text), digest_size=16).hexdigest()


def _is_scored(text, metadata):
    cleaned, scores = metadata["cleaned"], metadata.get("scores")
    return (isinstance(cleaned, dict) and cleaned.get("version") == SCORES_VERSION
            and str(cleaned.get("preset")) in PRESETS and isinstance(text, str)
            and metadata.get("content_hash") == _hash(text) and isinstance(scores, dict)
            and all(isinstance(scores[name], (int, float)) for name in NAMES & scores.keys()))


# ---- reading

def expand(paths) -> list[str]:
    """The files that `paths` name, with those of folders in order of name; ValueError where there are none."""
    files = []
    for path in paths:
        if path.startswith("hf://") or not os.path.isdir(path):
            files.append(path)
            continue
        inside = sorted(str(p) for p in Path(path).rglob("*") if p.is_file() and p.suffix.lower() not in corpus.NOT_TEXT
                        and not any(part.startswith(".") for part in p.relative_to(path).parts))
        if not inside:
            raise ValueError(f"{path} holds no file to read; .jsonl[.gz|.zst], .parquet or text is wanted")
        files += [str(Path(path, name)) for name in OUTPUTS] if Path(path, "drops.json").is_file() else inside
    return files


def read_records(path: str, documents: str | None = None, column: str = "text", config: str | None = None,
                 split: str = "train"):
    """Yield {"text", "id", "metadata", ...} of a file or an hf://org/dataset; errors name the file and the record.

    A null text is an empty one. A text file is one document, a .txt one a block between blank lines, as in data.py,
    unless `documents` says line, blank or file. metadata.source is the file's name where the record names none.
    """
    stem, source = re.sub(r"\.(gz|zst)$", "", path), path if path.startswith("hf://") else Path(path).name
    rule = documents or ("blank" if stem.endswith(".txt") else "file")
    reading = Reading(rule, column=column, config=config, split=split)
    records = corpus.read_records([path], reading, allow_null=True)
    try:
        for number, (_, record) in enumerate(records, 1):
            record = {"text": record[column], **{k: v for k, v in record.items() if k not in ("text", column)}}
            record["id"] = f"{source}/{number}" if record.get("id") is None else record["id"]
            if not isinstance(record.get("metadata"), dict):
                record["metadata"] = {} if record.get("metadata") is None else {"metadata": record["metadata"]}
            record["metadata"] = {"source": record.get("source") or source, **record["metadata"]}
            if record.get("domain"):
                record["metadata"].setdefault("domain", record["domain"])
            yield record
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"input file {path} cannot be read: {error}; convert it or fetch it again") from None


# ---- the whole corpus

OUTPUTS = ("kept.jsonl", "dropped.jsonl.gz")
SAMPLES = 5                 # shown per reason, and of the kept
BATCH_CHARS = 1 << 20       # sent to a worker at a time


def _clean_batch(settings, records):
    """(one JSON line a part, characters that went in)."""
    lines = [_line(part) for record in records for part in clean_document(record, settings)]
    return lines, sum(len(record["text"] or "") for record in records)


def _line(record) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:                      # half a surrogate pair in the metadata: escaped, as it came
        return (json.dumps(record, default=str) + "\n").encode()


def scored_lines(records, settings: Settings, workers: int):
    """Yield (JSON lines, characters) of each batch, in the order of the records whatever the workers."""
    batches = batches_by_size(records, lambda record: len(record["text"] or "") + 100, BATCH_CHARS)
    with WorkerPool(workers, settings) as pool:
        yield from pool.map(_clean_batch, batches)


def _scored(path, weights):
    """The records of phase one, each with its composite quality."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            scores = record["metadata"]["scores"]
            scores["quality"] = quality(scores, weights)
            yield record


def _add_perplexity(path, perplexity):
    """Phase two, on request: perplexity of each text, and SPEC's score of it, 1 - perplexity / 100 and 0 above."""
    after, batch = path.with_suffix(".perplexity"), []

    def flush(file):
        for record, value in zip(batch, perplexity([record["text"] for record in batch])):
            scores = record["metadata"]["scores"]
            if value is not None and math.isfinite(value):
                scores |= {"perplexity": round(value, 4), "perplexity_score": round(max(0.0, 1 - value / 100), 4)}
            file.write(_line(record))
        batch.clear()

    try:
        with open(after, "wb") as file:
            for record in _scored(path, WEIGHTS):
                batch.append(record)
                if len(batch) == 64:
                    flush(file)
            flush(file)
        after.replace(path)
    finally:
        after.unlink(missing_ok=True)


def resolve(rules: dict, records) -> dict:
    """Rules whose percentile limits ("p5") are numbers: percentiles of the records' scores, empty texts left out."""
    wanted = {name: [] for name, limits in rules.items()
              if name != "language" and any(isinstance(x, str) for x in limits)}
    if not wanted:
        return rules
    for record in records:
        for name, values in wanted.items():
            if record["text"] and name in record["metadata"]["scores"]:
                values.append(record["metadata"]["scores"][name])

    def number(limit, values):
        if not isinstance(limit, str):
            return limit
        return float(np.percentile(values, float(limit[1:]))) if values else None
    return {name: tuple(number(x, wanted[name]) for x in limits) if name in wanted else limits
            for name, limits in rules.items()}


def broken(scores: dict, rules: dict) -> list[str]:
    """Names of the rules that these scores break; a rule whose score was not computed does not apply."""
    def breaks(name, limits):
        value = scores.get(name)
        if name == "language":
            return value not in limits
        low, high = limits
        return value is not None and ((low is not None and value < low) or (high is not None and value > high))
    return [name for name, limits in rules.items() if breaks(name, limits)]


def _gate(records, rules, kept_file, dropped_file, settings, weights):
    """Phase three: every part to one of the two files; returns the report."""
    reasons = {name: {"limits": list(limits), "dropped": 0, "only_reason": 0} for name, limits in rules.items()}
    samples, pii, cleaned_by, presets, totals = {}, Counter(), Counter(), Counter(dict.fromkeys(PRESETS, 0)), Counter()
    statistics = {"source": {}, "domain": {}}
    for record in records:
        metadata, scores = record["metadata"], record["metadata"]["scores"]
        why = broken(scores, rules)
        metadata.pop("dropped", None)
        if why:
            metadata["dropped"] = why
        (dropped_file if why else kept_file).write(_line(record))
        for name in why:
            reasons[name]["dropped"] += 1
            reasons[name]["only_reason"] += len(why) == 1
        for name in why or ["kept"]:
            _sample(samples.setdefault(name, []), record, name)
        presets.update(name for name in PRESETS if not broken(scores, PRESETS[name]))
        pii.update({name[4:]: n for name, n in scores.items() if name.startswith("pii_")})
        cleaned_by[metadata["cleaned"]["preset"]] += 1
        nbytes = len(record["text"].encode())           # a token has about four, in English and by most tokenizers
        row = {"documents": int(metadata.get("part", 1) == 1), "parts": 1, "bytes": nbytes, "kept": int(not why),
               "dropped": int(bool(why)), "bytes_kept": 0 if why else nbytes,
               "estimated_tokens": nbytes // 4, "estimated_tokens_kept": 0 if why else nbytes // 4}
        for counts in (totals, *(table.setdefault(_plain(metadata.get(key) or "unknown"), Counter())
                                 for key, table in statistics.items())):
            counts.update(row)
    return {"preset": settings.preset, "weights": weights, **totals, "reasons": reasons,
            "pii": dict(sorted(pii.items())), "kept_by_preset": presets, "cleaned_by": cleaned_by,
            "statistics": {key: dict(sorted(table.items())) for key, table in statistics.items()},
            "samples": {name: [row for _, row in rows] for name, rows in sorted(samples.items())}}


def _plain(value):
    return corpus.utf8(str(value)).decode()             # half a surrogate pair fits no report


def _sample(rows, record, name):
    """Keep the SAMPLES records with the lowest hash: a fair sample that no order of records changes."""
    metadata = record["metadata"]
    key = f"{record['id']} {metadata['content_hash']}".encode(errors="replace")
    order = hashlib.blake2b(key, digest_size=8).hexdigest()
    if len(rows) < SAMPLES or order < rows[-1][0]:
        row = {"id": _plain(record["id"]), "score": metadata["scores"].get("quality" if name == "kept" else name),
               "text": record["text"][:300]}
        rows.append((order, row))
        rows.sort(key=lambda pair: pair[0])
        del rows[SAMPLES:]


def run(records, settings: Settings, out, rules: dict | None = None, weights: dict = WEIGHTS, workers: int = 1,
        perplexity=None, overwrite: bool = False, progress=None) -> dict:
    """Clean `records` into the folder `out`; returns the report that drops.json holds.

    `rules`: {score: (low, high)}, by default the preset's; a limit "p5" is the 5th percentile of that score.
    `perplexity`: texts -> a float or None each, called in this process. The result depends neither on `workers` nor
    on a run that was killed before; every file appears whole, drops.json last.
    """
    out = Path(out)
    scored, kept, dropped, last = (out / f".{name}.partial" for name in ("scored", *OUTPUTS, "drops.json"))
    for name in ("drops.json", *(OUTPUTS if not last.exists() else ())):      # which a run killed at its end leaves
        if (out / name).exists() and not overwrite:
            raise ValueError(f"{out / name} exists already; choose another --out, or add --overwrite to replace it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{out} is a file, or lies in one; --out names a folder") from None
    try:
        with open(scored, "wb") as file:
            for lines, chars in scored_lines(records, settings, workers):
                file.writelines(lines)
                if progress:
                    progress(chars)
        if perplexity:
            _add_perplexity(scored, perplexity)
        rules = resolve(PRESETS[settings.preset] if rules is None else rules, _scored(scored, weights))
        with open(kept, "wb") as kept_file, open(dropped, "wb") as raw, \
                gzip.GzipFile("", "wb", 1, raw, mtime=0) as dropped_file:
            report = _gate(_scored(scored, weights), rules, kept_file, dropped_file, settings, weights)
        if "parts" not in report:
            raise ValueError("nothing to clean: the input holds no document")
        write_json(last, report)
        (out / "drops.json").unlink(missing_ok=True)
        for path, name in ((kept, OUTPUTS[0]), (dropped, OUTPUTS[1]), (last, "drops.json")):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            path.rename(out / name)
    finally:
        for path in (scored, kept, dropped, last):
            path.unlink(missing_ok=True)
    return report


# ---- perplexity under a model of the user's choice

def model_perplexity(folder: str, context: int = 512, rows: int = 8):
    """texts -> perplexity of the first `context` tokens of each under the causal model in `folder`, or None.

    Rows are padded on the right, which a causal model does not see.
    """
    import torch

    import hf
    import tokenizer as tokenizers
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = tokenizers.load(folder)
    model = hf.load(folder, device=device).eval()
    prefix = token_before_document(tokenizer)
    context = min(context, model.config.max_position_embeddings)

    @torch.no_grad()
    def perplexity(texts):
        starts = tokenizer.encode_batch([text[:16 * context] for text in texts])
        encoded = [[prefix, *map(int, ids[:context])] for ids in starts]
        out = []
        for i in range(0, len(encoded), rows):
            batch = encoded[i:i + rows]
            longest = max(2, max(map(len, batch)))
            tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in batch], device=device)    # [B, T+1]
            mask = torch.arange(longest - 1, device=device) < torch.tensor([[len(ids) - 1] for ids in batch]).to(device)
            logits = model.head(model(tokens[:, :-1])).float()                                           # [B, T, V]
            nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
            sums, counts = (nats * mask).sum(1).tolist(), mask.sum(1).tolist()
            out += [math.exp(min(total / n, 700)) if n else None for total, n in zip(sums, counts)]
        return out
    return perplexity


# ---- command line

def parse_rules(preset: str, changes) -> dict:
    """The preset's rules with NAME=LOW:HIGH laid over them (either side may be empty, or a percentile such as p95);
    NAME=off takes a rule away."""
    rules = dict(PRESETS[preset])
    for change in changes:
        name, equals, limits = change.partition("=")
        if not equals or name not in NAMES:
            raise ValueError(f"--rule {change}: " + (f"unknown score {name}{nearest(name, NAMES)}" if equals else
                                                     "write NAME=LOW:HIGH, or NAME=off"))
        if limits == "off":
            rules.pop(name, None)
            continue
        match = re.fullmatch(r"(p?-?\d+(?:\.\d+)?)?:(p?-?\d+(?:\.\d+)?)?", limits)
        if not match:
            raise ValueError(f"--rule {change}: write LOW:HIGH, such as 50:100000, 0.5: or p5:p95, or off")
        rules[name] = tuple(x if x is None or x.startswith("p") else float(x) for x in match.groups())
        if any(isinstance(x, str) and not 0 <= float(x[1:]) <= 100 for x in rules[name]):
            raise ValueError(f"--rule {change}: a percentile lies from p0 to p100")
    return rules


def parse_weights(text: str) -> dict:
    weights = dict(WEIGHTS)
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        name = {"perplexity": "perplexity_score"}.get(name, name)
        try:
            weights[name] = float(value) if name in WEIGHTS else 1 / 0
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"--weights {item}: write perplexity=0.3,format=0.2,content=0.3,relevance=0.2") from None
    if min(weights.values()) < 0 or not sum(weights.values()):
        raise ValueError(f"--weights {text}: none below 0, and not all of them 0")
    return weights


def show(report: dict, out):
    print(f"{report['documents']:,} documents in {report['parts']:,} parts: {report['kept']:,} kept "
          f"({report['kept'] / report['parts']:.1%}), {report['dropped']:,} dropped; about "
          f"{report['estimated_tokens_kept']:,} tokens in {out}/kept.jsonl")
    print(f"  {report['megabytes_per_second']:.2f} MB/s, {report['workers']} workers; on these scores the presets keep "
          + ", ".join(f"{name} {n / report['parts']:.1%}" for name, n in report["kept_by_preset"].items()))
    if set(report["cleaned_by"]) != {report["preset"]}:
        print(f"  texts cleaned before, by {', '.join(report['cleaned_by'])}: only the gate is {report['preset']}'s")
    for name, row in sorted(report["reasons"].items(), key=lambda item: -item[1]["dropped"]):
        if row["dropped"]:
            limits = ",".join(row["limits"]) if name == "language" else " to ".join(
                "any" if x is None else f"{x:g}" for x in row["limits"])
            print(f"  {name:20} {limits:>18}   dropped {row['dropped']:>9,}   as only reason {row['only_reason']:>9,}")
    if report["pii"]:
        print("  personal data replaced: " + ", ".join(f"{name} {n:,}" for name, n in report["pii"].items()))
    for key, table in report["statistics"].items():
        for name, row in list(table.items())[:20]:
            print(f"  {key} {name}: {row['parts']:,} parts, {row['kept']:,} kept, {row['bytes_kept']:,} bytes, "
                  f"about {row['estimated_tokens_kept']:,} tokens")


def main():
    p = ArgumentParser(prog="clean.py", description=__doc__)
    p.add_argument("files", nargs="+", metavar="FILE",
                   help=".jsonl[.gz|.zst], .parquet, text, a folder of them, or hf://org/dataset")
    p.add_argument("--preset", required=True, choices=PRESETS, help="rules and domain forms")
    p.add_argument("--out", required=True, help="folder to fill")
    p.add_argument("--rule", action="append", default=[], metavar="NAME=LOW:HIGH",
                   help="another limit for a score (dup_lines=:0.5, perplexity=p5:p95, sentences=off); may be repeated")
    p.add_argument("--weights", default="", metavar="NAME=W,...", help="of the composite quality: perplexity, format, "
                   "content, relevance (default: 0.3, 0.2, 0.3, 0.2)")
    p.add_argument("--min-chars", type=int, default=100, help="shorter documents are dropped (default: 100)")
    p.add_argument("--max-chars", type=int, default=100_000, help="longer documents are split (default: 100000)")
    p.add_argument("--language", metavar="CODE,...", help="keep these languages (ISO 639-1), such as en,de")
    p.add_argument("--lingua", action="store_true", help="identify languages with lingua instead of a light guess")
    p.add_argument("--keywords", metavar="FILE", help="terms of the domain, one a line: density against 0.01")
    p.add_argument("--general", metavar="FILE", help="a general corpus: n-gram log-odds of the domain against it")
    p.add_argument("--domain-seed", metavar="FILE", help="the domain's side of the log-odds (default: the input)")
    p.add_argument("--perplexity", metavar="MODEL_DIR", help="perplexity under this model; gate above the 95th "
                   "percentile unless --rule perplexity=LOW:HIGH says otherwise")
    p.add_argument("--domain", default="", help="metadata.domain where a record has none (default: the preset)")
    p.add_argument("--expand-abbreviations", action="store_true", help="pt, hx, dx, rx, tx, where unambiguous")
    p.add_argument("--no-pii", action="store_false", dest="pii", help="leave personal data in")
    p.add_argument("--no-repair", action="store_false", dest="repair", help="no Unicode repair by ftfy")
    p.add_argument("--documents", choices=("line", "blank", "file"), help="what a document of a text file is "
                   "(default: .txt a block between blank lines, anything else the file)")
    p.add_argument("--column", default="text", help="where a record keeps its text (default: text)")
    p.add_argument("--config", help="configuration of a Hub dataset")
    p.add_argument("--split", default="train", help="split of a Hub dataset (default: train)")
    p.add_argument("--workers", type=int, default=1, help="processes (default: 1); the result is the same")
    p.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in --out")
    p.add_argument("--json", metavar="FILE", help="write the report there too")
    args = p.parse_args()
    if args.workers < 1 or args.max_chars < max(1, args.min_chars):
        raise ValueError(f"--workers {args.workers}, --min-chars {args.min_chars}, --max-chars {args.max_chars}: there "
                         "must be a worker, and the longest document is no shorter than the shortest")
    rules, weights, files = parse_rules(args.preset, args.rule), parse_weights(args.weights), expand(args.files)
    if "chars" in rules and rules["chars"] == COMMON["chars"]:
        rules["chars"] = (args.min_chars, None)
    if args.language:
        rules["language"] = tuple(args.language.lower().split(","))
    if args.perplexity:
        rules.setdefault("perplexity", (None, "p95"))

    def reader(paths):
        for path in paths:
            yield from read_records(path, args.documents, args.column, args.config, args.split)

    for path in files:                          # all of them, before any work
        next(reader([path]), None)
    keywords = tuple(text.strip() for text in corpus.read_documents([args.keywords], Reading("line")) if text.strip()) \
        if args.keywords else ()
    odds = None
    if args.general:
        sides = expand([args.domain_seed]) if args.domain_seed else files, expand([args.general])
        odds = log_odds(*((record["text"] or "" for record in reader(side)) for side in sides))
    settings = Settings(args.preset, args.domain, args.max_chars, args.repair, args.pii, args.expand_abbreviations,
                        args.lingua, keywords, odds)
    perplexity = model_perplexity(args.perplexity) if args.perplexity else None
    start, done = time.perf_counter(), 0
    with tqdm(unit="B", unit_scale=True, disable=None, desc="clean") as bar:
        def progress(chars):
            nonlocal done
            done += chars
            bar.update(chars)
        report = run(reader(files), settings, args.out, rules, weights, args.workers, perplexity, args.overwrite,
                     progress)
    report |= {"megabytes_per_second": done / 1e6 / (time.perf_counter() - start), "workers": args.workers}
    show(report, args.out)
    if args.json:
        write_json(args.json, report)


# ---- beyond one machine

def datatrove_step(preset: str, rules: dict | None = None, weights: dict = WEIGHTS, **settings):
    """A preset as a step of a datatrove pipeline (Local, Slurm and Ray executors), for any number of tasks: the records
    that `run` keeps, with their scores. `settings`: fields of Settings.

    A worker unpickles the step by importing this file, so its folder must be on PYTHONPATH there. A percentile limit
    needs the whole corpus, and a task sees its own part: limits must be numbers here.
    """
    need("datatrove", "which brings the executors", "datatrove")
    from datatrove.pipeline.base import PipelineStep
    options, rules = Settings(preset, **settings), PRESETS[preset] if rules is None else rules
    for name, limits in rules.items():
        if name != "language" and any(isinstance(limit, str) for limit in limits):
            raise ValueError(f"the limits of {name} are {limits}, but a task sees no percentile of the whole corpus; "
                             "give the numbers that drops.json of a sample shows")

    class Clean(PipelineStep):
        name, type = f"nanoCPT, {preset}", "CLEAN"

        def run(self, documents, rank: int = 0, world_size: int = 1):
            for document in documents:
                self.stat_update("total")
                with self.track_time():
                    parts = clean_document({"text": document.text, "id": document.id, "metadata": document.metadata},
                                           options)
                for part in parts:
                    scores = part["metadata"]["scores"]
                    scores["quality"] = quality(scores, weights)
                    why = broken(scores, rules)
                    self.stat_update(*([f"dropped_{name}" for name in why] or ["forwarded"]))
                    if not why:
                        yield dataclasses.replace(document, **part)
    return Clean()


if __name__ == "__main__":
    sys.exit(main_guard(main))
