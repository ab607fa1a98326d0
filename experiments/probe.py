"""A linear probe: can logistic regression read off a model's frozen states which text a passage is from?

Passages of the same number of tokens are cut out of files, a class each; the states are means over their tokens after
the final norm. The first two thirds of each file train the probe and the last third tests it, so that neighbours stay
on one side. Shapes: n passages, T tokens, D model width, K classes.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parent))

import scratch  # noqa: F401

from core.errors import UserError


def cut_passages(tokenizer, files: dict[str, str], T: int, per_class: int, separator: str | None = None) -> tuple:
    """(tokens [n, T], labels [n], is_test [n]) of `per_class` passages of each file, spread evenly over it."""
    tokens, labels, is_test = [], [], []
    for label, (name, file) in enumerate(files.items()):
        text = Path(file).read_text(encoding="utf-8")
        ids = np.asarray(tokenizer.encode(text.replace(separator, "\n") if separator else text))
        if len(ids) < per_class * T:
            raise UserError(f"{name} ({file}) has {len(ids):,} tokens, too few for {per_class} passages of {T}")
        starts = np.linspace(0, len(ids) - T, per_class).astype(int)
        tokens.append(np.stack([ids[start:start + T] for start in starts]))
        labels.append(np.full(per_class, label))
        is_test.append(np.arange(per_class) >= 2 * per_class // 3)
    return torch.from_numpy(np.concatenate(tokens).astype(np.int64)), np.concatenate(labels), np.concatenate(is_test)


@torch.no_grad()
def mean_states(model, tokens: torch.Tensor, causal: bool = True, B: int = 64) -> np.ndarray:
    """[n, D], float64: the mean over its tokens of a passage's states after the final norm."""
    model.eval()
    return torch.cat([model(part, causal=causal).double().mean(1) for part in tokens.split(B)]).numpy()


def decorrelate(states: np.ndarray, train: np.ndarray) -> np.ndarray:
    """The principal components [n, up to D] of states [n, D], each with a variance of 1 over the `train` ones. Where
    states vary in one direction far more than in others, a penalty on weights would hide what the others tell."""
    x = states - states[train].mean(0)
    _, scale, directions = np.linalg.svd(x[train], full_matrices=False)
    kept = scale > 1e-9 * scale[0]
    return x @ (directions[kept].T / scale[kept]) * np.sqrt(train.sum())


def fit_probe(states: np.ndarray, labels: np.ndarray, is_test: np.ndarray, penalty: float = 1e-3) -> dict:
    """Multinomial logistic regression on decorrelated states: {"accuracy" on the test passages, "loss" (train, with the
    penalty / 2 |weights|^2), "weights" [up to D + 1, K], the last row the bias, which has no penalty}."""
    train = ~is_test
    x = decorrelate(states, train)
    x = torch.from_numpy(np.concatenate([x, np.ones((len(x), 1))], 1))
    y, w = torch.from_numpy(labels), torch.zeros(x.shape[1], labels.max() + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x[train] @ w, y[train]) + penalty / 2 * (w[:-1]**2).sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    right = ((x @ w).argmax(1) == y).numpy()
    return {"accuracy": float(right[is_test].mean()), "loss": closure().item(), "weights": w.detach().numpy()}


def count_directions(states: np.ndarray) -> float:
    """In how many directions states [n, D] vary, each feature scaled to a variance of 1: (sum of the variances)^2 / sum
    of their squares, over the principal components. D where all vary alike, 1 where one direction has everything."""
    x = states - states.mean(0)
    scale = x.std(0)
    variances = np.linalg.svd(x / np.where(scale > 0, scale, 1), compute_uv=False) ** 2
    return float(variances.sum() ** 2 / (variances ** 2).sum())
