"""Low rank against float64 closed forms, and what really stands in the model afterwards."""

from __future__ import annotations

import pytest
import torch
from recorded import conv_rows, recorded_inputs
from test_statistics import custom_task
from tiny_tasks import tiny_task
from torch import nn

import workbench as wb
from workbench.compress import compress
from workbench.recipe import Recipe


def product(pair: nn.Module) -> torch.Tensor:
    """Return the product of the two layers' weights, float64 [outputs, inputs]."""
    first, second = (pair[i].weight.detach().double().cpu().flatten(1) for i in range(2))
    return second @ first


def dense_matrix(module: nn.Module) -> torch.Tensor:
    weight = module.weight.detach().double().cpu()
    return weight.t() if type(module).__name__ == "Conv1D" else weight.flatten(1)


def factored(task, compressed):
    """Yield (name, dense matrix, rank-r matrix, r) of every layer that was replaced, r counted on the
    modules."""
    count = 0
    for row in compressed.report:
        if row.rank is not None:
            pair = compressed.model.get_submodule(row.name)
            count += 1
            yield (
                row.name,
                dense_matrix(task.model.get_submodule(row.name)),
                product(pair),
                len(pair[0].weight),
            )
    assert count >= 3


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_plain_svd_loses_exactly_the_dropped_singular_values(sort, device, ratio):
    task = tiny_task(sort, device)
    compressed = compress(task, Recipe(wb.LowRank(rank_ratio=ratio, factorization="svd")))
    for name, dense, now, rank in factored(task, compressed):
        assert rank == max(1, round(ratio * min(dense.shape))), name
        assert int(torch.linalg.matrix_rank(now)) == rank
        dropped = torch.linalg.svdvals(dense)[rank:]
        assert float((now - dense).norm()) == pytest.approx(float(dropped.square().sum().sqrt()), rel=1e-4)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_whitened_loses_exactly_the_dropped_output_variance_and_less_than_plain(sort, device, ratio):
    task = tiny_task(sort, device)
    inputs = recorded_inputs(task)
    plain = {
        name: now
        for name, _, now, _ in factored(
            task, compress(task, Recipe(wb.LowRank(rank_ratio=ratio, factorization="svd")))
        )
    }
    better = 0
    for name, dense, now, rank in factored(task, compress(task, Recipe(wb.LowRank(rank_ratio=ratio)))):
        rows = inputs[name].double().cpu()
        outputs = rows @ dense.t()
        dropped = (
            torch.linalg.eigvalsh(outputs.t() @ outputs / len(rows)).flip(0)[rank:].clamp_min(0).sum().sqrt()
        )
        error = float((rows @ (now - dense).t()).norm() / len(rows) ** 0.5)
        assert error == pytest.approx(float(dropped), rel=2e-3, abs=1e-5), name
        plain_error = float((rows @ (plain[name] - dense).t()).norm() / len(rows) ** 0.5)
        assert error <= plain_error * 1.001 + 1e-6
        better += error < 0.98 * plain_error
        assert int(torch.linalg.matrix_rank(now)) == rank
    assert better  # real inputs are not white


@pytest.mark.parametrize("factorization", ["svd", "whitened"])
def test_a_layer_becomes_two_with_fewer_weights_and_its_own_bias(sort, device, factorization):
    task = tiny_task(sort, device)
    compressed = compress(task, Recipe(wb.LowRank(rank_ratio=0.3, factorization=factorization)))
    for row in compressed.report:
        if row.rank is None:
            continue
        old, pair = task.model.get_submodule(row.name), compressed.model.get_submodule(row.name)
        assert len(list(pair.children())) == 2
        count = sum(p.numel() for p in pair.parameters())
        assert count < sum(p.numel() for p in old.parameters())
        assert row.weights == row.rank * sum(row.shape)
        assert pair[0].bias is None
        assert (pair[1].bias is None) == (getattr(old, "bias", None) is None)
        if pair[1].bias is not None:
            assert torch.equal(pair[1].bias, old.bias)
    held = [sum(p.numel() for p in model.parameters()) for model in (task.model, compressed.model)]
    assert held[1] < held[0]


