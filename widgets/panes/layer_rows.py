"""The layers of a point as rows of a heat map; pure: measurement and sensitivities in, plain records out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from widgets.panes.verdict_strip import signed
from workbench.compress.core.layer_report import LayerReport
from workbench.metrics.metrics import metric_named
from workbench.metrics.quality import Estimate
from workbench.sensitivity import LayerSensitivity
from workbench.util.text import size

TIMES = "\N{MULTIPLICATION SIGN}"
COLUMNS = (
    ("weights", "share of all stored weights"),
    ("zeros", "fraction of exact zeros"),
    ("rank kept", "fraction of the full rank"),
    ("bits", "bits per weight"),
    ("error", "relative error of the weights: |W' - W| / |W|"),
    ("alone costs{unit}", "sensitivity: what the recipe on this layer alone costs, all others dense"),
)


@dataclass(frozen=True)
class Cell:
    """One field of the heat map: what it says, how dark it is in [0, 1], the number it is sorted by, and an
    interval to draw.

    `bar` is (low, value, high, zero) as fractions of the cell's width.
    """

    text: str = ""
    heat: float | None = None
    value: float | None = None
    bar: tuple[float, float, float, float] | None = None
    about: str = ""

    def plain(self) -> dict[str, Any]:
        """Return it as the browser takes it."""
        return {
            "text": self.text,
            "heat": self.heat,
            "value": self.value,
            "bar": None if self.bar is None else list(self.bar),
            "about": self.about,
        }


@dataclass(frozen=True)
class Row:
    """One layer: its full and its short name, its cells, and what happened to it in words."""

    name: str
    short: str
    cells: tuple[Cell, ...]
    words: str

    def plain(self) -> dict[str, Any]:
        """Return it as the browser takes it."""
        return {
            "name": self.name,
            "short": self.short,
            "cells": [cell.plain() for cell in self.cells],
            "words": self.words,
        }


@dataclass(frozen=True)
class LayerTable:
    """The heat map: names of its columns with what each means, and rows.

    A column without a single cell is left out.
    """

    columns: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]


def table_of(layers: Sequence[LayerReport], costs: Mapping[str, LayerSensitivity]) -> LayerTable:
    """Return the heat map; `costs` are the sensitivities that are known, by layer."""
    rows = rows_of(layers, costs)
    shown = [index for index in range(len(COLUMNS)) if any(row.cells[index].text for row in rows)]
    unit = next((metric_named(cost.metric).change_unit for cost in costs.values()), "points")
    return LayerTable(
        tuple((COLUMNS[i][0].format(unit=unit and f", {unit}"), COLUMNS[i][1]) for i in shown),
        tuple(replace(row, cells=tuple(row.cells[i] for i in shown)) for row in rows),
    )


def rows_of(layers: Sequence[LayerReport], costs: Mapping[str, LayerSensitivity]) -> tuple[Row, ...]:
    """Return one row a layer, with every column."""
    total = sum(row.weights for row in layers) or 1
    most = max((row.weights for row in layers), default=1) or 1
    worst = max((row.relative_error or 0.0 for row in layers), default=0.0)
    shared = prefix([row.name for row in layers])
    frame = frame_of(cost.drop for cost in costs.values() if cost.drop is not None)

    def cells(row: LayerReport) -> tuple[Cell, ...]:
        of_weights, of_cost = weights(row, total, most), cost(costs.get(row.name), frame)
        return of_weights, zeros(row), rank(row), bits(row), error(row, worst), of_cost

    return tuple(Row(row.name, row.name.removeprefix(shared), cells(row), row.outcome) for row in layers)


def prefix(names: Sequence[str]) -> str:
    """Return the dotted beginning that all names but those without a dot share, such as `vit.`."""
    firsts = {name.split(".", 1)[0] for name in names if "." in name}
    return f"{firsts.pop()}." if len(firsts) == 1 else ""


def full_rank(row: LayerReport) -> int:
    """Return the largest rank that a layer of this shape can have."""
    return max(1, min(row.shape[0], row.shape[-1]))


def weights(row: LayerReport, total: int, most: int) -> Cell:
    """Return how many of all stored weights a layer holds."""
    about = f"{row.weights:,} weights stored"
    return Cell(f"{row.weights / total:.1%}", 0.6 * row.weights / most, row.weights, about=about)


def zeros(row: LayerReport) -> Cell:
    """Return the fraction of zeros."""
    if row.sparsity is None or row.sparsity < 0.0005:
        return Cell()
    return Cell(f"{row.sparsity:.0%}", row.sparsity, row.sparsity, about=f"{row.sparsity:.2%} exact zeros")


def rank(row: LayerReport) -> Cell:
    """Return the fraction of the rank that is kept."""
    if row.rank is None:
        return Cell()
    kept = row.rank / full_rank(row)
    return Cell(f"{kept:.0%}", 1 - kept, 1 - kept, about=f"rank {row.rank} of {full_rank(row)}")


def bits(row: LayerReport) -> Cell:
    """Return the width of the codes."""
    if row.bits is None:
        return Cell()
    return Cell(str(row.bits), 1 - row.bits / 12, -row.bits, about=f"{row.bits} bits per weight")


def error(row: LayerReport, worst: float) -> Cell:
    """Return the relative error of the weights."""
    if not row.relative_error:
        return Cell()
    return Cell(f"{row.relative_error:.3f}", row.relative_error / worst, row.relative_error)


def frame_of(drops: Iterable[Estimate]) -> tuple[float, float]:
    """Return the range that the bars of all layers share; it holds zero."""
    ends = [end for drop in drops for end in (drop.low, drop.high) if abs(end) < 1e6]
    return min([0.0, *ends]), max([0.0, *ends])


def cost(sensitivity: LayerSensitivity | None, frame: tuple[float, float]) -> Cell:
    """Return the cost of the recipe on this layer alone, with its interval."""
    if sensitivity is None:
        return Cell()
    if sensitivity.drop is None:
        return Cell("does not fit", about=sensitivity.reason)
    drop, loss, low = sensitivity.drop, sensitivity.loss, frame[0]
    span = (frame[1] - low) or 1.0

    def share(x: float) -> float:
        return min(1.0, max(0.0, (x - low) / span))

    metric = metric_named(sensitivity.metric)
    scale, digits = metric.change_scale, metric.change_digits()
    spread = f"{signed(scale * drop.low, digits)} to {signed(scale * drop.high, digits)}"
    unit = metric.change_unit and f" {metric.change_unit}"
    about = f"{scale * drop.value:+.{digits}f}{unit} worse ({spread}) on {sensitivity.items} items"
    about += f"; saves {size(sensitivity.saved_bytes)}"
    if loss is not None:
        about += f"; loss {loss.value:+.4f} nats ({loss.low:+.4f} to {loss.high:+.4f})"
    bar = (share(drop.low), share(drop.value), share(drop.high), share(0.0))
    return Cell(signed(scale * drop.value, digits), None, drop.value, bar, about)
