"""Numbers of items are caps that hold, for every kind of task; and a class that is lost is named."""

from __future__ import annotations

import json

import pytest
import torch
from kind_examples import EXAMPLES
from test_tasks import BERT, load, texts
from tiny_tasks import tiny_task

import workbench as wb
from widgets.panes.verdict_strip import strip
from widgets.session.state import PanelState
from workbench.errors import DataError
from workbench.measure.card import card
from workbench.metrics.class_recall import LostClass, lost_classes, lost_words
from workbench.metrics.scores import Scores
from workbench.tasks.data import calibrating
from workbench.tasks.items import ItemCounts
from workbench.tasks.text_classification import TEXT_CLASSIFICATION
from workbench.zoo import load_task


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def counts(task) -> tuple[int, int, int]:
    return len(task.evaluation), len(task.calibration), len(task.training)


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("most", [(5, 3, 2), (5, 2, 3), (3, 1, 1), (4, 5, 1), (4, 1, 5)])
def test_counts_are_caps_for_every_kind(tmp_path, kind, most):
    model, data = EXAMPLES[kind](tmp_path)
    evaluation, calibration, training = most
    task = load_task(
        model,
        str(data),
        context=16 if kind == "language modelling" else None,
        evaluation_items=evaluation,
        calibration_items=calibration,
        training_items=training,
        progress=False,
    )
    assert counts(task) == most


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((100, None, 100), (100, 512, 100)),
        ((None, None, 100), (2000, 512, 100)),
        ((10, 700, 3), (10, 700, 3)),
        ((1, 1, 1), (1, 1, 1)),
        ((10, 4990, 20), (10, 4980, 20)),  # of 5,000, training gets what was asked for
        ((10, 4990, 4990), (10, 2500, 2500)),
    ],
)
def test_counts_of_the_embedded_pictures(given, wanted):
    evaluation, calibration, training = given
    task = load_task(
        "fashion-cnn",
        evaluation_items=evaluation,
        calibration_items=calibration,
        training_items=training,
        progress=False,
    )
    assert counts(task) == wanted


@pytest.mark.parametrize("count", [2, 3, 10, 99, 600, 6000])
@pytest.mark.parametrize(
    ("calibration", "training"), [(1, 1), (512, 100), (512, 5000), (4, 600), (7000, 7000)]
)
def test_few_items_are_shared_out(count, calibration, training):
    some = calibrating(count, ItemCounts(1, calibration, training))
    rest = min(training, count - some)
    assert 1 <= some <= calibration
    assert 1 <= rest <= training
    if count >= calibration + training:
        assert (some, rest) == (calibration, training)
    else:
        assert rest == count - some or some == calibration  # nothing that one of both lacks is left over


def test_copies_that_are_dropped_do_not_count(tmp_path):
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts(60) + texts(60))]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    loaded = load(TEXT_CLASSIFICATION, BERT, path, sizes=(10, 7, 9))
    assert counts(loaded) == (10, 7, 9)


def test_a_length_in_tokens_that_is_not_used_is_said():
    task = load_task("fashion-cnn", context=64, evaluation_items=20, progress=False)
    assert "context_length=64 is not used: image classification reads no texts" in task.notes


def test_counts_hold_for_a_task_that_is_ready():
    bench = wb.Bench(
        tiny_task("vit"),
        device="cpu",
        evaluation_items=20,
        training_items=7,
        calibration_items=99,
        progress=False,
    )
    assert counts(bench.task) == (20, 24, 7)
    assert len(bench.evaluation) == 20
    with pytest.raises(DataError, match="training_items=0: give at least 1"):
        wb.Bench(tiny_task("vit"), device="cpu", training_items=0, progress=False)


# --- classes that are lost


def scores(right) -> Scores:
    correct = torch.tensor(right, dtype=torch.float64)
    return Scores(correct, correct, torch.ones_like(correct), correct.long())


def test_classes_whose_recall_falls_to_zero():
    labels = torch.tensor([0] * 5 + [1] * 5 + [2] * 5 + [3] * 2 + [4] * 5)
    dense = scores([1, 1, 1, 0, 1] + [1] * 5 + [0] * 5 + [1, 1] + [1, 1, 0, 0, 0])
    mine = scores([0] * 5 + [0, 0, 1, 0, 0] + [0] * 5 + [0, 0] + [0] * 5)
    lost = lost_classes(("a", "b", "c", "d", "e"), labels, dense, mine)
    assert lost == (LostClass("a", 5, 4),)  # b keeps one, c had none, of d and e too few were right
    assert lost_words(lost) == "no longer recognised: a (0 of 5, dense 4)"
    assert lost_words(()) == ""
    assert lost_classes((), labels, dense, mine) == ()
    many = tuple(LostClass(str(i), 9, 8) for i in range(9))
    assert lost_words(many).endswith("4 (0 of 9, dense 8) and 4 more")


def test_a_lost_class_is_named_in_every_verdict(tmp_path):
    bench = wb.Bench(
        "fashion-cnn",
        device="cpu",
        evaluation_items=200,
        calibration_items=16,
        training_items=16,
        ledger=tmp_path / "l.journal",
        progress=False,
    )
    point = bench.measure(wb.Recipe(wb.Quantize(weight_bits=2, scale_search=False)))
    change = bench.behaviour(point.recipe)
    gone = {
        lost_class.name
        for number, lost_class in enumerate(change.classes)
        if not change.confusion[number][number] and change.dense_confusion[number][number] >= 3
    }
    assert gone
    assert {lost_class.name for lost_class in point.lost_classes} == gone
    text = lost_words(point.lost_classes)
    assert text in wb.verdict(point)
    assert text in card(point)
    assert text.split("(")[0] in strip(PanelState(recipe=point.recipe, point=point, phase="measured"))
    (kept,) = bench.ledger.rows()
    assert kept.lost_classes == point.lost_classes
    assert bench.measure(wb.Recipe()).lost_classes == ()
