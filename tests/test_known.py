"""Intervals that use what is known of all items: simulated populations with a known truth, the plain numbers
where nothing is known, hand-made formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statistical
import torch
from scipy import stats

from workbench.metrics.control_variates import ControlVariates
from workbench.metrics.quality import mean, paired_proportions, proportion, quality
from workbench.metrics.scores import Scores
from workbench.metrics.sequential_looks import joint_level

TOTAL = 400
COUNTS = (16, 64, 256, TOTAL)


def made(loss: np.ndarray, correct: np.ndarray | None = None, weight: np.ndarray | None = None) -> Scores:
    right = torch.tensor(np.zeros(len(loss)) if correct is None else correct, dtype=torch.float64)
    return Scores(
        torch.tensor(loss, dtype=torch.float64),
        right,
        (
            torch.ones(len(loss), dtype=torch.float64)
            if weight is None
            else torch.tensor(weight, dtype=torch.float64)
        ),
        right.long(),
    )


def population(
    draw: np.random.Generator, count: int, near: float, skewed: bool = True
) -> tuple[Scores, Scores, Scores]:
    """Return dense, compressed and neighbouring scores of items as a classifier has them: most losses near 0,
    few large; `near` of the neighbour's change is shared."""
    hard = draw.gamma(0.3, 1.0, count)  # of mean 0.3, skewness 3.7
    shared, own, theirs = (
        draw.exponential(1.0, count) if skewed else draw.normal(1.0, 1.0, count) for _ in range(3)
    )
    dense, mine, neighbour = (
        hard,
        hard + 0.4 * (near * shared + (1 - near) * own),
        hard + 0.4 * (near * shared + (1 - near) * theirs),
    )
    return tuple(made(loss, loss < 0.7) for loss in (dense, mine, neighbour))  # type: ignore[return-value]


def truth(near: float, skewed: bool) -> tuple[float, float]:
    """Return the change of accuracy and of loss in that population: from a sample that is far larger than any
    below."""
    dense, mine, _ = population(np.random.default_rng(99), 2_000_000, near, skewed)
    return float((mine.correct - dense.correct).mean()), 0.4


KINDS = {
    "plain": lambda _: None,
    "dense": lambda known: ControlVariates(known[0]),
    "near": lambda known: ControlVariates(*known),
}
TRIALS = 160  # of which 152 hold at 95%, 140 but once in 10,000 draws, and 108 with half the width


def simulated(near: float, skewed: bool, level: float) -> tuple[dict, dict, dict]:
    """Return, for each kind of interval and metric (0: accuracy, 1: loss), whether it holds [trials, looks],
    whether the first look's holds the value on all items [trials], and the mean width [looks]."""
    wanted, draw = truth(near, skewed), np.random.default_rng(3)
    keys = [(kind, metric) for kind in KINDS for metric in range(2)]
    held, widths = ({key: np.zeros((TRIALS, len(COUNTS))) for key in keys} for _ in range(2))
    full = {key: np.zeros(TRIALS) for key in keys}
    for trial in range(TRIALS):
        dense, mine, neighbour = population(draw, TOTAL, near, skewed)
        whole = quality("accuracy", dense, mine)
        for kind, control_of in KINDS.items():
            looks = [
                quality(
                    "accuracy",
                    dense.first(n),
                    mine.first(n),
                    level=level,
                    known=control_of((dense, neighbour)),
                )
                for n in COUNTS
            ]
            for metric in range(2):
                changes = [look[metric].change for look in looks]
                held[kind, metric][trial] = [
                    change.low <= wanted[metric] <= change.high for change in changes
                ]
                full[kind, metric][trial] = changes[0].low <= whole[metric].change.value <= changes[0].high
                widths[kind, metric][trial] = [change.high - change.low for change in changes]
    return held, full, {key: width.mean(0) for key, width in widths.items()}


@pytest.mark.parametrize(("near", "skewed"), [(0.9, True), (0.9, False), (0.3, False)])
def test_intervals_hold_at_each_look_and_together(near, skewed):
    """95% for all looks together. Of skewed losses single looks fall short of that, and hold at 96% of 98.5%.

    Intervals of half the width would be found out, at any look and together.
    """
    level = joint_level(COUNTS, 0.95)
    held, full, width = simulated(near, skewed, level)
    for (kind, metric), holds in held.items():
        promised = level if metric == 0 or not skewed else 0.96
        for look, count in zip(COUNTS, holds.sum(0), strict=True):
            statistical.assert_at_least(
                count, TRIALS, promised, fault=statistical.half_as_wide(level), about=(kind, metric, look)
            )
        statistical.assert_at_least(full[kind, metric].sum(), TRIALS, promised, about=(kind, metric, "full"))
        if metric == 0 or not skewed:
            statistical.assert_at_least(holds.all(1).sum(), TRIALS, 0.95, about=(kind, metric, "together"))
    for metric in range(2):
        assert (width["near", metric][-1], width["dense", metric][-1]) == pytest.approx(
            (width["plain", metric][-1],) * 2
        )  # nothing is unread
        assert (
            width["dense", metric] <= width["plain", metric] * (1.0 if metric == 0 else 1.1) + 1e-9
        ).all()  # of losses both are widened, each by what it knows
    assert width["dense", 0][0] < 0.85 * width["plain", 0][0]
    if near == 0.9:
        assert (
            width["near", 1][:2] < 0.6 * width["plain", 1][:2]
        ).all()  # a third of the items for the same width
        assert (width["near", 0][:3] < 0.9 * width["plain", 0][:3]).all()


