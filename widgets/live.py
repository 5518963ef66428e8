"""What the panel shows at one moment, as plain records; pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from workbench.measure.measurement import Measurement
from workbench.predict import Prediction
from workbench.recipe import Recipe
from workbench.tradeoff import Cost, cost_of

MOST = 400  # points drawn; a browser needs a third of a second for 5,000


@dataclass(frozen=True)
class Live:
    """The recipe on the sliders and what is known about it so far. `point` is the latest look, None before the first."""

    recipe: Recipe
    prediction: Prediction | None = None
    point: Measurement | None = None
    state: str = "ready"  # loading, measuring, measured, cancelled, failed


def thin(rows: Sequence[Measurement], cost: Cost, most: int = MOST) -> list[Measurement]:
    """Return at most about `most` rows: all that nothing beats in both quality and cost, and the newest others."""
    known = [(row, spent.value) for row in rows if (spent := cost_of(row, cost)) is not None]
    if len(known) <= most:
        return [row for row, _ in known]
    best, front = math.inf, set()
    for row, _ in sorted(known, key=lambda pair: (pair[1], pair[0].primary.drop.value)):
        if row.primary.drop.value < best:
            best = row.primary.drop.value
            front.add(row.key)
    newest = {row.key for row, _ in known[-max(0, most - len(front)) :]}
    return [row for row, _ in known if row.key in front or row.key in newest]


def smallest_within(rows: Sequence[Measurement], drop: float) -> Measurement | None:
    """Return the smallest point whose whole interval of the quality drop is within `drop`, or None."""
    return min((row for row in rows if row.primary.drop.high <= drop), key=lambda row: row.sizes.file_bytes, default=None)


def fastest_within(rows: Sequence[Measurement], drop: float) -> Measurement | None:
    """Return the fastest point within `drop` that is faster than dense beyond its interval, or None."""
    fit = [row for row in rows if row.primary.drop.high <= drop and row.latency is not None and row.latency.speedup.low > 1]
    return max(fit, key=lambda row: row.latency.speedup.value if row.latency else 0.0, default=None)
