"""The whole corpus: exact copies, near-duplicates, and what overlaps with the benchmarks, out.

    python dedup.py clean/kept.jsonl more.parquet --out corpus --against bench/*.jsonl mmlu/test/*.csv
    python dedup.py manuals.jsonl --out corpus --paragraphs

Leaves in --out: kept.jsonl (whole records), removed.jsonl (id, duplicate_of, similarity, reason: exact | near |
paragraph | contaminated) and, last, dedup.json (counts and settings).

1. Words: NFC, casefolded, split at white space; a letter of a script without spaces is a word of its own. Equal words
   are an exact copy. Punctuation stays, because `a - b` is not `a + b` and $1,000 is not $1.000.
2. Near: documents are sets of 5-word shingles; MinHash (Broder 1997) in 14 bands of 8 rows (FineWeb's) proposes pairs,
   the Jaccard similarity of the sets decides. A pair of similarity s is proposed with probability 1 - (1 - s^8)^14.
3. Keep the best: documents are walked from best to worst (most characters; ties by the hash of the text, then of the
   record), and one is kept unless a kept one with which it shares a band is at least `threshold` similar; duplicate_of
   is the first such. No chains: whatever is removed is that similar to a document that is there. What is kept depends
   neither on the order of files and records nor on the workers; kept.jsonl follows the files, sorted by name.
4. Before all that, a document that shares one 13-gram of words with a benchmark item goes (GPT-3's rule, Brown et al.
   2020, appendix C); its row lists the items.

A killed run is completed by the same command: every file and every band in --out/.dedup is there whole or made again.
Memory: about 230 bytes a document (10 million documents: 2.3 GB). On disk: 8 bytes a word and 180 a document.
U units (documents or paragraphs), S shingles.
"""

import core.threads

import csv
import functools
import itertools
import json
import os
import re
import shutil
import sys
import time
import unicodedata
import zlib
from collections import Counter
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.cli import Reading
from core.config import ArgumentParser, main_guard, write_json
from core.hashing import fmix64
from core.pool import WorkerPool, batches_by_size
from text.corpus import json_records, read_documents, read_records, utf8

VERSION = 1                            # raise it when the same input gives another result
BANDS, ROWS, SHINGLE, NGRAM = 14, 8, 5, 13
SPACELESS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
                       "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]")
                       # Thai, Lao, Myanmar, Khmer, kana, Han
_paragraphs = re.compile(r"(\n(?:[^\S\n]*\n)+)").split              # [paragraph, break, paragraph, ...]
_canonical = json.JSONEncoder(sort_keys=True, default=str).encode
_readable = json.JSONEncoder(ensure_ascii=False, default=str).encode
UNIT = np.dtype([("exact", "<u8", 2), ("length", "<i8"), ("tie", "<u8", 2), ("shingle_end", "<u8"), ("id_end", "<u8"),
                 ("state", "u1")])
CANDIDATE, CONTAMINATED, SHORT = range(3)
REASONS = ("exact", "near", "paragraph", "contaminated")
TABLE, BASE = fmix64(np.arange(1, 257)), 0x9E3779B97F4A7C15
ODD = fmix64(np.arange(1, ROWS + 1)) | np.uint64(1)
SCALE, SHIFT = fmix64(np.arange(101, 101 + BANDS * ROWS)) | np.uint64(1), fmix64(np.arange(301, 301 + BANDS * ROWS))


# ---- text -> words -> shingles -> band keys

def normalise(text: str) -> str:
    """The words that are compared, one space between them: NFC, casefolded, letters of scripts without spaces apart."""
    if text.isascii():
        return " ".join(text.lower().split())
    text = unicodedata.normalize("NFC", utf8(text).decode()).casefold()
    return " ".join(SPACELESS.sub(r" \g<0> ", text).split())


def plain_words(text: str) -> str:
    """The same without punctuation, for the comparison with benchmarks."""
    return " ".join(re.findall(r"\w+", normalise(text)))


@functools.lru_cache(maxsize=2)
def _powers(base: int, blocks: int) -> np.ndarray:
    """base^1, base^2, ... modulo 2^64, as many as there are bytes in so many blocks of 256 KB."""
    return np.cumprod(np.full(blocks << 18, base, np.uint64))


