"""Every registered method on every sort of layer, device and dtype: what must hold whatever the method
does."""

from __future__ import annotations

import dataclasses
import itertools
import sys

import pytest
import tiny_tasks
import torch
from tiny_tasks import same, tiny_task, weights

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.compress.registry import METHODS
from workbench.errors import CompressionError, RecipeError
from workbench.formats.number_formats import FORMATS
from workbench.measure.size import Sizes, counted_sizes, file_content, sizes
from workbench.modules.packing import pack_model
from workbench.recipe import Recipe, Step
from workbench.tasks import score

FIRST = wb.Prune(sparsity=0.3)  # what there is to recover for a method that cannot come first
SMALL = {
    "distill": {"steps": 3, "distill_batch": 8},
    "qat": {"qat_steps": 3, "qat_batch": 8},
    "transfer": {"transfer_steps": 3, "transfer_batch": 8},
}  # the slider, where it is among these, as well
BESIDE = {
    ("prune", "reconstruct", True): {"pattern": "neurons"},
    ("activations", "activation_scaling", "static"): {"activation_granularity": "tensor"},
}  # what a choice needs with it
CAUSAL = {"llama", "gpt2", "mixtral"}  # which have a cache
MLPS = {"vit", "llama", "gpt2"}  # whose neurons can go


def variants() -> dict[str, Recipe]:
    """Return one recipe for both ends of every slider and every choice of every option, read from the
    registry."""
    recipes: dict[str, Recipe] = {
        "2:4": Recipe(wb.Prune(pattern="2:4")),
        "1:4 wanda": Recipe(wb.Prune(sparsity=0.75, pattern="1:4", criterion="wanda")),
        "2:4 sparsegpt": Recipe(wb.Prune(pattern="2:4", criterion="sparsegpt")),
        "sparsegpt by sensitivity": Recipe(wb.Prune(criterion="sparsegpt", allocation="sensitivity")),
        "rounds": Recipe(
            wb.Prune(
                criterion="wanda", allocation="global", rounds=2, train_steps=2, train_batch=8, penalty=1e-4
            )
        ),
    }
    for method in METHODS.steps():
        small = SMALL.get(method.kind(), {})
        settings = [{method.slider: stop} for stop in (method.stops[0], method.stops[-1])]
        for name in method.options():
            settings += [
                {method.slider: method.stops[0], name: choice, **beside(method.kind(), name, choice)}
                for choice in method.choices(name)
            ]
        for setting in settings:
            step = method(**{**setting, **small})
            try:
                recipe = Recipe(step)
            except RecipeError:
                recipe = Recipe(wb.Quantize(weight_bits=3), step) if method is wb.QAT else Recipe(FIRST, step)
            recipes.setdefault(f"{method.kind()} {' '.join(map(str, setting.values()))}", recipe)
    return recipes


def beside(kind: str, name: str, choice: object) -> dict[str, object]:
    """Return the options that a choice needs with it: no choice is left out."""
    if name == "number_format" and FORMATS[choice].bits is not None:
        return {"weight_bits": FORMATS[choice].bits}
    return BESIDE.get((kind, name, choice), {})


VARIANTS = variants()
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("recipe", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_what_holds_for_every_method(sort, device, dtype, recipe):
    leave_out(sort, recipe)
    task = tiny_task(sort, device, dtype)
    before = weights(task.model)
    once, twice = compress(task, recipe), compress(task, recipe)
    assert same(weights(task.model), before)  # the given model is not changed
    assert not task.model.training
    assert same(weights(once.model), weights(twice.model))  # same recipe, same bits
    assert once.report == twice.report
    assert once.curve == twice.curve
    cast = recipe.get("quantize").format.cast if recipe.get("quantize") else None
    kept = cast is not None and torch.finfo(cast).eps <= torch.finfo(dtype).eps
    unchanged = same(weights(once.model), before) and answers(task, once.model) == answers(task, task.model)
    assert unchanged is kept  # a cast that loses no digit; activations and caches are no weights
    assert not any(parameter.requires_grad for parameter in once.model.parameters())
    assert not once.model.training
    for layer in once.layers:
        layer.check()
        assert layer.parameter.dtype == dtype
        assert layer.parameter.device.type == device
    measured, packed = sizes(once.model, once.layers), pack_model(once.model, once.layers)
    assert measured == counted_sizes(once.model, once.layers)
    assert measured == Sizes(
        packed.theoretical_bytes, packed.packed_bytes, len(file_content(packed))
    )  # the very file
    assert owns_everything(once.model, task.model)
    scores = score(task.kind, once.model, task.evaluation)
    assert torch.isfinite(scores.loss).all()
    listed = [row.name for row in once.report]
    weighty = [
        name
        for name, module in task.model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) >= 2
    ]
    ends = (".weight", ".bias")
    assert listed == [*weighty, *(n for n, _ in task.model.named_parameters() if not n.endswith(ends))]
    assert all(row.outcome for row in once.report)


