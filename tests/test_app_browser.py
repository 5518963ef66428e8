"""`workbench app` in a real browser: the panel without the code, behind the token, with nothing from
outside."""

from __future__ import annotations

import re
from pathlib import Path

import browser
import lab
import pytest

pytestmark = [pytest.mark.browser, pytest.mark.notebook, pytest.mark.slow]
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "explore.ipynb"
OURS = re.compile(r"(https?|wss?)://127\.0\.0\.1:|data:|blob:")


FEW = {"evaluation_items = None": "evaluation_items = 400"}


@pytest.fixture(scope="module")
def chromium():
    path = browser.find()
    if path is None:
        pytest.skip("no Chromium or Chrome here and none could be installed (see tests/browser.py)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=list(browser.FLAGS))
        yield launched
        launched.close()


def environment(folder):
    return {"XDG_STATE_HOME": str(folder / "state"), "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}


@pytest.fixture(scope="module")
def address(tmp_path_factory, chromium):
    """Yield the address of the page, without the token.

    The server lives as long as the tests of this file.
    """
    folder = tmp_path_factory.mktemp("app")
    with lab.app(NOTEBOOK, folder, environment(folder), FEW) as url:
        yield url


def luminance(css):
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", css)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(
    "path",
    [
        "voila",
        "voila/tree",
        "voila/render/explore.ipynb",
        "voila/files/explore.ipynb",
        "voila/api/contents",
        "api/kernels",
    ],
)
def test_nothing_answers_without_the_token(address, chromium, path):
    page = chromium.new_page()
    reply = page.goto(f"{address.split('/voila')[0]}/{path}")
    assert reply.status in (403, 404) or "/login" in page.url
    assert page.locator("#loading, .jp-Cell").count() == 0
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_panel_answers_in_the_themes_of_the_system_with_nothing_from_outside(address, chromium, scheme):
    page = chromium.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
    problems, outside = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if OURS.match(request.url) else outside.append(request.url))
    page.goto(f"{address}?token={lab.TOKEN}", wait_until="commit")
    page.wait_for_selector("#loading", timeout=20_000)
    opened = lab.Lab(page)
    opened.panel()
    lab.wait_for(lambda: page.locator(".wb-badge").count(), 60)
    opened.settled()
    opened.drag("sparsity", 0.4)
    opened.settled_on(r"Prune\(sparsity=0\.(39|4)")
    assert page.locator("#loading").count() == 0
    assert "import Explorer" not in page.locator("body").inner_text()  # no code
    assert (
        page.locator(".jp-CodeCell").last.inner_text().strip() == ""
    )  # the demo did not run: somebody is looking
    back, front = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('.wb-panel')).color]"
    )
    dark, bright = (back, front) if scheme == "dark" else (front, back)
    assert luminance(dark) < 0.3
    assert luminance(bright) > 0.7
    page.close()
    assert problems == []
    assert outside == []


def test_notebook_7_shows_the_panel_and_keeps_it_through_a_reload(tmp_path, chromium):
    outside = []
    page = chromium.new_page(viewport={"width": 1280, "height": 800})
    page.on("request", lambda request: None if OURS.match(request.url) else outside.append(request.url))
    with lab.notebook7(NOTEBOOK, tmp_path, environment(tmp_path), FEW) as url:
        opened = lab.Lab(page)
        opened.open_in_notebook7(url)
        opened.run_all()
        opened.panel()
        lab.wait_for(lambda: page.locator(".wb-badge").count(), 60)
        opened.settled()
        opened.drag("sparsity", 0.4)
        opened.settled_on(r"Prune\(sparsity=0\.(39|4)")
        page.keyboard.press("Control+s")
        lab.wait_for(lambda: "widget-view" in (tmp_path / NOTEBOOK.name).read_text(), 10)
        before = opened.picture()
        page.reload()
        opened.panel()
        assert opened.readout("sparsity") == pytest.approx(0.4, abs=0.011)
        assert opened.picture() == before
        opened.drag("sparsity", 0.6)
        opened.settled_on(r"Prune\(sparsity=0\.(59|6)")
        page.close()
    assert outside == []
