"""The teacher's answers, computed once: the same lessons, within the budget, and nothing kept that does not pay."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from test_training import close, distilled
from tiny_tasks import TRAINING, same, tiny_task, weights

import workbench as wb
from workbench.compress.inner import Seen, see
from workbench.compress.teacher_cache import teacher_cache
from workbench.compress.teacher_tables import DiskTable, disk_folder, free_bytes
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


# --- on disk


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return disk_folder()


@pytest.fixture
def few(monkeypatch):
    """Let a "megabyte" be 1,000 bytes, so that tiny answers exceed budgets."""
    monkeypatch.setattr(importlib.import_module("workbench.compress.distill"), "MB", 1000)


@pytest.mark.parametrize("more", [{}, {"hidden_weight": 1.0}, {"train_precision": "mixed"}], ids=["answers", "hidden states", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_answers_on_disk_give_the_bits_of_those_in_memory_and_leave_no_file(sort, device, dtype, more, folder):
    task = tiny_task(sort, device, dtype)
    kept, read = distilled(task, teacher_cache_mb=16, **more), distilled(task, teacher_cache_disk_mb=16, **more)
    assert [one for one in read.warnings if "cache" in one] == []
    assert read.curve == kept.curve
    assert same(weights(read.model), weights(kept.model))
    assert list(folder.iterdir()) == []  # the file has no name


def test_disk_is_used_where_memory_is_too_little(few, folder, monkeypatch):
    made = []
    plain = DiskTable.put
    monkeypatch.setattr(DiskTable, "put", lambda table, start, values: made.append(start) or plain(table, start, values))
    task = tiny_task("vit")
    assert distilled(task, hidden_weight=1, teacher_cache_mb=39, teacher_cache_disk_mb=41).warnings == ()
    assert made
    made.clear()
    assert distilled(task, hidden_weight=1, teacher_cache_mb=41, teacher_cache_disk_mb=41).warnings == ()
    assert not made


def test_answers_beyond_both_budgets_are_computed_anew_and_that_is_said(few, folder):
    task = tiny_task("vit")
    plain, made = distilled(task, hidden_weight=1), distilled(task, hidden_weight=1, teacher_cache_mb=5, teacher_cache_disk_mb=6)
    assert made.warnings == ("teacher_cache_mb=5 and teacher_cache_disk_mb=6 are too little for the teacher's answers to 40 training items, 40 MB: they are computed at each step",)
    assert same(weights(made.model), weights(plain.model))
    assert not folder.exists()


def test_a_disk_without_room_is_not_filled(folder, monkeypatch):
    monkeypatch.setattr(importlib.import_module("workbench.compress.distill"), "free_bytes", lambda _: 10)
    task = tiny_task("vit")
    plain, made = distilled(task), distilled(task, teacher_cache_disk_mb=5)
    assert made.warnings == (f"teacher_cache_disk_mb=5 is not used: the teacher's answers take 1 MB, and {folder} has 0 MB free; they are computed at each step",)
    assert same(weights(made.model), weights(plain.model))


def test_a_disk_that_fills_up_on_the_way_costs_a_warning_not_the_training(folder, monkeypatch):
    task, statistics = tiny_task("vit"), None
    plain = DiskTable.put

    def full(table, start, values):
        if start:
            raise OSError(28, "No space left on device")
        plain(table, start, values)

    with monkeypatch.context() as patch:
        patch.setattr(DiskTable, "put", full)
        statistics = Statistics(task)
        made = distilled(task, teacher_cache_disk_mb=5, statistics=statistics)
    assert made.warnings == (f"the teacher's answers can no longer be kept in {folder}: No space left on device; from here on they are computed at each step",)
    assert [loss for _, loss in made.curve] == pytest.approx([loss for _, loss in distilled(task).curve], rel=1e-3)
    assert distilled(task, teacher_cache_disk_mb=5, statistics=statistics).warnings == ()  # there is room again


def test_a_table_on_disk_gives_back_every_bit_in_any_order(tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.randn(7, 3, 5).to(dtype)
        table = DiskTable.like(tmp_path / "made", values, 9)
        table.put(2, values)
        index = torch.tensor([8, 2, 2, 5])
        assert torch.equal(table.take(index), values[index - 2])
        assert table.nbytes == 9 * 15 * dtype.itemsize
    assert free_bytes(tmp_path / "not" / "yet") > 0


def test_a_file_is_closed_when_its_table_goes(tmp_path):
    table = DiskTable.like(tmp_path, torch.zeros(2, 3), 2)
    file = table.file
    assert not file.closed
    del table
    assert file.closed
    assert list(Path(tmp_path).iterdir()) == []
