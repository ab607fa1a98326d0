"""The objective that the settings name. Truth: what the settings' help promises."""

from types import SimpleNamespace

import numpy as np
import pytest

from core.config import check_limits
from learn.choose_objective import ObjectiveConfig, make_objective
from learn.objectives import Causal, Masked


def test_where_the_mask_token_comes_from():
    tokenizer = SimpleNamespace(mask_id=5, vocab={}, special_ids=[0, 5], missing_ids=lambda rows: [*range(10, rows)])
    config = ObjectiveConfig(name="masked", mask_ratio=0.3)
    made = make_objective(config, True, tokenizer, 10)
    assert (made.mask_id, made.special.tolist(), made.mask_ratio, made.mask_documents) == (5, [0, 5], 0.3, True)
    assert made.ordinary.tolist() == [1, 2, 3, 4, 6, 7, 8, 9]
    config.mask_token_id = 7
    assert make_objective(config, False, tokenizer, 10).special.tolist() == [0, 5, 7]
    assert make_objective(config, False, None, 10).special.tolist() == [7]
    # Rows that pad the embedding are never drawn.
    assert make_objective(config, False, tokenizer, 13).ordinary.tolist() == [1, 2, 3, 4, 6, 8, 9]
    # A special token past the model's vocabulary.
    few = SimpleNamespace(mask_id=5, vocab={}, special_ids=[0, 5, 300], missing_ids=lambda rows: [])
    assert make_objective(config, False, few, 10).special.tolist() == [0, 5, 7]
    causal = make_objective(ObjectiveConfig(), True, None, 10)
    assert isinstance(causal, Causal)
    assert causal.mask_documents


def test_every_token_that_rewrites_text_is_told():
    """Each pair of tokenizers differs in one role: that of a token that is put into text or left out."""
    def told(name, *names, **more):
        vocab = {text: i for i, text in enumerate(names)}
        tokenizer = SimpleNamespace(mask_id=None, vocab=vocab, special_ids=[], missing_ids=lambda rows: [])
        vars(tokenizer).update(more)
        return make_objective(ObjectiveConfig(name), True, tokenizer, 20).token_ids
    spans, modes = [f"<extra_id_{i}>" for i in range(4)], ["[NLU]", "[S2S]", "[NLG]"]
    middle = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"]
    assert told("masked", mask_id=5) == told("masked", mask_id=5) != told("masked", mask_id=6)
    assert told("electra", mask_id=5) != told("electra", mask_id=5, special_ids=[3])
    assert told("span", *spans) != told("span", *spans[::-1])
    assert told("ul2", *spans, *modes) != told("ul2", *spans, *modes[::-1]) != told("ul2", *spans)
    assert told("fim", *middle) != told("fim", *middle[::-1])
    assert told("causal") == told("selective") == told("dpo") == []
    masking = True, 5, [0], 20, 0.15, 0.0
    begins = [np.arange(20) % n == 0 for n in (2, 3)]
    first, second = (Masked(*masking, (each, np.zeros(20, np.int32))).token_ids for each in begins)
    assert first != second != Masked(*masking).token_ids


def test_settings_that_cannot_be():
    config = ObjectiveConfig(name="masked")
    for tokenizer in (None, SimpleNamespace(mask_id=None, vocab={}, special_ids=[], missing_ids=lambda rows: [])):
        with pytest.raises(ValueError, match=r"needs a mask token and the tokenizer has none; .*--objective"):
            make_objective(config, True, tokenizer, 10)
    for wrong in (-1, 10, 999):
        with pytest.raises(ValueError, match=f"mask_token_id is {wrong}, outside the vocabulary of 10"):
            make_objective(ObjectiveConfig(name="masked", mask_token_id=wrong), True, None, 10)
    for ratio in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="mask_ratio"):
            check_limits(ObjectiveConfig(mask_ratio=ratio), "objective.")
