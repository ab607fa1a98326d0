"""LoRA's linear layers against y = x W^T + bias + scale (x A^T) B^T, written out and left to autograd in float64."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels import backend
from kernels.lora import lora_linear
from kernels.nf4 import dequantise, quantise

pytestmark = pytest.mark.kernel
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPACING = {torch.float64: 2.0**-50, torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def normal(*shape, seed=0, dtype=torch.float32, scale=1.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return x.to(DEVICE, dtype)


def layers(width, outs, ranks, biases=(), dtype=torch.float32, adapter=None):
    """-> weights, biases, A's, B's, scales of one call; the adapters require gradients."""
    adapter = adapter or dtype
    weights = [normal(out, width, seed=i, dtype=dtype, scale=width**-0.5) for i, out in enumerate(outs)]
    bias = [normal(out, seed=10 + i, dtype=dtype) if i in biases else None for i, out in enumerate(outs)]
    a = [normal(r, width, seed=20 + i, dtype=adapter, scale=width**-0.5).requires_grad_() for i, r in enumerate(ranks)]
    b = [normal(out, r, seed=30 + i, dtype=adapter).requires_grad_() for i, (out, r) in enumerate(zip(outs, ranks))]
    return weights, bias, a, b, [2.0 - 0.6 * i for i in range(len(outs))]


def naive(x, weights, biases, a, b, scales):
    return tuple(x @ w.T + (0 if bias is None else bias) + scale * (x @ p.T) @ q.T
                 for w, bias, p, q, scale in zip(weights, biases, a, b, scales))


def tensors(x, weights, biases, a, b, scales):
    return [x, *weights, *biases, *a, *b]


def as_double(x):
    return x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


def absolute(x):
    if isinstance(x, list):
        return [absolute(each) for each in x]
    return x.detach().abs().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


def results(function, given, upstream):
    outputs = function(*given)
    leaves = [t for t in tensors(*given) if isinstance(t, torch.Tensor) and t.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


def against(x, weights, biases, a, b, scales, dtype=None, function=lora_linear):
    """Outputs and gradients of all that asks for one, within two roundings of `dtype` of float64's; -> them all."""
    given = (x, weights, biases, a, b, scales)
    before = [t.detach().clone() for t in tensors(*given) if isinstance(t, torch.Tensor)]
    wanted = [t for t in tensors(*given) if isinstance(t, torch.Tensor) and t.requires_grad]
    outputs = function(*given)
    assert isinstance(outputs, tuple)
    upstream = [normal(*y.shape, seed=50 + i, dtype=y.dtype) for i, y in enumerate(outputs)]
    kept = [u.clone() for u in upstream]
    found = [*outputs, *torch.autograd.grad(outputs, wanted, upstream)]
    left = [t for t in tensors(*given) if isinstance(t, torch.Tensor)]
    assert all(torch.equal(p, q.detach()) for p, q in zip(before, left)), "an input was written to"
    assert all(torch.equal(p, q) for p, q in zip(kept, upstream)), "an upstream gradient was written to"
    assert [t.dtype for t in found[len(outputs):]] == [t.dtype for t in wanted]

    plain = [dequantise(w, torch.float64) if not isinstance(w, torch.Tensor) else w for w in weights]
    wide = [as_double(x)] + [[as_double(t) for t in each] for each in (plain, biases, a, b)] + [scales]
    truth = results(naive, wide, [u.double() for u in upstream])
    # the same sums of absolute values: what a rounding is relative to, where the sum cancels
    sizes = results(naive, absolute(wide), [u.double().abs() for u in upstream])
    spacing = SPACING[dtype or outputs[0].dtype]
    assert len(found) == len(truth)
    for i, (got, true, size) in enumerate(zip(found, truth, sizes)):
        assert got.shape == true.shape
        if true.numel():
            error = ((got.double() - true).abs() / size.clamp(min=1e-30)).max().item()
            assert error <= 2 * spacing, f"result {i}: {error / spacing:.1f} roundings"
    return [t.detach() for t in found]


