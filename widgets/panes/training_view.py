"""The training curve while it grows, and the button that ends the training and keeps what it has reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import ipywidgets as ipw

from widgets.figures.softened_html import softened_html
from widgets.session.state import PanelState
from workbench.metrics.estimate import Estimate
from workbench.metrics.metrics import metric_named
from workbench.util.progress import Curve, Look

WIDTH, HEIGHT = 360, 54  # of the picture, in its own units


class TrainingView(ipw.HBox):
    """Shown while a recipe is trained, and afterwards until the sliders move again."""

    def __init__(self, on_stop: Callable[[], None]) -> None:
        """Start hidden; `on_stop` is called by the button."""
        self.picture = ipw.HTML()
        self.button = ipw.Button(
            description="stop and keep",
            tooltip="end the training here; the model as it is now is measured and kept",
        )
        self.button.on_click(lambda _: on_stop())
        self.lesson = ipw.ToggleButton(
            description="what T does",
            tooltip="show what the temperature makes of one answer that the student is taught",
            layout=ipw.Layout(width="auto"),
        )
        self.lesson.observe(lambda _: self.draw(), "value")
        self.state: PanelState | None = None
        super().__init__([self.picture, self.lesson, self.button], layout=ipw.Layout(display="none"))
        self.add_class("wb-training")

    def show(self, state: PanelState) -> None:
        """Show the curve of the present state; hidden where nothing was trained."""
        self.state = state
        self.layout.display = None if state.curve else "none"
        if state.curve:
            self.draw()

    def draw(self) -> None:
        """Draw the curve, and one softened answer where that is asked for."""
        state = self.state
        if state is None or not state.curve:
            return
        running = state.phase == "training"
        self.button.layout.visibility = "visible" if running else "hidden"
        self.lesson.layout.display = None if state.softened is not None else "none"
        curve = curve_html(state.curve, state.curve_steps, running=running, looks=state.looks)
        lesson = softened_html(state.softened) if state.softened is not None and self.lesson.value else ""
        self.picture.value = curve + lesson


def curve_html(curve: Curve, steps: int, *, running: bool, looks: Sequence[Look] = ()) -> str:
    """Return the curve as a picture with its numbers in words.

    Args:
        curve: (step, loss), finite losses.
        steps: how many were planned.
        running: whether more are to come.
        looks: at held-out items.

    """
    losses = [loss for _, loss in curve]
    text = f"step {len(curve):,} of {steps:,}: loss {losses[0]:.3g} \N{RIGHTWARDS ARROW} {losses[-1]:.3g}"
    lead = "training" if running else "trained" if len(curve) >= steps else "training stopped"
    told = f"<span role='status'>{lead}, {text}{look_words(looks)}</span>"
    return f"<div class='wb-curve'>{curve_svg(curve, steps, looks)}{told}</div>"


def look_words(looks: Sequence[Look]) -> str:
    """Return the newest look at held-out items in words, and which was the best; nothing without looks."""
    if not looks:
        return ""
    last, best = looks[-1], min(looks, key=lambda look: look.loss)
    metric = metric_named(last.metric)
    quality = metric.interval(Estimate(last.value, last.low, last.high))
    text = (
        f"; held-out {last.metric} {quality} after step {last.step} on {last.items} items,"
        f" dense {metric.words(last.dense)}"
    )
    return text if best is last else f"{text}; best after step {best.step}: {metric.words(best.value)}"


def curve_svg(curve: Curve, steps: int, looks: Sequence[Look] = ()) -> str:
    """Return the curve as SVG, logarithmic in the loss where it spans more than a factor of ten.

    The right edge is the last step planned.

    Looks at held-out items stand on a scale of their own: their quality, a bar for each interval, and the
    dense model's quality dashed.
    """
    height = scale([loss for _, loss in curve])
    thin = curve[:: max(1, len(curve) // WIDTH)]
    points = " ".join(f"{across(index, steps):.1f},{height(loss):.1f}" for index, loss in [*thin, curve[-1]])
    shapes = f"<polyline points='{points}'/>{looks_svg(looks, steps)}"
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' preserveAspectRatio='none' aria-hidden='true'>{shapes}</svg>"


def looks_svg(looks: Sequence[Look], steps: int) -> str:
    """Return the shapes of looks: the dense model's line, the intervals, and quality from look to look."""
    shown = [look for look in looks if all(map(math.isfinite, (look.value, look.low, look.high, look.dense)))]
    if not shown:
        return ""
    height = scale([number for look in shown for number in (look.low, look.high, look.dense)])
    dense = height(shown[-1].dense)
    bars = [
        f"<line class='wb-look' x1='{(x := across(look.step, steps)):.1f}' x2='{x:.1f}'"
        f" y1='{height(look.low):.1f}' y2='{height(look.high):.1f}'/>"
        for look in shown
    ]
    line = " ".join(f"{across(look.step, steps):.1f},{height(look.value):.1f}" for look in shown)
    level = f"<line class='wb-dense' x1='0' x2='{WIDTH}' y1='{dense:.1f}' y2='{dense:.1f}'/>"
    return f"{level}{''.join(bars)}<polyline class='wb-look' points='{line}'/>"


def across(step: int, steps: int) -> float:
    """Return where a step stands from left to right."""
    return min(float(WIDTH), WIDTH * step / max(1, steps - 1))


def scale(values: Sequence[float]) -> Callable[[float], float]:
    """Return the height of a value on the picture, the largest at the top.

    Logarithmic where they span more than a factor of ten.
    """
    low, high = min(values), max(values)
    log = low > 0 and high > 10 * low

    def height(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low or 1.0)
        return 3 + (HEIGHT - 6) * (1 - share)

    return height
