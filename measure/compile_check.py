"""What Triton's compiler makes of the kernels, for cards that need not be here.

Registers, spills, shared memory, occupancy, and `faults`: what a compiled kernel must not have. The kernels that are
compiled are the ones that ship: the op runs on meta tensors of the case's shapes, and each launch goes to Triton's
compiler, with the specialisation a real launch has, instead of to a device.
"""

import re
import subprocess
import tempfile

import torch

from kernels import backend
from measure.kernel_cases import CASES

ARCHITECTURES = (80, 90, 100)
# Scalar (non-vectorised) loads that a kernel is meant to have, where there are more than 8: offsets and log-sum-exps,
# the levels of a table, the masked tails of tensors.
SCALAR_LOADS = {"dkdv_kernel": 10, "dq_kernel": 18, "dequantise_kernel": 36, "quantise_kernel": 15, "adamw_kernel": 56}
# Of one multiprocessor: registers, threads, blocks, bytes of shared memory in all, and for one block.
LIMITS = {80: (65536, 2048, 32, 164 * 1024, 163 * 1024), 90: (65536, 2048, 32, 228 * 1024, 227 * 1024),
          100: (65536, 2048, 32, 228 * 1024, 227 * 1024)}


def run(op, inputs, upstream=None):
    """Forward and backward of an op.

    -> [differentiable outputs..., gradients of the inputs that require them], upstream gradients. Without `upstream`
    they are random, the same in every run.
    """
    outputs = differentiable(op(*inputs))
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    if upstream is None:
        upstream = [torch.empty_like(y) if y.is_meta else torch.randn(
            y.shape, generator=torch.Generator(y.device).manual_seed(i), device=y.device, dtype=y.dtype)
            for i, y in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, wanted, upstream) if wanted else ()
    return [y.detach() for y in outputs] + list(gradients), upstream


def differentiable(outputs) -> list:
    """The tensors among an op's outputs through which gradients flow."""
    return [y for y in (outputs if isinstance(outputs, tuple) else (outputs,))
            if isinstance(y, torch.Tensor) and y.requires_grad]


class FakeDriver:
    """What Triton's JIT asks of a driver before it compiles, with no device behind it."""

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
    """Receives launches in the place of a device, compiles each kernel once and keeps its figures in `rows`."""

    def __init__(self, architecture: int):
        self.architecture = architecture
        self.driver = FakeDriver(architecture)
        self.case = ""
        self.rows, self.seen = [], set()

    def __call__(self, kernel, grid, args, options):
        from triton.runtime import driver
        driver.set_active(self.driver)
        compiled = kernel.warmup(*args, grid=grid, **options)
        if compiled.hash not in self.seen:
            self.seen.add(compiled.hash)
            self.rows.append({"case": self.case, **figures(compiled, self.architecture)})


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
    registers, threads, blocks, shared, _ = LIMITS[architecture]
    # Registers are given out in units of 8 per thread. The driver keeps 1 KB of shared memory per block.
    fit = [blocks, threads // (32 * warps), registers // (32 * warps * max(8, -(-used["REG"] // 8) * 8))]
    if compiled.metadata.shared:
        fit.append(shared // (compiled.metadata.shared + 1024))
    return {"kernel": compiled.metadata.name, "arch": f"sm_{architecture}", "registers": used["REG"],
            "spill_bytes": used["STACK"] + used["LOCAL"], "shared_bytes": compiled.metadata.shared, "warps": warps,
            "occupancy": min(fit) * 32 * warps / threads,
            "wide_loads": len(re.findall(r"ld\.global\S*\.v[24]\.b(?:32|64)|cp\.async\S*", ptx)),
            "narrow_loads": len(re.findall(r"ld\.global(?!\S*\.v[248])\S*", ptx)),
            "tensor_core": len(re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx)),
            "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)), "fp64": len(re.findall(r"\.f64", ptx))}


def compile_all(kernels=tuple(CASES), architectures=ARCHITECTURES, tokens: int = 8192) -> list[dict]:
    """The figures of every Triton kernel that the cases of `kernels` launch, forward and backward, in bf16.

    Must not run in a process with TRITON_INTERPRET=1: the interpreter has nothing to compile.
    """
    rows = []
    for name in kernels:
        for architecture in architectures:
            compiler = Compiler(architecture)
            with backend.using("triton"), backend.sending_to(compiler):
                for case in CASES[name]:
                    compiler.case = case.name
                    run(case.op, case.inputs("meta", torch.bfloat16, tokens))
            rows += [{"module": name, **row} for row in compiler.rows]
    return rows


def faults(row: dict) -> list[str]:
    """What is wrong with a compiled kernel, in words; empty for a sound one."""
    shared = LIMITS[int(row["arch"][3:])][4]
    scalar_loads = SCALAR_LOADS.get(row["kernel"], 8)
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
    if row["narrow_loads"] > scalar_loads:
        bad.append(f"has {row['narrow_loads']} scalar loads, {scalar_loads} are meant")
    if memory_bound and row["occupancy"] < 0.25:
        bad.append(f"occupies {row['occupancy']:.0%} of the threads, too few to hide the memory's latency")
    if row["arch"] == "sm_90" and row["wgmma"] < row["tensor_core"]:
        bad.append(f"makes {row['tensor_core'] - row['wgmma']} of its matmuls without wgmma")
    return bad


def print_static(rows):
    """A line per compiled kernel, its faults at the end."""
    print(f"{'kernel':28} {'case':30} {'arch':7} {'regs':>4} {'spill':>5} {'shared':>7} {'warps':>5} {'occup.':>6}")
    for row in rows:
        print(f"{row['kernel']:28} {row['case']:30} {row['arch']:7} {row['registers']:4} {row['spill_bytes']:5} "
              f"{row['shared_bytes']:7} {row['warps']:5} {row['occupancy']:6.0%}  {'; '.join(faults(row))}")