def ngram_hashes(texts: list[str], n: int) -> list[np.ndarray]:
    """uint64 hashes of every n words of normalised texts, in order, with repeats; of all words of a shorter text.

    The hash of bytes b[s:e] is the polynomial of TABLE[b] in BASE modulo 2^64, a difference of two prefix sums moved to
    the power 0 (Rabin-Karp), and mixed: no word is looked at on its own.
    """
    if not texts:
        return []
    counts = [text.count(" ") + 1 for text in texts]
    flat = np.frombuffer("\n".join([*texts, ""]).encode(), np.uint8)
    ends = np.flatnonzero((flat == 32) | (flat == 10))                   # of the words
    starts = np.append(0, ends[:-1] + 1)
    prefix = np.zeros(len(flat) + 1, np.uint64)
    blocks = (len(flat) >> 18) + 1
    np.cumsum(TABLE[flat] * _powers(BASE, blocks)[:len(flat)], out=prefix[1:])
    stops = np.cumsum(counts)                                            # of the texts, in words
    last = np.minimum(np.arange(len(starts)) + n, np.repeat(stops, counts)) - 1
    grams = fmix64((prefix[ends[last]] - prefix[starts]) * _powers(pow(BASE, -1, 1 << 64), blocks)[starts])
    return [grams[stop - count:max(stop - count + 1, stop - n + 1)] if text else grams[:0]
            for text, count, stop in zip(texts, counts, stops.tolist())]


def signatures(sets: list[np.ndarray]) -> np.ndarray:
    """uint64 [U, BANDS * ROWS]: the least hash of each set under 112 hash functions; all ones for an empty one."""
    out = np.full((len(sets), BANDS * ROWS), ~np.uint64(0))
    filled, at = [i for i, s in enumerate(sets) if len(s)], 0
    while at < len(filled):
        group, size = [], 0
        while at < len(filled) and (not group or size + len(sets[filled[at]]) < 1 << 15):      # fits the cache
            group.append(filled[at])
            size += len(sets[filled[at]])
            at += 1
        flat = np.concatenate([sets[i] for i in group])
        starts = np.cumsum([0] + [len(sets[i]) for i in group[:-1]])
        buffer = np.empty_like(flat)
        for k in range(BANDS * ROWS):
            np.multiply(flat, SCALE[k], out=buffer)
            np.add(buffer, SHIFT[k], out=buffer)
            out[group, k] = np.minimum.reduceat(buffer, starts)
    return out


def band_keys(sets: list[np.ndarray]) -> np.ndarray:
    """uint64 [U, BANDS]: two sets share a key where their signatures agree in all rows of the band."""
    rows = signatures(sets).reshape(len(sets), BANDS, ROWS)
    return fmix64((rows * ODD).sum(2, dtype=np.uint64)).reshape(len(sets), BANDS)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two sorted arrays [at least 1] without repeats."""
    if len(a) > len(b):
        a, b = b, a
    at = np.minimum(b.searchsorted(a), len(b) - 1)
    common = int(np.count_nonzero(b[at] == a))
    return common / (len(a) + len(b) - common)


# ---- reading

def read_rows(path: str, documents: str = "blank"):
    """Yield (where, value) of every record of a .jsonl[.gz|.zst], .parquet or .json file (a list, or a table of them),
    of every row of a .csv or .tsv file (a header too), of every document of a text file ({"text": ...})."""
    stem, suffix = re.sub(r"\.(gz|zst)$", "", path), Path(path).suffix
    try:
        if stem.endswith((".jsonl", ".ndjson")) and os.path.isfile(path):
            yield from json_records(path)
        elif suffix == ".parquet" and os.path.isfile(path):
            import pyarrow.parquet as parquet
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
                yield from ((path, row) for row in batch.to_pylist())
        elif suffix == ".json" and os.path.isfile(path):
            rows = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            yield from ((path, row) for row in (rows.values() if isinstance(rows, dict) else rows))
        elif suffix in (".csv", ".tsv") and os.path.isfile(path):
            csv.field_size_limit(2**31 - 1)
            with open(path, encoding="utf-8-sig", newline="") as file:
                yield from ((path, row) for row in csv.reader(file, delimiter="\t" if suffix == ".tsv" else ","))
        else:
            yield from ((path, {"text": text}) for text in read_documents([path], Reading(documents)))
    except (UnicodeDecodeError, EOFError, OSError, zlib.error, RecursionError, TypeError, csv.Error,
            json.JSONDecodeError) as error:                              # none of which names the file
        raise ValueError(f"file {path} cannot be read: {error}; convert it or fetch it again") from None
    except ValueError as error:                                          # pyarrow's name no file either
        raise ValueError(str(error) if path in str(error) else f"file {path} cannot be read: {error}") from None


def strings(value):
    """Every text in a value made of dicts and lists."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (dict, list)):
            stack += reversed(value.values() if isinstance(value, dict) else value)


