"""Predictions kept with the points that followed, and what they were worth."""

from __future__ import annotations

import dataclasses
import json
import math
import time

import pytest
import tiny_tasks
from click.testing import CliRunner

import workbench as wb
from widgets.session.session import Session
from workbench.cli.points import points
from workbench.measure.measurement import Measurement, Predicted
from workbench.measure.summary import summary, told
from workbench.metrics.estimate import Estimate
from workbench.predict.scoring import score, words_of


@pytest.fixture
def bench(ledger):
    return wb.Bench(tiny_tasks.tiny_task("vit"), ledger=ledger, progress=False, device="cpu")


@pytest.fixture
def point(bench):
    return bench.measure(wb.Recipe(wb.Prune(sparsity=0.5)))


def predicted(point, value, half, *, wide=False, speed=(1.0, 1.0, 1.0)):
    """Return the point as if this had been predicted of it."""
    return dataclasses.replace(
        point,
        predicted=Predicted(
            point.primary.metric, Estimate(value, value - half, value + half), Estimate(*speed), 0.9, 12, wide
        ),
    )


def test_a_point_keeps_what_was_predicted_before_it(bench):
    predictor = bench.predictor()
    bench.predicts = predictor.record
    assert bench.measure(wb.Recipe()).predicted is None  # the dense model is no prediction
    first = wb.Recipe(wb.Prune(sparsity=0.4))
    before = predictor.predict(first)
    measured = bench.measure(first)
    assert measured.predicted == Predicted(
        before.metric, before.quality, before.speedup, 0.9, before.points, before.wide
    )
    assert Measurement.from_json(measured.to_json()) == measured
    assert wb.Bench(bench.task, ledger=bench.ledger, progress=False, device="cpu").measure(first) == measured


def test_without_a_predictor_nothing_is_kept_and_old_ledgers_load(point):
    assert point.predicted is None
    old = json.loads(point.to_json())
    del old["predicted"]
    assert Measurement.from_json(json.dumps(old)) == point
    assert score([point]) is None
    assert words_of([point]) == ""
    assert told(point) == ""


def test_the_score_counts_what_held(point):
    value = point.primary.compressed.value
    rows = [predicted(point, value + off, 0.05, wide=off > 0.1) for off in (0.0, 0.01, 0.02, 0.04, 0.2)]
    scored = score(rows)
    assert (scored.quality.count, scored.quality.held, scored.wide) == (5, 4, 1)
    assert scored.quality.median_error == pytest.approx(0.02)
    assert (scored.quality.share.value, scored.quality.share.low, scored.quality.share.high) == pytest.approx(
        (0.8, 0.3755, 0.9638), abs=1e-4
    )  # R: binom::binom.wilson(4, 5)
    assert scored.words().startswith(
        "of the last 5 predictions 4 held (80%, meant: 90%), median error 2.0 points of accuracy; 1 were wide"
    )
    assert score(rows, last=1).quality.held == 0


def test_where_nothing_was_known_nothing_held(bench, point):
    """The whole range cannot fail: counted as a prediction it would be one that always holds."""
    value = point.primary.compressed.value
    blind = dataclasses.replace(
        predicted(point, 0.5, 0.5, wide=True).predicted, unknown=("Prune",), quality=Estimate(0.5, 0.0, 1.0)
    )
    rows = [dataclasses.replace(point, predicted=blind)] * 3
    assert score(rows).quality is None
    assert score(rows).unknown == 3
    assert words_of(rows) == ""
    assert told(rows[0]) == "unknown: nothing is known of how Prune changes it"
    assert Measurement.from_json(rows[0].to_json()) == rows[0]
    rows += [predicted(point, value + off, 0.05) for off in (0.0, 0.01, 0.2)]
    scored = score(rows)
    assert (scored.quality.count, scored.quality.held, scored.wide, scored.unknown) == (3, 2, 0, 3)
    assert "of the last 3 predictions 2 held" in scored.words()
    assert "of 3 more nothing was known" in scored.words()
    bench.predicts = bench.predictor().record
    measured = bench.measure(wb.Recipe(wb.Prune(sparsity=0.5, pattern="heads")))
    assert measured.predicted.unknown == ("Prune",)
    assert told(measured).startswith("unknown: ")


def test_speed_holds_where_both_intervals_meet(point):
    speed = point.latency.speedup
    rows = [predicted(point, 0.5, 1.0, speed=(speed.high * factor,) * 3) for factor in (1.0, 1.0, 1.5)]
    scored = score(rows)
    assert (scored.speed.count, scored.speed.held) == (3, 2)
    assert scored.speed.median_error == pytest.approx(math.log(speed.high / speed.value))


def test_perplexities_are_compared_by_their_logarithm(ledger):
    bench = wb.Bench(tiny_tasks.tiny_task("llama"), ledger=ledger, progress=False, device="cpu")
    point = bench.measure(wb.Recipe(wb.Prune(sparsity=0.5)))
    value = point.primary.compressed.value
    scored = score([predicted(point, value * 1.1, value)])
    assert scored.quality.median_error == pytest.approx(math.log(1.1))
    assert "median error 10.0% of perplexity" in scored.words()
    assert score([predicted(point, math.inf, 1.0)]).quality.held in {0, 1}


def test_the_score_is_said_with_predictions_points_and_reports(bench, point):
    for index in range(6):
        recipe = wb.Recipe(wb.Prune(sparsity=round(0.3 + 0.05 * index, 2)))
        foretold = predicted(
            dataclasses.replace(point, key=f"key {index}", recipe=recipe),
            point.primary.compressed.value,
            0.01,
        )
        bench.ledger.add(foretold)
    said = "of the last 6 predictions 6 held"
    assert any(
        note.startswith(said) for note in bench.predictor().predict(wb.Recipe(wb.Prune(sparsity=0.33))).notes
    )
    listed = CliRunner().invoke(points, [bench.task.model_name, "--ledger", bench.ledger.where])
    assert listed.exit_code == 0, listed.output
    assert said in listed.output
    assert any(
        name == "accuracy as predicted before" and text.endswith(": held")
        for name, _, text in summary(foretold)
    )


def test_the_panel_prepares_predictions_while_nothing_is_measured(bench):
    failures: list[BaseException] = []
    session = Session()
    session.on_error.subscribe(failures.append)
    try:
        session.bench, session.predictor = bench, bench.predictor()
        session.run(wb.Recipe(wb.Prune(sparsity=0.5)))
        limit = time.monotonic() + 60
        while session.predictor.prior is None and time.monotonic() < limit:
            time.sleep(0.05)
        assert session.predictor.prior is not None
        assert session.predictor.prior.missing([wb.Recipe(wb.Prune(sparsity=0.9))]) == {}
        point = session.run(wb.Recipe(wb.Prune(sparsity=0.8)))
        assert session.state.prediction.quality is not None
        assert point.complete
    finally:
        session.close()
    assert failures == []