@pytest.mark.parametrize("share", [0.0, 0.005, 0.03, 0.4])
@pytest.mark.parametrize("items", [16, 64, 256])
def test_single_answers_are_covered_however_few_of_them_flip(items, share):
    """Right answers are lost with probability `share`, wrong ones gained with a third of it.

    Evaluation sets of 1,000 items. Where many flip, half the width would be found out; where few do, an
    interval that believes in none because it has seen none.
    """
    draw, trials, level, hits = np.random.default_rng(5), 400, 0.95, 0
    for _ in range(trials):
        dense = draw.random(1000) < 0.9
        moved = draw.random(1000)
        mine = np.where(dense, moved >= share, moved < share / 3)
        change = quality(
            "accuracy",
            made(moved, dense).first(items),
            made(moved, mine).first(items),
            level=level,
            known=ControlVariates(made(moved, dense)),
        )[0].change
        hits += change.low <= -0.9 * share + 0.1 * share / 3 <= change.high
    statistical.assert_at_least(hits, trials, level)


def test_nothing_is_known_that_changes_the_last_look():
    dense, mine, neighbour = population(np.random.default_rng(1), 100, 0.5)
    assert quality("accuracy", dense, mine, known=ControlVariates(dense, neighbour)) == quality(
        "accuracy", dense, mine
    )
    assert quality("perplexity", dense, mine, known=ControlVariates(dense, neighbour)) == quality(
        "perplexity", dense, mine
    )


def test_the_estimate_meets_the_plain_one_where_all_but_one_item_are_read():
    dense, mine, neighbour = population(np.random.default_rng(2), 300, 0.5)
    before = quality("accuracy", dense, mine)
    after = quality("accuracy", dense.first(299), mine.first(299), known=ControlVariates(dense, neighbour))
    for plain, controlled in zip(before, after, strict=True):
        assert plain.change.value == pytest.approx(controlled.change.value, abs=0.01)
        assert plain.change.half_width == pytest.approx(controlled.change.half_width, rel=0.03)
        assert plain.compressed.half_width == pytest.approx(controlled.compressed.half_width, rel=0.05)


def wider(read: np.ndarray, whole: np.ndarray) -> float:
    """Return how much wider the interval of a mean loss is for hard items that were not read."""
    hard = (1 - np.exp(-whole)) ** 2
    return max(1.0, (hard.sum() + 0.5) / (len(whole) + 0.5) / ((1 - np.exp(-read)) ** 2).mean()) ** 0.5


def test_without_a_neighbour_the_change_of_a_mean_is_the_plain_one():
    dense, mine, _ = population(np.random.default_rng(4), 200, 0.5)
    plain = mean(mine.loss[:64] - dense.loss[:64], dense.weight[:64], 0.95)
    loss = quality("accuracy", dense.first(64), mine.first(64), known=ControlVariates(dense))[1]
    half = plain.half_width * wider(dense.loss[:64].numpy(), dense.loss.numpy())
    assert (loss.change.value, loss.change.low, loss.change.high) == pytest.approx(
        (plain.value, plain.value - half, plain.value + half)
    )
    assert loss.dense == mean(
        dense.loss, dense.weight, 0.95, wider(dense.loss.numpy(), dense.loss.numpy())
    )  # of all items
    assert loss.compressed.value == pytest.approx(loss.dense.value + loss.change.value)
    assert (
        loss.compressed.half_width
        < quality("accuracy", dense.first(64), mine.first(64))[1].compressed.half_width
    )


def test_the_difference_estimator_is_the_formula_worked_out():
    draw = np.random.default_rng(6)
    dense, near, mine = (draw.gamma(1.0, 1.0, 40) for _ in range(3))
    near = mine + 0.1 * near
    count = 10
    change = quality(
        "perplexity",
        made(dense).first(count),
        made(mine).first(count),
        known=ControlVariates(made(dense), made(near)),
    )[0].change
    z = mine[:count] - near[:count]
    y = mine[:count] - dense[:count]
    value = z.mean() + (near - dense).mean()
    half = (
        wider(dense[:count], dense)
        * stats.t.ppf(0.975, count - 1)
        * math.sqrt(z.var(ddof=1) * (1 / count - 1 / 40) + y.var(ddof=1) / 40)
    )
    assert (change.value, change.low, change.high) == pytest.approx(
        (math.exp(value) - 1, math.exp(value - half) - 1, math.exp(value + half) - 1)
    )


