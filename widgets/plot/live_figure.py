"""The live trade-off plot: its fixed traces, and what to write into each; pure.

A `FigureWidget` gets all its traces when it is made; only the small live ones are rewritten during a drag.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from widgets.figures.figures import AXIS, BLUE, GREEN, GREY, ORANGE, STANDINGS, wrap
from widgets.plot import live_axes
from widgets.plot.colours import painted
from widgets.plot.plot_choice import PlotChoice, scale
from widgets.session.state import PanelState
from workbench.ledger.pareto import Standing, Tradeoff, TradeoffPoint, cost_of, dense_cost_of, quality_of
from workbench.measure.measurement import Measurement
from workbench.metrics.metrics import metric_named
from workbench.metrics.quality import Estimate, Quality

LINE, DOMINATED, NOISE, FRONT, DENSE, PREDICTED, MEASURED, PINNED = range(8)
HISTORY: dict[int, Standing] = {DOMINATED: "dominated", NOISE: "within noise", FRONT: "front"}
OPACITY: dict[Standing, float] = {"front": 0.95, "within noise": 0.6, "dominated": 0.4}
PINK = "#ec4899"
ALWAYS = {"marker": {"opacity": 1.0}}  # nothing fades after a box: what it holds stands in the compare tab
Changes = dict[int, dict[str, Any]]


def live_figure() -> go.Figure:
    """Return the empty plot with all its traces."""
    figure = go.Figure(
        [
            go.Scatter(
                mode="lines",
                line={"color": BLUE, "width": 1.5, "dash": "dot"},
                hoverinfo="skip",
                showlegend=False,
                x=[],
                y=[],
            ),
            *(history_trace(name) for name in HISTORY.values()),
            go.Scatter(
                x=[],
                y=[],
                mode="markers",
                name="dense model",
                marker={"symbol": "star", "size": 18, "color": ORANGE},
                hovertemplate="dense model<br>%{y:.4g}<extra></extra>",
                unselected=ALWAYS,
            ),
            live_trace(
                "predicted",
                {"symbol": "circle-open", "size": 17, "color": GREEN, "line": {"width": 2.5}},
                1.5,
                "rgba(16,185,129,0.45)",
            ),
            live_trace("measured", {"symbol": "circle", "size": 17, "color": GREEN}, 3.5, GREEN),
            go.Scatter(
                x=[],
                y=[],
                mode="markers",
                name="pinned",
                marker={"symbol": "circle-open", "size": 24, "color": PINK, "line": {"width": 3}},
                hoverinfo="skip",
                unselected=ALWAYS,
            ),
        ]
    )
    axis = {
        **AXIS,
        "tickfont": {"size": 14},
        "title": {"font": {"size": 14}},
        "showline": True,
    }
    figure.update_layout(
        xaxis=axis,
        yaxis=axis,
        autosize=True,
        height=414,
        margin={"l": 74, "r": 16, "t": 10, "b": 54},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 14, "color": GREY},
        hoverlabel={"align": "left"},
        clickmode="event",
        dragmode="zoom",
        uirevision="kept",
        showlegend=False,
    )
    return figure


def history_trace(standing: Standing) -> go.Scatter:
    """Return an empty trace of measured points."""
    color, width, name = STANDINGS[standing]
    bar = {"array": [], "arrayminus": [], "thickness": 1.1, "width": 0, "color": color}
    marker = {"color": color, "size": width, "opacity": OPACITY[standing]}
    return go.Scatter(
        x=[],
        y=[],
        mode="markers",
        name=name,
        marker=marker,
        error_y=bar,
        hovertemplate="%{hovertext}<extra></extra>",
        unselected={"marker": {"opacity": OPACITY[standing]}},
    )


def live_trace(name: str, marker: dict[str, Any], thickness: float, color: str) -> go.Scatter:
    """Return an empty trace of one point with its bar."""
    bar = {"array": [], "arrayminus": [], "thickness": thickness, "width": 8, "color": color}
    return go.Scatter(
        x=[],
        y=[],
        mode="markers",
        name=name,
        marker=marker,
        error_y=bar,
        hovertemplate="%{hovertext}<extra></extra>",
        unselected=ALWAYS,
    )


def bar(values: Sequence[Estimate], factor: float) -> dict[str, Any]:
    """Return the error bars of estimates; an infinite end is not drawn."""

    def length(x: float) -> float:
        return factor * x if math.isfinite(x) else 0.0

    return {
        "array": [length(v.high - v.value) for v in values],
        "arrayminus": [length(v.value - v.low) for v in values],
    }


def history_changes(record: Tradeoff | None, pinned: Collection[str] = ()) -> Changes:
    """Return the changes of the past's traces: three standings, the front's line, rings of pinned points."""
    points = [] if record is None else [p for p in record.points if math.isfinite(p.quality.value)]
    factor = 1.0 if record is None else scale(record.metric, change=record.change)
    colors = {} if record is None else painted(record)
    changes: Changes = {}
    for index, standing in HISTORY.items():
        chosen = [p for p in points if p.standing == standing]
        marker, bars = looks(standing, [colors[p.key] for p in chosen] if colors else None)
        changes[index] = places(record, chosen) | {
            "customdata": [p.key for p in chosen],
            "hovertext": [f"{wrap(escape(p.verdict), 60)}<br><i>click: sliders go here</i>" for p in chosen],
            "error_y": bar([p.quality for p in chosen], factor) | bars,
            "marker": marker,
            "selectedpoints": None,
        }
    changes[LINE] = places(record, [p for p in points if p.standing == "front"])
    changes[PINNED] = places(record, [p for p in points if p.key in pinned])
    return changes


def looks(standing: Standing, colors: list[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return marker and error bar of a standing.

    With `colors`, each point has its own, and an outline that shows on any page.
    """
    own, width, _ = STANDINGS[standing]
    if colors is None:
        line = {"width": 0, "color": GREY}
        return {"color": own, "size": width, "opacity": OPACITY[standing], "line": line}, {"color": own}
    line = {"width": 1, "color": GREY}
    return {"color": colors, "size": max(width, 9), "opacity": 0.95, "line": line}, {"color": GREY}


