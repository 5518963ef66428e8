"""One unit for one metric, wherever it is written: tables, cards, plots, gates, side by side."""

from __future__ import annotations

import dataclasses
import re

import pytest
import speech_models
from tiny_tasks import tiny_task

import workbench as wb
from widgets.figures.figures import add_looks, metric_title, tradeoff_figure
from widgets.figures.tables import points_table
from widgets.panes.dense_line import dense_html
from widgets.panes.training_view import look_words
from widgets.panes.verdict_strip import badge, facts_of
from widgets.plot.live_axes import y_range
from widgets.plot.live_figure import DENSE, dense_changes
from widgets.plot.plot_choice import PlotChoice
from widgets.session.state import PanelState
from workbench.ledger.annotation import Annotation
from workbench.ledger.table import flat
from workbench.measure.card import card, quality_words
from workbench.measure.summary import summary
from workbench.metrics.metrics import METRICS, metric_named
from workbench.metrics.quality import Estimate
from workbench.report.gates import Gates, check
from workbench.search.compare import comparison, facts
from workbench.util.progress import Look
from workbench.zoo import load_task

CHANGE = Estimate(-0.0123, -0.02, 0.005)
FRACTION = re.compile(r"(?<![\d.])0\.\d{2,}")


@pytest.mark.parametrize(
    ("name", "value", "interval", "change", "amount"),
    [
        ("accuracy", "93.1%", "93.1% [92.0%, 94.2%]", "-1.2 points, -2.0 to +0.5", "1.23 points"),
        ("word error rate", "93.1%", "93.1% [92.0%, 94.2%]", "-1.2 points, -2.0 to +0.5", "1.23 points"),
        ("perplexity", "0.931", "0.931 [0.92, 0.942]", "-1.2%, -2.0% to +0.5%", "1.23%"),
        ("rank correlation", "0.931", "0.931 [0.920, 0.942]", "-0.0123, -0.02 to +0.005", "0.0123"),
        ("loss", "0.931", "0.931 [0.92, 0.942]", "-0.0123 nats, -0.02 to +0.005", "0.0123 nats"),
    ],
)
def test_a_metric_in_words(name, value, interval, change, amount):
    metric = metric_named(name)
    assert metric.words(0.931) == value
    assert metric.interval(Estimate(0.931, 0.92, 0.942)) == interval
    assert metric.change_words(CHANGE) == change
    assert metric.amount(0.0123) == amount


def test_one_point_is_no_points():
    assert metric_named("accuracy").amount(0.01) == "1 point"
    assert metric_named("accuracy").amount(0.011) == "1.1 points"


@pytest.fixture(scope="module", params=["image", "speech"])
def point(request, tmp_path_factory):
    """Return a point whose metric is a fraction, moved to values that no other number has."""
    folder = tmp_path_factory.mktemp("metrics")
    task = tiny_task("vit")
    measured = wb.Bench(task, device="cpu", ledger=folder / "p.journal", progress=False).measure(
        wb.Recipe(wb.Quantize(weight_bits=4))
    )
    name = "accuracy" if request.param == "image" else "word error rate"
    quality = dataclasses.replace(
        measured.primary,
        metric=name,
        dense=Estimate(0.0947, 0.0811, 0.1083),
        compressed=Estimate(0.1379, 0.1197, 0.1583),
        change=Estimate(0.0432, 0.0127, 0.0741),
    )
    latency = dataclasses.replace(
        measured.latency,
        dense_median_ms=900.0,
        median_ms=1200.0,
        audio_seconds=3.0 if name == "word error rate" else 0.0,
    )
    return dataclasses.replace(measured, quality=(quality,), latency=latency, margin=0.02)


def test_every_table_says_percent(point):
    name = point.primary.metric
    rows = {row[0]: row for row in summary(point)}
    assert rows[name] == (name, "9.5% [8.1%, 10.8%]", "13.8% [12.0%, 15.8%]")
    assert rows[f"paired change of {name}"][2] == "+4.3 points, +1.3 to +7.4"
    assert rows["evaluation items read"][2].endswith("was known to ±2 points")
    text = "9.5% to 13.8% (+4.3 points, +1.3 to +7.4)"
    assert quality_words(point.primary) == f"{name} {text}"
    assert f"| {name} | {text} |" in card(point)
    page = points_table([point])
    assert f"<th>{name}</th>" in page
    assert f"<td>{text}</td>" in page  # and not `error rate 9.5% ...`
    second = dataclasses.replace(point, key="other")
    assert facts(comparison([point, second]))[0].words == ("13.8% (+4.3 points, +1.3 to +7.4)",) * 2
    assert [
        fact
        for fact in facts_of(point, None)
        if FRACTION.search(fact[1]) and "real-time" not in fact[1] and fact[0] != "KL to dense"
    ] == []


