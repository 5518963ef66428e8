"""A progress bar for long work, in a terminal and in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

Curve = Sequence[tuple[int, float]]  # (training step, loss)


@dataclass(frozen=True)
class Look:
    """Quality on held-out training items after `step` optimizer steps of a training.

    `value` of `metric` lies between `low` and `high` at `confidence`; `dense` is the dense model's on the same `items`. `loss` is
    what the best look is chosen by.
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

    `watch(curve, steps)` is called after each optimizer step with the curve so far and the number of steps planned.
    `enough()` is asked after each; True ends the training there and keeps what it has reached, or the best look if there were
    any. `looked(looks)` is called after each look at held-out items with all looks so far, their steps counted along the curve.
    """

    watch: Callable[[Curve, int], None] = lambda _curve, _steps: None
    enough: Callable[[], bool] = lambda: False
    looked: Callable[[Sequence[Look]], None] = lambda _looks: None


class Bar:
    """Shows what is being done and how far it is; call it as `bar(what, done, total)`. Opens nothing until then."""

    def __init__(self, label: str, *, shown: bool = True) -> None:
        """Remember the label, such as the recipe's."""
        self.label, self.shown = label, shown
        self.bar: Any = None
        self.what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show `done` of `total` of `what`."""
        if not self.shown:
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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
