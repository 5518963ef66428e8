"""Quantization-aware training: the gradients against autograd through LSQ as its authors write it, what
moves, and what it recovers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny_tasks import TRAINING, same, tiny_task, weights

import workbench as wb
from workbench.bench import Bench
from workbench.compress import compress
from workbench.compress.core.batch import Batch
from workbench.compress.outlines import after
from workbench.compress.quantization.qat import start_of
from workbench.compress.training.lsq import gradients, steps_of, with_steps
from workbench.errors import CompressionError, RecipeError
from workbench.export import load
from workbench.formats.affine import Grid
from workbench.formats.stored_forms import FloatGrid, InputScaled, OffsetGrid
from workbench.measure.size import sizes
from workbench.modules.layer import find_layers
from workbench.recipe import Recipe
from workbench.sensitivity import layers_of
from workbench.shapes.outline import Outline
from workbench.util.progress import Training

FAST = {"qat_steps": 4, "qat_batch": 16}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the gradients


class Round(torch.autograd.Function):
    """Esser et al. (2020), appendix: round with the gradient of the identity."""

    @staticmethod
    def forward(ctx, values):
        return values.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def lsq(weight, step, least: float, most: float, gradient_scale: float):
    """Return the rounded weights as the paper's pseudocode (appendix B) has it, in float64, for autograd to
    go through."""
    scaled = step * gradient_scale
    step = (step - scaled).detach() + scaled
    return Round.apply((weight / step).clamp(least, most)) * step


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_those_of_the_papers_pseudocode(bits, groups):
    """Symmetric codes from -2^(b-1) to 2^(b-1) - 1; step sizes small enough that some weights are clamped."""
    hidden, incoming = noise(5, 8, seed=1), noise(5, 8, seed=2)
    step = (0.4 + noise(5, groups, seed=3).abs()) * 2.0 ** (2 - bits)
    most = 2 ** (bits - 1) - 1
    count = 8 // groups
    weight = hidden.clone().requires_grad_()
    wanted = step.clone().requires_grad_()
    by_group = [
        lsq(
            weight[:, g * count : (g + 1) * count],
            wanted[:, g : g + 1],
            -most - 1,
            most,
            1 / math.sqrt(count * most),
        )
        for g in range(groups)
    ]
    (torch.cat(by_group, 1) * incoming).sum().backward()
    form = Grid(torch.zeros(5, 8, dtype=torch.uint8), step.float(), None, bits).snap(hidden.float())
    assert bool(((hidden / step.repeat_interleave(count, 1)) > most).any())  # something is clamped
    by_weight, by_step = gradients(form, hidden.float(), incoming.float())
    assert torch.allclose(by_weight.double(), weight.grad, rtol=1e-5, atol=1e-6)
    assert torch.allclose(by_step.double(), wanted.grad, rtol=1e-4, atol=1e-5)


def finite_difference(form_at, value: float, incoming: torch.Tensor, hidden: torch.Tensor) -> float:
    """Return d/ds of sum(incoming * (rounded + straight-through part)), with codes and clamping as they are
    at `value`."""
    form = form_at(value)
    scale = steps_of(form).double()
    rounded = form.dequantize().double() / scale
    inside = (gradients(form, hidden, torch.ones_like(hidden))[0] != 0).double()
    bias = (rounded - hidden.double() / scale) * inside  # held while s moves: round(v) = v + bias

    def loss(step: float) -> float:
        at = torch.where(inside > 0, (hidden.double() / step + bias) * step, rounded * step)
        return float((at * incoming.double()).sum())

    return (loss(value * 1.001) - loss(value * 0.999)) / (value * 0.002)


@pytest.mark.parametrize("kind", ["asymmetric", "tensor", "nf4", "offset", "scaled"])
def test_every_form_has_the_gradient_of_its_rounding(kind):
    hidden, incoming = noise(4, 8, seed=1).float(), noise(4, 8, seed=2).float()
    codes = torch.zeros(4, 8, dtype=torch.uint8)

    def form_at(step: float):
        scale = torch.full((1, 1), step)
        zero = torch.full((1, 1), 5, dtype=torch.uint8)
        if kind == "nf4":
            return FloatGrid(codes, scale, "nf4").snap(hidden)
        if kind == "offset":
            return OffsetGrid(codes, scale, torch.full((1, 1), 6.3), 4).snap(hidden)
        if kind == "scaled":
            return InputScaled(Grid(codes, scale, zero, 4), torch.ones(8)).snap(hidden)
        return Grid(codes, scale, zero if kind == "asymmetric" else None, 4).snap(hidden)

    value = 1.2 if kind == "nf4" else 0.15
    form = form_at(value)
    _, by_step = gradients(form, hidden, incoming)
    most = 1.0 if kind == "nf4" else 7.0
    assert float(by_step) * math.sqrt(32 * most) == pytest.approx(
        finite_difference(form_at, value, incoming, hidden), rel=1e-3
    )


def test_inputs_that_are_scaled_first_pass_their_scale_on():
    hidden, incoming, finer = (
        noise(4, 8, seed=1).float(),
        noise(4, 8, seed=2).float(),
        0.5 + noise(8, seed=4).abs().float(),
    )
    base = Grid(torch.zeros(4, 8, dtype=torch.uint8), torch.full((4, 1), 0.2), None, 4)
    whole = InputScaled(base, finer).snap(hidden)
    by_weight, by_step = gradients(whole, hidden, incoming)
    scaled = gradients(base.snap(hidden / finer), hidden / finer, incoming * finer)
    assert torch.allclose(by_weight, scaled[0] / finer)
    assert torch.allclose(by_step, scaled[1])


def test_step_sizes_that_float16_holds_stay_so():
    form = Grid(torch.zeros(2, 3, 4, dtype=torch.uint8), torch.ones(2, 3, 1), None, 4)
    steps = torch.tensor([1e-9, 0.1, 1e9]).view(1, 3, 1).expand(2, 3, 1)
    stored = steps_of(with_steps(form, steps, torch.tensor([True, False])[:, None, None]))
    assert stored[0].flatten().tolist() == [2.0**-14, float(torch.tensor(0.1).half()), 65504.0]
    assert torch.equal(stored[1], steps[1])


# --- what moves and what must not

GRIDS = {
    "W2": (wb.Quantize(weight_bits=2),),
    "symmetric tensor": (wb.Quantize(weight_bits=3, grid="symmetric", granularity="tensor"),),
    "2:4": (wb.Prune(pattern="2:4"), wb.Quantize(weight_bits=4)),
    "factors": (wb.LowRank(rank_ratio=0.4), wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4)),
    "gptq": (wb.Quantize(weight_bits=3, rounding="gptq"),),
    "nf4": (wb.Quantize(weight_bits=4, number_format="nf4"),),
    "hqq": (wb.Prune(sparsity=0.4), wb.Quantize(weight_bits=3, rounding="hqq")),
    "awq": (wb.Quantize(weight_bits=3, rounding="awq"),),
    "W4A8": (wb.Activations(activation_bits=8, smoothing=0.5), wb.Quantize(weight_bits=4)),
    "repaired": (wb.Quantize(weight_bits=2), wb.Repair(repair_ratio=0.1)),
    "mixed": (wb.Quantize(weight_bits=3.5),),
}


@pytest.mark.parametrize("steps", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_it_starts_at_the_grid_and_ends_on_one(sort, device, dtype, steps):
    task = tiny_task(sort, device, dtype)
    before = weights(task.model)
    start = compress(task, Recipe(*steps))
    recipe = Recipe(*steps, wb.QAT(**FAST, qat_rate=2e-2, qat_step_rate=2e-2))
    once, twice = compress(task, recipe), compress(task, recipe)
    assert same(weights(task.model), before)
    assert same(weights(once.model), weights(twice.model))
    assert once.curve == twice.curve
    moved = stepped = 0
    for old, new in zip(start.layers, once.layers, strict=True):
        new.check()
        if old.mask is not None:
            assert torch.equal(old.mask, new.mask)
            assert (new.matrix()[~new.mask] == 0).all()
        if old.grid is None:
            continue
        assert type(new.grid) is type(old.grid)
        assert new.grid.bits == old.grid.bits
        scales = [
            form.base.scale if isinstance(form, InputScaled) else form.scale for form in (old.grid, new.grid)
        ]
        assert scales[0].dtype == scales[1].dtype
        assert scales[0].shape == scales[1].shape
        assert (scales[1] > 0).all()
        stepped += not torch.equal(*scales)
        moved += not torch.equal(
            old.grid.codes if hasattr(old.grid, "codes") else old.grid.base.codes,
            new.grid.codes if hasattr(new.grid, "codes") else new.grid.base.codes,
        )
    assert stepped > 0
    assert moved > 0


@pytest.mark.parametrize("loss", ["task", "distillation"])
def test_the_curve_begins_at_the_loss_of_the_post_training_solution(loss):
    task = tiny_task("vit")
    compressed = compress(
        task,
        Recipe(
            wb.Quantize(weight_bits=2), wb.QAT(qat_steps=1, qat_loss=loss, qat_batch=2 * TRAINING, seed=3)
        ),
    )
    items = task.training[torch.randint(TRAINING, (TRAINING,), generator=torch.Generator().manual_seed(3))]
    start = compress(task, Recipe(wb.Quantize(weight_bits=2))).model
    with torch.no_grad():
        student, teacher = task.kind.logits(start, items), task.kind.logits(task.model, items)
    expected = torch.nn.functional.cross_entropy(student, items.labels)
    if loss == "distillation":
        p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
        expected = 4 * (p * (p.log() - q.log())).sum(-1).mean()
    assert compressed.curve[0][1] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("rounding", ["rtn", "gptq", "awq"])
def test_hidden_weights_begin_where_they_round_to_the_codes_that_are_there(rounding):
    task = tiny_task("vit")
    compressed = compress(task, Recipe(wb.Quantize(weight_bits=2, rounding=rounding)))
    dense = find_layers(task.model)[0]
    kept = []
    for layer in (layer for layer in compressed.layers if layer.grid is not None):
        start = start_of(Batch((layer,)), dense)[0]
        assert torch.equal(layer.grid.snap(start).dequantize(), layer.grid.dequantize())
        kept.append(float((start == dense[layer.origin].matrix()).float().mean()))
    assert min(kept) == 1 if rounding == "rtn" else min(kept) > 0.5


def test_without_a_step_rate_step_sizes_stay():
    task = tiny_task("vit")
    start = compress(task, Recipe(wb.Quantize(weight_bits=3)))
    trained = compress(
        task, Recipe(wb.Quantize(weight_bits=3), wb.QAT(**FAST, qat_step_rate=0, qat_rate=2e-2))
    )
    for old, new in zip(start.layers, trained.layers, strict=True):
        assert old.grid is None or torch.equal(old.grid.scale, new.grid.scale)


def test_learned_step_sizes_fit_the_training_items_better():
    """Of two runs that differ in nothing else, on items that both have seen."""
    task, losses = tiny_task("vit"), {}
    for rate in (0.0, 2e-2):
        compressed = compress(
            task,
            Recipe(
                wb.Quantize(weight_bits=2, scale_search=False),
                wb.QAT(qat_steps=60, qat_rate=1e-4, qat_step_rate=rate, qat_batch=2 * TRAINING),
            ),
        )
        losses[rate] = compressed.curve[-1][1]
    assert losses[2e-2] < 0.9 * losses[0.0]


def test_only_targeted_layers_move():
    task = tiny_task("vit")
    quantize = wb.Quantize(weight_bits=3)
    start = weights(compress(task, Recipe(quantize)).model)
    trained = compress(task, Recipe(quantize, wb.QAT(**FAST, qat_rate=2e-2, targets=("re:fc1$",))))
    changed = {
        name for name, tensor in weights(trained.model).items() if not torch.equal(tensor, start[name])
    }
    assert changed == {f"vit.layers.{i}.mlp.fc1.{part}" for i in range(2) for part in ("weight", "bias")}
    assert {row.name for row in trained.report if "trained" in row.outcome} == {
        f"vit.layers.{i}.mlp.fc1" for i in range(2)
    }


def test_what_a_target_leaves_out_stays_and_the_report_says_so():
    task = tiny_task("vit")
    start = compress(task, Recipe(wb.Quantize(weight_bits=3)))
    trained = compress(
        task, Recipe(wb.Quantize(weight_bits=3), wb.QAT(**FAST, qat_rate=2e-2, targets=("!re:fc1$",)))
    )
    for index in range(2):
        name = f"vit.layers.{index}.mlp.fc1"
        assert torch.equal(start.model.get_submodule(name).weight, trained.model.get_submodule(name).weight)
        assert "qat left out by target '!re:fc1$'" in {row.name: row.outcome for row in trained.report}[name]


def test_training_that_is_ended_early_says_where_and_gives_the_same_bits_again():
    task, seen = tiny_task("vit"), []
    training = Training(lambda curve, steps: seen.append((len(curve), steps)), lambda: len(seen) == 3)
    recipe = Recipe(wb.Quantize(weight_bits=3), wb.QAT(qat_steps=9, qat_batch=8))
    stopped = compress(task, recipe, training=training)
    assert seen == [(1, 9), (2, 9), (3, 9)]
    assert stopped.recipe == Recipe(
        wb.Quantize(weight_bits=3), wb.QAT(qat_steps=9, qat_batch=8, qat_stop_at=3)
    )
    assert same(weights(compress(task, stopped.recipe).model), weights(stopped.model))


def test_distillation_may_follow_and_its_curve_goes_on():
    task = tiny_task("vit")
    compressed = compress(
        task,
        Recipe(
            wb.Quantize(weight_bits=3), wb.QAT(**FAST), wb.Distill(temperature=2, steps=4, distill_batch=8)
        ),
    )
    assert [step for step, _ in compressed.curve] == list(range(8))
    for layer in compressed.layers:
        layer.check()


@pytest.mark.parametrize(
    "steps",
    [GRIDS["W2"], GRIDS["2:4"], GRIDS["W4A8"], GRIDS["awq"], GRIDS["hqq"]],
    ids=["W2", "2:4", "W4A8", "awq", "hqq"],
)
def test_the_export_gives_the_same_bits_and_packing_is_real(steps, tmp_path):
    task = tiny_task("vit")
    recipe = Recipe(*steps, wb.QAT(**FAST))
    bench = Bench(task, ledger=tmp_path / "points", progress=False)
    compressed = bench.compress(recipe)
    loaded = load(bench.export(recipe, tmp_path / "out"))
    assert same(weights(loaded), weights(compressed.model))
    predicted = after(Outline.of(task.model), recipe)
    assert predicted.file_bytes() == after(Outline.of(task.model), Recipe(*steps)).file_bytes()
    assert sizes(compressed.model, compressed.layers).file_bytes <= predicted.file_bytes()


def test_it_is_left_out_of_the_sensitivity_of_layers():
    by_layer = layers_of(tiny_task("vit").model, Recipe(wb.Quantize(weight_bits=4), wb.QAT(qat_steps=3)))
    assert all([step.kind() for step in layer_recipe] == ["quantize"] for layer_recipe in by_layer.values())


# --- bad input


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((wb.QAT(qat_steps=5),), r"QAT needs weights on a grid to start from: put Quantize before it"),
        ((wb.Prune(sparsity=0.5), wb.QAT(qat_steps=5)), r"put Quantize before it"),
        (
            (wb.Quantize(weight_bits=16, number_format="bfloat16"), wb.QAT(qat_steps=5)),
            r"no step sizes to learn after Quantize\(weight_bits=16, number_format='bfloat16'\)",
        ),
    ],
)
def test_it_needs_a_grid(steps, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(*steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qat_steps": 0}, r"QAT\(qat_steps=0\) is refused"),
        ({"qat_rate": 0}, r"QAT\(qat_rate=0\) is refused"),
        ({"qat_loss": "mse"}, r"QAT\(qat_loss='mse'\) is refused"),
        ({"qat_steps": 5, "qat_stop_at": 7}, r"qat_stop_at=7 lies beyond qat_steps=5"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        wb.QAT(**options)


def test_targets_without_a_grid_are_refused():
    recipe = Recipe(wb.Quantize(weight_bits=4), wb.QAT(qat_steps=3, targets=("classifier",)))
    with pytest.raises(
        CompressionError, match=r"QAT\(.*qat_steps=3\) finds no layer on a grid that it can train: classifier"
    ):
        compress(tiny_task("vit"), recipe)


def test_training_that_diverges_is_refused_with_what_to_change():
    task = tiny_task("vit")
    task.training.inputs["pixel_values"][:] = torch.nan
    with pytest.raises(
        CompressionError,
        match=(
            r"quantization-aware training diverged at step 0 of 5: loss nan; lower qat_rate=0\.001 or"
            r" qat_step_rate=0\.0003"
        ),
    ):
        compress(task, Recipe(wb.Quantize(weight_bits=4), wb.QAT(qat_steps=5)))


# --- a real model


def test_it_recovers_most_of_what_two_bits_lose(fashion_cnn, tmp_path):
    """The aim of the project is half; paired intervals at 95% on 1,000 images must not touch it."""
    task = dataclasses.replace(fashion_cnn, evaluation=fashion_cnn.evaluation[:1000])
    bench = Bench(task, ledger=tmp_path / "points", progress=False)
    rounded = bench.measure(Recipe(wb.Quantize(weight_bits=2))).primary.drop
    trained = bench.measure(Recipe(wb.Quantize(weight_bits=2), wb.QAT(qat_steps=40))).primary.drop
    assert rounded.low > 0.2
    assert trained.high < rounded.low / 2
