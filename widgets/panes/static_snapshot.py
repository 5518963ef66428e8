"""The last finished point as a picture in the cell's output: what a saved notebook shows without a kernel.

While the panel is alive its style sheet hides the picture. It is plain HTML with an SVG, so it needs no
script, no network and no widget; it is only ever drawn from a measured point and says of which recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from IPython.display import HTML, DisplayHandle

from widgets.panes.verdict_strip import badge, strip
from widgets.plot.static_svg import svg
from widgets.session.state import PanelState

STYLE = """<style>
.wb-still { font-family: system-ui, sans-serif; font-size: 14px; }
.wb-still span { opacity: .75; font-size: 12.5px; display: block; }
.wb-still-verdict, .wb-still-facts { display: flex; flex-wrap: wrap; gap: 4px 26px; margin: 4px 0; }
.wb-still-verdict b { display: block; font-size: 20px; }
.wb-still ul { margin: 4px 0; padding-left: 18px; }
.jp-OutputArea:has(.wb-panel) .wb-still, .jp-Cell:has(.wb-panel) .wb-still { display: none; }
</style>"""


class StaticSnapshot:
    """Keeps one output of the cell up to date; draws nothing before it has been displayed."""

    def __init__(self, drawn: Callable[[], dict[str, Any]]) -> None:
        """Show nothing yet; `drawn` returns the live plot's figure as a dictionary of data and layout."""
        self.drawn = drawn
        self.state: PanelState | None = None  # the last one with a complete point
        self.handle: DisplayHandle | None = None
        self.html = ""

    def display(self) -> None:
        """Put the picture into the output of the cell that runs."""
        self.handle = DisplayHandle()
        self.html = self.draw()
        self.handle.display(HTML(self.html))

    def show(self, state: PanelState) -> None:
        """Draw the picture anew if the present point is complete."""
        if state.phase != "measured" or state.point is None or not state.point.complete:
            return
        self.state = state
        if self.handle is not None and (html := self.draw()) != self.html:
            self.html = html
            self.handle.update(HTML(html))

    def draw(self) -> str:
        """Return the picture as HTML, empty before a point is complete."""
        return "" if self.state is None else snapshot(self.state, self.drawn())


def snapshot(state: PanelState, drawn: Mapping[str, Any]) -> str:
    """Return the picture as HTML: which model and recipe, the plot, and the measured numbers in words."""
    when = f" at {state.point.provenance.time[:16].replace('T', ' ')} UTC" if state.point is not None else ""
    head = (
        f"<p><b>{escape(state.model)}</b>: <code>{escape(repr(state.recipe))}</code>, measured{escape(when)}."
        " A picture: run the notebook for the panel.</p>"
    )
    html = strip(state).replace(badge(state), "")  # the head line says that it is measured
    # One live strip in a page
    html = html.replace("class='wb-", "class='wb-still-").replace(" role='status'", "")
    return f"{STYLE}<div class='wb-still'>{head}{svg(drawn['data'], drawn['layout'])}{html}</div>"
