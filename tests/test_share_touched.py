"""What share of a model a recipe touched, against a count of the tensors that really changed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tiny_tasks import SORTS, spread, tiny_task
from torch import nn

import workbench as wb
from widgets.figures.tables import notes_list, points_table, summary_table
from widgets.panes.history_view import row_of
from widgets.panes.verdict_strip import facts_of, notes_of
from widgets.session.state import Past
from workbench.bench import Bench
from workbench.compress import compress
from workbench.ledger.annotation import Annotation
from workbench.ledger.table import flat
from workbench.measure.card import card, verdict
from workbench.measure.measurement import Measurement
from workbench.measure.summary import layer_rows
from workbench.recipe import Recipe


def counted(before: nn.Module, after: nn.Module) -> tuple[int, int]:
    """Return (all weights, those of tensors that are no longer as they were), parameter by parameter."""
    now = dict(after.named_parameters(remove_duplicate=False))
    total = changed = 0
    for name, tensor in before.named_parameters():
        held = now.get(name)
        total += tensor.numel()
        if held is None or held.shape != tensor.shape or not torch.equal(held, tensor):
            changed += tensor.numel()
    return total, changed


@pytest.mark.parametrize("sort", [*SORTS, "bert", "untied"])
@pytest.mark.parametrize(
    "steps",
    [
        (),
        (wb.Prune(sparsity=0.5),),
        (wb.Quantize(weight_bits=3),),
        (wb.Quantize(weight_bits=4, targets=("re:.",)),),
        (wb.Prune(sparsity=0.5), wb.Distill(steps=2)),
        (
            wb.Prune(sparsity=0.5, targets=("re:[.]0[.]",)),
            wb.Quantize(weight_bits=4, targets=("re:[.]0[.]",)),
        ),
    ],
    ids=["dense", "sparse", "W3", "all that can be", "distilled", "one block"],
)
@pytest.mark.parametrize("shared", [True, False])
def test_it_is_what_a_count_of_changed_tensors_says(sort, steps, shared):
    task = tiny_task(sort)
    compressed = compress(task, Recipe(*steps), shared=shared)
    assert (compressed.coverage.weights, compressed.coverage.touched) == counted(task.model, compressed.model)
    left = compressed.coverage.untouched
    assert sum(part.weights for part in left) == compressed.coverage.weights - compressed.coverage.touched
    assert [part.weights for part in left] == sorted((part.weights for part in left), reverse=True)
    assert all(part.reason for part in left)


class Odd(nn.Module):
    """A classifier with weights of every sort that no method takes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 4, 16, 16))
        self.stages = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=1, groups=1) for _ in range(2))
        self.wide = nn.Conv1d(16, 16, 3, padding=1)
        self.head = nn.Linear(256, 4)
        self.config = None

    def forward(self, pixel_values, **_):
        x = pixel_values + self.table.mean(1, keepdim=True)
        for stage in self.stages:
            x = stage(x)
        logits = self.head(self.wide(x.squeeze(1)).flatten(1))
        return type("Out", (), {"logits": logits})()


def test_what_is_left_is_named_with_its_share_and_why():
    task = tiny_task("resnet", model=spread(Odd()))
    compressed = compress(task, Recipe(wb.Prune(sparsity=0.5, targets=("stages.*",))))
    total = 4 * 256 + 2 * 9 + 16 * 16 * 3 + 1024 + 2 + 16 + 4
    by_name = {part.name: part for part in compressed.coverage.untouched}
    assert (compressed.coverage.weights, compressed.coverage.touched) == (total, 18)
    assert by_name["head"].weights == by_name["table"].weights == 1024
    assert "Conv1d is not a" in by_name["wide"].reason
    assert "a parameter of Odd itself, not the weight" in by_name["table"].reason
    assert by_name["biases, norms and other vectors"].weights == 22
    assert compressed.coverage.little
    assert "only 0.6% of the model's weights are touched" in compressed.coverage.warning()
    assert "head with 35.9%" in compressed.coverage.warning()


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    where = tmp_path_factory.mktemp("share") / "points.journal"
    bench = Bench(tiny_task("untied"), device="cpu", ledger=where, progress=False)
    few = bench.measure(Recipe(wb.Quantize(weight_bits=4, targets=("*up_proj",))))
    most = bench.measure(Recipe(wb.Quantize(weight_bits=4, targets=("re:.",))))
    assert [row.coverage for row in Bench(bench.task, device="cpu", ledger=where).ledger.rows()] == [
        few.coverage,
        most.coverage,
    ]
    return few, most


def test_it_stands_wherever_a_point_does(points):
    few, most = points
    share = f"{few.coverage.share:.1%}"
    largest = few.coverage.untouched[0]
    assert few.coverage.little
    for page in (summary_table(few), points_table([few]), card(few), verdict(few)):
        assert share in page
    assert row_of(few, Past())["touched"] == share
    assert dict(facts_of(few, None))["touched"].startswith(share)
    assert flat(few, Annotation())["touched_fraction"] == few.coverage.share
    for said in (notes_list(few), card(few), " ".join(notes_of(few, None))):
        assert f"only {share} of the model" in said
        assert largest.name in said
        assert largest.reason.split("'")[0] in said
    assert not most.coverage.little
    for said in (notes_list(most), card(most), " ".join(notes_of(most, None))):
        assert "of the model's weights are touched" not in said
    row = next(row for row in layer_rows(few) if row["layer"] == "lm_head")
    assert row["share of weights"] == f"{64 * 16 / few.coverage.weights:.1%}"
    assert layer_rows(few)[-1]["layer"] == "biases, norms and other vectors"


def test_of_a_point_from_before_it_is_unknown_and_said_so(points):
    record = json.loads(points[0].to_json())
    del record["coverage"]
    old = Measurement.from_json(json.dumps(record))
    assert old.coverage is None
    assert dataclasses.replace(points[0], coverage=None).layers == old.layers
    for page in (summary_table(old), points_table([old]), card(old)):
        assert "unknown" in page
    assert dict(facts_of(old, None))["touched"].startswith("unknown")
    assert "touched" not in verdict(old)
    assert flat(old, Annotation())["touched_fraction"] is None
    assert Measurement.from_json(points[0].to_json()) == points[0]
