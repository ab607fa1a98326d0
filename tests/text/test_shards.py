"""Truth: a naive writer (synthetic.py), decode(encode(text)) of the tokenizers, struct, hashlib.
Laws: what was written comes back; a folder appears whole or not at all; a change of one bit is found.
"""

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
from types import SimpleNamespace

import numpy as np
import pytest
from synthetic import (
    Bytes,
    counts_of,
    document,
    loader_of,
    naive_write,
    run,
    scored,
    some_texts,
    source,
)

import tokenizer as tokenizers
from core import files
from core.cli import Reading
from text import shards
from text.corpus import read_documents
from text.manifest import write_index
from text.mixture import SourceConfig, open_buckets
from text.shards import (
    SPLITS,
    Shards,
    check_tokenizer,
    is_held_out,
    pack,
    pack_buckets,
    packed_folders,
    part_folder,
    read_buckets,
    read_manifest,
    verify,
)

pytestmark = pytest.mark.usefixtures("fast_disk")
ROOT = Path(__file__).parents[2]


# ---- boundaries

@pytest.mark.parametrize("shard_tokens", [10**8, 12, 1])
def test_read_against_a_loop(tmp_path, shard_tokens):
    lengths = [1, 4, 5, 12, 1, 1, 3, 2]                              # 1, T, T + 1, 3T for T = 4
    total, begins = sum(lengths), {0, *itertools.accumulate(lengths[:-1])}
    ids = [7] * total                                                # every token is "EOS": the text tells nothing
    for number, values in enumerate((None, ids)):
        shards = source(tmp_path / str(number), lengths, shard_tokens, values)
        values = values or list(range(total))
        for start in range(2 * total):
            for n in (1, 4, 5, 9, total, total + 3):
                tokens, found = shards.read(start, n)
                places = [(start + i) % total for i in range(n)]
                assert tokens.tolist() == [values[p] for p in places]
                assert found.tolist() == [i for i, p in enumerate(places) if p in begins]
                assert (tokens.dtype, found.dtype) == (np.uint32, np.int64)


def test_bos_equal_to_eos_and_specials_in_the_text(tmp_path):
    texts = ["a\x07b", "\x07", "c\x07\x07"]                          # byte 7 is BOS and EOS here
    pack(texts, Bytes(bos_id=7, eos_id=7), tmp_path / "s", heldout=0.0, bos=True)
    shards = Shards(tmp_path / "s")
    assert [document(shards, i)[0].tolist() for i in range(3)] == [
        [7, 97, 7, 98, 7], [7, 7, 7], [7, 99, 7, 7, 7]]
    assert [shards.text_document(i)[0].tolist() for i in range(3)] == [[97, 7, 98], [7], [99, 7, 7]]
    assert [shards.text_document(i)[1] for i in range(3)] == [3, 1, 3]
    assert shards.read(0, 13)[1].tolist() == [0, 5, 8]


# ---- faults

def packed(tmp_path, **options) -> Path:
    pack(some_texts(60), Bytes(), tmp_path / "s", **{"heldout": 0.2, "shard_tokens": 900, **options})
    return tmp_path / "s"


