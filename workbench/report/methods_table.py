"""The table of methods, read from the registry: for the command line and for the README."""

from __future__ import annotations

from workbench.compress.registry import METHODS
from workbench.recipe import Step
from workbench.util.about import About
from workbench.util.configuration import OneOf

COLUMNS = ("step", "choice", "source", "computed once", "a move of the slider", "what it does not do")


def described(step: type[Step]) -> tuple[About, ...]:
    """Return a step's lines on its choices, and those of plugins on the choices that they registered."""
    lists = [
        extra.registry
        for info in step.options().values()
        for extra in info.metadata
        if isinstance(extra, OneOf)
    ]
    told = [record.about for registry in lists for record in registry]
    lines = [line for about in told for line in ((about,) if isinstance(about, About) else about)]
    return (*step.about, *(line for line in lines if line not in step.about))


def method_rows() -> list[dict[str, str]]:
    """Return one row for each choice that a registered method, criterion or number format describes, in the
    order in which steps are applied.
    """
    return [
        dict(
            zip(
                COLUMNS,
                (step.__name__, line.choice, line.source, line.once, line.move, line.limits),
                strict=True,
            )
        )
        for step in METHODS.steps()
        for line in described(step)
    ]


def markdown() -> str:
    """Return the table in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += [
        "| "
        + " | ".join(f"`{cell}`" if name in {"step", "choice"} else cell for name, cell in row.items())
        + " |"
        for row in method_rows()
    ]
    return "\n".join(lines)
