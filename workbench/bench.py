"""Bench: one task, what is computed once for it, and the ledger of what was measured on it."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from workbench.compress import Compressed, compress
from workbench.compress.layers import Progress, no_progress
from workbench.device import describe, pick
from workbench.errors import Cancelled, LedgerError, RuntimeRefused
from workbench.ledger import Ledger, default_path
from workbench.looks import LOOKS, Partial
from workbench.measure.behaviour import Behaviour, Continuation, behaviour, continuations, told_apart
from workbench.measure.evaluator import Evaluator
from workbench.measure.measurement import Context, Measurement
from workbench.measure.size import Sizes, sizes
from workbench.measure.weights import WeightChange, weight_changes
from workbench.progress import Bar, Training
from workbench.recipe import Recipe
from workbench.runtime.execution import chosen, why_not
from workbench.statistics import Statistics
from workbench.tasks.base import Scores, Task
from workbench.tasks.language_modelling import LanguageModelling

if TYPE_CHECKING:
    import torch

    from workbench.sensitivity import LayerSensitivity

T = TypeVar("T")

class Bench:
    """A model on its data, ready to be compressed and measured.

    `measure` blocks and returns one point; `stream` yields it as it grows. What does not depend on the recipe (the dense
    model's scores and sizes, calibration statistics, factorisations) is computed once and kept.
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
        confidence: float = 0.95,
        offline: bool = False,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        """Load the model and its data.

        Args:
            model: a catalogue name, a local directory, a hub id, or a ready `Task`.
            data: a data set name, hub id or local file; None takes the catalogue's.
            device: "cpu", "cuda", or None for the GPU where there is one.
            ledger: where points are kept (a path, an Optuna URL); None takes the user's own file for this model.
            evaluation_items: at most so many; None takes the task's default.
            calibration_items: at most so many; None takes the task's default.
            training_items: at most so many; None takes the task's default.
            context_length: tokens in a window of a language model; None takes the task's default.
            latency_batch: items in the batch that is timed; None takes 16, or 1 window of a language model or 1 utterance.
            runtime: how both models are run when they are timed: "auto" (None), "torch", "onnx", "graph" or "compiled"; see `workbench runtimes`.
            confidence: of every quality interval.
            offline: never reach for the network.
            seed: of the order of data.
            progress: whether to show a progress bar.

        Raises:
            ModelError, DataError, DeviceError, LedgerError, RuntimeRefused: see `workbench.errors`.

        """
        from workbench.zoo import load_task

        given = next(model.model.parameters()).device if isinstance(model, Task) else None
        self.device = given if device is None and given is not None else pick(device)
        self.runtime = chosen(runtime)
        if reason := why_not(self.runtime, self.device.type):
            raise RuntimeRefused(f"runtime={runtime!r} cannot be used on {self.device.type}: {reason}")
        self.show_progress = progress
        self.task = (
            on_device(model, self.device)
            if isinstance(model, Task)
            else load_task(
                model, data, device=str(self.device), offline=offline, evaluation_items=evaluation_items, calibration_items=calibration_items,
                training_items=training_items, context=context_length, seed=seed, progress=progress,
            )
        )  # fmt: skip
        self.evaluation = self.task.evaluation.to(self.device)
        self.evaluator = Evaluator(self.task, self.evaluation)
        self.confidence = confidence
        self.latency_items = self.evaluation[: latency_batch or self.task.kind.latency_items]
        self.context = Context(
            self.task.model_name, self.task.model_fingerprint, self.task.data_name, self.task.data_fingerprint, self.device.type,
            describe(self.device), len(self.latency_items), confidence, importlib.metadata.version("compression-workbench"), self.runtime,
        )  # fmt: skip
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger or default_path(self.task.model_name))
        self.statistics = Statistics(self.task)

    def measure(self, recipe: Recipe, *, again: bool = False, cancelled: Callable[[], bool] | None = None) -> Measurement:
        """Return the complete measurement of a recipe; one that the ledger has already is returned at once.

        Args:
            recipe: what to do; `Recipe()` is the dense model itself.
            again: measure even if the ledger has this point.
            cancelled: asked between layers, batches and training steps; True stops with `Cancelled`.

        Raises:
            RecipeError, CompressionError: the recipe does not fit the model.
            Cancelled: `cancelled` returned True.

        """
        *_, last = self.looks(recipe, (), again=again, cancelled=cancelled)
        return last

    def stream(
        self, recipe: Recipe, *, again: bool = False, cancelled: Callable[[], bool] | None = None, on_compressed: Callable[[Compressed], None] | None = None,
        training: Training | None = None,
    ) -> Iterator[Measurement]:
        """Yield the measurement after 16, 64, 256 and all evaluation items; the last one is complete and in the ledger.

        Intervals are joint over the looks (Bonferroni): they hold however early one stops. Arguments as `measure`;
        `on_compressed` gets the compressed model before the first look, unless the ledger has the point already. `training`
        watches training steps; where it ends one early, the points' recipe says where.
        """
        return self.looks(recipe, tuple(n for n in LOOKS if n < len(self.evaluation)), again=again, cancelled=cancelled, on_compressed=on_compressed, training=training)

    def looks(
        self, recipe: Recipe, early: tuple[int, ...], *, again: bool, cancelled: Callable[[], bool] | None, on_compressed: Callable[[Compressed], None] | None = None,
        training: Training | None = None,
    ) -> Iterator[Measurement]:
        """Yield a measurement after each of the `early` numbers of items, then the complete one."""
        known = None if again else self.ledger.find(self.context.key(recipe))
        if known is not None:
            yield known
            return
        with Bar(recipe.label(), shown=self.show_progress) as bar:
            progress = stoppable(bar, cancelled)
            start = time.perf_counter()
            compressed = compress(self.task, recipe, self.statistics_with(progress), progress, shared=True, training=training)
            if on_compressed is not None:
                on_compressed(compressed)
            partial = Partial(self, compressed, len(early) + 1, progress, time.perf_counter() - start)
            for count in early:
                yield partial.look(count)
            point = partial.finish()
        self.keep(point)
        yield point

    def keep(self, point: Measurement) -> None:
        """Add a point to the ledger; a ledger that cannot be written costs a warning, never the point."""
        import warnings

        try:
            self.ledger.add(point)
        except LedgerError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)

    def statistics_with(self, progress: Progress) -> Statistics:
        """Return the statistics, reporting to `progress` if they have to be computed now."""
        self.statistics.progress = progress
        return self.statistics

    def compress(self, recipe: Recipe) -> Compressed:
        """Return the compressed model of a recipe, not measured."""
        with Bar(recipe.label(), shown=self.show_progress) as bar:
            return compress(self.task, recipe, self.statistics_with(bar), bar)

    def behaviour(
        self, recipe: Recipe, *, compressed: Compressed | None = None, cancelled: Callable[[], bool] | None = None
    ) -> Behaviour | tuple[Continuation, ...]:
        """Return what a recipe changes: a classifier's answers, item by item, or what another model writes, hears or finds alike.

        A model `compressed` by this recipe before need not be given; it saves compressing (and training) again.

        Raises:
            DataError: a language model without its tokenizer.
            Cancelled: `cancelled` returned True.

        """
        with Bar(recipe.label(), shown=self.show_progress) as bar:
            progress = stoppable(bar, cancelled)
            if compressed is None or compressed.recipe != recipe:
                compressed = compress(self.task, recipe, self.statistics_with(progress), progress, shared=True)
            if self.task.labels:
                return behaviour(self.task, compressed.model, self.confidence, progress)
            if isinstance(self.task.kind, LanguageModelling):
                return continuations(self.task, compressed.model)
            return told_apart(self.task, compressed.model, progress=progress)

    def weights(self, recipe: Recipe, first: str = "", *, cancelled: Callable[[], bool] | None = None) -> Iterator[WeightChange]:
        """Yield how the weights of each layer change under a recipe, as histograms; the layer named `first` comes first.

        Raises:
            RecipeError, CompressionError: the recipe does not fit the model.
            Cancelled: `cancelled` returned True.

        """
        with Bar(recipe.label(), shown=self.show_progress) as bar:
            progress = stoppable(bar, cancelled)
            compressed = compress(self.task, recipe, self.statistics_with(progress), progress, shared=True)
            for done, change in enumerate(weight_changes(self.task.model, compressed, first)):
                progress("weights", done, len(compressed.report))
                yield change

    def sensitivity(self, recipe: Recipe, items: int | None = None, *, cancelled: Callable[[], bool] | None = None) -> Iterator[LayerSensitivity]:
        """Yield what the recipe on each layer alone costs, all other layers dense (see `workbench.sensitivity`).

        Args:
            recipe: what to do; distillation is left out.
            items: evaluation items read for each layer; None takes 256, or 16 windows of a language model.
            cancelled: asked between layers and batches; True stops with `Cancelled`.

        Raises:
            RecipeError: the recipe compresses no layer, or `items` is below 2.
            Cancelled: `cancelled` returned True.

        """
        from workbench.sensitivity import sensitivities

        with Bar(recipe.label(), shown=self.show_progress) as bar:
            yield from sensitivities(self, recipe, items, stoppable(bar, cancelled))

    def export(self, recipe: Recipe, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Measure the recipe, write the compressed model, manifest and card to `directory`, and return it.

        Raises:
            ExportError: the directory holds something that is no export, or cannot be written.

        """
        from workbench.export import check_target, export

        check_target(Path(directory), overwrite=overwrite)
        point = self.measure(recipe)
        return export(self.task, self.compress(recipe), point, Path(directory), overwrite=overwrite)

    def dense_scores(self, count: int, progress: Progress = no_progress) -> Scores:
        """Return the dense model's scores on the first `count` evaluation items, computed once."""
        return self.evaluator.scores(self.task.model, self.statistics.once("dense scores", list), count, progress)

    def dense_sizes(self) -> Sizes:
        """Return the dense model's sizes, computed once."""
        return self.statistics.once("dense sizes", lambda: sizes(self.task.model))


def on_device(task: Task, device: torch.device) -> Task:
    """Return the task with its model on `device`; a model that has to move is copied, the given one stays where it is."""
    if next(task.model.parameters()).device == device:
        return task
    return dataclasses.replace(task, model=copy.deepcopy(task.model).to(device))


def stoppable(progress: Progress, cancelled: Callable[[], bool] | None) -> Progress:
    """Return `progress` that raises `Cancelled` when `cancelled()` says so."""
    if cancelled is None:
        return progress

    def report(what: str, done: int, total: int) -> None:
        if cancelled():
            raise Cancelled(f"cancelled during {what}, {done} of {total}")
        progress(what, done, total)

    return report
