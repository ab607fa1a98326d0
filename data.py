"""Shards -> batches, each a pure function of (seed, step) and the shards' manifests; and the commands around shards.

    python data.py pack --tokenizer DIR_OR_FILE --out shards/legal legal.txt --documents blank
    python data.py pack --buckets 10 --score quality --tokenizer DIR_OR_FILE --out shards/legal kept.jsonl
    python data.py pack --part 3/8 --tokenizer DIR_OR_FILE --out shards/wiki wiki/*.jsonl.gz     on each of 8 machines
    python data.py manifest --merge shards/wiki                                                 then once
    python data.py pack --tokenizer gpt2 --out shards/web openwebtext/train.bin                  token files of others
    python data.py verify shards/legal
    python data.py info shards/legal
    python data.py mix recipes/cpt.toml --preview --data.schedule staged --train.steps 1000
    python data.py mix --domain legal.jsonl --general wiki.jsonl --out mixed.jsonl --domain-ratio 0.7

corpus.py reads documents, shards.py keeps their tokens on disk, mixture.py says which source comes when; here stands
the order. B sequences a step, T tokens of context, L tokens of a source.
"""

import core.threads

import argparse
import bisect
import dataclasses
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from core.config import ArgumentParser, main_guard, merge, parse, read_toml, to_toml, write_json
from core.hashing import fmix64, mix_keys, permute
from text import mixture
from text.corpus import read_documents, read_records, utf8
from text.foreign import holds_tokens, read_token_documents
from text.mixture import DataConfig, LengthConfig, SourceConfig
from text.shards import (
    SPLITS,
    Shards,
    deal,
    merge_parts,
    open_buckets,
    pack,
    pack_buckets,
    packed_folders,
    part_folder,
    read_buckets,
    read_manifest,
    sync_and_close,
    verify,
)

ORDER_VERSION = 1                                  # raise it when the same seed gives another order
IGNORE = -100
MIX_HELP = """Show what a recipe draws when, as a table and a picture; --data.* and --train.* settings come last:

    python data.py mix recipes/cpt.toml --preview --data.schedule staged --train.steps 1000

or write a mixed JSONL for other tools, each record with its source_type:

    python data.py mix --domain legal.jsonl --general wiki.jsonl --out mixed.jsonl --domain-ratio 0.7"""


class RowRandom:
    """Random numbers of a batch's rows: a function of (seed, step, row of the step, stream, position) and no state."""

    def __init__(self, keys: np.ndarray):
        self.keys = keys                                     # uint64 [B]

    def uniform(self, stream: int, n: int) -> torch.Tensor:
        """float32 [B, n] in [0, 1)."""
        key = fmix64(self.keys + np.uint64(stream * 0x9E3779B97F4A7C15 % 2**64))[:, None]
        bits = fmix64(key + np.arange(n, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)) >> np.uint64(40)
        return torch.from_numpy(bits.astype(np.float32) / np.float32(2**24))


# ---- loader: which tokens make a row, which rows make a batch

@dataclass
class Batch:
    """Rows of T + 1 tokens: the inputs are the first T, and the objective shifts once to find the targets."""

    tokens: torch.Tensor            # int32 [B, T + 1]
    labels: torch.Tensor            # int32 [B, T + 1], the tokens, -100 in padding
    position_ids: torch.Tensor      # int32 [B, T + 1]
    doc_start: torch.Tensor         # int32 [B, T + 1], where in the row each position's document begins
    source: np.ndarray              # int64 [B], which source a row is from
    rng: RowRandom

    def to(self, device) -> "Batch":
        move = {name: getattr(self, name).to(device, non_blocking=True)
                for name in ("tokens", "labels", "position_ids", "doc_start")}
        return Batch(**move, source=self.source, rng=self.rng)


