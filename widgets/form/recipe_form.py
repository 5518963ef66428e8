"""The recipe as sliders: one group of controls for every registered method, with undo, redo and reset.

Methods that complement others (`Step.aside`) are in a fold below the ones that a user starts with.

Layers may stand apart from the sliders: left out by targets that begin with `!`, or in a step of their own
beside the one on the slider. Moving a slider keeps both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ipywidgets as ipw
import traitlets

from widgets.form.layer_steps import LayerSteps, Line
from widgets.form.step_form import StepForm
from workbench.compress.registry import METHODS
from workbench.errors import RecipeError
from workbench.recipe import Recipe, Step

MERGE_SECONDS = 1.0  # moves of one slider that follow each other faster are one step of undo


@dataclass(frozen=True)
class FormState:
    """What the sliders describe.

    `error` is why they describe no recipe (`recipe` then stays what it was), `note` what the form changed by
    itself, and `last` the option that was moved last, for messages.
    """

    recipe: Recipe = field(default_factory=Recipe)
    error: str = ""
    note: str = ""
    last: str = ""


class RecipeForm(ipw.VBox):
    """Sliders and choices of every registered method; `state` is what they describe."""

    state = traitlets.Instance(FormState, (), read_only=True)

    def __init__(self, recipe: Recipe | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Make one group of controls a method; `clock` tells moves of one drag from separate ones."""
        self.clock = clock
        self.past: list[Recipe] = []
        self.future: list[Recipe] = []
        self.moved_at = float("-inf")
        self.hold = False
        self.forms = [StepForm(kind) for kind in METHODS.steps()]
        for form in self.forms:
            form.observe(self.moved, "state")
        aside = [form for form in self.forms if form.kind.aside]
        self.fold = ipw.VBox(aside, layout=ipw.Layout(display="none"))
        self.more = ipw.ToggleButton(
            description="more methods",
            tooltip=f"more methods: {', '.join(form.on.description for form in aside)}",
        )
        self.more.observe(lambda _: self.unfold(), "value")
        super().__init__([*(form for form in self.forms if not form.kind.aside), self.more, self.fold])
        self.more.add_class("wb-more")
        self.add_class("wb-form")
        if recipe is not None:
            self.write(recipe)
            self.settle(recipe)

    @property
    def recipe(self) -> Recipe:
        """Return the recipe on the sliders."""
        return self.state.recipe

    def unfold(self) -> None:
        """Show or hide the methods in the fold."""
        self.fold.layout.display = None if self.more.value else "none"

    def moved(self, change: dict[str, Any]) -> None:
        """React to one method's controls."""
        if self.hold:
            return
        form, last = change["owner"], change["owner"].kind.slider
        error = form.state.error
        if not error:
            try:
                steps = [step for step_form in self.forms for step in step_form.steps()]
                recipe = Recipe(*sorted(steps, key=lambda step: step.order))
            except RecipeError as refused:
                error = str(refused)
        if error:
            self.set_trait("state", replace(self.state, error=error, last=last))
            return
        if recipe != self.recipe:
            self.remember(last)
        self.settle(recipe, form.state.note, last)

    def remember(self, last: str) -> None:
        """Keep the recipe before this move for undo; the many moves of one drag are one step."""
        now = self.clock()
        if last != self.state.last or now - self.moved_at > MERGE_SECONDS or not self.past:
            self.past.append(self.recipe)
        self.future.clear()
        self.moved_at = now

    def settle(self, recipe: Recipe, note: str = "", last: str = "") -> None:
        """Take over a recipe that the controls describe."""
        self.set_trait("state", FormState(recipe, note=note, last=last))

    def write(self, recipe: Recipe) -> None:
        """Put a recipe into the controls without reacting.

        Raises:
            RecipeError: an order of steps that the sliders cannot show.

        """
        kinds = {step.kind() for step in recipe}
        shown = [kind for form in self.forms if (kind := form.kind.kind()) in kinds]
        together = sorted(recipe, key=lambda step: shown.index(step.kind()))
        if list(recipe) != sorted(together, key=lambda step: step.order):
            raise RecipeError(
                f"{recipe!r} cannot be put on the sliders: they hold steps in the order {', '.join(shown)},"
                " those of one kind together"
            )
        self.hold = True
        try:
            for form in self.forms:
                kind = form.kind.kind()
                form.set_steps(recipe.main(kind), [step for step in recipe if step.kind() == kind])
        finally:
            self.hold = False
        if any(recipe.get(form.kind.kind()) for form in self.fold.children):
            self.more.value = True  # nothing that matters is hidden

    def exclude(self, layer: str, kind: str) -> None:
        """Leave a layer out of a method, as one step of undo; another layer's own step stays.

        Raises:
            RecipeError: the method is off, or works on this layer alone.

        """
        self.edit(kind, f"{kind} without {layer}", lambda steps: steps.exclude(layer))

    def override(self, layer: str, step: Step) -> None:
        """Give a layer a step of its own in place of what the slider says.

        The moves of one drag are one step of undo.

        Raises:
            RecipeError: the method is off, or works on this layer alone.
        """
        self.edit(step.kind(), f"{step.slider} of {layer}", lambda steps: steps.override(layer, step))

    def follow(self, layer: str, kind: str, *, head: bool = False) -> None:
        """Let a layer follow the slider again, as one step of undo.

        Args:
            layer: its name.
            kind: of the method.
            head: whether it is the output head, which follows only if it is named.

        Raises:
            RecipeError: the method is off, or a wider target leaves the layer out.

        """
        self.edit(kind, f"{kind} with {layer}", lambda steps: steps.follow(layer, head=head))

    def edit(self, kind: str, last: str, change: Callable[[LayerSteps], LayerSteps]) -> None:
        """Change the steps of one kind; nothing happens if the recipe stays the same."""
        main = self.recipe.main(kind)
        if main is None:
            raise RecipeError(f"{kind} is off: turn it on before a layer gets its own setting")
        mine = [step for step in self.recipe if step.kind() == kind]
        changed = change(LayerSteps(main, Line.around(main, mine))).steps()
        before = [step for step in self.recipe if step.kind() != kind]
        place = self.recipe.steps.index(mine[0])
        recipe = Recipe(*before[:place], *changed, *before[place:])
        if recipe == self.recipe:
            return
        self.write(recipe)
        self.remember(last)
        self.settle(recipe, last=last)

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

    def show_kernels(self, device: str) -> None:
        """Mark at every slider which schemes a kernel runs on this device ("cpu" or "cuda")."""
        for form in self.forms:
            form.show_kernels(device)

    def reset(self) -> None:
        """Turn every method off; layers that stood apart no longer do."""
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
