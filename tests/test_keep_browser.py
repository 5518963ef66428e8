"""Keeping points in a real browser: pin, note, brush and compare, export, save a report, restart."""

from __future__ import annotations

import re
from pathlib import Path

import browser
import lab
import pandas as pd
import pytest

import workbench as wb
from workbench.ledger.annotation import Annotation

pytestmark = [pytest.mark.browser, pytest.mark.notebook, pytest.mark.slow]
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "explore.ipynb"
PINNED = 7
NOTE = "ship <b>this</b>? \N{SLIGHTLY SMILING FACE}"


@pytest.fixture(scope="module")
def open_lab(tmp_path_factory):
    """Yield (lab, folder) with two points measured; the tests below use it in order."""
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
    changes = {
        "evaluation_items = None": "evaluation_items = 100",
        'model = \\"fashion-vit\\"': 'model = \\"fashion-cnn\\"',
    }
    with lab.server(NOTEBOOK, folder, environment, changes) as url, sync_playwright() as playwright:
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
        start(opened, url)
        opened.drag("sparsity", 0.4)
        opened.settled_on(r"^Recipe\(Prune\(sparsity=0\.\d+\)\)$")
        opened.drag("bits", 1 / 6)
        opened.settled_on(r"Quantize\(weight_bits=3\)")
        yield opened, folder
        chromium.close()
    assert problems == []
    assert outside == []


def start(opened, url=None):
    if url:
        opened.open(url)
    opened.run_all()
    opened.panel()
    lab.wait_for(lambda: opened.page.locator(".wb-badge").count(), 30)
    opened.settled(60)


@pytest.fixture
def panel(open_lab):
    return open_lab[0]


@pytest.fixture
def folder(open_lab):
    return open_lab[1]


def ledger(folder) -> wb.Ledger:
    return wb.Ledger(next((folder / "state").rglob("*.journal")))


def tab(panel, name):
    panel.page.locator(".wb-tabs .lm-TabBar-tab", has_text=name).click()


def shown(panel, folder):
    line = panel.page.locator(".wb-line code").inner_text()
    return next(row for row in ledger(folder).rows() if repr(row.recipe) == line)


def test_a_pin_and_a_note_reach_the_ledger_the_plot_and_the_lists(panel, folder):
    panel.page.click(".wb-keep .wb-pin")
    field = panel.page.locator(".wb-note-text input")
    field.fill(NOTE)
    field.press("Enter")
    point = shown(panel, folder)
    lab.wait_for(
        lambda: ledger(folder).annotations().get(point.key) == Annotation(NOTE, pinned=True),
        10,
        ledger(folder).annotations,
    )
    ring = lab.wait_for(lambda: panel.traces()[PINNED]["x"], 10, panel.traces)
    assert ring == [pytest.approx(point.sizes.file_bytes / 1e6)]
    tab(panel, "history")
    lab.wait_for(lambda: "ship" in panel.page.locator(".wb-table tbody tr").first.inner_text(), 10)
    assert (
        NOTE in panel.page.locator(".wb-tabs .wb-table").locator("visible=true").first.inner_text()
    )  # as typed: nothing became markup


def test_the_table_is_written_beside_the_notebook_and_pandas_reads_it(panel, folder):
    tab(panel, "history")
    for expected in ("points.csv", "points-2.csv"):
        panel.page.click(".wb-files button:text-is('export table')")
        lab.wait_for(
            lambda name=expected: panel.page.locator(".wb-files code").all_inner_texts() == [name],
            10,
            panel.page.locator(".wb-files").inner_text,
        )
        frame = pd.read_csv(folder / expected, dtype={"key": str})
        rows = {row.key: row for row in ledger(folder).rows()}
        assert set(frame["key"]) == set(rows)
        for record in frame.to_dict("records"):
            assert record["file_bytes"] == rows[record["key"]].sizes.file_bytes
            assert record["accuracy_change_fraction_low"] == pytest.approx(
                rows[record["key"]].primary.change.low
            )
        assert frame.loc[frame["pinned"], "note"].tolist() == [NOTE]
    panel.page.locator(".wb-path input").fill("/proc/none/points.csv")
    panel.page.locator(".wb-path input").press("Tab")
    panel.page.click(".wb-files button:text-is('export table')")
    lab.wait_for(
        lambda: "cannot write '/proc/none/points.csv'" in panel.page.locator(".wb-errors").inner_text(), 10
    )


BOX = """() => {
  const plot = document.querySelector('.wb-panel .js-plotly-plot');
  const box = plot.getBoundingClientRect(), size = plot._fullLayout._size;
  return [box.x + size.l + 3, box.y + size.t + 3, box.x + size.l + size.w - 3, box.y + size.t + size.h - 3];
}"""


