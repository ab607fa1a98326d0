"""What the first pass of dedup.py leaves on disk of each input file, and the second pass reads: the units of a corpus.

A unit is a document, or a paragraph where paragraphs are compared. STEM.json, written last, makes a file of them valid:

    STEM.units      UNIT [U]: hashes of the words and of the record, length, state, where shingles and id end
    STEM.bands      uint64 [U, BANDS]: the band keys          STEM.ids     the ids as JSON, one after the other
    STEM.shingles   uint64 [G]: hashes of the shingles        STEM.hits    what overlaps with benchmarks, as JSON lines

U units, G shingles, R units that differ from each other.
"""

import contextlib
import itertools
import json
import os
import re
from hashlib import blake2b
from pathlib import Path

import numpy as np

from core.cli import Reading
from core.files import read_json, sync, write_json
from core.pool import WorkerPool, batches_by_size
from text.contamination import Benchmarks
from text.corpus import read_records, utf8
from text.minhash import BANDS, SHINGLE, compute_band_keys, fold_words, hash_ngrams

UNIT = np.dtype([("exact", "<u8", 2), ("length", "<i8"), ("tie", "<u8", 2), ("shingle_end", "<u8"), ("id_end", "<u8"),
                 ("state", "u1")])
CANDIDATE, CONTAMINATED, SHORT = range(3)
NAMES = ("units", "bands", "shingles", "ids", "hits")
_to_canonical_json = json.JSONEncoder(sort_keys=True, default=str).encode


def split_paragraphs(text: str) -> list[str]:
    """[paragraph, break, paragraph, ...], which join to the text; a break is one or more blank lines."""
    return re.split(r"(\n(?:[^\S\n]*\n)+)", text)


def read_identified(path: str, reading: Reading):
    """Yield (id, record) of each document of a file; a record without an id is called FILE:NUMBER."""
    for number, (_, record) in enumerate(read_records([path], reading), 1):
        yield f"{path}:{number}" if record.get("id") is None else record["id"], record


# ---- the first pass

def sign_batch(shared: tuple[Benchmarks | None, str, bool], batch: list) -> tuple:
    """(benchmarks, column, paragraphs), [(id, record), ...] -> (UNIT [U], band keys [U, BANDS], shingles [G], ids as
    JSON, [(unit, overlaps), ...])."""
    benchmarks, column, paragraphs = shared
    exact, length, tie, state, folded, ids, hits = [], [], [], [], [], [], []
    for ident, record in batch:
        overlaps = benchmarks.find_overlaps(record[column]) if benchmarks else []
        if overlaps:
            hits.append((len(exact), overlaps))
        of_record = blake2b(_to_canonical_json([ident, record]).encode(), digest_size=8)
        for number, text in enumerate(split_paragraphs(record[column])[::2] if paragraphs else [record[column]]):
            words = fold_words(text)
            short = paragraphs and words.count(" ") < SHINGLE - 1
            # Equal paragraphs of one record differ by their number.
            of_record.update(b"#")
            exact.append(blake2b(words.encode(), digest_size=16).digest())
            tie += blake2b(utf8(text), digest_size=8).digest(), of_record.digest()
            length.append(len(words))
            state.append(CONTAMINATED if overlaps else SHORT if short else CANDIDATE)
            folded.append(words if state[-1] == CANDIDATE else "")
            ids.append(_to_canonical_json(f"{ident}#{number}" if paragraphs else ident).encode())
    units, sets = np.zeros(len(exact), UNIT), hash_ngrams(folded, SHINGLE)
    units["exact"] = np.frombuffer(b"".join(exact), "<u8").reshape(-1, 2)
    units["tie"] = np.frombuffer(b"".join(tie), "<u8").reshape(-1, 2)
    units["length"], units["state"] = length, state
    units["shingle_end"], units["id_end"] = np.cumsum([len(s) for s in sets]), np.cumsum([len(i) for i in ids])
    return units, compute_band_keys(sets), np.concatenate(sets), b"".join(ids), hits


