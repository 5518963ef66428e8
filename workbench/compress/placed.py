"""Which steps can be taken on a model that is streamed from the host, or spread over GPUs."""

from __future__ import annotations

from torch import nn

from workbench.compress.registry import METHODS
from workbench.errors import CompressionError
from workbench.modules.placement import gigabytes, is_placed, model_bytes, words
from workbench.recipe import Recipe, Step


def why_not(step: Step) -> str:
    """Return why a step cannot be taken on a model that is streamed or spread, empty if it can."""
    placed = METHODS.of(step).placed
    return "nothing says that this method works block by block" if placed is None else placed(step)


def refuse(recipe: Recipe, model: nn.Module) -> None:
    """Refuse a recipe with a step that a streamed or spread model cannot take.

    Raises:
        CompressionError: names the step, the reason, and what would work.

    """
    if not is_placed(model):
        return
    for step in recipe:
        if reason := why_not(step):
            raise CompressionError(
                f"{step!r} does not work on a model that is {words(model)}"
                f" ({gigabytes(model_bytes(model))}): {reason}"
            )
