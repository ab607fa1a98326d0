"""Files of a model, tokenizer or adapter folder, which a stranger may have made: what may be read, and how far.

A file belongs to a folder if it is a regular file there, or a link to one there. A snapshot in the Hub's cache is
links to ../../blobs, which belongs to it. Any other link would bring what stands elsewhere on this machine into an
export, and a pipe or a device would be read for ever. Sizes are compared before a file is read, because a byte of JSON
may take thirty of memory. Weights are read through safetensors, or torch.load's weights_only, which takes no more.
"""

import collections
import contextlib
import functools
import gc
import json
import os
import pickle
import re
import reprlib
import warnings
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open

from core.errors import UserError

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer.tiktoken")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
TOKENIZER_FILES = (*VOCABULARIES, *TOKENIZER_SETTINGS, "config.json", "generation_config.json")
MODEL_FILES = (*TOKENIZER_FILES, *LICENCES, "README.md", "adapter_config.json", "*.safetensors", "*.bin",
               "*.safetensors.index.json", "*.bin.index.json")

# The largest settings file, and the largest tokenizer file, in bytes: DeepSeek-V3's index has 9 MB, Gemma 3's
# tokenizer.json 33.
SETTINGS, VOCABULARY = 32 << 20, 64 << 20
# The types of weights that have values of their own, as safetensors calls them.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def own_file(path: Path) -> Path | None:
    """`path`, or None where nothing is; UserError where it is no regular file, or a link out of its folder."""
    if not os.path.lexists(path):
        return None
    home, real = (Path(os.path.realpath(each)) for each in (path.parent, path))
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(each) for each in homes):
        raise UserError(f"{path} is a link to {real}, outside of its folder; put a copy of the file in its place")
    if not real.is_file():
        raise UserError(f"{path} is no regular file; put the file itself in its place")
    return path


def own_files(folder: Path, patterns) -> list[Path]:
    """The files of a folder that match one of the patterns, subfolders left out; UserErrors as in `own_file`."""
    found = [path for path in sorted(folder.iterdir()) if any(fnmatchcase(path.name, each) for each in patterns)]
    return [own_file(path) for path in found if not path.is_dir()]


def read_own(path: Path, most: int = SETTINGS) -> bytes:
    """The bytes of a file of at most `most` of them; UserErrors as in `own_file`, and where there is none."""
    if own_file(path) is None:
        raise UserError(f"{path} does not exist")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise UserError(f"{path} has more than {most >> 20} MB, far more than any that is known; fetch it again")
    return data


