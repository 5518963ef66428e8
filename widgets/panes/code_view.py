"""The recipe as Python, as notebook parameters and as a command: the same names everywhere."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape

import ipywidgets as ipw

from workbench.compress.registry import METHODS
from workbench.recipe import Recipe, Step


class CodeView(ipw.HTML):
    """Lines to copy; one click selects a whole one."""

    def __init__(self) -> None:
        """Start empty."""
        super().__init__()
        self.add_class("wb-code")

    def show(self, model: str, recipe: Recipe) -> None:
        """Show a recipe on a model."""
        rows = [
            ("Python", python(model, recipe)),
            ("command", command(model, recipe)),
            ("report", command(model, recipe, "report")),
        ]
        self.value = "".join(
            f"<p class='wb-dim'>{name} (one click selects it)</p><code>{escape(line)}</code>"
            for name, line in rows
        )


def line(recipe: Recipe) -> str:
    """Return the recipe as one line for the panel."""
    return f"<code title='one click selects the line'>{escape(repr(recipe))}</code>"


def python(model: str, recipe: Recipe) -> str:
    """Return Python that measures the recipe."""
    names = ", ".join(sorted({"Bench", "Recipe", *(type(step).__name__ for step in recipe)}))
    return f"from workbench import {names}\npoint = Bench({model!r}).measure({recipe!r})"


def flat_targets(main: Step, steps: Sequence[Step]) -> tuple[str, ...] | None:
    """Return the targets of all steps of one kind as options take them, such as `fc1=0.8`.

    None where that cannot say it.
    """
    own = {f"!{step.targets[0]}": step for step in steps if step is not main}
    found = tuple(
        f"{target[1:]}={getattr(own[target], main.slider)}" if target in own else target
        for target in main.targets
    )
    said = METHODS.steps_from(
        {**{name: getattr(main, name) for name in main.options()}, f"{main.kind()}_targets": found}, main.seed
    )
    return found if said == list(steps) else None


def command(model: str, recipe: Recipe, verb: str = "measure") -> str:
    """Return the command that measures the recipe or writes its report; a comment where none can say it."""
    words = ["workbench", verb, model]
    for kind in dict.fromkeys(step.kind() for step in recipe):
        step = recipe.main(kind)
        assert step is not None  # noqa: S101  for the type checker
        targets = flat_targets(step, [other for other in recipe if other.kind() == kind])
        if targets is None:
            return "# no command says this recipe: a layer differs in more than its slider; use Python"
        for name, info in step.options().items():
            value = getattr(step, name)
            if name == step.slider or value != info.default:
                words += [f"--{name.replace('_', '-')}", str(value)]
        if targets != ("*",):
            words += [f"--{step.kind()}-targets", ",".join(targets)]
        if step.seed:
            words += ["--seed", str(step.seed)]
    return shlex.join(words)
