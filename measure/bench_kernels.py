"""Every kernel: on a GPU its times beside PyTorch's, without one what the compiler says of it, and CPU times.

On a GPU a row per case, number of tokens and pass. Without one a row per kernel function and architecture, then the
references, which are the product on a CPU, beside the plain way in PyTorch. `bench_gpu` measures all that needs a GPU.
"""

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from core import parallel
from core.errors import UserError
from measure import compile_check, timing
from measure.bench_rows import ROOT, missing_row, row, spread
from measure.kernel_cases import CASES, CPU_CASES


@dataclass
class KernelOptions:
    """Measure every kernel, on a GPU or without one."""
    only: list[str] = field(default_factory=list)
    """These files of kernels/ alone, e.g. rmsnorm. Default: all of them."""
    tokens: list[int] = field(default_factory=lambda: [2048, 8192, 16384])
    """Numbers of tokens to time, on a GPU."""
    seconds: float = 1800
    """Begin no case after so long, on a GPU."""
    rounds: int = 9
    """Rounds of each CPU timing."""
    progress: str = ""
    """Write the rows so far to this file after each case, on a GPU."""


def bench_kernels(options: KernelOptions) -> list:
    """The table for this machine."""
    for name in options.only:
        if name not in CASES:
            raise UserError(f"--only {name} is no kernel; choose from {', '.join(CASES)}")
    if torch.cuda.is_available():
        return time_kernels(options)
    rows = static_rows(options.only or tuple(CASES))
    if not options.only:
        parallel.keep_freed_memory()             # for both sides: else the page faults of each tensor are timed
        rows += cpu_rows(options.rounds)
    return rows


# ---- without a GPU

def static_rows(names) -> list:
    """A row per kernel function and architecture: the largest figures of the variants that ship, which are listed."""
    compiled = compile_check.compile_all(names)
    compile_check.print_static(compiled)
    by_function = {}
    for variant in compiled:
        by_function.setdefault((f"{variant['module']}.{variant['kernel']}", variant["arch"]), []).append(variant)
    rows = []
    for (name, arch), variants in by_function.items():
        largest = {key: max(v[key] for v in variants) for key in ("registers", "spill_bytes", "shared_bytes")}
        rows.append({"name": name, "unit": "registers", "ours": largest["registers"], "peer": None, "peer_name": None,
                     "ratio": None, "arch": arch, **largest, "occupancy": min(v["occupancy"] for v in variants),
                     "variants": variants, "faults": [fault for v in variants for fault in compile_check.faults(v)]})
    return rows


def cpu_rows(rounds: int) -> list:
    """Milliseconds of a forward and backward pass of 2048 tokens on the CPU, in fp32, ours and PyTorch's in turn."""
    rows = []
    for name, case in CPU_CASES.items():
        inputs = case.inputs("cpu", torch.float32, 2048)
        upstreams = {op: compile_check.run(op, inputs)[1] for op in (case.op, case.torch)}
        times = {op: [] for op in upstreams}
        for _ in range(rounds):
            for op, taken in times.items():
                start = time.perf_counter()
                compile_check.run(op, inputs, upstreams[op])
                taken.append(1000 * (time.perf_counter() - start))
        rows.append(row(name, "ms", *(statistics.median(t) for t in times.values()), "plain PyTorch",
                        spread=spread(times[case.op])))
    return rows


# ---- on a GPU

def time_kernels(options: KernelOptions) -> list:
    """Every case of every kernel on this GPU; what the time does not suffice for is named."""
    end, limits = time.monotonic() + options.seconds, timing.device_limits()
    rows = [row(name, name, value) for name, value in limits.items()]
    todo = [(name, case, n) for n in options.tokens for name in options.only or CASES for case in CASES[name]]
    for module, case, n in todo:
        if time.monotonic() > end:
            print(f"no time left for {case.name} at {n} tokens")
            rows.append(missing_row(f"{case.name} {n}", "ms", left_out=f"{options.seconds:.0f} seconds were up"))
            continue
        passes = timing.time_case(case, n, limits)
        timing.print_times(passes)
        for t in passes:
            best = min(((ms, name) for name, ms in t["ms"].items() if name != "triton"), default=(None, None))
            ours = t["ms"].get("triton")
            rows.append({"name": f"{case.name} {n} {t['pass']}", "unit": "ms", "ours": ours, "peer": best[0],
                         "peer_name": best[1], "ratio": ours / best[0] if ours and best[0] else None,
                         "module": module, **t})
        if options.progress:
            Path(options.progress).write_text(json.dumps({"rows": rows}), encoding="utf-8")
    return rows


# ---- everything that needs a GPU

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