# ---- against the formula

@pytest.mark.parametrize("outs", [(19,), (64, 16, 16), (40, 40), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 37), (1, 64), (7, 1), (2, 0, 8), (0, 6), (5,)], ids=str)
def test_outputs_and_gradients(shape, outs):
    ranks = [1 + 3 * i for i in range(len(outs))]
    for dtype in (torch.float32, torch.float64):
        x = normal(*shape, seed=99, dtype=dtype).requires_grad_()
        outputs = against(x, *layers(shape[-1], outs, ranks, biases=(0, 2), dtype=dtype))
        assert [y.shape for y in outputs[:len(outs)]] == [(*shape[:-1], out) for out in outs]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter", ["same", "fp32"])
def test_half_precision(dtype, adapter):
    given = layers(256, (256, 64, 64), (16, 16, 8), (1,), dtype, torch.float32 if adapter == "fp32" else dtype)
    outputs = against(normal(2, 33, 256, seed=99, dtype=dtype).requires_grad_(), *given, dtype=dtype)
    assert outputs[0].dtype == dtype


def test_every_combination_of_what_is_frozen():
    for x_needs, a_needs, b_needs, bias_needs in itertools.product([True, False], repeat=4):
        x = normal(6, 20, seed=99).requires_grad_(x_needs)
        weights, biases, a, b, scales = layers(20, (9, 7), (2, 3), (0,))
        a[0].requires_grad_(a_needs)
        b[1].requires_grad_(b_needs)
        biases[0].requires_grad_(bias_needs)
        against(x, weights, biases, a, b, scales)
    with torch.no_grad():
        assert not lora_linear(x, weights, biases, a, b, scales)[0].requires_grad
    frozen = [[t.detach() for t in each] for each in (a, b)]
    assert not lora_linear(x.detach(), weights, [None, None], *frozen, scales)[0].requires_grad


def test_gradcheck():
    weights, biases, a, b, scales = layers(5, (4, 3), (2, 1), (0, 1), torch.float64)
    x = normal(2, 3, 5, dtype=torch.float64).requires_grad_()
    flat = [x, *[bias.requires_grad_() for bias in biases], *a, *b]
    assert gradcheck(lambda x, *t: lora_linear(x, weights, t[:2], t[2:4], t[4:], scales), flat)


def test_strided_and_expanded():
    given = layers(24, (10, 6), (4, 4))
    x = normal(12, 7, 24, seed=99)
    plain = against(x.clone().requires_grad_(), *given)
    wide = torch.stack([x, x + 1], 3).requires_grad_()
    parts = lora_linear(wide[..., 0], *given)
    upstream = [normal(*y.shape, seed=50 + i) for i, y in enumerate(parts)]
    found = [*parts, *torch.autograd.grad(parts, [*given[2], *given[3]], [torch.stack([u, u], 3)[..., 1]
                                                                        for u in upstream])]
    for got, true in zip(found, plain[:2] + plain[3:]):
        assert (got - true).abs().max() <= 4e-6 * true.abs().max()
    row = x[:1, :1].expand(5, 7, 24).requires_grad_()
    y, _ = lora_linear(row, *given)
    dx, = torch.autograd.grad(y.sum(), row)                # an expanded upstream gradient
    want, = torch.autograd.grad(naive(row, *given)[0].sum(), row)
    assert (dx - want).abs().max() < 1e-5


def test_an_output_that_is_not_used():
    given = layers(12, (5, 4), (2, 2))
    x = normal(3, 12, seed=99).requires_grad_()
    used = [x, given[2][0], given[3][0]]
    got = torch.autograd.grad(lora_linear(x, *given)[0].square().sum(), used)
    want = torch.autograd.grad(naive(x, *given)[0].square().sum(), used)
    assert all((p - q).abs().max() < 1e-4 for p, q in zip(got, want))


