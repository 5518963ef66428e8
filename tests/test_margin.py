"""Measurements that stop when enough is known, and the neighbours whose scores help the next one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_tasks import tiny_task

import workbench as wb
from workbench.bench import Bench
from workbench.errors import DataError, RecipeError
from workbench.ledger.ledger import Ledger
from workbench.measure.recent_scores import MOST, Neighbours
from workbench.measure.summary import summary
from workbench.metrics.control_variates import ControlVariates
from workbench.metrics.quality import quality
from workbench.metrics.scores import Scores
from workbench.metrics.sequential_looks import joint_level
from workbench.recipe import Recipe
from workbench.report.report import job_from

RECIPE = Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=3))


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(
        tiny_task("vit", evaluation=300), device="cpu", ledger=tmp_path / "points.journal", progress=False
    )


def counted(bench: Bench, monkeypatch) -> list[int]:
    """Note how many items each call of the evaluator adds to the compressed model's scores."""
    added: list[int] = []
    plain = bench.setting.evaluator.scores

    def watched(model, batches, count, *rest, **named):
        before = sum(map(len, batches))
        scores = plain(model, batches, count, *rest, **named)
        if model is not bench.task.model:
            added.append(sum(map(len, batches)) - before)
        return scores

    monkeypatch.setattr(bench.setting.evaluator, "scores", watched)
    return added


def test_reading_stops_at_the_first_look_that_knows_enough_and_goes_on_when_asked(bench, monkeypatch):
    wide = [
        point.primary.change.half_width
        for point in Bench(
            bench.task, device="cpu", ledger=bench.ledger.where + ".other", progress=False
        ).stream(RECIPE)
    ]
    margin = (wide[0] + wide[1]) / 2  # more than 64 items leave, less than 16 do
    added = counted(bench, monkeypatch)
    *looks, last = bench.stream(RECIPE, margin=margin)
    assert [point.items for point in looks] == [16, 64]
    assert [point.complete for point in looks] == [False, False]
    assert (last.items, last.items_total, last.complete, last.margin) == (64, 300, True, margin)
    assert last.latency is not None
    assert last.primary.change == looks[-1].primary.change
    assert last.primary.change.half_width <= margin < looks[0].primary.change.half_width
    assert any("64 of 300: stopped on purpose" in text for _, _, text in summary(last))
    assert sum(added) == 64
    assert Ledger(bench.ledger.where).rows() == [last]  # kept, and read back
    assert last in [shown for shown in bench.ledger.rows() if shown.complete]
    assert wb.tradeoff([last]).points[0].key == last.key

    assert bench.measure(RECIPE, margin=margin) is last
    assert bench.measure(RECIPE, margin=2 * margin) is last
    whole = bench.measure(RECIPE)  # all items: begins where it stopped
    assert (whole.items, whole.margin, whole.key) == (300, None, last.key)
    assert sum(added) == 300
    assert bench.measure(RECIPE, margin=margin) is whole
    assert Ledger(bench.ledger.where).rows() == [whole]
    fresh = Bench(bench.task, device="cpu", ledger=bench.ledger.where + ".third", progress=False).measure(
        RECIPE
    )
    assert whole.quality == fresh.quality


def test_a_margin_that_is_not_reached_reads_everything(bench):
    *_, last = bench.stream(RECIPE, margin=1e-6)
    assert (last.items, last.margin, last.complete) == (300, None, True)


def test_the_benchs_own_margin_holds_unless_a_call_says_otherwise(tmp_path):
    bench = Bench(
        tiny_task("vit", evaluation=300),
        device="cpu",
        ledger=tmp_path / "points.journal",
        progress=False,
        margin=0.9,
    )
    assert bench.measure(RECIPE).items == 16
    assert bench.measure(RECIPE, margin=0).items == 300
    assert bench.measure(RECIPE).items == 300  # knows more than was asked


@pytest.mark.parametrize("margin", [-0.1, float("nan"), float("inf")])
def test_a_margin_that_means_nothing_is_refused(bench, margin):
    with pytest.raises(DataError, match="margin=.* is refused: give half the width"):
        bench.measure(RECIPE, margin=margin)
    with pytest.raises(RecipeError, match="margin=.* is refused: give a number of at least 0"):
        job_from({"model": "fashion-cnn", "sparsity": 0.5, "margin": margin})


