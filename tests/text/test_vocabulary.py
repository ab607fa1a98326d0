"""Truth: the ids of the packages themselves, each loaded here by its own call: `tokenizers`, `sentencepiece`,
`tiktoken` with Llama 3's published pattern, `ByteLevelBPETokenizer` for GPT-2's files.
Laws: encode_batch equals encode; byte-level tokenizers give back any text; a fingerprint follows behaviour;
what is streamed is the decoded text up to a stop string, however its bytes are cut into tokens.
"""

import base64
import hashlib
import itertools
import json
import random
import re
import types
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import MIXED, ByteTokenizer
from tokenizers import ByteLevelBPETokenizer, models, pre_tokenizers, processors

from text import vocabulary as T
from text.train_vocabulary import train

quick = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])

# llama-models, models/llama3/tokenizer.py
PUBLISHED = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
             r"|\s+(?!\S)|\s+")
HOSTILE = ["", " ", "     ", "\t", "\t\t\tx", "a\r\nb\r\n\r\n", "\n\n\n", "\x00", "a\x00b", "\xa0a\xa0",
           "\u3000 \u2003x", "\U0001f469\u200d\U0001f4bb\U0001f1e9\U0001f1ea\u200d", "e\u0301\u0327\u0301n\u0303",
           "\ufeffBOM", "\ufffd\ufffe", "Ελληνικά русский", "עברית العربية", "हिन्दी ไทย", "漢字 한국어",
           "<s></s><unk>", "<|endoftext|> <|end_of_text|>", "<|begin_of_text|>a<|reserved_special_token_0|>",
           "[INST]<pad>", "<0x41>\u2581a", "I'Ll DON'T it'\u017f we'Re", "x=1;\n\tif x:\n\t\ty",
           "\u0661\u0662\u0663 \u2167 12345678 3.14", "a" * 5000, "ab" * 3000, "^" * 5000, " " * 5000,
           " " * 5000 + "x", "\n" * 3000 + " x", "\u1c89 \U00010d40 \ua7dc", "\x85\x1c\x1d x", "\u0301\u0301",
           "🙂" * 500, "   leading and trailing   "]
SURROGATES = {"a\ud800b": "a\ufffdb", "\udc80": "\ufffd", "\ud800\ud800x": "\ufffd\ufffdx",
              "\ud83d\ude42 \ude42": "\U0001f642 \ufffd"}


def byte_letters():
    """GPT-2's bytes_to_unicode, from the library."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write(folder: Path, **files) -> Path:
    """Files by name (`tokenizer_config` -> tokenizer_config.json)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def words(folder: Path, *tokens, prefix=None, **files) -> Path:
    """A tokenizer.json of whole words; `prefix` is put before each text by a TemplateProcessing."""
    lib = tokenizers.Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    lib.pre_tokenizer = pre_tokenizers.Whitespace()
    if prefix:
        template = processors.TemplateProcessing(single=f"{prefix} $A", special_tokens=[(prefix, tokens.index(prefix))])
        lib.post_processor = processors.Sequence([processors.ByteLevel(), template])
    folder.mkdir(parents=True, exist_ok=True)
    lib.save(str(folder / "tokenizer.json"))
    return write(folder, **files)


