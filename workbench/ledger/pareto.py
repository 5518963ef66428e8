"""Ledger rows to plain records that figures draw and tests compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from workbench.measure.measurement import Measurement
from workbench.metrics.metrics import metric_named
from workbench.metrics.quality import Estimate, Quality
from workbench.util.garbage import uncollected

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ends: TypeAlias = NDArray[np.float64]  # value, low and high of n estimates, [3, n]

Cost = Literal["file_bytes", "latency", "packed_bytes", "theoretical_bytes", "peak_memory_bytes"]
Standing = Literal["front", "within noise", "dominated"]
Shade = Literal["standing", "latency", "file_bytes", "change", "sparsity", "rank", "bits", "flips", "newest"]
COSTS: tuple[Cost, ...] = get_args(Cost)
SHADES: tuple[Shade, ...] = get_args(Shade)
OFF = {"sparsity": 0.0, "rank": 1.0}  # where a slider stands while its method is off; bits have no such value


class TradeoffPoint(NamedTuple):
    """One point of the plot.

    `cost` is bytes, or time relative to the dense model (1 = as fast; lower is faster).

    `shade` is the number that its colour stands for, None where there is none (no latency, not quantized).
    Words are made from the measured `row` when they are asked for: among thousands of points few are read.
    """

    row: Measurement
    quality: Estimate
    cost: Estimate
    standing: Standing
    shade: float | None = None

    def __repr__(self) -> str:
        """Return all but the measured row, which is long."""
        return (
            f"TradeoffPoint({self.label}, quality={self.quality}, cost={self.cost},"
            f" standing={self.standing!r}, shade={self.shade})"
        )

    @property
    def key(self) -> str:
        """Return the ledger key."""
        return self.row.key

    @property
    def label(self) -> str:
        """Return the recipe in a few words."""
        return self.row.recipe.label()

    @property
    def recipe(self) -> str:
        """Return the recipe as a line of Python."""
        return repr(self.row.recipe)

    @property
    def verdict(self) -> str:
        """Return one sentence on the costs and savings of the recipe."""
        from workbench.measure.card import verdict

        return verdict(self.row)


@dataclass(frozen=True)
class Tradeoff:
    """A trade-off plot: points sorted by cost, the dense model, and the names of the axes.

    `front`: no point is both cheaper and better, taking numbers at face value. `within noise`: one is, but
    not by more than the intervals. `dominated`: one is cheaper and better beyond the intervals.

    With `change`, quality is the paired change against the dense model, as `Quality.change`, and the dense
    model is at 0.
    """

    model: str
    metric: str
    cost_name: Cost
    dense_quality: float
    dense_cost: float
    points: tuple[TradeoffPoint, ...]
    change: bool = False
    shade_name: Shade = "standing"


def spending(cost: Cost) -> Callable[[Measurement], Any]:
    """Return a function that reads a point's cost as it was measured: a number of bytes, or its latency; None
    if it was not.
    """
    return attrgetter(cost if cost in {"latency", "peak_memory_bytes"} else f"sizes.{cost}")


def estimate(spent: Any, cost: Cost) -> Estimate:
    """Return a cost with its interval (bytes are exact) from what `spending` read."""
    if cost == "latency":
        return Estimate(1 / spent.speedup.value, 1 / spent.speedup.high, 1 / spent.speedup.low)
    return Estimate(float(spent), float(spent), float(spent))


def cost_of(point: Measurement, cost: Cost) -> Estimate | None:
    """Return a point's cost with its interval, or None if it was not measured."""
    spent = spending(cost)(point)
    return None if spent is None else estimate(spent, cost)


def dense_cost_of(point: Measurement, cost: Cost) -> float | None:
    """Return the cost of the dense model: bytes, or 1 for latency; None if it was not measured."""
    if cost == "latency":
        return 1.0
    count = point.dense_peak_memory_bytes if cost == "peak_memory_bytes" else getattr(point.dense_sizes, cost)
    return None if count is None else float(count)


def quality_of(point: Measurement, metric: str | None = None) -> Quality | None:
    """Return one metric of a point (None: the task's main one), or None if it does not carry it."""
    return (
        point.primary
        if metric is None
        else next((quality for quality in point.quality if quality.metric == metric), None)
    )


