"""Every point of the ledger on this model: a list to go back to by keyboard, a table, and a way to a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets as ipw

from widgets.figures.tables import table
from workbench.ledger.annotation import Annotation
from workbench.measure.card import quality_words
from workbench.measure.measurement import Measurement
from workbench.util.text import size

MOST = 100
PIN = "\N{BLACK DIAMOND}"
ORDERS = ("newest", "smallest", "best quality", "fastest")
NO_NOTES: Mapping[str, Annotation] = {}


class HistoryView(ipw.VBox):
    """Pinned points first, then the newest, or in another order; picking one calls `on_pick` with its key."""

    def __init__(
        self, on_pick: Callable[[str], None], on_export: Callable[[Sequence[Measurement], str], str]
    ) -> None:
        """Start empty.

        Args:
            on_pick: gets the key of a point that was picked.
            on_export: gets the points to write and the path that the user gave; returns where they are, "" if
                it failed.
        """
        self.on_pick, self.on_export = on_pick, on_export
        self.rows: Sequence[Measurement] = ()
        self.said: Mapping[str, Annotation] = NO_NOTES
        self.list = ipw.Dropdown(
            options=[("pick a point: the sliders go there", "")],
            description="go to",
            tooltip="Put the sliders where they were for an earlier point",
        )
        self.order = ipw.Dropdown(
            options=ORDERS, description="sort", tooltip="Which points come first, after the pinned ones"
        )
        self.pinned = ipw.Checkbox(description="pinned only", indent=False)
        self.button = ipw.Button(
            description="export table",
            tooltip="Write these points with every number to a file; one that is there is never replaced",
        )
        self.path = ipw.Text(
            "points.csv",
            description="to",
            tooltip=(
                "A .csv file (a table) or a .jsonl file (everything, a point a line); relative to the"
                " notebook"
            ),
        )
        self.wrote, self.table = ipw.HTML(), ipw.HTML()
        bar, files = (
            ipw.HBox([self.list, self.order, self.pinned]),
            ipw.HBox([self.button, self.path, self.wrote]),
        )
        super().__init__([bar, files, self.table])
        named = {
            "wb-goto": self.list,
            "wb-order": self.order,
            "wb-only": self.pinned,
            "wb-table": self.table,
            "wb-tools": bar,
            "wb-files": files,
            "wb-path": self.path,
        }
        for name, widget in named.items():
            widget.add_class(name)
        self.list.observe(self.picked, "value")
        self.order.observe(lambda _: self.draw(), "value")
        self.pinned.observe(lambda _: self.draw(), "value")
        self.button.on_click(lambda _: self.export())

    def picked(self, change: dict[str, Any]) -> None:
        """Name the point that was picked, and be ready to pick it again."""
        if change["new"]:
            self.on_pick(change["new"])
            self.list.value = ""

    def export(self) -> None:
        """Write the points that the filter leaves, and say where they are."""
        rows = self.chosen()
        place = self.on_export(rows, self.path.value.strip())
        self.wrote.value = (
            f"<span class='wb-dim'>{len(rows):,} points are in <code>{escape(place)}</code></span>"
            if place
            else ""
        )

    def show(self, rows: Sequence[Measurement], said: Mapping[str, Annotation] = NO_NOTES) -> None:
        """Show points, oldest first as given, with what is said about them."""
        self.rows, self.said = rows, said
        self.draw()

    def chosen(self) -> list[Measurement]:
        """Return every point that the filter leaves, in the chosen order."""
        rows = arranged(self.rows, self.said, self.order.value)
        return [row for row in rows if is_pinned(row, self.said)] if self.pinned.value else rows

    def draw(self) -> None:
        """Draw the list and the table."""
        rows = self.chosen()
        shown = rows[:MOST]
        self.list.options = [
            ("pick a point: the sliders go there", ""),
            *((line_of(row, self.said), row.key) for row in shown),
        ]
        more = (
            f"<p class='wb-dim'>The first {MOST} of {len(rows):,}; all are in the ledger.</p>"
            if len(rows) > MOST
            else ""
        )
        nothing = "No point is pinned." if self.rows else "Nothing measured yet."
        self.table.value = (
            more + table([row_of(row, self.said) for row in shown])
            if shown
            else f"<p class='wb-dim'>{nothing}</p>"
        )


def is_pinned(row: Measurement, said: Mapping[str, Annotation]) -> bool:
    """Return whether a point is pinned."""
    return row.key in said and said[row.key].pinned


def arranged(
    rows: Sequence[Measurement], said: Mapping[str, Annotation], order: str = "newest"
) -> list[Measurement]:
    """Return points with the pinned ones first.

    Within both groups by `order`, the newest first where that is equal.
    """
    newest = list(reversed(rows))
    if order == "smallest":
        newest.sort(key=lambda row: row.sizes.file_bytes)
    elif order == "best quality":
        newest.sort(key=lambda row: row.primary.drop.value)
    elif order == "fastest":
        newest.sort(key=lambda row: -row.latency.speedup.value if row.latency else 0.0)
    return sorted(newest, key=lambda row: not is_pinned(row, said))


def line_of(row: Measurement, said: Mapping[str, Annotation]) -> str:
    """Return a point as one line of a list."""
    mark = said.get(row.key, Annotation())
    words = [
        f"{PIN} {row.recipe.label()}" if mark.pinned else row.recipe.label(),
        quality_words(row.primary),
        size(row.sizes.file_bytes),
    ]
    return " | ".join([*words, " ".join(mark.note.split())[:60]] if mark.note else words)


def row_of(row: Measurement, said: Mapping[str, Annotation] = NO_NOTES) -> dict[str, str]:
    """Return a point as a row of the table."""
    mark = said.get(row.key, Annotation())
    return {
        "pin": PIN if mark.pinned else "",
        "recipe": row.recipe.label(),
        "quality": quality_words(row.primary),
        "file": size(row.sizes.file_bytes),
        "smaller": f"{row.shrink:.2f}\N{MULTIPLICATION SIGN}",
        "speed": (
            ""
            if row.latency is None
            else (
                f"{row.latency.speedup.value:.2f} ({row.latency.speedup.low:.2f} to"
                f" {row.latency.speedup.high:.2f})"
            )
        ),
        "note": mark.note,
        "when": row.provenance.time[:16].replace("T", " "),
    }
