"""One model on the bench, predictions and measurements of what the sliders say; knows no widget.

`Session` owns two background runners: one loads models, the other measures. Callbacks come from their threads; they are
expected to be quick (`widgets.pacer` draws later).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from widgets.live import Live
from widgets.worker import Stale, Worker
from workbench.bench import Bench
from workbench.errors import Cancelled, ModelError, RecipeError
from workbench.measure.measurement import Measurement
from workbench.predict import Predictor, comparable
from workbench.recipe import Recipe


class Session:
    """Loads models and measures the newest recipe; `live` is the present state, replaced and never changed in place."""

    def __init__(
        self,
        *,
        on_live: Callable[[], None],
        on_history: Callable[[], None],
        on_loaded: Callable[[], None],
        on_error: Callable[[BaseException], None],
        on_not_loaded: Callable[[BaseException], None],
        breathe: Callable[[], Any] = lambda: None,
        **settings: Any,
    ) -> None:
        """Load nothing yet.

        Args:
            on_live: `live` has been replaced.
            on_history: the ledger has a new point.
            on_loaded: another model is on the bench.
            on_error: measuring raised.
            on_not_loaded: loading raised.
            breathe: called before a measurement starts, to let the prediction be drawn while the processor is free.
            settings: those of `workbench.Bench`.

        """
        self.breathe = breathe
        self.on_live, self.on_history, self.on_loaded, self.on_error = on_live, on_history, on_loaded, on_error
        self.settings = settings
        self.live = Live(Recipe(), state="loading")
        self.bench: Bench | None = None
        self.predictor: Predictor | None = None
        self.measurer: Worker[Any] = Worker(self.failed)
        self.loader: Worker[tuple[Bench, Predictor]] = Worker(on_not_loaded)

    def load(self, model: str) -> None:
        """Start loading a model; the present one stays usable until it is there."""
        self.loader.submit(self.loading(model), self.loaded)

    def load_now(self, model: str) -> None:
        """Load a model, wait, and raise what goes wrong."""
        self.loader.run(self.loading(model), self.loaded)

    def loading(self, model: str) -> Callable[[Stale], Iterator[tuple[Bench, Predictor]]]:
        """Return the job that loads a model."""

        def make(_stale: Stale) -> Iterator[tuple[Bench, Predictor]]:
            bench = Bench(model, **self.settings)
            predictor = Predictor(bench)
            predictor.predict(Recipe())  # the first one is slow: libraries warm up
            yield bench, predictor

        return make

    def loaded(self, made: tuple[Bench, Predictor]) -> None:
        """Take over a model that has been loaded, and measure what the sliders say on it."""
        with self.measurer.changed:
            self.bench, self.predictor = made
            self.on_loaded()
            self.start(self.live.recipe)

    def start(self, recipe: Recipe) -> None:
        """Predict a recipe and start to measure it; whatever ran before is cancelled. Without a model, remember it only."""
        with self.measurer.changed:
            self.live = Live(recipe, self.predicted(recipe), state="loading" if self.bench is None else "measuring")
            if self.bench is not None:
                self.on_live()
                self.measurer.submit(self.measuring(self.bench, recipe), self.looked)
            else:
                self.on_live()

    def run(self, recipe: Recipe) -> Measurement:
        """Measure a recipe, wait, and return the complete point.

        Raises:
            ModelError: no model is loaded.
            WorkbenchError: see `workbench.Bench.measure`.

        """
        if self.bench is None:
            raise ModelError("no model is loaded")
        self.live = Live(recipe, self.predicted(recipe), state="measuring")
        self.measurer.run(self.measuring(self.bench, recipe), self.looked)
        if self.live.point is None or not self.live.point.complete:
            raise Cancelled("the sliders were moved before the measurement had ended")
        return self.live.point

    def measuring(self, bench: Bench, recipe: Recipe) -> Callable[[Stale], Iterator[Measurement]]:
        """Return the job that measures a recipe."""

        def make(stale: Stale) -> Iterator[Measurement]:
            self.breathe()
            yield from bench.stream(recipe, cancelled=stale)

        return make

    def compare(self, on_found: Callable[[Recipe, Any], None]) -> None:
        """Compare the answers of the dense model and of the recipe on the sliders, behind the panel.

        Args:
            on_found: called with the recipe and a `Behaviour`, or the continuations of a language model.

        Raises:
            ModelError: no model is loaded.
            RecipeError: a measurement is running, which this would cancel.

        """
        bench, recipe = self.bench, self.live.recipe
        if bench is None:
            raise ModelError("no model is loaded yet")
        if self.measurer.busy:
            raise RecipeError("the measurement is still running: ask again when it has ended")

        def make(stale: Stale) -> Iterator[Any]:
            yield bench.behaviour(recipe, cancelled=stale)

        self.measurer.submit(make, lambda found: on_found(recipe, found))

    def predicted(self, recipe: Recipe) -> Any:
        """Return the prediction of a recipe, None without a model."""
        return None if self.predictor is None else self.predictor.predict(recipe)

    def looked(self, point: Measurement) -> None:
        """Take over a look at the current recipe (called by the worker, under its lock)."""
        if self.predictor is not None:
            self.predictor.learn(point)
        self.live = replace(self.live, point=point, state="measured" if point.complete else "measuring")
        if self.live.prediction is not None and self.live.prediction.quality is None:
            self.live = replace(self.live, prediction=self.predicted(point.recipe))
        if point.complete:
            self.on_history()
        self.on_live()

    def cancel(self) -> None:
        """Stop measuring; what has been read so far stays on the plot."""
        with self.measurer.changed:
            if self.measurer.busy:
                self.measurer.cancel()
                self.live = replace(self.live, state="cancelled")
                self.on_live()

    def failed(self, error: BaseException) -> None:
        """Report what the current measurement raised."""
        self.live = replace(self.live, state="failed")
        self.on_error(error)
        self.on_live()

    def rows(self) -> list[Measurement]:
        """Return the ledger's points of this model, data and device, oldest first."""
        return [] if self.bench is None else comparable(self.bench.ledger.rows(), self.bench.context)

    def close(self) -> None:
        """Stop both runners."""
        self.loader.close()
        self.measurer.close()
