"""Model, tokenizer and adapter folders as a hostile stranger would make them, as data: CASES.

Each case is a copy of a good folder (`make_templates`) with one thing spoilt, the command that is pointed at it, and
what its one line must name. Every one is to end with status 2 and one line, within 10 s and 2 GB; no code in it runs,
which the file `canary` would show, and the file `secret.txt`, which stands outside, is neither read nor copied.
"""

import base64
import itertools
import json
import os
import pickle
import re
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from vocabularies import make_small_bases

import data
import eval as evaluation
import forget
import generate
import hf
import lora
import tokenizer
import train
from core.settings_files import FILES, ROPE
from learn import peft_files
from model import Model, ModelConfig
from text.vocabulary_files import write_field, write_varint

from . import harness
from .harness import Lab, Outcome, Row, run, start, timed

# Imported once, here, and not by each forked process.
COMMANDS = data, evaluation, forget, generate, lora, tokenizer, train
SECRET = "what stands outside of the folder: 5f2c91"


@dataclass
class Case:
    name: str
    # The good folder that it is made of, see make_templates.
    template: str
    # spoil(folder, home): home holds the templates, secret.txt and, where code ran, canary.
    spoil: Callable[[Path, Path], object]
    # The command, a word each; {folder}, {home} and {out} are filled in.
    words: str
    # What the line must hold.
    says: str

    def fill(self, home: Path, room: Path) -> tuple[str, list[str]]:
        """Make the folder under `room`; -> (module, words)."""
        folder = room / "folder"
        shutil.copytree(home / self.template, folder)
        self.spoil(folder, home)
        module, *words = self.words.split()
        return module, [word.format(folder=folder, home=home, out=room / "out") for word in words]


EVAL = "eval --model {folder} --text t={home}/text.txt"
GENERATE = "generate --model {folder} --prompt ab --max-new-tokens 2 --temperature 0"
ENCODE = "tokenizer encode ab --tokenizer {folder}"
REPORT = "tokenizer report --tokenizer {folder} --domain {home}/text.txt"
EXTEND = "tokenizer extend --tokenizer {folder} --new-tokens 4 --min-count 2 --out {out} {home}/text.txt"
PACK = "data pack --tokenizer {folder} --out {out} {home}/text.txt"
MERGE = "lora merge --base {home}/model --adapter {folder} --out {out}"
BLEND = "forget merge --base {home}/model --model {folder} --alpha 0.5 --out {out}"
TRAIN = (
    "train --model.path {folder} --data.sources.d.path {home}/shards --train.steps 1 --out {out} "
    "--data.sources.d.max-epochs 999"
)
CASES: list[Case] = []


def case(name: str, words: str, says: str, template: str = "model"):
    def add(spoil):
        CASES.append(Case(name, template, spoil, words, says))
        return spoil

    return add


def make_templates(home: Path) -> None:
    """Good folders: `model` with a tokenizer.json, `bin` (the same as a pickle), `pieces` with SentencePiece, `gpt2`
    with vocab.json and merges.txt, and an `adapter` for `model`."""
    home.mkdir(parents=True, exist_ok=True)
    bases = make_small_bases(home / "bases")
    (home / "text.txt").write_text("The tenant shall not be liable for rent.\n\nThe estate, the tenant.\n" * 20)
    (home / "secret.txt").write_text(SECRET)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    for name, base in (("model", "small bytes"), ("pieces", "small pieces")):
        model = Model(ModelConfig(vocab_size=310, **sizes))
        model.initialise(0)
        hf.save(model, home / name, tokenizer=bases[base])
        (home / name / "LICENSE").write_text("Apache-2.0")
    shutil.copytree(home / "model", home / "bin")
    torch.save(load_file(home / "bin/model.safetensors"), home / "bin/pytorch_model.bin")
    (home / "bin/model.safetensors").unlink()
    described = json.loads((home / "model/tokenizer.json").read_text())["model"]
    shutil.copytree(home / "model", home / "gpt2", ignore=shutil.ignore_patterns("tokenizer*"))
    (home / "gpt2/vocab.json").write_text(json.dumps(described["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["merges"]]
    roles = json.loads((home / "model/tokenizer_config.json").read_text())
    (home / "gpt2/tokenizer_config.json").write_text(
        json.dumps({key: roles[key] for key in ("bos_token", "eos_token") if key in roles})
    )
    (home / "gpt2/merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    model = hf.load(home / "model")
    lora.attach(model, lora.LoraConfig(rank=4), 0)
    peft_files.save_adapter(model, home / "adapter", "base")


# ---- how a folder is spoilt


def edit(file: str, drop=(), **changes):
    """A spoiler: these fields of a JSON file are other ones, or are gone."""

    def spoil(folder: Path, home: Path):
        values = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps({k: v for k, v in (values | changes).items() if k not in drop}))

    return spoil


def raw(file: str, field: str, text: str):
    """A spoiler: a field of a JSON file has a value that is spelt as `text`, which need not be JSON."""

    def spoil(folder: Path, home: Path):
        values = json.loads((folder / file).read_text())
        marked = json.dumps({**values, field: "@@@"})
        (folder / file).write_text(marked.replace('"@@@"', text))

    return spoil


def write(file: str, data: bytes | str):
    def spoil(folder: Path, home: Path):
        (folder / file).write_bytes(data if isinstance(data, bytes) else data.encode())

    return spoil


def large(file: str, megabytes: int):
    """A spoiler: so large a file, which takes no room on the disk."""

    def spoil(folder: Path, home: Path):
        (folder / file).write_bytes(b"{")
        os.truncate(folder / file, megabytes << 20)

    return spoil


def link(file: str, target: str):
    """A spoiler: the file is a link. {home} is filled in."""

    def spoil(folder: Path, home: Path):
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target.format(home=home))

    return spoil


def pipe(file: str):
    def spoil(folder: Path, home: Path):
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return spoil


def move_out(file: str):
    """A spoiler: a good file is elsewhere, and a link to it in its place."""

    def spoil(folder: Path, home: Path):
        target = folder.parent / "elsewhere"
        shutil.move(folder / file, target)
        (folder / file).symlink_to(target)

    return spoil


def tensors(change, file: str = "model.safetensors"):
    """A spoiler: change(tensors) of a safetensors file."""

    def spoil(folder: Path, home: Path):
        held = load_file(folder / file)
        held = change(held) or held
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / file)

    return spoil


def header(change, file: str = "model.safetensors"):
    """A spoiler: change(header, data) -> (header as dict or bytes, data) of a safetensors file."""

    def spoil(folder: Path, home: Path):
        blob = (folder / file).read_bytes()
        size = struct.unpack("<Q", blob[:8])[0]
        head, data = change(json.loads(blob[8 : 8 + size]), blob[8 + size :])
        head = head if isinstance(head, bytes) else json.dumps(head).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(head)) + head + data)

    return spoil


