"""The examples of CONTRIBUTING.md, as plugins: what the page says of each is what happens (kinds of task:
test_kind_extension)."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from contributing import write_example
from test_cli import run
from tiny_tasks import tiny_task

import workbench as wb
from widgets.explorer import Explorer
from workbench.compress.placed import why_not
from workbench.compress.prefix_cache import trains
from workbench.errors import RecipeError
from workbench.ledger.ledger import Ledger
from workbench.report.methods_table import method_rows

NAME = "my_module"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Give a function that imports the example under a heading; forget afterwards what it registered."""
    before = (dict(wb.METHODS.records), dict(wb.CRITERIA.records), dict(wb.FORMATS.records))
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))

    def load(heading: str):
        write_example(heading, tmp_path / "elsewhere", NAME)
        return importlib.import_module(NAME)

    yield load
    sys.modules.pop(NAME, None)
    wb.METHODS.records, wb.CRITERIA.records, wb.FORMATS.records = before


def measured(capsys, folder, *options: str):
    """Measure fashion-cnn by the command line with the plugin, and return the point."""
    where = str(folder / "points.journal")
    common = ("--evaluation-items", "64", "--device", "cpu", "--ledger", where)
    code, _, err = run(capsys, "--plugin", NAME, "measure", "fashion-cnn", *options, *common)
    assert code == 0, err
    return Ledger(where).rows()[0]


def bench(folder) -> wb.Bench:
    return wb.Bench(tiny_task("vit"), device="cpu", ledger=folder / "points.journal", progress=False)


def test_a_method(example, capsys, tmp_path):
    clip = example("A new method").Clip
    assert measured(capsys, tmp_path, "--clip-sigmas", "2.5").recipe == wb.Recipe(clip(clip_sigmas=2.5))


def test_what_a_method_leaves_out_is_unknown_and_said(example, tmp_path):
    clip = example("A new method").Clip
    opened, recipe = bench(tmp_path), wb.Recipe(clip(clip_sigmas=0.2))
    opened.measure(wb.Recipe())
    guess = opened.predictor().predict(recipe)
    assert guess.wide
    assert (guess.quality.low, guess.quality.high) == (0, 1)
    assert any("nothing is known of how Clip changes quality" in note for note in guess.notes)
    assert guess.file_bytes == opened.measure(recipe).sizes.file_bytes  # shapes are stated
    assert list(opened.sensitivity(recipe))
    assert (why_not(recipe.steps[0]), trains(recipe.steps[0])) == ("", False)
    record = wb.METHODS.of(clip)
    wb.METHODS.unregister(clip)
    wb.METHODS.register(clip)(record.apply)  # without a fact
    guess = opened.predictor().predict(recipe)
    assert (guess.file_bytes, guess.speedup) == (None, None)
    assert any("file size unknown" in note for note in guess.notes)
    with pytest.raises(RecipeError, match="nothing says whether Clip makes sense on one layer alone"):
        list(opened.sensitivity(recipe))
    assert why_not(recipe.steps[0]) == "nothing says that this method works block by block"
    assert trains(recipe.steps[0])


def test_a_criterion(example, capsys, tmp_path):
    example("A new criterion of pruning")
    point = measured(capsys, tmp_path, "--sparsity", "0.5", "--criterion", "output_error")
    assert point.recipe == wb.Recipe(wb.Prune(sparsity=0.5, criterion="output_error"))
    assert "criterion=output_error" in {row["choice"] for row in method_rows()}
    opened = bench(tmp_path)
    for pattern, allocation in (("unstructured", "global"), ("neurons", "uniform")):
        recipe = wb.Recipe(wb.Prune(criterion="output_error", pattern=pattern, allocation=allocation))
        assert opened.measure(recipe).complete
    assert not opened.predictor().predict(point.recipe).notes[0].startswith("nothing is known")


def test_a_number_format(example, capsys, tmp_path):
    example("A new number format")
    options = ("--weight-bits", "2", "--number-format", "ternary", "--group-size", "16")
    assert measured(capsys, tmp_path, *options).recipe.label() == "T g16"
    opened, recipe = bench(tmp_path), wb.Recipe(wb.Quantize(weight_bits=2, number_format="ternary"))
    assert opened.predictor().predict(recipe).file_bytes == opened.measure(recipe).sizes.file_bytes
    folder, model = opened.export(recipe, tmp_path / "out"), opened.compress(recipe).model
    loaded = wb.load(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    weight = model.get_submodule("vit.layers.0.mlp.fc1").weight
    assert len(weight[0].unique()) <= 3


def test_a_pane(example, tmp_path):
    tally = example("A new pane").Tally
    panel = Explorer(
        "fashion-cnn",
        ledger=tmp_path / "points.journal",
        evaluation_items=64,
        offline=True,
        device="cpu",
        panes=(tally,),
    )
    try:
        pane = panel.tabs.children[-1]
        assert panel.tabs.titles[-1] == "tally"
        point = panel.run(wb.Recipe(wb.Prune(sparsity=0.5)))
        assert pane.begun >= 1
        assert pane.value == ""  # nobody looks at it
        panel.tabs.select(pane)
        panel.pacer.flush()
        assert pane.value.startswith(f"<b>{pane.begun} measurements begun</b>")
        assert "accuracy" in pane.value
        assert point.complete
    finally:
        panel.close()
    with pytest.raises(ValueError, match="two panes have the title 'tally'; titles so far: layers, "):
        Explorer("fashion-cnn", offline=True, panes=(tally, tally))
