"""What is kept of the points: pins, notes, exported tables, comparisons and reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from widgets.panes.compare_view import CompareView
from widgets.panes.history_view import HistoryView
from widgets.panes.keep_bar import KeepBar, ReportLine
from widgets.session.report_run import ReportRun, ReportState, free_name, report_command
from widgets.session.session import Session
from widgets.session.state import PanelState
from widgets.session.worker import Stale
from workbench.bench import Bench
from workbench.errors import ModelError
from workbench.ledger.ledger import Ledger
from workbench.ledger.table import save_points
from workbench.measure.measurement import Measurement
from workbench.metrics.quality import Quality
from workbench.search.compare import paired_test
from workbench.util.text import file_name


class PointsController:
    """Owns the bar, the report's line, the history and the comparison, and joins them to the session."""

    def __init__(
        self,
        session: Session,
        *,
        go_to: Callable[[str], None],
        guarded: Callable[[Callable[[], None]], None],
        post: Callable[[str, Callable[[], None]], None],
    ) -> None:
        """Make the views.

        Args:
            session: whose points are kept.
            go_to: puts the sliders on a point, by key.
            guarded: runs an action and shows what it raises.
            post: draws later, as `Pacer.post`.

        """
        self.session, self.guarded, self.post = session, guarded, post
        self.ledger: Ledger | None = None  # of the point that is shown
        self.bar = KeepBar(
            lambda key, note, pinned: guarded(lambda: self.annotate(key, note, pinned)),
            lambda: guarded(self.report),
        )
        self.line = ReportLine()
        self.history = HistoryView(go_to, self.export)
        self.compare = CompareView(lambda keys: guarded(lambda: self.test(keys)))
        self.run = ReportRun(self.reported)

    def show(self, state: PanelState) -> None:
        """Show what is said about the present point."""
        self.ledger = None if self.session.bench is None else self.session.bench.ledger
        self.bar.show(state)

    def annotate(self, key: str, note: str | None, pinned: bool | None) -> None:
        """Write a note or a pin to the ledger that the point came from."""
        try:
            if self.ledger is not None:
                self.ledger.annotate(key, note=note, pinned=pinned)
        finally:
            self.session.tell_points()

    def export(self, rows: Sequence[Measurement], path: str) -> str:
        """Write points to a file; return where, "" if that failed (the reason is in the panel)."""
        places: list[Path] = []
        said = self.session.state.past.said
        self.guarded(lambda: places.append(save_points(rows, path, said)))
        return str(places[0]) if places else ""

    def select(self, keys: Sequence[str]) -> None:
        """Choose points to compare, as a brush on the plot does."""

        def act() -> None:
            self.compare.show(self.session.state)
            self.compare.choose(keys)

        self.guarded(act)

    def test(self, keys: tuple[str, ...]) -> None:
        """Test the chosen points as pairs, behind the panel; raises as `Session.ask`."""

        def work(bench: Bench, stale: Stale) -> Iterator[tuple[Quality, ...]]:
            recipes = [row.recipe for key in keys if (row := bench.ledger.find(key)) is not None]
            try:
                yield paired_test(bench, recipes[0], recipes[1:], cancelled=stale)
            except BaseException:  # what it is goes its way; the line must not say that it still runs
                self.post("test", lambda: self.compare.give_up(keys))
                raise

        def take(qualities: tuple[Quality, ...]) -> None:
            self.post("test", lambda: self.compare.show_test(keys, qualities))

        self.session.ask(work, take)
        self.compare.wait(keys)

    def report(self) -> None:
        """Start a report of the point that is shown, or stop the running one.

        Raises:
            ModelError: nothing is measured yet, or the model has no name that another process could load.
            WorkbenchError: the folder cannot be written, or a method cannot be found by another process.

        """
        if self.run.running:
            self.run.stop()
            return
        bench, point, choice = self.session.bench, self.session.state.point, self.session.choice
        if bench is None or point is None or choice is None:
            raise ModelError("nothing is measured yet: a report needs a point")
        if not isinstance(choice.model, str):
            raise ModelError(
                f"a report runs in a process of its own and cannot be given the object {choice.name!r}: it"
                " needs a catalogue name, a directory or a hub id"
            )
        folder = Path(self.bar.folder.value.strip() or ".").expanduser()
        stem = file_name(choice.name).strip("-.")
        name = free_name(folder, f"{stem}-{point.key[:8]}")
        settings = {
            "data": choice.data,
            "device": bench.device.type,
            "evaluation_items": choice.evaluation_items,
            "ledger": place_of(bench.ledger),
            **{option: self.session.settings.get(option) for option in ("offline", "runtime", "placement")},
        }
        command = report_command(choice.model, point.recipe, settings, folder, name)
        self.run.start(command, folder / f"{name}.html")

    def reported(self, state: ReportState) -> None:
        """Take over news of the report (called from its thread)."""
        self.post("report", lambda: self.draw_report(state))

    def draw_report(self, state: ReportState) -> None:
        """Draw how the report goes; at its end, what it has measured joins the past."""
        self.line.show(state)
        if state.state != "running":
            if self.session.bench is not None:
                self.session.bench.ledger.refresh()
            self.session.tell_points()
        self.bar.show_running(running=state.state == "running")

    def close(self) -> None:
        """Stop a running report."""
        self.run.close()


def place_of(ledger: Ledger) -> str:
    """Return where a ledger lies, so that another process finds it."""
    return ledger.where if "://" in ledger.where else str(Path(ledger.where).resolve())
