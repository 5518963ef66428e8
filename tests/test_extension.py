"""A method from outside: one dataclass and one function, and it has help, checks, a flag, a parameter and a
place in the report."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cli import run
from tiny_tasks import tiny_task

from workbench.bench import Bench
from workbench.compress.registry import METHODS
from workbench.errors import RecipeError
from workbench.ledger.ledger import Ledger
from workbench.recipe import Recipe
from workbench.report.report import job_from
from workbench.search.sweep import around

PLUGIN = '''
"""Shrink: bring every weight a little closer to zero."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from workbench import METHODS, Step, configuration


@configuration
class Shrink(Step):
    """Multiply weights by 1 - shrinkage."""

    slider: ClassVar[str] = "shrinkage"
    position: ClassVar[int] = 15
    stops: ClassVar[tuple[float, ...]] = (0.1, 0.2)

    shrinkage: Annotated[float, Field(gt=0, lt=1, description="fraction by which weights shrink")]
    shrink_norm: Annotated[Literal["plain", "rowwise"], Field(description="what shrinks together")] = "plain"


@METHODS.register(Shrink)
def shrink(step, work):
    for layer in work.select(step):
        layer.write(layer.matrix() * (1 - step.shrinkage))
        work.took(step, layer, f"shrunk by {step.shrinkage:g}")
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Put a plugin where Python finds it; forget it afterwards."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "shrinking_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(folder))
    before = METHODS.steps()
    yield "shrinking_plugin"
    module = sys.modules.pop("shrinking_plugin", None)
    if module is not None:
        METHODS.unregister(module.Shrink)
    assert METHODS.steps() == before


def test_from_python(plugin, tmp_path):
    shrink = importlib.import_module(plugin).Shrink
    task = tiny_task("vit")
    bench = Bench(task, device="cpu", ledger=tmp_path / "points.journal", progress=False)
    recipe = Recipe(shrink(shrinkage=0.25, targets=("re:fc1",)))
    assert repr(recipe) == "Recipe(Shrink(targets=('re:fc1',), shrinkage=0.25))"
    assert METHODS.from_json(recipe.to_json()) == recipe
    point = bench.measure(recipe)
    rows = {row.name: row for row in point.layers}
    assert rows["vit.layers.0.mlp.fc1"].outcome == "shrunk by 0.25"
    assert rows["vit.layers.0.mlp.fc1"].relative_error == pytest.approx(0.25, rel=1e-5)
    weight = bench.compress(recipe).model.get_submodule("vit.layers.0.mlp.fc1").weight
    assert torch.equal(weight, task.model.get_submodule("vit.layers.0.mlp.fc1").weight * 0.75)
    assert Ledger(tmp_path / "points.journal").rows() == [point]
    exported = bench.export(recipe, tmp_path / "out")
    assert "shrinkage=0.25" in (exported / "README.md").read_text()


def test_its_values_are_checked_like_any_others(plugin):
    shrink = importlib.import_module(plugin).Shrink
    for values, message in (
        ({"shrinkage": 1}, r"^Shrink\(shrinkage=1\) is refused: input should be less than 1$"),
        ({"shrinkage": 0.1, "shrink_norm": "x"}, "'plain' or 'rowwise'"),
        ({"shrinkage": 0.1, "shrinkige": 0.1}, "Shrink has no option 'shrinkige'"),
        ({}, r"Shrink.*shrinkage"),
    ):
        with pytest.raises(RecipeError, match=message):
            shrink(**values)


