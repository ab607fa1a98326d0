"""The settings files of a model folder, each field that we read typed once: no reader meets a list for a table, a NaN,
or a size that no model has and no machine could hold.

Numbers written as text are numbers ("10000.0"), and 32.0 is a whole one; a token may be an object with its content.
"""

import math
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from core.config import RULES
from core.errors import UserError
from core.foreign_files import SETTINGS, VOCABULARY, own_file, read_own_json


class Kind(NamedTuple):
    # What a value must be, in words for a message.
    wanted: str
    # From a value to the typed value. It raises one of WRONG where the value is not of this kind.
    convert: Callable


WRONG = (TypeError, ValueError, KeyError, AttributeError, OverflowError)


def _number(value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    if not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _whole(value) -> int:
    if _number(value) != int(_number(value)):
        raise ValueError
    return int(_number(value))


def _flag(value) -> bool:
    return {True: True, False: False, "true": True, "false": False}[value.lower() if isinstance(value, str) else value]


def _text(value) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _limited(kind: Kind, **limits) -> Kind:
    """limits: RULES, such as at_least=1."""
    def convert(value):
        value = kind.convert(value)
        if not all(RULES[rule](value, limit) for rule, limit in limits.items()):
            raise ValueError
        return value
    spelt = {rule: f"{limit:g}" if isinstance(limit, float) else f"{limit:,}" for rule, limit in limits.items()}
    wanted = " and ".join(f"{rule.replace('_', ' ')} {limit}" for rule, limit in spelt.items())
    return Kind(f"{kind.wanted} {wanted}", convert)


def _many(kind: Kind) -> Kind:
    def convert(value):
        if not isinstance(value, list):
            raise TypeError
        return [kind.convert(each) for each in value]
    return Kind(f"a list, each entry {kind.wanted}", convert)


def _table(kind: Kind, key: Callable = str) -> Kind:
    return Kind(f"an object, each value {kind.wanted}",
                lambda value: {str(key(name)): kind.convert(each) for name, each in value.items()})


def _either(first: Kind, second: Kind) -> Kind:
    def convert(value):
        try:
            return first.convert(value)
        except WRONG:
            return second.convert(value)
    return Kind(f"{first.wanted} or {second.wanted}", convert)


class WrongPart(ValueError):
    """A field of an object is of a wrong kind; the text names it."""


def _record(fields: dict[str, Kind], needs=()) -> Kind:
    def convert(value):
        if any(value[name] is None for name in needs):
            raise ValueError
        typed = dict(value)
        for name, each in value.items():
            if name in fields and each is not None:
                try:
                    typed[name] = fields[name].convert(each)
                except WRONG:
                    raise WrongPart(f"{name} {reprlib.repr(each)}, but it must be {fields[name].wanted}") from None
        return typed
    return Kind(f"an object with {', '.join(needs or fields)} of the right types", convert)


NUMBER, WHOLE = Kind("a number", _number), Kind("a whole number", _whole)
FLAG, TEXT = Kind("true or false", _flag), Kind("text", _text)
TOKEN = Kind("a token or an object with its content",
             lambda value: _text(value["content"] if isinstance(value, dict) else value))
# More ids than any tokenizer has: mT5's has 250,112, and XLM-V's a million.
MOST_IDS = 1 << 22
ID = _limited(WHOLE, at_least=0, below=MOST_IDS)
# Old configs write -1 for none.
ROLE_ID = _limited(WHOLE, at_least=-1, below=MOST_IDS)
IDS = _either(ROLE_ID, _many(ROLE_ID))
SIZE, COUNT = _limited(WHOLE, at_least=1, at_most=1 << 20), _limited(WHOLE, at_least=0, at_most=1 << 20)
LENGTH = _limited(WHOLE, at_least=1, at_most=1 << 30)
FACTOR, THETA = _limited(NUMBER, above=0, at_most=1e6), _limited(NUMBER, above=1, at_most=1e15)
RANK, ALPHA = _limited(WHOLE, at_least=1, at_most=1 << 16), _limited(NUMBER, above=0, at_most=1e6)
ROPE = {**dict.fromkeys(("factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor",
                         "high_freq_factor"), FACTOR),
        **dict.fromkeys(("partial_rotary_factor", "mscale", "mscale_all_dim"),
                        _limited(NUMBER, at_least=0, at_most=1e3)),
        **dict.fromkeys(("short_factor", "long_factor"), _many(FACTOR)), "rope_theta": THETA,
        "original_max_position_embeddings": LENGTH, "truncate": FLAG, "type": TEXT, "rope_type": TEXT}
ROLE_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), IDS)
ROLE_TOKENS = {**dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token", "mask_token"), TOKEN),
               "additional_special_tokens": _many(TOKEN)}
