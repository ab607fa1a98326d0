"""What a run gained and what it lost: relative changes of a score, how sure they are, what went wrong and what to do.

    domain gain   = mean over domain texts of the relative fall of bits per byte (negative where it rose)
    forgetting    = mean over general texts of its relative rise (negative where general text got better)
    overall score = domain gain - max(0, forgetting - 5 %): up to 5 % of forgetting costs nothing

Example: law falls from 2.0 to 1.5 bits per byte, a gain of 25 %; stories rise from 1.0 to 1.1, a forgetting of 10 %.
The overall score is 25 % - (10 % - 5 %) = 20 %.

How sure: the held-out documents are drawn anew, with replacement, before and after from the same ones (a paired
bootstrap over documents). Where the middle 95 % of the changes hold 0, the change is not distinguishable from none.

All functions take and return plain values. An answer that cannot be known is None, never zero.
"""

import sys
import zlib
from dataclasses import dataclass, field

import numpy as np

# Forgetting below GOOD is good, below WARNING a warning, from there on bad. GOOD is also what the overall score allows.
GOOD, WARNING = 0.05, 0.10
# A domain gain closer to zero than this is called flat.
FLAT = 0.01
# Draws of the bootstrap. All of FEWEST documents change in the same direction by chance once in 2^5 times: below that
# number nothing can be said at 95 %.
DRAWS, FEWEST = 1000, 6
# A guess of every byte with the same probability takes so many bits per byte.
GUESS = 8.0

# What is compared, in words: bits per byte; nats per predicted token where a masked-LM run has no bits per byte.
UNITS = {"bits_per_byte": "bits per byte", "nats_per_token": "nats per predicted token"}


