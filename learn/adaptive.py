"""Adaptive replay: each evaluation decides by the general source that lost most what share is general from then on.

The policy budget smooths that loss together with its trend (Holt's double exponential smoothing, which does not lag
behind a steady rise), looks AHEAD evaluations into the future, because replay takes time to help, and judges that
against epsilon and three quarters of it. Epsilon 0.02, smoothing 0.5, two evaluations that lost 0.01 and 0.02:

    level 0.005,   trend 0.0025,   forecast 0.0125       below 0.015: the share falls by 0.05
    level 0.01375, trend 0.005625, forecast 0.030625     above 0.02:  the share rises by 0.1
"""

import typing
from dataclasses import dataclass
from typing import Literal

from core.checkpoint import SHARE
from core.config import setting
from core.errors import UserError
from learn.method import Learning, Method

# What a decision adds to the replay share, or takes from it.
RAISE, LOWER = 0.1, 0.05
# degradation raises the share above WORST and lowers it below MILD; budget lowers it below SPARE * epsilon.
WORST, MILD, SPARE, AHEAD = 0.05, 0.025, 0.75, 3


@dataclass
class AdaptiveConfig:
    policy: Literal["none", "budget", "degradation"] = "none"
    """budget: as little replay as keeps general text within epsilon bits per byte of the base. degradation: replay
    rises by 0.1 where a general source has lost over 5 %, and falls by 0.05 where all have lost under 2.5 %"""
    epsilon: float = setting(0.02, above=0, at_most=1e3)
    """budget: bits per byte that general text may lose"""
    smoothing: float = setting(0.5, above=0, at_most=1)
    """budget: weight of the newest evaluation against the forecast of the ones before. 1: no memory"""
    start: float | None = setting(None, at_least=0, at_most=1)
    """replay share that the first decision changes; default: that of the schedule at its step"""
    least: float = setting(0.2, at_least=0, at_most=1)
    """lowest replay share"""
    most: float = setting(0.6, at_least=0, at_most=1)
    """highest replay share"""

    def __post_init__(self):
        start = self.least if self.start is None else self.start
        if not 0 <= self.least <= start <= self.most <= 1:
            raise UserError(f"forget.adaptive: least {self.least}, start {start} and most {self.most} must rise "
                            f"between 0 and 1")


class Adaptive(Method):
    """The first evaluation is the baseline, and each later one makes a decision, a JSON object with the new
    "replay_share" and its "reason". Decisions are a function of the evaluations alone: a new controller that is shown
    the same ones decides the same. The data schedule holds, and "replay_share" is None, until a decision first wants a
    change; from then on the decisions hold.
    """

    shape: typing.ClassVar = {"baseline": ({str: float}, None), "share": (SHARE, None), "acted": bool,
                              "level": float, "trend": float}

    def __init__(self, config: AdaptiveConfig, learning: Learning):
        super().__init__(config, learning)
        if not learning.general_sources:
            raise UserError("forget.adaptive moves the share of general text, and the run draws none; add a source "
                            "with the role general (forget.py replay makes one from the base), or use "
                            "--forget.lwf.alpha 0.5 --forget.lwf.tokens all, which needs none")
        self.values = {"baseline": None, "share": None, "acted": False, "level": 0.0, "trend": 0.0}

    def evaluated(self, step, texts):
        config, memory = self.config, self.values
        general = {name: found for name, found in texts.items() if found["role"] == "general"}
        if not general:
            raise UserError("forget.adaptive decides by held-out general text, and no general source has any; pack "
                            "one with --heldout above 0")
        # A masked language model is scored without bits per byte.
        metric = "bits_per_byte" if all("bits_per_byte" in found for found in general.values()) else "perplexity"
        if config.policy == "budget" and metric != "bits_per_byte":
            raise UserError("forget.adaptive.policy budget needs bits_per_byte of each general source, and a masked "
                            "language model has none; use --forget.adaptive.policy degradation")
        now = {name: found[metric] for name, found in general.items()}
        if memory["baseline"] is None:
            memory["baseline"] = now
            return None
        if other := sorted(now.keys() ^ memory["baseline"].keys()):
            raise UserError(f"forget.adaptive began with other general sources than these, among them {other[0]}; put "
                            f"back the checkpoints that this run wrote, or begin again with another --out")
        lost = {name: value - memory["baseline"][name] for name, value in now.items()}
        if config.policy == "degradation":
            lost = {name: rise / (memory["baseline"][name] or 1.0) for name, rise in lost.items()}
        if not memory["acted"] or memory["share"] is None:
            # The schedule is in force until a decision first wants a change.
            memory["share"] = self.learning.replay_share(step) if config.start is None else config.start
        source = max(lost, key=lost.get)
        decision = {"step": step, "policy": config.policy, "source": source, "metric": metric, "lost": lost[source],
                    "before": memory["share"]}
        judged, high, low = lost[source], WORST, MILD
        if config.policy == "budget":
            judged, high, low = self.forecast(judged), config.epsilon, SPARE * config.epsilon
            decision |= {"smoothed": memory["level"], "ahead": judged}
        return decision | self.move_share(judged, high, low)

    def forecast(self, loss: float) -> float:
        """The loss expected in AHEAD evaluations; takes the newest one into the level and the trend."""
        new, memory = self.config.smoothing, self.values
        before, trend = memory["level"], memory["trend"]
        memory["level"] = new * loss + (1 - new) * (before + trend)
        memory["trend"] = new * (memory["level"] - before) + (1 - new) * trend
        return memory["level"] + AHEAD * memory["trend"]

    def move_share(self, judged: float, high: float, low: float) -> dict:
        """Raises the share where the judged loss is above `high`, lowers it below `low`; {"replay_share", "reason"}."""
        config, memory = self.config, self.values
        change, where = 0.0, f"between {low:g} and {high:g}"
        if judged > high:
            change, where = RAISE, f"above {high:g}"
        elif judged < low:
            change, where = -LOWER, f"below {low:g}"
        # A schedule's share may be outside the bounds: then a rise never lowers it, nor a fall raises it.
        least, most = min(config.least, memory["share"]), max(config.most, memory["share"])
        share = round(min(most, max(least, memory["share"] + change)), 9)
        reason = f"{judged:.4f} is {where}"
        if change and share == memory["share"]:
            reason += f", but replay is at its bound of {share:g}"
            reason += "; add ewc, lwf or LoRA, or lower the learning rate" if change > 0 else ""
        # Take over from the schedule even where the share cannot move: the schedule's own share may be another one.
        memory["acted"] |= change != 0
        memory["share"] = share
        return {"replay_share": share if memory["acted"] else None, "reason": reason}


def share_in_force(decisions: list[dict], batch: int | None = None) -> float | None:
    """The replay share that the decisions demand of the batch of step `batch`, or, without one, of all to come; None
    while the data schedule holds. One made before step 4 holds from batch 5 on, as batch 4 has been read ahead."""
    shares = [decision["replay_share"] for decision in decisions
              if decision["replay_share"] is not None and (batch is None or decision["step"] < batch)]
    return shares[-1] if shares else None
