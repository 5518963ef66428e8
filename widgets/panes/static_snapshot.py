"""The last finished measurement as a picture in the cell's output: what a saved notebook shows where no
kernel runs.

While the panel is alive its style sheet hides the picture. It is plain HTML with an SVG, so it needs no
script, no network and no widget; it is only ever drawn from a measured point and says of which recipe.
"""

from __future__ import annotations

from html import escape

import plotly.graph_objects as go
from IPython.display import HTML, DisplayHandle

from widgets.panes.verdict_strip import badge, strip
from widgets.plot.static_svg import svg
from widgets.session.state import Live

STYLE = """<style>
.wb-still { font-family: system-ui, sans-serif; font-size: 14px; }
.wb-still span { opacity: .75; font-size: 12.5px; display: block; }
.wb-still-verdict, .wb-still-facts { display: flex; flex-wrap: wrap; gap: 4px 26px; margin: 4px 0; }
.wb-still-verdict b { display: block; font-size: 20px; }
.wb-still ul { margin: 4px 0; padding-left: 18px; }
.jp-OutputArea:has(.wb-panel) .wb-still, .jp-Cell:has(.wb-panel) .wb-still { display: none; }
</style>"""


class Still:
    """Keeps one output of the cell up to date; does nothing before it has been displayed."""

    def __init__(self) -> None:
        """Show nothing yet."""
        self.handle: DisplayHandle | None = None
        self.html = ""

    def display(self) -> None:
        """Put the picture into the output of the cell that runs."""
        self.handle = DisplayHandle()
        self.handle.display(HTML(self.html))

    def show(self, model: str, live: Live, figure: go.Figure) -> None:
        """Draw the picture anew if the present point is complete."""
        if live.point is None or not live.point.complete:
            return
        html = still(model, live, figure)
        if html != self.html:
            self.html = html
            if self.handle is not None:
                self.handle.update(HTML(html))


def still(model: str, live: Live, figure: go.Figure) -> str:
    """Return the picture as HTML: which model and recipe, the plot, and the measured numbers in words."""
    when = f" at {live.point.provenance.time[:16].replace('T', ' ')} UTC" if live.point is not None else ""
    head = (
        f"<p><b>{escape(model)}</b>: <code>{escape(repr(live.recipe))}</code>, measured{escape(when)}. A"
        " picture: run the notebook for the panel.</p>"
    )
    drawn = figure.to_dict()
    picture = svg(drawn["data"], drawn["layout"])
    words = strip(live).replace(badge(live), "")  # the head line says that it is measured
    words = words.replace("class='wb-", "class='wb-still-").replace(
        " role='status'", ""
    )  # one live strip in a page
    return f"{STYLE}<div class='wb-still'>{head}{picture}{words}</div>"
