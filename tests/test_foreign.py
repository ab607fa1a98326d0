"""Truth: files that datatrove itself writes (its own format and Megatron's), and files made by hand with struct as
llm.c's and nanoGPT's scripts describe them."""

import struct

import numpy as np
import pytest
from synthetic import Bytes, run, some_texts

from corpus import utf8
from foreign import read_token_documents
from shards import Shards, pack

TEXTS = ["habeas corpus", "é", *some_texts(30), "a\0b", "last"]


def ids_of(text) -> list[int]:
    return list(utf8(text))


class Decoding(Bytes):
    def decode(self, ids):
        return bytes(int(i) for i in ids).decode()


def datatrove_file(path, tokenizer_end):
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile
    file = TokenizedFile(str(path.parent), path.name, save_final_metadata=True, tokenizer_name_or_path="bytes",
                         token_size=2)
    for text in TEXTS:
        file.write([*ids_of(text), tokenizer_end], None)
    file.close()


def megatron_file(path, tokenizer_end):
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
    file = MegatronTokenizedFile(str(path.parent), path.stem, token_size=2)
    for text in TEXTS:
        file.write([*ids_of(text), tokenizer_end])
    file.close()


def llmc_file(path, tokenizer_end):
    ids = [i for text in TEXTS for i in (tokenizer_end, *ids_of(text))]          # the mark stands before a document
    path.write_bytes(struct.pack("<3i", 20240520, 1, len(ids)).ljust(1024, b"\0") + struct.pack(f"<{len(ids)}H", *ids))


def nanogpt_file(path, tokenizer_end):
    ids = [i for text in TEXTS for i in (*ids_of(text), tokenizer_end)]
    path.write_bytes(struct.pack(f"<{len(ids)}H", *ids))


WRITERS = {"a.ds": datatrove_file, "b.bin": megatron_file, "c.bin": llmc_file, "d.bin": nanogpt_file}


@pytest.fixture(params=WRITERS)
def file(request, tmp_path):
    if request.param in ("a.ds", "b.bin"):
        pytest.importorskip("datatrove", reason="the truth is a file that datatrove writes")
    WRITERS[request.param](tmp_path / request.param, Bytes.eos_id)
    return tmp_path / request.param


def test_documents_come_back(file):
    documents = list(read_token_documents(str(file), Bytes()))
    assert [d.tolist() for d in documents if len(d)] == [ids_of(text) for text in TEXTS]
    assert {d.dtype for d in documents} == {np.dtype("uint32")}


def test_a_document_longer_than_a_chunk(file, monkeypatch):
    monkeypatch.setattr("foreign.CHUNK", 3)
    test_documents_come_back(file)


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
