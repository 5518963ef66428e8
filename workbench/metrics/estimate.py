"""A number with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Return half of the interval's width; nan where it has no finite ends."""
        return (self.high - self.low) / 2

    def mapped(self, function: Callable[[float], float]) -> Estimate:
        """Return the estimate under an increasing function."""
        return Estimate(function(self.value), function(self.low), function(self.high))

    def within(self, least: float, most: float = math.inf) -> Estimate:
        """Return the estimate of what cannot lie outside [least, most]: no end of its interval does then.

        What held before holds still.
        """
        return self.mapped(lambda x: min(most, max(least, x)))
