"""What a run gained and what it lost: relative changes of a score, one overall score, grades and one line of words.

    domain gain   = mean over domain texts of the relative fall of bits per byte (negative where it rose)
    forgetting    = mean over general texts of its relative rise (negative where general text got better)
    overall score = domain gain - max(0, forgetting - 5 %): up to 5 % of forgetting costs nothing

Example: law falls from 2.0 to 1.5 bits per byte, a gain of 25 %; stories rise from 1.0 to 1.1, a forgetting of 10 %.
The overall score is 25 % - (10 % - 5 %) = 20 %.

All functions take and return plain values. An answer that cannot be known is None, never zero.
"""

import sys

# Forgetting below GOOD is good, below WARNING a warning, from there on bad. GOOD is also what the overall score allows.
GOOD, WARNING = 0.05, 0.10
# A domain gain closer to zero than this is called flat.
FLAT = 0.01

# What is compared, in words: bits per byte; nats per predicted token where a masked-LM run has no bits per byte.
UNITS = {"bits_per_byte": "bits per byte", "nats_per_token": "nats per predicted token"}

ADVICE = {
    "forgetting": "raise replay to 40-50 %, or use LoRA, EWC or LwF, or merge the result with the base",
    "flat": "use a learning rate 2-3x higher or a shorter warm-up; add more or cleaner domain data",
    "nonfinite": "lower the learning rate; look at the documents of the batch named in the log",
}


def finite(value) -> float | None:
    """`value` as a float if it is a finite number, else None: files may hold anything in its place."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # JSON allows integers of any length, and floats end near 1.8e308. NaN is not below anything.
    return float(value) if is_number and abs(value) <= sys.float_info.max else None


def mean(values) -> float | None:
    """Mean of those values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def compare(before: dict | None, after: dict, general, domain=None, metric: str = "bits_per_byte") -> dict:
    """{"change": {text: fraction}, "domain_gain", "forgetting", "score"} of scores {text: {metric: value, ...}}.

    The rise of the texts named in `general` is forgetting. `domain` names the texts whose fall is the gain; without it,
    these are all the others. A text whose value is unknown on either side, or was zero before, is left out.
    """
    before = before or {}
    change = {}
    for name in after:
        was, now = finite(before.get(name, {}).get(metric)), finite(after[name].get(metric))
        if was and now is not None:
            change[name] = now / was - 1
    if domain is None:
        domain = [name for name in change if name not in general]
    gain = mean(-change[name] for name in change if name in domain)
    forgetting = mean(change[name] for name in change if name in general)
    score = None if None in (gain, forgetting) else gain - max(0.0, forgetting - GOOD)
    return {"change": change, "domain_gain": gain, "forgetting": forgetting, "score": score}


def grade_forgetting(forgetting: float | None) -> str:
    """good, warning, bad or unknown."""
    if forgetting is None:
        return "unknown"
    return "good" if forgetting < GOOD else "warning" if forgetting < WARNING else "bad"


def grade_gain(gain: float | None) -> str:
    """good, warning (flat), bad (the domain got worse) or unknown."""
    if gain is None:
        return "unknown"
    return "good" if gain >= FLAT else "warning" if gain >= 0 else "bad"


def describe(comparison: dict) -> str:
    """One line about what `compare` returned: what was gained, what was lost, and what to do about it."""
    gain, loss = comparison["domain_gain"], comparison["forgetting"]
    gained = "" if gain is None else f"domain: bits per byte {-100 * gain:+.1f} %; "
    if loss is None:
        return f"{gained}forgetting: unknown (no general text was scored before and after)"
    grade = grade_forgetting(loss)
    advice = f": {ADVICE['forgetting']}" if grade == "bad" else ""
    return f"{gained}forgetting: general bits per byte {100 * loss:+.1f} % ({grade}{advice})"
