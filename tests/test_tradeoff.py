"""Records of the trade-off plot, the sweep around a recipe, and the search over all sliders."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import tiny_tasks
from hypothesis import given
from hypothesis import strategies as st

import workbench as wb
from widgets.plot.thinning import thin
from workbench.errors import RecipeError
from workbench.ledger.pareto import cost_of, ends, standings
from workbench.measure.card import verdict
from workbench.measure.measurement import Measurement
from workbench.metrics.quality import Estimate
from workbench.search.sweep import around


def standing(mine, others) -> str:
    """Return a point's standing among others, looking at each; (drop, cost), both better when smaller."""
    result = "front"
    for drop, cost in others:
        if (
            drop.value <= mine[0].value
            and cost.value <= mine[1].value
            and (drop.value, cost.value) != (mine[0].value, mine[1].value)
        ):
            if drop.high < mine[0].low and cost.high <= mine[1].low:
                return "dominated"
            result = "within noise"
    return result


def near(value: float, half: float = 0.0) -> Estimate:
    return Estimate(value, value - half, value + half)


@pytest.mark.parametrize(
    ("mine", "others", "expected"),
    [
        ((near(0.02, 0.01), near(100)), [], "front"),
        ((near(0.02, 0.01), near(100)), [(near(0.05, 0.01), near(50))], "front"),  # cheaper but worse
        (
            (near(0.02, 0.01), near(100)),
            [(near(0.01, 0.01), near(50))],
            "within noise",
        ),  # cheaper and better, intervals overlap
        (
            (near(0.05, 0.01), near(100)),
            [(near(0.01, 0.01), near(50))],
            "dominated",
        ),  # cheaper and better beyond both intervals
        (
            (near(0.05, 0.01), near(1.0, 0.1)),
            [(near(0.01, 0.01), near(0.95, 0.1))],
            "within noise",
        ),  # times overlap
        (
            (near(0.02, 0.01), near(100)),
            [(near(0.02, 0.01), near(100))],
            "front",
        ),  # the same point twice does not beat itself
    ],
)
def test_a_point_is_dominated_only_beyond_the_noise(mine, others, expected) -> None:
    pairs = [mine, *others]
    assert (
        standings(
            ends(dataclasses.astuple(drop) for drop, _ in pairs),
            ends(dataclasses.astuple(cost) for _, cost in pairs),
        )[0]
        == standing(mine, others)
        == expected
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> wb.Bench:
    return wb.Bench(
        tiny_tasks.tiny_task("vit", "cpu"),
        ledger=tmp_path_factory.mktemp("sweep") / "points.journal",
        progress=False,
    )


def test_records_hold_every_complete_point_sorted_by_cost(bench: wb.Bench) -> None:
    rows = [
        bench.measure(recipe)
        for recipe in (
            wb.Recipe(),
            wb.Recipe(wb.Quantize(weight_bits=8)),
            wb.Recipe(wb.Quantize(weight_bits=3)),
        )
    ]
    record = wb.tradeoff(rows)
    assert [point.cost.value for point in record.points] == sorted(row.sizes.file_bytes for row in rows)
    assert record.dense_cost == rows[0].dense_sizes.file_bytes
    assert {point.key for point in record.points} == {row.key for row in rows}
    assert {point.key for point in wb.pareto(rows)} == {
        point.key for point in record.points if point.standing == "front"
    }
    assert bench.ledger.pareto()
    time = cost_of(rows[1], "latency")
    assert time.low <= time.value <= time.high
    assert time.value == pytest.approx(1 / rows[1].latency.speedup.value)
    unfinished = dataclasses.replace(rows[0], items=1)
    with pytest.raises(ValueError, match="got 0 in 0 points"):
        wb.tradeoff([unfinished])


NUMBERS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, math.inf, math.nan]) | st.floats(0, 4)


@st.composite
def estimates(draw, numbers=NUMBERS) -> Estimate:
    low, value, high = sorted((draw(numbers) for _ in range(3)), key=lambda x: (math.isnan(x), x))
    return Estimate(value, low, high)


@given(st.lists(st.tuples(estimates(), estimates()), max_size=20), st.lists(st.integers(0, 19), max_size=5))
def test_standings_are_the_plain_definition_with_ties_and_unknown_ends(pairs, repeated):
    pairs += [pairs[i % len(pairs)] for i in repeated if pairs]
    complete = [
        not any(math.isnan(x) for estimate in pair for x in (estimate.value, estimate.low, estimate.high))
        for pair in pairs
    ]
    plain = [
        (
            standing(pair, [rival for j, rival in enumerate(pairs) if complete[j] and j != i])
            if complete[i]
            else "front"
        )
        for i, pair in enumerate(pairs)
    ]
    assert (
        standings(
            ends(dataclasses.astuple(drop) for drop, _ in pairs),
            ends(dataclasses.astuple(cost) for _, cost in pairs),
        )
        == plain
    )


