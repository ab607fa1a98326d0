"""A tokenizer.json is tried out before it is used. Truth: tokenizers made here, each with one part that is nonsense;
the commands themselves meet more of them in tests/faults/check_hostile_models.py."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import UserError
from text import foreign_tokenizers
from text.foreign_tokenizers import open_tokenizer_json
from text.vocabulary import LLAMA3_SPLIT, load

ROOT = Path(__file__).resolve().parents[2]
# Prints why the tokenizer.json that it is given is refused.
OPEN = """
import sys
from pathlib import Path
from core.errors import UserError
from text import foreign_tokenizers
foreign_tokenizers.TRIAL_SECONDS = 1.0
try:
    foreign_tokenizers.open_tokenizer_json(Path(sys.argv[1]))
except UserError as error:
    print(error)
"""


def write(folder, **parts):
    values = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
              "pre_tokenizer": None, "post_processor": None, "decoder": None,
              "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate("abc ")}, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(values | parts))
    return folder / "tokenizer.json"


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def steps(*contents: str, pattern=None) -> dict:
    return {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content} for content in contents]}


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+b", "(?:a*)(?:a*)(?:a*)(?:a*)(?=[0-9])", r"(\w+\s?)+:"])
def test_patterns_that_take_for_ever_are_found(tmp_path, pattern):
    # A call into Rust cannot be stopped: in this process its thread would take a core from all tests that follow.
    done = subprocess.run([sys.executable, "-c", OPEN, write(tmp_path, pre_tokenizer=split(pattern))],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert re.search(r"tokenizer\.json (fails on|takes more than 1 s for) a short text", done.stdout), done
    # Rust writes the stack trace of its panics to the screen.
    assert done.stderr == ""


@pytest.mark.parametrize("pattern", [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    LLAMA3_SPLIT,
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}",
    r" ?[^(\s|[.,!?…。，、।۔،])]+", r"(?=(\d{3})+(?!\d))", r"\d{1,3}(?=(?:\d{3})*\b)"],
    ids=["gpt2", "llama3", "gpt4o", "bloom", "thousands", "superbpe"])
def test_patterns_of_known_tokenizers_pass(tmp_path, pattern):
    open_tokenizer_json(write(tmp_path, pre_tokenizer=split(pattern)))


@pytest.mark.parametrize(("parts", "says"), [
    ({"normalizer": steps(*["aa"] * 40)}, "a normalizer that can make a text .* times as long"),
    ({"normalizer": steps("a" * 20_000)}, "a normalizer that puts in 20,000 characters"),
    ({"normalizer": steps("aaaaaaaaaaaa", "aaaaaaaaaaaa", pattern={"Regex": r"\Aa|a"})}, "a normalizer that can make"),
    ({"normalizer": {"type": "Prepend", "prepend": "a" * 20_000}}, "a normalizer that puts in 20,000"),
    ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "fails on a short text"),
    ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "cannot be read as tokenizer.json"),
    ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "has no tokens"),
    ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1 << 31}, "merges": []}}, "has the id 2147483648"),
    ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}, "gives the id 0 to"),
    ({"model": {"type": "BPE", "vocab": {"a": 0, "b" * 10_001: 1}, "merges": []}}, "a token of 10,001 characters")])
def test_nonsense_is_named(tmp_path, capfd, parts, says):
    with pytest.raises(UserError, match=says):
        load(write(tmp_path, **parts))
    assert capfd.readouterr().err == ""


def test_a_panic_over_a_text_is_an_error_of_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign_tokenizers, "TRIAL", ("abc",))
    tokenizer = load(write(tmp_path, pre_tokenizer=split("(a+)+$")))
    assert tokenizer.encode("abc") == [0, 1, 2]
    with pytest.raises(UserError, match="this tokenizer cannot encode a text"):
        tokenizer.encode("a" * 60 + "b")


def test_an_interrupt_is_no_panic():
    with pytest.raises(KeyboardInterrupt), foreign_tokenizers.panics_as_errors("x"):
        raise KeyboardInterrupt
