"""Models with structure removed, as files: the same bits back, ordinary configurations where they can say it,
bytes known before."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch
from structure_models import ALL, grouped_llama, logits, task_of
from tiny_tasks import spread, tiny_task

import workbench as wb
from workbench.bench import Bench
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.compress.outlines import after
from workbench.compress.pruning.predicted.structured_shapes import anatomy_of
from workbench.export import export
from workbench.measure.size import sizes
from workbench.recipe import Recipe
from workbench.shapes.outline import Outline

CASES = [(name, pattern) for name, patterns in ALL.items() for pattern in (*patterns, "+".join(patterns))]
REPAIRED = (wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4), wb.Repair(repair_ratio=0.1))
LATER = (wb.LowRank(rank_ratio=0.3), wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4))


def steps(patterns: str, **options) -> list[wb.Prune]:
    return [
        wb.Prune(**{"sparsity": 0.5, "pattern": pattern, **({} if pattern == "layers" else options)})
        for pattern in patterns.split("+")
    ]


@functools.cache
def dense_point():
    """Return one measurement, for exports that are only about tensors."""
    with tempfile.TemporaryDirectory() as folder:
        return Bench(
            tiny_task("vit"), device="cpu", ledger=Path(folder) / "x.journal", progress=False
        ).measure(Recipe())


@pytest.mark.parametrize(("name", "patterns"), CASES)
@pytest.mark.parametrize(
    ("allocation", "later"),
    [("uniform", ()), ("global", ()), ("global", LATER), ("uniform", REPAIRED)],
    ids=["uniform", "global", "and low rank", "and repair"],
)
def test_it_loads_back_bit_for_bit(name, patterns, allocation, later, tmp_path):
    task = task_of(name)
    recipe = Recipe(*steps(patterns, allocation=allocation), *later)
    compressed = compress(task, recipe)
    loaded = wb.load(
        export(task, compressed, dataclasses.replace(dense_point(), recipe=recipe), tmp_path / "out")
    )
    assert torch.equal(logits(task, loaded), logits(task, compressed.model))
    expected = compressed.model.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert sum(p.numel() for p in loaded.parameters()) == sum(
        p.numel() for p in compressed.model.parameters()
    )


PLAIN = [
    ("grouped", "neurons"),
    ("grouped", "layers"),
    ("grouped", "heads"),
    ("vit", "heads"),
    ("vit", "heads+neurons+layers"),
    ("scaled", "neurons"),
    ("bert", "neurons"),
    ("distilbert", "layers"),
    ("distilbert", "neurons"),
    ("resnet", "channels"),
    ("resnet", "layers+channels"),
    ("bottleneck", "channels"),
]


@pytest.mark.parametrize(("name", "patterns"), PLAIN)
def test_its_configuration_alone_builds_it(name, patterns, tmp_path):
    task = task_of(name)
    compressed = compress(task, Recipe(*steps(patterns)))
    out = export(task, compressed, dense_point(), tmp_path / "out")
    assert json.loads((out / "compression.json").read_text())["structure"] == {}
    config = type(task.model.config).from_dict(json.loads((out / "config.json").read_text()))
    model = type(task.model)(config).eval()
    model.load_state_dict(compressed.model.state_dict())
    assert torch.equal(logits(task, model), logits(task, compressed.model))
    compressed.model.save_pretrained(tmp_path / "plain")
    again = type(task.model).from_pretrained(tmp_path / "plain", local_files_only=True)
    assert torch.equal(logits(task, again.eval()), logits(task, compressed.model))


@pytest.mark.parametrize(("name", "patterns"), CASES)
@pytest.mark.parametrize("later", [(), LATER[:2]], ids=["alone", "and more"])
def test_the_bytes_are_known_before_it_runs(name, patterns, later):
    task = task_of(name)
    statistics = Statistics(task)
    recipe = Recipe(*steps(patterns), *later)
    outline = after(Outline.of(task.model, None, anatomy_of(task, statistics)), recipe)
    compressed = compress(task, recipe, statistics)
    if name == "bottleneck" and "layers" in patterns:
        assert outline is None  # two blocks may go, of two sizes: shapes do not say which does
        return
    assert outline is not None
    assert outline.exact()
    assert outline.file_bytes() == sizes(compressed.model, compressed.layers).file_bytes
    assert sum(weight.count for weight in outline.weights) == sum(
        layer.parameter.numel() for layer in compressed.layers
    )


def test_what_shapes_do_not_say_is_unknown():
    task = task_of("vit")
    recipe = Recipe(wb.Prune(pattern="neurons", allocation="global"))
    assert after(Outline.of(task.model, None, anatomy_of(task, Statistics(task))), recipe) is None
    assert (
        after(Outline.of(task.model), Recipe(wb.Prune(pattern="heads"))) is None
    )  # nobody told it where the heads are


def test_targets_count_in_the_prediction():
    task = task_of("vit")
    for targets in (("vit.layers.0.*",), ("!vit.layers.1.mlp.fc2",), ("re:fc1$",)):
        recipe = Recipe(wb.Prune(pattern="neurons", targets=targets))
        compressed = compress(task, recipe)
        assert (
            after(Outline.of(task.model, None, anatomy_of(task, Statistics(task))), recipe).file_bytes()
            == sizes(compressed.model, compressed.layers).file_bytes
        )


def test_the_prediction_of_speed_follows_the_multiply_adds(tmp_path):
    bench = Bench(task_of("vit"), device="cpu", ledger=tmp_path / "points.journal", progress=False)
    predictor = bench.predictor()
    prediction = predictor.predict(Recipe(wb.Prune(pattern="layers")))
    assert prediction.bytes_exact
    assert prediction.no_kernel == ()  # nothing is multiplied by zero
    dense, less = (
        predictor.outline.multiply_adds(),
        after(predictor.outline, Recipe(wb.Prune(pattern="layers"))).multiply_adds(),
    )
    assert prediction.speedup.value == pytest.approx(dense / less)
    point = bench.measure(Recipe(wb.Prune(pattern="layers"), wb.Prune(sparsity=0.5)))
    assert "unstructured" in point.no_kernel[0]


def test_a_number_of_heads_that_configurations_refuse_is_in_the_manifest(tmp_path):
    task = tiny_task("llama", model=spread(grouped_llama(heads=8, shared=2)))
    compressed = compress(task, Recipe(wb.Prune(sparsity=0.25, pattern="heads")))
    out = export(task, compressed, dense_point(), tmp_path / "out")
    assert json.loads((out / "compression.json").read_text())["structure"][
        "model.layers.0.self_attn.q_proj"
    ] == {"rows": 24}
    assert torch.equal(logits(task, wb.load(out)), logits(task, compressed.model))
    ids = task.evaluation.inputs["input_ids"][:2]
    assert torch.equal(
        wb.load(out).generate(ids, max_new_tokens=4, do_sample=False),
        compressed.model.generate(ids, max_new_tokens=4, do_sample=False),
    )
