"""What the command says of errors: one line each, and where the rest lies."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from workbench.util.folders import state_folder
from workbench.util.text import kind_and_words

DEBUG = "WORKBENCH_DEBUG"  # of the environment: 1 shows tracebacks


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Let warnings be one line each, and output hold any text, while the command runs."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for names that are no text, and narrow terminals
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.showwarning = show_warning
        yield


def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Show a warning as a note; those for programmers only where they are asked for."""
    if not issubclass(category, DeprecationWarning | ResourceWarning) or os.environ.get(DEBUG) == "1":
        tell(f"note: {message}")


def tell(message: str, error: BaseException | None = None) -> None:
    """Write one line on stderr, whatever is in it; before it an error's traceback, if that is asked for."""
    if error is not None and os.environ.get(DEBUG) == "1":
        traceback.print_exception(error)
    line = " ".join(message.split())
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line
    )
    click.echo(shown, err=True)


def last_resort(error: Exception) -> int:
    """Say an error that nobody foresaw in one line, its kind and where its traceback lies; return the exit
    code.
    """
    if isinstance(error, BrokenPipeError):  # whoever read our output has had enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    place = written(error)
    where = f"the whole of it is in {str(place)!r}" if place else "its log could not be written"
    tell(f"error: unforeseen {kind_and_words(error)}; {where}, and {DEBUG}=1 shows it", error)
    return 1


def written(error: Exception) -> Path | None:
    """Write a traceback to a file of its own; return where, None if no place took it."""
    text = "".join(traceback.format_exception(error))
    content = f"{' '.join(sys.argv)}\n\n{text}"
    for folder in (state_folder("log"), Path(tempfile.gettempdir())):
        place = folder / f"workbench-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            place.write_text(content, encoding="utf-8", errors="backslashreplace")
        except OSError:
            continue
        return place
    return None