def test_a_zero_b_changes_nothing():
    """An adapter as it is born: y is the base layer's, A's gradient 0, B's not."""
    weights, biases, a, b, scales = layers(16, (8,), (4,), (0,))
    b = [torch.zeros_like(b[0], requires_grad=True)]
    x = normal(5, 16, seed=99)
    y, = lora_linear(x, weights, biases, a, b, scales)
    assert torch.equal(y, torch.nn.functional.linear(x, weights[0], biases[0]))
    da, db = torch.autograd.grad(y.sum(), [a[0], b[0]])
    assert (da == 0).all()
    assert (db != 0).any()


def test_users_mistakes():
    weights, biases, a, b, scales = layers(16, (8, 4), (4, 4))
    x = normal(5, 16)
    with pytest.raises(ValueError, match="not 2, 2, 1, 2 and 2"):
        lora_linear(x, weights, biases, a[:1], b, scales)
    with pytest.raises(ValueError, match="not 0"):
        lora_linear(x, [], [], [], [], [])
    with pytest.raises(ValueError, match="requires_grad_"):
        lora_linear(x, [weights[0], weights[1].requires_grad_()], biases, a, b, scales)
    weights[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 and a weight torch\.float32"):
        lora_linear(x.bfloat16(), weights, biases, a, b, scales)


# ---- what it keeps and makes

class Made(TorchDispatchMode):
    """The shapes of all that is computed; views of what exists do not count."""

    def __init__(self, exists):
        super().__init__()
        self.shapes, self.exists = set(), {t.data_ptr() for t in exists}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.data_ptr() not in self.exists:
            self.shapes.add(tuple(sorted(out.shape)))
        return out


def test_no_gradient_of_a_frozen_weight_or_bias_is_formed():
    x = normal(6, 20, seed=99).requires_grad_()
    given = layers(20, (9, 7), (2, 3), (0, 1))
    with Made(given[0]) as made:
        torch.autograd.grad(sum(y.sum() for y in lora_linear(x, *given)), [x, *given[2], *given[3]])
    assert {(6, 9), (6, 20), (5, 20), (2, 9)} <= made.shapes
    assert not {(9, 20), (7, 20), (16, 20), (9,), (7,)} & made.shapes
    with Made([]) as made:                                 # the naive layers do, once their weights want one
        weights = [w.requires_grad_() for w in given[0]]
        torch.autograd.grad(sum(y.sum() for y in naive(x, weights, [None, None], *given[2:])), weights)
    assert (9, 20) in made.shapes


def test_what_is_kept_for_the_backward_pass():
    """x itself, S, and what exists anyway; no second copy of x, nothing as large as y."""
    x = normal(6, 20, seed=99).requires_grad_()
    weights, biases, a, b, scales = layers(20, (9, 7), (2, 3), (0,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, weights, biases, a, b, scales)
    known = {t.data_ptr() for t in [x, *weights, *a, *b]}
    assert {t.data_ptr() for t in kept} >= {t.data_ptr() for t in [x, *a, *b]}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in known] == [(6, 5)]


def test_two_runs_are_bitwise_equal():
    given = layers(64, (64, 16), (8, 8), (0,), torch.bfloat16)
    x = normal(40, 64, seed=99, dtype=torch.bfloat16).requires_grad_()
    assert all(torch.equal(p, q) for p, q in zip(against(x, *given), against(x, *given)))


# ---- autocast, checkpoints, compile

@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(base):
    """Products in bf16, gradients in the dtype of what they belong to; the backward pass inside autocast or outside."""
    weights, biases, a, b, scales = layers(128, (64, 32), (8, 4), (0,), base, torch.float32)
    x = normal(3, 9, 128, seed=99).requires_grad_()

    def function(*given):
        with torch.autocast(DEVICE, torch.bfloat16):
            return lora_linear(*given)
    first = against(x, weights, biases, a, b, scales, torch.bfloat16, function)
    assert [t.dtype for t in first] == [torch.bfloat16] * 2 + [torch.float32] * 5
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = against(x, weights, biases, a, b, scales, torch.bfloat16)
    assert all(torch.equal(p, q) for p, q in zip(first, inside))
    outputs = lora_linear(x, [w.float() for w in weights], [None, None], a, b, scales)
    with torch.autocast(DEVICE, torch.bfloat16):
        outputs[0].sum().backward()                        # fp32 forward, backward within autocast
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_quantised_weights(kernel):
    """Against the dequantised values, beside a weight that is not quantised."""
    weights, biases, a, b, scales = layers(64, (48, 80, 16), (4, 4, 2), (1,))
    records = [quantise(weights[0]), weights[1], quantise(weights[2], double_quant=False)]
    with backend.using(kernel):
        against(normal(2, 7, 64, seed=99).requires_grad_(), records, biases, a, b, scales)


def two_layers(x, one, two):
    gate, up = lora_linear(x, *one)
    return lora_linear(torch.nn.functional.silu(gate) * up, *two)[0]


@pytest.mark.parametrize("quantised", [False, True])
def test_activation_checkpointing(quantised):
    one, two = layers(48, (64, 64), (4, 4)), layers(64, (48,), (3,))
    if quantised:
        one, two = (([quantise(w) for w in given[0]], *given[1:]) for given in (one, two))
    x = normal(9, 48, seed=99).requires_grad_()
    trained = [x, *one[2], *one[3], *two[2], *two[3]]
    plain = two_layers(x, one, two)
    want = torch.autograd.grad(plain.square().sum(), trained)
    again = checkpoint(two_layers, x, one, two, use_reentrant=False)
    got = torch.autograd.grad(again.square().sum(), trained)
    assert torch.equal(plain, again)
    assert all(torch.equal(p, q) for p, q in zip(got, want))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_compile(quantised, autocast):
    given = layers(32, (24, 8), (4, 2), (0,))
    if quantised:
        given = ([quantise(w) for w in given[0]], *given[1:])
    x = normal(2, 5, 32, seed=99).requires_grad_()
    compiled = torch.compile(lambda x, *given: lora_linear(x, *given), fullgraph=True, backend="aot_eager")

    def run(function):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            outputs = function(x, *given)
        return [*outputs, *torch.autograd.grad(sum(y.float().square().sum() for y in outputs),
                                               [x, *given[2], *given[3]])]
    with backend.using("triton"):
        for got, true in zip(run(compiled), run(lora_linear)):
            assert got.dtype == true.dtype
            assert (got - true).abs().max() <= (2.0**-6 if autocast else 1e-5) * true.abs().max()


# ---- PEFT

@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_against_peft(bias, rslora):
    peft = pytest.importorskip("peft", reason="the truth is PEFT's own layer")
    torch.manual_seed(0)
    base = torch.nn.Linear(40, 24, bias=bias, device=DEVICE)
    model = torch.nn.ModuleDict({"proj": base})
    config = peft.LoraConfig(r=8, lora_alpha=12, target_modules=["proj"], use_rslora=rslora, init_lora_weights=False)
    layer = peft.get_peft_model(model, config).base_model.model["proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = normal(3, 5, 40, seed=99).requires_grad_()
    y = layer(x)
    ours, = lora_linear(x, [base.weight], [base.bias], [a], [b], [12 / (8**0.5 if rslora else 8)])
    assert (y - ours).abs().max() <= 2e-6 * y.abs().max()
    upstream = torch.randn_like(y)
    for got, true in zip(torch.autograd.grad(ours, [x, a, b], upstream), torch.autograd.grad(y, [x, a, b], upstream)):
        assert (got - true).abs().max() <= 4e-6 * true.abs().max()
