"""The signals that ask a command to stop: of a terminal (SIGINT, SIGHUP), of a machine or batch system that ends a job
(SIGTERM, SIGUSR1). A command that stops for one leaves with 128 + its number, so that `train && next` stops as well.

A run has two ways to stop. Where it has nothing to save, a signal ends it between two lines (`raise_stops`). In its
loop a signal is noted (`note_stops`), and the run saves and leaves at the next point at which all ranks agree.
"""

import contextlib
import errno
import os
import signal
import sys
import time

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# What a run may be asked to stop by: a closed standard output counts as the signal that it is.
REASONS = (*STOPS, signal.SIGPIPE)
# Several signals within so many seconds are one request: batch systems send more than one.
ONE_REQUEST = 1.0


class Stopped(KeyboardInterrupt):
    """A command is to leave. `why` is the name of a signal and `status` 128 + its number, or another reason and its
    exit status."""

    def __init__(self, why: str, status: int):
        super().__init__(why)
        self.why, self.status = why, status


def stopped_by(number: int) -> Stopped:
    return Stopped(signal.Signals(number).name, 128 + number)


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
def raise_stops():
    """A context in which a signal raises Stopped: what is being written is removed, and locks are given back."""
    def stop(number):
        raise stopped_by(number)
    with handle(stop):
        yield


@contextlib.contextmanager
def note_stops():
    """A context in which signals only add their numbers to the list that it yields, so that a loop can save and leave.

    A second request ends the process at once, as a kill does: whatever is on the disk is whole.
    """
    received, first = [], time.monotonic()

    def note(number):
        nonlocal first
        now = time.monotonic()
        if received and now - first > ONE_REQUEST:
            os._exit(128 + number)
        first = first if received else now
        received.append(number)
    with handle(note):
        yield received


def closed_output() -> int:
    """SIGPIPE where the reader of standard output or error has gone, SIGHUP where their terminal has, else 0.

    That is known of the streams of core/output.py, once a line could not be written.
    """
    meanings = {errno.EPIPE: signal.SIGPIPE, errno.EIO: signal.SIGHUP}
    errors = (getattr(getattr(sys, name), "error", None) for name in ("stdout", "stderr"))
    return next((int(meanings[error.errno]) for error in errors if getattr(error, "errno", 0) in meanings), 0)
