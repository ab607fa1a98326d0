"""Shards -> batches, each a pure function of (seed, step) and the shards' manifests; and the commands around shards.

    python data.py pack --tokenizer DIR_OR_FILE --out shards/legal legal.txt
    python data.py pack --part 3/8 --tokenizer DIR_OR_FILE --out shards/wiki wiki/*.jsonl.gz     on each of 8 machines
    python data.py manifest --merge shards/wiki                                                 then once
    python data.py verify shards/legal
    python data.py mix recipes/cpt.toml --preview --data.schedule staged --train.steps 1000
    python data.py mix --domain legal.jsonl --general wiki.jsonl --out mixed.jsonl

B sequences per step, T tokens of context, S sources.
"""

import core.threads

import functools
import itertools
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import tokenizer as tokenizers
from core import cli
from core.cli import Output, Positional, Reading
from core.config import setting
from core.errors import UserError
from core.hashing import fmix64, mix_keys, permute
from text import chat, foreign, mixture, shards
from text.conversations import RECORDS
from text.corpus import describe_inputs, read_records
from text.kinds import TEXTS, identify, list_files
from text.mixture import DataConfig, SourceConfig
from text.packing import Packing, Sequences
from text.template import read_template
from text.vocabulary import measure_loss

# Raise it when the same seed gives another order.
ORDER_VERSION = 1


class RowRandom:
    """Random values for the sequences of a batch: a function of the stream, the position and `keys`, uint64 [B], one
    for each (seed, source, epoch, number of the sequence in the source). So they are the same on every rank layout and
    at every batch size, and others in every epoch."""

    def __init__(self, keys: np.ndarray):
        self.keys = keys

    def uniform(self, stream: int, n: int) -> torch.Tensor:
        """float32 [B, n] in [0, 1). Another `stream` gives other values, independent of the first."""
        key = fmix64(self.keys + np.uint64(stream * 0x9E3779B97F4A7C15 % 2**64))[:, None]
        bits = fmix64(key + np.arange(n, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)) >> np.uint64(40)
        return torch.from_numpy(bits.astype(np.float32) / np.float32(2**24))


@dataclass
class Batch:
    """B sequences of T + 1 tokens; the objective shifts once, after which they are T inputs and T targets."""

    # int32 [B, T + 1], as Sequences.finish gives them; labels are the tokens, or -100 where nothing is to be learned.
    tokens: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    doc_start: torch.Tensor
    # int64 [B]: which source each sequence is from. Text to be scored has none, and is given an rng only to be masked.
    source: np.ndarray | None = None
    rng: RowRandom | None = None
    # int64 [B]: which sequence of its source each is, and which objective of a mixture it has.
    place: np.ndarray | None = None
    task: np.ndarray | None = None
    # bool [B, T]: which tokens have a target, where another rank has the labels (core/pipeline.py).
    counted: torch.Tensor | None = None

    def to(self, device) -> "Batch":
        """The batch with its tensors on `device`; `source` and `rng` stay on the CPU."""
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in vars(self).items()
                                if isinstance(value, torch.Tensor)})


def read_batch(packing: Packing, numbers: np.ndarray, source: int = 0) -> Batch:
    """These sequences of a source, as batches of its first epoch hold them, in the order of their `numbers`."""
    sequences = Sequences(len(numbers), packing.context + 1)
    for row, number in enumerate(numbers.tolist()):
        packing.read(number, sequences, row)
    return Batch(**sequences.finish(), source=np.full(len(numbers), source, np.int64), place=numbers,
                 rng=RowRandom(mix_keys("eval", numbers)))


