"""Truth: a naive continued BPE that counts everything anew for each merge; the libraries' own ids, each loaded here by
its own call (`tokenizers`, `sentencepiece`, `tiktoken`, `transformers`).
The report's counts are made by hand.
Laws: old ids keep their values; boundaries after are a subset of boundaries before.
"""

import base64
import collections
import itertools
import json
import random
import re
import shutil

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
import torch
from tokenizers import models
from vocabularies import BASES, LATIN, SMALL, fuzz, save_as_phi3

from text import extend_vocabulary as X
from text import vocabulary as T
from text.corpus import read_documents
from text.vocabulary_files import BaseTokenizer

NEW = 200
# Two of the real ones are enough for `make test`.
REAL = [pytest.param(kind, marks=pytest.mark.slow) if kind in ("phi2", "llama3", "gpt2") else kind for kind in BASES]


def naive(words: dict, tokens: list, joinable, may_be, new_tokens: int, min_count: int) -> list:
    words, tokens, joinable, merges = dict(words), list(tokens), list(joinable), []
    while len(merges) < new_tokens:
        counts = collections.Counter()
        for word, n in words.items():
            for pair in itertools.pairwise(word):
                counts[pair] += n
        fit = [(-n, pair) for pair, n in counts.items() if n >= min_count and joinable[pair[0]] and joinable[pair[1]]
               and (union := tokens[pair[0]] + tokens[pair[1]]) not in tokens and may_be(union)]
        if not fit:
            break
        pair = min(fit)[1]
        merges.append(pair)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        joinable.append(True)
        joined = collections.Counter()
        for word, n in words.items():
            out = []
            for i in word:
                out.append(i)
                if tuple(out[-2:]) == pair:
                    out[-2:] = [len(tokens) - 1]
            joined[tuple(out)] += n
        words = joined
    return merges


@pytest.mark.parametrize("seed", range(8))
def test_merges_are_those_of_a_naive_count(seed):
    rng = random.Random(seed)
    tokens = list("abcde")
    words = collections.Counter(tuple(rng.choices(range(5), [5, 4, 3, 2, 1], k=rng.randrange(1, 9))) for _ in range(60))
    words += collections.Counter({(0, 0, 0, 0, 0): 7, (0, 1, 0, 1, 0): 5})
    joinable = [True, True, True, True, False]
    arguments = (lambda union: len(union) < 6, 25, 2)
    expected = naive(words, tokens, joinable, *arguments)
    assert X.continue_bpe(words, list(tokens), list(joinable), *arguments) == expected
    assert len(expected) > 5


@pytest.fixture(scope="module")
def legal(data_dir):
    """Documents to learn from, and others: about 450 kB and 100 kB of the DC Code."""
    documents = list(read_documents([str(data_dir / "corpora/legal_en_dc/dc_code_title28.txt")]))
    return [d for n, d in enumerate(documents) if n % 10 < 4], documents[9::10]


@pytest.fixture(scope="module")
def extended(request, tmp_path_factory, small_bases):
    """extended(kind) -> (Base, folder of the extension, its Tokenizer, ids each new id stands for, held-out texts)."""
    made = {}

    def make(kind):
        if kind not in made:
            if kind in SMALL:
                path, train, held = small_bases[kind], [LATIN] * 20, [LATIN]
            else:
                path = request.getfixturevalue("data_dir") / BASES[kind]
                train, held = request.getfixturevalue("legal")
            out = tmp_path_factory.mktemp("extended") / kind.replace(" ", "_")
            parts = X.extend(path, train, 40 if kind in SMALL else NEW, out, min_count=3)
            made[kind] = BaseTokenizer(path), out, T.load(out), parts, held
        return made[kind]
    return make


def spell(tok, ids) -> str:
    """The letters of `ids`, with the characters that byte pieces spell."""
    tokens = [tok.tokens[i] for i in ids]
    return b"".join(bytes([int(t[3:5], 16)]) if t.startswith("<0x") else t.encode() for t in tokens).decode()


