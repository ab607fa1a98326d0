"""Corpora, recipes and run folders as a stranger may hand them over: data for the suite, a case each.

`Case(name, module, make, words, names)`: make(folder) writes the input; words are the command's, in which {here} stands
for that folder and {lab} for one with a tokenizer, tok, a packed source, legal, and a model, base; the line of the
error must hold `names`. An empty `names` is for input that may be strange and is no mistake: the command ends with 0.
"""

import bz2
import glob
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow
from pyarrow import parquet


class Case(NamedTuple):
    name: str
    module: str
    make: Callable
    words: list[str]
    names: str

    def line(self, here: Path, lab: Path) -> list[str]:
        """The words with the places in them."""
        words = [word.replace("{here}", str(here)).replace("{lab}", str(lab)) for word in self.words]
        return [name for word in words for name in (sorted(glob.glob(word)) if "/r*" in word else [word])]


READERS = {"data": "pack --tokenizer {lab}/tok --out {here}/out --workers 1 {here}/",
           "clean": "--preset web --no-repair --out {here}/out {here}/",
           "dedup": "--workers 1 --out {here}/out {here}/",
           "eval": "--model {lab}/base --device cpu --text t={here}/",
           "tokenizer": "train --vocab-size 300 --out {here}/out {here}/"}
ESC = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e"


# ---- writing

def write(folder: Path, name: str, content: bytes | str):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


def append(folder: Path, name: str, part: bytes, times: int):
    with open(folder / name, "ab") as file:
        for _ in range(times):
            file.write(part)


def repeat(folder: Path, name: str, part: bytes, times: int, pack):
    """Compressed members one after another: gigabytes in a moment, because each form allows it."""
    append(folder, name, pack(part), times)


def zstd(raw: bytes) -> bytes:
    return pyarrow.compress(raw, codec="zstd", asbytes=True)


FORMS = {"gz": gzip.compress, "zst": zstd, "bz2": bz2.compress, "xz": lzma.compress}


def bomb(name: str, part: bytes, times: int, form: str):
    return lambda folder: repeat(folder, name, part, times, FORMS[form])


def table(name: str, columns: dict, **options):
    return lambda folder: parquet.write_table(pyarrow.table(columns), folder / name, **options)


def dictionary_bomb(folder: Path):
    """A value of 20 MB, and 1,000 rows that refer to it."""
    values = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1_000, pyarrow.int32()),
                                                 pyarrow.array(["a" * (20 << 20)]))
    parquet.write_table(pyarrow.table({"text": values}), folder / "x.parquet", compression="zstd",
                        dictionary_pagesize_limit=1 << 30)


def link_loop(folder: Path):
    for name in ("a", "b"):
        (folder / "set" / name).mkdir(parents=True)
        for other in ("x", "y"):
            (folder / "set" / name / other).symlink_to(folder / "set")
    write(folder, "set/one.txt", "one text\n\nanother text\n")


def record(text: str = "a text of some words", **more) -> str:
    return json.dumps({"text": text, **more}) + "\n"


DEEP, MB = 100_000, 1 << 20
LINE = record("a word and another. " * 200).encode()

# ---- corpora that every reader must refuse: name, file, how it is made, what the line must name

