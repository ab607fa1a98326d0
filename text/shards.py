"""Token shards: one source is one folder.

    manifest.json       the commit record, written last: tokenizer, counts, hashes of every file
    train_000000.bin    1024-byte header (llm.c's, our fields in its spare words), then uint16 or uint32 tokens
    train_000000.idx    uint64, where each document ends (datatrove's); documents are never split over shards
    train_000000.bytes  uint32, UTF-8 bytes of each document's text, so that bits per byte are exact; of a conversation
                        those of the answers that are learned
    train_000000.mask   1 bit per token, whether it is learned (np.packbits); of conversations alone (text/chat.py)
    heldout_000000.*    documents whose text hash falls in the held-out share; never trained on

A folder appears whole or not at all. Nothing is mapped for writing, where a full disk would be a signal and no error.
What is opened is checked first: each size and header, and by `verify` each hash. Some sources are several such folders:

    part_0001_of_0008/ ...   packed by as many machines; a manifest beside them joins them into one source
    bucket_00/ ...           equally many documents each, by a score; buckets.json has the order of a curriculum
"""

import bisect
import collections
import hashlib
import math
import re
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.files import FolderKind, find_folder, new_folder
from core.pool import WorkerPool, batches_by_size
from text.corpus import utf8
from text.heldout import is_held_out, normalise
from text.manifest import SPLITS, VERSIONS, check_buckets, check_manifest, list_shards, read_index, write_index

HEADER_BYTES = 1024
# llm.c's magic and version, by bytes per token
MAGIC = {2: (20240520, 1), 4: (20240801, 7)}
# "nCPT" in llm.c's first spare word
OUR_MAGIC, FORMAT_VERSION = 0x5450436E, 1
# The files of a shard: (suffix, bytes before the array, its type or None for the tokens' own, what its length counts in
# the manifest and how many of these share an element, the manifest's key of its hash)
FILES = (("bin", HEADER_BYTES, None, "tokens", 1, "sha256"), ("idx", 0, "<u8", "documents", 1, "idx_sha256"),
         ("bytes", 0, "<u4", "documents", 1, "bytes_sha256"), ("mask", 0, "u1", "tokens", 8, "mask_sha256"))
FOLDER = FolderKind("packed source", tuple(
    inner + name for inner in ("", "part_*_of_*/", "bucket_*/") for name in (
        "manifest.json", "buckets.json", *(f"{split}_*.{suffix}" for split in SPLITS for suffix, *_ in FILES))),
    {"manifest.json": b'"nanocpt-shards"', "buckets.json": b'"nanocpt-buckets"'})
# How the held-out documents were chosen, as the manifest says it.
HELDOUT_RULES = {"normal": "blake2b(normalise(text)) mod 10000 < 10000 * heldout",
                 "exact": "blake2b(text) mod 10000 < 10000 * heldout"}
# Documents of one file that go to the same part.
BLOCK = 1024


# ---- writing

