"""One option of a method as one control, read from the annotations of its dataclass field; pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw

from workbench.compress.registry import METHODS

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from workbench.recipe import Step
    from workbench.runtime.schemes import KernelTick

SHORT = {
    "group_size": "group",
    "scale_search": "search",
    "learning_rate": "rate",
    "distill_batch": "batch",
    "factorization": "by",
    "criterion": "by",
    "rank_allocation": "share",
    "conv": "kernels",
    "repair_rounds": "rounds",
    "activation_format": "format",
    "activation_scaling": "scaling",
    "activation_granularity": "per",
}


@dataclass(frozen=True)
class Bounds:
    """The range that an annotation allows; None where it says nothing.

    `*_open` bounds are not allowed themselves.
    """

    low: float | None
    high: float | None
    low_open: bool
    high_open: bool


def bounds(info: FieldInfo) -> Bounds:
    """Return the bounds of a field."""
    limits: dict[str, Any] = {}
    for item in info.metadata:
        for name in ("ge", "gt", "le", "lt"):
            if getattr(item, name, None) is not None:
                limits[name] = getattr(item, name)
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    return Bounds(low, high, "ge" not in limits, "le" not in limits)


def title(step: type[Step], name: str) -> str:
    """Return an option's name as a person reads it: `rank_ratio` is rank."""
    return METHODS.of(step).slider_title if name == step.slider else name.replace("_", " ")


def nice_step(span: float) -> float:
    """Return 1, 2 or 5 times a power of ten, about a hundredth of the span."""
    power = 10.0 ** math.floor(math.log10(span / 100))
    factor = next(f for f in (1, 2, 5, 10) if f * power >= span / 100 * 0.999)
    return float(f"{factor * power:.1g}")


def decimals(step: float) -> int:
    """Return the decimals that a slider of this step shows."""
    return max(0, -math.floor(math.log10(step) + 1e-9))


@dataclass(frozen=True)
class Scale:
    """A slider: first and last value, step, and whether values are whole numbers."""

    low: float
    high: float
    step: float
    whole: bool

    def rounded(self, value: float) -> float | int:
        """Return a value without the noise of binary fractions: 0.30000000000000004 is 0.3."""
        return round(value) if self.whole else round(value, decimals(self.step) + 2)


def scale(step: type[Step]) -> Scale:
    """Return the slider of a method: its field's range, or about its stops where that is far wider."""
    info = step.options()[step.slider]
    limits, whole = bounds(info), info.annotation is int
    default = float(info.default) if isinstance(info.default, int | float) else 1.0
    most = max(step.stops, default=default)
    low = limits.low if limits.low is not None else min(step.stops, default=0.0)
    high = limits.high if limits.high is not None and limits.high <= 4 * abs(most) else 2 * most
    low, high = step.ends or (low, high)
    unit = 1.0 if whole else nice_step(high - low)
    low += unit * (limits.low_open and limits.low is not None)
    high -= unit * (limits.high_open and limits.high == high)
    digits = 0 if whole else decimals(unit)
    return Scale(round(low, digits), round(high, digits), unit, whole)


def slider(step: type[Step]) -> ipw.FloatSlider | ipw.IntSlider:
    """Return the slider of a method, on its own default."""
    info, measure = step.options()[step.slider], scale(step)
    about = {
        "description": title(step, step.slider),
        "tooltip": f"{title(step, step.slider)}: {info.description}",
        "continuous_update": True,
    }
    if measure.whole:
        return ipw.IntSlider(
            value=int(info.default), min=int(measure.low), max=int(measure.high), step=1, **about
        )
    return ipw.FloatSlider(
        value=float(info.default),
        min=measure.low,
        max=measure.high,
        step=measure.step,
        readout_format=f".{decimals(measure.step)}f",
        **about,
    )


def control(name: str, step: type[Step]) -> ipw.ValueWidget:
    """Return the control of a choice: drop-down, check box, bounded number, or text with suggestions."""
    info, choices = step.options()[name], step.choices(name)
    kind: Any = info.annotation
    about = {
        "description": SHORT.get(name, title(step, name)),
        "tooltip": f"{title(step, name)}: {info.description}",
        "value": info.default,
    }
    if kind is bool:
        return ipw.Checkbox(indent=False, **about)
    if choices:
        return ipw.Dropdown(options=list(choices), **about)
    if kind in (int, float):
        limits = bounds(info)
        low = -1e9 if limits.low is None else limits.low
        high = 1e9 if limits.high is None else limits.high
        if kind is int:
            return ipw.BoundedIntText(min=int(low), max=int(high), **about)
        spacing = nice_step(high - low) if high - low <= 1 else 1.0
        return ipw.BoundedFloatText(min=low, max=high, step=spacing, **about)
    return ipw.Combobox(
        options=[str(example) for example in info.examples or [info.default]],
        ensure_option=False,
        continuous_update=False,
        **about,
    )


def tick_marks(step: type[Step], measure: Scale, kernels: Sequence[KernelTick] = ()) -> str:
    """Return the stops as marks under a slider, with the schemes that kernels know: filled where they run."""
    span = measure.high - measure.low
    values = sorted({*map(float, step.stops), *(float(tick.value) for tick in kernels)})
    marks = []
    for value in values:
        number = escape(f"{value:g}") if value in step.stops else ""
        names = "".join(kernel_mark(tick, side(value, values)) for tick in kernels if tick.value == value)
        marks.append(f'<span style="left:{100 * (value - measure.low) / span:.1f}%">{number}{names}</span>')
    return f'<div class="wb-ticks" aria-hidden="true">{"".join(marks)}</div>'


def kernel_mark(tick: KernelTick, where: str) -> str:
    """Return the mark of a scheme beside its tick."""
    about = "a kernel runs this here" if tick.runs else f"no kernel here: {tick.reason}"
    sign, kind = ("\N{BLACK DIAMOND}", "wb-runs") if tick.runs else ("\N{WHITE DIAMOND}", "wb-runs-not")
    return f'<b class="{kind} wb-{where}" title="{escape(about)}">{sign}{escape(tick.label)}</b>'


def side(value: float, values: Sequence[float]) -> str:
    """Return the side of a tick that has more room."""
    left = min((value - neighbour for neighbour in values if neighbour < value), default=math.inf)
    right = min((neighbour - value for neighbour in values if neighbour > value), default=math.inf)
    return "before" if left > right else "after"
