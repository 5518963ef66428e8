"""The panel in a real browser: JupyterLab, a real kernel, a mouse."""

from __future__ import annotations

import re
import time
from pathlib import Path

import browser
import lab
import pytest

import workbench as wb

pytestmark = [pytest.mark.browser, pytest.mark.notebook, pytest.mark.slow]
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "explore.ipynb"
PREDICTED, MEASURED = 5, 6


def recipe_line(page):
    return page.locator(".wb-line code").inner_text()


@pytest.fixture(scope="module")
def open_lab(tmp_path_factory):
    """Yield (lab, problems, folder): JupyterLab with the notebook run; the tests below use it in order."""
    path = browser.find()
    if path is None:
        pytest.skip("no Chromium or Chrome here and none could be installed (see tests/browser.py)")
    from playwright.sync_api import sync_playwright

    folder = tmp_path_factory.mktemp("lab")
    problems, outside = [], []
    environment = {
        "XDG_STATE_HOME": str(folder / "state"),
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "2",
    }
    with (
        lab.server(
            NOTEBOOK, folder, environment, {"evaluation_items = None": "evaluation_items = 800"}
        ) as url,
        sync_playwright() as playwright,
    ):
        chromium = playwright.chromium.launch(executable_path=path, args=list(browser.FLAGS))
        page = chromium.new_page(viewport={"width": 1280, "height": 800})
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: (
                outside.append(request.url)
                if not re.match(r"(https?|wss?)://127\.0\.0\.1:|data:|blob:", request.url)
                else None
            ),
        )
        opened = lab.Lab(page)
        opened.open(url)
        opened.run_all()
        opened.panel()
        lab.wait_for(lambda: page.locator(".wb-badge").count(), 30)
        opened.settled()
        yield opened, problems, folder
        chromium.close()
    assert problems == []
    assert outside == []


@pytest.fixture
def panel(open_lab):
    return open_lab[0]


def test_a_drag_shows_a_prediction_then_a_measurement_whose_bar_shrinks(panel):
    panel.watch()
    panel.drag("sparsity", 0.4, release=False)
    lab.wait_for(lambda: any(s["predicted"] is not None for s in panel.seen()), 5)
    panel.page.mouse.up()
    panel.settled_on(r"Prune\(sparsity=0\.(39|4)")
    seen = [sight for sight in panel.seen() if sight["line"] == recipe_line(panel.page)]
    first = next(i for i, s in enumerate(seen) if s["measured"] is not None)
    bars = [s["bar"] for s in seen[first:] if s["measured"] is not None]
    assert bars[-1] < bars[0]
    assert bars[-1] < 3
    final = panel.traces()
    assert final[PREDICTED]["x"] == []
    point = next(row for row in ledger_rows(panel) if repr(row.recipe) == recipe_line(panel.page))
    assert final[MEASURED]["x"] == [point.sizes.file_bytes / 1e6]
    assert final[MEASURED]["y"][0] == pytest.approx(100 * point.primary.compressed.value, abs=1e-6)
    assert "measured" in panel.page.locator(".wb-verdict").inner_text()


def ledger_rows(panel):
    return wb.Ledger(next(panel.state_folder.rglob("*.journal"))).rows()


@pytest.fixture(autouse=True)
def where_points_lie(open_lab):
    open_lab[0].state_folder = open_lab[2] / "state"


def test_every_slider_moves_by_mouse_and_by_keyboard(panel):
    panel.drag("bits", 0.2)
    panel.settled_on(r"Quantize\(weight_bits=3.2\)")  # averages between whole widths too
    handle = panel.slider("bits").locator(".noUi-handle")
    handle.focus()
    for _ in range(8):
        panel.page.keyboard.press("ArrowRight")
    panel.settled_on(r"Quantize\(weight_bits=4\)")
    panel.drag("rank", 0.3)
    panel.settled_on(r"LowRank\(rank_ratio=0\.(29|3|31)")
    panel.slider("rank").locator("input[type=checkbox]").first.uncheck()
    panel.settled_on(r"^Recipe\(Prune")
    assert [step.kind() for step in ledger_rows(panel)[-1].recipe] == ["lowrank", "prune", "quantize"]


