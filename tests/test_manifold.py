"""Distances on the sphere against their definitions in float64, their gradients where they could break, and
projections against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.compress.distillation.projection import Fit, angles, cosine, geodesic, layer_map, squared


def noise(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def angle_by_hand(first: list[float], second: list[float]) -> float:
    """Return arccos of the cosine, in Python floats."""
    size = math.sqrt(sum(x * x for x in first)) * math.sqrt(sum(x * x for x in second))
    return math.acos(max(-1.0, min(1.0, sum(x * y for x, y in zip(first, second, strict=True)) / size)))


def test_the_geodesic_is_the_mean_of_arc_cosines():
    first, second = noise(20, 7), noise(20, 7, seed=1)
    by_hand = [angle_by_hand(*pair) for pair in zip(first.tolist(), second.tolist(), strict=True)]
    assert angles(first, second).tolist() == pytest.approx(by_hand, rel=1e-12)
    assert float(geodesic(first, second)) == pytest.approx(sum(by_hand) / 20, rel=1e-12)


def test_it_is_twice_the_arc_sine_of_half_the_chord():
    first, second = (torch.nn.functional.normalize(noise(20, 7, seed=seed), dim=-1) for seed in (0, 1))
    chord = (first - second).norm(dim=-1)
    assert torch.allclose(angles(first, second), 2 * torch.asin(chord / 2), rtol=1e-12)


def test_only_directions_count():
    first, second = noise(20, 7), noise(20, 7, seed=1)
    assert torch.allclose(angles(3 * first, 0.01 * second), angles(first, second), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("place", "angle"),
    [
        ("the same", 0.0),
        ("nearly the same", 1e-4),
        ("opposite", math.pi),
        ("nearly opposite", math.pi - 1e-4),
        ("square", math.pi / 2),
    ],
)
def test_small_and_large_angles_are_exact_and_gradients_finite(dtype, place, angle):
    state = torch.tensor([[math.cos(angle), math.sin(angle), 0.0]], dtype=dtype).requires_grad_()
    aim = torch.tensor([[1.0, 0.0, 0.0]], dtype=dtype)
    distance = geodesic(state, aim)
    distance.backward()
    assert float(distance.detach()) == pytest.approx(angle, abs=1e-6, rel=1e-3)
    assert torch.isfinite(state.grad).all()
    size = float(state.grad.norm())
    assert (
        size == pytest.approx(0.0 if place == "the same" else 1.0, abs=2e-3) or place == "opposite"
    )  # the distance grows as fast as the point moves


def test_a_state_equal_to_its_aim_and_a_state_of_zeros_have_finite_gradients():
    for values in (noise(4, 3), torch.zeros(4, 3, dtype=torch.float64)):
        state = values.clone().requires_grad_()
        for distance in (geodesic, cosine, squared):
            state.grad = None
            distance(state, noise(4, 3)).backward()
            assert torch.isfinite(state.grad).all(), distance


def test_the_gradient_is_that_of_finite_differences():
    state, aim = noise(3, 4).requires_grad_(), noise(3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda x: geodesic(x, aim), state)
    assert torch.autograd.gradcheck(lambda x: cosine(x, aim), state)
    assert torch.autograd.gradcheck(lambda x: squared(x, aim), state)


def test_near_coincidence_the_cosine_is_half_the_squared_angle():
    aim = noise(50, 6)
    state = aim + 1e-3 * noise(50, 6, seed=1)
    assert float(cosine(state, aim)) == pytest.approx(float(angles(state, aim).square().mean()) / 2, rel=1e-4)


def test_the_squared_error_is_relative_to_answering_zero():
    aim = noise(8, 3)
    assert float(squared(torch.zeros_like(aim), aim)) == pytest.approx(1)
    assert float(squared(10 * aim, 10 * aim)) == 0
    assert float(squared(2 * aim, aim)) == pytest.approx(1)


@given(st.integers(1, 40), st.integers(1, 40))
def test_every_block_has_an_aim_in_order_and_the_last_meets_the_last(student, teacher):
    pairs = layer_map(student, teacher)
    aims = [aim for _, aim in pairs]
    assert [block for block, _ in pairs] == list(range(student))
    assert aims == sorted(aims)
    assert aims[0] >= 0
    assert aims[-1] == teacher - 1
    assert all(abs((aim + 1) - (block + 1) * teacher / student) <= 0.5 or aim == 0 for block, aim in pairs)


def test_the_map_of_a_published_size():
    assert layer_map(4, 6) == [(0, 1), (1, 2), (2, 4), (3, 5)]  # 1.5, 3, 4.5, 6: halves go up
    assert layer_map(2, 2) == [(0, 0), (1, 1)]


def test_the_projection_is_the_least_squares_solution():
    mine, theirs = noise(200, 5), noise(200, 8, seed=1)
    fit = Fit()
    for part in range(4):  # as batches come
        fit.add(mine[50 * part : 50 * part + 50].float(), theirs[50 * part : 50 * part + 50].float())
    wanted = np.linalg.lstsq(mine.float().double().numpy(), theirs.float().double().numpy(), rcond=None)[0]
    assert fit.solve().shape == (5, 8)
    assert np.allclose(fit.solve().numpy(), wanted, atol=1e-5)


def test_states_that_do_not_fill_their_space_still_have_a_projection():
    mine = noise(100, 2) @ noise(2, 6, seed=2)  # rank 2 of 6
    fit = Fit()
    fit.add(mine, mine @ noise(6, 4, seed=3))
    assert torch.isfinite(fit.solve()).all()
    assert torch.allclose(mine @ fit.solve().double(), mine @ noise(6, 4, seed=3), atol=1e-3)


def test_between_equal_widths_directions_that_were_never_seen_stay():
    mine = noise(3, 6)  # three states cannot say what to do in six dimensions
    fit = Fit()
    fit.add(mine, 2 * mine)
    projection = fit.solve().double()
    across = torch.linalg.svd(mine).Vh[3:]
    assert torch.allclose(mine @ projection, 2 * mine, atol=1e-4)
    assert torch.allclose(across @ projection, across, atol=1e-4)
