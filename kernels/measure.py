"""Checks, static figures and timings of a kernel; `python -m kernels.rmsnorm` prints all three for one file.

check     against the float64 reference, on the GPU or in Triton's interpreter
compile   for a card that need not be here: registers, spills, shared memory, occupancy, and gates on what must not be
time      on a GPU, against the reference, torch.compile of it and PyTorch's own op

The kernels that are compiled are the ones that ship: the op runs on meta tensors of the case's shapes, and each launch
goes to Triton's compiler, with the same specialisation a real launch has, instead of to a device.
"""

import importlib
import math
import os
import re
import subprocess
import sys
import tempfile

import torch

from kernels import backend

MODULES = ("attention", "cross_entropy", "rmsnorm", "rope", "swiglu", "linear_kl", "adamw", "nf4", "grouped_mm",
           "lora")
ARCHITECTURES = (80, 90, 100)
# loads of single numbers that are meant, where more than 8: row numbers and log-sum-exps, levels of a table, the masked
# tails of tensors
NARROW = {"dkdv_kernel": 10, "dq_kernel": 18, "dequantise_kernel": 36, "quantise_kernel": 15, "adamw_kernel": 56,
          "squares_kernel": 12}
# of one multiprocessor: registers, threads, blocks, bytes of shared memory in all and for one block
LIMITS = {80: (65536, 2048, 32, 164 * 1024, 163 * 1024), 90: (65536, 2048, 32, 228 * 1024, 227 * 1024),
          100: (65536, 2048, 32, 228 * 1024, 227 * 1024)}


# ---- check

def run(op, inputs, upstream=None):
    """-> [differentiable outputs..., gradients of the inputs that require them], upstream gradients."""
    outputs = differentiable(op(*inputs))
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    if upstream is None:                          # the same numbers in every run
        upstream = [torch.empty_like(y) if y.is_meta else torch.randn(
            y.shape, generator=torch.Generator(y.device).manual_seed(i), device=y.device, dtype=y.dtype)
            for i, y in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, wanted, upstream) if wanted else ()
    return [y.detach() for y in outputs] + list(gradients), upstream


def differentiable(outputs) -> list:
    """The tensors among an op's outputs through which gradients flow."""
    return [y for y in (outputs if isinstance(outputs, tuple) else (outputs,))
            if isinstance(y, torch.Tensor) and y.requires_grad]


def in_dtype(inputs, dtype):
    """The same numbers as leaves of another floating-point dtype; constants (angles) only ever become wider."""
    return [x.detach().to(dtype if x.requires_grad or dtype == torch.float64 else x.dtype).requires_grad_(
        x.requires_grad) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]


def compare(op, inputs, terms: int = 1, scale: float = 0.0, kernel: str = "triton"):
    """Errors of op's outputs and gradients against the float64 reference, and what they may be.

    -> [(index, error, bound)], largest absolute values. The yardstick is the reference in the same dtype: another
    order of the same roundings may double its error. To that come a rounding of the result, counted as a whole
    spacing because the interpreter truncates bf16, and the random walk of fp32 roundings in a sum of `terms` numbers:
    partial sums grow like sqrt(k), so that the error is below sqrt(terms) 2^-24 times the largest result, four
    standard deviations of it allowed. scale: the size of what cancels inside, where that is larger than every result.
    """
    with backend.using(kernel):
        ours, upstream = run(op, inputs)
    with backend.using("reference"):
        plain, _ = run(op, in_dtype(inputs, inputs_dtype(inputs)), upstream)
        truth, _ = run(op, in_dtype(inputs, torch.float64), [u.double() for u in upstream])
    assert len(ours) == len(plain) == len(truth)
    found = []
    for i, (got, same, true) in enumerate(zip(ours, plain, truth)):
        assert (got.shape, got.dtype) == (true.shape, same.dtype), f"result {i}: {got.dtype} {tuple(got.shape)}"
        if true.numel():
            assert got.isfinite().all() or not true.isfinite().all(), f"result {i} is not finite"
            largest = max(true.abs().max().item(), scale)
            rounding = 2 * torch.finfo(got.dtype).eps + 4 * math.sqrt(terms) * 2.0**-24
            found.append((i, (got.double() - true).abs().max().item(),
                          2 * (same.double() - true).abs().max().item() + rounding * largest))
    return found


def inputs_dtype(inputs):
    return next(x.dtype for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point())


def check(module: str) -> bool:
    """Print the examples' errors; True where all are within their bounds."""
    device, good = "cuda" if torch.cuda.is_available() else "cpu", True
    dtypes = [torch.float32, torch.bfloat16 if device == "cuda" else torch.float16]
    for case in importlib.import_module(f"kernels.{module}").examples():
        for dtype in dtypes:
            torch.manual_seed(0)
            found = compare(case.op, case.inputs(device, dtype, 23), terms=1024)
            worst = max(error / bound for _, error, bound in found)
            good &= worst <= 1
            print(f"{case.name:32} {str(dtype)[6:]:9} {worst:5.0%} of what rounding allows", flush=True)
    return good