def first(head: dict) -> str:
    return next(name for name in head if name != "__metadata__")


def shifted(begin: int, end: int):
    """A change of a header: the first tensor's bytes lie elsewhere."""

    def change(head, data):
        a, b = head[first(head)]["data_offsets"]
        head[first(head)]["data_offsets"] = [a + begin, b + end]
        return head, data

    return change


def of_first(**fields):
    def change(head, data):
        head[first(head)] |= fields
        return head, data

    return change


def put(value: float, name: str = "model.layers.0.mlp.up_proj.weight"):
    """A change of tensors: one value of one is another."""

    def change(held):
        held[name].view(-1)[7] = value

    return change


def tokenizer_part(**parts):
    """A spoiler: parts of tokenizer.json are other ones; "model.vocab" is the vocab of its model."""

    def spoil(folder: Path, home: Path):
        values = json.loads((folder / "tokenizer.json").read_text())
        for name, part in parts.items():
            place, name = (values["model"], name[6:]) if name.startswith("model_") else (values, name)
            place[name] = part(place.get(name)) if callable(part) else part
        (folder / "tokenizer.json").write_text(json.dumps(values))

    return spoil


def split_by(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern: str, content: str, kind: str = "String") -> dict:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def added(content: str, i: int) -> dict:
    return {
        "id": i,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


class Code:
    """Unpickled, it runs."""

    def __init__(self, home):
        self.home = home

    def __reduce__(self):
        return os.system, (f"touch {self.home}/canary",)


# ---- safetensors

for name, change, says in (
    ("offsets beyond the file", shifted(0, 1 << 40), "model.safetensors is damaged"),
    ("offsets of 2^63", shifted(0, 1 << 63), "model.safetensors is damaged"),
    ("offsets that overlap", shifted(0, 4), "model.safetensors is damaged"),
    ("offsets with a hole", shifted(4, 4), "model.safetensors is damaged"),
    ("offsets backwards", shifted(1 << 20, 0), "model.safetensors is damaged"),
    ("negative offsets", of_first(data_offsets=[-8, 8]), "model.safetensors is damaged"),
    ("offsets as text", of_first(data_offsets=["0", "8"]), "model.safetensors is damaged"),
    ("an unknown dtype", of_first(dtype="Q9"), "model.safetensors is damaged"),
    ("a shape that is not the bytes", of_first(shape=[3, 3]), "model.safetensors is damaged"),
    ("a shape of 2^80 elements", of_first(shape=[1 << 40, 1 << 40]), "model.safetensors is damaged"),
    ("a shape of 1e30", of_first(shape=[10**30]), "model.safetensors is damaged"),
    ("negative shape", of_first(shape=[-1, 4]), "model.safetensors is damaged"),
    ("cut short", lambda head, data: (head, data[:-5]), "model.safetensors is damaged"),
    ("bytes behind the end", lambda head, data: (head, data + b"x" * 9), "model.safetensors is damaged"),
    ("a header that is no object", lambda head, data: (b"[1, 2]", data), "model.safetensors is damaged"),
    ("a header that is no JSON", lambda head, data: (b"\xff\xfe{", data), "model.safetensors is damaged"),
    ("a deep header", lambda head, data: (b'{"a":' * 100_000, data), "model.safetensors is damaged"),
    ("deep metadata", lambda head, data: (head | {"__metadata__": {"a": [[[]]]}}, data), "is damaged"),
    (
        "a key twice",
        lambda head, data: (
            json.dumps(head)[:-1].encode()
            + b","
            + json.dumps({first(head): {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})[1:].encode(),
            data,
        ),
        "model.safetensors",
    ),
    ("an empty header", lambda head, data: (b"{}", b""), "lacks tensors the model needs"),
    (
        "100,000 tensors",
        lambda head, data: (
            head | {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)},
            data,
        ),
        "no place for",
    ),
):
    case(f"safetensors: {name}", EVAL, says)(header(change))
for name, blob in (
    ("nothing", b""),
    ("7 bytes", b"1234567"),
    ("a header size of 2^63", struct.pack("<Q", 1 << 63)),
    ("a header size of 2^64 - 1", b"\xff" * 8 + b"{}"),
    ("a header larger than the file", struct.pack("<Q", 1 << 30) + b"{}"),
    ("a header of no bytes", bytes(8)),
    ("a zip", b"PK\x03\x04" + bytes(64)),
    ("a Git LFS pointer", b"version https://git-lfs.github.com/"),
):
    case(f"safetensors: {name}", EVAL, "model.safetensors is damaged")(write("model.safetensors", blob))
for value, label in ((float("nan"), "NaN"), (float("inf"), "Infinity"), (-float("inf"), "-Infinity")):
    for words, command in ((EVAL, "eval"), (GENERATE, "generate"), (BLEND, "forget merge"), (TRAIN, "train")):
        case(f"safetensors: {label} in a weight, {command}", words, "has NaN or infinite values")(tensors(put(value)))
case("safetensors: values that fp16 cannot hold", GENERATE + " --dtype fp16", "some above 6.55e+04")(tensors(put(1e30)))
for name, change, says in (
    ("a tensor twice", lambda held: held | {"norm.weight": held["model.norm.weight"].clone()}, "one tensor twice"),
    ("left over", lambda held: held | {"evil\x1b[2J": torch.ones(2)}, "no place for"),
    ("missing", lambda held: {key: t for key, t in held.items() if key != "model.norm.weight"}, "lacks tensors"),
    ("a wrong shape", lambda held: held | {"model.norm.weight": torch.ones(17)}, "has shape [17]"),
    ("a scalar", lambda held: held | {"model.norm.weight": torch.tensor(1.0)}, "has shape []"),
    ("integers", lambda held: held | {"model.norm.weight": torch.ones(16, dtype=torch.int8)}, "is I8"),
    ("complex numbers", lambda held: held | {"model.norm.weight": torch.ones(16, dtype=torch.complex64)}, "is C64"),
    ("float8", lambda held: held | {"model.norm.weight": torch.ones(16).to(torch.float8_e4m3fn)}, "is F8_E4M3"),
):
    case(f"tensors: {name}", EVAL, says)(tensors(change))


# ---- the index of shards


def index(weight_map):
    def spoil(folder: Path, home: Path):
        names = load_file(folder / "model.safetensors").keys()
        mapped = weight_map if not isinstance(weight_map, str) else dict.fromkeys(names, weight_map.format(home=home))
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapped}))

    return spoil


