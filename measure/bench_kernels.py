"""Every kernel: on a GPU its times beside its peers', without one what the compiler says of it, and CPU times.

On a GPU a row per case, number of tokens and pass; the peers are torch.compile of the reference, PyTorch's own op and
Liger's kernels where they are installed. Without one a row per kernel function and architecture, then the references,
which are the product on a CPU, beside the plain way in PyTorch.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

import kernels
from core import parallel
from core.errors import UserError
from kernels.attention import interval_mask
from measure import compile_check, timing
from measure.bench_rows import ROOT, missing_row, row, spread
from measure.bench_steps import CASES, in_turn
from measure.kernel_cases import KERNELS, cases


@dataclass
class KernelOptions:
    """Measure every kernel, on a GPU or without one."""
    only: list[str] = field(default_factory=list)
    """Check and measure these files of kernels/ alone, e.g. rmsnorm. Default: measure all of them."""
    tokens: list[int] = field(default_factory=lambda: [2048, 8192, 16384])
    """Numbers of tokens to time, on a GPU."""
    seconds: float = 1800
    """Begin no case after so long, on a GPU."""
    rounds: int = 9
    """Rounds of each CPU timing."""
    progress: str = ""
    """Write the rows so far to this file after each case, on a GPU."""


def bench_kernels(options: KernelOptions) -> list:
    """The table for this machine; with `only`, a check of those kernels against float64 first."""
    unknown = [name for name in options.only if name not in KERNELS]
    if unknown:
        raise UserError(f"--only {unknown[0]} is no kernel; choose from {', '.join(KERNELS)}")
    for name in options.only:
        if not check_apart(name):
            raise RuntimeError(f"kernels/{name}.py is further from float64 than rounding explains")
    if torch.cuda.is_available():
        return time_kernels(options)
    rows = static_rows(options.only or tuple(KERNELS))
    if not options.only:
        parallel.keep_freed_memory()             # for both sides: else the page faults of each tensor are timed
        rows += cpu_rows(options.rounds) + logits_rows(options.rounds)
    return rows


def check_apart(kernel: str) -> bool:
    """compile_check.check; without a GPU in a process of its own, since Triton cannot interpret and compile in one."""
    if torch.cuda.is_available():
        return compile_check.check(kernel)
    script = f"from measure.compile_check import check; raise SystemExit(not check({kernel!r}))"
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT,
                          env={**os.environ, "TRITON_INTERPRET": "1"}).returncode == 0


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


def cpu_cases() -> dict:
    """{name: (our op, the plain way, inputs)} at sizes of a small model on a CPU, fp32."""
    def normal(*shape):
        return torch.randn(shape, requires_grad=True)

    def turn(x, cos, sin):
        cos, sin = (torch.cat([a, a], -1).unsqueeze(2) for a in (cos, sin))
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def dense(q, k, v, doc_start):
        mask = interval_mask(q.shape[1], k.shape[1], True, None, doc_start)
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True)

    T, D, H, K, d = 2048, 1024, 8, 4, 64
    angle = torch.rand(1, T, d // 2)
    doc_start = (torch.arange(T, dtype=torch.int32) // 256 * 256)[None]
    labels = torch.randint(0, 32768, (T,))
    return {
        "cpu_rmsnorm": (lambda x, w: kernels.rmsnorm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (D,), w, 1e-5),
                        (normal(T, D), normal(D))),
        "cpu_add_rmsnorm": (lambda x, r, w: kernels.add_rmsnorm(x, r, w, 1e-5),
                            lambda x, r, w: (F.rms_norm(x + r, (D,), w, 1e-5), x + r),
                            (normal(T, D), normal(T, D), normal(D))),
        "cpu_swiglu": (kernels.swiglu, lambda g, u: F.silu(g) * u, (normal(T, 2752), normal(T, 2752))),
        "cpu_rope": (kernels.rope, lambda q, k, cos, sin: (turn(q, cos, sin), turn(k, cos, sin)),
                     (normal(1, T, H, d), normal(1, T, K, d), angle.cos(), angle.sin())),
        "cpu_attention_documents": (lambda q, k, v, s: kernels.attention(q, k, v, doc_start=s), dense,
                                    (normal(1, T, H, d), normal(1, T, K, d), normal(1, T, K, d), doc_start)),
        "cpu_linear_cross_entropy_32k": (lambda x, w, y: kernels.linear_cross_entropy(x, w, y)[0],
                                         lambda x, w, y: F.cross_entropy(x @ w.T, y, reduction="sum"),
                                         (normal(T, 256), (normal(32768, 256) / 16).detach().requires_grad_(), labels)),
    }


def cpu_rows(rounds: int) -> list:
    """Milliseconds of a forward and backward pass on the CPU, both ways in turn."""
    rows = []
    for name, (ours, plain, inputs) in cpu_cases().items():
        upstreams = {op: compile_check.run(op, inputs)[1] for op in (ours, plain)}
        times = {ours: [], plain: []}
        for _ in range(rounds):
            for op, taken in times.items():
                start = time.perf_counter()
                compile_check.run(op, inputs, upstreams[op])
                taken.append(1000 * (time.perf_counter() - start))
        rows.append(row(name, "ms", *(statistics.median(t) for t in times.values()), "plain PyTorch",
                        spread=spread(times[ours])))
    return rows


def logits_rows(steps: int) -> list:
    """Training at 32,768 ids with the fused linear cross-entropy, and with the logits of all tokens at once."""
    seconds, results, _ = in_turn("vocab_32k", ("ours", "materialised"), steps, "cpu")
    assert math.isclose(*(r["losses"][0] for r in results.values()), rel_tol=1e-5), results
    ours, theirs = (CASES["vocab_32k"].tokens / statistics.median(s) for s in seconds.values())
    return [row("cpu_training_32k", "tokens/s", ours, theirs, "materialised logits",
                spread=spread([b / a for a, b in zip(*seconds.values())])),
            row("cpu_training_32k_peak_memory", "bytes", *(r["peak_bytes"] for r in results.values()),
                "materialised logits")]


# ---- on a GPU

def time_kernels(options: KernelOptions) -> list:
    """Every case of every kernel on this GPU; what the time does not suffice for is named."""
    end, peers, limits = time.monotonic() + options.seconds, liger_peers(), timing.device_limits()
    rows = [row(name, name, value) for name, value in limits.items()]
    todo = [(name, case, n) for n in options.tokens for name in options.only or KERNELS for case in cases(name)]
    for module, case, n in todo:
        if time.monotonic() > end:
            print(f"no time left for {case.name} at {n} tokens")
            rows.append(missing_row(f"{case.name} {n}", "ms", left_out=f"{options.seconds:.0f} seconds were up"))
            continue
        passes = timing.time_case(case, n, limits, peers.get(case.name.split()[0], {}))
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


def liger_peers() -> dict:
    """{first word of a case's name: {"liger": op with our arguments}}, if liger-kernel is installed."""
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return {}
    doubled = {}                                        # its layout of the angles, made once

    def rope(q, k, cos, sin):
        if cos.data_ptr() not in doubled:
            doubled[cos.data_ptr()] = [torch.cat([a, a], -1).to(q.dtype) for a in (cos, sin)]
        q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *doubled[cos.data_ptr()])
        return q.transpose(1, 2), k.transpose(1, 2)
    liger = {"rmsnorm": lambda x, w, eps: LigerRMSNormFunction.apply(x, w, eps, 0.0, "llama", False),
             "add_rmsnorm": lambda x, r, w, eps: LigerFusedAddRMSNormFunction.apply(x, r, w, eps, 0.0, "llama", False),
             "rope": rope, "swiglu": LigerSiLUMulFunction.apply,
             "cross_entropy": lambda x, w, y: LigerFusedLinearCrossEntropyFunction.apply(
                 x, w, y.long(), None, None, -100, 0.0, 0.0, "sum")[0]}
    return {name: {"liger": op} for name, op in liger.items()}
