"""The report: a real notebook run, its numbers checked against the ledger, and its page looked at in a real
browser."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import browser
import nbformat
import pytest

import workbench as wb
from workbench.errors import GateFailed, RecipeError, WorkbenchError
from workbench.report.report import empty_to_none, job_from, notebook_path, report

SMALL = {"model": "fashion-cnn", "weight_bits": 4, "evaluation_items": 200, "steps": None}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return (page, ledger) of one real report on 200 images."""
    folder = tmp_path_factory.mktemp("report")
    ledger = folder / "points.journal"
    page = report({**SMALL, "ledger": str(ledger), "max_quality_drop": 0.5}, folder, progress=False)
    return page, ledger


def outputs(notebook: Path) -> str:
    """Return all HTML and text outputs of an executed notebook."""
    cells = nbformat.read(notebook, as_version=4).cells
    shown = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in shown if output.output_type == "error"]
    return "\n".join(output.data.get("text/html", "") for output in shown if "data" in output)


@pytest.mark.notebook
def test_numbers_on_the_page_are_those_of_the_ledger(paths: tuple[Path, Path]) -> None:
    page, ledger = paths
    rows = wb.Ledger(ledger).rows()
    recipe = wb.Recipe(wb.Quantize(weight_bits=4))
    point = next(row for row in rows if row.recipe == recipe)
    text = outputs(page.with_suffix(".ipynb"))
    assert wb.verdict(point).replace("'", "&#x27;") in text
    assert f"{point.sizes.file_bytes:,}" in text
    assert f"{point.dense_sizes.file_bytes:,}" in text
    for layer in point.layers:
        assert layer.name in text
    # one slider at a time: each stop of each slider was measured around the recipe
    bits = {row.recipe.get("quantize").weight_bits for row in rows if len(row.recipe) == 1}
    assert bits == {2, 3, 4, 6, 8}
    assert {row.recipe.label() for row in rows} >= {"50% sparse + W4", "rank 30% + W4", "W4 + distilled T2"}


@pytest.mark.notebook
def test_golden_numbers_within_tolerance(paths: tuple[Path, Path]) -> None:
    """The dense accuracy is that of these images, and sizes are exact.

    Source: this project's own run, November 2026.
    """
    _, ledger = paths
    point = next(
        row for row in wb.Ledger(ledger).rows() if row.recipe == wb.Recipe(wb.Quantize(weight_bits=4))
    )
    assert point.primary.dense.value == pytest.approx(0.93, abs=0.0051)  # 186 of 200 images, one near a tie
    assert point.dense_sizes.file_bytes == 2_809_936
    assert point.shrink == pytest.approx(7.4, abs=0.4)
    assert point.latency is not None
    assert point.latency.rounds >= 20


@pytest.mark.notebook
def test_second_report_measures_nothing_again(paths: tuple[Path, Path]) -> None:
    page, ledger = paths
    before = ledger.read_bytes()
    report({**SMALL, "ledger": str(ledger)}, page.parent / "second", progress=False)
    assert ledger.read_bytes().count(b'"measurement"') == before.count(b'"measurement"')


@pytest.mark.browser
@pytest.mark.notebook
def test_page_opens_with_no_network_and_shows_every_plot(paths: tuple[Path, Path]) -> None:
    path = browser.find()
    if path is None:
        pytest.skip("no Chromium or Chrome here and none could be installed (see tests/browser.py)")
    from playwright.sync_api import sync_playwright

    page_path, _ = paths
    asked, problems = [], []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(browser.FLAGS))
        page = chromium.new_context(offline=True, viewport={"width": 1280, "height": 900}).new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(page_path.as_uri())
        page.wait_for_selector(".js-plotly-plot .main-svg")
        page.wait_for_function(
            "document.querySelectorAll('.js-plotly-plot .scatterlayer .points path').length > 20"
        )
        plots = page.evaluate(
            "[...document.querySelectorAll('.js-plotly-plot')].map(p => p.getBoundingClientRect().height)"
        )
        shapes = page.evaluate(
            "[...document.querySelectorAll('.js-plotly-plot')].map(p => p.querySelectorAll('.points path,"
            " .bars path').length)"
        )
        width = page.evaluate("document.documentElement.scrollWidth")
        verdict = page.inner_text(".verdict")
        chromium.close()
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
    assert problems == []
    assert len(plots) == 4  # sliders, size, latency, layers
    assert min(plots) > 250
    assert min(shapes) > 5
    assert width <= 1280
    assert re.search(r"accuracy \d\d\.\d% to \d\d\.\d% \([+-]\d+\.\d points", verdict)


