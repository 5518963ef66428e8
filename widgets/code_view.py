"""The recipe as Python, as notebook parameters and as a command: the same names everywhere."""

from __future__ import annotations

import shlex
from html import escape

import ipywidgets as ipw

from workbench.recipe import Recipe


class CodeView(ipw.HTML):
    """Lines to copy; one click selects a whole one."""

    def __init__(self) -> None:
        """Start empty."""
        super().__init__()
        self.add_class("wb-code")

    def show(self, model: str, recipe: Recipe) -> None:
        """Show a recipe on a model."""
        rows = [("Python", python(model, recipe)), ("command", command(model, recipe)), ("report", command(model, recipe, "report"))]
        self.value = "".join(f"<p class='wb-dim'>{name} (one click selects it)</p><code>{escape(line)}</code>" for name, line in rows)


def line(recipe: Recipe) -> str:
    """Return the recipe as one line for the panel."""
    return f"<code title='one click selects the line'>{escape(repr(recipe))}</code>"


def python(model: str, recipe: Recipe) -> str:
    """Return Python that measures the recipe."""
    names = ", ".join(sorted({"Bench", "Recipe", *(type(step).__name__ for step in recipe)}))
    return f"from workbench import {names}\npoint = Bench({model!r}).measure({recipe!r})"


def command(model: str, recipe: Recipe, verb: str = "measure") -> str:
    """Return the command that measures the recipe or writes its report."""
    words = ["workbench", verb, model]
    for step in recipe:
        for name, info in step.options().items():
            value = getattr(step, name)
            if name == step.slider or value != info.default:
                words += [f"--{name.replace('_', '-')}", str(value)]
        if step.targets != ("*",):
            words += [f"--{step.kind()}-targets", ",".join(step.targets)]
        if step.seed:
            words += ["--seed", str(step.seed)]
    return shlex.join(words)
