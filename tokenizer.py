"""One interface over the four ways a tokenizer is kept on disk, and the training of a new one.

    python tokenizer.py train --kind bpe --vocab-size 8000 --out out/tokenizer FILE...     .txt, .jsonl, .parquet
    python tokenizer.py encode --tokenizer DIR_OR_FILE "Habeas corpus"                      prints ids and pieces
    python tokenizer.py extend|add|report|compare --help                                    see extend.py

| file                    | kind          | who encodes                                                            |
|-------------------------|---------------|------------------------------------------------------------------------|
| tokenizer.json          | tokenizers    | `tokenizers`; its truncation and padding are switched off              |
| tokenizer.model         | sentencepiece | `sentencepiece`                                                        |
| tokenizer.model (text)  | tiktoken      | `tiktoken` with Llama 3's pattern and its 256 special tokens           |
| vocab.json + merges.txt | gpt2          | `tiktoken` where ids tell the order of the merges, else `tokenizers`   |

Ids are the library's own. Whether the text "</s>" inside a document becomes the control token is left to the library
too: `tokenizers` says yes, the other two say no. Half a surrogate pair, which JSON can carry and no library accepts,
becomes U+FFFD before any of them sees it.

Which ids are BOS, EOS, pad, unk and mask, and whether documents begin with BOS, is taken from the first that says it:
tokenizer_config.json (null means none), special_tokens_map.json, config.json, generation_config.json, the library.
"""

import core.threads

import base64
import functools
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

ROLES = ("bos", "eos", "pad", "unk", "mask")

# The split pattern and special tokens, which the file does not hold: llama-models, models/llama3/tokenizer.py
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_BASE = 128_000
LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
                   "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>",
                   "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>",
                   *(f"<|reserved_special_token_{i}|>" for i in range(2, 246))]

# GPT-2's published pattern, as tiktoken spells it (possessive, and one white-space character at a time at the end)
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_CLASSES = ("GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer")       # these, fast or not, split by that pattern

# byte -> GPT-2's letter for it: the byte's own where that prints in Latin-1, else the next one from U+0100 on
_PRINTING = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
BYTE_LETTERS = {b: chr(b) for b in _PRINTING} | {
    b: chr(0x100 + n) for n, b in enumerate(sorted(set(range(256)) - set(_PRINTING)))}

# Unicode's White_Space, as the patterns above understand \s (Python's \s has four control characters more)
LONG_SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{500000,}+")

_ATOMS = ("", " ", "   ", "\t", "\n", "\r\n", "\n \n", "\x00", "\x85", "\xa0", "\u200b", "\u3000", "\ufeff",
          "\ufffd", "a", "The", "don't", "DON'T", "it'\u017f", "7", "1234567", "\u0663\u0664", "\u2167", "x^2",
          "!!!", "----", "_", "\u2581", "\xe9", "e\u0301", "\ufb01", "\xdf\u1e9e\u0130", "\u0416", "\u05d0\u05b7",
          "\u0627\u0644", "\u0939\u093f", "\u0e33", "\u6f22\u5b57", "\ud55c", "\U0001f642", "\U0001f1e9\U0001f1ea",
          "\U0001f469\u200d\U0001f4bb", "\u1c89", "\U00010d40", "\U0001e5d0", "\ua7dc",     # the last four: Unicode 16
          "<s>", "</s>", "<unk>", "<|endoftext|>", "<|end_of_text|>", "<0x41>")
PROBES = [*_ATOMS, *(a + b for a in _ATOMS for b in (" b", "\n", *_ATOMS[1:14:4])), "".join(_ATOMS), " ".join(_ATOMS)]


