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
from functools import partial
from pathlib import Path

from core.cli import Reading
from core.errors import UserError
from core.files import read_json
from text import kinds
from text.kinds import CLEANED, KNOWN, LISTS, identify, list_files, name_faults, open_bytes

# Characters read at a time where a separator stands between documents; bytes of rows of parquet decoded together.
SEPARATED_CHUNK, BATCH_BYTES = 1 << 20, 1 << 26
_to_json = json.JSONEncoder(ensure_ascii=False, default=str).encode
# What may stand where a text or a record should, in the words of JSON.
FOUND = {bool: "true or false", int: "a number", float: "a number", bytes: "bytes", str: "a string", list: "a list",
         dict: "an object", type(None): "null"}


class Documents:
    """The text of each document of some files, once; `documents` and `empty` count what was read so far. A null is an
    empty text. files: as for `list_files`."""

    def __init__(self, files: list[str], reading: Reading | None = None):
        self.documents = self.empty = 0
        reading = reading or Reading()
        self._texts = (record[reading.column] for _, record in read_records(files, reading, text_only=True))

    def __iter__(self):
        return self

    def __next__(self) -> str:
        text = next(self._texts)
        self.documents += 1
        self.empty += not text
        return text

    def describe(self) -> str:
        return f"{self.documents:,} documents" + (f", {self.empty:,} of them empty" if self.empty else "")


read_documents = Documents


def read_records(files: list[str], reading: Reading | None = None, text_only: bool = False):
    """Yield (where it stands, record) of each document of the files, an hf://org/dataset[@revision] being one too.

    What a file is, text/kinds.py decides. Lines of JSON and parquet hold one record per document, text is cut into
    documents as reading.documents or reading.separator says. Each record has a string under reading.column, "" where
    the file has null; a column `content.text` is taken out of the object `content`. With `text_only`, no other column
    of a parquet file is read. A record without text is a UserError with its place.
    """
    assert not isinstance(files, str), "files is a list of paths"
    reading = reading or Reading()
    for path in list_files(files):
        for where, record in read_values(path, reading, text_only):
            record = _flatten(record, reading.column)
            text = record.get(reading.column, 0) if isinstance(record, dict) else 0
            if text is None:
                record[reading.column] = ""
            elif not isinstance(text, str):
                raise _describe_record(where, record, reading.column)
            elif len(text) > reading.max_bytes:
                raise refuse_size(where, reading)
            yield where, record


def refuse_size(where: str, reading: Reading) -> UserError:
    return UserError(f"{where} holds more than {reading.max_record_mb:g} MB in one document; cut it into documents "
                     f"(--documents, --separator), or raise --max-record-mb if it is to be one")


def _flatten(record, column: str):
    """The record with what stands under the dotted `column` moved to its top."""
    outer, _, inner = column.partition(".")
    if not inner or not isinstance(record, dict) or column in record or not isinstance(record.get(outer), dict):
        return record
    part = _flatten(record[outer], inner)
    if inner not in part:
        return record
    return {**record, outer: {key: value for key, value in part.items() if key != inner}, column: part[inner]}


def _describe_record(where: str, record, column: str) -> UserError:
    """What a record has in the place of its text, and what to do."""
    if not isinstance(record, dict):
        return UserError(f"{where} has no text under {column!r}: it is {FOUND[type(record)]}, and not an object of "
                         f"named fields")
    strings = [f"{key}.{name}" for key, value in record.items() if isinstance(value, dict)
               for name, part in value.items() if isinstance(part, str)]
    if column in record:
        strings = [name for name in strings if name.startswith(f"{column}.")]
        what = f"but {FOUND.get(type(record[column]), type(record[column]).__name__)}"
        remedy = "" if strings else "make it a string (bytes: decode them), or "
    else:
        what, remedy = f"(it has: {', '.join(record)})", ""
    such = f", such as --column {strings[0]}" if strings else ""
    return UserError(f"{where} has no text under {column!r} {what}; {remedy}name the column with --column{such}")


