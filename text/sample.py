"""A seeded sample of documents from across a corpus of any size, and how large the corpus is.

A corpus of at most `most_bytes` is read whole, and counted. Of a larger one WINDOWS pieces are read, at places spread
evenly over all bytes of its files and moved at random within their part; a piece begins and ends where a document does.
Of a file that can only be read from its beginning (compressed, parquet, the Hub) the piece is its beginning.

    100 GB in 3 files, of which 4 MB are wanted: 64 pieces of 64 KB. Text bytes: 100 GB times the pieces' share of text.
"""

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.cli import Reading
from core.errors import UserError
from text.corpus import read_documents, utf8
from text.kinds import find_compression, identify, list_files, open_bytes

# Pieces of a corpus; bytes of a compressed file up to which it is read to its end.
WINDOWS, READ_TO_END = 64, 1 << 24
# Blank lines, in files from Windows too.
BLANK = re.compile(rb"\r?\n(?:[ \t\r]*\n)+")


@dataclass
class Sample:
    """texts: documents, none of them empty. corpus_bytes: UTF-8 bytes of text in all of the corpus, None where nothing
    says; counted: whether it was read whole. empty: empty documents that were met."""
    texts: list[str]
    corpus_bytes: float | None
    counted: bool
    files: int
    empty: int = 0

    @property
    def bytes(self) -> int:
        return sum(len(utf8(text)) for text in self.texts)


def draw_sample(paths: list[str], reading: Reading, most_bytes: int, seed: int) -> Sample:
    """A sample of about `most_bytes` bytes of the files that `paths` name. UserError for a file that cannot be read."""
    files = list_files(paths)
    if not files:
        raise UserError(f"{' '.join(paths)} holds no file of text")
    sizes = [0 if path.startswith("hf://") else os.path.getsize(path) for path in files]
    total, hub = sum(sizes), [path for path in files if path.startswith("hf://")]
    if not hub and total <= most_bytes and not any(map(is_packed, files)):
        documents = read_documents(files, reading)
        texts = [text for text in documents if text.strip()]
        return Sample(texts, sum(len(utf8(text)) for text in texts), True, len(files), documents.documents - len(texts))
    rng, window = np.random.default_rng(seed), max(1 << 14, most_bytes // WINDOWS)
    starts = ((np.arange(WINDOWS) + rng.random(WINDOWS)) / WINDOWS * total).astype(np.int64)
    ends = np.cumsum(sizes)
    chosen = ends.searchsorted(starts, "right").tolist()
    offsets = {}
    for file, start in zip(chosen, starts.tolist()) if total else ():
        offsets.setdefault(file, []).append(start - int(ends[file]) + sizes[file])
    for file in map(files.index, hub):
        offsets[file] = [0] * max(1, WINDOWS // len(hub))
    texts, empty, of_files, in_text = [], 0, 0, 0.0
    for file, places in offsets.items():
        some, blank, share = read_pieces(files[file], places, window, reading)
        texts, empty = texts + some, empty + blank
        of_files, in_text = of_files + sizes[file], in_text + sizes[file] * share
    corpus_bytes = None if hub else total * in_text / max(1, of_files)
    return Sample(texts, corpus_bytes, False, len(files), empty)


def is_packed(path: str) -> bool:
    """Whether the file's size says little of its text's."""
    with open(path, "rb") as file:
        head = file.read(10)
    return bool(find_compression(head)) or head[:4] == b"PAR1"


def read_pieces(path: str, places: list[int], window: int, reading: Reading) -> tuple[list[str], int, float]:
    """(the documents of the pieces of a file that begin at `places`, how many are empty, text bytes per byte of it)."""
    kind, most = identify(path), window * len(places)
    if kind not in ("lines", "text"):
        return read_rows(path, most, reading)
    between = (reading.separator or {"blank": "\n\n"}.get(reading.documents, "\n")).encode()
    between = b"\n" if kind == "lines" else between
    is_blank = kind == "text" and not reading.separator and reading.documents == "blank"
    gap = BLANK if is_blank else re.compile(re.escape(between))
    if is_packed(path):
        with open_bytes(path, reading.max_expansion) as file:
            data = file.read(most)
            if gaps := [found.start() for found in gap.finditer(data)]:
                data = data[:gaps[-1] + 1]
            else:
                # As in `read_piece`, the first document is longer than that.
                data += file.readline(reading.max_bytes) if between == b"\n" else b""
                data = data.decode("utf-8", "ignore").encode()
            # How much it grows is known at its end; the reader of a large one has read ahead by little.
            while os.path.getsize(path) < READ_TO_END and file.read(1 << 20):
                pass
            grown = file.raw.expansion()
        pieces = [data]
    else:
        grown = 1.0
        with open(path, "rb") as file:
            pieces = [read_piece(file, place, window, gap, reading.max_bytes, between == b"\n") for place in places]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "sample.jsonl" if kind == "lines" else "sample.txt")
        copy.write_bytes(between.join(pieces))
        documents = read_documents([str(copy)], reading)
        try:
            texts = [text for text in documents if text.strip()]
        except UserError as error:
            raise UserError(str(error).replace(str(copy), f"a sample of {path},")) from None
    size = sum(len(utf8(text)) for text in texts)
    return texts, documents.documents - len(texts), grown * size / max(1, sum(map(len, pieces)))


def read_piece(file, place: int, window: int, gap: re.Pattern, most: int, is_lines: bool) -> bytes:
    """About `window` bytes of whole documents, from the first that begins at or behind `place`; where none begins
    within so many bytes, a part of one (of lines, whole lines of at most `most` bytes). gap: stands between two."""
    # As far back as what stands before a document at `place` may begin.
    begin = max(0, place - max(4, len(gap.pattern)))
    file.seek(begin)
    data = file.read(window + place - begin)
    gaps = [found.span() for found in gap.finditer(data)]
    start = 0 if place == 0 else next((end for _, end in gaps if begin + end >= place), None)
    if start is None and is_lines:
        # One line is longer than the window: the next one is read.
        file.readline(most)
        return file.readline(most)
    start = place - begin if start is None else start
    end = gaps[-1][0] if gaps else 0
    if end > start:
        return data[start:end]
    # The first document is longer than what was read. A piece begins and ends with a character.
    data = data[start:] + (file.readline(most) if is_lines else b"")
    return data.decode("utf-8", "ignore").encode()


def read_rows(path: str, most: int, reading: Reading) -> tuple[list[str], int, float]:
    """As `read_pieces`, of the first `most` bytes of text in a parquet file or a Hub dataset."""
    texts, size, documents = [], 0, read_documents([path], reading)
    for text in documents:
        texts.append(text)
        size += len(utf8(text))
        if size >= most:
            break
    share = 0.0
    if not path.startswith("hf://"):
        from pyarrow import parquet
        rows = parquet.read_metadata(path).num_rows
        share = size / max(1, len(texts)) * rows / os.path.getsize(path)
    kept = [text for text in texts if text.strip()]
    return kept, len(texts) - len(kept), share
