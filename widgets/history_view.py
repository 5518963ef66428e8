"""Every point of the ledger on this model: a list to go back to by keyboard, and a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as ipw

from widgets.tables import table
from workbench.card import quality_words
from workbench.measure.measurement import Measurement
from workbench.words import size

MOST = 100


class HistoryView(ipw.VBox):
    """The newest points first; picking one calls `on_pick` with its key."""

    def __init__(self, on_pick: Callable[[str], None]) -> None:
        """Start empty."""
        self.on_pick = on_pick
        self.list = ipw.Dropdown(options=[("pick a point: the sliders go there", "")], description="go to", tooltip="Put the sliders where they were for an earlier point")
        self.list.observe(self.picked, "value")
        self.list.add_class("wb-goto")
        self.table = ipw.HTML()
        self.table.add_class("wb-table")
        super().__init__([self.list, self.table])

    def picked(self, change: dict[str, Any]) -> None:
        """Name the point that was picked, and be ready to pick it again."""
        if change["new"]:
            self.on_pick(change["new"])
            self.list.value = ""

    def show(self, rows: Sequence[Measurement]) -> None:
        """Show the newest points."""
        newest = list(reversed(rows))[:MOST]
        self.list.options = [("pick a point: the sliders go there", ""), *((f"{row.recipe.label()} | {quality_words(row.primary)} | {size(row.sizes.file_bytes)}", row.key) for row in newest)]
        more = f"<p class='wb-dim'>The newest {MOST} of {len(rows):,}; all are in the ledger.</p>" if len(rows) > MOST else ""
        self.table.value = more + table([row_of(row) for row in newest]) if newest else "<p class='wb-dim'>Nothing measured yet.</p>"


def row_of(row: Measurement) -> dict[str, str]:
    """Return a point as a row of the table."""
    return {
        "recipe": row.recipe.label(),
        "quality": quality_words(row.primary),
        "file": size(row.sizes.file_bytes),
        "smaller": f"{row.shrink:.2f}\N{MULTIPLICATION SIGN}",
        "speed": "" if row.latency is None else f"{row.latency.speedup.value:.2f} ({row.latency.speedup.low:.2f} to {row.latency.speedup.high:.2f})",
        "when": row.provenance.time.replace("T", " ").removesuffix("+00:00"),
    }
