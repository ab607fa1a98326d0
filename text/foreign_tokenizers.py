"""A stranger's tokenizer.json, opened and tried out before any text of the user's is given to it.

The package `tokenizers` is Rust. Where a file is nonsense it panics: an exception that is no Exception, and a stack
trace on the screen. Its regular expressions (Oniguruma's) give up after ten million steps, again with a panic; one that
needs a million steps for every word would not, and take years. A normaliser may double each letter forty times.
"""

import contextlib
import os
import re
import threading
from pathlib import Path

import tokenizers

from core.errors import UserError
from core.foreign_files import VOCABULARY, first_line, read_own, read_own_json

# Runs on which a pattern's steps grow fastest, with what it may look for behind them, and what text mostly is. A good
# tokenizer takes a hundredth of a second.
RUNS = ("a", "A", "1", " ", "\n", "\xe9", "\u6f22", "!", "ab", "a ", "a1", "aA", ".,", "\t ")
TRIAL = ("The tenant shall pay 1,200 dollars (see \xa7 28-3301) on the 5th day, isn't it?",
         *(f"{run * 200}\xa7{''.join(map(chr, range(32, 127)))}" for run in RUNS))
TRIAL_SECONDS = 5.0
# How many times as long a normaliser or decoder may make a text, and the longest string that it may put in.
MOST_GROWTH, MOST_CONTENT = 100, 10_000


def open_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a file; UserError where the file is damaged, or it fails, hangs or swells on a short text."""
    with silenced_panics(f"{path} cannot be read as tokenizer.json"):
        backend = tokenizers.Tokenizer.from_buffer(read_own(path, VOCABULARY))
    description = read_own_json(path, VOCABULARY)
    for part in ("normalizer", "decoder"):
        check_growth(description.get(part), f"{path} has a {part}")
    with silenced_panics(f"{path} fails on a short text"):
        try_out(backend, path)
    return backend


def try_out(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Encode and decode TRIAL; raises a panic of the package, and UserError where that takes too long."""
    finished, panics = threading.Event(), []

    def encode():
        try:
            backend.encode("a")
            # Unlike `encode`, this call lets other threads of Python go on.
            for encoding in backend.encode_batch_fast([*TRIAL], add_special_tokens=False):
                backend.decode(encoding.ids[:50], skip_special_tokens=False)
        except Exception:
            # What it merely cannot encode, as without an unknown token, is said where such a text comes.
            finished.set()
        except BaseException as panic:
            panics.append(panic)
        finished.set()
    # A pool of threads would be kept busy, and forked processes would be warned of it.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        # A call into Rust cannot be stopped. The thread ends with the process, which ends after the error.
        threading.Thread(target=encode, daemon=True).start()
        if not finished.wait(TRIAL_SECONDS):
            raise UserError(f"{path} takes more than {TRIAL_SECONDS:g} s for a short text; its regular expressions are "
                            f"not fit for use")
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        os.environ |= {} if before is None else {"TOKENIZERS_PARALLELISM": before}
    if panics:
        raise panics[0]


@contextlib.contextmanager
def silenced_panics(what: str):
    """In this context errors and panics of `tokenizers` become a UserError, and nothing of them reaches the screen."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            kept = os.dup(2)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, 2)
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
        stack.enter_context(panics_as_errors(what))
        yield


@contextlib.contextmanager
def panics_as_errors(what: str):
    """In this context errors and panics of `tokenizers`, which has no narrower classes for them, become a UserError."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({first_line(error)}); download it again") from None


def check_growth(part: dict | None, what: str) -> None:
    """UserError where the steps of a normaliser or decoder, one after the other, make a text many times as long."""
    growth = 1.0
    for step in list_steps(part):
        content, pattern = step.get("content", step.get("prepend")), step.get("pattern")
        if not isinstance(content, str):
            continue
        if len(content) > MOST_CONTENT:
            raise UserError(f"{what} that puts in {len(content):,} characters; no known one does")
        if isinstance(pattern, dict):
            spelt = pattern.get("Regex", "")
            # What is anchored happens once in a text.
            is_once = spelt.startswith("\\A") and not re.search(r"(?<!\\)\|", spelt)
            growth *= 1 if is_once else max(1, len(content) / max(1, len(pattern.get("String", "-"))))
    if growth > MOST_GROWTH:
        raise UserError(f"{what} that can make a text {growth:,.0f} times as long; no known one does")


def list_steps(part) -> list[dict]:
    """A normaliser, pre-tokenizer or decoder of a tokenizer.json, and all that a Sequence holds, in their order."""
    inner = [each for value in part.values() if isinstance(value, list) for each in value if isinstance(each, dict)
             ] if part else []
    return ([part] if part else []) + [step for each in inner for step in list_steps(each)]
