"""The settings files of a model folder, each field that we read typed once: no reader meets a list for a table.

Numbers written as text are numbers ("10000.0"), and 32.0 is a whole one; a token may be an object with its content.
"""

import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from core.errors import UserError
from core.files import read_json


class Kind(NamedTuple):
    # What a value must be, in words for a message.
    wanted: str
    # From a value to the typed value. It raises one of WRONG where the value is not of this kind.
    convert: Callable


WRONG = (TypeError, ValueError, KeyError, AttributeError, OverflowError)


def _number(value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
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


def _record(fields: dict[str, Kind], needs=()) -> Kind:
    def convert(value):
        if any(value[name] is None for name in needs):
            raise ValueError
        return value | {name: fields[name].convert(each) for name, each in value.items()
                        if name in fields and each is not None}
    return Kind(f"an object with {', '.join(needs or fields)} of the right types", convert)


NUMBER, WHOLE = Kind("a number", _number), Kind("a whole number", _whole)
FLAG, TEXT = Kind("true or false", _flag), Kind("text", _text)
TOKEN = Kind("a token or an object with its content",
             lambda value: _text(value["content"] if isinstance(value, dict) else value))
IDS = _either(WHOLE, _many(WHOLE))
ROPE = {**dict.fromkeys(("factor", "rope_theta", "partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow",
                         "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor"), NUMBER),
        **dict.fromkeys(("short_factor", "long_factor"), _many(NUMBER)), "original_max_position_embeddings": WHOLE,
        "truncate": FLAG, "type": TEXT, "rope_type": TEXT}
ROLE_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), IDS)
ROLE_TOKENS = {**dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token", "mask_token"), TOKEN),
               "additional_special_tokens": _many(TOKEN)}
# The kind of every field of a file whose fields have no fixed names.
ANY = "*"
FILES = {
    "config.json": {
        **ROLE_IDS, **dict.fromkeys(("model_type", "hidden_act", "dtype", "torch_dtype"), TEXT),
        **dict.fromkeys((
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings",
            "sliding_window", "max_window_layers", "no_rope_layer_interval"), WHOLE),
        **dict.fromkeys(("rms_norm_eps", "initializer_range", "rope_theta", "partial_rotary_factor"), NUMBER),
        **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), FLAG),
        "layer_types": _many(TEXT), "no_rope_layers": _many(WHOLE),
        "rope_scaling": _record(ROPE), "rope_parameters": _record(ROPE)},
    "generation_config.json": ROLE_IDS,
    "tokenizer_config.json": {
        **ROLE_TOKENS, "add_bos_token": FLAG, "tokenizer_class": TEXT,
        "added_tokens_decoder": _table(_record({"content": TEXT, "special": FLAG}, needs=["content"]), _whole)},
    "special_tokens_map.json": ROLE_TOKENS,
    "added_tokens.json": {ANY: WHOLE}, "vocab.json": {ANY: WHOLE},
    "adapter_config.json": {
        **dict.fromkeys(("peft_type", "bias"), TEXT), **dict.fromkeys(("r", "lora_alpha", "lora_dropout"), NUMBER),
        **dict.fromkeys(("use_rslora", "use_dora", "ensure_weight_tying"), FLAG), "alpha_pattern": _table(NUMBER),
        "trainable_token_indices": _either(_many(WHOLE), _table(_many(WHOLE)))},
}


def read_settings(path: Path, needed: bool = False) -> dict:
    """The object in a settings file, typed by the file's name; {} for a missing one that is not `needed`. UserError for
    a file that is no JSON object, and for a field of a wrong type. A null is None whatever its field."""
    if not (needed or path.is_file()):
        return {}
    values, fields = read_json(path, dict), FILES[path.name]
    for name, value in values.items():
        kind = fields.get(name, fields.get(ANY))
        if kind and (value is not None or ANY in fields):
            try:
                values[name] = kind.convert(value)
            except WRONG:
                raise UserError(f"{path} has {name} {reprlib.repr(value)}, but it must be {kind.wanted}; correct it, "
                                f"or fetch the file again") from None
    return values
