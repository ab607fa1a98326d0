"""Sources of several packed folders: parts packed by many machines, and score buckets that a curriculum reads in order.

    shards/wiki/part_0001_of_0008/ ...   one folder per machine; the manifest beside them joins them into one source
    shards/law/bucket_00/ ...            equally many documents each, by a score; buckets.json has their order
"""

import contextlib
import json
import math
import re
import tempfile
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.files import write_json
from text.mixture import Bucket, SourceConfig
from text.shards import SPLITS, describe_split, new_source, pack, read_index, read_manifest

# Documents of one file that go to the same part.
BLOCK = 1024


# ---- parts of one source, packed by many machines

def part_folder(out, k: int, n: int) -> Path:
    """Where part k of n (from 1) is packed."""
    return Path(out) / f"part_{k:04d}_of_{n:04d}"


def read_part(text: str) -> tuple[int, int]:
    """(k, n) of "K/N"."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= 9999:
        raise UserError(f"{text!r} is no part; write K/N with K from 1 to N, e.g. 3/8")
    return int(match[1]), int(match[2])


def deal_documents(files: list, documents, k: int, n: int):
    """The documents of part k of n (from 1); documents(files) yields those of some files.

    Every n-th file goes to the same part. Where there are fewer files than parts, blocks of 1,024 documents take turns:
    of 2 parts, part 1 gets the documents 0 to 1023 and 2048 to 3071.
    """
    if len(files) >= n:
        return documents(files[k - 1::n])
    return (document for i, document in enumerate(documents(files)) if i // BLOCK % n == k - 1)


def merge_parts(out) -> Path:
    """Write the manifest of a folder whose parts are all packed; returns the folder. The shards stay where they are."""
    out = Path(out)
    found = sorted(path.parent.name for path in out.glob(f"part_{'[0-9]' * 4}_of_{'[0-9]' * 4}/manifest.json"))
    if not found:
        raise UserError(f"{out} holds no packed parts; make them with data.py pack --part 1/N, 2/N, ...")
    n = int(found[0].rpartition("_")[2])
    wanted = [part_folder(out, k, n).name for k in range(1, n + 1)]
    if found != wanted:
        odd = sorted(set(found) ^ set(wanted))
        what = "is missing; pack it with --part" if odd[0] in wanted else "does not belong there; remove it"
        raise UserError(f"{out} does not hold the parts 1 to {n} alone: {odd[0]} {what}")
    parts = {name: read_manifest(out / name) for name in wanted}
    first = parts[wanted[0]]
    for name, manifest in parts.items():
        for key in ("tokenizer", "bos", "heldout", "dtype", "inputs"):
            if manifest[key] != first[key]:
                raise UserError(f"{out}/{name} has another {key} than {wanted[0]}: {manifest[key]} and {first[key]}; "
                                f"pack it again like the others")
    splits = {split: describe_split([{**shard, "name": f"{name}/{shard['name']}"} for name, manifest in parts.items()
                                     for shard in manifest["splits"][split]["shards"]]) for split in SPLITS}
    if not splits["train"]["tokens"]:
        raise UserError(f"nothing to train on: the parts of {out} hold no training documents")
    empty = sum(manifest["empty_documents_dropped"] for manifest in parts.values())
    write_json(out / "manifest.json", {**first, "empty_documents_dropped": empty, "splits": splits})
    return out


# ---- score buckets

def pack_buckets(records, tokenizer, out, buckets: int, score: str, *, first: str = "low", column: str = "text",
                 overwrite: bool = False, **options) -> dict:
    """Pack the documents into `buckets` folders of equally many documents, by their metadata.scores[score]; returns
    what buckets.json says. A curriculum reads bucket 0 first: that of the `first` ("low" or "high") scores.

    `records()` yields (where, record) and is called twice: for the scores, then for the texts. Equal scores keep the
    order of the input. `options` are pack's. The folder appears whole or not at all.
    """
    out = Path(out)
    with new_source(out, overwrite) as partial:
        scores = np.array([_score_of(record, score, where) for where, record in records()])
        if len(scores) < buckets:
            raise UserError(f"{len(scores)} documents do not fill {buckets} buckets; ask for fewer")
        order = np.argsort(-scores if first == "high" else scores, kind="stable")
        # The bucket of each document, in the order of the input.
        bucket_of = np.empty(len(scores), np.int64)
        bucket_of[order] = np.arange(len(scores)) * buckets // len(scores)
        parts = []
        with contextlib.ExitStack() as stack:
            # The texts of each bucket go to a file of their own first, so that no bucket has to fit in memory.
            spools = [stack.enter_context(tempfile.TemporaryFile("w+", dir=partial)) for _ in range(buckets)]
            for k, (_, record) in zip(bucket_of, records(), strict=True):
                spools[k].write(json.dumps(record[column]) + "\n")
            for k, spool in enumerate(spools):
                name, inside = f"bucket_{k:02d}", scores[bucket_of == k]
                spool.seek(0)
                try:
                    manifest = pack(map(json.loads, spool), tokenizer, partial / name, **options)
                except UserError as error:
                    raise UserError(f"bucket {k} of {buckets}: {error}".replace(str(partial), str(out))) from None
                spool.close()
                parts.append({"name": name, "low": float(inside.min()), "high": float(inside.max()),
                              **{key: manifest["splits"]["train"][key] for key in ("documents", "tokens")}})
        index = {"format": "nanocpt-buckets", "version": 1, "score": score, "first": first, "buckets": parts}
        write_json(partial / "buckets.json", index)
    return index


def _score_of(record: dict, score: str, where: str) -> float:
    metadata = record.get("metadata")
    scores = metadata.get("scores") if isinstance(metadata, dict) else None
    value = scores.get(score) if isinstance(scores, dict) else None
    if type(value) not in (int, float) or not math.isfinite(value):
        known = ", ".join(scores) if isinstance(scores, dict) else "no scores"
        raise UserError(f"{where} has no number under metadata.scores.{score} (it has: {known}); clean.py writes "
                        f"scores")
    return float(value)


def read_buckets(folder) -> dict | None:
    """What buckets.json says of a folder of score buckets; None for a folder without one."""
    path = Path(folder) / "buckets.json"
    if not path.is_file():
        return None
    return read_index(path, "nanocpt-buckets", 1, lambda index: [bucket["name"] for bucket in index["buckets"]])


def packed_folders(folder) -> list[Path]:
    """The folder itself or, where it holds score buckets, theirs in order."""
    index = read_buckets(folder)
    return [Path(folder) / part["name"] for part in index["buckets"]] if index else [Path(folder)]


def open_buckets(sources: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
    """The sources, one that holds score buckets replaced by its buckets as sources NAME/0, NAME/1, ..."""
    found = {}
    for name, source in sources.items():
        if not source.path or read_buckets(source.path) is None:
            found[name] = source
            continue
        folders = packed_folders(source.path)
        for k, folder in enumerate(folders):
            tokens = read_manifest(folder)["splits"]["train"]["tokens"]
            found[f"{name}/{k}"] = Bucket(**{**vars(source), "path": str(folder)}, of=name, low=k / len(folders),
                                          high=(k + 1) / len(folders), tokens=tokens)
    return found
