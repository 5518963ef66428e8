"""Gates: limits that a report checks, for CI. A gate holds only if the whole interval is within the limit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from workbench.errors import GateFailed
from workbench.measure.measurement import Measurement
from workbench.metrics.metrics import metric_named
from workbench.util.configuration import configuration
from workbench.util.text import size


@configuration
class Gates:
    """The limits of a report; None means not checked."""

    max_quality_drop: Annotated[
        float | None,
        Field(
            ge=0,
            description=(
                "largest loss of quality: 0.01 is 1 point of accuracy or of word error rate, 0.01 of a"
                " correlation, or 1% more perplexity"
            ),
        ),
    ] = None
    max_file_bytes: Annotated[int | None, Field(gt=0, description="largest packed file, bytes")] = None
    min_speedup: Annotated[
        float | None, Field(gt=0, description="least speed against dense: 1.0 is no slower")
    ] = None


@dataclass(frozen=True)
class Verdict:
    """One gate and whether it held, with the words that say why."""

    gate: str
    held: bool
    words: str


def check(gates: Gates, point: Measurement) -> tuple[Verdict, ...]:
    """Return a verdict for every gate that is set."""
    verdicts = []
    if gates.max_quality_drop is not None:
        drop, limit = point.primary.drop, gates.max_quality_drop
        metric = metric_named(point.primary.metric)
        low, high = (f"{metric.change_scale * end:.4g}" for end in (drop.low, drop.high))
        given = f"{limit:g}, which is {metric.amount(limit)}" if metric.change_scale > 1 else f"{limit:g}"
        reach = f"{metric.name} drop {metric.amount(drop.value)} ({low} to {high}), limit {given}"
        verdicts.append(
            Verdict("max_quality_drop", drop.high <= limit, f"{reach}{doubt(drop.low <= limit < drop.high)}")
        )
    if gates.max_file_bytes is not None:
        actual = point.sizes.file_bytes
        verdicts.append(
            Verdict(
                "max_file_bytes",
                actual <= gates.max_file_bytes,
                f"file {actual:,} bytes ({size(actual)}), limit {gates.max_file_bytes:,}",
            )
        )
    if gates.min_speedup is not None:
        if point.latency is None:
            verdicts.append(
                Verdict(
                    "min_speedup",
                    held=False,
                    words=f"latency was not measured: {point.missing.get('latency', 'no reason given')}",
                )
            )
        else:
            speed = point.latency.speedup
            reach = (
                f"speed {speed.value:.3f}x ({speed.low:.3f} to {speed.high:.3f}), limit"
                f" {gates.min_speedup:g}x"
            )
            verdicts.append(
                Verdict(
                    "min_speedup",
                    speed.low >= gates.min_speedup,
                    f"{reach}{doubt(speed.low < gates.min_speedup <= speed.high)}",
                )
            )
    return tuple(verdicts)


def doubt(undecided: bool) -> str:
    """Return the words for an interval that straddles the limit."""
    return (
        ": not shown to hold, the interval reaches beyond the limit (more items would narrow it)"
        if undecided
        else ""
    )


def enforce(verdicts: Iterable[Verdict]) -> None:
    """Raise `GateFailed`, naming every gate that did not hold."""
    failed = [f"{verdict.gate}: {verdict.words}" for verdict in verdicts if not verdict.held]
    if failed:
        raise GateFailed("; ".join(failed))
