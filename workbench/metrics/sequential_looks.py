"""What several looks at growing samples cost: the level that each interval needs so that all hold together.

The means of the first n_1 < n_2 < ... items of one random order are, as near as the central limit theorem
goes, a random walk: their correlations are sqrt(n_i / n_j), so that one look knows something of the next, and
all hold together more often than Bonferroni's sum says. Equal levels at every look are Pocock's (1977), the
probability is integrated from look to look as by Armitage, McPherson and Rowe (1969), here for the sample
sizes there are. By Sidak (1967) no correlations would be worse than none at all; what a control
(`workbench.metrics.control_variates`) does to them makes them larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import special

Numbers = NDArray[np.float64]
NODES = 48  # of each integral, or as many as give two to each standard deviation of a step
HALVINGS = 36


def joint_level(counts: Sequence[int], confidence: float) -> float:
    """Return the level of each interval, in (confidence, 1), with which those after `counts` items (growing)
    hold together at `confidence`.
    """
    if len(counts) < 2:
        return confidence
    rules = [
        np.polynomial.legendre.leggauss(nodes(before, count)) for before, count in pairwise((0, *counts))
    ]
    low, high = (
        float(special.ndtri((1 + confidence) / 2)),
        float(special.ndtri(1 - (1 - confidence) / (2 * len(counts)))),
    )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, counts, rules) < confidence else (low, middle)
    return 2 * float(special.ndtr(high)) - 1


def nodes(before: int, count: int) -> int:
    """Return how many nodes resolve the step of the walk from `before` to `count` items."""
    return max(NODES, math.ceil(16 * math.sqrt(count / (count - before))))


def within(bound: float, counts: Sequence[int], rules: Sequence[tuple[Numbers, Numbers]]) -> float:
    """Return how probable it is that every mean lies within `bound` of its own standard errors: a random walk
    W with |W(n)| <= bound * sqrt(n).
    """
    before, places, mass = 0, np.zeros(1), np.ones(1)  # where the walk may be, and how probable that is
    for count, (points, weights) in zip(counts, rules, strict=True):
        reached = points * bound * math.sqrt(count)
        density = normal_density(reached[:, None] - places[None, :], count - before) @ mass
        before, places, mass = count, reached, density * weights * bound * math.sqrt(count)
    return float(mass.sum())


def normal_density(x: Numbers, variance: float) -> Numbers:
    """Return the density of a normal variable with mean 0 at `x`."""
    return np.exp(-(x**2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
