"""The panel without a browser: headless runs, what each part says, errors in the panel, presets."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time

import pytest
import tiny_tasks

import workbench as wb
from widgets.explorer import Explorer
from widgets.panes.code_view import command, python
from widgets.panes.error_pane import ErrorPane, explain
from widgets.panes.layer_rows import rows_of
from widgets.panes.verdict_strip import signed, strip
from widgets.plot.live_axes import y_range
from widgets.plot.live_figure import (
    DENSE,
    FRONT,
    MEASURED,
    PREDICTED,
    history_changes,
    live_changes,
    live_figure,
)
from widgets.plot.plot_choice import PlotChoice
from widgets.plot.thinning import thin
from widgets.session.model_choice import ModelChoice
from widgets.session.state import PanelState
from workbench.cli.serve import lab_command, write_settings
from workbench.errors import CompressionError, ModelError
from workbench.ledger.pareto import fastest_within, smallest_within

ZEROS = wb.Recipe(wb.Prune(sparsity=0.5))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    opened = wb.Bench(
        tiny_tasks.tiny_task("vit"),
        ledger=tmp_path_factory.mktemp("points") / "points.journal",
        progress=False,
        device="cpu",
    )
    for sparsity in (0.2, 0.5, 0.8):
        opened.measure(wb.Recipe(wb.Prune(sparsity=sparsity)))
    return opened


@pytest.fixture
def panel(tmp_path):
    explorer = Explorer(
        "fashion-cnn", ledger=tmp_path / "points.journal", evaluation_items=64, offline=True, device="cpu"
    )
    yield explorer
    explorer.close()


@pytest.fixture(scope="module")
def point(bench):
    return bench.measure(ZEROS)


def test_a_headless_run_measures_blocks_and_shows(panel):
    measured = panel.run(ZEROS)
    assert measured.complete
    assert panel.form.recipe == ZEROS
    data = panel.plot.figure.data
    assert data[MEASURED].x == (measured.sizes.file_bytes / 1e6,)
    assert data[PREDICTED].x == ()
    assert data[DENSE].y == (100 * measured.primary.dense.value,)
    assert "wb-measured'>measured" in panel.strip.value
    assert panel.session.predictor.size == len(panel.session.bench.ledger)  # the next move finds it read
    assert repr(ZEROS) in panel.line.value.replace("&#x27;", "'")
    assert panel.run(ZEROS).key == measured.key
    panel.run(wb.Recipe(wb.Quantize(weight_bits=4)))
    panel.go_to(measured.key)
    assert panel.form.recipe == ZEROS
    panel.plot.bar.choice = PlotChoice(cost="latency", log_cost=False)
    assert panel.plot.figure.layout.xaxis.type == "linear"
    assert panel.plot.figure._widget_data is not panel.plot.figure._data


def test_what_a_run_raises_reaches_the_caller_and_what_a_drag_raises_the_panel(panel):
    bad = wb.Recipe(wb.Quantize(weight_bits=4, group_size=65521))
    with pytest.raises(CompressionError, match="fits no layer"):
        panel.run(bad)
    panel.form.set_recipe(wb.Recipe(wb.Quantize(weight_bits=4, group_size=65519)))
    job = panel.session.measurer
    for _ in range(500):
        if not job.busy:
            break
        time.sleep(0.02)
    assert "fits no layer" in panel.errors.value
    assert panel.errors.layout.display is None
    panel.run(ZEROS)
    assert panel.session.state.phase == "measured"


def test_presets_take_measured_points_only(panel):
    panel.run(wb.Recipe())
    panel.guarded(lambda: panel.presets.preset(smallest_within))
    assert "none of 1 measured points is smaller and shown to be within 1 %" in panel.errors.value
    gentle = panel.run(wb.Recipe(wb.Quantize(weight_bits=8)))
    panel.run(wb.Recipe())
    panel.presets.within.value = 0.05
    panel.guarded(lambda: panel.presets.preset(smallest_within))
    small = smallest_within(panel.session.rows(), 0.05)
    assert panel.form.recipe == (small.recipe if small else wb.Recipe())
    assert small is None or small.key == gentle.key or not len(small.recipe)


def test_unknown_models_are_refused_in_words_and_the_panel_lives(tmp_path):
    panel = Explorer("fashion-cn", ledger=tmp_path / "points.journal", offline=True)
    with pytest.raises(wb.errors.ModelError, match="fashion-cnn"):
        panel.run(ZEROS)
    panel.close()


def test_a_model_that_cannot_be_loaded_leaves_the_one_that_is_there(panel):
    panel.run(ZEROS)
    panel.picker.other.value = "no-such-model"
    for _ in range(500):
        if not panel.session.loader.busy:
            break
        time.sleep(0.02)
    assert panel.picker.choice == panel.session.choice
    assert panel.picker.model.value == panel.session.state.model == "fashion-cnn"
    assert "no-such-model" in panel.errors.value
    assert panel.run(wb.Recipe(wb.Quantize(weight_bits=8))).complete


def test_no_keyword_is_swallowed():
    with pytest.raises(TypeError, match="unexpected keyword"):
        Explorer("fashion-cnn", sparsty=0.5)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_names_the_slider(error):
    assert explain(error, "weight_bits").startswith(
        "Out of memory after weight_bits was moved: go back (undo)"
    )


def test_other_errors_say_their_kind_and_text_is_escaped():
    assert explain(ValueError("a\nb"), "") == "ValueError: a b"
    assert explain(CompressionError("no layer"), "") == "no layer"
    pane = ErrorPane()
    pane.say("work", "<b>bold</b>")
    pane.say("note", "kept", "note")
    assert "&lt;b&gt;" in pane.value
    pane.say("work", "")
    assert "bold" not in pane.value
    assert pane.layout.display is None
    pane.say("note", "")
    assert pane.layout.display == "none"


def test_the_strip_never_shows_a_prediction_as_measured(bench, point):
    guess = bench.predictor().predict(ZEROS)
    before = strip(PanelState(ZEROS, guess, None, "measuring"))
    assert "wb-measured'" not in before
    assert before.count("predicted") >= 3
    assert "no kernel for unstructured zeros" in before
    look = dataclasses.replace(point, items=16, latency=None)
    during = strip(PanelState(ZEROS, guess, look, "measuring"))
    assert f"measured: 16 of {point.items_total} items" in during
    assert "predicted, not measured yet" in during  # the speed
    after = strip(PanelState(ZEROS, guess, point, "measured"))
    for phrase in (
        "theoretical",
        "packed",
        "file",
        "time predicted",
        "time measured",
        "answers changed",
        f"{point.items} of {point.items_total}",
    ):
        assert phrase in after
    assert signed(-0.04) == "\N{PLUS-MINUS SIGN}0.0"
    assert signed(-1.26) == "\N{MINUS SIGN}1.3"
    assert [signed(value) for value in (999.96, 2460.0, -21_900.0, 3.14e7, math.inf)] == [
        "+1000.0",
        "+2,500",
        "\N{MINUS SIGN}22,000",
        "+3.1e+07",
        "+inf",
    ]


def test_records_become_traces(bench, point):
    rows = bench.ledger.rows()
    record = wb.tradeoff(rows)
    changes = history_changes(record)
    keys = [key for index in (1, 2, 3) for key in changes[index]["customdata"]]
    assert sorted(keys) == sorted(row.key for row in rows)
    assert list(changes[FRONT]["customdata"]) == [p.key for p in record.points if p.standing == "front"]
    assert len(live_figure().data) == 8
    guess = bench.predictor().predict(ZEROS)
    shown = live_changes(PanelState(ZEROS, guess, None, "measuring"), PlotChoice())
    assert shown[PREDICTED]["x"] == [guess.file_bytes / 1e6]
    assert shown[MEASURED]["x"] == []
    done = live_changes(PanelState(ZEROS, guess, point, "measured"), PlotChoice())
    assert done[PREDICTED]["x"] == []
    assert done[MEASURED]["y"][0] == pytest.approx(100 * point.primary.compressed.value)
    look = dataclasses.replace(point, items=16, latency=None)
    assert (
        live_changes(PanelState(ZEROS, guess, look, "measuring"), PlotChoice(cost="latency"))[MEASURED]["x"]
        == []
    )


def test_axes_are_calm():
    near = y_range(92.0, [91.0], "accuracy")
    assert near == y_range(92.0, [90.2], "accuracy")
    assert near[0] < 90
    assert near[1] > 92
    assert y_range(92.0, [10.0], "accuracy")[0] < 10


def test_many_points_are_thinned_but_the_front_stays(bench, point):
    rows = [dataclasses.replace(point, key=f"{index}") for index in range(1000)]
    best = dataclasses.replace(point, key="best", sizes=dataclasses.replace(point.sizes, file_bytes=1))
    shown = thin([best, *rows], "file_bytes", most=100)
    assert len(shown) <= 101
    assert shown[0] is best
    assert shown[-1] is rows[-1]
    assert fastest_within([], 0.01) is None


def test_layers_are_all_listed(point):
    rows = rows_of(point.layers, {})
    assert [(row.name, row.words) for row in rows] == [(row.name, row.outcome) for row in point.layers]


def test_code_says_the_same_everywhere():
    recipe = wb.Recipe(wb.Prune(sparsity=0.5, pattern="2:4", targets=("*fc*",)), wb.Quantize(weight_bits=3))
    space = {}
    exec(python("m", recipe).replace("point = Bench('m').measure", "found = "), space)  # noqa: S102
    assert space["found"] == recipe
    assert (
        command("m", recipe)
        == "workbench measure m --sparsity 0.5 --pattern 2:4 --prune-targets '*fc*' --weight-bits 3"
    )


def test_importing_widgets_is_free_and_explorer_comes_by_name():
    code = (
        "import json, sys, widgets; before = 'ipywidgets' in sys.modules; from widgets import Explorer;"
        " print(json.dumps([before, Explorer.__name__]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, "Explorer"]
    import widgets

    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        widgets.Nothing  # noqa: B018
    assert dir(widgets) == ["Explorer"]


def test_lab_is_on_loopback_with_its_token_and_own_settings(tmp_path):
    arguments = lab_command(tmp_path / "a.ipynb", tmp_path, browser=False, port=1234)
    assert "--ip=127.0.0.1" in arguments
    assert "--no-browser" in arguments
    assert "--KernelManager.transport=ipc" in arguments
    assert not any("token" in word for word in arguments)
    write_settings(tmp_path)
    assert json.loads((tmp_path / "overrides.json").read_text())[
        "@jupyter-widgets/jupyterlab-manager:plugin"
    ] == {"saveState": False}


def test_the_websocket_sends_at_once():
    from jupyter_server.services.kernels.websocket import KernelWebsocketHandler

    from workbench.cli.serve import send_at_once

    before = KernelWebsocketHandler.open
    try:
        send_at_once()
        changed = KernelWebsocketHandler.open
        assert changed is not before
        send_at_once()
        assert KernelWebsocketHandler.open is changed
    finally:
        KernelWebsocketHandler.open = before
        del KernelWebsocketHandler.sends_at_once


def test_behaviour_is_compared_when_asked_and_not_while_measuring(panel):
    panel.run(wb.Recipe(wb.Prune(sparsity=0.7)))
    panel.behaviour.button.click()
    deadline = time.monotonic() + 30
    while "answers changed" not in panel.behaviour.body.value and time.monotonic() < deadline:
        time.sleep(0.05)
    assert panel.tabs.titles == ("layers", "behaviour", "compare", "history (1)", "code")
    assert "of 64 answers changed" in panel.behaviour.body.value
    assert "<img " in panel.behaviour.body.value
    panel.session.start(wb.Recipe(wb.Prune(sparsity=0.71), wb.Distill(temperature=2, steps=500)))
    panel.behaviour.button.click()
    assert "still running" in panel.errors.value
    panel.session.cancel()


def test_another_model_forgets_the_layers_and_the_dense_numbers_of_the_one_before(panel):
    panel.run(ZEROS)
    panel.layers.set_visible(visible=True)
    panel.pacer.flush()
    assert "fc1" not in str(panel.layers.pick.options)
    assert len(panel.layers.pick.options) > 5
    assert "dense" in panel.dense.value
    panel.follow(wb.Recipe(wb.Prune(sparsity=0.5, pattern="channels")))
    panel.session.state = dataclasses.replace(panel.session.state, recipe=panel.form.recipe)
    panel.session.loader.load_now(
        ModelChoice("fashion-vit", device="cpu", evaluation_items=64)
    )  # a recipe that does not fit it
    deadline = time.monotonic() + 30
    while panel.session.state.phase != "failed" and time.monotonic() < deadline:
        time.sleep(0.02)
    panel.pacer.flush()
    assert "channels" in panel.errors.value
    assert panel.layers.pick.options == (("none", ""),)
    assert panel.dense.value == ""
    panel.not_loaded(ModelError("no such model"))
    assert "channels" in panel.errors.value  # the reason stands beside the new one
    assert "no such model" in panel.errors.value
