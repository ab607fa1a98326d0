"""Truth: files that datatrove itself writes (its own format and Megatron's), and files made by hand with struct as
llm.c's and nanoGPT's scripts describe them. Laws of a mixed file: none twice before all are once; the same seed gives
the same bytes; what fails leaves what was there."""

import json
import struct

import numpy as np
import pytest
from synthetic import Bytes, run, some_texts

from text.corpus import utf8
from text.foreign import _draw, mix_files, read_token_documents
from text.shards import Shards, pack

TEXTS = ["habeas corpus", "é", *some_texts(30), "a\0b", "last"]


def ids_of(text) -> list[int]:
    return list(utf8(text))


class Decoding(Bytes):
    def decode(self, ids):
        return bytes(int(i) for i in ids).decode()


def datatrove_file(path, size, mark):
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile
    file = TokenizedFile(str(path.parent), path.name, save_final_metadata=True, tokenizer_name_or_path="bytes",
                         token_size=size)
    for text in TEXTS:
        file.write([*ids_of(text), mark], None)
    file.close()


def megatron_file(path, size, mark):
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
    file = MegatronTokenizedFile(str(path.parent), path.stem, token_size=size)
    for text in TEXTS:
        file.write([*ids_of(text), mark])
    file.close()


def llmc_file(path, size, mark):
    ids = [i for text in TEXTS for i in (mark, *ids_of(text))]               # the mark stands before a document
    head = struct.pack("<3i", *((20240520, 1) if size == 2 else (20240801, 7)), len(ids)).ljust(1024, b"\0")
    path.write_bytes(head + raw(ids, size))


def nanogpt_file(path, size, mark):
    path.write_bytes(raw([i for text in TEXTS for i in (*ids_of(text), mark)], size))


def raw(ids, size) -> bytes:
    return struct.pack(f"<{len(ids)}{'H' if size == 2 else 'I'}", *ids)


WRITERS = {"a.ds": datatrove_file, "b.bin": megatron_file, "c.bin": llmc_file, "d.bin": nanogpt_file}


CASES = [(name, size) for name in WRITERS for size in (2, 4)]
SILENT = [("a.ds", 4), ("d.bin", 4)]               # files that do not say that their tokens are wide


def written(folder, name, size):
    if name in ("a.ds", "b.bin"):
        pytest.importorskip("datatrove", reason="the truth is a file that datatrove writes")
    WRITERS[name](folder / name, size, Bytes.eos_id)
    return folder / name


@pytest.fixture(params=CASES, ids=lambda p: f"{p[0]}-{p[1]}")
def case(request, tmp_path):
    """(file, bytes a token, what --dtype has to be where the file does not say it)"""
    return written(tmp_path, *request.param), request.param[1], "uint32" if request.param in SILENT else None


@pytest.fixture(params=[c for c in CASES if c not in SILENT], ids=lambda p: f"{p[0]}-{p[1]}")
def file(request, tmp_path):
    return written(tmp_path, *request.param)


def test_documents_come_back(case):
    file, _, dtype = case
    documents = list(read_token_documents(str(file), Bytes(), dtype))
    assert [d.tolist() for d in documents] == [ids_of(text) for text in TEXTS]
    assert {d.dtype for d in documents} == {np.dtype("uint32")}


def test_a_wide_vocabulary_means_wide_tokens(tmp_path):
    nanogpt_file(tmp_path / "d.bin", 4, 69_000)
    wide = Bytes(vocab_size=70_000, eos_id=69_000)
    assert [d.tolist() for d in read_token_documents(str(tmp_path / "d.bin"), wide)] == list(map(ids_of, TEXTS))
    nanogpt_file(tmp_path / "e.bin", 2, 257)
    narrow = read_token_documents(str(tmp_path / "e.bin"), Bytes(vocab_size=70_000), "uint16")
    assert [d.tolist() for d in narrow] == list(map(ids_of, TEXTS))


def test_wide_tokens_are_not_read_as_narrow_ones(tmp_path, tiny_bpe, monkeypatch, capsys):
    nanogpt_file(tmp_path / "d.bin", 4, 257)
    command = ("pack", "--tokenizer", tiny_bpe, "--out", tmp_path / "s", tmp_path / "d.bin")
    assert run(monkeypatch, *command) == 2
    assert "looks like uint32 tokens" in capsys.readouterr().err
    assert run(monkeypatch, *command, "--dtype", "uint32") == 0


@pytest.mark.parametrize("marks", [(256, 257), (257, 257), (None, 257), (256, None)])
def test_marks_at_the_ends_are_taken_off_and_empty_pieces_are_nobody(tmp_path, marks):
    bos, eos = marks
    ids = [i for text in TEXTS for i in ([bos] * (bos is not None) + ids_of(text) + [eos] * (eos is not None))]
    (tmp_path / "d.bin").write_bytes(raw(ids, 2))
    found = read_token_documents(str(tmp_path / "d.bin"), Bytes(bos_id=bos, eos_id=eos))
    assert [d.tolist() for d in found] == [ids_of(text) for text in TEXTS]


@pytest.mark.parametrize("worst", [259, -1])
def test_ids_outside_of_the_vocabulary(tmp_path, worst):
    (tmp_path / "a.bin").write_bytes(struct.pack("<3i", 1, worst, 258))
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 1, 2)
    (tmp_path / "a.idx").write_bytes(head + struct.pack("<i", 3) + struct.pack("<q", 0) + struct.pack("<2q", 0, 1))
    with pytest.raises(ValueError, match=f"holds token id {worst}, but the tokenizer ends at 258"):
        list(read_token_documents(str(tmp_path / "a.bin"), Bytes()))


