"""Text -> token shards -> batches. A batch is a pure function of (seed, step) and the shards' manifests.

    python data.py pack --tokenizer DIR_OR_FILE --out shards/legal legal.txt --documents blank
    python data.py pack --buckets 10 --score quality --tokenizer DIR_OR_FILE --out shards/legal kept.jsonl
    python data.py verify shards/legal
    python data.py info shards/legal
    python data.py mix recipes/cpt.toml --preview --data.schedule staged --train.steps 1000
    python data.py mix --domain legal.jsonl --general wiki.jsonl --out mixed.jsonl --domain-ratio 0.7

One source is one folder:

    manifest.json       the commit record, written last: tokenizer, counts, hashes of every file
    train_000000.bin    1024-byte header (llm.c's, our fields in its spare words), then uint16 or uint32 tokens
    train_000000.idx    uint64, where each document ends (datatrove's); documents are never split over shards
    train_000000.bytes  uint32, UTF-8 bytes of each document's text, so that bits per byte are exact
    heldout_000000.*    documents whose text hash falls in the held-out share; never trained on

or, packed by a score, a folder of such folders in the order in which a curriculum reads them, and buckets.json.

B sequences a step, T tokens of context, L tokens of a source.
"""

import bisect
import contextlib
import dataclasses
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import mixture
from config import ArgumentParser, main_guard, merge, parse, read_toml, to_toml, write_json
from mixture import Bucket, DataConfig, LengthConfig, SourceConfig

HEADER_BYTES = 1024
MAGIC = {2: (20240520, 1), 4: (20240801, 7)}       # llm.c's magic and version by token size
OUR_MAGIC, FORMAT_VERSION = 0x5450436E, 1          # "nCPT"
ORDER_VERSION = 1                                  # raise it when the same seed gives another order
IGNORE = -100
SPLITS = ("train", "heldout")
MIX_HELP = """Show what a recipe draws when, as a table and a picture; --data.* and --train.* settings come last:

    python data.py mix recipes/cpt.toml --preview --data.schedule staged --train.steps 1000

or write a mixed JSONL for other tools, each record with its source_type:

    python data.py mix --domain legal.jsonl --general wiki.jsonl --out mixed.jsonl --domain-ratio 0.7"""
NOT_TEXT = (".json", ".csv", ".tsv", ".html", ".htm", ".xml", ".pdf", ".docx", ".zip")


# ---- reading documents

def read_documents(path: str, documents: str = "blank", separator: str | None = None, column: str = "text",
                   config: str | None = None, split: str = "train"):
    """Yield the text of each document of a file, or of an hf://org/dataset[@revision] through `datasets`.

    .jsonl[.gz|.zst] and .parquet: one record a document, its text under `column`. Anything else is text: one document
    per line, per block between blank lines, or per file; or between `separator` strings.
    """
    for _, record in read_records(path, documents, separator, column, config, split, only=[column]):
        yield record[column]


def read_records(path: str, documents: str = "blank", separator: str | None = None, column: str = "text",
                 config: str | None = None, split: str = "train", only: list | None = None):
    """Yield (where it stands, record) for each document; the record has a string under `column` and, unless a parquet
    file is to give `only` some columns, all else that the file says of it."""
    if path.startswith("hf://"):
        from datasets import load_dataset
        name, _, revision = path.removeprefix("hf://").partition("@")
        try:
            rows = load_dataset(name, config, split=split, streaming=True, revision=revision or None)
            yield from _with_text(((f"{path} record {i}", row) for i, row in enumerate(rows, 1)), column)
        except OSError as error:               # no such dataset, no network: not to be taken for a full disk
            raise ValueError(f"{path} cannot be read from the Hub: {str(error).splitlines()[0]}") from None
        return
    if not os.path.isfile(path):
        raise ValueError(f"input file {path} " + ("is a folder; name the files in it" if os.path.isdir(path)
                                                  else "does not exist"))
    if Path(path).suffix.lower() in NOT_TEXT:
        raise ValueError(f"input file {path} is no plain text; make it .txt or .jsonl (one {{\"text\": ...}} a line)")
    stem = re.sub(r"\.(gz|zst)$", "", path)
    try:
        if stem.endswith(".parquet"):
            yield from _with_text(_parquet_records(path, column, only), column)
        elif stem.endswith((".jsonl", ".ndjson")):
            yield from _with_text(_json_records(path), column)
        else:
            yield from ((path, {column: text}) for text in _text_documents(path, documents, separator))
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:       # none of which names the file
        raise ValueError(f"input file {path} cannot be read as UTF-8 text: {error}; convert it or fetch it again"
                         ) from None


def _with_text(records, column):
    for where, record in records:
        text = record.get(column) if isinstance(record, dict) else None
        if not isinstance(text, str):
            known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{where} has no text under {column!r} (it has: {known}); name the column with --column")
        yield where, record


def _texts(records, column):
    return (record[column] for _, record in _with_text(records, column))


def _json_records(path):
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{path} line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:      # a number of 5,000 digits, a thousand brackets
                    raise ValueError(f"{path} line {number} is not JSON: {error}") from None


def _parquet_records(path, column, only):
    import pyarrow
    import pyarrow.parquet as parquet
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None
    if column not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column {column!r} (it has: {', '.join(file.schema_arrow.names)}); "
                         f"name the column with --column")
    for batch in file.iter_batches(batch_size=1024, columns=only):
        yield from ((path, record) for record in batch.to_pylist())


def _open_text(path):
    if path.endswith(".zst"):
        import io

        import pyarrow
        return io.TextIOWrapper(pyarrow.input_stream(path, compression="zstd"), encoding="utf-8-sig", newline="\n")
    opener = gzip.open if path.endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig", newline="\n")