for name, weight_map, says in (
    ("../", "../model/model.safetensors", "points outside its folder"),
    ("..", "..", "points outside its folder"),
    ("an absolute path", "{home}/model/model.safetensors", "points outside its folder"),
    ("a subfolder", "a/shard.safetensors", "points outside its folder"),
    ("nothing", "", "points outside its folder"),
    (".", ".", "points outside its folder"),
    ("a NUL byte", "a\0b", "model.safetensors.index.json"),
    ("a name of 5,000 letters", "a" * 5000, "index.json"),
    ("what is missing", "gone.safetensors", "which is missing"),
    ("a list", [1, 2], "has no weight_map"),
    ("numbers", {"model.norm.weight": 3}, "has no weight_map"),
    ("an empty table", {}, "lacks tensors"),
    ("tensors that are not there", {"model.evil.weight": "shard.safetensors"}, "does not hold"),
):
    case(f"index: {name}", EVAL, says)(index(weight_map))
for name, make in (
    ("a folder", lambda path, home: path.mkdir()),
    ("a pipe", lambda path, home: os.mkfifo(path)),
    ("/dev/zero", lambda path, home: path.symlink_to("/dev/zero")),
    ("a link out of the folder", lambda path, home: path.symlink_to(home / "model/model.safetensors")),
):

    def spoil(folder: Path, home: Path, make=make):
        index("extra.safetensors")(folder, home)
        make(folder / "extra.safetensors", home)

    case(f"index: names {name}", EVAL, "extra.safetensors")(spoil)
case("index: nested 100,000 deep", EVAL, "nested too deeply")(
    write("model.safetensors.index.json", '{"weight_map": ' + "[" * 100_000)
)
case("index: of 40 MB", EVAL, "more than 32 MB")(large("model.safetensors.index.json", 40))


# ---- links, pipes and devices

for file in (
    "LICENSE",
    "NOTICE.txt",
    "README.md",
    "chat_template.jinja",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "model.safetensors",
    "USE_POLICY.md",
):
    case(f"link: {file} to a file outside", EVAL, f"{file} is a link to")(link(file, "{home}/secret.txt"))
for file, target in (
    ("LICENSE", "/etc/passwd"),
    ("NOTICE", "../../secret.txt"),
    ("config.json", "/proc/self/environ"),
    ("tokenizer.json", "/dev/zero"),
    ("model.safetensors", "/dev/zero"),
    ("README.md", "/dev/urandom"),
    ("LICENSE", "LICENSE"),
    ("config.json", "{home}/nowhere"),
):
    case(f"link: {file} to {target}", EVAL, file)(link(file, target))
for file in ("model.safetensors", "tokenizer.json", "config.json"):
    case(f"link: a good {file} that stands elsewhere", EVAL, "is a link to")(move_out(file))
for words, command in ((TRAIN, "train"), (GENERATE, "generate"), (BLEND, "forget merge")):
    case(f"link: LICENSE to a file outside, {command}", words, "LICENSE is a link to")(
        link("LICENSE", "{home}/secret.txt")
    )
for words, command in ((ENCODE, "encode"), (PACK, "pack"), (EXTEND, "extend"), (REPORT, "report")):
    case(f"link: chat_template.jinja to a file outside, {command}", words, "chat_template.jinja is a link to")(
        link("chat_template.jinja", "{home}/secret.txt")
    )
for file in ("model.safetensors", "config.json", "tokenizer.json", "LICENSE", "README.md", "generation_config.json"):
    case(f"pipe: {file}", EVAL, f"{file} is no regular file")(pipe(file))


# ---- config.json

NUMBERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "sliding_window",
    "max_window_layers",
    "no_rope_layer_interval",
    "rms_norm_eps",
    "initializer_range",
    "rope_theta",
    "partial_rotary_factor",
)
SPELT = ("-5", "NaN", "Infinity", "-Infinity", "1e400", "1e18", "1" + "0" * 400, '"many"', '"nan"', "[1]", "{}", "true")
assert set(NUMBERS) <= FILES["config.json"].keys()
for field, text in itertools.product(NUMBERS, SPELT):
    case(f"config.json: {field} {text[:12]}", EVAL, f"config.json has {field} ")(raw("config.json", field, text))
