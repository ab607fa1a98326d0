"""The four kinds of tokenizer files behind one interface: `load(path)` returns a `Tokenizer`.

| file                    | kind          | package that encodes                                                     |
|-------------------------|---------------|--------------------------------------------------------------------------|
| tokenizer.json          | tokenizers    | `tokenizers`; its truncation and padding are switched off                |
| tokenizer.model         | sentencepiece | `sentencepiece`                                                          |
| tokenizer.model (text)  | tiktoken      | `tiktoken` with Llama 3's split pattern and its 256 special tokens       |
| vocab.json + merges.txt | gpt2          | `tiktoken` if the ids follow the order of the merges, else `tokenizers`  |

Ids are exactly those of the package, also where the text "</s>" stands in a document: `tokenizers` makes it the control
token, the other two do not. Half a surrogate pair, which no package accepts, becomes U+FFFD first. A role (BOS, EOS,
pad, unk, mask) is that of the first of tokenizer_config.json (null means "none"), special_tokens_map.json, config.json,
generation_config.json and the tokenizer file that names it.
"""

import base64
import collections
import functools
import hashlib
import itertools
import json
import os
import re
import reprlib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from core.errors import UserError
from core.foreign_files import TOKENIZER_FILES, VOCABULARY, own_files, read_own
from core.settings_files import MOST_IDS, read_settings
from text.corpus import utf8
from text.foreign_tokenizers import MOST_CONTENT, open_tokenizer_json, panics_as_errors

ROLES = ("bos", "eos", "pad", "unk", "mask")        # SentencePiece knows the first four
# The settings files that name the token of a role, and those that give its id.
ROLE_TOKENS, ROLE_IDS = ("tokenizer_config.json", "special_tokens_map.json"), ("config.json", "generation_config.json")

# The split pattern and the special tokens, which the ranks file does not hold: llama-models, models/llama3/tokenizer.py
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_BASE = 128_000
LLAMA3_SPECIALS = {token: LLAMA3_BASE + i for i, token in enumerate([
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", "<|image|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 246))])}

# GPT-2's published pattern as tiktoken writes it: possessive, and with single white-space characters at the end
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Byte-level vocabularies write each byte as one letter: printable characters of Latin-1 stand for themselves, and the
# characters from U+0100 on for the other bytes, in order. The space, 0x20, becomes "Ġ" (U+0120).
_LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_LETTERS = dict(zip(sorted(range(256), key=lambda b: chr(b) not in _LETTERS), _LETTERS))
LETTER_BYTES = {letter: b for b, letter in BYTE_LETTERS.items()}

# Unicode's White_Space, which is what \s means in the patterns above (Python's \s has four control characters more)
LONG_SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{500000,}+")

# Texts whose ids go into a tokenizer's fingerprint. Every packed shard carries that fingerprint: never change them.
_ATOMS = ("", " ", "   ", "\t", "\n", "\r\n", "\n \n", "\x00", "\x85", "\xa0", "\u200b", "\u3000", "\ufeff",
          "\ufffd", "a", "The", "don't", "DON'T", "it'\u017f", "7", "1234567", "\u0663\u0664", "\u2167", "x^2",
          "!!!", "----", "_", "\u2581", "\xe9", "e\u0301", "\ufb01", "\xdf\u1e9e\u0130", "\u0416", "\u05d0\u05b7",
          "\u0627\u0644", "\u0939\u093f", "\u0e33", "\u6f22\u5b57", "\ud55c", "\U0001f642", "\U0001f1e9\U0001f1ea",
          "\U0001f469\u200d\U0001f4bb", "\u1c89", "\U00010d40", "\U0001e5d0", "\ua7dc",     # the last four: Unicode 16
          "<s>", "</s>", "<unk>", "<|endoftext|>", "<|end_of_text|>", "<0x41>")
PROBES = [*_ATOMS, *(a + b for a in _ATOMS for b in (" b", "\n", *_ATOMS[1:14:4])), "".join(_ATOMS), " ".join(_ATOMS)]