def shade_of(point: Measurement, shade: Shade) -> float | None:
    """Return the number that a point's colour stands for; None where it has none.

    `newest` and `standing` depend on other points.
    """
    if shade in {"latency", "file_bytes"}:
        spent = cost_of(point, "latency" if shade == "latency" else "file_bytes")
        return None if spent is None else spent.value
    if shade == "change":
        return point.primary.change.value
    if shade == "flips":
        return None if point.flips is None else point.flips.value
    name = {"rank": "rank_ratio", "bits": "weight_bits"}.get(shade, shade)
    given = next((getattr(step, name) for step in point.recipe if step.slider == name), OFF.get(shade))
    return None if given is None else float(given)


def shades(rows: Sequence[Measurement], shade: Shade) -> list[float | None]:
    """Return the number that each point's colour stands for.

    `newest` counts back from the last row, which is 0.
    """
    if shade == "newest":
        return [float(len(rows) - 1 - index) for index in range(len(rows))]
    return [None] * len(rows) if shade == "standing" else [shade_of(row, shade) for row in rows]


@uncollected()
def tradeoff(
    rows: Iterable[Measurement],
    cost: Cost = "file_bytes",
    *,
    metric: str | None = None,
    change: bool = False,
    shade: Shade = "standing",
) -> Tradeoff:
    """Return the record of a trade-off plot of complete points of one model, in the order in which they were
    measured.

    Args:
        rows: points of one model on one data set; those without this cost or metric are left out.
        cost: what is paid.
        metric: which quality; None takes the task's main one.
        change: show the paired change against the dense model.
        shade: what colour stands for.

    Raises:
        ValueError: no points, or points of different models.
    """
    compared = comparable(rows, cost, metric)
    chosen, stands, shaded = (
        compared.rows,
        standings(compared.drops, compared.costs),
        shades(compared.rows, shade),
    )
    read = attrgetter("change" if change else "compressed")
    qualities = (
        [read(row.quality[0]) for row in chosen]
        if metric is None
        else [read(quality_of(row, metric)) for row in chosen]
    )
    records = list(
        map(
            TradeoffPoint._make,
            zip(chosen, qualities, map(Estimate, *compared.costs.tolist()), stands, shaded, strict=True),
        )
    )
    points = tuple(map(records.__getitem__, compared.costs[0].argsort(kind="stable").tolist()))
    quality = quality_of(chosen[0], metric)
    assert quality is not None  # noqa: S101  for the type checker: `comparable` has left out what lacks it
    dense_cost = next(
        (spent for row in chosen if (spent := dense_cost_of(row, cost)) is not None), float("nan")
    )
    return Tradeoff(
        chosen[0].context.model_name,
        quality.metric,
        cost,
        0.0 if change else quality.dense.value,
        dense_cost,
        points,
        change,
        shade,
    )


@dataclass(frozen=True)
class ComparedPoints:
    """Complete points of one model that have a cost and a metric, their quality drops and costs."""

    rows: list[Measurement]
    drops: Ends
    costs: Ends


def comparable(rows: Iterable[Measurement], cost: Cost, metric: str | None = None) -> ComparedPoints:
    """Return the complete rows that have this cost and metric.

    Raises:
        ValueError: none, or of several models.

    """
    spent_by = spending(cost)
    triples = [
        (row, quality, spent)
        for row in rows
        if row.complete
        and (spent := spent_by(row)) is not None
        and (quality := quality_of(row, metric)) is not None
    ]
    chosen = [row for row, _, _ in triples]
    models = {(row.context.model_fingerprint, row.context.data_fingerprint) for row in chosen}
    if len(models) != 1:
        raise ValueError(
            f"a trade-off needs points of one model on one data set; got {len(models)} in {len(chosen)}"
            " points"
        )
    return ComparedPoints(chosen, drops_of(triples), costs_of(triples, cost))


def drops_of(triples: Sequence[tuple[Measurement, Quality, Any]]) -> Ends:
    """Return the quality drops of points, as `Quality.drop`."""
    return turned(
        [quality.metric for _, quality, _ in triples],
        ends(
            (change.value, change.low, change.high)
            for change in (quality.change for _, quality, _ in triples)
        ),
    )


