"""One interface to every kind of tokenizer file, and the commands that train, continue and compare tokenizers.

    python tokenizer.py train --kind bpe --vocab-size 8000 --out out/tokenizer legal.jsonl wiki.txt
    python tokenizer.py encode --tokenizer out/tokenizer "Habeas corpus"
    python tokenizer.py extend --model BASE --new-tokens 2000 --out out/legal_base legal.jsonl
    python tokenizer.py add --model BASE --out out/marked "<legal_case>" res_judicata --pad "<|pad|>"
    python tokenizer.py add --model BASE --for span --out out/span_base
    python tokenizer.py report --tokenizer BASE --extended out/legal_base --domain law.jsonl --general wiki.txt
    python tokenizer.py compare --vocab-size 8000 legal.jsonl

In Python, `tokenizer.load(path)` gives an object with encode, decode and vocab_size (text/vocabulary.py), and
`tokenizer.train` makes one (text/train_vocabulary.py).
"""

import core.threads

import sys
import tempfile
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

import hf
from core import cli
from core.cli import Output, Positional, Reading
from core.config import setting
from core.errors import UserError
from core.files import claim_folder, new_folder
from text.corpus import read_documents
from text.extend_vocabulary import Learning, NewRows, Report, add, extend, report_command, resize
from text.train_vocabulary import FOLDER, Compare, Train, compare_command, train, train_command
from text.vocabulary import load

__all__ = ["load", "train"]


@dataclass(kw_only=True)
class Encode:
    """Show the ids and the tokens of a text."""

    text: Positional[str]
    """The text, in quotes."""
    tokenizer: str
    """A model folder or a tokenizer file."""


@dataclass(kw_only=True)
class Change:
    """What `extend` and `add` have in common."""

    model: str | None = None
    """The base, a model folder: a complete new base with more rows is written."""
    tokenizer: str | None = None
    """Instead of --model, a tokenizer's folder or file: a tokenizer alone is written."""
    rows: NewRows = field(default_factory=NewRows)
    output: Output


@dataclass(kw_only=True)
class Extend(Change):
    """Learn new tokens from text, in continuation of the base's BPE."""

    files: Positional[list[str]]
    """Files, folders, patterns, @LIST or hf://org/dataset: text, .jsonl or .parquet, also .gz and .zst."""
    learning: Learning = field(default_factory=Learning)
    reading: Reading = field(default_factory=Reading)


@dataclass(kw_only=True)
class Add(Change):
    """Give each term that you name an id of its own."""

    terms: Positional[list[str]] = field(default_factory=list)
    """The terms, as they are spelt in text."""
    special: bool = False
    """The terms are control tokens."""
    pad: str | None = None
    """A new padding token, whose row is zero."""
    objectives: Annotated[list[Literal["masked", "span", "ul2", "fim"]], tyro.conf.arg(name="for")] = field(
        default_factory=list)
    """Objectives of train.py: the control tokens that they need and the vocabulary lacks."""
    sentinels: int = setting(100, at_least=2, at_most=100_000)
    """How many sentinels span and ul2 get: one more than a document may have spans."""


def encode_command(options: Encode) -> dict:
    tokenizer = load(options.tokenizer)
    ids = tokenizer.encode(options.text)
    tokens = [tokenizer.tokens[i] for i in ids]
    print(*ids)
    print(*map(repr, tokens))
    return {"ids": ids, "tokens": tokens}


def extend_command(options: Extend) -> dict:
    wanted, out, texts = options.learning, options.output.out, read_documents(options.files, options.reading)
    new = write_change(options, lambda base, folder: extend(base, texts, wanted.new_tokens, folder, wanted.min_count))
    first, last = min(new), max(new)
    fewer = f" of {wanted.new_tokens}: no other pair that may be joined occurs {wanted.min_count} times"
    print(f"{out}: {len(new)} new tokens{fewer if len(new) < wanted.new_tokens else ''}, ids {first} to {last}, from "
          f"{texts.describe()}")
    return {"out": out, "new_tokens": len(new), "first_id": first, "vocab_size": last + 1, "tokens": [*new.values()],
            "documents": texts.documents, "empty_documents": texts.empty}


def add_command(options: Add) -> dict:
    new = write_change(options, lambda base, folder: add(
        base, options.terms, folder, options.special, options.pad, options.objectives, options.sentinels))
    # A plain word, once added, has no form with a space before it, and is cut out of longer words: "lien" of "client".
    plain = [term for term in options.terms if term.replace(" ", "").isalpha()]
    if plain and not options.special:
        print(f"warning: {', '.join(map(repr, plain))}: plain words; as added tokens they are also cut out of longer "
              f"words. `tokenizer.py extend` on text that holds them serves better", file=sys.stderr)
    print(*(f"{i} {term}" for i, term in new.items()), sep="\n")
    return {"out": options.output.out, "ids": {term: i for i, term in new.items()}, "plain_words": plain}


def write_change(options: Change, change) -> dict[int, str]:
    """Write to --out what change(base, folder), `extend` or `add`, makes of the tokenizer, alone or with the model's
    weights; return {new id: token}. A wrong option or base is said before any text is read."""
    out, overwrite = options.output.out, options.output.overwrite
    if (options.model is None) == (options.tokenizer is None):
        raise UserError("give one of --model and --tokenizer: a model folder, or a tokenizer alone")
    if options.model is None:
        with new_folder(out, overwrite, FOLDER) as folder:
            parts = change(options.tokenizer, folder)
    else:
        with claim_folder(out, overwrite, hf.FOLDER), tempfile.TemporaryDirectory() as folder:
            base = hf.open_base(options.model)
            # Both are read for what is wrong with them.
            _ = base.config, hf.tensor_files(base.folder)
            parts = change(base.folder, folder)
            save_model(base, folder, parts, out, options.rows)
    tokens = load(out).tokens
    return {i: tokens[i] for i in parts}


def save_model(base, tokenizer_folder, parts: dict[int, list[int]], out, rows: NewRows) -> None:
    """Write the base's weights, with rows for the tokenizer in `tokenizer_folder`, as the complete model folder `out`.
    parts: {new id: the old ids it stands for}. The row of a new padding token is zero."""
    base = hf.open_base(base)
    model, new = hf.load(base, base.dtype), load(tokenizer_folder)
    size = model.config.vocab_size
    card = f"No training yet: {len(parts)} tokens were added to the vocabulary of {size}, rows by `{rows.init}`."
    resize(model, load(base.folder), new.vocab_size, parts, rows, new.pad_id, frozenset(new.special_ids))
    hf.save(model, out, base=base, tokenizer=tokenizer_folder, card=card, pad_id=new.pad_id)


def main() -> int:
    return cli.run("tokenizer.py", __doc__, {
        "train": (Train, train_command), "encode": (Encode, encode_command), "extend": (Extend, extend_command),
        "add": (Add, add_command), "report": (Report, report_command), "compare": (Compare, compare_command)})


if __name__ == "__main__":
    sys.exit(main())