class Windows:
    """A source as a circle of L tokens, cut anew at another offset every epoch into ceil(L / T) windows of T + 1 tokens
    at a stride of T: each token is a target exactly once an epoch, and only the last window is short (with drop_last
    left out)."""

    def __init__(self, shards: Shards, context: int, drop_last: bool = False):
        self.shards, self.context = shards, context
        L = shards.tokens
        self.rows = max(1, L // context if drop_last else -(-L // context))
        self.padded, self.dropped = max(0, self.rows * context - L), max(0, L - self.rows * context)

    def fill(self, row: int, key: int, tokens: np.ndarray, labels: np.ndarray, doc_start: np.ndarray) -> int:
        """Write a row of the epoch that `key` stands for into three arrays [T + 1]; returns where its padding begins.
        doc_start is marked where a document begins, and only there."""
        T, L = self.context, self.shards.tokens
        end = min(T, L - row * T) + 1
        self.shards.read(key % L + row * T, tokens[:end], doc_start[:end])
        labels[:end] = tokens[:end]
        return end


class Documents:
    """Rows that begin with a document. One of more than T + 1 tokens is cut into pieces at a stride of T, so that
    nothing is lost and each token but a document's first is a target exactly once an epoch.

    best_fit: documents and pieces share rows, each put where it leaves the least room; otherwise each has its own row.
    About 40 bytes of memory a document.
    """

    def __init__(self, shards: Shards, context: int, best_fit: bool):
        self.shards, T = shards, context
        ends = shards.document_ends()
        lengths = np.diff(ends, prepend=0)
        parts = np.maximum(1, -(-(lengths - 1) // T))
        part = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        begin = np.repeat(ends - lengths, parts) + part * T
        length = np.minimum(np.repeat(lengths, parts) - part * T, T + 1)
        row = best_fit_decreasing(length, T + 1) if best_fit else np.arange(len(length))
        order = np.argsort(row, kind="stable")
        self.pieces = np.stack([begin, length, part > 0], axis=1)[order]       # [pieces, 3], row by row
        self.first = np.cumsum([0, *np.bincount(row)])                         # [rows + 1], each row's first piece
        self.rows = len(self.first) - 1
        self.padded, self.dropped = self.rows * (T + 1) - int(length.sum()), 0

    def fill(self, row: int, key: int, tokens: np.ndarray, labels: np.ndarray, doc_start: np.ndarray) -> int:
        """As Windows.fill; the rows are the same in every epoch."""
        at = 0
        for begin, length, continued in self.pieces[self.first[row]:self.first[row + 1]].tolist():
            end = at + length
            self.shards.read(begin, tokens[at:end], doc_start[at:end])
            doc_start[at] = at
            labels[at:end] = tokens[at:end]
            if continued:
                labels[at] = IGNORE                  # it was a target in the piece before
            at = end
        return at


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [n]: the bin of each size, largest first, each into the fullest bin that has room for it.

    Packing documents so cuts none that fits (Ding et al. 2024, arXiv 2404.10830). Equal sizes are placed together, so
    that the work goes with the pairs of size and room and not with n (as in Krell et al. 2021, arXiv 2107.02027).
    """
    order, bins, count = np.argsort(-sizes, kind="stable"), np.empty(len(sizes), np.int64), 0
    rooms, ids = [], {}                              # the rooms there are, rising; the bins with that room

    def give_back(room, those):
        if room and len(those):
            if room not in ids:
                bisect.insort(rooms, room)
            ids.setdefault(room, []).append(those)

    for items in np.split(order, np.flatnonzero(np.diff(sizes[order])) + 1):
        size = int(sizes[items[0]])
        while len(items):
            place = bisect.bisect_left(rooms, size)
            if place < len(rooms):
                room = rooms.pop(place)
                those = np.concatenate(ids.pop(room))
            else:
                room = capacity
                those = np.arange(count, count - (-len(items) // (capacity // size)))
                count = int(those[-1]) + 1
            each = room // size                      # a bin filled with them stays the fullest until it is full
            used, last = divmod(min(len(items), len(those) * each), each)
            taken = used * each + last
            bins[items[:taken]] = np.repeat(those[:used + 1], each)[:taken]
            give_back(room - each * size, those[:used])
            if last:
                give_back(room - last * size, those[used:used + 1])
            give_back(room, those[used + bool(last):])
            items = items[taken:]
    return bins


class Loader:
    """rows(step, lo, hi): rows lo to hi of the step's global batch of B rows, a pure function of its arguments.

    `packing` makes rows of a source: "window", "best_fit" or "document". Its rows come in a keyed permutation of every
    epoch's own, sources as `counts` [steps + 1, D] says (None until there is a plan).
    """

    def __init__(self, sources: dict[str, Shards], counts: np.ndarray | None, context: int, seed: int,
                 drop_last: bool = False, reset_positions: bool = True, packing: str = "window"):
        self.names, self.shards = list(sources), list(sources.values())
        self.counts, self.context, self.seed, self.reset_positions = counts, context, seed, reset_positions
        for name, shards in sources.items():
            if not shards.tokens:
                raise ValueError(f"source {name} ({shards.folder}) has no tokens in its {shards.split} split")
        self.packings = [Windows(shards, context, drop_last) if packing == "window"
                         else Documents(shards, context, packing == "best_fit") for shards in self.shards]

    def slots(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(source [B], how many rows of that source came before [B]) of each row of a step."""
        before = self.counts[step]
        taken = self.counts[step + 1] - before
        source = np.repeat(np.arange(len(taken)), taken)
        ordinal = np.arange(len(source)) - np.repeat(np.cumsum(taken) - taken, taken) + before[source]
        order = permute(np.arange(len(source)), len(source), mix_keys(self.seed, "slots", step))
        return source[order], ordinal[order]

    def rows(self, step: int, lo: int = 0, hi: int | None = None) -> Batch:
        T = self.context
        source, ordinal = (a[lo:hi] for a in self.slots(step))
        B = len(source)
        tokens, doc_start = np.zeros((B, T + 1), np.int32), np.zeros((B, T + 1), np.int32)
        labels = np.full((B, T + 1), IGNORE, np.int32)
        for i in np.unique(source):
            packing, mine = self.packings[i], np.flatnonzero(source == i)
            epoch, position = np.divmod(ordinal[mine], packing.rows)
            place = permute(position, packing.rows, mix_keys(self.seed, self.names[i], "window", epoch))
            key = mix_keys(self.seed, self.names[i], "offset", epoch)
            for row, at, k in zip(mine.tolist(), place.tolist(), key.tolist()):
                end = packing.fill(at, k, tokens[row], labels[row], doc_start[row])
                if end <= T:
                    doc_start[row, end] = end        # padding is a document of its own
        np.maximum.accumulate(doc_start, axis=1, out=doc_start)
        position = np.arange(T + 1, dtype=np.int32)
        positions = position - doc_start if self.reset_positions else np.broadcast_to(position, tokens.shape).copy()
        keys = mix_keys(self.seed, "rows", step, np.arange(lo, lo + B))
        return Batch(*(torch.from_numpy(a) for a in (tokens, labels, positions, doc_start)), source, RowRandom(keys))

    def sequences(self) -> dict[str, int]:
        """Rows an epoch of each source."""
        return {name: packing.rows for name, packing in zip(self.names, self.packings)}

    def epochs(self, step: int) -> dict[str, float]:
        """How often each source has been read before `step`."""
        return {name: float(n / rows) for n, (name, rows) in zip(self.counts[step], self.sequences().items())}


# ---- mixed text for other tools

def mix_files(domain, general, out, *, ratio: float = 0.7, total: int | None = None, seed: int = 0,
              max_epochs: float = SourceConfig.max_epochs, overwrite: bool = False) -> dict:
    """Write `total` records to the JSONL file `out`, the share `ratio` of them from `domain`, in an order of `seed`.

    domain, general: iterators over records (dict). A side's records come in a new order every epoch, none twice within
    one; each gets "source_type", the name of its side. total None: every domain record once. Returns what was done.
    """
    if seed < 0:
        raise ValueError(f"--seed is {seed}, but must be 0 or more")
    if Path(out).exists() and not overwrite:
        raise ValueError(f"{out} exists already; choose another --out or add --overwrite")
    if not 0 <= ratio <= 1:
        raise ValueError(f"--domain-ratio is {ratio}, but must be between 0 and 1")
    if total is None and not ratio:
        raise ValueError("without --total-samples the domain file gives the length, but --domain-ratio is 0")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.partial")
    try:
        with tempfile.TemporaryFile(dir=out.parent) as spool:
            places = {"domain": _spool(domain, "domain", spool), "general": _spool(general, "general", spool)}
            total = round(len(places["domain"]) / ratio) if total is None else total
            if total < 1:
                raise ValueError(f"{total} samples were asked for, or the domain files hold no records; there must be "
                                 f"at least 1")
            wanted = {"domain": round(total * ratio)}
            wanted["general"] = total - wanted["domain"]
            for side, n in wanted.items():
                if n and not len(places[side]):
                    raise ValueError(f"the {side} files hold no records, but {n} are wanted of them")
            epochs = {side: n / max(1, len(places[side])) for side, n in wanted.items()}
            sides = {side: SourceConfig(role=side, max_epochs=max_epochs) for side in wanted}
            warnings = mixture.check_epochs(epochs, sides, "--max-epochs {1}")
            lines = np.concatenate([_draw(side, n, places[side], seed) for side, n in wanted.items()])
            with open(temporary, "wb") as file:
                for line in permute(np.arange(total), total, mix_keys(seed, "mix")).tolist():
                    spool.seek(int(lines[line]))
                    file.write(spool.readline())
                sync_and_close(file)
        os.replace(temporary, out)
    except OSError as error:
        raise ValueError(f"{out} could not be written: {error.strerror or error}; nothing is left of it") from None
    finally:
        temporary.unlink(missing_ok=True)
    return {"total": total, "seed": seed, "warnings": warnings,
            **{side: {"records": len(places[side]), "written": n, "epochs": epochs[side]}
               for side, n in wanted.items()}}


def _spool(records, side, spool) -> np.ndarray:
    """Where each record stands in the file it was written to."""
    places = [spool.tell()]
    for record in records:
        line = json.dumps({**record, "source_type": side}, ensure_ascii=False, default=str)
        spool.write(utf8(line) + b"\n")
        places.append(spool.tell())
    return np.array(places[:-1], np.int64)


def _draw(side, n, places, seed) -> np.ndarray:
    epoch, position = np.divmod(np.arange(n), max(1, len(places)))
    order = permute(position, len(places), mix_keys(seed, side, "mix", epoch)) if n else position
    return places[order]


# ---- command line

def cli_pack(args):
    import tokenizer as tokenizers

    if (args.buckets is None) != (args.score is None) or (args.first and not args.score):
        raise ValueError("--buckets K and --score NAME go together, and --first with them")
    if args.part and args.buckets:
        raise ValueError("--part and --buckets do not go together: a bucket's bounds come from all scores at once")
    k, n = args.part or (1, 1)
    out = part_folder(args.out, k, n) if args.part else args.out
    if args.buckets and any(map(holds_tokens, args.files)):
        raise ValueError("--buckets orders records by a score, and token files carry none; pack them without")
    tokenizer = tokenizers.load(args.tokenizer)
    for path in args.files:                    # all of them, before any work
        if holds_tokens(path):
            next(read_token_documents(path, tokenizer, args.dtype), None)
        else:
            next(read_documents(path, args.documents, args.separator, args.column, args.config, args.split), None)
    start, bar = time.perf_counter(), tqdm(unit="B", unit_scale=True, disable=None, desc="pack")

    def records(files=args.files):
        for path in files:
            for record in read_records(path, args.documents, args.separator, args.column, args.config, args.split,
                                       only=[args.column] if not args.score else None):
                bar.update(len(record[1][args.column]))
                yield record

    def texts(files):
        for path in files:
            if holds_tokens(path):
                for ids in read_token_documents(path, tokenizer, args.dtype):
                    bar.update(ids.nbytes // 2)
                    yield ids
            else:
                yield from (record[args.column] for _, record in records([path]))

    inputs = [{"name": Path(f).name, "bytes": os.path.getsize(f) if os.path.isfile(f) else None} for f in args.files]
    options = {"heldout": args.heldout, "bos": args.bos, "shard_tokens": args.shard_tokens, "workers": args.workers,
               "inputs": inputs, "overwrite": args.overwrite}
    if args.buckets:
        first = args.first or ("high" if "quality" in args.score else "low")
        pack_buckets(records, tokenizer, out, args.buckets, args.score, first=first, column=args.column, **options)
    else:
        pack(deal(args.files, texts, k, n), tokenizer, out, part=bool(args.part), **options)
    bar.close()
    seconds = time.perf_counter() - start
    manifests = [read_manifest(folder) for folder in packed_folders(out)]
    total = sum(s["tokens"] for manifest in manifests for s in manifest["splits"].values())
    print(f"packed {total:,} tokens in {seconds:.1f} s ({total / seconds / 1e6:.2f} M tokens/s) into {out}")
    if not any(manifest["splits"]["heldout"]["documents"] for manifest in manifests) and args.heldout:
        print("warning: no document fell into the held-out share, so this source cannot be evaluated; "
              "cut the text into more documents (--documents) or raise --heldout", file=sys.stderr)
    return print_info(out, args.json)


def print_info(folder, json_file=None):
    index = read_buckets(folder)
    manifests = [read_manifest(path) for path in packed_folders(folder)]
    for k, manifest in enumerate(manifests):
        if index:
            part = index["buckets"][k]
            print(f"{part['name']}, read {'first' if not k else 'next' if k < len(manifests) - 1 else 'last'}: "
                  f"{index['score']} from {part['low']:g} to {part['high']:g}")
        for split in SPLITS:
            s = manifest["splits"][split]
            ratio = f"{s['tokens'] / s['bytes']:.3f} tokens per byte" if s["bytes"] else ""
            print(f"  {split:8} {s['documents']:>10,} documents {s['tokens']:>14,} tokens {s['bytes']:>14,} bytes  "
                  f"{ratio}".rstrip(" "))
    t = manifest["tokenizer"]
    print(f"  {manifest['dtype']}, {t['library']}, vocabulary {t['vocab_size']:,}, "
          f"{'BOS, ' if manifest['bos'] else ''}EOS; {sum(m['empty_documents_dropped'] for m in manifests)} empty "
          f"documents dropped")
    if json_file:
        write_json(json_file, {**index, "manifests": manifests} if index else manifest)


@dataclass
class MixSettings:
    """What of a recipe decides the mix."""

    data: DataConfig = field(default_factory=DataConfig)
    train: LengthConfig = field(default_factory=LengthConfig)


def cli_preview(args, words):
    recipe, known = read_toml(args.recipe), {f.name for f in dataclasses.fields(LengthConfig)}
    length = {key: value for key, value in recipe.get("train", {}).items() if key in known}
    settings = merge(MixSettings(), {"data": recipe.get("data", {}), "train": length})
    with tempfile.TemporaryDirectory() as folder:              # of the recipe only what MixSettings knows
        file = Path(folder) / "mix.toml"
        file.write_text(to_toml(settings), encoding="utf-8")
        settings = parse(MixSettings, [str(file), *words])
    if not settings.data.sources:
        raise ValueError(f"{args.recipe} names no source; add one, e.g. --data.sources.domain.path shards/legal")
    packed = {name: Path(source.path).is_dir() for name, source in settings.data.sources.items() if source.path}
    if not all(packed.get(name) for name in settings.data.sources) and not (settings.train.steps
                                                                           or settings.train.tokens):
        missing = next(name for name in settings.data.sources if not packed.get(name))
        raise ValueError(f"data.sources.{missing}.path is no folder, so an epoch has no length; make it with data.py "
                         f"pack, or give --train.steps")
    sources = open_buckets(settings.data.sources)
    shards = {name: Shards(s.path) for name, s in sources.items() if s.path and Path(s.path).is_dir()}
    T = settings.data.context
    rows_of = Loader(shards, None, T, 0, settings.data.drop_last, packing=settings.data.packing).sequences()
    counts = mixture.make_plan(settings.data, settings.train, sources, rows_of)
    steps, drawn = len(counts) - 1, dict(zip(sources, counts[-1].tolist()))
    epochs = {name: drawn[name] / rows for name, rows in rows_of.items()}
    rows, out = mixture.realised(settings.data, sources, counts, 10), Path(args.out or "out/mix.png")
    title = f"{settings.data.schedule}, {steps:,} steps of {settings.train.batch_size} sequences"
    print(f"{title} of {T} tokens\n\n{'steps':>17} {'wanted':>8} {'domain':>8}   "
          + " ".join(f"{name[-12:]:>12}" for name in sources))
    for row in rows:
        print(f"{row['first_step']:>8}-{row['last_step']:<8} {row['wanted']:>8.3f} {row['domain']:>8.3f}   "
              + " ".join(f"{share:>12.3f}" for share in row["sources"].values()))
    print()
    for name, source in sources.items():
        read = f", read {epochs[name]:.2f} times" if name in epochs else ""
        print(f"{name} ({source.role}{', ' + source.stratum if source.stratum else ''}): {drawn[name]:,} sequences, "
              f"{drawn[name] * T:,} positions{read}")
    shares, empty = mixture.replay_strata(sources, settings.data.strata)
    notes = mixture.notes(settings.data, sources)
    try:
        notes += mixture.check_epochs(epochs, sources)
    except ValueError as error:
        notes.append(f"warning: train.py refuses this plan: {error}")
    print("".join(line + "\n" for line in notes), end="")
    out.parent.mkdir(parents=True, exist_ok=True)
    mixture.draw(out, title, sources, mixture.realised(settings.data, sources, counts, 200))
    print(f"picture: {out}")
    if args.json:
        write_json(args.json, {"steps": steps, "batch_size": settings.train.batch_size, "context": T, "rows": rows,
                               "schedule": settings.data.schedule, "sequences": drawn, "epochs": epochs,
                               "strata": shares, "empty_strata": empty, "notes": notes, "picture": str(out)})


def cli_mix(args):
    def records(files):
        for path in files:
            for _, record in read_records(path, args.documents, args.separator, args.column, args.config, args.split):
                yield record

    done = mix_files(records(args.domain), records(args.general), args.out, ratio=args.domain_ratio,
                     total=args.total_samples, seed=args.seed, max_epochs=args.max_epochs,
                     overwrite=args.overwrite)
    for side in ("domain", "general"):
        print(f"{side}: {done[side]['written']:,} of {done['total']:,} samples from {done[side]['records']:,} records, "
              f"read {done[side]['epochs']:.2f} times")
    for warning in done["warnings"]:
        print(warning, file=sys.stderr)
    print(f"mixed into {args.out}, seed {args.seed}")
    if args.json:
        write_json(args.json, done)


def _reader_options(p):
    p.add_argument("--documents", choices=("line", "blank", "file"), default="blank",
                   help="a document of a text file is a line, a block between blank lines (default), or the file")
    p.add_argument("--separator", help="documents of a text file stand between this string")
    p.add_argument("--column", default="text", help="where a record keeps its text (default: text)")
    p.add_argument("--config", help="configuration of a Hub dataset")
    p.add_argument("--split", default="train", help="split of a Hub dataset (default: train)")


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= 9999:
        raise argparse.ArgumentTypeError(f"{text!r} is no part; write K/N with K from 1 to N, e.g. 3/8")
    return int(match[1]), int(match[2])


def main():
    words = sys.argv[1:]
    settings = next((i for i, w in enumerate(words) if w.startswith(("--data.", "--train."))), len(words))
    parser = ArgumentParser(prog="data.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=ArgumentParser)
    p = commands.add_parser("pack", help="tokenise files into shards", description="Tokenise files into shards.")
    p.add_argument("files", nargs="+", metavar="FILE", help=".txt, .jsonl[.gz|.zst], .parquet, hf://org/dataset, "
                                                          "or token files of datatrove, Megatron, llm.c, nanoGPT")
    p.add_argument("--tokenizer", required=True, help="a model folder or a tokenizer file")
    p.add_argument("--out", required=True, help="folder to make")
    _reader_options(p)
    p.add_argument("--heldout", type=float, default=0.02, help="share of documents kept for evaluation (default: 0.02)")
    p.add_argument("--bos", action="store_true", default=None, help="BOS before each document, whatever the tokenizer")
    p.add_argument("--no-bos", action="store_false", dest="bos", help="no BOS before documents")
    p.add_argument("--shard-tokens", type=int, default=10**8, help="tokens a shard (default: 1e8)")
    p.add_argument("--workers", type=int, default=2, help="batches tokenised at a time (default: 2)")
    p.add_argument("--dtype", choices=("uint16", "uint32"),
                   help="of raw token files (default: what the vocabulary needs)")
    p.add_argument("--part", type=_part, metavar="K/N", help="pack the K-th of N parts, each by a machine of its own, "
                                                             "then join them with manifest --merge")
    p.add_argument("--buckets", type=int, metavar="K", help="split the documents into K folders by --score; a source "
                                                            "of such buckets can be read in their order")
    p.add_argument("--score", metavar="NAME", help="number under metadata.scores of each record to split by")
    p.add_argument("--first", choices=("low", "high"), help="end of the score that is read first "
                                                            "(default: high for quality, low for any other)")
    p.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    p.add_argument("--json", metavar="FILE", help="write the manifest there too")
    p = commands.add_parser("manifest", help="join the parts that many machines have packed")
    p.add_argument("--merge", required=True, metavar="DIR", help="folder that was the parts' --out")
    p.add_argument("--json", metavar="FILE", help="write the manifest there too")
    p = commands.add_parser("verify", help="hash every shard against the manifest")
    p.add_argument("dir")
    p = commands.add_parser("info", help="what a packed folder holds")
    p.add_argument("dir")
    p.add_argument("--json", metavar="FILE", help="write the manifest there too")
    p = commands.add_parser("mix", help="show a recipe's mix, or write a mixed JSONL", description=MIX_HELP)
    p.add_argument("recipe", nargs="?", metavar="RECIPE", help="a recipe of train.py")
    p.add_argument("--preview", action="store_true", help="draw what the recipe's schedule draws")
    p.add_argument("--domain", nargs="+", metavar="FILE", help="files of the domain")
    p.add_argument("--general", nargs="+", metavar="FILE", help="files of general text")
    p.add_argument("--out", metavar="FILE", help="the mixed JSONL; of --preview the picture (default: out/mix.png)")
    p.add_argument("--domain-ratio", type=float, default=0.7, help="share of domain records (default: 0.7)")
    p.add_argument("--total-samples", type=int, metavar="N", help="records (default: each of the domain once)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--overwrite", action="store_true", help="replace the mixed JSONL if it exists")
    p.add_argument("--max-epochs", type=float, default=SourceConfig.max_epochs,
                   help="refuse to repeat a side more often (default: 16)")
    _reader_options(p)
    p.add_argument("--json", metavar="FILE", help="write what is printed there too")
    args = parser.parse_args(words[:settings])
    if settings < len(words) and not (args.command == "mix" and args.preview):
        parser.error(f"unknown argument {words[settings]}")
    if args.command == "pack":
        return cli_pack(args)
    if args.command == "manifest":
        merge_parts(args.merge)
        return print_info(args.merge, args.json)
    if args.command == "mix":
        if args.preview and args.recipe and not args.domain and not args.general:
            return cli_preview(args, words[settings:])
        if args.recipe or args.preview or not (args.domain and args.general and args.out):
            parser.error("mix wants either RECIPE --preview, or --domain, --general and --out")
        return cli_mix(args)
    if args.command == "verify":
        total = sum(verify(folder) for folder in packed_folders(args.dir))
        print(f"{args.dir}: {total:,} bytes have the hashes they were written with")
        return 0
    return print_info(args.dir, args.json)


if __name__ == "__main__":
    sys.exit(main_guard(main))