def spm(folder: Path, **options) -> Path:
    """A small SentencePiece tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "tokenizer.model", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat", "a dog ate the hat", "habeas corpus, res judicata"] * 9),
            model_writer=f, model_type="bpe", vocab_size=310, byte_fallback=True, minloglevel=2, **options)
    return folder


def gpt2(folder: Path, merges, extra=("<|endoftext|>",), shuffle=False, **files) -> Path:
    """vocab.json and merges.txt; the ids follow the merges unless shuffled."""
    tokens = byte_letters() + ["".join(m) for m in merges] + list(extra)
    ids = list(range(len(tokens)))
    if shuffle:
        random.Random(0).shuffle(ids)
    write(folder, vocab=dict(zip(tokens, ids)), **files)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    return folder


MERGES = [("t", "h"), ("Ġ", "th"), ("Ġth", "e"), ("a", "t"), ("Ġ", "a"), ("Ã", "©"), ("^", "^"), ("^^", "^^")]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """One folder of each kind, made here."""
    home = tmp_path_factory.mktemp("small")
    ranks = [bytes([b]) for b in range(256)]
    ranks += [bytes(p) for p in itertools.product(range(256), repeat=2)]
    ranks += [bytes(p) for p in itertools.product(range(32, 122), repeat=3)][:128_000 - len(ranks)]
    (home / "tiktoken").mkdir()
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    (home / "tiktoken" / "tokenizer.model").write_text("".join(lines))
    train(["the cat sat on the mat, " * 20 + "\n\nhabeas corpus 1234 é 漢"], "bpe", 300, home / "tokenizers")
    return {"tokenizers": home / "tokenizers", "sentencepiece": spm(home / "sentencepiece"),
            "tiktoken": home / "tiktoken", "gpt2": gpt2(home / "gpt2", MERGES)}


@pytest.fixture(scope="session")
def real(data_dir):
    """The tokenizers of the world: name -> path."""
    home = data_dir / "tokenizers"
    return {"tokenizers": home / "phi2_bytebpe_hf", "sentencepiece": home / "llama2_spm", "gpt2": home / "gpt2",
            "tiktoken": home / "llama3_tiktoken", "stories": data_dir / "models/stories260K"}


LOADED = {}


def loaded(folder: Path):
    """(ours, the library's own text -> ids), kept between tests."""
    if folder not in LOADED:
        ours = T.load(folder)
        if ours.kind == "tokenizers":
            lib = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            theirs = lambda text: lib.encode(text, add_special_tokens=False).ids                        # noqa: E731
        elif ours.kind == "sentencepiece":
            theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode
        elif ours.kind == "gpt2":
            lib = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
            theirs = lambda text: lib.encode(text).ids                                                  # noqa: E731
        else:
            lines = (folder / "tokenizer.model").read_bytes().splitlines()
            ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in lines)}
            theirs = tiktoken.Encoding("llama3", pat_str=PUBLISHED, mergeable_ranks=ranks,
                                       special_tokens={"<|begin_of_text|>": 128_000}).encode_ordinary
        LOADED[folder] = ours, theirs
    return LOADED[folder]


KINDS = ["tokenizers", "sentencepiece", "tiktoken", "gpt2"]
PLACES = [*(("small", kind) for kind in KINDS), *(("real", kind) for kind in KINDS), ("real", "stories")]
BYTE_LEVEL = [(place, kind) for place, kind in PLACES if kind in ("tokenizers", "tiktoken", "gpt2")]


@pytest.fixture
def pair(request, place, kind):
    return loaded(request.getfixturevalue(place)[kind])


@pytest.mark.parametrize(("place", "kind"), PLACES)
class TestIdsOfTheLibrary:
    def test_hostile_text(self, pair):
        ours, theirs = pair
        for text in HOSTILE:
            assert ours.encode(text) == theirs(text), ascii(text[:40])

    def test_lone_surrogates_become_one_replacement_each(self, pair):
        ours, theirs = pair
        for text, replaced in SURROGATES.items():
            assert ours.encode(text) == theirs(replaced)
            assert ours.encode_batch([text])[0].tolist() == theirs(replaced)

    def test_batch_equals_encode(self, pair):
        ours, _ = pair
        texts = [*HOSTILE, *SURROGATES, *(f"line {i} " * (i % 7) for i in range(300))]
        arrays = ours.encode_batch(texts)
        assert {a.dtype for a in arrays} == {np.dtype(np.uint32)}
        assert [a.tolist() for a in arrays] == [ours.encode(text) for text in texts]
        assert ours.encode_batch([]) == []

    def test_bos_and_eos_only_where_asked(self, pair):
        ours, _ = pair
        ids = ours.encode("the cat")
        assert ours.encode("the cat", eos=True) == [*ids, ours.eos_id]
        if ours.bos_id is None:
            with pytest.raises(ValueError, match="has no BOS token; name one as bos_token in"):
                ours.encode("the cat", bos=True)
        else:
            assert ours.encode("the cat", bos=True, eos=True) == [ours.bos_id, *ids, ours.eos_id]

    def test_tokens_and_ids(self, pair):
        ours, _ = pair
        for i in (0, 5, ours.vocab_size - 1, *ours.encode("the cat é 漢")):
            assert ours.vocab[ours.tokens[i]] == i
        assert "no such token" not in ours.vocab
        for i in (-1, ours.vocab_size):
            with pytest.raises(ValueError, match=f"id {i} is not in the tokenizer"):
                ours.decode([i])

    def test_control_tokens_are_special(self, pair):
        ours, _ = pair
        roles = {ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id, ours.mask_id} - {None}
        assert roles <= set(ours.special_ids)
        assert ours.special_ids == sorted(set(ours.special_ids))
        assert not set(ours.special_ids) & set(ours.encode("the cat sat, é 漢 123"))


