"""What is a copy of what: words, MinHash, overlaps with benchmarks, the units of a corpus on disk, and the verdict.

A document is the set of its 5-word shingles. MinHash (Broder 1997) estimates how similar two sets are: under a random
hash function their least hashes are equal with probability s, the Jaccard similarity. A signature has 14 bands of 8
such hashes (FineWeb's numbers), and two sets that agree in all 8 hashes of any band are a candidate pair; a pair of
similarity s becomes one with probability 1 - (1 - s^8)^14. The verdict then compares the sets themselves.

A unit is a document, or a paragraph where paragraphs are compared. The first pass over a file leaves a folder of units:

    units         UNIT [U]: hashes of the words and of the record, length, sizes of shingles and id, is it a candidate
    bands         uint64 [U, BANDS]: the band keys
    shingles      uint64 [G]: hashes of the shingles
    ids           the ids as JSON, one after the other
    signed.json   the number of documents, and which units overlap with benchmarks

U units, G n-grams, R units with different words, M members of the groups of one band.
"""

import contextlib
import functools
import itertools
import json
import re
import struct
import unicodedata
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.cli import Reading
from core.errors import UserError
from core.files import new_folder, read_json, write_json
from core.hashing import fmix64
from core.pool import WorkerPool, batches_by_size
from text.corpus import read_records, read_values, utf8
from text.repair import SPACELESS_SIGN

BANDS, ROWS, SHINGLE = 14, 8, 5
# A random value for each byte, the base of the polynomial hash, and the 112 hash functions x -> SCALE x + SHIFT.
BYTE_VALUES, BASE = fmix64(np.arange(1, 257)), 0x9E3779B97F4A7C15
SCALE, SHIFT = fmix64(np.arange(101, 101 + BANDS * ROWS)) | np.uint64(1), fmix64(np.arange(301, 301 + BANDS * ROWS))
ROW_WEIGHTS = fmix64(np.arange(1, ROWS + 1)) | np.uint64(1)
# Words in a row that a document shares with a benchmark: GPT-3's rule (Brown et al. 2020, appendix C).
NGRAM = 13
UNIT = np.dtype([("exact", "<u8", 2), ("length", "<i8"), ("tie", "<u8", 2), ("shingles", "<u8"), ("ids", "<u8"),
                 ("candidate", "?")])
FILES = ("units", "bands", "shingles", "ids")
_to_canonical_json = json.JSONEncoder(sort_keys=True, default=str).encode


# ---- text -> words -> hashes -> band keys

def fold_words(text: str) -> str:
    """The words that are compared, one space between them: NFC, casefolded; in scripts without spaces, each letter.

    Punctuation stays, because `a - b` is not `a + b` and $1,000 is not $1.000.
    """
    if text.isascii():
        return " ".join(text.lower().split())
    text = unicodedata.normalize("NFC", utf8(text).decode()).casefold()
    return " ".join(SPACELESS_SIGN.sub(r" \g<0> ", text).split())


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
        for k in range(BANDS * ROWS):
            out[group, k] = np.minimum.reduceat(flat * SCALE[k] + SHIFT[k], starts)
    return out


def compute_band_keys(sets: list[np.ndarray]) -> np.ndarray:
    """uint64 [U, BANDS]: two sets share a key where their signatures agree in all rows of the band."""
    rows = compute_signatures(sets).reshape(len(sets), BANDS, ROWS)
    return fmix64((rows * ROW_WEIGHTS).sum(2, dtype=np.uint64)).reshape(len(sets), BANDS)


# ---- which documents hold text of a benchmark

class Benchmarks:
    """The 13-grams of benchmark files, sorted, each with the item in which it stands. A field under 13 words has none.

    files: {path: {"items": how many, "too_short": those without a 13-gram}}.
    """

    def __init__(self, paths: list[str], reading: Reading):
        # Of the options of reading, only the limits are about benchmarks too.
        reading = Reading(max_record_mb=reading.max_record_mb, max_expansion=reading.max_expansion)
        self.names, self.files, grams = [], {}, []
        for path in paths:
            of_file = [hash_plain(find_strings(item)) for _, item in read_values(path, reading, lists=True)]
            if not of_file:
                raise UserError(f"benchmark file {path} holds no item")
            grams += of_file
            self.names += [f"{path}:{number}" for number in range(1, len(of_file) + 1)]
            self.files[path] = {"items": len(of_file), "too_short": list(map(len, of_file)).count(0)}
        self.sizes = list(map(len, grams))
        owners, grams = np.repeat(np.arange(len(grams), dtype=np.uint32), self.sizes), np.concatenate(grams)
        order = grams.argsort(kind="stable")
        self.grams, self.owners = grams[order], owners[order]

    def find_overlaps(self, text: str) -> list[dict]:
        """The ten items that share most 13-grams with a text: the "item", "ngrams" and their "share" of the item's."""
        own = hash_plain([text])
        low, high = self.grams.searchsorted(own), self.grams.searchsorted(own, "right")
        owners = [self.owners[start:end] for start, end in zip(low, high) if start < end]
        items, shared = np.unique(np.concatenate([self.owners[:0], *owners]), return_counts=True)
        best = (-shared).argsort(kind="stable")[:10]
        return [{"item": self.names[i], "ngrams": n, "share": round(n / self.sizes[i], 4)}
                for i, n in zip(items[best].tolist(), shared[best].tolist())]