BOMBS = [
    *[(f"a line of 4 GB in {form}", f"x.txt.{form}", bomb(f"x.txt.{form}", b"a" * (32 * MB), 128, form),
       "--max-expansion") for form in FORMS],
    *[(f"JSON lines of 3 GB in {form}", f"x.jsonl.{form}", bomb(f"x.jsonl.{form}", LINE * (16 * MB // len(LINE)), 192,
                                                                form), "--max-expansion") for form in ("gz", "zst")],
    ("a record of 200 MB", "x.jsonl", lambda f: repeat(f, "x.jsonl", b'{"text": "', 1, bytes) or append(
        f, "x.jsonl", b"a" * MB, 200), "--max-record-mb"),
    ("a line of 20 MB", "x.txt", lambda f: repeat(f, "x.txt", b"a word " * 1000, 3000, bytes), "--max-record-mb"),
    ("a block of 20 MB", "x.md", lambda f: repeat(f, "x.md", b"a word\n" * 1000, 3000, bytes), "--max-record-mb"),
    ("20 MB of empty lists", "x.jsonl", lambda f: write(f, "x.jsonl", '{"text": "a", "b": [' + "[]," * (7 * MB)
                                                        + "[]]}\n"), "--max-record-mb"),
    ("parquet with a value of 160 MB", "x.parquet", lambda f: table(
        "x.parquet", {"text": ["a" * (160 * MB)]}, compression="zstd", use_dictionary=False)(f), "--max-expansion"),
    ("parquet with a value of 20 MB", "x.parquet", lambda f: table("x.parquet", {"text": ["a" * (20 * MB)]})(f),
     "--max-record-mb"),
    ("parquet whose rows all refer to 20 MB", "x.parquet", dictionary_bomb, "--max-record-mb"),
    ("parquet of 40 million nulls", "x.parquet", lambda f: parquet.write_table(pyarrow.table(
        {"text": pyarrow.nulls(40_000_000, pyarrow.string())}), f / "x.parquet", compression="zstd"),
     "--max-expansion"),
]

# Each is read by one of the readers in turn.
STRANGE = [
    ("a gzip of a gzip", "x.txt.gz", lambda f: write(f, "x.txt.gz", gzip.compress(gzip.compress(b"a " * 999))),
     "compressed twice"),
    ("a zstd of a gzip of zeros", "x.zst", lambda f: write(f, "x.zst", zstd(gzip.compress(bytes(10**6)))),
     "compressed twice"),
    ("half a gzip", "x.txt.gz", lambda f: write(f, "x.txt.gz", gzip.compress(os.urandom(999).hex().encode())[:500]),
     "x.txt.gz"),
    ("half a zstd", "x.txt.zst", lambda f: write(f, "x.txt.zst", zstd(os.urandom(999).hex().encode())[:500]),
     "x.txt.zst"),
    ("half an xz", "x.txt.xz", lambda f: write(f, "x.txt.xz", lzma.compress(os.urandom(999).hex().encode())[:500]),
     "x.txt.xz"),
    ("half a bzip2", "x.txt.bz2", lambda f: write(f, "x.txt.bz2", bz2.compress(os.urandom(999).hex().encode())[:500]),
     "x.txt.bz2"),
    ("a gzip with a wrong sum", "x.txt.gz", lambda f: write(f, "x.txt.gz", gzip.compress(b"some words\n" * 99)[:-8]
                                                            + bytes(8)), "x.txt.gz"),
    ("plain text that is named gz", "x.jsonl.gz", lambda f: write(f, "x.jsonl.gz", "one\ntwo\n"), "not compressed"),
    ("JSON 100,000 deep", "x.jsonl", lambda f: write(f, "x.jsonl", record() + '{"text": ' + "[" * DEEP + "]" * DEEP
                                                     + "}\n"), "line 2 is not JSON"),
    ("JSON 100,000 deep on line 1", "x.jsonl", lambda f: write(f, "x.jsonl", "[" * DEEP + "]" * DEEP), "line 1"),
    ("a number of a million digits", "x.jsonl", lambda f: write(f, "x.jsonl", record() + '{"text": "a", "n": '
                                                                + "9" * 10**6 + "}\n"), "line 2 is not JSON"),
    ("half a record", "x.jsonl", lambda f: write(f, "x.jsonl", record() + '{"text": "a'), "line 2 is not JSON"),
    ("a bare word", "x.jsonl", lambda f: write(f, "x.jsonl", record() + "word\n"), "line 2 is not JSON"),
    ("bytes that are no UTF-8", "x.txt", lambda f: write(f, "x.txt", b"words\n" * 9 + b"\xff\xfe\xfa\n"), "line 10"),
    ("Latin 1", "x.txt", lambda f: write(f, "x.txt", "ein Müller\n".encode("latin-1")), "iconv"),
    ("UTF-16", "x.txt", lambda f: write(f, "x.txt", "some words\n".encode("utf-16")), "UTF-16"),
    ("UTF-16 without a mark", "x.txt", lambda f: write(f, "x.txt", ("a word\n" * 99).encode("utf-16-le")), "UTF-16"),
    ("NUL bytes", "x.txt", lambda f: write(f, "x.txt", bytes(9999)), "binary data"),
    ("text as a list", "x.jsonl", lambda f: write(f, "x.jsonl", '{"text": ["a", "b"]}\n'), "a list"),
    ("text as a number", "x.jsonl", lambda f: write(f, "x.jsonl", '{"text": 1e999}\n'), "a number"),
    ("text as an object", "x.jsonl", lambda f: write(f, "x.jsonl", '{"text": {"a": "b"}}\n'), "text.a"),
    ("no text", "x.jsonl", lambda f: write(f, "x.jsonl", '{"body": "a"}\n'), "body"),
    ("lines of lists", "x.jsonl", lambda f: write(f, "x.jsonl", record() + '["a", 1]\n'), "a list"),
    ("one object over many lines", "x.json", lambda f: write(f, "x.json", json.dumps({"text": "a"}, indent=2)),
     "is one JSON object over many lines"),
    ("a list in JSON", "x.json", lambda f: write(f, "x.json", json.dumps([{"text": "a"}], indent=2)),
     "is a list in JSON"),
    ("words in JSON", "x.json", lambda f: write(f, "x.json", "some words\n"), "x.json"),
    ("HTML that is named txt", "x.txt", lambda f: write(f, "x.txt", "<!DOCTYPE html>\n<html><p>words</p></html>\n"),
     "HTML"),
    ("HTML that is named md", "x.md", lambda f: write(f, "x.md", "\ufeff\n<HTML lang=de><p>words</p>\n"), "HTML"),
    ("XML without a suffix", "page", lambda f: write(f, "page", "<?xml version='1.0'?><a>words</a>\n"), "XML"),
    ("a PDF that is named txt", "x.txt", lambda f: write(f, "x.txt", "%PDF-1.7\nwords\n"), "a PDF"),
    ("a zip", "x.zip", lambda f: write(f, "x.zip", b"PK\3\4" + bytes(99)), "zip"),
    ("a tar", "x.txt", lambda f: write(f, "x.txt", b"a.txt" + bytes(252) + b"ustar" + bytes(250)), "tar"),
    ("a program", "x", lambda f: write(f, "x", b"\x7fELF" + bytes(99)), "program"),
    ("a pickle", "x.txt", lambda f: write(f, "x.txt", b"\x80\4\x95cos\nsystem\n(S'touch owned'\ntR." + bytes(99)),
     "binary"),
    ("a Git LFS pointer", "x.jsonl", lambda f: write(f, "x.jsonl", "version https://git-lfs.github.com/spec/v1\n"),
     "git lfs pull"),
    ("a table", "x.csv", lambda f: write(f, "x.csv", "text\nwords\n"), "a list in CSV"),
    ("parquet of bytes", "x.parquet", table("x.parquet", {"text": [b"a", b"\xff"]}), "bytes"),
    ("parquet of numbers", "x.parquet", table("x.parquet", {"text": [1, 2]}), "a number"),
    ("parquet without text", "x.parquet", table("x.parquet", {"body": ["a"]}), "body"),
    ("half a parquet", "x.parquet", lambda f: (table("x.parquet", {"text": ["a" * 99]})(f), write(
        f, "x.parquet", (f / "x.parquet").read_bytes()[:-9])), "x.parquet"),
    ("four bytes of a parquet", "x.parquet", lambda f: write(f, "x.parquet", "PAR1"), "x.parquet"),
    ("an empty file", "x.txt", lambda f: write(f, "x.txt", ""), "document"),
    ("an empty folder", "set", lambda f: (f / "set").mkdir(), "holds no file to read"),
    ("a folder of pictures", "set", lambda f: write(f, "set/a.png", b"\x89PNG\r\n\x1a\n"), "holds no file to read"),
    ("a folder of pipes", "set", lambda f: ((f / "set").mkdir(), os.mkfifo(f / "set" / "a.txt")),
     "holds no file to read"),
    ("a link to itself", "x.txt", lambda f: (f / "x.txt").symlink_to(f / "x.txt"), "does not exist"),
    ("a link to nothing", "x.txt", lambda f: (f / "x.txt").symlink_to("nothing"), "does not exist"),
    ("a pipe", "x.txt", lambda f: os.mkfifo(f / "x.txt"), "a pipe or a device"),
    ("/dev/zero", "x.txt", lambda f: (f / "x.txt").symlink_to("/dev/zero"), "a pipe or a device"),
    ("a name with escape codes", f"a{ESC}.txt", lambda f: write(f, f"a{ESC}.txt", b"\xff\n"), r"\x1b[2J"),
    ("a name of two lines", "a\nerror: b.txt", lambda f: write(f, "a\nerror: b.txt", b"\xff\n"), "a error: b.txt"),
    ("a field with escape codes", "x.jsonl", lambda f: write(f, "x.jsonl", json.dumps({ESC: "a"}) + "\n"), r"\x1b[2J"),
]
# A reader takes them and ends with 0; what it prints obeys nobody.
HARMLESS = [
    ("half a surrogate pair", "x.jsonl", lambda f: write(f, "x.jsonl", '{"text": "a \\ud800 b", "id": "\\udfff"}\n')),
    ("NULs and escape codes in a text", "x.jsonl", lambda f: write(f, "x.jsonl", record(f"a {ESC} \0 b", id=ESC))),
    ("escape codes in a name", f"a{ESC}.jsonl", lambda f: write(f, f"a{ESC}.jsonl", record())),
    ("a name that is no UTF-8", "a\udcff.jsonl", lambda f: write(f, "a\udcff.jsonl", record())),
    ("a metadata field of every type", "x.jsonl", lambda f: write(f, "x.jsonl", record(
        metadata=[1], id={"a": 1}, source=[2], domain={"b": 3}) + record(metadata={"scores": 1, "cleaned": 2}))),
    ("not a number", "x.jsonl", lambda f: write(f, "x.jsonl", '{"text": "a b words", "id": NaN, "n": 1e999}\n')),
    ("records 400 deep", "x.jsonl", lambda f: write(f, "x.jsonl", record("a b words")[:-2] + ', "n": ' + "[" * 400
                                                    + "]" * 400 + "}\n")),
    ("a loop of links", "set/**/*.txt", link_loop),
    ("a folder with a loop of links", "set", link_loop),
    ("a text of format codes", "x.txt", lambda f: write(f, "x.txt", "{here} %s {0} \\1 $(touch owned) `id`\n")),
    ("a line of a million spaces", "x.txt", lambda f: write(f, "x.txt", "a" + " " * 10**6 + "b\n")),
    ("a word of a million letters", "x.txt", lambda f: write(f, "x.txt", "a" * 10**6 + "\n\nmore words\n")),
    ("a line of repeated brackets", "x.txt", lambda f: write(f, "x.txt", "![](" * 50_000 + "\n")),
    ("an address that never ends", "x.txt", lambda f: write(f, "x.txt", "a." * 100_000 + "@" + "b." * 100_000 + "\n")),
    ("fences without end", "x.md", lambda f: write(f, "x.md", "```\n" * 50_000)),
]


def read(name: str, module: str, make, file: str, names: str) -> Case:
    *words, last = READERS[module].split()
    return Case(f"{name}: {module}", module, make, [*words, last + file], names)


def corpora() -> list[Case]:
    """Each bomb for each reader; the others for one reader each, in turn."""
    readers = list(READERS)
    return [*[read(name, module, make, file, names) for name, file, make, names in BOMBS for module in readers],
            *[read(name, readers[i % len(readers)], make, file, names)
              for i, (name, file, make, names) in enumerate(STRANGE)],
            *[read(name, module, make, file, "") for name, file, make in HARMLESS for module in readers[:3]]]


# ---- run folders that report.py is shown

MARKUP = "<script>fetch('//x')</script><img src=x onerror=alert(1)>$x^{2$</svg></style>{{7*7}}"
ODD = [None, True, -1, 2**70, 1e308, float("nan"), float("inf"), "words", MARKUP, ESC, [], [[[]]], {}, {"a": {"b": []}}]
# Fields of metrics.jsonl, of an evaluation in it, and of eval.json.
START = {"kind": "start", "step": 0, "time": 1.7e9, "total_steps": 4, "parameters": 10, "trainable_parameters": 10,
         "run": "name", "family": "llama", "vocab_size": 300, "tokens_per_step": 128, "world_size": 1, "device": "cpu",
         "precision": "fp32", "recommended_lr": 1e-4, "versions": {"python": "3.11"}, "base": {"name": "b", "license":
         "mit", "fingerprint": "f"}, "code": "0a1b2c", "tokenizer": {"name": "t", "vocab_size": 300},
         "sources": {"law": {"role": "domain", "tokens": 5, "documents": 2, "bytes": 9, "cleaning": []}}}
TRAIN = {"kind": "train", "step": 2, "loss": 2.0, "grad_norm": 1.0, "lr": 1e-4, "step_ms": 3.0, "tokens": 256,
         "tokens_per_second": 1000.0, "replay_share": 0.3, "domain_share": 0.7, "peak_gb": 0.1,
         "distance": {"embed": 0.1, "layers.0": 0.2, "head": 0.1, "all": 0.3}, "methods": {"ewc": 1.0},
         "sources": {"law": {"loss": 2.0, "tokens": 5, "epochs": 0.1, "role": "domain"}}}
SCORES = {"bits_per_byte": 2.0, "nats_per_token": 3.0, "perplexity": 20.0, "accuracy": 0.2, "bytes": 100, "tokens": 50,
          "documents": 7, "nats_by_document": [1.0] * 7, "lost_share": 0.0, "role": "domain"}

# A result of a benchmark or of a probe, and of what became of it.
RESULT = {"metric": "acc", "value": 0.5, "direction": "up", "chance": 0.25, "interval": [0.4, 0.6], "n": 100,
          "capability": "reasoning", "version": 1, "shots": 0, "hits": "01", "items_hash": "ab"}
KEPT = {"metric": "acc", "baseline": 0.5, "current": 0.4, "direction": "up", "degradation": 0.2, "interval": [0.1, 0.3],
        "retention": 0.8, "retention_above_chance": 0.6, "sign": "bad", "tasks": ["arc"],
        "flips": {"lost": 9, "won": 3, "lost_above_chance": 0.05, "won_above_chance": 0.0, "p": 0.1}}


def odd_results(name: str, number: int, value) -> dict:
    """What eval.json says of tasks, probes and capabilities, with one field of each that holds the value."""
    result, kept = ({**fields, [*fields][number % len(fields)]: value} for fields in (RESULT, KEPT))
    tasks = {"before": {name: RESULT, "odd": value}, "after": {name: result}, "change": {name: kept}}
    return {"tasks": tasks, "probes": tasks, "capabilities": {name: kept, "odd": value}, "ended": value}


def lines_of(start: dict, train: dict, scores: dict, *more: dict) -> str:
    evals = [{"kind": "eval", "step": step, "sources": {"law": scores}, "protocol": {"context": 32}} for step in (0, 4)]
    return "".join(json.dumps(row) + "\n" for row in (start, train, *evals, *more))


def run_folder(folder: Path, metrics: str, **files: str):
    write(folder, "run/metrics.jsonl", metrics)
    for name, text in files.items():
        write(folder, f"run/{name.replace('_json', '.json').replace('_toml', '.toml')}", text)


def odd_fields(number: int, value) -> Callable:
    """Run folders in each of which one field holds the value; every fifth field, from the one of this number on."""
    def make(folder: Path):
        rows = [lines_of(START | {name: value}, TRAIN, SCORES) for name in START if name != "kind"]
        rows += [lines_of(START, TRAIN | {name: value, "step": 3}, SCORES) for name in TRAIN if name != "kind"]
        rows += [lines_of(START, TRAIN, SCORES | {name: value}) for name in SCORES]
        rows += [json.dumps({"kind": kind, "step": 3, "source": value, "lost": value, "before": value, "reason": value,
                             "replay_share": value, "samples": value, "message": value, "sources": value}) + "\n"
                 for kind in ("replay", "samples", "event", "resume", "eval", "ended")]
        rows += [json.dumps({"kind": "eval", "step": 4, "sources": {"law": SCORES}, "tasks": {"arc": RESULT | {
            name: value}}, "probes": {"facts_trained": RESULT | {name: value}, "in_context": value}}) + "\n"
                 for name in RESULT]
        for i, row in enumerate(rows[number % 5::5]):
            run_folder(folder / f"r{i}", lines_of(START, TRAIN, SCORES) + row, eval_json=json.dumps(
                {"before": {"law": SCORES | {"bytes": value}}, "after": {"law": SCORES | {"nats_by_document": value}},
                 "protocol": value, "model": value, "domain_gain": value, **odd_results("arc", i, value)}),
                eval_checkpoints_json=json.dumps({"checkpoints": value if i % 2 else [value, {"step": value}, {
                    "step": 3, "texts": {"law": SCORES | {"bits_per_byte": value}}}]}),
                config_toml=f"seed = 1\nout = {MARKUP!r}\n")
    return make


def named(name: str) -> Callable:
    """A run folder whose sources, prompts, texts, licence and base are called so."""
    def make(folder: Path):
        sources = {name: START["sources"]["law"]}
        run_folder(folder, lines_of(
            START | {"run": name, "device": name, "base": {"name": name, "license": name}, "sources": sources},
            TRAIN | {"sources": {name: TRAIN["sources"]["law"]}}, SCORES,
            {"kind": "samples", "step": 0, "samples": [{"prompt": name, "text": name}]},
            {"kind": "event", "step": 1, "message": name}, {"kind": "ended", "step": 4, "reason": name},
            {"kind": "eval", "step": 4, "sources": {name: SCORES}, "tasks": {name: RESULT | {"capability": name}},
             "probes": {name: RESULT | {"metric": name}}}),
            eval_json=json.dumps({"before": {name: SCORES}, "after": {name: SCORES}, "protocol": {name: name},
                                  **odd_results(name, 0, name)}),
            config_toml=name)
    return make


LINE_OF_RUN = lines_of(START, TRAIN, SCORES)
FOLDERS = [
    *[(f"every field is {ascii(value)[:20]}", odd_fields(i, value), "") for i, value in enumerate(ODD)],
    *[(f"names are {ascii(name)[:20]}", named(name), "") for name in (MARKUP, ESC, "", "a\nb", "x" * 50_000, "$\\frac{",
                                                                      "../..", "%s%n{0}", "\u200f\u202e", "__proto__")],
    ("metrics 100,000 deep", lambda f: run_folder(f, LINE_OF_RUN + "[" * DEEP + "\n"), ""),
    ("a gigantic line", lambda f: run_folder(f, LINE_OF_RUN + "a" * (50 * MB)), ""),
    ("eval.json 100,000 deep", lambda f: run_folder(f, LINE_OF_RUN, eval_json="[" * DEEP), ""),
    ("config.toml 100,000 deep", lambda f: run_folder(f, LINE_OF_RUN, config_toml="a = " + "[" * DEEP), ""),
    ("no UTF-8", lambda f: write(f, "run/metrics.jsonl", LINE_OF_RUN.encode() + b"\xff\xfe\n"), ""),
    ("NULs", lambda f: write(f, "run/metrics.jsonl", LINE_OF_RUN.encode() + bytes(999) + b"\n"), ""),
    ("a number of a million digits", lambda f: run_folder(f, LINE_OF_RUN + '{"kind": "train", "step": ' + "9" * 10**6
                                                          + "}\n"), ""),
    ("steps beyond all bounds", lambda f: run_folder(f, LINE_OF_RUN + '{"kind": "train", "step": 1e300, "loss": 1}\n'),
     ""),
    ("no line that can be read", lambda f: run_folder(f, "words\n" * 99), "nothing to show"),
    ("an empty file", lambda f: run_folder(f, ""), "nothing to show"),
    ("a pipe", lambda f: ((f / "run").mkdir(), os.mkfifo(f / "run" / "metrics.jsonl")), "metrics.jsonl"),
    ("/dev/zero", lambda f: ((f / "run").mkdir(), (f / "run" / "metrics.jsonl").symlink_to("/dev/zero")),
     "metrics.jsonl"),
    ("a folder in the place of a file", lambda f: (f / "run" / "metrics.jsonl").mkdir(parents=True), "metrics.jsonl"),
]


def run_folders() -> list[Case]:
    """For report.py: all folders under {here}, as words in turn."""
    return [Case(f"{name}: report", "report", make, ["{here}/run" if "every field" not in name else "{here}/r*/run",
                                                     "--out", "{here}/page.html"], names)
            for name, make, names in FOLDERS]
