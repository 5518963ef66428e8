"""The table of methods, read from the registry: for the command line and for the README."""

from __future__ import annotations

from workbench.compress.registry import METHODS

COLUMNS = ("step", "choice", "source", "computed once", "a move of the slider", "what it does not do")


def method_rows() -> list[dict[str, str]]:
    """Return one row for each choice that a registered method describes, in the order in which steps are
    applied.
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
        for line in step.about
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
