"""Two sorts of figure as SVG text, by logarithms: bars of times, and lines of how they grow.

The same data give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#9c6b4e")
WIDE, ROW, LEFT, TOP = (
    520,
    20,
    330,
    46,
)  # of the field, a bar's line, and where the field begins at least, in pixels
LETTER = 6.8  # pixels of a letter of a label
HIGH = 300  # of a field of lines


def number(value: float | None, digits: int = 3) -> str | None:
    """Return a number with so many digits that count, never as a power of ten."""
    if value is None:
        return None
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:g}"


def sheet(width: float, height: float, title: str) -> list[str]:
    """Return the beginning of a drawing."""
    return [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}"'
            ' font-family="sans-serif" font-size="12">'
        ),
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-size="15">{title}</text>',
    ]


def tens(values: Iterable[float]) -> tuple[int, int]:
    """Return the powers of ten around positive values."""
    powers = [math.log10(value) for value in values]
    low, high = math.floor(min(powers)), math.ceil(max(powers))
    return low, max(high, low + 1)


def bars(title: str, unit: str, rows: Sequence[tuple[str, str, float, float | None]]) -> str:
    """Draw rows of (label, group, value, aim): one bar each, coloured by group, with a stroke where the aim
    is."""
    low, high = tens([value for _, _, value, _ in rows] + [aim for *_, aim in rows if aim])
    groups, left = (
        list(dict.fromkeys(group for _, group, _, _ in rows)),
        max(LEFT, 16 + LETTER * max(len(label) for label, *_ in rows)),
    )

    def across(value: float) -> float:
        return round(left + WIDE * (math.log10(value) - low) / (high - low), 1)

    bottom = TOP + ROW * len(rows)
    shapes = sheet(left + WIDE + 80, bottom + 50, title)
    for power in range(low, high + 1):
        shapes.append(
            f'<path d="M{across(10.0**power)} {TOP}V{bottom}" stroke="#ddd"/><text x="{across(10.0**power)}"'
            f' y="{bottom + 18}" text-anchor="middle">{10.0**power:g}</text>'
        )
    for index, (label, group, value, aim) in enumerate(rows):
        y, colour = TOP + ROW * index, COLOURS[groups.index(group) % len(COLOURS)]
        told, end = number(value) or "", across(value)
        struck = aim and end - 5 < across(aim) < end + 10 + LETTER * len(
            told
        )  # the number stands past a stroke that would go through it
        shapes.append(
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{label}</text><path d="M{left}'
            f' {y + 3}H{end}v14H{left}z" fill="{colour}"/><text'
            f' x="{(across(aim) if aim and struck else end) + 5:g}" y="{y + 14}">{told}</text>'
        )
        if aim:
            shapes.append(f'<path d="M{across(aim)} {y + 1}v18" stroke="#222" stroke-width="2"/>')
    shapes.append(f'<text x="{left + WIDE / 2}" y="{bottom + 38}" text-anchor="middle">{unit}</text></svg>')
    return "\n".join(shapes) + "\n"


def lines(
    title: str, across_name: str, up_name: str, series: Mapping[str, Sequence[tuple[float, float]]]
) -> str:
    """Draw series of (x, y), both by their logarithm."""
    left = 70
    x_low, x_high = tens(x for points in series.values() for x, _ in points)
    y_low, y_high = tens(y for points in series.values() for _, y in points)

    def at(x: float, y: float) -> tuple[float, float]:
        return round(left + WIDE * (math.log10(x) - x_low) / (x_high - x_low), 1), round(
            TOP + HIGH * (1 - (math.log10(y) - y_low) / (y_high - y_low)), 1
        )

    bottom = TOP + HIGH
    shapes = sheet(left + WIDE + 200, bottom + 50, title)
    for power in range(x_low, x_high + 1):
        x = at(10.0**power, 10.0**y_low)[0]
        shapes.append(
            f'<path d="M{x} {TOP}V{bottom}" stroke="#ddd"/><text x="{x}" y="{bottom + 18}"'
            f' text-anchor="middle">{10.0**power:g}</text>'
        )
    for power in range(y_low, y_high + 1):
        y = at(10.0**x_low, 10.0**power)[1]
        shapes.append(
            f'<path d="M{left} {y}H{left + WIDE}" stroke="#ddd"/><text x="{left - 6}" y="{y + 4}"'
            f' text-anchor="end">{10.0**power:g}</text>'
        )
    for index, (name, points) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        places = [at(*point) for point in points]
        shapes.append(
            f'<polyline points="{" ".join(f"{x},{y}" for x, y in places)}" fill="none" stroke="{colour}"'
            ' stroke-width="2"/>'
        )
        shapes += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in places]
        y = TOP + 10 + 18 * index
        shapes.append(
            f'<path d="M{left + WIDE + 14} {y}h20" stroke="{colour}" stroke-width="2"/><text'
            f' x="{left + WIDE + 40}" y="{y + 4}">{name}</text>'
        )
    shapes.append(
        f'<text x="{left + WIDE / 2}" y="{bottom + 38}" text-anchor="middle">{across_name}</text><text x="10"'
        f' y="38">{up_name}</text></svg>'
    )
    return "\n".join(shapes) + "\n"
