"""Truth: the same 60 documents written in many forms by the standard library and by zstd's published frame format, and
files of other formats made by hand. Law: a file is the same documents for every command, or is refused by name."""

import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

import clean
import data
import dedup
import forget
import tokenizer
from core.cli import Reading
from core.errors import UserError
from eval import main as eval_main
from text.corpus import read_documents, read_records
from text.kinds import identify, list_files

TEXTS = [f"Section {i}. The tenant shall pay a rent of {i * 10} dollars on day {i % 28 + 1}.\nNotice {i * 7} goes to "
         f"the owner of lot {i}." for i in range(60)]
LINES = "".join(json.dumps({"text": text, "id": str(i)}) + "\n" for i, text in enumerate(TEXTS))


def zstd(raw: bytes, window_log: int = 20) -> bytes:
    """One frame of raw blocks, as RFC 8878 writes it."""
    blocks = [raw[i:i + 100_000] for i in range(0, len(raw), 100_000)]
    heads = [((len(block) << 3) | (i == len(blocks) - 1)).to_bytes(3, "little") for i, block in enumerate(blocks)]
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3]) + b"".join(map(bytes.__add__, heads, blocks))


FORMS = {
    "plain.jsonl": LINES.encode(), "UPPER.JSONL": LINES.encode(), "scrapy.jl": LINES.encode(),
    "without_suffix": LINES.encode(), "corpus.txt": LINES.encode(), "c4-train.00000-of-01024": LINES.encode(),
    "c4-train.00000-of-01024.json.gz": gzip.compress(LINES.encode()), "lines.jsonl.gz": gzip.compress(LINES.encode()),
    "LINES.JSON.GZ": gzip.compress(LINES.encode()), "dolma.json": b"\xef\xbb\xbf" + LINES.encode(),
    "windows.ndjson": LINES.replace("\n", "\r\n").encode(), "not_named_so.jsonl": gzip.compress(LINES.encode()),
    "members.jsonl.gz": gzip.compress(LINES[:999].encode()) + gzip.compress(LINES[999:].encode()),
    "pile.jsonl.zst": zstd(LINES.encode()), "in_fact_zstd.gz": zstd(LINES.encode()),
    "wiki.json.bz2": bz2.compress(LINES.encode()), "lines.xz": lzma.compress(LINES.encode()),
    "plain.md": "\n\n".join(TEXTS).encode(), "blocks.txt.gz": gzip.compress("\n\n".join(TEXTS).encode()),
    "no_suffix": "\n\n".join(TEXTS).encode(),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_same_documents(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name])
    assert list(read_documents([str(tmp_path / name)])) == TEXTS


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return buffer.getvalue()