for field, value, says in (
    ("vocab_size", 0, "vocab_size"),
    ("vocab_size", 10**12, "vocab_size"),
    ("vocab_size", 311, "has shape"),
    ("vocab_size", 4_000_000, "has shape"),
    ("hidden_size", 1 << 20, "has shape"),
    ("hidden_size", 10**9, "hidden"),
    ("intermediate_size", 1 << 20, "has shape"),
    ("num_hidden_layers", 10**5, "num_hidden_layers"),
    ("num_hidden_layers", 999, "lacks tensors"),
    ("num_hidden_layers", 1, "no place for"),
    ("num_hidden_layers", 0, "num_hidden_layers"),
    ("num_attention_heads", 3, "has shape"),
    ("num_attention_heads", 0, "num_attention_heads"),
    ("num_key_value_heads", 3, "num_key_value_heads"),
    ("head_dim", 7, "head_dim is 7"),
    ("head_dim", 0, "head_dim"),
    ("head_dim", 1, "head_dim"),
    ("head_dim", 10**6, "head_dim"),
    ("rope_theta", 0, "rope_theta"),
    ("rope_theta", 1, "rope_theta"),
    ("model_type", "evil", "model_type"),
    ("model_type", "../../x", "model_type"),
    ("model_type", ["llama"], "text"),
    ("hidden_act", "exec", "hidden_act"),
    ("tie_word_embeddings", True, "tie_word_embeddings"),
    ("attention_bias", True, "lacks tensors"),
    ("attention_bias", [], "attention_bias"),
    ("torch_dtype", 7, "torch_dtype"),
    ("bos_token_id", 10**9, "bos_token_id"),
    ("eos_token_id", [2] * 4 + [-7], "eos_token_id"),
    ("no_rope_layers", [1e400], "no_rope_layers"),
    ("layer_types", [["x"]], "layer_types"),
):
    case(f"config.json: {field} {str(value)[:20]}", EVAL, says)(edit("config.json", **{field: value}))
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0] * 4,
    "original_max_position_embeddings": 32,
}
for name, rope, says in (
    ("an unknown type", {"rope_type": "evil"}, "rope_type 'evil'"),
    ("factor null", {"rope_type": "linear", "factor": None}, "needs factor"),
    ("factor missing", {"rope_type": "linear"}, "needs factor"),
    ("by layer type", {"full_attention": {"rope_type": "default"}}, "by layer type"),
    ("equal frequencies", LLAMA3 | {"high_freq_factor": 1.0}, "low_freq_factor"),
    ("an original length of 1", LLAMA3 | {"original_max_position_embeddings": 1}, "at least 2"),
    ("too many factors", LONG | {"long_factor": [1.0] * 400}, "400 values of long_factor"),
    ("factors null", LONG | {"long_factor": None}, "needs long_factor"),
    ("factors as text", LONG | {"long_factor": "1"}, "rope_scaling"),
    ("a factor of 0 among many", LONG | {"long_factor": [1.0, 0.0, 1.0, 1.0]}, "rope_scaling"),
    ("text", "yarn", "rope_scaling"),
    ("a list", [1], "rope_scaling"),
    ("two kinds", {"type": "linear", "rope_type": "yarn", "factor": 2.0}, "type linear"),
):
    case(f"rope: {name}", EVAL, says)(edit("config.json", rope_parameters=None, rope_theta=10000.0, rope_scaling=rope))
for field, text in itertools.product(
    [key for key in ROPE if "_factor" not in key[:6]], ("NaN", "1e400", "-1", "[[1]]")
):
    if field not in ("truncate", "type", "rope_type"):
        case(f"rope: {field} {text}", EVAL, "rope_scaling")(
            raw("config.json", "rope_scaling", json.dumps(LLAMA3 | {field: "@"}).replace('"@"', text))
        )
for name, text, says in (
    ("nothing", "", "is not valid JSON"),
    ("a list", "[1, 2]", "holds a list"),
    ("null", "null", "holds a NoneType"),
    ("cut short", '{"vocab_size": 3', "is not valid JSON"),
    ("nested 100,000 deep", '{"a":' * 100_000, "too deeply"),
    ("not UTF-8", b'{"a": "\xff\xfe"}', "is not valid JSON"),
    ("UTF-16", '{"a": 1}'.encode("utf-16"), "not valid"),
    ("NUL bytes", bytes(64), "is not valid JSON"),
    ("a key twice", '{"vocab_size": 3, "vocab_size": 310}', "twice"),
    ("half a surrogate pair", '{"theirs": "\\ud800"}', "is not valid JSON"),
    ("a number of a million digits", '{"vocab_size": ' + "9" * 1_000_000 + "}", "config.json"),
    ("an escape sequence as a key", '{"vocab_size": "\\u001b[2J\\u0007"}', "vocab_size"),
):
    case(f"config.json: {name}", EVAL, says)(write("config.json", text))
for file in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
    for name, text in (("a list", "[]"), ("deep", "[" * 100_000), ("cut short", "{"), ("not UTF-8", b"{\xff}")):
        case(f"{file}: {name}", GENERATE, file)(write(file, text))
for file, template, words in (
    ("config.json", "model", EVAL),
    ("generation_config.json", "model", GENERATE),
    ("tokenizer_config.json", "model", GENERATE),
    ("tokenizer.json", "model", ENCODE),
    ("tokenizer.model", "pieces", ENCODE),
    ("vocab.json", "gpt2", ENCODE),
    ("merges.txt", "gpt2", ENCODE),
    ("adapter_config.json", "adapter", MERGE),
):
    case(f"{file}: of 100 MB", words, f"{file} has more than", template)(large(file, 100))
for value in (10**9, -7, "</s>", [1e400], {"a": 1}, [[1]], 1.5):
    case(f"generation_config.json: eos_token_id {value}", GENERATE, "eos_token_id")(
        edit("generation_config.json", eos_token_id=value)
    )


# ---- pickles


def pickled(make):
    """A spoiler: pytorch_model.bin is what make(tensors, home) gives, as torch.save writes it."""

    def spoil(folder: Path, home: Path):
        file = folder / "pytorch_model.bin"
        torch.save(make(torch.load(file, weights_only=True), home), file)

    return spoil


@case("pickle: bare code", EVAL, "pytorch_model.bin", "bin")
def bare_code(folder, home):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Code(home)}))