def boundaries(tok, ids) -> list[int]:
    """Ends of the tokens, in units that no extension changes: bytes of what is spelt, one for a byte piece."""
    special = set(tok.special_ids)
    lengths = [1 if i in special or tok.tokens[i].startswith("<0x") else len(tok.tokens[i].encode()) for i in ids]
    return np.cumsum(lengths).tolist()


@pytest.mark.parametrize("kind", [*SMALL, *REAL])
class TestExtension:
    def test_old_ids_stay_and_new_ones_follow_the_last(self, extended, kind):
        base, _, new, parts, _ = extended(kind)
        old = base.tokenizer
        assert len(parts) >= (20 if kind in SMALL else NEW)
        assert new.tokens[:old.vocab_size] == old.tokens
        assert new.vocab_size == old.vocab_size + len(parts)
        assert None not in new.tokens[old.vocab_size:]
        assert len(set(new.tokens)) == len(new.tokens)
        assert (new.bos_id, new.eos_id, new.pad_id, new.unk_id, new.add_bos, new.special_ids) == (
            old.bos_id, old.eos_id, old.pad_id, old.unk_id, old.add_bos, old.special_ids)

    def test_boundaries_are_refined_never_moved(self, extended, kind, request):
        base, _, new, parts, held = extended(kind)
        old = base.tokenizer
        texts = [*held, *fuzz(250)]
        if kind not in SMALL:
            wiki = request.getfixturevalue("data_dir") / "corpora/wikitext2/wiki.valid.raw"
            texts += wiki.read_text(encoding="utf-8")[:60_000].splitlines(keepends=True)
        texts = [t for t in texts if not any(old.tokens[i] in t for i in old.special_ids)]
        touched = 0
        for before, after in zip(old.encode_batch(texts), new.encode_batch(texts)):
            a, b = boundaries(old, before), boundaries(new, after)
            assert a[-1:] == b[-1:]
            assert set(b) <= set(a)
            if (after < old.vocab_size).all():
                assert before.tolist() == after.tolist()
            else:
                touched += 1
                opened = [i for x in after.tolist()
                          for i in parts.get(x, (x,))]
                assert opened == before.tolist()
        assert touched > 0

    def test_round_trip_on_fuzz(self, extended, kind):
        base, _, new, _, held = extended(kind)
        for text in [*fuzz(200, seed=1), *held[:20]]:
            ids = new.encode(text)
            if base.has_pieces:            # its normaliser adds and drops spaces
                assert new.decode(ids) == base.tokenizer.decode(base.tokenizer.encode(text))
            else:
                assert new.decode(ids) == T.replace_surrogates(text)

    def test_every_new_token_is_reached_by_merges_alone(self, extended, kind):
        """By the rule of the written file, spelt out: no look-up of whole words."""
        base, out, new, parts, _ = extended(kind)
        first = base.tokenizer.vocab_size
        if base.kind == "sentencepiece":
            lib = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
            rank = {lib.id_to_piece(i): -lib.get_score(i) for i in range(lib.piece_size()) if not lib.is_control(i)}
        elif (out / "tokenizer.model").exists():
            rank = {base64.b64decode(line.split()[0]).decode("latin-1").translate(T.BYTE_LETTERS): int(line.split()[1])
                    for line in (out / "tokenizer.model").read_bytes().splitlines()}
        else:
            saved = json.loads((out / "tokenizer.json").read_text())["model"]
            bpe = tokenizers.Tokenizer(models.BPE(saved["vocab"], [tuple(m) for m in saved["merges"]]))
            assert [bpe.encode(t).ids for t in new.tokens[first:]] == [[i] for i in range(first, new.vocab_size)]
            return
        for n, token in enumerate(new.tokens[first:]):
            pieces = list(token)
            while ranked := [(rank[a + b], k) for k, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in rank]:
                k = min(ranked)[1]
                pieces[k:k + 2] = [pieces[k] + pieces[k + 1]]
            assert pieces == [token]
            assert spell(base.tokenizer, parts[first + n]) == token

    def test_all_forms_agree(self, extended, kind):
        base, out, _, _, held = extended(kind)
        texts = [T.replace_surrogates(t) for t in [*T.PROBES, *fuzz(250, seed=2), *held]]
        texts = [t for t in texts if not any(base.tokenizer.tokens[i] in t for i in base.tokenizer.special_ids)]
        lib = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
        expected = [lib.encode(text, add_special_tokens=False).ids for text in texts]
        files = {file.name for file in out.iterdir()} - {"tokenizer_config.json", "generation_config.json"}
        assert files == {"gpt2": {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer.tiktoken"},
                         "phi2": {"tokenizer.json"}, "small json": {"tokenizer.json"},
                         "small bytes": {"tokenizer.json", "tokenizer.tiktoken"}
                         }.get(kind, {"tokenizer.json", "tokenizer.model"})
        if base.kind == "sentencepiece":
            theirs = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
            assert [theirs.encode(text) for text in texts] == expected
        elif kind not in ("phi2", "small json"):
            ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for name in files - {"tokenizer.json"}
                     if name.startswith("tokenizer.") for line in (out / name).read_bytes().splitlines()}
            pattern = T.GPT2_SPLIT if kind == "gpt2" else T.LLAMA3_SPLIT
            theirs = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"\0none": 10**6})
            assert [theirs.encode_ordinary(text) for text in texts] == expected
        if kind == "gpt2":
            assert [i.tolist() for i in T.load(out / "vocab.json").encode_batch(texts)] == expected

    def test_held_out_text_is_shorter(self, extended, kind):
        base, _, new, _, held = extended(kind)
        before, after = (sum(map(len, t.encode_batch(held))) for t in (base.tokenizer, new))
        most = {"stories": 0.8, "llama2": 0.96, "small bytes": 0.8, "small pieces": 0.8}
        assert after < before * most.get(kind, 0.99)

    def test_transformers_reads_it(self, extended, kind):
        transformers = pytest.importorskip("transformers", minversion="5", reason="the truth is transformers 5")
        _, out, new, _, held = extended(kind)
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        for text in [*held[:10], *T.PROBES[:40], "the  tenant\n漢字 🙂"]:
            assert theirs.encode(text, add_special_tokens=False) == new.encode(text)
        assert theirs.encode("the")[:1] == ([new.bos_id] if new.add_bos else new.encode("the")[:1])


