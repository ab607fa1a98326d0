"""A larger vocabulary for a base model: new tokens behind all old ones, rows for them, and whether it is worth it.

    python tokenizer.py extend --model BASE --new-tokens 2000 --out out/legal_base legal.jsonl    tokenizer and weights
    python tokenizer.py extend --tokenizer BASE --new-tokens 2000 --out out/tokenizer legal.jsonl       tokenizer alone
    python tokenizer.py add --model BASE --out out/marked "<legal_case>" res_judicata --pad "<|pad|>"
    python tokenizer.py report --tokenizer BASE --extended out/legal_base --domain held_out.jsonl --general wiki.txt
    python tokenizer.py compare --vocab-size 8000 legal.jsonl              --bits-per-byte 2: a small model's as well

`extend` continues BPE where the base stopped: the text is cut by the base tokenizer, and the most frequent adjacent
pair becomes one token, again and again. Each new merge stands behind every old one, so that the old ones are done first
and the new ones only join what they left. Hence, for any text: every boundary between new tokens is a boundary between
old tokens, and text in which no new token occurs keeps its ids. (A second tokenizer trained on the text, minus the
common tokens, has neither property: arXiv 2512.03989.) New ids begin behind the last special token; no old id moves.

| base                      | what joins two tokens               | written                                   |
|---------------------------|-------------------------------------|-------------------------------------------|
| tiktoken (Llama 3)        | the union has a rank, lowest first  | tokenizer.model, tokenizer.json           |
| vocab.json + merges.txt   | the pair is a merge, earliest first | both, tokenizer.json, tokenizer.tiktoken  |
| byte-level tokenizer.json | the same                            | tokenizer.json, tokenizer.tiktoken if apt |
| SentencePiece BPE         | the union is a piece, highest score | tokenizer.model, tokenizer.json           |

What an extension buys is length: fewer tokens for the same bytes, and attention's cost falls with the square. That it
makes a better model is not established; it does move every shard and checkpoint to another vocabulary.
"""

import base64
import collections
import contextlib
import copy
import heapq
import itertools
import json
import math
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import regex
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

import hf
import tokenizer as T
from core.config import ArgumentParser, write_json
from text.corpus import read_documents
from text.shards import pack

MAX_BYTES, MAX_CHARACTERS = 32, 16      # of a new token; 16 is SentencePiece's max_sentencepiece_length
INITS = ("subtoken", "subtoken_norm", "mean", "covariance", "zero", "random")
# What one new SentencePiece piece may be: its trainer starts none inside a word, mixes no scripts and splits digits
SP_PIECE = regex.compile(r"▁?(?:\p{Latin}+|\p{Cyrillic}+|\p{Greek}+|[\p{L}\p{M}--\p{Latin}--\p{Cyrillic}--\p{Greek}]+"
                         r"|[^\p{L}\p{M}\p{N}▁\s]+)", regex.V1)
SP_UNIT = regex.compile(f"{SP_PIECE.pattern}|▁+|.", regex.V1 | regex.DOTALL)
LETTER_BYTE = {letter: b for b, letter in T.BYTE_LETTERS.items()}
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
WORTH_IT = 0.15                         # fewer tokens for the same bytes: references/data.md 6.4, a judgement
MOST_EPOCHS = 16                        # as train.py refuses more by itself
TIMES_SEEN = 100                        # how often a row should have been seen before it counts as trained: a judgement


# ---- the base: which file, which rule joins two tokens, which tokens may be joined

