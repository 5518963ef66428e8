"""A short guided search: from the best point so far, one slider at a time, towards the smallest file within a
given loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.compress.registry import METHODS
from workbench.errors import CompressionError, RecipeError
from workbench.ledger.comparable import comparable
from workbench.ledger.pareto import smallest_within
from workbench.metrics.metrics import metric_named
from workbench.predict.predictor import Prediction, Predictor
from workbench.recipe import Recipe
from workbench.search.sweep import around

if TYPE_CHECKING:
    from workbench.bench import Bench
    from workbench.measure.measurement import Measurement


@dataclass(frozen=True)
class Trial:
    """One measured recipe of the search, and the best so far: None while not even one point is shown to be
    within.
    """

    point: Measurement
    best: Measurement | None
    tried: int
    trials: int


def descend(
    bench: Bench, drop: float, *, trials: int = 24, cancelled: Callable[[], bool] | None = None
) -> Iterator[Trial]:
    """Measure recipes on the way to the smallest file whose whole interval of the quality drop is within
    `drop`.

    Each trial takes the recipe next to the best one (one slider at another stop, distillation left out, since
    its training takes long) that is predicted to be within and smallest. It ends when no neighbour is
    smaller, or after `trials`. What it finds is a local optimum among the stops: a slider between two stops,
    or a longer search, may do better.

    Raises:
        RecipeError: a drop that is no positive fraction, or trials below 1.
        Cancelled: `cancelled` returned True; what was measured stays in the ledger.
    """
    if not 0 < drop < 1 or trials < 1:
        raise RecipeError(
            f"descend(drop={drop!r}, trials={trials!r}) is refused: drop is a fraction such as 0.01, trials"
            " is at least 1"
        )
    predictor = bench.predictor()
    if not comparable(bench.ledger.rows(), bench.context):
        bench.measure(Recipe(), cancelled=cancelled)
    best = smallest_within(comparable(bench.ledger.rows(), bench.context), drop)
    tried: set[Recipe] = set()
    while len(tried) < trials:
        recipe = proposal(predictor, bench, best, drop, tried)
        if recipe is None:
            return
        tried.add(recipe)
        try:
            point = bench.measure(recipe, cancelled=cancelled)
        except (RecipeError, CompressionError):
            continue  # this model refuses it: it counts as tried
        best = smallest_within([point] if best is None else [best, point], drop)
        yield Trial(point, best, len(tried), trials)


def proposal(
    predictor: Predictor, bench: Bench, best: Measurement | None, drop: float, tried: set[Recipe]
) -> Recipe | None:
    """Return the recipe next to the best one that is worth a measurement most, None if no other is
    smaller.
    """
    centre, most = (Recipe(), float("inf")) if best is None else (best.recipe, best.sizes.file_bytes)
    sliders = [step.slider for step in METHODS.steps() if step.stops and step.slider != "temperature"]
    near = [
        recipe
        for slider in sliders
        for recipe in around(centre, slider)
        if recipe not in tried and bench.ledger.find(bench.context.key(recipe)) is None
    ]
    guesses = [
        guess
        for guess in map(predictor.predict, dict.fromkeys(near))
        if guess.file_bytes is not None and guess.file_bytes < most
    ]
    dense = predictor.dense_quality.dense.value if predictor.dense_quality else None
    first = min(guesses, key=lambda guess: rank(guess, dense, drop), default=None)
    return None if first is None else first.recipe


def rank(guess: Prediction, dense: float | None, drop: float) -> tuple[int, float]:
    """Return a key to sort by: recipes predicted to lose at most `drop` first, the smallest file first.

    Then the others, least loss first. Last, where nothing is known of the loss, the largest file first: what
    takes away least is the most likely to be within.
    """
    if guess.quality is None or dense is None or guess.unknown:
        return 2, -float(guess.file_bytes or 0)
    metric = metric_named(guess.metric)
    lost = (
        guess.quality.value / dense - 1
        if metric.ratio
        else (dense - guess.quality.value) * (1 if metric.higher else -1)
    )
    return (0, float(guess.file_bytes or 0)) if lost <= drop else (1, lost)