def sign_file(path: str, stem: Path, reading: Reading, pool: WorkerPool, bar) -> int:
    """Write the units of a file, unless a run that was stopped has done so; returns the number of its documents."""
    done = read_signed(stem)
    if done is not None:
        bar.update(done)
        return done
    documents, n_units, n_shingles, id_bytes = 0, 0, 0, 0

    def read_batches():
        nonlocal documents
        # About 128 KB, so that the hashes of a batch fit the cache.
        records = read_identified(path, reading)
        for batch in batches_by_size(records, lambda pair: len(pair[1][reading.column]) + 256, 1 << 17):
            documents += len(batch)
            bar.update(len(batch))
            yield batch

    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(f"{stem}.{name}", "wb")) for name in NAMES]
        for units, bands, shingles, ids, hits in pool.map(sign_batch, read_batches()):
            units["shingle_end"] += n_shingles
            units["id_end"] += id_bytes
            lines = b"".join(utf8(json.dumps([n_units + unit, overlaps]) + "\n") for unit, overlaps in hits)
            for file, part in zip(files, (units.tobytes(), bands.tobytes(), shingles.tobytes(), ids, lines)):
                file.write(part)
            n_units += len(units)
            n_shingles += len(shingles)
            id_bytes += len(ids)
    for name in NAMES:
        sync(f"{stem}.{name}")
    sizes = {name: os.path.getsize(f"{stem}.{name}") for name in NAMES}
    write_json(f"{stem}.json", {"documents": documents, "bytes": sizes})
    return documents


def read_signed(stem: Path) -> int | None:
    """The documents of a file whose units are all there, or None."""
    if not os.path.exists(f"{stem}.json"):
        return None
    record = read_json(f"{stem}.json")
    whole = all(os.path.getsize(f"{stem}.{name}") == size for name, size in record["bytes"].items())
    return record["documents"] if whole else None


# ---- the second pass

class Store:
    """The units of all files as one: `units` [U] in memory, the rest on disk; `base` [files + 1]: first of each."""

    def __init__(self, stems: list[Path]):
        parts = [np.fromfile(f"{stem}.units", UNIT) for stem in stems]
        self.stems, self.base = stems, np.cumsum([0] + [len(part) for part in parts])
        self.units = np.concatenate(parts)
        self.files = {name: [open(f"{stem}.{name}", "rb") for stem in stems]           # noqa: SIM115
                      for name in ("shingles", "ids")}

    def _read(self, name, field, unit, itemsize):
        file = int(self.base.searchsorted(unit, "right")) - 1
        start = int(self.units[field][unit - 1]) if unit > self.base[file] else 0
        size = (int(self.units[field][unit]) - start) * itemsize
        return os.pread(self.files[name][file].fileno(), size, start * itemsize)

    def read_shingles(self, unit: int) -> np.ndarray:
        """uint64, sorted, without repeats."""
        return np.unique(np.frombuffer(self._read("shingles", "shingle_end", unit, 8), "<u8"))

    def read_id(self, unit: int):
        """The id as the record had it; FILE:NUMBER where it had none."""
        return json.loads(self._read("ids", "id_end", unit, 1))

    def read_band(self, band: int) -> np.ndarray:
        """uint64 [U]: the keys of one band, of memory maps that are closed again."""
        return np.concatenate([np.memmap(f"{stem}.bands", "<u8", "r", shape=(n, BANDS))[:, band]
                               for stem, n in zip(self.stems, np.diff(self.base).tolist()) if n])

    def read_hits(self, number: int) -> dict[int, list]:
        """{unit of the file: its overlaps with benchmarks} of one file."""
        return dict(map(json.loads, Path(f"{self.stems[number]}.hits").read_text(encoding="utf-8").splitlines()))

    def close(self):
        for file in itertools.chain(*self.files.values()):
            file.close()


def find_exact(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """UNIT [U] -> (first int64 [U]: the best unit with the same words; best int64 [R]: those units, best first).

    The best is the longest; of equal ones, that with the least hash of the text, then of the record. Units "x", "a b"
    and "X" give best [1, 0] and first [0, 1, 0], if the hash of "x" is less than that of "X".
    """
    first = np.arange(len(units))
    which = np.flatnonzero(units["state"] == CANDIDATE)
    exact, tie = units["exact"], units["tie"]
    order = which[np.lexsort((tie[which, 1], tie[which, 0], exact[which, 1], exact[which, 0]))]
    new = np.ones(len(order), bool)
    new[1:] = (exact[order[1:]] != exact[order[:-1]]).any(1)
    first[order] = order[new][np.cumsum(new) - 1]
    best = order[new]
    return first, best[np.lexsort((tie[best, 1], tie[best, 0], -units["length"][best]))]