class Base:
    """A tokenizer that can be continued. form: "tiktoken", "gpt2", "json" or "sentencepiece". joinable: id -> bool."""

    def __init__(self, path):
        path = Path(path)
        conversion = None
        if path.is_dir() and (path / "tokenizer.json").is_file() and (path / "tokenizer.model").is_file():
            conversion, path = T.load(path), path / "tokenizer.model"
        self.tokenizer = tok = T.load(path)
        if conversion and conversion.vocab_size != tok.vocab_size:
            raise ValueError(f"{path.parent} has {conversion.vocab_size} ids in tokenizer.json and {tok.vocab_size} in "
                             f"tokenizer.model, so that new ids would meet old ones; remove the file that is not the "
                             f"model's")
        self.folder = path if path.is_dir() else path.parent
        self.file = path if path.is_file() else next(
            path / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json") if (path / name).is_file())
        special = set(tok.special_ids)
        if isinstance(tok, T._SentencePiece):
            self.form, lib = "sentencepiece", tok._lib
            proto = _fields(self.file.read_bytes())
            kinds = [dict(_fields(value)).get(3, 1) for number, value in proto if number == 1]      # 1: NORMAL
            if dict(_fields(b"".join(value for number, value in proto if number == 2))).get(3, 1) != 2:
                raise ValueError(f"{self.file} is no BPE: a Unigram model's scores are probabilities, and a new piece "
                                 f"moves old boundaries. `tokenizer.py train` makes a new vocabulary")
            self.frozen = [lib.id_to_piece(i) for i, kind in enumerate(kinds) if kind == 4]         # USER_DEFINED
            self.joinable = [i < len(kinds) and kinds[i] == 1 for i in range(tok.vocab_size)]
            return
        self.form = tok.kind if tok.kind in ("tiktoken", "gpt2") else "json"
        if self.form == "json":
            self.description = json.loads(self.file.read_text(encoding="utf-8"))
            byte_level = '"ByteLevel"' in json.dumps(self.description["pre_tokenizer"])
            if self.description["model"]["type"] != "BPE" or not byte_level:
                raise ValueError(f"{self.file} is no byte-level BPE; extend can continue those and SentencePiece BPE "
                                 f"(put its tokenizer.model beside it)")
            special |= {entry["id"] for entry in self.description["added_tokens"]}
        self.joinable = [token is not None and i not in special for i, token in enumerate(tok.tokens)]

    def words(self, texts) -> collections.Counter:
        """How often each word occurs, a word being what the tokenizer's own pattern cuts, as the tuple of its ids."""
        counts, tok = collections.Counter(), self.tokenizer
        texts = itertools.chain.from_iterable(map(T.parts, texts))
        if isinstance(tok, T._Tiktoken):        # a word alone has the ids it has in a text
            pattern = regex.compile(tok._encoding._pat_str)
            strings = collections.Counter()
            for text in texts:
                strings.update(pattern.findall(text))
            for (_, n), ids in zip(strings.items(), tok.encode_batch(list(strings))):
                counts[tuple(ids.tolist())] += n
            return counts
        for text in texts:
            if self.form == "sentencepiece":
                ids = tok.encode(text)
                starts = [k for k, i in enumerate(ids) if k == 0 or tok.tokens[i].startswith("▁")]
            else:
                encoding = tok._lib.encode(text, add_special_tokens=False)
                ids, of = encoding.ids, encoding.word_ids
                starts = [k for k in range(len(ids)) if k == 0 or of[k] != of[k - 1] or of[k] is None]
            counts.update(tuple(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)]))
        return counts

    def fewest(self, texts) -> int:
        """Tokens if all that may ever become one token were one."""
        words = self.words(texts)
        if self.form != "sentencepiece":
            return sum(words.values())
        strings = (("".join(self.tokenizer.tokens[i] if self.joinable[i] else "0" for i in word), n)
                   for word, n in words.items())                # a digit stands for what cannot be joined
        return sum(n * len(SP_UNIT.findall(string)) for string, n in strings)

    def may_be(self, token: str) -> bool:
        """Whether `token` may become a new token."""
        if self.form == "sentencepiece":
            return len(token) <= MAX_CHARACTERS and bool(SP_PIECE.fullmatch(token)) and \
                not any(piece in token for piece in self.frozen)
        return len(token) <= MAX_BYTES


def continue_bpe(words: collections.Counter, tokens: list, joinable: list, may_be, new_tokens: int,
                 min_count: int) -> list[tuple[int, int]]:
    """The pairs of ids that become ids len(tokens), len(tokens) + 1, ...: each time the most frequent adjacent pair
    within a word, among equals the one with the lowest ids. Fewer than `new_tokens` where no pair occurs `min_count`
    times. `tokens` and `joinable` grow by the new ones."""
    known = set(filter(None, tokens))
    lists = [list(word) for word in words]
    weights = list(words.values())
    counts, where = collections.Counter(), collections.defaultdict(set)
    for w, ids in enumerate(lists):
        for pair in itertools.pairwise(ids):
            counts[pair] += weights[w]
            where[pair].add(w)
    heap = [(-n, pair) for pair, n in counts.items() if n >= min_count]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < new_tokens:
        n, pair = heapq.heappop(heap)
        now = counts[pair]
        if now != -n:                           # it changed since it was pushed
            if now >= min_count:
                heapq.heappush(heap, (-now, pair))
            continue
        if not (joinable[pair[0]] and joinable[pair[1]]):
            continue
        union = tokens[pair[0]] + tokens[pair[1]]
        if union in known or not may_be(union):
            continue
        new = len(tokens)
        tokens.append(union)
        joinable.append(True)
        known.add(union)
        merges.append(pair)
        fresh = set()
        for w in sorted(where.pop(pair)):
            old = lists[w]
            joined, k = [], 0
            while k < len(old):
                hit = k + 1 < len(old) and (old[k], old[k + 1]) == pair
                joined.append(new if hit else old[k])
                k += 2 if hit else 1
            for p in itertools.pairwise(old):
                counts[p] -= weights[w]
            for p in itertools.pairwise(joined):
                counts[p] += weights[w]
                where[p].add(w)
                if new in p:
                    fresh.add(p)
            lists[w] = joined
        for p in sorted(fresh):
            if counts[p] >= min_count:
                heapq.heappush(heap, (-counts[p], p))
    return merges