def leave_out(sort, recipe):
    if recipe.get("prune") and recipe.get("prune").structured and sort not in MLPS:
        pytest.skip("it has no MLP whose neurons could go; its channels are tested with structure")
    if recipe.get("kvcache") and sort not in CAUSAL:
        pytest.skip("only language models have a cache; the refusal is tested with it")


def answers(task, model):
    return score(task.kind, model, task.evaluation).loss.tolist()


def owns_everything(model, given):
    theirs = {tensor.data_ptr() for tensor in [*given.parameters(), *given.buffers()] if tensor.numel()}
    return not any(
        tensor.data_ptr() in theirs for tensor in [*model.parameters(), *model.buffers()] if tensor.numel()
    )


@pytest.mark.parametrize("recipe", VARIANTS.values(), ids=VARIANTS.keys())
def test_sharing_what_no_step_changed_gives_the_same_bits_and_leaves_the_dense_model_alone(
    sort, device, recipe
):
    leave_out(sort, recipe)
    task = tiny_task(sort, device)
    before = weights(task.model)
    shared, own = compress(task, recipe, shared=True), compress(task, recipe)
    assert same(weights(shared.model), weights(own.model))
    assert shared.report == own.report
    assert same(weights(task.model), before)


def test_batches_of_any_size_give_the_same_bits(sort, monkeypatch):
    task = tiny_task(sort)
    recipe = Recipe(
        wb.LowRank(rank_ratio=0.4), wb.Prune(sparsity=0.5, criterion="wanda"), wb.Quantize(weight_bits=4)
    )
    whole = compress(task, recipe)
    monkeypatch.setattr(
        sys.modules["workbench.compress.core.batch"], "ROOM", {"cpu": 1}
    )  # one layer at a time
    alone = compress(task, recipe)
    assert same(weights(whole.model), weights(alone.model))
    assert whole.report == alone.report


