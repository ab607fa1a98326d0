"""What keeps a run whole: signals that wait for a step to end, one process a run folder, no step on a NaN."""

import contextlib
import fcntl
import math
import shutil
import signal
from pathlib import Path


class StopSignal:
    """SIGTERM and the first Ctrl-C ask the loop to save and leave after its step; a second Ctrl-C stops at once."""

    def __init__(self):
        self.received = None
        self.previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number, frame):
        self.received = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class RunLock:
    """Held while a process writes a run folder; the system drops it however the process ends."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / ".lock", "w")     # noqa: SIM115  (held for the life of the run)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise ValueError(f"another process is writing the run folder {folder}; wait for it or choose another "
                             f"--out") from None

    def release(self):
        self.file.close()


@contextlib.contextmanager
def run_folder(path, main: bool):
    """The run's folder, locked while the context lasts on the one process that is `main`; a folder that holds a
    finished run is refused, and one that nothing was written to goes again."""
    folder = Path(path)
    if (folder / "eval.json").exists():                    # the last that a run writes
        raise ValueError(f"{folder} holds a finished run; choose another --out, or remove it to run again")
    if not main:
        yield folder
        return
    lock = RunLock(folder)
    try:
        yield folder
    except BaseException:
        if [file.name for file in folder.iterdir()] == [".lock"]:
            shutil.rmtree(folder)
        raise
    finally:
        lock.release()


def require_finite(what: str, value: float, step: int, sources) -> None:
    """Stop before the step that would spoil the weights."""
    if not math.isfinite(value):
        raise ValueError(f"the {what} of step {step + 1} is {value} (sources in the step: {', '.join(sources)}); the "
                         f"update was not made: lower --optim.lr, or look at those documents")
