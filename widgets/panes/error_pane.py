"""Errors inside the panel: what a callback or the worker raised, where the user looks."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from html import escape

import ipywidgets as ipw

from workbench.errors import WorkbenchError

MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


class ErrorPane(ipw.HTML):
    """One line for each source of messages; an empty message clears it. Hidden while there is none."""

    def __init__(self) -> None:
        """Start hidden."""
        self.messages: dict[str, tuple[str, str]] = {}
        super().__init__(layout=ipw.Layout(display="none"))
        self.add_class("wb-errors")

    def say(self, source: str, message: str, kind: str = "error") -> None:
        """Show a message of a source in place of its last one. `kind` is error or note."""
        if not message and source not in self.messages:
            return
        if message:
            self.messages[source] = (kind, message)
        else:
            self.messages.pop(source, None)
        self.value = "".join(
            f"<div class='wb-{kind}' role='alert'>{escape(text)}</div>"
            for kind, text in self.messages.values()
        )
        self.layout.display = None if self.messages else "none"

    def guard(self, act: Callable[[], None], last: Callable[[], str] = str) -> None:
        """Act on what a user did, and say what goes wrong: an exception in a callback appears nowhere else.

        `last` names the slider that moved last, see `explain`.
        """
        try:
            act()
        except Exception as error:  # noqa: BLE001  it is shown in the panel
            self.say("action", explain(error, last()))
        else:
            self.say("action", "")


def log_defect(error: BaseException) -> None:
    """Write the whole traceback of what is no user's mistake to the log."""
    if not isinstance(error, WorkbenchError):
        traceback.print_exception(error)


def explain(error: BaseException, last: str) -> str:
    """Return an exception in words.

    `last` is the slider that moved last, which an exhausted memory is blamed on.
    """
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in MEMORY):
        blame = f" after {last} was moved" if last else ""
        return (
            f"Out of memory{blame}: go back (undo) or choose a smaller value. The panel still works."
            f" ({text[:160] or type(error).__name__})"
        )
    if isinstance(error, WorkbenchError):
        return text
    return f"{type(error).__name__}: {text}"