@pytest.mark.parametrize("kind", [*KINDS, "stories"])
def test_real_text(data_dir, real, kind):
    ours, theirs = loaded(real[kind])
    texts = []
    for name in ("wikitext2/wiki.valid.raw", "legal_en_dc/dc_code_title16.txt", "tinyshakespeare/input.txt",
                 "tinystories/tinystories_sample_2MiB.txt"):
        with open(data_dir / "corpora" / name, encoding="utf-8", newline="") as f:
            text = f.read(60_000)
        texts += [text, *text.splitlines(keepends=True)[:200]]
    expected = [theirs(text) for text in texts]
    assert [a.tolist() for a in ours.encode_batch(texts)] == expected
    assert ours.encode(texts[0]) == expected[0]
    if kind not in ("sentencepiece", "stories"):
        assert ours.decode(expected[0]) == texts[0]


def test_what_the_real_ones_are(real):
    facts = {kind: loaded(real[kind])[0] for kind in real}
    assert {k: (t.kind, t.vocab_size, t.bos_id, t.eos_id, t.add_bos) for k, t in facts.items()} == {
        "tokenizers": ("tokenizers", 50295, 50256, 50256, False), "sentencepiece": ("sentencepiece", 32000, 1, 2, True),
        "gpt2": ("gpt2", 50257, None, 50256, False), "tiktoken": ("tiktoken", 128256, 128000, 128001, True),
        "stories": ("sentencepiece", 512, 1, 2, True)}
    assert facts["gpt2"].library == f"tiktoken {tiktoken.__version__}"         # its ids follow the merges
    assert facts["tokenizers"].library == f"tokenizers {tokenizers.__version__}"
    assert facts["tiktoken"].special_ids == list(range(128000, 128256))
    assert facts["tiktoken"].tokens[128009] == "<|eot_id|>"
    assert facts["tiktoken"].tokens[128255] == "<|reserved_special_token_245|>"
    assert facts["tiktoken"].tokens[facts["tiktoken"].encode(" the")[0]] == "Ġthe"
    assert facts["tokenizers"].special_ids == [50256]                          # its runs of spaces are ordinary tokens


@pytest.mark.parametrize(("place", "kind"), BYTE_LEVEL)
def test_byte_level_gives_back_any_text(pair):
    ours, _ = pair

    @quick
    @given(st.text(st.characters(exclude_categories=())))
    def check(text):
        assert ours.decode(ours.encode(text)) == T.replace_surrogates(text)
    check()
    assert ours.decode(np.array(ours.encode("漢")[:1])) in ("\ufffd", "漢")      # half a character is no error


@pytest.mark.parametrize(("place", "kind"), [("small", "tiktoken"), ("small", "gpt2")])
class TestMillionsOfOneCharacter:
    """tiktoken's regex overflows its stack on a million spaces before a letter: there the pattern is the truth."""

    def test_no_panic(self, pair):
        ours, _ = pair
        spaces = ours.backend._encode_single_piece(" " * 999_999)
        assert ours.encode("y" + " " * 1_000_000 + "x") == ours.encode("y") + spaces + ours.encode(" x")
        assert len(ours.encode("^" * 1_000_000)) < 1_000_000

    def test_cut_where_the_pattern_cuts(self, pair, monkeypatch):
        ours, _ = pair
        shorter = re.compile(T.LONG_SPACES.pattern.replace("500000", "3"))
        monkeypatch.setattr(T, "LONG_SPACES", shorter)
        cut = 0

        @quick
        @given(st.text(" \t\n\r\xa0\u2028\x1ca1!'s", max_size=30))
        def check(text):
            nonlocal cut
            parts = ours.cut_long_spaces(text)
            cut += len(parts) > 1
            assert list(itertools.chain.from_iterable(map(ours.encode, parts))) == ours.encode(text)
        check()
        assert cut > 10


