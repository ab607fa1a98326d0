"""`make faults` in short: every section of the suite with small numbers, in two processes of their own, because workers
are forked from one that never computed. Truth: undisturbed runs and commands, and two wrong rules that must fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .__main__ import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
# About the same time each: what the sections share, as the undisturbed runs, is made once a process.
HALVES = [("kills", "points", "signals", "hangs"), ("not_finite", "damages", "disks", "races", "strangers", "nodes",
                                                             "control")]


def test_every_section_is_in_one_of_them():
    assert sorted(SECTIONS) == sorted(name for half in HALVES for name in half)


@pytest.mark.slow
@pytest.mark.parametrize("sections", HALVES, ids=" ".join)
def test_nothing_is_lost_and_nobody_comes_in(sections, tmp_path):
    words = ["-m", "tests.faults", *sections, "--short", "--jobs", "1", "--json", tmp_path / "rows.json"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert (tmp_path / "rows.json").exists(), done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == sum(len(SECTIONS[name]) for name in sections)
    assert not [failure for row in rows for failure in row["failures"]]
    assert done.returncode == 0, done.stderr[-3000:]