def finite(value) -> float | None:
    """`value` as a float if it is a finite number, else None: files may hold anything in its place."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # JSON allows integers of any length, and floats end near 1.8e308. NaN is not below anything.
    return float(value) if is_number and abs(value) <= sys.float_info.max else None


def mean(values: list):
    """Mean of numbers or of arrays; None if there is none, or one is unknown."""
    return None if not values or any(value is None for value in values) else sum(values) / len(values)


# ---- what changed, and how sure that is

def compare(before: dict | None, after: dict, general, domain=None, metric: str = "bits_per_byte") -> dict:
    """{"change": {text: fraction}, "domain_gain", "forgetting", "score"} of scores {text: {metric: value, ...}}, and
    "interval": the same again, each as [low, high] at 95 %, or None where it is unknown.

    The rise of the texts named in `general` is forgetting. `domain` names the texts whose fall is the gain; without it,
    these are all the others. A text whose value is unknown on either side, or was zero before, is left out.
    """
    before, change = before or {}, {}
    for name in after:
        was, now = finite(before.get(name, {}).get(metric)), finite(after[name].get(metric))
        if was and now is not None:
            change[name] = now / was - 1
    domain = [name for name in change if name not in general] if domain is None else domain
    found = summarise(change, general, domain)
    drawn = {name: draw_changes(name, before[name], after[name]) for name in change}
    spread = summarise(drawn, general, domain)
    return {"change": change, **found, "interval": {
        "change": {name: middle(draws) for name, draws in drawn.items()},
        **{key: middle(draws) for key, draws in spread.items()}}}


def summarise(change: dict, general, domain) -> dict:
    """{"domain_gain", "forgetting", "score"} of the changes {text: a number, or an array of draws, or None}."""
    rise, forgetting = (mean([change[name] for name in change if name in names]) for names in (domain, general))
    gain = None if rise is None else -rise
    return {"domain_gain": gain, "forgetting": forgetting, "score": overall_score(gain, forgetting)}


def overall_score(gain, forgetting):
    """Gain less the forgetting beyond GOOD, of numbers or arrays; None where one is unknown."""
    return None if gain is None or forgetting is None else gain - np.maximum(0.0, forgetting - GOOD)


def draw_changes(name: str, before: dict, after: dict) -> np.ndarray | None:
    """[DRAWS] relative changes of a text whose documents are drawn anew; None where the scores of the same documents,
    at least FEWEST, are not known. The draws are a function of the text's name and the number of its documents alone,
    so that two runs on the same texts are compared on the same draws."""
    sides = [side.get("nats_by_document") for side in (before, after)]
    if not all(isinstance(side, list) and all(finite(value) is not None for value in side) for side in sides):
        return None
    # Bytes and tokens are the same on both sides, so that they cancel out of the ratio.
    was, now = (np.array(side, float) for side in sides)
    if len(was) != len(now) or len(was) < FEWEST or before.get("bytes") != after.get("bytes"):
        return None
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    draws = (generator.integers(len(was), size=len(was)) for _ in range(DRAWS))
    with np.errstate(divide="ignore", invalid="ignore"):
        changes = np.array([now[drawn].sum() / was[drawn].sum() - 1 for drawn in draws])
    return changes if np.isfinite(changes).all() else None


def middle(draws) -> list[float] | None:
    """[low, high] around the middle 95 % of the draws."""
    return None if draws is None else [float(value) for value in np.quantile(draws, (0.025, 0.975))]


def is_unclear(interval) -> bool:
    """Whether a change with this interval is not distinguishable from none."""
    return interval is not None and interval[0] <= 0 <= interval[1]


def grade_forgetting(forgetting: float | None, interval=None) -> str:
    """good, warning, bad or unknown; unclear where the interval holds 0."""
    if forgetting is None or is_unclear(interval):
        return "unknown" if forgetting is None else "unclear"
    return "good" if forgetting < GOOD else "warning" if forgetting < WARNING else "bad"


def grade_gain(gain: float | None, interval=None) -> str:
    """good, warning (flat), bad (the domain got worse) or unknown; unclear where the interval holds 0."""
    if gain is None or is_unclear(interval):
        return "unknown" if gain is None else "unclear"
    return "good" if gain >= FLAT else "warning" if gain >= 0 else "bad"


# ---- what went wrong, and what to do

@dataclass
class Evidence:
    """What is known of a run beside its scores before and after. By default nothing is."""
    # The values of config.toml.
    settings: dict = field(default_factory=dict)
    # The learning rate recommended for the size of the model and the part of it that is trained.
    recommended_lr: float | None = None
    # General text's share of the tokens so far.
    replay_share: float | None = None
    # How often the domain was read, of the source read most.
    epochs: float | None = None
    # {step: the score of the domain at that evaluation}.
    history: dict = field(default_factory=dict)
    # Training losses, a value per line of the log.
    losses: list = field(default_factory=list)
    # Whether its steps ended it: they were not finite, or spiked.
    stopped: bool = False

    def get(self, name: str):
        """The setting of a dotted name; None where it is unknown."""
        value = self.settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def find_failure(comparison: dict, after: dict, known: Evidence) -> str | None:
    """divergence, overfitting, forgetting, flat, or None where nothing is seen to have gone wrong.

    comparison: what `compare` returned of `after`, {text: scores}. A domain above its start was spoiled (divergence),
    unless the training loss fell all the same on text that was read again and again (overfitting).
    """
    gain, interval = comparison["domain_gain"], comparison["interval"]
    losses = [finite(value) for value in known.losses]
    values = [finite(scores[key]) for scores in after.values() for key in ("nats_per_token", *UNITS) if key in scores]
    if known.stopped or None in losses + values:
        return "divergence"
    if gain is None and any(scores.get("bits_per_byte", 0) > GUESS for scores in after.values()):
        return "divergence"
    read_again = known.epochs is not None and known.epochs >= 2
    if grade_gain(gain, interval["domain_gain"]) == "bad":
        return "overfitting" if read_again and losses[1:] and losses[-1] < losses[0] else "divergence"
    if grade_forgetting(comparison["forgetting"], interval["forgetting"]) == "bad":
        return "forgetting"
    scores = list(known.history.values())
    if read_again and scores and scores[-1] > min(scores) * (1 + FLAT):
        return "overfitting"
    return "flat" if gain is not None and abs(gain) < FLAT else None


def advise(failure: str | None, known: Evidence) -> list[str]:
    """What to do about a failure, most useful first. Nothing that is in force already is named."""
    lr, best, share = finite(known.get("optim.lr")), finite(known.recommended_lr), known.replay_share
    times = lr / best if lr and best else None
    is_on = {name: known.get(name) not in (None, 0, "none") for name in (
        "lora.rank", "forget.ewc.strength", "forget.lwf.alpha", "forget.merge.method", "forget.adaptive.policy")}
    lower = "lower the learning rate" + ("" if not lr else f" (optim.lr is {lr:g}; for this model start from {best:g})"
                                         if times and times > 1 else f" (optim.lr is {lr:g})")
    best_step = min(known.history, key=known.history.get, default=0)
    # (whether it would help this run, what to do)
    rows = {
        "divergence": [
            (True, lower),
            (known.stopped or None in map(finite, known.losses), "look at the documents of the batch named in the log"),
            (known.get("train.precision") == "fp16", "compute in bf16"),
            (known.get("optim.clip") == 0, "clip gradients (optim.clip 1)")],
        "overfitting": [
            (True, "train for fewer steps" + f": held-out text was best at step {best_step:,}" * bool(best_step)),
            (True, "add domain text" + (f": it was read {known.epochs:.3g} times" if known.epochs else "")),
            (True, lower)],
        "forgetting": [
            (times and times > 1, f"first {lower}"),
            (not is_on["forget.adaptive.policy"] and (share is None or share < 0.4),
             "raise replay to 40-50 % of the tokens" + ("" if share is None else f" (it had {100 * share:.0f} %)")),
            (not is_on["lora.rank"], "use LoRA (lora.rank)"),
            (not is_on["forget.ewc.strength"], "use EWC (forget.ewc.strength)"),
            (not is_on["forget.lwf.alpha"], "use LwF (forget.lwf.alpha)"),
            (not is_on["forget.merge.method"], "merge the result with the base (forget.py merge)")],
        "flat": [
            (not times or times < 3, "use a learning rate 2-3x higher" + (f" (optim.lr is {lr:g})" if lr else "")),
            # The default warm-up, one per cent of the run, is short.
            (known.get("optim.warmup_steps") or known.get("optim.warmup_ratio") != 0.01, "shorten the warm-up"),
            (True, "add more or cleaner domain data")]}
    return [words for helps, words in rows.get(failure, []) if helps] or ([lower] if failure else [])


# ---- words

def describe(comparison: dict, after: dict, known: Evidence | None = None) -> str:
    """What `compare` returned, in a line: gained, lost, how sure; in a second one what went wrong and what to do."""
    known, said = known or Evidence(), []
    for name, sign, words in (("domain_gain", -1, "domain: "), ("forgetting", 1, "forgetting: general ")):
        value, interval = comparison[name], comparison["interval"][name]
        if value is not None:
            sure = "" if interval is None else " (95 %: {:+z.1f} to {:+z.1f} %)".format(
                *sorted(100 * sign * end for end in interval))
            unclear = ", not distinguishable from no change" if is_unclear(interval) else ""
            said.append(f"{words}bits per byte {100 * sign * value:+z.1f} %{sure}{unclear}")
    if comparison["forgetting"] is None:
        said.append("forgetting: unknown (no general text was scored before and after)")
    else:
        said[-1] += f" ({grade_forgetting(comparison['forgetting'], comparison['interval']['forgetting'])})"
    failure = find_failure(comparison, after, known)
    return "; ".join(said) + (f"\n{failure}: {'; '.join(advise(failure, known))}" if failure else "")
