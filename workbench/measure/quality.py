"""Quality against the dense model on the same items, with intervals.

Accuracy of single answers: Wilson's interval (1927); its paired change: Bonett and Price's adjusted Wald interval (2012),
which stays honest with few items and few flips. Averages over tokens: Student's t on per-item differences, weighted by
tokens (a ratio estimator). Rank correlation and word error rate: paired bootstrap (`workbench.measure.resampling`). Several looks at growing samples share the error by Bonferroni, so that all hold together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy import special  # scipy.stats takes a second to import, which the first look would wait for
from torch import Tensor

from workbench.errors import DataError
from workbench.measure.estimate import Estimate
from workbench.measure.metrics import metric_named
from workbench.measure.resampling import rank_correlations, reversals, word_error_rates
from workbench.tasks.base import Scores

__all__ = ["Estimate", "Quality", "exp", "flips", "mean", "paired_proportions", "proportion", "quality"]

RESAMPLED = {"rank correlation": (rank_correlations, "squared error"), "word error rate": (word_error_rates, "loss")}  # and the mean that goes with it


@dataclass(frozen=True)
class Quality:
    """One metric of the compressed model next to the dense one, on the same items.

    `change` is paired: compressed - dense (of accuracies and error rates as a fraction, of `loss` in nats), but for `perplexity` the
    ratio minus 1. `confidence` is that of every interval here, joint over `looks` looks. `drop` is how much worse it got.
    """

    metric: str
    dense: Estimate
    compressed: Estimate
    change: Estimate
    items: int
    confidence: float
    looks: int

    @property
    def drop(self) -> Estimate:
        """Return the change with the sign turned so that positive is worse."""
        if not metric_named(self.metric).higher:
            return self.change
        return Estimate(-self.change.value, -self.change.high, -self.change.low)


def quality(primary: str, dense: Scores, compressed: Scores, confidence: float = 0.95, looks: int = 1) -> tuple[Quality, ...]:
    """Return every metric of the task, `primary` first.

    Raises:
        DataError: fewer than two items, or different items.

    """
    if len(dense) != len(compressed):
        raise DataError(f"dense and compressed scores are of different items: {len(dense)} and {len(compressed)}")
    if len(dense) < 2:
        raise DataError(f"{len(dense)} evaluation item: an interval needs at least 2")
    level = 1 - (1 - confidence) / looks
    common = {"items": len(dense), "confidence": confidence, "looks": looks}
    if primary in RESAMPLED:
        function, second = RESAMPLED[primary]
        others = mean(dense.loss, dense.weight, level), mean(compressed.loss, dense.weight, level), mean(compressed.loss - dense.loss, dense.weight, level)
        return Quality(primary, *function(dense, compressed, level), **common), Quality(second, *others, **common)  # type: ignore[arg-type]
    single = bool((dense.weight == 1).all() and ((dense.correct == 0) | (dense.correct == 1)).all())
    loss = [mean(s.loss, s.weight, level) for s in (dense, compressed)]
    loss_change = mean(compressed.loss - dense.loss, dense.weight, level)
    right = [proportion(s.correct, level) if single else mean(s.correct, s.weight, level) for s in (dense, compressed)]
    gained = paired_proportions(dense.correct, compressed.correct, level) if single else mean(compressed.correct - dense.correct, dense.weight, level)
    accuracy = Quality("accuracy" if primary == "accuracy" else "next-token accuracy", right[0], right[1], gained, **common)  # type: ignore[arg-type]
    if primary == "accuracy":
        return accuracy, Quality("loss", loss[0], loss[1], loss_change, **common)  # type: ignore[arg-type]
    perplexity = Quality("perplexity", loss[0].mapped(exp), loss[1].mapped(exp), loss_change.mapped(lambda x: exp(x) - 1), **common)  # type: ignore[arg-type]
    return perplexity, accuracy


def flips(dense: Scores, compressed: Scores, confidence: float = 0.95, looks: int = 1) -> Estimate:
    """Return the fraction of answers that changed (equal accuracy can hide them), with its interval.

    Where items are ranked, an answer is which of two items comes first; of a transcript, all of its words.
    """
    if "cosine" in dense.details:
        return reversed_orders(*reversals(dense, compressed), 1 - (1 - confidence) / looks)
    changed = (dense.answers != compressed.answers).double()
    level = 1 - (1 - confidence) / looks
    return proportion(changed, level) if changed.ndim == 1 else mean(changed.mean(1), dense.weight, level)


def reversed_orders(shares: Tensor, weight: Tensor, level: float) -> Estimate:
    """Return the mean share of reversed pairs; each item stands in many pairs, which doubles the error of the mean (Hoeffding 1948)."""
    found = mean(shares, weight, level)
    half = 2 * (found.high - found.value)
    return Estimate(found.value, max(0.0, found.value - half), min(1.0, found.value + half))


def exp(x: float) -> float:
    """Return e^x, infinite where it overflows: a destroyed model has no perplexity to speak of."""
    return math.exp(x) if x < 700 else math.inf


def proportion(successes: Tensor, level: float) -> Estimate:
    """Return the mean of 0/1 values with the interval of Wilson (1927)."""
    total = len(successes)
    share, z = int(successes.sum()) / total, float(special.ndtri((1 + level) / 2))
    centre, stretch = share + z**2 / (2 * total), 1 + z**2 / total
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return Estimate(share, max(0.0, (centre - half) / stretch), min(1.0, (centre + half) / stretch))


def paired_proportions(before: Tensor, after: Tensor, level: float) -> Estimate:
    """Return mean(after - before) of paired 0/1 values with the interval of Bonett and Price (2012), clipped to [-1, 1]."""
    total = len(before)
    gained, lost = int(((after == 1) & (before == 0)).sum()), int(((after == 0) & (before == 1)).sum())
    up, down = (gained + 1) / (total + 2), (lost + 1) / (total + 2)
    half = float(special.ndtri((1 + level) / 2)) * math.sqrt((up + down - (up - down) ** 2) / (total + 2))
    return Estimate((gained - lost) / total, max(-1.0, up - down - half), min(1.0, up - down + half))


def mean(values: Tensor, weight: Tensor, level: float) -> Estimate:
    """Return the weighted mean over items with Student's t interval on the weighted residuals."""
    total = weight.sum()
    average = float((values * weight).sum() / total)
    if not math.isfinite(average):
        return Estimate(math.inf, math.inf, math.inf)
    residual = weight * (values - average) * len(values) / total
    error = float(torch.sqrt(residual.square().sum() / (len(values) - 1) / len(values)))
    half = float(special.stdtrit(len(values) - 1, (1 + level) / 2)) * error
    return Estimate(average, average - half, average + half)
