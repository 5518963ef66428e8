"""A batch that does not fit into memory, worked through in parts: the gradients are those of the whole batch
in float64, for every loss that trains."""

from __future__ import annotations

import pytest
import torch
from test_training import distilled
from tiny_tasks import TRAINING, tiny_task

import workbench as wb
from workbench.compress import compress
from workbench.compress.training.trainable import Moving
from workbench.recipe import Recipe
from workbench.tasks.base import Kind

PRUNE = wb.Prune(sparsity=0.5)
SIZES = ("llama", "vit", "bert", "resnet")


@pytest.fixture
def gradients(monkeypatch):
    """Note the gradients of the first step of each training."""
    recorded: list[list[torch.Tensor]] = []
    plain = Moving.largest_gradient

    def noted(moving):
        recorded.append(
            [
                torch.zeros_like(tensor).double() if tensor.grad is None else tensor.grad.double()
                for tensor in (*moving.weights, *moving.steps)
            ]
        )
        return plain(moving)

    monkeypatch.setattr(Moving, "largest_gradient", noted)
    return recorded


def cramped(monkeypatch, kind: Kind, most: int) -> None:
    """Let no more than so many items fit into memory while a student is taught."""
    plain = type(kind).logits

    def logits(kind, model, items):
        if len(items) > most and torch.is_grad_enabled():
            raise torch.OutOfMemoryError(f"CUDA out of memory for {len(items)} items")
        return plain(kind, model, items)

    monkeypatch.setattr(type(kind), "logits", logits)


def uneven(task):
    """Leave out labels, and tokens of texts, so that no two parts count for as much."""
    if task.training.labels.ndim == 2:
        task.training.labels[::2, 2:] = -100
    if "attention_mask" in task.training.inputs:
        task.training.inputs["attention_mask"][::3, 4:] = 0
    return task


def agree(added: list[torch.Tensor], whole: list[torch.Tensor]) -> None:
    """Check that gradients agree within what float32 rounds, against the largest."""
    largest = max(float(in_parts.abs().max()) for in_parts in whole)
    assert largest > 0
    for in_parts, at_once in zip(added, whole, strict=True):
        assert float((in_parts - at_once).abs().max()) < 1e-4 * largest


@pytest.mark.parametrize("kept", [{}, {"transfer_cache_mb": 16}], ids=["computed", "kept"])
@pytest.mark.parametrize("align", ["none", "mse", "cosine", "geodesic"])
@pytest.mark.parametrize("sort", SIZES)
def test_parts_of_a_transfers_batch_have_the_gradients_of_the_whole_in_float64(
    gradients, monkeypatch, sort, align, kept
):
    options = {
        "transfer_steps": 1 if not kept else 2,
        "transfer_batch": 8 if not kept else TRAINING,
        "align": align,
        "align_projection": "trained",
        "lora_count": 2,
        "transfer_look_every": 0,
        "align_weight": 3.0,
    }
    recipe = Recipe(PRUNE, wb.Transfer(**options, **kept))
    compress(uneven(tiny_task(sort, dtype=torch.float64)), recipe)
    whole = gradients[0]
    gradients.clear()
    task = uneven(tiny_task(sort))
    cramped(monkeypatch, task.kind, 3)
    compressed = compress(task, recipe)
    items = options["transfer_batch"]
    assert (
        compressed.warnings[0]
        == f"transfer ran out of memory at step 0 with {items} items at a time: it went on with {items // 2},"
        f" their gradients added up, so that a step still is made of {items}"
    )
    agree(gradients[0], whole)


@pytest.mark.parametrize("sort", SIZES)
def test_parts_of_a_distillations_batch_have_the_gradients_of_the_whole_in_float64(
    gradients, monkeypatch, sort
):
    options = {"steps": 1, "hidden_weight": 2.0} | ({"attention_weight": 2.0} if sort != "resnet" else {})
    distilled(uneven(tiny_task(sort, dtype=torch.float64)), **options)
    whole = gradients[0]
    gradients.clear()
    task = uneven(tiny_task(sort))
    cramped(monkeypatch, task.kind, 3)
    assert len(distilled(task, **options).warnings) == 2
    agree(gradients[0], whole)


def test_trainings_of_other_steps_go_on_in_parts_as_well(gradients, monkeypatch):
    for recipe in (
        Recipe(wb.Quantize(weight_bits=8), wb.QAT(qat_steps=1, qat_batch=8)),
        Recipe(wb.Prune(sparsity=0.5, rounds=2, train_steps=1, train_batch=8)),
    ):
        gradients.clear()
        compress(tiny_task("vit"), recipe)
        whole = gradients[0]
        gradients.clear()
        with monkeypatch.context() as patch:
            task = tiny_task("vit")
            cramped(patch, task.kind, 5)
            assert (
                "ran out of memory at step 0 with 8 items at a time: it went on with 4"
                in compress(task, recipe).warnings[0]
            )
        agree(gradients[0], whole)
