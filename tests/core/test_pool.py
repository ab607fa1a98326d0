"""Truth: the builtin map. Laws: the order holds whatever the workers; a bounded number of batches is read ahead; what
is shared is sent once; no worker outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.pool import WorkerPool, batches_by_size

ROOT = Path(__file__).parents[2]


def slow_square(shared, number):
    time.sleep(0.02 * (number % 3))                       # later batches are done before earlier ones
    return shared, number * number, os.getpid()


def die(_, number):
    os._exit(9)


def fail(_, number):
    raise KeyError(number)


@pytest.mark.parametrize(("workers", "threads"), [(1, False), (2, False), (1, True), (3, True)])
def test_results_come_in_the_order_of_the_batches(workers, threads):
    with WorkerPool(workers, "shared", threads) as pool:
        results = list(pool.map(slow_square, range(8)))
        assert [(shared, square) for shared, square, _ in results] == [("shared", n * n) for n in range(8)]
        assert list(pool.map(slow_square, [])) == [], "a pool serves more than one map"
        (_, square, _), = pool.map(slow_square, [5])
        assert square == 25
    here = {process for _, _, process in results} == {os.getpid()}
    assert here == (threads or workers == 1)


@pytest.mark.parametrize("threads", [False, True])
def test_a_slow_consumer_stops_the_reading(threads):
    read = []

    def batches():
        for number in range(50):
            read.append(number)
            yield number

    with WorkerPool(2, threads=threads) as pool:
        for taken, _ in enumerate(pool.map(slow_square, batches()), 1):
            assert len(read) <= taken + 4, "2 x workers wait, and no more"
    assert len(read) == 50


class CountsItsCopies:
    copies = 0

    def __reduce__(self):
        CountsItsCopies.copies += 1
        return CountsItsCopies, ()


def name_of(shared, _):
    return type(shared).__name__


def test_what_is_shared_is_not_sent_with_every_batch():
    with WorkerPool(2, CountsItsCopies()) as pool:
        assert list(pool.map(name_of, range(20))) == ["CountsItsCopies"] * 20
    assert CountsItsCopies.copies <= 2


def test_errors_of_the_work_the_input_and_the_workers_come_through():
    def broken_input():
        yield 1
        raise OSError("the disk is gone")

    for workers in (1, 2):
        with WorkerPool(workers) as pool, pytest.raises(KeyError, match="3"):
            list(pool.map(fail, [3]))
        with WorkerPool(workers) as pool, pytest.raises(OSError, match="the disk is gone"):
            list(pool.map(slow_square, broken_input()))
    with WorkerPool(2) as pool, pytest.raises(ValueError, match=r"a worker process was killed.*fewer than 2 --workers"):
        list(pool.map(die, range(3)))
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with WorkerPool(2) as pool, pytest.raises(ValueError, match=r"nested too deeply.*--workers 1"):
        list(pool.map(name_of, [deep]))
    while deep:                                           # freed from outside in: from inside out would recurse
        deep = deep.pop()


PARENT = r"""
import os, sys, time
from core.pool import WorkerPool
def sleep(_, seconds):
    # In one piece, because two workers write at a time.
    os.write(1, f"{os.getpid()}\n".encode())
    time.sleep(seconds)
if __name__ == "__main__":
    with WorkerPool(2) as pool:
        list(pool.map(sleep, [60, 60]))
"""


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_parent(tmp_path, blow):
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], env={**os.environ, "PYTHONPATH": str(ROOT)},
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert all(int(parent.stdout.readline()) for _ in range(2)), "both workers are at it"
    parent.kill() if blow == signal.SIGKILL else os.killpg(parent.pid, blow)
    start = time.monotonic()
    parent.communicate(timeout=30)                        # ends when the last worker has closed its pipes
    assert time.monotonic() - start < 20


@given(st.lists(st.integers(0, 9)), st.integers(1, 20))
def test_batches_join_to_the_items_and_close_at_the_limit(sizes, limit):
    batches = list(batches_by_size(sizes, int, limit))
    assert [size for batch in batches for size in batch] == sizes
    assert all(sum(batch) >= limit > sum(batch[:-1]) for batch in batches[:-1])
    assert all(batches)
    assert list(batches_by_size([3, 4, 5, 1], int, 6)) == [[3, 4], [5, 1]]
