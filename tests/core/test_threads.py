"""OpenMP's settings. Truth: the environment that libgomp reads, in a fresh process of each command."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core import threads

ROOT = Path(__file__).parents[2]


def spin_count(**variables) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import os, core.threads; print(os.environ.get('GOMP_SPINCOUNT'))"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean | variables, capture_output=True,
                          text=True, check=True).stdout.strip()


def test_the_users_own_setting_wins():
    assert spin_count() in ("50000", "20000", "1000")
    assert spin_count(GOMP_SPINCOUNT="7") == "7"
    assert spin_count(OMP_WAIT_POLICY="active") == "None"


@pytest.mark.parametrize(("others", "turns"), [(0, 50_000), (1, 20_000), (7, 20_000), (8, 1_000), (40, 1_000)])
def test_the_more_others_run_the_sooner_a_thread_gives_up_its_core(others, turns):
    assert threads.choose_spin_turns(others, cores=4) == turns


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="what else runs is counted in Linux's /proc/stat")
def test_busy_processes_are_counted():
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        time.sleep(0.5)
        assert threads.count_others() >= 3
    finally:
        for process in busy:
            process.kill()
            process.wait()


def commands() -> list[Path]:
    """The files that a person runs; the experiments start these, and report.py computes nothing."""
    return [path for path in sorted(ROOT.glob("*.py"))
            if "__main__" in path.read_text(encoding="utf-8") and path.name != "report.py"]


@pytest.mark.parametrize("path", commands(), ids=lambda path: path.name)
def test_every_command_sets_them_before_anything_else(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    ours = [i for i, node in enumerate(body) if isinstance(node, ast.Import) and node.names[0].name == "core.threads"]
    heavy = [i for i, node in enumerate(body) if isinstance(node, (ast.Import, ast.ImportFrom))
             and "torch" in ast.unparse(node)]
    assert ours, f"{path.name} does not import core.threads"
    assert not heavy or ours[0] < heavy[0]
