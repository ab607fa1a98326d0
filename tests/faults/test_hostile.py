"""Files of strangers, each kind in a process of its own: cases are forked from one that has not computed yet, because
threads do not survive a fork. Truth: what the cases themselves say."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["models", "texts"])
def test_strangers_do_nothing(kind, tmp_path):
    words = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist",
             f"--basetemp={tmp_path / 'cases'}", HERE / f"check_hostile_{kind}.py"]
    done = subprocess.run(words, cwd=HERE.parent.parent, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:]
