"""Every kernel: on a GPU its times beside PyTorch's, without one what the compiler says of it, and CPU times.

On a GPU, a row per case, number of tokens and pass. Without one, a row per kernel function and architecture: registers,
spills, shared memory, occupancy, and `faults`, which a compiled kernel must not have. What is compiled are the kernels
that ship: the op runs on meta tensors of the case's shapes, and each launch goes to Triton's compiler, specialised as a
real launch is, instead of to a device. Then the references, the product on a CPU, beside the plain way in PyTorch.
"""

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_map_only

from core import devices
from core.errors import UserError
from kernels import backend
from measure.bench_rows import ROOT, make_row, row, spread, take_turns, time_call
from measure.kernel_cases import CASES, CPU_CASES, differentiable, run

ARCHITECTURES = (80, 90, 100)
# Scalar (non-vectorised) loads that a kernel is meant to have, where there are more than 8: offsets and log-sum-exps,
# the levels of a table, the masked tails of tensors.
SCALAR_LOADS = {"dkdv_kernel": 10, "dq_kernel": 18, "dequantise_kernel": 36, "quantise_kernel": 15, "adamw_kernel": 56}
# Of one multiprocessor. The driver keeps 1 KB of its shared memory per block.
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
DRIVERS_BYTES = 1024


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
        devices.keep_freed_memory()
        rows += cpu_rows(options.rounds)
    return rows


# ---- without a GPU

class Compiler:
    """Receives launches in the place of a device, compiles each kernel once and keeps its figures in `rows`."""

    def __init__(self, architecture: int):
        from triton.backends.compiler import GPUTarget
        target = GPUTarget("cuda", architecture, 32)
        self.architecture, self.case, self.rows = architecture, "", {}
        # What Triton's JIT asks of a driver before it compiles. Triton caches compiled kernels by device, so each
        # architecture is a device of its own.
        self.driver = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: architecture,
                                      get_current_stream=lambda device: 0)

    def __call__(self, kernel, grid, args, options):
        from triton.runtime import driver
        driver.set_active(self.driver)
        compiled = kernel.warmup(*args, grid=grid, **options)
        if compiled.hash not in self.rows:
            self.rows[compiled.hash] = {"case": self.case, **figures(compiled, self.architecture)}


