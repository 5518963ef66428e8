"""Scores of evaluation items, as many as are asked for: what was read before is not read again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from workbench.compress.layers import Progress, no_progress
from workbench.tasks import score
from workbench.tasks.base import Items, Scores, Task


@dataclass
class Evaluator:
    """Scores models on a task's evaluation items, which lie on the model's device; holds what does not depend on the model that is scored."""

    task: Task
    items: Items

    def scores(self, model: nn.Module, parts: list[Scores], count: int, progress: Progress = no_progress) -> Scores:
        """Extend `parts` (scores of consecutive items, changed in place) to at least `count` items; return the first `count`."""
        done = sum(map(len, parts))
        while done < count:
            progress("evaluate", done, len(self.items))
            upto = min(count, done + self.task.batch_size)
            parts.append(score(self.task.kind, model, self.items[done:upto]))
            done = upto
        joined = Scores.join(parts)
        parts[:] = [joined]
        return joined.first(count)