class ShardWriter:
    """Appends documents to shards of about `shard_tokens` tokens."""

    def __init__(self, folder: Path, split: str, tokenizer: dict, itemsize: int, shard_tokens: int):
        self.folder, self.split, self.tokenizer, self.shard_tokens = folder, split, tokenizer, shard_tokens
        self.dtype, self.file = np.dtype(f"<u{itemsize}"), None
        # What the manifest says of each finished shard.
        self.records = []

    def add(self, ids: np.ndarray, lengths: np.ndarray, nbytes: np.ndarray, learned: np.ndarray | None = None):
        """Append documents: their token ids [n] one after the other, tokens [documents] and text bytes [documents], and
        which of the tokens are learned, bool [n], where not all are."""
        while len(lengths):
            if self.file is None:
                name = f"{self.split}_{len(self.records):06d}"
                self.record = {"name": name, "tokens": 0, "documents": 0, "bytes": 0, "max_id": 0}
                self.file = open(self.folder / f"{name}.bin", "wb")     # noqa: SIM115  (stays open until close())
                self.file.write(bytes(HEADER_BYTES))
                self.hash, self.ends, self.nbytes, self.learned = hashlib.sha256(), [], [], []
            shard = self.record
            ends = shard["tokens"] + np.cumsum(lengths)
            # A document larger than a shard is not cut: it gets a shard of its own.
            fits = max(int(np.searchsorted(ends, self.shard_tokens, "right")), not shard["tokens"])
            payload = ids[:lengths[:fits].sum()].astype(self.dtype)
            self.hash.update(payload)
            self.file.write(payload)
            self.ends.append(ends[:fits])
            self.nbytes.append(nbytes[:fits])
            shard["max_id"] = int(payload.max(initial=shard["max_id"]))
            shard["tokens"] += len(payload)
            if learned is not None:
                self.learned.append(learned[:len(payload)])
                learned = learned[len(payload):]
            ids, lengths, nbytes = ids[len(payload):], lengths[fits:], nbytes[fits:]
            if len(lengths):
                self.close()

    def close(self):
        """Finish the shard under way: its header, its other files and its record."""
        if self.file is None:
            return
        ends, nbytes = np.concatenate(self.ends).astype("<u8"), np.concatenate(self.nbytes).astype("<u4")
        self.record |= {"documents": len(ends), "bytes": int(nbytes.sum()), "sha256": self.hash.hexdigest()}
        self.file.seek(0)
        self.file.write(shard_header(self.record, self.tokenizer, self.dtype.itemsize).tobytes())
        self.file.close()
        mask = {"mask": np.packbits(np.concatenate(self.learned))} if self.learned else {}
        for suffix, array in {"idx": ends, "bytes": nbytes, **mask}.items():
            with open(self.folder / f"{self.record['name']}.{suffix}", "wb") as file:
                file.write(array.tobytes())
            self.record[f"{suffix}_sha256"] = hashlib.sha256(array).hexdigest()
        self.records.append(self.record)
        self.file = None


def shard_header(record: dict, tokenizer: dict, itemsize: int) -> np.ndarray:
    """int32 [256]: what stands before a shard's tokens; all of it follows from the manifest."""
    header = np.zeros(256, "<i4")
    header[:6] = *MAGIC[itemsize], record["tokens"], OUR_MAGIC, FORMAT_VERSION, itemsize
    header[6:8] = np.array([record["documents"]], "<u8").view("<i4")
    ids = (tokenizer["vocab_size"], tokenizer["bos_id"], tokenizer["eos_id"], record["max_id"])
    header[8:12] = [-1 if x is None else x for x in ids]
    header[16:32] = np.frombuffer(bytes.fromhex(tokenizer["fingerprint"] + record["sha256"]), "<i4")
    return header


def pack(texts, tokenizer, out, *, overwrite: bool = False, **options) -> dict:
    """Tokenise `texts` into shards at `out`; returns the manifest. `options` are those of `write_folders`."""
    with new_folder(out, overwrite, FOLDER) as partial:
        return write_folders(((0, text) for text in texts), [partial], tokenizer, **options)[0]


