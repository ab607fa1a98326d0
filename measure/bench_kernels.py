"""Every kernel: on a GPU its times beside PyTorch's, without one what the compiler says of it, and CPU times.

On a GPU a row per case, number of tokens and pass. Without one a row per kernel function and architecture, then the
references, which are the product on a CPU, beside the plain way in PyTorch.
"""

import json
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from core import parallel
from core.errors import UserError
from measure import bench_steps, compile_check, timing
from measure.bench_rows import missing_row, row, spread
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
        rows += cpu_rows(options.rounds) + logits_rows(options.rounds)
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


def logits_rows(steps: int) -> list:
    """Training at 32,768 ids with the fused linear cross-entropy, and with the logits of all tokens at once."""
    seconds, results, _ = bench_steps.in_turn("vocab_32k", ("ours", "materialised"), steps, "cpu")
    assert math.isclose(*(r["losses"][0] for r in results.values()), rel_tol=1e-5), results
    ours, theirs = (bench_steps.CASES["vocab_32k"].tokens / statistics.median(s) for s in seconds.values())
    return [row("cpu_training_32k", "tokens/s", ours, theirs, "materialised logits",
                spread=spread([b / a for a, b in zip(*seconds.values())])),
            row("cpu_training_32k_peak_memory", "bytes", *(r["peak_bytes"] for r in results.values()),
                "materialised logits")]


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
