"""`make faults` in short: every section of the suite with small numbers, in a process of its own, because workers are
forked from one that never computed. Truth: undisturbed runs and commands, and two wrong rules that must fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .__main__ import SECTIONS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_nothing_is_lost_and_nobody_comes_in(section, tmp_path):
    words = [sys.executable, "-m", "tests.faults", section, "--short", "--jobs", "1", "--json", tmp_path / "rows.json"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert (tmp_path / "rows.json").exists(), done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == len(SECTIONS[section])
    assert not [failure for row in rows for failure in row["failures"]]
    assert done.returncode == 0, done.stderr[-3000:]
