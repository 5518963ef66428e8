"""How Python is left while a thread computes.

Python ends daemon threads wherever they are. In the middle of torch that is the end of the process with
SIGABRT, also of a script that has done all that it was to do: so whoever computes is told to stop, and waited
for.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Protocol

from workbench.util.progress import say

QUIET_SECONDS = 3.0  # of waiting, until it is said
LONGEST_SECONDS = 600.0  # a download that hangs for longer is left


class Stops(Protocol):
    """What is told to stop when Python is left, and the thread that does."""

    thread: threading.Thread | None

    def close(self, timeout: float = 10.0) -> None:
        """Stop, and wait so many seconds for the end."""


def at_exit(method: Callable[[], None]) -> Callable[[], None]:
    """Let a method be called before Python is left, if what it belongs to is still there; return what ends
    that.
    """
    leave = partial(call, weakref.WeakMethod(method))
    atexit.register(leave)
    return lambda: atexit.unregister(leave)


def call(reference: Callable[[], Callable[[], None] | None]) -> None:
    """Call what is still there."""
    method = reference()
    if method is not None:
        method()


def stop_to_leave(worker: Stops) -> None:
    """Stop a worker and wait for its thread, for minutes if need be; Ctrl-C ends the waiting, and Python."""
    try:
        worker.close(QUIET_SECONDS)
        if worker.thread is not None and worker.thread.is_alive():
            say("waiting for what is being loaded or computed; Ctrl-C leaves at once")
            worker.thread.join(LONGEST_SECONDS)
    except KeyboardInterrupt:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(130)
