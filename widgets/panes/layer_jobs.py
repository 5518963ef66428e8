"""What the layers tab asks the session's worker for: weights under a recipe, what each layer alone costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from widgets.session.session import Session
from widgets.session.worker import Stale
from workbench.bench import Bench
from workbench.compress import Compressed
from workbench.errors import ModelError, RecipeError
from workbench.measure.weight_histograms import WeightChange, weight_changes
from workbench.modules.layer import output_head
from workbench.recipe import Recipe
from workbench.sensitivity import LayerSensitivity, layers_of


@dataclass(frozen=True)
class LayerResult:
    """One result of the worker for one model and recipe."""

    bench: Bench
    recipe: Recipe
    value: WeightChange | LayerSensitivity


class LayerJobs:
    """Reads weights only while a layer is looked at, and only when the measurement has ended.

    A slider move cancels it. The weights come from the compressed model that was just measured. For a point
    that the ledger had already, the recipe is carried out again, which gives the same bits. Either way only
    the histograms are kept.
    """

    def __init__(self, session: Session, changed: Callable[[], None]) -> None:
        """Join the session; `changed` is called when something new is known."""
        self.session, self.changed = session, changed
        self.layer, self.visible = "", True
        self.bench: Bench | None = None
        self.recipe: Recipe | None = None  # whose weights are kept
        self.weights: dict[str, WeightChange] = {}
        self.tried: tuple[Recipe, str] | None = None
        self.costs: dict[Recipe, LayerSensitivity] = {}
        # The layers of the recipe whose costs were asked for last
        self.split_recipe: tuple[Bench | None, Recipe | None, dict[str, Recipe]] = (None, None, {})
        self.asked: Recipe | None = None  # whose sensitivity is being measured
        session.after_measuring(self.follow_up, self.take)
        session.on_idle.subscribe(self.idle)

    def look_at(self, layer: str) -> None:
        """Choose the layer whose weights are wanted, none if empty."""
        self.layer = layer
        self.inspect()

    def lacking(self) -> bool:
        """Return whether the weights of the layer that is looked at are not known for the present recipe."""
        looking, present = bool(self.layer) and self.visible, (self.session.state.recipe, self.layer)
        return looking and self.shown() is None and self.tried != present

    def shown(self) -> WeightChange | None:
        """Return the histogram of the layer that is looked at, None unless it is of the present recipe."""
        fits = self.bench is self.session.bench and self.recipe == self.session.state.recipe
        return self.weights.get(self.layer) if fits else None

    def follow_up(self, bench: Bench, compressed: Compressed) -> Iterator[LayerResult]:
        """Yield the weights of a model that has just been measured, if a layer is looked at."""
        if self.layer and self.visible:
            for change in weight_changes(bench.task.model, compressed, self.layer):
                yield LayerResult(bench, compressed.recipe, change)

    def inspect(self) -> None:
        """Compress again to read the weights, if they are wanted and nothing else is running."""
        session = self.session
        with session.measurer.changed:
            bench, recipe, layer = session.bench, session.state.recipe, self.layer
            if bench is None or session.state.phase != "measured" or session.measurer.busy:
                return
            if not self.lacking():
                return

            def make(stale: Stale) -> Iterator[LayerResult]:
                for change in bench.weights(recipe, layer, cancelled=stale):
                    yield LayerResult(bench, recipe, change)
                self.tried = recipe, layer

            session.submit(make, self.take)

    def idle(self) -> None:
        """Go on when the worker has nothing to do (called by it, under its lock)."""
        self.asked = None
        self.inspect()
        self.changed()

    def sensitivity(self) -> None:
        """Measure what the present recipe costs on each layer alone.

        Raises:
            ModelError: no model is loaded.
            RecipeError: a measurement is running, which this would cancel, or the recipe compresses nothing.

        """
        bench, recipe = self.session.bench, self.session.state.recipe
        if bench is None:
            raise ModelError("no model is loaded yet")
        if self.session.state.phase in {"measuring", "training"}:
            raise RecipeError("the measurement is still running: ask again when it has ended")
        if not layers_of(bench.task.model, recipe):
            raise RecipeError(
                "no layer is compressed: turn a slider on first, then ask what each layer costs"
            )

        def make(stale: Stale) -> Iterator[LayerResult]:
            for cost in bench.sensitivity(recipe, cancelled=stale):
                yield LayerResult(bench, recipe, cost)

        self.session.submit(make, self.take)
        self.asked = recipe

    def running(self) -> bool:
        """Return whether the sensitivity of the present recipe is being measured."""
        asked = self.asked is not None and self.asked == self.session.state.recipe
        return asked and self.session.measurer.busy

    def take(self, result: LayerResult) -> None:
        """Keep a result (called by the worker, under its lock)."""
        if self.bench is not result.bench:
            self.bench, self.recipe, self.weights, self.costs = result.bench, None, {}, {}
        if isinstance(result.value, LayerSensitivity):
            self.costs[result.value.recipe] = result.value
            self.changed()
            return
        if self.recipe != result.recipe:
            self.recipe, self.weights = result.recipe, {}
        self.weights[result.value.name] = result.value
        if result.value.name == self.layer:
            self.changed()

    def known_costs(self, recipe: Recipe) -> tuple[Mapping[str, LayerSensitivity], int]:
        """Return the sensitivities that are known for a recipe, by layer, and how many there could be."""
        bench = self.session.bench
        if bench is None or self.bench is not bench or not self.costs:
            return {}, 0
        if (bench, recipe) != self.split_recipe[:2]:
            try:
                self.split_recipe = bench, recipe, layers_of(bench.task.model, recipe)
            except RecipeError:
                self.split_recipe = bench, recipe, {}
        recipes = self.split_recipe[2]
        costs = {name: self.costs[part] for name, part in recipes.items() if part in self.costs}
        return costs, len(recipes)

    def head(self) -> str | None:
        """Return the name of the output head of the present model."""
        return None if self.session.bench is None else output_head(self.session.bench.task.model)
