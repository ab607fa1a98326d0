"""Token shards: one source is one folder.

    manifest.json       the commit record, written last: tokenizer, counts, hashes of every file
    train_000000.bin    1024-byte header (llm.c's, our fields in its spare words), then uint16 or uint32 tokens
    train_000000.idx    uint64, where each document ends (datatrove's); documents are never split over shards
    train_000000.bytes  uint32, UTF-8 bytes of each document's text, so that bits per byte are exact
    heldout_000000.*    documents whose text hash falls in the held-out share; never trained on

or, packed by a score, a folder of such folders in the order in which a curriculum reads them, and buckets.json. Nothing
is mapped for writing, a folder appears whole or not at all, and what is opened is checked first. L tokens of a source.
"""

import bisect
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np

from core.pool import WorkerPool, batches_by_size
from text.corpus import utf8
from text.mixture import Bucket, SourceConfig

HEADER_BYTES = 1024
MAGIC = {2: (20240520, 1), 4: (20240801, 7)}       # llm.c's magic and version by token size
OUR_MAGIC, FORMAT_VERSION = 0x5450436E, 1          # "nCPT"
SPLITS = ("train", "heldout")
BLOCK = 1024                                       # documents of one file that go to the same part


# ---- writing

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
        sync_and_close(self.file)
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


def sync_and_close(file):
    file.flush()
    os.fsync(file.fileno())
    file.close()


def pack(texts, tokenizer, out, *, heldout: float = 0.02, bos: bool | None = None, shard_tokens: int = 10**8,
         workers: int = 2, inputs: list | None = None, batch_bytes: int = 1 << 21, overwrite: bool = False,
         part: bool = False) -> dict:
    """Tokenise `texts` into shards at `out`; returns the manifest. The folder appears whole or not at all.

    A text may be given as the ids that it has (uint32 [n], without BOS and EOS) instead.

    Every document gets an EOS at its end, and a BOS at its start where the tokenizer says the model was trained so
    (`bos` overrides). `heldout` is the share of documents kept for evaluation, chosen by the hash of their text.
    The result depends neither on `workers` nor on `batch_bytes`. A `part` of a source may be empty.
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
        with WorkerPool(workers, (tokenizer, bos, heldout), threads=True) as pool:
            for encoded, dropped in pool.map(_encode, batches_by_size(texts, len, batch_bytes)):
                empty += dropped
                for split, documents in encoded.items():
                    writers[split].add(*documents)
        for writer in writers.values():
            writer.close()
        splits = {name: _totals(writer.shards) for name, writer in writers.items()}
        if not splits["train"]["tokens"] and not part:
            raise ValueError(f"nothing to train on: {empty} empty documents, {splits['heldout']['documents']} held out")
        manifest = {
            "format": "nanocpt-shards", "version": FORMAT_VERSION, "dtype": f"uint{8 * itemsize}",
            "tokenizer": describe_tokenizer(tokenizer),
            "bos": bos, "eos": True, "heldout": heldout, "heldout_rule": "blake2b(text) mod 10000 < 10000 * heldout",
            "inputs": inputs or [], "empty_documents_dropped": empty, "splits": splits,
        }
        _write_json(partial / "manifest.json", manifest)
    return manifest


def _totals(shards: list[dict]) -> dict:
    return {**{key: sum(s[key] for s in shards) for key in ("tokens", "documents", "bytes")}, "shards": shards}


def _write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


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


def _encode(shared, texts):
    """One batch in a worker thread: (per split: ids, lengths, bytes), number of empty documents."""
    tokenizer, bos, heldout = shared
    limit = round(10000 * heldout)
    raw = [utf8(text if isinstance(text, str) else tokenizer.decode(text)) for text in texts]
    kept = [i for i, data in enumerate(raw) if data]
    new = iter(tokenizer.encode_batch([texts[i] for i in kept if isinstance(texts[i], str)]))
    encoded = [next(new) if isinstance(texts[i], str) else texts[i] for i in kept]
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


# ---- parts of one source, packed by many machines

def part_folder(out, k: int, n: int) -> Path:
    return Path(out) / f"part_{k:04d}_of_{n:04d}"


def deal(files: list, documents, k: int, n: int):
    """What part k of n (from 1) has of `files`: every n-th of them or, where there are fewer than n, the documents that
    documents(files) yields in blocks of BLOCK dealt in turn."""
    if len(files) >= n:
        return documents(files[k - 1::n])
    return (document for i, document in enumerate(documents(files)) if i // BLOCK % n == k - 1)


def merge_parts(out) -> dict:
    """Write the manifest of a folder whose parts are all packed; returns it. The shards stay where they are."""
    out = Path(out)
    found = sorted(path.name for path in out.glob("part_*") if re.fullmatch(r"part_\d{4}_of_\d{4}", path.name)
                   and (path / "manifest.json").is_file())
    if not found:
        raise ValueError(f"{out} holds no packed parts; make them with data.py pack --part 1/N, 2/N, ...")
    n = int(found[0].rpartition("_")[2])
    wanted = [part_folder(out, k, n).name for k in range(1, n + 1)]
    if found != wanted:
        odd = sorted(set(found) ^ set(wanted))
        what = "is missing; pack it with --part" if odd[0] in wanted else "does not belong there; remove it"
        raise ValueError(f"{out} does not hold the parts 1 to {n} alone: {odd[0]} {what}")
    parts = {name: read_manifest(out / name) for name in wanted}
    first = parts[wanted[0]]
    for name, manifest in parts.items():
        for key in ("tokenizer", "bos", "heldout", "dtype", "inputs"):
            if manifest[key] != first[key]:
                raise ValueError(f"{out}/{name} has another {key} than {wanted[0]}: {manifest[key]} and {first[key]}; "
                                 f"pack it again like the others")
    merged = {**first, "empty_documents_dropped": sum(m["empty_documents_dropped"] for m in parts.values()),
              "splits": {split: _totals([{**s, "name": f"{name}/{s['name']}"} for name, m in parts.items()
                                         for s in m["splits"][split]["shards"]]) for split in SPLITS}}
    if not merged["splits"]["train"]["tokens"]:
        raise ValueError(f"nothing to train on: the parts of {out} hold no training documents")
    _write_json(out / ".manifest.json", merged)
    os.replace(out / ".manifest.json", out / "manifest.json")
    return merged


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
        _write_json(partial / "buckets.json", index)
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


# ---- reading

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

    def document_ends(self) -> np.ndarray:
        """int64 [documents]: where in the virtual array each document ends."""
        return np.concatenate([np.zeros(0, np.int64), *(ends.astype(np.int64) + first for ends, first
                                                        in zip(self.end_maps, self.first_token))])

    def read(self, start: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [n], begins int64 [k]): the n tokens from `start` on, and the positions among them at which a
        document begins. The end of the source is followed by its beginning."""
        tokens, begins, at = np.empty(n, np.int32), [], 0
        while at < n:
            start %= self.tokens
            shard = bisect.bisect_right(self.first_token, start) - 1
            local = start - self.first_token[shard]
            part = self.token_maps[shard][local:local + n - at]
            tokens[at:at + len(part)] = part
            # Within a shard a document begins where the one before it ends; the shard's first one begins at 0.
            ends = self.end_maps[shard]
            low, high = ends.searchsorted(np.array([local, local + len(part)], np.uint64), "left")
            begins += [[at]] if local == 0 else []
            begins.append(ends[low:high].astype(np.int64) - local + at)
            at += len(part)
            start += len(part)
        return tokens, np.concatenate(begins).astype(np.int64)

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
        if any(part in ("", ".", "..") or Path(part).name != part for part in name.split("/")):
            raise ValueError(f"{folder}/manifest.json points outside its folder: {name!r}")
    return manifest


