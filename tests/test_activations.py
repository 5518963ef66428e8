"""Rounded inputs: against torch's own quantization, against loops in float64, and with every other step
around them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_tasks import CALIBRATION, tiny_task
from torch import nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  defines torch.ops.quantized_decomposed

import workbench as wb
from workbench.bench import Bench
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.compress.quantization.activations import divisors
from workbench.compress.quantization.observers import input_ranges
from workbench.errors import CompressionError, RecipeError
from workbench.export import load
from workbench.measure.weight_histograms import weight_changes
from workbench.modules.input_quantizer import InputFormat, QuantizesInputs, acting_weight, quantized_like
from workbench.modules.layer import find_layers
from workbench.recipe import Recipe
from workbench.util.progress import no_progress

DECOMPOSED = torch.ops.quantized_decomposed
STATIC = {"activation_scaling": "static", "activation_granularity": "tensor"}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 0.5


def logits(task, model) -> torch.Tensor:
    with torch.no_grad():
        return task.kind.logits(model, task.evaluation.to(next(model.parameters()).device))


def rounding_modules(model: nn.Module) -> dict[str, QuantizesInputs]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizesInputs)}


def by_hand(values, *, bits: int, symmetric: bool) -> list[float]:
    """Return rounded numbers that share a scale, one by one in Python floats (float64)."""
    low, high = min(0.0, *values), max(0.0, *values)
    most = 2 ** (bits - 1) - 1
    least = -most if symmetric else -most - 1
    scale = max(-low, high) / most if symmetric else (high - low) / (most - least)
    if scale == 0:
        return [0.0 for _ in values]
    zero = 0 if symmetric else min(max(round(least - low / scale), least), most)
    return [(min(max(round(value / scale) + zero, least), most) - zero) * scale for value in values]


# --- the rounding


def test_a_scale_per_token_is_torchs_own(device):
    layer = quantized_like(nn.Linear(24, 8), InputFormat())
    inputs = noise(2, 5, 24)
    scale, zero = DECOMPOSED.choose_qparams_per_token(inputs, torch.int8)
    codes = DECOMPOSED.quantize_per_token(inputs, scale, zero, -127, 127, torch.int8)
    expected = DECOMPOSED.dequantize_per_token(codes, scale, zero, -127, 127, torch.int8, torch.float32)
    assert torch.allclose(layer.to(device).prepared(inputs.to(device)).cpu(), expected, rtol=1e-6, atol=0)


def test_a_scale_and_zero_point_per_token_are_torchs_own():
    layer = quantized_like(nn.Linear(24, 8), InputFormat(symmetric=False))
    inputs = noise(2, 5, 24)
    scale, zero = DECOMPOSED.choose_qparams_per_token_asymmetric(inputs, torch.int8)
    codes = DECOMPOSED.quantize_per_token(inputs, scale, zero, -128, 127, torch.int8)
    expected = DECOMPOSED.dequantize_per_token(codes, scale, zero, -128, 127, torch.int8, torch.float32)
    assert torch.allclose(layer.prepared(inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("bits", "symmetric", "per_token"), list(itertools.product((4, 5, 8), (True, False), (True, False)))
)
def test_rounding_is_what_a_loop_in_float64_makes(bits, symmetric, per_token):
    inputs = noise(6, 16)
    rounded = quantized_like(
        nn.Linear(16, 4), InputFormat(bits, per_token=per_token, symmetric=symmetric)
    ).prepared(inputs)
    shares = inputs.tolist() if per_token else [inputs.flatten().tolist()]
    expected = torch.tensor([by_hand(row, bits=bits, symmetric=symmetric) for row in shares]).view(6, 16)
    assert torch.allclose(rounded, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per_token", [True, False])
def test_an_image_of_a_convolution_is_a_token(per_token):
    inputs = noise(3, 2, 4, 4) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1, 1)
    rounded = quantized_like(nn.Conv2d(2, 4, 3), InputFormat(per_token=per_token)).prepared(inputs)
    shares = inputs.flatten(1).tolist() if per_token else [inputs.flatten().tolist()]
    expected = torch.tensor([by_hand(row, bits=8, symmetric=True) for row in shares]).view_as(inputs)
    assert torch.allclose(rounded, expected, rtol=1e-5, atol=1e-7)


def test_float8_takes_the_nearest_number_that_there_is():
    """e4m3 by its definition (Micikevicius et al. 2022): 4 bits of exponent with bias 7, 3 of mantissa, all
    ones is no number."""
    positive = [m / 8 * 2**-6 for m in range(8)] + [
        (1 + m / 8) * 2 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
    ]
    numbers = torch.tensor(sorted({*positive, *(-x for x in positive)}), dtype=torch.float64)
    assert float(numbers.max()) == 448
    inputs = noise(5, 64)
    rounded = quantized_like(nn.Linear(64, 4), InputFormat(number_format="float8")).prepared(inputs)
    scale = inputs.abs().amax(1, keepdim=True).double() / 448
    nearest = ((inputs.double() / scale).unsqueeze(-1) - numbers).abs().amin(-1) * scale
    assert torch.allclose((rounded.double() - inputs.double()).abs(), nearest, rtol=1e-4, atol=1e-6)


def test_products_are_those_of_integers_with_a_wide_accumulator(device):
    """W8A8: codes of both sides multiplied as int64, then scaled in float64."""
    task = tiny_task("vit", device)
    compressed = compress(
        task, Recipe(wb.Activations(activation_bits=8), wb.Quantize(weight_bits=8, grid="symmetric"))
    )
    layer = next(layer for layer in compressed.layers if layer.name.endswith("fc1"))
    inputs = noise(7, 16).to(device)
    scale, _ = DECOMPOSED.choose_qparams_per_token(inputs.cpu(), torch.int8)
    codes = (inputs.cpu() / scale).round().long()
    grid = layer.grid
    sums = codes @ (grid.codes.cpu().long() - 128).t()
    expected = (
        sums.double() * scale.double() * grid.scale.cpu().double().t() + layer.module.bias.cpu().double()
    )
    assert torch.allclose(layer.module(inputs).detach().cpu().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rounding",
    [
        InputFormat(),
        InputFormat(symmetric=False),
        InputFormat(number_format="float8"),
        InputFormat(per_token=False),
    ],
    ids=InputFormat.words,
)
def test_zeros_empty_batches_and_tiny_inputs_stay_finite(rounding):
    layer = quantized_like(nn.Linear(8, 4), rounding)
    for inputs in (torch.zeros(3, 8), torch.zeros(0, 8), torch.full((2, 8), 1e-42), torch.full((2, 8), 1e38)):
        rounded = layer.prepared(inputs)
        assert rounded.shape == inputs.shape
        assert torch.isfinite(rounded).all()
    assert (layer.prepared(torch.zeros(3, 8)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_inputs_keep_their_dtype(dtype):
    layer = quantized_like(nn.Linear(8, 4).to(dtype), InputFormat())
    assert layer(noise(3, 8).to(dtype)).dtype == dtype


def test_gradients_pass_as_if_nothing_had_been_rounded():
    layer, inputs = (
        quantized_like(nn.Linear(8, 1, bias=False), InputFormat(bits=4)),
        noise(3, 8).requires_grad_(),
    )
    layer(inputs).sum().backward()
    assert torch.equal(inputs.grad, layer.weight.detach().expand(3, 8))
    assert torch.allclose(layer.weight.grad[0], layer.prepared(inputs).detach().sum(0))


# --- calibration


def test_ranges_are_the_extremes_of_all_calibration_items(task):
    ranges = input_ranges(task, task.model, no_progress)
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        layer.module.register_forward_pre_hook(
            lambda module, inputs, name=name: seen.setdefault(name, []).append(inputs[0].detach().clone())
        )
        for name, layer in find_layers(task.model)[0].items()
        if not layer.table
    ]
    with torch.no_grad():
        task.kind.logits(task.model, task.calibration.to(next(task.model.parameters()).device))
    for hook in hooks:
        hook.remove()
    assert set(seen) == set(ranges.low) == set(ranges.high)
    for name, batches in seen.items():
        rows = torch.cat(
            [(part.movedim(1, -1) if part.ndim == 4 else part).flatten(0, -2) for part in batches]
        )
        assert torch.allclose(ranges.low[name], rows.amin(0), atol=1e-5)
        assert torch.allclose(ranges.high[name], rows.amax(0), atol=1e-5)


def test_static_scales_cover_what_calibration_reached_and_clamp_what_lies_beyond():
    task = tiny_task("vit")
    ranges = input_ranges(task, task.model, no_progress)
    compressed = compress(
        task, Recipe(wb.Activations(activation_bits=8, activation_grid="asymmetric", **STATIC))
    )
    for name, module in rounding_modules(compressed.model).items():
        low, high = min(0.0, float(ranges.low[name].min())), max(0.0, float(ranges.high[name].max()))
        assert float(module.input_scale) == pytest.approx((high - low) / 255, rel=1e-6)
        assert int(module.input_zero) == round(-128 - low / float(module.input_scale))
        step = float(module.input_scale)
        ends = (
            module.prepared(torch.full((1, len(ranges.low[name])), 1e6)),
            module.prepared(torch.full((1, len(ranges.low[name])), -1e6)),
        )
        assert float(ends[0].max()) == pytest.approx(high, abs=step)
        assert float(ends[1].min()) == pytest.approx(low, abs=step)


def test_the_dense_model_is_calibrated_once_and_a_changed_one_each_time():
    task, passes = tiny_task("vit"), []
    statistics = Statistics(task)

    def progress(what: str, done: int, total: int) -> None:
        passes.append(done == 0 and what == "calibration")

    recipe = Recipe(wb.Activations(activation_bits=8, **STATIC))
    for _ in range(2):
        compress(task, recipe, statistics, progress)
    assert sum(passes) == 1
    compress(task, Recipe(wb.Prune(sparsity=0.9), *recipe), statistics, progress)
    assert sum(passes) == 2


def test_a_changed_model_gets_its_own_ranges():
    task = tiny_task("vit")
    recipe = Recipe(wb.Prune(sparsity=0.9), wb.Activations(activation_bits=8, **STATIC))
    own = input_ranges(task, compress(task, Recipe(wb.Prune(sparsity=0.9))).model, no_progress)
    for name, module in rounding_modules(compress(task, recipe).model).items():
        most = max(-float(own.low[name].min()), float(own.high[name].max()))
        assert float(module.input_scale) == pytest.approx(most / 127, rel=1e-5)


def test_dynamic_rounding_needs_no_calibration_pass():
    task, items = tiny_task("vit"), []
    hook = task.model.register_forward_pre_hook(
        lambda module, inputs, named: items.append(len(named["pixel_values"])), with_kwargs=True
    )
    compress(task, Recipe(wb.Activations(activation_bits=8)), Statistics(task))
    hook.remove()
    assert items == [1]  # one item, to see which layers are called
    assert CALIBRATION > 1


# --- smoothing


def test_divisors_are_the_papers():
    """s_j = max|X_j|^a / max|W_j|^(1 - a) (Xiao et al. 2023, equation 4).

    1 for a channel without inputs or weights.
    """
    inputs, largest = torch.tensor([[4.0, 0.0, 9.0]]), torch.tensor([[1.0, 2.0, 0.0]])
    assert divisors(inputs, largest, 0.5).tolist() == [[2.0, 1.0, 1.0]]
    assert float(divisors(torch.tensor([[16.0]]), torch.tensor([[4.0]]), 0.75)) == pytest.approx(
        16**0.75 / 4**0.25
    )


@pytest.mark.parametrize("smoothing", [0.3, 0.5, 1.0])
def test_smoothing_alone_changes_nothing(task, smoothing):
    ranges = input_ranges(task, task.model, no_progress)
    compressed = compress(task, Recipe(wb.Activations(activation_bits=8, smoothing=smoothing)))
    for name, module in rounding_modules(compressed.model).items():
        dense = task.model.get_submodule(name)
        matrix = find_layers(task.model)[0][name].matrix()
        largest = matrix.abs().amax(0).unflatten(0, (len(ranges.low[name]), -1)).amax(1)
        most = torch.maximum(ranges.low[name].abs(), ranges.high[name].abs())
        expected = torch.where(
            most > 0, most**smoothing / largest ** (1 - smoothing), torch.ones_like(most)
        )  # a channel may be dead
        assert torch.allclose(module.smooth, expected, rtol=1e-5)
        assert torch.allclose(acting_weight(module), dense.weight, rtol=1e-5)
        assert not torch.equal(module.weight, dense.weight)
    for row in compressed.report:
        assert row.relative_error is None or row.relative_error < 1e-6
    for change in weight_changes(task.model, compressed):
        assert change.after == pytest.approx(change.before, abs=2)


def test_smoothing_saves_a_layer_with_an_outlier():
    """A channel a hundred times larger than the others takes the whole range of a tensor.

    Moved into the weights it does not.
    """
    task = tiny_task("vit")
    norm = task.model.vit.layers[0].layernorm_after
    fc1 = task.model.vit.layers[0].mlp.fc1
    with torch.no_grad():
        norm.weight[3] *= 100
        norm.bias[3] *= 100
        fc1.weight[:, 3] /= 100
    dense, errors = logits(task, task.model), []
    for smoothing in (0.0, 0.5):
        step = wb.Activations(
            activation_bits=8,
            activation_granularity="tensor",
            smoothing=smoothing,
            targets=("vit.layers.0.mlp.fc1",),
        )
        errors.append(float((logits(task, compress(task, Recipe(step)).model) - dense).norm()))
    assert errors[1] < 0.3 * errors[0]


def test_wanda_sees_the_same_importance_after_smoothing(task):
    """|w s| * ||x / s|| is |w| * ||x||."""
    smooth = wb.Activations(activation_bits=8, smoothing=0.5)
    prune = wb.Prune(pattern="2:4", criterion="wanda")
    plain, after = compress(task, Recipe(prune)), compress(task, Recipe(smooth, prune))
    agree = [
        float((a.mask == b.mask).float().mean())
        for a, b in zip(plain.layers, after.layers, strict=True)
        if a.mask is not None and b.mask is not None
    ]
    assert agree
    assert min(agree) > 0.99


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"activation_bits": 3},
            r"Activations\(activation_bits=3\) is refused: input should be greater than or equal to 4",
        ),
        ({"activation_bits": 16}, r"activation_bits=16"),
        ({"smoothing": 1.5}, r"Activations\(smoothing=1\.5\) is refused"),
        ({"smoothing": math.nan}, r"Activations\(smoothing=nan\) is refused"),
        (
            {"activation_bits": 6, "activation_format": "float8"},
            r"activation_bits=6 contradicts it: take activation_bits=8, or activation_format='integer'",
        ),
        (
            {"activation_format": "float8", "activation_grid": "asymmetric"},
            r"no zero point: take activation_grid='symmetric'",
        ),
        (
            {"activation_scaling": "static"},
            (
                r"activation_scaling='static' has one range a layer, tokens to come are not known: take"
                r" activation_granularity='tensor'"
            ),
        ),
    ],
)
def test_choices_that_contradict_are_refused_with_what_would_work(options, message):
    with pytest.raises(RecipeError, match=message):
        wb.Activations(**options)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            (wb.Quantize(weight_bits=4), wb.Activations(smoothing=0.5)),
            r"Activations\(smoothing=0\.5\) cannot follow Quantize: it multiplies weights that are settled",
        ),
        ((wb.Prune(sparsity=0.5), wb.Repair(), wb.Activations(smoothing=0.5)), r"cannot follow Repair"),
        ((wb.Activations(), wb.LowRank(rank_ratio=0.3)), r"LowRank cannot follow Activations"),
        (
            (wb.Activations(), wb.Prune(sparsity=0.5, pattern="neurons")),
            r"Prune\(pattern='neurons'\) cannot follow Activations",
        ),
    ],
)
def test_orders_that_cannot_work_are_refused(steps, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(*steps)


def test_two_of_them_may_not_share_a_layer():
    with pytest.raises(RecipeError, match="already taken by an earlier activations step"):
        compress(tiny_task("vit"), Recipe(wb.Activations(), wb.Activations(activation_bits=4)))


def test_a_layer_without_inputs_during_calibration_is_named():
    """It is called for the first item, as in a mixture of experts, but a static range needs the ranges of the
    model as it is."""
    task = tiny_task("vit")
    statistics = Statistics(task)
    ranges = statistics.once("input ranges", lambda: input_ranges(task, task.model, no_progress))
    del ranges.low["vit.layers.1.mlp.fc2"]
    compressed = compress(task, Recipe(wb.Activations(**STATIC)), statistics)
    rows = {row.name: row.outcome for row in compressed.report}
    assert rows["vit.layers.1.mlp.fc2"] == (
        "activations skipped: it receives no input during calibration: take activation_scaling='dynamic' and"
        " smoothing=0"
    )
    assert rows["vit.layers.1.mlp.fc1"].startswith("A8 static")
    with pytest.raises(CompressionError, match="fits no layer.*receives no input during calibration"):
        compress(task, Recipe(wb.Activations(**STATIC, targets=("vit.layers.1.mlp.fc2",))), statistics)


@pytest.mark.parametrize("options", [STATIC, {"smoothing": 0.5}], ids=["static", "smooth"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_layers_with_infinite_inputs_are_named(options, bad):
    task = tiny_task("vit")
    with torch.no_grad():
        task.model.vit.layers[1].layernorm_before.bias[2] = bad
    with pytest.raises(
        CompressionError,
        match=r"layer 'vit\.layers\.1\.attention\.q_proj' receives infinite or NaN inputs during calibration",
    ):
        compress(task, Recipe(wb.Activations(**options)))


def test_smoothing_that_overflows_the_models_numbers_is_refused():
    task = tiny_task("vit", dtype=torch.float16)
    with torch.no_grad():
        task.model.vit.layers[0].mlp.fc1.weight.mul_(
            6e4 / task.model.vit.layers[0].mlp.fc1.weight.abs().max()
        )
    with pytest.raises(CompressionError, match=r"infinite or NaN"):
        compress(task, Recipe(wb.Activations(smoothing=1.0), wb.Distill(temperature=2, steps=1)))


def test_a_damaged_description_is_refused(tmp_path):
    import json

    from workbench.errors import ExportError

    bench = Bench(tiny_task("vit"), ledger=tmp_path / "points", progress=False)
    bench.export(Recipe(wb.Activations(**STATIC)), tmp_path / "out")
    path = tmp_path / "out" / "compression.json"
    manifest = json.loads(path.read_text())
    manifest["activations"]["vit.layers.0.mlp.fc1"] = {"bits": 8, "colour": "red"}
    path.write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=r"is damaged"):
        load(tmp_path / "out")


# --- real models


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(wb.Activations(activation_bits=8), wb.Quantize(weight_bits=8)),
        Recipe(wb.Activations(activation_bits=8, smoothing=0.5, **STATIC), wb.Quantize(weight_bits=8)),
        Recipe(wb.Activations(activation_bits=8, activation_format="float8")),
    ],
    ids=lambda recipe: recipe.label(),
)
def test_w8a8_keeps_the_accuracy_of_a_real_model(fashion_cnn, tmp_path, recipe):
    point = Bench(fashion_cnn, ledger=tmp_path / "points", progress=False).measure(recipe)
    assert point.primary.drop.high < 0.012  # 95%: not more than 1.2 points of accuracy lost, on 2,000 images
    assert point.flips.value < 0.02
