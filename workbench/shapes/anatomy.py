"""Where a dense model has units that structured pruning may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workbench.calibration.statistics import Statistics
from workbench.compress.pruning.options import Prune
from workbench.compress.pruning.prunable_units import Found, find_blocks
from workbench.compress.pruning.structured import find_spaces
from workbench.tasks.base import Task


@dataclass(frozen=True)
class Anatomy:
    """Where the dense model has units: `spaces(step)` for heads, neurons and channels, and its lists of
    blocks.
    """

    spaces: Callable[[Prune], Found]
    blocks: dict[str, list[int]]

    @classmethod
    def of(cls, task: Task, statistics: Statistics) -> Anatomy:
        """Read a task's model.

        Channels are followed when they are first asked for, and kept with the statistics.
        """
        return cls(
            lambda step: find_spaces(step, task.model, task, statistics, pristine=True),
            find_blocks(task.model),
        )
