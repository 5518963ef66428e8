"""The points of a report, one after another: each is told of while it is measured, and a slider that takes
too long ends early.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.errors import Cancelled
from workbench.measure.card import quality_words
from workbench.search.sweep import around
from workbench.util.progress import say

if TYPE_CHECKING:
    from collections.abc import Callable

    from workbench.bench import Bench
    from workbench.measure.measurement import Measurement
    from workbench.recipe import Recipe


@dataclass(frozen=True)
class Moved:
    """One slider moved alone: what was measured, and the recipes that `minutes` left no time for."""

    slider: str
    points: tuple[Measurement, ...]
    left_out: tuple[Recipe, ...]
    minutes: float

    def words(self) -> str:
        """Return a sentence on the points that are missing, "" if none is."""
        if not self.left_out:
            return ""
        labels = ", ".join(recipe.label() for recipe in self.left_out)
        return (
            f"{self.slider}: no time for {len(self.left_out)} of {len(self.left_out) + len(self.points)}"
            f" points within {self.minutes:g} minutes: {labels}"
        )


def measured(
    bench: Bench, recipe: Recipe, what: str, cancelled: Callable[[], bool] | None = None
) -> Measurement:
    """Return a point.

    Where the bench shows its progress as lines, say on stderr which one it is and what was found.

    Raises:
        Cancelled: `cancelled` returned True.
    """
    lines, start = bench.show_progress == "lines", time.monotonic()
    if lines:
        say(f"{what}: {recipe.label()}")
    point = bench.measure(recipe, cancelled=cancelled)
    if lines:
        say(f"  {quality_words(point.primary)}; {time.monotonic() - start:.1f} s")
    return point


def moved(bench: Bench, recipe: Recipe, slider: str, minutes: float = 0.0) -> Moved:
    """Return the points of `recipe` with one slider moved to each of its stops
    (`workbench.search.sweep.around`).

    Once `minutes` have passed the point that is being measured is given up and the ones after it are left
    out, unless the ledger has them. 0 waits for all. Training is what takes so long: one step of a speech
    model may be a minute on a CPU.

    Raises:
        RecipeError: no method has this slider.
    """
    end = time.monotonic() + 60 * minutes
    recipes = around(recipe, slider)
    points: list[Measurement] = []
    left_out: list[Recipe] = []
    for index, variant in enumerate(recipes):
        measured_before = bench.ledger.find(bench.context.key(variant)) is not None
        if minutes and time.monotonic() > end and not measured_before:
            left_out.append(variant)
            continue
        try:
            points.append(
                measured(
                    bench,
                    variant,
                    f"{slider}, {index + 1} of {len(recipes)}",
                    (lambda: time.monotonic() > end) if minutes else None,
                )
            )
        except Cancelled:
            left_out.append(variant)
    record = Moved(slider, tuple(points), tuple(left_out), minutes)
    if bench.show_progress == "lines" and left_out:
        say(f"  {record.words()}")
    return record
