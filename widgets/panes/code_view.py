"""The recipe as Python, as notebook parameters and as a command: the same names everywhere."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape

import ipywidgets as ipw

from widgets.session.state import PanelState
from workbench.compress.registry import METHODS
from workbench.recipe import Recipe, Step


class RecipeLine(ipw.HTML):
    """The recipe as one line under the sliders."""

    def show(self, state: PanelState) -> None:
        """Show the recipe on the sliders."""
        self.value = f"<code title='one click selects the line'>{escape(repr(state.recipe))}</code>"


class CodeView(ipw.HTML):
    """Lines to copy; one click selects a whole one."""

    def __init__(self) -> None:
        """Start empty."""
        super().__init__()
        self.add_class("wb-code")

    def show(self, state: PanelState) -> None:
        """Show the recipe on the sliders, on the present model."""
        lines = {
            "Python": python(state.model, state.recipe),
            "command": command(state.model, state.recipe),
            "report": command(state.model, state.recipe, "report"),
        }
        self.value = "".join(
            f"<p class='wb-dim'>{name} (one click selects it)</p><code>{escape(line)}</code>"
            for name, line in lines.items()
        )


def python(model: str, recipe: Recipe) -> str:
    """Return Python that measures the recipe."""
    names = ", ".join(sorted({"Bench", "Recipe", *(type(step).__name__ for step in recipe)}))
    return f"from workbench import {names}\npoint = Bench({model!r}).measure({recipe!r})"


def flat_targets(main: Step, steps: Sequence[Step]) -> tuple[str, ...] | None:
    """Return the targets of all steps of one kind as options take them, such as `fc1=0.8`.

    None where that cannot say it.
    """
    own = {f"!{step.targets[0]}": step for step in steps if step is not main}
    targets = tuple(
        f"{target[1:]}={getattr(own[target], main.slider)}" if target in own else target
        for target in main.targets
    )
    options = {name: getattr(main, name) for name in main.options()}
    said = METHODS.steps_from({**options, f"{main.kind()}_targets": targets}, main.seed)
    return targets if said == list(steps) else None


def command(model: str, recipe: Recipe, verb: str = "measure") -> str:
    """Return the command that measures the recipe or writes its report; a comment where none can say it."""
    arguments = ["workbench", verb, model]
    for kind in dict.fromkeys(step.kind() for step in recipe):
        step = recipe.main(kind)
        assert step is not None  # noqa: S101  for the type checker
        targets = flat_targets(step, [same_kind for same_kind in recipe if same_kind.kind() == kind])
        if targets is None:
            return "# no command says this recipe: a layer differs in more than its slider; use Python"
        for name, info in step.options().items():
            value = getattr(step, name)
            if name == step.slider or value != info.default:
                arguments += [f"--{name.replace('_', '-')}", str(value)]
        if targets != ("*",):
            arguments += [f"--{step.kind()}-targets", ",".join(targets)]
        if step.seed:
            arguments += ["--seed", str(step.seed)]
    return shlex.join(arguments)
