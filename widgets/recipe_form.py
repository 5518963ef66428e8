"""The recipe as sliders: one group of controls for every registered method, with undo, redo and reset."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ipywidgets as ipw
import traitlets

from widgets.step_form import StepForm
from workbench.errors import RecipeError
from workbench.recipe import METHODS, Recipe

MERGE_SECONDS = 1.0  # moves of one slider that follow each other faster are one step of undo


class RecipeForm(ipw.VBox):
    """Sliders and choices of every registered method; `recipe` is what they describe.

    `error` is why they describe no recipe (`recipe` then keeps its last value), `note` what the form changed by itself, and
    `last` the control that was moved last, for messages.
    """

    recipe = traitlets.Instance(Recipe, read_only=True)
    error = traitlets.Unicode(read_only=True)
    note = traitlets.Unicode(read_only=True)
    last = traitlets.Unicode(read_only=True)

    def __init__(self, recipe: Recipe | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Make one group of controls a method; `clock` tells moves of one drag from separate ones."""
        self.clock = clock
        self.set_trait("recipe", Recipe())
        self.past: list[Recipe] = []
        self.future: list[Recipe] = []
        self.moved_at = float("-inf")
        self.hold = False
        self.forms = [StepForm(kind) for kind in METHODS.steps()]
        for form in self.forms:
            form.observe(self.moved, ["step", "error"])
        super().__init__(self.forms)
        self.add_class("wb-form")
        if recipe is not None:
            self.write(recipe)
            self.set_trait("recipe", recipe)

    def moved(self, change: dict[str, Any]) -> None:
        """React to one method's controls."""
        if self.hold:
            return
        form: StepForm = change["owner"]
        last = form.kind.slider
        if form.error:
            self.set_trait("last", last)
            self.set_trait("error", form.error)
            return
        try:
            made = Recipe(*(other.step for other in self.forms if other.step is not None))
        except RecipeError as error:
            self.set_trait("last", last)
            self.set_trait("error", str(error))
            return
        self.remember(last)
        self.settle(made, form.note, last)

    def remember(self, last: str) -> None:
        """Keep the recipe before this move for undo; the many moves of one drag are one step."""
        now = self.clock()
        if last != self.last or now - self.moved_at > MERGE_SECONDS or not self.past:
            self.past.append(self.recipe)
        self.future.clear()
        self.moved_at = now

    def settle(self, made: Recipe, note: str = "", last: str = "") -> None:
        """Take over a recipe that the controls describe."""
        self.set_trait("last", last)
        self.set_trait("error", "")
        self.set_trait("note", note)
        self.set_trait("recipe", made)

    def write(self, recipe: Recipe) -> None:
        """Put a recipe into the controls without reacting.

        Raises:
            RecipeError: two steps of one kind, or an order of steps that the sliders cannot show.

        """
        kinds = [step.kind() for step in recipe]
        shown = [form.kind.kind() for form in self.forms if form.kind.kind() in kinds]
        if kinds != shown:
            raise RecipeError(f"{recipe!r} cannot be put on the sliders: they hold one step of each kind, in the order {', '.join(shown)}")
        self.hold = True
        try:
            for form in self.forms:
                form.set_step(recipe.get(form.kind.kind()))
        finally:
            self.hold = False

    def set_recipe(self, recipe: Recipe) -> None:
        """Put a recipe on the sliders, as one step of undo.

        Raises:
            RecipeError: see `write`.

        """
        self.write(recipe)
        if recipe != self.recipe:
            self.past.append(self.recipe)
            self.future.clear()
        self.settle(recipe)

    def reset(self) -> None:
        """Turn every method off."""
        self.set_recipe(Recipe())

    def undo(self) -> None:
        """Go back one step; nothing happens at the beginning."""
        self.travel(self.past, self.future)

    def redo(self) -> None:
        """Go forward one step; nothing happens at the end."""
        self.travel(self.future, self.past)

    def travel(self, source: list[Recipe], target: list[Recipe]) -> None:
        """Move to the newest recipe of `source`, and keep the present one in `target`."""
        if not source:
            return
        target.append(self.recipe)
        recipe = source.pop()
        self.write(recipe)
        self.settle(recipe)
