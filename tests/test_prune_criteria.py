"""Criteria of pruning against references written plainly: SparseGPT column by column in float64, gradients by
autograd."""

from __future__ import annotations

import dataclasses
import math

import pytest
import statistical
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorded import recorded_inputs
from tiny_tasks import CALIBRATION, same, tiny_task, weights

import workbench as wb
from workbench.calibration.passes import GROUPS
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.kernels.selection import keep_fewer, spread
from workbench.recipe import Recipe

CRITERIA = ("magnitude", "wanda", "sparsegpt", "taylor", "fisher", "random")


def matrix(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Return a layer's weight as [outputs, inputs] in float64, written down here and not taken from the
    workbench."""
    module = model.get_submodule(name)
    weight = module.weight.detach().double().cpu()
    return weight.t() if type(module).__name__ == "Conv1D" else weight.flatten(1)


def pruned_layers(task, step: wb.Prune) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return (dense, pruned) matrices of every layer that the step changed."""
    compressed = compress(task, Recipe(step))
    names = [row.name for row in compressed.report if row.sparsity and "skipped" not in row.outcome]
    assert len(names) >= 4
    return {name: (matrix(task.model, name), matrix(compressed.model, name)) for name in names}


# --- SparseGPT


def quota(total: int, columns: int, start: int, end: int) -> int:
    """Return how many weights the columns from `start` to `end` give up: total // columns each, the first
    total % columns one more."""
    return sum(total // columns + (column < total % columns) for column in range(start, end))


def reference(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    sparsity: float = 0.5,
    group: tuple[int, int] | None = None,
    block: int = 128,
) -> torch.Tensor:
    """Return SparseGPT's weights: one row at a time, one column at a time, every later weight updated at
    once, in float64.

    The inverse of what is left is taken anew for each column instead of from a Cholesky factor.
    """
    rows, columns = weight.shape
    hessian = inputs.double().t() @ inputs.double() / len(inputs)
    alive = hessian.diagonal() > 0
    mean = hessian.diagonal()[alive].mean()
    hessian = (
        hessian + torch.diag((~alive).double() * mean) + 0.01 * mean * torch.eye(columns, dtype=torch.float64)
    )
    inverses = [
        torch.linalg.inv(hessian[column:, column:]) for column in range(columns)
    ]  # of the columns not yet done
    now, kept = weight.double().clone(), torch.ones(rows, columns, dtype=torch.bool)
    cost = torch.tensor([float(inverses[column][0, 0]) for column in range(columns)])
    for column in range(columns):
        if group is None and column % block == 0:
            end = min(column + block, columns)
            saliency = (now[:, column:end] ** 2 / cost[column:end] * alive[column:end]).flatten()
            order = saliency.argsort(stable=True, descending=True)
            gone = order[len(order) - quota(round(sparsity * rows * columns), columns, column, end) :]
            chosen = torch.ones(len(order), dtype=torch.bool)
            chosen[gone] = False
            kept[:, column:end] = chosen.view(rows, -1)
        if group is not None and column % group[1] == 0:
            part = slice(column, column + group[1])
            saliency = now[:, part] ** 2 / cost[part] * alive[part]
            best = saliency.argsort(dim=1, descending=True, stable=True)[:, : group[0]]
            kept[:, part] = torch.zeros(rows, group[1], dtype=torch.bool).scatter_(1, best, value=True)
        for row in range(rows):
            if not kept[row, column]:
                change = now[row, column] / inverses[column][0, 0] * inverses[column][0]
                now[row, column:] -= change
                now[row, column] = 0
    return now * kept


@pytest.mark.parametrize(
    "setting",
    [
        {"sparsity": 0.5},
        {"sparsity": 0.3},
        {"sparsity": 0.81},
        {"pattern": "2:4"},
        {"sparsity": 0.75, "pattern": "1:4"},
    ],
    ids=str,
)
def test_sparsegpt_is_the_paper_column_by_column(sort, device, setting):
    task = tiny_task(sort, device)
    inputs = recorded_inputs(task)
    step = wb.Prune(criterion="sparsegpt", **setting)
    for name, (dense, pruned) in pruned_layers(task, step).items():
        expected = reference(dense, inputs[name].cpu(), step.sparsity, step.group)
        assert torch.equal(pruned == 0, expected == 0), name
        torch.testing.assert_close(pruned, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("group", [None, (3, 5)])
def test_more_columns_than_a_block(group):
    """200 inputs: two blocks, and groups of five that do not divide 128."""
    from workbench.compress.pruning.sparsegpt import factorise, solve
    from workbench.kernels.column_loops import Factor as Built
    from workbench.modules.layer import Layer

    generator = torch.Generator().manual_seed(1)
    weight, inputs = (
        torch.randn(12, 200, generator=generator),
        torch.randn(400, 200, generator=generator) @ torch.randn(200, 200, generator=generator),
    )
    weight, inputs = weight.float(), inputs.float()
    upper, alive, _ = factorise(
        (inputs.t() @ inputs / len(inputs)).unsqueeze(0), [Layer("a", "a", torch.nn.Linear(1, 1))]
    )
    solved, kept = solve(
        weight.clone().unsqueeze(0),
        Built(upper, alive),
        [round(0.4 * 2400)],
        group,
        torch.ones(1, 12, 200, dtype=torch.bool),
    )
    expected = reference(weight, inputs, 0.4, group, block=128)
    assert int((~kept).sum()) == 960
    assert float(((solved[0] == 0) == (expected == 0)).double().mean()) > 0.999
    if torch.equal(solved[0] == 0, expected == 0):
        torch.testing.assert_close(solved[0].double(), expected, rtol=1e-2, atol=1e-2)


def test_sparsegpt_loses_less_of_the_outputs_than_removal_alone(sort):
    task = tiny_task(sort)
    inputs = recorded_inputs(task)
    lost = {}
    for criterion in ("magnitude", "wanda", "sparsegpt"):
        pairs = pruned_layers(task, wb.Prune(criterion=criterion))
        lost[criterion] = sum(
            float(
                (inputs[name].double() @ (now - dense).t()).norm() ** 2
                / (inputs[name].double() @ dense.t()).norm() ** 2
            )
            for name, (dense, now) in pairs.items()
        )
    assert lost["sparsegpt"] < 0.9 * min(lost["wanda"], lost["magnitude"])


def test_inputs_that_are_never_read_go_first_and_disturb_nothing(device):
    task = tiny_task("vit", device)
    for block in task.model.vit.layers:  # the upper half of the neurons never fires
        block.mlp.fc1.weight[16:] = 0
        block.mlp.fc1.bias[16:] = 0
    inputs = recorded_inputs(task)["vit.layers.0.mlp.fc2"]
    assert (inputs[:, 16:] == 0).all()
    dense, pruned = pruned_layers(task, wb.Prune(sparsity=0.75, criterion="sparsegpt"))[
        "vit.layers.0.mlp.fc2"
    ]
    assert (pruned[:, 16:] == 0).all()
    assert int((pruned == 0).sum()) == round(0.75 * dense.numel())
    torch.testing.assert_close(pruned, reference(dense, inputs.cpu(), 0.75), rtol=2e-3, atol=2e-4)


def test_what_sparsegpt_keeps_for_the_next_move_does_not_depend_on_the_slider():
    task = tiny_task("llama")
    kept = Statistics(task)
    for step in (
        wb.Prune(criterion="sparsegpt", sparsity=0.3),
        wb.Prune(criterion="sparsegpt", sparsity=0.7),
        wb.Prune(criterion="sparsegpt", pattern="2:4"),
    ):
        assert same(
            weights(compress(task, Recipe(step), kept).model), weights(compress(task, Recipe(step)).model)
        )
    assert (
        len([name for key in kept.kept if key[0] == "inverse factor" for name in key[1]]) == 8
    )  # 14 layers; queries, keys and values read the same tensor, and so do gate and up


# --- gradients


def gradients_by_hand(task, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (mean gradient, mean over groups of size * squared gradient) of the mean loss of each group, in
    the model's own backward pass."""
    module = task.model.get_submodule(name)
    module.weight.requires_grad_(requires_grad=True)
    size = math.ceil(CALIBRATION / GROUPS)
    by_item = []
    for items in task.calibration.to(module.weight.device).batches(size):
        chances = task.kind.logits(task.model, items).log_softmax(-1)
        loss = -chances.gather(-1, items.labels.unsqueeze(-1)).mean()
        reached = loss.requires_grad  # an expert's layer only if a token is routed to it
        gradient = torch.autograd.grad(loss, module.weight)[0] if reached else torch.zeros_like(module.weight)
        by_item.append(gradient.detach().double().cpu())
    module.weight.requires_grad_(requires_grad=False)
    stack = torch.stack(
        [gradient.t() if type(module).__name__ == "Conv1D" else gradient.flatten(1) for gradient in by_item]
    )
    return stack.mean(0), size * stack.square().mean(0)


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_taylor_and_fisher_remove_what_the_loss_misses_least(sort, device, criterion):
    task = tiny_task(sort, device)
    pairs = pruned_layers(task, wb.Prune(sparsity=0.4, criterion=criterion))
    for name, (dense, pruned) in pairs.items():
        mean, square = gradients_by_hand(task, name)
        importance = (dense * mean).abs() if criterion == "taylor" else dense.square() * square / 2
        assert int((pruned == 0).sum()) == round(0.4 * dense.numel())
        assert importance[pruned == 0].max() <= importance[pruned != 0].min() * (1 + 1e-3) + 1e-9, name
        assert torch.equal(pruned[pruned != 0], dense[pruned != 0])
    assert not any(
        parameter.requires_grad for parameter in task.model.parameters()
    )  # the dense model is as it was
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_the_mean_gradient_is_that_of_all_calibration_items_and_squares_are_of_single_items(sort):
    task = tiny_task(sort)
    name = next(row.name for row in compress(task, Recipe(wb.Prune())).report if row.sparsity)
    gradients = Statistics(task).gradients(name)
    mean, square = gradients_by_hand(task, name)
    torch.testing.assert_close(gradients.mean.double(), mean, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(gradients.square.double(), square, rtol=1e-3, atol=1e-9)


def test_more_items_than_groups_are_squared_group_by_group(monkeypatch):
    monkeypatch.setattr("workbench.calibration.passes.GROUPS", 5)  # 24 items: groups of 5, 5, 5, 5, 4
    task = tiny_task("vit")
    gradients = Statistics(task).gradients("vit.layers.0.mlp.fc1")
    module = task.model.vit.layers[0].mlp.fc1
    module.weight.requires_grad_(requires_grad=True)
    sizes, by_group = [], []
    for items in task.calibration.batches(5):
        loss = torch.nn.functional.cross_entropy(task.kind.logits(task.model, items), items.labels)
        by_group.append(torch.autograd.grad(loss, module.weight)[0].double())
        sizes.append(len(items))
    assert sizes == [5, 5, 5, 5, 4]
    torch.testing.assert_close(
        gradients.mean.double(),
        sum(size * part for size, part in zip(sizes, by_group, strict=True)) / 24,
        rtol=1e-3,
        atol=1e-7,
    )
    torch.testing.assert_close(
        gradients.square.double(),
        sum(size * part.square() for size, part in zip(sizes, by_group, strict=True)) / 5,
        rtol=1e-3,
        atol=1e-9,
    )


def test_gradients_after_low_rank_are_those_of_the_factors():
    task = tiny_task("vit")
    low = wb.LowRank(rank_ratio=0.4, factorization="svd")
    factored = compress(task, Recipe(low))
    compressed = compress(task, Recipe(low, wb.Prune(sparsity=0.5, criterion="fisher")))
    name = next(layer.name for layer in factored.layers if layer.rank and layer.name.endswith("fc1.1"))
    mean, square = gradients_by_hand(dataclasses.replace(task, model=factored.model), name)
    assert mean.any()
    dense, pruned = matrix(factored.model, name), matrix(compressed.model, name)
    importance = dense.square() * square
    assert importance[pruned == 0].max() <= importance[pruned != 0].min() * (1 + 1e-3)


# --- random


def test_random_depends_on_the_seed_alone_and_takes_no_side(device):
    task = tiny_task("llama", device)
    zeros = {}
    for seed in (0, 1):
        pairs = pruned_layers(task, wb.Prune(criterion="random", seed=seed))
        again = pruned_layers(task, wb.Prune(criterion="random", seed=seed))
        assert all(torch.equal(pairs[name][1], again[name][1]) for name in pairs)
        zeros[seed] = {name: now == 0 for name, (_, now) in pairs.items()}
        for name, (dense, _) in pairs.items():
            rise = float((dense[zeros[seed][name]].abs().mean() - dense.abs().mean()) / dense.abs().std())
            left = rise * dense.numel() ** 0.5  # half of the weights: the error of this difference is 1
            assert abs(left) < statistical.limit(dense.numel()), (name, seed)
    for name, before in zeros[0].items():  # halves that agree or differ in nine of ten would be found out
        agree = int((before == zeros[1][name]).sum())
        statistical.assert_rate(agree, before.numel(), 0.5, fault=0.4, about=name)
    first, second = (zeros[0][f"model.layers.{index}.mlp.up_proj"] for index in (0, 1))
    assert not torch.equal(first, second)  # layers of one shape are not pruned alike


# --- exact counts


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("sparsity", [0.013, 1 / 3, 0.5, 0.77])
def test_every_criterion_removes_exactly_what_was_asked_of_each_layer(sort, device, criterion, sparsity):
    for name, (dense, pruned) in pruned_layers(
        tiny_task(sort, device), wb.Prune(sparsity=sparsity, criterion=criterion)
    ).items():
        assert int((pruned == 0).sum()) == round(sparsity * dense.numel()), name


@given(count=st.integers(0, 10_000), parts=st.integers(1, 300), more=st.integers(0, 500))
def test_spreading_is_exact_even_and_never_takes_back(count, parts, more):
    shares = spread(count, parts)
    assert sum(shares) == count
    assert max(shares) - min(shares) <= 1
    assert all(after >= before for before, after in zip(shares, spread(count + more, parts), strict=True))


@given(st.data(), st.integers(1, 5), st.integers(1, 20))
def test_keep_fewer_removes_the_least_of_each_row_whatever_the_ties(data, rows, columns):
    scores = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.integers(0, 3), min_size=columns, max_size=columns), min_size=rows, max_size=rows
            )
        )
    ).float()
    removed = data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    kept = keep_fewer(scores, removed)
    for row, mask, count in zip(scores.tolist(), kept.tolist(), removed, strict=True):
        best = sorted(range(columns), key=lambda i, row=row: (-row[i], i))[: columns - count]
        assert [i for i, stays in enumerate(mask) if stays] == sorted(best)
