"""Predictions against what was then measured: each point keeps the prediction that was made before it.

A prediction of quality holds if the value on all evaluation items lies in its interval. One of speed holds if
its interval and that of the measured ratio meet: where no kernel exists it is exactly 1, which no measurement
is. Points measured without a predictor are not counted.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workbench.measure.measurement import Measurement
from workbench.metrics.estimate import Estimate
from workbench.metrics.metrics import metric_named

LAST = 100  # predictions that a score looks back on
FEWEST = 5  # of them before anything is said in passing


@dataclass(frozen=True)
class Tally:
    """How `count` predictions did: how many `held`, with Wilson's interval of that share at 95%, and the
    median error.

    The error of quality is in the metric's own unit (of perplexity in the logarithm: 0.1 is about 10%), that
    of speed in the logarithm of the ratio.
    """

    count: int
    held: int
    share: Estimate
    median_error: float


@dataclass(frozen=True)
class PredictionScore:
    """What predictions were worth so far: quality, how many of those were wide, and speed.

    None where nothing was predicted. Of `unknown` more nothing was known of quality: they held nothing that
    could fail, and do not count.
    """

    metric: str
    level: float
    quality: Tally | None
    wide: int
    speed: Tally | None
    unknown: int = 0

    def words(self) -> str:
        """Return one sentence for users, "" if nothing was scored."""
        if self.quality is None:
            return ""
        metric = metric_named(self.metric)
        error = self.quality.median_error
        off = (
            f"{math.expm1(error):.1%} of {self.metric}"
            if metric.ratio
            else (
                f"{error * metric.change_scale:.{metric.change_digits()}f}"
                f"{' points' if metric.percent else ''} of {self.metric}"
            )
        )
        said = (
            f"of the last {self.quality.count} predictions {self.quality.held} held"
            f" ({self.quality.held / self.quality.count:.0%}, meant: {self.level:.0%}), median error {off}"
        )
        said += f"; {self.wide} were wide" if self.wide else ""
        said += f"; of {self.unknown} more nothing was known" if self.unknown else ""
        if self.speed is not None:
            said += (
                f"; of speed {self.speed.held} of {self.speed.count}, median error"
                f" {math.expm1(self.speed.median_error):.0%}"
            )
        return said


def score(rows: Iterable[Measurement], last: int = LAST) -> PredictionScore | None:
    """Return the score of the last predictions, None if no point was predicted before it was measured."""
    told = [
        row
        for row in rows
        if row.predicted is not None and row.complete and row.predicted.metric == row.primary.metric
    ][-last:]
    if not told:
        return None
    newest = told[-1].predicted
    assert newest is not None  # noqa: S101  for the type checker
    same = [row for row in told if row.predicted is not None and row.predicted.metric == newest.metric]
    predictions = [
        (row.predicted, row.primary.compressed.value)
        for row in same
        if row.predicted is not None and not row.predicted.unknown
    ]
    pairs = [(predicted.quality, Estimate(value, value, value)) for predicted, value in predictions]
    ratio = metric_named(newest.metric).ratio
    timed = [
        (row.predicted.speedup, row.latency.speedup)
        for row in same
        if row.predicted is not None and row.predicted.speedup is not None and row.latency is not None
    ]
    return PredictionScore(
        newest.metric,
        newest.level,
        tally(pairs, logarithmic=ratio) if pairs else None,
        sum(predicted.wide for predicted, _ in predictions),
        tally(timed, logarithmic=True) if timed else None,
        len(same) - len(predictions),
    )


def words_of(rows: Iterable[Measurement]) -> str:
    """Return one sentence on what was predicted of these points, "" if nothing was."""
    scored = score(rows)
    return "" if scored is None else scored.words()


def tally(pairs: Sequence[tuple[Estimate, Estimate]], *, logarithmic: bool) -> Tally:
    """Return how predictions did against what was measured: they hold where both intervals meet."""
    held = sum(guess.low <= measured.high and measured.low <= guess.high for guess, measured in pairs)
    errors = [apart(guess.value, measured.value, logarithmic=logarithmic) for guess, measured in pairs]
    return Tally(len(pairs), held, wilson(held, len(pairs)), statistics.median(errors))


def apart(guess: float, value: float, *, logarithmic: bool) -> float:
    """Return how far a prediction was off; infinite where only one of both is."""
    if guess == value:
        return 0.0
    if logarithmic and guess > 0 and value > 0:
        return (
            abs(math.log(guess) - math.log(value))
            if math.isfinite(guess) and math.isfinite(value)
            else math.inf
        )
    return abs(guess - value)


def wilson(held: int, count: int, z: float = 1.959963984540054) -> Estimate:
    """Return the share held/count with the interval of Wilson (1927)."""
    share, stretch = held / count, 1 + z**2 / count
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return Estimate(share, max(0.0, (centre - half) / stretch), min(1.0, (centre + half) / stretch))
