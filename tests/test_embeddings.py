"""Embeddings of tokens and heads take 8 bits besides what targets name, once where they are tied, and sizes,
predictions, reports and exports agree: against sizes counted by hand."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_tasks import VOCABULARY, tiny_task, weights

import workbench as wb
from workbench.compress import compress
from workbench.compress.registry import METHODS
from workbench.compress.vocabulary import besides
from workbench.export import load
from workbench.formats.affine import Grid
from workbench.measure.size import counted_sizes, sizes
from workbench.modules.layer import find_layers
from workbench.modules.vocabulary import vocabulary_of
from workbench.recipe import Recipe
from workbench.sensitivity import layers_of

HIDDEN = 16
TABLES = {  # layers whose rows are tokens, by model
    "llama": {"lm_head"},
    "untied": {"model.embed_tokens", "lm_head"},
    "gpt2": {"lm_head"},
    "bert": {"bert.embeddings.word_embeddings"},
    "vit": set(),
    "resnet": set(),
}


def vocabulary(task) -> dict[str, tuple[str, ...]]:
    return vocabulary_of(task.model, find_layers(task.model)[0].values())


def grids(compressed) -> dict[str, Grid]:
    return {layer.name: layer.grid for layer in compressed.layers if layer.grid is not None}


def by_hand(matrix: torch.Tensor) -> torch.Tensor:
    """Round each row to 256 levels between its least and its largest number, zero among them, in Python."""
    rows = []
    for row in matrix.tolist():
        low, high = min(0.0, *row), max(0.0, *row)
        scale = float(torch.tensor((high - low) / 255, dtype=torch.float32).half())
        zero = min(max(round(-low / scale), 0), 255)
        rows.append([(min(max(round(x / scale) + zero, 0), 255) - zero) * scale for x in row])
    return torch.tensor(rows)


@pytest.mark.parametrize("sort", TABLES)
def test_the_vocabulary_is_found_and_positions_and_classes_are_none_of_it(sort):
    assert set(vocabulary(tiny_task(sort))) == TABLES[sort]


@pytest.mark.parametrize("sort", TABLES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_embeddings_take_8_bits_a_scale_a_row_and_nothing_else_changes(sort, bits):
    task = tiny_task(sort)
    before = weights(task.model)
    compressed = compress(task, Recipe(wb.Quantize(weight_bits=bits)))
    dense = compress(task, Recipe(wb.Quantize(weight_bits=bits, embeddings="dense")))
    made, plain = grids(compressed), grids(dense)
    assert set(made) - set(plain) == TABLES[sort]
    state, other = compressed.model.state_dict(), dense.model.state_dict()
    for name in TABLES[sort]:
        assert made[name].bits == 8
        assert made[name].scale.shape == (VOCABULARY, 1)
        found, wanted = state[f"{name}.weight"], by_hand(before[f"{name}.weight"])
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    tied = {name for known_by in vocabulary(task).values() for name in known_by}
    assert all(
        torch.equal(state[key], other[key]) for key in state if key.removesuffix(".weight") not in tied
    )
    assert all(torch.equal(tensor, task.model.state_dict()[key]) for key, tensor in before.items())


@pytest.mark.parametrize("sort", ["llama", "gpt2"])
def test_a_tied_head_is_rounded_once_stays_tied_and_is_stored_once(sort, tmp_path):
    task = tiny_task(sort)
    bench = wb.Bench(task, device="cpu", progress=False, ledger=tmp_path / "l.journal")
    recipe = Recipe(wb.Quantize(weight_bits=4))
    out = bench.export(recipe, tmp_path / "out")
    model = load(out)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    compressed = bench.compress(recipe)
    made = compressed.model
    assert made.get_input_embeddings().weight is made.get_output_embeddings().weight
    manifest = json.loads((out / "compression.json").read_text())["encodings"]
    kinds = [about["kind"] for key, about in manifest.items() if key in {"lm_head.weight", table_name(made)}]
    assert sorted(kinds) == ["grid", "shared"]
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in made.state_dict().items())
    words = {row.name: row.outcome for row in compressed.report}
    assert "quantize took it besides, as no target names it" in words["lm_head"]
    assert words[table_name(made).removesuffix(".weight")].startswith("its weight is that of lm_head")


def table_name(model) -> str:
    table = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is table)


@pytest.mark.parametrize("sort", ["llama", "untied", "gpt2", "bert"])
@pytest.mark.parametrize("choice", ["int8", "same", "dense"])
def test_sizes_counted_packed_and_predicted_are_those_counted_by_hand(sort, choice, tmp_path):
    task = tiny_task(sort)
    step = wb.Quantize(weight_bits=4, embeddings=choice)
    compressed = compress(task, Recipe(step))
    dense = compress(task, Recipe(wb.Quantize(weight_bits=4, embeddings="dense")))
    count = VOCABULARY * HIDDEN
    float32, codes = 4 * count, {"int8": count, "same": count // 2, "dense": 4 * count}[choice]
    sides = {"int8": VOCABULARY * 3, "same": VOCABULARY * 2 + VOCABULARY // 2, "dense": 0}[choice]
    tables = len(TABLES[sort])
    packed = sizes(compressed.model, compressed.layers).packed_bytes
    assert packed == sizes(dense.model, dense.layers).packed_bytes - tables * (float32 - codes - sides)
    assert counted_sizes(compressed.model, compressed.layers).packed_bytes == packed
    bench = wb.Bench(task, device="cpu", progress=False, ledger=tmp_path / "l.journal")
    guess = bench.predictor().predict(Recipe(step))
    assert guess.file_bytes == sizes(compressed.model, compressed.layers).file_bytes


def test_what_targets_name_or_leave_out_is_theirs():
    task = tiny_task("untied")
    for steps, wanted in (
        ([wb.Quantize(weight_bits=4, targets=("*mlp*",))], {}),
        ([wb.Quantize(weight_bits=4, targets=("*", "!lm_head"))], {"model.embed_tokens": 8}),
        ([wb.Quantize(weight_bits=4, targets=("!*embed*", "!lm_head"))], {}),
        ([wb.Quantize(weight_bits=4, targets=("*", "lm_head"))], {"lm_head": 4, "model.embed_tokens": 8}),
        (
            [wb.Quantize(weight_bits=4), wb.Quantize(weight_bits=3, targets=("lm_head",))],
            {"lm_head": 3, "model.embed_tokens": 8},
        ),
        (
            [wb.Quantize(weight_bits=3, targets=("*embed*",)), wb.Quantize(weight_bits=4)],
            {"lm_head": 8, "model.embed_tokens": 3},
        ),
    ):
        made = grids(compress(task, Recipe(*steps)))
        assert {name: made[name].bits for name in TABLES["untied"] if name in made} == wanted
        left = {layer: bits for layer, bits in wanted.items() if bits == 8}
        assert {name for step in besides(steps, vocabulary(task)) for name in step.targets} == set(left)


@pytest.mark.parametrize(
    ("options", "bits", "kind"),
    [
        ({"weight_bits": 3.4}, 8, "Grid"),
        ({"weight_bits": 3.4, "embeddings": "same"}, 3, "Grid"),
        ({"weight_bits": 4, "number_format": "nf4"}, 8, "Grid"),
        ({"weight_bits": 4, "number_format": "nf4", "embeddings": "same"}, 4, "FloatGrid"),
        ({"weight_bits": 16, "number_format": "bfloat16"}, 16, "Cast"),
        ({"weight_bits": 3, "rounding": "gptq"}, 8, "Grid"),
        ({"weight_bits": 3, "rounding": "gptq", "embeddings": "same"}, 3, "Grid"),
        ({"weight_bits": 4, "group_size": 8, "rounding": "hqq", "embeddings": "same"}, 4, "OffsetGrid"),
    ],
)
def test_every_format_and_rounding(options, bits, kind):
    made = grids(compress(tiny_task("untied"), Recipe(wb.Quantize(**options))))
    assert {(made[name].bits, type(made[name]).__name__) for name in TABLES["untied"]} == {(bits, kind)}


@pytest.mark.parametrize("sort", ["llama", "gpt2", "bert"])
def test_with_everything_else_in_one_recipe_masks_and_promises_hold(sort, tmp_path):
    task = tiny_task(sort)
    recipe = Recipe(
        wb.Prune(sparsity=0.5, targets=("*", *TABLES[sort])),
        wb.Activations(activation_bits=8),
        wb.Quantize(weight_bits=4),
        wb.Distill(steps=2, distill_batch=4),
    )
    bench = wb.Bench(task, device="cpu", progress=False, ledger=tmp_path / "l.journal")
    out = bench.export(recipe, tmp_path / "out")
    compressed = bench.compress(recipe)
    for layer in compressed.layers:
        layer.check()
        if layer.name in TABLES[sort]:
            assert layer.grid.bits == 8
            assert float((layer.parameter == 0).float().mean()) >= 0.5
    state = compressed.model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in load(out).state_dict().items())


def test_points_measured_before_the_option_mean_what_they_did():
    step = wb.Quantize(weight_bits=4, embeddings="dense")
    told = json.loads(Recipe(step).to_json())
    del told[0]["embeddings"]
    assert METHODS.from_json(json.dumps(told)).steps == (step,)
    assert METHODS.from_json('[{"step": "quantize", "weight_bits": 4}]').steps[0].embeddings == "int8"
    assert Recipe(step).key == Recipe(wb.Quantize(weight_bits=4, embeddings="dense")).key
    assert Recipe(step).key == "7c6375aac2051cb4"  # as it was before there was a choice
    assert Recipe(wb.Quantize(weight_bits=4)).key != Recipe(step).key
    assert Recipe(step).label() == "W4 without embeddings"


def test_sensitivity_lists_the_head_with_what_it_gets():
    task = tiny_task("llama")
    found = layers_of(task.model, Recipe(wb.Quantize(weight_bits=4)))
    assert found["lm_head"].steps[0].weight_bits == 8
    assert (
        layers_of(task.model, Recipe(wb.Quantize(weight_bits=4, embeddings="dense"))).get("lm_head") is None
    )
    apart = layers_of(tiny_task("untied").model, Recipe(wb.Quantize(weight_bits=4)))
    assert all([step.weight_bits for step in apart[name]] == [8] for name in TABLES["untied"])
    dense = layers_of(tiny_task("untied").model, Recipe(wb.Quantize(weight_bits=4, embeddings="dense")))
    assert not TABLES["untied"] & set(dense)
