"""What each layer alone costs, against a loop written by hand; weights as histograms, against numpy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny_tasks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.compress import compress
from workbench.errors import Cancelled, RecipeError
from workbench.measure.weight_histograms import weight_change, weight_changes
from workbench.metrics.quality import paired_proportions
from workbench.sensitivity import alone, layers_of

HARD = wb.Recipe(wb.Prune(sparsity=0.8), wb.Quantize(weight_bits=2))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return wb.Bench(
        tiny_tasks.tiny_task("vit"),
        ledger=tmp_path_factory.mktemp("points") / "points.journal",
        progress=False,
        device="cpu",
    )


def by_hand(bench, layer, count):
    """Return right answers of both models on the first items, with only `layer` pruned and quantized."""
    task = bench.task
    steps = [dataclasses.replace(step, targets=(layer,)) for step in HARD]
    compressed = compress(task, wb.Recipe(*steps))
    items = task.evaluation[:count]
    with torch.inference_mode():
        return [
            (model(**items.inputs).logits.argmax(-1) == items.labels).double()
            for model in (task.model, compressed.model)
        ]


def test_each_layer_alone_is_what_a_loop_by_hand_finds(bench):
    costs = list(bench.sensitivity(HARD, items=32))
    names = [row.name for row in compress(bench.task, HARD).report if row.sparsity]
    assert [cost.name for cost in costs] == names
    for cost in costs:
        dense, single = by_hand(bench, cost.name, 32)
        change = paired_proportions(dense, single, 0.95)
        assert cost.drop.value == pytest.approx(float((dense - single).mean()))
        assert (cost.drop.low, cost.drop.high) == pytest.approx((-change.high, -change.low))
        assert (cost.metric, cost.items, cost.reason) == ("accuracy", 32, "")
        assert cost.recipe == wb.Recipe(*(dataclasses.replace(step, targets=(cost.name,)) for step in HARD))
        assert cost.loss.low <= cost.loss.value <= cost.loss.high
        assert cost.saved_bytes > 0


def test_what_is_known_for_a_layer_is_not_measured_again(bench):
    first = {cost.name: cost for cost in bench.sensitivity(HARD, items=16)}
    layer = next(iter(first))
    apart = wb.Recipe(*(dataclasses.replace(step, targets=("*", f"!{layer}")) for step in HARD))
    again = {cost.name: cost for cost in bench.sensitivity(apart, items=16)}
    assert set(again) == set(first) - {layer}
    assert all(again[name] is first[name] for name in again)


def test_language_models_read_windows_and_say_perplexity(tmp_path):
    bench = wb.Bench(
        tiny_tasks.tiny_task("llama"), ledger=tmp_path / "points.journal", progress=False, device="cpu"
    )
    costs = list(bench.sensitivity(wb.Recipe(wb.Quantize(weight_bits=2))))
    assert {cost.metric for cost in costs} == {"perplexity"}
    assert all(cost.items == min(16, len(bench.evaluation)) for cost in costs)
    for cost in costs:
        assert np.exp(cost.loss.value) - 1 == pytest.approx(cost.drop.value)


def test_distillation_is_left_out_and_each_layer_has_its_own_value():
    recipe = wb.Recipe(
        wb.Prune(sparsity=0.5, targets=("*", "!a")),
        wb.Prune(sparsity=0.8, targets=("a",)),
        wb.Distill(temperature=2),
    )
    assert alone(recipe, "a") == wb.Recipe(wb.Prune(sparsity=0.8, targets=("a",)))
    assert alone(recipe, "b") == wb.Recipe(wb.Prune(sparsity=0.5, targets=("b",)))
    assert alone(recipe, "b", head="b") == wb.Recipe()
    with pytest.raises(RecipeError, match="works on one factor of a only"):
        alone(wb.Recipe(wb.LowRank(rank_ratio=0.3), wb.Prune(sparsity=0.5, targets=("a.0",))), "a")


def test_what_cannot_be_measured_is_said(bench):
    with pytest.raises(RecipeError, match="compresses no layer"):
        list(bench.sensitivity(wb.Recipe()))
    with pytest.raises(RecipeError, match="items=1 is refused"):
        list(bench.sensitivity(HARD, items=1))
    part = wb.Recipe(wb.Quantize(weight_bits=4, group_size=32))  # divides the inputs of some layers only
    costs = {cost.name: cost for cost in bench.sensitivity(part, items=8)}
    assert any(cost.drop is None and "does not divide" in cost.reason for cost in costs.values())
    assert any(cost.drop is not None for cost in costs.values())
    assert list(costs) == list(layers_of(bench.task.model, part))


def test_it_stops_when_told(bench):
    seen = []
    with pytest.raises(Cancelled):
        seen.extend(
            bench.sensitivity(wb.Recipe(wb.Prune(sparsity=0.33)), items=8, cancelled=lambda: len(seen) >= 2)
        )
    assert len(seen) == 2


# --- weights


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, -1.5, 0.25, 3.0, 1e-3]), min_size=1, max_size=40),
    st.floats(0, 2, width=32),
    st.integers(1, 70),
)
def test_counts_and_zeros_sum_to_the_number_of_weights(values, factor, bins):
    before = torch.tensor(values)
    after = before * factor
    change = weight_change("layer", before, after, bins)
    for counts, zeros, tensor in (
        (change.before, change.zeros_before, before),
        (change.after, change.zeros_after, after),
    ):
        assert sum(counts) + zeros == len(values)
        assert zeros == sum(value == 0 for value in tensor.tolist())
        assert len(counts) == len(change.edges) - 1 == bins
        assert (
            list(counts)
            == np.histogram(tensor[tensor != 0].numpy(), np.array(change.edges, np.float32))[0].tolist()
        )
    assert change.weights == len(values)


@pytest.mark.parametrize(
    "recipe",
    [wb.Recipe(), HARD, wb.Recipe(wb.LowRank(rank_ratio=0.3), wb.Prune(sparsity=0.5))],
    ids=lambda recipe: recipe.label(),
)
@pytest.mark.parametrize("sort", ["vit", "gpt2", "resnet"])
def test_histograms_are_of_the_very_weights_of_the_recipe(recipe, sort):
    task = tiny_tasks.tiny_task(sort)
    compressed = compress(task, recipe)
    modules = dict(task.model.named_modules())
    names = [row.name for row in compressed.report if row.name in modules]
    changes = list(weight_changes(task.model, compressed, first=names[2]))
    assert changes[0].name == names[2]
    assert {change.name for change in changes} == set(names)
    for change in changes:
        dense, now = (
            task.model.get_submodule(change.name).weight,
            compressed.model.get_submodule(change.name).weight,
        )
        assert change.weights == dense.numel() == sum(change.after) + change.zeros_after
        assert change.zeros_after == int((now == 0).sum())
        assert (change.edges[0], change.edges[-1]) == pytest.approx(
            (min(float(dense.min()), float(now.min())), max(float(dense.max()), float(now.max())))
        )
        if not len(recipe):
            assert change.before == change.after


def test_the_bench_reads_weights_and_hands_out_what_it_compressed(bench):
    kept = []
    point = list(bench.stream(wb.Recipe(wb.Prune(sparsity=0.41)), on_compressed=kept.append))[-1]
    (compressed,) = kept
    direct = {change.name: change for change in weight_changes(bench.task.model, compressed)}
    assert {change.name: change for change in bench.weights(point.recipe)} == direct
    list(bench.stream(point.recipe, on_compressed=kept.append))
    assert len(kept) == 1  # the ledger has the point: nothing was compressed