class Benchmarks:
    """The 13-grams of benchmark files, sorted, each with the items it stands in. A field under 13 words has none."""

    def __init__(self, paths):
        self.names, sizes, grams, owners, self.files = [], [], [], [], {}
        for path in paths:
            first = len(self.names)
            for number, (_, item) in enumerate(read_rows(path), 1):
                listed = [w for w in map(plain_words, strings(item)) if w.count(" ") >= NGRAM - 1]
                own = np.unique(np.concatenate([np.zeros(0, np.uint64), *ngram_hashes(listed, NGRAM)]))
                grams.append(own)
                owners.append(np.full(len(own), len(self.names), np.uint32))
                sizes.append(len(own))
                self.names.append(f"{path}:{number}")
            if len(self.names) == first:
                raise ValueError(f"benchmark file {path} holds no item")
            self.files[path] = {"items": len(sizes) - first, "too_short": sizes[first:].count(0)}
        grams, owners = np.concatenate(grams), np.concatenate(owners)
        order = grams.argsort(kind="stable")
        grams, self.owners, self.sizes = grams[order], owners[order], sizes
        first = np.flatnonzero(np.diff(grams, prepend=~grams[:1]) != 0)
        self.grams, self.ends = grams[first], np.append(first, len(grams))

    def overlaps(self, text: str) -> list[tuple[str, int, float]]:
        """[(item, 13-grams shared, share of the item's), ...], most shared first, ten at most."""
        text = plain_words(text)
        if text.count(" ") < NGRAM - 1 or not len(self.grams):
            return []
        own = np.unique(ngram_hashes([text], NGRAM)[0])
        at = np.minimum(self.grams.searchsorted(own), len(self.grams) - 1)
        hits = at[self.grams[at] == own].tolist()
        shared = Counter(i for hit in hits for i in self.owners[self.ends[hit]:self.ends[hit + 1]].tolist())
        best = sorted(shared.items(), key=lambda pair: (-pair[1], pair[0]))[:10]
        return [(self.names[i], n, round(n / self.sizes[i], 4)) for i, n in best]


# ---- pass 1: every file to units, band keys and shingles on disk

def sign(shared: tuple, batch: list):
    """(benchmarks or None, column, paragraphs), [(id, record), ...] -> (UNIT [U], band keys [U, BANDS], shingles [S],
    ids as JSON, [(unit, overlaps), ...])."""
    benchmarks, column, paragraphs = shared
    exact, length, tie, state, listed, ids, hits = [], [], [], [], [], [], []
    for ident, record in batch:
        overlaps = benchmarks.overlaps(record[column]) if benchmarks else []
        if overlaps:
            hits.append((len(exact), overlaps))
        whole = blake2b(_canonical([ident, record]).encode(), digest_size=8)
        for number, text in enumerate(_paragraphs(record[column])[::2] if paragraphs else [record[column]]):
            normal = normalise(text)
            short = paragraphs and normal.count(" ") < SHINGLE - 1
            whole.update(b"#")                 # equal paragraphs of one record differ by their number
            exact.append(blake2b(normal.encode(), digest_size=16).digest())
            tie += blake2b(utf8(text), digest_size=8).digest(), whole.digest()
            length.append(len(normal))
            state.append(CONTAMINATED if overlaps else SHORT if short else CANDIDATE)
            listed.append(normal if state[-1] == CANDIDATE else "")
            ids.append(_canonical(f"{ident}#{number}" if paragraphs else ident).encode())
    units, sets = np.zeros(len(exact), UNIT), ngram_hashes(listed, SHINGLE)
    units["exact"] = np.frombuffer(b"".join(exact), "<u8").reshape(-1, 2)
    units["tie"] = np.frombuffer(b"".join(tie), "<u8").reshape(-1, 2)
    units["length"], units["state"] = length, state
    units["shingle_end"], units["id_end"] = np.cumsum([len(s) for s in sets]), np.cumsum([len(i) for i in ids])
    return units, band_keys(sets), np.concatenate(sets), b"".join(ids), hits


