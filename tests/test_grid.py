"""Quantization grids against references written by others, or the slow way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.compress.quantization.scales import SHRINKS, fit_grids
from workbench.formats.affine import Grid

reference = torch.ops.quantized_decomposed
WIDTHS = range(2, 9)
GRIDS = ("symmetric", "asymmetric")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fit(
    matrix: torch.Tensor, bits: int, group: int, grid: str = "asymmetric", *, search: bool = True
) -> Grid:
    return fit_grids(matrix.unsqueeze(0), bits, group, symmetric=grid == "symmetric", search=search)[0]


def zero_points(grid: Grid) -> torch.Tensor:
    return (
        torch.full_like(grid.scale, 1 << (grid.bits - 1), dtype=torch.int64)
        if grid.zero_point is None
        else grid.zero_point.long()
    )


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("search", [True, False])
def test_per_row_grids_equal_torchs_per_channel_fake_quantization(bits, kind, search, device):
    matrix = gaussian(12, 40).to(device)
    grid = fit(matrix, bits, 40, kind, search=search)
    scale, zero = grid.scale.float().flatten(), zero_points(grid).flatten()
    codes = reference.quantize_per_channel(matrix, scale, zero, 0, 0, (1 << bits) - 1, torch.uint8)
    assert torch.equal(grid.codes, codes)
    assert torch.equal(
        grid.dequantize(),
        reference.dequantize_per_channel(codes, scale, zero, 0, 0, (1 << bits) - 1, torch.uint8),
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", GRIDS)
def test_grouped_grids_equal_torchs_per_group_fake_quantization(bits, kind, device):
    matrix = gaussian(6, 64).to(device)
    grid = fit(matrix, bits, 16, kind)
    scale, zero = grid.scale.float(), zero_points(grid).int()
    codes = reference.quantize_per_channel_group(matrix, scale, zero, 0, (1 << bits) - 1, torch.uint8, 16)
    assert torch.equal(grid.codes, codes)
    theirs = reference.dequantize_per_channel_group(
        codes, scale, zero, 0, (1 << bits) - 1, torch.uint8, 16, torch.float32
    )
    assert torch.equal(grid.dequantize(), theirs)


def candidates(group: np.ndarray, bits: int, kind: str) -> list[float]:
    """Return the squared error of every candidate range of one group, in plain Python: from 100% down to
    40%."""
    low, high, levels = min(float(group.min()), 0.0), max(float(group.max()), 0.0), 2**bits - 1
    errors = []
    for shrink in np.linspace(1.0, 0.4, SHRINKS):
        if kind == "symmetric":
            scale, zero = (
                max(-low * shrink / 2 ** (bits - 1), high * shrink / (2 ** (bits - 1) - 1)),
                2 ** (bits - 1),
            )
        else:
            scale = (high - low) * shrink / levels
            zero = None
        scale = float(np.float16(scale))
        zero = min(max(round(-low * shrink / scale), 0), levels) if zero is None else zero
        errors.append(
            sum(
                (float(w) - (min(max(round(float(w) / scale) + zero, 0), levels) - zero) * scale) ** 2
                for w in group
            )
        )
    return errors


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("kind", GRIDS)
def test_the_search_finds_the_best_of_its_candidates(bits, kind):
    matrix = gaussian(5, 24, seed=bits)
    error = (fit(matrix, bits, 8, kind).dequantize() - matrix).double().view(5, 3, 8).square().sum(2)
    for row in range(5):
        for group in range(3):
            errors = candidates(matrix[row, 8 * group : 8 * group + 8].numpy(), bits, kind)
            assert float(error[row, group]) == pytest.approx(min(errors), rel=1e-4)


@given(
    bits=st.sampled_from(WIDTHS),
    kind=st.sampled_from(GRIDS),
    group=st.sampled_from([1, 3, 12]),
    data=st.data(),
)
@settings(max_examples=150)
def test_any_matrix_keeps_the_rules(bits, kind, group, data):
    number = st.floats(-1e4, 1e4, width=32) | st.just(0.0) | st.floats(-(2.0**-20), 2.0**-20, width=32)
    matrix = torch.tensor(data.draw(st.lists(number, min_size=24, max_size=24))).view(2, 12)
    grid, full = fit(matrix, bits, group, kind), fit(matrix, bits, group, kind, search=False)
    values = grid.dequantize()
    assert torch.isfinite(values).all()
    assert int(grid.codes.max()) < 1 << bits
    assert bool((grid.scale > 0).all())
    assert (values[matrix == 0] == 0).all()  # a pruned weight stays exactly zero
    error, unsearched = (
        (v - matrix).double().view(2, -1, group).square().sum(2) for v in (values, full.dequantize())
    )
    # Of a scale: 40% of a range may be too small for float16 where all of it is not, and the rounded scale
    # may be the better one
    coarse = 0.0 if grid.scale.dtype == full.scale.dtype else 2.0**-11
    slack = coarse * matrix.abs().double().view(2, -1, group).amax(2) * group**0.5
    assert (
        error.sqrt() <= unsearched.sqrt() * (1 + 1e-5) + slack + 1e-15
    ).all()  # group by group, never worse than the full range
    again = grid.snap(values)
    assert torch.equal(again.dequantize(), values)  # what lies on the grid stays where it is


def test_a_search_may_need_float32_scales_where_the_full_range_does_not():
    matrix = torch.zeros(2, 12)
    matrix[0, 4], matrix[0, 5], matrix[1, 1] = (
        8119.0,
        8337.0,
        -0.00019,
    )  # float16 has the scale of the last one, and not 40% of it
    grid, full = (fit(matrix, 2, 3, "symmetric", search=search) for search in (True, False))
    assert (grid.scale.dtype, full.scale.dtype) == (torch.float32, torch.float16)
    error, unsearched = (
        float((stored.dequantize() - matrix).double().square().sum()) for stored in (grid, full)
    )
    assert unsearched < error < 1.01 * unsearched  # 8336 happens to be the better scale than 8337


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", GRIDS)
def test_no_weight_moves_by_more_than_half_a_step_without_search(bits, kind):
    matrix = gaussian(16, 64)
    grid = fit(matrix, bits, 64, kind, search=False)
    step = grid.scale.float().expand(16, 64)
    inside = grid.codes.gt(0) & grid.codes.lt((1 << bits) - 1)
    moved = (grid.dequantize() - matrix).abs()
    assert (moved <= step * 0.5001)[inside].all()
    assert (moved <= step * 1.01).all()  # the two ends: half a step more, from rounding the zero point


# Mean squared error on unit Gaussian weights, 128 to a group. No scalar quantizer of b bits can do better
# than 4^-b, the Gaussian's distortion at that rate. Issue 5 asks for .0090 at 4 bits and .0348 at 3 bits
# within 2%; seen here, over 2M weights: .00908 and .03486 asymmetric; .01026 and .03830 symmetric (one of its
# levels is lost on one side).
@pytest.mark.parametrize(("bits", "reported"), [(4, 0.0090), (3, 0.0348)])
def test_error_on_gaussian_weights_is_what_the_field_reports(bits, reported):
    matrix = gaussian(2048, 1024)
    error = {
        kind: float((fit(matrix, bits, 128, kind).dequantize() - matrix).double().square().mean())
        for kind in GRIDS
    }
    assert 4.0**-bits < min(error.values())
    assert min(error.values()) == pytest.approx(reported, rel=0.02)
    assert error["symmetric"] < reported * 1.15


@pytest.mark.parametrize(
    ("bits", "decibels"), [(2, 8.3), (3, 14.2), (4, 20.2), (5, 26.0), (6, 32.0), (7, 38.2), (8, 44.2)]
)
def test_signal_to_noise_stays_above_its_floor(bits, decibels):
    matrix = gaussian(512, 512)
    noise = (fit(matrix, bits, 128).dequantize() - matrix).double().square().mean()
    ratio = 10 * math.log10(float(matrix.double().square().mean() / noise))
    assert decibels <= ratio < 20 * math.log10(2) * bits  # 6.02 dB a bit is the rate-distortion bound


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", GRIDS)
def test_groups_of_zeros_and_of_one_value(bits, kind):
    zeros = fit(torch.zeros(3, 8), bits, 4, kind)
    assert torch.equal(zeros.dequantize(), torch.zeros(3, 8))
    assert (zeros.scale == 1).all()
    for value in (0.5, -0.5):  # one value and zero are both on the grid, up to the scale's half precision
        constant = fit(torch.full((2, 8), value), bits, 8, kind)
        assert torch.allclose(
            constant.dequantize(),
            torch.full((2, 8), value),
            rtol=2**-10 if kind == "asymmetric" or value < 0 else 0.02 if bits > 2 else 2**-10,
        )
    mixed = torch.cat([torch.zeros(1, 8), gaussian(1, 8)])
    assert torch.equal(fit(mixed, bits, 8, kind).dequantize()[0], torch.zeros(8))


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e-5, 1.0, 1e5, 1e15, 1e30])
@pytest.mark.parametrize("kind", GRIDS)
def test_tiny_and_huge_weights_keep_their_precision(size, kind):
    matrix = gaussian(4, 32)
    grid = fit(matrix * size, 4, 32, kind)
    error = [
        float(((values - m).double().norm() / m.double().norm()).nan_to_num(torch.inf))
        for values, m in (
            (fit(matrix, 4, 32, kind).dequantize(), matrix),
            (grid.dequantize(), matrix * size),
            (fit(matrix, 4, 32, kind, search=False).dequantize(), matrix),
        )
    ]
    if 1e-18 < size < 1e18:
        assert error[1] == pytest.approx(error[0], rel=0.02)
    assert error[1] <= error[2] * 1.01  # squares beyond float32 end the search early, at the full range
    if size != 1e-5:  # near the end of half precision either may serve
        assert grid.scale.dtype == (torch.float16 if 1e-4 < size < 1e5 else torch.float32) or size == 1e5


def test_one_row_of_tiny_weights_does_not_spoil_the_others():
    matrix = torch.stack([gaussian(32), gaussian(32) * 1e-9])
    values = fit(matrix, 4, 32).dequantize()
    for row in range(2):
        assert float((values[row] - matrix[row]).norm() / matrix[row].norm()) < 0.12


def test_a_symmetric_2_bit_grid_has_four_levels_around_zero():
    grid = fit(gaussian(8, 32), 2, 32, "symmetric")
    assert grid.zero_point is None
    multiples = grid.dequantize() / grid.scale.float()
    assert set(multiples.round().flatten().tolist()) <= {-2.0, -1.0, 0.0, 1.0}


def test_an_asymmetric_grid_spends_its_levels_where_the_weights_are():
    matrix = gaussian(8, 64).abs()
    lopsided = {
        kind: float((fit(matrix, 4, 64, kind).dequantize() - matrix).square().mean()) for kind in GRIDS
    }
    assert lopsided["asymmetric"] < lopsided["symmetric"] / 3


def test_snapping_moves_codes_and_never_scales():
    grid = fit(gaussian(4, 16), 3, 8)
    moved = grid.snap(gaussian(4, 16, seed=1))
    assert moved.scale is grid.scale
    assert moved.zero_point is grid.zero_point
    far = grid.snap(torch.full((4, 16), 1e6))
    assert (far.codes == 7).all()
    assert (moved.group_size, moved.bits) == (8, 3)
