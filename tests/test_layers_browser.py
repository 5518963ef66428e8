"""The layers tab in a real browser: a click and a key choose a layer, its weights are drawn, it is left
out."""

from __future__ import annotations

from pathlib import Path

import browser
import lab
import pytest

pytestmark = [pytest.mark.browser, pytest.mark.notebook, pytest.mark.slow]
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "explore.ipynb"
COUNTS = """() => {
  const plot = document.querySelector('.wb-layer-detail .js-plotly-plot');
  const list = v => Array.from(v._inputArray || v);
  return plot && plot.data.map(t => list(t.y).reduce((a, b) => a + b, 0));
}"""


@pytest.fixture(scope="module")
def panel(tmp_path_factory):
    """Yield JupyterLab with the notebook run; the tests below use it in order."""
    path = browser.find()
    if path is None:
        pytest.skip("no Chromium or Chrome here and none could be installed (see tests/browser.py)")
    from playwright.sync_api import sync_playwright

    folder, problems = tmp_path_factory.mktemp("lab"), []
    environment = {
        "XDG_STATE_HOME": str(folder / "state"),
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "2",
    }
    with (
        lab.server(
            NOTEBOOK, folder, environment, {"evaluation_items = None": "evaluation_items = 400"}
        ) as url,
        sync_playwright() as playwright,
    ):
        chromium = playwright.chromium.launch(executable_path=path, args=list(browser.FLAGS))
        page = chromium.new_page(viewport={"width": 1280, "height": 800})
        page.on("pageerror", lambda error: problems.append(str(error)))
        opened = lab.Lab(page)
        opened.open(url)
        opened.run_all()
        opened.panel()
        lab.wait_for(lambda: page.locator(".wb-badge").count(), 60)
        opened.settled(60)
        yield opened
        chromium.close()
    assert problems == []


def told(panel):
    return panel.page.locator(".wb-layer-words").inner_text()


def choose_tab(panel):
    panel.page.locator(".wb-tabs .lm-TabBar-tab", has_text="layers").click()
    panel.page.locator(".wb-layer-bar").scroll_into_view_if_needed()


def test_a_click_on_a_row_draws_the_weights_of_that_layer(panel):
    panel.drag("sparsity", 0.6)
    panel.settled_on(r"^Recipe\(Prune\(sparsity=0\.(59|6|61)\)\)$", 60)
    choose_tab(panel)
    panel.page.locator(".wb-grid tbody tr", has_text="layers.0.mlp.fc1").click()
    drawn = lab.wait_for(lambda: panel.page.evaluate(COUNTS), 60)
    assert "vit.layers.0.mlp.fc1" in panel.page.locator(".wb-layer-detail").inner_text()
    assert drawn[1] == 384 * 128  # before: no exact zero
    assert drawn[0] == round(384 * 128 * (1 - panel.readout("sparsity")))
    assert f"{384 * 128 - drawn[0]:,} after" in told(panel)


def test_the_keyboard_chooses_a_layer(panel):
    panel.page.locator(".wb-grid table").focus()
    panel.page.keyboard.press("ArrowDown")
    lab.wait_for(lambda: "vit.layers.0.mlp.fc2" in panel.page.locator(".wb-layer-detail").inner_text(), 10)
    assert panel.page.locator(".wb-layer-bar select").input_value() == "vit.layers.0.mlp.fc2"
    assert panel.page.locator(".wb-grid tr[aria-selected=true] th").inner_text() == "layers.0.mlp.fc2"
    panel.page.locator(".wb-layer-bar select").select_option("vit.layers.1.mlp.fc1")
    lab.wait_for(lambda: "vit.layers.1.mlp.fc1" in panel.page.locator(".wb-layer-detail").inner_text(), 10)


def test_leaving_the_layer_out_changes_the_recipe_line_and_the_report(panel):
    control = panel.page.locator(".wb-layer-control:visible").first
    control.locator("button", has_text="leave out").click()
    panel.settled_on(
        r"^Recipe\(Prune\(targets=\('\*', '!vit\.layers\.1\.mlp\.fc1'\), sparsity=0\.\d+\)\)$", 60
    )
    lab.wait_for(
        lambda: "prune left out by target '!vit.layers.1.mlp.fc1'" in told(panel), 10, lambda: told(panel)
    )
    row = panel.page.locator(".wb-grid tbody tr", has_text="layers.1.mlp.fc1")
    assert "%" not in row.locator("td").nth(1).inner_text()  # no zeros
    lab.wait_for(
        lambda: panel.page.evaluate(COUNTS) == [384 * 128, 384 * 128], 30, lambda: panel.page.evaluate(COUNTS)
    )
    panel.drag("sparsity", 0.4)
    panel.settled_on(
        r"^Recipe\(Prune\(targets=\('\*', '!vit\.layers\.1\.mlp\.fc1'\), sparsity=0\.(39|4|41)\)\)$", 60
    )


def test_a_layer_gets_a_value_of_its_own(panel):
    control = panel.page.locator(".wb-layer-control:visible").first
    control.locator("button", has_text="own value").click()
    handle = control.locator(".noUi-handle")
    handle.wait_for()  # the slider appears once the kernel has answered; what is hidden takes no focus
    handle.focus()
    panel.page.keyboard.press("End")
    panel.settled_on(
        r"^Recipe\(Prune\(targets=\('\*', '!vit\.layers\.1\.mlp\.fc1'\), sparsity=0\.\d+\),"
        r" Prune\(targets=\('vit\.layers\.1\.mlp\.fc1',\), sparsity=0\.99\)\)$",
        60,
    )
    lab.wait_for(lambda: "99% sparse by magnitude" in told(panel), 10, lambda: told(panel))
    control.locator("button", has_text="follow slider").click()
    panel.settled_on(r"^Recipe\(Prune\(sparsity=0\.(39|4|41)\)\)$", 60)


def test_sensitivity_fills_a_column(panel):
    panel.page.locator(".wb-layer-bar button", has_text="sensitivity").click()
    lab.wait_for(lambda: panel.page.locator(".wb-grid .wb-track").count() >= 2, 60)
    lab.wait_for(
        lambda: "37 of 37 layers measured alone" in panel.page.locator(".wb-layer-bar").inner_text(), 240
    )
    assert panel.page.locator(".wb-grid .wb-track").count() == 37
    assert not panel.page.locator(".wb-errors").is_visible()
