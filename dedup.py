"""Remove from a corpus its exact copies, its near-duplicates, and what overlaps with benchmarks.

    python dedup.py clean/kept.jsonl more.parquet --out corpus --against bench/*.jsonl mmlu/test/*.csv
    python dedup.py manuals.jsonl --out corpus --paragraphs

Leaves in --out: kept.jsonl (whole records), removed.jsonl (id, duplicate_of, similarity, reason: exact | near |
paragraph | contaminated) and, last, dedup.json (counts and settings).

1. A document that shares 13 words in a row with an item of a benchmark goes (text/contamination.py); its row in
   removed.jsonl lists the items.
2. Words are NFC, casefolded, split at white space; documents of equal words are exact copies.
3. Near-duplicates: MinHash proposes pairs, the Jaccard similarity of their 5-word shingles decides (text/minhash.py).
4. The best of its like is kept: documents are walked from best to worst (the longest first; ties by the hash of the
   text, then of the record), and one goes if it is at least --threshold similar to a kept one. What is kept depends
   neither on the order of files and records nor on the workers; kept.jsonl follows the files, sorted by name.

A killed run is completed by the same command: every file and every band in --out/.dedup is there whole or made again.
Memory: about 230 bytes per document (10 million documents: 2.3 GB). On disk: 8 bytes per word, 180 per document.
"""

import core.threads

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core import cli
from core.cli import Output, Positional, Reading
from core.config import setting
from core.errors import UserError
from core.files import new_file, write_json
from core.pool import WorkerPool
from text.contamination import NGRAM, Benchmarks
from text.corpus import read_records, utf8
from text.minhash import BANDS, ROWS, SHINGLE, keep_best, link_band
from text.units import Store, find_exact, read_identified, sign_file, split_paragraphs

# Raise it when the same input gives another result.
VERSION = 1
OUTPUTS = ("dedup.json", "kept.jsonl", "removed.jsonl")
REASONS = ("exact", "near", "paragraph", "contaminated")
_to_json = json.JSONEncoder(ensure_ascii=False, default=str).encode


def dedup(files, out, *, against=(), paragraphs: bool = False, threshold: float = 0.8, reading: Reading | None = None,
          workers: int = 1, overwrite: bool = False) -> dict:
    """Deduplicate `files` into the folder `out`, as the head of this file says; returns what dedup.json holds.

    files, against: paths. threshold: the least Jaccard similarity of a duplicate, above 0 to 1.
    """
    files, against, out = sorted(set(map(str, files))), sorted(set(map(str, against))), Path(out)
    reading = reading or Reading()
    # The first record of every file, before any work.
    for path in files:
        next(read_records([path], reading), None)
    benchmarks = Benchmarks(against) if against else None
    work = _open_folder(out, overwrite, files + against)
    # What a stopped run made of other inputs or settings has other names, and is not found.
    settings = {"version": VERSION, **vars(reading), "paragraphs": paragraphs, "against": list(map(_stamp, against))}
    stems = [work / _name(settings, _stamp(path)) for path in files]
    with WorkerPool(workers, (benchmarks, reading.column, paragraphs)) as pool, \
            tqdm(unit=" documents", disable=None, desc="read") as bar:
        if not sum(sign_file(path, stem, reading, pool, bar) for path, stem in zip(files, stems)):
            raise UserError(f"no document in {', '.join(files)}")
    store = Store(stems)
    verdict = find_duplicates(store, work / _name([stem.name for stem in stems]), threshold)
    report = {"version": VERSION, "threshold": threshold, "bands": BANDS, "rows": ROWS, "shingle_words": SHINGLE,
              "paragraphs": paragraphs, "files": files, "pairs_compared": verdict.compared}
    report |= write_results(files, out, store, reading, paragraphs, verdict, benchmarks)
    store.close()
    write_json(out / "dedup.json", report)
    shutil.rmtree(work)
    return report


def _stamp(path: str) -> list:
    status = os.stat(path)
    return [path, status.st_size, status.st_mtime_ns]


def _name(*parts) -> str:
    return blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def _open_folder(out: Path, overwrite: bool, inputs: list[str]) -> Path:
    """out/.dedup, new or left by a run that was stopped; UserError where `out` holds anything that would be lost."""
    work = out / ".dedup"
    for path in inputs:
        if Path(path).resolve() in [(out / name).resolve() for name in OUTPUTS]:
            raise UserError(f"{path} is an input and would be overwritten; choose another --out")
    if overwrite:
        shutil.rmtree(work, ignore_errors=True)
        for name in OUTPUTS:
            (out / name).unlink(missing_ok=True)
    # Where .dedup is left, kept.jsonl and removed.jsonl are of the run that was stopped.
    for name in OUTPUTS[:1] if work.is_dir() else OUTPUTS:
        if (out / name).exists():
            raise UserError(f"{out / name} exists already; choose another --out, or add --overwrite to replace it")
    work.mkdir(parents=True, exist_ok=True)
    return work


# ---- which units go

@dataclass
class Verdict:
    """What becomes of the U units."""

    stays: np.ndarray
    """int64 [U]: the unit that stays in its place, which may be itself."""
    similarity: np.ndarray
    """float64 [U]: to that unit."""
    near: np.ndarray
    """bool [U]: whether it goes as a near-duplicate, or as the copy of one."""
    compared: int
    """Pairs that were compared."""


