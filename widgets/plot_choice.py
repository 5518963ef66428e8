"""What the trade-off plot shows: which cost, which quality, what colour means; a record, and its words."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.tradeoff import Cost, Shade

COST_NAMES: dict[Cost, str] = {
    "file_bytes": "file size", "latency": "time", "peak_memory_bytes": "peak memory", "packed_bytes": "packed size", "theoretical_bytes": "theoretical size",
}  # fmt: skip
SHADE_NAMES: dict[Shade, str] = {
    "standing": "standing", "latency": "time", "file_bytes": "file size", "change": "quality change", "sparsity": "sparsity", "rank": "rank", "bits": "bits",
    "flips": "answers changed", "newest": "newest first",
}  # fmt: skip


@dataclass(frozen=True)
class PlotChoice:
    """What stands on the axes. `metric` "" is the task's main one; `change` shows it against the dense model.

    `log_cost` and `log_quality` are asked for; an axis that holds zero or negative numbers stays linear (`logarithmic`).
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
    """Return whether quality is a positive number without an upper end, so that a logarithmic axis makes sense."""
    return not choice.change and metric in {"perplexity", "loss"}


def logarithmic(choice: PlotChoice, metric: str) -> bool:
    """Return whether the quality axis is logarithmic."""
    return choice.log_quality and can_be_logarithmic(choice, metric)


def better_upwards(metric: str, *, change: bool) -> str:
    """Return the quality axis' title; axes where less is better are turned over."""
    if change:
        unit = {"perplexity": "%", "loss": "nats"}.get(metric, "points")
        return f"change of {metric} ({unit}, better upwards)"
    return f"{metric} (%)" if metric.endswith("accuracy") else f"{metric} (better upwards)"


def scale(metric: str, *, change: bool) -> float:
    """Return the factor from a metric to its axis: percent for accuracies, and for the relative change of perplexity."""
    return 100.0 if metric.endswith("accuracy") or (change and metric == "perplexity") else 1.0


def less_is_better(metric: str) -> bool:
    """Return whether the quality axis is turned over, so that better is always upwards."""
    return bool(metric) and not metric.endswith("accuracy")
