"""What is kept of the points: pins, notes, exported tables, comparisons and reports.

Joins their views to the session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from widgets.panes.compare_view import CompareView
from widgets.panes.history_view import HistoryView
from widgets.panes.keep_bar import KeepBar, ReportLine
from widgets.session.report_run import ReportRun, ReportState, free_name, report_command
from widgets.session.session import Session
from widgets.session.state import Live
from widgets.session.worker import Stale
from workbench.errors import ModelError, RecipeError
from workbench.ledger.annotation import Annotation
from workbench.ledger.ledger import Ledger
from workbench.ledger.table import save_points
from workbench.measure.measurement import Measurement
from workbench.search.compare import paired_test

Guarded = Callable[[Callable[[], None]], None]


class Keeping:
    """Owns the bar, the report's line, the history and the comparison.

    `changed` asks the panel to draw the past anew.
    """

    def __init__(
        self,
        session: Session,
        *,
        go_to: Callable[[str], None],
        guarded: Guarded,
        post: Callable[[str, Callable[[], None]], None],
        changed: Callable[[], None],
    ) -> None:
        """Make the views.

        Args:
            session: whose points are kept.
            go_to: puts the sliders on a point, by key.
            guarded: runs an action and shows what it raises.
            post: draws later, as `Pacer.post`.
            changed: called when the past must be drawn anew.

        """
        self.session, self.guarded, self.post, self.changed = session, guarded, post, changed
        self.ledger: Ledger | None = None  # of the point that is shown
        self.said: Mapping[str, Annotation] = {}
        self.bar = KeepBar(
            lambda key, note, pinned: guarded(lambda: self.annotate(key, note, pinned)),
            lambda: guarded(self.report),
        )
        self.line = ReportLine()
        self.history = HistoryView(go_to, self.export)
        self.compare = CompareView(lambda keys: guarded(lambda: self.test(keys)))
        self.run = ReportRun(self.reported)

    def draw_live(self, live: Live) -> None:
        """Draw what belongs to the point that is shown."""
        bench, point = self.session.bench, live.point
        self.ledger = None if bench is None else bench.ledger
        self.bar.show(point, self.said.get(point.key, Annotation()) if point else Annotation())

    def draw_history(self, rows: Sequence[Measurement]) -> Mapping[str, Annotation]:
        """Draw the past; return what is said about it."""
        bench = self.session.bench
        self.said = {} if bench is None else bench.ledger.annotations()
        self.history.show(rows, self.said)
        self.compare.show(rows, self.said)
        self.draw_live(self.session.live)
        return self.said

    def annotate(self, key: str, note: str | None, pinned: bool | None) -> None:
        """Write a note or a pin to the ledger that the point came from."""
        try:
            if self.ledger is not None:
                self.ledger.annotate(key, note=note, pinned=pinned)
        finally:
            self.changed()

    def export(self, rows: Sequence[Measurement], path: str) -> str:
        """Write points to a file; return where, "" if that failed (the reason is in the panel)."""
        places: list[Path] = []
        self.guarded(lambda: places.append(save_points(rows, path, self.said)))
        return str(places[0]) if places else ""

    def select(self, keys: Sequence[str]) -> None:
        """Choose points to compare, as a brush on the plot does."""
        self.guarded(lambda: self.compare.choose(keys))

    def test(self, keys: tuple[str, ...]) -> None:
        """Test the chosen points as pairs, behind the panel.

        Raises:
            ModelError: no model is loaded.
            RecipeError: a measurement is running, which this would cancel.

        """
        bench = self.session.bench
        if bench is None:
            raise ModelError("no model is loaded yet")
        if self.session.measurer.busy:
            raise RecipeError("the measurement is still running: ask again when it has ended")
        recipes = [row.recipe for key in keys if (row := bench.ledger.find(key)) is not None]

        def make(stale: Stale) -> Iterator[Any]:
            try:
                yield paired_test(bench, recipes[0], recipes[1:], cancelled=stale)
            except BaseException:  # what it is goes its way; the line must not say that it still runs
                self.post("test", lambda: self.compare.give_up(keys))
                raise

        self.compare.wait(keys)
        self.session.measurer.submit(
            make, lambda found: self.post("test", lambda: self.compare.show_test(keys, found))
        )

    def report(self) -> None:
        """Start a report of the point that is shown, or stop the running one.

        Raises:
            ModelError: nothing is measured yet, or the model has no name that another process could load.
            WorkbenchError: the folder cannot be written, or a method cannot be found by another process.

        """
        if self.run.running:
            self.run.stop()
            return
        bench, point, choice = self.session.bench, self.session.live.point, self.session.choice
        if bench is None or point is None or choice is None:
            raise ModelError("nothing is measured yet: a report needs a point")
        if not isinstance(choice.model, str):
            raise ModelError(
                f"a report runs in a process of its own and cannot be given the object {choice.name!r}: it"
                " needs a catalogue name, a directory or a hub id"
            )
        folder = Path(self.bar.folder.value.strip() or ".").expanduser()
        stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in choice.name).strip("-.")
        name = free_name(folder, f"{stem}-{point.key[:8]}")
        settings = {
            "data": choice.data,
            "device": bench.device.type,
            "evaluation_items": choice.evaluation_items,
            "ledger": place_of(bench.ledger),
            "offline": self.session.settings.get("offline"),
            "runtime": self.session.settings.get("runtime"),
            "placement": self.session.settings.get("placement"),
        }
        self.run.start(
            report_command(choice.model, point.recipe, settings, folder, name), folder / f"{name}.html"
        )

    def reported(self, state: ReportState) -> None:
        """Take over news of the report (called from its thread)."""
        self.post("report", lambda: self.draw_report(state))

    def draw_report(self, state: ReportState) -> None:
        """Draw how the report goes; at its end, what it has measured joins the past."""
        self.line.show(state)
        if state.state != "running":
            if self.session.bench is not None:
                self.session.bench.ledger.refresh()
            self.changed()
        self.bar.show_running(running=state.state == "running")

    def close(self) -> None:
        """Stop a running report."""
        self.run.close()


def place_of(ledger: Ledger) -> str:
    """Return where a ledger lies, so that another process finds it."""
    return ledger.where if "://" in ledger.where else str(Path(ledger.where).resolve())
