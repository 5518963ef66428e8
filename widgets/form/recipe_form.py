"""The recipe as sliders: one group of controls for every registered method, with undo, redo and reset.

Methods that complement others (`Step.aside`) are in a fold below the ones that a user starts with.

Layers may stand apart from the sliders: left out by targets that begin with `!`, or in a step of their own
beside the one on the slider. Moving a slider keeps both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ipywidgets as ipw
import traitlets

from widgets.form.layer_steps import LayerSteps, Line
from widgets.form.step_form import StepForm
from workbench.compress.registry import METHODS
from workbench.errors import RecipeError
from workbench.recipe import Recipe, Step

MERGE_SECONDS = 1.0  # moves of one slider that follow each other faster are one step of undo


class RecipeForm(ipw.VBox):
    """Sliders and choices of every registered method; `recipe` is what they describe.

    `error` is why they describe no recipe (`recipe` then keeps its last value), `note` what the form changed
    by itself, and `last` the control that was moved last, for messages.
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
        self.own: dict[str, Line] = {}  # of each kind, the steps beside the one on the slider
        self.forms = [StepForm(kind) for kind in METHODS.steps()]
        for form in self.forms:
            form.observe(self.moved, ["step", "error"])
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
            self.set_trait("recipe", recipe)

    def unfold(self) -> None:
        """Show or hide the methods in the fold."""
        self.fold.layout.display = None if self.more.value else "none"

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
            steps = [
                step
                for other in self.forms
                if other.step is not None
                for step in self.line(other).steps(other.step)
            ]
            made = Recipe(*sorted(steps, key=lambda step: step.order))
        except RecipeError as error:
            self.set_trait("last", last)
            self.set_trait("error", str(error))
            return
        self.remember(last)
        self.settle(made, form.note, last)

    def line(self, form: StepForm) -> Line:
        """Return the steps beside the one on a slider."""
        return self.own.get(form.kind.kind(), Line())

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
            RecipeError: an order of steps that the sliders cannot show.

        """
        kinds = list(dict.fromkeys(step.kind() for step in recipe))
        shown = [form.kind.kind() for form in self.forms if form.kind.kind() in kinds]
        if list(recipe) != sorted(
            sorted(recipe, key=lambda step: shown.index(step.kind())), key=lambda step: step.order
        ):
            raise RecipeError(
                f"{recipe!r} cannot be put on the sliders: they hold steps in the order {', '.join(shown)},"
                " those of one kind together"
            )
        self.hold = True
        try:
            for form in self.forms:
                kind = form.kind.kind()
                main = recipe.main(kind)
                self.own[kind] = Line.around(main, [step for step in recipe if step.kind() == kind])
                form.set_step(main)
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
        steps = iter([change(LayerSteps(main, Line.around(main, mine))).steps()])
        made = Recipe(
            *(new for step in self.recipe for new in (next(steps, ()) if step.kind() == kind else (step,)))
        )
        if made == self.recipe:
            return
        self.write(made)
        self.remember(last)
        self.settle(made, "", last)

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
