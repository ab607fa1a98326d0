"""The demo: continue a small English model on Python code, with nothing but this Python installation for text.

    python experiments/demo.py --out out/demo         some minutes on two cores

It makes two corpora, trains a tokenizer, pretrains a small base on the general side, and continues from it three times
at the same budget: on the domain alone, with replay, and with a little replay. Each stage is a command of the project
that a user would type, printed before it runs. Where one fails or is stopped the demo ends with its exit status, and
the same command goes on from there.

General is the prose of docstrings and of the topics of `help()`; domain is Python code without docstrings and comments,
of the standard library first. Files are read, never imported; one installation always gives the same bytes.
"""

import ast
import inspect
import io
import json
import os
import re
import sys
import sysconfig
import time
import tokenize
import warnings
from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

# The checkout, wherever this file is run from.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core import cli
from core.errors import UserError
from core.files import read_json, refuse_existing, remove, write_json, write_text
from core.hashing import short_digest

# The fewest and the most characters of one record.
GENERAL_CHARS, DOMAIN_CHARS = (200, 20_000), (300, 20_000)
SKIP_FOLDERS = {"test", "tests", "idle_test", "_vendor", "__pycache__", "site-packages", "dist-packages"}
GENERATED = re.compile(r"(?i)generated (by|from|with|using|at)\b|\b(auto|machine)[- ]?\w*generated|do not edit")

# English function words that are not Python keywords: a third of prose, next to none of code and tables.
FUNCTION_WORD = re.compile(r"(?i)(the|an?|of|to|be|are|was|by|this|that|which|its?|on|can|will|when|at|has|have)\W*")
PLAIN_WORD = re.compile(r"[\"'(*`]*[A-Za-z][A-Za-z'-]*[.,;:!?)\"'*`]*")
# A title and its underline.
HEADING = re.compile(r"\A(.*\n)?\s*([-=~*^#])\2{2,}[ \t]*(\n|\Z)")
QUOTED = re.compile(r'"""(.*?)"""', re.S)
SECTION = re.compile(r"\s*((Args?|Arguments|Options|(Other |Keyword )?Param(eter)?s?|Attributes|Fields|Methods|Shapes?"
                     r"|Returns?|Yields?|Raises|Warns|Examples?|Usage|See Also|References?) *:?\n|[:@|]"
                     r"|\.\. (\[|\w+::))")
# A row of a list of parameters: `name : type` or `- name: what it is`.
TABLE_ROW = re.compile(r"^\s*([-*] +)?[\w*`'\".,\[\]]+(, [\w*`]+)*( +:| +--?| *\(.+\) ?:)\s", re.M)


# ---- the corpora

def python_files(root: Path) -> list[Path]:
    """`.py` files under `root` but tests: one file of every package, then a second one of each, ...; in hash order."""
    packages = defaultdict(list)
    # os.walk follows no link to a folder, so there are no loops.
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIP_FOLDERS]
        for name in names:
            if name.endswith(".py") and not name.startswith("test_") and not name.endswith("_test.py"):
                relative = Path(folder, name).relative_to(root)
                packages[relative.parts[0]].append((short_digest(relative.as_posix().encode()), root / relative))
    turns = sorted((k, *item) for items in packages.values() for k, item in enumerate(sorted(items)))
    return [path for _, _, path in turns]


def blocks(tree: ast.Module):
    """Yield (owner, statements) of each block, outer before inner."""
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            # The body of a lambda is no list but one expression.
            if (inner := getattr(node, field, None)) and isinstance(inner, list):
                yield node, inner


