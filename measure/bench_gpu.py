"""Everything that needs a GPU, in minutes: the kernels' tests, training steps of whole models, the kernel table."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from core.errors import UserError
from measure.bench_rows import ROOT, missing_row, row


@dataclass
class GpuOptions:
    """Test the kernels, time training steps and all kernels on this GPU."""
    minutes: float = 8
    """For everything; the kernel table gets what is left."""
    out: str = "out/gpu"
    """Folder of what each stage has found, also if a later one fails."""


def bench_gpu(options: GpuOptions) -> list:
    """Tests, training steps and the kernel table, each in a process of its own, so that none takes another down."""
    if not torch.cuda.is_available():
        raise UserError("bench.py gpu needs a CUDA device; bench.py kernels says what can be known without one")
    end, out, rows = time.monotonic() + 60 * options.minutes, Path(options.out), []
    out.mkdir(parents=True, exist_ok=True)
    for case in ("8b", "1b"):
        rows += stage(["train", "--cases", case, "--device", "cuda", "--steps", "8"], out / f"{case}.json", 90)
    many = ["-n", str(min(8, os.cpu_count()))] if importlib.util.find_spec("xdist") else []
    tests = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-v", "-m", "gpu or kernel", *many, "tests/kernels", "tests/test_generate.py"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    rows.append(test_row(tests, 60 * options.minutes / 3))
    left, table = end - time.monotonic() - 45, out / "kernels.json"
    return rows + stage(["kernels", "--tokens", "8192", "--seconds", f"{left:.0f}", "--progress", str(table)], table,
                        left + 40)


def stage(words: list[str], out: Path, limit: float) -> list:
    """The rows of another bench.py command; if it failed, those that it had written, and a row that says how."""
    out.unlink(missing_ok=True)
    try:
        done = subprocess.run([sys.executable, str(ROOT / "bench.py"), *words, "--json", str(out)],
                              timeout=limit).returncode
    except subprocess.TimeoutExpired:
        done = f"{limit:.0f} seconds were up"
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    if done == 0:
        return rows
    return [*rows, missing_row(" ".join(words), "", failed=f"exit status {done}" if isinstance(done, int) else done)]


def test_row(process, limit: float) -> dict:
    """How many tests had which outcome, also where the time was up, and the last lines where something failed."""
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        out += f"\n{limit:.0f} seconds were up\n"
    counts = {word.lower(): len(re.findall(rf"\b{word}\b", out)) for word in ("PASSED", "FAILED", "SKIPPED", "ERROR")}
    made = row("gpu_tests", "passed", counts["passed"], counts=counts, exit_status=process.returncode)
    if process.returncode:
        print(out[-6000:])
        made["failed"] = out[-6000:]
    return made