def _text_documents(path, documents, separator):
    with _open_text(path) as file:
        if separator:
            rest = ""
            while part := file.read(1 << 20):
                *whole, rest = (rest + part).split(separator)
                yield from (text.strip("\r\n") for text in whole)
            if rest.strip("\r\n"):
                yield rest.strip("\r\n")
        elif documents == "file":
            yield file.read()
        elif documents == "line":
            yield from (line.rstrip("\r\n") for line in file)
        else:
            block = []
            for line in file:
                if line.strip():
                    block.append(line)
                elif block:
                    yield "".join(block).rstrip("\r\n")
                    block = []
            if block:
                yield "".join(block).rstrip("\r\n")


# ---- writing shards

class ShardWriter:
    """Appends documents to shards of about `shard_tokens` tokens. Plain writes, so that a full disk is an error."""

    def __init__(self, folder: Path, split: str, tokenizer, itemsize: int, shard_tokens: int):
        self.folder, self.split, self.tokenizer, self.shard_tokens = folder, split, tokenizer, shard_tokens
        self.dtype = np.dtype(f"<u{itemsize}")
        self.shards, self.file = [], None

    def add(self, ids: np.ndarray, lengths: np.ndarray, nbytes: np.ndarray):
        """Documents one after the other: token ids [n], tokens and text bytes of each document [documents]."""
        while len(lengths):
            if self.file is None:
                self._open()
            ends = np.cumsum(lengths)
            fits = int(np.searchsorted(ends, self.shard_tokens - self.tokens, "right"))
            fits = max(fits, 1 if self.tokens == 0 else 0)           # one document may be larger than a shard
            if fits:
                self._append(ids[:ends[fits - 1]], ends[:fits], nbytes[:fits])
                ids, lengths, nbytes = ids[ends[fits - 1]:], lengths[fits:], nbytes[fits:]
            if len(lengths):
                self.close()

    def _open(self):
        self.name = f"{self.split}_{len(self.shards):06d}"
        self.file = open(self.folder / f"{self.name}.bin", "wb")     # noqa: SIM115  (stays open until close())
        self.file.write(bytes(HEADER_BYTES))
        self.tokens, self.max_id, self.hash, self.ends, self.nbytes = 0, 0, hashlib.sha256(), [], []

    def _append(self, ids, ends, nbytes):
        payload = ids.astype(self.dtype)
        self.max_id = max(self.max_id, int(ids.max()))
        self.hash.update(payload)
        self.file.write(payload)
        self.ends.append(ends + self.tokens)
        self.nbytes.append(nbytes)
        self.tokens += len(ids)

    def close(self):
        """Finish the shard under way; returns nothing, the record is in self.shards."""
        if self.file is None:
            return
        ends, nbytes = np.concatenate(self.ends).astype("<u8"), np.concatenate(self.nbytes).astype("<u4")
        record = {"name": self.name, "tokens": self.tokens, "documents": len(ends), "bytes": int(nbytes.sum()),
                  "max_id": self.max_id, "sha256": self.hash.hexdigest()}
        self.file.seek(0)
        self.file.write(shard_header(record, describe_tokenizer(self.tokenizer), self.dtype.itemsize).tobytes())
        _sync_and_close(self.file)
        for suffix, array in (("idx", ends), ("bytes", nbytes)):
            with open(self.folder / f"{self.name}.{suffix}", "wb") as file:
                file.write(array.tobytes())
                file.flush()
                os.fsync(file.fileno())
            record[f"{suffix}_sha256"] = hashlib.sha256(array).hexdigest()
        self.shards.append(record)
        self.file = None


def shard_header(record: dict, tokenizer: dict, itemsize: int) -> np.ndarray:
    """int32 [256]: what stands before a shard's tokens; all of it follows from the manifest."""
    header = np.zeros(256, "<i4")
    header[:2] = MAGIC[itemsize]
    header[2:6] = record["tokens"], OUR_MAGIC, FORMAT_VERSION, itemsize
    header[6:8] = np.array([record["documents"]], "<u8").view("<i4")
    ids = (tokenizer["vocab_size"], tokenizer["bos_id"], tokenizer["eos_id"], record["max_id"])
    header[8:12] = [-1 if x is None else x for x in ids]
    header[16:24] = np.frombuffer(bytes.fromhex(tokenizer["fingerprint"]), "<i4")
    header[24:32] = np.frombuffer(bytes.fromhex(record["sha256"]), "<i4")
    return header


