"""Search over recipes. This version: one slider at a time, around a recipe."""

from __future__ import annotations

import dataclasses
from typing import Any

from workbench.errors import RecipeError
from workbench.recipe import METHODS, Recipe, Step


def around(recipe: Recipe, slider: str) -> tuple[Recipe, ...]:
    """Return `recipe` with one slider moved to each of its stops, everything else unchanged, in the order of the stops.

    A step that the recipe lacks is added with its defaults. A stop that the rules refuse (sparsity 0.75 under 2:4) is tried
    without the step's other options, and left out if that fails too.

    Raises:
        RecipeError: no method has this slider.

    """
    step = next((step for step in METHODS.steps() if step.slider == slider), None)
    if step is None:
        raise RecipeError(f"no slider {slider!r}; known: {', '.join(step.slider for step in METHODS.steps())}")
    moved = [made for stop in step.stops if (made := move(recipe, step, stop)) is not None]
    return tuple(dict.fromkeys(moved))


def move(recipe: Recipe, kind: type[Step], value: Any) -> Recipe | None:
    """Return the recipe with the slider of `kind` at `value`, or None where the rules refuse it."""
    mine = recipe.get(kind.kind())
    others = [step for step in recipe if step is not mine]
    common: dict[str, Any] = {} if mine is None else {"targets": mine.targets, "seed": mine.seed}
    attempts = ([lambda: dataclasses.replace(mine, **{kind.slider: value})] if mine else []) + [lambda: kind(**{kind.slider: value}, **common)]
    for attempt in attempts:
        try:
            steps = [attempt() if step is mine else step for step in recipe] if mine else sorted([*others, attempt()], key=lambda step: step.position)
            return Recipe(*steps)
        except RecipeError:
            continue
    return None
