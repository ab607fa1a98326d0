"""The demo: continue a small English model on Python code, with nothing but this Python installation for text.

    python experiments/demo.py --out out/demo                 # everything, some minutes on two cores
    python experiments/demo.py --out out/demo --corpora-only  # general.jsonl (English) and domain.jsonl (Python code)

It makes two corpora, trains a tokenizer, pretrains a small base on the general side, exports it as a Hugging Face
folder, and continues from that folder three times at the same budget: on the domain alone, with replay, and with a
little replay. Each stage is a command of the project that a user would type, printed before it runs.

General is the prose of docstrings and of the topics of `help()`; domain is Python code without docstrings and comments,
of the standard library first. Files are read, never imported; one installation always gives the same bytes.
"""

import ast
import gc
import hashlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tokenize
import warnings
from collections import defaultdict, deque
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout, wherever this file is run from

from core import cli  # noqa: E402
from core.errors import UserError  # noqa: E402

GENERAL_CHARS, DOMAIN_CHARS = (200, 20_000), (300, 20_000)  # bounds of one record
SKIP_FOLDERS = {"test", "tests", "idle_test", "_vendor", "__pycache__", "site-packages", "dist-packages"}
GENERATED = re.compile(r"(?i)generated (by|from|with|using|at)\b|\b(auto|machine)[- ]?\w*generated|do not edit")
UNREADABLE = (OSError, SyntaxError, ValueError, RecursionError, tokenize.TokenError)  # the file's fault, not ours

# English function words that are not Python keywords: a third of prose, next to none of code and tables.
FUNCTION_WORD = re.compile(r"(?i)(the|an?|of|to|be|are|was|by|this|that|which|its?|on|can|will|when|at|has|have)\W*")
PLAIN_WORD = re.compile(r"[\"'(*`]*[A-Za-z][A-Za-z'-]*[.,;:!?)\"'*`]*")
HEADING = re.compile(r"\A(.*\n)?\s*([-=~*^#])\2{2,}[ \t]*(\n|\Z)")  # a title and its underline
QUOTED = re.compile(r'"""(.*?)"""', re.S)
SECTION = re.compile(
    r"\s*((Args?|Arguments|Options|(Other |Keyword )?Param(eter)?s?|Attributes|Fields|Methods|Shapes?|Returns?|Yields?"
    r"|Raises|Warns|Examples?|Usage|See Also|References?) *:?\n|[:@|]|\.\. (\[|\w+::))"
)
TABLE_ROW = re.compile(r"^\s*([-*] +)?[\w*`'\".,\[\]]+(, [\w*`]+)*( +:| +--?| *\(.+\) ?:)\s", re.M)  # `name : type`


def install_roots() -> list[Path]:
    """The standard library's folder, then those of the installed packages."""
    packages = [Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys(p.resolve() for p in [Path(sysconfig.get_path("stdlib")), *packages] if p.is_dir()))


def python_files(root: Path) -> list[Path]:
    """`.py` files under `root` but tests: one file of every package, then a second one of each, ...; in hash order."""
    packages = defaultdict(list)
    for folder, folders, names in os.walk(root):  # follows no link to a folder, so there are no loops
        folders[:] = [name for name in folders if name not in SKIP_FOLDERS]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            relative = path.relative_to(root)
            if not path.stem.startswith("test_") and not path.stem.endswith("_test"):
                packages[relative.parts[0]].append((hashlib.sha256(relative.as_posix().encode()).hexdigest(), path))
    return [p for _, _, p in sorted((k, *item) for items in packages.values() for k, item in enumerate(sorted(items)))]


def blocks(tree: ast.Module):
    """Yield (owner, statements) for each block of statements, outer before inner; far quicker than `ast.walk`."""
    queue = deque([tree])
    while queue:
        node = queue.popleft()
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, field, None)
            if isinstance(inner, list):  # the body of a lambda is one expression
                queue.extend(inner)
                if inner and field not in ("handlers", "cases"):
                    yield node, inner


def is_string(statement: ast.stmt) -> bool:
    """A docstring, or a bare string that serves as a comment."""
    value = getattr(statement, "value", None)
    return isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str)


