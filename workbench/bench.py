"""Bench: one task, what is computed once for it, and the ledger of what was measured on it."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from workbench.calibration.statistics import Statistics
from workbench.compress import Compressed, compress
from workbench.errors import LedgerError, RuntimeRefused
from workbench.export import check_target, export
from workbench.ledger.ledger import Ledger, default_path
from workbench.measure.behaviour import Behaviour, Continuation, differences
from workbench.measure.kl import Reference
from workbench.measure.measurement import Context, Measurement, Predicted
from workbench.measure.recent_scores import Neighbours
from workbench.measure.setting import Setting, checked_margin
from workbench.measure.weight_histograms import WeightChange, weight_changes
from workbench.measuring import Partial
from workbench.modules.offload import device_of
from workbench.modules.placement import placement_named
from workbench.predict.offload_forecast import Pace, forecast
from workbench.predict.predictor import Predictor
from workbench.recipe import Recipe
from workbench.runtime.execution import chosen, why_not
from workbench.sensitivity import LayerSensitivity, sensitivities
from workbench.tasks.base import Items, Task
from workbench.tasks.placing import capped, place_task
from workbench.util.device import pick
from workbench.util.progress import Bar, Progress, Shown, Training, both, no_progress, stoppable


class Bench:
    """A model on its data, ready to be compressed and measured.

    `measure` blocks and returns one point; `stream` yields it as it grows. What does not depend on the recipe
    (the dense model's scores and sizes, calibration statistics, factorisations) is computed once and kept.
    """

    def __init__(
        self,
        model: str | Task,
        data: str | None = None,
        *,
        device: str | None = None,
        ledger: Ledger | str | Path | None = None,
        evaluation_items: int | None = None,
        calibration_items: int | None = None,
        training_items: int | None = None,
        context_length: int | None = None,
        latency_batch: int | None = None,
        runtime: str | None = None,
        placement: str | None = None,
        confidence: float = 0.95,
        margin: float | None = None,
        offline: bool = False,
        seed: int = 0,
        progress: Shown = True,
    ) -> None:
        """Load the model and its data.

        Args:
            model: a catalogue name, a local directory, a hub id, or a ready `Task`.
            data: a data set name, hub id or local file; None takes the catalogue's.
            device: "cpu", "cuda", or None for the GPU where there is one.
            ledger: where points are kept (a path, an Optuna URL); None takes the user's own file for this
                model.
            evaluation_items: at most so many; None takes the task's default.
            calibration_items: at most so many; None takes the task's default.
            training_items: at most so many; None takes the task's default.
            context_length: tokens in a window of a language model, or read of a text; None takes the task's
                default.
            latency_batch: items in the batch that is timed; None takes 16, or 1 window of a language model or
                1 utterance.
            runtime: how both models are run when they are timed: "auto" (None), "torch", "onnx", "graph" or
                "compiled"; see `workbench runtimes`.
            placement: where the weights lie: "device", "streamed" from the host block by block, "spread" over
                all GPUs, or "auto" (None): streamed where model, compressed copy and room exceed the device's
                free memory.
            confidence: of every quality interval.
            margin: stop reading once the main metric's change is known to plus or minus this: 0.01 is 1 point
                of accuracy or of word error rate, or 1% of perplexity; None reads all items.
            offline: never reach for the network.
            seed: of the order of data.
            progress: True shows a progress bar, "lines" a line on stderr every ten seconds.

        Raises:
            ModelError, DataError, DeviceError, LedgerError, RuntimeRefused: see `workbench.errors`.
        """
        from workbench.zoo import load_task

        given = device_of(model.model) if isinstance(model, Task) else None
        place = given if device is None and given is not None else pick(device)
        engine = chosen(runtime)
        if reason := why_not(engine, place.type):
            raise RuntimeRefused(f"runtime={runtime!r} cannot be used on {place.type}: {reason}")
        self.show_progress, self.margin = progress, checked_margin(margin)
        counts = {
            "evaluation": evaluation_items,
            "calibration": calibration_items,
            "training": training_items,
        }
        task = (
            capped(place_task(model, place, placement_named(placement)), counts)
            if isinstance(model, Task)
            else load_task(
                model,
                data,
                device=str(place),
                offline=offline,
                evaluation_items=evaluation_items,
                calibration_items=calibration_items,
                training_items=training_items,
                context=context_length,
                seed=seed,
                progress=progress is True,
                placement=placement_named(placement),
            )
        )
        self.setting = Setting.of(task, place, engine, latency_batch=latency_batch, confidence=confidence)
        self.ledger = (
            ledger if isinstance(ledger, Ledger) else Ledger(ledger or default_path(task.model_name))
        )
        if self.ledger.only_read:
            warnings.warn(self.ledger.only_read, RuntimeWarning, stacklevel=2)
        self.reference = Reference(self.setting.evaluator, self.setting.statistics)
        self.neighbours, self.pace = Neighbours(), Pace()
        self.predicts: Callable[[Recipe], Predicted | None] = lambda _recipe: (
            None
        )  # a Predictor's `record`, kept with what is then measured

    @property
    def task(self) -> Task:
        """The model with its data and metric."""
        return self.setting.task

    @property
    def evaluation(self) -> Items:
        """The evaluation items, on the device."""
        return self.setting.evaluation

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.setting.device

    @property
    def statistics(self) -> Statistics:
        """What is computed once for the task."""
        return self.setting.statistics

    @property
    def context(self) -> Context:
        """What a measurement depends on besides the recipe."""
        return self.setting.context

    def predictor(self) -> Predictor:
        """Return a predictor that learns from this bench's ledger."""
        return Predictor(self.setting, self.ledger, self.pace)

    def measure(
        self,
        recipe: Recipe,
        *,
        again: bool = False,
        cancelled: Callable[[], bool] | None = None,
        margin: float | None = None,
    ) -> Measurement:
        """Return the complete measurement of a recipe; one that the ledger has already is returned at once.

        With a margin, reading stops at a look (see `early_looks`) where the main change is known well enough;
        such a point says so (`margin`, `items` of `items_total`), is kept, and goes on where it stopped when
        more is asked for.

        Args:
            recipe: what to do; `Recipe()` is the dense model itself.
            again: measure even if the ledger has this point.
            cancelled: asked between layers, batches and training steps; True stops with `Cancelled`.
            margin: half the width of the interval of the main metric's change that is enough; None takes the
                bench's, 0 reads all items.

        Raises:
            RecipeError, CompressionError: the recipe does not fit the model.
            DataError: a margin that is no number of at least 0.
            Cancelled: `cancelled` returned True.
        """
        enough = self.margin if margin is None else checked_margin(margin)
        *_, last = self.looks(
            recipe, self.setting.early() if enough else (), again=again, cancelled=cancelled, margin=enough
        )
        return last

    def stream(
        self,
        recipe: Recipe,
        *,
        again: bool = False,
        cancelled: Callable[[], bool] | None = None,
        on_compressed: Callable[[Compressed], None] | None = None,
        training: Training | None = None,
        margin: float | None = None,
        working: Progress = no_progress,
    ) -> Iterator[Measurement]:
        """Yield the measurement after 16, 64, 256 and all evaluation items (a language model's on a CPU also
        after 4), then the complete one, with latency and memory, that is in the ledger.

        Intervals are joint over the looks (`workbench.metrics.sequential_looks`): they hold however early one
        stops. Arguments as `measure`; `on_compressed` gets the compressed model before the first look, unless
        the ledger has the point already. `training` watches training steps; where it ends one early, the
        points' recipe says where. `working(what, done, total)` is told what is done between.
        """
        enough = self.margin if margin is None else checked_margin(margin)
        return self.looks(
            recipe,
            self.setting.early(),
            again=again,
            cancelled=cancelled,
            on_compressed=on_compressed,
            training=training,
            margin=enough,
            working=working,
        )

    def looks(
        self,
        recipe: Recipe,
        early: tuple[int, ...],
        *,
        again: bool,
        cancelled: Callable[[], bool] | None,
        on_compressed: Callable[[Compressed], None] | None = None,
        training: Training | None = None,
        margin: float | None = None,
        working: Progress = no_progress,
    ) -> Iterator[Measurement]:
        """Yield a measurement after each of the `early` numbers of items and after all, until one is known to
        `margin`, then the complete one.
        """
        kept = None if again else self.ledger.find(self.context.key(recipe))
        if kept is not None and kept.known_to(margin):
            yield kept
            return
        with Bar(recipe.label(), shown=self.show_progress) as bar:
            progress = stoppable(both(bar, working), cancelled)
            predicted = self.predicts(recipe)
            first = early[0] if early else len(self.evaluation)
            told = forecast(self.setting, self.pace, recipe, first)
            ahead = () if told is None else (told.words(),)
            for warning in ahead:
                progress(warning, 0, 1)
            start = time.perf_counter()
            compressed = compress(
                self.task,
                recipe,
                self.setting.statistics_with(progress),
                progress,
                shared=True,
                training=training,
            )
            compressed = dataclasses.replace(compressed, warnings=(*compressed.warnings, *ahead))
            if on_compressed is not None:
                on_compressed(compressed)
            partial = Partial(
                self.setting,
                self.reference,
                self.neighbours,
                compressed,
                (*early, len(self.evaluation)),
                progress=progress,
                compress_seconds=time.perf_counter() - start,
                margin=margin,
                resume=not again,
            )
            for number, look in enumerate(partial.looks()):
                if told is not None and not number:
                    self.pace.learn(told, look.provenance.compress_seconds, look.provenance.evaluate_seconds)
                yield look
            point = partial.finish()
        if predicted is not None and point.recipe == recipe:  # training that was stopped has made another one
            point = dataclasses.replace(point, predicted=predicted)
        self.keep(point)
        yield point

    def keep(self, point: Measurement) -> None:
        """Add a point to the ledger; a ledger that cannot be written costs a warning, never the point."""
        try:
            self.ledger.add(point)
        except LedgerError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)

    def compress(self, recipe: Recipe) -> Compressed:
        """Return the compressed model of a recipe, not measured."""
        with Bar(recipe.label(), shown=self.show_progress) as bar:
            return compress(self.task, recipe, self.setting.statistics_with(bar), bar)

    def behaviour(
        self,
        recipe: Recipe,
        *,
        compressed: Compressed | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Behaviour | tuple[Continuation, ...]:
        """Return the answers that a recipe changes: a classifier's item by item (`Behaviour`), any other
        model's dense and compressed output side by side (`Continuation`s).

        A model `compressed` by this recipe before need not be given; it saves compressing (and training)
        again.

        Raises:
            DataError: a language model without its tokenizer, classes without names, or a kind of task that
                does not say how changed answers are shown.
            Cancelled: `cancelled` returned True.
        """
        with Bar(recipe.label(), shown=self.show_progress) as bar:
            progress = stoppable(bar, cancelled)
            if compressed is None or compressed.recipe != recipe:
                compressed = compress(
                    self.task, recipe, self.setting.statistics_with(progress), progress, shared=True
                )
            return differences(self.task, compressed.model, self.setting.confidence, progress)

    def weights(
        self, recipe: Recipe, first: str = "", *, cancelled: Callable[[], bool] | None = None
    ) -> Iterator[WeightChange]:
        """Yield how the weights of each layer change under a recipe, as histograms.

        The layer named `first` comes first.

        Raises:
            RecipeError, CompressionError: the recipe does not fit the model.
            Cancelled: `cancelled` returned True.
        """
        with Bar(recipe.label(), shown=self.show_progress) as bar:
            progress = stoppable(bar, cancelled)
            compressed = compress(
                self.task, recipe, self.setting.statistics_with(progress), progress, shared=True
            )
            for done, change in enumerate(weight_changes(self.task.model, compressed, first)):
                progress("weights", done, len(compressed.report))
                yield change

    def sensitivity(
        self, recipe: Recipe, items: int | None = None, *, cancelled: Callable[[], bool] | None = None
    ) -> Iterator[LayerSensitivity]:
        """Yield what the recipe on each layer alone costs, all other layers dense (see
        `workbench.sensitivity`).

        Args:
            recipe: what to do; distillation is left out.
            items: evaluation items read for each layer; None takes 256, or 16 windows of a language model.
            cancelled: asked between layers and batches; True stops with `Cancelled`.

        Raises:
            RecipeError: the recipe compresses no layer, or `items` is below 2.
            Cancelled: `cancelled` returned True.
        """
        with Bar(recipe.label(), shown=self.show_progress) as bar:
            yield from sensitivities(self.setting, self.reference, recipe, items, stoppable(bar, cancelled))

    def export(self, recipe: Recipe, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Measure the recipe, write the compressed model, manifest and card to `directory`, and return it.

        Raises:
            ExportError: the directory holds something that is no export, or cannot be written.

        """
        check_target(Path(directory), overwrite=overwrite)
        point = self.measure(recipe)
        return export(self.task, self.compress(recipe), point, Path(directory), overwrite=overwrite)
