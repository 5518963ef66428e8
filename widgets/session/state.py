"""What the panel shows at one moment, as plain records; pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from workbench.ledger.pareto import Cost, costs_of, drops_of, quality_of, spending
from workbench.measure.measurement import Measurement
from workbench.predict.predictor import Prediction
from workbench.recipe import Recipe
from workbench.report.temperature_lesson import Softened
from workbench.util.progress import Look

MOST = 250  # points drawn; a browser needs a third of a second for 5,000


@dataclass(frozen=True)
class Live:
    """The recipe on the sliders and what is known about it so far.

    `point` is the latest look, None before the first.
    """

    recipe: Recipe
    prediction: Prediction | None = None
    point: Measurement | None = None
    state: str = "ready"  # loading, training, measuring, measured, cancelled, failed
    doing: str = ""  # what is being computed, where it takes longer than a moment
    curve: tuple[tuple[int, float], ...] = ()  # (training step, loss) of the recipe, as far as it has come
    curve_steps: int = 0  # training steps planned
    looks: tuple[Look, ...] = ()  # at held-out items while it was trained
    softened: Softened | None = None  # one answer that the student is taught, at T = 1 and at the recipe's


def thin(
    rows: Sequence[Measurement],
    cost: Cost,
    most: int = MOST,
    *,
    metric: str | None = None,
    keep: Collection[str] = (),
) -> list[Measurement]:
    """Return at most about `most` rows: all that nothing beats in both quality and cost, those in `keep`, and
    the newest others.
    """
    read = spending(cost)
    known = [
        (row, quality, spent)
        for row in rows
        if (spent := read(row)) is not None and (quality := quality_of(row, metric)) is not None
    ]
    if len(known) <= most:
        return [row for row, _, _ in known]
    drops, costs = drops_of(known)[0], costs_of(known, cost)[0]
    order = np.lexsort((drops, costs))
    best_before = np.fmin.accumulate(np.append(np.inf, drops[order]))[:-1]
    front = {known[index][0].key for index in order[drops[order] < best_before]} | set(keep)
    newest = {row.key for row, _, _ in known[-max(1, most - len(front)) :]}
    return [row for row, _, _ in known if row.key in front or row.key in newest]