def places(record: Tradeoff | None, points: Sequence[TradeoffPoint]) -> dict[str, Any]:
    """Return x and y of points."""
    if record is None:
        return {"x": [], "y": []}
    factor = scale(record.metric, change=record.change)
    return {
        "x": [shown_cost(p.cost.value, PlotChoice(cost=record.cost_name)) for p in points],
        "y": [factor * p.quality.value for p in points],
    }


def shown_cost(value: float, choice: PlotChoice) -> float:
    """Return a cost in the axis' unit: MB, or times the dense model's time."""
    return value / 1e6 if choice.size else value


def dense_changes(point: Measurement | None, choice: PlotChoice) -> Changes:
    """Return the changes of the star; it is left out where the dense model's cost was not measured."""
    spent = None if point is None else dense_cost_of(point, choice.cost)
    quality = None if point is None else quality_of(point, choice.metric or None)
    if spent is None or quality is None:
        return {DENSE: {"x": [], "y": []}}
    y = 0.0 if choice.change else scale(quality.metric, change=False) * quality.dense.value
    text = metric_named(quality.metric).words(quality.dense.value)
    hover = f"dense model<br>{text}<extra></extra>"
    return {DENSE: {"x": [shown_cost(spent, choice)], "y": [y], "hovertemplate": hover}}


def live_changes(state: PanelState, choice: PlotChoice) -> Changes:
    """Return the changes of the predicted and the measured point."""
    return {PREDICTED: predicted_changes(state, choice), MEASURED: measured_changes(state, choice)}


NOTHING: dict[str, Any] = {"x": [], "y": [], "hovertext": [], "error_y": {"array": [], "arrayminus": []}}


def predicted_changes(state: PanelState, choice: PlotChoice) -> dict[str, Any]:
    """Return the hollow point; it goes once the real one is complete.

    Only the main metric, file size and time are predicted. There is none where nothing is known of quality:
    any height would look like an estimate.
    """
    guess = state.prediction
    if guess is None or guess.quality is None or guess.unknown or state.phase == "measured":
        return NOTHING
    if choice.metric not in {"", guess.metric}:
        return NOTHING
    time = None if guess.speedup is None else 1 / guess.speedup.value
    spent = {"file_bytes": guess.file_bytes, "latency": time}.get(choice.cost)
    quality = changed(guess.quality, state.anchor) if choice.change else guess.quality
    if spent is None or quality is None:
        return NOTHING
    factor = scale(guess.metric, change=choice.change)
    notes = "<br>".join(wrap(escape(note), 60) for note in guess.notes)
    hover = f"<b>predicted, not measured</b><br>{escape(state.recipe.label())}<br>{notes}"
    return {
        "x": [shown_cost(spent, choice)],
        "y": [factor * quality.value],
        "hovertext": [hover],
        "error_y": bar([quality], factor),
    }


def changed(quality: Estimate, anchor: Measurement | None) -> Estimate | None:
    """Return a predicted quality as the change against the dense model, None before that one is known."""
    if anchor is None:
        return None
    dense = anchor.primary.dense.value
    ratio = metric_named(anchor.primary.metric).ratio
    return quality.mapped(lambda x: x / dense - 1) if ratio else quality.mapped(lambda x: x - dense)


def paired(mine: Quality, anchor: Quality) -> Estimate:
    """Return a point's quality as the dense model's (on the most items read) plus the paired change, with its
    interval.

    Early looks read few items; the change against the dense model on the same items says far more than those
    items alone.
    """
    dense, change = anchor.dense.value, mine.change
    ratio = metric_named(mine.metric).ratio
    return change.mapped(lambda x: dense * (1 + x)) if ratio else change.mapped(lambda x: dense + x)


def measured_changes(state: PanelState, choice: PlotChoice) -> dict[str, Any]:
    """Return the filled point with its bar; there is none before its cost has been measured."""
    point, anchor, metric = state.point, state.anchor, choice.metric or None
    spent = None if point is None else cost_of(point, choice.cost)
    if point is None or anchor is None or spent is None:
        return NOTHING
    mine, best = quality_of(point, metric), quality_of(anchor, metric)
    if mine is None or best is None or not math.isfinite(mine.compressed.value):
        return NOTHING
    factor = scale(mine.metric, change=choice.change)
    head = f"<b>measured</b> on {point.items:,} of {point.items_total:,} items, bar: paired change"
    estimate = mine.change if choice.change else paired(mine, best)
    return {
        "x": [shown_cost(spent.value, choice)],
        "y": [factor * estimate.value],
        "hovertext": [f"{head}<br>{escape(point.recipe.label())}"],
        "error_y": bar([estimate], factor),
    }


def window(changes: Changes, metric: str, choice: PlotChoice) -> dict[str, list[float]]:
    """Return calm axis ranges: around the dense model, wider in coarse steps where a live point lies."""
    star = changes[DENSE]
    if not star["x"]:
        return {}
    live = [changes[index] for index in (PREDICTED, MEASURED)]
    xs, ys = [x for c in live for x in c["x"]], [y for c in live for y in c["y"]]
    return {
        "xaxis": live_axes.x_range(star["x"][0], xs, choice),
        "yaxis": live_axes.y_range(star["y"][0], ys, metric, choice),
    }
