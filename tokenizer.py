"""One interface to every kind of tokenizer file, and the commands that train, continue and compare tokenizers.

    python tokenizer.py train --kind bpe --vocab-size 8000 --out out/tokenizer legal.jsonl wiki.txt
    python tokenizer.py encode --tokenizer out/tokenizer "Habeas corpus"
    python tokenizer.py extend --model BASE --new-tokens 2000 --out out/legal_base legal.jsonl
    python tokenizer.py add --model BASE --out out/marked "<legal_case>" res_judicata --pad "<|pad|>"
    python tokenizer.py report --tokenizer BASE --extended out/legal_base --domain law.jsonl --general wiki.txt
    python tokenizer.py compare --vocab-size 8000 legal.jsonl

In Python, `tokenizer.load(path)` gives an object with encode, decode and vocab_size (text/vocabulary.py), and
`tokenizer.train` makes one (text/train_vocabulary.py).
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
from text.extend_vocabulary import Learning, NewRows, add, extend, resize
from text.train_vocabulary import Train, train, train_command
from text.vocabulary import load
from text.vocabulary_files import BaseTokenizer

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
    """Text: .txt, .jsonl or .parquet, also .gz and .zst, or hf://org/dataset."""
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


def encode_command(options: Encode) -> dict:
    tokenizer = load(options.tokenizer)
    ids = tokenizer.encode(options.text)
    tokens = [tokenizer.id_to_token(i) for i in ids]
    print(*ids)
    print(*map(repr, tokens))
    return {"ids": ids, "tokens": tokens}


def extend_command(options: Extend) -> dict:
    wanted = options.learning
    source = check_change(options)
    texts = read_documents(options.files, options.reading)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "tokenizer")
        parts = extend(source, texts, wanted.new_tokens, folder, wanted.min_count)
        tokens = load(folder).tokens
        write_change(options, folder, parts)
    out, first = options.output.out, min(parts)
    fewer = f" of {wanted.new_tokens}: no other pair that may be joined occurs {wanted.min_count} times"
    print(f"{out}: {len(parts)} new tokens{fewer if len(parts) < wanted.new_tokens else ''}, "
          f"ids {first} to {len(tokens) - 1}")
    return {"out": out, "new_tokens": len(parts), "first_id": first, "vocab_size": len(tokens),
            "tokens": tokens[first:]}


def add_command(options: Add) -> dict:
    source = check_change(options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "tokenizer")
        ids = add(source, options.terms, folder, options.special, options.pad)
        old = BaseTokenizer(source).tokenizer
        write_change(options, folder, {i: old.encode(term) for term, i in ids.items()}, ids.get(options.pad))
    # A plain word, once added, has no form with a space before it, and is cut out of longer words: "lien" of "client".
    plain = [term for term in options.terms if term.replace(" ", "").isalpha()]
    if plain and not options.special:
        print(f"warning: {', '.join(map(repr, plain))}: plain words; as added tokens they are also cut out of longer "
              f"words. `tokenizer.py extend` on text that holds them serves better", file=sys.stderr)
    for term, i in ids.items():
        print(i, term)
    return {"out": options.output.out, "ids": ids, "plain_words": plain}


def check_change(options: Change) -> Path:
    """The folder or file of the base's tokenizer. What can be wrong is said before the text is read."""
    if (options.model is None) == (options.tokenizer is None):
        raise UserError("give one of --model and --tokenizer: a model folder, or a tokenizer alone")
    refuse_existing(options.output.out, options.output.overwrite)
    if options.tokenizer is not None:
        return Path(options.tokenizer)
    base = hf.open_base(options.model)
    hf.parse_config(base.settings, base.folder)
    tensor_files(base.folder)
    return base.folder


def write_change(options: Change, folder: Path, parts: dict[int, list[int]], zero_id: int | None = None) -> None:
    """Write the tokenizer in `folder` to --out, alone or with the model's weights (see save_model).

    A folder inside a temporary one is copied, because a temporary one is readable by its owner alone.
    """
    if options.model is not None:
        save_model(options.model, folder, parts, options.output.out, options.rows, zero_id)
        return
    with new_folder(options.output.out, options.output.overwrite) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)


def save_model(base, tokenizer_folder, parts: dict[int, list[int]], out, rows: NewRows, zero_id: int | None = None):
    """Write the base's weights, with rows for the tokenizer in `tokenizer_folder`, as the complete model folder `out`.

    parts: {new id: the old ids it stands for}. zero_id: a new id whose row is zero.
    """
    base = hf.open_base(base)
    model, new = hf.load(base, base.dtype), load(tokenizer_folder)
    before = model.config.vocab_size
    resize(model, BaseTokenizer(base.folder).tokenizer, new.vocab_size, parts, rows, zero_id)
    card = f"No training yet: {len(parts)} tokens were added to the vocabulary of {before}, rows by `{rows.init}`."
    hf.save(model, out, base=base, tokenizer=tokenizer_folder, card=card, pad_id=new.pad_id)


def main() -> int:
    return cli.run("tokenizer.py", __doc__, {
        "train": (Train, train_command), "encode": (Encode, encode_command), "extend": (Extend, extend_command),
        "add": (Add, add_command), "report": (Report, report_command), "compare": (Compare, compare_command)})


if __name__ == "__main__":
    sys.exit(main())