def test_the_same_text_gives_the_same_files(small_bases, tmp_path):
    for name in ("a", "b"):
        X.extend(small_bases["small bytes"], [LATIN] * 20, 30, tmp_path / name)
    assert all((tmp_path / "a" / f.name).read_bytes() == f.read_bytes() for f in (tmp_path / "b").iterdir())


def test_a_tokenizer_json_of_pieces_learns_what_its_tokenizer_model_does(small_bases, tmp_path):
    for kind in ("small pieces", "small json"):
        X.extend(small_bases[kind], [LATIN] * 20, 30, tmp_path / kind)
    pieces, converted = T.load(tmp_path / "small pieces"), T.load(tmp_path / "small json")
    assert converted.tokens == pieces.tokens
    texts = [text for text in [LATIN, *fuzz(200)] if not any(pieces.tokens[i] in text for i in pieces.special_ids)]
    assert [i.tolist() for i in converted.encode_batch(texts)] == [i.tolist() for i in pieces.encode_batch(texts)]


def test_an_extension_can_be_extended(small_bases, tmp_path):
    for kind, path in small_bases.items():
        X.extend(path, [LATIN] * 20, 10, tmp_path / kind / "1")
        X.extend(tmp_path / kind / "1", [LATIN] * 20, 10, tmp_path / kind / "2")
        X.extend(path, [LATIN] * 20, 20, tmp_path / kind / "at once")
        assert T.load(tmp_path / kind / "2").tokens == T.load(tmp_path / kind / "at once").tokens


