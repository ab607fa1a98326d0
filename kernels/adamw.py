"""AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101) in place over a whole list of tensors.

    m += fresh1 (g - m)                             fresh1 = 1 - beta1       fresh2 = 1 - beta2
    v = beta2 v + fresh2 g^2                        rate = lr / (1 - beta1^step)
    w -= lr decay w + rate m / (root2 sqrt(v) + eps)     root2 = 1 / sqrt(1 - beta2^step)

The moments m and v are fp32 or 8-bit codes. Groups of 32 consecutive elements share a scale, the largest value of the
group. Linear int8 diverges in the first steps (FlashOptim, 2026, arXiv 2602.23349), so a root gives small values more
of the codes:

    m   int8  round(127 * sign(x) sqrt(|x|)), x = m / scale;  the scale is bf16, rounded up so that |x| <= 1
    v   uint8 round(255 * sqrt(x)), x = sqrt(v) / scale, never 0;  the scale is fp32

    Example: m = 0.25 in a group whose largest is 1.0 has the code round(127 * 0.5) = 64, decoded (64 / 127)^2 = 0.254.

The paper has 2x / (1 + |x|) for m and x for v. Simulated over 400 steps against float64, with gradients whose sizes
vary by a factor e within a group, the normalised mean square error of the updates is 0.010 with the paper's codes and
0.0018 with ours (beta2 = 0.999: 0.018 and 0.0040), and a square decodes faster than a quotient. A code of 0 for v would
divide a momentum by eps (error 0.39, updates of 112 times the learning rate). v's scale is fp32 because with
beta2 = 0.999 a step changes sqrt(v) by 0.05 %, less than bf16 can hold: it would never come down again.

Weights are fp32, or bf16 + `ecc`, an int8 with the next 8 bits of the value: its relative error is then 2^-16, where
plain bf16 loses updates below 2^-9 of the weight.

Bytes per parameter (scales are 2/32 + 4/32 = 0.1875):      kept, gradient included     moved per step
    fp32            4 w + 4 g + 4 m + 4 v                     16                          28
    int8            4 w + 4 g + 1 m + 1 v + scales            10.19                       16.38
    int8+ecc        2 w + 1 ecc + 2 g + 1 m + 1 v + scales    7.19                        12.38

One launch updates all tensors of the same kind and dtypes. A table on the device has a row of addresses per tensor, and
`owner` names the tensor of each chunk of CHUNK elements. The compiler knows nothing of the alignment of an address that
was loaded, so `multiple_of` tells it; a mask would make the loads narrow again, so tiles that lie fully inside a tensor
have none. Tensors whose address is no multiple of 16 bytes get a launch of their own.
"""

import functools
import itertools
import math

import torch

from kernels.backend import jit, launch, tl, triton, use_triton

GROUP = 32           # elements that share a scale
BLOCK = 1024         # elements a program holds at once
CHUNK = 8 * BLOCK    # elements a program updates, all of one tensor
# Elements the reference updates at once, so that its intermediates stay in the CPU's cache.
SLICE = 1 << 16
# A row of the table: number of elements, first chunk, 7 addresses (0 where there is none).
COLUMNS = 9
TRITON_DTYPE = {} if triton is None else {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16,
                                          torch.float16: tl.float16}
# {kind of state: dtypes of the weights that it fits}
KINDS = {"fp32": (torch.float32, torch.float64), "int8": (torch.float32,),
         "fp32+ecc": (torch.bfloat16,), "int8+ecc": (torch.bfloat16,)}


# ---- state