def _repair(folder, record) -> str:
    return f"pack {folder} again" if "/" not in record["name"] else \
        f"pack that part again if it is not whole, then data.py manifest --merge {folder}"


def open_shard(folder: Path, record: dict, dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Memory maps of (tokens, document ends, document bytes), after sizes and header are found to fit the manifest."""
    arrays = []
    for suffix, kind, count, skip in (("bin", dtype, record["tokens"], HEADER_BYTES),
                                      ("idx", "<u8", record["documents"], 0), ("bytes", "<u4", record["documents"], 0)):
        path = folder / f"{record['name']}.{suffix}"
        wanted = skip + count * np.dtype(kind).itemsize
        if not path.exists():
            raise ValueError(f"shard file {path} is missing; {_repair(folder, record)}")
        if path.stat().st_size != wanted:
            raise ValueError(f"shard file {path} has {path.stat().st_size} bytes instead of {wanted}: it was cut short "
                             f"or changed; {_repair(folder, record)}")
        arrays.append(np.asarray(np.memmap(path, dtype=kind, mode="r", offset=skip, shape=(count,))))
    header = np.fromfile(folder / f"{record['name']}.bin", "<i4", 256)
    wanted = (*MAGIC[dtype.itemsize], record["tokens"], OUR_MAGIC, FORMAT_VERSION, dtype.itemsize)
    if tuple(header[:6].tolist()) != wanted or header[24:32].tobytes().hex() != record["sha256"]:
        raise ValueError(f"shard file {folder}/{record['name']}.bin has a header that does not fit the manifest; "
                         f"{_repair(folder, record)}")
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
                             f"{_repair(folder, record)}")
        for suffix, array, wanted in (("bin", tokens, record["sha256"]), ("idx", ends, record["idx_sha256"]),
                                      ("bytes", nbytes, record["bytes_sha256"])):
            if hashlib.sha256(np.ascontiguousarray(array)).hexdigest() != wanted:
                raise ValueError(f"shard file {folder}/{record['name']}.{suffix} does not have the content it was "
                                 f"written with (its hash differs); {_repair(folder, record)}")
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
