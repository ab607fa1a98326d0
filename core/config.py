"""Settings: dataclasses with the limits of their fields, read from a RECIPE.toml and written as one.

Each file declares the dataclass of its own settings and `train.py` composes them. A recipe replaces defaults, and the
command line (core/cli.py) replaces both. An unknown key is an error that names the nearest known one.
"""

import copy
import dataclasses
import json
import math
import operator
import re
import reprlib
import tomllib
import types
import typing
from pathlib import Path

from core.errors import UserError, nearest

RECIPE_BYTES = 1 << 20
RULES = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}


def setting(default, **limits):
    """A dataclass field with its limits, which are RULES, beside it: `keep: int = setting(3, above=0)`."""
    assert limits.keys() <= RULES.keys(), f"no rule is called {limits.keys() - RULES.keys()}"
    # Each instance gets a list of its own.
    start = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**start, metadata={"limits": limits})


def check_limits(config, prefix: str = "", option_of=str) -> None:
    """UserError for the first setting outside the limits of its field, with its dotted name: the one place that checks.

    None is a setting that was not given. `option_of` turns a name into the word that the user typed.
    """
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        nested = {f".{quote_key(key)}": each for key, each in value.items()} if isinstance(value, dict) else {"": value}
        for key, entry in nested.items():
            if dataclasses.is_dataclass(entry):
                check_limits(entry, f"{prefix}{item.name}{key}.", option_of)
        for each in value if isinstance(value, (list, tuple)) else [value]:
            check_value(option_of(prefix + item.name), each, item.metadata.get("limits", {}))


def check_value(name: str, value, limits: dict) -> None:
    """UserError where a value breaks one of its limits, or is a number that no setting can mean."""
    # A NaN breaks every rule, because each comparison with it is false.
    if value is not None and not all(RULES[rule](value, limit) for rule, limit in limits.items()):
        wanted = " and ".join(f"{rule.replace('_', ' ')} {limit:g}" for rule, limit in limits.items())
        raise UserError(f"{name} is {reprlib.repr(value)}, but must be {wanted}")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{name} holds a null character; leave it out")
    if isinstance(value, (int, float)) and not abs(value) < 2**63:
        raise UserError(f"{name} is {reprlib.repr(value)}, but must be a number below 2^63")


def is_on(section) -> bool:
    """Whether a section's first setting, its switch, has another value than its default, which turns it off."""
    switch = next(iter(vars(section)))
    return getattr(section, switch) != getattr(type(section)(), switch)


def refuse_unused(section, name: str) -> None:
    """UserError where settings of `section` were changed while its first one has the default, which turns it off."""
    changed = [key for key, value in vars(type(section)()).items() if getattr(section, key) != value]
    if changed and changed[0] != (switch := next(iter(vars(section)))):
        raise UserError(f"{name}.{changed[0]} is {getattr(section, changed[0])}, but {name} is off, so it would do "
                        f"nothing; set {name}.{switch}, or leave it out")


def read_toml(path: str) -> dict:
    try:
        if not Path(path).is_file() or Path(path).stat().st_size > RECIPE_BYTES:
            what = "too large for a recipe" if Path(path).is_file() else "no file"
            raise UserError(f"recipe {path} " + (f"is {what}" if Path(path).exists() else "does not exist")
                            + "; recipes/ holds complete ones")
        # Editors on Windows put a byte order mark first.
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        # Also brackets a thousand deep, and an integer of more than 4,300 digits.
        raise UserError(f"recipe {path} is not valid TOML: {error}") from None


def merge(default, values: dict, prefix: str = "", known=None):
    """A copy of the dataclass `default` with the nested `values` in it; UserError for unknown keys and wrong types.

    known: the dotted names of all settings, from which the nearest to an unknown one is named; default: of `default`.
    """
    result, known = copy.deepcopy(default), known or setting_names(type(default))
    hints = typing.get_type_hints(type(result))
    for key, value in values.items():
        name = prefix + quote_key(key)
        if key not in hints:
            raise UserError(f"unknown key {name}{nearest(name, known)}")
        setattr(result, key, _convert(value, hints[key], getattr(result, key), name, known))
    return result


def _convert(value, hint, current, name, known):
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    is_section = dataclasses.is_dataclass(hint)
    if (is_section or origin is dict) and not isinstance(value, dict):
        kind = "section" if is_section else "table of named sections"
        raise UserError(f"{name} is a {kind}, but its value is {reprlib.repr(value)}")
    if is_section:
        return merge(current if dataclasses.is_dataclass(current) else hint(), value, name + ".", known)
    if origin is dict:
        return current | {key: _convert(entry, arguments[1], current.get(key), f"{name}.{quote_key(key)}", known)
                          for key, entry in value.items()}
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{name} is {reprlib.repr(value)}, but must be one of {', '.join(map(str, arguments))}")
        return value
    if origin in (tuple, list) and isinstance(value, list):
        return origin(_convert(v, arguments[0], None, name, known) for v in value)
    allowed = arguments if origin in (typing.Union, types.UnionType) else (hint,)
    if type(value) is int and float in allowed:
        return float(value)
    if type(value) not in allowed:
        wanted = " or ".join(option.__name__ for option in allowed if option is not type(None))
        raise UserError(f"{name} is {reprlib.repr(value)}, but must be of type {wanted}")
    return value


def setting_names(cls, prefix: str = "") -> list[str]:
    """The dotted names of the sections and settings of a dataclass; NAME stands for the names of named sections."""
    names = []
    for key, hint in typing.get_type_hints(cls).items():
        section, inner = (typing.get_args(hint)[1], ".NAME") if typing.get_origin(hint) is dict else (hint, "")
        names.append(prefix + key)
        if dataclasses.is_dataclass(section):
            names += setting_names(section, f"{prefix}{key}{inner}.")
    return names


def tables(config, prefix: str = ""):
    """Yield (dotted name, {name: section}, class of a section) of each table of named sections."""
    hints = typing.get_type_hints(type(config))
    for key, value in vars(config).items():
        if isinstance(value, dict):
            yield prefix + key, value, typing.get_args(hints[key])[1]
        elif dataclasses.is_dataclass(value):
            yield from tables(value, f"{prefix}{key}.")


def quote_key(name: str) -> str:
    """A name as a key of TOML: in quotes where it holds more than A-Z, a-z, 0-9, `_` and `-`."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_value(name)


def unquote_key(text: str) -> str:
    """The name that a key of TOML stands for; a text that is no key in quotes stands for itself."""
    if not re.fullmatch(r"""(["']).*\1""", text, re.S):
        return text
    try:
        return tomllib.loads(f"name = {text}")["name"]
    except tomllib.TOMLDecodeError:
        return text


def _toml_value(value) -> str:
    """`value` as JSON, which TOML reads, but infinity, NaN and the one control character that JSON does not escape."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def to_toml(config, prefix: str = "") -> str:
    """The dataclass as TOML text that `parse` reads back to an equal one (a None is left out: it is the default)."""
    lines, sections = [], []
    for key, value in (config if isinstance(config, dict) else vars(config)).items():
        name = quote_key(key)
        if dataclasses.is_dataclass(value) or isinstance(value, dict):
            sections.append(f"\n[{prefix}{name}]\n{to_toml(value, f'{prefix}{name}.')}")
        elif value is not None:
            lines.append(f"{name} = {_toml_value(value)}\n")
    return "".join(lines) + "".join(sections)
