"""What a file is: one place decides, by its name and its first bytes, for every command; and which files a name means.

    identify("c4-train.00000-of-01024.json.gz")           "lines", because it holds one JSON object a line
    list_files(["raw", "more/*.jsonl", "@names.txt"])     the files in a folder, of a pattern, of a list of names

A file of a kind that is not known is refused with the kinds that are; nothing is read as text by default.
"""

import bz2
import contextlib
import csv
import glob
import io
import itertools
import json
import lzma
import os
import re
import sys
from functools import partial
from pathlib import Path

from core.errors import UserError
from core.output import escape

KNOWN = ("text in UTF-8 (.txt, .md, source code, or without a suffix), one JSON object a line (.jsonl, or any other "
         "name), and .parquet; each but parquet may be compressed by gzip, zstd, bzip2 or xz")
# What a command that reads documents takes; one that reads the items of benchmarks takes LISTS as well.
TEXTS, LISTS = ("lines", "parquet", "text", "hub"), ("json", "csv", "tsv")
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson")
# Suffixes of plain text, source code included. (.jl is Julia's and Scrapy's JSON lines: the bytes decide.)
PLAIN = re.compile(r"|\.(txt|text|md|markdown|mdx|rst|tex|bib|org|adoc|raw|tok|tokens|log|srt|vtt|toml|ya?ml|ini|cfg|"
                   r"pyi?|pyx|c|h|cc|cpp|cxx|hpp|cu|java|kt|scala|jsx?|mjs|tsx?|go|rs|rb|php|pl|sh|sql|r|jl|swift|lua|"
                   r"hs|ml|css|clj|ex|erl|cs|vb|fs|dart|m|f|f90|s|asm|v|vhd)")
MARKUP = (".html", ".htm", ".xhtml", ".xml")
# First bytes of formats that hold no plain text, by what they are called in a message.
BINARY = {b"%PDF": "a PDF", b"PK\3\4": "a zip archive or an Office document", b"\x89PNG": "a PNG picture",
          b"\xff\xd8\xff": "a JPEG picture", b"GIF8": "a GIF picture", b"SQLite format 3": "an SQLite database",
          b"\x89HDF": "an HDF5 file", b"ARROW1": "an Arrow file", b"ORC": "an ORC file", b"Obj\1": "an Avro file",
          b"\x7fELF": "a program", b"7z\xbc\xaf": "a 7z archive", b"\x04\x22M\x18": "LZ4 data"}
# What clean.py leaves in a folder beside its drops.json: every document that it has scored.
CLEANED = ("kept.jsonl", "dropped.jsonl.gz")
# Files of a folder that tell about it and are none of its documents.
ABOUT = re.compile(r"(readme|licen[cs]e|notice|changelog|contributing|citation|source)(\.\w+)?", re.I)


class UnknownKind(UserError):
    """A file of a kind that is not read here. Within a folder such files are left out."""


