"""The objective that the settings name. Truth: what the settings' help promises."""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest

from core.config import check_limits
from core.errors import UserError
from learn.choose_objective import ObjectiveConfig, make_objective, refuse_unread
from learn.multitask import Weights
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


OTHER = {"mask_ratio": 0.3, "whole_words": True, "span_length": 2.0, "fim_rate": 0.4, "spm_share": 0.4, "keep": 0.3,
         "mask_token_id": 5, "generator_ratio": 0.5, "discriminator_weight": 1.0, "reference": "judge", "beta": 0.2,
         "precompute": True, "z_loss": 0.1, "weights": Weights(masked=1)}
# By the settings' help, which names the objectives that each is for: z_loss is for all whose loss is of tokens.
USED = {"causal": "z_loss", "masked": "mask_ratio whole_words mask_token_id z_loss",
        "selective": "keep reference z_loss",
        "electra": "mask_ratio mask_token_id generator_ratio discriminator_weight z_loss", "ul2": "z_loss",
        "span": "mask_ratio span_length z_loss", "fim": "fim_rate spm_share z_loss", "orpo": "beta",
        "dpo": "beta reference precompute", "ipo": "beta reference precompute", "mixture": "weights"}


@pytest.mark.parametrize("name", USED)
def test_what_an_objective_does_not_read_is_refused(name):
    assert {item.name for item in fields(ObjectiveConfig)} == {"name", *OTHER}
    refuse_unread(ObjectiveConfig(name))
    for key, value in OTHER.items():
        given = ObjectiveConfig(name, **{key: value})
        if key in USED[name].split():
            refuse_unread(given)
        else:
            with pytest.raises(UserError, match=rf"objective\.{key} is .*, but objective {name} does not read it"):
                refuse_unread(given)


def test_a_mixture_reads_what_its_members_do():
    weights = Weights(causal=1, masked=1)
    refuse_unread(ObjectiveConfig("mixture", weights, mask_ratio=0.3, whole_words=True, z_loss=0.1))
    with pytest.raises(UserError, match=r"objective\.fim_rate is 0\.4, but objective mixture .*\(fim\)"):
        refuse_unread(ObjectiveConfig("mixture", weights, fim_rate=0.4))


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
