"""Intervals after some items that use what is known of all of them: the dense model's results, and those of a
neighbouring recipe.

Every interval here is for the value beyond the evaluation set, as that of the last look is: what the model
would show on data drawn like these. With n of N items read, the change is estimated by a difference estimator
(Cochran, Sampling Techniques 1977, chapters 7 and 12): the mean of (compressed - reference) over the n items
plus the mean of (reference - dense) over all N, the reference being the dense model or a neighbour that was
measured before. Its variance has two parts,

    (variance of compressed - reference) * (1/n - 1/N)  +  (variance of compressed - dense) / N,

the first with the finite population correction; it vanishes at n = N, where the estimate is the plain one.
Without the second part the interval would be for the value on all N items alone, which it therefore contains
more often than it promises.

The slope on the reference is 1 and never fitted. Fitted slopes on the dense loss were measured (150 random
recipes of fashion-cnn, 100 of fashion-vit, level 98.75%): least squares covers 76% after 16 items; with a
jackknife's variance (HC3), which covers 95%, intervals are 3.5 to 4 times as wide after 16 items, a tenth
wider after 64 and 4 to 6% narrower after 256, since the dense loss is skewed and says little about how
another model changes it. On a neighbour a fitted slope is no narrower than 1 with the choice below. Of the
candidates the one that is narrowest on the items read is taken: that choice is part of what
`benchmarks/results/coverage.md` measures. No control mends that after 16 items Student's interval of a skewed
mean loss falls short of its level: what is known of the dense model says how much wider it must be
(`workbench.metrics.hard_items`).

Single answers (right or wrong) are post-stratified by the answer of the reference: among the items that it
has right the compressed model can only lose, among the others only gain. Both shares get Wilson's interval
and the numbers of items of each stratum are known; the parts are joined by the square-and-add rule (MOVER:
Newcombe 1998; Zou and Donner 2008), which keeps them skewed as they are. Bonett and Price's interval of the
paired change is the other candidate: narrower where hardly anything flips. What is not done: looks themselves
are not stratified, the order stays random, so that any prefix is a fair sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.metrics.estimate import Estimate
from workbench.metrics.intervals import (
    mean,
    normal_quantile,
    paired_proportions,
    proportion,
    student_quantile,
    variance,
)
from workbench.metrics.scores import Scores

Triple = tuple[Estimate, Estimate, Estimate]  # of dense, of compressed, of the change


@dataclass(frozen=True)
class ControlVariates:
    """What is known of all N evaluation items before a look has read them: `dense`, and the scores of a
    neighbouring recipe.
    """

    dense: Scores
    neighbour: Scores | None = None

    def means(self, name: str, compressed: Scores, level: float, widening: float = 1.0) -> Triple:
        """Return the estimates of a weighted mean of `name` ("loss" or "correct") of the first n items'
        scores, what is unread `widening` times as uncertain.
        """
        near = None if self.neighbour is None else getattr(self.neighbour, name)
        return means(
            getattr(self.dense, name),
            near,
            getattr(compressed, name),
            self.dense.weight,
            level,
            widening=widening,
        )

    def answers(self, compressed: Scores, level: float) -> Triple:
        """Return the estimates of accuracy, answers being right or wrong, from the first n items' scores."""
        return answers(
            self.dense.correct,
            None if self.neighbour is None else self.neighbour.correct,
            compressed.correct,
            level,
        )


def means(
    dense: Tensor,
    near: Tensor | None,
    compressed: Tensor,
    weight: Tensor,
    level: float,
    *,
    widening: float = 1.0,
) -> Triple:
    """Return the estimates of weighted means. dense, near, weight [N]; compressed [n], of the first n items.

    Infinite losses get no control.
    """
    count, total = len(compressed), len(dense)
    before, some = dense[:count], weight[:count]
    change = compressed - before
    if not (torch.isfinite(dense).all() and torch.isfinite(compressed).all()):
        return (
            mean(before, some, level, widening),
            mean(compressed, some, level, widening),
            mean(change, some, level, widening),
        )
    references = [dense, *([] if near is None or not torch.isfinite(near).all() else [near])]
    spreads = [variance(compressed - candidate[:count], some) for candidate in references]
    spread = min(spreads)
    reference = references[spreads.index(spread)]
    quantile = widening * student_quantile(level, count - 1)

    def estimate(base: Tensor, whole: Tensor) -> Estimate:
        value = average(base, weight) + average(compressed - reference[:count], some)
        half = quantile * math.sqrt(spread * (1 / count - 1 / total) + variance(whole, some) / total)
        return Estimate(value, value - half, value + half)

    return mean(dense, weight, level), estimate(reference, compressed), estimate(reference - dense, change)