def find_duplicates(store: Store, stem: Path, threshold: float) -> Verdict:
    """Exact copies, then the candidates of each band, kept on disk at STEM.band_NN, then the verdict on them."""
    first, best = find_exact(store.units)
    # The empty text has no shingles.
    ranked = best[store.units["length"][best] > 0]
    members, groups = [], []
    for band in range(BANDS):
        path = Path(f"{stem}.band_{band:02d}")
        if not path.exists():
            linked = np.stack(link_band(store.read_band(band)[ranked]))
            with new_file(path, "wb") as file:
                linked.tofile(file)
        member, group = np.fromfile(path, np.uint32).reshape(2, -1)
        members.append(member)
        groups.append(group)
    kept, similarity, compared = keep_best(members, groups, len(ranked),
                                           lambda rank: store.read_shingles(int(ranked[rank])), threshold)
    stays, of_unit = np.arange(len(first)), np.ones(len(first))
    stays[ranked] = ranked[kept]
    of_unit[ranked] = similarity
    near = stays != np.arange(len(first))
    # A copy goes where the best of its copies goes.
    return Verdict(stays[first], of_unit[first], near[first], compared)


# ---- writing

def write_results(files, out: Path, store: Store, reading: Reading, paragraphs: bool, verdict: Verdict,
                  benchmarks: Benchmarks | None) -> dict:
    """Read the files again and write kept.jsonl and removed.jsonl; returns the counts of dedup.json."""
    column, counts = reading.column, dict.fromkeys(("documents", "kept", *REASONS), 0)
    found, unit = set(), 0
    with new_file(out / "kept.jsonl", "wb") as kept, new_file(out / "removed.jsonl", "wb") as removed, \
            tqdm(unit=" documents", disable=None, desc="write") as bar:

        def remove(ident, of, similarity, reason, **more):
            row = {"id": ident, "duplicate_of": of, "similarity": similarity, "reason": reason, **more}
            removed.write(utf8(_to_json(row) + "\n"))
            counts[reason] += 1

        for number, path in enumerate(files):
            hits, base, end = store.read_hits(number), unit, store.base[number + 1]
            for ident, record in read_identified(path, reading):
                parts = split_paragraphs(record[column]) if paragraphs else [record[column]]
                following = unit + (len(parts) + 1) // 2
                if following > end:
                    break
                counts["documents"] += 1
                if unit - base in hits:
                    overlaps = hits[unit - base]
                    found.update(name for name, _, _ in overlaps)
                    remove(ident, overlaps[0][0], overlaps[0][2], "contaminated",
                           overlaps=[dict(zip(("item", "ngrams", "share"), overlap)) for overlap in overlaps])
                    parts = []
                for i, u in enumerate(range(unit, following) if parts else ()):
                    stays = int(verdict.stays[u])
                    if stays != u:
                        reason = "paragraph" if paragraphs else "near" if verdict.near[u] else "exact"
                        remove(store.read_id(u), store.read_id(stays), round(float(verdict.similarity[u]), 6), reason)
                        parts[2 * i] = None
                text = join_paragraphs(parts)
                if text is not None:
                    kept.write(utf8(_to_json({**record, "id": ident, column: text}) + "\n"))
                    counts["kept"] += 1
                unit = following
                bar.update()
            if unit != end:
                raise UserError(f"input file {path} changed while it was read; start again with --overwrite")
    if benchmarks:
        counts["ngram_words"] = NGRAM
        counts["against"] = {path: {**items, "found": sum(name.rpartition(":")[0] == path for name in found)}
                             for path, items in benchmarks.files.items()}
    return counts


def join_paragraphs(parts: list) -> str | None:
    """[paragraph or None, break, paragraph or None, ...] -> the text that is left, or None.

    A paragraph that goes takes the break behind it along, the last one the break before it.
    """
    text, gap = None, ""
    for i in range(0, len(parts), 2):
        if parts[i] is not None:
            text = parts[i] if text is None else text + gap + parts[i]
            gap = parts[i + 1] if i + 1 < len(parts) else ""
    return text


# ---- command line

@dataclass(kw_only=True)
class Dedup:
    """Options of dedup.py."""

    files: Positional[list[str]]
    """.jsonl[.gz|.zst], .parquet or text."""
    against: list[str] = field(default_factory=list)
    """Benchmark files whose items must not be in the corpus: .jsonl, .json, .csv, .tsv, .parquet, text."""
    threshold: float = setting(0.8, above=0, at_most=1)
    """The least Jaccard similarity of a near-duplicate (SlimPajama's)."""
    paragraphs: bool = False
    """Remove repeated paragraphs (of 5 words or more), not documents."""
    workers: int | None = setting(None, at_least=1)
    """Processes. Default: one per core."""
    reading: Reading = field(default_factory=Reading)
    output: Output


def dedup_command(options: Dedup) -> dict:
    """Run the command; returns dedup.json's content."""
    start, out = time.perf_counter(), options.output.out
    report = dedup(options.files, out, against=options.against, paragraphs=options.paragraphs,
                   threshold=options.threshold, reading=options.reading, workers=options.workers or os.cpu_count(),
                   overwrite=options.output.overwrite)
    seconds = time.perf_counter() - start
    print(f"{report['documents']:,} documents in {seconds:.1f} s ({report['documents'] / seconds:,.0f} a second), "
          f"{report['kept']:,} kept in {Path(out) / 'kept.jsonl'}")
    print("removed: " + ", ".join(f"{report[reason]:,} {reason}" for reason in REASONS)
          + ("  (paragraph counts paragraphs)" if options.paragraphs else ""))
    for path, items in report.get("against", {}).items():
        print(f"  {path}: {items['found']:,} of {items['items']:,} items found in the corpus"
              + (f"; {items['too_short']:,} have no field of {NGRAM} words" if items["too_short"] else ""))
    return report


def main() -> int:
    return cli.run("dedup.py", __doc__, (Dedup, dedup_command))


if __name__ == "__main__":
    sys.exit(main())