def test_weighted_windows_are_a_ratio_with_a_control():
    draw = np.random.default_rng(7)
    weight = draw.integers(50, 512, 30).astype(float)
    dense = draw.gamma(5.0, 0.5, 30)
    near, mine = dense + 0.2, dense + 0.21
    first, second, third = (made(loss, np.full(30, 0.5), weight) for loss in (dense, near, mine))
    perplexity = quality("perplexity", first.first(8), third.first(8), known=ControlVariates(first, second))[
        0
    ]
    assert math.log1p(perplexity.change.value) == pytest.approx(0.21)
    assert perplexity.change.half_width < 1e-6
    assert perplexity.compressed.value == pytest.approx(math.exp(np.average(mine, weights=weight)))


def test_answers_are_stratified_by_the_formula_worked_out():
    """20 items, 16 of them right.

    Of the first 10 the dense model has 7 right, of which 3 are lost, and 3 wrong, of which 1 is gained.
    """
    dense = np.array([1] * 7 + [0] * 3 + [1] * 9 + [0])
    mine = np.array([0, 0, 0, 1, 1, 1, 1, 1, 0, 0])
    first, second = made(dense * 1.0, dense), made(mine * 1.0, mine)
    accuracy = quality("accuracy", first.first(10), second, known=ControlVariates(first))[0]
    lost, gained = (
        proportion(torch.tensor(part, dtype=torch.float64), 0.95)
        for part in ([1, 1, 1, 0, 0, 0, 0], [1, 0, 0])
    )
    value = 0.2 * gained.value - 0.8 * lost.value
    p, q = 2 / 12, 4 / 12
    spread = stats.norm.ppf(0.975) ** 2 * (p + q - (p - q) ** 2) / 20
    low = value - math.sqrt(
        0.5 * ((0.8 * (lost.high - lost.value)) ** 2 + (0.2 * (gained.value - gained.low)) ** 2) + spread
    )
    high = value + math.sqrt(
        0.5 * ((0.8 * (lost.value - lost.low)) ** 2 + (0.2 * (gained.high - gained.value)) ** 2) + spread
    )
    assert accuracy.change.value == pytest.approx(value)
    assert (accuracy.change.low, accuracy.change.high) == pytest.approx((low, high))
    assert high - low < 2 * paired_proportions(first.correct[:10], second.correct, 0.95).half_width
    assert accuracy.dense == proportion(first.correct, 0.95)
    assert accuracy.compressed.value == pytest.approx(0.8 + value)


def test_lost_models_get_no_control():
    dense = np.ones(20)
    broken = np.full(20, np.inf)
    perplexity = quality(
        "perplexity",
        made(dense).first(8),
        made(broken).first(8),
        known=ControlVariates(made(dense), made(dense)),
    )[0]
    assert perplexity.change.value == perplexity.compressed.value == math.inf
    useless = quality(
        "perplexity",
        made(dense).first(8),
        made(dense * 2).first(8),
        known=ControlVariates(made(dense), made(broken)),
    )[0]
    assert useless.change.value == pytest.approx(math.e - 1)


def test_one_stratum_may_be_empty():
    right = np.ones(40)
    change = quality(
        "accuracy",
        made(right, right).first(16),
        made(right, right).first(16),
        known=ControlVariates(made(right, right)),
    )[0].change
    assert change.value == 0
    assert -0.25 < change.low < 0 <= change.high < 0.25


# --- all looks together


@pytest.mark.parametrize("counts", [(16, 64, 256, 2000), (16, 17), (16, 64, 256, 257), (2, 3, 4)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_joint_level_holds_for_random_walks(counts, confidence):
    level = joint_level(counts, confidence)
    steps = np.diff((0, *counts))
    walks = np.cumsum(
        np.random.default_rng(0).normal(size=(200_000, len(counts))) * np.sqrt(steps), axis=1
    ) / np.sqrt(counts)
    together = (np.abs(walks) <= stats.norm.ppf((1 + level) / 2)).all(axis=1)
    statistical.assert_rate(together.sum(), len(together), confidence, fault=0.01)
    assert confidence < level < 1 - (1 - confidence) / len(counts)  # cheaper than Bonferroni


# Pocock (1977), table 1: two-sided nominal levels of K equally spaced looks at an overall 5%.
@pytest.mark.parametrize(("looks", "nominal"), [(2, 0.0294), (3, 0.0221), (4, 0.0182), (5, 0.0158)])
def test_equally_spaced_looks_have_pococks_levels(looks, nominal):
    assert 1 - joint_level(tuple(range(20, 20 * looks + 1, 20)), 0.95) == pytest.approx(nominal, abs=6e-5)


def test_one_look_pays_nothing():
    assert joint_level((300,), 0.95) == 0.95
