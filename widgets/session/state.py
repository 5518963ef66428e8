"""What the panel shows at one moment, as plain records; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from workbench.ledger.annotation import Annotation
from workbench.measure.measurement import Measurement
from workbench.predict.predictor import Prediction
from workbench.recipe import Recipe
from workbench.report.temperature_lesson import Softened
from workbench.util.progress import Look

Phase = Literal["ready", "loading", "training", "measuring", "measured", "cancelled", "failed"]


@dataclass(frozen=True, eq=False)
class Past:
    """The points of the ledger on the present model, oldest first, and what is said about them, by key."""

    rows: Sequence[Measurement] = ()
    said: Mapping[str, Annotation] = field(default_factory=dict)
    damage: str = ""  # what of the ledger cannot be read, and where

    def about(self, point: Measurement | None) -> Annotation:
        """Return the note and pin of a point."""
        return Annotation() if point is None else self.said.get(point.key, Annotation())


@dataclass(frozen=True)
class PanelState:
    """The recipe on the sliders and what is known about it so far; replaced, never changed.

    `point` is the latest look, None before the first.
    """

    recipe: Recipe
    prediction: Prediction | None = None
    point: Measurement | None = None
    phase: Phase = "ready"
    doing: str = ""  # what is being computed, where it takes longer than a moment
    curve: tuple[tuple[int, float], ...] = ()  # (training step, loss) of the recipe, as far as it has come
    curve_steps: int = 0  # training steps planned
    looks: tuple[Look, ...] = ()  # at held-out items while it was trained
    softened: Softened | None = None  # one answer that the student is taught, at T = 1 and at the recipe's
    model: str = ""  # the name of the model on the bench, or of the first one that loads
    past: Past = field(default_factory=Past)

    @property
    def anchor(self) -> Measurement | None:
        """Return the point that knows the dense model best: the one with the most items."""
        points = [*self.past.rows[-1:], *([] if self.point is None else [self.point])]
        return max(points, key=lambda point: point.items, default=None)
