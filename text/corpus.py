"""Documents out of files and Hub datasets: text, JSONL, parquet, plain or compressed, one record per document.

    for where, record in read_records(["legal.jsonl.gz", "hf://org/dataset@v1"]):
        record["text"]

A record is datatrove's: {"text", "id", "metadata"}; whatever else it says is kept.
"""

import csv
import io
import itertools
import json
import os
import re
from pathlib import Path

from core.cli import Reading
from core.errors import UserError

# Files that hold a list of anything, such as the items of a benchmark. No corpus is read from them.
LISTS = (".json", ".csv", ".tsv")
# Suffixes that hold no plain text; read as text they would give nonsense without an error.
NOT_TEXT = (*LISTS, ".html", ".htm", ".xml", ".pdf", ".docx", ".zip")
# Characters read at a time where a separator stands between documents.
SEPARATED_CHUNK = 1 << 20
# What clean.py leaves in a folder beside its drops.json: every document that it has scored.
CLEANED = ("kept.jsonl", "dropped.jsonl.gz")
_to_json = json.JSONEncoder(ensure_ascii=False, default=str).encode


def read_documents(files: list[str], reading: Reading | None = None):
    """Yield the text of each document of the files; what `read_records` says holds."""
    reading = reading or Reading()
    return (record[reading.column] for _, record in read_records(files, reading, text_only=True))


def read_records(files: list[str], reading: Reading | None = None, text_only: bool = False, allow_null: bool = False):
    """Yield (where it stands, record) of each document of the files, an hf://org/dataset[@revision] being one too.

    .jsonl[.gz|.zst] and .parquet hold one record per document. Anything else is text, cut into documents as
    reading.documents or reading.separator says. Each record has a string under reading.column, or with `allow_null`
    perhaps None. With `text_only`, no other column of a parquet file is read.
    A file that cannot be read is a UserError with its name, and a record without text one with its place.
    """
    assert not isinstance(files, str), "files is a list of paths"
    reading = reading or Reading()
    for path in files:
        for where, record in read_values(path, reading, text_only):
            text = record.get(reading.column, 0) if isinstance(record, dict) else 0
            if not isinstance(text, str) and not (text is None and allow_null):
                known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise UserError(f"{where} has no text under {reading.column!r} (it has: {known}); name the column with "
                                f"--column")
            yield where, record


def read_values(path: str, reading: Reading, text_only: bool = False, lists: bool = False):
    """Yield (where it stands, value) as `read_records` does, but a line of JSON may hold anything; with `lists` also
    the entries of a .json file and the rows of .csv and .tsv, their header among them."""
    is_hub, suffix = path.startswith("hf://"), Path(path).suffix.lower()
    if not is_hub and not os.path.isfile(path):
        raise UserError(f"input file {path} " + ("is a folder; name the files in it" if os.path.isdir(path)
                                                 else "does not exist"))
    if not is_hub and suffix in NOT_TEXT and not (lists and suffix in LISTS):
        raise UserError(f"input file {path} is no plain text; make it .txt or .jsonl (one {{\"text\": ...}} a line)")
    stem, fault = re.sub(r"\.(gz|zst)$", "", path), "cannot be read as UTF-8 text (convert it or fetch it again)"
    try:
        if is_hub:
            from datasets import load_dataset
            fault = "cannot be read from the Hub"
            name, _, revision = path.removeprefix("hf://").partition("@")
            rows = load_dataset(name, reading.config, split=reading.split, streaming=True, revision=revision or None)
            yield from ((f"{path} record {number}", row) for number, row in enumerate(rows, 1))
        elif stem.endswith(".parquet"):
            from pyarrow import parquet
            fault = "is not a readable parquet file (fetch it again)"
            file = parquet.ParquetFile(path)
            # All columns where the wanted one is missing, so that the message can name them.
            columns = [reading.column] if text_only and reading.column in file.schema_arrow.names else None
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                yield from ((path, record) for record in batch.to_pylist())
        elif stem.endswith((".jsonl", ".ndjson")):
            yield from _json_lines(path)
        elif suffix == ".json":
            fault = "is not a list in JSON (convert it or fetch it again)"
            items = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            if not isinstance(items, (list, dict)):
                raise ValueError(f"it holds one {type(items).__name__}")
            yield from ((path, item) for item in (items.values() if isinstance(items, dict) else items))
        elif suffix in LISTS:
            csv.field_size_limit(2**31 - 1)
            with open(path, encoding="utf-8-sig", newline="") as file:
                yield from ((path, cells) for cells in csv.reader(file, delimiter="\t" if suffix == ".tsv" else ","))
        else:
            yield from ((path, {reading.column: text}) for text in _text_documents(path, reading))
    except UserError:
        raise
    except (ValueError, OSError, RecursionError, csv.Error) as error:
        # These errors do not name the file, and the user may have given a hundred.
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} {fault}: {reason}") from None