@case("pickle: code in the oldest format", EVAL, "pytorch_model.bin", "bin")
def old_code(folder, home):
    torch.save({"a": Code(home)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


for name, make, says in (
    ("code beside tensors", lambda held, home: held | {"evil": Code(home)}, "is refused"),
    ("a list", lambda held, home: [torch.ones(2)], "pytorch_model.bin is refused"),
    ("a number", lambda held, home: held | {"a": 1}, "a is a int"),
    ("a nested table", lambda held, home: {"state_dict": held}, "state_dict is a dict"),
    ("a tensor on no device", lambda held, home: held | {"a": torch.ones(3, device="meta")}, "pytorch_model.bin"),
    ("a sparse tensor", lambda held, home: held | {"model.norm.weight": torch.ones(16).to_sparse()}, "model.norm"),
    ("an expanded tensor", lambda held, home: held | {"a": torch.ones(1).expand(1 << 40)}, "more elements"),
    ("integers", lambda held, home: held | {"model.norm.weight": torch.ones(16).int()}, "quantised weights"),
    ("NaN", lambda held, home: held | {"model.norm.weight": torch.full((16,), float("nan"))}, "NaN or infinite"),
):
    case(f"pickle: {name}", EVAL, says, "bin")(pickled(make))


def repacked(compression: int, change=lambda name, data: data):
    """A spoiler: the records of the zip that a .bin is are packed anew."""

    def spoil(folder: Path, home: Path):
        file = folder / "pytorch_model.bin"
        with zipfile.ZipFile(file) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, data in records.items():
                archive.writestr(name, change(name, data))

    return spoil


case("pickle: compressed records", EVAL, "pytorch_model.bin is refused", "bin")(repacked(zipfile.ZIP_DEFLATED))
case("pickle: a zip bomb", EVAL, "pytorch_model.bin is refused", "bin")(
    repacked(zipfile.ZIP_DEFLATED, lambda name, data: bytes(300 << 20) if name.endswith("data.pkl") else data)
)
case("pickle: records of nothing", EVAL, "pytorch_model.bin", "bin")(
    repacked(zipfile.ZIP_STORED, lambda name, data: b"")
)
case("pickle: cut short", EVAL, "pytorch_model.bin", "bin")(
    lambda folder, home: os.truncate(folder / "pytorch_model.bin", 900)
)
case("pickle: no zip", EVAL, "pytorch_model.bin", "bin")(write("pytorch_model.bin", b"PK\x03\x04" + b"x" * 99))
case("pickle: 100,000 nested lists", EVAL, "pytorch_model.bin", "bin")(
    write("pytorch_model.bin", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
)
case("pickle: a pipe", EVAL, "pytorch_model.bin", "bin")(pipe("pytorch_model.bin"))


# ---- tokenizer.json

TEMPLATE = {
    "type": "TemplateProcessing",
    "pair": [],
    "special_tokens": {},
    "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
}
for name, parts, says in (
    ("a regex that backtracks for ever", {"pre_tokenizer": split_by("(a+)+$|(1+)+$")}, "tokenizer.json"),
    ("another", {"pre_tokenizer": split_by("(a|aa)+b")}, "tokenizer.json"),
    ("a regex of cubic time", {"pre_tokenizer": split_by("(?:a*)(?:a*)(?:a*)(?:a*)(?=[0-9])")}, "tokenizer.json"),
    ("a regex that recurses", {"pre_tokenizer": split_by(r"(?<x>a|\g<x>b\g<x>)*c")}, "cannot be read"),
    ("a broken regex", {"pre_tokenizer": split_by("(a")}, "cannot be read"),
    ("a normaliser's regex", {"normalizer": replace("(a+)+$", "x", "Regex")}, "tokenizer.json"),
    (
        "a normaliser that doubles 40 times",
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [replace(chr(97 + i % 26), chr(97 + (i + 1) % 26) * 2) for i in range(40)],
            }
        },
        "times as long",
    ),
    (
        "normalisers nested 60 deep that double",
        {
            "normalizer": json.loads(
                '{"type": "Sequence", "normalizers": [' * 30 + json.dumps(replace("a", "a" * 200)) + "]}" * 30
            )
        },
        "times as long",
    ),
    ("a normaliser that puts in a million letters", {"normalizer": replace("zq", "x" * 10**6)}, "1,000,000"),
    ("a prefix of a million letters", {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}}, "1,000,000"),
    (
        "a decoder that doubles",
        {"decoder": {"type": "Sequence", "decoders": [replace("a", "a" * 20), replace("a", "a" * 20)]}},
        "a decoder that can make a text",
    ),
    (
        "normalisers nested 1,000 deep",
        {"normalizer": json.loads('{"type": "Sequence", "normalizers": [' * 150 + "]}" * 150)},
        "cannot be read",
    ),
    ("an unknown normaliser", {"normalizer": {"type": "Evil"}}, "cannot be read"),
    ("a broken character map", {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "cannot be"),
    (
        "a character map of junk",
        {
            "normalizer": {
                "type": "Precompiled",
                "precompiled_charsmap": base64.b64encode(b"\x08\0\0\0" + b"\xff" * 16).decode(),
            }
        },
        "tokenizer.json",
    ),
    ("pieces of length 0", {"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "fails on a short text"),
    ("a template without its token", {"post_processor": TEMPLATE}, "tokenizer.json"),
    (
        "a decoder that strips 10^18",
        {"decoder": {"type": "Strip", "content": "t", "start": 0, "stop": 10**18}},
        "fails on a short text",
    ),
    ("a decoder of no type", {"decoder": {"type": 3}}, "cannot be read"),
    ("an id of 1e9", {"model_vocab": lambda vocab: vocab | {"evil": 10**9}}, "has the id 1000000000"),
    ("an id of 2^32", {"model_vocab": lambda vocab: vocab | {"evil": 1 << 32}}, "cannot be read"),
    ("a negative id", {"model_vocab": lambda vocab: vocab | {"evil": -1}}, "cannot be read"),
    ("an id twice", {"model_vocab": lambda vocab: vocab | {"evil": 5}}, "gives the id 5"),
    ("no tokens", {"model_vocab": {}, "model_merges": [], "added_tokens": []}, "has no tokens"),
    ("a vocabulary of lists", {"model_vocab": {"a": [1]}}, "cannot be read"),
    ("a vocabulary that is a list", {"model_vocab": ["a", "b"]}, "cannot be read"),
    ("merges of missing pieces", {"model_merges": [["evil", "more evil"]]}, "cannot be read"),
    ("merges of three", {"model_merges": [["a", "b", "c"]]}, "cannot be read"),
    ("merges that are numbers", {"model_merges": [3]}, "cannot be read"),
    ("a token of 20,000 letters", {"added_tokens": lambda tokens: [*tokens, added("x" * 20_000, 305)]}, "20,000"),
    ("an added token that is a number", {"added_tokens": [{"id": 3, "content": 5}]}, "cannot be read"),
    ("an added id that is negative", {"added_tokens": [added("<x>", -1)]}, "cannot be read"),
    ("an unknown kind of model", {"model_type": "Evil"}, "cannot be read"),
    ("dropout NaN", {"model_dropout": "NaN"}, "cannot be read"),
):
    case(f"tokenizer.json: {name}", ENCODE, f"{says}")(tokenizer_part(**parts))
for name, text, says in (
    ("nothing", "", "cannot be read"),
    ("a list", "[]", "cannot be read"),
    ("deep", "[" * 100_000, "cannot be read"),
    ("cut short", '{"version": "1.0", "model": {', "cannot be read"),
    ("binary", bytes(range(256)), "cannot be read"),
):
    case(f"tokenizer.json: {name}", ENCODE, says)(write("tokenizer.json", text))
for words, command in (
    (PACK, "pack"),
    (REPORT, "report"),
    (EXTEND, "extend"),
    (EVAL, "eval"),
    (GENERATE, "generate"),
    (TRAIN, "train"),
):
    case(f"tokenizer.json: a regex that backtracks for ever, {command}", words, "tokenizer.json")(
        tokenizer_part(pre_tokenizer=split_by("(a+)+$|(1+)+$"))
    )
for field, value in (
    ("eos_token", {"foo": 1}),
    ("eos_token", "not there"),
    ("bos_token", ["<s>"]),
    ("added_tokens_decoder", [1]),
    ("added_tokens_decoder", {"1000000000": {"content": "<x>"}}),
    ("added_tokens_decoder", {"-1": {"content": "<x>"}}),
    ("added_tokens_decoder", {"1": {}}),
    ("added_tokens_decoder", {"1": {"content": 5}}),
    ("additional_special_tokens", "x"),
    ("add_bos_token", "perhaps"),
    ("tokenizer_class", ["x"]),
):
    case(f"tokenizer_config.json: {field} {value}", ENCODE, field)(edit("tokenizer_config.json", **{field: value}))


# ---- SentencePiece, tiktoken and GPT-2


def proto(change):
    """A spoiler: change(bytes) of a tokenizer.model."""

    def spoil(folder: Path, home: Path):
        file = folder / "tokenizer.model"
        file.write_bytes(change(file.read_bytes()))

    return spoil


piece = write_field(1, b"evil") + write_field(2, -1.0) + write_field(3, 1)
for name, change in (
    ("nothing", lambda data: b""),
    ("cut short", lambda data: data[: len(data) // 2]),
    ("one byte short", lambda data: data[:-1]),
    ("a length beyond the file", lambda data: data + b"\x0a\xff\x7f"),
    ("a length of 2^60", lambda data: data + b"\x0a" + write_varint(1 << 60)),
    ("an endless varint", lambda data: data + b"\x0a" + b"\xff" * 30),
    ("junk", lambda data: b"\xde\xad" * 999),
    ("a group", lambda data: data + b"\x0b\x0b"),
    ("wire type 7", lambda data: data + b"\x0f\x0f"),
    ("text", lambda data: b"hello\n"),
    ("JSON", lambda data: b"{}"),
    ("a piece twice", lambda data: data + 2 * write_field(1, piece)),
    ("an empty piece", lambda data: data + write_field(1, write_field(1, b""))),
    ("a Git LFS pointer", lambda data: b"version https://git-lfs.github.com/spec/v1\n"),
):
    case(f"tokenizer.model: {name}", ENCODE, "tokenizer.model", "pieces")(proto(change))
for words, command in ((EXTEND, "extend"), (REPORT, "report"), (EVAL, "eval")):
    case(f"tokenizer.model: cut short, {command}", words, "tokenizer.model", "pieces")(proto(lambda data: data[:-9]))
for values, says in (
    ({"<x>": 10**9}, "added_tokens.json has <x>"),
    ({"<x>": -1}, "<x>"),
    ({"<x>": 1.5}, "<x>"),
    ({"<x>": 5}, "<x>"),
    ({"<x>": [1]}, "<x>"),
    ({"<x>": "many"}, "<x>"),
    ({"<x>": 310}, "<x>"),
    ({"x" * 20_000: 311}, "ordinary token"),
):
    case(f"added_tokens.json: {str(values)[:30]}", ENCODE, says, "pieces")(edit("added_tokens.json", **values))
for name, text, says in (
    ("bad base64", "YQ== 0\nY!== 1\n", "line 2"),
    ("base64 of nothing", "YQ== 0\n= 1\n", "line 2"),
    ("a rank that is no number", "YQ== x\n", "tokenizer.model"),
    ("a negative rank", "YQ== 0\nYg== -1\n", "ranks"),
    ("a rank of 10^18", "YQ== 0\nYg== 1000000000000000000\n", "1 ranks"),
    ("a rank twice", "YQ== 0\nYg== 0\n", "ranks"),
    ("three words", "YQ== 0\nYg== 1 2\n", "line 2"),
    ("a rank of 10,000 digits", "YQ== 0\nYg== " + "1" * 10_000, "line 2"),
):
    case(f"tiktoken: {name}", ENCODE, says, "pieces")(write("tokenizer.model", text))
RANKS = [f"{base64.b64encode(i.to_bytes(3, 'big')).decode()} {i}" for i in range(128_000)]
case("tiktoken: an id of 10^9 behind the others", ENCODE, "1000000000", "pieces")(
    write("tokenizer.model", "\n".join([*RANKS, f"{base64.b64encode(b'evil evil').decode()} 1000000000"]))
)
for name, change, says in (
    ("an id of 1e9", {"Ġevil": 10**9}, "vocab.json has Ġevil"),
    ("a negative id", {"Ġevil": -1}, "vocab.json has"),
    ("an id twice", {"Ġevil": 5}, "gives the id 5"),
    ("an id that is text", {"Ġevil": "x"}, "vocab.json has Ġevil"),
    ("an id that is NaN", {"Ġevil": float("nan")}, "vocab.json has Ġevil"),
    ("an id of null", {"Ġevil": None}, "null"),
    ("a token of 20,000 letters", {"x" * 20_000: 306}, "20,000"),
):
    case(f"vocab.json: {name}", ENCODE, says.replace("null", "vocab.json"), "gpt2")(edit("vocab.json", **change))
for name, text, says in (
    ("a missing part", "evil more\n", "merges.txt"),
    ("one word", "evil\n", "merges.txt"),
    ("three words", "a b c\n", "merges.txt"),
    ("not UTF-8", b"\xff\xfe a\n", "is not UTF-8"),
    ("binary", bytes(999), "merges.txt"),
):
    case(f"merges.txt: {name}", ENCODE, says, "gpt2")(write("merges.txt", text))
case("merges.txt: a pipe", ENCODE, "merges.txt is no regular file", "gpt2")(pipe("merges.txt"))


# ---- adapters

ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
for field, text in itertools.product(("lora_alpha", "r", "lora_dropout"), SPELT):
    case(f"adapter: {field} {text[:12]}", MERGE, f"{ADAPTER} has {field} ", "adapter")(raw(ADAPTER, field, text))
for field, value, says in (
    ("lora_alpha", 0, "lora_alpha"),
    ("lora_alpha", 1e300, "lora_alpha"),
    ("lora_alpha", None, "lora_alpha"),
    ("r", 0, "r 0"),
    ("r", 10**9, "r 1000000000"),
    ("r", 1.5, "r 1.5"),
    ("r", 3, "has rank 4"),
    ("r", None, "say r"),
    ("lora_dropout", 1, "lora_dropout"),
    ("peft_type", "IA3", "peft_type"),
    ("peft_type", ["LORA"], "peft_type"),
    ("bias", "all", "bias"),
    ("use_dora", True, "missing is"),
    ("use_dora", "perhaps", "use_dora"),
    ("target_modules", {"a": 1}, "target_modules"),
    ("target_modules", [1], "target_modules"),
    ("target_modules", 7, "target_modules"),
    ("alpha_pattern", {"(a": 4}, "no regular expression"),
    ("alpha_pattern", {"*": 4}, "no regular expression"),
    ("alpha_pattern", {"a[b": 4}, "no regular expression"),
    ("alpha_pattern", {r"((.?){30}){30}\d\d\d\d": 4}, "could take for ever"),
    ("alpha_pattern", {"((a{1000}){1000}){1000}": 4}, "could take for ever"),
    ("alpha_pattern", {r"([a-z._]+)+\d": 4}, "could take for ever"),
    ("alpha_pattern", {r".*.*.*.*.*.*\d": 4}, "could take for ever"),
    ("alpha_pattern", {r"(\w+)\1\1\1\d": 4}, "could take for ever"),
    ("alpha_pattern", {"x" * 2000: 4}, "could take for ever"),
    ("alpha_pattern", {"(" * 900 + ")" * 900: 4}, "alpha_pattern"),
    ("alpha_pattern", {"q_proj": float("nan")}, "alpha"),
    ("alpha_pattern", {"q_proj": 1e300}, "alpha_pattern"),
    ("alpha_pattern", {"q_proj": 0}, "alpha_pattern"),
    ("alpha_pattern", ["q_proj"], "alpha_pattern"),
    ("alpha_pattern", {"q_proj": [1]}, "alpha_pattern"),
    ("alpha_pattern", {f"x{i}": 4 for i in range(100_000)}, "100,000 patterns"),
    ("alpha_pattern", {f".*.*.*.*x{i}": 4 for i in range(5_000)}, "take longer"),
    ("rank_pattern", {"q_proj": 0}, "rank_pattern"),
    ("rank_pattern", {"q_proj": 10**9}, "rank_pattern"),
    ("rank_pattern", {"q_proj": "x"}, "rank_pattern"),
    ("rank_pattern", [4], "rank_pattern"),
    ("fan_in_fan_out", True, "fan_in_fan_out"),
    ("init_lora_weights", "pissa", "init_lora_weights"),
    ("init_lora_weights", {"a": 1}, "init_lora_weights"),
    ("layer_replication", [[0, 9]] * 999, "layer_replication"),
    ("trainable_token_indices", [10**9], "trainable_token_indices"),
    ("trainable_token_indices", {"embed_tokens": ["x"]}, "trainable_token_indices"),
):
    case(f"adapter: {field} {str(value)[:30]}", MERGE, says, "adapter")(edit(ADAPTER, **{field: value}))
for name, change, says in (
    ("NaN in A", lambda held: held | {A: torch.full((4, 16), float("nan"))}, "has NaN or infinite values"),
    ("Infinity in B", lambda held: held | {B: torch.full((16, 4), float("inf"))}, "has NaN or infinite values"),
    ("A of another width", lambda held: held | {A: torch.ones(4, 17)}, "has shape [4, 17]"),
    ("A of another rank", lambda held: held | {A: torch.ones(3, 16), B: torch.ones(16, 3)}, "has rank 3"),
    ("A of 10^9 empty rows", lambda held: held | {A: torch.ones(10**9, 0)}, "has shape [1000000000, 0]"),
    ("A a scalar", lambda held: held | {A: torch.tensor(1.0)}, "has shape []"),
    ("A a row", lambda held: held | {A: torch.ones(16)}, "has shape [16]"),
    ("A of three dimensions", lambda held: held | {A: torch.ones(4, 16, 1)}, "has shape [4, 16, 1]"),
    ("A of integers", lambda held: held | {A: torch.ones(4, 16).int()}, "is I32"),
    ("B of another length", lambda held: held | {B: torch.ones(9, 4)}, "has shape [9, 4]"),
    ("B missing", lambda held: {key: t for key, t in held.items() if key != B}, "missing is"),
    ("left over", lambda held: held | {"evil": torch.ones(2)}, "left over is"),
    ("a name of nothing", lambda held: held | {"": torch.ones(2)}, "left over is"),
    ("a name of two lines", lambda held: held | {"a\nb.lora_A.weight": torch.ones(2)}, "left over is"),
    ("a name that is an escape", lambda held: held | {"\x1b]0;owned\x07": torch.ones(2)}, "left over is"),
    ("a layer twice", lambda held: held | {A.removeprefix("base_model.model."): held[A].clone()}, "left over is"),
    (
        "rows without their ids",
        lambda held: (
            held | {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 16)}
        ),
        "no trainable",
    ),
    (
        "an embedding of another size",
        lambda held: held | {"base_model.model.model.embed_tokens.weight": torch.ones(3, 16)},
        "has shape [3, 16]",
    ),
):
    case(f"adapter: {name}", MERGE, says, "adapter")(tensors(change, WEIGHTS))


def with_rows(ids, rows: int = 2):
    def spoil(folder: Path, home: Path):
        tensors(
            lambda held: (
                held
                | {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(rows, 16)}
            ),
            WEIGHTS,
        )(folder, home)
        edit(ADAPTER, trainable_token_indices={"embed_tokens": ids})(folder, home)

    return spoil


for name, ids, rows in (
    ("beyond the vocabulary", [5, 310], 2),
    ("twice", [5, 5], 2),
    ("fewer than rows", [5], 2),
    ("more than rows", [5, 6, 7], 2),
    ("none", [], 2),
):
    case(f"adapter: token ids {name}", MERGE, "trainable_token_indices", "adapter")(with_rows(ids, rows))
for name, blob in (
    ("nothing", b""),
    ("cut short", b"cut short"),
    ("a header size of 2^63", struct.pack("<Q", 1 << 63)),
    ("a zip", b"PK\x03\x04" + bytes(64)),
):
    case(f"adapter: {WEIGHTS} is {name}", MERGE, WEIGHTS, "adapter")(write(WEIGHTS, blob))
for name, text in (
    ("a list", "[]"),
    ("deep", '{"a":' * 100_000),
    ("cut short", "{"),
    ("a key twice", '{"r": 4, "r": 8}'),
):
    case(f"adapter: {ADAPTER} is {name}", MERGE, ADAPTER, "adapter")(write(ADAPTER, text))
for file, target in ((WEIGHTS, "{home}/secret.txt"), (ADAPTER, "{home}/secret.txt"), (WEIGHTS, "/dev/zero")):
    case(f"adapter: {file} is a link to {target}", MERGE, file, "adapter")(link(file, target))
case("adapter: weights that stand elsewhere", MERGE, "is a link to", "adapter")(move_out(WEIGHTS))
case("adapter: a pipe", MERGE, "no regular file", "adapter")(pipe(WEIGHTS))


@case("adapter: pickled weights alone", MERGE, "adapter_model.bin is not read", "adapter")
def pickled_adapter(folder, home):
    (folder / WEIGHTS).unlink()
    torch.save({"a": Code(home)}, folder / "adapter_model.bin")


@case("adapter: of another base, which it names by a path", MERGE, "trained on another base", "adapter")
def other_base(folder, home):
    edit(ADAPTER, base_model_name_or_path=f"{home}/secret.txt")(folder, home)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"base_fingerprint": "0" * 16})


@case("adapter: of a base that is to be fetched", MERGE, "trained on another base", "adapter")
def fetched_base(folder, home):
    edit(ADAPTER, base_model_name_or_path="hf://../../evil")(folder, home)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"base_fingerprint": "../../x\x1b[2J"})


