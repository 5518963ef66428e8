"""Ledger rows to plain records that figures draw and tests compare."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

from workbench.garbage import uncollected
from workbench.measure.measurement import Measurement
from workbench.measure.quality import Estimate, Quality

Cost = Literal["file_bytes", "latency", "packed_bytes", "theoretical_bytes", "peak_memory_bytes"]
Standing = Literal["front", "within noise", "dominated"]
Shade = Literal["standing", "latency", "file_bytes", "change", "sparsity", "rank", "bits", "flips", "newest"]
COSTS: tuple[Cost, ...] = get_args(Cost)
SHADES: tuple[Shade, ...] = get_args(Shade)
OFF = {"sparsity": 0.0, "rank": 1.0}  # where a slider stands while its method is off; bits have no such value


@dataclass(frozen=True)
class TradeoffPoint:
    """One point of the plot. `cost` is bytes, or time relative to the dense model (1 = as fast; lower is faster).

    `shade` is the number that its colour stands for, None where there is none (no latency, not quantized).
    """

    key: str
    label: str
    recipe: str
    quality: Estimate
    cost: Estimate
    standing: Standing
    verdict: str
    shade: float | None = None


@dataclass(frozen=True)
class Tradeoff:
    """A trade-off plot: points sorted by cost, the dense model, and the names of the axes.

    `front`: no point is both cheaper and better, taking numbers at face value. `within noise`: one is, but not by more than
    the intervals. `dominated`: one is cheaper and better beyond the intervals.

    With `change`, quality is the paired change against the dense model, as `Quality.change`, and the dense model is at 0.
    """

    model: str
    metric: str
    cost_name: Cost
    dense_quality: float
    dense_cost: float
    points: tuple[TradeoffPoint, ...]
    change: bool = False
    shade_name: Shade = "standing"


def cost_of(point: Measurement, cost: Cost) -> Estimate | None:
    """Return a point's cost with its interval (bytes are exact), or None if it was not measured."""
    if cost != "latency":
        count = point.peak_memory_bytes if cost == "peak_memory_bytes" else getattr(point.sizes, cost)
        return None if count is None else Estimate(float(count), float(count), float(count))
    if point.latency is None:
        return None
    speed = point.latency.speedup
    return Estimate(1 / speed.value, 1 / speed.high, 1 / speed.low)


def dense_cost_of(point: Measurement, cost: Cost) -> float | None:
    """Return what the dense model costs: 1 for latency, None if it was not measured."""
    if cost == "latency":
        return 1.0
    count = point.dense_peak_memory_bytes if cost == "peak_memory_bytes" else getattr(point.dense_sizes, cost)
    return None if count is None else float(count)


def quality_of(point: Measurement, metric: str | None = None) -> Quality | None:
    """Return one metric of a point (None: the task's main one), or None if it does not carry it."""
    return point.primary if metric is None else next((quality for quality in point.quality if quality.metric == metric), None)


def shade_of(point: Measurement, shade: Shade) -> float | None:
    """Return the number that a point's colour stands for; None where it has none. `newest` and `standing` depend on other points."""
    if shade in {"latency", "file_bytes"}:
        spent = cost_of(point, "latency" if shade == "latency" else "file_bytes")
        return None if spent is None else spent.value
    if shade == "change":
        return point.primary.change.value
    if shade == "flips":
        return point.flips.value
    name = {"rank": "rank_ratio", "bits": "weight_bits"}.get(shade, shade)
    given = next((getattr(step, name) for step in point.recipe if step.slider == name), OFF.get(shade))
    return None if given is None else float(given)


def shades(rows: Sequence[Measurement], shade: Shade) -> list[float | None]:
    """Return the number that each point's colour stands for; `newest` counts back from the last row, which is 0."""
    if shade == "newest":
        return [float(len(rows) - 1 - index) for index in range(len(rows))]
    return [shade_of(row, shade) for row in rows]


def standing(mine: tuple[Estimate, Estimate], others: Iterable[tuple[Estimate, Estimate]]) -> Standing:
    """Return a point's standing among others; each is (drop, cost), both better when smaller."""
    result: Standing = "front"
    for drop, cost in others:
        if drop.value <= mine[0].value and cost.value <= mine[1].value and (drop.value, cost.value) != (mine[0].value, mine[1].value):
            if drop.high < mine[0].low and cost.high <= mine[1].low:
                return "dominated"
            result = "within noise"
    return result