def test_a_brush_puts_two_points_side_by_side(panel, folder):
    page = panel.page
    page.evaluate("document.querySelector('.wb-plot').scrollIntoView({block: 'center'})")
    page.click(".wb-plot button:has-text('select')")
    lab.wait_for(
        lambda: (
            page.evaluate("document.querySelector('.wb-panel .js-plotly-plot')._fullLayout.dragmode")
            == "select"
        ),
        5,
    )
    settled = []
    lab.wait_for(
        lambda: settled.append(page.evaluate(BOX)) or settled[-8:] == [settled[-1]] * 8, 10
    )  # the page scrolls, and plotly draws anew
    left, top, right, bottom = settled[-1]
    page.mouse.move(left, top)
    page.mouse.down()
    page.mouse.move(right, bottom, steps=10)
    page.mouse.up()
    table = page.locator(".wb-tabs table.wb-compare").first
    table.wait_for(state="attached", timeout=10_000)
    table.scroll_into_view_if_needed()
    drawn = [row for row in ledger(folder).rows() if len(row.recipe)]
    assert len(drawn) >= 2
    text = table.inner_text()
    for row in drawn:
        assert row.recipe.label() in text
    assert "quantize weight bits" in text
    assert NOTE in text
    assert page.locator(".wb-tabs td.wb-differs").count() >= 1
    page.click("button:text-is('paired test')")
    lab.wait_for(
        lambda: "Paired on the same 100 items" in page.locator(".wb-test").inner_text(),
        30,
        page.locator(".wb-test").inner_text,
    )
    page.click(".wb-testbuttons button:text-is('clear')")
    lab.wait_for(lambda: page.locator(".wb-tabs table.wb-compare").count() == 0, 10)
    page.locator(".wb-points select").focus()
    page.keyboard.press("Home")
    page.keyboard.press("Shift+ArrowDown")  # the same by keys, which JupyterLab would take for cells
    page.locator(".wb-tabs table.wb-compare").first.wait_for(state="attached", timeout=10_000)


def test_a_report_is_made_beside_the_panel_and_measures_nothing_again(panel, folder):
    page, point = panel.page, shown(panel, folder)
    journal = next((folder / "state").rglob("*.journal"))
    before = journal.read_text().count(point.key)
    page.locator(".wb-report").scroll_into_view_if_needed()
    page.click("button:text-is('save report')")
    line = page.locator(".wb-reportline")
    lab.wait_for(lambda: "report: cell" in line.inner_text(), 60, line.inner_text)
    lab.wait_for(lambda: "The report is written" in line.inner_text(), 400, line.inner_text)
    html = folder / "reports" / f"fashion-cnn-{point.key[:8]}.html"
    text = html.read_text()
    assert wb.verdict(point).replace("'", "&#x27;") in text
    assert journal.read_text().count(point.key) == before
    href = line.locator("a").get_attribute("href")
    assert page.request.get(href).text() == text
    lab.wait_for(
        lambda: f"history ({len(ledger(folder).rows())})" in page.locator(".wb-tabs").inner_text(), 10
    )  # what it measured joined the past
    page.click("button:text-is('save report')")  # all points are there now
    lab.wait_for(lambda: "report: cell" in line.inner_text(), 60, line.inner_text)
    page.click("button:text-is('stop report')")
    lab.wait_for(lambda: "The report was stopped" in line.inner_text(), 30, line.inner_text)


def test_everything_still_fits(panel):
    boxes = panel.page.evaluate(
        "[...document.querySelectorAll('.wb-keep, .wb-tabs, .wb-reportline')].map(e => [e.scrollWidth -"
        " e.clientWidth, e.getBoundingClientRect().right])"
    )
    assert all(over <= 4 and right <= 1280 for over, right in boxes), boxes


def test_a_restarted_kernel_still_knows_pin_and_note(panel, folder):
    (key,) = ledger(folder).annotations()
    panel.restart()
    start(panel)
    lab.wait_for(lambda: len(panel.traces()[PINNED]["x"]) == 1, 30, panel.traces)
    tab(panel, "history")
    lab.wait_for(lambda: NOTE in panel.page.locator(".wb-tabs").inner_text(), 10)
    point = ledger(folder).find(key)
    panel.page.locator(".wb-goto select").select_option(index=1)
    panel.settled_on(re.escape(repr(point.recipe)))
    lab.wait_for(lambda: panel.page.locator(".wb-note-text input").input_value() == NOTE, 10)