def write_folders(documents, folders: list[Path], tokenizer, *, heldout: float = 0.02, bos: bool | None = None,
                  shard_tokens: int = 10**8, workers: int = 2, inputs: list | None = None, batch_bytes: int = 1 << 21,
                  allow_empty: bool = False, heldout_hash: str = "normal",
                  lost_share: float | None = None, records: dict | None = None, encode=None) -> list[dict]:
    """Tokenise documents (k, text) into shards in folders[k], and write and return the manifest of each folder.

    Every document gets an EOS at its end, and a BOS at its start where the tokenizer says that the model was trained so
    (`bos` overrides). `heldout` is the share of documents kept for evaluation, chosen by the hash of their text in its
    normal form (text/heldout.py), or of its bytes where `heldout_hash` is "exact". A text may be given as its ids
    instead (uint32 [n], without BOS and EOS). `inputs` and `lost_share` go into the manifest. No training document is
    an error, unless `allow_empty`: a part of a source may have none.

    records, encode: what the manifest says of conversations, and what encodes them (text/chat.py) in the place of
    `_encode_batch`; they get no BOS and EOS here, and those that `encode` leaves out were too long.

    The result depends neither on `workers` (threads: every tokenizer releases the GIL) nor on `batch_bytes`.
    """
    bos = not records and (tokenizer.add_bos if bos is None else bos)
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer has no EOS token, and every document must end with one; name it as eos_token "
                        "in tokenizer_config.json beside the tokenizer")
    if bos and tokenizer.bos_id is None:
        raise UserError("--bos was asked for, but the tokenizer has no BOS token")
    itemsize, manifests = 2 if tokenizer.vocab_size <= 65536 else 4, []
    empty, too_long = collections.Counter(), collections.Counter()
    described = {key: getattr(tokenizer, key) for key in ("fingerprint", "library", "vocab_size", "bos_id", "eos_id")}
    writers = {(k, split): ShardWriter(folder, split, described, itemsize, shard_tokens)
               for k, folder in enumerate(folders) for split in SPLITS}
    batches = batches_by_size(documents, lambda document: len(document[1]), batch_bytes)
    with WorkerPool(workers, (tokenizer, bos, heldout, heldout_hash), threads=True) as pool:
        for encoded, left_out in pool.map(encode or _encode_batch, batches):
            (too_long if records else empty).update(left_out)
            for place, arrays in encoded.items():
                writers[place].add(*arrays)
    for k, folder in enumerate(folders):
        for split in SPLITS:
            writers[k, split].close()
        splits = {split: describe_split(writers[k, split].records) for split in SPLITS}
        if not splits["train"]["tokens"] and not allow_empty:
            which = f"bucket {k} of {len(folders)}: " if len(folders) > 1 else ""
            longer = f"{too_long[k]} longer than --max-tokens, " if records else ""
            raise UserError(f"{which}nothing to train on: {empty[k]} empty documents, {longer}"
                            f"{splits['heldout']['documents']} held out")
        manifests.append({"format": "nanocpt-shards", "version": VERSIONS[-1], "dtype": f"uint{8 * itemsize}",
                          "tokenizer": described, "bos": bos, "eos": not records, "heldout": heldout,
                          "heldout_rule": HELDOUT_RULES[heldout_hash], "inputs": inputs or [],
                          "lost_share": lost_share, "records": records and {**records, "too_long": too_long[k]},
                          "empty_documents_dropped": empty[k], "splits": splits})
        write_index(folder / "manifest.json", manifests[k])
    return manifests


def describe_split(records: list[dict]) -> dict:
    """A split as it stands in the manifest: its totals and its shards."""
    return {**{key: sum(r[key] for r in records) for key in ("tokens", "documents", "bytes")}, "shards": records}


def _encode_batch(shared, batch: list):
    """In a worker thread, documents (k, text) -> ({(k, split): (ids [n], tokens of each document, text bytes of each)},
    the k of each empty document)."""
    tokenizer, bos, heldout, heldout_hash = shared
    start, end = np.array([tokenizer.bos_id] * bos, np.uint32), np.array([tokenizer.eos_id], np.uint32)
    encoded = iter(tokenizer.encode_batch([text for _, text in batch if isinstance(text, str)]))
    documents, empty = collections.defaultdict(lambda: ([], [], [])), []
    for k, text in batch:
        # A document that is given as ids is decoded only for its hash and its bytes.
        text, ids = (text, next(encoded)) if isinstance(text, str) else (tokenizer.decode(text), text)
        raw = utf8(text)
        if not raw or not len(ids):
            empty.append(k)
            continue
        hashed = utf8(normalise(text)) if heldout_hash == "normal" else raw
        pieces, lengths, nbytes = documents[k, "heldout" if is_held_out(hashed, heldout) else "train"]
        pieces += [start, ids, end]
        lengths.append(len(ids) + len(start) + 1)
        nbytes.append(len(raw))
    return {place: (np.concatenate(pieces), np.array(lengths), np.array(nbytes))
            for place, (pieces, lengths, nbytes) in documents.items()}, empty


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


def deal_files(files: list, k: int, n: int) -> list:
    """The files that part k of n (from 1) reads; all, where there are fewer files than parts."""
    return files[k - 1::n] if len(files) >= n else files


