"""Search over recipes on one device: one slider at a time around a recipe, or all sliders at once by a
sampler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from workbench.compress.registry import METHODS
from workbench.errors import CompressionError, RecipeError
from workbench.recipe import Recipe, Step

if TYPE_CHECKING:
    from workbench.bench import Bench
    from workbench.measure.measurement import Measurement


def around(recipe: Recipe, slider: str) -> tuple[Recipe, ...]:
    """Return `recipe` with one slider moved to each of its stops, everything else unchanged, in the order of
    the stops.

    A step that the recipe lacks is added with its defaults. A stop that the rules refuse (sparsity 0.75 under
    2:4) is tried without the step's other options, and left out if that fails too.

    Raises:
        RecipeError: no method has this slider.
    """
    step = next((step for step in METHODS.steps() if step.slider == slider), None)
    if step is None:
        raise RecipeError(
            f"no slider {slider!r}; known: {', '.join(step.slider for step in METHODS.steps())}"
        )
    moved = [variant for stop in step.stops if (variant := move(recipe, step, stop)) is not None]
    return tuple(dict.fromkeys(moved))


def move(recipe: Recipe, kind: type[Step], value: Any) -> Recipe | None:
    """Return the recipe with the slider of `kind` at `value`, or None where the rules refuse it."""
    mine = recipe.main(kind.kind())
    others = [step for step in recipe if step is not mine]
    common: dict[str, Any] = {} if mine is None else {"targets": mine.targets, "seed": mine.seed}
    attempts = ([lambda: dataclasses.replace(mine, **{kind.slider: value})] if mine else []) + [
        lambda: kind(**{kind.slider: value}, **common)
    ]
    for attempt in attempts:
        try:
            steps = (
                [attempt() if step is mine else step for step in recipe]
                if mine
                else sorted([*others, attempt()], key=lambda step: step.position)
            )
            return Recipe(*steps)
        except RecipeError:
            continue
    return None


def sweep(
    bench: Bench,
    trials: int = 50,
    *,
    sliders: tuple[str, ...] | None = None,
    seed: int = 0,
    cancelled: Callable[[], bool] | None = None,
) -> list[Measurement]:
    """Measure recipes that Optuna's multi-objective TPE sampler proposes (small quality drop, small file,
    little time).

    Each trial turns every slider on or off and moves it to one of its stops; everything goes to the bench's
    ledger, so a sweep that is stopped and started again does not repeat what it has. Recipes that the model
    refuses count as trials.

    Args:
        bench: what to measure on.
        trials: how many recipes to propose.
        sliders: which to move; None moves rank, sparsity and bits; distillation takes longest, and what
            complements these (`Step.aside`) fits few recipes.
        seed: of the sampler.
        cancelled: asked between batches; True stops with `Cancelled`, what was measured stays in the ledger.

    Raises:
        RecipeError: an unknown slider, or trials below 1.
        Cancelled: `cancelled` returned True.
    """
    import optuna

    steps = {step.slider: step for step in METHODS.steps() if step.stops}
    chosen = sliders or tuple(
        name for name, step in steps.items() if not step.aside and name != "temperature"
    )
    unknown = [name for name in chosen if name not in steps]
    if unknown or trials < 1:
        raise RecipeError(
            f"sweep(sliders={chosen!r}, trials={trials}) is refused: sliders are {', '.join(steps)}; trials"
            " is at least 1"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize"] * 3, sampler=optuna.samplers.TPESampler(seed=seed))
    measured: dict[str, Measurement] = {}
    for _ in range(trials):
        trial = study.ask()
        stops: dict[str, Any] = {
            name: trial.suggest_categorical(name, [None, *steps[name].stops]) for name in chosen
        }
        try:
            point = bench.measure(
                Recipe(*(steps[name](**{name: stop}) for name, stop in stops.items() if stop is not None)),
                cancelled=cancelled,
            )
        except (RecipeError, CompressionError):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        speed = point.latency.speedup.value if point.latency else 1.0
        study.tell(trial, [min(point.primary.drop.value, 1e9), float(point.sizes.file_bytes), 1 / speed])
        measured[point.key] = point
    return list(measured.values())
