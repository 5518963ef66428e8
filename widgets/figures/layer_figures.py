"""The weights of one layer before and after, as a figure; pure."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from widgets.figures.figures import AXIS, BLUE, GREY
from workbench.measure.weight_histograms import WeightChange

AFTER, BEFORE = 0, 1


def weights_figure() -> go.Figure:
    """Return the empty histogram with both traces.

    A `FigureWidget` must get all its traces when it is made.
    """
    figure = go.Figure(
        [
            go.Bar(
                x=[],
                y=[],
                width=[],
                name="after",
                marker={"color": BLUE, "opacity": 0.75, "line": {"width": 0}},
                hovertemplate="after: %{y:,} weights<extra></extra>",
            ),
            go.Scatter(
                x=[],
                y=[],
                name="before",
                mode="lines",
                line={"shape": "hv", "color": GREY, "width": 2.5},
                hovertemplate="before: %{y:,} weights<extra></extra>",
            ),
        ]
    )
    axis = {
        **AXIS,
        "tickfont": {"size": 13},
        "title": {"font": {"size": 13}},
    }
    figure.update_layout(
        xaxis={**axis, "title": {"text": "weight", "font": {"size": 13}, "standoff": 6}},
        yaxis={**axis, "title": {"text": "weights in a bin", "font": {"size": 13}}, "rangemode": "tozero"},
        width=430,
        height=250,
        margin={"l": 66, "r": 12, "t": 8, "b": 46},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        bargap=0,
        font={"family": "system-ui, sans-serif", "size": 13, "color": GREY},
        showlegend=True,
        legend={"x": 1, "xanchor": "right", "y": 1, "font": {"size": 14}, "bgcolor": "rgba(0,0,0,0)"},
        hovermode="x",
        dragmode="zoom",
    )
    return figure


def weights_changes(change: WeightChange | None) -> dict[int, dict[str, Any]]:
    """Return the values of both traces, by index: bars of the counts after, steps for those before."""
    if change is None:
        return {AFTER: {"x": [], "y": [], "width": []}, BEFORE: {"x": [], "y": []}}
    edges = change.edges
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    widths = [high - low for low, high in pairwise(edges)]
    return {
        AFTER: {"x": middles, "y": list(change.after), "width": widths},
        BEFORE: {"x": list(edges), "y": [*change.before, 0]},
    }
