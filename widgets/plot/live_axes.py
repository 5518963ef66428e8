"""Axes of the live trade-off plot: titles, scales, and ranges that stay calm while a slider moves; pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from widgets.plot.plot_choice import COST_NAMES, PlotChoice, better_upwards, less_is_better, logarithmic
from workbench.metrics.metrics import metric_named


def axes(metric: str, choice: PlotChoice) -> dict[str, Any]:
    """Return titles, scales and ticks of both axes."""
    title = "time relative to the dense model (left is faster)"
    if choice.size:
        title = f"{COST_NAMES[choice.cost]} (MB, left is smaller)"
    x: dict[str, Any] = {"title": {"text": title}, "type": "linear"}
    x |= {"tickmode": "auto", "tickvals": None, "ticktext": None}
    if choice.log_cost:
        ticks = [base * 10**power for power in range(-3, 6) for base in (1, 2, 5)]
        texts = [f"{tick:g}" for tick in ticks]
        x |= {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": texts}
    y = {
        "title": {"text": better_upwards(metric, change=choice.change) if metric else ""},
        "type": "log" if logarithmic(choice, metric) else "linear",
    }
    return {"xaxis": x, "yaxis": y}


def x_range(dense: float, xs: Sequence[float], choice: PlotChoice) -> list[float]:
    """Return the range of the cost axis (of its logarithm where it is logarithmic)."""
    if choice.cost == "latency":
        low, high = min([0.4, *(0.9 * x for x in xs)]), max([1.3, *(1.1 * x for x in xs)])
    else:
        least = 4 if choice.cost == "peak_memory_bytes" else 24  # activations do not shrink as files do
        low, high = min([dense / least, *(x / 1.3 for x in xs)]), max([dense * 1.3, *(x * 1.2 for x in xs)])
    return [math.log10(low), math.log10(high)] if choice.log_cost else [0.0 if choice.size else low, high]


def y_range(dense: float, ys: Sequence[float], metric: str, choice: PlotChoice | None = None) -> list[float]:
    """Return the range of the quality axis, better upwards."""
    choice = choice or PlotChoice()
    if choice.change:
        return change_range(ys, metric)
    if less_is_better(metric):
        least = 5.0 if metric_named(metric).percent else 0.0  # an error rate may well be 0
        reach = max([dense * 3, least, *(2 ** math.ceil(math.log2(y * 1.2)) for y in ys if y > dense * 2.5)])
        low = min([dense * 0.85, *(y * 0.95 for y in ys if y > 0)])
        if metric_named(metric).percent:
            low = min(low, dense - 0.04 * reach)  # room for the star of a model without errors
        return [math.log10(reach), math.log10(low)] if logarithmic(choice, metric) else [reach, low]
    if not metric_named(metric).percent:
        return [min([0.8 * dense, *ys]), max([1.1 * dense, *ys])]
    lowest = min([dense - 8, *ys])
    low = dense - 10 if lowest >= dense - 8 else 20 * math.floor((lowest - 4) / 20)
    return [max(-2.0, low), min(101.0, dense + max(2.0, 0.06 * (dense - low)))]


def change_range(ys: Sequence[float], metric: str) -> list[float]:
    """Return the range of a change from the dense model's 0: ten points or so, then twice that, and so on."""
    about = metric_named(metric)
    first = 100.0 if about.ratio else 10.0 if about.percent else 1.0 if about.unit else 0.1
    worst = max([0.0, *(y if less_is_better(metric) else -y for y in ys)])
    best = max([0.0, *(-y if less_is_better(metric) else y for y in ys)])
    reach = first * 2 ** max(0, math.ceil(math.log2(worst * 1.1 / first))) if worst else first
    top = max(0.15 * reach, 1.2 * best)
    return [reach, -top] if less_is_better(metric) else [-reach, top]
