"""Documents out of files and Hub datasets: text, JSONL, parquet, plain or compressed, one record a document.

    for where, record in read_records("legal.jsonl.gz"): record["text"]

A record is datatrove's: {"text", "id", "metadata"}; whatever else it says is kept.
"""

import gzip
import json
import os
import re
import zlib
from pathlib import Path

NOT_TEXT = (".json", ".csv", ".tsv", ".html", ".htm", ".xml", ".pdf", ".docx", ".zip")


def read_documents(path: str, documents: str = "blank", separator: str | None = None, column: str = "text",
                   config: str | None = None, split: str = "train"):
    """Yield the text of each document of a file, or of an hf://org/dataset[@revision] through `datasets`.

    .jsonl[.gz|.zst] and .parquet: one record a document, its text under `column`. Anything else is text: one document
    per line, per block between blank lines, or per file; or between `separator` strings.
    """
    for _, record in read_records(path, documents, separator, column, config, split, only=[column]):
        yield record[column]


def read_records(path: str, documents: str = "blank", separator: str | None = None, column: str = "text",
                 config: str | None = None, split: str = "train", only: list | None = None):
    """Yield (where it stands, record) for each document; the record has a string under `column` and, unless a parquet
    file is to give `only` some columns, all else that the file says of it."""
    if path.startswith("hf://"):
        from datasets import load_dataset
        name, _, revision = path.removeprefix("hf://").partition("@")
        try:
            rows = load_dataset(name, config, split=split, streaming=True, revision=revision or None)
            yield from with_text(((f"{path} record {i}", row) for i, row in enumerate(rows, 1)), column)
        except OSError as error:               # no such dataset, no network: not to be taken for a full disk
            raise ValueError(f"{path} cannot be read from the Hub: {str(error).splitlines()[0]}") from None
        return
    if not os.path.isfile(path):
        raise ValueError(f"input file {path} " + ("is a folder; name the files in it" if os.path.isdir(path)
                                                  else "does not exist"))
    if Path(path).suffix.lower() in NOT_TEXT:
        raise ValueError(f"input file {path} is no plain text; make it .txt or .jsonl (one {{\"text\": ...}} a line)")
    stem = re.sub(r"\.(gz|zst)$", "", path)
    try:
        if stem.endswith(".parquet"):
            yield from with_text(parquet_records(path, column, only), column)
        elif stem.endswith((".jsonl", ".ndjson")):
            yield from with_text(json_records(path), column)
        else:
            yield from ((path, {column: text}) for text in _text_documents(path, documents, separator))
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:       # none of which names the file
        what = "read" if stem.endswith(".parquet") else "read as UTF-8 text"
        raise ValueError(f"input file {path} cannot be {what}: {error}; convert it or fetch it again") from None


def with_text(records, column):
    for where, record in records:
        text = record.get(column) if isinstance(record, dict) else None
        if not isinstance(text, str):
            known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{where} has no text under {column!r} (it has: {known}); name the column with --column")
        yield where, record


def json_records(path):
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{path} line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:      # a number of 5,000 digits, a thousand brackets
                    raise ValueError(f"{path} line {number} is not JSON: {error}") from None


def parquet_records(path, column, only):
    import pyarrow
    import pyarrow.parquet as parquet
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None
    if column not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column {column!r} (it has: {', '.join(file.schema_arrow.names)}); "
                         f"name the column with --column")
    for batch in file.iter_batches(batch_size=1024, columns=only):
        yield from ((path, record) for record in batch.to_pylist())


def _open_text(path):
    if path.endswith(".zst"):
        import io

        import pyarrow
        return io.TextIOWrapper(pyarrow.input_stream(path, compression="zstd"), encoding="utf-8-sig", newline="\n")
    opener = gzip.open if path.endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig", newline="\n")


def _text_documents(path, documents, separator):
    with _open_text(path) as file:
        if separator:
            rest = ""
            while part := file.read(1 << 20):
                *whole, rest = (rest + part).split(separator)
                yield from (text.strip("\r\n") for text in whole)
            if rest.strip("\r\n"):
                yield rest.strip("\r\n")
        elif documents == "file":
            yield file.read()
        elif documents == "line":
            yield from (line.rstrip("\r\n") for line in file)
        else:
            block = []
            for line in file:
                if line.strip():
                    block.append(line)
                elif block:
                    yield "".join(block).rstrip("\r\n")
                    block = []
            if block:
                yield "".join(block).rstrip("\r\n")


def utf8(text: str) -> bytes:
    """UTF-8 bytes; half a surrogate pair, which JSON can carry, becomes U+FFFD as in tokenizer.py."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
