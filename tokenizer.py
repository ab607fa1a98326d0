"""One interface over the four ways a tokenizer is kept on disk, and the commands that make and change one.

    python tokenizer.py train --kind bpe --vocab-size 8000 --out out/tokenizer FILE...     .txt, .jsonl, .parquet
    python tokenizer.py encode --tokenizer DIR_OR_FILE "Habeas corpus"                      prints ids and pieces
    python tokenizer.py extend --model BASE --new-tokens 2000 --out out/legal_base legal.jsonl    tokenizer and weights
    python tokenizer.py extend --tokenizer BASE --new-tokens 2000 --out out/tokenizer legal.jsonl       tokenizer alone
    python tokenizer.py add --model BASE --out out/marked "<legal_case>" res_judicata --pad "<|pad|>"
    python tokenizer.py report --tokenizer BASE --extended out/legal_base --domain held_out.jsonl --general wiki.txt
    python tokenizer.py compare --vocab-size 8000 legal.jsonl              --bits-per-byte 2: a small model's as well

In Python: `tokenizer.load(path)` gives an object with encode, decode and vocab_size (text/vocabulary.py).
"""

import core.threads

import math
import sys
import tempfile
from pathlib import Path

import torch

import hf
from core.config import ArgumentParser, main_guard, write_json
from text.compare_vocabularies import compare_kinds, hold_out, print_kinds, print_report, report
from text.corpus import read_documents
from text.extend_vocabulary import add, extend, find_plain_words, refuse_existing
from text.new_rows import INITS, resize
from text.train_vocabulary import train
from text.vocabulary import load
from text.vocabulary_files import BaseTokenizer


def save_model(base, tokenizer_folder: Path, parts: dict[int, list[int]], out, init: str, zero=(), seed: int = 0):
    """Write the base's weights, with rows for the tokenizer in `tokenizer_folder`, as the complete model folder `out`.

    parts: {new id: the old ids it stands for}. init, zero, seed: how the new rows are made (text/new_rows.py).
    """
    base = hf.open_base(base)
    dtype = hf.DTYPES.get(base.settings.get("dtype") or base.settings.get("torch_dtype"), torch.float32)
    model, new = hf.load(base, dtype), load(tokenizer_folder)
    before = model.config.vocab_size
    resize(model, BaseTokenizer(base.folder).tokenizer, new.vocab_size, parts, init, zero, seed)
    card = f"No training yet: {len(parts)} tokens were added to the vocabulary of {before}, rows by `{init}`."
    hf.save(model, out, base=base, tokenizer=tokenizer_folder, card=card, pad_id=new.pad_id)


def main():
    parser = ArgumentParser(prog="tokenizer.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|encode|extend|add|report|compare")
    learn = ArgumentParser(add_help=False)
    learn.add_argument("--new-tokens", type=int, default=2000, help="ids to add (default 2000)")
    learn.add_argument("--min-count", type=int, default=10, help="a pair that occurs less often is left (default 10)")
    target = ArgumentParser(add_help=False)
    source = target.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help="base model; written is a complete new base with more rows")
    source.add_argument("--tokenizer", metavar="PATH", help="tokenizer alone: a folder or a file")
    target.add_argument("--out", required=True, help="new folder")
    target.add_argument("--init", choices=INITS, default="subtoken", help="new rows (default subtoken: mean of parts)")
    target.add_argument("--seed", type=int, default=0, help="of --init random and covariance")
    p = commands.add_parser("train", help="train a new tokenizer on text")
    p.add_argument("--kind", choices=("bpe", "unigram", "wordpiece"), default="bpe")
    p.add_argument("--vocab-size", type=int, required=True, help="ids in all, special tokens included")
    p.add_argument("--out", required=True, help="folder for tokenizer.json and tokenizer_config.json")
    p.add_argument("--overwrite", action="store_true", help="replace the tokenizer in the folder")
    p.add_argument("files", nargs="+", metavar="FILE", help=".txt, .jsonl, .parquet, or .gz, .zst of these")
    p = commands.add_parser("encode", help="show the ids and pieces of a text")
    p.add_argument("--tokenizer", required=True, metavar="PATH", help="a model folder or a tokenizer file")
    p.add_argument("text", metavar="TEXT")
    both = ArgumentParser(add_help=False)
    both.add_argument("--json", metavar="FILE", help="write what is printed as data")
    p = commands.add_parser("extend", parents=[target, learn, both], help="new tokens learnt from text")
    p.add_argument("files", nargs="+", metavar="FILE", help=".txt, .jsonl, .parquet, or .gz, .zst of these")
    p = commands.add_parser("add", parents=[target, both], help="one id for each term that you name")
    p.add_argument("terms", nargs="*", metavar="TERM")
    p.add_argument("--special", action="store_true", help="the terms are control tokens")
    p.add_argument("--pad", metavar="TOKEN", help="a new padding token, its row zero")
    p = commands.add_parser("report", parents=[learn, both], help="lengths before and after; extend or not, and why")
    p.add_argument("--tokenizer", required=True, metavar="PATH", help="the base")
    p.add_argument("--extended", metavar="PATH", help="without it one is learnt from 9 in 10 documents of the domain")
    p.add_argument("--domain", nargs="+", required=True, metavar="FILE")
    p.add_argument("--general", nargs="+", metavar="FILE")
    p.add_argument("--code", nargs="+", metavar="FILE")
    p.add_argument("--corpus-tokens", type=int, help="what there is to train on, if more than the files of --domain")
    p = commands.add_parser("compare", parents=[both], help="BPE, Unigram and WordPiece on the same text")
    p.add_argument("--vocab-size", type=int, default=8000)
    p.add_argument("--bits-per-byte", type=float, default=0, metavar="MB",
                   help="train a small model from scratch on MB megabytes for each kind and seed; minutes each")
    p.add_argument("--seeds", type=int, default=2, help="of --bits-per-byte (default 2)")
    p.add_argument("files", nargs="+", metavar="FILE")
    args = parser.parse_args()
    commands = {"train": _train, "encode": _encode, "extend": _extend, "add": _add, "report": _report,
                "compare": _compare}
    result = commands[args.command](args)
    if getattr(args, "json", None):
        write_json(args.json, result)


