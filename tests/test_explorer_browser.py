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
    environment = {"XDG_STATE_HOME": str(folder / "state"), "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}
    with lab.server(NOTEBOOK, folder, environment, {"evaluation_items = None": "evaluation_items = 800"}) as url, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(browser.FLAGS))
        page = chromium.new_page(viewport={"width": 1280, "height": 800})
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: outside.append(request.url) if not re.match(r"(https?|wss?)://127\.0\.0\.1:|data:|blob:", request.url) else None)
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
    panel.settled_on(r"Quantize\(weight_bits=3\)")
    handle = panel.slider("bits").locator(".noUi-handle")
    handle.focus()
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
  const plot = document.querySelector('.wb-panel .js-plotly-plot'), box = plot.getBoundingClientRect(), size = plot._fullLayout;
  for (const t of plot._fullData) for (const [i, k] of Array.from(t.customdata || []).entries()) if (k === key)
    return {x: box.x + size.xaxis._offset + size.xaxis.d2p(t.x[i]), y: box.y + size.yaxis._offset + size.yaxis.d2p(t.y[i])};
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
    group = panel.slider("bits").locator(".wb-choices input[type=number]")
    group.fill("11")
    group.press("Enter")
    lab.wait_for(lambda: errors.is_visible() and "fits no layer" in errors.inner_text(), 10)
    group.fill("0")
    group.press("Enter")
    lab.wait_for(lambda: not errors.is_visible(), 5)
    panel.settled()


def test_everything_fits_a_small_window(panel):
    boxes = panel.page.evaluate("[...document.querySelectorAll('.wb-panel, .wb-head, .wb-main, .wb-strip, .wb-tabs')].map(e => [e.scrollWidth - e.clientWidth, e.getBoundingClientRect().right])")
    assert all(over <= 4 for over, _ in boxes), boxes  # the margins of ipywidgets' own boxes
    assert all(right <= 1280 for _, right in boxes)
    assert panel.page.locator(".wb-strip").bounding_box()["y"] < 780


def test_a_restarted_kernel_finds_every_point_again(panel):
    before = len(ledger_rows(panel))
    panel.restart()
    panel.run_all()
    panel.panel()
    lab.wait_for(lambda: sum(len(trace["x"]) for trace in panel.traces()[1:4]) == before - 1, 30, panel.traces)  # all but the dense model itself
    panel.settled()
