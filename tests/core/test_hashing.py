"""Laws: a permutation is one, at any size, and looks like chance; keys differ with every part and its place.
Truth: hashlib; one pinned key, because every law would allow another constant.
"""

import hashlib
import itertools
import random
import subprocess
from pathlib import Path

import numpy as np

from core import hashing
from core.hashing import fmix64, hash_file, mix_keys, permute, short_digest


def test_keys_are_pinned():
    """Another constant would be as random and would change the order of every run."""
    assert mix_keys(1, "slots", 2).tolist() == [15051460212372709719]
    assert permute(np.arange(6), 6, mix_keys(0)).tolist() == [1, 2, 0, 3, 4, 5]


def test_digests(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    assert short_digest(b"abc") == hashlib.sha256(b"abc").hexdigest()[:16]


def test_permute_is_a_bijection():
    for n in [*range(1, 400), *range(509, 516), *range(1021, 1028), *range(4093, 4101), 5000]:
        np.testing.assert_array_equal(np.sort(permute(np.arange(n), n, mix_keys(n, "x"))), np.arange(n))
    rng = random.Random(0)
    for _ in range(20):
        n = rng.randrange(2, 2 ** rng.randrange(2, 41))
        index = np.unique(np.random.default_rng(n).integers(0, n, 20000))
        image = permute(index, n, mix_keys(n))
        assert len(np.unique(image)) == len(index)
        assert image.min() >= 0
        assert image.max() < n


def test_permute_looks_random():
    n = 1 << 20
    image = permute(np.arange(n), n, mix_keys(1))
    assert abs((np.diff(image) % 2 != 0).mean() - 0.5) < 0.02        # a weak one keeps the parity for 99.9 %
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.01
    assert abs((image[:n // 2] < n // 2).mean() - 0.5) < 0.01
    distance = np.bincount((np.diff(image) % n) // (n // 64), minlength=64)      # of neighbours, uniform on the circle
    assert ((distance - n / 64) ** 2 / (n / 64)).sum() < 63 + 5 * 126 ** 0.5     # chi squared, 5 sigma
    other = permute(np.arange(n), n, mix_keys(2))
    assert (image == other).sum() < 12                               # Poisson of mean 1
    assert abs(np.corrcoef(image, other)[0, 1]) < 0.01
    index = np.random.default_rng(0).integers(0, n, 4000)
    for bit in range(20):                                            # one bit in: each bit out changes half the time
        changed = permute(index, n, mix_keys(1)) ^ permute(index ^ (1 << bit), n, mix_keys(1))
        rate = (changed[:, None] >> np.arange(20) & 1).mean()
        assert abs(rate - 0.5) < 0.02, (bit, rate)
    for bit in range(0, 64, 7):
        x = np.random.default_rng(bit).integers(0, 2**63, 4000, dtype=np.uint64)
        flipped = fmix64(x) ^ fmix64(x ^ np.uint64(1 << bit))
        rates = (flipped[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).mean(0)
        assert abs(rates - 0.5).max() < 0.05                         # 6 sigma of 4,000 draws


def test_small_permutations_are_all_reached_about_equally():
    images = [tuple(permute(np.arange(4), 4, mix_keys(key)).tolist()) for key in range(4800)]
    counts = [images.count(p) for p in itertools.permutations(range(4))]
    assert min(counts) > 100
    assert max(counts) < 400


def test_keys_have_an_order():
    keys = [mix_keys(*parts)[0] for parts in ((1, 2), (2, 1), (1, 2, 0), ("1", 2), (12,), (0, 1, 2))]
    assert len(set(keys)) == 6
    np.testing.assert_array_equal(mix_keys(5, "a", np.arange(3)),
                                  np.concatenate([mix_keys(5, "a", i) for i in range(3)]))


def test_the_commit_is_git_s_own():
    """Truth: git log, where this is a checkout; a change that is not committed shows."""
    found = hashing.find_commit()
    head = subprocess.run(["git", "log", "-1", "--format=%H"], cwd=Path(hashing.__file__).parent, capture_output=True,
                          text=True)
    assert head.stdout.startswith(found.removesuffix("-dirty")) if head.returncode == 0 else found == ""
