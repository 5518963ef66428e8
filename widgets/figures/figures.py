"""Records to plotly figures; pure. Colours and fonts read on a light and on a dark page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.ledger.pareto import Tradeoff, TradeoffPoint
from workbench.measure.measurement import Measurement
from workbench.metrics.metrics import metric_named
from workbench.report.temperature_lesson import Softened
from workbench.util.progress import Look
from workbench.util.text import size

BLUE, ORANGE, GREY, GREEN = "#3b82f6", "#f97316", "#8b95a5", "#10b981"
GRID = "rgba(139,149,165,0.25)"
STANDINGS = {
    "front": (BLUE, 13, "on the front"),
    "within noise": (BLUE, 8, "within noise of the front"),
    "dominated": (GREY, 7, "dominated"),
}


AXIS = {
    "gridcolor": GRID,
    "zeroline": False,
    "linecolor": GREY,
    "ticks": "outside",
    "tickcolor": GREY,
}  # the look of every axis


def layout(figure: go.Figure, title: str, x: str, y: str, height: int = 430) -> go.Figure:
    """Apply the common look: transparent, one grid, horizontal legend, large enough to read from afar."""
    axis = {**AXIS, "automargin": True}
    place = {"x": 0, "xanchor": "left", "yref": "container", "y": 0.97}
    figure.update_layout(
        title={"text": title, "font": {"size": 18}, **place},
        xaxis={"title": x, **axis},
        yaxis={"title": y, **axis},
        height=height,
        margin={"l": 70, "r": 20, "t": 80, "b": 55},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 14, "color": GREY},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"align": "left"},
    )
    return figure


def scale_of(record: Tradeoff) -> float:
    """Return the factor from the metric to what the axis shows: percent for accuracy."""
    return metric_named(record.metric).scale


def shown_cost(record: Tradeoff, cost: float) -> float:
    """Return a cost in the axis' unit: MB, or times the dense model's time."""
    return cost if record.cost_name == "latency" else cost / 1e6


def tradeoff_figure(record: Tradeoff, highlight: str | None = None) -> go.Figure:
    """Return quality against cost: every point with its interval, the front as a line, dense as a star.

    `highlight` is the key of the point that the report is about; it gets a ring.
    """
    figure, about = go.Figure(), metric_named(record.metric)
    scale, exact = about.scale, record.cost_name == "file_bytes"
    front = [point for point in record.points if point.standing == "front"]
    figure.add_scatter(
        x=[shown_cost(record, p.cost.value) for p in front],
        y=[scale * p.quality.value for p in front],
        mode="lines",
        line={"color": BLUE, "width": 1, "dash": "dot"},
        hoverinfo="skip",
        showlegend=False,
    )
    for name, (color, width, label) in STANDINGS.items():
        chosen = [point for point in record.points if point.standing == name]
        if chosen:
            figure.add_trace(markers(record, chosen, color, width, label))
    figure.add_scatter(
        x=[shown_cost(record, record.dense_cost)],
        y=[scale * record.dense_quality],
        mode="markers",
        name="dense model",
        marker={"symbol": "star", "size": 17, "color": ORANGE},
        hovertemplate=f"dense model<br>{about.words(record.dense_quality)}<extra></extra>",
    )
    ringed = [point for point in record.points if point.key == highlight]
    if ringed:
        figure.add_scatter(
            x=[shown_cost(record, p.cost.value) for p in ringed],
            y=[scale * p.quality.value for p in ringed],
            mode="markers",
            name="this recipe",
            marker={"symbol": "circle-open", "size": 22, "color": GREEN, "line": {"width": 3}},
            hoverinfo="skip",
        )
    title = f"{escape(record.model)}: {record.metric} against {'size' if exact else 'latency'}"
    cost = "file size (MB)" if exact else "time relative to dense (lower is faster)"
    layout(figure, title, cost, metric_title(record.metric))
    if not about.higher:
        figure.update_yaxes(autorange="reversed")
    if about.logarithmic:
        figure.update_yaxes(type="log")
    if exact:
        ticks = [base * 10**power for power in range(-3, 6) for base in (1, 1.5, 2, 3, 5, 7)]
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return figure


def metric_title(metric: str) -> str:
    """Return the axis title of a metric; where less is better the axis is turned over."""
    about = metric_named(metric)
    facts = {"%": about.percent, "log": about.logarithmic, "better upwards": not about.higher}
    remarks = ", ".join(word for word, holds in facts.items() if holds)
    return f"{metric} ({remarks})" if remarks else metric


def markers(
    record: Tradeoff, points: Sequence[TradeoffPoint], color: str, width: int, name: str
) -> go.Scatter:
    """Return one trace of points with their intervals and the verdict as hover text."""
    scale = scale_of(record)
    finite = [p for p in points if math.isfinite(p.quality.value)]
    look = {"thickness": 1.2, "width": 3, "color": color}
    across = {
        "array": [p.cost.high - p.cost.value for p in finite],
        "arrayminus": [p.cost.value - p.cost.low for p in finite],
    }
    upwards = {
        "array": [scale * (p.quality.high - p.quality.value) for p in finite],
        "arrayminus": [scale * (p.quality.value - p.quality.low) for p in finite],
    }
    return go.Scatter(
        x=[shown_cost(record, p.cost.value) for p in finite],
        y=[scale * p.quality.value for p in finite],
        mode="markers",
        name=name,
        marker={"color": color, "size": width, "opacity": 0.9},
        error_x=None if record.cost_name == "file_bytes" else {**across, **look},
        error_y={**upwards, **look},
        hovertext=[wrap(escape(p.verdict)) for p in finite],
        hovertemplate="%{hovertext}<extra></extra>",
    )


def wrap(text: str, width: int = 70) -> str:
    """Return text with line breaks for a hover label."""
    import textwrap

    return "<br>".join(textwrap.wrap(text, width))


def sliders_figure(sweeps: Mapping[str, Sequence[Measurement]], centre: Measurement) -> go.Figure:
    """Return one panel a slider: the paired change of quality as it moves and everything else stays.

    The report's recipe is ringed.
    """
    shown = {slider: points for slider, points in sweeps.items() if points}
    rows = max(1, -(-len(shown) // 2))
    figure = make_subplots(
        rows=rows, cols=2, horizontal_spacing=0.11, vertical_spacing=0.24 / rows, subplot_titles=list(shown)
    )
    about = metric_named(centre.primary.metric)
    told = ", ".join(filter(None, (about.change_unit, "" if about.higher else "less is better")))
    unit = f"{about.name} change ({told})" if told else f"{about.name} change"
    for index, (slider, points) in enumerate(shown.items()):
        place = {"row": index // 2 + 1, "col": index % 2 + 1}
        for trace in slider_traces(slider, points, centre):
            figure.add_trace(trace, **place)
        figure.add_hline(y=0, line={"color": ORANGE, "dash": "dot", "width": 1}, **place)
    layout(figure, "", "", "", height=330 * rows)
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GREY}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis, title={"text": unit, "font": {"size": 12}})
    figure.update_layout(showlegend=False, margin={"t": 40})
    return figure


def slider_traces(slider: str, points: Sequence[Measurement], centre: Measurement) -> list[go.Scatter]:
    """Return the traces of one panel of `sliders_figure`."""
    finite = [p for p in points if math.isfinite(p.primary.change.value)]
    shown = sorted(finite, key=lambda p: value_of(p, slider))
    scale = metric_named(centre.primary.metric).change_scale
    changes = [p.primary.change.mapped(lambda x: scale * x) for p in shown]
    line = go.Scatter(
        x=[value_of(p, slider) for p in shown],
        y=[change.value for change in changes],
        mode="lines+markers",
        line={"color": BLUE},
        marker={"size": 10},
        error_y={
            "array": [change.high - change.value for change in changes],
            "arrayminus": [change.value - change.low for change in changes],
            "thickness": 1.2,
            "width": 3,
        },
        hovertext=[
            f"{escape(p.recipe.label())}<br>{size(p.sizes.file_bytes)}, {p.shrink:.1f}x smaller"
            for p in shown
        ],
        hovertemplate="%{hovertext}<br>%{y:+.2f}<extra></extra>",
    )
    ring = {"symbol": "circle-open", "size": 22, "color": GREEN, "line": {"width": 3}}
    rings = [
        go.Scatter(x=[x], y=[y], mode="markers", marker=ring, hoverinfo="skip")
        for p, x, y in zip(shown, line.x, line.y, strict=True)
        if p.key == centre.key
    ]
    return [line, *rings]


def value_of(point: Measurement, slider: str) -> float:
    """Return where a slider stands in a point's recipe."""
    return float(next(getattr(step, slider) for step in point.recipe if step.slider == slider))