def test_gates_say_points(point):
    drop = (
        "4.32 points (1.27 to 7.41)"
        if point.primary.metric == "word error rate"
        else "-4.32 points (-7.41 to -1.27)"
    )
    assert check(Gates(max_quality_drop=0.01), point)[0].words.startswith(
        f"{point.primary.metric} drop {drop}, limit 0.01, which is 1 point"
    )


def test_plots_say_percent(point):
    star = dense_changes(point, PlotChoice())[DENSE]
    assert (star["y"], star["hovertemplate"]) == ([pytest.approx(9.47)], "dense model<br>9.5%<extra></extra>")
    figure = tradeoff_figure(wb.tradeoff([point], "file_bytes"))
    dense = next(trace for trace in figure.data if trace.name == "dense model")
    assert (dense.y, dense.hovertemplate) == ((pytest.approx(9.47),), "dense model<br>9.5%<extra></extra>")
    better = metric_named(point.primary.metric).higher
    assert figure.layout.yaxis.title.text == (
        f"{point.primary.metric} (%)" if better else f"{point.primary.metric} (%, better upwards)"
    )
    assert figure.layout.yaxis.autorange == (None if better else "reversed")


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_titles_say_the_unit_and_which_way_is_better(metric):
    title = metric_title(metric.name)
    assert title.startswith(metric.name)
    assert ("%" in title) is metric.percent
    assert ("better upwards" in title) is not metric.higher


def test_looks_at_held_out_items_say_percent():
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    look = Look(5, 0.5, "word error rate", 0.05, 0.0947, 0.0811, 0.1083, 20, 0.95)
    assert "held-out word error rate 9.5% [8.1%, 10.8%] after step 5 on 20 items, dense 5.0%" in look_words(
        [look]
    )
    figure: go.Figure = make_subplots(specs=[[{"secondary_y": True}]])
    add_looks(figure, [look])
    line, dense = figure.data
    assert (line.y, dense.y) == ((pytest.approx(9.47),), (5.0, 5.0))
    assert line.error_y.array == (pytest.approx(1.36),)
    assert figure.layout.yaxis2.title.text == "word error rate (%)"


def test_speech_is_as_fast_as_its_real_time_factor_says(point):
    if not point.latency.audio_seconds:
        assert point.latency.real_time_factors is None
        assert not [name for name in flat(point, Annotation()) if "real_time_factor" in name]
        return
    assert (
        flat(point, Annotation())["real_time_factor"],
        flat(point, Annotation())["dense_real_time_factor"],
    ) == (pytest.approx(0.4), pytest.approx(0.3))
    rows = {row[0]: row[1:] for row in summary(point)}
    assert rows["real-time factor: seconds of work per second of sound"] == ("0.300", "0.400")
    assert (
        dict(facts_of(point, None))["time measured"]
        == "1200.00 ms, dense 900.00 ms; real-time factor 0.400, dense 0.300"
    )


def test_a_measured_point_of_speech_has_one_unit(tmp_path):
    """Whole, from a real (tiny) Whisper: in no row of the table is a rate a bare fraction."""
    pytest.importorskip("jiwer")
    task = load_task(
        speech_models.whisper(tmp_path / "m"),
        speech_models.sounds(tmp_path / "d", speech_models.words(24)),
        progress=False,
    )
    measured = wb.Bench(task, device="cpu", ledger=tmp_path / "p.journal", progress=False).measure(
        wb.Recipe(wb.Quantize(weight_bits=3))
    )
    rows = {row[0]: row[1:] for row in summary(measured)}
    for cell in rows["word error rate"]:
        assert re.fullmatch(r"\d+\.\d% \[\d+\.\d%, \d+\.\d%\]", cell)
    assert rows["real-time factor: seconds of work per second of sound"]


@pytest.mark.parametrize(("dense", "measured"), [(0.0, []), (0.0, [8.7]), (0.5, [60.0]), (9.5, [13.8])])
def test_the_star_of_a_model_without_errors_stands_inside_the_plot(dense, measured):
    worst, best = y_range(dense, measured, "word error rate")
    span = worst - best
    assert dense - best >= 0.035 * span  # half a star and more
    assert all(best < y < worst for y in measured)


def test_the_badge_says_when_only_the_clock_is_missing(point):
    read = dataclasses.replace(point, latency=None, margin=None)
    assert f"measured: {read.items} of {read.items_total} items, timing" in badge(
        PanelState(read.recipe, point=read, phase="measuring")
    )
    assert "timing" not in badge(
        PanelState(read.recipe, point=dataclasses.replace(read, items=2), phase="measuring")
    )
    assert "timing" not in badge(
        PanelState(
            read.recipe, point=dataclasses.replace(read, missing={"latency": "no clock"}), phase="measured"
        )
    )


def test_the_dense_model_of_speech_shows_its_real_time_factor(point):
    assert ("real-time factor 0.300" in dense_html(point)) is bool(point.latency.audio_seconds)