def hash_plain(texts) -> np.ndarray:
    """uint64, sorted, without repeats: hashes of the 13-grams of some texts. Punctuation does not count, because
    benchmarks and their copies write it in many ways."""
    plain = (" ".join(re.findall(r"\w+", fold_words(text))) for text in texts)
    grams = hash_ngrams([words for words in plain if words.count(" ") >= NGRAM - 1], NGRAM)
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *grams]))


def find_strings(value):
    """Yield every string in a value made of dicts and lists."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (dict, list)):
            stack += reversed(value.values() if isinstance(value, dict) else value)


# ---- the first pass

def split_paragraphs(text: str) -> list[str]:
    """[paragraph, break, paragraph, ...], which join to the text; a break is one or more blank lines."""
    return re.split(r"(\n(?:[^\S\n]*\n)+)", text)


def read_identified(path: str, reading: Reading):
    """Yield (id, record) of each document of a file; a record without an id is called FILE:NUMBER."""
    for number, (_, record) in enumerate(read_records([path], reading), 1):
        yield f"{path}:{number}" if record.get("id") is None else record["id"], record


def sign_batch(shared: tuple[Benchmarks | None, str, bool], batch: list) -> tuple:
    """The units of a batch [(id, record), ...], where `shared` is (benchmarks, column, whether to cut paragraphs).

    Returns (the content of the FILES, [(unit, its overlaps), ...], how many documents).
    """
    benchmarks, column, paragraphs = shared
    rows, folded, ids, hits = [], [], [], []
    for ident, record in batch:
        overlaps = benchmarks.find_overlaps(record[column]) if benchmarks else []
        if overlaps:
            hits.append((len(rows), overlaps))
        of_record = blake2b(_to_canonical_json([ident, record]).encode(), digest_size=8)
        for number, text in enumerate(split_paragraphs(record[column])[::2] if paragraphs else [record[column]]):
            words = fold_words(text)
            candidate = not overlaps and (not paragraphs or words.count(" ") >= SHINGLE - 1)
            # Equal paragraphs of one record differ by their number.
            of_record.update(b"#")
            exact = struct.unpack("<QQ", blake2b(words.encode(), digest_size=16).digest())
            tie = struct.unpack("<QQ", blake2b(utf8(text), digest_size=8).digest() + of_record.digest())
            folded.append(words if candidate else "")
            ids.append(_to_canonical_json(f"{ident}#{number}" if paragraphs else ident).encode())
            rows.append((exact, len(words), tie, 0, len(ids[-1]), candidate))
    units, sets = np.array(rows, UNIT), hash_ngrams(folded, SHINGLE)
    units["shingles"] = list(map(len, sets))
    return (units, compute_band_keys(sets), np.concatenate(sets), b"".join(ids)), hits, len(batch)


def sign_file(path: str, folder: Path, reading: Reading, pool: WorkerPool, bar) -> int:
    """Write the units of a file, unless a run that was stopped has done so; returns the number of its documents."""
    if folder.exists():
        documents = read_json(folder / "signed.json")["documents"]
        bar.update(documents)
        return documents
    documents, n_units, hits = 0, 0, []
    # Batches of about 128 KB, so that the hashes of a batch fit the cache.
    batches = batches_by_size(read_identified(path, reading), lambda pair: len(pair[1][reading.column]) + 256, 1 << 17)
    with new_folder(folder) as partial, contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(partial / name, "wb")) for name in FILES]
        for parts, overlaps, count in pool.map(sign_batch, batches):
            for file, part in zip(files, parts):
                file.write(part)
            hits += [(n_units + unit, items) for unit, items in overlaps]
            n_units += len(parts[0])
            documents += count
            bar.update(count)
        write_json(partial / "signed.json", {"documents": documents, "hits": hits})
    return documents


# ---- the second pass

class Store:
    """The units of all files in one order.

    units: UNIT [U], in memory; shingles, ids and band keys stay on disk. base: int64 [files + 1], the first unit of
    each file. hits: {unit: the overlaps with benchmarks of the document that begins with it}.
    """

    def __init__(self, folders: list[Path]):
        parts = [np.fromfile(folder / "units", UNIT) for folder in folders]
        for part in parts:
            # From here on, where the shingles and the id of a unit end in their files.
            part["shingles"], part["ids"] = np.cumsum(part["shingles"]), np.cumsum(part["ids"])
        self.folders, self.base = folders, np.cumsum([0] + [len(part) for part in parts])
        self.units = np.concatenate(parts)
        self.hits = {int(base) + unit: overlaps for folder, base in zip(folders, self.base)
                     for unit, overlaps in read_json(folder / "signed.json")["hits"]}

    def _read(self, name, unit, dtype):
        """The part of a file NAME that is one unit's. No file stays open, because a corpus may have very many."""
        file = int(self.base.searchsorted(unit, "right")) - 1
        start = int(self.units[name][unit - 1]) if unit > self.base[file] else 0
        size = int(self.units[name][unit]) - start
        return np.fromfile(self.folders[file] / name, dtype, size, offset=start * np.dtype(dtype).itemsize)

    def read_shingles(self, unit: int) -> np.ndarray:
        """uint64, sorted, without repeats."""
        return np.unique(self._read("shingles", unit, "<u8"))

    def read_id(self, unit: int):
        """The id as the record had it; FILE:NUMBER where it had none."""
        return json.loads(self._read("ids", unit, "u1").tobytes())

    def read_band(self, band: int) -> np.ndarray:
        """uint64 [U]: the keys of one band, of memory maps that are closed again."""
        return np.concatenate([np.memmap(folder / "bands", "<u8", "r", shape=(n, BANDS))[:, band]
                               for folder, n in zip(self.folders, np.diff(self.base).tolist()) if n])


