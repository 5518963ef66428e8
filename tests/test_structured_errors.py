"""What is predicted of structure that leaves, against layers' outputs computed from their real inputs."""

from __future__ import annotations

import pytest
import torch
from recorded import recorded_inputs
from structure_models import task_of

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress.pruning.predicted.structured_errors import (
    SPARSITIES,
    block_ends,
    errors,
    structured_table,
)
from workbench.predict.prior import WHOLE, prior_of, samples_of
from workbench.predict.spots import spot_of, unknown
from workbench.util.progress import no_progress

CASES = [(name, pattern) for name in ("vit", "gpt2", "grouped") for pattern in ("heads", "neurons")]
CASES += [("resnet", "channels"), ("bottleneck", "channels")]
OPTIONS = [{}, {"criterion": "wanda", "allocation": "global"}, {"reconstruct": True}]
PLACE = 8  # of sparsity 0.5


def outputs(module, x):
    """Return a layer's outputs without its bias, float64 [rows, outputs]."""
    weight = module.weight.detach().double()
    weight = weight if type(module).__name__ == "Conv1D" else weight.flatten(1).t()
    return x.double() @ weight


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_errors_are_those_of_the_outputs_of_what_reads_the_units(name, pattern, options):
    task = task_of(name)
    step = wb.Prune(sparsity=0.5, pattern=pattern, **options)
    statistics = Statistics(task)
    samples = samples_of(statistics)
    found = errors(step, statistics, samples, no_progress)
    assert found.shape == (len(samples), len(SPARSITIES))
    assert (found[:, 0] == 0).all()
    made = wb.compress(task, wb.Recipe(step), statistics)
    inputs, left = recorded_inputs(task), {layer.origin: layer for layer in made.layers}
    read = 0
    for about, own in zip(samples, found[:, PLACE].tolist(), strict=True):
        layer, x = left[about.layer.name], inputs[about.layer.name]
        if layer.columns is None:
            assert own == 0
            continue
        read += 1
        assert len(about.weight) == about.layer.shape[0]  # all rows: the layers are tiny
        dense = outputs(task.model.get_submodule(about.layer.name), x)
        small = outputs(made.model.get_submodule(layer.name), x[:, layer.columns])
        rows = torch.arange(dense.shape[1]) if layer.rows is None else layer.rows
        lost = about.felt.double()[rows] @ (dense[:, rows] - small).square().mean(0)
        assert own == pytest.approx(float(lost / (about.felt.double() @ dense.square().mean(0))), rel=2e-3)
    assert read


@pytest.mark.parametrize("name", ["vit", "grouped", "resnet"])
def test_of_a_block_that_leaves_its_last_layers_are_lost_whole(name):
    task = task_of(name)
    step = wb.Prune(sparsity=0.5, pattern="layers")
    statistics = Statistics(task)
    samples = samples_of(statistics)
    found = errors(step, statistics, samples, no_progress)[:, PLACE]
    left = {layer.origin for layer in wb.compress(task, wb.Recipe(step), statistics).layers}
    gone = [about.layer.name for about in samples if about.layer.name not in left]
    lost = [about.layer.name for about, own in zip(samples, found, strict=True) if own == 1]
    assert ((found == 0) | (found == 1)).all()
    assert set(lost) < set(gone)
    assert set(lost) == block_ends(statistics, [about.layer.name for about in samples]).intersection(gone)
    ends = {"vit": 2, "grouped": 2, "resnet": 1}[name]  # attention and MLP; the last convolution
    assert len(lost) == ends * {"vit": 1, "grouped": 2, "resnet": 1}[name]  # blocks that left


def test_a_model_without_such_structure_has_no_table_and_stays_unknown():
    statistics = Statistics(task_of("resnet"))
    prior = prior_of(statistics)
    recipe = wb.Recipe(wb.Prune(sparsity=0.5, pattern="heads"))
    prior.prepare(statistics, [recipe])
    assert prior.missing([recipe]) == {}  # it is not looked for again
    assert prior.costs(recipe) is None
    assert unknown(recipe, prior) == list(recipe)


def test_blocks_of_another_form_stay_unknown():
    """Of a block whose last layers are not known nobody can say what is lost with it."""
    statistics = Statistics(task_of("vit"))
    step = wb.Prune(sparsity=0.5, pattern="layers")
    samples = [about for about in samples_of(statistics) if "mlp" not in about.layer.name]
    assert errors(step, statistics, samples, no_progress) is None


def test_what_the_method_refuses_is_not_foreseen_and_raises_nothing():
    statistics = Statistics(task_of("vit"))
    prior = prior_of(statistics)
    recipe = wb.Recipe(wb.Prune(sparsity=0.5, pattern="heads", targets=("no such layer",)))
    prior.prepare(statistics, [recipe])
    assert unknown(recipe, prior) == list(recipe)


def test_structure_is_known_by_its_own_table_alone():
    """What zeros did at the same sparsity says nothing about it; nor does the table for a perplexity."""
    statistics = Statistics(task_of("vit"))
    prior = prior_of(statistics)
    heads = wb.Recipe(wb.Prune(sparsity=0.5, pattern="heads"))
    zeros = wb.Recipe(wb.Prune(sparsity=0.5))
    prior.prepare(statistics, [zeros])
    assert unknown(heads, prior) == list(heads)
    assert spot_of(heads, prior).costs is None
    prior.prepare(statistics, [heads])
    assert unknown(heads, prior) == []
    assert unknown(heads, None) == list(heads)
    assert unknown(heads, prior, ratio=True) == list(heads)
    assert spot_of(heads, prior, ratio=True).costs is None
    assert unknown(zeros, None, ratio=True) == []
    costs = prior.costs(heads).most
    assert costs[prior.kinds.index(WHOLE)] == costs.sum() > 0
    both = wb.Recipe(*heads, wb.Quantize(weight_bits=3))
    prior.prepare(statistics, [both])
    assert prior.costs(both).most.sum() > costs.sum()


def test_what_the_table_depends_on_is_its_key():
    def key(**options):
        return structured_table(wb.Prune(**({"pattern": "heads", "sparsity": 0.5} | options))).key

    assert key() == key(sparsity=0.25) == key(seed=3)
    others = [
        {"pattern": "neurons"},
        {"criterion": "wanda"},
        {"allocation": "global"},
        {"reconstruct": True},
        {"targets": ("*.0.*",)},
        {"criterion": "random"},
        {"criterion": "random", "seed": 3},
    ]
    assert len({key(), *(key(**options) for options in others)}) == len(others) + 1
    assert structured_table(wb.Prune(pattern="heads", train_steps=5, penalty=1e-4)) is None
    assert structured_table(wb.Prune(pattern="experts")) is None  # not tried