def extend(path, texts, new_tokens: int, out, min_count: int = 10) -> list[tuple[int, ...]]:
    """Write the tokenizer at `path`, continued on `texts`, into the new folder `out`.

    Returns for each new id, in order, the old ids whose join it is. ValueError where the tokenizer cannot be continued
    or the texts hold no pair that occurs `min_count` times.
    """
    base = Base(path)
    if new_tokens < 1 or min_count < 1:
        raise ValueError(f"--new-tokens {new_tokens} and --min-count {min_count} must be at least 1")
    old = base.tokenizer
    tokens, joinable = list(old.tokens), list(base.joinable)
    merges = continue_bpe(base.words(texts), tokens, joinable, base.may_be, new_tokens, min_count)
    if not merges:
        raise ValueError(f"the text has no pair of tokens that may be joined and occurs {min_count} times; give more "
                         f"text or a lower --min-count")
    parts: dict[int, tuple[int, ...]] = {}
    for n, pair in enumerate(merges):
        parts[old.vocab_size + n] = tuple(i for half in pair for i in parts.get(half, (half,)))
    write(base, tokens, merges, Path(out))
    return list(parts.values())


# ---- files

def write(base: Base, tokens: list, merges: list[tuple[int, int]], out: Path) -> None:
    """The extended tokenizer in every form that its kind has, into the folder `out`, all or nothing."""
    old, n = base.tokenizer, base.tokenizer.vocab_size
    pairs = [(tokens[a], tokens[b]) for a, b in merges]
    with _new_folder(out) as folder:
        if base.form == "sentencepiece":
            lib = _write_sentencepiece(base, tokens, folder)
        elif base.form == "tiktoken":
            lib = _write_tiktoken(base, tokens, folder)
        else:
            lib = _write_merges(base, tokens, pairs, folder)
        # Each new token must come out of its own text by merges alone: tiktoken looks whole words up first, a
        # tokenizer.json need not, and a token that only this look-up finds is alive in one and dead in the other.
        look_up, lib.model.ignore_merges = lib.model.ignore_merges, False
        dead = [t for i, t in enumerate(tokens[n:], n) if [x.id for x in lib.model.tokenize(t)] != [i]]
        lib.model.ignore_merges = look_up
        assert not dead, f"{len(dead)} new tokens cannot be reached by merges, the first is {dead[0]!r}"
        lib.save(str(folder / "tokenizer.json"))
        _write_settings(base, folder, "GPT2Tokenizer" if base.form == "gpt2" else "PreTrainedTokenizerFast")
        if base.form == "sentencepiece" and not _agree(T.load(folder), T.load(folder / "tokenizer.model")):
            (folder / "tokenizer.json").unlink()        # a normaliser that this conversion does not know
        new = T.load(folder)
        assert new.tokens[:n] == old.tokens, "an old id moved"


def _write_tiktoken(base, tokens, folder):
    lines = base.file.read_bytes().splitlines()
    special = set(base.tokenizer.special_ids)
    for i in range(base.tokenizer.vocab_size, len(tokens)):
        lines.append(base64.b64encode(_bytes(tokens[i])) + b" %d" % i)
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    vocab = {token: i for i, token in enumerate(tokens) if token is not None}
    ordinary = [token for i, token in enumerate(tokens) if token is not None and i not in special]
    lib = tokenizers.Tokenizer(models.BPE(vocab, _splits(ordinary), ignore_merges=True))
    lib.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(T.LLAMA3_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    lib.decoder = decoders.ByteLevel()
    lib.add_special_tokens([tokens[i] for i in sorted(special)])
    _add_bos(lib, base.tokenizer)
    return lib


def _write_merges(base, tokens, pairs, folder):
    """vocab.json with merges.txt, or tokenizer.json: the new pairs at the end of the merges. All added tokens get their
    ids in the vocabulary too, else `tokenizers` would count them on from its (now larger) size."""
    n = base.tokenizer.vocab_size
    new = {token: i for i, token in enumerate(tokens[n:], n)}
    if base.form == "gpt2":
        vocab = {token: i for i, token in enumerate(tokens) if token is not None}
        lines = (base.folder / "merges.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
        lines += [" ".join(pair) for pair in pairs]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        merges = [tuple(line.split()) for line in lines[lines[0].startswith("#version"):] if line.strip()]
        lib = tokenizers.Tokenizer(models.BPE(vocab, merges))
        lib.pre_tokenizer, lib.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        lib.add_special_tokens([tokens[i] for i in base.tokenizer.special_ids])
        _add_bos(lib, base.tokenizer)
        ordinary = True
    else:
        description = copy.deepcopy(base.description)
        model, added = description["model"], description["added_tokens"]
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]] + pairs
        vocab = model["vocab"] | {entry["content"]: entry["id"] for entry in added} | new
        model["vocab"], model["merges"] = vocab, merges
        lib = tokenizers.Tokenizer.from_str(json.dumps(description))
        ordinary = all(entry["special"] for entry in added) and not description["normalizer"]
    ranks = T._ranks(vocab, merges, tokenizers.Tokenizer(models.BPE(vocab, merges))) if ordinary else None
    if ranks:
        lines = [base64.b64encode(token) + b" %d\n" % i for token, i in sorted(ranks.items(), key=lambda x: x[1])]
        (folder / "tokenizer.tiktoken").write_bytes(b"".join(lines))
    return lib


