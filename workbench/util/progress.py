"""What long work says of itself: a progress bar in a terminal and in a notebook, lines where there is
neither.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from workbench.errors import Cancelled

Progress = Callable[[str, int, int], None]  # progress(what, done, total)
Curve = Sequence[tuple[int, float]]  # (training step, loss)
Shown = bool | Literal["lines"]  # a bar, nothing, or now and then a line on stderr
EVERY_S = 10.0  # between two lines


@dataclass(frozen=True)
class Look:
    """Quality on held-out training items after `step` optimizer steps of a training.

    `value` of `metric` lies between `low` and `high` at `confidence`; `dense` is the dense model's on the
    same `items`. `loss` is what the best look is chosen by.
    """

    step: int
    loss: float
    metric: str
    dense: float
    value: float
    low: float
    high: float
    items: int
    confidence: float


@dataclass(frozen=True)
class Training:
    """What a caller sees of a training step, and how it ends one early.

    `watch(curve, steps)` is called after each optimizer step with the curve so far and the number of steps
    planned. `enough()` is asked after each; True ends the training there and keeps what it has reached, or
    the best look if there were any. `looked(looks)` is called after each look at held-out items with all
    looks so far, their steps counted along the curve.
    """

    watch: Callable[[Curve, int], None] = lambda _curve, _steps: None
    enough: Callable[[], bool] = lambda: False
    looked: Callable[[Sequence[Look]], None] = lambda _looks: None


class Bar:
    """Shows what is being done and how far it is; call it as `bar(what, done, total)`.

    Opens nothing until then.

    With "lines" it writes a line every ten seconds, for files and pipes: what is done sooner says nothing.
    """

    def __init__(self, label: str, *, shown: Shown = True) -> None:
        """Remember the label, such as the recipe's."""
        self.label, self.shown = label, shown
        self.bar: Any = None
        self.told = time.monotonic()
        self.what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show `done` of `total` of `what`."""
        if not self.shown:
            return
        if self.shown == "lines":
            if time.monotonic() - self.told >= EVERY_S:
                self.told = time.monotonic()
                say(f"{self.label}: {what}{f' {done:,} of {total:,}' if total > 1 else ''}")
            return
        if self.bar is None:
            from tqdm.auto import tqdm

            self.bar = tqdm(leave=False, delay=0.5, dynamic_ncols=True)
        if what != self.what:
            self.what = what
            self.bar.reset(total)
            self.bar.set_description(f"{self.label}: {what}", refresh=False)
        self.bar.update(done - self.bar.n)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def say(words: str) -> None:
    """Write a line on stderr at once."""
    print(words, file=sys.stderr, flush=True)  # noqa: T201  progress for people


def no_progress(what: str, done: int, total: int) -> None:
    """Report nothing. Any function like it may raise `Cancelled` to stop the work at that point."""


def both(first: Progress, second: Progress) -> Progress:
    """Return a progress function that tells both."""

    def report(what: str, done: int, total: int) -> None:
        first(what, done, total)
        second(what, done, total)

    return report


def stoppable(progress: Progress, cancelled: Callable[[], bool] | None) -> Progress:
    """Return `progress` that raises `Cancelled` when `cancelled()` says so."""
    if cancelled is None:
        return progress

    def report(what: str, done: int, total: int) -> None:
        if cancelled():
            raise Cancelled(f"cancelled during {what}, {done} of {total}")
        progress(what, done, total)

    return report
