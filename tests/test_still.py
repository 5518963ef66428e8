"""The picture that a saved notebook shows, and the figure that survives a reload."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import plotly.graph_objects as go
import pytest
import tiny_tasks

import workbench as wb
from widgets.panes.static_snapshot import StaticSnapshot, snapshot
from widgets.plot.kept_figure import absent, kept_figure
from widgets.plot.static_svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, svg
from widgets.session.state import PanelState

SPACE = "{http://www.w3.org/2000/svg}"


def figure(trace, across=(0.0, 10.0), kind="linear"):
    return go.Figure(trace).update_layout(
        xaxis={"range": across, "type": kind, "title": {"text": "<size>"}}, yaxis={"range": (0, 100)}
    )


def picture(drawn):
    content = drawn.to_dict()
    return ET.fromstring(svg(content["data"], content["layout"]))  # noqa: S314  our own


@pytest.mark.parametrize(
    ("kind", "ends", "value", "fraction"),
    [("linear", (1.0, 11.0), 6.0, 0.5), ("log", (0.0, 2.0), 10.0, 0.5), ("log", (1.0, 0.0), 1.0, 1.0)],
)
def test_a_point_lies_where_the_axes_say(kind, ends, value, fraction):
    circle = picture(
        figure(go.Scatter(x=[value], y=[25.0], mode="markers", marker={"color": "#123456"}), ends, kind)
    ).find(f"{SPACE}circle")
    assert float(circle.get("cx")) == pytest.approx(LEFT + fraction * (WIDTH - RIGHT - LEFT), abs=0.1)
    assert float(circle.get("cy")) == pytest.approx(HEIGHT - BOTTOM - 0.25 * (HEIGHT - BOTTOM - TOP), abs=0.1)
    assert circle.get("fill") == "#123456"


def test_points_outside_are_left_out_and_bars_are_cut():
    bars = {"array": [500.0, 1.0, 1.0], "arrayminus": [10.0, 1.0, 1.0], "color": "#abcdef"}
    drawn = picture(
        figure(go.Scatter(x=[5.0, 50.0, None], y=[50.0, 50.0, 50.0], error_y=bars, mode="markers"))
    )
    assert len(drawn.findall(f"{SPACE}circle")) == 1
    (line,) = [line for line in drawn.findall(f"{SPACE}line") if line.get("stroke") == "#abcdef"]
    assert float(line.get("y1")) == TOP
    assert float(line.get("y2")) == pytest.approx(HEIGHT - BOTTOM - 0.4 * (HEIGHT - BOTTOM - TOP), abs=0.1)


def test_words_are_escaped_and_a_figure_without_ranges_has_no_picture():
    texts = [text.text for text in picture(figure(go.Scatter(x=[1], y=[1]))).iter(f"{SPACE}text")]
    assert "<size>" in texts
    assert {"0", "2", "4", "6", "8", "10"} <= set(texts)
    assert svg([], {}) == ""


def test_only_complete_points_become_a_picture_which_names_recipe_and_time(tmp_path):
    complete = wb.Bench(
        tiny_tasks.tiny_task("vit"), ledger=tmp_path / "points.journal", progress=False, device="cpu"
    ).measure(wb.Recipe(wb.Prune(sparsity=0.5)))
    early = replace(complete, items=complete.items - 1)
    empty = figure(go.Scatter()).to_dict()
    shown = StaticSnapshot(lambda: empty)
    shown.show(PanelState(complete.recipe, point=early, phase="measuring", model="m"))
    assert shown.draw() == ""
    measured = PanelState(complete.recipe, point=complete, phase="measured", model="<b>m</b>")
    shown.show(measured)
    assert shown.html == ""  # nobody looks: nothing is drawn
    html = shown.draw()
    assert "&lt;b&gt;m&lt;/b&gt;" in html
    assert complete.provenance.time[:10] in html
    assert html == snapshot(measured, empty)
    assert "wb-badge" not in html


def test_the_state_of_a_kept_figure_is_what_is_drawn():
    kept = kept_figure(go.Figure(go.Scatter(x=[], y=[])))
    kept.data[0].update({"x": [1.5], "y": [2.5]})
    kept.layout.xaxis.type = "log"
    state = kept.get_state()
    assert state["_widget_data"][0]["x"] == [1.5]
    assert state["_widget_layout"]["xaxis"]["type"] == "log"
    kept.data[0].x = [3.5]
    assert kept.get_state()["_widget_data"][0]["x"] == [3.5]
    assert state["_config"]["displaylogo"] is False


def test_what_the_page_reports_as_default_does_not_erase_what_was_written():
    kept = kept_figure(go.Figure(go.Scatter(x=[1.5], y=[2.5])))
    uid = kept.data[0].uid
    kept._js2py_traceDeltas = {
        "trace_edit_id": kept._last_trace_edit_id,
        "trace_deltas": [{"uid": uid, "x": [1.5], "opacity": 1}],
    }
    assert kept.data[0].x == (1.5,)


def test_a_module_is_absent_only_inside_the_block(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with absent("colorsys"), pytest.raises(ImportError):
        import colorsys
    import colorsys

    with absent("colorsys"):
        import colorsys as again
    assert again is colorsys
