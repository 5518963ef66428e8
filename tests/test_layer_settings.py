"""Layers that stand apart from the sliders: the form holds them, the sliders keep them, undo takes them
back."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_tasks
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from widgets.form.layer_override import LayerOverride, layer_steps
from widgets.form.recipe_form import RecipeForm
from workbench.compress import compress
from workbench.errors import RecipeError

BASE = wb.Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4))
LAYERS = ("a", "b", "head")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def form():
    return RecipeForm(BASE, Clock())


def part(form, slider):
    return next(step for step in form.forms if step.kind.slider == slider)


def test_a_layer_is_left_out_set_apart_and_put_back(form):
    form.exclude("a", "prune")
    assert repr(form.recipe) == "Recipe(Prune(targets=('*', '!a'), sparsity=0.5), Quantize(weight_bits=4))"
    form.override("a", wb.Prune(sparsity=0.8))
    apart = wb.Recipe(
        wb.Prune(sparsity=0.5, targets=("*", "!a")),
        wb.Prune(sparsity=0.8, targets=("a",)),
        wb.Quantize(weight_bits=4),
    )
    assert form.recipe == apart
    part(form, "sparsity").slider.value = 0.3
    assert form.recipe == wb.Recipe(wb.Prune(sparsity=0.3, targets=("*", "!a")), *apart.steps[1:])
    form.follow("a", "prune")
    assert form.recipe == wb.Recipe(wb.Prune(sparsity=0.3), wb.Quantize(weight_bits=4))


def test_every_change_is_one_step_of_undo(form):
    steps = [
        lambda: form.exclude("a", "prune"),
        lambda: form.override("b", wb.Quantize(weight_bits=8)),
        lambda: form.follow("a", "prune"),
        lambda: form.exclude("a", "prune"),
    ]
    seen = [form.recipe]
    for step in steps:
        step()
        seen.append(form.recipe)
    for before in reversed(seen[:-1]):
        form.undo()
        assert form.recipe == before
    for after in seen[1:]:
        form.redo()
        assert form.recipe == after
    form.exclude("a", "prune")
    form.exclude("a", "prune")
    assert form.recipe == seen[-1]
    form.undo()
    assert form.recipe == seen[-2]


def test_the_moves_of_one_drag_of_a_layer_s_own_slider_are_one_step_of_undo(form):
    for value in (0.6, 0.7, 0.8):
        form.clock.now += 0.1
        form.override("a", wb.Prune(sparsity=value))
    assert form.recipe.steps[1].sparsity == 0.8
    form.undo()
    assert form.recipe == BASE


def test_off_and_on_keeps_what_stands_apart_and_reset_forgets_it(form):
    form.override("a", wb.Prune(sparsity=0.8))
    apart = form.recipe
    part(form, "sparsity").on.value = False
    assert form.recipe == wb.Recipe(wb.Quantize(weight_bits=4))
    part(form, "sparsity").on.value = True
    assert form.recipe == apart
    form.reset()
    part(form, "sparsity").on.value = True
    assert form.recipe == wb.Recipe(wb.Prune(sparsity=0.5))


def test_recipes_of_several_steps_go_on_the_sliders_in_their_order(form):
    twice = wb.Recipe(
        wb.Quantize(weight_bits=8, targets=("fc1",)),
        wb.Quantize(weight_bits=4, targets=("*", "!fc1")),
        wb.Quantize(weight_bits=2, targets=("head",)),
    )
    form.set_recipe(twice)
    assert form.recipe == twice
    assert part(form, "weight_bits").slider.value == 4
    part(form, "weight_bits").slider.value = 5
    assert form.recipe.steps == (
        twice.steps[0],
        dataclasses.replace(twice.steps[1], weight_bits=5),
        twice.steps[2],
    )


def test_what_cannot_be_is_refused_and_changes_nothing(form):
    with pytest.raises(RecipeError, match="lowrank is off: turn it on before a layer gets its own setting"):
        form.exclude("a", "lowrank")
    form.set_recipe(wb.Recipe(wb.Prune(sparsity=0.5, targets=("a",))))
    with pytest.raises(RecipeError, match="works on a alone"):
        form.exclude("a", "prune")
    form.set_recipe(wb.Recipe(wb.Prune(sparsity=0.5, targets=("*", "!re:^a$"))))
    with pytest.raises(RecipeError, match=r"a is left out by target '!re:\^a\$' of prune, which is wider"):
        form.follow("a", "prune")
    assert form.recipe == wb.Recipe(wb.Prune(sparsity=0.5, targets=("*", "!re:^a$")))
    mixed = wb.Recipe(
        wb.Prune(sparsity=0.2, targets=("a",)),
        wb.Distill(temperature=2),
        wb.Prune(sparsity=0.2, targets=("b",)),
    )
    with pytest.raises(
        RecipeError,
        match=(
            "cannot be put on the sliders: they hold steps in the order prune, distill, those of one kind"
            " together"
        ),
    ):
        form.set_recipe(mixed)


def test_the_output_head_follows_by_name_only(form):
    form.follow("head", "prune", head=True)
    assert form.recipe.steps[0].targets == ("*", "head")
    form.exclude("head", "prune")
    assert form.recipe.steps[0].targets == ("*", "!head")


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["follow", "out", "own", "slider", "undo"]),
        st.sampled_from(LAYERS),
        st.sampled_from([0.2, 0.6, 0.9]),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(ACTIONS)
def test_whatever_is_done_each_layer_stands_as_it_was_put_last(actions):
    form, stands = (
        RecipeForm(wb.Recipe(wb.Prune(sparsity=0.5)), Clock()),
        dict.fromkeys(LAYERS, ("follow", 0.5)),
    )
    past = []
    for action, layer, value in actions:
        before, kept = form.recipe, dict(stands)
        form.clock.now += 10
        if action == "undo":
            form.undo()
            stands = past.pop() if past else stands
        elif action == "slider":
            part(form, "sparsity").slider.value = value
            stands = {
                name: (mode, value if mode == "follow" else own) for name, (mode, own) in stands.items()
            }
        elif action == "own":
            form.override(layer, wb.Prune(sparsity=value))
            stands[layer] = "own", value
        elif action == "out":
            form.exclude(layer, "prune")
            stands[layer] = "out", None
        else:
            form.follow(layer, "prune")
            stands[layer] = "follow", form.recipe.main("prune").sparsity
        if action != "undo" and form.recipe != before:
            past.append(kept)
        chosen = layer_steps(form.recipe, "prune")
        for name, (mode, own) in stands.items():
            assert chosen.mode(name)[0] == mode
            assert mode == "out" or chosen.mode(name)[1].sparsity == own
            assert sum(step.takes(name) for step in form.recipe) == (mode != "out")
        assert wb.METHODS.from_json(form.recipe.to_json()) == form.recipe


def test_controls_change_the_recipe_and_show_what_was_refused(form):
    said = []

    def guarded(act):
        try:
            act()
        except RecipeError as error:
            said.append(str(error))

    control = LayerOverride(wb.Prune, form, guarded)
    control.show(form.recipe, "a", head=False)
    assert (control.mode.value, control.slider.layout.display) == ("follow", "none")
    control.mode.value = "own"
    assert (control.slider.value, control.slider.layout.display) == (0.5, None)
    control.slider.value = 0.1 + 0.2
    assert form.recipe.steps[:2] == (
        wb.Prune(sparsity=0.5, targets=("*", "!a")),
        wb.Prune(sparsity=0.3, targets=("a",)),
    )
    control.mode.value = "out"
    assert form.recipe.steps[:2] == (wb.Prune(sparsity=0.5, targets=("*", "!a")), wb.Quantize(weight_bits=4))
    form.set_recipe(wb.Recipe(wb.Prune(sparsity=0.5, pattern="2:4")))
    control.show(form.recipe, "a", head=False)
    control.mode.value = "own"
    before = form.recipe
    control.slider.value = 0.9
    assert "pattern='2:4' means sparsity=0.5" in said[0]
    assert form.recipe == before
    assert control.slider.value == 0.5
    control.show(wb.Recipe(), "a", head=False)
    assert control.layout.display == "none"


def test_a_recipe_of_the_form_does_to_the_model_what_it_says(form):
    task = tiny_tasks.tiny_task("vit")
    fc1, fc2 = [row.name for row in compress(task, wb.Recipe()).report if "fc" in row.name][:2]
    form.override(fc1, wb.Prune(sparsity=0.8))
    form.exclude(fc2, "prune")
    form.exclude(fc2, "quantize")
    rows = {row.name: row for row in compress(task, form.recipe).report}
    assert rows[fc1].outcome.startswith("80% sparse by magnitude; W4")
    assert rows[fc2].relative_error == 0
    assert rows[fc2].outcome == f"prune left out by target '!{fc2}'; quantize left out by target '!{fc2}'"
