"""The trade-off plot beyond size and standing: colours, costs, metrics, pins, boxes, thinning."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_tasks
from hypothesis import given
from hypothesis import strategies as st

import workbench as wb
from widgets.panes.verdict_strip import head_quality
from widgets.plot.colours import NONE, SCALE, color_at, color_bar, legend, painted
from widgets.plot.live_axes import axes, change_range, x_range, y_range
from widgets.plot.live_figure import (
    DENSE,
    DOMINATED,
    FRONT,
    HISTORY,
    MEASURED,
    NOISE,
    PINNED,
    PREDICTED,
    history_changes,
    live_changes,
)
from widgets.plot.plot_bar import PlotBar
from widgets.plot.plot_choice import COST_NAMES, SHADE_NAMES, PlotChoice, logarithmic
from widgets.plot.thinning import thin
from widgets.plot.tradeoff_view import TradeoffView
from widgets.session.state import PanelState, Past
from workbench.ledger.annotation import Annotation
from workbench.ledger.pareto import (
    COSTS,
    SHADES,
    cost_of,
    dense_cost_of,
    quality_of,
    shade_of,
    shades,
    tradeoff,
)

RECIPES = (
    wb.Recipe(),
    wb.Recipe(wb.Prune(sparsity=0.5)),
    wb.Recipe(wb.Quantize(weight_bits=4)),
    wb.Recipe(wb.Quantize(weight_bits=8)),
    wb.Recipe(wb.LowRank(rank_ratio=0.4), wb.Prune(sparsity=0.8)),
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    opened = wb.Bench(
        tiny_tasks.tiny_task("vit"),
        ledger=tmp_path_factory.mktemp("plot") / "points.journal",
        progress=False,
        device="cpu",
    )
    for recipe in RECIPES:
        opened.measure(recipe)
    return opened


@pytest.fixture(scope="module")
def rows(bench):
    return bench.ledger.rows()


def of(rows, said=None):
    """Return the state of a panel that shows nothing but the past."""
    return PanelState(wb.Recipe(), past=Past(rows, said or {}))


@pytest.fixture
def view():
    return TradeoffView(lambda _key: None)


@pytest.mark.parametrize("cost", COSTS)
def test_every_cost_is_what_the_measurement_says(rows, cost):
    for row in rows:
        expected = {
            "file_bytes": row.sizes.file_bytes,
            "packed_bytes": row.sizes.packed_bytes,
            "theoretical_bytes": row.sizes.theoretical_bytes,
            "peak_memory_bytes": row.peak_memory_bytes,
            "latency": 1 / row.latency.speedup.value,
        }[cost]
        assert cost_of(row, cost).value == pytest.approx(expected)
    assert dense_cost_of(rows[0], cost) == (
        1.0 if cost == "latency" else pytest.approx(cost_of(rows[0], cost).value, rel=0.05)
    )
    without = dataclasses.replace(rows[0], peak_memory_bytes=None, dense_peak_memory_bytes=None, latency=None)
    assert (cost_of(without, cost) is None) is (cost in {"latency", "peak_memory_bytes"})
    assert COST_NAMES[cost]


def test_colours_stand_for_numbers_of_the_recipe_or_the_measurement(rows):
    sparse, four, low = rows[1], rows[2], rows[4]
    assert [shade_of(row, "sparsity") for row in (sparse, four, low)] == [0.5, 0.0, 0.8]
    assert [shade_of(row, "rank") for row in (sparse, low)] == [1.0, 0.4]
    assert [shade_of(row, "bits") for row in (sparse, four)] == [None, 4.0]  # not quantized is no width
    assert shade_of(sparse, "flips") == sparse.flips.value
    assert shade_of(sparse, "change") == sparse.primary.change.value
    assert shade_of(dataclasses.replace(sparse, latency=None), "latency") is None
    assert shades(rows, "newest") == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert list(SHADE_NAMES) == list(SHADES)


@pytest.mark.parametrize("shade", SHADES)
def test_painted_points_take_the_ends_of_the_scale(rows, shade):
    record = tradeoff(rows, shade=shade)
    colors = painted(record)
    if shade == "standing":
        assert colors == {}
        assert "dominated" in legend(record)
        return
    shaded = sorted((p for p in record.points if p.shade is not None), key=lambda p: p.shade)
    assert colors[shaded[0].key] == SCALE[0]
    assert colors[shaded[-1].key] == SCALE[-1]
    assert all(colors[p.key] == NONE for p in record.points if p.shade is None)
    assert SHADE_NAMES[shade] in color_bar(record)
    changes = history_changes(record)
    for index in HISTORY:
        assert changes[index]["marker"]["color"] == [colors[key] for key in changes[index]["customdata"]]


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_scale_grows_lighter_all_the_way(first, second):
    def light(color):
        red, green, blue = (((int(color[i : i + 2], 16) / 255) ** 2.2) for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((first, second))
    assert light(color_at(low)) <= light(color_at(high)) + 0.004  # rounding of the channels


def test_a_record_of_another_metric_and_of_changes(rows):
    loss = tradeoff(rows, metric="loss")
    assert loss.metric == "loss"
    assert {p.key: p.quality for p in loss.points} == {
        row.key: quality_of(row, "loss").compressed for row in rows
    }
    change = tradeoff(rows, change=True)
    assert change.dense_quality == 0
    assert {p.key: p.quality.value for p in change.points} == {
        row.key: row.primary.change.value for row in rows
    }
    with pytest.raises(ValueError, match="got 0 in 0 points"):
        tradeoff(rows, metric="word error rate")


def test_pins_are_rings_and_survive_thinning(view, rows):
    chance = random.Random(0)  # noqa: S311  no secret
    many = [
        dataclasses.replace(
            rows[1],
            key=f"{i}",
            sizes=dataclasses.replace(rows[1].sizes, file_bytes=chance.randint(1000, 9000)),
            recipe=wb.Recipe(wb.Prune(sparsity=0.5)),
        )
        for i in range(900)
    ]
    assert "3" not in {row.key for row in thin(many, "file_bytes")} or many[3].sizes.file_bytes == min(
        row.sizes.file_bytes for row in many
    )
    kept = {key: Annotation(pinned=True) for key in ("3", "no such key")}
    view.show(of(many, kept))
    ring = view.figure.data[PINNED]
    assert list(ring.x) == [many[3].sizes.file_bytes / 1e6]
    drawn = [key for index in HISTORY for key in view.figure.data[index].customdata]
    assert "3" in drawn
    assert len(drawn) <= 402
    assert f"{len(drawn)} of 900 points: front and newest" in view.bar.words.value
    view.show(of(many))
    assert list(ring.x) == []


def test_a_box_names_the_points_of_all_traces(rows):
    boxes = []
    view = TradeoffView(lambda _key: None, boxes.append)
    view.show(of(rows))
    for index in HISTORY:
        trace = view.figure.data[index]
        view.selected(trace, SimpleNamespace(point_inds=list(range(len(trace.customdata)))), None)
    assert len(boxes) == 1
    assert sorted(boxes[0]) == sorted(row.key for row in rows if len(row.recipe))
    view.bar.select.value = True
    assert view.figure.layout.dragmode == "select"
    view.bar.select.value = False
    assert view.figure.layout.dragmode == "zoom"
    assert not view.boxed


def test_only_the_live_traces_are_written_during_a_drag(view, rows, bench, monkeypatch):
    past = of(rows)
    view.show(past)
    guess = bench.predictor()
    view.show(replace(past, recipe=RECIPES[1], prediction=guess.predict(RECIPES[1]), phase="measuring"))
    sent = []
    monkeypatch.setattr(
        type(view.figure),
        "_send_update_msg",
        lambda _self, *_given, trace_indexes=None, **_more: sent.append(trace_indexes),
        raising=True,
    )
    recipe = wb.Recipe(wb.Prune(sparsity=0.61))
    view.show(replace(past, recipe=recipe, prediction=guess.predict(recipe), phase="measuring"))
    assert sent
    assert {int(index) for indexes in sent for index in indexes} <= {DENSE, PREDICTED, MEASURED}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("quality", [("", False), ("", True), ("loss", False), ("loss", True)])
def test_the_star_and_the_live_points_lie_in_the_window(view, bench, cost, quality):
    rows, (metric, change) = bench.ledger.rows(), quality
    past = of(rows)
    view.show(past)
    view.bar.choice = PlotChoice(cost, metric, change, "bits", cost != "latency")
    recipe = RECIPES[2]
    guess = bench.predictor().predict(recipe)
    view.show(replace(past, recipe=recipe, prediction=guess, phase="measuring"))
    predicted = view.figure.data[PREDICTED]
    assert bool(predicted.x) is (cost in {"file_bytes", "latency"} and metric == "")
    view.show(replace(past, recipe=recipe, point=rows[2], phase="measured"))
    layout = view.figure.layout
    for index in (DENSE, MEASURED):
        (x,), (y,) = view.figure.data[index].x, view.figure.data[index].y
        for value, axis in ((x, layout.xaxis), (y, layout.yaxis)):
            low, high = sorted(axis.range)
            assert low <= (math.log10(value) if axis.type == "log" else value) <= high
    mine = quality_of(rows[2], metric or None)
    if change:
        assert view.figure.data[DENSE].y == (0.0,)
        assert view.figure.data[MEASURED].y[0] == pytest.approx(mine.change.value * (1 if metric else 100))
    top = layout.yaxis.range
    assert (top[1] < top[0]) is (metric == "loss")  # better is upwards


def test_a_prediction_is_shown_as_a_change_against_the_dense_model(rows, bench):
    guess = bench.predictor().predict(RECIPES[1])
    live = replace(of(rows), recipe=RECIPES[1], prediction=guess, phase="measuring")
    plain, change = (live_changes(live, PlotChoice(change=c))[PREDICTED]["y"][0] for c in (False, True))
    assert plain - change == pytest.approx(100 * rows[-1].primary.dense.value)


def test_the_axes_can_be_chosen_before_anything_is_measured():
    plot = TradeoffView(lambda _key: None)
    plot.bar.choice = PlotChoice(cost="latency", change=True)
    plot.bar.choice = PlotChoice(cost="latency")
    assert plot.bar.log_quality.disabled


@pytest.mark.parametrize("sort", ["vit", "llama"])
@pytest.mark.parametrize("change", [False, True])
def test_what_is_unknown_is_not_drawn_and_does_not_move_the_axes(sort, change, tmp_path):
    """Of accuracy the middle of the range, of perplexity e^4 times the dense model's would be drawn else."""
    opened = wb.Bench(
        tiny_tasks.tiny_task(sort), ledger=tmp_path / "points.journal", progress=False, device="cpu"
    )
    anchor, recipe = opened.measure(wb.Recipe()), wb.Recipe(wb.Prune(sparsity=0.5, pattern="heads"))
    guess, plot = opened.predictor().predict(recipe), TradeoffView(lambda _key: None)
    plot.bar.choice = PlotChoice(change=change)
    live = PanelState(wb.Recipe(), point=anchor, phase="measured", past=Past([anchor], {}))
    plot.show(live)
    before = {axis: plot.figure.layout[axis].range for axis in ("xaxis", "yaxis")}
    plot.show(replace(live, recipe=recipe, prediction=guess, point=None, phase="measuring"))
    assert guess.unknown == ("Prune",)
    assert plot.figure.data[PREDICTED].y == ()
    assert {axis: plot.figure.layout[axis].range for axis in ("xaxis", "yaxis")} == before
    big, small = head_quality(None, guess)
    assert big == "?"
    assert small == f"nothing is known of how Prune changes {guess.metric} before it is measured"