def test_statistics_are_computed_once_and_change_nothing(sort):
    task = tiny_task(sort)
    kept = Statistics(task)
    calls: list[str] = []
    kept.progress = lambda what, *_: calls.append(what)
    recipes = [
        Recipe(wb.LowRank(rank_ratio=r, factorization=f))
        for r in (0.2, 0.45, 0.3)
        for f in ("svd", "whitened")
    ]
    recipes += [Recipe(wb.Prune(sparsity=s, criterion="wanda")) for s in (0.2, 0.8)]
    recipes += [
        Recipe(
            wb.LowRank(rank_ratio=0.3),
            wb.Prune(sparsity=0.5, criterion="wanda"),
            wb.Distill(temperature=2, steps=2),
        )
        for _ in range(2)
    ]
    for recipe in recipes:
        assert same(weights(compress(task, recipe, kept).model), weights(compress(task, recipe).model))
    assert calls.count("calibration") == 1 + -(-len(task.calibration) // task.batch_size)


# --- orders and combinations

STEPS = {
    "L": wb.LowRank(rank_ratio=0.4),
    "P": wb.Prune(sparsity=0.5, criterion="wanda"),
    "Q": wb.Quantize(weight_bits=4, grid="symmetric"),
    "R": wb.Repair(repair_ratio=0.1),
    "D": wb.Distill(temperature=2, steps=4, distill_batch=8, learning_rate=1e-2),
}


def orders() -> list[str]:
    """Return every order of two or more of the five steps that the rules allow.

    Where all is of low rank, nothing is repaired.
    """
    allowed = []
    for count in (2, 3, 4):
        for order in itertools.permutations("LPQRD", count):
            if {"L", "R"} <= set(order):
                continue
            try:
                Recipe(*(STEPS[name] for name in order))
            except RecipeError:
                continue
            allowed.append("".join(order))
    return allowed


def test_the_rules_allow_the_orders_that_keep_every_promise():
    assert orders() == [
        "LP",
        "LQ",
        "LD",
        "PQ",
        "PR",
        "PD",
        "QR",
        "QD",
        "LPQ",
        "LPD",
        "LQD",
        "LDP",
        "LDQ",
        "PQR",
        "PQD",
        "PRD",
        "PDQ",
        "QRD",
        "LPQD",
        "LPDQ",
        "LDPQ",
        "PQRD",
    ]


@pytest.mark.parametrize("order", orders())
def test_every_allowed_order_keeps_masks_grids_and_ranks(sort, device, order):
    task = tiny_task(sort, device)
    compressed = compress(task, Recipe(*(STEPS[name] for name in order)))
    reports = {row.name: row for row in compressed.report}
    dense = {row.name for row in compressed.report if "stays dense unless targets name it" in row.outcome}
    changed = [
        layer for layer in compressed.layers if layer.origin not in dense and layer.role in {"", "base"}
    ]
    assert changed
    for layer in changed:
        matrix = layer.matrix()
        if "P" in order:
            assert layer.mask is not None
            assert (matrix[~layer.mask] == 0).all()
            columns = matrix.shape[1]
            assert int((~layer.mask).sum()) == round(0.5 * matrix.numel())
            assert ((~layer.mask).sum(1) - 0.5 * columns).abs().max() <= 0.5
        if "Q" in order:
            for row, scale in zip(matrix, layer.grid.scale.float().flatten(), strict=True):
                codes = row / scale
                assert torch.allclose(codes, codes.round(), atol=1e-3)
                assert codes.min() >= -(1 << (layer.grid.bits - 1)) - 0.001  # the vocabulary's have 8 bits
                assert codes.max() <= (1 << (layer.grid.bits - 1)) - 0.999
            assert torch.equal(layer.grid.dequantize(), matrix)
        if "L" in order and layer.rank is not None:
            factors = [
                compressed.model.get_submodule(f"{layer.origin}.{index}").weight.detach().double().flatten(1)
                for index in range(2)
            ]
            assert (
                int(torch.linalg.matrix_rank(factors[1] @ factors[0]))
                <= layer.rank
                == reports[layer.origin].rank
            )
    if "L" in order:
        assert any(layer.rank is not None for layer in changed)


# --- targets


def test_targets_choose_layers_and_all_others_stay_bitwise(sort, device):
    task = tiny_task(sort, device)
    names = [layer.name for layer in compress(task, Recipe()).layers]
    chosen = names[1]
    for target in (chosen, f"re:^{chosen.replace('.', '[.]')}$", f"*{chosen[3:]}"):
        compressed = compress(task, Recipe(wb.Prune(sparsity=0.5, targets=(target,))))
        before, after = task.model.state_dict(), compressed.model.state_dict()
        assert [name for name in before if not torch.equal(before[name], after[name])] == [f"{chosen}.weight"]
        assert {row.name: row.sparsity for row in compressed.report}[chosen] == 0.5
        assert [row.name for row in compressed.report if row.outcome == "50% sparse by magnitude"] == [chosen]


@pytest.mark.parametrize("step", [wb.Prune, wb.LowRank, wb.Quantize, wb.Distill])
def test_a_target_that_names_no_layer_is_refused_with_the_nearest(step):
    task = tiny_task("vit")
    recipe = (
        Recipe(FIRST, step(targets=("clasifier",)))
        if step is wb.Distill
        else Recipe(step(targets=("clasifier",)))
    )
    with pytest.raises(RecipeError, match=r"target 'clasifier' of .* names no layer; nearest: classifier"):
        compress(task, recipe)


@pytest.mark.parametrize("step", [wb.Prune, wb.LowRank, wb.Quantize])
def test_two_steps_of_one_kind_may_not_take_the_same_layer(step):
    task = tiny_task("vit")
    name = next(
        layer.name
        for layer in compress(task, Recipe()).layers
        if ".fc1" in layer.name or "intermediate" in layer.name
    )
    small = {"rank_ratio": 0.3} if step is wb.LowRank else {}
    with pytest.raises(
        RecipeError, match=f"layer {name!r} is already taken by an earlier {step.kind()} step"
    ):
        compress(task, Recipe(step(targets=(name,), **small), step(**small)))


def test_two_steps_of_one_kind_may_share_the_work():
    task = tiny_task("vit")
    compressed = compress(
        task,
        Recipe(
            wb.Quantize(weight_bits=8, targets=("re:attention",)),
            wb.Quantize(weight_bits=2, targets=("re:mlp|intermediate|output.dense",)),
        ),
    )
    assert {8, 2} <= {row.bits for row in compressed.report}


def test_a_second_step_that_fits_nothing_is_refused_even_if_the_first_did():
    task = tiny_task("vit")
    first, last = (
        wb.Quantize(weight_bits=8, targets=("classifier",)),
        wb.Quantize(weight_bits=4, group_size=7, targets=("re:attention",)),
    )
    with pytest.raises(CompressionError, match=r"fits no layer.*group_size 7 does not divide"):
        compress(task, Recipe(first, last))


@pytest.mark.parametrize(
    ("sort", "head"),
    [("vit", "classifier"), ("resnet", "classifier.1"), ("untied", "lm_head"), ("bert", "classifier")],
)
def test_the_output_head_stays_dense_unless_it_is_named(sort, head):
    task = tiny_task(sort)
    rows = {row.name: row for row in compress(task, Recipe(FIRST)).report}
    assert rows[head].sparsity == 0
    assert rows[head].outcome == "prune skipped: the output head stays dense unless targets name it"
    named = compress(task, Recipe(wb.Prune(sparsity=0.5, targets=(head,))))
    assert {row.name for row in named.report if row.sparsity} == {head}
    mixed = compress(task, Recipe(wb.Prune(sparsity=0.5, targets=("*", head))))
    assert {row.name: row.sparsity for row in mixed.report}[head] == 0.5


@pytest.mark.parametrize(
    ("sort", "embedding"), [("llama", "model.embed_tokens"), ("gpt2", "transformer.wte")]
)
def test_weights_shared_with_an_embedding_are_left_and_the_report_says_so(sort, embedding):
    task = tiny_task(sort)
    compressed = compress(task, Recipe(FIRST, wb.Quantize(weight_bits=4)))
    rows = {row.name: row for row in compressed.report}
    assert (
        f"whose weight is shared with {embedding}, stays dense unless targets name it"
        in rows["lm_head"].outcome
    )
    assert rows[embedding].outcome.startswith("its weight is that of lm_head; ")
    assert compressed.model.lm_head.weight is compressed.model.get_submodule(embedding).weight


# --- what does not fit


def test_a_group_size_that_divides_no_layer_is_refused():
    with pytest.raises(
        CompressionError,
        match=(
            r"Quantize\(weight_bits=4, group_size=7\) fits no layer of tiny-vit: .*group_size 7 does not"
            r" divide its 16 inputs"
        ),
    ):
        compress(tiny_task("vit"), Recipe(wb.Quantize(weight_bits=4, group_size=7)))


def test_a_group_size_that_divides_some_layers_is_stated_for_each():
    compressed = compress(tiny_task("vit"), Recipe(wb.Quantize(weight_bits=4, group_size=32)))
    for row in compressed.report:
        inputs = row.shape[1]
        if row.name != "classifier" and "a parameter of" not in row.outcome:
            assert row.bits == (4 if inputs == 32 else None)
            assert row.outcome == (
                "W4 g32 asymmetric"
                if inputs == 32
                else f"quantize skipped: group_size 32 does not divide its {inputs} inputs"
            )


def test_a_pattern_that_does_not_divide_a_layer_is_stated():
    compressed = compress(tiny_task("resnet"), Recipe(wb.Prune(sparsity=0.5, pattern="2:4")))
    rows = {row.name: row for row in compressed.report}
    stem = rows["resnet.embedder.embedder.convolution"]  # 1 channel, 7 x 7
    assert (stem.sparsity, stem.outcome) == (0, "prune skipped: groups of 4 do not divide its 49 inputs")
    assert rows["resnet.encoder.stages.1.layers.0.layer.0.convolution"].sparsity == 0.5


NAN_STEPS = [
    wb.Prune(sparsity=0.5),
    wb.Prune(sparsity=0.5, criterion="wanda"),
    wb.Quantize(weight_bits=4),
    wb.LowRank(rank_ratio=0.3, factorization="svd"),
    wb.LowRank(rank_ratio=0.3),
]


@pytest.mark.parametrize("step", NAN_STEPS, ids=repr)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["vit.embeddings.patch_embeddings.projection", "classifier"])
def test_weights_that_are_not_finite_are_refused_by_name(step, bad, where, device):
    task = tiny_task("vit", device)
    task.model.get_submodule(where).weight.view(-1)[3] = bad
    targeted = dataclasses.replace(
        step, targets=(where,), **({"rank_ratio": 0.1} if isinstance(step, wb.LowRank) else {})
    )
    with pytest.raises(CompressionError, match=r"layer '.*' .*(infinite|NaN|no singular value)"):
        compress(task, Recipe(targeted))


