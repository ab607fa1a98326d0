"""Truth: a naive writer and plain Python loops in this file, decode(encode(text)) of the tokenizers, struct, hashlib.
Laws: a batch depends on (seed, step) and the manifests alone; every token is a target once an epoch; counts keep within
one sequence of the wanted mix; a permutation is one; a folder appears whole or not at all. One golden hash pins the
order against a change that every law would allow.
"""

import gzip
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import tokenizer as tokenizers
from config import main_guard
from data import Loader, Shards, pack, permute, read_documents
from mixture import SourceConfig, domain_share, plan_counts, source_weights

ROOT = Path(__file__).parent.parent
FIELDS = ("tokens", "labels", "position_ids", "doc_start")
WORDS = ["habeas", "corpus", "the", "of", "lien", "é", "tort", "漢字", "x = 1;", "\n", "party", "🙂", ","]


class Bytes:
    """A tokenizer whose ids are bytes."""

    vocab_size, bos_id, eos_id, mask_id, special_ids = 259, 256, 257, 258, [256, 257, 258]
    add_bos, library, fingerprint = False, "bytes 1", "0f" * 32

    def __init__(self, **changes):
        self.__dict__.update(changes)

    def encode_batch(self, texts):
        return [np.frombuffer(data.utf8(text), np.uint8).astype(np.uint32) for text in texts]


def some_texts(n: int, seed: int = 0, longest: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(1 + int(rng.random() * longest))) for _ in range(n)]


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


def counts_of(*per_step) -> np.ndarray:
    return np.concatenate([[np.zeros(len(per_step[0]), np.int64)], np.cumsum(per_step, 0)])


def three_sources(tmp_path) -> tuple[dict, np.ndarray]:
    sources = {}
    for number, (name, n, shard_tokens) in enumerate((("legal", 60, 700), ("wiki", 90, 10**8), ("code", 3, 50))):
        pack(some_texts(n, number), Bytes(), tmp_path / name, heldout=0.0, shard_tokens=shard_tokens)
        sources[name] = Shards(tmp_path / name)
    configs = {"legal": SourceConfig(), "wiki": SourceConfig(role="general", weight=2.0),
               "code": SourceConfig(role="general", weight=1.0)}
    return sources, plan_counts(
        lambda p: source_weights(configs, domain_share("warmup_cooldown", 0.7, p)), 200, 12)


def arrays(batch) -> list[np.ndarray]:
    return [getattr(batch, f).numpy() for f in FIELDS] + [batch.source, batch.rng.uniform(3, 9).numpy()]


def run(monkeypatch, *argv) -> int:
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, argv)])
    return main_guard(data.main)


