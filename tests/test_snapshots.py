"""A later slider begins where the steps before it ended, and gives what a fresh run gives."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from tiny_tasks import same, tiny_task, weights

import workbench as wb
from workbench.calibration.memory_cache import Budget, Cache
from workbench.calibration.statistics import Statistics
from workbench.compress import Compressed, compress
from workbench.compress.prefix_cache import MOST
from workbench.compress.registry import METHODS
from workbench.errors import Cancelled, CompressionError, RecipeError
from workbench.recipe import Recipe, Step

QUICK = {
    "distill": {"steps": 2, "distill_batch": 8},
    "qat": {"qat_steps": 2, "qat_batch": 8},
    "transfer": {"transfer_steps": 2, "transfer_batch": 8},
}
MORE = (
    wb.Prune(sparsity=0.5, pattern="heads"),
    wb.Prune(sparsity=0.5, pattern="neurons"),
    wb.Prune(sparsity=0.5, pattern="layers"),
    wb.Prune(sparsity=0.5, pattern="channels"),
    wb.Prune(sparsity=0.5, pattern="2:4", criterion="sparsegpt"),
    wb.Quantize(weight_bits=3, rounding="gptq"),
    wb.LowRank(rank_ratio=0.3, rank_allocation="energy"),
)


def steps_of(kind: type[Step]) -> list[Step]:
    """Return the step at a position of its slider, its training as short as it gets."""
    return [kind(**{kind.slider: value, **QUICK.get(kind.kind(), {})}) for value in kind.stops[:1]]


ALL = sorted(
    [
        *(
            step
            for kind in METHODS.records
            if kind.__module__.startswith("workbench.")
            for step in steps_of(kind)
        ),
        *MORE,
    ],
    key=lambda step: step.order,
)


def states(kept: Statistics) -> list[tuple[Step, ...]]:
    return [key[1] for key in kept.kept if isinstance(key, tuple) and key[0] == "state"]


def alike(mine: Compressed, fresh: Compressed) -> None:
    """Compare everything that a compression returns."""
    assert mine.recipe == fresh.recipe
    assert mine.report == fresh.report
    assert mine.warnings == fresh.warnings
    assert mine.curve == fresh.curve
    assert str(mine.model) == str(fresh.model)
    assert same(weights(mine.model), weights(fresh.model))
    assert len(mine.layers) == len(fresh.layers)
    for left, right in zip(mine.layers, fresh.layers, strict=True):
        told = [
            {
                field.name: getattr(layer, field.name)
                for field in dataclasses.fields(layer)
                if field.name not in {"module", "others"}
            }
            for layer in (left, right)
        ]
        assert str(told[0]) == str(told[1])  # masks and stored forms with their values
        assert left.module is mine.model.get_submodule(left.name)
        assert all(module is mine.model.get_submodule(name) for name, module in left.others.items())


def fits(recipe: Recipe, task: wb.Task) -> Compressed | None:
    try:
        return compress(task, recipe)
    except (RecipeError, CompressionError):
        return None


def chains() -> list[tuple[Step, ...]]:
    """Return every two steps of different kinds that go together, in that order."""
    pairs = []
    for first, second in itertools.combinations(ALL, 2):
        try:
            Recipe(first, second)
        except RecipeError:
            continue
        if first.claim != second.claim:
            pairs.append((first, second))
    return pairs


def test_every_pair_of_steps_is_what_a_fresh_run_gives(sort):
    task = tiny_task(sort)
    begun = set()
    for first, pairs in itertools.groupby(chains(), key=lambda pair: pair[0]):
        kept = Statistics(task)
        for pair in pairs:
            recipe = Recipe(*pair)
            fresh = fits(recipe, task)
            if fresh is None:
                continue
            begun |= {type(step[0]).__name__ for step in states(kept)}
            mine = compress(task, recipe, kept)
            alike(mine, fresh)
            for (
                parameter
            ) in mine.model.parameters():  # the result is the caller's: what is kept does not change with it
                parameter.data.fill_(7)
            for layer in mine.layers:
                layer.mask, layer.grid, layer.rank, layer.rows = None, None, 3, torch.zeros(1)
        assert all(step[0] is first for step in states(kept))
    assert {"Prune", "LowRank", "Quantize", "Activations"} <= begun
    assert not {"Distill", "QAT", "Transfer"} & begun


@pytest.mark.parametrize("shared", [False, True])
def test_three_steps_begin_after_the_second(sort, shared):
    task = tiny_task(sort)
    kept = Statistics(task)
    first, second = wb.LowRank(rank_ratio=0.3), wb.Prune(sparsity=0.5, criterion="wanda")
    asked: list[str] = []
    for bits in (5, 4, 3, 2):
        asked.clear()
        recipe = Recipe(first, second, wb.Quantize(weight_bits=bits))
        alike(
            compress(task, recipe, kept, lambda what, *_: asked.append(what), shared=shared),
            compress(task, recipe),
        )
    assert set(asked) == {"quantize"}
    assert states(kept) == [(first,), (first, second)]
    longer = Recipe(first, wb.Prune(sparsity=0.7), wb.Quantize(weight_bits=2))
    alike(compress(task, longer, kept, lambda what, *_: asked.append(what)), compress(task, longer))
    assert "lowrank" not in asked
    assert "prune" in asked


def test_dragging_the_first_slider_keeps_nothing():
    task = tiny_task("vit")
    kept = Statistics(task)
    for index in range(12):
        compress(task, Recipe(wb.Prune(sparsity=0.3 + 0.02 * index), wb.Quantize(weight_bits=4)), kept)
    assert not states(kept)


def test_only_the_last_states_are_kept():
    task = tiny_task("vit")
    kept = Statistics(task)
    firsts = [wb.Prune(sparsity=0.1 * index) for index in range(1, 8)]
    for first, bits in itertools.product(firsts, (4, 3)):
        compress(task, Recipe(first, wb.Quantize(weight_bits=bits)), kept)
    assert states(kept) == [(first,) for first in firsts[-MOST:]]


def test_a_state_goes_before_statistics_do():
    task = tiny_task("vit")
    for room in (0, 10**9):
        kept = Statistics(task, cache=Cache(torch.device("cpu"), Budget(room), held=lambda: task))
        for bits in (5, 4, 3):
            recipe = Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=bits))
            alike(compress(task, recipe, kept), compress(task, recipe))
        assert bool(states(kept)) == bool(room)


def test_a_cancelled_move_leaves_what_is_kept_whole():
    task = tiny_task("llama")
    kept = Statistics(task)
    for bits in (5, 4):
        compress(task, Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=bits)), kept)
    assert states(kept)
    for stop in range(3):
        count = itertools.count()

        def cancel(*_: object, stop: int = stop, count: itertools.count[int] = count) -> None:
            if next(count) == stop:
                raise Cancelled("stopped")

        recipe = Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=3))
        with pytest.raises(Cancelled):
            compress(task, recipe, kept, cancel)
        alike(compress(task, recipe, kept), compress(task, recipe))


def test_what_another_task_did_is_not_taken_over():
    task = tiny_task("vit")
    kept = Statistics(task)
    for bits in (5, 4, 3):
        compress(task, Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=bits)), kept)
    second = dataclasses.replace(task, model=tiny_task("vit").model)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.mul_(1.5)
    recipe = Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=3, rounding="hqq"))
    compressed = compress(second, recipe, kept)
    assert not same(weights(compressed.model), weights(compress(task, recipe).model))


def test_the_dense_model_is_left_alone():
    task = tiny_task("llama")
    before, kept = weights(task.model), Statistics(task)
    for bits in (5, 4, 3):
        compress(
            task,
            Recipe(
                wb.Prune(sparsity=0.5),
                wb.Quantize(weight_bits=bits),
                wb.Distill(temperature=2, **QUICK["distill"]),
            ),
            kept,
            shared=True,
        )
    assert same(weights(task.model), before)
