"""The layers tab without a browser: what it shows, when it reads weights, and that a slider move stops it."""

from __future__ import annotations

import time

import pytest
import tiny_tasks

import workbench as wb
from widgets.explorer import Explorer
from widgets.figures.layer_figures import AFTER, BEFORE, weights_changes, weights_figure
from widgets.panes.layer_rows import table_of
from workbench.measure.weight_histograms import weight_changes

RECIPE = wb.Recipe(wb.Prune(sparsity=0.6), wb.Quantize(weight_bits=3))


@pytest.fixture
def panel(tmp_path):
    explorer = Explorer(
        "fashion-cnn", ledger=tmp_path / "points.journal", evaluation_items=64, offline=True, device="cpu"
    )
    yield explorer
    explorer.close()


def wait(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return value


def ready(panel):
    """Return whether the worker has nothing to do and everything is drawn."""
    return not panel.session.measurer.busy and panel.pacer.flush()


def test_rows_say_what_the_report_says(tmp_path):
    bench = wb.Bench(
        tiny_tasks.tiny_task("vit"), ledger=tmp_path / "points.journal", progress=False, device="cpu"
    )
    recipe = wb.Recipe(wb.LowRank(rank_ratio=0.3), *RECIPE)
    point = bench.measure(recipe)
    costs = {cost.name: cost for cost in bench.sensitivity(recipe, 16)}
    table = table_of(point.layers, costs)
    assert [name for name, _ in table.columns] == [
        "weights",
        "zeros",
        "rank kept",
        "bits",
        "error",
        "alone costs, points",
    ]
    for row, report in zip(table.rows, point.layers, strict=True):
        assert (row.name, row.words) == (report.name, report.outcome)
        cells = dict(zip(("weights", "zeros", "rank", "bits", "error", "cost"), row.cells, strict=True))
        assert cells["weights"].text == f"{report.weights / sum(r.weights for r in point.layers):.1%}"
        assert cells["rank"].text == (
            "" if report.rank is None else f"{report.rank / min(report.shape[0], report.shape[-1]):.0%}"
        )
        assert cells["bits"].text == ("" if report.bits is None else str(report.bits))
        assert cells["error"].value == (report.relative_error or None)
        assert (cells["cost"].value is None) == (report.name not in costs)
        assert all(cell.heat is None or 0 <= cell.heat <= 1 for cell in row.cells)
        if cells["cost"].bar is not None:
            low, value, high, zero = cells["cost"].bar
            assert 0 <= low <= value <= high <= 1
            assert 0 <= zero <= 1
            assert (value > zero) == (costs[report.name].drop.value > 0)
    dense = table_of(bench.measure(wb.Recipe()).layers, {})
    assert [name for name, _ in dense.columns] == ["weights"]


def test_the_figure_gets_all_traces_when_it_is_made():
    figure = weights_figure()
    assert [trace.name for trace in figure.data] == ["after", "before"]
    assert weights_changes(None)[AFTER]["x"] == []


def test_choosing_a_layer_shows_its_weights_exactly(panel):
    point = panel.run(RECIPE)
    assert panel.layers.figure is None  # 5 MB that nobody asked for
    assert [row["name"] for row in panel.layers.grid.rows] == [row.name for row in point.layers]
    layer = point.layers[3].name
    panel.layers.grid.chosen = layer
    wait(lambda: panel.layers.jobs.shown() is not None and ready(panel))
    bench = panel.session.bench
    expected = next(weight_changes(bench.task.model, bench.compress(RECIPE), layer))
    assert panel.layers.jobs.shown() == expected
    assert panel.layers.figure.data[AFTER].y == expected.after
    assert panel.layers.figure.data[BEFORE].y == (*expected.before, 0)
    assert panel.layers.pick.value == layer
    assert f"{expected.zeros_after:,} after" in panel.layers.words.value
    fifth = point.layers[4].name
    panel.layers.pick.value = fifth
    assert panel.layers.grid.chosen == fifth
    panel.pacer.flush()
    assert sum(panel.layers.figure.data[AFTER].y) == sum(panel.layers.jobs.weights[fifth].after)
    assert panel.layers.figure._widget_data[AFTER]["y"] is not panel.layers.figure._data[AFTER]["y"]


def test_a_measured_recipe_is_not_compressed_again_for_its_weights(panel, monkeypatch):
    point = panel.run(wb.Recipe(wb.Prune(sparsity=0.3)))
    panel.layers.choose(point.layers[2].name)
    wait(lambda: panel.layers.jobs.shown() is not None and ready(panel))
    monkeypatch.setattr(panel.session.bench, "weights", None)  # calling it would raise
    panel.run(RECIPE)
    wait(lambda: ready(panel))
    assert panel.layers.jobs.shown() is not None
    assert panel.layers.jobs.recipe == RECIPE
    assert "work" not in panel.errors.messages


def test_leaving_a_layer_out_moves_the_sliders_and_the_report_says_so(panel):
    point = panel.run(RECIPE)
    layer = point.layers[3].name
    panel.layers.choose(layer)
    control = next(control for control in panel.layers.overrides if control.kind is wb.Prune)
    control.mode.value = "out"
    assert panel.form.recipe == wb.Recipe(
        wb.Prune(sparsity=0.6, targets=("*", f"!{layer}")), wb.Quantize(weight_bits=3)
    )
    wait(lambda: panel.session.state.phase == "measured" and ready(panel))
    outcomes = {row["name"]: row["words"] for row in panel.layers.grid.rows}
    assert outcomes[layer].startswith(f"prune left out by target '!{layer}'")
    panel.form.undo()
    assert control.mode.value == "follow"


def test_sensitivity_fills_the_column_and_a_slider_move_stops_it(panel):
    panel.run(RECIPE)
    panel.layers.ask.click()
    wait(lambda: any("alone costs" in name for name, _ in panel.layers.grid.columns))
    panel.form.set_recipe(wb.Recipe(wb.Prune(sparsity=0.2), wb.Quantize(weight_bits=3)))
    wait(lambda: panel.session.state.phase == "measured" and ready(panel))
    assert not panel.layers.jobs.running()
    panel.form.undo()
    wait(lambda: panel.session.state.phase == "measured" and ready(panel))
    part = len(panel.layers.jobs.costs)
    panel.layers.ask.click()
    wait(lambda: ready(panel) and not panel.layers.jobs.running())
    measured, most = panel.layers.jobs.known_costs(RECIPE)
    assert part <= len(measured) == most
    assert f"{most} of {most} layers measured alone" in panel.layers.status.value
    assert panel.session.state.phase == "measured"


def test_what_cannot_be_asked_is_said_in_the_panel(panel):
    panel.run(wb.Recipe())
    panel.layers.ask.click()
    assert "no layer is compressed: turn a slider on first" in panel.errors.value
    panel.session.start(wb.Recipe(wb.Prune(sparsity=0.71), wb.Distill(temperature=2, steps=500)))
    panel.layers.ask.click()
    assert "still running" in panel.errors.value
    panel.session.cancel()


def test_a_closed_tab_reads_no_weights(panel):
    point = panel.run(RECIPE)
    panel.layers.set_visible(visible=False)
    panel.layers.choose(point.layers[3].name)
    panel.run(wb.Recipe(wb.Prune(sparsity=0.3)))
    wait(lambda: ready(panel))
    assert panel.layers.jobs.weights == {}
    panel.layers.set_visible(visible=True)
    wait(lambda: panel.layers.jobs.shown() is not None)
