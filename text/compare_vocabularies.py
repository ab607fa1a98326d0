"""Whether a vocabulary is worth it: an extension beside its base, and BPE, Unigram and WordPiece on the same text."""

import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from core import cli
from core.cli import Positional, Reading
from core.config import setting
from core.errors import UserError
from core.files import read_json
from text.corpus import read_documents, utf8
from text.extend_vocabulary import Learning, count_fewest_tokens, extend
from text.shards import pack
from text.train_vocabulary import train
from text.vocabulary import Tokenizer, load, replace_surrogates
from text.vocabulary_files import BaseTokenizer


@dataclass(kw_only=True)
class Report:
    """Say how much shorter an extension makes text, and whether it is worth it."""

    tokenizer: str
    """The base: a folder or a file."""
    extended: str | None = None
    """The extension; by default one is learned from 9 in 10 domain documents."""
    domain: list[str]
    """Files of domain text."""
    general: list[str] = field(default_factory=list)
    """Files of general text."""
    code: list[str] = field(default_factory=list)
    """Files of code."""
    corpus_tokens: int | None = setting(None, at_least=1)
    """Tokens to train on, if more than those of the --domain files."""
    learning: Learning = field(default_factory=Learning)
    reading: Reading = field(default_factory=Reading)


@dataclass(kw_only=True)
class Compare:
    """Train BPE, Unigram and WordPiece on the same text and compare them."""

    files: Positional[list[str]]
    """Text: .txt, .jsonl or .parquet, also .gz and .zst, or hf://org/dataset."""
    vocab_size: int = 8000
    """Ids in all, special tokens included."""
    bits_per_byte: float = setting(0.0, at_least=0, below=math.inf)
    """Also train a small model for each kind and seed on this many megabytes; each takes minutes."""
    seeds: int = setting(2, at_least=1)
    """Seeds of --bits-per-byte."""
    reading: Reading = field(default_factory=Reading)


# The least saving of tokens that pays for a new vocabulary, and how often a new row must be seen to count as trained:
# judgements (references/data.md 6.4)
WORTH_IT, TIMES_SEEN = 0.15, 100
MOST_EPOCHS = 16        # train.py refuses to repeat a text more often


def measure_lengths(base: BaseTokenizer, new: Tokenizer, texts: list[str]) -> dict:
    """Lengths of `texts` under both tokenizers, and how often each new id occurs ("counts", int64 [new ids])."""
    first = base.tokenizer.vocab_size
    before, after = base.tokenizer.encode_batch(texts), new.encode_batch(texts)
    row = {"documents": len(texts), **count_text(texts),
           "tokens_before": sum(map(len, before)), "tokens_after": sum(map(len, after))}
    if not row["tokens_before"]:
        raise UserError("a text to report on is empty")
    for when in ("before", "after"):
        row[f"tokens_per_byte_{when}"] = row[f"tokens_{when}"] / row["bytes"]
        row[f"tokens_per_word_{when}"] = row[f"tokens_{when}"] / max(1, row["words"])
    counts = np.bincount(np.concatenate(after), minlength=new.vocab_size)[first:]
    return row | {
        "change": row["tokens_after"] / row["tokens_before"] - 1,
        "largest_possible_change": min(1.0, count_fewest_tokens(base, texts) / row["tokens_before"]) - 1,
        "documents_touched": sum(bool((ids >= first).any()) for ids in after) / len(texts),
        "new_tokens_used": float((counts > 0).mean()) if len(counts) else 0.0, "counts": counts}


def count_text(texts: list[str]) -> dict[str, int]:
    return {"bytes": sum(len(utf8(text)) for text in texts), "words": sum(len(text.split()) for text in texts)}


