"""How tests judge what comes by chance: with its own sampling error, so that the last digits of a
processor decide nothing.

A share of trials is compared with what is promised by the exact binomial distribution, a mean by its
standard error. Where a promise is kept a check fails once in 10,000 draws (`ALPHA`), and draws are fixed by a
seed. A check must also be able to fail: each names a fault by the rate at which trials would succeed with it,
and refuses to judge by so few trials that they would miss the fault more than once in 1,000 (`POWER`). Where
nothing else is said, the fault is an interval of half the width.

Trials are independent. Their rates may differ, as from one recipe to another: that makes a sum less
uncertain, not more (Hoeffding 1956), so that the checks stay right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

ALPHA = 1e-4  # how often a check fails although the promise is kept
POWER = 0.999  # how often, at least, it fails where there is the fault


def half_as_wide(level: float) -> float:
    """Return how often normal intervals of half the width hold, of those that hold at `level`."""
    return float(2 * stats.norm.cdf(stats.norm.ppf((1 + level) / 2) / 2) - 1)


def least(trials: int, rate: float) -> int:
    """Return the fewest successes that trials at `rate` have, but for once in 10,000 draws."""
    return int(stats.binom.ppf(ALPHA, trials, rate))


def assert_at_least(
    successes: float, trials: int, rate: float, *, fault: float | None = None, about: object = ""
) -> None:
    """Check that trials succeed at `rate` or more often; at the rate `fault` this would be found out."""
    bound, wrong = least(trials, rate), half_as_wide(rate) if fault is None else fault
    power = float(stats.binom.cdf(bound - 1, trials, wrong))
    assert power >= POWER, (
        f"{trials} trials are too few: they tell a rate of {wrong:.4g} from {rate:.4g} with probability "
        f"{power:.4g}, not {POWER} {about}"
    )
    assert successes >= bound, (
        f"{successes:g} of {trials} trials, {successes / trials:.4g}, where {rate:.4g} is promised: fewer "
        f"than {bound} come by chance once in {1 / ALPHA:,.0f} draws {about}"
    )


def assert_at_most(successes: float, trials: int, rate: float, *, fault: float, about: object = "") -> None:
    """Check that trials succeed at `rate` or less often; at the higher rate `fault` it would be found out."""
    assert_at_least(trials - successes, trials, 1 - rate, fault=1 - fault, about=f"(of the opposite) {about}")


def assert_rate(successes: float, trials: int, rate: float, *, fault: float, about: object = "") -> None:
    """Check that trials succeed at `rate`; one that is off by `fault` either way would be found out."""
    assert_at_least(successes, trials, rate, fault=rate - fault, about=about)
    assert_at_most(successes, trials, rate, fault=rate + fault, about=about)


def assert_more_often(one: Sequence[bool], other: Sequence[bool], about: object = "") -> None:
    """Check that the first of two kinds succeeds more often, by the paired trials in which they differ."""
    won, lost = (
        int(np.sum(np.asarray(a, bool) & ~np.asarray(b, bool))) for a, b in ((one, other), (other, one))
    )
    chance = float(stats.binom.sf(won - 1, won + lost, 0.5))
    assert chance < ALPHA, f"{won} trials against {lost}: comes by chance once in {1 / chance:,.0f} {about}"


def reach(truth: float, value: float, low: float, high: float) -> float:
    """Return how far the truth lies from an interval's value, 1 at its end."""
    end = high if truth > value else low
    return 0.0 if truth == value else (truth - value) / (end - value) if end != value else np.inf


def assert_covers(reaches: Sequence[float], level: float, *, narrow: float = 0.5, about: object = "") -> None:
    """Check that intervals hold the truth at `level`, and that intervals of `narrow` times the width would be
    found out on the same trials."""
    distances, trials = np.asarray(reaches), len(reaches)
    held, fault = int((distances <= 1).sum()), int((distances <= narrow).sum())
    assert fault < least(trials, level), (
        f"{trials} trials do not find out intervals {narrow:g} times as wide: {fault} hold, {level:.4g} "
        f"is promised {about}"
    )
    assert held >= least(trials, level), (
        f"{held} of {trials} intervals hold, {held / trials:.4g}, where {level:.4g} is promised: fewer than "
        f"{least(trials, level)} come by chance once in {1 / ALPHA:,.0f} draws {about}"
    )


def errors_from(values: Sequence[float], bound: float) -> float:
    """Return by how many of its standard errors the mean of values lies above a bound."""
    measured = np.asarray(values, float)
    return float((measured.mean() - bound) / (measured.std(ddof=1) / len(measured) ** 0.5))


def limit(count: int) -> float:
    """Return how many standard errors a mean is off once in 10,000 draws, by Student's t."""
    return float(stats.t.ppf(1 - ALPHA, count - 1))


def assert_mean_not_above(values: Sequence[float], bound: float = 0.0, about: object = "") -> None:
    """Check that a mean is not shown to lie above a bound."""
    errors = errors_from(values, bound)
    assert errors <= limit(len(values)), (
        f"mean {np.mean(values):.4g}, {errors:.3g} errors above {bound:g} {about}"
    )


def assert_mean_below(values: Sequence[float], bound: float = 0.0, about: object = "") -> None:
    """Check that a mean is shown to lie below a bound."""
    errors = errors_from(values, bound)
    assert errors <= -limit(len(values)), (
        f"mean {np.mean(values):.4g}, {errors:.3g} errors above {bound:g} {about}"
    )
