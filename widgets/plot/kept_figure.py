"""A plotly figure as a widget whose state is always what is drawn, so that a reloaded page shows it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import plotly.graph_objects as go

from widgets.plot.plotly_internals import drawn, set_config, set_silently

# No button and no link leads to another site
CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["sendChartToCloud", "lasso2d"]}


@contextlib.contextmanager
def absent(module: str) -> Iterator[None]:
    """Let `import module` fail inside the block, unless it has been imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # Python's own sign for "cannot be imported"
    try:
        yield
    finally:
        del sys.modules[module]


def kept_figure(figure: go.Figure) -> go.FigureWidget:
    """Return a figure as a widget.

    The first one imports plotly's widgets, with them nbformat and jsonschema, whose optional `rfc3987_syntax`
    spends 1.5 s on grammars for internationalised addresses, which no notebook has: it is left out.
    """
    with absent("rfc3987_syntax"):
        base = go.FigureWidget

    class KeptFigure(base):  # type: ignore[misc,valid-type]
        """A figure widget whose full state is read from the figure: plotly 7.1 syncs data and layout only
        when it is made.
        """

        def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
            """Return the state; the full one is what a page asks for when it is loaded again."""
            if key is None and self.comm is not None:
                set_silently(self, drawn(self))  # what a page asks for need not be sent to it twice
            state: dict[str, Any] = super().get_state(key, drop_defaults)
            return state

        @staticmethod
        def _remove_overlapping_props(
            _input_data: Any, _delta_data: Any, _prop_path: tuple[Any, ...] = ()
        ) -> list[Any]:
            """Keep what was written: plotly drops what pages report as defaults, at times a point's x."""
            return []

    widget = KeptFigure(figure)
    set_config(widget, **CONFIG)
    return widget
