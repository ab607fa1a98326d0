"""Run folders as a stranger may hand them over, for train.py to go on with: data for the suite, a case each.

`Case(name, spoil, names)`: spoil(run, outside) changes a copy of a run that broke off after three saves, of which
adaptive replay has decided once; `outside` is a folder of the user's beside it. The line of the error must hold
`names`. An empty `names` is for what may be strange and does no harm: the run ends as one that nothing happened to.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from core import checkpoint

from .hostile_texts import DEEP, ESC, MARKUP, MB
from .results import checkpoints


class Case(NamedTuple):
    name: str
    spoil: Callable
    names: str


# ---- spoiling

def seal(folder: Path, **more):
    """Give a checkpoint the manifest of what it holds now, with `more` of its files' records."""
    files = {file.name: checkpoint.record_of(file) for file in folder.iterdir() if file.name != checkpoint.MANIFEST}
    (folder / checkpoint.MANIFEST).write_text(checkpoint.render(files | more))


def state(change: Callable) -> Callable:
    """The newest checkpoint's state.json, changed by change(value) and sealed; what it returns is written instead."""
    def spoil(run: Path, outside: Path):
        newest = checkpoints(run)[-1]
        value = json.loads((newest / checkpoint.STATE).read_text())
        written = change(value)
        text = written if isinstance(written, str) else json.dumps(value)
        (newest / checkpoint.STATE).write_text(text.replace("OUTSIDE", str(outside)))
        seal(newest)
    return spoil


def at(place: str, value) -> Callable:
    """A state in which `value` stands at a place such as guard.window."""
    def change(held):
        *above, last = place.split("/")
        for name in above:
            held = held[int(name) if isinstance(held, list) else name]
        held[last] = value
    return state(change)


def without(place: str) -> Callable:
    def change(held):
        *above, last = place.split("/")
        for name in above:
            held = held[name]
        del held[last]
    return state(change)


def evaluation(name: str) -> Callable:
    """A state with one more evaluation, of a file of this name."""
    return state(lambda held: held["evaluations"].update({name: held["evaluations"]["eval_step_0.json"]}))


def shard(change: Callable) -> Callable:
    """The first shard of the newest checkpoint, as change(bytes) makes it, sealed."""
    def spoil(run: Path, outside: Path):
        newest = checkpoints(run)[-1]
        file = sorted(newest.glob("shard-*"))[0]
        file.write_bytes(change(file.read_bytes()))
        seal(newest)
    return spoil


def header(change: Callable) -> Callable:
    """The same for its header, as change(object) leaves it."""
    def rewrite(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        held = json.loads(data[8:8 + size])
        change(held)
        text = json.dumps(held).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size:]
    return shard(rewrite)


