"""LoRA: the change as it is defined, exact counts, masks, and folding that changes no bit of the outputs."""

from __future__ import annotations

import pytest
import torch
from tiny_tasks import same, tiny_task, weights

import workbench as wb
from workbench.compress import compress
from workbench.compress.distillation.lora import Adapted, Adapters, mean_of
from workbench.modules.layer import find_layers
from workbench.modules.sharing import sharing_copy
from workbench.recipe import Recipe

RANK, ALPHA = 2, 6.0


def adapted_task(sort: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
    task = tiny_task(sort, device, dtype)
    model = sharing_copy(task.model)
    layers = [layer for layer in find_layers(model)[0].values() if not layer.others and not layer.table]
    return task, Adapted(model, task.kind, layers), layers


def stirred(adapters: Adapters, seed: int = 9) -> Adapters:
    """Give the changes a size, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for up in adapters.ups:
            up.copy_(0.1 * torch.randn(up.shape, generator=generator))
    return adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_folded_answers_are_those_before_folding_bit_for_bit(sort, device, dtype):
    task, adapted, _ = adapted_task(sort, device, dtype)
    changes = stirred(Adapters(adapted.batches, RANK, ALPHA, 0, [])).changes()
    items = task.evaluation[:8].to(device)
    with torch.no_grad():
        dense, before = task.kind.logits(task.model, items), adapted.logits(items, changes)
        adapted.fold(changes)
        assert torch.equal(task.kind.logits(adapted.model, items), before)
        assert not torch.equal(before, dense)
        assert torch.equal(task.kind.logits(task.model, items), dense)  # the model it was copied from stays


def test_the_change_is_alpha_over_r_up_down_in_float64(sort):
    _, adapted, layers = adapted_task(sort)
    adapters = stirred(Adapters(adapted.batches, RANK, ALPHA, 0, []))
    before = {layer.name: layer.matrix().double() for layer in layers}
    adapted.fold(adapters.changes())
    for batch, up, down in zip(adapted.batches, adapters.ups, adapters.downs, strict=True):
        for layer, u, d in zip(batch.layers, up, down, strict=True):
            r = min(RANK, *before[layer.name].shape)
            assert d.shape[0] == u.shape[1] == r
            wanted = before[layer.name] + ALPHA / r * (u.double() @ d.double())
            assert torch.allclose(layer.matrix().double(), wanted, atol=1e-6)
            assert torch.linalg.matrix_rank(layer.matrix().double() - before[layer.name], rtol=1e-4) <= r


def test_nothing_changes_before_the_first_step(sort):
    task, adapted, _ = adapted_task(sort)
    with torch.no_grad():
        assert torch.equal(
            adapted.logits(task.evaluation[:4], Adapters(adapted.batches, RANK, ALPHA, 0, []).changes()),
            task.kind.logits(task.model, task.evaluation[:4]),
        )


def test_the_count_is_exact(sort):
    _, adapted, layers = adapted_task(sort)
    projections = [torch.zeros(3, 5), torch.zeros(2, 2)]
    by_hand = sum(min(RANK, *layer.matrix().shape) * sum(layer.matrix().shape) for layer in layers) + 15 + 4
    adapters = Adapters(adapted.batches, RANK, ALPHA, 0, projections)
    assert adapters.count() == by_hand
    assert all(projection.requires_grad for projection in adapters.projections)


def test_gradients_reach_the_changes_and_nothing_else(sort):
    task, adapted, _ = adapted_task(sort)
    adapters = stirred(Adapters(adapted.batches, RANK, ALPHA, 0, []))
    items = task.training[:8]
    task.kind.loss(adapted.logits(items, adapters.changes()), items.labels).backward()
    assert all(
        parameter.grad is not None and float(parameter.grad.norm()) > 0 for parameter in adapters.parameters()
    )
    assert all(parameter.grad is None for parameter in adapted.model.parameters())


def test_a_mask_holds_in_every_forward_pass_and_after_folding():
    task = tiny_task("vit")
    compressed = compress(task, Recipe(wb.Prune(sparsity=0.5)))
    layers = [layer for layer in compressed.layers if layer.mask is not None]
    adapted = Adapted(compressed.model, task.kind, layers)
    changes = stirred(Adapters(adapted.batches, RANK, ALPHA, 0, [])).changes()
    for batch, stack in zip(adapted.batches, adapted.changed(changes), strict=True):
        for layer, matrix in zip(batch.layers, stack, strict=True):
            assert (matrix[~layer.mask] == 0).all()
            assert (matrix[layer.mask] != layer.matrix()[layer.mask]).any()
    adapted.fold(changes)
    for layer in layers:
        layer.check()


def test_a_seed_gives_the_same_start_whatever_the_global_state():
    _, adapted, _ = adapted_task("vit")
    torch.manual_seed(3)
    first = Adapters(adapted.batches, RANK, ALPHA, 5, []).state_dict()
    torch.manual_seed(4)
    assert same(first, Adapters(adapted.batches, RANK, ALPHA, 5, []).state_dict())
    assert not same(first, Adapters(adapted.batches, RANK, ALPHA, 6, []).state_dict())


def test_the_mean_is_that_of_the_changes_not_of_the_factors():
    _, adapted, _ = adapted_task("vit")
    several = [stirred(Adapters(adapted.batches, RANK, ALPHA, seed, []), seed) for seed in range(3)]
    for index, mean in enumerate(mean_of(several)):
        by_hand = (
            sum(
                ALPHA / RANK * (adapter.ups[index].double() @ adapter.downs[index].double())
                for adapter in several
            )
            / 3
        )
        assert torch.allclose(mean.double(), by_hand, atol=1e-6)
    before = weights(adapted.model)
    mean_of(several)
    assert same(weights(adapted.model), before)