def turned(metrics: list[str], changes: Ends) -> Ends:
    """Return changes of these metrics so that positive is worse."""
    higher = {name: metric_named(name).higher for name in set(metrics)}
    if len(set(higher.values())) == 1:
        return -changes[[0, 2, 1]] if next(iter(higher.values())) else changes
    return np.where([higher[name] for name in metrics], -changes[[0, 2, 1]], changes)


def costs_of(triples: Sequence[tuple[Measurement, Quality, Any]], cost: Cost) -> Ends:
    """Return the costs of points, as `cost_of`."""
    if cost == "latency":
        return (
            1
            / ends(
                (ratio.value, ratio.low, ratio.high)
                for ratio in (latency.speedup for _, _, latency in triples)
            )[[0, 2, 1]]
        )
    return np.tile(np.fromiter((count for _, _, count in triples), float, len(triples)), (3, 1))


def ends(estimates: Iterable[tuple[float, float, float]]) -> Ends:
    """Return (value, low, high) of n estimates as [3, n]."""
    return np.fromiter(chain.from_iterable(estimates), float).reshape(-1, 3).T


def standings(drops: Ends, costs: Ends) -> list[Standing]:
    """Return the standing of each point among all, as `Tradeoff` says, in n log n steps.

    What is NaN compares with nothing and stands on the front.

    Args:
        drops: value, low and high of n quality drops, [3, n].
        costs: value, low and high of their costs, [3, n].
    """
    told = ~np.isnan(np.concatenate([drops, costs])).any(0)
    (drop, drop_low, drop_high), (cost, cost_low, cost_high) = drops[:, told], costs[:, told]
    cheaper, as_cheap = (best(cost, drop, cost, side) for side in ("left", "right"))
    surely_cheaper = best(
        np.maximum(cost, cost_high), np.maximum(drop, drop_high), np.minimum(cost, cost_low), "right"
    )
    beaten, surely = np.zeros((2, drops.shape[1]), dtype=bool)
    beaten[told] = (cheaper <= drop) | (as_cheap < drop)
    surely[told] = surely_cheaper < np.minimum(drop, drop_low)
    return list(np.where(surely, "dominated", np.where(beaten, "within noise", "front")).tolist())


def best(
    costs: NDArray[np.float64],
    drops: NDArray[np.float64],
    limits: NDArray[np.float64],
    side: Literal["left", "right"],
) -> NDArray[np.float64]:
    """Return the least drop among those that cost less than each limit (`left`; `right`: or as much), NaN
    where there is none.
    """
    order = costs.argsort()
    least = np.concatenate([[np.nan], np.minimum.accumulate(drops[order])])
    least_drops: NDArray[np.float64] = least[costs[order].searchsorted(limits, side)]
    return least_drops


@uncollected()
def pareto(rows: Iterable[Measurement], cost: Cost = "file_bytes") -> tuple[TradeoffPoint, ...]:
    """Return the points on the front, cheapest first."""
    compared = comparable(rows, cost)
    stands, costs = standings(compared.drops, compared.costs), compared.costs.T
    front = [
        TradeoffPoint(
            compared.rows[place],
            compared.rows[place].primary.compressed,
            Estimate(*costs[place].tolist()),
            "front",
        )
        for place, stand in enumerate(stands)
        if stand == "front"
    ]
    return tuple(sorted(front, key=lambda point: point.cost.value))


def smallest_within(rows: Iterable[Measurement], drop: float) -> Measurement | None:
    """Return the smallest point whose whole interval of the quality drop is within `drop`, or None."""
    return min(
        (row for row in rows if row.primary.drop.high <= drop),
        key=lambda row: row.sizes.file_bytes,
        default=None,
    )


def fastest_within(rows: Iterable[Measurement], drop: float) -> Measurement | None:
    """Return the fastest point within `drop` that is faster than dense beyond its interval, or None."""
    fit = [
        row
        for row in rows
        if row.primary.drop.high <= drop and row.latency is not None and row.latency.speedup.low > 1
    ]
    return max(fit, key=lambda row: row.latency.speedup.value if row.latency else 0.0, default=None)
