"""Predictions: file bytes against real measured files, intervals that cover, and words that say what is only
a guess."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Annotated, ClassVar

import numpy as np
import pytest
import statistical
import tiny_tasks
from pydantic import Field

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress.outlines import after
from workbench.compress.registry import METHODS
from workbench.measure.evaluation.evaluator import Evaluator
from workbench.measure.size import sizes
from workbench.predict.history import Spot, history
from workbench.predict.local_fit import (
    KERNELS,
    LEVEL,
    UNKNOWN,
    Kernel,
    MeasuredValues,
    conformal,
    kernel_for,
    local_fit,
    residual_fit,
    squared_distances,
)
from workbench.predict.prior import Costs, Link, prior_of
from workbench.predict.spots import coordinates, spot_of
from workbench.recipe import Step
from workbench.shapes.outline import Outline
from workbench.util.configuration import configuration

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
    outline = after(Outline.of(task.model), recipe)
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
    for recipe in (
        wb.Recipe(wb.Prune(sparsity=0.5, targets=("*fc1",))),
        wb.Recipe(wb.LowRank(rank_ratio=0.3, targets=("*",)), wb.Prune(sparsity=0.5, targets=("*fc1.0",))),
    ):
        compressed = wb.compress(task, recipe, statistics["vit"])
        assert (
            after(Outline.of(task.model), recipe).file_bytes()
            == sizes(compressed.model, compressed.layers).file_bytes
        )


@pytest.fixture
def bench(ledger):
    return wb.Bench(tiny_tasks.tiny_task("vit"), ledger=ledger, progress=False, device="cpu")


def test_nothing_is_known_at_first_and_the_prediction_says_so(bench):
    guess = bench.predictor().predict(wb.Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4)))
    assert guess.quality is None
    assert guess.wide
    assert any(note.startswith("quality is a guess: only ") for note in guess.notes)
    assert (guess.speedup.value, guess.speedup.low) == (1.0, 1.0)
    assert len(guess.no_kernel) == 2
    assert "unstructured zeros on this CPU" in guess.no_kernel[0]
    assert guess.file_bytes is not None


def test_points_make_the_interval_narrow(bench):
    predictor = bench.predictor()
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
    foreign = dataclasses.replace(
        point, key="other", context=dataclasses.replace(point.context, model_fingerprint="other")
    )
    bench.ledger.points["other"] = foreign
    predictor = bench.predictor()
    predictor.refresh()
    assert predictor.rows == [point]


def test_low_rank_speed_is_predicted_from_multiply_adds_until_it_is_measured(bench):
    predictor = bench.predictor()
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


def shaken(step, work):
    for layer in work.select(step):
        layer.write(layer.matrix() * (1 - step.shake))
        work.took(step, layer, "shaken")


def test_a_method_without_rules_is_unknown_not_guessed(bench):
    METHODS.register(Shake)(lambda step, work: None)
    try:
        guess = bench.predictor().predict(wb.Recipe(Shake(shake=0.5)))
        assert guess.file_bytes is None
        assert guess.speedup is None
        assert any("file size unknown" in note for note in guess.notes)
        assert any("speed unknown" in note for note in guess.notes)
    finally:
        METHODS.unregister(Shake)


UNRULED = {
    "heads": wb.Prune(sparsity=0.5, pattern="heads"),
    "layers": wb.Prune(sparsity=0.5, pattern="layers"),
    "own method": Shake(shake=0.5),
}


@pytest.mark.parametrize("name", UNRULED)
def test_without_a_rule_the_interval_is_the_whole_range_and_the_words_say_so(name, ledger):
    METHODS.register(Shake)(shaken)
    try:
        bench = wb.Bench(tiny_tasks.tiny_task("vit"), ledger=ledger, progress=False, device="cpu")
        predictor, recipe = bench.predictor(), wb.Recipe(UNRULED[name])
        for sparsity in (0.0, 0.3, 0.4, 0.5, 0.6):  # what is known of others says nothing about this
            bench.measure(wb.Recipe(wb.Prune(sparsity=sparsity)))
        method = type(recipe.steps[0]).__name__
        for prepared in (False, True) if name == "own method" else (False,):
            if prepared:
                assert predictor.prepare(recipe)
            guess = predictor.predict(recipe)
            assert (guess.quality.low, guess.quality.high, guess.wide) == (0.0, 1.0, True)
            assert any(f"how {method} changes quality" in n for n in guess.notes)
            assert guess.unknown == (method,)
            assert f"accuracy unknown (nothing is known of how {method} changes it)" in repr(guess)
            both = predictor.predict(wb.Recipe(UNRULED[name], wb.Quantize(weight_bits=8)))
            assert (both.quality.low, both.quality.high) == (0.0, 1.0)
        point = bench.measure(recipe)
        again = predictor.predict(recipe)
        assert again.unknown == ()
        assert again.quality.low <= point.primary.compressed.value <= again.quality.high
        assert "accuracy ~" in repr(again)
        assert any("1 measured points have the same settings" in note for note in again.notes)
    finally:
        METHODS.unregister(Shake)


@pytest.mark.parametrize("sort", ["vit", "llama"])
def test_structure_has_a_rule_for_an_accuracy_once_prepared(sort, ledger):
    """Of a perplexity nothing is known all the same: the rule was never tried there."""
    bench = wb.Bench(tiny_tasks.tiny_task(sort), ledger=ledger, progress=False, device="cpu")
    predictor, heads = bench.predictor(), wb.Prune(sparsity=0.5, pattern="heads")
    bench.measure(wb.Recipe())
    assert predictor.prepare(wb.Recipe(heads))
    guess = predictor.predict(wb.Recipe(heads))
    assert guess.unknown == (() if sort == "vit" else ("Prune",))
    assert guess.wide
    if sort == "vit":
        assert guess.quality.low <= guess.quality.value <= guess.quality.high
        assert any(note.startswith("quality follows from the layers' sens") for note in guess.notes)
        other = predictor.predict(wb.Recipe(dataclasses.replace(heads, criterion="wanda")))
        assert other.unknown == ("Prune",)  # another table, which is not there yet


def test_how_much_training_wins_back_is_left_open(ledger):
    bench = wb.Bench(tiny_tasks.tiny_task("vit"), ledger=ledger, progress=False, device="cpu")
    predictor = bench.predictor()
    plain = wb.Recipe(wb.Prune(sparsity=0.8))
    taught = wb.Recipe(*plain, wb.Distill(temperature=2))
    bench.measure(wb.Recipe())
    assert predictor.prepare(taught)
    before, after = predictor.predict(plain), predictor.predict(taught)
    assert after.quality.low <= before.quality.low
    assert after.quality.high >= before.quality.high
    assert any("how much training wins back is not known" in note for note in after.notes)


def made_up(count, seed):
    """Return recipes at random places and a smooth drop with noise at each."""
    random = np.random.default_rng(seed)
    places = np.zeros((count, 4))
    places[:, :2] = random.uniform(0, 1, (count, 2))
    values = 0.4 * places[:, 0] ** 3 + 0.2 * places[:, 0] * places[:, 1] + random.normal(0, 0.01, count)
    return MeasuredValues(places, np.where(places > 0, 1, 0), values)


@pytest.mark.parametrize(("count", "near", "wide"), [(40, 0.3, 0.08), (300, 0.95, 0.04)])
def test_the_interval_covers_what_is_then_measured(count, near, wide):
    """At 400 places, each among points of its own: of 40 points a place often has too few close by.

    Intervals of four tenths of the width would be found out.
    """
    reaches, halves = [], []
    for seed in range(400):
        measured, fresh = made_up(count, 10_000 + seed), made_up(1, 20_000 + seed)
        guess = local_fit(measured, fresh.places[0], fresh.marks[0])
        if math.isfinite(guess.half):
            reaches.append(abs(guess.value - float(fresh.values[0])) / guess.half)
            halves.append(guess.half)
    statistical.assert_at_least(len(reaches), 400, near, fault=near / 2)
    statistical.assert_covers(reaches, LEVEL, narrow=0.4)
    assert np.median(halves) < wide


def test_too_few_neighbours_give_an_infinite_interval():
    assert conformal(np.array([0.1, 0.2]), np.array([1.0, 1.0])) == math.inf
    assert conformal(np.full(9, 0.1), np.ones(9)) == 0.1
    far = MeasuredValues(np.zeros((30, 4)), np.zeros((30, 4), int), np.zeros(30))
    assert local_fit(far, np.array([0.9, 0.9, 0.9, 0]), np.ones(4, int)).half == math.inf


def test_coordinates_are_zero_when_off_and_grow_with_strength():
    assert coordinates(wb.Recipe()) == [0.0] * len(METHODS.steps())
    for kind in METHODS.steps():
        places = [sum(coordinates_of(kind, stop)) for stop in kind.stops]
        assert all(place > 0 for place in places)
        assert places == sorted(places) or places == sorted(places, reverse=True)
    assert sum(coordinates(wb.Recipe(wb.Quantize(weight_bits=2)))) > sum(
        coordinates(wb.Recipe(wb.Quantize(weight_bits=8)))
    )


def coordinates_of(kind, stop):
    before = (
        [wb.Prune(sparsity=0.0)]
        if kind.kind() in {"repair", "distill", "transfer"}
        else [wb.Quantize(weight_bits=8)]
        if kind.kind() == "qat"
        else []
    )
    return coordinates(wb.Recipe(*before, kind(**{kind.slider: stop})))


def costs(nats):
    """Return costs of which training wins nothing back."""
    return Costs(nats, nats)


def ledgers(count, seed, *, wrong=1.0, noise=0.15):
    """Return spots and values as a link makes them, with noise in proportion to its doubt.

    Contributions are off by a factor.
    """
    random = np.random.default_rng(seed)
    link = Link.usual(0.8, 4, ratio=False)
    strengths = random.uniform(0, 1, (count, 2))
    contributions = np.zeros((count, 4))
    contributions[:, 0], contributions[:, 2] = 0.6 * strengths[:, 0] ** 4, 0.3 * strengths[:, 1] ** 4
    true = link.at(contributions)
    values = np.clip(true + noise * link.doubt(true) * random.standard_normal(count), 0, 0.8)
    spots = [
        Spot((*place, 0.0), (int(place[0] > 0), int(place[1] > 0), 0), costs(wrong * row))
        for place, row in zip(strengths, contributions, strict=True)
    ]
    return [Spot((0.0, 0.0, 0.0), (0, 0, 0), costs(np.zeros(4))), *spots], [0.0, *values], link


def foreseen(spots, values, link):
    """Return the error of the last point, predicted from those before it, and how far into the interval it
    reaches."""
    guess = history(spots[:-1], values[:-1], link).guess(spots[-1])
    error = abs(guess.value - values[-1])
    return error, error / guess.half


# Where noise is small, intervals are wide: they count usual residuals until there are more measured ones.
@pytest.mark.parametrize(("noise", "narrow"), [(0.05, 0.05), (0.3, 0.25), (1.0, 0.4)])
def test_intervals_of_residuals_cover_on_simulated_ledgers(noise, narrow):
    """The last point of 160 ledgers of 12 to 90 points."""
    reaches = [foreseen(*ledgers(12 + seed % 79, seed, noise=noise))[1] for seed in range(160)]
    statistical.assert_covers(reaches, LEVEL, narrow=narrow)


def test_a_wrong_prior_is_corrected_by_the_ledger():
    """The last point of 120 ledgers of 41 to 90 points, from contributions that are eight times too large."""
    before, after = [], []
    for seed in range(120):
        spots, values, link = ledgers(41 + seed % 50, seed, wrong=8.0)
        before.append(abs(float(link.at(spots[-1].costs.most[None])[0]) - values[-1]))
        after.append(foreseen(spots, values, link))
    errors, reaches = np.array(after).T
    statistical.assert_mean_below(0.2 - np.array(before))
    statistical.assert_mean_below(errors, 0.05)
    statistical.assert_covers(reaches, LEVEL, narrow=0.25)


def test_a_prior_that_knows_nothing_does_not_spoil_what_neighbours_say():
    """The last point of 160 ledgers of 61 to 120 points, whose contributions are those of other points."""
    worse, reaches = [], []
    for seed in range(160):
        spots, values, link = ledgers(61 + seed % 60, seed)
        order = np.random.default_rng(seed).permutation(len(spots))
        shuffled = [
            Spot(spot.place, spot.mark, spots[order[index]].costs) for index, spot in enumerate(spots)
        ]
        error, reach = foreseen([spots[0], *shuffled[1:]], values, link)
        worse.append(error - 0.7 * abs(values[-1] - float(np.median(values[:-1]))))
        reaches.append(reach)
    statistical.assert_mean_below(worse)
    statistical.assert_covers(reaches, LEVEL, narrow=0.25)


def test_a_good_prior_needs_fewer_points_than_the_sliders_alone():
    """The last point of 200 ledgers of 12 to 40 points: six tenths of the error that sliders alone leave."""
    worse = []
    for seed in range(200):
        spots, values, link = ledgers(12 + seed % 29, seed, noise=0.1)
        worse.append(foreseen(spots, values, link)[0] - 0.6 * foreseen(spots, values, None)[0])
    statistical.assert_mean_below(worse)


def test_few_points_are_said_to_be_few_and_have_an_interval_all_the_same():
    spots, values, link = ledgers(60, 3)
    first, late = (history(spots[:count], values[:count], link).guess(spots[-1]) for count in (2, 60))
    assert first.wide
    assert math.isfinite(first.half)
    assert not late.wide
    assert late.half < first.half
    nothing = MeasuredValues(np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros(0))
    assert residual_fit(nothing, kernel_for(nothing), np.zeros(3), np.zeros(3, int)).half == UNKNOWN


def test_residuals_are_fitted_as_a_gaussian_process():
    measured = MeasuredValues(
        np.array([[0.0], [0.3], [0.5], [0.9]]), np.zeros((4, 1), int), np.array([0.5, -0.2, 0.4, 1.0])
    )
    kernel = kernel_for(measured)
    at = np.array([0.4])
    gram = [
        [
            math.exp(-((a - b) ** 2) / (2 * kernel.width**2)) + (a == b) * kernel.noise
            for b in measured.places[:, 0]
        ]
        for a in measured.places[:, 0]
    ]
    shared = [math.exp(-((a - 0.4) ** 2) / (2 * kernel.width**2)) for a in measured.places[:, 0]]
    assert residual_fit(measured, kernel, at, np.zeros(1, int)).value == pytest.approx(
        float(np.dot(shared, np.linalg.solve(gram, measured.values)))
    )


def test_settings_unlike_one_another_and_near_to_none_leave_finite_fits():
    """A step that is off is near by all of its settings: such distances are those of no covariance."""
    count = 40
    points = MeasuredValues(
        np.zeros((count, 1)), np.arange(count)[:, None], np.random.default_rng(0).normal(size=count)
    )
    between = squared_distances(points.places, points.marks, points.places, points.marks)
    covariance = np.exp(-between / (2 * 0.1**2)) + np.eye(count)
    assert np.linalg.eigvalsh(covariance).min() < 0
    for width, noise in KERNELS:
        inverse = Kernel(width, noise).inverse(between)
        assert (np.linalg.eigvalsh(inverse) > 0).all()
        guess = residual_fit(points, Kernel(width, noise), np.zeros(1), np.array([3]))
        assert math.isfinite(guess.value)
        assert 0 < guess.half < math.inf


def test_points_without_a_table_leave_the_prediction_to_the_sliders():
    spots, values, link = ledgers(40, 4)
    blind = dataclasses.replace(spots[-1], costs=None)
    past = history(spots[:-1], values[:-1], link)
    assert past.guess(blind) == local_fit(past.measured, np.array(blind.place), np.array(blind.mark))


@pytest.mark.parametrize("sort", tiny_tasks.SORTS)
def test_preparing_gives_a_prior_and_changes_nothing_before(sort, ledger):
    opened = wb.Bench(tiny_tasks.tiny_task(sort), ledger=ledger, progress=False, device="cpu")
    predictor, recipe = opened.predictor(), wb.Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=3))
    opened.measure(wb.Recipe())
    before = predictor.predict(recipe)
    assert any(note.startswith("quality is a guess") for note in before.notes)
    assert predictor.prepare(recipe)
    after = predictor.predict(recipe)
    assert any(
        note.startswith("quality follows from the layers' sensitivities alone") for note in after.notes
    )
    assert after.quality.low <= after.quality.value <= after.quality.high
    assert after.wide
    worse = predictor.predict(wb.Recipe(wb.Prune(sparsity=0.9), wb.Quantize(weight_bits=3)))
    assert (worse.quality.value < after.quality.value) is (after.metric == "accuracy")
    assert after.file_bytes == before.file_bytes


def test_a_model_that_is_too_large_is_predicted_as_before(bench, monkeypatch):
    monkeypatch.setattr("workbench.predict.prior.MOST_WEIGHTS", {"cpu": 100})
    predictor = bench.predictor()
    assert not predictor.prepare(wb.Recipe(wb.Prune()))
    assert "too large" in predictor.no_prior
    assert predictor.prior is None


@pytest.mark.slow
def test_a_prediction_takes_less_than_50_ms_of_a_processor_with_5000_points(ledger):
    bench = wb.Bench(
        "fashion-vit", ledger=ledger, progress=False, device="cpu", evaluation_items=64, offline=True
    )
    point = bench.measure(wb.Recipe(wb.Prune(sparsity=0.5)))
    for index in range(5000):
        recipe = wb.Recipe(
            wb.Prune(sparsity=round(0.0001 * index, 5)), wb.Quantize(weight_bits=2 + index % 7)
        )
        ledger.points[f"key {index}"] = dataclasses.replace(point, key=f"key {index}", recipe=recipe)
    predictor = bench.predictor()
    predictor.predict(wb.Recipe())
    times = []
    for index in range(30):
        start = time.process_time()
        predictor.predict(wb.Recipe(wb.Prune(sparsity=0.01 * index), wb.Quantize(weight_bits=4)))
        times.append(time.process_time() - start)
    assert np.median(times) < 0.05, times


@pytest.mark.slow
def test_predictions_hold_on_a_real_model(fashion_cnn):
    """A small version of `benchmarks/prediction.py`: recipes in random order, each predicted before it is
    added.

    50 predictions, from 10 points on; an eighth of the width would be found out.
    """
    random = np.random.default_rng(0)
    statistics = Statistics(fashion_cnn)
    evaluator = Evaluator(fashion_cnn, fashion_cnn.evaluation[:500])
    dense = float(evaluator.scores(fashion_cnn.model, [], 500).correct.mean())
    prior, spots, drops = prior_of(statistics), [], []
    for _ in range(60):
        steps = (
            wb.Prune(sparsity=round(random.uniform(0.2, 0.85), 2)),
            wb.Quantize(weight_bits=int(random.integers(3, 8))),
        )
        recipe = wb.Recipe(*(step for step in steps if random.random() < 0.75))
        prior.prepare(statistics, [recipe])
        compressed = wb.compress(fashion_cnn, recipe, statistics, shared=True)
        spots.append(spot_of(recipe, prior))
        drops.append(dense - float(evaluator.scores(compressed.model, [], 500).correct.mean()))
    spots, drops = [spot_of(wb.Recipe(), prior), *spots], [0.0, *drops]
    link, counts = Link.usual(dense - 0.1, len(prior.kinds), ratio=False), range(12, len(spots) + 1)
    new = np.array([foreseen(spots[:count], drops[:count], link) for count in counts])
    old = np.array([foreseen(spots[:count], drops[:count], None) for count in counts])
    statistical.assert_covers(new[:, 1], LEVEL, narrow=0.125)
    statistical.assert_more_often(new[:, 0] < old[:, 0], old[:, 0] < new[:, 0])