@pytest.mark.parametrize(("text", "pieces"), [
    ("The estate, 16", ["▁The", "▁estate", ",", "▁", "<0x31>", "<0x36>"]),             # no digit was trained
    ("the\nbe   liable", ["▁the", "<0x0A>", "be", "▁", "▁", "▁liable"]),
    # Characters that the base spells in bytes
    ("漢字法律，第1条", ["▁漢字法律", "，", "第", "<0x31>", "条"]), ("über漢", ["▁über", "漢"]),
    ("a" * 40, ["▁" + "a" * 15, "a" * 16, "a" * 9]), ("漢" * 20, ["▁" + "漢" * 15, "漢" * 5])])
def test_fewest_tokens_of_a_sentencepiece_text(small_bases, text, pieces):
    assert X.count_fewest_tokens(BaseTokenizer(small_bases["small pieces"]), [text]) == len(pieces)


CHINESE = "第一条 为了保护民事主体的合法权益，调整民事关系，制定本法。\u3000第１２条 自然人从出生时起到死亡时止。\n"


@pytest.mark.parametrize("kind", ["small pieces", "small json", "stories"])
def test_new_characters_become_tokens_before_what_joins_them(kind, small_bases, request, tmp_path):
    path = small_bases[kind] if kind in SMALL else request.getfixturevalue("data_dir") / BASES[kind]
    old = T.load(path)
    parts = X.extend(path, [CHINESE * 9, "Straße, Größe, Öl. Привет, мир! " * 9], 200, tmp_path / "out")
    lacking = {c for c in CHINESE + "ßöÖПривет" if c not in old.vocab and ord(c) > 127}
    new = T.load(tmp_path / "out")
    assert lacking <= new.vocab.keys()
    for c in lacking:
        assert [old.tokens[i] for i in parts[new.vocab[c]]] == [f"<0x{byte:02X}>" for byte in c.encode()]
        assert new.encode("a" + c).count(new.vocab[c]) == 1
    for i, old_ids in parts.items():
        assert spell(old, old_ids) == new.tokens[i]
        assert {c for c in new.tokens[i] if c in lacking} <= set(map(new.tokens.__getitem__, range(i + 1)))
    assert len(new.encode(CHINESE)) < len(old.encode(CHINESE)) / 5
    assert new.decode(new.encode(CHINESE)) == old.decode(old.encode(CHINESE))
    for text in [LATIN, *fuzz(100)]:
        before, after = old.encode(text), new.encode(text)
        if max(after, default=0) < old.vocab_size:
            assert after == before
        else:
            assert [old_id for i in after for old_id in parts.get(i, (i,))] == before
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out/tokenizer.model")) \
        if kind != "small json" else tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    ids = theirs.encode(CHINESE) if kind != "small json" else theirs.encode(CHINESE, add_special_tokens=False).ids
    assert ids == new.encode(CHINESE)


def test_a_byte_level_base_goes_on_joining_bytes_that_are_no_characters(small_bases, tmp_path):
    parts = X.extend(small_bases["small bytes"], [CHINESE * 9], 60, tmp_path / "out")
    tokens = T.load(tmp_path / "out").tokens
    spelt = [bytes(map(T.LETTER_BYTES.get, tokens[i])).decode(errors="replace") for i in parts]
    assert 10 < sum("\ufffd" in text for text in spelt) < len(spelt)


def test_a_base_without_bytes_says_that_unknown_characters_stay_so(tmp_path, capsys):
    with open(tmp_path / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([LATIN] * 20), model_writer=file, vocab_size=60,
                                                 model_type="bpe", hard_vocab_limit=False, minloglevel=2)
    X.extend(tmp_path, [LATIN] * 20, 10, tmp_path / "latin")
    assert "warning" not in capsys.readouterr().err
    X.extend(tmp_path, [LATIN + " 漢字"] * 20, 10, tmp_path / "out")
    assert "characters which it lacks stay unknown; none of them is learned" in capsys.readouterr().err
    assert not [token for token in T.load(tmp_path / "out").tokens if "漢" in token]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most"), [("llama2", 1.1 * 0.2695), ("llama3", 0.23)])
