"""Trainings that diverge: they end, keep the best weights, say where, and give the same bits again."""

from __future__ import annotations

import math
import re

import pytest
import torch
from test_training import BOTH, PRUNE, distilled
from tiny_tasks import same, tiny_task, weights

import workbench as wb
from workbench.compress import compress
from workbench.compress.training.divergence_guard import trouble, worse
from workbench.compress.training.run import Run
from workbench.compress.training.validation import HeldOut
from workbench.errors import CompressionError
from workbench.recipe import Recipe
from workbench.util.progress import Look


@pytest.fixture
def breaking(monkeypatch):
    """Make the loss of one step NaN, as often as it is tried."""

    def at(step):
        plain = Run.added

        def added(run, drawn, objective):
            return torch.tensor(torch.nan) if run.done == step else plain(run, drawn, objective)

        monkeypatch.setattr(Run, "added", added)

    return at


def test_a_training_that_diverges_keeps_the_best_and_says_where(breaking):
    task = tiny_task("vit")
    breaking(37)
    compressed = distilled(task, *BOTH, steps=50)
    kept = compressed.recipe.get("distill").stop_at
    assert kept in {10, 20, 30}
    assert compressed.warnings[0].startswith(
        f"distillation diverged at step 37 of 50: loss nan; the weights after step {kept} are kept, where"
        " training loss was lowest ("
    )
    assert "lower learning_rate=0.0003" in compressed.warnings[0]
    assert len(compressed.curve) == 37
    assert same(weights(compress(task, compressed.recipe).model), weights(compressed.model))


def test_training_through_the_rounding_falls_back_as_well(breaking):
    task = tiny_task("vit")
    breaking(37)
    compressed = compress(task, Recipe(wb.Quantize(weight_bits=4), wb.QAT(qat_steps=50, qat_batch=8)))
    assert compressed.warnings[0].startswith(
        "quantization-aware training diverged at step 37 of 50: loss nan; the weights after step "
    )
    assert compressed.recipe.get("qat").qat_stop_at in {10, 20, 30}
    assert same(weights(compress(task, compressed.recipe).model), weights(compressed.model))


def test_training_between_rounds_of_pruning_goes_on_from_its_best_where_it_diverges(breaking):
    """It diverges at the same step whenever the recipe is run, and so gives the same bits."""
    task, recipe = tiny_task("vit"), Recipe(wb.Prune(sparsity=0.5, rounds=3, train_steps=20))
    breaking(12)
    compressed = compress(task, recipe)
    for index in (1, 2):
        assert re.match(
            rf"training of Prune after round {index} diverged at step 12 of 20: loss nan; the weights (after"
            r" step 10|from before the first step) are kept, where training loss was lowest \(.*; lower"
            r" train_rate",
            compressed.warnings[index - 1],
        )
    assert same(weights(compress(task, recipe).model), weights(compressed.model))
    assert compressed.recipe == recipe


def test_a_gradient_that_is_no_number_ends_the_training_before_it_does_harm(monkeypatch):
    """The loss is finite, and the gradient of a pruned weight, which a mask would hide, is not."""
    task = tiny_task("vit")
    plain = Run.added

    def added(run, drawn, objective):
        loss = plain(run, drawn, objective)
        if run.done == 7:
            layer = run.moving.layers[0]
            layer.parameter.grad.view(-1)[int((~layer.mask).flatten().nonzero()[0])] = torch.nan
        return loss

    monkeypatch.setattr(Run, "added", added)
    compressed = distilled(task, steps=50)
    assert re.match(
        r"distillation diverged at step 7 of 50: a gradient is nan at loss [\d.]+; the weights from before"
        r" the first step are kept",
        compressed.warnings[0],
    )
    assert len(compressed.curve) == 7
    assert same(weights(compressed.model), weights(compress(task, Recipe(PRUNE)).model))


@pytest.mark.parametrize("look_every", [0, 100])
def test_a_loss_that_blows_up_without_being_infinite_ends_the_training(look_every, monkeypatch):
    task = tiny_task("vit")
    start, plain = compress(task, Recipe(PRUNE)), Run.added
    monkeypatch.setattr(
        Run,
        "added",
        lambda run, drawn, objective: plain(run, drawn, objective) + (1e4 if run.done > 3 else 0),
    )
    compressed = distilled(task, steps=120, look_every=look_every)
    assert re.match(
        r"distillation diverged at step 13 of 120: loss 1e\+04, for 10 steps above 10 times what it was at"
        r" first \(.*\) and 1 more; the weights from before the first step are kept, .*; lower"
        r" learning_rate=0\.0003$",
        compressed.warnings[0],
    )
    assert len(compressed.curve) == 13
    assert compressed.recipe.get("distill").stop_at == 0
    assert same(weights(compressed.model), weights(start.model))
    assert "distilled 0 steps" in compressed.report[0].outcome


