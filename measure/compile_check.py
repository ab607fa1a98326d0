"""What Triton's compiler makes of the kernels, for cards that need not be here.

Registers, spills, shared memory, occupancy, and `faults`: what a compiled kernel must not have. The kernels that are
compiled are the ones that ship: the op runs on meta tensors of the case's shapes, and each launch goes to Triton's
compiler, with the specialisation a real launch has, instead of to a device.
"""

import re
import subprocess
import tempfile
from types import SimpleNamespace

import torch

from kernels import backend
from measure.kernel_cases import CASES

ARCHITECTURES = (80, 90, 100)
# Scalar (non-vectorised) loads that a kernel is meant to have, where there are more than 8: offsets and log-sum-exps,
# the levels of a table, the masked tails of tensors.
SCALAR_LOADS = {"dkdv_kernel": 10, "dq_kernel": 18, "dequantise_kernel": 36, "quantise_kernel": 15, "adamw_kernel": 56}
# Of one multiprocessor. The driver keeps 1 KB of the shared memory for each block.
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
DRIVERS_BYTES = 1024


def run(op, inputs, upstream=None):
    """Forward and backward of an op.

    -> [differentiable outputs..., gradients of the inputs that require them], upstream gradients. Without `upstream`
    they are random, the same in every run.
    """
    outputs = differentiable(op(*inputs))
    wanted = differentiable(inputs)
    if upstream is None:
        upstream = [torch.empty_like(y) if y.is_meta else torch.randn(
            y.shape, generator=torch.Generator(y.device).manual_seed(i), device=y.device, dtype=y.dtype)
            for i, y in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, wanted, upstream) if wanted else ()
    return [y.detach() for y in outputs] + list(gradients), upstream


def differentiable(values) -> list:
    """The tensors through which gradients flow, among the inputs of an op or its outputs (one, or several)."""
    values = values if isinstance(values, (tuple, list)) else [values]
    return [x for x in values if isinstance(x, torch.Tensor) and x.requires_grad]


class Compiler:
    """Receives launches in the place of a device, compiles each kernel once and keeps its figures in `rows`."""

    def __init__(self, architecture: int):
        from triton.backends.compiler import GPUTarget
        target = GPUTarget("cuda", architecture, 32)
        self.architecture, self.case, self.rows, self.seen = architecture, "", [], set()
        # What Triton's JIT asks of a driver before it compiles. It keeps compiled kernels by device, so that each
        # architecture is a device of its own.
        self.driver = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: architecture,
                                      get_current_stream=lambda device: 0)

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
