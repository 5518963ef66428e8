"""Tabs of panes of which one is looked at; the others draw nothing until they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ipywidgets as ipw

from widgets.session.state import PanelState


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
