"""text/manifest.py: an index that is not what was written, to the last bit, or whose values make no sense is refused in
one line. The bits that are flipped here are flipped by hand."""

import json

import pytest
from synthetic import Bytes, some_texts

from core.errors import UserError
from text.manifest import write_index
from text.shards import Shards, pack, verify


def packed(folder):
    pack(some_texts(60), Bytes(), folder, heldout=0.2, shard_tokens=3000)
    return folder


def refused(folder, match):
    """By opening it and by verify."""
    for read in (Shards, verify):
        with pytest.raises(UserError, match=match):
            read(folder)


def test_manifests_that_are_none(tmp_path):
    folder = packed(tmp_path / "s")
    path = folder / "manifest.json"
    whole = json.loads(path.read_text())
    shard = {**whole["splits"]["train"]["shards"][0]}
    for text in ("", "{", "[]", "null", '"x"', "\xff", "{}", json.dumps(whole)):
        path.write_bytes(text.encode("latin-1"))
        refused(folder, r"manifest\.json is damaged or of another version")
    # What follows has a right hash: somebody wrote it so.
    tokenizer, splits = whole["tokenizer"], whole["splits"]

    def with_shard(**changes):
        train = splits["train"] | {"shards": [shard | changes, *splits["train"]["shards"][1:]]}
        return whole | {"splits": splits | {"train": train}}
    broken = [{**whole, "version": 9}, {**whole, "format": "other"}, {**whole, "splits": {"train": {"shards": []}}},
              {**whole, "splits": 3}, {**whole, "dtype": "float64"}, {**whole, "bos": 1}, {**whole, "tokenizer": []},
              {k: v for k, v in whole.items() if k != "dtype"}, {k: v for k, v in whole.items() if k != "tokenizer"},
              {**whole, "tokenizer": tokenizer | {"fingerprint": "0f"}},
              {**whole, "tokenizer": tokenizer | {"fingerprint": "x" * 64}},
              {**whole, "tokenizer": tokenizer | {"vocab_size": 1e3}},
              {**whole, "tokenizer": tokenizer | {"bos_id": -5}},
              {**whole, "splits": splits | {"heldout": {"shards": []}}},
              *(with_shard(**{key: value}) for key, value in (
                  ("tokens", -1), ("tokens", 2**31), ("tokens", "5"), ("documents", None), ("max_id", 10**12),
                  ("sha256", ""), ("idx_sha256", "z" * 64), ("bytes_sha256", 5), ("name", ["x"]))),
              *({**whole, "splits": splits | {"train": splits["train"] | {"shards": shards}}}
                for shards in (5, None, [5], [{}], {"name": "x"}))]
    for index in broken:
        write_index(path, index)
        refused(folder, r"manifest\.json is damaged or of another version")
    for name in ("../s/train_000000", "/etc/passwd", "part/../../s", "a//b"):
        write_index(path, with_shard(name=name))
        refused(folder, "points outside its folder")
    path.unlink()
    refused(folder, "holds no manifest.json")
    refused(tmp_path / "nowhere", "holds no manifest.json")


def test_a_flipped_bit_in_a_manifest_is_found(tmp_path):
    folder = packed(tmp_path / "s")
    path = folder / "manifest.json"
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 13):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"manifest\.json"):
            verify(folder)
    path.write_bytes(data)
    verify(folder)


def test_a_flipped_bit_in_the_version_does_not_undo_the_hash(tmp_path):
    path = packed(tmp_path / "s") / "manifest.json"
    text = path.read_text()
    for version in range(256):
        path.write_text(text.replace('"version": 3', f'"version": {version}'))
        if version != 3:
            refused(tmp_path / "s", "is damaged or of another version")


def test_a_manifest_of_the_first_version_which_has_no_hash_is_read(tmp_path):
    folder = packed(tmp_path / "s")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 1}))
    assert verify(folder)
