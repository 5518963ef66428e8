"""Text from anywhere (notes, names, messages) that Markdown and spreadsheets show, and nothing else."""

from __future__ import annotations

import re

MARKS = re.compile(
    r"""[\\`*<>|~]             # code, emphasis, HTML, the end of a cell
    | \](?=[(\[:])            # a link, or where one leads
    | (?<![^\W_])_ | _(?![^\W_])  # emphasis; inside a word it is none
    | &(?=\#?\w+;)            # an entity
    | ^[#+-](?=[#\s]|$) | ^[-=](?=[-=]*$)  # a heading, a list, a line
    | (?<=^\d)[.)](?=\s)      # a numbered list
    """,
    re.VERBOSE,
)
ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
FORMULAS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # how a text begins that a spreadsheet computes


def markdown_text(text: str) -> str:
    """Return a text as one line of Markdown that reads as it is: no link, no HTML, no end of a cell."""
    return MARKS.sub(lambda mark: ENTITIES.get(mark[0], f"\\{mark[0]}"), " ".join(text.split()))


def markdown_code(text: str) -> str:
    """Return a text as one line of code in Markdown, also in a table's cell."""
    line = " ".join(text.split()).replace("|", r"\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    edge = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{edge}{line}{edge}{fence}"


def spreadsheet_text(text: str) -> str:
    """Return a text such that a spreadsheet that opens it as CSV shows it and does not compute it: a formula
    begins with `'`, and no part of it can be taken for a row of its own.
    """
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{plain}" if plain.lstrip(" ").startswith(FORMULAS) else plain
