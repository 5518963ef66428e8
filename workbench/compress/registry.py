"""The methods that exist, and the recipes that can be read with them: from JSON and from flat options.

Importing this module imports `workbench.compress` first, which registers the built-in methods.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from workbench.compress.method import Method
from workbench.errors import RecipeError
from workbench.recipe import Recipe, Step, apart
from workbench.util.text import nearest

F = TypeVar("F", bound=Callable[..., Any])

PLAIN = (
    "model",
    "data",
    "device",
    "seed",
    "ledger",
    "offline",
    "evaluation_items",
    "calibration_items",
    "training_items",
    "context_length",
    "margin",
    "runtime",
    "placement",
    "progress",
    "slider_minutes",
    "plugins",
    "recipe",
)  # parameters of a job besides recipe and gates
RESERVED = {
    *PLAIN,
    "targets",
    "again",
    "export",
    "overwrite",
    "output",
    "name",
    "plugin",
    "quiet",
    "help",
}  # and every name that begins as a gate's


class Methods:
    """The methods that exist: one record for each kind of step."""

    def __init__(self) -> None:
        """Start with none; `workbench.compress` registers the built-in ones."""
        self.records: dict[type[Step], Method] = {}

    def register(self, step: type[Step], **facts: Any) -> Callable[[F], F]:
        """Return a decorator that makes `function(step, work)` the way to carry out `step`.

        facts: what else is known, by the names of `workbench.compress.method.Method`; what is left out is
        unknown, and shown so.

        Raises:
            RecipeError: the kind or one of the option names is taken, the slider names no field, or a fact
                has an unknown name or is not of its sort. Functions of a step are not tried: they may use
                what stands further down in their file.

        """
        stated = [field.name for field in dataclasses.fields(Method) if field.name not in {"step", "apply"}]
        for name in facts:
            if name not in stated:
                raise RecipeError(
                    f"{step.__name__} states {name!r}, which is no fact; {nearest(name, stated)}"
                )
        self.check(step)
        self.check_sorts(step, facts)

        def keep(function: F) -> F:
            self.records[step] = Method(step, function, **facts)
            return function

        return keep

    def check(self, step: type[Step]) -> None:
        """Refuse a step whose names clash with others'."""
        if step.slider not in step.options():
            raise RecipeError(
                f"{step.__name__}.slider is {step.slider!r}, which is none of its options:"
                f" {', '.join(step.options())}"
            )
        taken = sorted(
            name for name in step.options() if name in RESERVED or name.startswith(("max_", "min_"))
        )
        if taken:
            raise RecipeError(
                f"{step.__name__} cannot be registered: the workbench itself uses {', '.join(taken)} (and"
                " max_, min_ for gates); rename it"
            )
        for registered in self.records:
            shared = set(step.options()) & set(registered.options())
            if registered.kind() == step.kind() or shared:
                raise RecipeError(
                    f"{step.__name__} cannot be registered: {registered.__name__} already has"
                    f" {', '.join(sorted(shared)) or 'this name'}"
                )

    def check_sorts(self, step: type[Step], facts: Mapping[str, Any]) -> None:
        """Refuse a fact that is no function where one is needed, or one where a word or a truth is."""
        for name, value in facts.items():
            plain = {"title": str, "alone": bool}.get(name)
            if value is not None and not (callable(value) if plain is None else isinstance(value, plain)):
                needed = "a function" if plain is None else f"a {plain.__name__}"
                raise RecipeError(f"{step.__name__} states {name}={value!r}, which should be {needed}")

    def unregister(self, step: type[Step]) -> None:
        """Forget a method (for tests and for reloading a plugin)."""
        self.records.pop(step, None)

    def of(self, step: Step | type[Step]) -> Method:
        """Return the record of a step's method.

        Raises:
            RecipeError: nobody has registered it.

        """
        kind = step if isinstance(step, type) else type(step)
        if kind not in self.records:
            raise RecipeError(f"{kind.__name__} is not registered: import the module that registers it")
        return self.records[kind]

    def __iter__(self) -> Iterator[Method]:
        """Iterate over the records, in the order in which flat options are applied."""
        return iter(self.records[step] for step in self.steps())

    def steps(self) -> list[type[Step]]:
        """Return every step class, in the order in which flat options are applied."""
        return sorted(self.records, key=lambda step: step.position)

    def step(self, kind: str) -> type[Step]:
        """Return the step class of this kind, or raise `RecipeError` with the nearest names."""
        named = next((step for step in self.records if step.kind() == kind), None)
        if named is None:
            raise RecipeError(
                f"unknown step {kind!r}; {nearest(kind, [step.kind() for step in self.steps()])}"
            )
        return named

    def options(self) -> dict[str, type[Step]]:
        """Return every flat option name, such as `sparsity` or `prune_targets`, with the step that it belongs
        to.
        """
        owners: dict[str, type[Step]] = {}
        for step in self.steps():
            owners.update(dict.fromkeys([*step.options(), f"{step.kind()}_targets"], step))
        return owners

    def from_json(self, text: str) -> Recipe:
        """Return the recipe that `Recipe.to_json` wrote.

        Raises:
            RecipeError: not JSON, not a list of steps, an unknown step, or a value out of range.

        """
        try:
            items = json.loads(text)
            kinds = [str(item.pop("step")) for item in items]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise RecipeError(
                f"not a recipe in JSON: {text[:80]!r}; expected a list such as {Recipe().to_json()!r} or"
                " [{'step': 'prune', 'sparsity': 0.5}]"
            ) from None
        return Recipe(*(as_written(self.step(kind), item) for kind, item in zip(kinds, items, strict=True)))

    def recipe(self, options: Mapping[str, Any], seed: int = 0) -> Recipe:
        """Return the recipe of flat options, as `steps_from` reads them.

        Raises `RecipeError` also for steps that do not combine.
        """
        return Recipe(*self.steps_from(options, seed))

    def steps_from(self, options: Mapping[str, Any], seed: int = 0) -> list[Step]:
        """Return the steps of flat options; None means not given, and a step is on when its slider is given.

        A target such as `classifier=8` gives that layer its own value of the slider, in a step of its own.

        Raises:
            RecipeError: an unknown option, a bad value, or a choice given without its slider.

        """
        owners = self.options()
        for name in options:
            if name not in owners:
                raise RecipeError(f"unknown option {name!r}; {nearest(name, owners)}")
        steps: list[Step] = []
        for step in self.steps():
            given = {name: options[name] for name in step.options() if options.get(name) is not None}
            targets = options.get(f"{step.kind()}_targets")
            if targets:
                given["targets"] = tuple(targets.split(",") if isinstance(targets, str) else targets)
            if step.slider in given:
                steps += apart(step(seed=seed, **given))
            elif given:
                raise RecipeError(
                    f"{', '.join(given)} given without {step.slider}: give {step.slider} too, or leave"
                    " them out"
                )
        return sorted(steps, key=lambda step: step.order)


def as_written(step: type[Step], options: dict[str, Any]) -> Step:
    """Return a step from JSON; one that an earlier version wrote, in full, does what it did then."""
    whole = {"targets", "seed"} <= options.keys()
    return step(**{**(step.before if whole else {}), **options})


METHODS = Methods()
