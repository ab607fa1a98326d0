"""Truth: one pack of the same documents, byte for byte; plain sorting by score. Law: what fails leaves no folder."""

import json
import shutil

import pytest
from synthetic import Bytes, document, run, scored, some_texts

from text.mixture import SourceConfig, open_buckets
from text.shards import (
    SPLITS,
    Shards,
    pack,
    pack_buckets,
    packed_folders,
    part_folder,
    read_buckets,
    read_manifest,
    verify,
)

pytestmark = pytest.mark.usefixtures("fast_disk")


# ---- parts

def all_documents(folder) -> list[tuple]:
    return sorted((split, ids.tobytes(), nbytes) for split in SPLITS for shards in [Shards(folder, split)]
                  for ids, nbytes in (document(shards, i) for i in range(shards.documents)))


@pytest.mark.parametrize("files", [1, 5])
def test_parts_together_are_the_whole(tmp_path, tiny_bpe, files, monkeypatch, capsys):
    monkeypatch.setattr("text.shards.BLOCK", 7)
    texts = ["", *some_texts(100, 3), ""]
    paths = [tmp_path / f"{k}.jsonl" for k in range(files)]
    for k, path in enumerate(paths):
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[k::files]))
    command = ("pack", "--tokenizer", tiny_bpe, "--heldout", 0.2, "--shard-tokens", 900)
    assert run(monkeypatch, *command, "--out", tmp_path / "whole", *paths) == 0
    for k in (3, 1, 2):
        assert run(monkeypatch, "manifest", "--merge", tmp_path / "parts") == 2        # not yet
        assert run(monkeypatch, *command, "--out", tmp_path / "parts", "--part", f"{k}/3", *paths) == 0
    assert run(monkeypatch, "manifest", "--merge", tmp_path / "parts", "--json", tmp_path / "m.json") == 0
    merged, whole = read_manifest(tmp_path / "parts"), read_manifest(tmp_path / "whole")
    assert json.loads((tmp_path / "m.json").read_text()) == merged
    assert merged["inputs"] == whole["inputs"]
    assert merged["empty_documents_dropped"] == whole["empty_documents_dropped"] == 2
    assert all_documents(tmp_path / "parts") == all_documents(tmp_path / "whole")
    for key in ("tokens", "documents", "bytes"):
        assert [merged["splits"][s][key] for s in SPLITS] == [whole["splits"][s][key] for s in SPLITS]
    parts = [read_manifest(part_folder(tmp_path / "parts", k, 3))["splits"] for k in (1, 2, 3)]
    assert min(sum(part[s]["documents"] for s in SPLITS) for part in parts) >= 20
    verify(tmp_path / "parts")
    before = (tmp_path / "parts" / "manifest.json").read_bytes()
    assert run(monkeypatch, "manifest", "--merge", tmp_path / "parts") == 0
    assert (tmp_path / "parts" / "manifest.json").read_bytes() == before
    capsys.readouterr()

    damaged = next((tmp_path / "parts" / "part_0002_of_0003").glob("train_*.bin"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert run(monkeypatch, "verify", tmp_path / "parts") == 2
    assert "part_0002_of_0003/train_" in capsys.readouterr().err


def test_a_part_may_be_empty(tmp_path, tiny_bpe, monkeypatch):
    (tmp_path / "a.txt").write_text("\n\n".join(t.strip() for t in some_texts(30)))
    for k in (1, 2):                                                    # 30 documents are all of the first block
        assert run(monkeypatch, "pack", "--tokenizer", tiny_bpe, "--out", tmp_path / "p", "--part", f"{k}/2",
                   tmp_path / "a.txt") == 0
    assert run(monkeypatch, "manifest", "--merge", tmp_path / "p") == 0
    merged = read_manifest(tmp_path / "p")
    assert [i["name"] for i in merged["inputs"]] == ["a.txt"]
    assert read_manifest(part_folder(tmp_path / "p", 2, 2))["splits"]["train"]["documents"] == 0
    assert Shards(tmp_path / "p").documents == merged["splits"]["train"]["documents"] > 20


def test_parts_that_do_not_fit(tmp_path, tiny_bpe, monkeypatch, capsys):
    def refused(match, *argv):
        assert run(monkeypatch, *argv) == 2
        error = capsys.readouterr().err
        assert match in error
        assert "Traceback" not in error

    pack(some_texts(50), Bytes(), part_folder(tmp_path / "p", 1, 2))
    for key, tokenizer, options in (
            ("heldout", Bytes(), {"heldout": 0.5}), ("bos", Bytes(), {"bos": True}),
            ("tokenizer", Bytes(fingerprint="1f" * 32), {}), ("tokenizer", Bytes(vocab_size=70_000), {}),
            ("inputs", Bytes(), {"inputs": [{"name": "b.txt", "bytes": 3}]})):
        pack(some_texts(50), tokenizer, part_folder(tmp_path / "p", 2, 2), **options)
        refused(f"has another {key} than part_0001_of_0002", "manifest", "--merge", tmp_path / "p")
        shutil.rmtree(part_folder(tmp_path / "p", 2, 2))
    (tmp_path / "p/part_x_of_y").mkdir()
    (tmp_path / "p/part_x_of_y/manifest.json").write_text("{}")
    refused("part_0002_of_0002 is missing; pack it with --part", "manifest", "--merge", tmp_path / "p")
    pack(some_texts(50), Bytes(), part_folder(tmp_path / "p", 2, 3))
    refused("does not hold the parts 1 to 2 alone", "manifest", "--merge", tmp_path / "p")
    refused("holds no packed parts", "manifest", "--merge", tmp_path / "nothing")
    pack_line = ("pack", "--tokenizer", tiny_bpe, "--out", tmp_path / "q", "x.txt")
    for part in ("0/3", "4/3", "1", "a/b"):
        refused("is no part; write K/N", *pack_line, "--part", part)
    pack([], Bytes(), part_folder(tmp_path / "e", 1, 1), allow_empty=True)
    refused("the parts of", "manifest", "--merge", tmp_path / "e")
    refused("do not go together", *pack_line, "--part", "1/2", "--buckets", 3, "--score", "quality")


# ---- score buckets

@pytest.mark.parametrize("first", ["low", "high"])
def test_buckets_are_the_documents_in_the_order_of_their_scores(tmp_path, first):
    records, out = scored(103), tmp_path / "s"
    index = pack_buckets(lambda: ((f"line {i}", r) for i, r in enumerate(records)), Bytes(), out, 4, "quality",
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
    assert read_buckets(out) == json.loads((out / "buckets.json").read_text()) == index
    assert sorted(p.name for p in out.iterdir()) == [*(f"bucket_0{k}" for k in range(4)), "buckets.json"]
    opened = open_buckets({"law": SourceConfig(path=str(out), weight=2.0), "wiki": SourceConfig(path="elsewhere")})
    assert list(opened) == ["law/0", "law/1", "law/2", "law/3", "wiki"]
    assert [(b.of, b.weight, b.low, b.high) for b in list(opened.values())[:4]] == [
        ("law", 2.0, k / 4, (k + 1) / 4) for k in range(4)]
    for b in list(opened.values())[:4]:
        assert b.tokens == Shards(b.path).tokens


def test_buckets_that_cannot_be(tmp_path, monkeypatch):
    def made(records, out=tmp_path / "s", buckets=3, **more):
        return pack_buckets(lambda: ((f"line {i}", r) for i, r in enumerate(records)), Bytes(), out, buckets,
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
    with pytest.raises(ValueError, match="bucket 0 of 3: nothing to train on"):
        made([{**r, "text": ""} for r in good])
    assert not any(tmp_path.iterdir())
    made(good)
    with pytest.raises(ValueError, match="exists already"):
        made(good)
    made(good, buckets=2, overwrite=True)
    assert len(read_buckets(tmp_path / "s")["buckets"]) == 2
    with pytest.raises(ValueError, match="holds score buckets; name one of them"):
        Shards(tmp_path / "s")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no packed source"):
        made(good, tmp_path / "other", overwrite=True)
    index = json.loads((tmp_path / "s/buckets.json").read_text())
    for name in ("../../x", "..", ""):
        index["buckets"][0]["name"] = name
        (tmp_path / "s/buckets.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="points outside"):
            packed_folders(tmp_path / "s")
    (tmp_path / "s/buckets.json").write_text("[]")
    with pytest.raises(ValueError, match="damaged"):
        open_buckets({"law": SourceConfig(path=str(tmp_path / "s"))})
