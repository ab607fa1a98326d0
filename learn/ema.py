"""EMA: an exponential moving average of the weights, from the base on, is evaluated last and exported.

    mean = decay * mean + (1 - decay) * weights          after each step

Against forgetting: arXiv 2506.00288. With decay 0.9, a weight that is 1.0 in the base and 0.0 from the first step on
has the means 0.9, 0.81, 0.729, ...: the average of about the last 1 / (1 - decay) steps.
"""

import contextlib
from dataclasses import dataclass

import torch

from core.config import setting
from learn.method import Method, trainable_parameters, upcast_dtype


@dataclass
class EMAConfig:
    decay: float = setting(0.0, at_least=0, below=1)
    """weight of the old mean in each step's new one. 0: off; 0.999 averages over about 1,000 steps"""


class EMA(Method):
    """Keeps the mean of each trainable parameter in fp32 or wider, laid out over the ranks like the parameter."""

    def model_built(self, model):
        self.mean = {name: p.detach().to(upcast_dtype(p), copy=True) for name, p in trainable_parameters(model).items()}
        self.tensors = self.mean

    @torch.no_grad()
    def after_step(self, step, model, optimizer, moved=True):
        for name, p in model.named_parameters() if moved else ():
            if name in self.mean:
                self.mean[name].lerp_(p.detach().to(self.mean[name].dtype), 1 - self.config.decay)

    @contextlib.contextmanager
    def exported(self, model):
        """Inside, the model holds the means; afterwards it has its weights back, bit for bit."""
        averaged = [(p, p.detach().clone(), self.mean[name]) for name, p in model.named_parameters()
                    if name in self.mean]
        with torch.no_grad():
            for p, _, mean in averaged:
                p.copy_(mean)
            try:
                yield model
            finally:
                for p, weights, _ in averaged:
                    p.copy_(weights)
