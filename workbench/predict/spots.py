"""Where a recipe stands among the measured ones: a number for each slider, a mark for every other choice."""

from __future__ import annotations

import math
from collections.abc import Callable

from workbench.compress.registry import METHODS
from workbench.predict.history import Spot
from workbench.predict.prior import Prior
from workbench.recipe import Recipe, Step

COORDINATES: dict[str, Callable[[float], float]] = {  # 0 is off; about 1 is as strong as it gets
    "sparsity": lambda s: s,
    "rank_ratio": lambda r: 1 - r,
    "weight_bits": lambda b: min(1.0, (2.0 ** (2 - b)) ** 0.5),
    "activation_bits": lambda b: min(1.0, (2.0 ** (4 - b)) ** 0.5),
    "kv_bits": lambda b: min(1.0, (2.0 ** (2 - b)) ** 0.5),
    "repair_ratio": lambda r: min(1.0, (4 * r) ** 0.5),
    "qat_steps": lambda n: min(1.0, 0.25 * math.log10(1 + n)),
    "transfer_steps": lambda n: min(1.0, 0.25 * math.log10(1 + n)),
    "temperature": lambda t: 0.5 + 0.05 * math.log2(t),
}


def spot_of(recipe: Recipe, prior: Prior | None) -> Spot:
    """Return where a recipe stands."""
    return Spot(
        tuple(coordinates(recipe)),
        tuple(choices(recipe)),
        None if prior is None else prior.contributions(recipe),
    )


def coordinates(recipe: Recipe) -> list[float]:
    """Return one number a method: 0 where it is off, larger where its slider is stronger."""
    return [
        0.0 if (step := recipe.main(kind.kind())) is None else coordinate(step) for kind in METHODS.steps()
    ]


def coordinate(step: Step) -> float:
    """Return where a slider stands; a method without a rule here goes by its place among its stops."""
    value = float(getattr(step, step.slider))
    rule = COORDINATES.get(step.slider)
    if rule is not None:
        return rule(value)
    low, high = (min(step.stops), max(step.stops)) if step.stops else (0.0, 1.0)
    return 0.25 + 0.75 * (value - low) / (high - low or 1.0)


def choices(recipe: Recipe) -> list[int]:
    """Return a mark of each method's other choices, 0 where it is off."""
    marks = []
    for kind in METHODS.steps():
        main = recipe.main(kind.kind())
        own = [step for step in recipe if step.kind() == kind.kind() and step is not main]
        other = (
            None
            if main is None
            else [[getattr(main, name) for name in ("targets", *main.options()) if name != main.slider], *own]
        )
        marks.append(0 if other is None else hash(repr(other)) or 1)
    return marks