def init_state(param: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """What AdamW keeps of a (local) parameter, zeros: {"m", "v"}, for int8 "m_scale", "v_scale", for +ecc "ecc".

    m, v have the parameter's shape, in fp32 (float64 for float64) or int8 and uint8; ecc has it in int8. m_scale (bf16)
    and v_scale (fp32) have an element per group of 32 elements in memory order: [..., C / 32] where the last dimension
    C is a multiple of 32, so that they are sharded like the parameter, otherwise flat [ceil(numel / 32)].
    ValueError where the kind does not fit the parameter's dtype.
    """
    check_dtype(param, kind)
    zeros, eight = functools.partial(torch.zeros, device=param.device), kind.startswith("int8")
    moments = torch.promote_types(param.dtype, torch.float32)
    state = {"m": zeros(param.shape, dtype=torch.int8 if eight else moments),
             "v": zeros(param.shape, dtype=torch.uint8 if eight else moments)}
    if eight:
        by_row = param.ndim > 0 and param.shape[-1] % GROUP == 0
        shape = (*param.shape[:-1], param.shape[-1] // GROUP) if by_row else (-(-param.numel() // GROUP),)
        state |= {"m_scale": zeros(shape, dtype=torch.bfloat16), "v_scale": zeros(shape, dtype=torch.float32)}
    if kind.endswith("ecc"):
        state["ecc"] = zeros(param.shape, dtype=torch.int8)
    return state


def kind_of(state: dict) -> str:
    return ("int8" if state["m"].dtype == torch.int8 else "fp32") + "+ecc" * ("ecc" in state)


def check_dtype(param, kind):
    if param.dtype not in KINDS.get(kind, ()):
        raise ValueError(f"AdamW state {kind!r} does not fit {param.dtype} weights: choose fp32 or int8 for fp32 "
                         "weights, fp32+ecc or int8+ecc for bf16 weights")


def split(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 weights -> the nearest bf16, and in `ecc` (int8) the rest, in 256ths of the bf16's spacing.

    1.002 = 0x3F804189 rounds to the 24 bits 0x3F8042; the nearest bf16 is 0x3F80 = 1.0, and ecc is 0x42 = 66.
    """
    # Sign, exponent and 15 of the 23 bits of the fraction, rounded.
    bits = (weights.contiguous().view(torch.int32) + 0x80) >> 8
    high = (bits + 0x80) >> 8
    return high.to(torch.int16).view(torch.bfloat16), (bits - high * 256).to(torch.int8)


def join(weights: torch.Tensor, ecc: torch.Tensor) -> torch.Tensor:
    """bf16 weights and their ecc -> fp32, the weights as the optimizer knows them."""
    return ((weights.contiguous().view(torch.int16).int() * 256 + ecc) * 256).view(torch.float32)


# ---- reference

def groups(x):
    """[n] -> [ceil(n / 32), 32], padded with zeros."""
    return torch.nn.functional.pad(x, (0, -len(x) % GROUP)).view(-1, GROUP)


def decode_m(code, scale):
    code = groups(code.float())
    return (code * code.abs() * (scale.float() * (1 / 127**2))[:, None]).view(-1)


def encode_m(m):
    """-> int8 codes [32 ceil(n / 32)], bf16 scales [ceil(n / 32)]."""
    m = groups(m)
    # The scale in bf16, rounded up (see the kernel).
    scale = ((m.abs().amax(1).view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
    # The scale of a group of zeros is 0, and 0 / 0 would be NaN.
    code = ((m.abs() * (1 / scale.float().clamp(min=1e-30))[:, None]).sqrt() * 127 + 0.5).to(torch.int8)
    return torch.where(m < 0, -code, code).view(-1), scale


def decode_v(code, scale):
    code = groups(code.float())
    root = code * code * (scale * (1 / 255**2))[:, None]
    return (root * root).view(-1)


def encode_v(v):
    """-> uint8 codes [32 ceil(n / 32)], fp32 scales [ceil(n / 32)]."""
    root = groups(v.sqrt())
    scale = root.amax(1)
    code = ((root * (1 / scale.clamp(min=1e-30))[:, None]).sqrt() * 255 + 0.5).clamp(min=1).to(torch.uint8)
    return code.view(-1), scale


def reference_(param, grad, state, scalars):
    """Update one tensor in fp32, in the kernel's order of roundings; float64 weights in float64."""
    lr, decay, fresh1, beta2, fresh2, rate, root2, eps = scalars
    weights, grad = param.detach().view(-1), grad.detach().reshape(-1)
    kept, eight = {name: x.view(-1) for name, x in state.items()}, "m_scale" in state
    compute = torch.promote_types(weights.dtype, torch.float32)
    lr_decay = torch.tensor(lr, dtype=compute) * torch.tensor(decay, dtype=compute)
    for start in range(0, len(weights), SLICE):
        part = slice(start, start + SLICE)
        group = slice(start // GROUP, (start + SLICE) // GROUP)
        g = grad[part].to(compute)
        m, v = kept["m"][part], kept["v"][part]
        if eight:
            m, v = decode_m(m, kept["m_scale"][group])[:len(g)], decode_v(v, kept["v_scale"][group])[:len(g)]
        m += (g - m) * fresh1
        v *= beta2
        v += g * g * fresh2
        if eight:
            for name, (code, scale) in {"m": encode_m(m), "v": encode_v(v)}.items():
                kept[name][part], kept[f"{name}_scale"][group] = code[:len(g)], scale
        update = m * rate / (v.sqrt() * root2 + eps)
        w = weights[part]
        if "ecc" in kept:
            w = join(w, kept["ecc"][part])
            weights[part], kept["ecc"][part] = split(w - (w * lr_decay + update))
        else:
            weights[part] = w - (w * lr_decay + update)


# ---- Triton

@jit
def address(ROW, column: tl.constexpr, kind: tl.constexpr, ALIGN: tl.constexpr):
    return tl.multiple_of(tl.load(ROW + column).to(tl.pointer_type(kind)), ALIGN)


@jit
def adamw_tile(P, G, M, V, MSCALE, VSCALE, ECC, left, lr_decay, fresh1, beta2, fresh2, rate, root2, eps,
               EIGHT: tl.constexpr, WITH_ECC: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr):
    """Update ROWS groups of 32 elements, or the `left` elements up to the tensor's end. The pointers stand at the first
    of them: P, G, M, V, ECC at an element, MSCALE, VSCALE at a group."""
    group = tl.arange(0, ROWS)
    at = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    if MASKED:
        left = left.to(tl.int32)
        mask = at < left
        group_mask = group * 32 < left
    else:
        # A constant, which the compiler drops.
        mask = tl.full([ROWS, 32], True, tl.int1)
        group_mask = tl.full([ROWS], True, tl.int1)
    g = tl.load(G + at, mask=mask, other=0.0).to(tl.float32)
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
    if WITH_ECC:
        bits = tl.load(P + at, mask=mask, other=0).to(tl.int32) * 256
        bits = (bits + tl.load(ECC + at, mask=mask, other=0).to(tl.int32)) * 256
        w = bits.to(tl.float32, bitcast=True)
    else:
        w = tl.load(P + at, mask=mask, other=0.0)

    m += (g - m) * fresh1
    v *= beta2
    v += g * g * fresh2
    root = tl.sqrt(v)
    w -= w * lr_decay + m * rate / (root * root2 + eps)

    if EIGHT:
        # Adding 0xFFFF before the low bits are cut off rounds the bf16 up.
        bits = (tl.max(tl.abs(m), 1).to(tl.int32, bitcast=True) + 0xFFFF) >> 16
        tl.store(MSCALE + group, bits.to(tl.int16), mask=group_mask)
        m_scale = (bits << 16).to(tl.float32, bitcast=True)
        x = tl.abs(m) * (1 / tl.maximum(m_scale, 1e-30))[:, None]
        code = (tl.sqrt(x) * 127 + 0.5).to(tl.int8)
        tl.store(M + at, tl.where(m < 0, -code, code), mask=mask)
        v_scale = tl.max(root, 1)
        tl.store(VSCALE + group, v_scale, mask=group_mask)
        x = tl.sqrt(root * (1 / tl.maximum(v_scale, 1e-30))[:, None])
        tl.store(V + at, tl.maximum(x * 255 + 0.5, 1.0).to(tl.uint8), mask=mask)
    else:
        tl.store(M + at, m, mask=mask)
        tl.store(V + at, v, mask=mask)
    if WITH_ECC:
        bits = (w.to(tl.int32, bitcast=True) + 0x80) >> 8
        high = (bits + 0x80) >> 8
        tl.store(P + at, high.to(tl.int16), mask=mask)
        tl.store(ECC + at, (bits - high * 256).to(tl.int8), mask=mask)
    else:
        tl.store(P + at, w, mask=mask)


@jit
def adamw_kernel(TABLE, OWNER, lr, decay, fresh1, beta2, fresh2, rate, root2, eps, GRAD: tl.constexpr,
                 EIGHT: tl.constexpr, WITH_ECC: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
                 ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """TABLE [tensors, COLUMNS] int64, OWNER [chunks] int32; a program updates a chunk."""
    row = TABLE + tl.load(OWNER + tl.program_id(0)) * COLUMNS
    n = tl.load(row)
    start = (tl.program_id(0) - tl.load(row + 1)) * CHUNK
    P = address(row, 2, tl.int16 if WITH_ECC else tl.float32, ALIGN)      # bf16 is moved as its bits
    G = address(row, 3, GRAD, ALIGN)
    M = address(row, 4, tl.int8 if EIGHT else tl.float32, ALIGN)
    V = address(row, 5, tl.uint8 if EIGHT else tl.float32, ALIGN)
    MSCALE = address(row, 6, tl.int16, ALIGN)
    VSCALE = address(row, 7, tl.float32, ALIGN)
    ECC = address(row, 8, tl.int8, ALIGN)
    lr_decay = lr * decay
    for begin in range(start, tl.minimum(start + CHUNK, n), ROWS * 32):
        group = begin // 32
        if begin + ROWS * 32 <= n:
            adamw_tile(P + begin, G + begin, M + begin, V + begin, MSCALE + group, VSCALE + group, ECC + begin,
                       n - begin, lr_decay, fresh1, beta2, fresh2, rate, root2, eps, EIGHT, WITH_ECC, False, ROWS)
        else:
            adamw_tile(P + begin, G + begin, M + begin, V + begin, MSCALE + group, VSCALE + group, ECC + begin,
                       n - begin, lr_decay, fresh1, beta2, fresh2, rate, root2, eps, EIGHT, WITH_ECC, True, ROWS)


def send_table(kept: dict, key, rows: list, device):
    """rows: (elements, ...) of each tensor -> the table with each tensor's first chunk, and each chunk's owner.

    Tensors of 8192, 100 and 9000 elements have 1, 1 and 2 chunks: first chunks 0, 1, 2 and owners 0, 1, 2, 2.
    Nothing is sent while the rows are those in kept[key], and nothing ever waits for the device.
    """
    before, table, owner = kept.get(key, ([], None, None))
    if rows != before:
        chunks = [-(-row[0] // CHUNK) for row in rows]
        if [row[0] for row in rows] != [row[0] for row in before]:
            owner = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(chunks))
            owner = to_device(owner, device)
        first_chunks = [0, *itertools.accumulate(chunks)]
        table = torch.tensor([[row[0], first, *row[1:]] for row, first in zip(rows, first_chunks)])
        table = to_device(table, device)
        kept[key] = rows, table, owner
    return table, owner


def to_device(x, device):
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def launch_updates_(params, grads, states, scalars, kept):
    """A launch per kind, gradient's dtype and alignment; empty tensors have none. grads are contiguous."""
    launches = {}
    for param, grad, state in zip(params, grads, states):
        if param.numel():
            tensors = (param, grad, *(state.get(name) for name in ("m", "v", "m_scale", "v_scale", "ecc")))
            addresses = [0 if x is None else x.data_ptr() for x in tensors]
            align = 1 if any(address % 16 for address in addresses) else 16
            launches.setdefault((kind_of(state), grad.dtype, align), []).append((param.numel(), *addresses))
    for (kind, dtype, align), rows in launches.items():
        table, owner = send_table(kept, (kind, dtype, align), rows, params[0].device)
        with_ecc = kind.endswith("ecc")
        launch(adamw_kernel, (owner.numel(),), table, owner, *scalars, GRAD=TRITON_DTYPE[dtype],
               EIGHT=kind.startswith("int8"), WITH_ECC=with_ecc, ALIGN=align, COLUMNS=COLUMNS, ROWS=BLOCK // GROUP,
               CHUNK=CHUNK, num_warps=4 if with_ecc else 8)
    # A launch does not tell autograd that it wrote.
    torch.autograd.graph.increment_version(params)


# ---- public op

@torch.no_grad()
def adamw_(params: list, grads: list, states: list, lr: float, betas: tuple, eps: float, decay: float,
           step: int, table: dict | None = None):
    """Update params and states in place; gradients stay as they are.

    params, grads: tensors on one device (local shards, not DTensors), params contiguous; gradients fp32, bf16 or fp16.
    states: of init_state. step: counts from 1. table: an empty dict at first; a caller that gives it to every step
    spares the copy of the addresses to the device. Whether the gradients are finite is for the caller to check.
    ValueError where the lists, shapes or dtypes do not fit.
    """
    if not len(params) == len(grads) == len(states):
        raise ValueError(f"adamw_ got {len(params)} parameters, {len(grads)} gradients and {len(states)} states; give "
                         "one of each for every parameter")
    if step < 1:
        raise ValueError(f"adamw_'s step is {step}, but the first step is 1")
    for i, (param, grad, state) in enumerate(zip(params, grads, states)):
        check_dtype(param, kind_of(state))
        if not param.is_contiguous():
            raise ValueError(f"parameter {i} of shape {tuple(param.shape)} is not contiguous; adamw_ updates in place")
        if grad.dtype not in TRITON_DTYPE and use_triton(param):
            raise ValueError(f"gradient {i} is {grad.dtype}; the kernel takes fp32, bf16 and fp16")
        if grad.shape != param.shape or state["m"].shape != param.shape:
            raise ValueError(f"parameter {i} is {tuple(param.shape)}, its gradient {tuple(grad.shape)}, its state "
                             f"{tuple(state['m'].shape)}; they must agree")
    if not params:
        return
    # The complements are taken in float64 here: 1 - 0.999 in fp32 has a relative error of 5e-5.
    rate, root2 = lr / (1 - betas[0]**step), 1 / math.sqrt(1 - betas[1]**step)
    scalars = (lr, decay, 1 - betas[0], betas[1], 1 - betas[1], rate, root2, eps)
    if use_triton(params[0]):
        grads = [grad.contiguous() for grad in grads]
        launch_updates_(params, grads, states, scalars, {} if table is None else table)
    else:
        for param, grad, state in zip(params, grads, states):
            reference_(param, grad, state, scalars)
