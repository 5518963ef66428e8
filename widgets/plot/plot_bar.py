"""The line over the plot: what stands on the axes, what colour means, how many points are shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import ipywidgets as ipw
import traitlets

from widgets.plot.colours import legend
from widgets.plot.plot_choice import COST_NAMES, SHADE_NAMES, PlotChoice, can_be_logarithmic
from workbench.ledger.pareto import Tradeoff


class PlotBar(ipw.VBox):
    """Controls of the plot.

    `choice` is what they say; `selecting` turns dragging on the plot from zooming into marking points.
    """

    choice = traitlets.Instance(PlotChoice, ())
    selecting = traitlets.Bool(default_value=False)

    def __init__(self) -> None:
        """Make the controls."""
        self.hold = False
        costs = [(name, cost) for cost, name in COST_NAMES.items()]
        shades = [(name, shade) for shade, name in SHADE_NAMES.items()]
        qualities = [("quality", ("", False)), ("change", ("", True))]
        self.cost = menu("x", costs, "file_bytes", "what stands across: less is always left")
        self.metric = menu("y", qualities, ("", False), "what stands upwards: better is always up")
        self.shade = menu("colour", shades, "standing", "what the colour of measured points means")
        self.log_cost = switch("log x", True, "a logarithmic axis for the cost")
        self.log_quality = switch("log y", True, "a logarithmic axis for quality, where it has no zero")
        self.select = switch(
            "select",
            False,
            "drag a box around points to compare them; off: drag to zoom, double click to zoom out",
        )
        self.words = ipw.HTML(legend(None))
        self.words.add_class("wb-legend")
        row = ipw.HBox([self.cost, self.log_cost, self.metric, self.log_quality, self.shade, self.select])
        row.add_class("wb-plotmenu")
        super().__init__([row, self.words])
        self.add_class("wb-plotbar")
        for control in (self.cost, self.metric, self.shade, self.log_cost, self.log_quality):
            control.observe(self.moved, "value")
        self.observe(self.chosen, "choice")
        traitlets.link((self.select, "value"), (self, "selecting"))

    def moved(self, change: dict[str, Any]) -> None:
        """Take over what the controls say.

        A change of the cost brings its own scale: sizes are logarithmic, time is not.
        """
        if self.hold:
            return
        log_cost = self.cost.value != "latency" if change["owner"] is self.cost else self.log_cost.value
        metric, as_change = self.metric.value
        self.choice = PlotChoice(
            self.cost.value, metric, as_change, self.shade.value, log_cost, self.log_quality.value
        )

    def chosen(self, change: dict[str, Any]) -> None:
        """Show a choice that came from Python."""
        choice = cast("PlotChoice", change["new"])
        self.hold = True
        try:
            self.cost.value, self.shade.value = choice.cost, choice.shade
            self.metric.value = (choice.metric, choice.change)
            self.log_cost.value, self.log_quality.value = choice.log_cost, choice.log_quality
        finally:
            self.hold = False

    def offer(self, metrics: Sequence[str]) -> None:
        """Offer the metrics that points carry, the main one first.

        Each as it is, and as its change against the dense model.
        """
        options = []
        for name in metrics:
            metric = "" if name == metrics[0] else name
            options += [(name, (metric, False)), (f"{name}, change", (metric, True))]
        if options and tuple(options) != tuple(self.metric.options):
            offered = self.choice.metric in {"", *metrics[1:]}
            self.hold = True
            try:
                kept = (self.choice.metric, self.choice.change) if offered else ("", self.choice.change)
                self.metric.options = options
                self.metric.value = kept
            finally:
                self.hold = False
            if not offered:
                self.choice = dataclasses.replace(self.choice, metric="")
        shown = self.choice.metric or (metrics[0] if metrics else "")
        self.log_quality.disabled = not can_be_logarithmic(self.choice, shown)

    def show(self, record: Tradeoff | None, total: int) -> None:
        """Say what marks and colours mean, and how many of how many points are drawn."""
        drawn = 0 if record is None else len(record.points)
        which = ": front and newest" if drawn < total else ""
        count = f"<span class='wb-count'>{drawn:,} of {total:,} points{which}</span>" if total else ""
        self.words.value = legend(record) + count


def menu(name: str, options: list[tuple[str, Any]], value: Any, about: str) -> ipw.Dropdown:
    """Return a drop-down of the bar."""
    dropdown = ipw.Dropdown(options=options, value=value, description=name, tooltip=about)
    dropdown.add_class("wb-menu")
    return dropdown


def switch(name: str, value: bool, about: str) -> ipw.ToggleButton:
    """Return a toggle of the bar."""
    button = ipw.ToggleButton(value=value, description=name, tooltip=about)
    button.add_class("wb-switch")
    return button
