"""Behaviour records against a plain recount, on a real model."""

from __future__ import annotations

import math

import pytest
import tiny_tasks
import torch

import workbench as wb
from workbench.compress import compress
from workbench.errors import DataError
from workbench.measure.behaviour import behaviour, continuations
from workbench.tasks.base import Task


@pytest.fixture(scope="module")
def pair(fashion_cnn: Task):
    compressed = compress(fashion_cnn, wb.Recipe(wb.Prune(sparsity=0.6)))
    return fashion_cnn, compressed.model, behaviour(fashion_cnn, compressed.model)


def test_flips_classes_and_confusion_recount(pair) -> None:
    task, model, changes = pair
    with torch.inference_mode():
        before = torch.cat(
            [task.model(pixel_values=x.inputs["pixel_values"]).logits for x in task.evaluation.batches(500)]
        )
        after = torch.cat(
            [model(pixel_values=x.inputs["pixel_values"]).logits for x in task.evaluation.batches(500)]
        )
    labels = task.evaluation.labels
    changed = {int(i) for i in torch.nonzero(before.argmax(1) != after.argmax(1)).flatten()}
    assert {flip.item for flip in changes.flips} == changed
    assert len(changed) > 20
    assert [flip.kl for flip in changes.flips] == sorted((flip.kl for flip in changes.flips), reverse=True)
    first = changes.flips[0]
    p, q = before[first.item].double().softmax(0), after[first.item].double().softmax(0)
    assert first.kl == pytest.approx(
        sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True)), rel=1e-4
    )
    assert first.label == task.labels[labels[first.item]]
    assert first.compressed == task.labels[after[first.item].argmax()]
    for number, row in enumerate(changes.confusion):
        assert sum(row) == int((labels == number).sum()) == changes.classes[number].items == 200
        assert changes.classes[number].compressed == pytest.approx(row[number] / 200)
        assert changes.classes[number].dense == pytest.approx(changes.dense_confusion[number][number] / 200)
        change = changes.classes[number].change
        assert change.low < change.value < change.high
        assert change.value == pytest.approx((row[number] - changes.dense_confusion[number][number]) / 200)
    assert changes.kl.low > 0


def test_the_dense_model_does_not_differ_from_itself(fashion_cnn: Task) -> None:
    changes = behaviour(fashion_cnn, fashion_cnn.model)
    assert changes.flips == ()
    assert changes.kl.value == 0
    assert changes.confusion == changes.dense_confusion


def test_a_language_model_has_no_classes_and_a_classifier_writes_nothing(fashion_cnn: Task) -> None:
    task = tiny_tasks.tiny_task("llama", "cpu")
    with pytest.raises(DataError, match="no classes to compare"):
        behaviour(task, task.model)
    with pytest.raises(DataError, match="continuations need a language model"):
        continuations(fashion_cnn, fashion_cnn.model)


def test_view_shows_pictures_classes_and_escapes(pair) -> None:
    from widgets.panes.behaviour_view import classes_html, texts_html
    from workbench.measure.behaviour import Continuation

    task, _, changes = pair
    html = classes_html("60% <sparse>", changes, task.evaluation)
    assert html.count("<img ") == 24
    assert "60% &lt;sparse&gt;" in html
    assert all(label in html for label in task.labels)
    assert "<b>bold</b>" not in texts_html("x", [Continuation("<b>bold</b>", "a", "b")])
