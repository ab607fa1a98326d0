"""Remove from a corpus its exact copies, its near-duplicates, and what overlaps with benchmarks.

    python dedup.py clean/kept.jsonl more.parquet --out corpus --against bench/*.jsonl mmlu/test/*.csv
    python dedup.py manuals.jsonl --out corpus --paragraphs

The folder --out gets kept.jsonl (records with all their keys), removed.jsonl (id, duplicate_of, similarity, reason:
exact | near | paragraph | contaminated) and, last, dedup.json (counts and settings).

1. A document that shares 13 words in a row with an item of a benchmark goes; its row in removed.jsonl lists the items.
2. Words are NFC, casefolded, split at white space; documents of equal words are exact copies.
3. Near-duplicates: MinHash proposes pairs, the Jaccard similarity of their 5-word shingles decides.
4. Documents are walked from best to worst (the longest first; ties by the hash of the text, then of the record), and
   one goes if it is at least --threshold similar to a kept one. What is kept depends neither on the order of files and
   records nor on the workers; kept.jsonl follows the files, sorted by name.

A killed run is completed by the same command: every file in --out/.dedup is complete or is made again.
Memory: about 230 bytes per document (10 million documents: 2.3 GB). On disk: 8 bytes per word, 180 per document.
"""

import core.threads

import contextlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from core import cli
from core.cli import Output, Positional, Reading
from core.config import setting
from core.errors import UserError
from core.files import (
    clear_leftovers,
    file_holds,
    lock_folder,
    make_folder,
    new_file,
    refuse_existing,
    settle,
    write_json,
)
from core.hashing import short_digest
from core.pool import WorkerPool
from text import duplicates
from text.corpus import read_records, to_line
from text.kinds import LISTS, TEXTS, list_files

# Raise it when the same input gives another result, and LAYOUT when the files in --out/.dedup change.
VERSION, LAYOUT = 1, 3
OUTPUTS = ("dedup.json", "kept.jsonl", "removed.jsonl")
REASONS = ("exact", "near", "paragraph", "contaminated")


@dataclass(kw_only=True)
class Dedup:
    """Options of dedup.py."""

    files: Positional[list[str]]
    """Files, folders, patterns, @LIST or hf://org/dataset: text, .jsonl or .parquet, also .gz and .zst."""
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


def dedup(options: Dedup) -> dict:
    """Deduplicate files into a folder, as the head of this file says; returns what dedup.json holds."""
    files, against = (sorted(set(list_files(paths, wanted)))
                      for paths, wanted in ((options.files, TEXTS), (options.against, TEXTS + LISTS)))
    out, reading = Path(options.output.out), options.reading
    # The first record of every file is read before any work, so that a wrong file is refused at once.
    for path in files:
        next(read_records([path], reading), None)
    benchmarks = duplicates.Benchmarks(against, reading) if against else None
    make_folder(out)
    with claim_results(out, options.output.overwrite, files + against) as work:
        return dedup_into(out, work, files, against, benchmarks, options)


def dedup_into(out: Path, work: Path, files: list[str], against: list[str], benchmarks, options: Dedup) -> dict:
    reading, paragraphs = options.reading, options.paragraphs
    # Other inputs or settings give other names, so what a stopped run made of them is not found.
    settings = [VERSION, LAYOUT, vars(reading), paragraphs, *map(_stamp, against)]
    folders = [work / short_digest(json.dumps([settings, _stamp(path)]).encode()) for path in files]
    with WorkerPool(options.workers or os.cpu_count(), (benchmarks, reading.column, paragraphs)) as pool, \
            tqdm(unit=" documents", disable=None, desc="read") as bar:
        if not sum(duplicates.sign_file(path, folder, reading, pool, bar) for path, folder in zip(files, folders)):
            raise UserError(f"no document in {', '.join(files)}")
    store = duplicates.Store(folders)
    *verdict, compared = duplicates.find_duplicates(store, options.threshold)
    counts = write_results(files, out, store, reading, paragraphs, *verdict)
    report = {"version": VERSION, "threshold": options.threshold, "bands": duplicates.BANDS, "rows": duplicates.ROWS,
              "shingle_words": duplicates.SHINGLE, "paragraphs": paragraphs, "files": files,
              "pairs_compared": compared, **counts}
    if benchmarks:
        found = {overlap["item"] for overlaps in store.hits.values() for overlap in overlaps}
        report |= {"ngram_words": duplicates.NGRAM, "against": {
            path: {**items, "found": sum(name.rpartition(":")[0] == path for name in found)}
            for path, items in benchmarks.files.items()}}
    write_json(out / "dedup.json", report)
    return report


def _stamp(path: str) -> list:
    status = os.stat(path)
    return [path, status.st_size, status.st_mtime_ns]