def describe_tokenizer(tokenizer) -> dict:
    return {"fingerprint": tokenizer.fingerprint, "library": tokenizer.library, "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}


def _sync_and_close(file):
    file.flush()
    os.fsync(file.fileno())
    file.close()


def pack(texts, tokenizer, out, *, heldout: float = 0.02, bos: bool | None = None, shard_tokens: int = 10**8,
         workers: int = 2, inputs: list | None = None, batch_bytes: int = 1 << 21, overwrite: bool = False) -> dict:
    """Tokenise `texts` into shards at `out`; returns the manifest. The folder appears whole or not at all.

    Every document gets an EOS at its end, and a BOS at its start where the tokenizer says the model was trained so
    (`bos` overrides). `heldout` is the share of documents kept for evaluation, chosen by the hash of their text.
    The result depends neither on `workers` nor on `batch_bytes`.
    """
    out, bos = Path(out), tokenizer.add_bos if bos is None else bos
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer has no EOS token, and every document must end with one; name it as eos_token "
                         "in tokenizer_config.json beside the tokenizer")
    if bos and tokenizer.bos_id is None:
        raise ValueError("--bos was asked for, but the tokenizer has no BOS token")
    if not 0 <= heldout < 1:
        raise ValueError(f"heldout is {heldout}, but must be a share from 0 to below 1")
    if workers < 1 or not 1 <= shard_tokens < 2**31:
        raise ValueError(f"{workers} workers and {shard_tokens} tokens a shard were asked for; there must be at least "
                         f"1 worker, and from 1 to 2**31 - 1 tokens a shard")
    with _new_folder(out, overwrite) as partial:
        itemsize = 2 if tokenizer.vocab_size <= 65536 else 4
        writers = {split: ShardWriter(partial, split, tokenizer, itemsize, shard_tokens) for split in SPLITS}
        empty = 0
        with ThreadPoolExecutor(workers) as pool:
            waiting = deque()
            for batch in _batches(texts, batch_bytes):
                waiting.append(pool.submit(_encode, tokenizer, batch, bos, heldout))
                if len(waiting) > workers:
                    empty += _write(writers, *waiting.popleft().result())
            while waiting:
                empty += _write(writers, *waiting.popleft().result())
        for writer in writers.values():
            writer.close()
        splits = {name: {"tokens": sum(s["tokens"] for s in writer.shards),
                         "documents": sum(s["documents"] for s in writer.shards),
                         "bytes": sum(s["bytes"] for s in writer.shards), "shards": writer.shards}
                  for name, writer in writers.items()}
        if not splits["train"]["tokens"]:
            raise ValueError(f"nothing to train on: {empty} empty documents, {splits['heldout']['documents']} held out")
        manifest = {
            "format": "nanocpt-shards", "version": FORMAT_VERSION, "dtype": f"uint{8 * itemsize}",
            "tokenizer": describe_tokenizer(tokenizer),
            "bos": bos, "eos": True, "heldout": heldout, "heldout_rule": "blake2b(text) mod 10000 < 10000 * heldout",
            "inputs": inputs or [], "empty_documents_dropped": empty, "splits": splits,
        }
        with open(partial / "manifest.json", "w", encoding="utf-8") as file:
            file.write(json.dumps(manifest, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
    return manifest


@contextlib.contextmanager
def _new_folder(out: Path, overwrite: bool):
    """A hidden folder to write to, which becomes `out` in the end; after an error nothing is left of it."""
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already; remove it, choose another --out or add --overwrite")
    if out.exists() and not any((out / name).is_file() for name in ("manifest.json", "buckets.json")):
        raise ValueError(f"{out} is no packed source, so --overwrite does not remove it; choose another --out")
    partial = out.with_name(f".{out.name}.partial")        # hidden, so that it is nobody's but a killed pack's
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            old = partial.with_name(partial.name + ".old")
            out.rename(old)
            partial.rename(out)
            shutil.rmtree(old)
        else:
            partial.rename(out)
    except OSError as error:
        raise ValueError(f"{out} could not be written: {error.strerror or error}; nothing is left of it") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _batches(texts, batch_bytes):
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer, texts, bos, heldout):
    """One batch in a worker thread: (per split: ids, lengths, bytes), number of empty documents."""
    limit = round(10000 * heldout)
    raw = [utf8(text) for text in texts]
    kept = [i for i, data in enumerate(raw) if data]
    encoded = tokenizer.encode_batch([texts[i] for i in kept])
    parts = {split: ([], [], []) for split in SPLITS}
    start = [np.array([tokenizer.bos_id], np.uint32)] if bos else []
    end = np.array([tokenizer.eos_id], np.uint32)
    empty = len(texts) - len(kept)
    for i, ids in zip(kept, encoded):
        if not len(ids):
            empty += 1
            continue
        digest = hashlib.blake2b(raw[i], digest_size=8).digest()
        split = "heldout" if int.from_bytes(digest, "little") % 10000 < limit else "train"
        pieces, lengths, nbytes = parts[split]
        pieces += [*start, ids, end]
        lengths.append(len(ids) + len(start) + 1)
        nbytes.append(len(raw[i]))
    return {split: (np.concatenate(pieces), np.array(lengths), np.array(nbytes))
            for split, (pieces, lengths, nbytes) in parts.items() if pieces}, empty


def utf8(text: str) -> bytes:
    """UTF-8 bytes; half a surrogate pair, which JSON can carry, becomes U+FFFD as in tokenizer.py."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _write(writers, parts, empty) -> int:
    for split, part in parts.items():
        writers[split].add(*part)
    return empty


# ---- score buckets

def pack_buckets(records, tokenizer, out, buckets: int, score: str, *, first: str = "low", column: str = "text",
                 overwrite: bool = False, **options) -> dict:
    """Pack the documents into `buckets` folders of as many documents each, by their metadata.scores[score]; returns
    what buckets.json says. Bucket 0 is the one that a curriculum reads first: the `first` ("low" or "high") scores.

    `records()` gives (where, record) and is called twice. Equal scores keep the order of the input. `options` are
    pack's. The folder appears whole or not at all.
    """
    out = Path(out)
    if not 2 <= buckets <= 100:
        raise ValueError(f"{buckets} buckets were asked for; there must be from 2 to 100")
    with _new_folder(out, overwrite) as partial:
        values = np.array([_score_of(record, score, where) for where, record in records()])
        if len(values) < buckets:
            raise ValueError(f"{len(values)} documents do not fill {buckets} buckets; ask for fewer")
        order = np.argsort(-values if first == "high" else values, kind="stable")
        places = np.empty(len(values), np.int64)
        places[order] = np.arange(len(values)) * buckets // len(values)
        with contextlib.ExitStack() as stack:                  # the texts apart, on disk, so that memory stays small
            spools = [stack.enter_context(open(partial / f"{k}.spool", "w", encoding="utf-8")) for k in range(buckets)]
            for place, (_, record) in zip(places, records(), strict=True):
                spools[place].write(json.dumps(record[column]) + "\n")
        parts = []
        for k in range(buckets):
            name, inside = f"bucket_{k:02d}", values[places == k]
            with open(partial / f"{k}.spool", encoding="utf-8") as file:
                try:
                    manifest = pack(map(json.loads, file), tokenizer, partial / name, **options)
                except ValueError as error:
                    raise ValueError(f"bucket {k} of {buckets}: {error}".replace(str(partial), str(out))) from None
            (partial / f"{k}.spool").unlink()
            parts.append({"name": name, "low": float(inside.min()), "high": float(inside.max()),
                          **{key: manifest["splits"]["train"][key] for key in ("documents", "tokens")}})
        index = {"format": "nanocpt-buckets", "version": 1, "score": score, "first": first, "buckets": parts}
        with open(partial / "buckets.json", "w", encoding="utf-8") as file:
            file.write(json.dumps(index, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
    return index


def _score_of(record, score, where) -> float:
    metadata = record.get("metadata")
    scores = metadata.get("scores") if isinstance(metadata, dict) else None
    value = scores.get(score) if isinstance(scores, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        known = ", ".join(scores) if isinstance(scores, dict) else "no scores"
        raise ValueError(f"{where} has no number under metadata.scores.{score} (it has: {known}); clean.py writes "
                         f"scores")
    return float(value)


def read_buckets(folder) -> dict | None:
    """What buckets.json says of a folder of score buckets; None where it is none."""
    path = Path(folder) / "buckets.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = [str(part["name"]) for part in index["buckets"]]
        if index["format"] != "nanocpt-buckets" or index["version"] != 1 or not names:
            raise KeyError(index["format"], index["version"])
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another version: {error}") from None
    for name in names:
        if name in ("", "..") or Path(name).name != name:
            raise ValueError(f"{path} points outside its folder: {name!r}")
    return index


def packed_folders(folder) -> list[Path]:
    """The folder itself or, where it holds score buckets, theirs in order."""
    index = read_buckets(folder)
    return [Path(folder) / part["name"] for part in index["buckets"]] if index else [Path(folder)]


def open_buckets(sources: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
    """The sources, one that holds score buckets replaced by its buckets as sources NAME/0, NAME/1, ..."""
    found = {}
    for name, source in sources.items():
        index = read_buckets(source.path) if source.path else None
        if index is None:
            found[name] = source
            continue
        for k, folder in enumerate(packed_folders(source.path)):
            tokens = read_manifest(folder)["splits"]["train"]["tokens"]
            K = len(index["buckets"])
            found[f"{name}/{k}"] = Bucket(**{**vars(source), "path": str(folder)}, of=name, low=k / K,
                                          high=(k + 1) / K, tokens=tokens)
    return found


# ---- reading shards

class Shards:
    """The documents of one split of a packed folder, as one virtual array of L tokens. Opens by checking every size."""

    def __init__(self, folder, split: str = "train"):
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder)
        self.records = self.manifest["splits"][split]["shards"]
        self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        opened = [open_shard(self.folder, record, self.dtype) for record in self.records]
        self.token_maps, self.end_maps, self.byte_maps = zip(*opened) if opened else ((), (), ())
        self.first_token = np.cumsum([0] + [len(t) for t in self.token_maps]).tolist()
        self.first_document = np.cumsum([0] + [len(e) for e in self.end_maps]).tolist()

    @property
    def tokens(self) -> int:
        return self.first_token[-1]

    @property
    def documents(self) -> int:
        return self.first_document[-1]

    def read(self, start: int, out: np.ndarray, doc_start: np.ndarray):
        """Fill `out` [n] with the tokens from `start` on (past the end it begins again at 0); mark in `doc_start` [n],
        zero on entry, each position at which a document begins with that position's own index."""
        at, n = 0, len(out)
        while at < n:
            start %= self.tokens
            shard = bisect.bisect_right(self.first_token, start) - 1
            local = start - self.first_token[shard]
            part = self.token_maps[shard][local:local + n - at]
            out[at:at + len(part)] = part
            ends = self.end_maps[shard]
            lo, hi = ends.searchsorted(np.array([local + 1, local + len(part)], np.uint64), "left")
            begins = ends[lo:hi].astype(np.int64) - (local - at)
            doc_start[begins] = begins
            if at and not local:
                doc_start[at] = at
            at, start = at + len(part), start + len(part)

    def document(self, index: int) -> tuple[np.ndarray, int]:
        """(tokens, bytes of text) of one document, its BOS and EOS included."""
        shard = bisect.bisect_right(self.first_document, index) - 1
        local = index - self.first_document[shard]
        ends = self.end_maps[shard]
        begin = int(ends[local - 1]) if local else 0
        return self.token_maps[shard][begin:int(ends[local])], int(self.byte_maps[shard][local])

    def text_document(self, index: int) -> tuple[np.ndarray, int]:
        """(tokens of the text alone, bytes of text) of one document."""
        ids, nbytes = self.document(index)
        return ids[int(self.manifest["bos"]):len(ids) - 1], nbytes


def read_manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != "nanocpt-shards" or manifest["version"] != FORMAT_VERSION:
            raise KeyError(manifest["format"], manifest["version"])
        names = [str(shard["name"]) for split in SPLITS for shard in manifest["splits"][split]["shards"]]
        if manifest["dtype"] not in ("uint16", "uint32") or not isinstance(manifest["tokenizer"], dict):
            raise KeyError(manifest["dtype"], manifest["tokenizer"])
    except FileNotFoundError:
        if (folder / "buckets.json").is_file():
            raise ValueError(f"{folder} holds score buckets; name one of them, such as {folder}/bucket_00") from None
        raise ValueError(f"{folder} holds no manifest.json: it is no packed source, or packing did not finish; "
                         f"make it with data.py pack") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/manifest.json is damaged or of another version: {error}") from None
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{folder}/manifest.json points outside its folder: {name!r}")
    return manifest


def open_shard(folder: Path, record: dict, dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Memory maps of (tokens, document ends, document bytes), after sizes and header are found to fit the manifest."""
    arrays = []
    for suffix, kind, count, skip in (("bin", dtype, record["tokens"], HEADER_BYTES),
                                      ("idx", "<u8", record["documents"], 0), ("bytes", "<u4", record["documents"], 0)):
        path = folder / f"{record['name']}.{suffix}"
        wanted = skip + count * np.dtype(kind).itemsize
        if not path.exists():
            raise ValueError(f"shard file {path} is missing; pack {folder} again")
        if path.stat().st_size != wanted:
            raise ValueError(f"shard file {path} has {path.stat().st_size} bytes instead of {wanted}: it was cut short "
                             f"or changed; pack {folder} again")
        arrays.append(np.asarray(np.memmap(path, dtype=kind, mode="r", offset=skip, shape=(count,))))
    header = np.fromfile(folder / f"{record['name']}.bin", "<i4", 256)
    wanted = (*MAGIC[dtype.itemsize], record["tokens"], OUR_MAGIC, FORMAT_VERSION, dtype.itemsize)
    if tuple(header[:6].tolist()) != wanted or header[24:32].tobytes().hex() != record["sha256"]:
        raise ValueError(f"shard file {folder}/{record['name']}.bin has a header that does not fit the manifest; "
                         f"pack {folder} again")
    return tuple(arrays)


def verify(folder, budget_bytes: float = float("inf"), seed: int = 0) -> int:
    """Hash a folder's shards against its manifest (a random choice of them within a budget); returns bytes read."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    records = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
    read = 0
    for position in np.random.default_rng(seed).permutation(len(records)):
        record = records[position]
        if read and read + record["tokens"] * dtype.itemsize > budget_bytes:
            continue
        tokens, ends, nbytes = open_shard(folder, record, dtype)
        header = shard_header(record, manifest["tokenizer"], dtype.itemsize)
        if np.fromfile(folder / f"{record['name']}.bin", "<i4", 256).tolist() != header.tolist():
            raise ValueError(f"shard file {folder}/{record['name']}.bin has a header that does not fit the manifest; "
                             f"pack {folder} again")
        for suffix, array, wanted in (("bin", tokens, record["sha256"]), ("idx", ends, record["idx_sha256"]),
                                      ("bytes", nbytes, record["bytes_sha256"])):
            if hashlib.sha256(np.ascontiguousarray(array)).hexdigest() != wanted:
                raise ValueError(f"shard file {folder}/{record['name']}.{suffix} does not have the content it was "
                                 f"written with (its hash differs); pack {folder} again")
            read += array.nbytes
        if len(ends) and (int(ends[-1]) != len(tokens) or (np.diff(ends.astype(np.int64)) <= 0).any()):
            raise ValueError(f"shard {folder}/{record['name']} has document ends that do not rise to its length")
    return read


def check_tokenizer(name: str, shards: Shards, tokenizer, vocab_size: int):
    """Refuse shards that the model cannot read: another tokenizer's, or with ids past its vocabulary."""
    theirs = shards.manifest["tokenizer"]
    largest = max(shard["max_id"] for split in SPLITS for shard in shards.manifest["splits"][split]["shards"])
    if largest >= vocab_size:
        raise ValueError(f"source {name} ({shards.folder}) holds token id {largest}, but the model's vocabulary has "
                         f"{vocab_size} entries; pack it with the model's tokenizer or resize the model")
    if tokenizer is not None and theirs["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(f"source {name} ({shards.folder}) was packed with another tokenizer ({theirs['library']}, "
                         f"{theirs['vocab_size']} entries) than the model's ({tokenizer.library}, "
                         f"{tokenizer.vocab_size} entries); pack it again with the model's")


# ---- order: counter-based random numbers and permutations (numpy, unsigned 64-bit, the same on every platform)

def fmix64(x: np.ndarray) -> np.ndarray:
    """MurmurHash3's finaliser: every input bit changes each output bit with probability one half."""
    x = np.atleast_1d(np.asarray(x, np.uint64))        # scalars would warn of the overflow that is meant
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def mix_keys(*parts) -> np.ndarray:
    """One 64-bit key from integers or arrays of them; strings count by their hash."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
        part = np.asarray(part, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        key = fmix64(key * np.uint64(5) + fmix64(part))
    return key


def permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """index [k] -> its image under the keyed permutation of 0..n-1, without storing it.

    Four Feistel rounds with a full-avalanche round function on an even number of bits; values that fall outside n walk
    on along their cycle until they are inside.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    value = np.array(index, np.uint64)
    key = np.broadcast_to(key, value.shape)
    outside = np.ones(value.shape, bool)
    while outside.any():
        left, right, k = value[outside] >> half, value[outside] & mask, key[outside]
        for turn in range(4):
            left, right = right, left ^ (fmix64(right ^ fmix64(k + np.uint64(turn))) & mask)
        value[outside] = (left << half) | right
        outside = value >= n
    return value.astype(np.int64)


class RowRandom:
    """Random numbers of a batch's rows: a function of (seed, step, row of the step, stream, position) and no state."""

    def __init__(self, keys: np.ndarray):
        self.keys = keys                                     # uint64 [B]

    def uniform(self, stream: int, n: int) -> torch.Tensor:
        """float32 [B, n] in [0, 1)."""
        key = fmix64(self.keys + np.uint64(stream * 0x9E3779B97F4A7C15 % 2**64))[:, None]
        bits = fmix64(key + np.arange(n, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)) >> np.uint64(40)
        return torch.from_numpy(bits.astype(np.float32) / np.float32(2**24))


# ---- loader

@dataclass
class Batch:
    """Rows of T + 1 tokens: the inputs are the first T, and the objective shifts once to find the targets."""

    tokens: torch.Tensor            # int32 [B, T + 1]
    labels: torch.Tensor            # int32 [B, T + 1], the tokens, -100 in padding
    position_ids: torch.Tensor      # int32 [B, T + 1]
    doc_start: torch.Tensor         # int32 [B, T + 1], where in the row each position's document begins
    source: np.ndarray              # int64 [B], which source a row is from
    rng: RowRandom

    def to(self, device) -> "Batch":
        move = {name: getattr(self, name).to(device, non_blocking=True)
                for name in ("tokens", "labels", "position_ids", "doc_start")}
        return Batch(**move, source=self.source, rng=self.rng)


class Loader:
    """rows(step, lo, hi): rows lo to hi of the step's global batch of B rows, a pure function of its arguments.

    A source is a circle of L tokens, re-cut at another offset every epoch into ceil(L / T) windows of T + 1 tokens at
    a stride of T: each token is a target exactly once an epoch, and only the last window is short (padded, its labels
    -100; with drop_last left out). Windows come in a keyed permutation, sources as `counts` says.
    """

    def __init__(self, sources: dict[str, Shards], counts: np.ndarray, context: int, seed: int,
                 drop_last: bool = False, reset_positions: bool = True):
        self.names, self.shards = list(sources), list(sources.values())
        self.counts, self.context, self.seed, self.reset_positions = counts, context, seed, reset_positions
        self.batch_size = int(counts[1].sum()) if len(counts) > 1 else 0
        self.windows = []
        for name, shards in sources.items():
            if not shards.tokens:
                raise ValueError(f"source {name} ({shards.folder}) has no tokens in its {shards.split} split")
            whole = shards.tokens // context
            self.windows.append(max(1, whole if drop_last else -(-shards.tokens // context)))

    def slots(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(source [B], how many rows of that source came before [B]) of each row of a step."""
        before = self.counts[step]
        taken = self.counts[step + 1] - before
        source = np.repeat(np.arange(len(taken)), taken)
        ordinal = np.arange(len(source)) - np.repeat(np.cumsum(taken) - taken, taken) + before[source]
        order = permute(np.arange(len(source)), len(source), mix_keys(self.seed, "slots", step))
        return source[order], ordinal[order]

    def rows(self, step: int, lo: int = 0, hi: int | None = None) -> Batch:
        T = self.context
        source, ordinal = (a[lo:hi] for a in self.slots(step))
        B = len(source)
        tokens, doc_start = np.zeros((B, T + 1), np.int32), np.zeros((B, T + 1), np.int32)
        valid = np.full(B, T + 1)
        for i in np.unique(source):
            shards, n, mine = self.shards[i], self.windows[i], np.flatnonzero(source == i)
            epoch, position = np.divmod(ordinal[mine], n)
            window = permute(position, n, mix_keys(self.seed, self.names[i], "window", epoch))
            offset = mix_keys(self.seed, self.names[i], "offset", epoch) % np.uint64(shards.tokens)
            for row, w, shift in zip(mine.tolist(), window.tolist(), offset.tolist()):
                length = min(T, shards.tokens - w * T) + 1
                valid[row] = length
                shards.read(shift + w * T, tokens[row, :length], doc_start[row, :length])
        labels = tokens
        if (valid <= T).any():
            padding = np.arange(T + 1) >= valid[:, None]
            labels = np.where(padding, np.int32(IGNORE), tokens)
            short = np.flatnonzero(valid <= T)
            doc_start[short, valid[short]] = valid[short]          # padding is a document of its own
        np.maximum.accumulate(doc_start, axis=1, out=doc_start)
        position = np.arange(T + 1, dtype=np.int32)
        positions = position - doc_start if self.reset_positions else np.broadcast_to(position, tokens.shape).copy()
        keys = mix_keys(self.seed, "rows", step, np.arange(lo, lo + B))
        return Batch(*(torch.from_numpy(a) for a in (tokens, labels, positions, doc_start)), source, RowRandom(keys))

    def epochs(self, step: int) -> dict[str, float]:
        """How often each source has been read before `step`."""
        return {name: float(self.counts[step][i] / self.windows[i]) for i, name in enumerate(self.names)}


# ---- mixed text for other tools

def mix_files(domain, general, out, *, ratio: float = 0.7, total: int | None = None, seed: int = 0,
              max_epochs: float = SourceConfig.max_epochs) -> dict:
    """Write `total` records to the JSONL file `out`, the share `ratio` of them from `domain`, in an order of `seed`.

    domain, general: iterators over records (dict). A side's records come in a new order every epoch, none twice within
    one; each gets "source_type", the name of its side. total None: every domain record once. Returns what was done.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"--domain-ratio is {ratio}, but must be between 0 and 1")
    if total is None and not ratio:
        raise ValueError("without --total-samples the domain file gives the length, but --domain-ratio is 0")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.partial")
    try:
        with tempfile.TemporaryFile(dir=out.parent) as spool:
            places = {"domain": _spool(domain, "domain", spool), "general": _spool(general, "general", spool)}
            total = round(len(places["domain"]) / ratio) if total is None else total
            if total < 1:
                raise ValueError(f"{total} samples were asked for, or the domain files hold no records; there must be "
                                 f"at least 1")
            wanted = {"domain": round(total * ratio)}
            wanted["general"] = total - wanted["domain"]
            for side, n in wanted.items():
                if n and not len(places[side]):
                    raise ValueError(f"the {side} files hold no records, but {n} are wanted of them")
            epochs = {side: n / max(1, len(places[side])) for side, n in wanted.items()}
            sides = {side: SourceConfig(role=side, max_epochs=max_epochs) for side in wanted}
            warnings = mixture.check_epochs(epochs, sides, "--max-epochs {1}")
            lines = np.concatenate([_draw(side, n, places[side], seed) for side, n in wanted.items()])
            with open(temporary, "wb") as file:
                for line in permute(np.arange(total), total, mix_keys(seed, "mix")).tolist():
                    spool.seek(int(lines[line]))
                    file.write(spool.readline())
                _sync_and_close(file)
        os.replace(temporary, out)
    except OSError as error:
        raise ValueError(f"{out} could not be written: {error.strerror or error}; nothing is left of it") from None
    finally:
        temporary.unlink(missing_ok=True)
    return {"total": total, "seed": seed, "warnings": warnings,
            **{side: {"records": len(places[side]), "written": n, "epochs": epochs[side]}
               for side, n in wanted.items()}}


def _spool(records, side, spool) -> np.ndarray:
    """Where each record stands in the file it was written to."""
    places = [spool.tell()]
    for record in records:
        line = json.dumps({**record, "source_type": side}, ensure_ascii=False, default=str)
        spool.write(utf8(line) + b"\n")
        places.append(spool.tell())
    return np.array(places[:-1], np.int64)


def _draw(side, n, places, seed) -> np.ndarray:
    epoch, position = np.divmod(np.arange(n), max(1, len(places)))
    order = permute(position, len(places), mix_keys(seed, side, "mix", epoch)) if n else position
    return places[order]


# ---- command line

def cli_pack(args):
    import tokenizer as tokenizers

    if (args.buckets is None) != (args.score is None) or (args.first and not args.score):
        raise ValueError("--buckets K and --score NAME go together, and --first with them")
    tokenizer = tokenizers.load(args.tokenizer)
    inputs = [{"name": Path(f).name, "bytes": os.path.getsize(f) if os.path.isfile(f) else None} for f in args.files]
    for path in args.files:                    # all of them, before any work
        next(read_documents(path, args.documents, args.separator, args.column, args.config, args.split), None)
    start, bar = time.perf_counter(), tqdm(unit="B", unit_scale=True, disable=None, desc="pack")

    def records():
        for path in args.files:
            for record in read_records(path, args.documents, args.separator, args.column, args.config, args.split,
                                       only=[args.column] if not args.score else None):
                bar.update(len(record[1][args.column]))
                yield record

    options = {"heldout": args.heldout, "bos": args.bos, "shard_tokens": args.shard_tokens, "workers": args.workers,
               "inputs": inputs, "overwrite": args.overwrite}
    if args.buckets:
        first = args.first or ("high" if "quality" in args.score else "low")
        pack_buckets(records, tokenizer, args.out, args.buckets, args.score, first=first, column=args.column, **options)
    else:
        pack((record[args.column] for _, record in records()), tokenizer, args.out, **options)
    bar.close()
    seconds = time.perf_counter() - start
    manifests = [read_manifest(folder) for folder in packed_folders(args.out)]
    total = sum(s["tokens"] for manifest in manifests for s in manifest["splits"].values())
    print(f"packed {total:,} tokens in {seconds:.1f} s ({total / seconds / 1e6:.2f} M tokens/s) into {args.out}")
    if not any(manifest["splits"]["heldout"]["documents"] for manifest in manifests) and args.heldout:
        print("warning: no document fell into the held-out share, so this source cannot be evaluated; "
              "cut the text into more documents (--documents) or raise --heldout", file=sys.stderr)
    return print_info(args.out, args.json)


def print_info(folder, json_file=None):
    index = read_buckets(folder)
    manifests = [read_manifest(path) for path in packed_folders(folder)]
    for k, manifest in enumerate(manifests):
        if index:
            part = index["buckets"][k]
            print(f"{part['name']}, read {'first' if not k else 'next' if k < len(manifests) - 1 else 'last'}: "
                  f"{index['score']} from {part['low']:g} to {part['high']:g}")
        for split in SPLITS:
            s = manifest["splits"][split]
            ratio = f"{s['tokens'] / s['bytes']:.3f} tokens per byte" if s["bytes"] else ""
            print(f"  {split:8} {s['documents']:>10,} documents {s['tokens']:>14,} tokens {s['bytes']:>14,} bytes  "
                  f"{ratio}".rstrip(" "))
    t = manifest["tokenizer"]
    print(f"  {manifest['dtype']}, {t['library']}, vocabulary {t['vocab_size']:,}, "
          f"{'BOS, ' if manifest['bos'] else ''}EOS; {sum(m['empty_documents_dropped'] for m in manifests)} empty "
          f"documents dropped")
    if json_file:
        write_json(json_file, {**index, "manifests": manifests} if index else manifest)


@dataclass
class MixSettings:
    """What of a recipe decides the mix."""

    data: DataConfig = field(default_factory=DataConfig)
    train: LengthConfig = field(default_factory=LengthConfig)


def cli_preview(args, words):
    recipe, known = read_toml(args.recipe), {f.name for f in dataclasses.fields(LengthConfig)}
    length = {key: value for key, value in recipe.get("train", {}).items() if key in known}
    settings = merge(MixSettings(), {"data": recipe.get("data", {}), "train": length})
    with tempfile.TemporaryDirectory() as folder:              # of the recipe only what MixSettings knows
        file = Path(folder) / "mix.toml"
        file.write_text(to_toml(settings), encoding="utf-8")
        settings = parse(MixSettings, [str(file), *words])
    if not settings.data.sources:
        raise ValueError(f"{args.recipe} names no source; add one, e.g. --data.sources.domain.path shards/legal")
    packed = {name: Path(source.path).is_dir() for name, source in settings.data.sources.items() if source.path}
    if not all(packed.get(name) for name in settings.data.sources) and not (settings.train.steps
                                                                           or settings.train.tokens):
        missing = next(name for name in settings.data.sources if not packed.get(name))
        raise ValueError(f"data.sources.{missing}.path is no folder, so an epoch has no length; make it with data.py "
                         f"pack, or give --train.steps")
    sources = open_buckets(settings.data.sources)
    shards = {name: Shards(s.path) for name, s in sources.items() if s.path and Path(s.path).is_dir()}
    counts = mixture.make_plan(settings.data, settings.train, sources, {n: s.tokens for n, s in shards.items()})
    steps, T = len(counts) - 1, settings.data.context
    drawn = dict(zip(sources, counts[-1].tolist()))
    epochs = {name: drawn[name] / Loader({name: s}, counts[:1], T, 0, settings.data.drop_last).windows[0]
              for name, s in shards.items()}
    rows, out = mixture.realised(settings.data, sources, counts, 10), Path(args.out or "out/mix.png")
    title = f"{settings.data.schedule}, {steps:,} steps of {settings.train.batch_size} sequences"
    print(f"{title} of {T} tokens\n\n{'steps':>17} {'wanted':>8} {'domain':>8}   "
          + " ".join(f"{name[-12:]:>12}" for name in sources))
    for row in rows:
        print(f"{row['first_step']:>8}-{row['last_step']:<8} {row['wanted']:>8.3f} {row['domain']:>8.3f}   "
              + " ".join(f"{share:>12.3f}" for share in row["sources"].values()))
    print()
    for name, source in sources.items():
        read = f", read {epochs[name]:.2f} times" if name in epochs else ""
        print(f"{name} ({source.role}{', ' + source.stratum if source.stratum else ''}): {drawn[name]:,} sequences, "
              f"{drawn[name] * T:,} tokens{read}")
    shares, empty = mixture.replay_strata(sources, settings.data.strata)
    notes = mixture.notes(settings.data, sources)
    try:
        notes += mixture.check_epochs(epochs, sources)
    except ValueError as error:
        notes.append(f"warning: train.py refuses this plan: {error}")
    print("".join(line + "\n" for line in notes), end="")
    out.parent.mkdir(parents=True, exist_ok=True)
    mixture.draw(out, title, sources, mixture.realised(settings.data, sources, counts, 200))
    print(f"picture: {out}")
    if args.json:
        write_json(args.json, {"steps": steps, "batch_size": settings.train.batch_size, "context": T, "rows": rows,
                               "schedule": settings.data.schedule, "sequences": drawn, "epochs": epochs,
                               "strata": shares, "empty_strata": empty, "notes": notes, "picture": str(out)})


def cli_mix(args):
    def records(files):
        for path in files:
            for _, record in read_records(path, args.documents, args.separator, args.column, args.config, args.split):
                yield record

    done = mix_files(records(args.domain), records(args.general), args.out, ratio=args.domain_ratio,
                     total=args.total_samples, seed=args.seed, max_epochs=args.max_epochs)
    for side in ("domain", "general"):
        print(f"{side}: {done[side]['written']:,} of {done['total']:,} samples from {done[side]['records']:,} records, "
              f"read {done[side]['epochs']:.2f} times")
    for warning in done["warnings"]:
        print(warning, file=sys.stderr)
    print(f"mixed into {args.out}, seed {args.seed}")
    if args.json:
        write_json(args.json, done)


def _reader_options(p):
    p.add_argument("--documents", choices=("line", "blank", "file"), default="blank",
                   help="a document of a text file is a line, a block between blank lines (default), or the file")
    p.add_argument("--separator", help="documents of a text file stand between this string")
    p.add_argument("--column", default="text", help="where a record keeps its text (default: text)")
    p.add_argument("--config", help="configuration of a Hub dataset")
    p.add_argument("--split", default="train", help="split of a Hub dataset (default: train)")


def main():
    words = sys.argv[1:]
    settings = next((i for i, w in enumerate(words) if w.startswith(("--data.", "--train."))), len(words))
    parser = ArgumentParser(prog="data.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=ArgumentParser)
    p = commands.add_parser("pack", help="tokenise files into shards", description="Tokenise files into shards.")
    p.add_argument("files", nargs="+", metavar="FILE", help=".txt, .jsonl[.gz|.zst], .parquet, or hf://org/dataset")
    p.add_argument("--tokenizer", required=True, help="a model folder or a tokenizer file")
    p.add_argument("--out", required=True, help="folder to make")
    _reader_options(p)
    p.add_argument("--heldout", type=float, default=0.02, help="share of documents kept for evaluation (default: 0.02)")
    p.add_argument("--bos", action="store_true", default=None, help="BOS before each document, whatever the tokenizer")
    p.add_argument("--no-bos", action="store_false", dest="bos", help="no BOS before documents")
    p.add_argument("--shard-tokens", type=int, default=10**8, help="tokens a shard (default: 1e8)")
    p.add_argument("--workers", type=int, default=2, help="batches tokenised at a time (default: 2)")
    p.add_argument("--buckets", type=int, metavar="K", help="split the documents into K folders by --score; a source "
                                                            "of such buckets can be read in their order")
    p.add_argument("--score", metavar="NAME", help="number under metadata.scores of each record to split by")
    p.add_argument("--first", choices=("low", "high"), help="end of the score that is read first "
                                                            "(default: high for quality, low for any other)")
    p.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    p.add_argument("--json", metavar="FILE", help="write the manifest there too")
    p = commands.add_parser("verify", help="hash every shard against the manifest")
    p.add_argument("dir")
    p = commands.add_parser("info", help="what a packed folder holds")
    p.add_argument("dir")
    p.add_argument("--json", metavar="FILE", help="write the manifest there too")
    p = commands.add_parser("mix", help="show a recipe's mix, or write a mixed JSONL", description=MIX_HELP)
    p.add_argument("recipe", nargs="?", metavar="RECIPE", help="a recipe of train.py")
    p.add_argument("--preview", action="store_true", help="draw what the recipe's schedule draws")
    p.add_argument("--domain", nargs="+", metavar="FILE", help="files of the domain")
    p.add_argument("--general", nargs="+", metavar="FILE", help="files of general text")
    p.add_argument("--out", metavar="FILE", help="the mixed JSONL; of --preview the picture (default: out/mix.png)")
    p.add_argument("--domain-ratio", type=float, default=0.7, help="share of domain records (default: 0.7)")
    p.add_argument("--total-samples", type=int, metavar="N", help="records (default: each of the domain once)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--max-epochs", type=float, default=SourceConfig.max_epochs,
                   help="refuse to repeat a side more often (default: 16)")
    _reader_options(p)
    p.add_argument("--json", metavar="FILE", help="write what is printed there too")
    args = parser.parse_args(words[:settings])
    if settings < len(words) and not (args.command == "mix" and args.preview):
        parser.error(f"unknown argument {words[settings]}")
    if args.command == "pack":
        return cli_pack(args)
    if args.command == "mix":
        if args.preview and args.recipe and not args.domain and not args.general:
            return cli_preview(args, words[settings:])
        if args.recipe or args.preview or not (args.domain and args.general and args.out):
            parser.error("mix wants either RECIPE --preview, or --domain, --general and --out")
        return cli_mix(args)
    if args.command == "verify":
        total = sum(verify(folder) for folder in packed_folders(args.dir))
        print(f"{args.dir}: {total:,} bytes have the hashes they were written with")
        return 0
    return print_info(args.dir, args.json)


if __name__ == "__main__":
    sys.exit(main_guard(main))
