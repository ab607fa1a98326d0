"""AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101) in place over a whole list of tensors, and their norm.

    g = grad * grad_scale              m += (1 - b1) (g - m)           v = b2 v + (1 - b2) g^2
    w -= lr decay w + lr / (1 - b1^step) m / (sqrt(v / (1 - b2^step)) + eps)

Moments: fp32, or 8 bits. Linear int8 diverges in the first steps (FlashOptim, 2026, arXiv 2602.23349), so that they are
companded, x in [-1, 1] being what is rounded over the largest of each group of 32 consecutive elements:

    m   int8  round(127 * sign(x) sqrt(|x|)), x = m / scale;  the scale is bf16, rounded up so that |x| <= 1
    v   uint8 round(255 * sqrt(x)), x = sqrt(v) / scale, never 0;  the scale is fp32

The paper has 2x / (1 + |x|) for m and x for v. Simulated over 400 steps against float64, gradients of an element's own
size that varies by a factor e within a group: the normalised mean square error of the updates is 0.010 with those
and 0.0018 with ours (beta2 = 0.999: 0.018, 0.0040), and a square is a cheaper decoder than a quotient. A code of 0 for
v would divide a momentum by eps (error 0.39, updates of 112 times the rate). v's scale is fp32 because with beta2 =
0.999 a step changes sqrt(v) by 0.05 %, less than 16 bits hold: it would never come down again.

Weights, one of three: fp32; bf16 + `ecc`, an int8 with the next 8 bits of the number: the weight is known to 2^-16;
bf16 + `sr`, rounded up or down at random so that the mean is right. Plain bf16 loses updates below 2^-9 of the weight.

The random bits are a hash of (seed, step, element), so a run that resumes, or is sharded by rows, rounds alike.

Bytes a parameter (scales are 2/32 + 4/32 = 0.1875):        kept, gradient included     moved in a step
    fp32            4 w + 4 g + 4 m + 4 v                     16                          28
    int8            4 w + 4 g + 1 m + 1 v + scales            10.19                       16.38
    int8+ecc        2 w + 1 ecc + 2 g + 1 m + 1 v + scales    7.19                        12.38
    int8+sr         2 w + 2 g + 1 m + 1 v + scales            6.19                        10.38

One launch for all tensors of the same kind and dtypes: a table on the device has a row of addresses for each tensor,
and `owner` names the tensor of each chunk of CHUNK elements. A loaded address says nothing of its alignment: the
compiler must be told (`multiple_of` on the pointer, after the cast), and a mask would make the loads narrow again:
tiles that lie wholly inside a tensor have none. Tensors that do not begin at 16 bytes get a launch of their own.
"""

import itertools
import math
import struct
from dataclasses import dataclass

import torch

from kernels.backend import Case, jit, launch, tl, triton, use_triton

GROUP = 32           # elements that share a scale
BLOCK = 1024         # elements a program holds at once
CHUNK = 8 * BLOCK    # elements a program updates, all of one tensor
SLICE = 1 << 16      # elements the reference takes at once: its intermediates stay in the cache
COLUMNS = 12         # of a row of the table: elements, first chunk, decay, 7 addresses or 0, seed, first element
TRITON_DTYPE = {} if triton is None else {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16,
                                          torch.float16: tl.float16}
KINDS = ("fp32", "fp32+ecc", "fp32+sr", "int8", "int8+ecc", "int8+sr")


# ---- state

