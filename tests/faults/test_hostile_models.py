"""Every folder of hostile_models.py ends in one line that names what is wrong, quickly and in little memory; nothing in
it runs, and nothing outside it is read or copied. And good folders of every kind work, through the same commands."""

import os
import re
import shutil
import sys

import pytest
import torch

import data
import eval
import forget
import generate
import lora
import tokenizer
import train

from .harness import command, run, start
from .hostile_models import CASES, EVAL, SECRET, make_templates

COMMANDS = data, eval, forget, generate, lora, tokenizer, train
SECONDS, BYTES = 10.0, 2 << 30


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "home"

    def make():
        torch.set_num_threads(1)
        make_templates(folder)
        words = ["pack", "--tokenizer", folder / "model", "--out", folder / "shards", folder / "text.txt"]
        return command("data", words)
    made = run(make)
    assert made.status == 0, made.err
    return folder


def point_at(home, room, case):
    """What the command made of the case, in a process that tells what it opened."""
    module, words = case.fill(home, room)

    def work():
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(1)
        secret = os.path.realpath(home / "secret.txt")

        def hook(event, arguments):
            if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)) and (
                    os.path.realpath(arguments[0]) == secret):
                print("OPENED WHAT STANDS OUTSIDE", file=sys.__stdout__)
        sys.addaudithook(hook)
        return command(module, words)
    return start(work).wait(SECONDS + 20, 2 * BYTES)


@pytest.mark.parametrize("case", [pytest.param(case, id=re.sub(r"[^ -~]", "?", case.name)) for case in CASES])
def test_it_ends_in_one_line(case, home, tmp_path):
    outcome = point_at(home, tmp_path, case)
    assert outcome.status == 2, f"{outcome}\n{outcome.err[-3000:]}"
    lines = outcome.err.splitlines()
    assert [line[:7] for line in lines] == ["error: "], outcome.err[-3000:]
    assert case.says in lines[0]
    assert len(lines[0]) < 5000
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", outcome.err + outcome.out)
    assert outcome.seconds < SECONDS
    assert outcome.peak_bytes < BYTES
    assert not (home / "canary").exists()
    assert "OPENED" not in outcome.out
    assert SECRET not in outcome.out + outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("template", ["model", "bin", "pieces", "gpt2"])
def test_the_good_folders_are_good(template, home, tmp_path):
    case = next(case for case in CASES if case.words == EVAL)
    good = type(case)("good", template, lambda folder, home: None, EVAL, "")
    outcome = point_at(home, tmp_path, good)
    assert outcome.status == 0, outcome.err
    shutil.rmtree(tmp_path / "folder")


def test_there_are_many():
    assert len(CASES) >= 200
    assert len({case.name for case in CASES}) == len(CASES)
