"""Kernels that work on many weights at once: the bits of the plain operations.

Interpreted by Triton where there is no GPU.
"""

import math
import sys

import numpy as np
import pytest
import statistical
import tiny_tasks
import torch
from interpreted import INTERPRETED, outside, passed

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.compress.core.invariants import check_all, look_over
from workbench.compress.core.layer_report import changes
from workbench.compress.quantization.scales import Spec, fit, fit_in_place, form_of, ranges
from workbench.errors import BrokenPromiseError, CompressionError
from workbench.formats.affine import Grid
from workbench.kernels import magnitudes, weight_passes, weight_trials
from workbench.measure.evaluation.fused_blocks import fused_blocks
from workbench.measure.size import counted_sizes
from workbench.modules.layer import find_layers
from workbench.util.device import NEEDS_GPU

SHAPES = [(5, 7), (64, 64), (96, 128)]  # the last takes three programs a layer


@pytest.fixture
def untried():
    """Forget whether the kernels are right, before and after."""
    weight_trials.refused.cache_clear()
    yield
    weight_trials.refused.cache_clear()


@outside
def test_the_kernels_interpreted():
    assert passed(__file__) > 100


@pytest.fixture(params=[torch.float16, torch.float32, torch.bfloat16], ids=str)
def dtype(request, place):
    assert weight_trials.refused(place, request.param) == ""
    return request.param


