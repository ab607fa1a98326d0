"""Files of strangers do nothing: one line and exit 2, or, where they are no mistake, their result; nothing of them runs
and no terminal obeys them, within 10 s and 2 GB. The cases stand in hostile_texts.py. Run by test_hostile.py."""

from pathlib import Path
from types import SimpleNamespace

import harness
import hostile_texts
import pytest

import hf
from core.output import CONTROL

from .hostile_models import SECONDS

CORPORA = hostile_texts.corpora()
BOMBS = len(hostile_texts.BOMBS) * len(hostile_texts.READERS)


def check(case: hostile_texts.Case, tools: Path, here: Path):
    """Make the input of a case and run its command, both in processes of their own."""
    assert harness.run(lambda: case.make(here) and 0).status == 0
    done = harness.start(case.module, case.line(here, tools)).wait(2 * SECONDS, most_bytes=2 << 30)
    said = done.out + done.err
    if case.names:
        assert done.is_one_line, said
        assert case.names.replace("{here}", str(here)) in done.err
    else:
        assert done.status == 0, said
    assert not CONTROL.search(said)
    assert not (here / "owned").exists()
    assert not Path("owned").exists()
    assert done.seconds < SECONDS


@pytest.mark.parametrize("case", CORPORA[BOMBS:], ids=lambda case: ascii(case.name)[1:-1])
def test_strange_corpora(case, tools, tmp_path):
    check(case, tools, tmp_path)


# Each bomb for one reader, in turn; `make faults` has them all.
@pytest.mark.parametrize("case", [CORPORA[i] for i in range(BOMBS) if i % 5 == i // 5 % 5], ids=lambda case: case.name)
def test_corpora_that_fill_the_memory(case, tools, tmp_path):
    check(case, tools, tmp_path)


# Of the folders in which every field is odd, tests take one in four.
@pytest.mark.parametrize("case", [case for i, case in enumerate(hostile_texts.run_folders())
                                  if i % 4 == 0 or "every field" not in case.name], ids=lambda case: case.name)
def test_run_folders(case, tools, tmp_path):
    check(case, tools, tmp_path)
    if not case.names:
        # No text of a stranger's is markup: the page has the elements of a page of plain names, and no others.
        page = (tmp_path / "page.html").read_text()
        assert "<script" not in page
        assert "<img" not in page
        assert page.count("</style>") == 1
        assert "{{7*7}}" in page or hostile_texts.MARKUP not in str(case)


def test_no_licence_or_name_is_front_matter(tmp_path):
    facts = {"license": "mit\nbase_model: evil"}
    base = SimpleNamespace(name="a`\n---\nlicense: mit\n\x1b[2J", facts=facts)
    card = hf.make_card(base, "out", "what it is")
    front, rest = card.split("---")[1], card.split("---")[2:]
    assert "evil" not in front
    assert "license" not in front
    assert "\x1b" not in card
    assert len(card.splitlines()) == len(hf.make_card(SimpleNamespace(name="a", facts=facts), "out", "what it is"
                                                      ).splitlines())
    assert rest