def is_prose(paragraph: str) -> bool:
    """English: plain words, enough function words or one short sentence; no prompt, no list of parameters, no table."""
    words = paragraph.split()
    if len(words) < 3 or not paragraph.isascii() or ">>>" in paragraph:
        return False
    plain = sum(bool(PLAIN_WORD.fullmatch(word)) for word in words) / len(words)
    if len(words) < 8:
        return plain > 0.8 and paragraph.endswith(".") and paragraph[0].isupper()
    function = sum(bool(FUNCTION_WORD.fullmatch(word)) for word in words) / len(words)
    rows = [match.start() for match in TABLE_ROW.finditer(paragraph)]
    return plain >= 0.7 and function >= 0.12 and len(rows) < 2 and 0 not in rows


def english(path: Path, source: str, seen: set[str]):
    """Yield the prose of each docstring (or help topic) of a file; a paragraph that is in `seen` is left out."""
    if path.match("pydoc_data/topics.py"):
        docs = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    elif GENERATED.search(source[:2000]) or sum(map(len, QUOTED.findall(source))) < 0.2 * len(source):
        return  # too little text in triple quotes to be worth the time of parsing
    else:
        docs = [body[0].value.value for _, body in blocks(ast.parse(source)) if is_string(body[0])]
    for doc in docs:
        pieces, size = [], 0
        for block in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
            paragraph = inspect.cleandoc(HEADING.sub("", block))
            key = " ".join(re.findall(r"\w+", paragraph.lower()))
            if key in seen or SECTION.match(block) or not is_prose(paragraph):
                continue
            seen.add(key)
            if size + len(paragraph) > GENERAL_CHARS[1]:
                yield "\n\n".join(pieces)
                pieces, size = [], 0
            pieces.append(paragraph)
            size += len(paragraph) + 2
        yield "\n\n".join(pieces)


def strip_code(source: str) -> str:
    """`source` without docstrings and comments, in its own layout; `pass` where a block held nothing else."""
    lines, cuts = source.split("\n"), []  # a cut: line, column, end line, end column, opens a block, put in its place
    for owner, body in blocks(ast.parse(source)):
        empty = all(map(is_string, body)) and not isinstance(owner, ast.Module)
        for node in filter(is_string, body):
            first, last = node.lineno - 1, node.end_lineno - 1
            start = len(lines[first].encode()[: node.col_offset].decode())  # ast counts columns in UTF-8 bytes
            end = len(lines[last].encode()[: node.end_col_offset].decode())
            cuts.append((first, start, last, end, node is body[0], "pass" if empty and node is body[0] else ""))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            cuts.append((token.start[0] - 1, token.start[1], token.end[0] - 1, token.end[1], False, ""))
    for first, start, last, end, opens, new in sorted(cuts, reverse=True):
        tail = lines[last][end:]
        line = (lines[first][:start] + (new + tail if new else tail.lstrip(" \t;"))).rstrip()  # `"doc"; x = 1`
        lines[first : last + 1] = [line] if line else []
        blank_above = first == 0 or not lines[first - 1].strip()
        while not line and first < len(lines) and not lines[first].strip() and (opens or blank_above):
            del lines[first]  # blank lines that belonged to the docstring or to the comment
    return "\n".join(lines).strip("\n") + "\n"


def is_code(text: str) -> bool:
    """It parses and is no table of data: clearly more names than literals, less than 40 % of it inside strings."""
    nodes = list(ast.walk(ast.parse(text)))
    literals = [node for node in nodes if isinstance(node, ast.Constant)]
    names = sum(isinstance(node, (ast.Name, ast.Attribute, ast.arg)) for node in nodes)
    offset = list(accumulate((len(line.encode()) + 1 for line in text.split("\n")), initial=0))  # of each line, bytes
    spans = {  # a set: the parts of an f-string may all be given its whole span
        (offset[node.lineno - 1] + node.col_offset, offset[node.end_lineno - 1] + node.end_col_offset)
        for node in literals
        if isinstance(node.value, (str, bytes))
    }
    return len(literals) < 0.8 * names and sum(end - start for start, end in spans) < 0.4 * len(text)


