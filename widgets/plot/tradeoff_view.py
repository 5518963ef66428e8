"""The trade-off plot as a widget: the past, the live point, and a click or a box that names points."""

from __future__ import annotations

import threading
from collections.abc import Callable
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
from widgets.plot.thinning import thin
from widgets.session.state import PanelState
from workbench.ledger.pareto import tradeoff
from workbench.measure.measurement import Measurement
from workbench.recipe import Recipe


class TradeoffView(ipw.VBox):
    """Quality against cost, coloured by a third number. What is shown is `bar.choice`.

    The past and the present have separate traces; during a drag only the two live points are sent. States
    arrive from the thread that draws, choices from the browser's: one is drawn at a time.
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
        self.state = PanelState(Recipe())
        self.pinned: tuple[str, ...] = ()  # keys of points with a ring
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
        """Return the choice of axes and colour."""
        choice: PlotChoice = self.bar.choice
        return choice

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

    def show(self, state: PanelState) -> None:
        """Draw the present, and the past where it is another one."""
        with self.drawing:
            past, self.state = self.state.past, state
            if state.past is past:
                self.draw(self.present())
                return
            self.pinned = tuple(key for key, said in state.past.said.items() if said.pinned)
            self.unmark()
            self.offer()
            self.draw({**self.history(), **self.present()})

    def redraw(self) -> None:
        """Draw everything, after the axes have changed."""
        with self.drawing:
            self.framed = ()
            self.offer()
            self.draw({**self.history(), **self.present()})

    def offer(self) -> None:
        """Offer the metrics that the present model is measured by."""
        anchor = self.state.anchor
        self.bar.offer([quality.metric for quality in anchor.quality] if anchor else [])

    def history(self) -> Changes:
        """Return the changes of the past's traces, and say how much of it is shown."""
        choice, metric = self.choice, self.choice.metric or None
        rows = [row for row in self.state.past.rows if len(row.recipe)]
        shown = thin(rows, choice.cost, metric=metric, keep=self.pinned)
        record = None
        if shown:
            record = tradeoff(shown, choice.cost, metric=metric, change=choice.change, shade=choice.shade)
        self.bar.show(record, len(rows))
        return history_changes(record, self.pinned)

    def present(self) -> Changes:
        """Return the changes of the live points and the star."""
        return dense_changes(self.dense(), self.choice) | live_changes(self.state, self.choice)

    def dense(self) -> Measurement | None:
        """Return the point that the star is drawn from; memory is known only where it could be measured."""
        anchor = self.state.anchor
        if self.choice.cost != "peak_memory_bytes":
            return anchor
        newest = reversed(self.state.past.rows)
        return next((row for row in newest if row.dense_peak_memory_bytes is not None), anchor)

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
        framed = (metric, choice, tuple(map(tuple, wanted.values())))
        if framed == self.framed or not wanted:
            return {}
        changes = axes(metric, choice) if self.framed[:2] != framed[:2] else {"xaxis": {}, "yaxis": {}}
        self.framed = framed
        return {axis: {**changes[axis], "range": wanted[axis]} for axis in wanted}

    def metric(self) -> str:
        """Return the metric on the axis."""
        anchor = self.state.anchor
        return self.choice.metric or (anchor.primary.metric if anchor else "")