class TestGPT2Files:
    def ids(self, folder, text="the cat at the theatre, é ^^^^^ aat"):
        lib = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
        return lib.encode(text).ids, T.load(folder)

    def test_ids_in_the_order_of_the_merges_are_tiktokens(self, tmp_path):
        expected, ours = self.ids(gpt2(tmp_path, MERGES))
        assert ours.library.startswith("tiktoken")
        assert ours.encode("the cat at the theatre, é ^^^^^ aat") == expected

    @pytest.mark.parametrize(("merges", "shuffle"), [
        (MERGES, True),
        # "abc" is made of ab+c, but bc comes first: no merge ever makes it, while tiktoken would join a+bc
        ([("b", "c"), ("a", "b"), ("ab", "c")], False)])
    def test_other_ids_are_the_tokenizers_librarys(self, tmp_path, merges, shuffle):
        text = "the cat at abc ab bcabc"
        expected, ours = self.ids(gpt2(tmp_path, merges, shuffle=shuffle), text)
        assert ours.library.startswith("tokenizers")
        assert ours.encode(text) == expected == ours.encode_batch([text])[0].tolist()
        assert ours.special_ids == [ours.eos_id] == [ours.vocab["<|endoftext|>"]]
        assert ours.decode(expected) == text

    def test_without_any_special_token(self, tmp_path):
        expected, ours = self.ids(gpt2(tmp_path, MERGES, extra=()))
        assert ours.encode("the cat at the theatre, é ^^^^^ aat") == expected
        assert (ours.eos_id, ours.special_ids, ours.vocab_size) == (None, [], 256 + len(MERGES))

    def test_path_may_be_one_of_the_two(self, tmp_path):
        folder = gpt2(tmp_path, MERGES)
        assert T.load(folder / "merges.txt").fingerprint == T.load(folder / "vocab.json").fingerprint

    def test_another_split_is_refused(self, tmp_path):
        folder = gpt2(tmp_path, MERGES, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"})
        with pytest.raises(ValueError, match=r"belong to a Qwen2Tokenizer.*add its tokenizer.json"):
            T.load(folder)


VOCAB = ("<unk>", "<s>", "</s>", "<pad>", "[MASK]", "a", "b")


@pytest.mark.parametrize(("files", "expected"), [        # bos, eos, pad, unk, mask, add_bos
    ({}, (None, None, None, 0, None, False)),
    ({"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>", "x": 0}, "add_bos_token": True}},
     (1, 2, None, 0, None, True)),
    ({"tokenizer_config": {"bos_token": "<s>", "tokenizer_class": "LlamaTokenizerFast"}},
     (1, None, None, 0, None, True)),
    ({"tokenizer_config": {"bos_token": "<s>", "tokenizer_class": "LlamaTokenizer", "add_bos_token": False}},
     (1, None, None, 0, None, False)),
    ({"tokenizer_config": {"bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}},
     (1, None, None, 0, None, False)),
    ({"special_tokens_map": {"bos_token": "<s>", "mask_token": {"content": "[MASK]"}, "pad_token": "<pad>"}},
     (1, None, 3, 0, 4, False)),
    ({"tokenizer_config": {"eos_token": "b"}, "special_tokens_map": {"eos_token": "</s>", "bos_token": "<s>"}},
     (1, 6, None, 0, None, False)),
    ({"config": {"bos_token_id": 1, "eos_token_id": [6, 2], "pad_token_id": -1}}, (1, 6, None, 0, None, False)),
    ({"config": {"bos_token_id": None}, "generation_config": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}},
     (1, 2, 0, 0, None, False)),
    ({"special_tokens_map": {"eos_token": "</s>"}, "config": {"eos_token_id": 5}}, (None, 2, None, 0, None, False)),
    ({"tokenizer_config": {"bos_token": None, "add_bos_token": True}, "config": {"bos_token_id": 1}},
     (None, None, None, 0, None, False)),
    ({"tokenizer_config": {"unk_token": "<oov>", "pad_token": "[PAD]"}}, (None, None, None, 0, None, False)),
])
def test_who_is_bos_and_eos(tmp_path, files, expected):
    t = T.load(words(tmp_path, *VOCAB, **files))
    assert (t.bos_id, t.eos_id, t.pad_id, t.unk_id, t.mask_id, t.add_bos) == expected


