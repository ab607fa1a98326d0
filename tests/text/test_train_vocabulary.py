"""Truth: `transformers`, which must give what `train` writes the same ids; the longest match for WordPiece.
Laws: the same text gives the same files; BPE and Unigram give back any text.
"""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_vocabulary import HOSTILE, byte_letters, write
from vocabularies import LATIN

from core import cli
from text import train_vocabulary as V
from text.train_vocabulary import SPECIALS, cut_for_counting, train
from text.vocabulary import ROLES, replace_surrogates

quick = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])

CORPUS = ["The cat sat on the mat, and the dog didn't.\n\n", "Habeas corpus 1234 naïve 漢字 <0x41>!\r\n",
          "\tres judicata  two\n"] * 8


class TestTrain:
    @pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
    def test_same_text_same_files_and_transformers_ids(self, kind, tmp_path):
        from transformers import AutoTokenizer
        ours = train(iter(CORPUS), kind, 400, tmp_path / "one")
        for _ in range(3):              # hash tables have another order in each training
            train(iter(CORPUS), kind, 400, tmp_path / "two")
            for name in ("tokenizer.json", "tokenizer_config.json"):
                assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        theirs = AutoTokenizer.from_pretrained(tmp_path / "one")
        for text in [*CORPUS[:3], *HOSTILE, "<|eos|> the <|mask|>cat", *SPECIALS.values()]:
            ids = ours.encode(text)
            assert theirs.encode(text, add_special_tokens=False) == ids
            assert theirs.encode(text) == [ours.bos_id, *ids]
            assert theirs.decode(ids) == ours.decode(ids)
        for role in ROLES:
            assert getattr(theirs, f"{role}_token_id") == getattr(ours, f"{role}_id")
        assert {role: ours.tokens[getattr(ours, f"{role}_id")] for role in SPECIALS} == SPECIALS
        assert ours.add_bos
        assert ours.vocab_size == len(theirs) <= 400
        assert ours.special_ids == list(range(len(ours.special_ids)))

    def test_bpe_gives_back_any_text(self, tmp_path):
        ours = train(CORPUS, "bpe", 300, tmp_path)

        @quick
        @given(st.text(st.characters(exclude_categories=())) | st.text("<|eos>\n 漢"))
        def check(text):
            assert ours.decode(ours.encode(text)) == replace_surrogates(text)
        check()
        assert ours.unk_id is None
        assert set(byte_letters()) <= set(ours.tokens)

    def test_unigram_gives_back_any_text_without_its_space(self, tmp_path):
        ours = train(CORPUS, "unigram", 330, tmp_path)

        @quick
        @given(st.text(st.characters(exclude_categories=())) | st.text("<0x41E2>b \n漢"))
        def check(text):
            text = replace_surrogates(text).replace("\u2581", "")
            ids = ours.encode(text)
            assert ours.unk_id not in ids
            assert ours.decode(ids) == text
        check()
        assert ours.decode(ours.encode("the text <0x41> is no A")) == "the text <0x41> is no A"

    def test_wordpiece_is_the_longest_match(self, tmp_path):
        ours = train(CORPUS, "wordpiece", 180, tmp_path)
        for word in ("habeas", "catmat", "doghat", "sat", "undid"):
            pieces, rest = [], word
            while rest:
                names = (("##" if pieces else "") + rest[:n] for n in range(len(rest), 0, -1))
                pieces.append(next(name for name in names if ours.vocab.get(name) is not None))
                rest = rest[len(pieces[-1].removeprefix("##")):]
            assert [ours.tokens[i] for i in ours.encode(word)] == pieces
        assert ours.encode("\U0001f642") == [ours.unk_id]

    @pytest.mark.parametrize(("texts", "kind", "size", "message"), [
        (["", ""], "bpe", 300, "there is no text to train a tokenizer on"),
        (CORPUS, "bpe", 260, "vocabulary of 260 is too small: bytes and special tokens alone need 260; ask for more"),
        (CORPUS, "unigram", 270, "no unigram vocabulary of 270 from this text: Vocabulary size is smaller"),
        (CORPUS, "wordpiece", 50, "vocabulary of 50 is too small: letters"),
    ])
    def test_errors(self, tmp_path, texts, kind, size, message):
        with pytest.raises(ValueError, match=message):
            train(texts, kind, size, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_models_folder_is_not_overwritten(self, tmp_path):
        with pytest.raises(ValueError, match=r"holds 'config\.json', which is no part of a tokenizer folder"):
            train(CORPUS, "bpe", 300, write(tmp_path, config={}))


def test_cut_for_counting():
    """Nothing is lost; a text of ordinary length and words is one part."""
    assert list(cut_for_counting("the cat, " * 11_000)) == ["the cat, " * 11_000]
    assert list(cut_for_counting("")) == []
    for text in ("^" * 2500, "a" * 999 + " b", "x" * 1000, " " * 250_001, "漢" * 5000 + "\n\nx", "a\ud800b" * 60_000):
        cut = list(cut_for_counting(text))
        assert "".join(cut) == replace_surrogates(text)
        assert max(map(len, cut)) <= 100_000
        assert max(len(run) for part in cut for run in re.findall(r"\S+|\s+", part)) <= 1000


# ---- the three kinds on the same text

def test_no_model_is_trained_before_every_tokenizer(tmp_path, monkeypatch):
    """300 ids are enough for BPE; Unigram, which comes second, needs more for its bytes and these letters."""
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(["".join(map(chr, range(0x4E00, 0x4E80)))] * 20), encoding="utf-8")
    monkeypatch.setattr(V, "measure_small_model", lambda *args: pytest.fail("minutes went into a model first"))
    with pytest.raises(ValueError, match="no unigram vocabulary of 300"):
        V.compare_command(V.Compare(files=[str(file)], vocab_size=300, bits_per_byte=0.001))


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_small_model_is_trained_and_scored(small_bases):
    """By the commands themselves, for three steps: fewer bits than the 8 of a byte, and not none."""
    texts = [f"{n}. {LATIN}" for n in range(100)]
    assert 0.5 < V.measure_small_model(small_bases["small bytes"], texts[:90], texts[90:], 0.02, 0) < 8
    with pytest.raises(ValueError, match=r"train\.py failed: unknown key"):
        cli.run_command("train.py", "--no-such-key", 1)
