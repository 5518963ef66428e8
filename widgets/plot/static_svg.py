"""A plotly figure of points, lines and error bars as a small SVG that needs no script; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 400, 70, 12, 14, 50
GREY, BLUE = "#8b95a5", "#3b82f6"


@dataclass(frozen=True)
class PlotAxis:
    """Where numbers lie: `low` and `high` are logarithms on a log axis, `start` and `end` are in SVG
    units.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool

    def place(self, value: Any) -> float | None:
        """Return the place of a number, None for what has none there."""
        if not isinstance(value, int | float) or not math.isfinite(value) or (self.log and value <= 0):
            return None
        x = math.log10(value) if self.log else float(value)
        return self.start + (x - self.low) / (self.high - self.low) * (self.end - self.start)

    def holds(self, value: Any) -> bool:
        """Return whether a number lies between the ends."""
        place = self.place(value)
        return (
            place is not None and min(self.start, self.end) - 0.5 <= place <= max(self.start, self.end) + 0.5
        )


def axis_of(layout: Mapping[str, Any], start: float, end: float) -> PlotAxis | None:
    """Return an axis of the figure, None where it has no range yet."""
    ends = layout.get("range")
    if not ends or ends[0] == ends[1]:
        return None
    return PlotAxis(float(ends[0]), float(ends[1]), start, end, layout.get("type") == "log")


def ticks(axis: PlotAxis, layout: Mapping[str, Any]) -> list[float]:
    """Return the ticks that the figure names, else some round numbers (on a log axis 1, 2, 5 a power)."""
    if layout.get("tickmode") == "array" and layout.get("tickvals"):
        values = [float(value) for value in layout["tickvals"]]
    elif axis.log:
        values = [base * 10.0**power for power in range(-4, 9) for base in (1, 2, 5)]
    else:
        low, high = sorted((axis.low, axis.high))
        power = 10.0 ** math.floor(math.log10((high - low) / 5))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 6.5 >= high - low)
        first, last = math.ceil(low / step), math.floor(high / step)
        values = [round(step * index, 10) for index in range(first, last + 1)]
    return [value for value in values if axis.holds(value)]


def numbers(values: Any) -> list[Any]:
    """Return a trace's numbers as a list."""
    return [] if values is None else [value.item() if hasattr(value, "item") else value for value in values]


def points_of(trace: Mapping[str, Any], across: PlotAxis, up: PlotAxis) -> list[tuple[float, float, int]]:
    """Return the places of a trace's points that lie inside, with their index."""
    pairs = enumerate(zip(numbers(trace.get("x")), numbers(trace.get("y")), strict=False))
    return [
        (across.place(x) or 0.0, up.place(y) or 0.0, index)
        for index, (x, y) in pairs
        if across.holds(x) and up.holds(y)
    ]


def colour(value: Any) -> str:
    """Return a colour; a scale of numbers becomes blue."""
    return escape(value) if isinstance(value, str) else BLUE


def marks(trace: Mapping[str, Any], across: PlotAxis, up: PlotAxis) -> str:
    """Return one trace: its line or its markers with their bars."""
    places = points_of(trace, across, up)
    if trace.get("mode") == "lines":
        stroke = colour((trace.get("line") or {}).get("color"))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        line = f"<polyline points='{path}' fill='none' stroke='{stroke}' stroke-dasharray='3 3'/>"
        return line if len(places) > 1 else ""
    marker = trace.get("marker") or {}
    shape, shade = str(marker.get("symbol", "circle")), colour(marker.get("color"))
    width = marker.get("size", 8)
    radius = (width if isinstance(width, int | float) else 8) / 2
    drawn = []
    for x, y, index in places:
        drawn.append(error_bar(trace, index, x, up))
        if shape.startswith("star"):
            drawn.append(
                text(f"{x:.1f}", f"{y + 8:.1f}", "\N{BLACK STAR}", more=f"font-size='24' fill='{shade}'")
            )
        else:
            fill, edge = ("none", shade) if shape.endswith("open") else (shade, "none")
            drawn.append(
                f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius:.1f}' fill='{fill}' stroke='{edge}'"
                " stroke-width='2' opacity='0.85'/>"
            )
    return "".join(drawn)


def error_bar(trace: Mapping[str, Any], index: int, x: float, up: PlotAxis) -> str:
    """Return the bar of one point, cut at the ends of the plot."""
    bars = trace.get("error_y") or {}
    above, below = numbers(bars.get("array")), numbers(bars.get("arrayminus"))
    y = numbers(trace.get("y"))[index]
    if index >= len(above) or index >= len(below):
        return ""
    ends = [up.place(y + above[index]), up.place(y - below[index])]
    top, bottom = (min(max(end if end is not None else TOP, TOP), HEIGHT - BOTTOM) for end in ends)
    return (
        f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{top:.1f}' y2='{bottom:.1f}'"
        f" stroke='{colour(bars.get('color'))}' stroke-width='{min(3, bars.get('thickness', 1))}'/>"
    )


def text(x: float | str, y: float | str, content: str, *, anchor: str = "middle", more: str = "") -> str:
    """Return a text at a place; `more` are further attributes."""
    return f"<text x='{x}' y='{y}' text-anchor='{anchor}'{more and ' ' + more}>{content}</text>"


def frame(across: PlotAxis, up: PlotAxis, layout: Mapping[str, Any]) -> str:
    """Return grid, tick labels and axis titles."""
    x, y = layout.get("xaxis") or {}, layout.get("yaxis") or {}
    shapes, bottom, right = [], HEIGHT - BOTTOM, WIDTH - RIGHT
    grid = f"stroke='{GREY}' stroke-opacity='.25'"
    for value in ticks(across, x):
        at = across.place(value)
        shapes.append(f"<line x1='{at:.1f}' x2='{at:.1f}' y1='{TOP}' y2='{bottom}' {grid}/>")
        shapes.append(text(f"{at:.1f}", bottom + 18, f"{value:g}"))
    for value in ticks(up, y):
        at = up.place(value) or 0.0
        shapes.append(f"<line x1='{LEFT}' x2='{right}' y1='{at:.1f}' y2='{at:.1f}' {grid}/>")
        shapes.append(text(LEFT - 8, f"{at + 5:.1f}", f"{value:g}", anchor="end"))
    titles = [escape(str((axis.get("title") or {}).get("text") or "")) for axis in (x, y)]
    turned = f"transform='translate(16 {(TOP + bottom) / 2}) rotate(-90)'"
    shapes.append(text((LEFT + right) / 2, HEIGHT - 8, titles[0]))
    shapes.append(text(0, 0, titles[1], more=turned))
    return "".join(shapes)


def svg(data: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> str:
    """Return the figure as SVG; empty before its axes are known."""
    across = axis_of(layout.get("xaxis") or {}, LEFT, WIDTH - RIGHT)
    up = axis_of(layout.get("yaxis") or {}, HEIGHT - BOTTOM, TOP)
    if across is None or up is None:
        return ""
    inside = frame(across, up, layout) + "".join(marks(trace, across, up) for trace in data)
    return (
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' style='max-width:100%' role='img'"
        f" aria-label='trade-off plot' font-family='system-ui, sans-serif' font-size='13' fill='{GREY}'"
        f" xmlns='http://www.w3.org/2000/svg'>{inside}</svg>"
    )