def read_values(path: str, reading: Reading, text_only: bool = False, lists: bool = False):
    """Yield (where it stands, value) as `read_records` does, but a line of JSON may hold anything; with `lists` also
    the entries of a .json file and the rows of .csv and .tsv, their header among them."""
    kind = identify(path, lists)
    if kind == "tokens":
        raise UserError(f"input file {path} has the name of token ids, no plain text; data.py pack alone reads it")
    if kind in LISTS and not lists:
        what, remedy = f"is a list in {kind.upper()}", "make it .jsonl, one {\"text\": ...} a line"
        if kind == "json":
            with open_bytes(path) as file:
                is_object = file.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{"
            what = "is one JSON object over many lines" if is_object else what
            remedy = f"make one object a line of it: jq -c '{'.' if is_object else '.[]'}' {path} > NAME.jsonl"
        raise UserError(f"input file {path} {what}, no plain text; known are {KNOWN}; {remedy}")
    fault = {"hub": "cannot be read from the Hub", "parquet": "is not a readable parquet file (fetch it again)",
             "json": "is not a list in JSON (convert it or fetch it again)"}
    with name_faults(path, fault.get(kind, "cannot be read; fetch it again")):
        if kind != "hub":
            kinds.refuse_bomb(path, reading.max_expansion)
        if kind == "hub":
            from datasets import load_dataset
            name, _, revision = path.removeprefix("hf://").partition("@")
            rows = load_dataset(name, reading.config, split=reading.split, streaming=True, revision=revision or None)
            yield from ((f"{path} record {number}", row) for number, row in enumerate(rows, 1))
        elif kind == "parquet":
            yield from _parquet_rows(path, reading.column if text_only else None, reading)
        elif kind == "lines":
            yield from _json_lines(path, reading)
        elif kind == "json":
            with open_bytes(path, reading.max_expansion) as file:
                text = file.read(reading.max_bytes + 1)
            if len(text) > reading.max_bytes:
                raise refuse_size(path, reading)
            items = json.loads(text.decode("utf-8-sig"))
            if not isinstance(items, (list, dict)):
                raise ValueError(f"it holds one {type(items).__name__}")
            yield from ((path, item) for item in (items.values() if isinstance(items, dict) else items))
        elif kind in LISTS:
            csv.field_size_limit(min(reading.max_bytes, 2**31 - 1))
            with io.TextIOWrapper(open_bytes(path, reading.max_expansion), encoding="utf-8-sig", newline="") as file:
                lines = iter(partial(file.readline, reading.max_bytes), "")
                yield from ((path, cells) for cells in csv.reader(lines, delimiter="\t" if kind == "tsv" else ","))
        else:
            yield from ((path, {reading.column: text}) for text in _text_documents(path, reading))


def _parquet_rows(path: str, column: str | None, reading: Reading):
    """(place, record) of each row; with `column` that alone, unless it is missing: a message names the others.

    UserError for a file that is decompressed to more than --max-expansion allows.
    """
    from pyarrow import parquet
    with parquet.ParquetFile(path) as file:
        name, number = (column or "").partition(".")[0], 0
        columns = [column] if {column, name} & set(file.schema_arrow.names) else None
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        chunks = [[chunk for chunk in map(group.column, range(group.num_columns))
                   if not columns or chunk.path_in_schema.partition(".")[0] == name] for group in groups]
        # A row of nulls takes next to nothing in the file, and 8 bytes here.
        size = 8 * file.metadata.num_rows + sum(chunk.total_uncompressed_size for some in chunks for chunk in some)
        if size > max(kinds.FREE_BYTES, reading.max_expansion * os.path.getsize(path)):
            raise kinds.refuse_expansion(path, reading.max_expansion)
        for group, some in enumerate(chunks):
            for batch in file.iter_batches(_rows_at_a_time(path, group, some, columns), row_groups=[group],
                                           columns=columns):
                # The values of a row are made when it is yielded: all rows may refer to one large value.
                for row in range(batch.num_rows):
                    number += 1
                    yield f"{path} row {number}", {key: values[row].as_py() for key, values in
                                                   zip(batch.schema.names, batch.columns)}


def _rows_at_a_time(path: str, group: int, chunks: list, columns: list[str] | None) -> int:
    """How many rows of a row group are decoded together, so that they take about BATCH_BYTES. A dictionary holds a
    value once, and each row may refer to it. chunks: the metadata of the row group's columns."""
    from pyarrow import compute, parquet, types
    size, rows = sum(chunk.total_uncompressed_size for chunk in chunks), max(1, chunks[0].num_values if chunks else 1)
    texts = [chunk.path_in_schema for chunk in chunks if chunk.physical_type == "BYTE_ARRAY"]
    with parquet.ParquetFile(path, read_dictionary=texts) as file:
        first = next(file.iter_batches(1, row_groups=[group], columns=columns), None)
    dictionaries = [array.dictionary for array in (first.columns if first else ()) if types.is_dictionary(array.type)]
    longest = max((compute.max(compute.binary_length(values)).as_py() or 0 for values in dictionaries), default=0)
    return max(1, min(1024, BATCH_BYTES // max(longest, size // rows, 1)))


def _lines(path: str, reading: Reading):
    """(number, line) of a file of UTF-8 text; a byte order mark is skipped, and only a line feed ends a line."""
    most = reading.max_bytes
    with open_bytes(path, reading.max_expansion) as file:
        for number, line in enumerate(iter(partial(file.readline, most + 1), b""), 1):
            if len(line) > most:
                raise refuse_size(f"{path} line {number}", reading)
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} line {number} cannot be read as text in utf-8 (byte {error.start + 1} of it); "
                                f"convert it: iconv -f LATIN1 -t UTF-8, or the encoding it has") from None


def _json_lines(path: str, reading: Reading):
    for number, line in _lines(path, reading):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            # Also an integer of more than 4,300 digits, and brackets a thousand deep.
            raise UserError(f"{path} line {number} is not JSON: {error}") from None
        yield f"{path} line {number}", value


def _text_documents(path: str, reading: Reading):
    """The texts of a plain file, without line ends around them."""
    most = reading.max_bytes
    if reading.separator or reading.documents == "file":
        with io.TextIOWrapper(open_bytes(path, reading.max_expansion), encoding="utf-8-sig", newline="\n") as file:
            if not reading.separator:
                yield file.read(most + 1)
                return
            rest = ""
            while part := file.read(SEPARATED_CHUNK):
                # The separator may lie across two chunks, so the last text waits for the next chunk.
                *complete, rest = (rest + part).split(reading.separator)
                yield from (text.strip("\r\n") for text in complete)
                if len(rest) > most:
                    raise refuse_size(path, reading)
            if rest.strip("\r\n"):
                yield rest.strip("\r\n")
        return
    lines = (line for _, line in _lines(path, reading))
    if reading.documents == "line":
        yield from (line.rstrip("\r\n") for line in lines)
        return
    block, size = [], 0
    for line in itertools.chain(lines, [""]):
        if line.strip():
            block.append(line)
            size += len(line)
            if size > most:
                raise refuse_size(path, reading)
        elif block:
            yield "".join(block).rstrip("\r\n")
            block, size = [], 0


def utf8(text: str) -> bytes:
    """UTF-8 bytes; half a surrogate pair, which JSON can hold, becomes U+FFFD, as for the tokenizers."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


# ---- records as clean.py takes and leaves them

def read_input(files: list[str], reading: Reading):
    """Yield the record of each document of files and Hub datasets: {"text", "id", "metadata": {"source", ...}}.

    A record without an id gets SOURCE/NUMBER; the source of a record that names none is the name of its file.
    """
    column = reading.column
    for path in list_files(files):
        source = path if path.startswith("hf://") else Path(path).name
        for number, (_, record) in enumerate(read_records([path], reading), 1):
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


def describe_inputs(files: list[str]) -> list[dict]:
    """What a manifest says of the files that a source was packed from."""
    # A file's name may be no UTF-8, and a manifest is.
    return [{"name": utf8(Path(path).name).decode(), "cleaning": read_cleaning(path),
             "bytes": os.path.getsize(path) if os.path.isfile(path) else None} for path in files]


def read_cleaning(path, seen: set | None = None) -> list[dict]:
    """What clean.py and dedup.py did to what became the file `path`, by the reports that they left beside it, the first
    step first: [{"by", "documents", "kept"}]; of clean.py, documents are the parts that it cut them into. At most
    `most` steps back: a report may name itself as its input."""
    steps, folder = [], Path(path).parent
    for by, name, total in (("clean.py", "drops.json", "parts"), ("dedup.py", "dedup.json", "documents")):
        if Path(path).name == CLEANED[0] and (folder / name).is_file():
            report = read_json(folder / name, dict)
            files = report.get("files") if isinstance(report.get("files"), list) else []
            steps += [step for file in files if isinstance(file, str) for step in read_cleaning(file, seen)]
            counts = {"documents": report.get(total), "kept": report.get("kept")}
            if not all(type(count) is int and 0 <= count < 2**63 for count in counts.values()):
                raise UserError(f"{folder / name} does not say how many {total} there were, and how many were kept; "
                                f"remove it, or make it again with {by}")
            steps.append({"by": by, **counts})
    return steps
