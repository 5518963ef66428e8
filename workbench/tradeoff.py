"""Ledger rows to plain records that figures draw and tests compare."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from workbench.measure.measurement import Measurement
from workbench.measure.quality import Estimate

Cost = Literal["file_bytes", "latency"]
Standing = Literal["front", "within noise", "dominated"]


@dataclass(frozen=True)
class TradeoffPoint:
    """One point of the plot. `cost` is file bytes, or time relative to the dense model (1 = as fast; lower is faster)."""

    key: str
    label: str
    recipe: str
    quality: Estimate
    cost: Estimate
    standing: Standing
    verdict: str


@dataclass(frozen=True)
class Tradeoff:
    """A trade-off plot: points sorted by cost, the dense model, and the names of the axes.

    `front`: no point is both cheaper and better, taking numbers at face value. `within noise`: one is, but not by more than
    the intervals. `dominated`: one is cheaper and better beyond the intervals.
    """

    model: str
    metric: str
    cost_name: Cost
    dense_quality: float
    dense_cost: float
    points: tuple[TradeoffPoint, ...]


def cost_of(point: Measurement, cost: Cost) -> Estimate | None:
    """Return a point's cost with its interval (file bytes are exact), or None if it was not measured."""
    if cost == "file_bytes":
        exact = float(point.sizes.file_bytes)
        return Estimate(exact, exact, exact)
    if point.latency is None:
        return None
    speed = point.latency.speedup
    return Estimate(1 / speed.value, 1 / speed.high, 1 / speed.low)


def standing(mine: tuple[Estimate, Estimate], others: Iterable[tuple[Estimate, Estimate]]) -> Standing:
    """Return a point's standing among others; each is (drop, cost), both better when smaller."""
    result: Standing = "front"
    for drop, cost in others:
        if drop.value <= mine[0].value and cost.value <= mine[1].value and (drop.value, cost.value) != (mine[0].value, mine[1].value):
            if drop.high < mine[0].low and cost.high <= mine[1].low:
                return "dominated"
            result = "within noise"
    return result


def tradeoff(rows: Iterable[Measurement], cost: Cost = "file_bytes") -> Tradeoff:
    """Return the record of a trade-off plot of complete points of one model.

    Raises:
        ValueError: no points, or points of different models.

    """
    from workbench.card import verdict

    known = [(row, spent) for row in rows if row.complete and (spent := cost_of(row, cost)) is not None]
    models = {(row.context.model_fingerprint, row.context.data_fingerprint) for row, _ in known}
    if len(models) != 1:
        raise ValueError(f"a trade-off needs points of one model on one data set; got {len(models)} in {len(known)} points")
    pairs = [(row.primary.drop, spent) for row, spent in known]
    points = tuple(
        TradeoffPoint(row.key, row.recipe.label(), repr(row.recipe), row.primary.compressed, spent, standing(pairs[i], pairs[:i] + pairs[i + 1 :]), verdict(row))
        for i, (row, spent) in enumerate(known)
    )
    first = known[0][0]
    dense_cost = float(first.dense_sizes.file_bytes) if cost == "file_bytes" else 1.0
    return Tradeoff(first.context.model_name, first.primary.metric, cost, first.primary.dense.value, dense_cost, tuple(sorted(points, key=lambda p: p.cost.value)))


def pareto(rows: Iterable[Measurement], cost: Cost = "file_bytes") -> tuple[TradeoffPoint, ...]:
    """Return the points on the front, cheapest first."""
    return tuple(point for point in tradeoff(rows, cost).points if point.standing == "front")
