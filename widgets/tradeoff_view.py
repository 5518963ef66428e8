"""The trade-off plot as a widget: the past, the live point, and a click that names a point."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as ipw
import plotly.graph_objects as go
import traitlets

from widgets.live import Live, thin
from widgets.live_figure import DENSE, HISTORY, MEASURED, PREDICTED, Changes, axes, dense_changes, history_changes, legend, live_changes, live_figure, window
from workbench.measure.measurement import Measurement
from workbench.tradeoff import Cost, tradeoff


class TradeoffView(ipw.VBox):
    """Quality against size or time. `cost` is the axis; `show_history` and `show_live` write into separate traces."""

    cost: Cost = traitlets.Enum(["file_bytes", "latency"], default_value="file_bytes")  # type: ignore[assignment]

    def __init__(self, on_pick: Callable[[str], None]) -> None:
        """Make the plot; `on_pick` gets the ledger key of a point that was clicked."""
        self.on_pick = on_pick
        self.rows: Sequence[Measurement] = ()
        self.live: Live | None = None
        self.changes: Changes = {}
        self.framed: tuple[Any, ...] = ()
        self.figure = go.FigureWidget(live_figure())
        for index in HISTORY:
            self.figure.data[index].on_click(self.clicked)
        self.axis = ipw.ToggleButtons(
            options=[("size", "file_bytes"), ("time", "latency")], value=self.cost,
            tooltips=["quality against file size", "quality against time relative to the dense model"],
        )  # fmt: skip
        self.axis.add_class("wb-axis")
        self.link = traitlets.link((self.axis, "value"), (self, "cost"))
        bar = ipw.HBox([self.axis, ipw.HTML(legend())])
        bar.add_class("wb-plotbar")
        super().__init__([bar, self.figure])
        self.add_class("wb-plot")
        self.observe(lambda _: self.redraw(), "cost")

    def clicked(self, trace: Any, points: Any, _state: Any) -> None:
        """Name the point that was clicked."""
        if points.point_inds:
            self.on_pick(str(trace.customdata[points.point_inds[0]]))

    def show_history(self, rows: Sequence[Measurement]) -> None:
        """Draw the past anew."""
        self.rows = rows
        self.draw(self.history())
        self.figure._widget_data = copy.deepcopy(self.figure._data)  # noqa: SLF001  plotly 7.1 syncs it only once: a reloaded page would be empty

    def show_live(self, live: Live) -> None:
        """Draw the present: only the two live points (and the star) are sent."""
        self.live = live
        self.draw(self.present())

    def redraw(self) -> None:
        """Draw everything, after the axis has changed."""
        self.framed = ()
        self.draw({**self.history(), **self.present()})

    def history(self) -> Changes:
        """Return what the past looks like."""
        shown = [row for row in thin(self.rows, self.cost) if len(row.recipe)]
        return history_changes(tradeoff(shown, self.cost) if shown else None)

    def present(self) -> Changes:
        """Return what the live points and the star look like."""
        anchor = self.anchor()
        return dense_changes(anchor, self.cost) | (live_changes(self.live, anchor, self.cost) if self.live else {})

    def anchor(self) -> Measurement | None:
        """Return the point that knows the dense model best: the one with the most items."""
        known = [*self.rows[-1:], *([self.live.point] if self.live and self.live.point else [])]
        return max(known, key=lambda point: point.items, default=None)

    def draw(self, changes: Changes) -> None:
        """Send what has changed, in one message."""
        fresh = {index: values for index, values in changes.items() if self.changes.get(index) != values}
        self.changes |= fresh
        frame = self.frame()
        if not fresh and not frame:
            return
        with self.figure.batch_update():
            for index, values in fresh.items():
                self.figure.data[index].update(values)
            for axis, values in frame.items():
                self.figure.layout[axis].update(values)

    def frame(self) -> dict[str, dict[str, Any]]:
        """Return changes of the axes, empty if they stay as they are: a zoom by hand survives until the view must grow."""
        if not {DENSE, PREDICTED, MEASURED} <= set(self.changes):
            return {}
        metric = self.metric()
        wanted = window(self.changes, metric, self.cost)
        state = (metric, self.cost, tuple(map(tuple, wanted.values())))
        if state == self.framed or not wanted:
            return {}
        made = axes(metric, self.cost) if self.framed[:2] != state[:2] else {"xaxis": {}, "yaxis": {}}
        self.framed = state
        return {axis: {**made[axis], "range": wanted[axis]} for axis in wanted}

    def metric(self) -> str:
        """Return the metric on the axis."""
        anchor = self.anchor()
        return anchor.primary.metric if anchor else ""