@uncollected()
def tradeoff(rows: Iterable[Measurement], cost: Cost = "file_bytes", *, metric: str | None = None, change: bool = False, shade: Shade = "standing") -> Tradeoff:
    """Return the record of a trade-off plot of complete points of one model, in the order in which they were measured.

    Args:
        rows: points of one model on one data set; those without this cost or metric are left out.
        cost: what is paid.
        metric: which quality; None takes the task's main one.
        change: show the paired change against the dense model.
        shade: what colour stands for.

    Raises:
        ValueError: no points, or points of different models.

    """
    from workbench.card import verdict

    known = [(row, quality, spent) for row in rows if row.complete and (spent := cost_of(row, cost)) is not None and (quality := quality_of(row, metric)) is not None]
    models = {(row.context.model_fingerprint, row.context.data_fingerprint) for row, _, _ in known}
    if len(models) != 1:
        raise ValueError(f"a trade-off needs points of one model on one data set; got {len(models)} in {len(known)} points")
    stands = standings([(quality.drop, spent) for _, quality, spent in known])
    points = [
        TradeoffPoint(row.key, row.recipe.label(), repr(row.recipe), quality.change if change else quality.compressed, spent, stand, verdict(row), shaded)
        for (row, quality, spent), stand, shaded in zip(known, stands, shades([row for row, _, _ in known], shade), strict=True)
    ]
    first, quality, _ = known[0]
    dense_cost = next((found for row, _, _ in known if (found := dense_cost_of(row, cost)) is not None), float("nan"))
    return Tradeoff(
        first.context.model_name, quality.metric, cost, 0.0 if change else quality.dense.value, dense_cost, tuple(sorted(points, key=lambda p: p.cost.value)), change, shade,
    )  # fmt: skip


def standings(pairs: Sequence[tuple[Estimate, Estimate]]) -> list[Standing]:
    """Return the standing of each (drop, cost) among all, as `standing` does for one, in n log n steps; nothing compares with NaN."""
    known = [pair for pair in pairs if in_order(pair)]
    values = sorted((cost.value, drop.value) for drop, cost in known)
    ends = sorted((max(cost.high, cost.value), max(drop.high, drop.value)) for drop, cost in known)
    best_values, best_ends = (list(accumulate((drop for _, drop in some), min)) for some in (values, ends))  # of so many cheapest

    def one(mine: tuple[Estimate, Estimate]) -> Standing:
        drop, cost = mine
        if not in_order(mine):
            return "front"
        surely_cheaper = bisect_right(ends, (min(cost.low, cost.value), math.inf))
        if surely_cheaper and best_ends[surely_cheaper - 1] < min(drop.low, drop.value):
            return "dominated"
        cheaper = bisect_left(values, (cost.value, -math.inf))
        as_cheap = values[cheaper][1]  # the best at the same cost, perhaps this point itself
        return "within noise" if as_cheap < drop.value or (cheaper and best_values[cheaper - 1] <= drop.value) else "front"

    return [one(pair) for pair in pairs]


def in_order(pair: tuple[Estimate, Estimate]) -> bool:
    """Return whether no part of a (drop, cost) is NaN."""
    return not any(math.isnan(value) for estimate in pair for value in (estimate.value, estimate.low, estimate.high))


def pareto(rows: Iterable[Measurement], cost: Cost = "file_bytes") -> tuple[TradeoffPoint, ...]:
    """Return the points on the front, cheapest first."""
    return tuple(point for point in tradeoff(rows, cost).points if point.standing == "front")


def smallest_within(rows: Iterable[Measurement], drop: float) -> Measurement | None:
    """Return the smallest point whose whole interval of the quality drop is within `drop`, or None."""
    return min((row for row in rows if row.primary.drop.high <= drop), key=lambda row: row.sizes.file_bytes, default=None)


def fastest_within(rows: Iterable[Measurement], drop: float) -> Measurement | None:
    """Return the fastest point within `drop` that is faster than dense beyond its interval, or None."""
    fit = [row for row in rows if row.primary.drop.high <= drop and row.latency is not None and row.latency.speedup.low > 1]
    return max(fit, key=lambda row: row.latency.speedup.value if row.latency else 0.0, default=None)
