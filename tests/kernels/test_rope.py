"""Rotation and Qwen3's norm before it: kernels against the float64 reference, both against formulas written out here.

Without a GPU the kernels run in Triton's interpreter, which truncates where a card rounds to bf16.
"""

import dataclasses
import importlib.util
from itertools import product
from pathlib import Path

import pytest
import torch
from float64_check import compare
from quick import slow_except
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from kernels import backend
from kernels.rope import qk_norm_rope, rope

pytestmark = pytest.mark.kernel
pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, T, H, K, d: groups of 1 to 8, heads that are no power of two, more key-value heads than heads, several tiles
SHAPES = [(2, 5, 4, 2, 6), (1, 1, 1, 1, 2), (3, 7, 3, 1, 34), (2, 9, 8, 1, 16), (1, 11, 7, 7, 10), (2, 60, 4, 2, 64),
          (1, 64, 3, 2, 64), (1, 9, 5, 2, 80), (2, 3, 2, 4, 8), (1, 40, 14, 2, 128)]
EMPTY = [(0, 3, 2, 1, 4), (2, 0, 2, 1, 4)]
QUICK = [*((shape, torch.float32) for shape in (*SHAPES[:3], SHAPES[5], SHAPES[8], *EMPTY)),
         (SHAPES[0], torch.bfloat16), (SHAPES[4], torch.float16)]


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + 3)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def angles_of(rows, T, half, amplitude=1.0):
    angle = torch.rand(rows, T, half, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE) * 50
    return (angle.cos() * amplitude).float(), (angle.sin() * amplitude).float()


