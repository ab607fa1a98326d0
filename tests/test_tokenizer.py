"""The command line of tokenizer.py."""

import re
import subprocess
import sys
from pathlib import Path

import tokenizer as T

ROOT = Path(__file__).parent.parent
CORPUS = ["The cat sat on the mat, and the dog didn't.\n\n", "Habeas corpus 1234 naïve 漢字 <0x41>!\r\n",
          "\tres judicata  two\n"] * 8


def run(*arguments):
    command = [sys.executable, ROOT / "tokenizer.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_command_line(tmp_path):
    (tmp_path / "a.txt").write_text("".join(CORPUS))
    done = run("train", "--kind", "bpe", "--vocab-size", 9999, "--out", tmp_path / "t", tmp_path / "a.txt")
    ours = T.load(tmp_path / "t")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"bpe tokenizer with {ours.vocab_size} ids of 9999: the text gave no more" in done.stdout
    shown = run("encode", "--tokenizer", tmp_path / "t", "the cat").stdout.splitlines()
    assert [int(i) for i in shown[0].split()] == ours.encode("the cat")
    assert shown[1] == " ".join(repr(ours.id_to_token(i)) for i in ours.encode("the cat"))
    for arguments, message in ((["encode", "--tokenizer", tmp_path / "no", "x"], "does not exist"),
                               (["train", "--out", "x", "--vocab-size", "300", tmp_path / "no.txt"], "no.txt")):
        failed = run(*arguments)
        assert (failed.returncode, failed.stdout) == (2, "")
        assert re.fullmatch(rf"error: .*{message}.*\n", failed.stderr)
    assert run("--help").returncode == 0
