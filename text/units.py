"""The units of a corpus: what the first pass of dedup.py leaves on disk of each input file, and the second pass reads.

A unit is a document, or a paragraph where paragraphs are compared. Each file's units are a folder:

    units         UNIT [U]: hashes of the words and of the record, length, sizes of shingles and id, is it a candidate
    bands         uint64 [U, BANDS]: the band keys
    shingles      uint64 [G]: hashes of the shingles
    ids           the ids as JSON, one after the other
    signed.json   the number of documents, and which units overlap with benchmarks

U units, G shingles, R units with different words.
"""

import contextlib
import json
import re
import struct
from hashlib import blake2b
from pathlib import Path

import numpy as np

from core.cli import Reading
from core.errors import UserError
from core.files import new_folder, read_json, write_json
from core.pool import WorkerPool, batches_by_size
from text.corpus import read_records, read_values, utf8
from text.minhash import BANDS, SHINGLE, compute_band_keys, fold_words, hash_ngrams

# Words in a row that a document shares with a benchmark: GPT-3's rule (Brown et al. 2020, appendix C).
NGRAM = 13
UNIT = np.dtype([("exact", "<u8", 2), ("length", "<i8"), ("tie", "<u8", 2), ("shingles", "<u8"), ("ids", "<u8"),
                 ("candidate", "?")])
FILES = ("units", "bands", "shingles", "ids")
_to_canonical_json = json.JSONEncoder(sort_keys=True, default=str).encode


def split_paragraphs(text: str) -> list[str]:
    """[paragraph, break, paragraph, ...], which join to the text; a break is one or more blank lines."""
    return re.split(r"(\n(?:[^\S\n]*\n)+)", text)


def read_identified(path: str, reading: Reading):
    """Yield (id, record) of each document of a file; a record without an id is called FILE:NUMBER."""
    for number, (_, record) in enumerate(read_records([path], reading), 1):
        yield f"{path}:{number}" if record.get("id") is None else record["id"], record


# ---- which documents hold text of a benchmark

class Benchmarks:
    """The 13-grams of benchmark files, sorted, each with the item in which it stands. A field under 13 words has none.

    files: {path: {"items": how many, "too_short": those without a 13-gram}}.
    """

    def __init__(self, paths: list[str]):
        self.names, self.sizes, self.files = [], [], {}
        grams = []
        for path in paths:
            first = len(self.names)
            for number, (_, item) in enumerate(read_values(path, Reading(), lists=True), 1):
                fields = [words for words in map(plain_words, find_strings(item)) if words.count(" ") >= NGRAM - 1]
                grams.append(np.unique(np.concatenate([np.zeros(0, np.uint64), *hash_ngrams(fields, NGRAM)])))
                self.sizes.append(len(grams[-1]))
                self.names.append(f"{path}:{number}")
            if len(self.names) == first:
                raise UserError(f"benchmark file {path} holds no item")
            self.files[path] = {"items": len(self.sizes) - first, "too_short": self.sizes[first:].count(0)}
        owners, grams = np.repeat(np.arange(len(grams), dtype=np.uint32), self.sizes), np.concatenate(grams)
        order = grams.argsort(kind="stable")
        self.grams, self.owners = grams[order], owners[order]

    def find_overlaps(self, text: str) -> list[dict]:
        """The ten items that share most 13-grams with a text: the "item", "ngrams" and their "share" of the item's."""
        text = plain_words(text)
        if text.count(" ") < NGRAM - 1:
            return []
        own = np.unique(hash_ngrams([text], NGRAM)[0])
        low, high = self.grams.searchsorted(own), self.grams.searchsorted(own, "right")
        owners = [self.owners[start:end] for start, end in zip(low, high) if start < end]
        items, shared = np.unique(np.concatenate([self.owners[:0], *owners]), return_counts=True)
        best = (-shared).argsort(kind="stable")[:10]
        return [{"item": self.names[i], "ngrams": n, "share": round(n / self.sizes[i], 4)}
                for i, n in zip(items[best].tolist(), shared[best].tolist())]


def plain_words(text: str) -> str:
    """Folded words without punctuation, which benchmarks and their copies write in many ways."""
    return " ".join(re.findall(r"\w+", fold_words(text)))


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


def find_exact(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """UNIT [U] -> (first int64 [U]: the best unit with the same words; best int64 [R]: those units, best first).

    The best is the longest; of equal ones, that with the least hash of the text, then of the record. Units "x", "a b"
    and "X" give best [1, 0] and first [0, 1, 0], if the hash of "x" is less than that of "X".
    """
    first = np.arange(len(units))
    which = np.flatnonzero(units["candidate"])
    exact, tie = units["exact"], units["tie"]
    order = which[np.lexsort((tie[which, 1], tie[which, 0], exact[which, 1], exact[which, 0]))]
    new = np.append(True, (exact[order[1:]] != exact[order[:-1]]).any(1))[:len(order)]
    first[order] = order[new][np.cumsum(new) - 1]
    best = order[new]
    return first, best[np.lexsort((tie[best, 1], tie[best, 0], -units["length"][best]))]
