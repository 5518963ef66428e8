"""Looks at quality while a model is trained, on training items that it is not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from workbench.compress.core.context import Work
from workbench.metrics.metrics import metric_named
from workbench.metrics.quality import quality
from workbench.metrics.scores import Scores
from workbench.modules.offload import device_of
from workbench.tasks.base import Items, Task
from workbench.util.progress import Look

MOST = 256  # items held out


@dataclass(frozen=True)
class HeldOut:
    """The last items of the training data, which no step of this training is given, and what the dense model
    does on them.

    The evaluation data stay unseen: choosing the best step by them would make them look better than they are.
    Intervals are joint over all `planned` looks (Bonferroni).
    """

    task: Task
    items: Items
    dense: Scores
    planned: int

    def look(self, model: nn.Module, step: int) -> Look:
        """Return the look at `model` after `step` optimizer steps."""
        kind = self.task.kind
        main, *others = quality(
            kind.primary, self.dense, scores(self.task, model, self.items), looks=self.planned
        )
        primary = main.compressed
        losses = (secondary for secondary in (*others, main) if not metric_named(secondary.metric).higher)
        chosen_by = next((secondary.compressed.value for secondary in losses), -primary.value)
        return Look(
            step,
            chosen_by,
            main.metric,
            main.dense.value,
            primary.value,
            primary.low,
            primary.high,
            main.items,
            main.confidence,
        )


def held_out(work: Work, look_every: int, steps: int, option: str = "look_every") -> HeldOut | None:
    """Return a tenth of the training items, at most 256, to look at after every `look_every` of `steps`
    steps; None, which is said by the name of the `option`, of fewer than 20.
    """
    task = work.task
    count = min(MOST, len(task.training) // 10)
    if count < 2:
        work.warnings.append(
            f"{option}={look_every} is left out: it needs 20 training items, of which a tenth is held out,"
            f" and {task.data_name!r} has {len(task.training)}; the last step is kept"
        )
        return None
    items = task.training[len(task.training) - count :]
    return HeldOut(task, items, scores(task, task.model, items), steps // look_every + 2)


@torch.no_grad()
def scores(task: Task, model: nn.Module, items: Items) -> Scores:
    """Return the scores of a model."""
    device = device_of(model)
    return Scores.join([task.kind.score(model, part.to(device)) for part in items.batches(task.batch_size)])
