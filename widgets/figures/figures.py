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


def layout(figure: go.Figure, title: str, x: str, y: str, height: int = 430) -> go.Figure:
    """Apply the common look: transparent, one grid, horizontal legend, large enough to read from afar."""
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": GREY,
        "ticks": "outside",
        "tickcolor": GREY,
        "automargin": True,
    }
    figure.update_layout(
        title={
            "text": title,
            "x": 0,
            "xanchor": "left",
            "font": {"size": 18},
            "yref": "container",
            "y": 0.97,
        },
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
    """Return quality against cost: every point with its interval, the front as a line, the dense model as a
    star.

    `highlight` is the key of the point that the report is about; it gets a ring.
    """
    figure = go.Figure()
    scale = scale_of(record)
    front = [point for point in record.points if point.standing == "front"]
    figure.add_scatter(
        x=[shown_cost(record, p.cost.value) for p in front],
        y=[scale * p.quality.value for p in front],
        mode="lines",
        line={"color": BLUE, "width": 1, "dash": "dot"},
        hoverinfo="skip",
        showlegend=False,
    )
    for name, (color, width, words) in STANDINGS.items():
        chosen = [point for point in record.points if point.standing == name]
        if chosen:
            figure.add_trace(markers(record, chosen, color, width, words))
    figure.add_scatter(
        x=[shown_cost(record, record.dense_cost)],
        y=[scale * record.dense_quality],
        mode="markers",
        name="dense model",
        marker={"symbol": "star", "size": 17, "color": ORANGE},
        hovertemplate=(
            f"dense model<br>{metric_named(record.metric).words(record.dense_quality)}<extra></extra>"
        ),
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
    cost = (
        "file size (MB)" if record.cost_name == "file_bytes" else "time relative to dense (lower is faster)"
    )
    layout(
        figure,
        f"{escape(record.model)}: {record.metric} against"
        f" {'size' if record.cost_name == 'file_bytes' else 'latency'}",
        cost,
        metric_title(record.metric),
    )
    if record.metric == "perplexity":
        figure.update_yaxes(type="log", autorange="reversed")
    elif not metric_named(record.metric).higher:
        figure.update_yaxes(autorange="reversed")
    if record.cost_name == "file_bytes":
        ticks = [base * 10**power for power in range(-3, 6) for base in (1, 1.5, 2, 3, 5, 7)]
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return figure


def metric_title(metric: str) -> str:
    """Return the axis title of a metric."""
    if metric == "perplexity":
        return "perplexity (log, better upwards)"
    unit = ["%"] if metric_named(metric).percent else []
    words = unit if metric_named(metric).higher else [*unit, "better upwards"]
    return f"{metric} ({', '.join(words)})" if words else metric


def markers(
    record: Tradeoff, points: Sequence[TradeoffPoint], color: str, width: int, name: str
) -> go.Scatter:
    """Return one trace of points with their intervals and the verdict as hover text."""
    scale = scale_of(record)
    finite = [p for p in points if math.isfinite(p.quality.value)]
    exact = record.cost_name == "file_bytes"
    return go.Scatter(
        x=[shown_cost(record, p.cost.value) for p in finite],
        y=[scale * p.quality.value for p in finite],
        mode="markers",
        name=name,
        marker={"color": color, "size": width, "opacity": 0.9},
        error_y={
            "array": [scale * (p.quality.high - p.quality.value) for p in finite],
            "arrayminus": [scale * (p.quality.value - p.quality.low) for p in finite],
            "thickness": 1.2,
            "width": 3,
            "color": color,
        },
        error_x=(
            None
            if exact
            else {
                "array": [p.cost.high - p.cost.value for p in finite],
                "arrayminus": [p.cost.value - p.cost.low for p in finite],
                "thickness": 1.2,
                "width": 3,
                "color": color,
            }
        ),
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
        for trace in slider_traces(slider, points, centre):
            figure.add_trace(trace, row=index // 2 + 1, col=index % 2 + 1)
        figure.add_hline(
            y=0, line={"color": ORANGE, "dash": "dot", "width": 1}, row=index // 2 + 1, col=index % 2 + 1
        )
    layout(figure, "", "", "", height=330 * rows)
    figure.update_xaxes(gridcolor=GRID, zeroline=False, linecolor=GREY)
    figure.update_yaxes(
        gridcolor=GRID, zeroline=False, linecolor=GREY, title={"text": unit, "font": {"size": 12}}
    )
    figure.update_layout(showlegend=False, margin={"t": 40})
    return figure


def slider_traces(slider: str, points: Sequence[Measurement], centre: Measurement) -> list[go.Scatter]:
    """Return the traces of one panel of `sliders_figure`."""
    found = sorted(
        ((value_of(p, slider), p) for p in points if math.isfinite(p.primary.change.value)),
        key=lambda pair: pair[0],
    )
    factor = metric_named(centre.primary.metric).change_scale
    change = [factor * p.primary.change.value for _, p in found]
    line = go.Scatter(
        x=[value for value, _ in found],
        y=change,
        mode="lines+markers",
        line={"color": BLUE},
        marker={"size": 10},
        error_y={
            "array": [factor * p.primary.change.high - c for (_, p), c in zip(found, change, strict=True)],
            "arrayminus": [
                c - factor * p.primary.change.low for (_, p), c in zip(found, change, strict=True)
            ],
            "thickness": 1.2,
            "width": 3,
        },
        hovertext=[
            f"{escape(p.recipe.label())}<br>{size(p.sizes.file_bytes)}, {p.shrink:.1f}x smaller"
            for _, p in found
        ],
        hovertemplate="%{hovertext}<br>%{y:+.2f}<extra></extra>",
    )
    mine = [(value, factor * p.primary.change.value) for value, p in found if p.key == centre.key]
    ring = {"symbol": "circle-open", "size": 22, "color": GREEN, "line": {"width": 3}}
    return [line, *(go.Scatter(x=[x], y=[y], mode="markers", marker=ring, hoverinfo="skip") for x, y in mine)]


def value_of(point: Measurement, slider: str) -> float:
    """Return where a slider stands in a point's recipe."""
    return float(next(getattr(step, slider) for step in point.recipe if step.slider == slider))


def layers_figure(point: Measurement) -> go.Figure:
    """Return what the recipe did to each layer: relative error of the weights, and sparsity, rank and bits on
    hover.
    """
    rows = [row for row in point.layers if row.relative_error is not None]
    texts = []
    for row in rows:
        given = {"sparsity": row.sparsity and f"{row.sparsity:.0%}", "rank": row.rank, "bits": row.bits}
        texts.append(
            f"{escape(row.name)} {row.shape}<br>{', '.join(f'{k} {v}' for k, v in given.items() if v)}"
            f"<br>{wrap(escape(row.outcome))}"
        )
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
    layout(
        figure,
        "relative error of each layer's weights",
        "||W' - W|| / ||W||",
        "",
        height=150 + 17 * len(rows),
    )
    return figure.update_yaxes(autorange="reversed", tickfont={"size": 11})


def curve_figure(point: Measurement) -> go.Figure:
    """Return the training loss, and on the right the quality at each look at held-out items with its
    interval, the dense model's dashed.
    """
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
    """Return what each temperature makes of one answer: bars by answer, a colour each temperature."""
    figure = go.Figure()
    for temperature, line, entropy in zip(
        record.temperatures, record.probabilities, record.entropy, strict=True
    ):
        figure.add_bar(x=list(record.answers), y=list(line), name=f"T = {temperature:g} ({entropy:.2f} nats)")
    title = (
        f"What T does to one answer: the dense model on training item {record.item}, in truth {record.truth}"
    )
    return layout(figure, title, "answer", "probability that the student is taught", 320)


def use_offline_renderer() -> None:
    """Make figures show in JupyterLab, and in HTML with no network: plotly.js goes into the page once (5
    MB).
    """
    import plotly.io as pio

    pio.renderers.default = "plotly_mimetype+notebook"
