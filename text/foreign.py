"""Token files of other projects, read a document at a time for `data.py pack`; and a mixed JSONL file for other tools.

    NAME.ds, NAME.ds.index      datatrove's tokens, and where each document ends
    NAME.bin, NAME.idx          an indexed dataset of Megatron's
    NAME.bin                    llm.c's tokens after a header, or nanoGPT's (uint16 or uint32) without one

Ids stay as they are. BOS and EOS at the ends of a document are removed, because packing adds its own; where no index
says where documents end, they end at each BOS or EOS.
"""

import itertools
import struct
import tempfile
from pathlib import Path

import numpy as np

from core.cli import Reading
from core.errors import UserError
from core.files import make_folder, naming_full_disks, new_file
from core.hashing import mix_keys, permute
from text.corpus import read_records, to_line
from text.kinds import identify
from text.mixture import SourceConfig, judge_epochs
from text.shards import HEADER_BYTES, MAGIC, OUR_MAGIC

MEGATRON = b"MMIDIDX\0\0"
# Megatron's DType codes that can hold ids.
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}
# Tokens that are searched at a time.
CHUNK = 1 << 24


def read_texts(files: list[str], tokenizer, reading: Reading, dtype: str | None = None, all_columns: bool = False):
    """Yield (where it stands, record) of each document of files of text, of records and of tokens; the text of a
    document of a token file is its ids."""
    for path in files:
        if identify(path) == "tokens":
            yield from ((path, {reading.column: ids}) for ids in read_token_documents(path, tokenizer, dtype))
        else:
            yield from read_records([path], reading, text_only=not all_columns)


def read_token_documents(path: str, tokenizer, dtype: str | None = None):
    """Yield uint32 [n], the ids of each document of a token file, without BOS and EOS at its ends.

    dtype: "uint16" or "uint32", for a file that does not say it; default: what the tokenizer's vocabulary needs.
    A file that is damaged, or that is not in this tokenizer's ids, is a UserError.
    """
    tokens, ends = _open_tokens(Path(path), dtype, "uint16" if tokenizer.vocab_size <= 65536 else "uint32")
    marks, last = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None], tokenizer.vocab_size - 1
    is_marked = ends is None
    if is_marked:
        found = [at + np.flatnonzero(np.isin(tokens[at:at + CHUNK], marks)) for at in range(0, len(tokens), CHUNK)]
        ends = np.concatenate([*found, [len(tokens)]])
    for start, end in itertools.pairwise(itertools.chain([0], ends)):
        ids = tokens[start:end]
        inner = np.flatnonzero(~np.isin(ids, marks))
        if is_marked and not len(inner):
            # Of two marks side by side the first is no document.
            continue
        ids = ids[inner[0]:inner[-1] + 1] if len(inner) else ids[:0]
        for worst in (ids.min(initial=0), ids.max(initial=0)):
            if not 0 <= worst <= last:
                raise UserError(f"{path} holds token id {worst}, but the tokenizer ends at {last}; take its own "
                                f"tokenizer, or name its --dtype if that is not {tokens.dtype}")
        yield ids.astype(np.uint32)


def _open_tokens(file: Path, dtype: str | None, usual: str):
    """(memory map of the tokens, int64 document ends or None where no index says them); `usual` is the likely dtype."""
    if not file.is_file():
        raise UserError(f"input file {file} does not exist or is no file")
    header, is_bin = np.fromfile(file, "<i4", 256), file.suffix == ".bin"
    kind, skip, ends = dtype or usual, 0, None
    size = {magic: size for size, (magic, _) in MAGIC.items()}.get(header[0]) if len(header) == 256 else None
    if size and header[3] == OUR_MAGIC:
        raise UserError(f"{file} is a packed shard already; name its folder as a source")
    index = file.with_suffix(".idx") if is_bin else file.with_name(file.name + ".index")
    if index.is_file():
        kind, ends = _read_megatron_index(index) if is_bin else (kind, _map(index, "u8").astype(np.int64))
    elif is_bin and size:
        kind, skip = f"u{size}", HEADER_BYTES
    tokens = _map(file, kind, skip)
    if skip and len(tokens) != header[2]:
        raise UserError(f"{file} says it has {header[2]:,} tokens and has {len(tokens):,}; fetch it again")
    if kind == usual == "uint16" and not dtype and len(tokens) > 1 and not tokens[1:CHUNK:2].any():
        raise UserError(f"{file} looks like uint32 tokens: every other uint16 of it is 0; name its --dtype")
    if ends is not None and (not len(ends) or ends[-1] != len(tokens) or (np.diff(ends, prepend=0) < 0).any()):
        raise UserError(f"{index} has document ends that do not rise to the {len(tokens):,} tokens beside it; fetch "
                        f"both again, or name their --dtype")
    return tokens, ends