# ---- pointing commands at them

# How long a case may take: in tests more, because they run beside others on machines that are busy.
SECONDS, BYTES = float(os.environ.get("NANOCPT_FAULT_SECONDS", 10)), 2 << 30


def prepare(home: Path) -> None:
    """The templates, and packed text for a training, made in a process of its own."""

    def make():
        torch.set_num_threads(1)
        make_templates(home)
        words = ["pack", "--tokenizer", home / "model", "--out", home / "shards", home / "text.txt"]
        return harness.command("data", words)

    made = run(make)
    assert made.status == 0, made.err


def point_at(case: Case, home: Path, room: Path) -> Outcome:
    """What the command makes of the case, in a process that says when it opens what stands outside."""
    module, words = case.fill(home, room)

    def work():
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(1)
        secret = os.path.realpath(home / "secret.txt")

        def hook(event, arguments):
            is_file = event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike))
            if is_file and os.path.realpath(arguments[0]) == secret:
                print(SECRET, file=sys.__stdout__)

        sys.addaudithook(hook)
        return harness.command(module, words)

    return start(work).wait(SECONDS + 20, 2 * BYTES)


def complain(case: Case, home: Path, room: Path) -> list[str]:
    """What is wrong with how the case ended; nothing where all is as it should be."""
    outcome = point_at(case, home, room)
    lines, said = outcome.err.splitlines(), outcome.err + outcome.out
    wrong = {
        f"status {outcome.status}": outcome.status != 2,
        "not one line": [line[:7] for line in lines] != ["error: "],
        f"does not name {case.says}": case.says not in outcome.err,
        "a line without end": len(said) > 20_000,
        "control characters": re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", said) is not None,
        f"{outcome.seconds:.1f} s": outcome.seconds > SECONDS,
        f"{outcome.peak_bytes >> 20} MB": outcome.peak_bytes > BYTES,
        "code of the stranger's ran": (home / "canary").exists(),
        "what stands outside was read": SECRET in said,
        "something was written": (room / "out").exists(),
    }
    (home / "canary").unlink(missing_ok=True)
    complaints = [complaint for complaint, is_so in wrong.items() if is_so]
    return complaints and [*complaints, str(outcome)]


def hostile_models(lab: Lab) -> Row:
    """A row of the suite's table."""
    row = Row("strangers", "models, tokenizers and adapters are refused in one line")
    home = lab.room("hostile")
    prepare(home)
    with timed(row):
        for case in CASES[:: lab.count(1, 60)]:
            room = lab.room()
            room.mkdir()
            complaints = complain(case, home, room)
            row.check(not complaints, f"{case.name}: {'; '.join(complaints)}")
            lab.clear(room)
    return row
