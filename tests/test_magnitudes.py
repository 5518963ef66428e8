"""Thresholds of 16-bit weights that are looked up give what a search over all weights gives."""

from __future__ import annotations

import pytest
import torch
from tiny_tasks import same, tiny_task, weights

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.compress.core.batch import Batch
from workbench.compress.pruning import magnitude_histogram
from workbench.errors import CompressionError
from workbench.kernels import magnitudes
from workbench.kernels.selection import BLOCK, first_true
from workbench.modules.layer import Layer
from workbench.recipe import Recipe

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("columns", [1, 7, BLOCK, 3 * BLOCK, 3 * BLOCK + 1])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_first_true_is_a_running_count(device, columns, share):
    chance = torch.Generator().manual_seed(columns)
    flags = torch.rand(6, columns, generator=chance) < share
    wanted = torch.tensor([0, 1, 5, columns // 2, columns, columns + 3])[:, None]
    first = first_true(flags.to(device), wanted.to(device)).cpu()
    for row, mask, count in zip(flags.tolist(), first.tolist(), wanted.flatten().tolist(), strict=True):
        places = [i for i, flag in enumerate(row) if flag]
        assert [i for i, flag in enumerate(mask) if flag] == places[:count]


def one_layer(weight: torch.Tensor) -> Layer:
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return Layer("layer", "layer", module, pristine=False)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(3, 5), (16, 64), (40, 128)])
def test_a_looked_up_threshold_keeps_what_sorting_keeps(device, dtype, shape):
    chance = torch.Generator().manual_seed(0)
    for scale in (1e-6, 1.0, 300.0):
        weight = (scale * torch.randn(shape, generator=chance)).to(dtype)
        weight[0, :2] = torch.tensor([0.0, -0.0])
        weight[-1] = weight[0]  # ties
        batch = Batch((one_layer(weight.to(device)),))
        below = magnitude_histogram.counts(batch, None)
        values = weight.flatten().double().abs()
        order = sorted(
            range(len(values)), key=lambda i, values=values: (-values[i], i)
        )  # the largest first, ties in order
        for removed in (0, 1, len(values) // 3, len(values) - 1, len(values)):
            kept = magnitudes.keep(batch.stored().flatten(1), below, [removed]).flatten().tolist()
            assert [i for i, stays in enumerate(kept) if stays] == sorted(order[: len(values) - removed]), (
                scale,
                removed,
            )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "first", [(), (wb.LowRank(rank_ratio=0.6, factorization="svd"),)], ids=["dense", "after low rank"]
)
def test_recipes_give_the_same_bits_as_with_a_search(monkeypatch, sort, device, dtype, first):
    task = tiny_task(sort, device, dtype)
    statistics = Statistics(task)
    for sparsity, allocation in ((0.2, "uniform"), (0.5, "global"), (0.5, "uniform"), (0.9, "global")):
        recipe = Recipe(*first, wb.Prune(sparsity=sparsity, allocation=allocation))
        counted = compress(task, recipe, statistics)
        with monkeypatch.context() as patch:
            patch.setattr(magnitude_histogram, "countable", lambda _step, _layers: False)
            searched = compress(task, recipe)
        assert same(weights(counted.model), weights(searched.model))
        assert counted.report == searched.report
        assert all(
            torch.equal(by_count.mask, by_search.mask)
            for by_count, by_search in zip(counted.layers, searched.layers, strict=True)
            if by_count.mask is not None
        )


def test_counts_are_kept_for_the_next_sparsity(monkeypatch):
    task = tiny_task("llama", "cpu", torch.bfloat16)
    statistics, times = Statistics(task), []
    keys = magnitudes.keys
    compress(task, Recipe(wb.Prune(sparsity=0.3)), statistics)
    monkeypatch.setattr(magnitudes, "keys", lambda stored: times.append(stored.shape) or keys(stored))
    once = len({id(layer) for layer in compress(task, Recipe(wb.Prune(sparsity=0.4)), statistics).layers})
    assert 0 < len(times) <= once  # each batch's weights are read for the mask alone


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_infinite_weights_are_refused_by_name(allocation):
    task = tiny_task("llama", "cpu", torch.bfloat16)
    name, module = next(
        (name, module) for name, module in task.model.named_modules() if isinstance(module, torch.nn.Linear)
    )
    with torch.no_grad():
        module.weight[0, 0] = torch.inf
    with pytest.raises(CompressionError, match=f"{name}.*infinite"):
        compress(task, Recipe(wb.Prune(sparsity=0.4, allocation=allocation)))


def test_only_16_bit_magnitudes_are_counted():
    layer = one_layer(torch.randn(4, 8).bfloat16())
    assert magnitude_histogram.countable(wb.Prune(sparsity=0.5), [layer])
    assert not magnitude_histogram.countable(wb.Prune(sparsity=0.5, criterion="wanda"), [layer])
    assert not magnitude_histogram.countable(wb.Prune(pattern="2:4"), [layer])
    assert not magnitude_histogram.countable(
        wb.Prune(sparsity=0.5), [layer, one_layer(torch.randn(4, 8).half())]
    )
    assert not magnitude_histogram.countable(wb.Prune(sparsity=0.5), [one_layer(torch.randn(4, 8))])
    layer.mask = torch.ones(4, 8, dtype=torch.bool)
    assert not magnitude_histogram.countable(wb.Prune(sparsity=0.5), [layer])
