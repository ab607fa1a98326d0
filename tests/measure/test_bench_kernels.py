"""The table of kernels, with the clock and the device taken away. Truth: times and limits written out here, figures
made by hand, the plain way in PyTorch."""

import json
import time

import pytest
import torch

from measure import bench_kernels
from measure.bench_kernels import KernelOptions
from measure.kernel_cases import CPU_CASES, Case


def test_the_benchmark_without_a_gpu_writes_the_promised_rows(monkeypatch):
    made = [{"module": "m", "case": c, "kernel": "k", "arch": "sm_80", "registers": r, "spill_bytes": 0, "warps": 4,
             "shared_bytes": 9, "occupancy": 0.5, "wide_loads": 1, "narrow_loads": 0, "tensor_core": 0, "wgmma": 0,
             "fp64": 0}
            for c, r in (("one", 20), ("two", 30))]
    monkeypatch.setattr(bench_kernels, "compile_all", lambda names: made)
    rows = bench_kernels.static_rows(("m",))
    assert [(r["name"], r["arch"], r["registers"], r["spill_bytes"], r["shared_bytes"]) for r in rows] == [
        ("m.k", "sm_80", 30, 0, 9)]
    assert rows[0]["variants"] == made


def test_the_kernel_table(tmp_path, monkeypatch, capsys):
    cases = iter(range(100))

    def timed(case, tokens, limits):
        time.sleep(0.05 * (next(cases) > 1))
        return [{"case": case.name, "tokens": tokens, "pass": "forward", "ms": {"triton": 2.0, "torch": 4.0},
                 "floor_ms": 1.0, "share": 0.5, "failed": {}, "spread": {}, "peak_bytes": {}}]
    monkeypatch.setattr(bench_kernels, "device_limits", lambda: {"copy_gb_per_second": 3000.0, "bf16_tflops": 700.0})
    monkeypatch.setattr(bench_kernels, "time_case", timed)
    options = KernelOptions(tokens=[64], seconds=0.01, progress=str(tmp_path / "table.json"))
    rows = bench_kernels.time_kernels(options)
    assert [r["name"] for r in rows[:2]] == ["copy_gb_per_second", "bf16_tflops"]
    assert (rows[2]["ours"], rows[2]["peer"], rows[2]["peer_name"], rows[2]["ratio"]) == (2.0, 4.0, "torch", 0.5)
    assert "seconds were up" in rows[-1]["left_out"]
    assert 2 < len(json.loads((tmp_path / "table.json").read_text())["rows"]) <= len(rows)


def test_cpu_paths_compute_what_the_plain_way_computes():
    for name, case in CPU_CASES.items():
        inputs = case.inputs("cpu", torch.float32, 300)
        with torch.no_grad():
            ours, plain = (f(*inputs) for f in (case.op, case.torch))
        for x, y in zip(*((made if isinstance(made, tuple) else (made,)) for made in (ours, plain))):
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-4), name


def test_a_timed_row_names_the_share_of_the_limit_and_who_failed(monkeypatch):
    triton_testing = pytest.importorskip("triton.testing")
    milliseconds = iter(range(1, 100))
    monkeypatch.setattr(triton_testing, "do_bench", lambda call, **options: (call(), float(next(milliseconds)))[1])
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *a: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *a: 0)
    monkeypatch.setattr(torch, "compile", lambda op, **options: op)

    def inputs(device, dtype, tokens):
        return torch.ones(tokens, requires_grad=True), 2.0

    def breaks(x, factor):
        raise RuntimeError("no such kernel\nand more")

    case = Case("double", lambda x, factor: x * factor, inputs, lambda n: (4e6, 8e6, 0, 0), breaks,
                beside=("reference", "compiled"))
    limits = {"copy_gb_per_second": 2.0, "bf16_tflops": 1.0}
    forward, backward = bench_kernels.time_case(case, 5, limits)
    assert (forward["pass"], backward["pass"]) == ("forward", "backward")
    # three rounds over three providers, the second in reverse order: 1, 6 and 7 ms for the first, then 10, 15 and 16
    assert forward["ms"] == {"triton": 6.0, "reference": 5.0, "compiled": 4.0}
    assert forward["floor_ms"] == pytest.approx(2.0)
    assert forward["share"] == pytest.approx(2.0 / 6.0)
    assert backward["ms"]["triton"] == 15.0
    assert backward["share"] == pytest.approx(4.0 / 15.0)
    assert forward["failed"] == {"torch": "RuntimeError: no such kernel"}
    in_place, = bench_kernels.time_case(Case("in place", lambda x: None, lambda *given: (torch.ones(3),),
                                      lambda n: (1, 0, 0, 0)), 5, limits)
    assert in_place["pass"] == "forward"
    assert in_place["ms"].keys() == {"triton"}
    fused = Case("once", torch.mul, inputs, lambda n: (0, 0, 1e9, 2e9), one_shot=True)
    once, = bench_kernels.time_case(fused, 5, limits)
    assert once["pass"] == "step"
    assert once["floor_ms"] == pytest.approx(3.0)
