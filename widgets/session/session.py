"""One model on the bench, predictions and measurements of what the sliders say; knows no widget.

`Session` owns two background runners: one loads models, the other measures. Callbacks come from their
threads; they are expected to be quick (`widgets.session.pacer` draws later).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from widgets.session.model_choice import Choice
from widgets.session.state import Live
from widgets.session.worker import Stale, Worker
from workbench.bench import Bench
from workbench.compress import Compressed, Distill
from workbench.errors import Cancelled, DataError, ModelError, RecipeError
from workbench.ledger.comparable import comparable
from workbench.measure.measurement import Measurement
from workbench.predict.predictor import Predictor
from workbench.recipe import Recipe
from workbench.report.temperature_lesson import softened
from workbench.search.local_search import Trial, descend
from workbench.util import garbage
from workbench.util.progress import Curve, Look, Progress, Training

CURVE_SECONDS = 0.1  # between two pictures of a training curve
DOING_SECONDS = 0.5  # between two words on what is being computed
Loaded = tuple[Choice, Bench, Predictor]


class Session:
    """Loads models and measures the newest recipe.

    `live` is the present state, replaced and never changed in place.
    """

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
            breathe: called before a measurement starts, to let the prediction be drawn while the processor is
                free.
            settings: those of `workbench.Bench` that no `Choice` holds.
        """
        self.breathe = breathe
        self.on_live, self.on_history, self.on_loaded, self.on_error = (
            on_live,
            on_history,
            on_loaded,
            on_error,
        )
        self.settings = settings
        self.live = Live(Recipe(), state="loading")
        self.bench: Bench | None = None
        self.predictor: Predictor | None = None
        self.follow_up: Callable[[Bench, Compressed], Iterator[Any]] = lambda _bench, _compressed: iter(
            ()
        )  # work on what was just measured
        self.on_extra: Callable[[Any], None] = lambda _value: None  # takes what `follow_up` yields
        self.on_recipe: Callable[[Recipe], None] = lambda _recipe: (
            None
        )  # what was measured is not quite what was asked for
        self.compressed: Compressed | None = None  # the model that was measured last
        self.enough = threading.Event()  # ends the training step that runs
        self.curve_at = float("-inf")
        self.on_idle: Callable[[], None] = lambda: None
        self.measurer: Worker[Any] = Worker(self.failed, self.idle)
        self.preparer: Worker[None] = Worker(
            on_error
        )  # what predictions rest on, found while nothing is measured
        self.on_not_loaded = on_not_loaded
        self.choice: Choice | None = None
        # How often garbage is to be collected: when a model that was loaded is first measured, and when that
        # is done
        self.unsettled = 0
        self.loader: Worker[Loaded] = Worker(on_not_loaded)

    def load(self, choice: Choice) -> None:
        """Start loading a model with its data; the present one stays usable until it is there."""
        self.give_up()
        self.loader.submit(self.loading(choice), self.loaded)

    def load_now(self, choice: Choice) -> None:
        """Load a model with its data, wait, and raise what goes wrong."""
        self.loader.run(self.loading(choice), self.loaded)

    def give_up(self) -> None:
        """Stop waiting for what loads.

        A library in the middle of a download cannot be stopped: its thread is left to end alone.
        """
        if self.loader.busy:
            self.loader.close(timeout=0)
            self.loader = Worker(self.on_not_loaded)

    def loading(self, choice: Choice) -> Callable[[Stale], Iterator[Loaded]]:
        """Return the job that loads a model with its data."""

        def make(_stale: Stale) -> Iterator[Loaded]:
            bench = Bench(
                choice.model,
                choice.data,
                device=choice.device,
                evaluation_items=choice.evaluation_items,
                **self.settings,
            )
            predictor = bench.predictor()
            predictor.predict(Recipe())  # the first one is slow: libraries warm up
            bench.predicts = predictor.record
            yield choice, bench, predictor

        return make

    def loaded(self, made: Loaded) -> None:
        """Take over a model that has been loaded, and measure what the sliders say on it."""
        with self.measurer.changed:
            self.choice, self.bench, self.predictor = made
            self.compressed, self.unsettled = None, 2
            self.on_loaded()
            self.start(self.live.recipe)

    def settle(self) -> None:
        """Collect garbage now, so that no move waits for it; see `workbench.util.garbage`."""
        self.unsettled -= 1
        garbage.settle()

    def start(self, recipe: Recipe) -> None:
        """Predict a recipe and start to measure it; whatever ran before is cancelled.

        Without a model, remember it only.
        """
        with self.measurer.changed:
            self.measurer.cancel()  # first, so that the processor is free for the prediction
            self.preparer.cancel()
            self.live = Live(
                recipe, self.predicted(recipe), state="loading" if self.bench is None else "measuring"
            )
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
        self.preparer.cancel()
        self.live = Live(recipe, self.predicted(recipe), state="measuring")
        self.measurer.run(self.measuring(self.bench, recipe), self.looked)
        if self.live.point is None or not self.live.point.complete:
            raise Cancelled("the sliders were moved before the measurement had ended")
        return self.live.point

    def measuring(self, bench: Bench, recipe: Recipe) -> Callable[[Stale], Iterator[Any]]:
        """Return the job that measures a recipe."""

        def make(stale: Stale) -> Iterator[Any]:
            self.breathe()
            self.compressed = None  # never two compressed models at once
            if self.unsettled == 2:
                self.settle()  # frees the model before this one
            stop = self.enough = threading.Event()
            self.soften(stale, bench, recipe)
            training = Training(
                lambda curve, steps: self.trained(stale, curve, steps),
                stop.is_set,
                lambda looks: self.looked_at(stale, looks),
            )
            yield from bench.stream(
                recipe,
                cancelled=stale,
                on_compressed=self.take,
                training=training,
                working=self.working(stale),
            )
            if self.compressed is not None:
                yield from self.follow_up(bench, self.compressed)
            if self.unsettled:  # by now nobody predicts on the model before this one either
                self.settle()

        return make

    def working(self, stale: Stale) -> Progress:
        """Return what takes over what is being computed, twice a second, once it has taken more than a
        moment.
        """
        told = time.monotonic()

        def report(what: str, done: int, total: int) -> None:
            nonlocal told
            if time.monotonic() - told < DOING_SECONDS:
                return
            told = time.monotonic()
            with self.measurer.changed:
                if not stale() and self.live.state == "measuring":
                    self.live = replace(
                        self.live, doing=f"{what}, {done:,} of {total:,}" if total > 1 else what
                    )
                    self.on_live()

        return report

    def soften(self, stale: Stale, bench: Bench, recipe: Recipe) -> None:
        """Find out what the temperature of a recipe makes of one answer, for the curve's lesson.

        Nothing where there is no distribution.
        """
        wanted = next((float(step.temperature) for step in recipe if isinstance(step, Distill)), None)
        if wanted is None:
            return
        with contextlib.suppress(DataError):
            found = softened(bench.task, 0, sorted({1.0, wanted}))
            with self.measurer.changed:
                if not stale():
                    self.live = replace(self.live, softened=found)

    def take(self, compressed: Compressed) -> None:
        """Keep the model that is being measured, for what is asked about it afterwards."""
        self.compressed = compressed

    def search(
        self,
        drop: float,
        trials: int,
        on_trial: Callable[[Trial], None],
        on_end: Callable[[Trial | None], None],
    ) -> None:
        """Search for the smallest file within a loss, behind the panel.

        Every point goes to the ledger and shows as it comes.

        Args:
            drop: the loss, as for `workbench.search.local_search`.
            trials: at most so many recipes.
            on_trial: called after each measured recipe.
            on_end: called with the last one, None if there was nothing to try; not after a cancel or a newer
                job.

        Raises:
            ModelError: no model is loaded.
        """
        bench = self.bench
        if bench is None:
            raise ModelError("no model is loaded yet")

        def make(stale: Stale) -> Iterator[tuple[Trial | None, bool]]:
            last = None
            for last in descend(bench, drop, trials=trials, cancelled=stale):
                yield last, False
            yield last, True

        def draw(found: tuple[Trial | None, bool]) -> None:
            trial, ended = found
            if ended:
                on_end(trial)
            elif trial is not None:
                self.live = Live(trial.point.recipe, point=trial.point, state="measured")
                self.on_history()
                self.on_live()
                on_trial(trial)

        with self.measurer.changed:
            self.preparer.cancel()
            self.measurer.submit(make, draw)

    def trained(self, stale: Stale, curve: Curve, steps: int) -> None:
        """Take over the training curve, about ten times a second."""
        now = time.monotonic()
        if now - self.curve_at < CURVE_SECONDS and len(curve) < steps:
            return
        self.curve_at = now
        with self.measurer.changed:
            if not stale():
                self.live = replace(
                    self.live,
                    state="training" if len(curve) < steps else "measuring",
                    curve=tuple(curve),
                    curve_steps=steps,
                )
                self.on_live()

    def looked_at(self, stale: Stale, looks: Sequence[Look]) -> None:
        """Take over the looks at held-out items."""
        with self.measurer.changed:
            if not stale():
                self.live = replace(self.live, looks=tuple(looks))
                self.on_live()

    def stop_training(self) -> None:
        """End the training that runs and measure what it has reached.

        Raises:
            RecipeError: nothing is being trained.

        """
        if self.live.state != "training":
            raise RecipeError("nothing is being trained now")
        self.enough.set()

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
            yield bench.behaviour(recipe, compressed=self.compressed, cancelled=stale)

        self.measurer.submit(make, lambda found: on_found(recipe, found))

    def predicted(self, recipe: Recipe) -> Any:
        """Return the prediction of a recipe, None without a model."""
        return None if self.predictor is None else self.predictor.predict(recipe)

    def looked(self, point: Any) -> None:
        """Take over a look at the current recipe, or what `follow_up` found (called by the worker, under its
        lock).
        """
        if not isinstance(point, Measurement):
            self.on_extra(point)
            return
        if self.predictor is not None:
            self.predictor.learn(point)
        if point.recipe != self.live.recipe:  # training was stopped: the recipe says where
            self.live = replace(self.live, recipe=point.recipe)
            self.on_recipe(point.recipe)
        steps = max(
            self.live.curve_steps, point.curve[-1][0] + 1 if point.curve else 0
        )  # of a point from the ledger, those that were done
        self.live = replace(
            self.live,
            point=point,
            doing="",
            state="measured" if point.complete else "measuring",
            curve=point.curve,
            looks=point.held_out,
            curve_steps=steps,
        )
        if self.live.prediction is not None and self.live.prediction.quality is None:
            self.live = replace(self.live, prediction=self.predicted(point.recipe))
        if point.complete:
            self.predicted(
                point.recipe
            )  # reads the new point into the predictor now, so that the next move need not
            self.on_history()
        self.on_live()

    def idle(self) -> None:
        """Tell that the worker has nothing to do (called by it, under its lock), and find meanwhile what
        predictions rest on.
        """
        if self.predictor is not None and not self.preparer.closed:
            self.preparer.submit(self.preparing(self.predictor, self.live.recipe), lambda _nothing: None)
        self.on_idle()

    def preparing(self, predictor: Predictor, recipe: Recipe) -> Callable[[Stale], Iterator[None]]:
        """Return the job that finds what predictions of this recipe and its neighbours rest on.

        Any move of a slider ends it.
        """

        def make(stale: Stale) -> Iterator[None]:
            def progress(what: str, done: int, total: int) -> None:
                if stale():
                    raise Cancelled(f"cancelled during {what}, {done} of {total}")

            if predictor.prepare(recipe, progress):
                with self.measurer.changed:
                    predictor.predict(recipe)  # reads all anew, so that the next move need not
            yield

        return make

    def cancel(self) -> None:
        """Stop measuring; what has been read so far stays on the plot."""
        with self.measurer.changed:
            if self.measurer.busy:
                self.measurer.cancel()
                self.live = replace(
                    self.live,
                    state=(
                        "measured"
                        if self.live.point is not None and self.live.point.complete
                        else "cancelled"
                    ),
                    doing="",
                )
                self.on_live()

    def failed(self, error: BaseException) -> None:
        """Report what the current measurement raised."""
        self.live = replace(self.live, state="failed", doing="")
        self.on_error(error)
        self.on_live()

    def rows(self) -> list[Measurement]:
        """Return the ledger's points of this model, data and device, oldest first."""
        return [] if self.bench is None else comparable(self.bench.ledger.rows(), self.bench.context)

    def close(self) -> None:
        """Stop all runners; what was alive when the model was loaded is looked at for garbage again."""
        self.loader.close()
        self.measurer.close()
        self.preparer.close()
        garbage.unsettle()
