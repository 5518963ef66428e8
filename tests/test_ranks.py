"""Ranks shared out: the budget, the floor of half the uniform rank, and that it is worth doing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import recorded_inputs
from test_lowrank import dense_matrix
from test_statistics import custom_task
from tiny_tasks import tiny_task
from torch import nn

import workbench as wb
from workbench.compress import compress
from workbench.compress.low_rank.rank_allocation import Candidate, allocate, slopes
from workbench.compress.outlines import after
from workbench.errors import RecipeError
from workbench.measure.size import sizes
from workbench.modules.factored import Form, Shape, cost, most_rank
from workbench.recipe import Recipe
from workbench.shapes.outline import Outline


def used(rows, dense) -> int:
    return sum(row.weights for row in rows if row.name in dense)


@pytest.mark.parametrize("factorization", ["svd", "whitened"])
@pytest.mark.parametrize("share", ["energy", "loss"])
@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.45])
def test_the_budget_is_that_of_uniform_ranks_and_no_layer_falls_below_half(sort, factorization, share, ratio):
    task = tiny_task(sort)
    uniform = compress(task, Recipe(wb.LowRank(rank_ratio=ratio, factorization=factorization)))
    compressed = compress(
        task, Recipe(wb.LowRank(rank_ratio=ratio, factorization=factorization, rank_allocation=share))
    )
    taken = {
        row.name: row
        for row in uniform.report
        if "stays dense" not in row.outcome and row.relative_error is not None
    }
    step = max(sum(row.shape) for row in taken.values())
    assert used(uniform.report, taken) - step < used(compressed.report, taken) <= used(uniform.report, taken)
    for row in compressed.report:
        if row.name not in taken:
            assert row.relative_error in {0.0, None}
            continue
        least = -(-max(1, round(ratio * min(row.shape))) // 2)
        assert row.rank is None or row.rank >= least
        assert (row.rank is not None) == (f"share by {share}" in row.outcome)
        if row.rank is None:
            assert row.outcome.startswith(f"lowrank skipped: whole, it is worth its weights by {share}")
            assert row.weights == row.shape[0] * row.shape[1]
    assert len({row.rank for row in compressed.report if row.name in taken}) > 1
    outline = after(Outline.of(task.model), compressed.recipe)
    assert not outline.exact()
    assert outline.file_bytes() >= sizes(compressed.model, compressed.layers).file_bytes


def test_by_energy_more_of_the_outputs_is_kept_than_with_uniform_ranks():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.Linear(40, 28))
    with torch.no_grad():  # the last needs few directions, the first all of them
        body[2].weight.copy_(torch.randn(28, 2) @ torch.randn(2, 40))
    task = custom_task(body, 28)
    inputs = recorded_inputs(task)

    def kept(share: str) -> float:
        compressed = compress(task, Recipe(wb.LowRank(rank_ratio=0.3, rank_allocation=share)))
        lost = 0.0
        for name in ("body.1", "body.2"):
            dense, now = (
                dense_matrix(task.model.get_submodule(name)),
                compressed.model.get_submodule(name).weight.detach().double(),
            )
            rows = inputs[name].double()
            lost += float((rows @ (now - dense).t()).square().sum() / (rows @ dense.t()).square().sum())
        return lost

    assert kept("energy") < 0.95 * kept("uniform")


def brute_force(candidates: list[Candidate], budget: int) -> float:
    """Return the most error that any choice of ranks within the budget takes away."""
    best = {0: 0.0}
    for layer in candidates:
        step, most = layer.step, layer.most
        choices = [
            (rank * step, float(GAINS[layer.name][:rank].sum())) for rank in range(layer.least, most + 1)
        ] + [(layer.shape.count, float(GAINS[layer.name].sum()) + REST[layer.name])]
        fresh: dict[int, float] = {}
        for spent, gained in best.items():
            for price, gain in choices:
                if spent + price <= budget:
                    fresh[spent + price] = max(fresh.get(spent + price, 0.0), gained + gain)
        best = fresh
    return max(best.values())


GAINS: dict[str, torch.Tensor] = {}
REST: dict[str, float] = {}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), ratio=st.floats(0.05, 1.0))
def test_greedy_comes_close_to_the_best_of_all_choices(seed, ratio):
    generator = torch.Generator().manual_seed(seed)
    candidates = []
    for index in range(3):
        rows, columns = (int(torch.randint(3, 12, (1,), generator=generator)) for _ in range(2))
        shape = Shape(rows, columns)
        most = most_rank(shape, "channel")
        gains = (
            torch.rand(min(rows, columns), generator=generator, dtype=torch.float64)
            .pow(3)
            .sort(descending=True)
            .values
        )
        name = f"layer {index}"
        GAINS[name], REST[name] = gains[:most], float(gains[most:].sum())
        candidates.append(
            Candidate(
                name,
                shape,
                "channel",
                max(1, round(ratio * min(rows, columns))),
                slopes(shape, "channel", gains[:most], float(gains.sum())),
            )
        )
    ranks = allocate(candidates)
    budget = sum(min(layer.rank * layer.step, layer.shape.count) for layer in candidates)
    spent = sum(
        (
            layer.shape.count
            if ranks[layer.name] is None
            else cost(layer.shape, Form("channel", (ranks[layer.name],)))
        )
        for layer in candidates
    )
    assert spent <= budget
    taken = sum(
        (
            float(GAINS[layer.name].sum()) + REST[layer.name]
            if ranks[layer.name] is None
            else float(GAINS[layer.name][: ranks[layer.name]].sum())
        )
        for layer in candidates
    )
    for layer in candidates:
        assert ranks[layer.name] is None or layer.least <= ranks[layer.name] <= layer.most
    largest = max(float(GAINS[layer.name].max()) if len(GAINS[layer.name]) else 0.0 for layer in candidates)
    assert taken >= brute_force(candidates, budget) - 3 * largest - 1e-9


def test_everything_whole_is_refused_as_ever():
    task = tiny_task("vit")
    with pytest.raises(wb.errors.CompressionError, match="fits no layer"):
        compress(task, Recipe(wb.LowRank(rank_ratio=1.0, rank_allocation="energy", targets=("*q_proj",))))


def test_two_ranks_cannot_be_shared_out():
    with pytest.raises(
        RecipeError,
        match="conv='tucker2' has two ranks a layer, which rank_allocation='energy' cannot share out",
    ):
        wb.LowRank(conv="tucker2", rank_allocation="energy")


def test_too_little_calibration_is_said():
    task = tiny_task("vit")
    task = type(task)(**{**vars(task), "calibration": task.calibration[:2]})
    compressed = compress(task, Recipe(wb.LowRank(rank_ratio=0.3)))
    assert any(
        warning.startswith("lowrank: calibration is too small for ") for warning in compressed.warnings
    )
    for row in compressed.report:
        assert row.relative_error is not None or "a parameter of" in row.outcome