def test_activations_that_are_not_finite_name_the_layer():
    task = tiny_task("vit")
    task.calibration.inputs["pixel_values"][5, 0, 2, 2] = torch.inf
    with pytest.raises(
        CompressionError,
        match=(
            r"layer 'vit\.embeddings\.patch_embeddings\.projection' receives infinite or NaN inputs during"
            r" calibration"
        ),
    ):
        compress(task, Recipe(wb.LowRank(rank_ratio=0.3)))
    compress(task, Recipe(wb.LowRank(rank_ratio=0.3, factorization="svd")))  # needs no activations
    assert (
        not task.model.vit.embeddings.patch_embeddings.projection._forward_pre_hooks
    )  # nothing is left behind


def test_work_can_be_stopped_between_layers_and_training_steps():
    task = tiny_task("vit")
    before = weights(task.model)

    class StoppedError(Exception):
        pass

    for where in ("calibration", "prune", "distill"):
        seen: list[str] = []

        def progress(what: str, done: int, total: int, where=where, seen=seen) -> None:
            assert 0 <= done <= total
            seen.append(what)
            if what == where and done > 0:
                raise StoppedError

        with pytest.raises(StoppedError):
            compress(
                task,
                Recipe(wb.Prune(sparsity=0.5, criterion="wanda"), wb.Distill(temperature=2, steps=5)),
                progress=progress,
            )
        assert seen[-1] == where
    assert same(weights(task.model), before)
    assert not any(module._forward_pre_hooks for module in task.model.modules())


