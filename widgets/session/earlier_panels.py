"""A cell that is run again makes a new panel: the ones that it made before are closed, with their models and
threads.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

KEPT = "compression workbench panels"  # in the shell's own place for extensions


class Closable(Protocol):
    """What is closed; `made_by` says from where it was made, and `closed` whether it still lives."""

    made_by: object
    closed: bool

    def close(self) -> None:
        """End threads and let go of the model."""


@dataclass(frozen=True)
class CellRun:
    """One run of one cell of a notebook."""

    cell: str
    run: str


def close_earlier(panel: Closable, asked: object) -> None:
    """Close what the same cell made in an earlier run; outside IPython, what the same line made for the same
    variable before.

    Args:
        panel: the new one, which remembers from where it was made.
        asked: what it was made with: outside IPython only a panel of the same is taken for the one before.

    """
    shell = shell_of()
    if shell is None:
        frame = caller()
        panel.made_by = (frame.f_code.co_filename, frame.f_lineno, asked) if frame is not None else None
        for value in [] if frame is None else [*frame.f_locals.values()]:
            if type(value) is type(panel) and value.made_by == panel.made_by and not value.closed:
                value.close()
        return
    here = cell_run(shell)
    panel.made_by = here
    kept: list[Callable[[], Closable | None]] = shell.meta.setdefault(KEPT, [])
    for reference in list(kept):
        earlier = reference()
        if earlier is None or earlier.closed:
            kept.remove(reference)
        elif (
            isinstance(earlier.made_by, CellRun)
            and earlier.made_by.cell == here.cell
            and earlier.made_by != here
        ):
            earlier.close()
    kept.append(weakref.ref(panel))


def shell_of() -> Any:
    """Return IPython's shell, None where Python runs without it."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython

    return get_ipython()


def cell_run(shell: Any) -> CellRun:
    """Return which cell runs: by its id, where the page tells it, else by its text."""
    parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
    cell = (parent.get("metadata") or {}).get("cellId")
    if not cell:
        frame = inspect.currentframe()
        while frame is not None and frame.f_globals is not shell.user_global_ns:
            frame = frame.f_back
        cell = "" if frame is None else frame.f_code.co_filename
    run = (parent.get("header") or {}).get("msg_id") or shell.execution_count
    return CellRun(str(cell), str(run))


def caller() -> FrameType | None:
    """Return the frame that makes a panel: the first one outside this package."""
    package = str(Path(__file__).parents[1])
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
    return frame
