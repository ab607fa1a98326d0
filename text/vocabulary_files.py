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
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers

from core.errors import UserError
from core.files import read_json
from text import vocabulary
from text.train_vocabulary import put_bos_first, split_as_llama3
from text.vocabulary import PROBES, ROLES, read_settings, unspell_bytes

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")

# Types of a SentencePiece piece, as sentencepiece_model.proto numbers them
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


class BaseTokenizer:
    """A tokenizer that can be continued.

    tokenizer, kind: what `vocabulary.load` returns for it, and its kind; file, folder: where it stands
    joinable: per id, whether it may be a part of a new token
    frozen: strings that no new token may contain (SentencePiece's user-defined pieces)
    """

    def __init__(self, path):
        self.file = vocabulary.find_file(path)
        self.folder = self.file.parent
        self.tokenizer = vocabulary.load(self.file)
        if Path(path).is_dir() and self.file.name == "tokenizer.json" and (self.folder / "tokenizer.model").is_file():
            # tokenizer.json is a conversion of tokenizer.model, and only the original says how it joins tokens.
            converted, self.file = self.tokenizer.vocab_size, self.folder / "tokenizer.model"
            self.tokenizer = vocabulary.load(self.file)
            if converted != self.tokenizer.vocab_size:
                raise UserError(f"{path} has {converted} ids in tokenizer.json and {self.tokenizer.vocab_size} in "
                                f"tokenizer.model, so that new ids would meet old ones; remove the file that is not "
                                f"the model's")
        self.kind, tokens, fixed = self.tokenizer.kind, self.tokenizer.tokens, set(self.tokenizer.special_ids)
        self.frozen = []
        if self.kind == "sentencepiece":
            model = read_fields(self.file.read_bytes())
            if read_submessage(model, 2).get(3, 1) != 2:                # trainer_spec.model_type: 2 is BPE
                raise UserError(f"{self.file} is no BPE: a Unigram model's scores are probabilities, and a new piece "
                                f"moves old boundaries. `tokenizer.py train` makes a new vocabulary")
            types = [dict(read_fields(value)).get(3, NORMAL) for number, value in model if number == 1]
            self.frozen = [tokens[i] for i, kind in enumerate(types) if kind == USER_DEFINED]
            fixed = set(range(len(tokens))) - {i for i, kind in enumerate(types) if kind == NORMAL}
        elif self.kind == "tokenizers":
            description = read_json(self.file)
            byte_level = '"ByteLevel"' in json.dumps(description["pre_tokenizer"])
            if description["model"]["type"] != "BPE" or not byte_level:
                raise UserError(f"{self.file} is no byte-level BPE; extend can continue those and SentencePiece BPE "
                                f"(put its tokenizer.model beside it)")
            fixed |= {entry["id"] for entry in description["added_tokens"]}
        self.joinable = [token is not None and i not in fixed for i, token in enumerate(tokens)]


def write_extended(base: BaseTokenizer, tokens: list, merges: list[tuple[int, int]], folder: Path) -> None:
    """Write the tokenizer with `tokens` (by id, the old ones first) into `folder`, in every form that its kind has.

    merges: the pair of ids that each new token joins.
    """
    old, first = base.tokenizer, base.tokenizer.vocab_size
    folder.mkdir(parents=True, exist_ok=True)
    write_kind = {"sentencepiece": _write_sentencepiece, "tiktoken": _write_tiktoken}.get(base.kind, _write_merges)
    backend = write_kind(base, tokens, [(tokens[a], tokens[b]) for a, b in merges], folder)
    if base.kind != "tokenizers":
        backend.add_special_tokens([tokens[i] for i in old.special_ids])
        if old.add_bos:
            put_bos_first(backend, tokens[old.bos_id])
    # Each new token must come out of its own text by merges alone. tiktoken looks whole words up first, but a
    # tokenizer.json need not: a token that only this look-up finds would be alive in one file and dead in the other.
    look_up = backend.model.ignore_merges
    backend.model.ignore_merges = False
    dead = [t for i, t in enumerate(tokens[first:], first) if [x.id for x in backend.model.tokenize(t)] != [i]]
    backend.model.ignore_merges = look_up
    assert not dead, f"{len(dead)} new tokens cannot be reached by merges, the first is {dead[0]!r}"
    backend.save(str(folder / "tokenizer.json"))
    # transformers takes the tokenizer.json of a PreTrainedTokenizerFast as it is.
    write_settings(base, folder, "GPT2Tokenizer" if base.kind == "gpt2" else "PreTrainedTokenizerFast")
    new = vocabulary.load(folder)
    if base.kind == "sentencepiece":
        # The model may have a normaliser that the conversion does not know. (The packages differ anyway where a text
        # holds the name of a control token.)
        model, special = vocabulary.load(folder / "tokenizer.model"), [new.tokens[i] for i in new.special_ids]
        texts = [text for text in PROBES if not any(token in text for token in special)]
        if any(new.encode(text) != model.encode(text) for text in texts):
            (folder / "tokenizer.json").unlink()
    assert new.tokens[:first] == old.tokens, "an old id moved"


