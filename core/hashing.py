"""Randomness without state, keyed permutations and digests: pure functions, the same on every platform.

A random choice of a run is a function of what it is for (seed, step, source, ...): `mix_keys` makes one 64-bit key of
those parts, `fmix64` makes more values from a key, and `permute` shuffles by one. They decide the order of the data: a
change here changes every run, and then ORDER_VERSION in data.py must be raised.
"""

import hashlib
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np


def fmix64(x) -> np.ndarray:
    """uint64 -> uint64 of the same shape, at least [1]: MurmurHash3's finaliser, in which every input bit changes each
    output bit with probability one half."""
    # Arrays wrap around silently, which is wanted here; numpy's scalars would warn of the overflow.
    x = np.atleast_1d(np.asarray(x, np.uint64))
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def mix_keys(*parts) -> np.ndarray:
    """uint64 [1], or [n] where a part is an array of n integers: one key from integers, arrays and strings, in order.

    mix_keys(seed, "slots", step) differs from mix_keys(step, "slots", seed). A string counts by its BLAKE2b hash.
    """
    key = np.zeros(1, np.uint64)
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
        part = np.asarray(part, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        key = fmix64(key * np.uint64(5) + fmix64(part))
    return key


def permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """int64 [k]: where each index [k] goes under the permutation of 0..n-1 that `key` [1] or [k] chooses.

    Nothing of size n is stored: four Feistel rounds permute the smallest range of an even number of bits that holds n,
    and a value that falls at n or above is sent round again until it is below. With n = 6 the range is 0..15; if 2 goes
    to 13 and 13 to 4, then 2 goes to 4. A cycle that starts below n also ends there, so the result is a permutation.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    value = np.array(index, np.uint64)
    # uint64 [4, k]: the key of each round.
    keys = fmix64(np.broadcast_to(key, value.shape) + np.arange(4, dtype=np.uint64)[:, None])
    outside = np.ones(value.shape, bool)
    while outside.any():
        left, right = value[outside] >> half, value[outside] & mask
        for round_key in keys[:, outside]:
            left, right = right, left ^ (fmix64(right ^ round_key) & mask)
        value[outside] = (left << half) | right
        outside = value >= n
    return value.astype(np.int64)


def short_digest(value: bytes) -> str:
    """The first 16 hexadecimal digits of SHA-256: enough to notice that something has changed."""
    return hashlib.sha256(value).hexdigest()[:16]


def hash_file(path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_commit() -> str:
    """The commit of this checkout, "-dirty" behind it where files differ from it; empty without git."""
    # Without git on the machine the shell says so, and nothing is printed.
    root = shlex.quote(str(Path(__file__).resolve().parent.parent))
    found = subprocess.getoutput(f"git -C {root} describe --always --dirty --abbrev=12 --exclude '*' 2>/dev/null")
    return found if re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", found) else ""