REFUSED = {
    "table.csv": (b"id,text\n1,hello\n", "CSV"), "table.csv.gz": (gzip.compress(b"id,text\n1,hello\n"), "CSV"),
    "T.TSV": (b"id\ttext\n", "TSV"), "page.html.gz": (gzip.compress(b"<p>x"), "HTML"),
    "index": (b"\n<!DOCTYPE html><p>x", "HTML"), "a.tar.gz": (gzip.compress(tar()), "a tar archive"),
    "a.tgz": (gzip.compress(tar()), "a tar archive"), "a.png": (b"\x89PNG\r\n\x1a\nxx", "PNG"),
    "picture": (b"\x89PNG\r\n\x1a\nxx", "PNG"), "paper.txt": (b"%PDF-1.7 x", "a PDF"), "a.docx": (b"PK\3\4x", "Office"),
    "a.xyz": (b"hello\n", r"no plain text by its name \(\.xyz\)"), "weights": (bytes(range(32)) * 9, "binary data"),
    "list.json": (b'[{"text": "a"},\n {"text": "b"}]', "a list in JSON"),
    "pretty.json": (b'{\n "text": "a"\n}', "JSON"),
    "a.parquet.gz": (gzip.compress(b"PAR1xxxx"), "compressed once more"), "ids.bin": (b"\1\0\2\0", "token ids"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_by_name_with_the_known_kinds(tmp_path, name):
    raw, what = REFUSED[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=rf"{name}.* {what}") as error:
        list(read_documents([str(tmp_path / name)]))
    assert "no plain text" in str(error.value) or name == "a.parquet.gz"


def test_what_cannot_be_read_says_what_was_found_and_what_to_do(tmp_path):
    wrong = {"wide.jsonl": ("\ufeff" + LINES).encode("utf-16-le"), "big.txt": "law\n".encode("utf-16"),
             "mark.txt": "law, law\n".encode("utf-16-be"), "late.txt": b"law\n\nlaw\nM\xfcll\n", "long.jsonl.zst":
             zstd(LINES.encode(), 28), "fake.txt.gz": b"plain text", "lfs.jsonl": b"version https://git-lfs.github.com\n"}
    said = {"wide.jsonl": "UTF-16.*iconv", "big.txt": "UTF-16.*row 1", "mark.txt": "UTF-16.*iconv",
            "late.txt": "line 4 cannot be read as text in utf-8.*iconv", "long.jsonl.zst": r"zstd -d --long=31",
            "fake.txt.gz": "named .gz, .*not compressed", "lfs.jsonl": "git lfs pull"}
    for name, raw in wrong.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(UserError, match=f"{name}.*{said[name]}"):
            list(read_documents([str(tmp_path / name)]))
    (tmp_path / "fits.zst").write_bytes(zstd(LINES.encode(), 27))
    assert list(read_documents([str(tmp_path / "fits.zst")])) == TEXTS


def write_tables(folder: Path):
    texts = [text if i != 40 else None for i, text in enumerate(TEXTS)]
    rows = [{"text": text, "id": i} for i, text in enumerate(texts)]
    (folder / "null.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.table({"text": texts, "id": range(60)}), folder / "null.parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([t.encode() for t in TEXTS])}), folder / "bytes.parquet")
    parquet.write_table(pyarrow.table({"content": [{"text": text, "n": 1} for text in TEXTS], "id": range(60)}),
                        folder / "nested.parquet")
    (folder / "nested.jsonl").write_text("".join(json.dumps({"content": {"text": text, "n": 1}}) + "\n"
                                                 for text in TEXTS))


def test_null_bytes_numbers_and_nested_columns(tmp_path):
    write_tables(tmp_path)
    for name in ("null.jsonl", "null.parquet"):
        texts = read_documents([str(tmp_path / name)])
        assert list(texts) == [*TEXTS[:40], "", *TEXTS[41:]]
        assert (texts.documents, texts.empty) == (60, 1)
    with pytest.raises(UserError, match=r"bytes\.parquet row 1 has no text under 'text' but bytes; .*decode"):
        list(read_documents([str(tmp_path / "bytes.parquet")]))
    with pytest.raises(UserError, match=r"null\.parquet row 1 has no text under 'id' but a number; .*--column"):
        list(read_documents([str(tmp_path / "null.parquet")], Reading(column="id")))
    for name, place in (("nested.parquet", "row 1"), ("nested.jsonl", "line 1")):
        assert list(read_documents([str(tmp_path / name)], Reading(column="content.text"))) == TEXTS
        for column in ("text", "content"):
            with pytest.raises(UserError, match=rf"{place} has no text under '{column}'.*--column content\.text"):
                list(read_documents([str(tmp_path / name)], Reading(column=column)))
        # What is taken out stands once in what a command writes, and can be read again under its name.
        _, record = next(read_records([str(tmp_path / name)], Reading(column="content.text")))
        assert {key: record[key] for key in ("content", "content.text")} == {
            "content": {"n": 1}, "content.text": TEXTS[0]}


