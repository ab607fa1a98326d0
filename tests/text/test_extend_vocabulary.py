"""Truth: a naive continued BPE that counts everything anew for each merge; the libraries' own ids, each loaded here by
its own call (`tokenizers`, `sentencepiece`, `tiktoken`), `transformers` for what a new base folder is; protobuf's own
reader. Laws: old ids and old rows keep their values; boundaries after are a subset of boundaries before.
"""

import base64
import collections
import gzip
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
import torch
from tokenizers import models

import hf
import tokenizer
from text import compare_vocabularies as C
from text import extend_vocabulary as X
from text import vocabulary as T
from text import vocabulary_files
from text.corpus import read_documents
from text.new_rows import NewRows, resize
from text.train_vocabulary import train
from text.vocabulary_files import BaseTokenizer

ROOT = Path(__file__).parents[2]
BASES = {"gpt2": "tokenizers/gpt2", "phi2": "tokenizers/phi2_bytebpe_hf", "llama3": "tokenizers/llama3_tiktoken",
         "llama2": "tokenizers/llama2_spm", "stories": "models/stories260K"}
SMALL = ("small bytes", "small pieces")                 # trained here, for a checkout without NANOCPT_DATA
NEW = 200
LATIN = ("The tenant shall not be liable for rent during the tenancy. An estate, the executor of the estate and the "
         "trustee's beneficiary; (a)(1) the decedent's heirs-at-law, per stirpes. § 16–4711 ¶ 2. ")


def fuzz(n: int, seed: int = 0) -> list[str]:
    """Strings of many scripts, code, white space, combining marks, emoji, half surrogates, U+2581, NUL, long runs."""
    rng = random.Random(seed)
    atoms = ["liable", " liable", "beneficiary", "decedent", " of", " the", "Estate", "\n", "\r\n", "\t", " ", "  ",
             "    ", "\xa0", "\u3000", "\u200d", "\x00", "\x85", "é", "e\u0301", "ß", "Ж", "שָ", "漢字", "한국", "हिन्दी",
             "🙂", "\U0001f469\u200d\U0001f4bb", "\ud800", "\u2581", "12345", "§ 16–4711", "x = 1;", "def f():",
             "DON'T", "it's", "----", "a" * 9, "(a)(1)", "http://x.y/z?q=1", "<0x41>", "\ufffd", "ǅ", "ﬁ", "ไทย", "^^^"]
    texts = ["".join(rng.choice(atoms) for _ in range(rng.randrange(1, 30))) for _ in range(n)]
    texts += ["x" + character * n + "y" for character in " a-=\n\t^_" for n in (3, 7, 17, 22, 41, 90)]   # equal ranks
    return texts + ["".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(1, 0x3000)))) for _ in range(40))
                    for _ in range(n)]


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
def small(tmp_path_factory):
    """Folders of two small bases, a byte-level tokenizer.json and a SentencePiece BPE."""
    folder = tmp_path_factory.mktemp("small")
    train([LATIN[:90] * 3], "bpe", 300, folder / "bytes")
    (folder / "pieces").mkdir()
    with open(folder / "pieces/tokenizer.model", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([LATIN[:90]] * 3), model_writer=f, model_type="bpe", vocab_size=310,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
            minloglevel=2)
    return {"small bytes": folder / "bytes", "small pieces": folder / "pieces"}


@pytest.fixture(scope="module")
def legal(data_dir):
    """Documents to learn from, and others: about 450 kB and 100 kB of the DC Code."""
    documents = list(read_documents([str(data_dir / "corpora/legal_en_dc/dc_code_title28.txt")]))
    return [d for n, d in enumerate(documents) if n % 10 < 4], documents[9::10]


@pytest.fixture(scope="module")
def extended(request, tmp_path_factory, small):
    """extended(kind) -> (Base, folder of the extension, its Tokenizer, ids each new id stands for, held-out texts)."""
    made = {}

    def make(kind):
        if kind not in made:
            if kind in SMALL:
                path, train, held = small[kind], [LATIN] * 20, [LATIN]
            else:
                path = request.getfixturevalue("data_dir") / BASES[kind]
                train, held = request.getfixturevalue("legal")
            out = tmp_path_factory.mktemp("extended") / kind.replace(" ", "_")
            parts = X.extend(path, train, 40 if kind in SMALL else NEW, out, min_count=3)
            made[kind] = BaseTokenizer(path), out, T.load(out), parts, held
        return made[kind]
    return make


