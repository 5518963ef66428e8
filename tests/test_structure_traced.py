"""Heads and neurons of any name or layout, found by experiment: removing them is masking them where they are
read, and they come back from files as they were."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from arch_models import ARCHITECTURES, arch_task
from moe_models import moe_task
from structure_models import logits
from test_structure_export import dense_point
from torch import nn

import workbench as wb
from workbench.bench import Bench
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.compress.outlines import after
from workbench.compress.pruning.predicted.structured_shapes import anatomy_of
from workbench.compress.pruning.tracing.units import find_traced
from workbench.errors import CompressionError
from workbench.export import export
from workbench.measure.size import sizes
from workbench.recipe import Recipe
from workbench.shapes.outline import Outline

ALIBI = r"it is given biases of positions \[4, 1, \d+\] with a part for every head \(as ALiBi's slopes\)"
REFUSED = {
    "bloom": ALIBI,
    "mpt": ALIBI,
    "codegen": "CodeGenForCausalLM does not run without its heads as if they were masked",
    "olmo2": r"its parameter q_norm.weight \[32\] belongs to several heads at once",
    "beit": "does not run without its heads",
    "swin": "does not run without its heads",
    "convnext": "has no heads that it can remove",
}
HEADS = [name for name in ARCHITECTURES if name not in REFUSED]
SIZES = {"gemma2": 8, "glm": 8, "mobilevit": 4}  # of a head, as the configurations say; else 32 / 4


def masked_where_read(task, compressed) -> nn.Module:
    """Return the dense model with hooks that set what left to zero as each layer reads it."""
    model = copy.deepcopy(task.model)
    for layer in compressed.layers:
        if layer.columns is None:
            continue
        module = model.get_submodule(layer.origin)
        width = module.weight.shape[0] if type(module).__name__ == "Conv1D" else module.weight.shape[1]
        stays = torch.zeros(width)
        stays[layer.columns] = 1.0
        module.register_forward_pre_hook(lambda _, given, stays=stays: (given[0] * stays, *given[1:]))
    return model


def assert_masked(task, compressed) -> torch.Tensor:
    answers, wanted = logits(task, compressed.model), logits(task, masked_where_read(task, compressed))
    torch.testing.assert_close(answers, wanted, atol=3e-5 * float(wanted.abs().max()), rtol=1e-4)
    assert float((wanted - logits(task, task.model)).abs().max()) > 1e-3 * float(wanted.abs().max())
    return answers


@pytest.mark.parametrize(
    ("name", "pattern"),
    [*((name, "heads") for name in HEADS), *((name, "neurons") for name in ARCHITECTURES)],
)
@pytest.mark.parametrize("sparsity", [0.5, 0.25])
def test_removing_is_masking_and_it_comes_back_from_files(name, pattern, sparsity, tmp_path):
    task = arch_task(name)
    before = {key: tensor.clone() for key, tensor in task.model.state_dict().items()}
    recipe = Recipe(wb.Prune(sparsity=sparsity, pattern=pattern))
    try:
        compressed = compress(task, recipe)
    except CompressionError as error:
        assert "is less than half of one" in str(error)  # noqa: PT017  one group of two, a quarter asked
        assert sparsity == 0.25
        return
    answers = assert_masked(task, compressed)
    cut = [layer for layer in compressed.layers if layer.columns is not None]
    if pattern == "heads" and name != "mobilevit":
        size = SIZES.get(name, 8)
        for layer in cut:
            heads = layer.columns.view(-1, size)
            assert torch.equal(heads, heads[:, :1] // size * size + torch.arange(size))
    assert all(torch.equal(tensor, before[key]) for key, tensor in task.model.state_dict().items())
    out = export(task, compressed, dataclasses.replace(dense_point(), recipe=recipe), tmp_path / "out")
    loaded = wb.load(out)
    assert torch.equal(logits(task, loaded), answers)
    expected = compressed.model.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("name", REFUSED)
def test_heads_that_cannot_go_are_refused_with_the_true_reason(name):
    task = arch_task(name)
    before, config = list(task.model.state_dict()), task.model.config.to_json_string()
    with pytest.raises(CompressionError, match=REFUSED[name]):
        compress(task, Recipe(wb.Prune(sparsity=0.5, pattern="heads")))
    assert list(task.model.state_dict()) == before
    assert task.model.config.to_json_string() == config


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("gptneox", lambda head: range(24 * head, 24 * head + 24)),  # q, k and v of a head side by side
        ("falcon", lambda head: range(24 * head, 24 * head + 24)),
        (
            "phi3",
            lambda head: [32 * part + 8 * head + i for part in range(3) for i in range(8)],
        ),  # q, then k, v
        ("modernbert", lambda head: [32 * part + 8 * head + i for part in range(3) for i in range(8)]),
    ],
)
def test_the_rows_of_a_head_are_those_that_the_models_code_gives_it(name, rows):
    task = arch_task(name)
    found = find_traced(task.model, task.kind, task.calibration, set())
    assert len(found.attentions) == len(found.neurons) == 3
    for attention in found.attentions:
        (part, columns) = attention.whole().parts
        for head in range(4):
            assert sorted(part.index[head].tolist()) == sorted(rows(head))
            assert columns.index[head].tolist() == list(range(8 * head, 8 * head + 8))


@pytest.mark.parametrize(
    ("name", "patterns"), [("gptneox", "heads+neurons+layers"), ("phi3-gqa", "neurons+heads")]
)
@pytest.mark.parametrize(
    "options", [{"criterion": "wanda"}, {"criterion": "taylor", "allocation": "global"}], ids=str
)
def test_several_structures_and_what_follows(name, patterns, options):
    task = arch_task(name)
    steps = [
        wb.Prune(sparsity=0.5, pattern=pattern, **({} if pattern == "layers" else options))
        for pattern in patterns.split("+")
    ]
    compressed = compress(task, Recipe(*steps, wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4)))
    assert torch.isfinite(logits(task, compressed.model)).all()
    for layer in compressed.layers:
        layer.check()


@pytest.mark.parametrize("pattern", ["heads", "neurons"])
def test_the_bytes_are_known_before_it_runs(pattern):
    task = arch_task("gptneox")
    statistics, recipe = Statistics(task), Recipe(wb.Prune(sparsity=0.5, pattern=pattern))
    outline = after(Outline.of(task.model, None, anatomy_of(task, statistics)), recipe)
    compressed = compress(task, recipe, statistics)
    assert outline.file_bytes() == sizes(compressed.model, compressed.layers).file_bytes


def test_it_is_measured_and_generates_as_without_a_cache(tmp_path):
    bench = Bench(arch_task("phi3-gqa"), device="cpu", ledger=tmp_path / "points.journal", progress=False)
    recipe = Recipe(wb.Prune(sparsity=0.5, pattern="heads"), wb.Prune(sparsity=0.5, pattern="neurons"))
    assert bench.measure(recipe).complete
    model = compress(bench.task, recipe).model
    ids = bench.task.evaluation.inputs["input_ids"][:2]
    asked = {
        "max_new_tokens": 4,
        "do_sample": False,
        "eos_token_id": None,
        "attention_mask": torch.ones_like(ids),
    }
    assert torch.equal(
        model.generate(ids, use_cache=True, **asked), model.generate(ids, use_cache=False, **asked)
    )


@pytest.mark.parametrize("name", ["Mixtral", "JetMoe", "DeepseekV3"])
@pytest.mark.parametrize("pattern", ["heads", "neurons", "layers"])
def test_models_with_experts_lose_structure_and_come_back_or_are_refused_before(name, pattern, tmp_path):
    task, recipe = moe_task(name), Recipe(wb.Prune(sparsity=0.5, pattern=pattern))
    task.model.config.architectures = [type(task.model).__name__]
    refused = {
        ("JetMoe", "heads"): "heads",
        ("JetMoe", "neurons"): "neurons",
        ("DeepseekV3", "heads"): "which rows of its products belong to which of 2 heads cannot be told",
    }
    if (name, pattern) in refused:
        with pytest.raises(CompressionError, match=refused[name, pattern]):
            compress(task, recipe)
        return
    compressed = compress(task, recipe)
    if pattern != "layers":
        assert_masked(task, compressed)
    out = export(task, compressed, dataclasses.replace(dense_point(), recipe=recipe), tmp_path / "out")
    assert torch.equal(logits(task, wb.load(out)), logits(task, compressed.model))
