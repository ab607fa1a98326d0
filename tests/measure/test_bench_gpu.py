"""The suite for a GPU, as far as it can be proven without one. Truth: stages and processes made by hand."""

import json
import subprocess
import types
from pathlib import Path

import torch

from measure import bench_kernels
from measure.bench_kernels import GpuOptions


def test_stages_keep_what_others_found(tmp_path, monkeypatch, capsys):
    """The suite goes on when a stage fails, runs out of time or leaves failing tests behind."""
    def run(words, timeout, stdout=None, **options):
        if "1b" in words:
            Path(words[-1]).write_text(json.dumps({"rows": [{"name": "half"}]}))         # what it had found by then
            raise subprocess.TimeoutExpired(words, timeout)
        if "kernels" in words:
            assert 300 < float(words[words.index("--seconds") + 1]) < 480
            Path(words[-1]).write_text(json.dumps({"rows": [{"name": "found"}]}))
            return types.SimpleNamespace(returncode=0)
        if "pytest" in words:
            stdout.write("a PASSED\nb FAILED\nc PASSED\n")
            return types.SimpleNamespace(returncode=1)
        return types.SimpleNamespace(returncode=3)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_kernels, "subprocess", types.SimpleNamespace(
        run=run, TimeoutExpired=subprocess.TimeoutExpired, STDOUT=-2))
    rows = bench_kernels.bench_gpu(GpuOptions(out=str(tmp_path)))
    assert [(r["name"], r.get("failed", "")[:12]) for r in rows] == [
        ("train --cases 8b --device cuda --steps 8", "exit status "), ("half", ""),
        ("train --cases 1b --device cuda --steps 8", "90 seconds w"),
        ("gpu_tests", "a PASSED\nb F"), ("found", "")]
    assert rows[3]["counts"] == {"passed": 2, "failed": 1, "skipped": 0, "error": 0}


def test_tests_that_take_too_long_are_counted_as_far_as_they_came(tmp_path, monkeypatch, capsys):
    def run(words, timeout, stdout, **options):
        stdout.write("a PASSED\n")
        raise subprocess.TimeoutExpired("pytest", timeout)
    monkeypatch.setattr(subprocess, "run", run)
    made = bench_kernels.test_row(tmp_path / "tests.txt", 5)
    assert made["counts"]["passed"] == 1
    assert "5 seconds were up" in made["failed"]
