"""Quality whose value is no mean over items: rank correlation and word error rate, with paired bootstrap
intervals over items.

Percentile bootstrap (Efron 1979): whole items are drawn again with replacement, the same ones for both
models, and the metric is computed anew; the interval holds the middle of what comes out. With few items
(below about 30) it is too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from workbench.metrics.estimate import Estimate
from workbench.metrics.scores import Scores

DRAWS = 2000
CHUNK = 2**22  # numbers drawn at a time

Statistic = Callable[[Tensor], Tensor]  # indices [draws, n] of items -> the metric of each draw, [draws]


def rank_correlations(dense: Scores, compressed: Scores, level: float) -> tuple[Estimate, Estimate, Estimate]:
    """Return Spearman's correlation of cosines with people's scores: of dense, of compressed, and the paired
    change.
    """
    score = dense.details["score"]
    before, after = dense.details["cosine"], compressed.details["cosine"]

    def statistic(values: Tensor) -> Statistic:
        return lambda index: spearman(values[index], score[index])

    return paired(statistic(before), statistic(after), len(score), level, (-1.0, 1.0))


def word_error_rates(dense: Scores, compressed: Scores, level: float) -> tuple[Estimate, Estimate, Estimate]:
    """Return word errors divided by words, over all utterances: of dense, of compressed, and the paired
    change.

    Where both models make the same errors a bootstrap has no width; no interval is narrower than the bound of
    the rule of three (Hanley & Lippman-Hand 1983), -ln(half of what the confidence leaves) errors over all
    words.
    """
    word_counts = dense.details["words"]

    def statistic(scores: Scores) -> Statistic:
        return lambda index: scores.details["word errors"][index].sum(1) / word_counts[index].sum(1)

    floor = -math.log((1 - level) / 2) / float(word_counts.sum())
    estimates = paired(statistic(dense), statistic(compressed), len(word_counts), level, (0.0, math.inf))
    return (
        widened(estimates[0], floor, 0.0),
        widened(estimates[1], floor, 0.0),
        widened(estimates[2], floor, -math.inf),
    )


def widened(estimate: Estimate, floor: float, least: float) -> Estimate:
    """Return an estimate whose interval reaches at least `floor` to both sides, not below `least`."""
    return Estimate(
        estimate.value,
        max(least, min(estimate.low, estimate.value - floor)),
        max(estimate.high, estimate.value + floor),
    )


def paired(
    before: Statistic, after: Statistic, count: int, level: float, ends: tuple[float, float]
) -> tuple[Estimate, Estimate, Estimate]:
    """Return two statistics of the same items and their difference, each with its percentile interval,
    clipped to a range.
    """
    generator = torch.Generator().manual_seed(0)
    whole = torch.arange(count).unsqueeze(0)
    values = float(before(whole)), float(after(whole))
    drawn: list[tuple[Tensor, Tensor]] = []
    done, step = 0, max(1, CHUNK // count)
    while done < DRAWS:
        index = torch.randint(count, (min(step, DRAWS - done), count), generator=generator)
        drawn.append((before(index), after(index)))
        done += len(index)
    drawn_before, drawn_after = (torch.cat(values_drawn) for values_drawn in zip(*drawn, strict=True))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)

    def estimate(value: float, samples: Tensor, least: float, most: float) -> Estimate:
        under, over = (float(x) for x in torch.quantile(samples, tails))
        return Estimate(value, max(least, min(under, value)), min(most, max(over, value)))

    return (
        estimate(values[0], drawn_before, *ends),
        estimate(values[1], drawn_after, *ends),
        estimate(values[1] - values[0], drawn_after - drawn_before, -math.inf, math.inf),
    )


def spearman(values: Tensor, others: Tensor) -> Tensor:
    """Return Spearman's rank correlation of each row, float64 [rows].

    0 where all of a row are equal. Both [rows, n].
    """
    left, right = (
        ranks - ranks.mean(1, keepdim=True) for ranks in (average_ranks(values), average_ranks(others))
    )
    length = (left.square().sum(1) * right.square().sum(1)).sqrt()
    return torch.where(length > 0, (left * right).sum(1) / length.clamp_min(1e-300), 0.0)


def average_ranks(values: Tensor) -> Tensor:
    """Return the rank of each value in its row, ties sharing the mean of theirs: [rows, n], float64."""
    values = values.contiguous()
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values, right=False)
    upto = torch.searchsorted(ordered, values, right=True)
    return (below + upto).double() / 2


def reversals(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each item, the fraction of others with which its order by these values ([n]) is reversed
    (float64 [n]), and its weight.
    """
    rows = [
        ((before[i] - before).sign() * (after[i] - after).nan_to_num(0.0).sign() < 0).double().sum()
        for i in range(len(before))
    ]
    return torch.stack(rows) / max(1, len(before) - 1), torch.ones_like(before)
