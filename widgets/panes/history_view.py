"""Every point of the ledger on this model: a list to go back to by keyboard, a table, and a way to a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import ipywidgets as ipw

from widgets.figures.tables import table
from widgets.session.state import PanelState, Past
from workbench.measure.card import quality_words, touched_share
from workbench.measure.measurement import Measurement
from workbench.util.text import size

MOST = 100
PIN = "\N{BLACK DIAMOND}"
ORDERS = ("newest", "smallest", "best quality", "fastest")


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
        self.past: Past | None = None
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
            tooltip="A .csv file (a table) or a .jsonl file (everything); relative to the notebook",
        )
        self.wrote, self.table = ipw.HTML(), ipw.HTML()
        bar = ipw.HBox([self.list, self.order, self.pinned])
        files = ipw.HBox([self.button, self.path, self.wrote])
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
        sentence = f"{len(rows):,} points are in <code>{escape(place)}</code>"
        self.wrote.value = f"<span class='wb-dim'>{sentence}</span>" if place else ""

    def show(self, state: PanelState) -> None:
        """Show the past, where it is another one than before."""
        if state.past is not self.past:
            self.past = state.past
            self.draw()

    def chosen(self) -> list[Measurement]:
        """Return every point that the filter leaves, in the chosen order."""
        past = self.past or Past()
        rows = arranged(past, self.order.value)
        return [row for row in rows if past.about(row).pinned] if self.pinned.value else rows

    def draw(self) -> None:
        """Draw the list and the table."""
        past, rows = self.past or Past(), self.chosen()
        shown = rows[:MOST]
        lines = [(line_of(row, past), row.key) for row in shown]
        self.list.options = [("pick a point: the sliders go there", ""), *lines]
        if not shown:
            nothing = "No point is pinned." if past.rows else "Nothing measured yet."
            self.table.value = f"<p class='wb-dim'>{nothing}</p>"
            return
        more = f"<p class='wb-dim'>The first {MOST} of {len(rows):,}; all are in the ledger.</p>"
        html = table([row_of(row, past) for row in shown])
        self.table.value = (more if len(rows) > MOST else "") + html


def arranged(past: Past, order: str = "newest") -> list[Measurement]:
    """Return points with the pinned ones first; within both groups by `order`, then the newest first."""
    newest = list(reversed(past.rows))
    if order == "smallest":
        newest.sort(key=lambda row: row.sizes.file_bytes)
    elif order == "best quality":
        newest.sort(key=lambda row: row.primary.drop.value)
    elif order == "fastest":
        newest.sort(key=lambda row: -row.latency.speedup.value if row.latency else 0.0)
    return sorted(newest, key=lambda row: not past.about(row).pinned)


def line_of(row: Measurement, past: Past) -> str:
    """Return a point as one line of a list."""
    mark = past.about(row)
    texts = [
        f"{PIN} {row.recipe.label()}" if mark.pinned else row.recipe.label(),
        quality_words(row.primary),
        size(row.sizes.file_bytes),
    ]
    return " | ".join([*texts, " ".join(mark.note.split())[:60]] if mark.note else texts)


def row_of(row: Measurement, past: Past) -> dict[str, str]:
    """Return a point as a row of the table."""
    mark, speed = past.about(row), None if row.latency is None else row.latency.speedup
    return {
        "pin": PIN if mark.pinned else "",
        "recipe": row.recipe.label(),
        "quality": quality_words(row.primary),
        "file": size(row.sizes.file_bytes),
        "smaller": f"{row.shrink:.2f}\N{MULTIPLICATION SIGN}",
        "touched": touched_share(row),
        "speed": "" if speed is None else f"{speed.value:.2f} ({speed.low:.2f} to {speed.high:.2f})",
        "note": mark.note,
        "when": row.provenance.time[:16].replace("T", " "),
    }
