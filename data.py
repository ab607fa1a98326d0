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
import dataclasses
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

from core.cli import Reading
from core.config import ArgumentParser, main_guard, merge, parse, read_toml, to_toml, write_json
from core.hashing import fmix64, mix_keys, permute
from kernels.cross_entropy import IGNORE
from text import mixture
from text.corpus import read_documents, read_records
from text.foreign import holds_tokens, read_token_documents
from text.mixed_jsonl import mix_files
from text.mixture import DataConfig, LengthConfig, SourceConfig
from text.packing import PackedSources, Sequences, pack_sources
from text.parts import (
    deal_documents,
    merge_parts,
    open_buckets,
    pack_buckets,
    packed_folders,
    part_folder,
    read_buckets,
)
from text.shards import SPLITS, Shards, pack, read_manifest, verify

ORDER_VERSION = 1                                  # raise it when the same seed gives another order
MIX_HELP = """Show what a recipe draws when, as a table and a picture; --data.* and --train.* settings come last:

    python data.py mix recipes/cpt.toml --preview --data.schedule staged --train.steps 1000

or write a mixed JSONL for other tools, each record with its source_type:

    python data.py mix --domain legal.jsonl --general wiki.jsonl --out mixed.jsonl --domain-ratio 0.7"""


class RowRandom:
    """Random values for the sequences of a batch, the same on every rank layout: a function of (seed, step, place in
    the step, stream, position) alone."""

    def __init__(self, keys: np.ndarray):
        self.keys = keys             # uint64 [B]

    def uniform(self, stream: int, n: int) -> torch.Tensor:
        """float32 [B, n] in [0, 1). Another `stream` gives other values, independent of the first."""
        key = fmix64(self.keys + np.uint64(stream * 0x9E3779B97F4A7C15 % 2**64))[:, None]
        bits = fmix64(key + np.arange(n, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)) >> np.uint64(40)
        return torch.from_numpy(bits.astype(np.float32) / np.float32(2**24))


@dataclass
class Batch:
    """B sequences of T + 1 tokens; the objective shifts once, after which they are T inputs and T targets."""

    tokens: torch.Tensor            # int32 [B, T + 1]
    labels: torch.Tensor            # int32 [B, T + 1]: the tokens, -100 where nothing is to be learned
    position_ids: torch.Tensor      # int32 [B, T + 1]
    doc_start: torch.Tensor         # int32 [B, T + 1]: where in its sequence each position's document begins
    source: np.ndarray              # int64 [B]: which source each sequence is from
    rng: RowRandom | None

    @classmethod
    def of(cls, sequences: Sequences, source: np.ndarray | None = None, rng: RowRandom | None = None,
           reset_positions: bool = True) -> "Batch":
        """The batch of filled sequences; positions count from each document's begin, or along the whole sequence.
        Text to be scored is from one source and needs no random values until an objective masks it."""
        doc_start = sequences.close()
        source = np.zeros(len(doc_start), np.int64) if source is None else source
        positions = np.broadcast_to(np.arange(doc_start.shape[1], dtype=np.int32), doc_start.shape)
        positions = positions - doc_start if reset_positions else positions.copy()
        return cls(*map(torch.from_numpy, (sequences.tokens, sequences.labels, positions, doc_start)), source, rng)

    def to(self, device) -> "Batch":
        """The batch with its tensors on `device`; `source` and `rng` stay on the CPU."""
        moved = {name: getattr(self, name).to(device, non_blocking=True)
                 for name in ("tokens", "labels", "position_ids", "doc_start")}
        return Batch(**moved, source=self.source, rng=self.rng)


class Loader:
    """batch(step): the step's sequences, a pure function of (seed, step), the plan and the shards' manifests.

    packed: the sources in sequences (text/packing.py). plan: int64 [steps + 1, S], how many sequences of each source
    come before each step (text/mixture.py). A source's sequences come in another order in every epoch.
    """

    def __init__(self, packed: PackedSources, plan: np.ndarray, seed: int):
        self.packed, self.plan, self.seed = packed, plan, seed
        self.names, self.packings = list(packed.packings), list(packed.packings.values())
        self.shards = [packing.shards for packing in self.packings]

    def batch(self, step: int, first: int = 0, last: int | None = None) -> Batch:
        """Sequences `first` to `last` (without it; default: all) of a step's global batch: the part of one rank, or of
        one micro-batch."""
        before = self.plan[step]
        taken = self.plan[step + 1] - before
        B = int(taken.sum())
        # For each place in the global batch: its source, and how many sequences of that source came before in the run.
        source = np.repeat(np.arange(len(taken)), taken)
        ordinal = np.arange(B) - np.repeat(np.cumsum(taken) - taken, taken) + before[source]
        order = permute(np.arange(B), B, mix_keys(self.seed, "slots", step))[first:last]
        source, ordinal = source[order], ordinal[order]

        sequences = Sequences(len(order), self.packed.context + 1)
        for i in np.unique(source):
            packing, name = self.packings[i], self.names[i]
            rows = np.flatnonzero(source == i)
            epoch, position = np.divmod(ordinal[rows], packing.rows)
            place = permute(position, packing.rows, mix_keys(self.seed, name, "window", epoch))
            offset = mix_keys(self.seed, name, "offset", epoch)
            for row, at, key in zip(rows.tolist(), place.tolist(), offset.tolist()):
                for begin, length, was_target in packing.pieces(at, key):
                    tokens, begins = packing.shards.read(begin, length)
                    sequences.append(row, tokens, tokens, begins)
                    if was_target:
                        sequences.labels[row, sequences.end[row] - length] = IGNORE
        keys = mix_keys(self.seed, "rows", step, np.arange(first, first + len(order)))
        return Batch.of(sequences, source, RowRandom(keys), self.packed.reset_positions)

    def epochs(self, step: int) -> dict[str, float]:
        """How often each source has been read before `step`."""
        return {name: float(n / rows) for n, (name, rows) in zip(self.plan[step], self.packed.rows_per_epoch.items())}


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
    reading = Reading(args.documents, args.separator, args.column, args.config, args.split)
    for path in args.files:                    # all of them, before any work
        if holds_tokens(path):
            next(read_token_documents(path, tokenizer, args.dtype), None)
        else:
            next(read_documents([path], reading), None)
    start, bar = time.perf_counter(), tqdm(unit="B", unit_scale=True, disable=None, desc="pack")

    def records(files=args.files):
        for record in read_records(files, reading, only=[args.column] if not args.score else None):
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
        pack(deal_documents(args.files, texts, k, n), tokenizer, out, allow_empty=bool(args.part), **options)
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
    rows_of = pack_sources(shards, settings.data).rows_per_epoch
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
        reading = Reading(args.documents, args.separator, args.column, args.config, args.split)
        return (record for _, record in read_records(files, reading))

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
