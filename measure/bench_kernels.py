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
from functools import partial
from pathlib import Path

import torch

from core import parallel
from core.errors import UserError
from kernels import backend
from measure import compile_check
from measure.bench_rows import ROOT, make_row, row, spread, take_turns, time_call
from measure.compile_check import differentiable, run
from measure.kernel_cases import CASES, CPU_CASES


@dataclass
class KernelOptions:
    """Measure every kernel, on a GPU or without one."""
    only: list[str] = field(default_factory=list)
    """Measure only these files of kernels/, e.g. rmsnorm. Default: all of them."""
    tokens: list[int] = field(default_factory=lambda: [2048, 8192, 16384])
    """Numbers of tokens to time, on a GPU."""
    seconds: float = 1800
    """Begin no new case after this many seconds, on a GPU."""
    rounds: int = 9
    """Rounds of each CPU timing."""
    progress: str = ""
    """Write the rows so far to this file after each case, on a GPU."""


def bench_kernels(options: KernelOptions) -> list:
    """Choose what this machine can measure: times on a GPU, else the compiler's figures and CPU times."""
    for name in options.only:
        if name not in CASES:
            raise UserError(f"--only {name} is no kernel; choose from {', '.join(CASES)}")
    if torch.cuda.is_available():
        return time_kernels(options)
    rows = static_rows(options.only or tuple(CASES))
    if not options.only:
        # For both sides: else the page faults of each new tensor would be timed.
        parallel.keep_freed_memory()
        rows += cpu_rows(options.rounds)
    return rows


# ---- without a GPU

def static_rows(names) -> list:
    """A row per kernel function and architecture: the largest figures of the variants that ship, which are listed."""
    compiled = compile_check.compile_all(names)
    print(f"{'kernel':28} {'case':30} {'arch':7} {'regs':>4} {'spill':>5} {'shared':>7} {'warps':>5} {'occup.':>6}")
    for v in compiled:
        print(f"{v['kernel']:28} {v['case']:30} {v['arch']:7} {v['registers']:4} {v['spill_bytes']:5} "
              f"{v['shared_bytes']:7} {v['warps']:5} {v['occupancy']:6.0%}  {'; '.join(compile_check.faults(v))}")
    by_function = {}
    for variant in compiled:
        by_function.setdefault((f"{variant['module']}.{variant['kernel']}", variant["arch"]), []).append(variant)
    rows = []
    for (name, arch), variants in by_function.items():
        largest = {key: max(v[key] for v in variants) for key in ("registers", "spill_bytes", "shared_bytes")}
        rows.append(make_row(name, "registers", largest["registers"], arch=arch, **largest,
                             occupancy=min(v["occupancy"] for v in variants), variants=variants,
                             faults=[fault for v in variants for fault in compile_check.faults(v)]))
    return rows


def cpu_rows(rounds: int) -> list:
    """Milliseconds of a forward and backward pass of 2048 tokens on the CPU, in fp32, ours and PyTorch's in turn."""
    rows = []
    for name, case in CPU_CASES.items():
        inputs = case.inputs("cpu", torch.float32, 2048)
        seconds = take_turns({op: partial(time_call, run, op, inputs, run(op, inputs)[1])
                              for op in (case.op, case.torch)}, rounds)
        rows.append(row(name, "ms", *(1000 * statistics.median(taken) for taken in seconds.values()), "plain PyTorch",
                        spread=spread(seconds[case.op])))
    return rows


# ---- on a GPU

def time_kernels(options: KernelOptions) -> list:
    """Time every case of every kernel on this GPU; a case that no time was left for gets a row that says so."""
    end, limits = time.monotonic() + options.seconds, device_limits()
    rows = [row(name, name, value) for name, value in limits.items()]
    todo = [(name, case, n) for n in options.tokens for name in options.only or CASES for case in CASES[name]]
    for module, case, n in todo:
        if time.monotonic() > end:
            print(f"no time left for {case.name} at {n} tokens")
            rows.append(make_row(f"{case.name} {n}", "ms", None, left_out=f"{options.seconds:.0f} seconds were up"))
            continue
        for t in time_case(case, n, limits):
            share = f"{t['share']:4.0%}" if t["share"] is not None else "fail"
            times = [f"{name} {ms:.3f}" for name, ms in t["ms"].items()]
            failures = [f"{name}: {text}" for name, text in t["failed"].items()]
            print(f"{case.name:34} {n:6} {t['pass']:8} {share} of the limit   ms:", *times, *failures, sep="  ",
                  flush=True)
            best = min(((ms, name) for name, ms in t["ms"].items() if name != "triton"), default=(None, None))
            name = f"{case.name} {n} {t['pass']}"
            rows.append(make_row(name, "ms", t["ms"].get("triton"), *best, module=module, **t))
        if options.progress:
            Path(options.progress).write_text(json.dumps({"rows": rows}), encoding="utf-8")
    return rows


