"""What every measurement of one bench shares: handed down in place of the bench itself."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

import torch

from workbench.calibration.disk_cache import disk_cache
from workbench.calibration.memory_cache import cache_of
from workbench.calibration.statistics import Statistics
from workbench.errors import DataError
from workbench.measure.evaluation.evaluator import Evaluator
from workbench.measure.measurement import Context
from workbench.measure.size import Sizes, given_sizes
from workbench.modules.placement import words as placed
from workbench.runtime.names import Runtime
from workbench.tasks.base import Items, Kind, Task
from workbench.util.device import describe
from workbench.util.progress import Progress

LOOKS = (16, 64, 256)  # then all; declared in advance, so that the intervals hold at every look


@dataclass(frozen=True, eq=False)
class Setting:
    """One task on one device, with what is computed once for it. Frozen: what grows while points are measured
    (scores of other recipes, the pace of a streamed model, the dense model's outputs) is passed beside it.

    `evaluation` are the task's evaluation items on `device`, `latency_items` those of them that are timed;
    `runtime` is how both models are run then.
    """

    task: Task
    evaluation: Items
    evaluator: Evaluator
    statistics: Statistics
    device: torch.device
    runtime: Runtime
    latency_items: Items
    context: Context

    @classmethod
    def of(
        cls,
        task: Task,
        device: torch.device,
        runtime: Runtime,
        *,
        latency_batch: int | None,
        confidence: float,
    ) -> Setting:
        """Return the setting of a task on a device; nothing is read or computed yet."""
        evaluation = task.evaluation.to(device)
        latency_items = evaluation[: latency_batch or task.kind.latency_items]
        context = Context(
            task.model_name,
            task.model_fingerprint,
            task.data_name,
            task.data_fingerprint,
            device.type,
            ", ".join(filter(None, (describe(device), placed(task.model)))),
            len(latency_items),
            confidence,
            importlib.metadata.version("compression-workbench"),
            runtime,
        )
        statistics = Statistics(task, cache=cache_of(task, disk_cache(task)))
        return cls(
            task, evaluation, Evaluator(task, evaluation), statistics, device, runtime, latency_items, context
        )

    @property
    def confidence(self) -> float:
        """The confidence of every quality interval."""
        return self.context.confidence

    def early(self) -> tuple[int, ...]:
        """Return the numbers of items that are looked at before all are read; see `early_looks`."""
        return early_looks(self.task.kind, self.evaluation)

    @property
    def first_look(self) -> int:
        """After how many items there is something measured."""
        return (*self.early(), len(self.evaluation))[0]

    def statistics_with(self, progress: Progress) -> Statistics:
        """Return the statistics, reporting to `progress` if they have to be computed now."""
        self.statistics.progress = progress
        return self.statistics

    def dense_sizes(self) -> Sizes:
        """Return the sizes of the file that was given, computed once."""
        return self.statistics.once("dense sizes", lambda: given_sizes(self.task.model))


def early_looks(kind: Kind, items: Items) -> tuple[int, ...]:
    """Return the numbers of items that are looked at before all are read, items being on the device that
    reads them: on a CPU also those that the kind asks for there (a language model's first look is at 4
    windows).
    """
    first = kind.cpu_looks(items) if items.labels.device.type == "cpu" else ()
    return tuple(count for count in (*first, *LOOKS) if count < len(items))


def checked_margin(margin: float | None) -> float | None:
    """Return a margin, or refuse it with `DataError`."""
    if margin is not None and not 0 <= margin < float("inf"):
        raise DataError(
            f"margin={margin!r} is refused: give half the width that an interval may have, such as 0.01, or 0"
            " to read all items"
        )
    return margin