@pytest.fixture(scope="session")
def tiny_bpe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    tokenizers.train(some_texts(200), "bpe", 300, folder)
    return folder


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """Waiting for the disk proves nothing here; test_kill_at_any_moment counts the calls."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


# ---- 1 to 3: the order is a function

GOLDEN = "08d0749f1e3beffee850a6e1d966e46ccc4d634f4db1e791802743e5be2e8a6b"      # of ORDER_VERSION 1


def test_golden_order(tmp_path):
    sources, counts = three_sources(tmp_path)
    loader, digest = Loader(sources, counts, 32, seed=7), hashlib.sha256()
    for step in range(200):
        for array in arrays(loader.rows(step)):
            digest.update(np.ascontiguousarray(array).astype("<f4" if array.dtype.kind == "f" else "<i8"))
    assert digest.hexdigest() == GOLDEN, (
        f"the same seed gives another order than ORDER_VERSION {data.ORDER_VERSION} stands for: "
        f"raise data.ORDER_VERSION and pin the new hash, or undo the change")


GOLDEN_1000 = "9a130e808ce440f0acb7cdb549269de2716731874020b33df512b5ec7363e775"      # the plan too


def test_golden_order_of_the_first_1000_batches_of_five_sources(tmp_path):
    """Sources of one window, of many epochs, of several shards, and one that is never drawn."""
    sources, configs = {}, {}
    for number, (tokens, weight, shard_tokens) in enumerate(((5000, 2.0, 999), (7, 0.1, 10**8), (640, 1.0, 100),
                                                             (20000, 1.0, 10**8), (300, 0.0, 10**8))):
        lengths = [1 + (17 * i + number) % 41 for i in range(tokens // 20)] or [tokens]
        name = f"source{number}"
        sources[name] = source(tmp_path / name, lengths, shard_tokens)
        configs[name] = SourceConfig(role="general" if number in (1, 3) else "domain", weight=weight)
    counts = plan_counts(lambda p: source_weights(configs, domain_share("warmup_cooldown", 0.7, p)), 1000, 8)
    loader, digest = Loader(sources, counts, 16, seed=11), hashlib.sha256(counts.astype("<i8"))
    for step in range(1000):
        for array in arrays(loader.rows(step)):
            digest.update(np.ascontiguousarray(array).astype("<f4" if array.dtype.kind == "f" else "<i8"))
    assert digest.hexdigest() == GOLDEN_1000, f"this is not the order of ORDER_VERSION {data.ORDER_VERSION}"


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_any_world_size_sees_the_same_batch(tmp_path, world):
    sources, counts = three_sources(tmp_path)
    loader, share = Loader(sources, counts, 32, seed=1), 12 // world
    for step in (0, 1, 57, 199):
        slices = [arrays(loader.rows(step, r * share, (r + 1) * share)) for r in range(world)]
        for whole, *parts in zip(arrays(loader.rows(step)), *slices):
            np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_a_batch_does_not_depend_on_what_was_read_before(tmp_path):
    sources, counts = three_sources(tmp_path)
    loader = Loader(sources, counts, 16, seed=2)
    forward = [arrays(loader.rows(step)) for step in range(60)]
    fresh = Loader({name: Shards(s.folder) for name, s in sources.items()}, counts.copy(), 16, seed=2)
    for step in random.Random(0).sample(range(60), 60):
        for a, b in zip(forward[step], arrays(fresh.rows(step)), strict=True):
            np.testing.assert_array_equal(a, b)
    other = arrays(Loader(sources, counts, 16, seed=3).rows(0))
    assert not np.array_equal(forward[0][0], other[0])
    assert not np.array_equal(forward[0][0], forward[1][0])
    assert not np.array_equal(forward[0][5], forward[1][5])
    assert not np.array_equal(forward[0][5], other[5])


def test_a_batch_far_along_the_plan(tmp_path):
    shards = source(tmp_path / "s", [50, 30])
    counts = np.array([[10**12], [10**12 + 8]])
    batch = Loader({"s": shards}, counts, 16, seed=0).rows(0)
    assert sorted(batch.labels[:, 1:].flatten().tolist())[-1] < 80
    assert batch.tokens.shape == (8, 17)


def test_random_numbers_are_uniform_and_streams_differ():
    rng = data.RowRandom(data.mix_keys(0, "rows", 5, np.arange(100)))
    x, y = rng.uniform(0, 2000).numpy(), rng.uniform(1, 2000).numpy()
    assert x.min() >= 0
    assert x.max() < 1
    assert x.dtype == np.float32
    tenths = np.histogram(x, 10, (0, 1))[0]                          # 200,000 draws: 5 sigma of 20,000 is 671
    assert abs(tenths - 20000).max() < 700
    assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 0.012      # 5 sigma
    assert abs(np.corrcoef(x[:, :-1].ravel(), x[:, 1:].ravel())[0, 1]) < 0.012
    assert abs(np.corrcoef(x[:-1].ravel(), x[1:].ravel())[0, 1]) < 0.012
    np.testing.assert_array_equal(rng.uniform(0, 7).numpy(), x[:, :7])


# ---- 4: coverage

@pytest.mark.parametrize(("context", "total"), [(8, 100), (8, 96), (16, 100), (100, 100), (99, 100), (101, 100),
                                                (300, 100), (1, 100), (7, 1)])
@pytest.mark.parametrize("shard_tokens", [10**8, 30])
def test_each_epoch_has_every_token_as_a_target_once(tmp_path, context, total, shard_tokens):
    lengths = [13, 1, 40, 1, 1, 25, 19] if total == 100 else [40, 56] if total == 96 else [1]
    shards = source(tmp_path / "s", lengths, shard_tokens)
    assert shards.tokens == total
    windows = -(-total // context)
    loader = Loader({"s": shards}, counts_of(*[[windows]] * 4), context, seed=4)
    starts = []
    for epoch in range(4):
        batch = loader.rows(epoch)
        targets = batch.labels[:, 1:]
        assert sorted(targets[targets != -100].tolist()) == list(range(total))
        assert sorted(np.unique(batch.tokens[:, 0]).tolist()) == sorted(batch.tokens[:, 0].tolist())
        starts.append(min(batch.tokens[:, 0].tolist()))
        for row, label in zip(batch.tokens.tolist(), batch.labels.tolist()):
            n = label.index(-100) if -100 in label else len(label)
            assert row[:n] == label[:n] == [(row[0] + i) % total for i in range(n)]
            assert label[n:] == [-100] * (context + 1 - n)
            assert row[n:] == [0] * (context + 1 - n)
    if total > 2 * context > 2:
        assert len(set(starts)) > 1                                  # cut again at another offset


def test_epochs_need_not_end_with_a_step(tmp_path):
    shards = source(tmp_path / "s", [30, 7, 26])                     # 63 tokens, 8 windows of 8
    loader = Loader({"s": shards}, counts_of(*[[3]] * 13), 8, seed=0)
    seen = np.zeros(63, int)
    for step in range(13):                                           # 39 windows: 4 epochs and 7 windows
        targets = loader.rows(step).labels[:, 1:]
        seen += np.bincount(targets[targets != -100], minlength=63)
        assert seen.max() - seen.min() <= 1 or step % 8 != 7
    assert seen.min() == 4
    assert seen.max() == 5
    assert loader.epochs(8) == {"s": 3.0}


@pytest.mark.parametrize(("context", "total", "windows"), [(8, 100, 12), (100, 100, 1), (300, 100, 1), (50, 100, 2)])
def test_drop_last_leaves_the_short_window_out(tmp_path, context, total, windows):
    shards = source(tmp_path / "s", [60, 40])
    loader = Loader({"s": shards}, counts_of([windows]), context, seed=0, drop_last=True)
    targets = loader.rows(0).labels[:, 1:]
    targets = targets[targets != -100].tolist()
    assert loader.windows == [windows]
    assert len(set(targets)) == len(targets) == min(total, windows * context)


def test_epochs_and_sources_have_orders_of_their_own(tmp_path):
    shards, orders = source(tmp_path / "s", [400]), set()
    for name in ("a", "b"):
        loader = Loader({name: shards}, counts_of(*[[1]] * 100), 8, seed=0)
        starts = [int(loader.rows(step).tokens[0, 0]) for step in range(100)]
        for epoch in (starts[:50], starts[50:]):
            orders.add(tuple((start - epoch[0]) % 400 for start in epoch))   # whatever the offset of the first cut
    assert len(orders) == 4


def test_a_source_without_tokens_is_refused(tmp_path):
    source(tmp_path / "s", [5])
    with pytest.raises(ValueError, match=r"source law .* no tokens in its heldout split"):
        Loader({"law": Shards(tmp_path / "s", "heldout")}, counts_of([1]), 8, seed=0)


# ---- 6: the permutation

def test_permute_is_a_bijection():
    for n in range(1, 601):
        assert sorted(permute(np.arange(n), n, data.mix_keys(n, "x")).tolist()) == list(range(n)), n
    rng = random.Random(0)
    for _ in range(40):
        n = rng.randrange(2, 2 ** rng.randrange(2, 41))
        index = np.unique(np.random.default_rng(n).integers(0, n, 20000))
        image = permute(index, n, data.mix_keys(n))
        assert len(np.unique(image)) == len(index)
        assert image.min() >= 0
        assert image.max() < n


def test_permute_looks_random():
    n = 1 << 20
    image = permute(np.arange(n), n, data.mix_keys(1))
    assert abs((np.diff(image) % 2 != 0).mean() - 0.5) < 0.02        # a weak one keeps the parity for 99.9 %
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.01
    assert abs((image[:n // 2] < n // 2).mean() - 0.5) < 0.01
    other = permute(np.arange(n), n, data.mix_keys(2))
    assert (image == other).sum() < 12                               # Poisson of mean 1
    assert abs(np.corrcoef(image, other)[0, 1]) < 0.01
    index = np.random.default_rng(0).integers(0, n, 4000)
    for bit in range(20):                                            # one bit in: each bit out changes half the time
        changed = permute(index, n, data.mix_keys(1)) ^ permute(index ^ (1 << bit), n, data.mix_keys(1))
        rate = (changed[:, None] >> np.arange(20) & 1).mean()
        assert abs(rate - 0.5) < 0.02, (bit, rate)
    for bit in range(0, 64, 7):
        x = np.random.default_rng(bit).integers(0, 2**63, 4000, dtype=np.uint64)
        flipped = data.fmix64(x) ^ data.fmix64(x ^ np.uint64(1 << bit))
        rates = (flipped[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).mean(0)
        assert abs(rates - 0.5).max() < 0.05                         # 6 sigma of 4,000 draws


def test_small_permutations_are_all_reached_about_equally():
    images = [tuple(permute(np.arange(4), 4, data.mix_keys(key)).tolist()) for key in range(4800)]
    counts = [images.count(p) for p in itertools.permutations(range(4))]
    assert min(counts) > 100
    assert max(counts) < 400


def test_keys_have_an_order():
    keys = [data.mix_keys(*parts)[0] for parts in ((1, 2), (2, 1), (1, 2, 0), ("1", 2), (12,), (0, 1, 2))]
    assert len(set(keys)) == 6
    np.testing.assert_array_equal(data.mix_keys(5, "a", np.arange(3)),
                                  np.concatenate([data.mix_keys(5, "a", i) for i in range(3)]))


# ---- 7: boundaries

@pytest.mark.parametrize("shard_tokens", [10**8, 12, 1])
def test_read_against_a_loop(tmp_path, shard_tokens):
    lengths = [1, 4, 5, 12, 1, 1, 3, 2]                              # 1, T, T + 1, 3T for T = 4
    total, begins = sum(lengths), {0, *itertools.accumulate(lengths)}
    ids = [7] * total                                                # every token is "EOS": the text tells nothing
    for number, values in enumerate((None, ids)):
        shards = source(tmp_path / str(number), lengths, shard_tokens, values)
        values = values or list(range(total))
        for start in range(2 * total):
            for n in (1, 4, 5, 9, total, total + 3):
                tokens, doc_start = np.zeros(n, np.int32), np.zeros(n, np.int32)
                shards.read(start, tokens, doc_start)
                places = [(start + i) % total for i in range(n)]
                assert tokens.tolist() == [values[p] for p in places]
                assert doc_start.tolist() == [i if p in begins else 0 for i, p in enumerate(places)]


@pytest.mark.parametrize("shard_tokens", [10**8, 9])
@pytest.mark.parametrize("reset_positions", [True, False])
@pytest.mark.parametrize("context", [4, 7, 60])
def test_rows_against_a_loop(tmp_path, shard_tokens, reset_positions, context):
    lengths = [1, 4, 5, 12, 1, 1, 3, 2, 8]
    total, begins = sum(lengths), {0, *itertools.accumulate(lengths)}
    shards = source(tmp_path / "s", lengths, shard_tokens)
    loader = Loader({"s": shards}, counts_of(*[[5]] * 12), context, seed=3, reset_positions=reset_positions)
    for step in range(12):
        batch = loader.rows(step)
        for row in range(5):
            tokens, labels, positions, doc_start = (getattr(batch, f)[row].tolist() for f in FIELDS)
            begin = 0
            for i in range(context + 1):
                real = labels[i] != -100
                if real:
                    assert tokens[i] == labels[i] == (tokens[0] + i) % total
                if i and (tokens[i] in begins if real else labels[i - 1] != -100):     # padding is a document too
                    begin = i
                assert doc_start[i] == begin
                assert positions[i] == (i - begin if reset_positions else i)
    assert all(getattr(batch, f).dtype == torch.int32 for f in FIELDS)


def test_bos_equal_to_eos_and_specials_in_the_text(tmp_path):
    texts = ["a\x07b", "\x07", "c\x07\x07"]                          # byte 7 is BOS and EOS here
    pack(texts, Bytes(bos_id=7, eos_id=7), tmp_path / "s", heldout=0.0, bos=True)
    shards = Shards(tmp_path / "s")
    assert [shards.document(i)[0].tolist() for i in range(3)] == [
        [7, 97, 7, 98, 7], [7, 7, 7], [7, 99, 7, 7, 7]]
    assert [shards.text_document(i)[0].tolist() for i in range(3)] == [[97, 7, 98], [7], [99, 7, 7]]
    assert [shards.text_document(i)[1] for i in range(3)] == [3, 1, 3]
    tokens, doc_start = np.zeros(13, np.int32), np.zeros(13, np.int32)
    shards.read(0, tokens, doc_start)
    assert np.flatnonzero(doc_start).tolist() == [5, 8]


# ---- 8: faults

def packed(tmp_path, **options) -> Path:
    pack(some_texts(60), Bytes(), tmp_path / "s", **{"heldout": 0.2, "shard_tokens": 900, **options})
    return tmp_path / "s"


def refused(folder, match):
    """By opening it and by verify."""
    with pytest.raises(ValueError, match=match):
        Shards(folder), Shards(folder, "heldout")
    with pytest.raises(ValueError, match=match):
        data.verify(folder)


@pytest.mark.parametrize("name", ["train_000001.bin", "train_000000.idx", "train_000002.bytes", "heldout_000000.bin"])
def test_a_file_shorter_or_longer_by_a_byte_or_missing(tmp_path, name):
    path = packed(tmp_path) / name
    whole = path.read_bytes()
    for changed in (whole[:-1], whole + b"\0", b""):
        path.write_bytes(changed)
        refused(path.parent, f"{name} has {len(changed)} bytes instead of {len(whole)}")
    path.unlink()
    refused(path.parent, f"{name} is missing")


def test_one_flipped_bit_anywhere_is_found(tmp_path):
    folder = packed(tmp_path)
    assert data.verify(folder) == sum(p.stat().st_size for p in folder.iterdir() if p.suffix != ".json") - sum(
        1024 for p in folder.glob("*.bin"))
    rng = random.Random(0)
    for path in sorted(p for p in folder.iterdir() if p.suffix != ".json"):
        whole = path.read_bytes()
        inside = [0, 5, 40, 70, 110, 700, 1024] if path.suffix == ".bin" else []
        for at in [*inside, len(whole) - 1, rng.randrange(len(whole))]:
            changed = bytearray(whole)
            changed[at] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=path.name.replace(".", r"\.")):
                data.verify(folder)
        path.write_bytes(whole)
    data.verify(folder)


def test_verify_within_a_budget_reads_less_and_at_least_one_shard(tmp_path):
    folder = packed(tmp_path)
    assert 0 < data.verify(folder, budget_bytes=1) < data.verify(folder, budget_bytes=5000) < data.verify(folder)


def test_swapped_shards(tmp_path):
    texts = ["a" * 9, "b" * 9, "c" * 9]
    pack(texts, Bytes(), tmp_path / "s", heldout=0.0, shard_tokens=10)
    one, two = (tmp_path / "s" / f"train_00000{i}.bin" for i in (0, 2))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    refused(tmp_path / "s", "header that does not fit")


def test_document_ends_that_do_not_fit_are_found_even_with_a_right_hash(tmp_path):
    source(tmp_path / "s", [3, 4, 5])
    path, manifest = tmp_path / "s" / "train_000000.idx", json.loads((tmp_path / "s" / "manifest.json").read_text())
    for ends in ([3, 3, 12], [3, 7, 11], [7, 3, 12]):
        path.write_bytes(struct.pack("<3Q", *ends))
        manifest["splits"]["train"]["shards"][0]["idx_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="do not rise to its length"):
            data.verify(tmp_path / "s")


def test_manifests_that_are_none(tmp_path):
    folder = packed(tmp_path)
    whole = json.loads((folder / "manifest.json").read_text())
    shard = {**whole["splits"]["train"]["shards"][0]}
    outside = [{**shard, "name": name} for name in ("../s/train_000000", "/etc/passwd", "a/b")]
    broken = ["", "{", "[]", "null", '"x"', "\xff", "{}", json.dumps({**whole, "version": 9}),
              json.dumps({**whole, "format": "other"}), json.dumps({**whole, "splits": {"train": {"shards": []}}}),
              json.dumps({**whole, "splits": 3}), json.dumps({**whole, "dtype": "float64"}),
              json.dumps({k: v for k, v in whole.items() if k != "dtype"}),
              json.dumps({k: v for k, v in whole.items() if k != "tokenizer"})]
    for text in broken:
        (folder / "manifest.json").write_bytes(text.encode("latin-1"))
        refused(folder, r"manifest\.json is damaged or of another version")
    for record in outside:
        whole["splits"]["train"]["shards"][0] = record
        (folder / "manifest.json").write_text(json.dumps(whole))
        refused(folder, "points outside its folder")
    (folder / "manifest.json").unlink()
    refused(folder, "holds no manifest.json")
    refused(tmp_path / "nowhere", "holds no manifest.json")


def test_the_model_must_fit_the_shards(tmp_path):
    shards = Shards(packed(tmp_path))
    data.check_tokenizer("law", shards, Bytes(), 258)                # the largest id is EOS, 257
    data.check_tokenizer("law", shards, None, 5000)
    with pytest.raises(ValueError, match=r"source law .* holds token id 257, but the model's vocabulary has 257"):
        data.check_tokenizer("law", shards, Bytes(), 257)
    with pytest.raises(ValueError, match=r"another tokenizer \(bytes 1, 259 entries\) than the model's \(other 2"):
        data.check_tokenizer("law", shards, Bytes(fingerprint="1e" * 32, library="other 2"), 5000)


@pytest.mark.parametrize(("vocab_size", "dtype", "magic"), [(65536, "uint16", (20240520, 1)),
                                                            (65537, "uint32", (20240801, 7))])
def test_the_width_of_a_token(tmp_path, vocab_size, dtype, magic):
    pack(["a"], Bytes(vocab_size=vocab_size, eos_id=vocab_size - 1), tmp_path / "s", heldout=0.0)
    shards, raw = Shards(tmp_path / "s"), (tmp_path / "s" / "train_000000.bin").read_bytes()
    assert shards.manifest["dtype"] == dtype
    assert shards.document(0)[0].tolist() == [97, vocab_size - 1]
    assert np.frombuffer(raw, "<i4", 3).tolist() == [*magic, 2]      # as llm.c reads it
    assert len(raw) == 1024 + 2 * np.dtype(dtype).itemsize
    batch = Loader({"s": shards}, counts_of([1]), 4, seed=0).rows(0)
    assert batch.tokens.max() == vocab_size - 1


def test_text_that_no_file_should_have(tmp_path, tiny_bpe):
    tokenizer = tokenizers.load(tiny_bpe)
    texts = ["lone \ud800 surrogate", "\udfff", "pair \ud83d\ude42", "nul \0 nul", "\0", "5 MB in a line " * 350_000,
             " ", "\r\n", "\ufffe", "", "", "<|eos|> in text"]
    manifest = pack(texts, tokenizer, tmp_path / "s", heldout=0.0)
    shards = Shards(tmp_path / "s")
    assert manifest["empty_documents_dropped"] == 2
    assert shards.documents == 10
    wanted = ["lone \ufffd surrogate", "\ufffd", "pair \U0001f642", *texts[3:9], texts[11]]
    for i, text in enumerate(wanted):
        ids, nbytes = shards.text_document(i)
        assert tokenizer.decode(ids) == text
        assert nbytes == len(text.encode())
    assert data.verify(tmp_path / "s") > 0


def test_nothing_to_train_on_leaves_nothing(tmp_path):
    for texts, match in (([], "0 empty documents, 0 held out"), (["", ""], "2 empty documents")):
        with pytest.raises(ValueError, match=f"nothing to train on: .*{match}"):
            pack(texts, Bytes(), tmp_path / "s", heldout=0.0)
    with pytest.raises(ValueError, match="1 held out"):
        pack(["a"], Bytes(), tmp_path / "s", heldout=0.9999)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "match"), [
    ({"heldout": 1.0}, "heldout is 1.0"), ({"heldout": -0.1}, "heldout"), ({"heldout": float("nan")}, "heldout"),
    ({"workers": 0}, "0 workers"), ({"shard_tokens": 0}, "0 tokens a shard"), ({"shard_tokens": 2**31}, "2147483648"),
    ({"tokenizer": Bytes(eos_id=None)}, "no EOS token"), ({"tokenizer": Bytes(bos_id=None), "bos": True}, "no BOS")])
def test_wrong_options(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        pack(["a"], options.pop("tokenizer", Bytes()), tmp_path / "s", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_without_overwrite(tmp_path):
    folder = packed(tmp_path)
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match=r"exists already; .*--overwrite"):
        pack(["new"], Bytes(), folder)
    with pytest.raises(ValueError, match="nothing to train on"):
        pack([""], Bytes(), folder, overwrite=True)                  # what fails replaces nothing
    assert (folder / "manifest.json").read_bytes() == before
    assert data.verify(folder)
    pack(["new"], Bytes(), folder, heldout=0.0, overwrite=True)
    assert Shards(folder).documents == 1
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1").write_text("years of work")
    with pytest.raises(ValueError, match="is no packed source, so --overwrite does not remove it"):
        pack(["new"], Bytes(), other, overwrite=True)
    assert (other / "chapter1").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s", "thesis"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child")
def test_kill_at_any_moment_leaves_no_folder_that_opens(tmp_path):
    def child(moment):                                               # dies at its `moment`-th document or fsync
        count = iter(range(10**6))
        signal.alarm(60)                                             # never let the test wait for a stuck child

        def tick(*_):
            if next(count) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        os.fsync = tick
        pack((tick() or text for text in some_texts(50)), Bytes(), tmp_path / "s", shard_tokens=500, batch_bytes=300)
        os._exit(0)

    deaths = 0
    for moment in (0, 20, 49, 51, 55, 60, 66, 10**6):
        pid = os.fork()
        if not pid:
            child(moment)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL)
        if status:
            deaths += 1
            assert not (tmp_path / "s").exists()
            for split in data.SPLITS:
                with pytest.raises(ValueError, match="holds no manifest"):
                    Shards(tmp_path / "s", split)
    assert deaths >= 6
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert data.verify(tmp_path / "s")


def test_a_full_disk(tmp_path, tiny_bpe):
    """Files cannot grow past a limit: the same error path as a full disk, in the middle of the second shard."""
    (tmp_path / "in.txt").write_text("\n".join(t.replace("\n", " ") for t in some_texts(3000)), encoding="utf-8")
    script = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000)); "
              "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    run = subprocess.run([sys.executable, "-c", script, str(ROOT / "data.py"), "pack", "--tokenizer", str(tiny_bpe),
                          "--documents", "line", "--out", str(tmp_path / "s"), str(tmp_path / "in.txt")],
                         capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert run.stderr.startswith("error: ")
    assert "too large" in run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["in.txt"]


# ---- 9: the writer

def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_workers_and_batches_change_nothing(tmp_path):
    texts, wanted = some_texts(150), None
    for workers, batch_bytes in itertools.product((1, 2, 5), (1, 400, 1 << 21)):
        pack(texts, Bytes(), tmp_path / "s", heldout=0.1, shard_tokens=1000, workers=workers, batch_bytes=batch_bytes,
             overwrite=True)
        got = content(tmp_path / "s")
        assert got == (wanted := wanted or got), (workers, batch_bytes)
    assert len(wanted) > 20


@pytest.mark.parametrize("shard_tokens", [1, 1000, 1001, 10**8])
@pytest.mark.parametrize(("bos", "heldout"), [(False, 0.0), (True, 0.25)])
@pytest.mark.parametrize("vocab_size", [259, 70000])
def test_pack_against_the_naive_writer(tmp_path, shard_tokens, bos, heldout, vocab_size):
    texts, tokenizer = [*some_texts(80), "y" * 3000, *some_texts(5)], Bytes(vocab_size=vocab_size)
    manifest = pack(texts, tokenizer, tmp_path / "s", heldout=heldout, bos=bos, shard_tokens=shard_tokens)
    sides = {"train": [], "heldout": []}
    for text in texts:
        raw = text.encode()
        draw = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") % 10000
        sides["heldout" if draw < 10000 * heldout else "train"].append(([256] * bos + [*raw, 257], len(raw)))
    for split, documents in sides.items():
        wanted = naive_write(tmp_path / split, documents, tokenizer, shard_tokens, split)
        assert manifest["splits"][split] == wanted["splits"][split]
        files = {name: value for name, value in content(tmp_path / split).items() if name != "manifest.json"}
        assert files == {name: v for name, v in content(tmp_path / "s").items() if name.startswith(split)}
        shards = Shards(tmp_path / "s", split)
        assert shards.documents == len(documents)
        for i, (ids, nbytes) in enumerate(documents):
            assert shards.document(i)[0].tolist() == ids
            assert shards.document(i)[1] == nbytes
    assert json.loads((tmp_path / "s" / "manifest.json").read_text()) == manifest
    assert not heldout or sides["heldout"]


def test_heldout_goes_by_content(tmp_path):
    texts = list(dict.fromkeys(some_texts(400)))

    def heldout(texts, name, share=0.1):
        pack(texts, Bytes(), tmp_path / name, heldout=share, overwrite=True)
        shards = Shards(tmp_path / name, "heldout")
        return {bytes(shards.text_document(i)[0].astype(np.uint8)).decode() for i in range(shards.documents)}
    whole = heldout(texts, "a")
    assert 15 < len(whole) < 70                                      # 40 expected, 4 sigma is 24
    assert heldout(texts[::-1], "b") == whole
    assert heldout(texts[100:300], "c") == whole & set(texts[100:300])
    assert heldout(texts * 2, "d") == whole                          # a copy never crosses over
    assert heldout(texts, "e", 0.05) < whole < heldout(texts, "f", 0.3)
    edge = next(text for text in map(str, itertools.count()) if not int.from_bytes(
        hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % 10000)
    assert heldout([edge, *texts], "g", 0.0) == set()                # even the text that falls on 0


@pytest.mark.parametrize("name", ["gpt2", "llama2_spm", "llama3_tiktoken", "phi2_bytebpe_hf"])
def test_real_text_comes_back(tmp_path, data_dir, name):
    tokenizer = tokenizers.load(data_dir / "tokenizers" / name)
    texts = []
    for file, separator in (("legal_en_dc/dc_code_title16.txt", None), ("tinyshakespeare/input.txt", None),
                            ("wikitext2/wiki.valid.raw", None), ("tinystories/tinystories_sample_2MiB.txt",
                                                                 "<|endoftext|>")):
        texts += list(itertools.islice(read_documents(str(data_dir / "corpora" / file), separator=separator), 100))
    manifest = pack(texts, tokenizer, tmp_path / "s", heldout=0.0, shard_tokens=20_000)
    shards, kept = Shards(tmp_path / "s"), [text for text in texts if text]
    assert shards.documents == len(kept) > 300
    assert len(shards.records) > 1
    for i, text in enumerate(kept):
        ids, nbytes = shards.text_document(i)
        assert tokenizer.decode(ids) == text
        assert nbytes == len(text.encode())
        whole = shards.document(i)[0].tolist()
        assert whole == tokenizer.encode(text, bos=tokenizer.add_bos, eos=True)
    assert manifest["splits"]["train"]["tokens"] == shards.tokens
    assert data.verify(tmp_path / "s")


# ---- readers

def test_text_files(tmp_path):
    path = tmp_path / "a.txt"

    def read(text, **options):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return list(read_documents(str(path), **options))
    text = "\n\none\n  two\n \t\nthree\n\n\n\nfour"
    assert read(text) == read(text + "\n\n") == ["one\n  two", "three", "four"]
    assert read(text.replace("\n", "\r\n")) == ["one\r\n  two", "three", "four"]
    assert read("a\n\nb\r\nc", documents="line") == ["a", "", "b", "c"]
    assert read(text, documents="file") == [text]
    assert read("\ufeffone\n\ntwo") == ["one", "two"]
    assert read("\ufeffone", documents="file") == ["one"]
    assert read("a\n<|e|>\nb\n<|e|>\n", separator="<|e|>") == ["a", "b"]
    assert read("a\r\n<|e|>\r\nb\r\n<|e|>\r\n", separator="<|e|>") == ["a", "b"]
    assert read("a<|e|><|e|>b", separator="<|e|>") == ["a", "", "b"]
    long = "x" * (1 << 20)
    for shift in range(-6, 2):                                       # the separator across the border of two reads
        assert read(long[:shift or None] + "<|e|>b", separator="<|e|>") == [long[:shift or None], "b"]
    assert read("") == []
    assert read("", documents="line") == []
    assert read("", separator="x") == []
    assert read("", documents="file") == [""]
    packed = tmp_path / "b.txt.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert list(read_documents(str(packed))) == ["one\n  two", "three", "four"]


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "jsonl.gz", "jsonl.zst", "parquet"])
def test_records(tmp_path, suffix):
    import pyarrow
    import pyarrow.parquet
    texts, path = ["a\nb", "", "é \U0001f642", "c " * 5000], tmp_path / f"x.{suffix}"
    lines = "\ufeff" + "\r\n".join(json.dumps({"n": 1, "body": t}) for t in texts) + "\n\n  \n"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"n": [1] * 4, "body": texts}), path)
    elif suffix.endswith("zst"):
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines.encode())
    else:
        path.write_bytes(gzip.compress(lines.encode()) if suffix.endswith("gz") else lines.encode())
    assert list(read_documents(str(path), column="body")) == texts
    with pytest.raises(ValueError, match=rf"x\.{suffix} .*'text' \(it has: n, body\); .*--column"):
        list(read_documents(str(path)))


def test_records_that_are_wrong_name_file_and_line(tmp_path):
    path = tmp_path / "x.jsonl"
    for line, match in (('{"text": 3}', "line 2 has no text"), ('{"a": "b"}', r"line 2 .*it has: a\)"),
                        ("[1]", "line 2 .*list"), ("{", "line 2 is not JSON"), ('{"text": null}', "line 2 has no"),
                        ("garbage", "line 2 is not JSON")):
        path.write_text('{"text": "a"}\n' + line + "\n")
        with pytest.raises(ValueError, match=match) as error:
            list(read_documents(str(path)))
        assert "x.jsonl" in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    import pyarrow
    wrong = {"latin.txt": "é\n".encode("latin-1"), "latin.jsonl": '{"text": "é"}'.encode("latin-1"),
             "utf16.txt": "abc".encode("utf-16"), "cut.txt.gz": gzip.compress(b"a" * 99999)[:-20],
             "none.jsonl.gz": b"not gzip", "bad.txt.gz": gzip.compress(b"abc" * 9)[:12] + b"\xff" * 99,
             "none.txt.zst": b"not zstd", "none.parquet": b"not parquet"}
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(random.Random(0).randbytes(3000).hex().encode())
    wrong["cut.txt.zst"] = sink.getvalue().to_pybytes()[:-40]
    for name, raw in wrong.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            list(read_documents(str(tmp_path / name)))
    with pytest.raises(ValueError, match=r"nowhere\.txt does not exist"):
        list(read_documents(str(tmp_path / "nowhere.txt")))


def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    import datasets
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert list(read_documents(f"hf://{folder}", column="body")) == ["one", "two"]
    asked = {}

    def load_dataset(name, config, **options):
        asked.update(options, name=name, config=config)
        return iter([{"text": "a"}, {"other": "b"}])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = read_documents("hf://org/set@v1", config="en", split="test")
    assert next(documents) == "a"
    assert asked == {"name": "org/set", "config": "en", "split": "test", "streaming": True, "revision": "v1"}
    with pytest.raises(ValueError, match="hf://org/set@v1 record 2 has no text under 'text'"):
        next(documents)


# ---- command line

def test_command_line(tmp_path, tiny_bpe, monkeypatch, capsys):
    texts = [t.replace("\n", ".") for t in some_texts(300)]
    (tmp_path / "in.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "a record"}) + "\n")
    out, report = tmp_path / "s", tmp_path / "m.json"
    assert run(monkeypatch, "pack", "--tokenizer", tiny_bpe, "--out", out, "--heldout", "0.1", "--json", report,
               tmp_path / "in.txt", tmp_path / "in.jsonl") == 0
    said = capsys.readouterr()
    assert "packed" in said.out
    assert "heldout" in said.out
    assert said.err == ""
    manifest = json.loads(report.read_text())
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert [i["name"] for i in manifest["inputs"]] == ["in.txt", "in.jsonl"]
    assert manifest["inputs"][0]["bytes"] == (tmp_path / "in.txt").stat().st_size
    assert sum(manifest["splits"][s]["documents"] for s in data.SPLITS) == 301
    assert manifest["bos"]
    assert Shards(out).document(0)[0][0] == tokenizers.load(tiny_bpe).bos_id
    assert run(monkeypatch, "verify", out) == 0
    assert "have the hashes" in capsys.readouterr().out
    assert run(monkeypatch, "info", out, "--json", tmp_path / "i.json") == 0
    assert json.loads((tmp_path / "i.json").read_text()) == manifest
    assert "documents" in capsys.readouterr().out

    def fails(*argv, match):
        assert run(monkeypatch, *argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert match in error
    again = ("pack", "--tokenizer", tiny_bpe, "--out")
    fails(*again, out, tmp_path / "in.txt", match="exists already")
    fails(*again, tmp_path / "t", tmp_path / "nowhere.txt", match="nowhere.txt does not exist")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n" * 10)
    fails(*again, tmp_path / "t", tmp_path / "in.txt", tmp_path / "latin.txt", match="latin.txt")
    (tmp_path / "empty.txt").write_text("")
    fails(*again, tmp_path / "t", tmp_path / "empty.txt", match="nothing to train on")
    fails("pack", "--tokenizer", tmp_path / "no", "--out", tmp_path / "t", tmp_path / "in.txt", match="does not exist")
    fails("verify", tmp_path / "t", match="holds no manifest")
    assert not (tmp_path / "t").exists()
    assert not list(tmp_path.glob(".t.partial"))
    raw = bytearray((out / "train_000000.bin").read_bytes())
    raw[-1] ^= 4
    (out / "train_000000.bin").write_bytes(raw)
    fails("verify", out, match="hash differs")
    for argv in (["pack"], ["nonsense"], ["pack", "--documents", "word"], ["info", str(out), "--jsn", "x"]):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_no_bos_and_a_warning_where_nothing_is_held_out(tmp_path, tiny_bpe, monkeypatch, capsys):
    (tmp_path / "in.txt").write_text("one document")
    assert run(monkeypatch, "pack", "--tokenizer", tiny_bpe, "--out", tmp_path / "s", "--no-bos",
               "--heldout", "0.0001", tmp_path / "in.txt") == 0
    assert "no document fell into the held-out share" in capsys.readouterr().err
    tokenizer = tokenizers.load(tiny_bpe)
    assert Shards(tmp_path / "s").document(0)[0].tolist() == tokenizer.encode("one document", eos=True)
    shutil.rmtree(tmp_path / "s")
    assert run(monkeypatch, "pack", "--tokenizer", tiny_bpe, "--out", tmp_path / "s", "--heldout", "0", "--bos",
               tmp_path / "in.txt") == 0
    assert capsys.readouterr().err == ""
    assert Shards(tmp_path / "s").text_document(0)[0].tolist() == tokenizer.encode("one document")


def test_a_hub_that_cannot_be_reached_is_named_and_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("no route to the Hub")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match="hf://org/name cannot be read from the Hub: no route"):
        list(data.read_documents("hf://org/name"))


# ---- score buckets

def scored(n: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [{"text": f"{i} {text}", "id": str(i), "metadata": {"scores": {"quality": rng.randrange(n // 2)}}}
            for i, text in enumerate(some_texts(n, seed))]


@pytest.mark.parametrize("first", ["low", "high"])
def test_buckets_are_the_documents_in_the_order_of_their_scores(tmp_path, first):
    records, out = scored(103), tmp_path / "s"
    index = data.pack_buckets(lambda: ((f"line {i}", r) for i, r in enumerate(records)), Bytes(), out, 4, "quality",
                              first=first, heldout=0.1, shard_tokens=500)
    sign = 1 if first == "low" else -1
    ordered = sorted(records, key=lambda r: sign * r["metadata"]["scores"]["quality"])       # stable, as promised
    at = 0
    for part, size in zip(index["buckets"], (26, 26, 26, 25), strict=True):
        mine = ordered[at:at + size]
        pack([r["text"] for r in records if r in mine], Bytes(), tmp_path / "plain", heldout=0.1, shard_tokens=500)
        for file in (tmp_path / "plain").iterdir():                        # an ordinary folder, byte for byte
            assert (out / part["name"] / file.name).read_bytes() == file.read_bytes()
        scores = [r["metadata"]["scores"]["quality"] for r in mine]
        assert (part["low"], part["high"]) == (min(scores), max(scores))
        shutil.rmtree(tmp_path / "plain")
        at += size
    assert data.read_buckets(out) == json.loads((out / "buckets.json").read_text()) == index
    assert sorted(p.name for p in out.iterdir()) == [*(f"bucket_0{k}" for k in range(4)), "buckets.json"]
    opened = data.open_buckets({"law": SourceConfig(path=str(out), weight=2.0), "wiki": SourceConfig(path="elsewhere")})
    assert list(opened) == ["law/0", "law/1", "law/2", "law/3", "wiki"]
    assert [(b.of, b.weight, b.low, b.high) for b in list(opened.values())[:4]] == [
        ("law", 2.0, k / 4, (k + 1) / 4) for k in range(4)]
    for b in list(opened.values())[:4]:
        assert b.tokens == Shards(b.path).tokens


def test_buckets_that_cannot_be(tmp_path, monkeypatch):
    def made(records, out=tmp_path / "s", buckets=3, **more):
        return data.pack_buckets(lambda: ((f"line {i}", r) for i, r in enumerate(records)), Bytes(), out, buckets,
                                 "quality", **more)
    good = scored(30)
    for value, known in ((None, "no scores"), ({"alpha": 1}, "alpha"), ({"quality": "high"}, "quality"),
                         ({"quality": float("nan")}, "quality"), ({"quality": True}, "quality")):
        with pytest.raises(ValueError, match=rf"line 30 has no number under metadata.scores.quality \(it has: {known}"):
            made([*good, {"text": "x", "metadata": {"scores": value}}])
    with pytest.raises(ValueError, match="line 0 has no number"):
        made([{"text": "x", "metadata": None}])
    with pytest.raises(ValueError, match="2 documents do not fill 3 buckets"):
        made(good[:2])
    with pytest.raises(ValueError, match="from 2 to 100"):
        made(good, buckets=1)
    with pytest.raises(ValueError, match="bucket 0 of 3: nothing to train on"):
        made([{**r, "text": ""} for r in good])
    assert not any(tmp_path.iterdir())
    made(good)
    with pytest.raises(ValueError, match="exists already"):
        made(good)
    made(good, buckets=2, overwrite=True)
    assert len(data.read_buckets(tmp_path / "s")["buckets"]) == 2
    with pytest.raises(ValueError, match="holds score buckets; name one of them"):
        Shards(tmp_path / "s")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="is no packed source"):
        made(good, tmp_path / "other", overwrite=True)
    index = json.loads((tmp_path / "s/buckets.json").read_text())
    for name in ("../../x", "..", ""):
        index["buckets"][0]["name"] = name
        (tmp_path / "s/buckets.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="points outside"):
            data.packed_folders(tmp_path / "s")
    (tmp_path / "s/buckets.json").write_text("[]")
    with pytest.raises(ValueError, match="damaged"):
        data.open_buckets({"law": SourceConfig(path=str(tmp_path / "s"))})


# ---- mix

def test_mixed_files(tmp_path):
    law = [{"text": f"law {i}", "id": i, "metadata": {"x": [i]}} for i in range(10)]
    web = [{"text": f"web {i} \ud800\u2028", "source_type": "old"} for i in range(7)]
    out, seen = tmp_path / "new/mixed.jsonl", set()
    for seed in (0, 0, 1):
        done = data.mix_files(iter(law), iter(web), out, ratio=0.6, total=45, seed=seed)
        seen.add(out.read_bytes())
        got = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
        for side, records, n in (("domain", law, 27), ("general", web, 18)):
            mine = [r for r in got if r["source_type"] == side]
            texts = [r["text"].replace("\ufffd", "\ud800") for r in mine]
            assert len(mine) == n == done[side]["written"]
            counts = [texts.count(r["text"]) for r in records]             # none twice before all are once
            assert max(counts) - min(counts) <= 1
            assert done[side]["epochs"] == n / len(records)
        assert all(r == {**law[r["id"]], "source_type": "domain"} for r in got if r["source_type"] == "domain")
    assert len(seen) == 2
    assert [r["source_type"] for r in got] != sorted(r["source_type"] for r in got)
    assert data.mix_files(law, web, out)["total"] == 14                    # each of the domain once, at 0.7
    assert sorted(p.name for p in out.parent.iterdir()) == ["mixed.jsonl"]


def test_an_epoch_of_a_mix_has_each_record_once_in_a_new_order(tmp_path):
    law = [{"text": str(i)} for i in range(50)]
    places = data._draw("domain", 200, np.arange(50), seed=3).reshape(4, 50)
    assert all(sorted(row) == list(range(50)) for row in places.tolist())
    assert len({tuple(row) for row in places.tolist()}) == 4
    done = data.mix_files(law, [], tmp_path / "m.jsonl", ratio=1.0, total=250)
    assert ["read 5.0 times" in line for line in done["warnings"]] == [True]
    before = (tmp_path / "m.jsonl").read_bytes()
    for wrong, match in (({"total": 801}, "16.0 times, above its max_epochs of 16: .* --max-epochs 17"),
                         ({"total": 0}, "at least 1"), ({"ratio": 1.5}, "--domain-ratio"), ({"ratio": 0.0}, "length"),
                         ({"ratio": 0.5, "total": 9}, "the general files hold no records, but 5")):
        with pytest.raises(ValueError, match=match):
            data.mix_files(law, [], tmp_path / "m.jsonl", **{"ratio": 1.0, **wrong})
    data.mix_files(law, [], tmp_path / "n.jsonl", ratio=1.0, total=801, max_epochs=20)
    assert (tmp_path / "m.jsonl").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.jsonl", "n.jsonl"]


def test_command_line_of_buckets_and_mixes(tmp_path, tiny_bpe, monkeypatch, capsys):
    law, wiki, out = tmp_path / "law.jsonl", tmp_path / "wiki.txt", tmp_path / "s"
    law.write_text("".join(json.dumps(r) + "\n" for r in scored(80)))
    wiki.write_text("\n\n".join(t.replace("\n", ".") for t in some_texts(40)))
    pack_law = ("pack", "--tokenizer", tiny_bpe, "--out", out, law)
    assert run(monkeypatch, *pack_law, "--buckets", 4, "--score", "quality") == 0
    said = capsys.readouterr().out
    best = sorted((r["metadata"]["scores"]["quality"] for r in scored(80)), reverse=True)
    assert f"bucket_00, read first: quality from {best[19]} to {best[0]}\n" in said
    assert json.loads((out / "buckets.json").read_text())["first"] == "high"
    assert run(monkeypatch, "verify", out) == run(monkeypatch, "info", out, "--json", tmp_path / "i.json") == 0
    assert len(json.loads((tmp_path / "i.json").read_text())["manifests"]) == 4
    assert run(monkeypatch, "pack", "--tokenizer", tiny_bpe, "--out", tmp_path / "w", wiki) == 0
    capsys.readouterr()
    recipe, picture, report = tmp_path / "r.toml", tmp_path / "mix.png", tmp_path / "mix.json"
    recipe.write_text(f"""[model]\npath = "x"\n[data]\ncontext = 16\n[data.sources.law]\npath = "{out}"