def python_code(path: Path, source: str, seen: set[str]):
    """Yield a file's code whole, or where it is too long its top-level statements in runs of allowed length."""
    if GENERATED.search(source[:2000]):
        return
    text = strip_code(source)
    statements = ast.parse(text).body
    starts = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1 for node in statements]
    lines, begin, pieces = text.split("\n"), 0, []
    for start, stop in zip(starts, [*starts[1:], len(lines)]):
        if start > begin and sum(map(len, lines[begin:stop])) + stop - begin > DOMAIN_CHARS[1]:
            pieces.append(lines[begin:start])
            begin = start
    texts = ("\n".join(piece).strip("\n") + "\n" for piece in [*pieces, lines[begin:]])
    yield from filter(is_code, texts)


def collect(roots: list[Path], extract, bounds: tuple[int, int], budget: int) -> tuple[dict[str, dict], int]:
    """Records by id (a hash of their words: exact duplicates meet) up to `budget` bytes, and how many files failed."""
    records, seen, size, unreadable = {}, set(), 0, 0
    for path, name in ((path, path.relative_to(root).as_posix()) for root in roots for path in python_files(root)):
        try:
            with tokenize.open(path) as file:  # in the encoding that the file declares
                texts = list(extract(path, file.read(), seen))
        except UNREADABLE:
            unreadable += 1
            continue
        for text in texts:
            key = hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()[:16]
            if bounds[0] <= len(text) <= bounds[1] and key not in records:
                size += len(text.encode())
                if size > budget:
                    return records, unreadable
                records[key] = {"text": text, "id": key, "metadata": {"source": name}}
    return records, unreadable


def make_corpora(
    out: Path, general_bytes: int = 5_000_000, domain_bytes: int = 4_000_000, roots: list[Path] | None = None
) -> dict:
    """Write `out`/general.jsonl and `out`/domain.jsonl, in the order of the records' ids, from the sources in `roots`.

    Each side stops at its budget in bytes of text; at least a tenth of it must be found (ValueError).
    Returns {"general": {"path", "documents", "bytes", "unreadable" (files), "seconds"}, "domain": {...}}.
    """
    Path(out).mkdir(parents=True, exist_ok=True)
    roots = install_roots() if roots is None else roots
    sides = {
        "general": (english, GENERAL_CHARS, general_bytes),
        "domain": (python_code, DOMAIN_CHARS, domain_bytes),
    }
    stats = {}
    for side, (extract, bounds, budget) in sides.items():
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the parser says about old code's string escapes
            gc.disable()  # syntax trees are many objects without a cycle: parsing is a quarter quicker
            try:
                records, unreadable = collect(roots, extract, bounds, budget)
            finally:
                gc.enable()
        size = sum(len(record["text"].encode()) for record in records.values())
        if size < budget / 10:
            raise UserError(
                f"only {size:,} of the {budget // 10:,} bytes of {side} text that the demo needs are in the files of "
                f"{', '.join(map(str, roots)) or 'no folder'}: use a Python that has its standard library as .py files"
            )
        path = Path(out) / f"{side}.jsonl"
        path.write_text("".join(json.dumps(records[key]) + "\n" for key in sorted(records)), encoding="utf-8")
        seconds = time.perf_counter() - began
        stats[side] = {"path": path, "documents": len(records), "bytes": size}
        stats[side] |= {"unreadable": unreadable, "seconds": seconds}
        print(f"{path}: {len(records):,} documents, {size:,} bytes, {unreadable} unreadable files, {seconds:.1f} s")
    return stats


