"""Embeddings, output heads, and weights that several modules share: one layer, stored once, tied to the
end."""

from __future__ import annotations

import pytest
import torch
from tiny_tasks import same, tiny_task, weights

import workbench as wb
from workbench.compress import compress
from workbench.compress.outlines import after
from workbench.errors import CompressionError
from workbench.measure.size import counted_sizes, sizes
from workbench.modules.factored import Factors
from workbench.modules.layer import find_layers
from workbench.modules.packing import pack_model, unpack_state
from workbench.recipe import Recipe
from workbench.shapes.outline import Outline

TIED = [("llama", "model.embed_tokens"), ("gpt2", "transformer.wte")]
STEPS = [
    wb.Prune(sparsity=0.5),
    wb.Prune(sparsity=0.5, criterion="wanda"),
    wb.Prune(sparsity=0.5, pattern="2:4"),
    wb.Quantize(weight_bits=4, embeddings="dense"),
]


def named(step, *targets: str):
    return type(step)(**{**{name: getattr(step, name) for name in step.options()}, "targets": targets})


@pytest.mark.parametrize(("sort", "embedding"), TIED)
def test_a_tied_weight_is_one_layer_with_both_modules(sort, embedding):
    model = tiny_task(sort).model
    layers, left = find_layers(model)
    assert "lm_head" in layers
    assert embedding not in layers
    assert not {"lm_head", embedding} & set(left)
    assert list(layers["lm_head"].others) == [embedding]
    assert layers["lm_head"].names == ("lm_head", embedding)


@pytest.mark.parametrize(("sort", "embedding"), TIED)
@pytest.mark.parametrize("step", STEPS, ids=repr)
@pytest.mark.parametrize("by", ["head", "embedding"])
def test_it_stays_dense_unless_it_is_named_and_then_stays_tied(sort, embedding, step, by):
    task = tiny_task(sort)
    target = "lm_head" if by == "head" else embedding
    all_others = compress(task, Recipe(step))
    assert torch.equal(all_others.model.lm_head.weight, task.model.lm_head.weight)
    outcomes = {row.name: row.outcome for row in all_others.report}
    assert (
        f"the output head, whose weight is shared with {embedding}, stays dense unless targets name it"
        in outcomes["lm_head"]
    )
    recipe = Recipe(named(step, target))
    compressed = compress(task, recipe)
    head, table = compressed.model.lm_head, compressed.model.get_submodule(embedding)
    assert head.weight is table.weight
    assert not torch.equal(head.weight, task.model.lm_head.weight)
    rows = {row.name: row for row in compressed.report}
    assert rows["lm_head"].weights == head.weight.numel()
    assert rows[embedding].weights == 0  # counted once
    assert rows[embedding].outcome.startswith("its weight is that of lm_head; ")
    assert "stays dense" not in rows["lm_head"].outcome
    measured = sizes(compressed.model, compressed.layers)
    assert measured == counted_sizes(compressed.model, compressed.layers)
    assert measured.packed_bytes < sizes(task.model).packed_bytes
    outline = after(Outline.of(task.model), recipe)
    assert outline.file_bytes() >= measured.file_bytes
    if outline.exact():
        assert outline.file_bytes() == measured.file_bytes
    packed = pack_model(compressed.model, compressed.layers)
    assert sum(name.startswith((f"{embedding}.weight", "lm_head.weight")) for name in packed.encodings) == 2
    assert [encoding.kind for name, encoding in packed.encodings.items() if name == "lm_head.weight"] == [
        "shared"
    ]
    state = unpack_state(packed.tensors, packed.manifest())
    assert torch.equal(state["lm_head.weight"], head.weight)
    assert torch.equal(state[f"{embedding}.weight"], head.weight)


def test_an_exclusion_by_either_name_holds():
    task = tiny_task("llama")
    for name in ("lm_head", "model.embed_tokens"):
        compressed = compress(
            task, Recipe(wb.Prune(sparsity=0.5, targets=("*", "re:lm_head|embed", f"!{name}")))
        )
        assert torch.equal(compressed.model.lm_head.weight, task.model.lm_head.weight)
        assert (
            f"prune left out by target '!{name}'"
            in {row.name: row.outcome for row in compressed.report}["lm_head"]
        )
        trained = compress(
            task,
            Recipe(wb.Prune(sparsity=0.5), wb.Distill(steps=2, distill_batch=8, targets=("*", f"!{name}"))),
        )
        assert torch.equal(trained.model.lm_head.weight, task.model.lm_head.weight)


def test_training_moves_both_ends_of_a_tie_and_keeps_its_grid():
    task = tiny_task("llama")
    compressed = compress(
        task,
        Recipe(
            wb.Quantize(weight_bits=4, targets=("*", "lm_head")),
            wb.Distill(steps=3, distill_batch=8, learning_rate=1e-2),
        ),
    )
    start = compress(task, Recipe(wb.Quantize(weight_bits=4, targets=("*", "lm_head"))))
    assert compressed.model.lm_head.weight is compressed.model.model.embed_tokens.weight
    assert not torch.equal(compressed.model.lm_head.weight, start.model.lm_head.weight)
    for layer in compressed.layers:
        layer.check()