def test_a_new_language_is_as_short_as_with_a_vocabulary_of_its_own(kind, most, data_dir, tmp_path):
    """A SentencePiece BPE of 4,000 pieces trained on the civil code has 0.2695 tokens per byte of the criminal law."""
    learn, held_out = ((data_dir / f"corpora/legal_zh/{name}.txt").read_text(encoding="utf-8")
                       for name in ("civil_code", "criminal_law"))
    X.extend(data_dir / BASES[kind], [learn], 4000, tmp_path / "out")
    size, after = len(held_out.encode()), len(T.load(tmp_path / "out").encode(held_out))
    assert X.count_fewest_tokens(BaseTokenizer(data_dir / BASES[kind]), [held_out]) < after < most * size


@pytest.mark.parametrize("kind", ["small pieces", "small json"])
def test_a_base_with_an_unused_id(kind, small_bases, tmp_path):
    """A hole before an added token, as older Llama fine-tunes have it, is no token of the extension either."""
    shutil.copytree(small_bases[kind], tmp_path / "base")
    size = T.load(tmp_path / "base").vocab_size
    if kind == "small pieces":
        (tmp_path / "base/tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
        (tmp_path / "base/added_tokens.json").write_text(json.dumps({"<pad>": size + 2}))
    else:
        file = tmp_path / "base/tokenizer.json"
        description = json.loads(file.read_text())
        description["model"]["vocab"]["<pad>"] = size + 2
        description["added_tokens"].append(description["added_tokens"][0] | {"id": size + 2, "content": "<pad>"})
        file.write_text(json.dumps(description))
    old = T.load(tmp_path / "base")
    assert old.tokens[size:] == [None, None, "<pad>"]
    parts = X.extend(tmp_path / "base", [LATIN] * 20, 10, tmp_path / "out")
    new = T.load(tmp_path / "out")
    assert min(parts) == new.vocab["<pad>"] + 1 == size + 3
    assert new.special_ids == old.special_ids
    texts = [LATIN, *fuzz(50), "<unused_310>"]
    assert not {size, size + 1} & {i for text in texts for i in new.encode(text)}
    assert X.keeps_ids(old, new)
    assert not X.keeps_ids(new, old)


TERMS = ["<legal_case>", "res_judicata", "force_majeure"]


@pytest.mark.parametrize("kind", [*SMALL, pytest.param("phi2", marks=pytest.mark.slow), "stories"])
def test_add(kind, small_bases, request, tmp_path):
    path = small_bases[kind] if kind in SMALL else request.getfixturevalue("data_dir") / BASES[kind]
    old, has_pad = T.load(path), kind == "small bytes"
    pads = [] if has_pad else ["<|the pad|>"]
    parts = X.add(path, TERMS, tmp_path / "out", pad=None if has_pad else "<|the pad|>")
    new = T.load(tmp_path / "out")
    assert parts == {old.vocab_size + n: old.encode(term) for n, term in enumerate([*TERMS, *pads])}
    ids = {new.tokens[i]: i for i in parts}
    assert list(ids) == [*TERMS, *pads]
    assert new.tokens[:old.vocab_size] == old.tokens
    texts = [t for t in [*T.PROBES, *fuzz(50)] if not any(old.tokens[i] in t for i in old.special_ids)]
    assert [i.tolist() for i in new.encode_batch(texts)] == [i.tolist() for i in old.encode_batch(texts)]
    for term in TERMS:
        assert new.encode(f"see {term} there").count(ids[term]) == 1
        assert term in new.decode(new.encode(f"x{term}y"))
        assert ids[term] not in new.special_ids
    assert new.add_bos == old.add_bos
    if not has_pad:
        assert new.pad_id == ids["<|the pad|>"]
        assert new.pad_id in new.special_ids


def with_terms(terms: list[str], n: int) -> list[str]:
    """Texts with terms at every position: at the ends, next to each other, within words, and next to white space."""
    around = ["", " ", "  ", "\n", "the", " the ", " Maß", "ä", "漢字", "\t", "a  b", "x\u2581y"]
    rng = random.Random(4)
    texts = [" ".join(["the", *terms, "Maß"]), *terms]
    texts += [a + term + b for term in terms for a in around for b in around]
    wild = fuzz(3)
    return texts + ["".join(rng.choice(rng.choice((around, terms, wild))) for _ in range(9)) for _ in range(n)]


POSITIONS = ["<legal_case>", "res judicata", "Verkäufer", "Maß", "Ġx", "案件", "§ 823", "<legal", "<|r|>", "\n¶\n"]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", [*SMALL, "stories", *(pytest.param(kind, marks=pytest.mark.slow) for kind in
                                                      ("gpt2", "phi2", "llama3", "llama2", "llama2 json"))])
