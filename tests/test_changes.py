"""What the report says of weights: errors and zeros, of touched and untouched ones, against plain float64."""

from __future__ import annotations

import pytest
import torch
from tiny_tasks import tiny_task

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.compress.core import layer_report


def plain(before: torch.Tensor, after: torch.Tensor) -> tuple[float, int]:
    return float((after.double() - before.double()).norm() / before.double().norm()), int((after == 0).sum())


@pytest.mark.parametrize("piece", [7, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_and_zeros_are_those_of_the_whole_weight_whatever_the_piece(monkeypatch, piece, dtype):
    monkeypatch.setattr(layer_report, "PIECE", {"cpu": piece})
    task = tiny_task("vit")
    task.model.to(dtype)
    for recipe in (wb.Recipe(wb.Prune(sparsity=0.5)), wb.Recipe(wb.Quantize(weight_bits=3))):
        compressed = compress(task, recipe, shared=True)
        single = {
            layer.name: layer for layer in compressed.layers if layer.origin == layer.name and not layer.role
        }
        for row in compressed.report:
            if row.name in single:
                error, zeros = plain(task.model.get_submodule(row.name).weight, single[row.name].parameter)
                assert row.relative_error == pytest.approx(error, rel=1e-5, abs=1e-7)
                assert row.sparsity * row.weights == pytest.approx(zeros)


def test_what_no_step_wrote_is_looked_at_once_and_said_to_be_as_it_was(monkeypatch):
    task = tiny_task("vit")
    with torch.no_grad():
        next(module for module in task.model.modules() if isinstance(module, torch.nn.Linear)).weight[0] = 0
    statistics, counted = Statistics(task), []
    monkeypatch.setattr(
        layer_report,
        "unchanged",
        lambda weights, real=layer_report.unchanged: counted.append(len(weights)) or real(weights),
    )
    recipes = [wb.Recipe(wb.Prune(sparsity=s, targets=("*fc1",))) for s in (0.3, 0.6)]
    first, second = (compress(task, recipe, statistics, shared=True) for recipe in recipes)
    looked = sum(counted)
    assert looked == len([row for row in first.report if row.relative_error == 0.0])
    for compressed in (first, second):
        untouched = [
            row for row in compressed.report if "fc1" not in row.name and row.relative_error is not None
        ]
        assert {row.relative_error for row in untouched} == {0.0}
        for row in untouched:
            assert row.sparsity * row.weights == pytest.approx(
                int((task.model.get_submodule(row.name).weight == 0).sum())
            )