[data.sources.wiki]\npath = "{tmp_path / "w"}"\nrole = "general"\nstratum = "math"\n[train]\nsave_every = 3\n""")
    preview = ("mix", recipe, "--preview", "--out", picture, "--json", report)
    assert run(monkeypatch, *preview, "--data.schedule", "staged", "--train.steps", 20, "--train.batch-size", 5) == 0
    said, shown = capsys.readouterr().out, json.loads(report.read_text())
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "staged, 20 steps of 5 sequences of 16 tokens" in said
    assert "law/3" in said
    assert "math 1.000; no source for reasoning" in said
    assert (len(shown["rows"]), sum(shown["sequences"].values()), shown["schedule"]) == (10, 100, "staged")
    assert shown["rows"][0]["sources"]["law/3"] == 0 < shown["rows"][9]["sources"]["law/3"]
    windows = -(-Shards(tmp_path / "w").tokens // 16)
    assert shown["epochs"]["wiki"] == shown["sequences"]["wiki"] / windows
    assert run(monkeypatch, *preview, "--train.steps", 5000) == 0
    assert "train.py refuses this plan" in capsys.readouterr().out
    mixed = ("mix", "--domain", law, "--general", wiki, "--out", tmp_path / "m.jsonl", "--json", report)
    assert run(monkeypatch, *mixed, "--domain-ratio", 0.8, "--total-samples", 100) == 0
    assert "domain: 80 of 100 samples from 80 records, read 1.00 times" in capsys.readouterr().out
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == json.loads(report.read_text())["total"] == 100

    def fails(*argv, match):
        try:
            status = run(monkeypatch, *argv)
        except SystemExit as stop:
            status = stop.code
        error = capsys.readouterr().err
        assert (status, error.startswith("error: "), error.count("\n")) == (2, True, 1)
        assert match in error
    fails(*pack_law, "--buckets", 4, match="--buckets K and --score NAME go together")
    fails(*pack_law, "--overwrite", "--first", "low", match="go together")
    fails(*preview, "--data.scedule", "staged", match="did you mean data.schedule?")
    fails("mix", match="mix wants either")
    fails("mix", recipe, match="mix wants either")
    fails("mix", "--domain", law, "--general", wiki, match="mix wants either")
    fails("mix", tmp_path / "no.toml", "--preview", match="no.toml does not exist")
    fails("info", out, "--data.schedule", "x", match="unknown argument --data.schedule")
    fails(*mixed, "--total-samples", 100000, match="allow it with --max-epochs")
    recipe.write_text('[data.sources.law]\npath = "nowhere"\n')
    fails(*preview, match="data.sources.law.path is no folder")
    assert run(monkeypatch, *preview, "--train.steps", 4) == 0
