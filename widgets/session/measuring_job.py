"""One recipe measured behind the panel, and what it tells of itself on the way."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from widgets.session.worker import Stale
from workbench.bench import Bench
from workbench.compress import Compressed, Distill
from workbench.errors import DataError
from workbench.measure.measurement import Measurement
from workbench.recipe import Recipe
from workbench.report.temperature_lesson import softened
from workbench.util.progress import Curve, Look, Training

CURVE_SECONDS = 0.1  # between two pictures of a training curve
DOING_SECONDS = 0.5  # between two words on what is being computed


class MeasuringJob:
    """What the worker does for one recipe.

    `tell` takes changes of the panel's state; `enough`, once set, ends a training early.
    """

    def __init__(self, bench: Bench, recipe: Recipe, stale: Stale, tell: Callable[..., None]) -> None:
        """Do nothing yet; `stale` says that nobody waits for this recipe any more."""
        self.bench, self.recipe, self.stale, self.tell = bench, recipe, stale, tell
        self.enough = threading.Event()
        self.trains = False
        self.curve_at = float("-inf")
        self.told_at = time.monotonic()

    def looks(self, keep: Callable[[Compressed], Any]) -> Iterator[Measurement]:
        """Yield the point as it grows; `keep` gets the compressed model, unless the ledger has the point."""
        self.soften()
        self.told_at = time.monotonic()
        yield from self.bench.stream(
            self.recipe,
            cancelled=self.stale,
            on_compressed=keep,
            training=Training(self.trained, self.enough.is_set, self.looked_at),
            working=self.working,
        )

    def soften(self) -> None:
        """Find out what the temperature of the recipe makes of one answer, for the curve's lesson.

        Nothing where there is no distribution.
        """
        wanted = next((float(step.temperature) for step in self.recipe if isinstance(step, Distill)), None)
        if wanted is not None:
            with contextlib.suppress(DataError):
                self.tell(softened=softened(self.bench.task, 0, sorted({1.0, wanted})))

    def working(self, what: str, done: int, total: int) -> None:
        """Tell what is being computed, twice a second, once it has taken more than a moment."""
        if not self.trains and time.monotonic() - self.told_at >= DOING_SECONDS:
            self.told_at = time.monotonic()
            self.tell(doing=f"{what}, {done:,} of {total:,}" if total > 1 else what)

    def trained(self, curve: Curve, steps: int) -> None:
        """Tell how far the training is, about ten times a second, and when it has ended."""
        self.trains = len(curve) < steps
        now = time.monotonic()
        if now - self.curve_at >= CURVE_SECONDS or not self.trains:
            self.curve_at = now
            phase = "training" if self.trains else "measuring"
            self.tell(phase=phase, curve=tuple(curve), curve_steps=steps)

    def looked_at(self, looks: Sequence[Look]) -> None:
        """Tell the looks at held-out items."""
        self.tell(looks=tuple(looks))
