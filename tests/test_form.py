"""The sliders and choices as traits, without a browser."""

from __future__ import annotations

from typing import Annotated, ClassVar

import pytest
from pydantic import Field

import workbench as wb
from widgets.form.controls import bounds, decimals, nice_step, scale
from widgets.form.recipe_form import RecipeForm
from workbench.compress.registry import METHODS
from workbench.errors import RecipeError
from workbench.recipe import Recipe, Step
from workbench.util.configuration import configuration


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def form(clock):
    return RecipeForm(clock=clock)


def part(form, slider):
    return next(step for step in form.forms if step.kind.slider == slider)


def test_every_registered_method_has_its_controls(form):
    assert [step.kind for step in form.forms] == METHODS.steps()
    for step in form.forms:
        assert {step.kind.slider, *step.choices} == set(step.kind.options())
        for stop in step.kind.stops:
            assert step.slider.min <= stop <= step.slider.max
            assert f">{stop:g}</span>" in step.ticks()
        for widget in (step.on, step.slider, *step.choices.values()):
            assert widget.description
            assert len(widget.tooltip) > len(widget.description)


def test_ranges_come_from_the_annotations(form):
    sparsity, rank, bits, temperature = (
        part(form, name) for name in ("sparsity", "rank_ratio", "weight_bits", "temperature")
    )
    assert (sparsity.slider.min, sparsity.slider.max, sparsity.slider.step) == (0.0, 0.99, 0.01)
    assert (rank.slider.min, rank.slider.max) == (0.01, 1.0)
    assert (bits.slider.min, bits.slider.max) == (2, 8)
    assert temperature.slider.min > 0
    assert temperature.slider.max == 8
    assert sparsity.choices["criterion"].options == wb.Prune.choices("criterion")
    assert bits.choices["scale_search"].value is True
    assert temperature.choices["alpha"].max == 1
    with pytest.raises(Exception, match="Invalid selection"):
        sparsity.choices["criterion"].value = "nonsense"


def test_moving_a_slider_turns_its_method_on_and_rounds(form):
    seen = []
    form.observe(lambda change: seen.append(change["new"].recipe), "state")
    part(form, "sparsity").slider.value = 0.1 + 0.2
    assert form.recipe == wb.Recipe(wb.Prune(sparsity=0.3))
    assert repr(form.recipe) == "Recipe(Prune(sparsity=0.3))"
    part(form, "weight_bits").slider.value = 3
    assert form.recipe == wb.Recipe(wb.Prune(sparsity=0.3), wb.Quantize(weight_bits=3))
    part(form, "sparsity").on.value = False
    assert form.recipe == wb.Recipe(wb.Quantize(weight_bits=3))
    assert len(seen) == 3
    assert form.state.last == "sparsity"


def test_a_choice_alone_changes_nothing_until_its_method_is_on(form):
    step = part(form, "sparsity")
    step.choices["criterion"].value = "wanda"
    assert form.recipe == wb.Recipe()
    step.on.value = True
    assert form.recipe == wb.Recipe(wb.Prune(sparsity=0.5, criterion="wanda"))


def test_a_pattern_moves_the_slider_where_it_must_be_and_the_slider_frees_the_pattern(form):
    step = part(form, "sparsity")
    step.slider.value = 0.7
    step.choices["pattern"].value = "2:4"
    assert form.recipe == wb.Recipe(wb.Prune(sparsity=0.5, pattern="2:4"))
    assert step.slider.value == 0.5
    assert form.state.note.startswith("sparsity set to 0.5: ")
    step.choices["pattern"].value = "1:8"
    assert form.recipe == wb.Recipe(wb.Prune(sparsity=0.875, pattern="1:8"))
    step.slider.value = 0.6
    assert form.recipe == wb.Recipe(wb.Prune(sparsity=0.6))
    assert form.state.note.startswith("pattern set to unstructured: ")
    assert form.state.error == ""


def test_what_is_refused_is_said_and_the_recipe_stays(form):
    part(form, "temperature").on.value = True
    assert form.state.error.startswith("Distill cannot come first")
    assert form.recipe == wb.Recipe()
    part(form, "sparsity").slider.value = 0.4
    assert form.state.error == ""
    assert [step.kind() for step in form.recipe] == ["prune", "distill"]
    part(form, "sparsity").choices["pattern"].value = "4:2"
    assert "removes nothing" in form.state.error
    assert form.state.last == "sparsity"
    assert form.recipe.get("prune").sparsity == 0.4
    part(form, "sparsity").choices["pattern"].value = "unstructured"
    assert form.state.error == ""


def test_set_recipe_moves_every_control(form):
    recipe = wb.Recipe(
        wb.LowRank(rank_ratio=0.4, factorization="svd"),
        wb.Prune(sparsity=0.5, pattern="2:4", criterion="wanda"),
        wb.Quantize(weight_bits=3, group_size=32, grid="symmetric", scale_search=False),
        wb.Distill(temperature=3.0, steps=5),
    )
    form.set_recipe(recipe)
    assert form.recipe == recipe
    assert wb.Recipe(*(step.kind(**step.values()) for step in form.forms if step.on.value)) == recipe
    form.set_recipe(wb.Recipe())
    assert not any(step.on.value for step in form.forms)


