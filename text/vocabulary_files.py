"""The files of a tokenizer that is continued: opening the base, and writing it with more tokens in every form it has.

| base                      | two tokens are joined if            | files written                             |
|---------------------------|-------------------------------------|-------------------------------------------|
| tiktoken (Llama 3)        | the union has a rank, lowest first  | tokenizer.model, tokenizer.json           |
| vocab.json + merges.txt   | the pair is a merge, earliest first | both, tokenizer.json, tokenizer.tiktoken  |
| byte-level tokenizer.json | the pair is a merge, earliest first | tokenizer.json, tokenizer.tiktoken        |
| SentencePiece BPE         | the union is a piece, highest score | tokenizer.model, tokenizer.json           |

tokenizer.tiktoken and the SentencePiece base's tokenizer.json are written only if they encode as the others do.
"""

import base64
import io
import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers

from core.errors import UserError
from core.files import write_text
from core.foreign_files import VOCABULARY, own_file, read_own_json
from core.settings_files import read_settings
from text import vocabulary
from text.train_vocabulary import put_bos_first, split_as_llama3
from text.vocabulary import BYTE_LETTERS, LETTER_BYTES, PROBES, ROLES, HuggingFaceTokenizer

# Types of a SentencePiece piece, as sentencepiece_model.proto numbers them
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
BYTE_NAME = re.compile("<0x([0-9A-F]{2})>")


class BaseTokenizer:
    """A tokenizer that can be continued.

    tokenizer, kind: what `vocabulary.load` returns for it, and its kind; file, folder: where it stands
    joinable: per id, whether it may be a part of a new token
    has_pieces: tokens are SentencePiece's pieces, "▁" for a space; else the letters of bytes
    byte_ids: {byte: id} of the pieces that spell characters for which there is no piece
    frozen: strings that no new token may contain (SentencePiece's user-defined pieces)
    merges: the pairs of tokens that are joined, where the file lists them (the second and third base of the table)"""

    def __init__(self, path):
        self.file = vocabulary.find_file(path)
        self.folder, self.tokenizer = self.file.parent, vocabulary.load(self.file)
        original = self.folder / "tokenizer.model"
        if Path(path).is_dir() and self.file.name == "tokenizer.json" and original.is_file():
            # tokenizer.json is a conversion of tokenizer.model, and only the original says how it joins tokens.
            converted, self.file, self.tokenizer = self.tokenizer.vocab_size, original, vocabulary.load(original)
            if converted != (size := self.tokenizer.vocab_size):
                raise UserError(f"{path} has {converted} ids in tokenizer.json and {size} in tokenizer.model, so that "
                                f"new ids would meet old ones; remove the file that is not the model's")
        self.kind, tokens, fixed = self.tokenizer.kind, self.tokenizer.tokens, set(self.tokenizer.special_ids)
        self.frozen, self.merges, self.has_pieces = [], [], self.kind == "sentencepiece"
        named = {i: BYTE_NAME.fullmatch(token or "") for i, token in enumerate(tokens)}
        self.byte_ids = {int(name[1], 16): i for i, name in named.items() if name}
        self._bytes = {i: byte for byte, i in self.byte_ids.items()}
        if self.kind == "sentencepiece":
            model = read_fields(self.file.read_bytes())
            trainer = read_fields(b"".join(value for number, value in model if number == 2))
            if dict(trainer).get(3, 1) != 2:                            # trainer_spec.model_type: 2 is BPE
                raise UserError(f"{self.file} is no BPE: a Unigram model's scores are probabilities, and a new piece "
                                f"moves old boundaries. `tokenizer.py train` makes a new vocabulary")
            types = [dict(read_fields(value)).get(3, NORMAL) for number, value in model if number == 1]
            self.frozen = [tokens[i] for i, kind in enumerate(types) if kind == USER_DEFINED]
            fixed = set(range(len(tokens))) - {i for i, kind in enumerate(types) if kind == NORMAL}
        elif self.kind == "gpt2":
            self.merges = vocabulary.read_merges(self.folder)
        elif self.kind == "tokenizers":
            # As the package writes it, every key is there.
            description = json.loads(self.tokenizer.backend.to_str())
            byte_level = '"ByteLevel"' in json.dumps(description["pre_tokenizer"])
            # Llama's and Phi-3's form of a SentencePiece BPE
            self.has_pieces = not byte_level and bool(description["model"].get("byte_fallback"))
            if description["model"]["type"] != "BPE" or not (byte_level or self.has_pieces):
                raise UserError(f"{self.file} is neither a byte-level BPE nor a BPE that falls back to bytes, as "
                                f"SentencePiece's does; extend can continue only those")
            self.merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in description["model"]["merges"]]
            fixed |= {entry["id"] for entry in description["added_tokens"]}
            fixed |= {self.tokenizer.unk_id} if self.has_pieces else set()
            fixed |= {*self.byte_ids.values()}
        self.joinable = [token is not None and i not in fixed for i, token in enumerate(tokens)]

    def spell(self, text: str) -> str:
        """`text` as the vocabulary spells it: in letters for bytes, or with "▁" for spaces."""
        return text.replace(" ", "▁") if self.has_pieces else "".join(map(BYTE_LETTERS.get, text.encode()))

    def name_characters(self, ids: list[int]) -> list[int]:
        """`ids` with -ord(c) for each character c of two bytes or more that they spell in bytes. Characters behind the
        third plane, where no letter is, stay bytes."""
        named, k = [], 0
        while k < len(ids):
            first = self._bytes.get(ids[k], 0)
            size = 1 + (first >= 0xC2) + (first >= 0xE0) + (first >= 0xF0)
            c = bytes(map(self._bytes.get, ids[k:k + size])).decode() if size > 1 else ""
            named += [-ord(c)] if c and c < "\U00040000" else ids[k:k + size]
            k += size
        return named

    def list_old_ids(self, i: int) -> tuple[int, ...]:
        """The ids of the base for an entry of `name_characters`: itself, or the bytes of the character."""
        return (i,) if i >= 0 else tuple(map(self.byte_ids.get, chr(-i).encode()))

    def spell_id(self, i: int) -> str:
        """The letters of an entry of `name_characters`. A digit, which nothing joins, stands for what is not joined."""
        return chr(-i) if i < 0 else self.tokenizer.tokens[i] if self.joinable[i] or not self.has_pieces else "0"


