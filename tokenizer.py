"""One interface to every kind of tokenizer file, and the commands that train, continue and compare tokenizers.

    python tokenizer.py train --kind bpe --vocab-size 8000 --out out/tokenizer legal.jsonl wiki.txt
    python tokenizer.py encode --tokenizer out/tokenizer "Habeas corpus"
    python tokenizer.py extend --model BASE --new-tokens 2000 --out out/legal_base legal.jsonl
    python tokenizer.py extend --tokenizer BASE --new-tokens 2000 --out out/legal_tokenizer legal.jsonl
    python tokenizer.py add --model BASE --out out/marked "<legal_case>" res_judicata --pad "<|pad|>"
    python tokenizer.py report --tokenizer BASE --extended out/legal_base --domain law.jsonl --general wiki.txt
    python tokenizer.py compare --vocab-size 8000 legal.jsonl

With --model, `extend` and `add` write a complete new base: the tokenizer, and weights with rows for the new ids. In
Python, `tokenizer.load(path)` gives an object with encode, decode and vocab_size: see text/vocabulary.py.
"""

import core.threads

import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import hf
from core import cli
from core.cli import Output, Positional, Reading
from core.errors import UserError
from core.files import new_folder, refuse_existing
from core.tensor_files import tensor_files
from text.compare_vocabularies import Compare, Report, compare_command, report_command
from text.corpus import read_documents
from text.extend_vocabulary import Learning, add, extend, find_plain_words
from text.new_rows import NewRows, resize
from text.train_vocabulary import Kind, train
from text.vocabulary import load
from text.vocabulary_files import BaseTokenizer


@dataclass(kw_only=True)
class Train:
    """Train a new tokenizer on text."""

    files: Positional[list[str]]
    vocab_size: int
    """Ids in all, special tokens included."""
    kind: Kind = "bpe"
    """Byte-level BPE, SentencePiece's Unigram, or BERT's WordPiece."""
    reading: Reading = field(default_factory=Reading)
    output: Output


@dataclass(kw_only=True)
class Encode:
    """Show the ids and the tokens of a text."""

    text: Positional[str]
    tokenizer: str
    """A model folder or a tokenizer file."""


@dataclass(kw_only=True)
class Change:
    """The base: give one of --model and --tokenizer."""

    model: str | None = None
    """A model folder; a complete new base with more rows is written."""
    tokenizer: str | None = None
    """A tokenizer's folder or file; a tokenizer alone is written."""
    rows: NewRows = field(default_factory=NewRows)
    output: Output


@dataclass(kw_only=True)
class Extend:
    """Learn new tokens from text, which continue the base's BPE."""

    files: Positional[list[str]]
    learning: Learning = field(default_factory=Learning)
    reading: Reading = field(default_factory=Reading)
    change: Change


@dataclass(kw_only=True)
class Add:
    """Give each term that you name an id of its own."""

    terms: Positional[list[str]] = field(default_factory=list)
    special: bool = False
    """The terms are control tokens."""
    pad: str | None = None
    """A new padding token, whose row is zero."""
    change: Change


def train_command(options: Train) -> dict:
    out = Path(options.output.out)
    if (out / "tokenizer.json").exists() and not options.output.overwrite:
        raise UserError(f"{out} holds a tokenizer already; choose another --out or add --overwrite")
    tokenizer = train(read_documents(options.files, options.reading), options.kind, options.vocab_size, out)
    size = tokenizer.vocab_size
    fewer = f" of {options.vocab_size}: the text gave no more" if size < options.vocab_size else ""
    print(f"{out}: {options.kind} tokenizer with {size} ids{fewer}")
    return {"out": str(out), "kind": options.kind, "vocab_size": size}


def encode_command(options: Encode) -> dict:
    tokenizer = load(options.tokenizer)
    ids = tokenizer.encode(options.text)
    tokens = [tokenizer.id_to_token(i) for i in ids]
    print(*ids)
    print(*map(repr, tokens))
    return {"ids": ids, "tokens": tokens}