class Loader:
    """batch(step): the step's sequences, a pure function of (seed, step), the plan and the shards' manifests.

    packings: the sources in sequences, in the order of the plan's columns. plan: int64 [steps + 1, S], how many
    sequences of each source come before each step. A source's sequences come in another order in every epoch.
    """

    def __init__(self, packings: dict[str, Packing], plan: np.ndarray, config: DataConfig, seed: int):
        self.plan, self.config, self.seed = plan, config, seed
        self.names, self.packings = list(packings), packings
        self.shards = {name: packing.shards for name, packing in packings.items()}

    def batch(self, step: int, first: int = 0, last: int | None = None) -> Batch:
        """The sequences from `first` to before `last` (default: all) of a step's global batch: those of a rank or of a
        micro-batch."""
        before = self.plan[step]
        taken = self.plan[step + 1] - before
        B = int(taken.sum())
        # For each place in the global batch: its source, and how many sequences of that source came before in the run.
        source = np.repeat(np.arange(len(taken)), taken)
        ordinal = np.arange(B) - np.repeat(np.cumsum(taken) - taken, taken) + before[source]
        order = permute(np.arange(B), B, mix_keys(self.seed, "slots", step))[first:last]
        source, ordinal = source[order], ordinal[order]

        sequences, place = Sequences(len(order), self.config.context + 1), np.zeros(len(order), np.int64)
        keys = np.zeros(len(order), np.uint64)
        for i, (name, packing) in enumerate(self.packings.items()):
            rows = np.flatnonzero(source == i)
            epoch, position = np.divmod(ordinal[rows], packing.sequences)
            place[rows] = permute(position, packing.sequences, mix_keys(self.seed, name, "window", epoch))
            keys[rows] = mix_keys(self.seed, name, "corrupt", epoch, place[rows])
            offset = mix_keys(self.seed, name, "offset", epoch)
            for row, key in zip(rows.tolist(), offset.tolist()):
                packing.read(int(place[row]), sequences, row, key)
        return Batch(**sequences.finish(self.config.reset_positions), source=source, place=place, rng=RowRandom(keys))

    def epochs(self, step: int) -> dict[str, float]:
        """How often each source has been read before `step`."""
        return {name: float(n / self.packings[name].sequences) for name, n in zip(self.names, self.plan[step])}


# ---- pack, info, verify, manifest

@dataclass(kw_only=True)
class Pack:
    """Tokenise files into shards."""

    files: Positional[list[str]]
    """Files, folders, patterns, @LIST or hf://org/dataset: text, .jsonl or .parquet, also .gz and .zst; or token files
    of datatrove, Megatron, llm.c and nanoGPT."""
    tokenizer: str
    """A model folder or a tokenizer file."""
    output: Output
    reading: Reading = field(default_factory=Reading)
    heldout: float = setting(0.02, at_least=0, below=1)
    """Share of the documents kept for evaluation."""
    heldout_hash: Literal["normal", "exact"] = "normal"
    """What chooses them: the text without differences of line ends and outer spaces, or (as before) its very bytes."""
    bos: bool = False
    """Put a BOS before each document, whatever the tokenizer says."""
    no_bos: bool = False
    """Put no BOS before documents, whatever the tokenizer says."""
    shard_tokens: int = setting(10**8, at_least=1, below=2**31)
    """Tokens per shard."""
    workers: int = setting(2, at_least=1)
    """Batches of documents tokenised at a time."""
    dtype: Literal["uint16", "uint32"] | None = None
    """Type of the ids in raw token files; default: what the vocabulary needs."""
    format: Literal["text", "chat", "preference"] = "text"
    """What a record is: a text, a conversation or instruction with its answer, or a prompt with two answers."""
    learn: Literal["responses", "all"] = "responses"
    """What is learned of a conversation: the assistant's answers, or all of it."""
    max_tokens: int | None = setting(None, at_least=1)
    """Leave out conversations of more tokens."""
    part: str | None = None
    """K/N packs the K-th of N parts, each on a machine of its own; join them with manifest --merge."""
    buckets: int | None = setting(None, at_least=2, at_most=100)
    """Split the documents into this many folders by --score; a curriculum reads them in their order."""
    score: str | None = None
    """The number under metadata.scores of each record to split by."""
    first: Literal["low", "high"] | None = None
    """The end of the score that is read first; default: high for quality, low for any other."""


def run_pack(options: Pack) -> dict:
    """Pack files into shards, a part of them or score buckets; returns what print_info does."""
    refuse_pack(options)
    part, is_text = shards.read_part(options.part or "1/1"), options.format == "text"
    inputs = list_files(options.files, (*TEXTS, "tokens") if is_text else RECORDS)
    out = shards.part_folder(options.output.out, *part) if options.part else options.output.out
    tokenizer, start = tokenizers.load(options.tokenizer), time.perf_counter()
    settings = {"heldout": options.heldout, "heldout_hash": options.heldout_hash, "inputs": describe_inputs(inputs),
                "shard_tokens": options.shard_tokens, "workers": options.workers,
                "overwrite": options.output.overwrite, "allow_empty": bool(options.part)}
    with tqdm(unit=" documents", disable=None, desc="pack") as bar:
        if is_text:
            pack_text(options, inputs, tokenizer, out, part, bar, settings)
        else:
            chat.pack_conversations(inputs, tokenizer, read_template(options.tokenizer), out, options.format,
                                    learn=options.learn, max_tokens=options.max_tokens, reading=options.reading,
                                    part=part, bar=bar, **settings)
    seconds = time.perf_counter() - start
    result = print_info(out)
    manifests = result.get("manifests", [result])
    tokens = sum(made["splits"][split]["tokens"] for made in manifests for split in shards.SPLITS)
    print(f"packed {tokens:,} tokens in {seconds:.1f} s ({tokens / seconds / 1e6:.2f} M tokens/s) into {out}")
    if lost := manifests[0]["lost_share"]:
        print(f"warning: {100 * lost:.2f} % of the bytes of sampled documents are in no token, so bits per byte are "
              f"too low and do not compare with another tokenizer's", file=sys.stderr)
    if options.part and not tokens:
        print("this part has no documents")
    elif options.heldout and not any(made["splits"]["heldout"]["documents"] for made in manifests):
        print("warning: no document fell into the held-out share, so this source cannot be evaluated; "
              "cut the text into more documents (--documents) or raise --heldout", file=sys.stderr)
    return result