@contextlib.contextmanager
def claim_results(out: Path, overwrite: bool, inputs: list[str]):
    """out/.dedup, new or left by a run that was stopped, with `out` locked; it goes when the results are complete.
    UserError where `out` holds anything that would be lost."""
    work = out / ".dedup"
    for path in inputs:
        if Path(path).resolve() in [(out / name).resolve() for name in OUTPUTS]:
            raise UserError(f"{path} is an input and would be overwritten; choose another --out")
    with lock_folder(out / ".lock", out):
        # Where .dedup exists, kept.jsonl and removed.jsonl are of the run that was stopped and may be replaced.
        was_stopped = work.is_dir()
        ours = was_stopped or file_holds(out / OUTPUTS[0], b'"shingle_words"')
        for name in OUTPUTS[:1] if was_stopped else OUTPUTS:
            if overwrite and not ours and (out / name).exists():
                raise UserError(f"{out / name} stands without a dedup.json of dedup.py, so it is not replaced; choose "
                                f"another --out, or move it away")
            refuse_existing(out / name, overwrite)
        if overwrite:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(exist_ok=True)
        clear_leftovers(work)
        yield work
        shutil.rmtree(work)


# ---- writing

def write_results(files, out: Path, store, reading: Reading, paragraphs: bool, stays, similarity) -> dict:
    """Read the files again and write kept.jsonl and removed.jsonl, by what `find_duplicates` says of each unit; returns
    the counts of dedup.json."""
    column, counts, unit = reading.column, dict.fromkeys(("documents", "empty", "kept", *REASONS), 0), 0
    with new_file(out / "kept.jsonl", "wb") as kept, new_file(out / "removed.jsonl", "wb") as removed, \
            tqdm(unit=" documents", disable=None, desc="write") as bar:

        def remove(ident, of, similarity, reason, **more):
            row = {"id": ident, "duplicate_of": of, "similarity": similarity, "reason": reason, **more}
            removed.write(to_line(row))
            counts[reason] += 1

        for path, end in zip(files, store.base[1:]):
            for ident, record in duplicates.read_identified(path, reading):
                parts = duplicates.split_paragraphs(record[column]) if paragraphs else [record[column]]
                following = unit + (len(parts) + 1) // 2
                if following > end:
                    break
                counts["documents"] += 1
                counts["empty"] += not record[column]
                if overlaps := store.hits.get(unit):
                    remove(ident, overlaps[0]["item"], overlaps[0]["share"], "contaminated", overlaps=overlaps)
                    parts = []
                for i, u in enumerate(range(unit, following) if parts else ()):
                    if stays[u] != u:
                        same = (store.units["exact"][u] == store.units["exact"][stays[u]]).all()
                        reason = "paragraph" if paragraphs else "exact" if same else "near"
                        remove(store.read_id(u), store.read_id(stays[u]), round(float(similarity[u]), 6), reason)
                        parts[2 * i] = None
                # A paragraph that goes takes the break behind it along, the last one the break before it.
                left = [piece for i in range(0, len(parts), 2) if parts[i] is not None for piece in parts[i:i + 2]]
                if left:
                    text = "".join(left if len(left) % 2 else left[:-1])
                    kept.write(to_line({**record, "id": ident, column: text}))
                    counts["kept"] += 1
                unit = following
                bar.update()
            if unit != end:
                raise UserError(f"input file {path} changed while it was read; start again with --overwrite")
        settle(kept, removed)
        # The report on the old files may not stand beside new ones.
        (out / OUTPUTS[0]).unlink(missing_ok=True)
    return counts


# ---- command line

def dedup_command(options: Dedup) -> dict:
    """Run the command; returns dedup.json's content."""
    start, report = time.perf_counter(), dedup(options)
    seconds = time.perf_counter() - start
    print(f"{report['documents']:,} documents in {seconds:.1f} s ({report['documents'] / seconds:,.0f} a second), "
          f"{report['kept']:,} kept in {Path(options.output.out) / 'kept.jsonl'}"
          + (f"; {report['empty']:,} are empty" if report["empty"] else ""))
    print("removed: " + ", ".join(f"{report[reason]:,} {reason}" for reason in REASONS)
          + ("  (paragraph counts paragraphs)" if options.paragraphs else ""))
    for path, items in report.get("against", {}).items():
        print(f"  {path}: {items['found']:,} of {items['items']:,} items found in the corpus"
              + (f"; {items['too_short']:,} have no field of {duplicates.NGRAM} words" if items["too_short"] else ""))
    return report


def main() -> int:
    return cli.run("dedup.py", __doc__, (Dedup, dedup_command))


if __name__ == "__main__":
    sys.exit(main())