def test_a_margin_is_a_parameter_of_jobs():
    assert job_from({"model": "fashion-cnn", "sparsity": 0.5, "margin": "0.02"}).settings["margin"] == 0.02
    assert "margin" not in job_from({"model": "fashion-cnn", "sparsity": 0.5, "margin": "None"}).settings


def test_early_looks_use_the_dense_model_and_the_nearest_complete_point(bench):
    bench.measure(Recipe(wb.Prune(sparsity=0.2), wb.Quantize(weight_bits=3)))
    near = Recipe(wb.Prune(sparsity=0.49), wb.Quantize(weight_bits=3))
    bench.measure(near)
    for point in bench.stream(RECIPE):
        dense, close = bench.reference.all_scores(), bench.neighbours.complete[near]
        assert dense is not None
        mine = bench.setting.evaluator.scores(bench.compress(RECIPE).model, [], point.items)
        level = joint_level((16, 64, 256, 300), 0.95)
        expected = quality(
            "accuracy",
            dense.first(point.items),
            mine,
            looks=4,
            level=level,
            known=ControlVariates(dense, close),
        )
        plain = quality("accuracy", dense.first(point.items), mine, looks=4, level=level)
        for measured, wanted, before in zip(point.quality, expected, plain, strict=True):
            assert (measured.change.value, measured.change.low, measured.change.high) == pytest.approx(
                (wanted.change.value, wanted.change.low, wanted.change.high), rel=1e-4, abs=1e-6
            )
            assert measured.change.half_width <= before.change.half_width + 1e-9
            assert (
                measured.dense
                == quality("accuracy", dense, dense, level=level)[point.quality.index(measured)].dense
            )  # of all items


def some(count: int) -> Scores:
    return Scores(
        *(torch.rand(count, dtype=torch.float64) for _ in range(3)), torch.zeros(count, 7, dtype=torch.int64)
    )


def test_the_nearest_has_the_same_steps_and_the_nearest_sliders():
    kept, by_name = Neighbours(), {}
    recipes = {
        name: Recipe(*steps)
        for name, steps in {
            "near": (wb.Prune(sparsity=0.48),),
            "far": (wb.Prune(sparsity=0.1),),
            "other option": (wb.Prune(sparsity=0.5, criterion="wanda"),),
            "other steps": (wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=8)),
            "itself": (wb.Prune(sparsity=0.5),),
            "dense": (),
        }.items()
    }
    for name, recipe in recipes.items():
        kept.keep(recipe, some(5))
        by_name[name] = kept.complete[recipe]
    assert kept.nearest(Recipe(wb.Prune(sparsity=0.5))) is by_name["near"]
    assert kept.nearest(Recipe(wb.Prune(sparsity=0.2))) is by_name["far"]
    assert kept.nearest(Recipe(wb.Prune(sparsity=0.2, criterion="wanda"))) is by_name["other option"]
    assert kept.nearest(Recipe(wb.LowRank(rank_ratio=0.5))) is None
    assert kept.nearest(Recipe()) is None


def test_few_recipes_are_kept_and_no_answers_of_complete_ones():
    kept = Neighbours()
    for index in range(MOST + 3):
        kept.keep(Recipe(wb.Prune(sparsity=index / 20)), some(5))
        kept.begin(str(index), some(5))
    assert len(kept.complete) == len(kept.begun) == MOST
    assert list(kept.begun) == [str(index) for index in range(3, MOST + 3)]
    assert all(
        scores.answers.numel() == 0 and scores.answers.untyped_storage().nbytes() == 0
        for scores in kept.complete.values()
    )


def test_a_point_of_before_reads_back_without_a_margin(bench):
    point = bench.measure(RECIPE)
    text = point.to_json()
    older = text.replace(',"margin":null', "")
    assert older != text
    assert type(point).from_json(older) == point
    stopped = dataclasses.replace(point, margin=0.05, items=64)
    assert type(point).from_json(stopped.to_json()) == stopped
