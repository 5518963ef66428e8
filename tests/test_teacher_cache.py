"""The teacher's answers, computed once: the same lessons, within the budget, and nothing kept that does not pay."""

from __future__ import annotations

import importlib

import pytest
import torch
from test_training import close, distilled
from tiny_tasks import TRAINING, same, tiny_task, weights

import workbench as wb
from workbench.compress.inner import Seen, see
from workbench.compress.teacher_cache import teacher_cache
from workbench.statistics import Statistics


@pytest.mark.parametrize("more", [{}, {"hidden_weight": 1.0}], ids=["answers", "hidden states"])
def test_kept_answers_teach_what_computed_ones_do(sort, device, more):
    task = tiny_task(sort, device)
    plain, kept = distilled(task, **more), distilled(task, teacher_cache_mb=16, **more)
    assert kept.warnings == ()
    assert [loss for _, loss in kept.curve] == pytest.approx([loss for _, loss in plain.curve], rel=1e-3)
    assert close(task, plain, kept, 1e-2)


def test_each_item_is_computed_once_for_all_recipes(monkeypatch):
    task = tiny_task("vit")
    statistics, read = Statistics(task), []
    plain = type(task.kind).logits

    def counted(kind, model, items):
        if model is task.model:
            read.append(len(items))
        return plain(kind, model, items)

    monkeypatch.setattr(type(task.kind), "logits", counted)
    first = distilled(task, steps=20, teacher_cache_mb=16, statistics=statistics)
    assert sum(read) == TRAINING + 1  # and one item to measure its size
    distilled(task, wb.Prune(sparsity=0.7), steps=20, teacher_cache_mb=16, statistics=statistics)
    assert sum(read) == TRAINING + 1
    assert same(weights(distilled(task, steps=20, teacher_cache_mb=16).model), weights(first.model))  # what was read before does not matter


def test_a_language_models_last_hidden_states_are_kept_instead_of_its_logits():
    task = tiny_task("llama")  # 16 numbers a token instead of 64

    def answers(items):
        return see(task.kind, task.model, items)

    cache, size = teacher_cache(answers, task.model, task.training, 16)
    assert size == TRAINING * 8 * 16 * 4
    index = torch.tensor([5, 39, 0, 5])
    assert torch.allclose(cache.look_up(index).logits, task.kind.logits(task.model, task.training[index]), atol=1e-5)
    assert cache.nbytes == size


def test_a_head_that_something_follows_is_not_replayed():
    """Scaled logits (as Cohere's and Granite's) are not what the head alone makes: they are kept as they are."""
    task = tiny_task("llama")

    def answers(items):
        return Seen(task.kind.logits(task.model, items) / 8)

    cache, size = teacher_cache(answers, task.model, task.training, 16)
    assert cache.head is None
    assert size == TRAINING * 7 * 64 * 4


def test_answers_beyond_the_budget_are_computed_anew_and_that_is_said(monkeypatch):
    task = tiny_task("vit")
    plain = distilled(task, hidden_weight=1)
    monkeypatch.setattr(importlib.import_module("workbench.compress.distill"), "MB", 1000)
    made = distilled(task, hidden_weight=1, teacher_cache_mb=5)
    assert made.warnings == ("teacher_cache_mb=5 is too little for the teacher's answers to 40 training items, 40 MB: they are computed at each step",)
    assert same(weights(made.model), weights(plain.model))


def test_a_cache_that_would_read_more_than_the_training_is_not_used():
    made = distilled(tiny_task("vit"), steps=2, teacher_cache_mb=5)
    assert made.warnings == ("teacher_cache_mb=5 is not used: 2 steps of 8 items read fewer than the 40 training items",)
