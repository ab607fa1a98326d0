"""What a step must be like for its update to be made: a loss and a gradient norm that are finite and, on request, no
spike. What is judged is the same on all ranks, so that all decide alike.

A spike lies more than `sigma` standard deviations above the mean of the last steps (OLMo 2, arXiv 2501.00656). Only the
values of steps whose updates were made are remembered: one NaN in the window would make every later step a spike. With
losses of 2.0 and 2.2 in turn (mean 2.1, deviation 0.1) and 6 sigma, a loss above 2.7 is one.

A step that may not move the weights is left out, or ends the run, or rewinds it, as PaLM's training was after spikes
(arXiv 2204.02311, section 5.1): weights and moments go back to a checkpoint, and the data go on behind the step.
"""

import math
from dataclasses import dataclass
from typing import Literal

from core.config import setting
from core.signals import Stopped


@dataclass
class GuardConfig:
    nonfinite: Literal["skip", "rewind", "stop"] = "skip"
    """where the loss or the gradient norm of a step is not finite its update is left out; rewind: and weights, moments,
    the methods' tensors, loss scale and window become those of the newest checkpoint that verifies, of those at
    multiples of train.save_every, while data and step number go on; stop: and the run is saved and stopped"""
    spike: Literal["off", "skip", "rewind", "stop"] = "off"
    """the same where one of them lies far above those of the steps before"""
    sigma: float = setting(6.0, above=0, at_most=1e6)
    """standard deviations above the mean from which on that is a spike"""
    window: int = setting(128, at_least=8, at_most=100_000)
    """steps that mean and deviation are taken of; there are no spikes before half of them are made"""
    limit: int = setting(5, at_least=1)
    """updates left out one after another that stop the run; a rewind undoes those between, so that they do not count"""


class Guard:
    """Judges each step, and counts and remembers what it has to: the run's checkpoints hold its `state`."""

    def __init__(self, config: GuardConfig | None = None):
        self.config = config or GuardConfig()
        # [loss, gradient norm] of the last steps whose updates were made.
        self.window: list[list[float]] = []
        self.left_out = self.in_a_row = 0
        # Why the run is to stop after this step; None: it goes on.
        self.stop: str | None = None
        # Whether the last step that was judged asks for a rewind.
        self.goes_back = False

    @property
    def may_rewind(self) -> bool:
        return "rewind" in (self.config.nonfinite, self.config.spike)

    def judge(self, step: int, loss: float, norm: float, sources) -> str | None:
        """Why the update of `step` (counted from 0) must not be made; None where it may. `sources` are named then."""
        values = {"loss": loss, "gradient norm": norm}
        kind, self.goes_back = "nonfinite", False
        found = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if not found and self.config.spike != "off":
            found, kind = self.find_spikes(values), "spike"
        if not found:
            self.in_a_row = 0
            self.window = [*self.window, [loss, norm]][-self.config.window:]
            return None
        self.left_out, self.in_a_row = self.left_out + 1, self.in_a_row + 1
        why = f"in step {step + 1} the {' and the '.join(found)} (sources in the step: {', '.join(sources)})"
        policy = getattr(self.config, kind)
        self.goes_back = policy == "rewind"
        if policy == "stop":
            self.stop = f"{why}; lower --optim.lr, look at those documents, or pass --guard.{kind} skip"
        self.stop_at_limit(why)
        return why

    def rewind(self, state: dict, why: str):
        """Take over the window of a checkpoint's `state`. The updates since then are undone: so whatever was left out
        since was left out one after another, and a run that never gets beyond its checkpoint is stopped."""
        self.window, self.goes_back = state["window"], False
        self.in_a_row = state["in_a_row"] + self.left_out - state["left_out"]
        self.stop_at_limit(why)

    def stop_at_limit(self, why: str):
        if self.in_a_row >= self.config.limit and not self.stop:
            self.stop = (f"{why}, and {self.in_a_row} updates one after another were left out; lower --optim.lr, or "
                         f"look at those documents")

    def find_spikes(self, values: dict) -> list[str]:
        """What of {name: value} is a spike, in words. Sums are exactly rounded, so that all machines find the same."""
        found, n = [], len(self.window)
        for (name, value), past in zip(values.items(), zip(*self.window) if 2 * n >= self.config.window else ()):
            mean = math.fsum(past) / n
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in past) / n)
            if value > mean + self.config.sigma * deviation:
                found.append(f"{name} is {value:.4g}, a spike above {mean:.4g} +- {deviation:.2g}")
        return found

    def check(self):
        """Raise Stopped where the steps themselves end the run."""
        if self.stop:
            raise Stopped(self.stop, 2)

    def state(self) -> dict:
        return {"window": self.window, "left_out": self.left_out, "in_a_row": self.in_a_row}

    def load_state(self, state: dict):
        """Go on as the guard did that returned `state`."""
        vars(self).update({name: state[name] for name in self.state()})