class Tokenizer:
    """What `load` returns.

    kind: "tokenizers", "sentencepiece", "tiktoken" or "gpt2"; library: name and version of the package that encodes
    vocab_size: largest id + 1, added and special tokens included
    bos_id, eos_id, pad_id, unk_id, mask_id: int, or None where there is none
    add_bos: the model was trained with BOS before each document
    special_ids: sorted ids of control tokens and of the five above; no objective masks them or draws them at random
    tokens: the string of each id in the library's own spelling (byte-level ones in GPT-2's letters), None for a hole
    """

    def _describe(self, folder: Path, kind: str, library: str, vocab: dict[str, int], control, defaults: dict):
        """Fill the attributes above. `defaults`: role -> token that holds where no file names one, and "add_bos"."""
        self.kind, self.library = kind, f"{library} {version(library)}"
        self._vocab, self.vocab_size = vocab, max(vocab.values()) + 1
        self.tokens: list[str | None] = [None] * self.vocab_size
        for token, i in vocab.items():
            self.tokens[i] = token
        named = {name: _read_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")}
        numbered = {name: _read_json(folder / name) for name in ("config.json", "generation_config.json")}
        self.bos_id, self.eos_id, self.pad_id, self.unk_id, self.mask_id = (
            self._role(role, named, numbered, vocab.get(defaults.get(role))) for role in ROLES)
        config = named["tokenizer_config.json"]
        add_bos = config.get("add_bos_token")
        if add_bos is None and config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast"):
            add_bos = True
        self.add_bos = self.bos_id is not None and bool(self._library_adds_bos() if add_bos is None else add_bos)
        roles = {self.bos_id, self.eos_id, self.pad_id, self.unk_id, self.mask_id} - {None}
        self.special_ids = sorted(roles | set(control))

    def _role(self, role: str, named: dict, numbered: dict, default: int | None) -> int | None:
        for file, values in named.items():
            if (key := f"{role}_token") in values:
                token = values[key]["content"] if isinstance(values[key], dict) else values[key]
                if token is None or token in self._vocab:
                    return self._vocab.get(token)
                if role in ("bos", "eos"):
                    raise ValueError(f"{file} names {token!r} as {key}, but the vocabulary beside it has no such "
                                     f"token; correct {key}, or bring the tokenizer file that belongs to it")
        for file, values in numbered.items():
            i = values.get(key := f"{role}_token_id")
            i = i[0] if isinstance(i, list) and i else i
            if isinstance(i, int) and 0 <= i < self.vocab_size:
                return i
            if isinstance(i, int) and role in ("bos", "eos"):
                raise ValueError(f"{file} says {key} {i}, but the tokenizer beside it ends at id "
                                 f"{self.vocab_size - 1}; the two files belong to different models")
        return default

    def _library_adds_bos(self) -> bool:
        return True

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`; BOS and EOS only where asked. ValueError where one is asked for and there is none."""
        for wanted, role, i in ((bos, "bos", self.bos_id), (eos, "eos", self.eos_id)):
            if wanted and i is None:
                raise ValueError(f"this {self.kind} tokenizer has no {role.upper()} token; "
                                 f"name one as {role}_token in tokenizer_config.json beside it")
        return [self.bos_id] * bos + self._encode(clean(text)) + [self.eos_id] * eos

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """uint32 ids of each text (read-only arrays), in order, the same as `encode`'s, on all cores."""
        return self._encode_batch([clean(text) for text in texts]) if texts else []

    def decode(self, ids) -> str:
        """Text of `ids` (list, array or tensor). Bytes that are no UTF-8, such as the first half of a character whose
        second half is the next id, become U+FFFD. Control tokens appear by name, in SentencePiece as nothing."""
        ids = [int(i) for i in ids]
        for i in ids:
            self.id_to_token(i)
        return self._decode(ids)

    def token_to_id(self, token: str) -> int | None:
        return self._vocab.get(token)

    def id_to_token(self, i: int) -> str:
        if not 0 <= i < self.vocab_size or self.tokens[i] is None:
            raise ValueError(f"id {i} is not in the tokenizer, which has ids from 0 to {self.vocab_size - 1}")
        return self.tokens[i]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (64 hex digits) of the id -> token table and of the ids of PROBES: the same for any file that encodes
        the same, another for an extended vocabulary or a library whose Unicode tables changed."""
        return hashlib.sha256(json.dumps([self.tokens, [self.encode(t) for t in PROBES]]).encode()).hexdigest()


class _HuggingFace(Tokenizer):
    def __init__(self, lib: tokenizers.Tokenizer, folder: Path, kind: str, control, defaults: dict):
        self._lib = lib
        lib.no_truncation()
        lib.no_padding()
        control = [*control, *(i for i, token in lib.get_added_tokens_decoder().items() if token.special)]
        defaults = {"unk": getattr(lib.model, "unk_token", None), **defaults}
        self._describe(folder, kind, "tokenizers", lib.get_vocab(with_added_tokens=True), control, defaults)

    def _library_adds_bos(self):
        return self._lib.encode("a").ids[:1] == [self.bos_id]

    def _encode(self, text):
        return self._lib.encode(text, add_special_tokens=False).ids

    def _encode_batch(self, texts):
        return [np.array(e.ids, np.uint32) for e in self._lib.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, ids):
        return self._lib.decode(ids, skip_special_tokens=False)


class _SentencePiece(Tokenizer):
    def __init__(self, lib: sentencepiece.SentencePieceProcessor, folder: Path):
        self._lib, n = lib, lib.piece_size()
        vocab = {lib.id_to_piece(i): i for i in range(n)}
        added = _added_tokens(folder, vocab)
        control = [i for i in range(n) if lib.is_control(i) or lib.is_unknown(i)]
        defaults = {role: lib.id_to_piece(i) for role, i in (("bos", lib.bos_id()), ("eos", lib.eos_id()),
                                                             ("pad", lib.pad_id()), ("unk", lib.unk_id())) if i >= 0}
        self._describe(folder, "sentencepiece", "sentencepiece", vocab | added, [*control, *added.values()], defaults)

    def _encode(self, text):
        return self._lib.encode(text)

    def _encode_batch(self, texts):
        return [ids.view(np.uint32) for ids in self._lib.encode(texts, out_type="numpy", num_threads=_cores())]

    def _decode(self, ids):
        return self._lib.decode([i for i in ids if i < self._lib.piece_size()])


class _Tiktoken(Tokenizer):
    """encoding: with at least one special token, or the search for special tokens costs more than the encoding."""

    def __init__(self, encoding: tiktoken.Encoding, folder: Path, kind: str, vocab: dict, control, defaults: dict):
        self._encoding = encoding
        self._describe(folder, kind, "tiktoken", vocab, control, defaults)

    def _library_adds_bos(self):
        return self.kind == "tiktoken"          # Llama 3 was trained so, GPT-2 was not

    def _encode(self, text):
        return self._array(text).tolist()

    def _encode_batch(self, texts):
        step = max(1, len(texts) // (16 * _cores()))        # a task for each text costs more than encoding a line
        with ThreadPoolExecutor(_cores()) as pool:
            parts = pool.map(lambda i: [self._array(text) for text in texts[i:i + step]], range(0, len(texts), step))
            return list(itertools.chain.from_iterable(parts))

    def _array(self, text):
        try:                                    # unlike encode_ordinary: no Python list, and an error, not a Rust panic
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:                      # a million white-space characters in a row overflow the regex's stack
            parts = self._cut(text)
            if len(parts) == 1:
                raise
            return np.concatenate([self._array(part) for part in parts])

    def _cut(self, text: str) -> list[str]:
        """The text in parts that encode as they do together: the pattern ends a piece before the last character of a
        run of white space, except that Llama 3's keeps a newline there with the run (and does not overflow then)."""
        keep = "\r\n" if self.kind == "tiktoken" else ""
        ends = [m.end() for m in LONG_SPACES.finditer(text)]
        cuts = [end - 1 for end in ends if end < len(text) and text[end - 1] not in keep]
        return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]

    def _decode(self, ids):
        return self._encoding.decode(ids, errors="replace")


def load(path) -> Tokenizer:
    """The tokenizer in `path`: a folder (a model's, or one with nothing but tokenizer files) or a file, whose folder is
    then asked for BOS, EOS and so on. In a folder the first of tokenizer.json, tokenizer.model and vocab.json with
    merges.txt counts. ValueError for anything else, for damaged files and for files that contradict each other."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"tokenizer {path} does not exist; name a model folder or a tokenizer file")
    if path.is_dir():
        names = ("tokenizer.json", "tokenizer.model", "vocab.json")
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise ValueError(f"no tokenizer in {path}: it has no tokenizer.json, no tokenizer.model and no vocab.json "
                             f"with merges.txt; copy them from the base model's page")
        path = found
    if path.name in ("vocab.json", "merges.txt"):
        return _load_gpt2(path.parent)
    data = path.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        return _load_llama3(data, path)
    try:
        if path.suffix == ".json":
            lib = tokenizers.Tokenizer.from_buffer(data)
        else:
            lib = sentencepiece.SentencePieceProcessor()
            lib.LoadFromSerializedProto(data)
    except Exception as error:      # `tokenizers` raises no narrower class for a file it cannot read
        what = "tokenizer.json" if path.suffix == ".json" else "SentencePiece model or tiktoken ranks"
        raise ValueError(f"{path} cannot be read as {what} ({error}); download it again") from error
    if path.suffix == ".json":
        return _HuggingFace(lib, path.parent, "tokenizers", (), {})
    return _SentencePiece(lib, path.parent)


def _load_llama3(data: bytes, path: Path) -> Tokenizer:
    """tiktoken ranks, one "base64 rank" a line. Ids above the special tokens are allowed: an extended vocabulary's."""
    ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not 'base64 rank' ({error}); download it again") from None
    used = set(ranks.values())
    base = next(i for i in itertools.count() if i not in used)
    if base != LLAMA3_BASE or len(used) != len(ranks) or used & set(range(base, base + len(LLAMA3_SPECIALS))):
        raise ValueError(f"{path} has {base} ranks from 0 on where Llama 3 has {LLAMA3_BASE} and then 256 free "
                         f"ids; another model's split pattern and special tokens are not in such a file: use its "
                         f"tokenizer.json")
    specials = {token: base + i for i, token in enumerate(LLAMA3_SPECIALS)}
    # `\s++$` matches what `\s+(?!\S)` matches at the end of the text, without its stack
    encoding = tiktoken.Encoding(path.name, pat_str=LLAMA3_SPLIT.replace(r"|\s+(?!\S)", r"|\s++$|\s+(?!\S)"),
                                 mergeable_ranks=ranks, special_tokens=specials)
    vocab = {_byte_letters(token): rank for token, rank in ranks.items()}
    defaults = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"}
    return _Tiktoken(encoding, path.parent, "tiktoken", vocab | specials, specials.values(), defaults)


def _load_gpt2(folder: Path) -> Tokenizer:
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; a GPT-2 tokenizer is vocab.json and merges.txt together")
    made_by = _read_json(folder / "tokenizer_config.json").get("tokenizer_class")
    if made_by and made_by.removesuffix("Fast") not in GPT2_CLASSES:
        raise ValueError(f"vocab.json and merges.txt in {folder} belong to a {made_by}, which splits text otherwise "
                         f"than GPT-2; add its tokenizer.json")
    vocab = _read_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[lines[0].startswith("#version"):] if line.strip()]
    wrong = next((m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= vocab.keys()), None)
    if wrong or not vocab:
        raise ValueError(f"vocab.json in {folder} does not belong to merges.txt: it lacks the merge "
                         f"{' '.join(wrong or ())!r} or a part of it; download both again")
    made = {"".join(merge) for merge in merges}
    controls = {token: i for token, i in vocab.items() if token not in made and token not in BYTE_LETTERS.values()}
    added = _added_tokens(folder, vocab)
    lib = tokenizers.Tokenizer(models.BPE(vocab, merges))
    ranks, defaults = _ranks(vocab, merges, lib), {"eos": "<|endoftext|>"}
    if ranks is None:
        lib.pre_tokenizer, lib.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        if added:
            raise ValueError(f"{folder} has added tokens, and ids that do not follow merges.txt; this needs a "
                             f"tokenizer.json: save one with transformers' AutoTokenizer")
        return _HuggingFace(lib, folder, "gpt2", controls.values(), defaults)
    controls |= added
    encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_SPLIT, mergeable_ranks=ranks,
                                 special_tokens=controls or {"\0no special token": max(vocab.values()) + 1})
    return _Tiktoken(encoding, folder, "gpt2", vocab | added, controls.values(), defaults)


def _ranks(vocab: dict, merges: list, bpe: tokenizers.Tokenizer) -> dict[bytes, int] | None:
    """tiktoken's bytes -> id where it encodes as `bpe` (which has no split pattern yet) does, else None.

    tiktoken joins the adjacent pair whose union has the lowest id, `bpe` the pair that stands first in the merges. This
    is one and the same if ids rise with the merges and each union can come from one pair only: the pair of its merge
    must be what the lower merges leave of its text, and that is so exactly if `bpe` gives this text as one token.
    """
    made = ["".join(pair) for pair in merges]
    ids = [vocab[token] for token in made]
    letters = list(BYTE_LETTERS.values())
    if ids != sorted(set(ids)) or not set(letters) <= vocab.keys() or not set("".join(made)) <= set(letters):
        return None
    if [e.ids for e in bpe.encode_batch_fast(made)] != [[i] for i in ids]:
        return None
    byte = {letter: b for b, letter in BYTE_LETTERS.items()}
    return {bytes(byte[letter] for letter in token): vocab[token] for token in letters + made}


def _byte_letters(token: bytes) -> str:
    return token.decode("latin-1").translate(BYTE_LETTERS)


def _added_tokens(folder: Path, vocab: dict[str, int]) -> dict[str, int]:
    """Control tokens that added_tokens.json and tokenizer_config.json put behind a vocabulary that does not hold them.

    They get their ids and are never found in text. An ordinary added token would have to be found there, by rules which
    only tokenizer.json states in full: refused.
    """
    config = _read_json(folder / "tokenizer_config.json")
    entries = {entry["content"]: (int(i), entry) for i, entry in config.get("added_tokens_decoder", {}).items()}
    added = {token: i for token, (i, _) in entries.items()} | _read_json(folder / "added_tokens.json")
    control = {token for token, (_, entry) in entries.items() if entry.get("special")}
    for values in (config, _read_json(folder / "special_tokens_map.json")):
        listed = [values.get(f"{role}_token") for role in ROLES] + (values.get("additional_special_tokens") or [])
        control |= {value["content"] if isinstance(value, dict) else value for value in listed}
    added = {token: i for token, i in added.items() if vocab.get(token) != i}
    taken = set(vocab.values())
    for token, i in added.items():
        if token in vocab or i in taken:
            raise ValueError(f"added token {token!r} of {folder} has id {i}, but the vocabulary beside it says "
                             f"otherwise; the files belong to different models")
        if token not in control:
            raise ValueError(f"added_tokens.json or tokenizer_config.json in {folder} adds the ordinary token "
                             f"{token!r}; how to find it in text stands in tokenizer.json: save one with transformers")
    return added


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} where a table of names belongs; download it again")
    return value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def clean(text: str) -> str:
    """Surrogate pairs as the character they mean, lone surrogates as U+FFFD; any other text as it is."""
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


LONG_WORDS = re.compile(r"\S{1000}|\s{1000}")
SPECIALS = {"bos": "<|bos|>", "eos": "<|eos|>", "pad": "<|pad|>", "mask": "<|mask|>"}
ASCII = [chr(c) for c in range(33, 127)]


def train(texts: Iterable[str], kind: str, vocab_size: int, out_dir, specials: dict[str, str] = SPECIALS) -> Tokenizer:
    """Train a tokenizer, write tokenizer.json and tokenizer_config.json into `out_dir` and load it. The same texts in
    the same order give the same files.

    kind: "bpe": bytes, split by Llama 3's pattern; any text survives encoding and decoding.
        "unigram": as SentencePiece's, ▁ for the space but no normalisation; unseen characters become bytes, so that
        only a ▁ in the text itself is lost. "wordpiece": as BERT's, cased; spacing and unseen characters are lost.
    vocab_size: ids, specials and bytes included; fewer where the text does not give as many
    specials: role ("bos", "eos", "pad", "mask", "unk") -> token; they get the first ids. Documents start with BOS.
    """
    if unknown := set(specials) - set(ROLES):
        raise ValueError(f"specials has the role {min(unknown)}; the roles are {', '.join(ROLES)}")
    out = Path(out_dir)
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a model, whose tokenizer would be overwritten; choose another folder for --out")
    texts = itertools.chain.from_iterable(map(parts, texts))
    first = next(texts, None)
    if first is None:
        raise ValueError("there is no text to train a tokenizer on: the files are empty")
    texts = itertools.chain([first], texts)
    if kind == "bpe":
        lib = _train_bpe(texts, vocab_size, specials)
    elif kind == "unigram":
        lib = _train_unigram(list(texts), vocab_size, specials := {"unk": "<unk>"} | specials)
    elif kind == "wordpiece":
        lib = _train_wordpiece(list(texts), vocab_size, specials := {"unk": "[UNK]"} | specials)
    else:
        raise ValueError(f"kind is {kind!r}, but must be bpe, unigram or wordpiece")
    if "bos" in specials:
        bos = specials["bos"]
        lib.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, lib.token_to_id(bos))])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": "bos" in specials,
              "clean_up_tokenization_spaces": False, **{f"{role}_token": token for role, token in specials.items()}}
    out.mkdir(parents=True, exist_ok=True)
    files = {"tokenizer_config.json": json.dumps(config, indent=2) + "\n", "tokenizer.json": lib.to_str(pretty=True)}
    for name, content in files.items():         # tokenizer.json, which makes the folder a tokenizer, in the end
        temporary = out / f".{name}.partial"
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, out / name)
    return load(out)


def parts(text: str) -> list[str]:
    """The cleaned text cut for the counting of words: at most 100,000 characters, as `tokenizers` takes 170 bytes of
    memory for each, and words of at most 1,000, as each merge takes time in the length of the word: one of a million
    characters would take hours."""
    text = clean(text)
    pieces = [text[k:k + 100_000] for k in range(0, len(text), 100_000)]
    cuts = [[0, *(match.end() for match in LONG_WORDS.finditer(piece)), len(piece)] for piece in pieces]
    return [piece[a:b] for piece, at in zip(pieces, cuts) for a, b in itertools.pairwise(at) if a < b]


def _train_bpe(texts, vocab_size, specials):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    _check_size(vocab_size, "bytes and special tokens", len(alphabet) + len(specials))
    lib = tokenizers.Tokenizer(models.BPE())
    lib.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    lib.decoder = decoders.ByteLevel()
    lib.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(specials.values()), initial_alphabet=alphabet, show_progress=False))
    return lib


def _train_unigram(texts, vocab_size, specials):
    """By SentencePiece's trainer: that of `tokenizers` gives another vocabulary each time (order of a hash table)."""
    model = io.BytesIO()
    _check_size(vocab_size, "bytes and special tokens", 256 + len(specials))
    lines = (line[i:i + 10_000] for text in texts for line in text.split("\n") for i in range(0, len(line), 10_000))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, model_type="unigram", hard_vocab_limit=False,
            vocab_size=vocab_size - len(specials) + 1, bos_id=-1, eos_id=-1, pad_id=-1, byte_fallback=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            max_sentence_length=100_000, minloglevel=2,
            required_chars="<0x123456789ABCDEF>")       # so that the text "<0x41>" never needs the piece of that name
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]
        raise ValueError(f"no unigram vocabulary of {vocab_size} from this text: {reason}") from None
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    names = [*specials.values(), *(f"<0x{b:02X}>" for b in range(256))]
    pieces = [(trained.id_to_piece(i), trained.get_score(i)) for i in range(trained.piece_size())
              if not trained.is_byte(i) and not trained.is_unknown(i)]
    vocab = [(name, -1e6) for name in names] + pieces   # -1e6: not to be found in text by the model
    lib = tokenizers.Tokenizer(models.Unigram(vocab, names.index(specials["unk"]), byte_fallback=True))
    lib.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    lib.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    lib.add_special_tokens(list(specials.values()))
    return lib


def _train_wordpiece(texts, vocab_size, specials):
    lib = tokenizers.Tokenizer(models.WordPiece(unk_token=specials["unk"]))
    lib.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    lib.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    lib.decoder = decoders.WordPiece()
    # The trainer numbers the inner letters (##a) in the order of a hash table, and ties between merges follow the
    # numbers: given as special tokens they are numbered in ours. Afterwards they are ordinary again.
    letters = sorted(set(lib.normalizer.normalize_str("".join(sorted(set().union(*texts, ASCII))))))
    inner = ["##" + c for c in letters if len(lib.pre_tokenizer.pre_tokenize_str(f"a{c}a")) == 1]
    _check_size(vocab_size, "letters of the text and special tokens", len(letters) + len(inner) + len(specials))
    lib.train_from_iterator(texts, trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*specials.values(), *inner], initial_alphabet=letters,
        show_progress=False))
    description = json.loads(lib.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] in specials.values()]
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def _check_size(vocab_size: int, what: str, needed: int) -> None:
    if vocab_size <= needed:
        raise ValueError(f"vocabulary of {vocab_size} is too small: {what} alone need {needed}; ask for more")


EXTENDING = {"extend": "new tokens learnt from text, and rows for them", "add": "one id for each term that you name",
             "report": "whether to extend, and why", "compare": "BPE, Unigram and WordPiece on the same text"}


def main():
    from core.config import ArgumentParser
    from text.corpus import read_documents
    if sys.argv[1:2] and sys.argv[1] in EXTENDING:
        from text import extend_vocabulary as extend
        return extend.main()
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(("train", "encode", *EXTENDING)))
    p = commands.add_parser("train", help="train a new tokenizer on text")
    p.add_argument("--kind", choices=("bpe", "unigram", "wordpiece"), default="bpe")
    p.add_argument("--vocab-size", type=int, required=True, help="ids in all, special tokens included")
    p.add_argument("--out", required=True, help="folder for tokenizer.json and tokenizer_config.json")
    p.add_argument("--overwrite", action="store_true", help="replace the tokenizer in the folder")
    p.add_argument("files", nargs="+", metavar="FILE", help=".txt, .jsonl, .parquet, or .gz, .zst of these")
    p = commands.add_parser("encode", help="show the ids and pieces of a text")
    p.add_argument("--tokenizer", required=True, metavar="PATH", help="a model folder or a tokenizer file")
    p.add_argument("text", metavar="TEXT")
    for name, what in EXTENDING.items():        # extend.py has their options
        commands.add_parser(name, help=what)
    args = parser.parse_args()
    if args.command == "train":
        if (Path(args.out) / "tokenizer.json").exists() and not args.overwrite:
            raise ValueError(f"{args.out} holds a tokenizer already; choose another --out or add --overwrite")
        texts = (text for file in args.files for text in read_documents(file))
        tokenizer = train(texts, args.kind, args.vocab_size, args.out)
        fewer = f" of {args.vocab_size}: the text gave no more" if tokenizer.vocab_size < args.vocab_size else ""
        print(f"{args.out}: {args.kind} tokenizer with {tokenizer.vocab_size} ids{fewer}")
    else:
        tokenizer = load(args.tokenizer)
        ids = tokenizer.encode(args.text)
        print(*ids)
        print(*(repr(tokenizer.id_to_token(i)) for i in ids))


if __name__ == "__main__":
    from core.config import main_guard
    sys.exit(main_guard(main))
