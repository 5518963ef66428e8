"""Texts of like length are read together, with no padding but what the longest of a batch needs."""

from __future__ import annotations

import dataclasses

import torch
from test_evaluator import evaluator_of, plain, same
from tiny_tasks import CLASSES, VOCABULARY, tiny_task
from torch import nn

from workbench.measure.evaluation.length_sorting import ordered, text_spans, trimmed
from workbench.metrics.scores import Scores
from workbench.tasks import score
from workbench.tasks.base import Items, Task
from workbench.tasks.text_classification import TEXT_CLASSIFICATION


def padded_task(side: str = "right") -> Task:
    task = tiny_task("bert")
    generator = torch.Generator().manual_seed(3)
    ids, lengths = (
        torch.randint(VOCABULARY, (48, 16), generator=generator),
        torch.randint(1, 17, (48,), generator=generator),
    )
    places = torch.arange(16).expand(48, -1)
    mask = (places < lengths[:, None] if side == "right" else places >= 16 - lengths[:, None]).long()
    return dataclasses.replace(
        task,
        evaluation=Items(
            {"input_ids": ids, "attention_mask": mask}, torch.randint(CLASSES, (48,), generator=generator)
        ),
    )


def test_padded_texts_score_the_same_to_rounding_in_their_own_order(monkeypatch):
    task = padded_task()
    evaluator, shapes = evaluator_of(task), []
    evaluator.text_spans()
    monkeypatch.setattr(
        "workbench.measure.evaluation.evaluator.score",
        lambda kind, model, items: (
            shapes.append(tuple(items.inputs["input_ids"].shape)),
            score(kind, model, items),
        )[1],
    )
    batches: list[Scores] = []
    looks = [evaluator.scores(task.model, batches, count) for count in (16, 48)]
    whole = plain(task, task.model)
    for look in looks:
        assert torch.allclose(look.loss, whole.loss[: len(look)], rtol=1e-5)
        assert torch.equal(look.answers, whole.answers[: len(look)])
        assert torch.equal(look.correct, whole.correct[: len(look)])
    assert len(looks[-1]) == 48
    assert (16, 8) in shapes
    assert sum(rows for rows, _ in shapes) == 48


def test_a_batch_keeps_every_token_of_its_texts():
    for side in ("right", "left"):
        items = padded_task(side).evaluation
        spans = text_spans(items)
        order = ordered(spans, 8, 40)
        assert sorted(order.tolist()) == list(range(8, 40))
        lengths = items.inputs["attention_mask"].sum(1)[order]
        assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
        some = order[-4:]
        cut = trimmed(items[some], spans[some])
        assert cut.inputs["input_ids"].shape[1] == 8
        assert torch.equal(cut.inputs["attention_mask"].sum(1), items.inputs["attention_mask"][some].sum(1))


def test_a_model_that_reads_its_padding_is_read_padded():
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, CLASSES)

        def forward(self, input_ids, attention_mask):
            return type("Output", (), {"logits": self.table(input_ids).sum(1)})

    task = padded_task()
    task = dataclasses.replace(task, model=Careless().eval().requires_grad_(False))
    evaluator = evaluator_of(task)
    assert evaluator.text_spans() is None
    assert same(evaluator.scores(task.model, [], 48), plain(task, task.model))


def test_items_without_padding_or_mask_are_read_as_they_are():
    assert text_spans(tiny_task("bert").evaluation) is None
    assert text_spans(tiny_task("llama").evaluation) is None
    task = tiny_task("bert")
    assert same(evaluator_of(task).scores(task.model, [], 48), plain(task, task.model))
    assert TEXT_CLASSIFICATION.masked_texts


def test_pairs_of_texts_are_as_long_as_the_longer_one():
    mask = torch.tensor([[[1, 1, 0, 0], [1, 1, 1, 0]], [[1, 0, 0, 0], [1, 0, 0, 0]]])
    assert text_spans(Items({"attention_mask": mask}, torch.zeros(2))).tolist() == [[0, 3], [0, 1]]


def test_left_and_right_padding_are_told_apart():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    assert text_spans(Items({"attention_mask": mask}, torch.zeros(3))).tolist() == [[2, 4], [0, 2], [0, 4]]