def deal_documents(files: list, documents, k: int, n: int):
    """The documents of part k of n (from 1); documents(files) yields those of some files.

    Every n-th file goes to the same part. Where there are fewer files than parts, blocks of 1,024 documents take turns:
    of 2 parts, part 1 gets the documents 0 to 1023 and 2048 to 3071.
    """
    if len(files) >= n:
        return documents(deal_files(files, k, n))
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
        for key in ("tokenizer", "bos", "heldout", "heldout_rule", "dtype", "inputs", "records"):
            if _without_counts(manifest.get(key)) != _without_counts(first.get(key)):
                raise UserError(f"{out}/{name} has another {key} than {wanted[0]}: {manifest[key]} and {first[key]}; "
                                f"pack it again like the others")
    splits = {split: describe_split([{**shard, "name": f"{name}/{shard['name']}"} for name, manifest in parts.items()
                                     for shard in manifest["splits"][split]["shards"]]) for split in SPLITS}
    if not splits["train"]["tokens"]:
        raise UserError(f"nothing to train on: the parts of {out} hold no training documents")
    empty = sum(manifest["empty_documents_dropped"] for manifest in parts.values())
    # What is in no token, each part has measured on files of its own; it counts by its bytes.
    measured = [(manifest["lost_share"], sum(manifest["splits"][split]["bytes"] for split in SPLITS))
                for manifest in parts.values() if manifest.get("lost_share") is not None]
    weight = sum(nbytes for _, nbytes in measured)
    lost = sum(share * nbytes for share, nbytes in measured) / weight if weight else None
    records = first.get("records")
    if records:
        records = {**records, "too_long": sum(manifest["records"]["too_long"] for manifest in parts.values())}
    write_index(out / "manifest.json", {**first, "version": VERSIONS[-1], "lost_share": lost, "records": records,
                                        "empty_documents_dropped": empty, "splits": splits})
    return out


def _without_counts(value):
    return {key: each for key, each in value.items() if key != "too_long"} if isinstance(value, dict) else value


# ---- score buckets

def pack_buckets(records, tokenizer, out, buckets: int, score: str, *, first: str = "low", column: str = "text",
                 overwrite: bool = False, **options) -> dict:
    """Pack the documents into `buckets` folders of equally many documents, by their metadata.scores[score]; returns
    what buckets.json says. A curriculum reads bucket 0 first: that of the `first` ("low" or "high") scores.
    `records()` yields (where, record) and is called twice: for the scores, then for the texts. Equal scores keep the
    order of the input. `options` are those of `write_folders`.
    """
    with new_folder(out, overwrite, FOLDER) as partial:
        scores = np.array([_score_of(record, score, where) for where, record in records()])
        if len(scores) < buckets:
            raise UserError(f"{len(scores)} documents do not fill {buckets} buckets; ask for fewer")
        order = np.argsort(-scores if first == "high" else scores, kind="stable")
        # The bucket of each document, in the order of the input.
        bucket_of = np.empty(len(scores), np.int64)
        bucket_of[order] = np.arange(len(scores)) * buckets // len(scores)
        folders = [partial / f"bucket_{k:02d}" for k in range(buckets)]
        for folder in folders:
            folder.mkdir()
        documents = ((k, record[column]) for k, (_, record) in zip(bucket_of.tolist(), records(), strict=True))
        manifests = write_folders(documents, folders, tokenizer, **options)
        described = [{"name": folder.name, "low": float(scores[bucket_of == k].min()),
                      "high": float(scores[bucket_of == k].max()),
                      **{key: manifests[k]["splits"]["train"][key] for key in ("documents", "tokens")}}
                     for k, folder in enumerate(folders)]
        index = {"format": "nanocpt-buckets", "version": VERSIONS[-1], "score": score, "first": first,
                 "buckets": described}
        write_index(partial / "buckets.json", index)
    return index


def _score_of(record: dict, score: str, where: str) -> float:
    metadata = record.get("metadata")
    scores = metadata.get("scores") if isinstance(metadata, dict) else None
    scores = scores if isinstance(scores, dict) else {}
    value = scores.get(score)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"{where} has no number under metadata.scores.{score} (it has: "
                        f"{', '.join(scores) or 'no scores'}); clean.py writes scores")
    return float(value)


def read_buckets(folder) -> dict | None:
    """What buckets.json says of a folder of score buckets; None for a folder without one."""
    path = find_folder(folder) / "buckets.json"
    return read_index(path, "nanocpt-buckets", check_buckets) if path.is_file() else None