def some_weights(shape, dtype, device, layers=3, seed=0):
    """Return weights with many ties, zeros of both signs, and both signs of everything."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(-30, 31, shape, generator=generator) / 64 * (-1) ** layer).to(device, dtype)
        for layer in range(layers)
    ]


def plainly_pruned(weight, removed):
    """Return (weights, mask) with the `removed` smallest magnitudes gone, of equal ones the last.

    By sorting.
    """
    order = sorted(range(weight.numel()), key=lambda place: (-abs(float(weight.flatten()[place])), place))
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[order[: weight.numel() - removed]] = True
    return weight.cpu() * mask.view(weight.shape), mask.view(weight.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.31, 0.9, 1.0])
def test_pruning_keeps_the_largest_and_of_equal_ones_the_first(shape, share, dtype, place):
    if dtype == torch.float32:
        pytest.skip("magnitudes of 32 bits are not counted")
    weights = some_weights(shape, dtype, place)
    removed = [round(share * weights[0].numel()), 3, 0]
    below = (
        torch.stack(
            [
                torch.bincount(magnitudes.keys(weight.flatten()).long(), minlength=magnitudes.VALUES)
                for weight in weights
            ]
        )
        .cumsum(1)
        .int()
    )
    pruned, masks = weight_passes.prune(weights, *magnitudes.thresholds(below, removed))
    for weight, count, sparse, mask in zip(weights, removed, pruned, masks, strict=True):
        expected, kept = plainly_pruned(weight, count)
        assert torch.equal(mask.cpu(), kept)
        assert torch.equal(
            sparse.cpu().view(torch.int16), expected.view(torch.int16)
        )  # also the signs of zeros


NORMS = {
    "ties": lambda wide: [0.0, 1.0, 2.5, 1e-30] * wide,
    "outliers": lambda wide: [1e4, *[math.exp(math.sin(i)) for i in range(1, wide)]] * 2,
    "hardly any": lambda wide: [1e-43 * i for i in range(2 * wide)],
}
ROWS = [
    ((5, 7), "ties"),
    ((33, 128), "ties"),
    ((4, 5000), "ties"),
    ((33, 128), "outliers"),
    ((3, 128), "hardly any"),
]


@pytest.mark.parametrize(("shape", "norms"), ROWS, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.31, 0.999, 1.0])
def test_pruning_rows_keeps_the_largest_products_of_each_and_of_equal_ones_the_first(
    shape, norms, share, dtype, place
):
    weights = some_weights(shape, dtype, place, layers=2)
    norms = torch.tensor(NORMS[norms](shape[1])[: 2 * shape[1]], device=place).view(2, shape[1])
    removed = [math.floor(share * weights[0].numel()), 2]
    pruned, masks = weight_passes.prune_rows(weights, norms, removed)
    for layer, (weight, count) in enumerate(zip(weights, removed, strict=True)):
        assert torch.equal(pruned[layer], weight * masks[layer])
        for row, values in enumerate((weight.float().abs() * norms[layer]).tolist()):
            gone = count // shape[0] + (row < count % shape[0])
            order = sorted(range(shape[1]), key=lambda place: (-values[place], place))
            assert sorted(order[: shape[1] - gone]) == masks[layer, row].nonzero().flatten().tolist()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_guess_is_where_a_share_of_a_normal_distribution_ends(share):
    """One that is off by 0.02 would be found out."""
    drawn = torch.from_numpy(np.random.default_rng(0).normal(size=100_000)).abs()
    under = drawn < weight_passes.guess(share) * drawn.mean()
    statistical.assert_rate(int(under.sum()), len(drawn), share, fault=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", [(96, 4), (96, 1), (1, 1)], ids=str)
def test_rounding_gives_the_bits_of_the_grid(bits, symmetric, groups, dtype, place):
    generator = torch.Generator().manual_seed(bits)
    weights = [torch.randn(96, 128, generator=generator).to(place, dtype) for _ in range(2)]
    scale = torch.rand(2, *groups, generator=generator).to(place) + 0.02
    zero = (
        None
        if symmetric
        else torch.randint(1 << bits, (2, *groups), dtype=torch.uint8, generator=generator).to(place)
    )
    rounded, codes = weight_passes.to_grid(weights, scale, zero, bits)
    for layer, weight in enumerate(weights):
        expected = Grid(torch.empty(0), scale[layer], None if zero is None else zero[layer], bits).snap(
            weight.float()
        )
        assert torch.equal(codes[layer], expected.codes)
        assert torch.equal(rounded[layer], expected.dequantize().to(dtype))


@pytest.mark.parametrize("size", [8, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("searched", [True, False])
def test_scales_in_place_are_those_of_a_stack(size, symmetric, searched, dtype, place):
    generator = torch.Generator().manual_seed(size)
    weights = [torch.randn(24, 128, generator=generator).to(place, dtype) for _ in range(3)]
    weights[1][3, :8] = 0  # a group without any range
    spec = Spec(3, size % 128, symmetric=symmetric, search=searched)
    ours, theirs = fit_in_place(weights, spec), fit(torch.stack(weights).float(), spec)
    assert ours.half == theirs.half
    stack = torch.stack(weights).float()
    errors = [
        (stack - form_of(stack, scales, spec).dequantize()).double().unflatten(2, (-1, size)).square().sum(3)
        for scales in (ours, theirs)
    ]
    assert torch.all(errors[0] <= errors[1] * (1 + 1e-5) + 1e-12)
    assert (ours.scale == theirs.scale).float().mean() > (0.99 if searched else 0.9999)


def test_a_survey_counts_what_became_of_weights(dtype, place):
    dense = some_weights((96, 128), dtype, place)
    masks = [
        torch.rand(96, 128, generator=torch.Generator().manual_seed(layer)).to(place) > 0.5
        for layer in range(3)
    ]
    now = [weight * mask for weight, mask in zip(dense, masks, strict=True)]
    surveyed = weight_passes.changes(weight_passes.survey(dense, now, masks, None))
    for change, before, after in zip(surveyed, dense, now, strict=True):
        assert change.wrong == 0
        assert change.zeros == int((after == 0).sum())
        assert change.squares == pytest.approx(float(before.double().square().sum()), rel=1e-5)
        assert change.errors == pytest.approx(
            float((after.double() - before.double()).square().sum()), rel=1e-5
        )


def test_a_survey_counts_broken_promises_and_lost_numbers(dtype, place):
    dense = some_weights((96, 128), dtype, place)
    mask = torch.ones(96, 128, dtype=torch.bool, device=place)
    mask[0, :5] = False
    now = [torch.ones_like(weight) for weight in dense]
    now[1][3, 3], now[1][95, 127], now[2][50, 1] = math.nan, math.inf, -math.inf
    assert [
        change.wrong for change in weight_passes.changes(weight_passes.survey(dense, now, [mask] * 3, None))
    ] == [5, 7, 6]
    grid = Grid(
        torch.full((96, 128), 3, dtype=torch.uint8, device=place),
        torch.ones(96, 4, device=place, dtype=torch.float16),
        torch.ones(96, 4, dtype=torch.uint8, device=place),
        4,
    )
    held = [torch.full_like(weight, 2.0) for weight in dense]
    held[0][1, 1] = 3.0
    assert [
        change.wrong for change in weight_passes.changes(weight_passes.survey(dense, held, None, [grid] * 3))
    ] == [1, 0, 0]


RECIPES = {
    "sparse": wb.Recipe(wb.Prune(sparsity=0.3)),
    "rows": wb.Recipe(wb.Quantize(weight_bits=4)),
    "groups": wb.Recipe(wb.Quantize(weight_bits=3, group_size=8, grid="symmetric", scale_search=False)),
    "both": wb.Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=5)),
    "tensor": wb.Recipe(wb.Quantize(weight_bits=8, granularity="tensor")),
    "rows by inputs": wb.Recipe(
        wb.Prune(sparsity=0.37, criterion="wanda"), wb.Quantize(weight_bits=4, rounding="gptq")
    ),
    "rank": wb.Recipe(wb.LowRank(rank_ratio=0.5), wb.Prune(sparsity=0.6, criterion="wanda")),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_gives_the_same_model_report_and_size_either_way(recipe, sort, dtype, place, monkeypatch):
    task = tiny_tasks.tiny_task(sort, str(place))
    task.model.to(dtype)
    fused = compress(task, recipe, Statistics(task))
    monkeypatch.setattr(weight_trials, "refused", lambda *_: "not now")
    plain = compress(task, recipe, Statistics(task))
    whole = any(not layer.pristine and layer.rank is None and not layer.transposed for layer in fused.layers)
    assert any(layer.change is not None for layer in fused.layers) is whole
    assert not any(layer.change is not None for layer in plain.layers)
    for (name, ours), theirs in zip(
        fused.model.state_dict().items(), plain.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)), name
    for ours, theirs in zip(fused.report, plain.report, strict=True):
        assert (ours.name, ours.outcome, ours.sparsity, ours.bits, ours.weights) == (
            theirs.name,
            theirs.outcome,
            theirs.sparsity,
            theirs.bits,
            theirs.weights,
        )
        assert (ours.relative_error is None) is (theirs.relative_error is None)
        assert ours.relative_error is None or ours.relative_error == pytest.approx(
            theirs.relative_error, rel=1e-5, abs=1e-7
        )
    assert counted_sizes(fused.model, fused.layers) == counted_sizes(plain.model, plain.layers)


def test_ranges_of_whole_tensors_are_found_once_for_all_widths_where_kernels_round(place, monkeypatch):
    task, calls = tiny_tasks.tiny_task("llama", str(place)), []
    kept, recipes = (
        Statistics(task),
        [wb.Recipe(wb.Quantize(weight_bits=bits, granularity="tensor")) for bits in (8, 4, 3)],
    )
    expected = [compress(task, recipe, Statistics(task)).model for recipe in recipes]
    monkeypatch.setattr(
        sys.modules["workbench.compress.quantization.quantize"],
        "ranges",
        lambda *given: (calls.append(1), ranges(*given))[1],
    )
    counts = []
    for recipe, model in zip(recipes, expected, strict=True):
        compressed = compress(task, recipe, kept)
        counts.append(len(calls))
        assert any(
            layer.change is not None for layer in compressed.layers if layer.grid is not None
        )  # kernels did it
        assert all(
            torch.equal(ours, theirs)
            for ours, theirs in zip(compressed.model.parameters(), model.parameters(), strict=True)
        )
    assert 0 < counts[0] == counts[1] == counts[2]


def test_what_was_looked_over_is_looked_over_again_once_it_changes(place):
    task = tiny_tasks.tiny_task("llama", str(place))
    compressed = compress(task, wb.Recipe(wb.Prune(sparsity=0.5)), Statistics(task))
    dense = find_layers(task.model)[0]
    layer = next(layer for layer in compressed.layers if layer.change is not None)
    before = layer.change
    layer.write(layer.matrix() / 2)
    assert layer.change is None
    look_over([layer], dense)
    assert layer.change is not None
    assert layer.change.errors > before.errors
    layer.mask = layer.mask.clone()
    assert layer.change is None


def test_a_broken_promise_names_its_layer(place):
    task = tiny_tasks.tiny_task("llama", str(place))
    dense = find_layers(task.model)[0]
    compressed = compress(task, wb.Recipe(wb.Prune(sparsity=0.5)), Statistics(task))
    layer = next(layer for layer in compressed.layers if layer.mask is not None)
    layer.write(layer.matrix() + 1)
    with pytest.raises(BrokenPromiseError, match=layer.name):
        check_all(compressed.layers, dense)
    assert layer.change is not None
    layer.put(torch.nn.Parameter(torch.full_like(layer.parameter, math.nan), requires_grad=False))
    with pytest.raises(CompressionError, match=rf"{layer.name}.*infinite or NaN"):
        check_all(compressed.layers, dense)


def test_an_all_zero_weight_has_no_relative_error(place):
    task = tiny_tasks.tiny_task("llama", str(place))
    layer = next(iter(find_layers(task.model)[0].values()))
    torch.nn.init.zeros_(layer.module.weight)
    error, zeros = changes({layer.name: layer}, {layer.name: [layer]})[layer.name]
    assert math.isnan(error)
    assert zeros == layer.parameter.numel()


def test_weights_that_the_kernels_cannot_read_are_left_to_plain_operations(place):
    weight = torch.ones(16, 16, device=place)
    assert weight_trials.suited([weight])
    assert not weight_trials.suited([weight.t()[:, :8]])  # not in line
    assert not weight_trials.suited([torch.ones(17, device=place)[1:]])  # an odd address
    assert not weight_trials.suited([weight.double()])
    assert "float64" in weight_trials.refused(place, torch.float64)


@pytest.mark.usefixtures("untried")
def test_a_kernel_that_gives_other_bits_is_not_used(place, monkeypatch):
    right = weight_passes.to_grid

    def wrong(*given):
        rounded, codes = right(*given)
        return rounded, codes.flip(1)

    monkeypatch.setattr(weight_passes, "to_grid", wrong)
    assert "rounding torch.float16 weights gives other bits" in weight_trials.refused(place, torch.float16)
    monkeypatch.setattr(weight_passes, "to_grid", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in weight_trials.refused(place, torch.float32)


@pytest.mark.usefixtures("untried")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes the place of a GPU")
def test_without_a_gpu_the_plain_operations_are_used():
    assert weight_trials.refused(torch.device("cpu"), torch.float32) == NEEDS_GPU
    assert not weight_trials.suited([torch.ones(16)])


@pytest.mark.usefixtures("untried")
def test_the_kernels_can_be_turned_off(place, monkeypatch):
    monkeypatch.setenv("WORKBENCH_TRITON", "off")
    assert weight_trials.refused(place, torch.float32) == "WORKBENCH_TRITON is off"
    assert fused_blocks(torch.device("cuda", 0)) is None
