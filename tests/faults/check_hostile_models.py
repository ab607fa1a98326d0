"""Every folder of hostile_models.py ends in one line that names what is wrong, quickly and in little memory; nothing in
it runs, and nothing outside it is read or copied. And good folders of every kind work, through the same commands.

Here one case in fifteen; `make faults` takes all. Run by test_hostile.py."""

import re

import pytest

from .hostile_models import CASES, EVAL, GENERATE, Case, complain, point_at, prepare


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "home"
    prepare(folder)
    return folder


def name(case) -> str:
    return re.sub("[^ -~]", "?", case.name)


@pytest.mark.parametrize("case", CASES[::15], ids=name)
def test_it_ends_in_one_line(case, home, tmp_path):
    assert not complain(case, home, tmp_path)


@pytest.mark.parametrize("template", ["model", "bin", "pieces", "gpt2"])
def test_the_good_folders_are_good(template, home, tmp_path):
    for i, words in enumerate((EVAL, GENERATE)):
        (room := tmp_path / str(i)).mkdir()
        outcome = point_at(Case("good", template, lambda folder, home: None, words, ""), home, room)
        assert outcome.status == 0, outcome.err


def test_there_are_many():
    assert len(CASES) >= 200
    assert len({case.name for case in CASES}) == len(CASES)