def setting(shape, dtype=torch.float32, shared=False, norm=False, amplitude=1.0):
    """-> op of (q, k[, weights]) with the angles inside, so that they stay fp32 in every comparison; its inputs."""
    B, T, H, K, d = shape
    cos, sin = angles_of(1 if shared else B, T, d // 2, amplitude)
    x = [normal(B, T, H, d, dtype=dtype), normal(B, T, K, d, seed=1, dtype=dtype)]
    if norm:
        x += [normal(d, seed=2, dtype=dtype), normal(d, seed=3, dtype=dtype)]
        return (lambda q, k, wq, wk: qk_norm_rope(q, k, wq, wk, cos, sin, 1e-6)), x
    return (lambda q, k: rope(q, k, cos, sin)), x


def good(op, inputs, terms=4):
    """Behind a norm dx is what is left of w dy / rms when its part along x is gone, nearly nothing for small d."""
    cancels = [4 * w.abs().max().item() / x.detach().double().square().mean(-1).sqrt().min().item()
               for x, w in zip(inputs[:2], inputs[2:]) if x.numel()]
    for i, error, bound in compare(op, inputs, terms=terms, scale=max(cancels, default=0.0)):
        assert error <= bound, f"result {i}: {error:.2e}, {error / bound:.2f} times the bound"


def results(op, inputs, upstream=None, name="triton"):
    """[outputs..., gradients...]"""
    with backend.using(name):
        y = op(*inputs)
        upstream = upstream or [normal(*o.shape, seed=7 + i).detach().to(o.dtype) for i, o in enumerate(y)]
        return [*y, *torch.autograd.grad(y, inputs, upstream)]


# ---- formulas, in float64

def as_complex(x, cos, sin):
    """Pair (i, i + d / 2) as a complex number, times cos + i sin."""
    half = cos.shape[-1]
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[:, :, None]
    return torch.cat([turned.real, turned.imag], -1)


def as_qwen3(x, weight, cos, sin, eps=1e-6):
    """Transformers' Qwen3: RMSNorm of each head, then x cos + rotate_half(x) sin."""
    x = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
    cos, sin = (torch.cat([a, a], -1).unsqueeze(2) for a in (cos, sin))
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


@pytest.mark.parametrize("name", ["triton", "reference"])
@pytest.mark.parametrize("norm", [False, True], ids=["rope", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_the_formula(name, norm, dtype):
    op, inputs = setting((2, 6, 8, 2, 32), dtype, norm=norm, amplitude=1.3)
    found = results(op, inputs, name=name)
    cos, sin = (a.double() for a in angles_of(2, 6, 16, 1.3))
    q, k, *weights = wide = [x.detach().double().requires_grad_() for x in inputs]
    true = ([as_qwen3(x, w, cos, sin) for x, w in zip((q, k), weights)] if norm
            else [as_complex(x, cos, sin) for x in (q, k)])
    upstream = [normal(*y.shape, seed=7 + i).detach().to(dtype).double() for i, y in enumerate(true)]
    for a, b in zip(found, [*true, *torch.autograd.grad(true, wide, upstream)]):
        spacing = torch.finfo(dtype).eps * (2 if norm and name == "reference" else 1)      # rounds between the two
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= spacing * b.abs().max() + 2e-6 * b.abs().max()


def test_references_gradients_against_finite_differences():
    cos, sin = (a.cpu().double() for a in angles_of(1, 3, 3))
    q, k, wq, wk = (normal(*s, seed=i).detach().cpu().double().requires_grad_()
                    for i, s in enumerate([(2, 3, 2, 6), (2, 3, 1, 6), (6,), (6,)]))
    assert gradcheck(lambda q, k: rope(q, k, cos, sin), (q, k))
    assert gradcheck(lambda q, k, wq, wk: qk_norm_rope(q, k, wq, wk, cos, sin, 1e-3), (q, k, wq, wk))


# ---- kernels against the reference

@pytest.mark.parametrize(("shape", "dtype"), slow_except(QUICK, product(SHAPES + EMPTY, DTYPES)))
def test_rope(shape, dtype):
    good(*setting(shape, dtype, shared=shape[1] % 2 == 1))


@pytest.mark.parametrize(("shape", "dtype"), slow_except(QUICK, product(SHAPES + EMPTY, DTYPES)))
def test_qk_norm_rope(shape, dtype):
    good(*setting(shape, dtype, shared=shape[1] % 2 == 0, norm=True), terms=max(shape[0] * shape[1] * shape[2], 1))


def test_a_rotation_keeps_lengths_and_turns_back():
    cos, sin = angles_of(2, 5, 8)
    q, k = normal(2, 5, 4, 16), normal(2, 5, 1, 16, seed=1)
    with backend.using("triton"):
        turned, other = rope(q, k, cos, sin)
        back, _ = rope(turned, other, cos, -sin)
        assert torch.allclose(turned.norm(dim=-1), q.norm(dim=-1), atol=1e-5)
        assert torch.allclose(back, q, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True], ids=["rope", "norm"])
def test_strides_do_not_matter_and_nothing_is_written_to(norm):
    B, T, H, K, d = 2, 7, 4, 2, 16
    packed = normal(B, T, (H + 2 * K) * d)
    heads = packed.view(B, T, H + 2 * K, d)
    cases = {"parts of a packed projection": (heads[:, :, :H], heads[:, :, H:H + K]),
             "heads before tokens": (normal(B, H, T, d).transpose(1, 2), normal(B, K, T, d).transpose(1, 2)),
             "numbers with gaps": (normal(B, T, H, 2 * d)[..., ::2], normal(B, T, d, K).transpose(2, 3)),
             "expanded": (normal(1, 1, 1, d).expand(B, T, H, d), normal(B, 1, K, d).expand(B, T, K, d))}
    weights = [normal(2 * d, seed=5)[::2], normal(d, seed=6)] if norm else []
    wide_cos, wide_sin = angles_of(B, T, d)
    cos, sin = wide_cos[..., ::2], wide_sin[..., ::2]
    op = (lambda q, k, wq, wk: qk_norm_rope(q, k, wq, wk, cos, sin, 1e-6)) if norm else (
        lambda q, k: rope(q, k, cos, sin))
    upstreams = {"dense": [normal(B, T, h, d, seed=h).detach() for h in (H, K)],
                 "transposed": [normal(B, h, T, d, seed=h).detach().transpose(1, 2) for h in (H, K)],
                 "ones": [torch.ones((), device=DEVICE).expand(B, T, h, d) for h in (H, K)]}
    for (case, (q, k)), (kind, upstream) in zip([*cases.items()] * 3, [u for u in upstreams.items() for _ in cases]):
        inputs = [q, k, *weights]
        plain = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in inputs]
        before = [x.detach().clone() for x in (*inputs, *upstream)]
        found = results(op, inputs, upstream)
        expected = results(op, plain, [u.contiguous() for u in upstream])
        assert all(torch.equal(a, b) for a, b in zip(found, expected)), (case, kind)
        assert all(torch.equal(a, b.detach()) for a, b in zip(before, (*inputs, *upstream))), (case, kind)
        assert found[0].is_contiguous()


@pytest.mark.parametrize("frozen", [("wq",), ("wq", "wk"), ("q", "k", "wk"), ("k",)], ids=str)
def test_only_some_gradients_are_wanted(frozen):
    op, inputs = setting((2, 5, 4, 2, 16), norm=True)
    expected = results(op, inputs)
    names = ["q", "k", "wq", "wk"]
    some = [x.detach().requires_grad_(n not in frozen) for n, x in zip(names, inputs)]
    with backend.using("triton"):
        y = op(*some)
        upstream = [normal(*o.shape, seed=7 + i).detach() for i, o in enumerate(y)]
        torch.autograd.backward(y, upstream)
    for n, x, g in zip(names, some, expected[2:]):
        assert (x.grad is None) if n in frozen else torch.equal(x.grad, g)


@pytest.mark.parametrize("norm", [False, True], ids=["rope", "norm"])
def test_two_runs_agree_bitwise(norm):
    op, inputs = setting((2, 60, 4, 2, 64), torch.bfloat16, norm=norm)
    assert all(torch.equal(a, b) for a, b in zip(results(op, inputs), results(op, inputs)))


@pytest.mark.parametrize("norm", [False, True], ids=["rope", "norm"])
def test_compiled_checkpointed_and_under_autocast(norm):
    op, inputs = setting((2, 5, 4, 2, 16), norm=norm)
    layer = normal(16, 16, seed=9)

    def plain(q, k, *weights):
        q, k = op(q @ layer, k @ layer, *weights)
        return (q * q).sum() + (k * k * k).sum()

    def gradients(function):
        value = function(*inputs)
        return [value.detach(), *torch.autograd.grad(value, [*inputs, layer])]
    with backend.using("triton"):
        expected = gradients(plain)
        compiled = gradients(torch.compile(plain, fullgraph=True, backend="aot_eager"))
        recomputed = gradients(lambda *x: checkpoint(plain, *x, use_reentrant=False))
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(expected, compiled))
        assert all(torch.equal(a, b) for a, b in zip(expected, recomputed))
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            mixed = op(inputs[0] @ layer, inputs[1] @ layer, *inputs[2:])          # bf16, the weights fp32
        assert all(y.dtype == torch.bfloat16 for y in mixed)
        found = torch.autograd.grad(mixed, inputs, [torch.ones_like(y) for y in mixed])
        assert all(g.dtype == torch.float32 for g in found)


