"""Tokens that objectives need. Truth: transformers' own reading of the folders that `add` writes; the base's ids, which
stay; the text of a document, in which none of them is found."""

import json

import pytest
from vocabularies import BASES, SMALL, fuzz

from text import extend_vocabulary as X
from text import vocabulary as T
from text.objective_tokens import MODES, PARTS, find_mask, find_named, find_sentinels, list_missing


@pytest.mark.parametrize("kind", [*SMALL, "stories"])
def test_they_are_added_behind_all_others_and_found_again(kind, small_bases, request, tmp_path):
    path = small_bases[kind] if kind in SMALL else request.getfixturevalue("data_dir") / BASES[kind]
    old, objectives = T.load(path), ["masked", "span", "ul2", "fim"]
    # The tokenizers that are trained here have a mask token.
    mask = old.vocab.get("<|mask|>")
    assert (find_mask(old), find_sentinels(old), find_named(old, PARTS)) == (mask, [], None)
    assert find_named(old, MODES) is None
    parts = X.add(path, ["<case>"], tmp_path / "out", objectives=objectives, sentinels=12)
    new, n = T.load(tmp_path / "out"), old.vocab_size + (mask is None)
    assert [*parts] == [*range(old.vocab_size, n + 19)]
    assert new.tokens[:old.vocab_size] == old.tokens
    assert new.mask_id == find_mask(new) == (n if mask is None else mask)
    assert find_sentinels(new) == [*range(n + 1, n + 13)]
    assert [new.tokens[i] for i in find_sentinels(new)] == [f"<extra_id_{i}>" for i in range(12)]
    assert (find_named(new, MODES), find_named(new, PARTS)) == ([*range(n + 13, n + 16)], [*range(n + 16, n + 19)])
    assert {*new.special_ids} == {*old.special_ids, new.mask_id, *range(n + 1, n + 19)}
    texts = [t for t in fuzz(20) if not any(old.tokens[i] in t for i in old.special_ids)]
    assert [i.tolist() for i in new.encode_batch(texts)] == [i.tolist() for i in old.encode_batch(texts)]
    with pytest.raises(ValueError, match="nothing to add: the vocabulary has the tokens for span and fim"):
        X.add(tmp_path / "out", [], tmp_path / "more", objectives=["span", "fim"], sentinels=12)
    # More sentinels follow the ones that are there.
    X.add(tmp_path / "out", [], tmp_path / "more", objectives=["span"], sentinels=15)
    assert find_sentinels(T.load(tmp_path / "more")) == [*range(n + 1, n + 13), n + 19, n + 20, n + 21]
    transformers = pytest.importorskip("transformers", minversion="5", reason="the truth is transformers 5")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.mask_token_id == new.mask_id
    assert theirs.convert_tokens_to_ids(["<extra_id_3>", "[X]", "<|fim_middle|>"]) == [n + 4, n + 15, n + 18]
    assert theirs.decode([n + 4, *old.encode("cat")], skip_special_tokens=True).strip() == "cat"


def test_what_a_base_has_is_not_added(small_bases, tmp_path):
    """A base with a mask token and StarCoder's parts; it lacks sentinels alone."""
    file = small_bases["small bytes"] / "tokenizer.json"
    description = json.loads(file.read_text())
    names = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"]
    first = T.load(file).vocab_size
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    description["added_tokens"] += [{"id": first + i, "content": name, "special": True, **flags}
                                    for i, name in enumerate(names)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    base = T.load(tmp_path)
    assert (find_mask(base), find_named(base, PARTS)) == (T.load(file).mask_id, [first, first + 2, first + 1])
    wanted, mask = list_missing(base, ["masked", "fim", "span"], 2)
    assert (wanted, mask) == (["<extra_id_0>", "<extra_id_1>"], None)


def test_text_that_the_base_has_packed_stays_readable(small_bases, tmp_path):
    """Truth: the ids, which are the base's. With other additions, or other ids, the text must be packed again."""
    path = small_bases["small bytes"]
    old = T.load(path)
    X.add(path, [], tmp_path / "spans", objectives=["span"], sentinels=4)
    X.add(path, ["res_judicata"], tmp_path / "term")
    spans, term = T.load(tmp_path / "spans"), T.load(tmp_path / "term")
    assert all(tokenizer.reads(old.fingerprint, old.vocab_size) for tokenizer in (old, spans))
    assert not term.reads(old.fingerprint, old.vocab_size)
    assert not old.reads(spans.fingerprint, spans.vocab_size)
    assert not spans.reads(term.fingerprint, term.vocab_size)
    spans.tokens[20], spans.tokens[21] = spans.tokens[21], spans.tokens[20]
    assert not spans.reads(old.fingerprint, old.vocab_size)
