"""Weights that already lie on a grid are found, whatever its width and offset, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from tiny_tasks import tiny_task

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.compress.quantization.prior_grid import FIRST, known_grids, notes, spaced
from workbench.compress.quantization.scales import Spec, fit, form_of
from workbench.recipe import Recipe


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 128), (4, 32), (4, 64), (4, 0), (5, 64), (8, 0)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grids_are_found_with_their_width_and_group(bits, group, symmetric, dtype):
    stack = gaussian(2, 64, 256)
    spec = Spec(bits, group, symmetric=symmetric, search=False)
    values = form_of(stack, fit(stack, spec), spec).dequantize().to(dtype)
    if bits == 8 and dtype == torch.float16:
        pytest.skip("a step of 8 bits is as fine as half precision near the ends: either answer is right")
    assert known_grids([values]) == [(bits, group)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grid_with_an_offset_that_is_no_multiple_of_its_step_is_found(dtype):
    codes = torch.randint(
        16, (1, 64, 256), generator=torch.Generator().manual_seed(0)
    )  # as Q4_1 of GGUF: d * q + m for every 32 weights
    step, least = gaussian(1, 64, 8, seed=1).abs() + 0.01, gaussian(1, 64, 8, seed=2)
    values = (codes.unflatten(2, (8, 32)) * step.unsqueeze(-1) + least.unsqueeze(-1)).flatten(2).to(dtype)
    assert known_grids([values]) == [(4, 32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ordinary_weights_lie_on_no_grid(dtype):
    assert known_grids([gaussian(3, 64, 256).to(dtype)]) == [None] * 3
    assert (
        known_grids([torch.rand(2, 8, 24, generator=torch.Generator().manual_seed(0)).to(dtype)])
        == [None] * 2
    )
    assert known_grids([torch.zeros(1, 8, 64, dtype=dtype)]) == [None]
    assert known_grids([gaussian(1, 8, 16).to(dtype)]) == [None]  # too few inputs to tell


def test_the_user_is_told_once_and_only_where_it_is_so():
    task = tiny_task("resnet")
    assert notes(Statistics(task)) == ()
    plain = compress(task, Recipe(wb.Quantize(weight_bits=4)))
    assert plain.warnings == ()
    statistics = Statistics(tiny_task("resnet", model=plain.model))
    again = compress(statistics.task, Recipe(wb.Quantize(weight_bits=4)), statistics)
    (told,) = again.warnings
    assert told.startswith("quantize: the weights of ")
    assert "already lie on a 4-bit grid (one scale a row): what 4 bits or more cost at that" in told
    named = compress(
        statistics.task,
        Recipe(
            wb.Quantize(weight_bits=4, targets=("re:layer",)),
            wb.Quantize(weight_bits=3, targets=("!re:layer",)),
        ),
        statistics,
    )
    assert named.warnings == (told,)


@pytest.mark.parametrize("name", ["fashion_cnn"])
def test_trained_models_that_were_not_quantized_are_not_accused(name, request):
    assert notes(Statistics(request.getfixturevalue(name))) == ()


def test_layers_looked_at_together_are_judged_one_by_one():
    spec = Spec(4, 64, search=False)
    wide, narrow = gaussian(2, 16, 256), gaussian(1, 24, 128, seed=1)
    stacks = [
        form_of(wide, fit(wide, spec), spec).dequantize(),
        gaussian(1, 16, 256, seed=2),
        form_of(narrow, fit(narrow, spec), spec).dequantize().half(),
        gaussian(2, 8, 16),
    ]
    assert (
        known_grids(stacks)
        == [grid for stack in stacks for grid in known_grids([stack])]
        == [(4, 64), (4, 64), None, (4, 64), None, None]
    )


def test_the_weights_that_are_tried_first_do_not_decide_alone():
    weight = torch.rand(1, 64, 128, generator=torch.Generator().manual_seed(0))
    first = spaced(128, FIRST, weight.device)  # both ends of a row are among them
    weight[:, :, first] = (
        torch.randint(0, 16, (1, 64, FIRST), generator=torch.Generator().manual_seed(1)) / 15
    )
    weight[:, :, first[0]], weight[:, :, first[-1]] = 0.0, 1.0
    assert known_grids([weight]) == [None]
    assert known_grids([(weight * 15).round() / 15]) == [(4, 0)]
