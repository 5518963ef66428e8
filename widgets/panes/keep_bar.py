"""Pin, note, save report: a quiet bar about the point that is shown, and how the report goes."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import ipywidgets as ipw

from widgets.session.report_run import ReportState
from widgets.session.state import PanelState
from workbench.ledger.ledger import LONGEST_NOTE
from workbench.recipe import Recipe

WAIT = "measure the point to its end first"


class KeepBar(ipw.HBox):
    """Buttons for the current point. They are off, with the reason, until it is measured completely."""

    def __init__(
        self, on_annotate: Callable[[str, str | None, bool | None], None], on_report: Callable[[], None]
    ) -> None:
        """Start with nothing to keep.

        Args:
            on_annotate: gets the point's key and a new note, or whether it is pinned; what has not changed is
                None.
            on_report: called when a report is to be made, or the running one stopped.
        """
        self.on_annotate = on_annotate
        self.key = ""
        self.quiet = self.running = False
        self.pin = ipw.ToggleButton(description="pin")
        self.note = ipw.Text(
            description="note",
            continuous_update=False,
            tooltip=f"A note on this point, at most {LONGEST_NOTE} characters; Enter keeps it",
        )
        self.report = ipw.Button(description="save report")
        self.folder = ipw.Text(
            "reports", description="in", tooltip="Folder of reports, relative to the notebook"
        )
        super().__init__([self.pin, self.note, self.report, self.folder])
        for name, widget in {
            "wb-keep": self,
            "wb-pin": self.pin,
            "wb-note-text": self.note,
            "wb-report": self.report,
            "wb-folder": self.folder,
        }.items():
            widget.add_class(name)
        self.pin.observe(lambda change: self.say(pinned=change["new"]), "value")
        self.note.observe(lambda change: self.say(note=change["new"]), "value")
        self.report.on_click(lambda _: on_report())
        self.show(PanelState(Recipe()))

    def say(self, *, note: str | None = None, pinned: bool | None = None) -> None:
        """Hand on what the user did."""
        if not self.quiet and self.key:
            self.on_annotate(self.key, note, pinned)

    def show(self, state: PanelState) -> None:
        """Show what is said about the present point; one that is not complete cannot be kept yet."""
        point, said = state.point, state.past.about(state.point)
        complete = point is not None and point.complete
        self.key = point.key if point is not None and complete else ""
        self.quiet = True
        try:
            self.pin.value, self.note.value = (said.pinned, said.note) if complete else (False, "")
        finally:
            self.quiet = False
        self.pin.disabled = self.note.disabled = not complete
        self.pin.description = "pinned" if self.pin.value else "pin"
        self.pin.tooltip = "Mark this point on the plot and put it first in lists" if complete else WAIT
        self.note.placeholder = "note on this point" if complete else WAIT
        self.show_running(running=self.running)

    def show_running(self, *, running: bool) -> None:
        """Show whether a report is being made: one at a time."""
        self.running = running
        self.report.description = "stop report" if running else "save report"
        self.report.disabled = not running and not self.key
        start = "Run the report notebook on this recipe, beside the panel: some minutes" if self.key else WAIT
        self.report.tooltip = "Stop making the report" if running else start


class ReportLine(ipw.VBox):
    """How the report goes, and a link to its page; hidden until there is one."""

    def __init__(self) -> None:
        """Start hidden."""
        self.words, self.link = ipw.HTML(), ipw.Output()
        super().__init__([self.words, self.link], layout=ipw.Layout(display="none"))
        self.add_class("wb-reportline")

    def show(self, state: ReportState) -> None:
        """Show where a report stands."""
        self.layout.display = None
        self.words.value = state_html(state)
        self.link.outputs = link_outputs(state.page) if state.state == "done" else ()


def state_html(state: ReportState) -> str:
    """Return a report's state as HTML."""
    name = html.escape(str(state.page))
    if state.state == "running":
        share = 100 * state.done / state.total if state.total else 0
        text = f"cell {state.done} of {state.total}" if state.total else "starting"
        told = f"<span>report: {text}; the panel stays usable</span>"
        return f"<div class='wb-reporting' role='status'><i style='width:{share:.0f}%'></i>{told}</div>"
    if state.state == "done":
        return f"<span role='status'>The report is written: <code>{name}</code></span>"
    if state.state == "stopped":
        text = "The report was stopped; what it had measured is in the ledger."
        return f"<span class='wb-dim' role='status'>{text}</span>"
    return f"<span class='wb-failure' role='alert'>No report: {html.escape(state.message)}</span>"


def link_outputs(page: Path) -> tuple[dict[str, Any], ...]:
    """Return a link that JupyterLab resolves from the notebook's folder; none to a page outside it."""
    inside: Path | None = page
    if page.is_absolute():
        inside = page.relative_to(Path.cwd()) if page.is_relative_to(Path.cwd()) else None
    if inside is None or ".." in inside.parts:
        return ()
    text = (
        f"<a href='{html.escape(quote(inside.as_posix()))}' target='_blank'>open the report</a>"
        " <span style='opacity: 0.7'>(in JupyterLab press <i>Trust HTML</i> there to see its plots)</span>"
    )
    data = {"text/html": text, "text/plain": str(inside)}
    return ({"output_type": "display_data", "data": data, "metadata": {}},)