def test_add_leaves_the_text_around_a_term(kind, special, small_bases, request, tmp_path):
    """Truth: the base's own decode and, where nothing spans two parts, its ids of each part; transformers' ids."""
    if kind in SMALL:
        path = small_bases[kind]
    else:
        path = request.getfixturevalue("data_dir") / BASES[kind.split()[0]]
        if kind == "llama2 json":
            save_as_phi3(path, path := tmp_path / "json")
    old = T.load(path)
    terms = [term for term in POSITIONS if term not in old.vocab]
    X.add(path, terms, tmp_path / "out", special, pad=None if old.pad_id is not None else "<|the pad|>")
    new = T.load(tmp_path / "out")
    texts = [text for text in map(T.replace_surrogates, with_terms(terms, 300))
             if not any(old.tokens[i] in text for i in old.special_ids)]
    ids = [i.tolist() for i in new.encode_batch(texts)]
    assert {old.vocab_size + n for n in range(len(terms))} <= set(itertools.chain(*ids))
    for text, some in zip(texts, ids):
        assert new.decode(some) == old.decode(old.encode(text)), text
    cut = re.compile("|".join(map(re.escape, sorted(terms, key=len, reverse=True))))
    if not BaseTokenizer(path).has_pieces and kind != "phi2":           # phi2 has added tokens of its own
        for text, some in zip(texts, ids):
            parts, found = map(old.encode, cut.split(text)), [new.vocab[term] for term in cut.findall(text)]
            assert some == [i for part, term in itertools.zip_longest(parts, found) for i in (*part, term)][:-1]
    transformers = pytest.importorskip("transformers", minversion="5", reason="the truth is transformers 5")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [theirs.encode(text, add_special_tokens=False) for text in texts] == ids
    if kind in ("llama2", "gpt2", "phi2"):
        shutil.copytree(path, tmp_path / "native")
        named = {"llama2": "LlamaTokenizer", "gpt2": "GPT2Tokenizer"}
        if kind in named:
            (tmp_path / "native/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named[kind]}))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "native")
        theirs.add_tokens([transformers.AddedToken(term, normalized=kind == "llama2") for term in terms])
        # transformers drops one of the blanks that a text begins with, and joins two blanks that SentencePiece keeps
        # apart, in any text.
        for text, some in zip(texts, ids):
            if kind != "llama2" or not re.search("^[ \u2581]|[ \u2581]{2}", text):
                assert theirs.encode(text, add_special_tokens=False) == some


@pytest.mark.parametrize(("kind", "cutter"), [
    ("small json", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}),
    ("small json", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}),
    ("small bytes", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True})])
def test_add_where_a_pre_tokenizer_puts_the_prefix(kind, cutter, small_bases, tmp_path):
    shutil.copytree(small_bases[kind], tmp_path / "base")
    file = tmp_path / "base/tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pre_tokenizer": cutter, "normalizer": None}))
    old, terms = T.load(file), ["<legal_case>", "res judicata"]
    X.add(file, terms, tmp_path / "out")
    new = T.load(tmp_path / "out")
    for text in map(T.replace_surrogates, [*fuzz(30), *with_terms(terms, 30)]):
        if text in terms or not text.startswith(tuple(terms)):
            assert new.decode(new.encode(text)).lstrip() == old.decode(old.encode(text)).lstrip()
        if not any(term in text for term in terms):
            assert new.encode(text) == old.encode(text)