def _write_sentencepiece(base, tokens, folder):
    """Pieces appended to the file itself: protobuf lets a repeated field go on and a later number count, so that the
    old bytes, normaliser included, stay as they are. Tokens that stood behind the model become control pieces."""
    lib, n = base.tokenizer._lib, base.tokenizer.vocab_size
    scores = [lib.get_score(i) for i in range(lib.piece_size())]
    score, data = np.float32(min(scores)), base.file.read_bytes()
    for i in range(lib.piece_size(), len(tokens)):
        # Below the last one by 1, or by float32's step where that is more: Llama 2 has pieces at -1e9, where it is 64
        score = min(score - np.float32(1), np.nextafter(score, np.float32(-np.inf)))
        scores.append(float(score))
        token = f"<unused_{i}>" if tokens[i] is None else tokens[i]
        data += _piece(token, score, 1 if i >= n else 3)
    data += _bytes_field(2, b"\x20" + _varint(len(tokens)))             # trainer_spec.vocab_size
    (folder / "tokenizer.model").write_bytes(data)
    vocab = {f"<unused_{i}>" if token is None else token: i for i, token in enumerate(tokens)}
    normal = [tokens[i] for i in range(len(tokens)) if i >= n or base.joinable[i]]
    # Equal scores merge from the left, so that the token on the left grows: pairs with the longer union first
    normal.sort(key=lambda token: (-scores[vocab[token]], -len(token)))
    unk = None if base.tokenizer.unk_id is None else tokens[base.tokenizer.unk_id]
    bpe = models.BPE(vocab, _splits(normal), unk_token=unk, fuse_unk=True, byte_fallback=True)
    json_lib = tokenizers.Tokenizer(bpe)
    proto = _fields(base.file.read_bytes())
    rules = dict(_fields(b"".join(value for number, value in proto if number == 3)))
    steps = []
    if rules.get(4, 1):                                                 # remove_extra_whitespaces
        rules_of_space = ((r"\A +|[ ▁]+\z", ""), (" {2,}", " "))         # a "▁" of the text itself goes at the end only
        steps = [normalizers.Replace(tokenizers.Regex(old), new) for old, new in rules_of_space]
    if rules.get(3, 1):                                                 # add_dummy_prefix
        steps.append(normalizers.Prepend("▁"))          # Metaspace would leave it out where the text begins with " "
    json_lib.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    json_lib.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                          *([decoders.Strip(" ", 10**9 if steps[:-1] else 1, 0)] if steps else [])])
    json_lib.add_special_tokens([tokens[i] for i in base.tokenizer.special_ids])
    _add_bos(json_lib, base.tokenizer)
    return json_lib


def _splits(tokens: list[str]) -> list[tuple[str, str]]:
    """Every way of joining two tokens to one of `tokens`, in the order of `tokens`: "the union counts" as pairs."""
    parts = set(tokens)
    return [(token[:k], token[k:]) for token in tokens for k in range(1, len(token))
            if token[:k] in parts and token[k:] in parts]


def _add_bos(lib, tok):
    if tok.add_bos:
        bos = tok.tokens[tok.bos_id]
        lib.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tok.bos_id)])


def _write_settings(base: Base, folder: Path, tokenizer_class: str, **roles):
    """The base's settings with every role by name. PreTrainedTokenizerFast takes tokenizer.json as it is."""
    for name in SETTINGS:
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    tok = base.tokenizer
    named = {f"{role}_token": tok.tokens[i] for role in T.ROLES if (i := getattr(tok, f"{role}_id")) is not None}
    settings = T._read_json(base.folder / "tokenizer_config.json") | named | {
        "tokenizer_class": tokenizer_class, "add_bos_token": tok.add_bos,
        "clean_up_tokenization_spaces": False} | roles
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _agree(a: T.Tokenizer, b: T.Tokenizer, texts=T.PROBES) -> bool:
    """Whether both give the same ids; texts that spell a control token are left out, the libraries differ there."""
    special = [a.tokens[i] for i in a.special_ids]
    texts = [text for text in texts if not any(token in text for token in special)]
    return all(np.array_equal(x, y) for x, y in zip(a.encode_batch(texts), b.encode_batch(texts)))


def _bytes(token: str) -> bytes:
    return bytes(LETTER_BYTE[letter] for letter in token)


def _refuse_existing(path: Path) -> None:
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path} exists already; choose another folder for --out")