# The kind of every field of a file whose fields have no fixed names.
ANY = "*"
# One table of every field that we read, with the limits of its values. Known models stay far within them.
FILES = {
    "config.json": {
        **ROLE_IDS, **dict.fromkeys(("model_type", "hidden_act", "dtype", "torch_dtype"), TEXT),
        "vocab_size": _limited(WHOLE, at_least=1, at_most=MOST_IDS),
        "num_hidden_layers": _limited(WHOLE, at_least=1, at_most=1000),
        **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "num_experts",
                         "num_local_experts", "num_experts_per_tok", "decoder_sparse_step"), SIZE),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"),
                        _limited(WHOLE, at_least=1, at_most=1 << 14)),
        **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings", "sliding_window",
                         "no_rope_layer_interval"), LENGTH),
        "max_window_layers": COUNT, "rope_theta": THETA,
        **dict.fromkeys(("rms_norm_eps", "initializer_range", "partial_rotary_factor"),
                        _limited(NUMBER, at_least=0, at_most=1)),
        **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob"),
                        FLAG),
        "layer_types": _many(TEXT), "no_rope_layers": _many(COUNT), "mlp_only_layers": _many(COUNT),
        "rope_scaling": _record(ROPE), "rope_parameters": _record(ROPE)},
    "generation_config.json": ROLE_IDS,
    "tokenizer_config.json": {
        **ROLE_TOKENS, "add_bos_token": FLAG, "tokenizer_class": TEXT,
        "added_tokens_decoder": _table(_record({"content": TEXT, "special": FLAG}, needs=["content"]), ID.convert)},
    "special_tokens_map.json": ROLE_TOKENS,
    "added_tokens.json": {ANY: ID}, "vocab.json": {ANY: ID},
    "adapter_config.json": {
        **dict.fromkeys(("peft_type", "bias"), TEXT), "r": RANK, "lora_alpha": ALPHA,
        "lora_dropout": _limited(NUMBER, at_least=0, below=1),
        **dict.fromkeys(("use_rslora", "use_dora", "ensure_weight_tying"), FLAG),
        "alpha_pattern": _table(ALPHA), "rank_pattern": _table(RANK), "target_modules": _either(TEXT, _many(TEXT)),
        "trainable_token_indices": _either(_many(ID), _table(_many(ID)))},
}


def read_settings(path: Path, needed: bool = False) -> dict:
    """The object in a settings file, typed by the file's name; {} for a missing one that is not `needed`. UserError for
    a file that is no JSON object, and for a field of a wrong type. A null is None whatever its field."""
    if not needed and own_file(path) is None:
        return {}
    values, fields = read_own_json(path, VOCABULARY if path.name == "vocab.json" else SETTINGS), FILES[path.name]
    for name, value in values.items():
        kind = fields.get(name, fields.get(ANY))
        if kind and (value is not None or ANY in fields):
            try:
                values[name] = kind.convert(value)
            except WRONG as error:
                wrong = (f"in {name} {error}" if isinstance(error, WrongPart) else
                         f"{name} {reprlib.repr(value)}, but it must be {kind.wanted}")
                raise UserError(f"{path} has {wrong}; correct it, or fetch the file again") from None
    return values
