"""Quality against the dense model on the same items, with intervals.

`workbench.metrics.metrics` says how each metric is computed. Looks before the last use what is known of all
items (`workbench.metrics.control_variates`). All intervals are for the value beyond the evaluation set.
Several intervals that are to hold together share the error by Bonferroni, looks at growing samples by their
joint distribution (`workbench.metrics.sequential_looks`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from workbench.errors import DataError
from workbench.metrics.bootstrap import reversals
from workbench.metrics.control_variates import ControlVariates
from workbench.metrics.estimate import Estimate
from workbench.metrics.intervals import mean, paired_proportions, proportion
from workbench.metrics.metrics import metric_named
from workbench.metrics.scores import Scores

__all__ = ["Estimate", "Quality", "flips", "mean", "paired_proportions", "proportion", "quality"]


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

    def __post_init__(self) -> None:
        """Refuse, with `DataError`, a metric that is not registered: which way is better would be a guess."""
        metric_named(self.metric)

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
    known: ControlVariates | None = None,
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
    main = metric_named(primary)
    return tuple(
        Quality(metric.name, *metric.estimate(dense, compressed, level, known), len(dense), confidence, looks)
        for metric in (main, *([] if main.beside is None else [metric_named(main.beside)]))
    )


def flips(
    dense: Scores,
    compressed: Scores,
    confidence: float = 0.95,
    looks: int = 1,
    *,
    level: float | None = None,
    by: str | None = "answers",
) -> Estimate | None:
    """Return the fraction of answers that changed (equal accuracy can hide them), with its interval.

    Arguments as `quality`, and `by`: "answers" compares these (of a transcript, all of its words); the name
    of one of the scores' details puts items in order by it, and an answer is which of two items comes first;
    None, where answers cannot be told apart, returns None.
    """
    level = 1 - (1 - confidence) / looks if level is None else level
    if by is None:
        return None
    if by != "answers":
        return reversed_orders(*reversals(dense.details[by], compressed.details[by]), level)
    changed = (dense.answers != compressed.answers).double()
    return (
        proportion(changed, level)
        if changed.ndim == 1
        else mean(changed.mean(1), dense.weight, level).within(0.0, 1.0)
    )


def reversed_orders(shares: Tensor, weight: Tensor, level: float) -> Estimate:
    """Return the mean share of reversed pairs, [0, 1], from that of each item, [items].

    Each item stands in many pairs, which doubles the error of the mean (Hoeffding 1948).
    """
    share = mean(shares, weight, level)
    half = 2 * (share.high - share.value)
    return Estimate(share.value, share.value - half, share.value + half).within(0.0, 1.0)