@pytest.fixture
def command(monkeypatch, capsys):
    """command("add --out ...") -> (exit status, stdout, stderr) of `python tokenizer.py ...`, in this process."""
    def call(line: str):
        monkeypatch.setattr(sys, "argv", ["tokenizer.py", *line.split()])
        try:
            status = tokenizer.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return call


def boundaries(tok, ids) -> list[int]:
    """Ends of the tokens, in units that no extension changes: letters of the piece, one for a byte piece."""
    special = set(tok.special_ids)
    lengths = [1 if i in special or tok.tokens[i].startswith("<0x") else len(tok.tokens[i]) for i in ids]
    return np.cumsum(lengths).tolist()


@pytest.mark.parametrize("kind", [*SMALL, *BASES])
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
            if base.kind == "sentencepiece":            # its normaliser adds and drops spaces
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
            rank = {T.spell_bytes(base64.b64decode(line.split()[0])): int(line.split()[1])
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
            assert "".join(base.tokenizer.tokens[i] for i in parts[first + n]) == token

    def test_all_forms_agree(self, extended, kind):
        base, out, _, _, held = extended(kind)
        texts = [T.replace_surrogates(t) for t in [*T.PROBES, *fuzz(250, seed=2), *held]]
        texts = [t for t in texts if not any(base.tokenizer.tokens[i] in t for i in base.tokenizer.special_ids)]
        lib = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
        expected = [lib.encode(text, add_special_tokens=False).ids for text in texts]
        files = {file.name for file in out.iterdir()} - {"tokenizer_config.json", "generation_config.json"}
        assert files == {"gpt2": {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer.tiktoken"},
                         "phi2": {"tokenizer.json"}, "small bytes": {"tokenizer.json", "tokenizer.tiktoken"}
                         }.get(kind, {"tokenizer.json", "tokenizer.model"})
        if base.kind == "sentencepiece":
            theirs = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
            assert [theirs.encode(text) for text in texts] == expected
        elif kind != "phi2":
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


def test_sentencepiece_file_goes_on_where_it_was(extended, data_dir):
    """Old bytes in front; scores fall strictly below all old ones, even Llama 2's -1e9 where float32 steps by 64."""
    pb = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="needs protobuf")
    base, out, *_ = extended("llama2")
    old, new = base.file.read_bytes(), (out / "tokenizer.model").read_bytes()
    assert new.startswith(old)
    before, after = pb.ModelProto.FromString(old), pb.ModelProto.FromString(new)
    assert after.normalizer_spec == before.normalizer_spec
    assert after.trainer_spec.vocab_size == len(after.pieces) == len(before.pieces) + NEW
    scores = [p.score for p in after.pieces[len(before.pieces) - 1:]]
    scores[0] = min(p.score for p in before.pieces)
    assert scores == sorted(set(scores), reverse=True)
    assert {p.type for p in after.pieces[len(before.pieces):]} == {pb.ModelProto.SentencePiece.NORMAL}


def test_the_same_text_gives_the_same_files(small, tmp_path):
    for name in ("a", "b"):
        X.extend(small["small bytes"], [LATIN] * 20, 30, tmp_path / name)
    assert all((tmp_path / "a" / f.name).read_bytes() == f.read_bytes() for f in (tmp_path / "b").iterdir())


def test_an_extension_can_be_extended(small, tmp_path):
    for kind, path in small.items():
        X.extend(path, [LATIN] * 20, 10, tmp_path / kind / "1")
        X.extend(tmp_path / kind / "1", [LATIN] * 20, 10, tmp_path / kind / "2")
        X.extend(path, [LATIN] * 20, 20, tmp_path / kind / "at once")
        assert T.load(tmp_path / kind / "2").tokens == T.load(tmp_path / kind / "at once").tokens


# ---- rows

@pytest.mark.parametrize("tied", [True, False])
def test_rows(tiny_model, small, tied):
    old = T.load(small["small bytes"])
    known = [i for i, token in enumerate(old.tokens) if token is not None]
    parts = {old.vocab_size: [5, 7, 7], old.vocab_size + 1: [9], old.vocab_size + 2: [1, 2]}

    def grow(init, rows=old.vocab_size, seed=0, zero_id=None):
        model = tiny_model(vocab_size=rows, tie_word_embeddings=tied)
        before = [model.embed_tokens.weight.clone(), model.head.weight.clone()]
        resize(model, old, old.vocab_size + 3, parts, NewRows(init, seed), zero_id)
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
    for a, b in grow("mean"):
        assert torch.allclose(b, a.mean(0).expand(3, -1), atol=1e-6)
    for a, b in grow("covariance"):
        assert torch.allclose(b, a.mean(0).expand(3, -1), atol=0.01)
        assert not torch.equal(b[0], b[1])
    assert not any(b.any() for _, b in grow("zero"))
    for (_, b), (_, again), (_, other) in zip(grow("random"), grow("random"), grow("random", seed=1)):
        assert torch.equal(b, again)
        assert not torch.equal(b, other)
        assert 0.01 < b.std() < 0.03
    with pytest.raises(ValueError, match="the model has 97 rows, but its tokenizer 300 ids"):
        resize(tiny_model(), old, 303, parts, NewRows())


def test_covariance_rows_have_the_covariance(tiny_model, small):
    old = T.load(small["small bytes"])
    model = tiny_model(vocab_size=old.vocab_size)
    rows = model.embed_tokens.weight.detach().clone()
    n = 4000
    parts = {i: [1] for i in range(old.vocab_size, old.vocab_size + n)}
    resize(model, old, old.vocab_size + n, parts, NewRows("covariance"))
    drawn = model.embed_tokens.weight.detach()[old.vocab_size:].double()
    expected = torch.cov(rows.double().T, correction=0) * 1e-5
    assert (torch.cov(drawn.T) - expected).norm() < 0.2 * expected.norm()          # sqrt(32 / 4000) = 0.09


def bits_per_byte(model, tok, texts) -> float:
    nats = size = 0
    for text in texts:
        ids = torch.tensor([tok.encode(text, bos=True)])
        logits = model.head(model(ids[:, :-1]))[0]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        size += len(text.encode())
    return nats / np.log(2) / size


@pytest.mark.usefixtures("one_thread")
@torch.no_grad()
def test_new_base_folder(data_dir, legal, tmp_path, command):
    """Text without new tokens has the same logits; at step 0 subtoken rows beat random ones; transformers agrees."""
    path = data_dir / BASES["stories"]
    (tmp_path / "legal.txt").write_text("\n\n".join(legal[0]), encoding="utf-8")
    for init in ("subtoken", "random"):
        line = f"extend --model {path} --new-tokens {NEW} --init {init} --out {tmp_path}/{init} {tmp_path}/legal.txt"
        assert command(line)[:2] == (0, f"{tmp_path}/{init}: {NEW} new tokens, ids 512 to {511 + NEW}\n")
    base, model = hf.load(path), hf.load(tmp_path / "subtoken")
    old, new = T.load(path), T.load(tmp_path / "subtoken")
    assert model.config.vocab_size == new.vocab_size == 512 + NEW
    stories = (data_dir / "corpora/tinystories/tinystories_sample_2MiB.txt").read_text(encoding="utf-8")[:100_000]
    sentences = [*re.findall(r"[^.!?]{20,200}[.!?]", stories), "Once upon a time there was a little girl. 漢字"]
    same = [text for text in sentences if new.encode(text) == old.encode(text)]
    assert 30 < len(same) < len(sentences)
    for text in same:
        ids = torch.tensor([old.encode(text, bos=True)])
        hidden = model(ids)
        logits, expected = model.head(hidden), base.head(base(ids))
        assert torch.equal(torch.nn.functional.linear(hidden, model.head.weight[:512]), expected)       # bit for bit
        masked = logits.index_fill(-1, torch.arange(512, 512 + NEW), -torch.inf)
        assert torch.allclose(masked.log_softmax(-1)[..., :512], expected.log_softmax(-1), rtol=0, atol=1e-5)
    texts = [text[:600] for text in legal[1][:12]]
    subtoken, chance = (bits_per_byte(hf.load(tmp_path / i), new, texts) for i in ("subtoken", "random"))
    before = bits_per_byte(base, T.load(path), texts)
    assert subtoken < 1.3 * before < chance
    transformers = pytest.importorskip("transformers", minversion="5", reason="the truth is transformers 5")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "subtoken")
    ids = torch.tensor([new.encode(texts[0][:300], bos=True)])
    assert (ids >= 512).any()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "subtoken").encode(texts[0][:300]) == ids[0].tolist()
    assert torch.allclose(theirs(ids).logits, model.head(model(ids)), atol=1e-4)


