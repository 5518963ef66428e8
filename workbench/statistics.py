"""One pass over calibration data: what methods need to know about the dense model, computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from workbench.compress.layers import Progress, find_layers, no_progress, patches
from workbench.errors import CompressionError

if TYPE_CHECKING:
    from workbench.tasks.base import Task

T = TypeVar("T")


class Statistics:
    """Second moments of every layer's inputs over the calibration data, and whatever methods derive from them.

    Nothing is computed before it is asked for. `once` keeps what does not depend on a slider (factorisations, sorted
    weights), so that moving the slider pays only for the rest.
    """

    def __init__(self, task: Task, progress: Progress = no_progress) -> None:
        """Remember the task; compute nothing yet."""
        self.task = task
        self.progress = progress
        self.kept: dict[Hashable, Any] = {}

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return `compute()`, kept under `key` for the next time."""
        if key not in self.kept:
            self.kept[key] = compute()
        value: T = self.kept[key]
        return value

    def second_moment(self, name: str) -> Tensor:
        """Return E[x x^T] of a dense layer's inputs, float32 [inputs, inputs], on the model's device.

        Raises:
            CompressionError: the layer sees no input during calibration, or one that is not finite.

        """
        moments = self.once("second moments", lambda: second_moments(self.task, self.progress))
        if name not in moments:
            raise CompressionError(f"layer {name!r} receives no input during calibration: it cannot be compressed by its activations")
        return moments[name]


def second_moments(task: Task, progress: Progress) -> dict[str, Tensor]:
    """Return E[x x^T] of every layer's inputs over the calibration data, with the dense model in eval mode."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    shared: dict[tuple[int, int], tuple[Tensor, Tensor, int]] = {}  # q, k and v read the same tensor: multiply it once

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            given = inputs[0] if inputs else next(iter(named.values()))
            key = id(given), given._version  # noqa: SLF001  counts changes in place
            if key not in shared or isinstance(module, nn.Conv2d):
                rows = patches(module, given)
                if not torch.isfinite(rows).all():
                    raise CompressionError(f"layer {name!r} receives infinite or NaN inputs during calibration")
                shared[key] = given, rows.t() @ rows, len(rows)  # holding `given` keeps its id from being used again
            _, product, count = shared[key]
            sums[name] = sums[name] + product if name in sums else product
            counts[name] = counts.get(name, 0) + count
            if isinstance(module, nn.Conv2d):
                del shared[key]

        return hook

    layers, _ = find_layers(task.model)
    device = next(task.model.parameters()).device
    with ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            hooks.callback(layer.module.register_forward_pre_hook(watch(name), with_kwargs=True).remove)
        for start in range(0, len(task.calibration), task.batch_size):
            progress("calibration", start, len(task.calibration))
            shared.clear()
            task.kind.logits(task.model, task.calibration[start : start + task.batch_size].to(device))
    progress("calibration", len(task.calibration), len(task.calibration))
    return {name: total / counts[name] for name, total in sums.items()}
