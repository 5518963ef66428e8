"""How one layer stands to one method: follow the slider, be left out, or have a value of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import ipywidgets as ipw

from widgets.form.controls import scale, slider, title
from widgets.form.layer_steps import LayerSteps, Line, Mode
from widgets.form.recipe_form import RecipeForm
from workbench.compress.registry import METHODS
from workbench.recipe import Recipe, Step

# What the modes are called, and what they say of an option by name
MODES: dict[Mode, tuple[str, str]] = {
    "follow": ("follow slider", "{name}: as the slider says"),
    "out": ("leave out", "{name}: not this layer"),
    "own": ("own value", "{name}: a value for this layer alone"),
}


class LayerOverride(ipw.HBox):
    """Controls of one method for the layer that was chosen; they change the recipe through the form."""

    def __init__(
        self, kind: type[Step], form: RecipeForm, guarded: Callable[[Callable[[], None]], None]
    ) -> None:
        """Make the controls, hidden until a layer is shown.

        Args:
            kind: of the method.
            form: whose recipe is changed.
            guarded: runs an action and shows what it raises in the panel.

        """
        self.kind, self.form, self.guarded = kind, form, guarded
        self.layer, self.head, self.hold = "", False, False
        name = title(kind, kind.slider)
        self.mode = ipw.ToggleButtons(
            options=[(label, mode) for mode, (label, _) in MODES.items()],
            value="follow",
            description=name,
            tooltips=[about.format(name=name) for _, about in MODES.values()],
        )
        self.slider = slider(kind)
        self.scale = scale(kind)
        self.slider.description = f"{name} of this layer"
        self.mode.observe(self.moved, "value")
        self.slider.observe(self.moved, "value")
        super().__init__([self.mode, self.slider])
        self.add_class("wb-layer-control")

    def show(self, recipe: Recipe, layer: str, *, head: bool) -> None:
        """Show how a layer stands in a recipe; hidden while the method is off."""
        self.layer, self.head = layer, head
        steps = layer_steps(recipe, self.kind.kind())
        self.layout.display = "none" if steps is None or not layer else None
        if steps is None:
            return
        mode, step = steps.mode(layer, head=head)
        value = getattr(step, self.kind.slider)
        self.hold = True
        try:
            self.mode.value = mode
            self.slider.max, self.slider.min = max(self.slider.max, value), min(self.slider.min, value)
            self.slider.value = value
            self.slider.layout.display = None if mode == "own" else "none"
        finally:
            self.hold = False

    def moved(self, change: dict[str, Any]) -> None:
        """React to a control, and show what the recipe says now, also if the change was refused."""
        old, new = change["old"], change["new"]
        noise = change["owner"] is self.slider and self.scale.rounded(old) == self.scale.rounded(new)
        if self.hold or noise:
            return
        self.guarded(self.apply)
        self.show(self.form.recipe, self.layer, head=self.head)

    def apply(self) -> None:
        """Change the recipe to what the controls say."""
        kind, steps = self.kind.kind(), layer_steps(self.form.recipe, self.kind.kind())
        if self.mode.value == "follow":
            self.form.follow(self.layer, kind, head=self.head)
        elif self.mode.value == "out":
            self.form.exclude(self.layer, kind)
        elif steps is not None:
            _, step = steps.mode(self.layer, head=self.head)
            value: dict[str, Any] = {self.kind.slider: self.scale.rounded(self.slider.value)}
            self.form.override(self.layer, dataclasses.replace(step, **value))


def layer_steps(recipe: Recipe, kind: str) -> LayerSteps | None:
    """Return all steps of one kind, None if there is none."""
    main = recipe.main(kind)
    if main is None:
        return None
    return LayerSteps(main, Line.around(main, [step for step in recipe if step.kind() == kind]))


def layer_overrides(form: RecipeForm, guarded: Callable[[Callable[[], None]], None]) -> list[LayerOverride]:
    """Return the controls of every registered method."""
    return [LayerOverride(kind, form, guarded) for kind in METHODS.steps()]
