"""Distillation: the loss against one written by hand, what moves, and what must not."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny_tasks import TRAINING, same, tiny_task, vocabulary, weights

import workbench as wb
from workbench.compress import compress
from workbench.compress.distillation.distill import distillation_loss
from workbench.errors import CompressionError, RecipeError
from workbench.modules.layer import replace_module
from workbench.recipe import Recipe
from workbench.tasks.likelihood import Choosing
from workbench.util.progress import Training

PRUNE = wb.Prune(sparsity=0.5)


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp((x - max(row)) / temperature) for x in row]
    return [p / sum(powers) for p in powers]


def loss_by_hand(student, teacher, labels, temperature: float, alpha: float) -> float:
    """Return alpha T^2 KL(teacher || student at T) + (1 - alpha) cross entropy, averaged over labels, in
    Python floats."""
    terms = []
    for s, t, label in zip(student, teacher, labels, strict=True):
        if label == -100:
            continue
        p, q = softmax(t, temperature), softmax(s, temperature)
        kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        terms.append(alpha * temperature**2 * kl - (1 - alpha) * math.log(softmax(s, 1)[label]))
    return sum(terms) / len(terms)


def logits(*shape: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_hintons(temperature, alpha, device):
    student, teacher = logits(7, 5, seed=1), logits(7, 5, seed=2)
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    loss = distillation_loss(
        student.to(device), teacher.to(device), labels.to(device), temperature, alpha, kind=Choosing()
    )
    assert float(loss) == pytest.approx(
        loss_by_hand(student.tolist(), teacher.tolist(), labels.tolist(), temperature, alpha), rel=1e-4
    )


def test_tokens_without_a_label_do_not_count():
    student, teacher = logits(2, 3, 5, seed=1), logits(2, 3, 5, seed=2)
    labels = torch.tensor([[0, -100, 2], [-100, 1, 4]])
    expected = loss_by_hand(
        student.view(6, 5).tolist(), teacher.view(6, 5).tolist(), labels.flatten().tolist(), 2.0, 0.7
    )
    assert float(distillation_loss(student, teacher, labels, 2.0, 0.7, kind=Choosing())) == pytest.approx(
        expected, rel=1e-4
    )


def test_the_gradient_keeps_its_size_at_any_temperature():
    """Hinton, Vinyals and Dean (2015): T^2 makes up for soft gradients that shrink as 1 / T^2."""
    teacher, labels, sizes = logits(64, 5, seed=2), torch.zeros(64, dtype=torch.long), []
    for temperature in (20.0, 80.0):
        student = logits(64, 5, seed=1).requires_grad_()
        distillation_loss(student, teacher, labels, temperature, 1.0, kind=Choosing()).backward()
        sizes.append(float(student.grad.norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    same = logits(8, 5, seed=1)
    assert float(
        distillation_loss(same, same, torch.zeros(8, dtype=torch.long), 3.0, 1.0, kind=Choosing())
    ) == pytest.approx(0, abs=1e-6)


def test_the_first_point_of_the_curve_is_the_loss_of_the_compressed_model():
    task = tiny_task("vit")
    size = 2 * TRAINING  # more than there is: a batch of training items drawn with this seed
    compressed = compress(
        task, Recipe(PRUNE, wb.Distill(temperature=2, alpha=0.4, steps=1, distill_batch=size, seed=3))
    )
    drawn = task.training[torch.randint(TRAINING, (TRAINING,), generator=torch.Generator().manual_seed(3))]
    start = compress(task, Recipe(PRUNE))
    with torch.no_grad():
        student, teacher = task.kind.logits(start.model, drawn), task.kind.logits(task.model, drawn)
    assert [step for step, _ in compressed.curve] == [0]
    assert compressed.curve[0][1] == pytest.approx(
        loss_by_hand(student.tolist(), teacher.tolist(), drawn.labels.tolist(), 2.0, 0.4), rel=1e-4
    )


@pytest.mark.parametrize(
    "before",
    [wb.Prune(sparsity=0.6), wb.Quantize(weight_bits=3), wb.LowRank(rank_ratio=0.3, factorization="svd")],
    ids=repr,
)
def test_training_brings_the_answers_closer_to_the_teachers(sort, device, before):
    task = tiny_task(sort, device)
    start = compress(task, Recipe(before))
    compressed = compress(
        task,
        Recipe(
            before,
            wb.Distill(
                temperature=2, alpha=1, steps=40, learning_rate=5e-3, distill_batch=TRAINING, look_every=0
            ),
        ),
    )
    assert [step for step, _ in compressed.curve] == list(range(40))
    training = task.training.to(device)
    with torch.no_grad():
        teacher = task.kind.logits(task.model, training)
        first, last = (
            float(
                distillation_loss(
                    task.kind.logits(model, training), teacher, training.labels, 2, 1, kind=task.kind
                )
            )
            for model in (start.model, compressed.model)
        )
    assert last < 0.8 * first


@pytest.mark.parametrize(
    "recipe",
    [
        (wb.Prune(sparsity=0.5),),
        (wb.Prune(pattern="2:4"),),
        (wb.Quantize(weight_bits=3, group_size=8),),
        (wb.Quantize(weight_bits=4, grid="symmetric"),),
        (wb.Prune(pattern="2:4"), wb.Quantize(weight_bits=4)),
        (wb.LowRank(rank_ratio=0.4), wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4)),
    ],
    ids=lambda steps: "+".join(step.label() for step in steps),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_masks_and_grids_hold_while_everything_else_moves(sort, device, dtype, recipe):
    task = tiny_task(sort, device, dtype)
    if sort == "resnet" and any(getattr(step, "group_size", 0) == 8 for step in recipe):
        recipe = tuple(
            dataclasses.replace(step, group_size=9) for step in recipe
        )  # divides 72 and 144 inputs, not 49
    start = compress(task, Recipe(*recipe))
    compressed = compress(
        task, Recipe(*recipe, wb.Distill(temperature=2, steps=8, learning_rate=2e-2, distill_batch=16))
    )
    moved = 0
    for before, after in zip(start.layers, compressed.layers, strict=True):
        assert before.name == after.name
        if before.mask is not None:
            assert torch.equal(before.mask, after.mask)
            assert (after.matrix()[~after.mask] == 0).all()
        if before.grid is not None:
            if before.name not in vocabulary(start.model):
                assert torch.equal(before.grid.scale, after.grid.scale)  # scales stay, codes follow
                assert before.grid.zero_point is None or torch.equal(
                    before.grid.zero_point, after.grid.zero_point
                )
            assert torch.equal(after.grid.dequantize().to(dtype), after.as_matrix(after.parameter))
        moved += not torch.equal(before.parameter, after.parameter)
    assert moved > len(compressed.layers) / 2


def test_only_targeted_layers_move():
    task = tiny_task("vit")
    start = weights(compress(task, Recipe(PRUNE)).model)
    compressed = compress(
        task, Recipe(PRUNE, wb.Distill(temperature=2, steps=5, learning_rate=1e-2, targets=("re:fc1$",)))
    )
    changed = {
        name for name, tensor in weights(compressed.model).items() if not torch.equal(tensor, start[name])
    }
    assert changed == {f"vit.layers.{i}.mlp.fc1.{part}" for i in range(2) for part in ("weight", "bias")}
    assert {row.name for row in compressed.report if "distilled" in row.outcome} == {
        f"vit.layers.{i}.mlp.fc1" for i in range(2)
    }


def test_without_targets_norms_and_biases_learn_too_and_buffers_stay():
    task = tiny_task("resnet")
    start, compressed = (
        compress(task, Recipe(PRUNE)),
        compress(task, Recipe(PRUNE, wb.Distill(temperature=2, steps=5, learning_rate=1e-2))),
    )
    for name, buffer in start.model.named_buffers():
        assert torch.equal(buffer, dict(compressed.model.named_buffers())[name]), name
    assert all(
        not torch.equal(p, dict(compressed.model.named_parameters())[name])
        for name, p in start.model.named_parameters()
        if "normalization" in name
    )


def test_tied_weights_stay_tied_and_the_report_says_that_they_learned():
    task = tiny_task("gpt2")
    compressed = compress(task, Recipe(PRUNE, wb.Distill(temperature=2, steps=5, learning_rate=1e-2)))
    assert compressed.model.lm_head.weight is compressed.model.transformer.wte.weight
    assert not torch.equal(compressed.model.transformer.wte.weight, task.model.transformer.wte.weight)
    rows = {row.name: row for row in compressed.report}
    assert "distilled" in rows["transformer.wte"].outcome


def test_another_seed_draws_other_batches():
    task = tiny_task("vit")
    runs = [
        compress(task, Recipe(PRUNE, wb.Distill(temperature=2, steps=3, distill_batch=4, seed=seed))).curve
        for seed in (0, 1, 0)
    ]
    assert runs[0] != runs[1]
    assert runs[0] == runs[2]


def test_the_users_random_state_is_neither_used_nor_changed():
    task = tiny_task("vit")
    torch.manual_seed(1)
    first = compress(task, Recipe(PRUNE, wb.Distill(temperature=2, steps=2))).curve
    state = torch.get_rng_state()
    assert first == compress(task, Recipe(PRUNE, wb.Distill(temperature=2, steps=2))).curve
    assert torch.equal(torch.get_rng_state(), state)


def test_it_can_run_where_gradients_are_switched_off():
    task = tiny_task("vit")
    with torch.no_grad():
        compressed = compress(task, Recipe(PRUNE, wb.Distill(temperature=2, steps=2)))
    assert len(compressed.curve) == 2


def test_items_that_are_no_numbers_are_refused_by_what_the_teacher_says_of_them():
    task = tiny_task("vit")
    task.training.inputs["pixel_values"][:] = torch.nan
    with pytest.raises(
        CompressionError,
        match=(
            r"teacher 'tiny-vit' answers with numbers that are not finite \(4 of 4\): nothing can be learned"
            r" from them; check its weights and the training items"
        ),
    ):
        compress(task, Recipe(PRUNE, wb.Distill(temperature=2)))


def test_the_head_may_be_the_only_layer_to_learn():
    task = tiny_task("vit")
    compressed = compress(task, Recipe(PRUNE, wb.Distill(temperature=2, steps=3, targets=("classifier",))))
    assert not torch.equal(compressed.model.classifier.weight, task.model.classifier.weight)


def test_layers_that_cannot_learn_are_refused():
    task, name = tiny_task("resnet"), "resnet.encoder.stages.0.layers.0.layer.0.convolution"
    replace_module(task.model, name, torch.nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False))
    with pytest.raises(CompressionError, match=rf"Distill\(.*\) finds no layer that it can train: {name}"):
        compress(task, Recipe(PRUNE, wb.Distill(temperature=2, targets=(name,))))


# --- watched, and ended early


def test_training_that_is_ended_early_says_where_and_gives_the_same_bits_again():
    task = tiny_task("vit")
    seen: list[tuple[int, int]] = []
    training = Training(lambda curve, steps: seen.append((len(curve), steps)), lambda: len(seen) == 4)
    recipe = wb.Recipe(
        wb.Prune(sparsity=0.5),
        wb.Quantize(weight_bits=4),
        wb.Distill(temperature=2, steps=9, distill_batch=8),
    )
    stopped = compress(task, recipe, training=training)
    assert seen == [(1, 9), (2, 9), (3, 9), (4, 9)]
    assert stopped.recipe == wb.Recipe(
        wb.Prune(sparsity=0.5),
        wb.Quantize(weight_bits=4),
        wb.Distill(temperature=2, steps=9, distill_batch=8, stop_at=4),
    )
    assert "distilled 4 steps at T=2" in stopped.report[0].outcome
    again = compress(task, stopped.recipe)
    assert same(weights(again.model), weights(stopped.model))
    assert again.curve == stopped.curve == compress(task, recipe).curve[:4]


def test_training_that_nobody_ends_is_the_recipe_itself():
    recipe = wb.Recipe(wb.Prune(sparsity=0.5), wb.Distill(temperature=2, steps=3, distill_batch=8))
    assert compress(tiny_task("vit"), recipe, training=Training()).recipe == recipe


def test_a_stop_beyond_the_last_step_is_refused():
    with pytest.raises(RecipeError, match=r"stop_at=7 lies beyond steps=5"):
        wb.Distill(temperature=2, steps=5, stop_at=7)