def write_extended(base: BaseTokenizer, tokens: list, pairs: list[tuple[str, str]], folder: Path) -> None:
    """Write the tokenizer with `tokens` (by id, the old ones first) into `folder`, in every form that its kind has.
    pairs: the two tokens that each new token joins."""
    folder.mkdir(parents=True, exist_ok=True)
    backend, first = convert(base, tokens, pairs), base.tokenizer.vocab_size
    # Each new token must come out of its own text by merges alone. tiktoken looks whole words up first, but a
    # tokenizer.json need not: a token that only this look-up finds would be alive in one file and dead in the other.
    look_up, backend.model.ignore_merges = backend.model.ignore_merges, False
    dead = [t for i, t in enumerate(tokens[first:], first) if [x.id for x in backend.model.tokenize(t)] != [i]]
    backend.model.ignore_merges = look_up
    assert not dead, f"{len(dead)} new tokens cannot be reached by merges, the first is {dead[0]!r}"
    vocab = dict(sorted(backend.get_vocab().items(), key=lambda item: item[1]))
    if base.kind == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(_append_pieces(base, list(vocab)))
    elif base.kind == "tiktoken":
        new_ranks = {bytes(map(LETTER_BYTES.get, token)): i for i, token in enumerate(tokens[first:], first)}
        (folder / "tokenizer.model").write_bytes(base.file.read_bytes().rstrip() + b"\n" + _format_ranks(new_ranks))
    elif not backend.normalizer and all(t.special for t in backend.get_added_tokens_decoder().values()) and (
            ranks := vocabulary.make_tiktoken_ranks(vocab, base.merges + pairs)):
        (folder / "tokenizer.tiktoken").write_bytes(_format_ranks(ranks))
    if base.kind == "gpt2":
        old_lines = (base.folder / "merges.txt").read_text(encoding="utf-8").rstrip("\n")
        write_text(folder / "merges.txt", "\n".join([old_lines, *map(" ".join, pairs)]) + "\n")
        write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    if base.kind != "sentencepiece" or encodes_as(base, backend, vocabulary.load(folder / "tokenizer.model")):
        write_text(folder / "tokenizer.json", backend.to_str(pretty=True))
    # transformers takes the tokenizer.json of a PreTrainedTokenizerFast as it is.
    write_settings(base, folder, "GPT2Tokenizer" if base.kind == "gpt2" else "PreTrainedTokenizerFast")
    assert keeps_ids(base.tokenizer, vocabulary.load(folder)), "an old id moved"


