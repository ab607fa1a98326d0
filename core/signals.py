"""The signals that ask a command to stop: of a terminal (SIGINT, SIGHUP), of a machine or batch system that ends a job
(SIGTERM, SIGUSR1). A command that stops for one leaves with 128 + its number, so that `train && next` stops as well.
"""

import contextlib
import signal

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@contextlib.contextmanager
def handle(function):
    """A context in which the main thread calls function(number) for each of the signals; SIGHUP that nohup has switched
    off stays so."""
    previous = {number: signal.getsignal(number) for number in STOPS}
    if previous[signal.SIGHUP] is signal.SIG_IGN:
        del previous[signal.SIGHUP]
    for number in previous:
        signal.signal(number, lambda number, frame: function(number))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def note_signals():
    """A context in which the signals only add their numbers to the list that it yields, so that a loop can save and
    leave after its step. A second Ctrl-C stops at once."""
    received = []

    def note(number):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with handle(note):
        yield received


def agree_on_stop(received: list[int], world) -> int:
    """The number of a signal that any rank has received, the same on all ranks, or 0. A collective."""
    counts = world.sum([received.count(number) for number in STOPS])
    return next((int(number) for number, count in zip(STOPS, counts) if count), 0)
