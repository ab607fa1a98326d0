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

from core.cli import Reading
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
# Names under which a page that begins as HTML or XML does is no text; in a source file such a beginning is code.
PROSE = ("", ".txt", ".text", ".md", ".markdown", ".raw", ".log")
# Decompressed bytes that a file may have at any ratio; bytes of a line that are looked at, and that are parsed, to find
# what a file is; bytes of a list of names.
FREE_BYTES, LOOKED_AT, SAMPLED, LIST_BYTES = 1 << 27, 1 << 26, 1 << 20, 1 << 26
# Text grows less often than so when it is decompressed.
USUAL_EXPANSION = 16
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


class Decompressed(io.RawIOBase):
    """The bytes of a compressed file; UserError where there are more than FREE_BYTES of them and more than `most` times
    as many as were read of the file."""

    def __init__(self, path: str, form: str, most: float):
        self.path, self.most, self.done = path, most, 0
        self.file = open(path, "rb")        # noqa: SIM115
        if form in ("gzip", "zstd"):
            import pyarrow
            self.stream = pyarrow.CompressedInputStream(self.file, form)
        else:
            self.stream = {"bz2": bz2.open, "xz": lzma.open}[form](self.file)

    def readable(self) -> bool:
        return True

    def expansion(self) -> float:
        return self.done / max(1, self.file.tell())

    def readinto(self, buffer) -> int:
        count = self.stream.readinto(buffer)
        self.done += count
        if self.done > FREE_BYTES and self.expansion() > self.most:
            raise refuse_expansion(self.path, self.most)
        return count

    def close(self):
        if not self.closed:
            self.stream.close()
            self.file.close()
        super().close()


def refuse_expansion(path: str, most: float) -> UserError:
    return UserError(f"{path} grows more than {most:g} times when it is decompressed, as a file that is made to fill "
                     f"the memory; raise --max-expansion if it is to be read")


def open_bytes(path: str, max_expansion: float = Reading.max_expansion):
    """A binary file, decompressed as its first bytes say."""
    with open(path, "rb") as file:
        form = find_compression(file.read(10))
    return io.BufferedReader(Decompressed(path, form, max_expansion), 1 << 20) if form else open(path, "rb")


def refuse_bomb(path: str, max_expansion: float):
    """UserError for a compressed file whose first bytes expand too much, before the work that their records are."""
    with open_bytes(path, max_expansion) as file:
        if isinstance(file.raw, Decompressed):
            while file.read(1 << 20) and file.raw.expansion() >= USUAL_EXPANSION and file.raw.done <= FREE_BYTES:
                pass


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
        if compressed and find_compression(head):
            raise UnknownKind(f"input file {path} was compressed twice; decompress it once")
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
    is_markup = re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html\b|\?xml)", head, re.I)
    if suffix in MARKUP or (is_markup and (suffix in PROSE or not PLAIN.fullmatch(suffix))):
        raise UnknownKind(f"input file {path} is HTML or XML, no plain text; extract its text first")
    if not PLAIN.fullmatch(suffix):
        raise UnknownKind(f"input file {path} is no plain text by its name ({suffix}); known are {KNOWN}. Rename it to "
                          f".txt if it is plain text")
    return "text"


def _refuse_foreign(path: str, head: bytes):
    """Raise for first bytes that are neither text in UTF-8 nor parquet."""
    if head[:4] == b"PAR1":
        return
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
    if control > 0.05 * len(head):
        raise UnknownKind(f"input file {path} holds binary data, no plain text; known are {KNOWN}")


def _sample_json_lines(path: str) -> int:
    """How many of the first five lines were read, blank ones apart, if each is a JSON object; else 0."""
    with open_bytes(path) as file:
        lines = (line for line in iter(partial(file.readline, LOOKED_AT), b"") if line.strip())
        sample = list(itertools.islice(lines, 5))
    try:
        return len(sample) if all(map(_is_object, sample)) else 0
    except (ValueError, RecursionError):
        return 0


def _is_object(line: bytes) -> bool:
    """Whether a line of JSON is an object; of a long one only the ends are looked at, as all of it is read later."""
    if len(line) > SAMPLED:
        return line[:9].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{" and line[-9:].rstrip()[-1:] == b"}"
    return isinstance(json.loads(line), dict)


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
            with name_faults(path[1:]), open(path[1:], encoding="utf-8-sig") as file:
                lines = file.read(LIST_BYTES).splitlines()
                if file.read(1):
                    raise UserError(f"{path[1:]} is too large for a list of names; list folders or patterns")
            names = [line.strip() for line in lines if line.strip() and not line.startswith(("#", "@"))]
            beside = [str(Path(path[1:]).parent / name) for name in names]
            files += list_files([there if not os.path.exists(name) and os.path.exists(there) else name
                                 for name, there in zip(names, beside)], wanted, dropped)
        elif glob.has_magic(path) and (found := _expand(path)):
            # A pattern with ** matches a folder and its files; each file counts once.
            files += list_files([name for name in found if os.path.isfile(name)] or found, wanted, dropped)
        elif os.path.exists(path):
            raise UserError(f"input file {path} is a pipe or a device; write it to a file first")
        else:
            raise UserError(f"input file {path} does not exist")
    return files


def _expand(pattern: str) -> list[str]:
    """The names that a pattern matches, sorted. `**` is any folder below, hidden ones apart; a link that leads back
    into a folder already seen is not followed, or a loop of links would be walked for ever."""
    start, deep, rest = pattern.partition("**/")
    if not deep and pattern.endswith("**"):
        start, deep, rest = pattern[:-2], "**", "*"
    if not deep or start[-1:] not in ("", "/"):
        return sorted(glob.glob(pattern))
    found, seen = set(), set()
    for top in [start or "."] if not glob.has_magic(start) else glob.glob(start):
        for folder, inner, _ in os.walk(top, followlinks=True):
            key = os.stat(folder)
            if (key.st_dev, key.st_ino) in seen:
                inner.clear()
                continue
            seen.add((key.st_dev, key.st_ino))
            inner[:] = [name for name in inner if not name.startswith(".")]
            found.update(_expand(os.path.join(glob.escape(folder) if start else glob.escape(folder)[2:], rest)))
    return sorted(found)


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
