"""Records of the trade-off plot, the sweep around a recipe, and the search over all sliders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny_tasks

import workbench as wb
from workbench.errors import RecipeError
from workbench.measure.quality import Estimate
from workbench.sweep import around
from workbench.tradeoff import cost_of, standing


def near(value: float, half: float = 0.0) -> Estimate:
    return Estimate(value, value - half, value + half)


@pytest.mark.parametrize(
    ("mine", "others", "expected"),
    [
        ((near(0.02, 0.01), near(100)), [], "front"),
        ((near(0.02, 0.01), near(100)), [(near(0.05, 0.01), near(50))], "front"),  # cheaper but worse
        ((near(0.02, 0.01), near(100)), [(near(0.01, 0.01), near(50))], "within noise"),  # cheaper and better, intervals overlap
        ((near(0.05, 0.01), near(100)), [(near(0.01, 0.01), near(50))], "dominated"),  # cheaper and better beyond both intervals
        ((near(0.05, 0.01), near(1.0, 0.1)), [(near(0.01, 0.01), near(0.95, 0.1))], "within noise"),  # times overlap
        ((near(0.02, 0.01), near(100)), [(near(0.02, 0.01), near(100))], "front"),  # the same point twice does not beat itself
    ],
)
def test_a_point_is_dominated_only_beyond_the_noise(mine, others, expected) -> None:
    assert standing(mine, others) == expected


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> wb.Bench:
    return wb.Bench(tiny_tasks.tiny_task("vit", "cpu"), ledger=tmp_path_factory.mktemp("sweep") / "points.journal", progress=False)


def test_records_hold_every_complete_point_sorted_by_cost(bench: wb.Bench) -> None:
    rows = [bench.measure(recipe) for recipe in (wb.Recipe(), wb.Recipe(wb.Quantize(weight_bits=8)), wb.Recipe(wb.Quantize(weight_bits=3)))]
    record = wb.tradeoff(rows)
    assert [point.cost.value for point in record.points] == sorted(row.sizes.file_bytes for row in rows)
    assert record.dense_cost == rows[0].dense_sizes.file_bytes
    assert {point.key for point in record.points} == {row.key for row in rows}
    assert {point.key for point in wb.pareto(rows)} == {point.key for point in record.points if point.standing == "front"}
    assert bench.ledger.pareto()
    time = cost_of(rows[1], "latency")
    assert time.low <= time.value <= time.high
    assert time.value == pytest.approx(1 / rows[1].latency.speedup.value)
    unfinished = dataclasses.replace(rows[0], items=1)
    with pytest.raises(ValueError, match="got 0 in 0 points"):
        wb.tradeoff([unfinished])


def test_around_moves_one_slider_and_nothing_else() -> None:
    recipe = wb.Recipe(wb.Prune(sparsity=0.3, criterion="wanda"), wb.Quantize(weight_bits=4, group_size=8))
    bits = around(recipe, "weight_bits")
    assert [made.get("quantize").weight_bits for made in bits] == [2, 3, 4, 6, 8]
    assert all(made.get("prune") == recipe.get("prune") and made.get("quantize").group_size == 8 for made in bits)
    added = around(recipe, "rank_ratio")
    assert [[step.kind() for step in made] for made in added] == [["lowrank", "prune", "quantize"]] * 3


def test_around_a_fixed_pattern_leaves_the_pattern_where_it_cannot_be() -> None:
    made = around(wb.Recipe(wb.Prune(sparsity=0.5, pattern="2:4", criterion="wanda")), "sparsity")
    assert {(one.get("prune").sparsity, one.get("prune").pattern) for one in made} == {(0.25, "unstructured"), (0.5, "2:4"), (0.7, "unstructured"), (0.85, "unstructured")}


def test_around_nothing_has_no_distillation_and_unknown_sliders_are_refused() -> None:
    assert around(wb.Recipe(), "temperature") == ()
    with pytest.raises(RecipeError, match="no slider 'bits'; known: rank_ratio, sparsity, transfer_steps, activation_bits, weight_bits, kv_bits, repair_ratio, qat_steps, temperature"):
        around(wb.Recipe(), "bits")


def test_sweep_measures_into_the_ledger_and_can_be_continued(bench: wb.Bench) -> None:
    first = wb.sweep(bench, trials=4, seed=1)
    known = len(bench.ledger)
    assert first
    assert {point.key for point in first} <= set(bench.ledger.points)
    assert [point.key for point in wb.sweep(bench, trials=4, seed=1)] == [point.key for point in first]
    assert len(bench.ledger) == known  # the same proposals were found, not measured again
    assert Path(bench.ledger.where).is_file()


@pytest.mark.parametrize("given", [{"trials": 0}, {"trials": 3, "sliders": ("bits",)}])
def test_sweep_refuses_what_it_cannot_do(bench: wb.Bench, given) -> None:
    with pytest.raises(RecipeError, match="is refused: sliders are"):
        wb.sweep(bench, **given)
