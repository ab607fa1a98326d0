"""Training a tokenizer on text: byte-level BPE, Unigram or WordPiece, and a comparison of the three on the same text.

The same texts give the same files, although two of the libraries' trainers follow the order of a hash table.
"""

import io
import itertools
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from core import cli
from core.cli import Output, Positional, Reading
from core.config import setting
from core.errors import UserError
from core.files import FolderKind, claim_folder, new_folder, read_json, write_text
from text.corpus import read_documents, utf8
from text.shards import pack
from text.vocabulary import LLAMA3_SPLIT, Tokenizer, load, replace_surrogates

LONG_RUNS = re.compile(r"\S{1000}|\s{1000}")
Kind = Literal["bpe", "unigram", "wordpiece"]
# {role: token}. Byte-level BPE can encode any text and has no token for unknown characters.
UNKNOWN = {"bpe": {}, "unigram": {"unk": "<unk>"}, "wordpiece": {"unk": "[UNK]"}}
SPECIALS = {"bos": "<|bos|>", "eos": "<|eos|>", "pad": "<|pad|>", "mask": "<|mask|>"}
# A folder with a tokenizer and nothing else.
FOLDER = FolderKind("tokenizer folder", (
    "tokenizer.json", "tokenizer.model", "tokenizer.tiktoken", "vocab.json", "merges.txt", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json"),
    {"tokenizer_config.json": b'"clean_up_tokenization_spaces": false'})
MOST_EPOCHS = 16        # train.py refuses to repeat a text more often


@dataclass(kw_only=True)
class Train:
    """Train a new tokenizer on text."""

    files: Positional[list[str]]
    """Files, folders, patterns, @LIST or hf://org/dataset: text, .jsonl or .parquet, also .gz and .zst."""
    vocab_size: int
    """Ids in all, special tokens included."""
    kind: Kind = "bpe"
    """Byte-level BPE, SentencePiece's Unigram, or BERT's WordPiece."""
    reading: Reading = field(default_factory=Reading)
    output: Output


@dataclass(kw_only=True)
class Compare:
    """Train BPE, Unigram and WordPiece on the same text and compare them."""

    files: Positional[list[str]]
    """Files, folders, patterns, @LIST or hf://org/dataset: text, .jsonl or .parquet, also .gz and .zst."""
    vocab_size: int = 8000
    """Ids in all, special tokens included."""
    bits_per_byte: float = setting(0.0, at_least=0, below=math.inf)
    """Also train a small model for each kind and seed on this many megabytes; each takes minutes."""
    seeds: int = setting(2, at_least=1)
    """Seeds of --bits-per-byte."""
    reading: Reading = field(default_factory=Reading)


def train_command(options: Train) -> dict:
    out = Path(options.output.out)
    with claim_folder(out, options.output.overwrite, FOLDER):
        texts = read_documents(options.files, options.reading)
        size = train(texts, options.kind, options.vocab_size, out).vocab_size
    fewer = f" of {options.vocab_size}: the text gave no more" if size < options.vocab_size else ""
    print(f"{out}: {options.kind} tokenizer with {size} ids{fewer}, from {texts.describe()}")
    return {"out": str(out), "kind": options.kind, "vocab_size": size, "documents": texts.documents,
            "empty_documents": texts.empty}


def train(texts: Iterable[str], kind: Kind, vocab_size: int, out_dir) -> Tokenizer:
    """Train a tokenizer, write tokenizer.json and tokenizer_config.json as the folder `out_dir`, and load it;
    a tokenizer folder of ours is replaced.

    kind: "bpe": bytes, split by Llama 3's pattern; any text survives encoding and decoding. "unigram": SentencePiece's
        without normalisation; unseen characters become bytes, and only a ▁ of the text itself is lost. "wordpiece":
        BERT's, cased; spacing and unseen characters are lost.
    vocab_size: ids, with the special tokens (the first ones) and bytes; there may be fewer if the text is short"""
    out = Path(out_dir)
    with new_folder(out, overwrite=True, kind=FOLDER) as folder:
        write_trained(texts, kind, vocab_size, folder)
    return load(out)


def write_trained(texts: Iterable[str], kind: Kind, vocab_size: int, folder: Path) -> None:
    parts, specials = itertools.chain.from_iterable(map(cut_for_counting, texts)), UNKNOWN[kind] | SPECIALS
    first = next(parts, None)
    if first is None:
        raise UserError("there is no text to train a tokenizer on: the files are empty")
    train_kind = {"bpe": _train_bpe, "unigram": _train_unigram, "wordpiece": _train_wordpiece}[kind]
    trained = train_kind(itertools.chain([first], parts), vocab_size, specials)
    put_bos_first(trained, specials["bos"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True,
              "clean_up_tokenization_spaces": False, **{f"{role}_token": token for role, token in specials.items()}}
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_text(folder / "tokenizer.json", trained.to_str(pretty=True))


def put_bos_first(backend: tokenizers.Tokenizer, bos: str) -> None:
    """Let `backend` put the token `bos` before a text when it adds special tokens (ours never asks it to)."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))])


def cut_for_counting(text: str) -> Iterator[str]:
    """Cut `text`, without loss, into parts of at most 100,000 characters and words of at most 1,000: `tokenizers` takes
    170 bytes of memory per character of a part, and one word of a million letters would take hours to merge."""
    text = replace_surrogates(text)
    for k in range(0, len(text), 100_000):
        piece = text[k:k + 100_000]
        cuts = [0, *(run.end() for run in LONG_RUNS.finditer(piece)), len(piece)]
        yield from (piece[a:b] for a, b in itertools.pairwise(cuts) if a < b)


def _train_bpe(texts: Iterable[str], vocab_size: int, specials: dict) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    _check_size(vocab_size, "bytes and special tokens", len(alphabet) + len(specials))
    backend = tokenizers.Tokenizer(models.BPE())
    split_as_llama3(backend)
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(specials.values()), initial_alphabet=alphabet, show_progress=False))
    return backend


def split_as_llama3(backend: tokenizers.Tokenizer) -> None:
    """Cut texts by Llama 3's pattern, and write bytes in GPT-2's letters."""
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()


def _train_unigram(texts: Iterable[str], vocab_size: int, specials: dict) -> tokenizers.Tokenizer:
    """Train by SentencePiece. (The trainer of `tokenizers` gives another vocabulary each time.)"""
    _check_size(vocab_size, "bytes and special tokens", 256 + len(specials))
    # All texts are read first: an error of their reading must not pass through SentencePiece.
    texts = list(texts)
    lines = (line[i:i + 10_000] for text in texts for line in text.split("\n") for i in range(0, len(line), 10_000))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, model_type="unigram", hard_vocab_limit=False,
            vocab_size=vocab_size - len(specials) + 1, bos_id=-1, eos_id=-1, pad_id=-1, byte_fallback=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            max_sentence_length=100_000, minloglevel=2,
            # The letters of byte names become pieces, so that the text "<0x41>" is never encoded as the byte's piece.
            required_chars="<0x123456789ABCDEF>")
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]
        raise UserError(f"no unigram vocabulary of {vocab_size} from this text: {reason}") from None
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    names = [*specials.values(), *(f"<0x{b:02X}>" for b in range(256))]
    pieces = [(trained.id_to_piece(i), trained.get_score(i)) for i in range(trained.piece_size())
              if not trained.is_byte(i) and not trained.is_unknown(i)]
    # A log probability of -1e6 keeps the model from finding special tokens and byte names in text.
    vocab = [(name, -1e6) for name in names] + pieces
    backend = tokenizers.Tokenizer(models.Unigram(vocab, names.index(specials["unk"]), byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(list(specials.values()))
    return backend


def _train_wordpiece(texts: Iterable[str], vocab_size: int, specials: dict) -> tokenizers.Tokenizer:
    texts = list(texts)
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token=specials["unk"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    # The trainer numbers letters inside words (##a) in the order of a hash table, and ties between merges follow these
    # numbers. As special tokens they are numbered in our order. In the saved tokenizer they are ordinary tokens again.
    ascii_letters = map(chr, range(33, 127))
    letters = sorted(set(backend.normalizer.normalize_str("".join(sorted(set().union(*texts, ascii_letters))))))
    inner = ["##" + c for c in letters if len(backend.pre_tokenizer.pre_tokenize_str(f"a{c}a")) == 1]
    _check_size(vocab_size, "letters of the text and special tokens", len(letters) + len(inner) + len(specials))
    special_tokens = [*specials.values(), *inner]
    backend.train_from_iterator(texts, trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=letters, show_progress=False))
    description = json.loads(backend.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] in specials.values()]
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def _check_size(vocab_size: int, what: str, needed: int) -> None:
    if vocab_size <= needed:
        raise UserError(f"vocabulary of {vocab_size} is too small: {what} alone need {needed}; ask for more")


def compare_command(options: Compare) -> list[dict]:
    texts = read_documents(options.files, options.reading)
    learn, held_out = hold_out(list(texts))
    megabytes, available = options.bits_per_byte, count_text(learn)[0] / 1e6
    if megabytes > MOST_EPOCHS * available:
        raise UserError(f"{megabytes:g} megabytes are more than {MOST_EPOCHS} times the text's {available:.3g}; "
                        f"ask for less --bits-per-byte, or give more text")
    with tempfile.TemporaryDirectory() as home:
        rows = [measure_kind(kind, learn, held_out, options.vocab_size, Path(home, kind)) for kind in get_args(Kind)]
        # A model takes minutes: none is trained before every tokenizer has succeeded.
        for row in rows if megabytes else []:
            row["bits_per_byte"] = bits = []
            for seed in range(options.seeds):
                bits.append(measure_small_model(Path(home, row["kind"]), learn, held_out, megabytes, seed))
                print(f"{row['kind']}, seed {seed}: {bits[-1]:.4f} bits per byte", file=sys.stderr, flush=True)
    print(texts.describe())
    print(f"{'kind':10} {'ids':>6} {'tokens/byte':>11} {'tokens/word':>11} {'exact':>7} {'covered':>7} {'unknown':>7} "
          f"{'train s':>8} {'MB/s':>6}" + "   bits/byte (seeds)" * bool(megabytes))
    for row in rows:
        bits = row.get("bits_per_byte")
        print("{kind:10} {ids:6} {tokens_per_byte:11.4f} {tokens_per_word:11.3f} {exact:7.1%} {covered:7.1%} "
              "{unknown:7.2%} {train_seconds:8.1f} {encode_mb_per_second:6.1f}".format(**row)
              + (f"   {np.mean(bits):.4f} ({min(bits):.4f} to {max(bits):.4f})" if bits else ""))
    if megabytes and rows[-1]["exact"] < 1:
        print("bits per byte: white space and unknown characters, which wordpiece drops, cost it nothing")
    return rows


def hold_out(texts: list[str]) -> tuple[list[str], list[str]]:
    """(texts to learn from, every tenth text)."""
    if len(texts) < 10:
        raise UserError(f"{len(texts)} documents are too few: every tenth is held out")
    return [text for n, text in enumerate(texts) if n % 10 != 9], texts[9::10]


def count_text(texts: list[str]) -> tuple[int, int]:
    """(bytes, words between white space) of all texts."""
    return sum(len(utf8(text)) for text in texts), sum(len(text.split()) for text in texts)


def measure_kind(kind: Kind, learn: list[str], held_out: list[str], vocab_size: int, folder: Path) -> dict:
    """Train a tokenizer on `learn` into `folder`, and measure it on `held_out`. exact, covered: the share of bytes in
    documents that decoding gives back, with their white space and without. unknown: a share of tokens."""
    size, words = count_text(held_out)
    if not words:
        raise UserError("every tenth document is held out, and there is not a word in those")
    start = time.perf_counter()
    tokenizer = train(iter(learn), kind, vocab_size, folder)
    trained = time.perf_counter()
    ids = tokenizer.encode_batch(held_out)
    encoded = time.perf_counter()
    n, unknown = sum(map(len, ids)), sum(int((i == tokenizer.unk_id).sum()) for i in ids)
    exact = covered = 0
    for text, decoded in zip(map(replace_surrogates, held_out), map(tokenizer.decode, ids)):
        exact += len(text.encode()) * (decoded == text)
        covered += len(text.encode()) * ("".join(decoded.split()) == "".join(text.split()))
    return {"kind": kind, "ids": tokenizer.vocab_size, "tokens_per_byte": n / size, "tokens_per_word": n / words,
            "exact": exact / size, "covered": covered / size, "unknown": unknown / n,
            "train_seconds": trained - start, "encode_mb_per_second": size / 1e6 / (encoded - trained)}


def measure_small_model(tokenizer, learn: list[str], held_out: list[str], megabytes: float, seed: int) -> float:
    """Bits per byte on `held_out` of a model of 4 layers and width 128, trained from scratch by train.py on `megabytes`
    of `learn`: the same bytes, not the same tokens, whatever the tokenizer."""
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
