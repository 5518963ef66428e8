"""Targets that leave layers out: what they pick, what they refuse, and that compression and prediction agree
with them."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

import pytest
import tiny_tasks
import torch
from hypothesis import given
from hypothesis import strategies as st

import workbench as wb
from widgets.panes.code_view import command
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.compress.outlines import after
from workbench.compress.registry import METHODS
from workbench.errors import CompressionError, RecipeError
from workbench.measure.size import sizes
from workbench.shapes.outline import Outline

NAMES = ("a", "a.0", "a.1", "b", "b.fc1", "head")
PATTERNS = ("*", "a", "a.*", "b*", "re:fc", "head", "zzz")


@pytest.fixture(scope="module")
def statistics():
    return Statistics(tiny_tasks.tiny_task("vit"))


def reference(targets: tuple[str, ...], name: str) -> bool:
    """Decide by the sentence in the documentation, written down another way."""

    def hits(pattern: str) -> bool:
        return bool(re.search(pattern[3:], name)) if pattern.startswith("re:") else fnmatchcase(name, pattern)

    inside = [t for t in targets if t[0] != "!"]
    return (not inside or any(map(hits, inside))) and not any(hits(t[1:]) for t in targets if t[0] == "!")


@given(
    st.lists(
        st.builds(str.__add__, st.sampled_from(["", "!"]), st.sampled_from(PATTERNS)), min_size=1, max_size=4
    ),
    st.sampled_from(NAMES),
)
def test_a_layer_is_taken_if_a_target_picks_it_and_none_leaves_it_out(targets, name):
    step = wb.Prune(targets=tuple(targets))
    assert step.takes(name) is reference(step.targets, name)
    assert wb.METHODS.from_json(wb.Recipe(step).to_json()).steps == (step,)
    assert step.takes(name, head=True) is (
        step.takes(name)
        and any(t != "*" and t[0] != "!" and wb.Prune(targets=(t,)).takes(name) for t in targets)
    )


def test_a_factor_is_left_out_with_its_layer_and_a_layer_not_with_its_factor(statistics):
    names = [row.name for row in compress(statistics.task, wb.Recipe()).report]
    layer = next(name for name in names if name.endswith("fc1"))
    recipe = wb.Recipe(wb.LowRank(rank_ratio=0.3), wb.Prune(sparsity=0.5, targets=("*", f"!{layer}")))
    rows = {row.name: row for row in compress(statistics.task, recipe, statistics).report}
    assert rows[layer].sparsity == 0
    assert rows[layer].outcome.endswith(f"prune left out by target '!{layer}'")
    others = [row for name, row in rows.items() if name not in {layer, "classifier"}]
    assert all(row.sparsity > 0.4 for row in others if row.sparsity is not None)


@pytest.mark.parametrize("step", [wb.Prune, wb.LowRank, wb.Quantize])
def test_a_layer_that_is_left_out_stays_bitwise_and_the_head_stays_dense(step):
    task = tiny_tasks.tiny_task("vit")
    layer = next(row.name for row in compress(task, wb.Recipe()).report if row.name.endswith("fc2"))
    plain, compressed = (
        compress(
            task, wb.Recipe(step(targets=targets, **({"rank_ratio": 0.3} if step is wb.LowRank else {})))
        )
        for targets in (("*",), ("*", f"!{layer}"))
    )
    dense = task.model.state_dict()
    assert torch.equal(compressed.model.get_submodule(layer).weight, dense[f"{layer}.weight"])
    assert torch.equal(compressed.model.classifier.weight, dense["classifier.weight"])
    for name in [row.name for row in compressed.report if row.name != layer and row.sparsity is not None]:
        assert torch.equal(
            compressed.model.get_submodule(name).weight, plain.model.get_submodule(name).weight
        )


def test_exclusions_alone_mean_everything_else(statistics):
    layer = next(
        row.name for row in compress(statistics.task, wb.Recipe()).report if row.name.endswith("fc1")
    )
    first, second = (
        compress(statistics.task, wb.Recipe(wb.Prune(targets=targets)), statistics)
        for targets in ((f"!{layer}",), ("*", f"!{layer}"))
    )
    assert first.report == second.report


def test_distillation_trains_everything_but_what_is_left_out():
    task = tiny_tasks.tiny_task("vit")
    layer = next(row.name for row in compress(task, wb.Recipe()).report if row.name.endswith("fc1"))
    pruned = compress(task, wb.Recipe(wb.Prune(sparsity=0.5)))
    compressed = compress(
        task,
        wb.Recipe(
            wb.Prune(sparsity=0.5),
            wb.Distill(temperature=2, steps=3, learning_rate=1e-2, targets=("*", f"!{layer}")),
        ),
    )
    before, after = pruned.model.state_dict(), compressed.model.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert {f"{layer}.weight", f"{layer}.bias"} <= still
    assert not any("layernorm" in name.lower() or name == "classifier.weight" for name in still)
    rows = {row.name: row.outcome for row in compressed.report}
    assert rows[layer].endswith(f"distill left out by target '!{layer}'")
    assert rows["classifier"].endswith("distilled 3 steps at T=2")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("*", "!clasifier"), r"target '!clasifier' of prune names no layer; nearest: classifier"),
        (("*", "!re:nothing$"), r"target '!re:nothing\$' of prune names no layer"),
    ],
)
def test_an_exclusion_that_names_no_layer_is_refused(targets, message, statistics):
    with pytest.raises(RecipeError, match=message):
        compress(statistics.task, wb.Recipe(wb.Prune(targets=targets)), statistics)


def test_bad_exclusions_are_refused_at_once():
    with pytest.raises(RecipeError, match="'!' names no layer to leave out"):
        wb.Prune(targets=("*", "!"))
    with pytest.raises(RecipeError, match=r"'!re:\(' is no regular expression"):
        wb.Prune(targets=("!re:(",))
    with pytest.raises(CompressionError, match="finds no layer that it can take"):
        compress(tiny_tasks.tiny_task("vit"), wb.Recipe(wb.Prune(targets=("*", "!*"))))


def test_a_step_for_the_head_does_not_collide_with_one_for_all(statistics):
    rows = {
        row.name: row
        for row in compress(
            statistics.task,
            wb.Recipe(wb.Prune(sparsity=0.8, targets=("classifier",)), wb.Prune(sparsity=0.5)),
            statistics,
        ).report
    }
    assert rows["classifier"].sparsity == pytest.approx(0.8, abs=0.01)
    assert rows["classifier"].outcome == "80% sparse by magnitude"


def test_an_overridden_layer_is_told_once(statistics):
    layer = next(
        row.name for row in compress(statistics.task, wb.Recipe()).report if row.name.endswith("fc1")
    )
    steps = wb.Prune(sparsity=0.5, targets=("*", f"!{layer}")), wb.Prune(sparsity=0.75, targets=(layer,))
    for order in (steps, steps[::-1]):
        rows = {row.name: row for row in compress(statistics.task, wb.Recipe(*order), statistics).report}
        assert (rows[layer].sparsity, rows[layer].outcome) == (0.75, "75% sparse by magnitude")


def test_predicted_bytes_follow_exclusions_and_own_values(statistics):
    task = statistics.task
    layer, left_out = [row.name for row in compress(task, wb.Recipe()).report if "fc" in row.name][:2]
    recipes = [
        wb.Recipe(wb.Prune(sparsity=0.5, targets=("*", f"!{layer}"))),
        wb.Recipe(wb.Prune(sparsity=0.5, targets=(f"!{layer}", "*", "classifier"))),
        wb.Recipe(
            wb.Prune(sparsity=0.5, targets=("*", f"!{layer}")), wb.Prune(sparsity=0.9, targets=(layer,))
        ),
        wb.Recipe(
            wb.LowRank(rank_ratio=0.3, targets=("*", f"!{layer}")),
            wb.LowRank(rank_ratio=0.2, targets=(layer,)),
            wb.Prune(sparsity=0.5, targets=("*", f"!{left_out}")),
        ),
    ]
    for recipe in recipes:
        compressed, outline = compress(task, recipe, statistics), after(Outline.of(task.model), recipe)
        assert outline.exact()
        assert outline.file_bytes() == sizes(compressed.model, compressed.layers).file_bytes


def test_flat_options_say_exclusions_and_own_values():
    recipe = METHODS.recipe(
        {
            "sparsity": "0.5",
            "prune_targets": "*,!head,fc1=0.8",
            "weight_bits": 4,
            "quantize_targets": ["fc1=8"],
        }
    )
    assert recipe == wb.Recipe(
        wb.Prune(sparsity=0.5, targets=("*", "!head", "!fc1")),
        wb.Prune(sparsity=0.8, targets=("fc1",)),
        wb.Quantize(weight_bits=4, targets=("!fc1",)),
        wb.Quantize(weight_bits=8, targets=("fc1",)),
    )
    assert METHODS.recipe({"sparsity": 0.5, "prune_targets": "re:(?=fc)"}).steps[0].targets == ("re:(?=fc)",)


def test_the_command_says_what_the_recipe_says():
    recipe = wb.Recipe(
        wb.Prune(sparsity=0.5, targets=("*", "!fc1")), wb.Prune(sparsity=0.8, targets=("fc1",))
    )
    assert command("m", recipe) == "workbench measure m --sparsity 0.5 --prune-targets '*,fc1=0.8'"
    second = wb.Recipe(
        wb.Prune(sparsity=0.5, targets=("*", "!fc1")),
        wb.Prune(sparsity=0.8, targets=("fc1",), criterion="wanda"),
    )
    assert (
        command("m", second)
        == "# no command says this recipe: a layer differs in more than its slider; use Python"
    )


def test_labels_name_the_layers_that_stand_apart():
    layer = "vit.layers.0.mlp.fc1"
    assert (
        wb.Recipe(
            wb.Prune(sparsity=0.5, targets=("*", f"!{layer}")), wb.Prune(sparsity=0.8, targets=(layer,))
        ).label()
        == "50% sparse not \N{HORIZONTAL ELLIPSIS}layers.0.mlp.fc1 + 80% sparse on"
        " \N{HORIZONTAL ELLIPSIS}layers.0.mlp.fc1"
    )
    assert wb.Recipe(wb.Quantize(weight_bits=4, targets=("a", "b", "!c"))).label() == "W4 on 2 targets not c"


OWN = [
    (wb.Quantize, {"weight_bits": 4, "group_size": 16}, ("*", "*.0.*=8")),
    (wb.Prune, {"sparsity": 0.5, "pattern": "2:4"}, ("*", "re:fc[12]=0.5")),
    (wb.Prune, {"sparsity": 0.5}, ("classifier=.25", "fc1=1e-1", "!fc2")),
    (wb.LowRank, {"rank_ratio": 0.5}, ("fc1=0.25",)),
    (wb.Quantize, {"weight_bits": 4, "seed": 3}, ("*", "a=b=8")),
]


@pytest.mark.parametrize(("step", "options", "targets"), OWN)
def test_a_step_in_python_reads_own_values_as_the_flat_options_do(step, options, targets):
    seed = options.get("seed", 0)
    flat = {name: value for name, value in options.items() if name != "seed"}
    kind = step.kind()
    told = METHODS.recipe({**flat, f"{kind}_targets": ",".join(targets)}, seed)
    made = wb.Recipe(step(**options, targets=targets))
    assert made == told
    assert made.key == told.key
    assert METHODS.from_json(made.to_json()) == made == wb.Recipe(*made)
    assert len(made) == 1 + sum("=" in target for target in targets)
    assert not any("=8" in target or "=0" in target for one in made for target in one.targets)


def test_an_own_value_out_of_range_is_refused_in_both_ways():
    with pytest.raises(RecipeError, match=r"weight_bits='99'\) is refused"):
        wb.Recipe(wb.Quantize(weight_bits=4, targets=("*", "fc1=99")))
    with pytest.raises(RecipeError, match=r"weight_bits='99'\) is refused"):
        METHODS.recipe({"weight_bits": 4, "quantize_targets": "*,fc1=99"})