def _map(file: Path, kind: str, skip: int = 0) -> np.ndarray:
    dtype, size = np.dtype(kind).newbyteorder("<"), file.stat().st_size - skip
    if size <= 0 or size % dtype.itemsize:
        raise UserError(f"{file} has {max(0, size)} bytes, which is no whole number of {dtype.name} tokens above 0; "
                        f"fetch it again, or name its --dtype")
    return np.memmap(file, dtype, "r", skip)


def _read_megatron_index(index: Path) -> tuple[str, np.ndarray]:
    """(dtype of the tokens, int64 document ends): the index has the lengths of sequences and where documents begin."""
    raw = index.read_bytes()
    try:
        version, code, sequences, documents = struct.unpack_from("<QBQQ", raw, len(MEGATRON))
        if (raw[:9], version) != (MEGATRON, 1) or code not in MEGATRON_DTYPES:
            raise ValueError(f"version {version}, dtype code {code}")
        lengths = np.frombuffer(raw, "<i4", sequences, 34)
        first = np.frombuffer(raw, "<i8", documents, 34 + 12 * sequences)
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[first[first > 0]]
    except (ValueError, struct.error, IndexError) as error:
        raise UserError(f"{index} is no index of a Megatron dataset ({error}); fetch it again, or remove it if "
                        f"{index.stem}.bin is not one") from None
    return MEGATRON_DTYPES[code], ends


# ---- a mixed JSONL file for other tools

def mix_files(domain, general, out, *, ratio: float = 0.7, total: int | None = None, seed: int = 0,
              max_epochs: float = 16.0, overwrite: bool = False) -> dict:
    """Write `total` records to the JSONL file `out`, the share `ratio` of them from `domain`, in an order of `seed`.

    domain, general: iterators over records (dict), each read once. A side's records come in a new order in every epoch,
    none twice within one; each gets "source_type", the name of its side. total None: every domain record once.
    Returns {"total", "seed", "warnings", "domain": {"records", "written", "epochs"}, "general": ...}.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already; choose another --out or add --overwrite")
    if total is None and not ratio:
        raise UserError("without --total-samples the domain file gives the length, but --domain-ratio is 0")
    make_folder(out.parent)
    with naming_full_disks(out):
        # Records are drawn in random order and may not fit in memory: they wait in a file, and their places in it here.
        with tempfile.TemporaryFile(dir=out.parent) as spool:
            places = {"domain": [], "general": []}
            for side, records in (("domain", domain), ("general", general)):
                for record in records:
                    places[side].append(spool.tell())
                    spool.write(to_line({**record, "source_type": side}))
            total = round(len(places["domain"]) / ratio) if total is None else total
            written = {"domain": round(total * ratio), "general": total - round(total * ratio)}
            for side, n in written.items():
                if not total or (n and not len(places[side])):
                    raise UserError(f"the {side} files hold no records, but {n or 'some'} are wanted of them")
            epochs = {side: n / max(1, len(places[side])) for side, n in written.items()}
            sides = {side: SourceConfig(role=side, max_epochs=max_epochs) for side in written}
            refusals, warnings = judge_epochs(epochs, sides, "--max-epochs {1}")
            if refusals:
                raise UserError(refusals[0])
            lines = np.concatenate([_draw(side, n, places[side], seed) for side, n in written.items()])
            with new_file(out, "wb") as file:
                for line in permute(np.arange(total), total, mix_keys(seed, "mix")).tolist():
                    spool.seek(int(lines[line]))
                    file.write(spool.readline())
    return {"total": total, "seed": seed, "warnings": warnings,
            **{side: {"records": len(places[side]), "written": n, "epochs": epochs[side]}
               for side, n in written.items()}}


def _draw(side: str, n: int, places: list[int], seed: int) -> np.ndarray:
    """The places of n records: epoch after epoch, each a permutation of all. 5 of 3 records: 2 0 1, then 1 2."""
    epoch, position = np.divmod(np.arange(n), len(places))
    return np.array(places, np.int64)[permute(position, len(places), mix_keys(seed, side, "mix", epoch))]
