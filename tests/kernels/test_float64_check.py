"""The rule that every kernel's test goes by. Truth: errors planted here."""

import pytest
import torch
from float64_check import compare

from kernels import backend


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
    found = compare(lambda x: Scaled.apply(x, wrong), [x])
    assert len(found) == 2
    assert all((error <= bound) == accepted for _, error, bound in found)


def test_compare_refuses_what_is_not_finite():
    with pytest.raises(AssertionError, match="not finite"):
        compare(lambda x: x / (0.0 if backend.choice == "triton" else 1.0),
                              [torch.ones(3, requires_grad=True)])
