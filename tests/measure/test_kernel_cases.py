"""What can be proven of the kernels without a GPU, and the tools that prove it. Truth: kernels broken on purpose
(broken_kernels.py), the compiler's own report on what it made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from measure import bench_kernels
from measure.kernel_cases import CASES

ROOT = Path(__file__).parents[2]
COMPILE = """
import json, sys
from measure.bench_kernels import compile_all
print(json.dumps(compile_all(**json.loads(sys.argv[1]))))
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
    """Every kernel for every card; minutes."""
    return answer(outside("-c", COMPILE, "{}"))


def assert_sound(rows):
    bad = [f"{row['module']}.{row['kernel']} ({row['case']}, {row['arch']}): {fault}"
           for row in rows for fault in bench_kernels.faults(row)]
    assert not bad, "\n".join(bad)


def test_two_kernels_compile_for_a_card_without_a_fault():
    rows = answer(outside("-c", COMPILE, json.dumps({"kernels": ["swiglu", "linear_kl"], "architectures": [90]})))
    assert_sound(rows)
    assert {row["kernel"] for row in rows} == {"forward_kernel", "backward_kernel", "row_kernel"}


@pytest.mark.slow
def test_every_kernel_compiles_for_every_card_without_a_fault(compiled):
    assert_sound(compiled)
    written = {(name, kernel) for name in CASES for kernel in kernels_of(name)}
    for architecture in bench_kernels.ARCHITECTURES:
        assert {(r["module"], r["kernel"]) for r in compiled if r["arch"] == f"sm_{architecture}"} >= written


def kernels_of(name):
    """The launched @jit functions of a file: those called by other kernels are compiled within them."""
    text = (ROOT / "kernels" / f"{name}.py").read_text(encoding="utf-8")
    return [k.split("(")[0] for part in text.split("@jit\ndef ")[1:] if (k := part.split("(")[0]).endswith("_kernel")]


@pytest.mark.slow
def test_matmuls_run_on_tensor_cores_and_the_rest_loads_in_vectors(compiled):
    hopper = [row for row in compiled if row["arch"] == "sm_90" and row["tensor_core"]]
    assert hopper
    assert all(row["wgmma"] == row["tensor_core"] for row in hopper)
    assert not any(row["wgmma"] for row in compiled if row["arch"] == "sm_80")       # the count reads what it says
    assert all(row["tensor_core"] or row["wide_loads"] for row in compiled)
    assert all(0 < row["registers"] <= 255 and 0 < row["occupancy"] <= 1 for row in compiled)


@pytest.mark.parametrize("architecture", [pytest.param("80", marks=pytest.mark.slow), "90",
                                          pytest.param("100", marks=pytest.mark.slow)])
def test_each_planted_fault_is_found(architecture):
    found = answer(outside("tests/measure/broken_kernels.py", architecture))
    words = {"sound copy": "", "sound product": "", "fp64": "fp64", "narrow": "vectors",
             "half narrow": "scalar loads", "spills": "spills", "shared": "shared memory", "few threads": "occupies",
             "no wgmma": "wgmma" if architecture == "90" else ""}
    for name, word in words.items():
        faults = found[name][architecture]
        assert bool(faults) == bool(word), (name, faults)
        assert word in " ".join(faults), name
