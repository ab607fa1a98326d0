"""Where words begin. Truth: texts cut by hand; the tokenizers' own pieces."""

import itertools

import numpy as np
import pytest
import torch
from vocabularies import BASES, SMALL

import tokenizer as tokenizers
from learn.objectives import Masked
from text import vocabulary as T
from text.words import find_word_borders

TEXT = "The executor's liability, (a)(1) über-alles: Straße 漢字x foo_bar\n\nEnd 42nd."
WORDS = ["The", " executor", "'", "s", " liability", ",", " (", "a", ")", "(", "1", ")", " über", "-", "alles", ":",
         " Straße", " 漢", "字", "x", " foo", "_", "bar", "\n", "\n", "End", " 42nd", "."]


def cut(tokenizer, text: str) -> list[str]:
    """The words that whole-word masking sees in a text, each decoded by itself."""
    ids = torch.tensor([tokenizer.encode(text)], dtype=torch.int32)
    objective = Masked(True, 0, [], tokenizer.vocab_size, words=find_word_borders(tokenizer, tokenizer.vocab_size))
    first = objective.find_words(ids, torch.zeros_like(ids))[0]
    parts = [ids[0][first == k].tolist() for k in first.unique().tolist()]
    ends = np.cumsum([len(part) for part in parts]).tolist()
    # SentencePiece drops the space before the first token that it decodes: prefixes say what each word adds.
    texts = [tokenizer.decode(ids[0, :end].tolist()) for end in [0, *ends]]
    return [after[len(before):] for before, after in itertools.pairwise(texts)]


@pytest.mark.parametrize("kind", [*SMALL, "stories", "gpt2"])
def test_words_of_real_vocabularies(kind, small_bases, request):
    path = small_bases[kind] if kind in SMALL else request.getfixturevalue("data_dir") / BASES[kind]
    tokenizer = T.load(path)
    words = cut(tokenizer, TEXT)
    assert "".join(words) == tokenizer.decode(tokenizer.encode(TEXT))
    # Where a token holds two marks, "(a" or ")(", they are one word: a token is never cut.
    merged, rest = [], list(WORDS)
    for word in words:
        taken = rest.pop(0)
        while len(taken) < len(word):
            taken += rest.pop(0)
        merged.append((word, taken))
    assert all(a == b for a, b in merged), merged
    assert len(words) > 0.7 * len(WORDS)


def test_words_of_wordpiece(tmp_path):
    text = ["the unbelievable liability of the liable unbelievably"] * 20
    tokenizer = tokenizers.train(text, "wordpiece", 190, tmp_path / "wp")
    ids = tokenizer.encode("the able oflia")
    begins, after = find_word_borders(tokenizer, tokenizer.vocab_size)
    assert begins[ids].tolist() == [not tokenizer.tokens[i].startswith("##") for i in ids]
    assert begins[ids].sum() == 3 < len(ids)
    assert not after.any()


def test_a_word_ends_with_its_document_and_at_special_tokens():
    """Ids 10 to 19 begin a word, 20 to 29 continue one, 1 is special, 30 is a mark and 31 a space."""
    begins, after = np.zeros(40, bool), np.zeros(40, np.int8)
    begins[10:20] = begins[30] = True
    after[30], after[31] = 1, -1
    objective = Masked(True, 3, [1], 40, words=(begins, after))
    tokens = torch.tensor([[20, 21, 10, 20, 1, 22, 23, 24, 25, 30, 26, 27, 31, 30, 31, 11, 12]], dtype=torch.int32)
    doc_start = torch.tensor([[0] * 7 + [7] * 10], dtype=torch.int32)
    wanted = [0, 0, 2, 2, 2, 5, 5, 7, 7, 9, 10, 10, 10, 10, 14, 14, 16]
    assert objective.find_words(tokens, doc_start).tolist() == [wanted]
