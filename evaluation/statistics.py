# SPDX-License-Identifier: MIT
"""The statistics of the paper's tables and figures, each with its standard error. Copy it alone: it needs torch only.

Win rates as AlpacaEval counts them, paired differences, Table 1's bootstrap over runs, ratios whose errors count responses and
not tokens, and the line with one bend that Figure 3's reward over √KL is held against.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def win_rate(preferences: Sequence[float | None]) -> tuple[float, float]:
    """(mean in %, standard error in %) of the candidate's wins.

    A preference is 1 for the reference, 2 for the candidate, 0 or 1.5 for a tie, which counts half; values between 1
    and 2 are a weighted judge's. None (unparsable) is left out. As AlpacaEval: mean of preference − 1, and the sample
    deviation over sqrt(n). Raises ValueError when nothing is left or a value is neither.
    """
    judged = [half_for_tie(p) for p in preferences if p is not None]
    if not judged:
        raise ValueError("win_rate: no preference is left; None marks a judgement that could not be read")
    outside = [p for p in judged if not 1 <= p <= 2]
    if outside:
        raise ValueError(f"win_rate: preference {outside[0]} must be 0 (tie) or from 1 (reference) to 2 (candidate)")
    return mean_and_error([100 * (p - 1) for p in judged])


def half_for_tie(preference: float) -> float:
    """AlpacaEval writes a tie as 0, weighted judges as 1.5: both are half a win."""
    return 1.5 if preference == 0 else float(preference)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error of the mean); the error of a single value is 0."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, 0.0
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def paired_difference(before: Sequence[float | None], after: Sequence[float | None]) -> tuple[float, float]:
    """(after − before in win-rate points, its standard error) over the examples that both judged.

    Both models answered the same instructions, so the difference example by example varies less than two win rates do.
    """
    both = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    return mean_and_error([100 * (half_for_tie(a) - half_for_tie(b)) for b, a in both])


def bootstrap(values_per_run: Sequence[float | Sequence[float]], n: int = 1000, seed: int = 0) -> tuple[float, float]:
    """(mean, standard error) over several runs, the paper's "mean and standard error with bootstrap sampling" (Table 1).

    values_per_run: a figure a run, such as its win rate, or a list of values a run, whose mean then stands for it. Runs
    are drawn with replacement n times; the error is the deviation of the drawn means.
    """
    if not values_per_run:
        raise ValueError("bootstrap: values_per_run is empty; give one value, or one list of values, for each run")
    means = [sum(v) / len(v) if isinstance(v, Sequence) else float(v) for v in values_per_run]
    rng = random.Random(seed)
    drawn = [sum(rng.choices(means, k=len(means))) / len(means) for _ in range(n)]
    centre = sum(drawn) / n
    return sum(means) / len(means), math.sqrt(sum((d - centre) ** 2 for d in drawn) / (n - 1))


def ratio_and_error(totals: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """(Σ totals / Σ counts, standard error): a mean per token or per fact, when examples have several each.

    Tokens of one response are not independent, so the error counts responses (the ratio estimator), not tokens.
    """
    m, n = len(counts), sum(counts)
    if n == 0:
        return math.nan, math.nan
    ratio = sum(totals) / n
    spread = sum((t - ratio * c) ** 2 for t, c in zip(totals, counts, strict=True))
    return ratio, math.sqrt(spread * m / max(1, m - 1)) / n


# -------------------------------------------------------------------------------------- a line with one bend (Figure 3)


class Bend(NamedTuple):
    """y = intercept + slope · x up to x = corner, then on with slope_after; corner None: one line fits as well."""

    intercept: float
    slope: float
    corner: float | None
    slope_after: float
    r_squared: float  # of the part before the corner

    def __call__(self, x: float) -> float:
        beyond = max(0.0, x - self.corner) if self.corner is not None else 0.0
        return self.intercept + self.slope * x + (self.slope_after - self.slope) * beyond


def fit_bend(x: Sequence[float], y: Sequence[float], fewest: int = 3) -> Bend | None:
    """Least squares of a line with at most one bend; None for fewer than 3 points or all at one x.

    Every corner that leaves `fewest` points on either side is tried at 200 places. The bend stays where BIC, which charges
    for its two further parameters, prefers it to the straight line.
    """
    xs, ys = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    if len(x) < 3 or xs.max() == xs.min():
        return None
    n = len(x)

    def solve(corner: float | None) -> tuple[float, Tensor]:
        columns = [torch.ones_like(xs), xs] + ([(xs - corner).clamp(min=0)] if corner is not None else [])
        design = torch.stack(columns, 1)
        weights = torch.linalg.lstsq(design, ys[:, None]).solution[:, 0]
        return (design @ weights - ys).square().sum().item(), weights

    def bic(residual: float, parameters: int) -> float:
        return n * math.log(max(residual, 1e-12) / n) + parameters * math.log(n)

    residual, weights = solve(None)
    order = xs.sort().values
    corner = None
    if n >= 2 * fewest:
        places = torch.linspace(order[fewest - 1].item(), order[-fewest].item(), 200).tolist()
        bent = min(((*solve(place), place) for place in places), key=lambda fit: fit[0])
        if bic(bent[0], 4) < bic(residual, 2):
            _, weights, corner = bent
    intercept, slope = weights[0].item(), weights[1].item()
    before = xs <= corner if corner is not None else torch.ones_like(xs, dtype=torch.bool)
    part = ys[before]
    unexplained = (part - intercept - slope * xs[before]).square().sum().item()
    total = (part - part.mean()).square().sum().item()
    return Bend(intercept, slope, corner, slope + weights[2].item() if corner is not None else slope,
                1 - unexplained / total if total else 1.0)
