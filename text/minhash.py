"""Near-duplicates by MinHash: a text's words, hashes of its n-grams, signatures, bands, candidate pairs, the verdict.

A document is the set of its 5-word shingles. MinHash (Broder 1997) estimates how similar two sets are: under a random
hash function their least hashes are equal with probability s, the Jaccard similarity. A signature has 14 bands of 8
such hashes (FineWeb's numbers), and two sets that agree in all 8 hashes of any band are a candidate pair; a pair of
similarity s becomes one with probability 1 - (1 - s^8)^14. The verdict then compares the sets themselves.

U texts, G n-grams of one text, M members of the groups of one band.
"""

import functools
import itertools
import re
import unicodedata

import numpy as np
from tqdm import tqdm

from core.hashing import fmix64
from core.pool import batches_by_size
from text.corpus import utf8

BANDS, ROWS, SHINGLE = 14, 8, 5
# Thai, Lao, Myanmar, Khmer, kana and Han are written without spaces.
SPACELESS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
                       "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]")
# A random value for each byte, the base of the polynomial hash, and the 112 hash functions x -> SCALE x + SHIFT.
BYTE_VALUES, BASE = fmix64(np.arange(1, 257)), 0x9E3779B97F4A7C15
SCALE, SHIFT = fmix64(np.arange(101, 101 + BANDS * ROWS)) | np.uint64(1), fmix64(np.arange(301, 301 + BANDS * ROWS))
ROW_WEIGHTS = fmix64(np.arange(1, ROWS + 1)) | np.uint64(1)


# ---- text -> words -> hashes -> band keys

def fold_words(text: str) -> str:
    """The words that are compared, one space between them: NFC, casefolded; in scripts without spaces, each letter.

    Punctuation stays, because `a - b` is not `a + b` and $1,000 is not $1.000.
    """
    if text.isascii():
        return " ".join(text.lower().split())
    text = unicodedata.normalize("NFC", utf8(text).decode()).casefold()
    return " ".join(SPACELESS.sub(r" \g<0> ", text).split())


@functools.lru_cache(maxsize=2)
def _powers(base: int, blocks: int) -> np.ndarray:
    """base^1, base^2, ... modulo 2^64, as many as there are bytes in so many blocks of 256 KB."""
    return np.cumprod(np.full(blocks << 18, base, np.uint64))


def hash_ngrams(texts: list[str], n: int) -> list[np.ndarray]:
    """uint64 [G] for each of the folded texts: a hash of every n words, in order and with repeats.

    "a b c d" with n = 3 has two, of "a b c" and "b c d". A text of fewer words has one, an empty one has none.

    The hash of the bytes b[s:e] is the polynomial of their BYTE_VALUES in BASE modulo 2^64 (Rabin-Karp): a difference
    of two prefix sums, divided by BASE^s so that it does not depend on the place. There is no loop over words.
    """
    if not texts:
        return []
    counts = [text.count(" ") + 1 for text in texts]
    flat = np.frombuffer("\n".join([*texts, ""]).encode(), np.uint8)
    word_ends = np.flatnonzero((flat == 32) | (flat == 10))
    word_starts = np.append(0, word_ends[:-1] + 1)
    blocks = (len(flat) >> 18) + 1
    prefix = np.append(np.uint64(0), np.cumsum(BYTE_VALUES[flat] * _powers(BASE, blocks)[:len(flat)]))
    text_ends = np.cumsum(counts)
    last = np.minimum(np.arange(len(word_starts)) + n, np.repeat(text_ends, counts)) - 1
    sums = prefix[word_ends[last]] - prefix[word_starts]
    grams = fmix64(sums * _powers(pow(BASE, -1, 1 << 64), blocks)[word_starts])
    return [grams[end - count:max(end - count + 1, end - n + 1)] if text else grams[:0]
            for text, count, end in zip(texts, counts, text_ends.tolist())]