@contextlib.contextmanager
def _new_folder(path):
    """A folder that appears whole at `path`, or not at all; one with files in it is not replaced."""
    path = Path(path)
    _refuse_existing(path)
    temporary = path.with_name(f".{path.name}.partial")     # of one name, so that what a kill left goes with the next
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / path.name).mkdir(parents=True)
    try:
        yield temporary / path.name
        (temporary / path.name).rename(path)            # over an empty folder, or to where nothing was
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- protobuf's wire format, as far as a SentencePiece model needs it: (field << 3 | kind), then the value

def _fields(data: bytes) -> list[tuple[int, object]]:
    """(field, value) in order: numbers as int, strings and messages as bytes, floats as their 4 or 8 bytes."""
    out, at = [], 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            value = varint()
        else:
            size = {1: 8, 5: 4}.get(tag & 7) or varint()
            value, at = data[at:at + size], at + size
        out.append((tag >> 3, value))
    return out


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _bytes_field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _piece(token: str, score, kind: int) -> bytes:
    rest = b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)
    return _bytes_field(1, _bytes_field(1, token.encode()) + rest)


# ---- a user's own tokens

def add(path, terms: list[str], out, special: bool = False, pad: str | None = None) -> dict[str, int]:
    """Give each of `terms`, and the padding token `pad`, one id behind all others; {term: id}.

    Written is tokenizer.json, which alone can say how an added token is found: as it is spelt, anywhere in the text,
    before anything else, and so even inside words. A SentencePiece base sees the text behind a term as a new beginning
    and puts its prefix space there, as transformers does. special: control tokens, as `pad` always is.
    """
    base = Base(path)
    if pad is not None and base.tokenizer.pad_id is not None:
        raise ValueError(f"the tokenizer has the pad token {base.tokenizer.tokens[base.tokenizer.pad_id]!r} already")
    wanted = [*terms, *([pad] if pad is not None else [])]
    if not wanted or "" in wanted:
        raise ValueError("there is no term to add; name some, or --pad TOKEN" if not wanted else "a term is empty")
    if broken := next((term for term in wanted if T.clean(term) != term), None):
        raise ValueError(f"the term {broken!a} holds half a surrogate pair; spell it in UTF-8")
    if double := next((term for n, term in enumerate(wanted) if term in wanted[:n]), None):
        raise ValueError(f"the term {double!r} is named twice")
    if known := next((term for term in wanted if base.tokenizer.token_to_id(term) is not None), None):
        raise ValueError(f"{known!r} has the id {base.tokenizer.token_to_id(known)} already; leave it out")
    with _new_folder(out) as folder, tempfile.TemporaryDirectory() as converted:
        write(base, list(base.tokenizer.tokens), [], Path(converted, "tokenizer"))
        file = Path(converted, "tokenizer", "tokenizer.json")
        if not file.exists():
            raise ValueError(f"{base.file} has a normaliser that tokenizer.json cannot express here; nothing was added")
        description = json.loads(file.read_text(encoding="utf-8"))
        ids = {term: base.tokenizer.vocab_size + n for n, term in enumerate(wanted)}
        for term, i in ids.items():
            description["model"]["vocab"][term] = i
            description["added_tokens"].append({"id": i, "content": term, "single_word": False, "lstrip": False,
                                                "rstrip": False, "normalized": False,
                                                "special": special or term == pad})
        (folder / "tokenizer.json").write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
        _write_settings(base, folder, "PreTrainedTokenizerFast", **({"pad_token": pad} if pad is not None else {}))
        new = T.load(folder)
        for term, i in ids.items():
            for text in (term, f"a{term}b", f"the {term} is"):
                if new.encode(text).count(i) != 1:
                    raise ValueError(f"{term!r} is not one token in {text!r}: another token takes a part of it first")
    return ids


def plain_words(terms: list[str]) -> list[str]:
    """Terms of letters and spaces alone. As an added token such a term is cut out of longer words too ("lien" out of
    "client") and has no form with a space before it; `extend` learns it as the tokenizer learnt its other words."""
    return [term for term in terms if term.replace(" ", "").isalpha()]


# ---- rows for the new ids