def report(base: BaseTokenizer, new: Tokenizer, texts: dict[str, list[str]], corpus_tokens: int | None = None) -> dict:
    """Lengths before and after for each of `texts` (one is "domain"), and whether to extend, with the reason.

    corpus_tokens: tokens (of the base) that there are to train on; None: those of the domain text

    In the result, break_even_tokens are the domain tokens (of the base) in which the median new token occurs
    TIMES_SEEN times; largest_possible_change holds if every word that the tokenizer's own pattern cuts (in
    SentencePiece: every run of letters of one script, or of punctuation) were one token.
    """
    rows = {name: measure_lengths(base, new, documents) for name, documents in texts.items()}
    domain = rows["domain"]
    rate = float(np.median(domain["counts"])) / domain["tokens_before"] if len(domain["counts"]) else 0.0
    break_even = round(TIMES_SEEN / rate) if rate else None
    have = corpus_tokens or domain["tokens_before"]
    shorter, bound = -domain["change"], -domain["largest_possible_change"]
    advice = "keep"
    if shorter < WORTH_IT:
        why = f"domain text gets {shorter:.1%} shorter, and below {WORTH_IT:.0%} a new vocabulary is not worth its cost"
        if bound < WORTH_IT:
            why += f"; no extension could reach it: with every word one token it would be {bound:.1%}"
    elif break_even is None:
        why = "most new tokens do not occur in the domain text: there is nothing to train their rows on"
    elif have < break_even:
        why = (f"domain text gets {shorter:.1%} shorter, but half of the new rows would be seen less than {TIMES_SEEN} "
               f"times in {have:,} tokens; that takes {break_even:,}")
    else:
        advice = "extend"
        why = (f"domain text gets {shorter:.1%} shorter (attention's cost {1 - (1 - shorter) ** 2:.0%} lower), and "
               f"{have:,} tokens are enough to train the new rows ({break_even:,})")
    return {"new_tokens": new.vocab_size - base.tokenizer.vocab_size, "recommendation": advice, "reason": why,
            "break_even_tokens": break_even, "corpus_tokens": have, "attention_cost": (1 + domain["change"]) ** 2,
            "texts": {name: {k: v for k, v in row.items() if k != "counts"} for name, row in rows.items()}}


def report_command(options: Report) -> dict:
    base, domain = BaseTokenizer(options.tokenizer), list(read_documents(options.domain, options.reading))
    corpus_tokens = options.corpus_tokens or sum(map(len, base.tokenizer.encode_batch(domain)))
    others = {"general": options.general, "code": options.code}
    texts = {name: list(read_documents(files, options.reading)) for name, files in others.items() if files}
    if options.extended:
        new = load(options.extended)
        if new.tokens[:base.tokenizer.vocab_size] != base.tokenizer.tokens:
            raise UserError(f"{options.extended} is no extension of {options.tokenizer}: their old ids differ")
    else:
        learn, domain = hold_out(domain)
        with tempfile.TemporaryDirectory() as folder:
            extend(options.tokenizer, learn, options.learning.new_tokens, folder, options.learning.min_count)
            new = load(folder)
    result = report(base, new, {"domain": domain} | texts, corpus_tokens)
    print_report(result)
    return result


def print_report(result: dict) -> None:
    print(f"{'text':8} {'bytes':>12} {'tokens':>11} {'extended':>11} {'change':>7} {'possible':>8} {'per byte':>15} "
          f"{'per word':>13} {'touched':>8}")
    for name, row in result["texts"].items():
        print(f"{name:8} {row['bytes']:12,} {row['tokens_before']:11,} {row['tokens_after']:11,} {row['change']:7.1%} "
              f"{row['largest_possible_change']:8.1%} {row['tokens_per_byte_before']:.4f} > "
              f"{row['tokens_per_byte_after']:.4f} {row['tokens_per_word_before']:.2f} > "
              f"{row['tokens_per_word_after']:.2f} {row['documents_touched']:8.1%}")
    used, even = result["texts"]["domain"]["new_tokens_used"], result["break_even_tokens"]
    print(f"{result['new_tokens']} new tokens, {used:.0%} of them in this domain text; break-even at "
          f"{'no size' if even is None else f'{even:,} tokens'}")
    print(f"{result['recommendation']}: {result['reason']}")


def hold_out(texts: list[str]) -> tuple[list[str], list[str]]:
    """(texts to learn from, every tenth text)."""
    if len(texts) < 10:
        raise UserError(f"{len(texts)} documents are too few: every tenth is held out")
    return [text for n, text in enumerate(texts) if n % 10 != 9], texts[9::10]