@pytest.mark.notebook
def test_gate_that_does_not_hold_fails_but_keeps_the_report(paths: tuple[Path, Path]) -> None:
    page, ledger = paths
    folder = page.parent / "gate"
    with pytest.raises(GateFailed, match="max_file_bytes: file .* bytes .*, limit 1,000"):
        report({**SMALL, "ledger": str(ledger), "max_file_bytes": 1000}, folder, progress=False)
    text = (folder / "fashion-cnn.html").read_text()
    assert "gate failed" in text
    assert "Traceback" not in text


@pytest.mark.notebook
def test_a_report_says_what_it_does_unless_told_not_to(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """From the command line, with no terminal: lines on stderr, two paths on stdout, nothing of either on the
    page, and no socket left behind."""
    _, ledger = paths
    arguments = [
        "report",
        "fashion-cnn",
        "--weight-bits",
        "4",
        "--evaluation-items",
        "200",
        "--ledger",
        str(ledger),
        "--output",
        str(tmp_path / "out"),
    ]
    run, quiet = (
        subprocess.run(
            [sys.executable, "-m", "workbench", *arguments, *more],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        )
        for more in ((), ("--quiet",))
    )
    lines = run.stderr.splitlines()
    assert lines[:2] == ["loading fashion-cnn", "this recipe: W4"]
    assert [line for line in lines if line.startswith("temperature, ")] == [
        f"temperature, {i} of 3: W4 + distilled T{t}" for i, t in ((1, 1), (2, 2), (3, 4))
    ]
    assert (
        run.stdout.splitlines()
        == quiet.stdout.splitlines()
        == [str(tmp_path / "out" / f"fashion-cnn.{end}") for end in ("html", "ipynb")]
    )
    assert quiet.stderr == ""
    assert "temperature, 1 of 3" not in (tmp_path / "out" / "fashion-cnn.html").read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.notebook
def test_papermill_command_refuses_bad_parameters_before_any_work(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(notebook_path()),
        str(tmp_path / "out.ipynb"),
        "-p",
        "model",
        "fashion-cnn",
        "-p",
        "weight_bits",
        "33",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert run.returncode == 1
    assert "Quantize(weight_bits=33) is refused: input should be less than or equal to 16" in run.stderr
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    assert not [
        cell
        for cell in cells
        if "job.bench()" in "".join(cell["source"]) and cell["execution_count"] is not None
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "fashion-cnn", "sparsty": 0.5}, "unknown parameter 'sparsty'; nearest: .*sparsity"),
        (
            {"model": "fashion-cnn", "sparsity": 1.0},
            r"Prune\(sparsity=1.0\) is refused: input should be less than 1",
        ),
        ({"model": "fashion-cnn", "sparsity": "true"}, r"Prune\(sparsity='true'\) is refused"),
        ({"model": "fashion-cnn", "pattern": "2:4"}, "pattern given without sparsity"),
        ({"model": "fashion-cnn", "seed": -1}, "seed=-1 is refused"),
        ({"model": "fashion-cnn", "max_quality_drop": -1}, r"Gates\(max_quality_drop=-1\) is refused"),
        ({"model": None}, "parameter 'model' is missing"),
        (
            {"model": "fashion-cnn", "plugins": ["no_such_module"]},
            "plugin 'no_such_module' cannot be imported",
        ),
    ],
)
def test_bad_parameters(given: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        report(given, tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_strings_from_the_command_line_mean_what_they_say() -> None:
    job = job_from(
        {
            "model": "fashion-cnn",
            "sparsity": "0.5",
            "weight_bits": "4",
            "scale_search": "false",
            "seed": "3",
            "data": "None",
        }
    )
    assert job.recipe == wb.Recipe(
        wb.Prune(sparsity=0.5, seed=3), wb.Quantize(weight_bits=4, scale_search=False, seed=3)
    )
    assert "data" not in job.settings
    assert empty_to_none(" null ") is None


def test_unwritable_output_is_refused_before_work(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(WorkbenchError, match="cannot write the report to"):
        report(SMALL, blocker / "inside", progress=False)