def snippets(path: Path, count: int = 2, chars: int = 400) -> list[str]:
    """The beginnings of `count` records spread over a file, each below a line with its source."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    chosen = records[:: max(1, len(records) // count)][:count]
    return [f"--- {record['metadata']['source']}\n{record['text'][:chars].rstrip()}" for record in chosen]


# ---- the main job, in the project's own commands

RUNS = {"domain_only": 1.0, "replay": 0.8, "little_replay": 0.95}  # share of domain sequences
BASE_STEPS, STEPS = 450, 180


def run(*command) -> None:
    """A project command, shown and run; its failure ends the demo with the line it printed."""
    print("\n$ python " + " ".join(map(str, command)), flush=True)
    if subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode:
        raise UserError(f"this command of the demo failed: python {' '.join(map(str, command))}")


def demo(out: Path) -> dict:
    """Everything from corpora to report; returns and writes `out`/summary.json."""
    began = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    corpora = make_corpora(out)
    sides = {side: corpora[side]["path"] for side in ("general", "domain")}
    run("tokenizer.py", "train", "--kind", "bpe", "--vocab-size", 2048, "--out", out / "tokenizer", *sides.values())
    for side, path in sides.items():
        run("data.py", "pack", "--tokenizer", out / "tokenizer", "--out", out / "shards" / side, path,
            "--heldout", 0.04)
    general = ("--data.sources.general.path", out / "shards/general", "--data.sources.general.role", "general")
    domain = ("--data.sources.domain.path", out / "shards/domain")
    run("train.py", "recipes/demo.toml", "--model.init", "scratch", "--model.tokenizer", out / "tokenizer", *general,
        "--train.steps", BASE_STEPS, "--eval.every", 150, "--optim.lr", 4e-3, "--optim.min-lr", 4e-4,
        "--out", out / "base")
    for name, share in RUNS.items():
        run("train.py", "recipes/demo.toml", "--model.path", out / "base/final", *domain, *general,
            "--data.domain-share", share, "--train.steps", STEPS, "--out", out / name)
    run("report.py", *(out / name for name in RUNS), "--out", out / "report.html")
    summary = summarise(out, time.perf_counter() - began)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def summarise(out: Path, seconds: float) -> dict:
    """{"seconds", "runs": {"base": {"general_bpb", "domain_bpb"}, "domain_only": {...}, ...}}"""

    def numbers(texts):
        return {f"{side}_bpb": texts[side]["bits_per_byte"] for side in ("general", "domain")}

    found = {name: json.loads((out / name / "eval.json").read_text(encoding="utf-8")) for name in RUNS}
    runs = {"base": numbers(found["replay"]["before"])}
    return {"seconds": round(seconds, 1), "runs": runs | {name: numbers(e["after"]) for name, e in found.items()}}


def show(summary: dict) -> None:
    """The table the demo ends with, and what it says."""
    runs = summary["runs"]
    base, alone, replay = runs["base"], runs["domain_only"], runs["replay"]
    print(f"\n{'bits per byte':16}{'domain':>10}{'':>9}{'general':>10}")
    for name, r in runs.items():
        changes = [f"{100 * (r[key] / base[key] - 1):+7.1f} %" if r is not base else "" for key in r]
        print(f"{name:16}{r['domain_bpb']:10.4f}{changes[1]:>9}{r['general_bpb']:10.4f}{changes[0]:>9}")
    lost, kept = alone["general_bpb"] - base["general_bpb"], alone["general_bpb"] - replay["general_bpb"]
    cost = replay["domain_bpb"] / alone["domain_bpb"] - 1
    print(f"replay removed {100 * kept / lost:.0f} % of what domain-only training forgot, and cost the domain "
          f"{100 * cost:.1f} %")


@dataclass
class Demo:
    """The demo: its corpora, its base model and three continuations of it."""

    out: str = "out/demo"
    """The folder to write."""
    corpora_only: bool = False
    """Make the two corpora, show snippets of them, and stop."""


def run_demo(options: Demo) -> dict | None:
    if options.corpora_only:
        for side in make_corpora(Path(options.out)).values():
            print("\n".join(snippets(side["path"])))
        return None
    # A path relative to the checkout keeps the commands that are shown short.
    out = Path(os.path.relpath(Path(options.out).resolve(), ROOT))
    os.chdir(ROOT)
    summary = demo(out)
    show(summary)
    print(f"{summary['seconds']:.0f} s; report: {out}/report.html")
    return summary


def main() -> int:
    return cli.run("experiments/demo.py", __doc__, (Demo, run_demo))


if __name__ == "__main__":
    sys.exit(main())