def test_the_bar_says_what_is_chosen_and_takes_it_from_python():
    bar = PlotBar()
    bar.offer(["perplexity", "next-token accuracy"])
    assert not bar.log_quality.disabled
    bar.cost.value = "latency"
    assert bar.choice == PlotChoice("latency", log_cost=False)
    bar.metric.value = ("next-token accuracy", True)
    assert bar.choice.metric == "next-token accuracy"
    assert bar.choice.change
    bar.choice = PlotChoice(shade="rank", metric="next-token accuracy")
    assert (bar.shade.value, bar.metric.value, bar.cost.value) == (
        "rank",
        ("next-token accuracy", False),
        "file_bytes",
    )
    bar.offer(["accuracy", "loss"])  # another model
    assert bar.choice.metric == ""
    assert bar.log_quality.disabled


def test_axes_follow_the_choice():
    assert axes("perplexity", PlotChoice())["yaxis"]["type"] == "log"
    assert axes("perplexity", PlotChoice(log_quality=False))["yaxis"]["type"] == "linear"
    assert axes("accuracy", PlotChoice())["yaxis"]["type"] == "linear"
    assert not logarithmic(PlotChoice(change=True), "perplexity")
    assert axes("accuracy", PlotChoice("latency", log_cost=True))["xaxis"]["type"] == "log"
    assert axes("accuracy", PlotChoice(log_cost=False))["xaxis"]["type"] == "linear"
    assert x_range(4.0, [], PlotChoice(log_cost=False))[0] == 0
    assert y_range(20.0, [], "perplexity")[0] > y_range(20.0, [], "perplexity")[1]
    assert change_range([], "accuracy") == [-10, 1.5]
    assert change_range([-35], "accuracy")[0] == -40
    assert change_range([300.0], "perplexity")[0] > 300


def test_standing_traces_keep_their_colours(rows):
    changes = history_changes(tradeoff(rows))
    assert {changes[index]["marker"]["color"] for index in (DOMINATED, NOISE, FRONT)} <= {
        "#3b82f6",
        "#8b95a5",
    }


def test_points_and_choices_may_come_from_two_threads(view, rows, monkeypatch):
    """The thread that draws and the browser's: plotly's figure stands no two at once."""
    drawing, met, make = [], [], type(view.figure)
    update = make.batch_update

    @contextlib.contextmanager
    def slow(figure):
        met.append(any(thread != threading.get_ident() for thread in drawing))
        drawing.append(threading.get_ident())
        time.sleep(0.01)
        with update(figure):
            yield
        drawing.pop()

    monkeypatch.setattr(make, "batch_update", slow)
    thread = threading.Thread(
        target=lambda: [view.show(of(rows[: 1 + count % len(rows)])) for count in range(12)]
    )
    thread.start()
    for cost in ("latency", "file_bytes") * 6:
        view.bar.choice = PlotChoice(cost=cost, log_cost=cost == "file_bytes")
    thread.join(60)
    assert len(met) > 12
    assert not any(met)
