"""How far a kernel is from float64, and how far rounding may take it; for the tests of every kernel."""

import math

import torch

from kernels import backend
from measure.kernel_cases import run


def in_dtype(inputs, dtype):
    """The same values as leaves of another floating-point dtype; constants (angles) are only ever upcast."""
    def convert(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        wanted = dtype if x.requires_grad or dtype == torch.float64 else x.dtype
        return x.detach().to(wanted).requires_grad_(x.requires_grad)
    return [convert(x) for x in inputs]


def compare(op, inputs, terms: int = 1, scale: float = 0.0, kernel: str = "triton"):
    """Errors of op's outputs and gradients against the float64 reference, and the largest that rounding explains.

    -> [(index, error, bound)], largest absolute values. The yardstick is the reference in the same dtype: another
    order of the same roundings may double its error. Two terms are added:
    * one rounding of the result, counted as a full spacing because the interpreter truncates bf16;
    * the random walk of fp32 roundings in a sum of `terms` elements. Partial sums grow like sqrt(k), so the error is
      below sqrt(terms) 2^-24 times the largest result; four standard deviations are allowed.
    scale: the size of what cancels inside, where that is larger than every result.
    """
    with backend.using(kernel):
        ours, upstream = run(op, inputs)
    with backend.using("reference"):
        dtype = next(x.dtype for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point())
        plain, _ = run(op, in_dtype(inputs, dtype), upstream)
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