def compute_signatures(sets: list[np.ndarray]) -> np.ndarray:
    """uint64 [U, BANDS * ROWS]: the least hash of each set under 112 hash functions; all ones for an empty one."""
    out = np.full((len(sets), BANDS * ROWS), ~np.uint64(0))
    filled = [i for i, hashes in enumerate(sets) if len(hashes)]
    # As many sets at a time as fit the cache.
    for group in batches_by_size(filled, lambda i: len(sets[i]), 1 << 15):
        flat = np.concatenate([sets[i] for i in group])
        starts = np.cumsum([0] + [len(sets[i]) for i in group[:-1]])
        buffer = np.empty_like(flat)
        for k in range(BANDS * ROWS):
            np.multiply(flat, SCALE[k], out=buffer)
            np.add(buffer, SHIFT[k], out=buffer)
            out[group, k] = np.minimum.reduceat(buffer, starts)
    return out


def compute_band_keys(sets: list[np.ndarray]) -> np.ndarray:
    """uint64 [U, BANDS]: two sets share a key where their signatures agree in all rows of the band."""
    rows = compute_signatures(sets).reshape(len(sets), BANDS, ROWS)
    return fmix64((rows * ROW_WEIGHTS).sum(2, dtype=np.uint64)).reshape(len(sets), BANDS)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The Jaccard similarity, 0 to 1, of two arrays [at least 1] without repeats."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


# ---- candidates and the verdict

def link_band(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys of one band, uint64 [U], best text first -> (members uint32 [M], bool [M]: where a group begins).

    A group is the texts that share a key, two or more of them, best first: keys 7 7 9 7 give members 0 1 3.
    """
    order = keys.argsort(kind="stable")
    same = np.diff(keys[order]) == 0
    # Without a key, both are empty.
    before, after = np.append(False, same)[:len(keys)], np.append(same, False)[:len(keys)]
    shared = before | after
    return order[shared].astype(np.uint32), ~before[shared]


def keep_best(bands: list, n: int, shingles, threshold: float) -> tuple[np.ndarray, np.ndarray, int]:
    """From best to worst, keep a text unless it is `threshold` similar to a kept one with which it shares a band.

    bands: what `link_band` gives of each, for texts 0 (best) to n - 1. shingles(i): the hashes of text i without
    repeats. Returns (stays int64 [n]: the text that stays in its place; similarity float64 [n] to it; pairs compared).

    Let 0 and 1 be 0.9 similar, 1 and 2 too, 0 and 2 only 0.7, and the threshold 0.8. 0 stays. 1 goes: it resembles 0.
    2 stays: it resembles 1, which is not there any more, but not 0. No chain removes what is unlike all that is kept.
    """
    members, begins = map(np.concatenate, zip(*bands))
    # The order of the groups tells where each group's list begins; the walk needs the order of the texts.
    starts, group = np.flatnonzero(begins), np.cumsum(begins, dtype=np.uint32) - 1
    order = members.argsort(kind="stable")
    group, members = group[order], members[order]
    del order
    edges = np.append(np.unique(members, return_index=True)[1], len(members))
    # A kept text joins the list of each of its groups, where a later text finds all kept ones that it may resemble.
    kept, fill = np.zeros(len(members), np.uint32), np.zeros(len(starts), np.int64)
    stays, similarity, compared = np.arange(n), np.ones(n), 0
    for low, high in tqdm(itertools.pairwise(edges), "compare", len(edges) - 1, unit=" documents", disable=None):
        text, own = int(members[low]), group[low:high]
        candidates = set()
        for start, length in zip(starts[own].tolist(), fill[own].tolist()):
            if length:
                candidates.update(kept[start:start + length].tolist())
        mine = shingles(text) if candidates else None
        for other in sorted(candidates):
            s = jaccard(mine, shingles(other))
            compared += 1
            if s >= threshold:
                stays[text] = other
                similarity[text] = s
                break
        else:
            kept[starts[own] + fill[own]] = text
            fill[own] += 1
    return stays, similarity, compared
