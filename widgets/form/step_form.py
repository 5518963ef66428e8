"""One method as controls: whether it is on, its slider with ticks at the stops, and its other choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import ipywidgets as ipw
import traitlets

from widgets.form.controls import control, scale, slider, tick_marks, title
from widgets.form.layer_steps import Line
from workbench.errors import RecipeError
from workbench.recipe import Step
from workbench.runtime.schemes import kernels_for

MAIN = 3  # choices that are always shown; the others are in a fold


@dataclass(frozen=True)
class StepState:
    """What the controls of a method describe.

    `step` is None while the method is off, or where the controls describe none (`error` says why). `note`
    says what the form changed by itself, such as a pattern that a slider position does not allow.
    """

    step: Step | None = None
    error: str = ""
    note: str = ""


class StepForm(ipw.VBox):
    """The controls of one method; `state` is what they describe."""

    state = traitlets.Instance(StepState, (), read_only=True)

    def __init__(self, kind: type[Step]) -> None:
        """Make the controls of a method, off and on its defaults."""
        self.kind = kind
        self.hold = False
        self.common: dict[str, Any] = {}  # targets and seed, which have no controls here
        self.beside = Line()  # steps of this kind for single layers, which have no controls here either
        name = title(kind, kind.slider)
        about = f"{kind.__name__}: {(kind.__doc__ or '').splitlines()[0]}"
        self.on = ipw.Checkbox(value=False, indent=False, description=name, tooltip=about)
        self.slider = slider(kind)
        self.scale = scale(kind)
        self.choices = {option: control(option, kind) for option in kind.options() if option != kind.slider}
        for widget in (self.on, self.slider, *self.choices.values()):
            widget.observe(self.moved, "value")
        self.on.add_class("wb-on")
        self.slider.add_class("wb-slider")
        rows = self.rows()
        top = ipw.HBox([self.on, self.slider])
        top.add_class("wb-top")
        self.marks = ipw.HTML(self.ticks())
        super().__init__([top, self.marks, *rows])
        self.add_class("wb-step")
        self.add_class("wb-off")

    def rows(self) -> list[ipw.Widget]:
        """Return the choices: the first ones in a row, the others in a fold."""
        controls = list(self.choices.values())
        rest = controls[MAIN:] if len(controls) > MAIN + 1 else []
        self.fold = ipw.HBox(rest, layout=ipw.Layout(display="none"))
        about = f"more choices: {', '.join(control.description for control in rest)}"
        self.more = ipw.ToggleButton(description="more", tooltip=about)
        self.more.observe(lambda _: self.unfold(), "value")
        first = ipw.HBox([*controls[: len(controls) - len(rest)], *([self.more] if rest else [])])
        for row in (first, self.fold):
            row.add_class("wb-choices")
        return [first, self.fold]

    def unfold(self) -> None:
        """Show or hide the choices in the fold."""
        self.fold.layout.display = None if self.more.value else "none"

    def ticks(self, device: str = "") -> str:
        """Return the stops as marks under the slider; with a device, also the schemes that kernels know."""
        return tick_marks(self.kind, self.scale, kernels_for(self.kind, device) if device else ())

    def show_kernels(self, device: str) -> None:
        """Mark which schemes a kernel runs on this device, and which not."""
        self.marks.value = self.ticks(device)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Change controls without reacting to each."""
        before, self.hold = self.hold, True
        try:
            yield
        finally:
            self.hold = before

    def moved(self, change: dict[str, Any]) -> None:
        """React to a control: a slider that is moved turns its method on."""
        if self.hold or self.is_noise(change):
            return
        if change["owner"] is self.slider and not self.on.value:
            with self.silent():
                self.on.value = True
        try:
            state = self.described(change["owner"]) if self.on.value else StepState()
        except RecipeError as error:
            state = StepState(error=str(error))
        self.settle(state)

    def is_noise(self, change: dict[str, Any]) -> bool:
        """Return whether a slider has not really moved: browsers answer 2.0 with 2.0000000000000004."""
        old, new = change["old"], change["new"]
        return change["owner"] is self.slider and self.scale.rounded(old) == self.scale.rounded(new)

    def settle(self, state: StepState) -> None:
        """Take over a new state; what follows from it goes before how it looks."""
        self.set_trait("state", state)
        (self.remove_class if self.on.value else self.add_class)("wb-off")

    def described(self, owner: ipw.Widget) -> StepState:
        """Return the state that the controls describe.

        Where the rules refuse it, move what the user did not touch; `owner` is what was touched.

        Raises:
            RecipeError: nothing that the user did not touch would help.
        """
        given = self.values()
        try:
            return StepState(self.kind(**given))
        except RecipeError as error:
            for attempt in self.alternatives(given, owner):
                try:
                    step = self.kind(**attempt)
                except RecipeError:
                    continue
                self.write(step)
                changed = [
                    f"{title(self.kind, name)} set to {value}"
                    for name, value in attempt.items()
                    if given[name] != value
                ]
                return StepState(step, note=f"{', '.join(changed)}: {error}")
            raise

    def alternatives(self, given: dict[str, Any], owner: ipw.Widget) -> Iterator[dict[str, Any]]:
        """Yield other values: after a move of the slider default choices, after a choice other stops."""
        if owner is self.slider:
            kept, options = {self.kind.slider, "targets", "seed"}, self.kind.options()
            yield {name: value if name in kept else options[name].default for name, value in given.items()}
        elif owner is not self.on:
            yield from ({**given, self.kind.slider: self.scale.rounded(stop)} for stop in self.finer_stops())

    def finer_stops(self) -> list[float]:
        """Return slider values to try: the stops, then a finer grid of quarters and eighths of the range."""
        low, span = self.scale.low, self.scale.high + self.scale.step - self.scale.low
        return [*self.kind.stops, *(low + span * i / 8 for i in range(1, 8))]

    def values(self) -> dict[str, Any]:
        """Return the values of the controls, by field."""
        given = {self.kind.slider: self.scale.rounded(self.slider.value)}
        for name, widget in self.choices.items():
            given[name] = round(widget.value, 12) if isinstance(widget.value, float) else widget.value
        return {**given, **self.common}

    def write(self, step: Step) -> None:
        """Put a step into the controls, without reacting."""
        values = {field.name: getattr(step, field.name) for field in dataclasses.fields(cast("Any", step))}
        self.common = {name: values[name] for name in ("targets", "seed")}
        with self.silent():
            value = values[self.kind.slider]
            self.slider.max, self.slider.min = max(self.slider.max, value), min(self.slider.min, value)
            self.slider.value = value
            for name, widget in self.choices.items():
                widget.value = values[name]
        options = self.kind.options()
        folded = [name for name, widget in self.choices.items() if widget in self.fold.children]
        if any(values[name] != options[name].default for name in folded):
            self.more.value = True  # nothing that matters is hidden

    def steps(self) -> tuple[Step, ...]:
        """Return the steps of this kind in their order: the one on the slider, and those beside it."""
        return () if self.state.step is None else self.beside.steps(self.state.step)

    def set_steps(self, main: Step | None, steps: Sequence[Step]) -> None:
        """Put the steps of this kind into the controls, of which `main` is on the slider.

        None turns the method off and leaves its controls where they are, on all layers.
        """
        self.beside = Line.around(main, steps)
        with self.silent():
            self.on.value = main is not None
        if main is None:
            self.common = {}
        else:
            self.write(main)
        self.settle(StepState(main))