def refuse_pack(options: Pack):
    """UserError for options of `pack` that exclude each other, and for a place in what another `pack` made."""
    outer = next((path for path in Path(options.output.out).absolute().parents if shards.FOLDER.marks_it(path)), None)
    if outer:
        raise UserError(f"--out {options.output.out} is in {outer}, a packed source, which could then not be replaced; "
                        f"choose another --out")
    if options.bos and options.no_bos:
        raise UserError("--bos and --no-bos contradict each other; leave one of them out")
    if (options.buckets is None) != (options.score is None) or (options.first and not options.score):
        raise UserError("--buckets K and --score NAME go together, and --first with them")
    if options.part and options.buckets:
        raise UserError("--part and --buckets do not go together: a bucket's bounds come from all scores at once")
    if options.format != "text" and (options.bos or options.no_bos or options.buckets or options.dtype):
        raise UserError(f"--format {options.format} takes none of --bos, --no-bos, --buckets and --dtype: a "
                        f"conversation begins and ends as its template says; leave them out")
    if options.format == "text" and (options.learn != "responses" or options.max_tokens):
        raise UserError("--learn and --max-tokens are for conversations; name their --format, chat or preference")
    if options.format == "preference" and options.learn == "all":
        raise UserError("--learn all does nothing for preferences, whose answers alone are compared; leave it out")