def compare_kinds(learn: list[str], held_out: list[str], vocab_size: int, megabytes: float = 0,
                  seeds: int = 1) -> list[dict]:
    """Train each kind of tokenizer on `learn` and measure it on `held_out`; one dict per kind.

    It holds ids; tokens_per_byte; tokens_per_word; exact and covered, the share of bytes in documents that decoding
    gives back, with their white space and without; unknown, a share of tokens; train_seconds; encode_mb_per_second;
    and, if `megabytes` are asked for, bits_per_byte of a small model for each seed (measure_small_model).
    """
    size, words = count_text(held_out).values()
    if not words:
        raise UserError("every tenth document is held out, and there is not a word in those")
    there = count_text(learn)["bytes"]
    if megabytes * 1e6 > MOST_EPOCHS * there:
        raise UserError(f"{megabytes:g} megabytes are more than {MOST_EPOCHS} times the text's {there / 1e6:.3g}; "
                        f"ask for less --bits-per-byte, or give more text")
    rows = []
    with tempfile.TemporaryDirectory() as home:
        for kind in ("bpe", "unigram", "wordpiece"):
            start = time.perf_counter()
            tokenizer = train(iter(learn), kind, vocab_size, Path(home, kind))
            trained = time.perf_counter()
            ids = tokenizer.encode_batch(held_out)
            encoded = time.perf_counter()
            n = sum(map(len, ids))
            exact = covered = 0
            for text, i in zip(map(replace_surrogates, held_out), ids):
                decoded = tokenizer.decode(i)
                exact += len(text.encode()) * (decoded == text)
                covered += len(text.encode()) * ("".join(decoded.split()) == "".join(text.split()))
            unknown = sum(int((i == tokenizer.unk_id).sum()) for i in ids) if tokenizer.unk_id is not None else 0
            rows.append({"kind": kind, "ids": tokenizer.vocab_size, "tokens_per_byte": n / size,
                         "tokens_per_word": n / words, "exact": exact / size, "covered": covered / size,
                         "unknown": unknown / n, "train_seconds": trained - start,
                         "encode_mb_per_second": size / 1e6 / (encoded - trained)})
        # A model takes minutes: none is trained before every tokenizer has succeeded.
        for row in rows if megabytes else []:
            row["bits_per_byte"] = bits = []
            for seed in range(seeds):
                bits.append(measure_small_model(Path(home, row["kind"]), learn, held_out, megabytes, seed))
                print(f"{row['kind']}, seed {seed}: {bits[-1]:.4f} bits per byte", file=sys.stderr, flush=True)
    return rows


def compare_command(options: Compare) -> list[dict]:
    learn, held_out = hold_out(list(read_documents(options.files, options.reading)))
    rows = compare_kinds(learn, held_out, options.vocab_size, options.bits_per_byte, options.seeds)
    print_kinds(rows)
    return rows


def print_kinds(rows: list[dict]) -> None:
    with_bits = "bits_per_byte" in rows[0]
    print(f"{'kind':10} {'ids':>6} {'tokens/byte':>11} {'tokens/word':>11} {'exact':>7} {'covered':>7} {'unknown':>7} "
          f"{'train s':>8} {'MB/s':>6}" + "   bits/byte (seeds)" * with_bits)
    for r in rows:
        line = (f"{r['kind']:10} {r['ids']:6} {r['tokens_per_byte']:11.4f} {r['tokens_per_word']:11.3f} "
                f"{r['exact']:7.1%} {r['covered']:7.1%} {r['unknown']:7.2%} {r['train_seconds']:8.1f} "
                f"{r['encode_mb_per_second']:6.1f}")
        if with_bits:
            bits = r["bits_per_byte"]
            line += f"   {np.mean(bits):.4f} ({min(bits):.4f} to {max(bits):.4f})"
        print(line)
    if with_bits and rows[-1]["exact"] < 1:
        print("bits per byte: white space and unknown characters, which wordpiece drops, cost it nothing")


def measure_small_model(tokenizer, learn: list[str], held_out: list[str], megabytes: float, seed: int) -> float:
    """Bits per byte on `held_out` of a model of 4 layers and width 128, which train.py trains from scratch.

    It reads `megabytes` of `learn`: the same bytes, not the same tokens, whatever the tokenizer.
    """
    with tempfile.TemporaryDirectory() as home:
        total = pack(iter(learn), load(tokenizer), Path(home, "shards"), heldout=0)["splits"]["train"]
        steps = max(1, round(megabytes * 1e6 * total["tokens"] / total["bytes"] / (16 * 256)))
        Path(home, "held_out.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in held_out if t.strip()))
        cli.run_command(
            "train.py", "--model.init", "scratch", "--model.tokenizer", tokenizer, "--model.hidden-size", 128,
            "--model.intermediate-size", 352, "--model.num-hidden-layers", 4, "--model.num-attention-heads", 4,
            "--model.num-key-value-heads", 4, "--data.sources.text.path", f"{home}/shards", "--data.context", 256,
            "--data.schedule", "domain_only", "--train.batch-size", 16, "--train.micro-batch-size", 16,
            "--train.steps", steps, "--train.precision", "fp32", "--optim.lr", 2e-3, "--optim.min-lr", 2e-4,
            "--optim.warmup-ratio", 0.05, "--seed", seed, "--out", f"{home}/run")
        cli.run_command("eval.py", "--model", f"{home}/run/final", "--text", f"held_out={home}/held_out.jsonl",
                        "--json", f"{home}/eval.json")
        return read_json(f"{home}/eval.json")["texts"]["held_out"]["bits_per_byte"]
