"""Colour as the third axis: a scale that colour-blind people can read, and its bar in HTML; pure."""

from __future__ import annotations

import math
from html import escape

from widgets.figures.figures import BLUE, GREEN, ORANGE
from widgets.plot.plot_choice import SHADE_NAMES
from workbench.ledger.pareto import Shade, Tradeoff
from workbench.util.text import size

# Viridis in nine steps, without its ends, which vanish on a dark and on a light page; equally spaced in
# lightness.
SCALE = ("#443a83", "#3c4f8a", "#31678e", "#287c8e", "#20928c", "#35b779", "#5ec962", "#90d743", "#c8e020")
NONE = "rgba(139,149,165,0.55)"


def color_at(fraction: float) -> str:
    """Return the colour at a fraction of the scale, between its steps."""
    place = min(1.0, max(0.0, fraction)) * (len(SCALE) - 1)
    index = min(int(place), len(SCALE) - 2)
    rest = place - index
    low, high = ([int(SCALE[i][k : k + 2], 16) for k in (1, 3, 5)] for i in (index, index + 1))
    return "#" + "".join(f"{round(a + rest * (b - a)):02x}" for a, b in zip(low, high, strict=True))


def ends(record: Tradeoff) -> tuple[float, float] | None:
    """Return the smallest and the largest number that colour stands for, None if no point has one."""
    values = [p.shade for p in record.points if p.shade is not None and math.isfinite(p.shade)]
    return (min(values), max(values)) if values else None


def painted(record: Tradeoff) -> dict[str, str]:
    """Return each point's colour by key, grey where it has no number; empty if colour means standing."""
    if record.shade_name == "standing":
        return {}
    values = ends(record)

    def color(shade: float | None) -> str:
        if values is None or shade is None or not math.isfinite(shade):
            return NONE
        return color_at(place(shade, values))

    return {p.key: color(p.shade) for p in record.points}


def place(value: float, values: tuple[float, float]) -> float:
    """Return where a value lies between both ends."""
    low, high = values
    return (value - low) / (high - low) if high > low else 0.5


def words(value: float, shade: Shade) -> str:
    """Return a number of the scale as a person reads it."""
    if shade == "file_bytes":
        return size(value)
    if shade in {"change", "flips"}:
        return f"{value:.1%}"
    if shade == "newest":
        return "newest" if value == 0 else f"{value:.0f} ago"
    return f"{value:.2f}\N{MULTIPLICATION SIGN} dense" if shade == "latency" else f"{value:g}"


def legend(record: Tradeoff | None) -> str:
    """Return the legend of marks and colours in HTML (plotly's own would move the plot)."""
    marks = [
        ("\N{BLACK STAR}", ORANGE, "dense"),
        ("\N{WHITE CIRCLE}", GREEN, "predicted"),
        ("\N{BLACK CIRCLE}", GREEN, "measured"),
    ]
    if record is None or record.shade_name == "standing":
        marks += [
            ("\N{BLACK CIRCLE}", BLUE, "front"),
            ("\N{BLACK CIRCLE}", "rgba(59,130,246,0.5)", "within noise"),
            ("\N{BLACK CIRCLE}", "rgba(139,149,165,0.6)", "dominated"),
        ]
    html = "".join(
        f"<span class='wb-mark'><i style='color:{color}' aria-hidden='true'>{mark}</i>{name}</span>"
        for mark, color, name in marks
    )
    return html if record is None or record.shade_name == "standing" else html + color_bar(record)


def color_bar(record: Tradeoff) -> str:
    """Return the scale with its ends in words."""
    name, values = escape(SHADE_NAMES[record.shade_name]), ends(record)
    if values is None:
        return f"<span class='wb-mark wb-scale'>{name}: no point has it</span>"
    low, high = (escape(words(value, record.shade_name)) for value in values)
    ramp = f"background:linear-gradient(90deg,{','.join(SCALE)})"
    bar = f"<b style='{ramp}' role='img' aria-label='from dark to light'></b>"
    without = f"<i style='color:{NONE}' aria-hidden='true'>\N{BLACK CIRCLE}</i>none"
    if all(p.shade is not None for p in record.points):
        without = ""
    return f"<span class='wb-mark wb-scale'>{name}: {low} {bar} {high} {without}</span>"