def is_string(statement: ast.stmt) -> bool:
    """A docstring, or a bare string that serves as a comment."""
    return isinstance(statement, ast.Expr) and isinstance(getattr(statement.value, "value", None), str)


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
    """Yield the prose of each docstring (or help topic) of a file, without paragraphs that are in `seen`."""
    if path.match("pydoc_data/topics.py"):
        docs = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    elif GENERATED.search(source[:2000]) or sum(map(len, QUOTED.findall(source))) < 0.2 * len(source):
        # Too little text in triple quotes to be worth the time of parsing.
        return
    else:
        docs = [body[0].value.value for _, body in blocks(ast.parse(source)) if is_string(body[0])]
    for doc in docs:
        text = ""
        for block in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
            paragraph = inspect.cleandoc(HEADING.sub("", block))
            key = " ".join(re.findall(r"\w+", paragraph.lower()))
            if key in seen or SECTION.match(block) or not is_prose(paragraph):
                continue
            seen.add(key)
            if len(text) + 2 + len(paragraph) > GENERAL_CHARS[1]:
                yield text
                text = ""
            text += f"\n\n{paragraph}" if text else paragraph
        yield text


def strip_code(source: str) -> str:
    """`source` without docstrings and comments, in its own layout; `pass` where a block held nothing else."""
    lines = source.split("\n")
    # A cut is (line, column, end line, end column, whether it opens a block, the text that takes its place).
    cuts = []
    for owner, body in blocks(ast.parse(source)):
        empty = all(map(is_string, body)) and not isinstance(owner, ast.Module)
        for node in filter(is_string, body):
            first, last = node.lineno - 1, node.end_lineno - 1
            # ast counts columns in UTF-8 bytes.
            start = len(lines[first].encode()[:node.col_offset].decode())
            end = len(lines[last].encode()[:node.end_col_offset].decode())
            cuts.append((first, start, last, end, node is body[0], "pass" if empty and node is body[0] else ""))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            cuts.append((token.start[0] - 1, token.start[1], token.end[0] - 1, token.end[1], False, ""))
    for first, start, last, end, opens, new in sorted(cuts, reverse=True):
        tail = lines[last][end:]
        # `"doc"; x = 1` leaves `x = 1`.
        line = (lines[first][:start] + (new + tail if new else tail.lstrip(" \t;"))).rstrip()
        lines[first:last + 1] = [line] if line else []
        blank_above = first == 0 or not lines[first - 1].strip()
        # Blank lines that belonged to the docstring or to the comment go with it.
        while not line and first < len(lines) and not lines[first].strip() and (opens or blank_above):
            del lines[first]
    return "\n".join(lines).strip("\n") + "\n"


def is_code(text: str) -> bool:
    """It parses and is no table of data: clearly more names than literals, less than 40 % of it inside strings."""
    nodes = list(ast.walk(ast.parse(text)))
    literals = [node for node in nodes if isinstance(node, ast.Constant)]
    names = sum(isinstance(node, (ast.Name, ast.Attribute, ast.arg)) for node in nodes)
    offset = list(accumulate((len(line.encode()) + 1 for line in text.split("\n")), initial=0))
    # A set of (begin, end) in bytes, because the parts of an f-string may all be given its whole span.
    spans = {(offset[node.lineno - 1] + node.col_offset, offset[node.end_lineno - 1] + node.end_col_offset)
             for node in literals if isinstance(node.value, (str, bytes))}
    return len(literals) < 0.8 * names and sum(end - start for start, end in spans) < 0.4 * len(text)


def python_code(path: Path, source: str, seen: set[str]):
    """Yield a file's code, in one piece or, where that is too long, in runs of top-level statements within bounds."""
    if GENERATED.search(source[:2000]):
        return
    text = strip_code(source)
    starts = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
              for node in ast.parse(text).body]
    lines, begin, pieces = text.split("\n"), 0, []
    for start, stop in zip(starts, [*starts[1:], len(lines)]):
        if start > begin and sum(map(len, lines[begin:stop])) + stop - begin > DOMAIN_CHARS[1]:
            pieces.append(lines[begin:start])
            begin = start
    yield from filter(is_code, ("\n".join(piece).strip("\n") + "\n" for piece in [*pieces, lines[begin:]]))