def extend_command(options: Extend) -> dict:
    wanted, out = options.learning, options.change.output.out
    source = check_change(options.change)
    texts = read_documents(options.files, options.reading)
    with tempfile.TemporaryDirectory() as scratch:
        parts = extend(source, texts, wanted.new_tokens, scratch, wanted.min_count)
        tokens = load(scratch).tokens
        write_change(options.change, scratch, parts)
    first = min(parts)
    fewer = f" of {wanted.new_tokens}: no other pair that may be joined occurs {wanted.min_count} times"
    print(f"{out}: {len(parts)} new tokens{fewer if len(parts) < wanted.new_tokens else ''}, "
          f"ids {first} to {len(tokens) - 1}")
    return {"out": out, "new_tokens": len(parts), "first_id": first, "vocab_size": len(tokens),
            "tokens": tokens[first:]}


def add_command(options: Add) -> dict:
    source = check_change(options.change)
    with tempfile.TemporaryDirectory() as scratch:
        ids = add(source, options.terms, scratch, options.special, options.pad)
        old = BaseTokenizer(source).tokenizer
        write_change(options.change, scratch, {i: old.encode(term) for term, i in ids.items()}, ids.get(options.pad))
    plain = find_plain_words(options.terms)
    if plain and not options.special:
        print(f"warning: {', '.join(map(repr, plain))}: plain words; as added tokens they are also cut out of longer "
              f"words. `tokenizer.py extend` on text that holds them serves better", file=sys.stderr)
    for term, i in ids.items():
        print(i, term)
    return {"out": options.change.output.out, "ids": ids, "plain_words": plain}


def check_change(change: Change) -> Path:
    """The base's tokenizer, once all is found out that would otherwise stop the command after its work."""
    if (change.model is None) == (change.tokenizer is None):
        raise UserError("give one of --model and --tokenizer: a model folder, or a tokenizer alone")
    refuse_existing(change.output.out, change.output.overwrite)
    if change.tokenizer is not None:
        return Path(change.tokenizer)
    base = hf.open_base(change.model)
    hf.parse_config(base.settings, base.folder)
    tensor_files(base.folder)
    return base.folder


def write_change(change: Change, tokenizer_folder: str, parts: dict[int, list[int]], pad_id: int | None = None) -> None:
    """Write what is in `tokenizer_folder` to --out: alone, or with the model. parts: {new id: its old ids}."""
    if change.model is not None:
        save_model(change.model, tokenizer_folder, parts, change.output.out, change.rows, pad_id)
        return
    with new_folder(change.output.out, change.output.overwrite) as partial:
        shutil.copytree(tokenizer_folder, partial, dirs_exist_ok=True)


def save_model(base, tokenizer_folder, parts: dict[int, list[int]], out, rows: NewRows, zero_id: int | None = None):
    """Write the base's weights, with rows for the tokenizer in `tokenizer_folder`, as the complete model folder `out`.

    parts: {new id: the old ids it stands for}. zero_id: a new id whose row is zero.
    """
    base = hf.open_base(base)
    model, new = hf.load(base, base.dtype), load(tokenizer_folder)
    card = (f"No training yet: {len(parts)} tokens were added to the vocabulary of {model.config.vocab_size}, rows by "
            f"`{rows.init}`.")
    resize(model, BaseTokenizer(base.folder).tokenizer, new.vocab_size, parts, rows, zero_id)
    hf.save(model, out, base=base, tokenizer=tokenizer_folder, card=card, pad_id=new.pad_id)


def main() -> int:
    return cli.run("tokenizer.py", __doc__, {
        "train": (Train, train_command), "encode": (Encode, encode_command), "extend": (Extend, extend_command),
        "add": (Add, add_command), "report": (Report, report_command), "compare": (Compare, compare_command)})


if __name__ == "__main__":
    sys.exit(main())
