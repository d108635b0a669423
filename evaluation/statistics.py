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
    Raises ValueError where there is no such example.
    """
    both = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    if not both:
        raise ValueError("paired_difference: no example was judged both before and after")
    return mean_and_error([100 * (half_for_tie(a) - half_for_tie(b)) for b, a in both])


def bootstrap(values_per_run: Sequence[float | Sequence[float]], n: int = 1000, seed: int = 0) -> tuple[float, float]:
    """(mean, standard error) over several runs, the paper's "mean and standard error with bootstrap sampling" (Table 1).

    values_per_run: a figure a run, such as its win rate, or a list of values a run, whose mean then stands for it. Runs
    are drawn with replacement n times; the error is the deviation of the drawn means. Of few runs it is too small, by
    sqrt((runs − 1) / runs), 0.82 for three, and knows nothing of the instructions: bootstrap_crossed does.
    """
    if not values_per_run:
        raise ValueError("bootstrap: values_per_run is empty; give one value, or one list of values, for each run")
    means = [sum(v) / len(v) if isinstance(v, Sequence) else float(v) for v in values_per_run]
    rng = random.Random(seed)
    drawn = [sum(rng.choices(means, k=len(means))) / len(means) for _ in range(n)]
    centre = sum(drawn) / n
    return sum(means) / len(means), math.sqrt(sum((d - centre) ** 2 for d in drawn) / (n - 1))


def bootstrap_crossed(preferences_per_run: Sequence[Sequence[float | None]], n: int = 1000, seed: int = 0) -> tuple[float, float]:
    """(mean win rate in %, standard error) over several runs that answered the same instructions: both might have been others.

    preferences_per_run[r][i] is a judge's preference (win_rate's values) for run r and instruction i. Runs and instructions
    are drawn with replacement, the same draw of instructions for every drawn run (Owen 2007, the pigeonhole bootstrap).
    """
    wins = torch.tensor([[math.nan if p is None else 100 * (half_for_tie(p) - 1) for p in run] for run in preferences_per_run],
                        dtype=torch.float64)  # (runs, instructions)
    judged = ~wins.isnan()
    draw = torch.Generator().manual_seed(seed)
    counts = [torch.zeros(n, size, dtype=torch.float64).scatter_add_(
        1, torch.randint(size, (n, size), generator=draw), torch.ones(n, size, dtype=torch.float64)) for size in wins.shape]
    totals = ((counts[0] @ wins.nan_to_num(0.0)) * counts[1]).sum(1)
    means = totals / ((counts[0] @ judged.double()) * counts[1]).sum(1)
    return wins[judged].mean().item(), means[means.isfinite()].std().item()  # a draw may hold nothing that was judged


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


def paired_mean_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """(mean of after − before, its standard error) over the same examples."""
    return mean_and_error([a - b for b, a in zip(before, after, strict=True)])


def paired_ratio_difference(before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(after − before of Σ part / Σ whole, its standard error) over the same examples, each (part, whole).

    Of first order in the deviations, as ratio_and_error's: what an example adds to the one ratio less what it adds to the other.
    Raises ValueError where a side's wholes are all 0.
    """
    sides, ratios = [], []
    for pairs in (before, after):
        parts, wholes = zip(*pairs, strict=True)
        total = sum(wholes)
        if not total:
            raise ValueError("paired_ratio_difference: the wholes of one side are all 0, so it has no ratio")
        ratios.append(sum(parts) / total)
        sides.append([(p - ratios[-1] * w) * len(pairs) / total for p, w in pairs])
    _, error = paired_mean_difference(*sides)
    return ratios[1] - ratios[0], error


# -------------------------------------------------------------------------------------- a line with one bend (Figure 3)


class Bend(NamedTuple):
    """y = intercept + slope · x up to x = corner, then on with slope_after; corner None: no bend was found."""

    intercept: float
    slope: float
    corner: float | None
    slope_after: float
    r_squared: float  # of the part before the corner
    p: float | None   # how often a straight line with noise looks as bent as this; None: too few points to say

    def __call__(self, x: float) -> float:
        beyond = max(0.0, x - self.corner) if self.corner is not None else 0.0
        return self.intercept + self.slope * x + (self.slope_after - self.slope) * beyond


FEWEST = 5  # points on either side of a corner


def fit_bend(x: Sequence[float], y: Sequence[float], level: float = 0.05, draws: int = 499) -> Bend | None:
    """Least squares of a line with at most one bend; None for fewer than 3 points or all at one x.

    Equal points count once: runs that start from one model share their first. Every corner that leaves FEWEST points on
    either side is tried at 100 places. The largest gain of them is held against the largest that the same search finds in
    `draws` straight lines with normal noise at the same x (the ratio of residuals depends on neither line nor noise level):
    the bend stays where at most `level` of them gain as much, and a straight line is called bent in as many cases.
    """
    points = sorted(set(zip(x, y, strict=True)))
    if len(points) < 3 or points[0][0] == points[-1][0]:
        return None
    xs, ys = torch.tensor(points, dtype=torch.float64).unbind(1)
    ones, n = torch.ones_like(xs), len(points)
    straight = torch.stack([ones, xs], 1)
    corner = p = None
    if n >= 2 * FEWEST and xs[FEWEST - 1] < xs[-FEWEST]:
        places = torch.linspace(xs[FEWEST - 1].item(), xs[-FEWEST].item(), 100, dtype=torch.float64)
        bent = torch.stack([ones.expand(100, n), xs.expand(100, n), (xs - places[:, None]).clamp(min=0)], 2)
        noise = torch.randn(n, draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        columns = torch.cat([ys[:, None], noise], 1)  # (n, 1 + draws): the data first
        residuals = unexplained(bent, columns)        # (places, 1 + draws)
        gains = unexplained(straight[None], columns)[0] / residuals.amin(0).clamp(min=1e-300)
        p = (1 + (gains[1:] >= gains[0]).sum().item()) / (1 + draws)
        corner = places[residuals[:, 0].argmin()].item() if p <= level else None
    design = straight if corner is None else torch.cat([straight, (xs - corner).clamp(min=0)[:, None]], 1)
    weights = torch.linalg.lstsq(design, ys[:, None]).solution[:, 0].tolist()
    part = xs <= corner if corner is not None else ones.bool()
    rest = (ys[part] - weights[0] - weights[1] * xs[part]).square().sum().item()
    total = (ys[part] - ys[part].mean()).square().sum().item()
    return Bend(weights[0], weights[1], corner, sum(weights[1:]), 1 - rest / total if total else 1.0, p)


def unexplained(designs: Tensor, columns: Tensor) -> Tensor:
    """Residual sums of squares of each column (n, C) under each design (K, n, parameters): (K, C)."""
    q, _ = torch.linalg.qr(designs)
    return columns.square().sum(0) - (q.mT @ columns).square().sum(1)
