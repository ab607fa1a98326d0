"""What tests of shards and batches are made of: a tokenizer whose ids are bytes, texts, a naive writer."""

import hashlib
import itertools
import json
import random
import struct
import sys
from pathlib import Path

import numpy as np

import data
from text.corpus import utf8
from text.mixture import DataConfig
from text.packing import pack_sources
from text.shards import Shards

WORDS = ["habeas", "corpus", "the", "of", "lien", "é", "tort", "漢字", "x = 1;", "\n", "party", "🙂", ","]


class Bytes:
    """A tokenizer whose ids are bytes."""

    vocab_size, bos_id, eos_id, mask_id, special_ids = 259, 256, 257, 258, [256, 257, 258]
    unk_id = None
    add_bos, library, fingerprint = False, "bytes 1", "0f" * 32

    def __init__(self, **changes):
        self.__dict__.update(changes)

    def encode_batch(self, texts):
        return [np.frombuffer(utf8(text), np.uint8).astype(np.uint32) for text in texts]

    def reads(self, fingerprint, vocab_size):
        return fingerprint == self.fingerprint

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def some_texts(n: int, seed: int = 0, longest: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(1 + int(rng.random() * longest))) for _ in range(n)]


KINDS = {"legal": "court lien tenant statute appeal the of shall notice title any person hereby section under writ",
         "story": "once a little cat was so happy and ran to the big red tree with her friend mom said play"}


def texts(kind: str, n: int = 240) -> list[str]:
    draw, words = random.Random(kind), KINDS[kind].split()
    return [" ".join(draw.choices(words, k=draw.randint(4, 30))) + "." for _ in range(n)]


def naive_write(folder: Path, documents, tokenizer=None, shard_tokens: int = 10**8, split: str = "train") -> dict:
    """The format as its description says it, a document [(ids with specials, text bytes)] at a time."""
    tokenizer = tokenizer or Bytes()
    folder.mkdir(exist_ok=True)
    shards, letter = [[]], "H" if tokenizer.vocab_size <= 65536 else "I"
    for ids, nbytes in documents:
        if shards[-1] and sum(len(i) for i, _ in shards[-1]) + len(ids) > shard_tokens:
            shards.append([])
        shards[-1].append((ids, nbytes))
    records = []
    for number, shard in enumerate(shards if shards[0] else []):
        flat = [i for ids, _ in shard for i in ids]
        payload = struct.pack(f"<{len(flat)}{letter}", *flat)
        idx = struct.pack(f"<{len(shard)}Q", *itertools.accumulate(len(ids) for ids, _ in shard))
        nbytes = struct.pack(f"<{len(shard)}I", *(n for _, n in shard))
        version = (20240520, 1) if letter == "H" else (20240801, 7)
        head = struct.pack("<6iQ4i", *version, len(flat), 0x5450436E, 1, len(payload) // len(flat), len(shard),
                           tokenizer.vocab_size, -1 if tokenizer.bos_id is None else tokenizer.bos_id,
                           tokenizer.eos_id, max(flat))
        digest = hashlib.sha256(payload)
        head = head.ljust(64, b"\0") + bytes.fromhex(tokenizer.fingerprint) + digest.digest()
        name = f"{split}_{number:06d}"
        (folder / f"{name}.bin").write_bytes(head.ljust(1024, b"\0") + payload)
        (folder / f"{name}.idx").write_bytes(idx)
        (folder / f"{name}.bytes").write_bytes(nbytes)
        records.append({"name": name, "tokens": len(flat), "documents": len(shard), "bytes": sum(n for _, n in shard),
                        "max_id": max(flat), "sha256": digest.hexdigest(),
                        "idx_sha256": hashlib.sha256(idx).hexdigest(),
                        "bytes_sha256": hashlib.sha256(nbytes).hexdigest()})
    totals = {key: sum(r[key] for r in records) for key in ("tokens", "documents", "bytes")}
    manifest = {"format": "nanocpt-shards", "version": 1, "dtype": "uint16" if letter == "H" else "uint32",
                "tokenizer": {"fingerprint": tokenizer.fingerprint, "library": tokenizer.library,
                              "vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id,
                              "eos_id": tokenizer.eos_id},
                "bos": False, "splits": {s: {**totals, "shards": records if s == split else []}
                                         for s in ("train", "heldout")}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def source(folder: Path, lengths, shard_tokens: int = 10**8, ids=None) -> Shards:
    """Documents of these lengths in tokens; the ids are 0, 1, 2, ... so that a token tells its place."""
    ids = list(range(sum(lengths))) if ids is None else ids
    ends = list(itertools.accumulate(lengths))
    documents = [(ids[end - n:end], n) for n, end in zip(lengths, ends)]
    naive_write(folder, documents, Bytes(vocab_size=70000), shard_tokens)
    return Shards(folder)


def document(shards: Shards, index: int) -> tuple[np.ndarray, int]:
    """(tokens, bytes of text) of one document, its BOS and EOS included."""
    begin, end = [0, *shards.document_ends()][index:index + 2]
    return shards.read(begin, end - begin)[0], shards.text_document(index)[1]


def counts_of(*per_step) -> np.ndarray:
    return np.concatenate([[np.zeros(len(per_step[0]), np.int64)], np.cumsum(per_step, 0)])


def loader_of(sources: dict, plan: np.ndarray, context: int, seed: int, **options) -> data.Loader:
    config = DataConfig(context=context, **options)
    return data.Loader(pack_sources(sources, config), plan, config, seed=seed)


def scored(n: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [{"text": f"{i} {text}", "id": str(i), "metadata": {"scores": {"quality": rng.randrange(n // 2)}}}
            for i, text in enumerate(some_texts(n, seed))]


def run(monkeypatch, *argv) -> int:
    """Exit status of data.py with these arguments."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, argv)])
    return data.main()


MIXED = "Zażółć gęślą — 中文字、日本語 🙂👩‍💻🇩🇪 e\u0301 ok"


class ByteTokenizer:
    """A tokenizer whose ids are the bytes of UTF-8, with BOS 256 and EOS 257."""

    vocab_size, bos_id, eos_id, add_bos = 258, 256, 257, True

    def missing_ids(self, rows):
        return list(range(258, rows))

    def encode(self, text, bos=False, eos=False):
        return [256] * bos + list(text.encode()) + [257] * eos

    def decode(self, ids):
        return b"".join(bytes([i]) for i in ids if i < 256).decode(errors="replace")


def make_documents(n: int, seed: int = 0) -> list[str]:
    """Notices with a number that is the more common the smaller it is, a reference and a name."""
    draw, names = random.Random(seed), [f"{a} {b}" for a in ("Ada", "Bo", "Cy", "Dee") for b in ("Ash", "Elm", "Oak")]
    return [f"notice {i} says that the fee which is due by then comes to {10 + int(draw.expovariate(0.15)) % 90} euros "
            f"by the rule of § 7-{100 + draw.randrange(60)}, as told by {draw.choice(names)}" for i in range(n)]
