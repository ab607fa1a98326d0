"""Truth: the same records written by hand in each format."""

import gzip
import json
import random

import pytest

from core.cli import Reading
from text.corpus import read_cleaning, read_documents, read_input
from text.kinds import list_files


def test_text_files(tmp_path):
    path = tmp_path / "a.txt"

    def read(text, **options):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return list(read_documents([str(path)], Reading(**options)))
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
    assert list(read_documents([str(packed)])) == ["one\n  two", "three", "four"]


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
    assert list(read_documents([str(path)], Reading(column="body"))) == texts
    with pytest.raises(ValueError, match=rf"x\.{suffix} .*'text' \(it has: n, body\); .*--column"):
        list(read_documents([str(path)]))


def test_records_that_are_wrong_name_file_and_line(tmp_path):
    path = tmp_path / "x.jsonl"
    for line, match in (('{"text": 3}', "line 2 has no text"), ('{"a": "b"}', r"line 2 .*it has: a\)"),
                        ("[1]", "line 2 .*list"),
                        ('{"text": ["a"]}', "line 2 has no text under 'text' but a list"),
                        ("{", "line 2 is not JSON"), ("null", "line 2 .*null"),
                        ("garbage", "line 2 is not JSON")):
        path.write_text('{"text": "a"}\n' + line + "\n")
        with pytest.raises(ValueError, match=match) as error:
            list(read_documents([str(path)]))
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
            list(read_documents([str(tmp_path / name)]))
    with pytest.raises(ValueError, match=r"nowhere\.txt does not exist"):
        list(read_documents([str(tmp_path / "nowhere.txt")]))


def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    import datasets
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert list(read_documents([f"hf://{folder}"], Reading(column="body"))) == ["one", "two"]
    asked = {}

    def load_dataset(name, config, **options):
        asked.update(options, name=name, config=config)
        return iter([{"text": "a"}, {"other": "b"}])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = read_documents(["hf://org/set@v1"], Reading(config="en", split="test"))
    assert next(documents) == "a"
    assert asked == {"name": "org/set", "config": "en", "split": "test", "streaming": True, "revision": "v1"}
    with pytest.raises(ValueError, match="hf://org/set@v1 record 2 has no text under 'text'"):
        next(documents)


def test_a_hub_that_cannot_be_reached_is_named_and_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("no route to the Hub")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match="hf://org/name cannot be read from the Hub: no route"):
        list(read_documents(["hf://org/name"]))


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst", "parquet", "txt", "folder"])
def test_every_kind_of_input_reads_the_same(tmp_path, kind):
    texts, path = ["1. One law.\n(2) Another é", "The note."], tmp_path / f"in.{kind}"
    lines = "".join(json.dumps({"body": t, "n": i}) + "\n" for i, t in enumerate(texts))
    if kind == "txt":
        path.write_text("\n\n".join(texts))
    elif kind == "folder":
        path.mkdir()
        for i, text in enumerate(texts):
            (path / f"{i}.md").write_text(text)
        (path / ".hidden.md").write_text("x")
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"body": texts, "n": [0, 1]}), path)
    elif kind == "gz":
        path = tmp_path / "in.jsonl.gz"
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "zst":
        path = tmp_path / "in.jsonl.zst"
        pyarrow = pytest.importorskip("pyarrow")
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(lines.encode())
    else:
        path.write_text(lines)
    reading = Reading(documents="blank" if kind == "txt" else "file", column="body")
    rows = list(read_input(list_files([str(path)]), reading))
    assert [row["text"] for row in rows] == texts
    assert len({row["id"] for row in rows}) == 2
    if kind not in ("txt", "folder"):
        assert [row["n"] for row in rows] == [0, 1]
        assert "body" not in rows[0]


def test_what_was_cleaned_away_is_read_along_the_way(tmp_path):
    clean, dedup = tmp_path / "clean", tmp_path / "dedup"
    for folder, name, report in ((clean, "drops.json", {"documents": 9, "parts": 10, "kept": 8}),
                                 (dedup, "dedup.json", {"documents": 8, "kept": 7, "files": [f"{clean}/kept.jsonl"]})):
        folder.mkdir()
        (folder / name).write_text(json.dumps(report))
        (folder / "kept.jsonl").touch()
    steps = [{"by": "clean.py", "documents": 10, "kept": 8}, {"by": "dedup.py", "documents": 8, "kept": 7}]
    assert read_cleaning(dedup / "kept.jsonl") == steps
    assert read_cleaning(clean / "kept.jsonl") == steps[:1]
    # Another file of the folder is not what was kept.
    assert read_cleaning(clean / "dropped.jsonl.gz") == read_cleaning(tmp_path / "kept.jsonl") == []
