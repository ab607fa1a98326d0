"""What a command prints. Results are files: a screen, pipe or disk that does not take a line must not end the work."""

import contextlib
import os
import sys


class Output:
    """A text stream that drops what it can no longer write; `error` then says why, and the work goes on."""

    def __init__(self, stream):
        self.stream, self.error = stream, None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, function, *arguments):
        try:
            function(*arguments)
        except OSError as error:
            self.error = self.error or error
            # What the stream still holds, and what the interpreter flushes at its end, goes nowhere.
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())


@contextlib.contextmanager
def keep_printing():
    """Standard output and error for the time of a command: a character that the encoding lacks is escaped, and what
    cannot be written is dropped. Yields a function that flushes standard output and gives the error that lost some of
    it, or None; a pipe that its reader has closed (`| head`) loses nothing that anybody wants."""
    kept = {name: Output(stream) for name in ("stdout", "stderr") if (stream := getattr(sys, name)) is not None}
    for stream in kept.values():
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def find_loss() -> OSError | None:
        for stream in kept.values():
            stream.flush()
        lost = kept["stdout"].error if "stdout" in kept else None
        return None if isinstance(lost, BrokenPipeError) else lost

    with contextlib.redirect_stdout(kept.get("stdout")), contextlib.redirect_stderr(kept.get("stderr")):
        try:
            yield find_loss
        finally:
            find_loss()