def collect(roots: list[Path], extract, bounds: tuple[int, int], budget: int) -> tuple[dict[str, dict], int]:
    """Records by id (a hash of their words: exact duplicates meet) up to `budget` bytes, and how many files failed."""
    records, seen, size, unreadable = {}, set(), 0, 0
    for path, name in ((path, path.relative_to(root).as_posix()) for root in roots for path in python_files(root)):
        try:
            # In the encoding that the file declares.
            with tokenize.open(path) as file:
                texts = list(extract(path, file.read(), seen))
        # What reading and parsing a damaged file may raise.
        except (OSError, SyntaxError, ValueError, RecursionError, tokenize.TokenError):
            unreadable += 1
            continue
        for text in texts:
            key = short_digest(" ".join(text.lower().split()).encode())
            if bounds[0] <= len(text) <= bounds[1] and key not in records:
                size += len(text.encode())
                if size > budget:
                    return records, unreadable
                records[key] = {"text": text, "id": key, "metadata": {"source": name}}
    return records, unreadable


def make_corpora(out: Path, general_bytes: int = 5_000_000, domain_bytes: int = 4_000_000,
                 roots: list[Path] | None = None) -> dict:
    """Write general.jsonl and domain.jsonl to `out`, in the order of the records' ids.

    roots: folders of .py files; by default the standard library's and those of the installed packages. Each side stops
    at its budget in bytes of text; UserError where not even a tenth of it is found. Returns {"general": {"path",
    "documents", "bytes", "unreadable" (files)}, "domain": {...}}.
    """
    if roots is None:
        packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        folders = [Path(path).resolve() for path in (sysconfig.get_path("stdlib"), *packages)]
        roots = list(dict.fromkeys(folder for folder in folders if folder.is_dir()))
    stats = {}
    for side, extract, bounds, budget in (("general", english, GENERAL_CHARS, general_bytes),
                                          ("domain", python_code, DOMAIN_CHARS, domain_bytes)):
        with warnings.catch_warnings():
            # The parser warns of invalid escapes in the strings of old code.
            warnings.simplefilter("ignore")
            records, unreadable = collect(roots, extract, bounds, budget)
        size = sum(len(record["text"].encode()) for record in records.values())
        if size < budget / 10:
            raise UserError(f"only {size:,} of the {budget // 10:,} bytes of {side} text that the demo needs are in "
                            f"the files of {', '.join(map(str, roots)) or 'no folder'}: use a Python that has its "
                            f"standard library as .py files")
        path = Path(out) / f"{side}.jsonl"
        write_text(path, "".join(json.dumps(records[key]) + "\n" for key in sorted(records)))
        stats[side] = {"path": path, "documents": len(records), "bytes": size, "unreadable": unreadable}
        print(f"{path}: {len(records):,} documents, {size:,} bytes, {unreadable} unreadable files", flush=True)
    return stats


# ---- the main job, in the project's own commands

# Share of domain sequences of each run.
RUNS = {"domain_only": 1.0, "replay": 0.8, "little_replay": 0.95}
BASE_STEPS, STEPS = 450, 180


@dataclass
class Demo:
    out: str = "out/demo"
    """The folder to write; a demo in it that was stopped goes on, and anything else that it held is removed."""


