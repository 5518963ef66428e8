"""A search for the smallest file within a loss, behind the panel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from widgets.session.session import Session
from widgets.session.state import PanelState
from widgets.session.worker import Stale
from workbench.errors import ModelError
from workbench.search.local_search import Trial, descend


@dataclass(frozen=True)
class Ended:
    """The end of a search: its last trial, None if there was nothing to try."""

    last: Trial | None


def search(session: Session, drop: float, trials: int, on_news: Callable[[Trial | Ended], None]) -> None:
    """Start to search; every point goes to the ledger and shows as it comes.

    Args:
        session: whose model is searched on, and whose worker does it.
        drop: the loss, as for `workbench.search.local_search`.
        trials: at most so many recipes.
        on_news: gets each measured recipe, then the end; nothing after a cancel or a newer job.

    Raises:
        ModelError: no model is loaded.
    """
    bench = session.bench
    if bench is None:
        raise ModelError("no model is loaded yet")

    def make(stale: Stale) -> Iterator[Trial | Ended]:
        last = None
        for last in descend(bench, drop, trials=trials, cancelled=stale):
            yield last
        yield Ended(last)

    def take(news: Trial | Ended) -> None:
        if isinstance(news, Trial):
            point = news.point
            past, model = session.state.past, session.state.model
            session.state = PanelState(point.recipe, point=point, phase="measured", past=past, model=model)
            session.tell_points()
        on_news(news)

    with session.measurer.changed:
        session.preparer.cancel()
        session.submit(make, take)