@dataclass
class State:
    """What AdamW keeps of one tensor; tensors() are to be saved with it.

    m, v: of the parameter's shape, fp32 or int8 and uint8. m_scale (bf16), v_scale (fp32): one for each group of 32
    elements in memory order, [..., C / 32] where the last dimension C is a multiple of 32, so that they are sharded
    like the parameter, otherwise flat [ceil(numel / 32)]. ecc: int8 of the parameter's shape.
    """
    kind: str
    m: torch.Tensor
    v: torch.Tensor
    m_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    ecc: torch.Tensor | None = None
    seed: int = 0
    """of the stochastic rounding, another for each parameter"""
    first: int = 0
    """where this shard begins in the whole parameter, in elements: the same noise at any number of shards of rows"""

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, those that this kind has."""
        found = {name: getattr(self, name) for name in ("m", "v", "m_scale", "v_scale", "ecc")}
        return {name: x for name, x in found.items() if x is not None}


def init_state(param: torch.Tensor, kind: str, seed: int = 0, first: int = 0) -> State:
    """Zero state of a (local) parameter: `fp32` or `int8` for fp32 weights, `...+ecc` or `...+sr` for bf16 weights."""
    if kind not in KINDS:
        raise ValueError(f"AdamW state {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    check_dtype(param, kind)

    def zeros(shape, dtype):
        return torch.zeros(shape, dtype=dtype, device=param.device)
    eight, wide = kind.startswith("int8"), torch.promote_types(param.dtype, torch.float32)
    state = State(kind, zeros(param.shape, torch.int8 if eight else wide),
                  zeros(param.shape, torch.uint8 if eight else wide), seed=seed, first=first)
    if eight:
        whole = param.ndim > 0 and param.shape[-1] % GROUP == 0
        groups = (*param.shape[:-1], param.shape[-1] // GROUP) if whole else (-(-param.numel() // GROUP),)
        state.m_scale, state.v_scale = zeros(groups, torch.bfloat16), zeros(groups, torch.float32)
    if kind.endswith("ecc"):
        state.ecc = zeros(param.shape, torch.int8)
    return state


def check_dtype(param, kind):
    if param.dtype not in ([torch.bfloat16] if "+" in kind else [torch.float32] if kind == "int8" else
                           [torch.float32, torch.float64]):
        raise ValueError(f"AdamW state {kind!r} does not fit {param.dtype} weights: "
                         f"choose fp32 or int8 for fp32 weights, +ecc or +sr for bf16 weights")


def split(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 -> bf16 (the nearest) and the int8 that `ecc` keeps of the rest, in 256ths of the bf16's spacing."""
    bits = (weights.contiguous().view(torch.int32) + 0x80) >> 8           # sign, exponent and 15 of 23 bits, rounded
    high = (bits + 0x80) >> 8
    return high.to(torch.int16).view(torch.bfloat16), (bits - high * 256).to(torch.int8)


def join(weights: torch.Tensor, ecc: torch.Tensor) -> torch.Tensor:
    """bf16 and ecc -> fp32, the weights as the optimizer knows them."""
    return ((weights.contiguous().view(torch.int16).int() * 256 + ecc) * 256).view(torch.float32)


# ---- reference

def mix_reference(x):
    """A 32-bit hash (the constants are those of C. Wellons' lowbias32) of whole numbers in int64."""
    for factor in (0x7FEB352D, 0x846CA68B):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def noise_reference(seed: int, step: int, start: int, stop: int, device="cpu") -> torch.Tensor:
    """Elements start..stop-1 of the 32 random bits of a step, in int64."""
    key = mix_reference(mix_reference(mix_reference(seed & 0xFFFFFFFF) ^ (seed >> 32 & 0xFFFFFFFF)) ^ step)
    element = torch.arange(start, stop, device=device)
    return mix_reference(((mix_reference((element & 0xFFFFFFFF) ^ key) + key) & 0xFFFFFFFF) ^ (element >> 32))


def groups(x):
    """[n] -> [ceil(n / 32), 32], zeros at the end."""
    return torch.nn.functional.pad(x, (0, -len(x) % GROUP)).view(-1, GROUP)


def inverse(scale):
    """1 / scale, finite for a group of (nearly) nothing too, so that its codes are not 0 / 0."""
    return 1 / scale.clamp(min=1e-30)


def decode_m(code, scale):
    code = groups(code.float())
    return (code * code.abs() * (scale.float() * (1 / 127**2))[:, None]).view(-1)


