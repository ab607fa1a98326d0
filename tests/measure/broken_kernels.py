"""Kernels with one fault each that the static check must find; test_kernel_cases.py compiles them in a process of its
own and prints {name: {architecture: faults}}, for the architectures that its arguments name."""

import json
import sys

import torch

from kernels.backend import jit, launch, tl, using
from measure import bench_kernels


@jit
def copy_kernel(X, Y, SIZE, SCALE: tl.constexpr, STRIDE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at * STRIDE, mask=at < SIZE, other=0.0)
    if WIDE:
        x = x.to(tl.float64) * SCALE
    tl.store(Y + at * STRIDE, x.to(Y.dtype.element_ty), mask=at < SIZE)


@jit
def sum_kernel(X, Y, Z, SIZE, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < SIZE, other=0.0).to(tl.float32)
    tl.store(Z + at, x + tl.load(Y + at * STRIDE, mask=at < SIZE, other=0.0).to(tl.float32), mask=at < SIZE)


@jit
def softmax_kernel(X, Y, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(X + at)
    p = tl.exp(x - tl.max(x, 0)[None, :])              # all of the tile is alive until both sums are known
    tl.store(Y + at, p / tl.sum(p, 0)[None, :] + x / tl.sum(x, 1)[:, None])


@jit
def matmul_kernel(A, B, C, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    k = tl.arange(0, BLOCK)
    c = tl.zeros([M, N], tl.float32)
    for start in range(0, K, BLOCK):
        c += tl.dot(tl.load(A + m * K + start + k[None, :]), tl.load(B + (start + k)[:, None] * N + n))
    tl.store(C + m * N + n, c)


def empty(dtype=torch.bfloat16):
    return torch.empty(2**20, dtype=dtype, device="meta")


def copy(SCALE=2, STRIDE=1, WIDE=False, BLOCK=1024):
    launch(copy_kernel, (1024,), empty(), empty(), 2**20, SCALE=SCALE, STRIDE=STRIDE, WIDE=WIDE, BLOCK=BLOCK)


def matmul(M, N, BLOCK, **options):
    launch(matmul_kernel, (1,), empty(), empty(), empty(torch.float32), 1024, M=M, N=N, BLOCK=BLOCK, **options)


BROKEN = {
    "sound copy": copy,
    "sound product": lambda: matmul(64, 64, 64, num_warps=4),
    "fp64": lambda: copy(SCALE=0.1, WIDE=True),
    "narrow": lambda: copy(STRIDE=3),
    "half narrow": lambda: launch(sum_kernel, (512,), empty(), empty(), empty(), 2**20, STRIDE=3, BLOCK=2048),
    "spills": lambda: launch(softmax_kernel, (1,), empty(torch.float32), empty(torch.float32), ROWS=64, BLOCK=128,
                             num_warps=1),
    "shared": lambda: matmul(128, 256, 128, num_warps=8, num_stages=4),
    "no wgmma": lambda: matmul(16, 64, 64, num_warps=4),
    "few threads": lambda: launch(softmax_kernel, (1,), empty(torch.float32), empty(torch.float32), ROWS=32, BLOCK=128,
                                  num_warps=1),
}

if __name__ == "__main__":
    found = {}
    for name, broken in BROKEN.items():
        for architecture in map(int, sys.argv[1:]):
            compiler = bench_kernels.Compiler(architecture)
            with using("triton", compiler):
                broken()
            rows = compiler.rows.values()
            found.setdefault(name, {})[architecture] = [f for row in rows for f in bench_kernels.faults(row)]
    print(json.dumps(found))