# ---- exact copies, candidates and the verdict

def find_exact(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """UNIT [U] -> (first int64 [U]: the best unit with the same words; best int64 [R]: those units, best first).

    The best is the longest; of equal ones, that with the least hash of the text, then of the record. Units "x", "a b"
    and "X" give best [1, 0] and first [0, 1, 0], if the hash of "x" is less than that of "X".
    """
    first, which = np.arange(len(units)), np.flatnonzero(units["candidate"])
    exact, tie = units["exact"], units["tie"]
    order = which[np.lexsort((tie[which, 1], tie[which, 0], exact[which, 1], exact[which, 0]))]
    new = np.append(True, (exact[order[1:]] != exact[order[:-1]]).any(1))[:len(order)]
    best = order[new]
    first[order] = best[np.cumsum(new) - 1]
    return first, best[np.lexsort((tie[best, 1], tie[best, 0], -units["length"][best]))]


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The Jaccard similarity, 0 to 1, of two arrays [at least 1] without repeats."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def link_band(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys of one band, uint64 [U], best text first -> (members uint32 [M], bool [M]: where a group begins).

    A group is the texts that share a key, two or more of them, best first: keys 7 7 9 7 give members 0 1 3.
    """
    order = keys.argsort(kind="stable")
    # Without a key, it is empty.
    begins = np.append(True, np.diff(keys[order]) != 0)[:len(keys)]
    shared = ~(begins & np.append(begins[1:], True)[:len(keys)])
    return order[shared].astype(np.uint32), begins[shared]


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


def find_duplicates(store: Store, threshold: float) -> tuple[np.ndarray, np.ndarray, int]:
    """(stays int64 [U]: the unit that stays in the place of each, perhaps itself; similarity float64 [U] to that one;
    pairs compared). Exact copies come first, then the candidates of each band, then the verdict on them."""
    first, best = find_exact(store.units)
    # An empty text has no shingles, and can only be an exact copy.
    ranked = best[store.units["length"][best] > 0]
    bands = [link_band(store.read_band(band)[ranked]) for band in range(BANDS)]
    kept, similar, compared = keep_best(bands, len(ranked), lambda rank: store.read_shingles(ranked[rank]), threshold)
    stays, similarity = np.arange(len(first)), np.ones(len(first))
    stays[ranked], similarity[ranked] = ranked[kept], similar
    # A copy goes where the best of its copies goes.
    return stays[first], similarity[first], compared