def _write_tiktoken(base: BaseTokenizer, tokens: list, _, folder: Path) -> tokenizers.Tokenizer:
    first = base.tokenizer.vocab_size
    new_lines = _format_ranks((unspell_bytes(token), i) for i, token in enumerate(tokens[first:], first))
    (folder / "tokenizer.model").write_bytes(b"\n".join([*base.file.read_bytes().splitlines(), new_lines]))
    special = set(base.tokenizer.special_ids)
    vocab = {token: i for i, token in enumerate(tokens) if token is not None}
    pairs = _list_splits([token for token, i in vocab.items() if i not in special])
    backend = tokenizers.Tokenizer(models.BPE(vocab, pairs, ignore_merges=True))
    split_as_llama3(backend)
    return backend


def _format_ranks(ranks) -> bytes:
    """tiktoken's file: a line "base64 rank" for each (token, rank)."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)


def _write_merges(base: BaseTokenizer, tokens: list, pairs: list[tuple[str, str]], folder: Path):
    """Put the new pairs at the end of the merges, in vocab.json with merges.txt or in the tokenizer.json."""
    first = base.tokenizer.vocab_size
    if base.kind == "gpt2":
        vocab = {token: i for i, token in enumerate(tokens) if token is not None}
        old_lines = (base.folder / "merges.txt").read_text(encoding="utf-8").rstrip("\n")
        text = "\n".join([old_lines, *map(" ".join, pairs)]) + "\n"
        (folder / "merges.txt").write_text(text, encoding="utf-8")
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        merges = vocabulary.parse_merges(text)
        backend = vocabulary.make_gpt2_bpe(vocab, merges)
        only_merges = True
    else:
        description = read_json(base.file)
        model, added = description["model"], description["added_tokens"]
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]] + pairs
        # The vocabulary must hold the added tokens too, else `tokenizers` would give them ids behind the new tokens.
        vocab = model["vocab"] | {entry["content"]: entry["id"] for entry in added}
        vocab |= {token: i for i, token in enumerate(tokens[first:], first)}
        model["vocab"], model["merges"] = vocab, merges
        backend = tokenizers.Tokenizer.from_str(json.dumps(description))
        only_merges = all(entry["special"] for entry in added) and not description["normalizer"]
    if only_merges and (ranks := vocabulary.make_tiktoken_ranks(vocab, merges)):
        in_order = sorted(ranks.items(), key=lambda item: item[1])
        (folder / "tokenizer.tiktoken").write_bytes(_format_ranks(in_order))
    return backend


def _write_sentencepiece(base: BaseTokenizer, tokens: list, _, folder: Path) -> tokenizers.Tokenizer:
    """Append the new pieces to the bytes of the model file, and return the same tokenizer in the form of `tokenizers`.

    Appending is enough: in protobuf a repeated field (the pieces) may go on anywhere, and of a single field (the size)
    the last value counts. Tokens that stood behind the model, in added_tokens.json, become control pieces of it.
    """
    model, first, data = base.tokenizer.backend, base.tokenizer.vocab_size, base.file.read_bytes()
    scores = [model.get_score(i) for i in range(model.piece_size())]
    score = np.float32(min(scores))
    names = [f"<unused_{i}>" if token is None else token for i, token in enumerate(tokens)]
    for i in range(model.piece_size(), len(tokens)):
        # Each score is 1 below the last, or one step of float32 if that is more: Llama 2 has pieces at -1e9, where
        # neighbouring values are 64 apart.
        score = min(score - np.float32(1), np.nextafter(score, np.float32(-np.inf)))
        scores.append(float(score))
        kind = NORMAL if i >= first else CONTROL
        data += write_field(1, write_field(1, names[i].encode()) + write_field(2, float(score)) + write_field(3, kind))
    data += write_field(2, write_field(4, len(tokens)))         # trainer_spec.vocab_size
    (folder / "tokenizer.model").write_bytes(data)
    # SentencePiece joins pairs of equal score from the left, so that the left token grows: longer unions come first.
    normal = [i for i in range(len(tokens)) if i >= first or base.joinable[i]]
    normal.sort(key=lambda i: (-scores[i], -len(names[i])))
    unk = None if base.tokenizer.unk_id is None else tokens[base.tokenizer.unk_id]
    vocab = {name: i for i, name in enumerate(names)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, _list_splits([names[i] for i in normal]), unk_token=unk,
                                              fuse_unk=True, byte_fallback=True))
    normalizer = read_submessage(read_fields(base.file.read_bytes()), 3)
    steps = []
    if normalizer.get(4, 1):            # remove_extra_whitespaces
        # A "▁" of the text itself is stripped at the end of the text only.
        steps = [normalizers.Replace(tokenizers.Regex(pattern), by)
                 for pattern, by in ((r"\A +|[ ▁]+\z", ""), (" {2,}", " "))]
    if normalizer.get(3, 1):            # add_dummy_prefix
        # The pre-tokenizer Metaspace adds no prefix where the text begins with a space; SentencePiece does.
        steps.append(normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 10**9 if steps[:-1] else 1, 0)] if steps else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _list_splits(tokens: list[str]) -> list[tuple[str, str]]:
    """Every pair of tokens that joins to one of `tokens`, in the order of `tokens`.

    As merges they mean "whatever two tokens make the union": ["a", "b", "ab", "abb", "bb"] gives
    [("a", "b"), ("a", "bb"), ("ab", "b"), ("b", "b")].
    """
    known = set(tokens)
    return [(token[:k], token[k:]) for token in tokens for k in range(1, len(token))
            if token[:k] in known and token[k:] in known]


def write_settings(base: BaseTokenizer, folder: Path, tokenizer_class: str, **roles) -> None:
    """Write the base's settings, with the token of every role by name and `roles` (pad_token="<p>") laid over them."""
    for name in SETTINGS:
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    tok = base.tokenizer
    named = {f"{role}_token": tok.tokens[i] for role in ROLES if (i := getattr(tok, f"{role}_id")) is not None}
    settings = read_settings(base.folder / "tokenizer_config.json") | named | {
        "tokenizer_class": tokenizer_class, "add_bos_token": tok.add_bos,
        "clean_up_tokenization_spaces": False} | roles
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


