"""A number with its interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float
    high: float

    def mapped(self, function: Callable[[float], float]) -> Estimate:
        """Return the estimate under an increasing function."""
        return Estimate(function(self.value), function(self.low), function(self.high))
