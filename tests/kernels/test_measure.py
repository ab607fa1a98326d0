"""What can be proven of the kernels without a GPU, and the tools that prove it. Truth: kernels broken on purpose
(broken_kernels.py), errors computed by hand, the compiler's own report on what it made."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import backend, measure
from kernels.backend import Case

ROOT = Path(__file__).parents[2]
COMPILE = """
import json, sys
from kernels.measure import compile_all
print(json.dumps(compile_all(architectures=[int(sys.argv[1])])))
"""
pytest.importorskip("triton", reason="Triton comes for Linux only")


def outside(*command) -> subprocess.Popen:
    """A Python process that compiles: with TRITON_INTERPRET set there would be nothing to compile."""
    plain = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "NANOCPT_KERNELS")}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env={**plain, "PYTHONPATH": str(ROOT)}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def answer(process):
    out, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    return json.loads(out)


@pytest.fixture(scope="module")
def compiled():
    processes = [outside("-c", COMPILE, str(architecture)) for architecture in measure.ARCHITECTURES]
    return [row for process in processes for row in answer(process)]


def test_every_kernel_compiles_for_every_card_without_a_fault(compiled):
    bad = [f"{row['module']}.{row['kernel']} ({row['case']}, {row['arch']}): {fault}"
           for row in compiled for fault in measure.faults(row)]
    assert not bad, "\n".join(bad)
    written = {(name, kernel) for name in measure.MODULES for kernel in kernels_of(name)}
    for architecture in measure.ARCHITECTURES:
        assert {(r["module"], r["kernel"]) for r in compiled if r["arch"] == f"sm_{architecture}"} >= written


def kernels_of(name):
    """The launched @jit functions of a file: those called by other kernels are compiled within them."""
    text = (ROOT / "kernels" / f"{name}.py").read_text(encoding="utf-8")
    return [k.split("(")[0] for part in text.split("@jit\ndef ")[1:] if (k := part.split("(")[0]).endswith("_kernel")]


def test_products_run_on_tensor_cores_and_the_rest_loads_in_vectors(compiled):
    hopper = [row for row in compiled if row["arch"] == "sm_90" and row["tensor_core"]]
    assert hopper
    assert all(row["wgmma"] == row["tensor_core"] for row in hopper)
    assert not any(row["wgmma"] for row in compiled if row["arch"] == "sm_80")       # the count reads what it says
    assert all(row["tensor_core"] or row["wide_loads"] for row in compiled)
    assert all(0 < row["registers"] <= 255 and 0 < row["occupancy"] <= 1 for row in compiled)


def test_each_planted_fault_is_found():
    found = answer(outside("tests/broken_kernels.py"))
    words = {"sound copy": "", "sound product": "", "fp64": "fp64", "narrow": "vectors",
             "half narrow": "single numbers", "spills": "spills", "shared": "shared memory", "few threads": "fills"}
    for name, word in words.items():
        for architecture, faults in found[name].items():
            assert bool(faults) == bool(word), (name, architecture, faults)
            assert word in " ".join(faults), (name, architecture)
    assert {a for a, faults in found["no wgmma"].items() if faults} == {"90"}


def test_the_benchmark_without_a_gpu_writes_the_promised_rows(tmp_path, monkeypatch):
    import bench
    made = [{"module": "m", "case": c, "kernel": "k", "arch": "sm_80", "registers": r, "spill_bytes": 0, "warps": 4,
             "shared_bytes": 9, "occupancy": 0.5, "wide_loads": 1, "narrow_loads": 0, "tensor_core": 0, "wgmma": 0,
             "fp64": 0}
            for c, r in (("one", 20), ("two", 30))]
    monkeypatch.setattr(measure, "compile_all", lambda: made)
    rows = bench.static_rows()
    assert [(r["name"], r["arch"], r["registers"], r["spill_bytes"], r["shared_bytes"]) for r in rows] == [
        ("m.k", "sm_80", 30, 0, 9)]
    assert rows[0]["variants"] == made


# ---- the tolerance rule

class Scaled(torch.autograd.Function):
    """2 x, off by `wrong` forward and backward where Triton is asked for."""

    @staticmethod
    def forward(ctx, x, wrong):
        ctx.wrong = wrong if backend.choice == "triton" else 0.0
        return x * (2 + ctx.wrong)

    @staticmethod
    def backward(ctx, dy):
        return dy * (2 + ctx.wrong), None


@pytest.mark.parametrize(("wrong", "dtype", "accepted"), [
    (0.0, torch.float32, True), (1e-7, torch.float32, True), (2e-6, torch.float32, False),
    (0.0, torch.bfloat16, True), (0.1, torch.bfloat16, False)])
def test_compare_accepts_rounding_and_nothing_more(wrong, dtype, accepted):
    x = torch.linspace(-1, 1, 101, dtype=dtype).requires_grad_()
    found = measure.compare(lambda x: Scaled.apply(x, wrong), [x])
    assert len(found) == 2
    assert all((error <= bound) == accepted for _, error, bound in found)


def test_compare_refuses_what_is_not_finite():
    with pytest.raises(AssertionError, match="not finite"):
        measure.compare(lambda x: x / (0.0 if backend.choice == "triton" else 1.0), [torch.ones(3, requires_grad=True)])


@pytest.mark.kernel
@pytest.mark.parametrize("name", measure.MODULES)
def test_the_check_of_each_file(name, capsys):
    """What `python -m kernels.NAME` prints first."""
    assert measure.check(name), capsys.readouterr().out
    assert importlib.import_module(f"kernels.{name}").cases()


# ---- dispatch

def test_which_backend_runs(monkeypatch):
    x = torch.ones(2)
    monkeypatch.setattr(backend, "choice", "")
    assert not backend.use_triton(x)
    with backend.using("triton"):
        assert backend.use_triton(x)
        assert not backend.use_triton(x.double())
        monkeypatch.setattr(backend, "interpreting", False)
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            backend.use_triton(x)
        monkeypatch.setattr(backend, "triton", None)
        with pytest.raises(ValueError, match="not installed"):
            backend.use_triton(x)
    with backend.using("reference"):
        assert not backend.use_triton(x)
    with backend.using("cuda"), pytest.raises(ValueError, match="'cuda'; it may be reference, triton or empty"):
        backend.use_triton(x)


def test_a_second_copy_of_a_file_leaves_the_registered_op_alone():
    """Registering a name again frees the op behind those who hold it: a segmentation fault, some time later."""
    before = torch.ops.nanocpt.swiglu_forward.default
    spec = importlib.util.spec_from_file_location("copy_of_swiglu", ROOT / "kernels/swiglu.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert torch.ops.nanocpt.swiglu_forward.default is before


def test_tables_and_powers():
    table = {80: "a", 90: "b"}
    receiver = SimpleNamespace()
    for architecture, entry in ((75, "a"), (80, "a"), (86, "a"), (90, "b"), (120, "b")):
        receiver.architecture = architecture
        with backend.sending_to(receiver):
            assert backend.table(table, torch.device("meta")) == entry
    assert [backend.power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 4096, 4097)] == [1, 1, 2, 4, 4, 8, 4096, 8192]


def test_the_ops_run_where_triton_has_no_wheel(tmp_path):
    """macOS and Windows: the package imports and the references compute."""
    script = """if True:
        import sys
        sys.modules["triton"] = None
        import torch, kernels
        y = kernels.rmsnorm(torch.ones(2, 4), torch.ones(4), 1e-6)
        y = kernels.swiglu(y, kernels.add_rmsnorm(y, y, torch.ones(4), 1e-6)[0])
        print(float(kernels.linear_cross_entropy(y, torch.ones(3, 4), torch.tensor([0, 1]))[0]))"""
    process = outside("-c", script)
    assert answer(process) == pytest.approx(2 * 1.0986, abs=1e-3)


# ---- timing, with the clock and the device taken away

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

    case = Case("double", lambda x, factor: x * factor, inputs, traffic=lambda n: (4e6, 8e6), torch=torch.mul)
    limits = {"copy_gb_per_second": 2.0, "bf16_tflops": 1.0}
    forward, backward = measure.time_case(case, 5, limits, {"theirs": breaks})
    assert (forward["pass"], backward["pass"]) == ("forward", "backward")
    # three rounds over four providers in turn: the first is timed as 1, 5 and 9 ms, then as 13, 17 and 21
    assert forward["ms"] == {"triton": 5.0, "reference": 6.0, "compiled": 7.0, "torch": 8.0}
    assert forward["floor_ms"] == pytest.approx(2.0)
    assert forward["share"] == pytest.approx(2.0 / 5.0)
    assert backward["ms"]["triton"] == 17.0
    assert backward["share"] == pytest.approx(4.0 / 17.0)
    assert forward["failed"] == {"theirs": "RuntimeError: no such kernel"}
    in_place, = measure.time_case(Case("in place", lambda x: None, lambda *given: (torch.ones(3),)), 5, limits, {})
    assert in_place["pass"] == "forward"
    assert in_place["ms"].keys() == {"triton", "reference", "compiled"}
    once, = measure.time_case(Case("once", torch.mul, inputs, one_shot=True, work=lambda n: (1e9, 2e9)), 5, limits, {})
    assert once["pass"] == "step"
    assert once["floor_ms"] == pytest.approx(3.0)
