"""The objective that the settings name. Truth: what the settings' help promises."""

from types import SimpleNamespace

import pytest

from core.config import check_limits
from learn.choose_objective import ObjectiveConfig, make_objective
from learn.objectives import Causal


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