def sharding(change: Callable) -> Callable:
    """The same for what PyTorch says in it of the shards, {tensor: {"saved_offsets"}}."""
    def rewrite(held):
        told = json.loads(held["__metadata__"]["DCP_SHARDING_INFO"])
        change(told)
        held["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(told)
    return header(rewrite)


def manifest(text) -> Callable:
    """A manifest of this text in every checkpoint, none of which can then be used."""
    def spoil(run: Path, outside: Path):
        for folder in checkpoints(run):
            made = text(json.loads((folder / checkpoint.MANIFEST).read_text())) if callable(text) else text
            (folder / checkpoint.MANIFEST).write_text(made)
    return spoil


def listed(**records) -> Callable:
    """Manifests that list these files too, and hash themselves rightly."""
    names = {name.replace("_up_", "../"): record for name, record in records.items()}
    return manifest(lambda held: checkpoint.render(held["files"] | names))


def put(name: str, content: bytes | str = b"") -> Callable:
    def spoil(run: Path, outside: Path):
        path = run / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return spoil


def append(name: str, content: bytes) -> Callable:
    def spoil(run: Path, outside: Path):
        with open(run / name, "ab") as file:
            file.write(content)
    return spoil


def sparse(name: str, size: int) -> Callable:
    def spoil(run: Path, outside: Path):
        path = next(run.glob(name), run / name)
        path.touch()
        os.truncate(path, size)
    return spoil


def link(name: str, target: str) -> Callable:
    def spoil(run: Path, outside: Path):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(target.replace("OUTSIDE", str(outside)))
    return spoil


def pipe(name: str) -> Callable:
    def spoil(run: Path, outside: Path):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        os.mkfifo(path)
    return spoil


def folder(name: str) -> Callable:
    def spoil(run: Path, outside: Path):
        (run / name).unlink(missing_ok=True)
        (run / name / "inner").mkdir(parents=True)
    return spoil


def deep_folder(name: str) -> Callable:
    """1,500 folders, one in another, with a file in the last."""
    def spoil(run: Path, outside: Path):
        (run / name).mkdir(parents=True, exist_ok=True)
        place = os.open(run / name, os.O_RDONLY)
        for _ in range(1_500):
            os.mkdir("d", dir_fd=place)
            inner = os.open("d", os.O_RDONLY, dir_fd=place)
            os.close(place)
            place = inner
        os.close(os.open("file.txt", os.O_CREAT | os.O_WRONLY, dir_fd=place))
        os.close(place)
    return spoil


def both(*spoils) -> Callable:
    return lambda run, outside: [spoil(run, outside) for spoil in spoils] and None


def step_leads_out(run: Path, outside: Path):
    """The step that is saved next is a link to the user's folder."""
    (run / "checkpoints/step_00000012").symlink_to(outside / "thesis")


def newest_stands_outside(run: Path, outside: Path):
    newest = checkpoints(run)[-1]
    shutil.move(newest, outside / newest.name)
    newest.symlink_to(outside / newest.name)


NUMBERS = [-1, 2**70, 1e308, float("nan"), float("inf"), True, None, "9", [9], {"a": 9}]
ODD = [None, True, -1, 2**70, 1e308, float("nan"), "words", ESC, [], [[[]]], {}, {"a": {"b": []}}]
FIELDS = ("step", "identity", "loss_scale", "guard", "methods", "decisions", "evaluations", "optim", "base")
EVALUATION = "evaluations/eval_step_0.json"
STATE, GOOD = checkpoint.STATE, "checkpoints/step_00000009"
DECISION = {"step": 8, "replay_share": 0.4, "reason": "r"}
PLACES = [
    *[(place, value) for place in FIELDS for value in ODD if not (place == "base" and isinstance(value, str))
      and not (place in ("decisions", "optim") and value in ([], {}))],
    *[(place, value) for place in ("loss_scale/scale", "loss_scale/good_steps", "guard/left_out", "guard/in_a_row",
                                   "methods/adaptive/level", "methods/adaptive/trend", "methods/adaptive/share")
      for value in NUMBERS if not (value is None and "share" in place) and not (
          place.endswith(("level", "trend")) and (isinstance(value, float) or value == -1))],
    *[("guard/window", value) for value in (1, [1], [[1]], [[1, 2, 3]], [["1", "2"]], [[1e308, 1.0]] * 99,
                                            [[float("nan"), 1.0]], [[None, 1.0]])],
    *[("methods/adaptive/baseline", value) for value in (1, [], {"story": "2.0"}, {"story": None})],
    *[("methods/adaptive/acted", value) for value in (1, "yes", None)],
    *[("decisions", value) for value in ([1], [{}], [{"replay_share": 0.4}], [DECISION | {"replay_share": 7}],
                                         [DECISION | {"replay_share": "0.4"}], [DECISION | {"step": -1}],
                                         [DECISION | {"step": 10**12}], [DECISION | {"step": "8"}],
                                         [DECISION, DECISION | {"replay_share": 0.3}] * 1_000)],
    *[(f"{EVALUATION}/{name}", value) for name in ("texts", "protocol") for value in (None, 1, [], "words")],
    *[(f"{EVALUATION}/texts/legal", value) for value in (None, 1, [], {})],
    *[(f"{EVALUATION}/texts/legal/{name}", value) for name in ("bits_per_byte", "perplexity")
      for value in (None, "2", [], {}, True)],
    *[(f"{EVALUATION}/{name}", [[[[]]]]) for name in ("extra", "model")],
]

STATES = [
    *[(f"{STATE}: {place} is {ascii(value)[:30]}", at(place, value), STATE) for place, value in PLACES],
    *[(f"{STATE}: no {place}", without(place), STATE) for place in (
        *FIELDS, "loss_scale/scale", "guard/window", "methods/adaptive", "methods/adaptive/share", "tokenizer",
        EVALUATION, f"{EVALUATION}/texts")],
    *[(f"{STATE}: an evaluation named {ascii(name)[:30]}", evaluation(name), STATE) for name in (
        "../owned.json", "OUTSIDE/owned.json", "checkpoints/step_00000009/state.json", "config.toml", "metrics.jsonl",
        "eval.json", "", "..", "a/b.json", "eval_step_8.json\n", f"eval_step_{ESC}.json", "eval_step_08.json",
        "eval_step_-1.json", "eval_step_99999999999.json", ".lock", "final/config.json")],
    *[(f"{STATE} is {what}", state(lambda held, text=text: text), STATE) for what, text in (
        ("deep", "[" * DEEP), ("a list", "[]"), ("cut short", '{"step": 9'), ("empty", ""), ("a number", "9"),
        ("20 MB of empty lists", '{"a": [' + "[]," * (7 * MB) + "[]]}"))],
    (f"{STATE}: a number of a million digits", state(lambda held: '{"step": ' + "9" * 10**6 + "}"), STATE),
    # It counts as damaged, and the checkpoint before it is gone on with.
    (f"{STATE} of 3 GB", both(sparse(f"{GOOD}/{STATE}", 3 << 30), lambda run, outside: seal(run / GOOD)), ""),
    (f"{STATE}: a baseline of nothing", at("methods/adaptive/baseline", {}), "general sources"),
    *[(f"{STATE}: {place} is new", at(place, 1), "") for place in ("loss_scale/unscale_", "optim/odd", "identity/odd")],
    *[(f"{STATE}: the seed was {ascii(value)[:30]}", at("identity/seed", value), "seed was") for value in (
        ESC, "a\nerror: b", "x" * 10 * MB, [[[[]]]] * 99, json.loads("[" * 900 + "]" * 900))],
]
SHARDS = [
    *[(f"a shard is {what}", shard(lambda data, blob=blob: blob), "cannot be read") for what, blob in (
        ("empty", b""), ("cut short", b"abc"), ("a zip", b"PK\3\4" + bytes(99)), ("zeros", bytes(999)),
        ("a header of 2^63 bytes", struct.pack("<Q", 1 << 63) + bytes(99)))],
    ("a shard is deep JSON", shard(lambda data: struct.pack("<Q", DEEP) + b"[" * DEEP), "cannot be read"),
    *[(f"the sharding is {ascii(text)[:30]}", header(lambda held, text=text: held["__metadata__"].update(
        DCP_SHARDING_INFO=text)), "cannot be read") for text in ("[]", "{}", "{", "[" * DEEP)],
    ("an empty sharding", header(lambda held: held["__metadata__"].update(DCP_SHARDING_INFO="")), ""),
    ("no sharding", header(lambda held: held["__metadata__"].clear()), ""),
    ("no metadata", header(lambda held: held.pop("__metadata__")), ""),
    *[(f"saved offsets {ascii(value)[:30]}", sharding(lambda told, value=value: told[next(iter(told))].update(
        saved_offsets=value)), GOOD) for value in ([10**12] * 2, [-5, -5], ["0", "0"], [], None, "ab", [1.5, 0])],
    ("tensors of other names", header(lambda held: held.update({ESC: held.pop(next(
        name for name in held if name[0] != "_"))})), GOOD),
]
MANIFESTS = [
    *[(f"manifest.json is {what}", manifest(text), "no checkpoint") for what, text in (
        ("deep", "[" * DEEP), ("empty", ""), ("a list", "[]"), ("40 MB", " " * (40 * MB)),
        ("a number", "9" * 10**5), ("15 MB of empty lists", '{"files": [' + "[]," * (5 * MB) + "[]]}"))],
    *[(f"files of a manifest: {ascii(value)[:30]}", manifest(lambda held, value=value: checkpoint.render(value)
                                                              if isinstance(value, dict) else json.dumps(
        {"format": 2, "files": value})), "no checkpoint") for value in (None, [], 1, {}, {"a": None}, {"a": 1},
                                                                        {"a": {"bytes": 2**70, "sha256": 5}})],
    *[(f"a manifest lists {name}", listed(**{name: {"bytes": 6, "sha256": "0" * 64}}), "no checkpoint")
      for name in ("_up_metrics.jsonl", "_up__up__up_outside/secret.txt", "/etc/passwd", "", ".", "a\nerror: b")],
    (f"a name of {ascii(ESC)[:9]}", put(f"{GOOD}/a{ESC}\nerror: b"), ""),
]
FILES = [
    *[(f"{name} is {what}", put(name, text), "") for name in ("config.toml", "plan.jsonl", "eval_step_0.json",
                                                               "eval_step_8.json", "report.html")
      for what, text in (("deep", "[forget.ewc]\na = " + "[" * DEEP),
                         ("odd", b"[forget.ewc]\n\xff\x00" + ESC.encode()))],
    ("plan.jsonl of 3 GB", sparse("plan.jsonl", 3 << 30), ""),
    ("eval_step_0.json of 3 GB", sparse("eval_step_0.json", 3 << 30), ""),
    ("a line of metrics.jsonl is deep", append("metrics.jsonl", b"[" * DEEP), ""),
    ("a lock of a stranger", put(".lock", f"pid 1 on {ESC}\nerror: b " + "x" * MB), ""),
    *[(f"{name} is a link out", link(name, "OUTSIDE/secret.txt"), name) for name in (
        ".lock", "config.toml", "metrics.jsonl", "plan.jsonl", "eval_step_0.json", "eval_step_8.json", "report.html",
        "merge.json")],
    *[(f"{name} is a link to /dev/zero", link(name, "/dev/zero"), name) for name in (".lock", "config.toml",
                                                                                      "metrics.jsonl", "plan.jsonl")],
    *[(f"{name} is a pipe", pipe(name), name) for name in (".lock", "config.toml", "metrics.jsonl", "plan.jsonl",
                                                            "eval_step_0.json", "checkpoints")],
    *[(f"{name} is a folder", folder(name), name) for name in (".lock", "metrics.jsonl", "plan.jsonl",
                                                                "eval_step_0.json", "report.html")],
    (".final.lock is a link out", link(".final.lock", "OUTSIDE/secret.txt"), ""),
    (".final.lock is a folder", folder(".final.lock"), ".final.lock"),
    ("a leftover is a pipe", pipe(".final.lock"), ""),
    ("config.toml is a folder", folder("config.toml"), "config.toml"),
    *[(f"eval.json is a {what}", make("eval.json"), "a finished run") for what, make in (("folder", folder),
                                                                                         ("pipe", pipe))],
    *[(f"a checkpoint's {name} is a link out", link(f"{GOOD}/{name}", "OUTSIDE/secret.txt"), "")
      for name in ("manifest.json", STATE)],
    *[(f"a checkpoint's {name} is a pipe", pipe(f"{GOOD}/{name}"), "") for name in ("manifest.json", STATE)],
    (f"a checkpoint's {STATE} is a folder", folder(f"{GOOD}/{STATE}"), ""),
    ("a checkpoint is a pipe", pipe(GOOD), ""),
    ("a checkpoint is a file", both(link(GOOD, "nothing"), lambda run, outside: (run / GOOD).unlink(),
                                    put(GOOD, "words")), ""),
    ("a checkpoint is a link to nothing", link(GOOD, "nothing"), ""),
    ("a checkpoint is a link to itself", link(GOOD, "step_00000009"), ""),
    ("a checkpoint stands outside", newest_stands_outside, ""),
    ("the next checkpoint is a link to a folder of the user's", step_leads_out, ""),
    *[(f"{name} is a link to a model of the user's", link(name, "OUTSIDE/model"), name) for name in (
        "final", "trained", "adapter")],
    *[(f"{name} is a link to a folder of the user's", link(name, "OUTSIDE/thesis"), name) for name in (
        "final", "checkpoints")],
    ("final holds a thesis", put("final/thesis.txt", "words"), "thesis.txt"),
    *[(f"a leftover {name} that leads out", link(name, "OUTSIDE/thesis"), "") for name in (
        ".final.partial", ".final.old", ".a.lock", ".a.partial", "checkpoints/.step_00000012.partial",
        "checkpoints/.step_00000012.old", "checkpoints/.step_00000012.lock")],
    *[(f"a leftover called {name}", put(name, "words"), "") for name in ("...partial", "....partial", "...lock",
                                                                        "checkpoints/...partial", "...old")],
    ("a deep folder", deep_folder("final/d"), "final"),
    ("a deep leftover", deep_folder(".final.partial"), ""),
    ("a deep folder in a checkpoint", deep_folder(f"{GOOD}/d"), ""),
    ("a deep folder among the checkpoints", deep_folder("checkpoints/d"), ""),
    ("a deep folder and no config.toml", both(deep_folder("d"), lambda run, outside: (run / "config.toml").unlink()),
     "no run folder"),
    ("1,000 damaged checkpoints", lambda run, outside: [shutil.rmtree(path) for path in checkpoints(run)] and [
        (run / f"checkpoints/step_{i + 100:08d}").mkdir() for i in range(1_000)] and None, "no checkpoint"),
    ("markup in a name", put(f"checkpoints/{MARKUP.replace('/', '')}", ""), ""),
]
CASES = [Case(name, spoil, names) for name, spoil, names in [*STATES, *SHARDS, *MANIFESTS, *FILES]]