# ---- add

TERMS = ["<legal_case>", "res_judicata", "force_majeure"]


@pytest.mark.parametrize("kind", [*SMALL, "phi2", "stories"])
def test_add(kind, small, request, tmp_path):
    path = small[kind] if kind in SMALL else request.getfixturevalue("data_dir") / BASES[kind]
    old, has_pad = T.load(path), kind == "small bytes"
    ids = X.add(path, TERMS, tmp_path / "out", pad=None if has_pad else "<|the pad|>")
    new = T.load(tmp_path / "out")
    assert ids == {term: old.vocab_size + n for n, term in enumerate([*TERMS, *([] if has_pad else ["<|the pad|>"])])}
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


@torch.no_grad()
def test_add_to_a_model(data_dir, tmp_path, command):
    path, out = data_dir / BASES["stories"], tmp_path / "out"
    status, stdout, stderr = command(f"add --model {path} --out {out} <legal_case> lien --pad <|pad|> "
                                     f"--json {tmp_path}/add.json")
    assert (status, stdout) == (0, "512 <legal_case>\n513 lien\n514 <|pad|>\n")
    assert "warning: 'lien': plain words; as added tokens they are also cut out of longer words" in stderr
    assert json.loads((tmp_path / "add.json").read_text())["ids"] == {"<legal_case>": 512, "lien": 513, "<|pad|>": 514}
    model, base = hf.load(out), hf.load(path)
    weight = model.embed_tokens.weight
    assert torch.equal(weight[:512], base.embed_tokens.weight)
    assert torch.allclose(weight[513], base.embed_tokens.weight[T.load(path).encode("lien")].mean(0))
    assert not weight[514].any()
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == 514
    transformers = pytest.importorskip("transformers", minversion="5", reason="the truth is transformers 5")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.pad_token_id == 514
    assert theirs.encode("a <legal_case> b", add_special_tokens=False) == T.load(out).encode("a <legal_case> b")
    assert transformers.AutoModelForCausalLM.from_pretrained(out).config.pad_token_id == 514


