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
    def run(words, timeout):
        if "1b" in words:
            Path(words[-1]).write_text(json.dumps({"rows": [{"name": "half"}]}))         # what it had found by then
            raise subprocess.TimeoutExpired(words, timeout)
        if "kernels" in words:
            assert 300 < float(words[words.index("--seconds") + 1]) < 480
            Path(words[-1]).write_text(json.dumps({"rows": [{"name": "found"}]}))
            return types.SimpleNamespace(returncode=0)
        return types.SimpleNamespace(returncode=3)

    tests = types.SimpleNamespace(returncode=1, communicate=lambda timeout: ("a PASSED\nb FAILED\nc PASSED\n", None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_kernels, "subprocess", types.SimpleNamespace(
        run=run, Popen=lambda *a, **k: tests, TimeoutExpired=subprocess.TimeoutExpired, PIPE=-1, STDOUT=-2))
    rows = bench_kernels.bench_gpu(GpuOptions(out=str(tmp_path)))
    assert [(r["name"], r.get("failed", "")[:12]) for r in rows] == [
        ("train --cases 8b --device cuda --steps 8", "exit status "), ("half", ""),
        ("train --cases 1b --device cuda --steps 8", "90 seconds w"),
        ("gpu_tests", "a PASSED\nb F"), ("found", "")]
    assert rows[3]["counts"] == {"passed": 2, "failed": 1, "skipped": 0, "error": 0}


def test_tests_that_take_too_long_are_counted_as_far_as_they_came(capsys):
    class Slow:
        returncode, calls = -9, 0

        def communicate(self, timeout=None):
            self.calls += 1
            if self.calls == 1:
                raise subprocess.TimeoutExpired("pytest", timeout)
            return "", None

        def kill(self):
            pass
    made = bench_kernels.test_row(Slow(), 5)
    assert made["counts"]["passed"] == 0
    assert "5 seconds were up" in made["failed"]