def test_thirty_fast_drags_settle_on_the_newest_only(panel):
    before = len(ledger_rows(panel))
    panel.watch()
    slider = panel.slider("sparsity")
    handle, track = slider.locator(".noUi-handle").bounding_box(), slider.locator(".noUi-base").bounding_box()
    middle = track["y"] + track["height"] / 2
    panel.page.mouse.move(handle["x"] + handle["width"] / 2, middle)
    panel.page.mouse.down()
    for index in range(30):
        panel.page.mouse.move(track["x"] + track["width"] * (0.1 + 0.8 * ((index * 7) % 30) / 30), middle)
        time.sleep(0.02)
    panel.page.mouse.move(track["x"] + track["width"] * 0.351, middle)
    panel.page.mouse.up()
    value = lab.wait_for(lambda: panel.readout("sparsity"), 2)
    assert 0.3 < value < 0.4
    panel.settled_on(rf"Prune\(sparsity={value:g}\)")
    assert len(ledger_rows(panel)) - before <= 2
    after = [s for s in panel.seen() if s["line"] == recipe_line(panel.page) and s["measured"] is not None]
    assert {round(s["measured"], 3) for s in after} == {round(panel.traces()[MEASURED]["x"][0], 3)}
    time.sleep(0.6)
    assert panel.readout("sparsity") == value
    assert panel.state() == "measured"


def test_a_click_on_a_point_puts_the_sliders_back(panel):
    now = recipe_line(panel.page)
    rows = {repr(row.recipe): row for row in ledger_rows(panel)}
    target = next(row for text, row in rows.items() if text != now and len(row.recipe) == 2)
    spot = panel.page.evaluate(SPOT, target.key)
    panel.page.mouse.move(spot["x"], spot["y"], steps=3)
    panel.page.wait_for_selector(".js-plotly-plot .hoverlayer .hovertext", timeout=3000)
    panel.page.mouse.click(spot["x"], spot["y"])
    lab.wait_for(lambda: recipe_line(panel.page) == repr(target.recipe), 5, lambda: recipe_line(panel.page))
    assert panel.readout("bits") == target.recipe.get("quantize").weight_bits
    assert panel.readout("sparsity") == target.recipe.get("prune").sparsity
    panel.page.click(".wb-buttons button:text-is('undo')")
    lab.wait_for(lambda: recipe_line(panel.page) == now, 5)


SPOT = """key => {
  const plot = document.querySelector('.wb-panel .js-plotly-plot');
  const box = plot.getBoundingClientRect(), size = plot._fullLayout;
  for (const t of plot._fullData)
    for (const [i, k] of Array.from(t.customdata || []).entries())
      if (k === key) return {x: box.x + size.xaxis._offset + size.xaxis.d2p(t.x[i]),
                             y: box.y + size.yaxis._offset + size.yaxis.d2p(t.y[i])};
}"""


def test_what_is_refused_is_shown_in_the_panel_which_stays_alive(panel):
    errors = panel.page.locator(".wb-errors")
    field = panel.slider("sparsity").locator(".wb-choices input[type=text]")
    field.fill("4:2")
    field.press("Enter")
    lab.wait_for(lambda: errors.is_visible() and "removes nothing" in errors.inner_text(), 5)
    field.fill("unstructured")
    field.press("Enter")
    lab.wait_for(lambda: not errors.is_visible(), 5)
    group = panel.slider("bits").locator(".wb-choices input[type=number]").first
    group.fill("11")
    group.press("Enter")
    lab.wait_for(lambda: errors.is_visible() and "fits no layer" in errors.inner_text(), 10)
    group.fill("0")
    group.press("Enter")
    lab.wait_for(lambda: not errors.is_visible(), 5)
    panel.settled()


