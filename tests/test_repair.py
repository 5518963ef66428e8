"""Repair: the low-rank term against a direct solve, what it may not touch, and that it counts in every
size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import recorded_inputs
from tiny_tasks import same, tiny_task, weights

import workbench as wb
from workbench.compress import compress
from workbench.compress.low_rank.repair import best_term, same_budget
from workbench.compress.outlines import after
from workbench.compress.registry import METHODS
from workbench.errors import CompressionError, RecipeError
from workbench.measure.size import counted_sizes, sizes
from workbench.modules.factored import Repaired
from workbench.recipe import Recipe
from workbench.shapes.outline import Outline

PRUNE, QUANTIZE = wb.Prune(sparsity=0.5, pattern="2:4"), wb.Quantize(weight_bits=3, grid="symmetric")


def matrix(module: torch.nn.Module) -> torch.Tensor:
    weight = module.weight.detach().double().cpu()
    return weight.t() if type(module).__name__ == "Conv1D" else weight.flatten(1)


def term(repaired: Repaired) -> torch.Tensor:
    """Return the term beside the weight, [outputs, inputs], in float64."""
    return matrix(repaired.second) @ matrix(repaired.first)


def direct(lost: torch.Tensor, moment: torch.Tensor, rank: int) -> torch.Tensor:
    """Return EoRA's own construction in float64: project the error into the inputs' eigenspace, truncate,
    project back."""
    values, vectors = torch.linalg.eigh(moment)
    scale = vectors * values.clamp_min(0).sqrt()
    left, kept, right = torch.linalg.svd(lost @ scale, full_matrices=False)
    return (left[:, :rank] * kept[:rank]) @ right[:rank] @ torch.linalg.pinv(scale, rtol=1e-10)


def repaired(task, compressed):
    """Yield (name, dense matrix, module) of every layer that was repaired."""
    modules = [
        (row.name, matrix(task.model.get_submodule(row.name)), compressed.model.get_submodule(row.name))
        for row in compressed.report
        if "repaired" in row.outcome
    ]
    assert len(modules) >= 3
    return modules


@pytest.mark.parametrize(
    "before", [(PRUNE,), (QUANTIZE,), (PRUNE, QUANTIZE)], ids=["pruned", "quantized", "both"]
)
@pytest.mark.parametrize("ratio", [0.02, 0.2])
def test_the_term_is_the_one_of_least_output_error(sort, device, before, ratio):
    task = tiny_task(sort, device)
    inputs = recorded_inputs(task)
    plain = compress(task, Recipe(*before))
    compressed = compress(task, Recipe(*before, wb.Repair(repair_ratio=ratio)))
    for name, dense, module in repaired(task, compressed):
        rank = max(1, round(ratio * min(dense.shape)))
        assert len(module.first.weight) == rank
        base = matrix(plain.model.get_submodule(name))
        assert torch.equal(matrix(module.base), base)  # untouched
        rows = inputs[name].double().cpu()
        moment = rows.t() @ rows / len(rows)
        error = {
            what: float((rows @ (dense - base - extra).t()).norm())
            for what, extra in (
                ("none", torch.zeros_like(base)),
                ("made", term(module)),
                ("direct", direct(dense - base, moment, rank)),
            )
        }
        assert error["made"] == pytest.approx(error["direct"], rel=1e-3, abs=1e-5), name
        assert error["made"] <= error["none"] * (1 + 1e-6)
        best = torch.linalg.svdvals(rows @ (dense - base).t())[rank:].norm()
        assert error["made"] == pytest.approx(float(best), rel=2e-3, abs=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    outputs=st.integers(1, 9),
    inputs=st.integers(1, 9),
    seen=st.integers(1, 12),
    rank=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_a_term_never_makes_it_worse_and_full_rank_leaves_no_error(outputs, inputs, seen, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    lost = torch.randn(1, outputs, inputs, generator=generator)
    rows = torch.randn(seen, inputs, generator=generator)  # fewer rows than inputs: a singular moment
    rank = min(rank, outputs, inputs)
    left, right = best_term(lost, [rows.t() @ rows / seen], rank)
    assert (left.shape, right.shape) == ((1, outputs, rank), (1, rank, inputs))
    before, after = rows @ lost[0].t(), rows @ (lost[0] - left[0] @ right[0]).t()
    assert float(after.norm()) <= float(before.norm()) * (1 + 1e-5)
    assert float(after.norm()) == pytest.approx(
        float(torch.linalg.svdvals(before.double())[rank:].norm()), rel=1e-3, abs=2e-4
    )
    if rank == min(outputs, inputs):
        assert torch.allclose(left[0] @ right[0], lost[0], atol=1e-3)


def test_nothing_lost_and_nothing_seen_are_no_trouble():
    nothing = best_term(torch.zeros(2, 4, 6), [torch.eye(6)] * 2, 2)
    unseen = best_term(torch.ones(1, 6, 4), [torch.zeros(4, 4)], 2)
    assert all(torch.isfinite(part).all() for part in (*nothing, *unseen))
    assert not (nothing[0] @ nothing[1]).any()


def test_masks_grids_and_bytes(sort, device):
    task = tiny_task(sort, device)
    recipe = Recipe(PRUNE, QUANTIZE, wb.Repair(repair_ratio=0.1))
    plain, compressed = compress(task, Recipe(PRUNE, QUANTIZE)), compress(task, recipe)
    rows = {row.name: row for row in compressed.report}
    more = 0
    for name, dense, module in repaired(task, compressed):
        rank = len(module.first.weight)
        base = next(layer for layer in compressed.layers if layer.name == f"{name}.base")
        base.check()
        assert (base.mask is None) == bool(dense.shape[1] % 4)
        assert base.mask is None or (matrix(module.base)[~base.mask.cpu()] == 0).all()
        assert base.grid is not None
        assert rows[name].weights == dense.numel() + rank * sum(dense.shape)
        assert rows[name].bits == 3
        assert rows[name].rank is None
        assert rows[name].outcome.endswith(f"repaired by rank {rank}")
        assert rows[name].relative_error == pytest.approx(
            float((matrix(module.base) + term(module) - dense).norm() / dense.norm()), rel=1e-4
        )
        more += 4 * rank * sum(dense.shape)
        assert module.weight.shape == task.model.get_submodule(name).weight.shape
        whole = matrix(module.base) + term(module)
        seen = (
            module.weight.double().cpu().t()
            if type(module.base).__name__ == "Conv1D"
            else module.weight.double().cpu().flatten(1)
        )
        torch.testing.assert_close(seen, whole, rtol=1e-5, atol=1e-6)
    packed = sizes(compressed.model, compressed.layers)
    assert packed == counted_sizes(compressed.model, compressed.layers)
    assert packed.packed_bytes - sizes(plain.model, plain.layers).packed_bytes == more
    assert packed.theoretical_bytes - sizes(plain.model, plain.layers).theoretical_bytes == more
    predicted = after(Outline.of(task.model), recipe)
    assert predicted.file_bytes() >= packed.file_bytes
    only = Recipe(PRUNE, wb.Repair(repair_ratio=0.1))
    pruned = compress(task, only)
    assert after(Outline.of(task.model), only).exact()
    assert after(Outline.of(task.model), only).file_bytes() == sizes(pruned.model, pruned.layers).file_bytes


def test_the_module_adds_what_it_says(sort, device):
    task = tiny_task(sort, device)
    compressed = compress(task, Recipe(QUANTIZE, wb.Repair(repair_ratio=0.2)))
    inputs = recorded_inputs(task)
    for name, _, module in repaired(task, compressed):
        if isinstance(module.base, torch.nn.Conv2d):
            continue
        rows = inputs[name][:7].to(device)
        bias = 0 if module.bias is None else module.bias.double().cpu()
        torch.testing.assert_close(
            module(rows).double().cpu(),
            rows.double().cpu() @ (matrix(module.base) + term(module)).t() + bias,
            rtol=1e-4,
            atol=1e-5,
        )
    x = task.evaluation[:2].to(device)
    assert torch.isfinite(task.kind.logits(compressed.model, x)).all()


def test_bfloat16_still_gains(sort):
    task = tiny_task(sort, dtype=torch.bfloat16)
    inputs = recorded_inputs(task)
    compressed = compress(task, Recipe(PRUNE, wb.Repair(repair_ratio=0.1)))
    for name, dense, module in repaired(task, compressed):
        assert module.first.weight.dtype == torch.bfloat16
        rows = inputs[name].double()
        assert (rows @ (dense - matrix(module.base) - term(module)).t()).norm() < (
            rows @ (dense - matrix(module.base)).t()
        ).norm()


# --- sparse plus low rank


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_rounds_keep_the_budget_and_lose_less(sort, criterion, pattern):
    task = tiny_task(sort)
    inputs = recorded_inputs(task)
    prune = wb.Prune(sparsity=0.5, pattern=pattern, criterion=criterion)
    first = compress(task, Recipe(prune))
    error = []
    for rounds in (1, 12):
        compressed = compress(task, Recipe(prune, wb.Repair(repair_ratio=0.2, repair_rounds=rounds)))
        total = 0.0
        for name, dense, module in repaired(task, compressed):
            before, now = (matrix(m) == 0 for m in (first.model.get_submodule(name), module.base))
            assert int(now.sum()) == int(before.sum())
            if pattern == "2:4":
                assert ((~now).unflatten(1, (-1, 4)).sum(2) <= 2).all()
            elif criterion == "wanda":
                assert torch.equal(now.sum(1), before.sum(1))
            rows = inputs[name].double()
            total += float(
                (rows @ (dense - matrix(module.base) - term(module)).t()).square().sum()
                / (rows @ dense.t()).square().sum()
            )
        error.append(total)
    assert error[1] < error[0]


@given(seed=st.integers(0, 99), kept=st.integers(0, 12))
def test_the_same_budget_of_the_most_important(seed, kept):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(2, 3, 4, generator=generator)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, torch.randperm(12, generator=generator)[:kept]] = True
    mask = mask.view(2, 3, 4)
    whole = same_budget(importance, mask, None, by_row=False)
    assert whole.flatten(1).sum(1).tolist() == [kept, kept]
    for layer in range(2):
        inside, outside = importance[layer][whole[layer]], importance[layer][~whole[layer]]
        assert not len(inside) or not len(outside) or inside.min() >= outside.max()
    assert torch.equal(same_budget(importance, mask, None, by_row=True).sum(2), mask.sum(2))
    assert torch.equal(same_budget(importance, mask, (2, 4), by_row=False).sum(2), mask.sum(2))


# --- what does not go together

WRONG = [
    ((wb.Repair(),), "Repair needs something to repair: put it after Prune or Quantize"),
    ((wb.LowRank(rank_ratio=0.3), wb.Repair()), "Repair needs something to repair"),
    ((PRUNE, wb.Distill(), wb.Repair()), "Repair cannot follow Distill"),
    ((PRUNE, wb.Repair(), QUANTIZE), "Quantize cannot follow Repair"),
    ((QUANTIZE, wb.Repair(), wb.LowRank(rank_ratio=0.3)), "LowRank cannot follow Quantize"),
    ((PRUNE, wb.Repair(), wb.Prune(targets=("classifier",))), "Prune cannot follow Repair"),
    (
        (PRUNE, QUANTIZE, wb.Repair(repair_rounds=2)),
        "repair_rounds=2 prunes again after each fit, which would leave the grid of Quantize",
    ),
    (
        (wb.Prune(sparsity=0.5, criterion="sparsegpt"), wb.Repair(repair_rounds=2)),
        "chooses zeros again by magnitude or ria or wanda, not by 'sparsegpt'",
    ),
    (
        (wb.Prune(sparsity=0.5, pattern="heads"), wb.Repair(repair_rounds=2)),
        "pattern='heads' takes parts out",
    ),
]


@pytest.mark.parametrize(("steps", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_orders_that_cannot_work_are_refused(steps, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(*steps)


def test_what_was_not_touched_is_not_repaired_and_the_report_says_why():
    task = tiny_task("vit")
    compressed = compress(task, Recipe(wb.Prune(sparsity=0.5, targets=("*fc1",)), wb.Repair()))
    rows = {row.name: row.outcome for row in compressed.report}
    assert rows["vit.layers.0.mlp.fc1"] == "50% sparse by magnitude; repaired by rank 1"
    assert rows["vit.layers.0.mlp.fc2"] == "repair skipped: no earlier step pruned or quantized it"
    assert rows["classifier"] == "repair skipped: the output head stays dense unless targets name it"
    low = compress(
        task, Recipe(wb.LowRank(rank_ratio=0.3, targets=("*fc1",)), wb.Quantize(weight_bits=4), wb.Repair())
    )
    assert (
        "repair skipped: a factor of a low-rank layer"
        in {row.name: row.outcome for row in low.report}["vit.layers.0.mlp.fc1"]
    )
    with pytest.raises(CompressionError, match="fits no layer"):
        compress(task, Recipe(wb.Prune(sparsity=0.5, targets=("*fc1",)), wb.Repair(targets=("*fc2",))))


def test_the_head_is_repaired_when_it_is_named_and_trains():
    task = tiny_task("untied")
    every = ("*", "lm_head")
    recipe = Recipe(
        wb.Quantize(weight_bits=2, targets=every),
        wb.Repair(repair_ratio=0.1, targets=every),
        wb.Distill(steps=3, distill_batch=8),
    )
    compressed = compress(task, recipe)
    start = compress(task, Recipe(*list(recipe)[:2]))
    assert isinstance(compressed.model.lm_head, Repaired)
    assert not torch.equal(compressed.model.lm_head.first.weight, start.model.lm_head.first.weight)
    for layer in compressed.layers:
        layer.check()
    assert same(weights(compress(task, recipe).model), weights(compressed.model))


def test_infinite_weights_are_refused_by_name():
    task = tiny_task("vit")
    task.calibration.inputs["pixel_values"][5, 0, 2, 2] = torch.nan
    with pytest.raises(
        CompressionError,
        match=r"layer 'vit\.embeddings\.patch_embeddings\.projection' receives infinite or NaN inputs",
    ):
        compress(task, Recipe(PRUNE, wb.Repair()))


def test_the_slider_stands_between_quantize_and_distill():
    sliders = [step.slider for step in METHODS.steps()]
    assert sliders.index("weight_bits") < sliders.index("repair_ratio") < sliders.index("temperature")
    flat = METHODS.recipe({"sparsity": 0.5, "repair_ratio": 0.1, "weight_bits": 4, "temperature": 2})
    assert [step.kind() for step in flat] == ["prune", "quantize", "repair", "distill"]
    assert flat.label() == "50% sparse + W4 + repair 10% + distilled T2"
    assert METHODS.from_json(flat.to_json()) == flat
