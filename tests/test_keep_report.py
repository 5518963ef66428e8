"""The report that a panel starts: how it is asked for, watched, stopped and linked."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

import workbench as wb
from widgets.panes.keep_bar import link_outputs, state_html
from widgets.session.report_run import (
    ReportRun,
    ReportState,
    free_name,
    plugins_of,
    progress_of,
    reason,
    report_command,
)
from workbench.cli import workbench as command_group
from workbench.errors import RecipeError, WorkbenchError
from workbench.report.report import job_from, notebook_parameters

W4 = wb.Recipe(wb.Quantize(weight_bits=4))
BOTH = wb.Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4))
TWICE = wb.Recipe(
    wb.Quantize(weight_bits=8, targets=("*q_proj",)), wb.Quantize(weight_bits=2, targets=("*fc1",))
)
NOTE = 'schön <b>\N{SLIGHTLY SMILING FACE}</b>, "quoted"\nsecond line, 中文'


def test_a_whole_recipe_goes_through_the_command_line_and_the_notebook():
    settings = {
        "data": None,
        "device": "cpu",
        "ledger": "p.journal",
        "evaluation_items": 64,
        "offline": True,
        "progress": False,
    }
    arguments = report_command("fashion-cnn", TWICE, settings, Path("reports"), "x")
    assert arguments[:3] == [sys.executable, "-m", "workbench"]
    context = command_group.commands["report"].make_context("report", arguments[4:])
    given = {key: value for key, value in context.params.items() if value is not None and value is not False}
    assert (given.pop("output"), given.pop("name")) == (Path("reports"), "x")
    job = job_from(notebook_parameters(given))
    assert job.recipe == TWICE
    assert {name: job.settings.get(name) for name in settings} == {**settings, "data": None}
    assert job_from(notebook_parameters({"model": "m", "recipe": "[]"})).recipe == wb.Recipe()
    assert (
        notebook_parameters({"model": "m", "sparsity": 0.5})["weight_bits"] is None
    )  # not the notebook's example on top
    assert "weight_bits" not in notebook_parameters({"model": "m"})


def test_a_recipe_given_twice_or_wrongly_is_refused():
    with pytest.raises(
        RecipeError, match="given together with weight_bits: give the whole recipe, or single options"
    ):
        job_from({"model": "m", "recipe": W4.to_json(), "weight_bits": 4})
    with pytest.raises(RecipeError, match=r"not a recipe in JSON: 'half'"):
        job_from({"model": "m", "recipe": "half"})
    with pytest.raises(RecipeError, match=r"Prune\(sparsity=2\) is refused"):
        job_from({"model": "m", "recipe": '[{"step": "prune", "sparsity": 2}]'})


def test_methods_from_elsewhere_come_along_as_plugins(monkeypatch):
    monkeypatch.setattr(wb.Prune, "__module__", "my.methods")
    assert plugins_of(BOTH) == ["my.methods"]
    assert report_command("m", BOTH, {}, Path(), "x")[3:5] == ["--plugin", "my.methods"]
    monkeypatch.setattr(wb.Prune, "__module__", "__main__")
    with pytest.raises(RecipeError, match="Prune is defined in this notebook"):
        plugins_of(BOTH)


CRITERION = """
import torch
from workbench.compress.pruning.criterion import CRITERIA, Criterion
from workbench.util.about import About

CRITERIA.register(
    Criterion(
        name="{name}",
        about=About("{name}", "", "", "", ""),
        scores=lambda seen, seed: seen.weights.abs().clone(),
        reads=frozenset(),
        by_row=False,
        across="as it is",
    )
)
"""
FORMAT = """
from workbench.formats.number_format import FORMATS, NumberFormat

FORMATS.register(
    NumberFormat(
        name="{name}", label="X", bits=2, levels=(-1.0, 0.0, 0.5, 1.0), largest=1.0, zero_code=1
    )
)
"""


def test_criteria_and_number_formats_from_elsewhere_come_along_too(monkeypatch, tmp_path):
    from workbench.compress.pruning.criterion import CRITERIA
    from workbench.formats.number_format import FORMATS

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_criterion.py").write_text(CRITERION.format(name="mine"))
    (tmp_path / "my_format.py").write_text(FORMAT.format(name="two_levels"))
    import my_criterion  # noqa: F401
    import my_format  # noqa: F401

    try:
        recipe = wb.Recipe(
            wb.Prune(sparsity=0.5, criterion="mine"),
            wb.Quantize(weight_bits=2, number_format="two_levels", group_size=16),
        )
        assert plugins_of(recipe) == ["my_criterion", "my_format"]
        assert plugins_of(BOTH) == []
        CRITERIA.modules["mine"] = "__main__"
        with pytest.raises(RecipeError, match="criterion 'mine' is defined in this notebook"):
            plugins_of(recipe)
    finally:
        CRITERIA.unregister("mine")
        FORMATS.unregister("two_levels")
        for name in ("my_criterion", "my_format"):
            sys.modules.pop(name)


def watched(code: str, page: Path, stop_after: str = "") -> list[ReportState]:
    states: list[ReportState] = []
    run = ReportRun(states.append, every_s=0.05)
    run.start([sys.executable, "-c", code, str(page)], page)
    with pytest.raises(WorkbenchError, match="being made already"):
        run.start(["true"], page)
    if stop_after:
        deadline = time.monotonic() + 20
        while not page.with_suffix(stop_after).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        run.stop()
    run.thread.join(30)
    assert not run.running
    return states


NOTEBOOK = """
import json, pathlib, sys, time
page = pathlib.Path(sys.argv[1])
for done in range(3):
    said = ["completed" if i < done else "pending" for i in range(3)]
    cells = [{"metadata": {"papermill": {"status": status}}} for status in said]
    page.with_suffix(".ipynb").write_text(json.dumps({"cells": cells}))
    time.sleep(0.3)
page.write_text("<html>")
"""


def test_progress_is_read_from_the_notebook_and_the_page_ends_it(tmp_path):
    states = watched(NOTEBOOK, tmp_path / "a" / "r.html")
    assert [state.state for state in states][-1] == "done"
    assert [(s.done, s.total) for s in states if s.total] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert progress_of(tmp_path / "none.ipynb") is None
    (tmp_path / "half.ipynb").write_text('{"cells": [')
    assert progress_of(tmp_path / "half.ipynb") is None
    assert free_name(tmp_path / "a", "r") == "r-2"


def test_a_report_that_fails_says_why_and_one_that_is_stopped_ends(tmp_path):
    states = watched("import sys; print('noise'); sys.exit('error: no such <model>')", tmp_path / "r.html")
    assert (states[-1].state, states[-1].message) == ("failed", "no such <model>")
    assert "&lt;model&gt;" in state_html(states[-1])
    start = time.monotonic()
    code = (
        "import pathlib, sys, time; pathlib.Path(sys.argv[1]).with_suffix('.started').touch(); time.sleep(60)"
    )
    assert watched(code, tmp_path / "s.html", ".started")[-1].state == "stopped"
    assert time.monotonic() - start < 30
    assert reason("", 3) == "the report ended with exit code 3 and said nothing"
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkbenchError, match="cannot write a report to"):
        ReportRun(lambda _: None).start(["true"], tmp_path / "file" / "r.html")


def test_a_link_stays_below_the_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "href='reports/a%20b.html'" in link_outputs(Path("reports/a b.html"))[0]["data"]["text/html"]
    assert link_outputs(tmp_path / "x.html")[0]["data"]["text/plain"] == "x.html"
    assert link_outputs(Path("/elsewhere/x.html")) == link_outputs(Path("../x.html")) == ()
