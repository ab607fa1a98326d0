"""Training a tokenizer on text: byte-level BPE, Unigram or WordPiece. The same texts give the same files.

Two of the trainers need help for that: they number tokens, or break ties, in the order of a hash table.
"""

import io
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from core.cli import Output, Positional, Reading
from core.errors import UserError
from core.files import write_text
from text.corpus import read_documents
from text.vocabulary import LLAMA3_SPLIT, Tokenizer, load, replace_surrogates

LONG_RUNS = re.compile(r"\S{1000}|\s{1000}")
Kind = Literal["bpe", "unigram", "wordpiece"]
# {role: token}. Byte-level BPE knows every text and has no token for the unknown.
UNKNOWN = {"bpe": {}, "unigram": {"unk": "<unk>"}, "wordpiece": {"unk": "[UNK]"}}
SPECIALS = {"bos": "<|bos|>", "eos": "<|eos|>", "pad": "<|pad|>", "mask": "<|mask|>"}
ASCII = [chr(c) for c in range(33, 127)]


@dataclass(kw_only=True)
class Train:
    """Train a new tokenizer on text."""

    files: Positional[list[str]]
    """Text: .txt, .jsonl or .parquet, also .gz and .zst, or hf://org/dataset."""
    vocab_size: int
    """Ids in all, special tokens included."""
    kind: Kind = "bpe"
    """Byte-level BPE, SentencePiece's Unigram, or BERT's WordPiece."""
    reading: Reading = field(default_factory=Reading)
    output: Output


def train_command(options: Train) -> dict:
    out = Path(options.output.out)
    if (out / "tokenizer.json").exists() and not options.output.overwrite:
        raise UserError(f"{out} holds a tokenizer already; choose another --out or add --overwrite")
    tokenizer = train(read_documents(options.files, options.reading), options.kind, options.vocab_size, out)
    size = tokenizer.vocab_size
    fewer = f" of {options.vocab_size}: the text gave no more" if size < options.vocab_size else ""
    print(f"{out}: {options.kind} tokenizer with {size} ids{fewer}")
    return {"out": str(out), "kind": options.kind, "vocab_size": size}


def train(texts: Iterable[str], kind: Kind, vocab_size: int, out_dir) -> Tokenizer:
    """Train a tokenizer, write tokenizer.json and tokenizer_config.json into `out_dir`, and load it from there.

    kind: "bpe": bytes, split by Llama 3's pattern; any text survives encoding and decoding. "unigram": SentencePiece's
        without normalisation; unseen characters become bytes, and only a ▁ of the text itself is lost. "wordpiece":
        BERT's, cased; spacing and unseen characters are lost.
    vocab_size: ids, with the special tokens (the first ones) and bytes; there may be fewer if the text is short
    """
    out = Path(out_dir)
    if (out / "config.json").exists():
        raise UserError(f"{out} holds a model, whose tokenizer would be overwritten; choose another folder for --out")
    texts = itertools.chain.from_iterable(map(cut_for_counting, texts))
    first = next(texts, None)
    if first is None:
        raise UserError("there is no text to train a tokenizer on: the files are empty")
    texts = itertools.chain([first], texts)
    specials = UNKNOWN[kind] | SPECIALS
    train_kind = {"bpe": _train_bpe, "unigram": _train_unigram, "wordpiece": _train_wordpiece}[kind]
    trained = train_kind(texts, vocab_size, specials)
    put_bos_first(trained, specials["bos"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True,
              "clean_up_tokenization_spaces": False, **{f"{role}_token": token for role, token in specials.items()}}
    write_text(out / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    # Written last, because it makes the folder a tokenizer
    write_text(out / "tokenizer.json", trained.to_str(pretty=True))
    return load(out)


def put_bos_first(backend: tokenizers.Tokenizer, bos: str) -> None:
    """Let `backend` put the token `bos` before a text when it adds special tokens (ours never asks it to)."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))])


def cut_for_counting(text: str) -> list[str]:
    """Cut `text`, without loss, into parts of at most 100,000 characters and words of at most 1,000.

    `tokenizers` takes 170 bytes of memory per character of a part, and a merge takes time in the length of a word: one
    of a million letters would take hours.
    """
    text = replace_surrogates(text)
    parts = []
    for k in range(0, len(text), 100_000):
        piece = text[k:k + 100_000]
        cuts = [0, *(run.end() for run in LONG_RUNS.finditer(piece)), len(piece)]
        parts += [piece[a:b] for a, b in itertools.pairwise(cuts) if a < b]
    return parts


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
    # All texts first: an error while one is read must not pass through SentencePiece.
    texts = list(texts)
    lines = (line[i:i + 10_000] for text in texts for line in text.split("\n") for i in range(0, len(line), 10_000))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, model_type="unigram", hard_vocab_limit=False,
            vocab_size=vocab_size - len(specials) + 1, bos_id=-1, eos_id=-1, pad_id=-1, byte_fallback=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            max_sentence_length=100_000, minloglevel=2,
            # The letters of byte names, so that the text "<0x41>" never needs the piece of that name
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
    letters = sorted(set(backend.normalizer.normalize_str("".join(sorted(set().union(*texts, ASCII))))))
    inner = ["##" + c for c in letters if len(backend.pre_tokenizer.pre_tokenize_str(f"a{c}a")) == 1]
    _check_size(vocab_size, "letters of the text and special tokens", len(letters) + len(inner) + len(specials))
    backend.train_from_iterator(texts, trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*specials.values(), *inner], initial_alphabet=letters,
        show_progress=False))
    description = json.loads(backend.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] in specials.values()]
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def _check_size(vocab_size: int, what: str, needed: int) -> None:
    if vocab_size <= needed:
        raise UserError(f"vocabulary of {vocab_size} is too small: {what} alone need {needed}; ask for more")
