"""The command line. Truth: the words a user types and the options, line or exit status they stand for."""

import json
import re
from dataclasses import dataclass, field
from typing import Literal

import pytest

from core import cli
from core.cli import Device, Output, Positional, Reading, Repeated
from core.config import setting
from core.errors import UserError


@dataclass(kw_only=True)
class Pack(Output):
    """Tokenise files into shards."""

    files: Positional[list[str]]
    """Text files, or Hub datasets."""
    tokenizer: str
    """A model folder or a tokenizer file."""
    text: list[str] = field(default_factory=list)
    """NAME=FILE of a text to score."""
    rule: Repeated[list[str]] = field(default_factory=list)
    """A rule to change."""
    pii: bool = True
    """Leave personal data in."""
    heldout: float = setting(0.02, at_least=0, below=1)
    """Share of the documents that is held out."""
    part: str | None = None
    """K/N: pack the K-th of N parts."""
    reading: Reading = field(default_factory=Reading)


@dataclass
class Optim:
    lr: float = setting(1e-4, above=0)
    """Peak learning rate."""
    name: Literal["adamw", "muon"] = "adamw"


@dataclass
class Source:
    path: str = ""
    weight: float = setting(1.0, at_least=0)


@dataclass
class Recipe:
    steps: int | None = None
    compile: bool = False
    """Compile the model."""
    optim: Optim = field(default_factory=Optim)
    sources: dict[str, Source] = field(default_factory=dict)

    def __post_init__(self):
        if self.compile and self.steps == 7:
            raise UserError("steps is 7, but compile is on; choose one")


def pack(*words) -> Pack:
    return cli.parse(Pack, list(words), "data.py pack")


def train(*words) -> Recipe:
    return cli.parse(Recipe, list(words), "train.py", recipe=True)


def test_options_in_any_order_and_form():
    want = Pack(out="o", files=["a", "b"], tokenizer="t", text=["x=1", "y=2"], rule=["r=1:", "s=2:"], pii=False,
                heldout=0.5, overwrite=True, reading=Reading(documents="line", separator="--"))
    assert pack("a", "b", "--out", "o", "--tokenizer", "t", "--text", "x=1", "y=2", "--rule", "r=1:", "--rule", "s=2:",
                "--no-pii", "--heldout", "0.5", "--overwrite", "--documents", "line", "--separator=--") == want
    assert pack("--text=x=1", "--tokenizer=t", "--rule=r=1:", "--no-pii", "--text", "y=2", "--out=o", "--heldout=.5",
                "--rule", "s=2:", "--documents=line", "--separator=--", "--overwrite", "--", "a", "b") == want


def test_a_word_after_an_option_is_its_value_whatever_it_begins_with():
    assert pack("a", "--out", "o", "--tokenizer", "-x y", "--part", "-5").tokenizer == "-x y"
    assert pack("--out", "o", "--tokenizer", "t", "--", "-h", "--json").files == ["-h", "--json"]


@pytest.mark.parametrize(("words", "line"), [
    (["--tokeniser", "t", "a"], "unknown option --tokeniser; did you mean --tokenizer?"),
    (["--no-overwrite", "a"], "unknown option --no-overwrite; did you mean --overwrite?"),
    (["--tokenizer", "t", "--out", "o"], "name at least one FILE (data.py pack --help shows how)"),
    (["a", "--out", "o"], "Missing from data.py pack: --tokenizer STR A model folder or a tokenizer file. (required)"),
    (["a", "--out", "o", "--tokenizer", "t", "--heldout", "x"], "--heldout: 'x' is no FLOAT"),
    (["a", "--out", "o", "--tokenizer", "t", "--heldout", "1"], "--heldout is 1.0, but must be at least 0 and below 1"),
    (["a", "--out", "o", "--tokenizer", "t", "--heldout", "nan"],
     "--heldout is nan, but must be at least 0 and below 1"),
    (["a", "--out", "o", "--tokenizer", "t", "--overwrite=false"], "--overwrite takes no value"),
    (["a", "--out", "o", "--tokenizer", "t", "--documents", "lines"],
     "invalid choice 'lines' for argument '--documents'. Expected one of ('line', 'blank', 'file')."),
])
def test_a_mistake_is_one_line_that_names_option_value_and_remedy(words, line):
    with pytest.raises(UserError) as caught:
        pack(*words)
    assert str(caught.value) == line