def test_template_that_begins_with_bos_means_add_bos(tmp_path):
    config = {"bos_token": "<s>"}
    assert T.load(words(tmp_path / "yes", *VOCAB, prefix="<s>", tokenizer_config=config)).add_bos
    assert not T.load(words(tmp_path / "other", *VOCAB, prefix="<pad>", tokenizer_config=config)).add_bos
    says_no = {**config, "add_bos_token": False}
    assert not T.load(words(tmp_path / "no", *VOCAB, prefix="<s>", tokenizer_config=says_no)).add_bos
    ours = T.load(tmp_path / "yes" / "tokenizer.json")          # a file asks its own folder
    assert (ours.bos_id, ours.add_bos) == (1, True)
    assert ours.encode("a b") == [5, 6]


def test_sentencepiece_roles_and_order_of_files(tmp_path):
    t = T.load(spm(tmp_path / "llama"))
    assert (t.bos_id, t.eos_id, t.pad_id, t.unk_id, t.add_bos, t.special_ids) == (1, 2, None, 0, True, [0, 1, 2])
    t = T.load(spm(tmp_path / "t5", bos_id=-1, pad_id=3))
    assert (t.bos_id, t.pad_id, t.add_bos) == (None, 3, False)
    t = T.load(spm(tmp_path / "more", control_symbols=["<sep>"], user_defined_symbols=["res_judicata"]))
    assert t.special_ids == [0, 1, 2, t.vocab["<sep>"]]                     # a user's symbol is found in text
    write(tmp_path / "llama", tokenizer_config={"add_bos_token": False})
    assert not T.load(tmp_path / "llama").add_bos
    assert T.load(words(tmp_path / "llama", *VOCAB)).kind == "tokenizers"       # tokenizer.json comes first


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    folder = words(tmp_path, *VOCAB)
    lib = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    lib.enable_truncation(2)
    lib.enable_padding(length=4)
    lib.save(str(folder / "tokenizer.json"))
    t = T.load(folder)
    assert t.encode("a b a b a b") == [5, 6, 5, 6, 5, 6]
    assert [a.tolist() for a in t.encode_batch(["a", "a b a"])] == [[5], [5, 6, 5]]


def test_added_tokens_of_sentencepiece(tmp_path):
    plain = T.load(spm(tmp_path))
    n, text = plain.vocab_size, "the <pad> cat"
    write(tmp_path, added_tokens={"<pad>": n, "<s>": 1}, tokenizer_config={"pad_token": "<pad>"})
    t = T.load(tmp_path)
    assert (t.pad_id, t.vocab_size, t.special_ids, t.tokens[n]) == (n, n + 1, [0, 1, 2, n], "<pad>")
    assert t.encode(text) == plain.encode(text)                                 # never found in text
    assert t.decode([*t.encode("the cat"), n, t.eos_id]) == "the cat"
    write(tmp_path, added_tokens={"<pad>": n, "res_judicata": n + 1})
    with pytest.raises(ValueError, match=r"adds the ordinary token 'res_judicata'.*save one with transformers"):
        T.load(tmp_path)
    write(tmp_path, added_tokens={"<pad>": 7})
    with pytest.raises(ValueError, match=r"'<pad>' of .* has id 7, but the vocabulary"):
        T.load(tmp_path)
    write(tmp_path, added_tokens={}, tokenizer_config={
        "added_tokens_decoder": {str(n): {"content": "[EXTRA]", "special": True}}})
    assert T.load(tmp_path).special_ids == [0, 1, 2, n]


def test_extended_llama3_ranks_stand_after_the_special_tokens(small, tmp_path):
    old = loaded(small["tiktoken"])[0]
    data = (small["tiktoken"] / "tokenizer.model").read_text()
    (tmp_path / "tokenizer.model").write_text(data + base64.b64encode(b" habeas").decode() + " 128256\n")
    new = T.load(tmp_path)
    assert (new.vocab_size, new.special_ids, new.eos_id) == (128257, old.special_ids, 128001)
    assert new.encode("the habeas cat") == old.encode("the") + [128256] + old.encode(" cat")
    assert new.fingerprint != old.fingerprint
    (tmp_path / "tokenizer.model").write_text(data + base64.b64encode(b" habeas").decode() + " 128005\n")
    with pytest.raises(ValueError, match="and then 256 free"):                  # a special token's id
        T.load(tmp_path)


