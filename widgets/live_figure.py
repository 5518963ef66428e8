"""The live trade-off plot: fixed traces, and what to write into each; pure.

A `FigureWidget` must get all its traces when it is made, and only the small live ones are rewritten during a drag.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from widgets.figures import BLUE, GREEN, GREY, GRID, ORANGE, STANDINGS, metric_title, shown_cost, wrap
from widgets.live import Live
from workbench.measure.measurement import Measurement
from workbench.measure.quality import Estimate
from workbench.tradeoff import Cost, Standing, Tradeoff, TradeoffPoint, cost_of

LINE, DOMINATED, NOISE, FRONT, DENSE, PREDICTED, MEASURED = range(7)
HISTORY: dict[int, Standing] = {DOMINATED: "dominated", NOISE: "within noise", FRONT: "front"}
Changes = dict[int, dict[str, Any]]


def live_figure() -> go.Figure:
    """Return the empty plot with all its traces."""
    figure = go.Figure([
        go.Scatter(mode="lines", line={"color": BLUE, "width": 1.5, "dash": "dot"}, hoverinfo="skip", showlegend=False, x=[], y=[]),
        *(history_trace(name) for name in HISTORY.values()),
        go.Scatter(x=[], y=[], mode="markers", name="dense model", marker={"symbol": "star", "size": 18, "color": ORANGE}, hovertemplate="dense model<br>%{y:.4g}<extra></extra>"),
        live_trace("predicted", {"symbol": "circle-open", "size": 17, "color": GREEN, "line": {"width": 2.5}}, 1.5, "rgba(16,185,129,0.45)"),
        live_trace("measured", {"symbol": "circle", "size": 17, "color": GREEN}, 3.5, GREEN),
    ])  # fmt: skip
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GREY, "ticks": "outside", "tickcolor": GREY, "tickfont": {"size": 14}, "title": {"font": {"size": 14}}, "showline": True}
    figure.update_layout(
        xaxis=axis, yaxis=axis, autosize=True, height=436, margin={"l": 74, "r": 16, "t": 14, "b": 54}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 14, "color": GREY}, hoverlabel={"align": "left"}, clickmode="event", dragmode="zoom", uirevision="kept",
        showlegend=False,
    )  # fmt: skip
    return figure


def history_trace(standing: Standing) -> go.Scatter:
    """Return an empty trace of measured points."""
    color, width, words = STANDINGS[standing]
    bar = {"array": [], "arrayminus": [], "thickness": 1.1, "width": 0, "color": color}
    opacity = {"front": 0.95, "within noise": 0.6, "dominated": 0.4}[standing]
    return go.Scatter(x=[], y=[], mode="markers", name=words, marker={"color": color, "size": width, "opacity": opacity}, error_y=bar, hovertemplate="%{hovertext}<extra></extra>")


def live_trace(name: str, marker: dict[str, Any], thickness: float, color: str) -> go.Scatter:
    """Return an empty trace of one point with its bar."""
    bar = {"array": [], "arrayminus": [], "thickness": thickness, "width": 8, "color": color}
    return go.Scatter(x=[], y=[], mode="markers", name=name, marker=marker, error_y=bar, hovertemplate="%{hovertext}<extra></extra>")


def legend() -> str:
    """Return what the marks mean, as HTML that stays where it is (plotly's own legend moves the plot as entries come and go)."""
    marks = [
        ("\N{BLACK STAR}", ORANGE, "dense"), ("\N{WHITE CIRCLE}", GREEN, "predicted"), ("\N{BLACK CIRCLE}", GREEN, "measured"),
        ("\N{BLACK CIRCLE}", BLUE, "front"), ("\N{BLACK CIRCLE}", "rgba(59,130,246,0.5)", "within noise"), ("\N{BLACK CIRCLE}", "rgba(139,149,165,0.6)", "dominated"),
    ]  # fmt: skip
    return "".join(f"<span class='wb-mark'><i style='color:{color}' aria-hidden='true'>{mark}</i>{words}</span>" for mark, color, words in marks)


def factor(metric: str) -> float:
    """Return the factor from the metric to the axis: percent for accuracy."""
    return 100.0 if metric == "accuracy" else 1.0


def bar(values: Sequence[Estimate], scale: float) -> dict[str, Any]:
    """Return the error bars of estimates; an infinite end is not drawn."""
    def length(x: float) -> float:
        return scale * x if math.isfinite(x) else 0.0

    return {"array": [length(v.high - v.value) for v in values], "arrayminus": [length(v.value - v.low) for v in values]}


def history_changes(record: Tradeoff | None) -> Changes:
    """Return what to write into the traces of the past: three standings and the line through the front."""
    points: tuple[TradeoffPoint, ...] = () if record is None else tuple(p for p in record.points if math.isfinite(p.quality.value))
    changes: Changes = {}
    for index, standing in HISTORY.items():
        chosen = [p for p in points if p.standing == standing]
        changes[index] = places(record, chosen) | {
            "customdata": [p.key for p in chosen], "hovertext": [f"{wrap(escape(p.verdict), 60)}<br><i>click: sliders go here</i>" for p in chosen],
            "error_y": bar([p.quality for p in chosen], factor(record.metric) if record else 1.0),
        }  # fmt: skip
    changes[LINE] = places(record, [p for p in points if p.standing == "front"])
    return changes


def places(record: Tradeoff | None, points: Sequence[TradeoffPoint]) -> dict[str, Any]:
    """Return x and y of points."""
    if record is None:
        return {"x": [], "y": []}
    return {"x": [shown_cost(record, p.cost.value) for p in points], "y": [factor(record.metric) * p.quality.value for p in points]}


def dense_changes(point: Measurement | None, cost: Cost) -> Changes:
    """Return what to write into the star."""
    if point is None:
        return {DENSE: {"x": [], "y": []}}
    x = point.dense_sizes.file_bytes / 1e6 if cost == "file_bytes" else 1.0
    return {DENSE: {"x": [x], "y": [factor(point.primary.metric) * point.primary.dense.value]}}


def live_changes(live: Live, anchor: Measurement | None, cost: Cost) -> Changes:
    """Return what to write into the predicted and the measured point; `anchor` knows the dense model best."""
    return {PREDICTED: predicted_changes(live, cost), MEASURED: measured_changes(live, anchor, cost)}


NOTHING: dict[str, Any] = {"x": [], "y": [], "hovertext": [], "error_y": {"array": [], "arrayminus": []}}


def predicted_changes(live: Live, cost: Cost) -> dict[str, Any]:
    """Return the hollow point; it goes once the real one is complete."""
    guess = live.prediction
    if guess is None or guess.quality is None or (cost == "file_bytes" and guess.file_bytes is None) or live.state == "measured":
        return NOTHING
    x = (guess.file_bytes or 0) / 1e6 if cost == "file_bytes" else 1 / guess.speedup.value
    scale = factor(guess.metric)
    words = f"<b>predicted, not measured</b><br>{escape(live.recipe.label())}<br>{'<br>'.join(wrap(escape(n), 60) for n in guess.notes)}"
    return {"x": [x], "y": [scale * guess.quality.value], "hovertext": [words], "error_y": bar([guess.quality], scale)}


def paired(point: Measurement, anchor: Measurement) -> Estimate:
    """Return a point's quality as the dense model's (on the most items read) plus the paired change, with its interval.

    Early looks read few items; the change against the dense model on the same items says far more than those items alone.
    """
    dense, change = anchor.primary.dense.value, point.primary.change
    return change.mapped(lambda x: dense * (1 + x)) if point.primary.metric == "perplexity" else change.mapped(lambda x: dense + x)


def measured_changes(live: Live, anchor: Measurement | None, cost: Cost) -> dict[str, Any]:
    """Return the filled point with its bar; on the latency axis there is none before latency has been measured."""
    point = live.point
    spent = None if point is None else cost_of(point, cost)
    if point is None or anchor is None or spent is None or not math.isfinite(point.primary.compressed.value):
        return NOTHING
    scale = factor(point.primary.metric)
    x = spent.value / 1e6 if cost == "file_bytes" else spent.value
    words = f"<b>measured</b> on {point.items:,} of {point.items_total:,} items, bar: paired change<br>{escape(point.recipe.label())}"
    estimate = paired(point, anchor)
    return {"x": [x], "y": [scale * estimate.value], "hovertext": [words], "error_y": bar([estimate], scale)}


def axes(metric: str, cost: Cost) -> dict[str, Any]:
    """Return titles, scales and ticks of both axes."""
    y: dict[str, Any] = {"title": {"text": metric_title(metric) if metric else ""}, "type": "log" if metric == "perplexity" else "linear"}
    if cost == "latency":
        return {"xaxis": {"title": {"text": "time relative to the dense model (left is faster)"}, "type": "linear", "tickmode": "auto", "tickvals": None, "ticktext": None}, "yaxis": y}
    ticks = [base * 10**power for power in range(-3, 6) for base in (1, 2, 5)]
    x = {"title": {"text": "file size (MB, left is smaller)"}, "type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return {"xaxis": x, "yaxis": y}


def window(changes: Changes, metric: str, cost: Cost) -> dict[str, list[float]]:
    """Return calm axis ranges: around the dense model, wider in coarse steps where the live point lies outside."""
    star = changes[DENSE]
    if not star["x"]:
        return {}
    live = [changes[index] for index in (PREDICTED, MEASURED)]
    xs, ys = [x for c in live for x in c["x"]], [y for c in live for y in c["y"]]
    return {"xaxis": x_range(star["x"][0], xs, cost), "yaxis": y_range(star["y"][0], ys, metric)}


def x_range(dense: float, xs: Sequence[float], cost: Cost) -> list[float]:
    """Return the range of the cost axis (of its logarithm for sizes)."""
    if cost == "latency":
        return [min(0.4, *(0.9 * x for x in xs), 0.4), max(1.3, *(1.1 * x for x in xs), 1.3)]
    low, high = min([dense / 24, *(x / 1.3 for x in xs)]), max([dense * 1.3, *(x * 1.2 for x in xs)])
    return [math.log10(low), math.log10(high)]


def y_range(dense: float, ys: Sequence[float], metric: str) -> list[float]:
    """Return the range of the quality axis, better upwards."""
    if metric == "perplexity":
        high = max([dense * 3, *(2 ** math.ceil(math.log2(y * 1.2)) for y in ys if y > dense * 2.5)])
        return [math.log10(high), math.log10(dense * 0.85)]
    if metric != "accuracy":
        return [min([0.8 * dense, *ys]), max([1.1 * dense, *ys])]
    lowest = min([dense - 8, *ys])
    low = dense - 10 if lowest >= dense - 8 else 20 * math.floor((lowest - 4) / 20)
    return [max(-2.0, low), min(101.0, dense + max(2.0, 0.06 * (dense - low)))]