def test_add_refuses(small_bases, tmp_path):
    path = small_bases["small bytes"]
    for terms, pad, message in ((["\udc80"], None, "half a surrogate pair"),
                                ([], None, "there is no term to add"), ([""], None, "a term is empty"),
                                (["<x>", "<x>"], None, "'<x>' is named twice"), (["a"], None, "'a' has the id"),
                                (["<x>"], "<p>", "has the pad token '<|pad|>' already")):
        with pytest.raises(ValueError) as error:
            X.add(path, terms, tmp_path / "out", pad=pad)
        assert message in str(error.value)
        assert not (tmp_path / "out").exists()


# ---- rows

@pytest.mark.parametrize("tied", [True, False])
def test_rows(tiny_model, small_bases, tied):
    old = T.load(small_bases["small bytes"])
    known = [i for i, token in enumerate(old.tokens) if token is not None]
    parts = {old.vocab_size: [5, 7, 7], old.vocab_size + 1: [9], old.vocab_size + 2: [1, 2]}

    def grow(init, rows=old.vocab_size, seed=0, zero_id=None):
        model = tiny_model(vocab_size=rows, tie_word_embeddings=tied)
        before = [model.embed_tokens.weight.clone(), model.head.weight.clone()]
        X.resize(model, old, old.vocab_size + 3, parts, X.NewRows(init, seed), zero_id)
        after = [model.embed_tokens.weight, model.head.weight]
        assert (after[0] is after[1]) == tied
        assert model.config.vocab_size == len(after[0]) == max(rows, old.vocab_size + 3)
        for a, b in zip(before, after):
            assert torch.equal(a[:old.vocab_size], b[:old.vocab_size])
        return [(a[known], b.detach()[old.vocab_size:]) for a, b in zip(before, after)]

    for rows in (old.vocab_size, old.vocab_size + 10):              # the second: a base with rows to spare
        for a, b in grow("subtoken", rows):
            assert torch.allclose(b[0], (a[5] + a[7] + a[7]) / 3)
            assert torch.equal(b[1], a[9])
    for a, b in grow("subtoken_norm", zero_id=old.vocab_size + 2):
        assert torch.allclose(b[:2].norm(dim=1), a.norm(dim=1).median())
        assert torch.cosine_similarity(b[0], a[5] + 2 * a[7], dim=0) > 0.9999
        assert not b[2].any()
    for rows in (old.vocab_size, old.vocab_size + 40):              # rows of no token say nothing about tokens
        for a, b in grow("mean", rows):
            assert torch.allclose(b[:3], a.mean(0).expand(3, -1), atol=1e-6)
    for a, b in grow("covariance"):
        assert torch.allclose(b, a.mean(0).expand(3, -1), atol=0.01)
        assert not torch.equal(b[0], b[1])
    assert not any(b.any() for _, b in grow("zero"))
    for (_, b), (_, again), (_, other) in zip(grow("random"), grow("random"), grow("random", seed=1)):
        assert torch.equal(b, again)
        assert not torch.equal(b, other)
        assert 0.01 < b.std() < 0.03
    with pytest.raises(ValueError, match="the model has 97 rows, but its tokenizer 300 ids"):
        X.resize(tiny_model(), old, 303, parts, X.NewRows())


def test_covariance_rows_have_the_covariance(tiny_model, small_bases):
    old = T.load(small_bases["small bytes"])
    model = tiny_model(vocab_size=old.vocab_size)
    rows = model.embed_tokens.weight.detach().clone()
    n = 4000
    parts = {i: [1] for i in range(old.vocab_size, old.vocab_size + n)}
    X.resize(model, old, old.vocab_size + n, parts, X.NewRows("covariance"))
    drawn = model.embed_tokens.weight.detach()[old.vocab_size:].double()
    expected = torch.cov(rows.double().T, correction=0) * 1e-5
    assert (torch.cov(drawn.T) - expected).norm() < 0.2 * expected.norm()          # sqrt(32 / 4000) = 0.09