def test_the_bar_changes_axes_and_colours_and_a_box_marks_points(panel):
    page, menu = panel.page, panel.page.locator(".wb-plotmenu")
    menu.get_by_label("colour", exact=True).select_option(label="sparsity")
    lab.wait_for(lambda: page.locator(".wb-scale").count(), 5)
    lab.wait_for(lambda: len(page.evaluate(FILLS)) > 2, 5, lambda: page.evaluate(FILLS))
    menu.get_by_label("x", exact=True).select_option(label="time")
    lab.wait_for(lambda: panel.traces()[4]["x"] == [1], 5, panel.traces)
    menu.get_by_label("x", exact=True).select_option(label="file size")
    menu.get_by_label("colour", exact=True).select_option(label="standing")
    lab.wait_for(lambda: panel.traces()[4]["x"] != [1] and not page.locator(".wb-scale").count(), 5)
    page.click(".wb-plotmenu button:text-is('select')")
    lab.wait_for(
        lambda: (
            page.evaluate("document.querySelector('.wb-panel .js-plotly-plot').layout.dragmode") == "select"
        ),
        5,
    )
    box = page.locator(".wb-panel .js-plotly-plot .nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 5, box["y"] + box["height"] - 5, steps=5)
    page.mouse.up()
    lab.wait_for(lambda: page.evaluate(BOXES), 5)
    page.click(".wb-plotmenu button:text-is('select')")
    lab.wait_for(lambda: not page.evaluate(BOXES), 5)


FILLS = """() => [...new Set(Array.from(
  document.querySelectorAll('.wb-panel .js-plotly-plot .scatterlayer .points path')
).map(p => p.style.fill))]"""
BOXES = "document.querySelectorAll('.wb-panel .js-plotly-plot .selectionlayer path').length"


def test_everything_fits_a_small_window(panel):
    boxes = panel.page.evaluate(
        "[...document.querySelectorAll('.wb-panel, .wb-head, .wb-main, .wb-strip, .wb-tabs')].map(e =>"
        " [e.scrollWidth - e.clientWidth, e.getBoundingClientRect().right])"
    )
    assert all(over <= 4 for over, _ in boxes), boxes  # the margins of ipywidgets' own boxes
    assert all(right <= 1280 for _, right in boxes)
    assert panel.page.locator(".wb-strip").bounding_box()["y"] < 780


def test_a_restarted_kernel_finds_every_point_again(panel):
    before = len(ledger_rows(panel))
    panel.restart()
    panel.run_all()
    panel.panel()
    lab.wait_for(
        lambda: sum(len(trace["x"]) for trace in panel.traces()[1:4]) == before - 1, 30, panel.traces
    )  # all but the dense model itself
    panel.settled()


def test_every_control_has_a_name_and_says_its_exact_value(panel):
    panel.drag("sparsity", 0.43)
    panel.settled_on(r"Prune\(sparsity=0\.4[234]")
    handles = panel.page.locator(".wb-panel .noUi-handle").all()
    said = {handle.get_attribute("aria-label"): handle.get_attribute("aria-valuetext") for handle in handles}
    assert set(said) >= {"rank", "sparsity", "bits", "temperature"}
    assert len(said) == len(handles)
    assert float(said["sparsity"]) == panel.readout("sparsity")
    assert (
        panel.page.get_by_role("slider", name="sparsity").get_attribute("aria-valuenow") == said["sparsity"]
    )
    nameless = re.findall(
        r"^ *- (?:slider|button|combobox|spinbutton|checkbox|textbox|tab)(?: \[.*\])?:?$",
        panel.page.locator(".wb-panel").aria_snapshot(),
        re.MULTILINE,
    )
    assert nameless == []


def test_the_picture_for_a_notebook_without_a_kernel_is_there_and_hidden(panel):
    panel.settled()
    picture = panel.page.locator(".wb-still")
    assert not picture.is_visible()
    lab.wait_for(lambda: recipe_line(panel.page) in picture.locator("code").text_content(), 5)
    panel.page.evaluate(
        "document.querySelectorAll('.wb-panel').forEach(e => e.classList.add('wb-gone') ||"
        " e.classList.remove('wb-panel'))"
    )
    assert picture.is_visible()
    assert picture.locator("svg circle").count() > 0
    panel.page.evaluate(
        "document.querySelectorAll('.wb-gone').forEach(e => e.classList.replace('wb-gone', 'wb-panel'))"
    )
    assert not picture.is_visible()


def test_a_reloaded_page_shows_the_same_panel_which_still_answers(panel):
    panel.drag("sparsity", 0.55)
    panel.settled_on(r"Prune\(sparsity=0\.5[456]")
    line, value, before = recipe_line(panel.page), panel.readout("sparsity"), panel.picture()
    assert sum(len(trace["x"]) for trace in panel.traces()[1:4]) > 1
    panel.menu("File", "docmanager:save")
    lab.wait_for(lambda: "widget-view" in (panel.state_folder.parent / NOTEBOOK.name).read_text(), 10)
    panel.page.goto(panel.page.url.replace("reset", ""))
    panel.page.wait_for_selector(".jp-NotebookPanel:visible .jp-Cell", timeout=60_000)
    panel.panel()
    assert recipe_line(panel.page) == line
    assert panel.readout("sparsity") == value
    assert panel.state() == "measured"
    assert panel.picture() == before
    panel.drag("sparsity", 0.3)
    panel.settled_on(r"Prune\(sparsity=0\.(29|3)")
