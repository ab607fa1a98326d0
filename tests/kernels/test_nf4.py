"""NF4 against bitsandbytes, bit by bit, where it is installed, and always against formulas written out here.

The formulas take the levels from the normal distribution's quantiles and search the nearest in float64. What must be
equal is compared bitwise; only numbers so near the middle of two levels that fp32 cannot tell are let off.
"""

import dataclasses
import functools
import importlib.util
import json
import sys
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from quick import slow_except

from kernels import backend, nf4
from kernels.nf4 import BLOCK, BLOCK2, NF4, dequantise, quantise

pytestmark = pytest.mark.kernel
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(64, 64), (1, 64), (1, 1), (3, 43), (5, 26), (130, 257), (2, 3, 50), (0, 8), (300, 64)]
BACKENDS = ["reference", "triton"]


def weight(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def fields(record):
    return [getattr(record, field.name) for field in dataclasses.fields(record)]


def same(a: NF4, b: NF4):
    for field, x, y in zip(dataclasses.fields(a), fields(a), fields(b)):
        assert (torch.equal(x, y) and x.dtype == y.dtype) if isinstance(x, torch.Tensor) else x == y, field.name


# ---- the formulas

def quantile_levels():
    """Eight quantiles of the normal distribution's right half, seven of its left one and 0, between -1 and 1.

    The outermost probability is the mean of 1 - 1/32 and 1 - 1/30: as in QLoRA's appendix.
    """
    quantile, outer = NormalDist().inv_cdf, 0.9677083
    right = [quantile(outer + (0.5 - outer) * i / 8) for i in range(8)]
    left = [-quantile(outer + (0.5 - outer) * i / 7) for i in range(7)]
    levels = torch.tensor(sorted([*right, 0.0, *left]), dtype=torch.float64)
    return levels / levels.max()


def nearest(x, levels):
    """-> index of the nearest of the sorted levels, float64; and how much nearer it is than the second nearest."""
    distances = (x[..., None].double() - levels.double()).abs()
    two = distances.topk(2, largest=False)
    return two.indices[..., 0], two.values[..., 1] - two.values[..., 0]


def unpack(packed, N):
    return torch.stack([packed >> 4, packed & 15], 1).flatten()[:N].long()


def padded(x, n):
    return torch.nn.functional.pad(x.flatten().double(), (0, -x.numel() % n)).view(-1, n)


def expected(record):
    """The weight of a record in float64."""
    absmax, N = record.absmax, record.shape.numel()
    if record.absmax2 is not None:
        absmax = padded(record.code2.double()[absmax.long()], BLOCK2) * record.absmax2[:, None] + record.offset.double()
    levels = record.code.double()[unpack(record.packed, N)]
    return (padded(levels, BLOCK) * absmax.flatten()[:-(-N // BLOCK), None].double()).flatten()[:N].view(record.shape)


# ---- levels

def test_levels_are_the_quantiles():
    assert (torch.tensor(nf4.LEVELS, dtype=torch.float64) - quantile_levels()).abs().max() < 2e-7
    assert nf4.LEVELS[7] == 0
    assert (nf4.LEVELS[0], nf4.LEVELS[15]) == (-1, 1)


def test_dynamic_levels_by_hand():
    """Between the powers of ten 2^i numbers: 0.55e-6; 3.25e-6 and 7.75e-6; ...; 0.1 + 0.9 (j + 1/2) / 64."""
    levels = nf4.dynamic_levels()
    assert levels.shape == (256,)
    assert (levels.diff() > 0).all()
    positive = levels[levels > 0].tolist()
    assert len(positive) == 128
    by_hand = [10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / 2**i) for i in range(7) for j in range(2**i)] + [1.0]
    assert positive == pytest.approx(by_hand, rel=3e-7)
    assert (-levels[levels < 0]).flip(0).tolist() == positive[:-1]


# ---- against the formulas

@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", slow_except([(3, 43), (130, 257), (0, 8)], SHAPES, 1))
@pytest.mark.parametrize("kernel", BACKENDS)
def test_quantise_takes_the_nearest_level(kernel, shape, double_quant):
    w = weight(*shape, dtype=torch.bfloat16 if kernel == "reference" else torch.float16)
    with backend.using(kernel):
        record = quantise(w, double_quant)
    blocks, levels = padded(w, BLOCK), quantile_levels().to(DEVICE)
    absmax = blocks.abs().amax(1) if w.numel() else blocks.new_zeros(0)
    index, lead = nearest(blocks / absmax.clamp(min=1e-30)[:, None], levels)
    codes = unpack(record.packed, w.numel())
    wrong = codes != index.flatten()[:w.numel()]
    assert (lead.flatten()[:w.numel()][wrong] < 1e-6).all()
    assert record.packed.shape == ((w.numel() + 1) // 2,)
    assert (record.shape, record.dtype) == (w.shape, w.dtype)
    if not double_quant:
        assert record.absmax.dtype == torch.float32
        assert torch.equal(record.absmax.double(), absmax)
        assert record.offset is None
        return
    assert record.absmax.dtype == torch.uint8
    assert record.absmax.shape == absmax.shape
    assert record.absmax2.shape == (-(-len(absmax) // BLOCK2),)
    if len(absmax):
        assert record.offset.item() == pytest.approx(absmax.mean().item(), rel=1e-6)
        centred = padded(absmax.float() - record.offset, BLOCK2)
        largest = centred.abs().amax(1)
        assert torch.equal(record.absmax2.double(), largest)
        index, lead = nearest(centred / largest.clamp(min=1e-30)[:, None], record.code2)
        wrong = record.absmax != index.flatten()[:len(absmax)]
        assert (lead.flatten()[:len(absmax)][wrong] < 1e-6).all()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", slow_except([(3, 43), (130, 257), (0, 8)], SHAPES, 1))
@pytest.mark.parametrize("kernel", BACKENDS)
def test_dequantise(kernel, shape, double_quant):
    w = weight(*shape)
    record = quantise(w, double_quant)
    truth = expected(record)
    with backend.using(kernel):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            got = dequantise(record, dtype)
            assert (got.dtype, got.shape) == (dtype, w.shape)
            # roundings of level * a, of a's product and its sum; the interpreter truncates bf16
            bound = 2.0**-22 * 4 + (2.0**-24 if dtype == torch.float64 else torch.finfo(dtype).eps) * truth.abs()
            assert ((got.double() - truth).abs() <= bound).all()
    if w.numel():
        assert (truth - w).abs().max() < 0.3 * w.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
def test_kernel_and_reference_agree_bitwise(dtype, double_quant):
    for shape in SHAPES:
        w = weight(*shape, seed=3).mul_(0.02).to(torch.float16 if DEVICE == "cpu" else dtype)
        records, numbers = [], []
        for kernel in BACKENDS:
            with backend.using(kernel):
                records.append(quantise(w, double_quant))
                numbers.append(dequantise(records[0], dtype))
        same(*records)
        if dtype == torch.bfloat16 and DEVICE == "cpu":       # the interpreter truncates
            assert ((numbers[0].float() - numbers[1].float()).abs() <= 2.0**-7 * numbers[0].float().abs()).all()
        else:
            assert torch.equal(*numbers)


@pytest.mark.parametrize("kernel", BACKENDS)
def test_round_trip_of_what_is_on_the_levels(kernel):
    """Levels times an absmax come back as they are."""
    code = torch.tensor(nf4.LEVELS, device=DEVICE)
    w = code.repeat(8).view(2, 64) * torch.tensor([[3.0], [0.5]], device=DEVICE)
    with backend.using(kernel):
        record = quantise(w, double_quant=False)
        assert torch.equal(dequantise(record, torch.float32), w)
    assert record.packed[:8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]      # the first is high


@pytest.mark.parametrize("kernel", BACKENDS)
def test_the_very_middle_belongs_to_the_lower_level(kernel):
    middles = nf4.middles(torch.tensor(nf4.LEVELS))
    w = torch.cat([middles, middles.nextafter(torch.ones(15)), torch.ones(34)]).to(DEVICE)
    with backend.using(kernel):
        codes = unpack(quantise(w, double_quant=False).packed, 64)
    assert codes.tolist() == [*range(15), *range(1, 16), *[15] * 34]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kernel", BACKENDS)
def test_blocks_of_zeros_stay_zero(kernel, double_quant):
    w = weight(4, 100)
    w.view(-1)[64:128] = 0
    w.view(-1)[384:] = 0
    with backend.using(kernel):
        back = dequantise(quantise(w, double_quant), torch.float32)
        assert back.isfinite().all()
        assert (back[w == 0] == 0).all()
        assert (dequantise(quantise(torch.zeros(7, 9, device=DEVICE), double_quant)) == 0).all()
        tiny = torch.full((64,), 1e-42, device=DEVICE)                                     # 1 / absmax overflows
        assert dequantise(quantise(tiny, double_quant), torch.float32).isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value")          # numpy's about inf * 0 in the interpreter
@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(kernel, bad):
    w = weight(3, 50)
    w[2, 49] = bad
    with backend.using(kernel), pytest.raises(ValueError, match="NaN or infinite"):
        quantise(w)


def test_users_mistakes():
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        quantise(weight(2, 64).double())


@pytest.mark.parametrize("kernel", BACKENDS)
def test_strided_weights_and_gradients_and_nothing_written_beside_the_output(kernel, monkeypatch):
    w = weight(64, 49, seed=5)
    kept = w.clone()
    with backend.using(kernel):
        same(quantise(w.T), quantise(w.T.contiguous()))
        same(quantise(w[:1].expand(4, 49)), quantise(w[:1].repeat(4, 1)))
        record = quantise(torch.nn.Parameter(w))
        before = [x.clone() for x in fields(record)[:6]]
        out = dequantise(record, torch.float32)
        guard = torch.full((64 * 49 + 32,), 7.0, device=DEVICE)
        monkeypatch.setattr(torch, "empty", lambda *shape, **options: guard[16:-16])
        assert torch.equal(dequantise(record, torch.float32), out)
        assert (guard[:16] == 7).all()
        assert (guard[-16:] == 7).all()
    assert not out.requires_grad
    assert torch.equal(w, kept)
    assert all(torch.equal(x, y) for x, y in zip(before, fields(record)))


@pytest.mark.parametrize("kernel", BACKENDS)
def test_a_chunk_of_the_reference_and_the_second_absmax2(kernel, monkeypatch):
    """Sizes around a chunk's end and a second block of absmaxes: 257 blocks and a bit."""
    monkeypatch.setattr(nf4, "CHUNK", 128)
    w = weight(257 * BLOCK + 5, seed=7)
    with backend.using(kernel):
        record = quantise(w)
        back = dequantise(record, torch.float32)
    assert record.absmax2.shape == (2,)
    assert ((back.double() - expected(record)).abs() < 1e-6).all()


@pytest.mark.parametrize("kernel", BACKENDS)
def test_dequantise_under_compile(kernel):
    record = quantise(weight(3, 50))
    x = weight(3, 50, dtype=torch.float16)

    def function(x):
        return x * dequantise(record, torch.float16)
    with backend.using(kernel):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), function(x))


# ---- more than 2^31 numbers

def run_far(kernel, program, *args, **constants):
    """One program of the kernel with a program number far beyond the inputs, so that every access is masked off."""
    from triton.runtime import interpreter
    builder = interpreter.interpreter_builder
    options, place = builder.options, builder.set_grid_idx
    builder.options = dataclasses.replace(options, debug=True)
    builder.set_grid_idx = lambda x, y, z: setattr(builder, "grid_idx", (program, 0, 0))
    try:
        kernel[(1,)](*args, **constants)
    finally:
        builder.options, builder.set_grid_idx = options, place


def with_int32(tmp_path):
    """kernels/nf4.py without its 64-bit indices."""
    source = Path(nf4.__file__).read_text().replace(".to(tl.int64)", "").replace("@op\n", "")
    (tmp_path / "narrow.py").write_text(source)
    spec = importlib.util.spec_from_file_location("narrow", tmp_path / "narrow.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["narrow"] = module                # dataclasses look their module up
    spec.loader.exec_module(module)
    del sys.modules["narrow"]
    return module


@pytest.mark.skipif(DEVICE == "cuda", reason="the overflow check is the interpreter's")
@pytest.mark.parametrize("name", ["quantise", "dequantise"])
def test_more_than_two_to_the_31_numbers(name, tmp_path):
    record = quantise(weight(2, 64))
    far = 2**31 // 64                             # times 32 or 64 rows of 64
    out, absmax, bounds = torch.zeros(128), torch.zeros(2), torch.zeros(15)

    def gate(module):
        if name == "dequantise":
            run_far(module.dequantise_kernel, far, record.packed, record.absmax, record.code, record.absmax2,
                    record.code2, record.offset, out, 128, 64, NESTED=True, ROWS=64, BLOCK=64, BLOCK2=256)
        else:
            run_far(module.quantise_kernel, far, out, bounds, record.packed, absmax, 128, 64, SMALLEST=nf4.SMALLEST,
                    ROWS=32, BLOCK=64)
    kept = record.packed.clone()
    gate(nf4)
    assert (out == 0).all()
    assert torch.equal(record.packed, kept)
    with pytest.raises(Exception, match="int32 overflow"):
        gate(with_int32(tmp_path))


# ---- bitsandbytes

@functools.cache
def bitsandbytes():
    try:
        import bitsandbytes.functional
    except Exception as error:                    # it looks for devices and libraries when it is imported
        return error
    return bitsandbytes.functional


@pytest.fixture
def bnb():
    if isinstance(bitsandbytes(), Exception):
        pytest.skip(f"bitsandbytes is not installed here: {bitsandbytes()}")
    return bitsandbytes()


def as_record(packed, state, shape, dtype):
    """bitsandbytes' own tensors as a record of ours."""
    nested = state.state2
    return NF4(packed.view(-1), state.absmax, state.code, nested.absmax if nested else None,
               nested.code if nested else None, state.offset if nested else None, torch.Size(shape), dtype)


def real_weights(data_dir):
    from safetensors.torch import load_file
    return [w for w in load_file(data_dir / "models" / "stories260K" / "model.safetensors").values() if w.ndim == 2]


def check_codes(record, theirs, centred):
    """Of the absmaxes. bitsandbytes' CPU library looks them up in a coarse table: sometimes the second nearest.

    Its way for dtypes it has no library for is exact: it differs only where two levels are equally near in fp32.
    """
    off = (record.absmax.int() - theirs.int()).abs()
    assert off.max() <= 1
    assert off.sum() <= 2 + 0.01 * len(off)
    exact, _ = torch.ops.bitsandbytes.quantize_blockwise(centred.double(), record.code2, BLOCK2)
    x = (padded(centred, BLOCK2) / record.absmax2[:, None]).flatten()[:len(exact)]
    tied = (x - record.code2[exact.long()]).abs() - (x - record.code2[record.absmax.long()]).abs()
    assert (tied.abs() < 2.0**-23).all()
    assert (exact != record.absmax).sum() <= 2 + 0.001 * len(exact)


def check_against(bnb, w, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    for double_quant in (False, True):
        packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=double_quant)
        with backend.using("reference"):
            record = quantise(w, double_quant)
        assert torch.equal(record.packed, packed.view(-1))
        assert torch.equal(record.code, state.code)
        if double_quant:
            plain = quantise(w, False).absmax
            assert torch.equal(record.code2, state.state2.code)
            assert torch.equal(record.offset, state.offset)
            assert torch.equal(record.absmax2, state.state2.absmax)
            if record.absmax2.all():              # of 0 / 0 any code is right
                check_codes(record, state.absmax, plain - state.offset)
        else:
            assert torch.equal(record.absmax, state.absmax)
        for theirs in (record, as_record(packed, state, w.shape, w.dtype)):
            nested = bnb.QuantState(theirs.absmax2, code=theirs.code2, blocksize=256, dtype=torch.float32)
            # as one row: its CPU library counts the blocks of short rows from the row's start
            state = bnb.QuantState(theirs.absmax, (1, w.numel()), theirs.code, 64, "nf4", None, theirs.offset,
                                   nested if double_quant else None)
            for dtype in dtypes:
                state.dtype = dtype
                with backend.using("reference"):
                    assert torch.equal(dequantise(theirs, dtype), bnb.dequantize_4bit(packed, state).view(w.shape))


@pytest.mark.skipif(DEVICE == "cuda", reason="its CPU library is the truth here")
@pytest.mark.parametrize("shape", [(256, 300), (64, 64), (4096, 72), (2, 32), (128, 130)], ids=str)
def test_bits_are_those_of_bitsandbytes(bnb, shape):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_against(bnb, weight(*shape, seed=11, dtype=dtype))


@pytest.mark.skipif(DEVICE == "cuda", reason="its CPU library is the truth here")
def test_bits_of_real_weights_are_those_of_bitsandbytes(bnb, data_dir):
    for w in real_weights(data_dir):
        check_against(bnb, w)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs bitsandbytes' CUDA kernels")
def test_bits_on_the_gpu_are_those_of_bitsandbytes(bnb):
    w = weight(512, 4096, seed=13, dtype=torch.bfloat16)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    assert torch.equal(quantise(w).packed, packed.view(-1))
    for dtype in (torch.float32, torch.bfloat16):
        state.dtype = dtype
        assert torch.equal(dequantise(as_record(packed, state, w.shape, w.dtype), dtype),
                           bnb.dequantize_4bit(packed, state))


def test_state_dict_of_bitsandbytes_reads_into_a_record(bnb):
    """The names in NF4's docstring are what it writes."""
    w = weight(8, 128, dtype=torch.bfloat16)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    written = state.as_dict(packed=True)
    about = json.loads(bytes(written["quant_state.bitsandbytes__nf4"].tolist()))
    assert set(written) == {"absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"}
    assert (about["quant_type"], about["blocksize"], about["nested_blocksize"]) == ("nf4", 64, 256)
    record = NF4(packed.view(-1), written["absmax"], written["quant_map"], written["nested_absmax"],
                 written["nested_quant_map"], torch.tensor(about["nested_offset"], device=DEVICE),
                 torch.Size(about["shape"]), getattr(torch, about["dtype"]))
    assert torch.equal(dequantise(record, torch.float32).bfloat16(), bnb.dequantize_4bit(packed, state))