def refused(folder, match):
    """By opening it and by verify."""
    with pytest.raises(ValueError, match=match):
        Shards(folder), Shards(folder, "heldout")
    with pytest.raises(ValueError, match=match):
        verify(folder)


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
    assert verify(folder) == sum(p.stat().st_size for p in folder.iterdir() if p.suffix != ".json") - sum(
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
                verify(folder)
        path.write_bytes(whole)
    verify(folder)


def test_verify_within_a_budget_reads_less_and_at_least_one_shard(tmp_path):
    folder = packed(tmp_path)
    assert 0 < verify(folder, budget_bytes=1) < verify(folder, budget_bytes=5000) < verify(folder)


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
            verify(tmp_path / "s")


def test_the_model_must_fit_the_shards(tmp_path):
    shards = Shards(packed(tmp_path))
    check_tokenizer("law", shards, Bytes(), 258)                # the largest id is EOS, 257
    check_tokenizer("law", shards, None, 5000)
    with pytest.raises(ValueError, match=r"source law .* holds token id 257, but the model's vocabulary has 257"):
        check_tokenizer("law", shards, Bytes(), 257)
    with pytest.raises(ValueError, match=r"another tokenizer \(bytes 1, 259 entries\) than the model's \(other 2"):
        check_tokenizer("law", shards, Bytes(fingerprint="1e" * 32, library="other 2"), 5000)


def test_held_out_ids_must_fit_the_model_too():
    splits = {split: {"shards": [{"name": split, "max_id": largest}]}
              for split, largest in (("train", 5), ("heldout", 9))}
    shards = SimpleNamespace(folder="law", manifest={"tokenizer": {}, "splits": splits},
                             records=splits["train"]["shards"])
    check_tokenizer("law", shards, None, 10)
    with pytest.raises(ValueError, match="holds token id 9, but the model's vocabulary has 9 entries"):
        check_tokenizer("law", shards, None, 9)


def test_the_held_out_share_is_as_large_as_it_says():
    """A text whose hash is k of 10,000 is held out by every share above k / 10,000 and by no other."""
    for text in (b"", b"lien", "漢字".encode()):
        k = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") % 10_000
        assert not is_held_out(text, k / 10_000)
        assert is_held_out(text, (k + 1) / 10_000)


@pytest.mark.parametrize(("vocab_size", "dtype", "magic"), [(65536, "uint16", (20240520, 1)),
                                                            (65537, "uint32", (20240801, 7))])
def test_the_width_of_a_token(tmp_path, vocab_size, dtype, magic):
    pack(["a"], Bytes(vocab_size=vocab_size, eos_id=vocab_size - 1), tmp_path / "s", heldout=0.0)
    shards, raw = Shards(tmp_path / "s"), (tmp_path / "s" / "train_000000.bin").read_bytes()
    assert shards.manifest["dtype"] == dtype
    assert document(shards, 0)[0].tolist() == [97, vocab_size - 1]
    assert np.frombuffer(raw, "<i4", 3).tolist() == [*magic, 2]      # as llm.c reads it
    assert len(raw) == 1024 + 2 * np.dtype(dtype).itemsize
    batch = loader_of({"s": shards}, counts_of([1]), 4, seed=0).batch(0)
    assert batch.tokens.max() == vocab_size - 1


def test_text_that_no_file_should_have(tmp_path, tiny_bpe):
    tokenizer = tokenizers.load(tiny_bpe)
    texts = ["lone \ud800 surrogate", "\udfff", "pair \ud83d\ude42", "nul \0 nul", "\0", "a long line " * 50_000,
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
    assert verify(tmp_path / "s") > 0


def test_nothing_to_train_on_leaves_nothing(tmp_path):
    for texts, match in (([], "0 empty documents, 0 held out"), (["", ""], "2 empty documents")):
        with pytest.raises(ValueError, match=f"nothing to train on: .*{match}"):
            pack(texts, Bytes(), tmp_path / "s", heldout=0.0)
    with pytest.raises(ValueError, match="1 held out"):
        pack(["a"], Bytes(), tmp_path / "s", heldout=0.9999)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "match"), [
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
    assert verify(folder)
    pack(["new"], Bytes(), folder, heldout=0.0, overwrite=True)
    assert Shards(folder).documents == 1
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1").write_text("years of work")
    with pytest.raises(ValueError, match="holds 'chapter1', which is no part of a packed source"):
        pack(["new"], Bytes(), other, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        pack(["new"], Bytes(), other / "chapter1", overwrite=True)
    assert (other / "chapter1").read_text() == "years of work"
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
            for split in SPLITS:
                with pytest.raises(ValueError, match="holds no manifest"):
                    Shards(tmp_path / "s", split)
    assert deaths >= 6
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert verify(tmp_path / "s")


def test_kill_at_any_byte_leaves_what_the_same_command_completes(tmp_path):
    """The child dies in the middle of a write, after a number of bytes on the disk."""
    def build(folder):
        return pack(some_texts(50), Bytes(), folder / "s", heldout=0.2, shard_tokens=500, batch_bytes=300)

    def child(folder, left):
        signal.alarm(60)

        class Dying:
            def __init__(self, *args, **options):
                self.file = open(*args, **options)               # noqa: SIM115  (closed by who opened it)

            def write(self, payload):
                nonlocal left
                size = len(payload) if isinstance(payload, (bytes, str)) else payload.nbytes
                if size >= left:
                    self.file.write(payload[:left] if isinstance(payload, (bytes, str)) else payload.tobytes()[:left])
                    self.file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= size
                return self.file.write(payload)

            def __getattr__(self, name):
                return getattr(self.file, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

        shards.open = files.open = Dying
        build(folder)
        os._exit(0)

    (tmp_path / "whole").mkdir()
    build(tmp_path / "whole")
    wanted = content(tmp_path / "whole" / "s")
    size = sum(map(len, wanted.values()))
    for number, left in enumerate([1, 1024, 1025, size - 1, *random.Random(0).sample(range(1, size), 8)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        pid = os.fork()
        if not pid:
            child(folder, left)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, left
        assert not (folder / "s").exists()
        build(folder)
        assert content(folder / "s") == wanted
        assert [p.name for p in folder.iterdir()] == ["s"]


def test_a_full_disk(tmp_path, tiny_bpe):
    """Files cannot grow past a limit: the same error path as a full disk, in the middle of the second shard."""
    (tmp_path / "in.txt").write_text("\n".join(t.replace("\n", " ") for t in some_texts(1200)), encoding="utf-8")
    script = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
              "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    # Without coverage, which would write a file of its own.
    bare = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    run = subprocess.run([sys.executable, "-c", script, str(ROOT / "data.py"), "pack", "--tokenizer", str(tiny_bpe),
                          "--documents", "line", "--out", str(tmp_path / "s"), str(tmp_path / "in.txt")],
                         capture_output=True, text=True, cwd=ROOT, env=bare | {"PYTHONDONTWRITEBYTECODE": "1"})
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert run.stderr.startswith("error: ")
    assert "too large" in run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["in.txt"]


# ---- the writer

def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_workers_and_batches_change_nothing(tmp_path):
    texts, wanted = some_texts(150), None
    for workers, batch_bytes in itertools.product((1, 2, 7), (1, 400, 1 << 21)):
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
        draw = int.from_bytes(hashlib.blake2b(raw.strip(b"\n"), digest_size=8).digest(), "little") % 10000
        sides["heldout" if draw < 10000 * heldout else "train"].append(([256] * bos + [*raw, 257], len(raw)))
    for split, documents in sides.items():
        wanted = naive_write(tmp_path / split, documents, tokenizer, shard_tokens, split)
        assert manifest["splits"][split] == wanted["splits"][split]
        files = {name: value for name, value in content(tmp_path / split).items() if name != "manifest.json"}
        assert files == {name: v for name, v in content(tmp_path / "s").items() if name.startswith(split)}
        shards = Shards(tmp_path / "s", split)
        assert shards.documents == len(documents)
        for i, (ids, nbytes) in enumerate(documents):
            assert document(shards, i)[0].tolist() == ids
            assert document(shards, i)[1] == nbytes
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
        found = read_documents([str(data_dir / "corpora" / file)], Reading(separator=separator))
        texts += list(itertools.islice(found, 100))
    manifest = pack(texts, tokenizer, tmp_path / "s", heldout=0.0, shard_tokens=20_000)
    shards, kept = Shards(tmp_path / "s"), [text for text in texts if text]
    assert shards.documents == len(kept) > 300
    assert len(shards.records) > 1
    for i, text in enumerate(kept):
        ids, nbytes = shards.text_document(i)
        assert tokenizer.decode(ids) == text
        assert nbytes == len(text.encode())
        whole = document(shards, i)[0].tolist()
        assert whole == tokenizer.encode(text, bos=tokenizer.add_bos, eos=True)
    assert manifest["splits"]["train"]["tokens"] == shards.tokens
    assert verify(tmp_path / "s")


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


def test_what_is_in_no_token_is_that_of_all_parts(tmp_path, tiny_bpe, monkeypatch):
    """Each part counts by its bytes, and measures its own files."""
    monkeypatch.setattr("data.measure_loss", lambda _, texts: sum("x" in text for text in texts) / len(texts))
    for name, text in (("a", "x" * 30), ("b", "y" * 10)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join([text] * 20))
    for k, share in ((1, 1.0), (2, 0.0)):
        assert run(monkeypatch, "pack", "--tokenizer", tiny_bpe, "--out", tmp_path / "p", "--part", f"{k}/2",
                   tmp_path / "a.txt", tmp_path / "b.txt") == 0
        assert read_manifest(part_folder(tmp_path / "p", k, 2))["lost_share"] == share
    assert run(monkeypatch, "manifest", "--merge", tmp_path / "p") == 0
    assert read_manifest(tmp_path / "p")["lost_share"] == 0.75


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
    pack(some_texts(9), Bytes(), tmp_path / "whole")
    refused("whole, a packed source, which could then not be replaced", "pack", "--tokenizer", tiny_bpe, "--out",
            tmp_path / "whole/new/inner", "x.txt")


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
    with pytest.raises(ValueError, match="is no part of a packed source"):
        made(good, tmp_path / "other", overwrite=True)
    index = json.loads((tmp_path / "s/buckets.json").read_text())
    for name, value in (("low", "0"), ("high", None), ("tokens", 1.5), ("documents", True), ("new", 1)):
        write_index(tmp_path / "s/buckets.json", index | {"buckets": [index["buckets"][0] | {name: value}]})
        with pytest.raises(ValueError, match=rf"damaged .*buckets\.0\.{name} "):
            packed_folders(tmp_path / "s")
    for name in ("../../x", "..", ""):
        index["buckets"][0]["name"] = name
        write_index(tmp_path / "s/buckets.json", index)
        with pytest.raises(ValueError, match="points outside"):
            packed_folders(tmp_path / "s")
    (tmp_path / "s/buckets.json").write_text("[]")
    with pytest.raises(ValueError, match="damaged"):
        open_buckets({"law": SourceConfig(path=str(tmp_path / "s"))})
