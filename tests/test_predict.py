"""Predictions: file bytes against real measured files, intervals that cover, and words that say what is only a guess."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Annotated, ClassVar

import numpy as np
import pytest
import tiny_tasks
from pydantic import Field

import workbench as wb
from workbench.measure.predicted_size import Outline
from workbench.measure.size import sizes
from workbench.predict import Known, Predictor, conformal, coordinates, local_fit
from workbench.recipe import METHODS, Step, configuration
from workbench.statistics import Statistics

EXACT = {
    "dense": wb.Recipe(),
    "magnitude": wb.Recipe(wb.Prune(sparsity=0.37)),
    "wanda": wb.Recipe(wb.Prune(sparsity=0.6, criterion="wanda")),
    "hardly": wb.Recipe(wb.Prune(sparsity=0.02)),
    "2:4": wb.Recipe(wb.Prune(sparsity=0.5, pattern="2:4")),
    "low rank": wb.Recipe(wb.LowRank(rank_ratio=0.3)),
    "low rank, half": wb.Recipe(wb.LowRank(rank_ratio=0.5, factorization="svd")),
    "low rank and zeros": wb.Recipe(wb.LowRank(rank_ratio=0.4), wb.Prune(sparsity=0.5)),
}
BOUNDED = {
    "W8": wb.Recipe(wb.Quantize(weight_bits=8)),
    "W4": wb.Recipe(wb.Quantize(weight_bits=4)),
    "W4 g4 symmetric": wb.Recipe(wb.Quantize(weight_bits=4, group_size=4, grid="symmetric")),
    "W2": wb.Recipe(wb.Quantize(weight_bits=2)),
    "zeros and W4": wb.Recipe(wb.Prune(sparsity=0.7), wb.Quantize(weight_bits=4)),
    "all": wb.Recipe(wb.LowRank(rank_ratio=0.4), wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=3)),
}
BIG = ("W8", "W4", "W4 g4 symmetric")


@pytest.fixture(scope="module")
def statistics():
    return {sort: Statistics(tiny_tasks.tiny_task(sort)) for sort in tiny_tasks.SORTS}


@pytest.mark.parametrize("sort", tiny_tasks.SORTS)
@pytest.mark.parametrize("name", [*EXACT, *BOUNDED])
def test_file_bytes_against_the_real_file(sort, name, statistics):
    recipe = {**EXACT, **BOUNDED}[name]
    task = statistics[sort].task
    compressed = wb.compress(task, recipe, statistics[sort])
    real = sizes(compressed.model, compressed.layers).file_bytes
    outline = Outline.of(task.model).after(recipe)
    assert outline is not None
    if name in EXACT:
        assert outline.exact()
        assert outline.file_bytes() == real
    else:
        assert not outline.exact()
        assert real <= outline.file_bytes() <= 1.35 * real
    if name in BIG:
        assert outline.file_bytes() == real


def test_targets_and_the_output_head_are_respected(statistics):
    task = statistics["vit"].task
    for recipe in (wb.Recipe(wb.Prune(sparsity=0.5, targets=("*fc1",))), wb.Recipe(wb.LowRank(rank_ratio=0.3, targets=("*",)), wb.Prune(sparsity=0.5, targets=("*fc1.0",)))):
        compressed = wb.compress(task, recipe, statistics["vit"])
        assert Outline.of(task.model).after(recipe).file_bytes() == sizes(compressed.model, compressed.layers).file_bytes


@pytest.fixture
def bench(ledger):
    return wb.Bench(tiny_tasks.tiny_task("vit"), ledger=ledger, progress=False, device="cpu")


def test_nothing_is_known_at_first_and_the_prediction_says_so(bench):
    guess = Predictor(bench).predict(wb.Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4)))
    assert guess.quality is None
    assert guess.wide
    assert any(note.startswith("quality is a guess: only ") for note in guess.notes)
    assert (guess.speedup.value, guess.speedup.low) == (1.0, 1.0)
    assert len(guess.no_kernel) == 2
    assert "unstructured zeros on this CPU" in guess.no_kernel[0]
    assert guess.file_bytes is not None


def test_points_make_the_interval_narrow(bench):
    predictor = Predictor(bench)
    bench.measure(wb.Recipe(wb.Prune(sparsity=0.5)))
    first = predictor.predict(wb.Recipe(wb.Prune(sparsity=0.52)))
    assert first.wide
    assert (first.quality.low, first.quality.high) == (0.0, 1.0)
    for index in range(12):
        bench.measure(wb.Recipe(wb.Prune(sparsity=round(0.3 + 0.04 * index, 2))))
    later = predictor.predict(wb.Recipe(wb.Prune(sparsity=0.52)))
    assert not later.wide
    assert later.points >= 10
    assert later.quality.high - later.quality.low < 1
    assert later.quality.low <= later.quality.value <= later.quality.high


def test_points_of_other_models_do_not_count(bench):
    point = bench.measure(wb.Recipe(wb.Prune(sparsity=0.5)))
    other = dataclasses.replace(point, key="other", context=dataclasses.replace(point.context, model_fingerprint="other"))
    bench.ledger.points["other"] = other
    predictor = Predictor(bench)
    predictor.refresh()
    assert predictor.rows == [point]


def test_low_rank_speed_is_predicted_from_multiply_adds_until_it_is_measured(bench):
    predictor = Predictor(bench)
    guess = predictor.predict(wb.Recipe(wb.LowRank(rank_ratio=0.2)))
    assert guess.speedup.value > 1.3
    assert guess.speedup.low == 1.0
    assert any("multiply-adds" in note for note in guess.notes)
    # per item: every Linear once per token; the classifier once
    task = bench.task
    config = task.model.config
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    h, f = config.hidden_size, config.intermediate_size
    patch = (tokens - 1) * h * config.patch_size**2
    expected = config.num_hidden_layers * tokens * (4 * h * h + 2 * h * f) + patch + h * tiny_tasks.CLASSES
    assert predictor.outline.multiply_adds() == expected


@configuration
class Shake(Step):
    """Nothing."""

    slider: ClassVar[str] = "shake"

    shake: Annotated[float, Field(ge=0, le=1, description="how much")] = 0.5


def test_a_method_without_rules_is_unknown_not_guessed(bench):
    METHODS.register(Shake)(lambda step, work: None)
    try:
        guess = Predictor(bench).predict(wb.Recipe(Shake(shake=0.5)))
        assert guess.file_bytes is None
        assert any("file size unknown" in note for note in guess.notes)
        assert any("speed unknown" in note for note in guess.notes)
    finally:
        METHODS.unregister(Shake)


def made_up(count, seed):
    """Return recipes at random places and a smooth drop with noise at each."""
    random = np.random.default_rng(seed)
    places = np.zeros((count, 4))
    places[:, :2] = random.uniform(0, 1, (count, 2))
    values = 0.4 * places[:, 0] ** 3 + 0.2 * places[:, 0] * places[:, 1] + random.normal(0, 0.01, count)
    return Known(places, np.where(places > 0, 1, 0), values)


@pytest.mark.parametrize("count", [40, 300])
def test_the_interval_covers_what_is_then_measured(count):
    known, fresh = made_up(count, 1), made_up(200, 2)
    hits = [abs(local_fit(known, x, m).value - y) <= local_fit(known, x, m).half for x, m, y in zip(fresh.places, fresh.marks, fresh.values, strict=True)]
    assert 0.72 <= np.mean(hits) <= 0.97
    widths = [local_fit(known, x, m).half for x, m in zip(fresh.places, fresh.marks, strict=True)]
    assert np.median(widths) < 0.06


def test_too_few_neighbours_give_an_infinite_interval():
    assert conformal(np.array([0.1, 0.2]), np.array([1.0, 1.0])) == math.inf
    assert conformal(np.full(9, 0.1), np.ones(9)) == 0.1
    far = Known(np.zeros((30, 4)), np.zeros((30, 4), int), np.zeros(30))
    assert local_fit(far, np.array([0.9, 0.9, 0.9, 0]), np.ones(4, int)).half == math.inf


def test_coordinates_are_zero_when_off_and_grow_with_strength():
    assert coordinates(wb.Recipe()) == [0.0] * len(METHODS.steps())
    for kind in METHODS.steps():
        places = [sum(coordinates_of(kind, stop)) for stop in kind.stops]
        assert all(place > 0 for place in places)
        assert places == sorted(places) or places == sorted(places, reverse=True)
    assert sum(coordinates(wb.Recipe(wb.Quantize(weight_bits=2)))) > sum(coordinates(wb.Recipe(wb.Quantize(weight_bits=8))))


def coordinates_of(kind, stop):
    before = [wb.Prune(sparsity=0.0)] if kind.kind() in {"repair", "distill", "transfer"} else [wb.Quantize(weight_bits=8)] if kind.kind() == "qat" else []
    return coordinates(wb.Recipe(*before, kind(**{kind.slider: stop})))


@pytest.mark.slow
def test_a_prediction_takes_less_than_50_ms_with_5000_points(ledger):
    bench = wb.Bench("fashion-vit", ledger=ledger, progress=False, device="cpu", evaluation_items=64, offline=True)
    point = bench.measure(wb.Recipe(wb.Prune(sparsity=0.5)))
    for index in range(5000):
        recipe = wb.Recipe(wb.Prune(sparsity=round(0.0001 * index, 5)), wb.Quantize(weight_bits=2 + index % 7))
        ledger.points[f"key {index}"] = dataclasses.replace(point, key=f"key {index}", recipe=recipe)
    predictor = Predictor(bench)
    predictor.predict(wb.Recipe())
    times = []
    for index in range(30):
        start = time.perf_counter()
        predictor.predict(wb.Recipe(wb.Prune(sparsity=0.01 * index), wb.Quantize(weight_bits=4)))
        times.append(time.perf_counter() - start)
    assert np.median(times) < 0.05, times