def test_add_refuses(small, tmp_path):
    path = small["small bytes"]
    for terms, pad, message in ((["\udc80"], None, "half a surrogate pair"),
                                ([], None, "there is no term to add"), ([""], None, "a term is empty"),
                                (["<x>", "<x>"], None, "'<x>' is named twice"), (["a"], None, "'a' has the id"),
                                (["<x>"], "<p>", "has the pad token '<|pad|>' already")):
        with pytest.raises(ValueError) as error:
            X.add(path, terms, tmp_path / "out", pad=pad)
        assert message in str(error.value)
        assert not (tmp_path / "out").exists()


def test_plain_words_are_warned_of(small, tmp_path, command):
    path, file = small["small bytes"], tmp_path / "add.json"
    line = f"add --tokenizer {path} --out {tmp_path}/out --json {file} lien res_judicata <a> x1 Pfändung"
    status, _, stderr = command(line)
    assert (status, json.loads(file.read_text())["plain_words"]) == (0, ["lien", "Pfändung"])
    assert stderr.startswith("warning: 'lien', 'Pfändung': plain words; as added tokens they are also cut out of")


# ---- report and compare

def test_report_counts_by_hand(small, tmp_path):
    base = BaseTokenizer(small["small bytes"])
    X.extend(small["small bytes"], [LATIN] * 20, 30, tmp_path / "new")
    new, texts = T.load(tmp_path / "new"), [LATIN, "Ж 漢"]
    row = C.measure_lengths(base, new, texts)
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
    result = C.report(base, new, {"domain": texts}, 10**9)
    median = np.median([counts[i] for i in range(first, new.vocab_size)])
    assert result["break_even_tokens"] == (round(C.TIMES_SEEN * sum(before) / median) if median else None)


@pytest.mark.parametrize(("text", "pieces"), [
    ("The estate, 16", ["▁The", "▁estate", ",", "▁", "<0x31>", "<0x36>"]),             # no digit was trained
    ("the\nbe   liable", ["▁the", "<0x0A>", "be", "▁", "▁", "▁liable"])])