def _train(args):
    if (Path(args.out) / "tokenizer.json").exists() and not args.overwrite:
        raise ValueError(f"{args.out} holds a tokenizer already; choose another --out or add --overwrite")
    texts = read_documents(args.files)
    tokenizer = train(texts, args.kind, args.vocab_size, args.out)
    fewer = f" of {args.vocab_size}: the text gave no more" if tokenizer.vocab_size < args.vocab_size else ""
    print(f"{args.out}: {args.kind} tokenizer with {tokenizer.vocab_size} ids{fewer}")


def _encode(args):
    tokenizer = load(args.tokenizer)
    ids = tokenizer.encode(args.text)
    print(*ids)
    print(*(repr(tokenizer.id_to_token(i)) for i in ids))


def _texts(files) -> list[str]:
    return list(read_documents(files))


def _source(args):
    """The base's tokenizer, after what would else come to light when the corpus has been read."""
    refuse_existing(Path(args.out))
    if not args.model:
        return args.tokenizer
    args.model = hf.open_base(args.model)
    _ = args.model.config, hf.tensor_files(args.model.folder)
    return args.model.folder


def _extend(args):
    texts = read_documents(args.files)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "tokenizer") if args.model else Path(args.out)
        source = _source(args)
        ids = extend(source, texts, args.new_tokens, folder, args.min_count)
        new = load(folder)
        first = new.vocab_size - len(ids)
        if args.model:
            save_model(args.model, folder, ids, args.out, args.init, seed=args.seed)
    fewer = f" of {args.new_tokens}: no other pair that may be joined occurs {args.min_count} times"
    print(f"{args.out}: {len(ids)} new tokens{fewer if len(ids) < args.new_tokens else ''}, "
          f"ids {first} to {new.vocab_size - 1}")
    return {"out": args.out, "new_tokens": len(ids), "first_id": first, "vocab_size": new.vocab_size,
            "tokens": new.tokens[first:]}


def _add(args):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "tokenizer") if args.model else Path(args.out)
        source = _source(args)
        ids = add(source, args.terms, folder, args.special, args.pad)
        if args.model:
            old = BaseTokenizer(source).tokenizer
            parts = {i: old.encode(term) for term, i in ids.items()}
            zero = {ids[args.pad]} if args.pad is not None else ()
            save_model(args.model, folder, parts, args.out, args.init, zero, args.seed)
    if not args.special and (plain := find_plain_words(args.terms)):
        print(f"warning: {', '.join(map(repr, plain))}: plain words; as added tokens they are also cut out of longer "
              f"words. `tokenizer.py extend` on text that holds them serves better", file=sys.stderr)
    for term, i in ids.items():
        print(i, term)
    return {"out": args.out, "ids": ids, "plain_words": find_plain_words(args.terms)}


def _report(args):
    if args.corpus_tokens is not None and args.corpus_tokens < 1:
        raise ValueError(f"--corpus-tokens is {args.corpus_tokens}, but must be at least 1")
    base, domain = BaseTokenizer(args.tokenizer), _texts(args.domain)
    tokens = args.corpus_tokens or sum(map(len, base.tokenizer.encode_batch(domain)))
    texts = {name: _texts(files) for name in ("general", "code") if (files := getattr(args, name))}
    if args.extended:
        new = load(args.extended)
        if new.tokens[:base.tokenizer.vocab_size] != base.tokenizer.tokens:
            raise ValueError(f"{args.extended} is no extension of {args.tokenizer}: their old ids differ")
    else:
        learnt, domain = hold_out(domain)
        with tempfile.TemporaryDirectory() as folder:
            extend(args.tokenizer, learnt, args.new_tokens, Path(folder, "tokenizer"), args.min_count)
            new = load(Path(folder, "tokenizer"))
    result = report(base, new, {"domain": domain} | texts, tokens)
    print_report(result)
    return result


def _compare(args):
    if not 0 <= args.bits_per_byte < math.inf or args.seeds < 1:
        raise ValueError(f"--bits-per-byte is {args.bits_per_byte:g} and --seeds {args.seeds}; they must be at least 0 "
                         f"and 1")
    rows = compare_kinds(*hold_out(_texts(args.files)), args.vocab_size, args.bits_per_byte, args.seeds)
    print_kinds(rows)
    return rows


if __name__ == "__main__":
    sys.exit(main_guard(main))