def plan_commands(out: Path, sides: dict[str, Path]) -> list[tuple[Path, list[str]]]:
    """The demo's commands, each with the file or folder that is there once it is done."""
    commands = [(out / "tokenizer/tokenizer.json", [
        "tokenizer.py", "train", "--kind", "bpe", "--vocab-size", 2048, "--out", out / "tokenizer", *sides.values()])]
    for side, path in sides.items():
        commands.append((out / "shards" / side / "manifest.json", [
            "data.py", "pack", "--tokenizer", out / "tokenizer", "--out", out / "shards" / side, path,
            "--heldout", 0.04, "--heldout-hash", "exact"]))
    general = ("--data.sources.general.path", out / "shards/general", "--data.sources.general.role", "general")
    domain = ("--data.sources.domain.path", out / "shards/domain")
    commands.append((out / "base/eval.json", [
        "train.py", "recipes/demo.toml", "--model.init", "scratch", "--model.tokenizer", out / "tokenizer", *general,
        "--train.steps", BASE_STEPS, "--eval.every", 150, "--optim.lr", 4e-3, "--optim.min-lr", 4e-4,
        "--out", out / "base"]))
    for name, share in RUNS.items():
        commands.append((out / name / "eval.json", [
            "train.py", "recipes/demo.toml", "--model.path", out / "base/final", *domain, *general,
            "--data.domain-share", share, "--train.steps", STEPS, "--out", out / name]))
    commands.append((out / "report.html", ["report.py", *(out / name for name in RUNS), "--out", out / "report.html"]))
    return [(done, list(map(str, words))) for done, words in commands]


def follow_plan(out: Path, commands: list[tuple[Path, list[str]]], make_texts) -> None:
    """Run those of `commands` whose file or folder is not there yet, and before all of them make_texts(). `out` keeps
    the plan; a finished one, and one of other commands or of another checkout, begins anew: its files may not fit."""
    plan = out / "plan.json"
    code = b"".join(file.read_bytes() for file in sorted([*Path().glob("*.py"), *Path().glob("*/*.py")]))
    stated = {"code": short_digest(code), "commands": [words for _, words in commands]}
    if (out / "summary.json").exists() or not (plan.exists() and read_json(plan) == stated):
        if not plan.exists():
            refuse_existing(out)
        # While the old files go, what says that this is a folder of ours stays, and says that they do not fit.
        write_json(plan, {})
        for path in out.iterdir():
            if path != plan:
                remove(path)
        make_texts()
        write_json(plan, stated)
    for done, words in commands:
        if done.exists():
            print(f"done before: python {' '.join(words)}", flush=True)
        else:
            cli.run_command(*words, show=True)


def demo(options: Demo) -> dict:
    """Everything from the corpora to the report; returns what summary.json holds: {"seconds", "runs": {name:
    {"domain_bpb", "general_bpb"}}}, the base among the runs."""
    # Relative paths keep the commands that are shown short.
    out = Path(os.path.relpath(Path(options.out).resolve(), cli.ROOT))
    os.chdir(cli.ROOT)
    began = time.perf_counter()
    sides = {side: out / f"{side}.jsonl" for side in ("general", "domain")}
    commands = plan_commands(out, sides)
    follow_plan(out, commands, lambda: make_corpora(out))
    texts = {"base": read_json(out / "replay/eval.json")["before"],
             **{name: read_json(out / name / "eval.json")["after"] for name in RUNS}}
    runs = {name: {f"{side}_bpb": scores[side]["bits_per_byte"] for side in sides} for name, scores in texts.items()}
    seconds = time.perf_counter() - began
    summary = {"seconds": round(seconds, 1), "runs": runs}
    write_json(out / "summary.json", summary)
    base, alone, replay = runs["base"], runs["domain_only"], runs["replay"]
    print(f"\n{'bits per byte':16}{'domain':>10}{'':>9}{'general':>10}")
    for name, scores in runs.items():
        columns = ""
        for key in ("domain_bpb", "general_bpb"):
            change = f"{100 * (scores[key] / base[key] - 1):+7.1f} %" if scores is not base else ""
            columns += f"{scores[key]:10.4f}{change:>9}"
        print(f"{name:16}{columns}")
    lost, kept = alone["general_bpb"] - base["general_bpb"], alone["general_bpb"] - replay["general_bpb"]
    cost = replay["domain_bpb"] / alone["domain_bpb"] - 1
    print(f"replay removed {100 * kept / lost:.0f} % of what domain-only training forgot, and cost the domain "
          f"{100 * cost:.1f} %")
    print(f"{seconds:.0f} s; report: {out}/report.html")
    return summary


if __name__ == "__main__":
    sys.exit(cli.run("demo.py", __doc__, (Demo, demo)))
