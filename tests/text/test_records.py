"""Truth: the same two documents in every kind of file."""

import gzip
import json

import pytest
from documents import NOTE, STATUTE

from core.cli import Reading
from text.records import list_files, read_input


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst", "parquet", "txt", "folder"])
def test_every_kind_of_input_reads_the_same(tmp_path, kind):
    texts, path = [STATUTE, NOTE], tmp_path / f"in.{kind}"
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
    rows = [row for file in list_files([str(path)]) for row in read_input(file, reading)]
    assert [row["text"] for row in rows] == texts
    assert len({row["id"] for row in rows}) == 2
    if kind not in ("txt", "folder"):
        assert [row["n"] for row in rows] == [0, 1]
        assert "body" not in rows[0]