@torch.no_grad()
def resize(model, old: T.Tokenizer, vocab_size: int, parts: dict[int, list[int]], init: str = "subtoken",
           zero=(), seed: int = 0) -> None:
    """Grow embedding and head, [V, D] each (one parameter where they are tied), to `vocab_size` rows, in place.

    parts: new id -> the old ids it stands for. Rows of old ids keep their bits. Rows that a base has beyond its
    tokenizer count as free. init, for each matrix from its own rows of `old`:
        "subtoken": mean of the rows of its parts. "subtoken_norm": the same, stretched to the median norm of the old
            rows (a mean is shorter than what it is the mean of); as a row of the head it is then sure of what it has
            not learnt: stories260K with 200 new tokens reads legal text at 6.0 bits per byte, without at 4.0
        "mean": of all old rows. "covariance": drawn around it with 1e-5 of their covariance (Hewitt 2021,
            "Initializing new word embeddings"). "zero". "random": normal with the config's initializer_range
    zero: ids whose rows are zero whatever `init` says (padding)
    """
    if init not in INITS:
        raise ValueError(f"--init is {init!r}, but must be one of {', '.join(INITS)}")
    config = model.config
    if config.vocab_size < old.vocab_size:
        raise ValueError(f"the model has {config.vocab_size} rows, but its tokenizer {old.vocab_size} ids; the two "
                         f"belong to different models")
    known = [i for i, token in enumerate(old.tokens) if token is not None]
    generator = torch.Generator().manual_seed(seed)
    for module in [model.embed_tokens] if config.tie_word_embeddings else [model.embed_tokens, model.head]:
        weight = module.weight                                          # [V, D]
        rows = weight[known].float().cpu()
        grown = weight.new_zeros(max(vocab_size, len(weight)), weight.shape[1])
        grown[:len(weight)] = weight
        mean, norm = rows.mean(0), rows.norm(dim=1).median()
        if init == "covariance":
            centred = rows - mean
            values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows) * 1e-5)
            root = vectors * values.clamp(min=0).sqrt()                 # root @ root.T is the covariance
        for i, of in parts.items():
            if i in zero or init == "zero":
                row = torch.zeros_like(mean)
            elif init.startswith("subtoken"):
                row = weight[list(of)].float().mean(0).cpu()
                if init == "subtoken_norm":
                    row = row * norm / row.norm().clamp(min=1e-12)
            elif init == "random":
                row = torch.randn(len(mean), generator=generator) * config.initializer_range
            else:
                row = mean if init == "mean" else mean + root @ torch.randn(len(mean), generator=generator)
            grown[i] = row.to(weight)
        module.weight = torch.nn.Parameter(grown)
    config.vocab_size = len(grown)
    model.tie()


def save_model(base: str, tokenizer_folder: Path, parts: dict[int, list[int]], out, init: str, zero=(), seed: int = 0):
    """Write base's weights with rows for the tokenizer in `tokenizer_folder` as a complete model folder `out`."""
    folder = hf.resolve(base)
    named = hf.read_json(folder / "config.json")
    dtype = hf.DTYPES.get(named.get("dtype") or named.get("torch_dtype"), torch.float32)
    model, new = hf.load(folder, dtype), T.load(tokenizer_folder)
    before = model.config.vocab_size
    resize(model, Base(folder).tokenizer, new.vocab_size, parts, init, zero, seed)
    card = f"No training yet: {len(parts)} tokens were added to the vocabulary of {before}, rows by `{init}`."
    with _new_folder(out) as target:
        hf.save(model, target, base=base, tokenizer=tokenizer_folder, card=card)
        if (ranks := Path(tokenizer_folder) / "tokenizer.tiktoken").exists():
            shutil.copyfile(ranks, target / ranks.name)
        for name in ("config.json", "generation_config.json"):
            values = hf.read_json(target / name)
            if new.pad_id is not None and values.get("pad_token_id") != new.pad_id:
                write_json(target / name, values | {"pad_token_id": new.pad_id})


# ---- is it worth it?

def measure(base: Base, new: T.Tokenizer, texts: list[str]) -> dict:
    """Lengths of `texts` before and after, and how often each new id occurs ("counts", as an array)."""
    old, first = base.tokenizer, base.tokenizer.vocab_size
    before, after = old.encode_batch(texts), new.encode_batch(texts)
    size, n_words = sum(len(T.clean(t).encode()) for t in texts), sum(len(t.split()) for t in texts)
    a, b = sum(map(len, before)), sum(map(len, after))
    if not a:
        raise ValueError("a text to report on is empty")
    counts = np.bincount(np.concatenate(after), minlength=new.vocab_size)[first:]
    floor = base.fewest(texts)
    return {"documents": len(texts), "bytes": size, "words": n_words, "tokens_before": a, "tokens_after": b,
            "tokens_per_byte_before": a / size, "tokens_per_byte_after": b / size,
            "tokens_per_word_before": a / max(1, n_words), "tokens_per_word_after": b / max(1, n_words),
            "change": b / a - 1, "largest_possible_change": min(1.0, floor / a) - 1,
            "documents_touched": sum(bool((ids >= first).any()) for ids in after) / len(texts),
            "new_tokens_used": float((counts > 0).mean()) if len(counts) else 0.0, "counts": counts}