def keeps_ids(old: vocabulary.Tokenizer, new: vocabulary.Tokenizer) -> bool:
    """Whether each token of `old` has the same id in `new`, where an id that `old` does not use may have a name."""
    return old.vocab_size <= new.vocab_size and all(a in (None, b) for a, b in zip(old.tokens, new.tokens))


def convert(base: BaseTokenizer, tokens: list, pairs: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """The tokenizer that `write_extended` writes, in the form of `tokenizers`, which every kind of base has."""
    old, vocab = base.tokenizer, {token: i for i, token in enumerate(tokens) if token is not None}
    if base.kind == "tokenizers":
        description = read_own_json(base.file, VOCABULARY)
        # `vocab` holds the added tokens too; else `tokenizers` would give them ids behind the new tokens.
        description["model"] |= {"vocab": vocab, "merges": base.merges + pairs}
        return tokenizers.Tokenizer.from_str(json.dumps(description))
    if base.kind == "gpt2":
        backend = vocabulary.make_gpt2_bpe(vocab, base.merges + pairs)
    elif base.kind == "tiktoken":
        joinable = [token for i, token in enumerate(tokens) if i >= old.vocab_size or base.joinable[i]]
        backend = tokenizers.Tokenizer(models.BPE(vocab, _list_splits(joinable), ignore_merges=True))
        split_as_llama3(backend)
    else:
        backend = _convert_pieces(base, tokens)
    backend.add_special_tokens([tokens[i] for i in old.special_ids])
    if old.add_bos:
        put_bos_first(backend, tokens[old.bos_id])
    return backend


def _convert_pieces(base: BaseTokenizer, tokens: list) -> tokenizers.Tokenizer:
    model = base.tokenizer.backend
    joinable = [i for i, yes in enumerate(base.joinable) if yes]
    # SentencePiece joins pairs of equal score from the left, so that the left token grows: longer unions come first.
    joinable.sort(key=lambda i: (-model.get_score(i), -len(tokens[i])))
    splits = _list_splits([*(tokens[i] for i in joinable), *tokens[len(base.joinable):]])
    vocab = {token or f"<unused_{i}>": i for i, token in enumerate(tokens)}
    unk = None if base.tokenizer.unk_id is None else tokens[base.tokenizer.unk_id]
    backend = tokenizers.Tokenizer(models.BPE(vocab, splits, unk_token=unk, fuse_unk=True, byte_fallback=True))
    steps, adds_prefix, removes_spaces = [], model.normalize("a") == "▁a", "▁▁" not in model.normalize("a  b")
    if removes_spaces:
        # A "▁" of the text itself is stripped at the end of the text only.
        steps += [normalizers.Replace(tokenizers.Regex(r"\A +|[ ▁]+\z"), ""),
                  normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if adds_prefix:
        # The pre-tokenizer Metaspace adds no prefix where the text begins with a space; SentencePiece does.
        steps.append(normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 10**9 if removes_spaces else 1, 0)] if steps else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def keep_text_around(base: BaseTokenizer, description: dict, terms: list[str]) -> None:
    """Change a tokenizer.json so that `terms`, once added, leave the text around them as the base reads it.

    `tokenizers` cuts a text at its added tokens. What a normaliser does at the beginning and end of a text (a prefix,
    dropped blanks) would then be done on both sides of each term: they are found in the normalised text instead. A
    prefix that a pre-tokenizer puts before each part becomes a step of the normaliser, and a text (or a term) that
    begins with a term gets none. Byte-level decoders take letters of Latin-1 for bytes: they get the term's bytes."""
    steps = _list_steps(description["normalizer"], "normalizers")
    no_prefix = [re.escape(term) for term in terms if not term.startswith((" ", "▁"))]
    for step in _list_steps(description["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and step["prepend_scheme"] == "always":
            step["prepend_scheme"], prefix, blanks = "never", "▁", "[▁ ]"
        elif step["type"] == "ByteLevel" and step["add_prefix_space"]:
            step["add_prefix_space"], prefix, blanks = False, " ", " "
        else:
            continue
        steps, no_prefix = [*steps, {"type": "Prepend", "prepend": prefix}], [*no_prefix, blanks]
    for k in [k for k, step in enumerate(steps) if step["type"] == "Prepend"][:1 if no_prefix else 0]:
        before_term = {"Regex": rf"\A{steps[k]['prepend']}(?={'|'.join(no_prefix)})"}
        steps.insert(k + 1, {"type": "Replace", "pattern": before_term, "content": ""})
    if steps:
        description["normalizer"] = {"type": "Sequence", "normalizers": steps}
    spelt = [{"type": "Replace", "pattern": {"Regex": rf"\A{re.escape(term)}\z"}, "content": base.spell(term)}
             for term in terms if not term.isascii() and not base.has_pieces]
    if spelt:
        description["decoder"] = {"type": "Sequence", "decoders": [*spelt, description["decoder"]]}


def _list_steps(part: dict | None, key: str) -> list[dict]:
    """The steps of a normaliser or pre-tokenizer in a tokenizer.json, which may be none, one or a Sequence."""
    return [] if part is None else part[key] if part["type"] == "Sequence" else [part]


def encodes_as(base: BaseTokenizer, backend: tokenizers.Tokenizer, model: vocabulary.Tokenizer) -> bool:
    """Whether the converted tokenizer gives the same ids as the SentencePiece `model`, whose normaliser may do more."""
    converted = HuggingFaceTokenizer(backend, base.folder)
    # The packages differ anyway where a text holds the name of a control token.
    texts = [text for text in PROBES if not any(converted.tokens[i] in text for i in converted.special_ids)]
    return all(converted.encode(text) == model.encode(text) for text in texts)


def _list_splits(tokens: list[str]) -> list[tuple[str, str]]:
    """Every pair of tokens that joins to one of `tokens`, in their order. As merges: "whatever two make the union".
    ["a", "b", "ab", "abb", "bb"] gives [("a", "b"), ("a", "bb"), ("ab", "b"), ("b", "b")]."""
    known = set(tokens)
    return [(token[:k], token[k:]) for token in tokens for k in range(1, len(token))
            if token[:k] in known and token[k:] in known]


def _format_ranks(ranks: dict[bytes, int]) -> bytes:
    """tiktoken's file: a line "base64 rank" for each token, by rank."""
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in in_order)


def _append_pieces(base: BaseTokenizer, tokens: list[str]) -> bytes:
    """The bytes of the SentencePiece model file, and behind them the tokens that it lacks and the new size: in protobuf
    a repeated field (the pieces) may go on anywhere, and of a single field (the size) the last value counts. Tokens
    that stood behind the model, in added_tokens.json, become control pieces of it."""
    model, data = base.tokenizer.backend, base.file.read_bytes()
    score = np.float32(min(map(model.get_score, range(model.piece_size()))))
    for i in range(model.piece_size(), len(tokens)):
        # Each score is 1 below the last, or one step of float32 if that is more: Llama 2 has pieces at -1e9, where
        # neighbouring values are 64 apart.
        score = min(score - np.float32(1), np.nextafter(score, np.float32(-np.inf)))
        is_old = i < base.tokenizer.vocab_size
        kind = NORMAL if not is_old else CONTROL if base.tokenizer.tokens[i] is not None else UNUSED
        piece = write_field(1, tokens[i].encode()) + write_field(2, float(score)) + write_field(3, kind)
        data += write_field(1, piece)
    return data + write_field(2, write_field(4, len(tokens)))           # trainer_spec.vocab_size


def write_settings(base: BaseTokenizer, folder: Path, tokenizer_class: str, **roles) -> None:
    """Write the base's settings, with the token of every role by name and `roles` (pad_token="<p>") laid over them."""
    for name in ("special_tokens_map.json", "chat_template.jinja", "generation_config.json"):
        if own_file(base.folder / name):
            shutil.copyfile(base.folder / name, folder / name)
    tok = base.tokenizer
    named = {f"{role}_token": tok.tokens[i] for role in ROLES if (i := getattr(tok, f"{role}_id")) is not None}
    fixed = {"tokenizer_class": tokenizer_class, "add_bos_token": tok.add_bos, "clean_up_tokenization_spaces": False}
    settings = read_settings(base.folder / "tokenizer_config.json") | named | fixed | roles
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


# ---- protobuf's wire format, as far as a SentencePiece model needs it
# A message is a sequence of fields: the varint (field number << 3 | wire type), then the value. A varint has 7 bits per
# byte, lowest first; the highest bit of a byte says that another follows. The piece {"ab", score -1.5, type NORMAL} is
#     0a 02 61 62        field 1, wire type 2 (length, then bytes): 2 bytes, "ab"
#     15 00 00 c0 bf     field 2, wire type 5 (4 bytes): -1.5 as float32
#     18 01              field 3, wire type 0 (varint): 1
# and a model holds it in its own field 1: `0a 0b` (11 bytes follow), then the above.

def read_fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """(field number, value) in order: varints as int, strings and messages as bytes, floats as their 4 or 8 bytes.
    UserError where the data ends within a field, and for a group, which SentencePiece has none of."""
    fields, stream = [], io.BytesIO(data)
    while stream.tell() < len(data):
        number, wire_type = divmod(read_varint(stream), 8)
        if wire_type not in (0, 1, 2, 5):
            raise UserError(f"the SentencePiece model has a field of the wire type {wire_type}; download it again")
        value = read_varint(stream) if wire_type in (0, 2) else {1: 8, 5: 4}[wire_type]
        if wire_type and value > len(data) - stream.tell():
            raise UserError("the SentencePiece model is cut short; download it again")
        fields.append((number, value if wire_type == 0 else stream.read(value)))
    return fields


def read_varint(stream) -> int:
    value = 0
    # Ten bytes hold the 64 bits that protobuf has.
    for place in range(10):
        if not (byte := stream.read(1)):
            break
        value |= (byte[0] & 127) << 7 * place
        if byte[0] < 128:
            return value
    raise UserError("the SentencePiece model is cut short, or has an endless number; download it again")


def write_varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + write_varint(value >> 7)


def write_field(number: int, value: int | float | bytes) -> bytes:
    """A field: an int as varint, a float as float32, bytes (a string, a message) behind their length."""
    if isinstance(value, int):
        return write_varint(number << 3) + write_varint(value)
    if isinstance(value, float):
        return write_varint(number << 3 | 5) + struct.pack("<f", value)
    return write_varint(number << 3 | 2) + write_varint(len(value)) + value