@pytest.mark.parametrize(("change", "words"), [
    ({"k": (2, 5, 1, 8)}, "only how many heads"), ({"k": (2, 4, 1, 6)}, "only how many heads"),
    ({"cos": (3, 5, 3)}, r"\[1 or 2, 5, 3\]"), ({"cos": (2, 4, 3), "sin": (2, 4, 3)}, "both must be"),
    ({"cos": (1, 5, 4), "sin": (1, 5, 4)}, "both must be"),
    ({"cos": (1, 5, 2), "sin": (1, 5, 2)}, "both must be"), ({"wq": (5,)}, r"both must be \[6\]")], ids=str)
def test_what_does_not_fit_is_named(change, words):
    shapes = {"q": (2, 5, 2, 6), "k": (2, 5, 1, 6), "wq": (6,), "wk": (6,), "cos": (1, 5, 3), "sin": (1, 5, 3)}
    x = {n: torch.zeros(s) for n, s in (shapes | change).items()}
    with pytest.raises(ValueError, match=words):
        qk_norm_rope(*x.values(), 1e-6)
    if "wq" not in change:
        with pytest.raises(ValueError, match=words):
            rope(x["q"], x["k"], x["cos"], x["sin"])


def test_dtypes_of_q_and_k_must_agree():
    with pytest.raises(ValueError, match="bfloat16"):
        rope(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2).bfloat16(), torch.ones(1, 1, 1), torch.ones(1, 1, 1))


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's overflow check")
def test_offsets_do_not_overflow(monkeypatch, tmp_path):
    """Tokens 2^28 numbers apart, all masked off; the same file with 32-bit offsets fails here."""
    from triton.runtime import interpreter
    from triton.runtime.errors import InterpreterError
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
    path = Path(__file__).parents[2] / "kernels/rope.py"
    narrow = tmp_path / "narrow.py"
    narrow.write_text(path.read_text().replace(".to(tl.int64)", ""))
    x = torch.full((64,), 7.0)

    far, sizes = [0, 2**28, 2], {"H": 1, "KH": 1, "SIZE": 2, "HALF": 1, "RATIO": 1, "ROWS": 16, "BLOCK": 1}

    def launch(file, forward):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        y = [torch.zeros(64) for _ in range(5)]
        if forward:
            module.forward_kernel[(2,)](x, x, x, x, y[0], y[1], x, x, 0, 100, 0, *far, *far, 1e-6, NORM=True,
                                        INVERSE=False, **sizes)
        else:                                                     # one real token, or the loop has no turn
            module.backward_kernel[(2,)](x, x, x, x, x, x, y[2], y[3], y[4], x, x, 1, 100, 0, *far, *far, *far, *far,
                                         1e-6, WANT_DW=True, **sizes)
        assert not torch.cat([z[2:] for z in y[:4]]).any()
    for forward in (True, False):
        launch(path, forward)
        with pytest.raises(InterpreterError, match="int32 overflow"):
            launch(narrow, forward)
