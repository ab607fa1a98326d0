"""A sample of a corpus. Truth: corpora that we made, whose documents and bytes are counted."""

import gzip
import json

import pytest

from core.cli import Reading
from core.errors import UserError
from text import sample


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(file, its documents): 20,000 documents of 20 to 300 words that begin with their number."""
    file = tmp_path_factory.mktemp("sample") / "corpus.txt"
    documents = [f"{n:06d} " + "wörd " * (20 + n * 7919 % 280) + "end" for n in range(20_000)]
    file.write_text("\n\n".join(documents), encoding="utf-8")
    return file, documents


def test_a_small_corpus_is_read_whole(tmp_path):
    (tmp_path / "a.txt").write_text("ä one\n\ntwo\n\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": ""}\n')
    found = sample.draw_sample([str(tmp_path)], Reading(), 1000, 0)
    assert (found.texts, found.corpus_bytes, found.counted, found.empty) == (["ä one", "two", "three"], 14, True, 1)


def test_a_large_corpus_is_sampled_across_all_of_it(corpus):
    file, documents = corpus
    found = sample.draw_sample([str(file)], Reading(), 1 << 21, 0)
    assert not found.counted
    assert 1 << 20 < found.bytes < 1 << 22
    assert set(found.texts) <= set(documents)                       # whole documents, none cut
    numbers = [int(text[:6]) for text in found.texts]
    assert all(any(low <= n < low + 2000 for n in numbers) for low in range(0, 20_000, 2000))
    truth = sum(len(text.encode()) for text in documents)
    assert found.corpus_bytes == pytest.approx(truth, rel=0.01)
    again, other = (sample.draw_sample([str(file)], Reading(), 1 << 21, seed) for seed in (0, 1))
    assert again.texts == found.texts
    assert other.texts != found.texts


@pytest.mark.parametrize(("between", "packed"), [
    ("\r\n\r\n", False), ("\r\n\r\n", True), ("\n \t\n", False), ("\r\n\r\n\r\n", False)])
def test_documents_part_at_blank_lines_of_other_systems_too(corpus, tmp_path, between, packed):
    """As the reader parts them, so no piece begins or ends within a document."""
    documents = [text.replace("wörd " * 20, "wörd " * 20 + "\r\n" * ("\r" in between), 1) for text in corpus[1][:4000]]
    file = tmp_path / ("a.txt.gz" if packed else "a.txt")
    with (gzip.open(file, "wb", compresslevel=1) if packed else file.open("wb")) as out:
        out.write(between.join(documents).encode())
    found = sample.draw_sample([str(file)], Reading(), 1 << 20, 0)
    assert set(found.texts) <= set(documents)
    truth = sum(len(text.encode()) for text in documents)
    assert found.corpus_bytes == pytest.approx(truth, rel=0.05 if packed else 0.015)


def test_lines_of_json_and_compressed_files_are_sampled_too(corpus, tmp_path):
    documents = corpus[1]
    lines = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(documents))
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", compresslevel=1) as file:
        file.write(lines)
    truth = sum(len(text.encode()) for text in documents)
    for name in ("a.jsonl", "b.jsonl.gz"):
        found = sample.draw_sample([str(tmp_path / name)], Reading(), 1 << 19, 0)
        assert set(found.texts) <= set(documents)
        assert not found.counted
        assert found.corpus_bytes == pytest.approx(truth, rel=0.05), name
    (tmp_path / "c.jsonl").write_text(lines.replace('"text"', '"body"'))
    with pytest.raises(UserError, match=r"a sample of .*c.jsonl, line 1 has no text"):
        sample.draw_sample([str(tmp_path / "c.jsonl")], Reading(), 1 << 19, 0)


def test_parquet_is_sampled_by_its_rows(corpus, tmp_path):
    import pyarrow
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({"text": corpus[1]}), tmp_path / "a.parquet")
    found = sample.draw_sample([str(tmp_path / "a.parquet")], Reading(), 1 << 19, 0)
    assert found.corpus_bytes == pytest.approx(sum(len(text.encode()) for text in corpus[1]), rel=0.05)


def test_a_document_longer_than_a_piece_gives_a_part_of_itself(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 3_000_000)
    found = sample.draw_sample([str(tmp_path / "a.txt")], Reading(), 1 << 20, 0)
    assert found.texts
    assert set("".join(found.texts)) == {"é"}
    assert found.corpus_bytes == pytest.approx(6e6, rel=0.01)


@pytest.mark.parametrize(("name", "text", "documents"), [
    # Of three bytes each, of which the last that is read is cut.
    ("a.txt.gz", "€" * 1_000_000, "part"),
    ("a.jsonl.gz", '{"text": "' + "€" * 600_000 + '"}\n{"text": "b"}\n', ["€" * 600_000])])
def test_a_compressed_document_longer_than_the_sample_is_read_too(tmp_path, name, text, documents):
    with gzip.open(tmp_path / name, "wt", compresslevel=1, encoding="utf-8") as file:
        file.write(text)
    found = sample.draw_sample([str(tmp_path / name)], Reading(max_expansion=1e9), 1 << 20, 0)
    if documents == "part":
        documents = ["€" * ((1 << 20) // 3)]
    assert found.texts == documents
    assert not found.counted