def test_a_document_longer_than_a_chunk(case, monkeypatch):
    monkeypatch.setattr("text.foreign.CHUNK", 3)
    test_documents_come_back((case[0], case[1], "uint32" if case[1] == 4 else "uint16"))


def test_packing_them_is_packing_their_text(file, tmp_path):
    ours = pack(read_token_documents(str(file), Decoding()), Decoding(), tmp_path / "ids", heldout=0.2)
    theirs = pack(TEXTS, Decoding(), tmp_path / "text", heldout=0.2)
    assert ours["splits"] == theirs["splits"]
    assert Shards(tmp_path / "ids").documents + Shards(tmp_path / "ids", "heldout").documents == len(TEXTS)


def test_command_line(file, tmp_path, tiny_bpe, monkeypatch, capsys):
    command = ("pack", "--tokenizer", tiny_bpe, "--out", tmp_path / "s", file)
    assert run(monkeypatch, *command) == 0
    tokens = sum(Shards(tmp_path / "s", split).tokens for split in ("train", "heldout"))
    assert tokens >= sum(len(ids_of(text)) for text in TEXTS)                # 257 is an ordinary id to this tokenizer
    assert run(monkeypatch, *command, next((tmp_path / "s").glob("train*.bin")), "--overwrite") == 2
    assert "is a packed shard already" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:-1])
    assert run(monkeypatch, *command, "--overwrite") == 2
    error = capsys.readouterr().err
    assert file.name in error
    assert error.count("\n") == 1
    assert run(monkeypatch, *command, "--overwrite", "--buckets", 3, "--score", "quality") == 2
    assert "token files carry none" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "match"), [
    (lambda f: f.write_bytes(struct.pack("<3H", 1, 9999, 2)), "holds token id 9999, but the tokenizer"),
    (lambda f: f.with_name("a.ds.index").write_bytes(struct.pack("<2Q", 2, 99)), "do not rise to the 3 tokens"),
    (lambda f: f.with_name("a.ds.index").write_bytes(struct.pack("<3Q", 2, 1, 3)), "do not rise to the 3 tokens"),
    (lambda f: f.write_bytes(b""), "has 0 bytes"),
    (lambda f: f.unlink(), "does not exist")])
def test_files_that_are_wrong(tmp_path, change, match):
    file = tmp_path / "a.ds"
    file.write_bytes(struct.pack("<3H", 1, 2, 3))
    change(file)
    with pytest.raises(ValueError, match=match):
        list(read_token_documents(str(file), Bytes()))


def test_indexes_and_headers_that_are_wrong(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(struct.pack("<3H", 1, 2, 3))
    for index in (b"", b"MMIDIDX\0\0", b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2**40, 5),
                  b"MMIDIDX\0\0" + struct.pack("<QBQQ", 2, 8, 0, 0), struct.pack("<2Q", 1, 3)):
        (tmp_path / "a.idx").write_bytes(index)
        with pytest.raises(ValueError, match=r"a.idx is no index of a Megatron dataset"):
            list(read_token_documents(str(file), Bytes()))
    (tmp_path / "a.idx").unlink()
    file.write_bytes(struct.pack("<3i", 20240520, 1, 4).ljust(1024, b"\0") + struct.pack("<3H", 1, 2, 3))
    with pytest.raises(ValueError, match="says it has 4 tokens and has 3"):
        list(read_token_documents(str(file), Bytes()))


# ---- a mixed JSONL file

def test_mixed_files(tmp_path):
    law = [{"text": f"law {i}", "id": i, "metadata": {"x": [i]}} for i in range(10)]
    web = [{"text": f"web {i} \ud800\u2028", "source_type": "old"} for i in range(7)]
    out, seen = tmp_path / "new/mixed.jsonl", set()
    for seed in (0, 0, 1):
        done = mix_files(iter(law), iter(web), out, overwrite=True, ratio=0.6, total=45, seed=seed)
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
    assert mix_files(law, web, out, overwrite=True)["total"] == 14  # each of the domain once
    assert sorted(p.name for p in out.parent.iterdir()) == ["mixed.jsonl"]


def test_an_epoch_of_a_mix_has_each_record_once_in_a_new_order(tmp_path):
    law = [{"text": str(i)} for i in range(50)]
    places = _draw("domain", 200, np.arange(50), seed=3).reshape(4, 50)
    assert all(sorted(row) == list(range(50)) for row in places.tolist())
    assert len({tuple(row) for row in places.tolist()}) == 4
    done = mix_files(law, [], tmp_path / "m.jsonl", overwrite=True, ratio=1.0, total=250)
    assert ["read 5.0 times" in line for line in done["warnings"]] == [True]
    before = (tmp_path / "m.jsonl").read_bytes()
    for wrong, match in (({"total": 801}, "16.0 times, above its max_epochs of 16: .* --max-epochs 17"),
                         ({"ratio": 0.0}, "gives the length"),
                         ({"ratio": 0.5, "total": 9}, "the general files hold no records, but 5")):
        with pytest.raises(ValueError, match=match):
            mix_files(law, [], tmp_path / "m.jsonl", overwrite=True, **{"ratio": 1.0, **wrong})
    with pytest.raises(ValueError, match="the domain files hold no records"):
        mix_files([], law, tmp_path / "m.jsonl", overwrite=True)
    mix_files(law, [], tmp_path / "n.jsonl", overwrite=True, ratio=1.0, total=801, max_epochs=20)
    assert (tmp_path / "m.jsonl").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.jsonl", "n.jsonl"]