class TestFingerprint:
    def test_follows_behaviour(self, tmp_path):
        folder = words(tmp_path / "a", *VOCAB)
        one = T.load(folder).fingerprint
        assert re.fullmatch("[0-9a-f]{64}", one)
        lib = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        (tmp_path / "b.json").write_text(lib.to_str(pretty=False))              # other bytes, same tokenizer
        assert (tmp_path / "b.json").read_bytes() != (folder / "tokenizer.json").read_bytes()
        assert T.load(tmp_path / "b.json").fingerprint == one
        lib.pre_tokenizer = pre_tokenizers.WhitespaceSplit()                    # same vocabulary, other ids ("don't")
        lib.save(str(tmp_path / "b.json"))
        assert T.load(tmp_path / "b.json").fingerprint != one
        lib = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        lib.add_tokens(["certiorari"])
        lib.save(str(tmp_path / "b.json"))
        assert T.load(tmp_path / "b.json").fingerprint != one

    def test_is_pinned(self, tmp_path):
        """Every shard carries it: a change of PROBES or of the hash makes all packed shards foreign to their model."""
        lib = tokenizers.Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCAB)}, unk_token="<unk>"))
        lib.pre_tokenizer = pre_tokenizers.WhitespaceSplit()                    # white space is the same in any Unicode
        lib.save(str(tmp_path / "tokenizer.json"))
        assert hashlib.sha256(json.dumps(T.PROBES).encode()).hexdigest()[:16] == "ad205f67e2b1909d"
        assert T.load(tmp_path).fingerprint[:16] == "03bd45cf05528b1e"

    def test_is_the_same_in_another_format(self, real, tmp_path):
        ours, _ = loaded(real["gpt2"])
        lib = ByteLevelBPETokenizer(str(real["gpt2"] / "vocab.json"), str(real["gpt2"] / "merges.txt"))
        lib.save(str(tmp_path / "t.json"))
        assert T.load(tmp_path / "t.json").fingerprint == ours.fingerprint