def layers_figure(point: Measurement) -> go.Figure:
    """Return a bar for each layer: the relative error of its weights, and the rest on hover."""
    rows = [row for row in point.layers if row.relative_error is not None]
    texts = []
    for row in rows:
        given = {"sparsity": row.sparsity and f"{row.sparsity:.0%}", "rank": row.rank, "bits": row.bits}
        facts = ", ".join(f"{name} {value}" for name, value in given.items() if value)
        texts.append(f"{escape(row.name)} {row.shape}<br>{facts}<br>{wrap(escape(row.outcome))}")
    figure = go.Figure(
        go.Bar(
            y=[row.name for row in rows],
            x=[row.relative_error for row in rows],
            orientation="h",
            marker={"color": BLUE},
            hovertext=texts,
            hovertemplate="%{hovertext}<br>relative error %{x:.3f}<extra></extra>",
        )
    )
    title, height = "relative error of each layer's weights", 150 + 17 * len(rows)
    layout(figure, title, "||W' - W|| / ||W||", "", height)
    return figure.update_yaxes(autorange="reversed", tickfont={"size": 11})


def curve_figure(point: Measurement) -> go.Figure:
    """Return the training loss, and on the right the quality of each look at held-out items."""
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    steps, losses = zip(*point.curve, strict=True)
    figure.add_scatter(
        x=steps, y=losses, mode="lines", line={"color": BLUE}, name="loss", showlegend=bool(point.held_out)
    )
    layout(figure, "Training", "step", "loss", height=300)
    if point.held_out:
        add_looks(figure, point.held_out)
    return figure