def test_targets_and_seed_survive(form):
    form.set_recipe(wb.Recipe(wb.Prune(sparsity=0.5, targets=("*fc*",), seed=3)))
    part(form, "sparsity").slider.value = 0.6
    assert form.recipe == wb.Recipe(wb.Prune(sparsity=0.6, targets=("*fc*",), seed=3))


def test_a_value_beyond_the_slider_widens_it(form):
    form.set_recipe(wb.Recipe(wb.Prune(sparsity=0.5), wb.Distill(temperature=50.0)))
    assert part(form, "temperature").slider.value == 50


def test_recipes_that_sliders_cannot_show_are_refused(form):
    apart = wb.Recipe(
        wb.Prune(sparsity=0.2, targets=("a",)),
        wb.Distill(temperature=2),
        wb.Prune(sparsity=0.2, targets=("b",)),
    )
    with pytest.raises(
        RecipeError, match="cannot be put on the sliders: they hold steps in the order prune, distill"
    ):
        form.set_recipe(apart)
    assert form.recipe == wb.Recipe()


def test_undo_and_redo_by_drags_not_by_pixels(form, clock):
    slider = part(form, "sparsity").slider
    for index in range(1, 30):
        clock.now += 0.05
        slider.value = index / 100
    clock.now += 5
    part(form, "weight_bits").slider.value = 3
    form.undo()
    assert form.recipe == wb.Recipe(wb.Prune(sparsity=0.29))
    assert not part(form, "weight_bits").on.value
    form.undo()
    assert form.recipe == wb.Recipe()
    form.undo()
    assert form.recipe == wb.Recipe()
    form.redo()
    form.redo()
    form.redo()
    assert form.recipe == wb.Recipe(wb.Prune(sparsity=0.29), wb.Quantize(weight_bits=3))
    form.reset()
    assert form.recipe == wb.Recipe()
    form.undo()
    assert len(form.recipe) == 2
    slider.value = 0.8
    form.redo()
    assert form.recipe.get("prune").sparsity == 0.8


def test_a_new_method_appears_by_itself():
    @configuration
    class Shrink(Step):
        """Multiply weights."""

        slider: ClassVar[str] = "shrink"
        position: ClassVar[int] = 15
        stops: ClassVar[tuple[float, ...]] = (0.1, 0.9)

        shrink: Annotated[float, Field(gt=0, le=1, description="factor")] = 0.9
        loud: Annotated[bool, Field(description="whether to say so")] = False

    METHODS.register(Shrink)(lambda step, work: None)
    try:
        form = RecipeForm()
        part(form, "shrink").slider.value = 0.5
        assert form.recipe.steps[0] == Shrink(shrink=0.5)
        assert list(part(form, "shrink").choices) == ["loud"]
    finally:
        METHODS.unregister(Shrink)


@pytest.mark.parametrize(("span", "step"), [(1.0, 0.01), (8.0, 0.1), (0.99, 0.01), (100.0, 1.0), (3.0, 0.05)])
def test_steps_are_round(span, step):
    assert nice_step(span) == step
    assert round(step, decimals(step)) == step


def test_bounds_and_scale():
    limits = bounds(wb.Prune.options()["sparsity"])
    assert (limits.low, limits.high, limits.low_open, limits.high_open) == (0, 1, False, True)
    bits = scale(wb.Quantize)  # an average of widths; 16 bits are beyond the slider's end
    assert (bits.low, bits.high, bits.step) == (2, 8, 0.1)


def test_choices_that_are_used_less_lie_in_a_fold_which_opens_when_one_matters(form):
    prune = part(form, "sparsity")
    assert prune.fold.layout.display == "none"
    assert prune.choices["pattern"] not in prune.fold.children
    assert prune.choices["rounds"] in prune.fold.children
    assert "rounds" in prune.more.tooltip
    form.set_recipe(wb.Recipe(wb.Prune(sparsity=0.3)))
    assert not prune.more.value
    form.set_recipe(wb.Recipe(wb.Prune(sparsity=0.3, rounds=2, train_steps=5)))
    assert prune.more.value
    assert prune.fold.layout.display is None


# --- methods in the fold


def test_what_complements_other_methods_is_folded_until_it_is_used():
    form = RecipeForm()
    shown = [child.kind.slider for child in form.children if hasattr(child, "kind")]
    assert shown == ["rank_ratio", "sparsity", "weight_bits", "temperature"]
    assert {child.kind for child in form.fold.children} == {kind for kind in METHODS.steps() if kind.aside}
    assert form.fold.layout.display == "none"
    form.set_recipe(Recipe(wb.Prune(sparsity=0.5), wb.Repair()))
    assert form.more.value
    assert form.fold.layout.display is None
    form.undo()
    assert form.recipe == Recipe()
