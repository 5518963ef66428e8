"""What each layer alone costs: the recipe on one layer at a time, everything else dense.

What it does not say: what layers cost together. Errors of one layer pass through the next ones and can add
up, cancel or grow, so the costs of single layers do not sum to that of the whole recipe. Training is left
out: it would train a model of which only one layer is compressed; so is the KV cache, which is no layer. Each
interval holds by itself: of twenty layers, about one may lie outside its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from workbench.compress import compress
from workbench.compress.registry import METHODS
from workbench.compress.vocabulary import besides
from workbench.errors import CompressionError, RecipeError
from workbench.measure.kl import Reference
from workbench.measure.setting import Setting
from workbench.measure.size import sizes
from workbench.metrics.quality import Estimate, quality
from workbench.modules.layer import find_layers, output_head
from workbench.modules.vocabulary import vocabulary_of
from workbench.recipe import Recipe, Step
from workbench.util.progress import Progress

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LayerSensitivity:
    """What a recipe on one layer alone costs and saves.

    `drop` is how much worse the task's metric gets (as `Quality.drop`), `loss` how much the loss grows in
    nats (None where a task has none), both paired with the dense model on the same `items`; `saved_bytes` is
    how much smaller the file gets. A layer that no step fits has a `reason` and nothing else.
    """

    name: str
    recipe: Recipe
    metric: str
    items: int
    drop: Estimate | None
    loss: Estimate | None
    saved_bytes: int
    reason: str = ""


def alone(recipe: Iterable[Step], layer: str, head: str | None = None) -> Recipe:
    """Return the part of a recipe that works on one layer, without training or KV cache.

    `head` names the output head.

    Raises:
        RecipeError: a step works on one factor of this layer only.
    """
    steps = []
    for step in recipe:
        whole = step.takes(layer, head=layer == head)
        of_factors = {step.takes(f"{layer}.{index}", layer, head=layer == head) for index in (0, 1)}
        if not METHODS.of(step).alone:  # or it does not say
            continue
        if of_factors != {whole}:
            raise RecipeError(f"{step!r} works on one factor of {layer} only: its sensitivity is not defined")
        if whole:
            steps.append(dataclasses.replace(step, targets=(layer,)))
    return Recipe(*steps)


def layers_of(model: nn.Module, recipe: Recipe) -> dict[str, Recipe]:
    """Return the layers that a recipe works on, each with its own part of it, in the order of the model."""
    head, layers = output_head(model), find_layers(model)[0]
    whole = [*recipe, *besides(recipe, vocabulary_of(model, layers.values()))]
    # What a recipe leaves to targets of its own is no part of it, as the head
    recipes = {name: alone(whole, name, name if layer.reserved else head) for name, layer in layers.items()}
    return {name: part for name, part in recipes.items() if len(part)}


def sensitivities(
    setting: Setting, reference: Reference, recipe: Recipe, items: int | None, progress: Progress
) -> Iterator[LayerSensitivity]:
    """Yield the sensitivity of each layer that `recipe` works on.

    What was found before for the same part is not done again.

    Raises:
        RecipeError: the recipe works on no layer, or see `alone`; `items` below 2.
    """
    count = min(len(setting.evaluation), items or setting.task.kind.sensitivity_items)
    if count < 2:
        raise RecipeError(
            f"items={items!r} is refused: an interval needs at least 2 of the {len(setting.evaluation)}"
            " evaluation items"
        )
    recipes = layers_of(setting.task.model, recipe)
    if not recipes:
        silent = [type(step).__name__ for step in recipe if METHODS.of(step).alone is None]
        if silent:
            raise RecipeError(
                f"nothing says whether {' and '.join(dict.fromkeys(silent))} makes sense on one layer alone"
            )
        raise RecipeError(f"{recipe!r} compresses no layer: turn a slider on first")
    for index, (name, part) in enumerate(recipes.items()):
        progress("sensitivity", index, len(recipes))
        yield setting.statistics.once(
            ("sensitivity", part, count),
            partial(measured, setting, reference, name, part, count=count, progress=progress),
        )
    progress("sensitivity", len(recipes), len(recipes))


def measured(
    setting: Setting, reference: Reference, name: str, part: Recipe, *, count: int, progress: Progress
) -> LayerSensitivity:
    """Return the sensitivity of one layer: compress it alone, and score it on the first `count` items."""
    task = setting.task
    try:
        compressed = compress(task, part, setting.statistics_with(progress), progress, shared=True)
    except CompressionError as error:
        return LayerSensitivity(name, part, task.kind.primary, count, None, None, 0, str(error))
    dense = reference.scores(count, progress)
    mine = setting.evaluator.scores(compressed.model, [], count, progress)
    by_metric = {
        metric.metric: metric for metric in quality(task.kind.primary, dense, mine, setting.confidence)
    }
    main = by_metric[task.kind.primary]
    loss = (
        by_metric["loss"].change
        if "loss" in by_metric
        else logarithm(main.change)
        if main.metric == "perplexity"
        else None
    )
    before = setting.statistics.once("stored sizes", lambda: sizes(task.model)).file_bytes
    saved = before - sizes(compressed.model, compressed.layers).file_bytes
    return LayerSensitivity(name, part, main.metric, count, main.drop, loss, saved)


def logarithm(change: Estimate) -> Estimate:
    """Return the change of the loss in nats that a change of perplexity is."""
    return change.mapped(lambda x: math.log1p(x) if x > -1 else -math.inf)
