"""What we use of plotly's widgets that plotly does not promise.

Whether the installed version has these names: `workbench.util.library_internals.LIVE_PLOT`.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go


def set_config(figure: go.FigureWidget, **config: Any) -> None:
    """Change the configuration of a figure's page: buttons, links. A widget has no other way to set it."""
    figure._config = {**figure._config, **config}  # noqa: SLF001


def drawn(figure: go.FigureWidget) -> dict[str, Any]:
    """Return the traits of a widget's state that hold its data and layout, as they are drawn now."""
    return {
        "_widget_data": copy.deepcopy(figure._data),  # noqa: SLF001
        "_widget_layout": copy.deepcopy(figure._layout_obj._props),  # noqa: SLF001
    }


def set_silently(figure: go.FigureWidget, values: dict[str, Any]) -> None:
    """Set traits without sending them to the pages that show the figure."""
    figure._trait_values |= values  # noqa: SLF001


def send_unmarked(figure: go.FigureWidget) -> None:
    """Take every mark and box off the pages' figure, of which Python never heard."""
    figure._send_restyle_msg(  # noqa: SLF001
        {"selectedpoints": [None]}, trace_indexes=list(range(len(figure.data)))
    )
    figure._send_relayout_msg({"selections": []})  # noqa: SLF001