def _identified(path, column, documents):
    """Yield (id, record) of a file; a record without an id is called FILE:NUMBER."""
    for number, (_, record) in enumerate(read_records([path], Reading(documents, column=column)), 1):
        ident = record.get("id")
        yield (f"{path}:{number}" if ident is None else ident), record


def sign_file(path: str, stem: Path, settings: dict, pool: WorkerPool, bar) -> dict:
    """Write STEM.units, .bands, .shingles, .ids, .hits and, last, STEM.json with their sizes in bytes."""
    column = settings["column"]
    names, totals = ("units", "bands", "shingles", "ids", "hits"), [0, 0, 0]      # units, shingles, bytes of ids
    files = {name: open(f"{stem}.{name}", "wb") for name in names}         # noqa: SIM115

    def write(units, bands, shingles, ids, hits):
        units["shingle_end"] += totals[1]
        units["id_end"] += totals[2]
        hits = b"".join(utf8(json.dumps([totals[0] + unit, overlaps]) + "\n") for unit, overlaps in hits)
        for name, part in zip(names, (units.tobytes(), bands.tobytes(), shingles.tobytes(), ids, hits)):
            files[name].write(part)
        totals[:] = totals[0] + len(units), totals[1] + len(shingles), totals[2] + len(ids)

    count = 0

    def batches():
        nonlocal count
        records = _identified(path, column, settings["documents"])
        # about 128 KB, so that a batch's hashes fit the cache
        for batch in batches_by_size(records, lambda pair: len(pair[1][column]) + 256, 1 << 17):
            count += len(batch)
            bar.update(len(batch))
            yield batch

    try:
        for signed in pool.map(sign, batches()):
            write(*signed)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()
    record = {"documents": count, "units": totals[0], "bytes": {n: os.path.getsize(f"{stem}.{n}") for n in names}}
    _commit(f"{stem}.json", lambda temporary: write_json(temporary, record))
    return record


def _commit(path, write):
    """`write(temporary)`, then its rename: the file is whole or not there."""
    temporary = f"{path}.partial"
    write(temporary)
    os.replace(temporary, path)


# ---- pass 2: exact copies, then band by band, then the verdict