def average(values: Tensor, weight: Tensor) -> float:
    """Return the mean of values [items], weighted."""
    return float((values * weight).sum() / weight.sum())


@dataclass(frozen=True)
class UnreadChange:
    """How compressed and reference differ in what is not read yet: the estimate and the distances to the ends
    of its interval.
    """

    value: float
    down: float
    up: float


def answers(dense: Tensor, near: Tensor | None, compressed: Tensor, level: float) -> Triple:
    """Return the estimates of shares of right answers. dense, near [N] and compressed [n], of the first n
    items: 0 or 1.
    """
    count, total = len(compressed), len(dense)
    unread, quantile = 1 - count / total, normal_quantile(level)
    candidates = []
    for reference in (dense, *([] if near is None else [near])):
        base = float((reference - dense).mean()), float(reference.mean())
        for part in (paired(reference, compressed, level), stratified(reference, compressed, level)):
            spread = quantile**2 * change_variance(dense[:count], compressed) / total
            candidates.append((joined(base[0], part, unread, spread, -1.0), base[1], part))
    change, base_value, part = min(candidates, key=lambda candidate: candidate[0].high - candidate[0].low)
    share = (float(compressed.sum()) + 1) / (count + 2)
    return (
        proportion(dense, level),
        joined(base_value, part, unread, quantile**2 * share * (1 - share) / total, 0.0),
        change,
    )


def joined(base: float, part: UnreadChange, unread: float, spread: float, least: float) -> Estimate:
    """Return `base` plus a part that is uncertain by its distances where items are unread, and by the root of
    `spread` everywhere; clipped to [least, 1].
    """
    value = base + part.value
    low, high = (math.sqrt(unread * distance**2 + spread) for distance in (part.down, part.up))
    return Estimate(min(1.0, max(least, value)), max(least, value - low), min(1.0, value + high))


def paired(reference: Tensor, compressed: Tensor, level: float) -> UnreadChange:
    """Return mean(compressed - reference) over the items read, with Bonett and Price's interval. reference
    [N], compressed [n].
    """
    change = paired_proportions(reference[: len(compressed)], compressed, level)
    return UnreadChange(
        change.value, max(0.0, change.value - change.low), max(0.0, change.high - change.value)
    )


def stratified(reference: Tensor, compressed: Tensor, level: float) -> UnreadChange:
    """Return the same, post-stratified by the answers of the reference, whose shares over all N items are
    known. reference: 0/1 of all items, [N]; compressed: of those read, [n].
    """
    right, read = float(reference.mean()), reference[: len(compressed)] == 1
    lost, gained = stratum(1 - compressed[read], level), stratum(compressed[~read], level)
    ends = [
        (right * (lost.high - lost.value), (1 - right) * (gained.value - gained.low)),
        (right * (lost.value - lost.low), (1 - right) * (gained.high - gained.value)),
    ]
    down, up = (math.hypot(*distances) for distances in ends)
    return UnreadChange((1 - right) * gained.value - right * lost.value, down, up)


def stratum(changed: Tensor, level: float) -> Estimate:
    """Return the share of changed answers (0/1, [n]) in a stratum: of one that no item was read of, nothing
    is known.
    """
    return proportion(changed, level) if len(changed) else Estimate(0.0, 0.0, 1.0)


def change_variance(dense: Tensor, compressed: Tensor) -> float:
    """Return the variance of one item's change, after one more gain and one more loss (Bonett and Price).

    Both [n], 0 or 1.
    """
    gained, lost = ((float(((compressed - dense) == sign).sum()) + 1) / (len(dense) + 2) for sign in (1, -1))
    return gained + lost - (gained - lost) ** 2
