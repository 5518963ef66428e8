"""What a recipe does to a model's shapes: a millisecond, because no weight is read."""

from __future__ import annotations

from workbench.compress.registry import METHODS
from workbench.compress.vocabulary import besides
from workbench.recipe import Recipe
from workbench.shapes.outline import Outline


def after(outline: Outline, recipe: Recipe) -> Outline | None:
    """Return an outline after a recipe, or None where one of its methods does not say what it leaves."""
    left = outline
    for step in (*recipe, *besides(recipe, outline.vocabulary)):
        shapes = METHODS.of(step).shapes
        changed = None if shapes is None else shapes(left, step)
        if changed is None:
            return None
        left = changed
    return left.settled()
