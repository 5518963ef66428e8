"""The built-in metrics of quality, and how each is computed.

Accuracy of single answers: Wilson's interval (1927); its paired change: Bonett and Price's adjusted Wald
interval (2012), which stays honest with few items and few flips. Averages over tokens: Student's t on
per-item differences, weighted by tokens (a ratio estimator), for losses widened by what the dense model's say
of the items that are missing (`workbench.metrics.hard_items`); perplexity is the exponential of the mean loss
and of the ends of its interval. Rank correlation and word error rate: paired bootstrap
(`workbench.metrics.bootstrap`), which has no use for what is known of other items.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from workbench.errors import DataError
from workbench.metrics.bootstrap import rank_correlations, word_error_rates
from workbench.metrics.control_variates import ControlVariates, Triple
from workbench.metrics.hard_items import widening
from workbench.metrics.intervals import mean, paired_proportions, proportion
from workbench.metrics.metric import Estimator, Metric
from workbench.metrics.scores import Scores
from workbench.util.registry import Registry
from workbench.util.text import nearest


def losses(
    dense: Scores, compressed: Scores, level: float, known: ControlVariates | None, *, likely: bool = True
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


def rights(dense: Scores, compressed: Scores, level: float, known: ControlVariates | None) -> Triple:
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


def perplexities(dense: Scores, compressed: Scores, level: float, known: ControlVariates | None) -> Triple:
    """Return the exponential of the mean loss of both, and their ratio minus 1."""
    before, after, change = losses(dense, compressed, level, known)
    return before.mapped(exp), after.mapped(exp), change.mapped(lambda x: exp(x) - 1)


def other_losses(dense: Scores, compressed: Scores, level: float, known: ControlVariates | None) -> Triple:
    """Return the mean loss of both and its change, of losses that are no likelihoods."""
    return losses(dense, compressed, level, known, likely=False)


def resampled(statistic: Callable[[Scores, Scores, float], Triple]) -> Estimator:
    """Return the estimator of a bootstrap, which reads the scores at hand alone."""
    return lambda dense, compressed, level, _: statistic(dense, compressed, level)


def exp(x: float) -> float:
    """Return e^x, infinite where it overflows: a destroyed model has no perplexity to speak of."""
    return math.exp(x) if x < 700 else math.inf


def check(metric: Metric) -> None:
    """Raise `DataError` where the metric that is told beside one is not registered yet."""
    if metric.beside is not None and metric.beside not in METRICS:
        raise DataError(
            f"metric {metric.name!r} cannot be registered: it is told beside {metric.beside!r}, which is"
            f" none; {nearest(metric.beside, METRICS.names())}"
        )


METRICS: Registry[Metric] = Registry("metric", check, DataError)
METRICS.register(Metric("loss", losses, higher=False, logarithmic=True, unit="nats"))
METRICS.register(
    Metric("accuracy", rights, higher=True, beside="loss", percent=True, high=1.0, destroyed=0.0)
)
METRICS.register(Metric("next-token accuracy", rights, higher=True, percent=True, high=1.0, destroyed=0.0))
METRICS.register(
    Metric(
        "perplexity",
        perplexities,
        higher=False,
        beside="next-token accuracy",
        ratio=True,
        logarithmic=True,
        destroyed=math.inf,
    )
)
METRICS.register(Metric("squared error", other_losses, higher=False))
METRICS.register(
    Metric(
        "rank correlation",
        resampled(rank_correlations),
        higher=True,
        beside="squared error",
        low=-1.0,
        high=1.0,
        destroyed=0.0,
    )
)
METRICS.register(
    Metric(
        "word error rate",
        resampled(word_error_rates),
        higher=False,
        beside="loss",
        percent=True,
        destroyed=1.0,
    )
)


def metric_named(name: str) -> Metric:
    """Return the record of a metric.

    Raises:
        DataError: nothing is, with the nearest names: which way is better would be a guess.
    """
    if name not in METRICS:
        raise DataError(
            f"nothing is known about metric {name!r}; {nearest(name, METRICS.names())}; a plugin may have it"
        )
    return METRICS[name]