def test_folders_patterns_and_lists(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for name in ("b.jsonl", "data/a.json.gz", ".hidden.txt", "README.md", "LICENSE", "picture.png", "table.csv.gz"):
        raw = b"id,text\n1,a\n" if "table" in name else b"\x89PNG\r\n\x1a\n" if "png" in name else LINES.encode()
        (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    wanted = [str(folder / "b.jsonl"), str(folder / "data/a.json.gz")]
    assert list_files([str(folder)]) == list_files([f"{folder}/**/*.json*"]) == wanted
    assert "4 files left out, of other kinds or about the folder: LICENSE, README.md, picture.png, ..." \
        in capsys.readouterr().err
    names = tmp_path / "names.txt"
    names.write_text(f"# two files\n{wanted[1]}\n\nset/b.jsonl\n")
    assert [Path(path).resolve() for path in list_files([f"@{names}"])] == [Path(path) for path in wanted[::-1]]
    monkeypatch.chdir(tmp_path)
    assert list_files(["@names.txt", "set/*.jsonl", "hf://org/set"]) == [
        wanted[1], "set/b.jsonl", "set/b.jsonl", "hf://org/set"]
    for wrong in ("set/*.parquet", "@nothing", "nowhere.txt"):
        with pytest.raises(UserError, match="does not exist"):
            list_files([wrong])
    # A damaged file is none of another kind, to be left out.
    for name, raw, match in (("cut.jsonl.gz", gzip.compress(LINES.encode())[:-30], "cut.jsonl.gz cannot be read"),
                             ("wide.txt", "law".encode("utf-16"), "UTF-16")):
        (folder / name).write_bytes(raw)
        with pytest.raises(UserError, match=match):
            list_files([str(folder)])
        (folder / name).unlink()
    # What clean.py and dedup.py leave: the kept documents are the corpus, and clean.py reads all that it scored.
    for report, also in (("drops.json", "dropped.jsonl.gz"), ("dedup.json", "removed.jsonl")):
        left = tmp_path / report.partition(".")[0]
        left.mkdir()
        for name in (report, "kept.jsonl", also):
            (left / name).write_text("{}\n")
        kept = str(left / "kept.jsonl")
        assert list_files([str(left)]) == [kept]
        assert list_files([str(left)], dropped=True) == ([kept, str(left / also)] if report == "drops.json" else [kept])
    assert identify(kept) == "lines"


@pytest.fixture
def command(monkeypatch, tmp_path):
    """command(main, word, ...) -> what the command writes with --json."""
    def run(main, *words):
        out = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words), "--json", str(out)])
        assert main() == 0, words
        return json.loads(out.read_text())
    return run


@pytest.mark.slow
def test_every_command_reads_folders_lists_and_nested_columns_and_counts_a_null(tmp_path, pair, command, capsys):
    """The commands that read text, on 60 documents of which one is null: in a folder, by a list, in a pattern."""
    model, result, *_ = pair
    raw = tmp_path / "raw"
    (raw / "data").mkdir(parents=True)
    rows = [{"content": {"text": text if i != 40 else None}, "id": str(i)} for i, text in enumerate(TEXTS)]
    (raw / "data/part.json.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    (raw / "README.md").write_text("about")
    (tmp_path / "list.txt").write_text(f"{raw}\n")
    column = ("--column", "content.text")
    for number, name in enumerate((raw, f"@{tmp_path}/list.txt", f"{raw}/data/*.gz")):
        out = tmp_path / str(number)
        packed = command(data.main, "pack", name, *column, "--tokenizer", model, "--out", out / "s", "--heldout", 0)
        assert (packed["splits"]["train"]["documents"], packed["empty_documents_dropped"]) == (59, 1)
        cleaned = command(clean.main, name, *column, "--preset", "legal", "--no-repair", "--out", out / "c",
                          "--general", name)
        assert sum(cleaned[key] for key in ("kept", "dropped")) == cleaned["documents"] == 60
        found = command(dedup.main, name, *column, "--out", out / "d", "--workers", 1, "--against", name)
        assert (found["documents"], found["empty"]) == (60, 1)
        trained = command(tokenizer.main, "train", name, *column, "--vocab-size", 300, "--out", out / "t")
        assert (trained["documents"], trained["empty_documents"]) == (60, 1)
        extended = command(tokenizer.main, "extend", name, *column, "--tokenizer", model, "--new-tokens", 5, "--out",
                           out / "e")
        assert (extended["documents"], extended["empty_documents"]) == (60, 1)
        report = command(tokenizer.main, "report", "--tokenizer", model, "--extended", out / "e", "--domain", name,
                         *column)
        assert report["texts"]["domain"]["documents"] == 60
        scored = command(eval_main, "--model", model, "--text", f"law={name}", *column)["texts"]["law"]
        assert scored["empty_documents"] == 1
        assert scored["bytes"] == sum(len(text.encode()) for i, text in enumerate(TEXTS) if i != 40)
        mixed = command(data.main, "mix", "--domain", name, "--general", name, *column, "--out", out / "m.jsonl")
        assert (mixed["domain"]["records"], mixed["domain"]["empty"]) == (60, 1)
        assert "README.md" in capsys.readouterr().err or number == 2
    merged = command(forget.main, "merge", "--base", model, "--model", result, "--domain", raw, "--general",
                     f"{raw}/data/*.gz", "--alphas", 0.5, *column, "--out", tmp_path / "merged")
    assert merged["alpha"] == 0.5