@st.composite
def ledgers(draw, row) -> list:
    """Rows with few different values, so that many tie.

    Some without latency, some incomplete, of either kind of metric.
    """
    metric = draw(st.sampled_from(["accuracy", "loss", "perplexity"]))
    rows = []
    for index in range(draw(st.integers(1, 15))):
        middle, half, size = (
            draw(st.integers(-4, 4)) / 8,
            draw(st.integers(0, 2)) / 8,
            draw(st.integers(1, 6)),
        )
        quality = dataclasses.replace(
            row.primary, metric=metric, change=Estimate(middle, middle - half, middle + 2 * half)
        )
        speed = draw(st.sampled_from([0.5, 1.0, 1.5, 2.0]))
        latency = dataclasses.replace(row.latency, speedup=Estimate(speed, 0.9 * speed, 1.2 * speed))
        measured = draw(st.sampled_from(["all", "all", "no latency", "incomplete"]))
        rows.append(
            dataclasses.replace(
                row,
                key=f"{index:016x}",
                quality=(quality, *row.quality),
                sizes=dataclasses.replace(row.sizes, file_bytes=1000 * size),
                latency=latency if measured == "all" else None,
                missing={} if measured == "all" else {"latency": "no clock"},
                items=1 if measured == "incomplete" else row.items,
            )
        )
    return rows


@given(data=st.data(), cost=st.sampled_from(["file_bytes", "latency"]), late=st.booleans())
def test_the_front_and_the_record_are_those_of_comparing_every_pair(
    bench: wb.Bench, data, cost, late
) -> None:
    rows = data.draw(ledgers(bench.measure(wb.Recipe(wb.Quantize(weight_bits=3)))))
    rows = [Measurement.from_json(row.to_json()) for row in rows] if late else rows
    shown = [row for row in rows if row.complete and cost_of(row, cost) is not None]
    if not shown:
        with pytest.raises(ValueError, match="got 0 in 0 points"):
            wb.pareto(rows, cost)
        return
    pairs = {row.key: (row.primary.drop, cost_of(row, cost)) for row in shown}
    plain = {
        key: standing(pair, [rival for name, rival in pairs.items() if name != key])
        for key, pair in pairs.items()
    }
    record = wb.tradeoff(rows, cost)
    assert {point.key: point.standing for point in record.points} == plain
    front = wb.pareto(rows, cost)
    assert front == tuple(point for point in record.points if point.standing == "front")
    assert [point.cost.value for point in front] == sorted(point.cost.value for point in front)
    by_key = {row.key: row for row in rows}
    for point in record.points:
        row = by_key[point.key]
        assert (point.label, point.recipe, point.verdict) == (
            row.recipe.label(),
            repr(row.recipe),
            verdict(row),
        )
        assert (point.quality, point.cost) == (row.primary.compressed, cost_of(row, cost))


@given(data=st.data(), cost=st.sampled_from(["file_bytes", "latency"]), most=st.integers(1, 16))
def test_thinning_keeps_the_front_and_the_newest(bench: wb.Bench, data, cost, most) -> None:
    rows = data.draw(ledgers(bench.measure(wb.Recipe(wb.Quantize(weight_bits=3)))))
    keep = data.draw(st.sets(st.sampled_from([row.key for row in rows])))
    priced = [row for row in rows if cost_of(row, cost) is not None]
    best, front = math.inf, set(keep)
    for row in sorted(priced, key=lambda row: (cost_of(row, cost).value, row.primary.drop.value)):
        if row.primary.drop.value < best:
            best = row.primary.drop.value
            front.add(row.key)
    newest = priced[-max(1, most - len(front)) :]
    assert thin(rows, cost, most, keep=keep) == (
        priced if len(priced) <= most else [row for row in priced if row.key in front or row in newest]
    )


def test_around_moves_one_slider_and_nothing_else() -> None:
    recipe = wb.Recipe(wb.Prune(sparsity=0.3, criterion="wanda"), wb.Quantize(weight_bits=4, group_size=8))
    bits = around(recipe, "weight_bits")
    assert [tried.get("quantize").weight_bits for tried in bits] == [2, 3, 4, 6, 8]
    assert all(
        tried.get("prune") == recipe.get("prune") and tried.get("quantize").group_size == 8 for tried in bits
    )
    added = around(recipe, "rank_ratio")
    assert [[step.kind() for step in tried] for tried in added] == [["lowrank", "prune", "quantize"]] * 3


def test_around_a_fixed_pattern_leaves_the_pattern_where_it_cannot_be() -> None:
    proposals = around(wb.Recipe(wb.Prune(sparsity=0.5, pattern="2:4", criterion="wanda")), "sparsity")
    assert {(proposal.get("prune").sparsity, proposal.get("prune").pattern) for proposal in proposals} == {
        (0.25, "unstructured"),
        (0.5, "2:4"),
        (0.7, "unstructured"),
        (0.85, "unstructured"),
    }


def test_around_nothing_has_no_distillation_and_unknown_sliders_are_refused() -> None:
    assert around(wb.Recipe(), "temperature") == ()
    with pytest.raises(
        RecipeError,
        match=(
            "no slider 'bits'; known: rank_ratio, sparsity, transfer_steps, activation_bits, weight_bits,"
            " kv_bits, repair_ratio, qat_steps, temperature"
        ),
    ):
        around(wb.Recipe(), "bits")


def test_sweep_measures_into_the_ledger_and_can_be_continued(bench: wb.Bench) -> None:
    first = wb.sweep(bench, trials=4, seed=1)
    before = len(bench.ledger)
    assert first
    assert {point.key for point in first} <= set(bench.ledger.points)
    assert [point.key for point in wb.sweep(bench, trials=4, seed=1)] == [point.key for point in first]
    assert len(bench.ledger) == before  # the same proposals were found, not measured again
    assert Path(bench.ledger.where).is_file()


@pytest.mark.parametrize("given", [{"trials": 0}, {"trials": 3, "sliders": ("bits",)}])
def test_sweep_refuses_what_it_cannot_do(bench: wb.Bench, given) -> None:
    with pytest.raises(RecipeError, match="is refused: sliders are"):
        wb.sweep(bench, **given)
