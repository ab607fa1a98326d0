"""Laws of a loss over a share of the mix or a size, fitted to a few runs, and what each fit is worth.

    CMR     L(R) = b + a R^s                         a domain's loss over its share R of the mix (arXiv 2407.17467)
    REPLAY  F(p) = F0 (1 + B p)^-alpha               forgetting over the share p of replay (arXiv 2502.06042)
    DCPT    L(r) = E + B r^eta + C (r + eps)^-gamma  a text's loss over its own share r, at one size of the model and
                                                     one number of tokens (arXiv 2406.01375); short: without B r^eta
    FLOOR   L(N) = L_inf + A N^-alpha                loss over the size N of the model

For given exponents each law is a sum of columns times factors. So the exponents are searched on a grid that covers
their whole range, then nearer and nearer around its best point, and the factors are linear least squares in each point
of it, with those that may not be negative held at 0 where they would be.

How sure: losses are drawn anew around the fitted law, with noise of the residuals' variance, which is itself drawn anew
for its degrees of freedom (points minus factors and exponents), and each draw is fitted like the losses themselves.
With four runs that is one degree of freedom, and chance alone makes such residuals far too small or too large. So what
such a law usually misses counts beside them as two more, where published tables say how much that is.

Shapes: n points, G points of the grid, m factors, q exponents, R fits of as many draws.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

DRAWS, PRIOR_FREEDOM = 400, 2
# Exponents that are drawn so near to an end of their range are not determined by the points.
EDGE = 0.02


@dataclass(frozen=True)
class Law:
    name: str
    formula: str
    # The factors, and which of them may be negative.
    factors: tuple[str, ...]
    signed: tuple[str, ...]
    # {exponent or other parameter that is searched: its grid}
    grids: dict[str, np.ndarray]
    # (x [n], each of the searched [G, 1]) -> a column [G, n] for each factor
    columns: Callable
    # (each of the searched, each of the factors) -> {parameter of the formula: value}
    name_parameters: Callable
    # What it usually misses, as a share of the value; None: unknown.
    usual_error: float | None = None

    @property
    def parameters(self) -> int:
        return len(self.factors) + len(self.grids)


# R^s as (R^s - 1) / s, which is log R where s is 0: otherwise factors without bounds would cancel there. Where it
# predicted a share, its published misses are below 0.06 %.
CMR = Law("CMR", "L(R) = b + a R^s", ("level", "slope"), ("level", "slope"),
          {"s": np.concatenate([-np.geomspace(10, 0.02, 60), np.geomspace(0.02, 40, 80)])},
          lambda R, s: (np.ones_like(R * s), np.expm1(s * np.log(R)) / s),
          lambda s, level, slope: {"a": slope / s, "b": level - slope / s, "s": s}, usual_error=0.001)
# A fall over r is told by its size at r 0.1, -log of what is left there, and by its bend B = 1 / eps: B and the
# exponent would make up for each other. Of a bend near 0 the fall is exponential, and the exponent has no end.
BEND, FALL = np.geomspace(0.1, 1e6, 60), np.geomspace(0.01, 20, 40)


def falling(r, bend, fall):
    return np.exp(-fall * np.log1p(bend * r) / np.log1p(0.1 * bend))


def name_fall(bend, fall):
    return 1 / bend, fall / np.log1p(0.1 * bend)


# Published fits miss by 5 to 17 % of the forgetting (root mean square of logarithms).
REPLAY = Law("Bethune", "F(p) = F0 (1 + B p)^-alpha", ("F0",), (), {"bend": BEND, "fall": FALL},
             lambda p, bend, fall: (falling(p, bend, fall),),
             lambda bend, fall, F0: {"F0": F0, "B": bend, "alpha": name_fall(bend, fall)[1]}, usual_error=0.1)
DCPT_SHORT = Law("D-CPT, short", "L(r) = E + C (r + eps)^-gamma", ("E", "fallen"), ("E",),
                 {"bend": BEND[::2], "fall": FALL[::2]},
                 lambda r, bend, fall: (np.ones_like(r * bend), falling(r, bend, fall)),
                 lambda bend, fall, E, fallen: name_dcpt(bend, fall, E, fallen), usual_error=0.1)
DCPT = Law("D-CPT", "L(r) = E + B r^eta + C (r + eps)^-gamma", ("E", "B", "fallen"), ("E",),
           {"eta": np.geomspace(0.1, 10, 7), "bend": BEND[::6], "fall": FALL[::3]},
           lambda r, eta, bend, fall: (np.ones_like(r * bend), r**eta * np.ones_like(bend), falling(r, bend, fall)),
           lambda eta, bend, fall, E, B, fallen: name_dcpt(bend, fall, E, fallen) | {"B": B, "eta": eta},
           usual_error=0.1)
FLOOR = Law("power law with a floor", "L(N) = L_inf + A N^-alpha", ("L_inf", "A"), (),
            {"alpha": np.geomspace(0.02, 3, 500)}, lambda N, alpha: (np.ones_like(N * alpha), N**-alpha),
            lambda alpha, L_inf, A: {"L_inf": L_inf, "A": A, "alpha": alpha})


def name_dcpt(bend, fall, E, fallen):
    eps, gamma = name_fall(bend, fall)
    # Of a fall that is nearly exponential the exponent is so large that C has no value.
    with np.errstate(over="ignore"):
        return {"E": E, "C": fallen * eps**gamma, "eps": eps, "gamma": gamma}


@dataclass
class Fits:
    """R fits of one law, as arrays."""

    law: Law
    searched: np.ndarray            # [R, q]
    factors: np.ndarray             # [R, m]
    # Sum of the squared residuals, each divided by its point's scale
    error: np.ndarray               # [R]
    # Of the points minus parameters, and of what the law usually misses
    freedom: int = 0

    def predict(self, x) -> np.ndarray:
        """[R, n]"""
        columns = self.law.columns(np.atleast_1d(np.asarray(x, float)), *self.searched.T[..., None])
        return sum(factor[:, None] * column for factor, column in zip(self.factors.T, columns))

    def parameters(self) -> dict[str, np.ndarray]:
        """{parameter of the law's formula: [R]}"""
        return self.law.name_parameters(*self.searched.T, *self.factors.T)


def solve(law: Law, x: np.ndarray, y: np.ndarray, scale: np.ndarray, grid: np.ndarray) -> Fits:
    """The best point of a grid [G, q] for each row of y [R, n]. scale [n]: how far off a point may be."""
    columns = np.stack(np.broadcast_arrays(*law.columns(x, *grid.T[..., None])), -1) / scale[:, None]       # [G, n, m]
    y = y / scale
    best = Fits(law, np.empty((len(y), grid.shape[1])), np.zeros((len(y), len(law.factors))), np.full(len(y), np.inf))
    bounded = [i for i, name in enumerate(law.factors) if name not in law.signed]
    # The constrained optimum is the best of the plain ones in which some bounded factors are 0 and no other is below.
    for left_out in itertools.chain.from_iterable(itertools.combinations(bounded, k) for k in range(len(bounded) + 1)):
        kept = [i for i in range(len(law.factors)) if i not in left_out]
        if not kept:
            continue
        part = columns[:, :, kept]
        # Columns of one length, so that the cut-off of the pseudo-inverse is about their angles alone.
        length = np.linalg.norm(part, axis=1, keepdims=True)
        part = part / np.where(length > 0, length, 1)
        inverse = np.linalg.pinv(part, rcond=1e-13)                                                         # [G, k, n]
        factors = (y @ inverse.reshape(-1, len(x)).T).reshape(len(y), len(grid), len(kept))                 # [R, G, k]
        allowed = (factors[..., [kept.index(i) for i in bounded if i in kept]] >= 0).all(-1)
        allowed &= np.isfinite(factors).all(-1)
        along = (y @ part.transpose(0, 2, 1).reshape(-1, len(x)).T).reshape(factors.shape)
        # The more of y lies along the columns, the less is left.
        at = np.where(allowed, (along * factors).sum(-1), -np.inf).argmax(1)                                # [R]
        chosen = factors[np.arange(len(y)), at]
        # Once more from the residuals: a difference of large values would be rounded.
        error = ((y - (part[at] @ chosen[..., None])[..., 0]) ** 2).sum(-1)
        rows = np.flatnonzero(allowed[np.arange(len(y)), at] & (error < best.error))
        best.error[rows], best.searched[rows], best.factors[rows] = error[rows], grid[at[rows]], 0
        best.factors[np.ix_(rows, kept)] = chosen[rows] / length[at[rows], 0]
    return best


def refine(law: Law, x, y, scale, start: np.ndarray) -> Fits:
    """The best fit of one y [1, n] near the searched values `start` [q]: by Levenberg-Marquardt over the searched ones
    alone, the factors being solved for in each point (variable projection)."""
    grids, steps = list(law.grids.values()), np.eye(len(start))
    ends = np.array([len(grid) - 1 for grid in grids])

    # Places on the grids: 3.5 is halfway between the values 3 and 4.
    def solve_at(places):
        found = solve(law, x, y, scale, np.array([[np.interp(place, np.arange(len(grid)), grid)
                                                   for place, grid in zip(places, grids)]]))
        return found, ((y - found.predict(x)) / scale)[0]

    at = np.array([np.interp(value, grid, np.arange(len(grid))) for value, grid in zip(start, grids)])
    (found, off), damping = solve_at(at), 1e-3
    for _ in range(200):
        # A step into the grid, also from its last point.
        h = np.where(at < ends, 1e-5, -1e-5)
        slopes = np.stack([(solve_at(at + step * h)[1] - off) / (step @ h) for step in steps], 1)
        square = slopes.T @ slopes
        damped = square + damping * (np.diag(square.diagonal()) + 1e-30 * steps)
        move = np.linalg.lstsq(damped, -slopes.T @ off, None)[0]
        tried = np.clip(at + np.clip(move, -2, 2), 0, ends)
        better, residual = solve_at(tried)
        gain = found.error[0] - better.error[0]
        if gain > 0:
            at, found, off, damping = tried, better, residual, damping / 10
        else:
            damping *= 10
        # Where the points lie off the law, the last digits of its error are worth no more steps.
        if damping > 1e8 or 0 < gain < 1e-9 * found.error[0]:
            break
    return found


def full_grid(law: Law) -> np.ndarray:
    return np.stack(np.meshgrid(*law.grids.values(), indexing="ij"), -1).reshape(-1, len(law.grids))


def fit(law: Law, x, y, scale=None) -> Fits:
    """One fit. scale: how far off each point may be in proportion to the others; default: all the same."""
    x, y = np.asarray(x, float), np.asarray(y, float)[None]
    scale = np.ones_like(x) if scale is None else np.asarray(scale, float)
    coarse = solve(law, x, y, scale, full_grid(law))
    found = refine(law, x, y, scale, coarse.searched[0])
    found.freedom = max(0, len(x) - law.parameters)
    return found


def draw(found: Fits, x, scale=None, seed: int = 0, draws: int = DRAWS) -> tuple[Fits, np.ndarray]:
    """(fits of `draws` draws around a fit to the points x, the noise [R] of each draw in units of scale).

    AssertionError where no degree of freedom and no usual error says how large the noise is.
    """
    law, rng, x = found.law, np.random.default_rng(seed), np.asarray(x, float)
    scale = np.ones_like(x) if scale is None else np.asarray(scale, float)
    prior = 0 if law.usual_error is None else PRIOR_FREEDOM
    freedom = found.freedom + prior
    assert freedom > 0, "nothing says how large the noise is"
    variance = found.error[0] + prior * (law.usual_error or 0) ** 2
    noise = np.sqrt(variance / rng.chisquare(freedom, draws))
    y = found.predict(x) + noise[:, None] * scale * rng.standard_normal((draws, len(x)))
    return solve(law, x, y, scale, full_grid(law)), noise


def interval(values, level: float = 0.95) -> tuple[float, float]:
    """(low, high) around the middle of the values, two of them, which may be infinite."""
    values = np.asarray(values, float)
    return (float(np.quantile(values, (1 - level) / 2, method="lower")),
            float(np.quantile(values, (1 + level) / 2, method="higher")))


def find_share(fits: Fits, at_most: float, limit: float, points: int = 1001) -> np.ndarray:
    """[R] the smallest share from 0 to `limit` at which each fit is at most `at_most`; infinite where none is."""
    shares = np.linspace(0, limit, points)
    reached = fits.predict(shares) <= at_most
    # Between two points the law is as good as straight.
    return np.where(reached.any(1), shares[reached.argmax(1)], np.inf)


def find_undetermined(drawn: Fits) -> list[str]:
    """The searched parameters that the points do not determine: a 95 % interval reaches an end of the range."""
    found = []
    for i, (name, grid) in enumerate(drawn.law.grids.items()):
        low, high = np.interp(interval(drawn.searched[:, i]), grid, np.linspace(0, 1, len(grid)))
        if low <= EDGE or high >= 1 - EDGE:
            found.append(name)
    return found


def predict_left_out(law: Law, x, y, scale=None) -> list[dict]:
    """[{"x", "measured", "predicted"}] of each inner x, by the law fitted to the points at all others."""
    x, y, found = np.asarray(x, float), np.asarray(y, float), []
    scale = np.ones_like(x) if scale is None else np.asarray(scale, float)
    for value in np.unique(x)[1:-1]:
        others = x != value
        one = fit(law, x[others], y[others], scale[others])
        found.append({"x": float(value), "measured": float(y[~others].mean()),
                      "predicted": float(one.predict(value)[0, 0])})
    return found


def predict_runs(found: Fits, x, scale, at: float, at_scale: float) -> tuple[float, float]:
    """(low, high) of what a run at `at` would give, by a law fitted to the points x: the law's own interval and a run's
    noise around it."""
    drawn, noise = draw(found, x, scale)
    return interval(drawn.predict(at)[:, 0] + noise * at_scale * np.random.default_rng(1).standard_normal(len(noise)))


def chance_of_ratio(ratio: float, above: int, below: int, seed: int = 0, draws: int = 100_000) -> float:
    """P(F >= ratio), F distributed with (above, below) degrees of freedom; by simulation, to some 0.1 %."""
    rng = np.random.default_rng(seed)
    drawn = rng.chisquare(above, draws) / above / (rng.chisquare(below, draws) / below)
    return float((drawn >= ratio).mean())