def test_a_transfer_that_diverges_keeps_the_best_look(breaking):
    task = tiny_task("vit")
    breaking(11)
    compressed = compress(
        task,
        Recipe(PRUNE, wb.Transfer(transfer_steps=20, transfer_batch=8, transfer_look_every=4, lora_count=2)),
    )
    kept = compressed.recipe.get("transfer").transfer_stop_at
    assert kept in {0, 4, 8}
    assert compressed.warnings[0].startswith("transfer diverged at step 11 of 20: loss nan; the weights ")
    assert same(weights(compress(task, compressed.recipe).model), weights(compressed.model))


def test_a_loss_that_only_grew_is_said():
    assert worse([1.0] * 9 + [2.0] * 10) == ""  # too few steps
    assert worse([1.0] * 10 + [2.0] * 9 + [0.5]) == ""
    assert (
        worse([1.0] * 10 + [2.0] * 9 + [3.0])
        == "ended with a larger loss than it began with: 1 at the first step, at least 2 in each of the"
        " last 10"
    )


def test_single_bad_batches_are_no_divergence():
    assert trouble(1e6, 1.0, [1.0] * 20) == ""
    assert trouble(1e6, 1.0, [1.0] + [1e6] * 8) == ""
    assert trouble(19.9, 1.0, [1.0] + [1e6] * 20) == ""
    assert (
        trouble(20.1, 1.0, [1.0] + [1e6] * 9)
        == "loss 20.1, for 10 steps above 10 times what it was at first (1) and 1 more"
    )
    assert trouble(math.inf, 1.0, []) == "loss inf"


def test_with_looks_the_best_look_is_kept(breaking, monkeypatch):
    task = tiny_task("vit")
    breaking(11)
    losses = {0: 3.0, 4: 1.0, 8: 2.0}
    monkeypatch.setattr(
        HeldOut,
        "look",
        lambda _held, _model, step: Look(step, losses[step], "accuracy", 1.0, 0.5, 0.4, 0.6, 4, 0.95),
    )
    compressed = distilled(task, steps=50, look_every=4)
    assert compressed.recipe.get("distill").stop_at == 4
    assert "held-out loss was lowest" in compressed.warnings[0]
    assert same(weights(compress(task, compressed.recipe).model), weights(compressed.model))


def test_a_training_that_diverges_early_keeps_what_it_began_with(breaking):
    task = tiny_task("vit")
    breaking(7)
    compressed = distilled(task, steps=50)
    assert compressed.warnings[0].startswith(
        "distillation diverged at step 7 of 50: loss nan; the weights from before the first step are kept,"
        " where training loss was lowest ("
    )
    assert same(weights(compressed.model), weights(compress(task, Recipe(PRUNE)).model))


def test_a_training_that_cannot_begin_is_refused(breaking):
    breaking(0)
    with pytest.raises(
        CompressionError,
        match=r"distillation diverged at step 0 of 50: loss nan; lower learning_rate=0\.0003",
    ):
        distilled(tiny_task("vit"), steps=50)


def test_a_rate_far_too_high_ends_with_finite_weights():
    """Adam at rate 1 on every weight: whatever comes of it, it is finite and its promises hold."""
    compressed = distilled(tiny_task("vit"), *BOTH, steps=40, learning_rate=1.0)
    assert all(torch.isfinite(tensor).all() for tensor in weights(compressed.model).values())


def test_on_a_real_model_a_point_that_diverged_is_measured_and_kept(ledger):
    bench = wb.Bench("fashion-vit", ledger=ledger, progress=False)
    recipe = Recipe(wb.Quantize(weight_bits=3), wb.QAT(qat_steps=20, qat_rate=1.0, qat_batch=16))
    point = bench.measure(recipe)
    assert re.match(
        r"quantization-aware training diverged at step 10 of 20: loss \d+, for 10 steps above 10 times what"
        r" it was at first .*; the weights from before the first step are kept",
        point.warnings[0],
    )
    assert point.quality[0].compressed.value > 0.85
    assert bench.measure(recipe) == point