# ---- whether an extension is worth it

def test_report_counts_by_hand(small_bases, tmp_path):
    base = BaseTokenizer(small_bases["small bytes"])
    X.extend(small_bases["small bytes"], [LATIN] * 20, 30, tmp_path / "new")
    new, texts = T.load(tmp_path / "new"), [LATIN, "Ж 漢"]
    row = X.measure_lengths(base, new, texts)
    before, after = [[len(t.encode(x)) for x in texts] for t in (base.tokenizer, new)]
    size = sum(len(x.encode()) for x in texts)
    assert (row["tokens_before"], row["tokens_after"]) == (sum(before), sum(after))
    assert row["tokens_per_byte_after"] == sum(after) / size
    assert row["tokens_per_word_before"] == sum(before) / sum(len(x.split()) for x in texts)
    assert row["documents_touched"] == 0.5
    pattern = tokenizers.pre_tokenizers.Split(tokenizers.Regex(T.LLAMA3_SPLIT), "isolated")
    words = sum(len(pattern.pre_tokenize_str(x)) for x in texts)
    assert row["largest_possible_change"] == pytest.approx(words / sum(before) - 1)
    first = base.tokenizer.vocab_size
    counts = collections.Counter(i for x in texts for i in new.encode(x) if i >= first)
    assert row["new_tokens_used"] == len(counts) / 30
    assert row["spelt_in_bytes"] == 0
    pieces = BaseTokenizer(small_bases["small pieces"])
    ids = [pieces.tokenizer.encode(x) for x in texts]
    named = sum(bool(re.fullmatch("<0x..>", pieces.tokenizer.tokens[i])) for i in itertools.chain(*ids))
    assert 0 < X.measure_lengths(pieces, pieces.tokenizer, texts)["spelt_in_bytes"] == named / sum(map(len, ids))
    result = X.report(base, new, {"domain": texts}, 10**9)
    median = np.median([counts[i] for i in range(first, new.vocab_size)])
    assert result["break_even_tokens"] == (round(X.TIMES_SEEN * sum(before) / median) if median else None)


@pytest.mark.parametrize(("change", "bound", "count", "have", "in_bytes", "advice", "why"), [
    (-0.20, -0.5, 10, 10_000, 0, "extend", "20.0% shorter (attention's cost 36% lower), and 10,000 tokens are enough"),
    (-0.20, -0.5, 10, 9_999, 0, "keep", "half of the new rows would be seen less than 100 times in 9,999 tokens, and "
     "that takes 10,000; 1 are seen more often: ask for about so many with --new-tokens"),
    (-0.20, -0.5, 0, 10**9, 0, "keep", "less than 100 times in 1,000,000,000 tokens; 1 are seen more often"),
    (-0.20, -0.5, 0, 1000, 0.89, "keep", "but half of the new rows would be seen less than 100 times in 1,000 tokens"),
    (-0.20, -0.5, 0, 1000, 0.9, "extend", "hardly trained the single bytes that 90% of its tokens are; but half"),
    (-0.10, -0.5, 10, 10**9, 1, "keep", "10.0% shorter, and below 15% a new vocabulary is not worth its cost"),
    (-0.03, -0.05, 10, 10**9, 1, "keep", "no extension could reach it: with every word one token it would be 5.0%")])
def test_advice(small_bases, monkeypatch, change, bound, count, have, in_bytes, advice, why):
    base = BaseTokenizer(small_bases["small bytes"])
    row = {"change": change, "largest_possible_change": bound, "tokens_before": 1000, "spelt_in_bytes": in_bytes,
           "counts": np.array([count, count, 50])}
    monkeypatch.setattr(X, "measure_lengths", lambda *_: row)
    result = X.report(base, base.tokenizer, {"domain": []}, have)
    assert result["recommendation"] == advice
    assert why in result["reason"]
