"""What was measured last, item by item: the second control of the next measurement, and the beginning of one
that goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from workbench.measure.kl import Each
from workbench.metrics.scores import Scores
from workbench.recipe import Recipe, Step

MOST = 8  # recipes kept
# How far apart two recipes are for each option that differs and is no slider: a slider's whole way is 1
OTHER = 10.0


@dataclass(frozen=True)
class Begun:
    """What is known of the first items of a point that was stopped on purpose: scores, and divergences from
    the dense model where there are any.
    """

    scores: Scores
    divergences: Each | None = None


@dataclass
class Neighbours:
    """Per-item scores of the recipes measured last, at most 8: `complete` on all items, `begun` on the first
    ones.

    An item takes 24 bytes, twice that and 8 a token of a window of what is begun: 8 recipes on 2,000 items
    take 0.4 MB.
    """

    complete: dict[Recipe, Scores] = field(default_factory=dict)
    begun: dict[str, Begun] = field(default_factory=dict)  # by ledger key

    def keep(self, recipe: Recipe, scores: Scores) -> None:
        """Keep the scores of a recipe on all items."""
        self.complete.pop(recipe, None)
        self.complete[recipe] = Scores(
            scores.loss, scores.correct, scores.weight, scores.answers.new_empty(0)
        )
        while len(self.complete) > MOST:
            self.complete.pop(next(iter(self.complete)))

    def begin(self, key: str, scores: Scores, divergences: Each | None = None) -> None:
        """Keep what is known of the items of a point that was stopped on purpose, so that it can go on."""
        self.begun.pop(key, None)
        self.begun[key] = Begun(scores, divergences)
        while len(self.begun) > MOST:
            self.begun.pop(next(iter(self.begun)))

    def nearest(self, recipe: Recipe) -> Scores | None:
        """Return the scores of the nearest other recipe of the same steps, the last one of several as near.

        None without such.
        """
        far = {
            kept: distance(recipe, kept)
            for kept in reversed(self.complete)
            if kept != recipe and len(kept) > 0
        }
        distances = {kept: much for kept, much in far.items() if much is not None}
        return self.complete[min(distances, key=lambda kept: distances[kept])] if distances else None


def distance(first: Recipe, second: Recipe) -> float | None:
    """Return how far apart two recipes of the same kinds of steps are: sliders by parts of their way, 10 for
    each other option; None for other steps.
    """
    if [type(step) for step in first] != [type(step) for step in second]:
        return None
    return float(sum(step_distance(left, right) for left, right in zip(first, second, strict=True)))


def step_distance(left: Step, right: Step) -> float:
    """Return how far apart two steps of one kind are; the seed does not count."""
    names = [name for name in (*left.options(), "targets") if name != left.slider]
    return slider_distance(left, right) + OTHER * float(
        sum(getattr(left, name) != getattr(right, name) for name in names)
    )


def slider_distance(left: Step, right: Step) -> float:
    """Return the way between two positions of a slider, as a part of the way between its first and last
    stop.
    """
    values: tuple[Any, Any] = (getattr(left, left.slider, 0), getattr(right, right.slider, 0))
    if not all(isinstance(value, int | float) for value in values):
        return OTHER * float(values[0] != values[1])
    stops = [stop for stop in left.stops if isinstance(stop, int | float)]
    way = max(stops) - min(stops) if len(stops) > 1 else 1.0
    return float(abs(values[0] - values[1])) / (way or 1.0)