def test_a_square_layer_above_half_rank_is_left_whole_and_the_report_says_why():
    task = tiny_task("vit")
    compressed = compress(task, Recipe(wb.LowRank(rank_ratio=0.5)))
    rows = {row.name: row for row in compressed.report}
    square = next(
        row
        for row in rows.values()
        if row.shape == (16, 16) and row.name != "classifier" and "patch" not in row.name
    )
    assert square.rank is None
    assert square.weights == 256
    assert (
        square.outcome == "lowrank skipped: rank 8 of 16x16 saves no weights (below rank_ratio 0.47 it would)"
    )
    assert torch.equal(
        compressed.model.get_submodule(square.name).weight, task.model.get_submodule(square.name).weight
    )
    wide = next(row for row in rows.values() if row.shape == (32, 16))
    assert (wide.rank, wide.weights) == (8, 8 * 48)
    below = {row.name: row for row in compress(task, Recipe(wb.LowRank(rank_ratio=0.46))).report}
    assert below[square.name].rank == 7  # what the message promised


CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 1), "bias": False},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 1},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("factorization", ["svd", "whitened"])
def test_two_convolutions_do_what_one_of_the_product_would(options, factorization, device):
    body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, **options))
    task = custom_task(body, body(torch.zeros(1, 1, 8, 8)).numel(), device)
    compressed = compress(
        task, Recipe(wb.LowRank(rank_ratio=0.3, factorization=factorization, targets=("body.1",)))
    )
    dense, pair = task.model.body[1], compressed.model.body[1]
    assert [len(layer.weight) for layer in pair] == [round(0.3 * min(12, dense.weight[0].numel())), 12]
    x = torch.randn(5, 8, 8, 8, generator=torch.Generator().manual_seed(4)).to(device)
    out = pair(x)
    assert out.shape == dense(x).shape
    rows = conv_rows(dense, x).double().cpu() @ product(pair).t()  # [positions * 5, 12], position by position
    expected = rows.view(-1, 5, 12).permute(1, 2, 0).reshape(out.shape) + (
        0 if dense.bias is None else dense.bias.double().cpu().view(1, -1, 1, 1)
    )
    torch.testing.assert_close(out.double().cpu(), expected, rtol=1e-4, atol=1e-5)
    inputs = recorded_inputs(task)["body.1"].double().cpu()
    lost = inputs @ (product(pair) - dense_matrix(dense)).t()
    outputs = inputs @ dense_matrix(dense).t()
    best = torch.linalg.svdvals(outputs)[len(pair[0].weight) :].norm()
    if factorization == "whitened":
        assert float(lost.norm()) == pytest.approx(float(best), rel=2e-3, abs=1e-5)
    else:
        assert float(lost.norm()) >= float(best) * 0.999


def test_the_pair_answers_for_the_weight_it_replaces():
    task = tiny_task("vit")
    compressed = compress(task, Recipe(wb.LowRank(rank_ratio=0.3)))
    pair = (
        compressed.model.vit.embeddings.patch_embeddings.projection
    )  # the model reads its dtype from `.weight`
    assert pair.weight.shape == task.model.vit.embeddings.patch_embeddings.projection.weight.shape
    torch.testing.assert_close(pair.weight.flatten(1).double(), product(pair), rtol=1e-5, atol=1e-6)
    assert pair.weight.dtype == torch.float32


def test_the_untied_head_can_be_factored_when_it_is_named():
    task = tiny_task("untied")
    compressed = compress(task, Recipe(wb.LowRank(rank_ratio=0.3, targets=("lm_head",))))
    assert [row.name for row in compressed.report if row.rank] == ["lm_head"]
    logits = task.kind.logits(compressed.model, task.evaluation)
    assert logits.shape == task.kind.logits(task.model, task.evaluation).shape


def test_the_embedded_cnn_keeps_its_answers_better_with_whitening(fashion_cnn):
    from workbench.tasks import score

    accuracy = {}
    some = fashion_cnn.evaluation[:500]
    for factorization in ("svd", "whitened"):
        compressed = compress(fashion_cnn, Recipe(wb.LowRank(rank_ratio=0.3, factorization=factorization)))
        accuracy[factorization] = float(score(fashion_cnn.kind, compressed.model, some).correct.mean())
    assert accuracy["whitened"] > accuracy["svd"]