def test_a_recipe_then_words(tmp_path):
    (tmp_path / "r.toml").write_text('steps = 3\n[optim]\nlr = 0.1\n[sources.law]\npath = "a"\n')
    got = train(str(tmp_path / "r.toml"), "--optim.lr", "0.2", "--sources.new.path=b", "--compile", "--steps", "4")
    assert got == Recipe(4, True, Optim(0.2), {"law": Source("a"), "new": Source("b")})
    assert train("--compile", "false") == train("--compile=False") == train() == Recipe()


@pytest.mark.parametrize(("words", "line"), [
    (["--step", "3"], "unknown key step; did you mean steps?"),
    (["--optim.lr", "0"], "optim.lr is 0.0, but must be above 0"),
    (["--sources.law.weight", "-1"], "sources.law.weight is -1.0, but must be at least 0"),
    (["--steps", "x"], "--steps: 'x' is no INT"),
    (["--steps", "7", "--compile"], "steps is 7, but compile is on; choose one"),
    (["no.toml"], "recipe no.toml does not exist; recipes/ holds complete ones"),
])
def test_a_mistake_in_a_recipe_names_its_key(words, line):
    with pytest.raises(UserError) as caught:
        train(*words)
    assert str(caught.value) == line


COMMANDS = {"pack": (Pack, lambda options: {"out": options.out}), "stop": (Device, lambda options: 5)}


def run(*words, commands=COMMANDS) -> int:
    return cli.run("data.py", "What data.py does.", commands, argv=list(words))


def test_json_that_can_be_no_file_is_refused_before_the_work(tmp_path, capsys):
    commands = {"work": (Device, lambda options: pytest.fail("the work must not begin"))}
    assert run("work", "--json", str(tmp_path), commands=commands) == 2
    assert capsys.readouterr().err == f"error: --json {tmp_path} is a folder; name a file in it\n"


def test_run_gives_status_and_json(tmp_path, capsys):
    words = ["pack", "a", "--out", "o", "--tokenizer", "t"]
    assert run(*words, "--json", str(tmp_path / "new/x.json")) == 0
    assert json.loads((tmp_path / "new/x.json").read_text()) == {"out": "o"}
    assert run(*words, f"--json={tmp_path}/y.json") == 0
    assert (tmp_path / "y.json").exists()
    assert run("stop") == 5
    assert run(*words, "--json") == run(*words, "--json=") == 2
    assert run("pakc") == 2
    assert run() == 2
    err = capsys.readouterr().err.splitlines()
    assert err == ["error: --json needs the name of a file"] * 2 + [
                   "error: unknown command pakc; did you mean pack? (data.py has pack, stop)",
                   "error: name a command: data.py pack|stop"]


def raising(error):
    def function(options):
        raise error
    return Device, function


def test_the_users_mistake_is_a_line_and_ours_a_traceback(capsys):
    assert run(commands=raising(UserError("a is 1,\n  but must be 2"))) == 2
    assert run(commands=raising(FileNotFoundError(2, "No such file or directory", "here.txt"))) == 2
    full = OSError(28, "No space left on device", "from.txt", None, "to.txt")
    assert run(commands=raising(full)) == 2, "as shutil.copy raises it"
    assert run(commands=raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ("error: a is 1, but must be 2\nerror: No such file or directory: here.txt\n"
                                       "error: No space left on device: to.txt\nstopped by Ctrl-C\n")
    for bug in (AssertionError("ours"), ValueError("ours"), KeyError("ours")):
        with pytest.raises(type(bug)):
            run(commands=raising(bug))


def test_help_reads_well_at_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        run("pack", "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("usage: data.py pack [-h] [OPTIONS] [FILES]\n\nTokenise files into shards.\n\n")
    assert text.endswith("\n\n--json FILE writes the result as data.\n")
    assert re.search(r"  --heldout FLOAT\s+Share of the documents that is held out.\s+\(default: 0.02\)\n", text)
    assert re.search(r"  --part STR\s+K/N: pack the K-th of N parts.\n", text)
    assert "reading options:\n  How text is read.\n" in text
    assert "│" not in text
    with pytest.raises(SystemExit):
        run("--help")
    assert "  pack  Tokenise files into shards.\n" in capsys.readouterr().out
