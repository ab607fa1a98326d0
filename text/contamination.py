"""Which documents hold text of a benchmark: GPT-3's rule (Brown et al. 2020, appendix C), a shared 13-gram of words."""

import csv
import json
import os
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from core.errors import UserError
from text.corpus import json_records, read_documents
from text.minhash import fold_words, hash_ngrams

NGRAM = 13


class Benchmarks:
    """The 13-grams of benchmark files, sorted, each with the items in which it stands. A field under 13 words has none.

    files: {path: {"items", "too_short"}}.
    """

    def __init__(self, paths: list[str]):
        self.names, self.sizes, self.files = [], [], {}
        grams, owners = [], []
        for path in paths:
            first = len(self.names)
            for number, item in enumerate(read_items(path), 1):
                fields = [words for words in map(plain_words, find_strings(item)) if words.count(" ") >= NGRAM - 1]
                own = np.unique(np.concatenate([np.zeros(0, np.uint64), *hash_ngrams(fields, NGRAM)]))
                grams.append(own)
                owners.append(np.full(len(own), len(self.names), np.uint32))
                self.sizes.append(len(own))
                self.names.append(f"{path}:{number}")
            if len(self.names) == first:
                raise UserError(f"benchmark file {path} holds no item")
            self.files[path] = {"items": len(self.sizes) - first, "too_short": self.sizes[first:].count(0)}
        grams, owners = np.concatenate(grams), np.concatenate(owners)
        order = grams.argsort(kind="stable")
        grams, self.owners = grams[order], owners[order]
        first = np.flatnonzero(np.diff(grams, prepend=~grams[:1]) != 0)
        self.grams, self.ends = grams[first], np.append(first, len(grams))

    def find_overlaps(self, text: str) -> list[tuple[str, int, float]]:
        """[(item, 13-grams shared, share of the item's), ...], most shared first, ten at most."""
        text = plain_words(text)
        if text.count(" ") < NGRAM - 1 or not len(self.grams):
            return []
        own = np.unique(hash_ngrams([text], NGRAM)[0])
        at = np.minimum(self.grams.searchsorted(own), len(self.grams) - 1)
        hits = at[self.grams[at] == own].tolist()
        shared = Counter(i for hit in hits for i in self.owners[self.ends[hit]:self.ends[hit + 1]].tolist())
        best = sorted(shared.items(), key=lambda pair: (-pair[1], pair[0]))[:10]
        return [(self.names[i], n, round(n / self.sizes[i], 4)) for i, n in best]


def plain_words(text: str) -> str:
    """Folded words without punctuation, which benchmarks and their copies write in many ways."""
    return " ".join(re.findall(r"\w+", fold_words(text)))


def read_items(path: str):
    """Yield every item of a benchmark file: records of .jsonl[.gz|.zst] or .parquet, the entries of a .json file, the
    rows of .csv or .tsv (the header too), the documents of a text file."""
    stem, suffix = re.sub(r"\.(gz|zst)$", "", path), Path(path).suffix
    try:
        if stem.endswith((".jsonl", ".ndjson")) and os.path.isfile(path):
            yield from (item for _, item in json_records(path))
        elif suffix == ".parquet" and os.path.isfile(path):
            import pyarrow.parquet as parquet
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        elif suffix == ".json" and os.path.isfile(path):
            items = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            yield from items.values() if isinstance(items, dict) else items
        elif suffix in (".csv", ".tsv") and os.path.isfile(path):
            csv.field_size_limit(2**31 - 1)
            with open(path, encoding="utf-8-sig", newline="") as file:
                yield from csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",")
        else:
            yield from read_documents([path])
    except UserError:
        raise
    except (ValueError, EOFError, OSError, zlib.error, RecursionError, TypeError, csv.Error) as error:
        # Errors of the readers, pyarrow's too; none of them names the file.
        raise UserError(f"file {path} cannot be read: {error}; convert it or fetch it again") from None


def find_strings(value):
    """Yield every string in a value made of dicts and lists."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (dict, list)):
            stack += reversed(value.values() if isinstance(value, dict) else value)