@contextlib.contextmanager
def name_faults(path: str, fault: str = "cannot be read; fetch it again"):
    """A context whose errors of reading become UserErrors with the file's name: the user may have given a hundred."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read as text in utf-8 ({error.reason} {error.object[error.start]:#x}); "
                        f"convert it: iconv -f LATIN1 -t UTF-8, or the encoding it has") from None
    except (ValueError, OSError, EOFError, RecursionError, lzma.LZMAError, csv.Error) as error:
        reason = str(error).partition("\n")[0]
        if "too much memory" in reason:
            raise UserError(f"{path} was compressed with a window of more than 128 MB (zstd --long); decompress it: "
                            f"zstd -d --long=31 {path}") from None
        raise UserError(f"{path} {fault}: {reason}") from None


# ---- first bytes

def find_compression(head: bytes) -> str:
    """gzip, zstd, bz2, xz or "" by the first 10 bytes of a file."""
    if head[:3] == b"\x1f\x8b\x08":
        return "gzip"
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] < 0x60):
        return "zstd"
    if head[:3] == b"BZh" and head[4:10] == b"1AY&SY":
        return "bz2"
    return "xz" if head[:6] == b"\xfd7zXZ\0" else ""


def open_bytes(path: str):
    """A binary file, decompressed as its first bytes say."""
    with open(path, "rb") as file:
        form = find_compression(file.read(10))
    if form in ("gzip", "zstd"):
        import pyarrow
        return io.BufferedReader(pyarrow.input_stream(path, compression=form), 1 << 20)
    return {"bz2": bz2.open, "xz": lzma.open, "": open}[form](path, "rb")


def read_suffix(path: str) -> tuple[str, str]:
    """(suffix, suffix of compression), in lower case: X.JSON.gz gives (".json", ".gz"), part-00000.5 gives ("", "")."""
    stem, packed = re.fullmatch(r"(.*?)(\.(?:gz|zst|zstd|bz2|xz))?", Path(path).name.lower(), re.S).groups()
    suffix = Path(stem).suffix
    return suffix if re.fullmatch(r"\.[a-z][a-z0-9_]{0,9}", suffix) else "", packed or ""


def identify(path: str, lists: bool = False) -> str:
    """lines, parquet, text, tokens or hub; json, csv or tsv for what may be a list of a benchmark's items.

    UnknownKind for any other. With `lists` a .json of one line is the list, and not one record.
    """
    if path.startswith("hf://"):
        return "hub"
    suffix, packed = read_suffix(path)
    with name_faults(path):
        with open(path, "rb") as file:
            compressed = find_compression(file.read(10))
        if suffix in (".bin", ".ds") and not compressed:
            return "tokens"
        with open_bytes(path) as file:
            head = file.read(1 << 16)
        _refuse_foreign(path, head)
        if head[:4] == b"PAR1" or suffix == ".parquet":
            if compressed:
                raise UnknownKind(f"input file {path} is a parquet file that was compressed once more; decompress it")
            return "parquet"
        sample = _sample_json_lines(path) if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{" else 0
    if sample > (lists and suffix == ".json"):
        return "lines"
    if packed and not compressed:
        raise UserError(f"input file {path} cannot be read: it is named {packed}, but its first bytes say that it is "
                        f"not compressed; fetch it again, or rename it")
    if suffix in JSON_LINES:
        return "lines"
    if suffix in (".json", ".csv", ".tsv"):
        return suffix[1:]
    is_markup = re.match(rb"\s*<(!doctype html|html|\?xml)", head, re.I) and (not suffix or not PLAIN.fullmatch(suffix))
    if suffix in MARKUP or is_markup:
        raise UnknownKind(f"input file {path} is HTML or XML, no plain text; extract its text first")
    if not PLAIN.fullmatch(suffix):
        raise UnknownKind(f"input file {path} is no plain text by its name ({suffix}); known are {KNOWN}. Rename it to "
                          f".txt if it is plain text")
    return "text"


def _refuse_foreign(path: str, head: bytes):
    """Raise for first bytes that are neither text in UTF-8 nor parquet."""
    is_tar = head[257:262] == b"ustar"
    what = "a tar archive" if is_tar else next((name for magic, name in BINARY.items() if head.startswith(magic)), "")
    if what:
        raise UnknownKind(f"input file {path} is {what}, no plain text; known are {KNOWN}")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"input file {path} is a Git LFS pointer, not the file itself; run `git lfs pull` beside it")
    # Without its mark UTF-16 shows by the zero bytes at every other place.
    halves = [head[i:4096:2].count(0) > 0.4 * len(head[i:4096:2]) > 0 for i in (0, 1)]
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or halves in ([True, False], [False, True]):
        raise UserError(f"input file {path} is in UTF-16, from row 1 on; convert it: iconv -f UTF-16 -t UTF-8 {path}")
    control = len(re.findall(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]", head))
    if head[:4] != b"PAR1" and control > 0.05 * len(head):
        raise UnknownKind(f"input file {path} holds binary data, no plain text; known are {KNOWN}")


def _sample_json_lines(path: str) -> int:
    """How many of the first five lines were read, blank ones apart, if each is a JSON object; else 0."""
    with open_bytes(path) as file:
        lines = (line for line in iter(partial(file.readline, 1 << 26), b"") if line.strip())
        sample = list(itertools.islice(lines, 5))
    try:
        return len(sample) if all(isinstance(json.loads(line), dict) for line in sample) else 0
    except (ValueError, RecursionError):
        return 0


# ---- names

def list_files(paths, wanted: tuple = TEXTS, dropped: bool = False) -> list[str]:
    """The files that `paths` name: files and hf:// datasets themselves, a folder's files by name, those that a pattern
    (`raw/**/*.txt`) matches, and for @LIST those in the lines of a file, seen from here or from beside the list.

    Of a folder come the files of the `wanted` kinds; others are left out, and said. The folder of clean.py or dedup.py
    stands for what they kept; with `dropped`, clean.py's for all that it scored.
    """
    files = []
    for path in map(str, paths):
        if path.startswith("hf://") or os.path.isfile(path):
            files.append(path)
        elif os.path.isdir(path):
            files += _list_folder(Path(path), wanted, dropped)
        elif path.startswith("@") and os.path.isfile(path[1:]):
            with name_faults(path[1:]):
                lines = Path(path[1:]).read_text(encoding="utf-8-sig").splitlines()
            names = [line.strip() for line in lines if line.strip() and not line.startswith(("#", "@"))]
            beside = [str(Path(path[1:]).parent / name) for name in names]
            files += list_files([there if not os.path.exists(name) and os.path.exists(there) else name
                                 for name, there in zip(names, beside)], wanted, dropped)
        elif glob.has_magic(path) and (found := sorted(glob.glob(path, recursive=True))):
            # A pattern with ** matches a folder and its files; each file counts once.
            files += list_files([name for name in found if os.path.isfile(name)] or found, wanted, dropped)
        else:
            raise UserError(f"input file {path} does not exist")
    return files


def _list_folder(folder: Path, wanted: tuple, dropped: bool) -> list[str]:
    for report in ("drops.json", "dedup.json"):
        if (folder / report).is_file():
            return [str(folder / name) for name in CLEANED[:2 if dropped and report == "drops.json" else 1]]
    found, left_out = [], []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            is_wanted = not ABOUT.fullmatch(path.name) and identify(str(path), "json" in wanted) in wanted
        except UnknownKind:
            is_wanted = False
        (found if is_wanted else left_out).append(str(path))
    if not found:
        raise UserError(f"{folder} is a folder that holds no file to read; known are {KNOWN}")
    if left_out:
        names = [escape(Path(path).name, line=True) for path in left_out[:3]] + ["..."] * bool(left_out[3:])
        print(f"in {folder}: {len(left_out)} files left out, of other kinds or about the folder: {', '.join(names)}",
              file=sys.stderr)
    return found