def add_looks(figure: go.Figure, looks: Sequence[Look]) -> None:
    """Add looks at held-out items on the right axis of a figure."""
    metric, places = looks[0].metric, [look.step for look in looks]
    factor = metric_named(metric).scale
    values = [factor * look.value for look in looks]
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [factor * (look.high - look.value) for look in looks],
        "arrayminus": [factor * (look.value - look.low) for look in looks],
        "width": 3,
    }
    name = f"{metric} on {looks[-1].items} held-out items, {looks[-1].confidence:.0%} interval"
    figure.add_scatter(
        x=places,
        y=values,
        error_y=bars,
        mode="lines+markers",
        line={"color": ORANGE},
        name=name,
        secondary_y=True,
    )
    figure.add_scatter(
        x=[0, max(places)],
        y=[factor * looks[-1].dense] * 2,
        mode="lines",
        line={"color": GREY, "dash": "dash"},
        name="dense model",
        secondary_y=True,
    )
    figure.update_yaxes(
        title=f"{metric} (%)" if metric_named(metric).percent else metric,
        showgrid=False,
        zeroline=False,
        automargin=True,
        secondary_y=True,
    )
    figure.update_layout(margin={"r": 70})


def softened_figure(record: Softened) -> go.Figure:
    """Return one answer at each temperature: bars by answer, a colour each temperature."""
    figure = go.Figure()
    bars = zip(record.temperatures, record.probabilities, record.entropy, strict=True)
    for temperature, line, entropy in bars:
        figure.add_bar(x=list(record.answers), y=list(line), name=f"T = {temperature:g} ({entropy:.2f} nats)")
    item = f"training item {record.item}, in truth {record.truth}"
    title = f"What T does to one answer: the dense model on {item}"
    return layout(figure, title, "answer", "probability that the student is taught", 320)


def use_offline_renderer() -> None:
    """Make figures show in JupyterLab, and in HTML with no network: plotly.js goes into the page (5 MB)."""
    import plotly.io as pio

    pio.renderers.default = "plotly_mimetype+notebook"