def _json_lines(path: str):
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                # Also an integer of more than 4,300 digits, and brackets a thousand deep.
                raise UserError(f"{path} line {number} is not JSON: {error}") from None
            yield f"{path} line {number}", value


def _open_text(path: str):
    """A file of UTF-8 text, decompressed; a byte order mark is skipped, and only a line feed ends a line."""
    import pyarrow
    file = pyarrow.input_stream(path) if path.endswith((".gz", ".zst")) else open(path, "rb")       # noqa: SIM115
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")


def _text_documents(path: str, reading: Reading):
    """The texts of a plain file, without line ends around them."""
    with _open_text(path) as file:
        if reading.separator:
            rest = ""
            while part := file.read(SEPARATED_CHUNK):
                # The separator may lie across two chunks, so the last text waits for the next chunk.
                *complete, rest = (rest + part).split(reading.separator)
                yield from (text.strip("\r\n") for text in complete)
            if rest.strip("\r\n"):
                yield rest.strip("\r\n")
        elif reading.documents == "file":
            yield file.read()
        elif reading.documents == "line":
            yield from (line.rstrip("\r\n") for line in file)
        else:
            for is_blank, lines in itertools.groupby(file, key=lambda line: not line.strip()):
                if not is_blank:
                    yield "".join(lines).rstrip("\r\n")


def utf8(text: str) -> bytes:
    """UTF-8 bytes; half a surrogate pair, which JSON can hold, becomes U+FFFD, as for the tokenizers."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


# ---- records as clean.py takes and leaves them

def list_files(paths: list[str]) -> list[str]:
    """The files that `paths` name. A folder stands for the files in it by name, clean.py's for its two outputs."""
    files = []
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
            continue
        inside = sorted(str(p) for p in Path(path).rglob("*") if p.is_file() and p.suffix.lower() not in NOT_TEXT
                        and not any(part.startswith(".") for part in p.relative_to(path).parts))
        if not inside:
            raise UserError(f"{path} holds no file to read; .jsonl[.gz|.zst], .parquet or text is wanted")
        files += [str(Path(path, name)) for name in CLEANED] if Path(path, "drops.json").is_file() else inside
    return files


def read_input(files: list[str], reading: Reading):
    """Yield the record of each document of files and Hub datasets: {"text", "id", "metadata": {"source", ...}}.

    The text may be null, which stands for an empty one. A record without an id gets SOURCE/NUMBER; the source of a
    record that names none is the name of its file.
    """
    column = reading.column
    for path in files:
        source = path if path.startswith("hf://") else Path(path).name
        for number, (_, record) in enumerate(read_records([path], reading, allow_null=True), 1):
            metadata = record.get("metadata")
            if not isinstance(metadata, dict):
                metadata = {} if metadata is None else {"metadata": metadata}
            metadata = {"source": record.get("source") or source, **metadata}
            if record.get("domain"):
                metadata.setdefault("domain", record["domain"])
            yield {"text": record[column], **{key: record[key] for key in record if key not in ("text", column)},
                   "id": f"{source}/{number}" if record.get("id") is None else record["id"], "metadata": metadata}


def to_line(record: dict) -> bytes:
    """A line of a .jsonl file, in UTF-8, as every command writes it: `utf8`, because not every reader takes half a
    surrogate pair."""
    return utf8(_to_json(record)) + b"\n"
