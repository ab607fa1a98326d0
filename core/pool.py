"""Workers that take batches in turn and give their results back in the order of the batches.

    with WorkerPool(workers=4, shared=settings) as pool:
        for result in pool.map(score_batch, batches_by_size(records, size, 1 << 20)):
            ...                                    # score_batch(settings, batch), in the order of the batches
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from core.errors import UserError

# `shared` in a worker process.
_shared = None


class WorkerPool(contextlib.AbstractContextManager):
    """`workers` processes, or `threads` for work that releases the GIL (Rust tokenizers, zlib, numpy).

    Instead of a single process none is started, and the calls are made here. `shared` (settings, an index) is sent to
    each process once. Functions and batches for processes are pickled: a function must stand at the top of its module.
    """

    def __init__(self, workers: int, shared=None, threads: bool = False):
        assert workers >= 1, f"a pool needs at least one worker, not {workers}"
        self.workers, self.shared, self.executor = workers, shared, None
        if threads:
            self.executor = ThreadPoolExecutor(workers)
        elif workers > 1:
            self.executor = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(shared,))

    def __exit__(self, *_):
        if self.executor:
            self.executor.shutdown(cancel_futures=True)

    def map(self, function, batches):
        """Yield function(shared, batch) of each batch, in order. At most 2 x workers results wait at a time: a slow
        consumer stops the reading of the input. Whatever the function raises comes through; UserError where a worker
        process was killed, or a batch is nested too deeply to be pickled."""
        if self.executor is None:
            yield from (function(self.shared, batch) for batch in batches)
            return
        waiting, in_process = deque(), isinstance(self.executor, ProcessPoolExecutor)
        call = (_call_in_worker, function) if in_process else (function, self.shared)
        try:
            for batch in batches:
                waiting.append(self.executor.submit(*call, batch))
                if len(waiting) > 2 * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(f"a worker process was killed, most likely for want of memory; use fewer than "
                            f"{self.workers} --workers") from None
        except RecursionError:
            raise UserError("a record is nested too deeply to be sent to a worker process; use --workers 1") from None


def _start_worker(shared):
    """Make a new worker process die on Ctrl-C, at once and without a traceback, and with its parent: a parent that is
    killed cannot tell its workers, and they would wait for the next batch for ever."""
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()


def _call_in_worker(function, batch):
    return function(_shared, batch)


def batches_by_size(items, size, limit: int):
    """Yield lists of consecutive items. A list ends with the item at which the sum of size(item) reaches `limit`.

    Sizes 3, 4, 5, 1 with limit 6 give [3, 4], [5, 1].
    """
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= limit:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
