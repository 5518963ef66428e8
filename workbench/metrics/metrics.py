"""What is known about each metric of quality: which way is better, and how its values and changes are
written.
"""

from __future__ import annotations

from dataclasses import dataclass

from workbench.metrics.estimate import Estimate


@dataclass(frozen=True)
class Metric:
    """One metric. `higher` is better; `percent` means a fraction, shown in percent, its change in points.

    `ratio` means that its change is a ratio minus 1, shown in percent; `logarithmic` that a positive value
    has no upper end, so that a logarithmic axis suits it. `low` and `high` are the ends of its range. `unit`
    is that of its change where it is neither in points nor in percent.
    """

    name: str
    higher: bool = False
    percent: bool = False
    ratio: bool = False
    logarithmic: bool = False
    low: float = 0.0
    high: float = float("inf")
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


METRICS = (
    Metric("accuracy", higher=True, percent=True, high=1.0),
    Metric("next-token accuracy", higher=True, percent=True, high=1.0),
    Metric("loss", logarithmic=True, unit="nats"),
    Metric("perplexity", ratio=True, logarithmic=True),
    Metric("rank correlation", higher=True, low=-1.0, high=1.0),
    Metric("squared error"),
    Metric("word error rate", percent=True),
)


def metric_named(name: str) -> Metric:
    """Return what is known about a metric; of an unknown one, that it is a number of which less is better."""
    return next((metric for metric in METRICS if metric.name == name), Metric(name))
