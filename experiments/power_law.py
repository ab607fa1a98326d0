"""A power law with a floor, L(N) = (N_c / N)^alpha + L_inf, fitted to losses, and what a fit is worth.

For a given alpha the law is a straight line in N^-alpha, so alpha is searched on a grid and the rest is linear least
squares. Intervals come from a parametric bootstrap: losses are drawn anew around the fitted law, with normal noise of
the residuals' variance, which is itself drawn anew for its degrees of freedom (points minus 3). L_inf is not below 0.

A fit is judged as well as made, because three parameters go through much that is no power law. Shapes: n losses,
G alphas of the grid, R draws.
"""

from dataclasses import dataclass

import numpy as np

ALPHAS = np.geomspace(0.02, 3, 500)
DRAWS = 1000
LEVEL = 0.01            # of the tests


@dataclass
class Fit:
    alpha: float
    L_inf: float
    # A of L_inf + A (N / centre)^-alpha; N_c is not finite where alpha is tiny
    amplitude: float
    centre: float
    residual_sd: float
    # of 1 that the losses vary about their mean
    r2: float

    @property
    def N_c(self) -> float:
        return self.centre * self.amplitude ** (1 / self.alpha) if self.amplitude > 0 else 0.0

    def predict(self, N):
        return self.L_inf + self.amplitude * (np.asarray(N, float) / self.centre) ** -self.alpha


def search(N: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """[R, 4] of alpha, L_inf, amplitude and squared error for each row of `losses` [R, n]; L_inf, amplitude >= 0."""
    x = (N / np.exp(np.log(N).mean())) ** -ALPHAS[:, None]                       # [G, n]
    mean_x, mean_y = x.mean(1), losses.mean(1)
    spread_x, spread_y = ((x - mean_x[:, None]) ** 2).sum(1), ((losses - mean_y[:, None]) ** 2).sum(1)
    shared = (losses - mean_y[:, None]) @ (x - mean_x[:, None]).T                # [R, G]
    slope = np.maximum(shared / spread_x, 0)
    floor = mean_y[:, None] - slope * mean_x
    error = spread_y[:, None] - 2 * slope * shared + slope**2 * spread_x
    # Below a floor of 0 the line goes through 0.
    through = losses @ x.T / (x**2).sum(1)
    error_0 = (losses**2).sum(1)[:, None] - through**2 * (x**2).sum(1)
    below = floor < 0
    slope, floor, error = (np.where(below, a, b) for a, b in ((through, slope), (0.0, floor), (error_0, error)))
    best = error.argmin(1)
    rows = np.arange(len(losses))
    return np.stack([ALPHAS[best], floor[rows, best], slope[rows, best], error[rows, best]], 1)


def fit(N, losses) -> Fit:
    """The law of least squares through n > 3 losses."""
    N, losses = np.asarray(N, float), np.asarray(losses, float)
    alpha, floor, slope, _ = search(N, losses[None])[0]
    found = Fit(alpha, floor, slope, np.exp(np.log(N).mean()), 0.0, 0.0)
    # Once more from the residuals: the search's own sum of squares is a difference of large values.
    error = ((losses - found.predict(N)) ** 2).sum()
    found.residual_sd = float(np.sqrt(error / (len(N) - 3)))
    found.r2 = float(1 - error / ((losses - losses.mean()) ** 2).sum())
    return found


def draw_fits(N, losses, seed: int = 0) -> list[Fit]:
    """Fits of losses drawn anew around the law that fits `losses` best."""
    N, found, rng = np.asarray(N, float), fit(N, losses), np.random.default_rng(seed)
    freedom = len(N) - 3
    sd = found.residual_sd * np.sqrt(freedom / rng.chisquare(freedom, DRAWS))[:, None]
    drawn = found.predict(N) + sd * rng.standard_normal((DRAWS, len(N)))
    return [Fit(alpha, floor, slope, found.centre, 0.0, 0.0) for alpha, floor, slope, _ in search(N, drawn)]


def interval(values, level: float = 0.95) -> tuple[float, float]:
    low, high = np.quantile(np.asarray(values, float), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def chance_of_ratio(ratio: float, above: int, below: int, seed: int = 0, draws: int = 100_000) -> float:
    """P(F >= ratio), F distributed with (above, below) degrees of freedom; by simulation, to some 0.1 %."""
    rng = np.random.default_rng(seed)
    drawn = rng.chisquare(above, draws) / above / (rng.chisquare(below, draws) / below)
    return float((drawn >= ratio).mean())


def judge(N, losses, seed: int = 0) -> dict:
    """The fit, its 95 % intervals and a verdict on it:

    "no trend": no better than a constant (F test). "misfit": the mean losses of the sizes lie off the law by more than
    the noise between runs of one size explains (lack-of-fit F test) and by more than 5 % of what the law explains.
    "undetermined": the interval of alpha reaches an end of the grid, or spans a factor of 4. "fits": none of these.
    """
    N, losses = np.asarray(N, float), np.asarray(losses, float)
    found, drawn, n = fit(N, losses), draw_fits(N, losses, seed), len(N)
    sizes = np.unique(N)
    means = np.array([losses[size == N].mean() for size in sizes])
    counts = np.array([(size == N).sum() for size in sizes])
    error, noise = ((losses - found.predict(N)) ** 2).sum(), sum(
        ((losses[size == N] - mean) ** 2).sum() for size, mean in zip(sizes, means))
    alone = ((losses - losses.mean()) ** 2).sum()
    trend = chance_of_ratio((alone - error) / 2 / (error / (n - 3)), 2, n - 3) if error > 0 else 0.0
    off, replicates = found.predict(sizes) - means, n - len(sizes)
    lack = None
    if replicates and noise > 0 and len(sizes) > 3:
        lack = chance_of_ratio((counts * off**2).sum() / (len(sizes) - 3) / (noise / replicates), len(sizes) - 3,
                               replicates)
    low, high = interval([one.alpha for one in drawn])
    if trend > LEVEL or found.amplitude == 0:
        verdict = "no trend"
    elif (lack is None or lack < LEVEL) and np.sqrt((off**2).mean()) > 0.05 * np.ptp(found.predict(sizes)):
        verdict = "misfit"
    elif low <= ALPHAS[1] or high >= ALPHAS[-2] or high > 4 * low:
        verdict = "undetermined"
    else:
        verdict = "fits"
    return {"alpha": found.alpha, "L_inf": found.L_inf, "N_c": found.N_c, "r2": found.r2,
            "residual_sd": found.residual_sd, "noise_sd": float(np.sqrt(noise / replicates)) if replicates else None,
            "worst_miss": float(np.abs(off).max()), "p_trend": trend, "p_lack_of_fit": lack, "verdict": verdict,
            "alpha_interval": [low, high], "L_inf_interval": list(interval([one.L_inf for one in drawn])),
            "N_c_interval": list(interval([one.N_c for one in drawn]))}


def predict_largest(N, losses) -> dict | None:
    """What the law of the other sizes says of the largest, which it has not seen; None for fewer than five sizes."""
    N, losses = np.asarray(N, float), np.asarray(losses, float)
    others = N.max() > N
    if len(np.unique(N)) < 5:
        return None
    low, high = interval([one.predict(N.max()) for one in draw_fits(N[others], losses[others])])
    return {"predicted": float(fit(N[others], losses[others]).predict(N.max())), "interval": [low, high],
            "measured": float(losses[~others].mean())}
