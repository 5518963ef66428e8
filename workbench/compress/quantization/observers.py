"""What layers read during calibration: the least and the largest value of every channel, from one pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.calibration.passes import refuse_infinite
from workbench.calibration.routing import ranges_beside, without_tokens
from workbench.calibration.statistics import Statistics
from workbench.compress.core.context import Work
from workbench.modules.layer import can_hold, find_layers
from workbench.util.hooks import of_this_thread
from workbench.util.progress import Progress

if TYPE_CHECKING:
    from workbench.tasks.base import Task


@dataclass(frozen=True)
class Ranges:
    """The extremes of each layer's inputs over the calibration data, float32 [channels], by the layer's name.

    None for a layer that was never called.
    """

    low: dict[str, Tensor]
    high: dict[str, Tensor]


def ranges_now(work: Work) -> Ranges:
    """Return the ranges of the model as it is: those of the dense model are kept, those of a changed one cost
    a pass each time.

    Raises:
        CompressionError: a layer, which is named, receives infinite or NaN inputs.
    """
    if not work.changes:
        return work.statistics.once(
            "input ranges", lambda: input_ranges(work.task, work.task.model, work.progress), lasting=True
        )
    return input_ranges(work.task, work.model, work.progress)


def called_layers(statistics: Statistics) -> frozenset[str]:
    """Return the layers that the dense model calls (not only reads the weight of), from one calibration item.

    Kept.
    """

    def compute() -> frozenset[str]:
        task = statistics.task
        called = watched(task, task.model, lambda _what, _done, _total: None, items=1).low
        return frozenset((*called, *without_tokens(task.model, statistics.layers, called)))

    return statistics.once("called layers", compute)


def input_ranges(task: Task, model: nn.Module, progress: Progress) -> Ranges:
    """Return the ranges of one model over all calibration items; raises as `ranges_now`."""
    extremes = watched(task, model, progress, items=len(task.calibration))
    refuse_infinite(
        {name: torch.isfinite(extremes.low[name] + extremes.high[name]).all() for name in extremes.low}
    )
    ranges_beside(model, find_layers(model)[0], extremes.low, extremes.high)
    return extremes


def watched(task: Task, model: nn.Module, progress: Progress, *, items: int) -> Ranges:
    """Return the ranges over the first `items` calibration items, finite or not."""
    extremes = Ranges({}, {})
    device = next(model.parameters()).device
    with ExitStack() as hooks, torch.no_grad():
        for name, layer in find_layers(model)[0].items():
            for module in (layer.module, *layer.others.values()):
                if can_hold(module):
                    hooks.callback(
                        module.register_forward_pre_hook(
                            of_this_thread(watch(name, extremes)), with_kwargs=True
                        ).remove
                    )
        for start in range(0, items, task.batch_size):
            progress("calibration", start, items)
            task.kind.logits(model, task.calibration[start : min(items, start + task.batch_size)].to(device))
    progress("calibration", items, items)
    return extremes


def watch(name: str, extremes: Ranges) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
    """Return a hook that widens the ranges of `name` by what a module is given."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        given = (inputs[0] if inputs else next(iter(named.values()))).float()
        over = (0, 2, 3) if isinstance(module, nn.Conv2d) else tuple(range(given.ndim - 1))
        low, high = given.amin(over), given.amax(over)
        extremes.low[name] = torch.minimum(extremes.low[name], low) if name in extremes.low else low
        extremes.high[name] = torch.maximum(extremes.high[name], high) if name in extremes.high else high

    return hook
