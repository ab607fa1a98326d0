"""What protects a run: one process per run folder, signals that wait for the step to end, no update from a NaN."""

import contextlib
import fcntl
import math
import shutil
import signal
from pathlib import Path

from core.errors import UserError


class StopSignal:
    """A context in which SIGTERM and the first Ctrl-C are only noted in `received`, so that the loop can save and leave
    after its step. A second Ctrl-C stops at once."""

    received: str | None = None

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, frame):
        self.received = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def on_any_rank(self, world) -> bool:
        """Whether any rank was asked to stop. A collective, so that all ranks leave after the same step."""
        return world.sum([self.received is not None])[0] > 0


@contextlib.contextmanager
def run_folder(path, world):
    """The folder of a run, locked for this process by rank 0 until the context or the process ends.

    UserError where it holds a finished run, or where another process writes it. If the run fails before it wrote
    anything, the folder is removed again.
    """
    folder = Path(path)
    # eval.json is the last file that a run writes.
    if (folder / "eval.json").exists():
        raise UserError(f"{folder} holds a finished run; choose another --out, or remove it to run again")
    if not world.main:
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is writing the run folder {folder}; wait for it or choose another "
                            f"--out") from None
        try:
            yield folder
        except BaseException:
            if [file.name for file in folder.iterdir()] == [".lock"]:
                shutil.rmtree(folder)
            raise


def require_finite(what: str, value: float, step: int, sources) -> None:
    """UserError where `value` of `step` (counted from 0) is NaN or infinite: the update would spoil the weights."""
    if not math.isfinite(value):
        raise UserError(f"the {what} of step {step + 1} is {value} (sources in the step: {', '.join(sources)}); the "
                        f"update was not made: lower --optim.lr, or look at those documents")
