"""The trade-off plot as a widget: the past, the live point, and a click or a box that names points."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import ipywidgets as ipw

from widgets.plot.kept_figure import kept_figure
from widgets.plot.live_axes import axes
from widgets.plot.live_figure import (
    DENSE,
    HISTORY,
    MEASURED,
    PREDICTED,
    Changes,
    dense_changes,
    history_changes,
    live_changes,
    live_figure,
    window,
)
from widgets.plot.plot_bar import PlotBar
from widgets.plot.plot_choice import PlotChoice
from widgets.plot.plotly_internals import send_unmarked, set_config
from widgets.session.state import Live, thin
from workbench.ledger.pareto import Tradeoff, tradeoff
from workbench.measure.measurement import Measurement


class TradeoffView(ipw.VBox):
    """Quality against cost, coloured by a third number. What is shown is `bar.choice`.

    `show_history`, `show_pinned` and `show_live` write into separate traces; during a drag only the two live
    ones are sent. Points arrive from the thread that draws, choices from the browser's: one is drawn at a
    time.
    """

    def __init__(
        self, on_pick: Callable[[str], None], on_select: Callable[[list[str]], None] = lambda _keys: None
    ) -> None:
        """Make the plot.

        Args:
            on_pick: gets the ledger key of a point that was clicked.
            on_select: gets the ledger keys of the points in a box that was drawn.

        """
        self.on_pick, self.on_select = on_pick, on_select
        self.rows: Sequence[Measurement] = ()
        self.pinned: Collection[str] = ()
        self.live: Live | None = None
        self.changes: Changes = {}
        self.framed: tuple[Any, ...] = ()
        self.marked: dict[int, list[str]] = {}
        self.boxed = False
        self.drawing = threading.RLock()
        self.figure = kept_figure(live_figure())
        set_config(self.figure, responsive=True)
        for index in HISTORY:
            self.figure.data[index].on_click(self.clicked)
            self.figure.data[index].on_selection(self.selected)
        self.bar = PlotBar()
        super().__init__([self.bar, self.figure])
        self.add_class("wb-plot")
        self.bar.observe(lambda _: self.redraw(), "choice")
        self.bar.observe(lambda _: self.drag(), "selecting")

    @property
    def choice(self) -> PlotChoice:
        """Return what stands on the axes."""
        chosen: PlotChoice = self.bar.choice
        return chosen

    def clicked(self, trace: Any, points: Any, _state: Any) -> None:
        """Name the point that was clicked."""
        if points.point_inds:
            self.on_pick(str(trace.customdata[points.point_inds[0]]))

    def selected(self, trace: Any, points: Any, _selector: Any) -> None:
        """Name the points of a box; each trace reports its own, the last one ends the round."""
        index, self.boxed = next(i for i in HISTORY if self.figure.data[i] is trace), True
        self.marked[index] = [str(trace.customdata[i]) for i in points.point_inds]
        if index == max(HISTORY):
            self.on_select([key for place in HISTORY for key in self.marked.get(place, [])])
            self.marked = {}

    def drag(self) -> None:
        """Let a drag mark points or zoom; boxes go when it zooms again."""
        with self.drawing:
            self.figure.update_layout(dragmode="select" if self.bar.selecting else "zoom")
            if not self.bar.selecting:
                self.unmark()

    def unmark(self) -> None:
        """Take a box off the plot.

        Python never hears of it, so that setting what Python believes to be there would send nothing.
        """
        if self.boxed:
            self.boxed = False
            send_unmarked(self.figure)

    def show_history(self, rows: Sequence[Measurement]) -> None:
        """Draw the past anew."""
        with self.drawing:
            self.rows = rows
            self.unmark()
            anchor = self.anchor()
            self.bar.offer([quality.metric for quality in anchor.quality] if anchor else [])
            self.draw(self.history())

    def show_pinned(self, keys: Collection[str]) -> None:
        """Draw rings around the points with these keys; they are drawn however many points there are."""
        with self.drawing:
            self.pinned = tuple(keys)
            self.draw(self.history())

    def show_live(self, live: Live) -> None:
        """Draw the present: only the two live points (and the star) are sent."""
        with self.drawing:
            self.live = live
            self.draw(self.present())

    def redraw(self) -> None:
        """Draw everything, after the axes have changed."""
        with self.drawing:
            self.framed = ()
            anchor = self.anchor()
            self.bar.offer([quality.metric for quality in anchor.quality] if anchor else [])
            self.draw({**self.history(), **self.present()})

    def record(self) -> Tradeoff | None:
        """Return the record of what is drawn of the past, None without a point that has this cost."""
        choice, metric = self.choice, self.choice.metric or None
        known = [row for row in self.rows if len(row.recipe)]
        shown = thin(known, choice.cost, metric=metric, keep=self.pinned)
        return (
            tradeoff(shown, choice.cost, metric=metric, change=choice.change, shade=choice.shade)
            if shown
            else None
        )

    def history(self) -> Changes:
        """Return what the past looks like, and say how much of it is shown."""
        record = self.record()
        self.bar.show(record, sum(1 for row in self.rows if len(row.recipe)))
        return history_changes(record, self.pinned)

    def present(self) -> Changes:
        """Return what the live points and the star look like."""
        anchor = self.anchor()
        return dense_changes(self.dense(), self.choice) | (
            live_changes(self.live, anchor, self.choice) if self.live else {}
        )

    def anchor(self) -> Measurement | None:
        """Return the point that knows the dense model best: the one with the most items."""
        known = [*self.rows[-1:], *([self.live.point] if self.live and self.live.point else [])]
        return max(known, key=lambda point: point.items, default=None)

    def dense(self) -> Measurement | None:
        """Return the point that the star is drawn from; memory is known only where it could be measured."""
        if self.choice.cost != "peak_memory_bytes":
            return self.anchor()
        return next(
            (row for row in reversed(self.rows) if row.dense_peak_memory_bytes is not None), self.anchor()
        )

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
        """Return changes of the axes, empty if they stay as they are: a zoom by hand survives until the view
        must grow.
        """
        if not {DENSE, PREDICTED, MEASURED} <= set(self.changes):
            return {}
        metric, choice = self.metric(), self.choice
        wanted = window(self.changes, metric, choice)
        state = (metric, choice, tuple(map(tuple, wanted.values())))
        if state == self.framed or not wanted:
            return {}
        made = axes(metric, choice) if self.framed[:2] != state[:2] else {"xaxis": {}, "yaxis": {}}
        self.framed = state
        return {axis: {**made[axis], "range": wanted[axis]} for axis in wanted}

    def metric(self) -> str:
        """Return the metric on the axis."""
        anchor = self.anchor()
        return self.choice.metric or (anchor.primary.metric if anchor else "")
