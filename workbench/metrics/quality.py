"""Quality against the dense model on the same items, with intervals.

Accuracy of single answers: Wilson's interval (1927); its paired change: Bonett and Price's adjusted Wald
interval (2012), which stays honest with few items and few flips. Averages over tokens: Student's t on
per-item differences, weighted by tokens (a ratio estimator), for losses widened by what the dense model's say
of the items that are missing (`workbench.metrics.hard_items`); perplexity is the exponential of the mean loss
and of the ends of its interval. Rank correlation and word error rate: paired bootstrap
(`workbench.metrics.bootstrap`). Looks before the last use what is known of all items
(`workbench.metrics.control_variates`). All intervals are for the value beyond the evaluation set. Several
intervals that are to hold together share the error by Bonferroni, looks at growing samples by their joint
distribution (`workbench.metrics.sequential_looks`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from workbench.errors import DataError
from workbench.metrics.bootstrap import rank_correlations, reversals, word_error_rates
from workbench.metrics.control_variates import Known, Triple
from workbench.metrics.estimate import Estimate
from workbench.metrics.hard_items import widening
from workbench.metrics.intervals import mean, paired_proportions, proportion
from workbench.metrics.metrics import metric_named
from workbench.metrics.scores import Scores

__all__ = ["Estimate", "Quality", "exp", "flips", "mean", "paired_proportions", "proportion", "quality"]

RESAMPLED = {
    "rank correlation": (rank_correlations, "squared error"),
    "word error rate": (word_error_rates, "loss"),
}  # and the mean that goes with it


@dataclass(frozen=True)
class Quality:
    """One metric of the compressed model next to the dense one, on the same items.

    Of a look that has not read all items, while those of the dense model are known, `dense` is its value on
    all of them, and `compressed` is that plus the change. `change` is paired: compressed - dense (of
    accuracies and error rates as a fraction, of `loss` in nats), but for `perplexity` the ratio minus 1.
    `confidence` is that of every interval here, joint over `looks` looks. `drop` is how much worse it got.
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


def quality(
    primary: str,
    dense: Scores,
    compressed: Scores,
    confidence: float = 0.95,
    looks: int = 1,
    *,
    level: float | None = None,
    known: Known | None = None,
) -> tuple[Quality, ...]:
    """Return every metric of the task, `primary` first.

    Args:
        primary: the name of the main metric.
        dense: the dense model's scores of some items.
        compressed: the compressed model's scores of the same items.
        confidence: with which all intervals of one metric over `looks` looks hold together.
        looks: how many there are.
        level: of a single interval; None takes Bonferroni's, 1 - (1 - confidence) / looks.
        known: scores of all items, of which `dense` and `compressed` have the first; None uses these alone.

    Raises:
        DataError: fewer than two items, or different items.

    """
    if len(dense) != len(compressed):
        raise DataError(
            f"dense and compressed scores are of different items: {len(dense)} and {len(compressed)}"
        )
    if len(dense) < 2:
        raise DataError(f"{len(dense)} evaluation item: an interval needs at least 2")
    level = 1 - (1 - confidence) / looks if level is None else level
    known = known if known is not None and len(known.dense) > len(dense) else None
    common = {"items": len(dense), "confidence": confidence, "looks": looks}
    if primary in RESAMPLED:
        function, second = RESAMPLED[primary]
        average = losses(dense, compressed, level, known, likely=second == "loss")
        return Quality(primary, *function(dense, compressed, level), **common), Quality(  # type: ignore[arg-type]
            second,
            *average,
            **common,  # type: ignore[arg-type]
        )
    right, loss = rights(dense, compressed, level, known), losses(dense, compressed, level, known)
    accuracy = Quality("accuracy" if primary == "accuracy" else "next-token accuracy", *right, **common)  # type: ignore[arg-type]
    if primary == "accuracy":
        return accuracy, Quality("loss", *loss, **common)  # type: ignore[arg-type]
    perplexity = Quality(
        "perplexity",
        loss[0].mapped(exp),
        loss[1].mapped(exp),
        loss[2].mapped(lambda x: exp(x) - 1),
        **common,  # type: ignore[arg-type]
    )
    return perplexity, accuracy


def losses(
    dense: Scores, compressed: Scores, level: float, known: Known | None, *, likely: bool = True
) -> Triple:
    """Return the mean loss of both, which no interval takes below 0, and its change.

    Unless they are `likely` (negative log-likelihoods) with Student's intervals as they are.
    """
    whole = dense if known is None else known.dense
    wide, wider = (widening(read.loss, whole.loss) if likely else 1.0 for read in (whole, dense))
    base = mean(whole.loss, whole.weight, level, wide)
    if known is not None:
        _, mine, change = known.means("loss", compressed, level, wider)
    else:
        mine, change = (
            mean(compressed.loss, dense.weight, level, wider),
            mean(compressed.loss - dense.loss, dense.weight, level, wider),
        )
    return base.within(0.0), mine.within(0.0), change


def rights(dense: Scores, compressed: Scores, level: float, known: Known | None) -> Triple:
    """Return the share of right answers of both and its change: of single answers, or of the tokens of
    windows.
    """
    before, after, weight = dense.correct, compressed.correct, dense.weight
    whole = dense if known is None else known.dense
    if bool((whole.weight == 1).all() and ((whole.correct == 0) | (whole.correct == 1)).all()):
        plain = proportion(before, level), proportion(after, level), paired_proportions(before, after, level)
        return plain if known is None else known.answers(compressed, level)
    if known is not None:
        base, mine, change = known.means("correct", compressed, level)
    else:
        base, mine, change = (
            mean(before, weight, level),
            mean(after, weight, level),
            mean(after - before, weight, level),
        )
    return base.within(0.0, 1.0), mine.within(0.0, 1.0), change.within(-1.0, 1.0)


def flips(
    dense: Scores, compressed: Scores, confidence: float = 0.95, looks: int = 1, *, level: float | None = None
) -> Estimate:
    """Return the fraction of answers that changed (equal accuracy can hide them), with its interval.

    Arguments as `quality`.

    Where items are ranked, an answer is which of two items comes first; of a transcript, all of its words.
    """
    level = 1 - (1 - confidence) / looks if level is None else level
    if "cosine" in dense.details:
        return reversed_orders(*reversals(dense, compressed), level)
    changed = (dense.answers != compressed.answers).double()
    return (
        proportion(changed, level)
        if changed.ndim == 1
        else mean(changed.mean(1), dense.weight, level).within(0.0, 1.0)
    )


def reversed_orders(shares: Tensor, weight: Tensor, level: float) -> Estimate:
    """Return the mean share of reversed pairs.

    Each item stands in many pairs, which doubles the error of the mean (Hoeffding 1948).
    """
    found = mean(shares, weight, level)
    half = 2 * (found.high - found.value)
    return Estimate(found.value, found.value - half, found.value + half).within(0.0, 1.0)


def exp(x: float) -> float:
    """Return e^x, infinite where it overflows: a destroyed model has no perplexity to speak of."""
    return math.exp(x) if x < 700 else math.inf
