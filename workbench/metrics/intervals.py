"""Intervals of a share, of a paired change of shares, and of a mean, from the items that were read and
nothing else.
"""

from __future__ import annotations

import math

from scipy import special  # scipy.stats takes a second to import, which the first look would wait for
from torch import Tensor

from workbench.metrics.estimate import Estimate


def normal_quantile(level: float) -> float:
    """Return how many standard errors hold the middle `level` of a normal variable."""
    return float(special.ndtri((1 + level) / 2))


def student_quantile(level: float, freedom: int) -> float:
    """Return the same of Student's t with so many degrees of freedom."""
    return float(special.stdtrit(freedom, (1 + level) / 2))


def proportion(successes: Tensor, level: float) -> Estimate:
    """Return the mean of 0/1 values [items] with the interval of Wilson (1927), within [0, 1]."""
    total = len(successes)
    share, z = int(successes.sum()) / total, normal_quantile(level)
    centre, stretch = share + z**2 / (2 * total), 1 + z**2 / total
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return Estimate(share, max(0.0, (centre - half) / stretch), min(1.0, (centre + half) / stretch))


def paired_proportions(before: Tensor, after: Tensor, level: float) -> Estimate:
    """Return mean(after - before) of paired 0/1 values with the interval of Bonett and Price (2012), clipped
    to [-1, 1].
    """
    total = len(before)
    gained, lost = int(((after == 1) & (before == 0)).sum()), int(((after == 0) & (before == 1)).sum())
    up, down = (gained + 1) / (total + 2), (lost + 1) / (total + 2)
    half = normal_quantile(level) * math.sqrt((up + down - (up - down) ** 2) / (total + 2))
    return Estimate((gained - lost) / total, max(-1.0, up - down - half), min(1.0, up - down + half))


def mean(values: Tensor, weight: Tensor, level: float, widening: float = 1.0) -> Estimate:
    """Return the weighted mean over items, values and weight [items], with Student's t interval on the
    weighted residuals, `widening` times as wide.
    """
    total = weight.sum()
    average = float((values * weight).sum() / total)
    if not math.isfinite(average):
        return Estimate(math.inf, math.inf, math.inf)
    error = math.sqrt(variance(values, weight) / len(values))
    half = widening * student_quantile(level, len(values) - 1) * error
    return Estimate(average, average - half, average + half)


def variance(values: Tensor, weight: Tensor) -> float:
    """Return the sample variance of one item's part in the weighted mean of values [items] (of a ratio: its
    linearised residual, Cochran 1977, section 6.4).
    """
    average = (values * weight).sum() / weight.sum()
    residual = weight * (values - average) * len(values) / weight.sum()
    return float(residual.square().sum() / (len(values) - 1))
