"""Hooks on a model that other threads may run too: the explorer's jobs share one dense model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def of_this_thread(hook: Callable[P, R]) -> Callable[P, R | None]:
    """Return a hook that is silent while another thread runs the model: what that reads belongs to other
    work.
    """
    owner = threading.get_ident()

    def here(*args: P.args, **named: P.kwargs) -> R | None:
        return hook(*args, **named) if threading.get_ident() == owner else None

    return here
