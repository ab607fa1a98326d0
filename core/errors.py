"""The user's mistakes: one clear line that says what, which value and what to do."""

import difflib


class UserError(ValueError):
    """A mistake of the user's. A command prints its text as one line and exits with status 2.

    Any other exception that reaches the command line is a bug of ours: it shows its traceback and exits with 1.
    """


def nearest(word: str, known) -> str:
    """`; did you mean X?` for the closest of the `known` words, or an empty string where none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
