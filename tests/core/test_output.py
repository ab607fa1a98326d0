"""What is printed never ends the work. Truth: the files that real processes leave, whatever standard output is."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tqdm import tqdm

from core import cli
from core.errors import UserError
from core.output import escape, keep_printing

ROOT = Path(__file__).resolve().parents[2]
COMMAND = """
import sys
from dataclasses import dataclass
from core import cli
@dataclass
class Options:
    times: int = 1
    \"\"\"How often, naïvely.\"\"\"
def work(options):
    for i in range(options.times):
        print("Müller 法典", i, flush=i % 2 == 0)
    print("Müller 法典", file=sys.stderr)
    return {"text": "Müller 法典"}
sys.exit(cli.run("work.py", "What it does.", (Options, work)))
"""


@dataclass
class Options:
    times: int = 1


def run(*words, **more) -> subprocess.CompletedProcess:
    env = {**os.environ, **more.pop("env", {})}
    # ASCII, because a locale may have no other characters for arguments.
    return subprocess.run([sys.executable, "-c", f"exec({COMMAND!a})", *map(str, words)], cwd=ROOT, env=env,
                          check=False, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more})


@pytest.mark.parametrize(("env", "said"), [
    ({"PYTHONIOENCODING": "ascii"}, rb"M\xfcller \u6cd5\u5178 0"),
    ({"PYTHONIOENCODING": "latin-1"}, "Müller \\u6cd5\\u5178 0".encode("latin-1")),
    ({"PYTHONIOENCODING": "cp1252:strict"}, "Müller \\u6cd5\\u5178 0".encode("cp1252")),
    ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, rb"M\xfcller \u6cd5\u5178 0"),
    ({"LANG": "C"}, "Müller 法典 0".encode()),
])
def test_a_stdout_that_is_not_utf8(tmp_path, env, said):
    if "LANG" in env:
        env |= {"LC_ALL": "C"}
    done = run("--json", tmp_path / "x.json", env={"PYTHONIOENCODING": "", **env})
    assert (done.returncode, done.stdout.strip()) == (0, said)
    assert done.stderr.strip() == said.removesuffix(b" 0")
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"text": "Müller 法典"}
    assert run("--help", env={"PYTHONIOENCODING": "ascii"}).returncode == 0


@pytest.mark.parametrize("times", [1, 20_000])
def test_a_pipe_that_its_reader_has_closed(tmp_path, times):
    for stream in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        done = run("--times", times, "--json", tmp_path / "x.json", **{stream: writer})
        os.close(writer)
        assert done.returncode == 0
        assert done.stderr in (None, "Müller 法典\n".encode())
        assert (tmp_path / "x.json").exists()
        (tmp_path / "x.json").unlink()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
@pytest.mark.parametrize("times", [1, 20_000])
def test_a_stdout_on_a_full_disk_is_said_after_the_work(tmp_path, times):
    with open("/dev/full", "wb") as full:
        done = run("--times", times, "--json", tmp_path / "x.json", stdout=full)
        assert done.returncode == 2
        assert done.stderr.decode().splitlines() == ["Müller 法典", (
            "error: the output could not be written (No space left on device); what goes to files is complete")]
        assert (tmp_path / "x.json").exists()
        assert run("--json", tmp_path / "x.json", stderr=full).returncode == 0


def test_a_stdout_that_is_not_there(tmp_path):
    line = f'exec "$0" -c "$1" --json {tmp_path}/x.json >&- 2>&-'
    assert subprocess.run(["sh", "-c", line, sys.executable, COMMAND], cwd=ROOT, check=False).returncode == 0
    assert (tmp_path / "x.json").exists()


STRANGE = "a\x1b[2Jb\rc\bd\x07e\x9bf\u202eg\u2066h\u2028i\tj\nk"


def test_control_characters_are_shown_and_not_obeyed(capsys):
    shown = r"a\x1b[2Jb\rc\x08d\x07e\x9bf\u202eg\u2066h\u2028i" + "\tj\nk"
    with keep_printing():
        print(STRANGE)
        print(STRANGE, file=sys.stderr)
    assert capsys.readouterr() == (f"{shown}\n", f"{shown}\n")
    assert escape(STRANGE, line=True) == shown.replace("\t", r"\t").replace("\n", r"\n")
    # Honest text of any script passes, its joiners and direction marks too.
    assert escape("Müller 法典 👩\u200d💻 می\u200cخواهم\u200f") == "Müller 法典 👩\u200d💻 می\u200cخواهم\u200f"


def test_a_progress_bar_moves_the_cursor_and_its_words_do_not(capsys):
    with keep_printing():
        bar = tqdm(total=3, desc="a\x1b[2J", file=sys.stderr)
        bar.update(3)
        tqdm.write("said\x1b[2J")
        bar.close()
        sys.stderr.write("\x1b[A\n\x1b[31mred\x1b[0m")
    out, err = capsys.readouterr()
    assert out == "said\\x1b[2J\n"
    assert err.startswith("\ra\\x1b[2J:   0%")
    assert "\x1b" not in err
    assert err.endswith("red")


def test_the_line_of_an_error_is_one_line(capsys):
    def fail(_):
        raise UserError(f"{STRANGE} is no folder")
    assert cli.run("work.py", "What it does.", (Options, fail), argv=[]) == 2
    assert capsys.readouterr().err == (
        r"error: a\x1b[2Jb c\x08d\x07e\x9bf\u202eg\u2066h i j k is no folder" + "\n")
