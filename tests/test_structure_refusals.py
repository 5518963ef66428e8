"""What has no such structure, cannot lose it, or loses less than was asked: said in words, for every case."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from structure_models import logits, masked, task_of
from tiny_tasks import same, weights
from torch import nn

import workbench as wb
from workbench.compress import compress
from workbench.compress.pruning import structured
from workbench.errors import CompressionError, RecipeError
from workbench.recipe import Recipe


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("resnet", {"pattern": "heads"}, CompressionError, "tiny-resnet has no heads that it can remove"),
        (
            "vit",
            {"pattern": "channels"},
            CompressionError,
            "has no channels that it can remove .*width that every block of attention reads",
        ),
        ("llama", {"pattern": "channels"}, CompressionError, "has no channels that it can remove"),
        (
            "bert",
            {"pattern": "layers"},
            CompressionError,
            "has no layers that it can remove .its lists of blocks have one each",
        ),
        (
            "vit",
            {"pattern": "heads", "sparsity": 0.2},
            CompressionError,
            r"0.2 of 2 heads is less than half of one; it starts at sparsity=0.25",
        ),
        (
            "vit",
            {"pattern": "layers", "sparsity": 0.2},
            CompressionError,
            r"0.2 of 2 blocks is less than half of one; it starts at sparsity=0.25",
        ),
        (
            "vit",
            {"pattern": "heads", "allocation": "sensitivity"},
            RecipeError,
            "allocation='sensitivity' divides zeros, not structure",
        ),
        (
            "vit",
            {"pattern": "heads", "rounds": 2, "train_steps": 3},
            RecipeError,
            "structure is removed in one round",
        ),
        (
            "vit",
            {"pattern": "heads", "criterion": "sparsegpt"},
            RecipeError,
            "criterion='sparsegpt' removes single weights",
        ),
        (
            "vit",
            {"pattern": "neurons", "targets": ("fc1",)},
            RecipeError,
            "target 'fc1' of prune names no layer",
        ),
    ],
)
def test_what_cannot_be_removed_is_refused_in_words(name, options, error, message):
    task = task_of(name)
    before = weights(task.model)
    with pytest.raises(error, match=message):
        compress(task, Recipe(wb.Prune(**options)))
    assert same(weights(task.model), before)


def test_structure_comes_before_low_rank():
    with pytest.raises(RecipeError, match=r"Prune\(pattern='heads'\) cannot follow LowRank.*put it first"):
        Recipe(wb.LowRank(), wb.Prune(pattern="heads"))


def test_asking_for_all_leaves_one_and_the_report_says_so():
    compressed = compress(task_of("vit"), Recipe(wb.Prune(sparsity=0.95, pattern="heads")))
    assert (
        "1 of 2 heads of vit.layers.0.attention removed by magnitude (0.95 asked, 0.5 given; one has to stay)"
        in {row.name: row.outcome for row in compressed.report}["vit.layers.0.attention.q_proj"]
    )


def test_heads_that_do_not_divide_are_skipped_with_the_numbers():
    task = task_of("vit")
    task.model.vit.layers[0].attention.head_dim = 5
    with pytest.raises(CompressionError, match="heads do not divide: 16 query and 16 key outputs.*5 a head"):
        compress(task, Recipe(wb.Prune(pattern="heads", targets=("vit.layers.0.*",))))
    task.model.vit.layers[0].attention.head_dim = 8
    task.model.vit.layers[1].attention.bias_of_all = nn.Parameter(torch.zeros(2, 9))
    rows = {row.name: row.outcome for row in compress(task, Recipe(wb.Prune(pattern="heads"))).report}
    assert (
        rows["vit.layers.1.attention.q_proj"]
        == "prune skipped: its parameter bias_of_all [2, 9] belongs to several heads at once"
    )


def test_a_convolution_in_groups_leaves_its_channels_alone_and_says_so():
    task = task_of("resnet")
    layer = task.model.resnet.encoder.stages[1].layers[1].layer[1]
    layer.convolution = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False).requires_grad_(
        requires_grad=False
    )
    compressed = compress(task, Recipe(wb.Prune(pattern="channels")))
    rows = {row.name: row.outcome for row in compressed.report}
    assert (
        "its channels meet resnet.encoder.stages.1.layers.1.layer.1.convolution, a convolution in 4 groups"
        in rows["resnet.encoder.stages.1.layers.1.layer.0.convolution"]
    )
    assert "4 of 8 channels" in rows["resnet.embedder.embedder.convolution"]
    torch.testing.assert_close(
        logits(task, compressed.model), logits(task, masked(task, compressed)), atol=1e-4, rtol=1e-4
    )


def test_a_layer_that_targets_leave_out_keeps_all_that_it_is_tied_to():
    task = task_of("resnet")
    compressed = compress(task, Recipe(wb.Prune(pattern="channels", targets=("!classifier.1",))))
    rows = {row.name: row for row in compressed.report}
    assert rows["classifier.1"].weights == rows["classifier.1"].shape[0] * rows["classifier.1"].shape[1]
    assert (
        "tied to classifier.1, which targets leave out"
        in rows["resnet.encoder.stages.1.layers.0.shortcut.convolution"].outcome
    )


def test_targets_choose_blocks_and_names_stay_those_of_the_dense_model():
    task = task_of("grouped")
    first = wb.Prune(sparsity=0.4, pattern="layers", targets=("model.layers.0.*", "model.layers.1.*"))
    compressed = compress(task, Recipe(first, wb.Quantize(weight_bits=4, targets=("model.layers.2.*",))))
    rows = {row.name: row for row in compressed.report}
    removed = {row.name.split(".")[2] for row in compressed.report if row.weights == 0}
    assert len(removed) == 1
    assert "2" not in removed
    assert {row.name.split(".")[2] for row in compressed.report if row.bits == 4} == {
        "2"
    }  # it stands at place 1 now
    assert rows["model.layers.2.mlp.up_proj"].bits == 4
    with pytest.raises(RecipeError, match="target 'model.layers.9"):
        compress(task, Recipe(dataclasses.replace(first, targets=("model.layers.9.*",))))


def test_from_flat_options_structure_goes_before_low_rank_and_zeros_after_it():
    from workbench.compress.registry import METHODS

    flat = {"sparsity": 0.5, "rank_ratio": 0.4, "weight_bits": 4}
    assert METHODS.recipe({**flat, "pattern": "heads"}) == Recipe(
        wb.Prune(pattern="heads"), wb.LowRank(rank_ratio=0.4), wb.Quantize(weight_bits=4)
    )
    assert METHODS.recipe(flat) == Recipe(wb.LowRank(rank_ratio=0.4), wb.Prune(), wb.Quantize(weight_bits=4))


def test_each_structure_may_be_removed_once_and_zeros_come_on_top():
    task = task_of("vit")
    compress(task, Recipe(wb.Prune(pattern="heads"), wb.Prune(pattern="neurons"), wb.Prune()))
    with pytest.raises(RecipeError, match="is already taken by an earlier prune step"):
        compress(task, Recipe(wb.Prune(pattern="heads"), wb.Prune(pattern="heads", sparsity=0.25)))


def test_channels_that_cannot_be_followed_are_refused_with_the_words(monkeypatch):
    def failing(*_given):
        raise AssertionError("a graph of its own")

    monkeypatch.setattr(structured, "find_channels", failing)
    with pytest.raises(
        CompressionError, match=r"its channels cannot be followed .*AssertionError: a graph of its own"
    ):
        compress(task_of("resnet"), Recipe(wb.Prune(pattern="channels")))