def test_the_report_says_what_is_on_the_tensors(sort):
    task = tiny_task(sort)
    compressed = compress(
        task,
        Recipe(
            wb.LowRank(rank_ratio=0.4, factorization="svd"),
            wb.Prune(sparsity=0.25),
            wb.Quantize(weight_bits=5),
        ),
    )
    dense = dict(task.model.named_modules())
    for row in compressed.report:
        if row.relative_error is None:
            bare = dict(task.model.named_parameters())
            assert (
                row.name in {"model.embed_tokens", "transformer.wte", "model.layers.0.mlp.gate"}
                or row.name in bare
            )
            continue
        old, new = dense[row.name].weight, compressed.model.get_submodule(row.name)
        kept = [new[0].weight, new[1].weight] if row.rank else [new.weight]
        assert row.weights == sum(w.numel() for w in kept)
        assert row.sparsity == pytest.approx(sum(int((w == 0).sum()) for w in kept) / row.weights)
        current = (
            new.weight.double()
            if not (row.rank and type(dense[row.name]).__name__ == "Conv1D")
            else new.weight.double().t()
        )
        assert row.relative_error == pytest.approx(
            float((current - old).norm() / old.double().norm()), rel=1e-4, abs=1e-7
        )


def test_the_head_of_every_sort_is_in_the_report(sort):
    assert {row.name for row in compress(tiny_tasks.tiny_task(sort), Recipe()).report} & {
        "classifier",
        "classifier.1",
        "lm_head",
    }


def test_a_step_class_without_a_function_is_no_method():
    @wb.configuration
    class Idle(Step):
        slider = "amount"
        amount: float = 0.5

    assert Idle not in METHODS.steps()
    with pytest.raises(RecipeError, match="Idle is not registered"):
        compress(tiny_task("vit"), Recipe(Idle()))
