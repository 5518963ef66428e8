"""Blocks of architectures with names and lists of their own: removing them is skipping them, and they come
back from files as they were."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from arch_models import ARCHITECTURES, arch_task
from structure_models import logits
from test_structure_export import dense_point
from torch import nn

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.compress.pruning.predicted.structured_shapes import anatomy_of
from workbench.errors import CompressionError
from workbench.export import export
from workbench.recipe import Recipe

SHARED = {
    "albert": "albert.encoder.albert_layer_groups: one block is run 3 times in a row: its weights are shared"
}
UNSAID = {"mobilevit": "but never be exported without them: no number of its configuration says"}
STAYS = {
    "modernbert": ("model.layers.0.attn.Wqkv", "it lacks attn_norm.weight, which the others hold"),
    "modernbert-mixed": ("model.layers.0.mlp.Wo", "it lacks attn_norm.weight, which the others hold"),
}
BLOCKS = [name for name in ARCHITECTURES if name not in {**SHARED, **UNSAID}]


class Skip(nn.Module):
    """A block that hands on what it is given, in the form in which the real one does."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *given, **named):
        hidden, real = given[0] if given else named["hidden_states"], self.block(*given, **named)
        return hidden if isinstance(real, torch.Tensor) else (hidden, *real[1:])


@pytest.mark.parametrize("name", BLOCKS)
def test_removing_blocks_is_skipping_them_and_they_come_back_from_files(name, tmp_path):
    task = arch_task(name)
    recipe = Recipe(wb.Prune(sparsity=0.5, pattern="layers"))
    compressed = compress(task, recipe)
    gone = {
        row.outcome.split("removed with block ")[1].split(":")[0]
        for row in compressed.report
        if "removed with block" in row.outcome
    }
    assert gone
    reference = copy.deepcopy(task.model)
    for block in gone:
        parent, _, place = block.rpartition(".")
        reference.get_submodule(parent)[int(place)] = Skip(reference.get_submodule(block))
    answers = logits(task, compressed.model)
    torch.testing.assert_close(answers, logits(task, reference), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(answers, logits(task, task.model), atol=1e-3)
    if name in STAYS:
        row, reason = STAYS[name]
        rows = {one.name: one.outcome for one in compressed.report}
        assert rows[row] == f"prune skipped: its block stays: {reason}"
    out = export(task, compressed, dataclasses.replace(dense_point(), recipe=recipe), tmp_path / "out")
    loaded = wb.load(out)
    assert torch.equal(logits(task, loaded), answers)
    assert json.loads((out / "config.json").read_text())  # an ordinary configuration says how many there are
    plain = type(task.model)(type(task.model.config).from_dict(json.loads((out / "config.json").read_text())))
    assert list(plain.state_dict()) == list(compressed.model.state_dict())


@pytest.mark.parametrize("name", {**SHARED, **UNSAID})
def test_what_cannot_lose_blocks_says_the_true_reason_before_anything_is_measured(name):
    task = arch_task(name)
    before = task.model.config.to_json_string()
    with pytest.raises(CompressionError, match={**SHARED, **UNSAID}[name]):
        compress(task, Recipe(wb.Prune(sparsity=0.5, pattern="layers")))
    assert task.model.config.to_json_string() == before


def test_blocks_are_found_once_a_bench_and_known_to_predictions():
    task = arch_task("gptneox")
    anatomy = anatomy_of(task, Statistics(task))
    assert anatomy.blocks() == {"gpt_neox.layers": [0, 1, 2]}