def exact_groups(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """UNIT [U] -> (first int64 [U]: the best unit with the same words; best int64 [R]: those units, best first)."""
    first = np.arange(len(units))
    which = np.flatnonzero(units["state"] == CANDIDATE)
    exact, tie = units["exact"], units["tie"]
    order = which[np.lexsort((tie[which, 1], tie[which, 0], exact[which, 1], exact[which, 0]))]
    new = np.ones(len(order), bool)
    new[1:] = (exact[order[1:]] != exact[order[:-1]]).any(1)
    first[order] = order[new][np.cumsum(new) - 1]
    best = order[new]
    return first, best[np.lexsort((tie[best, 1], tie[best, 0], -units["length"][best]))]


def link(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys of one band, uint64 [R], best unit first -> (members uint32 [M], group uint32 [M]) of every key that two or
    more share; a group's members follow each other, best first."""
    order = keys.argsort(kind="stable")
    keys = keys[order]
    same = keys[1:] == keys[:-1]
    before, after = np.append(False, same), np.append(same, False)
    shared = before | after
    group = np.cumsum(~before[shared], dtype=np.int64) - 1
    return order[shared].astype(np.uint32), group.astype(np.uint32)


def verdict(members: list, groups: list, n: int, shingles, threshold: float) -> tuple[np.ndarray, np.ndarray, int]:
    """From best to worst, keep a unit unless a kept one with which it shares a band is `threshold` similar.

    members, groups: `link` of each band, for units 0 (best) to n - 1; shingles(r) gives the sorted hashes of unit r.
    Returns (kept int64 [n]: the unit that stays in its place; similarity [n] to it; pairs compared). A kept unit is
    written at the end of the list of each of its groups, so that a later one finds there all that it may resemble.
    """
    sizes = [int(g[-1]) + 1 if len(g) else 0 for g in groups]
    offsets = np.cumsum([0, *sizes])
    group = np.concatenate([g + np.uint32(o) for g, o in zip(groups, offsets)])      # in the order of the groups
    starts = np.append(0, np.cumsum(np.bincount(group, minlength=offsets[-1])))
    members = np.concatenate(members)
    order = members.argsort(kind="stable")
    group, members = group[order], members[order]                                    # now in the order of the units
    del order
    kept, fill = np.zeros(len(members), np.uint32), np.zeros(offsets[-1], np.int64)
    edges = np.append(np.flatnonzero(np.append(True, members[1:] != members[:-1])[:len(members)]), len(members))
    target, to_target, compared = np.arange(n), np.ones(n), 0
    for lo, hi in tqdm(itertools.pairwise(edges), "compare", len(edges) - 1, unit=" documents", disable=None):
        unit, own = int(members[lo]), group[lo:hi]
        candidates = set()
        for start, length in zip(starts[own].tolist(), fill[own].tolist()):
            if length:
                candidates.update(kept[start:start + length].tolist())
        mine = shingles(unit) if candidates else None
        for other in sorted(candidates):
            similarity, compared = jaccard(mine, shingles(other)), compared + 1
            if similarity >= threshold:
                target[unit], to_target[unit] = other, similarity
                break
        else:
            kept[starts[own] + fill[own]] = unit
            fill[own] += 1
    return target, to_target, compared


class Store:
    """What pass 1 left, all files as one: units [U] in memory, the rest on disk."""

    def __init__(self, stems: list[Path]):
        parts = [np.fromfile(f"{stem}.units", UNIT) for stem in stems]
        self.stems, self.base = stems, np.cumsum([0] + [len(p) for p in parts])
        self.units = np.concatenate(parts)
        self.files = {name: [open(f"{stem}.{name}", "rb") for stem in stems]           # noqa: SIM115
                      for name in ("shingles", "ids")}

    def _read(self, name, field, unit, itemsize):
        file = int(self.base.searchsorted(unit, "right")) - 1
        start = int(self.units[field][unit - 1]) if unit > self.base[file] else 0
        size = (int(self.units[field][unit]) - start) * itemsize
        return os.pread(self.files[name][file].fileno(), size, start * itemsize)

    def shingles(self, unit: int) -> np.ndarray:
        """uint64, sorted, without repeats."""
        return np.unique(np.frombuffer(self._read("shingles", "shingle_end", unit, 8), "<u8"))

    def ident(self, unit: int):
        return json.loads(self._read("ids", "id_end", unit, 1))

    def band(self, band: int) -> np.ndarray:
        """uint64 [U]: the keys of one band, of a memory map that is closed again."""
        return np.concatenate([np.memmap(f"{stem}.bands", "<u8", "r", shape=(n, BANDS))[:, band]
                               for stem, n in zip(self.stems, np.diff(self.base).tolist()) if n])

    def close(self):
        for file in itertools.chain(*self.files.values()):
            file.close()


def dedup(files, out, *, against=(), paragraphs: bool = False, threshold: float = 0.8, column: str = "text",
          documents: str = "blank", workers: int = 1, overwrite: bool = False) -> dict:
    """Deduplicate `files` into the folder `out` (the module says how and what it leaves); returns dedup.json's content.

    files, against: paths. threshold: least Jaccard similarity of a duplicate, above 0 to 1. ValueError for a wrong
    input, setting or folder.
    """
    files, against, out = sorted(set(map(str, files))), sorted(set(map(str, against))), Path(out)
    if not 0 < threshold <= 1 or workers < 1:
        raise ValueError(f"threshold is {threshold} and workers {workers}; the threshold must be above 0 and at most "
                         f"1, and there must be at least one worker")
    for path in files:
        next(read_records([path], Reading(documents, column=column)), None)        # all of them, before any work
    benchmarks = Benchmarks(against) if against else None
    settings = {"version": VERSION, "column": column, "documents": documents, "paragraphs": paragraphs,
                "against": list(map(_stamp, against))}
    work = _open_folder(out, overwrite, files + against)
    stems = [work / _name(settings, _stamp(path)) for path in files]     # what was made of other inputs is not found
    if not _sign_files(files, stems, settings, workers, benchmarks):
        raise ValueError(f"no document in {', '.join(files)}")
    store = Store(stems)
    target, similarity, near, compared = _compare(store, work / _name([s.name for s in stems]), threshold)
    report = {"version": VERSION, "threshold": threshold, "bands": BANDS, "rows": ROWS, "shingle_words": SHINGLE,
              "paragraphs": paragraphs, "files": files, "pairs_compared": compared}
    report |= _write(files, out, store, settings, target, similarity, near, benchmarks)
    store.close()
    _commit(out / "dedup.json", lambda temporary: write_json(temporary, report))
    shutil.rmtree(work)
    return report


def _stamp(path: str) -> list:
    status = os.stat(path)
    return [path, status.st_size, status.st_mtime_ns]


def _name(*parts) -> str:
    return blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def _open_folder(out: Path, overwrite: bool, inputs: list[str]) -> Path:
    """out/.dedup, made or left by a run that was stopped; ValueError where `out` holds anything that would be lost."""
    work, ours = out / ".dedup", ("dedup.json", "kept.jsonl", "removed.jsonl")
    for path in inputs:
        if Path(path).resolve() in [(out / name).resolve() for name in ours]:
            raise ValueError(f"{path} is an input and would be overwritten; choose another --out")
    if overwrite:
        shutil.rmtree(work, ignore_errors=True)
        for name in ours:
            (out / name).unlink(missing_ok=True)
    for name in ours if not work.is_dir() else ours[:1]:
        if (out / name).exists():
            raise ValueError(f"{out / name} exists already; choose another --out, or add --overwrite to replace it")
    work.mkdir(parents=True, exist_ok=True)
    return work


def _sign_files(files, stems, settings, workers, benchmarks) -> int:
    """Pass 1 over the files that are not done yet; returns the number of documents."""
    total = 0
    with WorkerPool(workers, (benchmarks, settings["column"], settings["paragraphs"])) as pool, \
            tqdm(unit=" documents", disable=None, desc="read") as bar:
        for path, stem in zip(files, stems):
            record = _signed(stem)
            if record:
                bar.update(record["documents"])
            else:
                record = sign_file(path, stem, settings, pool, bar)
            total += record["documents"]
    return total


def _signed(stem: Path):
    """The record of a file that pass 1 has finished, or None."""
    try:
        record = json.loads(Path(f"{stem}.json").read_text(encoding="utf-8"))
        return record if all(os.path.getsize(f"{stem}.{n}") == size for n, size in record["bytes"].items()) else None
    except FileNotFoundError:
        return None


def _compare(store: Store, stem: Path, threshold: float):
    """-> (target int64 [U]: the unit that stays in its place; similarity [U]; near bool [U]; pairs compared)."""
    first, best = exact_groups(store.units)
    ranked = best[store.units["length"][best] > 0]                       # the empty text has no shingles
    members, groups = [], []
    for band in range(BANDS):
        path = Path(f"{stem}.band_{band:02d}")
        if not path.exists():
            _commit(path, np.stack(link(store.band(band)[ranked])).tofile)
        member, group = np.fromfile(path, np.uint32).reshape(2, -1)
        members.append(member)
        groups.append(group)
    kept, similarity, compared = verdict(members, groups, len(ranked), lambda r: store.shingles(int(ranked[r])),
                                         threshold)
    target, of_unit = np.arange(len(first)), np.ones(len(first))
    target[ranked] = ranked[kept]
    of_unit[ranked] = similarity
    return target[first], of_unit[first], (target != np.arange(len(first)))[first], compared     # copies go with it


def _write(files, out, store, settings, target, similarity, near, benchmarks) -> dict:
    """Pass 2: read the files again, write kept.jsonl and removed.jsonl; returns the counts."""
    column, paragraphs = settings["column"], settings["paragraphs"]
    counts = dict.fromkeys(("documents", "kept", *REASONS), 0)
    found, unit = set(), 0
    names, work = ("kept.jsonl", "removed.jsonl"), store.stems[0].parent
    with open(work / names[0], "wb") as kept, open(work / names[1], "wb") as gone, \
            tqdm(unit=" documents", disable=None, desc="write") as bar:

        def remove(ident, of, similarity, reason, **more):
            row = {"id": ident, "duplicate_of": of, "similarity": similarity, "reason": reason, **more}
            gone.write(_line(row))
            counts[reason] += 1

        for number, path in enumerate(files):
            hits = dict(map(json.loads, store.stems[number].with_suffix(".hits").read_text("utf-8").splitlines()))
            base = unit
            for ident, record in _identified(path, column, settings["documents"]):
                parts = _paragraphs(record[column]) if paragraphs else [record[column]]
                last = unit + (len(parts) + 1) // 2
                if last > store.base[number + 1]:
                    break
                counts["documents"] += 1
                if unit - base in hits:
                    overlaps = hits[unit - base]
                    found.update(name for name, _, _ in overlaps)
                    remove(ident, overlaps[0][0], overlaps[0][2], "contaminated",
                           overlaps=[dict(zip(("item", "ngrams", "share"), overlap)) for overlap in overlaps])
                    parts = []
                for i, u in enumerate(range(unit, last) if parts else ()):
                    if target[u] != u:
                        reason = "paragraph" if paragraphs else "near" if near[u] else "exact"
                        remove(store.ident(u), store.ident(int(target[u])), round(float(similarity[u]), 6), reason)
                        parts[2 * i] = None
                text = _joined(parts)
                if text is not None:
                    kept.write(_line({**record, "id": ident, column: text}))
                    counts["kept"] += 1
                unit = last
                bar.update()
            if unit != store.base[number + 1]:
                raise ValueError(f"input file {path} changed while it was read; start again with --overwrite")
        for file in (kept, gone):
            file.flush()
            os.fsync(file.fileno())
    for name in names:
        os.replace(work / name, out / name)
    if benchmarks:
        counts |= {"ngram_words": NGRAM, "against": {path: {**items, "found": sum(n.rpartition(":")[0] == path
                                                                                 for n in found)}
                                                     for path, items in benchmarks.files.items()}}
    return counts


def _joined(parts: list):
    """[paragraph or None, break, paragraph or None, ...] -> the text that is left, or None."""
    text, gap = None, ""
    for i in range(0, len(parts), 2):
        if parts[i] is not None:
            text = parts[i] if text is None else text + gap + parts[i]
            gap = parts[i + 1] if i + 1 < len(parts) else ""
    return text


def _line(record) -> bytes:
    return utf8(_readable(record) + "\n")


def main():
    parser = ArgumentParser(prog="dedup.py", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help=".jsonl[.gz|.zst], .parquet or text")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--against", nargs="+", default=[], metavar="BENCH",
                        help="benchmark files whose items must not be in the corpus: .jsonl, .json, .csv, .tsv, "
                             ".parquet, text")
    parser.add_argument("--threshold", type=float, default=0.8,
                        help="least Jaccard similarity of a near-duplicate (default: 0.8; SlimPajama's)")
    parser.add_argument("--paragraphs", action="store_true",
                        help="remove repeated paragraphs (of 5 words or more), not documents")
    parser.add_argument("--column", default="text", help="where a record keeps its text (default: text)")
    parser.add_argument("--documents", choices=("line", "blank", "file"), default="blank",
                        help="a document of a text file is a line, a block between blank lines (default), or the file")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in --out")
    parser.add_argument("--json", metavar="FILE", help="write dedup.json there too")
    args = parser.parse_args()
    start = time.perf_counter()
    report = dedup(args.files, args.out, against=args.against, paragraphs=args.paragraphs, threshold=args.threshold,
                   column=args.column, documents=args.documents, workers=args.workers, overwrite=args.overwrite)
    seconds = time.perf_counter() - start
    print(f"{report['documents']:,} documents in {seconds:.1f} s ({report['documents'] / seconds:,.0f} a second), "
          f"{report['kept']:,} kept in {Path(args.out) / 'kept.jsonl'}")
    print("removed: " + ", ".join(f"{report[reason]:,} {reason}" for reason in REASONS)
          + ("  (paragraph counts paragraphs)" if args.paragraphs else ""))
    for path, items in report.get("against", {}).items():
        print(f"  {path}: {items['found']:,} of {items['items']:,} items found in the corpus"
              + (f"; {items['too_short']:,} have no field of {NGRAM} words" if items["too_short"] else ""))
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    sys.exit(main_guard(main))