@pytest.mark.parametrize(
    "step",
    [
        wb.LowRank(rank_ratio=0.3, targets=("lm_head",)),
        wb.LowRank(rank_ratio=0.3, targets=("lm_head",), rank_allocation="energy"),
    ],
    ids=repr,
)
def test_low_rank_of_a_tied_weight_is_refused_with_the_reason(step):
    with pytest.raises(
        CompressionError,
        match=(
            r"lm_head, model\.embed_tokens share one weight, and no ordinary layers could share its factors"
        ),
    ):
        compress(tiny_task("llama"), Recipe(step))


def test_a_tied_weight_is_not_repaired():
    every = ("*", "lm_head")
    compressed = compress(
        tiny_task("llama"), Recipe(wb.Prune(sparsity=0.5, targets=every), wb.Repair(targets=every))
    )
    assert {row.name: row.outcome for row in compressed.report}["lm_head"].endswith(
        "repair skipped: lm_head, model.embed_tokens share one weight"
    )


# --- embeddings of their own


@pytest.mark.parametrize("step", [STEPS[0], STEPS[-1]], ids=repr)
def test_an_embedding_is_taken_when_it_is_named(step):
    task = tiny_task("untied")
    rows = {row.name: row for row in compress(task, Recipe(step)).report}
    assert (
        rows["model.embed_tokens"].outcome
        == f"{step.kind()} skipped: an embedding stays dense unless targets name it"
    )
    compressed = compress(task, Recipe(named(step, "model.embed_tokens")))
    assert torch.equal(compressed.model.lm_head.weight, task.model.lm_head.weight)
    row = next(row for row in compressed.report if row.name == "model.embed_tokens")
    assert row.relative_error > 0.01
    assert sizes(compressed.model, compressed.layers) == counted_sizes(compressed.model, compressed.layers)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_an_embedding_has_no_inputs_to_weigh_by(criterion):
    with pytest.raises(
        CompressionError,
        match=r"model\.embed_tokens: prune skipped: it is an embedding: its rows are looked up, .*magnitude",
    ):
        compress(
            tiny_task("untied"),
            Recipe(wb.Prune(sparsity=0.5, criterion=criterion, targets=("model.embed_tokens",))),
        )


def test_an_embedding_of_low_rank_is_a_narrower_one_and_a_product(device):
    task = tiny_task("untied", device)
    recipe = Recipe(wb.LowRank(rank_ratio=0.3, targets=("model.embed_tokens",)))
    compressed = compress(task, recipe)
    factors = compressed.model.model.embed_tokens
    assert isinstance(factors, Factors)
    assert [tuple(part.weight.shape) for part in factors] == [(64, 5), (16, 5)]
    dense = task.model.model.embed_tokens.weight.double().cpu()
    now = factors[0].weight.double().cpu() @ factors[1].weight.double().cpu().t()
    assert float((now - dense).norm()) == pytest.approx(
        float(torch.linalg.svdvals(dense)[5:].norm()), rel=1e-4
    )
    ids = torch.arange(64, device=device)
    torch.testing.assert_close(factors(ids).double().cpu(), now, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(factors.weight.double().cpu(), now, rtol=1e-4, atol=1e-5)
    row = next(row for row in compressed.report if row.name == "model.embed_tokens")
    assert (row.rank, row.weights, row.outcome) == (5, 5 * 80, "rank 5 of 16 by svd")
    assert row.relative_error == pytest.approx(float((now - dense).norm() / dense.norm()), rel=1e-4)
    measured = sizes(compressed.model, compressed.layers)
    assert measured == counted_sizes(compressed.model, compressed.layers)
    assert after(Outline.of(task.model), recipe).file_bytes() == measured.file_bytes


def test_looking_up_costs_no_multiply_adds():
    outline = Outline.of(tiny_task("untied").model)
    table = next(weight for weight in outline.weights if weight.name == "model.embed_tokens")
    assert table.table
    assert outline.multiply_adds() == sum(weight.count for weight in outline.weights) - table.count


STORED = [
    ("llama", wb.Quantize(weight_bits=4, targets=("*", "lm_head"))),
    ("gpt2", wb.Prune(sparsity=0.6, targets=("*", "lm_head"))),
    ("untied", wb.LowRank(rank_ratio=0.3, targets=("model.embed_tokens", "lm_head"))),
]


@pytest.mark.parametrize(("sort", "step"), STORED, ids=[sort for sort, _ in STORED])
def test_an_export_of_heads_and_embeddings_comes_back_bit_for_bit(sort, step, tmp_path, ledger):
    bench = wb.Bench(tiny_task(sort), ledger=ledger, progress=False)
    loaded = wb.load(bench.export(Recipe(step), tmp_path / "out"))
    compressed = compress(bench.task, Recipe(step)).model
    assert same(weights(loaded), weights(compressed))
    ids = torch.arange(16).view(2, 8)
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, compressed(ids).logits)
    if sort != "untied":
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