def test_fewest_tokens_of_a_sentencepiece_text(small, text, pieces):
    assert X.count_fewest_tokens(BaseTokenizer(small["small pieces"]), [text]) == len(pieces)


@pytest.mark.parametrize(("change", "bound", "count", "have", "advice", "why"), [
    (-0.20, -0.5, 10, 10_000, "extend", "20.0% shorter (attention's cost 36% lower), and 10,000 tokens are enough"),
    (-0.20, -0.5, 10, 9_999, "keep", "half of the new rows would be seen less than 100 times in 9,999 tokens"),
    (-0.20, -0.5, 0, 10**9, "keep", "there is nothing to train their rows on"),
    (-0.10, -0.5, 10, 10**9, "keep", "10.0% shorter, and below 15% a new vocabulary is not worth its cost"),
    (-0.03, -0.05, 10, 10**9, "keep", "no extension could reach it: with every word one token it would be 5.0%")])
def test_advice(small, monkeypatch, change, bound, count, have, advice, why):
    base = BaseTokenizer(small["small bytes"])
    row = {"change": change, "largest_possible_change": bound, "tokens_before": 1000, "counts": np.array([count] * 3)}
    monkeypatch.setattr(C, "measure_lengths", lambda *_: row)
    result = C.report(base, base.tokenizer, {"domain": []}, have)
    assert result["recommendation"] == advice
    assert why in result["reason"]


def test_report_and_compare_from_the_command_line(small, tmp_path, command):
    (tmp_path / "law.txt").write_text("\n\n".join([LATIN] * 40), encoding="utf-8")
    (tmp_path / "code.txt").write_text("for i in range(10):\n    print(i)\n")
    status, stdout, _ = command(f"report --tokenizer {small['small bytes']} --domain {tmp_path}/law.txt --code "
                                f"{tmp_path}/code.txt --new-tokens 50 --json {tmp_path}/report.json")
    assert status == 0
    result = json.loads((tmp_path / "report.json").read_text())
    assert result["new_tokens"] == 50
    assert result["texts"].keys() == {"domain", "code"}
    assert stdout.rstrip().endswith(f"{result['recommendation']}: {result['reason']}")
    assert command(f"compare --vocab-size 330 {tmp_path}/law.txt --json {tmp_path}/compare.json")[0] == 0
    rows = {row["kind"]: row for row in json.loads((tmp_path / "compare.json").read_text())}
    assert rows.keys() == {"bpe", "unigram", "wordpiece"}
    assert [rows[k]["exact"] for k in ("bpe", "unigram")] == [1.0, 1.0]
    assert rows["wordpiece"]["exact"] == 0                              # it forgets the spaces
    assert all(row["covered"] == 1 and row["unknown"] == 0 for row in rows.values())


