"""Where a recipe stands among the measured ones: a number for each slider, a mark for every other choice."""

from __future__ import annotations

from workbench.compress.method import Method, WholeTable
from workbench.compress.registry import METHODS
from workbench.predict.history import Spot
from workbench.predict.layer_errors import rule_of
from workbench.predict.prior import Prior
from workbench.recipe import Recipe, Step


def spot_of(recipe: Recipe, prior: Prior | None, *, ratio: bool = False) -> Spot:
    """Return where a recipe stands; `ratio`: the metric's change is a ratio."""
    lost = {step.kind() for step in unknown(recipe, prior, ratio=ratio)}
    return Spot(
        tuple(coordinates(recipe)),
        tuple(choices(recipe)),
        None if prior is None or lost else prior.costs(recipe),
        tuple(index for index, method in enumerate(METHODS) if method.kind in lost),
    )


def unknown(recipe: Recipe, prior: Prior | None, *, ratio: bool = False) -> list[Step]:
    """Return the steps of which nothing but measured points with their settings can say how they change
    quality: no rule holds, or the table that it needs is not there. What leaves a model as a whole is not
    like anything else that was measured.
    """
    return [step for step in recipe if not foreseen(step, prior, ratio=ratio)]


def foreseen(step: Step, prior: Prior | None, *, ratio: bool) -> bool:
    """Return whether a rule, or points near by where a rule holds, say what a step does."""
    rule = rule_of(step)
    if not isinstance(rule, WholeTable):
        return rule is not None
    return prior is not None and prior.foresees(step) and (rule.ratios or not ratio)


def coordinates(recipe: Recipe) -> list[float]:
    """Return one number a method: 0 where it is off, larger where its slider is stronger."""
    return [
        0.0 if (step := recipe.main(method.kind)) is None else coordinate(method, step) for method in METHODS
    ]


def coordinate(method: Method, step: Step) -> float:
    """Return how strong a step is, 1 where its method does not say: `choices` tells values apart then."""
    return 1.0 if method.strength is None else method.strength(float(getattr(step, step.slider)))


def choices(recipe: Recipe) -> list[int]:
    """Return a mark of each method's other choices, 0 where it is off."""
    marks = []
    for method in METHODS:
        main = recipe.main(method.kind)
        own = [step for step in recipe if step.kind() == method.kind and step is not main]
        slider = "" if main is None or method.strength is None else main.slider
        other_choices = (
            None
            if main is None
            else [[getattr(main, name) for name in ("targets", *main.options()) if name != slider], *own]
        )
        marks.append(0 if other_choices is None else hash(repr(other_choices)) or 1)
    return marks