def packed_folders(folder) -> list[Path]:
    """The folder itself or, where it holds score buckets, theirs in order."""
    index = read_buckets(folder)
    folder = find_folder(folder)
    return [folder / bucket["name"] for bucket in index["buckets"]] if index else [folder]


# ---- reading

class Shards:
    """The documents of one split of a packed folder as one virtual array of L tokens; nothing of it is in memory."""

    def __init__(self, folder, split: str = "train"):
        self.folder, self.split = find_folder(folder), split
        self.manifest = read_manifest(self.folder)
        # What stands with the scores of this text, if there is any.
        self.lost = {key: share for key, share in self.manifest.items() if key == "lost_share" and share}
        self.records = self.manifest["splits"][split]["shards"]
        # "text", "chat" or "preference": in the last, documents come in pairs, a chosen one and a rejected one.
        self.format = (self.manifest.get("records") or {"format": "text"})["format"]
        opened = [open_shard(self.folder, self.manifest, record) for record in self.records]
        # The masks are there of conversations alone.
        self.token_maps, self.end_maps, self.byte_maps, *masks = zip(*opened) if opened else ((), (), ())
        self.mask_maps = masks[0] if masks else None
        # Where each shard begins in the virtual array, and the number of its first document; the totals stand last.
        self.first_token = np.cumsum([0] + [len(t) for t in self.token_maps]).tolist()
        self.first_document = np.cumsum([0] + [len(e) for e in self.end_maps]).tolist()
        self.tokens, self.documents = self.first_token[-1], self.first_document[-1]

    def document_ends(self) -> np.ndarray:
        """int64 [documents]: where in the virtual array each document ends."""
        shifted = [ends.astype(np.int64) + first for ends, first in zip(self.end_maps, self.first_token)]
        return np.concatenate([np.zeros(0, np.int64), *shifted])

    def read(self, start: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [n] in the file's dtype, begins int64 [k]): the n tokens from `start` on, and the positions among
        them at which a document begins. The end of the source is followed by its beginning."""
        tokens, begins, at = [], [], 0
        while at < n:
            place = (start + at) % self.tokens
            shard = bisect.bisect_right(self.first_token, place) - 1
            local, ends = place - self.first_token[shard], self.end_maps[shard]
            part = self.token_maps[shard][local:local + n - at]
            tokens.append(part)
            # Within a shard a document begins where the one before it ends; the shard's first one begins at 0.
            low, high = ends.searchsorted(np.array([local, local + len(part)], np.uint64), "left")
            if local == 0:
                begins.append(np.array([at]))
            begins.append(ends[low:high].astype(np.int64) + (at - local))
            at += len(part)
        return (tokens[0], begins[0]) if len(begins) == 1 else (np.concatenate(tokens), np.concatenate(begins))

    def read_mask(self, start: int, n: int) -> np.ndarray | None:
        """bool [n], which of the n tokens from `start` on are learned; None where all are, as in text."""
        if self.mask_maps is None:
            return None
        parts, at = [], 0
        while at < n:
            place = (start + at) % self.tokens
            shard = bisect.bisect_right(self.first_token, place) - 1
            local, length = place - self.first_token[shard], len(self.token_maps[shard])
            end = min(length, local + n - at)
            bits = np.unpackbits(self.mask_maps[shard][local // 8:-(-end // 8)])
            parts.append(bits[local % 8:local % 8 + end - local].astype(bool))
            at += end - local
        return np.concatenate(parts)

    def document_mask(self, index: int) -> np.ndarray:
        """bool [its tokens], which tokens of a conversation are learned."""
        shard = bisect.bisect_right(self.first_document, index) - 1
        local, ends = index - self.first_document[shard], self.end_maps[shard]
        begin = int(ends[local - 1]) if local else 0
        return self.read_mask(self.first_token[shard] + begin, int(ends[local]) - begin)

    def text_document(self, index: int) -> tuple[np.ndarray, int]:
        """(tokens, bytes of text) of one document, without its BOS and EOS; a conversation has none but its own."""
        shard = bisect.bisect_right(self.first_document, index) - 1
        local, ends = index - self.first_document[shard], self.end_maps[shard]
        begin = (int(ends[local - 1]) if local else 0) + self.manifest["bos"]
        end = int(ends[local]) - self.manifest.get("eos", True)
        return self.token_maps[shard][begin:end], int(self.byte_maps[shard][local])


def read_manifest(folder: Path) -> dict:
    """The manifest of a packed folder; UserError where there is none, or where it is not one that this code wrote."""
    path = find_folder(folder) / "manifest.json"
    if not path.is_file():
        if path.with_name("buckets.json").is_file():
            raise UserError(f"{folder} holds score buckets; name one of them, such as {folder}/bucket_00")
        raise UserError(f"{folder} holds no manifest.json: it is no packed source, or packing did not finish; make it "
                        f"with data.py pack")
    return read_index(path, "nanocpt-shards", check_manifest)


def _describe_fault(folder: Path, record: dict, suffix: str, fault: str) -> UserError:
    remedy = f"pack that part again if it is damaged, then data.py manifest --merge {folder}"
    remedy = remedy if "/" in record["name"] else f"pack {folder} again"
    return UserError(f"shard file {folder}/{record['name']}.{suffix} {fault}; {remedy}")


def open_shard(folder: Path, manifest: dict, record: dict) -> tuple[np.ndarray, ...]:
    """Memory maps of (tokens, document ends, document bytes[, mask]), after sizes and header are found to fit the
    manifest."""
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    arrays = []
    for suffix, skip, kind, count, shared, key in FILES:
        if key not in record:
            continue
        path, kind, length = folder / f"{record['name']}.{suffix}", np.dtype(kind or dtype), -(-record[count] // shared)
        wanted = skip + length * kind.itemsize
        size = path.stat().st_size if path.exists() else None
        if size != wanted:
            raise _describe_fault(folder, record, suffix, "is missing" if size is None else
                                  f"has {size} bytes instead of {wanted}: it was cut short or changed")
        arrays.append(np.asarray(np.memmap(path, kind, "r", skip, (length,))))
    header = np.fromfile(folder / f"{record['name']}.bin", "<i4", 256)
    if header.tolist() != shard_header(record, manifest["tokenizer"], dtype.itemsize).tolist():
        raise _describe_fault(folder, record, "bin", "has a header that does not fit the manifest")
    return tuple(arrays)


def verify(folder, budget_bytes: float = float("inf"), seed: int = 0) -> int:
    """Hash a folder's shards against its manifest and return the bytes read; UserError for the first that differs.
    Within a budget it reads a random choice of the shards, at least one."""
    folder, manifest, read = find_folder(folder), read_manifest(folder), 0
    records = list_shards(manifest)
    for position in np.random.default_rng(seed).permutation(len(records)):
        record = records[position]
        if read and read + record["tokens"] * np.dtype(manifest["dtype"]).itemsize > budget_bytes:
            continue
        tokens, ends, *_ = arrays = open_shard(folder, manifest, record)
        for (suffix, *_, key), array in zip(FILES, arrays):
            if hashlib.sha256(array).hexdigest() != record[key]:
                raise _describe_fault(folder, record, suffix, "has another content than was written (its hash differs)")
            read += array.nbytes
        if len(ends) and (int(ends[-1]) != len(tokens) or (np.diff(ends.astype(np.int64)) <= 0).any()):
            raise UserError(f"shard {folder}/{record['name']} has document ends that do not rise to its length")
    return read


def check_tokenizer(name: str, shards: Shards, tokenizer, vocab_size: int):
    """UserError for shards that the model cannot read: another tokenizer's, or with ids past its vocabulary."""
    theirs = shards.manifest["tokenizer"]
    largest = max(shard["max_id"] for shard in list_shards(shards.manifest))
    if largest >= vocab_size:
        raise UserError(f"source {name} ({shards.folder}) holds token id {largest}, but the model's vocabulary has "
                        f"{vocab_size} entries; pack it with the model's tokenizer or resize the model")
    if tokenizer is not None and not tokenizer.reads(theirs["fingerprint"], theirs["vocab_size"]):
        raise UserError(f"source {name} ({shards.folder}) was packed with another tokenizer ({theirs['library']}, "
                        f"{theirs['vocab_size']} entries) than the model's ({tokenizer.library}, "
                        f"{tokenizer.vocab_size} entries); pack it again with the model's")
