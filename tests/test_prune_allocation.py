"""How sparsity is divided over layers, and in what rounds: exact totals, one threshold against a sort,
schedules by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorded import recorded_inputs
from tiny_tasks import same, tiny_task, weights

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.compress.pruning.allocation import bin_of, hull
from workbench.compress.pruning.schedule import cubic
from workbench.errors import CompressionError, RecipeError
from workbench.recipe import Recipe
from workbench.util.progress import Training

CRITERIA = ("magnitude", "wanda", "sparsegpt", "taylor", "fisher", "random")


def pruned(task, step: wb.Prune):
    """Return (what compress made, {name: (dense, pruned)} of every layer that it changed), matrices by
    `Layer`."""
    compressed = compress(task, Recipe(step))
    dense = {layer.name: layer for layer in compress(task, Recipe()).layers}
    return compressed, {
        layer.name: (dense[layer.name].matrix().cpu(), layer.matrix().cpu())
        for layer in compressed.layers
        if layer.mask is not None
    }


def zeros(pairs) -> int:
    return sum(int((now == 0).sum()) for _, now in pairs.values())


def total(pairs) -> int:
    return sum(dense.numel() for dense, _ in pairs.values())


# --- one threshold


@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.5, 0.9])
def test_a_global_threshold_is_that_of_a_sort_over_all_layers(sort, device, sparsity):
    _, pairs = pruned(tiny_task(sort, device), wb.Prune(sparsity=sparsity, allocation="global"))
    values = torch.cat([dense.flatten().abs() for dense, _ in pairs.values()]).sort().values
    threshold = values[round(sparsity * len(values))]  # the smallest that stays
    assert threshold > values[round(sparsity * len(values)) - 1]  # no tie here
    for dense, now in pairs.values():
        assert torch.equal(now, dense * (dense.abs() >= threshold))
    assert zeros(pairs) == round(sparsity * len(values))


def test_weights_that_tie_with_the_threshold_go_from_the_last_layers_first(device):
    task = tiny_task("vit", device)
    names = [row.name for row in compress(task, Recipe(wb.Prune())).report if row.sparsity]
    for name in names:
        task.model.get_submodule(name).weight.fill_(0.25)
    _, pairs = pruned(task, wb.Prune(sparsity=0.3, allocation="global"))
    assert zeros(pairs) == round(0.3 * total(pairs))
    states = [float((now == 0).double().mean()) for _, now in pairs.values()]
    assert states == sorted(states)  # none, some of one layer, then all
    assert sum(0 < state < 1 for state in states) <= 1


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.data())
def test_the_bin_of_a_rank_is_that_of_the_sorted_list(values, data):
    rank = data.draw(st.integers(1, len(values)))
    place, below = bin_of(torch.bincount(torch.tensor(values), minlength=12), rank)
    assert place == sorted(values)[rank - 1]
    assert below == sum(value < place for value in values)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("allocation", ["global", "sensitivity"])
@pytest.mark.parametrize("sparsity", [0.0, 0.21, 0.5, 0.83])
def test_the_whole_model_loses_exactly_what_was_asked(sort, criterion, allocation, sparsity):
    _, pairs = pruned(
        tiny_task(sort), wb.Prune(sparsity=sparsity, criterion=criterion, allocation=allocation)
    )
    assert zeros(pairs) == round(sparsity * total(pairs))


def test_global_wanda_compares_relative_output_errors(device):
    task = tiny_task("llama", device)
    inputs = recorded_inputs(task)
    _, pairs = pruned(task, wb.Prune(criterion="wanda", allocation="global"))
    scores, gone = [], []
    for name, (dense, now) in pairs.items():
        rows = inputs[name].cpu().double()
        scores.append(
            (
                (dense.double() * rows.square().mean(0).sqrt()).square()
                / (rows @ dense.double().t()).square().sum(1).mean()
            ).flatten()
        )
        gone.append((now == 0).flatten())
    order, removed = torch.cat(scores), torch.cat(gone)
    assert order[removed].max() <= order[~removed].min() * (1 + 1e-4)


def test_after_low_rank_one_threshold_covers_both_factors():
    task = tiny_task("vit")
    compressed = compress(
        task, Recipe(wb.LowRank(rank_ratio=0.4), wb.Prune(allocation="global", criterion="wanda"))
    )
    masks = [layer.mask for layer in compressed.layers if layer.mask is not None]
    assert sum(int((~mask).sum()) for mask in masks) == round(0.5 * sum(mask.numel() for mask in masks))


# --- sensitivity


@given(st.lists(st.floats(0, 100), min_size=2, max_size=9))
def test_the_hull_is_convex_below_the_points_and_spans_them(harm):
    points = [3 * index for index in range(len(harm))]
    pieces = hull("a", points, harm)
    assert sum(piece.removed for piece in pieces) == points[-1]
    assert all(a.slope <= b.slope for a, b in pairwise(pieces))
    at, value = 0, harm[0]
    for piece in pieces:
        for index, point in enumerate(points):
            if at <= point <= at + piece.removed:
                assert value + piece.slope * (point - at) <= harm[index] + 1e-6
        at, value = at + piece.removed, value + piece.slope * piece.removed
    assert value == pytest.approx(harm[-1], abs=1e-6)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_no_layer_strays_further_than_half_of_what_is_kept(sort, sparsity):
    _, pairs = pruned(tiny_task(sort), wb.Prune(sparsity=sparsity, allocation="sensitivity"))
    shares = [float((now == 0).double().mean()) for _, now in pairs.values()]
    assert all(
        sparsity - (1 - sparsity) / 2 - 0.01 <= share <= sparsity + (1 - sparsity) / 2 + 0.01
        for share in shares
    )
    assert max(shares) - min(shares) > 0.01


def test_a_layer_that_the_loss_does_not_feel_gives_up_the_most():
    task = tiny_task("vit")
    task.model.vit.layers[1].mlp.fc2.weight *= 1e-3  # what fc1 computes hardly reaches the answer
    _, pairs = pruned(task, wb.Prune(sparsity=0.5, allocation="sensitivity"))
    assert float((pairs["vit.layers.1.mlp.fc1"][1] == 0).double().mean()) == pytest.approx(0.75, abs=0.01)


def test_the_report_says_what_was_asked_and_what_a_layer_got():
    compressed, pairs = pruned(tiny_task("vit"), wb.Prune(sparsity=0.5, allocation="sensitivity"))
    rows = {row.name: row for row in compressed.report}
    for name in pairs:
        assert (
            rows[name].outcome == f"{rows[name].sparsity:.1%} sparse (sensitivity, 50% in all) by magnitude"
        )


def test_statistics_are_shared_by_every_criterion_and_allocation():
    task = tiny_task("vit")
    kept, calls = Statistics(task), []
    kept.progress = lambda what, done, _: calls.append(what) if done == 0 else None
    for criterion in CRITERIA:
        for allocation in ("uniform", "global", "sensitivity"):
            recipe = Recipe(wb.Prune(criterion=criterion, allocation=allocation, sparsity=0.4))
            assert same(weights(compress(task, recipe, kept).model), weights(compress(task, recipe).model))
    assert sorted(calls) == ["calibration", "gradients"]


# --- rounds


def test_the_schedule_is_zhu_and_guptas():
    assert [cubic(0.8, index, 4) for index in range(1, 5)] == pytest.approx(
        [0.8 * (1 - 27 / 64), 0.8 * (1 - 1 / 8), 0.8 * (1 - 1 / 64), 0.8]
    )
    assert cubic(0.3, 7, 7) == 0.3
    assert cubic(0.5, 1, 1) == 0.5


ROUNDS = {"rounds": 3, "train_steps": 4, "train_batch": 16, "train_rate": 5e-3}


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"pattern": "2:4"},
        {"criterion": "wanda"},
        {"criterion": "sparsegpt"},
        {"criterion": "sparsegpt", "pattern": "1:4", "sparsity": 0.75},
        {"criterion": "taylor"},
        {"allocation": "global"},
        {"allocation": "sensitivity", "criterion": "sparsegpt"},
        {"allocation": "global", "criterion": "wanda"},
        {"penalty": 1e-3},
    ],
    ids=str,
)
def test_rounds_end_at_the_sparsity_and_never_give_back(sort, device, setting, monkeypatch):
    task = tiny_task(sort, device)
    seen: list[dict[str, torch.Tensor]] = []
    module = __import__("workbench.compress.pruning.schedule", fromlist=["train"])
    train = module.train

    def spy(step, work, layers, plan, objective):
        seen.append(
            {layer.name: layer.mask.clone() for layer in work.layers.values() if layer.mask is not None}
        )
        done = train(step, work, layers, plan, objective)
        assert all((work.layers[name].matrix()[~mask] == 0).all() for name, mask in seen[-1].items())
        return done

    monkeypatch.setattr(module, "train", spy)
    step = wb.Prune(**{"sparsity": 0.5, **ROUNDS, **setting})
    compressed, pairs = pruned(task, step)
    assert zeros(pairs) == round(step.sparsity * total(pairs))
    masks = [*seen, {layer.name: layer.mask for layer in compressed.layers if layer.mask is not None}]
    assert len(masks) == 3 + bool(step.penalty)
    shares = []
    for before, after in pairwise(masks):
        assert all(
            not (after[name] & ~mask).any() for name, mask in before.items()
        )  # what is gone stays gone
        shares.append(sum(int((~mask).sum()) for mask in after.values()) / total(pairs))
    if step.group is None:
        assert shares[-2] == pytest.approx(
            cubic(0.5, 2, 3), abs=2 / min(dense.numel() for dense, _ in pairs.values())
        )
    assert len(compressed.curve) == 4 * (2 + bool(step.penalty))
    assert [index for index, _ in compressed.curve] == list(range(len(compressed.curve)))
    if step.group is not None:
        assert all(
            ((now != 0).unflatten(1, (-1, step.group[1])).sum(2) <= step.group[0]).all()
            for _, now in pairs.values()
        )


def test_training_between_rounds_helps_and_gives_the_same_bits_again():
    task = tiny_task("vit")
    recipe = Recipe(wb.Prune(sparsity=0.7, rounds=3, train_steps=20, train_rate=5e-3))
    once, again = compress(task, recipe), compress(task, recipe)
    assert same(weights(once.model), weights(again.model))
    assert once.curve == again.curve
    assert once.curve[19][1] < once.curve[0][1]
    assert (
        "trained 20 steps after each of 2 rounds"
        in {row.name: row for row in once.report}["vit.layers.0.mlp.fc1"].outcome
    )
    assert "70% sparse by magnitude in 3 rounds" in once.report[1].outcome


def test_a_penalty_makes_the_weights_that_go_smaller():
    task = tiny_task("vit")

    def removed(**setting) -> float:
        compressed = compress(task, Recipe(wb.Prune(sparsity=0.5, **setting)))
        kept = torch.cat(
            [layer.matrix()[layer.mask].abs() for layer in compressed.layers if layer.mask is not None]
        )
        return float(kept.mean())

    assert removed(penalty=1e-2, train_steps=30, train_rate=5e-3) < 0.9 * removed()


def test_a_training_is_watched_and_can_be_stopped():
    task = tiny_task("vit")
    before = weights(task.model)
    seen: list[tuple[int, int]] = []
    recipe = Recipe(wb.Prune(sparsity=0.5, rounds=2, train_steps=3), wb.Distill(temperature=2, steps=2))
    compressed = compress(
        task, recipe, training=Training(lambda curve, steps: seen.append((len(curve), steps)))
    )
    assert seen == [(1, 3), (2, 3), (3, 3), (4, 5), (5, 5)]
    assert [index for index, _ in compressed.curve] == [0, 1, 2, 3, 4]
    ended = compress(
        task, recipe, training=Training(enough=lambda: True)
    )  # only Distill can say where it ended
    assert len(ended.curve) == 4
    assert same(weights(compress(task, ended.recipe).model), weights(ended.model))

    class StoppedError(Exception):
        pass

    def progress(what: str, done: int, total: int) -> None:
        if what == "prune training" and done == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        compress(task, recipe, progress=progress)
    assert same(weights(task.model), before)


def test_only_targeted_layers_are_trained():
    task = tiny_task("vit")
    compressed = compress(task, Recipe(wb.Prune(sparsity=0.5, targets=("re:fc1$",), **ROUNDS)))
    changed = {
        name
        for name, tensor in weights(compressed.model).items()
        if not torch.equal(tensor, weights(task.model)[name])
    }
    assert changed == {
        f"vit.layers.{index}.mlp.fc1.{part}" for index in range(2) for part in ("weight", "bias")
    }


# --- what does not fit


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        (
            {"pattern": "2:4", "allocation": "global"},
            r"pattern='2:4' gives every layer the same sparsity: allocation='global' has nothing to divide",
        ),
        ({"reconstruct": True}, r"reconstruct=True is for structure"),
        ({"pattern": "neurons", "criterion": "sparsegpt"}, r"criterion='sparsegpt' removes single weights"),
        ({"penalty": 1e-4}, r"penalty=0.0001 needs a training to act in: give train_steps"),
        ({"train_steps": 5}, r"train_steps=5 never come"),
        ({"rounds": 4}, r"rounds=4 with criterion='magnitude' and no training removes what one round does"),
        ({"pattern": "3:2"}, r"pattern='3:2' removes nothing: n of n:m must be smaller than m"),
        ({"pattern": "rows"}, r"pattern='rows'"),
        ({"sparsity": 1.0}, r"sparsity=1.0"),
        ({"criterion": "l2"}, r"criterion='l2'"),
    ],
    ids=str,
)
def test_choices_that_make_no_sense_are_refused_with_the_reason(setting, reason):
    with pytest.raises(RecipeError, match=reason):
        wb.Prune(**setting)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("allocation", ["uniform", "sensitivity"])
def test_a_sparsity_that_removes_a_whole_layer_is_refused_by_name(criterion, allocation):
    with pytest.raises(
        CompressionError,
        match=(r"prune skipped: sparsity=0\.9999 removes all its 256 weights: give at most 0\.996"),
    ):
        compress(
            tiny_task("vit"), Recipe(wb.Prune(sparsity=0.9999, criterion=criterion, allocation=allocation))
        )


def test_one_threshold_that_empties_a_layer_is_stated():
    task = tiny_task("vit")
    task.model.vit.layers[0].mlp.fc1.weight *= 1e-6
    compressed = compress(task, Recipe(wb.Prune(sparsity=0.5, allocation="global")))
    assert compressed.warnings == (
        "prune: one threshold for sparsity=0.5 removes every weight of 'vit.layers.0.mlp.fc1'",
    )


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_pattern_that_no_layer_can_take_is_refused(criterion):
    with pytest.raises(
        CompressionError, match=r"fits no layer of tiny-vit: .*groups of 5 do not divide its 16 inputs"
    ):
        compress(tiny_task("vit"), Recipe(wb.Prune(sparsity=0.4, pattern="3:5", criterion=criterion)))


def test_too_few_rows_for_second_moments_are_stated_and_regularised():
    task = tiny_task("llama")
    few = type(task)(
        **{**vars(task), "calibration": task.calibration[:3]}
    )  # 24 tokens, 32 inputs of down_proj
    kept = Statistics(few)
    compressed = compress(few, Recipe(wb.Prune(criterion="sparsegpt")), kept)
    assert len(compressed.warnings) == 1
    assert (
        compress(few, Recipe(wb.Prune(criterion="sparsegpt", allocation="global")), kept).warnings
        == compressed.warnings
    )  # also from what was kept, and once
    assert (
        "too few rows for the second moments of 'model.layers.0.mlp.down_proj' and 1 more (24 rows for 32"
        " inputs): regularised by damping of 0.01" in compressed.warnings[0]
    )
    assert all(torch.isfinite(tensor).all() for tensor in compressed.model.state_dict().values())
    assert compress(task, Recipe(wb.Prune(criterion="sparsegpt"))).warnings == ()


def moments_of(task, name: str, change) -> Statistics:
    """Return the task's statistics with one layer's second moment changed."""
    kept = Statistics(task)
    kept.moments().matrices[name] = change(kept.second_moment(name))
    return kept


def test_a_moment_that_is_not_positive_is_damped_more_and_the_warning_says_so(device):
    task = tiny_task("vit", device)
    name = "vit.layers.0.mlp.fc1"
    kept = moments_of(
        task,
        name,
        lambda moment: (
            moment
            - 0.05
            * moment.diagonal().mean()
            * torch.eye(len(moment), device=device)
            * (moment.diagonal() > 0)
        ),
    )
    smallest = float(
        torch.linalg.eigvalsh(kept.second_moment(name))[0] / kept.second_moment(name).diagonal().mean()
    )
    assert -0.1 < smallest < -0.01
    compressed = compress(task, Recipe(wb.Prune(criterion="sparsegpt")), kept)
    assert (
        f"damping raised to 0.1 of the mean diagonal where a second moment was singular: '{name}'"
        in compressed.warnings[0]
    )
    assert compress(task, Recipe(wb.Prune(criterion="sparsegpt")), kept).warnings == compressed.warnings


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m * float("inf"),
        lambda m: torch.full_like(m, float("nan")),
        lambda m: 2 * m.diagonal().diag() - 100 * m,
    ],
    ids=["inf", "nan", "negative"],
)
def test_a_layer_whose_moment_cannot_be_inverted_is_skipped(change, device):
    task, name = tiny_task("vit", device), "vit.layers.1.mlp.fc2"
    kept = moments_of(task, name, change)
    compressed = compress(task, Recipe(wb.Prune(criterion="sparsegpt")), kept)
    rows = {row.name: row for row in compressed.report}
    assert "the second moment of its 32 inputs cannot be inverted, even with damping 1 " in rows[name].outcome
    assert rows[name].relative_error == 0.0
    assert rows["vit.layers.0.mlp.fc2"].sparsity == 0.5
    with pytest.raises(CompressionError, match="fits no layer of tiny-vit.*cannot be inverted"):
        compress(task, Recipe(wb.Prune(criterion="sparsegpt", targets=(name,))), kept)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "taylor", "fisher"])
def test_activations_that_are_not_finite_are_refused_by_name(criterion):
    task = tiny_task("vit")
    task.calibration.inputs["pixel_values"][5, 0, 2, 2] = torch.nan
    with pytest.raises(
        CompressionError,
        match=(
            r"layer 'vit\.embeddings\.patch_embeddings\.projection' (receives infinite or NaN inputs|has an"
            r" infinite or NaN gradient) during calibration"
        ),
    ):
        compress(task, Recipe(wb.Prune(criterion=criterion)))


def test_a_training_that_diverges_is_refused_with_what_to_change():
    task = tiny_task("vit")
    task.training.inputs["pixel_values"][:] = torch.nan
    with pytest.raises(
        CompressionError,
        match=r"training of Prune after round 1 diverged at step 0 of 4: loss nan; lower train_rate=0\.005",
    ):
        compress(task, Recipe(wb.Prune(**ROUNDS)))


def test_shared_weights_are_pruned_once_or_left(sort):
    for criterion in CRITERIA:
        compressed = compress(tiny_task(sort), Recipe(wb.Prune(criterion=criterion)))
        for name, module in compressed.model.named_modules():
            if name == "lm_head":
                assert module.weight is compressed.model.get_input_embeddings().weight
