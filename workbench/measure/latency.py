"""Latency of the realised model, interleaved with the dense one in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from workbench.metrics.quality import Estimate
from workbench.modules.checkpoint_types import main_type, type_words
from workbench.tasks.base import Items, Kind
from workbench.util.device import Clock
from workbench.util.progress import Progress, no_progress


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass.

    `speedup` is the median of dense / compressed over adjacent pairs, 95% interval.

    For speech a pass is the whole way from sound to words, greedily, and `audio_seconds` is how long the
    batch's sound lasts. `batch` items of shape `input_shape` each (a sequence of tokens, or channels, rows
    and columns), `rounds` timed pairs.
    """

    dense_median_ms: float
    dense_p95_ms: float
    median_ms: float
    p95_ms: float
    speedup: Estimate
    batch: int
    input_shape: tuple[int, ...]
    rounds: int
    audio_seconds: float = 0.0
    dense_type: str = ""  # of the dense model's numbers as it ran, such as "float32"; "" in older points

    @property
    def against(self) -> str:
        """Return the model that it was timed against, such as ` as dense in float32`, "" if unknown."""
        return f" as dense in {self.dense_type}" if self.dense_type else ""

    @property
    def real_time_factors(self) -> tuple[float, float] | None:
        """Return seconds of work per second of sound, of the dense and the compressed model.

        None where items are no sound.
        """
        return (
            (self.dense_median_ms / 1000 / self.audio_seconds, self.median_ms / 1000 / self.audio_seconds)
            if self.audio_seconds
            else None
        )


def measure_latency(
    kind: Kind,
    dense: nn.Module,
    realised: nn.Module,
    items: Items,
    *,
    most: int = 20,
    least: int = 6,
    budget_s: float = 10.0,
    progress: Progress = no_progress,
) -> Latency:
    """Time both models on the same batch in turn, the order swapped every round so that neither always runs
    first.

    Three untimed rounds, then `most` timed ones; of a slow model, one and as many as fit into `budget_s`
    seconds, but at least `least` (a median's 95% interval needs six).
    """
    clock = Clock(items.labels.device)

    def once(model: nn.Module) -> Callable[[], object]:
        return lambda: kind.run(model, items)

    times: dict[str, list[float]] = {"dense": [], "realised": []}
    runs = [("dense", once(dense)), ("realised", once(realised))]
    rounds, warmup = most, 3
    with torch.no_grad():
        first = sum(clock.time_ms(run) for _, run in runs)
        if first * (most + warmup) > 1000 * budget_s:  # a slow model: the first pass has warmed it up
            rounds, warmup = max(least, int(1000 * budget_s / first)), 1
        for index in range(1 - warmup, rounds):
            progress("latency", max(index, 0), rounds)
            for name, run in runs if index % 2 else reversed(runs):
                elapsed = clock.time_ms(run)
                if index >= 0:
                    times[name].append(elapsed)
    progress("latency", rounds, rounds)
    from scipy import stats  # takes a second to import, and is needed only here

    before, after = np.array(times["dense"]), np.array(times["realised"])
    ratios = before / after
    interval = stats.quantile_test(ratios, p=0.5).confidence_interval(0.95)
    speedup = Estimate(float(np.median(ratios)), float(interval.low), float(interval.high))
    shape = tuple(next(iter(items.inputs.values())).shape[1:])
    return Latency(
        float(np.median(before)),
        float(np.quantile(before, 0.95)),
        float(np.median(after)),
        float(np.quantile(after, 0.95)),
        speedup,
        len(items),
        shape,
        rounds,
        kind.audio_seconds(items) or 0.0,
        type_words(main_type(dense)),
    )
