"""Structure that is really removed: the smaller model is the masked one, whatever the architecture, and works
on."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from structure_models import ALL, grouped_llama, logits, masked, task_of
from tiny_tasks import same, spread, tiny_task, weights
from torch import nn

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.compress.pruning.prunable_units import removed_count
from workbench.measure.size import counted_sizes, sizes
from workbench.measure.weight_histograms import weight_changes
from workbench.recipe import Recipe
from workbench.tasks import score

CASES = [
    (name, pattern)
    for name in ("vit", "llama", "grouped", "gpt2", "scaled", "bert", "distilbert")
    for pattern in ("heads", "neurons")
]
CASES += [("resnet", "channels"), ("bottleneck", "channels")]
BLOCKS = ("vit", "grouped", "scaled", "distilbert", "resnet", "bottleneck")


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"allocation": "global", "criterion": "wanda"},
        {"criterion": "taylor"},
        {"criterion": "fisher"},
        {"criterion": "random", "sparsity": 0.3},
    ],
    ids=str,
)
def test_removing_units_is_masking_them(name, pattern, options, device):
    task = task_of(name, device)
    before, config = weights(task.model), task.model.config.to_json_string()
    compressed = compress(task, Recipe(wb.Prune(**{"sparsity": 0.5, "pattern": pattern, **options})))
    assert same(weights(task.model), before)
    assert task.model.config.to_json_string() == config
    assert sum(p.numel() for p in compressed.model.parameters()) < sum(
        p.numel() for p in task.model.parameters()
    )
    assert any(layer.columns is not None for layer in compressed.layers)
    expected = logits(task, masked(task, compressed))
    assert not torch.allclose(expected, logits(task, task.model), atol=1e-3)
    torch.testing.assert_close(
        logits(task, compressed.model), expected, atol=2e-5 * float(expected.abs().max()), rtol=1e-4
    )


class Skip(nn.Module):
    """A block that hands on what it is given, in the form in which the real one does."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *given, **named):
        hidden, real = given[0] if given else named["hidden_states"], self.block(*given, **named)
        return hidden if isinstance(real, torch.Tensor) else (hidden, *real[1:])


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_removing_blocks_is_skipping_them(name, criterion, device):
    task = task_of(name, device)
    before = weights(task.model)
    compressed = compress(task, Recipe(wb.Prune(sparsity=0.5, pattern="layers", criterion=criterion)))
    assert same(weights(task.model), before)
    gone = {
        row.outcome.split("removed with block ")[1].split(":")[0]
        for row in compressed.report
        if row.outcome.startswith("removed")
    }
    reference = copy.deepcopy(task.model)
    for block in gone:
        parent, _, place = block.rpartition(".")
        reference.get_submodule(parent)[int(place)] = Skip(reference.get_submodule(block))
    assert (
        len(gone)
        == {"vit": 1, "distilbert": 1, "resnet": 1, "grouped": 2, "scaled": 2, "bottleneck": 1}[name]
    )
    torch.testing.assert_close(logits(task, compressed.model), logits(task, reference), atol=1e-5, rtol=1e-5)
    for row in compressed.report:
        inside = any(row.name.startswith(f"{block}.") for block in gone)
        assert (row.relative_error == 1.0) == inside
        assert row.weights == 0 or not inside


