"""One model on the bench, predictions and measurements of what the sliders say; knows no widget.

`Session` owns two runners that work behind the panel: one measures, one finds meanwhile what predictions rest
on. Its loader has a third. Signals come from their threads, under the lock that keeps newer moves away: who
subscribes is expected to be quick (`widgets.session.pacer` draws later).
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from widgets.session.measuring_job import MeasuringJob
from widgets.session.model_choice import ModelChoice
from widgets.session.model_loader import Loaded, ModelLoader
from widgets.session.signals import Signal
from widgets.session.state import PanelState, Past, Phase
from widgets.session.worker import Make, Stale, Worker
from workbench.bench import Bench
from workbench.compress import Compressed
from workbench.errors import Cancelled, ModelError, RecipeError
from workbench.ledger.comparable import comparable
from workbench.measure.measurement import Measurement
from workbench.predict.predictor import Prediction, Predictor
from workbench.recipe import Recipe
from workbench.util import garbage

T = TypeVar("T")
FollowUp = Callable[[Bench, Compressed], Iterator[Any]]


@dataclass(frozen=True)
class Extra:
    """What a follow-up found, and who takes it."""

    take: Callable[[Any], None]
    value: Any


class Session:
    """Measures the newest recipe on the model that was loaded last.

    `state` is the present, replaced and never changed in place. Each signal has any number of subscribers:

        on_state: `state` has been replaced.
        on_points: the ledger has new points, or something new is said about them; `on_state` follows.
        on_loaded: another model is on the bench.
        on_recipe(recipe): what was measured is not quite what was asked for: its training was stopped.
        on_start: a measurement is about to take the processor; what waits to be drawn is drawn first.
        on_idle: nothing is being measured.
        on_error(error): measuring or a subscriber raised.
        on_load_error(error): loading raised.
    """

    def __init__(self, **settings: Any) -> None:
        """Load nothing yet; `settings` are those of `workbench.Bench` that no `ModelChoice` holds."""
        self.settings = settings
        self.state = PanelState(Recipe(), phase="loading")
        self.choice: ModelChoice | None = None  # what is on the bench
        self.bench: Bench | None = None
        self.predictor: Predictor | None = None
        self.compressed: Compressed | None = None  # the model that was measured last
        self.enough = threading.Event()  # ends the training step that runs
        # How often garbage is to be collected: when a model that was loaded is first measured, and when that
        # is done
        self.unsettled = 0
        self.follow_ups: tuple[tuple[FollowUp, Callable[[Any], None]], ...] = ()
        self.on_error: Signal[BaseException] = Signal(traceback.print_exception)
        self.on_load_error: Signal[BaseException] = Signal(self.tell_error)
        self.on_recipe: Signal[Recipe] = Signal(self.tell_error)
        self.on_state, self.on_points, self.on_loaded, self.on_start, self.on_idle = (
            Signal[[]](self.tell_error) for _ in range(5)
        )
        self.measurer: Worker[Measurement | Extra] = Worker(self.failed, self.idle)
        self.preparer: Worker[None] = Worker(self.tell_error)
        self.loader = ModelLoader(settings, self.loaded, self.on_load_error.emit)

    # --- loading

    def load(self, choice: ModelChoice) -> None:
        """Start loading a model with its data; the present one stays usable until it is there."""
        if self.bench is None:
            self.state = replace(self.state, model=choice.name)
        self.loader.start(choice)

    def loaded(self, loaded: Loaded) -> None:
        """Take over a model that has been loaded, and measure what the sliders say on it."""
        with self.measurer.changed:
            self.choice, self.bench, self.predictor = loaded.choice, loaded.bench, loaded.predictor
            self.compressed, self.unsettled = None, 2
            self.state = replace(self.state, model=loaded.choice.name, past=Past())
            self.on_loaded.emit()
            self.on_points.emit()
            self.start(self.state.recipe)

    def settle(self) -> None:
        """Collect garbage now, so that no move waits for it; see `workbench.util.garbage`."""
        self.unsettled -= 1
        garbage.settle()

    # --- measuring

    def start(self, recipe: Recipe) -> None:
        """Cancel what runs, predict a recipe and start to measure it; without a model, remember it only."""
        with self.measurer.changed:
            self.measurer.cancel()  # first, so that the processor is free for the prediction
            self.preparer.cancel()
            self.show(self.asked(recipe))
            if self.bench is not None:
                self.measurer.submit(self.measuring(self.bench, recipe), self.take)

    def run(self, recipe: Recipe) -> Measurement:
        """Measure a recipe, wait, and return the complete point.

        Raises:
            ModelError: no model is loaded.
            WorkbenchError: see `workbench.Bench.measure`.

        """
        if self.bench is None:
            raise ModelError("no model is loaded")
        self.preparer.cancel()
        self.state = self.asked(recipe)
        self.measurer.run(self.measuring(self.bench, recipe), self.take)
        if self.state.point is None or not self.state.point.complete:
            raise Cancelled("the sliders were moved before the measurement had ended")
        return self.state.point

    def asked(self, recipe: Recipe) -> PanelState:
        """Return the state of a recipe that nothing has been measured of: what is predicted."""
        phase: Phase = "loading" if self.bench is None else "measuring"
        past, model = self.state.past, self.state.model
        return PanelState(recipe, self.predicted(recipe), phase=phase, past=past, model=model)

    def predicted(self, recipe: Recipe) -> Prediction | None:
        """Return the prediction of a recipe, None without a model."""
        return None if self.predictor is None else self.predictor.predict(recipe)

    def show(self, state: PanelState) -> None:
        """Replace the state, and tell it."""
        self.state = state
        self.on_state.emit()

    def measuring(self, bench: Bench, recipe: Recipe) -> Make[Measurement | Extra]:
        """Return the job that measures a recipe."""

        def make(stale: Stale) -> Iterator[Measurement | Extra]:
            self.on_start.emit()
            self.compressed = None  # never two compressed models at once
            if self.unsettled == 2:
                self.settle()  # frees the model before this one

            def tell(**changes: Any) -> None:
                with self.measurer.changed:
                    if not stale():
                        self.show(replace(self.state, **changes))

            job = MeasuringJob(bench, recipe, stale, tell)
            self.enough = job.enough
            yield from job.looks(self.keep)
            if self.compressed is not None:
                yield from self.followed_up(bench, self.compressed)
            if self.unsettled:  # by now nobody predicts on the model before this one either
                self.settle()

        return make

    def keep(self, compressed: Compressed) -> None:
        """Keep the model that is being measured, for what is asked about it afterwards."""
        self.compressed = compressed

    def after_measuring(self, work: FollowUp, take: Callable[[Any], None]) -> Callable[[], None]:
        """Let each model that has just been measured be looked at, until what is returned is called.

        Args:
            work: yields what it finds in the bench and its compressed model (on the worker's thread).
            take: gets each value, under the worker's lock, unless the sliders have moved meanwhile.

        """
        mine = (work, take)
        self.follow_ups = (*self.follow_ups, mine)

        def unsubscribe() -> None:
            self.follow_ups = tuple(follow_up for follow_up in self.follow_ups if follow_up is not mine)

        return unsubscribe

    def followed_up(self, bench: Bench, compressed: Compressed) -> Iterator[Extra]:
        """Yield what follow-ups find; one that raises does not stop the others."""
        for work, take in self.follow_ups:
            try:
                for value in work(bench, compressed):
                    yield Extra(take, value)
            except Cancelled:
                raise
            except Exception as error:  # noqa: BLE001  it is shown in the panel
                self.tell_error(error)

    def take(self, result: Measurement | Extra) -> None:
        """Take over a look at the current recipe, or what a follow-up found (called by the worker, under its
        lock).
        """
        if isinstance(result, Extra):
            result.take(result.value)
            return
        if self.predictor is not None:
            self.predictor.learn(result)
        if result.recipe != self.state.recipe:  # training was stopped: the recipe says where
            self.state = replace(self.state, recipe=result.recipe)
            self.on_recipe.emit(result.recipe)
        # Of a point from the ledger, the steps that were done
        steps = max(self.state.curve_steps, result.curve[-1][0] + 1 if result.curve else 0)
        self.state = replace(
            self.state,
            point=result,
            doing="",
            phase="measured" if result.complete else "measuring",
            curve=result.curve,
            looks=result.held_out,
            curve_steps=steps,
        )
        if self.state.prediction is not None and self.state.prediction.quality is None:
            self.state = replace(self.state, prediction=self.predicted(result.recipe))
        if result.complete:
            self.predicted(result.recipe)  # reads the new point now, so that the next move need not
            self.on_points.emit()
        self.on_state.emit()

    def stop_training(self) -> None:
        """End the training that runs and measure what it has reached.

        Raises:
            RecipeError: nothing is being trained.

        """
        if self.state.phase != "training":
            raise RecipeError("nothing is being trained now")
        self.enough.set()

    def cancel(self) -> None:
        """Stop measuring; what has been read so far stays on the plot."""
        with self.measurer.changed:
            if self.measurer.busy:
                self.measurer.cancel()
                complete = self.state.point is not None and self.state.point.complete
                self.show(replace(self.state, phase="measured" if complete else "cancelled", doing=""))

    def failed(self, error: BaseException) -> None:
        """Report what the current measurement raised (called by the worker, under its lock)."""
        self.state = replace(self.state, phase="failed", doing="")
        self.tell_error(error)
        self.on_state.emit()

    def tell_error(self, error: BaseException) -> None:
        """Tell an error; where nobody listens, it goes to the log."""
        if self.on_error.subscribers:
            self.on_error.emit(error)
        else:
            traceback.print_exception(error)

    # --- what is asked besides

    def ask(self, work: Callable[[Bench, Stale], Iterator[T]], take: Callable[[T], None]) -> None:
        """Let the worker do something else on the model, behind the panel; a slider's move cancels it.

        Args:
            work: yields what it finds.
            take: gets each value, under the worker's lock.

        Raises:
            ModelError: no model is loaded.
            RecipeError: a measurement is running, which this would cancel.

        """
        bench = self.bench
        if bench is None:
            raise ModelError("no model is loaded yet")
        if self.measurer.busy:
            raise RecipeError("the measurement is still running: ask again when it has ended")
        self.submit(lambda stale: work(bench, stale), take)

    def submit(self, make: Make[T], take: Callable[[T], None]) -> None:
        """Let the worker do this in place of what it does."""

        def extras(stale: Stale) -> Iterator[Extra]:
            for value in make(stale):
                yield Extra(take, value)

        self.measurer.submit(extras, self.take)

    def idle(self) -> None:
        """Find what predictions rest on while the worker has nothing to do (called by it, under its lock)."""
        if self.predictor is not None and not self.preparer.closed:
            self.preparer.submit(self.preparing(self.predictor, self.state.recipe), lambda _nothing: None)
        self.on_idle.emit()

    def preparing(self, predictor: Predictor, recipe: Recipe) -> Make[None]:
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

    # --- the past

    def rows(self) -> list[Measurement]:
        """Return the ledger's points of this model, data and device, oldest first."""
        return [] if self.bench is None else comparable(self.bench.ledger.rows(), self.bench.context)

    def read_past(self) -> None:
        """Take the points of the ledger, and what is said about them, over into the state.

        With thousands of points that takes a moment: whoever draws calls it.
        """
        bench = self.bench
        past = Past()
        if bench is not None:
            told = filter(None, (bench.ledger.only_read, bench.ledger.damage()))
            past = Past(self.rows(), bench.ledger.annotations(), "; ".join(told))
        with self.measurer.changed:
            if bench is self.bench:
                self.state = replace(self.state, past=past)

    def tell_points(self) -> None:
        """Tell that the ledger's points, or what is said about them, have changed."""
        self.on_points.emit()
        self.on_state.emit()

    def close(self) -> None:
        """Stop all runners and let go of the model; what was alive when it was loaded is looked at for
        garbage again.
        """
        self.loader.close()
        self.measurer.close()
        self.preparer.close()
        self.choice = self.bench = self.predictor = self.compressed = None
        self.follow_ups = ()
        self.state = PanelState(self.state.recipe, phase="cancelled", model=self.state.model)
        garbage.unsettle()
