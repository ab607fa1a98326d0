"""A power law with a floor, L(N) = (N_c / N)^alpha + L_inf, fitted to losses of several runs a size, and judged.

measure/laws.py fits it (FLOOR) and draws its intervals. A fit is judged as well as made, because three parameters go
through much that is no power law.
"""

import numpy as np

from measure import laws
from measure.laws import FLOOR, chance_of_ratio, interval

ALPHAS = FLOOR.grids["alpha"]
DRAWS = 1000
LEVEL = 0.01            # of the tests


def fit(N, losses) -> laws.Fits:
    """The law of least squares through n > 3 losses."""
    return laws.fit(FLOOR, N, losses)


def draw_fits(N, losses, seed: int = 0) -> laws.Fits:
    """Fits of losses drawn anew around the law that fits `losses` best."""
    return laws.draw(fit(N, losses), N, seed=seed, draws=DRAWS)[0]


def find_parameters(fits: laws.Fits) -> dict[str, np.ndarray]:
    """{"alpha", "L_inf", "N_c": [R]}; N_c is not finite where alpha is tiny."""
    alpha, L_inf, A = (fits.parameters()[name] for name in ("alpha", "L_inf", "A"))
    with np.errstate(over="ignore"):
        return {"alpha": alpha, "L_inf": L_inf, "N_c": A ** (1 / alpha)}


def judge(N, losses, seed: int = 0) -> dict:
    """The fit, its 95 % intervals and a verdict on it:

    "no trend": no better than a constant (F test). "misfit": the mean losses of the sizes lie off the law by more than
    the noise between runs of one size explains (lack-of-fit F test) and by more than 5 % of what the law explains.
    "undetermined": the interval of alpha reaches an end of the grid, or spans a factor of 4. "fits": none of these.
    """
    N, losses = np.asarray(N, float), np.asarray(losses, float)
    found, drawn, n = fit(N, losses), find_parameters(draw_fits(N, losses, seed)), len(N)
    sizes = np.unique(N)
    means = np.array([losses[size == N].mean() for size in sizes])
    counts = np.array([(size == N).sum() for size in sizes])
    error, noise = found.error[0], sum(
        ((losses[size == N] - mean) ** 2).sum() for size, mean in zip(sizes, means))
    alone = ((losses - losses.mean()) ** 2).sum()
    trend = chance_of_ratio((alone - error) / 2 / (error / (n - 3)), 2, n - 3) if error > 0 else 0.0
    off, replicates = found.predict(sizes)[0] - means, n - len(sizes)
    lack = None
    if replicates and noise > 0 and len(sizes) > 3:
        lack = chance_of_ratio((counts * off**2).sum() / (len(sizes) - 3) / (noise / replicates), len(sizes) - 3,
                               replicates)
    low, high = interval(drawn["alpha"])
    if trend > LEVEL or found.parameters()["A"][0] == 0:
        verdict = "no trend"
    elif (lack is None or lack < LEVEL) and np.sqrt((off**2).mean()) > 0.05 * np.ptp(found.predict(sizes)[0]):
        verdict = "misfit"
    elif low <= ALPHAS[1] or high >= ALPHAS[-2] or high > 4 * low:
        verdict = "undetermined"
    else:
        verdict = "fits"
    return {**{name: float(value[0]) for name, value in find_parameters(found).items()}, "r2": float(1 - error / alone),
            "residual_sd": float(np.sqrt(error / (n - 3))),
            "noise_sd": float(np.sqrt(noise / replicates)) if replicates else None,
            "worst_miss": float(np.abs(off).max()), "p_trend": trend, "p_lack_of_fit": lack, "verdict": verdict,
            **{f"{name}_interval": list(interval(values)) for name, values in drawn.items()}}


def predict_largest(N, losses) -> dict | None:
    """What the law of the other sizes says of the largest, which it has not seen; None for fewer than five sizes."""
    N, losses = np.asarray(N, float), np.asarray(losses, float)
    others = N.max() > N
    if len(np.unique(N)) < 5:
        return None
    low, high = interval(draw_fits(N[others], losses[others]).predict(N.max())[:, 0])
    return {"predicted": float(fit(N[others], losses[others]).predict(N.max())[0, 0]), "interval": [low, high],
            "measured": float(losses[~others].mean())}
