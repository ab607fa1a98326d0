"""Timing of a kernel's cases, with the clock and the device taken away. Truth: times and limits written out here."""

import pytest
import torch

from measure import timing
from measure.kernel_cases import Case


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
    forward, backward = timing.time_case(case, 5, limits)
    assert (forward["pass"], backward["pass"]) == ("forward", "backward")
    # three rounds over three providers in turn: the first is timed as 1, 4 and 7 ms, then as 10, 13 and 16
    assert forward["ms"] == {"triton": 4.0, "reference": 5.0, "compiled": 6.0}
    assert forward["floor_ms"] == pytest.approx(2.0)
    assert forward["share"] == pytest.approx(2.0 / 4.0)
    assert backward["ms"]["triton"] == 13.0
    assert backward["share"] == pytest.approx(4.0 / 13.0)
    assert forward["failed"] == {"torch": "RuntimeError: no such kernel"}
    in_place, = timing.time_case(Case("in place", lambda x: None, lambda *given: (torch.ones(3),),
                                      lambda n: (1, 0, 0, 0)), 5, limits)
    assert in_place["pass"] == "forward"
    assert in_place["ms"].keys() == {"triton"}
    once, = timing.time_case(Case("once", torch.mul, inputs, lambda n: (0, 0, 1e9, 2e9), one_shot=True), 5, limits)
    assert once["pass"] == "step"
    assert once["floor_ms"] == pytest.approx(3.0)