def figures(compiled, architecture: int) -> dict:
    """Registers per thread, spilled bytes, shared memory and the occupancy that follows; notable PTX instructions."""
    import triton
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
                               capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    ptx, warps = compiled.asm["ptx"], compiled.metadata.num_warps
    # Registers are given out in units of 8 per thread.
    threads, registers = 32 * warps, max(8, -(-used["REG"] // 8) * 8)
    blocks = min(BLOCKS, THREADS // threads, REGISTERS // (threads * registers))
    if compiled.metadata.shared:
        blocks = min(blocks, SHARED_BYTES[architecture] // (compiled.metadata.shared + DRIVERS_BYTES))
    return {"kernel": compiled.metadata.name, "arch": f"sm_{architecture}", "registers": used["REG"],
            "spill_bytes": used["STACK"] + used["LOCAL"], "shared_bytes": compiled.metadata.shared, "warps": warps,
            "occupancy": blocks * threads / THREADS,
            "wide_loads": len(re.findall(r"ld\.global\S*\.v[24]\.b(?:32|64)|cp\.async\S*", ptx)),
            "narrow_loads": len(re.findall(r"ld\.global(?!\S*\.v[248])\S*", ptx)),
            "tensor_core": len(re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx)),
            "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)), "fp64": len(re.findall(r"\.f64", ptx))}


def compile_all(kernels=tuple(CASES), architectures=ARCHITECTURES) -> list[dict]:
    """The figures of every Triton kernel that the cases of `kernels` launch for 8192 tokens in bf16, both passes.

    Must not run in a process with TRITON_INTERPRET=1: the interpreter has nothing to compile.
    """
    rows = []
    for name in kernels:
        for architecture in architectures:
            compiler = Compiler(architecture)
            with backend.using("triton", compiler):
                for case in CASES[name]:
                    compiler.case = case.name
                    run(case.op, case.inputs("meta", torch.bfloat16, 8192))
            rows += [{"module": name, **row} for row in compiler.rows.values()]
    return rows


def faults(row: dict) -> list[str]:
    """What is wrong with a compiled kernel, in words; empty for a sound one."""
    shared = SHARED_BYTES[int(row["arch"][3:])] - DRIVERS_BYTES
    scalar_loads = SCALAR_LOADS.get(row["kernel"], 8)
    memory_bound = row["tensor_core"] == 0
    without_wgmma = row["tensor_core"] - row["wgmma"]
    found = {
        f"spills {row['spill_bytes']} bytes": row["spill_bytes"],
        f"needs {row['shared_bytes']} bytes of shared memory, the card has {shared}": row["shared_bytes"] > shared,
        f"computes in fp64 ({row['fp64']} instructions)": row["fp64"],
        "loads nothing in vectors": memory_bound and not row["wide_loads"],
        f"has {row['narrow_loads']} scalar loads, {scalar_loads} are meant": row["narrow_loads"] > scalar_loads,
        f"occupies {row['occupancy']:.0%} of the threads, too few to hide the memory's latency":
            memory_bound and row["occupancy"] < 0.25,
        f"makes {without_wgmma} of its matmuls without wgmma": row["arch"] == "sm_90" and without_wgmma > 0}
    return [fault for fault, is_there in found.items() if is_there]


def static_rows(names) -> list:
    """A row per kernel function and architecture: the largest figures of the variants that ship, which are listed."""
    compiled = compile_all(names)
    print(f"{'kernel':28} {'case':30} {'arch':7} {'regs':>4} {'spill':>5} {'shared':>7} {'warps':>5} {'occup.':>6}")
    for v in compiled:
        print(f"{v['kernel']:28} {v['case']:30} {v['arch']:7} {v['registers']:4} {v['spill_bytes']:5} "
              f"{v['shared_bytes']:7} {v['warps']:5} {v['occupancy']:6.0%}  {'; '.join(faults(v))}")
    by_function = {}
    for variant in compiled:
        by_function.setdefault((f"{variant['module']}.{variant['kernel']}", variant["arch"]), []).append(variant)
    rows = []
    for (name, arch), variants in by_function.items():
        largest = {key: max(v[key] for v in variants) for key in ("registers", "spill_bytes", "shared_bytes")}
        rows.append(make_row(name, "registers", largest["registers"], arch=arch, **largest,
                             occupancy=min(v["occupancy"] for v in variants), variants=variants,
                             faults=[fault for v in variants for fault in faults(v)]))
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
            name = f"{case.name} {n} {t['pass']}"
            times = [f"{who} {ms:.3f}" for who, ms in t["ms"].items()]
            failures = [f"{who}: {text}" for who, text in t["failed"].items()]
            print(f"{name:50} {t['share'] or 0:4.0%} of the limit   ms:", *times, *failures, sep="  ", flush=True)
            best = min(((ms, who) for who, ms in t["ms"].items() if who != "triton"), default=(None, None))
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


def time_case(case, tokens: int, limits: dict, rounds: int = 3) -> list[dict]:
    """Milliseconds of each provider's passes on the GPU, in turn: medians over `rounds` of do_bench's medians.

    A row per pass. `share` is the time that an ideal device needs by case.cost at this device's own limits, divided by
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

    def on_its_backend(name, call):
        with backend.using("triton" if name == "triton" else "reference"):
            return call()
    providers = {"triton": case.op, "reference": case.op, "compiled": torch.compile(case.op, dynamic=False),
                 "torch": case.torch, "compiled torch": torch.compile(case.torch, dynamic=False)}
    calls, memory, failed = {}, {}, {}
    for name in ("triton", *case.beside, *["torch"] * bool(case.torch)):
        own = tree_map_only(torch.Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad), inputs)
        try:
            calls[name], memory[name] = on_its_backend(name, partial(prepare, providers[name], own, passes))
        except Exception as error:
            # The others keep their figures when one provider fails.
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    rows, costs = [], case.cost(tokens)
    for number, which in enumerate(passes):
        times = take_turns({name: partial(on_its_backend, name, partial(do_bench, made[which], warmup=10, rep=40,
                                                                        return_mode="median"))
                            for name, made in calls.items()}, rounds)
        median = {name: statistics.median(taken) for name, taken in times.items()}
        moved, done = (sum(each) if which == "step" else each[number] for each in (costs[:2], costs[2:]))
        floor = max(moved / limits["copy_gb_per_second"], done / limits["bf16_tflops"] / 1000) / 1e6
        rows.append({"case": case.name, "tokens": tokens, "pass": which, "ms": median, "floor_ms": floor,
                     "share": floor / median["triton"] if "triton" in median else None, "failed": failed,
                     "spread": {name: (max(taken) - min(taken)) / median[name] for name, taken in times.items()},
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
    rows.append(test_row(out / "tests.txt", 60 * options.minutes / 3))
    left, table = end - time.monotonic() - 45, out / "kernels.json"
    return rows + stage(["kernels", "--tokens", "8192", "--seconds", f"{left:.0f}", "--progress", str(table)], table,
                        left + 40)


def attempt(words: list[str], limit: float, **options) -> str:
    """Run Python with these words in a process of its own; -> why it failed, empty if it did not."""
    try:
        status = subprocess.run([sys.executable, *words], timeout=limit, **options).returncode
    except subprocess.TimeoutExpired:
        return f"{limit:.0f} seconds were up"
    return f"exit status {status}" if status else ""


def stage(words: list[str], out: Path, limit: float) -> list:
    """Run another bench.py command and return its rows; if it failed, those written by then and a row that says why."""
    out.unlink(missing_ok=True)
    failed = attempt([str(ROOT / "bench.py"), *words, "--json", str(out)], limit)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    return [*rows, make_row(" ".join(words), "", None, failed=failed)] if failed else rows


def test_row(log: Path, limit: float) -> dict:
    """Test the kernels, writing to `log`; -> a row that counts the tests by outcome, as far as they came in time."""
    many = ["-n", str(min(8, os.cpu_count()))] if importlib.util.find_spec("xdist") else []
    words = ["-m", "pytest", "-v", "-m", "gpu or kernel", *many, "tests/kernels", "tests/test_generate.py"]
    with open(log, "w", encoding="utf-8") as handle:
        failed = attempt(words, limit, cwd=ROOT, stdout=handle, stderr=subprocess.STDOUT)
    text = log.read_text(encoding="utf-8")
    counts = {word.lower(): len(re.findall(rf"\b{word}\b", text)) for word in ("PASSED", "FAILED", "SKIPPED", "ERROR")}
    made = row("gpu_tests", "passed", counts["passed"], counts=counts)
    if failed:
        made["failed"] = f"{text[-6000:]}\n{failed}"
        print(made["failed"])
    return made