# ---- compile

class FakeDriver:
    """What Triton's JIT asks of a driver before it compiles; no device behind it."""

    def __init__(self, architecture):
        from triton.backends.compiler import GPUTarget
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch              # Triton keeps compiled kernels by device

    def get_current_stream(self, device):
        return 0


class Compiler:
    """A receiver of launches that compiles each kernel once and keeps its figures."""

    def __init__(self, architecture: int):
        self.architecture, self.rows, self.seen, self.case = architecture, [], set(), ""
        self.driver = FakeDriver(architecture)

    def __call__(self, kernel, grid, args, options):
        from triton.runtime import driver
        driver.set_active(self.driver)
        compiled = kernel.warmup(*args, grid=grid, **options)
        if compiled.hash not in self.seen:
            self.seen.add(compiled.hash)
            self.rows.append({"case": self.case, **figures(compiled, self.architecture)})


def figures(compiled, architecture: int) -> dict:
    """Registers a thread, spilled bytes, shared memory and what follows; instructions of note, from the PTX."""
    import triton
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
                               capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    ptx, warps = compiled.asm["ptx"], compiled.metadata.num_warps
    registers, threads, blocks, shared, _ = LIMITS[architecture]
    fit = [blocks, threads // (32 * warps), registers // (32 * warps * max(8, -(-used["REG"] // 8) * 8))]
    if compiled.metadata.shared:
        fit.append(shared // (compiled.metadata.shared + 1024))        # the driver keeps 1 KB a block
    return {"kernel": compiled.metadata.name, "arch": f"sm_{architecture}", "registers": used["REG"],
            "spill_bytes": used["STACK"] + used["LOCAL"], "shared_bytes": compiled.metadata.shared, "warps": warps,
            "occupancy": min(fit) * 32 * warps / threads,
            "wide_loads": len(re.findall(r"ld\.global\S*\.v[24]\.b(?:32|64)|cp\.async\S*", ptx)),
            "narrow_loads": len(re.findall(r"ld\.global(?!\S*\.v[248])\S*", ptx)),
            "tensor_core": len(re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx)),
            "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)), "fp64": len(re.findall(r"\.f64", ptx))}


def compile_all(modules=MODULES, architectures=ARCHITECTURES, tokens: int = 8192) -> list[dict]:
    """The figures of every kernel that the cases of `modules` launch, forward and backward, in bf16."""
    rows = []
    for module in modules:
        found = importlib.import_module(f"kernels.{module}")
        for architecture in architectures:
            compiler = Compiler(architecture)
            with backend.using("triton"), backend.sending_to(compiler):
                for case in found.cases():
                    compiler.case = case.name
                    run(case.op, case.inputs("meta", torch.bfloat16, tokens))
            rows += [{"module": module, **row} for row in compiler.rows]
    return rows


def faults(row: dict) -> list[str]:
    """What a compiled kernel must not be."""
    shared = LIMITS[int(row["arch"][3:])][4]
    memory_bound = row["tensor_core"] == 0
    bad = []
    if row["spill_bytes"]:
        bad.append(f"spills {row['spill_bytes']} bytes")
    if row["shared_bytes"] > shared:
        bad.append(f"needs {row['shared_bytes']} bytes of shared memory, the card has {shared}")
    if row["fp64"]:
        bad.append(f"computes in fp64 ({row['fp64']} instructions)")
    if memory_bound and not row["wide_loads"]:
        bad.append("loads nothing in vectors")
    if row["narrow_loads"] > NARROW.get(row["kernel"], 8):
        bad.append(f"has {row['narrow_loads']} loads of single numbers, {NARROW.get(row['kernel'], 8)} are meant")
    if memory_bound and row["occupancy"] < 0.25:
        bad.append(f"fills {row['occupancy']:.0%} of the threads, too few to hide the memory's latency")
    if row["arch"] == "sm_90" and row["wgmma"] < row["tensor_core"]:
        bad.append(f"makes {row['tensor_core'] - row['wgmma']} of its products without wgmma")
    return bad


def print_static(rows):
    print(f"{'kernel':28} {'case':30} {'arch':7} {'regs':>4} {'spill':>5} {'shared':>7} {'warps':>5} {'occup.':>6}")
    for row in rows:
        print(f"{row['kernel']:28} {row['case']:30} {row['arch']:7} {row['registers']:4} {row['spill_bytes']:5} "
              f"{row['shared_bytes']:7} {row['warps']:5} {row['occupancy']:6.0%}  {'; '.join(faults(row))}")


# ---- time

def device_limits() -> dict:
    """What this GPU reaches: a copy's bytes a second, read and written, and bf16 products of random numbers."""
    from triton.testing import do_bench
    a, b = (torch.empty(2**30, dtype=torch.uint8, device="cuda").random_() for _ in range(2))
    copy = 2 * a.numel() / do_bench(lambda: b.copy_(a), return_mode="median")
    m = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product = 2 * 8192**3 / do_bench(lambda: m @ m, return_mode="median")
    return {"copy_gb_per_second": copy / 1e6, "bf16_tflops": product / 1e9}


def providers(case, peers: dict) -> dict:
    """{name: op} of what is timed beside each other."""
    made = {"reference": lambda: case.op, "compiled": lambda: torch.compile(case.op, dynamic=False),
            "compiled torch": lambda: torch.compile(case.torch, dynamic=False)}
    own = {"torch": case.torch} if case.torch else {}
    return {"triton": case.op} | {name: made[name]() for name in case.bars} | own | peers


def time_case(case, tokens: int, limits: dict, peers: dict, rounds: int = 3) -> list[dict]:
    """Milliseconds of each provider's passes on the GPU, in turn: medians over `rounds` of do_bench's medians.

    A row a pass: what an ideal device needs by case.traffic and case.work at this device's own limits, over what ours
    needed, is `share`. A provider that fails stands in `failed` with its message. Each has inputs of its own, because
    some peers write into theirs.
    """
    from torch._functorch import config as functorch_config
    from triton.testing import do_bench
    functorch_config.donated_buffer = False       # a compiled backward pass is timed more than once
    torch._dynamo.reset()                         # cases share their op: a ninth shape would not be compiled any more
    torch.manual_seed(0)
    inputs = case.inputs("cuda", torch.bfloat16, tokens)
    trained = any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
    passes = ["step"] if case.one_shot else ["forward", "backward"] if trained else ["forward"]
    calls, memory, failed = {}, {}, {}
    for name, op in providers(case, peers).items():
        own = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
               for x in inputs]
        try:
            with backend.using("triton" if name == "triton" else "reference"):
                calls[name], memory[name] = prepare(op, own, passes)
        except Exception as error:                # a peer's failure must not cost the others their figures
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    rows = []
    for number, which in enumerate(passes):
        times = {name: [] for name in calls}
        for _ in range(rounds):
            for name, made in calls.items():
                with backend.using("triton" if name == "triton" else "reference"):
                    times[name].append(do_bench(made[which], warmup=10, rep=40, return_mode="median"))
        median = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
        bytes_, flops = case.traffic(tokens), case.work(tokens)
        moved, done = (sum(bytes_), sum(flops)) if which == "step" else (bytes_[number], flops[number])
        floor = max(moved / limits["copy_gb_per_second"], done / limits["bf16_tflops"] / 1000) / 1e6
        rows.append({"case": case.name, "tokens": tokens, "pass": which, "ms": median, "floor_ms": floor,
                     "share": floor / median["triton"] if "triton" in median else None, "failed": failed,
                     "spread": {name: (max(t) - min(t)) / median[name] for name, t in times.items()},
                     "peak_bytes": memory})
    return rows


def prepare(op, inputs, passes):
    """-> {pass: what to time}, bytes that a forward and backward pass hold at most beside their inputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, upstream = run(op, inputs)                 # compiles
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    if passes == ["step"]:
        return {"step": lambda: run(op, inputs, upstream)}, peak
    calls = {"forward": lambda: op(*inputs)}
    if "backward" in passes:
        outputs, wanted = differentiable(op(*inputs)), [x for x in inputs
                                                        if isinstance(x, torch.Tensor) and x.requires_grad]
        calls["backward"] = lambda: torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)
    return calls, peak


def print_times(rows):
    for row in rows:
        times = "  ".join(f"{name} {ms:.3f}" for name, ms in row["ms"].items())
        share = f"{row['share']:4.0%}" if row["share"] is not None else "fail"
        print(f"{row['case']:34} {row['tokens']:6} {row['pass']:8} {share} of the limit   ms: {times}"
              + "".join(f"  {name}: {text}" for name, text in row["failed"].items()), flush=True)


# ---- the page of one file

def main(module: str):
    """Check and measure one kernel file, on the GPU or without one."""
    if torch.cuda.is_available():
        ok, limits = check(module), device_limits()
        print(f"this device: {limits['copy_gb_per_second']:,.0f} GB/s copied, {limits['bf16_tflops']:,.0f} TFLOP/s")
        for case in importlib.import_module(f"kernels.{module}").cases():
            print_times(time_case(case, 8192, limits, {}))
    else:                        # the interpreter and the compiler cannot share a process
        script = f"from kernels.measure import check; raise SystemExit(not check({module!r}))"
        ok = subprocess.run([sys.executable, "-c", script], env={**os.environ, "TRITON_INTERPRET": "1"}).returncode == 0
        print_static(compile_all([module]))
    sys.exit(not ok)
