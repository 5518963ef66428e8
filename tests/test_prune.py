"""Pruning against brute force: which weights go, how many, and what happens when they tie."""

from __future__ import annotations

import pytest
import torch
from recorded import recorded_inputs
from tiny_tasks import tiny_task

import workbench as wb
from workbench.compress import compress
from workbench.recipe import Recipe


def matrices(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Return a layer's weight as [outputs, inputs], written down here and not taken from the workbench."""
    module = model.get_submodule(name)
    weight = module.weight.detach().float().cpu()
    return weight.t() if type(module).__name__ == "Conv1D" else weight.flatten(1)


def pruned_layers(task, step: wb.Prune) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return (dense, pruned) matrices of every layer that the step changed."""
    compressed = compress(task, Recipe(step))
    names = [row.name for row in compressed.report if row.sparsity and "skipped" not in row.outcome]
    assert len(names) >= 4
    return {name: (matrices(task.model, name), matrices(compressed.model, name)) for name in names}


@pytest.mark.parametrize("sparsity", [0.01, 0.25, 0.5, 0.9, 0.99])
def test_magnitude_removes_exactly_the_smallest_weights_of_each_layer(sort, device, sparsity):
    for dense, pruned in pruned_layers(tiny_task(sort, device), wb.Prune(sparsity=sparsity)).values():
        sizes = dense.flatten().abs().tolist()
        gone = sorted(range(len(sizes)), key=sizes.__getitem__)[: round(sparsity * len(sizes))]
        expected = dense.flatten().clone()
        expected[gone] = 0
        assert torch.equal(pruned.flatten(), expected)
        assert int((pruned == 0).sum()) == round(sparsity * dense.numel())


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_n_of_m_keeps_the_n_largest_of_every_m_neighbours(sort, device, kept, of, criterion):
    task = tiny_task(sort, device)
    inputs = recorded_inputs(task)
    for name, (dense, pruned) in pruned_layers(
        task, wb.Prune(sparsity=1 - kept / of, pattern=f"{kept}:{of}", criterion=criterion)
    ).items():
        norms = (
            inputs[name].double().square().sum(0).sqrt().cpu()
            if criterion == "wanda"
            else torch.ones(dense.shape[1])
        )
        for row, now in zip(dense.tolist(), pruned.tolist(), strict=True):
            for start in range(0, len(row), of):
                group = range(start, start + of)
                best = sorted(group, key=lambda i, row=row, norms=norms: -abs(row[i]) * float(norms[i]))[
                    :kept
                ]
                assert [now[i] for i in group] == [row[i] if i in best else 0 for i in group], name


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
def test_wanda_removes_the_least_of_weight_times_input_norm_in_each_row(sort, device, sparsity):
    task = tiny_task(sort, device)
    inputs = recorded_inputs(task)
    for name, (dense, pruned) in pruned_layers(task, wb.Prune(sparsity=sparsity, criterion="wanda")).items():
        importance = dense.double().abs() * inputs[name].double().cpu().norm(dim=0)
        count, rows = round(sparsity * dense.numel()), len(dense)
        assert int((pruned == 0).sum()) == count, name
        for row, (weights, now) in enumerate(zip(importance, pruned, strict=True)):
            assert int((now == 0).sum()) == count // rows + (row < count % rows), name
            assert not (now == 0).any() or weights[now == 0].max() <= weights[now != 0].min() * (1 + 1e-5), (
                name
            )
        assert torch.equal(pruned[pruned != 0], dense[pruned != 0])


def test_wanda_differs_from_magnitude_where_inputs_differ():
    task = tiny_task("gpt2")
    wanda, magnitude = (
        pruned_layers(task, wb.Prune(sparsity=0.5, criterion=criterion))
        for criterion in ("wanda", "magnitude")
    )
    assert any(not torch.equal(wanda[name][1] == 0, magnitude[name][1] == 0) for name in wanda)


@pytest.mark.parametrize(
    ("step", "count"),
    [
        (wb.Prune(sparsity=0.5), 256),
        (wb.Prune(sparsity=0.3), 154),
        (wb.Prune(sparsity=0.5, pattern="2:4"), 256),
    ],
)
def test_ties_are_broken_by_place_so_that_the_count_is_exact(step, count, device):
    task = tiny_task("vit", device)
    name = "vit.layers.0.mlp.fc1"
    task.model.get_submodule(name).weight.fill_(0.5)
    compressed = compress(task, Recipe(step))
    weight = compressed.model.get_submodule(name).weight
    assert int((weight == 0).sum()) == count
    assert set(weight.unique().tolist()) == {0.0, 0.5}
    if step.pattern == "2:4":
        assert weight[0, :8].tolist() == [0.5, 0.5, 0, 0, 0.5, 0.5, 0, 0]  # the first of equals stays
    else:
        kept = weight.flatten() != 0
        assert kept[: 512 - count].all()


def test_weights_that_were_zero_before_are_among_the_pruned():
    task = tiny_task("vit")
    weight = task.model.get_submodule("vit.layers.0.mlp.fc1").weight
    weight.view(-1)[::2] = 0
    compressed = compress(task, Recipe(wb.Prune(sparsity=0.5)))
    assert torch.equal(compressed.model.get_submodule("vit.layers.0.mlp.fc1").weight, weight)


def test_sparsity_zero_changes_nothing_and_leaves_nothing_out():
    task = tiny_task("vit")
    compressed = compress(task, Recipe(wb.Prune(sparsity=0.0)))
    assert all(
        torch.equal(now, task.model.state_dict()[name]) for name, now in compressed.model.state_dict().items()
    )


def test_wanda_after_low_rank_uses_what_each_factor_really_reads(device):
    task = tiny_task("vit", device)
    low = wb.LowRank(rank_ratio=0.45, factorization="svd")
    factored = compress(task, Recipe(low))
    compressed = compress(task, Recipe(low, wb.Prune(sparsity=0.5, criterion="wanda")))
    name = next(row.name for row in factored.report if row.rank and "fc1" in row.name)
    inputs = recorded_inputs(task)[name].double()
    first, second = (factored.model.get_submodule(f"{name}.{i}").weight.double() for i in range(2))
    pruned = [compressed.model.get_submodule(f"{name}.{i}").weight.double() for i in range(2)]
    for matrix, now, reads in ((first, pruned[0], inputs), (second, pruned[1], inputs @ pruned[0].t())):
        importance = matrix.abs() * reads.norm(dim=0)
        rows, columns = matrix.shape
        count = round(0.5 * rows * columns)
        for row, order in enumerate(importance.argsort(1).tolist()):
            gone = order[: count // rows + (row < count % rows)]
            assert (now[row] == 0).nonzero().flatten().tolist() == sorted(gone)