class Tokenizer:
    """A tokenizer, whatever file it was read from.

    kind: "tokenizers", "sentencepiece", "tiktoken" or "gpt2"
    library, backend: name and version of the package that encodes, and that package's own object
    vocab_size: largest id + 1, added and special tokens included
    bos_id, eos_id, pad_id, unk_id, mask_id: int, or None if the tokenizer has no such token
    add_bos: whether the model was trained with BOS before each document
    special_ids: sorted ids of the control tokens and of the five above; no objective masks them or draws them at random
    tokens: the string of each id as the package spells it (bytes in GPT-2's letters), or None for an unused id
    vocab: the same the other way, {token: id}"""

    def __init__(self, backend, folder: Path, kind: str, vocab: dict[str, int], control, defaults: dict):
        """control: ids of control tokens. defaults: {role: token} for the roles that no file in `folder` names."""
        library = type(backend).__module__.partition(".")[0]
        self.backend, self.kind, self.library = backend, kind, f"{library} {version(library)}"
        by_id = {i: token for token, i in vocab.items()}
        check_vocabulary(vocab, by_id, folder)
        self.vocab, self.vocab_size = vocab, max(by_id) + 1
        self.tokens: list[str | None] = [by_id.get(i) for i in range(self.vocab_size)]
        files = {name: read_settings(folder / name) for name in (*ROLE_TOKENS, *ROLE_IDS)}
        roles = [self._find_role(role, files, vocab.get(defaults.get(role))) for role in ROLES]
        self.bos_id, self.eos_id, self.pad_id, self.unk_id, self.mask_id = roles
        config = files["tokenizer_config.json"]
        # Llama's models were trained with BOS and GPT-2 without it; a tokenizer.json may put it before each text.
        is_llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
        add_bos = (is_llama or kind in ("sentencepiece", "tiktoken")
                   or (kind == "tokenizers" and backend.encode("a").ids[:1] == [self.bos_id]))
        named = config.get("add_bos_token")
        self.add_bos = self.bos_id is not None and bool(add_bos if named is None else named)
        self.special_ids = sorted({*roles, *control} - {None})

    def _find_role(self, role: str, files: dict[str, dict], default: int | None) -> int | None:
        """The id of a role, from the first of the settings `files` that gives its token or its id."""
        key = f"{role}_token"
        for file in ROLE_TOKENS:
            if key in files[file]:
                token = files[file][key]
                if token is None or token in self.vocab:
                    return self.vocab.get(token)
                if role in ("bos", "eos"):
                    raise UserError(f"{file} names {token!r} as {key}, but the vocabulary beside it has no such "
                                    f"token; correct {key}, or bring the tokenizer file that belongs to it")
        for file in ROLE_IDS:
            i = files[file].get(f"{key}_id")
            i = i[0] if isinstance(i, list) and i else i
            if isinstance(i, int) and 0 <= i < self.vocab_size:
                return i
            if isinstance(i, int) and role in ("bos", "eos"):
                raise UserError(f"{file} says {key}_id {i}, but the tokenizer beside it ends at id "
                                f"{self.vocab_size - 1}; the two files belong to different models")
        return default

    def missing_ids(self, rows: int) -> list[int]:
        """The ids below `rows`, of a model's embedding, that the tokenizer lacks: rows that pad it, and holes."""
        return [i for i in range(rows) if i >= len(self.tokens) or self.tokens[i] is None]

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`; BOS and EOS only if asked for. UserError if one is asked for that the tokenizer lacks."""
        for wanted, role, i in ((bos, "bos", self.bos_id), (eos, "eos", self.eos_id)):
            if wanted and i is None:
                raise UserError(f"this {self.kind} tokenizer has no {role.upper()} token; "
                                f"name one as {role}_token in tokenizer_config.json beside it")
        return [self.bos_id] * bos + self.encode_batch([text])[0].tolist() + [self.eos_id] * eos

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids that `encode` gives for each text, in order, as read-only uint32 arrays. Uses all cores."""
        return self._encode_batch([replace_surrogates(text) for text in texts]) if texts else []

    def decode(self, ids) -> str:
        """The text of `ids` (list, array or tensor), with U+FFFD for an incomplete character. Control tokens appear by
        name; SentencePiece leaves them out. UserError for an id that the tokenizer lacks."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size or self.tokens[i] is None:
                raise UserError(f"id {i} is not in the tokenizer, which has ids from 0 to {self.vocab_size - 1}")
        return self._decode(ids)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (64 hex digits) of the tokens by id and of the ids of PROBES: equal for files that encode alike, and
        different for an extended vocabulary or a package whose Unicode tables have changed."""
        return self._hash_tokens(self.vocab_size)

    def _hash_tokens(self, size: int) -> str:
        return hashlib.sha256(json.dumps([self.tokens[:size], [self.encode(t) for t in PROBES]]).encode()).hexdigest()

    def reads(self, fingerprint: str, vocab_size: int) -> bool:
        """Whether the ids of the tokenizer with this fingerprint and size mean the same here: it is this one, or this
        one is it with control tokens behind its own, which change the ids of no text but one that spells them."""
        if fingerprint == self.fingerprint:
            return True
        added = {*range(vocab_size, self.vocab_size)}
        return bool(added) and added <= {*self.special_ids} and fingerprint == self._hash_tokens(vocab_size)


class HuggingFaceTokenizer(Tokenizer):
    def __init__(self, backend: tokenizers.Tokenizer, folder: Path, kind="tokenizers", control=(), defaults=None):
        backend.no_truncation()
        backend.no_padding()
        control = [*control, *(i for i, token in backend.get_added_tokens_decoder().items() if token.special)]
        defaults = {"unk": getattr(backend.model, "unk_token", None)} | (defaults or {})
        super().__init__(backend, folder, kind, backend.get_vocab(with_added_tokens=True), control, defaults)

    def _encode_batch(self, texts):
        with panics_as_errors("this tokenizer cannot encode a text"):
            return [np.array(e.ids, np.uint32) for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, ids):
        with panics_as_errors("this tokenizer cannot decode its tokens"):
            return self.backend.decode(ids, skip_special_tokens=False)


class SentencePieceTokenizer(Tokenizer):
    def __init__(self, backend: sentencepiece.SentencePieceProcessor, folder: Path):
        pieces = range(backend.piece_size())
        vocab = {backend.id_to_piece(i): i for i in pieces}
        added = _read_added_tokens(folder, vocab)
        control = [i for i in pieces if backend.is_control(i) or backend.is_unknown(i)]
        defaults = {role: backend.id_to_piece(i) for role in ROLES[:4] if (i := getattr(backend, f"{role}_id")()) >= 0}
        super().__init__(backend, folder, "sentencepiece", vocab | added, [*control, *added.values()], defaults)

    def _encode_batch(self, texts):
        if len(texts) == 1:
            return [np.array(self.backend.encode(texts[0]), np.uint32)]
        return [ids.view(np.uint32) for ids in self.backend.encode(texts, out_type="numpy", num_threads=_count_cores())]

    def _decode(self, ids):
        return self.backend.decode([i for i in ids if i < self.backend.piece_size()])


class TiktokenTokenizer(Tokenizer):
    """`pattern` is the regular expression that cuts a text into words, within which bytes are joined."""

    def __init__(self, folder: Path, kind: str, pattern: str, ranks: dict, control: dict, defaults: dict):
        self.pattern = pattern
        vocab = {token.decode("latin-1").translate(BYTE_LETTERS): rank for token, rank in ranks.items()} | control
        # Without any special token, tiktoken's search for special tokens costs more than the encoding.
        specials = control or {"\0no special token": max(vocab.values()) + 1}
        backend = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        super().__init__(backend, folder, kind, vocab, control.values(), defaults)

    def _encode_batch(self, texts):
        if len(texts) == 1:
            return [self._to_array(texts[0])]
        # Several texts make one task: a task of its own costs more than encoding one line.
        step = max(1, len(texts) // (16 * _count_cores()))
        tasks = (texts[k:k + step] for k in range(0, len(texts), step))
        with ThreadPoolExecutor(_count_cores()) as pool:
            return [ids for task in pool.map(lambda some: [*map(self._to_array, some)], tasks) for ids in task]

    def _to_array(self, text):
        # Unlike encode_ordinary, this call builds no Python list, and raises ValueError instead of a Rust panic.
        encode = functools.partial(self.backend.encode_to_numpy, disallowed_special=())
        return encode(text) if len(text) < 500_000 else np.concatenate([*map(encode, self.cut_long_spaces(text))])

    def cut_long_spaces(self, text: str) -> list[str]:
        """Cut `text` before the last character of long runs of white space, where the pattern ends a word anyway. A
        million such characters would overflow the stack of the regular expression, but not before a newline that Llama
        3's pattern keeps with the run."""
        keep = "\r\n" if self.kind == "tiktoken" else ""
        ends = [run.end() for run in LONG_SPACES.finditer(text)]
        cuts = [end - 1 for end in ends if end < len(text) and text[end - 1] not in keep]
        return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]

    def _decode(self, ids):
        return self.backend.decode(ids, errors="replace")


def check_vocabulary(vocab: dict[str, int], by_id: dict[int, str], folder) -> None:
    """UserError where the ids are none that a model could have. Ids become a list, so that a large one takes memory."""
    if not vocab:
        raise UserError(f"the tokenizer in {folder} has no tokens")
    if max(by_id) >= MOST_IDS or min(by_id) < 0:
        i = max(by_id) if max(by_id) >= MOST_IDS else min(by_id)
        raise UserError(f"the tokenizer in {folder} has the id {i}, but ids must be from 0 to {MOST_IDS - 1:,}")
    if len(by_id) < len(vocab):
        first = next(token for token, i in vocab.items() if by_id[i] != token)
        raise UserError(f"the tokenizer in {folder} gives the id {vocab[first]} to {reprlib.repr(first)} and to "
                        f"{reprlib.repr(by_id[vocab[first]])}; each token needs one of its own")
    if (longest := max(map(len, vocab))) > MOST_CONTENT:
        raise UserError(f"the tokenizer in {folder} has a token of {longest:,} characters; no known one has")


def find_file(path) -> Path:
    """`path` itself if it is a file, else the first tokenizer file of that folder, in the order of the table above.
    UserError for a file of the folder that is not its own, because `load` reads and an export copies it."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"tokenizer {path} does not exist; name a model folder or a tokenizer file")
    own_files(path if path.is_dir() else path.parent, TOKENIZER_FILES)
    for file in (path, path / "tokenizer.json", path / "tokenizer.model", path / "vocab.json"):
        if file.is_file():
            return file
    raise UserError(f"no tokenizer in {path}: it has no tokenizer.json, no tokenizer.model and no vocab.json with "
                    f"merges.txt; copy them from the base model's page")


def load(path) -> Tokenizer:
    """Read the tokenizer in `path`, a file or a folder (of a model, or of tokenizer files alone). UserError for a path
    without a tokenizer, for damaged files and for files that contradict each other."""
    path = find_file(path)
    if path.name in ("vocab.json", "merges.txt"):
        return _load_gpt2(path.parent)
    data = read_own(path, VOCABULARY)
    if data.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        return _load_llama3(data, path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(open_tokenizer_json(path), path.parent)
    try:
        backend = sentencepiece.SentencePieceProcessor.from_proto(data)
    # `sentencepiece` raises no narrower class for a file it cannot read.
    except Exception as error:
        raise UserError(f"{path} cannot be read as SentencePiece model or tiktoken ranks ({error}); download it "
                        f"again") from error
    return SentencePieceTokenizer(backend, path.parent)


def _load_llama3(data: bytes, path: Path) -> Tokenizer:
    """Read tiktoken ranks: a line is "base64 rank". Ranks above the special tokens are those of an extension."""
    ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not 'base64 rank' ({error}); download it again") from None
    used = set(ranks.values())
    first_free = next(i for i in itertools.count() if i not in used)
    if first_free != LLAMA3_BASE or len(used) != len(ranks) or used & set(LLAMA3_SPECIALS.values()):
        raise UserError(f"{path} has {first_free} ranks from 0 on where Llama 3 has {LLAMA3_BASE} and then 256 free "
                        f"ids; another model's split pattern and special tokens do not stand there: use tokenizer.json")
    # At the end of a text `\s++$` matches what `\s+(?!\S)` matches, without its use of the stack.
    pattern = LLAMA3_SPLIT.replace(r"|\s+(?!\S)", r"|\s++$|\s+(?!\S)")
    defaults = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"}
    return TiktokenTokenizer(path.parent, "tiktoken", pattern, ranks, LLAMA3_SPECIALS, defaults)


def _load_gpt2(folder: Path) -> Tokenizer:
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; a GPT-2 tokenizer is vocab.json and merges.txt together")
    made_by = read_settings(folder / "tokenizer_config.json").get("tokenizer_class")
    if made_by and made_by.removesuffix("Fast") not in ("GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer"):
        raise UserError(f"vocab.json and merges.txt in {folder} belong to a {made_by}, which splits text otherwise "
                        f"than GPT-2; add its tokenizer.json")
    vocab, merges = read_settings(folder / "vocab.json"), read_merges(folder)
    wrong = next((m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= vocab.keys()), None)
    if wrong or not vocab:
        raise UserError(f"vocab.json in {folder} does not belong to merges.txt: it lacks the merge "
                        f"{' '.join(wrong or ())!r} or a part of it; download both again")
    made = {"".join(merge) for merge in merges}
    controls = {token: i for token, i in vocab.items() if token not in made and token not in LETTER_BYTES}
    added, defaults = _read_added_tokens(folder, vocab), {"eos": "<|endoftext|>"}
    if ranks := make_tiktoken_ranks(vocab, merges):
        return TiktokenTokenizer(folder, "gpt2", GPT2_SPLIT, ranks, controls | added, defaults)
    if added:
        raise UserError(f"{folder} has added tokens, and ids that do not follow merges.txt; this needs a "
                        f"tokenizer.json: save one with transformers' AutoTokenizer")
    return HuggingFaceTokenizer(make_gpt2_bpe(vocab, merges), folder, "gpt2", controls.values(), defaults)


def make_gpt2_bpe(vocab: dict[str, int], merges: list) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(models.BPE(vocab, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def read_merges(folder: Path) -> list[tuple[str, ...]]:
    """The pairs in the merges.txt of `folder`, whose first line may be a "#version" comment."""
    try:
        text = read_own(folder / "merges.txt", VOCABULARY).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{folder / 'merges.txt'} is not UTF-8 ({error}); download it again") from None
    return [tuple(line.split()) for line in text.split("\n")[text.startswith("#version"):] if line.strip()]


def make_tiktoken_ranks(vocab: dict[str, int], merges: list) -> dict[bytes, int] | None:
    """tiktoken's {bytes: id}, or None if it would not encode as the BPE of `tokenizers` does.

    tiktoken joins the adjacent pair whose union has the lowest id, BPE the pair that stands first in `merges`. Both
    agree exactly if the ids rise with the merges and BPE encodes the text of each union as that one token. A
    counterexample is [b c, a b, ab c]: BPE turns "abc" into a + bc and stops, while tiktoken would join a + bc."""
    made = ["".join(pair) for pair in merges]
    ids = [vocab[token] for token in made]
    rising = ids == sorted(set(ids))
    only_bytes = LETTER_BYTES.keys() <= vocab.keys() and set("".join(made)) <= LETTER_BYTES.keys()
    encodings = tokenizers.Tokenizer(models.BPE(vocab, merges)).encode_batch_fast(made)
    if not rising or not only_bytes or [encoding.ids for encoding in encodings] != [[i] for i in ids]:
        return None
    return {bytes(map(LETTER_BYTES.get, token)): vocab[token] for token in [*LETTER_BYTES, *made]}


def _read_added_tokens(folder: Path, vocab: dict[str, int]) -> dict[str, int]:
    """{token: id} of the control tokens that added_tokens.json and tokenizer_config.json put behind a vocabulary. They
    are never found in text; ordinary added tokens would have to be, by rules that only a tokenizer.json states."""
    config = read_settings(folder / "tokenizer_config.json")
    entries = config.get("added_tokens_decoder") or {}
    added = {entry["content"]: int(i) for i, entry in entries.items()} | read_settings(folder / "added_tokens.json")
    added = {token: i for token, i in added.items() if vocab.get(token) != i}
    control = {entry["content"] for entry in entries.values() if entry.get("special")}
    for values in (config, read_settings(folder / "special_tokens_map.json")):
        control |= {values.get(f"{role}_token") for role in ROLES} | {*(values.get("additional_special_tokens") or [])}
    for token, i in added.items():
        if token in vocab or i in vocab.values():
            raise UserError(f"added token {token!r} of {folder} has id {i}, but the vocabulary beside it says "
                            f"otherwise; the files belong to different models")
        if token not in control:
            raise UserError(f"added_tokens.json or tokenizer_config.json in {folder} adds the ordinary token "
                            f"{token!r}; how to find it in text stands in tokenizer.json: save one with transformers")
    return added


def token_before_document(tokenizer: Tokenizer) -> int:
    """Id of the token that stands before a document whose first token is to be predicted: BOS, or EOS if the tokenizer
    has no BOS, because in packed training text the previous document's EOS stands there."""
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if first is None:
        raise UserError("the tokenizer has neither BOS nor EOS, and the first token of a text needs one before it; "
                        "name a bos_token in tokenizer_config.json beside it (or give generate.py a prompt)")
    return first


def measure_loss(tokenizer: Tokenizer, texts: list[str]) -> float:
    """The share of the bytes of `texts` that decode(encode(text)) does not give back: characters that are in no token,
    as runs of blanks where a normaliser drops them, or become the unknown token."""
    lost = 0
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        kept = collections.Counter(tokenizer.decode([i for i in ids if i != tokenizer.unk_id]))
        missing = collections.Counter(replace_surrogates(text)) - kept
        lost += sum(n * len(character.encode()) for character, n in missing.items())
    return lost / max(1, sum(len(utf8(text)) for text in texts))


def replace_surrogates(text: str) -> str:
    """Surrogate pairs become the character they mean, and lone surrogates U+FFFD; any other text is unchanged."""
    return text if text.isascii() else utf8(text).decode()


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class TextStream:
    """The text of ids that a model chooses one by one; `write` gets each piece as soon as no later token can change it.

    All ids are decoded each time, because SentencePiece drops the space before the first of them. The bytes of an
    unfinished UTF-8 character are held back, and so is an ending that may become one of the `stop` strings: with stop
    "END", of the text "the E" only "the " is written. The text ends before the stop string that is complete first; the
    prompt is not searched for one. After finish(), `text` is what was written."""

    def __init__(self, tok, ids, stop=(), write=lambda piece: None):
        if "" in stop:
            raise UserError("a stop string is empty; leave --stop out to stop at the end token alone")
        self.tok, self.ids, self.stop, self.write = tok, list(ids), tuple(stop), write
        self.text, self.stopped = tok.decode(self.ids), False
        self.prompt_length = len(self.text)
        write(self.text)

    def push(self, token: int) -> bool:
        """Add one id; True once a stop string is complete."""
        self.ids.append(token)
        text = self.tok.decode(self.ids).rstrip("\ufffd")
        held_back = [n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])]
        self._write(text, len(text) - max(held_back, default=0))
        return self.stopped

    def finish(self) -> str:
        """Write what was held back; -> the full text."""
        if not self.stopped:
            self._write(self.tok.decode(self.ids))
        return self.text

    def _write(self, text: str, end: int | None = None):
        """Write what is new in `text`, up to `end` or the first stop string."""
        # (end, start) of each stop string that is complete; the first to end counts.
        found = [(start + len(s), start) for s in self.stop if (start := text.find(s, self.prompt_length)) >= 0]
        self.stopped = bool(found)
        piece = text[len(self.text):min(found)[1] if found else end]
        self.text += piece
        self.write(piece)