# ---- protobuf's wire format, as far as a SentencePiece model needs it
#
# A message is a sequence of fields: the varint (field number << 3 | wire type), then the value. A varint has 7 bits per
# byte, lowest first; the highest bit of a byte says that another follows. The piece {"ab", score -1.5, type NORMAL} is
#     0a 02 61 62        field 1, wire type 2 (length, then bytes): 2 bytes, "ab"
#     15 00 00 c0 bf     field 2, wire type 5 (4 bytes): -1.5 as float32
#     18 01              field 3, wire type 0 (varint): 1
# and a model holds it in its own field 1: `0a 0b` (11 bytes follow), then the above.

def read_fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """(field number, value) in order: varints as int, strings and messages as bytes, floats as their 4 or 8 bytes."""
    fields, at = [], 0
    while at < len(data):
        tag, at = read_varint(data, at)
        if tag & 7 == 0:
            value, at = read_varint(data, at)
        else:
            size, at = {1: (8, at), 5: (4, at)}.get(tag & 7) or read_varint(data, at)
            value, at = data[at:at + size], at + size
        fields.append((tag >> 3, value))
    return fields


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The varint that begins at byte `at`, and where it ends."""
    value = shift = 0
    while data[at] > 127:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def read_submessage(fields: list, number: int) -> dict:
    """{field number: value} of the message in field `number`, which may stand in several parts."""
    return dict(read_fields(b"".join(value for n, value in fields if n == number)))


def write_varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + write_varint(value >> 7)


def write_field(number: int, value: int | float | bytes) -> bytes:
    """A field: an int as varint, a float as float32, bytes (a string, a message) behind their length."""
    if isinstance(value, int):
        return write_varint(number << 3) + write_varint(value)
    if isinstance(value, float):
        return write_varint(number << 3 | 5) + struct.pack("<f", value)
    return write_varint(number << 3 | 2) + write_varint(len(value)) + value
