"""What Python frees, and when: collections put off while many objects are made or in the middle of a move,
imports and errors that keep nobody's frames.
"""

from __future__ import annotations

import gc
import importlib
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def uncollected() -> Iterator[None]:
    """Put off collecting garbage: with a hundred thousand points, going through all of them again and again
    takes most of the time.

    What was set before comes back. What was made meanwhile counts as old at once (frozen, then thawed;
    nothing is looked at for that), as it would after two more rounds over all of it. Works as a decorator
    too.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def settle() -> None:
    """Collect garbage now, and leave what is alive out of later collections until this is called again, or
    `unsettle`.

    Python looks through every object now and then: with torch and transformers there are 400,000, which takes
    0.2 to 0.4 s in the middle of a move. What was alive and becomes garbage in a cycle is not freed before.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def unsettle() -> None:
    """Let collections look at everything again."""
    gc.unfreeze()


def let_go(error: BaseException, *, telling: bool = True) -> None:
    """Let go of the frames that an exception came through, and of those it was raised in the handling of,
    before it is kept.

    An exception holds its frames, a frame its variables and those of its closures, and often some frame the
    exception again. A model among them would keep its GPU memory until Python collects garbage, which it does
    for many objects, not for large ones. With `telling` the places are noted as text, which a printed
    traceback shows.
    """
    if telling:
        error.add_note("It was raised here:\n" + "".join(traceback.format_tb(error.__traceback__)))
    waiting, met = [error], set[int]()
    while waiting:
        current = waiting.pop()
        if id(current) not in met:
            met.add(id(current))
            current.__traceback__ = None
            waiting += [linked for linked in (current.__context__, current.__cause__) if linked is not None]


def import_apart(*names: str) -> None:
    """Import modules in a thread of its own; one that cannot be imported is left to whoever needs it.

    Packages that look for optional modules (Optuna's `try_import`) may keep the errors of those that are not
    there, and with an error the frames of everybody who was running: a bench whose ledger was the first to
    import Optuna would never be freed, nor its model.
    """
    if all(name in sys.modules for name in names):
        return
    thread = threading.Thread(target=_import_all, args=(names,), name="imports")
    thread.start()
    thread.join()


def _import_all(names: tuple[str, ...]) -> None:
    """Import modules."""
    with suppress(ImportError):
        for name in names:
            importlib.import_module(name)