def test_the_script_itself(tmp_path):
    """A mistake ends in one line also in a process of its own."""
    (tmp_path / "law.txt").write_text(LATIN, encoding="utf-8")
    done = subprocess.run([sys.executable, ROOT / "tokenizer.py", "compare", tmp_path / "law.txt"], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: 1 documents are too few: every tenth is held out\n")


def test_bits_per_byte_of_a_small_model(tmp_path, command, monkeypatch):
    """Steps are counted in bytes; the number is that of eval.py; a failure is the line that the command ended with."""
    (tmp_path / "law.jsonl").write_text("".join(json.dumps({"text": f"{n}. {LATIN}"}) + "\n" for n in range(600)))
    calls = []

    def run(file, *words):
        words = dict(zip(words[::2], words[1::2]))
        calls.append(words | {"kind": file})
        if file == "eval.py":
            Path(words["--json"]).write_text(json.dumps({"texts": {"held_out": {"bits_per_byte": 2.0 + len(calls)}}}))
        else:
            manifest = json.loads(Path(words["--data.sources.text.path"], "manifest.json").read_text())["splits"]
            assert manifest["heldout"]["documents"] == 0
            per_step = 16 * 256 * manifest["train"]["bytes"] / manifest["train"]["tokens"]
            assert abs(words["--train.steps"] * per_step - 1e6) <= per_step / 2
    monkeypatch.setattr(C, "run_command", run)
    status, stdout, _ = command(f"compare --vocab-size 330 --bits-per-byte 1 --seeds 2 {tmp_path}/law.jsonl --json "
                                f"{tmp_path}/compare.json")
    assert status == 0
    rows = json.loads((tmp_path / "compare.json").read_text())
    assert [row["bits_per_byte"] for row in rows] == [[4.0, 6.0], [8.0, 10.0], [12.0, 14.0]]
    assert [call["--seed"] for call in calls if call["kind"] == "train.py"] == [0, 1] * 3
    assert "5.0000 (4.0000 to 6.0000)" in stdout
    assert "white space and unknown characters, which wordpiece drops, cost it nothing" in stdout


def test_no_model_is_trained_before_every_tokenizer(monkeypatch):
    """300 ids are enough for BPE; Unigram, which comes second, needs more for its bytes and these letters."""
    texts = ["".join(map(chr, range(0x4E00, 0x4E80)))] * 20
    monkeypatch.setattr(C, "measure_small_model", lambda *args: pytest.fail("minutes went into a model first"))
    with pytest.raises(ValueError, match="no unigram vocabulary of 300"):
        C.compare_kinds(texts[2:], texts[:2], 300, megabytes=0.001)


def test_a_small_model_is_trained_and_scored(small):
    """By the commands themselves, for three steps: fewer bits than the 8 of a byte, and not none."""
    texts = [f"{n}. {LATIN}" for n in range(100)]
    assert 0.5 < C.measure_small_model(small["small bytes"], texts[:90], texts[90:], 0.02, 0) < 8
    with pytest.raises(ValueError, match=r"train\.py failed: error: unknown key"):
        C.run_command("train.py", "--no-such-key", 1)


@pytest.mark.parametrize("kill", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("line", ["extend --tokenizer BASE --out OUT LAW", "add --tokenizer BASE --out OUT <x>",
                                  "train --vocab-size 300 --out OUT LAW"])
def test_a_kill_leaves_nothing_and_the_same_command_completes(line, kill, small, tmp_path, command, monkeypatch):
    (tmp_path / "law.txt").write_text(LATIN * 20, encoding="utf-8")
    out, stale = tmp_path / "to/out", tmp_path / "to/.out.partial"
    for word, path in (("BASE", small["small bytes"]), ("OUT", out), ("LAW", tmp_path / "law.txt")):
        line = line.replace(word, str(path))

    def die(*_, **__):
        raise kill
    for module, name in ((vocabulary_files, "write_settings"), (X, "write_settings"), (os, "replace")):
        monkeypatch.setattr(module, name, die)
    status, _, stderr = command(line)
    assert (status, stderr.count("\n")) == (130 if kill is KeyboardInterrupt else 2, 1)
    assert not out.exists() or not (out / "tokenizer.json").exists()
    monkeypatch.undo()
    assert not stale.exists()
    stale.mkdir(parents=True, exist_ok=True)            # what a SIGKILL leaves
    (stale / "half").write_text("{")
    assert command(line)[0] == 0
    assert T.load(out).vocab_size >= 300
    assert line.startswith("train") or not stale.exists()
    assert {file.name for file in out.iterdir()} <= {"tokenizer.json", "tokenizer_config.json", "tokenizer.tiktoken"}


HOSTILE = {"missing.txt": None, "empty.txt": b"", "blank.jsonl": b'{"text": ""}\n' * 20, "wrong.jsonl": b'{"txt": 1}',
           "list.jsonl": b"[1]\n", "cut.jsonl": b'{"text": "x"', "deep.jsonl": b"[" * 100_000, "latin.txt": b"\xe9",
           "no.txt.gz": b"plain", "cut.txt.gz": gzip.compress(LATIN.encode() * 99)[:-9], "x.parquet": b"PAR1",
           "broken.jsonl.gz": gzip.compress(b'{"text": "x"}\n' * 999)[:-30] + b"\xff" * 30, "x.pdf": b"%PDF", "x": ""}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_line(name, small, tmp_path, command):
    file, out = tmp_path / name, tmp_path / "out"
    if HOSTILE[name] == "":
        file.mkdir()
    elif HOSTILE[name] is not None:
        file.write_bytes(HOSTILE[name])
    tok = small["small bytes"]
    for line in (f"train --vocab-size 300 --out {out} {file}",
                 f"train --kind unigram --vocab-size 300 --out {out} {file}",
                 f"extend --tokenizer {tok} --out {out} {file}", f"report --tokenizer {tok} --domain {file}",
                 f"compare --vocab-size 300 {file}"):
        status, stdout, stderr = command(line)
        assert (status, stdout, stderr.count("\n")) == (2, "", 1)
        assert stderr.startswith("error: ")
        assert not list(tmp_path.glob("*out*"))


def test_hostile_text_is_learnt_from(small, tmp_path, command):
    """Half surrogates, NUL, U+FEFF, a million `^`, a word of a million letters, a million spaces."""
    texts = ["a\ud800b \udc80 " + LATIN, "\x00a\x00 \ufeff" + LATIN, "^" * 10**6, "ab" * 500_000,
             "x" + " " * 10**6 + "y", *[LATIN] * 40]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for kind in ("bpe", "unigram", "wordpiece"):
        line = f"train --kind {kind} --vocab-size 330 --out {tmp_path}/{kind} {tmp_path}/x.jsonl"
        assert command(line)[0] == 0
    status, stdout, _ = command(f"extend --tokenizer {small['small bytes']} --new-tokens 9999 --out {tmp_path}/e "
                                f"{tmp_path}/x.jsonl")
    assert status == 0
    assert re.search(r": \d+ new tokens of 9999: no other pair that may be joined occurs 10 times, ids 300 to", stdout)


def test_two_files_of_different_models_are_refused(small, tmp_path):
    for kind, name in (("small bytes", "tokenizer.json"), ("small pieces", "tokenizer.model")):
        (tmp_path / name).write_bytes((small[kind] / name).read_bytes())
    with pytest.raises(ValueError, match=r"has 300 ids in tokenizer\.json and 310 in tokenizer\.model"):
        BaseTokenizer(tmp_path)


def test_out_is_looked_at_before_the_text(small, tmp_path, command):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    for model in ("tokenizer", "model"):
        line = f"extend --{model} {small['small bytes']} --out {tmp_path}/full {tmp_path}/none.txt"
        status, _, stderr = command(line)
        assert (status, "exists already" in stderr) == (2, True)


def test_mistakes_end_in_one_line(small, tmp_path, command):
    (tmp_path / "law.txt").write_text(LATIN * 20, encoding="utf-8")
    (tmp_path / "some.jsonl").write_text(f'{{"text": "{LATIN}"}}\n' * 20)
    (tmp_path / "blank.jsonl").write_text((f'{{"text": "{LATIN}"}}\n' * 9 + '{"text": "\\n"}\n') * 3)
    train([LATIN] * 20, "wordpiece", 200, tmp_path / "wordpiece")
    (tmp_path / "unigram").mkdir()
    with open(tmp_path / "unigram/tokenizer.model", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([LATIN] * 3), model_writer=f, vocab_size=50,
                                                 minloglevel=2)
    tok, law, out = small["small bytes"], tmp_path / "law.txt", tmp_path / "out"
    for line, message in (
            (f"extend --tokenizer {tmp_path}/wordpiece --out {out} {law}", "is no byte-level BPE; extend can continue"),
            (f"extend --tokenizer {tmp_path}/unigram --out {out} {law}", "is no BPE: a Unigram model's scores are"),
            (f"extend --tokenizer {tok} --out {tok} {law}", "exists already; choose another folder, or"),
            (f"extend --tokenizer {tok} --out {out} --min-count 999 {law}", "may be joined and occurs 999 times"),
            (f"extend --tokenizer {tok} --out {out} --new-tokens 0 {law}", "must be at least 1"),
            (f"extend --tokenizer {tok} --out {out} {law}x", "does not exist"),
            (f"extend --model {tok} --out {out} {law}", "config.json does not exist"),
            (f"extend --out {out} {law}", "give one of --model and --tokenizer"),
            (f"report --tokenizer {tok} --extended {small['small pieces']} --domain {law}", "is no extension of"),
            (f"compare {law}", "are too few: every tenth is held out"),
            (f"compare {tmp_path}/some.jsonl --bits-per-byte 9", "9 megabytes are more than 16 times the text's 0.00"),
            (f"compare {tmp_path}/some.jsonl --bits-per-byte nan", "--bits-per-byte is nan, but must be at least 0"),
            (f"compare {tmp_path}/blank.jsonl", "there is not a word in those"),
            (f"report --tokenizer {tok} --domain {law} --corpus-tokens 0", "must be at least 1")):
        status, _, stderr = command(line)
        assert status == 2
        assert message in stderr
        assert stderr.count("\n") == 1
        assert stderr.startswith("error: ")
        assert not out.exists()
