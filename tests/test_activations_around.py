"""Rounded inputs with every other step around them: promises, exports, and what is left as it is."""

from __future__ import annotations

import pytest
import torch
from test_activations import STATIC, logits, rounding_modules
from tiny_tasks import same, tiny_task, weights
from torch import nn

import workbench as wb
from workbench.bench import Bench
from workbench.compress import compress
from workbench.compress.outlines import after
from workbench.export import load
from workbench.measure.size import counted_sizes, sizes
from workbench.modules.input_quantizer import QuantizesInputs
from workbench.modules.layer import replace_module
from workbench.recipe import Recipe
from workbench.shapes.outline import Outline
from workbench.tasks import score

AROUND = {
    "quantized": (wb.Activations(activation_bits=8, smoothing=0.5), wb.Quantize(weight_bits=8)),
    "gptq": (wb.Activations(activation_bits=8, smoothing=0.5), wb.Quantize(weight_bits=4, rounding="gptq")),
    "sparse": (
        wb.Prune(pattern="2:4"),
        wb.Activations(activation_bits=8, smoothing=0.5, **STATIC),
        wb.Quantize(weight_bits=8),
    ),
    "pruned after": (
        wb.Activations(activation_bits=8, smoothing=0.5),
        wb.Prune(sparsity=0.3, criterion="sparsegpt"),
        wb.Quantize(weight_bits=8),
    ),
    "factors": (
        wb.LowRank(rank_ratio=0.45),
        wb.Activations(activation_bits=8, smoothing=0.5, **STATIC),
        wb.Quantize(weight_bits=8),
    ),
    "repaired": (
        wb.Activations(activation_bits=8, smoothing=0.5),
        wb.Quantize(weight_bits=3),
        wb.Repair(repair_ratio=0.2),
    ),
    "rounds": (
        wb.Prune(sparsity=0.5),
        wb.Activations(activation_bits=8, smoothing=0.5),
        wb.Repair(repair_ratio=0.2, repair_rounds=2),
    ),
    "static": (
        wb.Activations(activation_bits=8, activation_grid="asymmetric", **STATIC),
        wb.Quantize(weight_bits=8, grid="symmetric"),
    ),
    "float8": (wb.Activations(activation_bits=8, activation_format="float8"),),
    "last": (wb.Quantize(weight_bits=8), wb.Repair(repair_ratio=0.1), wb.Activations(activation_bits=8)),
    "trained": (
        wb.Activations(activation_bits=8),
        wb.Quantize(weight_bits=4),
        wb.Distill(temperature=2, steps=3, distill_batch=8),
    ),
}
SMALL = {name: Recipe(*steps) for name, steps in AROUND.items()}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_promise_holds_together_and_the_export_gives_the_same_bits(sort, device, dtype, name, tmp_path):
    task, recipe = tiny_task(sort, device, dtype), SMALL[name]
    before = weights(task.model)
    once, twice = compress(task, recipe), compress(task, recipe)
    assert same(weights(task.model), before)
    assert same(weights(once.model), weights(twice.model))
    for layer in once.layers:
        layer.check()
    assert rounding_modules(once.model)
    assert counted_sizes(once.model, once.layers) == sizes(once.model, once.layers)
    predicted = after(Outline.of(task.model), recipe)
    actual = sizes(once.model, once.layers).file_bytes
    assert (
        predicted.file_bytes() == actual
        if predicted.exact()
        else predicted.file_bytes() + 128 * len(predicted.weights) >= actual
    )  # a mask that saves bytes takes a line of the header
    if name != "trained":  # a gradient step in bfloat16 may go either way
        assert torch.isfinite(score(task.kind, once.model, task.evaluation).loss).all()
    bench = Bench(task, ledger=tmp_path / "points", progress=False)
    loaded = load(bench.export(recipe, tmp_path / "out"), device)
    assert torch.equal(logits(task, loaded), logits(task, bench.compress(recipe).model))
    for path, module in rounding_modules(once.model).items():
        same_module = loaded.get_submodule(path)
        assert type(same_module) is type(module)
        assert same_module.input_format == module.input_format