def test_as_a_notebook_parameter(plugin):
    job = job_from(
        {
            "model": "fashion-cnn",
            "plugins": [plugin],
            "shrinkage": "0.1",
            "shrink_norm": "rowwise",
            "weight_bits": 4,
            "shrink_targets": "re:conv",
        }
    )
    shrink = importlib.import_module(plugin).Shrink
    assert job.recipe.steps[0] == shrink(shrinkage=0.1, shrink_norm="rowwise", targets=("re:conv",))
    assert [step.kind() for step in job.recipe] == ["shrink", "quantize"]
    with pytest.raises(RecipeError, match=r"Shrink\(shrinkage=2\) is refused"):
        job_from({"model": "fashion-cnn", "plugins": plugin, "shrinkage": 2})
    with pytest.raises(RecipeError, match="shrink_norm given without shrinkage"):
        job_from({"model": "fashion-cnn", "plugins": plugin, "shrink_norm": "plain"})
    with pytest.raises(RecipeError, match="unknown parameter 'shrinkages'; nearest: shrinkage"):
        job_from({"model": "fashion-cnn", "plugins": plugin, "shrinkages": 0.1})


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"trains": False}, "Shrink states trains=False, which should be a function"),
        ({"shapes": True}, "Shrink states shapes=True, which should be a function"),
        ({"title": 3}, "Shrink states title=3, which should be a str"),
        ({"alone": "yes"}, "Shrink states alone='yes', which should be a bool"),
        ({"train": None}, "Shrink states 'train', which is no fact; nearest: trains"),
    ],
)
def test_a_fact_of_the_wrong_sort_is_refused_when_it_is_stated(plugin, facts, message):
    shrink = importlib.import_module(plugin).Shrink
    METHODS.unregister(shrink)
    with pytest.raises(RecipeError, match=f"^{message}"):
        METHODS.register(shrink, **facts)
    assert shrink not in METHODS.steps()


def test_without_the_plugin_its_options_are_unknown():
    with pytest.raises(RecipeError, match="unknown parameter 'shrinkage'"):
        job_from({"model": "fashion-cnn", "shrinkage": 0.1})
    with pytest.raises(RecipeError, match="unknown step 'shrink'"):
        METHODS.from_json('[{"step": "shrink", "shrinkage": 0.1}]')


def test_a_report_sweeps_it(plugin):
    importlib.import_module(plugin)
    base = METHODS.recipe({"weight_bits": 4})
    assert [recipe.label() for recipe in around(base, "shrinkage")] == [
        "shrinkage 0.1 + W4",
        "shrinkage 0.2 + W4",
    ]


def test_from_the_command_line(plugin, capsys, tmp_path):
    code, out, _ = run(capsys, "--plugin", plugin, "measure", "--help")
    assert code == 0
    text = " ".join(out.split())
    assert "--shrinkage VALUE" in text
    assert "Shrink: fraction by which weights shrink" in text
    assert "--shrink-norm" in text
    assert "[default: plain]" in text
    assert "PydanticUndefined" not in text
    where = tmp_path / "points.journal"
    code, out, _ = run(
        capsys,
        "--plugin",
        plugin,
        "measure",
        "fashion-cnn",
        "--shrinkage",
        "0.1",
        "--evaluation-items",
        "64",
        "--device",
        "cpu",
        "--ledger",
        str(where),
    )
    assert code == 0
    assert "shrunk by 0.1" in out
    assert Ledger(where).rows()[0].recipe.get("shrink").shrinkage == 0.1
    code, _, err = run(capsys, "--plugin", plugin, "measure", "fashion-cnn", "--shrinkage", "1")
    assert (code, err) == (2, "error: Shrink(shrinkage='1') is refused: input should be less than 1\n")


def test_in_a_process_of_its_own(plugin, tmp_path):
    script = Path(sys.executable).with_name("workbench")
    folder = str(tmp_path / "elsewhere")
    done = subprocess.run(
        [script, "--plugin", plugin, "measure", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": folder, "PATH": ""},
    )
    assert "--shrinkage" in done.stdout


def test_points_of_a_plugin_wait_in_the_ledger_until_it_is_loaded_again(plugin, tmp_path):
    module = importlib.import_module(plugin)
    where = tmp_path / "points.journal"
    point = Bench(tiny_task("vit"), device="cpu", ledger=where, progress=False).measure(
        Recipe(module.Shrink(shrinkage=0.5))
    )
    METHODS.unregister(module.Shrink)
    without = Ledger(where)
    assert (len(without), without.unreadable) == (0, 1)
    METHODS.register(module.Shrink)(module.shrink)
    assert Ledger(where).rows() == [point]
