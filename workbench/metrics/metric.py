"""A metric of quality as one record: how it is computed, which way is better, how it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workbench.metrics.control_variates import ControlVariates, Triple
from workbench.metrics.estimate import Estimate
from workbench.metrics.scores import Scores

# (dense, compressed, level, known) -> dense, compressed and the paired change, each with its interval at
# `level`
Estimator = Callable[[Scores, Scores, float, ControlVariates | None], Triple]


@dataclass(frozen=True)
class Metric:
    """One metric, which `estimate` computes from the scores of both models on the same items.

    `beside` is the metric that is told with it, if any. `higher` is better; `percent` means a fraction, shown
    in percent, its change in points. `ratio` means that its change is a ratio minus 1, shown in percent;
    `logarithmic` that a positive value has no upper end, so that a logarithmic axis suits it. `low` and
    `high` are the ends of its range. `destroyed` is its value for a model that has lost all it knew (better
    where there are few classes to guess from); None where nobody knows: then nothing is predicted from what
    layers are sensitive to, only from measured points. `unit` is that of its change where it is neither in
    points nor in percent.
    """

    name: str
    estimate: Estimator
    higher: bool
    beside: str | None = None
    percent: bool = False
    ratio: bool = False
    logarithmic: bool = False
    low: float = 0.0
    high: float = float("inf")
    destroyed: float | None = None
    unit: str = ""

    @property
    def scale(self) -> float:
        """Return the factor from a value to how it is shown."""
        return 100.0 if self.percent else 1.0

    @property
    def change_scale(self) -> float:
        """Return the factor from a change to how it is shown."""
        return 100.0 if self.percent or self.ratio else 1.0

    @property
    def change_unit(self) -> str:
        """Return the unit of a change as it is shown, "" for a plain number."""
        return "points" if self.percent else "%" if self.ratio else self.unit

    @property
    def columns(self) -> tuple[str, str]:
        """Return the column of its values in a table, and that of its changes, units in the names."""
        plain = self.name.replace(" ", "_").replace("-", "_")
        unit = "_fraction" if self.percent else f"_{self.unit}" if self.unit else ""
        return f"{plain}{unit}", f"{plain}_change{'_ratio' if self.ratio else unit}"

    def words(self, value: float) -> str:
        """Return a value in words, such as `93.1%`."""
        return f"{value:.1%}" if self.percent else f"{value:.3f}" if self.high == 1.0 else f"{value:.4g}"

    def interval(self, estimate: Estimate) -> str:
        """Return a value with its interval, such as `93.1% [92.0%, 94.1%]`."""
        return f"{self.words(estimate.value)} [{self.words(estimate.low)}, {self.words(estimate.high)}]"

    def change_words(self, change: Estimate) -> str:
        """Return a change with its interval, such as `-0.8 points, -1.3 to -0.3`, or `+1.2%, +0.9% to +1.5%`
        of a ratio.
        """
        value, low, high = (self.change_scale * number for number in (change.value, change.low, change.high))
        if self.ratio:
            return f"{value:+.1f}%, {low:+.1f}% to {high:+.1f}%"
        if self.percent:
            return f"{value:+.1f} points, {low:+.1f} to {high:+.1f}"
        return f"{value:+.3g}{self.unit and f' {self.unit}'}, {low:+.3g} to {high:+.3g}"

    def amount(self, value: float) -> str:
        """Return how large a change is, without its sign, such as `0.87 points`, `1 point`, `1.25%`,
        `0.0123`.
        """
        shown = f"{self.change_scale * value:.4g}"
        unit = "%" if self.ratio else f" {self.change_unit}" if self.change_unit else ""
        return f"{shown} point" if unit == " points" and shown == "1" else f"{shown}{unit}"

    def change_digits(self) -> int:
        """Return how many digits a shown change has after the point."""
        return 1 if self.change_scale > 1 else 3

    def changed(self, dense: float, change: float) -> float:
        """Return the value that a change leads to."""
        return dense * (1 + change) if self.ratio else dense + change