def pack_text(options: Pack, inputs: list[str], tokenizer, out, part: tuple, bar, settings: dict):
    """Pack texts and token files, a part of them or score buckets."""
    column = options.reading.column
    if options.buckets and "tokens" in map(identify, inputs):
        raise UserError("--buckets orders records by a score, and token files carry none; pack them without")

    def records(files: list[str] = inputs):
        for found in foreign.read_texts(files, tokenizer, options.reading, options.dtype, bool(options.score)):
            bar.update()
            yield found

    sample, mine = [], shards.deal_files(inputs, *part)
    for path in mine:
        # A file that cannot be read should be known before hours of work.
        first = (record[column] for _, record in itertools.islice(records([path]), max(1, 64 // len(mine))))
        sample += [text for text in first if isinstance(text, str)]
    settings["bos"] = options.bos or (False if options.no_bos else None)
    settings["lost_share"] = measure_loss(tokenizer, sample)
    if options.buckets:
        settings["first"] = options.first or ("high" if "quality" in options.score else "low")
        shards.pack_buckets(records, tokenizer, out, options.buckets, options.score, column=column, **settings)
    else:
        texts = (record[column] for _, record in shards.deal_documents(inputs, records, *part))
        shards.pack(texts, tokenizer, out, **settings)


@dataclass
class Folder:
    """Say what a packed folder holds."""

    dir: Positional[str]
    """A folder made by data.py pack."""


@dataclass
class Verify(Folder):
    """Hash every shard against the manifest."""


@dataclass(kw_only=True)
class Manifest:
    """Join the parts that many machines have packed."""

    merge: str
    """The folder that was the parts' --out."""


def print_info(folder) -> dict:
    """Say what a packed source or a folder of score buckets holds; returns its manifest, or the buckets and theirs."""
    index = shards.read_buckets(folder)
    manifests = [shards.read_manifest(path) for path in shards.packed_folders(folder)]
    for k, manifest in enumerate(manifests):
        if index:
            bucket = index["buckets"][k]
            print(f"{bucket['name']}, read {'first' if not k else 'next' if k < len(manifests) - 1 else 'last'}: "
                  f"{index['score']} from {bucket['low']:g} to {bucket['high']:g}")
        for split in shards.SPLITS:
            totals = manifest["splits"][split]
            ratio = f"{totals['tokens'] / totals['bytes']:.3f} tokens per byte" if totals["bytes"] else ""
            ratio = "" if manifest.get("records") else ratio
            print(f"  {split:8} {totals['documents']:>10,} documents {totals['tokens']:>14,} tokens "
                  f"{totals['bytes']:>14,} bytes  {ratio}".rstrip())
    made, empty = manifests[-1], sum(manifest["empty_documents_dropped"] for manifest in manifests)
    print(f"  {made['dtype']}, {made['tokenizer']['library']}, vocabulary {made['tokenizer']['vocab_size']:,}, "
          f"{'BOS, ' * made['bos']}{'EOS' * made.get('eos', True)}".rstrip(", ") + f"; {empty} empty documents dropped")
    if records := made.get("records"):
        print(f"  {records['format']}, {records['learn']} learned (these are the bytes), template "
              f"{records['template'][:12]}; {records['too_long']} left out as too long")
    return {**index, "manifests": manifests} if index else made


def run_verify(options: Verify) -> dict:
    """Hash the shards of a source or of its buckets; a UserError names the first file that differs."""
    read = sum(shards.verify(folder) for folder in shards.packed_folders(options.dir))
    print(f"{options.dir}: {read:,} bytes have the hashes they were written with")
    return {"dir": options.dir, "bytes": read}


# ---- mix

@dataclass(kw_only=True)
class Mix:
    """Show what a recipe draws over a run, or write a mixed JSONL for other tools."""

    recipe: Positional[str | None] = None
    """A recipe of train.py; settings of its [data] and [train], --data.* and --train.*, may stand at the end."""
    preview: bool = False
    """Print and draw how much of each source the recipe's schedule draws over the run."""
    domain: list[str] = field(default_factory=list)
    """Files, folders, patterns or @LIST of the domain."""
    general: list[str] = field(default_factory=list)
    """Files, folders, patterns or @LIST of general text."""
    out: str | None = None
    """The mixed JSONL; with --preview the picture, by default out/mix.png."""
    overwrite: bool = False
    """Replace the mixed JSONL if it exists."""
    domain_ratio: float = setting(0.7, at_least=0, at_most=1)
    """Share of domain records in the mixed JSONL."""
    total_samples: int | None = setting(None, above=0)
    """Records in the mixed JSONL; default: each of the domain once."""
    seed: int = setting(0, at_least=0)
    """Seed of the order of the mixed JSONL."""
    max_epochs: float = setting(SourceConfig.max_epochs, above=0)
    """Refuse to repeat a side's records more often."""
    reading: Reading = field(default_factory=Reading)


def run_mix(options: Mix, settings: list[str]) -> dict:
    """Preview the recipe's mix under `settings`, words such as --train.steps 10; or write the mixed JSONL."""
    if options.preview and options.recipe and not (options.domain or options.general):
        return mixture.preview_mix(options.recipe, settings, Path(options.out or "out/mix.png"))
    if options.recipe or options.preview or settings or not (options.domain and options.general and options.out):
        raise UserError("mix wants either RECIPE --preview, or --domain, --general and --out")
    sides, empty = [list_files(files) for files in (options.domain, options.general)], {"domain": 0, "general": 0}

    def records(side: str, files: list[str]):
        for _, record in read_records(files, options.reading):
            empty[side] += not record[options.reading.column]
            yield record

    done = foreign.mix_files(*map(records, empty, sides), options.out, ratio=options.domain_ratio,
                             total=options.total_samples, seed=options.seed, max_epochs=options.max_epochs,
                             overwrite=options.overwrite)
    for side in ("domain", "general"):
        done[side]["empty"] = empty[side]
        print(f"{side}: {done[side]['written']:,} of {done['total']:,} samples from {done[side]['records']:,} records"
              f"{f' ({empty[side]:,} of them empty)' if empty[side] else ''}, read {done[side]['epochs']:.2f} times")
    for warning in done["warnings"]:
        print(warning, file=sys.stderr)
    print(f"mixed into {options.out}, seed {options.seed}")
    return done


def main() -> int:
    argv = sys.argv[1:]
    # What follows the first --data.KEY or --train.KEY of `mix` is for the recipe and not an option of the command.
    keys = (i for i, word in enumerate(argv) if argv[0] == "mix" and word.startswith(("--data.", "--train.")))
    at = next(keys, len(argv))
    return cli.run("data.py", __doc__, {
        "pack": (Pack, run_pack), "verify": (Verify, run_verify),
        "manifest": (Manifest, lambda options: print_info(shards.merge_parts(options.merge))),
        "info": (Folder, lambda options: print_info(options.dir)),
        "mix": (Mix, functools.partial(run_mix, settings=argv[at:]))}, argv=argv[:at])


if __name__ == "__main__":
    sys.exit(main())
