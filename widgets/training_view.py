"""The training curve while it grows, and the button that ends the training and keeps what it has reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import ipywidgets as ipw

from widgets.live import Live
from workbench.progress import Curve, Look

WIDTH, HEIGHT = 360, 54  # of the picture, in its own units


class TrainingView(ipw.HBox):
    """Shown while a recipe is trained, and afterwards until the sliders move again."""

    def __init__(self, on_stop: Callable[[], None]) -> None:
        """Start hidden; `on_stop` is called by the button."""
        self.picture = ipw.HTML()
        self.button = ipw.Button(description="stop and keep", tooltip="end the training here; the model as it is now is measured and kept")
        self.button.on_click(lambda _: on_stop())
        super().__init__([self.picture, self.button], layout=ipw.Layout(display="none"))
        self.add_class("wb-training")

    def show(self, live: Live) -> None:
        """Show the curve of the present state."""
        self.layout.display = None if live.curve else "none"
        if live.curve:
            self.button.layout.visibility = "visible" if live.state == "training" else "hidden"
            self.picture.value = curve_html(live.curve, live.curve_steps, running=live.state == "training", looks=live.looks)


def curve_html(curve: Curve, steps: int, *, running: bool, looks: Sequence[Look] = ()) -> str:
    """Return the curve as a picture with its numbers in words. curve: (step, loss), finite losses; steps: how many were planned."""
    losses = [loss for _, loss in curve]
    words = f"step {len(curve):,} of {steps:,}: loss {losses[0]:.3g} \N{RIGHTWARDS ARROW} {losses[-1]:.3g}"
    lead = "training" if running else "trained" if len(curve) >= steps else "training stopped"
    return f"<div class='wb-curve'>{curve_svg(curve, steps)}<span role='status'>{lead}, {words}{look_words(looks)}</span></div>"


def look_words(looks: Sequence[Look]) -> str:
    """Return the newest look at held-out items in words, and which one was the best; nothing without looks."""
    if not looks:
        return ""
    last, best = looks[-1], min(looks, key=lambda look: look.loss)
    words = f"; held-out {last.metric} {last.value:.4g} [{last.low:.4g}, {last.high:.4g}] after step {last.step} on {last.items} items, dense {last.dense:.4g}"
    return words if best is last else f"{words}; best after step {best.step}: {best.value:.4g}"


def curve_svg(curve: Curve, steps: int) -> str:
    """Return the curve as SVG, logarithmic in the loss where it spans more than a factor of ten; the right edge is the last step planned."""
    low, high = min(loss for _, loss in curve), max(loss for _, loss in curve)
    log = low > 0 and high > 10 * low

    def height(loss: float) -> float:
        share = math.log(loss / low) / math.log(high / low) if log else (loss - low) / (high - low or 1.0)
        return 3 + (HEIGHT - 6) * (1 - share)

    thin = curve[:: max(1, len(curve) // WIDTH)]
    points = " ".join(f"{WIDTH * index / max(1, steps - 1):.1f},{height(loss):.1f}" for index, loss in [*thin, curve[-1]])
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' preserveAspectRatio='none' aria-hidden='true'><polyline points='{points}'/></svg>"