def report(base: Base, new: T.Tokenizer, texts: dict[str, list[str]], corpus_tokens: int | None = None) -> dict:
    """Lengths before and after for each of `texts` (which has "domain"), and whether to extend, with the reason.

    break_even_tokens: domain tokens (of the base) in which the median new token occurs TIMES_SEEN times.
    largest_possible_change: if every word that the tokenizer's own pattern cuts (in SentencePiece: every run of letters
        of one script, or of punctuation) were one token.
    corpus_tokens: tokens (of the base) that there are to train on; None: those of the domain text.
    """
    rows = {name: measure(base, new, documents) for name, documents in texts.items()}
    domain = rows["domain"]
    rate = float(np.median(domain["counts"])) / domain["tokens_before"] if len(domain["counts"]) else 0.0
    break_even = round(TIMES_SEEN / rate) if rate else None
    have = corpus_tokens or domain["tokens_before"]
    shorter, bound = -domain["change"], -domain["largest_possible_change"]
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
        why = (f"domain text gets {shorter:.1%} shorter (attention's cost {1 - (1 - shorter) ** 2:.0%} lower), and "
               f"{have:,} tokens are enough to train the new rows ({break_even:,})")
    advice = "extend" if shorter >= WORTH_IT and break_even is not None and have >= break_even else "keep"
    return {"new_tokens": new.vocab_size - base.tokenizer.vocab_size, "recommendation": advice, "reason": why,
            "break_even_tokens": break_even, "corpus_tokens": have, "attention_cost": (1 + domain["change"]) ** 2,
            "texts": {name: {k: v for k, v in row.items() if k != "counts"} for name, row in rows.items()}}


def compare(train: list[str], held_out: list[str], vocab_size: int, megabytes: float = 0, seeds: int = 1) -> list[dict]:
    """Train each kind of tokenizer on `train` and measure it on `held_out`. A dict a kind: ids, tokens_per_byte,
    tokens_per_word, exact and covered (share of bytes in documents that decoding gives back, with their white space
    and without), unknown (share of tokens), train_seconds, encode_mb_per_second; where `megabytes` are asked for,
    bits_per_byte too: that of a small model for each seed (small_model)."""
    rows = []
    size, n_words = sum(len(T.clean(t).encode()) for t in held_out), sum(len(t.split()) for t in held_out)
    if not n_words:
        raise ValueError("every tenth document is held out, and there is not a word in those")
    there = sum(len(T.clean(t).encode()) for t in train)
    if megabytes * 1e6 > MOST_EPOCHS * there:
        raise ValueError(f"{megabytes:g} megabytes are more than {MOST_EPOCHS} times the text's {there / 1e6:.3g}; "
                         f"ask for less --bits-per-byte, or give more text")
    with tempfile.TemporaryDirectory() as home:
        for kind in ("bpe", "unigram", "wordpiece"):
            start = time.perf_counter()
            tok = T.train(iter(train), kind, vocab_size, Path(home, kind))
            trained = time.perf_counter()
            ids = tok.encode_batch(held_out)
            encoded = time.perf_counter()
            n = sum(map(len, ids))
            exact = covered = 0
            for text, i in zip(map(T.clean, held_out), ids):
                decoded = tok.decode(i)
                exact += len(text.encode()) * (decoded == text)
                covered += len(text.encode()) * ("".join(decoded.split()) == "".join(text.split()))
            unknown = sum(int((i == tok.unk_id).sum()) for i in ids) if tok.unk_id is not None else 0
            rows.append({"kind": kind, "ids": tok.vocab_size, "tokens_per_byte": n / size,
                         "tokens_per_word": n / n_words, "exact": exact / size, "covered": covered / size,
                         "unknown": unknown / n, "train_seconds": trained - start,
                         "encode_mb_per_second": size / 1e6 / (encoded - trained)})
        for row in rows if megabytes else []:           # minutes each: not before all the tokenizers are there
            row["bits_per_byte"] = bits = []
            for seed in range(seeds):
                bits.append(small_model(Path(home, row["kind"]), train, held_out, megabytes, seed))
                print(f"{row['kind']}, seed {seed}: {bits[-1]:.4f} bits per byte", file=sys.stderr, flush=True)
    return rows


