"""Two to six points side by side, chosen by brush on the plot or by keyboard in a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import ipywidgets as ipw

from widgets.figures.compare_html import comparison_html, paired_html
from widgets.panes.history_view import MOST, arranged, line_of
from widgets.session.state import PanelState, Past
from workbench.errors import RecipeError
from workbench.measure.measurement import Measurement
from workbench.metrics.quality import Quality
from workbench.search.compare import comparison

HINT = (
    "Choose two or more points: <b>brush</b> above the plot and drag a box around them, or pick them in the"
    " list (Ctrl or Shift with click or arrows)."
)


class CompareView(ipw.VBox):
    """A list in which several points can be picked, and a table of what differs.

    `chosen` are the keys, in the list's order.
    """

    def __init__(self, on_test: Callable[[tuple[str, ...]], None]) -> None:
        """Start empty.

        `on_test` gets the keys of the points to be tested as pairs, and later calls `show_test`.
        """
        self.past = Past()
        self.by_key: dict[str, Measurement] = {}
        self.quiet = False
        self.awaited: tuple[str, ...] = ()  # what the running test, or the one that is shown, is of
        self.list = ipw.SelectMultiple(
            options=[],
            description="points",
            rows=5,
            tooltip="Points to compare: pinned first, then the newest",
        )
        self.button = ipw.Button(
            description="paired test",
            disabled=True,
            tooltip="Evaluate the chosen points again, and compare answers item by item with the first's",
        )
        self.clear = ipw.Button(description="clear", tooltip="Choose nothing")
        self.body, self.test = ipw.HTML(f"<p class='wb-dim'>{HINT}</p>"), ipw.HTML()
        buttons = ipw.VBox([self.button, self.clear])
        bar = ipw.HBox([self.list, buttons])
        super().__init__([bar, self.test, self.body])
        named = {
            "wb-points": self.list,
            "wb-table": self.body,
            "wb-tools": bar,
            "wb-testbuttons": buttons,
            "wb-test": self.test,
        }
        for name, widget in named.items():
            widget.add_class(name)
        self.list.observe(lambda _: self.redraw(), "value")
        self.button.on_click(lambda _: on_test(self.chosen))
        self.clear.on_click(lambda _: self.choose(()))

    @property
    def chosen(self) -> tuple[str, ...]:
        """Return the keys of the chosen points."""
        return tuple(self.list.value)

    def show(self, state: PanelState) -> None:
        """Offer the points of the past, where it is another one; what is chosen stays chosen."""
        if state.past is not self.past:
            self.past = state.past
            self.by_key = {row.key: row for row in state.past.rows}
            self.choose(self.chosen)

    def choose(self, keys: Sequence[str]) -> None:
        """List the points, with `keys` chosen, whether or not they are among the first."""
        rows = arranged(self.past)
        wanted = set(keys)
        listed = [row for index, row in enumerate(rows) if index < MOST or row.key in wanted]
        options = tuple((line_of(row, self.past), row.key) for row in listed)
        before, self.quiet = self.chosen, True
        try:
            if options != self.list.options:
                self.list.options = options
            self.list.value = tuple(row.key for row in listed if row.key in wanted)
        finally:
            self.quiet = False
        self.redraw(keep_test=self.chosen == before)

    def redraw(self, *, keep_test: bool = False) -> None:
        """Draw the table of what is chosen, or say why there is none."""
        if self.quiet:
            return
        if not keep_test:
            self.test.value, self.awaited = "", ()
        points = [self.by_key[key] for key in self.chosen if key in self.by_key]
        html, comparable = f"<p class='wb-dim'>{HINT}</p>", False
        if len(points) > 1:
            try:
                html, comparable = comparison_html(comparison(points), self.past.said), True
            except RecipeError as error:
                html = f"<p role='status'>{escape(str(error))}</p>"
        self.body.value, self.button.disabled = html, not comparable

    def wait(self, keys: tuple[str, ...]) -> None:
        """Say that a paired test of these points is running."""
        self.awaited = keys
        self.test.value = "<p class='wb-dim' role='status'>testing item by item ...</p>"

    def show_test(self, keys: tuple[str, ...], qualities: Sequence[Quality]) -> None:
        """Show a paired test, unless other points have been chosen meanwhile.

        The list itself cannot be asked: it is empty for a moment whenever it is filled anew.
        """
        if keys == self.awaited:
            self.test.value = paired_html(qualities)

    def give_up(self, keys: tuple[str, ...]) -> None:
        """Say that this test ended without an answer, unless other points have been chosen meanwhile."""
        if keys == self.awaited:
            message = "the paired test was stopped: ask again when nothing else is measured"
            self.test.value = f"<p class='wb-dim' role='status'>{message}</p>"