def encode_m(m):
    """-> int8 codes, bf16 scales."""
    wide = groups(m)
    scale = ((wide.abs().amax(1).view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
    code = ((wide.abs() * inverse(scale.float())[:, None]).sqrt() * 127 + 0.5).to(torch.int8)
    return torch.where(wide < 0, -code, code).view(-1), scale


def decode_v(code, scale):
    code = groups(code.float())
    root = code * code * (scale * (1 / 255**2))[:, None]
    return (root * root).view(-1)


def encode_v(v):
    """-> uint8 codes, fp32 scales."""
    root = groups(v.sqrt())
    scale = root.amax(1)
    return ((root * inverse(scale)[:, None]).sqrt() * 255 + 0.5).clamp(min=1).to(torch.uint8).view(-1), scale


def reference_(param, grad, state, decay, scalars, step, grad_scale):
    """One tensor, in fp32 by the kernel's order of roundings; float64 weights in float64."""
    lr, fresh1, beta2, fresh2, rate, root2, eps = scalars
    kept = {name: x.view(-1) for name, x in state.tensors().items()}
    weights, grad = param.detach().view(-1), grad.detach().reshape(-1)
    wide = torch.promote_types(weights.dtype, torch.float32)
    lr_decay = torch.tensor(lr, dtype=wide) * torch.tensor(decay, dtype=wide)
    eight = state.kind.startswith("int8")
    for start in range(0, len(weights), SLICE):
        part = slice(start, start + SLICE)
        group = slice(start // GROUP, (start + SLICE) // GROUP)
        g = grad[part].to(wide) * grad_scale
        m, v = kept["m"][part], kept["v"][part]
        if eight:
            m, v = decode_m(m, kept["m_scale"][group])[:len(g)], decode_v(v, kept["v_scale"][group])[:len(g)]
        m += (g - m) * fresh1
        v *= beta2
        v += g * g * fresh2
        if eight:
            for name, (code, scale) in {"m": encode_m(m), "v": encode_v(v)}.items():
                kept[name][part], kept[f"{name}_scale"][group] = code[:len(g)], scale
        step_of = m * rate / (v.sqrt() * root2 + eps)
        w = weights[part]
        w = w if w.dtype == wide else join(w, kept["ecc"][part] if state.ecc is not None else 0)
        w = w - (w * lr_decay + step_of)
        if state.ecc is not None:
            weights[part], kept["ecc"][part] = split(w)
        elif state.kind.endswith("sr"):
            stop = min(start + SLICE, len(weights))
            noise = noise_reference(state.seed, step, state.first + start, state.first + stop, w.device) >> 16
            weights[part] = ((w.view(torch.int32) + noise.int()) >> 16).to(torch.int16).view(torch.bfloat16)
        else:
            weights[part] = w


def norm_reference(grads):
    norms = [torch.linalg.vector_norm(g, dtype=None if g.dtype == torch.float64 else torch.float32) for g in grads]
    return torch.linalg.vector_norm(torch.stack(norms))


# ---- Triton

@jit
def address(ROW, column: tl.constexpr, kind: tl.constexpr, ALIGN: tl.constexpr):
    return tl.multiple_of(tl.load(ROW + column).to(tl.pointer_type(kind)), ALIGN)


@jit
def mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 16)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def inverse_scale(scale):
    return 1 / tl.maximum(scale, 1e-30)


@jit
def adamw_tile(P, G, M, V, MSCALE, VSCALE, ECC, begin, n, grad_scale, lr_decay, fresh1, beta2, fresh2, rate, root2,
               eps, key, first, EIGHT: tl.constexpr, WEIGHTS: tl.constexpr, MASKED: tl.constexpr,
               ROWS: tl.constexpr):
    """The update of elements begin..begin + ROWS * 32 of one tensor."""
    group = tl.arange(0, ROWS)
    at = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    P += begin
    G += begin
    M += begin
    V += begin
    ECC += begin
    MSCALE += begin // 32
    VSCALE += begin // 32
    if MASKED:
        left = (n - begin).to(tl.int32)
        mask = at < left
        group_mask = group * 32 < left
    else:                                             # a constant, which the compiler drops
        mask = tl.full([ROWS, 32], True, tl.int1)
        group_mask = tl.full([ROWS], True, tl.int1)
    g = tl.load(G + at, mask=mask, other=0.0).to(tl.float32) * grad_scale
    if EIGHT:
        m_scale = tl.load(MSCALE + group, mask=group_mask, other=0).to(tl.int32) << 16
        v_scale = tl.load(VSCALE + group, mask=group_mask, other=0.0)
        code = tl.load(M + at, mask=mask, other=0).to(tl.float32)
        m = code * tl.abs(code) * (m_scale.to(tl.float32, bitcast=True) * (1 / 16129))[:, None]
        code = tl.load(V + at, mask=mask, other=0).to(tl.float32)
        root = code * code * (v_scale * (1 / 65025))[:, None]
        v = root * root
    else:
        m = tl.load(M + at, mask=mask, other=0.0)
        v = tl.load(V + at, mask=mask, other=0.0)
    if WEIGHTS == "fp32":
        w = tl.load(P + at, mask=mask, other=0.0)
    elif WEIGHTS == "ecc":
        bits = tl.load(P + at, mask=mask, other=0).to(tl.int32) * 256
        bits = (bits + tl.load(ECC + at, mask=mask, other=0).to(tl.int32)) * 256
        w = bits.to(tl.float32, bitcast=True)
    else:
        w = (tl.load(P + at, mask=mask, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)

    m += (g - m) * fresh1
    v *= beta2
    v += g * g * fresh2
    root = tl.sqrt(v)
    w -= w * lr_decay + m * rate / (root * root2 + eps)

    if EIGHT:
        bits = (tl.max(tl.abs(m), 1).to(tl.int32, bitcast=True) + 0xFFFF) >> 16          # bf16, rounded up
        tl.store(MSCALE + group, bits.to(tl.int16), mask=group_mask)
        x = tl.abs(m) * inverse_scale((bits << 16).to(tl.float32, bitcast=True))[:, None]
        code = (tl.sqrt(x) * 127 + 0.5).to(tl.int8)
        tl.store(M + at, tl.where(m < 0, -code, code), mask=mask)
        v_scale = tl.max(root, 1)
        tl.store(VSCALE + group, v_scale, mask=group_mask)
        x = tl.sqrt(root * inverse_scale(v_scale)[:, None])
        tl.store(V + at, tl.maximum(x * 255 + 0.5, 1.0).to(tl.uint8), mask=mask)
    else:
        tl.store(M + at, m, mask=mask)
        tl.store(V + at, v, mask=mask)
    if WEIGHTS == "fp32":
        tl.store(P + at, w, mask=mask)
    elif WEIGHTS == "ecc":
        bits = (w.to(tl.int32, bitcast=True) + 0x80) >> 8
        high = (bits + 0x80) >> 8
        tl.store(P + at, high.to(tl.int16), mask=mask)
        tl.store(ECC + at, (bits - high * 256).to(tl.int8), mask=mask)
    else:
        element = first + begin + at
        noise = mix((mix(element.to(tl.uint32) ^ key) + key) ^ (element >> 32).to(tl.uint32)) >> 16
        tl.store(P + at, ((w.to(tl.int32, bitcast=True) + noise.to(tl.int32)) >> 16).to(tl.int16), mask=mask)


@jit
def adamw_kernel(TABLE, OWNER, SCALE, lr, fresh1, beta2, fresh2, rate, root2, eps, step,
                 GRAD: tl.constexpr, EIGHT: tl.constexpr, WEIGHTS: tl.constexpr, ALIGN: tl.constexpr,
                 COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    row = TABLE + tl.load(OWNER + tl.program_id(0)) * COLUMNS
    n = tl.load(row)
    start = (tl.program_id(0) - tl.load(row + 1)) * CHUNK
    decay = tl.load(row + 2).to(tl.int32).to(tl.float32, bitcast=True)
    P = address(row, 3, tl.float32 if WEIGHTS == "fp32" else tl.int16, ALIGN)      # bf16 is moved as its bits
    G = address(row, 4, GRAD, ALIGN)
    M = address(row, 5, tl.int8 if EIGHT else tl.float32, ALIGN)
    V = address(row, 6, tl.uint8 if EIGHT else tl.float32, ALIGN)
    MSCALE = address(row, 7, tl.int16, ALIGN)
    VSCALE = address(row, 8, tl.float32, ALIGN)
    ECC = address(row, 9, tl.int8, ALIGN)
    seed = tl.load(row + 10)
    first = tl.load(row + 11)
    key = mix(mix(mix(seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32)) ^ tl.full((), step, tl.float32).to(tl.uint32))
    grad_scale = tl.load(SCALE).to(tl.float32)
    lr_decay = lr * decay
    for begin in range(start, tl.minimum(start + CHUNK, n), ROWS * 32):
        if begin + ROWS * 32 <= n:
            adamw_tile(P, G, M, V, MSCALE, VSCALE, ECC, begin, n, grad_scale, lr_decay, fresh1, beta2, fresh2, rate,
                       root2, eps, key, first, EIGHT, WEIGHTS, False, ROWS)
        else:
            adamw_tile(P, G, M, V, MSCALE, VSCALE, ECC, begin, n, grad_scale, lr_decay, fresh1, beta2, fresh2, rate,
                       root2, eps, key, first, EIGHT, WEIGHTS, True, ROWS)


@jit
def squares_kernel(TABLE, OWNER, SUMS, GRAD: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
                   BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    row = TABLE + tl.load(OWNER + tl.program_id(0)) * COLUMNS
    n = tl.load(row)
    start = (tl.program_id(0) - tl.load(row + 1)) * CHUNK
    G = address(row, 2, GRAD, ALIGN)
    total = tl.zeros([BLOCK], tl.float32)
    if start + CHUNK <= n:
        for i in tl.static_range(CHUNK // BLOCK):
            g = tl.load(G + start + i * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
            total += g * g
    else:
        for begin in range(start, n, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            g = tl.load(G + at, mask=at < n, other=0.0).to(tl.float32)
            total += g * g
    tl.store(SUMS + tl.program_id(0), tl.sum(total))


class Table:
    """The addresses of lists of tensors on the device; the caller keeps it from step to step.

    Nothing is sent while all tensors stay where they were, and nothing ever waits for the device.
    """

    def __init__(self):
        self.kept = {}

    def send(self, key, tensors, rows):
        """rows: [elements, ...] of each tensor -> the rows with the first chunk, each chunk's owner."""
        before, table, owner = self.kept.get(key, (None, None, None))
        if rows != before:
            device = tensors[0].device
            chunks = [-(-row[0] // CHUNK) for row in rows]
            if before is None or [row[0] for row in rows] != [row[0] for row in before]:
                owner = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(chunks))
                owner = to_device(owner, device)
            starts = [0, *itertools.accumulate(chunks)]
            table = torch.tensor([[row[0], start, *row[1:]] for row, start in zip(rows, starts)])
            table = to_device(table, device)
            self.kept[key] = rows, table, owner
        return table, owner


def to_device(x, device):
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def by_launch(lists, key):
    """Tuples of tensors and more, the empty ones left out, by key(tuple) and whether all addresses are wide ones."""
    found = {}
    for item in lists:
        if item[0].numel():
            wide = all(x.data_ptr() % 16 == 0 for x in item if isinstance(x, torch.Tensor))
            found.setdefault((*key(item), 16 if wide else 1), []).append(item)
    return found


def adamw_kernels_(items, scalars, step, grad_scale, table):
    """items: (param, grad, m, v, m_scale, v_scale, ecc, state, decay) of each tensor."""
    for (kind, dtype, align), chosen in by_launch(items, lambda item: (item[7].kind, item[1].dtype)).items():
        rows = [(item[0].numel(), struct.unpack("i", struct.pack("f", item[8]))[0],
                 *(0 if x is None else x.data_ptr() for x in item[:7]), item[7].seed, item[7].first)
                for item in chosen]
        addresses, owner = table.send(("adamw", kind, dtype, align), chosen[0], rows)
        weights = kind.partition("+")[2] or "fp32"
        launch(adamw_kernel, (owner.numel(),), addresses, owner, grad_scale, *scalars,
               float(step),                                        # a whole number would be compiled for its value
               GRAD=TRITON_DTYPE[dtype], EIGHT=kind.startswith("int8"), WEIGHTS=weights, ALIGN=align, COLUMNS=COLUMNS,
               ROWS=BLOCK // GROUP, CHUNK=CHUNK, num_warps=8 if weights == "fp32" else 4)
    # a launch does not tell autograd that it wrote
    torch.autograd.graph.increment_version([item[0] for item in items])


def norm_kernels(grads, table):
    found = by_launch([(g.contiguous(),) for g in grads], lambda item: (item[0].dtype,))
    sent = []
    for (dtype, align), chosen in found.items():
        rows = [(g.numel(), g.data_ptr()) for g, in chosen]
        sent.append((dtype, align, *table.send(("norm", dtype, align), chosen[0], rows)))
    sums = torch.empty(sum(owner.numel() for *_, owner in sent), dtype=torch.float32, device=grads[0].device)
    place = 0
    for dtype, align, addresses, owner in sent:
        launch(squares_kernel, (owner.numel(),), addresses, owner, sums[place:], GRAD=TRITON_DTYPE[dtype], ALIGN=align,
               COLUMNS=3, BLOCK=BLOCK, CHUNK=CHUNK, num_warps=4)
        place += owner.numel()
    return sums.sum().sqrt()


# ---- public ops

@torch.no_grad()
def adamw_(params: list, grads: list, states: list, lr: float, betas: tuple, eps: float, weight_decays, step: int,
           grad_scale=1.0, table: Table | None = None):
    """Update params and states in place; gradients stay as they are.

    params, grads: tensors on one device (local shards, not DTensors), params contiguous; states: of init_state; step
    counts from 1; weight_decays: one number or one a tensor; grad_scale: what gradients are multiplied by, a number
    or a tensor of one element on the device, for which nothing waits; table: kept by the caller, spares a copy to the
    device in each step. Whether the gradients are finite is the caller's concern.
    """
    decays = list(weight_decays) if isinstance(weight_decays, (list, tuple)) else [weight_decays] * len(params)
    if not len(params) == len(grads) == len(states) == len(decays):
        raise ValueError(f"adamw_ got {len(params)} parameters, {len(grads)} gradients, {len(states)} states and "
                         f"{len(decays)} weight decays; give one of each for every parameter")
    if step < 1:
        raise ValueError(f"adamw_'s step is {step}, but the first step is 1")
    for i, (param, grad, state) in enumerate(zip(params, grads, states)):
        check_dtype(param, state.kind)
        if not param.is_contiguous():
            raise ValueError(f"parameter {i} of shape {tuple(param.shape)} is not contiguous; adamw_ updates in place")
        if grad.dtype not in TRITON_DTYPE and use_triton(param):
            raise ValueError(f"gradient {i} is {grad.dtype}; the kernel takes fp32, bf16 and fp16")
        if grad.shape != param.shape or state.m.shape != param.shape:
            raise ValueError(f"parameter {i} is {tuple(param.shape)}, its gradient {tuple(grad.shape)}, its state "
                             f"{tuple(state.m.shape)}; they must agree")
        if len({x.device for x in (params[0], param, grad, state.m)}) > 1:
            raise ValueError(f"parameter {i} is on {param.device}, its gradient on {grad.device}, its state on "
                             f"{state.m.device}, parameter 0 on {params[0].device}; adamw_ takes one device at a time")
    if not params:
        return
    # the complements in float64 here: 1 - 0.999 in fp32 is wrong by 5e-5 of itself
    rate, root2 = lr / (1 - betas[0]**step), 1 / math.sqrt(1 - betas[1]**step)
    scalars = (lr, 1 - betas[0], betas[1], 1 - betas[1], rate, root2, eps)
    if use_triton(params[0]):
        if not isinstance(grad_scale, torch.Tensor):
            grad_scale = torch.full((1,), grad_scale, dtype=torch.float32, device=params[0].device)
        items = [(param, grad.contiguous(), s.m, s.v, s.m_scale, s.v_scale, s.ecc, s, decay)
                 for param, grad, s, decay in zip(params, grads, states, decays)]
        adamw_kernels_(items, scalars, step, grad_scale, table or Table())
    else:
        for param, grad, state, decay in zip(params, grads, states, decays):
            reference_(param, grad, state, decay, scalars, step, grad_scale)


@torch.no_grad()
def grad_norm(grads: list, table: Table | None = None) -> torch.Tensor:
    """2-norm of all gradients together: a scalar on their device, at least fp32, the same bits in every run.

    grads: tensors on one device, of any float dtypes; of local shards the squares are to be summed over the ranks.
    """
    if not grads:
        return torch.zeros(())
    if use_triton(grads[0]):
        return norm_kernels(grads, table or Table())
    return norm_reference(grads)


# ---- what is checked and measured

SETTINGS = (1e-4, (0.9, 0.95), 1e-8, 0.1)


def example(kind) -> Case:
    """Three steps from zero; the truth in float64 has exact weights and moments, whatever the kind."""
    def op(weights, grad):
        exact = weights.dtype == torch.float64
        param = weights.detach().to(weights.dtype if exact else torch.bfloat16 if "+" in kind else torch.float32)
        param = param.clone(memory_format=torch.contiguous_format)
        state = init_state(param, "fp32" if exact else kind)
        for step in (1, 2, 3):
            adamw_([param], [grad * step], [state], *SETTINGS, step, grad_scale=0.5)
        return weights + (param.to(weights.dtype) - weights).detach()

    def inputs(device, dtype, tokens):
        return torch.randn(3, 41, tokens, device=device, dtype=dtype).requires_grad_(), \
            torch.randn(3, 41, tokens, device=device, dtype=dtype)
    return Case(f"adamw {kind}", op, inputs)


def examples() -> list[Case]:
    """Small and odd, for the check."""
    return [example(kind) for kind in KINDS]


LAYER = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336), (4096,),
         (4096,)]


def layer(device, dtype):
    return [torch.randn(shape, device=device, dtype=dtype) for shape in LAYER]


def case(name, dtype, kinds, bytes_moved, own=None) -> Case:
    """kinds: of matrices and of norms."""
    table = Table()

    def op(params, grads, states):
        adamw_(params, grads, states, *SETTINGS, step=10, table=table)

    def inputs(device, _, tokens):
        params = layer(device, dtype)
        return params, layer(device, dtype), [init_state(p, kinds[p.ndim == 1]) for p in params]
    return Case(name, op, inputs, lambda tokens: (int(bytes_moved * numel()), 0), torch=own,
                bars=())


def numel() -> int:
    return sum(math.prod(shape) for shape in LAYER)


def torch_fused(params, grads, states):
    """PyTorch's own fused kernel."""
    lr, (beta1, beta2), eps, decay = SETTINGS
    steps = [torch.full((), 10.0, device=params[0].device)] * len(params)
    torch._fused_adamw_(params, grads, [s.m for s in states], [s.v for s in states], [], steps, lr=lr, beta1=beta1,
                        beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False, maximize=False)


def cases() -> list[Case]:
    """The tensors of one layer of Llama-3-8B."""
    def norm_inputs(device, dtype, tokens):
        return (layer(device, dtype),)
    return [case("adamw fp32", torch.float32, ("fp32", "fp32"), 28, torch_fused),
            case("adamw int8", torch.float32, ("int8", "fp32"), 16.375),
            case("adamw int8+ecc", torch.bfloat16, ("int8+ecc", "fp32+ecc"), 12.375),
            case("adamw int8+sr", torch.bfloat16, ("int8+sr", "fp32+sr"), 10.375),
            Case("grad_norm", grad_norm, norm_inputs, lambda tokens: (2 * numel(), 0),
                 torch=torch.nn.utils.get_total_norm, bars=())]


if __name__ == "__main__":
    from kernels.measure import main
    main("adamw")