def test_structure_that_is_removed_leaves_smaller_layers_that_round(tmp_path):
    task = tiny_task("vit")
    recipe = Recipe(
        wb.Prune(sparsity=0.5, pattern="neurons"),
        wb.Activations(activation_bits=8, smoothing=0.5, **STATIC),
        wb.Quantize(weight_bits=8),
    )
    bench = Bench(task, ledger=tmp_path / "points", progress=False)
    compressed = bench.compress(recipe)
    assert compressed.model.vit.layers[0].mlp.fc2.smooth.shape == (16,)
    assert torch.equal(
        logits(task, load(bench.export(recipe, tmp_path / "out"))), logits(task, compressed.model)
    )


def test_a_repaired_smoothed_layer_is_closer_to_the_dense_one(task):
    start = Recipe(wb.Activations(activation_bits=8, smoothing=0.5), wb.Quantize(weight_bits=2))
    dense = logits(task, task.model)
    errors = [
        float((logits(task, compress(task, recipe).model) - dense).norm())
        for recipe in (start, Recipe(*start, wb.Repair(repair_ratio=0.45)))
    ]
    assert errors[1] < 0.9 * errors[0]


def test_more_bits_are_closer(task):
    dense = logits(task, task.model).float()
    errors = [
        float(
            (logits(task, compress(task, Recipe(wb.Activations(activation_bits=bits))).model) - dense).norm()
            / dense.norm()
        )
        for bits in (4, 5, 6, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05


def test_training_after_it_learns_through_the_rounding():
    task = tiny_task("vit")
    compressed = compress(
        task,
        Recipe(
            wb.Activations(activation_bits=4),
            wb.Distill(temperature=2, steps=40, learning_rate=5e-3, look_every=0),
        ),
    )
    losses = [loss for _, loss in compressed.curve]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_tied_head_can_round_its_inputs_and_is_not_smoothed():
    task = tiny_task("gpt2")
    compressed = compress(
        task, Recipe(wb.Activations(activation_bits=8, smoothing=0.5, targets=("lm_head", "*")))
    )
    assert isinstance(compressed.model.lm_head, QuantizesInputs)
    assert compressed.model.lm_head.weight is compressed.model.transformer.wte.weight
    assert torch.equal(compressed.model.lm_head.weight, task.model.lm_head.weight)
    assert compressed.model.lm_head.smooth is None
    assert (
        "not smoothed: its weight is shared with transformer.wte"
        in {row.name: row.outcome for row in compressed.report}["lm_head"]
    )


def test_the_head_and_embeddings_stay_as_they_are_unless_named():
    task = tiny_task("untied")
    compressed = compress(task, Recipe(wb.Activations(activation_bits=8, targets=("*", "*embed_tokens"))))
    rows = {row.name: row.outcome for row in compressed.report}
    assert "the output head stays dense unless targets name it" in rows["lm_head"]
    assert "an embedding looks rows up: it has no inputs to round" in rows["model.embed_tokens"]
    assert not isinstance(compressed.model.lm_head, QuantizesInputs)


class Reads(nn.Module):
    """A layer that multiplies by another's weight without calling it, as nn.MultiheadAttention does."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)


def test_a_layer_whose_weight_is_only_read_is_left_with_the_reason():
    task = tiny_task("vit")
    replace_module(task.model, "vit.layers.0.mlp.fc1", Reads(task.model.vit.layers[0].mlp.fc1))
    compressed = compress(task, Recipe(wb.Activations(activation_bits=8, smoothing=0.5)))
    assert {row.name: row.outcome for row in compressed.report}[
        "vit.layers.0.mlp.fc1.inner"
    ] == "activations skipped: the model reads its weight but never calls it"


def test_a_subclass_that_may_do_more_is_left_with_the_reason():
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return 2 * super().forward(input)

    task = tiny_task("vit")
    fc1 = task.model.vit.layers[0].mlp.fc1
    fc1.__class__ = Scaled
    compressed = compress(task, Recipe(wb.Activations(activation_bits=8)))
    assert {row.name: row.outcome for row in compressed.report}[
        "vit.layers.0.mlp.fc1"
    ] == "activations skipped: a Scaled may do more than one product"
