"""What the trade-off plot shows: which cost, which quality, what colour means; a record, and its words."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.ledger.pareto import Cost, Shade
from workbench.metrics.metrics import metric_named

COST_NAMES: dict[Cost, str] = {
    "file_bytes": "file size",
    "latency": "time",
    "peak_memory_bytes": "peak memory",
    "packed_bytes": "packed size",
    "theoretical_bytes": "theoretical size",
}
SHADE_NAMES: dict[Shade, str] = {
    "standing": "standing",
    "latency": "time",
    "file_bytes": "file size",
    "change": "quality change",
    "sparsity": "sparsity",
    "rank": "rank",
    "bits": "bits",
    "flips": "answers changed",
    "newest": "newest first",
}


@dataclass(frozen=True)
class PlotChoice:
    """What stands on the axes. `metric` "" is the task's main one; `change` shows it against the dense model.

    `log_cost` and `log_quality` are asked for; an axis that holds zero or negative numbers stays linear
    (`logarithmic`).
    """

    cost: Cost = "file_bytes"
    metric: str = ""
    change: bool = False
    shade: Shade = "standing"
    log_cost: bool = True
    log_quality: bool = True

    @property
    def size(self) -> bool:
        """Return whether the cost is a number of bytes, shown in MB."""
        return self.cost != "latency"


def can_be_logarithmic(choice: PlotChoice, metric: str) -> bool:
    """Return whether quality is a positive number without an upper end, which a logarithmic axis may show.

    Not as long as there is no metric (""): nothing is on the bench yet.
    """
    return metric != "" and not choice.change and metric_named(metric).logarithmic


def logarithmic(choice: PlotChoice, metric: str) -> bool:
    """Return whether the quality axis is logarithmic."""
    return choice.log_quality and can_be_logarithmic(choice, metric)


def better_upwards(metric: str, *, change: bool) -> str:
    """Return the quality axis' title; axes where less is better are turned over."""
    about = metric_named(metric)
    if change:
        unit = f"{about.change_unit}, " if about.change_unit else ""
        return f"change of {metric} ({unit}better upwards)"
    if about.percent:
        return f"{metric} (%)" if about.higher else f"{metric} (%, better upwards)"
    return f"{metric} (better upwards)"


def scale(metric: str, *, change: bool) -> float:
    """Return the factor from a metric to its axis: percent of accuracies, error rates, relative changes."""
    return metric_named(metric).change_scale if change else metric_named(metric).scale


def less_is_better(metric: str) -> bool:
    """Return whether the quality axis is turned over, so that better is always upwards."""
    return bool(metric) and not metric_named(metric).higher