@pytest.mark.parametrize(("name", "pattern"), [*CASES, *((name, "layers") for name in BLOCKS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_holds_for_every_method_holds_for_structure(name, pattern, dtype, device, monkeypatch):
    task = task_of(name, device, dtype)
    recipe = Recipe(wb.Prune(sparsity=0.5, pattern=pattern))
    once, shared = compress(task, recipe), compress(task, recipe, shared=True)
    monkeypatch.setattr(sys.modules["workbench.compress.core.batch"], "ROOM", {})
    monkeypatch.setattr(Statistics, "once", lambda _, __, work, **_how: work())  # nothing is kept
    again = compress(task, recipe)
    assert same(weights(once.model), weights(shared.model))
    assert same(weights(once.model), weights(again.model))
    assert once.report == shared.report == again.report
    theirs = {
        tensor.data_ptr() for tensor in [*task.model.parameters(), *task.model.buffers()] if tensor.numel()
    }
    assert not any(
        tensor.data_ptr() in theirs
        for tensor in [*once.model.parameters(), *once.model.buffers()]
        if tensor.numel()
    )
    assert not any(parameter.requires_grad for parameter in once.model.parameters())
    assert not once.model.training
    parameters = {name for name, _ in task.model.named_parameters()}  # those that are no layer's
    assert [row.name for row in once.report if row.name not in parameters] == [
        name
        for name, module in task.model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) >= 2
    ]
    assert all(row.outcome for row in once.report)
    assert {parameter.dtype for parameter in once.model.parameters()} == {dtype}
    assert once.model.config is not task.model.config
    assert not any(vars(module).get("config") is task.model.config for module in once.model.modules())


@pytest.mark.parametrize("name", ["vit", "grouped"])
def test_the_block_that_turns_its_input_least_goes(name):
    task = task_of(name)
    seen: dict[int, list[torch.Tensor]] = {}
    blocks = task.model.vit.layers if name == "vit" else task.model.model.layers
    for place, block in enumerate(blocks):

        def hook(_, given, out, place=place):
            a, b = given[0].double(), (out if isinstance(out, torch.Tensor) else out[0]).double()
            seen.setdefault(place, []).append((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1))

        block.register_forward_hook(hook)
    with torch.no_grad():
        task.kind.logits(task.model, task.calibration)
    influence = [
        1 - torch.cat([x.flatten() for x in seen[place]]).mean().item() for place in range(len(blocks))
    ]
    for block in blocks:
        block._forward_hooks.clear()
    compressed = compress(task, Recipe(wb.Prune(sparsity=0.4, pattern="layers")))
    weakest = min(range(len(influence)), key=influence.__getitem__)
    row = next(row for row in compressed.report if row.weights == 0)
    assert f"layers.{weakest}." in row.name
    assert f"block influence {influence[weakest]:.3g} (1 of {len(blocks)} blocks removed" in row.outcome


def test_the_group_of_heads_with_the_smallest_norm_goes_and_takes_its_keys_and_values_along():
    task = task_of("grouped")
    compressed = compress(task, Recipe(wb.Prune(sparsity=0.5, pattern="heads")))
    for index, block in enumerate(task.model.model.layers):
        norms = []
        for group in range(2):
            wide, narrow = slice(16 * group, 16 * group + 16), slice(8 * group, 8 * group + 8)
            matrices = [
                block.self_attn.q_proj.weight[wide],
                block.self_attn.k_proj.weight[narrow],
                block.self_attn.v_proj.weight[narrow],
                block.self_attn.o_proj.weight[:, wide],
            ]
            norms.append(sum(float((matrix.double() ** 2).sum()) for matrix in matrices) ** 0.5)
        kept = max(range(2), key=norms.__getitem__)
        attention = compressed.model.model.layers[index].self_attn
        assert torch.equal(attention.q_proj.weight, block.self_attn.q_proj.weight[16 * kept : 16 * kept + 16])
        assert torch.equal(attention.k_proj.bias, block.self_attn.k_proj.bias[8 * kept : 8 * kept + 8])
        assert torch.equal(
            attention.o_proj.weight, block.self_attn.o_proj.weight[:, 16 * kept : 16 * kept + 16]
        )
        assert torch.equal(attention.o_proj.bias, block.self_attn.o_proj.bias)
        row = next(row for row in compressed.report if row.name == f"model.layers.{index}.self_attn.k_proj")
        assert (
            row.outcome
            == f"1 of 2 key-value groups of 2 heads of model.layers.{index}.self_attn removed by magnitude:"
            f" {1 - kept}"
        )
        assert (row.shape, row.weights) == ((16, 32), 256)


def test_query_heads_go_evenly_where_that_is_nearer_to_what_was_asked():
    task = tiny_task("llama", model=spread(grouped_llama(heads=8, shared=2)))
    compressed = compress(task, Recipe(wb.Prune(sparsity=0.25, pattern="heads")))
    attention = compressed.model.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features, attention.num_key_value_groups) == (
        24,
        8,
        3,
    )
    assert (
        "1 of 4 query heads of key-value head 1 of model.layers.0.self_attn removed"
        in {row.name: row.outcome for row in compressed.report}["model.layers.0.self_attn.q_proj"]
    )
    assert (
        compressed.model.config.num_attention_heads == 8
    )  # 32 is not divisible by 6: configurations refuse that, so the export says it
    torch.testing.assert_close(
        logits(task, compressed.model), logits(task, masked(task, compressed)), atol=1e-4, rtol=1e-4
    )


@given(st.integers(1, 300), st.floats(0, 0.999))
def test_the_number_of_units_is_the_nearest_whole_one_and_one_stays(units, sparsity):
    gone = removed_count(units, sparsity)
    assert 0 <= gone < units
    assert abs(gone - sparsity * units) <= min(abs(count - sparsity * units) for count in range(units)) + 1e-6


@pytest.mark.parametrize(
    ("name", "pattern", "count"),
    [("grouped", "neurons", 72), ("vit", "neurons", 64), ("resnet", "channels", 64)],
)
def test_global_ranks_units_over_all_blocks_and_leaves_one_in_each(name, pattern, count):
    task = task_of(name)
    for parameter in list(task.model.parameters())[::3]:
        parameter.mul_(0.05)  # blocks that matter less
    for sparsity in (0.3, 0.95):
        compressed = compress(
            task,
            Recipe(wb.Prune(sparsity=sparsity, pattern=pattern, criterion="fisher", allocation="global")),
        )
        said = {
            text
            for row in compressed.report
            for part in row.outcome.split("; ")
            if f" {pattern} of " in (text := part.split(" removed by")[0])
        }
        numbers = [(int(text.split()[0]), int(text.split()[2])) for text in said]
        assert sum(of for _, of in numbers) == count
        wanted = round(sparsity * sum(of for _, of in numbers))
        assert sum(gone for gone, _ in numbers) == min(wanted, sum(of - 1 for _, of in numbers))
        assert all(gone < of for gone, of in numbers)
        assert len({gone / of for gone, of in numbers}) > 1 or sparsity == 0.95


def test_neurons_that_are_always_zero_change_nothing(device):
    for reconstruct in (False, True):
        task = task_of("grouped", device)
        for layer in task.model.model.layers:
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight[5:17] = 0
            layer.mlp.down_proj.weight[:, 5:17] *= 1e-3  # by norm the dead ones are the least
        compressed = compress(
            task, Recipe(wb.Prune(sparsity=0.5, pattern="neurons", reconstruct=reconstruct))
        )
        assert compressed.model.config.intermediate_size == 12
        assert (
            "removed by magnitude: 5-16"
            in {row.name: row.outcome for row in compressed.report}["model.layers.0.mlp.up_proj"]
        )
        torch.testing.assert_close(
            logits(task, compressed.model), logits(task, task.model), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("name", "pattern", "reader"),
    [
        ("grouped", "neurons", "model.layers.0.mlp.down_proj"),
        ("gpt2", "heads", "transformer.h.0.attn.c_proj"),
        ("resnet", "channels", "resnet.encoder.stages.0.layers.0.layer.1.convolution"),
    ],
)
def test_reconstruction_is_the_least_squares_solution(name, pattern, reader):
    task = task_of(name)
    rows: list[torch.Tensor] = []
    module = task.model.get_submodule(reader)

    def keep(_, given):
        rows.append(
            nn.functional.unfold(given[0].double(), 3, padding=1).transpose(1, 2).flatten(0, 1)
            if given[0].ndim == 4
            else given[0].double().flatten(0, 1)
        )

    handle = module.register_forward_pre_hook(keep)
    with torch.no_grad():
        task.kind.logits(task.model, task.calibration)
    handle.remove()
    refitted = compress(task, Recipe(wb.Prune(sparsity=0.5, pattern=pattern, reconstruct=True)))
    plain = compress(task, Recipe(wb.Prune(sparsity=0.5, pattern=pattern)))
    layer, cut = ({each.origin: each for each in result.layers}[reader] for result in (refitted, plain))
    inputs = torch.cat(rows)
    dense = (
        layer.as_matrix(module.weight).double()
        if layer.rows is None
        else layer.as_matrix(module.weight).double()[layer.rows]
    )
    kept = inputs[:, layer.columns]
    missing = inputs @ dense.t() - kept @ dense[:, layer.columns].t()
    ridge = (1e-4 * kept.square().mean() * len(inputs)) ** 0.5
    stacked = torch.cat([kept, ridge * torch.eye(kept.shape[1]).double()])
    target = torch.cat([missing, torch.zeros(kept.shape[1], len(dense)).double()])
    expected = dense[:, layer.columns] + torch.linalg.lstsq(stacked, target).solution.t()
    torch.testing.assert_close(layer.matrix().double(), expected, atol=1e-4, rtol=1e-3)

    def loss(matrix):
        return float((kept @ matrix.double().t() - inputs @ dense.t()).square().mean())

    assert loss(layer.matrix()) < 0.95 * loss(cut.matrix())


def test_the_cache_of_keys_and_values_finds_its_layers(device):
    task = task_of("grouped", device)
    compressed = compress(
        task, Recipe(wb.Prune(sparsity=0.4, pattern="layers"), wb.Prune(sparsity=0.5, pattern="heads"))
    ).model
    ids = task.evaluation.inputs["input_ids"][:3].to(device)
    cached, plain = (
        compressed.generate(
            ids,
            max_new_tokens=6,
            do_sample=False,
            use_cache=use,
            eos_token_id=None,
            attention_mask=torch.ones_like(ids),
        )
        for use in (True, False)
    )
    assert torch.equal(cached, plain)
    assert cached.shape[1] == ids.shape[1] + 6
    assert [layer.self_attn.layer_idx for layer in compressed.model.layers] == [0, 1]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_other_step_works_on_what_is_left(name, dtype, device):
    task = task_of(name, device, dtype)
    before = weights(task.model)
    structure = [wb.Prune(sparsity=0.5, pattern=pattern) for pattern in ALL[name]]
    for rest in (
        [
            wb.LowRank(rank_ratio=0.3),
            wb.Prune(sparsity=0.5, criterion="wanda"),
            wb.Quantize(weight_bits=4),
            wb.Distill(temperature=2, steps=2),
        ],
        [
            wb.Prune(sparsity=0.5, criterion="sparsegpt"),
            wb.Quantize(weight_bits=4),
            wb.Repair(repair_ratio=0.1),
        ],
    ):
        once, twice = (compress(task, Recipe(*structure, *rest)) for _ in range(2))
        assert same(weights(once.model), weights(twice.model))
        assert once.report == twice.report
        assert same(weights(task.model), before)
        assert counted_sizes(once.model, once.layers) == sizes(once.model, once.layers)
        for layer in once.layers:
            layer.check()
        assert torch.isfinite(score(task.kind, once.model, task.evaluation.to(device)).loss).all()
        stored = sum(layer.parameter.numel() for layer in once.layers)
        named = {layer.origin for layer in once.layers}
        assert sum(row.weights for row in once.report if row.name in named or not row.weights) == stored


def test_what_a_later_step_knows_of_the_inputs_is_cut_to_those_that_are_left():
    task = task_of("grouped")
    recipe = Recipe(wb.Prune(sparsity=0.5, pattern="neurons"), wb.Prune(sparsity=0.5, criterion="wanda"))
    compressed = compress(task, recipe)
    layer = {each.origin: each for each in compressed.layers}["model.layers.1.mlp.down_proj"]
    norms = Statistics(task).second_moment(layer.origin).diagonal().sqrt()[layer.columns]
    dense = task.model.model.layers[1].mlp.down_proj.weight[:, layer.columns]
    for row in range(len(dense)):
        best = torch.topk(dense[row].abs() * norms, 6).indices.sort().values
        assert torch.equal(layer.mask[row].nonzero().flatten(), best)


@pytest.mark.parametrize(
    ("name", "pattern"), [("vit", "heads"), ("vit", "layers"), ("resnet", "channels"), ("gpt2", "neurons")]
)
def test_histograms_count_what_was_removed_as_zero(name, pattern):
    task = task_of(name)
    compressed = compress(task, Recipe(wb.Prune(sparsity=0.5, pattern=pattern)))
    rows = {row.name: row for row in compressed.report}
    for change in weight_changes(task.model, compressed):
        if rows[change.name].relative_error is None:
            continue  # it shares the weight of another
        dense = task.model.get_submodule(change.name).weight
        assert sum(change.after) + change.zeros_after == dense.numel()
        assert change.zeros_after - change.zeros_before == dense.numel() - rows[change.name].weights


def test_a_group_penalty_makes_units_small_before_they_go():
    task = task_of("vit")
    options = {
        "sparsity": 0.5,
        "pattern": "neurons",
        "train_steps": 20,
        "train_rate": 1e-2,
        "train_batch": 16,
    }
    weak, strong = (compress(task, Recipe(wb.Prune(penalty=penalty, **options))) for penalty in (1e-8, 0.1))

    def size(result):
        return sum(float(layer.parameter.norm()) for layer in result.layers if ".fc" in layer.origin)

    assert size(strong) < 0.9 * size(weak)
    assert len(strong.curve) == 20
