"""Records as clean.py takes them, {"text", "id", "metadata": {"source", ...}, ...}: of files, folders and the Hub."""

import json
import os
from pathlib import Path

from core.cli import Reading
from core.errors import UserError
from text import corpus

# What clean.py leaves in a folder beside its drops.json: every document that it has scored.
OUTPUTS = ("kept.jsonl", "dropped.jsonl.gz")


def list_files(paths: list[str]) -> list[str]:
    """The files that `paths` name. A folder stands for the files in it by name, clean.py's for its two outputs."""
    files = []
    for path in paths:
        if path.startswith("hf://") or not os.path.isdir(path):
            files.append(path)
            continue
        inside = sorted(str(p) for p in Path(path).rglob("*") if p.is_file() and p.suffix.lower() not in corpus.NOT_TEXT
                        and not any(part.startswith(".") for part in p.relative_to(path).parts))
        if not inside:
            raise UserError(f"{path} holds no file to read; .jsonl[.gz|.zst], .parquet or text is wanted")
        files += [str(Path(path, name)) for name in OUTPUTS] if Path(path, "drops.json").is_file() else inside
    return files


def read_input(path: str, reading: Reading):
    """Yield the record of each document of a file or an hf://org/dataset. Its text may be null, which is an empty one.

    A record without an id is SOURCE/NUMBER; metadata.source is the name of the file where the record names none.
    """
    source, column = path if path.startswith("hf://") else Path(path).name, reading.column
    for number, (_, record) in enumerate(corpus.read_records([path], reading, allow_null=True), 1):
        metadata = {"source": record.get("source") or source, **metadata_of(record)}
        if record.get("domain"):
            metadata.setdefault("domain", record["domain"])
        yield {"text": record[column], **{key: value for key, value in record.items() if key not in ("text", column)},
               "id": f"{source}/{number}" if record.get("id") is None else record["id"], "metadata": metadata}


def metadata_of(record: dict) -> dict:
    """The record's metadata; whatever stands there that is no table becomes the entry "metadata" of one."""
    metadata = record.get("metadata")
    if isinstance(metadata, dict):
        return metadata
    return {} if metadata is None else {"metadata": metadata}


def to_line(record: dict) -> bytes:
    """A line of a .jsonl file, in UTF-8; half a surrogate pair stays escaped, as it came."""
    try:
        return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(record, default=str) + "\n").encode()