@pytest.mark.parametrize(("make", "message"), [
    (lambda d: d / "nowhere", "tokenizer .*nowhere does not exist; name a model folder or a tokenizer file"),
    (lambda d: write(d, config={}), "no tokenizer in .*copy them from the base model's page"),
    (lambda d: write(d, vocab={"a": 0}), "has no merges.txt"),
    (lambda d: write(d, tokenizer={"model": 1}), "tokenizer.json cannot be read as tokenizer.json .*download it again"),
    (lambda d: model_file(d, b"\x00\x01\x02"), "cannot be read as SentencePiece model or tiktoken ranks"),
    (lambda d: model_file(d, b""), "cannot be read as SentencePiece model or tiktoken ranks"),
    (lambda d: model_file(d, b"version https://git-lfs.github.com/spec/v1\noid"), "run `git lfs pull`"),
    (lambda d: model_file(d, b"IQ== 0\nIg== one\n"), "line 2 is not 'base64 rank'"),
    (lambda d: model_file(d, b"IQ== 0\nIg== 1\n"), "has 2 ranks from 0 on where Llama 3 has 128000"),
    (lambda d: words(d, *VOCAB, tokenizer_config={"eos_token": "<eot>"}),
     "tokenizer_config.json names '<eot>' as eos_token, but the vocabulary"),
    (lambda d: words(d, *VOCAB, config={"bos_token_id": 128000}), "says bos_token_id 128000, but .* at id 6"),
    (lambda d: words(d, *VOCAB, tokenizer_config=[1]), "tokenizer_config.json holds a list"),
    (lambda d: broken(words(d, *VOCAB) / "config.json"), "config.json is not valid JSON"),
    (lambda d: gpt2(d, [*MERGES, ("Q", "Q")], extra=()) and write(d, vocab={"Q": 0}), "it lacks the merge 't h'"),
])
def test_errors_say_what_and_what_to_do(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        T.load(make(tmp_path))


def model_file(folder, data):
    (folder / "tokenizer.model").write_bytes(data)
    return folder


def broken(path):
    path.write_text("{")
    return path.parent


def test_token_before_document():
    assert T.token_before_document(types.SimpleNamespace(bos_id=0, eos_id=2)) == 0
    assert T.token_before_document(types.SimpleNamespace(bos_id=None, eos_id=2)) == 2
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        T.token_before_document(types.SimpleNamespace(bos_id=None, eos_id=None))


def test_the_share_of_bytes_in_no_token(data_dir):
    from text.vocabulary import load, measure_loss
    stories = load(data_dir / "models/stories260K")
    assert measure_loss(stories, ["one word", "see here"]) == 0
    assert measure_loss(stories, ["a    b"]) == 3 / 6                  # of four blanks one is kept
    assert measure_loss(load(data_dir / "tokenizers/gpt2"), ["a    b", "Käufer \u4e2d\n\n"]) == 0


# ---- text of tokens that arrive one by one

def streamed(tok, prompt_ids, new_ids, stop=()):
    """(pieces written, text) of a TextStream that is fed until it says stop."""
    pieces = []
    stream = T.TextStream(tok, prompt_ids, stop, pieces.append)
    any(stream.push(token) for token in new_ids)
    assert stream.finish() == stream.text == "".join(pieces)
    return pieces, stream.text


def test_characters_are_written_whole():
    ids = ByteTokenizer().encode(MIXED)
    for split in range(10):
        pieces, text = streamed(ByteTokenizer(), ByteTokenizer().decode(ids[:split]).encode(errors="ignore"), ids)
        assert text.endswith(MIXED)
        assert "\ufffd" not in "".join(pieces[1:])
    pieces, _ = streamed(ByteTokenizer(), [], ids)
    assert len([piece for piece in pieces if piece]) == len(MIXED)       # each as soon as its last byte is there


def test_invalid_bytes_are_written_once_it_is_clear_that_they_are():
    source = random.Random(0)
    for _ in range(300):
        ids = [source.choice([0x41, 0x20, 0xc3, 0xa9, 0xe4, 0xb8, 0xad, 0xf0, 0x9f, 0x98, 0xff]) for _ in range(12)]
        cut = source.randrange(12)
        if ByteTokenizer().decode(ids[:cut]).endswith("\ufffd"):
            continue                                # a prompt is whole text
        assert streamed(ByteTokenizer(), ids[:cut], ids[cut:])[1] == ByteTokenizer().decode(ids)
    pieces, text = streamed(ByteTokenizer(), [], [0x41, 0xe4, 0xb8])
    assert (pieces, text) == (["", "A", "", "", "\ufffd"], "A\ufffd")


def test_byte_fallback_that_takes_back_a_whole_run_does_not_stop_the_stream(tmp_path):
    """`tokenizers` turns every byte of a run into U+FFFD while any part of the run is no character."""
    vocab = {"<unk>": 0, **{f"<0x{b:02X}>": 1 + b for b in range(256)}, "▁a": 257}
    lib = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    lib.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Replace("▁", " "),
                                                tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    lib.save(str(tmp_path / "tokenizer.json"))
    tok = T.load(tmp_path)
    run = [1 + b for b in "中文🙂".encode()]
    pieces, text = streamed(tok, [257], run)
    assert text == " a中文🙂"
    assert [piece for piece in pieces if piece] == [" a", "中", "文", "🙂"]
    pieces, text = streamed(tok, [257], [*run, 1 + 0xe4, 257])
    assert text.startswith(" a中文🙂")
    assert text.endswith(" a")


def cut_at(text: str, prompt: int, stop) -> str:
    """The rule in words: read on until some stop string is complete; the text ends before it."""
    for end in range(prompt, len(text) + 1):
        for s in sorted(stop, key=len, reverse=True):
            if end - len(s) >= prompt and text[:end].endswith(s):
                return text[:end - len(s)]
    return text


def test_stop_strings_across_tokens():
    class Wide(ByteTokenizer):                              # ids from 1000 on are strings of several bytes
        vocab_size = 10_000

        def decode(self, ids):
            return b"".join(words[i - 1000] for i in ids).decode(errors="replace")

    source, words = random.Random(1), []
    for _ in range(500):
        text = "".join(source.choices("ab🙂", k=14)).encode()
        stop = ["".join(source.choices("ab🙂", k=source.randint(1, 5))) for _ in range(source.randint(1, 3))]
        prompt = "ab" * source.randint(0, 2)
        cuts = sorted(source.sample(range(1, len(text)), 4))
        words[:] = [prompt.encode(), *(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)]))]
        _, out = streamed(Wide(), [1000], range(1001, 1000 + len(words)), stop)
        assert out == cut_at(prompt + text.decode(), len(prompt), stop)
        assert "\ufffd" not in out
    with pytest.raises(ValueError, match="stop string is empty"):
        T.TextStream(ByteTokenizer(), [], [""])
