"""Registering a criterion tries what its record says: each fact that does not hold is refused in one line."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import workbench as wb
from workbench.compress.pruning.criterion import check
from workbench.compress.pruning.criterion.trial import UndeclaredError, trial_layers
from workbench.errors import RecipeError
from workbench.util.about import About

ABOUT = About("criterion=tried", "nobody", "nothing", "nothing", "everything")


def magnitude(seen, seed):
    return seen.weights.abs()


def wanda(seen, seed):
    return seen.weights.abs() * seen.input_norms().unsqueeze(-2)


def in_place(seen, seed):
    return seen.weights.abs_().clone()


def by_call(counter=[]):  # noqa: B006  what a careless criterion keeps
    def scores(seen, seed):
        counter.append(seed)
        return seen.weights.abs() + len(counter)

    return scores


def spread(seen, seed):
    return (2 * seen.input_norms()).unsqueeze(-2).expand_as(seen.weights)


def registered(scores, **facts):
    """Register a criterion of these scores, and forget it."""
    given = {"reads": frozenset(), "by_row": False} | facts
    wb.CRITERIA.register(wb.Criterion(name="tried", about=ABOUT, scores=scores, **given))
    wb.CRITERIA.unregister("tried")


MOMENTS, GRADIENTS = {"reads": frozenset({"moments"})}, {"reads": frozenset({"gradients"})}
WRONG = {
    "moments": (wanda, {}, r"scores looks at moments, which reads=\[\] does not state"),
    "errors": (lambda seen, _: seen.removal_errors(), GRADIENTS, "looks at moments, which reads"),
    "gradients": (lambda seen, _: seen.mean_gradients().abs(), MOMENTS, "scores looks at gradients"),
    "squares": (lambda seen, _: seen.squared_gradients() * 2, {}, "scores looks at gradients"),
    "shape": (
        lambda seen, _: seen.weights.abs().sum(-1),
        {},
        r"scores of weights \[2, 6, 8\] are \[2, 6\]",
    ),
    "no tensor": (lambda _seen, _seed: None, {}, "scores returns a NoneType, no tensor"),
    "type": (lambda seen, _: seen.weights.abs().double(), {}, "scores are torch.float64, not torch.float32"),
    "weights": (lambda seen, _: seen.weights, {}, "scores is no new tensor"),
    "a view": (lambda seen, _: seen.weights.view_as(seen.weights), {}, "scores is no new tensor"),
    "norms": (
        lambda seen, _: seen.input_norms().unsqueeze(-2).expand_as(seen.weights),
        MOMENTS,
        "scores is no new tensor",
    ),
    "spread": (spread, MOMENTS, "scores is no new tensor"),
    "negative": (lambda seen, _: seen.weights + 0, {}, "scores go down to -"),
    "infinite": (lambda seen, _: 1 / seen.weights.abs(), {}, "scores are not finite where weights"),
    "nan": (lambda seen, _: seen.weights.abs() / seen.weights.abs(), {}, "scores are not finite"),
    "changes weights": (in_place, {}, "scores changes what it is given"),
    "changes norms": (
        lambda seen, _: seen.weights.abs() * seen.input_norms().add_(1).unsqueeze(-2),
        MOMENTS,
        "scores changes what it is given",
    ),
    "by call": (by_call(), {}, "scores of the same layers and seed differ from call to call"),
    "across layers": (
        lambda seen, _: seen.weights.abs() / seen.weights.abs().sum(),
        {},
        "scores of a layer depend on the layers beside it",
    ),
    "fails": (lambda seen, _: seen.weights.missing, {}, "scores fails on a trial layer .AttributeError"),
    "draws": (lambda seen, seed: seen.random(seed), {}, "scores are drawn by the seed, which units='draw'"),
    "magnitudes": (
        lambda seen, _: seen.weights.abs().sqrt(),
        {"kernel": "magnitudes"},
        r"kernel='magnitudes' chooses by \|w\|, which its scores are not",
    ),
    "rows": (
        magnitude,
        {"kernel": "rows", "by_row": True},
        r"kernel='rows' chooses by \|w\| times the inputs",
    ),
    "rows of layers": (
        wanda,
        MOMENTS | {"kernel": "rows"},
        "kernel='rows' compares weights within their row",
    ),
    "magnitudes of rows": (magnitude, {"kernel": "magnitudes", "by_row": True}, "compares weights within"),
    "magnitudes across": (
        magnitude,
        {"kernel": "magnitudes", "across": "output error"},
        "kernel='magnitudes' compares layers as they are",
    ),
    "makes up": (magnitude, {"makes_up": True}, r"makes_up=True chooses by w\^2 / d\^2"),
    "makes up units": (magnitude, {"makes_up": True, "units": "sum"}, "takes out whole units"),
    "reads": (magnitude, {"reads": frozenset({"moment"})}, "should be of 'moments' and 'gradients'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_hold_is_refused(name):
    scores, facts, message = WRONG[name]
    with pytest.raises(RecipeError, match=rf"^criterion 'tried' cannot be registered: .*{message}") as caught:
        registered(scores, **facts)
    assert "\n" not in str(caught.value)
    assert "tried" not in wb.CRITERIA


def test_what_holds_is_registered():
    for record in wb.CRITERIA:
        check(record)  # all built-in ones
    registered(magnitude, kernel="magnitudes", across="as it is")
    registered(lambda seen, _: (seen.weights * seen.weights).sqrt(), kernel="magnitudes")  # up to rounding
    registered(wanda, reads=frozenset({"moments"}), kernel="rows", by_row=True)
    registered(lambda seen, seed: seen.random(seed), units="draw")


@pytest.mark.parametrize("record", wb.CRITERIA, ids=lambda record: record.name)
def test_no_built_in_criterion_declares_what_it_does_not_read(record):
    """What `reads` states takes a pass over calibration data: without any one of it the scores fail."""
    for statistic in record.reads:
        with pytest.raises(UndeclaredError):
            record.scores(trial_layers(record.reads - {statistic}), 0)


def test_a_trial_leaves_the_generator_of_random_numbers_alone():
    state = torch.get_rng_state()
    check(dataclasses.replace(wb.CRITERIA["random"], name="tried"))
    assert torch.equal(torch.get_rng_state(), state)