@contextlib.contextmanager
def without_collector():
    """While JSON is read: Python would look through millions of new lists again and again, and find nothing lost."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def read_own_json(path: Path, most: int = SETTINGS) -> dict:
    """The object in a JSON file; UserErrors as in `read_own`, and for what no reader takes in one way."""
    data = read_own(path, most)
    try:
        with without_collector():
            value = json.loads(data.decode(), object_pairs_hook=_take_pairs)
        if re.search(rb"\\u[dD][89abAB]", data):
            # Half a surrogate pair could be read and never written again.
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise UserError(f"{path} is nested too deeply; make or fetch it again") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}; make or fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object of named values")
    return value


def find_odd(value, shape, place: str = "") -> str | None:
    """Where a JSON value is not as `shape` says, in words, such as "guard.window.3 'a'"; None where all of it is.

    A shape is a type (float: any number), None, a function of the value, (shape, ...) for one of several, [shape] for
    a list, or {name: shape} for an object with just these names, to which the name `str` adds any others.
    """
    def find_within(items):
        found = (find_odd(each, kind, f"{place}.{name}".lstrip(".")) for name, each, kind in items)
        return next(filter(None, found), None)
    if isinstance(shape, list) and type(value) is list:
        return find_within((i, each, shape[0]) for i, each in enumerate(value))
    if isinstance(shape, dict) and type(value) is dict:
        lost = next((name for name in shape if name is not str and name not in value), None)
        return f"no {place}.{lost}".replace(" .", " ") if lost else find_within(
            (name, each, shape.get(name, shape.get(str, lambda _: False))) for name, each in value.items())
    if isinstance(shape, tuple):
        fits = any(find_odd(value, each) is None for each in shape)
    elif shape is float:
        fits = type(value) is float or (type(value) is int and abs(value) < 2**63)
    elif isinstance(shape, type):
        fits = type(value) is shape
    else:
        fits = shape(value) if callable(shape) else shape is value is None
    return None if fits else f"{place} {reprlib.repr(value)}"


def _take_pairs(pairs: list) -> dict:
    taken = dict(pairs)
    if len(taken) < len(pairs):
        (name, _), = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it gives {reprlib.repr(name)} twice")
    return taken


# ---- weights

def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def list_tensors(path: Path) -> list[str]:
    with open_tensors(path) as file:
        return list(file.keys())


def open_tensors(path: Path):
    """A context with keys(), get_tensor(name), and get_slice(name), which knows shape and dtype without reading;
    UserError where the file is damaged or holds more than tensors."""
    if own_file(path) is None:
        raise UserError(f"{path} does not exist; the download is incomplete")
    try:
        if path.suffix != ".bin":
            return safe_open(path, framework="pt")
        return contextlib.nullcontext(_open_pickle(path))
    except (SafetensorError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or cut short: {first_line(error)}") from None
    except pickle.UnpicklingError:
        # PyTorch's own text advises to load it nevertheless.
        raise UserError(f"{path} is refused, it holds more than tensors: its code would run; take a model in "
                        f"safetensors") from None
    except Exception as error:
        # A broken pickle raises what it likes.
        raise UserError(f"{path} is refused, it holds more than tensors: {first_line(error)}") from None


def _open_pickle(path: Path) -> SimpleNamespace:
    names = {dtype: name for name, dtype in FLOATS.items()}
    tensors = load_pickle(path, path.stat().st_mtime_ns)
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_meta or (
                tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()):
            raise TypeError(f"{name} has more elements than the file holds")
    return SimpleNamespace(keys=tensors.keys, get_tensor=tensors.__getitem__, get_slice=lambda name: SimpleNamespace(
        get_shape=lambda: list(tensors[name].shape), get_dtype=lambda: names.get(tensors[name].dtype, "other")))


# One file: `fill` asks for each tensor by itself, and a file of torch before 1.6 is read as a whole each time.
@functools.lru_cache(maxsize=1)
def load_pickle(path: Path, changed: int) -> dict:
    """The tensors of a .bin, mapped where its format allows that; changed: when the file was, for the cache."""
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
        # torch.save stores its records as they are.
        if any(each.compress_type for each in records) or sum(each.file_size for each in records) > os.path.getsize(
                path):
            raise TypeError("its records are compressed, or larger than the file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def check_tensor(opened, name: str, file: Path, shape) -> None:
    """UserError where a tensor of an open file has no values of its own, or another shape (None: any). Reads the header
    alone."""
    stored = opened.get_slice(name)
    if stored.get_dtype() not in FLOATS:
        raise UserError(f"{name} in {file} is {stored.get_dtype()}, as quantised weights are; take the full-precision "
                        f"model that they were made from")
    if shape is not None and stored.get_shape() != list(shape):
        raise UserError(f"{name} in {file} has shape {stored.get_shape()}, but config.json makes it {list(shape)}")


def read_tensor(name: str, file: Path, shape, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One tensor of a file, with values that `dtype` (default: its own) can hold; UserErrors as in `check_tensor`.

    The file is opened for each tensor, because closing it frees the pages of the last one."""
    with open_tensors(file) as opened:
        check_tensor(opened, name, file, shape)
        tensor = opened.get_tensor(name)
    largest = torch.finfo(dtype or tensor.dtype).max
    low, high = torch.aminmax(tensor) if tensor.numel() else (0, 0)
    # A NaN fails each comparison.
    if not (-largest <= low and high <= largest):
        raise UserError(f"{name} in {file} has NaN or infinite values, or some above {largest:.3g}; no model is made "
                        f"of them")
    return tensor
