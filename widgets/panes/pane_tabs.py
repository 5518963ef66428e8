"""Tabs of panes of which one is looked at; the others draw nothing until they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import ipywidgets as ipw

from widgets.session.session import Session
from widgets.session.state import PanelState


class OwnPane(Protocol):
    """A pane from outside: a class of widgets with a `title` and a method `show(state)`.

    It is made from the panel's session, to whose signals it may subscribe. `show` is called with each new
    state while the pane is looked at, by the thread that draws.
    """

    title: str

    def __call__(self, session: Session) -> ipw.Widget:
        """Return a new pane."""


def with_own(
    tabs: Mapping[str, ipw.Widget], own: Sequence[OwnPane], session: Session
) -> dict[str, ipw.Widget]:
    """Return the tabs by title, and after them those from outside.

    Raises:
        ValueError: two have one title.

    """
    panes = dict(tabs)
    for make in own:
        if make.title in panes:
            raise ValueError(f"two panes have the title {make.title!r}; titles so far: {', '.join(panes)}")
        panes[make.title] = make(session)
    return panes


class PaneTabs(ipw.Tab):
    """Panes with a method `show(state)`, called for the one that is looked at."""

    def __init__(
        self, panes: Mapping[str, ipw.Widget], post: Callable[[str, Callable[[], None]], None]
    ) -> None:
        """Show the first pane.

        Args:
            panes: by the titles of their tabs.
            post: takes a slot and a drawing, to be done by the thread that draws.

        """
        self.state: PanelState | None = None
        super().__init__(list(panes.values()), titles=list(panes), selected_index=0)
        self.add_class("wb-tabs")
        self.observe(lambda _: post("tab", self.draw), "selected_index")

    @property
    def visible(self) -> ipw.Widget | None:
        """Return the pane that is looked at."""
        return None if self.selected_index is None else self.children[self.selected_index]

    def select(self, pane: ipw.Widget) -> None:
        """Look at a pane."""
        self.selected_index = self.children.index(pane)

    def show(self, state: PanelState) -> None:
        """Show a state in the pane that is looked at."""
        self.state = state
        self.draw()

    def draw(self) -> None:
        """Let the pane that is looked at show the newest state."""
        if self.state is not None and self.visible is not None:
            self.visible.show(self.state)
