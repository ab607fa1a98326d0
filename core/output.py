"""What a command prints. Results are files: a screen, pipe or disk that does not take a line must not end the work.

What is printed may hold words of strangers (names, documents, what a model writes). A terminal shows them and obeys
none: every control character but the line feed and the tab is written as an escape, `\\x1b`.
"""

import contextlib
import os
import re
import sys

# C0, DEL and C1; separators of lines; embeddings, overrides and isolates of the direction of writing.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
# What the progress bars of tqdm write to move the cursor, and the colours of other libraries.
CURSOR, COLOUR = re.compile(r"\r|(\n|\x1b\[A)+\Z"), re.compile(r"\x1b\[[0-9;]*m")


def escape(text: str, line: bool = False) -> str:
    """The text with its control characters as escapes; with `line`, also line feeds and tabs, as for a name."""
    text = CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
    return text.replace("\n", r"\n").replace("\t", r"\t") if line else text


class Output:
    """A text stream that drops what it can no longer write; `error` then says why, and the work goes on.

    Control characters are escaped. With `bars`, a bar of tqdm may move the cursor: what it writes begins with a
    carriage return, as no message of ours does.
    """

    def __init__(self, stream, bars: bool = False):
        self.stream, self.bars, self.error = stream, bars, None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        plain = COLOUR.sub("", text) if self.bars else text
        moves = CURSOR.match(plain) if self.bars else None
        start = moves.end() if moves else 0
        self._try(self.stream.write, plain[:start] + escape(plain[start:]))
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
    kept = {name: Output(stream, bars=name == "stderr") for name in ("stdout", "stderr")
            if (stream := getattr(sys, name)) is not None}
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