def device_limits() -> dict:
    """What this GPU reaches: GB/s of a copy (read and written), TFLOP/s of a bf16 matmul of random values."""
    from triton.testing import do_bench
    a, b = (torch.empty(2**30, dtype=torch.uint8, device="cuda").random_() for _ in range(2))
    copy = 2 * a.numel() / do_bench(lambda: b.copy_(a), return_mode="median")
    m = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    matmul = 2 * 8192**3 / do_bench(lambda: m @ m, return_mode="median")
    return {"copy_gb_per_second": copy / 1e6, "bf16_tflops": matmul / 1e9}


def providers(case) -> dict:
    """{name: op} of the implementations that are timed side by side."""
    ops = {"reference": case.op, "compiled": torch.compile(case.op, dynamic=False), "torch": case.torch,
           "compiled torch": torch.compile(case.torch, dynamic=False)}
    names = (*case.beside, "torch") if case.torch else case.beside
    return {"triton": case.op, **{name: ops[name] for name in names}}


def time_case(case, tokens: int, limits: dict, rounds: int = 3) -> list[dict]:
    """Milliseconds of each provider's passes on the GPU, in turn: medians over `rounds` of do_bench's medians.

    A row per pass. `share` is the time an ideal device needs by case.cost at this device's own limits, divided by
    ours. A provider that fails stands in `failed` with its message.
    """
    from torch._functorch import config as functorch_config
    from triton.testing import do_bench
    # A compiled backward pass is timed more than once.
    functorch_config.donated_buffer = False
    # Cases share their op, and Dynamo compiles at most 8 shapes of one.
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs = case.inputs("cuda", torch.bfloat16, tokens)
    passes = ["step"] if case.one_shot else ["forward", "backward"] if differentiable(inputs) else ["forward"]
    calls, memory, failed = {}, {}, {}
    for name, op in providers(case).items():
        own = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
               for x in inputs]
        try:
            with backend.using("triton" if name == "triton" else "reference"):
                calls[name], memory[name] = prepare(op, own, passes)
        except Exception as error:
            # The others keep their figures when one provider fails.
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    rows = []
    for number, which in enumerate(passes):
        times = {name: [] for name in calls}
        for _ in range(rounds):
            for name, made in calls.items():
                with backend.using("triton" if name == "triton" else "reference"):
                    times[name].append(do_bench(made[which], warmup=10, rep=40, return_mode="median"))
        median = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
        bytes_, flops = case.cost(tokens)[:2], case.cost(tokens)[2:]
        moved, done = (sum(bytes_), sum(flops)) if which == "step" else (bytes_[number], flops[number])
        floor = max(moved / limits["copy_gb_per_second"], done / limits["bf16_tflops"] / 1000) / 1e6
        rows.append({"case": case.name, "tokens": tokens, "pass": which, "ms": median, "floor_ms": floor,
                     "share": floor / median["triton"] if "triton" in median else None, "failed": failed,
                     "spread": {name: (max(t) - min(t)) / median[name] for name, t in times.items()},
                     "peak_bytes": memory})
    return rows


def prepare(op, inputs, passes):
    """Return {pass: call to time} and the most bytes that a forward and backward pass hold beside their inputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    # The first run compiles.
    _, upstream = run(op, inputs)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    if passes == ["step"]:
        return {"step": lambda: run(op, inputs, upstream)}, peak
    calls = {"forward": lambda: op(*inputs)}
    if "backward" in passes:
        outputs = differentiable(op(*inputs))
        calls["backward"] = lambda: torch.autograd.grad(outputs, differentiable(inputs), upstream, retain_graph=True)
    return calls, peak


# ---- everything that needs a GPU

@dataclass
class GpuOptions:
    """Test the kernels, time training steps and all kernels on this GPU."""
    minutes: float = 8
    """For everything; the kernel table gets what is left."""
    out: str = "out/gpu"
    """The folder that keeps what each stage has found, even if a later one fails."""


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
    """Run another bench.py command and return its rows; if it failed, those written by then and a row that says why."""
    out.unlink(missing_ok=True)
    try:
        done = subprocess.run([sys.executable, str(ROOT / "bench.py"), *words, "--json", str(out)],
                              timeout=limit).returncode
    except subprocess.TimeoutExpired:
        done = f"{limit:.0f} seconds were up"
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    if done == 0:
        return rows
    failure = f"exit status {done}" if isinstance(done, int) else done
    return [*rows, make_row(" ".join(words), "", None, failed=failure)]


def test_row(process, limit: float) -> dict:
    """A row that counts the tests by outcome, as far as they came in time, with the last lines if something failed."""
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
