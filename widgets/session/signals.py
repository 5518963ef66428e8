"""News that any number of panes may listen to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, ParamSpec

P = ParamSpec("P")


class Signal(Generic[P]):
    """One kind of news; whoever subscribes is told, in the order of subscription.

    A subscriber that raises does not keep the news from the others.
    """

    def __init__(self, on_error: Callable[[BaseException], Any]) -> None:
        """Start without subscribers; `on_error` gets what one of them raises."""
        self.on_error = on_error
        # Replaced and never changed in place: news come from other threads than subscriptions
        self.subscribers: tuple[tuple[object, Callable[P, Any]], ...] = ()

    def subscribe(self, tell: Callable[P, Any]) -> Callable[[], None]:
        """Call `tell` with all news from now on; what is returned ends that, and may be called twice."""
        ticket = object()
        self.subscribers = (*self.subscribers, (ticket, tell))

        def unsubscribe() -> None:
            self.subscribers = tuple(
                subscriber for subscriber in self.subscribers if subscriber[0] is not ticket
            )

        return unsubscribe

    def emit(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Tell everybody."""
        for _, tell in self.subscribers:
            try:
                tell(*args, **kwargs)
            except Exception as error:  # noqa: BLE001  it is shown in the panel, and the others are told too
                self.on_error(error)