def small_model(tokenizer, train: list[str], held_out: list[str], megabytes: float, seed: int) -> float:
    """Bits per byte on `held_out` of a model with 4 layers of width 128, trained by train.py from scratch on
    `megabytes` of `train`: the same bytes, not the same tokens, whatever the tokenizer."""
    with tempfile.TemporaryDirectory() as home:
        total = pack(iter(train), T.load(tokenizer), Path(home, "shards"), heldout=0)["splits"]["train"]
        steps = max(1, round(megabytes * 1e6 * total["tokens"] / total["bytes"] / (16 * 256)))
        Path(home, "held_out.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in held_out if t.strip()))
        _run("train.py", "--model.init", "scratch", "--model.tokenizer", tokenizer, "--model.hidden-size", 128,
             "--model.intermediate-size", 352, "--model.num-hidden-layers", 4, "--model.num-attention-heads", 4,
             "--model.num-key-value-heads", 4, "--data.sources.text.path", f"{home}/shards", "--data.context", 256,
             "--data.schedule", "domain_only", "--train.batch-size", 16, "--train.micro-batch-size", 16,
             "--train.steps", steps, "--train.precision", "fp32", "--optim.lr", 2e-3, "--optim.min-lr", 2e-4,
             "--optim.warmup-ratio", 0.05, "--seed", seed, "--out", f"{home}/run")
        _run("eval.py", "--model", f"{home}/run/final", "--text", f"held_out={home}/held_out.jsonl",
             "--json", f"{home}/eval.json")
        return json.loads(Path(home, "eval.json").read_text(encoding="utf-8"))["texts"]["held_out"]["bits_per_byte"]


def _run(file: str, *arguments) -> None:
    """A command of this checkout; its failure is ours, with the line it ended with."""
    command = [sys.executable, Path(__file__).parents[1] / file, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise ValueError(f"{file} failed: {(done.stderr.strip().splitlines() or ['no word why'])[-1]}")


# ---- command line

def main():
    parser = ArgumentParser(prog="tokenizer.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="extend|add|report|compare")
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
    result = {"extend": _extend, "add": _add, "report": _report, "compare": _compare}[args.command](args)
    if args.json:
        write_json(args.json, result)


def _texts(files) -> list[str]:
    return [text for file in files for text in read_documents(file)]


def _split(texts: list[str]) -> tuple[list[str], list[str]]:
    if len(texts) < 10:
        raise ValueError(f"{len(texts)} documents are too few: every tenth is held out")
    return [t for n, t in enumerate(texts) if n % 10 != 9], texts[9::10]


def _source(args):
    """The base's tokenizer, after what would else come to light when the corpus has been read."""
    _refuse_existing(Path(args.out))
    if not args.model:
        return args.tokenizer
    base = hf.open_base(args.model)
    hf.parse_config(base.settings, base.folder)
    hf.tensor_files(base.folder)
    return base.folder


def _extend(args):
    texts = (text for file in args.files for text in read_documents(file))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "tokenizer") if args.model else Path(args.out)
        source = _source(args)
        ids = extend(source, texts, args.new_tokens, folder, args.min_count)
        new = T.load(folder)
        first = new.vocab_size - len(ids)
        if args.model:
            save_model(args.model, folder, dict(enumerate(ids, first)), args.out, args.init, seed=args.seed)
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
            old = Base(source).tokenizer
            parts = {i: old.encode(term) for term, i in ids.items()}
            zero = {ids[args.pad]} if args.pad is not None else ()
            save_model(args.model, folder, parts, args.out, args.init, zero, args.seed)
    if not args.special and (plain := plain_words(args.terms)):
        print(f"warning: {', '.join(map(repr, plain))}: plain words; as added tokens they are also cut out of longer "
              f"words. `tokenizer.py extend` on text that holds them serves better", file=sys.stderr)
    for term, i in ids.items():
        print(i, term)
    return {"out": args.out, "ids": ids, "plain_words": plain_words(args.terms)}


def _report(args):
    if args.corpus_tokens is not None and args.corpus_tokens < 1:
        raise ValueError(f"--corpus-tokens is {args.corpus_tokens}, but must be at least 1")
    base, domain = Base(args.tokenizer), _texts(args.domain)
    tokens = args.corpus_tokens or sum(map(len, base.tokenizer.encode_batch(domain)))
    texts = {name: _texts(files) for name in ("general", "code") if (files := getattr(args, name))}
    if args.extended:
        new = T.load(args.extended)
        if new.tokens[:base.tokenizer.vocab_size] != base.tokenizer.tokens:
            raise ValueError(f"{args.extended} is no extension of {args.tokenizer}: their old ids differ")
    else:
        learnt, domain = _split(domain)
        with tempfile.TemporaryDirectory() as folder:
            extend(args.tokenizer, learnt, args.new_tokens, Path(folder, "tokenizer"), args.min_count)
            new = T.load(Path(folder, "tokenizer"))
    result = report(base, new, {"domain": domain} | texts, tokens)
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
    return result


def _compare(args):
    if not 0 <= args.bits_per_byte < math.inf or args.seeds < 1:
        raise ValueError(f"--bits-per-byte is {args.bits_per_byte:g} and --seeds {args.seeds}; they must be at least 0 "
                         f"and 1")
    rows = compare(*_split(_texts(args.files)), args.vocab_size, args.bits_per_byte, args.seeds)
    print(f"{'kind':10} {'ids':>6} {'tokens/byte':>11} {'tokens/word':>11} {'exact':>7} {'covered':>7} {'unknown':>7} "
          f"{'train s':>8} {'MB/s':>6}" + "   bits/byte (seeds)" * bool(args.bits_per_byte))
    for r in rows:
        bits = r.get("bits_per_byte", ())
        print(f"{r['kind']:10} {r['ids']:6} {r['tokens_per_byte']:11.4f} {r['tokens_per_word']:11.3f} "
              f"{r['exact']:7.1%} {r['covered']:7.1%} {r['unknown']:7.2%} {r['train_seconds']:8.1f} "
              f"{r['encode_mb_per_second']:6.1f}" + (f"   {np.mean(bits):.4f} ({min(bits):.4f} to {max(bits):.4f})"
                                                     if bits else ""))
    if args.bits_per_byte and rows[-1]["exact"] < 1:
        print("bits per byte: white space and unknown characters, which wordpiece drops, cost it nothing")
    return rows
